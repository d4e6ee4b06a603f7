"""Does pretraining help segmentation? Emoji on photographs, FCMAE tuned and frozen against a start from scratch.

    python benchmarks/segmentation.py run data/emoji
    python benchmarks/segmentation.py table
    python benchmarks/segmentation.py plot docs/segmentation.png
    python benchmarks/segmentation.py draw data/emoji docs/segmentation-masks.png

Run from the root of the repository. data/emoji is what `benchmarks/emoji.py prepare` wrote (docs/results.md). `run`
pretrains once, on the training images without their masks, then trains segmenters with 1 %, 10 % and 100 % of
these: the same network and head from the pretrained encoder, with that encoder frozen, and from scratch. A seed
fixes the masks, their order, their augmentation and the first weights; its three runs differ in start and rate.
Each start has the rate of `RATES` that was best for it on the images of val, with a seed of which nothing else is
reported. What has finished is in the results file and not run again.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from continuing import read_lines, train
from safetensors.torch import load_file, save_file
from torch import Tensor

from fcmae import ConvNeXtV2, load_encoder
from fcmae.data import PixelNormalizer
from fcmae.data.masks import SegmentationSource, open_segmentation
from fcmae.data.sampling import IndexStream
from fcmae.data.segments import SegmentationDataset, SegmentationEvaluation, SegmentationView, fixed_pairs
from fcmae.heads.segmentation import Segmenter
from fcmae.metrics import confusion_matrix, per_class_of_pixels
from fcmae.segment_pictures import draw_legend, paint
from fcmae.tasks.segmentation import segmentation_loss
from fcmae.training.optim import build_adamw
from fcmae.training.schedule import learning_rate
from fcmae.visualize import draw_panels, write_picture

STARTS = ("FCMAE", "FCMAE, frozen", "scratch")
FRACTIONS = (0.01, 0.1, 1.0)
SEEDS = (0, 1, 2)
RATES = (2e-3, 4e-3, 8e-3, 16e-3)
CHOSEN_WITH, CHOSEN_SEED = 0.1, 3
"""Share of the masks with which rates are chosen, and the seed."""

VARIANT, STEM_STRIDE, HEAD_DIM = ((1, 1, 4, 2), (16, 32, 96, 192)), 2, 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 64
PRETRAIN = "configs/pretrain/cifar10-cpu.yaml"
PRETRAINING = (
    f"model.stem_stride={STEM_STRIDE}",
    f"data.image_size={SIDE}",
    f"data.mean={list(MEAN)}",
    f"data.std={list(STD)}",
    "train.epochs=40",
    "optim.warmup_epochs=2",
)
"""Overrides of PRETRAIN, whose network is `VARIANT`."""

UPDATES, WARMUP_UPDATES, BATCH_SIZE = 300, 30, 16
WEIGHT_DECAY, BETAS = 0.05, (0.9, 0.999)

COLOURS = {"FCMAE": "tab:blue", "FCMAE, frozen": "tab:green", "scratch": "tab:orange"}
SHOWN = 5
"""Images in the picture."""


class Run(NamedTuple):
    """One training of a segmenter."""

    start: str
    fraction: float
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Of its file, without an ending."""
        start = self.start.lower().replace(", ", "-")
        return f"{start}-{self.fraction:g}-seed-{self.seed}-rate-{self.rate:g}"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    shared = argparse.ArgumentParser(add_help=False)
    default = Path("benchmarks/results/segmentation-cpu.jsonl")
    shared.add_argument("--json", type=Path, default=default, metavar="FILE", help="the results, a run per line")
    folders = argparse.ArgumentParser(add_help=False)
    folders.add_argument("data", type=Path, help="what benchmarks/emoji.py prepare wrote")
    folders.add_argument("--runs", type=Path, default=Path("runs/segmentation-cpu"), metavar="FOLDER")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", parents=[shared, folders], help="pretrain and train what is not there yet")
    run.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS, help="those to train")
    commands.add_parser("table", parents=[shared], help="print the results as Markdown tables")
    plot = commands.add_parser("plot", parents=[shared], help="draw mIoU over the share of the masks")
    plot.add_argument("picture", type=Path, help="the PNG to write")
    draw = commands.add_parser("draw", parents=[shared, folders], help="draw what segmenters say of test images")
    draw.add_argument("picture", type=Path, help="the PNG to write")
    draw.add_argument("--fraction", type=float, choices=FRACTIONS, default=0.1, help="their share of the masks")
    return parser.parse_args(argv)


# Training


def build(run: Run, num_classes: int, pretrained: Path) -> Segmenter:
    """Return the segmenter that a run begins with."""
    torch.manual_seed(run.seed)
    if run.start == "scratch":
        encoder = ConvNeXtV2(VARIANT, stem_stride=STEM_STRIDE, num_classes=0)
    else:
        encoder = load_encoder(pretrained, num_classes=0)
    model = Segmenter(encoder, num_classes, dim=HEAD_DIM)
    if run.start == "FCMAE, frozen":
        encoder.requires_grad_(False)
    return model


def fit(model: Segmenter, source: SegmentationSource, run: Run) -> None:
    """Train a segmenter on a run's share of the masks: AdamW, warm-up and cosine, as many updates for all."""
    source = source.share(run.fraction, run.seed)
    dataset = SegmentationDataset(source, view=SegmentationView((SIDE, SIDE), mean=MEAN), seed=run.seed)
    normalize = PixelNormalizer(MEAN, STD)
    optimizer = build_adamw(model, weight_decay=WEIGHT_DECAY, betas=BETAS)
    keys = iter(IndexStream(len(dataset), batch_size=BATCH_SIZE, seed=run.seed))
    model.train()
    for step in range(UPDATES):
        rate = learning_rate(step, peak=run.rate, floor=0, warmup_steps=WARMUP_UPDATES, total_steps=UPDATES)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = dataset.collate([dataset[key] for key in next(keys)])
        loss = segmentation_loss(model(normalize(batch.images)), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def predict(model: Segmenter, pixels: Tensor) -> Tensor:
    """Return the classes of the pixels of images (b, 3, h, w): int64 (b, h, w)."""
    model.eval()
    return model(PixelNormalizer(MEAN, STD)(pixels)).argmax(1)


def score(model: Segmenter, source: SegmentationSource) -> dict[str, float]:
    """Return mIoU and pixel accuracy over all images of a split, in per cent."""
    dataset = SegmentationEvaluation(source)
    metric = confusion_matrix(source.num_classes, torch.device("cpu"))
    for first in range(0, len(dataset), BATCH_SIZE):
        batch = dataset.collate([dataset[i] for i in range(first, min(first + BATCH_SIZE, len(dataset)))])
        metric.update(predict(model, batch.images), batch.labels.long())
    confusion = metric.compute().numpy()
    accuracy = confusion.trace() / confusion.sum()
    return {"miou": 100 * float(per_class_of_pixels(confusion)["iou"].mean()), "accuracy": 100 * float(accuracy)}


def best_rate(path: Path, start: str) -> float:
    """Return the rate of a start with the highest mIoU on val."""
    chosen = [line for line in read_lines(path) if line["start"] == start and line["split"] == "val"]
    return max(chosen, key=lambda line: line["miou"])["rate"]


def run_all(args: argparse.Namespace) -> None:
    """Train what the results file does not have, and add it there.

    Raises:
        SystemExit: if the pretraining fails.
    """
    pretrained = args.runs / "pretrain"
    if set(args.starts) != {"scratch"}:
        train("pretrain.py", PRETRAIN, pretrained, [f"data.root={args.data}", *PRETRAINING])
    sources = {split: open_segmentation("arrays", str(args.data), split, 3) for split in ("train", "val", "test")}
    args.json.parent.mkdir(parents=True, exist_ok=True)

    def measure(run: Run, split: str) -> None:
        if any(line.items() >= (run._asdict() | {"split": split}).items() for line in read_lines(args.json)):
            return
        model = build(run, sources[split].num_classes, pretrained)
        fit(model, sources["train"], run)
        save_file(model.state_dict(), args.runs / f"{run.name}.safetensors")
        line = json.dumps(run._asdict() | {"split": split} | score(model, sources[split]))
        print(line, flush=True)
        with args.json.open("a", encoding="utf-8") as out:
            out.write(f"{line}\n")

    for start in args.starts:
        for rate in RATES:
            measure(Run(start, CHOSEN_WITH, CHOSEN_SEED, rate), "val")
    for seed in SEEDS:
        for fraction in FRACTIONS:
            for start in args.starts:
                measure(Run(start, fraction, seed, best_rate(args.json, start)), "test")


# What came out


def read_results(path: Path) -> dict[str, dict[float, list[dict[str, Any]]]]:
    """Return the lines of a results file that are of test images: start -> share of the masks -> lines.

    Raises:
        SystemExit: if there are none.
    """
    results: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for start in STARTS:
        for line in read_lines(path):
            if line["start"] == start and line["split"] == "test":
                results.setdefault(start, {}).setdefault(line["fraction"], []).append(line)
    if not results:
        raise SystemExit(f"error: {path}: no results; make them with: python benchmarks/segmentation.py run")
    return results


def table(path: Path) -> str:
    """Lay the results out as Markdown tables: means over seeds, least to most; then the rates on val."""

    def show(values: Iterable[float]) -> str:
        values = sorted(values)
        return f"{statistics.mean(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})" if values else ""

    results = read_results(path)
    rows: list[str] = []
    for title, key in (("mIoU, %", "miou"), ("pixel accuracy, %", "accuracy")):
        rows += [
            " | ".join([f"| {title}", *(f"{100 * fraction:g} % of the masks" for fraction in FRACTIONS)]) + " |"
        ]
        rows += ["|---|" + "---:|" * len(FRACTIONS)]
        for start, lines in results.items():
            cells = [show(line[key] for line in lines.get(fraction, ())) for fraction in FRACTIONS]
            rows.append(f"| {start} | {' | '.join(cells)} |")
        rows.append("")
    rows += [" | ".join(["| mIoU on val, %", *(f"rate {rate:g}" for rate in RATES)]) + " |"]
    rows += ["|---|" + "---:|" * len(RATES)]
    for start in results:
        on_val = [line for line in read_lines(path) if line["start"] == start and line["split"] == "val"]
        cells = [show(line["miou"] for line in on_val if line["rate"] == rate).split(" ")[0] for rate in RATES]
        rows.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(path: Path, picture: Path) -> None:
    """Draw mIoU over the share of the masks: a line through the means, the range of the seeds, a dot for each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for start, by_fraction in read_results(path).items():
        fractions = sorted(by_fraction)
        values = [[line["miou"] for line in by_fraction[fraction]] for fraction in fractions]
        axes.plot(fractions, list(map(statistics.mean, values)), color=COLOURS[start], label=start)
        axes.fill_between(
            fractions, list(map(min, values)), list(map(max, values)), color=COLOURS[start], alpha=0.15
        )
        dots = [(fraction, value) for fraction, some in zip(fractions, values, strict=True) for value in some]
        axes.scatter(*zip(*dots, strict=True), color=COLOURS[start], s=14)
    axes.set_xscale("log")
    axes.set_xticks(FRACTIONS, [f"{100 * fraction:g} %" for fraction in FRACTIONS])
    axes.minorticks_off()
    axes.set_xlabel("share of the 8,000 masks")
    axes.set_ylabel("mIoU on the 500 test images, %")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def draw(args: argparse.Namespace) -> None:
    """Draw some test images, their truth, and what the segmenters of the first seed say of them.

    Raises:
        SystemExit: if there are none.
    """
    results = read_results(args.json)
    source = open_segmentation("arrays", str(args.data), "test", 3)
    pixels, truth = fixed_pairs(source, SHOWN, (SIDE, SIDE))
    columns = {"image": pixels / 255, "truth": paint(truth)}
    for start, by_fraction in results.items():
        (line,) = (line for line in by_fraction[args.fraction] if line["seed"] == SEEDS[0])
        run = Run(start, args.fraction, SEEDS[0], line["rate"])
        model = build(run, source.num_classes, args.runs / "pretrain")
        model.load_state_dict(load_file(args.runs / f"{run.name}.safetensors"))
        columns[start] = paint(predict(model, pixels))
    panels = draw_panels(columns)
    legend = draw_legend(source.class_names, range(source.num_classes), panels.shape[1])
    write_picture(args.picture, np.concatenate([panels, legend]))


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.command == "run":
        run_all(args)
    if args.command in ("run", "table"):
        print(table(args.json))
    elif args.command == "plot":
        plot(args.json, args.picture)
    else:
        draw(args)


if __name__ == "__main__":
    main()
