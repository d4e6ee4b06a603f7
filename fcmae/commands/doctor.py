"""`fcmae doctor`: what of this installation and machine would end or slow a run, line by line, with remedies."""

import argparse
import json
from pathlib import Path

from fcmae import arguments
from fcmae.commands.arguments import command_parser

WIDTH = 19
"""Of the column of names."""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "doctor",
        "Examine this installation and machine: packages that fit each other, GPU and driver, compilers, disk, "
        "shared memory, and each layout of the network, forward and gradient. Takes about ten seconds, leaves "
        "nothing.",
        examples="fcmae doctor\nfcmae doctor --output /data/runs\nfcmae doctor --json > doctor.json",
        notes="exit code 0 if runs can start, warnings or not; 1 if something failed that they need, or that\n"
        "would leave a GPU idle; what is not OK is followed by its remedy",
    )
    arguments.add_path(
        parser,
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("runs"),
        help="where runs are to write, whose disk is measured (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list, for programs (default: lines)")
    return parser


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    from fcmae.doctor import diagnose_machine

    found = []
    for finding in diagnose_machine(options.output):
        found.append(finding)
        if not options.json:
            print(f"{finding.state:9}{finding.name:{WIDTH}}{finding.text}", flush=True)
            if finding.remedy:
                print(f"{'':9}{'':{WIDTH}}-> {finding.remedy}", flush=True)
    failed, warnings = (sum(finding.state == state for finding in found) for state in ("failed", "warning"))
    if options.json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    elif failed:
        print(f"\n{failed} of {len(found)} checks failed: a run needs what their remedies say")
    else:
        print("\nruns can start here" + (f"; {warnings} warning{'s' * (warnings > 1)}" if warnings else ""))
    return 1 if failed else 0
