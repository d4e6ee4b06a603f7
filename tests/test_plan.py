"""fcmae plan: models do what they state, what does not fit is refused; one plan as table, JSON and picture."""

import importlib.util
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Command
from PIL import Image

from fcmae.config import PretrainConfig, PretrainRecipe, load_config, parse_config
from fcmae.data import save_arrays
from fcmae.errors import UserError
from fcmae.plan import measure
from fcmae.plan.forecast import BUCKET, WAYS, Forecast, Way, exchange, forecast, require_forecast
from fcmae.plan.machines import GPUS, MESSAGE_S, Machines, Pace, known_gpu, modelled
from fcmae.plan.storage import image_bytes
from fcmae.plan.work import Work
from fcmae.training.batch import Footprint

PARAMETERS = 50_000_000
WORK = Work(
    parameters=PARAMETERS,
    tensors=400,
    flop=36e9,
    state_bytes=16 * PARAMETERS,
    unit_bytes=20e6,
    footprint=Footprint(16 * PARAMETERS + 1e8, 30e6),
    checkpointed=Footprint(16 * PARAMETERS + 1e8, 12e6),
)
PACE = Pace(image={"arithmetic": 1e-4, "memory bandwidth": 1e-4}, kernels=5e-3, issue=0.0, optimizer=1e-3)
MACHINES = Machines(
    name="a GPU",
    source="a test",
    memory=80e9,
    pace=PACE,
    link=100e9,
    message_s=0.0,
    network=10e9,
    per_machine=8,
    records=False,
    overlaps=False,
    load_rate=math.inf,
    core_rate=math.inf,
    cores=math.inf,
    threads=1,
    on_gpu=True,
)
CPU = MACHINES._replace(per_machine=10**9, cores=2, core_rate=1e5, load_rate=1e5, on_gpu=False)
TINY = (
    "model.variant=[[1,1,2,1],[8,16,24,32]]",
    "model.decoder_dim=16",
    "data.image_size=64",
    "data.batch_size=auto",
    "optim.accumulate=auto",
    "optim.images_per_update=32",
    "train.max_steps=null",
)


def recipe(update: int | None = 4096, **sections: Any) -> PretrainRecipe:
    values: dict[str, Any] = {"output": "run", "model": {"variant": "base"}, "data": {"root": "images"}}
    values["data"]["batch_size"] = "auto" if update else 64
    values["optim"] = {"images_per_update": update, "accumulate": "auto" if update else 1}
    return parse_config(PretrainRecipe, values | {"train": sections.get("train", {})}, "a test")


def look(
    machines: Machines,
    processes: int,
    update: int | None = 4096,
    *,
    workers: int = 8,
    bf16: bool = False,
    **more: Any,
) -> Forecast:
    asked = recipe(update)
    config: PretrainConfig = asked.resolve({}, "a test")
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"num_workers": workers}),
            "train": config.train.model_copy(update={"bf16_exchange": bf16}),
        }
    )
    given = {"work": WORK, "images": 10**6, "way": Way(False), **more}
    found = forecast(config, asked, machines=machines, processes=processes, **given)
    assert found is not None
    return found


# What a network asks for


@pytest.fixture(scope="module")
def base() -> Work:
    config = load_config(PretrainRecipe, "base").resolve({}, "a test")
    return Work.count(config, torch.device("cuda"), "bf16")


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arithmetic_counted_on_tensors_without_numbers_is_that_counted_by_hand(
    base: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand = benchmark("train_step", monkeypatch).work
    args = Namespace(variant="base", image_size=224, batch=1, precision="bf16")
    assert base.flop == pytest.approx(by_hand(args)["flop"], rel=0.03)


def test_the_model_of_an_h200_agrees_with_what_its_benchmark_predicts(
    base: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = benchmark("gpu", monkeypatch).PREDICTED
    pace = Pace.modelled(GPUS["h200"], base, "bf16")
    for part, batch in (("base", 256), ("base-64", 64)):
        step = sum(pace.micro_batch(batch, recorded=True, recomputed=False).values()) + pace.optimizer
        assert batch / step == pytest.approx(predicted[f"{part} packed+graph images/s"], rel=0.1)
    eager = sum(pace.micro_batch(64, recorded=False, recomputed=False).values()) + pace.optimizer
    assert 64 / eager == pytest.approx(predicted["base-64 packed images/s"], rel=0.1)


def test_fsdp_divides_the_state_and_gathers_two_blocks() -> None:
    plain, sharded = Way(False), Way(False, sharded=True)
    before = plain.footprint(WORK, 8)
    assert before == WORK.footprint
    for processes in (2, 8, 64):
        found = sharded.footprint(WORK, processes)
        assert found is not None
        saved = WORK.state_bytes * (1 - 1 / processes) - 4 * WORK.unit_bytes
        assert found.fixed == pytest.approx(WORK.footprint.fixed - saved)
        assert found.image == WORK.footprint.image
    assert sharded.footprint(WORK, 1) == WORK.footprint


def test_gradients_that_wait_for_further_micro_batches_are_whole_under_fsdp() -> None:
    way = Way(False, sharded=True)
    for processes, waiting in ((8, 0), (4, 0.75 * 4 * PARAMETERS)):
        found, footprint = look(MACHINES, processes, way=way), way.footprint(WORK, processes)
        assert footprint is not None
        assert (found.accumulate > 1) == (waiting > 0)
        assert found.memory == pytest.approx(footprint.of(found.batch) + waiting)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce GTX 1080 Ti", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(name: str, kind: str | None) -> None:
    assert known_gpu(name) == (kind and GPUS[kind])


def test_a_pcie_card_has_no_nvlink() -> None:
    card = known_gpu("NVIDIA H100 PCIe")
    assert card
    assert not card.nvlink
    assert card.link_gb < GPUS["h100"].link_gb


def test_a_network_that_cannot_be_computed_twice_is_not_planned_with_checkpointing() -> None:
    work = WORK._replace(checkpointed=None)
    assert [way.footprint(work, 8) is None for way in WAYS] == [way.checkpointing for way in WAYS]


# An update


def test_an_update_takes_as_long_as_the_slower_of_step_and_loading() -> None:
    fast, slow = (MACHINES._replace(load_rate=rate) for rate in (1e9, 100.0))
    step_s = sum(look(fast, 8).parts.values())
    assert look(fast, 8).update_s == pytest.approx(step_s)
    assert look(fast, 8).limit == "arithmetic"
    assert look(slow, 8).update_s == pytest.approx(512 / 100)
    assert look(slow, 8).limit == "loading"
    assert look(slow, 8, workers=0).update_s == pytest.approx(512 / 100 + step_s)  # one after the other


def test_batches_are_those_that_a_run_would_choose() -> None:
    assert [(look(MACHINES, n).batch, look(MACHINES, n).accumulate) for n in (1, 8, 64)] == [
        (512, 8),
        (512, 1),
        (64, 1),
    ]
    assert look(MACHINES._replace(memory=10e9), 1).batch == 128  # of 80 % of the memory
    with pytest.raises(UserError, match="cannot be divided among 48 processes"):
        look(MACHINES, 48)
    numbers = look(MACHINES, 48, None)  # where no number of images per update is given
    assert (numbers.batch, numbers.updates) == (64, math.ceil(800 * 10**6 / (64 * 48)))


def test_each_process_sends_twice_its_share_of_the_gradients() -> None:
    for processes in (1, 2, 8, 64):
        sent = 2 * (processes - 1) / processes * 4 * PARAMETERS
        assert look(MACHINES, processes).exchange_bytes == pytest.approx(sent)
        sharded = look(MACHINES, processes, way=Way(False, True))  # gathers weights twice for each micro-batch
        assert sharded.exchange_bytes == pytest.approx(sent * (sharded.accumulate + 0.5))
        assert look(MACHINES, processes, bf16=True).exchange_bytes == pytest.approx(sent / 2)
        sharded = look(MACHINES, processes, way=Way(False, True), bf16=True)  # weights travel as they are
        assert sharded.exchange_bytes == pytest.approx(sent * (sharded.accumulate + 0.25))


def test_the_slowest_link_of_the_ring_counts() -> None:
    assert exchange(MACHINES, 1, 0) == 0
    assert exchange(MACHINES, 8, 1e9) == pytest.approx(1e9 / 100e9)
    assert exchange(MACHINES, 16, 1e9) == pytest.approx(1e9 / 10e9)
    assert exchange(MACHINES._replace(network=1e15), 16, 1e9) == pytest.approx(1e9 / 100e9)
    late = MACHINES._replace(message_s=MESSAGE_S)
    assert exchange(late, 8, 1e9) == pytest.approx(1e9 / 100e9 + 3 * MESSAGE_S * math.ceil(1e9 / BUCKET))


def test_the_exchange_hides_behind_the_backward_pass_but_for_its_last_message() -> None:
    shown, hidden = MACHINES, MACHINES._replace(overlaps=True)
    assert look(shown, 8).parts["exchange"] == pytest.approx(look(shown, 8).exchange_s)
    messages = math.ceil(look(hidden, 8).exchange_bytes / BUCKET)
    assert look(hidden, 8).parts["exchange"] == pytest.approx(look(hidden, 8).exchange_s / messages)
    slow = look(hidden._replace(link=1e9), 8)
    computing = sum(s for name, s in slow.parts.items() if name not in ("exchange", "optimizer"))
    assert slow.parts["exchange"] == pytest.approx(slow.exchange_s - 2 / 3 * computing)
    assert slow.limit == "exchange"


def test_steps_of_one_machine_are_recorded_and_exchange_afterwards() -> None:
    machines = MACHINES._replace(records=True, overlaps=True, pace=PACE._replace(issue=10.0))
    assert look(machines, 8).parts["exchange"] == look(machines, 8).exchange_s
    assert look(machines, 8).limit == "arithmetic"
    assert look(machines, 16).limit == "starting kernels"
    assert look(machines, 8, way=Way(True)).limit == "starting kernels"


def test_gradient_checkpointing_computes_a_third_more() -> None:
    plain, again = look(MACHINES, 64), look(MACHINES, 64, way=Way(True))
    assert again.parts["arithmetic"] == pytest.approx(plain.parts["arithmetic"] * 4 / 3)
    assert again.memory < plain.memory


def test_processes_on_a_cpu_share_its_cores_and_its_memory() -> None:
    one, two, four = (look(CPU, n, workers=0, update=256) for n in (1, 2, 4))
    for few in (one, two):  # a core for each
        assert few.update_s == pytest.approx(sum(few.parts.values()) + few.loading_s)
    assert four.limit == "cores"
    assert four.update_s == pytest.approx(4 / 2 * (sum(four.parts.values()) + four.loading_s))
    assert [CPU.memory_of(n) for n in (1, 4)] == [80e9, 20e9]
    assert look(CPU, 2, update=256).limit == "cores"  # with a loader beside each


def test_no_gpu_of_the_table_is_slower_with_half_the_bits() -> None:
    for name in GPUS:
        half, full = (
            modelled(name, WORK, precision, per_machine=8, network=50e9, num_workers=8, source="folder")
            for precision in ("bf16", "no")
        )
        assert half.pace.image["arithmetic"] < full.pace.image["arithmetic"]


# What fits


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    asked = recipe()
    config: PretrainConfig = asked.resolve({}, "a test")
    small = MACHINES._replace(memory=0.85e9)
    with pytest.raises(UserError) as refused:
        require_forecast(config, asked, WORK, small, images=10**6, processes=16)
    assert str(refused.value) == (
        "--config: base with 1 image at once takes about 0.9 GB for each process, and a GPU has 0.85; what would "
        "fit: FSDP, FSDP with gradient checkpointing"
    )
    with pytest.raises(UserError, match="no way to save memory would make it fit"):
        require_forecast(config, asked, WORK, MACHINES._replace(memory=1e6), images=10**6, processes=16)
    numbers = recipe(None)
    config = numbers.resolve({}, "a test")
    with pytest.raises(
        UserError, match=r"what would fit: data\.batch_size=16 optim\.accumulate=4, DDP with gradient checkpointing"
    ):
        require_forecast(config, numbers, WORK, MACHINES._replace(memory=1.73e9), images=10**6, processes=2)


def test_the_size_of_images_is_looked_up_where_they_are(tmp_path: Path) -> None:
    def found(**data: Any) -> tuple[float, str]:
        values = {"output": "run", "model": {"variant": "atto"}, "data": {"root": str(tmp_path), **data}}
        return image_bytes(parse_config(PretrainConfig, values, "a test").data)

    assert found()[1].startswith("assumed")  # an empty folder
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.jpg").write_bytes(bytes(100))
    (tmp_path / "two.jpg").write_bytes(bytes(300))
    assert found() == (200, f"the mean of 2 files of {tmp_path}")
    assert found(name="hfds/nowhere")[1].startswith("assumed")


# The command


def test_table_json_and_picture_are_of_the_same_plan(command: Command, tmp_path: Path) -> None:
    asked = ["--config", "quickstart", "--gpus", "4", "--images", "1e4", "--epochs", "10", "--price", "4", "1"]
    asked += ["--gpu", "h200", "a10", *TINY]  # settings may come last
    code, out, err = command("plan", *asked, "--plot", tmp_path / "plan.png")
    assert (code, err) == (0, "")
    assert "10,000 images x 10 epochs = 3,125 updates of 32;" in out
    assert "h200, data sheet" in out
    assert "a10, data sheet" in out
    assert "right to\nabout 30 %" in out
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.size[0] > 600
        assert len(picture.convert("RGB").getcolors(10**6) or ()) > 50
    code, out, err = command("plan", *asked, "--image-kb", "50", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["image_bytes"] == 50e3
    for one, price in zip(found["plans"], (4, 1), strict=True):
        plan = one["asked"]
        assert plan in one["curve"]
        assert plan in one["ways"]
        assert [row["processes"] for row in one["curve"]] == [1, 2, 4, 8, 16]
        assert plan["seconds"] == pytest.approx(3125 * plan["update_s"])
        assert plan["images_per_s"] == pytest.approx(32 / plan["update_s"])
        assert one["cost"] == pytest.approx(price * 4 * plan["seconds"] / 3600)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "64"], "--gpus 64: more than the 32 images of an update; give at most 32"),
        (["--gpus", "5"], "optim.images_per_update=32: cannot be divided among 5 processes; 30 can"),
        (["--gpus", "1", "--images", "0"], "--images 0: must be above 0"),
        (["--gpus", "1", "--images", "nan"], "--images nan: must be above 0"),
        (["--gpus", "1", "--epochs", "-1"], "--epochs -1: must be above 0"),
        (["--gpus", "1", "--gpu", "gtx"], "--gpu gtx: is not known; choose from h200, "),
        (["--gpus", "1", "--price", "1", "2"], "--price: 2 prices for 1 kinds of GPU"),
        (["--gpus", "1", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_ends_in_one_line(command: Command, words: list[str], says: str) -> None:
    code, out, err = command("plan", "--config", "quickstart", *TINY, "--images", "100", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_picture_replaces_no_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "plan.png").write_text("mine")
    asked = ["--config", "quickstart", "--gpus", "1", "--images", "100", "--plot", tmp_path / "plan.png"]
    code, _, err = command("plan", *asked)
    assert code == 2
    assert "plan.png" in err
    assert (tmp_path / "plan.png").read_text() == "mine"


def test_this_machine_is_measured_and_nothing_is_left(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(measure, "TIMED_S", 0.1)
    save_arrays(tmp_path / "images" / "train", np.zeros((40, 70, 70, 3), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    words = [*TINY, "data.name=arrays", f"data.root={tmp_path / 'images'}", f"output={tmp_path / 'run'}"]
    asked = ["--config", "quickstart", *words, "--gpus", "2", "--images", "100", "--epochs", "1", "--measure"]
    code, out, err = command("plan", *asked, "--json")
    assert (code, err) == (0, "")
    (plan,) = json.loads(out)["plans"]
    assert plan["machines"]["name"] == "cpu"
    assert plan["machines"]["source"] == "measured here"
    assert plan["machines"]["threads"] == torch.get_num_threads()
    assert plan["asked"]["batch"] == 16
    assert all(plan["machines"][name] > 0 for name in ("link", "message_s", "load_rate", "core_rate"))
    assert sorted(tmp_path.rglob("*")) == before
    code, out, err = command("plan", *asked, "data.root=nowhere")
    assert code == 2
    assert "nowhere" in err


def test_a_pace_measured_with_checkpointing_is_planned_with_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TIMED_S", 0.0)
    monkeypatch.setattr(measure, "build_updates", lambda config, images: (images, images))
    monkeypatch.setattr(measure, "seconds_of", lambda images, device: 3.0 + images)  # for a call, its images
    for again in (False, True):
        config: PretrainConfig = recipe(train={"gradient_checkpointing": again}).resolve({}, "a test")
        pace = measure.time_pace(config, torch.device("cpu"), 16)
        parts = pace.micro_batch(16, recorded=False, recomputed=again)
        assert parts == {"computing": pytest.approx(16), "small kernels": pytest.approx(3)}


def test_an_exchange_of_two_threads_sums_what_both_have() -> None:
    assert measure.time_gloo(4) > 0
