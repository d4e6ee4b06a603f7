"""The ends of the roadmap in timm's names, `resnet50` and `convnext_tiny`; knows no files and no other network."""

from collections.abc import Mapping

from torch import Tensor

from fcmae.weights.base import Names, convert

RESNET50: Names = {
    # timm                    ours, of encoder/roadmap.py
    "conv1.weight": "downsample_layers.0.0.weight",
    "bn1.{part}": "downsample_layers.0.1.{part}",
    **{
        f"layer{stage + 1}.{{block}}.{theirs}.{{part}}": f"stages.{stage}.{{block}}.{ours}.{{part}}"
        for stage in range(4)
        for theirs, ours in (
            *((f"conv{n}", f"branch.conv{n}") for n in (1, 2, 3)),
            *((f"bn{n}", f"branch.norm{n}") for n in (1, 2, 3)),
            *((f"downsample.{n}", f"shortcut.{n}") for n in (0, 1)),
        )
    },
    "fc.{p}": "head.{p}",
}

CONVNEXT: Names = {
    "stem.{layer}.{p}": "downsample_layers.0.{layer}.{p}",
    "stages.{later}.downsample.{layer}.{p}": "downsample_layers.{later}.{layer}.{p}",
    "stages.{stage}.blocks.{block}.conv_dw.{p}": "stages.{stage}.{block}.branch.conv1.{p}",
    "stages.{stage}.blocks.{block}.norm.{p}": "stages.{stage}.{block}.branch.norm1.{p}",
    "stages.{stage}.blocks.{block}.mlp.fc1.{p}": "stages.{stage}.{block}.branch.conv2.{p}",
    "stages.{stage}.blocks.{block}.mlp.fc2.{p}": "stages.{stage}.{block}.branch.conv3.{p}",
    "stages.{stage}.blocks.{block}.gamma": "stages.{stage}.{block}.gamma",
    "head.norm.{p}": "norm.{p}",
    "head.fc.{p}": "head.{p}",
}
"""Besides, timm holds the pointwise convolutions as linears."""


def from_timm_resnet50(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of timm's (and torchvision's) resnet50 for the roadmap's step `resnet50`.

    Raises:
        ValueError: if a key is unknown.
    """
    return convert(state, RESNET50, "timm's resnet50")


def from_timm_convnext_tiny(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the state dict of timm's convnext_tiny for the roadmap's step `convnext-tiny`.

    Raises:
        ValueError: if a key is unknown.
    """

    def reshape(name: str, tensor: Tensor) -> Tensor:
        return tensor[:, :, None, None] if ".mlp.fc" in name and tensor.ndim == 2 else tensor

    return convert(state, CONVNEXT, "timm's convnext_tiny", reshape)
