"""A run folder: what lies where in it, whether a run may go on in it, what its model is; the only file to know."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fcmae.config import RunConfig, Section, parse_config
from fcmae.errors import UserError
from fcmae.files import free_bytes
from fcmae.training.checkpoint import (
    BEST,
    EMA,
    MODEL,
    STATE,
    Checkpoint,
    complete_checkpoints,
    read_checkpoint,
    read_state,
)

HARMLESS = (
    "output",
    "resume",
    "init_from",
    "data.root",
    "data.num_workers",
    "data.max_bad",
    "data.val_",
    "data.crop_pct",
    "train.max_hours",
    "checkpoint",
    "eval",
    "log",
    "visualize",
)
"""Keys, with those below them, that may change while the run stays the same run."""


class RunFolder:
    """Paths of what a run reads and writes; none of them needs to exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.lock = self.path / "lock.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.checkpoints / BEST
        self.reconstructions = self.path / "reconstructions"
        self.encoder = self.path / "encoder"
        """What pretraining leaves, as timm reads it."""
        self.model = self.path / "model"
        """What fine-tuning leaves, as timm reads it."""
        self.evaluation = self.path / "evaluation.json"
        self.confusion = self.path / "confusion.png"

    def reconstruction(self, step: int) -> Path:
        return self.reconstructions / f"step-{step:08d}.png"

    def non_finite(self, step: int) -> Path:
        """Where the samples are named whose loss was not finite."""
        return self.path / f"non-finite-step-{step}.json"

    @classmethod
    def around(cls, path: Path) -> "RunFolder | None":
        """Return the run that `path` is, or that it is a checkpoint, an exported folder or a file of."""
        real = path.resolve()
        runs = map(cls, (real, *real.parents[:3]))
        return next((run for run in runs if run.config.is_file() and run.checkpoints.is_dir()), None)

    @property
    def newest(self) -> Path | None:
        """The newest complete checkpoint folder."""
        return max(complete_checkpoints(self.checkpoints), default=None)


def is_unused(run: RunFolder) -> bool:
    """Whether there is nothing of a run, but for the lock of one that was killed at its start."""
    return not run.path.is_dir() or all(path == run.lock for path in run.path.iterdir())


def require_run_folder(config: RunConfig) -> None:
    """Check that nothing but a run is in the folder; reads no run.

    Raises:
        UserError: if there is.
    """
    run = RunFolder(config.output)
    if run.path.is_file():
        raise UserError(f"output={run.path}: is a file; name a folder")
    if not is_unused(run) and not run.config.is_file():
        raise UserError(f"output={run.path}: holds files that are not a run's; name another folder")


def claim_run_folder(config: RunConfig) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None for a new run; writes nothing.

    The folder is one that `require_run_folder` lets pass.

    Raises:
        UserError: if the folder is in use and `resume` is "never", or it holds another model.
    """
    run = RunFolder(config.output)
    if is_unused(run):
        return None
    if config.resume == "never":
        raise UserError(f"output={run.path}: not empty; go on with resume=auto, or name another folder")
    newest = run.newest
    if newest is None:
        return None
    checkpoint = read_checkpoint(newest)
    stored = parse_config(type(config), checkpoint.state["config"], str(newest))
    for name, value in stored.model:
        if name != "layout" and getattr(config.model, name) != value:
            raise UserError(
                f"{newest}: has model.{name}={value}, but model.{name}={getattr(config.model, name)} is asked for; "
                "name another output folder, or take the old value"
            )
    return checkpoint


def changed_keys(stored: Section, config: Section, prefix: str = "") -> Iterator[str]:
    """Yield "key: old -> new" for each difference that matters between two configurations."""
    for name, old in stored:
        new = getattr(config, name)
        if isinstance(old, Section):
            yield from changed_keys(old, new, f"{prefix}{name}.")
        elif old != new and not f"{prefix}{name}".startswith(HARMLESS):
            yield f"{prefix}{name}: {old} -> {new}"


def require_disk(config: RunConfig, model: nn.Module, *, best: bool = False, ema: bool = False) -> None:
    """Check that the checkpoints to keep, and the one being written, will fit.

    Args:
        best: whether the best is kept besides.
        ema: whether they hold an EMA of the weights.

    Raises:
        UserError: if they will not.
    """
    number = config.checkpoint.keep + best + 1
    needed = checkpoint_bytes(model, ema=ema) * number
    free = free_bytes(Path(config.output))
    if free < needed:
        raise UserError(
            f"output={config.output}: {free / 1e9:.1f} GB free, but {number} checkpoints take "
            f"{needed / 1e9:.1f} GB: free some space, lower checkpoint.keep, or name a folder on another disk"
        )


def checkpoint_bytes(model: nn.Module, *, ema: bool = False) -> int:
    """Size of one checkpoint: the weights, AdamW's two moments of trained ones, and the EMA."""
    return sum(
        (1 + ema + 2 * parameter.requires_grad) * parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
    )


class StoredModel(NamedTuple):
    """The weights that a run, or one of its checkpoints, stands for."""

    file: Path
    """A safetensors file in a checkpoint folder."""
    step: int
    ema: bool
    """Whether they are the EMA's."""
    state: dict[str, Any]
    """What state.json holds: configuration, class names."""

    @property
    def description(self) -> str:
        """Step and kind, such as "step 250, EMA"."""
        return f"step {self.step}, {'EMA' if self.ema else 'raw weights'}"


def stored_model(path: Path, *, last: bool = False, ema: bool | None = None) -> StoredModel | None:
    """Return the model of a run folder: its best evaluated weights, the EMA's where there is one.

    A checkpoint folder stands for itself, and so does a file of weights in one.

    Args:
        path: a run folder, a checkpoint folder or a safetensors file in one; None is returned for anything else.
        last: take the newest checkpoint of a run, not the best.
        ema: take the EMA (True) or the raw weights (False); None for what the run evaluated.

    Raises:
        UserError: if the EMA is asked for and there is none, or state.json is damaged.
    """
    folder = path.parent if path.is_file() else path
    if not (folder / STATE).is_file():
        run = RunFolder(path)
        folder = run.best if (run.best / STATE).is_file() and not last else run.newest
        if folder is None:
            return None
    elif path.is_file():
        if path.name not in (MODEL, EMA):
            return None
        if ema is None:
            ema = path.name == EMA
    state = read_state(folder)
    has_ema = (folder / EMA).is_file()
    if ema and not has_ema:
        raise UserError(f"{path}: holds no EMA weights, only the raw ones")
    if ema is None:
        ema = has_ema and state["config"].get("eval", {}).get("ema") is not False
    return StoredModel(folder / (EMA if ema else MODEL), state["step"], ema, state)
