"""Memory: what surely cannot fit is refused before it is taken, with the key to lower; what might fit is not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, error_line
from torch import nn

from fcmae import finetune, pretrain
from fcmae.config import (
    FinetuneRecipe,
    PretrainConfig,
    PretrainRecipe,
    RunConfig,
    command_of,
    load_config,
    shipped_configs,
)
from fcmae.errors import UserError
from fcmae.model import FCMAE
from fcmae.tasks.base import build_classifier
from fcmae.tasks.known import TASKS
from fcmae.training import memory
from fcmae.training.memory import require_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GB, and 24 GB on the GPU."""
    monkeypatch.setattr(memory, "most_bytes", lambda: 8e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24e9))


def pretraining(*overrides: str) -> PretrainConfig:
    return load_config(PretrainRecipe, "pretrain/atto", overrides).resolve({}, "a test")


def outline(config: RunConfig) -> nn.Module:
    with torch.device("meta"):
        if isinstance(config, PretrainConfig):
            return FCMAE(**config.model.model_dump())
        assert isinstance(config, FinetuneRecipe)
        return TASKS[config.task](config.resolve({}, "a test"), tuple(map(str, range(1000)))).build()


def refusal(config: RunConfig, device: torch.device) -> str:
    with pytest.raises(UserError) as caught:
        require_memory(config, outline(config), device)
    return str(caught.value)


def test_shipped_recipes_fit_onto_a_gpu_of_24_gb_with_8_beside_it(machine: None) -> None:
    for name, path in shipped_configs().items():
        if (task := command_of(name)) != "ablate":
            kind = PretrainRecipe if task == "pretrain" else FinetuneRecipe
            automatic = "variant: auto" in path.read_text()
            config = load_config(kind, path, ["model.variant=atto"] if automatic else [])
            resolved = config.resolve({"data.batch_size": 2}, "a test")  # as far as that is auto
            require_memory(resolved, outline(config), GPU)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.batch_size=1000000"], "data.batch_size=1000000"),
        (["data.image_size=65536"], "data.image_size=65536"),
        (["data.image_size=[65536,32]", "data.batch_size=10000"], "data.batch_size=10000"),
        (["model.decoder_dim=65536"], "model.decoder_dim=65536"),
        (["model.variant=[[1,1,1,1],[8,8,8,65536]]"], "model.variant=((1, 1, 1, 1), (8, 8, 8, 65536))"),
        (["model.variant=huge", "data.batch_size=2048"], "data.batch_size=2048"),  # by its features
    ],
)
def test_the_key_that_asks_for_too_much_is_named(
    machine: None, overrides: list[str], key: str, device: torch.device
) -> None:
    if device == CPU and "model.variant=huge" in overrides:
        key = "model.variant='huge'"  # whose moments do not fit
    message = refusal(pretraining(*overrides), device)
    assert message.startswith(f"{key}: takes ")
    where = "the GPU" if device == GPU else "this machine"
    assert f"but {where} has " in message or "decoder_dim" in message or "variant=((" in message


def test_batches_that_wait_in_workers_count_on_a_cpu_alone(machine: None) -> None:
    config = pretraining("data.num_workers=1024", "data.batch_size=256")
    assert refusal(config, CPU).startswith("data.num_workers=1024: ")
    require_memory(config, outline(config), GPU)


def test_a_gpu_may_hold_more_than_the_computer(machine: None) -> None:
    config = pretraining("model.variant=huge")
    assert refusal(config, CPU).startswith("model.variant='huge': takes ")
    require_memory(config, outline(config), GPU)


def test_a_head_that_is_larger_than_the_encoder_is_named(machine: None) -> None:
    settings = ["model.variant=atto", "data.image_size=32", "model.head=upernet", "model.head_dim=10000"]
    recipe = load_config(FinetuneRecipe, "finetune/segmentation", settings)
    with pytest.raises(UserError, match=r"^model\.head='upernet': takes .* choose a smaller one"):
        require_memory(recipe.resolve({}, "a test"), outline(recipe), CPU)


def test_frozen_weights_take_no_gradients_and_an_ema_takes_as_much_as_the_weights(machine: None) -> None:
    probe = load_config(FinetuneRecipe, "finetune/linear-probe", ["model.variant=huge"]).resolve({}, "a test")
    with torch.device("meta"):
        model = build_classifier(probe, 1000)
    require_memory(probe, model, CPU)
    changed = {"freeze_encoder": False, "ema_decay": 0.99}
    whole = probe.model_copy(update={"train": probe.train.model_copy(update=changed)})
    with pytest.raises(UserError, match=r"takes 13\.2 GB"):  # 5 times 4 bytes of 660 million
        require_memory(whole, model, CPU)


def test_processes_on_one_machine_share_its_memory(machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pretraining("data.batch_size=4096", "data.num_workers=0")
    require_memory(config, outline(config), CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "each of 4 processes on this machine has 2.0 GB" in refusal(config, CPU)
    huge = pretraining("model.variant=huge")
    require_memory(huge, outline(huge), GPU)  # each has one of its own


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = {"none": "max\n", "small": "1000000000\n"}
    for name, text in limits.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "CGROUP_LIMITS", [str(tmp_path / "missing"), str(tmp_path / "none")])
    whole = memory.ram_bytes()
    assert whole is not None
    assert whole > 1e9
    monkeypatch.setattr(memory, "CGROUP_LIMITS", [str(tmp_path / "small")])
    assert memory.ram_bytes() == 1_000_000_000


def test_commands_refuse_before_anything_is_allocated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, output = f"data.root={ROOT / 'docs' / 'photos'}", f"output={tmp_path / 'run'}"
    wide = "model.variant=[[1,1,1,1],[65536,65536,65536,65536]]"
    error = error_line(pretrain.main, capsys, "--config", "quickstart", photos, output, "model.decoder_dim=65536")
    assert error.startswith("error: model.decoder_dim=65536: takes ")
    labelled = tmp_path / "labelled"
    for name in ("a", "b"):
        (labelled / name).mkdir(parents=True)
        (labelled / name / "x.jpg").write_bytes((ROOT / "docs" / "photos" / "bird.jpg").read_bytes())
    words = [f"data.root={labelled}", output, "init_from=null", "data.val_split=null", wide]
    error = error_line(finetune.main, capsys, "--config", "small-folder-cpu", *words)
    assert error.startswith("error: model.variant=((1, 1, 1, 1), (65536, ")
    assert not (tmp_path / "run").exists()
