"""Fine-tune a ConvNeXt V2 to classify labelled images (arXiv 2301.00808, section 5 and appendix A.1).

accelerate launch finetune.py --config configs/finetune/atto.yaml init_from=runs/atto data.root=IMAGES
accelerate launch finetune.py --evaluate RUN
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.data.mixup import Mixup
from torch import Tensor, nn
from tqdm import tqdm

from fcmae import ConvNeXtV2
from fcmae.config import FinetuneConfig, load_config, to_yaml
from fcmae.data import (
    AugmentedView,
    BadImage,
    Cover,
    EvaluationDataset,
    IndexStream,
    LabelledBatch,
    LabelledDataset,
    PixelNormalizer,
    Source,
    labels_by,
    load_batches,
    one_pass,
    open_source,
    overlap,
    prefetch,
    share_of_each_class,
    unreadable,
)
from fcmae.errors import UserError, blame, run_script
from fcmae.load import load_weights
from fcmae.patches import grid_shape
from fcmae.tasks.classification import Judged, Scores, confusion_matrix, judge, per_class, report, score
from fcmae.training.dry_run import rehearse
from fcmae.training.launch import start_accelerator
from fcmae.training.log import MetricsLog
from fcmae.training.optim import build_adamw, layer_scales
from fcmae.training.run_folder import claim_run_folder, require_disk
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer
from fcmae.visualize import draw_confusion
from fcmae.weights.base import Preprocessing, build_encoder, describe_encoder, encoder_shape, load_network
from fcmae.weights.timm import write_timm_folder


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a ConvNeXt V2 to classify labelled images.")
    parser.add_argument("--config", metavar="FILE", help="such as configs/finetune/atto.yaml")
    parser.add_argument(
        "--evaluate",
        metavar="SOURCE",
        help="score a run (its best checkpoint), a checkpoint, or with --config any classifier's weights, and stop",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, check the data, estimate time and memory; write nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as init_from=runs/atto")
    options = parser.parse_intermixed_args(argv)
    if options.config is None and options.evaluate is None:
        parser.error("one of --config and --evaluate is needed")
    return options


def numbered(number: int) -> tuple[str, ...]:
    """Names of classes that have none."""
    return tuple(str(label) for label in range(number))


def training_source(config: FinetuneConfig) -> tuple[Source, tuple[str, ...]]:
    """Open the training images; returns them and the names of their classes.

    Raises:
        UserError: if they have no labels, or not `model.num_classes` classes.
    """
    data = config.data
    source = open_source(data.name, data.root, data.split, config.model.in_chans)
    labels = labels_by(source, None, f"data.root={data.root}, split {data.split}")
    names = source.class_names or numbered(int(labels.max()) + 1)
    if config.model.num_classes not in (None, len(names)):
        shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        raise UserError(
            f"model.num_classes={config.model.num_classes}: the images of data.root={data.root} have {len(names)} "
            f"classes ({shown}); null takes as many as there are"
        )
    return source, names


def validation_set(
    config: FinetuneConfig, class_names: Sequence[str] | None, in_chans: int, training: Source | None = None
) -> EvaluationDataset:
    """Open the images to evaluate, labelled by `class_names`; None takes their own.

    Raises:
        UserError: if there are none, they are those of `training`, or their classes are not `class_names`.
    """
    data = config.data
    if data.val_split is None:
        raise UserError("data.val_split=null: there is nothing to evaluate; name a split")
    root = data.root if data.val_root is None else data.val_root
    key = "data.root" if data.val_root is None else "data.val_root"
    what = f"{key}={root}, data.val_split={data.val_split}"
    remedy = "name data.val_split or data.val_root, or data.val_split=null for none"
    whole_root = data.val_root is not None
    source = open_source(data.name, root, data.val_split, in_chans, whole_root=whole_root, key=key, remedy=remedy)
    if training is not None and data.val_split != data.split and overlap(training, source):
        raise UserError(f"{what}: training's own images would be evaluated; {remedy}")
    names = class_names or source.class_names
    labels = labels_by(source, names, what)
    missing = [name for name in names or () if source.class_names and name not in source.class_names]
    if missing:
        raise UserError(
            f"{what}: no images of {len(missing)} of the {len(names or ())} classes of training: "
            f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}; each class needs its folder there"
        )
    if names and labels.max() >= len(names):
        raise UserError(f"{what}: has label {labels.max()}, but there are {len(names)} classes, counted from 0")
    return EvaluationDataset(
        source,
        labels,
        class_names=names or numbered(int(labels.max()) + 1),
        view=Cover(data.size, data.crop_pct),
        shape=(in_chans, *data.size),
    )


def start_from(model: ConvNeXtV2, source: str, class_names: tuple[str, ...]) -> str:
    """Load an encoder's weights and, where it has these classes, its classifier; returns what was done.

    Raises:
        UserError: if the weights are another network's.
    """
    weights = load_weights(source)
    tensors = weights.tensors
    stem = tensors["downsample_layers.0.0.weight"]
    found = {"variant": encoder_shape(tensors), "in_chans": stem.shape[1], "stem_stride": stem.shape[2]}
    wanted = {"variant": (model.depths, model.dims), "in_chans": model.in_chans, "stem_stride": model.stem_stride}
    for key, value in found.items():
        if value != wanted[key]:
            value = describe_encoder(tensors) if key == "variant" else value
            raise UserError(
                f"init_from={source}: {weights.kind} weights with {key} {value}; set model.{key} to that"
            )
    classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    keep = classes == model.num_classes and weights.preprocessing.class_names in (None, class_names)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("norm.", "head."))}
    taken = {name: tensor for name, tensor in tensors.items() if keep or not name.startswith("head.")}
    load_network(model, own | taken, weights.path)
    head = f"its classifier of {classes} classes" if keep else f"a new classifier of {model.num_classes} classes"
    return f"{weights.path} ({weights.description}), {head}"


def evaluate(
    accelerator: Accelerator, model: nn.Module, dataset: EvaluationDataset, config: FinetuneConfig
) -> Scores:
    """Score a classifier on all images of a set, spread over the processes, each counted once.

    Raises:
        UserError: if none of them could be read.
    """
    keys = one_pass(
        len(dataset),
        batch_size=config.data.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    batches = load_batches(
        dataset, keys, num_workers=config.data.num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    hidden = not (accelerator.is_main_process and sys.stderr.isatty())
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(accelerator.device)
    judged: list[Judged] = []
    bad: list[BadImage] = []
    training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        for batch in tqdm(batches, "evaluating", len(keys), leave=False, dynamic_ncols=True, disable=hidden):
            bad += batch.bad
            batch = batch.to(accelerator.device)
            # forward: a compiled model is compiled for training's shapes
            judged.append(judge(model.forward(normalize(batch.images)), batch.labels))
    model.train(training)
    if bad:
        tqdm.write(f"not counted: {len(bad)} images that do not decode, the first {bad[0].name}: {bad[0].reason}")
    columns = [torch.cat(column) for column in zip(*judged, strict=True)]
    with blame(f"data.val_split={config.data.val_split}"):
        return score(*(accelerator.gather(column).cpu().numpy() for column in columns))  # pyright: ignore[reportAttributeAccessIssue]


def evaluate_weights(options: argparse.Namespace) -> int:
    """Print how well a classifier does; write it and its confusion matrix into the run's folder."""
    source = Path(options.evaluate)
    if options.config is None:
        real = source.resolve()
        run = real.parent.parent if real.parent.name == "checkpoints" else real
        run = real.parent if real.name == "model" else run
        if not (run / "config.yaml").is_file():
            raise UserError(
                f"--evaluate {source}: no run of finetune.py; give --config FILE with its images besides"
            )
        config = load_config(FinetuneConfig, run / "config.yaml", options.overrides)
    else:
        config = load_config(FinetuneConfig, options.config, options.overrides)
        run = Path(config.output)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    accelerator = start_accelerator(config.train.precision)
    weights = load_weights(source, ema=config.eval.ema)
    model = build_encoder(weights).to(accelerator.device)
    if not model.num_classes:
        raise UserError(f"--evaluate {source}: {weights.kind} weights without a classifier; fine-tune them first")
    with blame("data.image_size"):
        grid_shape(config.data.size, model.patch_size)
    dataset = validation_set(config, weights.preprocessing.class_names, model.in_chans)
    if len(dataset.class_names) != model.num_classes:
        raise UserError(
            f"--evaluate {source}: classifies {model.num_classes} classes, but the images have "
            f"{len(dataset.class_names)}"
        )
    scores = evaluate(accelerator, model, dataset, config)
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        confusion = confusion_matrix(scores, model.num_classes)
        Image.fromarray(draw_confusion(confusion, dataset.class_names)).save(run / "confusion.png")
        figures = {"weights": str(weights.path), "ema": weights.ema, "images": len(scores.labels)}
        figures |= {name: getattr(scores, name) for name in ("top1", "top5", "loss")}
        table = {name: column.tolist() for name, column in per_class(confusion).items()}
        figures["classes"] = {"names": list(dataset.class_names)} | table
        (run / "evaluation.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
        print(f"weights          {weights.path} ({weights.description})")
        print(report(scores, dataset.class_names))
        print(f"\nconfusion matrix {run / 'confusion.png'}")
    accelerator.end_training()
    return 0


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    if options.evaluate is not None:
        return evaluate_weights(options)
    config = load_config(FinetuneConfig, options.config, options.overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    accelerator = start_accelerator(config.train.precision)
    checkpoint = None if options.dry_run else claim_run_folder(config)
    accelerator.wait_for_everyone()  # until every process has seen the folder as it was

    # The images: labelled, and augmented by (seed, epoch, index)
    source, class_names = training_source(config)
    validation = None
    if config.data.val_split is not None:
        validation = validation_set(config, class_names, config.model.in_chans, training=source)
    source = share_of_each_class(source, config.data.label_fraction, config.train.seed)
    with blame("data.auto_augment"):
        view = AugmentedView(
            config.data.size,
            crop_scale=config.data.crop_scale,
            crop_padding=config.data.crop_padding,
            hflip=config.data.hflip,
            auto_augment=config.data.auto_augment,
            erase_prob=config.data.erase_prob,
            mean=config.data.mean,
            std=config.data.std,
        )
    dataset = LabelledDataset(source, view=view, seed=config.train.seed)
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(accelerator.device)

    # The network: a dense ConvNeXt V2, pretrained, with a new classifier of small weights
    torch.manual_seed(config.train.seed)
    with blame("model"):
        model = ConvNeXtV2(
            config.model.variant,
            in_chans=config.model.in_chans,
            num_classes=len(class_names),
            stem_stride=config.model.stem_stride,
            drop_path=config.model.drop_path,
        )
    with blame("data.image_size"):
        grid_shape(config.data.size, model.patch_size)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    assert isinstance(model.head, nn.Linear)
    with torch.no_grad():
        model.head.weight.mul_(config.model.head_init_scale)
    if checkpoint is None:
        started = start_from(model, config.init_from, class_names) if config.init_from else "from scratch"
    else:
        started = f"{checkpoint.path} (resumed)"
    if config.train.freeze_encoder:
        model.requires_grad_(False)
        model.head.requires_grad_()
        model.eval()  # without drop path
    require_disk(Path(config.output), model, config.checkpoint.keep + 1, ema=config.train.ema_decay is not None)

    # The training: AdamW with smaller rates below, mixed images, smoothed labels, a moving average of the weights
    mixup = None
    if config.data.mixup or config.data.cutmix:
        mixup = Mixup(config.data.mixup, config.data.cutmix, label_smoothing=0.0, num_classes=len(class_names))

    def compute_loss(model: nn.Module, batch: LabelledBatch) -> Tensor:
        images, targets = normalize(batch.images), batch.labels
        if mixup is not None:
            images, targets = mixup(images, targets)
        return F.cross_entropy(model(images), targets, label_smoothing=config.train.label_smoothing)

    scales = layer_scales(
        (name for name, _ in model.named_parameters()),
        model.depths,
        decay=config.optim.layer_decay,
        decay_type=config.optim.layer_decay_type,
    )
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(
            model, weight_decay=config.optim.weight_decay, betas=config.optim.betas, scales=scales
        ),
        compute_loss=compute_loss,
        plan=Plan.of(config, len(source), accelerator.num_processes),
        config=config,
        ema_decay=config.train.ema_decay,
        facts={"class_names": list(class_names)},
    )
    trainer.say(f"weights          {started}")
    if checkpoint is not None:
        trainer.restore(checkpoint)
    stream = IndexStream(
        len(source),
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        start=trainer.seen_images,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    load = functools.partial(load_batches, dataset, stream, pin_memory=accelerator.device.type == "cuda")
    if options.dry_run:
        trainer.say(rehearse(trainer, load))
        trainer.say(f"classes        {len(class_names)}")
        for name, images in {"data": source, **({"validation": validation.source} if validation else {})}.items():
            tried, bad = unreadable(images, 64)
            trainer.say(f"{name:14} {tried} of {len(images):,} images tried, {len(bad)} unreadable")
            for image in bad:
                trainer.say(f"               {image.name}: {image.reason}")
        return 0

    # The evaluation: the weights and their moving average, side by side
    def rate(step: int, log: MetricsLog | None) -> float:
        assert validation is not None
        scores = {"val": evaluate(accelerator, model, validation, config)}
        if trainer.ema is not None:
            scores["ema"] = evaluate(accelerator, trainer.ema.module, validation, config)
        told = [f"{name} top-1 {s.top1:.2%} top-5 {s.top5:.2%} loss {s.loss:.4f}" for name, s in scores.items()]
        trainer.say(f"step {step} · {' · '.join(told)}")
        if log is not None:
            figures = ("top1", "top5", "loss")
            log.record(step, {f"{name}_{key}": getattr(s, key) for name, s in scores.items() for key in figures})
        return scores["ema" if config.judge_ema else "val"].top1

    if trainer.step == trainer.plan.total_steps:
        trainer.say(f"{config.output} is finished already: delete it, or name another output, to run again")
    trainer.fit(
        prefetch(load(num_workers=config.data.num_workers), accelerator.device),
        evaluate=rate if validation else None,
        evaluate_every=trainer.plan.steps_in(config.eval.every_epochs),
    )

    # What remains: a classifier that timm loads
    if accelerator.is_main_process:
        final = trainer.ema.module if trainer.ema is not None and config.judge_ema else model
        assert isinstance(final, ConvNeXtV2)
        folder = Path(config.output, "model")
        data = config.data
        preprocessing = Preprocessing(data.mean, data.std, data.size, data.crop_pct, class_names=class_names)
        write_timm_folder(final, preprocessing, folder)
        print(f"model            {folder}{' (EMA)' if final is not model else ''}")
        if trainer.best is not None:
            best = Path(config.output, "checkpoints", "best")
            print(f"best             {best} (step {trainer.best.step}, top-1 {trainer.best.score:.2%})")
        print(f"curves           tensorboard --logdir {config.output}")
    accelerator.end_training()
    return 0


def run() -> None:
    """Entry point of the script and of `python -m`."""
    sys.exit(run_script(main))


if __name__ == "__main__":
    run()
