"""What is installed: by conda and pip the same packages; and `make` says what is missing."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from fcmae.encoder import install_minkowski

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


OWN_EXTRAS = "fcmae[bench,datasets,deep,dicom,docs,export,nifti]"
"""What the tests need of our own extras."""


def test_conda_and_pip_users_get_the_same_packages() -> None:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in environment if isinstance(entry, dict))
    others, (own,) = {*extras["dev"]} - {OWN_EXTRAS}, {*extras["dev"]} & {OWN_EXTRAS}
    named = [*own.removeprefix("fcmae[").removesuffix("]").split(","), "minkowski"]
    wanted = {*project["dependencies"], *others, *(package for name in named for package in extras[name])}
    assert sorted(pip) == sorted({*wanted, "--editable ."})
    assert f"python{project['requires-python']}" in environment


def test_the_conda_environment_has_what_minkowskiengine_is_built_with_and_says_how() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert {"cxx-compiler", "openblas"} <= set(
        filter(lambda entry: isinstance(entry, str), yaml.safe_load(text)["dependencies"])
    )
    assert f"python -m {install_minkowski.__name__}" in text


def test_the_extra_has_what_the_installer_takes() -> None:
    assert {*install_minkowski.TOOLS} - {"numpy"} == {*PYPROJECT["project"]["optional-dependencies"]["minkowski"]}


def test_every_package_is_named_and_the_configurations_lie_in_it() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fcmae").rglob("*.py")}
    assert sorted(setuptools["packages"]) == sorted({".".join(path.parts) for path in folders} | {"fcmae.configs"})
    assert setuptools["package-dir"]["fcmae.configs"] == "configs"


MISSING_ELSEWHERE = """
import os, sys
import accelerate, numba, psutil, safetensors.torch, timm, torch.utils.tensorboard, torchmetrics, torchvision
for name in ("resource", "fcntl", "pwd", "grp", "termios", "pty", "tty", "syslog", "posix"):
    sys.modules[name] = None
for name in ("pread", "pwrite", "preadv", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "fork", "getuid",
             "geteuid", "killpg", "mkfifo", "sysconf", "O_DIRECTORY", "statvfs", "sync"):
    if hasattr(os, name):
        delattr(os, name)
"""
"""Other packages imported as they are; then what Windows, or macOS, lacks taken away."""


def test_every_module_is_imported_where_only_linux_has_what_is_missing() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "fcmae").rglob("*.py"))
        if not path.stem.endswith("_triton")  # which CUDA alone runs, and Triton is for Linux
    ]
    program = MISSING_ELSEWHERE + "".join(f"import {module.removesuffix('.__init__')}\n" for module in modules)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr


def test_versions_agree() -> None:
    import fcmae

    assert PYPROJECT["project"]["version"] == fcmae.__version__
    assert f"version: {fcmae.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {fcmae.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_photograph_is_attributed_and_together_they_stay_small() -> None:
    photos = sorted((ROOT / "docs" / "photos").glob("*.jpg"))
    attribution = (ROOT / "docs" / "photos" / "ATTRIBUTION.md").read_text()
    assert len(photos) == 13
    assert all(f"| {photo.name} " in attribution for photo in photos)
    assert sum(photo.stat().st_size for photo in photos) < 2_000_000


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("test", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "error: fcmae needs Python 3.11 or newer" in done.stdout
    assert not (tmp_path / "venv").exists()


def test_make_says_in_one_line_that_torch_and_torchvision_do_not_fit(tmp_path: Path) -> None:
    broken = tmp_path / "venv" / "bin" / "python"
    broken.parent.mkdir(parents=True)
    shadow = tmp_path / "shadow" / "torchvision"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *pip*) exit 0;; esac\n'
        f'PYTHONPATH={shadow.parent}:{ROOT} exec {sys.executable} "$@"\n'
    )
    broken.chmod(0o755)
    done = make("test", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"torchvision does not work with torch \d.*nms does not exist.*reinstall both", errors[0])
    assert not (tmp_path / "venv" / ".fcmae-ready").exists()


@pytest.mark.parametrize("target", ["quickstart", "minkowski", "test", "test-other-cpu", "check", "bench"])
def test_the_targets_exist(target: str, tmp_path: Path) -> None:
    assert make("-n", target, f"VENV={tmp_path / 'venv'}").returncode == 0
    assert re.search(rf"^{target} +\w", make("help").stdout, re.MULTILINE)


def test_make_test_goes_on_without_an_engine_that_cannot_be_built_and_says_so(tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\ncase "$*" in *minkowski*) echo "error: no C++ compiler" >&2; exit 2;; esac\necho "$*"\n'
    )
    python.chmod(0o755)
    ready = tmp_path / "venv" / ".fcmae-ready"
    ready.touch()
    done = make("-o", str(ready), "test", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 0
    assert "error: no C++ compiler" in done.stderr
    assert re.search(r"going on without MinkowskiEngine.*\n.*-m pytest", done.stdout)


def test_ci_checks_builds_the_engine_and_tests_twice() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    steps = ["make check", "make minkowski", "make test-other-cpu", "make test"]
    assert [line for line in lines if line.startswith("make ")] == steps
    assert lines[-1] == steps[-1]
