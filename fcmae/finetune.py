"""Fine-tune a ConvNeXt to classify labelled images (arXiv 2301.00808, section 5 and appendix A.1).

fcmae finetune --config atto init_from=runs/atto data.root=IMAGES output=runs/classifier
fcmae finetune --evaluate runs/classifier
accelerate launch -m fcmae.finetune --config atto init_from=runs/atto data.root=IMAGES output=runs/classifier
"""

import argparse
import math
import shlex
from dataclasses import replace
from pathlib import Path

from fcmae import arguments

if __name__ == "__main__":  # before torch is imported, so that the first line, or help, comes at once
    arguments.run("finetune")

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fcmae.config import FinetuneConfig, FinetuneRecipe, load_config, to_yaml
from fcmae.data import EvaluationDataset, LabelledBatch, PixelNormalizer, prefetch
from fcmae.encoder.base import Network
from fcmae.errors import UserError, blame
from fcmae.files import require_folder, require_free, write_json
from fcmae.load import adapt_channels, known_of, load_weights, require_network, resolve_recipe
from fcmae.patches import grid_shape
from fcmae.story import layer_rates, training_batches, try_run, with_kind
from fcmae.tasks import classification
from fcmae.tasks.classification import (
    Scores,
    build_classifier,
    build_loss,
    build_mixup,
    training_set,
    training_source,
)
from fcmae.training.checkpoint import Checkpoint
from fcmae.training.launch import start_accelerator, start_run
from fcmae.training.lock import Lock
from fcmae.training.log import MetricsLog
from fcmae.training.memory import require_batch, require_memory
from fcmae.training.optim import build_adamw
from fcmae.training.run_folder import RunFolder, require_disk, stored_model
from fcmae.training.schedule import Plan
from fcmae.training.summary import summarize
from fcmae.training.trainer import Trainer
from fcmae.visualize import draw_confusion, write_picture
from fcmae.weights.base import Preprocessing, build_encoder, load_network
from fcmae.weights.export import write_folder


def start_from(model: Network, source: str, class_names: tuple[str, ...]) -> str:
    """Load an encoder's weights and, where it has these classes, its classifier; returns what was done.

    What stands at GRN's place may be another (V2 paper, table 2f): it begins anew then. The first layer is adapted
    to another number of channels.

    Raises:
        UserError: if the weights are another network's.
    """
    weights = load_weights(source)
    response = known_of(weights, ["model.response"]).get("model.response")
    own_response = model.arguments.get("response")
    changed = response != own_response
    require_network(model, weights, source, may_differ=("in_chans", *(("response", "grn") if changed else ())))
    tensors, adapted = adapt_channels(weights, model)
    classes = weights.num_classes
    keep = classes == model.num_classes and weights.preprocessing.class_names in (None, class_names)
    head = f"its classifier of {classes} classes" if keep else f"a new classifier of {model.num_classes} classes"
    parts = [f"{weights.path} ({weights.description})", *([adapted] if adapted else []), head]
    if changed:
        parts.append(f"{own_response} in place of {response}")

    def is_new(name: str) -> bool:
        return (not keep and name.startswith(f"{model.classifier}.")) or (changed and ".grn." in name)

    own = {name: x for name, x in model.state_dict().items() if name.startswith(model.head_names) or is_new(name)}
    taken = {name: x for name, x in tensors.items() if not is_new(name)}
    load_network(model, own | taken, weights.path)
    return ", ".join(parts)


def evaluate(
    accelerator: Accelerator, model: Network, dataset: EvaluationDataset, config: FinetuneConfig
) -> Scores:
    """Score a classifier on all images of a set, spread over the processes, each counted once.

    Raises:
        UserError: if none of them could be read.
    """
    normalize = PixelNormalizer(config.data.mean, config.data.std, config.data.clip).to(accelerator.device)
    training = model.training
    model.eval()
    with accelerator.autocast(), blame(f"data.val_split={config.data.val_split}"):
        scores = classification.evaluate(
            lambda pixels: model.forward(normalize(pixels)),  # a compiled model is compiled for training's shapes
            dataset,
            num_classes=model.num_classes,
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
    model.train(training)
    return scores


def evaluate_weights(options: argparse.Namespace) -> int:
    """Print how well a classifier does; write it and its confusion matrix into the run's folder.

    What an earlier evaluation of the same run left is replaced; files elsewhere only with `--overwrite`.
    """
    source = Path(options.evaluate)
    own = RunFolder.around(source)
    if options.config is None:
        if own is None:
            raise UserError(
                f"--evaluate {source}: no run of finetune.py; give --config FILE with its images besides"
            )
        run = own
        recipe = load_config(FinetuneRecipe, run.config, options.overrides)
    else:
        recipe = load_config(FinetuneRecipe, options.config, options.overrides)
        run = RunFolder(recipe.output)
    if options.print_config:
        print(to_yaml(recipe), end="")
        return 0
    require_folder(run.path, f"output={run.path}")
    is_own = own is not None and own.path == run.path.resolve()
    for path in (run.evaluation, run.confusion):
        require_free(path, overwrite=options.overwrite or is_own)
    accelerator = start_accelerator(recipe.train.precision)
    ema = recipe.eval.ema if options.ema is None else options.ema
    weights = load_weights(source, last=options.last, ema=ema)
    config = recipe.resolve(known_of(weights, recipe.automatic), f"--evaluate {source}")
    model = build_encoder(weights).to(accelerator.device)
    if not model.num_classes:
        raise UserError(f"--evaluate {source}: {weights.kind} weights without a classifier; fine-tune them first")
    with blame("data.image_size"):
        grid_shape(config.data.size, model.patch_size)
    require_batch(config.data, model.in_chans, accelerator.device)
    dataset = classification.validation_set(config, weights.preprocessing.class_names, model.in_chans)
    if len(dataset.class_names) != model.num_classes:
        raise UserError(
            f"--evaluate {source}: classifies {model.num_classes} classes, but the images have "
            f"{len(dataset.class_names)}"
        )
    scores = evaluate(accelerator, model, dataset, config)
    if not math.isfinite(scores.loss):
        raise UserError(
            f"{weights.path}: finite weights that compute what is not; they are damaged, get them again"
        )
    if accelerator.is_main_process:
        run.path.mkdir(parents=True, exist_ok=True)
        write_picture(run.confusion, draw_confusion(scores.confusion, dataset.class_names))
        figures = {"weights": str(weights.path), "ema": weights.ema}
        write_json(run.evaluation, figures | classification.tabulate(scores, dataset.class_names))
        print(f"weights          {weights.path} ({weights.description})")
        print(classification.report(scores, dataset.class_names))
        print(f"\nconfusion matrix {run.confusion}")
    accelerator.end_training()
    return 0


def finetune(recipe: FinetuneRecipe, *, dry_run: bool = False) -> int:
    """Fine-tune as configured, or only try everything out; returns the exit code."""
    config, taken = resolve_recipe(recipe)
    with start_run(config, dry_run=dry_run) as (accelerator, checkpoint, lock):
        train(config, accelerator, checkpoint, lock, taken=taken, dry_run=dry_run)
    return 0


def train(
    config: FinetuneConfig,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
    lock: Lock | None,
    *,
    taken: str,
    dry_run: bool,
) -> None:
    """Do the work of a run that has begun; `taken` says which settings its weights chose."""
    # The images: labelled, and augmented by (seed, epoch, index)
    accelerator.print(f"opening          {config.data.root}", flush=True)
    source, class_names = training_source(config)
    config = with_kind(config, source)
    dataset = training_set(config, source)
    validation = None
    if config.data.val_split is not None:
        validation = classification.validation_set(config, class_names, config.model.in_chans, training=source)
    normalize = PixelNormalizer(config.data.mean, config.data.std, config.data.clip).to(accelerator.device)

    # The network: a dense ConvNeXt, pretrained, with a new classifier of small weights
    with torch.device("meta"):
        outline = build_classifier(config, len(class_names))
    require_memory(config, outline, accelerator.device)
    torch.manual_seed(config.train.seed)
    model = build_classifier(config, len(class_names))
    with blame("data.image_size"):
        grid_shape(config.data.size, model.patch_size)
    with blame("train.gradient_checkpointing"):
        model.gradient_checkpointing = config.train.gradient_checkpointing
    if checkpoint is None:
        started = start_from(model, config.init_from, class_names) if config.init_from else "from scratch"
    else:
        started = f"{checkpoint.path} (resumed)"
    if config.train.freeze_encoder:
        model.requires_grad_(False)
        model.classifier_layer.requires_grad_()
        model.eval()  # without drop path

    # The training: AdamW with smaller rates below, mixed images, smoothed labels, an EMA of the weights
    mix, classification_loss = build_mixup(config, len(class_names)), build_loss(config)

    def prepare(batch: LabelledBatch) -> LabelledBatch:
        images, targets = mix(normalize(batch.images), batch.labels)
        return replace(batch, images=images, labels=targets)

    def compute_loss(model: nn.Module, batch: LabelledBatch) -> Tensor:
        return classification_loss(model, batch.images, batch.labels)

    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(
            model,
            weight_decay=config.optim.weight_decay,
            betas=config.optim.betas,
            scales=layer_rates(model, config.optim),
        ),
        compute_loss=compute_loss,
        prepare=prepare,
        plan=Plan.of(config, len(source), accelerator.num_processes),
        config=config,
        ema_decay=config.train.ema_decay,
        facts={"class_names": list(class_names)},
        lock=lock,
    )
    trainer.say(f"weights          {started}")
    if taken:
        trainer.say(f"auto             {taken}")
    require_disk(config, model, trainer.plan, best=True, ema=config.train.ema_decay is not None)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    load = training_batches(trainer, dataset)
    if dry_run:
        sources = {"data": source, **({"validation": validation.source} if validation else {})}
        try_run(trainer, load, sources, classes=len(class_names))
        return

    # The evaluation: the weights and their EMA, side by side
    def score(step: int, log: MetricsLog | None) -> float:
        assert validation is not None
        scores = {"val": evaluate(accelerator, model, validation, config)}
        if trainer.ema is not None:
            scores["ema"] = evaluate(accelerator, trainer.ema.module, validation, config)
        trainer.say(" · ".join([f"step {step}", *(f"{name} {found}" for name, found in scores.items())]))
        if log is not None:
            figures = {f"{name}_{key}": v for name, found in scores.items() for key, v in found.figures.items()}
            log.record(step, figures)
        return scores["ema" if config.evaluates_ema else "val"].top1

    trainer.fit(
        prefetch(load(num_workers=config.data.num_workers), accelerator.device),
        evaluate=score if validation else None,
        evaluate_every=trainer.plan.steps_in(config.eval.every_epochs),
    )

    # What remains: the best classifier, as timm loads it where it can
    if accelerator.is_main_process:
        folder = trainer.run
        final = stored_model(folder.path)
        assert final is not None
        load_network(model, final.read(), final.file)
        preprocessing = Preprocessing.of(dict(config.data) | {"class_names": class_names})
        write_folder(model, preprocessing, folder.model)
        places = {"run folder": folder.path, "model": f"{folder.model} ({final.description})"}
        if trainer.best is not None:
            places["best"] = f"{folder.best} (step {trainer.best.step}, top-1 {trainer.best.score:.2%})"
        path = shlex.quote(str(folder.path))
        commands = [
            f"tensorboard --logdir {path}",
            *([f"fcmae finetune --evaluate {path}"] if validation else []),
            f"fcmae predict {path} IMAGES",
            f"fcmae export {path} --to onnx --output {path}-onnx",
        ]
        scores = {"top-1": "val_top1", "top-1 of the EMA": "ema_top1"}
        trainer.say(summarize(trainer, scores=scores, places=places, commands=commands))


def main(argv: list[str]) -> int:
    """Fine-tune or evaluate as the command line asks."""
    return arguments.finetune(argv)
