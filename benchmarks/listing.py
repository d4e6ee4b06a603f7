"""Time how a run opens a folder of millions of images, and how its memory grows while workers read them.

    python benchmarks/listing.py FOLDER --make 10000000 --classes 22000
    python benchmarks/listing.py FOLDER --json listing.json

FOLDER is made of hard links to few small JPEGs, 60,000 to each: ten million take 0.5 GB of disk and a few inodes.
It is opened three times, each in a new process: with an empty cache, so that it is listed; with the list kept; and
so by several processes at once. CPU seconds are those of all threads; of memory `own` is what no other process
shares, without what importing takes (`Private_Dirty` of Linux).
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image
from train_step import device_name

from fcmae import sample_visible_ids
from fcmae.data import IndexStream, PretrainDataset, RandomView, load_batches, open_source

LINKS = 60_000
"""Names of a file at most: ext4 has 65,000."""
MB = 1 << 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of images, in a folder for each class")
    parser.add_argument("--make", type=int, metavar="IMAGES", help="make FOLDER, of so many")
    parser.add_argument("--classes", type=int, default=1000, help="folders that are made")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=300, help="between the first and the last look at memory")
    parser.add_argument("--processes", type=int, default=4, help="that open it at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if args.make and args.folder.exists():
        parser.error(f"{args.folder} exists already")
    if not args.make and not args.folder.is_dir():
        parser.error(f"{args.folder}: no such folder; --make IMAGES makes one")
    return args


def make_folder(folder: Path, images: int, classes: int) -> None:
    """Make a folder like ImageNet's: n00000037/n00000037_7919.JPEG."""
    folder.mkdir(parents=True)
    hidden = folder.with_name(f"{folder.name}-linked")
    hidden.mkdir()
    for number in range(images):
        if number % LINKS == 0:
            file = hidden / f"{number}.jpg"
            Image.effect_noise((40, 32), 50).convert("RGB").save(file)
        name = f"n{number % classes * 37:08d}"
        if number < classes:
            (folder / name).mkdir()
        os.link(file, folder / name / f"{name}_{number // classes * 7919 % 1_000_003}.JPEG")


def own_mb(process: int | str = "self") -> float:
    """Return the memory of a process that it shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:")) / MB


def open_and_load(args: argparse.Namespace, batches: int) -> dict[str, Any]:
    """Open the folder, load batches, and measure."""
    imported, wall, cpu = own_mb(), time.perf_counter(), time.process_time()
    source = open_source("folder", str(args.folder), ".", 3)
    found: dict[str, Any] = {
        "images": len(source),
        "open_s": time.perf_counter() - wall,
        "open_cpu_s": time.process_time() - cpu,
        "main_mb": own_mb() - imported,
    }
    if batches:
        dataset = PretrainDataset(
            source,
            view=RandomView((32, 32), (0.2, 1.0), 0.5),
            draw_ids=lambda: sample_visible_ids(1, 16, 0.6),
            seed=0,
        )
        stream = IndexStream(len(dataset), batch_size=args.batch, seed=0)
        loaded = load_batches(dataset, stream, num_workers=args.workers, pin_memory=False)
        next(loaded)
        found["first_batch_s"] = time.perf_counter() - wall
        found["first_batch_cpu_s"] = time.process_time() - cpu
        for when in ("worker_mb_first", "worker_mb_last"):
            workers = [process.pid for process in multiprocessing.active_children() if process.pid]
            found[when] = max(map(own_mb, workers), default=0.0)
            for _ in range(batches if when == "worker_mb_first" else 0):
                next(loaded)
    return found


def _tell(queue: Any, work: Callable[..., object], *given: object) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in any other process
    queue.put(work(*given))


def in_processes(number: int, work: Callable[..., Any], *given: object) -> list[Any]:
    """Return what `work` gives in new processes, at once."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_tell, args=(queue, work, *given)) for _ in range(number)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure as the command line asks."""
    args = parse_args(argv)
    if args.make:
        make_folder(args.folder, args.make, args.classes)
        time.sleep(3)  # what has changed just now is not kept
    os.environ["XDG_CACHE_HOME"] = cache = tempfile.mkdtemp()
    try:
        measured = {
            "listed": in_processes(1, open_and_load, args, 0),
            "kept": in_processes(1, open_and_load, args, args.batches),
            f"kept, {args.processes} processes": in_processes(args.processes, open_and_load, args, 0),
        }
    finally:
        shutil.rmtree(cache)
    for name, rows in measured.items():
        for row in rows:
            figures = ", ".join(f"{key} {value:,.1f}" for key, value in row.items() if key != "images")
            print(f"{name}: {row['images']:,} images: {figures}")
    if args.json:
        header = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "device": device_name("cpu"),
            "load": os.getloadavg()[1],
        }
        args.json.write_text(json.dumps(header | measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
