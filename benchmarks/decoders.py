"""Parameters of each decoder, and what a pretraining step takes with it.

    python benchmarks/decoders.py
    python benchmarks/decoders.py --variant base --batch 64 --precision bf16 --json decoders.json

All are of one width, in the depths that the paper compares them in (a Transformer of 8 blocks), and timed in rounds
that take each in turn, so that a busy machine disturbs them alike. "x convnext" is the median over rounds of the
time over that with the plain decoder of one ConvNeXt block.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import train_step

from fcmae import FCMAE, VARIANTS, sample_visible_ids
from fcmae.training.optim import build_adamw

POINTS = {
    # name: (decoder, depth)
    "convnext": ("convnext", 1),
    "convnext x 8": ("convnext", 8),
    "unet": ("unet", 1),
    "unet_no_skips": ("unet_no_skips", 1),
    "transformer x 8": ("transformer", 8),
}
REFERENCE = "convnext"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variant", default="atto", choices=VARIANTS)
    parser.add_argument("--dim", type=int, default=512, help="width of the decoders")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before the timed ones")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=1, help="steps of each decoder in a round")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there as well")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def build(name: str, args: argparse.Namespace) -> tuple[FCMAE, train_step.Way]:
    """Build a model with the decoder of this name, and its step."""
    decoder, depth = POINTS[name]
    model = FCMAE(
        args.variant,
        decoder=decoder,
        decoder_depth=depth,
        decoder_dim=args.dim,
        mask_ratio=train_step.MASK_RATIO,
    ).to(args.device)
    return model, train_step.Way(name, model, build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95)))


def main(argv: list[str] | None = None) -> None:
    """Count, measure, print, write."""
    args = parse_args(argv)
    train_step.compute_as_runs_do(args.threads)
    header = train_step.describe(args) | {"network": f"{args.variant}, decoders of width {args.dim}"}
    print("\n".join(f"{key}: {value}" for key, value in header.items()), flush=True)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    num_patches = (args.image_size // train_step.PATCH) ** 2
    ids = sample_visible_ids(args.batch, num_patches, train_step.MASK_RATIO, device=args.device)
    built = {name: build(name, args) for name in POINTS}
    train_step.alternate([(way, (images, ids)) for _, way in built.values()], args)
    plain = built[REFERENCE][1].seconds
    rows: list[dict[str, Any]] = []
    for name, (model, way) in built.items():
        seconds = way.seconds
        rows.append(
            {
                "decoder": name,
                "parameters": sum(parameter.numel() for parameter in model.decoder.parameters()),
                "ms": 1e3 * statistics.median(seconds),
                "ms_min": 1e3 * min(seconds),
                "ms_max": 1e3 * max(seconds),
                "ratio": statistics.median(s / p for s, p in zip(seconds, plain, strict=True)),
            }
        )
    print("\n| decoder | parameters | ms a step | min–max | x convnext |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['decoder']} | {row['parameters']:,} | {row['ms']:.0f} | "
            f"{row['ms_min']:.0f}–{row['ms_max']:.0f} | {row['ratio']:.2f} |"
        )
    if args.json:
        args.json.write_text(json.dumps({**header, "decoders": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
