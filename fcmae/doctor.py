"""Examine an installation and a machine: what would end a run, or slow it down, and the remedy; trains nothing.

Each check looks at one thing and imports what it needs, so that what is missing or broken is found, not met.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from fcmae import __version__
from fcmae.errors import UserError, brief
from fcmae.files import free_bytes, fsync, require_folder

if TYPE_CHECKING:
    import torch

Layout = Literal["dense", "masked", "packed", "minkowski"]

State = Literal["OK", "warning", "failed"]
"""A warning is of what a run goes without, or is slower for. Failed is what a run would end by, or compute wrongly
with, and a GPU that it would leave idle."""

GET_TORCH = "install a torch that fits, as https://pytorch.org/get-started says, and its torchvision with it"
BUILD_ENGINE = "python -m fcmae.encoder.install_minkowski builds it for this torch"
REPORT = "please report this with the output of fcmae doctor --json"


class Finding(NamedTuple):
    """What a check has found."""

    name: str
    state: State
    text: str
    remedy: str = ""


# Packages


def fcmae_itself() -> Finding:
    return Finding("fcmae", "OK", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")


def torch_itself() -> Finding:
    """Whether torch loads."""
    torch = import_module("torch")
    return Finding("torch", "OK", f"{torch.__version__}")


def torchvision_pair() -> Finding:
    """Whether torchvision loads and was built for this torch, which its requirements name."""
    from torch.torch_version import TorchVersion

    version, torch_version = metadata.version("torchvision"), metadata.version("torch")
    wanted = [line for line in metadata.requires("torchvision") or [] if re.match(r"torch\s*\(?==", line)]
    numbers = [re.sub(r"[^\d.]", "", line.partition("==")[2].partition(";")[0]) for line in wanted]
    text = f"{version} with torch {torch_version}"
    if numbers and TorchVersion(torch_version.partition("+")[0]) != numbers[0]:
        return Finding("torchvision", "failed", f"{text}, but it was built for torch {numbers[0]}", GET_TORCH)
    import_module("torchvision.transforms.v2")
    return Finding("torchvision", "OK", text)


def other_packages() -> Finding:
    """Whether what fcmae requires is installed, and new enough."""
    from torch.torch_version import TorchVersion

    found, wrong = dict[str, str](), list[str]()
    for requirement in metadata.requires("fcmae") or []:
        needed = re.match(r"([\w.-]+)>=([\w.]+)$", requirement)
        if needed is None:  # an optional one
            continue
        name, least = needed.groups()
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        if TorchVersion(found[name].partition("+")[0]) < least:
            wrong.append(f"{name} {found[name]} is older than {least}")
    text = ", ".join(f"{name} {found[name]}" for name in ("timm", "accelerate") if name in found)
    if wrong:
        return Finding("packages", "failed", "; ".join([*wrong, text]), "pip install --upgrade fcmae")
    return Finding("packages", "OK", f"{text}; all {len(found)} that fcmae requires")


# The machine


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None where there is none."""
    if (program := shutil.which("nvidia-smi")) is not None:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == 0 and (versions := done.stdout.split()):
            return versions[0]
    return None


def gpus() -> Finding:
    """Which GPUs a run would take, and whether one would be left idle."""
    import torch

    from fcmae.training.launch import has_bf16
    from fcmae.training.memory import free_and_total

    driver = driver_version()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        if driver is None:
            return Finding("GPU", "OK", "none: runs compute on the CPU")
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return Finding("GPU", "OK", f"none visible, as CUDA_VISIBLE_DEVICES says (driver {driver})")
        if torch.version.cuda is None:
            text = f"NVIDIA driver {driver}, but torch {torch.__version__} is built without CUDA"
            return Finding("GPU", "failed", text, GET_TORCH)
        try:
            torch.cuda.init()
            reason = "torch sees none"
        except Exception as error:
            reason = brief(error)
        text = f"NVIDIA driver {driver}, but no GPU for the {built} of torch {torch.__version__}: {reason}"
        return Finding("GPU", "failed", text, f"update the driver, or {GET_TORCH}")
    if device.type != "cuda":
        return Finding("GPU", "OK", f"{device.type}: without CUDA graphs and Triton kernels")
    kinds, busy, slow = Counter[str](), False, False
    for number in range(torch.cuda.device_count()):
        each = torch.device("cuda", number)
        with torch.cuda.device(each):
            bf16 = has_bf16(each)
        free, total = free_and_total(each)
        kinds[f"{torch.cuda.get_device_name(each)} of {total / 1e9:.0f} GB, {'bf16' if bf16 else 'no bf16'}"] += 1
        busy, slow = busy or free < 0.5 * total, slow or not bf16
    text = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    text += f"; {built}" + (f", driver {driver}" if driver else "")
    if busy:
        return Finding("GPU", "warning", f"{text}; other programs hold half of a GPU's memory", "end them")
    if slow:
        remedy = "train.precision=fp16 takes half the memory of float32, which auto takes without bf16"
        return Finding("GPU", "warning", text, remedy)
    return Finding("GPU", "OK", text)


def triton() -> Finding:
    """Whether there are Triton, and the C compiler it starts kernels by, where a GPU computes by them."""
    import torch

    if not torch.cuda.is_available():
        return Finding("Triton", "OK", "not needed without a CUDA GPU")
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return Finding("Triton", "failed", "missing: the kernels for GPUs are written in it", "pip install triton")
    compilers = [os.environ.get("CC", ""), "gcc", "clang"]
    if not any(name and shutil.which(name) for name in compilers):
        remedy = "apt install gcc, or name a compiler in CC"
        return Finding("Triton", "failed", f"{version}, but there is no C compiler, by which it starts", remedy)
    return Finding("Triton", "OK", version)


def compiler() -> Finding:
    """Whether there is the C++ compiler that train.compile=true takes."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        text = f"{name} is not there: train.compile=true needs it, and so does building MinkowskiEngine"
        return Finding("C++ compiler", "warning", text, "apt install g++, or name one in CXX")
    done = subprocess.run([name, "--version"], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        return Finding("C++ compiler", "warning", f"{name}: {done.stderr.strip()}", "apt install --reinstall g++")
    return Finding("C++ compiler", "OK", f"{done.stdout.splitlines()[0]}, for train.compile=true")


def minkowski() -> Finding:
    """Whether MinkowskiEngine loads, where it is installed."""
    from fcmae.encoder.minkowski import import_engine

    if importlib.util.find_spec("MinkowskiEngine") is None:
        text = "not installed: model.layout=minkowski alone needs it, and packed gives the same numbers"
        return Finding("MinkowskiEngine", "OK", text)
    try:
        engine = import_engine()
    except ValueError as error:
        text = f"installed, but does not load: {brief(error.__cause__ or error)}"
        return Finding("MinkowskiEngine", "warning", text, BUILD_ENGINE)
    return Finding("MinkowskiEngine", "OK", engine.__version__)


WRITTEN_BYTES = 1 << 26
"""To measure a disk by: about a checkpoint of Atto."""
SLOW_BYTES_S, FEW_BYTES = 20e6, 5e9
"""Where a disk is slow, and where its space is little."""


def disk(output: Path) -> Finding:
    """Whether a run can write where its output goes, how fast, and how much fits."""
    try:
        require_folder(output, f"output={output}")
    except UserError as error:
        return Finding("disk", "failed", str(error), "name a folder that can be written: output=FOLDER")
    absolute = output.absolute()
    place = next(folder for folder in (absolute, *absolute.parents) if folder.exists())
    with tempfile.TemporaryDirectory(prefix=".fcmae-doctor-", dir=place) as folder:
        content = os.urandom(1 << 20)
        path = Path(folder, "speed")
        started = time.perf_counter()
        with open(path, "wb") as file:
            for _ in range(WRITTEN_BYTES // len(content)):
                file.write(content)
        fsync(path)
        rate = WRITTEN_BYTES / (time.perf_counter() - started)
    free = free_bytes(output)
    text = f"{place}: {free / 1e9:,.0f} GB free, {rate / 1e6:,.0f} MB/s to write"
    if free < FEW_BYTES:
        remedy = "free some space, or name another disk by output=FOLDER; checkpoint.keep=1 takes less"
        return Finding("disk", "warning", text, remedy)
    if rate < SLOW_BYTES_S:
        return Finding(
            "disk", "warning", text, "name a faster disk by output=FOLDER, or raise checkpoint.every_steps"
        )
    return Finding("disk", "OK", text)


WORKER_BATCH_BYTES = 64 * 3 * 224 * 224
"""Of 64 images of 224 px."""


def shared_memory() -> Finding:
    """Whether batches of 64 images of 224 px can come from a process for each core through shared memory."""
    from fcmae.data.batches import PREFETCH_FACTOR
    from fcmae.data.shared_memory import IN_HAND, choose_transport, free_shared_bytes
    from fcmae.story import cores_per_process

    free, workers = free_shared_bytes(), cores_per_process()
    transport = choose_transport(workers, WORKER_BATCH_BYTES * (PREFETCH_FACTOR * workers + IN_HAND), free)
    if transport.line:
        what, _, remedy = transport.line.rpartition("; ")
        return Finding("shared memory", "warning", what, remedy)
    size = f"{free / 1e6:,.0f} MB free" if free < float("inf") else "without a limit"
    return Finding("shared memory", "OK", f"{size}, enough for {workers} processes that load images")


def cores() -> Finding:
    """How many cores and threads there are, and how much memory."""
    import torch

    from fcmae.story import cores_per_process
    from fcmae.training.memory import ram_bytes

    number, threads, ram = cores_per_process(), torch.get_num_threads(), ram_bytes()
    text = f"{number} cores, {threads} thread{'s' * (threads > 1)}"
    text += f", {ram / 1e9:,.0f} GB of memory" if ram else ""
    if threads > number:
        return Finding("cores", "warning", f"{text}: these wait for each other", f"set OMP_NUM_THREADS={number}")
    return Finding("cores", "OK", text)


# The layouts


NETWORK = ((1, 1, 1, 1), (40, 80, 160, 320))
"""Widths of Atto, so that kernels are those of a run."""
TOLERANCES = {"float32": 1e-4, "bf16": 5e-2}
"""Of features and gradients, by what computes them: relative, as norms."""


def features_and_gradient(
    layout: Layout,
    device: "torch.device",
    precision: Literal["float64", "float32", "bf16"],
    *,
    all_visible: bool,
) -> list["torch.Tensor"]:
    """Return the features of always the same images, and their gradient to all weights, on the CPU in float64."""
    import torch

    from fcmae.encoder.convnext import ConvNeXt
    from fcmae.masking import sample_visible_ids
    from fcmae.seeding import torch_seeded

    with torch_seeded(0):
        encoder = ConvNeXt(NETWORK, stem_stride=2)
        for name, parameter in encoder.named_parameters():
            if ".grn." in name:  # zeros, which would hide what GRN computes
                torch.nn.init.normal_(parameter)
        images, ids = torch.randn(2, 3, 64, 64), sample_visible_ids(2, 16, 0.6)
        direction = torch.randn(2, 4, 4, NETWORK[1][-1])
    if all_visible:
        ids = torch.arange(16).expand(2, -1)
    dtype = torch.float64 if precision == "float64" else torch.float32
    encoder = encoder.to(device, dtype)
    with torch.backends.cudnn.flags(allow_tf32=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            visible_ids = None if layout == "dense" else ids.to(device)
            features = encoder.features(images.to(device, dtype), visible_ids, layout)
        loss = (features.to(dtype) * direction.to(device, dtype)).sum()
        gradients = torch.autograd.grad(loss, [*encoder.parameters()], materialize_grads=True)
    gradient = torch.cat([gradient.flatten() for gradient in gradients])
    return [part.detach().double().cpu() for part in (features, gradient)]


def layout_check(layout: Layout, device: "torch.device") -> Finding:
    """Whether a layout computes on a device what masked does in float64 on the CPU, forward and gradient."""
    import torch

    from fcmae.training.launch import has_bf16

    text = list[str]()
    reference = features_and_gradient("masked", torch.device("cpu"), "float64", all_visible=layout == "dense")
    off = False
    for precision in ("float32", "bf16"):
        if precision == "float32" or has_bf16(device):
            found = features_and_gradient(layout, device, precision, all_visible=layout == "dense")
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True)]
            error = max(errors) if all(e == e for e in errors) else float("nan")
            off = off or not error <= TOLERANCES[precision]
            text.append(f"{error:.0e} in {precision}")
    said = f"forward and gradient within {', '.join(text)} of masked in float64"
    name = f"{layout} on {device.type}"
    if off:
        return Finding(name, layout_trouble(layout), f"wrong: {said}", layout_remedy(layout))
    return Finding(name, "OK", said)


def layout_trouble(layout: str) -> State:
    """What it is when a layout does not compute: runs take minkowski only where they are asked to."""
    return "warning" if layout == "minkowski" else "failed"


def layout_remedy(layout: str) -> str:
    if layout == "minkowski":
        return f"{BUILD_ENGINE}; model.layout=packed gives the same numbers"
    if layout == "packed":
        return f"model.layout=masked computes the same by other operations; {REPORT}"
    return f"{GET_TORCH}; if that does not help, {REPORT}"


# All of it


def examine(name: str, check: Callable[[], Finding], remedy: str, trouble: State = "failed") -> Finding:
    """Do a check; one that ends early is trouble, by what it says."""
    try:
        return check()
    except Exception as error:
        return Finding(name, trouble, f"{type(error).__name__}: {brief(error)}", remedy)


def diagnose_machine(output: Path) -> Iterator[Finding]:
    """Yield what is found, check by check; no more than that torch does not load, where it does not."""
    yield fcmae_itself()
    found = examine("torch", torch_itself, GET_TORCH)
    yield found
    if found.state == "failed":
        return
    checks: dict[str, tuple[Callable[[], Finding], str]] = {
        "torchvision": (torchvision_pair, GET_TORCH),
        "packages": (other_packages, "pip install fcmae"),
        "GPU": (gpus, GET_TORCH),
        "Triton": (triton, "pip install triton"),
        "C++ compiler": (compiler, "apt install g++"),
        "MinkowskiEngine": (minkowski, BUILD_ENGINE),
        "disk": (partial(disk, output), "name another disk by output=FOLDER"),
        "shared memory": (shared_memory, "docker run --ipc=host"),
        "cores": (cores, REPORT),
    }
    for name, (check, remedy) in checks.items():
        yield examine(name, check, remedy)

    import torch

    layouts: list[Layout] = ["masked", "packed", "dense"]
    if importlib.util.find_spec("MinkowskiEngine") is not None:
        layouts.append("minkowski")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for layout in layouts:
            check = partial(layout_check, layout, torch.device(device))
            yield examine(f"{layout} on {device}", check, layout_remedy(layout), layout_trouble(layout))
