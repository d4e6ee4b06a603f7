"""`fcmae shard`: image files packed into tar files, to be read here or from elsewhere."""

import argparse
import os
import sys
from pathlib import Path

from fcmae.commands.arguments import command_parser, require_bounds
from fcmae.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "shard",
        "Pack image files, as they are, into tar files of some hundred megabytes in OUT/SPLIT, with an index of "
        "where each image lies, to be read with data.root=OUT: from a disk, or from where OUT is then copied to, "
        "data.root=https://HOST/OUT or s3://BUCKET/OUT. The tar files are such as webdataset reads, too. The same "
        "command again continues where it stopped, checks what is there and fixes what is damaged.",
        examples="fcmae shard path/to/images path/to/shards\n"
        "fcmae shard path/to/images path/to/shards --split val\n"
        "fcmae shard path/to/webdataset",
        notes="without OUT, SOURCE is a folder of tar files that webdataset or others wrote, which gets an index",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder of images or a .tar, as data.root")
    parser.add_argument(
        "output", metavar="OUT", type=Path, nargs="?", help="a folder; its SPLIT inside is new, or the same"
    )
    parser.add_argument(
        "--name", default="folder", help="as data.name: folder, or a dataset that timm opens (default: %(default)s)"
    )
    parser.add_argument("--split", default="train", help="as data.split (default: %(default)s)")
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images in each tar file (default: as many as make up 256 MB, or less for 16 files)",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tar files whose images are shuffled together in each epoch, of which two such groups are at hand "
        "(default: as many as make up 4 GB)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; 0 works in this one (default: one for each core, %(default)s)",
    )
    return parser


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    most = 1 << 31
    require_bounds(options, {"images": (1, most), "window": (1, most), "workers": (0, 1024)})

    if options.output is None:
        return index(options)
    return pack(options)


def index(options: argparse.Namespace) -> int:
    """Put an index beside tar files that are there."""
    from fcmae.data.index import index_tars

    if options.images is not None:
        raise UserError("--images: is of tar files that are made; name a folder for them, SOURCE OUT")
    done = index_tars(Path(options.source), window=options.window, num_workers=options.workers)
    labelled = "with classes" if done.labelled else "without classes"
    passed_over = f"; {done.passed_over:,} files that are not a sample's image left out" if done.passed_over else ""
    count = f"{done.num_images:,} images {labelled} in {done.num_shards:,} tar file{'s' * (done.num_shards > 1)}"
    print(f"{options.source}: {count}, indexed{passed_over}")
    print(f"train with data.root={options.source}")
    return 0


def pack(options: argparse.Namespace) -> int:
    """Make tar files of images."""
    from fcmae.data import open_source
    from fcmae.data import pack as packing
    from fcmae.data.sources import SYNONYMS
    from fcmae.files import require_folder

    require_folder(options.output, str(options.output), inputs=[options.source])
    source = open_source(
        options.name,
        options.source,
        options.split,
        None,
        whole_root=True,
        key="SOURCE",
        remedy="name one that is there with --split, or the folder of these images as SOURCE",
    )
    folder = options.output / options.split
    done = packing.pack(
        source,
        folder,
        root=options.source,
        shard_images=options.images,
        window=options.window,
        num_workers=options.workers,
    )
    for image in done.bad:
        print(f"left out {image.name}: {image.reason}", file=sys.stderr)
    left_out = f", {len(done.bad):,} left out that cannot be read" if done.bad else ""
    state = "written" if done.written_shards else "complete and intact"
    count = f"{done.num_images:,} images in {done.num_shards:,} tar file{'s' * (done.num_shards > 1)}"
    print(f"{folder}: {count}, {done.num_bytes / 1e6:,.0f} MB, {state}{left_out}")
    held_out = any(options.split in names for names in SYNONYMS[1:])
    verb, key = ("fine-tune", "data.val_split") if held_out else ("train", "data.split")
    print(f"{verb} with data.root={options.output} {key}={options.split}")
    return 0
