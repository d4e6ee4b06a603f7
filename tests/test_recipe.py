"""A configuration chosen for images and a machine: valid, sensible, the same again, and open to what is given."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, error_line, launch, records, run_main
from PIL import Image
from processes import run_story

from fcmae import pretrain, story
from fcmae.arguments import read_given
from fcmae.config import PretrainRecipe, override_config
from fcmae.data import PretrainDataset, RandomView, open_source, save_arrays
from fcmae.errors import UserError
from fcmae.patches import grid_shape
from fcmae.recipe import Images, Machine, assignments, choose, look_at, recommend, suitable_output
from fcmae.training.schedule import Plan

PHOTOS = ROOT / "docs" / "photos"
CPU = Machine("a CPU of 2 cores", False, 8 * 2**30, False, 2)
GPU = Machine("some GPU", True, 80 * 2**30, True, 16)
MACHINES = {
    "cpu": CPU,
    "one core": CPU._replace(cores=1),
    "small gpu": GPU._replace(memory=6 * 2**30, bf16=False),
    "gpu": GPU,
    "8 gpus": GPU._replace(processes=8),
}
SETS = [(13, 320), (500, 600), (20_000, 375), (1_281_167, 400), (50_000, 32), (1, 64), (100, 9)]
QUICK = ("model.variant=[[1,1,1,1],[8,8,16,16]]", "model.decoder_dim=16", "train.max_steps=2", "data.num_workers=0")


def images_of(number: int, side: int, channels: int = 3) -> Images:
    return Images(number, side, channels, (0.5,) * channels, (0.2,) * channels)


def chosen(images: Images, machine: Machine, *overrides: str) -> PretrainRecipe:
    """The configuration that comes of the choices, around the overrides."""
    choices = choose(images, machine, read_given(overrides))
    rest: list[tuple[str, Any]] = [("output", "run"), ("data.root", "images")]
    values = assignments([(key, value) for key, value, _ in choices] + rest)
    return override_config(PretrainRecipe, values, overrides, "a test")


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize(("number", "side"), SETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_choices_are_a_run_of_whole_patches_at_a_rate_that_recipes_have(
    number: int, side: int, channels: int, machine: Machine
) -> None:
    config = chosen(images_of(number, side, channels), machine)
    rows, columns = grid_shape(config.data.size, 8 * config.model.stem_stride)
    assert 9 <= rows * columns <= 144
    assert config.data.size[0] <= max(side, 8 * 3)
    plan = Plan.of(config, number, machine.processes)
    assert 8e-4 * 0.7 <= plan.peak_lr <= 2.4e-3 * 1.01
    assert 1_400 <= plan.total_steps <= 260_000
    assert plan.warmup_steps == pytest.approx(plan.total_steps / 20, abs=2, rel=0.01)
    assert plan.images_per_step <= 1024
    assert config.data.num_workers <= machine.cores
    assert config.train.precision == ("bf16" if machine.bf16 else "no")


def test_processes_share_an_update() -> None:
    one, eight = (
        Plan.of(chosen(images_of(20_000, 375), m), 20_000, m.processes) for m in (GPU, MACHINES["8 gpus"])
    )
    assert one.images_per_step == eight.images_per_step
    assert one.peak_lr == pytest.approx(eight.peak_lr)


def test_larger_networks_for_more_images_and_batches_that_fill_a_gpu() -> None:
    variants = [chosen(images_of(n, 400), GPU).model.variant for n in (13, 5_000, 50_000, 1_000_000)]
    assert variants == ["atto", "nano", "tiny", "base"]
    assert chosen(images_of(50_000, 32), GPU).model.variant == "atto"
    for overrides, batch, together in (((), "auto", 256), (("data.batch_size=100",), 100, 200)):
        config = chosen(images_of(50_000, 400), GPU, *overrides)
        assert (config.data.batch_size, config.optim.accumulate) == (batch, "auto")
        assert config.optim.images_per_update == together
    fixed = chosen(images_of(50_000, 400), GPU, "data.batch_size=100", "optim.accumulate=3")
    assert fixed.optim.images_per_update is None
    assert chosen(images_of(50_000, 400), CPU).data.batch_size == 16


def test_other_choices_follow_what_is_given() -> None:
    images = images_of(500, 600)
    assert chosen(images, CPU, "data.image_size=[40,72]").model.stem_stride == 1
    assert chosen(images, GPU, "data.image_size=224").model.stem_stride == 4
    assert chosen(images, GPU, "data.image_size=208").model.stem_stride == 2
    assert chosen(images, CPU, "model.stem_stride=4").data.image_size == 96
    usual, large = (chosen(images, CPU, *given) for given in ((), ("data.batch_size=256",)))
    assert large.optim.accumulate == 1
    peaks = [Plan.of(config, 500, 1).peak_lr for config in (usual, large)]
    assert peaks[0] < peaks[1] <= 2.4e-3 * 1.01
    short = Plan.of(chosen(images, CPU, "train.epochs=10"), 500, 1)
    assert short.total_steps == pytest.approx(10 * 500 / 16, abs=1)
    assert short.warmup_steps == pytest.approx(short.total_steps / 20, abs=1)
    given = {choice.key: choice for choice in choose(images, CPU, {"train.seed": 3, "model.variant": "pico"})}
    assert (given["model.variant"].value, given["model.variant"].reason) == ("pico", "as given")
    assert (given["train.seed"].value, given["train.seed"].reason) == (3, "as given")


def test_a_launchers_precision_is_kept() -> None:
    assert chosen(images_of(500, 600), GPU._replace(precision="fp16")).train.precision == "auto"


# What lies in a folder


def write_images(folder: Path, number: int = 3, size: tuple[int, int] = (40, 48), mode: str = "RGB") -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(number):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return folder


def test_images_are_looked_at(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "colour")
    (folder / "broken.png").write_bytes(b"junk")
    images = look_at(open_source("folder", str(folder), "train", None))
    assert images[:3] == (4, 40, 3)
    gray = look_at(open_source("folder", str(write_images(tmp_path / "gray", mode="L")), "train", None))
    assert gray[:3] == (3, 40, 1)
    assert len(gray.mean) == len(gray.std) == 1
    config = chosen(gray, CPU)
    assert (config.model.in_chans, len(config.data.mean), len(config.data.std)) == (1, 1, 1)
    assert len(chosen(gray, CPU, "model.in_chans=3").data.mean) == 3


def settings(*overrides: str) -> tuple[Mapping[str, Any], list[str]]:
    return read_given(overrides), list(overrides)


def test_arrays_are_found_with_their_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 128, (6, 16, 20, 5), dtype=np.uint8)
    save_arrays(tmp_path / "spectra" / "train", pixels)
    config, reasons = recommend(*settings("data.root=spectra"))
    assert (config.data.name, config.model.in_chans, config.model.stem_stride) == ("arrays", 5, 1)
    assert config.data.mean == pytest.approx((pixels / 255).mean((0, 1, 2)), abs=1e-3)
    assert config.data.std == pytest.approx((pixels / 255).std((0, 1, 2)), abs=1e-3)
    assert "data.name=arrays" in reasons
    save_arrays(tmp_path / "gray", np.repeat(pixels[..., :1], 3, axis=-1))
    assert recommend(*settings("data.root=gray"))[0].model.in_chans == 3


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_images_of_any_kind_and_number_of_channels_are_found_in_their_own_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, channels: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    full = 65535 if kind == "uint16" else 1
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 28, 28, channels)).astype(kind)
    for i, image in enumerate(pixels):
        np.save(f"images/{i}.npy", image)
    config, reasons = recommend(*settings("data.root=images"))
    assert (config.model.in_chans, config.data.dtype, config.data.nodata) == (channels, kind, None)
    values = pixels.astype(float) / full
    assert config.data.mean == pytest.approx(values.mean((0, 1, 2)), rel=0.02)
    assert config.data.std == pytest.approx(values.std((0, 1, 2)), rel=0.02)
    assert f"data.dtype={kind} " in reasons
    wider = recommend(*settings("data.root=images", f"model.in_chans={channels}"))[0]
    assert wider.data.mean == config.data.mean


def test_gray_images_that_are_to_be_read_as_colours_have_as_many_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 4096, (4, 28, 28), dtype=np.uint16)):
        np.save(f"images/{i}.npy", image)
    config, _ = recommend(*settings("data.root=images", "model.in_chans=3"))
    assert len(config.data.mean) == len(config.data.std) == 3


def test_no_data_is_found_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    pixels = np.random.default_rng(0).random((9, 28, 30, 3), dtype=np.float32) + 7
    pixels[:, :9] = np.nan
    for i, image in enumerate(pixels):
        np.save(f"images/{i}.npy", image)
    config, reasons = recommend(*settings("data.root=images"))
    assert (config.data.nodata, config.model.in_chans) == ("nan", 3)
    assert "data.nodata=nan " in reasons
    assert config.data.mean == pytest.approx(np.nanmean(pixels, (0, 1, 2)), rel=0.01)
    assert config.data.std == pytest.approx(np.nanstd(pixels, (0, 1, 2)), rel=0.05)
    given, _ = recommend(*settings("data.root=images", "data.nodata=nan"))
    assert given.data == config.data


def test_statistics_that_are_given_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", mode="L")
    config, _ = recommend(
        *settings("data.root=images", "data.stats=stats.json", "model.in_chans=1", "data.std=[0.5]")
    )
    assert config.automatic == ["data.mean", "data.clip"]
    assert config.data.std == (0.5,)


def test_another_folder_of_the_same_name_gets_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "a" / "pets", tmp_path / "b" / "pets"
    assert suitable_output(first, "train") == Path("runs/pets")
    values = {"output": "runs/pets", "model": {"variant": "atto"}, "data": {"root": str(first)}}
    Path("runs/pets").mkdir(parents=True)
    Path("runs/pets/config.yaml").write_text(yaml.safe_dump(values))
    assert suitable_output(first, "train") == suitable_output(Path("a/pets"), "train") == Path("runs/pets")
    assert suitable_output(second, "train") == Path("runs/pets-2")
    assert suitable_output(first, "val") == Path("runs/pets-2")
    Path("runs/pets-2").mkdir()  # somebody's
    assert suitable_output(second, "train") == Path("runs/pets-3")
    assert suitable_output(tmp_path / "birds.tar", "train") == Path("runs/birds")


def test_images_alone_are_enough_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "pets", number=1)
    assert run_main(pretrain.main, "pets", *QUICK) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fcmae ")
    assert "pretraining on pets" in lines[0]
    assert lines[1].startswith("chosen for 1 image and ")
    assert any(line.startswith("  train.max_steps=2 ") and line.endswith(" as given") for line in lines)
    run = tmp_path / "runs" / "pets"
    assert (run / "reconstructions" / "step-00000000.png").is_file()
    shown = {line.split()[0] for line in lines if line.startswith("  ")}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert f"data.image_size={config['data']['image_size']}" in shown
    assert f"optim.base_lr={config['optim']['base_lr']}" in shown

    write_images(tmp_path / "more")
    for path in (tmp_path / "more").iterdir():
        path.rename(tmp_path / "pets" / f"more-{path.name}")
    assert run_main(pretrain.main, "pets", "train.max_steps=3") == 0
    out = capsys.readouterr().out
    assert f"going on with {Path('runs/pets')}, as chosen then" in out
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert (state["step"], state["config"]["optim"]) == (3, config["optim"])

    write_images(tmp_path / "other" / "pets")
    line = error_line(pretrain.main, capsys, "other/pets", "output=runs/pets", *QUICK)
    assert "output=runs/pets: not empty" in line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere"], ["nowhere: no such folder or file of images", "KEY=VALUE"]),
        (["empty"], ["data.root=empty", "no images in it"]),
        (["junk"], ["none of 2 images tried can be read, such as ", "junk/"]),
        (["empty", "junk"], ["empty junk: name one folder of images"]),
        (["junk", "optim.lr=1"], ["did you mean 'optim.base_lr'?"]),
        (["junk", "data.batch_size=many"], ["data.batch_size", "integer"]),
    ],
)
def test_what_cannot_be_trained_on_gets_one_line(
    words: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "junk"):
        Path(folder).mkdir()
    for name in ("a.png", "b.jpg"):
        Path("junk", name).write_bytes(b"junk")
    line = error_line(pretrain.main, capsys, *words)
    assert all(part in line for part in parts), line
    assert not Path("runs").exists()


def test_what_is_given_is_read_before_anything_is_looked_at() -> None:
    assert read_given(["data.image_size=[64,96]", "model.in_chans=5"]) == {
        "data.image_size": (64, 96),
        "model.in_chans": 5,
    }
    with pytest.raises(UserError, match=r"data\.mean has 3 values"):
        read_given(["model.in_chans=5", "data.mean=[0,0,0]"])


@pytest.mark.parametrize(("workers", "says"), [(2, []), (3, ["data.num_workers=3: more than the 2 cores"])])
def test_more_workers_than_cores_are_mentioned(
    workers: int, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "cores_per_process", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    said: list[str] = []
    config = chosen(images_of(13, 320), CPU, f"data.num_workers={workers}")
    story.training_batches(trainer_of(config, said), photographs(config))
    assert [line.partition(" of each")[0] for line in said] == says


def trainer_of(config: PretrainRecipe, said: list[str]) -> Any:
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, is_main_process=True, device=torch.device("cpu")
    )
    return SimpleNamespace(accelerator=accelerator, config=config, seen_images=0, say=said.append)


def photographs(config: PretrainRecipe) -> PretrainDataset:
    source = open_source("folder", str(PHOTOS), "train", config.model.in_chans)
    view = RandomView(config.data.size, config.data.crop_scale, config.data.hflip)
    return PretrainDataset(source, view=view, draw_ids=lambda: torch.zeros(1, 1), seed=0)


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        ([], ""),
        (["data.mean=[124,116,104]", "data.std=[58,57,57]"], "vary by only "),
        (["data.std=[0.001,0.001,0.001]"], "lie up to "),
        (["data.mean=[30,30,30]"], "lie up to "),
        (["data.mean=[-9,0,0]", "data.std=[0.4,0.4,0.4]"], "lie up to "),
        (["data.std=[0.001,0.001,0.001]", "data.mean=[0.5,0.5,0.5]", "data.clip=[0.495,0.505]"], ""),
    ],
)
def test_mean_and_std_of_another_unit_are_mentioned_in_a_line(overrides: list[str], warns: str) -> None:
    said: list[str] = []
    config = chosen(images_of(13, 320), CPU, "data.num_workers=0", f"data.root={PHOTOS}", *overrides)
    story.training_batches(trainer_of(config, said), photographs(config))
    assert len(said) == bool(warns)
    if warns:
        assert said[0].startswith(f"warning: pixels {warns}")
        assert said[0].endswith(f"fcmae stats {PHOTOS} computes them")


def test_all_processes_train_with_what_the_main_one_chose(tmp_path: Path) -> None:
    os.symlink(PHOTOS, tmp_path / "photos")
    words = [str(tmp_path / "photos"), f"output={tmp_path / 'run'}", "visualize.num_images=0", *QUICK]
    done = run_story("pretrain", *words, number=2)
    assert done.codes == [0, 0], done.errors
    assert done.output.startswith("fcmae ")
    assert done.output.count("chosen for 13 images") == 1
    assert " x 2 processes" in done.output
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"]["batch_size"] * config["optim"]["accumulate"] == 4  # of 8 an update

    none = run_story("pretrain", str(tmp_path / "run" / "encoder"), number=2)
    assert none.codes == [2, 2]
    said = [line for line in none.errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "no images in it" in said[0]


def test_accelerate_launches_the_module(tmp_path: Path, environment: dict[str, str]) -> None:
    options = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = [str(PHOTOS), "--config", "quickstart", "visualize.num_images=0", *QUICK]
    assert run_main(pretrain.main, *words, f"output={tmp_path / 'here'}") == 0
    module = ["-m", "fcmae.pretrain", *words, f"output={tmp_path / 'launched'}"]
    done = launch(["accelerate.commands.launch", *options, *module], environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fcmae "), done.stdout
    here, launched = ([record["loss"] for record in records(tmp_path / name)] for name in ("here", "launched"))
    assert launched == pytest.approx(here)
