"""What stands in a block between GELU and the projection back; knows neither the block nor a particular layout."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fcmae.encoder.layouts import Sites
from fcmae.ops.grn_mlp import grn_mlp


class Response(nn.Module):
    """A module of so many channels whose forward takes a map and its sites, and returns a map of the same shape."""

    mlp: Callable[[Tensor, nn.LayerNorm, nn.Linear, nn.Linear], Tensor] | None = None
    """(x, norm, expand, project) -> project(self(gelu(expand(x * norm.weight + norm.bias)))) in one operation.

    In x's dtype; x (b, ..., c) is normalised and holds active sites only. None where there is no such operation.
    """


class GRN(Response):
    """Global Response Normalization (paper, Algorithm 1): x + gamma * (x * N(x)) + beta over active sites.

    N(x) is the channel's L2 norm over the sites of its image, divided by the mean of these norms over channels.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.eps = eps

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        norm = sites.norm(x)  # (b, c)
        response = norm / (norm.mean(dim=-1, keepdim=True) + self.eps)
        scale = sites.spread(1 + self.gamma.flatten() * response, x)
        return torch.addcmul(self.beta.flatten().to(x.dtype), x, scale.to(x.dtype))

    def mlp(self, x: Tensor, norm: nn.LayerNorm, expand: nn.Linear, project: nn.Linear) -> Tensor:
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
