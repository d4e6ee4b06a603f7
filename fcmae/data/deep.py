"""Image files that Pillow does not hold: deeper pixels, more bands, arrays, medical images; knows no sources.

Each reader opens a file without decoding all of it where the format allows, and reads a box of it.
"""

import gzip
import itertools
import logging
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy_format
from PIL import Image

from fcmae.data.pixels import AS_STORED, Reading, as_pixels, kind_of

for library in ("PIL", "pydicom", "tifffile"):  # what they find odd is not printed: a file is read, or says why not
    logging.getLogger(library).addHandler(logging.NullHandler())

Box = tuple[int, int, int, int]
"""Top, left, height, width."""

MAX_PIXELS = 1 << 27
"""Of an image, or a part of one, that is decoded, at most: that takes up to 2 GB and ten seconds."""

MAX_PAGES = 1 << 12
"""Pages of a TIFF at most, with a band each."""

ORIENTATION = 274
"""The tag of EXIF and TIFF that says how an image is turned."""


class Opened(NamedTuple):
    """An image that is open, not decoded."""

    height: int
    width: int
    bands: int
    kind: torch.dtype
    read: Callable[[Box], np.ndarray]
    """Returns the pixels of a box: uint8, uint16 or float32 (h, w, bands)."""
    colours: bool = False
    """Whether bands are gray or RGB, with an alpha channel or without."""
    orientation: int = 1
    """How the image is turned, as EXIF numbers it; height, width and boxes are as stored."""
    nodata: float | None = None
    """Value of pixels that are not known, where the file names one."""


class MissingLibrary(ValueError):
    """A library that a type of images needs is not installed."""


def _library(name: str, extra: str, what: str) -> Any:
    """Import the library of an extra.

    Raises:
        MissingLibrary: naming the extra.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingLibrary(f"{what} needs {name.split('.')[0]}: pip install 'fcmae[{extra}]'") from error


class TooLarge(ValueError):
    """An image, or the part of it that is decoded at once, has over `MAX_PIXELS`."""


def require_decodable(height: int, width: int, what: str = "", *, bands: int = 1) -> None:
    """Refuse to decode over `MAX_PIXELS` of four bands at once; `what` says of which part of an image they are.

    Raises:
        TooLarge: if they are more.
    """
    if height * width * max(4, bands) > 4 * MAX_PIXELS:
        what = f"{what} in {bands:,} bands" if bands > 4 else what
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


def _of_whole(
    decode: Callable[[], np.ndarray], shape: tuple[int, int, int], kind: torch.dtype, **more: Any
) -> Opened:
    """An image that can only be decoded whole, (h, w) or (h, w, bands), and must have the declared shape."""
    require_decodable(*shape[:2], bands=shape[2])

    def read(box: Box) -> np.ndarray:
        pixels = decode()
        if pixels.shape not in (shape, shape[: 2 if shape[2] == 1 else 3]):
            raise ValueError(f"damaged: pixels {pixels.shape}, of which its header says {shape}")
        top, left, height, width = box
        return as_pixels(pixels.reshape(shape)[top : top + height, left : left + width])

    return Opened(*shape, kind, read, **more)


# PNG and JPEG 2000 of more than eight bits

PNG_BANDS = {2: 3, 4: 2, 6: 4}
"""By colour type."""


def png_chunks(file: IO[bytes]) -> dict[bytes, bytes]:
    """Return the chunks of a PNG but those of its pixels, by name, as far as it is whole; nothing is decoded."""
    place, found = 8, dict[bytes, bytes]()
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return found
        length = int.from_bytes(head[:4], "big")
        if head[4:] != b"IDAT":
            found[head[4:]] = file.read(min(length, 1 << 20))
        place += 12 + length


def open_png(file: IO[bytes], _: Reading = AS_STORED) -> Opened:
    """Open a PNG of 16 bits a channel in several channels, of which Pillow keeps eight."""
    decode = _library("imagecodecs", "deep", "a PNG of 16 bits in colours").png_decode
    chunks = png_chunks(file)
    if b"acTL" in chunks:
        raise ValueError("an animation; save the frames that are wanted as files of their own")
    width, height, _bits, colours = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    file.seek(0)
    content = file.read()
    exif = Image.Exif()
    exif.load(chunks.get(b"eXIf", b""))
    shape = height, width, PNG_BANDS.get(colours, 3)
    turn = exif.get(ORIENTATION, 1)
    return _of_whole(lambda: decode(content), shape, torch.uint16, colours=True, orientation=turn)


class _Jpeg2000(NamedTuple):
    height: int
    width: int
    bands: int
    bits: int
    signed: bool

    @classmethod
    def of(cls, head: bytes) -> "_Jpeg2000 | None":
        """Read what the first bytes of a JPEG 2000 image say of it; None of other files."""
        start = head.find(b"\xff\x4f\xff\x51")  # of its codestream
        if start < 0 or not (start == 0 or head[4:8] == b"jP  ") or len(head) < start + 43:
            return None
        right, bottom, left, top = struct.unpack_from(">IIII", head, start + 8)
        bands, depth = struct.unpack_from(">HB", head, start + 40)
        return cls(bottom - top, right - left, bands, (depth & 0x7F) + 1, depth > 0x7F)


def _is_deep_jpeg2000(head: bytes) -> bool:
    image = _Jpeg2000.of(head)
    return image is not None and image.bands > 1 and image.bits > 8


def open_jpeg2000(file: IO[bytes], _: Reading = AS_STORED) -> Opened:
    """Open a JPEG 2000 image of several channels of more than 8 bits, of which Pillow keeps eight."""
    decode = _library("imagecodecs", "deep", "a JPEG 2000 of more than 8 bits in colours").jpeg2k_decode
    content = file.read()
    image = _Jpeg2000.of(content[:HEAD])
    assert image is not None
    kind = torch.float32 if image.signed or image.bits > 16 else torch.uint16
    return _of_whole(lambda: decode(content), image[:3], kind, colours=image.bands <= 4)


# TIFF

MINISWHITE, GRAY, PLAIN, YCBCR, JPEG = 0, (0, 1), (1, 2), 6, 7
"""What the channels of a TIFF may mean: gray from white, gray, gray from black or RGB, and what a decoder of JPEG
makes RGB of."""

ALPHA = (1, 2)
"""How the tag of what channels there are besides numbers alpha."""

GDAL_NODATA = 42113
"""The tag of a GeoTIFF that names the value of pixels that are not known."""


def geotiff_nodata(text: object) -> float | None:
    """Return the number that the GDAL_NODATA tag holds; None where it holds none."""
    try:
        return float(str(text).strip("\0 ").replace(",", "."))
    except ValueError:
        return None


def _holds(dtype: np.dtype, number: float) -> bool:
    if dtype.kind in "fb":
        return dtype.kind == "f"
    return number.is_integer() and np.iinfo(dtype).min <= number <= np.iinfo(dtype).max


def _channels(description: str) -> int | None:
    """Return of how many channels alone a stack is, as OME and ImageJ describe it; None of other stacks."""
    if description.startswith("ImageJ="):
        sizes = dict(re.findall(r"^(images|channels)=(\d+)$", description, re.MULTILINE))
        return int(sizes["channels"]) if sizes.get("images") == sizes.get("channels", "") else None
    sizes = re.findall(r'\bSize([ZCT])="(\d+)"', description)
    others = [number for axis, number in sizes if axis != "C"]
    return int(dict(sizes)["C"]) if sorted(dict(sizes)) == ["C", "T", "Z"] and {*others} == {"1"} else None


def _band_pages(tiff: Any) -> list[Any]:
    """Return the pages of a TIFF that are one image: one, or a band each where the file says so.

    Raises:
        ValueError: if there are several images.
    """
    pages: list[Any] = []
    for page in itertools.islice(tiff.pages, MAX_PAGES):
        page = page.aspage()
        if page.is_reduced or page.is_mask:
            continue
        if pages and (page.shaped, page.dtype) != (pages[0].shaped, pages[0].dtype):  # or damaged without end
            raise ValueError("pages of different sizes; split it into one file per page, as tiffsplit does")
        pages.append(page)
    pages = pages or [tiff.pages[0]]
    if len(pages) > 1 and _channels(pages[0].description) != len(pages):
        raise ValueError(f"{len(pages)} pages; split it into one file per page, as tiffsplit does")
    return pages


def _read_page(page: Any, box: Box, empty: float) -> np.ndarray:
    """Decode the tiles or strips of a page that a box meets: (h, w, bands); those left out are `empty`."""
    top, left, height, width = box
    separate, _, full_height, full_width, contiguous = page.shaped
    handle = page.parent.filehandle
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    if page.is_contiguous and not page.is_tiled and (page.predictor, page.fillorder) == (1, 1):
        dtype, shape = page.dtype.newbyteorder(page.parent.byteorder), (full_height, full_width, contiguous)
        starts = (page.dataoffsets[0] + band * math.prod(shape) * dtype.itemsize for band in range(separate))
        return np.concatenate([_read_rows(handle, start, shape, dtype, box) for start in starts], axis=2)
    rows = tall if page.is_tiled else min(tall, full_height)
    require_decodable(rows, wide, f" in a {'tile' if page.is_tiled else 'strip'} of the file", bands=contiguous)
    out = np.zeros((separate, height, width, contiguous), page.dtype)
    down, across = math.ceil(full_height / tall), math.ceil(full_width / wide)
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.jpegtables else {}
    for band in range(separate):
        for i in range(top // tall, math.ceil((top + height) / tall)):
            for j in range(left // wide, math.ceil((left + width) / wide)):
                index = (band * down + i) * across + j
                length = page.databytecounts[index]
                handle.seek(page.dataoffsets[index])
                content = handle.read(length)
                if len(content) != length:
                    raise ValueError("cut off")
                segment, place, shape = page.decode(content or None, index, **tables)
                if segment is None:  # sparse
                    segment = np.full(shape, empty, page.dtype)
                y, x = place[2], place[3]
                y0, x0 = max(y, top), max(x, left)
                y1, x1 = min(y + shape[1], top + height), min(x + shape[2], left + width)
                part = segment[0, y0 - y : y1 - y, x0 - x : x1 - x]
                out[band, y0 - top : y1 - top, x0 - left : x1 - left] = part
    return np.moveaxis(out, 0, 2).reshape(height, width, separate * contiguous)


def open_tiff(file: IO[bytes], _: Reading = AS_STORED) -> Opened:
    """Open a TIFF of any bands and depth; only the tiles or strips that a box meets are decoded."""
    tifffile = _library("tifffile", "deep", "a TIFF of more than 8 bits, or of other bands than Pillow reads,")
    pages = _band_pages(tifffile.TiffFile(file, _multifile=False))
    first = pages[0]
    sides = first.imagelength, first.imagewidth
    if not all(isinstance(side, int) and side > 0 for side in sides):  # a damaged one may have lists of them
        raise ValueError(f"damaged: {sides} pixels")
    if first.imagedepth != 1:
        raise ValueError("a volume; save the slices that are wanted as files of their own")
    photometric = first.photometric
    if photometric not in (MINISWHITE, *PLAIN) and not (photometric == YCBCR and first.compression == JPEG):
        colours = getattr(photometric, "name", photometric)
        raise ValueError(f"{colours} in a TIFF that is deep, or over {MAX_PIXELS:,} pixels; save it as gray or RGB")
    if first.dtype is None or first.dtype.kind not in "biuf":
        found = first.dtype or f"{first.bitspersample} bits"
        raise ValueError(f"{found} in place of pixels; save whole numbers or floats")
    bands = len(pages) * first.shaped[0] * first.shaped[4]
    nodata = geotiff_nodata(first.tags.valueof(GDAL_NODATA))
    whitest = (1 << first.bitspersample) - 1 if photometric == MINISWHITE and first.dtype.kind in "bu" else None
    empty = nodata if nodata is not None and _holds(first.dtype, nodata) else 0

    def read(box: Box) -> np.ndarray:
        numbers = np.concatenate([_read_page(page, box, empty) for page in pages], axis=2)
        return as_pixels(numbers if whitest is None else (whitest - numbers).astype(first.dtype))

    alpha = len(first.extrasamples) if {*first.extrasamples} <= {*ALPHA} else 0
    return Opened(
        *sides,
        bands,
        kind_of(first.dtype),
        read,
        colours=alpha <= 1 and bands - alpha == (1 if photometric in GRAY else 3),
        orientation=first.tags.valueof(ORIENTATION, 1),
        nodata=whitest - nodata if whitest is not None and nodata is not None else nodata,
    )


# Arrays


def open_npy(file: IO[bytes], _: Reading = AS_STORED) -> Opened:
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

DEFLATED = b"1.2.840.10008.1.2.1.99"

DICOM_CODECS = {
    **dict.fromkeys(("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"), "jpeg_decode"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"), "jpegsof3_decode"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"), "jpegls_decode"),
    **dict.fromkeys(("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"), "jpeg2k_decode"),
}
"""By transfer syntax (JPEG, lossless JPEG, JPEG-LS, JPEG 2000), what of imagecodecs does if pydicom cannot."""


def _decode_dicom(dataset: Any) -> np.ndarray:
    """Return a DICOM image's pixels as stored, colours as RGB: (h, w) or (h, w, 3)."""
    pixels = import_module("pydicom.pixels")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax not in DICOM_CODECS or pixels.get_decoder(syntax).is_available:
        return dataset.pixel_array
    what = f"DICOM compressed as {syntax.name}"
    decode = getattr(_library("imagecodecs", "dicom", what), DICOM_CODECS[syntax])
    frame = import_module("pydicom.encaps").get_frame(dataset.PixelData, 0, number_of_frames=1)
    decoded = decode(frame)
    if dataset.SamplesPerPixel != 1:
        raise ValueError(f"{what} in colours; save it uncompressed")
    return decoded.view(decoded.dtype.str.replace("u", "i")) if dataset.PixelRepresentation else decoded


def _window(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Apply a DICOM image's VOI LUT, or its first window, onto 0 to 1: float32."""
    pixels = import_module("pydicom.pixels")
    if dataset.get("VOILUTSequence"):
        full = 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        return (pixels.apply_voi(values, dataset) / full).astype(np.float32)
    if "WindowCenter" not in dataset or "WindowWidth" not in dataset:
        raise ValueError("DICOM without a window; set data.window=false")
    low, high = pixels.apply_windowing(np.array([-1e9, 1e9]), dataset)
    return ((pixels.apply_windowing(values, dataset) - low) / (high - low)).astype(np.float32)


def open_dicom(file: IO[bytes], reading: Reading = AS_STORED) -> Opened:
    """Open a DICOM image: its values as its rescale slope and intercept make them, in Hounsfield units for CT.

    Gray in which low values are bright (MONOCHROME1) is turned around. `reading.window` applies VOI LUT or window.
    """
    pydicom = _library("pydicom", "dicom", "a DICOM image")
    luts = _library("pydicom.pixels", "dicom", "a DICOM image")
    if DEFLATED in file.read(1 << 12):  # all of which would be unpacked, however much that is
        raise ValueError("deflated DICOM; save it otherwise, as dcmconv or gdcmconv does")
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(file)
    if "PixelData" not in dataset:
        raise ValueError("DICOM without an image of whole numbers")
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1:
        raise ValueError(f"{dataset.NumberOfFrames} frames; save those that are wanted as files of their own")
    photometric = dataset.PhotometricInterpretation
    gray, inverted = photometric.startswith("MONOCHROME"), photometric == "MONOCHROME1"
    identity = (float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))) == (1, 0)
    rescaled = gray and (not identity or bool(dataset.get("ModalityLUTSequence")))
    window = gray and reading.window
    bits, signed = int(dataset.BitsStored), bool(dataset.PixelRepresentation)

    def decode() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = _decode_dicom(dataset)
            if photometric == "PALETTE COLOR":
                return luts.apply_color_lut(pixels, dataset)
            if inverted and not window:
                pixels = ((-1 if signed else (1 << bits) - 1) - pixels.astype(np.int64)).astype(pixels.dtype)
            if rescaled:
                pixels = luts.apply_modality_lut(pixels, dataset)
            if window:
                seen = _window(pixels, dataset)
                return 1 - seen if inverted else seen
            return pixels.astype(np.float32) if rescaled else pixels

    if photometric == "PALETTE COLOR":
        bands, deep = 3, dataset.RedPaletteColorLookupTableDescriptor[2] > 8
    else:
        bands, deep = int(dataset.SamplesPerPixel), int(dataset.BitsAllocated) > 8
    exact = not (rescaled or window or signed or int(dataset.BitsAllocated) > 16)
    kind = (torch.uint16 if deep else torch.uint8) if exact else torch.float32
    return _of_whole(decode, (int(dataset.Rows), int(dataset.Columns), bands), kind, colours=True)


NIFTI_HEADERS = {348: "Nifti1Header", 540: "Nifti2Header"}
"""By length in bytes, which the first number of the file says."""


def is_gzip(head: bytes) -> bool:
    """Whether a file begins as gzip packs it."""
    return head.startswith(b"\x1f\x8b")


def is_nifti(head: bytes) -> bool:
    """Whether a file begins as a NIfTI image in one file does, packed by gzip or not."""
    try:
        head = zlib.decompressobj(31).decompress(head, 352) if is_gzip(head) else head
    except zlib.error:
        return False
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def _open_nifti_header(file: IO[bytes]) -> tuple[IO[bytes], Any, tuple[int, int, int]]:
    """Return a NIfTI file's content, unpacked as it is read, nibabel's header of it, and its shape.

    Raises:
        ValueError: if it is neither an image nor a volume.
    """
    nibabel = _library("nibabel", "nifti", "a NIfTI image")
    packed = is_gzip(file.read(2))
    file.seek(0)
    content: Any = gzip.GzipFile(fileobj=file) if packed else file
    first = content.read(4)
    length = next((n for n in NIFTI_HEADERS for order in ("little", "big") if n.to_bytes(4, order) == first), 348)
    content.seek(0)
    header = getattr(nibabel, NIFTI_HEADERS[length]).from_fileobj(content, check=False)
    shape = [int(length) for length in header.get_data_shape()]
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or not 0 < min(shape) <= max(shape) < 1 << 31:
        raise ValueError(f"NIfTI of {' x '.join(map(str, shape))}; save each volume, (h, w, slices), on its own")
    return content, header, (shape[0], shape[1], shape[2] if len(shape) > 2 else 1)


def open_nifti(file: IO[bytes], _: Reading = AS_STORED, *, number: int | None = None) -> Opened:
    """Open a NIfTI image, or a slice of a volume along its last axis, values scaled by slope and intercept.

    Pixels are as stored, the first axis height: nothing is turned. Of a file that is not packed, no more is read
    than is seen.

    Args:
        file: .nii or .nii.gz.
        number: of the slice; None where there must be only one.
    """
    content, header, (height, width, slices) = _open_nifti_header(file)
    if slices > 1 and number is None:
        raise ValueError(f"a volume of {slices} slices; save the slice that is wanted as a file of its own")
    stored = header.get_data_dtype()
    single = stored if stored.names is None else stored[0]  # red, green and blue, or not
    bands = stored.itemsize // single.itemsize
    if single.kind not in "biuf":
        raise ValueError(f"{stored} in place of pixels; save whole numbers or floats")
    start = max(int(header["vox_offset"]), int(header["sizeof_hdr"]) + 4)
    start += (number or 0) * height * width * stored.itemsize
    slope, intercept = header.get_slope_inter()
    exact = (slope, intercept) in ((None, None), (1, 0))

    def read(box: Box) -> np.ndarray:
        top, left, tall, wide = box  # in the file the first axis runs fastest
        numbers = _read_rows(content, start, (width, height, bands), single, (left, top, wide, tall)).swapaxes(0, 1)
        return as_pixels(numbers if exact else (numbers * slope + intercept).astype(np.float32))

    return Opened(height, width, bands, kind_of(single) if exact else torch.float32, read, colours=True)


def count_slices(file: IO[bytes]) -> int:
    """Return how many images a file holds, by its header: the slices of a NIfTI volume, else one."""
    head = file.read(HEAD)
    file.seek(0)
    return _open_nifti_header(file)[2][2] if is_nifti(head) else 1


# Which opens a file

HEAD = 1 << 12
"""First bytes of a file, that tell."""

READERS: tuple[tuple[Callable[[bytes], bool], Callable[[IO[bytes], Reading], Opened]], ...] = (
    (
        lambda head: head.startswith(b"\x89PNG\r\n\x1a\n") and head[24:25] == b"\x10" and head[25:26] > b"\0",
        open_png,
    ),
    (_is_deep_jpeg2000, open_jpeg2000),
    (lambda head: head.startswith(b"\x93NUMPY"), open_npy),
    (lambda head: head[128:132] == b"DICM", open_dicom),
    (is_nifti, open_nifti),
)
"""How a file's first bytes look, and what opens it. Pillow opens others, if a TIFF is one that it holds."""

EXTENSIONS = frozenset([".dcm", ".dicom", ".nii", ".nii.gz", ".npy"])
"""Ends of names of image files beside those that Pillow knows."""

TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_tiff(file: IO[bytes]) -> bool:
    """Whether a file begins as a TIFF or BigTIFF does."""
    file.seek(0)
    return file.read(4) in TIFF_HEADS


def find_reader(file: IO[bytes]) -> Callable[..., Opened] | None:
    """Return what opens a file, by its content; None for what Pillow does."""
    head = file.read(HEAD)
    file.seek(0)
    return next((opens for recognises, opens in READERS if recognises(head)), None)
