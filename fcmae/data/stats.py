"""What a set of images is like: sizes, kinds, mean and std, percentiles, doubles; knows no model, draws nothing."""

import hashlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fcmae.data.batches import BadImage
from fcmae.data.pixels import FULL, kind_name
from fcmae.data.shared_memory import choose_transport, free_shared_bytes, say_once
from fcmae.data.sources import Source
from fcmae.data.views import Part, whole
from fcmae.errors import UserError, brief
from fcmae.files import require_regular

PERCENTILES = (0, 0.1, 1, 2, 50, 98, 99, 99.9, 100)
KEPT_BITS = 12
"""Bits of a float32's mantissa that a histogram tells apart, the leading one counted."""
ALIKE = 3
"""Bits of 64, in which hashes of images that look alike differ at most."""
BLOCKS = 6
"""That a hash is cut into; of two that differ in `ALIKE` bits, the other half of the blocks is the same."""
NEIGHBOURS = 256
"""Hashes with half of their bits in common, of which each is compared with so many."""
AT_ONCE = 64
"""Images of a piece of work, at most."""
MOST_BYTES = 1 << 30
"""Of a file of statistics."""


# What is found in one image


class Facts(NamedTuple):
    """Of an image, as arrays; or of n images, with an axis n before."""

    index: np.ndarray
    size: np.ndarray
    """int64 (2,), height and width."""
    kind: np.ndarray
    """int64 (), the place of the file's own in `FULL`."""
    bands: np.ndarray
    """int64 ()."""
    gray: np.ndarray
    """bool (), whether there are several channels, all the same."""
    moments: np.ndarray
    """float64 (3, c): number of known pixels, their mean, and the sum of their squared deviations from it."""
    extremes: np.ndarray
    """float64 (2, c), least and most; infinities where nothing is known."""
    digest: np.ndarray
    """uint64 (2,), the same for the same pixels."""
    look: np.ndarray
    """uint64 (), see `difference_hash`."""


class Histogram(NamedTuple):
    """How many pixels of a channel have which value, or one so near that its leading bits are the same."""

    keys: np.ndarray
    """int64 (n,), sorted: values of uint8 and uint16, `float_keys` of float32."""
    counts: np.ndarray
    """int64 (n,)."""

    @classmethod
    def of(cls, pixels: np.ndarray) -> "Histogram":
        """Count pixels (n,) of any kind, none of them NaN."""
        if pixels.dtype == np.float32:
            return cls(*np.unique(float_keys(pixels), return_counts=True))
        counts = np.bincount(pixels)
        return cls(np.flatnonzero(counts), counts[counts > 0])

    @classmethod
    def merged(cls, parts: Sequence["Histogram"]) -> "Histogram":
        keys, places = np.unique(np.concatenate([part.keys for part in parts]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([part.counts for part in parts]), len(keys))
        return cls(keys, counts.astype(np.int64))


def float_keys(values: np.ndarray) -> np.ndarray:
    """Return float32 rounded to `KEPT_BITS` leading bits, as whole numbers in the same order.

    Whole numbers up to 2^12 stay what they are; the relative error of others is below 2^-12.
    """
    cut = 24 - KEPT_BITS
    bits = values.view(np.int32).astype(np.int64)
    size = ((bits & 0x7FFFFFFF) + (1 << (cut - 1))) >> cut
    return np.where(bits < 0, -size, size)


def float_values(keys: np.ndarray) -> np.ndarray:
    """Return the float64 that `float_keys` stand for."""
    bits = np.minimum(np.abs(keys) << (24 - KEPT_BITS), 0x7F7FFFFF).astype(np.int32)
    return np.sign(keys) * bits.view(np.float32).astype(np.float64)


def values_of(histogram: Histogram, dtype: torch.dtype) -> np.ndarray:
    """Return the values of a histogram of such pixels in units of the full range: float64 (n,)."""
    return float_values(histogram.keys) if dtype == torch.float32 else histogram.keys / FULL[dtype]


def difference_hash(pixels: Tensor) -> int:
    """Return 64 bits that hardly change when an image is resized, compressed again or brightened.

    Each says whether it gets brighter from one of 9 x 8 cells to the next on the right (the difference hash).

    Args:
        pixels: (c, h, w); what is not known counts as zero.
    """
    gray = pixels.float().nan_to_num().mean(0, keepdim=True)
    cells = F.adaptive_avg_pool2d(gray, (8, 9))[0]
    bits = (cells[:, 1:] > cells[:, :-1]).flatten().numpy()
    return int(np.packbits(bits).view(">u8")[0])


def look_into(pixels: Tensor) -> tuple[dict[str, Any], list[Histogram]]:
    """Return `Facts` of pixels (c, h, w) by name, and a histogram of each channel."""
    moments, extremes, histograms = [], [], []
    full = FULL[pixels.dtype]
    for channel in pixels.numpy():
        known = channel[~np.isnan(channel)] if channel.dtype == np.float32 else channel.ravel()
        exact = known.astype(np.float64) / full
        mean = exact.mean() if len(known) else 0.0
        moments.append((len(known), mean, np.square(exact - mean).sum()))
        extremes.append((exact.min(initial=math.inf), exact.max(initial=-math.inf)))
        histograms.append(Histogram.of(known))
    digest = hashlib.blake2b(f"{pixels.shape}{pixels.dtype}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()).data)
    return {
        "gray": len(pixels) > 1 and all(torch.equal(pixels[0], other) for other in pixels[1:]),
        "moments": np.array(moments).T,
        "extremes": np.array(extremes).T,
        "digest": np.frombuffer(digest.digest(), np.uint64),
        "look": np.uint64(difference_hash(pixels)),
    }, histograms


# All images, in several processes


class Survey(NamedTuple):
    """What was found in some images of a source."""

    facts: Facts
    """Of those that decode, in their order."""
    histograms: list[Histogram]
    """Of their known pixels, one for each channel."""
    bad: list[BadImage]
    """Those that do not decode."""

    @classmethod
    def merged(cls, parts: Sequence["Survey"], channels: int) -> "Survey":
        """Put several together; none is none."""
        columns = zip(*(part.facts for part in parts), strict=True) if parts else [np.empty(0)] * len(Facts._fields)
        facts = Facts(*map(np.concatenate, columns))
        order = np.argsort(facts.index)
        return cls(
            Facts(*(column[order] for column in facts)),
            [Histogram.merged([part.histograms[channel] for part in parts]) for channel in range(channels)],
            sorted(image for part in parts for image in part.bad),
        )


class _Work(Dataset[Survey]):
    """Images of a source, `AT_ONCE` at a time: the work that processes share."""

    def __init__(self, source: Source, indices: Sequence[int], at_once: int) -> None:
        self.source = source
        self.pieces = list(itertools.batched(indices, at_once))
