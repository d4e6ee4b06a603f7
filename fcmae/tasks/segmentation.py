"""Segmentation: a class for each pixel, of a mask; knows no schedule, processes or files."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import SumMetric

from fcmae.config import SegmentationConfig
from fcmae.data import PixelNormalizer, Reading
from fcmae.data.batches import NOT_COUNTED
from fcmae.data.masks import SegmentationSource, open_segmentation
from fcmae.data.pixels import kind_name
from fcmae.data.segments import (
    SegmentationBatch,
    SegmentationDataset,
    SegmentationEvaluation,
    SegmentationView,
    fixed_pairs,
)
from fcmae.encoder.base import Network
from fcmae.encoder.networks import build_network
from fcmae.errors import UserError, blame
from fcmae.heads.segmentation import Segmenter
from fcmae.heads.windows import Strip, Windows, pixel_logits
from fcmae.load import load_weights
from fcmae.metrics import confusion_matrix, per_class_of_pixels
from fcmae.segment_pictures import draw_segmentations
from fcmae.tasks.base import (
    Evaluation,
    Figure,
    Loss,
    Pictures,
    Scores,
    Task,
    Training,
    ValidationPlace,
    describe_start,
    start_network,
)
from fcmae.tasks.pictures import draw_bars
from fcmae.tensors import load_strictly, misfits
from fcmae.training.checkpoint import State

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
        class_pixels: (num_classes,), of `SegmentationSource`; of what was not seen, 1 is taken.
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
class SegmentationScores(Scores):
    """How well the classes of pixels were found, over those of all images of all processes, each counted once."""

    confusion: np.ndarray
    """int64 (num_classes, num_classes): pixels by (true class, predicted class)."""
    images: int
    loss: float
    """Mean cross-entropy over pixels."""

    overall = (Figure("mIoU", "miou"), Figure("pixel accuracy", "pixel_accuracy"), Figure("loss", "loss", ".4f"))
    by_output = (
        Figure("pixels", "pixels", ","),
        Figure("IoU", "iou", ".1%"),
        Figure("recall", "recall", ".1%"),
        Figure("precision", "precision", ".1%"),
    )
    picture = ("IoU by class", "iou.png")

    @property
    def num_images(self) -> int:
        return self.images

    @property
    def figures(self) -> dict[str, float]:
        """Mean intersection over union of the classes that are there or were predicted, and of all pixels."""
        accuracy = float(self.confusion.trace() / self.confusion.sum())
        return {"miou": float(np.nanmean(self.columns["iou"])), "pixel_accuracy": accuracy, "loss": self.loss}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return per_class_of_pixels(self.confusion)

    def draw(self, names: Sequence[str]) -> np.ndarray:
        shares = dict(zip(names, self.columns["iou"].tolist(), strict=True))
        return draw_bars(shares, "intersection over union")


class SegmentationMetric:
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

    def compute(self) -> SegmentationScores:
        """Return the scores over all processes.

        Raises:
            ValueError: if nothing counts.
        """
        confusion = self.confusion.compute().cpu().numpy()
        loss_sum, num_images = float(self.loss_sum.compute()), int(self.num_images.compute())
        if not confusion.any():
            raise ValueError("none of the images could be read, or none has a class")
        return SegmentationScores(confusion, num_images, loss_sum / int(confusion.sum()))


# The task


@dataclass(frozen=True)
class Segmentation(Task[SegmentationConfig]):
    """A class for each pixel."""

    class_weights: tuple[float, ...] | None = None
    """Of the classes in the loss; None for 1 each."""

    scores = SegmentationScores
    head = "head of {} classes"
    predict_options = " --output {run}-masks"

    @classmethod
    def open(cls, config: SegmentationConfig, state: State | None = None) -> tuple[Self, SegmentationDataset]:
        data = config.data
        source = open_segmentation(
            data.name,
            data.root,
            data.split,
            config.model.in_chans,
            mask_root=data.mask_root,
            ignored=data.ignore_index,
            num_classes=config.model.num_classes,
            reading=Reading.of(data),
        )
        require_jitter(source, data.jitter, f"data.jitter={data.jitter}")
        source = source.share(data.label_fraction, config.train.seed)
        weights = None
        if config.train.class_weights == "balanced":
            weights = tuple(balanced_weights(source.class_pixels()).tolist())
        view = SegmentationView(
            data.size,
            mean=data.mean,
            scale=data.scale,
            short_side=data.short_side,
            most_of_one=data.most_of_one,
            hflip=data.hflip,
            jitter=data.jitter,
        )
        task = cls(config, source.class_names, weights)
        return task, SegmentationDataset(source, view=view, seed=config.train.seed)

    def validation_set(self, in_chans: int, training: Training | None = None) -> SegmentationEvaluation:
        data, place = self.config.data, ValidationPlace.of(self.config)
        source = open_segmentation(
            data.name,
            place.root,
            place.split,
            in_chans,
            mask_root=data.val_mask_root or (None if data.val_root else data.mask_root),
            ignored=data.ignore_index,
            class_names=self.names,
            whole_root=place.whole_root,
            reading=Reading.of(data),
            key=place.key,
            remedy=place.remedy,
            mask_key="data.val_mask_root" if data.val_mask_root else "data.mask_root",
        )
        place.require_apart(training, source.images, self.config)
        return SegmentationEvaluation(source)

    def build(self) -> Segmenter:
        model = self.config.model
        with blame("model"):
            encoder = build_network(**model.network)
            return Segmenter(
                encoder, self.num_outputs, head=model.head, dim=model.head_dim, auxiliary=model.auxiliary
            )

    def start_from(self, model: Segmenter, source: str) -> str:
        weights = load_weights(source)
        kept = {name.removeprefix("head."): x for name, x in weights.head.items()}
        keep = self.has_head_of(weights) and bool(kept) and not misfits(model.head, kept)
        done = start_network(model.encoder, weights, source, head=None)
        if keep:
            load_strictly(model.head, kept, weights.path)
        return describe_start(weights, self.head.format(model.num_classes), keep, done)

    def loss(self) -> Loss:
        @functools.cache
        def weights(device: torch.device) -> Tensor | None:
            return None if self.class_weights is None else torch.tensor(self.class_weights, device=device)

        def loss(segment: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> Tensor:
            dice = self.config.train.dice
            return loss_of_heads(segment(images), labels, dice=dice, class_weights=weights(labels.device))

        return loss

    def blank_targets(self, number: int, device: torch.device) -> Tensor:
        return torch.zeros(number, *self.config.data.size, dtype=torch.int64, device=device)

    def metric(self, num_outputs: int, device: torch.device) -> SegmentationMetric:
        return SegmentationMetric(num_outputs, device)

    def count(
        self,
        metric: SegmentationMetric,
        network: Callable[[Tensor], Tensor],
        images: Tensor,
        batch: SegmentationBatch,
    ) -> None:
        """Count images in their own size; those of one size are given to the network together."""
        data, sizes = self.config.data, batch.extents.tolist()
        windows = None if data.steps is None else Windows(data.size, data.steps)
        for height, width in {tuple(size) for size in sizes} - {(0, 0)}:
            alike = [i for i, size in enumerate(sizes) if size == [height, width]]
            strips = pixel_logits(network, images[alike, :, :height, :width], windows, data.short_side)
            metric.update(strips, batch.labels[alike, :height, :width])

    def pictures(self, dataset: Training | Evaluation) -> Pictures | None:
        source, shown = dataset.source, self.config.visualize
        assert isinstance(source, SegmentationSource)
        pixels, truth = fixed_pairs(source, shown.num_images, self.config.data.size)
        if not len(pixels):
            return None

        @torch.inference_mode()
        def draw(network: Network, normalize: PixelNormalizer) -> np.ndarray:
            device = next(network.parameters()).device
            predicted = [network.forward(normalize(some.to(device))).argmax(1) for some in pixels.split(8)]
            names = source.class_names
            return draw_segmentations(
                pixels, truth=truth, predicted=torch.cat(predicted), class_names=names, bands=shown.bands
            )

        return draw
