"""The `fcmae` command: what one does with trained weights, one function per sub-command."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.checkpoint import STATE, Weights, build_encoder, read_weights
from fcmae.config import DataSection, EvaluateConfig, override_config
from fcmae.data import PixelNormalizer, open_source, seeded
from fcmae.encoder import ConvNeXtV2
from fcmae.errors import UserError, blame, run_script
from fcmae.evaluate import Accuracy, Splits, extract_features, knn_accuracy, labelled_splits, linear_accuracy
from fcmae.patches import grid_shape


def preprocessing_of(weights: Weights) -> dict[str, Any]:
    """Return what is known of the images that these weights were trained on, as keys of the data section."""
    state = weights.path.with_name(STATE)
    if state.is_file():
        stored = json.loads(state.read_text(encoding="utf-8"))["config"]["data"]
        return {key: value for key, value in stored.items() if key in DataSection.model_fields}
    known = {key: getattr(weights, key) for key in ("mean", "std", "image_size")}
    return {key: value for key, value in known.items() if value is not None}


# fcmae evaluate


def judge(
    encoder: ConvNeXtV2, splits: Splits, data: DataSection, *, knn: bool, linear: bool, name: str
) -> dict[str, Any]:
    """Return the accuracies of frozen features: `knn`, by number of neighbours, and `linear`."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = encoder.to(device).eval()
    normalize = PixelNormalizer(data.mean, data.std).to(device)

    def encode(pixels: Tensor) -> Tensor:
        return encoder(normalize(pixels))

    train, val = (
        extract_features(
            encode,
            dataset,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            device=device,
            progress=f"{name}, {split}" if sys.stderr.isatty() else None,
        )
        for split, dataset in (("train", splits.train), ("val", splits.val))
    )
    found: dict[str, Any] = {}
    if knn:
        by_k = knn_accuracy(train, val, splits.num_classes)
        found["knn"] = {k: accuracy._asdict() for k, accuracy in by_k.items()}
    if linear:
        accuracy, l2 = linear_accuracy(train, val, splits.num_classes)
        found["linear"] = accuracy._asdict() | {"l2": l2}
    skipped = sum(len(dataset.labels) for dataset in splits[:2]) - len(train.labels) - len(val.labels)
    return found | ({"unreadable_images": skipped} if skipped else {})


def accuracy_table(result: Mapping[str, Any]) -> str:
    """Draw the accuracies in per cent, those of a random encoder beside them where there are any."""
    columns = {"": result}
    if "baseline" in result:
        columns = {"trained": result, "random": result["baseline"]}
    rows = {f"k-NN, k = {k}": ("knn", k) for k in result.get("knn", {})}
    rows |= {"linear probe": ("linear", None)} if "linear" in result else {}
    width = max(map(len, rows)) + 2
    tops = [f"{name} {top}".strip() for name in columns for top in Accuracy._fields]
    lines = [" " * width + "".join(f"{top:>14}" for top in tops)]
    for title, (kind, k) in rows.items():
        cells = [found[kind][k] if k else found[kind] for found in columns.values()]
        values = [cell[top] for cell in cells for top in Accuracy._fields]
        lines.append(
            f"{title:<{width}}" + "".join(f"{'-' if value is None else f'{value:.2%}':>14}" for value in values)
        )
    return "\n".join(lines)


def evaluate(options: argparse.Namespace) -> int:
    """Judge an encoder's frozen features on labelled images."""
    weights = read_weights(options.source, ema=options.ema)
    config = override_config(
        EvaluateConfig, {"data": preprocessing_of(weights)}, options.overrides, f"fcmae evaluate {options.source}"
    )
    data = config.data
    encoder = build_encoder(weights, num_classes=0)
    with blame("data.image_size"):
        grid_shape(data.size, encoder.patch_size)
    for key in ("mean", "std"):
        if len(getattr(data, key)) != encoder.in_chans:
            raise UserError(
                f"data.{key}={list(getattr(data, key))}: the encoder takes {encoder.in_chans} channels; "
                f"give data.{key} one value for each"
            )
    source = open_source(data.name, data.root, data.split, encoder.in_chans)
    splits = labelled_splits(source, data, config.eval, encoder.in_chans)
    everything = not (options.knn or options.linear)
    wanted = {"knn": options.knn or everything, "linear": options.linear or everything}
    result: dict[str, Any] = {
        "source": str(weights.path),
        "kind": weights.kind,
        "train_images": len(splits.train.labels),
        "val_images": len(splits.val.labels),
        "num_classes": splits.num_classes,
        "image_size": list(data.size),
    }
    result |= judge(encoder, splits, data, **wanted, name="features")
    if options.baseline:
        with seeded(0):
            random = ConvNeXtV2(
                (encoder.depths, encoder.dims), in_chans=encoder.in_chans, stem_stride=encoder.stem_stride
            )
        result["baseline"] = judge(random, splits, data, **wanted, name="random encoder")
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{result['source']} ({weights.kind})")
    print(
        f"{result['train_images']:,} images to learn {splits.num_classes} classes from, "
        f"{result['val_images']:,} to classify, at {data.size[0]} x {data.size[1]} px"
    )
    if "unreadable_images" in result:
        print(f"{result['unreadable_images']} images do not decode and are left out")
    print(accuracy_table(result))
    return 0


def add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="k-NN and linear accuracy of an encoder's frozen features",
        description="Judge an encoder's frozen features on labelled images: by weighted nearest neighbours and by "
        "a linear probe (both, if neither is asked for).",
    )
    parser.add_argument(
        "source", metavar="SOURCE", type=Path, help="a run folder, or any file or folder of weights"
    )
    parser.add_argument("--knn", action="store_true", help="classify by cosine-weighted nearest neighbours")
    parser.add_argument("--linear", action="store_true", help="fit a logistic regression")
    parser.add_argument("--baseline", action="store_true", help="judge a random encoder of the same shape, too")
    parser.add_argument("--ema", action="store_true", help="take the running average of the weights")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="such as data.root=FOLDER, data.split=train, eval.val_split=test; the run's own where not given",
    )
    parser.set_defaults(run=evaluate)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fcmae", description="What one does with trained weights.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_evaluate(commands)
    options, rest = parser.parse_known_args(argv)  # sub-parsers cannot mix options and positionals by themselves
    unknown = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def run(argv: list[str]) -> int:
    options = parse_arguments(argv)
    command: Callable[[argparse.Namespace], int] = options.run
    return command(options)


def main() -> int:
    """Entry point of the `fcmae` command."""
    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())
