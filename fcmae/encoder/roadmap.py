"""The roadmap from ResNet-50 to ConvNeXt-T, a switch a step (arXiv 2201.03545, section 2); knows no masks.

Dense networks only: hidden patches are no business of theirs, and none of the layouts computes them.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fcmae.encoder.base import Network, require_images
from fcmae.encoder.convnext import LAYER_SCALE, DropPath, drop_path_rates, init_weights


@dataclass(frozen=True)
class Design:
    """The switches, as ResNet-50 has them; `ROADMAP` says what each step turns."""

    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Blocks of the four stages."""
    patchify: bool = False
    """The stem is a convolution of separate patches; else an overlapping one, norm, activation and max-pool."""
    depthwise: bool = False
    """A block's spatial convolution mixes no channels."""
    width: int = 64
    """Channels of the stem; a stage's bottleneck has as many, doubled from stage to stage."""
    inverted: bool = False
    """Blocks are `width` wide outside and four times that inside, not the other way around."""
    depthwise_first: bool = False
    """The spatial convolution comes before the two pointwise ones, not between them."""
    kernel: int = 3
    """Side of the spatial convolution."""
    act: Literal["relu", "gelu"] = "relu"
    one_act: bool = False
    """One activation a block, between its pointwise convolutions; else three, the last after the sum."""
    one_norm: bool = False
    """One norm a block, after its first convolution; else one after each."""
    norm: Literal["batch", "layer"] = "batch"
    separate_downsampling: bool = False
    """Norm and 2x2 convolution between stages, and norms after stem and pooling, without which training diverges;
    else strides in the first block of a stage and its shortcut."""
    layer_scale: bool = False
    """A learnt factor per channel on each branch."""

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels that leave the four stages."""
        return tuple((1 if self.inverted else 4) * self.width * 2**stage for stage in range(4))

    def make_act(self) -> nn.Module:
        return {"relu": nn.ReLU, "gelu": nn.GELU}[self.act]()

    def make_norm(self, dim: int) -> nn.Module:
        return {"batch": nn.BatchNorm2d, "layer": ChannelNorm}[self.norm](dim)

    def make_conv(
        self, dim: int, out_dim: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, normed: bool
    ) -> nn.Conv2d:
        """Return a convolution that keeps the size up to its stride, with a bias unless BatchNorm brings one."""
        bias = not (normed and self.norm == "batch")
        return nn.Conv2d(dim, out_dim, kernel, stride, (kernel - 1) // 2, groups=groups, bias=bias)


def _steps() -> Iterator[tuple[str, Design]]:
    design = Design()
    yield "resnet50", design
    yield "training-recipe", design  # in configs/roadmap/, not in the network
    yield "stage-ratio", (design := replace(design, depths=(3, 3, 9, 3)))
    yield "patchify-stem", (design := replace(design, patchify=True))
    yield "depthwise", (design := replace(design, depthwise=True))
    yield "width-96", (design := replace(design, width=96))
    yield "inverted-bottleneck", (design := replace(design, inverted=True))
    yield "depthwise-up", (design := replace(design, depthwise_first=True))
    yield "kernel-5", replace(design, kernel=5)
    yield "kernel-7", (design := replace(design, kernel=7))
    yield "kernel-9", replace(design, kernel=9)
    yield "kernel-11", replace(design, kernel=11)
    yield "gelu", (design := replace(design, act="gelu"))
    yield "one-activation", (design := replace(design, one_act=True))
    yield "one-norm", (design := replace(design, one_norm=True))
    yield "layernorm", (design := replace(design, norm="layer"))
    yield "separate-downsampling", (design := replace(design, separate_downsampling=True))
    yield (
        "convnext-tiny",
        replace(design, layer_scale=True),
    )  # part of the final recipe (table 5), no step of its own


ROADMAP: dict[str, Design] = dict(_steps())
"""The steps by name, each the one before with one switch turned; kernels are alternatives, of which 7 is kept."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each site of a map (b, c, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual block of ResNet, ConvNeXt or between: a spatial and two pointwise convolutions (figures 3 and 4).

    Args:
        dim: channels of the map that comes in.
        out_dim: of the one that leaves.
        stride: 1, or 2 to halve the map.
        drop_path: probability with which the branch of an image is dropped in training (stochastic depth).
    """

    def __init__(self, design: Design, dim: int, out_dim: int, *, stride: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = 4 * out_dim if design.inverted else out_dim // 4
        normed = (True, not design.one_norm, not design.one_norm)
        active = (not design.one_act, True, False)  # after the sum in place of after the third
        if design.depthwise_first:
            shapes = [(dim, dim, design.kernel, stride), (dim, hidden, 1, 1), (hidden, out_dim, 1, 1)]
        else:
            shapes = [(dim, hidden, 1, 1), (hidden, hidden, design.kernel, stride), (hidden, out_dim, 1, 1)]
        branch: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (ins, outs, kernel, step) in enumerate(shapes):
            groups = ins if design.depthwise and kernel > 1 else 1
            branch[f"conv{i + 1}"] = design.make_conv(ins, outs, kernel, step, groups=groups, normed=normed[i])
            if normed[i]:
                branch[f"norm{i + 1}"] = design.make_norm(outs)
            if active[i]:
                branch[f"act{i + 1}"] = design.make_act()
        self.branch = nn.Sequential(branch)
        self.gamma = nn.Parameter(torch.full((out_dim,), LAYER_SCALE)) if design.layer_scale else None
        self.drop_path = DropPath(drop_path)
        self.shortcut = nn.Identity()
        if stride > 1 or dim != out_dim:
            conv = design.make_conv(dim, out_dim, 1, stride, normed=True)
            self.shortcut = nn.Sequential(conv, design.make_norm(out_dim))
        self.act = nn.Identity() if design.one_act else design.make_act()

    def forward(self, x: Tensor) -> Tensor:
        h = self.branch(x)
        if self.gamma is not None:
            h = h * self.gamma.to(h.dtype)[:, None, None]
        return self.act(self.shortcut(x) + self.drop_path(h))


def make_stem(design: Design, in_chans: int, stride: int) -> nn.Sequential:
    """Return the layers before the first block, which divide the sides by `stride`: 4, or less for small images."""
    width = design.width
    if design.patchify:
        stem = nn.Sequential(nn.Conv2d(in_chans, width, kernel_size=stride, stride=stride))
        return stem.append(design.make_norm(width)) if design.separate_downsampling else stem
    conv = design.make_conv(in_chans, width, 7, min(stride, 2), normed=True)
    stem = nn.Sequential(conv, design.make_norm(width), design.make_act())
    return stem.append(nn.MaxPool2d(3, stride=2, padding=1)) if stride == 4 else stem


class Roadmap(Network):
    """ResNet-50, ConvNeXt-T or a network between them, for classification.

    Convolutions and linears are initialised alike in all steps, as ConvNeXt's are, so that a step changes no more
    than its switch says.

    Args:
        step: a name of `ROADMAP`.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 gives pooled features instead.
        stem_stride: 4 (the paper's), or for small images 2 or 1: a ResNet stem without its max-pool, and without
            stride; a patchify stem with smaller patches.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: if there is no such step or stem.
    """

    family = "roadmap"

    def __init__(
        self,
        step: str,
        *,
        in_chans: int = 3,
        num_classes: int = 0,
        stem_stride: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if step not in ROADMAP:
            raise ValueError(f"unknown step {step!r} of the roadmap: choose from {', '.join(ROADMAP)}")
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 4, 2 or 1, got {stem_stride}")
        design = ROADMAP[step]
        self.variant = f"{self.family}/{step}"
        self.depths, self.dims = design.depths, design.dims
        self.in_chans, self.num_classes, self.stem_stride = in_chans, num_classes, stem_stride
        self.patch_size = 8 * stem_stride
        self.has_batch_norm = design.norm == "batch"

        stem = make_stem(design, in_chans, stem_stride)
        self.downsample_layers = nn.ModuleList([stem, nn.Identity(), nn.Identity(), nn.Identity()])
        self.stages = nn.ModuleList()
        rates = drop_path_rates(drop_path, sum(design.depths))
        dim = design.width
        for stage, (depth, out_dim) in enumerate(zip(design.depths, self.dims, strict=True)):
            stride = 2 if stage else 1
            if design.separate_downsampling and stage:
                halve = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2)
                self.downsample_layers[stage] = nn.Sequential(design.make_norm(dim), halve)
                dim, stride = out_dim, 1
            blocks = nn.ModuleList()
            for _ in range(depth):
                blocks.append(Block(design, dim, out_dim, stride=stride, drop_path=next(rates)))
                dim, stride = out_dim, 1
            self.stages.append(blocks)
        self.norm = design.make_norm(dim) if design.separate_downsampling else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    @property
    def classifier_layer(self) -> nn.Module:
        return self.head

    @property
    def above_pyramid(self) -> tuple[str, ...]:
        return ("norm.", "head.")

    @property
    def layer_depths(self) -> tuple[int, ...]:
        return self.depths

    @property
    def why_not_twice(self) -> str:
        if not self.has_batch_norm:
            return ""
        return f"runs each block twice, and BatchNorm in {self.variant} would count each batch twice"

    @property
    def arguments(self) -> dict[str, Any]:
        return super().arguments | {"stem_stride": self.stem_stride}

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the four stages' maps (b, dims[i], h_i, w_i), finest first.

        Raises:
            ValueError: if images are not (b, in_chans, height, width).
        """
        require_images(images, self.in_chans)
        maps: list[Tensor] = []
        x = images
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            assert isinstance(stage, nn.ModuleList)
            x = downsample(x)
            for block in stage:
                x = self.run_block(block, x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, num_classes), or pooled features (b, dims[-1]) when `num_classes` is 0.

        Raises:
            ValueError: as `pyramid`.
        """
        pooled = self.pyramid(images)[-1].mean((2, 3), keepdim=True)
        return self.head(self.norm(pooled).flatten(1))
