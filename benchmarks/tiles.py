"""Time reading tiles of a large TIFF by index, ours beside decoding all of it: ms a tile, and memory.

    python benchmarks/tiles.py
    python benchmarks/tiles.py --side 30000 --json tiles.json

Each way, in a process of its own of one thread, reads tiles at random places, `--tile` pixels a side, of one image
of 8-bit RGB (smooth noise, made here, in tiles of 256 x 256 compressed by deflate), from a file that the system has
in memory. `pillow` and `tifffile` decode the whole image for each tile, as most datasets of such files do; `tiles`
is `data.tile`. Memory is the peak of the process beyond that before the first tile.
"""

import argparse
import json
import multiprocessing
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image
from train_step import device_name

from fcmae.data import cut, open_source

REFERENCE = "pillow"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=12_000, help="of the image")
    parser.add_argument("--tile", type=int, default=512, help="side of a tile")
    parser.add_argument("--number", type=int, default=7, help="tiles that each way reads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if not (1 <= args.tile <= args.side and args.number >= 1):
        parser.error("all numbers must be at least 1, and a tile no larger than the image")
    return args


def write_scene(path: Path, side: int) -> None:
    """Write an image of smooth noise, a strip of 256 rows at a time."""
    rng = np.random.default_rng(0)

    def strips() -> Any:
        for top in range(0, side, 256):
            coarse = rng.integers(0, 256, (18, side // 16 + 2, 3), dtype=np.uint8)
            strip = Image.fromarray(coarse).resize((side, 256), Image.Resampling.BICUBIC)
            rows = np.zeros((256, -(-side // 256) * 256, 3), np.uint8)
            rows[: min(256, side - top), :side] = np.asarray(strip)[: side - top]
            yield from rows.reshape(256, -1, 256, 3).swapaxes(0, 1)

    stored: dict[str, Any] = {"tile": (256, 256), "compression": "deflate", "predictor": True}
    shape = (side, side, 3)
    tifffile.imwrite(
        path, strips(), shape=shape, dtype=np.uint8, photometric="rgb", bigtiff=side > 25_000, **stored
    )


def reader(way: str, folder: str, tile: int) -> tuple[int, Callable[[int], Any]]:
    """Return how many tiles there are, and what reads one by its number."""
    tiles = cut(open_source("folder", folder, "train", 3), tile, 0)

    def cut_from_whole(index: int) -> np.ndarray:
        _, _, _, top, left, height, width = tiles.locate(index)
        path = tiles.source.describe(0)
        whole = np.asarray(Image.open(path)) if way == "pillow" else tifffile.imread(path)
        return whole[top : top + height, left : left + width].copy()

    return len(tiles), tiles.load if way == "tiles" else cut_from_whole


def peak_mb() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure(way: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Read some tiles, the first untimed."""
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None
    number, read = reader(way, folder, args.tile)
    before = peak_mb()
    times: list[float] = []
    for index in np.random.default_rng(0).integers(0, number, 1 + args.number).tolist():
        started = time.perf_counter()
        read(index)
        times.append(1e3 * (time.perf_counter() - started))
    return {
        "way": way,
        "ms": statistics.median(times[1:]),
        "ms_min": min(times[1:]),
        "ms_max": max(times[1:]),
        "memory_mb": peak_mb() - before,
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Lay the rows out as a Markdown table."""
    lines = [
        "| way      | ms a tile |     min–max | memory, MB |",
        "| -------- | --------: | ----------: | ---------: |",
    ]
    for row in rows:
        spread = f"{row['ms_min']:.1f}–{row['ms_max']:.1f}"
        lines.append(f"| {row['way']:<8} | {row['ms']:9.1f} | {spread:>12} | {row['memory_mb']:10.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "scene.tif")
        write_scene(path, args.side)
        header = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "device": f"cpu: {device_name('cpu')}, one process of one thread",
            "libraries": f"torch {torch.__version__}, Pillow {Image.__version__}, tifffile {version('tifffile')}",
            "image": f"{args.side:,} x {args.side:,} RGB, a file of {path.stat().st_size / 1e6:,.0f} MB",
            "tiles": f"{args.tile} x {args.tile}, {args.number} of them after one to warm up",
        }
        print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
        rows: list[dict[str, Any]] = []
        for way in (REFERENCE, "tifffile", "tiles"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # whose memory is its own
                rows.append(process.submit(measure, way, folder, args).result())
    print(f"\n{format_table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({**header, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
