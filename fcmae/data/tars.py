"""Encoded images in tar files, here or at a URL, by an index of where each lies; knows not how they are made."""

import io
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fcmae.data.cache import Cache, File, Lost
from fcmae.data.images import ImageSource
from fcmae.data.labels import check_labels
from fcmae.data.order import Shards
from fcmae.data.pixels import AS_STORED, Reading
from fcmae.data.remote import NoParts, Refused, is_url, join, read
from fcmae.data.shared_memory import say_once
from fcmae.errors import UserError, brief, shown

SHARDS = "shards.json"
"""The file that makes a folder one of shards: what they are, and which file says where each image lies."""

READ_ALONE = 4
"""Images of a remote shard that a process reads one by one before it has the whole shard fetched."""

NAME = r"^\w[\w.-]*$"
"""A name that leads nowhere else, and is in a URL what it is on a disk."""
Name = Annotated[str, Field(pattern=NAME, max_length=200)]
Number = Annotated[int, Field(ge=0, lt=2**62)]
Sum = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Stored(Strict):
    """A file beside `SHARDS`."""

    file: Name
    bytes: Number
    sha256: Sum


class Shard(Stored):
    """A tar file."""

    images: Number


class Contents(Strict):
    """What `SHARDS` says."""

    format: Literal["fcmae shards 1"]
    shards: Annotated[list[Shard], Field(min_length=1)]
    window: Annotated[int, Field(ge=1)]
    """Shards whose images are shuffled together."""
    index: Stored
    """An .npz of what `Members` has."""
    class_names: list[str] | None = None


class Members:
    """Where images lie in their shards, and what they are called: arrays, which processes share that are forked."""

    ARRAYS = ("starts", "sizes", "names", "name_bytes")

    def __init__(self, arrays: dict[str, np.ndarray], contents: Contents) -> None:
        self.starts, self.sizes, self.names, lengths = (arrays[name] for name in self.ARRAYS)
        self.counts = np.array([shard.images for shard in contents.shards], np.int64)
        self.labels = arrays.get("labels")
        self.name_ends = lengths.cumsum(dtype=np.int64)
        number = int(self.counts.sum())
        numbers = (self.starts, self.sizes, lengths, *(() if self.labels is None else (self.labels,)))
        if any(array.shape != (number,) or array.dtype.kind not in "iu" for array in numbers) or not number:
            raise ValueError(f"no numbers of {number:,} images")
        if self.names.dtype != np.uint8 or self.names.shape != (self.name_ends[-1],) or lengths.min() < 0:
            raise ValueError("no names of images")
        ends = np.repeat([shard.bytes for shard in contents.shards], self.counts)
        if min(self.starts.min(), self.sizes.min()) < 0 or (self.starts > ends - self.sizes).any():
            raise ValueError("images that lie outside of their shards")

    @classmethod
    def read(cls, file: IO[bytes] | Path, contents: Contents) -> "Members":
        with np.load(file, allow_pickle=False) as arrays:
            return cls(dict(arrays), contents)

    def name(self, index: int) -> str:
        end = int(self.name_ends[index])
        start = int(self.name_ends[index - 1]) if index else 0
        return os.fsdecode(self.names[start:end].tobytes())


class LostShard(Lost):
    """A shard that cannot be had, or is not what it should be: all its images at once."""

    def __init__(self, name: str, first: int, reason: str) -> None:
        super().__init__(reason)
        self.name = name
        self.first = first
        """Its first image."""


class Store(Protocol):
    """Where shards are."""

    def read(self, shard: Shard, start: int, size: int, /) -> bytes:
        """Return a part of a shard; raises `Lost` where it is not what it should be."""
        ...

    def expect(self, windows: Sequence[Sequence[Shard]], /) -> None:
        """Learn which shards are read next."""
        ...


class LocalStore:
    """Shards in a folder of this machine."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def read(self, shard: Shard, start: int, size: int) -> bytes:
        path = self.folder / shard.file
        try:
            with open(path, "rb", buffering=0) as file:
                if (there := os.fstat(file.fileno()).st_size) != shard.bytes:
                    raise Lost(f"{there:,} bytes, should have {shard.bytes:,}")
                file.seek(start)
                content = file.read(size)
        except OSError as error:
            raise Lost(error.strerror or brief(error)) from error
        if len(content) != size:
            raise Lost("cut off")
        return content

    def expect(self, windows: Sequence[Sequence[Shard]]) -> None:
        pass


class RemoteStore:
    """Shards at a URL, fetched whole into a cache where several images are wanted of them, which `expect` says.

    Of others, such as those of the few images that a run looks at before it starts, parts are read.
    """

    def __init__(self, url: str, cache: Cache, window_bytes: float) -> None:
        self.url = url
        self.cache = cache
        self.read_alone: Counter[str] = Counter()
        self.whole = window_bytes <= cache.most_bytes
        if not self.whole:
            say_once(
                f"{cache.folder}: may hold {cache.most_bytes / 1e9:,.1f} GB, but shards of "
                f"{window_bytes / 1e9:,.1f} GB are read together: images of {url} are read one by one, slower; set "
                "FCMAE_CACHE=FOLDER on another disk, or FCMAE_CACHE_GB"
            )

    def _file(self, shard: Shard) -> File:
        return File(join(self.url, shard.file), shard.bytes, shard.sha256)

    def read(self, shard: Shard, start: int, size: int) -> bytes:
        file = self._file(shard)
        path = self.cache.find(file)
        if path is None:
            self.read_alone[shard.file] += 1
            wanted = self.read_alone[shard.file] > READ_ALONE or self.cache.is_coming(file)
            if not (wanted and self.whole):
                try:
                    return read(file.url, start, start + size)
                except NoParts:
                    pass
                except OSError as error:
                    raise Lost(brief(error)) from error
        try:
            return self._read_copy(file, path, start, size)
        except Lost:
            raise
        except OSError as error:
            if not self.whole:
                raise Lost(brief(error)) from error
            self.whole = False
            say_once(f"{self.cache.folder}: {brief(error)}; remote images are read one by one, slower")
            return self.read(shard, start, size)

    def _read_copy(self, file: File, path: Path | None, start: int, size: int) -> bytes:
        with suppress(FileNotFoundError), open(path or self.cache.fetch(file), "rb", buffering=0) as copy:
            copy.seek(start)
            return copy.read(size)
        with open(self.cache.fetch(file), "rb", buffering=0) as copy:  # another process has made room meanwhile
            copy.seek(start)
            return copy.read(size)

    def expect(self, windows: Sequence[Sequence[Shard]]) -> None:
        expected: list[File] = []
        for window in windows:
            files = [self._file(shard) for shard in window]
            if self.whole and sum(file.size for file in (*expected, *files)) <= self.cache.most_bytes:
                expected += files
        if expected:
            self.cache.expect(expected)


class ShardFiles:
    """The image files in the shards at a place, a folder or a URL.

    Raises:
        UserError: if what it says of itself is not there or damaged.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        name = join(place, SHARDS)
        try:
            if is_url(place):
                self.contents = Contents.model_validate_json(read(name))
                cache = Cache.of_this_machine()
                mean_bytes = statistics.mean(shard.bytes for shard in self.contents.shards)
                window_bytes = mean_bytes * min(self.contents.window, len(self.contents.shards))
                self.store: Store = RemoteStore(place, cache, window_bytes)
                index = self.contents.index
                name = join(place, index.file)
                self.members = Members.read(cache.fetch(File(name, index.bytes, index.sha256)), self.contents)
            else:
                self.contents = Contents.model_validate_json(Path(name).read_bytes())
                self.store = LocalStore(place)
                name = join(place, self.contents.index.file)
                self.members = Members.read(Path(name), self.contents)
        except UserError:
            raise
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            reason = f"{where}: {error.errors()[0]['msg']}"
            raise UserError(f"{name}: not what fcmae shard writes ({shown(reason)}); copy it anew") from error
        except Exception as error:  # what NumPy and zipfile raise for a damaged file
            raise UserError(f"{name}: cannot be read ({brief(error)}); copy it anew, or run fcmae shard") from error
        self.labels = None if self.members.labels is None else self.members.labels.astype(np.int64)
        names = self.contents.class_names
        self.class_names = None if names is None else tuple(names)
        if self.labels is not None:
            check_labels(self.labels, name)
            if names is not None and self.labels.max() >= len(names):
                raise UserError(f"{name}: label {self.labels.max()}, but {len(names)} names; copy it anew")
        self.ends = self.members.counts.cumsum()

    def __reduce__(self) -> tuple[type["ShardFiles"], tuple[str]]:
        return ShardFiles, (self.place,)

    def __len__(self) -> int:
        return len(self.members.starts)

    def _shard(self, index: int) -> int:
        return int(self.ends.searchsorted(index, "right"))

    def name(self, index: int) -> str:
        shard = self.contents.shards[self._shard(index)]
        return f"{join(self.place, shard.file)}/{self.members.name(index)}"

    def open(self, index: int) -> IO[bytes]:
        number = self._shard(index)
        shard = self.contents.shards[number]
        try:
            content = self.store.read(shard, int(self.members.starts[index]), int(self.members.sizes[index]))
        except Lost as error:
            first = int(self.ends[number]) - shard.images
            raise LostShard(join(self.place, shard.file), first, str(error)) from error
        return io.BytesIO(content)

    def expect(self, windows: Sequence[Sequence[int]]) -> None:
        """Learn which shards are read next, by number."""
        self.store.expect([[self.contents.shards[number] for number in window] for window in windows])

    @property
    def shards(self) -> Shards:
        """How the images lie in them."""
        return Shards(self.members.counts, self.contents.window, self.expect)


class ShardSource(ImageSource):
    """Images in shards, decoded as those of files are."""

    def __init__(self, files: ShardFiles, channels: int | None, reading: Reading = AS_STORED) -> None:
        place = Path(re.sub("//+", "/", files.place)) if is_url(files.place) else Path(files.place).resolve()
        super().__init__(files, channels, place, reading)
        self.shards = files.shards


def holds_shards(place: str) -> bool:
    """Whether a folder, or what lies at a URL, holds shards.

    Raises:
        UserError: if there is no telling: nothing here knows such URLs, or the network fails.
    """
    if not is_url(place):
        return os.path.isfile(os.path.join(place, SHARDS))
    try:
        read(join(place, SHARDS), 0, 1)
    except Refused:
        return False
    except OSError as error:
        raise UserError(
            f"{join(place, SHARDS)}: {brief(error)}; is the address right, and the network up?"
        ) from error
    return True
