"""`fcmae configs`: the shipped configurations, listed with a line each, or one copied out to be edited."""

import argparse
import os
import textwrap
from pathlib import Path

from fcmae.arguments import add_path
from fcmae.commands.arguments import command_parser
from fcmae.config import command_of, find_shipped, shipped_configs
from fcmae.errors import UserError
from fcmae.files import write_text

PURPOSES = {
    "pretrain": "fcmae pretrain --config NAME",
    "finetune": "fcmae finetune --config NAME",
    "ablate": "fcmae ablate NAME",
}
"""What takes configurations, in the order they are listed in."""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "configs",
        "List the configurations that come with fcmae, which --config takes by their names ('fcmae ablate': those "
        "in ablations/), or copy one out.",
        examples="fcmae configs\nfcmae configs pretrain/tiny\nfcmae configs pretrain/tiny mine.yaml",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="the one to copy (default: list them)")
    add_path(
        parser, "file", metavar="FILE", nargs="?", type=Path, help="its copy, a new file (default: NAME.yaml, here)"
    )
    return parser


def purpose(config: Path) -> str:
    """Return the first sentence of a configuration's header."""
    header = config.read_text(encoding="utf-8").partition("\n#\n")[0].replace("\n#", " ").lstrip("# ")
    return textwrap.shorten(header.partition(". ")[0].rstrip("."), 100, placeholder=" ...")


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    if options.name is None:
        shipped = shipped_configs()
        width = max(map(len, shipped))
        for command, what in PURPOSES.items():
            print(f"# {what}")
            for name, path in shipped.items():
                if command_of(name) == command:
                    print(f"{name:{width}}  {purpose(path)}")
        return 0
    name = options.name
    source = find_shipped(name)
    target = options.file or Path(source.name)
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; name another file: fcmae configs {name} FILE")
    write_text(target, source.read_text(encoding="utf-8"))
    command = command_of(name)
    print(f"{target}  edit it, then: fcmae {command} {'' if command == 'ablate' else '--config '}{target}")
    return 0
