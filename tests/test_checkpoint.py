"""Checkpoints: complete or absent, exact, and plain about what does not fit."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import state_of
from torch import Tensor, nn

import fcmae.training.checkpoint as checkpoint
from fcmae import FCMAE
from fcmae.errors import UserError
from fcmae.tensors import load_strictly, read_safetensors
from fcmae.training.checkpoint import (
    EMA,
    MODEL,
    OPTIMIZER,
    Best,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from fcmae.training.optim import build_adamw
from fcmae.training.run_folder import RunFolder

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
