"""Classification: scores against plain loops, their report, and a loss of mixed images."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcmae.config import ImageConfig, parse_config
from fcmae.data import save_arrays
from fcmae.errors import UserError
from fcmae.tasks.base import build_classifier
from fcmae.tasks.classification import MISTAKES, ClassMetric, ClassScores, build_loss, build_mix, training_source


def scores_of(logits: torch.Tensor, labels: torch.Tensor, batch_size: int = 7) -> ClassScores:
    metric = ClassMetric(logits.shape[1], logits.device)
    indices = torch.arange(len(labels))
    for batch, target, some in zip(*(x.split(batch_size) for x in (logits, labels, indices)), strict=True):
        metric.update(batch, target, some.tolist())
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
    lines = found.report(["cat", "a long name of a dog", "fox"]).splitlines()
    assert lines[0].split() == ["images", "3"]
    assert lines[1].split() == ["top-1", "66.67%"]
    assert lines[-2].split()[-4:] == ["2", "50.0%", "100.0%", "66.7%"]
    assert len({len(line) for line in lines[5:]}) == 1


def test_the_table_is_json_with_a_column_for_each_kind_of_figure() -> None:
    table = scores_of(torch.eye(3), torch.tensor([0, 1, 1])).tabulate(["cat", "dog", "fox"])
    assert list(table) == ["images", "top1", "top5", "loss", "classes", "confusion", "calibration", "mistakes"]
    assert list(table["classes"]) == ["names", "images", "recall", "precision", "f1"]
    assert table["top1"] == 2 / 3
    assert table["classes"]["images"] == [1, 2, 0]
    assert table["confusion"] == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    (mistake,) = table["mistakes"]
    assert mistake == {"index": 2, "label": "dog", "predicted": "fox", "confidence": pytest.approx(0.576, abs=1e-3)}


def test_mistakes_are_of_counted_images_the_surest_first_in_whatever_order_they_were_counted() -> None:
    logits = torch.randn(60, 5)
    labels = torch.randint(-1, 5, (60,))
    sure, top = logits.softmax(1).max(1)
    wrong = [i for i in range(60) if labels[i] >= 0 and labels[i] != top[i]]
    expected = sorted(wrong, key=lambda i: -sure[i])[:MISTAKES]
    assert len(wrong) > MISTAKES
    order = torch.randperm(60)
    metric = ClassMetric(5, logits.device)
    for some in order.split(7):
        metric.update(logits[some], labels[some], some.tolist())
    found = metric.compute().mistakes
    assert [answer.index for answer in found] == expected
    assert [answer.predicted for answer in found] == top[expected].tolist()
    assert [answer.label for answer in found] == labels[expected].tolist()


def test_calibration_is_that_of_a_plain_loop() -> None:
    logits, labels = 2 * torch.randn(300, 4), torch.randint(-1, 4, (300,))
    found = scores_of(logits, labels).tabulate("abcd")["calibration"]
    counted = labels >= 0
    sure, top = logits[counted].softmax(1).max(1)
    error = 0.0
    for i in range(10):
        inside = (sure >= i / 10) & (sure < (i + 1) / 10)
        assert found["images"][i] == inside.sum()
        if not inside.any():
            assert found["accuracy"][i] is None
            continue
        right = (top == labels[counted])[inside].float().mean()
        assert found["confidence"][i] == pytest.approx(float(sure[inside].mean()), rel=1e-5)
        assert found["accuracy"][i] == pytest.approx(float(right), rel=1e-5)
        error += float((right - sure[inside].mean()).abs() * inside.sum() / counted.sum())
    assert found["ece"] == pytest.approx(error, rel=1e-4)


def test_a_certain_answer_is_in_the_last_bin() -> None:
    found = scores_of(1000 * torch.eye(2), torch.tensor([0, 1])).tabulate("ab")["calibration"]
    assert found["images"] == [0] * 9 + [2]
    assert found["ece"] == 0


def config(**data: Any) -> ImageConfig:
    values: dict[str, Any] = {
        "output": "run",
        "model": {"variant": ((1, 1, 1, 1), (8, 8, 8, 8)), "head_init_scale": 0.001},
        "data": {"root": "images", **data},
        "train": {"label_smoothing": 0.1},
    }
    return parse_config(ImageConfig, values, "test")


def training_images(root: Path, labels: list[int], names: list[str] | None = None, **model: int) -> tuple[str, ...]:
    """The names of the classes of as many images with such labels."""
    save_arrays(root / "train", np.zeros((len(labels), 4, 4, 3), np.uint8), labels, names)
    values = config(root=str(root), name="arrays").model_dump(mode="json")
    values["model"] |= model
    return training_source(parse_config(ImageConfig, values, "test"))[1]


def test_labels_from_one_or_beyond_the_images_are_no_classes_unless_named(
    tmp_path: Path,
) -> None:
    assert training_images(tmp_path, [0, 2, 1]) == training_images(tmp_path, [0, 2, 2]) == ("0", "1", "2")
    with pytest.raises(UserError, match=r"split train: labels 1 to 3; classes count from 0: subtract 1, or say"):
        training_images(tmp_path, [1, 2, 3])
    with pytest.raises(UserError, match=r"split train: label 999 among 3 images: number classes from 0 on, or say"):
        training_images(tmp_path, [0, 999, 1])
    assert training_images(tmp_path, [1, 2, 3], ["a", "b", "c", "d"]) == ("a", "b", "c", "d")
    assert training_images(tmp_path, [1, 2, 3], num_classes=4) == ("0", "1", "2", "3")
    assert len(training_images(tmp_path, [0, 999, 1], num_classes=1000)) == 1000
    with pytest.raises(UserError, match=r"model\.num_classes=2: the images of data\.root=.* have 4 classes"):
        training_images(tmp_path, [1, 2, 3], num_classes=2)


def test_a_new_classifier_has_small_weights_and_no_bias() -> None:
    head = build_classifier(config(), 4).head
    assert isinstance(head, torch.nn.Linear)
    assert 0 < head.weight.std() < 0.0001
    assert not head.bias.any()


def test_the_loss_is_cross_entropy_with_smoothed_labels_and_with_mixup_of_mixed_ones() -> None:
    images, labels, logits = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]), torch.randn(4, 3)
    plain = build_loss(config())(lambda _: logits, images, labels)
    assert torch.equal(plain, F.cross_entropy(logits, labels, label_smoothing=0.1))
    unmixed = build_mix(config(), 3)(images, labels)
    assert unmixed == (images, labels)
    np.random.seed(0)  # noqa: NPY002 (timm's Mixup draws from it)
    seen, targets = build_mix(config(mixup=0.8), 3)(images.clone(), labels)
    mixed = build_loss(config())(lambda _: logits, seen, targets)
    assert not torch.equal(seen, images)
    share = ((seen - images.flip(0)) / (images - images.flip(0))).mean()
    targets = share * F.one_hot(labels, 3) + (1 - share) * F.one_hot(labels.flip(0), 3)
    expected = F.cross_entropy(logits, targets, label_smoothing=0.1)
    assert float(mixed) == pytest.approx(float(expected), rel=1e-3)
