"""`fcmae ablate`: a grid of settings, run over seeds; its table and its plot."""

import argparse
import re
import shlex
import shutil
import sys
from pathlib import Path

from fcmae.arguments import add_path, read_words
from fcmae.commands.arguments import command_parser
from fcmae.errors import UserError, blame, named, shown
from fcmae.files import require_folder, require_free, write_text


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "ablate",
        "Run a grid of settings, seed by seed: pretrain, fine-tune, evaluate. What has finished is not run again, "
        "what was stopped goes on. Then print a table and draw a plot, the paper's figures beside ours.",
        examples="fcmae ablate cifar10-versions data/cifar10\n"
        "fcmae ablate cifar10-versions data/cifar10 seeds=[0] pretrain.train.epochs=10 output=runs/longer\n"
        "fcmae ablate imagenet-versions path/to/imagenet --launch 'accelerate launch --multi_gpu' --dry-run\n"
        "fcmae ablate mine.yaml --table --plot mine.png",
        notes="settings are keys of the grid, and of its runs below 'both', 'pretrain' and 'finetune', such as\n"
        "finetune.data.label_fraction=0.1; 'fcmae configs' lists the shipped grids, in ablations/",
    )
    add_path(parser, "grid", metavar="GRID", help="a file, or a shipped grid by its name")
    add_path(
        parser,
        "words",
        nargs="*",
        metavar="IMAGES, KEY=VALUE",
        help="the folder of the images (both.data.root), and settings that win, such as output=runs/mine",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--launch",
        default=None,
        metavar="WORDS",
        help="what starts a run, before '-m fcmae.pretrain' (default: this Python)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run none (default: run)")
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and run nothing")
    add_path(parser, "--plot", type=Path, metavar="PNG", help="draw what there is there, and run nothing")
    add_path(
        parser,
        "--results",
        type=Path,
        metavar="FILE",
        help="the results, a run a line (default: results.jsonl in the grid's output)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that are no results of this grid: PNG, and table.md and plot.png in its output "
        "(default: refuse)",
    )
    return parser


def main(argv: list[str]) -> int:
    parser = make_parser()
    options = parser.parse_intermixed_args(argv)
    if options.jobs < 1:
        parser.error("--jobs is at least 1")
    overrides = [re.sub(r"^data\.root=", "both.data.root=", word) for word in read_words(options.words)]

    from fcmae import ablation
    from fcmae.config import load_config

    grid = load_config(ablation.Grid, options.grid, overrides)
    name, output = Path(options.grid).stem, Path(grid.output)
    tasks = ablation.tasks_of(grid, name)
    results = ablation.Results(options.results or output / "results.jsonl")
    if options.plot:
        require_folder(options.plot.parent, f"--plot {options.plot}")
        require_free(options.plot, overwrite=options.overwrite)
    if options.table or options.plot:
        scores = ablation.scores_of(tasks, results)
        if not any(scores.values()):
            raise UserError(f"{results.path}: has no results of {name}; make them: fcmae ablate {options.grid}")
        if options.table:
            print(ablation.table(grid, scores))
        if options.plot:
            ablation.plot(grid, scores, options.plot)
        return 0

    with blame(f"--launch {named(str(options.launch))}"):
        launcher = shlex.split(options.launch or "") or [sys.executable]
    if shutil.which(launcher[0]) is None:
        raise UserError(f"--launch {named(str(options.launch))}: there is no program {shown(launcher[0])} on PATH")
    runner = ablation.Runner(
        output,
        results,
        launcher=launcher,
        jobs=options.jobs,
        say=lambda line: print(line, flush=True),
    )
    print(ablation.plan(grid, tasks, results), flush=True)
    if options.dry_run:
        for stage in ablation.pending(tasks, results):
            print(shlex.join(runner.command(stage)))
        return 0
    table, picture = output / name / "table.md", output / name / "plot.png"
    places = {stage.place for *_, stages in tasks for stage in stages}
    begun = any(record.run in places for record in results.read())
    for path in (table, picture):
        require_free(path, overwrite=options.overwrite or begun)

    def show() -> str:
        text = ablation.table(grid, ablation.scores_of(tasks, results))
        table.parent.mkdir(parents=True, exist_ok=True)
        write_text(table, text + "\n")
        return text

    failures = ablation.run(grid, tasks, runner, show)
    print(show())
    ablation.plot(grid, ablation.scores_of(tasks, results), picture)
    print(f"\n{table}, {picture}")
    for failure in failures:
        print(f"error: {failure}: failed", file=sys.stderr)
    return 1 if failures else 0
