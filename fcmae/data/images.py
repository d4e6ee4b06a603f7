"""Encoded images that Pillow decodes, of folders, tar files and datasets that timm opens; knows no splits."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.dataset_factory import create_dataset
from torch import Tensor

from fcmae.data.deep import EXTENSIONS, Opened, find_reader, is_tiff, open_tiff
from fcmae.data.labels import check_labels
from fcmae.data.listing import FolderFiles, TarFiles, images_below
from fcmae.data.pixels import (
    AS_STORED,
    FULL,
    Reading,
    as_kind,
    as_pixels,
    kind_of,
    without_nodata,
)
from fcmae.data.sampling import spread
from fcmae.data.views import Part, whole
from fcmae.errors import UserError, brief
from fcmae.files import BoundedFile

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode by number of channels."""

EXIF_ORIENTATION = 0x0112

TURNS = {2: (False, False, True), 3: (False, True, True), 4: (False, True, False), 5: (True, False, False)} | {
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
"""EXIF's orientation -> how a person sees the image: its sides swapped, then upside down, then mirrored."""

LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue in gray, as Pillow has it (ITU-R 601)."""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PCX", "PPM", "PSD", "QOI", "SGI"),
    *("SUN", "TGA"),
)
"""Pillow's names of what is read: images of pixels, one in a file. Of others, EPS would start a program."""

MAX_PIXELS = 1 << 27
"""Of an image that is decoded, at most: that takes up to 2 GB and ten seconds."""

LOOKED_AT = 16
"""Images, spread over all, that tell which kind of pixels there are."""

BITS_PER_SAMPLE = 258
"""The tag of a TIFF's page that says how deep its channels are."""

NEW_SUBFILE_TYPE, REDUCED, MASK = 254, 1, 4
"""The tag of a TIFF's page that says what it is, and the bits for a smaller version and for a transparency mask."""

MAX_PAGES = 100
"""Pages of a TIFF at most, of which all but one are smaller versions or masks."""


def extensions() -> frozenset[str]:
    """Return the ends of the names of image files, such as .jpg."""
    formats = {*FORMATS, "MPO"}  # which is opened as the JPEG that it is
    return EXTENSIONS | {end for end, name in Image.registered_extensions().items() if name in formats}


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image, recognised by its content, without decoding it: all that is read of image files is read here.

    Raises:
        ValueError: if it is none of `FORMATS`, or has over `MAX_PIXELS`.
        Exception: whatever Pillow raises for a damaged one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of large images, and of what a plugin finds odd in a file of another type
            image = Image.open(file, formats=FORMATS)
        size = image.size
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError("not an image of a type that is read, or damaged") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"over {MAX_PIXELS:,} pixels; cut it into tiles or shrink it") from error
    if size[0] * size[1] > MAX_PIXELS:
        image.close()
        raise ValueError(f"{size[0]:,} x {size[1]:,} pixels, over {MAX_PIXELS:,}; cut it into tiles or shrink it")
    return image


def refuse_pages(image: Image.Image) -> None:
    """Raise an error for a multi-page or animated image: which page is meant, the file does not say.

    The first frame is the image itself in an MPO (a camera's JPEG with a preview, or the left of two views), in a
    Photoshop file (all layers together) and in a TIFF whose other pages are reduced versions or masks of the first.

    Raises:
        ValueError: if there are several.
    """
    if image.format in ("MPO", "PSD") or not getattr(image, "is_animated", False):
        return
    if image.format != "TIFF":
        number: int = getattr(image, "n_frames", 1)
        raise ValueError(f"{number} frames, an animation; save the frames that are wanted as files of their own")
    pages = 0
    for frame in range(MAX_PAGES + 1):
        try:
            image.seek(frame)
        except EOFError:
            break
        pages += not getattr(image, "tag_v2", {}).get(NEW_SUBFILE_TYPE, 0) & (REDUCED | MASK)
    else:
        raise ValueError(f"over {MAX_PAGES} pages; split it into one file per page, as tiffsplit does")
    image.seek(0)
    if pages > 1:
        raise ValueError(f"{pages} pages; split it into one file per page, as tiffsplit does")


# Pixels of the channels that are asked for


def fit_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Return pixels (h, w, bands) with so many channels: gray for RGB and back, without an alpha channel.

    Raises:
        ValueError: if the bands mean something else.
    """
    bands = pixels.shape[2]
    if bands == channels:
        return pixels
    if (bands, channels) in ((2, 1), (4, 3)):
        return pixels[..., :channels]
    if (bands, channels) == (1, 3):
        return pixels.repeat(3, axis=2)
    if channels == 4 and bands in (1, 3):
        opaque = np.full((*pixels.shape[:2], 1), FULL[kind_of(pixels.dtype)], pixels.dtype)
        return np.concatenate([fit_channels(pixels, 3), opaque], axis=2)
    if (bands, channels) in ((3, 1), (4, 1)):
        gray = (pixels[..., :3].astype(np.float64) @ LUMA)[..., None]
        return gray.astype(np.float32) if pixels.dtype.kind == "f" else gray.round().astype(pixels.dtype)
    raise ValueError(f"{bands} bands where {channels} are wanted; set model.in_chans={bands}")


def pillow_kind(image: Image.Image) -> torch.dtype:
    """Return the kind of pixels that an image opened by Pillow has."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return torch.uint16
    return torch.float32 if image.mode in ("I", "F") else torch.uint8


def decode(image: Image.Image, channels: int) -> np.ndarray:
    """Turn a PIL image into pixels (h, w, channels), as deep as they are.

    Raises:
        ValueError: if it has other channels.
    """
    kind = pillow_kind(image)
    if kind == torch.uint8:
        if channels not in PIL_MODES:
            raise ValueError(f"an image of mode {image.mode} where {channels} channels are wanted")
        converted = np.asarray(image.convert(PIL_MODES[channels]))
        return converted if converted.ndim == 3 else converted[..., None]
    numbers = np.asarray(image)[..., None]
    return fit_channels(numbers.astype(np.uint16) if kind == torch.uint16 else as_pixels(numbers), channels)


def decode_part(image: Image.Image, choose: Callable[[int, int], Part], channels: int) -> np.ndarray:
    """Turn the part of a PIL image, which need not be loaded, that `choose` takes into pixels (h, w, channels).

    The image is turned as its EXIF orientation says. A JPEG is decoded at 1/2, 1/4 or 1/8 of its sides where that
    leaves as many pixels as wanted.

    Raises:
        ValueError: if it has several pages; damaged ones raise whatever Pillow does.
    """
    refuse_pages(image)
    if image.format not in ("JPEG", "MPO"):
        image.load()  # before its size is asked for, which decoding may change
    swapped, upside_down, mirrored = TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1), (False, False, False))
    full_width, full_height = image.size
    seen_height, seen_width = (full_width, full_height) if swapped else (full_height, full_width)
    part = choose(seen_height, seen_width)
    top = seen_height - part.top - part.height if upside_down else part.top
    left = seen_width - part.left - part.width if mirrored else part.left
    height, width, enough = part.height, part.width, part.enough
    if swapped:
        top, left, height, width, enough = left, top, width, height, enough[::-1]
    spare = min(height / enough[0], width / enough[1])
    divisor = max(d for d in (1, 2, 4, 8) if d <= max(spare, 1))
    if divisor > 1:
        image.draft(None, (full_width // divisor, full_height // divisor))
    if image.size == (full_width, full_height):
        divisor = 1  # not a JPEG
    x, y = min(round(left / divisor), image.width - 1), min(round(top / divisor), image.height - 1)
    right = max(round((left + width) / divisor), x + 1)
    bottom = max(round((top + height) / divisor), y + 1)
    box = (x, y, right, bottom)
    pixels = decode(image if box == (0, 0, *image.size) else image.crop(box), channels)
    pixels = pixels.transpose(1, 0, 2) if swapped else pixels
    return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def is_deep_tiff(image: Image.Image) -> bool:
    """Whether a TIFF has more bits a channel than Pillow keeps."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))
    return image.format == "TIFF" and max(bits) > 8


Read = Callable[[Callable[[int, int], Part], int], np.ndarray]
"""Takes what chooses a part, and channels; returns the part's pixels (h, w, channels)."""


def _read_deep(image: Opened, reading: Reading, choose: Callable[[int, int], Part], channels: int) -> np.ndarray:
    top, left, height, width, _ = choose(image.height, image.width)
    return fit_channels(without_nodata(image.read((top, left, height, width)), reading), channels)


def open_pixels(file: IO[bytes], reading: Reading = AS_STORED) -> tuple[torch.dtype, Read]:
    """Open an image file of any type, recognised by its content: all that is read of image files is read here.

    Args:
        file: as bytes.
        reading: what becomes of no-data and DICOM's window.

    Returns:
        The kind of its pixels, and what reads a part of it.

    Raises:
        Exception: whatever libraries raise for a damaged one; ValueError names an extra that is missing.
    """
    open_deep = find_reader(file)
    if open_deep is None:
        try:
            image = open_image(file)
            if not is_deep_tiff(image):
                return pillow_kind(image), functools.partial(decode_part, image)
        except UnidentifiedImageError:
            if not is_tiff(file):
                raise
        file.seek(0)
        open_deep = open_tiff
    opened = open_deep(file)
    if opened.height * opened.width > MAX_PIXELS:
        raise ValueError(f"{opened.width:,} x {opened.height:,} pixels, over {MAX_PIXELS:,}; cut it into tiles")
    return opened.kind, functools.partial(_read_deep, opened, reading)


class Files(Protocol):
    """What images are read from, by index."""

    labels: np.ndarray | None
    """int64 (n,), each image's class from 0 on; None where images have none."""
    class_names: tuple[str, ...] | None
    """By label; None without labels, or where nothing names them."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """Return what a person would look for."""
        ...

    def open(self, index: int, /) -> IO[bytes] | Image.Image:
        """Return an image's file, or what another library made of it."""
        ...


def _timm_targets(dataset: Any) -> tuple[Any, dict[str, int] | None]:
    """Return the class indices and the names of a timm or torchvision dataset, without opening images."""
    reader = getattr(dataset, "reader", None)
    if reader is None:  # torchvision's
        names = getattr(dataset, "classes", None)
        return getattr(dataset, "targets", None), names and {name: index for index, name in enumerate(names)}
    table = reader.dataset  # Hugging Face's
    return (table[reader.label_key] if reader.label_key in table.column_names else None), reader.class_to_idx


def _labels_of(dataset: Any) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return (labels, class names) of a timm or torchvision dataset, None where it has none for every image."""
    targets, class_to_idx = _timm_targets(dataset)
    labels = np.asarray([] if targets is None else targets)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min(initial=0) < 0:
        return None, None
    names = tuple(sorted(class_to_idx, key=class_to_idx.__getitem__)) if class_to_idx else None
    return labels.astype(np.int64), names


def load_as_torchvision(path: str | Path) -> Image.Image:
    """Load an image file as torchvision's datasets do, if it is one of `FORMATS`."""
    with BoundedFile(path) as file, open_image(file) as image:
        return image.convert("RGB")


class DatasetFiles:
    """The rows of a dataset that timm or torchvision opens, called `name`."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)
        self.dataset_name = name
        if hasattr(dataset, "loader"):
            dataset.loader = load_as_torchvision
        self.labels, self.class_names = _labels_of(dataset)
        if self.labels is not None and len(self.labels):
            check_labels(self.labels, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        if self.reader is not None:
            try:
                return str(self.reader.filename(index, absolute=True))
            except (KeyError, NotImplementedError, TypeError):
                pass  # timm's readers of nameless rows
        return f"{self.dataset_name}[{index}]"

    def open(self, index: int) -> IO[bytes] | Image.Image:
        return (self.dataset if self.reader is None else self.reader)[index][0]


class ImageSource:
    """Images from files, each decoded when it is loaded, all as pixels of one kind.

    Args:
        files: that they are in.
        channels: of what is loaded.
        place: see `Source`.
        reading: what becomes of their pixels; without a kind, that of the deepest of some images.
    """

    def __init__(self, files: Files, channels: int, place: Path | None, reading: Reading = AS_STORED) -> None:
        self.files = files
        self.channels = channels
        self.place = place
        self.labels, self.class_names = files.labels, files.class_names
        self.reading = reading
        self.dtype = reading.kind(self._widest())

    def __len__(self) -> int:
        return len(self.files)

    def _widest(self) -> torch.dtype:
        kinds: list[torch.dtype] = []
        for index in spread(len(self), LOOKED_AT):
            try:
                with self._opened(index) as (kind, _):
                    kinds.append(kind)
            except Exception:  # training names the images that do not decode
                continue
        return max(kinds, key=list(FULL).index, default=torch.uint8)

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[torch.dtype, Read]]:
        opened = self.files.open(index)
        if isinstance(opened, Image.Image):
            yield pillow_kind(opened), functools.partial(decode_part, opened)
        else:
            with opened:
                yield open_pixels(opened, self.reading)

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        with self._opened(index) as (_, read):
            pixels = np.array(read(choose, self.channels), order="C")  # of its own, which can be written to
        return as_kind(torch.from_numpy(pixels).permute(2, 0, 1), self.dtype)

    def describe(self, index: int) -> str:
        return self.files.name(index)


def find_image(folder: Path) -> Path | None:
    """Return an image file below a folder, any of them, or None."""
    return next(map(Path, images_below(str(folder), extensions())), None)


def _open_files(name: str, root: str, split: str | None) -> Files:
    if "/" not in name:
        return (FolderFiles if os.path.isdir(root) else TarFiles)(root, extensions())
    searched: dict[str, Any] = {"search_split": False} if split is None else {"split": split}
    return DatasetFiles(create_dataset(name, root=root, **searched), name)


def open_images(
    name: str, root: str, split: str | None, channels: int, what: str, reading: Reading = AS_STORED
) -> ImageSource:
    """Open image files, or a map-style dataset of timm's `create_dataset`.

    Args:
        name: "folder", "", or one that begins with "hfds/" or "torch/".
        root: the folder of the images, the tar file, or the cache folder of others.
        split: of the others; None where `root` is all images, in any arrangement.
        channels: of what is loaded.
        what: how messages name it, such as "data.root=pets".
        reading: see `ImageSource`.

    Raises:
        UserError: if it cannot be opened, or nothing in it is an image.
    """
    try:
        files = _open_files(name, root, split)
        length = len(files)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except ImportError as error:
        package = "datasets" if name.lower().startswith("hfds/") else str(error.name)
        raise UserError(f"data.name={name}: needs a package that is missing: pip install {package}") from error
    except Exception as error:  # whatever timm, datasets or torchvision raise for what they cannot open
        raise UserError(f"{what}: {brief(error)}") from error
    if not length:
        array = next(Path(root).rglob("*.npy"), None)
        hint = f"such as {array}: data.name=arrays reads what fcmae prepare or fcmae.data.save_arrays wrote"
        looked = f"(looked for {', '.join(FORMATS)} files)"
        raise UserError(f"{what}: no images in it " + (f"but arrays, {hint}" if array else looked))
    return ImageSource(files, channels, Path(root).resolve() if split is None else None, reading)
