"""A run folder: what its model is, which run a path belongs to, what it knows of itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import flip, state_of

from fcmae.errors import UserError
from fcmae.training.checkpoint import EMA, MODEL, OPTIMIZER, Best, save_checkpoint
from fcmae.training.run_folder import RunFolder, stored_model


def write_run(path: Path, *, ema: bool = True, best: int | None = 5, eval_ema: bool | None = None) -> RunFolder:
    """A run of three checkpoints, of steps 5, 10 and 15."""
    run = RunFolder(path)
    for step in (5, 10, 15):
        tensors = {"weight": torch.full((2,), float(step))}
        state = state_of(
            step,
            config={"eval": {"ema": eval_ema}},
            best=None if best is None else Best(step=best, score=0.5),
        )
        files = {MODEL: tensors, OPTIMIZER: {}} | ({EMA: tensors} if ema else {})
        save_checkpoint(run.checkpoints, state, files, keep=3)
    run.config.write_text("output: run\n")
    return run


def chosen(path: Path, **which: Any) -> tuple[str, str, str]:
    """The folder, file and description of what a path stands for."""
    found = stored_model(path, **which)
    assert found is not None
    return found.file.resolve().parent.name, found.file.name, found.description


def chosen_tensors(path: Path) -> dict[str, torch.Tensor]:
    found = stored_model(path)
    assert found is not None
    return found.read()


def test_the_model_of_a_run_is_the_best_that_was_evaluated_its_ema_where_there_is_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run").path
    assert chosen(run) == ("step-00000005", "ema.safetensors", "step 5, EMA")
    assert chosen(run, last=True) == ("step-00000015", "ema.safetensors", "step 15, EMA")
    assert chosen(run, ema=False) == ("step-00000005", "model.safetensors", "step 5, raw weights")
    assert chosen(run, last=True, ema=False) == ("step-00000015", "model.safetensors", "step 15, raw weights")
    raw = write_run(tmp_path / "raw", ema=False).path
    assert chosen(raw) == ("step-00000005", "model.safetensors", "step 5, raw weights")
    with pytest.raises(UserError, match="holds no EMA weights"):
        stored_model(raw, ema=True)


def test_the_raw_weights_are_the_model_of_a_run_that_evaluates_those(tmp_path: Path) -> None:
    run = write_run(tmp_path, eval_ema=False).path
    assert chosen(run)[2] == "step 5, raw weights"
    assert chosen(run, ema=True)[2] == "step 5, EMA"


def test_the_model_of_a_run_without_evaluation_is_the_newest(tmp_path: Path) -> None:
    assert chosen(write_run(tmp_path, best=None).path)[2] == "step 15, EMA"


def test_a_checkpoint_and_a_file_in_it_stand_for_themselves(tmp_path: Path) -> None:
    folder = write_run(tmp_path).checkpoints / "step-00000010"
    assert chosen(folder)[2] == chosen(folder / "ema.safetensors")[2] == "step 10, EMA"
    assert chosen(folder / "model.safetensors")[2] == "step 10, raw weights"
    assert stored_model(folder / "optimizer.safetensors") is None
    assert stored_model(tmp_path / "elsewhere") is None


def test_what_lies_in_a_run_belongs_to_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.model.mkdir()
    inside = (run.path, run.model, run.checkpoints / "last", run.best / "ema.safetensors")
    assert all(RunFolder.around(path).path == run.path.resolve() for path in inside)  # pyright: ignore[reportOptionalMemberAccess]
    (tmp_path / "config.yaml").write_text("no run")
    assert RunFolder.around(tmp_path) is None
    assert RunFolder.around(tmp_path / "elsewhere" / "weights.pth") is None


def test_a_broken_newest_or_best_checkpoint_is_reported_and_an_intact_one_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run.checkpoints / "step-00000020").mkdir()
    intact = run.checkpoints / "step-00000015"
    with pytest.raises(UserError, match=f"step-00000020/state.json: missing; {intact} is intact"):
        stored_model(run.path, last=True)
    assert chosen(run.path)[2] == "step 5, EMA"
    flip(run.best / "ema.safetensors", -2)
    found = stored_model(run.path)
    assert found is not None
    with pytest.raises(UserError, match=f"ema.safetensors: damaged: its SHA-256 .*; {intact} is intact"):
        found.read()
    (run.best / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"best/ema.safetensors: missing; .*15 is intact"):
        chosen_tensors(run.path)
    (run.checkpoints / "step-00000005").rename(run.checkpoints / "moved")
    with pytest.raises(UserError, match=r"best/state.json: missing; .*15 is intact"):
        stored_model(run.path)
    assert {path.name for path in run.checkpoints.glob("*-*")} == {f"step-000000{n}" for n in (10, 15, 20)}
    assert RunFolder(tmp_path / "elsewhere").newest is None


def test_a_checkpoint_folder_without_its_state_is_not_read_as_plain_weights(tmp_path: Path) -> None:
    folder = write_run(tmp_path).checkpoints / "step-00000010"
    (folder / "state.json").unlink()
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=r"state.json: missing; .*15 is intact"):
            stored_model(path)
