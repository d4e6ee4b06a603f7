"""Classification: one class for each image, of its folder or its label; knows no schedule, processes or files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor
from torchmetrics import CatMetric, SumMetric

from fcmae.config import ImageConfig
from fcmae.data import EvaluationDataset, LabelledBatch, LabelledDataset, Source, labels_by, share_of_each_class
from fcmae.data.batches import NOT_COUNTED
from fcmae.data.labels import MAX_CLASSES
from fcmae.errors import UserError
from fcmae.metrics import accuracies, accuracy, calibration, confusion_matrix, per_class
from fcmae.tasks.base import (
    Evaluation,
    Figure,
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
from fcmae.training.checkpoint import State
from fcmae.visualize import draw_captioned, draw_confusion

# Labelled images


def numbered(number: int) -> tuple[str, ...]:
    """Names of classes that have none."""
    return tuple(str(label) for label in range(number))


def count_classes(labels: np.ndarray, what: str) -> int:
    """Return how many classes there are by the training labels alone, which nothing names.

    Raises:
        UserError: if there is none of class 0, or there are more classes than images: mistakes, most likely.
    """
    least, number = int(labels.min()), int(labels.max()) + 1
    known = f"or say that there are so many: a name for each in classes.txt, or model.num_classes={number}"
    if least:
        raise UserError(f"{what}: labels {least} to {number - 1}; classes count from 0: subtract {least}, {known}")
    if number > len(labels):
        raise UserError(f"{what}: label {number - 1} among {len(labels)} images: number classes from 0 on, {known}")
    return number


def training_source(config: ImageConfig) -> tuple[Source, tuple[str, ...]]:
    """Open the training images; returns them and the names of their classes.

    Raises:
        UserError: if they have no labels, or not `model.num_classes` classes.
    """
    data, source = config.data, open_training(config)
    what = f"data.root={data.root}, split {data.split}"
    labels, known = labels_by(source, None, what), config.model.num_classes
    least = count_classes(labels, what) if known is None and not source.class_names else int(labels.max()) + 1
    names = source.class_names or numbered(max(least, min(known or 0, MAX_CLASSES)))
    if known not in (None, len(names)):
        shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise UserError(
            f"model.num_classes={config.model.num_classes}: the images of data.root={data.root} have {len(names)} "
            f"classes ({shown}); null takes as many as there are"
        )
    return share_of_each_class(source, data.label_fraction, config.train.seed), names


# The loss


def build_mix(config: ImageConfig, num_classes: int) -> Mix:
    """Return a function (images, labels) -> images and targets, mixed by mixup or cutmix."""
    if not (config.data.mixup or config.data.cutmix):
        return unmixed
    return Mixup(config.data.mixup, config.data.cutmix, label_smoothing=0.0, num_classes=num_classes)


def build_loss(config: ImageConfig) -> Loss:
    """Return a function (classifier, images, targets) -> cross-entropy with label smoothing.

    Targets are labels int64 (b,), or of mixed images shares of classes (b, classes).
    """

    def loss(classify: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(classify(images), targets, label_smoothing=config.train.label_smoothing)

    return loss


# Scores


MISTAKES = 24
"""Of an evaluation that are kept, at most."""
NAMED_CLASSES = 100
"""Up to how many an evaluation keeps the confusion matrix in numbers."""


class Answer(NamedTuple):
    """What a classifier said of an image."""

    index: int
    label: int
    predicted: int
    confidence: float
    """Softmax of the predicted class."""


@dataclass(frozen=True)
class ClassScores(Scores):
    """How well classes were told apart."""

    confusion: np.ndarray
    """int64 (num_classes, num_classes): images by (true class, top class)."""
    top1: float
    """Share of the images whose top class is the right one."""
    top5: float
    """Share of the images with the right class among the top five."""
    loss: float
    """Mean cross-entropy, without label smoothing."""
    answers: np.ndarray
    """float (images, 4): `Answer`s, in the order of the images."""

    overall = (Figure("top-1", "top1"), Figure("top-5", "top5"), Figure("loss", "loss", ".4f"))
    by_output = (
        Figure("images", "images", ","),
        Figure("recall", "recall", ".1%"),
        Figure("precision", "precision", ".1%"),
        Figure("F1", "f1", ".1%"),
    )
    picture = ("confusion matrix", "confusion.png")

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    @property
    def figures(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return per_class(self.confusion)

    @property
    def mistakes(self) -> list[Answer]:
        """The wrong answers that the network was surest of, the surest first."""
        wrong = self.answers[self.answers[:, 1] != self.answers[:, 2]]
        surest = wrong[np.argsort(-wrong[:, 3], kind="stable")[:MISTAKES]]
        return [Answer(int(i), int(label), int(top), float(sure)) for i, label, top, sure in surest]

    def draw(self, names: Sequence[str]) -> np.ndarray:
        return draw_confusion(self.confusion, names)

    def tabulate(self, names: Sequence[str]) -> dict[str, Any]:
        """Return also how sure it was, mistakes and, of not too many classes, what was taken for what."""
        hits = self.answers[:, 1] == self.answers[:, 2]
        confusion = {"confusion": self.confusion.tolist()} if len(names) <= NAMED_CLASSES else {}
        mistakes = [
            answer._asdict() | {"label": names[answer.label], "predicted": names[answer.predicted]}
            for answer in self.mistakes
        ]
        sureness = calibration(self.answers[:, 3], hits)
        return super().tabulate(names) | confusion | {"calibration": sureness, "mistakes": mistakes}


class ClassMetric:
    """Gathers the scores of a classifier, batch by batch, on `device`."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.accuracies = accuracies(num_classes, device)
        self.confusion = confusion_matrix(num_classes, device)
        precise = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
        self.loss_sum = SumMetric(nan_strategy="disable").set_dtype(precise).to(device)
        self.answers = CatMetric(nan_strategy="disable").set_dtype(precise).to(device)

    def update(self, logits: Tensor, labels: Tensor, indices: Sequence[int]) -> None:
        """Count logits (b, num_classes) with labels int64 (b,), of which negative ones do not count.

        Args:
            indices: of the images.
        """
        surest = logits.float().softmax(1).max(1)
        columns = torch.tensor(indices, device=labels.device), labels, surest.indices, surest.values
        # rows that do not count, too: a process that had none would not take part in gathering
        self.answers.update(torch.stack([column.to(self.answers.dtype) for column in columns], 1))
        counted = labels >= 0
        logits, labels = logits[counted].float(), labels[counted]
        if len(labels):
            for metric in (*self.accuracies.values(), self.confusion):
                metric.update(logits, labels)
            self.loss_sum.update(F.cross_entropy(logits, labels, reduction="none").to(self.loss_sum.dtype).sum())

    def compute(self) -> ClassScores:
        """Return the scores over all processes.

        Raises:
            ValueError: if nothing counts.
        """
        confusion = self.confusion.compute().cpu().numpy()
        loss_sum = float(self.loss_sum.compute())
        if not confusion.any():
            raise ValueError("none of the images could be read")
        tops = {name: accuracy(metric) for name, metric in self.accuracies.items()}
        answers = self.answers.compute()
        assert isinstance(answers, Tensor)
        rows = answers.cpu().double().numpy()
        rows = rows[rows[:, 1] > NOT_COUNTED]
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        return ClassScores(confusion, **tops, loss=loss_sum / int(confusion.sum()), answers=rows)


class Classification(Task[ImageConfig]):
    """One class for each image."""

    scores = ClassScores

    @classmethod
    def open(cls, config: ImageConfig, state: State | None = None) -> tuple[Self, LabelledDataset]:
        source, names = training_source(config)
        return cls(config, names), augment(config, source)

    def validation_set(self, in_chans: int, training: Training | None = None) -> EvaluationDataset:
        source, what = open_validation(self.config, in_chans, training)
        names = self.names or source.class_names
        labels = labels_by(source, names, what)
        missing = [name for name in names or () if source.class_names and name not in source.class_names]
        if missing:
            raise UserError(
                f"{what}: no images of {len(missing)} of the {len(names or ())} classes of training: "
                f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}; each class needs its folder "
                "there"
            )
        if names and labels.max() >= len(names):
            raise UserError(f"{what}: has label {labels.max()}, but there are {len(names)} classes, counted from 0")
        return evaluation_set(self.config, source, labels, names or numbered(int(labels.max()) + 1), in_chans)

    def mix(self) -> Mix:
        return build_mix(self.config, self.num_outputs)

    def loss(self) -> Loss:
        return build_loss(self.config)

    def metric(self, num_outputs: int, device: torch.device) -> ClassMetric:
        return ClassMetric(num_outputs, device)

    def count(
        self, metric: ClassMetric, network: Callable[[Tensor], Tensor], images: Tensor, batch: LabelledBatch
    ) -> None:
        metric.update(network(images), batch.labels, batch.indices)

    def draw_mistakes(self, scores: Scores, dataset: Evaluation) -> np.ndarray | None:
        assert isinstance(scores, ClassScores)
        assert isinstance(dataset, EvaluationDataset)
        if not (mistakes := scores.mistakes):
            return None
        names = dataset.class_names
        captions = [(names[a.label], f"{a.confidence:.0%} {names[a.predicted]}") for a in mistakes]
        return draw_captioned(torch.stack([dataset[answer.index].image for answer in mistakes]), captions)
