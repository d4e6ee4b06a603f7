"""Small trainings with everything on, started in processes that can be killed; knows no faults."""

import atexit
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from file_layer import TEMPORARY, FileLayer, Tree, Watcher
from PIL import Image

from fcmae import arguments
from fcmae.training import lock

ROOT = Path(__file__).parents[2]

STEPS = 6
"""Of all trainings; an epoch has 5 and a bit."""

COMMON = """
log: {every_steps: 1}
checkpoint: {every_steps: 3, keep: 2, keep_every_epochs: 1}
output: run
"""

PRETRAINING = """
model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, decoder_dim: 16, drop_path: 0.2}
data: {root: DATA, image_size: 32, batch_size: 4, num_workers: 1}
optim: {base_lr: 0.03, warmup_epochs: 1, accumulate: 2}
train: {max_steps: STEPS}
eval: {knn_every_epochs: 1, collapse_every_epochs: 1}
visualize: {num_images: 2, every_steps: 6}
"""

FINETUNING = """
model: {variant: [[1, 1, 2, 1], [8, 16, 24, 32]], stem_stride: 1, drop_path: 0.2}
data: {root: DATA, image_size: 32, batch_size: 4, num_workers: 1, crop_scale: [0.3, 1], crop_pct: 1,
       mixup: 0.8, cutmix: 1, auto_augment: rand-m9-mstd0.5-inc1, erase_prob: 0.25}
optim: {base_lr: 0.05, warmup_epochs: 0.5, layer_decay: 0.9, weight_decay: 0.05, clip_grad: 5, accumulate: 2}
train: {max_steps: STEPS, ema_decay: 0.9}
eval: {every_epochs: 1}
"""


class Training(NamedTuple):
    """A command of fcmae, its configuration, and in how many processes it runs."""

    story: str
    config: str
    num_processes: int = 1


TRAININGS = {
    "pretraining": Training("pretrain", PRETRAINING),
    "classification": Training("finetune", FINETUNING),
    "two-processes": Training("pretrain", PRETRAINING, num_processes=2),
}

CLOCKS = ("images_per_s", "data_wait", "time")
"""What no two runs have alike in metrics.jsonl."""


def make_images(root: Path) -> None:
    """Write 40 smooth images to train on, one of which does not decode, and 9 to evaluate, in four classes."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 40), ("val", 9)):
        for i in range(number):
            folder = root / split / f"class {i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    (root / "train" / "class 1" / "broken.png").write_bytes(b"no picture")


# Processes

PRELOADED = (
    *("fcmae.pretrain", "fcmae.finetune", "fcmae.ops.patch_depthwise_numba", "file_layer", "trainings"),
    *(
        "torch.utils.tensorboard",
        "PIL.features",
        "llvmlite.ir",
        "numba.np.arrayobj",
        "numba.typed",
        "einops._torch_specific",
    ),
)


Image.init()  # all that a loader worker would import, once


def fork_server() -> Any:
    """Return a context of multiprocessing that forks from a process which has imported all, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _work(
    story: str,
    words: list[str],
    folder: Path,
    environment: Mapping[str, str],
    watcher: Watcher | None,
    report: Path,
) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in any other process
    os.chdir(folder)
    for handle, name in ((1, "output.txt"), (2, "errors.txt")):
        file = os.open(
            report.with_name(f"{environment.get('RANK', '0')}-{name}"), os.O_CREAT | os.O_APPEND | os.O_WRONLY
        )
        os.dup2(file, handle)
        os.close(file)
    os.environ.update(environment)
    torch.set_num_threads(1)
    lock.held.__wrapped__.__kwdefaults__["watched_s"] = 0.3  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = [f"{story}.py", *words]
    layer = FileLayer(folder, watcher) if watcher else None
    if layer:
        layer.install()
    try:
        arguments.run(story)
    finally:
        if layer:
            report.write_bytes(pickle.dumps((watcher, layer.disk.seen())))
        atexit._run_exitfuncs()  # which ends as any process does, but one of a fork server does not


class Run:
    """The processes of a training that runs below `folder`; what they say goes into its `output`."""

    def __init__(
        self,
        context: Any,
        training: Training,
        folder: Path,
        data: Path,
        *words: str,
        watcher: Watcher | None = None,
        output: str = "",
    ) -> None:
        self.place = folder / output
        self.place.mkdir(parents=True, exist_ok=True)
        self.folder = folder / "work"
        self.folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(training.config.replace("DATA", str(data)).replace("STEPS", str(STEPS)) + COMMON)
        self.report = self.place / "report"
        for old in (self.report, *self.place.glob("*-*.txt")):
            old.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(training.num_processes):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": training.num_processes}
            places |= {"LOCAL_WORLD_SIZE": training.num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {k: str(v) for k, v in places.items()} if training.num_processes > 1 else {}
            words_ = ["--config", str(config), "resume=auto", *words]
            of_rank = watcher if rank == 0 else None
            process = context.Process(
                target=_work, args=(training.story, words_, self.folder, environment, of_rank, self.report)
            )
            process.start()
            self.processes.append(process)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all processes, loader workers included, at once."""
        for process in self.processes:
            for kill in (os.killpg, os.kill):  # which may not yet lead a group
                try:
                    kill(process.pid, number)
                except ProcessLookupError:
                    continue
                break

    def wait(self, seconds: float = 120) -> list[int]:
        """Return the exit codes; once one process has died of a signal the others are killed, as launchers do."""
        deadline = time.monotonic() + seconds
        while waiting := [process.sentinel for process in self.processes if process.is_alive()]:
            left = deadline - time.monotonic()
            wait(waiting, max(left, 0))
            if left < 0:
                self.kill()
                raise TimeoutError(f"{self.place}: still running after {seconds} s")
            if any(process.exitcode == -signal.SIGKILL for process in self.processes):
                self.kill()
        self.kill()  # what they may have left behind
        return [process.exitcode for process in self.processes]

    def errors(self) -> list[str]:
        """Return the lines that the processes wrote on standard error."""
        files = sorted(self.place.glob("*-errors.txt"))
        return [line for file in files for line in file.read_text(errors="replace").splitlines() if line.strip()]

    def seen(self) -> tuple[Any, Tree]:
        """Return the watcher as it was at the end of the process, and the disk as it saw it."""
        return pickle.loads(self.report.read_bytes())


# What a run leaves


def read_tree(folder: Path) -> Tree:
    """Read all below a folder, but for TensorBoard's files."""
    tree: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = TEMPORARY.sub(r"\1-0123456789abcdef", path.relative_to(folder).as_posix())
        if "tensorboard" not in path.parts:
            tree[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return tree


def write_tree(folder: Path, tree: Tree) -> None:
    """Make `folder` what `read_tree` read."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, value in tree.items():
        path = folder / name
        if value is None:
            path.mkdir()
        elif isinstance(value, str):
            path.symlink_to(value)
        else:
            path.write_bytes(value)


def without_clocks(records: bytes) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in json.loads(line).items() if key not in CLOCKS}
        for line in records.splitlines()
    ]


def outcome(tree: Tree) -> dict[str, Any]:
    """Return what must be alike in two runs: names, hashes of files, and records but for what the clock says."""
    return {name: _compared(name, value) if isinstance(value, bytes) else value for name, value in tree.items()}


def _compared(name: str, content: bytes) -> object:
    return without_clocks(content) if name.endswith("metrics.jsonl") else hashlib.sha256(content).hexdigest()


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name what differs between two outcomes."""
    missing = [f"missing {name}" for name in expected if name not in found]
    more = [f"unexpected {name}" for name in found if name not in expected]
    other = [f"{name} differs" for name in expected if name in found and found[name] != expected[name]]
    return missing + more + other


def intact(tree: Tree, tensors: Mapping[str, Mapping[str, bytes]]) -> list[str]:
    """Name the checkpoints in a tree that can be gone on from.

    Args:
        tensors: checkpoint folder -> file -> content of those of the undisturbed run.
    """
    return [folder for folder, files in tensors.items() if _is_intact(tree, folder, files)]


def _is_intact(tree: Tree, folder: str, files: Mapping[str, bytes]) -> bool:
    if any(tree.get(f"{folder}/{name}") != content for name, content in files.items()):
        return False
    contents = {name: tree.get(f"{folder}/{name}", b"") for name in ("state.json", "SHA256SUMS", *files)}
    sums = contents.pop("SHA256SUMS")
    hashes = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
        if isinstance(content, bytes)
    }
    return isinstance(sums, bytes) and sorted(sums.decode().splitlines()) == sorted(
        f"{h}  {n}" for n, h in hashes.items()
    )
