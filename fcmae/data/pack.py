"""Pack encoded images, as they are, into shards: tar files and an index; knows not where these are then read."""

import io
import itertools
import json
import math
import os
import posixpath
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fcmae.data.batches import BadImage
from fcmae.data.images import Files, ImageSource, Slice, extensions
from fcmae.data.index import CLASS, write_index
from fcmae.data.labels import check_class_names
from fcmae.data.listing import extension
from fcmae.data.making import Work, claim, fingerprint
from fcmae.data.sampling import spread
from fcmae.data.sources import Source
from fcmae.data.tars import SHARDS, Shard
from fcmae.errors import UserError, blame
from fcmae.files import atomic_path, free_bytes, sha256, write_text

PLAN, RECORDS = "shard.json", "records"
"""What was asked for; what is known of each shard, to go on after an end on the way."""

SHARD_BYTES = 1 << 28
"""Of a shard, where nothing else is asked for."""
MIN_SHARDS = 16
"""Where there are so many images: work for many processes."""
SAMPLED = 256
"""Images that the size of the rest is estimated from."""
HEADERS = 2 * tarfile.BLOCKSIZE
"""Bytes in a tar of an image's header and, about, of what fills its last block."""

SIGNATURES = {b"\xff\xd8": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"II": ".tif", b"MM": ".tif"}
"""How files begin, for those whose name does not say what they are."""


class Packed(NamedTuple):
    """What lies in a folder of shards."""

    num_images: int
    num_bytes: int
    num_shards: int
    written_shards: int
    """By this call; 0 where all were there and intact."""
    bad: list[BadImage]
    """Images of the source whose files cannot be read, and are left out."""


class Record(NamedTuple):
    """What is known of a finished shard."""

    bytes: int
    sha256: str
    images: np.ndarray
    """int64 (n, 3), of each its number in the source, where it starts and its size, in bytes."""
    bad: list[BadImage]


def read_encoded(files: Files, index: int) -> bytes:
    """Return an image's file.

    Raises:
        ValueError: if it has none of its own.
        OSError: as reading does.
    """
    file = files.open(index)
    if isinstance(file, Image.Image | Slice):
        raise ValueError("no image file of its own; fcmae prepare writes decoded images")
    with file:
        return file.read()


def key_of(name: str) -> str:
    """Return what a sample is called in a tar file: no dots after its folder, where webdataset takes its end off.

    cats/a.b.jpg -> cats/a_b
    """
    folder, base = posixpath.split(name.replace(os.sep, "/"))
    stem = base.removesuffix(base[len(base) - len(extension(base)) :]) if extension(base) else base
    return posixpath.join(folder, stem.replace(".", "_") or "_").lstrip("/")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a file that looks the same whoever makes it, and whenever; returns where its content starts."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - math.ceil(len(content) / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _Tars(Work[Record]):
    """Tar files of images in the order of `order`."""

    def __init__(self, source: ImageSource, folder: Path, root: str, order: np.ndarray, shard_images: int) -> None:
        super().__init__(len(order), shard_images)
        self.source = source
        self.folder = folder
        self.root = root
        self.order = order
        self.known = extensions()

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.tar"

    def record(self, shard: int) -> Path:
        return self.folder / RECORDS / f"{shard:05d}.json"

    def name(self, index: int) -> str:
        """Return an image's name below the source's root."""
        return self.source.describe(index).removeprefix(self.root).lstrip("/" + os.sep)

    def intact(self, shard: int) -> Record | None:
        path = self.path(shard)
        try:
            size, digest, images, bad = json.loads(self.record(shard).read_text(encoding="utf-8"))
            members = np.array(images, np.int64).reshape(-1, 3)
            record = Record(size, digest, members, [BadImage(*image) for image in bad])
            numbers = sorted([*members[:, 0].tolist(), *(image.index for image in record.bad)])
            complete = numbers == sorted(self.order[self.indices(shard)].tolist())
            whole = complete and path.stat().st_size == size and sha256(path) == digest
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return None
        return record if whole else None

    def write(self, shard: int) -> Record:
        (self.folder / SHARDS).unlink(missing_ok=True)  # until all shards are good again
        images: list[tuple[int, int, int]] = []
        bad: list[BadImage] = []
        taken: set[str] = set()
        labels = self.source.labels
        with atomic_path(self.path(shard)) as path:
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                for index in self.order[self.indices(shard)].tolist():
                    try:
                        content = read_encoded(self.source.files, index)
                    except Exception as error:  # what libraries raise for a file of theirs
                        bad.append(BadImage.of(index, self.source, error))
                        continue
                    name = self.name(index)
                    end = extension(name)
                    if end not in self.known:
                        end = next((e for start, e in SIGNATURES.items() if content.startswith(start)), ".img")
                    keys = (f"{key_of(name)}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
                    key = next(key for key in keys if key not in taken)
                    taken.add(key)
                    images.append((index, _add(tar, f"{key}{end}", content), len(content)))
                    if labels is not None:
                        _add(tar, f"{key}{CLASS}", str(labels[index]).encode())
            members = np.array(images, np.int64).reshape(-1, 3)
            record = Record(path.stat().st_size, sha256(path), members, bad)
        write_text(self.record(shard), json.dumps(record._replace(images=members.tolist())))
        return record


def _mean_bytes(files: Files) -> float:
    """Return about how many bytes an image takes in a tar.

    Raises:
        ValueError: if images have no files.
    """
    sizes: list[int] = []
    for index in spread(len(files), SAMPLED):
        try:
            sizes.append(len(read_encoded(files, index)))
        except OSError:  # named when its turn comes
            continue
    return sum(sizes) / max(len(sizes), 1) + 2 * HEADERS


def pack(
    source: Source,
    folder: Path,
    *,
    root: str,
    shard_images: int | None = None,
    window: int | None = None,
    num_workers: int = 0,
) -> Packed:
    """Write the files of a source's images, shuffled once and for all, into tar files that webdataset reads, too.

    Where the same was begun before, whole shards are checked and kept, and the others made. The folder can be read,
    as `ShardFiles`, once everything else is written.

    Args:
        source: the images.
        folder: new, or what an earlier call with the same arguments left.
        root: of the source; it may be moved between calls.
        shard_images: in each tar file; None for as many as make up `SHARD_BYTES`.
        window: tar files whose images are shuffled together each epoch; None for `WINDOW_BYTES` of them.
        num_workers: processes; 0 works in this one.

    Raises:
        UserError: if the folder is in other use, the disk too small, or images have no files of their own.
        OSError: as writing does.
    """
    with blame(root):
        if not isinstance(source, ImageSource):
            raise ValueError("holds decoded images; shards are made of image files")
        check_class_names(source.class_names or ())
        mean_bytes = _mean_bytes(source.files)
    number = len(source)
    if shard_images is None:
        shard_images = max(1, min(int(SHARD_BYTES / mean_bytes), math.ceil(number / MIN_SHARDS)))
    there = sum(path.stat().st_size for path in folder.glob("*.tar"))
    if (free := free_bytes(folder)) < number * mean_bytes - there:
        raise UserError(
            f"{folder}: {free / 1e9:.1f} GB free, but {number:,} images take about {number * mean_bytes / 1e9:.1f} "
            "GB: free some space, or name a folder on another disk"
        )
    plan = {
        "format": "fcmae shards 1",
        "num_images": number,
        "shard_images": shard_images,
        "window": window,
        "source": fingerprint(source, root),
    }
    claim(folder / PLAN, plan, command="fcmae shard")
    (folder / RECORDS).mkdir(exist_ok=True)
    work = _Tars(source, folder, root, np.random.default_rng(0).permutation(number), shard_images)
    records, written = work.make_all(num_workers)
    bad = [image for record in records for image in record.bad]
    if len(bad) == number:
        raise UserError(f"{root}: none of {number:,} images can be read, the first {bad[0].name}: {bad[0].reason}")
    indices, starts, sizes = np.concatenate([record.images for record in records]).T
    shards = [
        Shard(file=work.path(n).name, bytes=record.bytes, sha256=record.sha256, images=len(record.images))
        for n, record in enumerate(records)
    ]
    write_index(
        folder,
        shards,
        names=map(work.name, indices.tolist()),
        starts=starts,
        sizes=sizes,
        labels=None if source.labels is None else source.labels[indices],
        window=window,
        class_names=source.class_names,
    )
    num_bytes = sum(record.bytes for record in records)
    return Packed(number - len(bad), num_bytes, len(records), written, bad)
