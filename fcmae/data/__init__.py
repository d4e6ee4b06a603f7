"""Images in, batches out: sources, sample-indexed randomness, transforms; knows no models."""

import torch

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError, OSError) as error:
    raise ImportError(
        f"the installed torchvision does not work with torch {torch.__version__} ({str(error).splitlines()[0]}): "
        "reinstall both together, pip install --upgrade --force-reinstall torch torchvision"
    ) from error

from fcmae.data.batches import Batch, PretrainDataset, fixed_images, stream_batches, unreadable
from fcmae.data.sampling import IndexStream, derive_seed, seeded
from fcmae.data.sources import Source, labels_by, open_source, save_arrays
from fcmae.data.transforms import PixelNormalizer, cover, random_view

__all__ = [
    "Batch",
    "IndexStream",
    "PixelNormalizer",
    "PretrainDataset",
    "Source",
    "cover",
    "derive_seed",
    "fixed_images",
    "labels_by",
    "open_source",
    "random_view",
    "save_arrays",
    "seeded",
    "stream_batches",
    "unreadable",
]
