// What MinkowskiEngine 0.5.4 expects of CUDA 11 and CUDA 13 no longer has; included before each of its sources.
#pragma once

// 1. Headers that others once brought along.
#include <ATen/core/Tensor.h>
#include <thrust/device_vector.h>
#include <thrust/execution_policy.h>
#include <thrust/host_vector.h>
#include <thrust/iterator/zip_iterator.h>
#include <thrust/reduce.h>
#include <thrust/remove.h>
#include <thrust/sequence.h>
#include <thrust/sort.h>
#include <thrust/transform.h>
#include <thrust/unique.h>

#if defined(__CUDACC__) && __CUDACC_VER_MAJOR__ >= 13

// 2. The base class that functors named their argument and result with.
THRUST_NAMESPACE_BEGIN
template <typename Argument, typename Result>
struct unary_function {
  using argument_type = Argument;
  using result_type = Result;
};
THRUST_NAMESPACE_END

// 3. Prefetching to a device by its number: a device is now a location.
#include <cuda_runtime_api.h>
inline cudaError_t cudaMemPrefetchAsync(const void *pointer, std::size_t bytes, int device, cudaStream_t stream) {
  cudaMemLocation location{};
  location.type = device == cudaCpuDeviceId ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
  location.id = device == cudaCpuDeviceId ? 0 : device;
  return cudaMemPrefetchAsync(pointer, bytes, location, 0, stream);
}

// 4. A smart pointer to its hash map asks for `__to_address`, which libstdc++ and libcu++ both offer equally well:
//    a more specialised one decides.
template <typename Key, typename Element, typename Hasher, typename Equality, typename Allocator>
class concurrent_unordered_map;
template <typename... Parts>
constexpr concurrent_unordered_map<Parts...> *__to_address(concurrent_unordered_map<Parts...> *pointer) noexcept {
  return pointer;
}

#endif
