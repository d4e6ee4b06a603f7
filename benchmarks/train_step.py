"""Time a pretraining step (forward, backward, AdamW) of FCMAE, several ways of computing it side by side.

    python benchmarks/train_step.py --variant atto --image-size 224 --batch 16 --rounds 5
    python benchmarks/train_step.py --variant base --batch 128 --precision bf16 --compile --json base.json

All ways run in one process, in rounds that take each way in turn, so that a busy machine disturbs them alike.
`spark` is the rival, SparK's masked dense convolution (spark.py). Before anything is timed, each way must give
the loss and the gradient of `masked` in float32, or the run stops.

Memory is what two steps need at their peak beyond weights and inputs; on a CPU a process of its own measures it
for each way, and compiled ways have none, as the compiler's own memory would be counted.
"""

import argparse
import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import torch
from spark import SparkEncoder
from torch import Tensor

from fcmae import FCMAE, VARIANTS, FCMAEOutput, sample_visible_ids
from fcmae.encoder.convnextv2 import LAYOUTS, Layout
from fcmae.engine import keep_freed_memory
from fcmae.optim import build_adamw

REFERENCE = "masked"
COMPILED = "+compile"
MASK_RATIO = 0.6
TOLERANCE = {"loss": 1e-5, "gradient": 1e-4}
"""Largest relative differences from the reference in float32 that count as rounding."""


@dataclass
class Way:
    """One way of computing the step: its own copy of the same weights, its optimizer, and what was measured."""

    name: str
    forward: Callable[[Tensor, Tensor], FCMAEOutput]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    """Seconds of a step, one number per round."""
    peak_memory: int | None = None
    """Bytes."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variant", default="atto", choices=VARIANTS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the timed ones")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps of each way in a round")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--layouts", nargs="+", default=["packed", REFERENCE, "spark"], choices=[*LAYOUTS, "spark"])
    parser.add_argument("--compile", action="store_true", help="add a torch.compile twin of each way")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    parser.add_argument("--measure-memory", metavar="WAY", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.batch, args.threads, args.rounds, args.steps) < 1 or args.warmup < 0:
        parser.error("--batch, --threads, --rounds and --steps must be at least 1, --warmup at least 0")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def build_model(layout: str, args: argparse.Namespace) -> FCMAE:
    """Build the network, the same weights for every layout, with biases and GRN away from zero so leaks show."""
    torch.manual_seed(0)
    known = cast(Layout, REFERENCE if layout == "spark" else layout)
    model = FCMAE(args.variant, mask_ratio=MASK_RATIO, layout=known)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "grn" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if layout == "spark":
        encoder = SparkEncoder(args.variant)
        encoder.load_state_dict(model.encoder.state_dict())
        model.encoder = encoder
    return model.to(args.device)


def build_batch(model: FCMAE, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Build random images and visible ids."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, generator=generator)
    num_patches = (args.image_size // model.patch_size) ** 2
    ids = sample_visible_ids(args.batch, num_patches, MASK_RATIO, generator)
    return images.to(args.device), ids.to(args.device)


def build_way(name: str, args: argparse.Namespace) -> tuple[Way, tuple[Tensor, Tensor]]:
    """Build one way by name ("packed", "packed+compile", ...) and its batch."""
    model = build_model(name.removesuffix(COMPILED), args)
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    forward = torch.compile(model) if name.endswith(COMPILED) else model
    return Way(name, forward, optimizer), build_batch(model, args)


def train_step(way: Way, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Run one pretraining step."""
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
        loss = way.forward(*batch).loss
    loss.backward()
    way.optimizer.step()
    way.optimizer.zero_grad()


def relative_differences(model: FCMAE, reference: FCMAE, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return how far the model's loss and its gradient are from the reference's, relative to their size."""
    losses = [m(*batch).loss for m in (model, reference)]
    ours, theirs = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(m.parameters()))])
        for loss, m in zip(losses, (model, reference), strict=True)
    )
    return {
        "loss": (losses[0] / losses[1] - 1).abs().item(),
        "gradient": ((ours - theirs).norm() / theirs.norm()).item(),
    }


def check(model: FCMAE, reference: FCMAE, batch: tuple[Tensor, Tensor], name: str) -> dict[str, float]:
    """Return `relative_differences` in strict float32, or stop the program if they are more than rounding."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        differences = relative_differences(model, reference, batch)
    for what, difference in differences.items():
        if not difference <= TOLERANCE[what]:
            sys.exit(f"{name} does not give the {what} of {REFERENCE}: relative difference {difference:.1e}")
    return differences


def check_layouts(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Check each layout against the reference."""
    reference = build_model(REFERENCE, args)
    batch = build_batch(reference, args)
    others = [layout for layout in args.layouts if layout != REFERENCE]
    return {layout: check(build_model(layout, args), reference, batch, layout) for layout in others}


def resident_memory(field_name: str) -> int:
    """Return VmRSS or VmHWM (its peak) of this process in bytes; ru_maxrss where the system has no /proc.

    Not ru_maxrss on Linux: a child inherits its parent's through exec, so it hides everything smaller.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields[field_name].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory_here(way: Way, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> int:
    """Return the bytes that the first two steps of a way need at their peak beyond weights and inputs."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident_memory("VmRSS")
    for _ in range(2):
        train_step(way, batch, args)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident_memory("VmHWM")
    return peak - before


def peak_memory(way: Way, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> int | None:
    """Return `peak_memory_here`, on a CPU measured in a child process; None for a compiled way on a CPU."""
    if args.device == "cuda":
        return peak_memory_here(way, batch, args)
    if way.name.endswith(COMPILED):
        return None
    options = ["variant", "image_size", "batch", "threads", "device", "precision"]
    flags = [f"--{option.replace('_', '-')}={getattr(args, option)}" for option in options]
    command = [sys.executable, sys.argv[0], *flags, f"--measure-memory={way.name}"]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def time_round(way: Way, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> float:
    """Return the seconds of a step, the mean of `--steps` steps."""
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(args.steps):
        train_step(way, batch, args)
    synchronize()
    return (time.perf_counter() - start) / args.steps


def measure(args: argparse.Namespace) -> list[Way]:
    """Build all ways, measure their memory, then time them in alternating rounds, each starting one way on."""
    names = [layout + suffix for suffix in ("", COMPILED)[: 1 + args.compile] for layout in args.layouts]
    built = [build_way(name, args) for name in names]
    for way, batch in built:
        way.peak_memory = peak_memory(way, batch, args)
    for r in range(args.warmup + args.rounds):
        first = r % len(built)
        for way, batch in built[first:] + built[:first]:
            seconds = time_round(way, batch, args)
            if r >= args.warmup:
                way.seconds.append(seconds)
    return [way for way, _ in built]


def device_name(device: str) -> str:
    """Return the model of the GPU or the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a reader needs to run this again."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{args.device}: {device_name(args.device)}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step": f"{args.variant}, {args.image_size} px, batch {args.batch}, mask ratio {MASK_RATIO}, "
        f"precision {args.precision}",
        "rounds": f"{args.rounds} of {args.steps} steps, alternating, after {args.warmup} to warm up",
    }


def summarise(way: Way, ways: list[Way], batch: int) -> dict[str, Any]:
    """Return a row of the table; the ratio is the median over rounds of the reference's time over this way's."""
    median = statistics.median(way.seconds)
    reference = next((w.seconds for w in ways if w.name == REFERENCE), None)
    ratios = [r / s for r, s in zip(reference, way.seconds, strict=True)] if reference else []
    return {
        "way": way.name,
        "images_per_s": batch / median,
        "ms": 1e3 * median,
        "ms_min": 1e3 * min(way.seconds),
        "ms_max": 1e3 * max(way.seconds),
        "ratio": statistics.median(ratios) if ratios else None,
        "peak_memory_mb": None if way.peak_memory is None else way.peak_memory / 1e6,
        "ms_rounds": [1e3 * s for s in way.seconds],
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a Markdown table."""

    def show(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    head = ["way", "images/s", "ms a step", "min–max", f"x {REFERENCE}", "peak memory of a step, MB"]
    body = [
        [
            row["way"],
            show(row["images_per_s"], 1),
            show(row["ms"], 1),
            f"{show(row['ms_min'], 1)}–{show(row['ms_max'], 1)}",
            show(row["ratio"], 2),
            show(row["peak_memory_mb"], 0),
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    aligned = [
        [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        for line in [head, rule, *body]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def main(argv: list[str] | None = None) -> None:
    """Check, measure, print, write."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the scripts do
    if args.measure_memory:
        print(peak_memory_here(*build_way(args.measure_memory, args), args))
        return
    header = describe(args)
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    differences = check_layouts(args)
    for layout, by in differences.items():
        print(
            f"check: {layout} differs from {REFERENCE} by {by['loss']:.0e} (loss), {by['gradient']:.0e} (gradient)"
        )
    sys.stdout.flush()
    ways = measure(args)
    rows = [summarise(way, ways, args.batch) for way in ways]
    print(f"\n{format_table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({**header, "check": differences, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
