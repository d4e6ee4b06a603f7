"""The network as a program with its weights, ONNX or torch.export, for any batch and size; only written."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.encoder.convnext import ConvNeXtV2
from fcmae.weights.base import Format, Preprocessing, write_description

ONNX_FILE, PROGRAM_FILE = "model.onnx", "model.pt2"


def _example(encoder: ConvNeXtV2) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Example inputs of the network, and their axes that may take other sizes."""
    patch = encoder.patch_size
    # sides of less than two patches end as one site, which torch would take for a constant
    height, width = (torch.export.Dim(side, min=2 * patch) for side in ("height", "width"))
    axes = {0: torch.export.Dim("batch", min=1), 2: height, 3: width}
    return (torch.zeros(2, encoder.in_chans, 3 * patch + 1, 5 * patch + 1),), (axes,)


def write_onnx(encoder: ConvNeXtV2, preprocessing: Preprocessing, folder: Path) -> None:
    import onnxruntime  # noqa: F401  # before the export, which takes longer than reporting that it is missing

    images, axes = _example(encoder)
    names = ["logits" if encoder.num_classes else "features"]
    program = torch.onnx.export(
        encoder, images, input_names=["images"], output_names=names, dynamic_shapes=axes, dynamo=True, verbose=False
    )
    assert program is not None
    program.save(folder / ONNX_FILE)
    write_description(encoder, preprocessing, folder)


def compute_onnx(folder: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_program(encoder: ConvNeXtV2, preprocessing: Preprocessing, folder: Path) -> None:
    images, axes = _example(encoder)
    torch.export.save(torch.export.export(encoder, images, dynamic_shapes=axes), folder / PROGRAM_FILE)
    write_description(encoder, preprocessing, folder)


def compute_program(folder: Path, images: Tensor) -> Tensor:
    return torch.export.load(folder / PROGRAM_FILE).module()(images)


ONNX = Format(
    name="onnx",
    write=write_onnx,
    compute=compute_onnx,
    how=lambda encoder, folder: f'onnxruntime.InferenceSession("{folder / ONNX_FILE}")',
    dtype=torch.float32,
    tolerance=1e-4,
)
TORCH_EXPORT = Format(
    name="torch-export",
    write=write_program,
    compute=compute_program,
    how=lambda encoder, folder: f'torch.export.load("{folder / PROGRAM_FILE}").module()',
    dtype=torch.float32,
    tolerance=1e-4,
)
