"""Programs in processes forked from one that has imported everything: begun in tenths of a second, to be killed.

A process that imports torch, torchvision and torchmetrics takes seconds before its first line. Tests to which a
launcher or a script itself is the point start it as a user would (`conftest.launch`); the others start here.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from fcmae import arguments

ROOT = Path(__file__).parents[1]

PRELOADED = (
    *("processes", "fcmae.pretrain", "fcmae.finetune", "fcmae.ops.patch_depthwise_numba"),
    *("fcmae.commands.prepare", "fcmae.commands.predict", "fcmae.commands.ablate"),
    *("torch.utils.tensorboard", "PIL.features", "llvmlite.ir", "numba.np.arrayobj", "numba.typed"),
    *("torch._dynamo", "einops._torch_specific"),
)

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
"""What `accelerate launch` tells processes by an FSDP configuration."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

Image.init()  # all that a loader worker would import, once


@cache
def fork_server() -> Any:
    """Return a context of multiprocessing that forks from a process which has imported all, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = dict(os.environ)
    os.environ |= ONE_THREAD | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _work(
    program: Callable[[], int | None],
    argv: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    output: Path,
) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in any other process
    os.chdir(folder)
    for handle, kind in ((1, "output"), (2, "errors")):
        file = os.open(output.with_name(f"{output.name}-{kind}.txt"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, handle)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = list(argv)
    try:
        sys.exit(program())
    finally:
        atexit._run_exitfuncs()  # which ends as any process does, but one of a fork server does not


class Processes:
    """The processes of a program: one, or the ranks of one run, as torchrun starts them.

    Args:
        program: called in each, with `argv` as its `sys.argv`, for its exit code; it must be importable.
        place: a folder for what they write on standard output and error.
        folder: they work in it; default `place`.
        number: of ranks.
    """

    def __init__(
        self,
        program: Callable[[], int | None],
        argv: Sequence[str],
        place: Path,
        *,
        folder: Path | None = None,
        number: int = 1,
    ) -> None:
        self.place = place
        self.processes = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(number):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | ONE_THREAD | ({k: str(v) for k, v in places.items()} if number > 1 else {})
            of_rank = (program, argv, folder or place, environment, place / str(rank))
            process = fork_server().Process(target=_work, args=of_rank)
            process.start()
            self.processes.append(process)

    def alive(self) -> bool:
        """Whether any still runs."""
        return any(process.is_alive() for process in self.processes)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all processes, loader workers included, at once."""
        for process in self.processes:
            for kill in (os.killpg, os.kill):  # which may not yet lead a group
                try:
                    kill(process.pid, number)
                except ProcessLookupError:
                    continue
                break

    def wait(self, seconds: float = 250) -> list[int]:
        """Return the exit codes; once one process has died of a signal the others are killed, as launchers do."""
        deadline = time.monotonic() + seconds
        while waiting := [process.sentinel for process in self.processes if process.is_alive()]:
            left = deadline - time.monotonic()
            wait(waiting, max(left, 0))
            if left < 0:
                self.kill()
                raise TimeoutError(f"{self.place}: still running after {seconds} s")
            if any(process.exitcode == -signal.SIGKILL for process in self.processes):
                self.kill()
        self.kill()  # what they may have left behind
        return [process.exitcode for process in self.processes]

    def written(self, kind: str) -> str:
        """Return what all wrote as "output" or as "errors"."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.place.glob(f"*-{kind}.txt")))


class Ended(NamedTuple):
    """How processes ended, and what they wrote."""

    codes: list[int]
    output: str
    errors: str


def run_story(story: str, *words: str, number: int = 1) -> Ended:
    """Run "pretrain" or "finetune" to its end, in so many processes of one run as `torchrun` starts them."""
    with tempfile.TemporaryDirectory() as place:
        processes = Processes(partial(arguments.run, story), [f"{story}.py", *words], Path(place), number=number)
        try:
            codes = processes.wait()
        finally:
            processes.kill()
        return Ended(codes, processes.written("output"), processes.written("errors"))
