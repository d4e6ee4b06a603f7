"""How fast pretrain.py is on real images, prepared as arrays, beside its step on the same batch again and again.

    python benchmarks/real_images.py --variant base --batch 256 --precision bf16 --workers 16

The images are crops of the photographs in docs/photos, as many as an epoch is to have, which is written to the disk
first. The rate of real images is that of the run's own records, without the first third, in which kernels are
compiled and workers started; that of the step is the way `trainer` of train_step.py.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from continuing import read_lines
from PIL import Image
from resumed import pretraining

from fcmae.data import save_arrays
from fcmae.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="atto")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--every", type=int, default=10, help="updates of a record")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if not 0 < args.every <= args.updates // 3:
        parser.error("--every must be at least 1, and a third of --updates at most")
    return args


def crops(number: int, side: int) -> Iterator[np.ndarray]:
    """Yield random crops of the photographs, uint8 (side, side, 3)."""
    photos = [Image.open(path).convert("RGB") for path in sorted((ROOT / "docs" / "photos").glob("*.jpg"))]
    rng = np.random.default_rng(0)
    for index in range(number):
        photo = photos[index % len(photos)]
        length = int(rng.integers(min(photo.size) // 2, min(photo.size) + 1))
        left, top = (int(rng.integers(0, extent - length + 1)) for extent in photo.size)
        box = (left, top, left + length, top + length)
        yield np.asarray(photo.resize((side, side), Image.Resampling.BILINEAR, box))


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write the arrays, of sides as `fcmae prepare` would shrink them to."""
    side = args.image_size * 8 // 7
    images = np.empty((args.images, side, side, 3), np.uint8)
    for index, crop in enumerate(crops(args.images, side)):
        images[index] = crop
    save_arrays(folder / "train", images)


def train(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pretrain on the arrays; returns the run's records."""
    run = folder / "run"
    data = {"data.name": "arrays", "data.root": folder, "data.num_workers": args.workers}
    rarely = {"checkpoint.every_steps": args.updates, "log.every_steps": args.every}
    subprocess.run(pretraining(run, args, data | rarely), check=True)
    return read_lines(RunFolder(run).metrics)


def synthetic(folder: Path, args: argparse.Namespace) -> float:
    """Return the images per second of the trainer's step alone."""
    path = folder / "step.json"
    script = Path(__file__).with_name("train_step.py")
    options = [f"--variant={args.variant}", f"--image-size={args.image_size}", f"--batch={args.batch}"]
    options += [f"--precision={args.precision}", f"--device={args.device}", "--ways=trainer", "--rounds=5"]
    subprocess.run([sys.executable, str(script), *options, f"--json={path}"], check=True)
    return json.loads(path.read_text())["variants"][0]["ways"][0]["images_per_s"]


def main(argv: list[str] | None = None) -> None:
    """Prepare, train, compare."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args)
        records = [record for record in train(folder, args) if record["step"] > args.updates // 3]
        step = synthetic(folder, args)
    rate = statistics.median(record["images_per_s"] for record in records)
    found = {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "real_images_per_s": rate,
        "synthetic_images_per_s": step,
        "ratio": rate / step,
        "data_wait": statistics.median(record["data_wait"] for record in records),
    }
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
