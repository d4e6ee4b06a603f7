"""Runs of several processes, on one host and on two: the same losses, saved and resumed by any number, hosts that die.

Two hosts are two network namespaces with a cable between them, which needs root on Linux.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import records
from processes import Processes
from small_runs import stop_after

from fcmae import arguments
from fcmae.data import save_arrays

UPDATES = 6
IMAGES_PER_UPDATE = 8

STORIES = {
    "pretrain": "model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, decoder_dim: 16}\n"
    "visualize: {num_images: 0}\n",
    "finetune": "model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, num_classes: 4}\n"
    "eval: {every_epochs: 2}\n",
}
"""Configurations without what each process draws for itself: drop path, mixup and cutmix."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, number in (("train", 24), ("val", 9)):
        images = np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        save_arrays(root / split, images, np.arange(number) % 4)
    return root


def settings(story: str, data: Path, folder: Path) -> list[str]:
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(
        f"output: {folder}\n{STORIES[story]}"
        f"data: {{name: arrays, root: {data}, image_size: 32, batch_size: 2, num_workers: 0}}\n"
        f"optim: {{base_lr: 0.03, warmup_epochs: 0, images_per_update: {IMAGES_PER_UPDATE}, accumulate: auto}}\n"
        f"train: {{max_steps: {UPDATES}}}\nlog: {{every_steps: 1}}\ncheckpoint: {{every_steps: 3}}\n"
    )
    return ["--config", str(config)]


def in_float64(story: str) -> None:
    """Run a story in numbers of which sums in another order differ by far less than by what would be a mistake."""
    torch.set_default_dtype(torch.float64)
    arguments.run(story)


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(folder) if "loss" in record}


def train(story: str, words: list[str], place: Path, *, number: int) -> str:
    """Run a story to its end in so many processes; returns what they said."""
    place.mkdir(exist_ok=True)
    processes = Processes(partial(in_float64, story), [f"{story}.py", *words], place, number=number)
    try:
        assert processes.wait() == [0] * number, processes.written("errors")
    finally:
        processes.kill()
    return processes.written("output")


@pytest.mark.parametrize("story", STORIES)
def test_the_losses_are_the_same_in_1_2_and_4_processes_and_after_resuming_in_another_number(
    story: str, data: Path, tmp_path: Path
) -> None:
    for number in (1, 2, 4):
        folder = tmp_path / str(number)
        said = train(story, settings(story, data, folder), tmp_path / f"{number} say", number=number)
        print(said)
    expected = losses(tmp_path / "1")
    assert list(expected) == [*range(1, UPDATES + 1)]
    for before, after in ((4, 1), (1, 4)):
        folder = stop_after(tmp_path / str(before), 3, tmp_path / f"{before} to {after}")
        words = [*settings(story, data, folder), "resume=auto"]
        said = train(story, words, tmp_path / f"{before} to {after} say", number=after)
        print(said)
    for folder in ("2", "4", "4 to 1", "1 to 4"):
        print(folder, losses(tmp_path / folder))
        assert losses(tmp_path / folder) == pytest.approx(expected, rel=1e-9), folder
