"""`fcmae reconstruct`: pictures of what a pretrained model predicts where images are masked, written as PNG."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fcmae.commands.arguments import add_images, command_parser, open_images
from fcmae.errors import blame, one_line
from fcmae.files import require_distinct, require_folder, require_free


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


def plan_pictures(folder: Path, images: Sequence[Path], *, overwrite: bool) -> list[Path]:
    """Return where the picture of each image goes: FOLDER/STEM.png, or STEM-2.png and so on of others of that name.

    Raises:
        UserError: if a file is there already and may not be replaced, or is one of the images.
    """
    numbers: Counter[str] = Counter()
    pictures: dict[Path, None] = {}
    for image in images:
        path = folder / f"{image.stem}.png"
        while path in pictures:
            numbers[image.stem] += 1
            path = folder / f"{image.stem}-{numbers[image.stem] + 1}.png"
        require_free(path, overwrite=overwrite)
        pictures[path] = None
    require_distinct(pictures, images)
    return list(pictures)


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    require_folder(options.output, f"--output {options.output}", inputs=options.images)

    from fcmae.evaluation.inference import best_device, image_files, reconstruct_images
    from fcmae.load import load_fcmae
    from fcmae.training.run_folder import stored_model
    from fcmae.visualize import write_picture

    options.images = [file for path in map(Path, options.images) for file in image_files(path) or [path]]
    pictures = plan_pictures(options.output, options.images, overwrite=options.overwrite)
    model, config = load_fcmae(options.source)
    if stored := stored_model(options.source):
        print(f"{stored.file}: FCMAE run, {stored.description}", file=sys.stderr)
    model = model.to(best_device())
    images, unreadable = open_images(options, config.model.in_chans, config.data)
    places = zip(options.images, pictures, strict=True)
    with blame("--mask-ratios"):
        for outcome in reconstruct_images(model, images, config=config, mask_ratios=options.mask_ratios):
            path = next(path for image, path in places if image == outcome.path)  # others before it do not decode
            options.output.mkdir(parents=True, exist_ok=True)
            write_picture(path, outcome.picture)
            (height, width), (new_height, new_width) = outcome.before, outcome.after
            print(f"{one_line(str(path))}  resized from {width} x {height} to {new_width} x {new_height}")
    return 2 if unreadable else 0
