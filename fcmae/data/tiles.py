"""Large images as tiles, each an image of its own by index; knows no files, and no pixels outside of a tile."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fcmae.data.shared_memory import choose_transport, free_shared_bytes
from fcmae.data.sources import Source
from fcmae.data.views import Part, whole
from fcmae.data.workers import serving, starting
from fcmae.signals import serve_parent

AT_ONCE = 64
"""Images whose sizes a process looks up before it reports them."""


class Tile(NamedTuple):
    """Where a tile lies: its image, its row and column among the tiles of that, and its box in pixels."""

    image: int
    row: int
    column: int
    top: int
    left: int
    height: int
    width: int


class _Sizes(Dataset[Any]):
    """Heights and widths of `AT_ONCE` images at a time, (0, 0) for what does not open."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return math.ceil(len(self.source) / AT_ONCE)

    def __getitem__(self, part: int) -> list[tuple[int, int]]:
        first = part * AT_ONCE
        return [self.size(index) for index in range(first, min(first + AT_ONCE, len(self.source)))]

    def size(self, index: int) -> tuple[int, int]:
        try:
            return self.source.size(index)
        except Exception:  # named when it is loaded
            return 0, 0


def image_sizes(source: Source, num_workers: int) -> np.ndarray:
    """Return height and width of each image, int64 (n, 2), (0, 0) for those that do not open; decodes none.

    Args:
        source: the images.
        num_workers: processes; 0, or few images, for this one.
    """
    looked_up = _Sizes(source)
    processes = choose_transport(min(num_workers, len(looked_up) - 1), 0, free_shared_bytes()).num_workers
    end_with_this = serve_parent if processes else None
    loader: Any = DataLoader(
        looked_up, batch_size=None, num_workers=processes, collate_fn=list, worker_init_fn=end_with_this
    )
    sizes: list[tuple[int, int]] = []
    hidden = not sys.stderr.isatty()
    with starting() as workers:
        parts = iter(loader)
    with serving(workers), tqdm(total=len(source), desc="sizes", unit=" images", disable=hidden) as bar:
        for some in parts:
            sizes += some
            bar.update(len(some))
    return np.array(sizes, np.int64)


class TiledSource:
    """The tiles of a source's images, row after row: ceil(h / tile height) x ceil(w / tile width) of each image.

    All are whole: the last ones are moved inward, over their neighbours. An image that is smaller than a tile along
    a side has tiles as small; one that does not open counts as one tile, which fails when it is loaded.

    Args:
        source: the images.
        tile: height and width of the tiles.
        sizes: of the images, int (n, 2), as `image_sizes` looks them up.
    """

    def __init__(self, source: Source, tile: tuple[int, int], sizes: np.ndarray) -> None:
        self.source = source
        self.tile = tile
        self.sizes = sizes
        self.grids = np.maximum(-(-sizes // np.array(tile)), 1)
        """Rows and columns of each image's tiles."""
        self.ends = self.grids.prod(1).cumsum()
        """Number of tiles up to and with each image."""
        self.place, self.dtype, self.channels = source.place, source.dtype, source.channels
        self.shards = source.shards and source.shards.of_parts(self.ends)
        self.labels = None if source.labels is None else source.labels.repeat(self.grids.prod(1))
        self.class_names = source.class_names

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> Tile:
        """Return where tile `index` lies."""
        image = int(self.ends.searchsorted(index, "right"))
        rows, columns = map(int, self.grids[image])
        row, column = divmod(index - int(self.ends[image]) + rows * columns, columns)
        full_height, full_width = map(int, self.sizes[image])
        height, width = min(self.tile[0], full_height), min(self.tile[1], full_width)
        top, left = min(row * height, full_height - height), min(column * width, full_width - width)
        return Tile(image, row, column, top, left, height, width)

    def size(self, index: int) -> tuple[int, int]:
        tile = self.locate(index)
        return tile.height, tile.width

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        tile = self.locate(index)

        def choose_within(height: int, width: int) -> Part:
            if (height, width) != tuple(self.sizes[tile.image]):
                raise ValueError(f"{width:,} x {height:,} pixels, not what it had when its tiles were counted")
            part = choose(tile.height, tile.width)
            return part._replace(top=tile.top + part.top, left=tile.left + part.left)

        return self.source.load_part(tile.image, choose_within)

    def describe(self, index: int) -> str:
        tile = self.locate(index)
        name = self.source.describe(tile.image)
        return name if self.grids[tile.image].max() == 1 else f"{name}[tile {tile.row},{tile.column}]"


def cut(source: Source, tile: int | tuple[int, int], num_workers: int) -> TiledSource:
    """Cut the images of a source into tiles, see `TiledSource`, of a side or a height and width in pixels."""
    sides = (tile, tile) if isinstance(tile, int) else tile
    return TiledSource(source, sides, image_sizes(source, num_workers))
