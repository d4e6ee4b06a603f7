"""Samples and batches of pretraining: an image, its mask, and what could not be read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fcmae.data.sampling import IndexStream, Key, seeded
from fcmae.data.sources import Source
from fcmae.data.transforms import cover
from fcmae.errors import UserError

SUBSTITUTES = 64
"""Draws for a substitute of an unreadable image before giving up."""


class BadImage(NamedTuple):
    """An image that did not decode."""

    index: int
    name: str
    reason: str

    @classmethod
    def of(cls, index: int, source: Source, error: Exception) -> Self:
        return cls(index, source.describe(index), " ".join(str(error).split()) or type(error).__name__)


@dataclass(frozen=True)
class Sample:
    """One image with its randomness already spent."""

    image: Tensor
    """uint8 (c, h, w)."""
    visible_ids: Tensor
    """int64 (p,)."""
    index: int
    bad: tuple[BadImage, ...]


@dataclass(frozen=True)
class Batch:
    """What a training step sees."""

    images: Tensor
    """uint8 (b, c, h, w)."""
    visible_ids: Tensor
    """int64 (b, p)."""
    indices: tuple[int, ...]
    """Of the samples in their source."""
    bad: tuple[BadImage, ...]
    """Images that did not decode; others took their places."""

    @classmethod
    def collate(cls, samples: list[Sample]) -> Self:
        return cls(
            torch.stack([sample.image for sample in samples]),
            torch.stack([sample.visible_ids for sample in samples]),
            tuple(sample.index for sample in samples),
            tuple(bad for sample in samples for bad in sample.bad),
        )

    def pin_memory(self) -> Self:
        return replace(self, images=self.images.pin_memory(), visible_ids=self.visible_ids.pin_memory())

    def to(self, device: torch.device) -> Self:
        """Copy the tensors to `device`, without waiting where the memory is pinned."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            visible_ids=self.visible_ids.to(device, non_blocking=True),
        )


class PretrainDataset(Dataset[Sample]):
    """Samples by (epoch, index); crop, flip and mask depend on (seed, epoch, index) and nothing else.

    Args:
        source: the images.
        view: augmentation of a uint8 image (c, h, w), drawing from torch's default generator.
        draw_ids: draws the visible ids (1, p) of one image from the same generator.
        seed: of the run.
    """

    def __init__(
        self,
        source: Source,
        *,
        view: Callable[[Tensor], Tensor],
        draw_ids: Callable[[], Tensor],
        seed: int,
    ) -> None:
        self.source = source
        self.view = view
        self.draw_ids = draw_ids
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def _load(self, index: int) -> tuple[Tensor, int, tuple[BadImage, ...]]:
        """Load image `index`, or a random other where it does not decode."""
        bad: list[BadImage] = []
        for _ in range(SUBSTITUTES):
            try:
                return self.source.load(index), index, tuple(bad)
            except Exception as error:  # a broken file can make a decoder raise anything
                bad.append(BadImage.of(index, self.source, error))
                index = int(torch.randint(len(self.source), ()))
        raise UserError(
            f"{SUBSTITUTES} images drawn in a row did not decode, the first {bad[0].name}: {bad[0].reason}",
            everywhere=False,
        )

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        with seeded(self.seed, epoch, index):
            image, index, bad = self._load(index)
            return Sample(self.view(image).contiguous(), self.draw_ids()[0], index, bad)


def stream_batches(
    dataset: PretrainDataset, stream: IndexStream, *, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield the endless batches of `stream`, loaded in `num_workers` processes.

    Raises:
        UserError: if nearly nothing decodes.
    """
    loader: Any = DataLoader(  # of batches: collate_fn makes them, which its type does not know
        dataset,
        batch_sampler=stream,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=Batch.collate,
        prefetch_factor=4 if num_workers else None,
    )
    try:
        yield from loader
    except UserError as error:  # from a worker it arrives with a traceback, its own line last
        line = str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]
        raise UserError(line, everywhere=False) from error


def spread(length: int, number: int) -> list[int]:
    """Return up to `number` different indices spread evenly over `length`."""
    return sorted({i * length // number for i in range(number)})


def fixed_images(source: Source, number: int, size: tuple[int, int]) -> Tensor:
    """Return `number` readable images spread evenly over the source, uint8 (n, c, h, w), always the same."""
    images: list[Tensor] = []
    for index in spread(len(source), number):
        try:
            images.append(cover(source.load(index), size))
        except Exception:  # training names the images that do not decode
            continue
    return torch.stack(images) if images else torch.empty(0)


def unreadable(source: Source, checks: int) -> tuple[int, list[BadImage]]:
    """Try up to `checks` images spread evenly over the source: (number tried, those that do not decode)."""
    tried = spread(len(source), checks)
    bad: list[BadImage] = []
    for index in tried:
        try:
            source.load(index)
        except Exception as error:
            bad.append(BadImage.of(index, source, error))
    return len(tried), bad
