"""What a run records of itself: in TensorBoard, read back and seen in a browser, and in other trackers."""

import importlib.util
import itertools
import math
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import tracking
from conftest import records, run_main
from small_runs import batches, outcome, small_config, small_run, small_trainer, stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams import metadata as hparams

from fcmae import pretrain
from fcmae.data import save_arrays
from fcmae.errors import UserError
from fcmae.training import trackers
from fcmae.training.launch import start_run
from fcmae.training.trainer import Window

# TensorBoard


def read_back(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run to the end, with all that can be evaluated and shown."""
    root = tmp_path_factory.mktemp("pretrained")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    for split in ("train", "val"):
        save_arrays(root / split, pixels, np.arange(24) % 3, ["a", "b", "c"])
    config = root / "config.yaml"
    config.write_text(
        f"""
output: {root / "run"}
model: {{variant: [[1,1,1,1],[8,8,16,16]], stem_stride: 1, decoder_dim: 16}}
data: {{name: arrays, root: {root}, image_size: 32, batch_size: 8, num_workers: 0}}
optim: {{base_lr: 0.03, warmup_epochs: 1}}
train: {{max_steps: 12}}
log: {{every_steps: 2}}
eval: {{knn_every_epochs: 2, collapse_every_epochs: 2}}
visualize: {{every_steps: 6, num_images: 2}}
"""
    )
    assert run_main(pretrain.main, "--config", str(config)) == 0
    return root / "run"


def test_tensorboard_has_every_record_but_the_time_which_it_notes_itself(pretrained: Path) -> None:
    events = read_back(pretrained / "tensorboard")
    found = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    written = {
        (record["step"], name): value
        for record in records(pretrained)
        for name, value in record.items()
        if name not in ("step", "time")
    }
    assert found == pytest.approx(written)
    names = {name for _, name in found}
    assert {"loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_gb", "knn_top1"} < names
    assert {f"cosine_distance/stage_{i}" for i in (1, 2, 3, 4)} < names
    assert all(found[step, "grad_norm"] > 0 and found[step, "memory_gb"] > 0 for step in range(2, 14, 2))


def test_fixed_images_are_shown_over_time_and_at_several_mask_ratios_at_the_end(pretrained: Path) -> None:
    events = read_back(pretrained / "tensorboard")
    shown = {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]}
    ratios = {f"mask_ratios/{ratio}": [12] for ratio in ("0.30", "0.60", "0.75", "0.90")}
    assert shown == {"reconstructions": [0, 6, 12]} | ratios


def test_the_configuration_is_shown_as_the_run_has_it(pretrained: Path) -> None:
    (event,) = read_back(pretrained / "tensorboard").Tensors("configuration/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == f"```yaml\n{(pretrained / 'config.yaml').read_text()}```"


def test_the_first_page_of_charts_says_whether_it_learns_and_each_chart_has_a_curve(pretrained: Path) -> None:
    events = read_back(pretrained / "tensorboard")
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {page.title: {chart.title: [*chart.multiline.tag] for chart in page.chart} for page in layout.category}
    assert list(charts) == ["Is it learning?", "Is it fast?"]
    assert list(charts["Is it learning?"]) == [
        "loss",
        "accuracy of k-NN",
        "cosine distance of channels, by stage",
        "norm of the gradient",
        "learning rate",
    ]
    for page in charts.values():
        for title, patterns in page.items():
            assert any(re.match(p, tag) for p in patterns for tag in events.Tags()["scalars"]), title


def test_a_finished_run_has_its_settings_and_final_scores_in_hparams(pretrained: Path) -> None:
    events = read_back(pretrained / "tensorboard" / "final")
    last = {name: value for record in records(pretrained) for name, value in record.items()}
    final = {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
    assert final == pytest.approx({"final/loss": last["loss"], "final/knn_top1": last["knn_top1"]})
    content = events.SummaryMetadata(hparams.SESSION_START_INFO_TAG).plugin_data.content
    settings = hparams.parse_session_start_info_plugin_data(content).hparams
    assert settings["optim.base_lr"].number_value == 0.03
    assert settings["model.norm_pix_loss"].number_value == 1
    assert settings["model.layout"].string_value == "auto"
    assert "log.every_steps" not in settings, "which changes nothing of what is learnt"


def test_a_resumed_run_goes_on_in_tensorboard_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    small_run(small_config(tmp_path / "whole", log={"every_steps": 4}))
    stopped = stop_after(tmp_path / "whole", 6, tmp_path / "stopped")  # within the window of a record
    small_run(small_config(stopped, log={"every_steps": 4}))
    assert outcome(tmp_path / "whole") == outcome(stopped)
    whole, resumed = (read_back(folder / "tensorboard") for folder in (tmp_path / "whole", stopped))
    for name in ("loss", "grad_norm", "lr"):
        curves = [[(event.step, event.value) for event in events.Scalars(name)] for events in (whole, resumed)]
        assert curves[0] == curves[1]
        assert [step for step, _ in curves[1]] == [4, 8, 10]


@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_the_norm_of_the_gradient_is_the_mean_of_those_of_the_updates_before_clipping(
    tmp_path: Path, clip_grad: float | None
) -> None:
    """At a rate of 0 the weights stay as they are, so that each batch's gradient can be computed again."""
    config = small_config(
        tmp_path, optim={"clip_grad": clip_grad, "base_lr": 0.0, "min_lr": 0.0}, log={"every_steps": 5}
    )
    small_run(config)
    trainer = small_trainer(config)
    norms = []
    for batch in itertools.islice(batches(trainer), 10):
        trainer.bare_model.zero_grad()
        trainer.compute_loss(trainer.bare_model, batch).backward()
        gradients = [parameter.grad for parameter in trainer.bare_model.parameters() if parameter.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
    found = [record["grad_norm"] for record in records(tmp_path) if "grad_norm" in record]
    assert found == pytest.approx([np.mean(norms[:5]), np.mean(norms[5:])])
    assert min(norms) > 0.1


def test_a_norm_that_is_not_finite_as_of_updates_that_fp16_leaves_out_is_not_counted() -> None:
    window = Window.new(torch.device("cpu"))
    for norm in (1.0, math.inf, math.nan, 4.0):
        window.add_update(torch.tensor(norm))
    assert (window.grad_norm_sum.item(), window.num_grad_norms.item()) == (5.0, 2)


def test_jsonl_alone_is_written_when_nothing_else_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run(small_config(tmp_path, log={"with": []}))
    assert not (tmp_path / "tensorboard").exists()
    assert len([record for record in records(tmp_path) if "loss" in record]) == 10
    assert f"records          {tmp_path / 'metrics.jsonl'}\n" in capsys.readouterr().out


@pytest.fixture
def tensorboard(pretrained: Path) -> Iterator[str]:
    """The address of a TensorBoard of the run, on this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(pretrained), "--host", "127.0.0.1"]
    with subprocess.Popen(
        [*command, "--port", port, "--load_fast", "false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            assert any(f":{port}" in line for line in lines)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.communicate()


ELEMENTS = """const elements = (root) => [...root.querySelectorAll("*")].flatMap(
    (element) => [element, ...(element.shadowRoot ? elements(element.shadowRoot) : [])]);"""
"""Those in shadow trees, too, of which TensorBoard is made."""

CURVES_ARE_DRAWN = f"""() => {{
    {ELEMENTS}
    const charts = elements(document).filter((element) => element.localName === "vz-line-chart2");
    const curves = (chart) => elements(chart.shadowRoot).filter(
        (element) => element.localName === "path" && (element.getAttribute("d") ?? "").split("L").length > 2);
    return charts.length >= 5 && charts.slice(0, 5).every((chart) => curves(chart).length > 0);
}}"""

PICTURES_ARE_SHOWN = f"""() => {{
    {ELEMENTS}
    const pictures = elements(document).filter((element) => element.src?.includes("individualImage"));
    return pictures.length === 5 && pictures.every((picture) => picture.complete && picture.naturalWidth > 100);
}}"""


@pytest.mark.browser
def test_a_browser_shows_curves_and_pictures_of_a_run_in_tensorboard(browser: Any, tensorboard: str) -> None:
    page = browser.new_page(viewport={"width": 1500, "height": 1200})
    page.set_default_timeout(120_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{tensorboard}/#custom_scalars")
    page.get_by_text("Is it learning?").wait_for()
    page.wait_for_function(CURVES_ARE_DRAWN)
    page.goto(f"{tensorboard}/#images")
    page.reload()
    page.wait_for_function(PICTURES_ARE_SHOWN)
    assert not errors
    page.close()


# Other trackers


class StandIn(tracking.GeneralTracker):
    """A tracker that keeps what it is given, and fails when told to; runs by what they are known by."""

    name = "wandb"
    requires_logging_directory = False
    runs: dict[str, list[Any]]
    fails: frozenset[str]

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.id = options["id"] or f"run-{len(self.runs)}"
        assert options["resume"] == "allow"

    @property
    def tracker(self) -> Any:
        return self

    def _keep(self, kind: str, *what: Any) -> None:
        if kind in self.fails:
            raise ConnectionError(f"no answer to {kind}")
        self.runs.setdefault(self.id, []).append((kind, *what))

    def start(self) -> None:
        self._keep("start")

    def store_init_configuration(self, values: dict) -> None:
        self._keep("configuration", values)

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self._keep("log", step, values)

    def log_images(self, values: dict, step: int | None = None, **_: Any) -> None:
        self._keep("picture", step, values)

    def finish(self) -> None:
        self._keep("finish")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Stands where wandb would."""
    kind = type("OneTest", (StandIn,), {"runs": {}, "fails": frozenset()})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", kind)
    return kind


WITH_WANDB = {"log": {"every_steps": 1, "with": ["tensorboard", "wandb"]}}


def test_a_tracker_gets_configuration_records_and_pictures(tmp_path: Path, stand_in: type[StandIn]) -> None:
    trainer = small_trainer(small_config(tmp_path, **WITH_WANDB))
    picture = np.zeros((4, 6, 3), np.uint8)

    def evaluate(step: int, log: Any) -> float:
        log.picture("pictures", picture, step)
        return 0.0

    trainer.fit(batches(trainer), evaluate=evaluate, evaluate_every=5)
    (events,) = stand_in.runs.values()
    assert [event[0] for event in events[:2]] == ["start", "configuration"]
    assert events[1][1]["optim.base_lr"] == 1.0
    assert events[1][1]["log.with"] == '["tensorboard", "wandb"]'
    logged = [{"step": step, **values} for kind, step, *rest in events[2:-1] if kind == "log" for values in rest]
    assert logged == [{k: v for k, v in record.items() if k != "time"} for record in records(tmp_path)]
    shown = [(step, rest) for kind, step, *rest in events[2:-1] if kind == "picture"]
    assert [step for step, _ in shown] == [5, 10]
    assert shown[0][1][0]["pictures"][0] is picture
    assert events[-1] == ("finish",)


def test_a_resumed_run_goes_on_in_its_tracker_and_another_run_begins_its_own(
    tmp_path: Path, stand_in: type[StandIn]
) -> None:
    small_run(small_config(tmp_path / "whole", **WITH_WANDB))
    stopped = stop_after(tmp_path / "whole", 6, tmp_path / "stopped")
    small_run(small_config(stopped, **WITH_WANDB))
    assert list(stand_in.runs) == ["run-0"]
    steps = [event[1] for event in stand_in.runs["run-0"] if event[0] == "log"]
    assert steps == [*range(1, 11), *range(7, 11)]
    assert [event[0] for event in stand_in.runs["run-0"]].count("configuration") == 1
    small_run(small_config(tmp_path / "other", **WITH_WANDB))
    assert list(stand_in.runs) == ["run-0", "run-1"]


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_is_said_once_and_ends_no_run(
    tmp_path: Path, stand_in: type[StandIn], fails: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.fails = frozenset({fails})
    trainer = small_run(small_config(tmp_path, **WITH_WANDB))
    assert trainer.step == len(records(tmp_path)) == 10
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: wandb")]
    assert said == [
        f"warning: wandb failed and is left out from here on (no answer to {fails}); metrics.jsonl has all records"
    ]


def test_a_tracker_that_does_not_start_is_one_line_before_anything_is_computed(
    tmp_path: Path, stand_in: type[StandIn]
) -> None:
    stand_in.fails = frozenset({"start"})
    trainer = small_trainer(small_config(tmp_path, **WITH_WANDB))
    with pytest.raises(UserError, match=r"^log\.with: wandb does not start \(no answer to start\): set it up, or"):
        trainer.fit(batches(trainer))
    assert trainer.step == 0


def test_a_missing_package_is_one_line_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    message = r"^log\.with: trackio is not installed: pip install trackio, or leave it out$"
    config = small_config(tmp_path / "run", log={"with": ["trackio"]})
    with pytest.raises(UserError, match=message), start_run(config, dry_run=False):
        pass
    assert not (tmp_path / "run").exists()


def test_nothing_but_tensorboard_is_started_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("not asked for")

    for kind in tracking.LOGGER_TYPE_TO_CLASS.values():
        monkeypatch.setattr(kind, "__init__", refuse)
    small_run(small_config(tmp_path))
    assert (tmp_path / "tensorboard").is_dir()
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb: pip install wandb")
def test_wandb_offline_keeps_a_run_and_its_resumption_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    small_run(small_config(tmp_path / "whole", **WITH_WANDB))
    stopped = stop_after(tmp_path / "whole", 6, tmp_path / "stopped")
    small_run(small_config(stopped, **WITH_WANDB))
    identity = yaml.safe_load((stopped / "trackers.json").read_text())["wandb"]
    kept = sorted((stopped / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert kept
    assert all(file.stat().st_size > 1000 for file in kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]
