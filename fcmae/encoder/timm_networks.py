"""Any convolutional network of timm, dense or on visible patches as SparK computes it; knows no masks or losses.

The modules are timm's own. Hooks on them do what SparK (arXiv 2301.03580) does by layers of its own: whatever a
convolution or pooling reads is zero where hidden, and what averages over a map (batch norm's statistics,
squeeze-and-excite, GRN) is given the visible sites alone. As in SparK a site of any resolution is visible if its
patch is.
"""

import copy
import difflib
from typing import Any

import timm
import torch
from timm.layers.blur_pool import BlurPool2d
from timm.layers.cbam import ChannelAttn
from timm.layers.eca import EcaModule
from timm.layers.global_context import GlobalContext
from timm.layers.grn import GlobalResponseNorm
from timm.layers.squeeze_excite import EffectiveSEModule, SEModule, SqueezeExciteCl
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn

from fcmae.encoder.base import Layout, MaskedNetwork, require_ids, require_images
from fcmae.encoder.convnext import Block
from fcmae.encoder.layouts import MaskedSites
from fcmae.encoder.packed import PackedSites
from fcmae.patches import grid_shape

STRIDES = (4, 8, 16, 32)
"""Total strides of the maps that decoders are given."""

READ_NEIGHBOURS = (
    nn.modules.conv._ConvNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    BlurPool2d,
)
"""Modules whose output at a site comes from a window around it."""

READ_ALL = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    GlobalResponseNorm,
    SqueezeExcite,
    SEModule,
    SqueezeExciteCl,
    EffectiveSEModule,
    EcaModule,
    GlobalContext,
    ChannelAttn,
)
"""Modules whose output at a site comes from that site, and from all sites in no order."""


class Masking:
    """What is visible in the call that a network is computing, for the hooks on its modules; none between calls."""

    def __init__(self) -> None:
        self.grid: tuple[int, int] = (0, 0)
        """Patches (gh, gw)."""
        self.visible_ids: Tensor | None = None
        self.sites: PackedSites | None = None
        """Of the module that is being given visible sites alone; what is in it computes as it is."""
        self.module: nn.Module | None = None
        """That module."""

    def attach(self, network: nn.Module) -> None:
        """Register hooks on the modules of `network`."""
        for module in network.modules():
            if isinstance(module, READ_ALL):
                module.register_forward_pre_hook(self.gather)
                module.register_forward_hook(self.scatter)
            elif isinstance(module, READ_NEIGHBOURS):
                module.register_forward_pre_hook(self.hide)

    def sites_per_patch(self, side: int) -> int:
        """Sites per patch side in a map of `side` rows; 0 where it is none of whole patches, as a padded one."""
        k, rest = divmod(side, self.grid[0])
        return k if not rest and k & (k - 1) == 0 else 0

    def hide_sites(self, x: Tensor) -> Tensor:
        """Zero hidden sites of x (b, c, h, w)."""
        k = self.sites_per_patch(x.shape[2])
        if self.visible_ids is None or not k:
            return x
        sites = MaskedSites((x.shape[2], x.shape[3]), self.visible_ids, k)
        return sites.scatter(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def hide(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Zero hidden sites of what a module reads (a forward pre-hook)."""
        if self.visible_ids is None or self.sites is not None or args[0].ndim != 4:
            return None
        return (self.hide_sites(args[0]), *args[1:])

    def gather(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Give a module a map (b, c, n, 1) of its n visible sites (a forward pre-hook)."""
        if self.visible_ids is None or self.sites is not None or args[0].ndim != 4:
            return None
        x = args[0] if channels_last(module) else args[0].permute(0, 2, 3, 1)
        k = self.sites_per_patch(x.shape[1])
        if not k:
            return None
        self.sites = PackedSites.of_patches(self.grid, self.visible_ids, k)
        self.module = module
        x = self.sites.gather(x).flatten(1, 3)[:, :, None]  # (b, n, 1, c)
        return (x if channels_last(module) else x.permute(0, 3, 1, 2), *args[1:])

    def scatter(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """Lay out what a module made of `gather`'s map as a map, zero at hidden sites (a forward hook)."""
        if self.sites is None or self.module is not module or self.visible_ids is None:
            return None
        sites, self.sites, self.module = self.sites, None, None
        x = out if channels_last(module) else out.permute(0, 2, 3, 1)
        k, p = sites.sites_per_patch, self.visible_ids.shape[1]
        x = sites.scatter(x.reshape(len(x), p, k, k, x.shape[-1]))
        return x if channels_last(module) else x.permute(0, 3, 1, 2)


def channels_last(module: nn.Module) -> bool:
    """Whether a module takes maps (b, h, w, c)."""
    return isinstance(module, SqueezeExciteCl) or getattr(module, "channel_dim", 1) == -1


def require_name(name: str) -> None:
    """Check that timm has an architecture of this name.

    Raises:
        ValueError: if not, with names like it.
    """
    names = timm.list_models()
    if name not in names:
        near = difflib.get_close_matches(name.partition(".")[0], names, n=3)
        question = f": did you mean {' or '.join(f'timm/{other}' for other in near)}?" if near else ""
        raise ValueError(f"timm {timm.__version__} has no network {name!r}{question}")


def classifier_name(name: str) -> str:
    """Return what timm calls the last layer of its network `name`.

    Raises:
        ValueError: if timm has no such network.
    """
    require_name(name)
    return timm.get_pretrained_cfg(name).classifier  # pyright: ignore


class TimmNetwork(MaskedNetwork):
    """Any convolutional network of timm with maps of total strides 4, 8, 16 and 32, as ResNet or EfficientNet.

    Its state dict has timm's names, so that weights go into timm's model of this name and come from it. The last
    map is what timm's `forward_features` gives; the others are those of `forward_intermediates`.

    While training on visible patches, batch norm's statistics, running ones too, are those of visible sites.

    Args:
        name: of timm's model, such as "resnet50".
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 gives pooled features, and freezes what FCMAE does not train, such
            as a norm after the pooling.
        drop_path: stochastic depth, `drop_path_rate` of timm.

    Raises:
        ValueError: if timm has no such network, or it cannot be computed on visible patches.
    """

    family = "timm"
    block = Block
    model: Any
    """timm's."""

    def __init__(self, name: str, *, in_chans: int = 3, num_classes: int = 0, drop_path: float = 0.0) -> None:
        super().__init__()
        require_name(name)
        self.variant = f"timm/{name}"
        self.architecture = name
        self.in_chans, self.num_classes, self.patch_size = in_chans, num_classes, STRIDES[-1]
        options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        try:
            self.model = timm.create_model(name, in_chans=in_chans, num_classes=num_classes, **options)
        except TypeError as error:
            raise ValueError(f"{self.variant} with in_chans={in_chans}, drop_path={drop_path}: {error}") from error
        maps = getattr(self.model, "feature_info", [])
        last = {info["reduction"]: i for i, info in enumerate(maps)}
        if not {*STRIDES} <= last.keys() or not hasattr(self.model, "forward_intermediates"):
            found = f"those of {', '.join(map(str, last))}" if last else "none"
            raise ValueError(f"{self.variant} has no maps of total strides 4, 8, 16 and 32, but {found}; {REMEDY}")
        self.indices = [last[stride] for stride in STRIDES[:-1]]
        self.dims = (*(maps[i]["num_chs"] for i in self.indices), self.model.num_features)
        self.classifier = self.model.default_cfg["classifier"]
        if num_classes and not isinstance(self.classifier_layer, nn.Linear):
            raise ValueError(f"{self.variant} has no linear layer as classifier; {REMEDY}")
        self.masking = Masking()
        self.masking.attach(self.model)
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)
        if not num_classes and not next(self.parameters()).is_meta:
            unused = try_out(self)
            for parameter_name, parameter in self.named_parameters():
                parameter.requires_grad_(parameter_name not in unused)

    @property
    def classifier_layer(self) -> nn.Module:
        return self.model.get_classifier()

    @property
    def why_not_twice(self) -> str:  # the second time without hooks' masks, and counted in running statistics again
        return f"gradient checkpointing is for our ConvNeXt alone, not for {self.variant}"

    def require_layout(self, layout: Layout) -> None:
        if layout not in ("auto", "dense", "masked"):
            raise ValueError(
                f"layout {layout!r} is for our ConvNeXt alone: take auto or masked with {self.variant}"
            )

    def feature_maps(
        self, images: Tensor, visible_ids: Tensor | None = None, layout: Layout = "auto"
    ) -> list[Tensor]:
        require_images(images, self.in_chans)
        self.require_layout(layout)
        if visible_ids is None:
            if layout == "masked":
                raise ValueError("layout 'masked' needs visible_ids")
            return [x.permute(0, 2, 3, 1) for x in self._maps(images)]
        if layout == "dense":
            raise ValueError("layout 'dense' has no hidden patches: drop visible_ids or choose 'masked'")
        grid = grid_shape((images.shape[2], images.shape[3]), self.patch_size)
        require_ids(visible_ids, len(images), grid)
        masking = self.masking
        masking.grid, masking.visible_ids, masking.sites = grid, visible_ids, None
        try:
            maps = self._maps(masking.hide_sites(images))
            return [masking.hide_sites(x).permute(0, 2, 3, 1) for x in maps]
        finally:
            masking.visible_ids = None

    def _maps(self, images: Tensor) -> list[Tensor]:
        last, maps = self.model.forward_intermediates(images, indices=self.indices, output_fmt="NCHW")
        return [*maps, last]

    def features(self, images: Tensor, visible_ids: Tensor | None = None, layout: Layout = "auto") -> Tensor:
        return self.feature_maps(images, visible_ids, layout)[-1]

    def forward(self, images: Tensor) -> Tensor:
        require_images(images, self.in_chans)
        return self.model(images)

    def extra_repr(self) -> str:
        return f"{self.variant}, dims={self.dims}, patch_size={self.patch_size}"


PREFIX = "model."


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Give the tensors of a state dict timm's own names."""
    for name in [name for name in state if name.startswith(prefix + PREFIX)]:
        state[prefix + name.removeprefix(prefix + PREFIX)] = state.pop(name)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undo `_drop_prefix`."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + PREFIX + name.removeprefix(prefix)] = state.pop(name)


REMEDY = "take a convolutional one, such as timm/resnet50"


@torch.enable_grad()
def try_out(network: TimmNetwork) -> set[str]:
    """Compute a copy on one visible patch amid hidden ones, and return the parameters its maps do not come from.

    Raises:
        ValueError: if the features depend on how much is hidden: something in it averages over hidden sites, and
            is not in the tables above; or its maps are not those of a convolutional network.
    """
    trial = copy.deepcopy(network).double().eval()
    generator = torch.Generator().manual_seed(0)
    device = next(trial.parameters()).device
    for parameter in trial.parameters():  # so that nothing is multiplied by zero or almost
        if parameter.ndim <= 1:
            drawn = torch.rand(parameter.shape, generator=generator) + 0.5
            parameter.data.copy_(drawn.to(device))
    patch = torch.randn(1, network.in_chans, network.patch_size, network.patch_size, generator=generator).double()
    found: list[Tensor] = []
    try:
        for side in (3, 5):
            pixels, middle = side * network.patch_size, side // 2
            images = torch.full((1, network.in_chans, pixels, pixels), torch.nan).double()
            at = slice(middle * network.patch_size, (middle + 1) * network.patch_size)
            images[:, :, at, at] = patch
            visible_ids = torch.tensor([[middle * side + middle]])
            with torch.set_grad_enabled(side == 3):
                maps = trial.feature_maps(images.to(device), visible_ids.to(device))
            if [x.shape[1] for x in maps] != [pixels // stride for stride in STRIDES]:
                raise ValueError("its maps are of other sizes")
            if tuple(x.shape[3] for x in maps) != network.dims:
                raise ValueError("its maps are of other widths")
            found.append(maps[-1][:, middle, middle])
    except (ValueError, RuntimeError, TypeError, AssertionError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{network.variant} cannot be computed on visible patches ({reason}); {REMEDY}") from error
    if not torch.allclose(found[1], found[0], rtol=0.0, atol=1e-9 * float(found[0].detach().abs().max())):
        raise ValueError(
            f"{network.variant} cannot be computed on visible patches: it has an attention or average over the "
            f"whole map that is not known here; {REMEDY}"
        )
    found[0].sum().backward()
    return {name for name, parameter in trial.named_parameters() if parameter.grad is None}
