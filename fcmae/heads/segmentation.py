"""Heads over an encoder's pyramid that give logits for each pixel; knows no losses, masks or files.

A head takes the stages' maps (b, dims[i], h_i, w_i), finest first, and returns logits (b, num_classes, h_0, w_0).
It begins with a LayerNorm for each map, which the stages leave without one. Its own convolutions are followed by
GroupNorm, where the official UPerNet has batch norm over all processes: as many parameters, and no image's result
depends on others of its batch or on how many processes there are.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from fcmae.encoder.base import Network

HeadName = Literal["fpn", "upernet"]

GROUPS, CHANNELS_OF_GROUP = 32, 8
"""Of GroupNorm, at most (its paper's default), and at least: a single channel of a map pooled to one site has no
variance."""

POOLED_SIDES = (1, 2, 3, 6)
"""Sides of the maps that UPerNet pools the last one to (PSPNet's pyramid)."""

AUXILIARY_STAGE, AUXILIARY_DIM = 2, 256
"""Where UPerNet's recipe has a second head, an FCN, counted from 0; and its width."""

AUXILIARY = "auxiliary."
"""Before the names of the second head's tensors."""


def group_norm(dim: int) -> nn.GroupNorm:
    """Return GroupNorm of as many groups as `GROUPS` and `CHANNELS_OF_GROUP` allow and `dim` is divided by."""
    return nn.GroupNorm(math.gcd(dim, min(GROUPS, max(dim // CHANNELS_OF_GROUP, 1))), dim)


class ConvNorm(nn.Sequential):
    """Convolution of odd size, GroupNorm, ReLU."""

    def __init__(self, fan_in: int, fan_out: int, kernel_size: int = 1) -> None:
        conv = nn.Conv2d(fan_in, fan_out, kernel_size, padding=kernel_size // 2, bias=False)
        super().__init__(conv, group_norm(fan_out), nn.ReLU(inplace=True))


def resize_maps(x: Tensor, like: Tensor) -> Tensor:
    """Resize maps (b, c, h, w) bilinearly to the sides of others."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear")


def bin_weights(side: int, x: Tensor, axis: int) -> Tensor:
    """Return weights (side, n) of the n sites of an axis of x whose sums over them are means of `side` equal bins.

    Where n is no multiple of `side` neighbouring bins share sites, as in `F.adaptive_avg_pool2d`.
    """
    n = x.shape[axis]
    bins, sites = torch.arange(side, device=x.device)[:, None], torch.arange(n, device=x.device)
    inside = (sites >= bins * n // side) & (sites < ((bins + 1) * n + side - 1) // side)
    return inside.to(x.dtype) / inside.sum(1, keepdim=True)


def pool_maps(x: Tensor, side: int) -> Tensor:
    """Pool maps (b, c, h, w) to (b, c, side, side): `F.adaptive_avg_pool2d` that exports with maps of any size."""
    return bin_weights(side, x, 2) @ x @ bin_weights(side, x, 3).T


class NormedMaps(nn.Module):
    """LayerNorm over the channels of each map of a pyramid."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]


class Classifier(nn.Sequential):
    """Dropout and a 1x1 convolution to logits."""

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        super().__init__(nn.Dropout2d(dropout), nn.Conv2d(dim, num_classes, 1))


class FPNHead(nn.Module):
    """A light head: torchvision's feature pyramid network, its maps added at the finest resolution.

    Args:
        dims: channels of the encoder's maps.
        num_classes: of the logits.
        dim: channels of all maps of the head, 128 unless said otherwise.
        dropout: probability with which the classifier sees a channel as zero in training.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, *, dim: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        self.norms = NormedMaps(dims)
        self.fpn = FeaturePyramidNetwork(list(dims), dim, norm_layer=group_norm)
        self.fuse = ConvNorm(dim, dim, 3)
        self.classifier = Classifier(dim, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        named = OrderedDict((str(i), x) for i, x in enumerate(self.norms(maps)))
        finest, *others = self.fpn(named).values()
        for x in others:
            finest = finest + resize_maps(x, finest)
        return self.classifier(self.fuse(finest))


class UPerNetHead(nn.Module):
    """UPerNet (arXiv 1807.10221): pyramid pooling of the last map, then a feature pyramid, all maps fused.

    Args:
        dims: channels of the encoder's maps.
        num_classes: of the logits.
        dim: channels of all maps of the head, 512 as in the recipes of ConvNeXt and Swin.
        dropout: probability with which the classifier sees a channel as zero in training.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, *, dim: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.norms = NormedMaps(dims)
        self.pooled = nn.ModuleList(ConvNorm(dims[-1], dim) for _ in POOLED_SIDES)
        self.bottleneck = ConvNorm(dims[-1] + len(POOLED_SIDES) * dim, dim, 3)
        self.lateral = nn.ModuleList(ConvNorm(fan_in, dim) for fan_in in dims[:-1])
        self.smooth = nn.ModuleList(ConvNorm(dim, dim, 3) for _ in dims[:-1])
        self.fuse = ConvNorm(len(dims) * dim, dim, 3)
        self.classifier = Classifier(dim, num_classes, dropout)

    def pool(self, x: Tensor) -> Tensor:
        """Return the last map with what it holds on the whole, by quarters, and so on."""
        pooled = [
            resize_maps(conv(pool_maps(x, side)), x) for conv, side in zip(self.pooled, POOLED_SIDES, strict=True)
        ]
        return self.bottleneck(torch.cat([x, *pooled], 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *fine, last = self.norms(maps)
        merged = [self.pool(last)]
        for conv, x in zip(reversed(self.lateral), reversed(fine), strict=True):
            lateral = conv(x)
            merged.insert(0, lateral + resize_maps(merged[0], lateral))
        smoothed = [*(conv(x) for conv, x in zip(self.smooth, merged[:-1], strict=True)), merged[-1]]
        return self.classifier(self.fuse(torch.cat([resize_maps(x, smoothed[0]) for x in smoothed], 1)))


class FCNHead(nn.Module):
    """One convolution over one map: the second head of UPerNet's recipe, for the training alone."""

    def __init__(self, dims: Sequence[int], num_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = ConvNorm(dims[AUXILIARY_STAGE], AUXILIARY_DIM, 3)
        self.classifier = Classifier(AUXILIARY_DIM, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.conv(maps[AUXILIARY_STAGE]))


HEADS: dict[HeadName, type[FPNHead] | type[UPerNetHead]] = {"fpn": FPNHead, "upernet": UPerNetHead}


def init_head(module: nn.Module) -> None:
    """Draw a head's weights as its recipes do: He's before ReLU, small ones in the classifier."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Classifier):
        conv = module[1]
        assert isinstance(conv, nn.Conv2d)
        nn.init.normal_(conv.weight, std=0.01)


class HeadShape(NamedTuple):
    """What is given to make a head."""

    head: HeadName
    dim: int
    num_classes: int


def read_head(tensors: Mapping[str, Tensor]) -> HeadShape:
    """Tell which head of a `Segmenter` has these tensors, named `head.*`.

    Raises:
        ValueError: if those that show its sizes are missing, or no convolution's.
    """
    sizes: list[int] = []
    for name in ("head.fuse.0.weight", "head.classifier.1.weight"):
        if name not in tensors or tensors[name].ndim != 4:
            raise ValueError(f"no head that is known: {name} is missing, or no convolution's weight")
        sizes.append(tensors[name].shape[0])
    return HeadShape("upernet" if any(name.startswith("head.pooled.") for name in tensors) else "fpn", *sizes)


class Segmenter(Network):
    """An encoder and a head: images to logits for each of their pixels.

    Its state dict has the encoder's names behind `encoder.`, and those of `head.` and `auxiliary.`. What the
    pyramid does not come from, such as a norm after the pooling, gets no gradient.

    Args:
        encoder: gives the pyramid; it has no classifier.
        num_classes: of the logits.
        head: "fpn", light, or "upernet", the paper's.
        dim: channels of the head's maps; None for the head's own.
        auxiliary: whether there is a second head on the third stage in training.

    Raises:
        ValueError: if there is no such head, or the encoder has a classifier.
    """

    classifier = "head.classifier.1"

    def __init__(
        self,
        encoder: Network,
        num_classes: int,
        *,
        head: HeadName = "fpn",
        dim: int | None = None,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"no head {head!r}: choose from {', '.join(HEADS)}")
        if encoder.num_classes:
            raise ValueError("the encoder of a segmenter has no classifier: build it with num_classes=0")
        self.family, self.variant, self.in_chans = encoder.family, encoder.variant, encoder.in_chans
        self.patch_size, self.dims, self.num_classes = encoder.patch_size, encoder.dims, num_classes
        self.encoder = encoder
        for name, parameter in encoder.named_parameters():
            if name.startswith(encoder.above_pyramid):
                parameter.requires_grad_(False)
        self.head = HEADS[head](encoder.dims, num_classes, **({} if dim is None else {"dim": dim}))
        self.auxiliary = FCNHead(encoder.dims, num_classes) if auxiliary else None
        for module in (self.head, self.auxiliary):
            if module is not None:
                module.apply(init_head)

    @property
    def classifier_layer(self) -> nn.Module:
        return self.head.classifier[1]

    @property
    def head_names(self) -> tuple[str, ...]:
        return ("head.", AUXILIARY)

    @property
    def layer_depths(self) -> tuple[int, ...] | None:
        return self.encoder.layer_depths

    @property
    def arguments(self) -> dict[str, Any]:
        return self.encoder.arguments

    @property
    def gradient_checkpointing(self) -> bool:
        return self.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.encoder.gradient_checkpointing = value

    def freeze(self) -> None:
        """Train the heads alone: the encoder gets no gradient, and computes as in evaluation."""
        self.encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):  # frozen
            self.encoder.eval()
        return self

    def pyramid(self, images: Tensor) -> list[Tensor]:
        return self.encoder.pyramid(images)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits (b, num_classes, H, W) of images (b, in_chans, H, W); in training the second head's, too.

        Images of any size are padded below and on the right, to whole patches, with zeros: the mean once they are
        normalised.
        """
        height, width = images.shape[-2:]
        below, beside = -height % self.patch_size, -width % self.patch_size
        images = F.pad(images, (0, beside, 0, below))
        maps = self.pyramid(images)

        def at_full_resolution(logits: Tensor) -> Tensor:
            logits = resize_maps(logits, images)
            if torch.compiler.is_exporting():  # which cannot leave the strides of a view open
                return F.pad(logits, (0, -beside, 0, -below))
            return logits[..., :height, :width]

        logits = at_full_resolution(self.head(maps))
        if self.auxiliary is None or not self.training:
            return logits
        return logits, at_full_resolution(self.auxiliary(maps))
