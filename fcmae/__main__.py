"""The `fcmae` command: knows the commands' names and what each is for, and imports only the one that runs."""

import argparse
import sys
from importlib import import_module

from fcmae import __version__
from fcmae.errors import run_script

COMMANDS = {
    "stats": "what images are like: sizes, mean and std, histograms, broken files, doubles",
    "prepare": "decode and shrink images once, for data.name=arrays",
    "shard": "pack image files into tar files with an index, to be read from here or elsewhere",
    "pretrain": "pretrain FCMAE on images without labels",
    "plan": "time, memory, traffic and cost of a pretraining on any GPUs, before it is paid for",
    "evaluate": "k-NN and linear probe accuracy of an encoder's frozen features",
    "diagnose": "feature collapse, layer by layer: cosine distance, dead and duplicate channels",
    "finetune": "fine-tune a classifier on labelled images, or evaluate one",
    "predict": "print the top classes of images",
    "reconstruct": "draw original | masked | reconstruction of images",
    "report": "write what a run has come to into one HTML file",
    "export": "write weights in the format of timm, transformers, ONNX and others",
    "ablate": "run a grid of settings over seeds: pretrain, fine-tune, evaluate; a table and a plot",
    "doctor": "examine this installation and machine: what would end or slow a run, and the remedy",
    "configs": "list the shipped configurations, or copy one out",
}
"""Each is `main(arguments) -> exit code` and `make_parser()` in the module `fcmae.commands.NAME`."""

SHELLS = ("bash", "zsh")


def make_parser(**parsers: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Return the parser of the command line: of the commands' names, and of the arguments that `parsers` take."""
    parser = argparse.ArgumentParser(
        prog="fcmae",
        description="Pretrain ConvNeXt V2 on your own images without labels (FCMAE), and use what it learnt.",
        epilog="'fcmae COMMAND --help' shows a command's arguments and an example.\n"
        "Begin with: fcmae pretrain path/to/images",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fcmae {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        help='print a completion script: eval "$(fcmae --print-completion bash)" in ~/.bashrc',
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        own = [parsers[name]] if name in parsers else []
        commands.add_parser(name, help=purpose, add_help=False, parents=own)
    return parser


def print_completion(shell: str) -> None:
    """Print a script that completes commands, options and paths in a shell."""
    import shtab

    parsers = {name: import_module(f"fcmae.commands.{name}").make_parser() for name in COMMANDS}
    print(shtab.complete(make_parser(**parsers), shell))


def run(argv: list[str]) -> int:
    """Run `fcmae NAME ARGUMENTS`; returns the exit code."""
    if argv and argv[0] in COMMANDS:
        return import_module(f"fcmae.commands.{argv[0]}").main(argv[1:])
    parser = make_parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(argv)
    if options.print_completion is None:
        parser.error("the command comes first: fcmae COMMAND ...")
    print_completion(options.print_completion)
    return 0


def main() -> int:
    """Entry point of `fcmae` and of `python -m fcmae`."""
    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())
