"""Where else records go, by accelerate's trackers: wandb, mlflow, trackio and others; knows no TensorBoard.

Nothing is sent but to what `log.with` names, as that is set up: by WANDB_MODE=offline or MLFLOW_TRACKING_URI, say.
"""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from fcmae.errors import UserError, brief
from fcmae.files import write_json
from fcmae.training.run_folder import RunFolder

PROJECT = "fcmae"
"""What runs are filed under."""

IDENTITY: Mapping[str, Callable[[Any], str]] = {
    "wandb": lambda run: run.id,
    "mlflow": lambda run: run.info.run_id,
    "trackio": lambda run: run.name,
}
"""What names a run, so that a resumed one goes on in it; with others it begins a new one."""

PICTURES: Mapping[str, Callable[[np.ndarray], Any]] = {
    "wandb": lambda image: [image],
    "swanlab": lambda image: [image],
    "aim": lambda image: image,
    "clearml": lambda image: image,
}
"""Trackers that show pictures, and how they take one."""


def require_trackers(loggers: Sequence[str]) -> None:
    """Check that the packages are there.

    Raises:
        UserError: if one is not.
    """
    for name in loggers:
        if name not in LOGGER_TYPE_TO_CLASS:
            version = importlib.metadata.version("accelerate")
            raise UserError(f"log.with: accelerate {version} has no {name}: pip install --upgrade accelerate")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"log.with: {name} is not installed: pip install {name}, or leave it out")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float]]:
    """Yield nested settings by dotted key; what is no number, switch or text as JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str | float | int) else json.dumps(value)


def _options(name: str, run: RunFolder, identity: str | None) -> dict[str, Any]:
    """Arguments of a tracker; `identity` is of what a resumed run goes on in."""
    match name:
        case "wandb":
            return {"dir": str(run.path), "name": run.path.name, "id": identity, "resume": "allow"}
        case "mlflow":
            return {"run_id": identity, "run_name": run.path.name}
        case "trackio":
            return {"name": identity, "resume": "allow" if identity else "never"}
        case _:
            return {}


class Tracker:
    """One of accelerate's trackers, which may fail: that is said, and the run goes on without it.

    Raises:
        UserError: if it does not start.
    """

    def __init__(
        self, name: str, run: RunFolder, *, resumed: bool, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.name, self.say = name, say
        known = read_identities(run) if resumed else {}
        kind, options = LOGGER_TYPE_TO_CLASS[name], _options(name, run, known.get(name))
        project = os.environ.get("WANDB_PROJECT", PROJECT) if name == "wandb" else PROJECT
        folder = [str(run.path)] if kind.requires_logging_directory else []
        try:
            tracker = kind(project, *folder, **options)
            tracker.start()
            if name not in known:
                tracker.store_init_configuration(dict(flatten(settings)))
            if name in IDENTITY:
                write_json(run.trackers, read_identities(run) | {name: IDENTITY[name](tracker.tracker)})
        except Exception as error:  # each package has its own
            raise UserError(
                f"log.with: {name} does not start ({brief(error)}): set it up, or leave it out", everywhere=False
            ) from error
        self.tracker: GeneralTracker | None = tracker

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of a step."""
        self._try(lambda tracker: tracker.log(dict(values), step=step))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Show an uint8 image (h, w, 3), where the tracker shows any."""
        if self.name in PICTURES:
            shown = PICTURES[self.name](image)
            self._try(lambda tracker: tracker.log_images({name: shown}, step=step))

    def close(self) -> None:
        """Let it send what it still has."""
        self._try(lambda tracker: tracker.finish())

    def _try(self, call: Callable[[Any], None]) -> None:
        if self.tracker is None:
            return
        try:
            call(self.tracker)
        except Exception as error:  # each package has its own; none of them is worth a run
            tracker, self.tracker = self.tracker, None
            self.say(
                f"warning: {self.name} failed and is left out from here on ({brief(error)}); "
                "metrics.jsonl has all records"
            )
            with contextlib.suppress(Exception):
                tracker.finish()


def read_identities(run: RunFolder) -> dict[str, str]:
    """Read what the trackers of a run know it by; nothing where there is no such file, or it is damaged."""
    try:
        return {str(name): str(identity) for name, identity in json.loads(run.trackers.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}
