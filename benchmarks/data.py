"""Time loading and augmenting images for pretraining, ours beside what others use: images/s of one core.

    python benchmarks/data.py
    python benchmarks/data.py --images path/to/jpegs --json data.json

Each way gives batches of random resized crops (share of the area 0.2 to 1, bicubic), flipped at random, in one
process of one thread, from files that the system has in memory. All run in rounds that take each way in turn, so
that a busy machine disturbs them alike. `imagefolder` is torchvision's ImageFolder with the usual PIL transforms,
`timm` its create_loader, `webdataset` a .tar read in order and decoded by PIL. `prepared` reads what
`fcmae prepare` wrote; `prepared, crops` leaves the resizing to the GPU, as pretrain.py does where there is one:
then that is the rate of a loader's core. `shards` reads the JPEGs of `folder` from what `fcmae shard` wrote.
"""

import argparse
import importlib
import json
import math
import os
import shlex
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from train_step import device_name

from fcmae import sample_visible_ids
from fcmae.data import IndexStream, PretrainDataset, RandomView, load_batches, open_source
from fcmae.data.pack import pack
from fcmae.data.prepare import prepare

ROOT = Path(__file__).parents[1]
REFERENCE = "imagefolder"
CROP_SCALE = (0.2, 1.0)
HFLIP = 0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "photos", help="a folder of JPEGs")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4, help="batches of each way in a round")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one to warm up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if min(args.image_size, args.batch, args.batches, args.rounds) < 1:
        parser.error("all numbers must be at least 1")
    return args


def link_images(images: Path, root: Path, least: int) -> int:
    """Make ROOT/all, a class folder of links to the JPEGs, each several times if there are fewer than `least`."""
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        sys.exit(f"--images {images}: no .jpg or .jpeg in it")
    copies = -(-least // len(paths))
    (root / "all").mkdir(parents=True)
    for copy in range(copies):
        for number, path in enumerate(paths):
            (root / "all" / f"{copy:03d}-{number:06d}.jpg").symlink_to(path.resolve())
    return len(paths)


def forever(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of epoch after epoch."""
    while True:
        yield from batches


def pil_transform(image_size: int) -> transforms.Compose:
    """Return torchvision's usual transforms of PIL images."""
    crop = transforms.RandomResizedCrop(image_size, scale=CROP_SCALE, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(HFLIP), transforms.ToTensor()])


def imagefolder(root: Path, args: argparse.Namespace) -> Iterator[Any]:
    """Batches as most training scripts make them."""
    dataset = torchvision.datasets.ImageFolder(str(root), pil_transform(args.image_size))
    return forever(DataLoader(dataset, args.batch, shuffle=True, drop_last=True))


def timm_loader(root: Path, args: argparse.Namespace) -> Iterator[Any]:
    """Batches of timm's loader, with nothing beyond crop and flip."""
    dataset: Any = create_dataset("folder", root=str(root))
    loader = create_loader(
        dataset,
        input_size=(3, args.image_size, args.image_size),
        batch_size=args.batch,
        is_training=True,
        scale=CROP_SCALE,
        hflip=HFLIP,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    return forever(loader)


def webdataset_loader(root: Path, args: argparse.Namespace) -> Iterator[Any]:
    """Batches of webdataset, from one .tar."""
    webdataset: Any = importlib.import_module("webdataset")

    path = root.with_suffix(".tar")
    with tarfile.open(path, "w", dereference=True) as tar:
        tar.add(root, ".")
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode("pil").to_tuple("jpg")
    return iter(dataset.map_tuple(pil_transform(args.image_size)).repeat().batched(args.batch))


def ours(name: str, root: Path, args: argparse.Namespace, *, resize_on_device: bool = False) -> Iterator[Any]:
    """Batches as pretrain.py makes them, masks included."""
    dataset = PretrainDataset(
        open_source(name, str(root), "train", 3),
        view=RandomView((args.image_size, args.image_size), CROP_SCALE, HFLIP),
        draw_ids=lambda: sample_visible_ids(1, 49, 0.6),
        seed=0,
        resize_on_device=resize_on_device,
    )
    stream = IndexStream(len(dataset), batch_size=args.batch, seed=0, shards=dataset.images.shards)
    return load_batches(dataset, stream, num_workers=0, pin_memory=False)


def build_ways(root: Path, args: argparse.Namespace) -> dict[str, Iterator[Any]]:
    """Return the ways, by name; what is not installed is left out and said so."""
    arrays = root.with_name("arrays")
    source = open_source("folder", str(root), "train", 3)
    prepare(source, arrays / "train", root=str(root), channels=3, short_side=256, num_workers=0)
    shards = root.with_name("shards")
    pack(source, shards / "train", root=str(root))
    builders: dict[str, Callable[[], Iterator[Any]]] = {
        REFERENCE: lambda: imagefolder(root, args),
        "timm": lambda: timm_loader(root, args),
        "webdataset": lambda: webdataset_loader(root, args),
        "folder": lambda: ours("folder", root, args),
        "shards": lambda: ours("folder", shards, args),
        "prepared": lambda: ours("arrays", arrays, args),
        "prepared, crops": lambda: ours("arrays", arrays, args, resize_on_device=True),
    }
    ways: dict[str, Iterator[Any]] = {}
    for name, build in builders.items():
        try:
            ways[name] = build()
        except ImportError as error:
            print(f"{name}: left out, {error}: pip install 'fcmae[bench]'")
    return ways


def cpu_seconds_of_others() -> float:
    """Return the CPU seconds of all processes but this one since the system started; NaN where unknown."""
    path = Path("/proc/stat")
    if not path.exists():
        return math.nan
    user, nice, system, _, _, irq, softirq, *_ = map(int, path.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - time.process_time()


def time_round(batches: Iterator[Any], number: int) -> float:
    """Return the seconds of `number` batches."""
    started = time.perf_counter()
    for _ in range(number):
        next(batches)
    return time.perf_counter() - started


def measure(ways: dict[str, Iterator[Any]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the images/s of each way in each round; a round starts one way on from the one before."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for r in range(1 + args.rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            seconds = time_round(ways[name], args.batches)
            if r:
                rates[name].append(args.batch * args.batches / seconds)
    return rates


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a Markdown table."""
    lines = [
        f"| {'way':<15} | images/s | {'min–max':>13} | x {REFERENCE} |",
        f"| {'-' * 15} | -------: | {'-' * 12}: | {'-' * 12}: |",
    ]
    for row in rows:
        spread = f"{row['images_per_s_min']:.0f}–{row['images_per_s_max']:.0f}"
        lines.append(f"| {row['way']:<15} | {row['images_per_s']:8.0f} | {spread:>13} | {row['ratio']:13.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        num_images = link_images(args.images, root, least=args.batch * args.batches)
        header = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "device": f"cpu: {device_name('cpu')}, one process of one thread",
            "torch": f"{torch.__version__}, torchvision {torchvision.__version__}",
            "images": f"{num_images:,} JPEGs of {args.images.name}, cropped to {args.image_size} px",
            "rounds": f"{args.rounds} of {args.batches} batches of {args.batch}, alternating, after one to warm up",
        }
        print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
        ways = build_ways(root, args)
        started, others = time.perf_counter(), cpu_seconds_of_others()
        rates = measure(ways, args)
        others = (cpu_seconds_of_others() - others) / (time.perf_counter() - started)
        header["others"] = f"kept {others:.2f} of {os.cpu_count()} cores busy meanwhile"
        print(f"others: {header['others']}")
    rows = [
        {
            "way": name,
            "images_per_s": statistics.median(values),
            "images_per_s_min": min(values),
            "images_per_s_max": max(values),
            "ratio": statistics.median(v / r for v, r in zip(values, rates[REFERENCE], strict=True)),
            "images_per_s_rounds": values,
        }
        for name, values in rates.items()
    ]
    print(f"\n{format_table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({**header, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
