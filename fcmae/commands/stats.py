"""`fcmae stats`: what images are like, and the section `data` of a configuration for them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fcmae import arguments
from fcmae.commands.arguments import command_parser, require_bounds, require_empty
from fcmae.config import MOST_CHANNELS, DataSection, parse_config
from fcmae.errors import UserError, named
from fcmae.files import write_text
from fcmae.plain_yaml import write_yaml

if TYPE_CHECKING:
    from fcmae.data.stats import Statistics

STATISTICS, HISTOGRAMS, SECTION = "stats.json", "histograms.png", "data.yaml"
"""What is written."""
NAMED = 10
"""Images that are named of each sort; the file names all."""
BOUNDS = {"channels": (1, MOST_CHANNELS), "images": (1, 10**9), "num_workers": (0, 1024)}
"""Of options, least and most."""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "stats",
        "Look at all images of a set: broken files, sizes, kinds of pixels, mean and standard deviation and "
        "percentiles by channel, no-data, constant images, doubles and images that look alike; and print the "
        "section data of a configuration for them.",
        examples="fcmae stats path/to/images\n"
        "fcmae stats path/to/images --clip 0.1 99.9 --output stats\n"
        "fcmae pretrain path/to/images data.stats=stats/stats.json",
        notes=f"writes {STATISTICS}, which data.stats names, {HISTOGRAMS} and {SECTION}, where --output says so",
    )
    arguments.add_path(
        parser, "root", metavar="ROOT", help="a folder of images, a .tar, shards, or arrays, as data.root"
    )
    parser.add_argument("--name", help="as data.name (default: folder or arrays, what lies there)")
    parser.add_argument("--split", default="train", help="as data.split (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("uint8", "uint16", "float32"),
        help="as data.dtype (default: the deepest of some images)",
    )
    parser.add_argument("--nodata", metavar="VALUE", help="as data.nodata: a number, or nan (default: refuse such)")
    parser.add_argument("--window", action="store_true", help="as data.window=true")
    parser.add_argument(
        "--channels", type=int, metavar="N", help="as model.in_chans (default: as most of some images have)"
    )
    parser.add_argument(
        "--clip",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="clip pixels to these percentiles of each channel, as data.clip will (default: no clipping)",
    )
    parser.add_argument("--images", type=int, metavar="N", help="of how many, evenly chosen (default: all)")
    parser.add_argument(
        "--num-workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; 0 works in this one (default: one for each core, %(default)s)",
    )
    arguments.add_path(
        parser,
        "--output",
        type=Path,
        metavar="STATS",
        help="a new or empty folder for files of what is found (default: print it alone)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into STATS though there are files in it")
    return parser


def check_options(options: argparse.Namespace) -> DataSection:
    """Refuse what cannot be meant, before images are read; returns the settings of which these options are.

    Raises:
        UserError: naming the option.
    """
    require_bounds(options, BOUNDS)
    if options.clip and not 0 <= options.clip[0] < options.clip[1] <= 100:
        raise UserError(f"--clip {options.clip[0]:g} {options.clip[1]:g}: give two percentiles, least and most")
    if not (os.path.exists(options.root) or "://" in options.root):
        raise UserError(f"{named(options.root)}: no such folder or file; name a folder with images in it")
    if options.output is not None:
        require_empty(options.output, overwrite=options.overwrite, inputs=[options.root])
    given = {key: getattr(options, key) for key in ("root", "split", "dtype", "nodata", "window")}
    return parse_config(DataSection, given, "fcmae stats")


def some(names: Sequence[str]) -> str:
    """Name the first of some images."""
    more = f", and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def count(number: int, what: str) -> str:
    """Write so many of a thing."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def groups_of(groups: Sequence[Sequence[str]]) -> list[str]:
    """Write groups of images, a line each, after one that says how many there are."""
    more = [f"and {count(len(groups) - NAMED, 'group')} more"] if len(groups) > NAMED else []
    number = f"{count(sum(map(len, groups)), 'image')} in {count(len(groups), 'group')}"
    return [number, *(some(group) for group in groups[:NAMED]), *more]


def describe(found: "Statistics") -> str:
    """Say what was found, in lines under each other."""
    sizes = found.sizes
    least, median, most = (f"{height} x {width}" for height, width in (sizes.least, sizes.median, sizes.most))
    decoded = found.looked_at - len(found.broken)
    lines: list[tuple[str, str]] = [("images", f"{found.num_images:,} in {found.root}, split {found.split}")]
    if found.looked_at < found.num_images:
        lines.append(("looked at", f"{found.looked_at:,} of them, evenly chosen"))
    lines.append(("broken", f"{len(found.broken):,}" if found.broken else "none"))
    lines += [("", f"{image.name}: {image.reason}") for image in found.broken[:NAMED]]
    if len(found.broken) > NAMED:
        lines.append(("", f"and {len(found.broken) - NAMED:,} more"))
    lines += [
        ("height x width", f"{least} to {most}, median {median}"),
        (
            "",
            f"most often {' x '.join(map(str, sizes.most_frequent))}, {count(sizes.most_frequent_images, 'image')}",
        ),
        ("width / height", "{:.3g} to {:.3g}, median {:.3g}".format(*(sizes.aspect[i] for i in (0, 2, 1)))),
        ("pixels", ", ".join(f"{kind} ({count(n, 'image')})" for kind, n in found.kinds.items())),
        ("channels", ", ".join(f"{number} ({count(n, 'image')})" for number, n in found.channels.items())),
    ]
    if found.gray:
        remedy = "; --channels 1 reads one" if found.gray == decoded else ""
        lines.append(("gray", f"{found.gray:,} of {decoded:,} images have the same values in all channels{remedy}"))
    lines.append(("no-data", f"{found.unknown:.3%} of pixels" if found.unknown else "none"))
    if found.constant:
        lines.append(("constant", f"{count(len(found.constant), 'image')}: {some(found.constant)}"))
    for title, groups in (("same pixels", found.same), ("look alike", found.alike)):
        written = groups_of(groups) if groups else ["none"]
        lines += [(title, written[0]), *(("", line) for line in written[1:])]
    columns = ["mean", "std", *(f"{percent} %" for percent in found.percentiles)]
    clipped = "" if found.clip is None else "; mean and std are of clipped pixels"
    table = [f"pixels by channel ({found.unit}{clipped})", f"{'':5}" + "".join(f" {title:>9}" for title in columns)]
    for channel, row in enumerate(zip(found.mean, found.std, *found.percentiles.values(), strict=True)):
        table.append(f"{channel:>5}" + "".join(f" {value:>9.4g}" for value in row))
    width = max(len(title) for title, _ in lines) + 2
    return "\n".join([*(f"{title:{width}}{text}" for title, text in lines), "", *table])


def section_of(found: "Statistics") -> str:
    """Return the part of a configuration that the images decide."""
    return write_yaml({"model": {"in_chans": found.in_chans}, "data": found.section()})


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    data = check_options(options)

    from fcmae.data import Reading, open_source
    from fcmae.data.pixels import kind_name
    from fcmae.data.sampling import spread
    from fcmae.data.sources import holds_arrays
    from fcmae.data.stats import Broken, Statistics, summarise, survey

    name = options.name or ("arrays" if holds_arrays(data.root, data.split) else "folder")
    source = open_source(
        name,
        data.root,
        data.split,
        options.channels,
        reading=Reading.of(data),
        key="ROOT",
        remedy="name one that is there with --split NAME, or all there is with --split .",
    )
    indices = spread(len(source), min(options.images or len(source), len(source)))
    print(f"looking at {count(len(indices), 'image')} of {data.root}", file=sys.stderr, flush=True)
    looked, bad = survey(source, indices, options.num_workers)
    found = Statistics(
        name=name,
        root=data.root,
        split=data.split,
        num_images=len(source),
        looked_at=len(indices),
        broken=[Broken(name=image.name, reason=image.reason) for image in bad],
        dtype=cast(Any, kind_name(source.dtype)),
        nodata=data.nodata,
        window=data.window,
        in_chans=source.channels,
        **summarise(source, looked, clip=options.clip),
    )
    print(f"{describe(found)}\n")
    try:
        parse_config(DataSection, {"root": data.root, **found.section()}, "no configuration takes these")
    except UserError as error:
        print(f"{error}; divide the values, or name what is no-data with --nodata\n", file=sys.stderr)
    out: Path | None = options.output
    if out is None:
        print(section_of(found), end="")
        return 0
    from fcmae.evaluation.stats_picture import draw_histograms

    out.mkdir(parents=True, exist_ok=True)
    write_text(out / STATISTICS, found.model_dump_json(indent=1))
    write_text(out / SECTION, f"# of {data.root}, by fcmae stats\n{section_of(found)}")
    draw_histograms(looked.histograms, found, out / HISTOGRAMS)
    print(f"{out}: {STATISTICS}, {HISTOGRAMS}, {SECTION}")
    clip = "" if found.clip is None else " data.clip=auto"
    print(f"train with data.root={data.root} data.stats={out / STATISTICS} data.mean=auto data.std=auto{clip}")
    return 0
