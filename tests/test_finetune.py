"""finetune.py from end to end, on photographs: exact, restartable, rightly counted, plain about bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, error_line, records, run_main
from PIL import Image
from processes import FSDP, run_story
from safetensors.torch import load_file, save_file

import fcmae.__main__
from fcmae import finetune, pretrain
from fcmae.data import save_arrays
from fcmae.training.trainer import untimed

TINY = "[[1,1,2,1],[8,16,24,32]]"
CLASSES = ("bird", "bridge", "clock", "wine")
RECIPES = [
    path
    for path in sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
    if "\ntask: classification\n" in path.read_text()
]
"""Those of other tasks are tried in test_tasks.py."""


def crops(name: str, number: int, seed: int) -> np.ndarray:
    """Random squares of a photograph at 32 px, uint8 (n, 32, 32, 3)."""
    rng = np.random.default_rng(seed)
    photo = Image.open(ROOT / "docs" / "photos" / f"{name}.jpg").convert("RGB")
    photo.thumbnail((320, 320))
    cut = []
    for side in rng.integers(60, 150, number).tolist():
        x, y = int(rng.integers(photo.width - side)), int(rng.integers(photo.height - side))
        cut.append(np.asarray(photo.crop((x, y, x + side, y + side)).resize((32, 32))))
    return np.stack(cut)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set of photographs: crops of four, 40 of each to train on, and 9, 10, 11, 7 to evaluate."""
    root = tmp_path_factory.mktemp("photos")
    for split, numbers in (("train", (40, 40, 40, 40)), ("val", (9, 10, 11, 7))):
        parts = [crops(name, n, seed=n) for name, n in zip(CLASSES, numbers, strict=True)]
        save_arrays(root / split, np.concatenate(parts), np.repeat(np.arange(4), numbers), CLASSES)
    return root


def write_folders(root: Path, classes: tuple[str, ...], number: int = 3) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(number):
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def arguments(data: Path, tmp_path: Path) -> list[str]:
    """A run of 12 steps of 16 images with everything on, recording every step, evaluating every five."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
output: {tmp_path / "run"}
model: {{variant: {TINY}, stem_stride: 1, drop_path: 0.2}}
data: {{name: arrays, root: {data}, image_size: 32, batch_size: 16, num_workers: 0, crop_scale: [0.3, 1],
        crop_pct: 1, mixup: 0.8, cutmix: 1, auto_augment: rand-m9-mstd0.5-inc1, erase_prob: 0.25}}
optim: {{base_lr: 0.05, warmup_epochs: 0.5, layer_decay: 0.9, weight_decay: 0.05, clip_grad: 5}}
train: {{max_steps: 12, ema_decay: 0.9}}
eval: {{every_epochs: 0.5}}
checkpoint: {{every_steps: 5}}
log: {{every_steps: 1}}
"""
    )
    return ["--config", str(config)]


def run(*arguments: str) -> int:
    """Run finetune.py in this process, as the script would; returns the exit code."""
    return run_main(finetune.main, *arguments)


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(folder) if "loss" in record}


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    return {record["step"]: record for record in records(folder) if "val_top1" in record}


def weights(folder: Path, name: str = "model", *, of: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / of / f"{name}.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    for name in ("model", "ema", "optimizer"):
        first, second = weights(a, name), weights(b, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_a_run_leaves_what_the_design_promises(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "from scratch" in out
    folder = tmp_path / "run"
    names = ["checkpoints", "config.yaml", "metrics.jsonl", "model", "tensorboard"]
    assert sorted(path.name for path in folder.iterdir()) == names
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"best", "last", "step-00000010", "step-00000012"} <= kept
    assert list(losses(folder)) == list(range(1, 13))
    assert list(evaluations(folder)) == [5, 10, 12]
    figures = {f"{kind}_{name}" for kind in ("val", "ema") for name in ("top1", "top5", "loss")}
    assert set(evaluations(folder)[12]) == {"step"} | figures
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert state["class_names"] == list(CLASSES)
    scores = {step: values["ema_top1"] for step, values in evaluations(folder).items()}
    best = min(step for step, value in scores.items() if value == max(scores.values()))
    assert state["best"] == {"step": best, "score": scores[best]}
    assert (folder / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    assert f"step {best}, top-1 {scores[best]:.2%}" in out
    assert f"model            {folder / 'model'} (step {best}, EMA)" in out
    assert f"top-1 of the EMA {scores[5]:.2%} -> {scores[12]:.2%}" in out
    assert f"\n  fcmae predict {folder} IMAGES\n" in out
    assert f"\n  fcmae finetune --evaluate {folder}\n" in out


def test_images_with_pixels_that_are_not_known_are_fine_tuned_on_and_evaluated(
    arguments: list[str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 4)):
        for i, name in enumerate("ab"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for j in range(number):
                image = rng.normal(1000 + 300 * i, 100, (40, 36, 5)).astype(np.float32)
                image[: rng.integers(40), :20] = np.nan
                image[..., 3][rng.random((40, 36)) < 0.3] = -9999
                np.save(tmp_path / "images" / split / name / f"{j}.npy", image)
    options = ["data.name=folder", f"data.root={tmp_path / 'images'}", "model.in_chans=5", "data.nodata=-9999"]
    options += [
        f"data.mean={[1150.0] * 5}",
        f"data.std={[180.0] * 5}",
        "data.clip=[500,[2000,2000,2000,2000,1500]]",
    ]
    assert run(*arguments, *options, "data.auto_augment=null", "train.max_steps=30", "optim.base_lr=0.2") == 0
    assert np.isfinite([*losses(tmp_path / "run").values()]).all()
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    assert max(record["val_top1"] for record in evaluations(tmp_path / "run").values()) == 1.0


def test_timm_loads_the_best_ema_classifier_with_its_class_names(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, "data.mean=[0.4,0.5,0.6]", "data.crop_pct=0.9") == 0
    folder = tmp_path / "run"
    model: Any = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert tuple(cfg["label_names"]) == CLASSES
    assert tuple(cfg["mean"]) == (0.4, 0.5, 0.6)
    assert cfg["crop_pct"] == 0.9
    ema = weights(folder, "ema", of="best")
    assert torch.equal(model.get_classifier().weight, ema["head.weight"])
    assert not torch.equal(ema["head.weight"], weights(folder, of="best")["head.weight"])


def test_without_validation_the_last_ema_is_the_model(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "data.val_split=null", "train.max_steps=4") == 0
    assert "(step 4, EMA)" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints" / "best").exists()
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert torch.equal(model.get_classifier().weight, weights(tmp_path / "run", "ema")["head.weight"])


def test_what_is_learnt_without_labels_helps_to_learn_with_them(
    arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "pretrain.yaml"
    config.write_text(
        f"""
output: {tmp_path / "pretrained"}
model: {{variant: {TINY}, stem_stride: 1, decoder_dim: 16}}
data: {{name: arrays, root: {data}, image_size: 32, batch_size: 16, num_workers: 0}}
optim: {{base_lr: 0.03, warmup_epochs: 1}}
train: {{max_steps: 40}}
visualize: {{num_images: 0}}
"""
    )
    assert run_main(pretrain.main, "--config", str(config)) == 0
    capsys.readouterr()
    plain = ["data.mixup=0", "data.cutmix=0", "data.auto_augment=null", "data.erase_prob=0", "model.drop_path=0"]
    start = [f"init_from={tmp_path / 'pretrained'}", *plain, "train.max_steps=60", "train.ema_decay=null"]
    assert run(*arguments, *start, "log.every_steps=20") == 0
    out = capsys.readouterr().out
    assert "FCMAE run" in out
    assert "a new classifier of 4 classes" in out
    history = list(losses(tmp_path / "run").values())
    assert history[-1] < 0.8 * history[0]
    assert evaluations(tmp_path / "run")[60]["val_top1"] > 0.6


def test_the_encoder_starts_as_it_was_pretrained_and_the_classifier_small(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 0
    still = [*arguments, "optim.base_lr=0", "optim.min_lr=0", "train.max_steps=1", "eval.every_epochs=100"]
    kept, new = tmp_path / "kept", tmp_path / "new"
    assert run(*still, f"output={kept}", f"init_from={tmp_path / 'run'}") == 0
    assert "its classifier of 4 classes" in capsys.readouterr().out
    before, after = weights(tmp_path / "run", "ema", of="best"), weights(kept)
    assert all(torch.equal(before[name], after[name]) for name in before)

    encoder = {name: value for name, value in before.items() if not name.startswith(("head.", "norm."))}
    save_file(encoder, tmp_path / "encoder.safetensors")
    assert run(*still, f"output={new}", f"init_from={tmp_path / 'encoder.safetensors'}") == 0
    after = weights(new)
    assert all(torch.equal(encoder[name], after[name]) for name in encoder)
    assert 0 < after["head.weight"].std() < 0.0001
    assert not after["head.bias"].any()


def test_the_same_command_gives_the_same_run_to_the_bit(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, f"output={tmp_path / 'a'}") == 0
    assert run(*arguments, f"output={tmp_path / 'b'}", "data.num_workers=2", "eval.every_epochs=100") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_a_frozen_encoder_stays_as_it_is_while_the_classifier_learns(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, "train.max_steps=3") == 0
    start = [*arguments, f"init_from={tmp_path / 'run'}", f"output={tmp_path / 'probe'}"]
    assert run(*start, "train.freeze_encoder=true", "train.gradient_checkpointing=true") == 0
    before, after = weights(tmp_path / "run", "ema"), weights(tmp_path / "probe")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    moments = {name.removeprefix("state.").rpartition(".")[0] for name in weights(tmp_path / "probe", "optimizer")}
    assert moments == changed
    assert all(
        torch.equal(before[name], value)
        for name, value in weights(tmp_path / "probe", "ema").items()
        if name not in changed
    )


def plain_counts(run: Path, data: Path) -> dict[str, Any]:
    """Top-1, top-5 and loss of RUN/model by timm, one image at a time."""
    model = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images, labels = np.load(data / "val" / "images.npy"), np.load(data / "val" / "labels.npy")
    hits, total, confusion = 0, 0.0, np.zeros((4, 4), int)
    for image, label in zip(images, labels.tolist(), strict=True):
        pixels = (torch.from_numpy(image) / 255 - mean) / std
        with torch.no_grad():
            logits = model(pixels.permute(2, 0, 1)[None])[0]
        hits += int(logits.argmax()) == label
        total += float(F.cross_entropy(logits, torch.tensor(label)))
        confusion[label, int(logits.argmax())] += 1
    return {"top1": hits / len(labels), "loss": total / len(labels), "confusion": confusion}


def test_evaluate_counts_what_a_plain_loop_counts(
    arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*arguments) == 0
    capsys.readouterr()
    assert run("--evaluate", str(folder)) == 0
    out = capsys.readouterr().out
    expected = plain_counts(folder, data)
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["images"] == 37
    assert found["top1"] == pytest.approx(expected["top1"])
    assert found["top5"] == 1.0
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["classes"]["names"] == list(CLASSES)
    assert found["classes"]["images"] == [9, 10, 11, 7]
    assert found["classes"]["recall"] == pytest.approx(expected["confusion"].diagonal() / [9, 10, 11, 7])
    guesses = np.maximum(expected["confusion"].sum(0), 1)
    assert found["classes"]["precision"] == pytest.approx(expected["confusion"].diagonal() / guesses)
    best = json.loads((folder / "checkpoints" / "best" / "state.json").read_text())["step"]
    assert found["top1"] == evaluations(folder)[best]["ema_top1"]
    assert f"step {best}, EMA" in out
    assert str(folder / "checkpoints" / "best" / "ema.safetensors") in out
    assert f"top-1            {expected['top1']:.2%}" in out
    assert all(f"\n{name} " in out for name in CLASSES)
    assert Image.open(folder / "confusion.png").size[0] > 4 * 36
    assert found["confusion"] == expected["confusion"].tolist()
    assert sum(found["calibration"]["images"]) == 37
    wrong = 37 - int(expected["confusion"].trace())
    assert 0 < len(found["mistakes"]) == min(wrong, 24)
    truth = np.load(data / "val" / "labels.npy")
    assert [mistake["label"] for mistake in found["mistakes"]] == [
        CLASSES[truth[mistake["index"]]] for mistake in found["mistakes"]
    ]
    assert Image.open(folder / "mistakes.png").size[0] > 4 * 128

    last = str(folder / "checkpoints" / "last")
    for others, step, kind in (
        ([str(folder), "--raw"], best, "val"),
        ([str(folder), "--last"], 12, "ema"),
        ([last], 12, "ema"),
        ([last, "eval.ema=false"], 12, "val"),
        ([last, "eval.ema=false", "--ema"], 12, "ema"),
    ):
        assert run("--evaluate", *others) == 0
        assert f"step {step}, {'EMA' if kind == 'ema' else 'raw weights'}" in capsys.readouterr().out
        found = json.loads((folder / "evaluation.json").read_text())
        assert found["ema"] == (kind == "ema")
        assert found["loss"] == pytest.approx(evaluations(folder)[step][f"{kind}_loss"], rel=1e-6)

    elsewhere = [*arguments, f"output={tmp_path / 'elsewhere'}"]
    assert run("--evaluate", str(folder / "model" / "model.safetensors"), *elsewhere) == 0
    found = json.loads((tmp_path / "elsewhere" / "evaluation.json").read_text())
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_every_command_takes_the_same_model_of_a_run(
    arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*arguments) == 0
    photo = tmp_path / "photo.png"
    Image.fromarray(np.load(data / "val" / "images.npy")[0]).save(photo)

    def predicted(source: Path, *options: str) -> tuple[dict[str, float], str]:
        capsys.readouterr()
        assert fcmae.__main__.run(["predict", str(source), str(photo), "--json", *options]) == 0
        printed = capsys.readouterr()
        classes = json.loads(printed.out)[0]["classes"]
        return {entry["name"]: entry["probability"] for entry in classes}, printed.err

    best = json.loads((folder / "checkpoints" / "best" / "state.json").read_text())["step"]
    expected, said = predicted(folder)
    assert f"step {best}, EMA" in said
    assert run("--evaluate", str(folder)) == 0
    assert f"step {best}, EMA" in capsys.readouterr().out
    command = ["export", str(folder), "--to", "plain", "--output", str(tmp_path / "plain")]
    assert fcmae.__main__.run(command) == 0
    assert f"step {best}, EMA" in capsys.readouterr().err
    for same in (folder / "model", tmp_path / "plain", folder / "checkpoints" / "best" / "ema.safetensors"):
        assert predicted(same)[0] == pytest.approx(expected, abs=1e-6), same
    for options, description in (
        (["--last"], "step 12, EMA"),
        (["--raw"], f"step {best}, raw weights"),
        (["--last", "--raw"], "step 12, raw weights"),
        (["--ema"], f"step {best}, EMA"),
    ):
        found, said = predicted(folder, *options)
        assert description in said
        assert (found == pytest.approx(expected, abs=1e-6)) == (description == f"step {best}, EMA")


def test_images_that_do_not_decode_are_left_out_of_the_count_and_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        write_folders(tmp_path / "images" / split, ("a", "b"), 5)
    broken = tmp_path / "images" / "val" / "b" / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    folders = ["data.name=folder", f"data.root={tmp_path / 'images'}", "train.max_steps=2", "data.batch_size=4"]
    assert run(*arguments, *folders) == 0
    assert f"not counted: 1 images that do not decode, the first {broken}" in capsys.readouterr().out
    assert run("--evaluate", str(tmp_path / "run")) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["classes"]["images"] == [5, 4]


@pytest.mark.parametrize("how", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_count_and_train_as_one(
    how: dict[str, str], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in how.items():
        monkeypatch.setenv(name, value)
    still = ["data.mixup=0", "data.cutmix=0", "model.drop_path=0", "train.max_steps=6"]
    assert run(*arguments, *still, f"output={tmp_path / 'one'}") == 0
    done = run_story("finetune", *arguments, *still, f"output={tmp_path / 'two'}", "data.batch_size=8", number=2)
    assert done.codes == [0, 0], done.errors
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, abs=1e-4)
    first, second = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    assert list(first) == list(second) == [6]
    for step, values in first.items():
        assert values == pytest.approx(second[step], abs=1e-4)
        assert round(values["val_top1"] * 37) == pytest.approx(values["val_top1"] * 37, abs=1e-9)


def test_a_compiled_run_is_traced_whole_and_gives_the_losses_of_an_eager_one(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*arguments, f"output={tmp_path / 'eager'}") == 0
    traced: list[dict[str, Any]] = []
    compile_module = torch.nn.Module.compile

    def trace(self: torch.nn.Module, **kwargs: Any) -> None:
        traced.append(kwargs)
        compile_module(self, backend="aot_eager", fullgraph=True)  # without minutes of code generation

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    assert run(*arguments, f"output={tmp_path / 'compiled'}", "train.compile=true") == 0
    assert traced == [{"fullgraph": True, "options": untimed()}]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    for name in ("model", "ema"):
        assert weights(tmp_path / "compiled", name).keys() == weights(tmp_path / "eager", name).keys()


@pytest.mark.parametrize("clip_grad", [0.1, "null"])
def test_bf16_trains_float32_weights_with_and_without_clipping(
    arguments: list[str], tmp_path: Path, clip_grad: float | str
) -> None:
    settings = [*arguments, "train.max_steps=3", f"optim.clip_grad={clip_grad}"]
    assert run(*settings, f"output={tmp_path / 'float32'}") == 0
    assert run(*settings, f"output={tmp_path / 'bf16'}", "train.precision=bf16") == 0
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "float32"), rel=2e-2)
    for name in ("model", "ema"):
        assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16", name).values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_runs_dry_and_writes_nothing(
    path: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["model.stem_stride=1", f"model.variant={TINY}", "data.name=arrays", "data.image_size=32"]
    small += [
        f"data.root={data}",
        "data.batch_size=4",
        "data.num_workers=0",
        "optim.images_per_update=null",
        "optim.accumulate=1",
        "init_from=null",
    ]
    assert run("--config", str(path), *small, f"output={tmp_path / 'run'}", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "classes        4" in out
    assert "validation     37 of 37 images tried, 0 unreadable" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_images_of_any_channel_count_are_fine_tuned(arguments: list[str], tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images = rng.integers(0, 256, (12, 32, 32, channels), dtype=np.uint8)
        save_arrays(tmp_path / "arrays" / split, images, np.arange(12) % 3)
    policy = "rand-m9-mstd0.5-inc1" if channels == 1 else "null"
    values = [f"data.mean={[0.5] * channels}", f"data.std={[0.2] * channels}", f"model.in_chans={channels}"]
    values += [f"data.root={tmp_path / 'arrays'}", f"data.auto_augment={policy}", "train.max_steps=2"]
    assert run(*arguments, *values) == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert state["class_names"] == ["0", "1", "2"]


# Bad input


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error of a run that ends with exit code 2."""
    return error_line(finetune.main, capsys, *arguments)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.root=/nowhere/at/all", ["data.root=/nowhere/at/all"]),
        ("data.image_size=44", ["data.image_size", "40 and 48"]),
        ("data.auto_augment=rand-x9", ["data.auto_augment", "rand-m9-mstd0.5-inc1"]),
        ("data.auto_augment=strong", ["data.auto_augment", "rand-m9-mstd0.5-inc1"]),
        ("model.num_classes=3", ["model.num_classes=3", "4 classes", "bird, bridge, clock, wine"]),
        ("init_from=/nowhere/at/all", ["/nowhere/at/all"]),
        (
            "data.val_split=holdout",
            ["data.root=", "holds no holdout/images.npy", "(found: train, val)", "data.val_split=null"],
        ),
        ("optim.layerdecay=0.9", ["did you mean 'optim.layer_decay'?"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, parts: list[str]
) -> None:
    line = failure(capsys, *arguments, override)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


def test_images_without_labels_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folders(tmp_path / "flat", (".",))
    line = failure(capsys, *arguments, "data.name=folder", f"data.root={folder}", "data.val_split=null")
    assert "no labels" in line
    assert "sub-folder" in line


def test_a_validation_set_of_other_classes_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "images"
    write_folders(root / "train", ("cat", "dog", "fox"))
    settings = [*arguments, "data.name=folder", f"data.root={root}", "data.batch_size=4"]
    line = failure(capsys, *settings)
    assert f"data.root={root}: no split 'val' in it (found: train)" in line
    assert "data.val_split=null" in line
    line = failure(capsys, *settings, f"data.val_root={root / 'train'}")
    assert f"data.val_root={root / 'train'}, data.val_split=val: training's own images" in line
    assert "data.val_split=null" in line
    write_folders(root / "val", ("cat", "fox"))
    line = failure(capsys, *settings)
    assert "no images of 1 of the 3 classes of training: dog" in line
    assert str(root) in line
    write_folders(root / "val", ("dog", "owl"))
    assert "class 'owl' is not among the 3 classes of training" in failure(capsys, *settings)
    write_folders(root / "other", ("cat", "dog", "fox"))
    assert run(*settings, "data.val_split=other", "train.max_steps=1") == 0


def test_labels_beyond_those_of_training_are_refused(
    arguments: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.zeros((3, 32, 32, 3), np.uint8)
    save_arrays(tmp_path / "more" / "val", images, [0, 1, 4])
    assert "has label 4, but there are 4 classes" in failure(
        capsys, *arguments, f"data.val_root={tmp_path / 'more'}"
    )


def test_weights_of_another_network_are_refused_with_the_key_to_change(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "train.max_steps=1") == 0
    start = [*arguments, f"output={tmp_path / 'next'}", f"init_from={tmp_path / 'run'}"]
    line = failure(capsys, *start, "model.variant=atto")
    assert "variant depths [1, 1, 2, 1], dims [8, 16, 24, 32]" in line
    assert "set model.variant" in line
    assert "set model.stem_stride" in failure(capsys, *start, "model.stem_stride=2")

    part = {name: value for name, value in weights(tmp_path / "run").items() if "pwconv1" not in name}
    save_file(part | {"stages.9.bias": torch.zeros(1)}, tmp_path / "part.safetensors")
    line = failure(capsys, *arguments, f"output={tmp_path / 'next'}", f"init_from={tmp_path / 'part.safetensors'}")
    assert "stages" in line
    assert not (tmp_path / "next").exists()


def test_auto_is_taken_from_init_from_said_and_kept_for_the_resumed_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "train.max_steps=1", "data.mean=[0.4,0.5,0.6]") == 0
    keys = ["model.variant", "model.in_chans", "model.stem_stride", "data.image_size", "data.mean"]
    auto = [*arguments, *(f"{key}=auto" for key in keys), "data.std=[0.3,0.3,0.3]", f"output={tmp_path / 'next'}"]
    assert "set model.variant" in failure(capsys, *auto)
    capsys.readouterr()
    assert run(*auto, f"init_from={tmp_path / 'run'}", "train.max_steps=1") == 0
    out = capsys.readouterr().out
    assert "auto             model.variant=[[1, 1, 2, 1], [8, 16, 24, 32]], model.version=2" in out
    assert "model.in_chans=3, model.stem_stride=1" in out
    assert f"data.image_size=[32, 32], data.mean=[0.4, 0.5, 0.6] (from {tmp_path / 'run'})" in out
    config = yaml.safe_load((tmp_path / "next" / "config.yaml").read_text())
    assert (config["model"]["stem_stride"], config["data"]["mean"]) == (1, [0.4, 0.5, 0.6])
    assert config["data"]["std"] == [0.3, 0.3, 0.3]
    state = json.loads((tmp_path / "next" / "checkpoints" / "last" / "state.json").read_text())
    assert state["config"] == config

    assert run(*auto, "resume=auto", "train.max_steps=2") == 0
    assert f"(from {tmp_path / 'next'})" in capsys.readouterr().out
    assert list(losses(tmp_path / "next")) == [1, 2]
    assert run("--evaluate", str(tmp_path / "next")) == 0
    assert run("--evaluate", str(tmp_path / "run" / "model"), *auto, f"output={tmp_path / 'other'}") == 0
    assert run(*auto, "--print-config") == 0
    assert "mean: auto" in capsys.readouterr().out


def test_grn_can_be_dropped_and_added_at_fine_tuning(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_grn, without = tmp_path / "run", tmp_path / "without"
    start = (*arguments, "train.max_steps=1", "train.ema_decay=null", "optim.base_lr=0", "optim.min_lr=0")
    assert run(*start) == 0
    capsys.readouterr()
    assert run(*start, f"output={without}", f"init_from={with_grn}", "model.response=none") == 0
    assert "none in place of grn" in capsys.readouterr().out
    assert run(*start, f"output={tmp_path / 'again'}", f"init_from={without}", "model.response=grn") == 0
    assert "grn in place of none" in capsys.readouterr().out
    first, dropped, again = weights(with_grn), weights(without), weights(tmp_path / "again")
    assert set(first) - set(dropped) == {name for name in first if ".grn." in name}
    assert first.keys() == again.keys()
    assert all(torch.equal(dropped[name], first[name]) for name in dropped)
    assert all(torch.equal(again[name], first[name]) for name in dropped)
    assert not any(again[name].any() for name in again if ".grn." in name)


def test_what_has_no_classifier_cannot_be_evaluated(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "train.max_steps=1", "train.ema_decay=null") == 0
    encoder = {name: v for name, v in weights(tmp_path / "run").items() if not name.startswith(("head.", "norm."))}
    save_file(encoder, tmp_path / "encoder.safetensors")
    line = failure(capsys, "--evaluate", str(tmp_path / "encoder.safetensors"), *arguments)
    assert "without a classifier" in line
    assert "no EMA weights" in failure(
        capsys, "--evaluate", str(tmp_path / "run"), "train.ema_decay=0.9", "eval.ema=true"
    )
    assert "--config FILE" in failure(capsys, "--evaluate", str(tmp_path / "nowhere"))
    assert "nothing to evaluate" in failure(capsys, "--evaluate", str(tmp_path / "run"), "data.val_split=null")
    other = [*arguments, f"data.root={tmp_path / 'other'}"]
    save_arrays(tmp_path / "other" / "val", np.zeros((6, 32, 32, 3), np.uint8), np.arange(6))
    model = str(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    assert "4 classes" in failure(capsys, "--evaluate", model, *other)
