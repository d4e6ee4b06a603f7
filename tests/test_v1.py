"""ConvNeXt V1 from the command line: pretrained by FCMAE, resumed, fine-tuned, kept in a folder that timm loads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import (
    assert_same,
    error_line,
    gradients,
    randomise,
    relative_error,
    run_main,
    small_encoder,
    smooth_images,
    some_ids,
)
from safetensors.torch import load_file

from fcmae import FCMAE, finetune, load_encoder, pretrain
from fcmae.data import save_arrays

SMALL = ((1, 1, 1, 1), (8, 8, 16, 16))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A pretraining of three steps of a V1; its images, labelled, serve fine-tuning too."""
    images = smooth_images(24, 3, 32, 32).mul(40).add(128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for split in ("train", "val"):
        save_arrays(tmp_path / "images" / split, images, np.arange(24) % 3, ("a", "b", "c"))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
output: {tmp_path / "run"}
model: {{variant: {json.dumps(SMALL)}, version: 1, stem_stride: 1, decoder_dim: 16}}
data: {{name: arrays, root: {tmp_path / "images"}, image_size: 32, batch_size: 8, num_workers: 0}}
optim: {{base_lr: 0.05, warmup_epochs: 0}}
train: {{max_steps: 3}}
log: {{every_steps: 1}}
visualize: {{num_images: 0}}
"""
    )
    return path


def tune(tmp_path: Path, source: Path) -> list[str]:
    """Arguments of a fine-tuning from `source` on those images, into `next`."""
    data = [f"data.root={tmp_path / 'images'}", "data.name=arrays", "data.batch_size=8", "data.num_workers=0"]
    path = tmp_path / "finetune.yaml"
    path.write_text(f"output: {tmp_path / 'next'}\ninit_from: {source}\ndata: {{root: images}}\n")
    return ["--config", str(path), *data]


def stored(run: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / f"{name}.safetensors")


def test_v1_pretrains_resumes_and_fine_tunes_and_timm_loads_what_is_left(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, next_run = tmp_path / "run", tmp_path / "next"
    assert run_main(pretrain.main, "--config", str(config), "--dry-run") == 0
    assert not run.exists()
    assert run_main(pretrain.main, "--config", str(config), "train.max_steps=2") == 0
    before = stored(run)
    assert {"encoder.stages.0.0.gamma", "decoder.decoder.0.gamma"} <= before.keys()
    assert not any(".grn." in name for name in before)
    assert run_main(pretrain.main, "--config", str(config), "resume=auto") == 0
    after = stored(run)
    assert not torch.equal(after["encoder.stages.0.0.gamma"], before["encoder.stages.0.0.gamma"])
    images = torch.randn(2, 3, 32, 32)
    encoder = load_encoder(run).eval()
    assert (encoder.version, encoder.response) == (1, "none")
    theirs: Any = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True).eval()
    with torch.no_grad():
        assert relative_error(theirs(images), encoder(images)) <= 1e-5

    tuning = tune(tmp_path, run)
    assert run_main(finetune.main, *tuning, "train.max_steps=3", "train.ema_decay=0.9", "model.drop_path=0.2") == 0
    assert "model.version=1" in capsys.readouterr().out
    assert yaml.safe_load((next_run / "config.yaml").read_text())["model"]["version"] == 1
    best = load_file(next_run / "checkpoints" / "best" / "ema.safetensors")
    assert_same(load_encoder(next_run).state_dict(), best, tolerance=0)
    theirs = timm.create_model(f"local-dir:{next_run / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        assert relative_error(theirs(images), load_encoder(next_run).eval()(images)) <= 1e-5
    assert run_main(finetune.main, "--evaluate", str(next_run)) == 0


def test_weights_of_the_other_version_are_refused_in_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(small_encoder(variant=SMALL, stem_stride=1).float().state_dict(), tmp_path / "v2.pth")
    arguments = ["--config", str(config), f"output={tmp_path / 'x'}", f"init_from={tmp_path / 'v2.pth'}"]
    line = error_line(pretrain.main, capsys, *arguments)
    assert line.endswith("v2.pth: official dense weights with version 2; set model.version to that")
    line = error_line(finetune.main, capsys, *tune(tmp_path, tmp_path / "v2.pth"), "model.version=1")
    assert "weights with version 2; set model.version to that" in line
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "next").exists()


def test_a_run_of_a_network_that_timm_lacks_leaves_a_plain_folder_and_can_be_fine_tuned_from_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    unusual = ["model.version=2", "model.grn.aggregation=l1", "model.response=grn"]
    assert run_main(pretrain.main, "--config", str(config), *unusual, "train.max_steps=1") == 0
    assert "timm" not in capsys.readouterr().out
    assert "with grn.aggregation=l1" in (run / "encoder" / "README.md").read_text()
    for source in (run, run / "encoder"):
        encoder = load_encoder(source)
        assert encoder.arguments["response"] == "grn"
        assert encoder.arguments["grn"]["aggregation"] == "l1"
        assert all(
            torch.equal(value, stored(run)[f"encoder.{name}"]) for name, value in encoder.state_dict().items()
        )
    assert run_main(finetune.main, *tune(tmp_path, run / "encoder"), "train.max_steps=1") == 0
    assert load_encoder(tmp_path / "next" / "model").arguments["grn"]["aggregation"] == "l1"


def test_fcmae_of_v1_is_traced_whole_and_compiled_gives_the_same() -> None:
    torch.compiler.reset()
    model = randomise(FCMAE(SMALL, version=1, stem_stride=1, decoder_dim=8, drop_path=0.5)).double()
    images, ids = smooth_images(4, 3, 24, 32), some_ids(4, 12, 5)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        torch.manual_seed(7)  # the same branches dropped
        out = run(images, ids)
        results.append({"loss": out.loss, "pred": out.pred} | gradients(out.loss, model))
    assert_same(results[1], results[0])
    assert results[0]["decoder.decoder.0.gamma"].abs().max() > 0


def test_fcmae_of_v1_in_bf16_is_close_to_float32() -> None:
    model = randomise(FCMAE(SMALL, version=1, stem_stride=1, decoder_dim=8), std=0.2)
    images, ids = smooth_images(4, 3, 24, 32, torch.float32), some_ids(4, 12, 5)
    expected = model(images, ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, ids)
    assert relative_error(out.loss, expected) < 0.05
    assert all(grad.isfinite().all() for grad in gradients(out.loss, model).values())
