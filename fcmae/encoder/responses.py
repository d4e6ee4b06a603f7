"""What stands in a block between GELU and the projection back; knows neither the block nor a particular layout."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.encoder.layouts import Sites
from fcmae.ops.grn_mlp import grn_mlp


class Response(nn.Module):
    """A module of so many channels whose forward takes a map and its sites, and returns a map of the same shape."""

    @property
    def mlp(self) -> Callable[[Tensor, nn.LayerNorm, nn.Linear, nn.Linear], Tensor] | None:
        """(x, norm, expand, project) -> project(self(gelu(expand(x * norm.weight + norm.bias)))) in one operation.

        In x's dtype; x (b, ..., c) is normalised and holds active sites only. None where there is none.
        """
        return None


class NoResponse(Response):
    """Nothing at GRN's place, as in version 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        return x


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


AGGREGATIONS: dict[str, Callable[[Tensor, Sites], Tensor]] = {
    # a map -> (b, c), over the active sites of each image, in at least float32 (paper, table 2a)
    "l2": lambda x, sites: sites.norm(x),
    "l1": lambda x, sites: sites.sum(_wide(x).abs()),
    "average": lambda x, sites: sites.sum(_wide(x)) / sites.num_active,
}

NORMALIZATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    # (b, c) -> (b, c), over the channels of each image (paper, table 2b)
    "mean": lambda x, eps: x / (x.mean(-1, keepdim=True) + eps),
    "sum": lambda x, eps: x / (x.sum(-1, keepdim=True) + eps),
    "none": lambda x, eps: x,
    "standardize": lambda x, eps: (
        (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
    ),
}


class GRN(Response):
    """Global Response Normalization (paper, Algorithm 1): x + gamma * (x * N(G(x))) + beta over active sites.

    Args:
        dim: channels.
        aggregation: G, of each channel over the sites of its image, a name of `AGGREGATIONS`.
        normalization: N, of G over channels, a name of `NORMALIZATIONS`.
        residual: without it gamma * (x * N(G(x))) + beta, where gamma begins at 1 in place of 0.

    Raises:
        ValueError: if a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        *,
        aggregation: str = "l2",
        normalization: str = "mean",
        residual: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for what, name, known in (
            ("aggregation", aggregation, AGGREGATIONS),
            ("normalization", normalization, NORMALIZATIONS),
        ):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r} of GRN: choose from {', '.join(known)}")
        self.gamma = nn.Parameter(torch.full((1, 1, 1, dim), 0.0 if residual else 1.0))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.aggregation, self.normalization, self.residual = aggregation, normalization, residual
        self.eps = eps

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        response = NORMALIZATIONS[self.normalization](AGGREGATIONS[self.aggregation](x, sites), self.eps)  # (b, c)
        scale = sites.spread(self.residual + self.gamma.flatten() * response, x)
        return torch.addcmul(self.beta.flatten().to(x.dtype), x, scale.to(x.dtype))

    @property
    def mlp(self) -> Callable[[Tensor, nn.LayerNorm, nn.Linear, nn.Linear], Tensor] | None:
        own = all(getattr(self, part) == value for part, value in OWN_PARTS.items())
        return self._mlp if own else None

    def _mlp(self, x: Tensor, norm: nn.LayerNorm, expand: nn.Linear, project: nn.Linear) -> Tensor:
        out = grn_mlp(
            x.flatten(1, -2),
            norm.weight,
            norm.bias,
            expand.weight,
            expand.bias,
            self.gamma.flatten(),
            self.beta.flatten(),
            project.weight,
            project.bias,
            self.eps,
        )
        return out.view(x.shape)


class LRN(Response):
    """Local Response Normalization (AlexNet): each value over those of five neighbouring channels at its site."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        rows = x.flatten(0, -2)[..., None]  # (n, c, 1)
        return F.local_response_norm(rows, size=5).view(x.shape)


class BatchNorm(Response):
    """Batch normalization over the active sites of the batch; evaluation uses running statistics.

    It makes an image's features depend on its batch, each process has its own statistics (the first process's
    are kept), and those of pretraining are of visible patches only: fine-tuning begins with other ones. All of
    this makes it unfit here (paper, table 2d: 80.5 % where none gives 83.7 %).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            number = len(x) * sites.num_active
            mean = sites.sum(_wide(x)).sum(0) / number
            var = sites.sum((_wide(x) - mean).square()).sum(0) / number
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = var * (number / max(number - 1, 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return torch.addcmul((self.bias - mean * scale).to(x.dtype), x, scale.to(x.dtype))


class LayerNorm(Response):
    """Layer normalization over the channels of each site."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, eps=1e-6)


class ChannelMLP(nn.Sequential):
    """The two linear layers of squeeze-and-excite, with a sixteenth of the channels between them."""

    def __init__(self, dim: int) -> None:
        hidden = max(dim // 16, 1)
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


class SqueezeExcite(Response):
    """Squeeze-and-excite (arXiv 1709.01507): gates channels by an MLP of their means over active sites."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_of_means = ChannelMLP(dim)

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        gate = self.mlp_of_means(AGGREGATIONS["average"](x, sites)).sigmoid()
        return x * sites.spread(gate, x).to(x.dtype)


class CBAM(Response):
    """Convolutional Block Attention Module (arXiv 1807.06521): gates channels, then sites.

    Channels by an MLP of their means and maxima over the image's active sites; sites by a 7x7 convolution of the
    mean and the maximum over channels. Its batch normalization is left out: the convolution has a bias.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.channel_mlp = ChannelMLP(dim)
        self.spatial = nn.Conv2d(2, 2, kernel_size=7, padding=3, groups=2)
        """Depthwise, so that every layout has it: the sum of its two outputs is the convolution."""

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        means, maxima = AGGREGATIONS["average"](x, sites), sites.max(x)
        gate = (self.channel_mlp(means) + self.channel_mlp(maxima.to(means.dtype))).sigmoid()
        x = x * sites.spread(gate, x).to(x.dtype)
        over_channels = torch.stack([x.mean(-1), x.amax(-1)], -1)
        gate = sites.depthwise(over_channels, self.spatial).sum(-1, keepdim=True).sigmoid()
        return x * gate.to(x.dtype)


RESPONSES: dict[str, Callable[..., Response]] = {
    "none": NoResponse,
    "grn": GRN,
    "lrn": LRN,
    "batch_norm": BatchNorm,
    "layer_norm": LayerNorm,
    "squeeze_excite": SqueezeExcite,
    "cbam": CBAM,
}
"""What can stand at GRN's place, by name: builders from a number of channels."""


OWN_PARTS: Mapping[str, Any] = MappingProxyType({"aggregation": "l2", "normalization": "mean", "residual": True})
"""Of GRN as the paper has it."""


def make_response(name: str, grn: Mapping[str, Any]) -> Callable[[int], Response]:
    """Return the builder of `RESPONSES` by its name; `grn` holds arguments for `GRN`.

    Raises:
        ValueError: if the name is unknown, or `grn` is given for another than "grn".
    """
    if name not in RESPONSES:
        raise ValueError(f"unknown response {name!r}: choose from {', '.join(RESPONSES)}")
    if name == "grn":
        return functools.partial(GRN, **grn)
    if changed := [key for key, value in grn.items() if value != OWN_PARTS.get(key)]:
        raise ValueError(
            f"response {name!r} has no parts of GRN, but {', '.join(changed)} is given: take response 'grn'"
        )
    return RESPONSES[name]
