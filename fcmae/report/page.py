"""The page of a run, one HTML file that loads nothing: pictures, curves and text laid out by report.html."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from fcmae import __version__
from fcmae.config import FinetuneConfig, PretrainConfig, to_yaml
from fcmae.errors import UserError, brief
from fcmae.report.panels import computing, learning
from fcmae.report.plots import DARK, LIGHT, draw_calibration, draw_panel
from fcmae.report.run import Record, Run, damaged
from fcmae.report.verdict import Finding
from fcmae.training.checkpoint import step_of
from fcmae.training.progress import duration
from fcmae.training.summary import updates_s

SHOTS = 16
"""Pictures of a gallery, at most: the first, the last and others between."""
WIDEST = 1200
"""Pixels of a picture; wider ones are shrunk."""
QUALITY = 82
"""Of WebP: patches keep their edges."""


@dataclass(frozen=True)
class Shot:
    """A picture on the page."""

    title: str
    source: str
    """A data URI."""
    width: int
    height: int


def embed(path: Path, title: str) -> Shot:
    """Put a picture into a data URI, photographs compressed so that one can send them.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: not a whole picture: {error}; remove it, and the report leaves it out") from error
    picture.thumbnail((WIDEST, picture.height))
    file = io.BytesIO()
    picture.save(file, format="webp", quality=QUALITY, method=4)
    data = base64.b64encode(file.getvalue()).decode()
    return Shot(title, f"data:image/webp;base64,{data}", *picture.size)


def over_time(folder: Path) -> list[Shot]:
    """Return the pictures of fixed images that a run drew, by step, `SHOTS` of them where there are more."""
    found = {step_of(path.with_suffix("")): path for path in folder.glob("step-*.png")}
    steps = sorted(step for step in found if step is not None)
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), SHOTS)).round().astype(int)
    return [embed(found[steps[i]], f"after update {steps[i]:,}") for i in chosen]


class Gallery(NamedTuple):
    """Pictures that one goes through with a slider."""

    title: str
    over: str
    shots: list[Shot]
    first: int
    """Which is shown first."""


def galleries(run: Run) -> list[Gallery]:
    """Return what the run drew: the same images over training time, and at its end at several mask ratios."""
    if not isinstance(run.config, PretrainConfig):
        shots = over_time(run.folder.predictions)
        return [Gallery("Predictions", "over training time", shots, len(shots) - 1)]
    shots, own = over_time(run.folder.reconstructions), run.config.model.mask_ratio
    paths = sorted(run.folder.reconstructions.glob("mask-ratio-[01].[0-9][0-9].png"))
    ratios = [float(path.stem.removeprefix("mask-ratio-")) for path in paths]
    masked = [embed(path, f"{ratio:.0%} of the patches masked") for path, ratio in zip(paths, ratios, strict=True)]
    nearest = min(range(len(ratios)), key=lambda i: abs(ratios[i] - own), default=0)
    return [
        Gallery("Reconstructions", "over training time", shots, len(shots) - 1),
        Gallery("Mask ratios", "from low to high", masked, nearest),
    ]


def draw_panels(run: Run) -> list[Markup]:
    """Draw every figure of the records: what is learnt, then how good it is, then how fast."""
    panels = [*learning(run.records, run.scores, run.reference.records if run.reference else ())]
    panels += computing(run.records, shown=frozenset().union(*(panel.keys for panel in panels)))
    return [draw_panel(panel) for panel in panels]


# Facts


def headline(run: Run) -> dict[str, str]:
    """Return the figures that one looks for first."""
    losses = run.curve("loss")
    timed = [record for record in run.records if {"loss", "seen_images", "images_per_s"} <= record.keys()]
    seconds, images = updates_s(timed), max((record["seen_images"] for record in timed), default=0)
    figures = {}
    if losses:
        figures["loss"] = f"{losses.values[0]:.3f} → {losses.values[-1]:.3f}"
    if knn := run.curve("knn_top1"):
        figures["k-NN top-1"] = f"{knn.values[0]:.1%} → {knn.values[-1]:.1%}"
    if run.scores:
        figure = run.scores.overall[0]
        for prefix in ("ema", "val"):
            if points := run.curve(f"{prefix}_{figure.key}"):
                figures.setdefault(figure.title, figure.show(points.values.max()))
    figures["updates"] = f"{run.step:,}" + (f" of {run.plan.total_steps:,}" if run.plan else "")
    if seconds:
        figures |= {"duration": duration(seconds), "images/s": f"{images / seconds:,.0f}"}
    return figures


def what(run: Run) -> str:
    """Say in a line what ran."""
    model, data = run.config.model, run.config.data
    variant = model.variant if isinstance(model.variant, str) else "of depths {}, widths {}".format(*model.variant)
    name = f"ConvNeXt V{model.version} {variant}" if "/" not in variant else variant
    kind = "Pretraining" if isinstance(run.config, PretrainConfig) else f"Fine-tuning, {run.config.task},"
    size = " × ".join(map(str, data.size))
    return f"{kind} of {name} on {data.root}, images of {size} pixels"


def environment(run: Run) -> dict[str, str]:
    """Return what the run was computed with, as far as it was noted."""
    facts: dict[str, str] = {}
    if run.state:
        facts |= {"fcmae": run.state.fcmae, "torch": run.state.torch}
    if run.starts:
        keys = ("python", "device", "cores", "precision", "batch")
        facts |= {key: str(run.starts[-1][key]) for key in keys if key in run.starts[-1]}
    elif run.state:
        facts |= {"processes": str(run.state.num_processes), "precision": run.state.precision or "not noted"}
    return facts


def commands(run: Run) -> list[tuple[str, str]]:
    """Return when and after which update the run was started, and the command."""

    def when(start: Record) -> str:
        step = start.get("step")
        after = f"resumed after update {step:,}" if isinstance(step, int) and step else "started"
        return f"{after}, {_day(start.get('time'))}"

    return [(when(start), str(start.get("command", ""))) for start in run.starts]


def _day(seconds: object) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC" if isinstance(seconds, int | float) else ""


def score_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return titles and rows of the figures of each output in evaluation.json, the worst first."""
    if run.scores is None or run.scores.outputs not in run.evaluation:
        return [], []
    table = run.evaluation[run.scores.outputs]
    figures = [figure for figure in run.scores.by_output if figure.key in table]
    names, columns = table["names"], [table[figure.key] for figure in figures]
    keys = [figure.key for figure in figures]
    best_by = run.scores.overall[0].key
    column = columns[keys.index(best_by) if best_by in keys else min(1, len(keys) - 1)]
    order = sorted(range(len(names)), key=lambda i: column[i] or 0)
    cells = [
        ["-" if v is None else figure.show(v) for v in column]
        for figure, column in zip(figures, columns, strict=True)
    ]
    titles = [run.scores.output, *(figure.title for figure in figures)]
    return titles, [[names[i], *(column[i] for column in cells)] for i in order]


def is_classifier(run: Run) -> bool:
    return isinstance(run.config, FinetuneConfig) and run.config.task == "classification"


def missing(run: Run) -> list[str]:
    """Say what a report could show that this run has not kept, and what would keep it."""
    lacking = []
    if not run.starts:
        lacking.append("the command line: this run is older than starts.jsonl")
    if run.scores and not run.evaluation:
        what = f"scores by {run.scores.output}, {run.scores.picture[0]}"
        if is_classifier(run):
            what += ", worst mistakes and calibration"
        lacking.append(f"{what}: fcmae finetune --evaluate {run.folder.path}")
    elif is_classifier(run) and "calibration" not in run.evaluation:
        lacking.append(f"worst mistakes and calibration: fcmae finetune --evaluate {run.folder.path}")
    elif run.scores and not is_classifier(run):
        lacking.append("worst mistakes and calibration, which are kept of task=classification alone")
    return lacking


def scores(run: Run) -> dict[str, Any]:
    """Return what `fcmae finetune --evaluate` left: its figures, its table, its picture.

    Raises:
        UserError: if it is not what is left there.
    """
    try:
        return _scores(run)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(damaged(run.folder, f"{type(error).__name__}: {brief(error)}")) from error


def _scores(run: Run) -> dict[str, Any]:
    titles, rows = score_table(run)
    figures = run.scores.overall if run.scores and run.evaluation else ()
    pictures = {run.scores.picture[0]: run.folder.picture(run.scores.picture[1])} if figures and run.scores else {}
    if run.evaluation.get("mistakes"):
        pictures["worst mistakes, each with its class and how sure the network was of another"] = (
            run.folder.mistakes
        )
    calibration = run.evaluation.get("calibration")
    return {
        "weights": run.evaluation.get("weights", ""),
        "figures": {f.title: f.show(run.evaluation[f.key]) for f in figures if f.key in run.evaluation},
        "titles": titles,
        "rows": rows,
        "pictures": [embed(path, title) for title, path in pictures.items() if path.is_file()],
        "calibration": draw_calibration(calibration) if calibration else None,
    }


def render(run: Run, findings: Sequence[Finding]) -> str:
    """Return the page: it is complete without JavaScript, and asks for nothing but itself."""
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return jinja.get_template("report.html").render(
        version=__version__,
        name=run.folder.path.resolve().name,
        what=what(run),
        headline=headline(run),
        findings=findings,
        galleries=galleries(run),
        panels=draw_panels(run),
        light=LIGHT,
        dark=DARK,
        reference=run.reference,
        scores=scores(run),
        commands=commands(run),
        environment=environment(run),
        missing=missing(run),
        config=to_yaml(run.config),
        written=_day(datetime.now(UTC).timestamp()),
    )
