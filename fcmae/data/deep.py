"""Image files that Pillow does not hold: deeper pixels, more bands, arrays, medical images; knows no sources.

Each reader opens a file without decoding all of it where the format allows, and reads a box of it.
"""

import math
import struct
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy_format

from fcmae.data.pixels import as_pixels, kind_of

Box = tuple[int, int, int, int]
"""Top, left, height, width."""


MAX_PIXELS = 1 << 27
"""Of an image, or a part of one, that is decoded, at most: that takes up to 2 GB and ten seconds."""


class Opened(NamedTuple):
    """An image that is open, not decoded."""

    height: int
    width: int
    bands: int
    kind: torch.dtype
    read: Callable[[Box], np.ndarray]
    """Returns the pixels of a box: uint8, uint16 or float32 (h, w, bands)."""
    alpha: bool = False
    """Whether the last band is transparency."""


def _library(name: str, extra: str, what: str) -> Any:
    """Import the library of an extra.

    Raises:
        ValueError: naming the extra, if it is missing.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"{what} needs {name}: pip install 'fcmae[{extra}]'") from error


class TooLarge(ValueError):
    """An image, or the part of it that is decoded at once, has over `MAX_PIXELS`."""


def require_decodable(height: int, width: int, what: str = "") -> None:
    """Refuse to decode over `MAX_PIXELS` at once; `what` says of which part of an image they are.

    Raises:
        TooLarge: if they are more.
    """
    if height * width > MAX_PIXELS:
        raise TooLarge(f"{width:,} x {height:,} pixels{what}, over {MAX_PIXELS:,}; cut it into tiles or shrink it")


def _read_rows(file: Any, start: int, shape: tuple[int, int, int], dtype: np.dtype, box: Box) -> np.ndarray:
    """Read a box out of uncompressed pixels (h, w, bands) that begin at byte `start`, and nothing else."""
    top, left, height, width = box
    _, row, bands = shape
    out = np.empty((height, width, bands), dtype)
    length = out[0].nbytes
    for y in range(height):
        file.seek(start + ((top + y) * row + left) * bands * dtype.itemsize)
        content = file.read(length)
        if len(content) != length:
            raise ValueError("cut off")
        out[y] = np.frombuffer(content, dtype).reshape(width, bands)
    return out


def _of_array(pixels: np.ndarray) -> Opened:
    """An image that had to be decoded to be opened, (h, w) or (h, w, bands)."""
    whole = pixels if pixels.ndim == 3 else pixels[..., None]
    height, width, bands = whole.shape

    def read(box: Box) -> np.ndarray:
        top, left, height, width = box
        return as_pixels(whole[top : top + height, left : left + width])

    return Opened(height, width, bands, kind_of(whole.dtype), read)


# PNG of 16 bits

PNG_BANDS = {2: 3, 4: 2, 6: 4}
"""By colour type."""


def open_png(file: IO[bytes]) -> Opened:
    """Open a PNG of 16 bits a channel in several channels, of which Pillow keeps eight."""
    decode = _library("imagecodecs", "deep", "a PNG of 16 bits in colours").png_decode
    content = file.read()
    width, height, _, colours = struct.unpack(">IIBB", content[16:26])
    require_decodable(height, width)

    def read(box: Box) -> np.ndarray:
        return _of_array(decode(content)).read(box)

    return Opened(height, width, PNG_BANDS.get(colours, 3), torch.uint16, read, alpha=colours in (4, 6))


# TIFF


PLAIN, YCBCR, JPEG = (1, 2), 6, 7
"""What the channels of a TIFF may mean: gray, from black, or RGB; and what a decoder of JPEG makes RGB of."""


def _band_pages(tiff: Any) -> list[Any]:
    """Return the pages of a TIFF that are one image: one, or a band each where the file says so.

    Raises:
        ValueError: if there are several images.
    """
    pages = [page for page in tiff.pages if not (page.is_reduced or page.is_mask)] or [tiff.pages[0]]
    if len(pages) > 1 and not (tiff.series[0].axes == "CYX" and len(tiff.series) == 1):  # as OME and ImageJ write
        raise ValueError(f"{len(pages)} pages; split it into one file per page, as tiffsplit does")
    return [page.aspage() for page in pages]


def _read_page(page: Any, box: Box) -> np.ndarray:
    """Decode the tiles or strips of a page that a box meets: (h, w, bands)."""
    top, left, height, width = box
    separate, _, full_height, full_width, contiguous = page.shaped
    handle = page.parent.filehandle
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    if page.is_contiguous and not page.is_tiled and (page.predictor, page.fillorder) == (1, 1):
        dtype, shape = page.dtype.newbyteorder(page.parent.byteorder), (full_height, full_width, contiguous)
        starts = (page.dataoffsets[0] + band * math.prod(shape) * dtype.itemsize for band in range(separate))
        return np.concatenate([_read_rows(handle, start, shape, dtype, box) for start in starts], axis=2)
    require_decodable(min(tall, full_height), wide, f" in a {'tile' if page.is_tiled else 'strip'} of the file")
    out = np.zeros((separate, height, width, contiguous), page.dtype)
    down, across = math.ceil(page.imagelength / tall), math.ceil(page.imagewidth / wide)
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.jpegtables else {}
    for band in range(separate):
        for i in range(top // tall, math.ceil((top + height) / tall)):
            for j in range(left // wide, math.ceil((left + width) / wide)):
                index = (band * down + i) * across + j
                handle.seek(page.dataoffsets[index])
                content = handle.read(page.databytecounts[index]) if page.databytecounts[index] else None
                segment, place, shape = page.decode(content, index, **tables)
                if segment is None:  # sparse: all of it is this value
                    segment = np.full(shape, page.nodata, page.dtype)
                y, x = place[2], place[3]
                y0, x0 = max(y, top), max(x, left)
                y1, x1 = min(y + shape[1], top + height), min(x + shape[2], left + width)
                part = segment[0, y0 - y : y1 - y, x0 - x : x1 - x]
                out[band, y0 - top : y1 - top, x0 - left : x1 - left] = part
    return np.moveaxis(out, 0, 2).reshape(height, width, separate * contiguous)


def open_tiff(file: IO[bytes]) -> Opened:
    """Open a TIFF of any bands and depth; only the tiles or strips that a box meets are decoded."""
    tifffile = _library("tifffile", "deep", "a TIFF of more than 8 bits, or of other bands than Pillow reads,")
    pages = _band_pages(tifffile.TiffFile(file))
    first = pages[0]
    if first.imagedepth != 1:
        raise ValueError("a volume; save the slices that are wanted as files of their own")
    if first.photometric not in PLAIN and not (first.photometric == YCBCR and first.compression == JPEG):
        colours = getattr(first.photometric, "name", first.photometric)
        raise ValueError(f"{colours} in a TIFF that is deep, or over {MAX_PIXELS:,} pixels; save it as gray or RGB")
    if any(page.shaped != first.shaped or page.dtype != first.dtype for page in pages):
        raise ValueError("pages of different sizes")

    def read(box: Box) -> np.ndarray:
        return as_pixels(np.concatenate([_read_page(page, box) for page in pages], axis=2))

    bands = len(pages) * first.shaped[0] * first.shaped[4]
    alpha = first.extrasamples in ((1,), (2,))  # associated with the colours, or not
    return Opened(first.imagelength, first.imagewidth, bands, kind_of(first.dtype), read, alpha)


# Arrays


def open_npy(file: IO[bytes]) -> Opened:
    """Open a .npy file of one image, (h, w) or (h, w, bands)."""
    version = npy_format.read_magic(file)
    read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, fortran_order, dtype = read_header(file)
    if dtype.kind not in "biuf" or len(shape) not in (2, 3) or min(shape) < 1 or fortran_order:
        raise ValueError(f"{dtype} {shape}; an image is numbers (h, w) or (h, w, bands) in C order")
    start, (height, width, bands) = file.tell(), (*shape, 1)[:3]

    def read(box: Box) -> np.ndarray:
        return as_pixels(_read_rows(file, start, (height, width, bands), dtype, box))

    return Opened(height, width, bands, kind_of(dtype), read)


# Medical images


def open_dicom(file: IO[bytes]) -> Opened:
    """Open a DICOM image: its values as its rescale slope and intercept make them, in Hounsfield units for CT."""
    pydicom = _library("pydicom", "dicom", "a DICOM image")
    luts = _library("pydicom.pixels", "dicom", "a DICOM image")
    dataset = pydicom.dcmread(file)
    if "PixelData" not in dataset:
        raise ValueError("DICOM without an image")
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        raise ValueError(f"{dataset.NumberOfFrames} frames; save those that are wanted as files of their own")
    require_decodable(dataset.Rows, dataset.Columns)
    pixels = dataset.pixel_array
    if pixels.ndim == 2:
        if dataset.PhotometricInterpretation == "MONOCHROME1":  # in which low values are bright
            pixels = ((1 << dataset.BitsStored) - 1 - pixels.astype(np.int64)).astype(pixels.dtype)
        pixels = luts.apply_modality_lut(pixels, dataset)
    return _of_array(pixels)


READERS: tuple[tuple[Callable[[bytes], bool], Callable[[IO[bytes]], Opened]], ...] = (
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n") and head[24:25] == b"\x10" and head[25] > 0, open_png),
    (lambda head: head.startswith(b"\x93NUMPY"), open_npy),
    (lambda head: head[128:132] == b"DICM", open_dicom),
)
"""How a file's first bytes look, what opens it; TIFFs are looked at by Pillow first."""

EXTENSIONS = frozenset([".dcm", ".dicom", ".npy"])
"""Ends of names of image files beside those that Pillow knows."""

TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

HEAD = 132
"""Bytes that tell."""


def is_tiff(file: IO[bytes]) -> bool:
    """Whether a file begins as a TIFF or BigTIFF does."""
    file.seek(0)
    return file.read(4) in TIFF_HEADS


def find_reader(file: IO[bytes]) -> Callable[[IO[bytes]], Opened] | None:
    """Return what opens a file, by its content; None for what Pillow does."""
    head = file.read(HEAD)
    file.seek(0)
    return next((opens for recognises, opens in READERS if recognises(head)), None)
