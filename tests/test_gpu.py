"""What only a GPU can show: the layouts agree there, and a training step never waits for it."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from conftest import TINY

from fcmae import FCMAE, sample_visible_ids
from fcmae.config import PretrainConfig, parse_config
from fcmae.data import MaskedBatch, PixelNormalizer
from fcmae.encoder.convnextv2 import Layout
from fcmae.engine import Plan, Trainer, start_accelerator
from fcmae.optim import build_adamw

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
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8))
    ids = sample_visible_ids(4, 16, 0.6)
    batch = MaskedBatch(images=pixels, indices=(0, 1, 2, 3), bad=(), visible_ids=ids).pin_memory()
    batches = iter([batch] * 10)
    for _ in range(2):
        trainer.update(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trainer.update(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.check() > 0
