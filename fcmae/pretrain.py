"""Pretrain FCMAE on images without labels (arXiv 2301.00808, section 3).

fcmae pretrain --config atto data.root=IMAGES output=runs/atto
accelerate launch -m fcmae.pretrain --config atto data.root=IMAGES output=runs/atto
"""

import functools
import math
import shlex
from contextlib import nullcontext
from pathlib import Path

from fcmae import arguments

if __name__ == "__main__":  # before torch is imported, so that the first line, or help, comes at once
    arguments.run("pretrain")

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fcmae.config import ModelSection, PretrainConfig, PretrainRecipe, parse_config, shipped_configs
from fcmae.data import (
    MaskedBatch,
    PixelNormalizer,
    PretrainDataset,
    RandomView,
    Reading,
    cut,
    fixed_images,
    open_source,
    prefetch,
)
from fcmae.errors import UserError, blame
from fcmae.evaluation.diagnose import COLLAPSE_IMAGES, block_taps, stage_distances
from fcmae.evaluation.probes import extract_features, knn_accuracy, labelled_splits
from fcmae.files import make_folder
from fcmae.find_lr import RateSweep, find_lr
from fcmae.load import (
    adapt_channels,
    describe_training,
    load_tensors,
    load_weights,
    require_network,
    resolve_recipe,
)
from fcmae.model import FCMAE
from fcmae.patches import grid_shape
from fcmae.seeding import derive_seed, seeded
from fcmae.story import layer_rates, open_in_all, training_batches, try_run, with_kind
from fcmae.tensors import misfits
from fcmae.training.checkpoint import Checkpoint
from fcmae.training.launch import choose_batch, start_run
from fcmae.training.lock import Lock
from fcmae.training.log import MetricsLog
from fcmae.training.memory import require_memory
from fcmae.training.optim import build_adamw
from fcmae.training.run_folder import require_disk, stored_model
from fcmae.training.schedule import Plan
from fcmae.training.summary import summarize
from fcmae.training.trainer import Show, Trainer
from fcmae.training.watch import Watch
from fcmae.visualize import draw_mask_ratios, draw_reconstructions, write_picture
from fcmae.weights.base import Preprocessing, build_encoder, load_network
from fcmae.weights.export import write_folder
from fcmae.weights.official import decoder_of

SHOWN_RATIOS = (0.3, 0.6, 0.75, 0.9)
"""Mask ratios of pictures at the end of a run."""
SHOWN_AT_RATIOS = 4
"""Images of which such are drawn."""

DECODER_KEYS = ("decoder", "decoder_dim", "decoder_depth", "target")
"""Of a configuration's section `model`: what makes two decoders the same network."""


def start_from(model: FCMAE, config: ModelSection, source: str) -> str:
    """Load the weights of a whole FCMAE, ours or the official code's, or of any encoder; returns what was done.

    Those of an encoder for another number of channels are adapted; a decoder, which predicts them, begins anew.

    Raises:
        UserError: if the weights are another network's, or their decoder is another one.
    """
    weights, (file, tensors) = load_weights(source), load_tensors(source)
    require_network(model.encoder, weights, source, may_differ=("in_chans",))
    own, adapted = adapt_channels(weights, model.encoder)
    encoder = {name: value for name, value in own.items() if not name.startswith(model.encoder.head_names)}
    decoder = {} if adapted else decoder_of(tensors)
    has = f"init_from={source}: {weights.kind} weights with"
    otherwise = "or name the run's encoder/ to start with a new decoder"
    if decoder and (stored := stored_model(file)):
        run = parse_config(PretrainConfig, stored.state.config, str(file.parent)).model
        for key in DECODER_KEYS:
            if getattr(run, key) != getattr(config, key):
                raise UserError(f"{has} {key} {getattr(run, key)}; set model.{key} to that, {otherwise}")
    if decoder and (problems := misfits(model.decoder, decoder)):
        keys = ", ".join(f"model.{key}" for key in DECODER_KEYS)
        raise UserError(f"{has} another decoder ({'; '.join(problems[:3])}); set {keys} to its own, {otherwise}")
    load_network(model.encoder, encoder, weights.path)
    if decoder:
        load_network(model.decoder, decoder, weights.path)
    found = f"{weights.path} ({weights.description})"
    return ", ".join(filter(None, [found, adapted, "with its decoder" if decoder else "with a new decoder"]))


def finetuning_recipe(config: PretrainConfig, num_images: int, device: torch.device) -> str:
    """Return the name of the shipped configuration to fine-tune with after such a pretraining."""
    recipe = f"finetune/{config.model.variant}"
    if recipe in shipped_configs() and config.model.stem_stride == 4 and num_images > 100_000:
        return recipe
    return "finetune/small-folder-cpu" if device.type == "cpu" else "finetune/small-folder"


def pretrain(recipe: PretrainRecipe, *, dry_run: bool = False, lr_picture: Path | None = None) -> int:
    """Pretrain as configured, or only try everything out; returns the exit code.

    With `lr_picture` find a learning rate instead, and draw loss against rate there.
    """
    config, taken = resolve_recipe(recipe)
    with (
        seeded(config.train.seed) if lr_picture else nullcontext(),
        start_run(config, dry_run=dry_run or lr_picture is not None) as (accelerator, checkpoint, lock),
    ):
        if taken:
            accelerator.print(f"auto             {taken}")
        train(config, accelerator, checkpoint, lock, recipe=recipe, dry_run=dry_run, lr_picture=lr_picture)
    return 0


def train(
    config: PretrainConfig,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
    lock: Lock | None,
    *,
    recipe: PretrainRecipe,
    dry_run: bool,
    lr_picture: Path | None,
) -> None:
    """Do the work of a run that has begun; `recipe` says what may be chosen for its device."""
    # The network: a sparse ConvNeXt encoder and a light decoder
    build = functools.partial(FCMAE, **config.model.model_dump(), nodata=config.data.nodata is not None)
    with blame("model"), torch.device("meta"):
        outline = build()
    with blame("data.image_size"):
        draw_ids = outline.mask_sampler(grid_shape(config.data.size, outline.patch_size))
    with blame("train.gradient_checkpointing"):
        outline.encoder.gradient_checkpointing = config.train.gradient_checkpointing

    def blank_step(model: nn.Module, number: int, device: torch.device) -> Tensor:
        images = torch.empty(number, config.model.in_chans, *config.data.size, device=device)
        ids = torch.empty(number, draw_ids.num_visible, dtype=torch.int64, device=device)
        return model(images, ids).loss

    config, batch_reason = choose_batch(
        config, recipe, outline, blank_step, accelerator=accelerator, checkpoint=checkpoint
    )
    require_memory(config, outline, accelerator.device)
    torch.manual_seed(config.train.seed)
    with blame("model"):
        model = build()
    model.encoder.gradient_checkpointing = config.train.gradient_checkpointing
    if config.init_from and checkpoint is None:
        accelerator.print(f"weights          {start_from(model, config.model, config.init_from)}")

    # The images: cropped, flipped and masked by (seed, epoch, index)
    accelerator.print(f"opening          {config.data.root}", flush=True)
    data = config.data
    source = open_in_all(
        f"data.root={data.root}",
        lambda: open_source(
            data.name, data.root, data.split, config.model.in_chans, reading=Reading.of(config.data)
        ),
        lambda source: source,
    )
    config = with_kind(config, source)
    splits = None
    if config.eval.knn_every_epochs is not None:
        splits = labelled_splits(source, config.data, config.eval, config.model.in_chans)  # whole images
    if config.data.tile is not None:
        number, source = len(source), cut(source, config.data.tile, config.data.num_workers)
        accelerator.print(f"tiles            {len(source):,} of {number:,} images")
    dataset = PretrainDataset(
        source,
        view=RandomView(config.data.size, config.data.crop_scale, config.data.hflip),
        draw_ids=draw_ids,
        seed=config.train.seed,
        resize_on_device=accelerator.device.type == "cuda",
    )
    normalize = PixelNormalizer(config.data.mean, config.data.std, config.data.clip).to(accelerator.device)

    # The training: AdamW, warm-up, half a cosine; the loss is the error on hidden patches, where they are known
    def compute_loss(model: nn.Module, batch: MaskedBatch) -> Tensor:
        return model(normalize(batch.images, unknown=math.nan), batch.visible_ids).loss

    plan = Plan.of(config, len(source), accelerator.num_processes)
    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(
            model,
            weight_decay=config.optim.weight_decay,
            betas=config.optim.betas,
            scales={f"encoder.{name}": rate for name, rate in layer_rates(model.encoder, config.optim).items()},
            waiting=("encoder.", plan.steps_before(config.optim.decoder_first_epochs)),
        ),
        compute_loss=compute_loss,
        eager="MinkowskiEngine waits for the GPU" if config.model.layout == "minkowski" else "",
        plan=RateSweep.instead_of(plan) if lr_picture else plan,
        config=config,
        batch_reason=batch_reason,
        lock=lock,
    )
    require_disk(config, model, trainer.plan)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    load = training_batches(trainer, dataset)
    if dry_run:
        try_run(trainer, load, {"data": source})
        return
    if lr_picture:
        find_lr(trainer, load, lr_picture)
        return

    # The features, evaluated: labelled images, whose labels training never sees, classified by k-NN
    def score(step: int, log: MetricsLog | None) -> None:
        assert splits is not None
        model.eval()
        with accelerator.autocast():
            train, val = (
                extract_features(
                    lambda pixels: model.encoder(normalize(pixels)),
                    dataset,
                    batch_size=config.data.batch_size,
                    num_workers=config.data.num_workers,
                    device=accelerator.device,
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                    gather=accelerator.gather,
                )
                for dataset in (splits.train, splits.val)
            )
        model.train()
        if log is not None:
            (accuracy,) = knn_accuracy(train, val, splits.num_classes, neighbours=[20]).values()
            figures = {name: value for name, value in accuracy._asdict().items() if value is not None}
            left_out = len(splits.train) + len(splits.val) - len(train.labels) - len(val.labels)
            shown = [f"{name} {value:.2%}" for name, value in figures.items()]
            shown += [f"({left_out} images did not decode)"] if left_out else []
            trainer.say(f"step {step} · k-NN {' '.join(shown)}")
            log.record(step, {f"knn_{name}": value for name, value in figures.items()})

    # The pictures: original | masked | reconstruction of always the same images
    pixels = fixed_images(source, config.visualize.num_images, config.data.size)
    generator = torch.Generator().manual_seed(derive_seed(config.train.seed))
    ids = torch.cat([draw_ids(generator=generator) for _ in pixels]) if len(pixels) else torch.empty(0)

    def show(step: int, log: MetricsLog) -> None:
        picture = draw_reconstructions(model, normalize, pixels, ids, config.visualize.bands)
        path = trainer.run.reconstruction(step)
        make_folder(path.parent)
        write_picture(path, picture)
        log.picture("reconstructions", picture, step)
        if step == plan.total_steps:
            columns = [
                draw_mask_ratios(model, normalize, image, SHOWN_RATIOS, bands=config.visualize.bands)
                for image in pixels[:SHOWN_AT_RATIOS]
            ]
            write_picture(trainer.run.mask_ratios, np.concatenate(columns, axis=1))
            for i, picture in enumerate(columns, 1):
                log.picture(f"mask_ratios/image_{i}", picture, step)

    shows = []
    if len(pixels):
        shows.append(Show("pictures", config.visualize.every_steps, show, trainer.run.reconstructions))

    # The collapse of features: how alike channels are, on always the same images with all patches visible
    if config.eval.collapse_every_epochs is not None:
        if not (taps := block_taps(model.encoder, "act")):
            raise UserError(
                f"eval.collapse_every_epochs: no block of {config.model.variant} is known; set it to null"
            )
        watched = fixed_images(source, COLLAPSE_IMAGES, config.data.size)

        def watch(step: int, log: MetricsLog) -> None:
            batches = (normalize(part.to(accelerator.device)) for part in watched.split(config.data.batch_size))
            distances = stage_distances(model.encoder.features, model.encoder, taps, batches)
            trainer.say(f"step {step} · cosine distance by stage {' '.join(f'{d:.3f}' for d in distances)}")
            log.record(step, {f"cosine_distance/stage_{i}": d for i, d in enumerate(distances, 1)})

        if len(watched):
            shows.append(Show("feature collapse", trainer.plan.steps_in(config.eval.collapse_every_epochs), watch))

    curves: dict[str, list[str]] = {}
    if splits:
        curves["accuracy of k-NN"] = ["knn_top1", "knn_top5"]
    if config.eval.collapse_every_epochs is not None:
        curves["cosine distance of channels, by stage"] = [f"cosine_distance/stage_{i}" for i in range(1, 5)]
    trainer.fit(
        prefetch(load(num_workers=config.data.num_workers), accelerator.device),
        shows=shows,
        evaluate=score if splits else None,
        evaluate_every=trainer.plan.steps_in(config.eval.knn_every_epochs or 1),
        evaluate_first=True,
        scores=curves,
        watch=Watch(
            config,
            plan,
            accelerator.num_processes,
            flat_loss=1.0 if config.model.target == "pixels" and config.model.norm_pix_loss else None,
            score="knn_top1",
        ),
    )

    # What remains: weights for fine-tuning, and pictures to look at
    if accelerator.is_main_process:
        folder = trainer.run
        encoder = build_encoder(load_weights(folder.path, last=True))  # as the last checkpoint has it, whole
        preprocessing = Preprocessing.of(dict(config.data))
        write_folder(encoder, preprocessing, folder.encoder, trained=describe_training(folder.path, last=True))
        places = {"run folder": folder.path, "encoder": folder.encoder}
        if len(pixels):
            places["reconstructions"] = folder.reconstructions
        path = shlex.quote(str(folder.path))
        tuning = finetuning_recipe(config, len(source), accelerator.device)
        layers = "" if model.encoder.layer_depths else " optim.layer_decay=1"
        commands = [
            f"fcmae reconstruct {path} IMAGES --output {path}/panels",
            f"fcmae evaluate {path} --knn --linear --baseline data.root=LABELLED",
            f"fcmae finetune --config {tuning} init_from={path}{layers} data.root=LABELLED output={path}-finetuned",
        ]
        scores = {"k-NN top-1": "knn_top1"}
        trainer.say(summarize(trainer, scores=scores, places=places, commands=commands))


def main(argv: list[str]) -> int:
    """Pretrain as the command line asks."""
    return arguments.pretrain(argv)
