"""`fcmae reconstruct`: pictures of what a pretrained model predicts where images are masked, written as PNG."""

import argparse
import sys
from pathlib import Path

from fcmae.commands.arguments import add_images, command_parser, open_images
from fcmae.errors import blame


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "reconstruct",
        "Draw original | masked | reconstruction of images of any size, a row for each mask ratio. Images are "
        "resized to about as many pixels as in training.",
        examples="fcmae reconstruct runs/mine photos/bird.jpg --mask-ratios 0.5 0.75 --output panels",
    )
    parser.add_argument("source", metavar="RUN", type=Path, help="a pretraining run or checkpoint folder")
    add_images(parser)
    parser.add_argument(
        "--mask-ratios",
        nargs="+",
        type=float,
        default=[0.5, 0.6, 0.75],
        metavar="R",
        help="shares of the patches that are masked (default: 0.5 0.6 0.75)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("reconstructions"),
        metavar="DIR",
        help="a folder for IMAGE.png (default: %(default)s)",
    )
    return parser


def free_path(folder: Path, stem: str, taken: set[Path]) -> Path:
    """Return FOLDER/STEM.png, or STEM-2.png and so on where that was written for another image."""
    path, number = folder / f"{stem}.png", 1
    while path in taken:
        number += 1
        path = folder / f"{stem}-{number}.png"
    taken.add(path)
    return path


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)

    from PIL import Image

    from fcmae.evaluation.inference import best_device, reconstruct_images
    from fcmae.load import load_fcmae
    from fcmae.training.run_folder import stored_model

    model, config = load_fcmae(options.source)
    if stored := stored_model(options.source):
        print(f"{stored.file}: FCMAE run, {stored.description}", file=sys.stderr)
    model = model.to(best_device())
    images, unreadable = open_images(options, config.model.in_chans)
    taken: set[Path] = set()
    with blame("--mask-ratios"):
        for outcome in reconstruct_images(model, images, config=config, mask_ratios=options.mask_ratios):
            options.output.mkdir(parents=True, exist_ok=True)
            path = free_path(options.output, outcome.path.stem, taken)
            Image.fromarray(outcome.picture).save(path)
            (height, width), (new_height, new_width) = outcome.before, outcome.after
            print(f"{path}  resized from {width} x {height} to {new_width} x {new_height}")
    return 2 if unreadable else 0
