"""Networks, weights and run folders that the tests of fcmae.weights and fcmae.load share."""

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from conftest import small_encoder, state_of
from torch import Tensor, nn

from fcmae.encoder.convnext import ConvNeXt
from fcmae.training.checkpoint import EMA, MODEL, OPTIMIZER, Best, save_checkpoint
from fcmae.weights.base import Preprocessing, Weights

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("cat", "dog", "kite")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of named tensors agree in names, shapes and every bit."""
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a)


def weights_of(encoder: ConvNeXt, **known: Any) -> Weights:
    """The encoder's weights in float32, as if read from a file."""
    known = {"mean": MEAN, "std": STD, "image_size": (64, 64), "crop_pct": 0.8} | known
    return Weights(Path("x"), dict(encoder.float().state_dict()), "a test's", Preprocessing(**known))


def classifier(**kwargs: Any) -> Weights:
    return weights_of(small_encoder(num_classes=3, **kwargs), class_names=NAMES)


def save_run(
    run: Path,
    model: nn.Module,
    ema: nn.Module | None = None,
    *,
    step: int = 7,
    best: int | None = None,
    **state: Any,
) -> Path:
    """Add a checkpoint to a run folder, as training leaves it; returns the checkpoint's folder."""
    data = {"mean": MEAN, "std": STD, "image_size": [64, 96]}
    files = {MODEL: model.state_dict(), OPTIMIZER: {}} | ({} if ema is None else {EMA: ema.state_dict()})
    best_one = None if best is None else Best(step=best, score=0.5)
    known = {"config": {"data": data}, "best": best_one} | state
    return save_checkpoint(run / "checkpoints", state_of(step, **known), files, keep=1)


@contextmanager
def little_memory(most: int = 2**29) -> Iterator[None]:
    """Let this process take only so many bytes of address space more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
