"""`fcmae prepare`: images decoded and shrunk once, for data.name=arrays."""

import argparse
import os
import shlex
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
        "fcmae prepare path/to/images path/to/prepared --split val\n"
        "fcmae prepare path/to/scenes path/to/prepared --channels 12 --tile 512",
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
        metavar="PIXELS",
        help="short side to which larger images are shrunk (default: 256; that of --tile)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side, or height and width, of the tiles that larger images are cut into (default: none)",
    )
    parser.add_argument(
        "--channels", type=int, default=3, metavar="N", help="as model.in_chans (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=["uint8", "uint16", "float32"], help="as data.dtype (default: as deep as the images)"
    )
    parser.add_argument(
        "--nodata",
        type=float,
        metavar="VALUE",
        help="as data.nodata: a number or nan; what is not known becomes NaN (default: such images are left out)",
    )
    parser.add_argument("--window", action="store_true", help="as data.window, of DICOM images (default: no)")
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
    tile = options.tile and (options.tile[0], options.tile[-1])
    if tile and len(options.tile) > 2:
        raise UserError(f"--tile {shlex.join(map(str, options.tile))}: must be a side, or height and width")
    size = options.size if options.size is not None else min(tile) if tile else 256
    for name, given, least in (
        ("tile", tile and min(tile), 1),
        ("size", size, 1),
        ("channels", options.channels, 1),
        ("workers", options.workers, 0),
    ):
        if given is not None and given < least:
            raise UserError(f"--{name} {given}: must be at least {least}")

    from fcmae.data import open_source
    from fcmae.data.pixels import Reading
    from fcmae.data.prepare import prepare
    from fcmae.data.sources import SYNONYMS

    reading = Reading.of(options)
    source = open_source(
        options.name,
        options.source,
        options.split,
        options.channels,
        whole_root=True,
        reading=reading,
        key="SOURCE",
        remedy="name one that is there with --split, or the folder of these images as SOURCE",
    )
    folder = options.output / options.split
    done = prepare(
        source,
        folder,
        root=options.source,
        channels=options.channels,
        short_side=size,
        num_workers=options.workers,
        tile=tile,
        reading=reading,
    )
    for image in done.bad:
        print(f"left out {image.name}: {image.reason}", file=sys.stderr)
    left_out = f", {len(done.bad):,} left out that do not decode" if done.bad else ""
    state = "written" if done.written_shards else "complete and intact"
    what = "images" if tile is None else f"tiles of {len(source):,} images"
    print(f"{folder}: {done.num_images:,} {what}, {done.num_bytes / 1e6:,.0f} MB, {state}{left_out}")
    held_out = any(options.split in names for names in SYNONYMS[1:])
    verb, key = ("fine-tune", "data.val_split") if held_out else ("train", "data.split")
    unknown = "" if options.nodata is None else " data.nodata=nan"
    print(f"{verb} with data.name=arrays data.root={options.output} {key}={options.split}{unknown}")
    return 0
