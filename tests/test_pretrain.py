"""pretrain.py from end to end: exact, restartable, the same on one process or two, and plain about bad input."""

import contextlib
import fcntl
import json
import os
import platform
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import accelerate.commands.launch
import numpy as np
import pytest
import timm
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from conftest import ROOT, error_line, records, run_main
from PIL import Image
from processes import FSDP, run_story
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

import fcmae.__main__
import fcmae.training.checkpoint
from fcmae import pretrain
from fcmae.config import PretrainConfig, parse_config
from fcmae.data import PixelNormalizer, save_arrays
from fcmae.data.batches import PREFETCH_FACTOR
from fcmae.load import load_fcmae
from fcmae.training import dry_run
from fcmae.training.checkpoint import State, save_checkpoint
from fcmae.training.dry_run import loading_rate, name_bottleneck
from fcmae.training.trainer import Trainer
from fcmae.visualize import HATCH
from fcmae.weights.official import dense_to_official_sparse
from fcmae.weights.timm import to_timm

TINY = "[[1,1,1,1],[8,8,16,16]]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 smooth random images of 32 px, as arrays."""
    root = tmp_path_factory.mktemp("data")
    coarse = np.random.default_rng(0).integers(0, 256, (40, 5, 5, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in coarse]
    save_arrays(root, np.stack(images))
    return root


@pytest.fixture
def arguments(data: Path, tmp_path: Path) -> list[str]:
    """A run of 12 steps of 8 images on a tiny network, recording every step."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
output: {tmp_path / "run"}
model: {{variant: {TINY}, stem_stride: 1, decoder_dim: 16, drop_path: 0.2}}
data: {{name: arrays, root: {data}, image_size: 32, batch_size: 8, num_workers: 0}}
optim: {{base_lr: 0.03, warmup_epochs: 1}}
train: {{max_steps: 12}}
checkpoint: {{every_steps: 5}}
log: {{every_steps: 1}}
visualize: {{every_steps: 100, num_images: 2}}
"""
    )
    return ["--config", str(config)]


def run(*arguments: str) -> int:
    """Run pretrain.py in this process, as the script would; returns the exit code."""
    return run_main(pretrain.main, *arguments)


def losses(folder: Path) -> dict[int, float]:
    found = [record for record in records(folder) if "loss" in record]
    by_step = {record["step"]: record["loss"] for record in found}
    assert len(by_step) == len(found), "a step was recorded twice"
    return by_step


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_the_design_promises(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run"
    first, second = out.splitlines()[:2]
    assert first.startswith("fcmae ")
    assert second.startswith("opening          "), "at once, not after what takes long"
    assert "\nprecision        float32 (auto: on a CPU)\nbatch            8 of 40 images an update\n" in out
    assert "updates          1 to 12; the first takes longer" in out
    assert re.search(r"step 12/12 · epoch 2\.40 · loss \d\.\d+ · lr \S+ · \d+ images/s · data wait \d+% · ", out)
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "encoder",
        "metrics.jsonl",
        "reconstructions",
        "starts.jsonl",
        "tensorboard",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "last",
        "step-00000010",
        "step-00000012",
    ]
    pictures = sorted((folder / "reconstructions").iterdir())
    ratios = [f"mask-ratio-{ratio}.png" for ratio in ("0.30", "0.60", "0.75", "0.90")]
    assert [path.name for path in pictures] == [*ratios, "step-00000000.png", "step-00000012.png"]
    assert Image.open(pictures[-1]).size == (3 * (128 + 4) + 4, 2 * (128 + 4) + 4 + 15 + 2 * 4)
    assert list(losses(folder)) == list(range(1, 13))
    assert records(folder)[-1]["seen_images"] == 96
    assert records(folder)[0]["lr"] == 0.0
    assert timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True).num_features == 16


@pytest.mark.parametrize("target", ["pixels", "hog"])
def test_images_with_pixels_that_are_not_known_are_trained_on(
    arguments: list[str], tmp_path: Path, target: str
) -> None:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :48]
    for i in range(12):
        phase = rng.uniform(0, 6, 5)
        image = np.stack([500 + 200 * np.sin(0.3 * x + 0.2 * y + p) for p in phase], 2).astype(np.float32)
        image[:, :10] = np.nan  # an edge of all images
        if i % 3 == 0:
            image[rng.random(image.shape) < 0.1] = np.inf
        if i % 3 == 1:
            image[:, : rng.integers(20, 40), 3:] = -9999
        np.save(folder / f"{i:02}.npy", image)
    np.save(folder / "constant.npy", np.full((40, 48, 5), 500, np.float32))
    np.save(folder / "nothing.npy", np.full((40, 48, 5), np.nan, np.float32))
    options = ["data.name=folder", f"data.root={folder.parent}", "data.num_workers=1", "model.in_chans=5"]
    options += ["data.mean=[500,500,500,500,500]", "data.std=[140,140,140,140,140]", "data.clip=[0,900]"]
    options += [f"model.target={target}", "data.nodata=-9999", "visualize.bands=[4,2,0]", "train.max_steps=40"]
    options += ["data.batch_size=14", "optim.base_lr=0.1", "visualize.num_images=14"]
    assert run(*arguments, *options) == 0
    found = [*losses(tmp_path / "run").values()]
    assert np.isfinite(found).all()
    assert np.mean(found[-5:]) < 0.95 * np.mean(found[:5])
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    for path in (tmp_path / "run" / "reconstructions").iterdir():
        with Image.open(path) as picture:
            grays = {round(255 * gray) for gray in HATCH}
            assert grays <= {value for value, *others in np.asarray(picture).reshape(-1, 3) if {value} == {*others}}
    model, config = load_fcmae(tmp_path / "run")
    out = model(
        PixelNormalizer(config.data.mean, config.data.std)(torch.full((1, 5, 32, 32), torch.nan), torch.nan)
    )
    assert out.loss.item() == 0
    assert out.pred.isfinite().all()


def summary(out: str) -> tuple[dict[str, str], list[str]]:
    """The rows of the summary at the end of a run, and the commands below them."""
    rows, commands = out[out.rindex("\nloss  ") :].split("\nnext:\n")
    return {line[:17].strip(): line[17:] for line in rows.splitlines() if line}, commands.splitlines()


def test_a_run_ends_with_a_summary_and_commands_that_work(
    arguments: list[str], labelled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*arguments, *labelled) == 0
    rows, commands = summary(capsys.readouterr().out)
    first, *_, last = losses(folder).values()
    assert rows["loss"] == f"{first:.4f} -> {last:.4f}"
    top1 = knn(folder)
    assert rows["k-NN top-1"].startswith(f"{top1[0]:.2%} -> {top1[12]:.2%}")
    assert rows["updates"] == "12 (2.4 epochs, 96 images)"
    assert re.fullmatch(
        r"0:\d\d:\d\d at \d+ images/s, and 0:\d\d:\d\d for pictures, evaluation, checkpoint", rows["duration"]
    )
    for place in ("run folder", "encoder", "reconstructions"):
        assert Path(rows[place]).is_dir()
    assert commands == [
        f"  fcmae report {folder}",
        f"  tensorboard --logdir {folder}",
        f"  fcmae reconstruct {folder} IMAGES --output {folder}/panels",
        f"  fcmae evaluate {folder} --knn --linear --baseline data.root=LABELLED",
        f"  fcmae finetune --config finetune/small-folder-cpu init_from={folder} data.root=LABELLED "
        f"output={folder}-finetuned",
    ]
    photo = str(ROOT / "docs" / "photos" / "bird.jpg")
    for command in (commands[0], *commands[2:4]):
        _, *words = command.replace("IMAGES", photo).replace("=LABELLED", f"={tmp_path / 'labelled'}").split()
        assert fcmae.__main__.run([*words, *(["data.name=arrays"] if words[0] == "evaluate" else [])]) == 0
    assert (folder / "panels" / "bird.png").is_file()


def test_the_summary_of_a_resumed_run_is_of_the_whole_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "train.max_steps=5") == 0
    capsys.readouterr()
    assert run(*arguments, "resume=auto") == 0
    rows, _ = summary(capsys.readouterr().out)
    first, *_, last = losses(tmp_path / "run").values()
    assert rows["loss"] == f"{first:.4f} -> {last:.4f}"
    assert rows["updates"] == "12 (2.4 epochs, 96 images)"


def test_tensorboard_holds_the_scalars_and_the_panels(arguments: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(*arguments, "train.max_steps=3") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"loss", "lr", "images_per_s", "data_wait", "epoch"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.step for event in events.Images("reconstructions")] == [0, 3]


def test_a_picture_is_drawn_before_the_checkpoint_after_which_it_would_never_be(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[int, bool] = {}

    def save(folder: Path, state: State, *rest: Any, **kwargs: Any) -> Path:
        drawn[state.step] = (tmp_path / "run" / "reconstructions" / f"step-{state.step:08d}.png").is_file()
        return save_checkpoint(folder, state, *rest, **kwargs)

    monkeypatch.setattr(fcmae.training.checkpoint, "save_checkpoint", save)
    assert run(*arguments, "visualize.every_steps=5") == 0
    assert drawn == {5: True, 10: True, 12: True}


def test_the_same_command_gives_the_same_run_to_the_bit(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, f"output={tmp_path / 'a'}") == 0
    assert run(*arguments, f"output={tmp_path / 'b'}", "data.num_workers=2", "log.every_steps=3") == 0
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_the_loss_falls(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, "train.max_steps=100", "log.every_steps=10", "optim.base_lr=0.12") == 0
    history = list(losses(tmp_path / "run").values())
    assert 0.9 < history[0] < 1.1
    assert history[-1] < 0.95 * history[0]


@pytest.mark.minkowski
@pytest.mark.parametrize(("before", "after"), [("minkowski", "packed"), ("packed", "minkowski")])
def test_a_run_goes_on_with_another_layout(before: str, after: str, arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, f"output={tmp_path / 'whole'}", f"model.layout={after}") == 0
    folder = tmp_path / "changed"
    assert run(*arguments, f"output={folder}", f"model.layout={before}") == 0
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    assert run(*arguments, f"output={folder}", f"model.layout={after}", "resume=auto") == 0
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    first, second = weights(folder), weights(tmp_path / "whole")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value - second[name]).norm() <= 1e-3 * second[name].norm(), name


def test_a_layout_without_its_package_ends_in_one_line_before_anything_is_written(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    assert run(*arguments, "model.layout=minkowski") == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "error: model: layout 'minkowski' needs MinkowskiEngine, which is not installed: run make"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_accumulated_micro_batches_equal_one_batch(arguments: list[str], tmp_path: Path) -> None:
    settings = [*arguments, "model.drop_path=0", "train.max_steps=6"]
    assert run(*settings, f"output={tmp_path / 'one'}") == 0
    assert run(*settings, f"output={tmp_path / 'four'}", "data.batch_size=2", "optim.accumulate=4") == 0
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert records(tmp_path / "four")[-1]["seen_images"] == records(tmp_path / "one")[-1]["seen_images"]


@pytest.mark.parametrize("how", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_see_and_evaluate_together_what_one_does(
    how: dict[str, str], arguments: list[str], labelled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in how.items():
        monkeypatch.setenv(name, value)
    settings = [*arguments, *labelled, "model.drop_path=0", "train.max_steps=6", "optim.accumulate=2"]
    settings += ["eval.knn_every_epochs=100", "eval.num_images=39", "eval.collapse_every_epochs=100"]
    assert run(*settings, f"output={tmp_path / 'one'}", "data.batch_size=4") == 0
    done = run_story("pretrain", *settings, f"output={tmp_path / 'two'}", "data.batch_size=2", number=2)
    assert done.codes == [0, 0], done.errors
    assert done.output.count("step 6/6") == 1
    assert done.output.count("k-NN top1") == 2
    assert done.output.count("\nnext:\n") == done.output.count("updates          1 to 6") == 1
    assert done.output.count("warning: 6 updates are few") == done.output.count("opening ") == 1
    assert "strides" not in done.errors
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one[1] == pytest.approx(two[1], abs=1e-6)
    assert one == pytest.approx(two, abs=1e-5)
    seen, collapse = (
        [[record[key] for record in records(tmp_path / run) if key in record] for run in ("one", "two")]
        for key in ("seen_images", "cosine_distance/stage_4")
    )
    assert seen[0] == seen[1]
    assert len(collapse[0]) == 2
    assert collapse[0] == pytest.approx(collapse[1], abs=1e-4)
    first, second = knn(tmp_path / "one"), knn(tmp_path / "two")
    assert first[0] == second[0]
    assert first == pytest.approx(second, abs=0.12)  # trained weights may differ enough for one image of nine


def accelerate_launch(*words: str) -> None:
    """Run `accelerate launch`; the process that it starts is this one, in that one's environment."""

    def start(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        assert command[:2] == [sys.executable, "pretrain.py"]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            return SimpleNamespace(returncode=run(*command[2:]), wait=lambda: None)

    with pytest.MonkeyPatch.context() as patch:
        replaced = {"Popen": start, "CalledProcessError": subprocess.CalledProcessError}
        patch.setattr(accelerate.commands.launch, "subprocess", SimpleNamespace(**replaced))
        launch_command(launch_command_parser().parse_args([*words]))


def test_accelerate_launches_one_process(arguments: list[str], tmp_path: Path) -> None:
    how = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    accelerate_launch(*how, "pretrain.py", *arguments, "train.max_steps=2")
    assert list(losses(tmp_path / "run")) == [1, 2]


def test_accelerate_launch_on_cpu_does_not_quietly_start_fewer_processes(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--num_processes", "2", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
    with pytest.raises(subprocess.CalledProcessError):
        accelerate_launch(*how, "--dynamo_backend", "no", "pretrain.py", *arguments)
    err = capsys.readouterr().err
    assert "error: accelerate launch starts a single process on CPU" in err
    assert "torchrun --nproc_per_node" in err
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_nothing_but_memory(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, f"output={tmp_path / 'plain'}") == 0
    assert run(*arguments, f"output={tmp_path / 'lean'}", "train.gradient_checkpointing=true") == 0
    assert losses(tmp_path / "lean") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_packed_and_masked_train_alike_and_resume_each_other(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, f"output={tmp_path / 'packed'}") == 0
    masked = [*arguments, f"output={tmp_path / 'masked'}", "model.layout=masked"]
    assert run(*masked) == 0
    assert losses(tmp_path / "masked") == pytest.approx(losses(tmp_path / "packed"), rel=1e-3)
    assert run(*masked, "resume=auto", "model.layout=packed", "train.max_steps=14") == 0
    assert list(losses(tmp_path / "masked")) == list(range(1, 15))


def test_other_masks_and_targets_train_and_resume_to_the_bit(arguments: list[str], tmp_path: Path) -> None:
    arguments = [*arguments, "model.mask_shape=block", "model.mask_group=2", "model.target=hog"]
    assert run(*arguments) == 0
    assert weights(tmp_path / "run")["decoder.pred.bias"].shape == (2 * 2 * 9 * 3,)
    again = f"output={tmp_path / 'again'}"
    assert run(*arguments, again) == 0
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000012")
    assert run(*arguments, again, "resume=auto") == 0
    assert_same_weights(tmp_path / "run", tmp_path / "again")
    assert losses(tmp_path / "run")[12] < losses(tmp_path / "run")[1]
    pictures = (tmp_path / name / "reconstructions" / "step-00000012.png" for name in ("run", "again"))
    assert len({path.read_bytes() for path in pictures}) == 1


def test_bf16_and_clipping_train(arguments: list[str], tmp_path: Path) -> None:
    assert (
        run(*arguments, "train.precision=bf16", "optim.clip_grad=1.0", "train.max_steps=60", "optim.base_lr=0.3")
        == 0
    )
    history = losses(tmp_path / "run")
    assert history[60] < history[1]
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_compiled_run_is_traced_whole_and_gives_the_losses_of_an_eager_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """But for inductor's code, of which tests/test_model.py compiles as much as shows each layer."""
    settings = [*arguments, "train.max_steps=4", f"train.precision={precision}", "model.drop_path=0"]
    assert run(*settings, f"output={tmp_path / 'eager'}") == 0
    compile_module = torch.nn.Module.compile

    def trace(self: torch.nn.Module, *, fullgraph: bool, **options: Any) -> None:
        assert fullgraph
        compile_module(self, backend="aot_eager", fullgraph=True)  # without a minute of code generation

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    graphs = counters["stats"]["unique_graphs"]
    watched = "eval.collapse_every_epochs=0.4"  # by the same modules, uncompiled: the step is not traced again
    assert run(*settings, f"output={tmp_path / 'compiled'}", "train.compile=true", watched) == 0
    assert counters["stats"]["unique_graphs"] == graphs + 1
    tolerance = 1e-5 if precision == "no" else 1e-2
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=tolerance)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()


def test_a_terminal_of_80_columns_shows_rate_data_wait_and_time_left(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how a terminal ends whose other side is closed
            while part := os.read(terminal, 4096):
                shown.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(side, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert run(*arguments, "visualize.num_images=0") == 0
        monkeypatch.undo()
    reader.join()
    os.close(terminal)
    bar = r"loss \d\.\d+ lr \S+ \d+ images/s data wait \d+% [\d:]+ left done \d\d:\d\d \|"
    assert re.search(bar, b"".join(shown).decode())


def test_print_config_prints_what_would_run_and_runs_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "optim.base_lr=1e-3", "--print-config") == 0
    assert "base_lr: 0.001" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_reports_size_time_and_memory_and_writes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments, "--dry-run") == 0
    out = capsys.readouterr().out
    for word in (
        "parameters",
        "updates        12",
        "first loss",
        "step alone",
        "data alone",
        "bottleneck",
        "whole run      about 0:00:",
        "without evaluation, pictures and checkpoints",
        "peak memory",
        "checkpoint",
    ):
        assert word in out
    assert "40 of 40 images tried, 0 unreadable" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_computes_micro_batches_not_whole_updates(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "SLOW_S", 0)  # as on a machine on which it takes long
    computed: list[int] = []
    accumulate = Trainer.accumulate

    def count(self: Trainer, batches: Iterator[Any], micro: int) -> None:
        computed.append(micro)
        accumulate(self, batches, micro)

    monkeypatch.setattr(Trainer, "accumulate", count)
    assert run(*arguments, "--dry-run", "data.batch_size=2", "optim.accumulate=1000") == 0
    out = capsys.readouterr().out
    assert computed == [999]
    assert "computing 2 of the 2000 images of an update" in out
    assert "from one of its 1000 micro-batches, compilation of kernels included" in out


def test_a_dry_run_whose_loss_is_not_finite_says_so_and_writes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.PixelNormalizer, "forward", lambda _, pixels, **how: pixels * float("nan"))
    line = failure(capsys, *arguments, "--dry-run")
    assert "the loss of step 1 is not finite; try a lower optim.base_lr" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step_rate", "data_rate", "overrides", "expected"),
    [
        (100, 250, {}, "the step; the data come 2.5 times as fast"),
        (300, 100, {"num_workers": 2}, "the data; the step could take 3.0 times as many: raise data.num_workers=2"),
        (300, 100, {"num_workers": 16}, "with fcmae prepare, for data.name=arrays"),
        (
            300,
            100,
            {"num_workers": 16, "name": "arrays"},
            "this takes more than 16 cores for each process, or a faster disk",
        ),
    ],
)
def test_the_bottleneck_is_named_with_what_helps(
    step_rate: float, data_rate: float, overrides: dict[str, Any], expected: str
) -> None:
    values = {"output": "run", "model": {"variant": "atto"}, "data": {"root": "images", **overrides}}
    config = parse_config(PretrainConfig, values, "test")
    assert expected in name_bottleneck(step_rate, data_rate, config, 16)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_loaders_rate_is_that_of_its_workers_not_of_what_lay_ready(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]
    monkeypatch.setattr("fcmae.training.dry_run.time.perf_counter", lambda: seconds[0])

    class Batch(NamedTuple):
        indices: tuple[int, ...] = (0,) * 10

    def batches() -> Iterator[Any]:
        yield Batch()
        for _ in range(PREFETCH_FACTOR * num_workers):
            yield Batch()
        while True:
            seconds[0] += 0.02
            yield Batch()

    assert loading_rate(batches(), num_workers, PREFETCH_FACTOR * num_workers) == pytest.approx(500)


def test_a_finished_run_says_so_and_stays_as_it_is(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    before = losses(tmp_path / "run")
    assert run(*arguments, "resume=auto") == 0
    out = capsys.readouterr().out
    assert "finished already" in out
    assert next(iter(summary(out)[0])) == "loss"
    assert losses(tmp_path / "run") == before


def test_resuming_with_another_rate_says_that_it_is_another_run(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "train.max_steps=5") == 0
    capsys.readouterr()
    assert run(*arguments, "train.max_steps=8", "optim.base_lr=1e-4", "resume=auto") == 0
    out = capsys.readouterr().out
    assert "optim.base_lr: 0.03 -> 0.0001" in out
    assert "train.max_steps: 5 -> 8" in out


def test_a_run_resumed_with_another_batch_goes_on_with_the_next_image(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "train.max_steps=5") == 0
    assert run(*arguments, "train.max_steps=7", "data.batch_size=4", "resume=auto") == 0
    assert "images per update: 8 -> 4" in capsys.readouterr().out
    assert [record["seen_images"] for record in records(tmp_path / "run")] == [8, 16, 24, 32, 40, 44, 48]


def test_a_run_can_start_from_anothers_weights_or_encoder(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    start = [*arguments, "train.max_steps=2", "train.seed=7", "optim.base_lr=0"]
    assert run(*start, f"output={tmp_path / 'whole'}", f"init_from={tmp_path / 'run'}") == 0
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert "model.safetensors (FCMAE run, step 12, raw weights), with its decoder" in capsys.readouterr().out

    encoder = {n.removeprefix("encoder."): v for n, v in weights(tmp_path / "run").items() if "encoder." in n}
    save_file(encoder, tmp_path / "encoder.safetensors")
    torch.save({"state_dict": to_timm(encoder)}, tmp_path / "timm.pth")
    for name in ("encoder.safetensors", "timm.pth"):
        only = tmp_path / name.replace(".", "-")
        assert run(*start, f"output={only}", f"init_from={tmp_path / name}") == 0
        assert all(torch.equal(weights(only)["encoder." + name], value) for name, value in encoder.items())
        assert not torch.equal(
            weights(only)["decoder.pred.weight"], weights(tmp_path / "run")["decoder.pred.weight"]
        )
        kind = "official dense" if name.startswith("encoder") else "timm"
        assert f"{name} ({kind}), with a new decoder" in capsys.readouterr().out


@pytest.mark.parametrize("sparse", [False, True])
def test_a_run_takes_the_decoder_of_the_official_codes_whole_fcmae(
    sparse: bool, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "train.max_steps=1") == 0
    ours = weights(tmp_path / "run")
    encoder = {n.removeprefix("encoder."): v for n, v in ours.items() if n.startswith("encoder.")}
    theirs = {f"encoder.{n}": v for n, v in (dense_to_official_sparse(encoder) if sparse else encoder).items()}
    theirs |= {n.removeprefix("decoder."): v for n, v in ours.items() if n.startswith("decoder.")}
    torch.save({"model": theirs}, tmp_path / "checkpoint.pth")
    start = [*arguments, "train.max_steps=1", "optim.base_lr=0", f"output={tmp_path / 'next'}"]
    assert run(*start, f"init_from={tmp_path / 'checkpoint.pth'}") == 0
    assert_same_weights(tmp_path / "run", tmp_path / "next")
    assert "with its decoder" in capsys.readouterr().out

    other = [*start, f"output={tmp_path / 'other'}", "model.decoder_dim=24"]
    assert run(*other, f"init_from={tmp_path / 'checkpoint.pth'}") == 2
    assert "another decoder (" in capsys.readouterr().err


def test_a_run_can_start_from_an_encoder_for_other_channels(
    arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "train.max_steps=1") == 0
    save_arrays(tmp_path / "gray", np.load(data / "images.npy")[..., :1])
    gray = [*arguments, f"data.root={tmp_path / 'gray'}", "model.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]"]
    start = [*gray, f"output={tmp_path / 'next'}", f"init_from={tmp_path / 'run'}", "optim.base_lr=0"]
    assert run(*start, "train.max_steps=1") == 0
    said = "raw weights), first layer adapted from 3 to 1 channels (summed), with a new decoder"
    assert said in capsys.readouterr().out
    before, after = weights(tmp_path / "run"), weights(tmp_path / "next")
    stem = "encoder.downsample_layers.0.0.weight"
    torch.testing.assert_close(after[stem], before[stem].sum(1, keepdim=True))
    assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("encoder.") and n != stem)


def test_the_decoder_can_be_trained_alone_first(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, "train.max_steps=1") == 0
    first = [*arguments, f"init_from={tmp_path / 'run' / 'encoder'}", "optim.decoder_first_epochs=0.6"]  # 3 updates
    start = [*first, "optim.warmup_epochs=0", f"output={tmp_path / 'next'}", "resume=auto"]
    before = weights(tmp_path / "run")
    assert run(*start, "train.max_steps=3") == 0
    after = weights(tmp_path / "next")
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("encoder."))
    assert not torch.equal(after["decoder.pred.weight"], before["decoder.pred.weight"])
    assert run(*start, "train.max_steps=4") == 0
    now = weights(tmp_path / "next")
    assert not any(
        torch.equal(now[n], before[n]) for n in before if n.startswith("encoder.stages") and "pwconv" in n
    )


# k-NN on the way


@pytest.fixture
def labelled(data: Path, tmp_path: Path) -> list[str]:
    """The same images to train on, with labels, and others to classify; evaluated every 4 steps."""
    images = np.load(data / "images.npy")
    save_arrays(tmp_path / "labelled" / "train", images, np.arange(40) % 4, ["a", "b", "c", "d"])
    save_arrays(tmp_path / "labelled" / "val", images[:9, ::-1], np.arange(9) % 3, ["a", "b", "d"])
    return [f"data.root={tmp_path / 'labelled'}", "eval.knn_every_epochs=0.8"]


def knn(folder: Path) -> dict[int, float]:
    found = [record for record in records(folder) if "knn_top1" in record]
    by_step = {record["step"]: record["knn_top1"] for record in found}
    assert len(by_step) == len(found), "a step was evaluated twice"
    return by_step


def test_knn_is_recorded_from_start_to_end_and_changes_nothing_of_the_training(
    arguments: list[str], labelled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluated, alone = tmp_path / "evaluated", tmp_path / "alone"
    workers = "data.num_workers=1"
    assert run(*arguments, *labelled, f"output={evaluated}", workers, "checkpoint.keep=9") == 0
    out = capsys.readouterr().out
    assert run(*arguments, *labelled, f"output={alone}", workers, "eval.knn_every_epochs=null") == 0
    assert list(knn(evaluated)) == [0, 4, 8, 12]
    assert all(0 <= value <= 1 for value in knn(evaluated).values())
    assert f"step 12 · k-NN top1 {knn(evaluated)[12]:.2%}\n" in out
    events = EventAccumulator(str(evaluated / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("knn_top1")] == [0, 4, 8, 12]
    assert not knn(alone)
    assert losses(evaluated) == losses(alone)
    for name in ("model", "optimizer"):
        path = Path("checkpoints", "last", f"{name}.safetensors")
        assert (evaluated / path).read_bytes() == (alone / path).read_bytes()
    assert len(list((evaluated / "checkpoints").glob("step-*"))) == 3, "no checkpoint but the usual"


def test_knn_of_a_resumed_run_equals_that_of_the_uninterrupted_one(
    arguments: list[str], labelled: list[str], tmp_path: Path
) -> None:
    assert run(*arguments, *labelled, "checkpoint.every_steps=4") == 0
    folder = tmp_path / "run"
    whole = knn(folder), losses(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    assert run(*arguments, *labelled, "resume=auto") == 0
    assert (knn(folder), losses(folder)) == whole
    shutil.rmtree(folder / "checkpoints")  # as if stopped before the first
    assert run(*arguments, *labelled, "resume=auto") == 0
    assert (knn(folder), losses(folder)) == whole


def test_features_are_evaluated_in_bf16_and_on_held_out_images(
    arguments: list[str], labelled: list[str], tmp_path: Path
) -> None:
    settings = [*arguments, *labelled, "train.max_steps=2", "train.precision=bf16"]
    assert run(*settings, "eval.val_split=null", "eval.num_images=20") == 0
    assert list(knn(tmp_path / "run")) == [0, 2]


def test_images_without_labels_cannot_be_evaluated(
    arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failure(capsys, *arguments, "eval.knn_every_epochs=1")
    assert f"{data}, split train: no labels" in line
    assert not (tmp_path / "run").exists()


# Bad input


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error of a run that ends with exit code 2."""
    return error_line(pretrain.main, capsys, *arguments)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.root=/nowhere/at/all", ["data.root=/nowhere/at/all"]),
        ("data.image_size=44", ["data.image_size", "44", "40 and 48"]),
        ("data.image_size=[32,30]", ["width 30", "24 and 32"]),
        ("data.image_size=8", ["at least two patches"]),
        ("model.mask_ratio=1", ["model.mask_ratio"]),
        ("model.mask_shape=blocks", ["model.mask_shape", "'random', 'block' or 'grid'", "'blocks'"]),
        ("model.mask_group=3", ["model.mask_group", "1, 2 or 4"]),
        ("data.image_size=24 model.mask_group=2", ["data.image_size", "mask_group=2", "3 x 3", "of 2 patches"]),
        ("model.target=sift", ["model.target", "'pixels' or 'hog'"]),
        ("model.variant=atoo", ["model", "unknown variant 'atoo'", "atto"]),
        ("optim.base_rl=1", ["did you mean 'optim.base_lr'?"]),
        ("init_from=/nowhere/at/all", ["/nowhere/at/all"]),
        ("train.precision=fp16", ["train.precision=fp16"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, parts: list[str]
) -> None:
    line = failure(capsys, *arguments, *override.split())
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


def test_the_script_itself_ends_with_one_line_and_exit_code_2(arguments: list[str]) -> None:
    command = [sys.executable, str(ROOT / "pretrain.py"), *arguments, "data.root=/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.root=/nowhere")
    assert done.stderr.count("\n") == 1


def test_a_folder_in_use_is_not_touched_without_resume(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert "resume=auto" in failure(capsys, *arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    line = failure(capsys, *arguments, f"output={tmp_path / 'mine'}", "resume=auto")
    assert "not a run's" in line
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_checkpoint_of_another_model_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    line = failure(capsys, *arguments, "resume=auto", "model.variant=atto")
    assert "model.variant=atto is asked for" in line
    assert f"has model.variant={((1, 1, 1, 1), (8, 8, 16, 16))}" in line
    other = [*arguments, f"output={tmp_path / 'other'}", f"init_from={tmp_path / 'run'}", "model.variant=atto"]
    line = failure(capsys, *other)
    assert f"init_from={tmp_path / 'run'}: FCMAE run weights with variant depths [1, 1, 1, 1]" in line
    assert "set model.variant to that" in line
    for key in ("stem_stride", "decoder_dim", "decoder_depth"):
        line = failure(capsys, *other[:-1], f"model.{key}=2")
        assert f"weights with {key} " in line
        assert f"set model.{key} to that" in line


def test_too_little_disk_is_reported_before_anything_is_trained(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "checkpoint.keep" in failure(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside_a_file = tmp_path / "config.yaml" / "run"
    assert str(inside_a_file) in failure(capsys, *arguments, f"output={inside_a_file}")


def test_running_out_of_gpu_memory_names_the_remedies(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pretrain.PixelNormalizer, "forward", fail)
    assert "lower data.batch_size" in failure(capsys, *arguments, "visualize.num_images=0")


def broken_folder(folder: Path, good: int, broken: int) -> Path:
    folder.mkdir()
    for i in range(good + broken):
        path = folder / f"{i:02d}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        if i >= good:
            path.write_bytes(path.read_bytes()[:100])
    return folder


def test_images_that_do_not_decode_are_skipped_counted_and_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken_folder(tmp_path / "images", 14, 2)
    assert run(*arguments, "data.name=folder", f"data.root={folder}", "data.max_bad=2") == 0
    out = capsys.readouterr().out
    assert out.count("skipped ") == 2
    assert f"skipped {folder / '15.png'}: " in out
    assert "unreadable so far: 2" in out


def test_more_than_max_bad_images_end_the_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken_folder(tmp_path / "images", 12, 4)
    line = failure(capsys, *arguments, "data.name=folder", f"data.root={folder}", "data.max_bad=3")
    assert "4 images do not decode, more than data.max_bad=3" in line
    assert str(folder) in line


def test_a_non_finite_loss_stops_the_run_and_spares_the_last_checkpoint(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pretrain.PixelNormalizer.forward
    calls = iter(range(1000))

    def poison(self: pretrain.PixelNormalizer, pixels: torch.Tensor, **how: float) -> torch.Tensor:
        images = build(self, pixels, **how)
        return images * float("nan") if how and next(calls) == 7 else images  # of those in training

    monkeypatch.setattr(pretrain.PixelNormalizer, "forward", poison)
    settings = [*arguments, "log.every_steps=4", "visualize.num_images=0"]
    line = failure(capsys, *settings)
    folder = tmp_path / "run"
    assert "the loss of step 8 is not finite" in line
    assert str(folder / "checkpoints" / "step-00000005") in line
    report = json.loads((folder / "non-finite-step-8.json").read_text())
    assert report["step"] == 8
    assert len(report["indices"]) == 8
    assert all(value.isfinite().all() for value in weights(folder).values())

    monkeypatch.undo()
    assert run(*settings, "resume=auto") == 0
    assert run(*settings, f"output={tmp_path / 'whole'}") == 0
    assert_same_weights(folder, tmp_path / "whole")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    program = """
import resource, torch
from fcmae.training.launch import keep_freed_memory
def least_faults():
    faults = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults[1:])  # a kernel short of memory takes some back at any time
given_back = least_faults()
keep_freed_memory()
print(given_back, least_faults())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept * 20 < given_back
