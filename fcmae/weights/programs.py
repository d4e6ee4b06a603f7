"""The network as a program with its weights, ONNX or torch.export, for any batch and size; only written."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop

from fcmae.encoder.base import Network
from fcmae.files import write_by
from fcmae.weights.base import SEGMENTATION, Format, Loading, Preprocessing, write_description

ONNX_FILE, PROGRAM_FILE = "model.onnx", "model.pt2"


AXES = {0: "batch", 2: "height", 3: "width"}
"""Of the images, which may have any length."""


def _example(encoder: Network) -> tuple[Tensor]:
    patch = encoder.patch_size
    return (torch.zeros(2, encoder.in_chans, 3 * patch + 1, 5 * patch + 1),)


def _steps(use: Preprocessing) -> str:
    """Say what is done to images."""
    as_they_are = use.task == SEGMENTATION and use.short_side is None
    return "clips and normalises" if as_they_are else "resizes, clips and normalises"


def _interface(encoder: Network, use: Preprocessing) -> dict[str, str]:
    """Say what the program takes and gives."""
    return {
        "input": f"float32 (batch, {encoder.in_chans}, height, width): the caller {_steps(use)}",
        "output": "logits" if encoder.num_classes else "features",
    }


def write_onnx(encoder: Network, preprocessing: Preprocessing, folder: Path) -> None:
    import onnxruntime  # noqa: F401  # before the export, which takes longer than reporting that it is missing

    names = ["logits" if encoder.num_classes else "features"]
    program = torch.onnx.export(
        encoder,
        _example(encoder),
        input_names=["images"],
        output_names=names,
        dynamic_shapes=(AXES,),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(folder / ONNX_FILE)
    write_description(encoder, preprocessing, folder, **_interface(encoder, preprocessing))


def compute_onnx(folder: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX_FILE, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


CUBIC = {"mode": "cubic", "cubic_coeff_a": -0.5, "exclude_outside": 1}
RESIZING = {"bicubic": CUBIC, "bilinear": {"mode": "linear"}}
"""Attributes of ONNX's Resize that compute, with antialias, what Pillow does, by interpolation."""


MOST_UNKNOWN = 0.501
"""As in `fcmae.data.views`."""


def is_eight_bit(use: Preprocessing) -> bool:
    """Whether pixels come as uint8; others come as shares of their full range, and floats as they are."""
    return use.dtype in (None, "uint8")


def _preparing(use: Preprocessing) -> list[Any]:
    """Return ONNX nodes from `images`, uint8 or float32 (b, h, w, c), to `prepared`, float32 (b, c, *image_size).

    The steps are those of timm's evaluation: resize until `image_size` / crop_pct is covered, crop the centre. A
    segmenter's images keep their size. Pixels that are not known, NaN, leave their weight to the others, as
    `fcmae.data.views` has it.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []

    def constant(value: Any, dtype: Any) -> str:
        name = f"prepare/constant_{len(nodes)}"
        tensor = numpy_helper.from_array(np.array(value, dtype), name)
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def compute(kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"prepare/{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def half_even(numbers: str) -> str:
        return compute("Cast", compute("Round", numbers), to=TensorProto.INT64)

    def cover(image: str) -> str:
        """Resize and crop."""
        around = [math.floor(side / use.crop_pct) for side in use.image_size]
        wanted = constant(use.image_size, np.int64)
        size = compute("Shape", image, start=2)
        if around[0] == around[1]:
            short = compute("ReduceMin", size, keepdims=1)
            resized = compute("Div", compute("Mul", size, constant(around[:1], np.int64)), short)
        else:
            precise = compute("Cast", size, to=TensorProto.DOUBLE)
            ratio = compute("ReduceMin", compute("Div", precise, constant(around, np.float64)), keepdims=1)
            resized = half_even(compute("Div", precise, ratio))
        sizes = compute("Concat", compute("Shape", image, end=2), resized, axis=0)
        image = compute("Resize", image, "", "", sizes, antialias=1, **RESIZING[use.interpolation])
        spare = compute("Cast", compute("Sub", resized, wanted), to=TensorProto.DOUBLE)
        start = half_even(compute("Mul", spare, constant([0.5], np.float64)))
        return compute("Slice", image, start, compute("Add", start, wanted), constant([2, 3], np.int64))

    image = compute("Transpose", "images", perm=[0, 3, 1, 2])
    if use.nodata is not None:  # channels of what is known, 0 elsewhere, then of whether it is not
        unknown = compute("IsNaN", image)
        values = compute("Where", unknown, constant(0, np.float32), image)
        image = compute("Concat", values, compute("Cast", unknown, to=TensorProto.FLOAT), axis=1)
    if use.task != SEGMENTATION:
        image = cover(image)
    pixels = compute("Cast", image, to=TensorProto.FLOAT)
    if is_eight_bit(use):
        pixels = compute("Div", pixels, constant(255, np.float32))
    unknown = ""
    if use.nodata is not None:
        channels = len(use.mean)
        share = compute("Slice", pixels, *(constant([n], np.int64) for n in (channels, 2 * channels, 1)))
        pixels = compute("Slice", pixels, *(constant([n], np.int64) for n in (0, channels, 1)))
        pixels = compute("Div", pixels, compute("Sub", constant(1, np.float32), share))
        unknown = compute("Greater", share, constant(MOST_UNKNOWN, np.float32))
    for limits in ([(0.0, 1.0)] if use.dtype == "uint16" else []) + ([use.clip] if use.clip else []):
        least, most = (constant(np.reshape(limit, (-1, 1, 1)), np.float32) for limit in limits)
        pixels = compute("Min", compute("Max", pixels, least), most)
    mean, std = (constant(np.reshape(values, (-1, 1, 1)), np.float32) for values in (use.mean, use.std))
    normalised = compute("Div", compute("Sub", pixels, mean), std, name="" if unknown else "prepared")
    if unknown:
        compute("Where", unknown, constant(0, np.float32), normalised, name="prepared")
    return nodes


ANSWERS: dict[str, tuple[str, dict[str, Any], str, Callable[[Tensor], Tensor]]] = {
    "classification": ("Softmax", {"axis": 1}, "probabilities", lambda outputs: outputs.softmax(1)),
    "multilabel": ("Sigmoid", {}, "probabilities", Tensor.sigmoid),
    SEGMENTATION: ("Softmax", {"axis": 1}, "probabilities", lambda outputs: outputs.softmax(1)),
    "regression": ("Identity", {}, "values", lambda outputs: outputs),
}
"""What makes of a network's outputs what people ask for: ONNX's operator, what it gives, and the same in torch."""


def _prepare(pixels: Tensor, use: Preprocessing) -> Tensor:
    """Do what the last of these nodes do, to pixels (b, c, h, w), 1.0 for the full range."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (use.mean, use.std))
    if use.clip is not None:
        pixels = pixels.clamp(*(torch.tensor(limit).view(-1, 1, 1) for limit in use.clip))
    images = (pixels - mean) / std
    return images if use.nodata is None else images.nan_to_num(0)


def _random_pixels(use: Preprocessing, b: int, height: int, width: int) -> Tensor:
    """Return pixels (b, h, w, c) of the kind that the nodes take, some of them not known where that may be."""
    shape = (b, height, width, len(use.mean))
    if is_eight_bit(use):
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    pixels = torch.tensor(use.mean) + torch.tensor(use.std) * torch.randn(shape)
    if use.dtype == "uint16":
        pixels = pixels.clamp(0, 1)
    return pixels if use.nodata is None else pixels.masked_fill(torch.rand(shape) < 0.2, torch.nan)


def check_preprocessing(encoder: Network, preprocessing: Preprocessing) -> None:
    """Raise ValueError where there is no classifier, or ONNX lacks what its images are prepared by."""
    if not encoder.num_classes:
        raise ValueError("--with-preprocessing is for classifiers: this network has none")
    if preprocessing.task != SEGMENTATION and preprocessing.interpolation not in RESIZING:
        able = " or ".join(RESIZING)
        raise ValueError(f"--with-preprocessing: ONNX resizes {able}, not {preprocessing.interpolation}")
    if preprocessing.task == SEGMENTATION and preprocessing.short_side is not None:
        raise ValueError(
            f"--with-preprocessing: this network sees images resized to a short side of {preprocessing.short_side} "
            "pixels, which is not in the program; leave it out, and resize to and from that"
        )


def prepend_preprocessing(encoder: Network, preprocessing: Preprocessing, folder: Path) -> None:
    """Let the ONNX model take images as they are, (b, h, w, c) of any size, and give its answers.

    They are uint8 for a network that was trained on such; else float32, in shares of the full range if they were
    whole numbers. A segmenter's answers are of each pixel.

    Raises:
        ValueError: if the result is not the network's.
    """
    import onnx
    from onnx import TensorProto, helper

    use = preprocessing.completed(encoder)
    segments = use.task == SEGMENTATION
    model = onnx.load(folder / ONNX_FILE, load_external_data=False)
    graph = model.graph
    operator, attributes, answer, compute = ANSWERS[use.task_name]
    network = [*graph.node, helper.make_node(operator, ["logits"], [answer], **attributes)]
    for node in network:
        for i, name in enumerate(node.input):
            if name == "images":
                node.input[i] = "prepared"
    for part in (graph.node, graph.input, graph.output, graph.value_info):
        del part[:]  # the names of sizes are the network's
    graph.node.extend([*_preparing(use), *network])
    names = ["height", "width"] if segments else ["image_height", "image_width"]
    sides = ["batch", *names, encoder.in_chans]
    kind, elements = ("uint8", TensorProto.UINT8) if is_eight_bit(use) else ("float32", TensorProto.FLOAT)
    graph.input.append(helper.make_tensor_value_info("images", elements, sides))
    classes = ["batch", encoder.num_classes, *(names if segments else [])]
    graph.output.append(helper.make_tensor_value_info(answer, TensorProto.FLOAT, classes))
    if use.class_names is not None:
        helper.set_model_props(model, {"class_names": json.dumps(use.class_names)})
    onnx.save_model(model, folder / ONNX_FILE)
    kind += " / 65535" if use.dtype == "uint16" else ""
    taken = f"{kind} (batch, height, width, {encoder.in_chans}): the program {_steps(use)}"
    write_description(encoder, use, folder, input=taken, output=answer)

    # images that need no resizing, whose preprocessing is exact
    height, width = (math.floor(side / use.crop_pct) for side in use.image_size)
    images = _random_pixels(use, 2, height, width)
    pixels = images.permute(0, 3, 1, 2).float()
    if not segments:
        pixels = center_crop(pixels, list(use.image_size))
    with torch.no_grad():
        wanted = compute(encoder.float()(_prepare(pixels / 255 if is_eight_bit(use) else pixels, use)))
    difference = float((compute_onnx(folder, images) - wanted).abs().max())
    if not difference <= 1e-4 * max(1.0, float(wanted.abs().max())):
        raise ValueError(f"--with-preprocessing: {answer} differ from the network's by {difference:.1e}")


def write_program(encoder: Network, preprocessing: Preprocessing, folder: Path) -> None:
    # sides of less than two patches end as one site, which torch would take for a constant
    least = {"batch": 1, "height": 2 * encoder.patch_size, "width": 2 * encoder.patch_size}
    free = {axis: torch.export.Dim.DYNAMIC(min=least[name]) for axis, name in AXES.items()}
    program = torch.export.export(encoder, _example(encoder), dynamic_shapes=(free,))
    write_by(lambda file: torch.export.save(program, file), folder / PROGRAM_FILE)
    write_description(encoder, preprocessing, folder, **_interface(encoder, preprocessing))


def compute_program(folder: Path, images: Tensor) -> Tensor:
    return torch.export.load(folder / PROGRAM_FILE).module()(images)


def loading_onnx(encoder: Network, use: Preprocessing) -> Loading:
    output = "logits" if encoder.num_classes else "features"
    return Loading("onnx", LOAD_ONNX, run=f'({output},) = session.run(None, {{"images": images.numpy()}})')


def loading_prepared(encoder: Network, use: Preprocessing) -> Loading:
    """As `loading_onnx`, of what `prepend_preprocessing` wrote."""
    answer = ANSWERS[use.task_name][2]
    channels = len(use.mean)
    photo = "images = np.asarray(photo)[None]" + ("" if channels == 3 else "[..., None]")
    kind = "uint8" if is_eight_bit(use) else "float32, pixels / 65535," if use.dtype == "uint16" else "float32"
    return Loading(
        "onnx",
        LOAD_ONNX,
        prepare=f"import numpy as np\n\n{photo}",
        pixels=f"# images: {kind} (b, height, width, {channels}) of any size",
        run=f'({answer},) = session.run(None, {{"images": images}})',
    )


LOAD_ONNX = f"""import onnxruntime

folder = {{folder}}
session = onnxruntime.InferenceSession(f"{{{{folder}}}}/{ONNX_FILE}")"""
LOAD_PROGRAM = f"""import torch

folder = {{folder}}
model = torch.export.load(f"{{{{folder}}}}/{PROGRAM_FILE}").module()"""

ONNX = Format(
    name="onnx",
    write=write_onnx,
    compute=compute_onnx,
    check_preprocessing=check_preprocessing,
    prepend_preprocessing=prepend_preprocessing,
    loading_prepared=loading_prepared,
    how=lambda encoder, folder: f'onnxruntime.InferenceSession("{folder / ONNX_FILE}")',
    loading=loading_onnx,
    dtype=torch.float32,
    tolerance=1e-4,
)
TORCH_EXPORT = Format(
    name="torch-export",
    write=write_program,
    compute=compute_program,
    how=lambda encoder, folder: f'torch.export.load("{folder / PROGRAM_FILE}").module()',
    loading=lambda encoder, use: Loading("pytorch", LOAD_PROGRAM),
    dtype=torch.float32,
    tolerance=1e-4,
)
