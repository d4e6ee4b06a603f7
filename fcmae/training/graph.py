"""Updates recorded as CUDA graphs, a few launches in place of thousands; knows no model, loss or optimizer.

There are three graphs: an update's first micro-batch, which writes the gradients, its further ones, which add to
them, and what the gradients are for. A graph computes on fixed tensors: batches are copied into its own, learning
rates are filled in. Random numbers are those of eager steps: a replay starts at the default generator's seed and
offset.
"""

import gc
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from fcmae.errors import UserError, brief
from fcmae.seeding import cpu_states
from fcmae.tensors import kind
from fcmae.training.exchange import is_fast

WARM_UP = 3
"""Updates before the recording, as many as PyTorch's notes on CUDA graphs have: kernels are compiled, and what is
made once, such as the optimizer's state, must not lie in a graph."""

AHEAD = 2
"""Updates that may lie before the GPU; else the CPU would launch hundreds of short ones, each with its batch."""


class FixedBatch(Protocol):
    """What is asked of a batch to be copied."""

    def tensors(self) -> list[Tensor]: ...

    def each(self, change: Callable[[Tensor], Tensor]) -> Self: ...


class Work(Protocol):
    """What the device does in an update."""

    warm_up: ClassVar[int]
    """Updates before one takes as long as it will."""

    def accumulate(self, batch: Any, /) -> Tensor:
        """Add the gradient of a micro-batch; returns its loss, a scalar, to be read before the next."""
        ...

    def apply(self) -> Tensor:
        """Update the weights by the gradients, and remove these; returns their norm, to be read before the next."""
        ...


@dataclass(frozen=True)
class Eager:
    """One operation after the other."""

    accumulate: Callable[[Any], Tensor]
    exchange: Callable[[], None]
    """Makes the gradients those of all processes, where `accumulate` does not; never recorded."""
    step: Callable[[], Tensor]
    """Updates the weights by the gradients, and removes these; returns their norm."""
    warm_up: ClassVar[int] = 0

    def apply(self) -> Tensor:
        self.exchange()
        return self.step()


class Graphs(Protocol):
    """How work is recorded."""

    def aside(self) -> AbstractContextManager[object]:
        """Inside, run as the recording will."""
        ...

    def watch(self, reasons: list[str]) -> AbstractContextManager[object]:
        """Inside, note why what runs cannot be recorded."""
        ...

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Record what a call does, without doing it; return what does it, and gives the same tensor each time.

        Raises:
            UserError: if that cannot be recorded.
        """
        ...

    def keep_pace(self) -> None:
        """Wait, after an update, until few of them lie before the device."""
        ...


class Recorded:
    """Replays the work of updates, after `WARM_UP` eager ones.

    An update that begins with a batch of other shapes than the first of all is made eagerly; so is each further
    micro-batch of other shapes. Outside of what is eager, parameters have no gradients, as between eager updates.

    Args:
        eager: the work. Its learning rates are tensors that the caller fills; AdamW must be capturable.
        parameters: whose gradients it computes.
        graphs: records it.
        say: takes a line where it turns out that it cannot be recorded.
    """

    warm_up: ClassVar[int] = WARM_UP + 1

    def __init__(
        self, eager: Eager, parameters: Sequence[nn.Parameter], graphs: Graphs, say: Callable[[str], None]
    ) -> None:
        self.eager = eager
        self.parameters = parameters
        self.graphs = graphs
        self.say = say
        self.updates = 0
        """Made so far."""
        self.begun = False
        """Whether the present update has gradients."""
        self.replaying = False
        """Whether the present update is made by the graphs."""
        self.possible = True
        self.fixed: FixedBatch | None = None
        """Where the graphs find their batch."""
        self.gradients: list[Tensor | None] = []
        """Of the parameters, where the graphs compute them."""
        self.first: Callable[[], Tensor] | None = None
        self.further: Callable[[], Tensor] | None = None
        self.last: Callable[[], Tensor] | None = None

    def accumulate(self, batch: FixedBatch) -> Tensor:
        fits = self._fits(batch)
        begun, self.begun = self.begun, True
        if not begun:
            self.replaying = self.possible and fits and self.updates >= WARM_UP
        if not self.replaying:
            with self._warming_up():
                return self.eager.accumulate(batch)
        if not fits:
            with self._gradients():
                return self.eager.accumulate(batch)
        assert self.fixed is not None
        for own, given in zip(self.fixed.tensors(), batch.tensors(), strict=True):
            own.copy_(given, non_blocking=True)
        if not begun:
            self.first = self.first or self._record_first()
            return self.first()
        if self.further is None:
            with self._gradients():
                self.further = self.graphs.record(lambda: self.eager.accumulate(self.fixed))
        return self.further()

    def apply(self) -> Tensor:
        if not self.replaying:
            with self._warming_up():
                norm = self.eager.apply()
        else:
            with self._gradients():
                self.eager.exchange()
                self.last = self.last or self.graphs.record(self.eager.step)
            norm = self.last()
            self.graphs.keep_pace()
        self.begun = False
        self.updates += 1
        return norm

    def _fits(self, batch: FixedBatch) -> bool:
        if self.fixed is None:
            self.fixed = batch.each(torch.clone)
        return [*map(kind, batch.tensors())] == [*map(kind, self.fixed.tensors())]

    @contextmanager
    def _warming_up(self) -> Iterator[None]:
        """Run eager work as it will be recorded, and see in the last update before that whether it can be."""
        if not self.possible or self.updates >= WARM_UP:
            yield
            return
        if self.updates < WARM_UP - 1:
            with self.graphs.aside():
                yield
            return
        reasons: list[str] = []
        with self.graphs.aside(), self.graphs.watch(reasons):
            yield
        if reasons:
            self.possible = False
            self.say(f"no CUDA graphs: {reasons[0]} in each step")

    def _record_first(self) -> Callable[[], Tensor]:
        """Record the forward and backward pass that finds no gradients, so that it writes them to new memory."""
        replay = self.graphs.record(lambda: self.eager.accumulate(self.fixed))
        self.gradients = [parameter.grad for parameter in self.parameters]
        self._remove_gradients()
        return replay

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Inside, the parameters have the gradients that the graphs compute."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        yield
        self._remove_gradients()

    def _remove_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


@contextmanager
def watch_draws(reasons: list[str]) -> Iterator[None]:
    """Inside, note if anything is drawn on the CPU, whose random numbers a replay would only repeat."""
    before = cpu_states()
    yield
    if cpu_states() != before:
        reasons.append("random numbers are drawn on the CPU")


class CudaGraphs:
    """Records CUDA graphs that share their memory, as they are never replayed at the same time.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        """Where work warms up and is recorded: a recording must meet no node of autograd, and no workspace of
        cuBLAS, that was made on another."""
        self.pool = torch.cuda.graph_pool_handle()
        self.ends: deque[torch.cuda.Event] = deque()
        """Of the updates that lie before the GPU."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        present = torch.cuda.current_stream()
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            yield
        present.wait_stream(self.stream)  # before anything is freed that was made on the present one

    @contextmanager
    def watch(self, reasons: list[str]) -> Iterator[None]:
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with watch_draws(reasons):
                    yield
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
        reasons += [f"{warning.filename}:{warning.lineno} waits for the GPU" for warning in waits]

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # or it might free the graphs of another run meanwhile; and memory is about to be short
        try:
            # thread_local: another thread may pin memory of the next batches or wait for what it copies to the disk
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = function()
        except RuntimeError as error:  # perhaps only of the end of a recording that has failed before
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise UserError(
                f"the step cannot be recorded as a CUDA graph ({brief(cause)}); start the same command with "
                f"{BLOCKING}=1 in the environment, which trains without, and report this",
                everywhere=False,
            ) from error

        def replay() -> Any:
            graph.replay()
            return output

        return replay

    def keep_pace(self) -> None:
        end = torch.cuda.Event(blocking=True)  # sleeps, as the processor is for those who load images
        end.record()
        self.ends.append(end)
        if len(self.ends) > AHEAD:
            self.ends.popleft().synchronize()


BLOCKING = "CUDA_LAUNCH_BLOCKING"
"""PyTorch's and CUDA's own switch for finding errors, under which nothing can be recorded."""


def why_eager(
    device: torch.device, *, processes: int, sharded: bool, scales_loss: bool, gradient_checkpointing: bool
) -> str:
    """Return why the work of a run is not recorded as CUDA graphs; empty where it is."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "these need an NVIDIA GPU"
    if os.environ.get(BLOCKING, "0") not in ("", "0"):
        return f"{BLOCKING} is set"
    if sharded:
        return "each process has a part of the weights"
    if processes > 1 and not is_fast(processes):
        return "gradients travel between machines, or by PCIe, while others are computed"
    if scales_loss:
        return "train.precision=fp16 leaves out updates whose gradients overflow"
    if gradient_checkpointing:
        return "train.gradient_checkpointing=true sets random states back"
    return ""
