"""Shards of decoded images of any sizes, which `fcmae prepare` wrote; knows how they are read, not how made."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcmae.data.labels import read_labels
from fcmae.data.npy import read_array
from fcmae.data.order import Shards
from fcmae.data.pixels import Reading, as_kind, as_pixels, is_pixels, kind_of, without_nodata
from fcmae.data.views import Part, whole
from fcmae.errors import UserError

PREPARED = "fcmae images 1"
"""What `format` says in the index of a folder that `fcmae prepare` wrote."""

PLAN, SIZES, INDEX = "prepare.json", "sizes.npy", "index.json"
"""What was asked for; each image's height and width, int32 (n, 2); how many images each shard has, written last."""


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of one shard of prepared images."""
    return folder / "shards" / f"{shard:05d}.bin"


class PreparedSource:
    """A folder that `fcmae prepare` wrote: images of any sizes, as raw pixels.

    A shard is the pixels (h, w, c) of consecutive images, one after the other. Only the rows that are seen
    are read, and no file stays open or mapped: any number of shards and workers will do, and a file that is cut off
    while it is read is an error, not a crash.
    """

    shards: Shards | None = None

    def __init__(self, folder: Path, reading: Reading) -> None:
        path = folder / INDEX
        if not path.is_file():
            raise UserError(f"{folder}: unfinished; the same fcmae prepare again goes on where it stopped")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != PREPARED:
                raise ValueError(f"format {index['format']!r}, this version reads {PREPARED!r}")
            numbers = [index["channels"], *index["shards"]]
            if not all(type(number) is int and 0 <= number < 1 << 31 for number in numbers) or not numbers[0]:
                raise ValueError("its numbers are no counts")
            self.channels, *counts = numbers
            self.stored = np.dtype(index.get("dtype", "uint8")).newbyteorder("<")
            if not is_pixels(self.stored):
                raise ValueError(f"pixels of {self.stored}")
            self.reading, self.dtype = reading, reading.kind(kind_of(self.stored))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            raise UserError(f"{path}: no index of prepared images ({reason}); run fcmae prepare again") from error
        counts = np.array(counts, np.int64)
        self.folder = folder
        self.place = path.resolve()
        self.sizes = read_array(folder / SIZES, "; run fcmae prepare again")
        if self.sizes.shape != (counts.sum(), 2) or self.sizes.dtype != np.int32:
            raise UserError(
                f"{folder / SIZES}: {self.sizes.dtype} {self.sizes.shape}, but {path} counts {counts.sum()} "
                "images; run fcmae prepare again"
            )
        if (
            not len(self.sizes)
            or self.sizes.min() < 1
            or self.sizes.prod(1, np.float64).sum() * self.channels > 2**62
        ):
            raise UserError(f"{folder / SIZES}: no heights and widths of images; run fcmae prepare again")
        num_bytes = self.sizes.astype(np.int64).prod(1) * self.channels * self.stored.itemsize
        ends = np.cumsum(num_bytes)
        self.firsts = np.cumsum(counts) - counts
        """Number of each shard's first image."""
        starts = ends - num_bytes
        shard_bytes = np.array([num_bytes[a : a + n].sum() for a, n in zip(self.firsts, counts, strict=True)])
        self.offsets = starts - np.repeat(np.cumsum(shard_bytes) - shard_bytes, counts)
        """Of each image in its shard, in bytes."""
        for shard, expected in enumerate(shard_bytes):
            file = shard_path(folder, shard)
            found = file.stat().st_size if file.is_file() else None
            if found != expected:
                raise UserError(
                    f"{file}: {'missing' if found is None else f'{found:,} bytes'}, should have {expected:,}; "
                    "run the same fcmae prepare again, which fixes what is damaged"
                )
        self.labels, self.class_names = read_labels(folder, len(self.sizes))

    def __reduce__(self) -> tuple[type["PreparedSource"], tuple[Path, Reading]]:
        return PreparedSource, (self.folder, self.reading)

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        height, width = map(int, self.sizes[index])
        return height, width

    def load(self, index: int) -> Tensor:
        return self.load_part(index, whole)

    def load_part(self, index: int, choose: Callable[[int, int], Part]) -> Tensor:
        image_height, image_width = self.size(index)
        top, left, height, width, _ = choose(image_height, image_width)
        row = image_width * self.channels * self.stored.itemsize
        path = shard_path(self.folder, int(self.firsts.searchsorted(index, "right")) - 1)
        with open(path, "rb", buffering=0) as file:
            file.seek(int(self.offsets[index]) + top * row)
            content = file.read(height * row)
        if len(content) != height * row:
            raise OSError(f"{path}: cut off; run the same fcmae prepare again, which fixes it")
        rows = np.frombuffer(content, self.stored).reshape(height, image_width, self.channels)
        part = rows[:, left : left + width].copy()  # of its own, which can be written to
        pixels = without_nodata(as_pixels(part), self.reading)
        return as_kind(torch.from_numpy(pixels), self.dtype).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        return f"{self.folder}[{index}]"
