"""Image files of every type: each number as an independent library wrote it, whole and in part; what is refused."""

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from conftest import ROOT
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, RLELossless, generate_uid

import fcmae.data.images
from fcmae.data import Reading, Source, open_source
from fcmae.data.deep import open_tiff
from fcmae.data.images import image_size
from fcmae.data.views import Part
from fcmae.errors import UserError
from fcmae.evaluation.inference import Picture, read_images

rng = np.random.default_rng(0)
BANDS = rng.integers(0, 4096, (50, 70, 12), dtype=np.uint16)
"""12 bits in 16, as most sensors have them."""
GRAY, FIVE, BYTES = BANDS[..., 0], BANDS[..., :5], (BANDS[..., :4] >> 4).astype(np.uint8)
SMOOTH = np.add.outer(np.arange(48), 2 * np.arange(64))[..., None] + np.array([0, 40, 80])


def tiff(values: np.ndarray, **options: Any) -> Callable[[Path], object]:
    options = {"photometric": "minisblack"} | options
    return lambda path: tifffile.imwrite(path, values, **options)


def dicom(values: np.ndarray, syntax: str = ExplicitVRLittleEndian, packed: Any = b"", **tags: Any) -> Any:
    """Write a CT slice as scanners do: 12 of 16 bits."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
    dataset.Rows, dataset.Columns = values.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    if values.dtype.itemsize == 1:
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    if values.ndim == 3:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    stored = values.astype(values.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<"))
    dataset.PixelData = encapsulate([packed]) if packed else stored.tobytes()
    dataset["PixelData"].VR = "OB" if packed or values.dtype.itemsize == 1 else "OW"
    for name, value in tags.items():
        setattr(dataset, name, value)
    if syntax == RLELossless:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless)

    def write(path: Path) -> None:
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)

    return write


def palette_dicom() -> tuple[Callable[[Path], None], np.ndarray]:
    table = rng.integers(0, 65536, (3, 256), dtype=np.uint16)
    colours = ("Red", "Green", "Blue")
    tags: dict[str, Any] = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in colours}
    tags |= {f"{c}PaletteColorLookupTableData": table[i].tobytes() for i, c in enumerate(colours)}
    return dicom(BYTES[..., 0], PhotometricInterpretation="PALETTE COLOR", **tags), table.T[BYTES[..., 0]]


def nifti(values: np.ndarray, kind: Any = nibabel.Nifti1Image, slope: float = 1, inter: float = 0) -> Any:
    def write(path: Path) -> None:
        image = kind(values, np.eye(4))
        image.header.set_slope_inter(slope, inter)
        image.to_filename(path)

    return write


def swapped_nifti(values: np.ndarray) -> Callable[[Path], object]:
    header = nibabel.Nifti1Header(endianness=">" if sys.byteorder == "little" else "<")
    header.set_data_dtype(values.dtype)
    return lambda path: nibabel.Nifti1Image(values, np.eye(4), header).to_filename(path)


def bits(values: np.ndarray, number: int) -> bytes:
    """Numbers of so many bits, one after the other, in whole bytes a row: as TIFF packs them."""
    rows = (values[..., None] >> np.arange(number - 1, -1, -1) & 1).astype(np.uint8)
    return np.packbits(rows.reshape(len(values), -1), axis=1).tobytes()


def twelve_bits(path: Path) -> None:
    tifffile.imwrite(path, GRAY, photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        page = file.pages.first
        start = page.dataoffsets[0]
        page.tags["BitsPerSample"].overwrite(12)
        packed = bits(GRAY, 12)
        page.tags["StripByteCounts"].overwrite(len(packed))
    content = bytearray(path.read_bytes())
    content[start : start + len(packed)] = packed
    path.write_bytes(content)


def sparse(path: Path, *tags: tuple[Any, ...]) -> None:
    """Tiles of which the second is left out, as GDAL does with those that are no-data, or zero, all over."""
    tiles = iter([GRAY[:32, :32].copy(), None])
    tifffile.imwrite(path, tiles, shape=(32, 64), dtype=np.uint16, tile=(32, 32), extratags=tags)


SPARSE = np.concatenate([GRAY[:32, :32], np.zeros((32, 32), np.uint16)], 1)


def nodata_tag(text: str) -> tuple[Any, ...]:
    return (42113, 2, len(text) + 1, text, True)


def reduced(path: Path) -> None:
    with tifffile.TiffWriter(path) as file:
        file.write(FIVE, photometric="minisblack", planarconfig="contig", subifds=0, metadata=None)
        file.write(FIVE[::2, ::2], photometric="minisblack", planarconfig="contig", subfiletype=1, metadata=None)


def rgba16(path: Path) -> None:
    path.write_bytes(imagecodecs.png_encode(BANDS[..., :4].copy()))


def floats(dtype: str) -> np.ndarray:
    return (GRAY / 4095 - 0.3).astype(dtype)


PALETTE = palette_dicom()
INVERTED = {"photometric": "miniswhite"}
LOSSLESS = "1.2.840.10008.1.2.4.70"

FORMATS: dict[str, tuple[str, Callable[[Path], object], np.ndarray]] = {
    # What Pillow reads
    "PNG, 8 bits": ("a.png", lambda p: Image.fromarray(BYTES[..., :3]).save(p), BYTES[..., :3]),
    "PNG, 16 bits, gray": ("a.png", lambda p: Image.fromarray(GRAY).save(p), GRAY),
    "TIFF, 8 bits": ("a.tif", tiff(BYTES[..., :3], photometric="rgb"), BYTES[..., :3]),
    "TIFF, 8 bits, alpha": (
        "a.tif",
        tiff(BYTES, photometric="rgb", extrasamples=["unassalpha"], compression="lzw"),
        BYTES,
    ),
    "TIFF, 1 bit": ("a.tif", tiff(GRAY > 2000), (GRAY > 2000).astype(np.uint8) * 255),
    "TIFF, white is 0, 8 bits": ("a.tif", tiff(BYTES[..., 0], **INVERTED), 255 - BYTES[..., 0]),
    "TIFF, palette": (
        "a.tif",
        lambda p: Image.fromarray(BYTES[..., 0]).convert("P").save(p),
        BYTES[..., :1].repeat(3, 2),
    ),
    "PGM, 16 bits": (
        "a.pgm",
        lambda p: p.write_bytes(b"P5 70 50 65535\n" + GRAY.astype(">u2").tobytes()),
        GRAY,
    ),
    # PNG and JPEG 2000
    "PNG, 16 bits": (
        "a.png",
        lambda p: p.write_bytes(imagecodecs.png_encode(BANDS[..., :3].copy())),
        BANDS[..., :3],
    ),
    "PNG, 16 bits, alpha": ("a.png", rgba16, BANDS[..., :4]),
    "PNG, 16 bits, gray and alpha": (
        "a.png",
        lambda p: p.write_bytes(imagecodecs.png_encode(BANDS[..., :2].copy())),
        BANDS[..., :2],
    ),
    "JPEG 2000, 16 bits": (
        "a.jp2",
        lambda p: p.write_bytes(imagecodecs.jpeg2k_encode(BANDS[..., :3].copy(), level=0, reversible=True)),
        BANDS[..., :3],
    ),
    "JPEG 2000, 16 bits, gray": (
        "a.jp2",
        lambda p: p.write_bytes(imagecodecs.jpeg2k_encode(GRAY.copy(), level=0, reversible=True)),
        GRAY,
    ),
    # TIFF
    "TIFF, 16 bits": ("a.tif", tiff(GRAY), GRAY),
    "TIFF, 16 bits, RGB": ("a.tif", tiff(BANDS[..., :3], photometric="rgb"), BANDS[..., :3]),
    "TIFF, 12 bits": ("a.tif", twelve_bits, GRAY),
    "TIFF, white is 0": ("a.tif", tiff(GRAY, **INVERTED), 65535 - GRAY),
    "TIFF, 12 bands": ("a.tif", tiff(BANDS, planarconfig="contig"), BANDS),
    "TIFF, band by band": (
        "a.tif",
        tiff(BANDS.transpose(2, 0, 1).copy(), planarconfig="separate", rowsperstrip=7),
        BANDS,
    ),
    "TIFF, band by band, compressed": (
        "a.tif",
        tiff(BANDS.transpose(2, 0, 1).copy(), planarconfig="separate", rowsperstrip=7, compression="lzma"),
        BANDS,
    ),
    "TIFF, tiles, LZW, predictor": (
        "a.tiff",
        tiff(BANDS, planarconfig="contig", tile=(16, 32), compression="lzw", predictor=True),
        BANDS,
    ),
    "TIFF, strips, deflate, predictor": (
        "a.tif",
        tiff(FIVE, planarconfig="contig", rowsperstrip=9, compression="deflate", predictor=True),
        FIVE,
    ),
    "TIFF, tiles of bands, ZSTD": (
        "a.tif",
        tiff(BANDS.transpose(2, 0, 1).copy(), planarconfig="separate", tile=(32, 16), compression="zstd"),
        BANDS,
    ),
    "TIFF, 5 bands, 8 bits": (
        "a.tif",
        tiff((FIVE >> 4).astype("u1"), planarconfig="contig"),
        (FIVE >> 4).astype("u1"),
    ),
    "TIFF, 4 bands, none alpha": ("a.tif", tiff(BYTES, photometric="rgb", extrasamples=["unspecified"]), BYTES),
    "TIFF, big-endian": ("a.tif", tiff(FIVE, planarconfig="contig", byteorder=">"), FIVE),
    "TIFF, big-endian, predictor": (
        "a.tif",
        tiff(FIVE, planarconfig="contig", byteorder=">", compression="lzw", predictor=True),
        FIVE,
    ),
    "BigTIFF": ("a.tif", tiff(FIVE, planarconfig="contig", bigtiff=True), FIVE),
    "TIFF, reduced pages": ("a.tif", reduced, FIVE),
    "TIFF, sparse": ("a.tif", sparse, SPARSE),
    "TIFF, int8": ("a.tif", tiff((GRAY % 256).astype(np.int8)), (GRAY % 256).astype(np.int8).astype("f4")),
    "TIFF, int16": ("a.tif", tiff(GRAY.astype(np.int16) - 1000), GRAY.astype("f4") - 1000),
    "TIFF, uint32": ("a.tif", tiff(GRAY.astype(np.uint32) * 4096), GRAY.astype("f4") * 4096),
    "TIFF, float16": ("a.tif", tiff(floats("f2")), floats("f2").astype("f4")),
    "TIFF, float32": ("a.tif", tiff(floats("f4")), floats("f4")),
    "TIFF, float32, predictor": ("a.tif", tiff(floats("f4"), compression="zlib", predictor=3), floats("f4")),
    "TIFF, float64": ("a.tif", tiff(floats("f8")), floats("f8").astype("f4")),
    "OME-TIFF, channels": (
        "a.ome.tif",
        tiff(BANDS.transpose(2, 0, 1).copy(), ome=True, metadata={"axes": "CYX"}),
        BANDS,
    ),
    "OME-TIFF, channels, 8 bits": (
        "a.ome.tif",
        tiff(BYTES.transpose(2, 0, 1).copy(), ome=True, metadata={"axes": "CYX"}),
        BYTES,
    ),
    "ImageJ, channels": (
        "a.tif",
        lambda p: tifffile.imwrite(
            p, BANDS[..., :4].transpose(2, 0, 1).copy(), imagej=True, metadata={"axes": "CYX"}
        ),
        BANDS[..., :4],
    ),
    # Arrays
    "npy": ("a.npy", lambda p: np.save(p, BANDS.astype(">u2")), BANDS),
    "npy, float64": ("a.npy", lambda p: np.save(p, floats("f8")), floats("f8").astype("f4")),
    "npy, bool": ("a.npy", lambda p: np.save(p, GRAY > 9), (GRAY > 9).astype(np.uint8) * 255),
    # DICOM
    "DICOM": ("a.dcm", dicom(GRAY), GRAY),
    "DICOM, 8 bits": ("a.dcm", dicom(BYTES[..., 0]), BYTES[..., 0]),
    "DICOM, big-endian": ("a.dcm", dicom(GRAY, ExplicitVRBigEndian), GRAY),
    "DICOM, signed": ("a.dcm", dicom(GRAY.astype("i2") - 2048), GRAY.astype("f4") - 2048),
    "DICOM, rescaled": (
        "a.dcm",
        dicom(GRAY, RescaleSlope="0.5", RescaleIntercept="-1024"),
        (GRAY * 0.5 - 1024).astype("f4"),
    ),
    "DICOM, rescaled by nothing": ("a.dcm", dicom(GRAY, RescaleSlope="1", RescaleIntercept="0"), GRAY),
    "DICOM, low is bright": ("a.dcm", dicom(GRAY, PhotometricInterpretation="MONOCHROME1"), 4095 - GRAY),
    "DICOM, signed, low is bright": (
        "a.dcm",
        dicom(GRAY.astype("i2") - 2048, PhotometricInterpretation="MONOCHROME1"),
        2047 - GRAY.astype("f4"),
    ),
    "DICOM, RGB": ("a.dcm", dicom(BYTES[..., :3]), BYTES[..., :3]),
    "DICOM, palette": ("a.dcm", *PALETTE),
    "DICOM, RLE": ("a.dcm", dicom(GRAY, RLELossless), GRAY),
    "DICOM, lossless JPEG": (
        "a.dcm",
        dicom(GRAY, LOSSLESS, imagecodecs.ljpeg_encode(GRAY, bitspersample=16)),
        GRAY,
    ),
    "DICOM, JPEG-LS": ("a.dcm", dicom(GRAY, "1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode(GRAY)), GRAY),
    "DICOM, JPEG 2000": (
        "a.dcm",
        dicom(
            GRAY,
            "1.2.840.10008.1.2.4.90",
            imagecodecs.jpeg2k_encode(GRAY, level=0, reversible=True, codecformat="j2k", bitspersample=12),
        ),
        GRAY,
    ),
    # NIfTI
    "NIfTI": ("a.nii", nifti(GRAY), GRAY),
    "NIfTI, packed": ("a.nii.gz", nifti(GRAY), GRAY),
    "NIfTI-2": ("a.nii", nifti(GRAY, nibabel.Nifti2Image), GRAY),
    "NIfTI, other order of bytes": ("a.nii", swapped_nifti(GRAY), GRAY),
    "NIfTI, float64": ("a.nii", nifti(floats("f8")), floats("f8").astype("f4")),
    "NIfTI, scaled": ("a.nii.gz", nifti(GRAY, slope=0.25, inter=-3), GRAY.astype("f4") * 0.25 - 3),
    "NIfTI, RGB": (
        "a.nii",
        nifti(BYTES[..., :3].copy().view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]),
        BYTES[..., :3],
    ),
}
"""What an image file is -> its name, what writes it, its pixels (h, w) or (h, w, bands)."""


def open_one(folder: Path, channels: int, reading: Reading | None = None) -> Source:
    return open_source("folder", str(folder), "train", channels, reading=reading or Reading())


def loaded(folder: Path, channels: int, reading: Reading | None = None) -> np.ndarray:
    return open_one(folder, channels, reading).load(0).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("what", FORMATS)
def test_pixels_are_what_was_written_whole_and_in_part(what: str, tmp_path: Path) -> None:
    name, write, values = FORMATS[what]
    write(tmp_path / name)
    expected = np.atleast_3d(values)
    source = open_one(tmp_path, expected.shape[2])
    whole = source.load(0)
    assert whole.dtype == source.dtype == torch.from_numpy(expected[:1].copy()).dtype
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), expected)
    with open(tmp_path / name, "rb") as file:
        assert image_size(file) == expected.shape[:2]
    for top, left, height, width in ((0, 0, 1, 1), (9, 13, 20, 41), (31, 63, 1, 1), (0, 5, 32, 7)):
        part = source.load_part(0, lambda h, w, box=(top, left, height, width): Part(*box, (1, 1)))
        assert torch.equal(part, whole[:, top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "what", ["8 bits", "16 bits", "12 bands in tiles", "PNG", "PNG, 8 bits, behind the pixels"]
)
def test_every_type_is_turned_alike(what: str, orientation: int, tmp_path: Path) -> None:
    stored = {"8 bits": BYTES[..., :3], "PNG, 8 bits, behind the pixels": BYTES[..., :3]}.get(what, BANDS[..., :3])
    turn = Image.Exif()
    turn[274] = orientation
    if what.startswith("PNG"):
        content = imagecodecs.png_encode(stored.copy())
        exif = turn.tobytes()[6:]
        chunk = (
            len(exif).to_bytes(4, "big")
            + b"eXIf"
            + exif
            + imagecodecs.zlib_crc32(b"eXIf" + exif).to_bytes(4, "big")
        )
        place = content.rindex(b"IEND") - 4 if "behind" in what else 33
        (tmp_path / "a.png").write_bytes(content[:place] + chunk + content[place:])
    else:
        stored = BANDS if "bands" in what else stored
        tiles: dict[str, Any] = (
            {"tile": (16, 32), "planarconfig": "contig"} if "tiles" in what else {"photometric": "rgb"}
        )
        tiff(stored, extratags=[(274, 3, 1, orientation, True)], **tiles)(tmp_path / "a.tif")
    swap, flips = {
        1: (False, ()), 2: (False, (1,)), 3: (False, (0, 1)), 4: (False, (0,)),
        5: (True, ()), 6: (True, (1,)), 7: (True, (0, 1)), 8: (True, (0,)),
    }[orientation]  # fmt: skip
    seen = np.flip(stored.swapaxes(0, 1) if swap else stored, flips)
    source = open_one(tmp_path, seen.shape[2])
    with open(source.describe(0), "rb") as file:
        assert image_size(file) == seen.shape[:2]
    whole = source.load(0)
    assert np.array_equal(whole.permute(1, 2, 0).numpy(), seen)
    assert torch.equal(source.load_part(0, lambda h, w: Part(3, 8, 29, 31, (29, 31))), whole[:, 3:32, 8:39])


def test_large_plain_tiffs_are_the_same_pixels_by_either_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiff(BYTES[..., :3], photometric="rgb", tile=(16, 16), compression="deflate")(tmp_path / "a.tif")
    whole = open_one(tmp_path, 3).load(0)
    monkeypatch.setattr(fcmae.data.images, "CUT_PIXELS", 0)
    assert torch.equal(open_one(tmp_path, 3).load(0), whole)


@pytest.mark.parametrize("deep", [False, True])
def test_gray_and_colours_become_each_other_and_alpha_is_left_out(deep: bool, tmp_path: Path) -> None:
    values = BANDS[..., :4] * 16 if deep else BYTES
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(values.copy()))
    luma = values[..., :3] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(loaded(tmp_path, 1)[..., 0] - luma).max() <= 1
    assert np.array_equal(loaded(tmp_path, 3), values[..., :3])
    path.write_bytes(imagecodecs.png_encode(values[..., 0].copy()))
    assert np.array_equal(loaded(tmp_path, 3), values[..., :1].repeat(3, 2))
    full = np.iinfo(values.dtype).max
    assert np.array_equal(loaded(tmp_path, 4)[..., 3], np.full(values.shape[:2], full))


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_bands_that_no_file_calls_colours_are_never_mixed_or_left_out(bands: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", BANDS[..., :bands])
    for channels in {1, 3, 4} - {bands}:
        with pytest.raises(
            UserError, match=f"{bands} bands, but model.in_chans is {channels}; set model.in_chans={bands}"
        ):
            open_one(tmp_path, channels)


# No-data


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("kind", ["file", "arrays"])
def test_nodata_is_nan_in_each_channel_by_itself_and_the_rest_in_units_of_the_full_range(
    dtype: str, kind: str, tmp_path: Path
) -> None:
    values = FIVE.astype(dtype)
    values[4, 6, 2] = values[9, :, 0] = 200
    if kind == "file":
        np.save(tmp_path / "a.npy", values)
    else:
        np.save(tmp_path / "images.npy", values[None])
    source = open_source(
        "folder" if kind == "file" else "arrays", str(tmp_path), "train", 5, reading=Reading(nodata=200)
    )
    assert source.dtype == torch.float32
    full = {"u1": 255, "u2": 65535, "f4": 1}[dtype]
    expected = np.where(values == 200, np.nan, values / np.float32(full)).astype("f4")
    assert np.array_equal(source.load(0).permute(1, 2, 0).numpy(), expected, equal_nan=True)


def test_nan_and_infinity_are_refused_unless_nodata_is_set(tmp_path: Path) -> None:
    values = floats("f4")
    values[3, 4], values[5, 6] = np.nan, -np.inf
    tiff(values)(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"NaN or infinite pixels; set data\.nodata=nan"):
        open_one(tmp_path, 1).load(0)
    read = loaded(tmp_path, 1, Reading(nodata=float("nan")))[..., 0]
    assert np.array_equal(read, np.where(np.isfinite(values), values, np.nan), equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        ("u1", "0"),
        ("u2", "7.0"),
        ("i2", "-9999"),
        ("f4", "-3.4028234663852886e+38"),
        ("f8", "-1.7976931348623157e+308"),
    ],
)
def test_what_a_geotiff_names_as_nodata_is_refused_or_nan(dtype: str, text: str, tmp_path: Path) -> None:
    values = (GRAY % 200 + 20).astype(dtype)
    with np.errstate(over="ignore"):
        values[5:9, 6] = float(text)
    tiff(values, extratags=[nodata_tag(text)])(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"set data\.nodata=nan"):
        open_one(tmp_path, 1).load(0)
    read = loaded(tmp_path, 1, Reading(nodata=float("nan")))[..., 0]
    full = {"u1": 255, "u2": 65535}.get(dtype, 1)
    expected = (values / np.float64(full)).astype("f8")
    expected[5:9, 6] = np.nan
    assert np.allclose(read, expected, rtol=1e-6, equal_nan=True)
    part = open_one(tmp_path, 1).load_part(0, lambda h, w: Part(10, 0, 20, 20, (20, 20)))  # where none is
    assert part.shape == (1, 20, 20)


def test_tiles_that_a_geotiff_leaves_out_are_nodata(tmp_path: Path) -> None:
    sparse(tmp_path / "a.tif", nodata_tag("7"))
    read = loaded(tmp_path, 1, Reading(nodata=float("nan")))[..., 0]
    assert np.isnan(read[:, 32:]).all()
    assert np.array_equal(read[:, :32], GRAY[:32, :32].astype(np.float32) / np.float32(65535))


def test_nodata_is_found_before_colours_become_gray(tmp_path: Path) -> None:
    values = BYTES[..., :3].copy()
    values[4, 5] = (0, 90, 7)
    values[values == 0] = 1
    values[4, 5, 0] = 0
    Image.fromarray(values).save(tmp_path / "a.png")
    read = loaded(tmp_path, 1, Reading(nodata=0))[..., 0]
    assert np.argwhere(np.isnan(read)).tolist() == [[4, 5]]


# What is in DICOM and NIfTI


def test_a_dicom_window_is_applied_onto_0_to_1(tmp_path: Path) -> None:
    tags = {"WindowCenter": "40", "WindowWidth": "400", "RescaleSlope": "1", "RescaleIntercept": "-1024"}
    dicom(GRAY, **tags)(tmp_path / "a.dcm")
    units = GRAY.astype("f8") - 1024
    expected = np.clip((units - 39.5) / 399 + 0.5, 0, 1)  # PS3.3 C.11.2.1.2.1
    source = open_one(tmp_path, 1, Reading(window=True))
    assert source.dtype == torch.float32
    assert np.allclose(source.load(0)[0].numpy(), expected, atol=1e-6)
    dicom(GRAY, PhotometricInterpretation="MONOCHROME1", **tags)(tmp_path / "a.dcm")
    assert np.allclose(loaded(tmp_path, 1, Reading(window=True))[..., 0], 1 - expected, atol=1e-6)
    dicom(GRAY)(tmp_path / "a.dcm")
    with pytest.raises(ValueError, match=r"DICOM without a window; set data\.window=false"):
        loaded(tmp_path, 1, Reading(window=True))


def test_a_dicom_voi_table_is_applied_onto_0_to_1(tmp_path: Path) -> None:
    table = np.sort(rng.integers(0, 1024, 4096, dtype=np.uint16))
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", [4096, 0, 10])
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    dicom(GRAY, VOILUTSequence=[item])(tmp_path / "a.dcm")
    assert np.allclose(loaded(tmp_path, 1, Reading(window=True))[..., 0], table[GRAY] / 1023, atol=1e-6)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_slices_of_a_volume_are_images_of_their_own_with_its_label(name: str, packed: bool, tmp_path: Path) -> None:
    volume = BANDS.astype(np.int16) - 1000
    (tmp_path / "scan").mkdir()
    (tmp_path / "photo").mkdir()
    nifti(volume, slope=2, inter=5)(tmp_path / "scan" / name)
    Image.fromarray(floats("f4")).save(tmp_path / "photo" / "b.tif")
    root = tmp_path
    if packed:
        import tarfile

        root = tmp_path / "all.tar"
        with tarfile.open(root, "w") as tar:
            for part in ("photo/b.tif", f"scan/{name}"):
                tar.add(tmp_path / part, part)
    source = open_source("folder", str(root), ".", 1)
    assert len(source) == 13
    assert source.labels is not None
    assert source.labels.tolist() == [0] + [1] * 12
    assert source.describe(0).endswith("photo/b.tif")
    assert source.describe(8).endswith(f"scan/{name}[slice 7]")
    with_scale = volume.astype("f4") * 2 + 5
    assert np.array_equal(source.load(8)[0].numpy(), with_scale[..., 7])
    part = source.load_part(12, lambda h, w: Part(7, 9, 20, 11, (20, 11)))
    assert np.array_equal(part[0].numpy(), with_scale[7:27, 9:20, 11])


def test_a_slice_of_an_unpacked_volume_reads_only_its_part(tmp_path: Path) -> None:
    nifti(np.zeros((64, 64, 100), np.int16))(tmp_path / "a.nii")

    class Counted(io.FileIO):
        number = 0

        def readinto(self, buffer: Any, /) -> int:
            self.number += len(buffer)
            return super().readinto(buffer)

        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size)
            self.number += len(content)
            return content

    with Counted(tmp_path / "a.nii") as file:
        opened = fcmae.data.images.open_nifti(file, number=50)
        assert opened.read((0, 0, 64, 8)).shape == (64, 8, 1)
        assert file.number < 64 * 64 * 2 + 1000


# What is refused, in one line


def pages(path: Path) -> None:
    tifffile.imwrite(path, BANDS.transpose(2, 0, 1)[:3].copy(), photometric="minisblack")


def wide_volume(path: Path) -> None:
    nifti(np.zeros((4, 4, 3, 2), np.float32))(path)


def ppm(path: Path) -> None:
    path.write_bytes(b"P6 4 4 4095\n" + BANDS[:4, :4, :3].astype(">u2").tobytes())


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "pages": ("a.tif", pages, "3 pages; split it into one file per page"),
    "8-bit pages": (
        "a.tif",
        lambda p: tifffile.imwrite(p, BYTES.transpose(2, 0, 1).copy(), photometric="minisblack"),
        "4 pages; split it",
    ),
    "ImageJ, slices": (
        "a.tif",
        lambda p: tifffile.imwrite(p, BANDS.transpose(2, 0, 1).copy(), imagej=True, metadata={"axes": "ZYX"}),
        "12 pages; split it",
    ),
    "complex": ("a.tif", tiff(GRAY.astype(np.complex64)), "complex64 in place of pixels"),
    "complex npy": ("a.npy", lambda p: np.save(p, GRAY.astype(np.complex64)), "an image is numbers"),
    "deep palette": (
        "a.tif",
        tiff(GRAY % 256, photometric="palette", colormap=np.zeros((3, 65536), np.uint16)),
        "PALETTE in a TIFF that is deep",
    ),
    "AVIF of 10 bits": (
        "a.avif",
        lambda p: p.write_bytes(imagecodecs.avif_encode(BANDS[..., :3] >> 2, bitspersample=10)),
        "AVIF of more than 8 bits, of which 8 would be kept; save it as PNG or TIFF",
    ),
    "PPM of 16 bits": ("a.ppm", ppm, "PPM of 16 bits a channel, of which 8 would be kept; save it as PNG or TIFF"),
    "frames": ("a.dcm", dicom(BANDS[..., 0], NumberOfFrames=2), "2 frames; save those that are wanted"),
    "no image": ("a.dcm", dicom(BANDS[:0, ..., 0]), ""),
    "video": (
        "a.dcm",
        dicom(GRAY, "1.2.840.10008.1.2.4.100", b"xxxx"),
        "'MPEG2 Main Profile / Main Level' is not supported",
    ),
    "deflated": ("a.dcm", dicom(GRAY, "1.2.840.10008.1.2.1.99"), "deflated DICOM; save it otherwise"),
    "series of volumes": ("a.nii", wide_volume, "NIfTI of 4 x 4 x 3 x 2; save each volume"),
    "truncated TIFF": ("a.tif", lambda p: (tiff(BANDS[..., :3], photometric="rgb")(p), cut(p, 15_000)), "cut off"),
    "truncated tiles": (
        "a.tif",
        lambda p: (tiff(FIVE, planarconfig="contig", tile=(16, 16), compression="lzw")(p), cut(p, 20_000)),
        "",
    ),
    "truncated NIfTI": ("a.nii", lambda p: (nifti(GRAY)(p), cut(p, 3_000)), "cut off"),
    "truncated npy": ("a.npy", lambda p: (np.save(p, GRAY), cut(p, 3_000)), "cut off"),
    "truncated PNG": ("a.png", lambda p: (rgba16(p), cut(p, 3_000)), ""),
}
"""What is wrong -> the file's name, what writes it, how the line begins or goes on."""


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_single_image_is_refused_in_a_line(
    what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, write, line = REFUSED[what]
    write(tmp_path / name)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever libraries raise; the line is what counts)
        open_one(tmp_path, 3).load(0)
    assert line in str(caught.value)
    (read,) = read_images([tmp_path], 3)
    assert not isinstance(read, Picture)
    assert line in read.reason
    assert read.reason.isprintable()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("what", "library", "extra"),
    [
        ("TIFF, 16 bits", "tifffile", "deep"),
        ("TIFF, 5 bands, 8 bits", "tifffile", "deep"),
        ("PNG, 16 bits", "imagecodecs", "deep"),
        ("JPEG 2000, 16 bits", "imagecodecs", "deep"),
        ("DICOM", "pydicom", "dicom"),
        ("NIfTI", "nibabel", "nifti"),
    ],
)
def test_a_missing_library_is_named_with_its_extra_when_images_are_opened(
    what: str, library: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, write, values = FORMATS[what]
    write(tmp_path / name)
    for module in [module for module in sys.modules if module.split(".")[0] == library] or [library]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name}: .* needs {library}: pip install 'fcmae\[{extra}\]'$"):
        open_one(tmp_path, np.atleast_3d(values).shape[2])


def test_plain_tiffs_need_no_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("TIFF, 8 bits", "TIFF, 8 bits, alpha", "TIFF, 1 bit", "TIFF, white is 0, 8 bits", "TIFF, palette"):
        name, write, values = FORMATS[what]
        write(tmp_path / name)
        with monkeypatch.context() as patch:
            for library in ("tifffile", "imagecodecs"):
                patch.setitem(sys.modules, library, None)
            assert np.array_equal(loaded(tmp_path, np.atleast_3d(values).shape[2]), np.atleast_3d(values))


def test_deep_images_of_torchvisions_folder_are_whole(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    Image.fromarray(GRAY).save(tmp_path / "class" / "a.png")
    source = open_source("torch/folder", str(tmp_path), "train", 1)
    assert np.array_equal(source.load(0)[0].numpy(), GRAY)


def test_a_gzip_file_of_anything_else_is_no_image(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.nii.gz", "wb") as file:
        file.write(bytes(10_000))
    with pytest.raises(OSError, match="not an image of a type that is read"):
        open_one(tmp_path, 1).load(0)


def test_ycbcr_of_dicom_becomes_rgb(tmp_path: Path) -> None:
    with Image.open(ROOT / "docs" / "photos" / "bird.jpg") as opened:
        image = opened.convert("RGB").resize((70, 50))
    dicom(np.asarray(image.convert("YCbCr")), PhotometricInterpretation="YBR_FULL")(tmp_path / "a.dcm")
    seen = open_source("folder", str(tmp_path), ".", 3).load(0).permute(1, 2, 0)
    np.testing.assert_allclose(seen.int().numpy(), np.asarray(image).astype(int), atol=3)  # YCbCr is rounded


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_parts_of_jpeg_compressed_tiffs_are_what_pillow_decodes(tmp_path: Path, photometric: str) -> None:
    with Image.open(ROOT / "docs" / "photos" / "bird.jpg") as opened:
        image = np.asarray(opened.convert("RGB"))
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, compression="jpeg", photometric=photometric, tile=(128, 128))
    with path.open("rb") as file:
        part = open_tiff(file).read((10, 20, 200, 300))
    with Image.open(path) as opened:
        whole = np.asarray(opened.convert("RGB"))
    np.testing.assert_allclose(part.astype(int), whole[10:210, 20:320].astype(int), atol=2)  # another libjpeg
