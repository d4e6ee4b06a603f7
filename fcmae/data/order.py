"""The order of an epoch's images, all over or shard by shard, from (seed, epoch) alone; reads nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fcmae.seeding import derive_seed

WINDOW = 1
"""Distinguishes the seeds of windows from those of samples, which are hashes of three numbers."""


@dataclass(frozen=True)
class Shards:
    """How images lie in shards, one shard's after the other's: what is cheaper read shard by shard."""

    counts: np.ndarray
    """int64 (shards,): images of each."""
    window: int
    """Shards whose images are shuffled together."""
    expect: Callable[[Sequence[Sequence[int]]], None]
    """Is told which shards come next: those of a window, then those of the next."""

    def of_images(self, chosen: np.ndarray) -> "Shards":
        """Return the same for some of the images, in ascending order."""
        return Shards(np.diff(chosen.searchsorted(self.counts.cumsum()), prepend=0), self.window, self.expect)

    def of_parts(self, ends: np.ndarray) -> "Shards":
        """Return the same for images of several parts each; `ends` counts those up to and with each image."""
        until = np.concatenate([[0], ends])[self.counts.cumsum()]
        return Shards(np.diff(until, prepend=0), self.window, self.expect)


class Order(Protocol):
    """Which image comes when; the same for everyone who asks."""

    def index(self, epoch: int, offset: int, /) -> int:
        """Return the image at a place of an epoch."""
        ...

    def expect(self, epoch: int, offset: int, /) -> None:
        """Say that images are read from this place on."""
        ...


class ShuffledAllOver:
    """A permutation of all images for each epoch."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.permutations: dict[int, np.ndarray] = {}

    def index(self, epoch: int, offset: int) -> int:
        if epoch not in self.permutations:
            self.permutations = {e: p for e, p in self.permutations.items() if e == epoch - 1}
            rng = np.random.default_rng(derive_seed(self.seed, epoch))
            self.permutations[epoch] = rng.permutation(self.num_samples)
        return int(self.permutations[epoch][offset])

    def expect(self, epoch: int, offset: int) -> None:
        pass


class ShuffledByShard:
    """A permutation of the shards for each epoch, and within each window of them one of their images.

    Every image comes once an epoch, and all of a shard within one window. Nothing kept is as long as the images are
    many, and any place of any epoch is found at once.
    """

    def __init__(self, shards: Shards, seed: int) -> None:
        self.shards = shards
        self.seed = seed
        self.firsts = shards.counts.cumsum() - shards.counts
        self.walks: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}
        self.windows: dict[tuple[int, int], np.ndarray] = {}
        self.expected: tuple[int, int] | None = None

    def walk(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return an epoch's windows, the shards of each, and the number of images up to and with each."""
        if epoch not in self.walks:
            rng = np.random.default_rng(derive_seed(self.seed, epoch))
            shards = rng.permutation(len(self.shards.counts))
            windows = np.split(shards, range(self.shards.window, len(shards), self.shards.window))
            ends = np.cumsum([self.shards.counts[window].sum() for window in windows])
            self.walks = {e: walk for e, walk in self.walks.items() if abs(e - epoch) == 1} | {
                epoch: (windows, ends)
            }
        return self.walks[epoch]

    def index(self, epoch: int, offset: int) -> int:
        windows, ends = self.walk(epoch)
        number = int(ends.searchsorted(offset, "right"))
        if (epoch, number) not in self.windows:
            ranges = [(int(self.firsts[s]), int(self.shards.counts[s])) for s in windows[number]]
            images = [np.arange(first, first + count) for first, count in ranges]
            rng = np.random.default_rng(derive_seed(self.seed, epoch, number, WINDOW))
            last = [*self.windows.items()][-1:]
            self.windows = dict(last) | {(epoch, number): rng.permutation(np.concatenate(images))}
        order = self.windows[epoch, number]
        return int(order[offset - int(ends[number]) + len(order)])

    def expect(self, epoch: int, offset: int) -> None:
        windows, ends = self.walk(epoch)
        number = int(ends.searchsorted(offset, "right"))
        if self.expected != (epoch, number):
            self.expected = epoch, number
            following = windows[number + 1] if number + 1 < len(windows) else self.walk(epoch + 1)[0][0]
            self.shards.expect([windows[number].tolist(), following.tolist()])
