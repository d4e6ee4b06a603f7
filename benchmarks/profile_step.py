"""Where the time of a pretraining step goes, operation by operation: the table of docs/performance.md.

    python benchmarks/profile_step.py --variant atto --batch 16
    python benchmarks/profile_step.py --variant base --batch 128 --precision bf16 --way packed+compile

Takes the options of train_step.py; the time of each operation is its own, without those it calls, on the device.
"""

import argparse
import sys
from collections import defaultdict

import torch
import train_step

from fcmae.training.launch import keep_freed_memory

GROUPS = {
    # group: what the names of its operations and kernels begin with
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::addmv", "aten::addr"),
    "depthwise convolutions": (
        "fcmae::patch_depthwise",
        "GeneratedBackwardFor_fcmae_patch_depthwise",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
        "aten::cudnn_convolution",
        "aten::_conv_depthwise2d",
    ),
    "LayerNorm": ("aten::native_layer_norm", "fcmae::patch_norm"),
    "GELU": ("aten::gelu", "fcmae::gelu"),
    "sums": ("aten::sum", "aten::mean", "aten::linalg_vector_norm"),
    "other arithmetic": (
        "aten::mul",
        "aten::add",
        "aten::pow",
        "aten::addcmul",
        "aten::div",
        "aten::sub",
        "aten::where",
    ),
    "gathers and copies": ("aten::index", "aten::_index_put", "aten::copy_", "aten::gather", "aten::scatter"),
    "AdamW": ("aten::_fused_adamw",),
    "fresh memory": ("aten::fill_", "aten::zero_", "aten::empty"),
}


def group_of(name: str) -> str:
    """Return the group whose names this one begins with."""
    return next((group for group, begins in GROUPS.items() if name.startswith(begins)), "everything else")


def profile(
    way: train_step.Way, batch: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace
) -> dict[str, float]:
    """Return milliseconds of a step by group."""
    for _ in range(args.warmup + 1):
        train_step.train_step(way, batch, args)
    with torch.profiler.profile() as profiler:
        for _ in range(args.steps):
            train_step.train_step(way, batch, args)
        if args.device == "cuda":
            torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        own_us = event.self_device_time_total if args.device == "cuda" else event.self_cpu_time_total
        times[group_of(event.key)] += own_us / 1e3 / args.steps
    return dict(times)


def main(argv: list[str]) -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", default="packed", help="of train_step.py, also with +compile")
    own, others = parser.parse_known_args(argv)
    args = train_step.parse_args(others)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    times = profile(*train_step.build_way(own.way, args), args)
    total = sum(times.values())
    print("\n".join(f"{key}: {value}" for key, value in train_step.describe(args).items() if key != "rounds"))
    print(f"\n{args.variant}, {own.way}, {args.steps} steps\n")
    print("| operation | ms a step | share |\n|---|---:|---:|")
    for group, ms in sorted(times.items(), key=lambda item: -item[1]):
        print(f"| {group} | {ms:.1f} | {ms / total:.0%} |")
    print(f"| all | {total:.1f} | 100% |")


if __name__ == "__main__":
    main(sys.argv[1:])
