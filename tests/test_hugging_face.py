"""Datasets of Hugging Face's: on disk as Arrow files, and opened by timm; the files' own bytes, by index."""

import io
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image
from test_sources import error_of

from fcmae.data import open_source
from fcmae.data.images import ImageSource

NEEDS = "needs the package datasets: pip install datasets"


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def dataset_of(columns: Mapping[str, list[Any]], **features: Any) -> Any:
    datasets = pytest.importorskip("datasets", reason=NEEDS)
    return datasets.Dataset.from_dict(dict(columns), features=datasets.Features(features))


def pets(number: int = 10) -> Any:
    datasets = pytest.importorskip("datasets", reason=NEEDS)
    columns = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(number)],
        "label": [i % 2 for i in range(number)],
    }
    return dataset_of(columns, image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))


def test_a_dataset_on_disk_has_the_images_labels_and_splits_that_were_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason=NEEDS)
    datasets.DatasetDict({"train": pets(), "validation": pets(4)}).save_to_disk(tmp_path / "pets")
    source = open_source("folder", str(tmp_path / "pets"), "train", 3)
    assert isinstance(source, ImageSource)
    assert source.labels is not None
    assert (source.labels.tolist(), source.class_names) == ([0, 1] * 5, ("cat", "dog"))
    assert len(open_source("folder", str(tmp_path / "pets"), "val", 3)) == 4
    for index in range(10):
        pixels = np.asarray(Image.open(io.BytesIO(encoded(index))))
        assert torch.equal(source.load(index), torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    assert source.describe(3) == f"{tmp_path / 'pets' / 'train'}[3]"
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.load(9), source.load(9))


def test_a_dataset_that_was_shuffled_and_chosen_from_is_read_as_it_was_saved(tmp_path: Path) -> None:
    chosen = pets().shuffle(seed=1).select(range(4))
    chosen.save_to_disk(tmp_path / "pets")
    source = open_source("folder", str(tmp_path / "pets"), "train", 3)
    assert source.labels is not None
    assert source.labels.tolist() == chosen["label"][:]


def test_columns_that_are_not_clear_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason=NEEDS)
    image = [{"bytes": encoded(0), "path": None}]
    dataset_of({"a": image, "b": image}, a=datasets.Image(), b=datasets.Image()).save_to_disk(tmp_path / "two")
    assert "(columns of images: a, b); rename" in error_of("folder", str(tmp_path / "two"), "train", 3)
    dataset_of({"x": [1]}, x=datasets.Value("int64")).save_to_disk(tmp_path / "none")
    assert "(columns: x)" in error_of("folder", str(tmp_path / "none"), "train", 3)
    columns = {"photo": image, "label": [-1]}
    dataset_of(columns, photo=datasets.Image(), label=datasets.ClassLabel(names=["a"])).save_to_disk(
        tmp_path / "one"
    )
    source = open_source("folder", str(tmp_path / "one"), "train", 3)
    assert (len(source), source.labels, source.class_names) == (1, None, None)


def test_a_damaged_dataset_is_refused_and_a_row_without_image_left_to_training(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason=NEEDS)
    image = [{"bytes": encoded(0), "path": None}, None]
    dataset_of({"image": image}, image=datasets.Image()).save_to_disk(tmp_path / "some")
    source = open_source("folder", str(tmp_path / "some"), "train", 3)
    with pytest.raises(ValueError, match="a row without an image"):
        source.load(1)
    (data,) = (tmp_path / "some").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:100])
    assert "not a readable dataset of Hugging Face's" in error_of("folder", str(tmp_path / "some"), "train", 3)


def test_a_dataset_becomes_shards_of_its_own_bytes(tmp_path: Path, command: Command) -> None:
    pets().save_to_disk(tmp_path / "pets")
    code, out, _ = command("shard", tmp_path / "pets", tmp_path / "out", "--images", 3, "--workers", 0)
    assert code == 0
    assert "10 images in 4 tar files" in out
    source = open_source("folder", str(tmp_path / "out"), "train", 3)
    assert isinstance(source, ImageSource)
    assert source.class_names == ("cat", "dog")
    read = [source.files.open(index) for index in range(10)]
    assert sorted(file.read() for file in read) == sorted(map(encoded, range(10)))  # pyright: ignore


def test_timm_opens_a_dataset_by_its_name_with_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason=NEEDS)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: pets())  # of the Hub, which tests do not ask
    source = open_source("hfds/org/pets", str(tmp_path), "train", 3)
    assert source.labels is not None
    assert (source.labels.tolist(), source.class_names) == ([0, 1] * 5, ("cat", "dog"))
    assert source.load(3).shape == (3, 40, 48)
    assert source.describe(3) == "hfds/org/pets[3]"


def test_without_the_package_the_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in error_of("folder", str(tmp_path), "train", 3)


def test_a_stream_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert "use hfds/NAME, which is downloaded once" in error_of("hfids/org/pets", str(tmp_path), "train", 3)
