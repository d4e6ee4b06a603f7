"""Classification: labelled images, network, loss, scores, report; knows no schedule, processes or files."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torchmetrics import SumMetric
from tqdm import tqdm

from fcmae.config import FinetuneConfig
from fcmae.data import (
    AugmentedView,
    BadImage,
    Cover,
    EvaluationDataset,
    LabelledDataset,
    Reading,
    Source,
    labels_by,
    load_batches,
    one_pass,
    open_source,
    overlap,
    share_of_each_class,
)
from fcmae.data.labels import MAX_CLASSES
from fcmae.data.pixels import kind_name
from fcmae.encoder.base import Network
from fcmae.encoder.networks import build_network
from fcmae.errors import UserError, blame
from fcmae.metrics import accuracies, accuracy, confusion_matrix, per_class

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


def training_source(config: FinetuneConfig) -> tuple[Source, tuple[str, ...]]:
    """Open the training images; returns them and the names of their classes.

    Raises:
        UserError: if they have no labels, or not `model.num_classes` classes.
    """
    data = config.data
    source = open_source(data.name, data.root, data.split, config.model.in_chans, reading=Reading.of(data))
    if data.auto_augment is not None and source.dtype != torch.uint8:
        raise UserError(
            f"data.auto_augment={data.auto_augment}: is for pixels of 8 bits, and data.root={data.root} has "
            f"{kind_name(source.dtype)}; set data.auto_augment=null"
        )
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


def training_set(config: FinetuneConfig, source: Source) -> LabelledDataset:
    """Return samples of the training images, augmented by (seed, epoch, index).

    Raises:
        UserError: if timm does not know `data.auto_augment`.
    """
    data = config.data
    with blame("data.auto_augment"):
        view = AugmentedView(
            data.size,
            crop_scale=data.crop_scale,
            crop_padding=data.crop_padding,
            hflip=data.hflip,
            auto_augment=data.auto_augment,
            erase_prob=data.erase_prob,
            mean=data.mean,
            std=data.std,
        )
    return LabelledDataset(source, view=view, seed=config.train.seed)


def validation_set(
    config: FinetuneConfig, class_names: Sequence[str] | None, in_chans: int, training: Source | None = None
) -> EvaluationDataset:
    """Open the images to evaluate on, labelled by `class_names`; None takes their own.

    Raises:
        UserError: if there are none, they are those of `training`, or their classes are not `class_names`.
    """
    data = config.data
    if data.val_split is None:
        raise UserError("data.val_split=null: there is nothing to evaluate; name a split")
    root = data.root if data.val_root is None else data.val_root
    key = "data.root" if data.val_root is None else "data.val_root"
    what = f"{key}={root}, data.val_split={data.val_split}"
    remedy = "name data.val_split or data.val_root, or data.val_split=null for none"
    whole_root = data.val_root is not None
    source = open_source(
        data.name,
        root,
        data.val_split,
        in_chans,
        whole_root=whole_root,
        reading=Reading.of(data),
        key=key,
        remedy=remedy,
    )
    if training is not None and data.val_split != data.split and overlap(training, source):
        raise UserError(f"{what}: training's own images would be evaluated; {remedy}")
    names = class_names or source.class_names
    labels = labels_by(source, names, what)
    missing = [name for name in names or () if source.class_names and name not in source.class_names]
    if missing:
        raise UserError(
            f"{what}: no images of {len(missing)} of the {len(names or ())} classes of training: "
            f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}; each class needs its folder there"
        )
    if names and labels.max() >= len(names):
        raise UserError(f"{what}: has label {labels.max()}, but there are {len(names)} classes, counted from 0")
    return EvaluationDataset(
        source,
        labels,
        class_names=names or numbered(int(labels.max()) + 1),
        view=Cover(data.size, data.crop_pct),
        shape=(in_chans, *data.size),
    )


# The network and its loss


def build_classifier(config: FinetuneConfig, num_classes: int) -> Network:
    """Return an untrained dense network whose classifier has small weights.

    Raises:
        UserError: if there is no such network.
    """
    with blame("model"):
        model = build_network(**config.model.network, num_classes=num_classes)
    assert isinstance(model.classifier_layer, nn.Linear)
    with torch.no_grad():
        model.classifier_layer.weight.mul_(config.model.head_init_scale)
    return model


def build_mixup(config: FinetuneConfig, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function (images, labels) -> images and targets, mixed by mixup or cutmix, which draw on the CPU."""
    if not (config.data.mixup or config.data.cutmix):
        return lambda images, labels: (images, labels)
    return Mixup(config.data.mixup, config.data.cutmix, label_smoothing=0.0, num_classes=num_classes)


def build_loss(config: FinetuneConfig) -> Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]:
    """Return a function (classifier, images, targets) -> cross-entropy with label smoothing.

    Targets are labels int64 (b,), or of mixed images shares of classes (b, classes).
    """

    def loss(classify: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(classify(images), targets, label_smoothing=config.train.label_smoothing)

    return loss


# Scores


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, over the images of all processes."""

    confusion: np.ndarray
    """int64 (num_classes, num_classes): images by (true class, top class)."""
    top1: float
    """Share of the images whose top class is the right one."""
    top5: float
    """Share of the images with the right class among the top five."""
    loss: float
    """Mean cross-entropy, without label smoothing."""

    @property
    def figures(self) -> dict[str, float]:
        """What is written of them in one number each."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}

    @property
    def num_images(self) -> int:
        return int(self.confusion.sum())

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%} top-5 {self.top5:.2%} loss {self.loss:.4f}"


class ScoreMetric:
    """Gathers the scores of a classifier, batch by batch, on `device`."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.accuracies = accuracies(num_classes, device)
        self.confusion = confusion_matrix(num_classes, device)
        precise = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
        self.loss_sum = SumMetric(nan_strategy="disable").set_dtype(precise).to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count logits (b, num_classes) with labels int64 (b,), of which negative ones do not count."""
        counted = labels >= 0
        logits, labels = logits[counted].float(), labels[counted]
        if len(labels):
            for metric in (*self.accuracies.values(), self.confusion):
                metric.update(logits, labels)
            self.loss_sum.update(F.cross_entropy(logits, labels, reduction="none").to(self.loss_sum.dtype).sum())

    def compute(self) -> Scores:
        """Return the scores over all processes.

        Raises:
            ValueError: if nothing counts.
        """
        confusion = self.confusion.compute().cpu().numpy()
        loss_sum = float(self.loss_sum.compute())
        if not confusion.any():
            raise ValueError("none of the images could be read")
        tops = {name: accuracy(metric) for name, metric in self.accuracies.items()}
        return Scores(confusion, **tops, loss=loss_sum / int(confusion.sum()))


def evaluate(
    classify: Callable[[Tensor], Tensor],
    dataset: EvaluationDataset,
    *,
    num_classes: int,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Scores:
    """Evaluate a classifier on all images of a set, spread over the processes, each counted once.

    Args:
        classify: uint8 pixels (b, c, h, w) on `device` -> logits (b, num_classes).
        rank: of this process, which computes its share.
        world_size: number of processes.

    Raises:
        ValueError: if none of them could be read.
    """
    keys = one_pass(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    batches = load_batches(dataset, keys, num_workers=num_workers, pin_memory=device.type == "cuda")
    hidden = rank != 0 or not sys.stderr.isatty()
    metric = ScoreMetric(num_classes, device)
    bad: list[BadImage] = []
    with torch.inference_mode():
        for batch in tqdm(batches, "evaluating", len(keys), leave=False, dynamic_ncols=True, disable=hidden):
            bad += batch.bad
            batch = batch.to(device)
            metric.update(classify(batch.images), batch.labels)
    if bad:
        tqdm.write(f"not counted: {len(bad)} images that do not decode, the first {bad[0].name}: {bad[0].reason}")
    return metric.compute()


# Report


def report(scores: Scores, class_names: Sequence[str]) -> str:
    """Describe scores: the figures of all images, then a line per class."""
    width = max(len("class"), *map(len, class_names))
    lines = [
        f"images           {scores.num_images:,}",
        f"top-1            {scores.top1:.2%}",
        f"top-5            {scores.top5:.2%}",
        f"loss             {scores.loss:.4f}",
        "",
        f"{'class':{width}}  {'images':>7}  {'recall':>7}  {'precision':>9}  {'F1':>7}",
    ]
    columns = per_class(scores.confusion).values()
    for name, images, recall, precision, f1 in zip(class_names, *columns, strict=True):
        lines.append(f"{name:{width}}  {images:>7,}  {recall:>7.1%}  {precision:>9.1%}  {f1:>7.1%}")
    return "\n".join(lines)


def tabulate(scores: Scores, class_names: Sequence[str]) -> dict[str, Any]:
    """Return scores as JSON takes them: the figures of all images, then a column per kind of figure and class."""
    table = {name: column.tolist() for name, column in per_class(scores.confusion).items()}
    return {"images": scores.num_images} | scores.figures | {"classes": {"names": list(class_names)} | table}
