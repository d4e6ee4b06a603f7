"""`fcmae evaluate`: how good frozen features are, on labelled images; as a table or as JSON."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fcmae.commands.arguments import add_source, command_parser, load_source
from fcmae.config import DataSection, EvaluateConfig, override_config, parse_config, to_yaml
from fcmae.errors import UserError, blame

if TYPE_CHECKING:
    from fcmae.encoder.base import Network
    from fcmae.evaluation.probes import Splits
    from fcmae.weights.base import Weights


def make_parser() -> argparse.ArgumentParser:
    defaults = to_yaml(parse_config(EvaluateConfig, {"data": {"root": "FOLDER"}}, "defaults"))
    parser = command_parser(
        "evaluate",
        "Evaluate an encoder's frozen features on labelled images: by weighted nearest neighbours and by a linear "
        "probe (both, if neither is asked for).",
        examples="fcmae evaluate runs/mine data.root=path/to/labelled eval.val_split=test --baseline\n"
        "fcmae evaluate encoder.safetensors --knn data.name=arrays data.root=path/to/prepared --json",
        notes=f"keys, and what they are where neither you nor the run says otherwise:\n\n{defaults}\n"
        "the classes are learnt from data.split; eval.val_split=null holds out a fifth of it",
    )
    add_source(parser)
    parser.add_argument("--knn", action="store_true", help="classify by cosine-weighted nearest neighbours")
    parser.add_argument("--linear", action="store_true", help="fit a logistic regression")
    parser.add_argument(
        "--baseline", action="store_true", help="evaluate a random encoder of the same shape beside it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="the labelled images, such as data.root=FOLDER (default: those of the run)",
    )
    return parser


def images_of(weights: "Weights") -> dict[str, Any]:
    """Return what is known of the images these weights were trained and evaluated on, as an `EvaluateConfig`."""
    from fcmae.training.run_folder import stored_model

    stored = stored_model(weights.path)
    data = stored.state.config["data"] if stored else weights.preprocessing._asdict()
    known = {key: data[key] for key in DataSection.model_fields if data.get(key) is not None}
    if known.get("dtype") == "uint8":
        del known["dtype"]  # deeper ones keep their depth
    if stored is None:
        return {"data": known}
    if stored.state.config.get("task", "classification") != "classification":  # whose images have no class each
        return {"data": {key: value for key, value in known.items() if key not in ("name", "root", "split")}}
    validation = data | stored.state.config.get("eval", {})  # named in `data` by fine-tuning, else in `eval`
    return {
        "data": known,
        "eval": {key: validation[key] for key in ("val_split", "val_root") if key in validation},
    }


def measure(
    encoder: "Network", splits: "Splits", data: DataSection, *, knn: bool, linear: bool, name: str
) -> dict[str, Any]:
    """Return the accuracies of frozen features: `knn`, by number of neighbours, and `linear`."""
    from fcmae.data import PixelNormalizer
    from fcmae.evaluation.inference import best_device
    from fcmae.evaluation.probes import extract_features, knn_accuracy, linear_accuracy

    device = best_device()
    encoder = encoder.to(device).eval()
    normalize = PixelNormalizer(data.mean, data.std, data.clip).to(device)
    train, val = (
        extract_features(
            lambda pixels: encoder(normalize(pixels)),
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
    columns = {"trained": result, "random": result["baseline"]} if "baseline" in result else {"": result}
    rows = {f"k-NN, k = {k}": ("knn", k) for k in result.get("knn", {})}
    rows |= {"linear probe": ("linear", None)} if "linear" in result else {}
    width = max(map(len, rows)) + 2
    tops = ("top1", "top5")
    lines = [" " * width + "".join(f"{f'{name} {top}'.strip():>14}" for name in columns for top in tops)]
    for title, (kind, k) in rows.items():
        cells = [found[kind][k] if k else found[kind] for found in columns.values()]
        values = [cell[top] for cell in cells for top in tops]
        lines.append(
            f"{title:<{width}}" + "".join(f"{'-' if value is None else f'{value:.2%}':>14}" for value in values)
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    options = make_parser().parse_intermixed_args(argv)

    from fcmae.data import Reading, open_source, seeded
    from fcmae.encoder.networks import build_network
    from fcmae.evaluation.inference import best_device, kind_for
    from fcmae.evaluation.probes import labelled_splits
    from fcmae.patches import grid_shape
    from fcmae.training.memory import require_batch
    from fcmae.weights.base import build_encoder

    weights = load_source(options)
    config = override_config(
        EvaluateConfig, images_of(weights), options.overrides, f"fcmae evaluate {options.source}"
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
    require_batch(data, encoder.in_chans, best_device())
    source = open_source(data.name, data.root, data.split, encoder.in_chans, reading=Reading.of(data))
    splits = labelled_splits(source, data, config.eval, encoder.in_chans)
    for split in (splits.train, splits.val):
        with blame(split.source.describe(0)):
            kind_for(Reading.of(data), split.source.dtype)
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
    result |= measure(encoder, splits, data, **wanted, name="features")
    if options.baseline:
        with seeded(0):
            random = build_network(**encoder.arguments)
        result["baseline"] = measure(random, splits, data, **wanted, name="random encoder")
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{result['source']} ({weights.description})")
    print(
        f"{result['train_images']:,} images to learn {splits.num_classes} classes from, "
        f"{result['val_images']:,} to classify, at {data.size[0]} x {data.size[1]} px"
    )
    if "unreadable_images" in result:
        print(f"{result['unreadable_images']} images do not decode and are left out")
    print(accuracy_table(result))
    return 0
