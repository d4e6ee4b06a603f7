"""A network in the formats of others: written aside, checked against ours on random images, then given its name.

Each format is how to write a folder and how to compute with what was written. Only here are the packages of
`pip install 'fcmae[export]'` imported, and only when asked for.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fcmae.encoder.convnext import ConvNeXtV2
from fcmae.errors import UserError, blame
from fcmae.training.checkpoint import MODEL
from fcmae.weights.convert import dense_to_official_sparse, to_transformers, write_timm_folder
from fcmae.weights.read import CONFIG, Preprocessing, Weights, build_encoder, preprocessing, read_weights

TORCH_FILE, ONNX_FILE, PROGRAM_FILE = "model.pth", "model.onnx", "model.pt2"


class Use(NamedTuple):
    """What a network is used with."""

    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None


class Format(NamedTuple):
    """A way to write a network."""

    write: Callable[[ConvNeXtV2, Use, Path], None]
    """(network in float32, its use, folder)."""
    compute: Callable[[Path, Tensor], Tensor]
    """(folder, images) -> what the network in the folder gives, in the images' dtype."""
    dtype: torch.dtype
    """In which the two are compared."""
    tolerance: float
    """Largest difference, relative to the largest output."""
    how: str
    """To load it, with FOLDER for the folder and a classifier in it."""


class Exported(NamedTuple):
    """What was written and checked."""

    files: tuple[Path, ...]
    difference: float
    """Largest on random images, relative to the largest output."""
    how: str
    """To load it."""


def export(weights: Weights, to: str, output: Path) -> Exported:
    """Write the network of `weights` as a folder of format `to`, after checking that it computes the same.

    Raises:
        UserError: if the format cannot hold this network, a package is missing, `output` is in use, or what was
            written computes something else; then nothing is left.
    """
    kind = FORMATS[to]
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; name another folder")
    encoder = build_encoder(weights).eval()
    use = Use(preprocessing(weights), weights.class_names)
    aside = output.absolute().with_name(f".writing-{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        needed = 2**20 + sum(value.nbytes for value in encoder.state_dict().values())
        if shutil.disk_usage(aside).free < needed:
            raise UserError(f"--output {output}: takes {needed / 1e6:.0f} MB, more than is free; free some space")
        with blame(f"--to {to}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters' own internals
            kind.write(encoder, use, aside)
            difference = _difference(kind, encoder, aside)
        if not difference <= kind.tolerance:
            raise UserError(
                f"--to {to}: what was written differs from the network by {difference:.1e}, more than "
                f"{kind.tolerance:.0e}, so it was deleted; are the weights finite?"
            )
        os.replace(aside, output)
    except ImportError as error:
        raise UserError(f"--to {to}: {error.name or error} is missing: pip install 'fcmae[export]'") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output {output}: not written ({error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    how = kind.how if encoder.num_classes else kind.how.replace("ForImageClassification", "")
    return Exported(tuple(sorted(output.iterdir())), difference, how.replace("FOLDER", str(output)))


@torch.no_grad()
def _difference(kind: Format, encoder: ConvNeXtV2, folder: Path) -> float:
    """Compare the network with what `folder` holds on random images of two sizes and two batch sizes."""
    encoder = encoder.to(kind.dtype)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for b, grid_height, grid_width in ((2, 2, 3), (1, 4, 2)):
        size = grid_height * encoder.patch_size, grid_width * encoder.patch_size
        images = torch.randn(b, encoder.in_chans, *size, generator=generator, dtype=kind.dtype)
        ours, theirs = encoder(images), kind.compute(folder, images)
        if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
            return float("inf")
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-30)))
    return worst


def _write_timm(encoder: ConvNeXtV2, use: Use, folder: Path) -> None:
    if encoder.stem_stride == 2:
        raise ValueError(
            "timm has no ConvNeXt with a stem of stride 2 (its patch_size 2 downsamples once more); take another "
            "format, or RUN/encoder, which holds the network for images enlarged twice"
        )
    write_timm_folder(encoder, folder, **use.preprocessing._asdict(), class_names=use.class_names)


def _compute_timm(folder: Path, images: Tensor) -> Tensor:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, dtype=images.dtype).eval()(images)


def _write_transformers(encoder: ConvNeXtV2, use: Use, folder: Path) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    prepare = use.preprocessing
    names = use.class_names or tuple(f"LABEL_{i}" for i in range(encoder.num_classes))
    config = transformers.ConvNextV2Config(
        num_channels=encoder.in_chans,
        patch_size=encoder.stem_stride,
        hidden_sizes=list(encoder.dims),
        depths=list(encoder.depths),
        layer_norm_eps=1e-6,  # of the final norm: the default is not the network's
        image_size=min(prepare.image_size),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    kind = transformers.ConvNextV2ForImageClassification if encoder.num_classes else transformers.ConvNextV2Model
    model = kind(config)
    model.load_state_dict(to_transformers(encoder.state_dict()))
    model.save_pretrained(folder)
    height, width = prepare.image_size
    # resizes and crops as we do; ConvNextImageProcessor would squash images at 384 px and above
    transformers.BitImageProcessor(
        size={"shortest_edge": int(max(height, width) / prepare.crop_pct)},
        crop_size={"height": height, "width": width},
        image_mean=list(prepare.mean),
        image_std=list(prepare.std),
        do_convert_rgb=encoder.in_chans == 3,
    ).save_pretrained(folder)


def _compute_transformers(folder: Path, images: Tensor) -> Tensor:
    import transformers

    (name,) = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architectures"]
    model = getattr(transformers, name).from_pretrained(folder, dtype=images.dtype).eval()
    out = model(pixel_values=images)
    return out.logits if "logits" in out else out.pooler_output


def _write_description(encoder: ConvNeXtV2, use: Use, folder: Path) -> None:
    """Write `config.json`, which `read_weights` knows, for formats that tell nothing of the images or classes."""
    network = {
        name: getattr(encoder, name) for name in ("depths", "dims", "in_chans", "num_classes", "stem_stride")
    }
    values = {"network": network, **use.preprocessing._asdict(), "class_names": use.class_names}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_official(encoder: ConvNeXtV2, use: Use, folder: Path) -> None:
    torch.save({"model": encoder.state_dict()}, folder / TORCH_FILE)
    _write_description(encoder, use, folder)


def _write_official_sparse(encoder: ConvNeXtV2, use: Use, folder: Path) -> None:
    if encoder.num_classes:
        raise ValueError("the official sparse code has no classifier; take official, or export an encoder")
    torch.save({"model": dense_to_official_sparse(encoder.state_dict())}, folder / TORCH_FILE)
    _write_description(encoder, use, folder)


def _write_plain(encoder: ConvNeXtV2, use: Use, folder: Path) -> None:
    save_file(encoder.state_dict(), folder / MODEL, metadata={"format": "pt"})
    _write_description(encoder, use, folder)


def _compute_ours(folder: Path, images: Tensor) -> Tensor:
    return build_encoder(read_weights(folder)).to(images.dtype).eval()(images)


def _program(encoder: ConvNeXtV2) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Example inputs of the network, and their axes that may take other sizes."""
    patch = encoder.patch_size
    # a side of a single patch would be compiled as that, not as any number: two and more are free
    height, width = (torch.export.Dim(f"grid_{side}", min=2) for side in ("height", "width"))
    axes = {0: torch.export.Dim("batch", min=1), 2: patch * height, 3: patch * width}
    return (torch.zeros(2, encoder.in_chans, 3 * patch, 5 * patch),), (axes,)


def _write_program(encoder: ConvNeXtV2, use: Use, folder: Path) -> None:
    images, axes = _program(encoder)
    torch.export.save(torch.export.export(encoder, images, dynamic_shapes=axes), folder / PROGRAM_FILE)
    _write_description(encoder, use, folder)


def _compute_program(folder: Path, images: Tensor) -> Tensor:
    return torch.export.load(folder / PROGRAM_FILE).module()(images)


def _write_onnx(encoder: ConvNeXtV2, use: Use, folder: Path) -> None:
    import onnxruntime  # noqa: F401  # before the export, which takes longer than telling that it is missing

    images, axes = _program(encoder)
    names = ["logits" if encoder.num_classes else "features"]
    program = torch.onnx.export(
        encoder, images, input_names=["images"], output_names=names, dynamic_shapes=axes, dynamo=True, verbose=False
    )
    assert program is not None
    program.save(folder / ONNX_FILE)
    _write_description(encoder, use, folder)


def _compute_onnx(folder: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


FORMATS = {
    # name: write, compute, compared in, tolerance, how to load
    "timm": Format(
        _write_timm, _compute_timm, torch.float64, 1e-10, 'timm.create_model("local-dir:FOLDER", pretrained=True)'
    ),
    "transformers": Format(
        _write_transformers,
        _compute_transformers,
        torch.float64,
        1e-10,
        'transformers.AutoModelForImageClassification.from_pretrained("FOLDER")',
    ),
    "official": Format(
        _write_official, _compute_ours, torch.float64, 1e-10, f'torch.load("FOLDER/{TORCH_FILE}")["model"]'
    ),
    "official-sparse": Format(
        _write_official_sparse, _compute_ours, torch.float64, 1e-10, f'torch.load("FOLDER/{TORCH_FILE}")["model"]'
    ),
    "plain": Format(
        _write_plain, _compute_ours, torch.float64, 1e-10, f'safetensors.torch.load_file("FOLDER/{MODEL}")'
    ),
    "onnx": Format(
        _write_onnx, _compute_onnx, torch.float32, 1e-4, f'onnxruntime.InferenceSession("FOLDER/{ONNX_FILE}")'
    ),
    "torch-export": Format(
        _write_program,
        _compute_program,
        torch.float32,
        1e-4,
        f'torch.export.load("FOLDER/{PROGRAM_FILE}").module()',
    ),
}
"""What `fcmae export --to` takes."""
