"""What only a GPU can show: the layouts agree there, and a training step never waits for it."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, relative_error, state_of

from fcmae import FCMAE, sample_visible_ids
from fcmae.config import PretrainConfig, parse_config
from fcmae.data import CroppedBatch, PixelNormalizer, prefetch
from fcmae.encoder.convnext import Layout
from fcmae.training.checkpoint import MODEL, OPTIMIZER, CheckpointWriter, read_checkpoint, step_folder
from fcmae.training.launch import start_accelerator
from fcmae.training.optim import build_adamw
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("fast", ["packed", pytest.param("minkowski", marks=pytest.mark.minkowski)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_every_layout_agrees_with_masked_on_cuda(dtype: torch.dtype, tolerance: float, fast: Layout) -> None:
    model = FCMAE(TINY, stem_stride=2).to("cuda", dtype)
    images = torch.randn(4, 3, 64, 96, device="cuda", dtype=dtype)
    ids = sample_visible_ids(4, 24, 0.6, device="cuda")
    gradients = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for layout in ("masked", fast):
            model.layout = cast(Layout, layout)
            model.zero_grad()
            model(images, ids).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= tolerance * gradients[0].norm()


def some_crops(number: int) -> CroppedBatch:
    """Return a pinned batch of four random crops that the device resizes to 64 x 64."""
    rng = np.random.default_rng(number)
    return CroppedBatch(
        images=torch.from_numpy(rng.integers(0, 256, (4, 3, 90, 100), dtype=np.uint8)),
        indices=(number,) * 4,
        bad=(),
        visible_ids=sample_visible_ids(4, 16, 0.6),
        extents=torch.from_numpy(rng.integers(20, 90, (4, 2), dtype=np.int32)),
        flipped=torch.tensor([True, False, True, False]),
        size=(64, 64),
    ).pin_memory()


def test_crops_resized_on_cuda_are_those_of_the_cpu_within_a_level() -> None:
    crops = some_crops(0)
    there, here = (crops.to(torch.device(device)).images.cpu() for device in ("cuda", "cpu"))
    assert (there.int() - here.int()).abs().max() <= 1


def test_batches_copied_ahead_arrive_whole_and_in_order() -> None:
    batches = [some_crops(number) for number in range(12)]
    expected = [batch.to(torch.device("cuda")) for batch in batches]
    read = []

    def reading() -> Iterator[CroppedBatch]:
        for number, batch in enumerate(batches):
            read.append(number)
            yield batch

    busy = torch.eye(4000, device="cuda")
    sums = []
    for number, batch in enumerate(prefetch(reading(), torch.device("cuda"))):
        assert len(read) == min(number + 2, 12)  # one ahead
        assert batch.indices == (number,) * 4
        for _ in range(20):
            busy = busy @ busy
        # behind that work; meanwhile later batches are copied, and must not land in this one's memory
        sums.append(batch.images.sum() + batch.visible_ids.sum())
        del batch
    assert torch.stack(sums).tolist() == [int(b.images.sum() + b.visible_ids.sum()) for b in expected]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_step_never_waits_for_the_gpu(tmp_path: Path, compiled: bool) -> None:
    values = {
        "output": str(tmp_path / "run"),
        "model": {"variant": TINY, "stem_stride": 2},
        "data": {"root": "none", "image_size": 64, "batch_size": 4},
        "optim": {"accumulate": 2, "clip_grad": 1.0},
        "train": {"precision": "bf16", "max_steps": 10, "compile": compiled},
    }
    config = parse_config(PretrainConfig, values, "test")
    model = FCMAE(**dict(config.model))
    accelerator = start_accelerator(config.train.precision)
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(accelerator.device)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95)),
        compute_loss=lambda model, batch: model(normalize(batch.images), batch.visible_ids).loss,
        plan=Plan.of(config, 100, 1),
        config=config,
    )
    batches = prefetch(iter([some_crops(0)] * 20), accelerator.device)
    for _ in range(2):
        trainer.update(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trainer.update(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.check() > 0


def test_a_checkpoint_holds_the_tensors_as_they_were_when_it_was_asked_for(tmp_path: Path) -> None:
    tensor, writer = torch.zeros(1 << 26, device="cuda"), CheckpointWriter(tmp_path)
    for step in (1, 2):  # into new memory, then into the same
        writer.save(state_of(step), {MODEL: {"weight": tensor}, OPTIMIZER: {}}, keep=2)
        tensor += 1  # which the GPU does after the copy
    writer.wait()
    for step in (1, 2):
        assert (read_checkpoint(step_folder(tmp_path, step)).model["weight"] == step - 1).all()


def test_a_step_recorded_as_a_graph_trains_as_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    train_step = importlib.import_module("train_step")
    args = train_step.parse_args(["--image-size=96", "--batch=2", "--precision=bf16"])
    weights = []
    for recorded in (True, False):
        way, batch = train_step.build_way("packed", args)
        for group in way.optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3, device="cuda")
        if recorded:
            way.step = train_step.capture(way, batch, args)
        for _ in range(2 if recorded else 5):  # the recording takes three steps to warm up
            train_step.train_step(way, batch, args)
        weights.append(torch.cat([p.detach().flatten() for g in way.optimizer.param_groups for p in g["params"]]))
    assert relative_error(*weights) < 1e-3
