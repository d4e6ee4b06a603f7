"""Which images a process sees and when, by number of the image in the run: no worker or restart changes it."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from fcmae.data.order import Order, Shards, ShuffledAllOver, ShuffledByShard

Key = tuple[int, int]
"""(epoch, sample index): all that a sample's augmentation depends on, besides the seed."""


class IndexStream(Sampler[list[Key]]):
    """One process's endless batches of (epoch, index) keys, from image number `start` of the run on.

    The run is one sequence of images, epoch after epoch, each a permutation that depends on (seed, epoch). Image
    number n belongs to update n // (images per update), wherever it is computed: processes take consecutive
    slices of each micro-batch. Batches may cross from one epoch into the next, so every image is seen exactly
    once per epoch, and a set may be smaller than a batch. Images in `shards` come shard by shard.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shards: Shards | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.order: Order = ShuffledByShard(shards, seed) if shards else ShuffledAllOver(num_samples, seed)
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Key]]:
        first = self.start + self.rank * self.batch_size
        while True:
            places = [divmod(position, self.num_samples) for position in range(first, first + self.batch_size)]
            yield [(epoch, self.order.index(epoch, offset)) for epoch, offset in places]
            first += self.batch_size * self.world_size
            self.order.expect(*divmod(first, self.num_samples))  # once the processes run that load the first batch


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
