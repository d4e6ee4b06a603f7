"""Regression: one or more numbers for each image; knows no schedule, processes or files.

The network is trained on targets of mean 0 and standard deviation 1. Finished weights give them in their own units:
`fcmae.load` puts the statistics, which checkpoints hold, into the last layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.regression import r2_score

from fcmae.config import ImageConfig
from fcmae.data import EvaluationDataset, LabelledDataset, Source
from fcmae.data.tables import as_numbers
from fcmae.errors import UserError
from fcmae.load import rescale_outputs
from fcmae.tasks.base import (
    Figure,
    Gathered,
    Loss,
    Metric,
    Scores,
    Task,
    Training,
    augment,
    evaluation_set,
    open_training,
    open_validation,
)
from fcmae.tasks.pictures import draw_scatter
from fcmae.tasks.targets import Labels, columns_by, read_targets, require_outputs, share
from fcmae.training.checkpoint import State

LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}
"""By `train.loss`."""


@dataclass(frozen=True)
class RegressionScores(Scores):
    """How near numbers come to the true ones."""

    predicted: np.ndarray
    """float32 (n, targets), in their own units."""
    true: np.ndarray
    """The same."""

    overall = (Figure("R2", "r2", ".4f"), Figure("MAE", "mae", ".4g"), Figure("RMSE", "rmse", ".4g"))
    by_output = (Figure("MAE", "mae", ".4g"), Figure("RMSE", "rmse", ".4g"), Figure("R2", "r2", ".4f"))
    output, outputs = "target", "targets"
    picture = ("predicted, true", "predictions.png")

    @property
    def num_images(self) -> int:
        return len(self.true)

    @property
    def figures(self) -> dict[str, float]:
        """Means over the targets: of R2, which has no unit, and of errors in the targets' units."""
        return {figure.key: float(self.columns[figure.key].mean()) for figure in self.overall}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        predicted, true = (torch.from_numpy(values).double() for values in (self.predicted, self.true))
        error = (predicted - true).numpy()
        r2 = r2_score(predicted, true, multioutput="raw_values")
        return {"mae": np.abs(error).mean(0), "rmse": np.sqrt(np.square(error).mean(0)), "r2": r2.numpy()}

    def draw(self, names: Sequence[str]) -> np.ndarray:
        return draw_scatter(self.true, self.predicted, names)


class RegressionMetric(Gathered):
    """Gathers numbers (b, targets) and true ones, of which NaN do not count."""

    def compute(self) -> RegressionScores:
        predicted, true = self.counted(Tensor.isfinite)
        if len(true) < 2:
            raise ValueError("R2 takes at least two images that can be read")
        return RegressionScores(predicted.numpy(), true.numpy())


@dataclass(frozen=True)
class Regression(Task[ImageConfig]):
    """One or more numbers for each image."""

    mean: tuple[float, ...] | None = None
    """Of the training targets; None for weights that give targets in their own units."""
    std: tuple[float, ...] | None = None

    scores = RegressionScores
    head = "layer of {} targets"

    @classmethod
    def open(cls, config: ImageConfig, state: State | None = None) -> tuple[Self, LabelledDataset]:
        data, source = config.data, open_training(config)
        what = f"data.root={data.root}, split {data.split}"
        labels, names = read_numbers(config, source, what, validation=False)
        names = names or numbered(labels.shape[1])
        require_outputs(config, names, what)
        source, labels = share(source, labels, data.label_fraction, config.train.seed)
        for name, value, same in zip(names, labels[0].tolist(), labels.max(0) == labels.min(0), strict=True):
            if same:
                raise UserError(
                    f"{what}: {name} is {value:g} for all {len(labels)} images, so that there is nothing to learn; "
                    "remove its column"
                )
        mean, std = labels.mean(0), labels.std(0)
        if state is not None and state.target_mean and state.target_std:
            mean, std = np.array(state.target_mean), np.array(state.target_std)
        task = cls(config, names, tuple(mean.tolist()), tuple(std.tolist()))
        return task, augment(config, source, ((labels - mean) / std).astype(np.float32))

    def validation_set(self, in_chans: int, training: Training | None = None) -> EvaluationDataset:
        source, what = open_validation(self.config, in_chans, training)
        found = read_numbers(self.config, source, what, validation=True)
        names = self.names or found[1] or numbered(found[0].shape[1])
        labels = columns_by(found, names, what).astype(np.float32)
        return evaluation_set(self.config, source, labels, names, in_chans)

    def as_trained(self, tensors: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return rescale_outputs(tensors, classifier, 1 / std, -mean / std)

    def loss(self) -> Loss:
        compute = LOSSES[self.config.loss]

        def loss(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return compute(model(images).float(), labels)

        return loss

    def metric(self, num_outputs: int, device: torch.device) -> RegressionMetric:
        return RegressionMetric(device)

    def count(self, metric: Metric, network: Callable[[Tensor], Tensor], images: Tensor, batch: Any) -> None:
        outputs = network(images).float()
        if self.mean is not None and self.std is not None:
            outputs = outputs * outputs.new_tensor(self.std) + outputs.new_tensor(self.mean)
        metric.update(outputs, batch.labels)

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"target_mean": self.mean, "target_std": self.std}


def numbered(number: int) -> tuple[str, ...]:
    """Names of targets that have none."""
    return ("target",) if number == 1 else tuple(f"target {i}" for i in range(number))


def read_numbers(config: ImageConfig, source: Source, what: str, *, validation: bool) -> Labels:
    """Return the targets of images, float64 (n, targets), and their names.

    Raises:
        UserError: as `read_targets`, or if one is not finite.
    """
    labels, names = read_targets(
        config,
        source,
        what,
        validation=validation,
        of_table=as_numbers,
        dtypes="f",
        wanted="floats (n,) or (n, targets)",
    )
    labels = labels.astype(np.float64)
    if not np.isfinite(labels).all():
        image, column = np.argwhere(~np.isfinite(labels))[0].tolist()
        raise UserError(
            f"{what}: the labels of {(~np.isfinite(labels)).any(1).sum()} images are not finite, the first column "
            f"{column} of image {image} ({labels[image, column]}); leave such images out"
        )
    return labels, names
