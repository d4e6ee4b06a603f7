"""An index of tar files of images that webdataset or others wrote, put beside them; changes none of them."""

import os
import posixpath
import re
from array import array
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
    names: list[str]
    numbers: np.ndarray
    """int64 (n, 3), of each image where it starts, its size in bytes, and its label, -1 for none."""
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
        chosen = [index for index, (_, end) in enumerate(samples) if end in self.known and files.starts[index] >= 0]
        of_image = np.array([labels.get(samples[index][0], -1) for index in chosen], np.int64)
        numbers = np.stack([files.starts[chosen], files.sizes[chosen], of_image], 1)
        passed_over = sum(end != CLASS for _, end in samples) - len(chosen)
        return Record(
            path.stat().st_size, sha256(path), [files.names[index] for index in chosen], numbers, passed_over
        )


def write_index(
    folder: Path,
    shards: Sequence[Shard],
    *,
    names: Iterable[str],
    starts: np.ndarray,
    sizes: np.ndarray,
    labels: np.ndarray | None,
    window: int | None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write what makes a folder of tar files one of shards, see `tars.Contents`; it comes into being last.

    Args:
        folder: of the tar files.
        shards: what they are.
        names: of the images in them, one shard's after the other's.
        starts: where each image begins in its shard, in bytes.
        sizes: of each, in bytes.
        labels: of each, its class; None for none.
        window: shards whose images are shuffled together; None for `WINDOW_BYTES` of them.
        class_names: by label.
    """
    encoded, lengths = bytearray(), array("i")
    for name in names:
        content = os.fsencode(name)
        encoded += content
        lengths.append(len(content))
    arrays = {
        "starts": starts,
        "sizes": sizes,
        "names": np.frombuffer(encoded, np.uint8),
        "name_bytes": np.frombuffer(lengths, np.int32),
    }
    if labels is not None:
        arrays["labels"] = labels.astype(np.int32)
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
    numbers = np.concatenate([record.numbers for record in records])
    if not len(numbers):
        raise UserError(f"{folder}: no images in its {len(paths):,} tar files")
    starts, sizes, labels = numbers.T
    without = int((labels < 0).sum())
    if 0 < without < len(labels):
        raise UserError(f"{folder}: {without:,} of {len(labels):,} images have no {CLASS}, the others do")
    shards = [
        Shard(file=path.name, bytes=record.bytes, sha256=record.sha256, images=len(record.names))
        for path, record in zip(paths, records, strict=True)
    ]
    write_index(
        folder,
        shards,
        names=(name for record in records for name in record.names),
        starts=starts,
        sizes=sizes,
        labels=None if without else labels,
        window=window,
    )
    return Indexed(len(labels), len(paths), not without, sum(record.passed_over for record in records))
