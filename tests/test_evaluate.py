"""Probes of frozen features: k-NN and linear probe compute what their formulas say, on the right images."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fcmae.evaluation.probes as fcmae_evaluate
from fcmae.config import DataSection, ProbeSection
from fcmae.data import EvaluationDataset, cover, open_source, save_arrays
from fcmae.errors import UserError
from fcmae.evaluation.probes import (
    Accuracy,
    Features,
    Splits,
    extract_features,
    fit_logistic,
    knn_accuracy,
    labelled_splits,
    linear_accuracy,
)


def features(n: int, *, d: int = 8, num_classes: int = 7, noise: float = 1.0, seed: int = 0) -> Features:
    """Clouds around fixed random centres, one per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(num_classes, (n,), generator=generator)
    return Features(centres[labels] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64), labels)


# Nearest neighbours


def votes_one_by_one(
    train: Features, val: Features, num_classes: int, k: int, temperature: float
) -> list[list[int]]:
    """Classes in the order of their votes, for each of `val`."""
    orders = []
    for query in val.values:
        cosines = [float(query @ value / query.norm() / value.norm()) for value in train.values]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        votes = [0.0] * num_classes
        for i in nearest:
            votes[int(train.labels[i])] += float(np.exp(cosines[i] / temperature))
        orders.append(sorted(range(num_classes), key=lambda label: -votes[label]))
    return orders


@pytest.mark.parametrize("chunk", [1, 500, 2**26])
def test_nearest_neighbours_vote_as_in_dino(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcmae_evaluate, "CHUNK", chunk)
    train, val = features(60), features(40, seed=1)
    found = knn_accuracy(train, val, 7, neighbours=(1, 5, 20), temperature=0.2)
    assert list(found) == [1, 5, 20]
    for k, accuracy in found.items():
        orders = votes_one_by_one(train, val, 7, k, 0.2)
        top1 = np.mean([label == order[0] for label, order in zip(val.labels, orders, strict=True)])
        assert 0.2 < top1 < 0.95, "a reference that is always or never right compares nothing"
        assert accuracy.top1 == pytest.approx(top1)
        if k == 20:  # with fewer, classes without any vote tie
            top5 = np.mean([int(label) in order[:5] for label, order in zip(val.labels, orders, strict=True)])
            assert accuracy.top5 == pytest.approx(top5)


def test_the_temperature_decides_between_near_and_many() -> None:
    train = Features(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]), torch.tensor([0, 1, 1]))
    val = Features(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
    assert knn_accuracy(train, val, 2, neighbours=[3], temperature=0.07)[3].top1 == 1.0
    assert knn_accuracy(train, val, 2, neighbours=[3], temperature=10.0)[3].top1 == 0.0


def test_neighbours_beyond_the_number_of_images_are_left_out() -> None:
    assert list(knn_accuracy(features(30), features(9), 7)) == [10, 20]
    assert list(knn_accuracy(features(6), features(9), 7)) == [6]


def test_top_five_is_reported_only_where_it_says_something() -> None:
    val = features(9, num_classes=5)
    assert knn_accuracy(features(30, num_classes=5), val, 5)[10].top5 is None
    assert knn_accuracy(features(30, num_classes=5), val, 6)[10].top5 is not None


def test_features_without_information_score_at_chance() -> None:
    def unrelated(seed: int) -> Features:
        generator = torch.Generator().manual_seed(seed)
        return Features(torch.randn(2000, 8, generator=generator), torch.randint(4, (2000,), generator=generator))

    assert knn_accuracy(unrelated(0), unrelated(1), 4)[20].top1 == pytest.approx(0.25, abs=0.04)
    assert linear_accuracy(unrelated(0), unrelated(1), 4)[0].top1 == pytest.approx(0.25, abs=0.04)


# The linear probe


@pytest.mark.parametrize("chunk", [70, 2**26])
@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_logistic_regression_ends_where_the_gradient_vanishes(
    l2: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcmae_evaluate, "CHUNK", chunk)
    values, labels = features(200)
    found = fit_logistic(Features(values, labels), 7, l2)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(values @ weight + bias, labels) + l2 / 2 * weight.square().sum()
    assert loss < np.log(7)
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert gradient.abs().max() < 1e-5


def test_the_linear_probe_separates_what_can_be_separated() -> None:
    accuracy, _ = linear_accuracy(features(300, noise=0.05), features(100, noise=0.05, seed=1), 7)
    assert accuracy == Accuracy(1.0, 1.0)


def test_the_linear_probe_does_not_care_for_the_scale_of_channels() -> None:
    train, val = features(300), features(200, seed=1)
    scale, shift = torch.logspace(-3, 3, 8, dtype=torch.float64), torch.linspace(-9, 9, 8, dtype=torch.float64)
    scaled, scaled_val = (Features(part.values * scale + shift, part.labels) for part in (train, val))
    plain = linear_accuracy(train, val, 7)
    assert linear_accuracy(scaled, scaled_val, 7) == plain
    assert 0.4 < plain[0].top1 < 0.95


def test_constant_channels_are_harmless() -> None:
    train, val = features(300), features(200, seed=1)
    wider, wider_val = (
        Features(torch.cat([part.values, torch.ones(len(part.labels), 1)], 1), part.labels) for part in (train, val)
    )
    wider_val.values[:, -1] = 1e6  # what no training image showed has no say
    assert linear_accuracy(wider, wider_val, 7) == linear_accuracy(train, val, 7)


def test_the_penalty_is_chosen_by_what_is_held_out() -> None:
    clean = linear_accuracy(features(500, noise=0.05), features(10), 7)[1]
    generator = torch.Generator().manual_seed(0)
    few = features(120, noise=1.0)
    noisy = Features(torch.cat([few.values, torch.randn(120, 200, generator=generator)], 1), few.labels)
    assert linear_accuracy(noisy, noisy, 7)[1] >= 0.01
    assert clean in fcmae_evaluate.L2


def test_both_are_the_same_each_time_and_in_single_precision_too() -> None:
    train, val = (Features(part.values.float(), part.labels) for part in (features(300), features(200, seed=1)))
    assert linear_accuracy(train, val, 7) == linear_accuracy(train, val, 7)
    assert knn_accuracy(train, val, 7) == knn_accuracy(train, val, 7)
    double, _ = linear_accuracy(features(300), features(200, seed=1), 7)
    assert linear_accuracy(train, val, 7)[0].top1 == pytest.approx(double.top1, abs=0.02)


# Features of images


def write_classes(root: Path, counts: dict[str, int], size: int = 24) -> Path:
    """Images whose colour is that of their class."""
    for name, number in counts.items():
        shade = ("bee", "cat", "dog").index(name)
        (root / name).mkdir(parents=True)
        for i in range(number):
            rng = np.random.default_rng([shade, i])
            pixels = rng.integers(0, 60, (size, size + 8, 3)) + np.array([60 * shade, 90, 180 - 60 * shade])
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes in train, two of them in val."""
    write_classes(tmp_path / "train", {"bee": 6, "cat": 5, "dog": 4})
    write_classes(tmp_path / "val", {"bee": 2, "dog": 3})
    return tmp_path


def splits_of(root: Path, *, split: str = "train", **settings: object) -> Splits:
    data = DataSection(root=str(root), split=split, image_size=16)
    source = open_source("folder", str(root), split, 3)
    return labelled_splits(source, data, ProbeSection.model_validate(settings), 3)


def mean_colour(pixels: Tensor) -> Tensor:
    return pixels.float().mean((2, 3))


def extract(
    dataset: EvaluationDataset,
    encode: Callable[[Tensor], Tensor] = mean_colour,
    *,
    batch_size: int = 4,
    num_workers: int = 0,
    **kwargs: Any,
) -> Features:
    return extract_features(
        encode, dataset, batch_size=batch_size, num_workers=num_workers, device=torch.device("cpu"), **kwargs
    )


def test_features_are_of_resized_and_centred_images_with_their_labels(root: Path) -> None:
    dataset = splits_of(root).train
    found = extract(dataset)
    views = [cover(dataset.source.load(i), (16, 16)) for i in range(15)]
    assert torch.allclose(found.values, mean_colour(torch.stack(views)))
    assert found.labels.tolist() == dataset.labels.tolist() == [0] * 6 + [1] * 5 + [2] * 4


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 100}, {"num_workers": 2}])
def test_batches_and_workers_change_nothing(root: Path, options: dict[str, Any]) -> None:
    dataset = splits_of(root).train
    assert torch.equal(extract(dataset, **options).values, extract(dataset).values)


def test_images_that_do_not_decode_are_left_out(root: Path) -> None:
    whole = extract(splits_of(root).train)
    (root / "train" / "cat" / "1.png").write_bytes(b"junk")
    dataset = splits_of(root).train
    broken = next(i for i in range(15) if dataset.source.describe(i).endswith("cat/1.png"))
    good = [i for i in range(15) if i != broken]
    found = extract(dataset)
    assert torch.equal(found.values, whole.values[good])
    assert found.labels.tolist() == whole.labels[good].tolist()


def test_nothing_but_broken_images_ends_in_one_line(root: Path) -> None:
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"does not decode \(not an image .*\), nor do the other 4"):
        extract(splits_of(root).val)


def test_broken_weights_are_reported(root: Path) -> None:
    with pytest.raises(UserError, match="features are not finite"):
        extract(splits_of(root).val, lambda pixels: mean_colour(pixels) / 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_probing_leaves_all_generators_alone(root: Path, num_workers: int) -> None:
    def states() -> tuple[list[int], object, object]:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    splits = splits_of(root)
    train, val = (extract(dataset, num_workers=num_workers) for dataset in (splits.train, splits.val))
    knn_accuracy(train, val, 3)
    linear_accuracy(train, val, 3)
    assert states() == before


def test_shares_of_processes_are_the_whole_once(root: Path) -> None:
    dataset = splits_of(root).train
    shares = [extract(dataset, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    together, whole = torch.cat([share.values for share in shares]), extract(dataset)
    order = [together.tolist().index(row) for row in whole.values.tolist()]
    assert sorted(order) == list(range(15))
    assert torch.cat([share.labels for share in shares])[order].tolist() == whole.labels.tolist()


def test_a_process_with_nothing_to_do_gathers_what_the_others_did(root: Path) -> None:
    val = splits_of(root).val
    own = extract(val)

    def gather(rows: Tensor) -> Tensor:  # 5 images fill the first process's batch only
        assert len(rows) == 8
        return torch.cat([own.labels if rows.ndim == 1 else own.values, rows])

    found = extract(val, batch_size=8, rank=1, world_size=2, gather=gather)
    assert torch.equal(found.values, own.values)
    assert torch.equal(found.labels, own.labels)


# Which images


def test_a_validation_split_is_classified_by_the_classes_of_training(root: Path) -> None:
    splits = splits_of(root)
    assert (len(splits.train.labels), len(splits.val.labels), splits.num_classes) == (15, 5, 3)
    assert splits.val.labels.tolist() == [0, 0, 2, 2, 2]
    train, val = extract(splits.train), extract(splits.val)
    assert knn_accuracy(train, val, 3)[10].top1 == 1.0
    assert linear_accuracy(train, val, 3)[0].top1 == 1.0


def test_a_validation_set_may_lie_elsewhere(root: Path, tmp_path: Path) -> None:
    write_classes(tmp_path / "elsewhere", {"cat": 2})
    splits = splits_of(root, val_root=str(tmp_path / "elsewhere"))
    assert splits.val.labels.tolist() == [1, 1]


def test_without_a_validation_split_a_fifth_is_held_out(root: Path) -> None:
    def names(dataset: EvaluationDataset) -> list[str]:
        return [dataset.source.describe(i) for i in range(len(dataset.labels))]

    splits = splits_of(root, val_split=None)
    assert len(names(splits.val)) == 3
    assert sorted(names(splits.train) + names(splits.val)) == sorted(map(str, (root / "train").rglob("*.png")))
    assert names(splits_of(root, val_split=None).val) == names(splits.val)


def test_a_limit_takes_images_of_all_classes_whatever_their_order(tmp_path: Path) -> None:
    for split in ("train", "val"):
        images = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)
        save_arrays(tmp_path / split, images, np.arange(400) % 10)
    save_arrays(tmp_path / "val", 255 - images[:300], np.arange(300) // 30)
    source = open_source("arrays", str(tmp_path), "train", 3)
    splits = labelled_splits(
        source, DataSection(name="arrays", root=str(tmp_path), image_size=16), ProbeSection(num_images=80), 3
    )
    assert len(splits.train.labels) == len(splits.val.labels) == 80
    assert np.bincount(splits.train.labels).min() > 0
    assert np.bincount(splits.val.labels).min() > 0


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_split_that_is_not_there_is_not_quietly_the_training_set(root: Path, split: str) -> None:
    flat = root / "train"
    reason = f", split {split}: holds images of split train" if split == "train" else f": no split '{split}' in it"
    with pytest.raises(UserError, match=rf"{flat}{reason}.*val_split=null"):
        splits_of(flat, val_split=split)
    with pytest.raises(UserError, match=r"holds images of split train.*val_split=null"):
        splits_of(root, val_split=split, val_root=str(flat / "cat"))


def test_sets_without_labels_or_with_one_class_are_named(root: Path) -> None:
    for path in (root / "val" / "bee").iterdir():
        path.rename(root / "val" / path.name)
    with pytest.raises(UserError, match=rf"{root}, split val: no labels"):
        splits_of(root)
    with pytest.raises(UserError, match=rf"{root}, split val: no labels"):
        splits_of(root, split="val", val_split="train")
    write_classes(root / "one" / "train", {"cat": 3})
    with pytest.raises(UserError, match="all 2 images are of one class"):
        splits_of(root / "one", val_split=None)
