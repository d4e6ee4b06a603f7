"""Weight files that are damaged, or made to harm: refused in one line that names the file and what is wrong."""

import json
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, error_line, randomise, run_main, small_encoder
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from weight_files import MEAN, STD, little_memory, same, save_run

from fcmae import FCMAE
from fcmae.commands import diagnose, export, predict
from fcmae.config import PretrainConfig, parse_config
from fcmae.errors import UserError
from fcmae.load import load_encoder, load_fcmae, load_weights
from fcmae.weights.base import Preprocessing
from fcmae.weights.networks import PLAIN
from fcmae.weights.read import read_tensors, read_weights
from fcmae.weights.timm import write_timm_folder

NAME = "stages.0.0.norm.weight"


def state(**kwargs: Any) -> dict[str, Any]:
    return dict(small_encoder(**kwargs).float().state_dict())


def refusal(path: Path, read: Callable[[Path], object] = read_weights) -> str:
    """The line with which reading ends, which names the path and takes little memory."""
    with pytest.raises(UserError) as caught, little_memory():
        read(path)
    line = str(caught.value)
    assert str(path.parent) in line
    assert line.isprintable()
    assert len(line) < 2000
    return line


ODD_TENSORS: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(8).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(8, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4), torch.ones(8)]),
    "negated": lambda: torch.complex(torch.ones(8), torch.ones(8)).conj().imag,
    "bool": lambda: torch.ones(8, dtype=torch.bool),
    "complex64": lambda: torch.ones(8, dtype=torch.complex64),
    "int8": lambda: torch.ones(8, dtype=torch.int8),
    "float8_e4m3fn": lambda: torch.ones(8).to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore:.*(deprecated|prototype stage)")  # of torch, about these kinds
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_a_tensor_that_is_no_dense_one_of_floats_is_named(kind: str, older: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(state() | {NAME: ODD_TENSORS[kind]()}, path, _use_new_zipfile_serialization=not older)
    assert re.search(rf"x\.pth: {NAME} is a [a-z0-9_. ]*{kind} tensor, not a dense one of floats", refusal(path))


def test_integers_are_no_weights_even_where_the_shape_fits(tmp_path: Path) -> None:
    whole = state() | {NAME: torch.ones(8, dtype=torch.int64)}
    torch.save(whole, tmp_path / "x.pth")
    save_file(whole, tmp_path / "x.safetensors")
    for path in tmp_path.iterdir():
        assert f"1 tensors differ: {NAME} is int64 (8,), not (8,)" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_any_width_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = {name: tensor.to(dtype) for name, tensor in state().items()}
    torch.save(wanted, tmp_path / "x.pth")
    assert same(read_tensors(tmp_path / "x.pth"), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_weights_that_are_not_finite_in_float32_are_not_used(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = small_encoder(num_classes=3)
    encoder.get_parameter(NAME).data[3] = value
    torch.save(encoder.state_dict(), tmp_path / "x.pth")
    PLAIN.write(encoder, Preprocessing(MEAN, STD), tmp_path)
    (tmp_path / "images").mkdir()
    for source in (tmp_path / "x.pth", tmp_path):
        commands = (
            (predict.main, (str(source), str(tmp_path / "images"))),
            (export.main, (str(source), "--to", "timm", "--output", str(tmp_path / "out"))),
            (diagnose.main, (str(source), "--data", str(tmp_path / "images"))),
        )
        for main, arguments in commands:
            line = error_line(main, capsys, *arguments)
            assert re.search(rf"(x\.pth|model\.safetensors): {NAME} holds numbers that are not finite", line)


def test_weights_that_overflow_predict_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = small_encoder(num_classes=3)
    encoder.get_parameter("head.weight").data.fill_(3e38)
    torch.save(encoder.state_dict(), tmp_path / "x.pth")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    source, image = str(tmp_path / "x.pth"), str(tmp_path / "red.png")
    capsys.readouterr()
    assert run_main(predict.main, source, image, "--json") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "x.pth: finite weights that compute what is not" in said.err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_infinities_of_narrow_floats_are_seen(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({"x": torch.full((3,), -float("inf"), dtype=dtype)}, tmp_path / "x.pth")
    assert "x holds numbers that are not finite" in refusal(tmp_path / "x.pth")


def test_more_numbers_than_the_file_has_are_refused(tmp_path: Path) -> None:
    expanded = {
        "x.pth": torch.zeros(1).expand(10**10),
        "far.pth": torch.zeros(4).as_strided((2**20, 2**20), (0, 0)),
        "views.pth": torch.zeros(2**16).expand(64, 2**16),
    }
    for name, tensor in expanded.items():
        for older in (False, True):
            torch.save(state() | {NAME: tensor}, tmp_path / name, _use_new_zipfile_serialization=not older)
            assert f"{NAME} has more numbers than are in the file" in refusal(tmp_path / name)


def rewrite(path: Path, method: int = zipfile.ZIP_STORED, **changed: Callable[[bytes], bytes]) -> None:
    """Write a zip archive anew, with the entries changed whose name ends as a key does, `_` for a dot."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            change = changed.get(name.rpartition("/")[2].replace(".", "_"), lambda content: content)
            archive.writestr(name, change(content))


def test_a_compressed_archive_is_not_inflated(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2**18)} | state(), tmp_path / "x.pth")
    rewrite(tmp_path / "x.pth", zipfile.ZIP_DEFLATED)
    assert "x.pth: a damaged PyTorch file, or none (compressed" in refusal(tmp_path / "x.pth")
    torch.save(state(), tmp_path / "x.pth")
    rewrite(tmp_path / "x.pth", zipfile.ZIP_DEFLATED, data_pkl=lambda content: bytes(2**27))
    assert (tmp_path / "x.pth").stat().st_size < 2**20
    assert "(compressed" in refusal(tmp_path / "x.pth")


def test_storages_are_as_large_as_they_claim(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"

    def lie(content: bytes) -> bytes:
        return content.replace(b"K\x09", b"\x8a\x06" + (10**12).to_bytes(6, "little"), 1)  # of the storage alone

    torch.save({"x": torch.zeros(9)}, path)
    rewrite(path, data_pkl=lie)
    assert "none (data/0 has 36 bytes)" in refusal(path) or "none (storages overlap)" in refusal(path)
    torch.save({"x": torch.zeros(9)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(lie(path.read_bytes()))
    assert "none (a storage of 9 numbers)" in refusal(path)


def test_only_what_is_asked_for_is_read_and_its_checksum_compared(tmp_path: Path) -> None:
    raw, average = state(), state()
    torch.save({"model": raw, "model_ema": average}, tmp_path / "x.pth")
    flipped = bytearray((tmp_path / "x.pth").read_bytes())
    at = flipped.find(average[NAME].numpy().tobytes())
    flipped[at] ^= 1
    (tmp_path / "x.pth").write_bytes(flipped)
    assert same(read_tensors(tmp_path / "x.pth"), raw)
    assert "damaged PyTorch file, or none (Bad CRC-32" in refusal(
        tmp_path / "x.pth", lambda path: read_tensors(path, ema=True)
    )


@pytest.mark.parametrize("how", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
def test_files_of_torch_are_read_as_torch_reads_them(how: dict[str, Any], tmp_path: Path) -> None:
    flat = torch.randn(100)
    content: dict[str, Any] = {
        "whole": flat,
        "parameter": torch.nn.Parameter(torch.randn(3, 4).half()),
        "buffer": torch.nn.Buffer(torch.randn(2)),
        "transposed": torch.randn(3, 5).T,
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(7.0),
        "count": torch.tensor(7),
        "lr": 0.1,
        "betas": (0.9, 0.95),
        "names": ["a", "b"],
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "set": {1, 2},
        "none": None,
    }
    torch.save(content, tmp_path / "x.pth", **how)
    wanted = {name: value.detach() for name, value in content.items() if isinstance(value, Tensor)}
    assert same(read_tensors(tmp_path / "x.pth"), wanted)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stages.0.100000.dwconv.weight", "unknown keys 'stages.0.100000.dwconv.weight'"),
        ("stages.0.999.dwconv.weight", "not a whole ConvNeXt encoder: stages.0.1.dwconv.weight missing"),
        (f"stages.0.{'9' * 9000}.dwconv.weight", "unknown keys 'stages.0.9999"),
        ("stages.0.٣.dwconv.weight", "unknown keys"),
        ("stages.0.00.dwconv.weight", "unknown keys 'stages.0.00.dwconv.weight'"),
        ("a\nerror: b\x1b[31m", r"unknown keys 'a\nerror: b\x1b[31m'"),
        ("x" * 2_000_000, "unknown keys 'xxxx"),
    ],
)
def test_a_name_makes_no_network_and_no_message_long(name: str, message: str, tmp_path: Path) -> None:
    tensors = state() | {name: torch.zeros(8, 1, 7, 7)}
    torch.save(tensors, tmp_path / "x.pth")
    save_file(tensors, tmp_path / "x.safetensors")
    for path in tmp_path.iterdir():
        assert message in refusal(path)


def test_many_names_make_no_network_either(tmp_path: Path) -> None:
    some = {f"stages.{i}.{j}.dwconv.weight": torch.zeros(1) for i in range(4) for j in range(1000)}
    torch.save(state() | some, tmp_path / "x.pth")
    assert "not a whole ConvNeXt encoder: most of its tensors missing" in refusal(tmp_path / "x.pth")


def test_names_are_text(tmp_path: Path) -> None:
    torch.save(state() | {7: torch.zeros(8)}, tmp_path / "x.pth")
    assert "x.pth: 7 is a number that stands for a tensor's name" in refusal(tmp_path / "x.pth")


def safetensors(header: dict[str, Any] | bytes, numbers: bytes = b"", length: int | None = None) -> bytes:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(written) if length is None else length) + written + numbers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors({}, length=2**63), "a header of 9223372036854775808 bytes"),
        (safetensors(b"{" + b" " * 2**23 + b"}"), "a header of 8388610 bytes"),
        (safetensors({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}), "not a readable"),
        (safetensors({"x": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}), "not a readable"),
        (safetensors({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)), "not a readable"),
        (
            safetensors({"x": {"dtype": "F32", "shape": [0, 9], "data_offsets": [0, 0]}}),
            "x has 2 axes, the smallest of",
        ),
        (safetensors({"x": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}, bytes(4)), "x has 9 axes"),
        (
            safetensors({"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
            "float8_e8m0fnu",
        ),
        (
            safetensors({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "xy"}, bytes(4)),
            "not a readable",
        ),
        (b"", "neither a safetensors nor a PyTorch file"),
        (b"P", "neither a safetensors nor a PyTorch file"),
        (b"PK", "a damaged PyTorch file"),
        (b"\x80", "a damaged PyTorch file"),
    ],
)
def test_headers_that_lie_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    assert message in refusal(tmp_path / "x")


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        assert f"{name}: neither file nor folder" in refusal(tmp_path / name, load_weights)
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: no such file or folder" in refusal(tmp_path / "loop", load_weights)
    folder = tmp_path / "folder"
    (folder / "model.safetensors").mkdir(parents=True)
    (folder / "model.pth").symlink_to(tmp_path / "pipe")
    assert "folder: holds no weights" in refusal(folder, load_weights)
    write_timm_folder(small_encoder(), Preprocessing(MEAN, STD), tmp_path / "timm")
    (tmp_path / "timm" / "config.json").unlink()
    os.mkfifo(tmp_path / "timm" / "config.json")
    assert "config.json: neither a file" in refusal(tmp_path / "timm", load_weights)


LEAVES: list[tuple[str, Any]] = [
    ("mean", [0.5, float("nan"), 0.5]),
    ("mean", "0.5"),
    ("std", [0.2, 0.0, 0.2]),
    ("std", [0.2, 10**400, 0.2]),
    ("input_size", [3, 10**9, 10**9]),
    ("input_size", ["3", "64", "64"]),
    ("crop_pct", 1e-9),
    ("interpolation", 3),
    ("label_names", "cat"),
    ("label_names", ["cat", 2, "kite"]),
    ("label_names", {"0": "cat"}),
]


@pytest.mark.parametrize(("key", "value"), LEAVES)
def test_a_description_of_a_wrong_type_or_size_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    write_timm_folder(small_encoder(num_classes=3), Preprocessing(MEAN, STD, (64, 64)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "config.json: damaged (" in refusal(tmp_path)


PIXELS: list[Any] = [
    7,
    ["dtype"],
    {"dtype": "uint32"},
    {"dtype": ["uint8"]},
    {"nodata": "none"},
    {"nodata": True},
    {"nodata": 10**400},
    {"window": 1},
    {"clip": 3.0},
    {"clip": [0.0, 1.0, 2.0]},
    {"clip": [0.0, float("nan")]},
    {"clip": [[0.0, 0.0, "0"], 1.0]},
    {"clip": [0.0, [[1.0], [1.0], [1.0]]]},
]


@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize("form", ["timm", "plain"])
def test_a_description_of_pixels_that_are_none_is_refused(form: str, pixels: Any, tmp_path: Path) -> None:
    encoder, use = small_encoder(num_classes=3), Preprocessing(MEAN, STD, (64, 64))
    write_timm_folder(encoder, use, tmp_path) if form == "timm" else PLAIN.write(encoder, use, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if form == "timm":
        config["pixels"] = pixels
    elif isinstance(pixels, dict):
        config |= pixels
    else:
        config["clip"] = pixels
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "config.json: damaged (" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"network": 7}',
        '{"architecture": "convnext_tiny", "pretrained_cfg": []}',
        "{}" + " " * 2**24,
        "9" * 9999,
    ],
)
def test_a_description_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    write_timm_folder(small_encoder(), Preprocessing(MEAN, STD, (64, 64)), tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert "config.json: damaged (" in refusal(tmp_path)


@pytest.mark.parametrize(
    "network",
    [
        {"variant": "timm/resnet18", "in_chans": 10**9},
        {"variant": "timm/resnet18", "in_chans": "3"},
        {"variant": "timm/resnet18", "depths": [10**9]},
        {"variant": f"timm/{'x' * 10**6}"},
        {"variant": "roadmap/resnet50", "stem_stride": None},
        {"response": 7},
        {"response": "grn", "grn": {"aggregation": []}},
        {"response": "grn", "grn": {"eps": 1}},
    ],
)
def test_a_network_that_cannot_be_is_refused(network: dict[str, Any], tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"network": network}))
    assert "config.json: damaged (ValueError: its network has" in refusal(tmp_path)


def test_a_runs_own_configuration_takes_no_memory_before_its_weights_fit(tmp_path: Path) -> None:
    values = {"output": str(tmp_path), "model": {"variant": TINY, "stem_stride": 1, "decoder_dim": 16}}
    values |= {"data": {"root": "x", "image_size": 32}}
    config = parse_config(PretrainConfig, values, "a test").model_dump(mode="json")
    save_run(tmp_path, randomise(FCMAE(TINY, stem_stride=1, decoder_dim=16)), config=config)
    load_fcmae(tmp_path)
    (state_file,) = tmp_path.glob("checkpoints/step-*/state.json")
    whole = json.loads(state_file.read_text())
    for key, value in (
        ("decoder_dim", 10**5),
        ("decoder_depth", 10**4),
        ("in_chans", 10**5),
        ("variant", [[10**4] * 4, [8, 16, 24, 32]]),
    ):
        whole["config"]["model"] = config["model"] | {key: value}
        state_file.write_text(json.dumps(whole))
        refusal(tmp_path / "checkpoints", lambda path: load_fcmae(tmp_path))


def test_what_was_read_is_whole(tmp_path: Path) -> None:
    wanted = state(num_classes=3)
    torch.save(wanted, tmp_path / "x.pth")
    with little_memory():
        assert same(load_encoder(tmp_path / "x.pth").state_dict(), wanted)
