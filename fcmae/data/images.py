"""Encoded images that Pillow decodes, of folders, tar files and datasets that timm opens; knows no splits."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from timm.data.dataset_factory import create_dataset
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fcmae.data.labels import check_labels
from fcmae.data.listing import FolderFiles, TarFiles, images_below
from fcmae.data.views import Part, whole
from fcmae.errors import UserError, brief
from fcmae.files import BoundedFile

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode by number of channels."""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PCX", "PPM", "PSD", "QOI", "SGI"),
    *("SUN", "TGA"),
)
"""Pillow's names of what is read: images of pixels, one in a file. Of others, EPS would start a program."""

MAX_PIXELS = 1 << 27
"""Of an image that is decoded, at most: that takes up to 2 GB and ten seconds."""

NEW_SUBFILE_TYPE, REDUCED, MASK = 254, 1, 4
"""The tag of a TIFF's page that says what it is, and the bits for a smaller version and for a transparency mask."""

MAX_PAGES = 100
"""Pages of a TIFF at most, of which all but one are smaller versions or masks."""


def extensions() -> frozenset[str]:
    """Return the ends of the names of image files, such as .jpg."""
    formats = {*FORMATS, "MPO"}  # which is opened as the JPEG that it is
    return frozenset(end for end, name in Image.registered_extensions().items() if name in formats)


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
        raise ValueError("not an image of a type that is read, or damaged") from error
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


def decode(image: Image.Image, channels: int) -> Tensor:
    """Turn a PIL image into uint8 (channels, h, w); 16-bit gray is scaled to 8 bits, not clipped.

    Raises:
        ValueError: if it has numbers that are no pixels of 8 bits.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        numbers = np.asarray(image)
        if not (numbers.min() >= 0 and numbers.max() <= 255):  # also where one is NaN
            raise ValueError("numbers outside of 0 to 255, which 8 bits do not hold; save it with 8 or 16 bits")
    return pil_to_tensor(image.convert(PIL_MODES[channels]))


def decode_part(image: Image.Image, choose: Callable[[int, int], Part], channels: int) -> Tensor:
    """Turn the part of a PIL image, which need not be loaded, that `choose` takes into uint8 (channels, h, w).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its sides where that leaves as many pixels as wanted.

    Raises:
        ValueError: if it has several pages; damaged ones raise whatever Pillow does.
    """
    refuse_pages(image)
    if image.format not in ("JPEG", "MPO"):
        image.load()  # before its size is asked for, which decoding may change
    full_width, full_height = image.size
    part = choose(full_height, full_width)
    spare = min(part.height / part.enough[0], part.width / part.enough[1])
    divisor = max(d for d in (1, 2, 4, 8) if d <= max(spare, 1))
    if divisor > 1:
        image.draft(None, (full_width // divisor, full_height // divisor))
    if image.size == (full_width, full_height):
        divisor = 1  # not a JPEG
    left, top = min(round(part.left / divisor), image.width - 1), min(round(part.top / divisor), image.height - 1)
    right = max(round((part.left + part.width) / divisor), left + 1)
    bottom = max(round((part.top + part.height) / divisor), top + 1)
    box = (left, top, right, bottom)
    return decode(image if box == (0, 0, *image.size) else image.crop(box), channels)


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
    """Images from files, each decoded by Pillow when it is loaded."""

    def __init__(self, files: Files, channels: int, place: Path | None) -> None:
        self.files = files
        self.channels = channels
        self.place = place
        self.labels, self.class_names = files.labels, files.class_names

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        opened = self.files.open(index)
        if isinstance(opened, Image.Image):
            return decode_part(opened, choose, self.channels)
        with opened, open_image(opened) as image:
            return decode_part(image, choose, self.channels)

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


def open_images(name: str, root: str, split: str | None, channels: int, what: str) -> ImageSource:
    """Open image files, or a map-style dataset of timm's `create_dataset`.

    Args:
        name: "folder", "", or one that begins with "hfds/" or "torch/".
        root: the folder of the images, the tar file, or the cache folder of others.
        split: of the others; None where `root` is all images, in any arrangement.
        channels: of what is loaded.
        what: how messages name it, such as "data.root=pets".

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
    return ImageSource(files, channels, Path(root).resolve() if split is None else None)
