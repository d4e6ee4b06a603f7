"""Classification: scores against plain loops, their report, and a loss of mixed images."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcmae.config import FinetuneConfig, parse_config
from fcmae.tasks.classification import ScoreMetric, Scores, build_classifier, build_loss, report, tabulate


def scores_of(logits: torch.Tensor, labels: torch.Tensor, batch_size: int = 7) -> Scores:
    metric = ScoreMetric(logits.shape[1], logits.device)
    for batch, target in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        metric.update(batch, target)
    return metric.compute()


@pytest.mark.parametrize("num_classes", [2, 5, 9])
def test_scores_are_those_of_a_plain_loop(num_classes: int) -> None:
    logits = torch.randn(50, num_classes)
    labels = torch.randint(-1, num_classes, (50,))
    found = scores_of(logits, labels)
    top1 = top5 = number = 0
    loss = 0.0
    confusion = np.zeros((num_classes, num_classes), int)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label < 0:
            continue
        order = sorted(range(num_classes), key=lambda k: -row[k])
        number += 1
        top1 += order[0] == label
        top5 += label in order[:5]
        loss += math.log(sum(math.exp(value) for value in row)) - row[label]
        confusion[label, order[0]] += 1
    assert found.num_images == number
    assert found.top1 == pytest.approx(top1 / number)
    assert found.top5 == pytest.approx(top5 / number)
    assert found.loss == pytest.approx(loss / number, rel=1e-5)
    assert np.array_equal(found.confusion, confusion)


def test_an_evaluation_of_nothing_is_no_evaluation() -> None:
    with pytest.raises(ValueError, match="none of the images"):
        scores_of(torch.randn(3, 4), torch.full((3,), -1))


def test_the_report_has_a_line_for_each_class() -> None:
    found = scores_of(torch.eye(3), torch.tensor([0, 1, 1]))
    lines = report(found, ["cat", "a long name of a dog", "fox"]).splitlines()
    assert lines[0].split() == ["images", "3"]
    assert lines[1].split() == ["top-1", "66.67%"]
    assert lines[-2].split()[-4:] == ["2", "50.0%", "100.0%", "66.7%"]
    assert len({len(line) for line in lines[5:]}) == 1


def test_the_table_is_json_with_a_column_for_each_kind_of_figure() -> None:
    table = tabulate(scores_of(torch.eye(3), torch.tensor([0, 1, 1])), ["cat", "dog", "fox"])
    assert list(table) == ["images", "top1", "top5", "loss", "classes"]
    assert list(table["classes"]) == ["names", "images", "recall", "precision", "f1"]
    assert table["top1"] == 2 / 3
    assert table["classes"]["images"] == [1, 2, 0]


def config(**data: Any) -> FinetuneConfig:
    values: dict[str, Any] = {
        "output": "run",
        "model": {"variant": ((1, 1, 1, 1), (8, 8, 8, 8)), "head_init_scale": 0.001},
        "data": {"root": "images", **data},
        "train": {"label_smoothing": 0.1},
    }
    return parse_config(FinetuneConfig, values, "test")


def test_a_new_classifier_has_small_weights_and_no_bias() -> None:
    head = build_classifier(config(), 4).head
    assert isinstance(head, torch.nn.Linear)
    assert 0 < head.weight.std() < 0.0001
    assert not head.bias.any()


def test_the_loss_is_cross_entropy_with_smoothed_labels_and_with_mixup_of_mixed_ones() -> None:
    images, labels, logits = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)
    plain = build_loss(config(), 3)(lambda _: logits, images, labels)
    assert torch.equal(plain, F.cross_entropy(logits, labels, label_smoothing=0.1))
    seen: list[torch.Tensor] = []

    def classify(mixed: torch.Tensor) -> torch.Tensor:
        seen.append(mixed)
        return logits

    np.random.seed(0)  # noqa: NPY002 (timm's Mixup draws from it)
    mixed = build_loss(config(mixup=0.8), 3)(classify, images.clone(), labels)
    assert not torch.equal(seen[0], images)
    share = ((seen[0] - images.flip(0)) / (images - images.flip(0))).mean()
    targets = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(labels.flip(0), 3)
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    assert float(mixed) == pytest.approx(float(expected), rel=1e-3)
