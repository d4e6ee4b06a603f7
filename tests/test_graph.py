"""Recorded updates are the eager ones, by a recorder that behaves as a GPU's but computes again on the CPU."""

import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import Numbers, batches, outcome, small_config, small_trainer, stop_after
from torch import Tensor, nn

from fcmae.errors import UserError
from fcmae.training import exchange
from fcmae.training import trainer as trainer_module
from fcmae.training.checkpoint import OPTIMIZER, optimizer_tensors
from fcmae.training.dry_run import rehearse
from fcmae.training.graph import BLOCKING, WARM_UP, CudaGraphs, watch_draws, why_eager
from fcmae.training.launch import claim_checkpoint
from fcmae.training.log import MetricsLog
from fcmae.training.trainer import Trainer


class Again:
    """Recording changes no number, and leaves NaN in what it made; a replay finds and leaves gradients where the
    recording did, and the Python side of them as it is."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.parameters = list(trainer.bare_model.parameters())
        self.replays: list[int] = []
        """Replays of each recording."""
        self.asides = self.updates = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.asides += 1
        yield

    @contextmanager
    def watch(self, reasons: list[str]) -> Iterator[None]:
        yield

    def keep_pace(self) -> None:
        self.updates += 1

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.parameters]

    def _lend(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        before = self._gradients()
        moments = [value for state in self.trainer.optimizer.state.values() for value in state.values()]
        tensors = [*self.trainer.bare_model.state_dict().values(), *moments, *filter(torch.is_tensor, before)]
        kept, generator = [tensor.clone() for tensor in tensors], torch.get_rng_state()
        output = function()
        torch.set_rng_state(generator)
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        after = self._gradients()
        for new in (output, *after):
            if new is not None and not any(new is old for old in before):
                new.fill_(torch.nan)
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> Any:
            self.replays[number] += 1
            present = self._gradients()
            self._lend(before)
            result = function()
            for own, gradient in zip(after, self._gradients(), strict=True):
                if own is not None and gradient is not None and own is not gradient:
                    own.copy_(gradient)
            self._lend(present)
            return output if output is None else output.copy_(result)

        return replay


MICRO_BATCHES = 3
SETTINGS: dict[str, Any] = {"optim": {"accumulate": MICRO_BATCHES, "clip_grad": 0.5}}


def trainer_of(
    folder: Path, *, recorded: bool, seed: int = 0, norm: nn.Module | None = None, **settings: Any
) -> tuple[Trainer, Again]:
    """A trainer of a network with drop-out and a frozen parameter, of numbers of any dtype."""
    torch.manual_seed(seed)
    layers = nn.Linear(3, 4), nn.GELU(), nn.Dropout(0.3), nn.Linear(4, 2)
    network = nn.Sequential(*(layers if norm is None else (norm, *layers)))
    network.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    trainer = small_trainer(small_config(folder, **(SETTINGS | settings)), network)
    trainer.compute_loss = lambda model, batch: model(batch.values.float()).square().mean()
    graphs = Again(trainer)
    if recorded:
        trainer.record_steps(graphs)
    return trainer, graphs


def state(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.ema is not None
    return {
        **{f"model.{name}": value for name, value in trainer.bare_model.state_dict().items()},
        **{f"ema.{name}": value for name, value in trainer.ema.module.state_dict().items()},
        **optimizer_tensors(trainer.bare_model, trainer.optimizer.optimizer),
    }


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same tensors, but for learning rates, of which a recording finds the nearest of float32."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def updated(trainer: Trainer, given: Iterator[Numbers], updates: int) -> list[tuple[float, float]]:
    """Make updates; returns the mean loss of each, and the norm of its gradient."""
    losses = []
    for _ in range(updates):
        trainer.update(given)
        losses.append((trainer.check(write=False), trainer.window.grad_norm_sum.item()))
        trainer.window = type(trainer.window).new(torch.device("cpu"))
    return losses


@pytest.mark.parametrize("accumulate", [1, MICRO_BATCHES])
def test_recorded_updates_are_the_eager_ones(tmp_path: Path, accumulate: int) -> None:
    settings: dict[str, Any] = {"optim": {"accumulate": accumulate, "clip_grad": 0.5}}
    (eager, _), (recorded, graphs) = (trainer_of(tmp_path, recorded=r, **settings) for r in (False, True))
    losses = [updated(trainer, batches(trainer), 10) for trainer in (eager, recorded)]
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-5)
    assert len({round(loss, 6) for loss, _ in losses[0]}) == len({round(norm, 6) for _, norm in losses[0]}) == 10
    assert_alike(state(eager), state(recorded))
    assert recorded.step == 10
    assert graphs.asides == WARM_UP * (accumulate + 1)
    made = 10 - WARM_UP
    assert graphs.updates == made
    assert graphs.replays == ([made, made * (accumulate - 1), made] if accumulate > 1 else [made, made])


@pytest.mark.parametrize(
    "others",
    [
        {0},  # the first batch of all, so that all others are eager
        {1, 3},  # while warming up
        {3 * WARM_UP},  # the update that would be the first to be recorded
        {3 * WARM_UP + 1},  # in it
        {3 * WARM_UP + 2, 3 * WARM_UP + 7},  # the last of it, in one after it
        {3 * WARM_UP + 3, 3 * WARM_UP + 6, 3 * WARM_UP + 7, 3 * WARM_UP + 8},  # whole updates, and their beginnings
    ],
)
def test_batches_of_other_shapes_and_dtypes_are_computed_eagerly(tmp_path: Path, others: set[int]) -> None:
    def changed(number: int, values: Tensor) -> Tensor:
        if number not in others:
            return values
        return values.double() if number % 2 else torch.cat([values, values + 1])

    def given(trainer: Trainer) -> Iterator[Numbers]:
        for number, batch in enumerate(batches(trainer)):
            yield batch._replace(values=changed(number, batch.values))

    (eager, _), (recorded, graphs) = (trainer_of(tmp_path, recorded=r) for r in (False, True))
    losses = [updated(trainer, given(trainer), 10) for trainer in (eager, recorded)]
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-5)
    assert_alike(state(eager), state(recorded))
    begun = sum(number >= 3 * WARM_UP and number % 3 == 0 for number in others)
    assert graphs.updates == (0 if 0 in others else 10 - WARM_UP - begun)


def run(trainer: Trainer) -> Trainer:
    """Train to the end, evaluating in between as stories do."""

    def evaluate(step: int, log: MetricsLog | None) -> float:
        trainer.bare_model.eval()
        with torch.inference_mode():
            score = float(trainer.bare_model(torch.ones(1, 3)).sum())
        trainer.bare_model.train()
        return score

    checkpoint = claim_checkpoint(trainer.config)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    trainer.fit(batches(trainer), evaluate=evaluate, evaluate_every=2)
    return trainer


def test_a_resumed_run_of_recorded_steps_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    """Though the first updates after the resumption are eager."""
    run(trainer_of(tmp_path / "whole", recorded=True)[0])
    stopped = stop_after(tmp_path / "whole", 6, tmp_path / "stopped")
    trainer, graphs = trainer_of(stopped, recorded=True)
    run(trainer)
    assert trainer.step == 10
    assert graphs.updates == 4 - WARM_UP
    assert outcome(tmp_path / "whole") == outcome(stopped)


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_recorded_or_not_from_the_checkpoint_of_the_other(tmp_path: Path, first: bool) -> None:
    whole = run(trainer_of(tmp_path / "whole", recorded=first)[0])
    stopped = stop_after(tmp_path / "whole", 4, tmp_path / "stopped")
    other = run(trainer_of(stopped, recorded=not first)[0])
    assert_alike(state(whole), state(other))
    files = [load_file(folder / "checkpoints" / "last" / OPTIMIZER) for folder in (tmp_path / "whole", stopped)]
    assert {name: (value.dtype, value.shape) for name, value in files[0].items()} == {
        name: (value.dtype, value.shape) for name, value in files[1].items()
    }
    assert {name.split(".")[0] for name in files[0]} == {"state"}, "no learning rates"


def train_as_one_of_many(folder: Path) -> None:
    """What each process of the next test does: the same updates, as DDP makes them and recorded."""
    rank = int(os.environ["RANK"])
    exchange.TOGETHER = 10  # so that there are several messages

    def given(trainer: Trainer) -> Iterator[Numbers]:
        for batch in batches(trainer):
            yield batch._replace(values=batch.values.roll(rank, 1))

    for name in ("eager", "recorded"):
        trainer, graphs = trainer_of(folder, recorded=False, seed=rank, norm=nn.BatchNorm1d(3))
        if name == "recorded":
            assert trainer.model is trainer.bare_model
            trainer.record_steps(graphs)
        else:
            assert isinstance(trainer.model, nn.parallel.DistributedDataParallel)
            trainer_module.why_eager = lambda *args, **kwargs: ""
            trainer_module.CudaGraphs = lambda device: None
        updated(trainer, given(trainer), WARM_UP + 3)
        torch.save(state(trainer), folder / f"{name}-{rank}.pt")
    assert graphs.replays == [3, 3 * (MICRO_BATCHES - 1), 3]


def test_recorded_updates_of_several_processes_are_those_of_ddp(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """Weights from the first process, gradients averaged before they are clipped, buffers of the first."""
    program = f"import test_graph, pathlib; test_graph.train_as_one_of_many(pathlib.Path({str(tmp_path)!r}))"
    environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    ranks = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    running = [subprocess.Popen([sys.executable, "-c", program], env=own) for own in ranks]
    assert [process.wait(timeout=200) for process in running] == [0, 0]
    eager, recorded, other = (
        torch.load(tmp_path / f"{name}.pt") for name in ("eager-0", "recorded-0", "recorded-1")
    )
    assert_alike(eager, recorded)
    for name, value in recorded.items():
        if not name.startswith("ema"):
            torch.testing.assert_close(value, other[name])


class Suspicious(Again):
    def watch(self, reasons: list[str]) -> AbstractContextManager[None]:
        return watch_draws(reasons)


def test_a_step_that_cannot_be_recorded_stays_eager_and_a_line_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (eager, _), (recorded, _) = (trainer_of(tmp_path, recorded=r) for r in (False, False))
    graphs = Suspicious(recorded)
    recorded.record_steps(graphs)  # whose drop-out draws on the CPU
    losses = [updated(trainer, batches(trainer), 6) for trainer in (eager, recorded)]
    assert np.array(losses[0]) == pytest.approx(np.array(losses[1]), rel=1e-5)
    assert_alike(state(eager), state(recorded))
    assert graphs.replays == []
    assert capsys.readouterr().out.count("no CUDA graphs: random numbers are drawn on the CPU in each step") == 1


def test_draws_from_each_generator_of_the_cpu_are_noticed_and_nothing_else() -> None:
    def noticed(call: Callable[[], object]) -> bool:
        reasons: list[str] = []
        with watch_draws(reasons):
            call()
        return bool(reasons)

    assert all(noticed(draw) for draw in (lambda: torch.rand(()), np.random.rand, random.random))
    assert not noticed(lambda: torch.rand(1, generator=torch.Generator()))


@pytest.fixture
def cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> CudaGraphs:
    """Of a GPU that need not be there."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return CudaGraphs(torch.device("cuda"))


def test_waits_for_the_gpu_are_noticed_with_their_places(
    cuda_graphs: CudaGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int | str] = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    reasons: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which would hide one
        with cuda_graphs.watch(reasons):
            warnings.warn("a prototype feature", stacklevel=1)
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
    assert [reason.rpartition(":")[0] for reason in reasons] == [__file__]
    assert reasons[0].endswith(" waits for the GPU")
    assert modes == [0, "warn", 0]


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (None, "as a CUDA graph (it was invalidated); start the same command with CUDA_LAUNCH_BLOCKING=1"),
        (RuntimeError("not permitted\nhere"), "as a CUDA graph (not permitted here); start the same command"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
    ],
)
def test_what_cannot_be_recorded_is_an_error_that_names_the_cause(
    cuda_graphs: CudaGraphs, monkeypatch: pytest.MonkeyPatch, cause: Exception | None, expected: str
) -> None:
    @contextmanager
    def graph(*args: object, **kwargs: object) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("it was invalidated")

    def function() -> None:
        if cause is not None:
            raise cause

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    kind = torch.OutOfMemoryError if "memory" in expected else UserError
    with pytest.raises(kind, match=re.escape(expected)):
        cuda_graphs.record(function)


@pytest.mark.parametrize("accumulate", [1, MICRO_BATCHES])
def test_a_dry_run_times_replays_and_neither_warm_up_nor_recording(
    tmp_path: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("fcmae.training.dry_run.time.perf_counter", lambda: now[0])

    class Clocked(Again):
        def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
            replay = super().record(function)
            now[0] += 1000

            def timed() -> Any:
                now[0] += 1
                return replay()

            return timed

    def load(num_workers: int) -> Iterator[Numbers]:
        for batch in batches(trainer):
            now[0] += 0.25
            yield batch

    trainer, _ = trainer_of(tmp_path, recorded=False, optim={"accumulate": accumulate})
    trainer.record_steps(Clocked(trainer))
    text = rehearse(trainer, load, queue=1)
    assert f"step alone     {accumulate + 1}.00 s an update" in text
    assert "data alone     8 images/s" in text


def test_what_cannot_be_recorded_is_eager_for_a_reason_that_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    fine: dict[str, Any] = {"processes": 1, "sharded": False, "scales_loss": False, "gradient_checkpointing": False}
    gpu = torch.device("cuda")
    monkeypatch.delenv(BLOCKING, raising=False)
    assert why_eager(gpu, **fine) == ""
    assert "NVIDIA" in why_eager(torch.device("cpu"), **fine)
    assert "NVIDIA" in why_eager(torch.device("mps"), **fine)
    assert "part of the weights" in why_eager(gpu, **fine | {"sharded": True})
    assert "fp16" in why_eager(gpu, **fine | {"scales_loss": True})
    assert "gradient_checkpointing" in why_eager(gpu, **fine | {"gradient_checkpointing": True})
    monkeypatch.setenv(BLOCKING, "1")
    assert BLOCKING in why_eager(gpu, **fine)


@pytest.mark.parametrize(
    ("processes", "here", "gpus", "reached", "fast"),
    [
        (4, "4", 4, True, True),
        (4, "4", 8, True, True),
        (4, "4", 4, False, False),  # by PCIe
        (4, "2", 4, True, False),  # of two machines
        (4, None, 4, True, False),  # of which the launcher says nothing
        (4, "4", 1, True, False),  # each of which sees its own GPU alone
    ],
)
def test_steps_of_processes_are_recorded_where_gradients_travel_fast(
    processes: int, here: str | None, gpus: int, reached: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: reached or (one, other) != (3, 1))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv(BLOCKING, raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    found = why_eager(
        torch.device("cuda"), processes=processes, sharded=False, scales_loss=False, gradient_checkpointing=False
    )
    assert found == ("" if fast else "gradients travel between machines, or by PCIe, while others are computed")


def test_a_run_says_at_its_beginning_what_it_computes_on_and_whether_steps_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(trainer_of(tmp_path / "run", recorded=False, train={"max_steps": 1})[0])
    threads = torch.get_num_threads()
    threads = f"{threads} thread{'s' * (threads > 1)}"
    line = f"device           cpu, {threads}, not compiled, no CUDA graphs (these need an NVIDIA GPU)\n"
    assert line in capsys.readouterr().out
