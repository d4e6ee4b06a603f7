"""`fcmae prepare`: images decoded and shrunk once, for data.name=arrays."""

import argparse
import os
import sys
from pathlib import Path

from fcmae.commands.arguments import command_parser
from fcmae.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "prepare",
        "Decode images once, shrink them and write their pixels into OUT/SPLIT, with labels and class names, to be "
        "read with data.name=arrays data.root=OUT. The same command again continues where it stopped, checks what "
        "is there and fixes what is damaged.",
        examples="fcmae prepare path/to/images path/to/prepared\n"
        "fcmae prepare path/to/images path/to/prepared --split val",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder of images or a .tar, as data.root")
    parser.add_argument("output", metavar="OUT", type=Path, help="a folder; its SPLIT inside is new, or the same")
    parser.add_argument(
        "--name", default="folder", help="as data.name: folder, or a dataset that timm opens (default: %(default)s)"
    )
    parser.add_argument("--split", default="train", help="as data.split (default: %(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        default=256,
        metavar="PIXELS",
        help="short side to which larger images are shrunk (default: %(default)s)",
    )
    parser.add_argument(
        "--channels", type=int, default=3, metavar="N", help="1, 3 or 4, as model.in_chans (default: %(default)s)"
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
    for name, least in (("size", 1), ("channels", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {least}")

    from fcmae.data import open_source
    from fcmae.data.prepare import prepare
    from fcmae.data.sources import SYNONYMS

    source = open_source(
        options.name,
        options.source,
        options.split,
        options.channels,
        whole_root=True,
        key="SOURCE",
        remedy="name one that is there with --split, or the folder of these images as SOURCE",
    )
    folder = options.output / options.split
    done = prepare(
        source,
        folder,
        root=options.source,
        channels=options.channels,
        short_side=options.size,
        num_workers=options.workers,
    )
    for image in done.bad:
        print(f"left out {image.name}: {image.reason}", file=sys.stderr)
    left_out = f", {len(done.bad):,} left out that do not decode" if done.bad else ""
    state = "written" if done.written_shards else "complete and intact"
    print(f"{folder}: {done.num_images:,} images, {done.num_bytes / 1e6:,.0f} MB, {state}{left_out}")
    held_out = any(options.split in names for names in SYNONYMS[1:])
    verb, key = ("fine-tune", "data.val_split") if held_out else ("train", "data.split")
    print(f"{verb} with data.name=arrays data.root={options.output} {key}={options.split}")
    return 0
