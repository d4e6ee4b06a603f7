"""The tasks there are, by the name that configurations and weights call them."""

from fcmae.tasks.base import Task
from fcmae.tasks.classification import Classification
from fcmae.tasks.multilabel import MultiLabel
from fcmae.tasks.regression import Regression

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
}
