"""Datasets, samples and batches: an image, its mask or label, what could not be read; knows no model or split."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fcmae.data.sampling import PADDING, Key, spread
from fcmae.data.shared_memory import IN_HAND, Piped, choose_transport, free_shared_bytes, say_once, unpacked
from fcmae.data.sources import Source
from fcmae.data.tars import LostShard
from fcmae.data.views import RandomView, View, cover
from fcmae.data.workers import serving, starting
from fcmae.errors import UserError, brief, one_line
from fcmae.ops.resize_crops import resize_crops
from fcmae.seeding import seeded, torch_seeded
from fcmae.signals import serve_parent

SUBSTITUTES = 64
"""Draws for a substitute of an unreadable image before giving up."""

PREFETCH_FACTOR = 4
"""Batches that each worker has ready, at most."""

Loaded = TypeVar("Loaded")

NOT_COUNTED = -1
"""Label of what an evaluation leaves out: the padding of a last batch, and images that did not decode."""


class Described(Protocol):
    """What has images by index, each of which can be named."""

    def __len__(self) -> int: ...

    def describe(self, index: int, /) -> str: ...


class BadImage(NamedTuple):
    """An image that did not decode."""

    index: int
    name: str
    reason: str

    @classmethod
    def of(cls, index: int, source: Described, error: Exception) -> Self:
        if isinstance(error, LostShard):  # which is named, and counts, once for all its images
            return cls(error.first, one_line(error.name), f"{brief(error)}; all its images are left out")
        return cls(index, one_line(source.describe(index)), brief(error))


@dataclass(frozen=True)
class Sample:
    """One image with its randomness already spent."""

    image: Tensor
    """Pixels (c, h, w)."""
    index: int
    bad: tuple[BadImage, ...]


@dataclass(frozen=True)
class MaskedSample(Sample):
    """A sample of pretraining."""

    visible_ids: Tensor
    """int64 (p,)."""
    flipped: bool = False
    """Whether the image, a crop that the device resizes, is then flipped."""


@dataclass(frozen=True)
class LabelledSample(Sample):
    """A sample of fine-tuning."""

    label: np.ndarray | np.generic
    """Its row of the labels."""


@dataclass(frozen=True)
class Batch:
    """What every step sees."""

    images: Tensor
    """Pixels (b, c, h, w)."""
    indices: tuple[int, ...]
    """Of the samples in their source."""
    bad: tuple[BadImage, ...]
    """Images that did not decode; in training, others took their places."""

    def tensors(self) -> list[Tensor]:
        values = (getattr(self, field.name) for field in fields(self))
        return [value for value in values if isinstance(value, Tensor)]

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return a batch of changed tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})

    def pin_memory(self) -> Self:
        return self.each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to `device`, without waiting where the memory is pinned."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))


def _collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what all kinds of batches have of their samples, beside the images."""
    return {
        "indices": tuple(sample.index for sample in samples),
        "bad": tuple(bad for sample in samples for bad in sample.bad),
    }


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """What a step of pretraining sees."""

    visible_ids: Tensor
    """int64 (b, p)."""

    @classmethod
    def collate(cls, samples: Sequence[MaskedSample]) -> Self:
        images = torch.stack([sample.image for sample in samples])
        visible_ids = torch.stack([sample.visible_ids for sample in samples])
        return cls(**_collate(samples), images=images, visible_ids=visible_ids)


@dataclass(frozen=True)
class CroppedBatch(MaskedBatch):
    """A batch of pretraining whose crops the device resizes; `images` holds each in its upper left corner."""

    extents: Tensor
    """int32 (b, 2), height and width of each crop."""
    flipped: Tensor
    """bool (b,)."""
    size: tuple[int, int]
    """Height and width of the views."""

    @classmethod
    def collate_crops(cls, samples: Sequence[MaskedSample], size: tuple[int, int]) -> Self:
        extents = torch.tensor([sample.image.shape[1:] for sample in samples], dtype=torch.int32)
        height, width = extents.amax(0).tolist()
        first = samples[0].image
        images = torch.zeros(len(samples), height, width, first.shape[0], dtype=first.dtype)
        images = images.permute(0, 3, 1, 2)  # the order in which arrays have their pixels
        for canvas, sample in zip(images, samples, strict=True):
            canvas[:, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
        return cls(
            **_collate(samples),
            images=images,
            visible_ids=torch.stack([sample.visible_ids for sample in samples]),
            extents=extents,
            flipped=torch.tensor([sample.flipped for sample in samples]),
            size=size,
        )

    def to(self, device: torch.device) -> MaskedBatch:
        """Copy the tensors to `device` and resize the crops there, without waiting where the memory is pinned."""
        there = self.each(lambda tensor: tensor.to(device, non_blocking=True))
        images = resize_crops(there.images, there.extents, there.flipped, self.size)
        return MaskedBatch(images=images, indices=self.indices, bad=self.bad, visible_ids=there.visible_ids)


@dataclass(frozen=True)
class LabelledBatch(Batch):
    """What a step of fine-tuning, or an evaluation, sees."""

    labels: Tensor
    """int64 (b,), or of other tasks (b, columns); where an evaluation has nothing to count `NOT_COUNTED`, or NaN of
    floats."""

    @classmethod
    def collate(cls, samples: Sequence[LabelledSample]) -> Self:
        images = torch.stack([sample.image for sample in samples])
        labels = torch.from_numpy(np.stack([sample.label for sample in samples]))
        return cls(**_collate(samples), images=images, labels=labels)


def load_or_substitute(
    source: Described, index: int, load: Callable[[int], Loaded]
) -> tuple[Loaded, int, tuple[BadImage, ...]]:
    """Load image `index` or, where it does not decode, a random other; returns it, its index and what was bad.

    Raises:
        UserError: if none of `SUBSTITUTES` decodes.
    """
    bad: list[BadImage] = []
    for _ in range(SUBSTITUTES):
        state = torch.default_generator.get_state()
        try:
            return load(index), index, tuple(bad)
        except Exception as error:  # a broken file can make a decoder raise anything
            torch.default_generator.set_state(state)  # the same substitute, whether or not a part was drawn
            bad.append(BadImage.of(index, source, error))
            index = int(torch.randint(len(source), ()))
    raise UserError(
        f"{SUBSTITUTES} images drawn in a row did not decode, the first {bad[0].name}: {bad[0].reason}",
        everywhere=False,
    )


class TrainDataset(Dataset[Any]):
    """Images to train on, others in the places of those that do not decode.

    Args:
        source: the images.
        view: the augmentation.
        seed: of the run.
    """

    def __init__(self, source: Source, *, view: View, seed: int) -> None:
        self.source = source
        self.view = view
        self.seed = seed

    @property
    def images(self) -> Source:
        return self.source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def sample_bytes(self) -> int:
        """Of a sample's tensors, at most."""
        return self.source.channels * math.prod(self.view.size) * self.source.dtype.itemsize + 8

    def load(self, index: int) -> tuple[Tensor, int, tuple[BadImage, ...]]:
        """Load the part of image `index` that the view draws, or of a random other where it does not decode."""
        return load_or_substitute(self.source, index, lambda i: self.source.load_part(i, self.view.part))


LARGEST_CROP = 2
"""Sides of a crop, in those of the view, up to which it is left to the device to resize."""


class PretrainDataset(TrainDataset):
    """Samples by (epoch, index); crop, flip and mask depend on (seed, epoch, index) and nothing else.

    Args:
        source: the images.
        view: the augmentation.
        draw_ids: draws the visible ids (1, p) of one image from torch's default generator.
        seed: of the run.
        resize_on_device: leave it to the device to resize and flip the crops, a batch at a time.
    """

    def __init__(
        self,
        source: Source,
        *,
        view: RandomView,
        draw_ids: Callable[[], Tensor],
        seed: int,
        resize_on_device: bool = False,
    ) -> None:
        super().__init__(source, view=view, seed=seed)
        self.random_view = view
        self.draw_ids = draw_ids
        self.resize_on_device = resize_on_device

    @property
    def sample_bytes(self) -> int:
        pixels = math.prod(self.random_view.size)
        ids = pixels // 8  # of 8 bytes, one for a patch of 64 pixels or more
        larger = LARGEST_CROP**2 if self.resize_on_device else 1
        return self.source.channels * pixels * larger * self.source.dtype.itemsize + ids + 16

    def __getitem__(self, key: Key) -> MaskedSample:
        epoch, index = key
        with torch_seeded(self.seed, epoch, index):
            pixels, index, bad = self.load(index)
            if self.resize_on_device and self._is_small(pixels):
                flipped = self.random_view.flips()
                return MaskedSample(pixels, index, bad, self.draw_ids()[0], flipped)
            return MaskedSample(self.view.finish(pixels), index, bad, self.draw_ids()[0])

    def _is_small(self, pixels: Tensor) -> bool:
        sides = zip(pixels.shape[-2:], self.random_view.size, strict=True)
        return all(side <= LARGEST_CROP * wanted for side, wanted in sides)

    def collate(self, samples: Sequence[MaskedSample]) -> MaskedBatch:
        if self.resize_on_device:
            return CroppedBatch.collate_crops(samples, self.random_view.size)
        return MaskedBatch.collate(samples)


class LabelledDataset(TrainDataset):
    """Samples by (epoch, index) of a source with labels; the augmentation depends on (seed, epoch, index) alone.

    Args:
        labels: (n,) or (n, columns); None for the source's.
    """

    collate = staticmethod(LabelledBatch.collate)

    def __init__(self, source: Source, *, view: View, seed: int, labels: np.ndarray | None = None) -> None:
        super().__init__(source, view=view, seed=seed)
        labels = source.labels if labels is None else labels
        assert labels is not None
        self.labels = labels

    @property
    def sample_bytes(self) -> int:
        return super().sample_bytes + self.labels[0].nbytes

    def __getitem__(self, key: Key) -> LabelledSample:
        epoch, index = key
        with seeded(self.seed, epoch, index):
            image, index, bad = self.load(index)
            return LabelledSample(self.view.finish(image), index, bad, self.labels[index])


class EvaluationDataset(Dataset[LabelledSample]):
    """Samples by index, for counting; `PADDING` and what does not decode come as black images `NOT_COUNTED`.

    Args:
        source: the images.
        labels: int64 (n,), or of another task (n, columns), whole numbers or floats.
        class_names: by label, or by column.
        view: from an image (c, h, w) to `shape`, without randomness.
        shape: of the images that the model sees, (c, h, w).
    """

    collate = staticmethod(LabelledBatch.collate)

    def __init__(
        self,
        source: Source,
        labels: np.ndarray,
        *,
        class_names: Sequence[str],
        view: Callable[[Tensor], Tensor],
        shape: tuple[int, int, int],
    ) -> None:
        self.source = source
        self.labels = labels
        self.class_names = tuple(class_names)
        self.view = view
        self.shape = shape

    @property
    def images(self) -> Source:
        return self.source

    def __len__(self) -> int:
        return len(self.source)

    @property
    def sample_bytes(self) -> int:
        """Of a sample's tensors."""
        return math.prod(self.shape) * self.source.dtype.itemsize + self.labels[0].nbytes

    def __getitem__(self, index: int) -> LabelledSample:
        bad: tuple[BadImage, ...] = ()
        if index != PADDING:
            try:
                image = self.source.load(index)
            except Exception as error:  # a broken file can make a decoder raise anything
                bad = (BadImage.of(index, self.source, error),)
            else:
                return LabelledSample(self.view(image).contiguous(), index, bad, self.labels[index])
        nothing = np.full_like(self.labels[0], np.nan if self.labels.dtype.kind == "f" else NOT_COUNTED)
        return LabelledSample(torch.zeros(self.shape, dtype=self.source.dtype), index, bad, nothing)


class _PipedCollate:
    """A dataset's collation, for batches that come through pipes."""

    def __init__(self, collate: Callable[[Any], Batch]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Piped[Batch]:
        return Piped.of(self.collate(samples))


class Loadable(Protocol):
    """What can be loaded by index, such as images, or images with masks."""

    def __len__(self) -> int: ...

    def load(self, index: int, /) -> Any: ...

    def describe(self, index: int, /) -> str: ...


class Batched(Protocol):
    """A dataset of samples by key."""

    @property
    def sample_bytes(self) -> int:
        """Of a sample's tensors, at most."""
        ...

    @property
    def collate(self) -> Callable[[Any], Batch]:
        """Makes a batch of samples."""
        ...

    def __getitem__(self, key: Any, /) -> Sample: ...


def load_batches(
    dataset: Batched,
    keys: Iterable[Any],
    *,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Any]:
    """Yield a batch, of the dataset's kind, for each list of keys, loaded in `num_workers` processes.

    These processes leave the signals that stop a run to this one, and end with it. Where shared memory is too small
    for what they have ready, the same batches come another way; a line says so.

    Args:
        dataset: gives samples by key, and collates them.
        keys: lists of keys, the first as long as any; iterated twice.
        num_workers: processes; 0 loads in this one.
        pin_memory: whether the batches end in pinned memory.

    Raises:
        UserError: if nearly nothing decodes, or one of these processes died.
    """
    batch_bytes = dataset.sample_bytes * len(next(iter(keys), ())) if num_workers else 0
    queued_bytes = batch_bytes * (PREFETCH_FACTOR * num_workers + IN_HAND)
    num_workers, piped, line = choose_transport(num_workers, queued_bytes, free_shared_bytes())
    if line:
        say_once(line)
    with warnings.catch_warnings():  # of more workers than cores, which the story says in words of its own
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader: Any = DataLoader(  # of batches: collate_fn makes them, which its type does not know
            cast(Dataset[Any], dataset),
            batch_sampler=keys,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_PipedCollate(dataset.collate) if piped else dataset.collate,
            prefetch_factor=PREFETCH_FACTOR if num_workers else None,
            worker_init_fn=serve_parent if num_workers else None,
        )
        with starting() as workers:
            batches = iter(loader)
    try:
        with serving(workers):
            yield from map(unpacked, batches)
    except UserError as error:  # from a worker it arrives with a traceback, its own line last
        line = str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]
        raise UserError(line, everywhere=False) from error


def prefetch(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches on `device`; on CUDA the next one is copied, on a stream of its own, while one is used.

    There the copies overlap with the step where the batches lie in pinned memory. Elsewhere nothing is read ahead.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    side = torch.cuda.Stream(device)

    def ready(batch: Batch, copied: Any) -> Batch:
        present = torch.cuda.current_stream(device)
        present.wait_event(copied)
        for tensor in batch.tensors():
            tensor.record_stream(present)  # or its memory would be free for the next copy while it is still used
        return batch

    waiting = None
    for batch in batches:
        with torch.cuda.stream(side):
            following = batch.to(device), side.record_event()
        if waiting is not None:
            yield ready(*waiting)
        waiting = following
    if waiting is not None:
        yield ready(*waiting)


def load_spread(source: Loadable, number: int, view: Callable[[Any], Loaded]) -> list[Loaded]:
    """Return a view of `number` samples spread evenly over the source, without those that do not decode."""
    found: list[Loaded] = []
    for index in spread(len(source), number):
        try:
            found.append(view(source.load(index)))
        except Exception:  # training names the images that do not decode
            continue
    return found


def fixed_images(source: Source, number: int, size: tuple[int, int]) -> Tensor:
    """Return `number` readable images spread evenly over the source, pixels (n, c, h, w), always the same."""
    images = load_spread(source, number, lambda image: cover(image, size))
    return torch.stack(images) if images else torch.empty(0)


def unreadable(source: Loadable, checks: int) -> tuple[int, list[BadImage]]:
    """Try up to `checks` images spread evenly over the source: (number tried, those that do not decode)."""
    tried = spread(len(source), checks)
    bad: list[BadImage] = []
    for index in tried:
        try:
            source.load(index)
        except Exception as error:
            bad.append(BadImage.of(index, source, error))
    return len(tried), bad
