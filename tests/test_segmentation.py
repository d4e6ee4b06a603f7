"""Segmentation: loss and scores against plain loops, evaluation of images of all sizes, and that it learns."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fcmae.config import FinetuneConfig, SegmentationConfig, parse_config
from fcmae.data import PixelNormalizer, load_batches, save_arrays
from fcmae.data.masks import SegmentationSource, open_segmentation, save_masks
from fcmae.data.sampling import IndexStream
from fcmae.data.segments import SegmentationDataset, SegmentationEvaluation, SegmentationView
from fcmae.encoder.networks import build_network
from fcmae.errors import UserError
from fcmae.heads.segmentation import HEADS, HeadName, Segmenter
from fcmae.heads.windows import Strip
from fcmae.tasks.base import score_images
from fcmae.tasks.segmentation import (
    AUXILIARY_WEIGHT,
    Segmentation,
    SegmentationMetric,
    SegmentationScores,
    balanced_weights,
    dice_loss,
    loss_of_heads,
    require_jitter,
    segmentation_loss,
)


def drawn(b: int = 2, classes: int = 4, size: tuple[int, int] = (6, 7), least: int = -1) -> tuple[Tensor, Tensor]:
    return torch.randn(b, classes, *size), torch.randint(least, classes, (b, *size), dtype=torch.int16)


# Loss


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_is_the_mean_over_the_pixels_that_have_a_class(weighted: bool) -> None:
    logits, labels = drawn()
    weights = torch.rand(4) if weighted else torch.ones(4)
    total = share = 0.0
    for b, i, j in np.ndindex(*labels.shape):
        label, row = int(labels[b, i, j]), logits[b, :, i, j].tolist()
        if label >= 0:
            total += float(weights[label]) * (math.log(sum(map(math.exp, row))) - row[label])
            share += float(weights[label])
    found = segmentation_loss(logits, labels, class_weights=weights if weighted else None)
    assert float(found) == pytest.approx(total / share, rel=1e-5)


def test_dice_is_that_of_a_plain_loop_over_the_classes_that_occur() -> None:
    logits, labels = drawn(classes=5)
    labels[labels == 3] = 0  # so that 3 does not occur
    probabilities = logits.softmax(1)
    losses = []
    for label in (0, 1, 2, 4):
        overlap = predicted = pixels = 0.0
        for b, i, j in np.ndindex(*labels.shape):
            if labels[b, i, j] >= 0:
                p, y = float(probabilities[b, label, i, j]), int(labels[b, i, j]) == label
                overlap, predicted, pixels = overlap + p * y, predicted + p, pixels + y
        losses.append(1 - 2 * overlap / (predicted + pixels))
    assert float(dice_loss(logits, labels.long())) == pytest.approx(sum(losses) / 4, rel=1e-5)
    both = segmentation_loss(logits, labels, dice=0.5)
    assert float(both) == pytest.approx(float(segmentation_loss(logits, labels)) + 0.5 * sum(losses) / 4, rel=1e-5)


def test_a_certain_and_right_prediction_has_no_loss() -> None:
    _, labels = drawn(least=0)
    logits = 100 * torch.nn.functional.one_hot(labels.long(), 4).permute(0, 3, 1, 2).float()
    assert float(segmentation_loss(logits, labels, dice=1.0)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 3.0, 4.0])])
def test_a_pixel_without_a_class_has_no_gradient_and_a_batch_of_them_no_loss(weights: Tensor | None) -> None:
    logits, labels = drawn()
    logits.requires_grad_()
    segmentation_loss(logits, labels, dice=1.0, class_weights=weights).backward()
    assert logits.grad is not None
    assert not logits.grad.permute(0, 2, 3, 1)[labels < 0].any()
    assert logits.grad.permute(0, 2, 3, 1)[labels >= 0].any(-1).all()
    nothing = segmentation_loss(logits, torch.full_like(labels, -1), dice=1.0, class_weights=weights)
    assert nothing.item() == 0.0
    nothing.backward()
    assert logits.grad.isfinite().all()


def test_the_second_head_counts_less() -> None:
    (logits, labels), (other, _) = drawn(), drawn()
    found = loss_of_heads((logits, other), labels, dice=1.0)
    expected = segmentation_loss(logits, labels, dice=1.0) + AUXILIARY_WEIGHT * segmentation_loss(other, labels)
    assert torch.equal(found, expected)
    assert torch.equal(loss_of_heads(logits, labels), segmentation_loss(logits, labels))


def test_balanced_weights_make_rare_classes_count_more() -> None:
    weights = balanced_weights(np.array([1000, 100, 10]))
    assert torch.allclose(weights, torch.tensor([0.1, 1.0, 10.0]))
    assert balanced_weights(np.array([5, 0])).isfinite().all()


# Scores


def scores_of(logits: Tensor, labels: Tensor, rows: int = 100) -> SegmentationScores:
    """The scores of strips of so many rows."""
    metric = SegmentationMetric(logits.shape[1], logits.device)
    for some, labels_of_some in zip(logits.split(3), labels.split(3), strict=True):
        strips = [Strip(top, some[:, :, top : top + rows]) for top in range(0, some.shape[2], rows)]
        metric.update(iter(strips), labels_of_some)
    return metric.compute()


@pytest.mark.parametrize("rows", [100, 4])
def test_scores_are_those_of_a_plain_loop(rows: int) -> None:
    logits, labels = drawn(7, 5, (9, 8))
    labels[labels == 2] = 1  # a class that does not occur, and is predicted
    logits[:, 4] = -100
    labels[labels == 4] = 0  # one that is neither
    found = scores_of(logits, labels, rows)
    predicted = logits.argmax(1)
    hits, unions, right, number = [0] * 5, [0] * 5, 0, 0
    for place in np.ndindex(*labels.shape):
        truth, guess = int(labels[place]), int(predicted[place])
        if truth < 0:
            continue
        number, right = number + 1, right + (truth == guess)
        for label in range(5):
            hits[label] += truth == guess == label
            unions[label] += label in (truth, guess)
    ious = [hit / union for hit, union in zip(hits, unions, strict=True) if union]
    assert unions[4] == 0
    assert unions[2] > 0
    assert found.figures["miou"] == pytest.approx(sum(ious) / 4)
    assert found.figures["pixel_accuracy"] == pytest.approx(right / number)
    assert found.confusion.sum() == number
    assert found.num_images == 7
    assert found.loss == pytest.approx(float(segmentation_loss(logits, labels)), rel=1e-5)


def test_an_evaluation_of_nothing_is_no_evaluation() -> None:
    with pytest.raises(ValueError, match="none has a class"):
        scores_of(torch.randn(3, 4, 5, 5), torch.full((3, 5, 5), -1))


def test_the_report_has_a_line_for_each_class_and_no_ratio_over_nothing() -> None:
    logits = torch.eye(3)[torch.tensor([[0, 1], [1, 0]])].permute(2, 0, 1)[None]
    found = scores_of(logits, torch.tensor([[[0, 1], [0, 0]]]))
    lines = found.report(["sky", "a long name of a sea", "land"]).splitlines()
    assert lines[0].split() == ["images", "1"]
    assert lines[1].split() == ["mIoU", "58.33%"]
    assert lines[2].split() == ["pixel", "accuracy", "75.00%"]
    assert lines[-3].split() == ["sky", "3", "66.7%", "66.7%", "100.0%"]
    assert lines[-1].split() == ["land", "0", "-", "-", "-"]
    assert len({len(line) for line in lines[5:]}) == 1
    assert found.draw(["sky", "sea", "land"]).shape[2] == 3
    table = found.tabulate(["sky", "sea", "land"])
    assert list(table) == ["images", "miou", "pixel_accuracy", "loss", "classes"]
    assert table["classes"]["iou"] == [2 / 3, 0.5, None]


# Evaluation


def source_of(folder: Path, images: np.ndarray, masks: np.ndarray) -> SegmentationSource:
    save_arrays(folder, images)
    save_masks(folder, masks)
    return open_segmentation("arrays", str(folder), "train", None)


def task_of(source: SegmentationSource, **data: Any) -> Segmentation:
    values = {"task": "segmentation", "output": "run", "model": {"variant": "atto"}}
    config = parse_config(FinetuneConfig, values | {"data": {"root": "x", **data}}, "a test")
    assert isinstance(config, SegmentationConfig)
    return Segmentation(config, source.class_names)


PLAIN = PixelNormalizer((0.0,) * 3, (1.0,) * 3)


def evaluate(
    task: Segmentation,
    network: Any,
    source: SegmentationSource,
    normalize: PixelNormalizer = PLAIN,
    batch_size: int = 4,
    **process: int,
) -> SegmentationScores:
    dataset, device = SegmentationEvaluation(source), torch.device("cpu")
    scores = score_images(
        task, network, normalize, dataset, batch_size=batch_size, num_workers=0, device=device, **process
    )
    assert isinstance(scores, SegmentationScores)
    return scores


class Whole(nn.Module):
    """A convolution in whole numbers, the same to the bit on any processor and in any batch."""

    num_classes = 3

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.weight = torch.from_numpy(rng.integers(-9, 10, (3, 3, 3, 3))).float()

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.conv2d((255 * images).round(), self.weight, padding=1) / 64


def test_every_image_counts_once_whatever_the_batches_and_processes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 20, 24, 3)).astype(np.uint8)
    source = source_of(tmp_path, images, images[..., 0] // 100)
    conv: Any = Whole(rng)
    whole, windows = task_of(source), task_of(source, image_size=16, stride=8)

    def found(batch_size: int, rank: int = 0, world_size: int = 1) -> SegmentationScores:
        return evaluate(whole, conv, source, batch_size=batch_size, rank=rank, world_size=world_size)

    one, many = found(1), found(4)
    assert np.array_equal(one.confusion, many.confusion)
    assert one.num_images == many.num_images == 7
    assert one.loss == pytest.approx(many.loss)
    assert np.array_equal(sum(found(3, rank, 2).confusion for rank in (0, 1)), one.confusion)
    in_windows = evaluate(windows, conv, source)
    assert in_windows.confusion.sum() == one.confusion.sum() == 7 * 20 * 24
    assert not np.array_equal(in_windows.confusion, one.confusion)  # whose seams see no neighbours


def test_images_of_different_sizes_are_evaluated_in_their_own(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    sizes = [(8, 9), (16, 12), (8, 9), (5, 5)]
    for i, size in enumerate(sizes):
        for folder, dtype, high in (("images", (*size, 3), 256), ("masks", size, 2)):
            path = tmp_path / f"val/{folder}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, high, dtype).astype(np.uint8)).save(path)
    source = open_segmentation("folder", str(tmp_path), "val", 3)
    seen = []

    class Bright(nn.Module):
        """Class 1 where red is not above one half."""

        num_classes = 2

        def forward(self, pixels: Tensor) -> Tensor:
            seen.append(tuple(pixels.shape))
            return torch.stack([pixels[:, 0], torch.full_like(pixels[:, 0], 127.5 / 255)], 1)

    scores = evaluate(task_of(source), Bright(), source)
    assert sorted(seen) == [(1, 3, 5, 5), (1, 3, 16, 12), (2, 3, 8, 9)]
    assert scores.confusion.sum() == sum(h * w for h, w in sizes)
    expected = np.zeros((2, 2), int)
    for i in range(4):
        pair = source.load(i)
        np.add.at(expected, (pair.classes.long().numpy(), (pair.pixels[0] < 128).long().numpy()), 1)
    assert np.array_equal(scores.confusion, expected)


def test_jitter_of_other_than_rgb_of_8_bits_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, np.zeros((2, 8, 8, 5), np.uint16), np.indices((2, 8, 8))[0].astype(np.uint8))
    require_jitter(source, 0.0, "data.jitter=0")
    with pytest.raises(
        UserError, match=r"data\.jitter=0\.5: is for RGB of 8 bits, and these images have 5 channels of u"
    ):
        require_jitter(source, 0.5, "data.jitter=0.5")


# All of it


def draw_shapes(number: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Reddish disks (1) and bluish squares (2) on noise: uint8 (n, side, side, 3) and (n, side, side)."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (number, side, side, 3)).astype(np.uint8)
    masks = np.zeros((number, side, side), np.uint8)
    rows, columns = np.mgrid[:side, :side]
    for image, mask in zip(images, masks, strict=True):
        for label in (1, 2):
            y, x, radius = *rng.integers(6, side - 6, 2), rng.integers(5, 9)
            down, across = rows - y, columns - x
            inside = (
                down**2 + across**2 <= radius**2 if label == 1 else np.maximum(abs(down), abs(across)) <= radius
            )
            image[inside] = rng.integers(0, 160, 3)
            image[inside, 0 if label == 1 else 2] = rng.integers(180, 256)
            mask[inside] = label
    return images, masks


@pytest.mark.parametrize("head", HEADS)
def test_a_network_learns_to_segment_drawn_shapes(tmp_path: Path, head: HeadName) -> None:
    train = source_of(tmp_path / "a", *draw_shapes(64, 48, seed=0))
    val = source_of(tmp_path / "b", *draw_shapes(16, 48, seed=1))
    torch.manual_seed(0)
    encoder = build_network(((1, 1, 1, 1), (16, 24, 32, 48)), stem_stride=2, num_classes=0)
    model = Segmenter(encoder, 3, head=head, dim=32, auxiliary=head == "upernet")
    normalize = PixelNormalizer((0.3,) * 3, (0.25,) * 3)
    view = SegmentationView((32, 32), mean=(0.3,) * 3, scale=(0.8, 1.25), jitter=0.1)
    dataset = SegmentationDataset(train, view=view, seed=0)
    batches = load_batches(
        dataset, IndexStream(len(dataset), batch_size=8, seed=0), num_workers=0, pin_memory=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    weights = balanced_weights(train.class_pixels())
    model.train()
    for _ in range(50):
        batch = next(batches)
        loss = loss_of_heads(model(normalize(batch.images)), batch.labels, dice=1.0, class_weights=weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    scores = evaluate(task_of(val, image_size=32, stride=16), model, val, normalize)
    of_background_alone = scores.confusion[0].sum() / scores.confusion.sum() / 3
    assert scores.figures["miou"] > 0.7 > 2 * of_background_alone
