"""One safetensors file written by several processes, each its own rows, from threads of theirs; knows no state.

Rows of a tensor are a range of the file's bytes, so it is the file that one process would write, and no process
gathers a tensor. The files of torch.distributed.checkpoint are not written: its index is a pickle, which nobody who
only reads should have to trust.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed

from fcmae.errors import UserError
from fcmae.tensors import not_finite
from fcmae.training.sharding import Rows

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
"""Of dtypes in safetensors files."""

AllRows = Mapping[str, Mapping[str, Rows]]
"""By file, and by name of the tensor."""


def lay_out(path: Path, rows: Mapping[str, Rows]) -> None:
    """Make a safetensors file whose tensors are still to be written, as long as it will be."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # wide numbers first, so that each lies at a multiple of its size
    for name, row in sorted(rows.items(), key=lambda item: (-item[1].tensor.element_size(), item[0])):
        begin, end = end, end + torch.Size(row.shape).numel() * row.tensor.element_size()
        header[name] = {"dtype": NAMES[row.tensor.dtype], "shape": row.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if hasattr(os, "posix_fallocate"):  # so that a full disk says so here
            os.posix_fallocate(file.fileno(), 0, file.tell() + end)
        else:
            file.truncate(file.tell() + end)


def write_rows(path: Path, rows: Mapping[str, Rows]) -> None:
    """Write one's own rows to where they belong, and wait until they are on disk."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    # without a buffer, which would write again what lies between two rows, and has other processes' rows in it
    with open(path, "r+b", buffering=0) as file:
        for name, (tensor, start, shape) in rows.items():
            own = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            row_bytes = torch.Size(shape[1:]).numel() * tensor.element_size()
            file.seek(8 + length + header[name]["data_offsets"][0] + start * row_bytes)
            content = own.numpy().data
            while len(content):
                content = content[file.write(content) :]
        os.fsync(file.fileno())


class Together:
    """Threads of all processes, of which the first one's writes a checkpoint and the others' do as it says.

    They talk by messages of their own, while the processes go on. What goes wrong in one is raised in all.
    """

    def __init__(self) -> None:
        self.group: Any = torch.distributed.new_group(backend="gloo")
        self.rank = torch.distributed.get_rank()

    def _tell(self, message: tuple[str, str] | None = None) -> tuple[str, str]:
        """Say what the first process says; returns it in all."""
        messages: list[Any] = [message]
        torch.distributed.broadcast_object_list(messages, src=0, group=self.group)
        return messages[0]

    def _first(self, said: str | None) -> str | None:
        """Return the first that any process says, the same in all."""
        everything: list[str | None] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(everything, said, group=self.group)
        return next(filter(None, everything), None)

    def _write(self, path: Path, rows: Mapping[str, Rows]) -> str | None:
        """Write one's own rows; returns what went wrong in any process."""
        problem = None
        try:
            write_rows(path, rows)
        except OSError as error:
            problem = f"{error.strerror or error}, in process {self.rank}"
        return self._first(problem)

    def follow(self, files: AllRows) -> None:
        """Do what the first process says, until it has ended, in another.

        Raises:
            UserError: what went wrong in the first.
        """
        while True:
            order, what = self._tell()
            if order == "look":
                self._first(_not_finite(files[what]))
            elif order == "write":
                self._write(Path(what), files[Path(what).name])
            elif what:
                raise UserError(what)
            else:
                return

    @contextmanager
    def lead(self, files: AllRows) -> Iterator["Lead"]:
        """Inside, the others follow the first process, which this is."""
        end = ""
        try:
            yield Lead(self, files)
        except BaseException as error:
            end = str(error) or type(error).__name__
            raise
        finally:
            self._tell(("end", end))


def _not_finite(rows: Mapping[str, Rows]) -> str | None:
    return not_finite({name: row.tensor for name, row in rows.items()})


class Lead(NamedTuple):
    """What `save_checkpoint` asks for of tensors, where all processes have their rows of them."""

    together: Together
    files: AllRows

    def not_finite(self, file: str) -> str | None:
        """Return the name of a tensor of a file with a number that is not finite; None without one."""
        self.together._tell(("look", file))
        return self.together._first(_not_finite(self.files[file]))

    def fill(self, path: Path) -> None:
        """Write a file.

        Raises:
            OSError: if any process could not.
        """
        rows = self.files[path.name]
        lay_out(path, rows)
        self.together._tell(("write", str(path)))
        if problem := self.together._write(path, rows):
            raise OSError(f"{path.name}: {problem}")
