"""Which figures of a run's records make which plots: what is learnt, how good it is, how fast; draws nothing."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fcmae.report.run import Curve, curve
from fcmae.tasks.base import Scores

Figures = Sequence[Mapping[str, float]]
CLOCK = {"step", "time", "epoch", "seen_images"}
COLLAPSE = "cosine_distance/"
TITLES = {
    # figure: title
    "loss": "training loss",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "memory_gb": "memory in GB",
    "images_per_s": "images per second",
    "data_wait": "time spent waiting for images",
}


class Panel(NamedTuple):
    """A plot: figures of the records, by update."""

    title: str
    curves: Mapping[str, Curve]
    """By what the legend calls them."""
    reference: Curve | None = None
    """The same in the reference log."""
    percent: bool = False
    keys: frozenset[str] = frozenset()
    """What of the records is shown."""


def keys_of(records: Figures, prefix: str = "") -> list[str]:
    """Return the names of figures that begin so."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if key.startswith(prefix) and key not in CLOCK]


def learning(records: Figures, scores: type[Scores] | None, reference: Figures = ()) -> Iterator[Panel]:
    """Yield what says whether a run is learning, as far as it is in the records.

    Args:
        scores: of a fine-tuning's task.
        reference: records to compare with.
    """
    yield from _alone(records, "loss", curve(reference, "loss") or None)
    yield from _alone(records, "lr", curve(reference, "lr") or None)
    yield from _together(records, "k-NN accuracy", {"knn_top1": "top-1", "knn_top5": "top-5"}, percent=True)
    stages = {key: key.rpartition("/")[2].replace("_", " ") for key in sorted(keys_of(records, COLLAPSE))}
    yield from _together(records, "cosine distance between channels", stages)
    for figure in scores.overall if scores else ():
        names = {f"val_{figure.key}": "weights", f"ema_{figure.key}": "EMA"}
        yield from _together(records, f"{figure.title}, validation", names, percent=figure.form.endswith("%"))


def computing(records: Figures, *, shown: Iterable[str]) -> Iterator[Panel]:
    """Yield every other figure of the records, speed last."""
    last = ("images_per_s", "data_wait")
    for key in [*(key for key in keys_of(records) if key not in (*shown, *last)), *last]:
        yield from _alone(records, key)


def _alone(records: Figures, key: str, reference: Curve | None = None) -> Iterator[Panel]:
    if points := curve(records, key):
        title, percent = TITLES.get(key, key), key == "data_wait"
        yield Panel(title, {"this run": points}, reference, percent, frozenset([key]))


def _together(records: Figures, title: str, names: Mapping[str, str], *, percent: bool = False) -> Iterator[Panel]:
    curves = {name: points for key, name in names.items() if (points := curve(records, key))}
    if curves:
        yield Panel(title, curves, None, percent, frozenset(names))
