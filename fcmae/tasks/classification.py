"""How well a classifier does, from its logits to a report; knows no models, data or processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor


class Judged(NamedTuple):
    """What became of each image of a batch, on the device, so that no batch waits for the one before."""

    labels: Tensor
    """int64 (b,); negative for what does not count."""
    guesses: Tensor
    """int64 (b,): the likeliest class."""
    top5: Tensor
    """Booleans (b,): whether the right class is among the five likeliest."""
    losses: Tensor
    """float32 (b,): cross-entropy, without label smoothing."""


def judge(logits: Tensor, labels: Tensor) -> Judged:
    """Compare logits (b, classes) with labels int64 (b,), of which negative ones do not count."""
    logits = logits.float()
    guesses = logits.topk(min(5, logits.shape[1])).indices
    return Judged(
        labels=labels,
        guesses=guesses[:, 0],
        top5=(guesses == labels[:, None]).any(1),
        losses=F.cross_entropy(logits, labels.clamp(min=0), reduction="none"),
    )


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    labels: np.ndarray
    """int64 (n,), of the images that count, in any order."""
    guesses: np.ndarray
    """int64 (n,)."""
    loss: float
    """Mean cross-entropy, without label smoothing."""
    top1: float
    """Share of the images whose first guess is right."""
    top5: float
    """Share of the images with the right class among the first five guesses."""


def score(labels: np.ndarray, guesses: np.ndarray, top5: np.ndarray, losses: np.ndarray) -> Scores:
    """Sum up what `judge` found, arrays (n,).

    Raises:
        ValueError: if nothing counts.
    """
    counted = labels >= 0
    if not counted.any():
        raise ValueError("none of the images could be read")
    labels, guesses = labels[counted], guesses[counted]
    return Scores(
        labels=labels,
        guesses=guesses,
        loss=float(losses[counted].mean(dtype=np.float64)),
        top1=float((labels == guesses).mean()),
        top5=float(top5[counted].mean()),
    )


def confusion_matrix(scores: Scores, num_classes: int) -> np.ndarray:
    """Return the number of images by (true class, first guess), int64."""
    cells = np.bincount(scores.labels * num_classes + scores.guesses, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return images, recall, precision and F1 of each class; a ratio over nothing is 0."""
    hits = confusion.diagonal()
    images, guesses = confusion.sum(1), confusion.sum(0)
    return {
        "images": images,
        "recall": hits / np.maximum(images, 1),
        "precision": hits / np.maximum(guesses, 1),
        "f1": 2 * hits / np.maximum(images + guesses, 1),
    }


def report(scores: Scores, class_names: Sequence[str]) -> str:
    """Describe scores: the figures of all images, then a line per class."""
    width = max(len("class"), *map(len, class_names))
    columns = per_class(confusion_matrix(scores, len(class_names)))
    lines = [
        f"images           {len(scores.labels):,}",
        f"top-1            {scores.top1:.2%}",
        f"top-5            {scores.top5:.2%}",
        f"loss             {scores.loss:.4f}",
        "",
        f"{'class':{width}}  {'images':>7}  {'recall':>7}  {'precision':>9}  {'F1':>7}",
    ]
    for name, images, recall, precision, f1 in zip(class_names, *columns.values(), strict=True):
        lines.append(f"{name:{width}}  {images:>7,}  {recall:>7.1%}  {precision:>9.1%}  {f1:>7.1%}")
    return "\n".join(lines)
