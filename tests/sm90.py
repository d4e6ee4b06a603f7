"""Compile our Triton kernels for a Hopper GPU where there is none, and count what became of them; no test itself.

    TRITON_INTERPRET=0 PYTHONPATH=. python tests/sm90.py base bfloat16 3

prints, as a line of JSON for each launch of a block of stage 3 (batch 256, 19 of 49 patches visible), registers,
stack and instructions; without arguments, of every operation. It is a program, since a process whose kernels are
interpreted cannot compile them.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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
def compiling() -> Iterator[list[dict[str, Any]]]:
    """Let launches only compile, on tensors of any device, and note what each became."""
    triton.runtime.driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    launches: list[dict[str, Any]] = []
    run = JITFunction.run

    def only_compile(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled: Any = run(kernel, *args, warmup=True, **kwargs)
        launches.append(
            {"kernel": f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}", **_count(compiled)}
        )

    JITFunction.run = only_compile
    try:
        yield launches
    finally:
        JITFunction.run = run


def _count(compiled: Any) -> dict[str, Any]:
    """Registers and stack of a thread; how often each instruction stands in the code, and in its longest loop."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
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
        "threads": 32 * compiled.metadata.num_warps,
        "instructions": Counter(instructions),
        "loop": Counter(loop),
    }


def block(dim: int, stage: int, dtype: torch.dtype) -> None:
    """Launch all kernels of a block, forward and backward, on tensors without memory."""
    from fcmae.ops import gelu_grn_triton, patch_depthwise_triton

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    b, p, grid = 256, 19, (7, 7)
    k, c = 8 >> (stage - 1), dim << (stage - 1)
    ids, slots = empty(b, p, dtype=torch.int64), empty(b, 49, dtype=torch.int32)
    x, h = empty(b, p, k, k, c, dtype=dtype), empty(b, p * k * k, 4 * c, dtype=dtype)
    weight, norm, gamma = empty(c, 1, 7, 7), empty(b, 4 * c), empty(4 * c)
    _, rstd = patch_depthwise_triton.patch_depthwise_norm_rstd(x, weight, empty(c), ids, slots, grid, 1e-6)
    patch_depthwise_triton.patch_norm_backward(x, x, rstd)
    patch_depthwise_triton.patch_depthwise(x, weight, None, ids, slots, grid)
    patch_depthwise_triton.patch_depthwise_weight_grads(x, x, ids, slots, grid, 7)
    gelu_grn_triton.gelu_grn(h, gamma, gamma, 1e-6)
    gelu_grn_triton.gelu_grn_backward(h, h, norm, gamma, gamma, 1e-6)


def operations() -> None:
    """Launch all kernels of every operation, at the tests' small arguments in bfloat16."""
    from test_ops import OPERATIONS, arguments, triton_side

    for path in OPERATIONS:
        triton_side(path)(
            *(
                a.detach().bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a in arguments(path.partition(".")[2], "cpu")
            )
        )


if __name__ == "__main__":
    with compiling() as launches:
        if sys.argv[1:]:
            variant, dtype, *stages = sys.argv[1:]
            for stage in stages:
                block(DIMS[variant], int(stage), getattr(torch, dtype))
        else:
            operations()
    for launch in launches:
        print(json.dumps(launch))
