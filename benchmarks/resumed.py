"""Is a run that was killed and resumed the uninterrupted one, to the bit? Of pretrain.py, on this machine.

    python benchmarks/resumed.py --variant base --batch 64 --precision bf16

Pretrains on docs/photos twice; the second run is killed after its first checkpoint and started again. Prints, and
exits with 1 for a difference, how many tensors of the last checkpoint differ, weights and moments, and the losses.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from continuing import read_lines

from fcmae.training.checkpoint import Checkpoint, read_checkpoint, step_folder
from fcmae.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="atto")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--every", type=int, default=8, help="updates between checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if not 0 < args.every < args.updates:
        parser.error("--every must be at least 1, and less than --updates")
    return args


def pretraining(run: Path, args: argparse.Namespace, keys: Mapping[str, object]) -> list[str]:
    """Return the command of a pretraining at the sizes of `args`, without pictures, and with more keys."""
    common = {
        "output": run,
        "model.variant": args.variant,
        "data.image_size": args.image_size,
        "data.batch_size": args.batch,
        "optim.images_per_update": args.batch,
        "optim.warmup_epochs": 0,
        "train.precision": args.precision,
        "train.max_steps": args.updates,
        "visualize.num_images": 0,
    }
    pairs = [f"{key}={value}" for key, value in (common | dict(keys)).items()]
    return [sys.executable, str(ROOT / "pretrain.py"), "--config", "pretrain/atto", *pairs]


def command(run: Path, args: argparse.Namespace) -> list[str]:
    """Return the command of the run, which also goes on with it."""
    data = {"data.name": "folder", "data.root": ROOT / "docs" / "photos", "data.num_workers": 2}
    often = {"checkpoint.every_steps": args.every, "log.every_steps": 1}
    return pretraining(run, args, {"resume": "auto", **data, **often})


def kill_after_a_checkpoint(run: Path, args: argparse.Namespace) -> None:
    """Start a run, and kill it once its first checkpoint is there.

    Raises:
        SystemExit: if it ends before.
    """
    process = subprocess.Popen(command(run, args))
    while process.poll() is None and not step_folder(RunFolder(run).checkpoints, args.every).exists():
        time.sleep(0.01)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        sys.exit(f"error: the run ended with {process.returncode} before it could be killed")


def differing(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Return the names of tensors that are not the same bits."""
    pairs = ((f"{kind} {name}", value, getattr(other, kind)[name]) for kind in ("model", "optimizer")
             for name, value in getattr(one, kind).items())  # fmt: skip
    return [name for name, value, others in pairs if not torch.equal(value.view(-1), others.view(-1))]


def losses(run: Path) -> dict[int, float]:
    """Return the recorded losses by step."""
    return {line["step"]: line["loss"] for line in read_lines(RunFolder(run).metrics) if "loss" in line}


def main(argv: list[str] | None = None) -> None:
    """Run, kill, resume, compare."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        subprocess.run(command(whole, args), check=True)
        kill_after_a_checkpoint(killed, args)
        subprocess.run(command(killed, args), check=True)
        ends = [read_checkpoint(step_folder(RunFolder(run).checkpoints, args.updates)) for run in (whole, killed)]
        different, (first, second) = differing(ends[0], ends[1]), (losses(run) for run in (whole, killed))
    found: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "tensors": len(ends[0].model) + len(ends[0].optimizer),
        "different": different,
        "losses_differ_at": [step for step, loss in first.items() if second.get(step) != loss],
        "last_loss": first[args.updates],
    }
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if different or found["losses_differ_at"] else 0)


if __name__ == "__main__":
    main()
