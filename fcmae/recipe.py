"""A pretraining configuration chosen for a set of images and a machine; knows no training, only what suits it."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcmae.config import AUTO, CHOSEN, DataSection, PretrainConfig, PretrainRecipe, load_config, override_config
from fcmae.data import Reading, Source, open_source
from fcmae.data.images import ImageSource
from fcmae.data.pixels import FULL, kind_name
from fcmae.data.sampling import spread
from fcmae.data.sources import holds_arrays
from fcmae.data.stats import rounded
from fcmae.data.views import Part
from fcmae.encoder.networks import is_other
from fcmae.errors import UserError
from fcmae.story import cores_per_process
from fcmae.training.launch import decide_once, has_bf16, launched_precision
from fcmae.training.memory import ram_bytes
from fcmae.training.run_folder import RunFolder
from fcmae.training.schedule import peak_rate

SAMPLED = 32
"""Images that are looked at."""
IMAGES = "optim.images_per_update"


class Machine(NamedTuple):
    """What a run is to be computed on."""

    name: str
    gpu: bool
    memory: int
    """Bytes of the GPU, else of the computer."""
    bf16: bool
    """Whether bf16 is computed by instructions of its own."""
    cores: int
    """Of the processor, for each process."""
    processes: int = 1
    """Of the run."""
    precision: str | None = None
    """What the launcher was asked for."""


class Images(NamedTuple):
    """What is known of a set of images."""

    number: int
    short_side: int
    """Median over a sample, in pixels."""
    channels: int
    """1 where all of a sample have no colours."""
    mean: tuple[float, ...]
    """Of the sample's known pixels, one for each channel, as in `data.mean`; and the standard deviation."""
    std: tuple[float, ...]
    dtype: str = "uint8"
    """Of the deepest of a sample."""
    unknown: bool = False
    """Whether some pixels of the sample are no-data."""


class Choice(NamedTuple):
    """A key of the configuration, its value, and why."""

    key: str
    value: Any
    reason: str


# What there is


def this_machine() -> Machine:
    """Describe the GPU of this process where there is one, else the computer."""
    processes, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    cores = cores_per_process()
    asked = launched_precision()
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return Machine(gpu.name, True, gpu.total_memory, has_bf16(torch.device("cuda")), cores, processes, asked)
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # which not every torch can tell
    bf16 = any(getattr(torch.cpu, name, bool)() for name in instructions)
    memory = ram_bytes() or 4 * 2**30
    name = f"a CPU of {cores} core" + "s" * (cores > 1)
    return Machine(name, False, memory // local, bf16, cores, processes, asked)


def look_at(source: Source) -> Images:
    """Look at some images of a source, spread evenly over it; those that do not decode are passed over.

    Raises:
        UserError: if none of them decodes.
    """
    sides: list[int] = []
    moments: list[Tensor] = []  # (3, c): known pixels of an image, their sum and that of their squares
    gray, unknown, reason = True, False, ""

    def small(height: int, width: int) -> Part:
        sides.append(min(height, width))
        return Part(0, 0, height, width, (32, 32))

    indices = spread(len(source), SAMPLED)
    for index in indices:
        seen = len(sides)
        try:
            pixels = source.load_part(index, small)
        except Exception as error:  # a broken file can make a decoder raise anything
            del sides[seen:]
            reason = f"{source.describe(index)}: {error}"
            continue
        values = pixels.flatten(1).double() / FULL[pixels.dtype]
        known = ~values.isnan()
        values = values.nan_to_num()
        gray = gray and bool((values == values[:1]).all())
        unknown = unknown or not bool(known.all())
        moments.append(torch.stack([known.sum(1), values.sum(1), values.square().sum(1)]))
    if not sides:
        raise UserError(f"none of {len(indices)} images tried can be read, such as {reason}")
    number, total, squares = torch.stack(moments).sum(0)
    mean = total / number.clamp_min(1)
    std = (squares / number.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
    if gray and isinstance(source, ImageSource):  # which files are decoded to; arrays stay as they are
        mean, std = mean[:1], std[:1]
    pairs = list(zip(mean.tolist(), std.tolist(), strict=True))
    return Images(
        len(source),
        sorted(sides)[len(sides) // 2],
        len(pairs),
        tuple(rounded(mean, std, digits=3) for mean, std in pairs),
        tuple(rounded(std, std, digits=3) or 1.0 for _, std in pairs),
        kind_name(source.dtype),
        unknown,
    )


def look_below(name: str, root: str, split: str, given: Mapping[str, Any]) -> Images:
    """Look at some of the images that are there, read as is given; no-data among them is found, not refused.

    Raises:
        UserError: if there are none.
    """
    asked = {key: given[f"data.{key}"] for key in ("dtype", "nodata", "window") if f"data.{key}" in given}
    reading = Reading.of(DataSection(root=root, **asked))

    def opened(reading: Reading) -> Source:
        return open_source(name, root, split, given.get("model.in_chans"), reading=reading)

    if "nodata" in asked:
        return look_at(opened(reading))
    images = look_at(
        opened(reading._replace(nodata=math.nan))
    )  # without, images of which a part is no-data are bad
    return images if images.unknown else images._replace(dtype=kind_name(opened(reading).dtype))


# What suits it


def choose(images: Images, machine: Machine, given: Mapping[str, Any] | None = None) -> list[Choice]:
    """Choose what depends on the images and the machine, around what is given; all else keeps its default."""
    given = given or {}
    choices: list[Choice] = []

    def pick(key: str, value: Any, reason: str) -> Any:
        choices.append(Choice(key, given[key], "as given") if key in given else Choice(key, value, reason))
        return choices[-1].value

    n, side = images.number, images.short_side
    small_set = n < 200
    # The network: larger for more images; a CPU is quick with small ones
    if not machine.gpu:
        variant = pick("model.variant", "atto", "the smallest, for a CPU")
    else:
        worth = n * min(side / 224, 1) ** 2  # in images of 224 pixels
        large = worth >= 500_000 and machine.memory > 30e9
        suitable = "atto" if worth < 2_000 else "nano" if worth < 20_000 else "base" if large else "tiny"
        gigabytes = f"{machine.memory / 1e9:.0f} GB on the GPU"
        variant = pick("model.variant", suitable, f"for {n:,} images of {side} pixels, and {gigabytes}")
    size = given.get("data.image_size")
    sides = None if size is None else (size, size) if isinstance(size, int) else size
    shown = min(sides) if sides else side
    stride = 1 if shown < 64 else 2 if shown < 160 or not machine.gpu else 4
    if sides:  # whole patches, if any make it up
        stride = next((s for s in (4, 2, 1) if s <= stride and not any(x % (8 * s) for x in sides)), stride)
    stride = 4 if is_other(variant) else stride  # whose patches have 32 pixels
    stride = pick("model.stem_stride", stride, f"patches of {8 * stride} pixels, for images of {shown}")
    patch = 8 * stride
    most = 224 if machine.gpu else 96
    size = pick(
        "data.image_size",
        max(min(side, most) // patch, 3) * patch,
        f"their short side is {side} pixels"
        + ("" if machine.gpu or side <= most else "; a CPU is quick with small ones"),
    )
    sides = (size, size) if isinstance(size, int) else size
    if images.unknown:
        pick("data.nodata", "nan", "some pixels are no-data: neither loss nor statistics count them")
    elif images.dtype != "uint8":
        pick("data.dtype", images.dtype, "the deepest of them")
    channels = given.get("model.in_chans", images.channels)
    if channels != 3 or "model.in_chans" in given:
        pick("model.in_chans", channels, "the images are gray" if channels == 1 else "as the images have")
    if "data.stats" in given:
        for key in ("data.mean", "data.std", "data.clip"):
            pick(key, AUTO, "of data.stats")
    elif channels != 3 or images.unknown or images.dtype != "uint8":
        alike = channels // images.channels  # of gray images as several channels
        pick("data.mean", images.mean * alike, "of a sample; fcmae stats computes them of all")
        pick("data.std", images.std * alike, "of a sample")
    if small_set:
        pick("data.crop_scale", (0.05, 1.0), "smaller crops show more of few images")

    # The update: small sets are served better by many small ones than by few large ones
    auto = machine.precision is not None
    why = "as launched" if auto else f"{machine.name} {'has' if machine.bf16 else 'lacks'} bf16"
    pick("train.precision", "auto" if auto else "bf16" if machine.bf16 else "no", why)
    wanted = 8 if small_set else 16 if not machine.gpu else 64 if n < 5_000 else 256 if n < 200_000 else 1024
    share = max(1, wanted // machine.processes)
    why = f"for {n:,} images" if machine.processes > 1 or wanted > 64 else "small updates suit small sets"
    numbers = [given[key] for key in CHOSEN if given.get(key, AUTO) != AUTO]
    if given.get(IMAGES) or (machine.gpu and IMAGES not in given and len(numbers) < 2):
        unit = numbers[0] if numbers else 1
        together = pick(IMAGES, max(1, share // unit) * unit * machine.processes, why)
        pick("data.batch_size", AUTO, "as many at once as the memory holds")
        pick("optim.accumulate", AUTO, "and as often as it takes")
    else:
        batch = pick("data.batch_size", share, why)
        together = batch * pick("optim.accumulate", max(1, share // batch), "micro-batches") * machine.processes

    # The run: until a GPU has seen enough, or a CPU has something to show
    least, most = (20_000, 250_000) if machine.gpu else (1_500, 20_000)
    updates = round(min(max((800 if machine.gpu else 2) * n / together, least), most))
    if "train.epochs" in given:
        updates = math.ceil(given["train.epochs"] * n / together)
    pick("train.epochs", float(f"{updates * together / n:.4g}"), f"{updates:,} updates of {together} images")
    if given.get("train.max_steps"):
        updates = min(updates, pick("train.max_steps", None, ""))
    rate = peak_rate(together, variant)
    pick("optim.base_lr", float(f"{rate * 256 / together:.3g}"), f"a peak rate of {rate:.1e} for {together} images")
    pick("optim.warmup_epochs", float(f"{updates * together / n / 20:.3g}"), "a twentieth of the run")

    workers = min(machine.cores, 16) if machine.gpu else min(machine.cores // 2, 2)
    pick("data.num_workers", workers, f"{machine.cores} cores")
    pick("visualize.every_steps", max(updates // 15, 50), "updates; the first picture comes before them")
    pick("checkpoint.every_steps", 1_000 if machine.gpu else 100, "updates; a power cut costs no more")
    named = {choice.key for choice in choices}
    choices += [Choice(key, value, "as given") for key, value in given.items() if key not in named]
    return choices


def assignments(choices: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Turn dotted keys and values into nested sections."""
    values: dict[str, Any] = {}
    for key, value in choices:
        *sections, leaf = key.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return values


def table(choices: Sequence[Choice]) -> str:
    """Draw the choices, a line each."""
    rows = [(f"{key}={show(value)}", reason) for key, value, reason in choices]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"  {setting:{width}}  {reason}" for setting, reason in rows)


def show(value: Any) -> str:
    """Write a value as the command line takes it."""
    if isinstance(value, tuple | list):
        return f"[{','.join(map(show, value))}]"
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else str(value)
    )


# Where it goes


def run_on(output: Path, root: Path, split: str) -> PretrainConfig | None:
    """Return the configuration of the pretraining run in a folder, if it is one on these images."""
    try:
        stored = load_config(PretrainConfig, RunFolder(output).config)
    except UserError:  # there is none, or another kind of run
        return None
    same = Path(stored.data.root).resolve() == root.resolve() and stored.data.split == split
    return stored if same else None


def suitable_output(root: Path, split: str, runs: Path = Path("runs")) -> Path:
    """Return RUNS/NAME for images in NAME, with a number after it where that is taken by anything else."""
    name = root.resolve().name.removesuffix(".tar") or "images"
    number = 1
    while True:
        output = runs / (name if number == 1 else f"{name}-{number}")
        if not output.exists() or run_on(output, root, split):
            return output
        number += 1


def recommend(given: Mapping[str, Any], overrides: Sequence[str]) -> tuple[PretrainRecipe, str]:
    """Choose a complete configuration for `data.root` and this machine, the same in all processes; and say why.

    The same command again goes on with its run, as it was chosen then.

    Args:
        given: values of what `overrides` give, by dotted key; `data.root` is among them.
        overrides: KEY=VALUE of the command line, which win.

    Raises:
        UserError: if there are no images, or what is given does not fit.
    """
    return decide_once(lambda: _recommend(given, overrides))


def _recommend(given: Mapping[str, Any], overrides: Sequence[str]) -> tuple[PretrainRecipe, str]:
    root, split = given["data.root"], given.get("data.split", "train")
    output = Path(given["output"]) if "output" in given else suitable_output(Path(root), split)
    stored = run_on(output, Path(root), split)
    if stored is not None and RunFolder(output).newest is not None:
        values: dict[str, Any] = stored.model_dump(mode="json") | {"resume": "auto"}
        if stored.optim.images_per_update:  # whose batches the checkpoint knows, whatever the number of processes
            values["data"]["batch_size"] = values["optim"]["accumulate"] = AUTO
        config = override_config(PretrainRecipe, values, overrides, str(RunFolder(output).config))
        return config, f"going on with {output}, as chosen then; to begin anew, delete it or give output=FOLDER"
    name = given.get("data.name", "arrays" if holds_arrays(root, split) else "folder")
    images = look_below(name, root, split, given)
    machine = this_machine()
    choices = [
        Choice("output", str(output), "the run's folder" if "output" not in given else "as given"),
        Choice("data.name", name, "what lies there" if "data.name" not in given else "as given"),
    ]
    rest = {key: value for key, value in given.items() if key not in ("output", "data.name", "data.root")}
    choices += choose(images, machine, rest)
    fixed = [("data.root", root), ("resume", "never" if output.exists() and stored is None else "auto")]
    values = assignments([(key, value) for key, value, _ in choices] + fixed)
    config = override_config(PretrainRecipe, values, overrides, "fcmae pretrain")
    what = f"{images.number:,} image{'s' * (images.number > 1)}"
    processes = f" x {machine.processes} processes" if machine.processes > 1 else ""
    return config, (
        f"chosen for {what} and {machine.name}{processes}; to change any, give it as KEY=VALUE:\n{table(choices)}\n"
        f"the complete configuration goes into {RunFolder(output).config}"
    )
