"""The model that a path stands for, a run's or a file's of any format, and its configuration; joins rooms."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fcmae.config import Complete, DataSection, PretrainConfig, Recipe, parse_config
from fcmae.encoder.base import Network
from fcmae.encoder.networks import is_other
from fcmae.encoder.responses import OWN_PARTS
from fcmae.errors import UserError, blame
from fcmae.model import FCMAE
from fcmae.plain_yaml import write_yaml
from fcmae.training.checkpoint import STATE
from fcmae.training.run_folder import RunFolder, StoredModel, newest_state, read_records, stored_model
from fcmae.weights.base import (
    ENCODER,
    Preprocessing,
    Weights,
    build_encoder,
    build_like,
    describe_encoder,
    load_network,
    report_damage,
    require_arguments,
    require_fit,
)
from fcmae.weights.card import Trained
from fcmae.weights.read import find_weights, interpret, read_tensors, read_weights

if TYPE_CHECKING:
    from fcmae.data.stats import Statistics


def _stored_model(path: str | Path, last: bool, ema: bool | None) -> StoredModel | None:
    if not (path := Path(path)).exists():  # links in a circle, too
        return None
    with report_damage(path):
        return stored_model(path, last=last, ema=ema)


def load_tensors(
    path: str | Path, *, last: bool = False, ema: bool | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """Return the file that `path` stands for and its tensors, a decoder's too, by their own names.

    Arguments and errors are those of `load_weights`.
    """
    stored = _stored_model(path, last, ema)
    if stored is not None:
        return stored.file, stored.read()
    file = find_weights(Path(path))
    return file, read_tensors(file, ema=bool(ema))


def load_weights(path: str | Path, *, last: bool = False, ema: bool | None = None) -> Weights:
    """Return the weights of a ConvNeXt from a run or from a file of any format, recognised by content.

    Those of a regression give targets in their own units, other than in training.

    Args:
        path: a run folder, which stands for its best evaluated weights, or the newest where none were evaluated; a
            checkpoint folder; an exported folder; or a file of weights (safetensors or PyTorch) of ours, timm,
            transformers or the official code.
        last: take the newest weights of a run, not the best.
        ema: take the EMA (True) or the raw weights (False); None for what a run evaluated, and elsewhere for raw.

    Raises:
        UserError: if there are none, or they are damaged or no whole ConvNeXt; the message names the file.
    """
    stored = _stored_model(path, last, ema)
    if stored is None:
        return read_weights(path, ema=bool(ema))
    with report_damage(stored.file.with_name(STATE)):
        of_outputs = {"class_names": stored.state.class_names, "task": stored.state.config.get("task")}
        described = stored.state.config["data"] | of_outputs
        preprocessing = Preprocessing.of(described)
        model = stored.state.config.get("model", {})
        keys = ("variant", "in_chans", "stem_stride") if is_other(model.get("variant")) else ("response", "grn")
        network = require_arguments({key: model[key] for key in keys if key in model})
    tensors = stored.read()
    weights = interpret(stored.file, tensors, preprocessing=preprocessing, network=network)
    if stored.state.target_mean and stored.state.target_std:
        mean, std = torch.tensor(stored.state.target_mean), torch.tensor(stored.state.target_std)
        with blame(str(stored.file.with_name(STATE))):
            rescaled = rescale_outputs(weights.tensors, weights.classifier, std, mean)
        weights = weights._replace(tensors=rescaled)
    is_pretrained = not weights.head and any(name.startswith(ENCODER) for name in tensors)
    kind = "FCMAE run" if is_pretrained else "fine-tuned run"
    return weights._replace(kind=kind, step=stored.step, ema=stored.ema)


RECIPE = {
    "model": None,
    "data": (
        *("image_size", "tile", "crop_scale", "crop_padding", "hflip", "auto_augment", "erase_prob"),
        *("mixup", "cutmix", "scale", "most_of_one", "jitter", "label_fraction"),
    ),
    "optim": None,
    "train": None,
}
"""Sections of a configuration, and keys of them or all, that a card shows: none that names a place."""


def describe_training(path: str | Path, *, last: bool = False, ema: bool | None = None) -> Trained | None:
    """Return what a run did for the weights that `load_weights` returns; None if they are no run's.

    Raises:
        UserError: as `load_weights`.
    """
    stored = _stored_model(path, last, ema)
    if stored is None:
        return None
    state, run = stored.state, RunFolder.around(stored.file)
    with report_damage(stored.file.with_name(STATE)):
        config = state.config
        data, begun = config["data"], config.get("init_from")
        kind, _, known = data.get("name", "folder").partition("/")
        pretrained = "mask_ratio" in config.get("model", {})
        recipe = {
            section: {key: value for key, value in config[section].items() if keys is None or key in keys}
            for section, keys in RECIPE.items()
            if section in config
        }
        trained = Trained(
            pretrained=pretrained,
            dataset=known or Path(data.get("root", "")).name or "images",
            hub_dataset=known if kind in ("hfds", "hfids") else None,
            num_images=None,
            images="tiles" if data.get("tile") else "images",
            split=(config.get("eval", {}) if pretrained else data).get("val_split"),
            started_from=begun and (Path(begun).name or "weights"),
            step=stored.step,
            seen_images=state.seen_images,
            ema=stored.ema,
            scores={},
            recipe=write_yaml(recipe),
            versions=f"fcmae {state.fcmae}, torch {state.torch}",
        )
    if run is None or not run.metrics.is_file():
        return trained
    with report_damage(run.metrics):
        records = read_records(run.metrics.read_text(encoding="utf-8"))
        passed = [record["seen_images"] / record["epoch"] for record in records if record.get("epoch")]
        before = "" if pretrained else "ema_" if stored.ema else "val_"
        scores = {
            key.removeprefix(before): float(value)
            for record in records
            if record["step"] == stored.step
            for key, value in record.items()
            if key.startswith(before or "knn_")
        }
    return trained._replace(num_images=round(passed[-1]) if passed else None, scores=scores)


def rescale_outputs(
    tensors: dict[str, Tensor], classifier: str, factor: Tensor, offset: Tensor
) -> dict[str, Tensor]:
    """Return tensors of a network whose outputs are `factor` times those of `tensors`, plus `offset`, by output.

    Args:
        classifier: what the last layer, which alone changes, is called.
        factor: (outputs,).
        offset: (outputs,).

    Raises:
        ValueError: if there are other outputs.
    """
    weight, bias = f"{classifier}.weight", f"{classifier}.bias"
    outputs = len(tensors[weight]) if weight in tensors else 0
    if outputs != len(factor):
        raise ValueError(f"statistics of {len(factor)} targets for {outputs} outputs")
    changed = {weight: tensors[weight] * factor[:, None], bias: tensors[bias] * factor + offset}
    return tensors | changed


def load_encoder(
    path: str | Path,
    *,
    last: bool = False,
    ema: bool | None = None,
    num_classes: int | None = None,
    drop_path: float = 0.0,
) -> Network:
    """Return the network of a run or of any file of weights: `build_encoder` of `load_weights`.

    That of a segmentation run is its `Segmenter`, or with `num_classes=0` the encoder in it.

    Raises:
        UserError: as `load_weights`.
    """
    weights = load_weights(path, last=last, ema=ema)
    return build_encoder(weights, num_classes=num_classes, drop_path=drop_path)


def _shape_of(weights: Weights) -> Network:
    """Return the network of weights without its tensors."""
    with torch.device("meta"):
        return build_like(weights)


def require_network(
    encoder: Network, weights: Weights, source: str | Path, *, may_differ: Collection[str] = ()
) -> None:
    """Check that weights are those of such an encoder, but for the keys that may differ.

    Raises:
        UserError: naming `source`, the value of init_from, and the key that differs.
    """
    for key, value in _shape_of(weights).arguments.items():
        if value != encoder.arguments.get(key, value) and key not in may_differ:
            shown = describe_encoder(weights.tensors) if key == "variant" and not is_other(value) else value
            raise UserError(
                f"init_from={source}: {weights.kind} weights with {key} {shown}; set model.{key} to that"
            )


def adapt_channels(weights: Weights, network: Network) -> tuple[dict[str, Tensor], str]:
    """Fit the first convolution of weights to the channels of `network`, as timm's `adapt_input_conv` does.

    One channel takes the sum of the weights of all; more take them in turn, scaled to keep the size of what comes
    out.

    Returns:
        The tensors, and what was done, for people; empty where the channels are as many.
    """
    before, after = _shape_of(weights).in_chans, network.in_chans
    if before == after:
        return weights.tensors, ""

    def adapt(first: Tensor) -> Tensor:
        if after == 1:
            return first.sum(1, keepdim=True)
        return first.repeat(1, math.ceil(after / before), 1, 1)[:, :after] * (before / after)

    shapes = {name: value.shape for name, value in network.state_dict().items()}
    tensors = {
        name: adapt(x) if x.ndim == 4 and (x.shape[1], shapes.get(name, x.shape)[1]) == (before, after) else x
        for name, x in weights.tensors.items()
    }
    how = "summed" if after == 1 else "repeated in turn"
    return tensors, f"first layer adapted from {before} to {after} channels ({how})"


def known_of(weights: Weights, keys: Collection[str]) -> dict[str, Any]:
    """Return what weights say of the network and its images, by dotted key of a configuration.

    Args:
        keys: those that are asked for.

    Raises:
        UserError: if mean or std are asked for but unknown, for other than 3 channels.
    """
    network, images = _shape_of(weights), weights.preprocessing
    if "data.mean" in keys or "data.std" in keys:
        with blame(str(weights.path)):
            images = images.completed(network)
    known = {f"model.{key}": value for key, value in network.arguments.items()}
    known |= {f"data.{key}": value for key, value in images._asdict().items() if value is not None}
    return {key: known[key] for key in keys if key in known}


def _require_same_reading(stats: "Statistics", data: DataSection) -> None:
    """Check that statistics are of pixels as a run reads them.

    Raises:
        UserError: naming the key that differs.
    """
    for key in ("dtype", "nodata", "window"):
        its, ours = getattr(stats, key), getattr(data, key)
        if its != ours and (key, ours) != ("dtype", None):
            raise UserError(
                f"data.stats={data.stats}: of images read with data.{key}={its}, but the run has {ours}; set it to "
                "that, or compute the statistics again"
            )


def resolve_recipe(recipe: Recipe[Complete]) -> tuple[Complete, str]:
    """Replace `auto` by what the run that is to be resumed has, or else `data.stats`, or else `init_from`.

    Returns:
        The configuration, and a line that names the values and their sources: empty where nothing was `auto`.

    Raises:
        UserError: if there is nothing to take it from, or it does not fit.
    """
    keys, data, stats = recipe.automatic, recipe.data, None
    found: dict[str, dict[str, Any]] = {}  # by source
    stored = newest_state(RunFolder(recipe.output)) if keys and recipe.resume == "auto" else None
    if stored is not None:
        with report_damage(Path(recipe.output)):
            sections = stored.config
            split = [(key, *key.split(".")) for key in keys]
            found[recipe.output] = {k: sections[part][name] for k, part, name in split if name in sections[part]}
    elif keys:
        if data.stats is not None:
            from fcmae.data.stats import read_statistics  # which brings all that opens images

            stats = read_statistics(Path(data.stats))
            says = {f"data.{key}": value for key, value in stats.section().items()}
            found[data.stats] = {key: says[key] for key in keys if key in says}
        rest = [key for key in keys if not any(key in values for values in found.values())]
        if recipe.init_from is not None and rest:
            found[recipe.init_from] = known_of(load_weights(recipe.init_from), rest)
        if recipe.command == "pretrain" and not found:
            raise UserError(
                f"{keys[0]}=auto: nothing says what it is; fcmae stats {data.root} --output STATS computes it, for "
                "data.stats=STATS/stats.json"
            )
    known = {key: value for values in found.values() for key, value in values.items()}
    known = {key: value for key, value in known.items() if value not in ({}, OWN_PARTS)}
    config = recipe.resolve(known, " and ".join(found) or "the configuration")
    if stats is not None:
        _require_same_reading(stats, config.data)
    values = config.model_dump(mode="json")
    taken: list[str] = []
    for source, its in found.items():
        shown = [
            f"{key}={values[section][name]}" for key in its if key in known for section, name in [key.split(".")]
        ]
        taken += [f"{', '.join(shown)} (from {source})"] if shown else []
    return config, ", ".join(taken)


def load_fcmae(path: str | Path) -> tuple[FCMAE, PretrainConfig]:
    """Return the whole FCMAE, decoder included, of a pretraining run or checkpoint folder, and its configuration.

    Raises:
        UserError: if it is none, or damaged.
    """
    file, tensors = load_tensors(path)
    state = file.with_name(STATE)
    stored = _stored_model(file, False, None)
    if stored is None or not any(name.startswith("decoder.") for name in tensors):
        raise UserError(
            f"{path}: holds no decoder to reconstruct with; give a pretraining run or one of its checkpoint folders"
        )
    config = parse_config(PretrainConfig, stored.state.config, str(state))
    variant = config.model.variant
    blocks = config.model.decoder_depth + (0 if isinstance(variant, str) else sum(variant[0]))
    with blame(str(state)):
        if blocks > len(tensors):
            raise ValueError(f"its network has {blocks} blocks, but {file.name} beside it {len(tensors)} tensors")
        settings: dict[str, Any] = {**config.model.model_dump(), "nodata": config.data.nodata is not None}
        settings["layout"] = "auto"  # training's may need a package
        with torch.device("meta"):
            require_fit(FCMAE(**settings), tensors, file)  # before it takes the memory that the configuration asks
        model = FCMAE(**settings)
    load_network(model, tensors, file)
    return model, config
