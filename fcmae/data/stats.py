"""What a set of images is like: sizes, kinds, mean and std, percentiles, doubles; knows no model, draws nothing."""

import hashlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fcmae.data.batches import BadImage
from fcmae.data.images import ImageSource
from fcmae.data.pixels import FULL, kind_name
from fcmae.data.shared_memory import choose_transport, free_shared_bytes, say_once
from fcmae.data.sources import Source
from fcmae.errors import UserError, brief, one_line
from fcmae.files import require_regular

PERCENTILES = (0, 0.1, 1, 2, 50, 98, 99, 99.9, 100)
KEPT_BITS = 12
"""Bits of a float32's mantissa that a histogram tells apart, the leading one counted."""
ALIKE = 3
"""Bits of 64, in which hashes of images that look alike differ at most."""
BLOCKS = 6
"""That a hash is cut into; of two that differ in `ALIKE` bits, the other half of the blocks is the same."""
NEIGHBOURS = 64
"""Hashes with half of their bits in common, of which each is compared with so many."""
AT_ONCE = 64
"""Images of a piece of work, at most."""
MERGED = 64
"""Pieces of work that are put together at once."""
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


def difference_hash(pixels: np.ndarray) -> int:
    """Return 64 bits that hardly change when an image is resized, compressed again or brightened.

    Each says whether it gets brighter from one of 8 x 9 cells to the next on the right (the difference hash).

    Args:
        pixels: (c, h, w); NaN counts as zero.
    """
    cells = np.nan_to_num(pixels) if pixels.dtype == np.float32 else pixels
    for axis, number in ((1, 8), (2, 9)):
        edges = np.arange(number) * cells.shape[axis] // number
        sizes = np.diff(edges, append=cells.shape[axis]).clip(1)
        cells = np.add.reduceat(cells, edges, axis, np.float64) / (sizes[:, None] if axis == 1 else sizes)
    gray = cells.mean(0)
    return int(np.packbits(gray[:, 1:] > gray[:, :-1]).view(">u8")[0])


def look_at(index: int, source: Source) -> tuple[Facts, list[Histogram]]:
    """Return what is known of an image, and a histogram of each channel; raises whatever decoding raises."""
    kind, bands = source.stored(index) if isinstance(source, ImageSource) else (source.dtype, source.channels)
    pixels = source.load(index)
    channels = np.ascontiguousarray(pixels.numpy())
    moments, extremes, histograms = [], [], []
    for channel in channels.reshape(len(channels), -1):
        known = channel[~np.isnan(channel)] if channel.dtype == np.float32 else channel
        histogram = Histogram.of(known)
        if channel.dtype == np.float32:
            values, counts = known.astype(np.float64), np.ones(len(known))
        else:
            values, counts = histogram.keys / FULL[pixels.dtype], histogram.counts
        mean = values @ counts / max(len(known), 1)
        moments.append((len(known), mean, np.square(values - mean) @ counts))
        extremes.append((values.min(initial=math.inf), values.max(initial=-math.inf)))
        histograms.append(histogram)
    digest = hashlib.blake2b(f"{channels.shape}{channels.dtype}".encode(), digest_size=16)
    digest.update(channels.data)
    facts = Facts(
        index=np.array(index),
        size=np.array(pixels.shape[1:]),
        kind=np.array([*FULL].index(kind)),
        bands=np.array(bands),
        gray=np.array(
            len(channels) > 1 and all(np.array_equal(channels[0], other, equal_nan=True) for other in channels[1:])
        ),
        moments=np.array(moments).T,
        extremes=np.array(extremes).T,
        digest=np.frombuffer(digest.digest(), np.uint64),
        look=np.array(difference_hash(channels), np.uint64),
    )
    return facts, histograms


# All images, in several processes


class Survey(NamedTuple):
    """What was found in some images."""

    facts: Facts
    histograms: list[Histogram]
    """Of all known pixels, one for each channel."""

    @classmethod
    def merged(cls, parts: Sequence["Survey"]) -> "Survey":
        """Put several together, the images in their order."""
        facts = Facts(*map(np.concatenate, zip(*(part.facts for part in parts), strict=True)))
        order = np.argsort(facts.index)
        channels = zip(*(part.histograms for part in parts), strict=True)
        return cls(Facts(*(column[order] for column in facts)), [*map(Histogram.merged, channels)])


class _Pieces(Dataset[Any]):
    """Images of a source, some at a time: the work that processes share."""

    def __init__(self, source: Source, pieces: Sequence[Sequence[int]]) -> None:
        self.source = source
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, piece: int) -> tuple[Survey | None, list[BadImage]]:
        found: list[Survey] = []
        bad: list[BadImage] = []
        for index in self.pieces[piece]:
            try:
                facts, histograms = look_at(index, self.source)
            except Exception as error:  # a broken file can make a decoder raise anything
                bad.append(BadImage.of(index, self.source, error))
            else:
                found.append(Survey(Facts(*(column[None] for column in facts)), histograms))
        return (Survey.merged(found) if found else None), bad


def survey(source: Source, indices: Sequence[int], num_workers: int) -> tuple[Survey, list[BadImage]]:
    """Look at images of a source in `num_workers` processes, 0 for this one; also returns those that do not decode.

    Raises:
        UserError: if none does.
    """
    at_once = max(1, min(AT_ONCE, len(indices) // (4 * max(num_workers, 1))))
    pieces = [indices[start : start + at_once] for start in range(0, len(indices), at_once)]
    transport = choose_transport(num_workers, 0, free_shared_bytes())
    if transport.line:
        say_once(transport.line)
    loader: Any = DataLoader(
        _Pieces(source, pieces), batch_size=None, num_workers=transport.num_workers, in_order=False
    )
    parts: list[Survey] = []
    bad: list[BadImage] = []
    with tqdm(total=len(indices), unit=" images", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for found, not_decoded in loader:
            bad += not_decoded
            parts += [found] if found else []
            bar.update(len(not_decoded) + (len(found.facts.index) if found else 0))
            if len(parts) == MERGED:
                parts = [Survey.merged(parts)]
    bad.sort()
    if not parts:
        raise UserError(f"none of {len(bad)} images decodes, the first {bad[0].name}: {bad[0].reason}")
    return Survey.merged(parts), bad


# What it comes to


def percentile(values: np.ndarray, counts: np.ndarray, percent: float) -> float:
    """Return the least value that so much of the pixels do not exceed; numpy's method "inverted_cdf"."""
    total = np.cumsum(counts)
    return float(values[np.searchsorted(total, max(1, math.ceil(total[-1] * percent / 100 - 1e-6)))])


def clipped_moments(values: np.ndarray, counts: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Return mean and standard deviation of a histogram's pixels, clipped."""
    clipped = values.clip(low, high)
    mean = np.average(clipped, weights=counts)
    return float(mean), math.sqrt(np.average(np.square(clipped - mean), weights=counts))


def pairs_alike(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield arrays (m, 2) of pairs of places in different hashes (n,), uint64, that differ in at most `ALIKE` bits.

    Of `BLOCKS` blocks of bits such a pair has `BLOCKS - ALIKE` in common: it comes together where hashes are sorted
    by these, for one choice of them. A pair may be missed where over `NEIGHBOURS` hashes have half their bits in
    common; time grows as n log n.
    """
    edges = [64 * i // BLOCKS for i in range(BLOCKS + 1)]
    blocks = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    for chosen in itertools.combinations(blocks, BLOCKS - ALIKE):
        common = hashes & np.uint64(sum(chosen))
        order = np.lexsort((hashes, common))
        common, ordered = common[order], hashes[order]
        places = np.arange(len(hashes))
        for step in range(1, min(NEIGHBOURS, len(hashes))):
            places = places[places + step < len(hashes)]
            places = places[common[places] == common[places + step]]
            if not len(places):
                break
            differ = np.bitwise_count(ordered[places] ^ ordered[places + step])
            near = places[differ <= ALIKE]
            yield np.stack([order[near], order[near + step]], axis=1)


def join(number: int, pairs: Iterable[np.ndarray]) -> list[list[int]]:
    """Return the groups of two and more that arrays of pairs (m, 2) of `number` things join, each in order."""
    groups = np.arange(number)  # of each thing, one that comes before it in its group, or itself

    def first(thing: int) -> int:
        while groups[thing] != thing:
            thing = groups[thing]
        return thing

    for some in pairs:
        joined = groups[some]
        for one, other in joined[joined[:, 0] != joined[:, 1]].tolist():
            least, most = sorted((first(one), first(other)))
            groups[most] = least
        while (groups[groups] != groups).any():
            groups = groups[groups]
    order = np.argsort(groups, kind="stable")
    together = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    return [group.tolist() for group in together if len(group) > 1]


def find_doubles(facts: Facts, constant: np.ndarray) -> tuple[list[list[int]], list[list[int]]]:
    """Return groups of places of images with the same pixels, and of others that look alike, each in order."""
    _, firsts, members = np.unique(facts.digest, axis=0, return_index=True, return_inverse=True)
    places = np.arange(len(members))
    same = join(len(members), [np.stack([places, firsts[members.ravel()]], axis=1)])
    different = np.array([place for place in np.sort(firsts) if not constant[place]], np.int64)
    hashes, of_hash, own = np.unique(facts.look[different], return_index=True, return_inverse=True)
    equal = np.stack([np.arange(len(different)), of_hash[own]], axis=1)
    alike = join(len(different), itertools.chain([equal], (of_hash[pairs] for pairs in pairs_alike(hashes))))
    return same, [different[group].tolist() for group in alike]


# What is kept of it


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Sizes(_Record):
    """Height and width of images in pixels, as a person sees them."""

    least: tuple[int, int]
    """Of all heights, and of all widths."""
    median: tuple[int, int]
    most: tuple[int, int]
    most_frequent: tuple[int, int]
    most_frequent_images: int
    aspect: tuple[float, float, float]
    """Width / height: least, median, most."""

    @classmethod
    def of(cls, sizes: np.ndarray) -> "Sizes":
        """Describe sizes (n, 2)."""
        (frequent, number), *_ = Counter(map(tuple, sizes.tolist())).most_common(1)
        aspect = sizes[:, 1] / sizes[:, 0]
        least, median, most = ((int(h), int(w)) for h, w in (sizes.min(0), np.median(sizes, 0), sizes.max(0)))
        return cls(
            least=least,
            median=median,
            most=most,
            most_frequent=frequent,
            most_frequent_images=number,
            aspect=(float(aspect.min()), float(np.median(aspect)), float(aspect.max())),
        )


class Broken(_Record):
    """An image that does not decode."""

    name: str
    reason: str


Numbers = Annotated[tuple[float, ...], Field(min_length=1)]


class Statistics(_Record):
    """What `fcmae stats` found, as it is in its file; pixels are in units of the full range, as in `data.mean`."""

    format: Literal["fcmae stats 1"] = "fcmae stats 1"
    name: str
    """As `data.name`; and root and split."""
    root: str
    split: str
    num_images: int
    """Of the split."""
    looked_at: int
    broken: list[Broken]
    dtype: Literal["uint8", "uint16", "float32"]
    """How the pixels were read; and nodata, window."""
    nodata: float | Literal["nan"] | None
    window: bool
    in_chans: int
    kinds: dict[str, int]
    """Kind of the files' own pixels -> images."""
    channels: dict[int, int]
    """Number of the files' own channels -> images."""
    sizes: Sizes
    mean: Numbers
    """Of known pixels by channel, clipped where `clip` is."""
    std: Numbers
    clip: tuple[Numbers, Numbers] | None
    """Least and most by channel: the percentiles that were asked for."""
    percentiles: dict[str, Numbers]
    """Percent -> value by channel."""
    unknown: float
    """Share of pixels that are no-data."""
    gray: int
    """Images of several channels that are all the same."""
    constant: list[str]
    """Images of one value in each channel."""
    same: list[list[str]]
    """Groups of images with the same pixels."""
    alike: list[list[str]]
    """Groups of images that look alike."""

    @property
    def unit(self) -> str:
        """What pixels are in units of."""
        if self.dtype != "float32":
            return f"1.0 is {FULL[getattr(torch, self.dtype)]:.0f}"
        return "as in the files" if set(self.kinds) == {"float32"} else "1.0 is the full range of whole numbers"

    def section(self) -> dict[str, Any]:
        """Return what of a configuration's section `data` these statistics decide."""
        return {
            "dtype": self.dtype,
            "nodata": self.nodata,
            "window": self.window,
            "mean": [rounded(mean, std) for mean, std in zip(self.mean, self.std, strict=True)],
            "std": [rounded(std, std) or 1.0 for std in self.std],  # of a channel that is the same everywhere
            "clip": self.clip and [[*map(rounded, limits, self.std)] for limits in self.clip],
        }


def rounded(value: float, std: float, digits: int = 5) -> float:
    """Round a value to so many digits of a standard deviation, or of itself where that is zero."""
    size = std or abs(value)
    return round(value, digits - 1 - math.floor(math.log10(size))) if size else 0.0


def summarise(
    source: Source,
    found: Survey,
    *,
    clip: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return the fields of `Statistics` that images decide.

    Mean and standard deviation are exact to the rounding of float64, percentiles and clipped pixels exact for
    uint8 and uint16, and for float32 within 2^-12 of the value.

    Args:
        source: that was surveyed.
        found: in it.
        clip: percentiles, least and most, that pixels are clipped to before mean and standard deviation are taken.

    Raises:
        UserError: if nothing is known of a channel.
    """
    facts = found.facts
    numbers, means, squares = facts.moments.transpose(1, 0, 2)  # (n, c) each
    known = numbers.sum(0)
    if not known.all():
        raise UserError(f"{source.describe(0)} and all others: no pixel of channel {int(known.argmin())} is known")
    mean = (numbers * means).sum(0) / known
    std = np.sqrt((squares + numbers * np.square(means - mean)).sum(0) / known)
    least, most = facts.extremes[:, 0].min(0), facts.extremes[:, 1].max(0)
    ends: dict[float, np.ndarray] = {0: least, 100: most}
    channels = [
        (values_of(histogram, source.dtype).clip(low, high), histogram.counts)
        for histogram, low, high in zip(found.histograms, least, most, strict=True)
    ]

    def by_channel(percent: float) -> tuple[float, ...]:
        exact = ends.get(percent)
        return tuple(percentile(*channel, percent) for channel in channels) if exact is None else (*exact.tolist(),)

    limits = None
    if clip is not None:
        lows, highs = (np.array(by_channel(percent)) for percent in clip)
        highs = np.where(highs > lows, highs, lows + 1)  # nearly all of a channel is one value
        limits = (*lows.tolist(),), (*highs.tolist(),)
        mean, std = np.transpose(
            [clipped_moments(*c, *between) for c, *between in zip(channels, *limits, strict=True)]
        )
    constant = np.all(facts.extremes[:, 0] >= facts.extremes[:, 1], axis=1)
    same, alike = find_doubles(facts, constant)

    def names(places: Iterable[int]) -> list[str]:
        return [one_line(source.describe(int(facts.index[place]))) for place in places]

    kinds = [*map(kind_name, FULL)]
    return {
        "kinds": dict(Counter(kinds[kind] for kind in facts.kind).most_common()),
        "channels": dict(Counter(facts.bands.tolist()).most_common()),
        "sizes": Sizes.of(facts.size),
        "mean": tuple(mean.tolist()),
        "std": tuple(std.tolist()),
        "clip": limits,
        "percentiles": {f"{percent:g}": by_channel(percent) for percent in PERCENTILES},
        "unknown": 1 - float(known.sum() / (facts.size.prod(1).sum() * source.channels)),
        "gray": int(facts.gray.sum()),
        "constant": names(np.flatnonzero(constant)),
        "same": [names(group) for group in same],
        "alike": [names(group) for group in alike],
    }


def read_statistics(path: Path) -> Statistics:
    """Read what `fcmae stats` wrote.

    Raises:
        UserError: if it is none of that.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            return Statistics.model_validate_json(file.read(MOST_BYTES))
    except (OSError, ValueError) as error:
        what = (
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            if isinstance(error, ValidationError)
            else brief(error)
        )
        raise UserError(f"{path}: not what fcmae stats writes ({what}); data.stats names its stats.json") from error
