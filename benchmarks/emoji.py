"""A data set for segmentation with exact masks: emoji laid onto photographs, their alpha channel the truth.

    npm pack emoji-datasource-google@16.0.0    # Apache-2.0, 74 MB; unpack it outside of the repository
    python benchmarks/emoji.py prepare PACKAGE data/emoji

Run from the root of the repository. Backgrounds are random crops of real photographs, those in docs/photos unless
others are named; what is to be found in them is drawn. The classes are the background and the nine groups of
emoji, all drawn equally often, or with --one-class the background and any emoji. The splits are train, val to
choose settings by, and test. No emoji is in two of them, nor is one of its skin tones, nor a photograph; but those
of one group resemble each other (clocks, flags, the same person in several trades). The same arguments make the
same files.

It writes `images.npy`, `masks.npy` and `classes.txt` for each split, which data.name=arrays reads, and
`samples.png`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from fcmae.data import derive_seed, save_arrays
from fcmae.data.masks import save_masks
from fcmae.segment_pictures import draw_segmentations
from fcmae.visualize import write_picture

Thing = TypeVar("Thing")

BACKGROUND = "background"
LEFT_OUT = "Component"
"""A group of five skin tones, which are nothing by themselves."""

HELD_OUT = {"val": 0.1, "test": 0.2}
"""Shares of the emoji of each group, and of the photographs."""

PHOTOS = (".jpg", ".jpeg", ".png")

EMOJI_SIDES = 0.3, 0.75
"""Of an emoji, least and most, in sides of the image."""

MOST_EMOJI = 4
LARGEST_ANGLE = 30
"""Degrees by which an emoji is turned to either side, at most."""

CROP_SIDES = 0.25, 1.0
"""Of the crop of a photograph, in its short side."""


class Emoji(NamedTuple):
    """One emoji, all of its skin tones."""

    label: int
    pictures: tuple[Image.Image, ...]
    """RGBA."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Emoji on photographs, for segmentation.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="write images and masks as arrays")
    prepare.add_argument("package", type=Path, help="the unpacked npm package emoji-datasource-google")
    prepare.add_argument("output", type=Path, help="the folder to write")
    prepare.add_argument("--photos", type=Path, nargs="+", default=[Path("docs/photos")], metavar="FOLDER")
    prepare.add_argument("--size", type=int, default=96, help="pixels of an image's side")
    prepare.add_argument("--train", type=int, default=20_000, metavar="N", help="images to train on")
    prepare.add_argument("--val", type=int, default=2_000, metavar="N", help="images to choose settings by")
    prepare.add_argument("--test", type=int, default=2_000, metavar="N", help="images to evaluate on")
    prepare.add_argument("--one-class", action="store_true", help="all emoji are one class")
    prepare.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def read_emoji(package: Path) -> tuple[list[Emoji], tuple[str, ...]]:
    """Read the package: all emoji, and the names of the classes, the background's first.

    Raises:
        SystemExit: if it is not there.
    """
    try:
        entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SystemExit(f"error: {package}: holds no emoji.json; unpack emoji-datasource-google there") from error
    groups = sorted({entry["category"] for entry in entries} - {LEFT_OUT})
    found: list[Emoji] = []
    for entry in entries:
        tones = [entry, *entry.get("skin_variations", {}).values()]
        paths = [package / "img/google/64" / tone["image"] for tone in tones if tone["has_img_google"]]
        if entry["category"] != LEFT_OUT and paths:
            pictures = tuple(Image.open(path).convert("RGBA") for path in paths)
            found.append(Emoji(1 + groups.index(entry["category"]), pictures))
    return found, (BACKGROUND, *groups)


def read_photos(folders: Sequence[Path]) -> list[Image.Image]:
    """Read the photographs in some folders, in the order of their names, as a person sees them; each once.

    Raises:
        SystemExit: if there are none.
    """
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in PHOTOS)
    different = {path.read_bytes(): path for path in reversed(paths)}.values()
    if len(different) <= len(HELD_OUT):
        raise SystemExit(f"error: {' '.join(map(str, folders))}: fewer than three photographs, one for each split")
    return [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in sorted(different)]


def split_up(number: int, seed: int) -> dict[str, list[int]]:
    """Return the indices of each split, at least one where there are enough, drawn by the seed."""
    order = np.random.default_rng(seed).permutation(number).tolist()
    splits: dict[str, list[int]] = {}
    for split, share in HELD_OUT.items():
        held_out = max(1, round(share * number))
        splits[split], order = sorted(order[:held_out]), order[held_out:]
    return {"train": sorted(order)} | splits


def pick(things: Sequence[Thing], rng: np.random.Generator) -> Thing:
    """Draw one of several things."""
    return things[int(rng.integers(len(things)))]


def compose(
    photos: Sequence[Image.Image], groups: Sequence[Sequence[Emoji]], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Lay one to `MOST_EMOJI` emoji onto a crop of a photograph: uint8 (size, size, 3) and classes (size, size).

    A pixel is of the uppermost emoji that covers half of it or more.
    """
    photo = pick(photos, rng)
    side = max(1, round(min(photo.size) * rng.uniform(*CROP_SIDES)))
    left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
    canvas = photo.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    classes = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(1, MOST_EMOJI + 1)):
        emoji = pick(pick(groups, rng), rng)
        picture = pick(emoji.pictures, rng)
        wide = round(size * rng.uniform(*EMOJI_SIDES))
        picture = picture.resize((wide, wide), Image.Resampling.BICUBIC)
        angle = rng.uniform(-LARGEST_ANGLE, LARGEST_ANGLE)
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        place = [int(rng.integers(-wide // 4, size - 3 * wide // 4 + 1)) for _ in range(2)]
        layer = Image.new("RGBA", (size, size))
        layer.paste(picture, (place[0], place[1]))
        canvas.paste(layer, mask=layer)
        classes[np.asarray(layer)[..., 3] >= 128] = emoji.label
    return np.asarray(canvas), classes


def prepare(args: argparse.Namespace) -> None:
    """Write all splits."""
    emoji, names = read_emoji(args.package)
    photos = read_photos(args.photos)
    groups = [[one for one in emoji if one.label == label] for label in range(1, len(names))]
    emoji_splits = [split_up(len(group), derive_seed(args.seed, label)) for label, group in enumerate(groups)]
    photo_splits = split_up(len(photos), derive_seed(args.seed))
    for number, (split, chosen) in enumerate(photo_splits.items()):
        own_photos = [photos[i] for i in chosen]
        own = [[group[i] for i in splits[split]] for group, splits in zip(groups, emoji_splits, strict=True)]
        total: int = getattr(args, split)
        images = np.empty((total, args.size, args.size, 3), np.uint8)
        masks = np.empty((total, args.size, args.size), np.uint8)
        for index in range(total):
            rng = np.random.default_rng(derive_seed(args.seed, number, index))
            images[index], masks[index] = compose(own_photos, own, args.size, rng)
        if args.one_class:
            masks, names = np.minimum(masks, 1), (BACKGROUND, "emoji")
        path = save_arrays(args.output / split, images)
        save_masks(args.output / split, masks, names)
        print(f"{path}: {total:,} images, {sum(map(len, own)):,} emoji on {len(own_photos)} photographs")
        for name, share in zip(names, np.bincount(masks.ravel(), minlength=len(names)) / masks.size, strict=True):
            print(f"  {name:20}{share:7.1%} of the pixels")
        if split == "train":
            truth = torch.from_numpy(masks[:6].astype(np.int16))
            shown = torch.from_numpy(images[:6]).permute(0, 3, 1, 2)
            picture = draw_segmentations(shown, truth=truth, class_names=names)
            write_picture(args.output / "samples.png", picture)


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.command == "prepare":
        prepare(args)


if __name__ == "__main__":
    main()
