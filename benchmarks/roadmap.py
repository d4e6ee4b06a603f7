"""The roadmap from ResNet-50 to ConvNeXt-T: what each step costs, beside the paper's figures and our runs.

    python benchmarks/roadmap.py table
    python benchmarks/roadmap.py plot docs/roadmap.png
    python benchmarks/roadmap.py run --name cifar10 --steps training-recipe convnext-tiny --seeds 0 1 2 KEY=VALUE...

Run from the root of the repository. `table` and `plot` count parameters and multiply-adds at 224 pixels, and show
the accuracies in benchmarks/results/roadmap-*.json, a run a line. `run` trains steps by configs/roadmap/ with the
KEY=VALUE given, which must name the data, one after another by the commands that it prints, and adds to
benchmarks/results/roadmap-NAME.json. What has finished is not run again; what was stopped goes on where it was.
"""

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cifar10 import launch, read_lines, scores
from torch.utils.flop_counter import FlopCounterMode

from fcmae.encoder.roadmap import ROADMAP, Roadmap
from fcmae.training.run_folder import RunFolder

RESULTS = Path("benchmarks/results")


class Published(NamedTuple):
    """What the paper says of a step (arXiv 2201.03545, table 10; the last accuracy is of table 1)."""

    group: str
    """The part of section 2 that has it."""
    change: str
    gflops: float
    """10^9 multiply-adds at 224 pixels."""
    top1: float
    """ImageNet-1K, per cent."""
    deviation: float | None = None
    """Of three seeds."""


RECIPE, MACRO, RESNEXT = "training recipe", "macro design", "ResNeXt"
INVERTED, KERNEL, MICRO = "inverted bottleneck", "large kernels", "micro design"

PAPER: dict[str, Published] = {
    "resnet50": Published(RECIPE, "ResNet-50, torchvision's recipe", 4.09, 76.13),
    "training-recipe": Published(RECIPE, "ConvNeXt's training recipe", 4.09, 78.82, 0.07),
    "stage-ratio": Published(MACRO, "stages of 3, 3, 9, 3 blocks", 4.53, 79.36, 0.07),
    "patchify-stem": Published(MACRO, "stem of 4x4 patches", 4.42, 79.51, 0.18),
    "depthwise": Published(RESNEXT, "depthwise convolution", 2.35, 78.28, 0.08),
    "width-96": Published(RESNEXT, "width 64 → 96", 5.27, 80.50, 0.02),
    "inverted-bottleneck": Published(INVERTED, "inverted bottleneck", 4.64, 80.64, 0.03),
    "depthwise-up": Published(KERNEL, "depthwise convolution first", 4.07, 79.92, 0.08),
    "kernel-5": Published(KERNEL, "kernel 5x5", 4.10, 80.35, 0.08),
    "kernel-7": Published(KERNEL, "kernel 7x7", 4.15, 80.57, 0.14),
    "kernel-9": Published(KERNEL, "kernel 9x9", 4.21, 80.57, 0.06),
    "kernel-11": Published(KERNEL, "kernel 11x11", 4.29, 80.47, 0.11),
    "gelu": Published(MICRO, "ReLU → GELU", 4.15, 80.62, 0.14),
    "one-activation": Published(MICRO, "one activation a block", 4.15, 81.27, 0.06),
    "one-norm": Published(MICRO, "one norm a block", 4.15, 81.41, 0.09),
    "layernorm": Published(MICRO, "BatchNorm → LayerNorm", 4.46, 81.47, 0.09),
    "separate-downsampling": Published(MICRO, "separate downsampling", 4.49, 81.97, 0.06),
    "convnext-tiny": Published(MICRO, "LayerScale (ConvNeXt-T)", 4.49, 82.1),
}

COLOURS: dict[str, str] = {
    RECIPE: "tab:gray",
    MACRO: "tab:blue",
    RESNEXT: "tab:orange",
    INVERTED: "tab:green",
    KERNEL: "tab:red",
    MICRO: "tab:purple",
}
ALTERNATIVES = ("kernel-5", "kernel-9", "kernel-11")
"""Tried by the paper, not kept."""


class Cost(NamedTuple):
    parameters: int
    gflops: float
    """10^9 multiply-adds of convolutions and linears, for an image of 224 pixels and 1000 classes."""


def count(step: str) -> Cost:
    """Count without computing."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = Roadmap(step, num_classes=1000).eval()
        model(torch.empty(1, 3, 224, 224))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9)


def read_top1(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies in per cent of the results files: name -> step -> one of each run."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in sorted(folder.glob("roadmap-*.json")):
        by_step = found.setdefault(path.stem.removeprefix("roadmap-"), {})
        for line in read_lines(path):
            by_step.setdefault(line["step"], []).append(100 * line["val_top1"])
    return found


def show(values: list[float]) -> str:
    """Mean, and spread where there are several."""
    spread = f" ± {statistics.stdev(values):.2f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}" if values else ""


def beside(cost: float, published: float) -> str:
    """What the paper says of a cost, where that is something else; it prints two digits."""
    return "" if abs(cost - published) < 0.006 else f" (paper: {published:.2f})"


def table(folder: Path) -> str:
    """Lay all out as a Markdown table."""
    ours = read_top1(folder)
    head = ["step", "what changes", "parameters, M", "GFLOPs", "the paper's", "top-1, the paper's"]
    rows = [[*head, *(f"top-1, {name}" for name in ours)], ["---"] * 2 + ["---:"] * (4 + len(ours))]
    for step, paper in PAPER.items():
        cost = count(step)
        top1 = f"{paper.top1:.2f}" + (f" ± {paper.deviation:.2f}" if paper.deviation else "")
        cells = [f"`{step}`", paper.change, f"{cost.parameters / 1e6:.1f}", f"{cost.gflops:.2f}"]
        cells += [f"{paper.gflops:.2f}", top1]
        rows.append([*cells, *(show(by_step.get(step, [])) for by_step in ours.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(folder: Path, picture: Path) -> None:
    """Draw bars of accuracy and cost from the first step down to the last, as figure 2 of the paper does."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    measured = read_top1(folder)
    steps = list(PAPER)
    figure = Figure(figsize=(9.5 + 2.5 * len(measured), 6.2), layout="constrained")
    columns = 2 + len(measured)
    panels = figure.subplots(1, columns, sharey=True, width_ratios=[3, *[2] * (columns - 1)])

    def bars(
        panel: Any, title: str, bounds: tuple[float, float], values: dict[str, list[float]], texts: dict[str, str]
    ) -> None:
        for step, runs in values.items():
            place, colour = steps.index(step), COLOURS[PAPER[step].group]
            style = {"facecolor": "white", "hatch": "////"} if step in ALTERNATIVES else {"facecolor": colour}
            mean = statistics.mean(runs)
            panel.barh(place, mean - bounds[0], 0.72, bounds[0], edgecolor=colour, alpha=0.85, **style)
            if len(runs) > 1:
                panel.scatter(runs, [place] * len(runs), s=10, color="black", zorder=3)
            panel.annotate(
                texts[step], (max(runs), place), (6, 0), textcoords="offset points", va="center", fontsize=8
            )
        panel.set_xlim(*bounds)
        panel.set_title(title, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)

    published = {step: f"{paper.top1:.2f}" for step, paper in PAPER.items()}
    values = {step: [paper.top1] for step, paper in PAPER.items()}
    bars(panels[0], "ImageNet-1K top-1 of the paper, %", (75, 83), values, published)
    costs = {step: count(step).gflops for step in steps}
    counted = {step: f"{cost:.2f}{beside(cost, PAPER[step].gflops)}" for step, cost in costs.items()}
    bars(panels[1], "GFLOPs at 224 px", (0, 7.2), {step: [cost] for step, cost in costs.items()}, counted)
    for panel, (name, by_step) in zip(panels[2:], measured.items(), strict=True):
        every = [value for runs in by_step.values() for value in runs]
        margin = max(max(every) - min(every), 1.0) / 2
        texts = {step: f"{statistics.mean(runs):.1f}" for step, runs in by_step.items()}
        bars(panel, f"{name} top-1, ours, %", (min(every) - margin, max(every) + margin), by_step, texts)
    panels[0].set_yticks(range(len(steps)), [paper.change for paper in PAPER.values()], fontsize=9)
    panels[0].invert_yaxis()
    key = [Patch(color=colour, label=group, alpha=0.85) for group, colour in COLOURS.items()]
    key.append(Patch(facecolor="white", edgecolor="tab:red", hatch="////", label="not kept"))
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), fontsize=8, frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def run_all(args: argparse.Namespace) -> None:
    """Train what the results file does not have, and add it there.

    Raises:
        SystemExit: if a run fails.
    """
    results = args.results / f"roadmap-{args.name}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    finished = {line["command"] for line in read_lines(results)}
    for seed in args.seeds:
        for step in args.steps:
            run = Path("runs", f"roadmap-{args.name}", f"{step}-seed-{seed}")
            keys = [*args.overrides, f"train.seed={seed}", f"output={run}", "resume=auto"]
            command = ["python", "finetune.py", "--config", f"configs/roadmap/{step}.yaml", *keys]
            if shlex.join(command) in finished:
                continue
            launch(command, run, torch.get_num_threads())
            result = {"step": step, "seed": seed, **scores(read_lines(RunFolder(run).metrics))}
            with results.open("a", encoding="utf-8") as out:
                out.write(f"{json.dumps(result | {'command': shlex.join(command)})}\n")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of roadmap-*.json")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table", parents=[results], help="print the steps as a Markdown table")
    drawing = commands.add_parser("plot", parents=[results], help="draw the steps")
    drawing.add_argument("picture", type=Path, help="the PNG to write")
    run = commands.add_parser("run", parents=[results], help="train steps and write down what they came to")
    run.add_argument("--name", required=True, help="of the results file, such as cifar10")
    run.add_argument("--steps", nargs="+", choices=ROADMAP, default=list(ROADMAP), metavar="STEP")
    run.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    run.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configurations, data.root at least")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.command == "run":
        run_all(args)
    elif args.command == "plot":
        plot(args.results, args.picture)
    if args.command != "plot":
        print(table(args.results))


if __name__ == "__main__":
    main()
