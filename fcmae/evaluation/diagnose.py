"""Feature collapse: how alike a layer's channels are, how many are dead; knows networks as modules, no files.

Everything is summed up in one pass over the images, in memory that does not grow with their number: for each layer
some numbers a channel and a Gram matrix of at most `MAX_COMPARED` channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from re import Pattern
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fcmae.encoder.convnext import Block, ConvNeXt, set_fused
from fcmae.errors import UserError

ZERO_NORM = 1e-20
"""Up to this L2 norm a channel's map counts as zero."""
DEAD = 0.01
"""A channel is dead if it is never further from zero than this share of the layer's root mean square."""
HIGH, FLAT = 0.5, 0.1
"""A channel is saturated if its mean, of either sign, is at least HIGH times the layer's root mean square, and its
standard deviation over sites and images at most FLAT times that mean."""
DUPLICATE = 0.99
"""A channel is a duplicate if its cosine with another one is above this, or below the negative of it."""
NO_VARIANCE = 1e-9
"""A layer whose variance is at most this share of its mean square does not vary: the rest is rounding."""
MAX_COMPARED = 2048
"""Channels of a layer that are compared pair by pair, evenly chosen of wider ones: 34 MB a layer."""

COLLAPSE_IMAGES = 64
"""Images, evenly chosen of the training set, on which pretraining follows the collapse of features."""


# Statistics


def _zero(norms: Tensor) -> Tensor:
    return norms <= ZERO_NORM


def cosine_distance(x: Tensor) -> Tensor:
    """Mean over the pairs of channels of (1 - cos(x_i, x_j)) / 2, for each image: (b,) of maps x (b, n, c).

    All c * c pairs count, i = j among them, as in the V2 paper (section 3, figure 4). It is 0 where all channels
    are the same up to a positive factor, (1 - 1 / c) / 2 where each is orthogonal to all others, and never above
    1/2: the cosines sum to the squared norm of the sum of unit vectors, which is how they are computed, in O(n c).

    A zero map has no direction: it counts as equal to other zero maps (cos 1) and orthogonal to the rest (cos 0).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norms = torch.linalg.vector_norm(x, dim=1)  # (b, c)
    zero = _zero(norms)
    units_sum = torch.einsum("bnc,bc->bn", x, torch.where(zero, 0.0, 1 / norms))
    cosines = units_sum.square().sum(1) + zero.sum(1).square()
    return (1 - cosines / x.shape[2] ** 2) / 2


class LayerFigures(NamedTuple):
    """How a layer's channels behave over a set of images."""

    channels: int
    compared: int
    """Channels among which duplicates and effective rank were looked for: all, or `MAX_COMPARED`."""
    cosine_distance: float
    """Mean over the images of `cosine_distance`, of all channels; 0 to 1/2, and small where features collapse."""
    dead: int
    """Channels that are (nearly) zero everywhere, see `DEAD`."""
    saturated: int
    """Channels that are high everywhere, (nearly) without variation, see `HIGH` and `FLAT`."""
    duplicates: int
    """Channels of those compared, not dead, that are (nearly) another one times a factor, see `DUPLICATE`."""
    effective_rank: float
    """exp(entropy of p), p the eigenvalues, divided by their sum, of the covariance of the channels compared over
    sites and images: 1 where a single direction varies, `compared` where all vary alike; 0 where nothing does."""

    @property
    def shares(self) -> dict[str, float]:
        """dead, saturated, duplicates and effective_rank as shares of the channels they were looked for among."""
        return {
            "dead": self.dead / self.channels,
            "saturated": self.saturated / self.channels,
            "duplicates": self.duplicates / self.compared,
            "effective_rank": self.effective_rank / self.compared,
        }


class LayerStatistics:
    """Sums over maps (b, n, c) of a layer, from which `figures` reads what it is asked for."""

    def __init__(self, channels: int, device: torch.device) -> None:
        wide: dict[str, Any] = {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}
        compared = min(channels, MAX_COMPARED)
        self.compared = torch.arange(compared, device=device) * channels // compared
        self.scatter = torch.zeros(compared, compared, **wide)
        """Sum of (x - shift)(x - shift)^T, with a shift near the mean so that single precision is enough for x."""
        self.shift: Tensor | None = None
        self.sum, self.squares = torch.zeros(channels, **wide), torch.zeros(channels, **wide)
        self.low, self.high = (
            torch.full((channels,), torch.inf, **wide),
            torch.full((channels,), -torch.inf, **wide),
        )
        self.distance = torch.zeros((), **wide)
        self.images = self.sites = 0

    def update(self, x: Tensor) -> None:
        """Add the maps of some images (b, n, c)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rows = x.flatten(0, 1)  # (b n, c)
        low, high = torch.aminmax(rows, dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.sum += rows.sum(0)
        self.squares += torch.linalg.vector_norm(rows, dim=0).to(self.squares.dtype).square()
        self.distance += cosine_distance(x).sum()
        chosen = rows if len(self.compared) == rows.shape[1] else rows[:, self.compared]
        if self.shift is None:
            self.shift = chosen.mean(0)
        chosen = chosen - self.shift
        self.scatter += chosen.T @ chosen
        self.images += len(x)
        self.sites += len(rows)

    def figures(self) -> LayerFigures:
        """Return the figures over all maps so far, of which there must be some."""
        mean, second = self.sum / self.sites, self.squares / self.sites
        rms = second.mean().sqrt()
        std = (second - mean.square()).clamp_min(0).sqrt()
        dead = torch.maximum(self.high, -self.low) <= DEAD * rms
        saturated = ~dead & (mean.abs() >= HIGH * rms) & (std <= FLAT * mean.abs())

        assert self.shift is not None
        chosen_mean = mean[self.compared]
        offset = chosen_mean - self.shift
        covariance = self.scatter / self.sites - torch.outer(offset, offset)
        products = covariance + torch.outer(chosen_mean, chosen_mean)
        norms = torch.where(dead[self.compared], torch.inf, products.diagonal().sqrt())
        cosines = (products / norms[:, None] / norms).fill_diagonal_(0)
        duplicates = (cosines.abs() > DUPLICATE).any(1)
        varies = covariance.trace() > NO_VARIANCE * products.trace()
        return LayerFigures(
            channels=len(self.sum),
            compared=len(self.compared),
            cosine_distance=float(self.distance / self.images),
            dead=int(dead.sum()),
            saturated=int(saturated.sum()),
            duplicates=int(duplicates.sum()),
            effective_rank=effective_rank(covariance * varies),
        )


def effective_rank(covariance: Tensor) -> float:
    """exp(entropy) of a covariance's eigenvalues divided by their sum (Roy and Vetterli 2007); 0 of a zero one."""
    if not bool(covariance.isfinite().all()):
        return float("nan")
    values = torch.linalg.eigvalsh(covariance.cpu()).clamp_min(0)
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


# Which maps


TAPS = {
    "act": "the MLP's expanded features, after the activation and before GRN or what stands there",
    "response": "the MLP's expanded features, after GRN or what stands there",
    "block": "each block's output",
}
"""What can be looked at in each block, by name; the paper's collapse shows at `act`."""


class Family(NamedTuple):
    """Where in a kind of block the maps of `TAPS` are; a block that has no such place is tapped at its output."""

    points: Mapping[str, str]
    """Tap -> the name in the block of the module that gives it."""
    channel_axis: int
    """Of the block's output."""


CONVOLUTIONAL = Family({}, 1)
FAMILIES = {
    # class of a block, timm's by its package
    "fcmae.encoder.convnext.Block": Family({"act": "act", "response": "grn"}, -1),
    "fcmae.encoder.roadmap.Block": CONVOLUTIONAL,
    "timm.ConvNeXtBlock": Family({"act": "mlp.act", "response": "mlp.grn"}, 1),
    "timm.BasicBlock": CONVOLUTIONAL,
    "timm.Bottleneck": CONVOLUTIONAL,
    "timm.PreActBottleneck": CONVOLUTIONAL,
    "timm.DepthwiseSeparableConv": CONVOLUTIONAL,
    "timm.InvertedResidual": CONVOLUTIONAL,
    "timm.UniversalInvertedResidual": CONVOLUTIONAL,
    "timm.EdgeResidual": CONVOLUTIONAL,
    "timm.Block": Family({"act": "mlp.act"}, -1),
    "timm.SwinTransformerBlock": Family({"act": "mlp.act"}, -1),
}


class Tap(NamedTuple):
    """A module whose output is looked at."""

    module: nn.Module
    channel_axis: int
    """Of its output; the last one where that is (b, n, c), whatever this says."""
    point: str
    """What of `TAPS` it is, or "layer" if it was asked for by name."""


def _channel_axis(network: nn.Module, name: str) -> int:
    """Guess the axis of a module's channels: the last where it, or one beside it in a block, is linear."""
    if isinstance(network, ConvNeXt):
        return -1
    parent = network.get_submodule(name.rpartition(".")[0])
    near = [network.get_submodule(name), *(parent.children() if parent is not network else ())]
    return -1 if any(isinstance(module, nn.Linear) for module in near) else 1


def block_taps(network: nn.Module, tap: str) -> dict[str, Tap]:
    """Return what `tap` names in each block of `network`, by the block's name; empty if none is of `FAMILIES`."""
    found: dict[str, Tap] = {}
    for name, block in network.named_modules():
        own = type(block)
        if issubclass(own, FSDPModule):  # FSDP's class for it, whose last base is its own
            own = own.__bases__[-1]
        place, kind = own.__module__, own.__name__
        family = FAMILIES.get(
            f"{place}.{kind}" if place.startswith("fcmae.") else f"{place.partition('.')[0]}.{kind}"
        )
        if family is None:
            continue
        inside = family.points.get(tap, "")
        if inside and inside in dict(block.named_modules()):
            path = f"{name}.{inside}"
            found[name] = Tap(network.get_submodule(path), _channel_axis(network, path), tap)
        elif tap == "response" and "act" in family.points:  # nothing is at its place: what comes out of act
            path = f"{name}.{family.points['act']}"
            found[name] = Tap(network.get_submodule(path), _channel_axis(network, path), "act")
        else:
            found[name] = Tap(block, family.channel_axis, "block")
    return found


def named_taps(network: nn.Module, pattern: Pattern[str]) -> dict[str, Tap]:
    """Return the modules in whose whole name `pattern` is found."""
    names = [name for name, _ in network.named_modules() if name and pattern.search(name)]
    return {name: Tap(network.get_submodule(name), _channel_axis(network, name), "layer") for name in names}


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode, module by module, without gradients; afterwards each module is as it was."""
    training = [(module, module.training) for module in network.modules()]
    fused = [(block, block.fused) for block in network.modules() if isinstance(block, Block)]
    network.eval()
    set_fused(network, False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training:
            module.training = was
        for block, was in fused:
            block.fused = was


@contextmanager
def watching(network: nn.Module, taps: Mapping[str, Tap], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `see` gets (name, map with channels last) whenever one of `taps` runs; leaves `network` as it was.

    Raises:
        UserError: where an output is no map.
    """

    def hook_of(name: str, tap: Tap) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, out: object) -> None:
            if not isinstance(out, Tensor) or out.ndim < 3:
                what = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                raise UserError(
                    f"layer {name}: its output is {what}, no map (b, c, h, w), (b, h, w, c) or (b, n, c)"
                )
            see(name, out if out.ndim == 3 else out.movedim(tap.channel_axis, -1))

        return hook

    handles = [tap.module.register_forward_hook(hook_of(name, tap)) for name, tap in taps.items()]
    try:
        with _evaluating(network):
            yield
    finally:
        for handle in handles:
            handle.remove()


# Networks


def diagnose(
    network: nn.Module, taps: Mapping[str, Tap], runs: Iterable[Callable[[], object]]
) -> dict[str, LayerFigures]:
    """Return the figures of `taps` over one pass of calls of the network, a batch each, in the order they run.

    Raises:
        UserError: as `watching`, or if features are not finite, or none of `taps` runs.
    """
    layers: dict[str, LayerStatistics] = {}

    def see(name: str, x: Tensor) -> None:
        if name not in layers:
            layers[name] = LayerStatistics(x.shape[-1], x.device)
        layers[name].update(x.flatten(1, -2))

    with watching(network, taps, see):
        for run in runs:
            run()
    if not layers:
        raise UserError(f"no layer ran of {', '.join(taps)}: features do not depend on them")
    figures = {name: layer.figures() for name, layer in layers.items()}
    broken = next((name for name, layer in figures.items() if layer.cosine_distance != layer.cosine_distance), None)
    if broken:
        raise UserError(f"layer {broken}: features are not finite: the weights are broken, or training diverged")
    return figures


def maps_of(network: nn.Module, taps: Mapping[str, Tap], run: Callable[[], object]) -> dict[str, Tensor]:
    """Return the first image's map (h, w, c) of each of `taps` in one call of the network; tokens have none."""
    maps: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if x.ndim == 4:
            maps[name] = x[0].float().cpu()

    with watching(network, taps, see):
        run()
    return maps


def stage_distances(
    encode: Callable[[Tensor], object], network: nn.Module, taps: Mapping[str, Tap], images: Iterable[Tensor]
) -> list[float]:
    """Return the mean `cosine_distance` of the layers of each stage, those with as many sites, over batches.

    Draws no random numbers, and leaves modes and gradients of `network` as they were.

    Args:
        encode: runs the network on normalised images.
        taps: its layers, in the order in which they run.
    """
    sums: dict[str, Tensor] = {}
    sites: dict[str, int] = {}
    number = 0

    def see(name: str, x: Tensor) -> None:
        maps = x.flatten(1, -2)
        sites[name] = maps.shape[1]
        sums[name] = sums.get(name, 0.0) + cosine_distance(maps).sum()

    with watching(network, taps, see):
        for batch in images:
            number += len(batch)
            encode(batch)
    stages = [[sums[name] for name in sums if sites[name] == size] for size in dict.fromkeys(sites.values())]
    return [float(torch.stack(stage).mean() / number) for stage in stages]
