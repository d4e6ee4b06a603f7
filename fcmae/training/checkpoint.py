"""Checkpoint folders: whole, verified or refused, never absent; knows no run folder or network.

RUN/checkpoints/step-00001000/
    model.safetensors       parameters by their dense names
    optimizer.safetensors   AdamW's state, as `state.NAME.exp_avg` and so on
    ema.safetensors         the EMA of the parameters, where the run keeps one
    state.json              `State`: step, images seen, configuration, versions
    SHA256SUMS              of the files above, for `sha256sum -c`; written last, checked by every reader
RUN/checkpoints/last        a link to the newest
RUN/checkpoints/best        a link to the one with the highest score, where the run has scores; never deleted
RUN/checkpoints/damaged-*   what a resumed run found damaged and did not take
"""

import errno
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fcmae.errors import UserError
from fcmae.files import (
    atomic_folder,
    fsync,
    point_link,
    real_path,
    remove_folder,
    remove_leftovers,
    rename,
    sha256,
    write_json,
    write_text,
)
from fcmae.tensors import differences, fill_safetensors, kind, not_finite, read_safetensors
from fcmae.training.sharding import Rows, divided
from fcmae.training.together import Together

MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
STATE, SUMS = "state.json", "SHA256SUMS"
LAST, BEST = "last", "best"
FORMAT = 2
"""What state.json says of itself; fcmae 0.1.0 said nothing, and wrote no hashes."""

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file, `MODEL`, `OPTIMIZER` and `EMA`, and by name."""

CALMER = "try a lower optim.base_lr, optim.clip_grad=1, or train.precision=bf16 instead of fp16"
"""What helps where numbers are not finite."""


class Damaged(UserError):
    """A checkpoint that is not whole, or not as it was written."""


Count = Annotated[int, Field(ge=0, lt=2**53)]
Text = Annotated[str, BeforeValidator(lambda text: text.encode(errors="backslashreplace").decode())]
"""A name from a file system, which need not be Unicode."""


class Record(BaseModel):
    """A part of state.json: every key known, every number finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Best(Record):
    """The evaluation with the highest score so far."""

    step: Count
    score: float


class State(Record):
    """What a checkpoint holds besides tensors."""

    format: Literal[1, 2] = 1
    step: Count
    """Updates made."""
    seen_images: Count
    """By all processes together: where in the stream of images the run stands."""
    loss_sum: float
    """Of the losses since the last record, over all processes."""
    num_losses: Count
    """Losses in it, of each process."""
    grad_norm_sum: float = 0.0
    """Of the norms of the gradient since the last record; 0.1.0 had none."""
    num_grad_norms: Count = 0
    """Norms in it."""
    bad_images: tuple[tuple[Count, Text, Text], ...]
    """Samples that could not be read: index, what it is called, why."""
    best: Best | None
    kept: tuple[Count, ...] = ()
    """Steps whose checkpoints are never deleted."""
    scaler: dict[str, float] | None
    """The state of the loss scaler of fp16."""
    num_processes: Annotated[int, Field(ge=1, lt=2**31)]
    precision: Text | None = None
    """What was computed in; None in 0.1.0, which did not note it."""
    config: dict[str, Any]
    class_names: tuple[Text, ...] | None = None
    """Of the network's outputs."""
    target_mean: tuple[float, ...] | None = None
    """Of a regression, what its outputs are 0 for; by output."""
    target_std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """And what they are 1 above it for."""
    fcmae: str
    torch: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.seen_images < self.step or any(step > self.step for step in self.kept):
            raise ValueError(f"step {self.step} does not go with seen_images and kept")
        if self.best is not None and self.best.step > self.step:
            raise ValueError(f"the best step, {self.best.step}, comes after step {self.step}")
        return self

    @property
    def has_ema(self) -> bool:
        """Whether the run keeps an EMA of the weights."""
        train = self.config.get("train")
        return isinstance(train, dict) and train.get("ema_decay") is not None


class Checkpoint(NamedTuple):
    """A checkpoint read from disk, found to be as it was written."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: State
    ema: dict[str, Tensor] | None


# The optimizer's state

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named `state.PARAMETER.KIND`; none before the first update."""
    if not optimizer.state:  # for which torch would make a step of its own
        return {}
    return _tensors(get_optimizer_state_dict(model, optimizer, options=FLAT))


def _tensors(flat: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keep the tensors of the state; a group's learning rate may be one, too."""
    return {name: value for name, value in flat.items() if name.startswith("state.") and isinstance(value, Tensor)}


def _current_name(name: str) -> str:
    """Name a tensor of the optimizer as today; fcmae 0.1.0 wrote `KIND.PARAMETER`."""
    kind, _, parameter = name.partition(".")
    return name if kind == "state" else f"state.{parameter}.{kind}"


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], source: Path | str
) -> None:
    """Put `optimizer_tensors` back, each on its parameter's device; the groups keep their own rates and decays.

    Raises:
        UserError: naming `source`, if they are another optimizer's.
    """
    tensors = {_current_name(name): value for name, value in tensors.items()}
    own = get_optimizer_state_dict(model, optimizer, options=FLAT)
    if differing := differences(tensors, _tensors(own), kind):
        raise UserError(
            f"{source}: {len(differing)} tensors are not those of this optimizer, such as {differing[0]}; "
            "resume with the configuration of the run, or start a new run with init_from"
        )
    merged: dict[str, Any] = {**own, **divided(tensors, _tensors(own))}
    set_optimizer_state_dict(model, optimizer, merged, options=FLAT)


# Folders


def step_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is among those in `folder`."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that a folder's name says; None if it is not named as a checkpoint."""
    found = re.fullmatch(r"step-(\d{8,18})", path.name)
    return int(found[1]) if found else None


def step_folders(folder: Path) -> list[Path]:
    """Return what is named as a checkpoint in `folder`, oldest first."""
    steps = {path: step_of(path) for path in folder.glob("step-*")}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)


# Reading


def read_sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint; nothing for one of fcmae 0.1.0, which wrote none.

    Raises:
        Damaged: if they are not what a checkpoint has.
    """
    path = folder / SUMS
    if not path.is_file():
        return {}
    text = _read(path).decode(errors="replace")
    lines = [re.fullmatch(r"([0-9a-f]{64})  ([a-zA-Z0-9.]+)", line) for line in text.splitlines()]
    sums = {line[2]: line[1] for line in lines if line}
    if len(sums) < len(lines) or not {MODEL, OPTIMIZER, STATE} <= sums.keys() <= {MODEL, OPTIMIZER, STATE, EMA}:
        raise Damaged(f"{path}: damaged: these are not the hashes of a checkpoint's files")
    return sums


def verified(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint's file, found to be as it was written.

    Raises:
        Damaged: if it is missing, or another than in SHA256SUMS.
    """
    path, sums = folder / name, read_sums(folder)
    if not path.is_file():
        raise Damaged(f"{path}: missing")
    try:
        differs = bool(sums) and sha256(path) != sums.get(name)
    except OSError as error:
        raise _unreadable(path, error) from error
    if differs:
        raise Damaged(f"{path}: damaged: its SHA-256 is not that in {SUMS}")
    return path


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> Exception:
    """Tell a disk that fails from what only the user can allow."""
    return Damaged(f"{path}: damaged: {error.strerror}") if error.errno == errno.EIO else error


def read_state(folder: Path) -> State:
    """Read what a checkpoint folder holds besides tensors.

    Raises:
        Damaged: if it is missing, damaged or another step's.
        UserError: if a newer fcmae wrote it.
    """
    path = verified(folder, STATE)
    try:
        state = State.model_validate_json(_read(path), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        if any(found["loc"] == ("format",) for found in errors):
            raise UserError(f"{path}: of another fcmae than this, a newer one: update") from error
        place = ".".join(map(str, errors[0]["loc"]))
        reason = " ".join([*([f"{place}:"] if place else []), errors[0]["msg"].removeprefix("Value error, ")])
        raise Damaged(f"{path}: damaged: {reason}") from error
    if state.format > 1 and not (folder / SUMS).is_file():
        raise Damaged(f"{folder / SUMS}: missing")
    if step_of(real_path(folder)) not in (None, state.step):
        raise Damaged(f"{path}: damaged: it is of step {state.step}")
    return state


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read a file of tensors, `MODEL`, `OPTIMIZER` or `EMA`.

    Raises:
        Damaged: if it is missing or damaged, or holds what no checkpoint does: infinity or NaN.
    """
    path = verified(folder, name)
    try:
        tensors = read_safetensors(path)
    except UserError as error:
        raise Damaged(str(error)) from error
    if bad := not_finite(tensors):
        raise Damaged(f"{path}: damaged: {bad} is not finite")
    return tensors


def holds_ema(folder: Path, state: State) -> bool:
    """Whether a checkpoint has an EMA of the weights, or should have."""
    return state.has_ema or EMA in read_sums(folder) or (folder / EMA).is_file()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        Damaged: if a file is missing or damaged.
        UserError: if a newer fcmae wrote it.
    """
    state = read_state(path)
    ema = read_tensors(path, EMA) if holds_ema(path, state) else None
    return Checkpoint(path, read_tensors(path, MODEL), read_tensors(path, OPTIMIZER), state, ema)


def newest_intact(folder: Path) -> tuple[Checkpoint | None, dict[Path, Damaged]]:
    """Return the newest checkpoint in `folder` that is intact, and what is wrong with those that are newer."""
    wrong: dict[Path, Damaged] = {}
    for path in reversed(step_folders(folder)):
        try:
            return read_checkpoint(path), wrong
        except Damaged as error:
            wrong[path] = error
    return None, wrong


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is none any more; returns its new path.

    Raises:
        UserError: if it cannot be renamed.
    """
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (path.with_name(f"damaged-{path.name}{number}") for number in numbers)
    new = next(name for name in names if not os.path.lexists(name))
    try:
        rename(path, new)
    except OSError as error:
        raise UserError(f"{path}: damaged, and not to be renamed ({error.strerror}); move it away") from error
    return new


def set_aside_damaged(path: Path) -> str:
    """Set a checkpoint aside if it is damaged; returns what was wrong and done, empty for an intact one.

    Raises:
        UserError: as `set_aside`.
    """
    try:
        read_checkpoint(path)
    except Damaged as error:
        return f"{error}; set aside as {set_aside(path).name}"
    return ""


# Writing


class Writing(Protocol):
    """How files of tensors are written."""

    @property
    def files(self) -> Iterable[str]: ...

    def not_finite(self, file: str, /) -> str | None:
        """Return the name of a tensor of a file with a number that is not finite; None without one."""
        ...

    def fill(self, path: Path, /) -> None:
        """Write a file, whose name says which; raises OSError if it cannot be written."""
        ...


class Alone(NamedTuple):
    """All tensors of each file, of any device."""

    files: Files

    def not_finite(self, file: str) -> str | None:
        return not_finite(self.files[file])

    def fill(self, path: Path) -> None:
        fill_safetensors(path, self.files[path.name])


def save_checkpoint(
    folder: Path,
    state: State,
    files: Files,
    *,
    keep: int,
    first: Iterable[Path] = (),
    say: Callable[[str], None] = print,
    writing: Writing | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX`, point `folder/last` at it, then delete all but the newest `keep`.

    The checkpoint of the best step is pointed at by `folder/best`; neither it nor those of `state.kept` are ever
    deleted. A kill at any instant leaves the older ones. A step that is there already stays as it is, as a run has
    one state at a step, unless it is damaged.

    Args:
        first: files that must be on disk before the checkpoint is: what was recorded up to it.
        say: takes a line about a damaged one that was set aside.
        writing: writes the files of tensors; None for `files` being all there is of them.

    Raises:
        UserError: if it could not be written, such as for a full disk, or a tensor is not finite; older
            checkpoints are untouched.
    """
    final = step_folder(folder, state.step)
    writing = writing or Alone(files)
    for file in writing.files:
        if bad := writing.not_finite(file):
            good, _ = newest_intact(folder)
            raise UserError(
                f"{final}: not written, as {bad} of {file} is not finite; last good checkpoint: "
                f"{good.path if good else 'none yet'}; {CALMER}"
            )
    try:
        remove_leftovers(folder)
        for path in first:
            fsync(path)
        if not _is_written(final, say):
            with atomic_folder(final) as temporary:
                for file in writing.files:
                    writing.fill(temporary / file)
                write_json(temporary / STATE, state.model_dump(mode="json") | {"format": FORMAT})
                names = sorted([*writing.files, STATE])
                write_text(temporary / SUMS, "".join(f"{sha256(temporary / name)}  {name}\n" for name in names))
        settle(folder, state, keep=keep)
    except OSError as error:
        full = error.errno == errno.ENOSPC or "No space left" in str(error)
        raise UserError(
            f"{final}: not written, {'the disk is full' if full else error}; earlier checkpoints are intact: "
            "free some space and start the same command with resume=auto"
        ) from error
    return final


def _is_written(path: Path, say: Callable[[str], None]) -> bool:
    """Whether a checkpoint is there already; a damaged one is set aside."""
    if not os.path.lexists(path):
        return False
    if problem := set_aside_damaged(path):
        say(problem)
    return not problem


def settle(folder: Path, state: State, *, keep: int) -> None:
    """Point the links at what a run has at a step, and delete all checkpoints but the newest `keep` and the spared.

    A kill may have come between a checkpoint and this.
    """
    point_links(folder, state)
    spared = {*state.kept, *([state.best.step] if state.best else [])}
    for old in step_folders(folder)[:-keep]:
        if step_of(old) not in spared:
            remove_folder(old)


def point_links(folder: Path, state: State) -> None:
    """Point `folder/last` and `folder/best` at the checkpoints that a run has at a step."""
    point_link(folder / LAST, step_folder(folder, state.step).name)
    if state.best is not None:
        point_link(folder / BEST, step_folder(folder, state.best.step).name)
    elif (folder / BEST).is_symlink():
        (folder / BEST).unlink()


class CheckpointWriter:
    """Saves checkpoints one at a time from copies of the tensors, in a thread, while the training goes on.

    What goes wrong there is raised by the next call here. As a context manager it waits at its end.

    Args:
        folder: of the checkpoints.
        together: the threads of all processes, where each has rows of the tensors; all of them save, then.
    """

    def __init__(self, folder: Path, together: Together | None = None) -> None:
        self.folder = folder
        self.together = together
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        """In host memory, reused by each checkpoint."""

    def save(self, state: State, files: Files, **kwargs: Any) -> None:
        """Copy tensors, of any device, and write them as `save_checkpoint` does; waits for the one before."""
        self.wait()
        on_gpu = any(tensor.is_cuda for tensors in files.values() for tensor in tensors.values())
        rows: dict[str, dict[str, Rows]] = {}
        if self.together is not None:
            rows = {file: {name: Rows.of(value) for name, value in files[file].items()} for file in files}
            files = {file: {name: row.tensor for name, row in rows[file].items()} for file in files}
        copies = {file: self._copy(file, tensors) for file, tensors in files.items()}
        rows = {
            file: {name: row._replace(tensor=copies[file][name]) for name, row in rows[file].items()}
            for file in rows
        }
        copied = torch.cuda.current_stream().record_event() if on_gpu else None

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            if self.together is None:
                save_checkpoint(self.folder, state, copies, **kwargs)
            elif self.together.rank:
                self.together.follow(rows)
            else:
                with self.together.lead(rows) as lead:
                    save_checkpoint(self.folder, state, copies, writing=lead, **kwargs)

        self._pending = self._thread.submit(write)

    def _copy(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        before, copies = self._copies.get(file, {}), {}
        for name, tensor in tensors.items():
            copy = before.get(name)
            if copy is None or kind(copy) != kind(tensor):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            # the GPU's own order has it done before what comes next changes the tensor
            copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        self._copies[file] = copies
        return copies

    def poll(self) -> None:
        """Raise what went wrong, if it has; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
            UserError: as `save_checkpoint`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, reason: object, *_: object) -> None:
        try:
            self.wait()
        except UserError:
            if reason is None:  # else the run ends for something worse
                raise
