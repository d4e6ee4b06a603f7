"""Order and randomness as pure functions of (seed, epoch, index): no worker, process or restart changes them."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from fcmae.seeding import derive_seed

Key = tuple[int, int]
"""(epoch, sample index): all that a sample's augmentation depends on, besides the seed."""


class IndexStream(Sampler[list[Key]]):
    """One process's endless batches of (epoch, index) keys, from image number `start` of the run on.

    The run is one sequence of images, epoch after epoch, each a permutation that depends on (seed, epoch). Image
    number n belongs to update n // (images per update), wherever it is computed: processes take consecutive
    slices of each micro-batch. Batches may cross from one epoch into the next, so every image is seen exactly
    once per epoch, and a set may be smaller than a batch.
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng(derive_seed(self.seed, epoch)).permutation(self.num_samples)

    def __iter__(self) -> Iterator[list[Key]]:
        permutations: dict[int, np.ndarray] = {}
        first = self.start + self.rank * self.batch_size
        while True:
            keys: list[Key] = []
            for position in range(first, first + self.batch_size):
                epoch, offset = divmod(position, self.num_samples)
                if epoch not in permutations:
                    permutations = {e: p for e, p in permutations.items() if e == epoch - 1}
                    permutations[epoch] = self._permutation(epoch)
                keys.append((epoch, int(permutations[epoch][offset])))
            yield keys
            first += self.batch_size * self.world_size


PADDING = -1
"""Index of no sample, which fills the last batch of a pass."""


def one_pass(num_samples: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Return one process's batches of a pass over all indices, in order, each index in one process's batches once.

    All processes get the same number of batches, all of `batch_size`, filled with `PADDING`.
    """
    together = batch_size * world_size
    padded = [*range(num_samples), *[PADDING] * (-num_samples % together)]
    starts = range(rank * batch_size, len(padded), together)
    return [padded[start : start + batch_size] for start in starts]


def spread(length: int, number: int) -> list[int]:
    """Return up to `number` different indices spread evenly over `length`."""
    return sorted({i * length // number for i in range(number)})
