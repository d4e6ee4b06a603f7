"""What pip installs trains, fine-tunes and predicts from an empty folder, in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

NETWORK = "model.variant=[[1,1,1,1],[8,8,16,16]]"
SMALL = [NETWORK, "data.image_size=64", "data.batch_size=2", "data.num_workers=0"]
SMALL += ["optim.images_per_update=null", "optim.accumulate=1"]


ONE_BY_ONE = """
import json, sys
from fcmae.__main__ import run
for command in json.loads(sys.argv[1]):
    assert run(command) == 0
"""
"""In one process, as importing torch takes seconds."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, as building leaves files behind."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("fcmae", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out), str(tree))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel, beside whose packages are those of this one."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip("--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    (packages,) = environment.rglob("site-packages")
    # .pth files in there, as that of an editable fcmae, are not read
    (packages / "dependencies.pth").write_text("\n".join({sysconfig.get_path(p) for p in ("purelib", "platlib")}))
    return python


def own_environment() -> dict[str, str]:
    """This process's environment, without what would lead to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def call(python: Path, folder: Path, *arguments: str) -> str:
    """Run a program of the environment in a folder; returns its output."""
    done = subprocess.run(
        [str(python.with_name(arguments[0])), *arguments[1:]],
        cwd=folder,
        env=own_environment() | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_all_modules_configurations_types_and_the_engines_source(wheel: Path) -> None:
    tree = {
        path.relative_to(ROOT / "fcmae").as_posix()
        for pattern in ("*.py", "*.hpp", "*.html", "py.typed")
        for path in (ROOT / "fcmae").rglob(pattern)
    }
    tree |= {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.yaml", "*.jsonl")
        for path in (ROOT / "configs").rglob(pattern)
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {f"fcmae/{name}" for name in tree}


def test_installed_it_trains_and_predicts_from_an_empty_folder(python: Path, tmp_path: Path) -> None:
    photos = sorted((ROOT / "docs" / "photos").glob("*.jpg"))[:4]
    images, here = tmp_path / "images", tmp_path / "empty"
    here.mkdir()
    for i, photo in enumerate(photos):
        for split in ("train", "val"):
            place = images / split / "ab"[i % 2] / photo.name
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.open(photo).resize((64, 64)).save(place)

    where = call(python, here, "python", "-c", "import fcmae; print(fcmae.__file__)")
    assert Path(where.strip()).is_relative_to(python.parent.parent)
    assert call(python, here, "fcmae", "--version").startswith("fcmae ")
    assert call(python, here, "python", "-m", "fcmae.finetune", "--help").startswith("usage: ")
    assert "\npretrain/atto " in call(python, here, "fcmae", "configs")

    run = ["--config", "atto", str(images), "output=run", "train.max_steps=3", "model.decoder_dim=16", *SMALL]
    tuned = ["--config", "atto", str(images), "init_from=run", "output=tuned", "train.max_steps=2", *SMALL]
    predict = ["tuned", str(photos[0]), "--top", "2"]
    commands = [["pretrain", *run], ["finetune", *tuned], ["predict", *predict]]
    said = call(python, here, "python", "-c", ONE_BY_ONE, json.dumps(commands))
    assert {path.name for path in here.iterdir()} == {"run", "tuned"}
    assert len(list((here / "run" / "reconstructions").glob("step-*"))) == 2

    *_, image, first, second = said.splitlines()
    assert image == str(photos[0])
    assert sorted(line.split()[1] for line in (first, second)) == ["a", "b"]
