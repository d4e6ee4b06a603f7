"""What several tests share: small models with nothing trivially zero, and scripts run as a user would."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, settings
from numba import config
from torch import Tensor, nn
from torch.backends.cpu import get_cpu_capability

from fcmae.__main__ import run as fcmae_command
from fcmae.encoder.convnext import ConvNeXt, Layout
from fcmae.errors import run_script
from fcmae.signals import STOP_SIGNALS
from fcmae.training import dry_run
from fcmae.training.checkpoint import State

# Several threads waiting for each other on busy cores make such small models up to 100 times slower.
torch.set_num_threads(1)

# Triton kernels run in its interpreter where there is no GPU; Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent

Module = TypeVar("Module", bound=nn.Module)

FUZZING = "FCMAE_FUZZ" in os.environ
"""Whether `make fuzz` runs: many inputs, others each time."""


def fuzzed(few: int, many: int) -> settings:
    """Run a hypothesis test on `few` inputs, always the same, or by `make fuzz` on `many`, others each time."""
    return settings(
        max_examples=many if FUZZING else few,
        derandomize=not FUZZING,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[*HealthCheck.__members__.values()],
    )


TINY = ((1, 1, 2, 1), (8, 16, 24, 32))
"""Small enough for float64 on two cores; a stage of two blocks, all widths different."""


NOT_TESTED = {
    "gpu": ("on CUDA", "make test, on a machine with a GPU"),
    "minkowski": ("of MinkowskiEngine", "apt-get install g++ libopenblas-dev && make minkowski"),
    "browser": ("in a browser", "apt-get install chromium && pip install playwright"),
}
"""Marker -> what its tests are, the command that adds them where they were skipped."""


def pytest_report_header() -> str:
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    numba = config.CPU_NAME or "as built for this one"  # pyright: ignore[reportAttributeAccessIssue]
    return f"processor: torch {get_cpu_capability()}, numba {numba}, {threads} threads for each run"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("minkowski") and importlib.util.find_spec("MinkowskiEngine") is None:
        pytest.skip("needs MinkowskiEngine: make minkowski")
    if item.get_closest_marker("browser") and (
        chromium() is None or importlib.util.find_spec("playwright") is None
    ):
        pytest.skip("needs Chromium and playwright: apt-get install chromium && pip install playwright")


def chromium() -> str | None:
    """Where a browser is, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright; for tests marked so."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say last, but for pytest's closing line, what was counted, what could not be tested here and how it can."""
    yield
    counted: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") == "teardown":
            for key, value in report.user_properties:
                if key == "tally":
                    what, survived, tried = value
                    counted[f"{what}: survived"] += survived
                    counted[f"{what}: tried"] += tried
    for what, number in sorted(counted.items()):
        terminalreporter.write_line(f"{number:6} {what}")
    skipped = terminalreporter.stats.get("skipped", [])
    for marker, (what, command) in NOT_TESTED.items():
        if count := sum(marker in report.keywords for report in skipped):
            terminalreporter.write_line(f"NOT TESTED: {count} tests {what}; to add them: {command}", yellow=True)
        skipped = [report for report in skipped if marker not in report.keywords]


@pytest.fixture(autouse=True, scope="session")
def signals_heard() -> None:
    """Let programs hear the signals that nohup, or a shell's background, has this process and its own ignore."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def short_dry_runs() -> None:
    """Let a dry run measure for a moment: what it then says of the clock is not compared."""
    dry_run.MEASURED_S = 0.05


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomise(module: Module, std: float = 0.4) -> Module:
    """Draw every parameter from a normal of this std (norm weights around 1), so that none is zero."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=std)
            if p.ndim == 1 and name.endswith("weight"):
                p += 1
    return module


def small_encoder(**kwargs: Any) -> ConvNeXt:
    """A randomised float64 encoder of variant `TINY`."""
    return randomise(ConvNeXt(kwargs.pop("variant", TINY), **kwargs).double())


def smooth_images(b: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random images with the low frequencies of photographs, of mean 0 and variance about 1."""
    coarse = torch.randn(b, c, h // 8 + 1, w // 8 + 1, dtype=dtype)
    return 1.5 * F.interpolate(coarse, (h, w), mode="bicubic")


def some_ids(b: int, num_patches: int, p: int) -> Tensor:
    """Sorted random ids (b, p), different for each image."""
    return torch.rand(b, num_patches).argsort(1)[:, :p].sort(1).values


def gradients(out: Tensor, module: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of `out`, to all parameters of `module` and to `inputs`."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = dict(module.named_parameters()) | inputs
    grads = torch.autograd.grad((out * weight.to(out.dtype)).sum(), list(wanted.values()))
    return dict(zip(wanted, grads, strict=True))


def features_and_gradients(
    encoder: ConvNeXt, images: Tensor, ids: Tensor | None, layout: Layout
) -> dict[str, Tensor]:
    """The features, and their gradients to every parameter and to the images."""
    images = images.detach().clone().requires_grad_()
    features = encoder.features(images, ids, layout)
    return {"features": features.detach()} | gradients(features, encoder, images=images)


def relative_error(a: Tensor, b: Tensor) -> float:
    """Largest deviation over the largest magnitude; NaN and infinity count as infinite."""
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    error = (a - b).abs().max() / b.abs().max().clamp_min(1e-300)
    return float(error) if bool(error.isfinite()) else float("inf")


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Hold that two sets of named tensors agree within a relative tolerance, each by its own scale."""
    assert a.keys() == b.keys()
    errors = {name: relative_error(a[name], b[name]) for name in a}
    off = {name: error for name, error in errors.items() if error > tolerance}
    assert not off, f"differ by more than {tolerance}: {off}"


# Scripts


def run_program(program: Callable[[], object], arguments: Sequence[str]) -> int:
    """Call a program in this process with its `sys.argv`, as a process of its own would; returns the exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(arguments))
        try:
            program()
            return 0
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            torch.set_num_threads(threads)
            AcceleratorState._reset_state(reset_partial_state=True)


def run_main(main: Callable[[list[str]], int], *arguments: str) -> int:
    """Run a script's `main` in this process, as the script would; returns the exit code."""
    return run_program(lambda: sys.exit(run_script(main)), ["script.py", *arguments])


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_main(fcmae_command, *map(str, arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def error_line(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error of a run that ends with exit code 2."""
    capsys.readouterr()
    assert run_main(main, *arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state_of(step: int, **known: Any) -> State:
    """What a checkpoint of a step holds besides tensors, of a run that nothing is to be known of."""
    values: dict[str, Any] = {
        "seen_images": 8 * step,
        "loss_sum": 0.5,
        "num_losses": 1,
        "bad_images": (),
        "best": None,
    }
    values |= {"scaler": None, "num_processes": 1, "config": {}, "fcmae": "0", "torch": "0"}
    return State.model_validate(values | {"step": step} | known)


def flip(path: Path, byte: int, bit: int = 6) -> None:
    """Flip one bit of a file, as a failing disk or memory does."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def environment() -> dict[str, str]:
    """For launching this checkout's scripts from anywhere, with a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"PYTHONPATH": str(ROOT), "MASTER_PORT": str(free.getsockname()[1])}
        return os.environ | place | {"OMP_NUM_THREADS": "1"}


def launch(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a Python module with its arguments, such as torchrun's, to the end."""
    module = [sys.executable, "-m", *command]
    return subprocess.run(module, env=environment, capture_output=True, text=True, timeout=280, check=False)
