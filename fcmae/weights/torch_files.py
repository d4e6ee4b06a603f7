"""Files of torch.save, zip archives and the older pickles, as tensors by name; runs nothing, knows no network.

`torch.load` refuses code, but takes as much memory as a file asks for. Here a pickle is only data: no name in it is
looked up, each tensor is checked before its numbers are read, and only those of chosen tensors are.
"""

import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fcmae.errors import UserError, one_line
from fcmae.tensors import LONGEST_HEADER, require_plain

MOST_INSTRUCTIONS = 2**20
"""Of one pickle: ten times those of the largest checkpoint with optimizer and EMA."""

MOST_ARGUMENTS = 20
"""Of a call or a shape, so that one long tuple cannot be read over and over."""

CHUNK = 2**20

MAGIC = (0x1950A86A20F9469CFC6C, 1001)
"""What the older files begin with, two pickles."""

STORAGES = {
    f"torch.{place}{kind}Storage": dtype
    for place in ("", "cuda.")
    for kind, dtype in {
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Float": torch.float32,
        "Double": torch.float64,
        "Bool": torch.bool,
        "Byte": torch.uint8,
        "Char": torch.int8,
        "Short": torch.int16,
        "Int": torch.int32,
        "Long": torch.int64,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "QInt8": torch.qint8,
        "QUInt8": torch.quint8,
        "QInt32": torch.qint32,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}
"""What torch calls memory of a dtype."""

SETTINGS = {
    "argparse.Namespace",
    "collections.Counter",
    "torch.Size",
    "torch.Tensor",
    "torch.device",
    "torch.serialization._get_layout",
    "_codecs.encode",
    *(f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("bytearray", "complex", "set")),
    *(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)),
    *(f"torch.per_{what}" for what in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")),
}
"""What is no code, and says nothing of tensors that we need."""


LITERALS: dict[str, Any] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), ...),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING"), ...),
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "EMPTY_SET": None,
}
"""Instructions of pickles that stand for a value: that which follows, or this."""


class Storage(NamedTuple):
    """Numbers in a file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class View(NamedTuple):
    """A tensor whose numbers were not read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def described(self) -> tuple[torch.dtype | str, tuple[int, ...]]:
        """As `require_plain` takes it."""
        return self.storage.dtype, self.shape


class Odd(NamedTuple):
    """A tensor of a kind that weights are not."""

    kind: str

    @property
    def described(self) -> tuple[torch.dtype | str, tuple[int, ...]]:
        return self.kind, ()


class Global(NamedTuple):
    """A name that a pickle looks up."""

    name: str


class Code(ValueError):
    """A pickle asks for code."""


class Structure(io.BufferedReader):
    """A file of which `read` gives only short pieces, descriptions of tensors; `readinto` reads their numbers."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:  # the last bytes of an archive
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > LONGEST_HEADER:
            raise ValueError(f"{size} bytes of description")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(LONGEST_HEADER)


# A pickle as data


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> View | Odd:
    """A tensor as torch describes it; then come whether it is trained, its hooks, and whether it is negated."""
    if not isinstance(storage, Storage) or max(len(shape), len(strides)) > MOST_ARGUMENTS:
        raise ValueError("a tensor without storage, or of many axes")
    if any(type(number) is not int for number in (offset, *shape, *strides)):
        raise ValueError("a tensor without shape")
    return Odd("negated") if len(more) > 2 and more[2] else View(storage, offset, shape, strides)


def _ordered(pairs: Any = None) -> dict[Any, Any]:
    """An OrderedDict; Python 2 gave it its items at once, here only to the first that asks for them."""
    made = dict(_known(pairs or ()))
    if pairs:
        pairs.clear()
    return made


def _odd(kind: str) -> Callable[..., Odd]:
    return lambda *args: Odd(kind)


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_parameter": lambda data, *more: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *more: data,
    "torch.nn.parameter.Parameter": lambda data, *more: data,
    "torch._tensor._rebuild_from_type_v2": lambda what, kind, args, state: _call(what, args),
    "torch._utils._rebuild_tensor_v3": lambda *args: Odd(" ".join(x.name for x in args if isinstance(x, Global))),
    "torch._utils._rebuild_sparse_tensor": _odd("sparse"),
    "torch._utils._rebuild_qtensor": _odd("quantised"),
    "torch._utils._rebuild_meta_tensor_no_storage": _odd("meta"),
    "torch._utils._rebuild_nested_tensor": _odd("nested"),
    "torch._utils._rebuild_wrapper_subclass": _odd("wrapped"),
    "torch._utils._rebuild_device_tensor_from_numpy": _odd("foreign device's"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _odd("foreign device's"),
}
"""What torch calls to make a state dict, and what stands for the result here; nothing of it is torch's."""

NO_CODE = SETTINGS | STORAGES.keys() | CALLS.keys()


def _call(what: Any, args: Any) -> Any:
    """Return what stands for the result of a call, None for that of settings."""
    if len(args) > MOST_ARGUMENTS:
        raise ValueError(f"{len(args)} arguments")
    return CALLS.get(what.name, lambda *args: None)(*args)


def _known(pairs: Any) -> list[tuple[Any, Any]]:
    """Return the pairs whose key is a name or number; any other could take for ever to hash."""
    return [(key, value) for key, value in pairs if isinstance(key, str | int | float | None)]


def read_pickle(file: BinaryIO, find: Callable[[Storage], Storage] = lambda storage: storage) -> Any:
    """Read one pickle as plain data: dicts, lists, tuples, numbers, text, `View` and `Odd`; None for all else.

    Args:
        file: read up to the end of the pickle.
        find: called with each storage.

    Raises:
        Code: for a name that is not torch's for tensors.
        ValueError, KeyError, IndexError, TypeError, AttributeError: for what torch.save does not write.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for count, (instruction, value, _) in enumerate(pickletools.genops(file)):
        if count > MOST_INSTRUCTIONS:
            raise ValueError("too long a description")
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in LITERALS:
                stack.append(value if LITERALS[name] is ... else LITERALS[name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, outer.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                number = int(instruction.name[-1])
                stack[-number:] = [tuple(stack[-number:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items, stack = stack, outer.pop()
                stack[-1].extend(items)
            case "ADDITEMS":
                stack = outer.pop()
            case "SETITEM":
                item, key = stack.pop(), stack.pop()
                stack[-1].update(_known([(key, item)]))
            case "SETITEMS":
                items, stack = stack, outer.pop()
                stack[-1].update(_known(zip(items[::2], items[1::2], strict=True)))
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL" | "STACK_GLOBAL":
                name = ".".join([stack.pop(), stack.pop()][::-1]) if value is None else value.replace(" ", ".", 1)
                if name not in NO_CODE:
                    raise Code(name)
                stack.append(Global(name))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack[-1] = _call(stack[-1], args)
            case "BUILD":  # attributes of what stays
                stack.pop()
            case "BINPERSID":
                kind, key, _, numel = stack.pop()[1:5]
                if not isinstance(key, str) or type(numel) is not int or numel < 0:
                    raise ValueError("a storage without name or size")
                stack.append(find(Storage(key, STORAGES[kind.name], numel)))
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"pickle instruction {other}")


# Files


class Content(NamedTuple):
    """A file whose tensors were not read."""

    data: Any
    """What was saved, see `read_pickle`."""
    open_storage: Callable[[Storage], BinaryIO]
    """Return a file that stands at the numbers of a storage, which are all there.

    Raises ValueError or KeyError if they are not."""


def _open_archive(file: Structure) -> Content:
    """Read what a zip archive of torch.save holds besides numbers."""
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    (pickled,) = names
    folder = pickled.partition("/")[0]

    def open_entry(name: str, size: int | None = None) -> Any:
        info = archive.getinfo(f"{folder}/{name}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ValueError("compressed, which torch.save never does")
        if not (info.file_size <= LONGEST_HEADER if size is None else info.file_size == size):
            raise ValueError(f"{one_line(name, longest=60)} has {info.file_size} bytes")
        return archive.open(info)

    if f"{folder}/byteorder" in archive.NameToInfo and open_entry("byteorder").read(7) != b"little":
        raise ValueError("from a machine of another byte order")
    with open_entry("data.pkl") as pickle:
        data = read_pickle(io.BytesIO(pickle.read()))
    return Content(data, lambda storage: open_entry(f"data/{storage.key}", storage.nbytes))


def _open_pickles(file: Structure) -> Content:
    """Read what an older file of torch.save holds besides numbers: five pickles, then sizes and storages."""
    if (read_pickle(file), read_pickle(file)) != MAGIC:
        raise ValueError("no magic number")
    system = read_pickle(file)
    if system.get("little_endian") is False:
        raise ValueError("from a machine of another byte order")
    storages: dict[str, Storage] = {}
    data = read_pickle(file, lambda storage: storages.setdefault(storage.key, storage))
    places: dict[str, int] = {}
    end = os.fstat(file.fileno()).st_size
    for key in read_pickle(file):
        (numel,) = struct.unpack("<q", file.read(8))
        places[key] = file.tell()
        size = storages[key].nbytes
        if numel != storages[key].numel or size > end - file.tell():
            raise ValueError(f"a storage of {numel} numbers")
        file.seek(size, os.SEEK_CUR)

    def open_storage(storage: Storage) -> BinaryIO:
        file.seek(places[storage.key])
        return file

    return Content(data, open_storage)


def _read_numbers(file: BinaryIO, storage: Storage) -> Tensor:
    """Read the numbers of a storage, (numel,); of a zip archive their checksum is compared."""
    numbers = bytearray(storage.nbytes)
    for start in range(0, len(numbers), CHUNK):
        piece = memoryview(numbers)[start : start + CHUNK]
        if file.readinto(piece) != len(piece):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("cut off")
    return torch.frombuffer(numbers, dtype=storage.dtype)


MALFORMED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)
"""What reading raises where a file is not as torch.save writes it."""


def read_torch(path: Path, choose: Callable[[Any], Mapping[Any, Any]]) -> dict[str, Tensor]:
    """Read tensors by name from a file of torch.save, without running anything that it holds.

    Args:
        path: of the file, in any format that torch has written since 0.2.
        choose: returns the tensors by name, `View` in place of each, among what the file holds.

    Raises:
        UserError: if it is damaged, compressed or asks for code, or a tensor is no plain one of floats; what
            `choose` raises.
    """

    def damaged(error: Exception) -> UserError:
        return UserError(
            f"{path}: a damaged PyTorch file, or none ({one_line(str(error), longest=100)}); get it again"
        )

    with Structure(io.FileIO(path)) as file:
        try:
            content = (_open_archive if file.peek(2).startswith(b"PK") else _open_pickles)(file)
        except Code as error:
            code = one_line(str(error), longest=80)
            raise UserError(
                f"{path}: a pickle that holds code ({code}), which was not run; ask for safetensors, or, if you "
                "trust its author, save its state dict alone with torch.save"
            ) from error
        except MALFORMED as error:
            raise damaged(error) from error
        chosen = {name: x for name, x in choose(content.data).items() if isinstance(x, View | Odd)}
        require_plain(path, {name: x.described for name, x in chosen.items()})
        views = {name: view for name, view in chosen.items() if isinstance(view, View)}
        storages = {view.storage for view in views.values()}
        try:
            if sum(storage.nbytes for storage in storages) > path.stat().st_size:
                raise ValueError("storages overlap")
            read = {storage: _read_numbers(content.open_storage(storage), storage) for storage in storages}
            return {
                name: read[view.storage].as_strided(view.shape, view.strides, view.offset)
                for name, view in views.items()
            }
        except (*MALFORMED, RuntimeError) as error:
            raise damaged(error) from error
