"""The benchmarks run, on a configuration far too small to mean anything."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--image-size=64", "--batch=2", "--device=cpu", "--threads=1"]
ONCE = ["--warmup=0", "--rounds=1", "--steps=1"]
WAYS = ["packed", "masked", "spark"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Import benchmarks/train_step.py and benchmarks/spark.py as the script itself does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step"), importlib.import_module("spark")


def test_train_step_prints_every_way_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), *TINY, *ONCE, f"--json={tmp_path / 'out.json'}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    for way in WAYS:
        assert f"| {way} " in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "date", "device", "threads", "torch"} <= written.keys()
    assert [row["way"] for row in written["ways"]] == WAYS
    for row in written["ways"]:
        assert len(row["ms_rounds"]) == 1
        assert row["ms"] > 0
        assert row["peak_memory_mb"] > 0
    assert written["ways"][WAYS.index("masked")]["ratio"] == 1.0


@pytest.mark.minkowski
def test_layouts_measures_every_sparse_layout_and_the_engines_own_convolution() -> None:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "layouts.py"), *TINY, *ONCE]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    for way in ("masked", "packed", "minkowski", "channelwise"):
        assert f"| {way} " in out
    for way in ("packed", "minkowski", "channelwise"):
        assert f"check: {way} differs from masked" in out


def test_spark_gives_the_loss_and_gradient_of_masked(modules: tuple[Any, Any]) -> None:
    train_step, _ = modules
    args = train_step.parse_args([*TINY, "--image-size=96", "--layouts", *WAYS])
    differences = train_step.check_layouts(args)
    assert sorted(differences) == ["packed", "spark"]


@pytest.mark.parametrize("leak", ["hide", "norm"])
def test_a_leak_in_the_rival_stops_the_run(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    train_step, spark = modules
    leaking = {"hide": lambda sites, x: x, "norm": spark.DenseSites.norm}[leak]
    monkeypatch.setattr(spark.SparkSites, leak, leaking)
    with pytest.raises(SystemExit, match="spark does not give the"):
        train_step.check_layouts(train_step.parse_args([*TINY, "--layouts", "spark"]))


def test_spark_has_the_same_parameters(modules: tuple[Any, Any]) -> None:
    train_step, spark = modules
    args = train_step.parse_args(TINY)
    rival, ours = (train_step.build_model(layout, args) for layout in ("spark", "packed"))
    assert isinstance(rival.encoder, spark.SparkEncoder)
    torch.testing.assert_close(rival.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_data_measures_every_way_of_loading_and_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "data.py"), "--image-size=32", "--batch=2"]
    command += ["--batches=1", "--rounds=1", f"--json={tmp_path / 'out.json'}"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    ways = ["imagefolder", "timm", "webdataset", "folder", "prepared", "prepared, crops"]
    if importlib.util.find_spec("webdataset") is None:
        ways.remove("webdataset")
        assert "webdataset: left out" in out
        assert "pip install 'fcmae[bench]'" in out
    assert all(f"| {way} " in out for way in ways)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["way"] for row in written["ways"]] == ways
    assert all(row["images_per_s"] > 0 for row in written["ways"])
    assert written["ways"][0]["ratio"] == 1.0
    assert "13 JPEGs" in written["images"]
