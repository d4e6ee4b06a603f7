"""`fcmae export`: any weights, written in the format of others and checked before they get their name."""

import argparse
import sys
from pathlib import Path

from fcmae.commands.arguments import add_source, command_parser, load_source, report_source
from fcmae.errors import UserError, named
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

LICENSES = (
    *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "openrail", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "other"),
)
"""Of those that the hub knows, by its names."""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "export",
        "Write the network of any weights in another format. What was written is loaded again and must compute "
        "the same on random images before it gets its name.",
        examples="fcmae export runs/mine --to timm --output exported\n"
        "fcmae export runs/classifier --to onnx --with-preprocessing --output exported\n"
        "fcmae export runs/mine --to timm --output exported --push ORG/NAME --license cc-by-4.0",
        notes="formats, each with README.md, a model card:\n"
        + "\n".join(f"  {name:16}{what}" for name, what in FORMATS.items()),
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
    hub = parser.add_argument_group("sharing", "on the Hugging Face Hub, by the token of hf auth login or HF_TOKEN")
    hub.add_argument(
        "--license", choices=LICENSES, metavar="NAME", help=f"of the weights, for the card: {', '.join(LICENSES)}"
    )
    hub.add_argument(
        "--push", metavar="ORG/NAME", help="upload DIR to this repository, which is made; nothing there is replaced"
    )
    hub.add_argument("--private", action="store_true", help="make it a private one")
    return parser


def check_sharing(options: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is computed.

    Raises:
        UserError: naming the option.
    """
    if options.push is None:
        if options.private:
            raise UserError("--private: is of the repository that --push ORG/NAME names; give that, too")
        return
    if options.license is None:
        raise UserError(
            f"--push {named(options.push)}: under which licence? Add --license with one of {', '.join(LICENSES)}; "
            "weights that were started from others keep theirs"
        )
    from fcmae.weights.hub import require_repository

    require_repository(options.push)


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    require_new_folder(options.output, f"--output {options.output}")
    check_sharing(options)

    from fcmae.load import describe_training
    from fcmae.weights.card import Publication
    from fcmae.weights.export import FORMATS as WRITERS
    from fcmae.weights.export import export

    weights = load_source(options)
    report_source(weights)
    written = export(
        weights,
        options.to,
        options.output,
        with_preprocessing=options.with_preprocessing,
        trained=describe_training(options.source, last=options.last, ema=options.ema),
        publication=Publication(options.license, options.push),
    )
    for file in written.files:
        print(f"{file}  {file.stat().st_size:,} bytes")
    precision = str(WRITERS[options.to].dtype).removeprefix("torch.")
    print(
        f"checked on random images in {precision}: differs by {written.difference:.0e} of the largest output\n"
        f"load with {written.how}",
        file=sys.stderr,
    )
    if options.push is not None:
        from fcmae.weights.hub import push

        print(push(options.output, options.push, private=options.private))
    return 0
