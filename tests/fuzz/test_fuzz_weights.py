"""Malformed weight files and folders: each loads whole or ends in one line, runs nothing, takes little memory.

Not noticed is a changed bit of a number that stays finite, in a format without checksums: safetensors, and torch's
older pickles. The bytes of a checkpoint are checked against its SHA256SUMS, by whom resumes.
"""

import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import fuzzed, small_encoder
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor
from weight_files import little_memory, save_run

from fcmae.errors import UserError, blame
from fcmae.load import load_weights
from fcmae.tensors import write_safetensors
from fcmae.weights.base import Preprocessing, build_encoder
from fcmae.weights.export import write_folder
from fcmae.weights.official import DENSE, SPARSE
from fcmae.weights.timm import to_timm
from fcmae.weights.transformers import to_transformers


class Files(dict[str, bytes]):
    """A folder: content by name."""

    def __repr__(self) -> str:
        return repr({name: f"{len(content)} bytes" for name, content in self.items()})


NARROW = ((1, 1, 2, 1), (2, 4, 4, 8))
KNOWN = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3), (64, 64), 0.8, "bicubic", (0.0, 1.0))
CANARY = "canary"


class Bomb:
    """Pickled, it would make a folder when loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def content_of(folder: Path) -> Files:
    files = (path for path in folder.rglob("*") if path.is_file())
    return Files({str(path.relative_to(folder)): path.read_bytes() for path in files})


def saved(content: Any, **how: Any) -> bytes:
    torch.save(content, file := io.BytesIO(), **how)
    return file.getvalue()


def write_transformers(folder: Path) -> None:
    write_safetensors(
        folder / "model.safetensors", to_transformers(small_encoder(variant=NARROW, num_classes=3).state_dict())
    )
    config = {"hidden_sizes": NARROW[1], "id2label": {"0": "cat", "1": "dog", "2": "kite"}}
    processor = {"image_mean": KNOWN.mean, "image_std": KNOWN.std, "size": {"shortest_edge": 80}, "resample": 3}
    processor |= {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "rescale_factor": 1 / 255}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def write_run(folder: Path) -> None:
    config = {"data": {**KNOWN._asdict(), "value_range": None}, "model": {"response": "grn", "grn": {}}}
    encoder = small_encoder(variant=NARROW, num_classes=3).float()
    save_run(folder, encoder, encoder, config=config, class_names=["cat", "dog", "kite"], best=7)


def write_file(how: Callable[[dict[str, Tensor]], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.pth").write_bytes(how(dict(classifier().state_dict())))


def classifier() -> Any:
    return small_encoder(variant=NARROW, num_classes=3).float()


SEEDS: dict[str, Callable[[Path], object]] = {
    "timm": lambda folder: write_folder(classifier(), KNOWN, folder),
    "plain": lambda folder: write_folder(small_encoder(variant=NARROW, response="lrn").float(), KNOWN, folder),
    "official": lambda folder: DENSE.write(classifier(), KNOWN, folder),
    "official-sparse": lambda folder: SPARSE.write(small_encoder(variant=NARROW).float(), KNOWN, folder),
    "transformers": write_transformers,
    "run": write_run,
    "zip": write_file(lambda state: saved({"model": state, "model_ema": state, "epoch": 3})),
    "older": write_file(lambda state: saved({"state_dict": to_timm(state)}, _use_new_zipfile_serialization=False)),
}
"""By name, what writes a sound folder."""


@cache
def seed(name: str) -> Files:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        SEEDS[name](Path(folder))
        return content_of(Path(folder))


# Damage

ODD_NUMBERS = (-1, 0, 1, 2, 7, 2**16, 10**6, 2**31, 2**40, 2**62, 2**63, 10**20, 1.5, 1e308)
ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        *ODD_NUMBERS,
        float("nan"),
        float("inf"),
        10**400,
        "",
        "x",
        "timm/resnet18",
        "../x",
        "a" * 9999,
    ),
    *([], {}, [0], [0, 0, 0], ["a"], [[]], [[[]]], {"a": {}}, [1e308] * 3, [float("nan")] * 3, [0.5] * 1000),
)
ODD_NAMES = (
    *("", "x", "norm.weight", "stages.0.100000.dwconv.weight", "stages.0.999.dwconv.weight", "stages.9.0.gamma"),
    *(
        f"stages.0.{'9' * 5000}.dwconv.weight",
        "stages.0.00.dwconv.weight",
        "stages.0.٣.dwconv.weight",
        "a\nb\x1b[31m",
    ),
    *("module." * 9, "stages.0.1.grn.gamma", "decoder.pred.weight", "encoder.norm.weight", "x" * 100_000),
)
ODD_DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "I64",
    "U16",
    "F16",
    "BF16",
    "F64",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    "X",
    7,
    None,
)


def nested_places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where values are in what JSON holds."""
    yield path
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from nested_places(value, (*path, key))


def replaced(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy with another value at one place; `...` takes it out."""
    if not path:
        return None if new is ... else new
    copy: Any = dict(values) if isinstance(values, dict) else list(values)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(values[path[0]], path[1:], new)
    return copy


def damage_bytes(draw: Any, content: bytes, folder: str) -> bytes:
    """Flip bits, cut, repeat or overwrite, most often where descriptions are: at both ends."""
    for _ in range(draw(st.integers(1, 4))):
        length = len(content)
        near = min(length, 3000)
        places = st.one_of(st.integers(0, near), st.integers(length - near, length), st.integers(0, length))
        at = min(draw(places), max(length - 1, 0))
        size = draw(st.sampled_from((1, 2, 8, 100)))
        bit = 1 << draw(st.integers(0, 7))
        match draw(st.sampled_from(("flip", "flip", "flip", "cut", "drop", "repeat", "zero", "ones"))):
            case "flip":
                content = content[:at] + bytes(byte ^ bit for byte in content[at : at + 1]) + content[at + 1 :]
            case "cut":
                content = content[:at]
            case "drop":
                content = content[:at] + content[at + size :]
            case "repeat":
                content = content[:at] + content[at : at + size] * 3 + content[at + size :]
            case "zero" | "ones" as how:
                content = content[:at] + (b"\0" if how == "zero" else b"\xff") * size + content[at + size :]
    return content


def damage_json(draw: Any, content: bytes, folder: str) -> bytes:
    """Replace or take out a value, anywhere; now and then what is no JSON, or nested too deep."""
    values = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(nested_places(values))))
        values = replaced(values, place, draw(st.sampled_from((..., *ODD_VALUES))))
    deep = b"[" * 100_000
    return draw(st.sampled_from((json.dumps(values).encode(),) * 9 + (deep, b"", b"\xff\xfe{}", b"9" * 9999)))


def damage_header(draw: Any, content: bytes, folder: str) -> bytes:
    """Rewrite what a safetensors file says of its tensors, or how long that is."""
    (length,) = struct.unpack("<Q", content[:8])
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    number = st.sampled_from(ODD_NUMBERS)
    entry: Any = dict(header[name])
    match draw(st.sampled_from(("dtype", "shape", "offsets", "name", "drop", "add", "length", "metadata", "swap"))):
        case "dtype":
            entry["dtype"] = draw(st.sampled_from(ODD_DTYPES))
        case "shape":
            entry["shape"] = draw(st.one_of(st.lists(number, max_size=5), st.just([1] * 3000), st.just("x")))
        case "offsets":
            entry["data_offsets"] = draw(st.lists(number, max_size=3))
        case "name":
            del header[name]
            name = draw(st.sampled_from(ODD_NAMES))
        case "drop":
            entry = None
        case "add":
            header |= {
                f"stages.0.{i}.gamma": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(999)
            }
        case "metadata":
            header["__metadata__"] = draw(st.sampled_from(ODD_VALUES))
        case "swap":
            entry = header[other]
        case "length":
            new = draw(st.sampled_from((0, 1, length + 1, 2**20, 100_000_000, 2**40, 2**63)))
            return struct.pack("<Q", new) + content[8:]
    if entry is None:
        header.pop(name, None)
    else:
        header[name] = entry
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + numbers


def odd_tensor(draw: Any, tensor: Tensor, folder: str) -> Any:
    """A tensor of another kind, dtype, shape or value; or no tensor."""
    dtypes = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
    dtype = draw(st.sampled_from((*dtypes, torch.float8_e4m3fn, torch.uint16)))
    value = draw(st.sampled_from((float("nan"), float("inf"), -float("inf"), 3e38, 0.0)))
    many = draw(st.sampled_from((10, 10**6, 10**10, 2**40)))
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: tensor.to(dtype),
        lambda: tensor.to(dtype),
        lambda: tensor.to_sparse(),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda: tensor.to("meta"),
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: torch.zeros(1).expand(many),
        lambda: torch.zeros(()).expand(*tensor.shape, many),
        lambda: torch.full_like(tensor, value),
        lambda: torch.full_like(tensor.double(), 1e300),
        lambda: torch.zeros(0, *tensor.shape),
        lambda: tensor.reshape(*(1,) * 40, *tensor.shape),
        lambda: tensor.flatten(),
        lambda: tensor.mT if tensor.ndim > 1 else tensor[:0],
        lambda: torch.nn.Parameter(tensor),
        lambda: torch.complex(tensor, tensor).conj().imag,
        lambda: Bomb(f"{folder}/{CANARY}"),
        lambda: [tensor],
        lambda: "weights",
    )
    return draw(st.sampled_from(kinds))()


def damage_state(draw: Any, content: bytes, folder: str) -> bytes:
    """Change tensors and names of a state dict, then save it in a way of torch's."""
    state: dict[Any, Any] = dict(classifier().state_dict())
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(list(state)))
        match draw(st.sampled_from(("tensor", "tensor", "tensor", "name", "key", "drop"))):
            case "tensor" if isinstance(state[name], Tensor) and state[name].layout == torch.strided:
                try:
                    state[name] = odd_tensor(draw, state[name], folder)
                except (RuntimeError, NotImplementedError):
                    state[name] = torch.zeros(3)
            case "name":
                state[draw(st.sampled_from(ODD_NAMES))] = state.pop(name)
            case "key":
                state[draw(st.sampled_from((7, None, 1.5, (1, 2), b"x", True)))] = state[name]
            case _:
                del state[name]
    wrapped = draw(
        st.sampled_from((state, {"model": state}, {"model": {}, "state_dict": state}, [state], {"model": [1]}))
    )
    if draw(st.integers(0, 4)) == 0:
        wrapped = {"model": state, "hook": Bomb(f"{folder}/{CANARY}")}
    how: dict[str, Any] = draw(
        st.sampled_from(
            ({}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 0})
        )
    )
    try:
        return saved(wrapped, **how)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError):  # what torch cannot save
        return saved({"model": {}})


def damage_zip(draw: Any, content: bytes, folder: str) -> bytes:
    """Write the archive anew: compressed, with entries twice, missing, longer or shorter, or another pickle."""
    if not content.startswith(b"PK"):
        return content[: len(content) // 2]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    method = draw(
        st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    )
    at = draw(st.integers(0, len(entries) - 1))
    pickled = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    match draw(st.sampled_from(("none", "twice", "drop", "zeros", "short", "pickle", "bomb", "foreign"))):
        case "twice":
            entries.append(entries[at])
        case "drop":
            del entries[at]
        case "zeros":
            entries[at] = (entries[at][0], bytes(20_000_000))
            method = zipfile.ZIP_DEFLATED
        case "short":
            entries[at] = (entries[at][0], entries[at][1][:-1])
        case "pickle":
            entries[pickled] = (entries[pickled][0], damage_bytes(draw, entries[pickled][1], folder))
        case "bomb":
            entries[pickled] = (entries[pickled][0], b"cos\nmkdir\n(V" + f"{folder}/{CANARY}".encode() + b"\ntR.")
        case "foreign":
            entries.append(("archive/byteorder", b"big"))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


def hostile_pickle(draw: Any, content: bytes, folder: str) -> bytes:
    """A pickle written by hand: calls that take memory, bombs of references, lies about sizes."""
    code = f"cposix\nmkdir\n(V{folder}/{CANARY}\ntR.".encode()
    calls = (
        b"cbuiltins\nbytearray\n",
        b"ctorch\nTensor\n",
        b"ctorch\nFloatTensor\n",
        b"ctorch.storage\nUntypedStorage\n",
    )
    laughs = b"\x80\x02}q\x00h\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"K\x01s."
    doubled = (
        b"\x80\x02X\x01\x00\x00\x00a"
        + b"".join(b"q\x00c_codecs\nencode\nh\x00X\x03\x00\x00\x00hex\x86R" for _ in range(40))
        + b"."
    )
    bodies = (
        code,
        laughs,
        doubled,
        *(b"\x80\x02" + call + b"\x8a\x06\0\0\0\0\0\x01\x85R." for call in calls),
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xffab.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.",
        b"\x80\x02" + b"(" * 5000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b".",
        b"\x80\x02" + b"N" + b"\x85" * 100_000 + b".",
        b"\x80\x02}" + b"N" + b"\x85" * 100_000 + b"K\x01s.",
    )
    body = draw(st.sampled_from(bodies))
    if draw(st.booleans()):
        return body
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", body)
    return out.getvalue()


WAYS: dict[str, tuple[Callable[[Any, bytes, str], bytes], ...]] = {
    ".json": (damage_bytes, *[damage_json] * 4),
    ".safetensors": (damage_bytes, *[damage_header] * 2),
    ".pth": (damage_bytes, *[damage_state] * 3, *[damage_zip] * 2, hostile_pickle),
}
"""By the end of a file's name, how it can be damaged: (hypothesis' draw, content, the folder) -> content."""


@st.composite
def damaged_folder(draw: Any, folder: str) -> Files:
    """A folder one of whose files is damaged, seldom more of them."""
    files = Files(seed(draw(st.sampled_from(list(SEEDS)))))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        name = draw(st.sampled_from(sorted(files)))
        damage = draw(st.sampled_from(WAYS.get(Path(name).suffix, (damage_bytes,))))
        try:
            files[name] = damage(draw, files[name], folder)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error, zipfile.BadZipFile):
            files[name] = damage_bytes(draw, files[name], folder)  # of what is damaged already
    return files


# What must hold


@fuzzed(150, 3000)
@given(data=st.data())
def test_any_file_loads_whole_or_ends_in_one_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = data.draw(damaged_folder(name))
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        places = (folder / file for file in sorted(files) if file.endswith((".pth", "model.safetensors")))
        source = data.draw(st.sampled_from((folder, folder, *places)))
        ema = data.draw(st.sampled_from((*[None] * 9, True)))
        network, line = None, ""
        try:
            with little_memory():
                weights = load_weights(source, ema=ema)
                network = build_encoder(weights)
                with blame(str(source)):  # as commands do
                    weights.preprocessing.completed(network)
        except UserError as error:
            line = str(error)
        event(line.partition(": ")[2][:40] or "loaded")
        assert line == "" or name in line
        assert line.isprintable()
        assert len(line) < 2500
        if network is not None:
            assert all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())
        assert content_of(folder) == files
        assert not (folder / CANARY).exists()
