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
    options = [*TINY, *ONCE, "--ways", *WAYS, f"--json={tmp_path / 'out.json'}"]
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), *options]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    for way in WAYS:
        assert f"| {way} " in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "date", "device", "threads", "torch"} <= written.keys()
    (atto,) = written["variants"]
    assert atto["variant"] == "atto"
    assert [row["way"] for row in atto["ways"]] == WAYS
    for row in atto["ways"]:
        assert len(row["ms_rounds"]) == 1
        assert row["ms"] > 0
        assert row["peak_memory_mb"] > 0
        assert 0 < row["of_matmul"] < 1
        assert 0 < row["of_bandwidth"] < 1
    assert atto["ways"][WAYS.index("masked")]["ratio"] == 1.0


def test_the_counted_arithmetic_is_what_the_paper_sized_network_takes(modules: tuple[Any, Any]) -> None:
    train_step, _ = modules
    args = train_step.parse_args(["--batch=1", "--variant=base"])
    assert train_step.work(args)["flop"] == pytest.approx(36e9, rel=0.05)  # 6.0 GMAC forward, three times that


@pytest.mark.minkowski
def test_train_step_measures_the_engine_and_its_own_convolution() -> None:
    ways = ["packed", "minkowski", "channelwise"]
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "train_step.py"), *TINY, *ONCE, "--ways", *ways]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    for way in ways:
        assert f"| {way} " in out
        assert f"check: {way} differs from masked" in out


def test_every_way_of_ours_gives_the_loss_and_gradient_of_masked(modules: tuple[Any, Any]) -> None:
    train_step, _ = modules
    ways = ["packed", "plain", "masked-channels_last", "spark"]
    args = train_step.parse_args([*TINY, "--image-size=96", "--ways", *ways])
    assert list(train_step.check_ways(args)) == ways


def test_an_official_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    options = [*TINY, *ONCE, "--ways", "packed", "official", "--official", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert (
        done.stderr.strip().splitlines()[-1].startswith(f"error: --official {tmp_path}: holds no models/fcmae.py")
    )


@pytest.mark.parametrize("leak", ["hide", "norm"])
def test_a_leak_in_the_rival_stops_the_run(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, leak: str
) -> None:
    train_step, spark = modules
    leaking = {"hide": lambda sites, x: x, "norm": spark.DenseSites.norm}[leak]
    monkeypatch.setattr(spark.SparkSites, leak, leaking)
    args = train_step.parse_args([*TINY, "--ways", "spark"])
    with pytest.raises(SystemExit, match="spark does not give the"):
        train_step.check_ways(args)


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


def test_scaling_measures_every_axis(tmp_path: Path) -> None:
    sizes = [
        "--batches",
        "1",
        "2",
        "--image-sizes",
        "64",
        "96",
        "--mask-ratios",
        "0.5",
        "0.75",
        "--depths",
        "1",
        "2",
    ]
    options = ["--threads=1", "--rounds=1", "--warmup=0", *sizes, f"--json={tmp_path / 'out.json'}"]
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), *options]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout
    axes = json.loads((tmp_path / "out.json").read_text())["axes"]
    assert list(axes) == ["batch", "image size", "mask ratio", "depth"]
    for axis, rows in axes.items():
        assert f"{axis}" in out
        assert len(rows) == 2
        assert all(row["ms"] > 0 and row["sites"] > 0 for row in rows)
    assert axes["batch"][1]["sites"] == 2 * axes["batch"][0]["sites"]
    assert axes["mask ratio"][0]["sites"] > axes["mask ratio"][1]["sites"]
