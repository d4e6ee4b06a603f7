"""What several processes make of a batch together: micro-batches, gradients sent once an update or as bf16."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate import Accelerator
from processes import Processes
from small_runs import Numbers, small_config
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from fcmae.encoder.convnext import ConvNeXt
from fcmae.model import FCMAE
from fcmae.training import trainer as trainer_module
from fcmae.training.launch import start_accelerator
from fcmae.training.optim import build_adamw
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer

UPDATES = 3


def updated(
    accelerator: Accelerator,
    folder: Path,
    network: nn.Module,
    loss: Callable[..., Tensor],
    *,
    begin: Callable[[Trainer], object] = lambda _: None,
    **sections: Any,
) -> Trainer:
    """Return a trainer after some updates of eight images, however they are divided."""
    config = small_config(folder, **sections)
    size, number = config.data.batch_size, accelerator.num_processes
    trainer = Trainer(
        accelerator=accelerator,
        model=network,
        optimizer=build_adamw(network, weight_decay=0.05, betas=(0.9, 0.95)),
        compute_loss=loss,
        plan=Plan.of(config, 8, number),
        config=config,
        ema_decay=config.train.ema_decay,
    )

    def given() -> Iterator[Numbers]:
        every = torch.arange(8 * UPDATES)
        for indices in every.split(size)[accelerator.process_index :: number]:
            yield Numbers(tuple(indices.tolist()), indices)

    begin(trainer)
    own = given()
    for _ in range(UPDATES):
        trainer.update(own)
    return trainer


def images_of(indices: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.stack(
        [torch.randn(3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(int(i))) for i in indices]
    )


def pretraining_loss(model: nn.Module, batch: Numbers) -> Tensor:
    ids = torch.stack(
        [torch.randperm(4, generator=torch.Generator().manual_seed(int(i)))[:1] for i in batch.values]
    )
    return model(images_of(batch.values), ids).loss


def classification_loss(model: nn.Module, batch: Numbers) -> Tensor:
    return nn.functional.cross_entropy(model(images_of(batch.values)), batch.values % 5)


def fcmae() -> FCMAE:
    torch.manual_seed(0)
    return FCMAE(((1, 1, 1, 1), (8, 16, 24, 32)), decoder_dim=16, stem_stride=1).double()


def classifier() -> ConvNeXt:
    torch.manual_seed(0)
    return ConvNeXt(((1, 1, 1, 1), (8, 16, 24, 32)), num_classes=5, stem_stride=1).double()


@pytest.mark.parametrize(("build", "loss"), [(fcmae, pretraining_loss), (classifier, classification_loss)])
def test_micro_batches_make_the_update_of_the_whole_batch(
    build: Callable[[], nn.Module], loss: Callable[..., Tensor], tmp_path: Path
) -> None:
    trainers = [
        updated(
            Accelerator(cpu=True),
            tmp_path,
            build(),
            loss,
            data={"batch_size": size},
            optim={"accumulate": 8 // size, "clip_grad": 0.5, "base_lr": 0.1},
        )
        for size in (8, 2)
    ]
    before, (whole, parts) = build().state_dict(), [trainer.bare_model.state_dict() for trainer in trainers]
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)
    assert all((whole[name] - value).abs().max() > 1e-4 for name, value in before.items())
    losses = [trainer.check(write=False) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# Several processes

Sent = list[tuple[torch.dtype, int]]
"""Of what was reduced over the processes: dtypes, and numbers of values."""

DIVIDED: dict[str, Any] = {"data": {"batch_size": 2}, "optim": {"accumulate": 2, "clip_grad": 0.5, "base_lr": 0.1}}


def count_buckets(sent: Sent) -> Callable[[Trainer], None]:
    """Have DDP note what it sends by a communication hook."""

    def hook(
        _: object,
        bucket: torch.distributed.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[Tensor]:
        sent.append((bucket.buffer().dtype, bucket.buffer().numel()))
        return default_hooks.allreduce_hook(torch.distributed.distributed_c10d._get_default_group(), bucket)

    def register(trainer: Trainer) -> None:
        assert isinstance(trainer.model, nn.parallel.DistributedDataParallel)
        trainer.model.register_comm_hook(None, hook)

    return register


def train_as_one_of_two(folder: Path) -> None:
    """In each of two processes: the same updates, by DDP and by calls after it, in full and as bf16."""
    reduced: Sent = []
    reduce = torch.distributed.all_reduce

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append((tensor.dtype, tensor.numel()))
        return reduce(tensor, *args, **kwargs)

    torch.distributed.all_reduce = noted
    results: dict[str, Any] = {}

    def train(name: str, sent: Sent, *, bf16: bool = False, begin: Any = lambda _: None) -> None:
        sent.clear()
        accelerator = start_accelerator("no", bf16_exchange=bf16)
        sections = DIVIDED | {"train": {"bf16_exchange": bf16}}
        trainer = updated(accelerator, folder, fcmae(), pretraining_loss, begin=begin, **sections)
        weights = {key: value.clone() for key, value in trainer.bare_model.state_dict().items()}
        results[name] = list(sent), weights, trainer.window.grad_norm_sum.item()
        assert isinstance(trainer.model, nn.parallel.DistributedDataParallel) is name.startswith("ddp")

    buckets: Sent = []
    train("ddp", buckets, begin=count_buckets(buckets))
    train("ddp in bf16", reduced, bf16=True)
    trainer_module.why_eager = lambda *_, **__: ""
    trainer_module.CudaGraphs = lambda _: None
    Trainer.record_steps = lambda self, graphs: None
    train("calls", reduced)
    train("calls in bf16", reduced, bf16=True)
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two processes sent, the weights that it came to, and the sum of the norms."""
    folder = tmp_path_factory.mktemp("exchange")
    processes = Processes(partial(train_as_one_of_two, folder), ["test"], folder, number=2)
    assert processes.wait() == [0, 0], processes.written("errors")
    return torch.load(folder / "0.pt"), torch.load(folder / "1.pt")


def size_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("way", ["ddp", "calls"])
def test_gradients_are_sent_once_an_update_whatever_is_accumulated(way: str, exchanged: Any) -> None:
    for results in exchanged:
        sent, _, _ = results[way]
        assert sent == [(torch.float64, size_of(fcmae()))] * UPDATES


@pytest.mark.parametrize("way", ["ddp", "calls"])
def test_two_processes_make_the_update_of_one(way: str, exchanged: Any, tmp_path: Path) -> None:
    whole: dict[str, Any] = {"data": {"batch_size": 8}, "optim": DIVIDED["optim"] | {"accumulate": 1}}
    one = updated(Accelerator(cpu=True), tmp_path, fcmae(), pretraining_loss, **whole)
    for results in exchanged:
        _, weights, norms = results[way]
        torch.testing.assert_close(weights, dict(one.bare_model.state_dict()), rtol=1e-9, atol=1e-11)
        assert norms == pytest.approx(one.window.grad_norm_sum.item(), rel=1e-9)


@pytest.mark.parametrize("way", ["ddp", "calls"])
def test_bf16_gradients_are_what_is_sent_and_come_close(way: str, exchanged: Any) -> None:
    before = fcmae().state_dict()
    for results in exchanged:
        sent, weights, norms = results[f"{way} in bf16"]
        assert sent == [(torch.bfloat16, size_of(fcmae()))] * UPDATES
        _, exact, exact_norms = results[way]
        assert norms != exact_norms
        assert norms == pytest.approx(exact_norms, rel=2**-8)
        moved = sum((exact[name] - value).abs().sum() for name, value in before.items())
        off = sum((exact[name] - value).abs().sum() for name, value in weights.items())
        assert 0 < off < moved / 20
