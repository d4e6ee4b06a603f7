"""The order of images by shard and window: every image once an epoch, the same for anyone, few shards at a time."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
from conftest import fuzzed
from hypothesis import given
from hypothesis import strategies as st

from fcmae.data import IndexStream
from fcmae.data.order import Shards, ShuffledByShard

COUNTS = st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any)


def shards_of(counts: Sequence[int], window: int, told: list[list[list[int]]] | None = None) -> Shards:
    def expect(windows: Sequence[Sequence[int]]) -> None:
        if told is not None:
            told.append([list(window) for window in windows])

    return Shards(np.array(counts, np.int64), window, expect)


def shard_of(index: int, counts: Sequence[int]) -> int:
    return int(np.cumsum(counts).searchsorted(index, "right"))


def batches(counts: Sequence[int], window: int, number: int, **options: int) -> list[list[tuple[int, int]]]:
    stream = IndexStream(sum(counts), shards=shards_of(counts, window), **{"batch_size": 2, "seed": 0, **options})
    return list(islice(stream, number))


@given(counts=COUNTS, window=st.integers(1, 5), batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
@fuzzed(60, 3000)
def test_every_image_comes_once_an_epoch_for_any_number_of_processes(
    counts: list[int], window: int, batch_size: int, world_size: int
) -> None:
    steps = -(-3 * sum(counts) // (batch_size * world_size))
    parts = [
        batches(counts, window, steps, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = [key for step in zip(*parts, strict=True) for part in step for key in part]
    alone = [key for batch in batches(counts, window, len(seen), batch_size=1) for key in batch]
    assert seen == alone
    for epoch in range(3):
        assert sorted(index for e, index in seen if e == epoch) == list(range(sum(counts)))


@given(counts=COUNTS, window=st.integers(1, 5), start=st.integers(0, 100))
@fuzzed(40, 2000)
def test_an_order_that_begins_anywhere_goes_on_as_the_whole_would(
    counts: list[int], window: int, start: int
) -> None:
    whole = batches(counts, window, start + 10, batch_size=1)
    assert batches(counts, window, 10, batch_size=1, start=start) == whole[start:]


@given(counts=COUNTS, window=st.integers(1, 5))
@fuzzed(40, 2000)
def test_no_more_shards_than_a_window_are_read_at_a_time_and_each_once_an_epoch(
    counts: list[int], window: int
) -> None:
    order = ShuffledByShard(shards_of(counts, window), seed=0)
    for epoch in range(2):
        read = [shard_of(order.index(epoch, offset), counts) for offset in range(sum(counts))]
        spans = {shard: (read.index(shard), len(read) - read[::-1].index(shard)) for shard in {*read}}
        for place in range(len(read)):
            assert sum(first <= place < last for first, last in spans.values()) <= window


def test_epochs_and_seeds_have_orders_of_their_own_and_windows_are_mixed() -> None:
    counts = [10] * 12

    def epochs(seed: int) -> list[tuple[int, ...]]:
        order = ShuffledByShard(shards_of(counts, 4), seed)
        return [tuple(order.index(epoch, offset) for offset in range(120)) for epoch in range(3)]

    assert len({*epochs(0), *epochs(1)}) == 6
    for epoch in epochs(0):
        for start in range(0, 120, 40):  # of four shards whose images are shuffled, ten in a row are hardly one's
            assert max(Counter(index // 10 for index in epoch[start : start + 10]).values()) < 9


def test_a_source_learns_before_each_window_which_shards_come_next() -> None:
    counts, told = [3, 4, 5, 2, 6], list[list[list[int]]]()
    stream = IndexStream(20, batch_size=2, seed=0, shards=shards_of(counts, 2, told))
    seen = [shard_of(index, counts) for batch in islice(stream, 31) for _, index in batch]
    windows = [{*present} for present, _ in told]
    assert [{*following} for _, following in told[:-1]] == windows[1:]
    for epoch in range(3):
        read = seen[20 * epoch : 20 * epoch + 20]
        for window in windows[3 * epoch : 3 * epoch + 3]:
            number = sum(counts[shard] for shard in window)
            assert {*read[:number]} == window
            read = read[number:]


def test_some_of_the_images_and_their_tiles_keep_their_shards() -> None:
    whole = shards_of([3, 0, 4, 2], 2)
    chosen = whole.of_images(np.array([0, 2, 3, 7, 8]))
    assert chosen.counts.tolist() == [2, 0, 1, 2]
    tiles = whole.of_parts(np.array([1, 2, 4, 8, 9, 10, 11, 12, 20]))
    assert tiles.counts.tolist() == [4, 0, 7, 9]


def test_a_place_in_ten_million_images_is_found_without_a_list_of_them() -> None:
    counts = np.full(5000, 2000, np.int64)
    order = ShuffledByShard(shards_of(counts.tolist(), 16), seed=3)
    found = [order.index(epoch, offset) for epoch in (0, 799) for offset in (0, 4_999_999, 9_999_999)]
    assert all(0 <= index < 10_000_000 for index in found)
    assert sum(array.size for array in order.windows.values()) <= 2 * 16 * 2000
