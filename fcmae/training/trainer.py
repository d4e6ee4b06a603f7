"""The training loop: updates, evaluation, checkpoints; knows neither the model nor the images."""

import dataclasses
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from fcmae import __version__
from fcmae.config import RunConfig, parse_config, to_yaml
from fcmae.errors import UserError
from fcmae.files import make_folder, remove_leftovers, write_json, write_text
from fcmae.seeding import reseed
from fcmae.tensors import kind, load_strictly
from fcmae.training.checkpoint import (
    CALMER,
    EMA,
    MODEL,
    OPTIMIZER,
    Best,
    Checkpoint,
    CheckpointWriter,
    State,
    newest_intact,
    optimizer_tensors,
    restore_optimizer,
)
from fcmae.training.exchange import average, share
from fcmae.training.graph import CudaGraphs, Eager, Graphs, Recorded, Work, why_eager
from fcmae.training.launch import asked_sharding, command_line, describe_device, describe_precision
from fcmae.training.lock import Lock
from fcmae.training.log import Charts, MetricsLog, record_start
from fcmae.training.memory import taken_bytes
from fcmae.training.progress import Progress
from fcmae.training.run_folder import RunFolder, changed_keys
from fcmae.training.schedule import Plan, is_due
from fcmae.training.sharding import divided, norm_of_all
from fcmae.training.stop import Stopped, StopRequests, describe
from fcmae.training.together import Together
from fcmae.training.watch import Watch

Unreadable = tuple[int, str, str]
"""A sample that could not be read: its index, what it is called, why."""


class TrainBatch(Protocol):
    """What the loop asks of a batch."""

    @property
    def indices(self) -> tuple[int, ...]: ...

    @property
    def bad(self) -> Sequence[Unreadable]: ...

    def to(self, device: torch.device) -> Self: ...

    def tensors(self) -> list[Tensor]: ...

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return such a batch of other tensors."""
        ...


class Show(NamedTuple):
    """What a run shows of itself at regular intervals."""

    what: str
    """What it is called where the run says what it is doing, such as "pictures"."""
    every: int
    """Updates between two, see `is_due`."""
    call: Callable[[int, MetricsLog], None]
    """Takes (step, log)."""
    place: Path | None = None
    """Where it can be looked at."""


@dataclasses.dataclass
class Window:
    """What has gathered since the last record, kept on the device so that no step waits for it."""

    loss_sum: Tensor
    """Scalar, of this process; float64 where the device has it."""
    first_bad_step: Tensor
    """int64 scalar: the first step with a non-finite loss, -1 for none."""
    grad_norm_sum: Tensor
    """Scalar like `loss_sum`, of updates whose gradient is finite: those of others are left out in fp16."""
    num_grad_norms: Tensor
    """int64 scalar."""
    num_losses: int = 0
    images: int = 0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    indices: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """Sample indices by step, for naming those of a non-finite loss."""

    @classmethod
    def new(cls, device: torch.device) -> Self:
        zero = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        none = torch.zeros((), dtype=torch.int64, device=device)
        return cls(loss_sum=zero, first_bad_step=none - 1, grad_norm_sum=zero.clone(), num_grad_norms=none)

    def add(self, loss: Tensor, step: int, indices: tuple[int, ...]) -> None:
        finite = loss.isfinite()
        first = (self.first_bad_step < 0) & ~finite
        self.first_bad_step = torch.where(first, step, self.first_bad_step)
        self.loss_sum = self.loss_sum + loss.to(self.loss_sum.dtype)
        self.num_losses += 1
        self.images += len(indices)
        self.indices.setdefault(step, []).extend(indices)

    def add_update(self, grad_norm: Tensor) -> None:
        finite = grad_norm.isfinite()
        self.grad_norm_sum = self.grad_norm_sum + torch.where(finite, grad_norm, 0).to(self.grad_norm_sum.dtype)
        self.num_grad_norms = self.num_grad_norms + finite


def pages(scores: Mapping[str, Sequence[str]]) -> Charts:
    """Return what is shown together: first what answers whether a run learns, with a chart for each of `scores`."""
    return {
        "Is it learning?": {
            "loss": ["^loss$"],
            **{title: [f"^{re.escape(name)}$" for name in names] for title, names in scores.items()},
            "norm of the gradient": ["^grad_norm$"],
            "learning rate": ["^lr$"],
        },
        "Is it fast?": {
            "images per second": ["^images_per_s$"],
            "share of the time that goes by waiting for data": ["^data_wait$"],
            "memory in GB": ["^memory_gb$"],
        },
    }


def untimed() -> dict[str, bool]:
    """Return options with which `torch.compile` takes no kernel because it was the fastest when tried.

    Such kernels sum in different orders, and the process that resumes a run would try them anew. PyTorch 2.8 has no
    such mode, and only a cache on the machine for what it took.
    """
    return {"deterministic": True} if "deterministic" in torch._inductor.list_options() else {}


class Trainer:
    """Runs the updates of a plan, from where a checkpoint left off to the end.

    Everything random in a step is reseeded from (seed, step, process), so the state of a run is its weights,
    the optimizer's moments and the step: a resumed run equals an uninterrupted one.

    Args:
        accelerator: devices, processes, precision.
        model: called by `compute_loss`; moved, wrapped and trained.
        optimizer: over the model's parameters.
        compute_loss: (wrapped model, batch) -> scalar loss, of the batch's tensors alone: it may be recorded as a
            CUDA graph, and called no more.
        prepare: what is done to a batch on the device before, and not recorded: what draws on the CPU.
        eager: why nothing must be recorded; empty for no reason but those of `why_eager`.
        plan: steps and learning rates.
        config: of the run; written into checkpoints.
        ema_decay: of the exponential moving average (EMA) of the weights, kept in `ema`; None for none. While the
            run is young it is step / (step + 10), so that a short run's EMA is not of its first weights.
        facts: what else belongs into the checkpoints' state.json, such as class names.
        batch_reason: why so many images are computed at once, where that was chosen.
        lock: of the run folder, on the process that holds it.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        compute_loss: Callable[[nn.Module, Any], Tensor],
        prepare: Callable[[Any], Any] | None = None,
        eager: str = "",
        plan: Plan,
        config: RunConfig,
        ema_decay: float | None = None,
        facts: Mapping[str, Any] | None = None,
        batch_reason: str = "",
        lock: Lock | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.lock = lock
        self.facts = dict(facts or {})
        self.batch_reason = batch_reason
        self.compute_loss = compute_loss
        self.prepare = prepare
        self.plan = plan
        self.config = config
        self.run = RunFolder(config.output)
        self.progress = Progress(plan.total_steps, shown=accelerator.is_main_process)
        self.step = 0
        """Updates made."""
        self.seen_images = 0
        """By all processes together: where in the stream of images the run stands."""
        self.bad: dict[int, Unreadable] = {}
        """Samples that could not be read, by index, as far as this process knows."""
        self.best: Best | None = None
        self.kept: list[int] = []
        """Steps of the checkpoints that are never deleted."""
        self.found: Mapping[str, str] = {}
        """What its records were found to need a look at, once it has begun."""
        self.bare_model = model
        self.ema = None
        if ema_decay is not None:  # copied before the model is wrapped, as copies of wrappers call the original
            from timm.utils.model_ema import ModelEmaV3

            self.ema = ModelEmaV3(model, ema_decay, use_warmup=True, warmup_gamma=10.0, warmup_power=1.0)
            self.ema.to(accelerator.device)
        if config.train.compile:
            model.compile(fullgraph=True, options=untimed())
        self.sharding = asked_sharding(config.train)
        self.eager = eager or why_eager(
            accelerator.device,
            processes=accelerator.num_processes,
            sharded=self.sharding is not None,
            scales_loss=accelerator.scaler is not None,
            gradient_checkpointing=config.train.gradient_checkpointing,
        )
        self.without_ddp = not self.eager and accelerator.distributed_type != DistributedType.NO
        """Whether gradients are averaged once all are computed, as hooks on them are not called in a replay."""
        by_itself = self.without_ddp or self.sharding is not None
        if by_itself:
            model.to(accelerator.device)  # which accelerate leaves alone for FSDP
        self.model: nn.Module = accelerator.prepare_model(model, evaluation_mode=by_itself)
        if by_itself:
            share([*model.parameters(), *model.buffers()])
        if self.sharding is not None:
            self.sharding.divide_with(optimizer, model)
            if self.ema is not None:
                share(self.ema.module.parameters())
                self.sharding.divide(self.ema.module)
        self.optimizer: Any = accelerator.prepare_optimizer(optimizer)
        self.writer = CheckpointWriter(self.run.checkpoints, Together() if self.sharding else None)
        self.window = Window.new(accelerator.device)
        self.work: Work = Eager(self._accumulate, self._exchange, self._step)
        if not self.eager:
            self.record_steps(CudaGraphs(accelerator.device))

    def record_steps(self, graphs: Graphs) -> None:
        """Have the steps recorded, and their learning rates where a recording finds them."""
        for group in self.optimizer.param_groups:
            group["capturable"], group["lr"] = True, torch.zeros((), device=self.accelerator.device)
        eager = Eager(self._accumulate, self._exchange, self._step)
        self.work = Recorded(eager, list(self.bare_model.parameters()), graphs, self.say)

    # Checkpoints

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the state of a checkpoint.

        Raises:
            UserError: if it does not fit the model or the plan.
        """
        path, state = checkpoint.path, checkpoint.state
        if state.step > self.plan.total_steps:
            raise UserError(
                f"{path}: is at step {state.step}, but the configuration ends after {self.plan.total_steps}: raise "
                "train.epochs or train.max_steps, or name another output folder"
            )
        # what this run wrote is not converted: dtypes are compared, too
        own = self.bare_model.state_dict()
        load_strictly(self.bare_model, divided(checkpoint.model, own), path / MODEL, kind)
        if self.ema is not None:  # which may begin with this resumption
            load_strictly(self.ema.module, divided(checkpoint.ema or checkpoint.model, own), path / EMA, kind)
        restore_optimizer(self.bare_model, self.optimizer.optimizer, checkpoint.optimizer, path / OPTIMIZER)
        self.step, self.seen_images = state.step, state.seen_images
        self.best, self.kept = state.best, list(state.kept)
        self.bad = {bad[0]: bad for bad in state.bad_images}
        self.window.loss_sum.fill_(state.loss_sum / self.accelerator.num_processes)
        self.window.num_losses = state.num_losses
        self.window.grad_norm_sum.fill_(state.grad_norm_sum)
        self.window.num_grad_norms.fill_(state.num_grad_norms)
        if self.accelerator.scaler is not None and state.scaler is not None:
            if state.scaler.keys() != self.accelerator.scaler.state_dict().keys():
                raise UserError(f"{path}: its loss scaler is of another torch ({state.torch})")
            self.accelerator.scaler.load_state_dict(state.scaler)
        stored = parse_config(type(self.config), state.config, str(path))
        changes = list(changed_keys(stored, self.config))
        before = stored.data.batch_size * stored.optim.accumulate * state.num_processes
        if before != self.plan.images_per_step:
            changes.append(f"images per update: {before} -> {self.plan.images_per_step}")
        then, now = state.precision or stored.train.precision, self.accelerator.mixed_precision
        if then != now and (then, now) != ("auto", "no"):  # auto of 0.1.0 was float32, unless launched otherwise
            changes.append(f"precision: {then} -> {now}")
        if changes:
            self.say(f"resuming with changes, so not the same run any more: {'; '.join(changes)}")

    def save(self) -> None:
        """Copy what a checkpoint holds, to be written while training goes on; the loss must have been checked.

        Raises:
            UserError: if the checkpoint before could not be written.
        """
        loss_sum = self.accelerator.gather(self.window.loss_sum[None]).sum().item()  # pyright: ignore[reportAttributeAccessIssue]
        bad_images = gather_object(list(self.bad.values()))
        if not self.accelerator.is_main_process and self.sharding is None:
            return
        files = {
            MODEL: self.bare_model.state_dict(),
            OPTIMIZER: optimizer_tensors(self.bare_model, self.optimizer.optimizer),
        }
        if self.ema is not None:
            files[EMA] = self.ema.module.state_dict()
        state = State(
            **self.facts,
            step=self.step,
            seen_images=self.seen_images,
            loss_sum=loss_sum,
            num_losses=self.window.num_losses,
            grad_norm_sum=self.window.grad_norm_sum.item(),
            num_grad_norms=int(self.window.num_grad_norms),
            bad_images=tuple(sorted(set(map(tuple, bad_images)))),
            best=self.best,
            kept=tuple(self.kept),
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            num_processes=self.accelerator.num_processes,
            precision=self.accelerator.mixed_precision,
            config=self.config.model_dump(mode="json"),
            fcmae=__version__,
            torch=torch.__version__,
        )
        self.writer.save(state, files, keep=self.config.checkpoint.keep, first=[self.run.metrics], say=self.say)

    def last_good(self) -> str:
        """Name the newest checkpoint that is whole on disk, once what is being written is."""
        with suppress(UserError):  # that one is not
            self.writer.wait()
        checkpoint, _ = newest_intact(self.run.checkpoints)
        return str(checkpoint.path) if checkpoint else "none yet"

    # Reports

    def say(self, text: str) -> None:
        """Print a line on the main process, above the progress bar."""
        self.progress.say(text)

    def warn(self) -> None:
        """Print what of the plan is far from what recipes have."""
        for concern in self.plan.concerns(self.config):
            self.say(f"warning: {concern}")

    @property
    def first_lines(self) -> dict[str, str]:
        """What the run computes on, in which precision, how, and how many images at once."""
        config, plan, accelerator = self.config, self.plan, self.accelerator
        how = ["compiled" if config.train.compile else "not compiled"]
        how += [f"no CUDA graphs ({self.eager})" if self.eager else "CUDA graphs"]
        factors = [f"{accelerator.num_processes} processes"] if accelerator.num_processes > 1 else []
        factors += [f"{config.data.batch_size}"]
        factors += [f"{config.optim.accumulate} accumulated"] if config.optim.accumulate > 1 else []
        batch = f"{plan.images_per_step:,} of {plan.num_samples:,} images an update"
        batch += f" = {' x '.join(factors)}" * (len(factors) > 1)
        return {
            "device": f"{describe_device(accelerator)}, {', '.join(how)}",
            "precision": describe_precision(accelerator, config.train.precision),
            "batch": batch + (f" ({self.batch_reason})" if self.batch_reason else ""),
        }

    def _check_images(self, batch: TrainBatch) -> None:
        """Name and remember the samples that could not be read."""
        for index, name, reason in batch.bad:
            if index not in self.bad:
                self.bad[index] = index, name, reason
                tqdm.write(f"skipped {name}: {reason} (unreadable so far: {len(self.bad)})")

    def check(self, *, write: bool = True) -> float:
        """Return the mean loss since the last record over all processes; stop the run if something is wrong.

        Args:
            write: name the samples of a non-finite loss in a file.
        """
        w = self.window
        counts = w.first_bad_step.to(w.loss_sum.dtype), w.loss_sum.new_tensor(float(len(self.bad)))
        local = torch.stack([w.loss_sum, *counts])
        everyone = self.accelerator.gather(local[None]).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        bad_steps = [int(row[1]) for row in everyone if row[1] >= 0]
        if bad_steps:
            self._stop_non_finite(min(bad_steps), write=write)
        if sum(row[2] for row in everyone) > self.config.data.max_bad:
            self._stop_bad_images()
        return sum(row[0] for row in everyone) / (max(w.num_losses, 1) * self.accelerator.num_processes)

    def _stop_non_finite(self, step: int, *, write: bool) -> None:
        indices = gather_object(self.window.indices.get(step, []))
        parts = [f"the loss of step {step + 1} is not finite"]
        if write:
            path = self.run.non_finite(step + 1)
            if self.accelerator.is_main_process:
                self._require_lock()
                make_folder(self.run.path)
                write_json(path, {"step": step + 1, "indices": indices}, indent=None)
            parts.append(f"the batch's sample indices are in {path}")
            if self.accelerator.is_main_process:
                parts.append(f"last good checkpoint: {self.last_good()}")
        parts.append(CALMER)
        raise UserError("; ".join(parts))

    def _stop_bad_images(self) -> None:
        everyone = {bad[0]: bad for bad in gather_object(list(self.bad.values()))}
        if len(everyone) > self.config.data.max_bad:
            _, name, reason = next(iter(everyone.values()))
            raise UserError(
                f"{len(everyone)} images do not decode, more than data.max_bad={self.config.data.max_bad}; "
                f"the first is {name}: {reason}; fix or remove them, or raise data.max_bad"
            )

    def _require_lock(self) -> None:
        """Make sure, before something is written, that the run folder is still this run's."""
        if self.lock is not None:
            self.lock.check()

    def whole(self) -> AbstractContextManager[None]:
        """Inside, each process has whole networks to evaluate; begun by all of them."""
        if self.sharding is None:
            return nullcontext()
        return self.sharding.whole(self.bare_model, *([self.ema.module] if self.ema is not None else []))

    def _show(self, show: Show, log: MetricsLog | None) -> None:
        with self.whole():
            if log is not None:
                with self._between(show.what, show.every):
                    show.call(self.step, log)

    def _evaluate(
        self, evaluate: Callable[[int, MetricsLog | None], float | None], every: int, log: MetricsLog | None
    ) -> float | None:
        with self.whole(), self._between("evaluation", every):
            return evaluate(self.step, log)

    @contextmanager
    def _between(self, what: str, every: int) -> Iterator[None]:
        """What is done between updates, and writes into the run folder."""
        self._require_lock()
        with self.progress.between(what, every):
            yield

    def _record(self, log: MetricsLog | None) -> None:
        asked = time.perf_counter()
        loss = self.check()
        self.window.busy_s += time.perf_counter() - asked  # what the device had still to do
        self._require_lock()
        w = self.window
        rate = w.images * self.accelerator.num_processes / max(w.busy_s, 1e-9)
        wait = w.waiting_s / max(w.busy_s, 1e-9)
        norms = int(w.num_grad_norms)
        grad_norm = {"grad_norm": w.grad_norm_sum.item() / norms} if norms else {}
        lr = self.plan.lr(self.step - 1)
        self.window = Window.new(self.accelerator.device)
        if log is None:
            return
        epoch = self.seen_images / self.plan.num_samples
        log.record(
            self.step,
            {
                "epoch": epoch,
                "seen_images": self.seen_images,
                "loss": loss,
                "lr": lr,
                **grad_norm,
                "images_per_s": rate,
                "data_wait": wait,
                "memory_gb": taken_bytes(self.accelerator.device) / 1e9,
                "time": time.time(),
            },
        )
        self.progress.record(
            [f"step {self.step}/{self.plan.total_steps}", f"epoch {epoch:.2f}"],
            [f"loss {loss:.4f}", f"lr {lr:.2e}", f"{rate:.0f} images/s", f"data wait {wait:.0%}"],
        )

    # Training

    def accumulate(self, batches: Iterator[Any], micro: int) -> None:
        """Add the gradient of the update's micro-batch number `micro`, from 0."""
        accelerator = self.accelerator
        asked = time.perf_counter()
        batch = next(batches)
        self.window.waiting_s += time.perf_counter() - asked
        # after the batch: a loader's first one draws from the same generator
        reseed(self.config.train.seed, self.step, micro, accelerator.process_index)
        self._check_images(batch)
        inputs = batch.to(accelerator.device)
        if self.prepare is not None:
            inputs = self.prepare(inputs)
        last = micro == self.config.optim.accumulate - 1
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        with nullcontext() if last or self.sharding else accelerator.no_sync(self.model):
            loss = self.work.accumulate(inputs)
        self.window.add(loss, self.step, batch.indices)

    def _accumulate(self, batch: Any) -> Tensor:
        loss = self.compute_loss(self.model, batch)
        self.accelerator.backward(loss / self.config.optim.accumulate)
        return loss.detach()

    def apply(self) -> None:
        """Update the weights, and their EMA, by the gradients."""
        step_lr = self.plan.lr(self.step)
        for group in self.optimizer.param_groups:
            lr = step_lr * group["lr_scale"] * (self.step >= group["first_step"])
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self.window.add_update(self.work.apply())
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.bare_model, self.step)
        self.seen_images += self.plan.images_per_step

    def _exchange(self) -> None:
        if self.without_ddp:
            gradients = (parameter.grad for parameter in self.bare_model.parameters())
            dtype = torch.bfloat16 if self.config.train.bf16_exchange else None
            average((gradient for gradient in gradients if gradient is not None), dtype)
            share(self.bare_model.buffers())

    def _step(self) -> Tensor:
        most = math.inf if self.config.optim.clip_grad is None else self.config.optim.clip_grad
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), most)
        assert norm is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm_of_all(norm)

    def update(self, batches: Iterator[Any]) -> None:
        """Make one update of `accumulate` micro-batches."""
        started = time.perf_counter()
        micro_batches = self.config.optim.accumulate
        for micro in range(micro_batches):
            self.accumulate(batches, micro)
            if micro < micro_batches - 1:
                self.progress.reach(self.step + (micro + 1) / micro_batches)
        self.apply()
        self.progress.reach(self.step)
        self.window.busy_s += time.perf_counter() - started

    def fit(
        self,
        batches: Iterator[Any],
        *,
        shows: Sequence[Show] = (),
        evaluate: Callable[[int, MetricsLog | None], float | None] | None = None,
        evaluate_every: int = 1,
        evaluate_first: bool = False,
        scores: Mapping[str, Sequence[str]] | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Train to the end of the plan, recording, saving and showing on the way, unless asked to stop before.

        Args:
            batches: this process's batches, from the present step on.
            shows: called on the main process before the first step, and when due.
            evaluate: called on all processes with (step, log; None but on the main process) when `is_due` every
                `evaluate_every` steps; returns a score, the same on all, whose highest makes the best checkpoint,
                or None for no best.
            evaluate_first: evaluate before the first step, too.
            scores: by title, the names of what is recorded besides and shown beside the loss; the first of them are
                compared between runs.
            watch: what is looked for in the records; data that come too slowly alone, if None.

        Raises:
            UserError: for a non-finite loss, too many unreadable images, a full disk, or a lost lock.
            Stopped: after saving, for a signal or `train.max_hours`.
        """
        progress, total = self.progress, self.plan.total_steps
        save_every = self.config.checkpoint.every_steps
        progress.begin(self.step)
        if self.step == total:
            self.say(f"{self.run.path} is finished already: delete it, or name another output, to run again")
        else:
            self.warn()
            for name, text in self.first_lines.items():
                self.say(f"{name:16} {text}")
            first = "the first takes longer, as kernels are compiled and workers started"
            self.say(f"updates          {self.step + 1:,} to {total:,}; {first}")
            for show in shows:
                if show.place is not None:
                    self.say(f"{show.what:16} {show.place}, every {show.every:,} updates")
            self.say(f"records          {', '.join([str(self.run.metrics), *self.config.log.loggers])}")
        with ExitStack() as stack:
            stack.enter_context(self.writer)  # left last: a run is over when its checkpoints are on disk
            log = None
            if self.accelerator.is_main_process:
                self._require_lock()
                make_folder(self.run.path)
                for place in self.run.folders:
                    remove_leftovers(place)
                write_text(self.run.config, to_yaml(self.config))
                log = stack.enter_context(self._open_log(scores or {}, watch))
                if self.step < total:
                    facts = {"command": command_line(), **self.first_lines, "python": platform.python_version()}
                    record_start(self.run, self.step, facts)
            stack.enter_context(progress)
            if self.step == 0:
                for show in shows:
                    self._show(show, log)
            if evaluate and evaluate_first and self.step == 0:
                self._evaluate(evaluate, evaluate_every, log)
            stop = stack.enter_context(
                StopRequests(
                    say=self.say,
                    max_hours=self.config.train.max_hours,
                    num_processes=self.accelerator.num_processes,
                )
            )
            while self.step < total:
                self.update(batches)
                progress.advance_bar()
                self.writer.poll()
                if self.step % self.config.log.every_steps == 0 or self.step == total:
                    self._record(log)
                for show in shows:
                    if is_due(self.step, show.every, total):
                        self._show(show, log)
                is_best = False
                if evaluate and is_due(self.step, evaluate_every, total):
                    self.check()
                    is_best = self._note(self._evaluate(evaluate, evaluate_every, log))
                # last: a resumed run repeats nothing before
                code = stop.asked()
                if self._keep() or code or is_best or self.step % save_every == 0 or self.step == total:
                    self.check()
                    with self._between("checkpoint", save_every):
                        self.save()
                if code and self.step < total:
                    self.writer.wait()
                    self.accelerator.wait_for_everyone()  # launchers end all when the first has ended
                    self.say(
                        f"stopped by {describe(code)} at step {self.step} of {total}; saved: {self.run.newest}; "
                        "to go on: the same command with resume=auto"
                    )
                    raise Stopped(code)
            if log:
                log.conclude(self.step, ["loss", *next(iter((scores or {}).values()), ())])
        self.accelerator.wait_for_everyone()  # for the main process, which writes

    def _open_log(self, scores: Mapping[str, Sequence[str]], watch: Watch | None) -> MetricsLog:
        watch = watch or Watch(self.config, self.plan, self.accelerator.num_processes)
        self.found = watch.found
        return MetricsLog(
            self.run,
            self.step,
            loggers=self.config.log.loggers,
            config=self.config,
            charts=pages(scores),
            watch=watch.see,
            say=self.say,
        )

    def _keep(self) -> bool:
        """Whether the checkpoint of this step is due, and never deleted, which is noted."""
        every = self.config.checkpoint.keep_every_epochs
        due = every is not None and self.plan.passes(every, self.seen_images)
        if due:
            self.kept.append(self.step)
        return due

    def _note(self, score: float | None) -> bool:
        """Remember a score if it is the best so far; returns whether it is."""
        if score is None or (self.best is not None and score <= self.best.score):
            return False
        self.best = Best(step=self.step, score=score)
        return True
