"""fcmae ablate: each run once, whoever wants it; what was stopped goes on; the table says what was measured."""

import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, error_line, run_main
from PIL import Image
from processes import Processes

import fcmae.__main__
from fcmae import ablation, arguments
from fcmae.__main__ import run
from fcmae.config import load_config
from fcmae.data import save_arrays

GRIDS = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
RESULTS = ROOT / "benchmarks" / "results" / "ablations-cifar10.jsonl"
PAGE = (ROOT / "docs" / "ablations.md").read_text()

GRID = """
title: Versions
source: a paper, table 1
output: runs
configs: {pretrain: pretrain/cifar10-small, finetune: finetune/cifar10-small}
seeds: [0, 1]
measure: [top1, loss]
reference: V2 + FCMAE
arms:
  V1 + FCMAE: {both: {model.version: 1}, paper: 83.7}
  V2 from scratch: {pretrain: false, finetune: {optim: {base_lr: 4e-3}}, paper: 84.3}
  V2 + FCMAE: {paper: 84.6}
  dropped: {finetune: {model.response: none}}
"""

FAKE = """
import json, pathlib, sys, time
folder, (module, *words) = pathlib.Path(sys.argv[1]), sys.argv[3:]
keys = dict(word.split("=", 1) for word in words[2:])
with (folder / "ran").open("a") as log:
    log.write(f"{module} {keys['output']}\\n")
if (folder / "hang").exists():
    time.sleep(60)
if any(name in keys["output"] for name in (folder / "fails").read_text().split()):
    sys.exit("diverged")
seed, version = int(keys["train.seed"]), int(keys.get("model.version", 2))
run = pathlib.Path(keys["output"])
run.mkdir(parents=True, exist_ok=True)
top1 = 0.3 + 0.1 * version + 0.01 * seed - 0.2 * ("model.response" in keys) - 0.05 * (keys["init_from"] == "null")
records = [{"loss": 0.9}, {"loss": 0.7}] if module == "fcmae.pretrain" else [{"val_top1": 0.1}, {"val_top1": top1}]
(run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
"""
"""Runs as the scripts do, in no time; fails and hangs as files say."""

Ablate = Callable[..., int]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that start a run, instead of Python's; the folder of the test is the working one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "fails").write_text("")
    (tmp_path / "grid.yaml").write_text(GRID)
    return ["--launch", shlex.join([sys.executable, str(tmp_path / "fake.py"), str(tmp_path)])]


def ablate(*words: str) -> int:
    return run_main(run, "ablate", "grid.yaml", *words)


def ran() -> list[tuple[str, str]]:
    """(kind, run folder) of the runs so far, in order."""
    lines = Path("ran").read_text().splitlines() if Path("ran").exists() else []
    return [(kind.removeprefix("fcmae."), output) for kind, output in map(str.split, lines)]


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    return error_line(run, capsys, "ablate", "grid.yaml", *words)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_arm_of_every_shipped_grid_is_a_valid_configuration(path: Path) -> None:
    grid = load_config(ablation.Grid, path, ["seeds=[1]"])
    assert path.stem.startswith(Path(grid.output).name)
    stages = [stage for *_, stages in ablation.tasks_of(grid, path.stem) for stage in stages]
    assert len({stage.key for stage in stages if stage.kind == "finetune"}) == len(grid.arms)  # no two are the same
    for stage in stages:
        if stage.start is not None:
            network, start = stage.config.model, stage.start.config.model
            assert network.variant in (start.variant, "auto")
            assert network.version in (start.version, "auto")


def test_arms_run_seed_by_seed_and_equal_pretrainings_once(fake: list[str]) -> None:
    assert ablate(*fake) == 0
    arms = ("v1-fcmae", "v2-from-scratch", "v2-fcmae", "dropped")
    finetunings = [output for kind, output in ran() if kind == "finetune"]
    assert finetunings == [f"runs/grid/{arm}/seed-{seed}/finetune" for seed in (0, 1) for arm in arms]
    pretrainings = [output for kind, output in ran() if kind == "pretrain"]
    assert pretrainings == [f"runs/grid/{arm}/seed-{s}/pretrain" for s in (0, 1) for arm in (arms[0], arms[2])]


def test_the_table_has_the_papers_figures_means_spread_and_differences_of_equal_seeds(
    fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(*fake) == 0
    assert ablate("--table") == 0
    table = capsys.readouterr().out
    assert table.count("| arm |") == 2
    assert table.endswith(
        "| arm | paper | top-1, % | minus V2 + FCMAE, same seed | loss | seeds |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| V1 + FCMAE | 83.7 | 40.5 (40.0 to 41.0) | -10.0 (-10.0 to -10.0) | 0.800 (0.800 to 0.800) | 2 |\n"
        "| V2 from scratch | 84.3 | 45.5 (45.0 to 46.0) | -5.0 (-5.0 to -5.0) |  | 2 |\n"
        "| V2 + FCMAE | 84.6 | 50.5 (50.0 to 51.0) |  | 0.800 (0.800 to 0.800) | 2 |\n"
        "| dropped |  | 30.5 (30.0 to 31.0) | -20.0 (-20.0 to -20.0) | 0.800 (0.800 to 0.800) | 2 |\n"
    )
    assert Path("runs/grid/table.md").read_text() in table


@pytest.mark.parametrize("paper", [True, False])
def test_the_plot_is_drawn(paper: bool, fake: list[str]) -> None:
    if not paper:
        Path("grid.yaml").write_text("".join(part.split("}")[-1] for part in GRID.split(", paper")))
        Path("grid.yaml").write_text(
            GRID.replace(", paper: 83.7", "").replace(", paper: 84.3", "").replace("paper: 84.6", "")
        )
    assert ablate(*fake, "seeds=[0]") == 0
    assert ablate("--plot", "plot.png") == 0
    with Image.open("plot.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 10


def test_what_has_finished_is_not_run_again_by_this_or_another_grid(fake: list[str]) -> None:
    assert ablate(*fake, "seeds=[0]") == 0
    first = ran()
    assert ablate(*fake) == 0
    assert all("seed-1" in output for _, output in ran()[len(first) :])
    done = ran()
    Path("other.yaml").write_text(GRID.replace("V1 + FCMAE", "version 1"))
    assert run_main(run, "ablate", "other.yaml", *fake) == 0
    assert ran() == done


def test_where_things_lie_is_no_difference_and_any_setting_is(
    fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(*fake, "seeds=[0]") == 0
    done = ran()
    Path("images").mkdir()
    assert ablate(*fake, "images", "seeds=[0]", "both.log.every_steps=7") == 0
    assert ran() == done
    error = error_of(capsys, *fake, "pretrain.train.epochs=2")
    assert (
        "runs/grid/v1-fcmae/seed-0/pretrain: was begun with other settings (settings.train.epochs: 1.0 -> 2"
        in error
    )
    assert "delete it, or give output=FOLDER" in error
    assert ran() == done
    assert ablate(*fake, "pretrain.train.epochs=2", "output=longer", "seeds=[0]") == 0


def test_the_commands_that_a_dry_run_prints_are_those_that_run(
    fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(*fake, "--dry-run") == 0
    assert not ran()
    plan, *commands = capsys.readouterr().out.splitlines()
    assert plan == "Versions: 4 arms, 2 seeds; to run: 4 pretrainings and 8 fine-tunings"
    assert ablate(*fake) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if " -m fcmae." in line] == commands
    start = "runs/grid/v2-fcmae/seed-1/pretrain"
    assert commands[-1].endswith(
        "-m fcmae.finetune --config finetune/cifar10-small model.response=none train.seed=1 "
        f"output=runs/grid/dropped/seed-1/finetune resume=auto init_from={start}"
    )
    assert ablate(*fake, "seeds=[0,1,2]", "--dry-run") == 0
    assert "minutes one at a time" in capsys.readouterr().out


def test_an_arm_that_fails_is_reported_the_others_run_and_later_only_it_is_run(
    fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fails").write_text("v2-fcmae/seed-0/pretrain")
    assert ablate(*fake) == 1
    out, err = capsys.readouterr()
    assert err == "error: V2 + FCMAE, seed 0: failed\nerror: dropped, seed 0: failed\n"
    assert "failed (1): diverged; its output is in runs/grid/v2-fcmae/seed-0/pretrain.log" in out
    outputs = [output for _, output in ran()]
    assert len(set(outputs)) == len(outputs)  # who shares a failed pretraining does not try it again
    assert "| V2 + FCMAE | 84.6 | 51.0 |  |" in out
    Path("fails").write_text("")
    assert ablate(*fake) == 0
    assert [output.split("/")[2] for _, output in ran()[len(outputs) :]] == ["v2-fcmae", "v2-fcmae", "dropped"]


def test_several_at_a_time_come_to_the_same(fake: list[str]) -> None:
    assert ablate(*fake, "seeds=[0]") == 0
    assert ablate(*fake, "--jobs=3", "seeds=[0]", "output=other") == 0
    tables = [Path(output, "grid", "table.md").read_text() for output in ("runs", "other")]
    assert tables[0] == tables[1]
    assert len(ran()) == 2 * 6


def test_a_killed_grid_leaves_no_run_behind_and_goes_on(fake: list[str]) -> None:
    Path("hang").touch()
    process = Processes(fcmae.__main__.main, ["fcmae", "ablate", "grid.yaml", *fake, "seeds=[0]"], Path.cwd())
    while not ran() and process.alive():
        time.sleep(0.01)
    process.processes[0].terminate()
    assert process.wait() == [128 + signal.SIGTERM]  # it waits for its run
    assert len(ran()) == 1
    Path("hang").unlink()
    assert ablate(*fake, "seeds=[0]") == 0
    assert len(ran()) == 1 + 6


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["arms.V1.colour=1"], ["arms.V1.colour", "unknown key"]),
        (["titel=x"], ["titel: unknown key", "title"]),
        (["reference=V3"], ["there is no arm 'V3'", "V1 + FCMAE"]),
        (["arms.V2_FCMAE={}"], ["'V2 + FCMAE' and 'V2_FCMAE' would share the folder 'v2-fcmae'"]),
        (["both.model.mask_ratio=0.5"], ["arm 'V1 + FCMAE', finetune: ", "model.mask_ratio: unknown key"]),
        (["arms.odd={both: {model.response: paint}}"], ["arm 'odd', pretrain: ", "model.response", "'grn'"]),
        (["configs.pretrain=ato"], ["arm 'V1 + FCMAE', pretrain: ", "did you mean pretrain/atto?"]),
        (["configs={finetune: finetune/atto}"], ["arm 'V1 + FCMAE', pretrain: configs.pretrain: missing"]),
        (["configs.predict=x"], ["configs: ", "'pretrain' or 'finetune'"]),
        (["measure=[top1,speed]"], ["measure", "'knn'"]),
        (["measure=[knn]", "pretrain.eval.knn_every_epochs=null"], ["knn needs pretrain.eval.knn_every_epochs"]),
        (["seeds=[]"], ["seeds"]),
        ([f"seeds=[{','.join(map(str, range(600)))}]"], ["4 arms and 600 seeds are more than 1000 runs"]),
        (["both." + "a." * 5000 + "x=1"], ["unknown key"]),
        (["--launch='"], ["--launch ': No closing quotation"]),
        (["--launch=nonsense -x"], ["--launch nonsense -x: there is no program 'nonsense'"]),
        (["--table"], ["runs/results.jsonl: has no results of grid; make them: fcmae ablate grid.yaml"]),
    ],
)
def test_wrong_grids_are_reported_in_one_line(
    words: list[str], parts: list[str], fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, *fake, *words)
    assert all(part in error for part in parts), error
    assert not ran()


def test_an_unknown_grid_is_reported_with_those_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean ablations/cifar10-" in error_line(run, capsys, "ablate", "cifar10-version")
    assert "pretrain/atto: is not for fcmae ablate, but for fcmae pretrain" in error_line(
        run, capsys, "ablate", "pretrain/atto"
    )


def test_a_damaged_results_file_is_reported_with_its_line(
    fake: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(*fake, "seeds=[0]") == 0
    with Path("runs/results.jsonl").open("a") as file:
        file.write('{"stage": "pre')
    assert "runs/results.jsonl, line 7: " in error_of(capsys, *fake)


def test_figures_are_read_from_the_metrics_of_real_runs(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for split in ("train", "val"):
        save_arrays(
            tmp_path / split, pixels if split == "train" else 255 - pixels, np.arange(12) % 3, ("a", "b", "c")
        )
    (tmp_path / "grid.yaml").write_text(GRID)
    changes = [f"both.{key}" for key in (f"data.root={tmp_path}", "data.batch_size=6", "train.max_steps=2")]
    changes += [
        "both.model.variant=[[1,1,1,1],[4,8,12,16]]",
        "finetune.data.label_fraction=1",
        "both.log.every_steps=1",
    ]
    grid = load_config(ablation.Grid, tmp_path / "grid.yaml", changes)
    runner = ablation.Runner(
        tmp_path, ablation.Results(tmp_path / "results.jsonl"), launcher=["python"], jobs=1, say=print
    )
    scores: dict[str, Any] = {}
    for stage in ablation.stages_of(grid, "grid", "V2 + FCMAE", 0):
        _, _, module, *words = runner.command(stage)
        main = getattr(arguments, module.removeprefix("fcmae."))
        assert run_main(main, *words) == 0
        scores |= ablation.read_scores(stage.kind, tmp_path / stage.place)
    assert scores.keys() >= {"top1", "knn", "loss"}
    assert 0 <= scores["top1"] <= 1
    assert 0.3 < scores["loss"] < 3


@pytest.mark.parametrize("path", [path for path in GRIDS if path.name in PAGE], ids=lambda path: path.stem)
def test_the_documents_show_the_shipped_results(path: Path) -> None:
    grid = load_config(ablation.Grid, path)
    scores = ablation.scores_of(ablation.tasks_of(grid, path.stem), ablation.Results(RESULTS))
    assert all(scores.values())  # of each arm something
    assert ablation.table(grid, scores) in PAGE
