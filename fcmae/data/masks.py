"""Images with their segmentation masks, paired by name or row, read in parts; knows no views or networks.

A mask is an image of whole numbers, the class of each pixel, as many pixels as its image has. What is read of it is
int16 (h, w): classes from 0 on, `NOT_COUNTED` where a pixel has the value to be ignored. Classes are the values in
order without that one: with 255 ignored they are the values 0 to 254, with 0 ignored the value 1 is class 0.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fcmae.data.arrays import IMAGES
from fcmae.data.batches import NOT_COUNTED
from fcmae.data.deep import Box
from fcmae.data.images import (
    MAX_PIXELS,
    TURNS,
    UPRIGHT,
    ImageSource,
    extensions,
    open_file,
    pillow_turn,
    refuse_pages,
)
from fcmae.data.labels import CLASSES, check_class_names, read_class_names, write_labels
from fcmae.data.listing import FolderFiles, images_below
from fcmae.data.names import natural_key
from fcmae.data.npy import read_header, write_array
from fcmae.data.pixels import AS_STORED, Reading
from fcmae.data.sampling import spread
from fcmae.data.sources import Source, find_split, open_source
from fcmae.data.views import Part
from fcmae.errors import UserError, brief
from fcmae.files import BoundedFile, SharedFile
from fcmae.seeding import derive_seed

MASKS = "masks.npy"
"""Beside `images.npy`: whole numbers (n, h, w)."""

IMAGE_FOLDER, MASK_FOLDER = "images", "masks"
"""In a split's folder."""

IGNORED = 255
"""The value that says "no class" where nothing else is said, as in most data sets."""

MOST_CLASSES = 1 << 15
"""Classes are int16."""

LOOKED_AT = 1000
"""Masks, spread over all, whose classes are counted before anything is trained."""

SHOWN = 5
"""Names, colours or classes in a message, at most."""


def shorten(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


# One mask


class Mask(NamedTuple):
    """A mask that is open."""

    height: int
    width: int
    read: Callable[[Box], np.ndarray]
    """Returns the values in a box as they are stored: whole numbers (h, w)."""


def as_classes(values: np.ndarray, ignored: int | None) -> np.ndarray:
    """Turn a mask's values into classes, int16, `NOT_COUNTED` for the ignored value.

    Raises:
        ValueError: if they are not whole numbers from 0 on, or too large.
    """
    with np.errstate(invalid="ignore"):  # of NaN, which is refused in the next line
        whole = values.astype(np.int32)
    if (whole != values).any():
        raise ValueError(f"{values[whole != values][0]} in place of a class number")
    counted = np.ones(whole.shape, bool) if ignored is None else whole != ignored
    beyond = counted & ((whole < 0) | (whole >= MOST_CLASSES))
    if beyond.any():
        raise ValueError(f"{whole[beyond][0]} in place of a class number, from 0 to {MOST_CLASSES - 1:,}")
    above = 0 if ignored is None or ignored < 0 else whole > ignored
    return np.where(counted, whole - above, NOT_COUNTED).astype(np.int16)


def as_values(classes: np.ndarray, ignored: int | None) -> np.ndarray:
    """Turn classes (h, w) into the values of a mask, uint8 where they fit, else uint16: back from `as_classes`.

    Raises:
        ValueError: if there are pixels without a class, and no value for them.
    """
    if (classes < 0).any() and (ignored is None or ignored < 0):
        raise ValueError("pixels without a class, and no value that says so")
    values = classes.astype(np.int32)
    if ignored is not None and ignored >= 0:
        values = np.where(classes < 0, ignored, values + (values >= ignored))
    return values.astype(np.uint8 if values.max(initial=0) < 256 else np.uint16)


def _refuse_colours(image: Image.Image) -> None:
    """Raise an error for a mask that is a picture: which class a colour is, the file does not say.

    Raises:
        ValueError: if it has colours that are no palette's, or is compressed with loss.
    """
    if image.format in ("JPEG", "MPO"):
        raise ValueError("a JPEG, which changes class numbers; save masks as PNG")
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        counted = image.convert("RGB").getcolors(image.width * image.height)
        colours = [colour for _, colour in sorted(counted or (), reverse=True)]
        raise ValueError(
            f"an image of mode {image.mode} with {len(colours)} colours ({shorten(colours)}) in place of class "
            "numbers; save masks as gray or palette PNG, whose values are the classes"
        )


def open_mask(file: IO[bytes]) -> Mask:
    """Open a mask of any type that images have, as a person sees it: of a palette the indices, never the colours.

    Raises:
        Exception: whatever libraries raise for a damaged one; ValueError says that it is no mask.
    """
    opened = open_file(file)
    if isinstance(opened, Image.Image):
        refuse_pages(opened)
        _refuse_colours(opened)
        turn = pillow_turn(opened)
        values = turn(np.asarray(opened)[..., None])[..., 0]
        return Mask(*values.shape, read=lambda box: _crop(values, box))
    if opened.bands != 1:
        raise ValueError(f"{opened.bands} bands in place of one of class numbers")
    if opened.height * opened.width > MAX_PIXELS:
        raise ValueError(f"{opened.width:,} x {opened.height:,} pixels, over {MAX_PIXELS:,}; cut it into tiles")
    turn = TURNS.get(opened.orientation, UPRIGHT)
    seen = turn.size(opened.height, opened.width)

    def read(box: Box) -> np.ndarray:
        return turn(opened.read(turn.stored(Part(*box, box[2:]), seen)[:4]))[..., 0]

    return Mask(*seen, read)


def _crop(values: np.ndarray, box: Box) -> np.ndarray:
    top, left, height, width = box
    return values[top : top + height, left : left + width]


# Many


class Masks(Protocol):
    """Masks by index."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """Return what a person would look for."""
        ...

    def open(self, index: int, /) -> AbstractContextManager[Mask]:
        """Open a mask, in a `with` statement."""
        ...


class MaskFiles:
    """Masks in files of their own."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    @contextmanager
    def open(self, index: int) -> Iterator[Mask]:
        with BoundedFile(self.names[index]) as file:
            yield open_mask(file)


class MaskArray:
    """`FOLDER/masks.npy`: whole numbers (n, h, w), of which no more rows are read than are seen.

    Raises:
        UserError: if it is missing or damaged, or holds anything else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MASKS
        header = read_header(self.path)
        shape = header.shape[:3] if header.shape[3:] == (1,) else header.shape
        if header.dtype.kind not in "iu" or len(shape) != 3 or 0 in shape or header.fortran_order:
            raise UserError(
                f"{self.path}: expected class numbers, whole ones (n, h, w) in C order, found {header.dtype} "
                f"{header.shape}; fcmae.data.save_masks writes them"
            )
        self.stored, self.start, self.shape = header.dtype, header.start, shape
        self.file = SharedFile(self.path)

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, index: int) -> str:
        return f"{self.path}[{index}]"

    @contextmanager
    def open(self, index: int) -> Iterator[Mask]:
        _, full_height, full_width = self.shape
        row = full_width * self.stored.itemsize

        def read(box: Box) -> np.ndarray:
            top, left, height, width = box
            content = self.file.read(self.start + (index * full_height + top) * row, height * row)
            return np.frombuffer(content, self.stored).reshape(height, full_width)[:, left : left + width]

        yield Mask(full_height, full_width, read)


def save_masks(folder: str | Path, masks: np.ndarray, class_names: Sequence[str] | None = None) -> Path:
    """Write masks, class numbers (n, h, w), as `folder/masks.npy` beside `save_arrays`' images; returns its path.

    Class names go into `classes.txt` beside it.

    Raises:
        ValueError: if shapes, types or names do not fit.
    """
    if masks.dtype.kind not in "iu" or masks.ndim != 3:
        raise ValueError(f"masks must be whole numbers (n, h, w), got {masks.dtype} {masks.shape}")
    check_class_names(class_names or ())
    path = Path(folder, MASKS)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_array(path, masks)
    write_labels(path.parent, None, class_names)
    return path


# Pairs


ChoosePart = Callable[[int, int, Callable[[Box], Tensor]], Part]
"""Takes height, width, and what reads the classes in a box; returns the part that is wanted."""


class Pair(NamedTuple):
    """An image, or a part of one, and its classes."""

    pixels: Tensor
    """(c, h, w), maybe less than the part's resolution, see `Source.load_part`."""
    classes: Tensor
    """int16 (h, w), in the part's full resolution; `NOT_COUNTED` where there is none."""
    part: Part


class SegmentationSource:
    """Images and their masks by index, in parts.

    Args:
        images: the images.
        masks: theirs, in the same order.
        class_names: by class.
        ignored: the value of masks that is no class; None for none.
        rows: of images and masks that this source has; None for all.
    """

    def __init__(
        self,
        images: Source,
        masks: Masks,
        *,
        class_names: Sequence[str],
        ignored: int | None,
        rows: np.ndarray | None = None,
    ) -> None:
        self.images, self.masks, self.ignored = images, masks, ignored
        self.class_names = tuple(class_names)
        self.rows = np.arange(len(masks)) if rows is None else rows
        self.channels, self.dtype, self.place = images.channels, images.dtype, images.place

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int) -> Pair:
        """Return image `index` and its classes; raises whatever decoding raises."""
        return self.load_part(index, lambda height, width, _: Part(0, 0, height, width, (height, width)))

    def load_part(self, index: int, choose: ChoosePart) -> Pair:
        """Return the part of image `index` and of its mask that `choose` takes.

        Raises:
            ValueError: if the mask is of another size, or has a class that there is not.
            Exception: whatever decoding raises.
        """
        row = int(self.rows[index])
        with self.masks.open(row) as mask:
            sides = mask.height, mask.width

            def read(box: Box) -> Tensor:
                classes = as_classes(mask.read(box), self.ignored)
                if classes.max(initial=NOT_COUNTED) >= self.num_classes:
                    raise ValueError(f"{self.masks.name(row)}: {self._beyond(classes.max())}")
                return torch.from_numpy(classes)

            part = choose(*sides, read)
            classes = read(part[:4])

        def same_part(height: int, width: int) -> Part:
            if (height, width) != sides:
                raise ValueError(
                    f"{width} x {height} pixels, but its mask {self.masks.name(row)} has {sides[1]} x {sides[0]}; "
                    "save both in one size, turned alike"
                )
            return part

        return Pair(self.images.load_part(row, same_part), classes, part)

    def _beyond(self, found: int) -> str:
        return f"class {found}, but there are {self.num_classes}, counted from 0"

    def describe(self, index: int) -> str:
        return self.images.describe(int(self.rows[index]))

    def share(self, fraction: float, seed: int) -> "SegmentationSource":
        """Return `fraction` of the images, at least one; those of a smaller fraction are among them."""
        if fraction == 1:
            return self
        order = np.random.default_rng(derive_seed(seed)).permutation(self.rows)
        rows = np.sort(order[: max(1, round(fraction * len(order)))])
        names = self.class_names
        return SegmentationSource(self.images, self.masks, class_names=names, ignored=self.ignored, rows=rows)

    def class_pixels(self) -> np.ndarray:
        """Count the pixels of each class, int64 (num_classes,), in up to `LOOKED_AT` masks, spread over all."""
        return count_pixels(self.masks, self.ignored, rows=self.rows).of(self.num_classes)


def _by_name(root: str, files: Sequence[str], what: str) -> dict[str, str]:
    """Return files by their names below `root` without the ends.

    Raises:
        UserError: if two differ in their ends alone.
    """
    found: dict[str, str] = {}
    for file in files:
        name = os.path.splitext(os.path.relpath(file, root))[0]
        if name in found:
            raise UserError(f"{what}: {found[name]} and {file} have one name; remove or rename one of them")
        found[name] = file
    return found


def pair_files(image_root: str, images: Sequence[str], mask_root: str, what: str) -> MaskFiles:
    """Return the mask of each image file: the file of the same name below `mask_root`, with any end.

    Raises:
        UserError: if there are images without masks, or masks without images.
    """
    image_of = _by_name(image_root, images, what)
    mask_of = _by_name(mask_root, sorted(images_below(mask_root, extensions()), key=natural_key), what)
    if not mask_of:
        raise UserError(f"{what}: no masks in {mask_root}; each image needs one of its name there")
    lacking: Mapping[str, list[str]] = {
        "images without a mask": [file for name, file in image_of.items() if name not in mask_of],
        "masks without an image": [file for name, file in mask_of.items() if name not in image_of],
    }
    if any(lacking.values()):
        found = "; ".join(f"{len(files):,} {of}, the first {files[0]}" for of, files in lacking.items() if files)
        raise UserError(f"{what}: {found}; image and mask have one name in {image_root} and {mask_root}")
    return MaskFiles([mask_of[name] for name in image_of])


class Counted(NamedTuple):
    """What masks hold, by those that were looked at."""

    pixels: np.ndarray
    """int64, of each class."""
    highest: dict[int, int]
    """The highest class of each mask, by index; -1 in one without classes."""
    complete: bool
    """Whether all masks were looked at."""

    def of(self, num_classes: int) -> np.ndarray:
        """Return the pixels of each of so many classes, int64 (num_classes,)."""
        return np.pad(self.pixels[:num_classes], (0, max(0, num_classes - len(self.pixels))))


def count_pixels(
    masks: Masks, ignored: int | None, most: int = LOOKED_AT, rows: np.ndarray | None = None
) -> Counted:
    """Count the pixels of each class in up to `most` masks, spread over all, or over those in `rows`.

    Masks that cannot be read are left to training, which names them, unless none can.

    Raises:
        ValueError: naming the first mask, if none can be read.
    """

    def count(index: int) -> np.ndarray:
        with masks.open(index) as mask:
            classes = as_classes(mask.read((0, 0, mask.height, mask.width)), ignored)
        return np.bincount(classes[classes >= 0])

    rows = np.arange(len(masks)) if rows is None else rows
    indices = [int(rows[i]) for i in spread(len(rows), most)]
    counts: dict[int, np.ndarray] = {}
    errors: dict[int, Exception] = {}
    with ThreadPoolExecutor() as pool:
        for index, found in [(index, pool.submit(count, index)) for index in indices]:
            try:
                counts[index] = found.result()
            except Exception as error:  # a broken file can make a decoder raise anything
                errors[index] = error
    if not counts:
        index, error = next(iter(errors.items()))
        raise ValueError(f"no mask can be read, the first {masks.name(index)}: {brief(error)}")
    pixels = np.zeros(max(map(len, counts.values())), np.int64)
    for found in counts.values():
        pixels[: len(found)] += found
    return Counted(pixels, {i: len(found) - 1 for i, found in counts.items()}, len(counts) == len(masks))


def name_classes(masks: Masks, counted: Counted, names: Sequence[str] | int | None, what: str) -> tuple[str, ...]:
    """Return the names of the classes that masks have.

    Args:
        masks: the masks.
        counted: what they hold.
        names: of the classes, or how many there are; None for as many as there are in the masks.
        what: how messages name the masks, such as "data.root=pets, split train".

    Raises:
        UserError: if a mask has a class that there is not.
    """
    found = len(counted.pixels)
    number = names if isinstance(names, int) else found if names is None else len(names)
    if found > number:
        index = next(index for index, highest in counted.highest.items() if highest >= number)
        raise UserError(
            f"{what}: {masks.name(index)} has class {counted.highest[index]}, but there are {number}, counted from "
            "0; name each class in classes.txt, or set data.ignore_index to the value that is none"
        )
    return tuple(names) if isinstance(names, Sequence) else tuple(map(str, range(number)))


def require_every_class(counted: Counted, names: Sequence[str], ignored: int | None, what: str) -> None:
    """Check that each class occurs in the masks, as far as those that were looked at can tell.

    Raises:
        UserError: if one does not, or there is but one.
    """
    if len(names) < 2:
        hint = f", and {ignored}, which is no class: write 1 in its place if it is one" if ignored else ""
        raise UserError(f"{what}: masks of class 0 alone{hint}; there are at least two classes to tell apart")
    absent = [f"{label} ({name})" if name != str(label) else name for label, name in enumerate(names)]
    absent = [shown for shown, number in zip(absent, counted.of(len(names)), strict=True) if not number]
    if absent and counted.complete:
        raise UserError(
            f"{what}: {len(absent)} of {len(names)} classes never occur: {shorten(absent)}; number the classes of "
            "masks and classes.txt without them, or add masks that have them"
        )


def _find_names(folders: Sequence[Path]) -> tuple[str, ...] | None:
    """Return the class names in the first of the folders that has them."""
    return next((read_class_names(folder / CLASSES) for folder in folders if (folder / CLASSES).is_file()), None)


def open_segmentation(
    name: str,
    root: str,
    split: str,
    in_chans: int | None,
    *,
    mask_root: str | None = None,
    ignored: int | None = IGNORED,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    whole_root: bool = False,
    reading: Reading = AS_STORED,
    key: str = "data.root",
    remedy: str = "name one that is there with data.split=NAME, or all there is with data.split=.",
    mask_key: str = "data.mask_root",
) -> SegmentationSource:
    """Open images and their masks: `ROOT/SPLIT/images` and `ROOT/SPLIT/masks`, or arrays in `ROOT/SPLIT`.

    Args:
        name: "folder", for files, or "arrays", for `images.npy` and `masks.npy`.
        root: the folder of all splits.
        split: its folder in `root`, see `open_source`.
        in_chans: channels that the model wants; None for as many as arrays have, and 3 of image files.
        mask_root: a folder with the masks of all splits; `root` then has nothing but images. None for the above.
        ignored: the value of masks that is no class; None for none.
        num_classes: how many there are; None for as many as are named or, without names, found.
        class_names: those of training, to evaluate by; None to train: then each class must occur.
        whole_root: whether `root` may be the folder of any split.
        reading: what becomes of the images' pixels.
        key: that names `root`, for messages.
        remedy: for the message where the split is not there.
        mask_key: that names `mask_root`, for messages.

    Class names are read from `classes.txt` in the split's folder, that of the masks, or `root`.

    Raises:
        UserError: if nothing is there, images or masks are missing, or their classes do not fit.
    """
    what = f"{key}={root}, split {split}"
    if name not in ("folder", "", "arrays"):
        raise UserError(f"data.name={name}: images with masks are of data.name=folder or arrays")
    arrays = name == "arrays"
    if not os.path.isdir(root):
        raise UserError(f"{key}={root}: no such folder; name one with images and masks in it")
    place = find_split(root, split, arrays=arrays, whole_root=whole_root, what=f"{key}={root}", remedy=remedy)
    if arrays:
        if not os.path.isfile(os.path.join(place, IMAGES)):
            raise UserError(f"{what}: no {IMAGES} in {place}; fcmae.data.save_arrays writes it")
        images = open_source(name, place, ".", in_chans, reading=reading, key=key)
        masks: Masks = MaskArray(Path(place))
        if len(masks) != len(images):
            raise UserError(f"{masks.name(0)[:-3]}: {len(masks)} masks for the {len(images)} images beside it")
        mask_place = place
    else:
        image_place, mask_place = os.path.join(place, IMAGE_FOLDER), os.path.join(place, MASK_FOLDER)
        if mask_root is not None:
            if not os.path.isdir(mask_root):
                raise UserError(
                    f"{mask_key}={mask_root}: no such folder; name the one with the masks of all splits"
                )
            own = {"arrays": False, "whole_root": whole_root, "remedy": remedy}
            image_place, mask_place = place, find_split(mask_root, split, what=f"{mask_key}={mask_root}", **own)
        for folder in (image_place, mask_place):
            if not os.path.isdir(folder):
                raise UserError(
                    f"{what}: no folder {folder}; images go into {IMAGE_FOLDER}/ and masks into {MASK_FOLDER}/ in "
                    f"the split's folder, or name the masks' own with data.mask_root"
                )
        images = open_source("folder", image_place, ".", in_chans, reading=reading, key=key)
        assert isinstance(images, ImageSource)
        assert isinstance(images.files, FolderFiles)
        names = [images.files.name(index) for index in range(len(images))]
        masks = pair_files(image_place, names, mask_place, what)
    named = class_names or _find_names([Path(place), Path(mask_place), Path(root)])
    if named is not None and num_classes not in (None, len(named)):
        raise UserError(f"model.num_classes={num_classes}: {what} names {len(named)} classes; null takes these")
    try:
        counted = count_pixels(masks, ignored)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    names = name_classes(masks, counted, named or num_classes, what)
    if class_names is None:
        require_every_class(counted, names, ignored, what)
    return SegmentationSource(images, masks, class_names=names, ignored=ignored)
