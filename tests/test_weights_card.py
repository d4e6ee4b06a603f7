"""The card of an export: metadata that the hub reads, Python that runs, and nothing of where it was made."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, Command, randomise, records, run_main
from huggingface_hub import ModelCard
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from weight_files import MEAN, NAMES, STD, classifier, save_run, weights_of

from fcmae import finetune, pretrain
from fcmae.commands.export import LICENSES
from fcmae.commands.export import main as export_main
from fcmae.encoder.convnext import ConvNeXt
from fcmae.evaluation.inference import Picture, compute_outputs
from fcmae.load import describe_training
from fcmae.weights.base import Weights, build_encoder
from fcmae.weights.card import Publication
from fcmae.weights.export import FORMATS, export

PHOTO = ROOT / "docs" / "photos" / "bird.jpg"
LIBRARIES = {
    "timm": "timm",
    "transformers": "transformers",
    "official": "fcmae",
    "official-sparse": "fcmae",
    "plain": "fcmae",
    "onnx": "onnx",
    "torch-export": "pytorch",
}


def read_card(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def python_of(card: Any) -> str:
    (code,) = re.findall("```python\n(.*?)\n```", card.text, flags=re.DOTALL)
    return code


def small_weights(num_classes: int = 3, in_chans: int = 3, **known: Any) -> Weights:
    encoder = randomise(ConvNeXt(TINY, num_classes=num_classes, in_chans=in_chans), std=0.1)
    names = NAMES if num_classes else None
    return weights_of(encoder, class_names=names, crop_pct=0.875, **known)


@pytest.mark.parametrize("to", FORMATS)
def test_the_python_on_the_card_computes_what_we_compute(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = small_weights(num_classes=0 if to == "official-sparse" else 3)
    export(weights, to, tmp_path / "out")
    card = read_card(tmp_path / "out")
    assert card.data.library_name == LIBRARIES[to]
    monkeypatch.chdir(tmp_path)
    photo = (
        Image.open(PHOTO).convert("RGB").resize((73, 73), Image.Resampling.BICUBIC)
    )  # cropped, not resized again
    photo.save("photo.jpg", quality=95)
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(python_of(card).replace("PATH/OF/THIS/FOLDER", str(tmp_path / "out")), names)
    out = torch.as_tensor(next(names[name] for name in ("out", "logits", "features") if name in names))
    network = build_encoder(weights).eval()
    pictures = [Picture(Path("photo"), pil_to_tensor(Image.open("photo.jpg")))]
    use = weights.preprocessing.completed(network)
    ((_, ours),) = compute_outputs(network, pictures, preprocessing=use)
    assert out.shape == (1, *ours.shape)
    assert (out[0] - ours).abs().max() <= 1e-3 * ours.abs().max()


def test_the_python_on_the_card_runs_a_program_with_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = small_weights(in_chans=1, mean=MEAN[:1], std=STD[:1])
    export(weights, "onnx", tmp_path / "out", with_preprocessing=True)
    monkeypatch.chdir(tmp_path)
    Image.open(PHOTO).save("photo.jpg")
    names: dict[str, Any] = {}
    exec(python_of(read_card(tmp_path / "out")).replace("PATH/OF/THIS/FOLDER", str(tmp_path / "out")), names)
    assert names["probabilities"].shape == (1, 3)
    assert names["probabilities"].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ("timm", 'model = timm.create_model("hf-hub:org/net", pretrained=True).eval()'),
        ("transformers", 'folder = "org/net"'),
        ("plain", 'model = fcmae.load_encoder(huggingface_hub.snapshot_download("org/net")).eval()'),
    ],
)
def test_the_card_of_a_repository_loads_it_from_there(to: str, line: str, tmp_path: Path) -> None:
    export(classifier(), to, tmp_path / "out", publication=Publication("mit", "org/net"))
    card = read_card(tmp_path / "out")
    code = python_of(card).splitlines()
    assert line in code
    assert ("import huggingface_hub" in code) == ("snapshot_download" in line)
    assert card.data.license == "mit"


@pytest.mark.parametrize(
    ("num_classes", "task", "tag"),
    [
        (0, None, "image-feature-extraction"),
        (3, None, "image-classification"),
        (3, "multilabel", "image-classification"),
        (3, "regression", None),
    ],
)
def test_the_metadata_say_what_the_network_is_for(
    num_classes: int, task: str | None, tag: str | None, tmp_path: Path
) -> None:
    export(small_weights(num_classes, task=task), "plain", tmp_path / "out")
    data = read_card(tmp_path / "out").data
    assert data.pipeline_tag == tag
    assert data.tags == ["fcmae", "convnextv2"]
    assert (data.license, data.datasets, data.eval_results) == (None, None, None)


# What a run tells


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pretraining, and a classifier fine-tuned from it, in folders whose names are nobody's business."""
    root = tmp_path_factory.mktemp("home-of-jane")
    for split in ("train", "val"):
        for kind in ("bird", "boat"):
            folder = root / "secret" / "pets" / split / kind
            folder.mkdir(parents=True)
            for i in range(3):
                Image.open(PHOTO).resize((40 + i, 32)).save(folder / f"{i}.png")
    common = [
        "data.image_size=32",
        "data.num_workers=0",
        "data.batch_size=2",
        f"data.root={root / 'secret' / 'pets'}",
    ]
    common += ["model.variant=[[1,1,1,1],[8,8,16,16]]", "model.stem_stride=1", "train.epochs=2"]
    pretraining = [
        "--config",
        "quickstart",
        *common,
        "model.decoder_dim=16",
        "train.max_steps=3",
        "data.split=train",
    ]
    assert run_main(pretrain.main, *pretraining, f"output={root / 'first'}") == 0
    tuning = [
        "--config",
        "finetune/small-folder-cpu",
        *common,
        f"init_from={root / 'first'}",
        "train.ema_decay=0.9",
    ]
    assert run_main(finetune.main, *tuning, f"output={root / 'second'}") == 0
    return root / "first", root / "second"


def test_the_card_of_a_pretraining_says_what_it_saw(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert export_main([str(runs[0]), "--to", "timm", "--output", str(tmp_path / "out")]) == 0
    for folder in (tmp_path / "out", runs[0] / "encoder"):
        card = read_card(folder)
        assert "encoder, pretrained without labels by fcmae" in card.text
        assert "- Data: `pets` of 6 images.\n- Length: 3 updates, 6 images seen, 1 epochs.\n" in card.text
        assert "- Started from: random weights." in card.text
        assert "  mask_ratio: 0.6\n" in card.text
        assert "self-supervised-learning" in card.data.tags
        assert card.data.eval_results is None


def test_the_card_of_a_classifier_has_the_scores_of_these_very_weights(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    step = describe_training(runs[1])
    assert step is not None
    scored = [record for record in records(runs[1]) if record["step"] == step.step and "ema_top1" in record][-1]
    for more, kind in ((["--ema"], "ema"), (["--raw"], "val")):
        out = tmp_path / kind
        arguments = [str(runs[1]), "--to", "plain", "--output", str(out), "--license", "mit", *more]
        assert export_main(arguments) == 0
        card = read_card(out)
        results = {result.metric_name: result for result in card.data.eval_results or []}
        assert {name: result.metric_value for name, result in results.items()} == {
            "top-1": scored[f"{kind}_top1"],
            "top-5": scored[f"{kind}_top5"],
        }
        assert results["top-1"].dataset_name == "pets"
        assert (results["top-1"].metric_type, results["top-1"].dataset_split) == ("accuracy", "val")
        assert card.data.metrics == ["accuracy"]
        assert ("moving average (EMA)" in card.text) == (kind == "ema")
        assert "- Started from: `first`." in card.text
        assert "of 6 images with labels" in card.text


def test_nothing_on_a_card_says_where_the_run_was(runs: tuple[Path, Path]) -> None:
    for folder in (runs[0] / "encoder", runs[1] / "model"):
        text = (folder / "README.md").read_text()
        assert "jane" not in text
        assert "secret" not in text
        assert str(Path.home()) not in text


def test_images_of_the_hub_are_named_as_the_hub_does(tmp_path: Path) -> None:
    data = {
        "name": "hfds/org/pets",
        "root": "/home/jane/cache",
        "mean": MEAN,
        "std": STD,
        "image_size": 32,
        "tile": 32,
    }
    save_run(tmp_path, ConvNeXt(TINY), config={"data": data, "model": {}})
    trained = describe_training(tmp_path)
    assert trained is not None
    assert (trained.dataset, trained.hub_dataset, trained.images) == ("org/pets", "org/pets", "tiles")


# Sharing


def test_a_licence_is_asked_for_by_the_names_that_can_be_given(tmp_path: Path, command: Command) -> None:
    arguments = ("export", tmp_path, "--to", "timm", "--output", tmp_path / "out", "--push", "org/net")
    code, _, err = command(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert all(name in err for name in LICENSES)
    assert "--private: is of the repository" in command(*arguments[:-2], "--private")[2]
    for wrong in ("net", "a/b/c", "org/a b", "org/net.git"):
        code, _, err = command(*arguments[:-1], wrong, "--license", "mit")
        assert code == 2
        assert err.startswith(f"error: --push {wrong}: ")
        assert err.count("\n") == 1
