"""What several commands share: how help looks, which weights are meant, which images; computes nothing."""

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fcmae import arguments
from fcmae.errors import UserError, one_line, shown
from fcmae.files import require_distinct, require_folder, require_free

if TYPE_CHECKING:
    from fcmae.config import DataSection
    from fcmae.evaluation.inference import Picture, Unreadable
    from fcmae.weights.base import Preprocessing, Weights


def command_parser(name: str, description: str, *, examples: str, notes: str = "") -> argparse.ArgumentParser:
    """Return the parser of `fcmae NAME`, whose help ends with example command lines and notes."""
    return arguments.command_parser(f"fcmae {name}", description, examples=examples, notes=notes)


def require_bounds(options: argparse.Namespace, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Check that options, where they are given, lie between least and most of `bounds`, by name.

    Raises:
        UserError: naming the option.
    """
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise UserError(f"--{name.replace('_', '-')} {shown(value)}: must be {limit}")


def require_empty(out: Path, *, overwrite: bool, inputs: list[str]) -> None:
    """Check that --output is a folder apart from `inputs`, and new or empty unless with --overwrite.

    Raises:
        UserError: if it is not.
    """
    require_folder(out, f"--output {out}", inputs=inputs)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"--output {out}: not empty; name another folder, or add --overwrite")


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE, and which of a run's weights are meant; `load_source` reads them."""
    arguments.add_path(
        parser,
        "source",
        metavar="SOURCE",
        type=Path,
        help="a run, checkpoint or exported folder, or any file of weights",
    )
    parser.add_argument(
        "--last", action="store_true", help="of a run, take the newest checkpoint (default: the best, where known)"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--ema", action="store_const", const=True, help="take the EMA weights (default: where the run has them)"
    )
    kind.add_argument(
        "--raw", action="store_const", const=False, dest="ema", help="take the raw weights, not the EMA"
    )


def load_source(options: argparse.Namespace) -> "Weights":
    """Read the weights that the arguments of `add_source` mean."""
    from fcmae.load import load_weights

    return load_weights(options.source, last=options.last, ema=options.ema)


def report_source(weights: "Weights") -> None:
    """Print which weights were taken, and what had to be assumed of them."""
    print(f"{weights.path}: {weights.description}, {weights.network_name}", file=sys.stderr)
    unknown = [name for name in ("mean", "std", "image_size") if getattr(weights.preprocessing, name) is None]
    if unknown:
        print(
            f"{weights.path}: does not say {', '.join(unknown)}: assumed to be ImageNet's at 224 px, "
            "as for the released weights",
            file=sys.stderr,
        )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add IMAGES; `open_images` reads them."""
    arguments.add_path(
        parser, "images", metavar="IMAGES", nargs="+", help="image files, or folders of them, at any depth"
    )


class ImageFile(NamedTuple):
    """One of the IMAGES."""

    path: Path
    place: Path
    """From the folder that was named, or its name alone."""


def list_images(paths: Iterable[str | Path]) -> list[ImageFile]:
    """Return the image files that paths mean, those of a folder at any depth; a path without any stays as it is."""
    from fcmae.evaluation.inference import image_files

    return [
        ImageFile(file, file.relative_to(path) if file != path else Path(path.name))
        for path in map(Path, paths)
        for file in image_files(path) or [path]
    ]


def plan_files(
    folder: Path, images: Sequence[ImageFile], endings: Sequence[str], *, overwrite: bool
) -> list[list[Path]]:
    """Return where what is made of each image goes: FOLDER/PLACE and, in place of its end, each of the endings.

    Of several that would have the same name, in any case of letters, the second gets NAME-2, and so on.

    Raises:
        UserError: if a file is there already and may not be replaced, or is one of the images.
    """
    numbers: Counter[str] = Counter()
    taken: set[str] = set()
    planned: list[list[Path]] = []
    for _, place in images:
        stem = str(folder / place.parent / place.stem)
        for number in itertools.count(numbers[stem.casefold()] + 1):
            files = [Path(f"{stem}{f'-{number}' if number > 1 else ''}{ending}") for ending in endings]
            names = {str(file).casefold() for file in files}
            if not names & taken:
                break
        numbers[stem.casefold()] = number
        taken |= names
        planned.append(files)
    for file in itertools.chain(*planned):
        require_free(file, overwrite=overwrite)
    require_distinct(itertools.chain(*planned), [image.path for image in images])
    return planned


def open_images(
    options: argparse.Namespace, channels: int, use: "Preprocessing | DataSection"
) -> tuple[Iterator["Picture"], list["Unreadable"]]:
    """Return the images that can be read, one after the other, and a list that fills with those that cannot.

    Each of the latter is also printed as an error when its turn comes.

    Args:
        options: with the arguments of `add_images`.
        channels: that the network wants.
        use: says how the images were read that it was trained on.
    """
    from fcmae.data.pixels import Reading
    from fcmae.evaluation.inference import Unreadable, read_images

    unreadable: list[Unreadable] = []

    def readable() -> Iterator["Picture"]:
        for image in read_images(options.images, channels, Reading.of(use)):
            if isinstance(image, Unreadable):
                unreadable.append(image)
                print(f"error: {one_line(f'{image.path}: {image.reason}')}", file=sys.stderr)
            else:
                yield image

    return readable(), unreadable
