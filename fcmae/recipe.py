"""A pretraining configuration chosen for a folder of images and a machine; knows no training, only what suits it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from fcmae.config import PretrainConfig, override_config
from fcmae.data import Source, open_source
from fcmae.data.views import Part
from fcmae.errors import UserError
from fcmae.training.schedule import peak_rate

SAMPLED = 32
"""Images whose size and colours are looked at."""
GRAY = (0.449,), (0.226,)
"""Mean and standard deviation of ImageNet's images in gray."""


class Machine(NamedTuple):
    """What a run is to be computed on."""

    name: str
    gpu_gb: float | None
    """Memory of a GPU; None on CPU."""
    bf16: bool
    """Whether bf16 is computed by instructions of its own."""
    cores: int


class Images(NamedTuple):
    """What is known of a set of images."""

    number: int
    short_side: int
    """Median over a sample, in pixels."""
    gray: bool
    """Whether all of a sample have no colours."""


class Choice(NamedTuple):
    """A key of the configuration, its value, and why."""

    key: str
    value: Any
    reason: str


def this_machine() -> Machine:
    """Describe the GPU of this process where there is one, else the CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return Machine(gpu.name, gpu.total_memory / 2**30, torch.cuda.is_bf16_supported(False), cores)
    bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return Machine(f"CPU with {cores} cores", None, bf16, cores)


def look_at(source: Source) -> Images:
    """Look at some images of a source, spread evenly over it; those that do not decode are passed over.

    Raises:
        UserError: if none of them decodes.
    """
    sides: list[int] = []
    gray = True

    def small(height: int, width: int) -> Part:
        sides.append(min(height, width))
        return Part(0, 0, height, width, (32, 32))

    reason = ""
    for index in sorted({i * len(source) // SAMPLED for i in range(SAMPLED)}):
        seen = len(sides)
        try:
            pixels = source.load_part(index, small)
        except Exception as error:  # a broken file can make a decoder raise anything
            del sides[seen:]
            reason = f"{source.describe(index)}: {error}"
            continue
        gray = gray and bool((pixels == pixels[:1]).all())
    if not sides:
        raise UserError(f"none of {SAMPLED} images tried can be read, such as {reason}")
    return Images(len(source), int(np.median(sides)), gray)


def is_arrays(root: Path) -> bool:
    """Whether a folder holds arrays (`fcmae prepare`, images.npy) rather than image files."""
    places = (root, root / "train")
    return any((place / name).is_file() for place in places for name in ("index.json", "images.npy"))


def suitable_output(root: Path, runs: Path = Path("runs")) -> Path:
    """Return RUNS/NAME for images in a folder NAME, with a number where that is a run on other images."""
    name = root.resolve().stem or "images"
    number = 1
    while True:
        output = runs / (name if number == 1 else f"{name}-{number}")
        if not output.exists():
            return output
        try:
            stored = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
            if Path(stored["data"]["root"]).resolve() == root.resolve():
                return output  # the same command goes on
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            pass
        number += 1


def choose(images: Images, machine: Machine) -> list[Choice]:
    """Choose what depends on the images and the machine; what is not named keeps its default."""
    on_gpu = machine.gpu_gb is not None
    n, side = images.number, images.short_side
    stem_stride = 1 if side < 64 else 2 if side < 160 or not on_gpu else 4
    patch = 8 * stem_stride
    size = max(min(side, 224 if on_gpu else 96) // patch, 3) * patch
    if not on_gpu:
        variant, why = "atto", "the smallest, for a CPU"
    else:
        large = n >= 500_000 and machine.gpu_gb > 30
        variant = "atto" if n < 2_000 else "nano" if n < 20_000 else "base" if large else "tiny"
        why = f"for {n:,} images and a GPU of {machine.gpu_gb:.0f} GB"

    # small sets are served better by many small updates than by few large ones (docs/lab-notes.md)
    together = 8 if n < 200 else 16 if not on_gpu else 64 if n < 5_000 else 256 if n < 200_000 else 1024
    batch = min(together, 256 if on_gpu and machine.gpu_gb > 40 else 64)
    updates = int(min(max(800 * n / together, 20_000), 250_000)) if on_gpu else 1_500
    epochs = float(f"{updates * together / n:.3g}")
    rate = peak_rate(together)
    minutes = "" if on_gpu else f", minutes on {machine.cores} cores"

    choices = [
        Choice("model.variant", variant, why),
        Choice("model.stem_stride", stem_stride, f"patches of {patch} pixels"),
        Choice(
            "data.image_size",
            size,
            f"the images' short side is {side} pixels" + ("; a CPU is quick with small ones" if size < side else ""),
        ),
        Choice("data.batch_size", batch, "small updates suit small sets" if n < 5_000 else "fits the memory"),
        Choice("optim.accumulate", together // batch, f"{together} images an update"),
        Choice("optim.base_lr", float(f"{rate * 256 / together:.3g}"), f"a peak rate of {rate:.1e} at {together} images"),
        Choice("optim.warmup_epochs", float(f"{epochs / 20:.3g}"), "a twentieth of the run"),
        Choice("train.epochs", epochs, f"{updates:,} updates{minutes}"),
        Choice("train.precision", "bf16" if machine.bf16 else "no", f"{machine.name} {'has' if machine.bf16 else 'lacks'} bf16"),
        Choice("data.num_workers", min(machine.cores, 16) if on_gpu else min(machine.cores // 2, 2), f"{machine.cores} cores"),
        Choice("visualize.every_steps", max(updates // 15, 1), "15 pictures, and one before training"),
        Choice("checkpoint.every_steps", 1_000 if on_gpu else 100, "at most so much is lost in a power cut"),
    ]
    if images.gray:
        choices += [
            Choice("model.in_chans", 1, "the images are gray"),
            Choice("data.mean", list(GRAY[0]), "of gray photographs"),
            Choice("data.std", list(GRAY[1]), "of gray photographs"),
        ]
    return choices


def nested(choices: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Turn dotted keys and values into nested sections."""
    values: dict[str, Any] = {}
    for key, value in choices:
        *sections, leaf = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return values


def table(choices: Sequence[Choice], overridden: Mapping[str, Any]) -> str:
    """Draw the choices, a line each; what the command line gives is said to be given there."""
    rows = [(c.key, str(overridden.get(c.key, c.value)), "as given" if c.key in overridden else c.reason) for c in choices]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"  {key:{widths[0]}}  {value:{widths[1]}}  {reason}" for key, value, reason in rows)
