"""What stands in a block between GELU and the projection back; knows neither the block nor a particular layout."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
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
        own = (self.aggregation, self.normalization, self.residual) == ("l2", "mean", True)
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


RESPONSES: dict[str, Callable[..., Response]] = {"none": NoResponse, "grn": GRN}
"""What can stand at GRN's place, by name: builders from a number of channels."""


def make_response(name: str, grn: Mapping[str, Any]) -> Callable[[int], Response]:
    """Return the builder of `RESPONSES` by its name; `grn` holds arguments for `GRN`.

    Raises:
        ValueError: if the name is unknown, or `grn` is given for another than "grn".
    """
    if name not in RESPONSES:
        raise ValueError(f"unknown response {name!r}: choose from {', '.join(RESPONSES)}")
    if grn and name != "grn":
        raise ValueError(
            f"response {name!r} has no parts of GRN, but {', '.join(grn)} is given: take response 'grn'"
        )
    return functools.partial(RESPONSES[name], **grn)
