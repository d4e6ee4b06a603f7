"""Building MinkowskiEngine: what is missing is named in one line, the source is fixed, wheels are kept."""

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fcmae.encoder import install_minkowski
from fcmae.errors import UserError, run_script

ROOT = Path(__file__).parent.parent
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command the script would run; all of them succeed."""
    ran: list[list[str]] = []
    monkeypatch.setattr(install_minkowski, "run", lambda command, *_: ran.append(command) or True)
    return ran


def install(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["install_minkowski", *arguments])
        return run_script(install_minkowski.main)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refused call."""
    assert install(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_kept_wheel_is_installed_without_building(
    commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = install_minkowski.cache_folder(cuda=False)
    folder.mkdir(parents=True)
    wheel = folder / f"minkowskiengine-0.5.4-{TAG}-{TAG}-linux_x86_64.whl"
    wheel.touch()
    assert install("--cpu") == 0
    assert [command[-1] for command in commands if "pip" in command] == [str(wheel)]
    assert "building" not in capsys.readouterr().out


def test_a_wheel_of_another_torch_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    present = install_minkowski.cache_folder(cuda=False)
    assert install_minkowski.cache_folder(cuda=True) != present
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert install_minkowski.cache_folder(cuda=False) != present


def test_a_missing_compiler_is_named(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (no-such-compiler): apt install g++" in error_of(capsys, "--cpu")


def test_missing_blas_headers_are_named(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", "exit 1")))
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    (tmp_path / "Python.h").touch()
    assert "cblas.h is missing: apt install libopenblas-dev" in error_of(capsys, "--cpu")
    (tmp_path / "Python.h").unlink()
    assert "apt install python3-dev" in error_of(capsys, "--cpu")


def test_a_failed_build_names_its_first_error_and_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], log: Path, _environment: Any = None) -> bool:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(
                "  error: subprocess-exited-with-error\n  gpu.cuh:31:10: fatal error: curand.h: No such file\n"
            )
        return "--require-hashes" not in command

    monkeypatch.setattr(install_minkowski, "run", run)
    monkeypatch.setattr(install_minkowski, "require_compiler", lambda _: None)
    err = error_of(capsys, "--cpu")
    assert "did not build: gpu.cuh:31:10: fatal error: curand.h: No such file; the whole log is" in err
    assert not list(install_minkowski.cache_folder(cuda=False).glob("*.whl"))


@pytest.mark.parametrize(
    ("cuda", "nvcc", "expected"),
    [
        (None, "exit 0", "has no CUDA; install a CUDA build of torch"),
        ("13.2", None, "nvcc of CUDA 13.2 is missing: install its toolkit and set CUDA_HOME, or give --cpu"),
        ("13.2", "echo release 12.4, V12.4.1", "is of CUDA 12.4, but torch was built with CUDA 13.2"),
        ("13.2", "echo release 13.0, V13.0.88", "name its architecture, such as TORCH_CUDA_ARCH_LIST=9.0"),
    ],
)
def test_what_a_cuda_build_lacks_is_named(
    cuda: str | None,
    nvcc: str | None,
    expected: str,
    tmp_path: Path,
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(install_minkowski, "require_compiler", lambda _: None)
    monkeypatch.setattr(install_minkowski, "TOOLKITS", (str(tmp_path),))
    for folder in ("bin", "include"):
        (tmp_path / folder).mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    if nvcc:
        script(tmp_path / "bin" / "nvcc", nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    if nvcc is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert expected in error_of(capsys, "--cuda")


def wheel_of(folder: Path, files: dict[str, str]) -> Path:
    """A wheel of these files, as pip would have built it."""
    info = "minkowskiengine-0.5.4.dist-info"
    files = files | {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: MinkowskiEngine\nVersion: 0.5.4\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {TAG}-{TAG}-linux_x86_64\n",
    }
    for name, text in files.items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "-m", "wheel", "pack", str(folder / "source"), "--dest-dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_five_imports_are_fixed_and_nothing_else(tmp_path: Path) -> None:
    text = "import os\nfrom collections import Sequence\nx = 'from collections import Sequence'\n"
    files = {f"MinkowskiEngine/m{i}.py": text for i in range(4)}
    files["MinkowskiEngine/kernel.py"] = "from collections import Sequence, namedtuple\n"
    files["MinkowskiEngine/other.py"] = "from collections import OrderedDict\n"
    fixed = install_minkowski.fix_imports(wheel_of(tmp_path, files), tmp_path, tmp_path / "log")
    with zipfile.ZipFile(fixed) as archive:
        after = {name: archive.read(name).decode() for name in files}
    for i in range(4):
        assert after[f"MinkowskiEngine/m{i}.py"] == text.replace(
            "os\nfrom collections ", "os\nfrom collections.abc "
        )
    namespace: dict[str, Any] = {}
    exec(after["MinkowskiEngine/kernel.py"], namespace)
    assert {"Sequence", "namedtuple"} <= namespace.keys()
    assert after["MinkowskiEngine/other.py"] == files["MinkowskiEngine/other.py"]


def test_another_source_than_expected_is_refused(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, {"MinkowskiEngine/m.py": "from collections import Sequence\n"})
    with pytest.raises(UserError, match=r"expected five imports of collections\.Sequence to fix, found 1"):
        install_minkowski.fix_imports(wheel, tmp_path, tmp_path / "log")


def test_the_extra_names_what_the_build_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["optional-dependencies"]["minkowski"], *project["dependencies"]]
    names = {requirement.split(">=")[0] for requirement in named}
    assert set(install_minkowski.TOOLS) <= names


def test_no_source_of_the_engine_is_in_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert not [
        name for name in tracked.splitlines() if "MinkowskiEngine" in name or name.endswith((".cu", ".cuh"))
    ]
