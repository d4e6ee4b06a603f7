"""Runs that are asked to stop, by a signal or their hours: saved, told how, resumed as if nothing had happened."""

import json
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import ROOT, records, run_main
from processes import Processes
from safetensors.torch import load_file
from torch import Tensor

from fcmae import finetune, pretrain
from fcmae.data import PixelNormalizer, save_arrays
from fcmae.data.batches import load_batches
from fcmae.data.workers import describe_death
from fcmae.errors import UserError
from fcmae.training.stop import StopRequests
from fcmae.training.trainer import Trainer

STORIES: dict[str, tuple[ModuleType, str]] = {
    "pretrain": (
        pretrain,
        "model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, decoder_dim: 16}\n"
        "optim: {base_lr: 0.03, accumulate: 2}\n"
        "train: {max_steps: 12}\n"
        "visualize: {num_images: 1, every_steps: 4}\n",
    ),
    "finetune": (
        finetune,
        "model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1}\n"
        "train: {max_steps: 12, ema_decay: 0.9}\n"
        "eval: {every_epochs: 1}\n",
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
        save_arrays(root / split, images, np.arange(16) % 4)
    return root


def settings(name: str, data: Path, folder: Path) -> list[str]:
    config = folder.parent / f"{name}.yaml"
    config.write_text(
        f"output: {folder}\nlog: {{every_steps: 1}}\n{STORIES[name][1]}"
        f"data: {{name: arrays, root: {data}, image_size: 32, batch_size: 4, num_workers: 0}}\n"
    )
    return ["--config", str(config)]


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What a run recorded, but for what the clock says, and its weights to the bit."""
    kept = [
        {k: v for k, v in r.items() if k not in ("images_per_s", "data_wait", "memory_gb", "time")}
        for r in records(folder)
    ]
    return kept, {
        k: v.numpy().tobytes() for k, v in load_file(folder / "checkpoints/last/model.safetensors").items()
    }


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of each story, undisturbed."""
    root = tmp_path_factory.mktemp("whole")
    for name, (story, _) in STORIES.items():
        assert run_main(story.main, *settings(name, data, root / name)) == 0
    return {name: outcome(root / name) for name in STORIES}


def interrupt(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int) -> None:
    """Send this process a signal within the call of `name` that has this number, from 0."""
    original, calls = getattr(owner, name), count()

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    patch.setattr(owner, name, disturbed)


@pytest.mark.parametrize(
    ("name", "owner", "function", "call", "number"),
    [
        ("pretrain", Trainer, "accumulate", 5, signal.SIGTERM),
        ("pretrain", pretrain, "draw_reconstructions", 1, signal.SIGUSR1),
        ("finetune", finetune, "evaluate", 2, signal.SIGHUP),
        ("finetune", Trainer, "save", 0, signal.SIGINT),
    ],
    ids=["in an update", "while it draws", "while it evaluates", "while it saves"],
)
def test_a_signal_saves_and_stops_a_run_which_goes_on_as_if_there_had_been_none(
    name: str,
    owner: Any,
    function: str,
    call: int,
    number: int,
    data: Path,
    whole: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    story, folder = STORIES[name][0], tmp_path / "run"
    arguments = settings(name, data, folder)
    handlers = [signal.getsignal(s) for s in signal.valid_signals()]
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, function, call, number)
        assert run_main(story.main, *arguments) == 128 + number
    assert [signal.getsignal(s) for s in signal.valid_signals()] == handlers
    out = capsys.readouterr().out
    first, last = (line for line in out.splitlines() if signal.Signals(number).name in line)
    assert first.endswith(": stopping after this update; a second signal ends the run at once")
    found = re.fullmatch(
        rf"stopped by {signal.Signals(number).name} at step (\d+) of 12; saved: (.*); "
        "to go on: the same command with resume=auto",
        last,
    )
    assert found
    assert Path(found[2]) == folder / "checkpoints" / f"step-{int(found[1]):08d}"
    assert json.loads((Path(found[2]) / "state.json").read_text())["step"] == int(found[1]) < 12
    assert not (folder / "lock.json").exists()
    assert run_main(story.main, *arguments, "resume=auto") == 0
    assert outcome(folder) == whole[name]


def test_before_the_first_update_signals_end_a_run_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: list[Any] = []
    original = pretrain.draw_reconstructions

    def draw(*args: Any) -> Any:
        handlers.append(signal.getsignal(signal.SIGTERM))
        return original(*args)

    monkeypatch.setattr(pretrain, "draw_reconstructions", draw)
    assert run_main(pretrain.main, *settings("pretrain", data, tmp_path / "run"), "train.max_steps=4") == 0
    assert handlers[0] == signal.SIG_DFL != handlers[1]


def test_max_hours_saves_and_stops_with_a_code_of_its_own_and_each_start_makes_progress(
    data: Path, whole: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = [*settings("pretrain", data, folder), "resume=auto"]
    for step in (1, 2):
        assert run_main(pretrain.main, *arguments, "train.max_hours=1e-6") == 75
        assert f"stopped by train.max_hours at step {step} of 12; saved: {folder}" in capsys.readouterr().out
    assert run_main(pretrain.main, *arguments) == 0
    assert "not the same run" not in capsys.readouterr().out
    assert outcome(folder) == whole["pretrain"]


@pytest.mark.parametrize("good", [0, 1], ids=["the first", "a later one"])
@pytest.mark.parametrize("name", STORIES)
def test_a_dry_run_whose_loss_is_not_finite_leaves_no_file(
    name: str, good: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normalize, calls = PixelNormalizer.forward, count()

    def poison(self: PixelNormalizer, pixels: Tensor) -> Tensor:
        return normalize(self, pixels) * (1 if next(calls) < good else float("nan"))

    arguments = settings(name, data, tmp_path / "run")
    monkeypatch.setattr(PixelNormalizer, "forward", poison)
    run_main(STORIES[name][0].main, *arguments, "--dry-run")
    assert next(calls) > good
    assert not (tmp_path / "run").exists()


# What listens


def listener(**other: Any) -> StopRequests:
    return StopRequests(**{"say": lambda _: None, "max_hours": None, "num_processes": 1} | other)


def test_a_second_signal_ends_a_process_that_waits_for_ever_in_c() -> None:
    program = """
import ctypes
from fcmae.training import stop
stop.AGAIN_S = 1.0
with stop.StopRequests(say=lambda line: print(line, flush=True), max_hours=None, num_processes=1):
    print("ready", flush=True)
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.terminate()  # as schedulers do: the same request
    assert process.stdout.readline().startswith("SIGTERM: stopping after this update")
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(250) == 130
    process.stdout.close()


def test_an_ignored_signal_stays_ignored_as_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listener() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            while not stop.code:
                time.sleep(0.01)
            assert stop.asked() == 128 + signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_in_another_thread_trains_without_taking_signals() -> None:
    codes: list[int] = []

    def train() -> None:
        with listener() as stop:
            codes.append(stop.asked())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert codes == [0]
    assert signal.getsignal(signal.SIGTERM) == before


# Processes of a run


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.kill()


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("name", "number"), [("pretrain", signal.SIGTERM), ("finetune", signal.SIGHUP)])
def test_a_signal_to_all_processes_saves_the_run_and_leaves_none_of_them(
    name: str, number: int, data: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """SIGTERM as schedulers send it, SIGHUP by closing the terminal, to which the run and its workers belong."""
    folder = tmp_path / "run"
    more = ["data.num_workers=2", "train.max_steps=100000", "train.epochs=100000", "log.every_steps=10"]
    command = [sys.executable, str(ROOT / f"{name}.py"), *settings(name, data, folder), *more]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, environment)
    process = psutil.Process(pid)
    output = b""
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text()):
        output += os.read(terminal, 1024)
    processes = [process, *process.children(recursive=True)]
    try:
        assert len(processes) >= 3
        if number == signal.SIGHUP:
            os.close(terminal)
        else:
            os.killpg(pid, number)
            while True:
                try:
                    output += os.read(terminal, 1024)
                except OSError:  # the end
                    break
            assert b"stopped by SIGTERM at step" in output
            os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number, output.decode()
        assert not psutil.wait_procs(processes, timeout=200)[1]
    finally:
        kill_all(processes)
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert records(folder)[-1]["step"] in range(state["step"] - 9, state["step"] + 1)


def stop_one_of_two(arguments: list[str], whole: Path, part: Path, ports: list[str]) -> None:
    """In each of two processes: train undisturbed, then until one of them gets a signal, and go on."""

    def run(*more: str) -> None:
        os.environ["MASTER_PORT"] = ports.pop()
        print("ended", run_main(pretrain.main, *arguments, *more), flush=True)

    run(f"output={whole}")
    update = Trainer.update

    def disturbed(self: Trainer, batches: Any) -> None:
        if self.step == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        update(self, batches)

    Trainer.update = disturbed
    run(f"output={part}")
    Trainer.update = update
    run(f"output={part}", "resume=auto")


def test_processes_of_which_one_gets_a_signal_stop_at_the_same_step(
    data: Path, tmp_path: Path, free_ports: list[str]
) -> None:
    folders = [tmp_path / "whole", tmp_path / "part"]
    arguments = [*settings("pretrain", data, tmp_path / "run"), "visualize.num_images=0"]
    program = partial(stop_one_of_two, arguments, *folders, free_ports)
    processes = Processes(program, ["test"], tmp_path, number=2)
    assert processes.wait() == [0, 0], processes.written("errors")
    outputs = [(tmp_path / f"{rank}-output.txt").read_text() for rank in range(2)]
    for output in outputs:
        assert re.findall(r"^ended (\d+)$", output, re.MULTILINE) == ["0", "143", "0"], "\n".join(outputs)
    assert re.search(r"stopped by SIGTERM at step [5-9] of 12; saved: ", outputs[0])
    assert "stopped" not in outputs[1]
    assert outcome(folders[1]) == outcome(folders[0])


@pytest.fixture
def free_ports() -> list[str]:
    import socket

    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


# Processes that load images


class Numbers:
    """A dataset whose samples are their indices."""

    sample_bytes = 8
    collate = staticmethod(list)

    def __getitem__(self, index: int) -> int:
        return index


def load(number: int) -> Any:
    dataset: Any = Numbers()
    return load_batches(dataset, [[index] for index in range(number)], num_workers=2, pin_memory=False)


def workers() -> list[psutil.Process]:
    """Those that load; servers that other tests have begun are no children of theirs to multiprocessing."""
    return [psutil.Process(process.pid) for process in multiprocessing.active_children()]


def test_loading_goes_on_through_the_signals_that_stop_a_run() -> None:
    batches = load(21)
    assert next(batches) == [0]
    mine = workers()
    assert len(mine) == 2
    for process in mine:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            process.send_signal(number)
    assert list(batches) == [[index] for index in range(1, 21)]
    psutil.wait_procs(mine, timeout=200)
    assert not [process for process in mine if process.is_running()]


INTERRUPTED = """
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from fcmae.data.batches import load_batches


class Numbers:
    sample_bytes = 8
    collate = staticmethod(list)

    def __getitem__(self, index):
        return index


def interrupt(self):
    raise KeyboardInterrupt


batches = load_batches(Numbers(), [[i] for i in range(40)], num_workers=2, pin_memory=False)
print(next(batches))
_MultiProcessingDataLoaderIter.__del__ = interrupt
del batches
"""


def test_an_interrupt_while_a_loader_ends_does_not_hang_the_exit() -> None:
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True)
    assert done.stdout == "[0]\n"
    assert "KeyboardInterrupt" in done.stderr


def test_the_death_of_a_process_that_loads_is_one_line_with_what_may_help() -> None:
    batches = load(50)
    assert next(batches) == [0]
    for process in workers():
        process.kill()
    with pytest.raises(UserError) as error:
        list(batches)
    expected = (
        "data.num_workers=2: a process that loads images was ended by SIGKILL, as the system does when memory"
    )
    assert str(error.value).startswith(expected)
    assert not error.value.everywhere
    assert "shared memory (/dev/shm) is full" in describe_death(-signal.SIGBUS)
    assert "ended by exit code 3, data.num_workers=0 shows what happens" in describe_death(3)


ENDINGS = ("sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)")


def test_processes_that_load_end_with_the_one_they_load_for_even_if_busy() -> None:
    program = """
import os, signal, sys, time
import psutil
from fcmae.data.batches import load_batches
class Stuck:
    sample_bytes = 8
    def __getitem__(self, index):
        while index:
            time.sleep(1)
        return index
    collate = staticmethod(list)
batches = load_batches(Stuck(), [[0], [1], [1]], num_workers=2, pin_memory=False)
kept = [batches, next(batches)]
kept.append(kept)  # which is not freed before the end
print(*(process.pid for process in psutil.Process().children()), flush=True)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program + end], stdout=subprocess.PIPE, text=True)
        for end in ENDINGS
    ]
    for process, code in zip(processes, (3, -signal.SIGKILL), strict=True):
        assert process.stdout is not None
        pids = {int(pid) for pid in process.stdout.readline().split()}
        try:
            assert len(pids) == 2
            assert process.wait(250) == code
            for _ in range(2000):
                left = [other for other in psutil.process_iter(["status"]) if other.pid in pids]
                left = [other for other in left if other.info["status"] != psutil.STATUS_ZOMBIE]
                if not left:
                    break
                time.sleep(0.1)
            else:
                kill_all(left)
                pytest.fail(f"{code}: left behind: {left}")
        finally:
            process.kill()
            process.stdout.close()
