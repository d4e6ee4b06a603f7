"""Images in, batches out: sources, views, sample-indexed randomness; knows no models."""

import torch

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError, OSError) as error:
    raise ImportError(
        f"the installed torchvision does not work with torch {torch.__version__} ({str(error).splitlines()[0]}): "
        "reinstall both together, pip install --upgrade --force-reinstall torch torchvision"
    ) from error

from fcmae.data.arrays import save_arrays
from fcmae.data.batches import (
    NOT_COUNTED,
    BadImage,
    CroppedBatch,
    EvaluationDataset,
    LabelledBatch,
    LabelledDataset,
    MaskedBatch,
    PretrainDataset,
    fixed_images,
    load_batches,
    prefetch,
    unreadable,
)
from fcmae.data.labels import labels_by
from fcmae.data.masks import save_masks
from fcmae.data.pixels import Reading
from fcmae.data.sampling import IndexStream, one_pass
from fcmae.data.sources import Source, open_source, overlap, share_of_each_class
from fcmae.data.tiles import cut
from fcmae.data.views import AugmentedView, Cover, PixelNormalizer, RandomView, cover
from fcmae.ops.resize_crops import resize_crops
from fcmae.seeding import derive_seed, reseed, seeded

__all__ = [
    "NOT_COUNTED",
    "AugmentedView",
    "BadImage",
    "Cover",
    "CroppedBatch",
    "EvaluationDataset",
    "IndexStream",
    "LabelledBatch",
    "LabelledDataset",
    "MaskedBatch",
    "PixelNormalizer",
    "PretrainDataset",
    "RandomView",
    "Reading",
    "Source",
    "cover",
    "cut",
    "derive_seed",
    "fixed_images",
    "labels_by",
    "load_batches",
    "one_pass",
    "open_source",
    "overlap",
    "prefetch",
    "reseed",
    "resize_crops",
    "save_arrays",
    "save_masks",
    "seeded",
    "share_of_each_class",
    "unreadable",
]
