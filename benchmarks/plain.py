"""The packed layout without our kernels: what the fused operations gain is measured against it."""

from torch import Tensor, nn

from fcmae.encoder.layouts import conv2d_channels_last
from fcmae.encoder.packed import PackedSites


class PlainPackedSites(PackedSites):
    """Patches laid out on a canvas of zeros for a dense convolution; every other operation PyTorch's own."""

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        canvas = self.scatter(x)
        return self.gather(
            conv2d_channels_last(canvas, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
        )

    @property
    def all_active(self) -> bool:
        return False  # so that blocks take the plain operations
