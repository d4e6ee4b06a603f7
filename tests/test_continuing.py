"""benchmarks/continuing.py: its images, the runs that it compares, and how it takes up what was stopped."""

import gzip
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcmae.config import FinetuneConfig, PretrainConfig, load_config
from fcmae.data import open_source, save_arrays
from fcmae.training.schedule import Plan

ROOT = Path(__file__).parents[1]
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def continuing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    return importlib.import_module("continuing")


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    """Every image is filled with its label; the first pixel's green counts them."""
    for split, number in (("train", 100), ("val", 40)):
        labels = np.arange(number) % 10
        images = np.broadcast_to(labels[:, None, None, None], (number, 32, 32, 3)).astype(np.uint8)
        images[:, 0, 0, 1] = np.arange(number)
        save_arrays(tmp_path / "cifar10" / split, images, labels, NAMES)
    return tmp_path / "cifar10"


def write_fashion(folder: Path) -> Path:
    folder.mkdir()
    for word, number in (("train", 200), ("t10k", 50)):
        labels = (np.arange(number) % 10).astype(np.uint8)
        pixels = np.broadcast_to(labels[:, None, None], (number, 28, 28)).astype(np.uint8)
        (folder / f"{word}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (folder / f"{word}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    return folder


def test_the_classes_left_out_are_not_among_what_the_network_saw_before(
    continuing: Any, cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "IMAGES", 8)
    continuing.make_photographs(cifar10, tmp_path / "data")
    before = np.load(tmp_path / "data/eight/train/images.npy")
    assert sorted(set(before[:, 5, 5, 0])) == [0, 1, 2, 4, 6, 7, 8, 9]
    assert len(before) == 80
    left_out = open_source("arrays", str(tmp_path / "data/cats"), "train", 3)
    assert left_out.labels is not None
    assert [int(left_out.load(i)[0, 5, 5]) for i in range(8)] == [(3, 5)[label] for label in left_out.labels]
    assert left_out.labels.tolist().count(0) == left_out.labels.tolist().count(1) == 4
    assert len(open_source("arrays", str(tmp_path / "data/cats"), "val", 3)) == 8


def test_fashion_mnist_becomes_labelled_gray_arrays(
    continuing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuing, "IMAGES", 20)
    continuing.make_clothes(write_fashion(tmp_path / "fashion"), tmp_path / "data")
    for split, number in (("train", 20), ("val", 50)):
        source = open_source("arrays", str(tmp_path / "data/clothes"), split, 1)
        assert source.labels is not None
        assert len(source) == number
        assert all(int(source.load(i)[0, 0, 0]) == label for i, label in enumerate(source.labels))
        assert np.bincount(source.labels).tolist() == [number // 10] * 10


@pytest.fixture
def trained(continuing: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have run: none does, and each scores 0.5."""
    commands: list[list[str]] = []

    def train(script: str, config: str, run: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
        commands.append([script, config, f"output={run}", *keys])
        return [{"loss": 0.5} if script == "pretrain.py" else {"val_top1": 0.5}]

    monkeypatch.setattr(continuing, "train", train)
    return commands


def test_all_arms_have_as_many_updates_and_settings_that_are_read(
    continuing: Any, trained: list[list[str]], cifar10: Path, tmp_path: Path
) -> None:
    files = [str(cifar10), f"--fashion={write_fashion(tmp_path / 'fashion')}", f"--runs={tmp_path / 'runs'}"]
    args = continuing.parse_arguments(["run", *files, f"--json={tmp_path / 'results.jsonl'}"])
    continuing.run_all(args)
    updates: dict[str, set[int]] = {"pretrain.py": set(), "finetune.py": set()}
    outputs: set[str] = set()
    for script, path, *keys in trained:
        config = load_config(PretrainConfig if script == "pretrain.py" else FinetuneConfig, path, keys)
        assert config.output not in outputs
        outputs.add(config.output)
        if not config.output.endswith("base"):
            assert config.init_from is None or Path(config.init_from).is_relative_to(tmp_path / "runs")
            images = 2000 if script == "pretrain.py" else 200
            updates[script].add(Plan.of(config, images, 1).total_steps)
    assert updates == {"pretrain.py": {313}, "finetune.py": {250}}

    number = len(trained)
    continuing.run_all(args)
    assert len(trained) == number + 1  # the base, which finds itself finished
    table = continuing.table(tmp_path / "results.jsonl")
    assert "| scratch | 0.5000 (0.5000 to 0.5000) | 50.0 (50.0 to 50.0) |" in table
    assert "| scratch | 0.5000 (0.5000 to 0.5000) |\n" in table
    assert "| never pretrained |  | 50.0 (50.0 to 50.0) |" in table


def test_no_results_are_an_error(continuing: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results"):
        continuing.table(tmp_path / "none.jsonl")


def test_the_shipped_results_are_what_the_documents_show(continuing: Any) -> None:
    results = ROOT / "benchmarks/results/continuing-cpu.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    arms = {(images, arm) for images, names in continuing.SETS.items() for arm in names}
    arms |= {("clothes", arm) for arm in continuing.STARTS}
    assert {(line["images"], line["arm"], line["seed"]) for line in lines} == {
        (*arm, seed) for arm in arms for seed in continuing.SEEDS
    }
    text = (ROOT / "docs/results.md").read_text()
    assert all(table in text for table in continuing.table(results).split("\n\n"))
