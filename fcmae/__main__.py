"""The `fcmae` command: knows the commands' names and what each is for, and imports only the one that runs."""

import argparse
import sys
from importlib import import_module

from fcmae import __version__
from fcmae.errors import run_script

COMMANDS = {
    "prepare": "decode and shrink images once, for data.name=arrays",
    "pretrain": "pretrain FCMAE on images without labels",
    "evaluate": "k-NN and linear probe accuracy of an encoder's frozen features",
    "finetune": "fine-tune a classifier on labelled images, or evaluate one",
    "predict": "print the top classes of images",
    "reconstruct": "draw original | masked | reconstruction of images",
    "export": "write weights in the format of timm, transformers, ONNX and others",
}
"""Each is `main(arguments) -> exit code` in the module `fcmae.commands.NAME`."""


def run(argv: list[str]) -> int:
    """Run `fcmae NAME ARGUMENTS`; returns the exit code."""
    if argv and argv[0] in COMMANDS:
        return import_module(f"fcmae.commands.{argv[0]}").main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="fcmae",
        description="Pretrain ConvNeXt V2 on your own images without labels (FCMAE), and use what it learnt.",
        epilog="'fcmae COMMAND --help' shows a command's arguments and an example.",
    )
    parser.add_argument("--version", action="version", version=f"fcmae {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    parser.parse_args(argv)
    parser.error("the command comes first: fcmae COMMAND ...")


def main() -> int:
    """Entry point of `fcmae` and of `python -m fcmae`."""
    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())
