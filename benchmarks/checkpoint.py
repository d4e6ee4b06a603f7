"""Time what checkpoints cost a run: updates/s with and without the thread that writes them, and their SHA-256.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --variants base large --batch 256 --json checkpoint.json

The real trainer makes updates of FCMAE on images of noise and saves every `--every` of them, in rounds that take in
turn three ways: `none` saves nothing, `waiting` waits for each checkpoint, `thread` goes on as a run does; a round
ends when all it saved is on disk. For `--hashed` networks, files as large as a checkpoint's are hashed: what that
adds to writing one, and to reading one. They are holes, so neither the disk nor its cache has a part in it.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from data import cpu_seconds_of_others
from train_step import device_name

from fcmae import FCMAE, sample_visible_ids
from fcmae.config import PretrainConfig, parse_config
from fcmae.data import MaskedBatch
from fcmae.files import sha256
from fcmae.training.checkpoint import SUMS
from fcmae.training.optim import build_adamw
from fcmae.training.run_folder import checkpoint_bytes
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer

WAYS = ("none", "waiting", "thread")
REFERENCE = WAYS[0]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["atto", "nano"], help="networks to train")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--every", type=int, default=8, help="updates between checkpoints")
    parser.add_argument("--checkpoints", type=int, default=2, help="checkpoints of a round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up")
    parser.add_argument("--hashed", nargs="*", default=["atto", "huge"], help="networks whose sizes are hashed")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to write to (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if min(args.image_size, args.batch, args.every, args.checkpoints, args.rounds) < 1:
        parser.error("all numbers must be at least 1")
    return args


def build_trainer(variant: str, folder: Path, args: argparse.Namespace) -> Trainer:
    """Return a trainer of FCMAE whose run is in `folder`."""
    values = {
        "output": str(folder),
        "model": {"variant": variant},
        "data": {"root": "noise", "image_size": args.image_size, "batch_size": args.batch},
        "train": {"max_steps": 100_000},
    }
    config = parse_config(PretrainConfig, values, "benchmark")
    torch.manual_seed(0)
    model = FCMAE(**config.model.model_dump())
    folder.mkdir(parents=True)
    trainer = Trainer(
        accelerator=Accelerator(cpu=not torch.cuda.is_available()),
        model=model,
        optimizer=build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95)),
        compute_loss=lambda model, batch: model(batch.images, batch.visible_ids).loss,
        plan=Plan.of(config, 1_281_167, 1),
        config=config,
    )
    trainer.run.metrics.touch()
    return trainer


def noise(args: argparse.Namespace) -> Iterator[MaskedBatch]:
    """Yield the same batch for ever."""
    images = torch.randn(args.batch, 3, args.image_size, args.image_size)
    ids = sample_visible_ids(args.batch, (args.image_size // 32) ** 2, 0.6)
    while True:
        yield MaskedBatch(indices=tuple(range(args.batch)), bad=(), images=images, visible_ids=ids)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_round(
    trainer: Trainer, batches: Iterator[MaskedBatch], way: str, args: argparse.Namespace
) -> tuple[float, float]:
    """Return the seconds of a round, and those of them in which no update could be made for a checkpoint."""
    synchronize()
    started, stood = time.perf_counter(), 0.0
    for _ in range(args.checkpoints):
        if way != REFERENCE:
            synchronize()  # what is in the GPU's queue is no cost of a checkpoint
            asked = time.perf_counter()
            trainer.save()
            if way == "waiting":
                trainer.writer.wait()
            stood += time.perf_counter() - asked
        for _ in range(args.every):
            trainer.update(batches)
    synchronize()
    asked = time.perf_counter()
    trainer.writer.wait()
    ended = time.perf_counter()
    return ended - started, stood + ended - asked


def measure(variant: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the updates/s of each way; a round starts one way on from the one before."""
    trainer = build_trainer(variant, folder, args)
    batches = noise(args)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    stood: dict[str, list[float]] = {way: [] for way in WAYS}
    for r in range(1 + args.rounds):
        for way in WAYS[r % 3 :] + WAYS[: r % 3]:
            seconds, stood_s = time_round(trainer, batches, way, args)
            if r:
                rates[way].append(args.checkpoints * args.every / seconds)
                stood[way].append(stood_s / args.checkpoints)
    ways = [
        {
            "way": way,
            "updates_per_s": statistics.median(rates[way]),
            "ratio": statistics.median(v / n for v, n in zip(rates[way], rates[REFERENCE], strict=True)),
            "standing_s": statistics.median(stood[way]),
            "updates_per_s_rounds": rates[way],
            "standing_s_rounds": stood[way],
        }
        for way in WAYS
    ]
    written = sum(path.stat().st_size for path in (trainer.run.checkpoints / "last").iterdir())
    return {"variant": variant, "checkpoint_mb": written / 1e6, "ways": ways}


def time_hashes(variant: str, folder: Path) -> dict[str, Any]:
    """Return the seconds that hashing files as large as a checkpoint's takes."""
    with torch.device("meta"):
        model = FCMAE(variant)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    path, seconds = folder / SUMS, []
    for _ in range(3 if weights < 1e9 else 1):
        started = time.perf_counter()
        for size in (weights, 2 * weights):
            path.touch()
            os.truncate(path, size)
            sha256(path)
        seconds.append(time.perf_counter() - started)
        path.unlink()
    total = checkpoint_bytes(model)
    return {"variant": variant, "checkpoint_mb": total / 1e6, "sha256_s": statistics.median(seconds)}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{device}: {device_name(device)}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "step": f"{args.image_size} px, batch {args.batch}, a checkpoint every {args.every} updates",
        "rounds": f"{args.rounds} of {args.checkpoints} checkpoints, alternating, after one to warm up",
    }
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    print("\n| network | MB | way     | updates/s | x none | standing still, s |")
    print("| ------- | -: | ------- | --------: | -----: | ----------------: |")
    networks, hashes = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        started, others = time.perf_counter(), cpu_seconds_of_others()
        for variant in args.variants:
            networks.append(network := measure(variant, folder / variant, args))
            for row in network["ways"]:
                figures = f"{row['updates_per_s']:.3f} | {row['ratio']:.2f} | {row['standing_s']:.3f}"
                print(f"| {variant} | {network['checkpoint_mb']:.0f} | {row['way']} | {figures} |", flush=True)
        print("\n| network | MB | SHA-256 of a checkpoint, s |\n| ------- | -: | -: |")
        for variant in args.hashed:
            hashes.append(row := time_hashes(variant, folder))
            print(f"| {variant} | {row['checkpoint_mb']:.0f} | {row['sha256_s']:.2f} |", flush=True)
        others = (cpu_seconds_of_others() - others) / (time.perf_counter() - started)
    busy = f"kept {others:.2f} of {os.cpu_count()} cores busy meanwhile"
    print(f"\nothers: {busy}")
    if args.json:
        found = {**header, "others": busy, "networks": networks, "hashes": hashes}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
