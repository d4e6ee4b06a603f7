"""Build MinkowskiEngine for the installed torch and install it; knows its release, no models.

    python -m fcmae.encoder.install_minkowski          (or: make minkowski)

Its last release is of 2021 and has no wheels. This takes the source from the package index, lets pip check its
hash, builds it, fixes what today's Python and CUDA reject, and keeps the wheel for the next environment.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from fcmae.errors import UserError, run_script
from fcmae.files import write_bytes

RELEASE = "MinkowskiEngine==0.5.4"
SHA256 = "b1879c00d0b0b1d30ba622cce239886a7e3c78ee9da1064cdfe2f64c2ab15f94"

TOOLS = ("setuptools<81", "wheel", "ninja", "numpy")
"""What its setup.py imports; setuptools 81 drops pkg_resources. The extra `minkowski` names them too."""

SEQUENCE = re.compile(r"^from collections import Sequence(?:, (\w+))?$", re.MULTILINE)
"""The only Python to fix, in five files: Python 3.10 moved `Sequence` to collections.abc."""

TOOLKITS = ("/usr/local/cuda",)
"""Where CUDA is, if neither CUDA_HOME nor PATH leads to it."""

CUDA_HEADER = Path(__file__).with_name("minkowski_cuda.hpp")
"""Included before every CUDA source: says in C++ what CUDA 13 took away, and why."""

PROBE = """
import torch, MinkowskiEngine as ME
device = "cuda" if {cuda} else "cpu"
at = torch.tensor([[0, 0, 0], [0, 0, 1]], dtype=torch.int32, device=device)
x = ME.SparseTensor(torch.ones(2, 3, device=device), coordinates=at, device=device)
conv = ME.MinkowskiConvolution(3, 4, kernel_size=2, stride=2, dimension=2).to(device)
assert conv(x).F.shape == (1, 4)
"""


def cache_folder(cuda: bool) -> Path:
    """Where the wheel for this torch, Python and kind of build is kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = f"cuda-{torch.version.cuda}" if cuda else "cpu"
    return home / "fcmae" / f"minkowski-torch-{torch.__version__}-{kind}-{sysconfig.get_platform()}"


def run(command: list[str], log: Path, environment: dict[str, str] | None = None) -> bool:
    """Run a command, its output appended to `log`; returns whether it succeeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    return done.returncode == 0


def pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def works(cuda: bool, log: Path) -> bool:
    """Whether the engine installed here computes a convolution, on the GPU where it is for one."""
    seen = cuda and torch.cuda.is_available()
    return run([sys.executable, "-W", "ignore", "-c", PROBE.format(cuda=seen)], log)


def require_compiler(environment: dict[str, str]) -> None:
    """Check for a C++ compiler, Python's and OpenBLAS's headers.

    Raises:
        UserError: naming what is missing and the package that has it.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(f"no C++ compiler ({compiler}): apt install g++, or name one in CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise UserError("Python's headers (Python.h) are missing: apt install python3-dev")
    program = "#include <cblas.h>\nint main() { return cblas_isamax(0, nullptr, 1); }\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", "-o", str(Path(folder, "probe")), "-lopenblas"]
        done = subprocess.run(command, input=program, text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        raise UserError(
            "OpenBLAS or its header cblas.h is missing: apt install libopenblas-dev, "
            "or conda install -c conda-forge openblas"
        )


def require_nvcc() -> Path:
    """Return the home of a CUDA toolkit of torch's major version.

    Raises:
        UserError: if there is none, torch has no CUDA, or no architecture is known.
    """
    wanted = torch.version.cuda
    if wanted is None:
        raise UserError(f"--cuda: torch {torch.__version__} has no CUDA; install a CUDA build of torch")
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parent.parent, *TOOLKITS]
    toolkits = [Path(home) for home in homes if home and Path(home, "include", "cuda_runtime.h").is_file()]
    nvcc = next((home / "bin" / "nvcc" for home in toolkits if (home / "bin" / "nvcc").is_file()), None)
    if nvcc is None:
        raise UserError(f"nvcc of CUDA {wanted} is missing: install its toolkit and set CUDA_HOME, or give --cpu")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release ([\d.]+)", text)
    if version is None or version[1].partition(".")[0] != wanted.partition(".")[0]:
        found = f"of CUDA {version[1]}" if version else "of no known CUDA"
        raise UserError(
            f"{nvcc} is {found}, but torch was built with CUDA {wanted}: set CUDA_HOME to that one's toolkit"
        )
    if not torch.cuda.is_available() and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        raise UserError("--cuda: no GPU is visible, so name its architecture, such as TORCH_CUDA_ARCH_LIST=9.0")
    return nvcc.parent.parent


def base_environment() -> dict[str, str]:
    """The environment of a build: this Python first, as setup.py calls the first pip on PATH; small binaries."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    environment.setdefault("CFLAGS", "-g0")  # debug symbols make the wheel fifty times as large
    environment.setdefault("LDFLAGS", "-s")
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    if prefix := environment.get("CONDA_PREFIX"):
        prepend(environment, "CPATH", Path(prefix, "include"))
        prepend(environment, "LIBRARY_PATH", Path(prefix, "lib"))
    return environment


def prepend(environment: dict[str, str], name: str, path: Path) -> None:
    environment[name] = os.pathsep.join(filter(None, [str(path), environment.get(name)]))


def prepare_cuda(environment: dict[str, str], home: Path, folder: Path) -> None:
    """Lay out in `folder` what the CUDA build needs besides the source, and point the compilers there."""
    ranges = folder / "cudf" / "detail" / "nvtx" / "ranges.hpp"
    ranges.parent.mkdir(parents=True)
    # The release carries an old copy of NVTX that today's nvcc rejects; it only marks ranges for a profiler.
    ranges.write_text("#pragma once\n#define CUDF_FUNC_RANGE()\n", encoding="utf-8")
    environment["NVCC_PREPEND_FLAGS"] = f"-I{folder} -include {CUDA_HEADER}"
    environment["CUDA_HOME"] = str(home)
    # CUDA 13 moved thrust here
    prepend(environment, "CPATH", home / "include" / "cccl")
    # Toolkits without the math libraries: NVIDIA's Python packages have them, but no plain libcusparse.so to link
    packages = sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/include"))
    for library in ("cublas", "curand", "cusolver", "cusparse"):
        if any(home.glob(f"include/{library}*.h")):
            continue
        headers = [header for package in packages for header in package.glob(f"{library}*.h")]
        if not headers:
            raise UserError(
                f"{library}'s headers are missing: install the whole CUDA toolkit, or pip install nvidia-{library}"
            )
        for header in headers:
            (folder / header.name).symlink_to(header)
    for found in [path for package in packages for path in package.parent.glob("lib/libcusparse.so.*")][:1]:
        (folder / "libcusparse.so").symlink_to(found)
    prepend(environment, "CPATH", folder)
    prepend(environment, "LIBRARY_PATH", folder)


def build_wheel(cuda: bool, folder: Path, log: Path) -> Path:
    """Build the wheel in `folder` and fix its imports.

    Raises:
        UserError: naming what is missing, or the log of a failed build.
    """
    environment = base_environment()
    require_compiler(environment)
    if cuda:
        prepare_cuda(environment, require_nvcc(), folder / "include")
    if not run(pip("install", "--quiet", *TOOLS), log):
        raise UserError(f"{', '.join(TOOLS)} could not be installed; see {log}")
    requirement = folder / "requirement.txt"
    options = ["--force_cuda" if cuda else "--cpu_only", "--blas=openblas"]
    settings = " ".join(f'--config-settings="--global-option={option}"' for option in options)
    requirement.write_text(f"{RELEASE} --hash=sha256:{SHA256} {settings}\n", encoding="utf-8")
    command = [
        *pip("wheel", "--requirement", str(requirement), "--require-hashes", "--no-deps", "--no-cache-dir"),
        *("--no-binary", "MinkowskiEngine", "--no-build-isolation", "--use-pep517"),
        *("--wheel-dir", str(folder)),
    ]
    if not run(command, log, environment):
        raise UserError(f"{RELEASE} did not build: {reason(log)}; the whole log is {log}")
    return fix_imports(next(folder.glob("*.whl")), folder, log)


def reason(log: Path) -> str:
    """The line of a build's log that most likely says what went wrong."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for pattern in (r"DO NOT MATCH THE HASHES", r"\berror: (?!subprocess)", r"\w*Error: ", r"ERROR: "):
        if found := [line.strip() for line in lines if re.search(pattern, line)]:
            return found[0]
    return "no error line"


def fix_imports(wheel: Path, folder: Path, log: Path) -> Path:
    """Return a copy of the wheel with the five imports of `SEQUENCE` fixed.

    Raises:
        UserError: if they are not where this release has them.
    """
    unpacked, fixed = folder / "unpacked", folder / "fixed"
    fixed.mkdir()
    if not run([sys.executable, "-m", "wheel", "unpack", str(wheel), "--dest", str(unpacked)], log):
        raise UserError(f"{wheel.name} could not be unpacked: {reason(log)}; see {log}")
    count = 0
    for path in unpacked.rglob("*.py"):
        text, found = SEQUENCE.subn(
            lambda match: (
                "from collections.abc import Sequence"
                + (f"\nfrom collections import {match[1]}" if match[1] else "")
            ),
            path.read_text(encoding="utf-8"),
        )
        if found:
            path.write_text(text, encoding="utf-8")
            count += found
    if count != 5:
        raise UserError(f"{RELEASE}: expected five imports of collections.Sequence to fix, found {count}")
    if not run(
        [sys.executable, "-m", "wheel", "pack", str(next(unpacked.iterdir())), "--dest-dir", str(fixed)], log
    ):
        raise UserError(f"{wheel.name} could not be packed again: {reason(log)}; see {log}")
    return next(fixed.glob("*.whl"))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fcmae.encoder.install_minkowski",
        description="Build and install MinkowskiEngine; without an option for CUDA where torch sees a GPU.",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cuda", action="store_true", help="build for CUDA, on a machine without a GPU too")
    kind.add_argument("--cpu", action="store_true", help="build for the CPU only")
    options = parser.parse_args(argv)
    if sys.platform == "win32":
        raise UserError(
            "MinkowskiEngine does not build on Windows: use layout=packed, which gives the same numbers"
        )
    cuda = options.cuda or (torch.cuda.is_available() and not options.cpu)

    cache = cache_folder(cuda)
    log = cache / f"build-{sysconfig.get_config_var('SOABI')}.log"
    log.unlink(missing_ok=True)
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = next(cache.glob(f"*-{python_tag}-*.whl"), None)
    if wheel is None:
        print(f"building {RELEASE} for torch {torch.__version__}, {'CUDA' if cuda else 'CPU'}", flush=True)
        print(f"{'about 15' if cuda else '3'} minutes on 2 cores; log: {log}", flush=True)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            built = build_wheel(cuda, Path(folder), log)
            wheel = cache / built.name
            write_bytes(wheel, built.read_bytes())
        print(f"built in {time.perf_counter() - started:.0f} s, kept as {wheel}")
    if not run(pip("install", "--no-deps", "--force-reinstall", "--quiet", str(wheel)), log):
        raise UserError(f"{wheel} could not be installed: {reason(log)}; delete it to build it again")
    if not works(cuda, log):
        raise UserError(f"{wheel} is installed but does not run: {reason(log)}; delete it to build it again")
    print("MinkowskiEngine works: model.layout=minkowski")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
