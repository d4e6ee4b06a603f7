"""FSDP2: parameters divided among processes train as whole ones do, and are saved as one process would."""

import errno
import itertools
import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from processes import FSDP, Processes
from safetensors.torch import load_file
from small_runs import Numbers
from test_exchange import (
    DIVIDED,
    UPDATES,
    classification_loss,
    classifier,
    fcmae,
    images_of,
    pretraining_loss,
    updated,
)
from torch import nn
from torch.distributed.tensor import DTensor

from fcmae.errors import UserError
from fcmae.model import FCMAE
from fcmae.training import together
from fcmae.training.checkpoint import EMA, MODEL, OPTIMIZER, read_checkpoint
from fcmae.training.launch import start_accelerator
from fcmae.training.run_folder import RunFolder
from fcmae.training.sharding import Rows
from fcmae.training.trainer import Trainer

UNITS = 6
"""Of `fcmae()`: five blocks, and what is outside of them."""
FILES = MODEL, OPTIMIZER, EMA


def saved(trainer: Trainer, run: Path, *, meanwhile: Callable[[], object] = lambda: None) -> Path:
    """Save a checkpoint into another run folder, and do something before it is written; returns where it is."""
    trainer.run = RunFolder(run)
    trainer.writer.folder = trainer.run.checkpoints
    run.mkdir(exist_ok=True)
    trainer.run.metrics.touch()
    trainer.save()
    meanwhile()
    trainer.writer.wait()
    return trainer.run.checkpoints / "last"


def probe() -> nn.Module:
    """A network of which the classifier alone is trained."""
    network = classifier()
    network.freeze()
    return network


def encoded(network: nn.Module) -> torch.Tensor:
    assert isinstance(network, FCMAE)
    return network.encoder(images_of(torch.arange(4)))


def train_divided(folder: Path, whole: Path) -> None:
    """In each of two processes: train with divided parameters, save, and take up what one process saved."""
    os.environ |= FSDP
    sent: list[str] = []
    scatter = torch.distributed.reduce_scatter_single

    def noted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(str(output.dtype))
        return scatter(output, *args, **kwargs)

    torch.distributed.reduce_scatter_single = noted
    in_bf16: dict[str, Any] = DIVIDED | {"train": {"bf16_exchange": True}}
    network = fcmae()
    network.encoder.gradient_checkpointing = True
    norms = updated(start_accelerator("no"), folder, network, pretraining_loss, **in_bf16).window.grad_norm_sum
    (folder / "sent.json").write_text(json.dumps([sent.copy(), norms.item()]))
    saved(
        updated(start_accelerator("no"), folder, probe(), classification_loss, **DIVIDED), folder / "probe of two"
    )
    sent.clear()
    trainer = updated(start_accelerator("no"), folder / "two", fcmae(), pretraining_loss, **DIVIDED)
    assert sent == ["torch.float64"] * UNITS * UPDATES, "whatever is accumulated"
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
    released = threading.Event()
    write_rows = together.write_rows

    def write_later(*args: Any) -> None:
        assert released.wait(60)
        write_rows(*args)

    def go_on() -> None:
        trainer.update(itertools.repeat(Numbers((0, 1), torch.arange(2))))
        released.set()

    together.write_rows = write_later
    saved(trainer, folder / "two", meanwhile=go_on)
    together.write_rows = write_rows
    trainer.restore(read_checkpoint(whole))
    saved(trainer, folder / "again")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    second = os.environ["RANK"] == "1"
    together.write_rows = fail if second else write_rows
    said = [said_by(trainer, folder / "full")]
    together.write_rows = write_rows
    weight = next(trainer.bare_model.parameters())
    assert isinstance(weight, DTensor)
    if second:
        weight.to_local().detach().fill_(torch.nan)
    said += [said_by(trainer, folder / "not-finite")]
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(said))
    trainer.restore(read_checkpoint(whole))
    saved(trainer, folder / "after")


def said_by(trainer: Trainer, run: Path) -> str:
    """Return what ends a save that cannot be."""
    with pytest.raises(UserError) as caught:
        saved(trainer, run)
    return str(caught.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A folder with a run of two processes, and what these made of one of a single process, which is returned."""
    folder = tmp_path_factory.mktemp("sharding")
    whole: dict[str, Any] = {"data": {"batch_size": 8}, "optim": DIVIDED["optim"] | {"accumulate": 1}}
    one = updated(Accelerator(cpu=True), folder / "one", fcmae(), pretraining_loss, **whole)
    path = saved(one, folder / "one")
    saved(updated(Accelerator(cpu=True), folder, probe(), classification_loss, **whole), folder / "probe")
    processes = Processes(partial(train_divided, folder, path), ["test"], folder, number=2)
    assert processes.wait() == [0, 0], processes.written("errors")
    return folder, one


def tensors(run: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / file)


@pytest.mark.parametrize("file", FILES)
def test_divided_parameters_train_as_whole_ones_and_are_saved_as_these_are(
    file: str, runs: tuple[Path, Trainer]
) -> None:
    """Though training went on before a byte of the checkpoint was written."""
    folder, _ = runs
    torch.testing.assert_close(tensors(folder / "two", file), tensors(folder / "one", file), rtol=1e-9, atol=1e-11)
    assert read_checkpoint(folder / "two" / "checkpoints" / "last").state.num_processes == 2


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("run", ["again", "after"])
def test_what_one_process_saved_two_take_up_and_save_again_to_the_bit(
    run: str, file: str, runs: tuple[Path, Trainer]
) -> None:
    folder, _ = runs
    assert tensors(folder / run, file).keys() == tensors(folder / "one", file).keys()
    torch.testing.assert_close(tensors(folder / run, file), tensors(folder / "one", file), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ("full", "step-00000003: not written, the disk is full; earlier checkpoints are intact: "),
        (
            "not-finite",
            "step-00000003: not written, as encoder.downsample_layers.0.0.weight of model.safe",
        ),
    ],
)
def test_what_one_process_cannot_save_no_process_saves_and_all_say_so(
    run: str, line: str, runs: tuple[Path, Trainer]
) -> None:
    folder, _ = runs
    first, second = (json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert line in first[["full", "not-finite"].index(run)]
    assert not list((folder / run).glob("checkpoints/*")), "nothing is left"


def test_a_network_of_which_a_part_is_trained_is_divided_too(runs: tuple[Path, Trainer]) -> None:
    folder, _ = runs
    for file in FILES:
        one, two = tensors(folder / "probe", file), tensors(folder / "probe of two", file)
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)


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


def test_gradients_of_each_unit_are_sent_once_an_update_as_bf16_by_choice(runs: tuple[Path, Trainer]) -> None:
    folder, one = runs
    """With blocks that are computed twice, too."""
    sent, norms = json.loads((folder / "sent.json").read_text())
    assert sent == ["torch.bfloat16"] * UNITS * UPDATES
    assert norms != one.window.grad_norm_sum.item()
    assert norms == pytest.approx(one.window.grad_norm_sum.item(), rel=2**-8)


class Between(dict[str, Rows]):
    """Rows of which one is written before what another process does, and one after."""

    def __init__(self, rows: dict[str, Rows], meanwhile: Callable[[], None]) -> None:
        super().__init__(rows)
        self.meanwhile = meanwhile

    def items(self) -> Any:
        first, second = super().items()
        yield first
        self.meanwhile()
        yield second


def test_rows_that_another_process_writes_between_ones_own_stay(tmp_path: Path) -> None:
    whole = {"a": torch.arange(4.0).reshape(2, 2), "b": torch.arange(4.0, 8.0).reshape(2, 2)}
    first, second = ({name: Rows(t[i : i + 1], i, (2, 2)) for name, t in whole.items()} for i in range(2))
    path = tmp_path / "model.safetensors"
    together.lay_out(path, first)
    together.write_rows(path, Between(first, lambda: together.write_rows(path, second)))
    torch.testing.assert_close(load_file(path), whole, rtol=0, atol=0)
