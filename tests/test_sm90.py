"""Kernels compile for a Hopper GPU, without one, into no more registers and instructions than planned."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(3600)  # for `make kernels`: 10 seconds of a processor for each block

EVERY_CASE = [
    f"{variant}:{dtype}:{stage}"
    for variant in ("tiny", "base", "large", "huge")
    for dtype in ("bfloat16", "float16", "float32")
    for stage in (1, 2, 3, 4)
]
CASES = ["base:bfloat16:1", "base:bfloat16:3", "huge:float32:2", "huge:bfloat16:4"]
"""Every stage, channels that fill their blocks or not, both sizes of numbers; `make kernels` has all."""
if "FCMAE_KERNELS" in os.environ:
    CASES = EVERY_CASE

REGISTERS = {
    "patch_depthwise_triton._convolve_kernel": 128,
    "patch_depthwise_triton._norm_backward_kernel": 128,
    "patch_depthwise_triton._weight_grads_kernel": 255,
    "gelu_grn_triton._square_sums_kernel": 40,
    "gelu_grn_triton._image_forward_kernel": 128,
    "gelu_grn_triton._scale_kernel": 40,
    "gelu_grn_triton._grad_sums_kernel": 48,
    "gelu_grn_triton._image_backward_kernel": 128,
    "gelu_grn_triton._backward_kernel": 64,
    "grn_mlp_triton._fold_kernel": 64,
    "grn_mlp_triton._fold_backward_kernel": 128,
}
"""Of the kernels of a block: at most, of a thread."""

OTHERS = {
    "patch_loss_triton._errors_kernel": 64,
    "gather_depthwise_triton._convolve_kernel": 128,
    "gather_depthwise_triton._grad_weight_kernel": 64,
}
"""Of the other kernels."""

CROPS = {
    "crops:uint8": {"resize_crops_triton._across_kernel": (128, 6.3), "resize_crops_triton._down_kernel": (80, 6)},
    "crops:uint16": {"resize_crops_triton._across_kernel": (128, 5.3), "resize_crops_triton._down_kernel": (96, 6)},
    "crops:float32": {
        "resize_crops_triton._across_kernel": (176, 9), "resize_crops_triton._down_kernel": (160, 10.5)
    },
}  # fmt: skip
"""Of the kernels that resize crops, at most: registers, and instructions for each pixel and each it is made of."""

PER_ELEMENT = {
    "gelu_grn_triton._square_sums_kernel": 15.5,
    "gelu_grn_triton._scale_kernel": 17,
    "gelu_grn_triton._grad_sums_kernel": 19,
    "gelu_grn_triton._backward_kernel": 31,
}
"""Instructions, at most."""

POWERS = {"gelu_grn_triton._backward_kernel": 2}
"""Powers of 2 that a kernel takes of an element, where it is not one: by them its turn is known."""

PER_MULTIPLY_ADD = {
    "patch_depthwise_triton._convolve_kernel": {1: 4.2, 2: 4, 3: 3.4, 4: 5.5},
    "patch_depthwise_triton._weight_grads_kernel": {1: 2.6, 2: 3, 3: 2.9, 4: 9.5},
}
"""Instructions as they stand in the code, at most, by stage."""

Launches = Mapping[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def compiled() -> Launches:
    """Case -> what `sm90.py` prints; skips where this Triton has no compiler for NVIDIA's GPUs."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("needs Triton")
    tools = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    if missing := [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (tools / name).exists()]:
        pytest.skip(f"this Triton comes without {', '.join(missing)}")
    root = Path(__file__).parent.parent
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "tests" / "sm90.py"), "others:bfloat16", *CROPS, *CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TRITON_DEFAULT_FP_FUSION" not in done.stderr  # whether products and sums fuse, each launch says
    launches = defaultdict(list)
    for line in done.stdout.splitlines():
        launch = json.loads(line)
        launches[launch["case"]].append(launch)
    return launches


def assert_fits(launch: dict[str, Any], registers: Mapping[str, int]) -> None:
    """Hold that a kernel keeps all it holds in so many registers, and loads no numbers of 16 bits one by one."""
    assert launch["stack"] == 0, launch  # local memory included
    assert launch["registers"] <= registers[launch["kernel"]], launch
    assert "LDG.E.U16" not in launch["instructions"], launch


def test_every_kernel_compiles_for_a_gpu(compiled: Launches) -> None:
    """The interpreter runs more Python than the compiler takes."""
    launches = compiled["others:bfloat16"]
    assert {launch["kernel"] for launch in launches} == set(OTHERS)
    for launch in launches:
        assert_fits(launch, OTHERS)


@pytest.mark.parametrize("case", CASES)
def test_kernels_of_a_block_keep_to_their_registers_and_instructions(case: str, compiled: Launches) -> None:
    stage = int(case[-1])
    assert {launch["kernel"] for launch in compiled[case]} == set(REGISTERS)
    for launch in compiled[case]:
        assert_fits(launch, REGISTERS)
        kernel, loop = launch["kernel"], launch["loop"]
        if most := PER_ELEMENT.get(kernel):
            elements = loop["MUFU.EX2"] / POWERS.get(kernel, 1)
            assert sum(loop.values()) <= most * elements, launch
            assert {name for name in loop if name.startswith("LDG")} == {"LDG.E.128"}, launch
        if most := PER_MULTIPLY_ADD.get(kernel):
            code = launch["instructions"]
            assert sum(code.values()) <= most[stage] * code["FFMA"], launch
        if "convolve" in kernel and stage > 1:
            assert "LDG.E.64" not in loop, launch


@pytest.mark.parametrize("case", CROPS)
def test_crops_are_resized_in_few_instructions_of_few_registers(case: str, compiled: Launches) -> None:
    assert [launch["kernel"] for launch in compiled[case]] == [*CROPS[case]] * 2
    for launch in compiled[case][:2]:
        registers, most = CROPS[case][launch["kernel"]]
        assert launch["stack"] == 0, launch
        assert launch["registers"] <= registers, launch
        assert sum(launch["loop"].values()) <= most * 32 * 32 / launch["threads"], launch
        if "down" in launch["kernel"]:
            assert {name for name in launch["loop"] if name.startswith("LDG")} == {"LDG.E.128"}, launch
