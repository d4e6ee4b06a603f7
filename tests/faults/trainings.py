"""Small trainings with everything on, started in processes that can be killed; knows no faults."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from file_layer import TEMPORARY, FileLayer, Tree, Watcher
from PIL import Image
from processes import Processes

from fcmae import arguments
from fcmae.training import lock

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

CLOCKS = ("images_per_s", "data_wait", "memory_gb", "time")
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


def _work(story: str, folder: Path, watcher: Watcher | None, report: Path) -> None:
    lock.held.__wrapped__.__kwdefaults__["watched_s"] = 0.3  # pyright: ignore[reportAttributeAccessIssue]
    layer = FileLayer(folder, watcher) if watcher and os.environ.get("RANK", "0") == "0" else None
    if layer:
        layer.install()
    try:
        arguments.run(story)
    finally:
        if layer:
            report.write_bytes(pickle.dumps((watcher, layer.disk.seen())))


class Run(Processes):
    """The processes of a training that runs below `folder`; what they say goes into its `output`."""

    def __init__(
        self,
        training: Training,
        folder: Path,
        data: Path,
        *words: str,
        watcher: Watcher | None = None,
        output: str = "",
    ) -> None:
        place = folder / output
        place.mkdir(parents=True, exist_ok=True)
        self.folder = folder / "work"
        self.folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(training.config.replace("DATA", str(data)).replace("STEPS", str(STEPS)) + COMMON)
        self.report = place / "report"
        for old in (self.report, *place.glob("*-*.txt")):
            old.unlink(missing_ok=True)
        program = partial(_work, training.story, self.folder, watcher, self.report)
        argv = [f"{training.story}.py", "--config", str(config), "resume=auto", *words]
        super().__init__(program, argv, place, folder=self.folder, number=training.num_processes)

    def errors(self) -> list[str]:
        """Return the lines that the processes wrote on standard error."""
        return [line for line in self.written("errors").splitlines() if line.strip()]

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
    """Return what must be alike in two runs: names, hashes of files, and records but for what the clock says.

    Of `starts.jsonl` only that it is there, for it says how often a run was started.
    """
    return {name: _compared(name, value) if isinstance(value, bytes) else value for name, value in tree.items()}


def _compared(name: str, content: bytes) -> object:
    if name.endswith("starts.jsonl"):
        return True
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
