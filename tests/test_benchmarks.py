"""The benchmarks run, on a configuration far too small to mean anything."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import fork_server
from test_graph import Again

from fcmae.config import FinetuneRecipe, PretrainRecipe, load_config
from fcmae.training.graph import WARM_UP

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--image-size=64", "--batch=2", "--device=cpu", "--threads=1"]
ONCE = ["--warmup=0", "--rounds=1", "--steps=1"]
WAYS = ["packed", "masked"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Import benchmarks/train_step.py and benchmarks/spark.py as the script itself does, which then run here."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step"), importlib.import_module("spark")


def test_train_step_writes_what_it_prints_as_json(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step, _ = modules
    monkeypatch.setattr(train_step, "fastest", train_step.seconds_of)  # of one time, not of ten
    train_step.main([*TINY, *ONCE, "--ways", "masked", f"--json={tmp_path / 'out.json'}"])
    assert "| masked " in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "date", "device", "threads", "torch"} <= written.keys()
    (atto,) = written["variants"]
    assert atto["variant"] == "atto"
    (row,) = atto["ways"]
    assert (row["way"], row["ratio"], len(row["ms_rounds"])) == ("masked", 1.0, 1)
    assert row["ms"] > 0
    assert row["peak_memory_mb"] > 0
    assert 0 < row["of_matmul"] < 1
    assert 0 < row["of_bandwidth"] < 1


def test_a_recorded_step_is_the_eager_one(modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    train_step, _ = modules
    args = train_step.parse_args(TINY)
    (eager, batch), (way, _) = (train_step.build_way("packed", args) for _ in range(2))
    graphs = Again(SimpleNamespace(bare_model=way.forward, optimizer=way.optimizer))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(train_step, "CudaGraphs", lambda _: graphs)
    way.step = train_step.record(way, batch, args)
    for each in (eager, way):
        for _ in range(WARM_UP + 2):
            train_step.train_step(each, batch, args)
    assert graphs.replays == [2, 2]  # of the gradient, and of the update
    moments = [
        torch.cat([state["exp_avg"].flatten() for state in w.optimizer.state.values()]) for w in (eager, way)
    ]
    torch.testing.assert_close(moments[1], moments[0])


def test_ways_are_checked_on_no_more_images_than_the_reference_has_room_for(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, _ = modules
    batches = []
    monkeypatch.setattr(train_step, "check", lambda _model, _reference, batch, _name: batches.append(batch))
    train_step.check_ways(
        train_step.parse_args(["--image-size=64", "--batch=40", "--ways", *WAYS, "trainer", "spark"])
    )
    assert [len(images) for images, _ in batches] == [32, 32]


def test_the_counted_arithmetic_is_what_the_paper_sized_network_takes(modules: tuple[Any, Any]) -> None:
    train_step, _ = modules
    args = train_step.parse_args(["--batch=1", "--variant=base"])
    assert train_step.work(args)["flop"] == pytest.approx(36e9, rel=0.05)  # 6.0 GMAC forward, three times that


@pytest.mark.parametrize(
    "ways",
    [
        ["packed", "trainer", "plain", "masked-channels_last", "spark"],
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
        assert (f"check: {way} differs from masked" in out) == (way != "trainer")  # that is packed
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
    ways = ["imagefolder", "timm", "webdataset", "folder", "shards", "prepared", "prepared, crops"]
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


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux, which says what is shared")
def test_listing_measures_opening_and_the_memory_of_workers(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    benchmark = importlib.import_module("listing")
    args = benchmark.parse_args([str(tmp_path / "images"), "--make=12", "--classes=3", "--workers=1", "--batch=2"])
    benchmark.make_folder(args.folder, args.make, args.classes)
    found = benchmark.open_and_load(args, 1)
    assert found["images"] == 12
    assert 0 < found["open_s"] < found["first_batch_s"]
    assert min(found["worker_mb_first"], found["worker_mb_last"]) > 0


def test_tiles_measures_every_way_and_writes_json(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    tiles, server = importlib.import_module("tiles"), fork_server()
    monkeypatch.setattr(tiles.multiprocessing, "get_context", lambda _: server)  # whose processes begin at once
    tiles.main(["--side=600", "--tile=300", "--number=1", f"--json={path}"])
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


def test_every_kernel_of_ours_has_its_group_in_the_profile(modules: tuple[Any, Any]) -> None:
    profile_step = importlib.import_module("profile_step")
    sources = (path.read_text() for path in (BENCHMARKS.parent / "fcmae" / "ops").glob("*_triton.py"))
    names = {name for source in sources for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", source)}
    groups = {name: profile_step.group_of_kernel(profile_step.Kernel(name, 100.0)) for name in names}
    assert groups["_image_backward_kernel"] == "GELU and GRN"
    assert groups["_norm_backward_kernel"] == "LayerNorm"
    assert groups["_convolve_kernel"] == groups["_weight_grads_kernel"] == "depthwise convolutions"
    assert profile_step.OTHERS not in groups.values()


def test_kernels_of_a_trace_are_grouped_and_told_apart_by_their_grids(
    modules: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    profile_step = importlib.import_module("profile_step")

    def event(name: str, us: float, grid: list[int], cat: str = "kernel") -> dict[str, Any]:
        return {"cat": cat, "name": name, "dur": us, "args": {"grid": grid, "registers per thread": 40}}

    events = [
        event("nvjet_tst_128x256", 300.0, [132, 1, 1]),
        *[event("_scale_kernel", us, [8, 1, 256]) for us in (90.0, 110.0)],
        event("_scale_kernel", 30.0, [16, 1, 256]),
        event("void at::native::vectorized_elementwise_kernel<4>", 2.0, [1, 1, 1]),
        {"cat": "gpu_memset", "name": "Memset (Device)", "dur": 8.0, "args": {}},
        {"cat": "cpu_op", "name": "aten::mm", "dur": 400.0, "args": {}},
        {"name": "process_name", "args": {}},
    ]
    trace = SimpleNamespace(
        export_chrome_trace=lambda path: Path(path).write_text(json.dumps({"traceEvents": events}))
    )
    kernels = profile_step.kernels_of(trace)
    found = profile_step.summarise_kernels(kernels, steps=2)
    assert [(row["group"], row["count"], row["ms"]) for row in found["groups"]] == [
        ("matrix products", 0.5, 0.15),
        ("GELU and GRN", 1.5, 0.115),
        ("fresh memory", 0.5, 0.004),
        (profile_step.TINY, 0.5, 0.001),
    ]
    scales = [row for row in found["kernels"] if row["name"] == "_scale_kernel"]
    assert [(row["grid"], row["us"], row["registers"]) for row in scales] == [
        ((8, 1, 256), 100.0, 40),
        ((16, 1, 256), 30.0, 40),
    ]
    profile_step.print_kernels({**found, "launches": 3, "gpu_ms": 0.27, "issue_ms": 1.0, "step_ms": 2.0})
    assert "| _scale_kernel | 8 x 1 x 256 | 1 | 100.0 | 0.10 | 40 | 0% |" in capsys.readouterr().out


def test_kernels_measures_every_operation_of_a_stage_and_sizes_of_their_work(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = importlib.import_module("kernels")
    options = ["--variant=atto", "--image-size=64", "--batch=2", "--precision=no", "--device=cpu", "--stages", "4"]
    sizes = {}
    for path in {path for paths in kernels.SIZES.values() for path in paths}:
        name, _, constant = path.partition(".")
        sizes[name, constant] = getattr(importlib.import_module(f"fcmae.ops.{name}"), constant)
    monkeypatch.setattr(kernels, "time_us", lambda run, _: float(run() is not None))
    kernels.main([*options, "--sweep", f"--json={tmp_path / 'out.json'}"])
    rows = json.loads((tmp_path / "out.json").read_text())["operations"]
    assert len(rows) == 12
    assert all(row["us"] == 1.0 for row in rows)
    assert kernels.SIZES.keys() == {row["operation"] for row in rows if row["sweep"]}
    for (name, constant), value in sizes.items():
        assert getattr(importlib.import_module(f"fcmae.ops.{name}"), constant) == value
    monkeypatch.setattr(kernels, "time_us", None)
    kernels.main([*options, "--once"])


@pytest.fixture
def gpu(modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(BENCHMARKS.parent)
    return importlib.import_module("gpu")


@pytest.mark.parametrize("rehearsal", [[], ["--quick"]])
def test_every_part_of_the_gpu_script_is_a_command_that_its_script_takes(gpu: Any, rehearsal: list[str]) -> None:
    given = ["results", *rehearsal, "--device=cuda", "--official=clone", "--cifar10=package"]
    parts = gpu.parts(gpu.parse_args(given))
    assert {figure.partition(" ")[0] for figure in gpu.PREDICTED} <= {part.name for part in parts}
    train_step, cifar10 = (importlib.import_module(name) for name in ("train_step", "cifar10"))
    parsers = {"profile_step": train_step.parse_args, "cifar10": cifar10.parse_arguments}
    recipes = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe}
    taken = set()
    for command in (list(command) for part in parts for command in part.commands):
        program = next(word for word in command if word.endswith(".py") or word == "pytest")
        name, options = Path(program).stem, command[command.index(program) + 1 :]
        if name in recipes:
            load_config(recipes[name], options[1], options[2:])
        elif name != "pytest":
            (parsers[name] if name in parsers else importlib.import_module(name).parse_args)(options)
        taken.add(name)
    own = {"train_step", "profile_step", "kernels", "crops", "resumed", "real_images", "cifar10"}
    assert taken == {*own, *recipes, "pytest"}


def test_the_gpu_script_goes_on_after_failures_and_skips_what_is_done(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    count, found = tmp_path / "count", tmp_path / "work" / "good" / "found.json"
    append = f"open({str(count)!r}, 'a').write('x')"
    parts = [
        gpu.Part("bad", 1, [python(f"{append}; raise SystemExit('it broke')"), python(append)]),
        gpu.Part("slow", 0.01, [python("import time; time.sleep(60)")]),
        gpu.Part("absent", 1, [["no-such-tool"]], missing="no-such-tool"),
        gpu.Part(
            "good",
            1,
            [python(f"{append}; open({str(found)!r}, 'w').write('[3]')")],
            lambda place: {"speed": place.written()["found"][0]},
        ),
    ]
    monkeypatch.setattr(gpu, "parts", lambda _: parts)
    monkeypatch.setattr(gpu, "PREDICTED", {"good speed": 4})
    monkeypatch.setattr(gpu, "machine", lambda _: {"device": "NVIDIA H200"})
    results = tmp_path / "results"
    options = [str(results), "--device=cuda", f"--work={tmp_path / 'work'}"]
    assert gpu.main(options) == 1
    out = capsys.readouterr().out
    assert "    it broke" in out
    assert re.search(r"speed +3  predicted 4  0.75", out)
    assert "3 failed or left out\n  bad: exit code 1\n  slow: took more than 0.0 minutes\n  absent: left out" in out
    lines = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    assert [(line["part"], bool(line["failed"])) for line in lines] == [
        ("bad", True), ("slow", True), ("good", False),
    ]  # fmt: skip
    assert lines[2]["figures"] == {"speed": 3}
    assert lines[2]["device"] == "NVIDIA H200"
    assert "it broke" in (results / "log.txt").read_text()
    assert count.read_text() == "xx"
    assert gpu.main(options) == 1  # for what is left out
    assert count.read_text() == "xx"
    assert gpu.main([*options, "--parts", "good"]) == 0
    capsys.readouterr()
    assert gpu.main([*options, "--table"]) == 0
    assert "| good | speed | 3 | 4 | 0.75 |" in capsys.readouterr().out
    assert count.read_text() == "xxx"
    with pytest.raises(SystemExit, match=r"^error: --parts other: not among bad, slow, absent, good$"):
        gpu.main([*options, "--parts", "other"])


def test_a_part_without_time_for_it_is_left_for_the_next_call(gpu: Any, tmp_path: Path) -> None:
    options = [str(tmp_path / "results"), "--quick", "--device=cpu", f"--work={tmp_path / 'work'}"]
    assert gpu.main([*options, "--parts", "kernels", "--minutes=0.1"]) == 1
    assert not (tmp_path / "results" / "results.jsonl").exists()


def test_the_gpu_script_rehearses_a_part_here(gpu: Any, tmp_path: Path) -> None:
    options = [str(tmp_path / "results"), "--quick", "--device=cpu", f"--work={tmp_path / 'work'}"]
    assert gpu.main([*options, "--parts", "kernels"]) == 0
    line = json.loads((tmp_path / "results" / "results.jsonl").read_text())
    assert line["figures"]["gelu_grn 3 us"] > 0
    assert line["written"]["found"]["operations"]
    assert line["commands"][0].startswith("python benchmarks/kernels.py --variant=atto")


def test_efficiency_of_processes_is_that_of_rounds_and_a_worker_prints_its_seconds(
    modules: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    processes = importlib.import_module("efficiency")
    monkeypatch.setenv("RANK", "0")
    processes.main(["--image-size=64", "--batch=2", "--updates=1"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"exchanging", "apart", "cpu"}
    assert min(found.values()) > 0
    monkeypatch.delenv("RANK")

    def launch(number: int, variant: str, args: Any) -> dict[str, float]:
        return {"exchanging": 1 + 0.25 * (number - 1), "apart": 1.0, "cpu": 1.0 * number}

    monkeypatch.setattr(processes, "launch", launch)
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 2)
    processes.main(["--rounds=2", "--batch=10", f"--json={tmp_path / 'out.json'}"])
    one, two, four = json.loads((tmp_path / "out.json").read_text())["networks"]["atto"]
    assert (one["times_one"], one["efficiency"]) == (1, 1)
    assert (two["times_one"], two["efficiency"], two["exchange_s"]) == (1.6, 0.8, 0.25)
    assert (four["efficiency"], four["efficiency_of_cores"]) == (pytest.approx(4 / 1.75 / 4), 4 / 1.75 / 2)
    assert (four["images_per_s"], four["cpu_s_per_image"]) == (pytest.approx(40 / 1.75), 0.1)
