"""Efficiency of several processes: images/s of N of them against N times those of one, and what the exchange takes.

    python benchmarks/efficiency.py
    python benchmarks/efficiency.py --processes 1 2 4 8 --variants base --batch 128 --json efficiency.json

Each process makes updates of FCMAE on `--batch` images of noise, so an update of N processes is of N times as many;
nothing is loaded or saved. torchrun starts 1, 2, 4 of them in turn, `--rounds` times; on a CPU each has one thread.
In every round updates with and without the exchange of gradients alternate: their difference is what it takes, less
what goes on beside the backward pass. Processes beyond the cores share them: "of cores" counts no more than those.

Other programs leave several processes more of the cores than one, so measure when nothing else runs; processor time
for an image depends less on them.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import train_step
from accelerate import Accelerator
from checkpoint import noise, synchronize
from data import cpu_seconds_of_others

from fcmae import FCMAE
from fcmae.config import PretrainConfig, parse_config
from fcmae.training.optim import build_adamw
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer

WAYS = ("exchanging", "apart")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["atto"], help="networks to train")
    parser.add_argument(
        "--processes", nargs="+", type=int, default=[1, 2, 4], help="how many at once; 1 among them"
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8, help="images of each process")
    parser.add_argument("--updates", type=int, default=5, help="timed at once")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each number of processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if 1 not in args.processes:
        parser.error("--processes: name 1 as well, with which others are compared")
    if min(*args.processes, args.image_size, args.batch, args.updates, args.rounds) < 1:
        parser.error("all numbers must be at least 1")
    return args


def work(args: argparse.Namespace) -> None:
    """Be one of the processes: make updates, print the seconds one took, by way, and processor time of all."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="bf16" if args.device == "cuda" else "no")
    values = {
        "output": "not written",
        "model": {"variant": args.variants[0]},
        "data": {"root": "noise", "image_size": args.image_size, "batch_size": args.batch},
        "train": {"max_steps": 100_000},
    }
    config = parse_config(PretrainConfig, values, "benchmark")
    torch.manual_seed(0)
    model = FCMAE(**config.model.model_dump())
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95)),
        compute_loss=lambda model, batch: model(batch.images, batch.visible_ids).loss,
        eager="a benchmark of what DDP does",
        plan=Plan.of(config, 1_281_167, accelerator.num_processes),
        config=config,
    )
    batches = noise(args)
    seconds: dict[str, list[float]] = {way: [] for way in (*WAYS, "cpu")}
    for r in range(4):  # the first to warm up
        for way in WAYS[:: 1 - 2 * (r % 2)]:
            accelerator.wait_for_everyone()
            synchronize()
            started, worked = time.perf_counter(), time.process_time()
            with nullcontext() if way == "exchanging" else accelerator.no_sync(trainer.model):
                for _ in range(args.updates):
                    trainer.update(batches)
            worked = torch.tensor([time.process_time() - worked], device=accelerator.device)
            accelerator.wait_for_everyone()
            synchronize()
            if r:
                seconds[way].append((time.perf_counter() - started) / args.updates)
                if way == "exchanging":
                    of_all: Any = accelerator.gather(worked)
                    seconds["cpu"].append(of_all.sum().item() / args.updates)
    accelerator.print(json.dumps({way: statistics.median(values) for way, values in seconds.items()}))
    accelerator.end_training()


def launch(number: int, variant: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds an update of so many processes takes, by way."""
    words = [
        "--variants",
        variant,
        "--image-size",
        args.image_size,
        "--batch",
        args.batch,
        "--updates",
        args.updates,
    ]
    how = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", number, __file__, *words]
    done = subprocess.run(
        [sys.executable, *map(str, how)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(variant: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of processes; a round starts each in turn, and ratios are of one round."""
    rounds = [{number: launch(number, variant, args) for number in args.processes} for _ in range(args.rounds)]
    places = torch.cuda.device_count() if args.device == "cuda" else os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    for number in args.processes:
        seconds = [found[number]["exchanging"] for found in rounds]
        gained = [number * found[1]["exchanging"] / found[number]["exchanging"] for found in rounds]
        exchange = [found[number]["exchanging"] - found[number]["apart"] for found in rounds]
        rows.append(
            {
                "processes": number,
                "update_s": statistics.median(seconds),
                "images_per_s": number * args.batch / statistics.median(seconds),
                "times_one": statistics.median(gained),
                "times_one_min": min(gained),
                "times_one_max": max(gained),
                "efficiency": statistics.median(gained) / number,
                "efficiency_of_cores": statistics.median(gained) / min(number, places),
                "exchange_s": statistics.median(exchange),
                "cpu_s_per_image": statistics.median(found[number]["cpu"] for found in rounds)
                / number
                / args.batch,
                "update_s_rounds": seconds,
                "apart_s_rounds": [found[number]["apart"] for found in rounds],
            }
        )
    return rows


def seconds_of_others() -> float:
    """Return the CPU seconds of all processes but this one and those it has started and waited for."""
    times = os.times()
    return cpu_seconds_of_others() - times.children_user - times.children_system


def main(argv: list[str] | None = None) -> None:
    """Measure each network, print, write."""
    args = parse_args(argv)
    if "RANK" in os.environ:
        work(args)
        return
    header: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{args.device}: {train_step.device_name(args.device)}, {os.cpu_count()} cores",
        "threads": 1,
        "torch": torch.__version__,
        "step": f"{args.image_size} px, {args.batch} images a process",
        "rounds": f"{args.rounds} starts of each number in turn, {args.updates} updates x 3 of each way",
    }
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    started, others = time.perf_counter(), seconds_of_others()
    networks: dict[str, list[dict[str, Any]]] = {}
    for variant in args.variants:
        networks[variant] = rows = measure(variant, args)
        print(f"\n{variant}\n")
        print(
            "| processes | images/s | times one (min–max) | efficiency | of cores | exchange, ms | CPU ms/image |"
        )
        print("|---:|---:|---:|---:|---:|---:|---:|")
        for row in rows:
            print(
                f"| {row['processes']} | {row['images_per_s']:.1f} | {row['times_one']:.2f} "
                f"({row['times_one_min']:.2f}–{row['times_one_max']:.2f}) | {row['efficiency']:.0%} | "
                f"{row['efficiency_of_cores']:.0%} | {1e3 * row['exchange_s']:.0f} | "
                f"{1e3 * row['cpu_s_per_image']:.1f} |",
                flush=True,
            )
    busy = (seconds_of_others() - others) / (time.perf_counter() - started)
    header["others"] = f"kept {busy:.2f} of {os.cpu_count()} cores busy meanwhile"
    print(f"\nothers: {header['others']}")
    if args.json:
        args.json.write_text(json.dumps({**header, "networks": networks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
