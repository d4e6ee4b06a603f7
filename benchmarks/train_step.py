"""Time a pretraining step (forward, backward, AdamW) of FCMAE, several ways of computing it side by side.

    python benchmarks/train_step.py --variant atto --image-size 224 --batch 16 --rounds 5
    python benchmarks/train_step.py --variant tiny base --batch 128 --precision bf16 --compile --json base.json
    python benchmarks/train_step.py --ways packed masked official --official ConvNeXt-V2

All ways run in one process, in rounds that take each way in turn, so that a busy machine disturbs them alike:

    packed, masked, minkowski   our layouts (minkowski where MinkowskiEngine is installed)
    trainer                     packed in the Trainer of pretrain.py, from uint8 images: on a GPU by CUDA graphs
    plain                       packed without our kernels (plain.py)
    masked-channels_last        masked, images and weights in torch.channels_last
    spark                       SparK's way of masked dense convolution (spark.py)
    channelwise                 minkowski with the engine's own depthwise convolution (channelwise.py)
    official                    facebookresearch/ConvNeXt-V2, from the folder that --official names (official.py)
    WAY+compile                 with --compile: torch.compile of ours
    packed[+compile]+graph      with --graph, on a GPU: recorded as the Trainer does

Before anything is timed, each way but `official`, which draws its own masks, must give the loss and the gradient
of `masked` in float32, on some of the images, or the run stops. fp16 is timed without scaling the loss, except by
`trainer`, which then waits for the GPU in each step, as pretrain.py does.

Memory is what the first steps need at their peak beyond weights and inputs; on a CPU a process of its own measures
it for each way, and compiled ways have none, as the compiler's own memory would be counted. "of matmul" is the
arithmetic of visible patches (a way that computes hidden ones as well gets no credit for that) over the time, as a
share of what a large matrix product reaches; "of bandwidth" is the memory that the step must read and write at the
least, over the time, as a share of what a large copy reaches. Both are measured in the same run.
"""

import argparse
import gc
import itertools
import json
import math
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
from channelwise import ChannelwiseSites
from official import Official
from plain import PlainPackedSites
from spark import SparkEncoder
from torch import Tensor

from fcmae import FCMAE, VARIANTS, FCMAEOutput, sample_visible_ids
from fcmae.config import PretrainConfig, parse_config
from fcmae.data import MaskedBatch, PixelNormalizer
from fcmae.encoder.convnext import LAYOUTS, Layout, require_layout, set_fused
from fcmae.masking import count_visible
from fcmae.training.graph import CudaGraphs, Eager, Recorded
from fcmae.training.launch import keep_freed_memory, start_accelerator
from fcmae.training.optim import build_adamw
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer

REFERENCE = "masked"
COMPILED, GRAPH = "+compile", "+graph"
CHANNELS_LAST = "-channels_last"
LAYOUTS.update(plain=PlainPackedSites.of_patches, channelwise=ChannelwiseSites.of_patches)
OURS = ["packed", "trainer", "plain", REFERENCE, REFERENCE + CHANNELS_LAST]
WAYS = [*OURS, "spark", "minkowski", "channelwise", "official"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MASK_RATIO = 0.6
PATCH = 32
TOLERANCE = {"loss": 1e-5, "gradient": 1e-4}
"""Largest relative differences from the reference in float32 that count as rounding."""
CHECKED_IMAGES = 32
"""At most: the reference takes 365 MB for each of Base's in float32, more than what is timed."""


@dataclass
class Way:
    """One way of computing the step: its own copy of the same weights, its optimizer, and what was measured."""

    name: str
    forward: Callable[[Tensor, Tensor], FCMAEOutput]
    optimizer: torch.optim.Optimizer
    step: Callable[[], None] | None = None
    """The whole step, where it is not made of these."""
    warm_up: int = 1
    """Steps before one takes as long as it will."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of a step, one number per round."""
    peak_memory: int | None = None
    """Bytes."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--variant", dest="variants", nargs="+", default=["atto"], choices=VARIANTS, help="a table for each"
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before the timed ones")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps of each way in a round")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="no", choices=DTYPES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all that can run here")
    parser.add_argument("--compile", action="store_true", help="add a torch.compile twin of packed, plain, masked")
    parser.add_argument("--graph", action="store_true", help="on a GPU: add packed as CUDA graphs")
    parser.add_argument("--official", type=Path, metavar="DIR", help="a clone of facebookresearch/ConvNeXt-V2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    parser.add_argument("--measure-memory", metavar="WAY", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.variant = args.variants[0]
    if min(args.batch, args.threads, args.rounds, args.steps) < 1 or args.warmup < 0:
        parser.error("--batch, --threads, --rounds and --steps must be at least 1, --warmup at least 0")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.graph and args.device != "cuda":
        parser.error("--graph needs a GPU")
    if args.ways is None:
        missing = {"minkowski", "channelwise"} if not has_engine() else set()
        missing |= {"official"} if args.official is None else set()
        args.ways = [way for way in WAYS if way not in missing]
    if "official" in args.ways and args.official is None:
        parser.error("the way 'official' needs --official DIR")
    return args


def has_engine() -> bool:
    """Whether MinkowskiEngine is installed."""
    try:
        require_layout("minkowski")
    except ValueError:
        return False
    return True


def compute_as_runs_do(threads: int) -> None:
    """Set what `start_accelerator` sets of this process, and its threads."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.set_float32_matmul_precision("highest")  # float32 without TF32
    torch.backends.cudnn.allow_tf32 = False


def build_model(way: str, args: argparse.Namespace) -> FCMAE | Official:
    """Build the network, the same weights for every way, with biases and GRN away from zero so leaks show."""
    torch.manual_seed(0)
    if way == "official":
        return Official(args.official, args.variant, args.image_size, MASK_RATIO).to(args.device)
    layout = {"spark": REFERENCE, "trainer": "packed"}.get(way, way.removesuffix(CHANNELS_LAST))
    model = FCMAE(args.variant, mask_ratio=MASK_RATIO, layout=cast(Layout, layout))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "grn" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if way == "plain":
        set_fused(model.encoder, False)
    if way == "spark":
        encoder = SparkEncoder(args.variant)
        encoder.load_state_dict(model.encoder.state_dict())
        model.encoder = encoder
    if way.endswith(CHANNELS_LAST):
        model = model.to(memory_format=torch.channels_last)
    return model.to(args.device)


def build_batch(way: str, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Build random images and visible ids."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, generator=generator)
    num_patches = (args.image_size // PATCH) ** 2
    ids = sample_visible_ids(args.batch, num_patches, MASK_RATIO, generator)
    if way.endswith(CHANNELS_LAST):
        images = images.contiguous(memory_format=torch.channels_last)
    return images.to(args.device), ids.to(args.device)


def build_way(name: str, args: argparse.Namespace) -> tuple[Way, tuple[Tensor, Tensor]]:
    """Build one way by name ("packed", "packed+compile+graph", ...) and its batch."""
    base = name.partition("+")[0]
    model, batch = build_model(base, args), build_batch(base, args)
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    way = Way(name, torch.compile(model) if COMPILED in name else model, optimizer)
    if base == "trainer":
        assert isinstance(model, FCMAE)
        trainer = build_trainer(model, optimizer, args)
        levels = (batch[0] * 50 + 128).clamp(0, 255).to(torch.uint8)
        batches = itertools.repeat(MaskedBatch(images=levels, indices=(), bad=(), visible_ids=batch[1]))
        way.step, way.warm_up = lambda: trainer.update(batches), 1 + trainer.work.warm_up
    elif GRAPH in name:
        way.step, way.warm_up = record(way, batch, args), 1 + Recorded.warm_up
    return way, batch


def build_trainer(model: FCMAE, optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> Trainer:
    """Build the trainer of a pretraining run, which writes nothing, as nothing asks it to."""
    data = {"root": "none", "image_size": args.image_size, "batch_size": args.batch}
    values = {"output": "none", "model": {"variant": args.variant}, "data": data, "optim": {"accumulate": 1}}
    config = parse_config(PretrainConfig, values | {"train": {"precision": args.precision}}, "train_step")
    accelerator = start_accelerator(args.precision)
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(accelerator.device)
    return Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        compute_loss=lambda model, batch: model(normalize(batch.images), batch.visible_ids).loss,
        plan=Plan.of(config, 100_000, accelerator.num_processes),
        config=config,
    )


def record(way: Way, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> Callable[[], None]:
    """Return a step that is recorded as CUDA graphs after `Recorded.warm_up`, as the Trainer has it."""
    for group in way.optimizer.param_groups:
        group["capturable"], group["lr"] = True, torch.zeros((), device=args.device)
    eager = Eager(
        accumulate=lambda batch: accumulate(way, (batch.images, batch.visible_ids), args),
        exchange=lambda: None,
        step=lambda: apply(way),
    )
    parameters = [parameter for group in way.optimizer.param_groups for parameter in group["params"]]
    work = Recorded(eager, parameters, CudaGraphs(torch.device(args.device)), sys.exit)
    given = MaskedBatch(images=batch[0], indices=(), bad=(), visible_ids=batch[1])

    def step() -> None:
        work.accumulate(given)
        work.apply()

    return step


def accumulate(way: Way, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> Tensor:
    """Add the gradient of a batch; returns its loss."""
    with torch.autocast(args.device, dtype=DTYPES[args.precision], enabled=args.precision != "no"):
        loss = way.forward(*batch).loss
    loss.backward()
    return loss.detach()


def apply(way: Way) -> Tensor:
    """Update the weights by the gradients, and remove these; returns their norm, which the Trainer records."""
    parameters = [parameter for group in way.optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf)
    way.optimizer.step()
    way.optimizer.zero_grad()
    return norm


def train_step(way: Way, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Run one pretraining step."""
    if way.step is not None:
        way.step()
        return
    accumulate(way, batch, args)
    apply(way)


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
    """Return `relative_differences`, or stop the program if they are more than rounding."""
    differences = relative_differences(model, reference, batch)
    for what, difference in differences.items():
        if not difference <= TOLERANCE[what]:
            sys.exit(f"{name} does not give the {what} of {REFERENCE}: relative difference {difference:.1e}")
    return differences


def check_ways(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Check each way against the reference, by at most `CHECKED_IMAGES`."""
    reference = build_model(REFERENCE, args)
    assert isinstance(reference, FCMAE)
    fewer = argparse.Namespace(**vars(args) | {"batch": min(args.batch, CHECKED_IMAGES)})
    differences: dict[str, dict[str, float]] = {}
    for way in args.ways:
        model = build_model(way, args)
        if way not in (REFERENCE, "trainer") and isinstance(model, FCMAE):  # the trainer's is that of packed
            differences[way] = check(model, reference, build_batch(way, fewer), way)
    return differences


def work(args: argparse.Namespace) -> dict[str, float]:
    """Return what a step must do at the least: FLOP, and bytes to and from memory.

    A multiplication with an addition is 2 FLOP, a backward pass twice a forward one. Of memory, a block's fused
    passes read and write 12 maps of its width c forward (each of its two matrix products has a side of 4c) and
    twice that backward, float32 or bf16; AdamW reads and writes seven numbers of each weight, in float32.
    """
    depths, dims = VARIANTS[args.variant]
    num_patches = (args.image_size // PATCH) ** 2
    p = count_visible(num_patches, MASK_RATIO)
    macs, maps, weights = p * 64 * 48 * dims[0], 0, 0
    for stage, (depth, c) in enumerate(zip(depths, dims, strict=True)):
        sites = p * 4 ** (3 - stage)
        macs += depth * sites * (49 * c + 8 * c * c) + (sites * 4 * dims[stage - 1] * c if stage else 0)
        maps += depth * sites * c
        weights += depth * 8 * c * c
    out = 3 * PATCH**2
    macs += num_patches * (dims[-1] * 512 + 49 * 512 + 8 * 512**2) + (num_patches - p) * 512 * out
    maps += num_patches * 512
    weights += 8 * 512**2 + 512 * out
    size = DTYPES[args.precision].itemsize
    return {"flop": 6.0 * macs * args.batch, "bytes": 36.0 * size * maps * args.batch + 28.0 * weights}


def limits(args: argparse.Namespace) -> dict[str, float]:
    """Return what the device reaches: FLOP a second in a large matrix product, bytes a second in a large copy."""
    dtype = DTYPES[args.precision]
    side = 8192 if args.device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=args.device, dtype=dtype) for _ in range(2))
    source = torch.zeros(2**28 if args.device == "cuda" else 2**25, device=args.device)
    target = torch.zeros_like(source)
    return {
        "flop_per_s": 2.0 * side**3 / fastest(lambda: torch.mm(a, b), args.device),
        "bytes_per_s": 2.0 * source.nbytes / fastest(lambda: target.copy_(source), args.device),
    }


def fastest(function: Callable[[], object], device: str) -> float:
    """Return the least of ten times of a call, in seconds."""
    return min(seconds_of(function, device) for _ in range(10))


def seconds_of(function: Callable[[], object], device: str) -> float:
    """Return the seconds of a call, to the end of what it has the device do."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


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
    """Return the bytes that the first steps of a way need at their peak beyond weights and inputs.

    On CUDA also beyond what other ways still hold.
    """
    if args.device == "cuda":
        gc.collect()  # else what others have done with would be freed meanwhile
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident_memory("VmRSS")
    for _ in range(1 + way.warm_up):
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
    options += ["official"] if args.official else []
    flags = [f"--{option.replace('_', '-')}={getattr(args, option)}" for option in options]
    command = [sys.executable, __file__, *flags, f"--measure-memory={way.name}"]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def time_round(way: Way, batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> float:
    """Return the seconds of a step, the mean of `--steps` steps."""

    def steps() -> None:
        for _ in range(args.steps):
            train_step(way, batch, args)

    return seconds_of(steps, args.device) / args.steps


def measure(args: argparse.Namespace) -> list[Way]:
    """Build all ways, measure their memory, then time them."""
    names = list(args.ways)
    names += [way + COMPILED for way in ("packed", "plain", REFERENCE) if args.compile and way in args.ways]
    names += [way + GRAPH for way in ("packed", "packed" + COMPILED) if args.graph and way in names]
    built = [build_way(name, args) for name in names]
    for way, batch in built:
        way.peak_memory = peak_memory(way, batch, args)
    alternate(built, args)
    return [way for way, _ in built]


def alternate(built: list[tuple[Way, tuple[Tensor, Tensor]]], args: argparse.Namespace) -> None:
    """Time ways in rounds that take each in turn, each starting one on; those to warm up are not noted."""
    for r in range(args.warmup + args.rounds):
        first = r % len(built)
        for way, batch in built[first:] + built[:first]:
            seconds = time_round(way, batch, args)
            if r >= args.warmup:
                way.seconds.append(seconds)


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
        "step": f"{args.image_size} px, batch {args.batch}, mask ratio {MASK_RATIO}, precision {args.precision}",
        "rounds": f"{args.rounds} of {args.steps} steps, alternating, after {args.warmup} to warm up",
    }


def summarise(
    way: Way, ways: list[Way], batch: int, work: dict[str, float], limits: dict[str, float]
) -> dict[str, Any]:
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
        "of_matmul": work["flop"] / median / limits["flop_per_s"],
        "of_bandwidth": work["bytes"] / median / limits["bytes_per_s"],
        "peak_memory_mb": None if way.peak_memory is None else way.peak_memory / 1e6,
        "ms_rounds": [1e3 * s for s in way.seconds],
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a Markdown table."""

    def show(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    head = ["way", "images/s", "ms a step", "min–max", f"x {REFERENCE}", "of matmul", "of bandwidth", "peak MB"]
    body = [
        [
            row["way"],
            show(row["images_per_s"], 1),
            show(row["ms"], 1),
            f"{show(row['ms_min'], 1)}–{show(row['ms_max'], 1)}",
            show(row["ratio"], 2),
            f"{row['of_matmul']:.0%}",
            f"{row['of_bandwidth']:.0%}",
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


def run_variant(args: argparse.Namespace) -> dict[str, Any]:
    """Check, measure and print one size; returns what is written."""
    found = {"variant": args.variant, "work": work(args), "limits": limits(args)}
    print(
        f"\n{args.variant}: {found['work']['flop'] / 1e9:.1f} GFLOP, {found['work']['bytes'] / 1e9:.2f} GB a step; "
        f"a matrix product reaches {found['limits']['flop_per_s'] / 1e9:.0f} GFLOP/s, "
        f"a copy {found['limits']['bytes_per_s'] / 1e9:.1f} GB/s"
    )
    differences = check_ways(args)
    for way, by in differences.items():
        print(f"check: {way} differs from {REFERENCE} by {by['loss']:.0e} (loss), {by['gradient']:.0e} (gradient)")
    sys.stdout.flush()
    ways = measure(args)
    rows = [summarise(way, ways, args.batch, found["work"], found["limits"]) for way in ways]
    print(f"\n{format_table(rows)}", flush=True)
    return {**found, "check": differences, "ways": rows}


def main(argv: list[str] | None = None) -> None:
    """Measure each variant, print, write."""
    args = parse_args(argv)
    compute_as_runs_do(args.threads)
    if args.measure_memory:
        print(peak_memory_here(*build_way(args.measure_memory, args), args))
        return
    header = describe(args)
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    measured: list[dict[str, Any]] = []
    for variant in args.variants:
        args.variant = variant
        try:
            measured.append(run_variant(args))
        except ValueError as error:
            sys.exit(f"error: {error}")
        if args.json:
            args.json.write_text(json.dumps({**header, "variants": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
