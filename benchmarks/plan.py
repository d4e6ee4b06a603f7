"""Compare `fcmae plan` with runs: pretrainings of 1, 2 and 4 gloo processes, one thread each, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --json benchmarks/results/plan-cpu.json

Run from the root of the repository. Each round measures this machine as `fcmae plan --measure` does, in one
process, plans runs of 1, 2 and 4 processes from that, and trains so for some updates: the same update of 32
photographs, divided among them, each process loading its own. Two clocks are read: that on the wall, by which other
programs on the same cores slow everything down, and that of the processors, core-seconds, which knows only what
ours compute. Medians over rounds count.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from data import cpu_seconds_of_others
from train_step import device_name

from fcmae.arguments import pretrain
from fcmae.config import PretrainConfig, PretrainRecipe, load_config
from fcmae.load import resolve_recipe
from fcmae.plan import measure
from fcmae.plan.forecast import require_forecast
from fcmae.training import dry_run
from fcmae.training.trainer import Trainer

KEYS = (
    "model.variant=[[1,1,2,1],[16,32,64,128]]",
    "model.decoder_dim=128",
    "data.image_size=64",
    "data.num_workers=0",
    "data.batch_size=auto",
    "optim.images_per_update=32",
    "train.max_steps=20",
    "log.every_steps=1000",
    "log.with=[]",
    "visualize.num_images=0",
    "resume=never",
)
"""Of the quickstart: a smaller network on smaller images."""
PROCESSES = (1, 2, 4)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "core": time.process_time}
WARM_UP = 5
"""Updates that are not counted."""


def plan(send: Any) -> None:
    """Send the seconds of an update that a plan has for each number of processes, measured here in core-seconds."""
    for module in (measure, dry_run):
        module.time = SimpleNamespace(perf_counter=time.process_time)  # pyright: ignore[reportAttributeAccessIssue]
    time_gloo = measure.time_gloo
    measure.time_gloo = lambda sent: time_gloo(sent) / 2  # as that clock counts both of the threads that exchange
    recipe = load_config(PretrainRecipe, "quickstart", KEYS)
    config: PretrainConfig = resolve_recipe(recipe)[0]
    machines, work = measure.measured(config, recipe, 1, per_machine=1, network=1)
    forecasts = (
        require_forecast(config, recipe, work, machines, images=1000, processes=processes)
        for processes in PROCESSES
    )
    send.send({one.processes: one.update_s for one in forecasts})


def train(run: Path, rank: int, processes: int, port: int, send: Any) -> None:
    """Be one of the processes of a run, joined as torchrun joins them; send the median seconds of its updates."""
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        place |= {"MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    times: list[list[float]] = []
    update = Trainer.update

    def timed(self: Trainer, batches: Iterator[Any]) -> None:
        started = [clock() for clock in CLOCKS.values()]
        update(self, batches)
        times.append([clock() - start for clock, start in zip(CLOCKS.values(), started, strict=True)])

    Trainer.update = timed
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process is there
    pretrain(["--config", "quickstart", *KEYS, f"output={run}"])
    send.send([statistics.median(column) for column in zip(*times[WARM_UP:], strict=True)])


def together(context: Any, *programs: tuple[Callable[..., None], tuple[Any, ...]]) -> None:
    """Run functions in processes of their own.

    Raises:
        SystemExit: if one fails.
    """
    started = [context.Process(target=function, args=arguments) for function, arguments in programs]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        sys.exit("a process failed")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def run_round(context: Any, run: Path) -> Iterator[dict[str, float]]:
    """Yield planned and measured milliseconds of an update for each number of processes.

    Core-milliseconds are those of all processes together: on a machine where nothing else runs, as many as the
    milliseconds of an update times the cores that they keep busy.
    """
    receive, send = context.Pipe(duplex=False)
    together(context, (plan, (send,)))
    planned = receive.recv()
    for processes in PROCESSES:
        shutil.rmtree(run, ignore_errors=True)
        port, (receive, send) = free_port(), context.Pipe(duplex=False)
        together(context, *((train, (run, rank, processes, port, send)) for rank in range(processes)))
        wall, core = zip(*(receive.recv() for _ in range(processes)), strict=True)
        yield {
            "processes": processes,
            "planned_core_ms": 1e3 * planned[processes] * min(processes, os.cpu_count() or 1),
            "measured_core_ms": 1e3 * sum(core),
            "measured_wall_ms": 1e3 * max(wall),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs/plan"), metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "fcmae.pretrain"])
    rows: list[dict[str, float]] = []
    started, others = time.perf_counter(), cpu_seconds_of_others()
    for number in range(args.rounds):
        for row in run_round(context, args.runs):
            rows.append({"round": number, **row})
            print(rows[-1], flush=True)
    busy = (cpu_seconds_of_others() - others) / (time.perf_counter() - started)
    table: list[dict[str, Any]] = []
    for processes in PROCESSES:
        mine = [row for row in rows if row["processes"] == processes]
        ratios = [row["measured_core_ms"] / row["planned_core_ms"] for row in mine]
        line = {name: statistics.median(row[name] for row in mine) for name in mine[0] if name != "round"}
        table.append({**line, "ratio": statistics.median(ratios), "ratio_min_max": [min(ratios), max(ratios)]})
        print(table[-1])
    if args.json:
        found = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "device": f"cpu: {device_name('cpu')}, {os.cpu_count()} cores, one thread a process",
            "torch": torch.__version__,
            "update": "32 photographs, cropped to 64 px; median of 15 updates in each round",
            "machine": f"{busy:.2f} of {os.cpu_count()} cores busy, load average {os.getloadavg()[2]:.0f}",
            "rounds": args.rounds,
            "keys": KEYS,
            "table": table,
            "rows": rows,
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
