"""The precision of a run, and what launches it: accelerate's configurations, and the jobs that the pages show."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import launch as environments
from conftest import ROOT
from processes import FSDP
from small_runs import batches, small_config, small_trainer
from torch import nn
from torch.distributed import run as torchrun

from fcmae import arguments
from fcmae.config import TrainSection, shipped_configs
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


# accelerate's configurations


LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def require_good(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Hold that a run's command, from its script on, is one that fcmae takes."""
    assert words[0] in ("pretrain.py", "fcmae.pretrain")
    assert arguments.pretrain([*words[1:], "--print-config"]) == 0
    assert capsys.readouterr().out.startswith("output: ")


def command_of(path: Path) -> list[str]:
    """The words after `accelerate launch` in the header of a configuration."""
    (line,) = re.findall(r"^#   accelerate launch (.*)$", path.read_text(), re.MULTILINE)
    return shlex.split(line)


def launched(path: Path) -> Any:
    """What accelerate makes of a configuration's own command."""
    return _validate_launch_command(launch_command_parser().parse_args(command_of(path)))[0]


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_takes_every_key_and_the_command_in_the_header(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    found: Any = load_config_from_file(str(path))  # which refuses unknown keys, but not in sections
    for key, value in found.fsdp_config.items():
        assert key.startswith("fsdp_")
        given = [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        launch_command_parser().parse_args([*given, "pretrain.py"])
    options = launched(path)
    assert options.config_file == str(path.relative_to(ROOT))
    require_good([options.training_script, *options.training_script_args], capsys)


def test_the_configurations_launch_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {path.stem: launched(path) for path in LAUNCHES}
    processes = {"cpu": 1, "one-gpu": 1, "eight-gpus": 8, "two-by-eight": 16, "fsdp": 8}
    assert {name: options.num_processes for name, options in found.items()} == processes
    assert found["cpu"].use_cpu
    assert {name for name, options in found.items() if options.multi_gpu} == {"eight-gpus", "two-by-eight"}
    assert (found["two-by-eight"].num_machines, found["two-by-eight"].machine_rank) == (2, 0)
    environment = environments.prepare_multi_gpu_env(found["fsdp"])
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no", "or train.precision=auto would be what was launched"
    for name in ("ACCELERATE_USE_FSDP", *(name for name in environment if name.startswith("FSDP_"))):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert asked_sharding(TrainSection()) == (("Block",), True, False)


def test_configurations_of_accelerate_are_no_recipes() -> None:
    assert LAUNCHES
    assert not {*shipped_configs().values()} & {*LAUNCHES}


# Jobs


PAGE = (ROOT / "docs" / "many-gpus.md").read_text()


def block(language: str, part: str) -> str:
    """The fenced block of the page that has `part` in it."""
    (found,) = (text for text in re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S) if part in text)
    return found


def require_torchrun(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Hold that torchrun and fcmae take a command; returns what torchrun understands."""
    assert words[0] == "torchrun"
    options = torchrun.parse_args(words[1:])
    torchrun.config_from_args(options)
    assert options.module
    require_good([options.training_script, *options.training_script_args], capsys)
    return options


def script_words(script: str, command: str, **variables: str) -> list[str]:
    """The words of a script's command, from `command` on, its variables replaced."""
    line = next(line for line in script.replace("\\\n", " ").splitlines() if command in line)
    for name, value in variables.items():
        line = line.replace(f"${name}", value)
    return shlex.split(line[line.index(command) :].removesuffix(" &"))


def test_the_command_for_several_machines_is_one_that_torchrun_and_fcmae_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = block("bash", "FIRST:29400")
    options = require_torchrun(script_words(script, "torchrun"), capsys)
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "8", 3)
    assert "resume=auto" in options.training_script_args
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script


SLURM = {
    "--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time", "--requeue",
    "--open-mode", "--signal",
}  # fmt: skip
"""Options of sbatch that its manual has."""


def test_the_slurm_script_is_a_shells_and_leaves_time_to_save_and_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = block("bash", "#SBATCH")
    subprocess.run([shutil.which("bash") or "sh", "-n"], input=script, text=True, check=True)
    given = [word for line in re.findall(r"^#SBATCH (.*)$", script, re.M) for word in line.split()]
    options = dict(word.partition("=")[::2] for word in given)
    assert options.keys() == SLURM
    assert script.startswith("#!/bin/bash\n#SBATCH "), "what follows a command is not read"
    signal = re.fullmatch(r"B:TERM@(\d+)", options["--signal"])
    (left,) = re.findall(r"SHUTDOWN_TIMEOUT=(\d+)", script)
    assert signal
    assert 30 < int(left) < int(signal[1])
    words = script_words(script, "torchrun", SLURM_NNODES=options["--nodes"], SLURM_JOB_ID="1", first="host")
    found = require_torchrun(words, capsys)
    assert found.nproc_per_node == options["--gpus-per-node"]
    assert "resume=auto" in found.training_script_args


def test_the_slurm_script_passes_a_signal_on_waits_and_queues_the_job_again(tmp_path: Path) -> None:
    said = tmp_path / "said"
    commands = {
        "scontrol": f'echo "scontrol $*" >> {said}; echo host',
        "srun": f'trap "sleep 0.2; echo saved >> {said}; exit 1" TERM\nkill -TERM $PPID\nwhile :; do sleep 1; done',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    places = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    subprocess.run(["bash", "-c", block("bash", "#SBATCH")], env=places, check=False, timeout=100)
    assert said.read_text().splitlines()[1:] == ["saved", "scontrol requeue 7"]


def test_the_kubernetes_job_has_shared_memory_time_to_save_and_a_command_that_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    service, job = yaml.safe_load_all(block("yaml", "kind: Job"))
    assert (service["apiVersion"], job["apiVersion"]) == ("v1", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]
    assert spec["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never", "which podFailurePolicy wants"
    (container,) = pod["containers"]
    options = require_torchrun(container["command"], capsys)
    assert str(spec["completions"]) == str(spec["parallelism"]) == options.nnodes
    assert options.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29400"
    assert options.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    settings = dict(word.split("=", 1) for word in options.training_script_args if not word.startswith("-"))
    assert settings["resume"] == "auto"
    assert settings["data.root"] == mounts["images"]
    assert Path(settings["output"]).is_relative_to(mounts["runs"])
