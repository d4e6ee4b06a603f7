"""fcmae doctor: a sound machine passes, each fault is found with its remedy, and nothing is left behind."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Command
from torch import Tensor

from fcmae import doctor
from fcmae.doctor import Finding
from fcmae.encoder.layouts import Sites
from fcmae.seeding import cpu_states

CPU = torch.device("cpu")
Patch = pytest.MonkeyPatch


def test_a_sound_machine_passes_and_nothing_is_left(command: Command, tmp_path: Path) -> None:
    states = cpu_states()
    code, out, err = command("doctor", "--output", tmp_path / "runs" / "mine")
    assert (code, err) == (0, "")
    assert not [*tmp_path.iterdir()]
    assert cpu_states() == states
    lines = out.splitlines()
    named = [line[9:28].strip() for line in lines[:-2] if not line.startswith(" ")]
    assert named[:3] == ["fcmae", "torch", "torchvision"]
    assert {"masked on cpu", "packed on cpu", "dense on cpu"} <= {*named}
    assert lines[-1].startswith("runs can start here")
    assert "failed" not in out


def test_what_failed_is_followed_by_its_remedy_and_ends_with_exit_code_1(
    command: Command, monkeypatch: Patch
) -> None:
    found = [
        Finding("a", "OK", "well"),
        Finding("b", "failed", "broken", "fix it"),
        Finding("c", "warning", "w", "x"),
    ]
    monkeypatch.setattr(doctor, "diagnose_machine", lambda output: iter(found))
    code, out, _ = command("doctor")
    assert code == 1
    assert "failed   b                  broken\n                            -> fix it\n" in out
    assert out.endswith("\n1 of 3 checks failed: a run needs what their remedies say\n")
    code, out, _ = command("doctor", "--json")
    assert code == 1
    assert [Finding(**one) for one in json.loads(out)] == found
    monkeypatch.setattr(doctor, "diagnose_machine", lambda output: iter([found[0], found[2]]))
    code, out, _ = command("doctor")
    assert code == 0
    assert out.endswith("\nruns can start here; 1 warning\n")


def test_a_torch_that_does_not_load_ends_the_examination(
    command: Command, tmp_path: Path, monkeypatch: Patch
) -> None:
    def fail(name: str) -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "import_module", fail)
    code, out, _ = command("doctor", "--output", tmp_path)
    assert code == 1
    assert "failed   torch              OSError: libcudart.so.12: cannot open shared object file\n" in out
    assert "pytorch.org/get-started" in out
    assert "1 of 2 checks failed" in out


def test_a_check_that_ends_early_has_failed_by_what_it_says() -> None:
    def fail() -> Finding:
        raise RuntimeError("no kernel image\nis available")

    found = doctor.examine("packed on cuda", fail, "another torch")
    assert found == ("packed on cuda", "failed", "RuntimeError: no kernel image is available", "another torch")


# Packages


def test_a_torchvision_of_another_torch_is_found(monkeypatch: Patch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", "torch==1.13.1"])
    found = doctor.torchvision_pair()
    assert found.state == "failed"
    assert "built for torch 1.13.1" in found.text


def test_packages_that_are_missing_or_too_old_are_named(monkeypatch: Patch) -> None:
    versions = {"timm": "0.9.16", "accelerate": "1.10.0", "einops": "0.8"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    required = ["timm>=1.0.20", "accelerate>=1.10", "einops>=0.8", "tqdm>=4.66", 'onnx>=1.18; extra == "export"']
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    monkeypatch.setattr(metadata, "version", version)
    found = doctor.other_packages()
    assert found.state == "failed"
    assert found.text.startswith("timm 0.9.16 is older than 1.0.20; tqdm is missing; ")
    versions |= {"timm": "1.0.20", "tqdm": "4.67.1"}
    assert doctor.other_packages().state == "OK"


# GPUs, simulated


def with_driver(monkeypatch: Patch, version: str | None) -> None:
    monkeypatch.setattr(doctor, "driver_version", lambda: version)


def without_gpu(monkeypatch: Patch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def with_gpus(monkeypatch: Patch, *, bf16: bool = True, free: float = 140e9) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr("fcmae.training.launch.has_bf16", lambda device: bf16)
    monkeypatch.setattr("fcmae.training.memory.free_and_total", lambda device: (free, 150e9))


def test_a_machine_without_a_gpu_is_well(monkeypatch: Patch) -> None:
    without_gpu(monkeypatch)
    with_driver(monkeypatch, None)
    assert doctor.gpus() == ("GPU", "OK", "none: runs compute on the CPU", "")
    with_driver(monkeypatch, "550.54")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.gpus().state == "OK"


@pytest.mark.parametrize(("built", "said"), [(None, "built without CUDA"), ("13.2", "no GPU for the CUDA 13.2")])
def test_a_gpu_that_torch_does_not_see_has_failed(built: str | None, said: str, monkeypatch: Patch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    without_gpu(monkeypatch)
    with_driver(monkeypatch, "550.54")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", init)
    found = doctor.gpus()
    assert found.state == "failed"
    assert said in found.text
    assert "install a torch that fits" in found.remedy
    assert built is None or "driver on your system is too old" in found.text


def test_gpus_are_counted_with_what_they_have(monkeypatch: Patch) -> None:
    with_driver(monkeypatch, "580.1")
    with_gpus(monkeypatch)
    found = doctor.gpus()
    assert found.state == "OK"
    assert found.text.startswith("2 x NVIDIA H200 of 150 GB, bf16; ")
    assert found.text.endswith(", driver 580.1")
    with_gpus(monkeypatch, bf16=False)
    found = doctor.gpus()
    assert (found.state, found.remedy[:22]) == ("warning", "train.precision=fp16 t")
    with_gpus(monkeypatch, free=1e9)
    assert "other programs hold" in doctor.gpus().text


def test_the_driver_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: Patch) -> None:
    program = tmp_path / "nvidia-smi"
    for script, expected in (("echo 550.54\necho 550.54", "550.54"), ("echo failed\nexit 9", None)):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert doctor.driver_version() == expected
    program.unlink()
    assert doctor.driver_version() is None


def test_a_gpu_wants_triton_and_a_c_compiler(monkeypatch: Patch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.triton().state == "OK"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(metadata, "version", lambda name: "3.4.0")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor.triton() == ("Triton", "OK", "3.4.0", "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert (doctor.triton().state, doctor.triton().remedy[:15]) == ("failed", "apt install gcc")
    monkeypatch.setattr(metadata, "version", missing)
    assert (doctor.triton().state, doctor.triton().remedy) == ("failed", "pip install triton")


# The machine


def test_a_missing_or_broken_compiler_is_a_warning(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    found = doctor.compiler()
    assert (found.state, found.remedy) == ("warning", "apt install g++, or name one in CXX")
    assert "train.compile=true needs it" in found.text
    (tmp_path / "c++").write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    (tmp_path / "c++").chmod(0o755)
    assert (doctor.compiler().state, doctor.compiler().text[-6:]) == ("warning", "broken")
    (tmp_path / "c++").write_text("#!/bin/sh\necho 'c++ 12.2'\n")
    assert doctor.compiler().state == "OK"


def test_an_engine_that_does_not_load_is_a_warning_and_a_missing_one_is_none(monkeypatch: Patch) -> None:
    def fail() -> Any:
        raise ValueError("layout 'minkowski' needs MinkowskiEngine") from ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert doctor.minkowski().state == "OK"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr("fcmae.encoder.minkowski.import_engine", fail)
    found = doctor.minkowski()
    assert (found.state, found.remedy) == ("warning", doctor.BUILD_ENGINE)
    assert "undefined symbol" in found.text


def test_a_disk_is_measured_where_the_output_goes_and_left_as_it_was(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "WRITTEN_BYTES", 1 << 20)
    found = doctor.disk(tmp_path / "some" / "run")
    assert found.text.startswith(f"{tmp_path}: ")
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(doctor, "SLOW_BYTES_S", 1e15)
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 1e10)
    assert "name a faster disk" in doctor.disk(tmp_path).remedy
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 1e9)
    found = doctor.disk(tmp_path)
    assert (found.state, found.remedy[:15]) == ("warning", "free some space")


def test_a_place_that_cannot_be_written_has_failed(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "file").write_text("")
    found = doctor.disk(tmp_path / "file" / "run")
    assert (found.state, found.text) == (
        "failed",
        f"output={tmp_path}/file/run: {tmp_path}/file exists already; name another folder",
    )

    def full(size: int) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "urandom", full)
    found = doctor.examine("disk", lambda: doctor.disk(tmp_path), "name another disk by output=FOLDER")
    assert (found.state, found.remedy) == ("failed", "name another disk by output=FOLDER")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_little_shared_memory_is_a_warning_with_what_docker_takes(monkeypatch: Patch) -> None:
    monkeypatch.setattr("fcmae.data.shared_memory.free_shared_bytes", lambda: 64e6)
    monkeypatch.setattr("fcmae.story.cores_per_process", lambda: 8)
    found = doctor.shared_memory()
    assert found.state == "warning"
    assert found.text.startswith("/dev/shm: 64.0 MB of shared memory free")
    assert found.remedy.startswith("docker run --shm-size=")
    monkeypatch.setattr("fcmae.data.shared_memory.free_shared_bytes", lambda: float("inf"))
    assert doctor.shared_memory().state == "OK"


def test_more_threads_than_cores_are_a_warning(monkeypatch: Patch) -> None:
    monkeypatch.setattr("fcmae.story.cores_per_process", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    found = doctor.cores()
    assert (found.state, found.remedy) == ("warning", "set OMP_NUM_THREADS=2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert doctor.cores().state == "OK"


# The layouts


def off_by(factor: float) -> Callable[[Sites, Tensor], Tensor]:
    norm = Sites.norm
    return lambda self, x: factor * norm(self, x)


@pytest.mark.parametrize("layout", ["packed", "dense", pytest.param("minkowski", marks=pytest.mark.minkowski)])
def test_a_layout_that_computes_wrongly_is_found(layout: Any, monkeypatch: Patch) -> None:
    assert doctor.layout_check(layout, CPU).state == "OK"
    features = doctor.features_and_gradient

    def wrong(name: Any, *arguments: Any, **how: Any) -> list[Tensor]:
        right, gradient = features(name, *arguments, **how)
        return [right, gradient * (1.001 if name == layout else 1)]

    monkeypatch.setattr(doctor, "features_and_gradient", wrong)
    found = doctor.layout_check(layout, CPU)
    assert (found.name, found.state) == (f"{layout} on cpu", "warning" if layout == "minkowski" else "failed")
    assert found.text.startswith("wrong: forward and gradient within 1e-03 in float32")
    assert found.remedy


def test_a_layout_that_computes_no_number_has_failed(monkeypatch: Patch) -> None:
    features = doctor.features_and_gradient
    monkeypatch.setattr(
        doctor,
        "features_and_gradient",
        lambda name, *a, **k: [x * (torch.nan if name == "packed" else 1) for x in features(name, *a, **k)],
    )
    assert doctor.layout_check("packed", CPU).state == "failed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "layout", ["masked", "packed", "dense", pytest.param("minkowski", marks=pytest.mark.minkowski)]
)
def test_layouts_pass_on_a_sound_gpu(layout: Any) -> None:
    found = doctor.layout_check(layout, torch.device("cuda"))
    assert found.state == "OK", found


def test_the_check_of_layouts_sees_grn_and_every_weight() -> None:
    reference = doctor.features_and_gradient("masked", CPU, "float64", all_visible=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcmae.encoder.layouts.MaskedSites.norm", off_by(1.1))
        changed = doctor.features_and_gradient("masked", CPU, "float64", all_visible=False)
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(changed, reference, strict=True))
    assert bool((reference[1] != 0).float().mean() > 0.99)


def test_help_says_what_the_exit_codes_mean(command: Command) -> None:
    code, out, _ = command("doctor", "--help")
    assert code == 0
    assert "exit code 0 if runs can start" in out
    assert command("doctor", "--paint")[0] == 2
