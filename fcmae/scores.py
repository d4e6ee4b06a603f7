"""How well a classifier does: counts over batches, and a report of them; knows no models, data or processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    num_images: int
    loss: float
    """Mean cross-entropy, without label smoothing."""
    top1: float
    """Share of the images whose first guess is right."""
    top5: float
    """Share of the images with the right class among the first five guesses."""
    confusion: np.ndarray
    """int64 (true class, first guess): number of images."""


class Tally:
    """Counts on the device, so that no batch waits for the one before."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.loss_sum = torch.zeros(
            (), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
        )
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (b, num_classes), labels int64 (b,), of which negative ones are left out."""
        logits = logits.float()
        losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        counted = labels >= 0
        self.loss_sum += losses.where(counted, 0.0).sum(dtype=self.loss_sum.dtype)
        guesses = logits.topk(min(5, self.num_classes)).indices
        self.top5 += (guesses == labels[:, None]).sum()
        self.confusion.index_add_(0, labels.clamp(min=0) * self.num_classes + guesses[:, 0], counted.long())

    def scores(self, total: Callable[[Tensor], Any]) -> Scores:
        """Return the scores of all processes, whose counts `total` sums.

        Raises:
            ValueError: if nothing was counted.
        """
        confusion = total(self.confusion).view(self.num_classes, -1).cpu().numpy()
        num_images = int(confusion.sum())
        if not num_images:
            raise ValueError("no image could be read")
        return Scores(
            num_images=num_images,
            loss=float(total(self.loss_sum)) / num_images,
            top1=float(confusion.trace()) / num_images,
            top5=float(total(self.top5)) / num_images,
            confusion=confusion,
        )


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
    """Describe scores: the numbers of all images, then a line per class."""
    width = max(len("class"), *map(len, class_names))
    columns = per_class(scores.confusion)
    lines = [
        f"images  {scores.num_images:,}",
        f"top-1   {scores.top1:.2%}",
        f"top-5   {scores.top5:.2%}",
        f"loss    {scores.loss:.4f}",
        "",
        f"{'class':{width}}  {'images':>7}  {'recall':>7}  {'precision':>9}  {'F1':>7}",
    ]
    for name, images, recall, precision, f1 in zip(class_names, *columns.values(), strict=True):
        lines.append(f"{name:{width}}  {images:>7,}  {recall:>7.1%}  {precision:>9.1%}  {f1:>7.1%}")
    return "\n".join(lines)
