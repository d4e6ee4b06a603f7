"""`fcmae stats`: against all pixels at once in numpy, images of every kind, and what a run makes of its file."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from conftest import ROOT, error_line, run_main
from PIL import Image

from fcmae import pretrain
from fcmae.__main__ import run
from fcmae.config import DataSection, FinetuneRecipe, PretrainRecipe, parse_config
from fcmae.data import Reading, open_source, save_arrays
from fcmae.data.images import ImageSource
from fcmae.data.pixels import FULL
from fcmae.data.stats import (
    ALIKE,
    PERCENTILES,
    Histogram,
    Statistics,
    clipped_moments,
    difference_hash,
    float_keys,
    float_values,
    join,
    pairs_alike,
    percentile,
    read_statistics,
    rounded,
    summarise,
    survey,
)
from fcmae.errors import UserError
from fcmae.load import resolve_recipe

QUICK = ("model.variant=[[1,1,1,1],[8,8,16,16]]", "model.decoder_dim=16", "train.max_steps=1", "data.num_workers=0")
PHOTOS = ROOT / "docs" / "photos"


def stats(*arguments: object) -> int:
    return run_main(run, "stats", *map(str, arguments), "--num-workers", "0")


def write_all(folder: Path, images: list[np.ndarray]) -> Path:
    """Write images (h, w) or (h, w, c), a .npy file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        np.save(folder / f"{i}.npy", image)
    return folder


def draw(kind: str, channels: int, number: int = 7, seed: int = 0) -> list[np.ndarray]:
    """Images of different sizes and skewed values; of floats some far from zero, some NaN."""
    generator = np.random.default_rng(seed)
    shapes = [(generator.integers(1, 30), generator.integers(1, 30), channels) for _ in range(number)]
    values = [generator.gamma(2, 0.1, shape) for shape in shapes]
    if kind == "float32":
        values = [(300 - 40 * value).astype(np.float32) for value in values]
        for value in values:
            value[generator.random(value.shape) < 0.1] = np.nan
        return values
    full = np.iinfo(kind).max
    return [(value.clip(0, 1) * full).astype(kind) for value in values]


def summary(folder: Path, workers: int = 0, clip: tuple[float, float] | None = None) -> dict[str, Any]:
    source = open_source("folder", str(folder), "train", None, reading=Reading(nodata=None))
    if source.dtype == torch.float32:
        source = open_source("folder", str(folder), "train", None, reading=Reading(nodata=float("nan")))
    return summarise(source, survey(source, range(len(source)), workers)[0], clip=clip)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_mean_std_and_percentiles_are_those_of_all_known_pixels_together(
    tmp_path: Path, kind: str, channels: int
) -> None:
    images = draw(kind, channels)
    found = summary(write_all(tmp_path / "images", images))
    pixels = np.concatenate([image.reshape(-1, channels) for image in images]).astype(np.float64)
    pixels /= FULL[getattr(torch, kind)]
    np.testing.assert_allclose(found["mean"], np.nanmean(pixels, 0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], np.nanstd(pixels, 0), rtol=1e-10)
    assert found["unknown"] == pytest.approx(np.isnan(pixels).mean())
    for percent in PERCENTILES:
        expected = np.nanpercentile(pixels, percent, axis=0, method="inverted_cdf")
        tolerance = 2**-12 if kind == "float32" and percent not in (0, 100) else 1e-15
        np.testing.assert_allclose(found["percentiles"][f"{percent:g}"], expected, rtol=tolerance)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_clipping_comes_before_mean_and_std(tmp_path: Path, kind: str) -> None:
    images = draw(kind, 2)
    found = summary(write_all(tmp_path / "images", images), clip=(5, 90))
    pixels = np.concatenate([image.reshape(-1, 2) for image in images]).astype(np.float64)
    pixels /= FULL[getattr(torch, kind)]
    limits = [np.nanpercentile(pixels, percent, axis=0, method="inverted_cdf") for percent in (5, 90)]
    clipped = pixels.clip(*limits)
    tolerance = 2**-12 if kind == "float32" else 1e-12
    np.testing.assert_allclose(found["clip"], limits, rtol=tolerance)
    np.testing.assert_allclose(found["mean"], np.nanmean(clipped, 0), rtol=tolerance)
    np.testing.assert_allclose(found["std"], np.nanstd(clipped, 0), rtol=20 * tolerance)  # of values of 300


def test_limits_of_a_channel_that_is_nearly_always_the_same_are_apart(tmp_path: Path) -> None:
    image = np.zeros((50, 50, 2), np.float32)
    image[0, 0], image[..., 1] = 0.5, np.linspace(0, 1, 50)
    found = summary(write_all(tmp_path / "images", [image]), clip=(1, 99))
    (low, _), (high, _) = found["clip"]
    assert (low, high) == (0, 1)
    assert found["mean"][0] == pytest.approx(image[..., 0].mean(), rel=1e-3)


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "images", draw("uint16", 3, number=40))
    (folder / "broken.npy").write_bytes(b"junk")
    source = open_source("folder", str(folder), "train", None)
    (one, bad), (two, bad_of_two) = (survey(source, range(len(source)), workers) for workers in (0, 2))
    assert [image.name for image in bad] == [str(folder / "broken.npy")]
    assert bad == bad_of_two
    for a, b in zip(one.facts, two.facts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12 if a.dtype.kind == "f" else 0)
    for a, b in zip(one.histograms, two.histograms, strict=True):
        assert np.array_equal(a.keys, b.keys)
        assert np.array_equal(a.counts, b.counts)


def test_histograms_of_floats_keep_order_zeros_and_small_whole_numbers() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate(
        [generator.standard_normal(1000) * 10.0 ** generator.integers(-30, 30, 1000), np.arange(-4096, 4097)]
    ).astype(np.float32)
    values = np.append(values, np.array([0, -0.0, 3.4028235e38, -3.4028235e38], np.float32))
    back = float_values(float_keys(values))
    np.testing.assert_allclose(back, values, rtol=2**-12)
    assert np.array_equal(back[1000:-4], values[1000:-4])
    order = np.argsort(values)
    assert (np.diff(float_keys(values)[order]) >= 0).all()


def test_merging_histograms_counts_all_pixels() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 99, number).astype(np.uint16) for number in (0, 5, 500)]
    merged = Histogram.merged([Histogram.of(part) for part in parts])
    keys, counts = np.unique(np.concatenate(parts), return_counts=True)
    assert np.array_equal(merged.keys, keys)
    assert np.array_equal(merged.counts, counts)
    values = np.concatenate(parts).astype(float)
    assert [percentile(keys.astype(float), counts, p) for p in (0, 50, 100)] == [
        values.min(),
        np.percentile(values, 50, method="inverted_cdf"),
        values.max(),
    ]
    assert clipped_moments(keys.astype(float), counts, 10, 50) == pytest.approx(
        (values.clip(10, 50).mean(), values.clip(10, 50).std())
    )


# Doubles


def hashes_of(seed: int, number: int) -> np.ndarray:
    """Different hashes, many of them near each other, and many with the same first bits."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(0, 2**64, number, dtype=np.uint64)
    near = hashes[: number // 2].copy()
    for _ in range(5):
        near ^= np.uint64(1) << generator.integers(0, 64, len(near), dtype=np.uint64)
    crowded = generator.integers(0, 2**20, number // 8, dtype=np.uint64)
    return np.unique(np.concatenate([hashes, near, crowded]))


@pytest.mark.parametrize("seed", range(3))
def test_all_pairs_that_look_alike_are_found_and_no_others(seed: int) -> None:
    hashes = hashes_of(seed, 400)
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(len(hashes)), 2)
        if (hashes[i] ^ hashes[j]).bit_count() <= ALIKE
    }
    found = {(min(pair), max(pair)) for pairs in pairs_alike(hashes) for pair in pairs.tolist()}
    assert len(expected) > 10
    assert found == expected


def test_one_hash_or_none_has_no_pairs() -> None:
    for number in (0, 1):
        assert list(pairs_alike(np.arange(number, dtype=np.uint64))) == []


def test_pairs_join_into_groups() -> None:
    pairs = [[(5, 1), (6, 7)], [(2, 2), (3, 5)], [(1, 3)]]
    assert join(8, [np.array(some) for some in pairs]) == [[1, 3, 5], [6, 7]]
    assert join(0, []) == []
    generator = np.random.default_rng(0)
    pairs = generator.integers(0, 200, (80, 2))
    groups = [{i} for i in range(200)]
    for one, other in pairs.tolist():
        (a,), (b,) = ([group for group in groups if thing in group] for thing in (one, other))
        groups = [group for group in groups if group not in (a, b)] + [a | b]
    expected = sorted(sorted(group) for group in groups if len(group) > 1)
    assert sorted(join(200, [pairs[:30], pairs[30:]])) == expected


def test_a_hash_survives_shrinking_and_brightening_and_tells_photographs_apart() -> None:
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]

    def hashed(image: Image.Image, brighter: float = 1.0) -> int:
        return difference_hash((np.asarray(image) * brighter).transpose(2, 0, 1))

    hashes = [hashed(photo) for photo in photos]
    for photo, its in zip(photos, hashes, strict=True):
        small = photo.resize((photo.width // 2, photo.height // 2))
        assert (hashed(small) ^ its).bit_count() <= ALIKE
        assert (hashed(photo, 0.5) ^ its).bit_count() <= ALIKE
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) > 3 * ALIKE


# The command


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Noise, one of it twice, a photograph twice, a flat image, a gray one, one that is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"noise-{i}.png")
    Image.open(folder / "noise-0.png").save(folder / "noise-again.png", compress_level=0)
    photo = Image.open(next(iter(sorted(PHOTOS.glob("*.jpg")))))
    photo.save(folder / "photo.png")
    photo.resize((photo.width // 2, photo.height // 2)).save(folder / "photo-small.jpg", quality=80)
    Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save(folder / "flat.png")
    gray = generator.integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(gray).convert("RGB").save(folder / "gray.png")
    (folder / "broken.jpg").write_bytes(b"junk")
    return folder


def test_what_is_odd_among_images_is_named(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in images.iterdir()}
    assert stats(images) == 0
    out = capsys.readouterr().out
    lines = [line.split("  ") for line in out.splitlines()]
    by_title = {line[0]: line[-1].strip() for line in lines}
    assert by_title["images"] == f"10 in {images}, split train"
    assert f"{images}/broken.jpg: not an image of a type that is read" in out
    assert "most often 40 x 50, 7 images" in out
    assert by_title["pixels"] == "uint8 (9 images)"
    assert by_title["channels"] == "3 (9 images)"
    assert by_title["gray"].startswith("2 of 9 images")
    assert by_title["constant"] == f"1 image: {images}/flat.png"
    assert by_title["same pixels"] == "2 images in 1 group"
    assert f"{images}/noise-0.png, {images}/noise-again.png\n" in out
    assert f"{images}/photo.png, {images}/photo-small.jpg\n" in out or (
        f"{images}/photo-small.jpg, {images}/photo.png\n" in out
    )
    section = yaml.safe_load(out[out.index("model:") :])
    assert section["model"] == {"in_chans": 3}
    assert parse_config(DataSection, section["data"] | {"root": "x"}, "a test").dtype == "uint8"
    assert {path: path.read_bytes() for path in images.iterdir()} == before


def test_the_file_is_read_back_as_it_was_written_and_says_what_the_section_says(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "stats"
    assert stats(images, "--output", out, "--clip", 1, 99) == 0
    assert sorted(path.name for path in out.iterdir()) == ["data.yaml", "histograms.png", "stats.json"]
    found = read_statistics(out / "stats.json")
    assert (found.num_images, found.looked_at, len(found.broken)) == (10, 10, 1)
    assert found.channels == {3: 9}
    pasted = yaml.safe_load((out / "data.yaml").read_text())
    assert pasted["data"] == found.section()
    assert len(pasted["data"]["clip"][0]) == 3
    assert Statistics.model_validate_json(found.model_dump_json()) == found
    assert Image.open(out / "histograms.png").width > 500
    capsys.readouterr()
    assert "--overwrite" in error_line(run, capsys, "stats", str(images), "--output", str(out))
    assert stats(images, "--output", out, "--overwrite") == 0
    assert read_statistics(out / "stats.json").clip is None
    assert "whose images are read" in error_line(
        run, capsys, "stats", str(images), "--output", str(images / "stats")
    )


def test_arrays_and_some_of_many_images_are_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (20, 8, 9, 5), dtype=np.uint16)
    save_arrays(tmp_path / "arrays" / "train", pixels)
    assert stats(tmp_path / "arrays", "--images", 4, "--output", tmp_path / "stats") == 0
    found = read_statistics(tmp_path / "stats" / "stats.json")
    assert (found.name, found.num_images, found.looked_at, found.in_chans) == ("arrays", 20, 4, 5)
    chosen = pixels[::5] / 65535
    np.testing.assert_allclose(found.mean, chosen.mean((0, 1, 2)), rtol=1e-12)
    assert "4 of them, evenly chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("write", "arguments", "parts"),
    [
        (lambda f: f.mkdir(), [], ["no images in it"]),
        (lambda f: (f.mkdir(), (f / "a.png").write_bytes(b"x")), [], ["none of 1 images decodes", "a.png"]),
        (lambda f: None, [], ["no such folder or file"]),
        (lambda f: write_all(f, draw("float32", 2)), [], ["set data.nodata=nan"]),
        (lambda f: write_all(f, [np.full((3, 3, 1), np.nan, np.float32)]), ["--nodata", "nan"], ["channel 0"]),
        (lambda f: write_all(f, draw("uint8", 2)), ["--dtype", "uint8", "--nodata", "0"], ["data.dtype=uint8"]),
        (lambda f: write_all(f, draw("uint8", 2)), ["--nodata", "none"], ["nodata", "got 'none'"]),
        (lambda f: write_all(f, draw("uint8", 2)), ["--clip", "99", "1"], ["--clip 99 1"]),
        (lambda f: write_all(f, draw("uint8", 2)), ["--images", "0"], ["--images 0: must be at least 1"]),
        (lambda f: write_all(f, draw("uint8", 5)), ["--channels", "3"], ["5 bands, but model.in_chans is 3"]),
    ],
)
def test_what_has_no_statistics_gets_one_line(
    write: Callable[[Path], object],
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "images")
    code = stats(tmp_path / "images", *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("looking at")]
    assert code == 2
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines


def test_the_smallest_images_and_the_largest_values_have_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path / "dots", [np.full((1, 1, 3), value, np.uint8) for value in (3, 9)])
    assert stats(tmp_path / "dots", "--output", tmp_path / "of-dots") == 0
    write_all(tmp_path / "huge", [np.array([[1e37, -3e38], [5e37, 3e38]], np.float32)])
    capsys.readouterr()
    assert stats(tmp_path / "huge", "--output", tmp_path / "of-huge") == 0
    assert "no configuration takes these: data.mean" in capsys.readouterr().err.replace(
        "these: mean", "these: data.mean"
    )
    assert read_statistics(tmp_path / "of-huge" / "stats.json").percentiles["100"] == pytest.approx((3e38,))
    write_all(tmp_path / "flat", [np.zeros((4, 4, 1), np.uint8)])
    assert stats(tmp_path / "flat", "--output", tmp_path / "of-flat") == 0
    assert read_statistics(tmp_path / "of-flat" / "stats.json").section()["std"] == [1.0]


def test_numbers_are_rounded_to_what_their_spread_deserves() -> None:
    assert rounded(290.123456, 0.0123456) == 290.123456
    assert rounded(290.123456, 12.3) == 290.123
    assert rounded(1234567.0, 0) == 1234600.0
    assert rounded(0, 0) == 0


# data.stats


@pytest.fixture
def five_bands(tmp_path: Path) -> Path:
    """Images of 12 bits in 16, five bands; and their statistics in stats/."""
    generator = np.random.default_rng(0)
    folder = write_all(
        tmp_path / "bands", [generator.integers(0, 4096, (40, 44, 5), dtype=np.uint16) for _ in range(6)]
    )
    assert stats(folder, "--clip", 1, 99, "--output", tmp_path / "stats") == 0
    return folder


def config_of(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_run_takes_auto_from_data_stats_keeps_the_numbers_and_resumes_with_them(
    five_bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stats" / "stats.json"
    auto = ["data.mean=auto", "data.std=auto", "data.clip=auto", f"data.stats={file}"]
    words = [
        *("--config", "small-folder-cpu", str(five_bands), *QUICK, "model.in_chans=5", "data.image_size=32"),
        *("model.stem_stride=1", "visualize.num_images=0", "resume=auto", f"output={tmp_path / 'run'}", *auto),
    ]
    assert run_main(pretrain.main, *words) == 0
    out = capsys.readouterr().out
    section = read_statistics(file).section()
    assert f"data.mean={section['mean']}" in out
    assert f"(from {file})" in out
    assert "standard deviations from the mean" not in out
    stored = config_of(tmp_path / "run")["data"]
    assert (stored["mean"], stored["std"], stored["clip"]) == (section["mean"], section["std"], section["clip"])
    file.unlink()
    assert run_main(pretrain.main, *words, "train.max_steps=2") == 0
    assert f"(from {tmp_path / 'run'})" in capsys.readouterr().out
    assert config_of(tmp_path / "run")["data"] == stored

    next_run = [word for word in words if not word.startswith(("data.stats", "output"))]
    next_run += [f"init_from={tmp_path / 'run'}", f"output={tmp_path / 'next'}", "data.clip=null"]
    assert run_main(pretrain.main, *next_run) == 0
    assert f"(from {tmp_path / 'run'})" in capsys.readouterr().out
    assert config_of(tmp_path / "next")["data"]["mean"] == section["mean"]
    line = error_line(pretrain.main, capsys, *next_run, "init_from=null", f"output={tmp_path / 'none'}")
    assert line.endswith(
        f"data.mean=auto: nothing says what it is; fcmae stats {five_bands} --output STATS computes it, for "
        "data.stats=STATS/stats.json"
    )


@pytest.mark.any_cpu
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.in_chans=3", ["stats.json: data.mean has 5 values, but model.in_chans is 3"]),
        ("data.dtype=uint8", ["read with data.dtype=uint16, but the run has uint8"]),
        ("data.nodata=nan", ["read with data.nodata=None, but the run has nan"]),
        ("data.stats=nowhere.json", ["nowhere.json: not what fcmae stats writes"]),
    ],
)
def test_statistics_of_other_images_are_refused_in_one_line(
    override: str, parts: list[str], five_bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stats" / "stats.json"
    words = [
        *("--config", "small-folder-cpu", str(five_bands), "model.in_chans=5", f"output={tmp_path / 'run'}"),
        *("data.mean=auto", "data.std=auto", f"data.stats={file}", override),
    ]
    line = error_line(pretrain.main, capsys, *words)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_statistics_are_named(tmp_path: Path, five_bands: Path) -> None:
    file = tmp_path / "stats" / "stats.json"
    whole = json.loads(file.read_text())
    for wrong in (
        "{",
        "[]",
        json.dumps(whole | {"more": 1}),
        json.dumps(whole | {"mean": []}),
        json.dumps(whole | {"std": ["1", 1, 1, 1, 1]}),
        json.dumps(whole | {"format": "fcmae stats 9"}),
        file.read_text().replace('"unknown": 0.0', '"unknown": NaN'),
    ):
        file.write_text(wrong)
        with pytest.raises(UserError, match=r"stats\.json: not what fcmae stats writes") as caught:
            read_statistics(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="not a regular file"):
        read_statistics(tmp_path)


def test_numbers_given_need_no_statistics(tmp_path: Path) -> None:
    values = {"output": "x", "model": {"variant": "atto"}, "data": {"root": "x", "stats": "nowhere.json"}}
    assert parse_config(PretrainRecipe, values, "a test").automatic == []


def test_fine_tuning_takes_from_statistics_how_images_are_read_too(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "images", draw("float32", 3))
    assert stats(folder, "--nodata", "nan", "--output", tmp_path / "stats") == 0
    file = tmp_path / "stats" / "stats.json"
    values = {"output": str(tmp_path / "run"), "model": {"variant": "atto"}}
    recipe = parse_config(FinetuneRecipe, values | {"data": {"root": "x", "stats": str(file)}}, "a test")
    config, said = resolve_recipe(recipe)
    section = read_statistics(file).section()
    assert (config.data.nodata, list(config.data.mean), config.data.clip) == ("nan", section["mean"], None)
    assert said.endswith(f"(from {file})")
    given = {"root": "x", "stats": str(file), "nodata": None}
    with pytest.raises(UserError, match=r"read with data\.nodata=nan, but the run has None"):
        resolve_recipe(parse_config(FinetuneRecipe, values | {"data": given}, "a test"))


def test_channels_are_counted_without_transparency(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    expected: dict[str, int] = {}
    for mode, channels in {"L": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3, "1": 1}.items():
        pixels = generator.integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.png")
        expected[f"{mode}.png"] = channels
    for bands, kind in ((2, "unspecified"), (4, "unassalpha"), (5, "unspecified")):
        colours = min(bands, 3) if bands == 4 else 1
        settings: dict[str, Any] = {
            "photometric": "rgb" if colours == 3 else "minisblack",
            "planarconfig": "contig",
        }
        pixels = generator.integers(0, 65536, (8, 9, bands), dtype=np.uint16)
        tifffile.imwrite(tmp_path / f"{bands}.tif", pixels, **settings, extrasamples=[kind] * (bands - colours))
        expected[f"{bands}.tif"] = colours if bands == 4 else bands
    source = open_source("folder", str(tmp_path), "train", None)
    assert isinstance(source, ImageSource)
    assert {Path(source.describe(i)).name: source.stored(i)[1] for i in range(len(source))} == expected
    assert source.channels == 3  # as most have
