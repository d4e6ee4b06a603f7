"""Processes that disagree, about settings, images, versions or checkpoints, all end in a line that says so."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from processes import Processes
from small_runs import small_config, small_run
from test_finetune import write_folders

from fcmae import data
from fcmae.errors import UserError
from fcmae.story import open_in_all
from fcmae.training import launch
from fcmae.training.agree import agree, in_all


def opened(root: str) -> object:
    def open_images() -> data.Source:
        return data.open_source("folder", root, "train", 3)

    return open_in_all(f"data.root={root}", open_images, lambda source: source)


def cases(rank: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """What each of two processes does, in a folder of its own."""
    config = small_config(Path("run"))
    other = small_config(Path("run"), optim={"base_lr": 1.0 + rank})
    workers = small_config(Path("run"), data={"num_workers": rank})
    yield "alike", lambda: launch.require_same_settings(config, dry_run=False)
    yield "workers", lambda: launch.require_same_settings(workers, dry_run=False)
    yield "settings", lambda: launch.require_same_settings(other, dry_run=False)
    yield "dry run", lambda: launch.require_same_settings(config, dry_run=rank == 1)
    launch.__version__ = f"1.{rank}"
    yield "versions", lambda: launch.require_same_settings(config, dry_run=False)
    yield "many", lambda: agree({str(i): i * rank for i in range(9)}, "do something")
    yield "same images", lambda: opened("same")
    yield "number of images", lambda: opened("number")
    yield "names of images", lambda: opened("names")
    yield "no images", lambda: opened("alone")
    yield "the same error", lambda: in_all(lambda: opened("nowhere"))
    yield "checkpoint", lambda: launch.claim_checkpoint(config)
    yield "no checkpoint", lambda: launch.claim_checkpoint(small_config(Path("lost")))


def meet(folder: Path) -> None:
    """In each of two processes: what comes of all cases."""
    rank = int(os.environ["RANK"])
    os.chdir(folder / str(rank))
    PartialState(cpu=True)
    said: dict[str, Any] = {}
    for name, do in cases(rank):
        try:
            do()
            said[name] = None
        except UserError as error:
            said[name] = str(error) if error.everywhere else "not said once"
    (folder / f"{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What both processes said in each case."""
    folder = tmp_path_factory.mktemp("agree")
    for rank, number, name in ((0, 3, "a"), (1, 2, "b")):
        root = folder / str(rank)
        write_folders(root / "same", ("x",), 2)
        write_folders(root / "number", ("x",), number)
        write_folders(root / "names", (name,), 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            small_run(small_config(Path("run"), train={"max_steps": 2, "seed": 0}, optim={"base_lr": 1.0 + rank}))
    write_folders(folder / "0" / "alone", ("x",), 2)
    shutil.copytree(folder / "0" / "run", folder / "0" / "lost", symlinks=True)
    processes = Processes(partial(meet, folder), ["test"], folder, number=2)
    assert processes.wait() == [0, 0], processes.written("errors")
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second, "one line, whoever says it"
    return first


@pytest.mark.parametrize("case", ["alike", "workers", "same images"])
def test_processes_that_agree_go_on(case: str, said: dict[str, str | None]) -> None:
    assert said[case] is None


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (
            "settings",
            "processes disagree: optim.base_lr is 1.0 in process 0, but 2.0 in process 1; start all processes by "
            "the same command, with the same configuration",
        ),
        ("dry run", "processes disagree: --dry-run is False in process 0, but True in process 1; start all"),
        ("versions", "disagree: the version of fcmae is '1.0' in process 0, but '1.1' in process 1; install the"),
        (
            "many",
            "disagree: 1 is 0 in process 0, but 1 in process 1; 2 is 0 in process 0, but 2 in process 1; 3 is",
        ),
        ("many", "but 3 in process 1, and 5 more; do something"),
        ("number of images", "the number of images of data.root=number is 3 in process 0, but 2 in process 1"),
        ("names of images", "image 0 of data.root=names is ['names/a/0.png', 0] in process 0, but ['names/b/0"),
        (
            "no images",
            "data.root=alone: no such folder or file; name a folder with images in it (in process 1, but",
        ),
        ("the same error", "data.root=nowhere: no such folder or file; name a folder with images in it"),
        ("checkpoint", "run/checkpoints/step-00000002: its SHA256SUMS is "),
        (
            "no checkpoint",
            "lost/checkpoints/step-00000002/state.json: missing (in process 1, but not in process 0:",
        ),
    ],
)
def test_processes_that_disagree_all_end_in_a_line_that_names_the_difference(
    case: str, line: str, said: dict[str, str | None]
) -> None:
    assert line in (said[case] or "")


def test_one_process_has_nobody_to_disagree_with() -> None:
    assert not torch.distributed.is_initialized()
    agree({"a": object()}, "")
    assert in_all(lambda: 1) == 1
