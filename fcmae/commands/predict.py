"""`fcmae predict`: the top classes of images, as a table or as JSON."""

import argparse
import json
import math
from typing import Any

from fcmae.commands.arguments import add_images, add_source, command_parser, load_source, open_images, report_source
from fcmae.errors import UserError, blame, one_line


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "predict",
        "Print the top classes of images, resized and cropped as the classifier was evaluated.",
        examples="fcmae predict runs/finetune-tiny photos --top 3\n"
        "fcmae predict runs/finetune-tiny/model photo.jpg --json",
    )
    add_source(parser)
    add_images(parser)
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="classes for each image (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    return parser


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    if options.top < 1:
        raise UserError(f"--top {options.top}: must be at least 1")

    from fcmae.evaluation.inference import best_device, classify
    from fcmae.weights.base import build_encoder

    weights = load_source(options)
    network = build_encoder(weights).eval()
    if not network.num_classes:
        raise UserError(
            f"{weights.path}: holds an encoder without a classifier; fine-tune it first: fcmae finetune"
        )
    report_source(weights)
    with blame(str(weights.path)):
        preprocessing = weights.preprocessing.completed(network)
    images, unreadable = open_images(options, network.in_chans, preprocessing)
    results: list[dict[str, Any]] = []
    for prediction in classify(
        network.to(best_device()),
        images,
        preprocessing=preprocessing,
        top=options.top,
    ):
        if not math.isfinite(prediction.top_classes[0].probability):
            raise UserError(
                f"{weights.path}: finite weights that compute what is not; they are damaged, get them again"
            )
        if options.json:
            classes = [entry._asdict() for entry in prediction.top_classes]
            results.append({"image": str(prediction.path), "classes": classes})
        else:
            print(one_line(str(prediction.path)))
            for entry in prediction.top_classes:
                print(f"  {entry.probability:7.2%}  {entry.name}")
    if options.json:
        print(json.dumps(results, indent=2))
    return 2 if unreadable else 0
