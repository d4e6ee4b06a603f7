"""ConvNeXt V1 (arXiv 2201.03545) and V2 (2301.00808), written once over the layouts; knows no masks or losses.

Version 1 scales each branch by a learnt factor per channel (LayerScale), version 2 has GRN in its place.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fcmae.encoder.base import Layout, MaskedNetwork, Variant, Version, require_ids, require_images
from fcmae.encoder.layouts import SITES_PER_PATCH, DenseSites, MaskedSites, Sites, as_autocast
from fcmae.encoder.minkowski import MinkowskiSites, import_engine
from fcmae.encoder.packed import PackedSites
from fcmae.encoder.responses import GRN, OWN_PARTS, Response, make_response
from fcmae.patches import grid_shape

VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # name: (depths, dims), V2's Appendix A.1 and V1's section 3; "small" and "xlarge" are V1's, "huge" is V2's
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
"""The sizes of the papers: depths and widths of the four stages."""

LAYER_SCALE = 1e-6
"""The first value of version 1's factors (V1 paper, table 5)."""

LAYOUTS: dict[str, Callable[[tuple[int, int], Tensor], Sites]] = {
    # name: (patch grid, visible_ids) -> the first stage's sites; "dense" needs no ids and is made apart
    "masked": lambda grid, ids: MaskedSites((grid[0] * SITES_PER_PATCH, grid[1] * SITES_PER_PATCH), ids),
    "packed": PackedSites.of_patches,
    "minkowski": MinkowskiSites.of_patches,
}


def resolve_variant(variant: Variant) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (depths, dims) of a name in `VARIANTS` or of an explicit pair of four numbers each.

    Raises:
        ValueError: if the name is unknown, or the pair is not four depths and four widths.
    """
    if isinstance(variant, str):
        if variant not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"unknown variant {variant!r}: choose from {known}, or timm/NAME for timm's")
        return VARIANTS[variant]
    depths, dims = tuple(variant[0]), tuple(variant[1])
    if len(depths) != 4 or len(dims) != 4 or min(depths + dims) < 1:
        raise ValueError(f"a variant has four positive depths and four positive dims, got {depths} and {dims}")
    return depths, dims


def variant_name(depths: tuple[int, ...], dims: tuple[int, ...]) -> str | None:
    """Return the name in `VARIANTS` of these depths and dims, or None."""
    return next((name for name, variant in VARIANTS.items() if variant == (depths, dims)), None)


def resolve_response(version: Version, response: str) -> str:
    """Return what stands at GRN's place: unless said otherwise GRN in version 2, nothing in version 1."""
    return {1: "none", 2: "grn"}[version] if response == "auto" else response


def require_layout(layout: Layout) -> None:
    """Check that `layout` can be computed here.

    Raises:
        ValueError: if it is unknown, or needs a package that is missing, saying how to get it.
    """
    if layout not in ("auto", "dense", *LAYOUTS):
        raise ValueError(f"unknown layout {layout!r}: choose from auto, dense, {', '.join(LAYOUTS)}")
    if layout == "minkowski":
        import_engine()


class DepthwiseConv(nn.Conv2d):
    """Depthwise `nn.Conv2d` of odd size, called with a map and its sites, whose layout computes it."""

    def __init__(self, dim: int, kernel_size: int = 7) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        return sites.depthwise(x, self)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole images with probability `rate` while training.

    `torchvision.ops.StochasticDepth(rate, "row")` in numbers and random numbers; importing that takes two seconds.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = x.new_empty(len(x), *(1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))


def drop_path_rates(last: float, num_blocks: int) -> Iterator[float]:
    """Yield the rates of a network's blocks, which rise linearly from 0 at the first to `last`."""
    yield from (last * i / max(num_blocks - 1, 1) for i in range(num_blocks))


class Block(nn.Module):
    """ConvNeXt block: depthwise 7x7, LayerNorm, expand by 4, GELU, GRN, project back, add (V2 paper, figure 5).

    What stands at GRN's place is called `grn` whatever it is, as in the official names.

    Args:
        dim: channels c of the map.
        response: builds what stands at GRN's place from its number of channels, 4c; see `responses.py`.
        layer_scale: multiply the branch by a learnt factor per channel, `gamma`, as version 1 does.
        drop_path: probability with which the branch of an image is dropped in training (stochastic depth).
    """

    fused: bool
    """Compute the branch in two fused operations, which take less time and memory (the default).

    False: each child module runs and its forward hooks fire; the numbers are the same up to rounding. Over
    `MaskedSites`, in `torch.export` and with a response without `mlp` it is so whatever this says. See `set_fused`.
    """

    def __init__(
        self,
        dim: int,
        *,
        response: Callable[[int], Response] = GRN,
        layer_scale: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.dwconv = DepthwiseConv(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = response(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE)) if layer_scale else None
        self.drop_path = DropPath(drop_path)
        self.fused = True

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        mlp = self.grn.mlp if self.fused and sites.all_active and not torch.compiler.is_exporting() else None
        if mlp is not None:
            h = as_autocast(sites.depthwise_norm(x, self.dwconv, self.norm.eps))
            h = mlp(h, self.norm, self.pwconv1, self.pwconv2)
        else:
            h = self.norm(self.dwconv(x, sites))
            h = self.pwconv2(self.grn(self.act(self.pwconv1(h)), sites))
        if self.gamma is not None:
            h = h * self.gamma.to(h.dtype)
        return x + self.drop_path(h)


def set_fused(network: nn.Module, fused: bool) -> None:
    """Switch `Block.fused` of all blocks in a network: an encoder, a decoder, or both in an `FCMAE`.

    With `fused=False` forward hooks on the blocks' modules fire (`pwconv1`, `grn`, ...); set it before compiling.
    """
    for module in network.modules():
        if isinstance(module, Block):
            module.fused = fused


def init_weights(module: nn.Module) -> None:
    """Draw convolution and linear weights from a truncated normal of std 0.02 and zero their biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class ConvNeXt(MaskedNetwork):
    """ConvNeXt V1 or V2 encoder and classifier with the official dense parameter names.

    Without classes the final LayerNorm has no parameters: released FCMAE weights and our own pretrained
    encoders have none, and pretraining does not use it.

    Its blocks run in fused operations; `set_fused(encoder, False)` runs them module by module, for forward hooks.

    Args:
        variant: a name of `VARIANTS` or an explicit (depths, dims).
        version: 1 for LayerScale and nothing at GRN's place, 2 for GRN.
        response: what stands at GRN's place, a name of `responses.RESPONSES`; "auto" is the version's own.
        grn: arguments of `GRN` other than its own, such as {"aggregation": "l1"}.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 gives pooled features instead.
        stem_stride: 4 (official), 2 or 1; a patch has 8 * stem_stride pixels per side.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.

    Raises:
        ValueError: if an argument is none of these.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        version: Version = 2,
        response: str = "auto",
        grn: Mapping[str, Any] | None = None,
        in_chans: int = 3,
        num_classes: int = 0,
        stem_stride: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 4, 2 or 1, got {stem_stride}")
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"got in_chans={in_chans} (at least 1), num_classes={num_classes} (at least 0)")
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version}")
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), got {drop_path}")
        self.depths, self.dims = resolve_variant(variant)
        self.variant = variant_name(self.depths, self.dims) or (self.depths, self.dims)
        self.version: Version = version
        self.response = resolve_response(version, response)
        self.grn = {**OWN_PARTS, **(grn or {})} if self.response == "grn" else {}
        self.block = functools.partial(
            Block, response=make_response(self.response, grn or {}), layer_scale=version == 1
        )
        """Builds a block like this network's from a number of channels."""
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.stem_stride = stem_stride
        self.patch_size = SITES_PER_PATCH * stem_stride

        stem = nn.Conv2d(in_chans, self.dims[0], kernel_size=stem_stride, stride=stem_stride)
        self.downsample_layers = nn.ModuleList(
            [nn.ModuleList([stem, nn.LayerNorm(self.dims[0], eps=1e-6)])]
            + [
                nn.ModuleList([nn.LayerNorm(fine, eps=1e-6), nn.Conv2d(fine, coarse, kernel_size=2, stride=2)])
                for fine, coarse in zip(self.dims[:-1], self.dims[1:], strict=True)
            ]
        )
        rates = drop_path_rates(drop_path, sum(self.depths))
        self.stages = nn.ModuleList(
            nn.ModuleList(self.block(dim, drop_path=next(rates)) for _ in range(depth))
            for depth, dim in zip(self.depths, self.dims, strict=True)
        )
        self.norm = nn.LayerNorm(self.dims[-1], eps=1e-6, elementwise_affine=num_classes > 0)
        self.head = nn.Linear(self.dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    @property
    def classifier_layer(self) -> nn.Module:
        return self.head

    @property
    def head_names(self) -> tuple[str, ...]:
        return ("norm.", "head.")

    @property
    def layer_depths(self) -> tuple[int, ...]:
        return self.depths

    @property
    def arguments(self) -> dict[str, Any]:
        own = {"version": self.version, "response": self.response, "grn": self.grn, "stem_stride": self.stem_stride}
        return super().arguments | own

    def require_layout(self, layout: Layout) -> None:
        require_layout(layout)

    @property
    def why_not_twice(self) -> str:
        if self.response != "batch_norm":
            return ""
        return "runs each block twice, and response batch_norm would count each batch twice; set it to false"

    def sites(self, images: Tensor, visible_ids: Tensor | None, layout: Layout) -> Sites:
        """Return the first stage's layout for these images; "auto" is packed with `visible_ids`, else dense.

        Raises:
            ValueError: if shapes do not fit, or the layout is unknown or needs ids that are missing.
        """
        require_images(images, self.in_chans)
        height, width = images.shape[2], images.shape[3]
        if layout == "auto":
            layout = "dense" if visible_ids is None else "packed"
        if layout == "dense":
            if visible_ids is not None:
                raise ValueError("layout 'dense' has no hidden patches: drop visible_ids or choose 'packed'")
            if height < self.patch_size or width < self.patch_size:
                raise ValueError(f"images of {height} x {width} pixels are smaller than a patch, {self.patch_size}")
            return DenseSites((height // self.stem_stride, width // self.stem_stride))
        grid = grid_shape((height, width), self.patch_size)
        require_layout(layout)
        if visible_ids is None:
            raise ValueError(f"layout {layout!r} needs visible_ids")
        require_ids(visible_ids, len(images), grid)
        return LAYOUTS[layout](grid, visible_ids)

    def stage_outputs(self, images: Tensor, sites: Sites) -> list[tuple[Tensor, Sites]]:
        """Return the map after each of the four stages with its layout, finest first."""
        outputs: list[tuple[Tensor, Sites]] = []
        x = images
        for i, (layers, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            assert isinstance(layers, nn.ModuleList)
            assert isinstance(stage, nn.ModuleList)
            if i == 0:
                stem, norm = layers
                assert isinstance(stem, nn.Conv2d)
                x = norm(sites.stem(x, stem))
            else:
                norm, conv = layers
                assert isinstance(conv, nn.Conv2d)
                x, sites = sites.downsample(norm(x), conv)
            x = as_autocast(x)  # one dtype for what blocks add to: under CUDA's autocast a LayerNorm gives float32
            for block in stage:
                x = self.run_block(block, x, sites)
            outputs.append((x, sites))
        return outputs

    def feature_maps(
        self, images: Tensor, visible_ids: Tensor | None = None, layout: Layout = "auto"
    ) -> list[Tensor]:
        """Return the four stages' maps (b, h_i, w_i, c_i), finest first, with exact zeros where hidden.

        Arguments and errors are those of `features`.
        """
        outputs = self.stage_outputs(images, self.sites(images, visible_ids, layout))
        return [sites.scatter(x) for x, sites in outputs]

    def features(self, images: Tensor, visible_ids: Tensor | None = None, layout: Layout = "auto") -> Tensor:
        """Return the last map (b, h, w, c), one site per patch, before the final norm; exact zeros where hidden.

        Args:
            images: (b, in_chans, H, W); hidden pixels are never read. With `visible_ids` the sides are multiples of
                the patch size. Without, any of a patch and more will do: as in timm, each strided convolution
                leaves out what does not fill its last window.
            visible_ids: int64 (b, p), without repeats, or None for all visible.
            layout: how to compute it; all layouts give the same numbers.

        Raises:
            ValueError: if shapes do not fit, or the layout is unknown or needs ids that are missing.
        """
        x, sites = self.stage_outputs(images, self.sites(images, visible_ids, layout))[-1]
        return sites.scatter(x)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, num_classes), or pooled, normalised features (b, c) when `num_classes` is 0.

        Raises:
            ValueError: as `features`.
        """
        x, sites = self.stage_outputs(images, self.sites(images, None, "dense"))[-1]
        return self.head(self.norm(sites.sum(x) / sites.num_active))

    def extra_repr(self) -> str:
        return f"version={self.version}, depths={self.depths}, dims={self.dims}, patch_size={self.patch_size}"


ConvNeXtV2 = ConvNeXt
"""The name in 0.1.0, which knew no version 1."""
