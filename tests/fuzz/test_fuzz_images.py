"""Damaged and hostile images, tar files and arrays: each loads or is reported in one line, and nothing else."""

import contextlib
import functools
import gzip
import io
import itertools
import json
import math
import os
import shutil
import struct
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel
import numpy as np
import psutil
import pydicom
import pytest
import tifffile
from conftest import fuzzed
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEGLosslessSV1

from fcmae.data import BadImage, RandomView, Reading, Source, open_source, save_arrays
from fcmae.data.images import FORMATS, MAX_PIXELS
from fcmae.data.prepare import prepare
from fcmae.errors import UserError
from fcmae.evaluation.inference import Unreadable, read_images

resource = pytest.importorskip("resource")

MEMORY = 3 << 30
"""Bytes that reading may take beyond what the process has: an image of the most pixels takes 2 GB."""

watched: list[str] = []
"""While anything is watched, what must not happen fails the test: see `_forbid`."""

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.remove")
FORBIDDEN += ("os.mkdir", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "socket.connect")


class Forbidden(BaseException):
    """Not an Exception: those are caught, as a decoder can raise any."""


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: reading an image starts no program, opens nothing to write and connects to nothing."""
    if watched and (
        event in FORBIDDEN
        or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
    ):
        watched.append(f"{event} {arguments}")
        raise Forbidden(watched[-1])


sys.addaudithook(_forbid)


@contextmanager
def watch() -> Iterator[None]:
    """Fail where what runs inside starts a program, writes, or takes more than `MEMORY`."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, before[1]))
    watched[:] = ["reading"]
    try:
        yield
    finally:
        happened = watched[1:]
        watched.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert not happened, happened


def hold_one_line(*texts: str) -> None:
    for text in texts:
        assert text
        assert text.isprintable()
        assert len(text) < 1500


def check_image(source: Source, index: int, channels: int | None) -> bool:
    """Load an image whole and in part; whether it loads. It must be pixels, or told in one line."""
    try:
        image = source.load(index)
        part = source.load_part(index, RandomView((8, 8), (0.2, 1.0), 0.5).part)
    except Exception as error:
        if isinstance(error, MemoryError):  # not bounded by the limit on pixels
            raise
        bad = BadImage.of(index, source, error)
        hold_one_line(bad.name, bad.reason)
        return False
    for pixels in (image, part):
        assert pixels.dtype == source.dtype
        assert pixels.ndim == 3
        assert pixels.shape[0] == (channels or source.channels)
        assert pixels.numel() <= len(pixels) * MAX_PIXELS
    return True


def check_source(name: str, root: Path, channels: int = 3) -> bool:
    """Open a source and load from it; whether it opens. It must open, or be refused in one line."""
    try:
        source = open_source(name, str(root), "train", channels)
    except UserError as error:
        hold_one_line(str(error))
        return False
    assert len(source) > 0
    if source.labels is not None:
        assert source.labels.dtype == np.int64
        assert len(source.labels) == len(source)
        assert source.labels.min() >= 0
        assert source.class_names is None or source.labels.max() < len(source.class_names)
    for index in {0, len(source) // 2, len(source) - 1}:
        check_image(source, index, channels)
    return True


# Seeds


READ = (*FORMATS, "MPO")
NOT_READ = ("EPS", "PDF", "ICO", "ICNS", "DDS", "BLP", "MSP", "XBM", "SPIDER")


@functools.cache
def encoded(formats: tuple[str, ...] = READ) -> tuple[bytes, ...]:
    """Small images in all modes of every such format that Pillow writes."""
    smooth = np.add.outer(np.arange(24), np.arange(32))[..., None] * np.array([3, 2, 1])
    image = Image.fromarray(smooth.astype(np.uint8))
    modes = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "I", "F", "LA")
    options: dict[str, list[dict[str, Any]]] = {
        "JPEG": [{}, {"progressive": True, "subsampling": 0}],
        "PNG": [{}, {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}],
        "GIF": [{}, {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}],
        "WEBP": [{}, {"lossless": True}],
        "TIFF": [{"compression": name} for name in (None, "tiff_lzw", "tiff_deflate", "jpeg", "packbits")],
        "TGA": [{}, {"compression": "tga_rle"}],
    }
    found: list[bytes] = []
    for kind, mode in itertools.product(formats, modes):
        for option in options.get(kind, [{}]):
            buffer = io.BytesIO()
            try:
                gray = image.convert("L")
                made = Image.fromarray(np.asarray(gray).astype(np.uint16) * 200) if mode == "I;16" else None
                (made or (gray if mode in ("I", "F") else image).convert(mode)).save(buffer, kind, **option)
            except (OSError, ValueError, KeyError, RuntimeError):
                continue  # a mode that the format does not have, or a format that is not written
            found.append(buffer.getvalue())
    assert len(found) > len(formats)
    return tuple(found)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@functools.cache
def deep() -> tuple[bytes, ...]:
    """Small images that Pillow does not read: TIFFs, PNGs and JPEG 2000 of 16 bits, .npy, DICOM and NIfTI."""
    bands = (np.add.outer(np.arange(24), np.arange(32))[..., None] * np.arange(1, 6)).astype(np.uint16)
    found = [npy(bands), npy(bands[..., 0] / 7), imagecodecs.png_encode(bands[..., :3].copy())]
    found.append(imagecodecs.jpeg2k_encode(bands[..., :3].copy(), level=0))
    layouts: list[dict[str, Any]] = [{}, {"tile": (16, 16), "compression": "lzw"}, {"rowsperstrip": 5}]
    layouts += [{"tile": (16, 16), "compression": name} for name in ("deflate", "zstd", "packbits", "lzma")]
    layouts += [{"bigtiff": True, "byteorder": ">"}, {"compression": "deflate", "predictor": True}]
    for layout in layouts:
        for values in (bands, bands[..., 0], bands[..., 0].astype(np.float32)):
            buffer = io.BytesIO()
            tifffile.imwrite(buffer, values, photometric="minisblack", planarconfig="contig", **layout)
            found.append(buffer.getvalue())
    for shape in ((24, 32), (24, 32, 3)):
        image = nibabel.Nifti1Image(bands[..., : shape[2] if len(shape) > 2 else 1].reshape(shape), np.eye(4))
        found += [image.to_bytes(), gzip.compress(image.to_bytes())]
    found.append(nibabel.Nifti2Image(bands[..., 0], np.eye(4)).to_bytes())
    for packed in (None, *map(imagecodecs.ljpeg_encode, (bands[..., 0].copy(),))):
        dataset = pydicom.Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1 if packed else ExplicitVRLittleEndian
        dataset.SOPClassUID = dataset.SOPInstanceUID = CTImageStorage
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 24, 32, 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelData = encapsulate([bytes(packed)]) if packed else bands[..., 0].tobytes()
        dataset["PixelData"].VR = "OB" if packed else "OW"
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
        found.append(buffer.getvalue())
    return tuple(map(bytes, found))


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG's chunk with the right checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, bits: int, colour: int, pixels: bytes, *more: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in chunks)


def tiff(entries: list[tuple[int, int, int, int]], following: int = 0, pages: int = 1) -> bytes:
    """A little-endian TIFF of equal directories of (tag, type, count, value), the last followed by `following`."""
    size = 2 + 12 * len(entries) + 4
    content = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    directories = [
        content + struct.pack("<I", following if page == pages - 1 else 8 + (page + 1) * size)
        for page in range(pages)
    ]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(directories)


PIXELS = [
    (256, 3, 1, 8),
    (257, 3, 1, 8),
    (258, 3, 1, 8),
    (259, 3, 1, 1),
    (262, 3, 1, 1),
    (273, 4, 1, 8),
    (278, 3, 1, 8),
]
PIXELS += [(279, 4, 1, 64)]

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) (w) file closefile\nshowpage\n"


TYPE = "not an image of a type that is read"


@functools.cache
def hostile() -> dict[str, tuple[bytes, str | None]]:
    """What takes long, takes memory or starts programs where it is read without care, and why it is not read.

    None for the reason where it is an image all the same.
    """
    bomb = zlib.compress(b"x" * (200 << 20), 9)
    gif = io.BytesIO()
    frames = [Image.new("1", (4, 4), i % 2) for i in range(3)]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    inside = io.BytesIO()
    Image.new("RGB", (64, 64)).save(inside, "ICO")
    dos = b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, len(POSTSCRIPT), 0, 0, 0, 0)
    bitmap = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 90, 0, 0, 54, 40, -9, -9, 1, 24, 0, 0, 0, 0, 0, 0)
    layers = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 300, 300, 8, 3) + b"\xff" * 64
    tiles = [(322, 4, 1, 65_535), (323, 4, 1, 65_535), (324, 4, 1, 8)]
    return {
        "a program in PostScript": (POSTSCRIPT, TYPE),
        "PostScript after a DOS header": (dos + bytes(4) + POSTSCRIPT, TYPE),
        "a PDF": (b"%PDF-1.4\n1 0 obj\n<< /Length 4 >>\nstream\nabcd\nendstream\n", TYPE),
        "an icon": (inside.getvalue(), TYPE),
        "nothing": (b"", TYPE),
        "one byte": (b"\xff", TYPE),
        "many pixels, few bytes": (png(13_000, 13_000, 1, 0, bytes(1626 * 13_000)), "13,000 x 13,000 pixels, over"),
        "the most pixels that a header says": (png(2**31 - 1, 2**31 - 1, 16, 6, b""), "pixels, over 134,217,728"),
        "a bitmap of negative size": (bitmap, "over 134,217,728 pixels"),
        "a text of numbers": (b"P3 30000 30000 255\n" + b"1 " * 1000, "over 134,217,728 pixels"),
        "a text that unpacks to 200 MB": (png(8, 8, 8, 0, bytes(72), (b"zTXt", b"a\0\0" + bomb)), "too large"),
        "a colour profile of 200 MB": (png(8, 8, 8, 0, bytes(72), (b"iCCP", b"a\0\0" + bomb)), "too large"),
        "pixels that unpack to 200 MB": (png(8, 8, 8, 0, b"x" * (200 << 20)), "unrecognized data"),
        "frames": (gif.getvalue() + gif.getvalue()[13:] * 50, "3 frames, an animation"),
        "2,000 directories": (tiff(PIXELS, pages=2000) + bytes(64), "over 100 pages"),
        "tiles of 4 G pixels": (tiff([*PIXELS[:5], *tiles]), "truncated"),
        "layers without end": (layers, ""),
        "a tag of 4 GB": (tiff([*PIXELS, (700, 1, 2**32 - 1, 8)]) + bytes(64), None),
        "a tag of 4 G rationals": (tiff([*PIXELS, (33550, 12, 2**32 - 1, 8)]) + bytes(64), None),
        "directories in a circle": (tiff(PIXELS, following=8) + bytes(64), None),
    }


@pytest.mark.filterwarnings("ignore:Tag data larger:UserWarning")
@pytest.mark.parametrize("name", sorted(hostile()))
def test_what_is_made_to_do_harm_is_a_bad_image_with_a_reason_or_does_none(tmp_path: Path, name: str) -> None:
    content, reason = hostile()[name]
    path = tmp_path / "images" / "x.jpg"
    path.parent.mkdir()
    path.write_bytes(content)
    source = open_source("folder", str(path.parent), "train", 3)
    with watch():
        assert check_image(source, 0, 3) == (reason is None)
        (read,) = read_images([path], 3)
    if reason is not None:
        assert isinstance(read, Unreadable)
        assert reason in read.reason
        hold_one_line(read.reason)
    assert [*tmp_path.rglob("*")] == [path.parent, path]


# Mutations

Change = Callable[[bytes], bytes]


def number_at(place: int, value: int, form: str) -> Change:
    packed = struct.pack(form, value & (256 ** struct.calcsize(form) - 1))
    return lambda content: (
        content[: place % (len(content) + 1)] + packed + content[place % (len(content) + 1) + len(packed) :]
    )


def cut(first: int, length: int) -> Change:
    return lambda content: content[: first % (len(content) + 1)] + content[first % (len(content) + 1) + length :]


def twice(first: int, length: int) -> Change:
    def change(content: bytes) -> bytes:
        at = first % (len(content) + 1)
        return content[: at + length] + content[at:]

    return change


def until(length: int) -> Change:
    return lambda content: content[: length % (len(content) + 1)]


PLACES = st.one_of(st.integers(4, 64), st.integers(0, 1 << 16))
LARGE = st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 30_000, 11_000, 0x7FFFFFFF, 0xFFFFFFFF, -1, 2**63 - 1])
FORMS = st.sampled_from(["B", "<H", ">H", "<I", ">I", "<Q", ">Q"])
CHANGES: st.SearchStrategy[Change] = st.one_of(
    st.builds(number_at, PLACES, LARGE, FORMS),
    st.builds(number_at, PLACES, st.integers(0, 255), st.just("B")),
    st.builds(cut, PLACES, st.integers(1, 64)),
    st.builds(twice, PLACES, st.integers(1, 64)),
    st.builds(until, PLACES),
    st.builds(lambda more: lambda content: content + more, st.binary(max_size=40)),
)


def fix_png(content: bytes) -> bytes:
    """Make the checksums of a PNG's chunks right again, so that what is in them is read."""
    fixed, at = content[:8], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        if at + 12 + length > len(content):
            break
        body = content[at + 4 : at + 8 + length]
        fixed += content[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return fixed + content[at:]


@st.composite
def changed(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    content = draw(st.sampled_from(seeds))
    for change in draw(st.lists(CHANGES, min_size=1, max_size=4)):
        content = change(content)
    return fix_png(content) if content.startswith(b"\x89PNG") else content


def file_contents() -> st.SearchStrategy[bytes]:
    mutated = changed(encoded())
    return st.one_of(
        mutated,
        changed(deep()),
        changed(deep()),
        mutated,
        st.one_of(st.binary(max_size=300), st.sampled_from(encoded(NOT_READ))),
        st.builds(lambda a, b: a + b, st.sampled_from(encoded()), mutated),
        st.builds(
            lambda w, h, bits, colour, pixels: png(w, h, bits, colour, pixels),
            st.one_of(st.integers(0, 40), st.sampled_from([11_000, 65_535, 2**31 - 1, 2**32 - 1])),
            st.one_of(st.integers(0, 40), st.sampled_from([11_000, 65_535, 2**31 - 1, 2**32 - 1])),
            st.sampled_from([0, 1, 2, 4, 8, 16, 255]),
            st.integers(0, 7),
            st.binary(max_size=200),
        ),
        st.builds(
            lambda entries, following: tiff(entries, following) + bytes(64),
            st.lists(
                st.one_of(
                    st.sampled_from(PIXELS),
                    st.tuples(st.integers(254, 347), st.integers(0, 13), LARGE, LARGE).map(
                        lambda e: (e[0], e[1], e[2] & 0xFFFFFFFF, e[3] & 0xFFFFFFFF)
                    ),
                ),
                max_size=12,
            ),
            st.integers(0, 200),
        ),
    )


ENDS = st.sampled_from([".jpg", ".png", ".tif", ".webp", ".bmp", ".gif", ".ppm", ".avif", ".jp2", ".tga", ".psd"])
ENDS |= st.sampled_from([".npy", ".dcm", ".nii", ".nii.gz"])


READINGS = st.sampled_from([Reading(), Reading(nodata=math.nan), Reading(nodata=0, window=True)])


@fuzzed(150, 3000)
@given(content=file_contents(), end=ENDS, channels=st.sampled_from([1, 3, 4, None]), reading=READINGS)
def test_any_file_is_pixels_or_a_bad_image(
    content: bytes, end: str, channels: int | None, reading: Reading
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{end}")
        path.write_bytes(content)
        with watch():
            with contextlib.suppress(UserError):  # of bands that do not fit
                source = open_source("folder", folder, "train", channels, reading=reading)
                check_image(source, 0, channels)
            (read,) = read_images([path], channels or 3, reading)
        if isinstance(read, Unreadable):
            hold_one_line(read.reason)
        assert os.listdir(folder) == [path.name]


# Tar files


@functools.cache
def packed() -> tuple[bytes, ...]:
    """Small tar files in all formats: classes, names that lead elsewhere, links, devices, tar files inside."""
    small = min((content for content in encoded() if content.startswith(b"\x89PNG")), key=len)
    found: list[bytes] = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name in (
                "cat/0.png",
                "cat/10.png",
                "owl/1.png",
                "../up.png",
                "/abs/x.png",
                "./here.png",
                "n" * 120 + "/y.png",
            ):
                member = tarfile.TarInfo(name)
                member.size = len(small)
                tar.addfile(member, io.BytesIO(small))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
                member = tarfile.TarInfo(f"cat/kind{kind.decode()}.png")
                member.type, member.linkname = kind, "/etc/passwd"
                tar.addfile(member)
            if found:
                member = tarfile.TarInfo("inner.tar")
                member.size = len(found[0])
                tar.addfile(member, io.BytesIO(found[0]))
        found.append(buffer.getvalue())
    return tuple(found)


def fix_tar(content: bytes) -> bytes:
    """Make the checksums of what may be a tar file's headers right again."""
    fixed = bytearray(content)
    for at in range(0, len(content) - 511, 512):
        if content[at + 257 : at + 262] == b"ustar":
            total = sum(content[at : at + 512]) - sum(content[at + 148 : at + 156]) + 8 * 32
            fixed[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(fixed)


def overwritten(place: int, value: bytes) -> Change:
    """Changes that keep a tar file's blocks in place."""
    return lambda content: content[: place % len(content)] + value + content[place % len(content) + len(value) :]


SIZES = st.sampled_from(
    [b"00000000000\0", b"77777777777\0", b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"00000001000\0"]
)
TARS = st.builds(
    lambda content, changes, fix: (fix_tar if fix else bytes)(
        functools.reduce(lambda c, f: f(c) or b"x", changes, content)
    ),
    st.sampled_from(packed()),
    st.lists(
        st.one_of(
            st.builds(lambda block, value: overwritten(512 * block + 124, value), st.integers(0, 40), SIZES),
            st.builds(
                lambda block, kind: overwritten(512 * block + 156, kind),
                st.integers(0, 40),
                st.sampled_from([b"0", b"1", b"x", b"g", b"L", b"S", b"\xff"]),
            ),
            st.builds(overwritten, PLACES, st.binary(min_size=1, max_size=20)),
            CHANGES,
        ),
        max_size=3,
    ),
    st.booleans(),
)


@fuzzed(40, 1500)
@given(content=TARS)
def test_any_tar_file_opens_or_is_refused_and_is_never_unpacked(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.tar")
        path.write_bytes(content)
        with watch():
            check_source("folder", path)
        assert os.listdir(folder) == [path.name]


# Arrays


def with_header(text: str, pixels: int = 4 * 4 * 3 * 3) -> bytes:
    header = text.encode("latin1", "replace") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) & 0xFFFF) + header + bytes(pixels)


DTYPES = ["|u1", "<i8", ">i4", "<f4", "|O", "|b1", "|S8", "<U4", "<M8[s]", "|V9", "<c8", ">u2", "|i1"]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 9, -1, 2**31, 2**40, 2**63, 10**30]), max_size=5).map(tuple)
HEADERS = st.builds(
    lambda dtype, order, shape: with_header(
        f"{{'descr': {dtype!r}, 'fortran_order': {order}, 'shape': {shape}, }}"
    ),
    st.one_of(st.sampled_from(DTYPES), st.just([("a", "<i4"), ("b", "|O")]), st.text(max_size=9)),
    st.sampled_from([True, False, "None", "1"]),
    SHAPES,
)


@functools.cache
def saved() -> tuple[bytes, ...]:
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    return (
        npy(images),
        npy(np.asfortranarray(images)),
        npy(np.array([{}, 1], object)),
        npy(images.view("V3")),
        npy(np.array([0, 1, 2])),
        npy(np.array([0, 1, 2], ">i4")),
        npy(np.full(3, 10**9)),
        npy(np.full(3, 2**64 - 1, np.uint64)),
        npy(np.array(["a", "b", "c"])),
        npy(np.full((3, 2), 4, np.int32)),
        npy(np.full((3, 2), -(2**31), np.int32)),
        npy(np.asfortranarray(np.full((3, 2), 2**31 - 1, np.int32))),
        with_header("(" * 5000),
        with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (3, 4, 4, 3), 'more': 1}"),
        b"a\nb\nc\n",
        b"a\r\nb\r\n\r\nc",
        b"\xff\xfe",
    )


NUMBERS = st.sampled_from([0, 1, 2, 3, -1, 48, 2**31, 2**63, 10**30, 1.0, 1e300, True, None, "3", [], {}])
JSONS = st.recursive(
    NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
INDICES = st.one_of(
    JSONS.map(lambda value: json.dumps(value).encode()),
    st.builds(
        lambda form, channels, shards, bad: json.dumps(
            {"format": form, "channels": channels, "shards": shards, "unreadable": bad}
        ).encode(),
        st.sampled_from(["fcmae images 1", "fcmae images 2", 1, None]),
        st.one_of(st.just(3), JSONS),
        st.one_of(st.just([1, 1, 1]), st.lists(NUMBERS, max_size=4), JSONS),
        JSONS,
    ),
    st.sampled_from([b"", b"[" * 100_000, b"\xff", b"1" * 6000, b'{"format": "fcmae images 1"}']),
)
FILES = st.sampled_from(
    [
        "images.npy",
        "labels.npy",
        "classes.txt",
        "index.json",
        "sizes.npy",
        "prepare.json",
        "shards/00000.bin",
        "shards/00000.json",
    ]
)
CONTENTS = st.one_of(HEADERS, changed(saved()), st.sampled_from(saved()), INDICES, st.binary(max_size=60))


@functools.cache
def array_folders() -> tempfile.TemporaryDirectory[str]:
    """A folder with the same three images as arrays, in plain/train, and prepared, in prepared/train."""
    folder = tempfile.TemporaryDirectory()
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    save_arrays(Path(folder.name, "plain", "train"), images, [0, 1, 2], ["a", "b", "c"])
    prepare_again(Path(folder.name))
    return folder


def prepare_again(root: Path) -> int:
    source = open_source("arrays", str(root / "plain"), "train", 3)
    done = prepare(source, root / "prepared" / "train", root="", channels=3, short_side=8, num_workers=0)
    return done.num_images


@fuzzed(60, 3000)
@given(replaced=st.dictionaries(FILES, CONTENTS, min_size=1, max_size=2), plain=st.booleans())
def test_any_array_and_index_opens_or_is_refused(replaced: dict[str, bytes], plain: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root")
        shutil.copytree(array_folders().name, root)
        damaged = root / ("plain" if plain else "prepared")
        for name, content in replaced.items():
            (damaged / "train" / name).parent.mkdir(exist_ok=True)
            (damaged / "train" / name).write_bytes(content)
        with watch():
            check_source("arrays", damaged)
        if plain:
            return
        try:  # fixes what is damaged, or says why not
            assert prepare_again(root) == 3
        except UserError as error:
            hold_one_line(str(error))
        else:
            assert check_source("arrays", damaged)
