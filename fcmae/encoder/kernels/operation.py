"""Operations of PyTorch that run as formulas on any device and as Triton kernels on CUDA; knows none of them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage]


def operation(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Return a decorator that registers a function of tensors as the operation `fcmae::<its name>`.

    The function itself is the reference and runs where there is no GPU. On CUDA runs the function of the same
    name and signature in the module of the same name plus `_triton`. Compiled programs call either as it is.

    Args:
        fake: the function's outputs, contiguous and uninitialised, from inputs of which only the shapes are known.
    """

    def register(function: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(f"fcmae::{function.__name__}", function, mutates_args=())
        op.register_fake(fake)

        @op.register_kernel("cuda")
        def _(*args: Any) -> Any:
            kernels = import_module(f"{function.__module__}_triton")  # only here: Triton is not everywhere
            return getattr(kernels, function.__name__)(*args)

        return op

    return register
