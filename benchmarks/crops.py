"""Time resizing a batch of random crops on the device, ours beside one by one: ms a batch.

    python benchmarks/crops.py
    python benchmarks/crops.py --device cuda --rounds 30 --json crops.json

The crops are those of pretrain.py: share of the area 0.2 to 1, of noise `--short-side` x `--short-side`, to
`--image-size`, bicubic and antialiased, some flipped. `torchvision` resizes and flips one after the other, as
scripts do that leave it to a GPU; `formulas` is `resize_crops` by PyTorch's operations, `kernels` what CUDA has for
it. (For a CPU pretrain.py resizes crops by torchvision, in the loader's processes.) All crops are on the device
before; each round takes each way in turn, until the device is done.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2
from train_step import device_name, seconds_of

from fcmae.data import CroppedBatch, RandomView, resize_crops
from fcmae.data.batches import MaskedSample

REFERENCE = "torchvision"
CROP_SCALE = (0.2, 1.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--dtype", choices=("uint8", "uint16", "float32"), default="uint8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds, after one to warm up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if min(args.image_size, args.short_side, args.batch, args.channels, args.threads, args.rounds) < 1:
        parser.error("all numbers must be at least 1")
    return args


def draw_crops(args: argparse.Namespace) -> CroppedBatch:
    """Return the batch that pretrain.py's loader makes, on the device."""
    torch.manual_seed(0)
    size, side, dtype = (args.image_size, args.image_size), args.short_side, getattr(torch, args.dtype)
    full = 1 if dtype == torch.float32 else torch.iinfo(dtype).max
    image = (torch.rand(args.channels, side, side) * full).to(dtype)
    view, none = RandomView(size, CROP_SCALE, 0.5), torch.empty(0, dtype=torch.int64)
    samples: list[MaskedSample] = []
    for index in range(args.batch):
        top, left, height, width, _ = view.part(side, side)
        crop = image[:, top : top + height, left : left + width]
        samples.append(MaskedSample(crop, index, (), none, view.flips()))
    return CroppedBatch.collate_crops(samples, size).each(lambda tensor: tensor.to(args.device))


def build_ways(crops: CroppedBatch) -> dict[str, Callable[[], Tensor]]:
    """Return the ways, by name."""
    size, extents, flips = list(crops.size), crops.extents.tolist(), crops.flipped.tolist()

    def one_by_one() -> Tensor:
        done: list[Tensor] = []
        for crop, (height, width), flipped in zip(crops.images, extents, flips, strict=True):
            exact = crop[:, :height, :width]
            bicubic = v2.InterpolationMode.BICUBIC
            view = v2.functional.resize(exact, size, interpolation=bicubic, antialias=True)
            done.append(view.flip(-1) if flipped else view)
        return torch.stack(done)

    given = (crops.images, crops.extents, crops.flipped, size)
    ways = {REFERENCE: one_by_one, "formulas": lambda: resize_crops._init_fn(*given)}
    return ways | ({"kernels": lambda: resize_crops(*given)} if crops.images.is_cuda else {})


def measure(ways: dict[str, Callable[[], Tensor]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the milliseconds of each way in each round; a round starts one way on from the one before."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for r in range(1 + args.rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            ms = 1e3 * seconds_of(ways[name], torch.device(args.device).type)
            if r:
                times[name].append(ms)
    return times


def main(argv: list[str] | None = None) -> None:
    """Check, measure, print, write."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    crops = draw_crops(args)
    ways = build_ways(crops)
    header = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{args.device}: {device_name(torch.device(args.device).type)}",
        "torch": f"{torch.__version__}, torchvision {torchvision.__version__}",
        "crops": f"{args.dtype}, in {tuple(crops.images.shape)} to {crops.size}",
        "rounds": f"{args.rounds}, alternating, after one to warm up",
    }
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    expected = ways[REFERENCE]().double()
    differences = {name: (way().double() - expected).abs().max().item() for name, way in ways.items()}
    times = measure(ways, args)
    rows: list[dict[str, Any]] = [
        {
            "way": name,
            "ms": statistics.median(values),
            "ms_min": min(values),
            "ms_max": max(values),
            "ratio": statistics.median(r / v for v, r in zip(values, times[REFERENCE], strict=True)),
            "difference": differences[name],
            "ms_rounds": values,
        }
        for name, values in times.items()
    ]
    print(f"\n| way         | ms a batch |         min–max | x {REFERENCE} | differs by at most |")
    print("| ----------- | ---------: | --------------: | ------------: | -----------------: |")
    for row in rows:
        spread = f"{row['ms_min']:.2f}–{row['ms_max']:.2f}"
        figures = f"{row['ms']:10.2f} | {spread:>15} | {row['ratio']:13.2f} | {row['difference']:18.3g}"
        print(f"| {row['way']:<11} | {figures} |")
    if args.json:
        args.json.write_text(json.dumps({**header, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
