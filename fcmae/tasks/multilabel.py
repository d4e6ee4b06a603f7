"""Multi-label classification: any number of classes for each image; knows no schedule, processes or files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from fcmae.config import ImageConfig
from fcmae.data import EvaluationDataset, LabelledDataset, Source
from fcmae.data.tables import LABELS, Row, Table, as_classes
from fcmae.errors import UserError
from fcmae.metrics import ratios
from fcmae.tasks.base import (
    Figure,
    Gathered,
    Loss,
    Mix,
    Scores,
    Task,
    Training,
    augment,
    evaluation_set,
    open_training,
    open_validation,
    unmixed,
)
from fcmae.tasks.classification import numbered
from fcmae.tasks.pictures import draw_bars
from fcmae.tasks.targets import Labels, columns_by, read_targets, require_outputs, share
from fcmae.training.checkpoint import State

THRESHOLD = 0.5
"""Probability above which an image counts as of a class."""


class MultiHotMixup(Mixup):
    """timm's mixup and cutmix, for labels (b, classes) that need not add up to one."""

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        share: Any = self._mix_batch(x)
        return x, target * share + target.flip(0) * (1 - share)


@dataclass(frozen=True)
class MultiLabelScores(Scores):
    """How well each class was found."""

    average_precision: np.ndarray
    """(classes,); NaN for classes that no image is of."""
    counts: np.ndarray
    """int64 (3, classes): images found rightly, images of the class, images found, at `THRESHOLD`."""
    images: int
    loss: float
    """Mean binary cross-entropy, without label smoothing."""

    overall = (Figure("mAP", "map"), Figure("F1", "f1"), Figure("loss", "loss", ".4f"))
    by_output = (
        Figure("images", "images", ","),
        Figure("AP", "ap", ".1%"),
        Figure("recall", "recall", ".1%"),
        Figure("precision", "precision", ".1%"),
        Figure("F1", "f1", ".1%"),
    )
    picture = ("AP by class", "average-precision.png")

    @property
    def num_images(self) -> int:
        return self.images

    @property
    def figures(self) -> dict[str, float]:
        """Mean average precision and mean F1 of the classes that images are of, and the loss."""
        occurs = self.counts[1] > 0
        mean_ap, mean_f1 = self.average_precision[occurs].mean(), self.columns["f1"][occurs].mean()
        return {"map": float(mean_ap), "f1": float(mean_f1), "loss": self.loss}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return ratios(*self.counts) | {"ap": self.average_precision}

    def draw(self, names: Sequence[str]) -> np.ndarray:
        return draw_bars(dict(zip(names, self.average_precision.tolist(), strict=True)), "average precision")


class MultiLabelMetric(Gathered):
    """Gathers logits (b, classes) and labels 0 or 1 (b, classes), of which negative ones do not count."""

    def compute(self) -> MultiLabelScores:
        logits, labels = self.counted(lambda labels: labels >= 0)
        found, true = logits > np.log(THRESHOLD / (1 - THRESHOLD)), labels > 0
        occurs = true.any(0)
        if not occurs.any():
            raise ValueError("none of the images that could be read is of any class")
        precision = torch.full((labels.shape[1],), torch.nan)
        precision[occurs] = multilabel_average_precision(
            logits[:, occurs].sigmoid(),
            true[:, occurs].long(),
            int(occurs.sum()),
            average="none",
            validate_args=False,
        )
        return MultiLabelScores(
            precision.numpy(),
            torch.stack([(found & true).sum(0), true.sum(0), found.sum(0)]).numpy(),
            len(labels),
            float(F.binary_cross_entropy_with_logits(logits.double(), labels.double())),
        )


class MultiLabel(Task[ImageConfig]):
    """Any number of classes for each image."""

    scores = MultiLabelScores

    @classmethod
    def open(cls, config: ImageConfig, state: State | None = None) -> tuple[Self, LabelledDataset]:
        data, source = config.data, open_training(config)
        what = f"data.root={data.root}, split {data.split}"
        labels, names = read_labels(config, source, what, validation=False)
        names = names or numbered(labels.shape[1])
        require_outputs(config, names, what)
        numbers = labels.sum(0, np.int64).tolist()
        if never := [name for name, number in zip(names, numbers, strict=True) if not number]:
            raise UserError(
                f"{what}: no image is of {len(never)} of the {len(names)} classes, the first {never[0]}; remove "
                "them"
            )
        source, labels = share(source, labels, data.label_fraction, config.train.seed)
        return cls(config, names), augment(config, source, labels)

    def validation_set(self, in_chans: int, training: Training | None = None) -> EvaluationDataset:
        source, what = open_validation(self.config, in_chans, training)
        found = read_labels(self.config, source, what, validation=True, names=self.names)
        names = self.names or found[1] or numbered(found[0].shape[1])
        labels = columns_by(found, names, what)
        if not labels.any():
            raise UserError(f"{what}: no image is of any class, so that there is nothing to find")
        return evaluation_set(self.config, source, labels, names, in_chans)

    def mix(self) -> Mix:
        data = self.config.data
        mixup = MultiHotMixup(data.mixup, data.cutmix) if data.mixup or data.cutmix else unmixed
        return lambda images, labels: mixup(images, labels.float())

    def loss(self) -> Loss:
        smoothing = self.config.train.label_smoothing

        def loss(classify: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> Tensor:
            logits = classify(images)
            return F.binary_cross_entropy_with_logits(logits, targets * (1 - smoothing) + smoothing / 2)

        return loss

    def metric(self, num_outputs: int, device: torch.device) -> MultiLabelMetric:
        return MultiLabelMetric(device)


def read_labels(
    config: ImageConfig, source: Source, what: str, *, validation: bool, names: tuple[str, ...] | None = None
) -> Labels:
    """Return which classes images are of, 0 or 1 as int8 (n, classes), and the names of the classes.

    Args:
        names: of the classes that a CSV file's lists of names may be of; None for those that occur.

    Raises:
        UserError: as `read_targets`, or if labels are other than 0 and 1.
    """

    def of_table(table: Table, rows: Sequence[Row]) -> Labels:
        labels, own = as_classes(table, rows)
        if names is None or table.columns != (LABELS,):
            return labels, own
        absent = [name for name in names if name not in own]  # not every class need occur in a list
        return np.concatenate([labels, np.zeros((len(rows), len(absent)), np.int8)], 1), (*own, *absent)

    labels, own = read_targets(
        config,
        source,
        what,
        validation=validation,
        of_table=of_table,
        dtypes="biu",
        wanted="0 and 1, (n, classes)",
    )
    if labels.min() < 0 or labels.max() > 1:
        raise UserError(
            f"{what}: labels.npy has numbers from {labels.min()} to {labels.max()}; task=multilabel takes 0 and 1"
        )
    return labels.astype(np.int8), own
