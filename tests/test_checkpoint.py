"""Checkpoints: complete or absent, exact, and plain about what does not fit."""

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import flip, records, state_of
from safetensors.torch import load_file, save_file
from small_runs import batches, outcome, rehash, small_config, small_run, small_trainer, stop_after
from torch import Tensor, nn

import fcmae.training.checkpoint as checkpoint
import fcmae.training.launch as launch
import fcmae.training.run_folder as run_folder
from fcmae import FCMAE
from fcmae.errors import UserError
from fcmae.tensors import load_strictly, read_safetensors
from fcmae.training.checkpoint import (
    EMA,
    MODEL,
    OPTIMIZER,
    SUMS,
    Best,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
    save_checkpoint,
    step_folders,
)
from fcmae.training.optim import build_adamw
from fcmae.training.run_folder import (
    RunFolder,
    checkpoint_bytes,
    claim_run_folder,
    require_disk,
    stored_model,
)
from fcmae.training.schedule import Plan

SMALL = ((1, 1, 1, 1), (8, 8, 16, 16))


def save(folder: Path, step: int, keep: int = 2, ema: dict[str, Tensor] | None = None, **known: Any) -> Path:
    files = {MODEL: {"weight": torch.full((3,), float(step))}, OPTIMIZER: {}} | ({EMA: ema} if ema else {})
    return save_checkpoint(folder, state_of(step, **known), files, keep=keep)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_the_newest_are_kept_and_last_points_at_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 10, 15, 20):
        save(folder, step)
    assert steps_in(folder) == [15, 20]
    assert (folder / "last").resolve() == folder / "step-00000020"
    assert RunFolder(tmp_path).newest == folder / "step-00000020"
    assert read_checkpoint(folder / "last").state.step == 20


def test_the_best_is_pointed_at_and_kept_until_there_is_a_better_one(tmp_path: Path) -> None:
    for step, best in ((5, 5), (10, 5), (15, 5), (20, 5)):
        save(tmp_path, step, best=Best(step=best, score=0.5))
    assert steps_in(tmp_path) == [5, 15, 20]
    assert (tmp_path / "best").resolve() == tmp_path / "step-00000005"
    better = Best(step=25, score=0.6)
    save(tmp_path, 25, best=better)
    save(tmp_path, 30, best=better)
    save(tmp_path, 35, best=better)
    assert steps_in(tmp_path) == [25, 30, 35]
    assert (tmp_path / "best").resolve() == tmp_path / "step-00000025"


def test_the_ema_lies_beside_the_weights_where_there_is_one(tmp_path: Path) -> None:
    assert read_checkpoint(save(tmp_path, 5)).ema is None
    average = {"weight": torch.ones(3)}
    ema = read_checkpoint(save(tmp_path, 10, ema=average)).ema
    assert ema is not None
    assert torch.equal(ema["weight"], average["weight"])


def test_a_step_that_is_saved_already_is_never_absent(tmp_path: Path) -> None:
    written = (save(tmp_path, 5) / "model.safetensors").stat().st_ino
    assert (save(tmp_path, 5) / "model.safetensors").stat().st_ino == written
    assert steps_in(tmp_path) == [5]


@pytest.mark.parametrize("broken", ["fill_safetensors", "fsync", "replace", "symlink"])
def test_a_failure_while_writing_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 5)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint if broken == "fill_safetensors" else os, broken, fail)
        with pytest.raises(UserError, match="the disk is full; earlier checkpoints are intact") as caught:
            save(folder, 10)
    assert "\n" not in str(caught.value)
    assert torch.equal(read_checkpoint(folder / "last").model["weight"], torch.full((3,), 5.0))
    save(folder, 15)
    assert not list(folder.glob(".writing*"))
    assert RunFolder(tmp_path).newest == folder / "step-00000015"


def test_a_kill_while_writing_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 5)
    (folder / ".writing-step-00000010").mkdir()
    (folder / ".writing-step-00000010" / "model.safetensors").write_bytes(b"half")
    assert RunFolder(tmp_path).newest == folder / "step-00000005"
    save(folder, 10)
    assert not list(folder.glob(".writing*"))


def train_a_little(model: FCMAE, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        loss = model(torch.randn(2, 3, 32, 32)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_weights_and_moments_come_back_to_the_bit(tmp_path: Path) -> None:
    def start() -> tuple[FCMAE, torch.optim.Optimizer]:
        model = FCMAE(SMALL, stem_stride=1, decoder_dim=16)
        return model, build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))

    model, optimizer = start()
    train_a_little(model, optimizer, range(3))
    files = {MODEL: model.state_dict(), OPTIMIZER: optimizer_tensors(model, optimizer)}
    save_checkpoint(tmp_path, state_of(3), files, keep=1)
    expected = train_a_little(model, optimizer, range(3, 6))
    other, other_optimizer = start()
    stored = read_checkpoint(tmp_path / "last")
    load_strictly(other, stored.model, stored.path)
    restore_optimizer(other, other_optimizer, stored.optimizer, stored.path)
    assert train_a_little(other, other_optimizer, range(3, 6)) == expected


def test_moments_under_the_names_of_0_1_0_come_back_and_those_of_another_optimizer_do_not() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        return model, build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))

    model, optimizer = start()
    assert optimizer_tensors(model, optimizer) == {}
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert set(tensors) == {f"state.{name}.{kind}" for name, _ in model.named_parameters() for kind in kinds}
    old = {}
    for name, value in tensors.items():
        parameter, _, kind = name.removeprefix("state.").rpartition(".")
        old[f"{kind}.{parameter}"] = value.clone()
    other, other_optimizer = start()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    restore_optimizer(other, other_optimizer, old, "x")
    restored = optimizer_tensors(other, other_optimizer)
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    assert {group["weight_decay"] for group in other_optimizer.param_groups} == {0.05, 0.0}
    with pytest.raises(UserError, match="x: 12 tensors are not those of this optimizer"):
        restore_optimizer(other, other_optimizer, {}, "x")
    del old["exp_avg.0.weight"]
    with pytest.raises(
        UserError, match=r"x: 1 tensors are not those of this optimizer, .*state\.0\.weight\.exp_avg"
    ):
        restore_optimizer(other, other_optimizer, old, "x")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_safetensors(tmp_path / "weights.pth")


def test_missing_and_unexpected_keys_are_listed() -> None:
    model: nn.Module = nn.Linear(2, 2)
    tensors: dict[str, Tensor] = {"weight": torch.zeros(2, 3), "extra": torch.zeros(1)}
    with pytest.raises(UserError, match=r"missing bias; unexpected extra; weight is \(2, 3\), not \(2, 2\)"):
        load_strictly(model, tensors, Path("x"))


# What is read is what was written


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten updates with checkpoints of steps 2, 4 (the best), 6, 8 and 10."""
    folder = tmp_path_factory.mktemp("finished")
    small_run(small_config(folder, checkpoint={"keep": 9}))
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """That run as a kill left it after step 6."""
    return stop_after(finished, 6, tmp_path / "run")


def checkpoints_in(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_sha256sum_finds_a_checkpoint_as_it_was_written(finished: Path) -> None:
    folder = finished / "checkpoints" / "last"
    assert sorted(path.name for path in folder.iterdir()) == [SUMS, EMA, MODEL, OPTIMIZER, "state.json"]
    for line in (folder / SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, EMA, "state.json", SUMS])
def test_a_flipped_bit_in_the_newest_checkpoint_costs_its_updates_and_changes_nothing(
    name: str, finished: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = stopped / "checkpoints" / "step-00000006"
    flip(newest / name, (newest / name).stat().st_size // 2)
    config = small_config(stopped, checkpoint={"keep": 9})
    small_run(config)
    out = capsys.readouterr().out
    assert re.search(
        rf"^{newest}/\S+: damaged: .*; set aside as damaged-step-00000006, going on from step-00000004$", out, re.M
    )
    assert outcome(stopped) == outcome(finished)
    assert {"step-00000006", "damaged-step-00000006"} <= checkpoints_in(stopped), "written anew beside it"
    read_checkpoint(newest)


def test_a_second_damaged_checkpoint_of_a_step_gets_a_name_of_its_own(stopped: Path) -> None:
    newest = stopped / "checkpoints" / "step-00000006"
    for _ in range(2):
        shutil.copytree(newest, stopped / "whole")
        (newest / OPTIMIZER).unlink()
        checkpoint = claim_run_folder(small_config(stopped))
        assert checkpoint is not None
        assert checkpoint.state.step == 4
        assert (stopped / "checkpoints" / "last").resolve() == checkpoint.path.resolve()
        (stopped / "whole").rename(newest)
    assert {"damaged-step-00000006", "damaged-step-00000006-2"} <= checkpoints_in(stopped)


def test_where_no_checkpoint_is_intact_one_line_says_so_and_nothing_is_touched(stopped: Path) -> None:
    for step in (2, 4, 6):
        (stopped / "checkpoints" / f"step-{step:08d}" / "state.json").unlink()
    before = checkpoints_in(stopped)
    with pytest.raises(UserError, match=r"step-00000006/state.json: missing; no checkpoint in .* is intact"):
        claim_run_folder(small_config(stopped))
    assert checkpoints_in(stopped) == before


def test_a_damaged_best_is_set_aside_and_the_best_of_what_comes_takes_its_place(
    finished: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(stopped / "checkpoints" / "step-00000004" / EMA, -1)
    trainer = small_run(small_config(stopped, checkpoint={"keep": 9}))
    assert (
        "damaged-step-00000004; it was the best up to step 6, which is now looked for anew"
        in capsys.readouterr().out
    )
    assert trainer.best == Best(step=8, score=0.4)
    assert (stopped / "checkpoints" / "best").resolve().name == "step-00000008"
    assert outcome(stopped) == outcome(finished)


def test_every_process_takes_what_the_main_one_chose(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = stopped / "checkpoints" / "step-00000006"
    decided = newest.with_name("step-00000004"), None  # as the main process found the best damaged
    monkeypatch.setattr(launch, "decide_once", lambda claim: decided)
    found = launch.claim_checkpoint(small_config(stopped))
    assert found is not None
    assert (found.state.step, found.state.best) == (4, None)


def test_a_step_folder_in_the_way_of_a_checkpoint_is_set_aside_where_it_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / MODEL).write_bytes(b"a part")
    assert read_checkpoint(save(tmp_path, 5)).state.step == 5
    assert (tmp_path / "damaged-step-00000005" / MODEL).read_bytes() == b"a part"


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    # what is wrong with state.json -> it from the one that was written; hashes are those of the forged
    "no step": lambda state: {key: value for key, value in state.items() if key != "step"},
    "no seen_images": lambda state: {key: value for key, value in state.items() if key != "seen_images"},
    "no config": lambda state: {key: value for key, value in state.items() if key != "config"},
    "an unknown key": lambda state: state | {"besst": None},
    "a list": lambda state: [state],
    "a step of text": lambda state: state | {"step": "6"},
    "a step of half": lambda state: state | {"step": 6.5},
    "a negative step": lambda state: state | {"step": -1},
    "a huge step": lambda state: state | {"step": 10**9},
    "another step": lambda state: state | {"step": 4},
    "images of another run": lambda state: state | {"seen_images": 10**30},
    "a sum of NaN": lambda state: state | {"loss_sum": float("nan")},
    "no processes": lambda state: state | {"num_processes": 0},
    "a best of a list": lambda state: state | {"best": [4, 0.7]},
    "a best to come": lambda state: state | {"best": {"step": 8, "score": 0.7}},
    "bad images by name": lambda state: state | {"bad_images": {"3": "x"}},
    "a configuration of text": lambda state: state | {"config": "output: x"},
    "a scaler of text": lambda state: state | {"scaler": "x"},
    "nested deep": lambda state: state | {"config": json.loads("[" * 900 + "]" * 900)},
}
BYTES = {
    "nothing": b"",
    "no Unicode": b"\xff\xfe{}",
    "half of it": b'{"step": 6, "seen_im',
    "nested 10,000 deep": b'{"config": ' + b'{"a": ' * 10_000 + b"1" + b"}" * 10_001,
    "a number of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("old", [False, True], ids=["hashed", "0.1.0"])
@pytest.mark.parametrize("how", [*STATES, *BYTES])
def test_a_forged_state_ends_in_one_line(how: str, old: bool, stopped: Path) -> None:
    folder = stopped / "checkpoints" / "step-00000006"
    path = folder / "state.json"
    written = json.loads(path.read_bytes())
    if old:
        del written["format"]
    path.write_bytes(json.dumps(STATES[how](written)).encode() if how in STATES else BYTES[how])
    if old:
        (folder / SUMS).unlink()
    else:
        rehash(folder)
    with pytest.raises(UserError, match=r"state\.json: damaged: ") as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model": 3}, r"step-00000006: model: "),
        ({"visualize": {"num_images": 3}}, r"step-00000006: visualize: unknown key"),
    ],
)
def test_a_checkpoint_of_another_command_is_refused_as_it_is(
    config: dict[str, Any], line: str, stopped: Path
) -> None:
    folder = stopped / "checkpoints" / "step-00000006"
    state = json.loads((folder / "state.json").read_bytes())
    state["config"] |= config
    (folder / "state.json").write_text(json.dumps(state))
    rehash(folder)
    before = checkpoints_in(stopped)
    with pytest.raises(UserError, match=line):
        claim_run_folder(small_config(stopped))
    assert checkpoints_in(stopped) == before


def test_a_checkpoint_of_a_newer_fcmae_is_no_damaged_one(stopped: Path) -> None:
    folder = stopped / "checkpoints" / "step-00000006"
    state = json.loads((folder / "state.json").read_bytes())
    (folder / "state.json").write_text(json.dumps(state | {"format": 3, "more": 1}))
    rehash(folder)
    before = checkpoints_in(stopped)
    with pytest.raises(UserError, match="a newer one: update"):
        claim_run_folder(small_config(stopped))
    assert checkpoints_in(stopped) == before


@pytest.mark.parametrize(("step", "plan"), [(10**9, 10), (6, 5)], ids=["forged", "a shorter plan"])
def test_a_step_beyond_the_plan_is_an_error_and_no_finished_run(step: int, plan: int, stopped: Path) -> None:
    folder = stopped / "checkpoints" / "step-00000006"
    state = json.loads((folder / "state.json").read_bytes())
    (folder / "state.json").write_text(json.dumps(state | {"step": step, "seen_images": 2 * step}))
    rehash(folder)
    folder.rename(folder.with_name(f"step-{step:08d}"))
    with pytest.raises(UserError, match=f"is at step {step}, but the configuration ends after {plan}"):
        small_run(small_config(stopped, train={"max_steps": plan}))


def test_a_missing_ema_is_damage_and_not_the_raw_weights(stopped: Path) -> None:
    folder = stopped / "checkpoints" / "step-00000006"
    (folder / EMA).unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors: missing"):
        read_checkpoint(folder)
    rehash(folder)
    with pytest.raises(UserError, match=r"ema\.safetensors: missing"):
        read_checkpoint(folder)
    with pytest.raises(UserError, match=r"ema\.safetensors: missing; .*step-00000004 is intact"):
        model_of(folder)


def model_of(folder: Path) -> dict[str, Tensor]:
    found = stored_model(folder)
    assert found is not None
    return found.read()


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, EMA])
@pytest.mark.parametrize("forge", ["dtype", "shape", "name", "infinity"])
def test_forged_tensors_end_in_one_line(name: str, forge: str, stopped: Path) -> None:
    folder = stopped / "checkpoints" / "step-00000006"
    tensors = load_file(folder / name)
    key = next(key for key, value in tensors.items() if value.ndim == 2)
    value = tensors.pop(key)
    made = {
        "dtype": {key: value.view(torch.int32)},
        "shape": {key: value.reshape(3, 2)},
        "name": {f"{key}x": value},
        "infinity": {key: torch.full_like(value, torch.inf)},
    }[forge]
    save_file(tensors | made, folder / name)
    rehash(folder)
    wanted = (
        "is not finite"
        if forge == "infinity"
        else "differ|are not those of this optimizer|not a dense one of floats"
    )
    with pytest.raises(UserError, match=wanted) as caught:
        small_run(small_config(stopped), read_checkpoint(folder))
    assert "\n" not in str(caught.value)
    assert str(folder / name) in str(caught.value)


def test_the_records_may_be_damaged_too(finished: Path, stopped: Path) -> None:
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], b"\xff[]\n", b'[1]\n{"step": "x"}\n', lines[-1][:9]]))
    small_run(small_config(stopped, checkpoint={"keep": 9}))
    assert outcome(stopped) == outcome(finished)


# What is written


def test_what_is_not_finite_gets_no_checkpoint_and_the_last_good_one_is_named(
    finished: Path, stopped: Path
) -> None:
    config = small_config(stopped)
    trainer = small_trainer(config)
    checkpoint = claim_run_folder(config)
    assert checkpoint is not None
    trainer.restore(checkpoint)
    trainer.optimizer.state[trainer.bare_model.bias]["exp_avg_sq"][1] = torch.inf  # the loss stays finite
    with pytest.raises(
        UserError, match=r"state\.bias\.exp_avg_sq of optimizer\.safetensors is not finite"
    ) as caught:
        trainer.fit(batches(trainer))
    assert f"last good checkpoint: {stopped / 'checkpoints' / 'step-00000006'}" in str(caught.value)
    assert "step-00000008" not in checkpoints_in(stopped)
    small_run(small_config(stopped, checkpoint={"keep": 9}))
    assert outcome(stopped) == outcome(finished)


def test_the_message_of_a_loss_that_is_not_finite_names_a_checkpoint_that_is_intact(stopped: Path) -> None:
    config = small_config(stopped)
    trainer = small_trainer(config)
    checkpoint = claim_run_folder(config)
    assert checkpoint is not None
    trainer.restore(checkpoint)
    trainer.compute_loss = lambda model, batch: model(batch.values).mean() * torch.inf
    flip(checkpoint.path / MODEL, -1)
    with pytest.raises(UserError, match=r"last good checkpoint: .*step-00000004;"):
        trainer.fit(batches(trainer))


class Slow:
    """In place of `save_checkpoint`: waits until it may go on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go, self.error = threading.Event(), error

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        assert self.go.wait(250)
        if self.error is not None:
            raise self.error
        return save_checkpoint(*args, **kwargs)


def test_updates_go_on_while_a_checkpoint_is_written_which_is_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    tensor, writer = torch.zeros(3), checkpoint.CheckpointWriter(tmp_path)
    writer.save(state_of(1), {MODEL: {"weight": tensor}, OPTIMIZER: {}}, keep=2)
    tensor += 1
    writer.poll()
    assert not list(tmp_path.glob("step-*"))
    slow.go.set()
    writer.save(state_of(2), {MODEL: {"weight": tensor}, OPTIMIZER: {}}, keep=2)
    copy = writer._copies[MODEL]["weight"]
    writer.wait()
    assert [read_checkpoint(path).model["weight"].tolist() for path in step_folders(tmp_path)] == [[0] * 3, [1] * 3]
    writer.save(state_of(3), {MODEL: {"weight": tensor}, OPTIMIZER: {}}, keep=2)
    assert writer._copies[MODEL]["weight"] is copy, "memory is reused"
    writer.wait()


def test_an_error_of_the_writing_thread_ends_the_run_at_the_next_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Slow(UserError("the disk is full"))
    full.go.set()
    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    with pytest.raises(UserError, match="the disk is full"):
        small_run(small_config(tmp_path / "run"))
    assert len(records(tmp_path / "run")) < 10
    with pytest.raises(UserError, match="the disk is full"):  # no update comes after the last
        small_run(small_config(tmp_path / "short", train={"max_steps": 2}))


def test_what_was_recorded_is_on_disk_before_the_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def note(name: str) -> None:
        call = getattr(checkpoint, name)

        def noted(path: Path, *rest: Any) -> Any:
            calls.append(f"{name} {path.name}")
            return call(path, *rest)

        monkeypatch.setattr(checkpoint, name, noted)

    for name in ("fsync", "atomic_folder", "point_link"):
        note(name)
    small_run(small_config(tmp_path, train={"max_steps": 2}))
    assert calls == ["fsync metrics.jsonl", "atomic_folder step-00000002", "point_link last", "point_link best"]


def test_checkpoints_of_every_so_many_epochs_stay_with_another_batch_size_too(tmp_path: Path) -> None:
    config = {"checkpoint": {"every_steps": 100, "keep": 1, "keep_every_epochs": 0.75}}  # of 8 images: 6
    small_run(small_config(tmp_path, train={"max_steps": 6}, **config))  # of 2 images
    assert checkpoints_in(tmp_path) == {f"step-0000000{n}" for n in (3, 4, 6)} | {"last", "best"}  # 4 is the best
    trainer = small_run(small_config(tmp_path, data={"batch_size": 4}, train={"max_steps": 12}, **config))
    # images 12, then 16, 20, 24, 28, 32, 36: past 18, 24, 30 and 36 after steps 8, 9, 11 and 12
    assert trainer.kept == [3, 6, 8, 9, 11, 12]
    assert {f"step-{n:08d}" for n in trainer.kept} <= checkpoints_in(tmp_path)


def test_the_disk_must_hold_what_is_kept_for_good_but_not_again_what_is_there(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Linear(1000, 1000)
    each = checkpoint_bytes(network)
    monkeypatch.setattr(run_folder, "free_bytes", lambda path: 5.5 * each)
    fits, full = (small_config(stopped, checkpoint={"keep": 3, "keep_every_epochs": n}) for n in (0.6, 0.5))
    plan = Plan.of(fits, 8, 1)  # of 2.5 epochs
    require_disk(fits, network, plan)  # 3, and 4, and one being written, of which 3 are there
    with pytest.raises(UserError, match=r"9 checkpoints take .*keep, raise checkpoint.keep_every_epochs"):
        require_disk(full, network, plan)
