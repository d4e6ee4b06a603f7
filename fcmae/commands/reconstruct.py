"""`fcmae reconstruct`: pictures of what a pretrained model predicts where images are masked, written as PNG."""

import argparse
import sys
from pathlib import Path

from fcmae.commands.arguments import add_images, command_parser, list_images, open_images, plan_files
from fcmae.errors import blame, one_line
from fcmae.files import require_folder


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
    parser.add_argument("--overwrite", action="store_true", help="replace IMAGE.png in DIR (default: refuse)")
    return parser


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    require_folder(options.output, f"--output {options.output}", inputs=options.images)

    from fcmae.evaluation.inference import best_device, reconstruct_images
    from fcmae.load import load_fcmae
    from fcmae.training.run_folder import stored_model
    from fcmae.visualize import write_picture

    files = [image._replace(place=Path(image.path.name)) for image in list_images(options.images)]
    planned = plan_files(options.output, files, [".png"], overwrite=options.overwrite)
    options.images = [image.path for image in files]
    model, config = load_fcmae(options.source)
    if stored := stored_model(options.source):
        print(f"{stored.file}: FCMAE run, {stored.description}", file=sys.stderr)
    model = model.to(best_device())
    images, unreadable = open_images(options, config.model.in_chans, config.data)
    places = zip(options.images, planned, strict=True)
    with blame("--mask-ratios"):
        for outcome in reconstruct_images(model, images, config=config, mask_ratios=options.mask_ratios):
            (path,) = next(paths for image, paths in places if image == outcome.path)  # some do not decode
            options.output.mkdir(parents=True, exist_ok=True)
            write_picture(path, outcome.picture)
            (height, width), (new_height, new_width) = outcome.before, outcome.after
            print(f"{one_line(str(path))}  resized from {width} x {height} to {new_width} x {new_height}")
    return 2 if unreadable else 0
