"""Segmentation: loss, scores, report; knows no schedule, processes or files."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import SumMetric
from tqdm import tqdm

from fcmae.data.batches import NOT_COUNTED, BadImage, load_batches
from fcmae.data.masks import SegmentationSource
from fcmae.data.pixels import kind_name
from fcmae.data.sampling import one_pass
from fcmae.data.segments import SegmentationBatch, SegmentationEvaluation
from fcmae.errors import UserError
from fcmae.heads.windows import Strip
from fcmae.metrics import confusion_matrix, per_class_of_pixels

# The images


def require_jitter(source: SegmentationSource, jitter: float, what: str) -> None:
    """Check that colours can be changed, if that is asked for.

    Raises:
        UserError: beginning with `what`, such as "data.jitter=0.5", if not.
    """
    if jitter and (source.dtype != torch.uint8 or source.channels != 3):
        raise UserError(
            f"{what}: is for RGB of 8 bits, and these images have {source.channels} channels of "
            f"{kind_name(source.dtype)}; set it to 0"
        )


# Loss


def balanced_weights(class_pixels: np.ndarray) -> Tensor:
    """Return a weight for each class: the median of the classes' pixels over its own (arXiv 1411.4734).

    Args:
        class_pixels: (num_classes,), see `SegmentationSource`; of what was not seen, 1 is taken.
    """
    pixels = torch.from_numpy(class_pixels).double().clamp(min=1)
    return (pixels.quantile(0.5) / pixels).float()


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return one minus the mean soft Dice coefficient over the classes that the labels have.

    2 sum(p y) / (sum(p) + sum(y)), over the pixels of the batch that have a class, p being the softmax.

    Args:
        logits: (b, num_classes, h, w).
        labels: int64 (b, h, w), `NOT_COUNTED` where there is none.
    """
    num_classes = logits.shape[1]
    counted = labels != NOT_COUNTED
    probabilities = logits.float().softmax(1) * counted[:, None]
    chosen = labels.clamp(min=0)
    hits = probabilities.gather(1, chosen[:, None])[:, 0]  # zero where nothing counts
    overlap = hits.new_zeros(num_classes).index_add(0, chosen.flatten(), hits.flatten())
    pixels = hits.new_zeros(num_classes).index_add(0, chosen.flatten(), counted.flatten().float())
    present = pixels > 0
    dice = 2 * overlap / (probabilities.sum((0, 2, 3)) + pixels).clamp(min=1)
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def segmentation_loss(
    logits: Tensor, labels: Tensor, *, dice: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy over the pixels that have a class, and `dice` times the Dice loss.

    A batch without such pixels has loss 0.

    Args:
        logits: (b, num_classes, h, w).
        labels: whole numbers (b, h, w), `NOT_COUNTED` where there is none.
        dice: weight of `dice_loss`.
        class_weights: (num_classes,), of each pixel's cross-entropy; the mean is a weighted one.
    """
    labels = labels.long()
    kwargs: dict[str, Any] = {"weight": class_weights, "ignore_index": NOT_COUNTED, "reduction": "sum"}
    total = F.cross_entropy(logits.float(), labels, **kwargs)
    counted = labels != NOT_COUNTED
    weights = counted if class_weights is None else class_weights[labels.clamp(min=0)] * counted
    loss = total / weights.sum().clamp(min=1e-6)
    return loss + dice * dice_loss(logits, labels) if dice else loss


AUXILIARY_WEIGHT = 0.4
"""Of the second head's loss (UPerNet's recipes)."""


def loss_of_heads(
    outputs: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    *,
    dice: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the loss of what a `Segmenter` gives in training, the second head's with `AUXILIARY_WEIGHT`."""
    logits, *auxiliary = (outputs,) if isinstance(outputs, Tensor) else outputs
    loss = segmentation_loss(logits, labels, dice=dice, class_weights=class_weights)
    for other in auxiliary:
        loss = loss + AUXILIARY_WEIGHT * segmentation_loss(other, labels, class_weights=class_weights)
    return loss


# Scores


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, over the pixels of all images of all processes, each counted once."""

    confusion: np.ndarray
    """int64 (num_classes, num_classes): pixels by (true class, predicted class)."""
    num_images: int
    loss: float
    """Mean cross-entropy over pixels."""

    @property
    def miou(self) -> float:
        """Mean intersection over union, over the classes that are there or were predicted."""
        return float(np.nanmean(per_class_of_pixels(self.confusion)["iou"]))

    @property
    def pixel_accuracy(self) -> float:
        """Share of the pixels whose class was predicted."""
        return float(self.confusion.trace() / self.confusion.sum())

    @property
    def figures(self) -> dict[str, float]:
        """What is written of them in one number each."""
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "loss": self.loss}

    def __str__(self) -> str:
        return f"mIoU {self.miou:.2%} pixel accuracy {self.pixel_accuracy:.2%} loss {self.loss:.4f}"


class ScoreMetric:
    """Gathers the scores of predictions, strip by strip, on `device`."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        precise = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
        self.confusion = confusion_matrix(num_classes, device)
        self.loss_sum = SumMetric(nan_strategy="disable").set_dtype(precise).to(device)
        self.num_images = SumMetric().to(device)

    def update(self, strips: Iterator[Strip], labels: Tensor) -> None:
        """Count logits, from the top, of images with labels (b, h, w), `NOT_COUNTED` where nothing counts."""
        self.num_images.update(len(labels))
        for top, logits in strips:
            counted = labels[:, top : top + logits.shape[2]].long()
            where = counted != NOT_COUNTED
            if where.any():
                self.confusion.update(logits.argmax(1)[where], counted[where])
                losses = F.cross_entropy(logits.float(), counted, ignore_index=NOT_COUNTED, reduction="none")
                self.loss_sum.update(losses.to(self.loss_sum.dtype).sum())

    def compute(self) -> Scores:
        """Return the scores over all processes.

        Raises:
            ValueError: if nothing counts.
        """
        confusion = self.confusion.compute().cpu().numpy()
        loss_sum, num_images = float(self.loss_sum.compute()), int(self.num_images.compute())
        if not confusion.any():
            raise ValueError("none of the images could be read, or none has a class")
        return Scores(confusion, num_images, loss_sum / int(confusion.sum()))


def evaluate(
    segment: Callable[[Tensor], Iterator[Strip]],
    dataset: SegmentationEvaluation,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Scores:
    """Evaluate on all images of a set, whole, in their own size, spread over the processes, each counted once.

    Args:
        segment: pixels (b, c, h, w) on `device` -> logits of each pixel, see `pixel_logits`.
        batch_size: images that are loaded together; those of one size are given to `segment` together.
        rank: of this process, which computes its share.
        world_size: number of processes.

    Raises:
        ValueError: if none of them could be read.
    """
    keys = one_pass(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    batches = load_batches(dataset, keys, num_workers=num_workers, pin_memory=device.type == "cuda")
    hidden = rank != 0 or not sys.stderr.isatty()
    metric = ScoreMetric(dataset.source.num_classes, device)
    bad: list[BadImage] = []
    with torch.inference_mode():
        for batch in tqdm(batches, "evaluating", len(keys), leave=False, dynamic_ncols=True, disable=hidden):
            assert isinstance(batch, SegmentationBatch)
            bad += batch.bad
            sizes = batch.extents.tolist()
            images, labels = batch.images.to(device), batch.labels.to(device)
            for height, width in {tuple(size) for size in sizes} - {(0, 0)}:
                alike = [i for i, size in enumerate(sizes) if size == [height, width]]
                metric.update(segment(images[alike, :, :height, :width]), labels[alike, :height, :width])
    if bad:
        tqdm.write(f"not counted: {len(bad)} images that do not decode, the first {bad[0].name}: {bad[0].reason}")
    return metric.compute()


# Report


def report(scores: Scores, class_names: Sequence[str]) -> str:
    """Describe scores: the figures of all pixels, then a line per class."""
    width = max(len("class"), *map(len, class_names))
    lines = [
        f"images           {scores.num_images:,}",
        f"mIoU             {scores.miou:.2%}",
        f"pixel accuracy   {scores.pixel_accuracy:.2%}",
        f"loss             {scores.loss:.4f}",
        "",
        f"{'class':{width}}  {'pixels':>13}  {'IoU':>7}  {'recall':>7}  {'precision':>9}",
    ]
    columns = per_class_of_pixels(scores.confusion).values()

    def share(value: float, room: int) -> str:
        return f"{'-':>{room}}" if np.isnan(value) else f"{value:>{room}.1%}"

    for name, pixels, iou, recall, precision in zip(class_names, *columns, strict=True):
        shares = f"{share(iou, 7)}  {share(recall, 7)}  {share(precision, 9)}"
        lines.append(f"{name:{width}}  {pixels:>13,}  {shares}")
    return "\n".join(lines)


def tabulate(scores: Scores, class_names: Sequence[str]) -> dict[str, Any]:
    """Return scores as JSON takes them: the figures of all pixels, then a column per kind of figure and class.

    A ratio over nothing is null.
    """
    columns = per_class_of_pixels(scores.confusion).items()
    table = {name: [None if np.isnan(value) else value for value in column.tolist()] for name, column in columns}
    return {"images": scores.num_images} | scores.figures | {"classes": {"names": list(class_names)} | table}
