"""The fcmae command: results on standard output, everything else on standard error, exit code 2 for bad input."""

import json
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Command, error_line, randomise, run_main, small_encoder, state_of
from PIL import Image
from safetensors.torch import save_file
from small_runs import rehash
from test_evaluate import extract, splits_of, write_classes
from torchvision.transforms.v2.functional import pil_to_tensor

import fcmae
from fcmae import FCMAE, ConvNeXt, pretrain
from fcmae.__main__ import COMMANDS, SHELLS, main, run
from fcmae.arguments import mention_other_gpus
from fcmae.commands import export
from fcmae.config import FinetuneConfig, PretrainConfig, parse_config, shipped_configs
from fcmae.data import PixelNormalizer, cover
from fcmae.evaluation.inference import fit_to_patches
from fcmae.evaluation.probes import L2, knn_accuracy
from fcmae.load import load_weights
from fcmae.training.checkpoint import EMA, MODEL, OPTIMIZER, Best, save_checkpoint
from fcmae.weights.base import Preprocessing
from fcmae.weights.export import FORMATS
from fcmae.weights.timm import write_timm_folder

PHOTOS = ROOT / "docs" / "photos"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ("cat", "dog", "kite")
STORIES = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def network() -> ConvNeXt:
    torch.manual_seed(0)
    return small_encoder(num_classes=3).float().eval()


@pytest.fixture(scope="module")
def model(network: ConvNeXt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as fine-tuning leaves it."""
    folder = tmp_path_factory.mktemp("model")
    write_timm_folder(network, Preprocessing(MEAN, STD, (64, 64), 0.9, class_names=NAMES), folder)
    return folder


def save_pretraining(folder: Path, **kwargs: Any) -> Path:
    """Save a pretraining run of patches of 8 px, trained at 32 px; `kwargs` are of its network."""
    network = {"variant": TINY, "stem_stride": 1, "decoder_dim": 16} | kwargs
    values = {"output": str(folder), "model": network, "data": {"root": "x", "image_size": 32}}
    config = parse_config(PretrainConfig, values, "a test").model_dump(mode="json")
    torch.manual_seed(0)
    state_dict = randomise(FCMAE(**network), std=0.1).state_dict()
    checkpoints = folder / "checkpoints"
    save_checkpoint(checkpoints, state_of(3, config=config), {MODEL: state_dict, OPTIMIZER: {}}, keep=1)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretraining(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run, best at step 1, whose raw and EMA weights of steps 1 and 2 are sure of classes 0 to 3."""
    folder = tmp_path_factory.mktemp("finetuned")
    names = ["raw-1", "ema-1", "raw-2", "ema-2"]
    values = {
        "output": str(folder),
        "model": {"variant": TINY},
        "data": {"root": "x", "image_size": 32, "mean": MEAN, "std": STD},
        "train": {"ema_decay": 0.9},
    }
    config = parse_config(FinetuneConfig, values, "a test").model_dump(mode="json")

    def sure_of(label: int) -> dict[str, torch.Tensor]:
        network = ConvNeXt(TINY, num_classes=4)
        torch.nn.init.zeros_(network.head.weight)  # pyright: ignore[reportArgumentType]
        network.head.bias = torch.nn.Parameter(20.0 * torch.eye(4)[label])
        return network.state_dict()

    for step in (1, 2):
        state = state_of(step, config=config, class_names=names, best=Best(step=1, score=0.5))
        files = {MODEL: sure_of(2 * step - 2), OPTIMIZER: {}, EMA: sure_of(2 * step - 1)}
        save_checkpoint(folder / "checkpoints", state, files, keep=2)
    return folder


# The command


def test_the_package_and_its_help_come_without_torch() -> None:
    helps = [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)]
    script = f"""
import sys, fcmae
from fcmae.__main__ import run
assert fcmae.__version__ and set(fcmae.__all__) <= set(dir(fcmae))
for arguments in {helps}:
    try:
        run(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments
    heavy = {{"torch", "torchvision", "timm", "accelerate", "numpy"}} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"fcmae {fcmae.__version__}\n")


def test_every_public_name_is_found_and_no_other() -> None:
    assert all(getattr(fcmae, name) is not None for name in fcmae.__all__)
    assert fcmae.FCMAE is FCMAE
    with pytest.raises(AttributeError, match="module 'fcmae' has no attribute 'FCMEA'"):
        fcmae.FCMEA  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_the_command_is_installed_by_that_name() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["fcmae"].partition(":")
    assert getattr(import_module(module), function) is main


def test_without_a_command_there_is_help_and_exit_code_2(command: Command) -> None:
    code, out, err = command()
    assert (code, out) == (2, "")
    assert err.startswith("usage: fcmae [-h] [--version] [--print-completion {bash,zsh}] COMMAND")
    assert all(f"    {name}" in err for name in COMMANDS)


def test_every_file_of_commands_is_a_command_and_the_other_way_round() -> None:
    files = {path.stem for path in (ROOT / "fcmae" / "commands").glob("*.py")}
    assert files == {*COMMANDS, "arguments", "__init__"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_goes_to_standard_output_with_an_example(name: str, command: Command) -> None:
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: fcmae {name} ")
    example = out.partition("\nexamples:\n")[2].splitlines()[0]
    assert shlex.split(example)[:2] == ["fcmae", name]
    if name in STORIES:
        assert "--print-config lists all" in out


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_complete_commands_options_and_paths(shell: str, command: Command, tmp_path: Path) -> None:
    code, out, err = command("--print-completion", shell)
    assert (code, err) == (0, "")
    assert all(f"{name}" in out for name in COMMANDS)
    assert all(option in out for option in ("--dry-run", "--mask-ratios", "--evaluate"))
    assert ("_shtab_compgen_files" if shell == "bash" else "_files") in out
    if shutil.which(shell) is None:
        return
    script = tmp_path / "completion"
    script.write_text(out)
    subprocess.run([shell, "-n", str(script)], check=True)
    if shell == "bash":
        ask = "COMP_WORDS=(fcmae pretrain --dr); COMP_CWORD=2; _shtab_fcmae; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", f". {script}; {ask}"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "--dry-run"


# fcmae configs


def test_the_shipped_configurations_are_listed_with_a_line_each(command: Command) -> None:
    code, out, err = command("configs")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if not line.startswith("#"))
    assert [line for line in lines if line.startswith("#")][-1] == "# fcmae ablate NAME"
    assert listed.keys() == shipped_configs().keys()
    assert all(len(purpose) > 15 for purpose in listed.values())


def test_a_configuration_is_copied_out_once(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("configs", "finetune/tiny")
    assert code == 0
    assert "fcmae finetune --config tiny.yaml" in out
    assert (tmp_path / "tiny.yaml").read_text() == shipped_configs()["finetune/tiny"].read_text()
    assert command("configs", "quickstart", "mine.yaml")[0] == 0
    (tmp_path / "mine.yaml").write_text("edited")
    for arguments in (["quickstart", "mine.yaml"], ["pretrain/tiny"]):
        code, _, err = command("configs", *arguments)
        assert code == 2
        assert "exists already; name another file" in err
    assert (tmp_path / "mine.yaml").read_text() == "edited"
    code, _, err = command("configs", "atto")
    assert code == 2
    assert "did you mean finetune/atto or pretrain/atto?" in err


# The stories


def test_a_story_gets_its_arguments(command: Command) -> None:
    for name, config in (("pretrain", "quickstart.yaml"), ("finetune", "finetune/atto.yaml")):
        code, out, _ = command(
            name, "--config", ROOT / "configs" / config, "output=elsewhere", "--print-config", "data.root=x"
        )
        assert code == 0
        assert "output: elsewhere\n" in out
        assert "\n  root: x\n" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["paint"],
        ["--verbose", "predict"],
        ["--", "predict"],
        ["predict"],
        ["predict", "m"],
        ["predict", "m", "x.jpg", "--ema", "--raw"],
        ["predict", "m", "x.jpg", "--paint"],
        ["export", "s", "--to", "word", "--output", "x"],
        ["evaluate"],
        ["prepare", "images"],
        ["pretrain"],
    ],
)
def test_wrong_arguments_show_the_usage(arguments: list[str], command: Command) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ")
    assert "error: " in err.splitlines()[-1]


def test_the_images_may_be_named_without_a_key(command: Command) -> None:
    code, out, _ = command("pretrain", "--config", "tiny", PHOTOS, "output=elsewhere", "--print-config")
    assert code == 0
    assert f"\n  root: {PHOTOS}\n" in out
    code, _, err = command("finetune", "--config", "tiny", PHOTOS, "nowhere")
    assert code == 2
    assert "name one folder of images" in err


def test_the_first_line_says_what_is_about_to_happen(command: Command, tmp_path: Path) -> None:
    words = ["--config", "quickstart", f"output={tmp_path / 'run'}", f"data.root={tmp_path / 'none'}"]
    code, out, err = command("pretrain", *words)
    assert code == 2
    assert "no such folder" in err
    assert out.splitlines()[0] == (
        f"fcmae {fcmae.__version__}: pretraining on {tmp_path / 'none'}, into {tmp_path / 'run'}, by quickstart"
    )


@pytest.mark.parametrize("launched", [False, True])
def test_one_process_on_several_gpus_says_how_to_use_all(
    launched: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "4") if launched else monkeypatch.delenv("WORLD_SIZE", raising=False)
    mention_other_gpus("pretrain", ["my images", "train.epochs=3"])
    launch = "accelerate launch --multi_gpu --num_processes 4 -m fcmae.pretrain 'my images' train.epochs=3"
    said = capsys.readouterr().out
    assert said == ("" if launched else f"this uses one of 4 GPUs; all of them: {launch}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{pretrained}", "x.jpg"], "holds an encoder without a classifier; fine-tune it"),
        (["predict", "{model}", "x.jpg", "--top", "0"], "--top 0: must be at least 1"),
        (["predict", "{model}", "x.jpg", "--ema"], "holds no EMA weights"),
        (["predict", "nothing", "x.jpg"], "nothing: no such file or folder"),
        (["reconstruct", "{model}", "x.jpg"], "holds no decoder to reconstruct with"),
        (["reconstruct", "{finetuned}", "x.jpg"], "holds no decoder to reconstruct with"),
        (["reconstruct", "nothing", "x.jpg"], "nothing: no such file or folder"),
        (
            ["reconstruct", "{pretrained}", str(PHOTOS / "fig.jpg"), "--mask-ratios", "1.5"],
            "--mask-ratios: mask_ratio must",
        ),
        (["export", "{model}", "--to", "plain", "--output", "{model}"], "exists already; name another folder"),
        (["export", "{pretrained}", "--to", "timm", "--output", "{model}/../a/b", "--ema"], "holds no EMA weights"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    arguments: list[str], message: str, pretrained: Path, finetuned: Path, model: Path, command: Command
) -> None:
    places = {"pretrained": pretrained, "finetuned": finetuned, "model": model}
    code, out, err = command(*(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert err.count("error") == 1


@pytest.mark.any_cpu
def test_a_reader_that_has_seen_enough_gets_no_traceback(model: Path) -> None:
    command = f"{sys.executable} -m fcmae predict {model} {PHOTOS} {PHOTOS} | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.stdout == f"{PHOTOS / 'aitzgorri.jpg'}\n"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


# fcmae predict


def test_predictions_are_those_of_the_network_on_the_evaluated_crop(
    model: Path, network: ConvNeXt, command: Command
) -> None:
    photos = sorted(PHOTOS.glob("*.jpg"))
    code, out, _ = command("predict", model, PHOTOS, "--top", 2, "--json")
    assert code == 0
    results = json.loads(out)
    assert [result["image"] for result in results] == [str(photo) for photo in photos]
    for photo, result in zip(photos, results, strict=True):
        pixels = cover(pil_to_tensor(Image.open(photo)), (64, 64), 0.9)
        with torch.no_grad():
            wanted = network(PixelNormalizer(MEAN, STD)(pixels)[None]).softmax(1)[0]
        top = wanted.argsort(descending=True)[:2].tolist()
        assert [entry["index"] for entry in result["classes"]] == top
        assert [entry["name"] for entry in result["classes"]] == [NAMES[i] for i in top]
        found = torch.tensor([entry["probability"] for entry in result["classes"]])
        assert torch.allclose(found, wanted[top], atol=1e-5)


def test_more_images_than_a_batch_come_in_their_order(model: Path, command: Command) -> None:
    images = [PHOTOS / "fig.jpg", *[PHOTOS] * 3, PHOTOS / "bird.jpg"]
    code, out, _ = command("predict", model, *images, "--top", 1, "--json")
    assert code == 0
    photos = [str(photo) for photo in sorted(PHOTOS.glob("*.jpg"))]
    expected = [str(images[0]), *photos * 3, str(images[-1])]
    results = json.loads(out)
    assert [result["image"] for result in results] == expected
    first = {result["image"]: result["classes"][0] for result in reversed(results)}
    for result in results:  # of another batch: equal but for rounding
        assert result["classes"][0]["index"] == first[result["image"]]["index"]
        assert result["classes"][0]["probability"] == pytest.approx(first[result["image"]]["probability"], abs=1e-5)


def test_the_table_names_images_and_classes(model: Path, command: Command) -> None:
    code, out, err = command("predict", model, PHOTOS / "fig.jpg", "--top", 99, PHOTOS / "bird.jpg")
    assert code == 0
    lines = out.splitlines()
    assert (lines[0], lines[4]) == (str(PHOTOS / "fig.jpg"), str(PHOTOS / "bird.jpg"))
    assert sorted(line.split()[1] for line in lines[1:4]) == list(NAMES)
    assert sum(float(line.split()[0].rstrip("%")) for line in lines[1:4]) == pytest.approx(100, abs=0.02)
    assert "timm, ConvNeXt V2 depths [1, 1, 2, 1]" in err


@pytest.mark.parametrize(
    ("flags", "file", "name"),
    [
        ([], "step-00000001/ema.safetensors", "ema-1"),
        (["--raw"], "step-00000001/model.safetensors", "raw-1"),
        (["--last"], "step-00000002/ema.safetensors", "ema-2"),
        (["--last", "--ema"], "step-00000002/ema.safetensors", "ema-2"),
        (["--last", "--raw"], "step-00000002/model.safetensors", "raw-2"),
    ],
)
def test_a_runs_model_is_its_best_ema_unless_others_are_asked_for(
    finetuned: Path, command: Command, flags: list[str], file: str, name: str
) -> None:
    code, out, err = command("predict", finetuned, PHOTOS / "fig.jpg", "--top", 1, *flags)
    assert code == 0
    assert out.split()[-1] == name
    taken, _, what = err.splitlines()[0].partition(": ")
    assert Path(taken).resolve() == finetuned / "checkpoints" / file
    assert f"step {name[-1]}, {'EMA' if name.startswith('ema') else 'raw weights'}" in what


def test_unreadable_images_are_named_and_the_others_done(model: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes((PHOTOS / "fig.jpg").read_bytes()[:5000])
    images = [
        tmp_path / "cut.jpg",
        tmp_path / "gone.jpg",
        PHOTOS / "fig.jpg",
        tmp_path / "text.jpg",
        tmp_path / "empty",
    ]
    code, out, err = command("predict", model, *images, "--json")
    assert code == 2
    assert [result["image"] for result in json.loads(out)] == [str(PHOTOS / "fig.jpg")]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    for name in (
        "cut.jpg: image file is truncated",
        "gone.jpg: no such file",
        "text.jpg: not an image",
        "empty: no images",
    ):
        assert sum(name in line for line in errors) == 1, name


def test_photographs_are_turned_as_their_camera_says(model: Path, tmp_path: Path, command: Command) -> None:
    upright = Image.open(PHOTOS / "bird.jpg")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to see it upright"
    upright.save(tmp_path / "1.png")
    turned.save(tmp_path / "2.png", exif=exif)
    turned.save(tmp_path / "3.png")  # which nothing says how to turn
    code, out, _ = command("predict", model, tmp_path, "--json", "--top", 3)
    assert code == 0
    first, second, unturned = (
        {entry["name"]: entry["probability"] for entry in result["classes"]} for result in json.loads(out)
    )
    # not to the bit: a matrix product may compute the rows of a batch differently, depending on the processor
    assert second == pytest.approx(first, abs=1e-5)
    assert unturned != pytest.approx(first, abs=1e-3)


def test_what_had_to_be_assumed_is_said(network: ConvNeXt, tmp_path: Path, command: Command) -> None:
    torch.save(network.state_dict(), tmp_path / "x.pth")
    code, out, err = command("predict", tmp_path / "x.pth", PHOTOS / "fig.jpg")
    assert code == 0
    assert "does not say mean, std, image_size: assumed to be ImageNet's at 224 px" in err
    assert sorted(line.split()[1] for line in out.splitlines()[1:]) == ["0", "1", "2"]


def test_gray_images_go_through_a_gray_network(tmp_path: Path, command: Command) -> None:
    gray = small_encoder(num_classes=3, in_chans=1).float()
    write_timm_folder(gray, Preprocessing((0.5,), (0.5,), (64, 64)), tmp_path)
    assert command("predict", tmp_path, PHOTOS / "fig.jpg")[0] == 0
    many = small_encoder(num_classes=3, in_chans=5).float()
    write_timm_folder(many, Preprocessing((0.5,) * 5, (0.5,) * 5, (64, 64)), tmp_path)
    code, _, err = command("predict", tmp_path, PHOTOS / "fig.jpg")
    assert code == 2
    assert "fig.jpg: 3 bands where 5 are wanted" in err


# fcmae reconstruct


def test_reconstructions_of_any_size_are_drawn_at_each_ratio(
    pretrained: Path, tmp_path: Path, command: Command
) -> None:
    generator = np.random.default_rng(0)
    for name, size in {"wide/a": (30, 90), "tall/a": (200, 50), "line": (2, 300)}.items():
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    out = tmp_path / "out"
    images = [tmp_path / "wide", tmp_path / "tall" / "a.png", tmp_path / "line.png", tmp_path / "gone.png"]
    code, printed, err = command("reconstruct", pretrained, *images, "--mask-ratios", 0.25, 0.5, "--output", out)
    assert code == 2
    assert printed.splitlines() == [
        f"{out / 'a.png'}  resized from 90 x 30 to 56 x 16",
        f"{out / 'a-2.png'}  resized from 50 x 200 to 16 x 64",
        f"{out / 'line.png'}  resized from 300 x 2 to 392 x 8",
    ]
    taken, error = err.splitlines()
    assert taken.startswith(str(pretrained / "checkpoints" / "step-00000003" / "model.safetensors"))
    assert "step 3" in taken
    assert error == f"error: {tmp_path / 'gone.png'}: no such file"
    with Image.open(out / "a.png") as picture:
        width, height = picture.size
    assert height == 2 * (128 + 4) + 4 + 15 + 2 * 4  # a row for each ratio, 16 px enlarged to 128, and titles
    assert width > 3 * (56 * 8 + 4) + 4  # and room for labels


def test_masks_and_histograms_of_a_run_are_drawn_as_it_was_trained(tmp_path: Path, command: Command) -> None:
    run = save_pretraining(tmp_path / "run", mask_shape="grid", mask_group=2, target="hog")
    out = tmp_path / "out"
    code, printed, _ = command("reconstruct", run, PHOTOS / "fig.jpg", "--mask-ratios", 0.75, "--output", out)
    assert code == 0
    assert printed == f"{out / 'fig.png'}  resized from 473 x 320 to 32 x 32\n"  # whole groups of 16 px
    picture = np.asarray(Image.open(out / "fig.png"))[-132:-4, -4 * 132 :]  # beside the label
    original, masked, *histograms = np.split(picture, 4, axis=1)
    hidden = (masked[:, :128] == 128).all(2)
    assert hidden.mean() == pytest.approx(0.75, abs=0.01)
    blocks = hidden.reshape(2, 64, 2, 64)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert np.array_equal(original[:, :128][~hidden], masked[:, :128][~hidden])
    assert len(histograms) == 2


def test_reconstruct_repeats_itself(pretrained: Path, tmp_path: Path, command: Command) -> None:
    for name in ("first", "again"):
        assert command("reconstruct", pretrained, PHOTOS / "fig.jpg", "--output", tmp_path / name)[0] == 0
    first, again = (np.asarray(Image.open(tmp_path / name / "fig.png")) for name in ("first", "again"))
    assert np.array_equal(first, again)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (320, 427), (32, 32), (3000, 4000)])
def test_images_become_whole_patches_of_about_the_same_area(size: tuple[int, int]) -> None:
    height, width = fit_to_patches(*size, patch=16, area=96 * 96)
    assert height % 16 == width % 16 == 0
    assert height * width >= 2 * 16 * 16
    if max(size) < 20 * min(size):
        assert 0.7 < height * width / 96**2 < 1.4
        assert 0.7 < (height / width) / (size[0] / size[1]) < 1.4


def refused(command: Command, *arguments: object) -> str:
    """The one line of a command that ends before anything is computed."""
    code, _, err = command(*arguments)
    assert code == 2, err
    return err.splitlines()[-1]


def test_reconstructions_are_never_written_over_images_nor_without_being_told(
    pretrained: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    Image.open(PHOTOS / "bird.jpg").save(pictures / "bird.png")
    image = (pictures / "bird.png").read_bytes()
    (pictures / "other").symlink_to(".")
    out.mkdir()
    (out / "bird.png").symlink_to("../pictures/bird.png")
    with monkeypatch.context() as patch:
        patch.setattr("fcmae.load.load_fcmae", pytest.fail)  # before anything takes long
        for images, folder in ((pictures, pictures), (pictures, pictures / "new"), (pictures, pictures / "other")):
            line = refused(command, "reconstruct", pretrained, images, "--output", folder, "--overwrite")
            assert line == f"error: --output {folder}: in {images}, whose images are read; name a folder elsewhere"
        for options, reason in (
            ([], "exists already; name another place, or add --overwrite"),
            (["--overwrite"], "is read"),
        ):
            for folder in (pictures, out):
                line = refused(
                    command, "reconstruct", pretrained, pictures / "bird.png", "--output", folder, *options
                )
                assert line.startswith(f"error: {folder / 'bird.png'}: {reason}")
    assert (pictures / "bird.png").read_bytes() == image
    assert sorted(path.name for path in pictures.iterdir()) == ["bird.png", "other"]

    (out / "bird.png").unlink()
    (out / "bird.png").write_text("mine")
    assert command("reconstruct", pretrained, pictures, "--output", out, "--overwrite")[0] == 0
    assert Image.open(out / "bird.png").format == "PNG"


def test_names_from_the_disk_are_printed_in_one_line(model: Path, tmp_path: Path, command: Command) -> None:
    names = ["a\nb\x1b[31m.jpg", "c\udcff.jpg"]
    for name in names:
        shutil.copy(PHOTOS / "bird.jpg", tmp_path / name)
    (tmp_path / "d\ne.png").touch()
    code, out, err = command("predict", model, tmp_path, "--top", 1)
    assert code == 2
    shown = [line for line in out.splitlines() if not line.startswith("  ")]
    assert shown == [f"{tmp_path}/a\\nb\\x1b[31m.jpg", f"{tmp_path}/c\\udcff.jpg"]
    assert err.splitlines()[-2].startswith(f"error: {tmp_path}/d\\ne.png: not an image")


# What others write


def test_a_users_files_are_refused_before_anything_takes_long(
    pretrained: Path, model: Path, tmp_path: Path, command: Command
) -> None:
    mine = {name: tmp_path / name for name in ("evaluation.json", "confusion.png", "plot.png", "config.yaml")}
    for path in mine.values():
        path.write_text("mine")
    evaluate = ("finetune", "--evaluate", model, "--config", "atto", PHOTOS)
    line = refused(command, *evaluate, f"output={tmp_path}")
    assert line == f"error: {mine['evaluation.json']}: exists already; name another place, or add --overwrite"
    mine["evaluation.json"].rename(tmp_path / "elsewhere")
    assert refused(command, *evaluate, f"output={tmp_path}").startswith(f"error: {mine['confusion.png']}: exists")
    line = refused(command, *evaluate, f"output={mine['confusion.png']}")
    assert line == (
        f"error: output={mine['confusion.png']}: {mine['confusion.png']} exists already; name another folder"
    )
    line = refused(command, "ablate", "cifar10-versions", PHOTOS, "--plot", mine["plot.png"])
    assert line.startswith(f"error: {mine['plot.png']}: exists already")
    table = tmp_path / "grid" / "cifar10-versions" / "table.md"
    table.parent.mkdir(parents=True)
    table.write_text("mine")
    line = refused(command, "ablate", "cifar10-versions", f"output={table.parents[1]}", PHOTOS, "--launch", "false")
    assert line.startswith(f"error: {table}: exists already")
    for config in ("mine", (ROOT / "configs" / "quickstart.yaml").read_text()):
        mine["config.yaml"].write_text(config)
        run = ("pretrain", "--config", "quickstart", PHOTOS, f"output={tmp_path}", "resume=auto")
        assert "holds files that are not a run's" in refused(command, *run)
        assert mine["config.yaml"].read_text() == config
    (tmp_path / "tiny.yaml").symlink_to("nowhere")
    assert "exists already" in refused(command, "configs", "pretrain/tiny", tmp_path / "tiny.yaml")
    (tmp_path / "new").symlink_to("nowhere")
    line = refused(command, "export", pretrained, "--to", "timm", "--output", tmp_path / "new")
    assert "exists already; name another folder" in line
    assert mine["plot.png"].read_text() == mine["confusion.png"].read_text() == table.read_text() == "mine"


def test_a_run_leaves_alone_what_others_put_into_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [str(PHOTOS), "model.variant=[[1, 1, 1, 1], [8, 8, 16, 16]]", "data.image_size=32"]
    arguments += ["data.num_workers=0", "visualize.every_steps=1", "checkpoint.keep=1", f"output={run}"]
    arguments += ["--config", "quickstart", "resume=auto"]
    assert run_main(pretrain.main, *arguments, "train.max_steps=1") == 0
    folders = ("encoder", "reconstructions", "checkpoints", "checkpoints/step-mine", "tensorboard", "mine")
    mine = [run / place / name for place in (".", *folders) for name in ("notes.txt", "step-1.png")]
    mine.append(run / "mine" / ".writing-x")  # such as that of a run in this one's folder
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert run_main(pretrain.main, *arguments, "train.max_steps=2") == 0
    assert [path.name for path in (run / "checkpoints").glob("step-0*")] == ["step-00000002"]
    assert {path.read_text() for path in mine} == {"mine"}


# fcmae export


def test_help_names_the_formats_there_are() -> None:
    assert list(export.FORMATS) == list(FORMATS)


def test_an_export_says_what_it_wrote_and_how_to_load_it(
    pretrained: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "new" / "folder"
    code, out, err = command("export", pretrained, "--to", "timm", "--output", folder)
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        str(folder / name) for name in ("README.md", "config.json", "model.safetensors")
    ]
    assert "FCMAE run, step 3" in err
    assert "checked on random images in float64" in err
    assert f'timm.create_model("local-dir:{folder}", pretrained=True)' in err
    stored, written = load_weights(pretrained), load_weights(folder)
    assert all(torch.equal(stored.tensors[name], written.tensors[name]) for name in stored.tensors)


# fcmae evaluate


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes in train, two of them in val; their colours tell them apart."""
    write_classes(tmp_path / "train", {"bee": 6, "cat": 5, "dog": 4})
    write_classes(tmp_path / "val", {"bee": 2, "dog": 3})
    return tmp_path


@pytest.fixture
def arguments(root: Path, tmp_path: Path) -> list[str]:
    """Evaluate a file of weights on the images of `root`."""
    path = tmp_path / "encoder.safetensors"
    save_file(small_encoder(stem_stride=1).float().state_dict(), path)
    return ["evaluate", str(path), f"data.root={root}", "data.image_size=16", "data.num_workers=0"]


def test_evaluate_prints_both_accuracies_and_those_of_a_random_encoder(
    arguments: list[str], command: Command
) -> None:
    code, out, _ = command(*arguments, "--json", "--baseline")
    assert code == 0
    found = json.loads(out)
    assert (found["train_images"], found["val_images"], found["num_classes"]) == (15, 5, 3)
    assert list(found["knn"]) == list(found["baseline"]["knn"]) == ["10"]
    assert found["linear"]["top1"] == 1.0, "the classes differ in colour"
    assert found["linear"]["l2"] in L2
    torch.manual_seed(1)
    assert json.loads(command(*arguments, "--json", "--baseline")[1]) == found

    code, table, _ = command(*arguments, "--baseline")
    assert code == 0
    assert "15 images to learn 3 classes from, 5 to classify, at 16 x 16 px" in table
    for title, kind in (("k-NN, k = 10", "knn"), ("linear probe", "linear")):
        (line,) = [line for line in table.splitlines() if line.startswith(title)]
        trained, random = (part[kind]["10"] if kind == "knn" else part[kind] for part in (found, found["baseline"]))
        assert line.split()[-4:] == [f"{trained['top1']:.2%}", "-", f"{random['top1']:.2%}", "-"]


@pytest.mark.parametrize(("flag", "other"), [("knn", "linear"), ("linear", "knn")])
def test_evaluate_does_what_it_is_asked_for(arguments: list[str], command: Command, flag: str, other: str) -> None:
    found = json.loads(command(*arguments, "--json", f"--{flag}")[1])
    assert flag in found
    assert other not in found


def test_a_run_is_evaluated_on_its_own_images_before_others(root: Path, tmp_path: Path, command: Command) -> None:
    (root / "val").rename(root / "test")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"output: {tmp_path / 'run'}\n"
        "model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, decoder_dim: 16, layout: masked}\n"
        f"data: {{root: {root}, image_size: 16, batch_size: 4, num_workers: 0}}\n"
        "train: {max_steps: 1}\n"
        "eval: {num_images: 6, val_split: test}\n"
    )
    assert run_main(pretrain.main, "--config", str(config)) == 0
    code, out, err = command("evaluate", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "(FCMAE run, step 1" in out
    assert "15 images to learn 3 classes from, 5 to classify, at 16 x 16 px" in out
    checkpoint = tmp_path / "run" / "checkpoints" / "last"
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["data"] |= {"val_root": str(root), "val_split": state["config"].pop("eval")["val_split"]}
    (checkpoint / "state.json").write_text(json.dumps(state))  # as fine-tuning writes it
    rehash(checkpoint)
    assert command("evaluate", checkpoint, "--linear")[0] == 0
    out = command("evaluate", checkpoint, "--knn", "eval.val_split=null")[1]
    assert "12 images to learn 3 classes from, 3 to classify" in out
    code, _, err = command("evaluate", checkpoint, "data.split=test", "eval.val_split=train")
    assert code == 2
    assert f"{root}, split train: class 'cat' is not among the 2 classes of training" in err


def test_a_classifier_is_evaluated_by_its_features(root: Path, arguments: list[str], command: Command) -> None:
    torch.manual_seed(0)
    encoder = small_encoder(stem_stride=1, num_classes=4).float()
    save_file(encoder.state_dict(), root / "classifier.safetensors")
    found = json.loads(command("evaluate", root / "classifier.safetensors", *arguments[2:], "--json")[1])
    encoder.head = torch.nn.Identity()
    normalize = PixelNormalizer((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    train, val = (
        extract(dataset, lambda pixels: encoder(normalize(pixels)), batch_size=64)
        for dataset in splits_of(root)[:2]
    )
    assert found["knn"] == {"10": knn_accuracy(train, val, 3)[10]._asdict()}


def test_images_that_do_not_decode_are_counted(arguments: list[str], root: Path, command: Command) -> None:
    (root / "train" / "cat" / "1.png").write_bytes(b"junk")
    assert "1 images do not decode" in command(*arguments, "--knn")[1]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.root=/nowhere"], ["data.root=/nowhere"]),
        (["data.image_size=20"], ["data.image_size", "16 and 24"]),
        (["data.mean=[0.5]"], ["data.mean", "takes 3 channels"]),
        (["data.rot=x"], ["did you mean 'data.root'?"]),
        (["eval.val_split=test"], ["no split 'test' in it (found: train, val)", "eval.val_split=null"]),
        (["eval.num_images=0"], ["eval.num_images"]),
        (["--ema"], ["holds no EMA weights"]),
    ],
)
def test_bad_keys_get_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], overrides: list[str], parts: list[str]
) -> None:
    line = error_line(run, capsys, *arguments, *overrides)
    assert all(part in line for part in parts), line


def test_weights_that_say_nothing_of_images_need_a_root(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data.root: missing" in error_line(run, capsys, *arguments[:2])
    line = error_line(run, capsys, "evaluate", "/nowhere/at/all", *arguments[2:])
    assert "/nowhere/at/all: no such file or folder" in line
