"""Where images come from: folders, tar files, datasets that timm opens, or memory-mapped arrays."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import add_img_extensions
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fcmae.errors import UserError

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
STREAMED = ("hfids", "wds", "tfds")


class Source(Protocol):
    """Images by index; loading the same index twice gives the same image."""

    def __len__(self) -> int: ...

    def load(self, index: int, /) -> Tensor:
        """Return image `index` as uint8 (c, h, w); raises whatever decoding raises."""
        ...

    def describe(self, index: int, /) -> str:
        """Return what a person would look for: the file's name, or the row."""
        ...


class ArraySource:
    """`ROOT/SPLIT/images.npy` (or `ROOT/images.npy`): uint8 (n, h, w, c) or (n, h, w), memory-mapped."""

    def __init__(self, root: str, split: str) -> None:
        candidates = [Path(root, split, "images.npy"), Path(root, "images.npy")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise UserError(f"data.root={root}: holds no {split}/images.npy or images.npy (uint8, n x h x w x c)")
        try:
            images = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: not a readable .npy array ({error})") from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
            raise UserError(
                f"{path}: expected uint8 images (n, h, w, c), found {images.dtype} {images.shape}; "
                "fcmae.data.save_arrays writes them"
            )
        self.root, self.split, self.path = root, split, path
        self.images = images if images.ndim == 4 else images[..., None]

    def __reduce__(self) -> tuple[type["ArraySource"], tuple[str, str]]:
        return ArraySource, (self.root, self.split)  # workers map the file again instead of copying it

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        return f"{self.path}[{index}]"


def save_arrays(folder: str | Path, images: np.ndarray) -> Path:
    """Write uint8 images (n, h, w, c) as `folder/images.npy`, to be read with `data.name=arrays`.

    Raises:
        ValueError: if they are not uint8 (n, h, w, c).
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (n, h, w, c), got {images.dtype} {images.shape}")
    path = Path(folder, "images.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, images, allow_pickle=False)
    return path


def decode(image: Image.Image, channels: int) -> Tensor:
    """Turn a PIL image into uint8 (channels, h, w); 16-bit gray is scaled to 8 bits, not clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return pil_to_tensor(image.convert(PIL_MODES[channels]))


class ImageSource:
    """Encoded images that PIL decodes, each opened by a function of its index."""

    def __init__(
        self,
        length: int,
        open_image: Callable[[int], BinaryIO | Image.Image],
        describe: Callable[[int], str],
        channels: int,
    ) -> None:
        self.length = length
        self.open_image = open_image
        self.describe = describe
        self.channels = channels

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Tensor:
        opened = self.open_image(index)
        if isinstance(opened, Image.Image):
            return decode(opened, self.channels)
        with opened, Image.open(opened) as image:
            return decode(image, self.channels)


class _Row:
    """The image or the name of a row of a timm or torchvision dataset; a class, so that workers can pickle it."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)
        self.name = name

    def open(self, index: int) -> BinaryIO | Image.Image:
        return (self.dataset if self.reader is None else self.reader)[index][0]

    def describe(self, index: int) -> str:
        if self.reader is not None:
            try:
                return str(self.reader.filename(index, absolute=True))
            except (KeyError, NotImplementedError, TypeError):
                pass  # timm's readers of nameless rows
        return f"{self.name}[{index}]"


def open_source(name: str, root: str, split: str, in_chans: int) -> Source:
    """Open the images that `data.name`, `data.root` and `data.split` name.

    Args:
        name: "folder" (or a .tar as root), "arrays", or a map-style name of timm's `create_dataset`.
        root: the folder, tar file or cache folder.
        split: such as "train"; a folder of that name inside `root` is used when there is one.
        in_chans: channels the model wants.

    Raises:
        UserError: if nothing is there, nothing in it is an image, or the channels do not fit.
    """
    if name == "arrays":
        arrays = ArraySource(root, split)
        if arrays.images.shape[-1] != in_chans:
            raise UserError(
                f"{arrays.path}: images have {arrays.images.shape[-1]} channels, but model.in_chans is {in_chans}"
            )
        return arrays
    prefix = name.partition("/")[0].lower() if "/" in name else ""
    if prefix in STREAMED:
        raise UserError(
            f"data.name={name}: streamed sets have no sample index, so masks and crops could not be repeated; "
            "use a map-style set: folder, a .tar, arrays, or hfds/NAME"
        )
    if in_chans not in PIL_MODES:
        raise UserError(f"model.in_chans={in_chans}: image files have 1, 3 or 4 channels; use data.name=arrays")
    if prefix not in ("hfds", "torch"):
        if name not in ("folder", ""):
            raise UserError(f"data.name={name}: unknown; use folder, arrays, hfds/NAME or torch/NAME")
        if not os.path.exists(root):
            raise UserError(f"data.root={root}: no such folder or file; give data.root=FOLDER with images in it")
        add_img_extensions(sorted(ext for ext in Image.registered_extensions() if ext not in (".pdf", ".mpg")))
    try:
        dataset: Any = create_dataset(name, root=root, split=split)
        length = len(dataset)
    except ImportError as error:
        package = "datasets" if prefix == "hfds" else str(error.name)
        raise UserError(f"data.name={name}: needs a package that is missing: pip install {package}") from error
    except Exception as error:  # whatever timm, datasets or torchvision raise for what they cannot open
        reason = " ".join(str(error).split()) or type(error).__name__
        if "Found 0 images" in reason:
            reason = "no images in it (looked for every file type that Pillow reads)"
        raise UserError(f"data.root={root}: {reason}") from error
    if not length:
        raise UserError(f"data.root={root}: no images in it")
    row = _Row(dataset, name)
    return ImageSource(length, row.open, row.describe, in_chans)
