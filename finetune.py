"""Fine-tune a ConvNeXt V2 to classify labelled images (arXiv 2301.00808, section 5 and appendix A.1).

accelerate launch finetune.py --config configs/finetune/atto.yaml init_from=runs/atto data.root=IMAGES
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data.mixup import Mixup
from torch import Tensor, nn

from fcmae import ConvNeXtV2
from fcmae.checkpoint import find_weights, load_into, load_tensors
from fcmae.config import FinetuneConfig, load_config, to_yaml
from fcmae.convert import write_timm_folder
from fcmae.data import (
    Cover,
    EvaluationDataset,
    IndexStream,
    LabelledBatch,
    LabelledDataset,
    PixelNormalizer,
    Source,
    augmented_view,
    labels_by,
    load_batches,
    one_pass,
    open_source,
    share_of_each_class,
    unreadable,
)
from fcmae.engine import Plan, Trainer, claim_run_folder, rehearse, require_disk, start_accelerator
from fcmae.errors import UserError, blame, run_script
from fcmae.metrics import MetricsLog
from fcmae.optim import build_adamw, layer_scales
from fcmae.patches import grid_shape
from fcmae.scores import Scores, Tally


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a ConvNeXt V2 to classify labelled images.")
    parser.add_argument("--config", required=True, metavar="FILE", help="such as configs/finetune/atto.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, check the data, estimate time and memory; write nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as init_from=runs/atto")
    return parser.parse_intermixed_args(argv)


def labelled_source(config: FinetuneConfig) -> tuple[Source, tuple[str, ...]]:
    """Open the training images; returns them and the names of their classes.

    Raises:
        UserError: if they have no labels, or more classes than `model.num_classes`.
    """
    data = config.data
    source = open_source(data.name, data.root, data.split, config.model.in_chans)
    labels = labels_by(source, None, f"data.root={data.root}, split {data.split}")
    names = source.class_names or tuple(str(label) for label in range(int(labels.max()) + 1))
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(names):
        raise UserError(
            f"model.num_classes={wanted}: the training images have {len(names)} classes "
            f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); leave it null to take as many"
        )
    return share_of_each_class(source, data.label_fraction, config.train.seed), names


def validation_set(config: FinetuneConfig, class_names: tuple[str, ...]) -> EvaluationDataset | None:
    """Open the images to evaluate, labelled as in training; None where `data.val_split` is null.

    Raises:
        UserError: if there are none, or their classes are not those of training.
    """
    data = config.data
    if data.val_split is None:
        return None
    root = data.root if data.val_root is None else data.val_root
    what = f"data.val_split={data.val_split} of {root}"
    source = open_source(data.name, root, data.val_split, config.model.in_chans)
    labels = labels_by(source, class_names, what)
    missing = [name for name in class_names if source.class_names and name not in source.class_names]
    if missing:
        raise UserError(
            f"{what}: no images of {len(missing)} of the {len(class_names)} classes of training: "
            f"{', '.join(missing[:10])}; add them, or remove these classes from both"
        )
    if labels.max() >= len(class_names):
        raise UserError(f"{what}: has label {labels.max()}, but training has {len(class_names)} classes")
    view = Cover(data.size, data.crop_pct)
    return EvaluationDataset(source, labels, view=view, shape=(config.model.in_chans, *data.size))


def start_from(model: ConvNeXtV2, source: Path) -> str:
    """Load an encoder's weights and, where it has as many classes, its classifier; returns what was done."""
    path = find_weights(source)
    tensors = load_tensors(path)
    if any(name.startswith("encoder.") for name in tensors):
        tensors = {n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")}
    classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    keeps_head = classes == model.num_classes
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("norm.", "head."))}
    if not keeps_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    load_into(model, own | tensors, path)
    return f"{path}: {'with' if keeps_head else 'new classifier of'} {model.num_classes} classes"


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: EvaluationDataset,
    *,
    num_classes: int,
    config: FinetuneConfig,
) -> Scores:
    """Score a classifier on all images of a set, spread over the processes, each counted once."""
    keys = one_pass(
        len(dataset.labels),
        batch_size=config.data.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    batches = load_batches(
        dataset, keys, num_workers=config.data.num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(accelerator.device)
    tally = Tally(num_classes, accelerator.device)
    training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        for batch in batches:
            batch = batch.to(accelerator.device)
            # forward: a compiled model is compiled for training's shapes
            tally.add(model.forward(normalize(batch.images)), batch.labels)
    model.train(training)
    return tally.scores(functools.partial(accelerator.reduce, reduction="sum"))


def main(argv: list[str]) -> int:
    options = parse_arguments(argv)
    config = load_config(FinetuneConfig, options.config, options.overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return 0
    accelerator = start_accelerator(config.train.precision)
    checkpoint = None if options.dry_run else claim_run_folder(config)
    accelerator.wait_for_everyone()  # until every process has seen the folder as it was

    # The images: labelled, and augmented by (seed, epoch, index)
    source, class_names = labelled_source(config)
    with blame("data.auto_augment"):
        view = augmented_view(
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
    validation = validation_set(config, class_names)
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(accelerator.device)

    # The network: a dense ConvNeXt V2, pretrained, with a new classifier
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
    assert isinstance(model.head, nn.Linear)
    with torch.no_grad():
        model.head.weight.mul_(config.model.head_init_scale)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    started = "from scratch"
    if config.init_from and checkpoint is None:
        started = start_from(model, Path(config.init_from))
    if config.train.freeze_encoder:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        model.eval()  # no drop path
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
    if checkpoint is not None:
        trainer.restore(checkpoint)
    else:
        trainer.say(f"weights          {started}")
    stream = IndexStream(
        len(source),
        batch_size=config.data.batch_size,
        seed=config.train.seed,
        start=trainer.seen_images,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    batches = load_batches(
        dataset, stream, num_workers=config.data.num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    if options.dry_run:
        trainer.say(rehearse(trainer, batches))
        for name, images in (("data", source), ("validation", validation and validation.source)):
            if images is not None:
                tried, bad = unreadable(images, 64)
                trainer.say(f"{name:14} {tried} of {len(images):,} images tried, {len(bad)} unreadable")
                for image in bad:
                    trainer.say(f"               {image.name}: {image.reason}")
        return 0

    # The evaluation: the weights and their moving average, side by side
    def score(step: int, log: MetricsLog | None) -> float:
        assert validation is not None
        networks = {"val": model} | ({"ema": trainer.ema.module} if trainer.ema else {})
        scores = {
            name: evaluate(accelerator, network, validation, num_classes=len(class_names), config=config)
            for name, network in networks.items()
        }
        parts = [f"{name} top-1 {s.top1:.2%} top-5 {s.top5:.2%} loss {s.loss:.4f}" for name, s in scores.items()]
        trainer.say(f"step {step} · " + " · ".join(parts))
        if log is not None:
            figures = ("top1", "top5", "loss")
            log.record(step, {f"{name}_{key}": getattr(s, key) for name, s in scores.items() for key in figures})
        return scores["ema" if config.judge_ema else "val"].top1

    if trainer.step == trainer.plan.total_steps:
        trainer.say(f"{config.output} is finished already: delete it, or name another output, to run again")
    trainer.fit(
        batches,
        evaluate=score if validation else None,
        evaluate_every=trainer.plan.steps_in(config.eval.every_epochs),
    )

    # What remains: a classifier that timm loads
    if accelerator.is_main_process:
        final = trainer.ema.module if trainer.ema is not None and config.judge_ema else model
        assert isinstance(final, ConvNeXtV2)
        folder = Path(config.output, "model")
        write_timm_folder(final, folder, mean=config.data.mean, std=config.data.std, image_size=config.data.size)
        print(f"model            {folder}")
        print(f"curves           tensorboard --logdir {config.output}")
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
