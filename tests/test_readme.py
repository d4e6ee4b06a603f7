"""The README's commands and snippets run as they stand, made short by further overrides."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fcmae import ConvNeXtV2
from fcmae.weights.base import Preprocessing
from fcmae.weights.timm import write_timm_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def shell(command: list[str], timeout: int = 250) -> str:
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(Path.home()), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def shortened(run: Path) -> list[str]:
    small = ["model.variant=[[1,1,1,1],[8,8,16,16]]", "model.decoder_dim=16", "data.batch_size=2"]
    source = ["data.name=folder", f"data.root={ROOT / 'docs' / 'photos'}", "data.num_workers=0"]
    return [*small, *source, "optim.accumulate=1", "train.max_steps=2", "train.precision=no", f"output={run}"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a `make quickstart` of two steps."""
    folder = tmp_path_factory.mktemp("readme") / "quickstart"
    ready = f"{sys.prefix}/.fcmae-ready"
    overrides = f"train.max_steps=2 visualize.num_images=2 output={folder}"
    out = shell(["make", "-o", ready, f"VENV={sys.prefix}", "quickstart", f"ARGS={overrides}"])
    assert f"tensorboard --logdir {folder}" in out
    assert str(folder / "reconstructions") in out
    assert len(list((folder / "reconstructions").glob("*.png"))) == 2
    return folder


def quickstart_losses(record: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in record.read_text().splitlines()]


def test_the_quickstarts_loss_falls_clearly_below_one(tmp_path: Path) -> None:
    overrides = ["train.max_steps=75", "visualize.num_images=0", f"output={tmp_path / 'run'}"]
    shell(["python", "pretrain.py", "--config", "configs/quickstart.yaml", *overrides])
    history = quickstart_losses(tmp_path / "run" / "metrics.jsonl")
    assert history[-1] < 0.8


def test_the_readme_and_the_config_tell_the_reference_records_result() -> None:
    config = (ROOT / "configs" / "quickstart.yaml").read_text()
    last = quickstart_losses(ROOT / "docs" / "quickstart.jsonl")[-4:]
    told = f"1.01 to {sum(last) / 4:.2f}"
    assert told in README
    assert told in config


def labelled(root: Path, held_out: str = "test") -> list[str]:
    """Overrides that take the halves of the photographs, left or right, for labelled images."""
    photos = [Image.open(path) for path in sorted((ROOT / "docs" / "photos").glob("*.jpg"))]
    for i, photo in enumerate(photos):
        for name, left in (("left", 0), ("right", photo.width // 2)):
            path = root / "labelled" / ("train" if i < 9 else held_out) / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.crop((left, 0, left + photo.width // 2, photo.height)).save(path)
    return [f"data.root={root / 'labelled'}", "data.num_workers=0", "data.batch_size=4"]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path, quickstart: Path) -> None:
    words = shlex.split(command)
    if words[:2] == ["make", "quickstart"]:
        assert (quickstart / "checkpoints" / "last").exists()
    elif words[0] == "make":
        shell([*words, "-n", f"VENV={sys.prefix}"])
    elif words[0] == "tensorboard":
        out = shell(["tensorboard", "--inspect", "--logdir", str(quickstart)])
        assert "reconstructions" in out
    elif words[:2] == ["fcmae", "evaluate"]:
        out = shell(["python", "-m", "fcmae", "evaluate", str(quickstart), *words[3:], *labelled(tmp_path)])
        assert "linear probe" in out
    elif words[:2] == ["fcmae", "prepare"]:
        places = {"path/to/images": str(ROOT / "docs" / "photos"), "path/to/prepared": str(tmp_path / "prepared")}
        told = shell([sys.executable, "-m", "fcmae", *(places.get(word, word) for word in words[1:])])
        assert "train: 13 images" in told
        assert f"data.name=arrays data.root={places['path/to/prepared']}" in told
    elif words[0] == "fcmae":
        model = tmp_path / "classifier" / "model"
        classifier = ConvNeXtV2(((1, 1, 1, 1), (8, 8, 16, 16)), num_classes=2)
        write_timm_folder(classifier, Preprocessing((0.5,) * 3, (0.5,) * 3, (64, 64)), model)
        places = {"runs/quickstart": str(quickstart)}
        words = [places.get(word, re.sub("^runs/", f"{tmp_path}/", word)) for word in words[1:]]
        assert shell([sys.executable, "-m", "fcmae", *words])
    elif "finetune.py" in words:
        options = [*labelled(tmp_path, "val"), "train.max_steps=2", "optim.accumulate=1", "data.image_size=64"]
        options += ["model.variant=[[1,1,1,1],[8,8,16,16]]", f"output={tmp_path / 'run'}"]
        train = ["python", "finetune.py", "--config", "configs/finetune/tiny.yaml", *options]
        if "--evaluate" in words:
            shell([*train, "init_from=null"])
            out = shell([str(tmp_path / "run") if word.startswith("runs/") else word for word in words])
            assert re.search(r"^right +4 ", out, re.MULTILINE)
        else:
            assert words[3:5] == train[2:4]
            source = ["python", "pretrain.py", "--config", "configs/quickstart.yaml", "model.stem_stride=4"]
            shell([*source, *shortened(tmp_path / "mine"), "visualize.num_images=0"])
            shell([*words, *options, f"init_from={tmp_path / 'mine'}"])
            assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    else:
        assert "pretrain.py" in words, f"no rule for running: {command}"
        config = words[words.index("--config") + 1]
        assert (ROOT / config).is_file()
        out = shell([*words, *shortened(tmp_path / "run")])
        if "--dry-run" in words or "--print-config" in words:
            assert not (tmp_path / "run").exists()
            assert out
        else:
            assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda text: text.splitlines()[0])
def test_a_snippet_of_the_readme_runs(snippet: str, quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart.parent)
    exec(compile(snippet.replace("runs/quickstart", "quickstart"), "README.md", "exec"), {})


def test_every_file_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
