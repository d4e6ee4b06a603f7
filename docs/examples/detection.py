"""Detection with a pretrained encoder: torchvision's Faster R-CNN and Mask R-CNN over `encoder.pyramid`.

    python docs/examples/detection.py RUN/encoder

RUN/encoder is what a pretraining leaves, or anything else that `fcmae.load_encoder` takes; without it a small
network begins from scratch. Both detectors learn for some minutes to find drawn disks, squares and triangles. For
images of your own `PyramidBackbone` is all you need from here; boxes and masks are as torchvision wants them.

On COCO the paper (arXiv 2301.00808) takes Mask R-CNN. Its appendix leaves the layer-wise decay of the learning rate
to a search over 0.9 and 0.95, and stochastic depth over 0.2, 0.3, 0.4 and 0.5. mmdetection's repetition
(projects/ConvNeXt-V2: Base, 52.9 box AP, 46.4 mask AP) has: AdamW of 1e-4, betas 0.9 and 0.999, weight decay 0.05,
layer-wise decay 0.95 over 12 layers, stochastic depth 0.4; 36 epochs of 32 images, the rate warmed up for 1,000
steps and divided by 10 after epochs 27 and 33; images resized by a factor of 0.1 to 2, cropped to 1024 x 1024 and
flipped (large-scale jittering); soft NMS at the end. `fcmae.training.optim.layer_scales` with decay_type="group"
gives the factors of that decay.
"""

import argparse
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2.functional import pil_to_tensor

import fcmae
from fcmae.encoder.base import Network
from fcmae.heads.segmentation import NormedMaps

DETECTORS = {"Faster R-CNN": FasterRCNN, "Mask R-CNN": MaskRCNN}
BOXES = 32
"""Of an image that count in a step, of four times as many that are looked at: few, as there are few shapes; COCO's
detectors take 256 and 512, of 2,000."""

SHAPES = ("background", "disk", "square", "triangle")


class PyramidBackbone(nn.Module):
    """An encoder's four maps, and a pooled fifth, as torchvision's detectors take them, `dim` channels each."""

    def __init__(self, encoder: Network, dim: int = 256) -> None:
        super().__init__()
        self.encoder = encoder
        self.norms = NormedMaps(encoder.dims)  # stages leave their maps without one
        self.fpn = FeaturePyramidNetwork(list(encoder.dims), dim, LastLevelMaxPool())
        self.out_channels = dim

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.norms(self.encoder.pyramid(images))
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


def build_detector(name: str, encoder: Network, *, side: int, dim: int = 256) -> FasterRCNN:
    """Return a detector of `SHAPES` in images of about `side` pixels."""
    sizes = tuple((side / 16 * 2**i,) for i in range(5))  # of a box, on each map
    return DETECTORS[name](
        PyramidBackbone(encoder, dim),
        num_classes=len(SHAPES),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_batch_size_per_image=BOXES,
        box_batch_size_per_image=BOXES,
        rpn_post_nms_top_n_train=4 * BOXES,
        rpn_post_nms_top_n_test=4 * BOXES,
        min_size=side,
        max_size=side,
        size_divisible=encoder.patch_size,
    )


def draw_shapes(number: int, side: int, generator: torch.Generator) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Draw images of one to three shapes: float32 (3, side, side) in [0, 1], with boxes, labels and masks."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    images, targets = [], []
    for _ in range(number):
        image = Image.new("RGB", (side, side), (draw(0, 90), draw(0, 90), draw(0, 90)))
        pen, masks, labels = ImageDraw.Draw(image), [], []
        for _ in range(draw(1, 4)):
            label, size = draw(1, len(SHAPES)), draw(side // 5, side // 2)
            x, y = draw(0, side - size), draw(0, side - size)
            mask = Image.new("L", image.size)
            colour = (draw(120, 256), draw(120, 256), draw(120, 256))
            for canvas, fill in ((pen, colour), (ImageDraw.Draw(mask), 1)):
                if SHAPES[label] == "triangle":
                    canvas.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=fill)
                else:
                    shape = canvas.ellipse if SHAPES[label] == "disk" else canvas.rectangle
                    shape((x, y, x + size, y + size), fill=fill)
            covered = pil_to_tensor(mask)[0].bool()
            masks = [earlier & ~covered for earlier in masks] + [covered]
            labels.append(label)
        kept = [i for i, mask in enumerate(masks) if mask.sum() > 16]  # the others are hidden
        found = [masks[i].nonzero() for i in kept]
        boxes = [[*places.amin(0).flip(0).tolist(), *(places.amax(0).flip(0) + 1).tolist()] for places in found]
        images.append(pil_to_tensor(image) / 255)
        targets.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "labels": torch.tensor([labels[i] for i in kept]),
                "masks": torch.stack([masks[i] for i in kept]).to(torch.uint8),
            }
        )
    return images, targets


def train(detector: FasterRCNN, *, steps: int, batch_size: int, side: int, rate: float = 1e-3) -> list[float]:
    """Train on drawn shapes, others in each step; returns the sum of the detector's losses in each."""
    device = next(detector.parameters()).device
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / (steps / 10 + 1)))
    detector.train()
    losses: list[float] = []
    for step in range(steps):
        images, targets = draw_shapes(batch_size, side, generator)
        found: dict[str, Tensor] = detector(
            [image.to(device) for image in images],
            [{name: x.to(device) for name, x in target.items()} for target in targets],
        )
        loss = torch.stack(list(found.values())).sum()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"error: the loss is {losses[-1]} in step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            shares = ", ".join(f"{name.removeprefix('loss_')} {x.item():.3f}" for name, x in found.items())
            print(f"  step {step:4}  loss {losses[-1]:.3f}  ({shares})", flush=True)
    return losses


@torch.no_grad()
def share_found(detector: FasterRCNN, *, number: int, side: int) -> float:
    """Return the share of the shapes in new images for which there is a box of their class, IoU 0.5 or more."""
    device = next(detector.parameters()).device
    images, targets = draw_shapes(number, side, torch.Generator().manual_seed(1))
    detector.eval()
    hits = total = 0
    for image, target in zip(images, targets, strict=True):
        (found,) = detector([image.to(device)])
        overlaps = box_iou(target["boxes"], found["boxes"].cpu())
        right = (
            (overlaps >= 0.5)
            & (target["labels"][:, None] == found["labels"].cpu())
            & (found["scores"].cpu() >= 0.5)
        )
        hits, total = hits + int(right.any(1).sum()), total + len(right)
    return hits / total


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description="Train torchvision's detectors on drawn shapes.")
    parser.add_argument("encoder", nargs="?", help="a run, an exported folder or a file; none begins from scratch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--side", type=int, default=128, help="pixels of the images' sides")
    parser.add_argument(
        "--dim", type=int, default=64, help="channels of the feature pyramid; COCO's detectors have 256"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    losses: dict[str, list[float]] = {}
    for name in DETECTORS:
        torch.manual_seed(0)
        encoder = fcmae.load_encoder(args.encoder, num_classes=0) if args.encoder else fcmae.ConvNeXt("atto")
        print(f"{name} over {', '.join(map(str, encoder.dims))} channels")
        detector = build_detector(name, encoder, side=args.side, dim=args.dim).to(args.device)
        losses[name] = train(detector, steps=args.steps, batch_size=args.batch_size, side=args.side)
        print(f"  {share_found(detector, number=20, side=args.side):.0%} of the shapes in 20 new images are found")
    return losses


if __name__ == "__main__":
    main()
