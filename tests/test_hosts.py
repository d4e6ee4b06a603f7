"""Runs of several processes, on one host and on two: the same losses, resumed by any number, hosts that die.

Two hosts are two network namespaces with a cable between them, which needs root on Linux.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import records
from processes import Processes
from small_runs import stop_after
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

from fcmae import arguments
from fcmae.data import save_arrays
from fcmae.training import heartbeat
from fcmae.training.trainer import Trainer

UPDATES = 6
IMAGES_PER_UPDATE = 8

STORIES = {
    "pretrain": "model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, decoder_dim: 16}\n"
    "visualize: {num_images: 0}\n",
    "finetune": "model: {variant: [[1, 1, 1, 1], [8, 8, 16, 16]], stem_stride: 1, num_classes: 4}\n"
    "eval: {every_epochs: 2}\n",
}
"""Configurations without what each process draws for itself: drop path, mixup and cutmix."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, number in (("train", 24), ("val", 9)):
        images = np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        save_arrays(root / split, images, np.arange(number) % 4)
    return root


def settings(story: str, data: Path, folder: Path) -> list[str]:
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(
        f"output: {folder}\n{STORIES[story]}"
        f"data: {{name: arrays, root: {data}, image_size: 32, batch_size: 2, num_workers: 0}}\n"
        f"optim: {{base_lr: 0.3, warmup_epochs: 0, images_per_update: {IMAGES_PER_UPDATE}, accumulate: auto}}\n"
        f"train: {{max_steps: {UPDATES}}}\nlog: {{every_steps: 1}}\ncheckpoint: {{every_steps: 3}}\n"
    )
    return ["--config", str(config)]


def in_float64(story: str) -> None:
    """Run a story in numbers of which sums in another order differ by far less than by what would be a mistake."""
    torch.set_default_dtype(torch.float64)
    arguments.run(story)


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(folder) if "loss" in record}


def train(story: str, words: list[str], place: Path, *, number: int) -> str:
    """Run a story to its end in so many processes; returns what they said."""
    place.mkdir(exist_ok=True)
    processes = Processes(partial(in_float64, story), [f"{story}.py", *words], place, number=number)
    try:
        assert processes.wait() == [0] * number, processes.written("errors")
    finally:
        processes.kill()
    return processes.written("output")


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of a story in one process, undisturbed."""

    @cache
    def run(story: str) -> Path:
        folder = tmp_path_factory.mktemp(story) / "1"
        train(story, settings(story, data, folder), folder.parent / "says", number=1)
        return folder

    return run


@pytest.mark.parametrize("story", STORIES)
def test_the_losses_are_the_same_in_1_2_and_4_processes_and_after_resuming_in_another_number(
    story: str, data: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = losses(alone(story))
    assert list(expected) == [*range(1, UPDATES + 1)]
    for number in (2, 4):
        folder = tmp_path / str(number)
        train(story, settings(story, data, folder), tmp_path / f"{number} say", number=number)
        assert losses(folder) == pytest.approx(expected, rel=1e-9)
    for source, number in ((tmp_path / "4", 1), (alone(story), 4)):
        folder = stop_after(source, 3, tmp_path / f"{source.name} to {number}")
        words = [*settings(story, data, folder), "resume=auto"]
        said = train(story, words, tmp_path / f"{folder.name} say", number=number)
        assert "not the same run any more: optim.accumulate: " in said
        assert losses(folder) == pytest.approx(expected, rel=1e-9)


# Processes that are lost


@pytest.mark.parametrize("well", [True, False], ids=["well", "in an error"])
def test_a_process_that_has_ended_is_missed_unless_it_ended_well(
    well: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    missed: list[str] = []
    with heartbeat.heartbeat(0, 2, lost=lambda error: missed.append(str(error))):
        with suppress(ZeroDivisionError), heartbeat.heartbeat(1, 2, lost=lambda _: None):
            for _ in range(2):  # once both are known to beat
                store.wait(["fcmae/heartbeat/1"])
                said = store.get("fcmae/heartbeat/1")
                while store.get("fcmae/heartbeat/1") == said:
                    time.sleep(0.01)
            assert well or 1 / 0
        if well:
            assert store.get("fcmae/heartbeat/1") == b"ended"
        deadline = time.monotonic() + (3 if well else 100)
        while not missed and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [line.partition(" (")[0] for line in missed] == ([] if well else ["process 1"])


def fall_silent() -> None:
    """Run as one of two processes, of which the second one is halted in the middle, all its threads."""
    heartbeat.BEAT_S, heartbeat.SILENT_BEATS = 0.5, 8
    if os.environ["RANK"] == "1":
        disturb(4, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    in_float64("pretrain")


def test_a_process_that_is_not_heard_of_ends_the_others_in_one_line(data: Path, tmp_path: Path) -> None:
    words = settings("pretrain", data, tmp_path / "run")
    processes = Processes(fall_silent, ["pretrain.py", *words], tmp_path, number=2)
    try:
        processes.processes[0].join(250)
        assert processes.processes[0].exitcode == 2
    finally:
        processes.kill()
    (line,) = (line for line in processes.written("errors").splitlines() if line.startswith("error"))
    assert line.startswith(f"error: process 1 ({socket.gethostname()}, beat ")
    assert line.endswith("then start the same command again with resume=auto")


# Two hosts


class Host(NamedTuple):
    """A network namespace, with a host name of its own."""

    name: str
    address: str

    def enter(self) -> None:
        """Move this process there."""
        libc, new_network, new_name = ctypes.CDLL(None, use_errno=True), 0x40000000, 0x04000000
        with open(f"/run/netns/{self.name}") as file:
            assert libc.setns(file.fileno(), new_network) == 0, os.strerror(ctypes.get_errno())
        assert libc.unshare(new_name) == 0, os.strerror(ctypes.get_errno())
        socket.sethostname(self.address)  # a name that resolves without a file of names
        os.environ["GLOO_SOCKET_IFNAME"] = "cable"

    def start(self, program: Callable[[], None], argv: list[str], place: Path) -> Processes:
        place.mkdir(exist_ok=True)
        return Processes(partial(self.run, program), argv, place)

    def run(self, program: Callable[[], None]) -> None:
        self.enter()
        program()


def ip(words: str) -> None:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"two hosts are network namespaces: ip {words}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if not Path("/proc/self/ns/net").exists() or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts are network namespaces, which need Linux, root and the command ip")
    found = [Host(f"fcmae-{os.getpid()}-{i}", f"10.99.0.{i}") for i in (1, 2)]
    try:
        for host in found:
            ip(f"netns add {host.name}")
        ip(f"link add cable netns {found[0].name} type veth peer name cable netns {found[1].name}")
        for host in found:
            ip(f"-n {host.name} address add {host.address}/24 dev cable")
            ip(f"-n {host.name} link set cable up")
            ip(f"-n {host.name} link set lo up")
        yield found
    finally:
        for host in found:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def disturb(step: int, disturbance: Callable[[], None]) -> None:
    """Let something happen before the update that follows a step."""
    update = Trainer.update

    def disturbed(self: Trainer, batches: Any) -> None:
        if self.step == step:
            disturbance()
        update(self, batches)

    Trainer.update = disturbed


def die() -> None:
    """End all processes of this host at once, the launcher included."""
    os.killpg(0, signal.SIGKILL)


def launch_here(how: list[str], story: str, dies_at: int | None) -> None:
    """Do what torchrun does, but that what it starts is forked, and dies with its host at a step."""
    if dies_at is not None:
        disturb(dies_at, die)

    def work() -> None:
        try:
            in_float64(story)
        except SystemExit as end:
            if end.code:
                raise

    config, *_ = torchrun.config_from_args(torchrun.parse_args([*how, f"{story}.py"]))
    config.start_method = "fork"
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as docs/many-gpus.md says
    elastic_launch(config, work)()


def test_a_host_that_dies_and_comes_back_is_taken_up_again_and_the_run_ends_as_if_nothing_had_happened(
    hosts: list[Host], data: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    argv = ["pretrain.py", *settings("pretrain", data, folder), "resume=auto"]

    def start(host: Host, place: str, dies_at: int | None = None) -> Processes:
        how = ["--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_id", "run"]
        how += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{hosts[0].address}:29400"]
        how += ["--local_addr", host.address, "--rdzv_conf", "keep_alive_interval=1,keep_alive_max_attempt=5"]
        return host.start(partial(launch_here, how, "pretrain", dies_at), argv, tmp_path / place)

    running = []
    try:
        running += [start(hosts[0], "first"), start(hosts[1], "second", dies_at=4)]
        assert running[1].wait() == [-signal.SIGKILL], running[1].written("errors")
        running.append(start(hosts[1], "second again"))
        ended = [running[i].wait() for i in (0, 2)]
    finally:
        for processes in running:
            processes.kill()
    first, _, again = (processes.written("errors") for processes in running)
    assert ended == [[0], [0]], first + again
    assert first.count("error: ") == first.count("start the same command again with resume=auto") == 1
    assert losses(folder) == pytest.approx(losses(alone("pretrain")), rel=1e-9)


def take_part(rank: int, main: str) -> None:
    """Be one of two processes, each on a host, whose cable the second one pulls out."""
    heartbeat.BEAT_S, heartbeat.SILENT_BEATS = 1.0, 8
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": main, "MASTER_PORT": "29400"}
    if rank == 1:
        disturb(4, lambda: ip("link set cable down"))
    in_float64("pretrain")


def test_processes_whose_cable_is_pulled_out_end_in_one_line_each_and_the_run_goes_on_from_there(
    hosts: list[Host], data: Path, alone: Callable[[str], Path], tmp_path: Path
) -> None:
    argv = ["pretrain.py", *settings("pretrain", data, tmp_path / "two"), "resume=auto"]
    running = []
    try:
        for rank, host in enumerate(hosts):
            running.append(host.start(partial(take_part, rank, hosts[0].address), argv, tmp_path / f"rank {rank}"))
        assert [processes.wait() for processes in running] == [[2], [2]]
        lines = [[line for line in p.written("errors").splitlines() if "error" in line] for p in running]
        goes_on = "see to that machine, then start the same command again with resume=auto"
        assert [len(found) for found in lines] == [1, 1], lines
        assert lines[0][0].startswith(f"error: process 1 ({hosts[1].address}, beat ")
        assert lines[1][0].startswith(
            f"error in process 1: {hosts[0].address}, at which all processes meet, has not "
        )
        assert all(line.endswith(goes_on) for (line,) in lines)
        running.append(hosts[0].start(partial(in_float64, "pretrain"), argv, tmp_path / "again"))
        assert running[-1].wait() == [0], running[-1].written("errors")
    finally:
        for processes in running:
            processes.kill()
    assert losses(tmp_path / "two") == pytest.approx(losses(alone("pretrain")), rel=1e-9)
