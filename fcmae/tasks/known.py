"""The tasks there are, by the name that configurations and weights call them."""

from typing import Any

from fcmae.tasks.base import Task
from fcmae.tasks.classification import Classification
from fcmae.tasks.multilabel import MultiLabel
from fcmae.tasks.regression import Regression
from fcmae.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task[Any]]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
    "segmentation": Segmentation,
}
