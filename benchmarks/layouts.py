"""Time a pretraining step of FCMAE over each sparse layout, side by side.

    python benchmarks/layouts.py --rounds 5
    python benchmarks/layouts.py --variant base --batch 64 --json base.json

Takes the options of train_step.py and measures as it does. `channelwise` is the `minkowski` layout with
MinkowskiEngine's own depthwise convolution, a loop of scatters over 49 offsets, in the place of ours.
"""

import sys
from typing import Any

import train_step
from torch import Tensor, nn

from fcmae.encoder.convnextv2 import LAYOUTS
from fcmae.encoder.minkowski import MinkowskiSites, import_engine

WAYS = ["masked", "packed", "minkowski", "channelwise"]


class ChannelwiseSites(MinkowskiSites):
    """The engine's coordinates with the engine's own channel-wise convolution."""

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        engine = import_engine()
        weight = conv.weight.permute(3, 2, 0, 1).flatten(0, 1).squeeze(-1)  # (c, 1, kh, kw) -> (kw * kh, c)
        module: Any = engine.MinkowskiChannelwiseConvolution(conv.in_channels, kernel_size=7, dimension=2)
        del module.kernel
        module.kernel = weight.to(x.dtype)
        rows = x.flatten(0, 1).index_select(0, self._our_rows)
        out = module(engine.SparseTensor(rows, coordinate_map_key=self.key, coordinate_manager=self.manager))
        assert conv.bias is not None
        return self._rows(out.F.index_select(0, self._engine_rows) + conv.bias)


def main(argv: list[str]) -> None:
    """Measure `WAYS`, or the layouts that `argv` names."""
    LAYOUTS["channelwise"] = ChannelwiseSites.of_patches
    try:
        import_engine()
    except ValueError as error:
        sys.exit(f"error: {error}")
    train_step.main(["--layouts", *WAYS, *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
