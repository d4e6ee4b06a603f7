"""`fcmae diagnose`: whether features have collapsed, layer by layer, of one or several networks side by side."""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcmae import arguments
from fcmae.commands.arguments import command_parser, require_bounds, require_empty
from fcmae.errors import UserError, blame, named
from fcmae.files import write_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fcmae.evaluation.diagnose import LayerFigures, Tap
    from fcmae.evaluation.subjects import Subject

REPORT, COLLAPSE, CHANNELS, MAPS = "diagnosis.json", "collapse.png", "channels.png", "maps-{}.png"
"""What is written."""
LAYERS_SHOWN = 4
"""Layers of which feature maps are drawn."""
TAPS = ("act", "response", "block")
BOUNDS = {"images": (1, 1_000_000), "batch": (1, 1_000_000), "num_workers": (0, 1024)}
"""Of options, least and most."""
MOST_SIDE = 65_536


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "diagnose",
        "Measure how alike the channels of each layer are (feature collapse: V2 paper, figures 3 and 4), and count "
        "dead, saturated and duplicate channels, of one or several networks side by side.",
        examples="fcmae diagnose runs/mine --data path/to/images --output diagnosis\n"
        "fcmae diagnose V1=runs/v1 V2=runs/v2 timm:resnet50@resnet50.safetensors --data path/to/images",
        notes=f"writes {COLLAPSE}, {CHANNELS}, {MAPS.format('MODEL')} and {REPORT}",
    )
    arguments.add_path(
        parser,
        "models",
        metavar="[NAME=]MODEL",
        nargs="+",
        help="a run, checkpoint or exported folder, or any file of weights; timm:NAME (untrained: nothing is "
        "downloaded), timm:NAME@FILE or timm:FOLDER for a network of timm's",
    )
    arguments.add_path(
        parser, "--data", required=True, metavar="FOLDER", help="images: a folder, a .tar, or prepared arrays"
    )
    parser.add_argument(
        "--split", metavar="NAME", help="images of this split alone (default: all; of arrays, train)"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        metavar="N",
        help="of how many, evenly chosen (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PX",
        help="a side, or height and width (default: each's own)",
    )
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="images computed at once (default: %(default)s)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--tap",
        choices=TAPS,
        default="act",
        help="of each block, the MLP's features after the activation, those after GRN or what stands there, or the "
        "output, which is also taken where a block has no such place (default: %(default)s)",
    )
    where.add_argument(
        "--layers",
        metavar="REGEX",
        help="look at the outputs of the modules whose names this matches (default: the blocks' --tap)",
    )
    parser.add_argument(
        "--masked",
        type=float,
        metavar="RATIO",
        help="hide this share of patches, and look at the visible ones (default: none)",
    )
    parser.add_argument(
        "--num-workers", type=int, default=4, metavar="N", help="processes that read images (default: %(default)s)"
    )
    arguments.add_path(
        parser,
        "--output",
        type=Path,
        default=Path("diagnosis"),
        metavar="OUT",
        help="a new or empty folder for what is written (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into OUT though there are files in it")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is computed.

    Raises:
        UserError: naming the option.
    """
    require_bounds(options, BOUNDS)
    if options.size and (len(options.size) > 2 or min(options.size) < 1 or max(options.size) > MOST_SIDE):
        size = named(" ".join(map(str, options.size)))
        raise UserError(f"--size {size}: give a side in pixels, or height and width, of at most {MOST_SIDE}")
    for name in (options.data, *options.models):
        name.encode()  # which fails where no picture could show it
    require_empty(options.output, overwrite=options.overwrite, inputs=[options.data])
    if not os.path.exists(options.data):
        raise UserError(f"--data {options.data}: no such folder or file; name a folder with images in it")


def name_models(models: Sequence[str]) -> dict[str, str]:
    """Return the sources of models by the names they are shown by: NAME of NAME=SOURCE, else the source.

    Raises:
        UserError: if two have the same name.
    """
    named: dict[str, str] = {}
    for model in models:
        name, equals, source = model.partition("=")
        if not equals or os.path.exists(model) or model.startswith(("timm:", "timm/")):
            name = source = model
        if not name or not source:
            raise UserError(f"{model}: give NAME=MODEL, such as V2=runs/mine")
        if name in named:
            raise UserError(f"{name}: two models of this name; give one another, such as second={source}")
        named[name] = source
    return named


def choose_taps(subject: "Subject", options: argparse.Namespace) -> dict[str, "Tap"]:
    """Return what is looked at in a network.

    Raises:
        UserError: if there is nothing, naming some of what there is.
    """
    from fcmae.evaluation.diagnose import block_taps, named_taps

    if options.layers is None:
        taps = block_taps(subject.network, options.tap)
        failed = "none of its blocks is known: name layers with --layers"
    else:
        try:
            taps = named_taps(subject.network, re.compile(options.layers))
        except re.error as error:
            raise UserError(f"--layers {options.layers}: not a regular expression: {error}") from error
        failed = f"no module's name matches --layers {options.layers}"
    if not taps:
        names = [name for name, _ in subject.network.named_modules() if name]
        some = ", ".join(names[:: max(1, len(names) // 8)][:8])
        raise UserError(f"{subject.description}: {failed}; some of its {len(names)} modules: {some}")
    return taps


def spell_tap(taps: Mapping[str, "Tap"]) -> str:
    """Say in words what is looked at."""
    from fcmae.evaluation.diagnose import TAPS

    points = dict.fromkeys(tap.point for tap in taps.values())
    return " or ".join(TAPS.get(point, "the output of each layer named") for point in points)


def table(columns: Mapping[str, Mapping[str, str]], title: str) -> str:
    """Draw cells by column and row, a dash where there is none."""
    rows = list(dict.fromkeys(row for cells in columns.values() for row in cells))
    first = max(map(len, (title, *rows)))
    widths = {name: max(len(name), 9, *map(len, cells.values())) + 2 for name, cells in columns.items()}
    lines = [f"{title:<{first}}" + "".join(f"{name:>{width}}" for name, width in widths.items())]
    for row in rows:
        cells = (f"{columns[name].get(row, '-'):>{width}}" for name, width in widths.items())
        lines.append(f"{row:<{first}}" + "".join(cells))
    return "\n".join(lines)


def tables(models: Mapping[str, Mapping[str, "LayerFigures"]]) -> str:
    """Draw the cosine distance of each layer, and what is found of channels, a column for each model."""
    distances = {
        name: {layer: f"{found.cosine_distance:.3f}" for layer, found in layers.items()}
        for name, layers in models.items()
    }
    summaries: dict[str, dict[str, str]] = {}
    for name, layers in models.items():
        values = [found.cosine_distance for found in layers.values()]
        shares = [found.shares for found in layers.values()]
        summaries[name] = {
            "cosine distance, mean": f"{sum(values) / len(values):.3f}",
            "cosine distance, least": f"{min(values):.3f}",
        }
        for kind in shares[0]:
            summaries[name][kind.replace("_", " ")] = f"{sum(share[kind] for share in shares) / len(shares):.1%}"
    whole = table(summaries, "all layers (channels: mean share)")
    return f"{table(distances, 'cosine distance of layer')}\n\n{whole}"


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    check_options(options)
    sources = name_models(options.models)

    import torch
    from tqdm import tqdm

    from fcmae.evaluation.diagnose import diagnose, maps_of
    from fcmae.evaluation.diagnose_pictures import draw_channels, draw_collapse, draw_maps
    from fcmae.evaluation.inference import best_device
    from fcmae.evaluation.subjects import Images, mask_images, open_images, open_subject
    from fcmae.visualize import as_rgb, display_range, stretch

    device = best_device()
    size = tuple(options.size * 2)[:2] if options.size else None
    models: dict[str, dict[str, LayerFigures]] = {}
    pictures: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    report: dict[str, Any] = {"data": options.data, "masked": options.masked, "models": {}}

    def runs(subject: "Subject", images: Images, name: str) -> Iterator["Callable[[], object]"]:
        encode = subject.encode
        if options.masked is not None:
            with blame(f"--masked {options.masked}"):
                encode = mask_images(subject, options.masked)
        shown = tqdm(total=len(images.dataset), desc=name, unit="images", disable=not sys.stderr.isatty())
        with shown:
            for batch in images.batches(options.batch, options.num_workers):
                yield lambda batch=batch: encode(batch)
                shown.update(len(batch))
                counts[name] = counts.get(name, 0) + len(batch)

    counts: dict[str, int] = {}
    opened = {name: open_subject(source, size) for name, source in sources.items()}  # all, before what takes long
    chosen = {name: choose_taps(subject, options) for name, subject in opened.items()}
    for name, subject in opened.items():
        images = open_images(options.data, options.split, options.images, subject, device)
        taps, tapped = chosen[name], spell_tap(chosen[name])
        print(f"{name}: {subject.description}; of {len(taps)} layers: {tapped}", file=sys.stderr)
        subject.network.to(device)
        first = images.first()
        with blame(f"{name}, images of {' x '.join(map(str, subject.preprocessing.image_size))} px"):
            models[name] = diagnose(subject.network, taps, runs(subject, images, name))
            every = list(models[name])
            some = [every[(i + 1) * len(every) // LAYERS_SHOWN - 1] for i in range(LAYERS_SHOWN)]
            wanted = {layer: taps[layer] for layer in dict.fromkeys(some)}
            maps = maps_of(subject.network, wanted, lambda s=subject, x=first: s.encode(x))
        pixels = images.normalize.invert(first)
        if images.dataset.source.dtype != torch.uint8:
            pixels = stretch(pixels, *display_range(pixels))
        pictures[name] = as_rgb(pixels)[0].cpu(), maps
        subject.network.cpu()
        if idle := [layer for layer in taps if layer not in models[name]]:
            print(f"{name}: features do not depend on {', '.join(idle)}: left out", file=sys.stderr)
        unreadable = len(images.dataset) - counts[name]
        if unreadable:
            print(f"{name}: {unreadable} images do not decode and are left out", file=sys.stderr)
        report["models"][name] = {
            "source": sources[name],
            "description": subject.description,
            "tap": tapped,
            "image_size": list(subject.preprocessing.image_size),
            "images": counts[name],
            "unreadable_images": unreadable,
            "layers": {layer: found._asdict() for layer, found in models[name].items()},
        }

    masked = "" if options.masked is None else f", {options.masked:.0%} of patches hidden"
    taps_said = "; ".join(dict.fromkeys(model["tap"] for model in report["models"].values()))
    title = f"{max(counts.values())} images of {options.data}{masked}\nof {taps_said}"
    out: Path = options.output
    out.mkdir(parents=True, exist_ok=True)
    draw_collapse(models, title, out / COLLAPSE)
    draw_channels(models, title, out / CHANNELS)
    written = [COLLAPSE, CHANNELS]
    for i, (name, (image, maps)) in enumerate(pictures.items()):
        if not maps:
            print(f"{name}: its layers are no maps but tokens: no picture of them", file=sys.stderr)
            continue
        slug = re.sub(r"[^\w.-]+", "-", name).strip("-") or str(i)
        file = MAPS.format(slug if MAPS.format(slug) not in written else f"{slug}-{i}")
        draw_maps(image, maps, models[name], f"{name}: {report['models'][name]['tap']}", out / file)
        written.append(file)
    write_json(out / REPORT, report)
    print(f"{title}\n\n{tables(models)}\n\n{out}: {', '.join([REPORT, *written])}")
    return 0
