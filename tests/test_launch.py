"""The precision of a run: bf16 wherever the GPU has it, what accelerate was launched with, or what is asked for."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate.state import AcceleratorState
from processes import FSDP
from small_runs import batches, small_config, small_trainer
from torch import nn

from fcmae.config import TrainSection
from fcmae.errors import UserError
from fcmae.training import launch, sharding
from fcmae.training.checkpoint import Checkpoint, read_checkpoint
from fcmae.training.launch import asked_sharding, describe_precision, has_bf16, start_accelerator
from fcmae.training.memory import training_bytes


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate's state is a global of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("asked", "launched", "on_gpu_with_bf16", "computed"),
    [
        ("auto", None, True, "bf16"),
        ("auto", None, False, "no"),
        ("auto", "no", True, "bf16"),  # accelerate's default, which nobody may have asked for
        ("auto", "bf16", False, "bf16"),
        ("no", None, True, "no"),
        ("no", "bf16", True, "no"),
        ("bf16", "no", False, "bf16"),
    ],
)
def test_precision_is_what_is_asked_for_or_launched_with_else_bf16_where_a_gpu_has_it(
    asked: str, launched: str | None, on_gpu_with_bf16: bool, computed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(launch, "has_bf16", lambda _: on_gpu_with_bf16)
    assert start_accelerator(asked).mixed_precision == computed


def test_a_cpu_computes_in_float32_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert not has_bf16(torch.device("cpu"))
    assert not has_bf16(torch.device("mps"))
    assert start_accelerator("auto").mixed_precision == "no"


def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"^train\.precision=fp16: needs a GPU"):
        start_accelerator("fp16")


def test_the_gpu_of_this_process_is_asked_for_bf16_without_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, native=native: including_emulation or native,
        )
        assert has_bf16(torch.device("cuda")) is native


def test_tf32_is_off_whatever_was_on_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    start_accelerator("no")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("device", "computed", "asked", "launched", "said"),
    [
        ("cuda", "bf16", "auto", None, "bf16 (auto: the GPU has it; train.precision=no is float32)"),
        ("cuda", "bf16", "auto", "bf16", "bf16 (auto: as launched)"),
        ("cuda", "bf16", "bf16", None, "bf16 (train.precision=bf16)"),
        ("cuda", "no", "no", None, "float32 without TF32 (train.precision=no)"),
        ("cuda", "no", "auto", None, "float32 without TF32 (auto: nothing says that the GPU has bf16)"),
        ("cpu", "no", "auto", "no", "float32 (auto: on a CPU)"),
    ],
)
def test_the_first_lines_say_the_precision_and_why(
    device: str, computed: str, asked: str, launched: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    accelerator: Any = SimpleNamespace(device=torch.device(device), mixed_precision=computed)
    assert describe_precision(accelerator, asked) == said


def test_deepspeed_is_refused_in_a_line_that_names_what_does_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"^DeepSpeed: .* FSDP2 divides weights as ZeRO-3 does"):
        start_accelerator("no")


def test_fsdp_divides_nothing_where_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert asked_sharding(TrainSection()) is None


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What a process of several finds that was launched with FSDP."""
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    return monkeypatch


def test_fsdp_is_what_accelerate_was_asked_for(fsdp: pytest.MonkeyPatch) -> None:
    assert asked_sharding(TrainSection()) == (("Block",), True, False)
    fsdp.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    fsdp.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    fsdp.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Bottleneck,BasicBlock")
    asked = asked_sharding(TrainSection(bf16_exchange=True))
    assert asked == (("Bottleneck", "BasicBlock"), False, True)


@pytest.mark.parametrize(
    ("variable", "value", "keys", "line"),
    [
        ("FSDP_VERSION", "1", {}, "FSDP of version 1: set fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", {}, "FSDP with parameters on the CPU: set fsdp_offload_params: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", {}, "set train.gradient_checkpointing=true, and fsdp_activation"),
        ("FSDP_VERSION", "2", {"compile": True}, "FSDP with train.compile=true: leave that out"),
        ("FSDP_VERSION", "2", {"precision": "fp16"}, "FSDP with train.precision=fp16: take bf16"),
        ("FSDP_STATE_DICT_TYPE", "LOCAL_STATE_DICT", {}, "FSDP, as accelerate was asked for it: "),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused_with_the_key_to_change(
    variable: str, value: str, keys: dict[str, Any], line: str, fsdp: pytest.MonkeyPatch
) -> None:
    fsdp.setenv(variable, value)
    if value == "1":
        fsdp.setenv("FSDP_RESHARD_AFTER_FORWARD", "FULL_SHARD")
    with pytest.raises(UserError, match=re.escape(line)):
        asked_sharding(TrainSection(**keys))


@pytest.mark.parametrize(
    ("network", "line"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "running statistics, such as batch norm's"),
        (nn.Linear(2, 2), "this network has no Block; name its blocks' class where accelerate is configured"),
    ],
)
def test_a_network_that_cannot_be_divided_is_refused(
    network: nn.Module, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=re.escape(line)):
        sharding.Sharding(("Block",), reshard_after_forward=True, bf16_exchange=False).divide(network)


def test_of_divided_weights_each_process_takes_its_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config, network = small_config(Path("run")), nn.Linear(100, 100)
    whole = training_bytes(config, network)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert training_bytes(config, network) == whole
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert training_bytes(config, network) == whole // 4


def resume(checkpoint: Checkpoint, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    small_trainer(small_config(path)).restore(checkpoint)
    return capsys.readouterr().out


def test_a_run_that_goes_on_in_another_precision_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = small_trainer(small_config(tmp_path))
    (tmp_path / "metrics.jsonl").touch()
    trainer.update(batches(trainer))
    trainer.save()
    trainer.writer.wait()
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last")
    assert checkpoint.state.precision == "no"
    assert resume(checkpoint, tmp_path, capsys) == ""
    other = checkpoint._replace(state=checkpoint.state.model_copy(update={"precision": "bf16"}))
    assert "not the same run any more: precision: bf16 -> no" in resume(other, tmp_path, capsys)
    unknown = checkpoint._replace(state=checkpoint.state.model_copy(update={"precision": None}))
    assert resume(unknown, tmp_path, capsys) == "", "of 0.1.0, whose auto on a CPU was float32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_since_ampere_computes_in_bf16_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    native = torch.cuda.get_device_capability()[0] >= 8
    assert start_accelerator("auto").mixed_precision == ("bf16" if native else "no")
