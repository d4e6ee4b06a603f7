"""Decode and shrink images once, into shards of raw pixels; knows sources of images, not where they are used."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fcmae.data.batches import BadImage
from fcmae.data.labels import check_class_names, write_labels
from fcmae.data.making import Work, claim, fingerprint
from fcmae.data.npy import write_array
from fcmae.data.pixels import AS_STORED, Reading, kind_name
from fcmae.data.sampling import spread
from fcmae.data.shards import INDEX, PLAN, PREPARED, SIZES, shard_path
from fcmae.data.sources import Source
from fcmae.data.tiles import cut
from fcmae.data.views import Part, resample
from fcmae.errors import UserError, blame
from fcmae.files import atomic_file, free_bytes, sha256, write_text

SHARD_IMAGES = 1024
"""Images of a shard at most: about 260 MB at a short side of 256."""
MIN_SHARDS = 64
"""Shards at least, where there are so many images: work for many processes, and little lost in a kill."""
OVERSAMPLING = 2
"""Pixels decoded for each that is kept, along a side, where decoding fewer is cheaper; as Pillow's thumbnails."""
SAMPLED = 32
"""Images that the size of the rest is estimated from."""
BEFORE = {"dtype": "uint8", "tile": None, "nodata": None, "window": False}
"""What folders of 0.1.0 are, whose plan does not say so."""


class Prepared(NamedTuple):
    """What lies in a folder of prepared images."""

    num_images: int
    num_bytes: int
    written_shards: int
    """By this call; 0 where all were there and intact."""
    bad: list[BadImage]
    """Images of the source that do not decode and are left out."""


class Shard(NamedTuple):
    """The record of a finished shard, as JSON beside it."""

    sizes: list[tuple[int, int]]
    """Height and width of each image in it."""
    bad: list[BadImage]
    """Those that did not decode."""
    sha256: str


def shrink(source: Source, index: int, short_side: int) -> Tensor:
    """Load image `index`, its short side at most `short_side` pixels and its shape kept: pixels (c, h, w)."""
    wanted = OVERSAMPLING * short_side
    pixels = source.load_part(index, lambda height, width: Part(0, 0, height, width, (wanted, wanted)))
    height, width = pixels.shape[-2:]
    if min(height, width) <= short_side:
        return pixels
    scale = short_side / min(height, width)
    return resample(pixels, (round(scale * height), round(scale * width)))


class _Pixels(Work[Shard]):
    """Shards of images, decoded and shrunk."""

    def __init__(self, source: Source, folder: Path, short_side: int, shard_images: int) -> None:
        super().__init__(len(source), shard_images)
        self.source = source
        self.folder = folder
        self.short_side = short_side

    def intact(self, shard: int) -> Shard | None:
        """Return the record of a shard that is there, whole and undamaged."""
        path = shard_path(self.folder, shard)
        try:
            sizes, bad, stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            record = Shard([(h, w) for h, w in sizes], [BadImage(*image) for image in bad], stored)
            left_out = {image.index for image in record.bad}
            complete = len(sizes) + len(bad) == len(self.indices(shard)) and left_out <= {*self.indices(shard)}
            expected = sum(h * w for h, w in record.sizes) * self.source.channels * self.source.dtype.itemsize
            plausible = complete and len(left_out) == len(bad) and path.stat().st_size == expected
            whole = plausible and sha256(path) == stored
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return None
        return record if whole else None

    def write(self, shard: int) -> Shard:
        (self.folder / INDEX).unlink(missing_ok=True)  # until all shards are good again
        path = shard_path(self.folder, shard)
        record = Shard([], [], "")
        digest = hashlib.sha256()
        with atomic_file(path) as file:
            for index in self.indices(shard):
                try:
                    pixels = shrink(self.source, index, self.short_side)
                except Exception as error:  # a broken file can make a decoder raise anything
                    record.bad.append(BadImage.of(index, self.source, error))
                    continue
                content = pixels.permute(1, 2, 0).numpy().tobytes()  # (h, w, c)
                file.write(content)
                digest.update(content)
                record.sizes.append((pixels.shape[1], pixels.shape[2]))
        record = record._replace(sha256=digest.hexdigest())
        write_text(path.with_suffix(".json"), json.dumps(record))
        return record


def _require_disk(source: Source, folder: Path, short_side: int) -> None:
    """Check that the images will fit, by the size of some.

    Raises:
        UserError: if they will not.
    """
    sampled: list[int] = []
    for index in spread(len(source), SAMPLED):
        try:
            sampled.append(shrink(source, index, short_side).nbytes)
        except Exception:  # named when its turn comes
            continue
    estimate = len(source) * sum(sampled) / max(len(sampled), 1)
    there = sum(path.stat().st_size for path in folder.glob("shards/*.bin"))
    free = free_bytes(folder)
    if free < estimate - there:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB free, but {len(source):,} images take about {estimate / 1e9:.1f} GB: "
            "free some space, name a folder on another disk, or lower --size"
        )


def prepare(
    source: Source,
    folder: Path,
    *,
    root: str,
    channels: int,
    short_side: int,
    num_workers: int,
    tile: tuple[int, int] | None = None,
    reading: Reading = AS_STORED,
) -> Prepared:
    """Write the images of a source, shrunk, with labels and class names, to be read with `data.name=arrays`.

    Where the same was begun before, whole shards are checked and kept, and the others made. What the folder holds
    is in `PreparedSource`; it has its index, and so can be read, once everything else is written.

    Args:
        source: the images.
        folder: new, or what an earlier call with the same arguments left.
        root: of the source; it may be moved between calls.
        channels: of the images.
        short_side: pixels to which the short side of larger images is reduced.
        num_workers: processes; 0 works in this one.
        tile: height and width of the tiles that are written in the place of larger images, see `TiledSource`.
        reading: how the source reads its files.

    Raises:
        UserError: if the folder is in other use, the disk too small, a class cannot be named, or no image decodes.
        OSError: as writing does.
    """
    with blame(root):
        check_class_names(source.class_names or ())
    images, source = source, source if tile is None else cut(source, tile, num_workers)
    shard_images = min(SHARD_IMAGES, math.ceil(len(source) / MIN_SHARDS))
    plan: dict[str, Any] = {
        "format": PREPARED,
        "num_images": len(source),
        "short_side": short_side,
        "channels": channels,
        "dtype": kind_name(source.dtype),
        "tile": tile and list(tile),
        "nodata": None if reading.nodata is None else str(reading.nodata),
        "window": reading.window,
    }
    _require_disk(source, folder, short_side)
    claim(
        folder / PLAN,
        plan | {"shard_images": shard_images, "source": fingerprint(images, root)},
        command="fcmae prepare",
        before=BEFORE,
    )
    shard_path(folder, 0).parent.mkdir(exist_ok=True)
    ordered, written = _Pixels(source, folder, short_side, shard_images).make_all(num_workers)
    bad = [image for record in ordered for image in record.bad]
    sizes = np.array([size for record in ordered for size in record.sizes], np.int32).reshape(-1, 2)
    if not len(sizes):
        raise UserError(f"{root}: none of {len(source):,} images decodes, the first {bad[0].name}: {bad[0].reason}")
    write_array(folder / SIZES, sizes)
    labels = None if source.labels is None else np.delete(source.labels, [image.index for image in bad])
    write_labels(folder, labels, source.class_names)
    index = {
        "format": PREPARED,
        "channels": channels,
        "dtype": kind_name(source.dtype),
        "shards": [len(record.sizes) for record in ordered],
    }
    write_text(folder / INDEX, json.dumps(index | {"unreadable": bad}))
    num_bytes = int(sizes.astype(np.int64).prod(1).sum()) * channels * source.dtype.itemsize
    return Prepared(len(sizes), num_bytes, written, bad)
