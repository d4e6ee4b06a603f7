"""How the cost of a pretraining step grows with batch, image size, mask ratio and depth.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --variant base --batch 64 --precision bf16 --json scaling.json

One axis is varied at a time, the others stay at their defaults; all points of an axis are timed in rounds that take
each in turn. Cost should grow linearly with the visible sites, counted once for each block that works on them:
"ns a site" stays the same where it does. What does not depend on visible sites shows as more of them at the small
end: the decoder, which sees all patches, and AdamW, whose work is that of the weights.
"""

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import train_step

from fcmae import FCMAE, VARIANTS, sample_visible_ids
from fcmae.encoder.convnext import Layout
from fcmae.masking import count_visible
from fcmae.training.optim import build_adamw


@dataclass(frozen=True)
class Point:
    """What a step is made of."""

    batch: int
    image_size: int
    mask_ratio: float
    depth: int
    """Factor on the number of blocks of each stage."""

    def sites(self, variant: str) -> int:
        """Visible sites of the batch, once for each encoder block that works on them."""
        p = count_visible((self.image_size // train_step.PATCH) ** 2, self.mask_ratio)
        depths = VARIANTS[variant][0]
        return self.batch * sum(p * 4 ** (3 - stage) * self.depth * depth for stage, depth in enumerate(depths))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variant", default="atto", choices=VARIANTS)
    parser.add_argument("--layout", default="packed", choices=["packed", "masked"])
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 4, 8, 16, 32])
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[96, 160, 224, 320])
    parser.add_argument("--mask-ratios", nargs="+", type=float, default=[0.4, 0.6, 0.75, 0.9])
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 2, 3], help="factors on the blocks of a stage")
    parser.add_argument("--batch", type=int, default=8, help="where it is not the axis")
    parser.add_argument("--image-size", type=int, default=224, help="where it is not the axis")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the timed ones")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    args.steps = 1
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def build(point: Point, args: argparse.Namespace) -> tuple[train_step.Way, tuple[torch.Tensor, torch.Tensor]]:
    """Build the step of a point, and its batch."""
    depths, dims = VARIANTS[args.variant]
    layout: Layout = args.layout
    variant = (tuple(depth * point.depth for depth in depths), dims)
    model = FCMAE(variant, mask_ratio=point.mask_ratio, layout=layout).to(args.device)
    way = train_step.Way(str(point), model, build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95)))
    images = torch.randn(point.batch, 3, point.image_size, point.image_size, device=args.device)
    num_patches = (point.image_size // train_step.PATCH) ** 2
    return way, (images, sample_visible_ids(point.batch, num_patches, point.mask_ratio, device=args.device))


def measure(points: list[Point], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the points of an axis in alternating rounds."""
    built = [build(point, args) for point in points]
    train_step.alternate(built, args)
    rows: list[dict[str, Any]] = []
    for point, (way, _) in zip(points, built, strict=True):
        seconds, sites = statistics.median(way.seconds), point.sites(args.variant)
        rows.append(
            {
                "sites": sites,
                "ms": 1e3 * seconds,
                "ms_min": 1e3 * min(way.seconds),
                "ms_max": 1e3 * max(way.seconds),
                "images_per_s": point.batch / seconds,
                "ns_per_site": 1e9 * seconds / sites,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure each axis, print, write."""
    args = parse_args(argv)
    train_step.compute_as_runs_do(args.threads)
    header = train_step.describe(args) | {
        "step": f"{args.variant}, {args.layout}, precision {args.precision}",
        "rounds": f"{args.rounds} of one step, alternating, after {args.warmup} to warm up",
    }
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    usual = Point(args.batch, args.image_size, train_step.MASK_RATIO, 1)
    axes: dict[str, tuple[list[Any], list[Point]]] = {
        "batch": (args.batches, [replace(usual, batch=value) for value in args.batches]),
        "image size": (args.image_sizes, [replace(usual, image_size=value) for value in args.image_sizes]),
        "mask ratio": (args.mask_ratios, [replace(usual, mask_ratio=value) for value in args.mask_ratios]),
        "depth": (args.depths, [replace(usual, depth=value) for value in args.depths]),
    }
    measured: dict[str, list[dict[str, Any]]] = {}
    for axis, (values, points) in axes.items():
        rows = measure(points, args)
        measured[axis] = [{axis: value, **row} for value, row in zip(values, rows, strict=True)]
        print(f"\n| {axis} | visible sites | images/s | ms a step | min–max | ns a site |")
        print("|---:|---:|---:|---:|---:|---:|")
        for value, row in zip(values, rows, strict=True):
            print(
                f"| {value} | {row['sites']:,} | {row['images_per_s']:.1f} | {row['ms']:.1f} | "
                f"{row['ms_min']:.1f}–{row['ms_max']:.1f} | {row['ns_per_site']:.0f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({**header, "axes": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
