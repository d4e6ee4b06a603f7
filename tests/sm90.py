"""Compile our Triton kernels for a Hopper GPU where there is none, and count what became of them; no test itself.

    TRITON_INTERPRET=0 PYTHONPATH=. python tests/sm90.py base:bfloat16:1 base:bfloat16:3 others:bfloat16

prints a line of JSON, with registers, stack and instructions, for each launch of a block of stages 1 and 3 (batch
256, 19 of 49 patches visible), and of the kernels that no block has. It is a program, since a process whose kernels
are interpreted cannot compile them. Compiler and disassembler come with Triton.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DIMS = {"tiny": 96, "base": 128, "large": 192, "huge": 352}
"""Of the first stage."""
INSTRUCTION = re.compile(r"\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)")


class Driver:
    """As if there were a Hopper."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


@contextmanager
def compiling() -> Iterator[list[tuple[str, Any]]]:
    """Let launches only compile, on tensors of any device, and note each kernel's name and what it became."""
    triton.runtime.driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    launches: list[tuple[str, Any]] = []
    run = JITFunction.run

    def only_compile(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        launches.append((name, run(kernel, *args, warmup=True, **kwargs)))

    JITFunction.run = only_compile  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield launches
    finally:
        JITFunction.run = run


@cache  # many launches share a kernel
def count(kernel: Any) -> dict[str, Any]:
    """Registers and stack of a thread; how often each instruction stands in the code, and in its longest loop."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loop: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
            target = re.search(r"`\((\.L\w+)\)", line)
            start = labels.get(target[1], len(instructions)) if target else len(instructions)
            if 1 < len(instructions) - start > len(loop):  # a jump back
                loop = instructions[start:]
    return {
        "registers": registers,
        "stack": stack + local,
        "threads": 32 * kernel.metadata.num_warps,
        "instructions": Counter(instructions),
        "loop": Counter(loop),
    }


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(*shape: int) -> torch.Tensor:
    return _empty(*shape, dtype=torch.int64)


def block(dim: int, stage: int, dtype: torch.dtype) -> None:
    """Launch all kernels of a block, forward and backward, on tensors without memory."""
    from fcmae.ops import gelu_grn_triton, grn_mlp_triton, patch_depthwise_triton

    b, p, grid = 256, 19, (7, 7)
    k, c = 8 >> (stage - 1), dim << (stage - 1)
    ids, slots = _ids(b, p), _empty(b, 49, dtype=torch.int32)
    x, h = _empty(b, p, k, k, c, dtype=dtype), _empty(b, p * k * k, 4 * c, dtype=dtype)
    weight, norm, gamma = _empty(c, 1, 7, 7), _empty(b, 4 * c), _empty(4 * c)
    _, rstd = patch_depthwise_triton.patch_depthwise_norm_rstd(x, weight, _empty(c), ids, slots, grid, 1e-6)
    patch_depthwise_triton.patch_norm_backward(x, x, rstd)
    patch_depthwise_triton.patch_depthwise(x, weight, None, ids, slots, grid)
    patch_depthwise_triton.patch_depthwise_weight_grads(x, x, ids, slots, grid, 7)
    gelu_grn_triton.gelu_grn(h, gamma, gamma, 1e-6)
    gelu_grn_triton.gelu_grn_backward(h, h, norm, gamma, gamma, 1e-6)
    w1, norm_weight = _empty(4 * c, c), _empty(c)
    grn_mlp_triton.fold_norm(norm_weight, norm_weight, w1, gamma, w1.t(), norm_weight, dtype)
    grn_mlp_triton.fold_norm_backward(w1, gamma, norm_weight, norm_weight, w1)


def others(dtype: torch.dtype) -> None:
    """Launch all kernels that no block has: of the loss, and of the convolution of rows that lie anywhere."""
    from fcmae.ops import gather_depthwise_triton, patch_loss_triton

    pred, images, hidden = _empty(256, 30, 3072, dtype=dtype), _empty(256, 3, 224, 224), _ids(256, 30)
    patch_loss_triton.patch_errors(pred, images, hidden, 32, True, 1e-6)
    x, weight, neighbours = _empty(4864, 512, dtype=dtype), _empty(49, 512), _ids(49, 4864)
    gather_depthwise_triton.gather_depthwise(x, weight, weight[0], neighbours)
    gather_depthwise_triton.gather_depthwise_backward(x, weight, x, neighbours)


def compiled(case: str) -> list[dict[str, Any]]:
    """What became of every launch of a block, "base:bfloat16:3", or of what no block has, "others:bfloat16"."""
    with compiling() as launches:
        name, dtype, *stage = case.split(":")
        if name == "others":
            others(getattr(torch, dtype))
        else:
            block(DIMS[name], int(stage[0]), getattr(torch, dtype))
    return [{"case": case, "kernel": name, **count(kernel)} for name, kernel in launches]


if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        for launches in pool.map(compiled, sys.argv[1:]):
            for launch in launches:
                print(json.dumps(launch), flush=True)
