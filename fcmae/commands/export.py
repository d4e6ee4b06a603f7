"""`fcmae export`: any weights, written in the format of others and checked before they get their name."""

import argparse
import sys
from pathlib import Path

from fcmae.commands.arguments import add_source, command_parser, load_source, report_source
from fcmae.files import require_new_folder

FORMATS = {
    "timm": "config.json, model.safetensors",
    "transformers": "config.json, preprocessor_config.json, model.safetensors",
    "official": "model.pth, dense, as the official code's --finetune takes it",
    "official-sparse": "model.pth in MinkowskiEngine's names; encoders only",
    "plain": "model.safetensors in our names",
    "onnx": "model.onnx for ONNX Runtime, any batch, height and width",
    "torch-export": "model.pt2 for torch.export.load",
}
"""What `--to` takes, and what is written: known here without torch, so that --help is quick."""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "export",
        "Write the network of any weights in another format. What was written is loaded again and must compute "
        "the same on random images before it gets its name.",
        examples="fcmae export runs/mine --to timm --output exported\n"
        "fcmae export runs/classifier --to onnx --with-preprocessing --output exported",
        notes="formats:\n" + "\n".join(f"  {name:16}{what}" for name, what in FORMATS.items()),
    )
    add_source(parser)
    parser.add_argument("--to", required=True, choices=FORMATS, metavar="FORMAT", help="see below")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet, or is empty"
    )
    parser.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="of a classifier or segmenter to onnx: resize, crop, normalise and softmax inside, so that it takes "
        "images of any size, uint8 (b, height, width, channels), and gives probabilities; a segmenter does not "
        "resize, and gives those of each pixel (default: the network alone)",
    )
    return parser


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    require_new_folder(options.output, f"--output {options.output}")

    from fcmae.weights.export import FORMATS as WRITERS
    from fcmae.weights.export import export

    weights = load_source(options)
    report_source(weights)
    written = export(weights, options.to, options.output, with_preprocessing=options.with_preprocessing)
    for file in written.files:
        print(f"{file}  {file.stat().st_size:,} bytes")
    precision = str(WRITERS[options.to].dtype).removeprefix("torch.")
    print(
        f"checked on random images in {precision}: differs by {written.difference:.0e} of the largest output\n"
        f"load with {written.how}",
        file=sys.stderr,
    )
    return 0
