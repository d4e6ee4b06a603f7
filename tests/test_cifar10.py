"""benchmarks/cifar10.py: its data, the runs that it compares, and how it takes up what was stopped."""

import importlib
import itertools
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fcmae.config import FinetuneConfig, PretrainConfig, load_config
from fcmae.data import open_source
from fcmae.training.schedule import Plan

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    return importlib.import_module("cifar10")


def parse(cifar10: Any, *arguments: str) -> Namespace:
    return cifar10.parse_arguments(list(arguments))


def test_the_package_becomes_labelled_arrays(cifar10: Any, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    labels = np.arange(60) % 10
    strips = [*(f"data_batch_{n}.png" for n in range(1, 6)), "test_batch.png"]
    for i, strip in enumerate(strips):
        Image.fromarray(images[10 * i : 10 * i + 10].reshape(10, 1024, 3)).save(tmp_path / strip)
    (tmp_path / "train_lables.json").write_text(json.dumps(labels[:50].tolist()))
    (tmp_path / "test_lables.json").write_text(json.dumps(labels[50:].tolist()))
    cifar10.prepare(tmp_path, tmp_path / "arrays")
    for split, rows in {"train": slice(0, 50), "val": slice(50, 60)}.items():
        source = open_source("arrays", str(tmp_path / "arrays"), split, 3)
        assert source.labels is not None
        assert source.labels.tolist() == labels[rows].tolist()
        assert source.class_names == cifar10.CLASS_NAMES
        assert source.load(3).permute(1, 2, 0).numpy().tolist() == images[rows][3].tolist()


def configs(cifar10: Any, args: Namespace) -> dict[tuple[float, int, str], FinetuneConfig]:
    """The configuration of every fine-tuning, as finetune.py reads it."""
    return {
        (fraction, seed, start): load_config(FinetuneConfig, command[3], command[4:])
        for fraction in cifar10.FRACTIONS
        for seed in cifar10.SEEDS
        for start in cifar10.STARTS
        for _, command in [cifar10.finetuning(args, fraction, seed, start)]
    }


def test_both_starts_differ_in_nothing_but_weights_rates_and_mixing(cifar10: Any) -> None:
    args = parse(cifar10, "run")
    _, command = cifar10.pretraining(args)
    pretraining = load_config(PretrainConfig, command[3], command[4:])
    both = configs(cifar10, args)
    assert len({config.output for config in both.values()}) == len(both) == 18
    for fraction in cifar10.FRACTIONS:
        for seed in cifar10.SEEDS:
            ours, scratch = (both[fraction, seed, start] for start in ("FCMAE", "scratch"))
            assert ours.init_from == pretraining.output
            assert scratch.init_from is None
            own = {"output": True, "init_from": True, "optim": {"base_lr"}, "data": {"mixup", "cutmix"}}
            assert ours.model_dump(exclude=own) == scratch.model_dump(exclude=own)
            assert (ours.train.seed, ours.data.label_fraction) == (seed, fraction)
            for key in ("variant", "in_chans", "stem_stride"):
                assert getattr(ours.model, key) == getattr(pretraining.model, key)


def test_every_fine_tuning_sees_as_many_images_and_is_scored_at_its_end(cifar10: Any) -> None:
    for (fraction, _, _), config in configs(cifar10, parse(cifar10, "run")).items():
        plan = Plan.of(config, round(fraction * cifar10.TRAIN_IMAGES), 1)
        assert plan.total_steps == -(-cifar10.FINETUNING_IMAGES // config.data.batch_size)
        assert plan.warmup_steps == round(plan.total_steps / 10)
        assert plan.steps_in(config.eval.every_epochs) == plan.total_steps


def fake_launch(launched: list[str], fail_after: int) -> Any:
    def launch(command: Sequence[str], run: Path, threads: int) -> None:
        if len(launched) == fail_after:
            raise SystemExit("error: failed")
        launched.append(" ".join(command))
        run.mkdir(parents=True)
        records = [{"loss": loss, "seen_images": 64} for loss in (0.6, 0.4)]
        if command[1] == "finetune.py":
            records.append({"val_top1": 0.5 if "fcmae" in run.name else 0.25, "val_loss": 1.5})
        (run / "metrics.jsonl").write_text("".join(json.dumps({"step": 1} | record) + "\n" for record in records))

    return launch


def test_what_has_finished_is_not_run_again(
    cifar10: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    args = parse(cifar10, "run", f"--json={results}", f"--runs={tmp_path / 'runs'}", "--cores=1")
    launched: list[str] = []
    monkeypatch.setattr(cifar10, "launch", fake_launch(launched, fail_after=5))
    with pytest.raises(SystemExit):
        cifar10.run_all(args)
    assert len(results.read_text().splitlines()) == len(launched) == 5
    monkeypatch.setattr(cifar10, "launch", fake_launch(launched, fail_after=100))
    cifar10.run_all(args)
    assert len(set(launched)) == len(launched) == 19
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == 19
    assert lines[0]["loss"] == pytest.approx(0.5)
    table = cifar10.table(results)
    assert "| 500 | 50.0 (50.0 to 50.0) | 25.0 (25.0 to 25.0) | +25.0 (+25.0 to +25.0) |" in table


def test_a_failed_run_names_its_log(cifar10: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"run\.log"):
        cifar10.launch(["python", "finetune.py", "--config", "missing.yaml"], tmp_path / "run", 1)
    assert "missing.yaml" in (tmp_path / "run.log").read_text()


def test_no_results_are_an_error(cifar10: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results"):
        cifar10.table(tmp_path / "none.json")


def test_results_are_drawn(cifar10: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = tmp_path / "results.json"
    rows = [
        {"start": start, "labels": labels, "seed": seed, "val_top1": (seed + labels % 7) / 10}
        for start in cifar10.STARTS
        for labels in (500, 5000)
        for seed in (0, 1)
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cifar10.plot(results, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 10
    assert (tmp_path / "plot.png").stat().st_size < 200_000


def test_the_shipped_results_are_of_the_shipped_commands_and_are_what_the_documents_show(cifar10: Any) -> None:
    args = parse(cifar10, "run")
    runs = [
        cifar10.finetuning(args, *key)
        for key in itertools.product(cifar10.FRACTIONS, cifar10.SEEDS, cifar10.STARTS)
    ]
    commands = {" ".join(command) for _, command in [cifar10.pretraining(args), *runs]}
    results = ROOT / "benchmarks/results/cifar10-cpu.json"
    assert {json.loads(line)["command"] for line in results.read_text().splitlines()} == commands
    assert cifar10.table(results) in (ROOT / "docs/results.md").read_text()
