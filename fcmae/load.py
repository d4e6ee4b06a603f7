"""Weights and networks of a run's model or of any file, by content; joins `weights` and `training.run_folder`."""

from pathlib import Path
from typing import Any

from fcmae.config import PretrainConfig, parse_config
from fcmae.encoder.convnext import ConvNeXtV2
from fcmae.errors import UserError, blame
from fcmae.model import FCMAE
from fcmae.tensors import load_strictly, read_safetensors
from fcmae.training.checkpoint import STATE
from fcmae.training.run_folder import stored_model
from fcmae.weights.read import Weights, build_encoder, read_weights


def load_weights(path: str | Path, *, last: bool = False, ema: bool | None = None) -> Weights:
    stored = stored_model(Path(path), last=last, ema=ema)
    if stored is None:
        return read_weights(path, ema=bool(ema))
    weights = read_weights(stored.file)
    return weights._replace(kind=f"{weights.kind}, {stored.description}")


def load_encoder(
    path: str | Path,
    *,
    last: bool = False,
    ema: bool | None = None,
    num_classes: int | None = None,
    drop_path: float = 0.0,
) -> ConvNeXtV2:
    return build_encoder(load_weights(path, last=last, ema=ema), num_classes=num_classes, drop_path=drop_path)


def load_fcmae(path: str | Path) -> tuple[FCMAE, PretrainConfig]:
    stored = stored_model(Path(path))
    tensors = read_safetensors(stored.file) if stored else {}
    if stored is None or not any(name.startswith("decoder.") for name in tensors):
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder; give a pretraining run or a checkpoint folder of one")
        raise UserError(
            f"{path}: holds no decoder to reconstruct with; give a pretraining run or one of its checkpoint folders"
        )
    state = stored.file.with_name(STATE)
    config = parse_config(PretrainConfig, stored.state["config"], str(state))
    with blame(str(state)):
        settings: dict[str, Any] = {**dict(config.model), "layout": "auto"}  # training's may need a package
        model = FCMAE(**settings)
    load_strictly(model, tensors, stored.file)
    return model, config
