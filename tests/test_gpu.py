"""What only a GPU can show: the layouts agree there, and a training step never waits for it."""

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, records, relative_error, run_main, state_of
from small_runs import stop_after
from test_segmentation import draw_shapes
from test_segmentation_task import write_pairs
from torch import Tensor, nn

from fcmae import FCMAE, finetune, pretrain, sample_visible_ids
from fcmae.config import PretrainConfig, parse_config
from fcmae.data import CroppedBatch, PixelNormalizer, prefetch, resize_crops, save_arrays
from fcmae.data.pixels import as_kind
from fcmae.encoder.convnext import Layout
from fcmae.training.checkpoint import MODEL, OPTIMIZER, CheckpointWriter, read_checkpoint, step_folder
from fcmae.training.graph import BLOCKING, WARM_UP, Recorded
from fcmae.training.launch import claim_checkpoint, start_accelerator
from fcmae.training.optim import build_adamw
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer, Window

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
        visible_ids=sample_visible_ids(4, 16, 0.6, torch.Generator().manual_seed(number)),
        extents=torch.from_numpy(rng.integers(20, 90, (4, 2), dtype=np.int32)),
        flipped=torch.tensor([True, False, True, False]),
        size=(64, 64),
    ).pin_memory()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_crops_resized_on_cuda_are_those_of_the_cpu_within_a_level(dtype: torch.dtype) -> None:
    crops = some_crops(0)
    crops = replace(crops, images=as_kind(crops.images, dtype).pin_memory())
    if dtype == torch.float32:
        crops.images[crops.images < 0.25] = torch.nan
    there, here = (crops.to(torch.device(device)).images.cpu() for device in ("cuda", "cpu"))
    assert there.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 1
    torch.testing.assert_close(there.double(), here.double(), rtol=1e-5, atol=atol, equal_nan=True)


def test_crops_are_resized_by_two_kernels_without_a_wait() -> None:
    crops = some_crops(0)
    there = crops.each(Tensor.cuda)
    given = (there.images, there.extents, there.flipped, [64, 64])
    resize_crops(*given)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profiler:
        torch.cuda.set_sync_debug_mode("error")
        try:
            resize_crops(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    events = profiler.events() or ()
    kernels = [e.name for e in events if e.device_type.name == "CUDA" and "kernel" in e.name]
    assert kernels == ["_across_kernel", "_down_kernel"]


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


def trainer_on_cuda(folder: Path, *, eager: bool, **train: Any) -> Trainer:
    """A trainer of a tiny FCMAE with drop path, accumulation, clipping and an EMA, saving every five updates."""
    values = {
        "output": str(folder),
        "resume": "auto",
        "model": {"variant": TINY, "stem_stride": 2, "drop_path": 0.3},
        "data": {"root": "none", "image_size": 64, "batch_size": 4},
        "optim": {"accumulate": 2, "clip_grad": 1.0, "base_lr": 0.03, "warmup_epochs": 0},
        "train": {"precision": "no", "max_steps": 12} | train,
        "checkpoint": {"every_steps": 5, "keep": 9},
        "log": {"every_steps": 1},
    }
    config = parse_config(PretrainConfig, values, "test")
    torch.manual_seed(0)
    model = FCMAE(**config.model.model_dump())
    accelerator = start_accelerator(config.train.precision)
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(accelerator.device)
    return Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95)),
        compute_loss=lambda model, batch: model(normalize(batch.images), batch.visible_ids).loss,
        eager="a test" if eager else "",
        plan=Plan.of(config, 100, 1),
        config=config,
        ema_decay=0.9,
    )


def crops_of(trainer: Trainer, others: Collection[int] = ()) -> Iterator[Any]:
    """Endless batches that depend on the process and on how many were used alone; `others` are of three images."""
    first = 1000 * trainer.accelerator.process_index

    def reading() -> Iterator[CroppedBatch]:
        for number in itertools.count(trainer.step * trainer.config.optim.accumulate):
            batch = some_crops(first + number)
            yield replace(batch, indices=batch.indices[:3]).each(lambda t: t[:3]) if number in others else batch

    return prefetch(reading(), trainer.accelerator.device)


def losses_of(trainer: Trainer, batches: Iterator[Any], updates: int) -> list[float]:
    losses = []
    for _ in range(updates):
        trainer.update(batches)
        losses.append(trainer.check(write=False))
        trainer.window = Window.new(trainer.accelerator.device)
    return losses


def weights_of(trainer: Trainer) -> Tensor:
    """All weights and their EMA in a row."""
    assert trainer.ema is not None
    tensors = [*trainer.bare_model.state_dict().values(), *trainer.ema.module.state_dict().values()]
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def is_replaying(trainer: Trainer) -> bool:
    return isinstance(trainer.work, Recorded) and None not in (trainer.work.first, trainer.work.last)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_a_training_step_never_waits_for_the_gpu(tmp_path: Path, eager: bool, compiled: bool) -> None:
    trainer = trainer_on_cuda(tmp_path, eager=eager, precision="bf16", compile=compiled)
    batches = prefetch(iter([some_crops(0)] * 20), trainer.accelerator.device)
    for _ in range(WARM_UP + 2):
        trainer.update(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.update(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert is_replaying(trainer) is not eager
    assert trainer.check() > 0


@pytest.mark.parametrize(
    ("train", "tolerance"),
    [({"precision": "no"}, 1e-4), ({"precision": "bf16"}, 1e-2), ({"precision": "bf16", "compile": True}, 1e-2)],
)
def test_steps_recorded_as_graphs_train_as_eager_ones(
    tmp_path: Path, train: dict[str, Any], tolerance: float
) -> None:
    """With the same random numbers, other shapes in between, and evaluation."""
    losses, weights = [], []
    for eager in (True, False):
        trainer = trainer_on_cuda(tmp_path, eager=eager, **train)
        others = () if train.get("compile") else (7, 15, 20, 21)
        batches = crops_of(trainer, others)
        found = losses_of(trainer, batches, 10)
        trainer.bare_model.eval()
        with torch.inference_mode():
            trainer.bare_model(torch.randn(64, 3, 64, 64, device="cuda"))
        trainer.bare_model.train()
        losses.append(found + losses_of(trainer, batches, 10))
        weights.append(weights_of(trainer))
        assert is_replaying(trainer) is not eager
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert relative_error(*weights) < tolerance


def test_a_resumed_run_of_recorded_steps_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = trainer_on_cuda(tmp_path / "whole", eager=False)
    whole.fit(crops_of(whole))
    stopped = stop_after(tmp_path / "whole", 5, tmp_path / "stopped")
    for eager in (False, True):
        trainer = trainer_on_cuda(stop_after(stopped, 5, tmp_path / f"eager-{eager}"), eager=eager)
        checkpoint = claim_checkpoint(trainer.config)
        assert checkpoint is not None
        trainer.restore(checkpoint)
        trainer.fit(crops_of(trainer))
        assert is_replaying(trainer) is not eager
        assert relative_error(weights_of(trainer), weights_of(whole)) < 1e-6


def test_a_step_that_waits_for_the_gpu_is_found_out_and_stays_eager(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_on_cuda(tmp_path, eager=False)
    compute = trainer.compute_loss

    def compute_and_wait(model: nn.Module, batch: Any) -> Tensor:
        loss = compute(model, batch)
        return loss if loss.item() > 0 else -loss

    trainer.compute_loss = compute_and_wait
    losses_of(trainer, crops_of(trainer), WARM_UP + 2)
    assert not is_replaying(trainer)
    assert f"no CUDA graphs: {__file__}:" in capsys.readouterr().out


def train_as_one_of_many(folder: Path) -> None:
    """What each process of the next test does: the same updates, as DDP makes them and recorded."""
    for eager in (True, False):
        trainer = trainer_on_cuda(folder, eager=eager)
        losses_of(trainer, crops_of(trainer), 10)
        assert is_replaying(trainer) is not eager
        torch.save(weights_of(trainer), folder / f"eager-{eager}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2])
def test_recorded_updates_of_processes_are_those_of_ddp(
    tmp_path: Path, environment: dict[str, str], processes: int
) -> None:
    """One has NCCL's thread, which looks after its calls, beside it while it records."""
    if processes > 1 and (torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1)):
        pytest.skip("needs two GPUs with NVLink")
    program = f"import test_gpu, pathlib; test_gpu.train_as_one_of_many(pathlib.Path({str(tmp_path)!r}))"
    environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    ranks = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    running = [subprocess.Popen([sys.executable, "-c", program], env=own) for own in ranks]
    assert {process.wait(timeout=280) for process in running} == {0}
    eager, first, last = (
        torch.load(tmp_path / f"eager-{name}.pt") for name in ("True-0", "False-0", f"False-{processes - 1}")
    )
    assert relative_error(first, eager) < 1e-4
    assert relative_error(last, first) < 1e-6


SECTIONS = """
model: {variant: [[1, 1, 2, 1], [16, 16, 32, 32]], stem_stride: 1, drop_path: 0.3}
optim: {base_lr: 0.03, accumulate: 2, clip_grad: 1, warmup_epochs: 0}
data: {name: arrays, image_size: 32, batch_size: 8, num_workers: 2}
train: {precision: "no", max_steps: 12}
checkpoint: {every_steps: 5}
log: {every_steps: 1}
"""
PRETRAIN = ["visualize.every_steps=4", "visualize.num_images=2", "eval.collapse_every_epochs=1"]
PRETRAIN += ["eval.knn_every_epochs=1"]
SEGMENT = ["task=segmentation", "data.name=folder", "train.dice=1", "train.class_weights=balanced"]


@pytest.mark.parametrize(
    ("main", "settings"),
    [
        (pretrain.main, PRETRAIN),
        (pretrain.main, ["model.decoder=transformer", "model.target=hog", "data.nodata=nan"]),
        (pretrain.main, ["model.decoder=unet", "model.response=batch_norm", "optim.decoder_first_epochs=1"]),
        (finetune.main, ["train.ema_decay=0.9", "optim.layer_decay=0.9", "eval.every_epochs=1"]),
        (finetune.main, ["train.freeze_encoder=true", "data.mixup=0", "data.cutmix=0"]),
        (finetune.main, SEGMENT),
    ],
)
def test_runs_recorded_as_graphs_are_those_that_are_not(
    main: Callable[[list[str]], int],
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With evaluation, pictures and checkpoints in between."""
    for split in ("train", "val"):
        if settings == SEGMENT:
            write_pairs(tmp_path / "data" / split, *draw_shapes(32, 40, seed=1))
        else:
            images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
            save_arrays(tmp_path / "data" / split, images, np.arange(64) % 4)
    (tmp_path / "config.yaml").write_text(SECTIONS)
    words = ["--config", str(tmp_path / "config.yaml"), f"data.root={tmp_path / 'data'}", *settings]
    for eager in (False, True):
        if eager:
            monkeypatch.setenv(BLOCKING, "1")  # which CUDA has read before
        assert run_main(main, *words, f"output={tmp_path / f'eager-{eager}'}") == 0
        out = capsys.readouterr().out
        assert (f"no CUDA graphs ({BLOCKING} is set)" in out) is eager
        assert "no CUDA graphs:" not in out
    losses = [
        [record["loss"] for record in records(tmp_path / f"eager-{eager}") if "loss" in record]
        for eager in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


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
