"""`fcmae predict`: the classes or numbers of images, as a table or as JSON."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from fcmae.commands.arguments import add_images, add_source, command_parser, load_source, open_images, report_source
from fcmae.errors import UserError, blame, one_line

if TYPE_CHECKING:
    from torch import Tensor


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "predict",
        "Print the top classes of images, all classes above a probability (of task=multilabel), or numbers (of "
        "task=regression); images are resized and cropped as the network was evaluated.",
        examples="fcmae predict runs/finetune-tiny photos --top 3\n"
        "fcmae predict runs/finetune-tiny/model photo.jpg --json",
    )
    add_source(parser)
    add_images(parser)
    parser.add_argument("--top", type=int, metavar="K", help="classes for each image (default: 5)")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="of task=multilabel: the least probability (default: 0.5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    return parser


def answer_of(
    outputs: "Tensor", task: str, names: tuple[str, ...], options: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Return what a network's outputs (outputs,) say of an image: for JSON, and as lines."""
    from fcmae.evaluation.inference import classes_above, top_classes

    if task == "regression":
        numbers = dict(zip(names, outputs.tolist(), strict=True))
        return {"values": numbers}, [f"{value:10.5g}  {name}" for name, value in numbers.items()]
    if task == "multilabel":
        classes = classes_above(outputs, names, 0.5 if options.threshold is None else options.threshold)
    else:
        classes = top_classes(outputs, names, options.top or 5)
    lines = [f"{entry.probability:7.2%}  {entry.name}" for entry in classes]
    return {"classes": [entry._asdict() for entry in classes]}, lines


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    if options.top is not None and options.top < 1:
        raise UserError(f"--top {options.top}: must be at least 1")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold {options.threshold}: must be a probability, from 0 to 1")

    from fcmae.evaluation.inference import best_device, compute_outputs
    from fcmae.weights.base import build_encoder

    weights = load_source(options)
    network = build_encoder(weights).eval()
    if not network.num_classes:
        raise UserError(
            f"{weights.path}: holds an encoder without a classifier; fine-tune it first: fcmae finetune"
        )
    with blame(str(weights.path)):
        preprocessing = weights.preprocessing.completed(network)
    task, of = preprocessing.task_name, {"top": "classification", "threshold": "multilabel"}
    for option, value in ((f"--{name}", getattr(options, name)) for name in of if task != of[name]):
        if value is not None:
            raise UserError(f"{option} {value}: is not for {weights.path}, of task={task}")
    report_source(weights)
    names = preprocessing.class_names or tuple(map(str, range(network.num_classes)))
    images, unreadable = open_images(options, network.in_chans, preprocessing)
    results: list[dict[str, Any]] = []
    for path, outputs in compute_outputs(network.to(best_device()), images, preprocessing=preprocessing):
        if not outputs.isfinite().all():
            raise UserError(
                f"{weights.path}: finite weights that compute what is not; they are damaged, get them again"
            )
        answer, lines = answer_of(outputs, task, names, options)
        results.append({"image": str(path), **answer})
        if not options.json:
            print("\n".join([one_line(str(path)), *(f"  {line}" for line in lines)]))
    if options.json:
        print(json.dumps(results, indent=2))
    return 2 if unreadable else 0
