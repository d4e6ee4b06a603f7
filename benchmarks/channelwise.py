"""The `minkowski` layout with MinkowskiEngine's own depthwise convolution: a loop of scatters over 49 offsets."""

from typing import Any

from torch import Tensor, nn

from fcmae.encoder.minkowski import MinkowskiSites, import_engine


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
