"""Pretrain FCMAE on images without labels (arXiv 2301.00808, section 3).

fcmae pretrain --config atto data.root=IMAGES output=runs/atto
accelerate launch -m fcmae.pretrain --config atto data.root=IMAGES output=runs/atto
"""

import functools
from pathlib import Path

from fcmae import arguments

if __name__ == "__main__":  # before torch is imported, so that the first line, or help, comes at once
    arguments.run("pretrain")

import torch
from PIL import Image
from torch import Tensor, nn

from fcmae.config import PretrainConfig
from fcmae.data import (
    MaskedBatch,
    PixelNormalizer,
    PretrainDataset,
    RandomView,
    fixed_images,
    open_source,
    prefetch,
)
from fcmae.errors import blame
from fcmae.evaluation.probes import extract_features, knn_accuracy, labelled_splits
from fcmae.load import load_tensors, load_weights
from fcmae.masking import count_visible, sample_visible_ids
from fcmae.model import FCMAE
from fcmae.patches import grid_shape
from fcmae.seeding import derive_seed
from fcmae.story import training_batches, try_run
from fcmae.training.launch import start_run
from fcmae.training.log import MetricsLog
from fcmae.training.optim import build_adamw
from fcmae.training.run_folder import require_disk
from fcmae.training.schedule import Plan
from fcmae.training.trainer import Trainer
from fcmae.visualize import draw_reconstructions
from fcmae.weights.base import Preprocessing, load_network
from fcmae.weights.timm import write_timm_folder


def start_from(model: FCMAE, source: Path) -> None:
    """Load the weights of a whole FCMAE of ours, or of any ConvNeXt V2's encoder."""
    file, tensors = load_tensors(source)
    if any(name.startswith("decoder.pred.") for name in tensors):
        load_network(model, tensors, file)
    else:
        tensors = load_weights(source).tensors
        encoder = {n: tensor for n, tensor in tensors.items() if not n.startswith(("norm.", "head."))}
        load_network(model.encoder, encoder, file)


def pretrain(config: PretrainConfig, *, dry_run: bool = False) -> int:
    """Pretrain as configured, or only try everything out; returns the exit code."""
    accelerator, checkpoint = start_run(config, dry_run=dry_run)

    # The network: a sparse ConvNeXt V2 encoder and a light decoder
    torch.manual_seed(config.train.seed)
    with blame("model"):
        model = FCMAE(**dict(config.model))
    with blame("data.image_size"):
        grid = grid_shape(config.data.size, model.patch_size)
        count_visible(grid[0] * grid[1], config.model.mask_ratio)
    model.encoder.gradient_checkpointing = config.train.gradient_checkpointing
    if config.init_from and checkpoint is None:
        start_from(model, Path(config.init_from))
    require_disk(config, model)

    # The images: cropped, flipped and masked by (seed, epoch, index)
    source = open_source(config.data.name, config.data.root, config.data.split, config.model.in_chans)
    splits = None
    if config.eval.knn_every_epochs is not None:
        splits = labelled_splits(source, config.data, config.eval, config.model.in_chans)
    draw_ids = functools.partial(sample_visible_ids, 1, grid[0] * grid[1], config.model.mask_ratio)
    dataset = PretrainDataset(
        source,
        view=RandomView(config.data.size, config.data.crop_scale, config.data.hflip),
        draw_ids=draw_ids,
        seed=config.train.seed,
        resize_on_device=accelerator.device.type == "cuda",
    )
    normalize = PixelNormalizer(config.data.mean, config.data.std).to(accelerator.device)

    # The training: AdamW, warm-up, half a cosine; the loss is the error on hidden patches
    def compute_loss(model: nn.Module, batch: MaskedBatch) -> Tensor:
        return model(normalize(batch.images), batch.visible_ids).loss

    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=build_adamw(model, weight_decay=config.optim.weight_decay, betas=config.optim.betas),
        compute_loss=compute_loss,
        plan=Plan.of(config, len(source), accelerator.num_processes),
        config=config,
    )
    if checkpoint is not None:
        trainer.restore(checkpoint)
    load = training_batches(trainer, dataset)
    if dry_run:
        try_run(trainer, load, {"data": source})
        return 0

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
        if len(pixels):
            picture = draw_reconstructions(model, normalize, pixels, ids)
            path = trainer.run.reconstruction(step)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
            log.picture("reconstructions", picture, step)

    trainer.fit(
        prefetch(load(num_workers=config.data.num_workers), accelerator.device),
        show=show,
        show_every=config.visualize.every_steps,
        evaluate=score if splits else None,
        evaluate_every=trainer.plan.steps_in(config.eval.knn_every_epochs or 1),
        evaluate_first=True,
    )

    # What remains: weights for fine-tuning, and pictures to look at
    if accelerator.is_main_process:
        folder = trainer.run
        preprocessing = Preprocessing(config.data.mean, config.data.std, config.data.size)
        write_timm_folder(model.encoder, preprocessing, folder.encoder)
        print(f"encoder          {folder.encoder}")
        print(f"reconstructions  {folder.reconstructions}")
        print(f"curves           tensorboard --logdir {config.output}")
    accelerator.end_training()
    return 0


def main(argv: list[str]) -> int:
    """Pretrain as the command line asks."""
    return arguments.pretrain(argv)
