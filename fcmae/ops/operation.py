"""The dispatcher: formulas, Triton kernels on CUDA or numba kernels on CPU, by the first tensor; it knows none."""

from collections.abc import Callable, Collection
from functools import wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage]

P = ParamSpec("P")
R = TypeVar("R")


def operation(
    fake: Callable[..., Any], *, numba_dtypes: Collection[torch.dtype] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Return a decorator that registers a function of tensors as the custom operator `fcmae::<its name>`.

    The function itself is the reference and runs where there is no GPU. On CUDA runs the function of the same
    name and signature in the module of the same name plus `_triton`, and on CPU, for first arguments of
    `numba_dtypes`, that of the module plus `_numba`. `torch.compile` calls each as it is.

    Args:
        fake: the function's outputs, contiguous and uninitialised, from inputs of which only the shapes are known.
        numba_dtypes: what the numba version takes; none where there is no such version.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(f"fcmae::{function.__name__}", function, mutates_args=())
        op.register_fake(fake)

        @op.register_kernel("cuda")
        def _(*args: Any) -> Any:
            kernels = import_module(f"{function.__module__}_triton")  # only here: Triton is not everywhere
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device, whichever the tensors' is
                return getattr(kernels, function.__name__)(*args)

        if numba_dtypes:

            @op.register_kernel("cpu")
            def _(*args: Any) -> Any:
                if args[0].dtype not in numba_dtypes:
                    return function(*args)
                return getattr(import_module(f"{function.__module__}_numba"), function.__name__)(*args)

        return op

    return register


def composition(*, cuda: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator for a function made of operations, in whose place `cuda` runs on CUDA.

    `torch.compile` traces both, so that inductor may fuse what PyTorch's own operations compute.
    """

    def choose(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            first = args[0]
            assert isinstance(first, torch.Tensor)
            return (cuda if first.is_cuda else function)(*args, **kwargs)

        return run

    return choose
