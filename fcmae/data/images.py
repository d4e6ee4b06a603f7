"""Encoded images that Pillow decodes, of folders, tar files and datasets that timm opens; knows no splits."""

import functools
import os
import statistics
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.dataset_factory import create_dataset
from torch import Tensor

from fcmae.data.deep import (
    ALPHA,
    EXTENSIONS,
    GDAL_NODATA,
    MAX_PIXELS,
    ORIENTATION,
    PLAIN,
    MissingLibrary,
    Opened,
    TooLarge,
    count_slices,
    find_reader,
    geotiff_nodata,
    is_tiff,
    open_nifti,
    open_tiff,
    png_chunks,
    require_decodable,
)
from fcmae.data.labels import check_labels
from fcmae.data.listing import FolderFiles, TarFiles, extension, images_below
from fcmae.data.order import Shards
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

LUMA = (19595, 38470, 7471)
"""Of red, green and blue in gray, in 65,536ths, as Pillow has it (ITU-R 601)."""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "DIB", "GIF", "JPEG2000", "PCX", "PPM", "PSD", "QOI", "SGI"),
    *("SUN", "TGA"),
)
"""Pillow's names of what is read: images of pixels, one in a file. Of others, EPS would start a program."""

CUT_PIXELS = 1 << 24
"""Of a TIFF of plain 8-bit channels above which tifffile, if it is there, decodes what is seen alone."""

LOOKED_AT = 16
"""Images, spread over all, that tell which kind of pixels there are."""

BITS_PER_SAMPLE, PHOTOMETRIC, DESCRIPTION, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 270, 338, 339
"""The tags of a TIFF's page: how deep its channels are, what they mean, what the writer says of them, what those
besides gray or colours mean, and which kind of numbers they are."""

NEW_SUBFILE_TYPE, REDUCED, MASK = 254, 1, 4
"""The tag of a TIFF's page that says what it is, and the bits for a smaller version and for a transparency mask."""

GRAY_MODES = ("1", "L", "LA", "La", "I", "F")
"""Pillow's modes without colours, as far as the number of bits."""

MAX_PAGES = 100
"""Pages of a TIFF at most, of which all but one are smaller versions or masks."""


def extensions() -> frozenset[str]:
    """Return the ends of the names of image files, such as .jpg."""
    formats = {*FORMATS, "MPO"}  # which is opened as the JPEG that it is
    return EXTENSIONS | {end for end, name in Image.registered_extensions().items() if name in formats}


def open_image(file: IO[bytes]) -> Image.Image:
    """Open an image, recognised by its content, without decoding it: all that is read of image files is read here.

    Raises:
        ValueError: if it is none of `FORMATS`; `TooLarge` if it has over `MAX_PIXELS`.
        Exception: whatever Pillow raises for a damaged one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, and of what plugins find odd in files of other types
            image = Image.open(file, formats=FORMATS)
        size = image.size
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError("not an image of a type that is read, or damaged") from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"over {MAX_PIXELS:,} pixels; cut it into tiles or shrink it") from error
    require_decodable(size[1], size[0])
    refuse_lost_bits(image, file)
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


def fits(bands: int, channels: int, colours: bool) -> bool:
    """Whether `fit_channels` makes so many channels of bands."""
    gray_as_rgb = (bands, channels) == (1, 3)
    return bands == channels or gray_as_rgb or (colours and bands <= 4 and channels in (1, 3, 4))


def fit_channels(pixels: np.ndarray, channels: int, colours: bool) -> np.ndarray:
    """Return pixels (h, w, bands) with so many channels: gray as RGB, and of `colours` RGB as gray or with alpha.

    Raises:
        ValueError: if the bands mean something else.
    """
    bands = pixels.shape[2]
    if not fits(bands, channels, colours):
        raise ValueError(f"{bands} bands where {channels} are wanted")
    if bands == channels:
        return pixels
    shown = pixels[..., : bands - 1 + bands % 2]  # without alpha, which comes second or fourth
    if channels == 1:
        if pixels.dtype.kind == "f":
            return (shown @ (np.array(LUMA, np.float32) / 65536))[..., None] if bands > 2 else shown
        exact = shown.astype(np.uint32) @ np.array(LUMA, np.uint32) + 32768 >> 16 if bands > 2 else shown[..., 0]
        return exact[..., None].astype(pixels.dtype)
    shown = shown.repeat(3 // shown.shape[2], axis=2)
    if channels == 3:
        return shown
    full = np.full((*pixels.shape[:2], 1), FULL[kind_of(pixels.dtype)], pixels.dtype)
    return np.concatenate([shown, full if bands % 2 else pixels[..., -1:]], axis=2)


def pillow_kind(image: Image.Image) -> torch.dtype:
    """Return the kind of pixels that an image opened by Pillow has."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return torch.uint16
    return torch.float32 if image.mode in ("I", "F") else torch.uint8


def decode(
    image: Image.Image, channels: int, reading: Reading = AS_STORED, tagged: float | None = None
) -> np.ndarray:
    """Turn a PIL image into pixels (h, w, channels), as deep as they are; `tagged` names its file's no-data.

    Raises:
        ValueError: if it has other channels, or no-data that `reading` refuses.
    """
    kind = pillow_kind(image)
    if kind != torch.uint8:
        pixels = np.asarray(image)[..., None]
        pixels = pixels.astype(np.uint16) if kind == torch.uint16 else as_pixels(pixels)
    elif (reading.nodata, tagged) == (None, None) and channels in PIL_MODES:
        converted = np.asarray(image.convert(PIL_MODES[channels]))
        return converted if converted.ndim == 3 else converted[..., None]
    elif image.mode == "P" and tagged is not None:
        raise ValueError("a palette of which a color is no-data; save it as gray or RGB")
    else:
        seen = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
        pixels = np.atleast_3d(np.asarray(image.convert(seen)))
    return fit_channels(without_nodata(pixels, reading, tagged), channels, colours=True)


class Turn(NamedTuple):
    """How an image as stored becomes what a person sees."""

    swapped: bool = False
    """Its sides, first."""
    upside_down: bool = False
    mirrored: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of what is seen of an image stored with those, or the other way round."""
        return (width, height) if self.swapped else (height, width)

    def stored(self, part: Part, seen: tuple[int, int]) -> Part:
        """Return which part of the stored image a part of what is seen is."""
        top = seen[0] - part.top - part.height if self.upside_down else part.top
        left = seen[1] - part.left - part.width if self.mirrored else part.left
        if self.swapped:
            return Part(left, top, part.width, part.height, (part.enough[1], part.enough[0]))
        return part._replace(top=top, left=left)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Turn stored pixels (h, w, bands)."""
        pixels = pixels.transpose(1, 0, 2) if self.swapped else pixels
        return pixels[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]


UPRIGHT = Turn()

TURNS = {
    2: Turn(mirrored=True),
    3: Turn(upside_down=True, mirrored=True),
    4: Turn(upside_down=True),
    5: Turn(swapped=True),
    6: Turn(swapped=True, mirrored=True),
    7: Turn(swapped=True, upside_down=True, mirrored=True),
    8: Turn(swapped=True, upside_down=True),
}
"""By EXIF's orientation."""


def pillow_turn(image: Image.Image) -> Turn:
    """Return how an image opened by Pillow, which need not be loaded, is turned."""
    if image.format == "TIFF":  # which Pillow turns itself
        return UPRIGHT
    exif = Image.Image.getexif(image)  # a PNG's own would decode it, to look behind the pixels
    file = getattr(image, "fp", None)
    if image.format == "PNG" and "exif" not in image.info and file:
        place = file.tell()
        if behind := png_chunks(file).get(b"eXIf"):
            exif.load(behind)
        file.seek(place)
    return TURNS.get(exif.get(ORIENTATION, 1), UPRIGHT)


def decode_part(
    image: Image.Image,
    choose: Callable[[int, int], Part],
    channels: int,
    reading: Reading = AS_STORED,
    turn: Turn = UPRIGHT,
) -> np.ndarray:
    """Return the part of a PIL image, which need not be loaded, that `choose` takes: pixels (h, w, channels).

    `choose` and what is returned are of the image as a person sees it, after `turn`. A JPEG is decoded at 1/2, 1/4
    or 1/8 of its sides where that leaves as many pixels as wanted.

    Raises:
        ValueError: if it has several pages; damaged ones raise whatever Pillow does.
    """
    refuse_pages(image)
    tagged = geotiff_nodata(getattr(image, "tag_v2", {}).get(GDAL_NODATA))
    if image.format not in ("JPEG", "MPO"):
        image.load()  # before its size is asked for, which decoding may change
    full_width, full_height = image.size
    seen = turn.size(full_height, full_width)
    top, left, height, width, enough = turn.stored(choose(*seen), seen)
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
    if box == (0, 0, *image.size):
        return turn(decode(image, channels, reading, tagged))
    cropped = image.crop(box)
    cropped.format = image.format  # which says how deep its numbers are, and which Pillow forgets
    return turn(decode(cropped, channels, reading, tagged))


def is_deep_tiff(image: Image.Image) -> bool:
    """Whether a TIFF has other numbers or bands than Pillow keeps, or a band on each of its pages."""
    if image.format != "TIFF":
        return False
    tags: Any = getattr(image, "tag_v2", {})
    deep = max(tags.get(BITS_PER_SAMPLE, (1,))) > 8 or {*tags.get(SAMPLE_FORMAT, (1,))} != {1}
    others = not {*tags.get(EXTRA_SAMPLES, ())} <= {*ALPHA}
    described = str(tags.get(DESCRIPTION, ""))
    stack = getattr(image, "is_animated", False) and ("<OME" in described or described.startswith("ImageJ="))
    return deep or others or stack


def is_cut_tiff(image: Image.Image) -> bool:
    """Whether tifffile gives the same pixels of a TIFF as Pillow, and parts of it far sooner."""
    tags: Any = getattr(image, "tag_v2", {})
    plain = tags.get(PHOTOMETRIC) in PLAIN and set(tags.get(BITS_PER_SAMPLE, ())) == {8}
    large = image.format == "TIFF" and image.width * image.height > CUT_PIXELS
    return large and plain and find_spec("tifffile") is not None


AVIF_HEAD = 1 << 12
"""Bytes of an AVIF that hold what is said of its pixels."""


def is_deep_avif(head: bytes) -> bool:
    """Whether an AVIF has 10 or 12 bits, by the flag "high_bitdepth" of its AV1 configuration."""
    place = head.find(b"av1C")
    return place >= 0 and any(byte & 0x40 for byte in head[place + 6 : place + 7])


def refuse_lost_bits(image: Image.Image, file: IO[bytes]) -> None:
    """Raise an error for an image of more than 8 bits a channel of which Pillow would keep eight.

    Raises:
        ValueError: if it is one.
    """
    codec, _, _, arguments = (*getattr(image, "tile", ()), (None, None, None, ()))[0]
    last = arguments[-1] if isinstance(arguments, tuple) and arguments else None
    sgi = codec == "SGI16" or (codec == "sgi_rle" and last == 2)
    ppm = image.format == "PPM" and image.mode == "RGB" and isinstance(last, int) and last > 255
    if sgi or ppm:
        raise ValueError(f"{image.format} of 16 bits a channel, of which 8 would be kept; save it as PNG or TIFF")
    if image.format == "AVIF":
        file.seek(0)
        if is_deep_avif(file.read(AVIF_HEAD)):
            raise ValueError("AVIF of more than 8 bits, of which 8 would be kept; save it as PNG or TIFF")


Read = Callable[[Callable[[int, int], Part], int], np.ndarray]
"""Takes what chooses a part, and channels; returns the part's pixels (h, w, channels)."""


def _read_deep(image: Opened, reading: Reading, choose: Callable[[int, int], Part], channels: int) -> np.ndarray:
    turn = TURNS.get(image.orientation, UPRIGHT)
    seen = turn.size(image.height, image.width)
    top, left, height, width, _ = turn.stored(choose(*seen), seen)
    require_decodable(height, width, bands=image.bands)
    pixels = without_nodata(image.read((top, left, height, width)), reading, image.nodata)
    return turn(fit_channels(pixels, channels, image.colours))


class Slice(NamedTuple):
    """A slice of a NIfTI volume."""

    file: IO[bytes]
    number: int


class OpenImage(NamedTuple):
    """An image that is open, not decoded."""

    size: tuple[int, int]
    """Height and width as a person sees it."""
    bands: int
    colours: bool
    """Whether bands are gray or RGB, with an alpha channel or without."""
    kind: torch.dtype
    read: Read

    @property
    def channels(self) -> int:
        """How many bands there are, transparency not counted."""
        return {2: 1, 4: 3}.get(self.bands, self.bands) if self.colours else self.bands


def open_file(file: IO[bytes], reading: Reading = AS_STORED) -> Image.Image | Opened:
    """Open an image file of any type, recognised by its content: with Pillow what has 8 bits, else deeper."""
    open_deep = find_reader(file)
    if open_deep is None:
        try:
            image = open_image(file)
            if not (is_deep_tiff(image) or is_cut_tiff(image)):
                return image
        except (UnidentifiedImageError, TooLarge):
            if not is_tiff(file):
                raise
        file.seek(0)
        open_deep = open_tiff
    return open_deep(file, reading)


def _open(file: IO[bytes] | Image.Image | Slice, reading: Reading) -> OpenImage:
    if isinstance(file, Slice):
        opened = open_nifti(file.file, number=file.number)
    elif isinstance(file, Image.Image):
        opened = file
    else:
        opened = open_file(file, reading)
    if isinstance(opened, Opened):
        size = TURNS.get(opened.orientation, UPRIGHT).size(opened.height, opened.width)
        read = functools.partial(_read_deep, opened, reading)
        return OpenImage(size, opened.bands, opened.colours, opened.kind, read)
    bands = (1 if opened.mode.split(";")[0] in GRAY_MODES else 3) + opened.has_transparency_data
    turn = pillow_turn(opened)
    read = functools.partial(decode_part, opened, reading=reading, turn=turn)
    return OpenImage(turn.size(opened.height, opened.width), bands, True, pillow_kind(opened), read)


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
    return _open(file, reading)[-2:]


def image_size(file: IO[bytes]) -> tuple[int, int]:
    """Return height and width of an image file of any type without decoding it; raises as `open_pixels`."""
    return _open(file, AS_STORED).size


class Files(Protocol):
    """What images are read from, by index."""

    labels: np.ndarray | None
    """int64 (n,), each image's class from 0 on; None where images have none."""
    class_names: tuple[str, ...] | None
    """By label; None without labels, or where nothing names them."""

    @property
    def ends(self) -> Collection[str]:
        """The ends of names that occur, such as .jpg."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str:
        """Return what a person would look for."""
        ...

    def open(self, index: int, /) -> IO[bytes] | Image.Image | Slice:
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


class DatasetFiles:
    """The rows of a dataset that timm or torchvision opens, called `name`."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)
        self.dataset_name = name
        if hasattr(dataset, "loader"):
            dataset.loader = BoundedFile  # decoded here, like other files
        self.labels, self.class_names = _labels_of(dataset)
        if self.labels is not None and len(self.labels):
            check_labels(self.labels, name)

    @property
    def ends(self) -> Collection[str]:
        return {extension(self.name(index)) for index in range(len(self))}

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        if self.reader is not None:
            try:
                if name := self.reader.filename(index, absolute=True):
                    return str(name)
            except (KeyError, NotImplementedError, TypeError):
                pass  # timm's readers of nameless rows
        return f"{self.dataset_name}[{index}]"

    def open(self, index: int) -> IO[bytes] | Image.Image:
        return (self.dataset if self.reader is None else self.reader)[index][0]


VOLUMES = frozenset({".nii", ".nii.gz"})
"""Ends of the names of volumes."""


def _count_slices(files: Files, index: int) -> int:
    if extension(files.name(index)) not in VOLUMES:
        return 1
    try:
        file = files.open(index)
        if isinstance(file, Image.Image | Slice):
            return 1
        with file:
            return count_slices(file)
    except Exception:  # training names the images that do not decode
        return 1


class Volumes:
    """Files of which volumes count as images, one for each of their slices.

    Args:
        files: some of them NIfTI.
        counts: slices of each, one of an image.
    """

    def __init__(self, files: Files, counts: np.ndarray) -> None:
        self.files = files
        self.file_of = np.repeat(np.arange(len(files)), counts)
        self.slices = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        """Number of each image in its file; -1 of what is no volume."""
        self.slices[counts[self.file_of] == 1] = -1
        self.labels = None if files.labels is None else files.labels[self.file_of]
        self.class_names = files.class_names
        self.ends = files.ends

    @classmethod
    def in_slices(cls, files: Files) -> Files:
        """Return files whose volumes, if there are any, are slices."""
        if VOLUMES.isdisjoint(files.ends):
            return files
        counts = np.array([_count_slices(files, index) for index in range(len(files))], np.int64)
        return cls(files, counts) if counts.max(initial=1) > 1 else files

    def __len__(self) -> int:
        return len(self.file_of)

    def name(self, index: int) -> str:
        name, number = self.files.name(self.file_of[index]), self.slices[index]
        return name if number < 0 else f"{name}[slice {number}]"

    def open(self, index: int) -> IO[bytes] | Image.Image | Slice:
        file, number = self.files.open(self.file_of[index]), int(self.slices[index])
        return file if number < 0 or isinstance(file, Image.Image | Slice) else Slice(file, number)


class ImageSource:
    """Images from files, each decoded when it is loaded, all as pixels of one kind.

    Args:
        files: that they are in.
        channels: of what is loaded; None for as many as most of some images have, those in gray and transparency
            not counted.
        place: see `Source`.
        reading: what becomes of their pixels; without a kind, that of the deepest of some images.

    Raises:
        UserError: if none of the images looked at has bands that fit, or a library that they need is missing.
    """

    shards: Shards | None = None

    def __init__(
        self, files: Files, channels: int | None, place: Path | None, reading: Reading = AS_STORED
    ) -> None:
        self.files = files
        self.place = place
        self.reading = reading
        seen = dict(self._look())
        first = next(iter(seen.values()), None)
        counts = [image.channels for image in seen.values()]
        self.channels = channels or statistics.mode([n for n in counts if n > 1] or counts or [3])
        if first and not any(fits(image.bands, self.channels, image.colours) for image in seen.values()):
            raise UserError(
                f"{self.describe(next(iter(seen)))}: {first.bands} bands, but model.in_chans is {self.channels}; "
                f"set model.in_chans={first.bands}, and data.mean and data.std with {first.bands} values, which "
                "fcmae stats computes"
            )
        kinds = [image.kind for image in seen.values()]
        self.dtype = reading.kind(max(kinds, key=[*FULL].index, default=torch.uint8))

    @property
    def labels(self) -> np.ndarray | None:
        return self.files.labels

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.files.class_names

    def __len__(self) -> int:
        return len(self.files)

    def _look(self) -> Iterator[tuple[int, OpenImage]]:
        for index in spread(len(self), LOOKED_AT):
            try:
                with self._opened(index) as image:
                    yield index, image
            except MissingLibrary as error:
                raise UserError(f"{self.describe(index)}: {error}") from error
            except Exception:  # training names the images that do not decode
                continue

    def stored(self, index: int) -> tuple[torch.dtype, int]:
        """Return the kind of an image's own pixels and its channels; raises whatever opening raises."""
        with self._opened(index) as image:
            return image.kind, image.channels

    @contextmanager
    def _opened(self, index: int) -> Iterator[OpenImage]:
        opened = self.files.open(index)
        file = opened.file if isinstance(opened, Slice) else opened
        with nullcontext() if isinstance(file, Image.Image) else file:
            yield _open(opened, self.reading)

    def size(self, index: int) -> tuple[int, int]:
        with self._opened(index) as image:
            return image.size

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        with self._opened(index) as image:
            pixels = np.array(image.read(choose, self.channels), order="C")  # of its own, which can be written to
        if self.reading.kind(self.dtype) == torch.float32 and not self.reading.dtype and pixels.dtype.kind != "f":
            raise ValueError(f"{pixels.dtype} pixels among floats; set data.dtype=float32 to take them as 0 to 1")
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
    name: str, root: str, split: str | None, channels: int | None, what: str, reading: Reading = AS_STORED
) -> ImageSource:
    """Open image files, or a map-style dataset of timm's `create_dataset`.

    Args:
        name: "folder", "", or one that begins with "hfds/" or "torch/".
        root: the folder of the images, the tar file, or the cache folder of others.
        split: of the others; None where `root` is all images, in any arrangement.
        channels: see `ImageSource`.
        what: how messages name it, such as "data.root=pets".
        reading: see `ImageSource`.

    Raises:
        UserError: if it cannot be opened, or nothing in it is an image.
    """
    try:
        files = Volumes.in_slices(_open_files(name, root, split))
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
