"""Top-k accuracy, confusion matrix, per-class scores and IoU (torchmetrics); knows no models, images or files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassStatScores


def accuracies(
    num_classes: int, device: torch.device, *, tops: Sequence[int] = (1, 5), sync: bool = True
) -> dict[str, MulticlassStatScores]:
    """Return a metric of top-k accuracy for each k of `tops`, named "topK"; `accuracy` reads it.

    Each is updated with scores (b, num_classes) and labels int64 (b,).

    Args:
        tops: of more than `num_classes` as many as there are are taken.
        sync: count the images of all processes; False for those of this one.
    """
    kwargs: dict[str, Any] = {"average": "micro", "validate_args": False, "sync_on_compute": sync}
    return {
        f"top{k}": MulticlassStatScores(num_classes, top_k=min(k, num_classes), **kwargs).to(device) for k in tops
    }


def accuracy(metric: MulticlassStatScores) -> float:
    """Return the share of images that were classified correctly, exactly; `metric` has seen at least one."""
    hits, _, _, _, images = metric.compute().tolist()
    return hits / images


def confusion_matrix(num_classes: int, device: torch.device) -> MulticlassConfusionMatrix:
    """Return the metric of the number of images by (true class, top class), of all processes together."""
    return MulticlassConfusionMatrix(num_classes, validate_args=False).to(device)


BINS = 10
"""Of confidences, equally wide."""


def calibration(confidences: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
    """Compare how sure a classifier is with how often it is right (arXiv 1706.04599).

    Args:
        confidences: (n,), of the top class.
        hits: booleans (n,), whether that is the right one.

    Returns:
        `ece`, the expected calibration error: by what confidence and accuracy of bins differ, mean over images;
        and by `BINS` of confidence `images`, mean `confidence` and `accuracy`, None in empty ones.
    """
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    images, sure, right = (np.bincount(bins, weights, BINS) for weights in (None, confidences, hits))
    filled = images > 0
    return {
        "ece": float(np.abs(sure - right).sum() / len(confidences)),
        "images": images.astype(int).tolist(),
        "confidence": [float(s / n) if f else None for s, n, f in zip(sure, images, filled, strict=True)],
        "accuracy": [float(r / n) if f else None for r, n, f in zip(right, images, filled, strict=True)],
    }


def per_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return images, recall, precision and F1 of each class of a confusion matrix; a ratio over nothing is 0."""
    return ratios(confusion.diagonal(), confusion.sum(1), confusion.sum(0))


def ratios(hits: np.ndarray, images: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Return images, recall, precision and F1 of each class; a ratio over nothing is 0.

    Args:
        hits: images of the class that were taken for it.
        images: of the class.
        predicted: images that were taken for it.
    """
    return {
        "images": images,
        "recall": hits / np.maximum(images, 1),
        "precision": hits / np.maximum(predicted, 1),
        "f1": 2 * hits / np.maximum(images + predicted, 1),
    }


def per_class_of_pixels(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return pixels, intersection over union, recall and precision of each class of a confusion matrix of pixels.

    A ratio over nothing is NaN, which a mean over classes leaves out (`np.nanmean`).
    """
    hits = confusion.diagonal().astype(np.float64)
    pixels, predicted = confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        return {
            "pixels": pixels,
            "iou": hits / (pixels + predicted - hits),
            "recall": hits / pixels,
            "precision": hits / predicted,
        }
