"""FSDP2: parameters divided among processes train as whole ones do, and are saved as one process would."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from processes import FSDP, Processes
from safetensors.torch import load_file
from test_exchange import DIVIDED, UPDATES, fcmae, images_of, pretraining_loss, updated
from torch import nn
from torch.distributed.tensor import DTensor

from fcmae.model import FCMAE
from fcmae.training.checkpoint import EMA, MODEL, OPTIMIZER, read_checkpoint
from fcmae.training.launch import start_accelerator
from fcmae.training.trainer import Trainer

FILES = MODEL, OPTIMIZER, EMA


def saved(trainer: Trainer) -> Path:
    """Save a checkpoint; returns where it is."""
    trainer.run.metrics.parent.mkdir(exist_ok=True)
    trainer.run.metrics.touch()
    trainer.save()
    trainer.writer.wait()
    return trainer.run.checkpoints / "last"


def encoded(network: nn.Module) -> torch.Tensor:
    assert isinstance(network, FCMAE)
    return network.encoder(images_of(torch.arange(4)))


def train_divided(folder: Path, whole: Path) -> None:
    """In each of two processes: train with divided parameters, save, and take up what one process saved."""
    os.environ |= FSDP
    trainer = updated(start_accelerator("no"), folder / "two", fcmae(), pretraining_loss, **DIVIDED)
    local = [
        parameter.to_local() for parameter in trainer.bare_model.parameters() if isinstance(parameter, DTensor)
    ]
    assert len(local) == len(list(fcmae().parameters()))
    assert sum(map(torch.numel, local)) < 0.6 * sum(map(torch.numel, fcmae().parameters()))
    with trainer.whole():
        assert trainer.ema is not None
        if os.environ["RANK"] == "1":  # alone, as the process that draws is
            with torch.no_grad():
                shown = [encoded(network) for network in (trainer.bare_model, trainer.ema.module)]
            torch.save((shown, trainer.window.grad_norm_sum.item()), folder / "shown.pt")
    saved(trainer)
    trainer.restore(read_checkpoint(whole))
    trainer.run = type(trainer.run)(folder / "again")
    trainer.writer.folder = trainer.run.checkpoints
    saved(trainer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A folder with a run of two processes, and what these made of one of a single process, which is returned."""
    folder = tmp_path_factory.mktemp("sharding")
    whole: dict[str, Any] = {"data": {"batch_size": 8}, "optim": DIVIDED["optim"] | {"accumulate": 1}}
    one = updated(Accelerator(cpu=True), folder / "one", fcmae(), pretraining_loss, **whole)
    path = saved(one)
    processes = Processes(partial(train_divided, folder, path), ["test"], folder, number=2)
    assert processes.wait() == [0, 0], processes.written("errors")
    return folder, one


def tensors(run: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / file)


@pytest.mark.parametrize("file", FILES)
def test_divided_parameters_train_as_whole_ones_and_are_saved_as_these_are(
    file: str, runs: tuple[Path, Trainer]
) -> None:
    folder, _ = runs
    torch.testing.assert_close(tensors(folder / "two", file), tensors(folder / "one", file), rtol=1e-9, atol=1e-11)
    assert read_checkpoint(folder / "two" / "checkpoints" / "last").state.num_processes == 2


@pytest.mark.parametrize("file", FILES)
def test_what_one_process_saved_two_take_up_and_save_again_to_the_bit(
    file: str, runs: tuple[Path, Trainer]
) -> None:
    folder, _ = runs
    assert tensors(folder / "again", file).keys() == tensors(folder / "one", file).keys()
    torch.testing.assert_close(tensors(folder / "again", file), tensors(folder / "one", file), rtol=0, atol=0)


def test_one_process_takes_up_what_two_saved(runs: tuple[Path, Trainer]) -> None:
    folder, one = runs
    before = {name: value.clone() for name, value in one.bare_model.state_dict().items()}
    one.restore(read_checkpoint(folder / "two" / "checkpoints" / "last"))
    assert one.step == UPDATES
    torch.testing.assert_close(dict(one.bare_model.state_dict()), before, rtol=1e-9, atol=1e-11)


def test_divided_networks_are_evaluated_whole_by_one_process_alone(runs: tuple[Path, Trainer]) -> None:
    folder, one = runs
    assert one.ema is not None
    shown, norms = torch.load(folder / "shown.pt")
    for found, network in zip(shown, (one.bare_model, one.ema.module), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(found, encoded(network), rtol=1e-8, atol=1e-9)
    assert norms == pytest.approx(one.window.grad_norm_sum.item(), rel=1e-9)
