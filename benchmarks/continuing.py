"""What does going on from released weights gain over starting fresh? CIFAR-10 with two classes left out.

    python benchmarks/continuing.py run data/cifar10 --fashion data/fashion-mnist
    python benchmarks/continuing.py table

Run from the root of the repository. data/cifar10 is what `benchmarks/cifar10.py prepare` wrote (docs/results.md);
data/fashion-mnist holds Fashion-MNIST's four .gz files. A network is pretrained on eight of CIFAR-10's classes: it
stands for released weights. It then goes on, at several rates, on 2,000 images that it never saw, which is compared
with a fresh pretraining of as many updates:

- `cats`: cats and dogs, the two classes left out: colour photographs, as before;
- `clothes`: 2,000 images of Fashion-MNIST: one channel, another world. The first layer is adapted.

With clothes, each result is fine-tuned with 200 labels and scored on all test images, as are the weights as they
were, and a network that was never pretrained; cats from dogs this small network can hardly tell. What has finished
is in the results file and not run again.
"""

import argparse
import gzip
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcmae.data import save_arrays
from fcmae.training.run_folder import RunFolder

LEFT_OUT = ("cat", "dog")
IMAGES = 2000
SEEDS = (0, 1, 2)
PRETRAIN, FINETUNE = "configs/pretrain/cifar10-cpu.yaml", "configs/finetune/cifar10-cpu.yaml"
CLOTHES = ("top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
GRAY = ("model.in_chans=1", "data.mean=[0.286]", "data.std=[0.353]")

WHOLE, ENCODER = "init_from={base}", "init_from={base}/encoder"
ARMS = {
    "scratch": (),
    "encoder, a quarter of the rate": (ENCODER, "optim.base_lr=2e-3"),
    "encoder, a quarter of the rate, decoder first": (
        ENCODER,
        "optim.base_lr=2e-3",
        "optim.decoder_first_epochs=2",
    ),
    "encoder": (ENCODER,),
    "encoder and decoder, a quarter of the rate": (WHOLE, "optim.base_lr=2e-3"),
    "encoder and decoder": (WHOLE,),
}
"""Pretraining on the 2,000 images: overrides of PRETRAIN, whose rate is 8e-3, by name."""
SETS = {"cats": tuple(ARMS), "clothes": ("scratch", "encoder, a quarter of the rate", "encoder")}
"""Arms by images; of other channels a decoder begins anew anyway."""
STARTS = ("as they were", "never pretrained")
"""What is fine-tuned beside the arms."""
LABELS = 200
FINETUNED_EPOCHS = 16_000 // LABELS
FROM_FCMAE = ("optim.base_lr=8e-3", "data.mixup=0.8", "data.cutmix=1.0")
FROM_SCRATCH = ("optim.base_lr=4e-3",)
"""What suits 1 % of the labels (docs/lab-notes.md)."""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    results = argparse.ArgumentParser(add_help=False)
    default = Path("benchmarks/results/continuing-cpu.jsonl")
    results.add_argument("--json", type=Path, default=default, metavar="FILE", help="the results, a run per line")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", parents=[results], help="pretrain and fine-tune what is not there yet")
    run.add_argument("cifar10", type=Path, help="the arrays of CIFAR-10")
    run.add_argument(
        "--fashion", type=Path, metavar="FOLDER", help="Fashion-MNIST's files; without them, cats only"
    )
    run.add_argument("--runs", type=Path, default=Path("runs/continuing"), metavar="FOLDER")
    commands.add_parser("table", parents=[results], help="print the results as Markdown tables")
    return parser.parse_args(argv)


# Images


def draw(labels: np.ndarray, number: int) -> np.ndarray:
    """Return the indices of `number` images, as many of each class, always the same."""
    generator = np.random.default_rng(0)
    classes = np.unique(labels)
    drawn = [generator.permutation(np.flatnonzero(labels == c))[: number // len(classes)] for c in classes]
    return np.sort(np.concatenate(drawn))


def make_photographs(cifar10: Path, data: Path) -> None:
    """Split CIFAR-10 into eight classes to begin with and the two that are left out."""
    names = (cifar10 / "train" / "classes.txt").read_text().split()
    out = [names.index(name) for name in LEFT_OUT]
    for split, number in (("train", IMAGES), ("val", None)):
        images, labels = (np.load(cifar10 / split / f"{what}.npy") for what in ("images", "labels"))
        (others,) = np.nonzero(~np.isin(labels, out))
        save_arrays(data / "eight" / split, images[others])
        (chosen,) = np.nonzero(np.isin(labels, out))
        chosen = chosen if number is None else chosen[draw(labels[chosen], number)]
        save_arrays(data / "cats" / split, images[chosen], (labels[chosen] == out[1]).astype(int), LEFT_OUT)


def make_clothes(files: Path, data: Path) -> None:
    """Turn Fashion-MNIST's files into arrays, 2,000 of its training images."""

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((files / name).read_bytes()), np.uint8, offset=header)

    for split, word, number in (("train", "train", IMAGES), ("val", "t10k", None)):
        images = read(f"{word}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
        labels = read(f"{word}-labels-idx1-ubyte.gz", 8).astype(np.int64)
        chosen = np.arange(len(labels)) if number is None else draw(labels, number)
        save_arrays(data / "clothes" / split, images[chosen], labels[chosen], CLOTHES)


# Runs


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(script: str, config: str, run: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Run one of our scripts to its end, its output in RUN.log; returns what it logged.

    Raises:
        SystemExit: if it fails.
    """
    command = [script, "--config", config, f"output={run}", "resume=auto", "data.num_workers=0", *keys]
    print(shlex.join(["python", *command]), flush=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{run}.log")
    with log.open("a", encoding="utf-8") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *command], env=environment, stdout=out, stderr=out)
    if done.returncode:
        raise SystemExit(f"error: {shlex.join(command)}: failed; its output is in {log}")
    return read_lines(RunFolder(run).metrics)


def pretrain(run: Path, root: Path, keys: Sequence[str]) -> dict[str, float]:
    """Pretrain; returns the mean loss of the last 50 updates."""
    settings = ("eval.knn_every_epochs=null", "visualize.num_images=0", "checkpoint.every_steps=10000")
    records = train("pretrain.py", PRETRAIN, run, [f"data.root={root}", "log.every_steps=5", *settings, *keys])
    return {"loss": statistics.mean([record["loss"] for record in records if "loss" in record][-10:])}


def finetune(run: Path, root: Path, keys: Sequence[str]) -> dict[str, float]:
    """Fine-tune with 200 labels; returns the accuracy on all test images, in per cent."""
    settings = (f"data.label_fraction={LABELS / IMAGES}", f"train.epochs={FINETUNED_EPOCHS}")
    times = (f"optim.warmup_epochs={FINETUNED_EPOCHS // 10}", f"eval.every_epochs={FINETUNED_EPOCHS}")
    records = train("finetune.py", FINETUNE, run, [f"data.root={root}", *settings, *times, *keys])
    return {"top1": 100 * records[-1]["val_top1"]}


def run_all(args: argparse.Namespace) -> None:
    """Train what the results file does not have, and add it there.

    Raises:
        SystemExit: if a run fails.
    """
    data, base = args.runs / "data", args.runs / "base"
    if not (data / "cats").exists():
        make_photographs(args.cifar10, data)
    if args.fashion and not (data / "clothes").exists():
        make_clothes(args.fashion, data)
    pretrain(base, data / "eight", ["train.epochs=4", "train.seed=0"])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    finished = {(line["images"], line["arm"], line["seed"]) for line in read_lines(args.json)}
    for seed in SEEDS:
        for images in SETS if args.fashion else ["cats"]:
            common = [f"train.seed={seed}", *(GRAY if images == "clothes" else ())]
            for arm in (*SETS[images], *(STARTS if images == "clothes" else ())):
                if (images, arm, seed) in finished:
                    continue
                run, result = args.runs / f"{images}-{arm.replace(',', '').replace(' ', '-')}-{seed}", {}
                start = {STARTS[0]: f"{base}/encoder", STARTS[1]: "null"}.get(arm, f"{run}")
                if arm in ARMS:
                    keys = [key.format(base=base) for key in ARMS[arm]]
                    result |= pretrain(run, data / images, [*common, "train.epochs=10", *keys])
                if images == "clothes":
                    recipe = FROM_SCRATCH if start == "null" else FROM_FCMAE
                    result |= finetune(
                        Path(f"{run}-tuned"), data / images, [*common, f"init_from={start}", *recipe]
                    )
                with args.json.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"images": images, "arm": arm, "seed": seed} | result) + "\n")


def table(path: Path) -> str:
    """Lay the results out as Markdown tables: means over seeds, least to most.

    Raises:
        SystemExit: if there are none.
    """
    lines = read_lines(path)
    if not lines:
        raise SystemExit(f"error: {path}: no results; make them with: python benchmarks/continuing.py run")
    titles = {"loss": "loss", "top1": f"top-1 with {LABELS} labels, %"}
    digits = {"loss": 4, "top1": 1}
    shown: list[str] = []
    for images in dict.fromkeys(line["images"] for line in lines):
        mine = [line for line in lines if line["images"] == images]
        keys = [key for key in titles if any(key in line for line in mine)]
        shown += [" | ".join([f"| {images}", *(titles[key] for key in keys)]) + " |", "|---|" + "---:|" * len(keys)]
        for arm in dict.fromkeys(line["arm"] for line in mine):
            cells: list[str] = []
            for key in keys:
                values = sorted(line[key] for line in mine if line["arm"] == arm and key in line)
                numbers = (statistics.mean(values), values[0], values[-1]) if values else ()
                cells.append("{} ({} to {})".format(*(f"{x:.{digits[key]}f}" for x in numbers)) if values else "")
            shown.append(f"| {arm} | {' | '.join(cells)} |")
        shown.append("")
    return "\n".join(shown[:-1])


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.command == "run":
        run_all(args)
    print(table(args.json))


if __name__ == "__main__":
    main()
