"""Counts of a classifier against plain loops."""

import math

import numpy as np
import pytest
import torch

from fcmae.tasks.classification import Scores, confusion_matrix, judge, per_class, report, score
from fcmae.visualize import draw_confusion


def scores_of(logits: torch.Tensor, labels: torch.Tensor, batch_size: int = 7) -> Scores:
    judged = [judge(a, b) for a, b in zip(logits.split(batch_size), labels.split(batch_size), strict=True)]
    return score(*(torch.cat(column).numpy() for column in zip(*judged, strict=True)))


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
    assert len(found.labels) == number
    assert found.top1 == pytest.approx(top1 / number)
    assert found.top5 == pytest.approx(top5 / number)
    assert found.loss == pytest.approx(loss / number, rel=1e-5)
    assert np.array_equal(confusion_matrix(found, num_classes), confusion)


def test_an_evaluation_of_nothing_is_no_evaluation() -> None:
    with pytest.raises(ValueError, match="none of the images"):
        scores_of(torch.randn(3, 4), torch.full((3,), -1))


def test_recall_precision_and_f1_of_a_small_matrix() -> None:
    table = per_class(np.array([[3, 1, 0], [1, 1, 0], [0, 0, 0]]))
    assert table["images"].tolist() == [4, 2, 0]
    assert table["recall"].tolist() == [0.75, 0.5, 0.0]
    assert table["precision"].tolist() == [0.75, 0.5, 0.0]
    assert table["f1"].tolist() == [0.75, 0.5, 0.0]


def test_the_report_has_a_line_for_each_class() -> None:
    found = scores_of(torch.eye(3), torch.tensor([0, 1, 1]))
    lines = report(found, ["cat", "a long name of a dog", "fox"]).splitlines()
    assert lines[0].split() == ["images", "3"]
    assert lines[1].split() == ["top-1", "66.67%"]
    assert lines[-2].split()[-4:] == ["2", "50.0%", "100.0%", "66.7%"]
    assert len({len(line) for line in lines[5:]}) == 1


@pytest.mark.parametrize("number", [1, 2, 30, 31, 51, 1001])
def test_a_confusion_matrix_is_drawn_for_any_number_of_classes(number: int) -> None:
    picture = draw_confusion(np.eye(number, dtype=np.int64) * 5, [f"class {i} " + "x" * i for i in range(number)])
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert max(picture.shape) < 2100
    blue = (picture == [8, 48, 107]).all(2)
    assert blue.any()


def test_the_darkest_cell_is_where_the_guesses_are() -> None:
    picture = draw_confusion(np.array([[0, 4], [1, 0]]), ["a", "b"])
    rows, columns = np.nonzero((picture == [8, 48, 107]).all(2))
    upper, lower = rows < rows.mean(), rows > rows.mean()
    assert columns[upper].min() > columns[lower].max()
