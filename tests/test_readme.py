"""The README's commands and snippets run as they stand, from top to bottom, made short by what is appended.

Of the other pages the snippets run and the links lead somewhere.
"""

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of a page's fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


COMMANDS = [
    line
    for language, text in blocks(README)
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
SNIPPETS = [(page, text) for page in PAGES for language, text in blocks(page.read_text()) if language == "python"]

SMALL = "model.variant=[[1,1,1,1],[8,8,16,16]] data.num_workers=0 train.max_steps=2"
SMALL += " optim.images_per_update=null optim.accumulate=1"
PRETRAIN = f"{SMALL} model.decoder_dim=16 data.batch_size=2 train.precision=no visualize.num_images=0"
FINETUNE = f"{SMALL} data.image_size=64 data.batch_size=4"
VENV = f"VENV={sys.prefix}"
QUICK = f"-o {sys.prefix}/.fcmae-ready {VENV} ARGS='train.max_steps=75 visualize.num_images=2'"

RULES = (
    # a command that begins so | is run with this appended, | prints this | and leaves this behind; None: nothing
    (r"make quickstart", QUICK, r"tensorboard --logdir runs/quickstart\b", "runs/quickstart/reconstructions/*.png"),
    (r"make ", f"-n {VENV}", r"", None),
    (r"pip install ", "--help", r"Install Options", None),  # tests/test_wheel.py installs it
    (r"tensorboard ", "--inspect", r"reconstructions", None),
    (r"fcmae ablate ", "", r"fcmae\.finetune --config finetune/cifar10-small", None),
    (r".*(--dry-run|--print-config)", PRETRAIN, r".", None),
    (r".*--find-lr", PRETRAIN, r"suggested +optim\.base_lr=", "runs/*-find-lr.png"),
    (r".*--evaluate runs/segmenter", "", r"(?m)^bright .+%", "runs/segmenter/iou.png"),
    (r".*--evaluate runs/", "", r"(?m)^right +4 ", "runs/*/confusion*.png"),
    (r"fcmae evaluate", "data.num_workers=0 data.batch_size=4", r"linear probe", None),
    (r".*\bfinetune(\.py)? ", FINETUNE, r"", "runs/*/model/model.safetensors"),
    (r".*\bpretrain(\.py)? ", PRETRAIN, r"", "runs/*/encoder/model.safetensors"),
    (r"fcmae report (\S+)", "", r"Finished", r"\1/report.html"),
    (r"fcmae doctor", "", r"runs can start here", None),
    (r"fcmae plan", "", r"limit +starting kernels", None),
    (r"fcmae shard", "", r"13 images", "path/to/shards/*"),
    (r"fcmae prepare", "", r"(?s)train: 13 images.*data.name=arrays data.root=path/to/prepared", "path/*/train/*"),
    (r"fcmae .*--output runs/(\S+)", "", r".", r"runs/\1/*"),
    (r"fcmae ", "", r".", None),
)


class Ran(NamedTuple):
    code: int
    out: str
    error: str
    written: set[str]


def label_halves(folder: Path) -> None:
    """Make labelled images of the photographs: left halves and right halves, in three splits."""
    for i, path in enumerate(sorted((ROOT / "docs" / "photos").glob("*.jpg"))):
        photo = Image.open(path)
        for name, left in (("left", 0), ("right", photo.width // 2)):
            half = photo.crop((left, 0, left + photo.width // 2, photo.height))
            for split in ("train",) if i < 9 else ("val", "test"):
                place = folder / split / name / f"{i}.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                half.save(place)


def mask_brightness(folder: Path) -> None:
    """Give the photographs masks of two classes: the darker half of the pixels, and the others."""
    for i, path in enumerate(sorted((ROOT / "docs" / "photos").glob("*.jpg"))):
        gray = np.asarray(Image.open(path).convert("L"))
        mask = Image.fromarray((gray > np.median(gray)).astype(np.uint8))
        split = folder / ("train" if i < 9 else "val")
        for place in (split / "images", split / "masks"):
            place.mkdir(parents=True, exist_ok=True)
        (split / "images" / path.name).symlink_to(path)
        mask.save(split / "masks" / f"{path.stem}.png")
    (folder / "classes.txt").write_text("dark\nbright\n")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the README's paths lead somewhere: into this checkout, and to images."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("Makefile", "pyproject.toml", "configs", "docs", "pretrain.py", "finetune.py"):
        (folder / name).symlink_to(ROOT / name)
    label_halves(folder / "path" / "to" / "labelled")
    mask_brightness(folder / "path" / "to" / "masked")
    (folder / "path" / "to" / "images").symlink_to(ROOT / "docs" / "photos")
    return folder


def program(words: list[str]) -> Callable[[], object] | None:
    """What `accelerate launch SCRIPT` and `fcmae` run, for this process: each start of torch takes many seconds."""
    if words[:2] == ["accelerate", "launch"]:
        return partial(runpy.run_path, words[2], run_name="__main__")
    if words[0] == "fcmae":
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        module, function = scripts["fcmae"].split(":")
        return lambda: sys.exit(getattr(import_module(module), function)())
    return None


def run_command(line: str, folder: Path) -> tuple[int, str, str]:
    """Run a command in a folder; returns its exit code, output and errors."""
    words = shlex.split(line)
    if (here := program(words)) is None:
        environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(Path.home())}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=290, check=False
        )
        return done.returncode, done.stdout, done.stderr
    with chdir(folder), redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as error:
        code = run_program(here, words[words[0] == "accelerate" and 2 :])
    return code, out.getvalue(), error.getvalue()


@pytest.fixture(scope="module")
def ran(workspace: Path) -> Callable[[int], Ran]:
    """Run the README to its command i, each once; what came of that one."""
    done: list[Ran] = []

    def files() -> set[tuple[str, int]]:
        found = (path for top in ("runs", "path") for path in (workspace / top).rglob("*") if path.is_file())
        return {(str(path.relative_to(workspace)), path.stat().st_mtime_ns) for path in found}

    def run(i: int) -> Ran:
        for command in COMMANDS[len(done) : i + 1]:
            before = files()
            came = run_command(f"{command} {rule(command)[1]}", workspace)
            done.append(Ran(*came, {path for path, _ in files() - before}))
        return done[i]

    return run


def rule(command: str) -> tuple[str, str, str, str | None]:
    found = next((rule for rule in RULES if re.match(rule[0], command)), None)
    assert found is not None, f"no rule for running: {command}"
    return found


@pytest.mark.parametrize("i", range(len(COMMANDS)), ids=COMMANDS)
def test_a_command_of_the_readme_runs(i: int, ran: Callable[[int], Ran]) -> None:
    pattern, _, prints, leaves = rule(COMMANDS[i])
    code, out, error, written = ran(i)
    assert code == 0, f"{out}\n{error[-3000:]}"
    assert re.search(prints, out), out
    if leaves is None:
        assert not written
    else:
        wanted = re.sub(pattern + ".*", leaves, COMMANDS[i])
        assert any(fnmatch(path, wanted) for path in written), written


@pytest.mark.parametrize(
    ("page", "snippet"), SNIPPETS, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(SNIPPETS)]
)
def test_a_snippet_runs(
    page: Path, snippet: str, workspace: Path, ran: Callable[[int], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, command in enumerate(COMMANDS):
        made = "runs/quickstart" if command == "make quickstart" else command.partition(" output=")[2]
        if made and made in snippet:
            ran(i)
    monkeypatch.chdir(workspace)
    exec(compile(snippet, str(page), "exec"), {})


def losses(record: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in record.read_text().splitlines()]


def test_the_quickstarts_loss_falls_clearly_below_one(workspace: Path, ran: Callable[[int], Ran]) -> None:
    ran(0)
    assert losses(workspace / "runs" / "quickstart" / "metrics.jsonl")[-1] < 0.8


def test_the_readme_and_the_config_say_the_reference_records_result() -> None:
    last = losses(ROOT / "configs" / "reference" / "quickstart.jsonl")[-4:]
    claim = f"1.01 to {sum(last) / 4:.2f}"
    assert claim in README
    assert claim in (ROOT / "configs" / "quickstart.yaml").read_text()


def anchors(page: Path) -> set[str]:
    """The names by which links reach a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), f"{target}#{anchor}"
