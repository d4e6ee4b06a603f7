"""Encoded images that Pillow decodes, of folders, tar files and datasets that timm opens; knows no splits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import add_img_extensions
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fcmae.data.views import Part, whole
from fcmae.errors import UserError

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode by number of channels."""

NEW_SUBFILE_TYPE, REDUCED, MASK = 254, 1, 4
"""The tag of a TIFF's page that says what it is, and the bits for a smaller version and for a transparency mask."""


def refuse_pages(image: Image.Image) -> None:
    """Raise an error for a multi-page or animated image: which page is meant, the file does not say.

    The first frame is the image itself in an MPO (a camera's JPEG with a preview, or the left of two views), in a
    Photoshop file (all layers together) and in a TIFF whose other pages are reduced versions or masks of the first.

    Raises:
        ValueError: if there are several.
    """
    if image.format in ("MPO", "PSD") or not getattr(image, "is_animated", False):
        return
    number: int = getattr(image, "n_frames", 1)
    if image.format != "TIFF":
        raise ValueError(f"{number} frames, an animation; save the frames that are wanted as files of their own")
    pages = 0
    for frame in range(number):
        image.seek(frame)
        pages += not getattr(image, "tag_v2", {}).get(NEW_SUBFILE_TYPE, 0) & (REDUCED | MASK)
    image.seek(0)
    if pages > 1:
        raise ValueError(f"{pages} pages; split it into one file per page, as tiffsplit does")


def decode(image: Image.Image, channels: int) -> Tensor:
    """Turn a PIL image into uint8 (channels, h, w); 16-bit gray is scaled to 8 bits, not clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
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


def _timm_targets(dataset: Any) -> tuple[Any, dict[str, int] | None]:
    """Return the class indices and the names of a timm or torchvision dataset, without opening images."""
    reader = getattr(dataset, "reader", None)
    if reader is None:  # torchvision's
        names = getattr(dataset, "classes", None)
        return getattr(dataset, "targets", None), names and {name: index for index, name in enumerate(names)}
    if hasattr(reader, "label_key"):  # Hugging Face's
        table = reader.dataset
        return (table[reader.label_key] if reader.label_key in table.column_names else None), reader.class_to_idx
    if hasattr(reader, "targets"):  # of a tar file
        names = reader.class_name_to_idx
        return (reader.targets, names) if len(names) > 1 else (None, None)  # one folder in a tar wraps it all
    return [target for _, target in reader.samples], reader.class_to_idx


def _labels_of(dataset: Any) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return (labels, class names) of a timm or torchvision dataset, None where it has none for every image."""
    targets, class_to_idx = _timm_targets(dataset)
    labels = np.asarray([] if targets is None else targets)
    unlabelled = labels.dtype.kind not in "iu" or labels.ndim != 1 or labels.min(initial=0) < 0
    if unlabelled or "" in (class_to_idx or {}):  # timm's class of images outside of any sub-folder
        return None, None
    names = tuple(sorted(class_to_idx, key=class_to_idx.__getitem__)) if class_to_idx else None
    return labels.astype(np.int64), names


class ImageSource:
    """The rows of a timm or torchvision dataset, each decoded by Pillow when it is loaded."""

    def __init__(self, dataset: Any, name: str, channels: int, place: Path | None) -> None:
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)
        self.name = name
        self.channels = channels
        self.place = place
        self.labels, self.class_names = _labels_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        opened = (self.dataset if self.reader is None else self.reader)[index][0]
        if isinstance(opened, Image.Image):
            return decode_part(opened, choose, self.channels)
        with opened, Image.open(opened) as image:
            return decode_part(image, choose, self.channels)

    def describe(self, index: int) -> str:
        if self.reader is not None:
            try:
                name = str(self.reader.filename(index, absolute=True))
                return f"{self.reader.root}/{name}" if hasattr(self.reader, "tar_state") else name
            except (KeyError, NotImplementedError, TypeError):
                pass  # timm's readers of nameless rows
        return f"{self.name}[{index}]"


def find_image(folder: Path) -> Path | None:
    """Return an image file below a folder, any of them, or None."""
    extensions = Image.registered_extensions()
    return next((path for path in folder.rglob("*") if path.suffix.lower() in extensions and path.is_file()), None)


def open_images(name: str, root: str, split: str | None, channels: int, what: str) -> ImageSource:
    """Open a map-style dataset of timm's `create_dataset`.

    Args:
        name: "folder", "", or one that begins with "hfds/" or "torch/".
        root: the folder of the images, the tar file, or the cache folder of others.
        split: of the others; None where `root` is all images, in any arrangement.
        channels: of what is loaded.
        what: how messages name it, such as "data.root=pets".

    Raises:
        UserError: if it cannot be opened, or nothing in it is an image.
    """
    add_img_extensions(sorted(ext for ext in Image.registered_extensions() if ext not in (".pdf", ".mpg")))
    searched: dict[str, Any] = {"search_split": False} if split is None else {"split": split}
    try:
        dataset: Any = create_dataset(name, root=root, **searched)
        length = len(dataset)
    except ImportError as error:
        package = "datasets" if name.lower().startswith("hfds/") else str(error.name)
        raise UserError(f"data.name={name}: needs a package that is missing: pip install {package}") from error
    except Exception as error:  # whatever timm, datasets or torchvision raise for what they cannot open
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Found 0 images" not in reason:
            raise UserError(f"{what}: {reason}") from error
        length = 0
    if not length:
        array = next(Path(root).rglob("*.npy"), None)
        hint = f"such as {array}: data.name=arrays reads what fcmae prepare or fcmae.data.save_arrays wrote"
        looked = "(looked for every file type that Pillow reads)"
        raise UserError(f"{what}: no images in it " + (f"but arrays, {hint}" if array else looked))
    return ImageSource(dataset, name, channels, Path(root).resolve() if split is None else None)
