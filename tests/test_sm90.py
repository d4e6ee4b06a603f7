"""Kernels compile for a Hopper GPU, without one, into no more registers and instructions than planned."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CASES = [("base", "bfloat16", 1), ("base", "bfloat16", 3), ("huge", "float16", 4), ("huge", "float32", 2)]
"""Some of variants, dtypes and stages, a few seconds each: whole blocks of channels or not, and every stage."""

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
}
"""At most, of a thread."""

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
    "patch_depthwise_triton._convolve_kernel": {1: 4, 2: 3.6, 3: 3, 4: 5},
    "patch_depthwise_triton._weight_grads_kernel": {1: 2.5, 2: 3, 3: 2.7, 4: 8},
}
"""Instructions as they stand in the code, at most, by stage."""


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What `sm90.py` prints, or skip where this Triton has no compiler for NVIDIA's GPUs."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("needs Triton")
    tools = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    if missing := [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (tools / name).exists()]:
        pytest.skip(f"this Triton comes without {', '.join(missing)}")
    here = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    command = [sys.executable, str(here / "sm90.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "TRITON_DEFAULT_FP_FUSION" not in done.stderr  # whether products and sums fuse, each launch says
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_a_gpu() -> None:
    """The interpreter runs more Python than the compiler takes."""
    others = {f"gather_depthwise_triton._{kernel}_kernel" for kernel in ("convolve", "grad_weight")}
    assert {launch["kernel"] for launch in compiled()} == {*REGISTERS, *others, "patch_loss_triton._errors_kernel"}


@pytest.mark.parametrize(("variant", "dtype", "stage"), CASES)
def test_kernels_of_a_block_keep_to_their_registers_and_instructions(variant: str, dtype: str, stage: int) -> None:
    launches = compiled(variant, dtype, str(stage))
    assert {launch["kernel"] for launch in launches} == set(REGISTERS)
    for launch in launches:
        kernel, loop = launch["kernel"], launch["loop"]
        total = sum(launch["instructions"].values())
        assert launch["stack"] == 0, kernel
        assert launch["registers"] <= REGISTERS[kernel], kernel
        if most := PER_ELEMENT.get(kernel):
            elements = loop["MUFU.EX2"] / POWERS.get(kernel, 1)
            assert sum(loop.values()) <= most * elements, kernel
            assert {name for name in loop if name.startswith("LDG")} == {"LDG.E.128"}, kernel
        if kernel in PER_MULTIPLY_ADD:
            assert total / launch["instructions"]["FFMA"] <= PER_MULTIPLY_ADD[kernel][stage], kernel
        if "convolve" in kernel and stage > 1:
            assert "LDG.E.64" not in loop, kernel
