"""Where the time of a pretraining step goes: the table of docs/performance.md.

    python benchmarks/profile_step.py --variant atto --batch 16
    python benchmarks/profile_step.py --variant base --batch 256 --precision bf16 --graph --json base.json

Takes the options of train_step.py. On a CPU the time of each operation is its own, without those it calls. On a GPU
the kernels are grouped by their names, those of under 5 us by themselves, since what they cost is their launch; a
second table has each kernel by the grid of its launch, so by stage, with its registers and occupancy. What the CPU
needs to issue a step, measured without the profiler, is to be less than the step takes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import train_step

GROUPS = {
    # group: what the names of its operations begin with
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
KERNELS = {
    # group: what stands in the names of its kernels; the first group that fits
    "depthwise convolutions": (
        "_convolve_kernel",
        "_weight_grads_kernel",
        "_grad_weight_kernel",
        "conv_depthwise2d",
        "dgrad",
        "wgrad",
        "fprop",
    ),
    "LayerNorm": ("layer_norm", "LayerNorm", "GammaBeta", "_norm_backward_kernel"),
    "weights folded and cast": ("_fold",),
    "crops resized": ("_across_kernel", "_down_kernel"),
    "GELU and GRN": (
        "_square_sums_kernel",
        "_scale_kernel",
        "_grad_sums_kernel",
        "_backward_kernel",
        "_image_forward_kernel",
        "Gelu",
    ),
    "loss": ("_errors_kernel",),
    "AdamW": ("multi_tensor_apply", "FusedAdam"),
    "matrix products": ("nvjet", "gemm", "gemv", "cutlass", "splitK", "cublas"),
    "compiled": ("triton_poi", "triton_per", "triton_red", "triton_for"),
    "sums": ("reduce_kernel",),
    "gathers and copies": ("copy", "Copy", "CatArray", "index", "gather", "scatter", "Memcpy"),
    "fresh memory": ("FillFunctor", "Memset"),
    "other arithmetic": ("elementwise",),
}
TINY_US = 5.0
TINY = "kernels of under 5 us"
OTHERS = "everything else"


class Kernel(NamedTuple):
    """A kernel, or a copy or fill of memory, that ran on the GPU."""

    name: str
    us: float
    grid: tuple[int, ...] = ()
    registers: int = 0
    occupancy: int = 0
    """Estimated, in per cent."""


def group_of(name: str) -> str:
    """Return the group of an operation."""
    return next((group for group, begins in GROUPS.items() if name.startswith(begins)), OTHERS)


def group_of_kernel(kernel: Kernel) -> str:
    """Return the group of a kernel."""
    if kernel.us < TINY_US:
        return TINY
    return next((group for group, parts in KERNELS.items() if any(p in kernel.name for p in parts)), OTHERS)


def kernels_of(profiler: torch.profiler.profile) -> list[Kernel]:
    """Return all that ran on the GPU, by the trace, which alone has the grids."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [
        Kernel(
            event["name"],
            event["dur"],
            tuple(event["args"].get("grid", ())),
            event["args"].get("registers per thread", 0),
            event["args"].get("est. achieved occupancy %", 0),
        )
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def profile(
    way: train_step.Way, batch: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace
) -> torch.profiler.profile:
    """Return the profile of `--steps` steps."""
    for _ in range(args.warmup + way.warm_up):
        train_step.train_step(way, batch, args)
    with torch.profiler.profile() as profiler:
        for _ in range(args.steps):
            train_step.train_step(way, batch, args)
        if args.device == "cuda":
            torch.cuda.synchronize()
    return profiler


def issue_and_step_ms(
    way: train_step.Way, batch: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace
) -> tuple[float, float]:
    """Return medians of what the CPU takes, and the whole step, over steps that each begin with an idle GPU."""
    issued, whole = [], []
    for _ in range(max(args.steps, 3)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        train_step.train_step(way, batch, args)
        issued.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return 1e3 * statistics.median(issued), 1e3 * statistics.median(whole)


def summarise_kernels(kernels: list[Kernel], steps: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of both tables, the longest first: groups, and kernels by grid."""
    groups: dict[str, list[float]] = defaultdict(list)
    launches: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for kernel in kernels:
        groups[group_of_kernel(kernel)].append(kernel.us)
        launches[kernel._replace(us=0.0)].append(kernel.us)

    def row(us: list[float]) -> dict[str, float]:
        return {"count": len(us) / steps, "us": statistics.median(us), "ms": sum(us) / 1e3 / steps}

    return {
        "groups": sorted(({"group": name, **row(us)} for name, us in groups.items()), key=lambda r: -r["ms"]),
        "kernels": sorted(
            ({**Kernel(*key)._asdict(), **row(us)} for key, us in launches.items()), key=lambda r: -r["ms"]
        ),
    }


def print_kernels(found: dict[str, Any]) -> None:
    """Print both tables, of the second what takes most."""
    total = found["gpu_ms"]
    print("| kernels | number a step | ms a step | share |\n|---|---:|---:|---:|")
    for row in found["groups"]:
        print(f"| {row['group']} | {row['count']:.0f} | {row['ms']:.2f} | {row['ms'] / total:.0%} |")
    print(f"| all | {found['launches']:.0f} | {total:.2f} | 100% |")
    print(f"\nthe CPU issues a step in {found['issue_ms']:.1f} ms; it takes {found['step_ms']:.1f} ms\n")
    print("| kernel | grid | number | us | ms | registers | occupancy |\n|---|---|---:|---:|---:|---:|---:|")
    for row in found["kernels"][:40]:
        grid = " x ".join(map(str, row["grid"]))
        figures = (
            f"{row['count']:.0f} | {row['us']:.1f} | {row['ms']:.2f} | {row['registers']} | {row['occupancy']}%"
        )
        print(f"| {row['name'][:60]} | {grid} | {figures} |")


def print_operations(profiler: torch.profiler.profile, steps: int) -> dict[str, float]:
    """Print, and return, the milliseconds of operations on a CPU by group."""
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        times[group_of(event.key)] += event.self_cpu_time_total / 1e3 / steps
    total = sum(times.values())
    print("| operation | ms a step | share |\n|---|---:|---:|")
    for group, ms in sorted(times.items(), key=lambda item: -item[1]):
        print(f"| {group} | {ms:.1f} | {ms / total:.0%} |")
    print(f"| all | {total:.1f} | 100% |")
    return dict(times)


def measure_kernels(
    profiler: torch.profiler.profile,
    way: train_step.Way,
    batch: tuple[torch.Tensor, torch.Tensor],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return, and print, what the GPU did in the profile, and what the CPU takes to have it do so."""
    issue_ms, step_ms = issue_and_step_ms(way, batch, args)
    kernels = kernels_of(profiler)
    found = {
        **summarise_kernels(kernels, args.steps),
        "launches": len(kernels) / args.steps,
        "gpu_ms": sum(kernel.us for kernel in kernels) / 1e3 / args.steps,
        "issue_ms": issue_ms,
        "step_ms": step_ms,
    }
    print_kernels(found)
    return found


def main(argv: list[str]) -> None:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", default="packed", help="of train_step.py, also with +compile and +graph")
    own, others = parser.parse_known_args(argv)
    args = train_step.parse_args(others)
    train_step.compute_as_runs_do(args.threads)
    way = own.way + (train_step.GRAPH if args.graph else "")
    header = {key: value for key, value in train_step.describe(args).items() if key != "rounds"}
    print("\n".join(f"{key}: {value}" for key, value in header.items()))
    print(f"\n{args.variant}, {way}, {args.steps} steps\n")
    built = train_step.build_way(way, args)
    profiler = profile(*built, args)
    on_gpu = args.device == "cuda"
    found = measure_kernels(profiler, *built, args) if on_gpu else {"ms": print_operations(profiler, args.steps)}
    if args.json:
        args.json.write_text(json.dumps({**header, "variant": args.variant, "way": way, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
