"""What a training run is asked for: arguments, configuration, the first line; needs no torch until the run begins.

`pretrain` and `finetune` are the commands behind `fcmae NAME`, `NAME.py` and `python -m fcmae.NAME`.
"""

import argparse
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from fcmae import __version__
from fcmae.config import (
    MOST_CHANNELS,
    FinetuneRecipe,
    PretrainRecipe,
    RunConfig,
    load_config,
    override,
    override_config,
    to_yaml,
)
from fcmae.errors import UserError, named, run_script
from fcmae.files import require_folder
from fcmae.plain_yaml import write_value

FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""The `complete` of an argument that is a path, for shtab."""

KEYS = """\
keys:
  every setting is a key of the configuration; --print-config lists all of them, with their values, and key=value
  changes one. 'fcmae configs' lists the shipped configurations; docs/ says more of the keys."""


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors do not repeat a long argument."""

    def error(self, message: str) -> NoReturn:
        super().error(textwrap.shorten(message, 500, placeholder=" ..."))


def command_parser(
    prog: str | None, description: str, *, examples: str, notes: str = "", usage: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser whose help ends with example command lines and notes, as they are written."""
    epilog = "\n\n".join(filter(None, (f"examples:\n{textwrap.indent(examples, '  ')}", notes)))
    return Parser(
        prog=prog,
        usage=usage,
        description=textwrap.fill(description, 79),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_path(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Add an argument that is a path, which shells complete."""
    parser.add_argument(*names, **options).complete = FILES  # pyright: ignore[reportAttributeAccessIssue]


def add_run_arguments(parser: argparse.ArgumentParser, without_config: str) -> None:
    """Add what both stories take; `without_config` says what happens without --config."""
    add_path(
        parser,
        "words",
        nargs="*",
        metavar="IMAGES, KEY=VALUE",
        help="the folder of the images (data.root), and settings that win, such as output=runs/mine",
    )
    add_path(
        parser,
        "--config",
        metavar="NAME",
        help=f"a file, or a shipped configuration by its name, such as atto (default: {without_config})",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete configuration and stop (default: train)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, check the data, estimate time and memory; write nothing (default: train)",
    )
    parser.add_argument(
        "--find-lr",
        action="store_true",
        help="make a hundred updates at a growing rate, suggest optim.base_lr and draw loss against rate; keep "
        "nothing else (default: train)",
    )
    add_path(
        parser,
        "--plot",
        metavar="FILE",
        type=Path,
        help="with --find-lr, its picture, a new file (default: OUTPUT-find-lr.png, beside where the run would be)",
    )


def pretrain_parser(prog: str | None = None) -> argparse.ArgumentParser:
    name = prog or "pretrain.py"
    parser = command_parser(
        prog,
        "Pretrain FCMAE on images without labels. Given nothing but images, it chooses what suits them and this "
        "machine, and says so.",
        usage="%(prog)s IMAGES [KEY=VALUE ...] [--print-config | --dry-run | --find-lr]\n"
        "       %(prog)s --config NAME [IMAGES] [KEY=VALUE ...] [--print-config | --dry-run | --find-lr]",
        examples=f"{name} path/to/images\n"
        f"{name} path/to/images data.image_size=128 train.epochs=100 --dry-run\n"
        f"{name} --config tiny path/to/images output=runs/mine",
        notes=KEYS,
    )
    add_run_arguments(parser, "chosen for the images and this machine")
    return parser


def finetune_parser(prog: str | None = None) -> argparse.ArgumentParser:
    name = prog or "finetune.py"
    parser = command_parser(
        prog,
        "Fine-tune a ConvNeXt V2 to classify labelled images, or evaluate one.",
        usage="%(prog)s --config NAME [IMAGES] [KEY=VALUE ...] [--print-config | --dry-run | --find-lr]\n"
        "       %(prog)s --evaluate SOURCE [--last] [--ema | --raw] [--config NAME] [KEY=VALUE ...]\n"
        "       [--overwrite]",
        examples=f"{name} --config tiny path/to/labelled init_from=runs/mine output=runs/classifier\n"
        f"{name} --evaluate runs/classifier",
        notes=KEYS,
    )
    add_run_arguments(parser, "that of the run to evaluate")
    add_path(
        parser,
        "--evaluate",
        metavar="SOURCE",
        help="score the model of a run, a checkpoint, or with --config any classifier's weights, and stop "
        "(default: train)",
    )
    parser.add_argument(
        "--last", action="store_true", help="evaluate the run's newest checkpoint (default: the best)"
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--ema",
        action="store_true",
        default=None,
        help="evaluate the EMA weights (default: where the run has them)",
    )
    kind.add_argument("--raw", action="store_false", dest="ema", help="evaluate the raw weights, not the EMA")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --evaluate, replace evaluation.json and its pictures where they are not the run's own "
        "(default: refuse)",
    )
    return parser


def read_words(words: Sequence[str]) -> list[str]:
    """Return the KEY=VALUE among positional arguments, the folder of images as data.root.

    Raises:
        UserError: if there are several folders, or there is none of that name.
    """
    overrides = [word for word in words if re.match(r"[\w.]*=", word)]
    folders = [word for word in words if word not in overrides]
    if len(folders) > 1:
        raise UserError(
            f"{named(shlex.join(folders))}: name one folder of images; settings are KEY=VALUE, without spaces"
        )
    if folders and not (os.path.exists(folders[0]) or "://" in folders[0]):
        raise UserError(
            f"{named(folders[0])}: no such folder or file of images; settings are KEY=VALUE, such as "
            "optim.base_lr=3e-4"
        )
    return [f"data.root={write_value(folder)}" for folder in folders] + overrides


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def read_given(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings that overrides give, by dotted key, when all else is still to be chosen.

    Raises:
        UserError: if a key or value is wrong.
    """
    nested: dict[str, Any] = {}
    for assignment in overrides:
        override(nested, assignment)
    rest: dict[str, Any] = {"output": "RUN", "model": {"variant": "atto"}, "data": {"root": "IMAGES"}}
    model = nested.get("model")
    channels = model.get("in_chans") if isinstance(model, dict) else None
    if isinstance(channels, int) and 1 <= channels <= MOST_CHANNELS:
        rest["data"] |= {"mean": [0.5] * channels, "std": [0.5] * channels}
    config = override_config(PretrainRecipe, rest, overrides, "fcmae pretrain")

    def value(key: str) -> Any:
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        return found

    return {key: value(key) for key in leaves(nested)}


def require_one_mode(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be asked for at once, with the usage."""
    if options.find_lr and options.dry_run:
        parser.error("--find-lr and --dry-run do different things: give one of them")
    if options.plot and not options.find_lr:
        parser.error("--plot is of --find-lr")


def picture_of(options: argparse.Namespace, output: str) -> Path | None:
    """Return where --find-lr draws, a file that can be written; None where it was not asked for.

    Raises:
        UserError: if it cannot.
    """
    if not options.find_lr:
        return None
    path = options.plot or Path(f"{os.path.normpath(output)}-find-lr.png")
    require_folder(path.parent, f"--plot {path}")
    if os.path.lexists(path):
        raise UserError(f"--plot {path}: exists already; name another file")
    return path


def announce(text: str) -> None:
    """Print the first line of a run, on the main process, before torch is imported, which takes seconds."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fcmae {__version__}: {text}", flush=True)


def announce_run(config: RunConfig, task: str, source: str) -> None:
    announce(f"{task} on {config.data.root}, into {config.output}, by {source}")


def mention_other_gpus(name: str, argv: Sequence[str]) -> None:
    """Say how all GPUs are used, where a single process was started on several."""
    import torch

    number = torch.cuda.device_count()
    if number > 1 and "WORLD_SIZE" not in os.environ:
        launch = f"accelerate launch --multi_gpu --num_processes {number} -m fcmae.{name}"
        print(f"this uses one of {number} GPUs; all of them: {launch} {shlex.join(argv)}", flush=True)


def story(name: str) -> Any:
    """Import a story, and torch with it, by its name: as it lies above this module, when it is about to run."""
    return import_module(f"fcmae.{name}")


def pretrain(argv: list[str], *, prog: str | None = None) -> int:
    """Pretrain as asked for on the command line; returns the exit code."""
    parser = pretrain_parser(prog)
    options = parser.parse_intermixed_args(argv)
    require_one_mode(parser, options)
    overrides = read_words(options.words)
    if options.config is not None:
        config = load_config(PretrainRecipe, options.config, overrides)
        if not options.print_config:
            announce_run(config, "pretraining", options.config)
    else:
        given = read_given(overrides)
        if "data.root" not in given:
            parser.error("name a folder of images, or --config NAME")
        if not options.print_config:
            announce(f"pretraining on {given['data.root']}; looking at the images and this machine")
        from fcmae.recipe import recommend

        config, reasons = recommend(given, overrides)
        if not options.print_config and os.environ.get("RANK", "0") == "0":
            print(reasons, flush=True)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    picture = picture_of(options, config.output)
    run = story("pretrain").pretrain
    mention_other_gpus("pretrain", argv)
    return run(config, dry_run=options.dry_run, lr_picture=picture)


def finetune(argv: list[str], *, prog: str | None = None) -> int:
    """Fine-tune or evaluate as asked for on the command line; returns the exit code."""
    parser = finetune_parser(prog)
    options = parser.parse_intermixed_args(argv)
    if options.evaluate is None and (options.last or options.ema is not None or options.overwrite):
        parser.error("--last, --ema, --raw and --overwrite are of --evaluate")
    require_one_mode(parser, options)
    if options.evaluate is not None and options.find_lr:
        parser.error("--evaluate trains nothing: leave out --find-lr")
    options.overrides = read_words(options.words)
    if options.evaluate is not None:
        if not options.print_config:
            announce(f"evaluating {options.evaluate}")
        return story("finetune").evaluate_weights(options)
    if options.config is None:
        parser.error("one of --config and --evaluate is needed")
    config = load_config(FinetuneRecipe, options.config, options.overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    announce_run(config, "fine-tuning", options.config)
    picture = picture_of(options, config.output)
    run = story("finetune").finetune
    mention_other_gpus("finetune", argv)
    return run(config, dry_run=options.dry_run, lr_picture=picture)


def run(name: str) -> None:
    """Entry point of NAME.py and of `python -m fcmae.NAME`."""
    sys.exit(run_script({"pretrain": pretrain, "finetune": finetune}[name]))
