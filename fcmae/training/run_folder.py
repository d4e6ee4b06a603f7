"""A run folder: what lies where in it, whether a run may go on in it, what its model is; the only file to know."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fcmae.config import RunConfig, Section, TaskConfig, load_config, parse_config, to_yaml
from fcmae.errors import UserError
from fcmae.files import WRITING, free_bytes, real_path
from fcmae.training.checkpoint import (
    BEST,
    EMA,
    MODEL,
    STATE,
    Checkpoint,
    Damaged,
    State,
    holds_ema,
    newest_intact,
    read_state,
    read_tensors,
    set_aside,
    set_aside_damaged,
    settle,
    step_folder,
    step_folders,
    step_of,
)
from fcmae.training.schedule import Plan

HARMLESS = (
    "output",
    "resume",
    "init_from",
    "data.root",
    "data.dtype",  # which follows from the images
    "data.labels",
    "data.num_workers",
    "data.max_bad",
    "data.mask_root",
    "data.val_",
    "data.stride",
    "data.crop_pct",
    "optim.images_per_update",  # of which the trainer compares what comes out, as of the precision
    "train.precision",
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
        self.starts = self.path / "starts.jsonl"
        """How it was started, and each time it was resumed."""
        self.tensorboard = self.path / "tensorboard"
        self.trackers = self.path / "trackers.json"
        """What other trackers know the run by."""
        self.checkpoints = self.path / "checkpoints"
        self.best = self.checkpoints / BEST
        self.reconstructions = self.path / "reconstructions"
        self.predictions = self.path / "predictions"
        """Pictures of what fine-tuning's network makes of some images."""
        self.encoder = self.path / "encoder"
        """What pretraining leaves, as timm reads it."""
        self.model = self.path / "model"
        """What fine-tuning leaves, as timm reads it."""
        self.evaluation = self.path / "evaluation.json"
        self.mistakes = self.path / "mistakes.png"
        """What --evaluate draws of the images that were answered worst."""
        self.report = self.path / "report.html"
        drawn = self.reconstructions, self.predictions
        self.folders = (self.path, self.checkpoints, *drawn, self.encoder, self.model)
        """Where a run writes; folders of others may lie between."""

    def picture(self, name: str) -> Path:
        """What --evaluate draws."""
        return self.path / name

    def reconstruction(self, step: int) -> Path:
        return self.reconstructions / f"step-{step:08d}.png"

    def mask_ratio(self, ratio: float) -> Path:
        """What a pretrained network makes of images at another mask ratio."""
        return self.reconstructions / f"mask-ratio-{ratio:.2f}.png"

    def prediction(self, step: int) -> Path:
        return self.predictions / f"step-{step:08d}.png"

    def non_finite(self, step: int) -> Path:
        """Where the samples are named whose loss was not finite."""
        return self.path / f"non-finite-step-{step}.json"

    @classmethod
    def around(cls, path: Path) -> "RunFolder | None":
        """Return the run that `path` is, or that it is a checkpoint, an exported folder or a file of."""
        real = real_path(path)
        runs = map(cls, (real, *real.parents[:3]))
        return next((run for run in runs if run.config.is_file() and run.checkpoints.is_dir()), None)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint folder, whatever it is in."""
        return next(reversed(step_folders(self.checkpoints)), None)


def read_records(text: str) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, but for one that a kill cut short."""
    records: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _is_begun(run: RunFolder, kind: type[RunConfig]) -> bool:
    """Whether a run without checkpoints began in a folder: its config.yaml is as one writes it, nobody's own."""
    try:
        config = load_config(kind, run.config)
        return run.metrics.is_file() or to_yaml(config) == run.config.read_text(encoding="utf-8")
    except UserError:
        return False


def is_unused(run: RunFolder) -> bool:
    """Whether there is nothing of a run, but for what one that was killed at its start may leave."""
    return not run.path.is_dir() or all(
        path == run.lock or path.name.startswith(WRITING) for path in run.path.iterdir()
    )


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


def claim_run_folder(config: RunConfig, say: Callable[[str], None] = print) -> Checkpoint | None:
    """Return the checkpoint to resume from, the newest that is intact, or None for a new run.

    Damaged ones that are newer, and a damaged best, are set aside, which `say` reports; nothing else is written.

    The folder is one that `require_run_folder` lets pass.

    Raises:
        UserError: if the folder is in use and `resume` is "never", holds another model, or none of its checkpoints
            is intact.
    """
    run = RunFolder(config.output)
    if is_unused(run):
        return None
    if config.resume == "never":
        raise UserError(f"output={run.path}: not empty; go on with resume=auto, or name another folder")
    checkpoint, wrong = newest_intact(run.checkpoints)
    if checkpoint is None:
        if wrong:
            raise UserError(
                f"{next(iter(wrong.values()))}; no checkpoint in {run.checkpoints} is intact: name another output "
                "folder to begin anew"
            )
        if not _is_begun(run, type(config)):
            raise UserError(f"output={run.path}: holds files that are not a run's; name another folder")
        return None
    if isinstance(config, TaskConfig):
        trained = checkpoint.state.config.get("task", TaskConfig().task)
        if trained != config.task:
            raise UserError(
                f"{checkpoint.path}: of task={trained}, not task={config.task}; name another output folder"
            )
    stored = parse_config(type(config), checkpoint.state.config, str(checkpoint.path))
    for name, value in stored.model:
        if name != "layout" and getattr(config.model, name) != value:
            raise UserError(
                f"{checkpoint.path}: has model.{name}={value}, but model.{name}={getattr(config.model, name)} is "
                "asked for; name another output folder, or take the old value"
            )
    for path, error in wrong.items():
        say(f"{error}; set aside as {set_aside(path).name}, going on from {checkpoint.path.name}")
    if not _best_is_intact(checkpoint, say):
        checkpoint = checkpoint._replace(state=checkpoint.state.model_copy(update={"best": None}))
    settle(run.checkpoints, checkpoint.state, keep=config.checkpoint.keep)
    return checkpoint


def _best_is_intact(checkpoint: Checkpoint, say: Callable[[str], None]) -> bool:
    """Whether there is a best checkpoint; a damaged one is set aside."""
    best, step = checkpoint.state.best, checkpoint.state.step
    if best is None or best.step == step:
        return best is not None
    path = step_folder(checkpoint.path.parent, best.step)
    problem = set_aside_damaged(path) if path.exists() else f"{path}: not there any more"
    if problem:
        say(f"{problem}; it was the best up to step {step}, which is now looked for anew")
    return not problem


def changed_keys(stored: Section, config: Section, prefix: str = "") -> Iterator[str]:
    """Yield "key: old -> new" for each difference that matters between two configurations."""
    for name, old in stored:
        new = getattr(config, name)
        if isinstance(old, Section):
            yield from changed_keys(old, new, f"{prefix}{name}.")
        elif old != new and not f"{prefix}{name}".startswith(HARMLESS):
            yield f"{prefix}{name}: {old} -> {new}"


def require_disk(config: RunConfig, model: nn.Module, plan: Plan, *, best: bool = False, ema: bool = False) -> None:
    """Check that the checkpoints to keep, and the one being written, will fit beside those that are there.

    Args:
        best: whether the best is kept besides.
        ema: whether they hold an EMA of the weights.

    Raises:
        UserError: if they will not.
    """
    number = config.checkpoint.keep + best + 1
    every_epochs = config.checkpoint.keep_every_epochs
    if every_epochs is not None:
        number += min(int(plan.total_epochs / every_epochs), plan.total_steps)
    there = step_folders(RunFolder(config.output).checkpoints)
    needed = checkpoint_bytes(model, ema=ema) * max(1, number - len(there))
    free = free_bytes(Path(config.output))
    if free < needed:
        lower = "checkpoint.keep" if every_epochs is None else "checkpoint.keep, raise checkpoint.keep_every_epochs"
        raise UserError(
            f"output={config.output}: {free / 1e9:.1f} GB free, but {number} checkpoints take "
            f"{needed / 1e9:.1f} GB: free some space, lower {lower}, or name a folder on another disk"
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
    state: State
    """Of that checkpoint: configuration, class names."""

    @property
    def description(self) -> str:
        """Step and kind, such as "step 250, EMA"."""
        return f"step {self.step}, {'EMA' if self.ema else 'raw weights'}"

    def read(self) -> dict[str, Tensor]:
        """Read the tensors.

        Raises:
            UserError: if they are damaged, naming a checkpoint that is intact.
        """
        try:
            return read_tensors(self.file.parent, self.file.name)
        except Damaged as error:
            raise _naming_intact(error, real_path(self.file.parent).parent) from error


def _naming_intact(error: Damaged, checkpoints: Path) -> UserError:
    intact, _ = newest_intact(checkpoints)
    return UserError(f"{error}; {f'{intact.path} is intact' if intact else 'no other checkpoint is intact'}")


def newest_state(run: RunFolder) -> State | None:
    """Return the newest state of a run that can be read; None if it has no checkpoints.

    Raises:
        UserError: if none can be read.
    """
    wrong: list[Damaged] = []
    for folder in reversed(step_folders(run.checkpoints)):
        try:
            return read_state(folder)
        except Damaged as error:
            wrong.append(error)
    if wrong:
        raise wrong[0]
    return None


def stored_model(path: Path, *, last: bool = False, ema: bool | None = None) -> StoredModel | None:
    """Return the model of a run folder: its best evaluated weights, the EMA's where there is one.

    A checkpoint folder stands for itself, and so does a file of weights in one.

    Args:
        path: a run folder, a checkpoint folder or a safetensors file in one; None is returned for anything else.
        last: take the newest checkpoint of a run, not the best.
        ema: take the EMA (True) or the raw weights (False); None for what the run evaluated.

    Raises:
        UserError: if the EMA is asked for and there is none, or the checkpoint is damaged, naming an intact one.
    """
    folder = path.parent if path.is_file() else path
    if not (folder / STATE).is_file() and step_of(real_path(folder)) is None:
        run = RunFolder(path)
        has_best = run.best.is_symlink() or run.best.is_dir()
        folder = run.best if has_best and not last else run.newest
        if folder is None:
            return None
    elif path.is_file():
        if path.name not in (MODEL, EMA):
            return None
        if ema is None:
            ema = path.name == EMA
    try:
        state = read_state(folder)
    except Damaged as error:
        raise _naming_intact(error, real_path(folder).parent) from error
    has_ema = holds_ema(folder, state)
    if ema and not has_ema:
        raise UserError(f"{path}: holds no EMA weights, only the raw ones")
    if ema is None:
        section = state.config.get("eval")
        ema = has_ema and not (isinstance(section, dict) and section.get("ema") is False)
    return StoredModel(folder / (EMA if ema else MODEL), state.step, ema, state)
