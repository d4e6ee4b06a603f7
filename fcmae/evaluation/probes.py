"""k-NN and linear probe of frozen features; knows a model only as a callable."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassStatScores
from tqdm import tqdm

from fcmae.config import DataSection, ProbeSection
from fcmae.data.batches import NOT_COUNTED, BadImage, EvaluationDataset, load_batches
from fcmae.data.labels import labels_by
from fcmae.data.pixels import Reading
from fcmae.data.sampling import one_pass
from fcmae.data.sources import Source, Subset, open_source, overlap
from fcmae.data.views import Cover
from fcmae.errors import UserError
from fcmae.metrics import accuracies, accuracy
from fcmae.seeding import seeded
from fcmae.weights.base import evaluation_crop

NEIGHBOURS = (10, 20, 100, 200)
"""Numbers of neighbours that DINO reports (arXiv 2104.14294); 20 is usually the best."""
TEMPERATURE = 0.07
"""DINO's, of the votes: a neighbour of cosine c weighs exp(c / temperature)."""
L2 = tuple(10.0**exponent for exponent in range(1, -7, -1))
"""Penalties that a linear probe chooses from, strongest first."""
CHUNK = 2**26
"""Numbers in the largest intermediate of nearest neighbours and probe."""


class Splits(NamedTuple):
    """Images to learn classes from, and images to classify."""

    train: EvaluationDataset
    val: EvaluationDataset
    num_classes: int


class Features(NamedTuple):
    """Of labelled images."""

    values: Tensor
    """float32 (n, d)."""
    labels: Tensor
    """int64 (n,)."""


class Accuracy(NamedTuple):
    """Shares of images classified correctly."""

    top1: float
    top5: float | None
    """None with five classes or fewer, where it says nothing."""


def labelled_splits(source: Source, data: DataSection, settings: ProbeSection, in_chans: int) -> Splits:
    """Return the labelled images of `source`, which is `data.split`, and those of `settings.val_split`.

    Where a limit or a held-out part chooses among images, it chooses at random, always the same.

    Raises:
        UserError: if a split has no labels or is not there, or there is but one class.
    """
    names, limit = source.class_names, settings.num_images
    where = f"{data.root}, split {data.split}"
    labels = labels_by(source, names, where)
    order = np.random.default_rng(0).permutation(len(source))
    if settings.val_split is None:
        held_out = max(1, len(source) // 5)
        chosen, val_chosen = order[held_out:], order[:held_out]
        val_source, val_labels = source, labels
    else:
        val_root = settings.val_root or data.root
        val_where = f"{val_root}, split {settings.val_split}"
        remedy = "name another with eval.val_split=NAME, or hold out a fifth with eval.val_split=null"
        val_source = open_source(
            data.name,
            val_root,
            settings.val_split,
            in_chans,
            whole_root=bool(settings.val_root),
            reading=Reading.of(data),
            key="eval.val_root" if settings.val_root else "data.root",
            remedy=remedy,
        )
        if overlap(source, val_source):
            raise UserError(f"{val_where}: holds images of split {data.split}; {remedy}")
        val_labels = labels_by(val_source, names, val_where)
        chosen, val_chosen = order, np.random.default_rng(0).permutation(len(val_source))
    chosen, val_chosen = np.sort(chosen[:limit]), np.sort(val_chosen[:limit])
    if len(np.unique(labels[chosen])) < 2:
        raise UserError(f"{where}: nothing to classify, all {len(chosen)} images are of one class")
    num_classes = max(len(names or ()), int(labels.max()) + 1, int(val_labels.max()) + 1)

    def subset(source: Source, labels: np.ndarray, chosen: np.ndarray) -> EvaluationDataset:
        return EvaluationDataset(
            Subset(source, chosen),
            labels[chosen],
            class_names=names or (),
            view=Cover(data.size, evaluation_crop(data.size)),
            shape=(in_chans, *data.size),
        )

    return Splits(subset(source, labels, chosen), subset(val_source, val_labels, val_chosen), num_classes)


def extract_features(
    encode: Callable[[Tensor], Tensor],
    dataset: EvaluationDataset,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Tensor], Any] = lambda rows: rows,
    progress: str | None = None,
) -> Features:
    """Compute the features of all images of a set, on `device`; images that do not decode are left out.

    Args:
        encode: pixels (b, c, h, w) on `device` -> features (b, d).
        rank: of this process, which computes its share.
        world_size: number of processes.
        gather: the rows of all processes from those of this one.
        progress: what a progress bar is called, or None for none.

    Raises:
        UserError: if no image decodes, or features are not finite.
    """
    keys = one_pass(len(dataset.labels), batch_size=batch_size, rank=rank, world_size=world_size)
    batches = load_batches(dataset, keys, num_workers=num_workers, pin_memory=device.type == "cuda")
    values: list[Tensor] = []
    labels: list[Tensor] = []
    bad: list[BadImage] = []
    with torch.no_grad(), seeded(0):  # a loader draws a seed for its workers from the generator of training
        for batch in tqdm(batches, progress, total=len(keys), unit="batches", disable=progress is None):
            batch = batch.to(device)
            bad += batch.bad
            values.append(encode(batch.images).float())
            labels.append(batch.labels)
    features = Features(gather(torch.cat(values)), gather(torch.cat(labels)))
    counted = features.labels != NOT_COUNTED
    if not bool(counted.any()):
        why = f" ({bad[0].reason})" if bad else ""
        raise UserError(
            f"{dataset.source.describe(0)}: does not decode{why}, nor do the other {len(dataset.labels) - 1}"
        )
    features = Features(*(rows[counted] for rows in features))
    if not bool(features.values.isfinite().all()):
        raise UserError("the encoder's features are not finite: its weights are broken, or its training diverged")
    return features


def _accuracies(num_classes: int, device: torch.device) -> dict[str, MulticlassStatScores]:
    """Return the metrics top1 and, where it says something, top5; each process keeps its own."""
    return accuracies(num_classes, device, tops=(1, 5) if num_classes > 5 else (1,), sync=False)


def _read(metrics: dict[str, MulticlassStatScores]) -> Accuracy:
    values = {name: round(accuracy(metric), 6) for name, metric in metrics.items()}
    return Accuracy(values["top1"], values.get("top5"))


@torch.no_grad()
def knn_accuracy(
    train: Features,
    val: Features,
    num_classes: int,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Accuracy]:
    """Classify each of `val` by the votes of its nearest in `train`, weighted by exp(cosine / temperature).

    Returns:
        The accuracy for each number of neighbours, as far as there are so many images.
    """
    metrics = {k: _accuracies(num_classes, val.values.device) for k in neighbours if k <= len(train.labels)}
    if not metrics:
        metrics = {len(train.labels): _accuracies(num_classes, val.values.device)}
    bank = F.normalize(train.values, dim=1).T
    rows = max(1, CHUNK // max(len(train.labels), num_classes))
    for values, labels in zip(val.values.split(rows), val.labels.split(rows), strict=True):
        cosine, nearest = (F.normalize(values, dim=1) @ bank).topk(max(metrics))  # (b, k)
        votes, classes = (cosine / temperature).exp(), train.labels[nearest]
        for k, metric in metrics.items():
            scores = votes.new_zeros(len(values), num_classes)
            scores.scatter_add_(1, classes[:, :k], votes[:, :k])
            for each in metric.values():
                each.update(scores, labels)
    return {k: _read(metric) for k, metric in metrics.items()}


class Classifier(NamedTuple):
    """A linear classifier of features."""

    weight: Tensor
    """(d, num_classes)."""
    bias: Tensor
    """(num_classes,)."""


def fit_logistic(features: Features, num_classes: int, l2: float, start: Classifier | None = None) -> Classifier:
    """Minimise the mean cross-entropy + l2 / 2 * |weight|^2 by L-BFGS, from `start` or zero; deterministic."""
    values, labels = features
    if start is None:
        start = Classifier(values.new_zeros(values.shape[1], num_classes), values.new_zeros(num_classes))
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in start)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, history_size=20, line_search_fn="strong_wolfe")
    rows = max(1, CHUNK // num_classes)

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * l2 * weight.square().sum()
        penalty.backward()
        total = penalty.detach()
        for part, target in zip(values.split(rows), labels.split(rows), strict=True):
            loss = F.cross_entropy(torch.addmm(bias, part, weight), target, reduction="sum") / len(values)
            loss.backward()
            total = total + loss.detach()
        return total

    with torch.enable_grad():
        optimizer.step(objective)  # pyright: ignore[reportArgumentType]
    return Classifier(weight.detach(), bias.detach())


@torch.no_grad()
def classifier_accuracy(classifier: Classifier, features: Features) -> Accuracy:
    """Return how often the classifier is right."""
    metrics = _accuracies(len(classifier.bias), features.values.device)
    rows = max(1, CHUNK // len(classifier.bias))
    for values, labels in zip(features.values.split(rows), features.labels.split(rows), strict=True):
        for metric in metrics.values():
            metric.update(torch.addmm(classifier.bias, values, classifier.weight), labels)
    return _read(metrics)


def linear_accuracy(train: Features, val: Features, num_classes: int) -> tuple[Accuracy, float]:
    """Fit a logistic regression on `train`, standardised per channel, and score it on `val`.

    The penalty is the one of `L2` that does best on a tenth of `train` held out; the last fit is on all of it.

    Returns:
        (accuracy, penalty).
    """
    std, mean = torch.std_mean(train.values, dim=0, correction=0)
    scale = torch.where(std > 1e-6, 1 / std, 0.0)  # constant channels say nothing
    train, val = (features._replace(values=(features.values - mean) * scale) for features in (train, val))
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0)).to(train.labels.device)
    held_out = max(1, len(order) // 10)
    part, rest = (Features(*(x[ids] for x in train)) for ids in (order[:held_out], order[held_out:]))
    classifier, best = None, (-1.0, 0.0)
    for l2 in L2:
        classifier = fit_logistic(rest, num_classes, l2, classifier)
        best = max(best, (classifier_accuracy(classifier, part).top1, l2))  # of equals the stronger
    return classifier_accuracy(fit_logistic(train, num_classes, best[1]), val), best[1]
