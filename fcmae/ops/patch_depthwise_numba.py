"""The CPU side of `patch_depthwise`: each image on a canvas that fits the cache, channels innermost, by numba."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import config, njit, prange, set_num_threads
from torch import Tensor


def _compiled(function: Callable[..., None]) -> Any:
    """Compile at the first call, in parallel; kept on disk for the next process where there is a place for it."""
    options: dict[str, Any] = {"parallel": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return njit(**options)(function)


@njit
def _lay_out(x, ids, gw, border, canvas):  # pyright: ignore[reportMissingParameterType]
    """Lay an image's patches (p, k, k c) on its canvas (h + 2 border, (w + 2 border) c)."""
    _, k, n = x.shape
    for j in range(len(x)):
        start = (ids[j] % gw * k + border) * (n // k)
        for row in range(k):
            canvas[ids[j] // gw * k + border + row, start : start + n] = x[j, row]


@_compiled
def _convolve(x, weight, bias, ids, gh, gw, out):  # pyright: ignore[reportMissingParameterType]
    """Whole rows of a patch at a time: out (b, p, k, k c) from x alike.

    weight (K, 4m, k c) and bias (k c) are repeated for each site of a row, weight filled up with zeros to 4m >= K
    columns: four offsets at once, as it is these loops that are vectorised.
    """
    b, p, k, n = x.shape
    c = n // k
    size, columns = weight.shape[:2]
    border = size // 2
    for i in prange(b):
        canvas = np.zeros((gh * k + size - 1, (gw * k + columns - 1) * c), np.float32)
        _lay_out(x[i], ids[i], gw, border, canvas)
        for j in range(p):
            for row in range(k):
                o = out[i, j, row]
                o[:] = bias
                for dy in range(size):
                    r = canvas[ids[i, j] // gw * k + row + dy, ids[i, j] % gw * k * c :]
                    for dx in range(0, columns, 4):
                        s = dx * c
                        r0, r1, r2, r3 = r[s : s + n], r[s + c :], r[s + 2 * c :], r[s + 3 * c :]
                        w0, w1, w2, w3 = weight[dy, dx], weight[dy, dx + 1], weight[dy, dx + 2], weight[dy, dx + 3]
                        for q in range(n):
                            o[q] += r0[q] * w0[q] + r1[q] * w1[q] + r2[q] * w2[q] + r3[q] * w3[q]


@_compiled
def _differentiate(x, grad, ids, gh, gw, out):  # pyright: ignore[reportMissingParameterType]
    """The gradient of the kernel from each image: out (b, K, K c) from x and grad (b, p, k, k c)."""
    b, p, k, n = x.shape
    c = n // k
    size, m = out.shape[1:]
    border = size // 2
    for i in prange(b):
        canvas = np.zeros((gh * k + size - 1, (gw * k + size - 1) * c), np.float32)
        _lay_out(x[i], ids[i], gw, border, canvas)
        total = np.zeros((size, m), np.float32)
        repeated = np.empty((k, m), np.float32)  # each site's gradient, once for every offset of a row
        for j in range(p):
            for row in range(k):
                for e in range(k):
                    for dx in range(size):
                        repeated[e, dx * c : (dx + 1) * c] = grad[i, j, row, e * c : (e + 1) * c]
                for dy in range(size):
                    r = canvas[ids[i, j] // gw * k + row + dy, ids[i, j] % gw * k * c :]
                    t = total[dy]
                    for e in range(0, k - 3, 4):
                        r0, r1, r2, r3 = r[e * c :], r[(e + 1) * c :], r[(e + 2) * c :], r[(e + 3) * c :]
                        g0, g1, g2, g3 = repeated[e], repeated[e + 1], repeated[e + 2], repeated[e + 3]
                        for q in range(m):
                            t[q] += r0[q] * g0[q] + r1[q] * g1[q] + r2[q] * g2[q] + r3[q] * g3[q]
                    for e in range(k - k % 4, k):
                        r0, g0 = r[e * c :], repeated[e]
                        for q in range(m):
                            t[q] += r0[q] * g0[q]
        out[i] = total


def _run(kernel: Any, *args: Any) -> None:
    """Call a kernel with tensors as arrays, on as many threads as torch computes on."""
    threads = torch.get_num_threads()
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))  # pyright: ignore[reportAttributeAccessIssue]
    if torch.get_num_threads() != threads:  # numba's first call sets OpenMP's, which torch shares
        torch.set_num_threads(threads)
    kernel(*(arg.detach().numpy() if isinstance(arg, Tensor) else arg for arg in args))


def _rows(x: Tensor) -> Tensor:
    """See (b, p, k, k, c) as float32 rows of sites (b, p, k, k c)."""
    return x.to(torch.float32).contiguous().flatten(3)


def patch_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, visible_ids: Tensor, slots: Tensor, grid: Sequence[int]
) -> Tensor:
    k, c = x.shape[-2:]
    taps = weight[:, 0].permute(1, 2, 0).to(torch.float32)  # (K, K, c)
    taps = F.pad(taps, (0, 0, 0, -len(taps) % 4)).repeat(1, 1, k)
    shift = taps.new_zeros(k * c) if bias is None else bias.to(torch.float32).repeat(k)
    out = torch.empty(x.shape, dtype=torch.float32)
    _run(_convolve, _rows(x), taps, shift, visible_ids.contiguous(), grid[0], grid[1], out.view(*x.shape[:3], -1))
    return out.to(x.dtype)


def patch_depthwise_norm_rstd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    visible_ids: Tensor,
    slots: Tensor,
    grid: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor]:
    conv = patch_depthwise(x.to(torch.float32), weight, bias, visible_ids, slots, grid)
    out, _, rstd = torch.native_layer_norm(conv, conv.shape[-1:], None, None, eps)
    return out.to(x.dtype), rstd.squeeze(-1)


def patch_norm_backward(grad: Tensor, out: Tensor, rstd: Tensor) -> Tensor:
    normed, zero, one = out.to(rstd.dtype), torch.zeros_like(rstd)[..., None], torch.ones_like(rstd)[..., None]
    wanted = [True, False, False]
    grads = torch.ops.aten.native_layer_norm_backward(
        grad.to(rstd.dtype), normed, normed.shape[-1:], zero, one, None, None, wanted
    )
    return grads[0].mul_(rstd[..., None]).to(grad.dtype)


def patch_depthwise_weight_grads(
    grad: Tensor, x: Tensor, visible_ids: Tensor, slots: Tensor, grid: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    c = x.shape[-1]
    per_image = torch.empty(len(x), size, size * c)
    rows = _rows(grad)
    _run(_differentiate, _rows(x), rows, visible_ids.contiguous(), grid[0], grid[1], per_image)
    grad_weight = per_image.sum(0).view(size, size, c).permute(2, 0, 1)[:, None]
    return grad_weight.contiguous(), rows.view(-1, c).sum(0)
