"""The packed layout without our kernels: what the fused operations gain is measured against it.

Taken with `set_fused(encoder, False)`, so that blocks run module by module.
"""

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
