"""The benchmarks run, on a configuration far too small to mean anything."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--image-size=64", "--batch=2", "--device=cpu", "--threads=1"]
ONCE = ["--warmup=0", "--rounds=1", "--steps=1"]
WAYS = ["packed", "masked"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Import benchmarks/train_step.py and benchmarks/spark.py as the script itself does, which then run here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step"), importlib.import_module("spark")


def test_train_step_prints_every_way_and_writes_json(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step, _ = modules
    monkeypatch.setattr(train_step, "fastest", train_step.seconds_of)  # of one time, not of ten
    train_step.main([*TINY, *ONCE, "--ways", *WAYS, f"--json={tmp_path / 'out.json'}"])
    out = capsys.readouterr().out
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


@pytest.mark.parametrize(
    "ways",
    [
        ["packed", "plain", "masked-channels_last", "spark"],
        pytest.param(["minkowski", "channelwise"], marks=pytest.mark.minkowski),
    ],
)
def test_every_way_of_ours_gives_the_loss_and_gradient_of_masked_and_is_timed(
    modules: tuple[Any, Any], ways: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step, _ = modules
    monkeypatch.setattr(train_step, "peak_memory", lambda *_: None)  # takes a process of its own for each
    monkeypatch.setattr(train_step, "limits", lambda _: {"flop_per_s": 1.0, "bytes_per_s": 1.0})  # takes seconds
    train_step.main([*TINY, *ONCE, "--image-size=96", "--ways", *ways])
    out = capsys.readouterr().out
    for way in ways:
        assert f"check: {way} differs from masked" in out
        assert f"| {way} " in out


def test_an_official_folder_that_is_none_is_refused(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, _ = modules
    monkeypatch.setattr(train_step, "limits", lambda _: {"flop_per_s": 1.0, "bytes_per_s": 1.0})
    with pytest.raises(SystemExit, match=f"^error: --official {tmp_path}: holds no models/fcmae.py"):
        train_step.main([*TINY, *ONCE, "--ways", "packed", "official", "--official", str(tmp_path)])


@pytest.mark.parametrize("leak", ["hide", "norm"])
def test_a_leak_in_the_baseline_stops_the_run(
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
    baseline, ours = (train_step.build_model(layout, args) for layout in ("spark", "packed"))
    assert isinstance(baseline.encoder, spark.SparkEncoder)
    torch.testing.assert_close(baseline.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_data_measures_every_way_of_loading_and_writes_json(
    modules: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image-size=32", "--batch=2", "--batches=1", "--rounds=1", f"--json={tmp_path / 'out.json'}"]
    importlib.import_module("data").main(options)
    out = capsys.readouterr().out
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


def test_tiles_measures_every_way_and_writes_json(
    modules: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    importlib.import_module("tiles").main(["--side=600", "--tile=300", "--number=1", f"--json={path}"])
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())["ways"]
    assert [row["way"] for row in rows] == ["pillow", "tifffile", "tiles"]
    assert all(f"| {row['way']} " in out and row["ms"] > 0 <= row["memory_mb"] for row in rows)


def test_crops_compares_every_way_and_writes_json(modules: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "crops.json"
    sizes = ["--image-size=32", "--short-side=36", "--batch=3", "--channels=2"]
    importlib.import_module("crops").main([*sizes, "--device=cpu", "--threads=1", "--rounds=1", f"--json={path}"])
    rows = json.loads(path.read_text())["ways"]
    assert [row["way"] for row in rows] == ["torchvision", "formulas"]
    assert all(row["ms"] > 0 and row["difference"] <= 2 for row in rows)


def test_checkpoint_measures_what_saving_and_hashing_cost(
    modules: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = ["--image-size=64", "--batch=1", "--every=1", "--checkpoints=1", "--rounds=1"]
    where = [f"--folder={tmp_path}", f"--json={tmp_path / 'out.json'}"]
    importlib.import_module("checkpoint").main([*once, *where, "--variants", "atto", "--hashed", "atto"])
    assert "| SHA-256 of a checkpoint, s |" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "date", "device", "threads", "torch", "others"} <= written.keys()
    (network,), (hashed,) = written["networks"], written["hashes"]
    assert [row["way"] for row in network["ways"]] == ["none", "waiting", "thread"]
    assert network["ways"][0]["standing_s"] < network["ways"][1]["standing_s"]
    assert hashed["sha256_s"] > 0
    assert hashed["checkpoint_mb"] == pytest.approx(network["checkpoint_mb"], rel=0.01)


def test_scaling_measures_every_axis(
    modules: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"batches": "1 2", "image-sizes": "64 96", "mask-ratios": "0.5 0.75", "depths": "1 2"}
    sizes = [word for name, pair in values.items() for word in (f"--{name}", *pair.split())]
    options = ["--threads=1", "--rounds=1", "--warmup=0", "--batch=1", "--image-size=64", "--device=cpu", *sizes]
    importlib.import_module("scaling").main([*options, f"--json={tmp_path / 'out.json'}"])
    out = capsys.readouterr().out
    axes = json.loads((tmp_path / "out.json").read_text())["axes"]
    assert list(axes) == ["batch", "image size", "mask ratio", "depth"]
    for axis, rows in axes.items():
        assert f"| {axis} |" in out
        assert len(rows) == 2
        assert all(row["ms"] > 0 and row["sites"] > 0 for row in rows)
    assert axes["batch"][1]["sites"] == 2 * axes["batch"][0]["sites"]
    assert axes["mask ratio"][0]["sites"] > axes["mask ratio"][1]["sites"]


def test_decoders_measures_each_decoder(
    modules: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("decoders").main([*TINY, *ONCE, "--dim=64", f"--json={tmp_path / 'out.json'}"])
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["decoders"]
    assert [row["decoder"] for row in rows][:3] == ["convnext", "convnext x 8", "unet"]
    assert all(f"| {row['decoder']} | {row['parameters']:,} |" in out and row["ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1.0


def test_profile_step_groups_the_time_of_a_step(
    modules: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("profile_step").main([*TINY, "--warmup=0", "--steps=1"])
    out = capsys.readouterr().out
    assert "| matrix products |" in out
    assert "| depthwise convolutions |" in out
    assert out.rstrip().endswith("100% |")
