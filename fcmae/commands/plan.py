"""`fcmae plan`: time, memory, traffic and cost of a pretraining on GPUs that need not be there."""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fcmae import arguments
from fcmae.commands.arguments import command_parser, require_bounds
from fcmae.config import PretrainConfig, PretrainRecipe, load_config
from fcmae.errors import UserError
from fcmae.files import require_folder, require_free

if TYPE_CHECKING:
    from fcmae.plan.forecast import Forecast
    from fcmae.plan.machines import Machines
    from fcmae.plan.work import Work

BOUNDS = {"gpus": (1, 100_000), "per_machine": (1, 1_000)}
"""Of options, least and most."""
MOST = {"images": 1e12, "epochs": 1e9, "price": 1e6, "network": 1e6, "image_kb": 1e9}
"""Of options that may be fractions or written as 14e6, and are above 0."""
ASSUMED = "h200"
CPU = "cpu"
NOT_COUNTED = (
    "Models of a step, its exchange and its loading (docs/planning.md); what comes from data sheets is right to\n"
    "about 30 %. Evaluation, pictures, checkpoints and failures are not counted."
)
REMEDIES = {
    "computing": "the processor or GPU itself, which waits for nothing",
    "arithmetic": "the GPU itself, which waits for nothing",
    "memory bandwidth": "the GPU itself, which waits for nothing",
    "small kernels": "too few images at once: fewer GPUs, or a larger optim.images_per_update",
    "starting kernels": "the processor, too slow to start so many small kernels: more images at once (fewer GPUs, "
    "a larger optim.images_per_update), or GPUs of one machine with NVLink, which replay CUDA graphs",
    "optimizer": "AdamW: a larger optim.images_per_update",
    "exchange": "gradients on their way: a faster network, or a larger optim.images_per_update",
    "loading": "images that come too slowly: fcmae prepare and data.name=arrays, or data.num_workers={workers} "
    "with as many cores for each process",
    "cores": "{cores:.0f} cores, which all processes share",
}
"""What limits a run, and what helps."""


class Planned(NamedTuple):
    """What was found for one kind of machine."""

    machines: "Machines"
    work: "Work"
    asked: "Forecast"
    curve: "list[Forecast]"
    """From one process on, wherever an update can be divided and fits."""
    ways: "list[Forecast]"
    """Of the asked number, those that fit."""
    price: float | None

    def cost(self, one: "Forecast") -> float | None:
        return None if self.price is None else self.price * one.hours


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "plan",
        "Say what a pretraining would take before anybody pays for it: time, memory, traffic, storage and cost on "
        "any number of GPUs, what limits it and what helps. Trains nothing, and needs no GPU.",
        examples="fcmae plan --config base --gpus 64 --images 14e6 --epochs 800 --price 2.5\n"
        "fcmae plan --config huge --gpus 8 --images 1.28e6 --gpu h100 a100-80 --plot huge.png\n"
        "fcmae plan --config atto data.root=IMAGES --gpus 4 --images 1e5 --measure",
        notes="GPUs are modelled from data sheets, which is right to about 30 %; --measure times this machine.\n"
        "docs/planning.md has the models, and how a plan compares with runs.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings that win, such as data.root=IMAGES",
    )
    arguments.add_path(
        parser, "--config", required=True, metavar="NAME", help="a file, or a shipped configuration by its name"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="how many, or processes on a CPU")
    parser.add_argument("--images", type=float, required=True, metavar="N", help="how many there are, such as 14e6")
    parser.add_argument("--epochs", type=float, metavar="N", help="passes over them (default: the configuration's)")
    parser.add_argument(
        "--gpu",
        nargs="+",
        default=[],
        metavar="NAME",
        help="kinds to compare: h200, h100, a100-80, a100-40, l40s, a10, l4, rtx4090, rtx3090; cpu for the "
        f"processor of this machine, measured (default: {ASSUMED})",
    )
    parser.add_argument(
        "--measure", action="store_true", help="time steps and loading on this machine, on its GPU if it has one"
    )
    parser.add_argument(
        "--price", type=float, nargs="+", metavar="P", help="of a GPU-hour: one for all kinds, or one for each"
    )
    parser.add_argument(
        "--per-machine", type=int, default=8, metavar="N", help="GPUs of each machine (default: %(default)s)"
    )
    parser.add_argument(
        "--network",
        type=float,
        default=400,
        metavar="GBIT",
        help="Gbit/s of each machine to the others (default: %(default)s)",
    )
    parser.add_argument(
        "--image-kb",
        type=float,
        metavar="KB",
        help="of an image on the disk (default: of those in data.root, where it is there, else 110)",
    )
    arguments.add_path(parser, "--plot", type=Path, metavar="FILE", help="draw time against GPUs there: a new PNG")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs (default: tables and words)")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is counted.

    Raises:
        UserError: naming the option.
    """
    from fcmae.plan.machines import GPUS

    require_bounds(options, BOUNDS)
    for name, most in MOST.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if not 0 < value <= most:
                raise UserError(f"--{name.replace('_', '-')} {value:g}: must be above 0, and at most {most:g}")
    for name in options.gpu:
        if name not in (*GPUS, CPU):
            raise UserError(f"--gpu {name}: is not known; choose from {', '.join(GPUS)}, {CPU}, or use --measure")
    kinds = len(options.gpu) + options.measure or 1
    if options.price and len(options.price) not in (1, kinds):
        raise UserError(f"--price: {len(options.price)} prices for {kinds} kinds of GPU; give one, or one for each")
    if options.plot is not None:
        require_folder(options.plot.parent, f"--plot {options.plot}")
        require_free(options.plot)


def read_config(options: argparse.Namespace) -> tuple[PretrainConfig, PretrainRecipe]:
    """Return the configuration that is asked for, and the recipe, which says what is to be chosen for a GPU."""
    from fcmae.load import resolve_recipe

    words = arguments.read_words(options.words)
    if options.epochs is not None:
        words += [f"train.epochs={options.epochs!r}", "train.max_steps=null"]
    recipe = load_config(PretrainRecipe, options.config, words)
    return resolve_recipe(recipe)[0], recipe


def find_machines(
    options: argparse.Namespace, config: PretrainConfig, recipe: PretrainRecipe
) -> "Iterator[tuple[Machines, Work]]":
    """Yield each kind of machine that is asked for, with the work as it is there."""
    import torch

    from fcmae.plan.machines import modelled
    from fcmae.plan.work import Work

    network = options.network * 1e9 / 8
    measured_ones = [""] * options.measure
    on_gpu: Work | None = None
    for name in options.gpu + measured_ones or [ASSUMED]:
        if name in (CPU, ""):
            from fcmae.plan.measure import measured

            if name == CPU:
                os.environ["ACCELERATE_USE_CPU"] = "true"
            yield measured(config, recipe, options.gpus, per_machine=options.per_machine, network=network)
            continue
        precision = "bf16" if config.train.precision == "auto" else config.train.precision
        on_gpu = on_gpu or Work.count(config, torch.device("cuda"), precision)
        machines = modelled(
            name,
            on_gpu,
            precision,
            per_machine=options.per_machine,
            network=network,
            num_workers=config.data.num_workers,
            source=config.data.name,
        )
        yield machines, on_gpu


def counts(asked: int) -> list[int]:
    """Return powers of two up to four times the asked number, and the asked number with its halves and doubles."""
    twos = {2**power for power in range(math.ceil(math.log2(asked)) + 3)}
    return sorted(twos | {asked, 2 * asked} | ({asked // 2} if asked > 1 else set()))


def plan(
    config: PretrainConfig, recipe: PretrainRecipe, machines: "Machines", work: "Work", images: int, asked: int
) -> "tuple[Forecast, list[Forecast], list[Forecast]]":
    """Return the forecast for the asked number of processes, for others, and for other ways to save memory."""
    from fcmae.plan.forecast import WAYS, forecast, require_forecast

    found = require_forecast(config, recipe, work, machines, images=images, processes=asked)
    curve = []
    for count in counts(asked):
        try:
            one = forecast(config, recipe, work, machines, images=images, processes=count, way=found.way)
        except UserError:  # among so many an update cannot be divided
            continue
        curve += [one] if one else []
    ways = (forecast(config, recipe, work, machines, images=images, processes=asked, way=way) for way in WAYS)
    return found, curve, [way for way in ways if way]


def days(seconds: float) -> str:
    """Write a time span in the two units that matter."""
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24:,} d {hours % 24:02} h"


def ms(seconds: float) -> str:
    """Write milliseconds in three digits."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows, each column to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def table(planned: Planned) -> str:
    """Return a table of the asked number of processes, half as many and twice as many."""
    asked = planned.asked.processes
    head = [
        "GPUs" if planned.machines.on_gpu else "processes",
        "time",
        "images/s",
        "at once",
        "GB each",
        "limited by",
    ]
    head += [] if planned.price is None else ["cost"]
    rows = [head]
    for one in planned.curve:
        if one.processes not in (asked // 2, asked, 2 * asked):
            continue
        row = [f"{one.processes:,}", days(one.seconds), f"{one.images_per_s:,.0f}"]
        row += [f"{one.batch}" + (f" x {one.accumulate}" if one.accumulate > 1 else "")]
        row += [f"{one.memory / 1e9:.1f}", one.limit]
        cost = planned.cost(one)
        rows.append(row if cost is None else [*row, f"{cost:,.0f}"])
    return columns(rows)


def explain(planned: Planned, config: PretrainConfig, stored: tuple[float, str]) -> Iterator[str]:
    """Yield lines on the asked number of processes: of what an update is made, and what would help."""
    one, machines = planned.asked, planned.machines
    step_s = sum(one.parts.values())
    parts = [f"{name} {ms(s)}" for name, s in one.parts.items() if s >= 5e-6]
    yield f"update     {ms(one.update_s)} ms; of computing, in ms: {', '.join(parts)}"
    if one.processes > 1:
        hidden = one.exchange_s - one.parts["exchange"]
        yield (
            f"exchange   {one.exchange_bytes / 1e9:.3g} GB sent by each process in an update, "
            f"{ms(one.exchange_s)} ms, of which {ms(hidden)} while it computes"
        )
    share = one.batch * one.accumulate
    loaders = max(config.data.num_workers, 1)
    yield (
        f"loading    each process could compute {share / step_s:,.0f} images/s, and its {loaders} "
        f"loader{'s' * (loaders > 1)} give{'s' * (loaders == 1)} {share / one.loading_s:,.0f}"
    )
    size, origin = stored
    yield (
        f"storage    {one.images_per_s * size / 1e9:.3g} GB/s to be read: {one.images_per_s:,.0f} images/s of "
        f"{size / 1e3:.0f} kB ({origin})"
    )
    for number, way in enumerate(planned.ways):
        yield (
            f"{'memory' if number == 0 else '':10} {way.memory / 1e9:.1f} GB by {way.way}, "
            f"{way.batch} images at once: {days(way.seconds)}"
        )
    workers = math.ceil(loaders * one.loading_s / step_s)
    yield f"limit      {one.limit}: {REMEDIES[one.limit].format(workers=workers, cores=machines.cores)}"


def as_json(value: Any) -> Any:
    """Return what was found as JSON has it; infinity as null."""
    if hasattr(value, "update_s"):
        value = value._asdict() | {"way": str(value.way), "seconds": value.seconds, "hours": value.hours}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return None if value == math.inf else value


def as_text(found: Sequence[Planned], config: PretrainConfig, images: int, stored: tuple[float, str]) -> str:
    """Return tables and words on each kind of machine."""
    one, work = found[0].asked, found[0].work
    lines = [
        f"{config.model.variant}: {images:,} images x {config.train.epochs:g} epochs = {one.updates:,} updates of "
        f"{one.batch * one.accumulate * one.processes:,}; {work.parameters / 1e6:.1f} M parameters, "
        f"{work.flop / 1e9:.3g} GFLOP an image"
    ]
    for planned in found:
        lines += ["", f"{planned.machines.name}, {planned.machines.source}", table(planned), ""]
        lines += [f"  {line}" for line in explain(planned, config, stored)]
    return "\n".join([*lines, "", NOT_COUNTED])


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)
    options.words += [name for name in options.gpu if "=" in name]  # which argparse takes for one more kind
    options.gpu = [name for name in options.gpu if "=" not in name]
    check_options(options)
    config, recipe = read_config(options)
    from fcmae.plan.storage import image_bytes

    stored = (1e3 * options.image_kb, "as given") if options.image_kb else image_bytes(config.data)
    images, prices = round(options.images), options.price or [None]
    found = list[Planned]()
    for number, (machines, work) in enumerate(find_machines(options, config, recipe)):
        forecasts = plan(config, recipe, machines, work, images, options.gpus)
        found.append(Planned(machines, work, *forecasts, prices[number % len(prices)]))
    if options.json:
        values = {
            "config": options.config,
            "images": images,
            "epochs": config.train.epochs,
            "image_bytes": stored[0],
            "plans": [{**one._asdict(), "cost": one.cost(one.asked)} for one in found],
        }
        print(json.dumps(as_json(values), indent=1))
    else:
        print(as_text(found, config, images, stored))
    if options.plot is not None:
        from fcmae.plan.picture import draw_time

        title = f"{config.model.variant}: {images:,} images x {config.train.epochs:g} epochs"
        curves = {one.machines.name: one.curve for one in found}
        unit = "GPUs" if all(one.machines.on_gpu for one in found) else "processes"
        draw_time(title, curves, options.gpus, unit, options.plot)
    return 0
