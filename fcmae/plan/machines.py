"""Machines to train on: GPUs by their data sheets, and how fast a step is there by a simple model; runs nothing.

The model of a GPU's step has four constants. They are those at which it agrees within 10 % with what
benchmarks/gpu.py predicts for an H200 from compiled kernels and counted operations; nothing is measured on a GPU
yet. A micro-batch of b images takes

    b * flop / (MATMUL_SHARE * peak)  +  b * kept bytes * MOVED / bandwidth  +  tensors * KERNELS_S

that is arithmetic, passes over maps, and kernels that wait for each other however small they are; kept bytes are
those that the backward pass needs of an image. Where steps are not recorded as CUDA graphs it takes at least
tensors * ISSUE_S, which the processor needs to start the kernels. AdamW reads and writes 28 bytes of a parameter.
"""

from typing import NamedTuple, Self

from fcmae.plan.work import Work

MATMUL_SHARE = 0.56
"""Of the peak of a data sheet, that the matrix products of a step reach."""
MOVED = 14.0
"""Times that each byte kept for the backward pass goes from or to memory at the full bandwidth."""
KERNELS_S = 14e-6
"""Seconds for each tensor of parameters: about three kernels, forward and backward, and gaps between them."""
ISSUE_S = 0.1e-3
"""Seconds of a processor for each tensor of parameters, where it starts every kernel."""
ADAMW_BYTES = 28
"""Of a parameter: weight, gradient and two moments read, all but the gradient written, float32."""
RECOMPUTED = 4 / 3
"""Of a step with gradient checkpointing: the forward pass, a third of it, comes twice."""

GRADIENT_BYTES = 4
"""Of a parameter, as gradients are exchanged."""
LINK_SHARE = 0.8
"""Of a link's speed, that an all-reduce of many megabytes reaches."""
PCIE_GB = 16.0
"""GB/s between GPUs without NVLink: half of PCIe 4.0 x16, as it goes through the host's memory."""
MESSAGE_S = 20e-6
"""Seconds that each message of an exchange takes besides, for every doubling of the number of GPUs."""

CORE_RATES = {"folder": 600.0, "arrays": 3_800.0}
"""Images/s that a core loads, by data.name, measured (docs/data.md): JPEGs of about 525 x 350 pixels, and arrays of
`fcmae prepare`, which the GPU resizes. What is not here is taken for JPEGs. A hyperthread is half a core."""


class GPU(NamedTuple):
    """A GPU by its manufacturer's data sheet, arithmetic without sparsity."""

    memory_gb: float
    bandwidth_tb: float
    """TB/s."""
    half_tflops: float
    """bf16 and fp16 with sums in float32."""
    float32_tflops: float
    """Without TF32, which runs turn off."""
    link_gb: float
    """GB/s to others of the machine, in one direction: by NVLink, else `PCIE_GB`."""
    nvlink: bool


GPUS = {
    "h200": GPU(141, 4.8, 989, 67, 450, True),
    "h100": GPU(80, 3.35, 989, 67, 450, True),
    "a100-80": GPU(80, 2.039, 312, 19.5, 300, True),
    "a100-40": GPU(40, 1.555, 312, 19.5, 300, True),
    "l40s": GPU(48, 0.864, 362, 91.6, PCIE_GB, False),
    "a10": GPU(24, 0.6, 125, 31.2, PCIE_GB, False),
    "l4": GPU(24, 0.3, 121, 30.3, PCIE_GB, False),
    "rtx4090": GPU(24, 1.008, 165, 82.6, PCIE_GB, False),
    "rtx3090": GPU(24, 0.936, 71, 35.6, PCIE_GB, False),
}
"""SXM modules of H200, H100 and A100, whose machines have eight."""


def known_gpu(name: str) -> GPU | None:
    """Return the row of `GPUS` for what a driver calls a GPU, such as "NVIDIA A100-SXM4-80GB"; None for others.

    Of kinds with several memories any has the same links.
    """
    plain = name.lower().replace(" ", "")
    found = next((gpu for key, gpu in GPUS.items() if key.partition("-")[0] in plain), None)
    return found._replace(link_gb=PCIE_GB, nvlink=False) if found and "pcie" in plain else found


class Pace(NamedTuple):
    """How long a process computes, in seconds."""

    image: dict[str, float]
    """Of an image, by what they go by for."""
    kernels: float
    """Of a micro-batch, whatever its size."""
    issue: float
    """Of a micro-batch, at least, where the processor starts every kernel."""
    optimizer: float
    """Of an update."""

    @classmethod
    def modelled(cls, gpu: GPU, work: Work, precision: str) -> Self:
        """Return the pace of a GPU as the module says."""
        peak = 1e12 * (gpu.float32_tflops if precision == "no" else gpu.half_tflops)
        bandwidth = 1e12 * gpu.bandwidth_tb
        return cls(
            image={
                "arithmetic": work.flop / (MATMUL_SHARE * peak),
                "memory bandwidth": work.footprint.image * MOVED / bandwidth,
            },
            kernels=work.tensors * KERNELS_S,
            issue=work.tensors * ISSUE_S,
            optimizer=work.parameters * ADAMW_BYTES / bandwidth,
        )

    def micro_batch(self, images: int, *, recorded: bool, recomputed: bool) -> dict[str, float]:
        """Return the seconds of a micro-batch, by what they go by for."""
        times = RECOMPUTED if recomputed else 1.0
        parts = {name: times * images * seconds for name, seconds in self.image.items()}
        parts["small kernels"] = times * self.kernels
        issue = times * self.issue
        return parts if recorded or issue <= sum(parts.values()) else {"starting kernels": issue}


class Machines(NamedTuple):
    """What a plan is for: any number of processes, each with its GPU, or those of one computer without."""

    name: str
    source: str
    """Where its figures come from."""
    memory: float
    """Bytes of each GPU, or of the computer."""
    pace: Pace
    link: float
    """Bytes/s that a process sends to the others of its machine."""
    message_s: float
    network: float
    """Bytes/s that a machine sends to the others."""
    per_machine: int
    records: bool
    """Whether processes of one machine record steps as CUDA graphs, and then exchange gradients after them."""
    overlaps: bool
    """Whether gradients are exchanged while others are computed, where steps are not recorded."""
    load_rate: float
    """Images/s that the loaders of a process give it."""
    core_rate: float
    """Images/s that a core loads."""
    cores: float
    """That all processes share, each computing with `threads`; infinity where each has those that it needs."""
    threads: int
    on_gpu: bool

    def memory_of(self, processes: int) -> float:
        """Return the bytes that each of so many processes has."""
        return self.memory if self.on_gpu else self.memory / processes


def modelled(
    name: str, work: Work, precision: str, *, per_machine: int, network: float, num_workers: int, source: str
) -> Machines:
    """Return machines with GPUs of the table.

    Args:
        name: of `GPUS`.
        network: bytes/s of each machine.
        num_workers: processes that load images, of each GPU; as many cores are taken to be there.
        source: a value of data.name.
    """
    gpu = GPUS[name]
    rate = CORE_RATES.get(source, CORE_RATES["folder"])
    return Machines(
        name=name,
        source="data sheet",
        memory=1e9 * gpu.memory_gb,
        pace=Pace.modelled(gpu, work, precision),
        link=LINK_SHARE * 1e9 * gpu.link_gb,
        message_s=MESSAGE_S,
        network=LINK_SHARE * network,
        per_machine=per_machine,
        records=gpu.nvlink,
        overlaps=True,
        load_rate=rate * max(num_workers, 1),
        core_rate=rate,
        cores=float("inf"),
        threads=1,
        on_gpu=True,
    )
