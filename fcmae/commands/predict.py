"""`fcmae predict`: the classes or numbers of images, as a table or as JSON, or their masks as files."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fcmae.arguments import add_path
from fcmae.commands.arguments import (
    add_images,
    add_source,
    command_parser,
    list_images,
    load_source,
    open_images,
    plan_files,
    report_source,
)
from fcmae.errors import UserError, blame, one_line
from fcmae.files import require_folder

if TYPE_CHECKING:
    from torch import Tensor

    from fcmae.encoder.base import Network
    from fcmae.evaluation.inference import Picture
    from fcmae.weights.base import Preprocessing

TASK_OF = {
    "top": "classification",
    "threshold": "multilabel",
    "output": "segmentation",
    "overwrite": "segmentation",
}
"""For which an option is."""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "predict",
        "Print the top classes of images, all classes above a probability (of task=multilabel), or numbers (of "
        "task=regression), or write masks (of task=segmentation). Images are resized and cropped, or cut into "
        "windows, as the network was evaluated.",
        examples="fcmae predict runs/finetune-tiny photos --top 3\n"
        "fcmae predict runs/finetune-tiny/model photo.jpg --json\n"
        "fcmae predict runs/segmentation photos --output masks",
    )
    add_source(parser)
    add_images(parser)
    parser.add_argument("--top", type=int, metavar="K", help="classes for each image (default: 5)")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="of task=multilabel: the least probability (default: 0.5)"
    )
    add_path(
        parser,
        "--output",
        type=Path,
        metavar="DIR",
        help="of task=segmentation: a folder for IMAGE.png, the mask, and IMAGE-overlay.png, arranged as they are",
    )
    parser.add_argument(
        "--overwrite", action="store_const", const=True, help="replace these in DIR (default: refuse)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    return parser


class Answer(NamedTuple):
    """What is said of an image."""

    values: dict[str, Any]
    """For JSON."""
    text: str
    """For people."""


def answer_of(
    path: Path, outputs: "Tensor", task: str, names: tuple[str, ...], options: argparse.Namespace
) -> Answer:
    """Return what a network's outputs (outputs,) say of an image."""
    from fcmae.evaluation.inference import classes_above, top_classes

    if task == "regression":
        numbers = dict(zip(names, outputs.tolist(), strict=True))
        values, lines = {"values": numbers}, [f"{value:10.5g}  {name}" for name, value in numbers.items()]
    else:
        if task == "multilabel":
            classes = classes_above(outputs, names, 0.5 if options.threshold is None else options.threshold)
        else:
            classes = top_classes(outputs, names, options.top or 5)
        values = {"classes": [entry._asdict() for entry in classes]}
        lines = [f"{entry.probability:7.2%}  {entry.name}" for entry in classes]
    lines = [one_line(str(path)), *(f"  {line}" for line in lines)]
    return Answer({"image": str(path), **values}, "\n".join(lines))


def write_masks(
    network: "Network",
    images: Iterable["Picture"],
    use: "Preprocessing",
    names: tuple[str, ...],
    places: Iterator[tuple[Path, list[Path]]],
) -> Iterator[Answer]:
    """Write the mask and the overlay of each image, and yield what they show.

    Args:
        places: where those of each image go, also of images that turn out to be unreadable.
    """
    from fcmae.evaluation.inference import class_shares, segment_images
    from fcmae.segment_pictures import draw_overlay, write_mask
    from fcmae.visualize import write_picture

    for path, pixels, classes in segment_images(network, images, preprocessing=use):
        mask, overlay = next(files for image, files in places if image == path)
        mask.parent.mkdir(parents=True, exist_ok=True)
        write_mask(mask, classes.numpy(), use.ignore_index)
        write_picture(overlay, draw_overlay(pixels, classes, names))
        shares = class_shares(classes, names)
        written = {"image": str(path), "mask": str(mask), "overlay": str(overlay)}
        said = ", ".join(f"{entry.share:.2%} {entry.name}" for entry in shares)
        yield Answer({**written, "classes": [entry._asdict() for entry in shares]}, one_line(f"{path}  {said}"))


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    if options.top is not None and options.top < 1:
        raise UserError(f"--top {options.top}: must be at least 1")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold}: must be a probability, from 0 to 1")
    planned: list[list[Path]] = []
    if options.output is not None:
        require_folder(options.output, f"--output {options.output}", inputs=options.images)
        files = list_images(options.images)
        planned = plan_files(options.output, files, [".png", "-overlay.png"], overwrite=bool(options.overwrite))
        options.images = [image.path for image in files]

    from fcmae.evaluation.inference import best_device, compute_outputs
    from fcmae.weights.base import build_encoder

    weights = load_source(options)
    network = build_encoder(weights).eval()
    if not network.num_classes:
        raise UserError(
            f"{weights.path}: holds an encoder without a classifier; fine-tune it first: fcmae finetune"
        )
    with blame(str(weights.path)):
        use = weights.preprocessing.completed(network)
    task = use.task_name
    for name in (name for name in TASK_OF if TASK_OF[name] != task):
        value = getattr(options, name)
        if value is not None:
            option = f"--{name}" if value is True else f"--{name} {value}"
            raise UserError(f"{option}: is not for {weights.path}, of task={task}")
    if task == "segmentation" and options.output is None:
        raise UserError(f"{weights.path}: of task=segmentation, whose masks are files; add --output DIR for them")
    report_source(weights)
    names = use.class_names or tuple(map(str, range(network.num_classes)))
    images, unreadable = open_images(options, network.in_chans, use)
    network = network.to(best_device())
    if task == "segmentation":
        answers = write_masks(network, images, use, names, zip(options.images, planned, strict=True))
    else:
        computed = compute_outputs(network, images, preprocessing=use)
        answers = (answer_of(path, outputs, task, names, options) for path, outputs in computed)
    results: list[dict[str, Any]] = []
    try:
        for answer in answers:
            results.append(answer.values)
            if not options.json:
                print(answer.text)
    except FloatingPointError as error:
        raise UserError(f"{weights.path}: {error}") from error
    if options.json:
        print(json.dumps(results, indent=2))
    if unreadable:
        total = len(results) + len(unreadable)
        print(f"{len(unreadable)} of {total} images could not be read", file=sys.stderr)
    return 2 if unreadable else 0
