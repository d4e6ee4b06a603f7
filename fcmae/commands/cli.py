"""The `fcmae` command: what one does with images before training and with weights after it, one function each."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fcmae.config import DataSection, EvaluateConfig, override_config
from fcmae.data import PixelNormalizer, open_source, seeded
from fcmae.data.prepare import prepare
from fcmae.encoder import ConvNeXtV2
from fcmae.errors import UserError, blame, run_script
from fcmae.evaluation.inference import Prediction, Unreadable, classify, read_images, reconstruct_images
from fcmae.evaluation.probes import (
    Accuracy,
    Splits,
    extract_features,
    knn_accuracy,
    labelled_splits,
    linear_accuracy,
)
from fcmae.load import load_fcmae, load_weights
from fcmae.patches import grid_shape
from fcmae.training.checkpoint import STATE
from fcmae.weights.base import Weights, build_encoder, describe_encoder
from fcmae.weights.export import FORMATS, export


def best_device() -> torch.device:
    """Return the GPU or its like where there is one that works, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def say(text: str) -> None:
    """Tell a person; standard output is kept for results."""
    print(text, file=sys.stderr)


def tell_weights(weights: Weights) -> None:
    """Say what was read, and what had to be assumed."""
    say(f"{weights.path}: {weights.description}, ConvNeXt V2 {describe_encoder(weights.tensors)}")
    unknown = [name for name in ("mean", "std", "image_size") if getattr(weights.preprocessing, name) is None]
    if unknown:
        say(
            f"{weights.path}: tells no {', '.join(unknown)}: taken from ImageNet at 224 px, as the released weights"
        )


def add_source(parser: argparse.ArgumentParser, name: str, metavar: str) -> None:
    parser.add_argument(
        name, metavar=metavar, type=Path, help="a run, checkpoint or exported folder, or any file of weights"
    )
    parser.add_argument("--ema", action="store_true", help="take the running average of the weights")


def add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="image files, or folders of them")


# fcmae evaluate


def images_of(weights: Weights) -> dict[str, Any]:
    """Return what is known of the images that these weights were trained and judged on, as an `EvaluateConfig`."""
    state = weights.path.with_name(STATE)
    if not state.is_file():
        known = {key: getattr(weights.preprocessing, key) for key in ("mean", "std", "image_size")}
        return {"data": {key: value for key, value in known.items() if value is not None}}
    stored = json.loads(state.read_text(encoding="utf-8"))["config"]
    told = stored["data"] | stored.get("eval", {})  # where pretraining and fine-tuning name their validation sets
    return {
        "data": {key: value for key, value in stored["data"].items() if key in DataSection.model_fields},
        "eval": {key: told[key] for key in ("val_split", "val_root") if key in told},
    }


def judge(
    encoder: ConvNeXtV2, splits: Splits, data: DataSection, *, knn: bool, linear: bool, name: str
) -> dict[str, Any]:
    """Return the accuracies of frozen features: `knn`, by number of neighbours, and `linear`."""
    device = best_device()
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
    weights = load_weights(options.source, ema=options.ema or None)
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
    print(f"{result['source']} ({weights.description})")
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
    add_source(parser, "source", "SOURCE")
    parser.add_argument("--knn", action="store_true", help="classify by cosine-weighted nearest neighbours")
    parser.add_argument("--linear", action="store_true", help="fit a logistic regression")
    parser.add_argument("--baseline", action="store_true", help="judge a random encoder of the same shape, too")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="such as data.root=FOLDER, data.split=train, eval.val_split=test; the run's own where not given",
    )
    parser.set_defaults(run=evaluate)


# fcmae export


def run_export(options: argparse.Namespace) -> int:
    """Write a network in the format of others."""
    weights = load_weights(options.source, ema=options.ema or None)
    tell_weights(weights)
    written = export(weights, options.to, options.output)
    kind = FORMATS[options.to]
    for file in written.files:
        print(f"{file}  {file.stat().st_size:,} bytes")
    precision = str(kind.dtype).removeprefix("torch.")
    say(f"checked on random images in {precision}: differs by {written.difference:.0e} of the largest output")
    say(f"load with {written.how}")
    return 0


def add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write weights in the format of timm, transformers, ONNX and others",
        description="Write the network of any weights in another format. What was written is loaded again and must "
        "compute the same on random images before it gets its name.",
    )
    add_source(parser, "source", "SOURCE")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="a folder that does not exist yet"
    )
    parser.set_defaults(run=run_export)


# fcmae predict


def prediction_table(prediction: Prediction) -> str:
    lines = [f"  {guess.probability:7.2%}  {guess.name}" for guess in prediction.guesses]
    return "\n".join([str(prediction.path), *lines])


def run_predict(options: argparse.Namespace) -> int:
    """Print the likeliest classes of images."""
    weights = load_weights(options.model, ema=options.ema or None)
    network = build_encoder(weights).eval()
    if not network.num_classes:
        raise UserError(
            f"{weights.path}: holds an encoder without a classifier; fine-tune it with finetune.py first"
        )
    if options.top < 1:
        raise UserError(f"--top {options.top}: must be at least 1")
    tell_weights(weights)
    with blame(str(weights.path)):
        preprocessing = weights.preprocessing.completed(network)
    results: list[dict[str, Any]] = []
    unreadable = 0
    for outcome in classify(
        network.to(best_device()),
        read_images(options.images, network.in_chans),
        preprocessing=preprocessing,
        class_names=preprocessing.class_names,
        top=options.top,
    ):
        if isinstance(outcome, Unreadable):
            unreadable += 1
            say(f"error: {outcome.path}: {outcome.reason}")
        elif options.json:
            results.append({"image": str(outcome.path), "classes": [guess._asdict() for guess in outcome.guesses]})
        else:
            print(prediction_table(outcome))
    if options.json:
        print(json.dumps(results, indent=2))
    return 2 if unreadable else 0


def add_predict(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="print the likeliest classes of images",
        description="Print the likeliest classes of images, prepared as the model was evaluated.",
    )
    add_source(parser, "model", "MODEL")
    add_images(parser)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes for each image (5)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(run=run_predict)


# fcmae reconstruct


def free_path(folder: Path, stem: str, taken: set[Path]) -> Path:
    """Return FOLDER/STEM.png, or STEM-2.png and so on where that was written for another image."""
    path, number = folder / f"{stem}.png", 1
    while path in taken:
        number += 1
        path = folder / f"{stem}-{number}.png"
    taken.add(path)
    return path


def run_reconstruct(options: argparse.Namespace) -> int:
    """Draw what a pretrained model makes of images with parts hidden."""
    model, config = load_fcmae(options.run_folder)
    model = model.to(best_device())
    taken: set[Path] = set()
    unreadable = 0
    images = read_images(options.images, config.model.in_chans)
    with blame("--mask-ratios"):
        for outcome in reconstruct_images(model, images, config=config, mask_ratios=options.mask_ratios):
            if isinstance(outcome, Unreadable):
                unreadable += 1
                say(f"error: {outcome.path}: {outcome.reason}")
                continue
            options.output.mkdir(parents=True, exist_ok=True)
            path = free_path(options.output, outcome.path.stem, taken)
            Image.fromarray(outcome.picture).save(path)
            (height, width), (new_height, new_width) = outcome.before, outcome.after
            print(f"{path}  resized from {width} x {height} to {new_width} x {new_height}")
    return 2 if unreadable else 0


def add_reconstruct(commands: Any) -> None:
    parser = commands.add_parser(
        "reconstruct",
        help="draw what a pretrained model makes of images with parts hidden",
        description="Draw original | masked | reconstruction of images of any size, a row for each mask ratio. "
        "Images are resized, to about as many pixels as in training.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a pretraining run or checkpoint folder")
    add_images(parser)
    parser.add_argument(
        "--mask-ratios", nargs="+", type=float, default=[0.5, 0.6, 0.75], metavar="R", help="(0.5 0.6 0.75)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("reconstructions"), metavar="DIR", help="(reconstructions)"
    )
    parser.set_defaults(run=run_reconstruct)


# fcmae prepare


def run_prepare(options: argparse.Namespace) -> int:
    """Decode and shrink images once."""
    for name, least in (("size", 1), ("channels", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {least}")
    source = open_source(
        options.name,
        options.source,
        options.split,
        options.channels,
        whole_root=True,
        key="SOURCE",
        remedy="name one that is there with --split, or the folder of these images as SOURCE",
    )
    folder = options.output / options.split
    done = prepare(
        source,
        folder,
        root=options.source,
        channels=options.channels,
        short_side=options.size,
        num_workers=options.workers,
    )
    for image in done.bad:
        say(f"left out {image.name}: {image.reason}")
    left_out = f", {len(done.bad):,} left out that do not decode" if done.bad else ""
    state = "written" if done.written_shards else "complete and intact"
    print(f"{folder}: {done.num_images:,} images, {done.num_bytes / 1e6:,.0f} MB, {state}{left_out}")
    print(f"train with data.name=arrays data.root={options.output} data.split={options.split}")
    return 0


def add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="decode and shrink images once, for data.name=arrays",
        description="Decode images once, shrink them and write their pixels into OUT/SPLIT, with labels and class "
        "names, to be read with data.name=arrays data.root=OUT. The same command again goes on where it stopped, "
        "checks what is there and mends what is damaged.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder of images or a .tar, as data.root")
    parser.add_argument("output", metavar="OUT", type=Path, help="a folder; its SPLIT inside is new, or the same")
    parser.add_argument("--name", default="folder", help="as data.name: folder, or a dataset that timm opens")
    parser.add_argument("--split", default="train", help="as data.split (train)")
    parser.add_argument(
        "--size", type=int, default=256, metavar="PIXELS", help="short side of what is larger (256)"
    )
    parser.add_argument("--channels", type=int, default=3, metavar="N", help="1, 3 or 4, as model.in_chans (3)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one for each core)"
    )
    parser.set_defaults(run=run_prepare)


# The command


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fcmae", description="What comes before training and after it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_prepare, add_export, add_predict, add_reconstruct, add_evaluate):
        add(commands)
    options, rest = parser.parse_known_args(argv)  # sub-parsers cannot mix options and positionals by themselves
    several = next((name for name in ("overrides", "images") if hasattr(options, name)), None)
    unknown = [word for word in rest if word.startswith("-") or several is None]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if several is not None:
        setattr(options, several, [*getattr(options, several), *rest])
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
