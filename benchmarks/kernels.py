"""Time the operations of a block and its matrix products, stage by stage.

    python benchmarks/kernels.py --variant base --batch 256 --precision bf16 --json kernels.json
    python benchmarks/kernels.py --variant base --batch 256 --precision bf16 --sweep --stages 3

Times are medians, on a GPU by events between runs that find an empty cache (triton.testing.do_bench). GB/s counts
what an operation must read and write at the least, TFLOP/s the products. `--sweep` times the operations again with
other sizes of their work, constants of the modules of kernels (`SIZES`): to choose better ones by, not to change
while a run goes on, as some say in which order is summed. `--once` times nothing, for programs such as ncu, which
count what a kernel does.
"""

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import train_step
from torch import Tensor

from fcmae import VARIANTS, sample_visible_ids
from fcmae.masking import count_visible
from fcmae.ops import gelu_grn, patch_depthwise

SIZES = {
    # operation: module and constant of its kernels -> values to try
    "gelu_grn": {
        "gelu_grn_triton.VALUES": (512, 1024, 2048, 4096),
        "gelu_grn_triton.CHANNELS": ((256,), (128,), (64,)),
        "gelu_grn_triton.PROGRAMS": (1024, 4096, 16384),
    },
    "gelu_grn_backward": {
        "gelu_grn_triton.VALUES": (512, 1024, 2048, 4096),
        "gelu_grn_triton.CHANNELS": ((256,), (128,), (64,)),
        "gelu_grn_triton.PROGRAMS": (1024, 4096, 16384),
    },
    "depthwise with norm": {"patch_depthwise_triton.VALUES_PER_WARP": (256, 512, 1024, 2048)},
    "norm's gradient": {"patch_depthwise_triton.NORM_VALUES": (1024, 2048, 4096, 8192)},
    "depthwise's gradient by x": {"patch_depthwise_triton.VALUES_PER_WARP": (256, 512, 1024, 2048)},
    "depthwise's gradient by the weight": {
        "patch_depthwise_triton.WEIGHT_CHANNELS": (32, 64, 128),
        "patch_depthwise_triton.WEIGHT_PROGRAMS": (528, 1056, 2112),
    },
}
KERNEL, STRIDE = 7, 32


@dataclass(frozen=True)
class Operation:
    """What is timed."""

    name: str
    run: Callable[[], object]
    nbytes: float
    """That it must read and write at the least."""
    flop: float = 0.0
    """Of a matrix product."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variant", default="base", choices=VARIANTS)
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", default="bf16", choices=train_step.DTYPES)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--sweep", action="store_true", help="try other sizes of the work, too")
    parser.add_argument("--once", action="store_true", help="run each operation once, and time none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def time_us(run: Callable[[], object], device: str) -> float:
    """Return the microseconds of a call."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e3 * cast(float, do_bench(run, return_mode="median"))
    run()
    return 1e6 * statistics.median(train_step.seconds_of(run, device) for _ in range(3))


def operations(stage: int, args: argparse.Namespace) -> list[Operation]:
    """Return the operations of a block of this stage, 1 to 4, forward and backward."""
    dtype, device, b = train_step.DTYPES[args.precision], args.device, args.batch
    side = args.image_size // STRIDE
    p = count_visible(side**2, train_step.MASK_RATIO)
    k, c = 8 >> (stage - 1), VARIANTS[args.variant][1][stage - 1]
    torch.manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    ids = sample_visible_ids(b, side**2, train_step.MASK_RATIO, device=device)
    slots = patch_depthwise.patch_slots(ids, side**2)
    x, grad = (randn(b, p, k, k, c, dtype=dtype) for _ in range(2))
    h, grad_h = (randn(b, p * k * k, 4 * c, dtype=dtype) for _ in range(2))
    weight, bias, gamma, beta = randn(c, 1, KERNEL, KERNEL), randn(c), randn(4 * c), randn(4 * c)
    eps = 1e-6
    _, norm = gelu_grn.gelu_grn(h, gamma, beta, eps)
    grid = (side, side)
    _, rstd = patch_depthwise.patch_depthwise_norm_rstd(x, weight, bias, ids, slots, grid, eps)
    narrow, wide = x.nbytes, h.nbytes
    found = [
        # sums read h, the scale pass reads it again and writes; back, both passes read two, the second writes two
        Operation("gelu_grn", lambda: gelu_grn.gelu_grn(h, gamma, beta, eps), nbytes=3 * wide),
        Operation(
            "gelu_grn_backward",
            lambda: gelu_grn.gelu_grn_backward(grad_h, h, norm, gamma, beta, eps),
            nbytes=6 * wide,
        ),
        Operation(
            "depthwise with norm",
            lambda: patch_depthwise.patch_depthwise_norm_rstd(x, weight, bias, ids, slots, grid, eps),
            nbytes=2 * narrow,
        ),
        Operation("norm's gradient", lambda: patch_depthwise.patch_norm_backward(grad, x, rstd), nbytes=3 * narrow),
        Operation(
            "depthwise's gradient by x",
            lambda: patch_depthwise.patch_depthwise(grad, weight, None, ids, slots, grid),
            nbytes=2 * narrow,
        ),
        Operation(
            "depthwise's gradient by the weight",
            lambda: patch_depthwise.patch_depthwise_weight_grads(grad, x, ids, slots, grid, KERNEL),
            nbytes=2 * narrow,
        ),
    ]
    rows, flop = x.flatten(0, 3), 8.0 * (x.numel() // c) * c * c
    hidden, w1, w2 = h.flatten(0, 1), randn(4 * c, c, dtype=dtype), randn(c, 4 * c, dtype=dtype)
    products: dict[str, tuple[Tensor, Tensor]] = {
        "product 1": (rows, w1.t()),
        "product 2": (hidden, w2.t()),
        "product 1's gradient by x": (hidden, w1),
        "product 2's gradient by x": (rows, w2),
        "product 1's gradient by the weight": (hidden.t(), rows),
        "product 2's gradient by the weight": (rows.t(), hidden),
    }
    for name, (left, right) in products.items():
        out = left.shape[0] * right.shape[1] * dtype.itemsize
        run = lambda left=left, right=right: torch.mm(left, right)  # noqa: E731
        found.append(Operation(name, run, nbytes=left.nbytes + right.nbytes + out, flop=flop))
    return found


def sweep(operation: Operation, args: argparse.Namespace) -> dict[str, float | str]:
    """Return the microseconds of an operation by the size of its work, or why there are none."""
    found: dict[str, float | str] = {}
    for path, values in SIZES.get(operation.name, {}).items():
        name, _, constant = path.partition(".")
        module = importlib.import_module(f"fcmae.ops.{name}")
        before = getattr(module, constant)
        for value in values:
            setattr(module, constant, value)
            try:
                found[f"{constant}={value}"] = time_us(operation.run, args.device)
            except Exception as error:  # a size that does not compile, or has too many registers to run
                found[f"{constant}={value}"] = f"{type(error).__name__}: {error}"[:200]
        setattr(module, constant, before)
    return found


def measure(operation: Operation, stage: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time an operation, print and return its row."""
    us = time_us(operation.run, args.device)
    row = {
        "stage": stage,
        "operation": operation.name,
        "us": us,
        "gb_per_s": operation.nbytes / us / 1e3,
        "tflop_per_s": operation.flop / us / 1e6,
    }
    flop = f"{row['tflop_per_s']:.3g}" if operation.flop else ""
    print(f"| {stage} | {operation.name} | {us:.1f} | {row['gb_per_s']:.0f} | {flop} |", flush=True)
    if args.sweep:
        row["sweep"] = sweep(operation, args)
        for size, other in row["sweep"].items():
            print(f"| | {size} | {other if isinstance(other, str) else f'{other:.1f}'} | | |", flush=True)
    return row


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse_args(argv)
    if args.once:
        for stage in args.stages:
            for operation in operations(stage, args):
                operation.run()
        return
    header = {
        "device": f"{args.device}: {train_step.device_name(args.device)}",
        "torch": torch.__version__,
        "step": f"{args.variant}, {args.image_size} px, batch {args.batch}, {args.precision}",
    }
    print("\n".join(f"{key}: {value}" for key, value in header.items()))
    print("\n| stage | operation | us | GB/s | TFLOP/s |\n|---:|---|---:|---:|---:|", flush=True)
    rows = [measure(operation, stage, args) for stage in args.stages for operation in operations(stage, args)]
    if args.json:
        args.json.write_text(json.dumps({**header, "operations": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
