"""What a source of images is, and how the one that is asked for is opened; knows neither views nor batches."""

import os
from collections.abc import Callable, Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fcmae.data.arrays import IMAGES, ArraySource
from fcmae.data.hugging_face import ArrowFiles, holds_arrow
from fcmae.data.images import ImageSource, find_image, open_images
from fcmae.data.labels import Labelled
from fcmae.data.order import Shards
from fcmae.data.pixels import AS_STORED, Reading, holds, kind_name, kind_of
from fcmae.data.remote import is_url, join
from fcmae.data.shards import INDEX, PLAN, PreparedSource
from fcmae.data.tars import SHARDS, ShardFiles, ShardSource, holds_shards
from fcmae.data.views import Part
from fcmae.errors import UserError
from fcmae.seeding import derive_seed

STREAMED = ("hfids", "wds", "tfds")

SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test", "testing"))
"""Names of splits; those of a row stand for each other (timm's, and test)."""


VALIDATED = ("imagenet", "places365", "inaturalist", "inat")
"""Datasets of torchvision's that refuse splits which they do not have; others take any for the test images."""

FOLDERS = ("folder", "image_folder")
"""Names of torchvision's dataset of a folder."""


class Source(Labelled, Protocol):
    """Images by index; loading the same index twice gives the same image."""

    channels: int

    @property
    def place(self) -> Path | None:
        """The folder or file, resolved, that holds these images and no others; None with hfds/ and torch/."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of all pixels: uint8, uint16 or float32."""
        ...

    @property
    def shards(self) -> Shards | None:
        """How the images lie in shards, which are to be read one after the other; None where any order will do."""
        ...

    def __len__(self) -> int: ...

    def size(self, index: int, /) -> tuple[int, int]:
        """Return height and width of image `index` as it is loaded, decoding no pixels; raises as opening does."""
        ...

    def load(self, index: int, /) -> Tensor:
        """Return image `index` as pixels (c, h, w); raises whatever decoding raises."""
        ...

    def load_part(self, index: int, choose: Callable[[int, int], Part], /) -> Tensor:
        """Return the part of image `index` that `choose` takes, knowing height and width: pixels (c, h, w).

        Where fewer pixels are cheaper, it may have less than the image's resolution, but no less than asked for.
        """
        ...

    def describe(self, index: int, /) -> str:
        """Return what a person would look for: the file's name, or the row."""
        ...


def overlap(source: Source, other: Source) -> bool:
    """Whether two sources lie at the same place, or one's folder inside the other's."""
    a, b = source.place, other.place
    return a is not None and b is not None and (a.is_relative_to(b) or b.is_relative_to(a))


class Subset:
    """Some of the images of a source, in ascending order."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices
        self.place, self.dtype = source.place, source.dtype
        self.channels = source.channels
        self.shards = source.shards and source.shards.of_images(indices)
        self.labels = None if source.labels is None else source.labels[indices]
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def size(self, index: int) -> tuple[int, int]:
        return self.source.size(int(self.indices[index]))

    def load(self, index: int) -> Tensor:
        return self.source.load(int(self.indices[index]))

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        return self.source.load_part(int(self.indices[index]), choose)

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))


def share_of_each_class(source: Source, fraction: float, seed: int) -> Source:
    """Return `fraction` of the images of each class, at least one; those of a smaller fraction are among them."""
    assert source.labels is not None
    if fraction == 1.0:
        return source
    by_label = source.labels.argsort(kind="stable")
    labels, firsts = np.unique(source.labels[by_label], return_index=True)
    chosen: list[np.ndarray] = []
    for label, members in zip(labels, np.split(by_label, firsts[1:]), strict=True):
        order = np.random.default_rng(derive_seed(seed, int(label))).permutation(members)
        chosen.append(order[: max(1, round(fraction * len(members)))])
    return Subset(source, np.sort(np.concatenate(chosen)))


def _meant(given: str, known: Collection[str]) -> str:
    """Say which of the known names was meant, where one is like it."""
    close = get_close_matches(given.lower(), known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _holds_arrays(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in (IMAGES, INDEX, PLAN))


def holds_arrays(root: str, split: str) -> bool:
    """Whether the images of a split are arrays (of `fcmae prepare`, or images.npy) rather than image files."""
    folders = (root, *(os.path.join(root, name) for name in (split, *SYNONYMS[0])))
    return any(map(_holds_arrays, folders))


def find_split(root: str, split: str, *, arrays: bool, whole_root: bool, what: str, remedy: str) -> str:
    """Return the folder of a split: ROOT/SPLIT, under any of its names, or else ROOT.

    ROOT itself is the training images (or ".", or with `whole_root` any split) where arrays lie right in it, or no
    folder in it is named like a split, whose images would be among them.
    """
    holds_images = _holds_arrays if arrays else os.path.isdir
    synonyms = next((names for names in SYNONYMS if split in names), ())
    for name in (split, *synonyms):
        folder = root if name == "." else os.path.join(root, name)
        if holds_images(folder):
            return folder
    inside = sorted(os.listdir(root)) if os.path.isdir(root) else []
    named = inside if arrays else [name for name in inside if any(name.lower() in names for names in SYNONYMS)]
    found = [name for name in named if holds_images(os.path.join(root, name))]
    if (whole_root or split in (*SYNONYMS[0], ".")) and (holds_images(root) if arrays else not found):
        return root
    lacks = f"no split {split!r} in it"
    if arrays and not found and (image := Path(root) if os.path.isfile(root) else find_image(Path(root))):
        raise UserError(f"{what}: no arrays in it, but files such as {image}: data.name=folder reads such")
    if arrays:
        array = f"{split}/{IMAGES} (uint8, n x h x w x c, from save_arrays)"
        lacks = f"holds no {array}, and nothing that fcmae prepare wrote"
    meant = _meant(split, found or SYNONYMS[0])
    raise UserError(f"{what}: {lacks} (found: {', '.join(found) or 'none'}{meant}); {remedy}")


def find_shards(root: str, split: str, *, whole_root: bool, what: str, remedy: str) -> str | None:
    """Return the place of a split's shards, found as `find_split` finds folders; None for a folder without any."""
    root = root.removesuffix(f"/{SHARDS}")
    synonyms = next((names for names in SYNONYMS if split in names), ())
    for name in dict.fromkeys((split, *synonyms)):
        if holds_shards(place := root if name == "." else join(root, name)):
            return place
    if (whole_root or split in (*SYNONYMS[0], ".")) and holds_shards(root):
        return root
    inside = sorted(os.listdir(root)) if os.path.isdir(root) else []
    found = [name for name in inside if holds_shards(join(root, name))]
    if not (found or is_url(root)):
        return None
    there = f" (found: {', '.join(found)}{_meant(split, found)})" if found else ""
    raise UserError(f"{what}: no {join(split, SHARDS)}, of fcmae shard, in it{there}; {remedy}")


def open_source(
    name: str,
    root: str,
    split: str,
    in_chans: int | None,
    *,
    whole_root: bool = False,
    reading: Reading = AS_STORED,
    key: str = "data.root",
    remedy: str = "name one that is there with data.split=NAME, or all there is with data.split=.",
) -> Source:
    """Open the images that `data.name`, `data.root` and `data.split` name.

    Args:
        name: "folder" (or a .tar, shards or a dataset on disk as root), "arrays", or a map-style name of timm's
            `create_dataset`.
        root: the folder, tar file or cache folder, or the URL of shards.
        split: a folder of that name inside `root`, or "." for all of it; "train", too, where no split has a folder.
        in_chans: channels the model wants; None for as many as there are.
        whole_root: whether `root` may be the folder, or the tar file, of any split.
        reading: what becomes of the files' pixels.
        key: that names `root`, for messages.
        remedy: for the message where the split is not there.

    Raises:
        UserError: if nothing is there, the split is not, nothing in it is an image, or the channels do not fit.
    """
    what = f"{key}={root}"
    arrays = name == "arrays"
    prefix = name.partition("/")[0].lower() if "/" in name else ""
    if prefix in STREAMED:
        raise UserError(
            f"data.name={name}: streamed sets have no sample index, so masks and crops could not be repeated, nor "
            "an epoch gone on with; use hfds/NAME, which is downloaded once, a folder or .tar, or what fcmae shard "
            "wrote, which is read from elsewhere"
        )
    torch_name = name.split("/")[-1].lower() if prefix == "torch" else None
    if torch_name is not None and torch_name not in (*VALIDATED, *FOLDERS):
        known = [synonym for names in SYNONYMS for synonym in names]
        if split not in known:
            raise UserError(
                f"{what}: no split {split!r} of {name} (known: {', '.join(known)}{_meant(split, known)})"
            )
    if prefix in ("hfds", "torch") and torch_name not in FOLDERS:
        return open_images(name, root, split, in_chans, what, reading)
    if name not in ("folder", "", "arrays") and torch_name not in FOLDERS:
        raise UserError(f"data.name={name}: unknown; use folder, arrays, hfds/NAME or torch/NAME")
    if is_url(root) and (arrays or not {"?", "#"}.isdisjoint(root)):
        raise UserError(
            f"{what}: at a URL are shards, which fcmae shard wrote: name their folder, data.name=folder"
        )
    place = None if arrays else find_shards(root, split, whole_root=whole_root, what=what, remedy=remedy)
    if place is not None:
        return ShardSource(ShardFiles(place), in_chans, reading)
    if not os.path.exists(root):
        raise UserError(f"{what}: no such folder or file; name a folder with images in it")
    place = find_split(root, split, arrays=arrays, whole_root=whole_root, what=what, remedy=remedy)
    if not arrays and holds_arrow(place):
        return ImageSource(ArrowFiles(place), in_chans, Path(place).resolve(), reading)
    if not arrays:
        return open_images(name, place, None, in_chans, what, reading)
    folder = Path(place)
    plain = (folder / IMAGES).is_file() and not (folder / INDEX).is_file()
    source = ArraySource(folder, reading) if plain else PreparedSource(folder, reading)
    if in_chans is not None and source.channels != in_chans:
        raise UserError(f"{folder}: images have {source.channels} channels, but model.in_chans is {in_chans}")
    stored = kind_of(source.stored)
    if not holds(source.dtype, stored):
        raise UserError(
            f"{folder}: images are {kind_name(stored)}, but data.dtype is {kind_name(source.dtype)}; take null"
        )
    return source
