"""Runs that go on: exactly where they stopped, after a kill, and from what fcmae 0.1.0 left."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, records, run_main
from PIL import Image
from processes import Processes
from safetensors.torch import load_file, save_file

from fcmae import finetune, pretrain
from fcmae.arguments import run
from fcmae.data import save_arrays
from fcmae.load import load_weights
from fcmae.training.checkpoint import EMA, MODEL, OPTIMIZER
from fcmae.training.run_folder import RunFolder
from fcmae.weights.base import build_encoder

STORIES: dict[str, tuple[ModuleType, str, str]] = {
    # the story; what it leaves in the end; its part of a configuration with everything on
    "pretrain": (
        pretrain,
        "encoder",
        """
model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, decoder_dim: 16, drop_path: 0.2}
data: {name: arrays, root: DATA, image_size: 32, batch_size: 4, num_workers: 0}
optim: {base_lr: 0.03, warmup_epochs: 1, accumulate: 2}
train: {max_steps: 40}
log: {every_steps: 4}
visualize: {num_images: 0}
""",
    ),
    "finetune": (
        finetune,
        "model",
        """
model: {variant: [[1, 1, 2, 1], [8, 16, 24, 32]], stem_stride: 1, drop_path: 0.2}
data: {name: arrays, root: DATA, image_size: 32, batch_size: 8, num_workers: 0, crop_scale: [0.3, 1], crop_pct: 1,
       mixup: 0.8, cutmix: 1, auto_augment: rand-m9-mstd0.5-inc1, erase_prob: 0.25}
optim: {base_lr: 0.05, warmup_epochs: 0.5, layer_decay: 0.9, weight_decay: 0.05, clip_grad: 5, accumulate: 2}
train: {max_steps: 40, ema_decay: 0.9}
eval: {every_epochs: 2}
log: {every_steps: 1}
""",
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth random images of 32 px with labels, 40 to train on and 9 to evaluate."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, number in (("train", 40), ("val", 9)):
        coarse = rng.integers(0, 256, (number, 5, 5, 3), dtype=np.uint8)
        images = [np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in coarse]
        save_arrays(root / split, np.stack(images), np.arange(number) % 4)
    return root


def recorded(folder: Path, *, after: int = 0) -> dict[int, dict[str, float]]:
    """What a run recorded of each step, but for what the clock says; a record twice is an error."""
    found: dict[int, dict[str, float]] = {}
    for record in records(folder):
        values = {
            k: v for k, v in record.items() if k not in ("step", "images_per_s", "data_wait", "memory_gb", "time")
        }
        step = found.setdefault(record["step"], {})
        assert not step.keys() & values.keys(), f"step {record['step']} was recorded twice"
        step |= values
    return {step: values for step, values in found.items() if step > after}


def arguments(name: str, data: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "config.yaml"
    text = STORIES[name][2].replace("DATA", str(data))
    config.write_text(f"output: {tmp_path / 'whole'}\n{text}checkpoint: {{every_steps: 7}}\n")
    return ["--config", str(config)]


@pytest.mark.parametrize("name", STORIES)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(name: str, data: Path, tmp_path: Path) -> None:
    story, folder = STORIES[name][0], tmp_path / "whole"
    settings = [*arguments(name, data, tmp_path), "train.max_steps=24"]
    assert run_main(story.main, *settings) == 0
    whole = recorded(folder)
    files = sorted(folder.glob("checkpoints/step-00000024/*.safetensors"))
    assert {file.name for file in files} == {MODEL, OPTIMIZER} | ({EMA} if name == "finetune" else set())
    expected = {file: file.read_bytes() for file in files}
    shutil.rmtree(folder / "checkpoints" / "step-00000024")  # which leaves that of step 21
    assert run_main(story.main, *settings, "resume=auto") == 0
    assert recorded(folder) == whole
    assert {file: file.read_bytes() for file in files} == expected


@pytest.mark.parametrize("name", STORIES)
def test_a_killed_run_goes_on_as_if_it_had_not_been(name: str, data: Path, tmp_path: Path) -> None:
    story, left, _ = STORIES[name]
    settings = arguments(name, data, tmp_path)
    assert run_main(story.main, *settings) == 0

    folder = tmp_path / "killed"
    words = [f"{name}.py", *settings, f"output={folder}", "data.num_workers=1"]
    process = Processes(partial(run, name), words, tmp_path)
    deadline = time.monotonic() + 250
    while not (folder / "checkpoints" / "step-00000014").exists() and process.alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (folder / left).exists(), "the run was over before it could be killed"

    assert run_main(story.main, *settings, f"output={folder}", "resume=auto") == 0
    expected, found = recorded(tmp_path / "whole"), recorded(folder)
    assert list(found) == list(expected)
    for step, values in expected.items():
        # two processes may round the last bits differently, which then grows from step to step
        assert found[step] == pytest.approx(values, rel=1e-4), step
    for name in (MODEL, EMA)[: 2 if story is finetune else 1]:
        first, second = (load_file(run / "checkpoints" / "last" / name) for run in (folder, tmp_path / "whole"))
        assert first.keys() == second.keys()
        for key, value in second.items():
            assert (first[key] - value).norm() <= 1e-3 * value.norm(), key


def test_numba_leaves_the_number_of_threads_as_it_was_on_which_the_last_bits_depend() -> None:
    program = """
import torch
torch.set_num_threads(1)
from fcmae.ops.patch_depthwise_numba import _run
_run(lambda: None)
print(torch.get_num_threads())
"""
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "1\n"


# Runs of fcmae 0.1.0


OLD = ROOT / "tests" / "data" / "0.1.0"
"""A pretraining and a fine-tuning run from it, each as it lay on disk at step 5 of 12; but metrics.jsonl is that of
the uninterrupted run to its end."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of those runs, in the working folder, as their paths are relative."""
    for source in OLD.rglob("*"):
        copy = tmp_path / source.relative_to(OLD)
        if source.is_symlink():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(os.readlink(source))
        elif source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "story"), [("pretraining", pretrain), ("finetuning", finetune)])
def test_a_run_of_0_1_0_goes_on_as_it_would_have(name: str, story: ModuleType, old: Path) -> None:
    assert run_main(story.main, "--config", f"{name}/config.yaml", "resume=auto") == 0
    expected, found = recorded(OLD / name, after=5), recorded(old / name, after=5)
    assert list(found) == list(expected) == [6, 8, 10, 12]
    for step, values in expected.items():
        assert found[step].keys() - values.keys() <= {"grad_norm"}, "which 0.1.0 did not record"
        found[step] = {key: value for key, value in found[step].items() if key in values}
        # other processors and numbers of threads round the sums of the last bits otherwise
        assert found[step] == pytest.approx(values, rel=1e-5), step
    assert recorded(old / name) | expected == recorded(OLD / name), "what came before is as it was"
    moments = load_file(old / name / "checkpoints" / "last" / OPTIMIZER)
    assert {key.partition(".")[0] for key in moments} == {"state"}, "written in today's names"


def test_the_moments_of_0_1_0_matter_to_what_is_compared(old: Path) -> None:
    folder = RunFolder("pretraining")
    assert folder.newest is not None
    optimizer = folder.newest / OPTIMIZER
    moments: dict[str, Any] = load_file(optimizer)
    save_file(
        {key: value * 0 if key.startswith("exp_avg.") else value for key, value in moments.items()}, optimizer
    )
    assert run_main(pretrain.main, "--config", "pretraining/config.yaml", "resume=auto") == 0
    losses = [
        [values["loss"] for values in recorded(p, after=6).values()] for p in (folder.path, OLD / folder.path)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_the_models_of_runs_of_0_1_0_are_read(old: Path) -> None:
    for path, file in (
        ("pretraining", "pretraining/checkpoints/step-00000005/model.safetensors"),
        ("finetuning", "finetuning/checkpoints/best/ema.safetensors"),
        ("finetuning/checkpoints/last", "finetuning/checkpoints/last/ema.safetensors"),
        ("finetuning/checkpoints/last/model.safetensors", "finetuning/checkpoints/last/model.safetensors"),
    ):
        weights = load_weights(path)
        assert weights.path == Path(file)
        stored = {key.removeprefix("encoder."): value for key, value in load_file(file).items()}
        network = build_encoder(weights)
        assert network.num_classes == (3 if "finetuning" in file else 0)
        for key, value in network.state_dict().items():
            assert torch.equal(value, stored[key]), key


def test_a_run_of_0_1_0_is_evaluated_to_the_scores_it_recorded(old: Path) -> None:
    expected = recorded(OLD / "finetuning")[5]
    for arguments, kind in (([], "ema"), (["--raw"], "val"), (["--last", "--ema"], "ema")):
        assert run_main(finetune.main, "--evaluate", "finetuning", *arguments) == 0
        found = json.loads(Path("finetuning/evaluation.json").read_text())
        assert found["ema"] == (kind == "ema")
        assert found["loss"] == pytest.approx(expected[f"{kind}_loss"], rel=1e-5)
        assert found["top1"] == pytest.approx(expected[f"{kind}_top1"])
