"""Where images and their labels come from: folders, tar files, datasets that timm opens, arrays of pixels."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.img_extensions import add_img_extensions
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fcmae.data.views import Part, whole
from fcmae.errors import UserError
from fcmae.seeding import derive_seed

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
STREAMED = ("hfids", "wds", "tfds")


class Source(Protocol):
    """Images by index; loading the same index twice gives the same image."""

    labels: np.ndarray | None
    """int64 (n,), each image's class from 0 on; None where images have none."""
    class_names: tuple[str, ...] | None
    """By label; None without labels, or where nothing names them."""

    def __len__(self) -> int: ...

    def load(self, index: int, /) -> Tensor:
        """Return image `index` as uint8 (c, h, w); raises whatever decoding raises."""
        ...

    def load_part(self, index: int, choose: Callable[[int, int], Part], /) -> Tensor:
        """Return the part of image `index` that `choose` takes, knowing height and width: uint8 (c, h, w).

        Where fewer pixels are cheaper, it may have less than the image's resolution, but no less than asked for.
        """
        ...

    def describe(self, index: int, /) -> str:
        """Return what a person would look for: the file's name, or the row."""
        ...


def _map_array(path: Path, remedy: str = "") -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npy array ({error}){remedy}") from error


def _read_labels(folder: Path, num_images: int) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Read `labels.npy` and `classes.txt` beside an `images.npy`: (labels, class names), None where missing."""
    path, names_path = folder / "labels.npy", folder / "classes.txt"
    if not path.is_file():
        return None, None
    labels = _map_array(path)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UserError(f"{path}: expected whole numbers (n,), found {labels.dtype} {labels.shape}")
    if len(labels) != num_images:
        raise UserError(f"{path}: {len(labels)} labels for the {num_images} images beside it; give one per image")
    labels = np.asarray(labels, np.int64)
    if labels.min() < 0:
        raise UserError(f"{path}: label {labels.min()} of image {labels.argmin()}: classes count from 0")
    if not names_path.is_file():
        return labels, None
    try:
        names = tuple(names_path.read_text(encoding="utf-8").rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise UserError(f"{names_path}: not a text file; write one class name per line") from error
    if labels.max() >= len(names):
        raise UserError(f"{names_path}: {len(names)} names, but {path} has label {labels.max()}; one name per line")
    return labels, names


class ArraySource:
    """`ROOT/SPLIT/images.npy` (or `ROOT/images.npy`): uint8 (n, h, w, c) or (n, h, w), memory-mapped.

    Beside it may lie `labels.npy`, whole numbers (n,), and `classes.txt`, a class name per line.
    """

    def __init__(self, root: str, split: str) -> None:
        candidates = [Path(root, split, "images.npy"), Path(root, "images.npy")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise UserError(
                f"data.root={root}: holds no {split}/images.npy or images.npy (uint8, n x h x w x c), and nothing "
                "that fcmae prepare wrote"
            )
        images = _map_array(path)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
            raise UserError(
                f"{path}: expected uint8 images (n, h, w, c), found {images.dtype} {images.shape}; "
                "fcmae.data.save_arrays writes them"
            )
        self.root, self.split, self.path = root, split, path
        self.images = images if images.ndim == 4 else images[..., None]
        self.channels = self.images.shape[-1]
        self.labels, self.class_names = _read_labels(path.parent, len(images))

    def __reduce__(self) -> tuple[type["ArraySource"], tuple[str, str]]:
        return ArraySource, (self.root, self.split)  # workers map the file again instead of copying it

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        top, left, height, width, _ = choose(*self.images.shape[1:3])
        part = self.images[index, top : top + height, left : left + width]
        return torch.from_numpy(np.array(part)).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        return f"{self.path}[{index}]"


PREPARED = "fcmae images 1"
"""What `format` says in the index of a folder that `fcmae prepare` wrote."""


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of one shard of prepared images."""
    return folder / "shards" / f"{shard:05d}.bin"


class PreparedSource:
    """`ROOT/SPLIT` (or `ROOT`), written by `fcmae prepare`: images of any sizes, as bare pixels.

    `index.json` says how many images each shard holds; `sizes.npy`, int32 (n, 2), each image's height and width.
    A shard is the pixels (h, w, c) of consecutive images, uint8, one after the other. Only the rows that are seen
    are read, and no file stays open or mapped: any number of shards and workers will do, and a file that is cut off
    while it is read is an error, not a crash.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != PREPARED:
                raise ValueError(f"format {index['format']!r}, this version reads {PREPARED!r}")
            counts = np.array(index["shards"], np.int64)
            self.channels = int(index["channels"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no index of prepared images ({error}); run fcmae prepare again") from error
        self.folder = folder
        self.sizes = np.asarray(_map_array(folder / "sizes.npy", "; run fcmae prepare again"))
        if self.sizes.shape != (counts.sum(), 2) or self.sizes.dtype != np.int32:
            raise UserError(
                f"{folder / 'sizes.npy'}: {self.sizes.dtype} {self.sizes.shape}, but {path} counts {counts.sum()} "
                "images; run fcmae prepare again"
            )
        num_bytes = self.sizes.astype(np.int64).prod(1) * self.channels
        ends = np.cumsum(num_bytes)
        self.firsts = np.cumsum(counts) - counts
        """Number of each shard's first image."""
        starts = ends - num_bytes
        shard_bytes = np.array([num_bytes[a : a + n].sum() for a, n in zip(self.firsts, counts, strict=True)])
        self.offsets = starts - np.repeat(np.cumsum(shard_bytes) - shard_bytes, counts)
        """Of each image in its shard, in bytes."""
        for shard, expected in enumerate(shard_bytes):
            file = shard_path(folder, shard)
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                raise UserError(
                    f"{file}: {'missing' if found is None else f'{found:,} bytes'}, should have {expected:,}; "
                    "run the same fcmae prepare again, which mends what is damaged"
                )
        self.labels, self.class_names = _read_labels(folder, len(self.sizes))

    def __reduce__(self) -> tuple[type["PreparedSource"], tuple[Path]]:
        return PreparedSource, (self.folder,)

    def __len__(self) -> int:
        return len(self.sizes)

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        image_height, image_width = map(int, self.sizes[index])
        top, left, height, width, _ = choose(image_height, image_width)
        row = image_width * self.channels
        shard = int(self.firsts.searchsorted(index, "right")) - 1
        offset = int(self.offsets[index]) + top * row
        path = shard_path(self.folder, shard)
        file = os.open(path, os.O_RDONLY)
        try:
            content = os.pread(file, height * row, offset)
        finally:
            os.close(file)
        if len(content) != height * row:
            raise OSError(f"{path}: cut off; run the same fcmae prepare again, which mends it")
        rows = np.frombuffer(content, np.uint8).reshape(height, image_width, self.channels)
        return torch.from_numpy(rows[:, left : left + width].copy()).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        return f"{self.folder}[{index}]"


def open_arrays(root: str, split: str) -> ArraySource | PreparedSource:
    """Open what `fcmae prepare` or `save_arrays` wrote into `ROOT/SPLIT` or `ROOT`.

    Raises:
        UserError: if nothing is there, or it is unfinished or damaged.
    """
    for folder in (Path(root, split), Path(root)):
        if (folder / "index.json").is_file():
            return PreparedSource(folder)
        if (folder / "images.npy").is_file():
            break
        if (folder / "prepare.json").is_file():
            raise UserError(f"{folder}: unfinished; the same fcmae prepare again goes on where it stopped")
    return ArraySource(root, split)


def save_arrays(
    folder: str | Path,
    images: np.ndarray,
    labels: np.ndarray | Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Write uint8 images (n, h, w, c) as `folder/images.npy`, to be read with `data.name=arrays`; returns its path.

    Labels, whole numbers (n,) from 0 on, go into `labels.npy` beside it, their names into `classes.txt`.

    Raises:
        ValueError: if shapes, types or numbers do not fit.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (n, h, w, c), got {images.dtype} {images.shape}")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or labels.min(initial=0) < 0:
            raise ValueError(f"labels must be whole numbers from 0 on, one for each of {len(images)} images")
    if class_names is not None:
        if labels is None or labels.max(initial=-1) >= len(class_names):
            raise ValueError(f"{len(class_names)} class names do not fit the labels")
        if any(name != name.strip() or len(name.splitlines()) != 1 for name in class_names):
            raise ValueError("a class name must be one line, without spaces around it")
    path = Path(folder, "images.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in ("labels.npy", "classes.txt"):
        path.with_name(stale).unlink(missing_ok=True)
    np.save(path, images, allow_pickle=False)
    if labels is not None:
        np.save(path.with_name("labels.npy"), labels.astype(np.int64), allow_pickle=False)
    if class_names is not None:
        path.with_name("classes.txt").write_text("\n".join(class_names) + "\n", encoding="utf-8")
    return path


def decode(image: Image.Image, channels: int) -> Tensor:
    """Turn a PIL image into uint8 (channels, h, w); 16-bit gray is scaled to 8 bits, not clipped."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return pil_to_tensor(image.convert(PIL_MODES[channels]))


def decode_part(image: Image.Image, choose: Callable[[int, int], Part], channels: int) -> Tensor:
    """Turn the part of a PIL image, which need not be loaded, that `choose` takes into uint8 (channels, h, w).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its sides where that leaves as many pixels as wanted.
    """
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


class ImageSource:
    """Encoded images that PIL decodes, each opened by a function of its index."""

    def __init__(
        self,
        length: int,
        open_image: Callable[[int], BinaryIO | Image.Image],
        describe: Callable[[int], str],
        channels: int,
        labels: np.ndarray | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        self.length = length
        self.open_image = open_image
        self.describe = describe
        self.channels = channels
        self.labels = labels
        self.class_names = class_names

    def __len__(self) -> int:
        return self.length

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        opened = self.open_image(index)
        if isinstance(opened, Image.Image):
            return decode_part(opened, choose, self.channels)
        with opened, Image.open(opened) as image:
            return decode_part(image, choose, self.channels)


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
                name = str(self.reader.filename(index, absolute=True))
                return f"{self.reader.root}/{name}" if hasattr(self.reader, "tar_state") else name
            except (KeyError, NotImplementedError, TypeError):
                pass  # timm's readers of nameless rows
        return f"{self.name}[{index}]"


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
        arrays = open_arrays(root, split)
        if arrays.channels != in_chans:
            place = arrays.path if isinstance(arrays, ArraySource) else arrays.folder
            raise UserError(f"{place}: images have {arrays.channels} channels, but model.in_chans is {in_chans}")
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
    return ImageSource(length, row.open, row.describe, in_chans, *_labels_of(dataset))


def labels_by(source: Source, class_names: Sequence[str] | None, what: str) -> np.ndarray:
    """Return the labels of a source, int64 (n,), as numbers of another's `class_names`, where both have names.

    Args:
        source: such as the validation split, which may lack some of the classes.
        class_names: such as the training split's; None leaves the source's numbers.
        what: how messages name the source, such as "data.root=pets, split val".

    Raises:
        UserError: if it has no labels, or a class that is not among `class_names`.
    """
    if source.labels is None:
        raise UserError(
            f"{what}: no labels; put the images of each class into a sub-folder named for it and none beside them, "
            "or a labels.npy beside images.npy"
        )
    if class_names is None or source.class_names is None or source.class_names == tuple(class_names):
        return source.labels
    number = {name: i for i, name in enumerate(class_names)}
    numbers = np.array([number.get(name, -1) for name in source.class_names], np.int64)
    labels = numbers[source.labels]
    if labels.min() < 0:
        name = source.class_names[source.labels[labels.argmin()]]
        raise UserError(f"{what}: class {name!r} is not among the {len(number)} classes of training")
    return labels


def shares_images(source: Source, other: Source) -> bool:
    """Whether the first image of a folder, tar file or array is among those of another, or the other way round.

    So it is where one of them is the whole of a root, for want of a folder named for its split.
    """
    pairs = ((source, other), (other, source))
    return any(b.describe(index) == a.describe(0) for a, b in pairs for index in range(len(b)))


class Subset:
    """Some of the images of a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

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
    chosen: list[np.ndarray] = []
    for label in np.unique(source.labels):
        members = np.flatnonzero(source.labels == label)
        order = np.random.default_rng(derive_seed(seed, int(label))).permutation(members)
        chosen.append(order[: max(1, round(fraction * len(members)))])
    return Subset(source, np.sort(np.concatenate(chosen)))
