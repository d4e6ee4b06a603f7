"""`fcmae report`: a run as one HTML file, to look at and to send."""

import argparse
from pathlib import Path

from fcmae.arguments import add_path
from fcmae.commands.arguments import command_parser
from fcmae.files import make_folder, require_folder, require_free, write_text


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "report",
        "Write what a run has come to, finished or going on, into one HTML file: a verdict in words, pictures over "
        "training time, curves beside those of the recipe's reference log, scores, command and environment. The "
        "file loads nothing from elsewhere.",
        examples="fcmae report runs/mine\nfcmae report runs/mine --output mine.html --overwrite",
    )
    add_path(parser, "run", metavar="RUN", type=Path, help="a run folder, of pretraining or fine-tuning")
    add_path(parser, "--output", type=Path, metavar="FILE", help="the file to write (default: RUN/report.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there (default: refuse)")
    return parser


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)

    from fcmae.report.page import render
    from fcmae.report.run import read_run
    from fcmae.report.verdict import judge

    run = read_run(options.run)
    file = options.output or run.folder.report
    require_folder(file.absolute().parent, f"--output {file}")
    require_free(file, overwrite=options.overwrite)
    findings = judge(run)
    page = render(run, findings)
    make_folder(file.absolute().parent)
    write_text(file, page)
    for finding in findings:
        print(f"{finding.level:8} {finding.text}")
    print(f"\n{file}  {len(page.encode()):,} bytes; open it in any browser")
    return 0
