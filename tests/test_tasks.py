"""Fine-tuning for several classes or numbers for each image: learnt, resumed, exported, plain about bad input."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import error_line, records, run_main
from PIL import Image, ImageDraw
from processes import run_story
from safetensors.torch import load_file

import fcmae.__main__
from fcmae import finetune, load_encoder
from fcmae.config import FinetuneConfig, ImageConfig, parse_config
from fcmae.data import save_arrays
from fcmae.load import load_weights
from fcmae.tasks.multilabel import MultiHotMixup, MultiLabel, MultiLabelMetric
from fcmae.tasks.regression import Regression, RegressionMetric

SHAPES = ("disc", "frame", "stripe")
TARGETS = ("brightness", "left")
SECTIONS = """
model: {variant: [[1,1,1,1],[8,16,24,32]], stem_stride: 1, head_init_scale: 0.1}
data: {image_size: 32, batch_size: 16, num_workers: 0, crop_scale: [1, 1], crop_pct: 1, auto_augment: null,
       hflip: 0, erase_prob: 0}
optim: {base_lr: 0.1, warmup_epochs: 1, clip_grad: 5}
train: {epochs: 12, label_smoothing: 0}
eval: {every_epochs: 6}
log: {every_steps: 1}
"""


def draw(shapes: np.ndarray, seed: int) -> np.ndarray:
    """Draw some of `SHAPES`, 0 or 1 (3,), anywhere on noise: uint8 (32, 32, 3)."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 60, (32, 32, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    x, y = rng.integers(2, 18, 2).tolist()
    if shapes[0]:
        pen.ellipse((x, y, x + 10, y + 10), fill=(230, 40, 40))
    if shapes[1]:
        pen.rectangle((y, x, y + 11, x + 11), outline=(40, 230, 40), width=2)
    if shapes[2]:
        pen.line((0, x, 31, y + 10), fill=(60, 60, 250), width=3)
    return np.asarray(image)


def shapes(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.random.default_rng(seed).integers(0, 2, (number, 3)).astype(np.int8)
    return np.stack([draw(row, seed * 1000 + i) for i, row in enumerate(labels)]), labels


def grays(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise of a brightness, 1000 to 2000, whose left half is brighter by so much, 0 to 1."""
    rng = np.random.default_rng(seed)
    brightness, left = rng.uniform(0, 1, (2, number)).astype(np.float32)
    images = 60 + 100 * brightness[:, None, None, None] + rng.normal(0, 20, (number, 32, 32, 3))
    images[:, :, :16] += 60 * left[:, None, None, None]
    labels = np.stack([1000 + 1000 * brightness, left], 1).astype(np.float32)
    return images.clip(0, 255).astype(np.uint8), labels


MAKE: dict[str, tuple[Callable[[int, int], tuple[np.ndarray, np.ndarray]], tuple[str, ...]]] = {
    "multilabel": (shapes, SHAPES),
    "regression": (grays, TARGETS),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrays for each task: 160 images to train on, 48 to evaluate."""
    root = tmp_path_factory.mktemp("tasks")
    for task, (make, names) in MAKE.items():
        for split, number, seed in (("train", 160, 1), ("val", 48, 2)):
            save_arrays(root / task / split, *make(number, seed), names)
    return root


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"output: {tmp_path / 'run'}\n{SECTIONS}")
    return path


def arguments(task: str, config: Path, data: Path) -> list[str]:
    return ["--config", str(config), f"task={task}", "data.name=arrays", f"data.root={data / task}"]


def run(*arguments: str) -> int:
    return run_main(finetune.main, *arguments)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return error_line(finetune.main, capsys, *arguments)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str]]]:
    """The run folder of a task and the arguments of its run, which is made when it is first asked for."""
    done: dict[str, tuple[Path, list[str]]] = {}

    def train(task: str) -> tuple[Path, list[str]]:
        if task not in done:
            folder = tmp_path_factory.mktemp(task)
            (folder / "config.yaml").write_text(f"output: {folder / 'run'}\n{SECTIONS}")
            settings = [*arguments(task, folder / "config.yaml", data), "train.ema_decay=0.9"]
            assert run(*settings) == 0
            done[task] = folder / "run", settings
        return done[task]

    return train


Trained = Callable[[str], tuple[Path, list[str]]]


def evaluated(folder: Path) -> dict[str, float]:
    """The figures of the last evaluation of a run."""
    return next(record for record in reversed(records(folder)) if "val_loss" in record or "val_r2" in record)


def validation(data: Path, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images and labels of the validation set."""
    images, labels = (np.load(data / task / "val" / f"{name}.npy") for name in ("images", "labels"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2), torch.from_numpy(labels)


def plain_average_precision(scores: list[float], labels: list[int]) -> float:
    """Mean precision at the rank of each image of the class."""
    ranked = [label for _, label in sorted(zip(scores, labels, strict=True), reverse=True)]
    return float(np.mean([sum(ranked[: i + 1]) / (i + 1) for i, label in enumerate(ranked) if label]))


# Learning


@pytest.mark.parametrize(("task", "key", "chance"), [("multilabel", "map", 0.5), ("regression", "r2", 0.0)])
def test_a_network_learns_what_chance_or_the_mean_do_not_know(
    trained: Trained, task: str, key: str, chance: float
) -> None:
    folder, _ = trained(task)
    assert evaluated(folder)[f"val_{key}"] > chance + 0.3
    assert evaluated(folder)[f"ema_{key}"] > chance + 0.3


@pytest.mark.parametrize("task", MAKE)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(trained: Trained, task: str, tmp_path: Path) -> None:
    _, settings = trained(task)
    short = [*settings, "checkpoint.every_steps=7", "train.max_steps=20", f"output={tmp_path / 'run'}"]
    short += ["data.mixup=0.8", "data.cutmix=1"] if task == "multilabel" else ["train.loss=smooth_l1"]
    assert run(*short) == 0
    last = tmp_path / "run" / "checkpoints" / "step-00000020"
    expected = {file.name: file.read_bytes() for file in last.glob("*.safetensors")}
    shutil.rmtree(last)
    assert run(*short, "resume=auto") == 0
    assert {file.name: file.read_bytes() for file in last.glob("*.safetensors")} == expected
    assert len(expected) == 3


def test_the_model_of_a_regression_gives_targets_in_their_units_everywhere(
    trained: Trained, data: Path, tmp_path: Path
) -> None:
    folder, _ = trained("regression")
    images, labels = validation(data, "regression")
    network = load_encoder(folder).eval()
    with torch.no_grad():
        predicted = network(images)
    assert 1000 < float(predicted[:, 0].mean()) < 2000
    error = (predicted - labels).double()
    r2 = 1 - error.square().sum(0) / (labels - labels.mean(0)).double().square().sum(0)
    found = max((record for record in records(folder) if "ema_r2" in record), key=lambda record: record["ema_r2"])
    assert found["ema_r2"] == pytest.approx(float(r2.mean()), rel=1e-4)
    assert found["ema_mae"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    assert found["ema_rmse"] == pytest.approx(float(error.square().mean(0).sqrt().mean()), rel=1e-4)

    ema = load_file(folder / "checkpoints" / "best" / "ema.safetensors")
    state = json.loads((folder / "checkpoints" / "best" / "state.json").read_text())
    targets = np.load(data / "regression" / "train" / "labels.npy").astype(np.float64)
    assert state["target_mean"] == pytest.approx(targets.mean(0))
    assert state["target_std"] == pytest.approx(targets.std(0))
    trained_head, head = ema["head.weight"], network.state_dict()["head.weight"]
    assert torch.allclose(head, trained_head * torch.tensor(state["target_std"])[:, None])
    for same in (folder / "model", folder / "checkpoints" / "best" / "ema.safetensors"):
        with torch.no_grad():
            assert torch.allclose(load_encoder(same).eval()(images), predicted, rtol=1e-4), same
    model: Any = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(model(images), predicted, rtol=1e-4, atol=1e-3)
    assert tuple(model.pretrained_cfg["label_names"]) == TARGETS


def test_a_regression_that_starts_from_another_keeps_its_head_whatever_the_new_statistics(
    trained: Trained, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = trained("regression")
    still = [*settings, f"init_from={folder}", f"output={tmp_path / 'next'}", "train.max_steps=1"]
    still += ["optim.base_lr=0", "optim.min_lr=0", "data.label_fraction=0.2"]
    assert run(*still) == 0
    out = capsys.readouterr().out
    assert "its layer of 2 targets" in out
    assert "R2 of the EMA" in out
    images, _ = validation(data, "regression")
    with torch.no_grad():
        before, after = (load_encoder(path).eval()(images) for path in (folder, tmp_path / "next"))
    assert torch.allclose(before, after, rtol=1e-4)
    first, second = (
        json.loads((path / "checkpoints" / "last" / "state.json").read_text())["target_mean"]
        for path in (folder, tmp_path / "next")
    )
    assert first != second


# Scores


def test_scores_of_several_labels_are_those_of_a_plain_loop() -> None:
    logits, labels = torch.randn(40, 3), torch.randint(0, 2, (40, 3), dtype=torch.int8)
    labels[:, 2] = 0
    nothing = torch.full((2, 3), -1, dtype=torch.int8)
    metric = MultiLabelMetric(logits.device)
    for batch, target in zip(logits.split(7), labels.split(7), strict=True):
        metric.update(torch.cat([batch, torch.randn(2, 3)]), torch.cat([target, nothing]))
    found = metric.compute()
    expected = [plain_average_precision(logits[:, i].tolist(), labels[:, i].tolist()) for i in range(2)]
    assert found.num_images == 40
    assert found.columns["ap"][:2] == pytest.approx(expected)
    assert np.isnan(found.columns["ap"][2]), "which no image is of"
    assert found.figures["map"] == pytest.approx(np.mean(expected))
    assert found.figures["loss"] == pytest.approx(
        float(F.binary_cross_entropy_with_logits(logits, labels.float())), rel=1e-5
    )
    hits = [int(((logits[:, i] > 0) & (labels[:, i] > 0)).sum()) for i in range(2)]
    f1 = [2 * hits[i] / int((logits[:, i] > 0).sum() + labels[:, i].sum()) for i in range(2)]
    assert found.figures["f1"] == pytest.approx(np.mean(f1))
    table = found.tabulate(SHAPES)
    assert table["classes"]["ap"][2] is None
    assert list(table["classes"]) == ["names", "images", "ap", "recall", "precision", "f1"]
    assert found.report(SHAPES).splitlines()[-1].split()[:3] == ["stripe", "0", "-"]
    assert found.draw(SHAPES).shape[2] == 3


def test_scores_of_numbers_are_those_of_a_plain_loop() -> None:
    predicted, true = torch.randn(30, 2), torch.randn(30, 2)
    metric = RegressionMetric(predicted.device)
    for batch, target in zip(predicted.split(8), true.split(8), strict=True):
        metric.update(torch.cat([batch, torch.zeros(1, 2)]), torch.cat([target, torch.full((1, 2), torch.nan)]))
    found = metric.compute()
    errors = (predicted - true).double().numpy()
    assert found.num_images == 30
    assert found.columns["mae"] == pytest.approx(np.abs(errors).mean(0))
    assert found.columns["rmse"] == pytest.approx(np.sqrt((errors**2).mean(0)))
    assert found.columns["r2"] == pytest.approx(1 - (errors**2).sum(0) / (30 * true.double().numpy().var(0)))
    assert list(found.tabulate(TARGETS)["targets"]) == ["names", "mae", "rmse", "r2"]
    assert found.draw(TARGETS).dtype == np.uint8
    metric = RegressionMetric(predicted.device)
    metric.update(predicted[:1], true[:1])
    with pytest.raises(ValueError, match="at least two images"):
        metric.compute()


@pytest.mark.parametrize("task", MAKE)
def test_two_processes_evaluate_as_one(trained: Trained, task: str) -> None:
    folder, _ = trained(task)
    evaluate = ["--evaluate", str(folder), "data.batch_size=7"]  # of 48 images, so that their shares differ
    assert run(*evaluate) == 0
    one = json.loads((folder / "evaluation.json").read_text())
    done = run_story("finetune", *evaluate, number=2)
    assert done.codes == [0, 0], done.errors
    two = json.loads((folder / "evaluation.json").read_text())
    outputs = next(key for key in ("classes", "targets") if key in one)
    for first, second in ((one, two), (one[outputs], two[outputs])):
        assert first.keys() == second.keys()
        for key, value in first.items():
            if key not in (outputs, "names", "weights"):
                assert second[key] == pytest.approx(value, rel=1e-4), key
    assert two["images"] == 48


def test_mixed_images_have_mixed_labels(data: Path) -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 2, (4, 3)).float()
    np.random.seed(0)  # noqa: NPY002 (timm's Mixup draws from it)
    mixed, targets = MultiHotMixup(0.8, 0.0)(images.clone(), labels)
    share = ((mixed - images.flip(0)) / (images - images.flip(0))).mean()
    assert torch.allclose(targets, share * labels + (1 - share) * labels.flip(0), atol=1e-4)


def test_the_losses_are_those_of_torch(data: Path) -> None:
    values = {"output": "run", "model": {"variant": "atto"}, "data": {"root": "images"}}

    def loss_of(kind: Any, **train: Any) -> Any:
        task = "multilabel" if kind is MultiLabel else "regression"
        config = parse_config(FinetuneConfig, values | {"task": task, "train": train}, "test")
        assert isinstance(config, ImageConfig)
        return kind(config, ("a", "b")).loss()(lambda _: outputs, torch.zeros(3, 3, 8, 8), labels)

    outputs, labels = torch.randn(3, 2), torch.randint(0, 2, (3, 2), dtype=torch.int8)
    expected = F.binary_cross_entropy_with_logits(outputs, labels * 0.8 + 0.1)
    assert torch.equal(loss_of(MultiLabel, label_smoothing=0.2), expected)
    labels = torch.randn(3, 2)
    assert torch.equal(loss_of(Regression, label_smoothing=0), F.mse_loss(outputs, labels))
    smooth = loss_of(Regression, label_smoothing=0, loss="smooth_l1")
    assert torch.equal(smooth, F.smooth_l1_loss(outputs, labels))


# The model


def predicted(capsys: pytest.CaptureFixture[str], source: Path, image: Path, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert fcmae.__main__.run(["predict", str(source), str(image), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)[0]


def save_image(folder: Path, task: str, data: Path, index: int = 0) -> Path:
    path = folder / "image.png"
    Image.fromarray(np.load(data / task / "val" / "images.npy")[index]).save(path)
    return path


@pytest.mark.parametrize("task", MAKE)
def test_every_command_takes_the_model_of_a_run_and_says_the_same(
    trained: Trained, data: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained(task)
    image = save_image(tmp_path, task, data)
    expected = predicted(capsys, folder, image)
    with torch.no_grad():
        outputs = load_encoder(folder).eval()(validation(data, task)[0][:1])[0]
    if task == "regression":
        assert expected["values"] == pytest.approx(dict(zip(TARGETS, outputs.tolist(), strict=True)), rel=1e-4)
    else:
        by_name = dict(zip(SHAPES, outputs.sigmoid().tolist(), strict=True))
        assert {entry["name"] for entry in expected["classes"]} == {name for name, p in by_name.items() if p > 0.5}
        every = predicted(capsys, folder, image, "--threshold", "0")["classes"]
        assert {entry["name"]: entry["probability"] for entry in every} == pytest.approx(by_name, abs=1e-5)
    for to in ("plain", "transformers"):
        out = tmp_path / to
        assert fcmae.__main__.run(["export", str(folder), "--to", to, "--output", str(out)]) == 0
        again = load_weights(out).preprocessing
        assert (again.task, again.class_names) == (task, MAKE[task][1])
        found = predicted(capsys, out, image)
        for key in expected.keys() - {"image"}:
            assert json.dumps(found[key])[:20] == json.dumps(expected[key])[:20]
    described = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (described["task"], described["class_names"]) == (task, list(MAKE[task][1]))
    described = json.loads((folder / "model" / "config.json").read_text())
    assert described["task"] == task


@pytest.mark.parametrize("task", MAKE)
def test_a_program_gives_what_people_ask_for(
    trained: Trained, data: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, _ = trained(task)
    out = tmp_path / "onnx"
    assert (
        fcmae.__main__.run(["export", str(folder), "--to", "onnx", "--output", str(out), "--with-preprocessing"])
        == 0
    )
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    image = np.load(data / task / "val" / "images.npy")[:1]
    (found,) = session.run(None, {"images": image})
    answer = predicted(
        capsys, folder, save_image(tmp_path, task, data), *(["--threshold", "0"] if task != "regression" else [])
    )
    if task == "regression":
        assert dict(zip(TARGETS, found[0].tolist(), strict=True)) == pytest.approx(answer["values"], rel=1e-3)
    else:
        expected = {entry["name"]: entry["probability"] for entry in answer["classes"]}
        assert dict(zip(SHAPES, found[0].tolist(), strict=True)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("task", MAKE)
def test_an_evaluation_of_the_model_gives_the_figures_of_the_run(
    trained: Trained, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = trained(task)
    capsys.readouterr()
    assert run("--evaluate", str(folder)) == 0
    out = capsys.readouterr().out
    found = json.loads((folder / "evaluation.json").read_text())
    key = "map" if task == "multilabel" else "r2"
    best = max(record[f"ema_{key}"] for record in records(folder) if f"ema_{key}" in record)
    assert found[key] == pytest.approx(best, rel=1e-5)
    names, picture = MAKE[task][1], "average-precision.png" if task == "multilabel" else "predictions.png"
    assert found["targets" if task == "regression" else "classes"]["names"] == list(names)
    assert all(f"\n{name} " in out for name in names)
    assert str(folder / picture) in out
    assert Image.open(folder / picture).size[0] > 300
    elsewhere = [*settings, f"output={tmp_path / 'elsewhere'}"]
    assert run("--evaluate", str(folder / "model"), *elsewhere) == 0
    assert json.loads((tmp_path / "elsewhere" / "evaluation.json").read_text())[key] == pytest.approx(
        best, rel=1e-4
    )
    line = failure(capsys, "--evaluate", str(folder / "model"), *elsewhere, "task=classification", "--overwrite")
    assert f"was trained for task={task}, not task=classification" in line


# CSV files


def write_images(root: Path, task: str) -> Path:
    """Image files and a CSV file for both splits, by their paths below ROOT; a test's is called elsewhere."""
    make, names = MAKE[task]
    rows = []
    for split, number, seed in (("train", 24, 1), ("val", 8, 2)):
        (root / split / "deep").mkdir(parents=True)
        for i, (image, labels) in enumerate(zip(*make(number, seed), strict=True)):
            path = root / split / ("deep" if i % 2 else "") / f"{i}.png"
            Image.fromarray(image).save(path)
            rows.append([path.relative_to(root).as_posix(), *labels.tolist()])
    write_csv(root / "labels.csv", [["file", *names], *rows])
    return root / "labels.csv"


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("task", MAKE)
def test_a_csv_file_labels_the_images_of_all_splits_in_any_order(task: str, config: Path, tmp_path: Path) -> None:
    labels = write_images(tmp_path / "images", task)
    settings = ["--config", str(config), f"task={task}", f"data.root={tmp_path / 'images'}", "train.max_steps=3"]
    settings += ["data.batch_size=8", "optim.warmup_epochs=0", f"data.labels={labels}"]
    runs = {}
    assert run(*settings) == 0
    runs["whole"] = tmp_path / "run"
    header, *rows = read_csv(labels)
    write_csv(tmp_path / "turned.csv", [header, *reversed(rows)])
    for split in ("train", "val"):  # names without the split's folder, in a file for each
        own = [[row[0].removeprefix(f"{split}/"), *row[1:]] for row in rows if row[0].startswith(split)]
        write_csv(tmp_path / f"{split}.csv", [header, *own])
    others = {"turned": ("turned", "turned"), "apart": ("train", "val")}
    if task == "multilabel":
        named = [[row[0], "|".join(np.array(header[1:])[np.array(row[1:]) == "1"])] for row in rows]
        write_csv(tmp_path / "names.csv", [["file", "labels"], *named])
        others["names"] = "names", "names"
    for name, (train, val) in others.items():
        files = [f"data.labels={tmp_path / train}.csv", f"data.val_labels={tmp_path / val}.csv"]
        assert run(*settings, *files, f"output={tmp_path / name}") == 0
        runs[name] = tmp_path / name
    key = "val_map" if task == "multilabel" else "val_r2"
    found = {
        name: (evaluated(folder)[key], [r["loss"] for r in records(folder) if "loss" in r])
        for name, folder in runs.items()
    }
    assert all(values == found["whole"] for values in found.values())


Change = Callable[[list[list[str]]], object]


@pytest.mark.parametrize(
    ("task", "change", "parts"),
    [
        (
            "regression",
            lambda rows: rows[3].__setitem__(1, "much"),
            ["line 4: brightness is 'much'", "finite number"],
        ),
        ("regression", lambda rows: rows[3].__setitem__(2, "nan"), ["line 4: left is 'nan'"]),
        ("regression", lambda rows: rows[3].__setitem__(2, ""), ["line 4: left is ''"]),
        ("multilabel", lambda rows: rows[5].__setitem__(2, "2"), ["line 6: frame is '2'", "0 or 1"]),
        ("multilabel", lambda rows: rows[5].append("1"), ["line 6: 5 cells for 4 columns"]),
        ("multilabel", lambda rows: rows.append(rows[2]), ["lines 3 and 34 are both of train/deep/1.png"]),
        (
            "multilabel",
            lambda rows: rows[0].__setitem__(0, "image"),
            ["first line must be file,NAME", "image,disc"],
        ),
        ("multilabel", lambda rows: rows[0].__setitem__(2, "disc"), ["two columns are called 'disc'"]),
        ("regression", lambda rows: rows.__delitem__(slice(3, 5)), ["no row of 2 of the 24 images", "train/2.png"]),
        ("regression", lambda rows: rows.append(["no.png", "1", "2"]), ["1 rows", "no.png (line 34)", "not below"]),
        (
            "regression",
            lambda rows: rows[1].__setitem__(0, "0.png"),
            ["0.png is the end of", "write their folders"],
        ),
        ("regression", lambda rows: [row.__setitem__(1, "7") for row in rows[1:]], ["brightness is 7 for all 24"]),
        (
            "multilabel",
            lambda rows: [row.__setitem__(3, "0") for row in rows[1:]],
            ["no image is of 1 of", "stripe"],
        ),
        (
            "multilabel",
            lambda rows: [row.__setitem__(0, f"x{i}") for i, row in enumerate(rows[1:])],
            ["any of the 24"],
        ),
    ],
)
def test_a_bad_csv_file_is_one_line_and_leaves_nothing(
    task: str,
    change: Change,
    parts: list[str],
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = write_images(tmp_path / "images", task)
    if "0.png is the end of" in parts[0]:
        (tmp_path / "images" / "train" / "more").mkdir()
        shutil.copy(tmp_path / "images" / "train" / "0.png", tmp_path / "images" / "train" / "more")
    rows = read_csv(labels)
    change(rows)
    write_csv(labels, rows)
    settings = [
        "--config",
        str(config),
        f"task={task}",
        f"data.root={tmp_path / 'images'}",
        f"data.labels={labels}",
    ]
    line = failure(capsys, *settings)
    assert str(labels) in line or "data.root=" in line
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", MAKE)
def test_the_shipped_recipe_runs_dry_and_writes_nothing(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write_images(tmp_path / "images", task)
    small = [
        "model.stem_stride=1",
        "model.variant=[[1,1,1,1],[8,8,8,8]]",
        "data.image_size=32",
        "data.batch_size=4",
    ]
    small += [f"data.root={tmp_path / 'images'}", f"data.labels={labels}", "data.num_workers=0", "init_from=null"]
    assert run("--config", task, *small, f"output={tmp_path / 'run'}", "--dry-run") == 0
    out = capsys.readouterr().out
    assert ("classes        3" if task == "multilabel" else "targets        2") in out
    assert "validation     8 of 8 images tried, 0 unreadable" in out
    assert not (tmp_path / "run").exists()


# Other bad input


@pytest.mark.parametrize(
    ("task", "overrides", "parts"),
    [
        ("regression", ["data.mixup=0.8"], ["data.mixup=0.8 is for classes", "data.mixup=0"]),
        ("regression", ["train.label_smoothing=0.1"], ["train.label_smoothing=0"]),
        ("regression", ["train.loss=cross_entropy"], ["not for task=regression", "mse or smooth_l1"]),
        ("multilabel", ["train.loss=mse"], ["not for task=multilabel", "binary_cross_entropy"]),
        ("classification", ["data.labels=labels.csv", "data.name=folder"], ["data.labels is for image files of"]),
        ("multilabel", ["data.labels=labels.csv"], ["arrays have labels.npy"]),
        ("regression", ["model.num_classes=3"], ["model.num_classes=3", "2 columns", "brightness, left"]),
        ("everything", [], ["'multilabel', 'regression' or 'segmentation'"]),
    ],
)
def test_keys_that_are_another_tasks_are_refused(
    task: str, overrides: list[str], parts: list[str], config: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failure(capsys, *arguments(task, config, data), f"data.root={data / 'regression'}", *overrides)
    assert all(part in line for part in parts), line


def test_labels_of_another_task_are_refused_with_what_they_are(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(task: str, labels: str) -> str:
        return failure(capsys, *arguments(task, config, data), f"data.root={data / labels}")

    assert "labels.npy has float32 (160, 2), but classes are whole numbers (n,)" in line(
        "classification", "regression"
    )
    assert "labels.npy has int8 (160, 3), but task=regression takes floats" in line("regression", "multilabel")
    assert "labels.npy has float32 (160, 2), but task=multilabel takes 0 and 1" in line("multilabel", "regression")
    folder = write_images(tmp_path / "images", "regression").parent
    settings = ["--config", str(config), "task=regression", f"data.root={folder}"]
    assert "no labels for task=regression; name a CSV file" in failure(capsys, *settings)
    assert "labels=/nowhere.csv: No such file" in failure(capsys, *settings, "data.labels=/nowhere.csv")
    images, labels = grays(6, 0)
    labels[4, 1] = np.nan
    save_arrays(tmp_path / "nan" / "train", images, labels, TARGETS)
    found = failure(capsys, *arguments("regression", config, data), f"data.root={tmp_path / 'nan'}")
    assert "labels of 1 images are not finite, the first column 1 of image 4 (nan)" in found
    save_arrays(tmp_path / "two" / "train", images, np.arange(12).reshape(6, 2), ("a", "b"))
    found = failure(capsys, *arguments("multilabel", config, data), f"data.root={tmp_path / 'two'}")
    assert "numbers from 0 to 11" in found


def test_other_columns_in_the_validation_set_are_refused(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = grays(6, 0)
    save_arrays(tmp_path / "other" / "val", images, labels, ("brightness", "right"))
    settings = [*arguments("regression", config, data), f"data.val_root={tmp_path / 'other'}"]
    assert "1 columns differ: 'right' is not among those of training" in failure(capsys, *settings)
    save_arrays(tmp_path / "other" / "val", images, labels[:, :1])
    assert "1 columns of labels, but training has 2" in failure(capsys, *settings)


def test_a_run_of_another_task_is_not_resumed_nor_its_options_taken(
    trained: Trained, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = trained("regression")
    other = [
        *settings,
        "resume=auto",
        "task=multilabel",
        f"data.root={data / 'multilabel'}",
        "model.num_classes=null",
    ]
    assert "of task=regression, not task=multilabel" in failure(capsys, *other)
    image = save_image(tmp_path, "regression", data)

    def predict(*options: str) -> str:
        return error_line(
            lambda argv: fcmae.__main__.run(["predict", *argv]), capsys, str(folder), str(image), *options
        )

    assert "--top 3: is not for" in predict("--top", "3")
    assert "of task=regression" in predict("--threshold", "0.3")
