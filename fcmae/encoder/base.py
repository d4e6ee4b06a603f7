"""What the rest asks of a network: outputs, a pyramid, and, of those FCMAE pretrains, maps of visible patches."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Layout = Literal["auto", "dense", "masked", "packed", "minkowski"]
Version = Literal[1, 2]
Variant = str | tuple[tuple[int, ...], tuple[int, ...]]


class Network(nn.Module, ABC):
    """A network for images, which is a classifier or a segmenter, or without classes gives pooled features."""

    family: str = "convnext"
    """What a variant begins with, as in timm/resnet50; ConvNeXt's are names without one."""
    variant: Variant
    """As `networks.build_network` takes it."""
    in_chans: int
    num_classes: int
    patch_size: int
    """Total stride in pixels."""
    dims: tuple[int, ...]
    """Channels of the stages, finest first."""
    _gradient_checkpointing = False
    classifier: str = "head"
    """What tensors of the classifier's last layer are called in the state dict, before ".weight" and ".bias"."""

    @property
    @abstractmethod
    def classifier_layer(self) -> nn.Module:
        """The last layer, to logits where there are classes: an `nn.Linear` from pooled features, or a segmenter's
        1x1 convolution."""

    @property
    def head_names(self) -> tuple[str, ...]:
        """What the names of tensors begin with that such a network without classes may lack."""
        return (f"{self.classifier}.",)

    @property
    def above_pyramid(self) -> tuple[str, ...]:
        """What the names of parameters begin with that the pyramid does not come from."""
        return self.head_names

    @property
    def layer_depths(self) -> tuple[int, ...] | None:
        """Blocks of each stage where they are called `stages.i.j` and what is before it `downsample_layers.i`, else
        None: layers are counted by these names."""
        return None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `networks.build_network` that make such a network, but for classes and drop path."""
        return {"variant": self.variant, "in_chans": self.in_chans}

    @property
    def why_not_twice(self) -> str:
        """Why the blocks cannot be run twice, as gradient checkpointing does; empty where they can."""
        return ""

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each block is computed again in the backward pass, which takes less memory and more time."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        if value and self.why_not_twice:
            raise ValueError(self.why_not_twice)
        self._gradient_checkpointing = value

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Call a block, in training with gradient checkpointing if that is asked for."""
        if self.gradient_checkpointing and self.training:
            out = checkpoint(block, *inputs, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out
        return block(*inputs)

    def freeze(self) -> None:
        """Train the classifier alone: the rest gets no gradient, and computes as in evaluation."""
        self.requires_grad_(False)
        self.classifier_layer.requires_grad_()
        self.eval()  # without drop path

    @abstractmethod
    def forward(self, images: Tensor) -> Any:
        """Return logits (b, num_classes), or pooled features (b, c) when `num_classes` is 0.

        A segmenter's are of each pixel, (b, num_classes, H, W), and in training may come with those of a second
        head.
        """

    @abstractmethod
    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the stages' maps (b, dims[i], h_i, w_i), finest first, for detection and segmentation.

        They are as the stages leave them, without a norm, like those of timm's `features_only`. The sides of the
        last are those of the image by `patch_size`, and each map before has twice those of the next.

        Raises:
            ValueError: if the images' shape does not fit.
        """


class MaskedNetwork(Network):
    """A network that can be computed on visible patches alone, and so be pretrained."""

    block: Callable[..., nn.Module]
    """Builds a block for a decoder from a number of channels; see `fcmae.decoder`."""

    @abstractmethod
    def require_layout(self, layout: Layout) -> None:
        """Check that `layout` can be computed.

        Raises:
            ValueError: if it is unknown or not for this network, or needs a package that is missing.
        """

    @abstractmethod
    def feature_maps(
        self, images: Tensor, visible_ids: Tensor | None = None, layout: Layout = "auto"
    ) -> list[Tensor]:
        """Return the stages' maps (b, h_i, w_i, dims[i]), finest first, with exact zeros where hidden.

        Arguments and errors are those of `features`.
        """

    def pyramid(self, images: Tensor) -> list[Tensor]:
        return [x.permute(0, 3, 1, 2) for x in self.feature_maps(images)]

    @abstractmethod
    def features(self, images: Tensor, visible_ids: Tensor | None = None, layout: Layout = "auto") -> Tensor:
        """Return the last map (b, h, w, c), one site per patch, with exact zeros where hidden.

        Args:
            images: (b, in_chans, H, W); hidden pixels are never read. With `visible_ids` the sides are multiples of
                the patch size.
            visible_ids: int64 (b, p), without repeats, or None for all visible.
            layout: how to compute it; all layouts of a network give the same numbers.

        Raises:
            ValueError: if shapes do not fit, or the network has no such layout.
        """


def require_images(images: Tensor, in_chans: int) -> None:
    """Check that images are (b, in_chans, height, width).

    Raises:
        ValueError: if not.
    """
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise ValueError(
            f"images must be (b, {in_chans}, height, width), got {tuple(images.shape)}: in_chans and the data must "
            "agree"
        )


def require_ids(visible_ids: Tensor, b: int, grid: tuple[int, int]) -> None:
    """Check that ids of visible patches are int64 (b, p), from one patch to all of a grid.

    Raises:
        ValueError: if not.
    """
    if visible_ids.dtype != torch.int64 or visible_ids.ndim != 2 or len(visible_ids) != b:
        raise ValueError(
            f"visible_ids must be int64 (b, p) with b = {b}, got {visible_ids.dtype} {tuple(visible_ids.shape)}"
        )
    if not 1 <= visible_ids.shape[1] <= grid[0] * grid[1]:
        raise ValueError(f"{visible_ids.shape[1]} visible patches do not fit a grid of {grid[0]} x {grid[1]}")
