"""An index of tar files of images that webdataset or others wrote, put beside them; changes none of them."""

import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fcmae.data.images import extensions
from fcmae.data.listing import TarFiles, natural_key
from fcmae.data.making import Work
from fcmae.data.tars import NAME, SHARDS, Contents, Members, Shard, Stored
from fcmae.errors import UserError, blame, shown
from fcmae.files import atomic_file, require_free, sha256, write_text

INDEX = "index.npz"
"""See `tars.Members`."""

CLASS = ".cls"
"""The end of the name of a file that holds a sample's class as a whole number."""

WINDOW_BYTES = 1 << 32
"""Of the shards whose images are shuffled together, where nothing else is asked for."""


class Found(NamedTuple):
    """What is known of an image in a tar file."""

    name: bytes
    start: int
    size: int
    label: int | None


class Indexed(NamedTuple):
    """What lies in a folder of tar files."""

    num_images: int
    num_shards: int
    labelled: bool
    passed_over: int
    """Image files that are no sample's image, such as x.mask.png."""


class Record(NamedTuple):
    """What is known of a tar file."""

    bytes: int
    sha256: str
    images: list[Found]
    passed_over: int


def sample_of(name: str) -> tuple[str, str]:
    """Split a name into a sample's key and what of it the file is, at its first dot, as webdataset does.

    cats/001.mask.png -> cats/001, .mask.png
    """
    folder, base = posixpath.split(name)
    key, dot, end = base.partition(".")
    return posixpath.join(folder, key), f"{dot}{end.lower()}"


class _Listing(Work[Record]):
    """The images in each of some tar files."""

    unit = " tar files"

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(len(paths), 1)
        self.paths = paths
        self.known = extensions()

    def intact(self, shard: int) -> None:
        return None

    def write(self, shard: int) -> Record:
        path = self.paths[shard]
        with blame(str(path)):
            files = TarFiles(str(path), {*self.known, CLASS})
        samples = [sample_of(name) for name in files.names]
        labels: dict[str, int] = {}
        for index, (key, end) in enumerate(samples):
            if end == CLASS:
                content = files.open(index).read()
                if not content.strip().isdigit():
                    raise UserError(
                        f"{path}: {files.names[index]} holds {shown(content)}, and no class; fcmae shard of the "
                        "images themselves numbers their folders"
                    )
                labels[key] = int(content)
        found: list[Found] = []
        passed_over = 0
        for index, (key, end) in enumerate(samples):
            if end in self.known and files.starts[index] >= 0:
                place = int(files.starts[index]), int(files.sizes[index])
                found.append(Found(os.fsencode(files.names[index]), *place, labels.get(key)))
            else:
                passed_over += end != CLASS
        return Record(path.stat().st_size, sha256(path), found, passed_over)


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    images: Iterable[Found],
    *,
    window: int | None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write what makes a folder of tar files one of shards, see `tars.Contents`; it comes into being last.

    Args:
        folder: of the tar files.
        shards: what they are.
        images: in them, one shard's after the other's; they have labels all or none.
        window: shards whose images are shuffled together; None for `WINDOW_BYTES` of them.
        class_names: by label.
    """
    names, starts, sizes, labels = zip(*images, strict=True)
    arrays = {
        "starts": np.array(starts, np.int64),
        "sizes": np.array(sizes, np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_bytes": np.array([len(name) for name in names], np.int32),
    }
    if None not in labels:
        arrays["labels"] = np.array(labels, np.int32)
    path = folder / INDEX
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)
    contents = Contents(
        format="fcmae shards 1",
        shards=list(shards),
        window=window or max(1, round(WINDOW_BYTES * len(shards) / sum(shard.bytes for shard in shards))),
        index=Stored(file=INDEX, bytes=path.stat().st_size, sha256=sha256(path)),
        class_names=None if class_names is None else list(class_names),
    )
    Members(arrays, contents)  # which checks them
    write_text(folder / SHARDS, contents.model_dump_json(indent=1) + "\n")


def index_tars(folder: Path, *, window: int | None, num_workers: int) -> Indexed:
    """Write an index of the tar files in a folder beside them.

    A sample's image is the file whose name has nothing but an image's end after its first dot; its class, if all
    have one, is in a file of the same key that ends in .cls.

    Args:
        folder: with tar files right in it.
        window: tar files whose images are shuffled together each epoch; None for `WINDOW_BYTES` of them.
        num_workers: processes; 0 works in this one.

    Raises:
        UserError: if there are none, or one is damaged; or if there is an index already.
    """
    paths = sorted(folder.glob("*.tar"), key=lambda path: natural_key(path.name))
    if not paths:
        raise UserError(f"{folder}: no tar files in it; to make some of images, name a folder for them: SOURCE OUT")
    for name in (SHARDS, INDEX):
        require_free(folder / name)
    if odd := [path for path in paths if not re.fullmatch(NAME, path.name)]:
        raise UserError(f"{odd[0]}: the name has other than letters, digits, _, - and ., as URLs want; rename it")
    records, _ = _Listing(paths).make_all(num_workers)
    images = [image for record in records for image in record.images]
    if not images:
        raise UserError(f"{folder}: no images in its {len(paths):,} tar files")
    without = sum(image.label is None for image in images)
    if 0 < without < len(images):
        raise UserError(f"{folder}: {without:,} of {len(images):,} images have no {CLASS}, the others do")
    shards = [
        Shard(file=path.name, bytes=record.bytes, sha256=record.sha256, images=len(record.images))
        for path, record in zip(paths, records, strict=True)
    ]
    write_index(folder, shards, images, window=window)
    passed_over = sum(record.passed_over for record in records)
    return Indexed(len(images), len(paths), not without, passed_over)
