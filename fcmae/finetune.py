"""Fine-tune a ConvNeXt on labelled images (arXiv 2301.00808, section 5 and appendix A.1): classes, numbers, masks.

fcmae finetune --config atto init_from=runs/atto data.root=IMAGES output=runs/classifier
fcmae finetune --evaluate runs/classifier
accelerate launch -m fcmae.finetune --config atto init_from=runs/atto data.root=IMAGES output=runs/classifier
"""

import argparse
import functools
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fcmae import arguments

if __name__ == "__main__":  # before torch is imported, so that the first line, or help, comes at once
    arguments.run("finetune")

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fcmae.config import FinetuneConfig, FinetuneRecipe, load_config, to_yaml
from fcmae.data import LabelledBatch, PixelNormalizer, prefetch
from fcmae.encoder.base import Network
from fcmae.errors import UserError, blame
from fcmae.evaluation.inference import require_finite
from fcmae.files import make_folder, require_folder, require_free, write_json
from fcmae.find_lr import RateSweep, find_lr
from fcmae.load import describe_training, known_of, load_weights, resolve_recipe
from fcmae.patches import grid_shape
from fcmae.seeding import seeded
from fcmae.story import layer_rates, open_in_all, training_batches, try_run, with_kind
from fcmae.tasks.base import Evaluation, Scores, Task, score_images
from fcmae.tasks.known import TASKS
from fcmae.training.checkpoint import Checkpoint
from fcmae.training.launch import choose_batch, start_accelerator, start_run
from fcmae.training.lock import Lock
from fcmae.training.log import MetricsLog
from fcmae.training.memory import require_batch, require_memory
from fcmae.training.optim import build_adamw
from fcmae.training.run_folder import RunFolder, require_disk, stored_model
from fcmae.training.schedule import Plan
from fcmae.training.summary import summarize
from fcmae.training.trainer import Show, Trainer
from fcmae.visualize import write_picture
from fcmae.weights.base import Preprocessing, build_encoder
from fcmae.weights.export import write_folder


@contextmanager
def evaluating(accelerator: Accelerator, model: Network) -> Iterator[None]:
    """Inside, a network computes as in evaluation, in the run's precision."""
    training = model.training
    model.eval()
    with accelerator.autocast():
        yield
    model.train(training)


def evaluate(accelerator: Accelerator, model: Network, dataset: Evaluation, task: Task[Any]) -> Scores:
    """Score a network on all images of a set, spread over the processes, each counted once.

    Raises:
        UserError: if none of them could be read.
    """
    config = task.config
    normalize = PixelNormalizer(config.data.mean, config.data.std, config.data.clip).to(accelerator.device)
    with evaluating(accelerator, model), blame(f"data.val_split={config.data.val_split}"):
        return score_images(
            task,
            model,
            normalize,
            dataset,
            batch_size=config.data.batch_size,
            num_workers=config.data.num_workers,
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )


def evaluate_weights(options: argparse.Namespace) -> int:
    """Print how well a fine-tuned network does; write it and a picture of it into the run's folder.

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
    name, picture = TASKS[recipe.task].scores.picture[0], run.picture(TASKS[recipe.task].scores.picture[1])
    for path in (run.evaluation, picture, run.mistakes):
        require_free(path, overwrite=options.overwrite or is_own)
    accelerator = start_accelerator(recipe.train.precision)
    ema = recipe.eval.ema if options.ema is None else options.ema
    weights = load_weights(source, last=options.last, ema=ema)
    config = recipe.resolve(known_of(weights, recipe.automatic), f"--evaluate {source}")
    model = build_encoder(weights).to(accelerator.device)
    if not model.num_classes:
        raise UserError(f"--evaluate {source}: {weights.kind} weights without a classifier; fine-tune them first")
    if weights.preprocessing.task_name != config.task:
        raise UserError(
            f"--evaluate {source}: was trained for task={weights.preprocessing.task_name}, not task={config.task}"
        )
    with blame("data.image_size"):
        grid_shape(config.data.size, model.patch_size)
    require_batch(config.data, model.in_chans, accelerator.device)
    task = TASKS[config.task](config, weights.preprocessing.class_names)
    dataset = task.validation_set(model.in_chans)
    if len(dataset.class_names) != model.num_classes:
        raise UserError(
            f"--evaluate {source}: has {model.num_classes} {task.scores.outputs}, but the images have "
            f"{len(dataset.class_names)}"
        )
    scores = evaluate(accelerator, model, dataset, task)
    try:
        require_finite(torch.tensor([*scores.figures.values()]))
    except FloatingPointError as error:
        raise UserError(f"{weights.path}: {error}") from error
    if accelerator.is_main_process:
        run.path.mkdir(parents=True, exist_ok=True)
        write_picture(picture, scores.draw(dataset.class_names))
        mistakes = task.draw_mistakes(scores, dataset)
        if mistakes is not None:
            write_picture(run.mistakes, mistakes)
        else:
            run.mistakes.unlink(missing_ok=True)  # of an earlier evaluation
        figures = {"weights": str(weights.path), "ema": weights.ema}
        write_json(run.evaluation, figures | scores.tabulate(dataset.class_names))
        print(f"weights          {weights.path} ({weights.description})")
        print(scores.report(dataset.class_names))
        print(f"\n{name:16} {picture}")
        if mistakes is not None:
            print(f"{'worst mistakes':16} {run.mistakes}")
    accelerator.end_training()
    return 0


def finetune(recipe: FinetuneRecipe, *, dry_run: bool = False, lr_picture: Path | None = None) -> int:
    """Fine-tune as configured, or only try everything out; returns the exit code.

    With `lr_picture` find a learning rate instead, and draw loss against rate there.
    """
    config, taken = resolve_recipe(recipe)
    with (
        seeded(config.train.seed) if lr_picture else nullcontext(),
        start_run(config, dry_run=dry_run or lr_picture is not None) as (accelerator, checkpoint, lock),
    ):
        train(
            config,
            accelerator,
            checkpoint,
            lock,
            recipe=recipe,
            taken=taken,
            dry_run=dry_run,
            lr_picture=lr_picture,
        )
    return 0


def train(
    config: FinetuneConfig,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
    lock: Lock | None,
    *,
    recipe: FinetuneRecipe,
    taken: str,
    dry_run: bool,
    lr_picture: Path | None,
) -> None:
    """Do the work of a run that has begun.

    Args:
        recipe: says what may be chosen for its device.
        taken: says which settings its weights chose.
    """
    # The task and its images: labelled, and augmented by (seed, epoch, index)
    accelerator.print(f"opening          {config.data.root}", flush=True)
    data, kind = config.data, TASKS[config.task]
    task, dataset = open_in_all(
        f"data.root={data.root}",
        functools.partial(kind.open, config, checkpoint.state if checkpoint else None),
        lambda opened: opened[1].images,
    )
    config = with_kind(config, dataset.images)
    task = replace(task, config=config)
    validation = None
    if config.data.val_split is not None:
        validation = open_in_all(
            f"data.val_split={data.val_split}",
            functools.partial(task.validation_set, config.model.in_chans, training=dataset),
            lambda opened: opened.images,
        )
    normalize = PixelNormalizer(config.data.mean, config.data.std, config.data.clip).to(accelerator.device)

    # The network: a dense ConvNeXt, pretrained, with a new head
    with torch.device("meta"):
        outline = task.build()
    with blame("data.image_size"):
        grid_shape(config.data.size, outline.patch_size)
    with blame("train.gradient_checkpointing"):
        outline.gradient_checkpointing = config.train.gradient_checkpointing
    if config.train.freeze_encoder:
        outline.freeze()
    blank_step = functools.partial(task.blank_step, task.loss())
    config, batch_reason = choose_batch(
        config, recipe, outline, blank_step, accelerator=accelerator, checkpoint=checkpoint
    )
    task = replace(task, config=config)
    require_memory(config, outline, accelerator.device)
    torch.manual_seed(config.train.seed)
    model = task.build()
    model.gradient_checkpointing = config.train.gradient_checkpointing
    if checkpoint is None:
        started = task.start_from(model, config.init_from) if config.init_from else "from scratch"
    else:
        started = f"{checkpoint.path} (resumed)"
    if config.train.freeze_encoder:
        model.freeze()

    # The training: AdamW with smaller rates below, mixed images, smoothed labels, an EMA of the weights
    mix, task_loss = task.mix(), task.loss()

    def prepare(batch: LabelledBatch) -> LabelledBatch:
        images, labels = mix(normalize(batch.images), batch.labels)
        return replace(batch, images=images, labels=labels)

    def compute_loss(model: nn.Module, batch: LabelledBatch) -> Tensor:
        return task_loss(model, batch.images, batch.labels)

    plan = Plan.of(config, len(dataset), accelerator.num_processes)
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
        plan=RateSweep.instead_of(plan) if lr_picture else plan,
        config=config,
        ema_decay=config.train.ema_decay,
        facts=task.facts,
        batch_reason=batch_reason,
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
        sources = {"data": dataset.source, **({"validation": validation.source} if validation else {})}
        try_run(trainer, load, sources, **{task.scores.outputs: model.num_classes})
        return
    if lr_picture:
        find_lr(trainer, load, lr_picture)
        return

    # The evaluation: the weights and their EMA, side by side
    best_by = task.scores.overall[0]

    def score(step: int, log: MetricsLog | None) -> float:
        assert validation is not None
        scores = {"val": evaluate(accelerator, model, validation, task)}
        if trainer.ema is not None:
            scores["ema"] = evaluate(accelerator, trainer.ema.module, validation, task)
        trainer.say(" · ".join([f"step {step}", *(f"{name} {found}" for name, found in scores.items())]))
        if log is not None:
            figures = {f"{name}_{key}": v for name, found in scores.items() for key, v in found.figures.items()}
            log.record(step, figures)
        return scores["ema" if config.evaluates_ema else "val"].figures[best_by.key]

    # The pictures: what the network makes of always the same images, where that can be seen
    draw = task.pictures(validation or dataset)

    def show(step: int, log: MetricsLog) -> None:
        assert draw is not None
        shown = trainer.ema.module if trainer.ema is not None and config.evaluates_ema else model
        with evaluating(accelerator, shown):
            picture = draw(shown, normalize)
        path = trainer.run.prediction(step)
        make_folder(path.parent)
        write_picture(path, picture)
        log.picture("predictions", picture, step)

    every = trainer.plan.steps_in(config.eval.every_epochs)
    kinds = ("val", "ema") if trainer.ema is not None else ("val",)
    recorded = {figure.title: [f"{kind}_{figure.key}" for kind in kinds] for figure in task.scores.overall}
    trainer.fit(
        prefetch(load(num_workers=config.data.num_workers), accelerator.device),
        shows=[Show("pictures", every, show, trainer.run.predictions)] if draw else [],
        evaluate=score if validation else None,
        evaluate_every=every,
        scores=recorded if validation else None,
    )

    # What remains: the best model, as timm loads it where it can, and pictures to look at
    if accelerator.is_main_process:
        folder = trainer.run
        final = stored_model(folder.path)
        assert final is not None
        best = build_encoder(load_weights(folder.path))
        preprocessing = Preprocessing.of(dict(config.data) | {"class_names": task.names, "task": config.task})
        write_folder(best, preprocessing, folder.model, trained=describe_training(folder.path))
        places = {"run folder": folder.path, "model": f"{folder.model} ({final.description})"}
        if trainer.best is not None:
            places["best"] = (
                f"{folder.best} (step {trainer.best.step}, {best_by.title} {best_by.show(trainer.best.score)})"
            )
        if draw:
            places["predictions"] = folder.predictions
        path = shlex.quote(str(folder.path))
        commands = [
            *([f"fcmae finetune --evaluate {path}"] if validation else []),
            f"fcmae predict {path} IMAGES{task.predict_options.format(run=path)}",
            f"fcmae export {path} --to onnx --output {path}-onnx",
        ]
        scores = {best_by.title: f"val_{best_by.key}", f"{best_by.title} of the EMA": f"ema_{best_by.key}"}
        trainer.say(summarize(trainer, scores=scores, places=places, commands=commands, form=best_by.form))


def main(argv: list[str]) -> int:
    """Fine-tune or evaluate as the command line asks."""
    return arguments.finetune(argv)
