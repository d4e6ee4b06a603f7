"""Top-k accuracy, confusion matrix and per-class scores against plain loops."""

import numpy as np
import pytest
import torch

from fcmae.metrics import accuracies, accuracy, confusion_matrix, per_class

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_classes", [2, 5, 9])
def test_accuracies_and_confusion_are_those_of_a_plain_loop(num_classes: int) -> None:
    logits, labels = torch.randn(50, num_classes), torch.randint(num_classes, (50,))
    tops, confusion = accuracies(num_classes, CPU, tops=(1, 2, 5)), confusion_matrix(num_classes, CPU)
    for metric in (*tops.values(), confusion):
        for batch, target in zip(logits.split(7), labels.split(7), strict=True):
            metric.update(batch, target)
    hits = dict.fromkeys(tops, 0)
    expected = np.zeros((num_classes, num_classes), int)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(num_classes), key=lambda k: -row[k])
        for name in hits:
            hits[name] += label in order[: int(name.removeprefix("top"))]
        expected[label, order[0]] += 1
    assert {name: accuracy(metric) for name, metric in tops.items()} == {name: n / 50 for name, n in hits.items()}
    assert np.array_equal(confusion.compute().numpy(), expected)


def test_recall_precision_and_f1_of_a_small_matrix() -> None:
    table = per_class(np.array([[3, 1, 0], [1, 1, 0], [0, 0, 0]]))
    assert table["images"].tolist() == [4, 2, 0]
    assert table["recall"].tolist() == [0.75, 0.5, 0.0]
    assert table["precision"].tolist() == [0.75, 0.5, 0.0]
    assert table["f1"].tolist() == [0.75, 0.5, 0.0]
