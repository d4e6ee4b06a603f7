"""Networks by the name of their variant: our ConvNeXt, timm/NAME, roadmap/STEP; knows how none of them computes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fcmae.encoder.base import Network, Variant, Version
from fcmae.encoder.convnext import ConvNeXt
from fcmae.encoder.responses import OWN_PARTS
from fcmae.encoder.roadmap import Roadmap


def _timm(name: str, **kwargs: Any) -> Network:
    from fcmae.encoder.timm_networks import TimmNetwork  # which imports timm: two seconds

    return TimmNetwork(name, **kwargs)


def _timm_classifier(name: str) -> str:
    from fcmae.encoder.timm_networks import classifier_name

    return classifier_name(name)


class Family(NamedTuple):
    """Networks whose variants begin alike, as those of timm do in timm/resnet50."""

    build: Callable[..., Network]
    """(name behind the slash, in_chans=, num_classes=, drop_path=) -> the network."""
    keys: frozenset[str] = frozenset()
    """Other arguments of `build_network` that `build` takes."""
    classifier: Callable[[str], str] = lambda name: "head"
    """(name behind the slash) -> what the tensors of its last layer are called, see `Network.classifier`."""


FAMILIES = {
    "timm": Family(_timm, classifier=_timm_classifier),
    "roadmap": Family(Roadmap, frozenset({"stem_stride"})),
}
"""By what their variants begin with."""

OWN = {"version": (2,), "response": ("auto",), "grn": ({}, OWN_PARTS), "stem_stride": (4,)}
"""Arguments that not every family takes, and their values where they say nothing."""


def is_other(variant: Variant | None) -> bool:
    """Whether a variant is of a family other than our ConvNeXt."""
    return isinstance(variant, str) and "/" in variant


def _find_family(variant: str) -> tuple[Family, str]:
    family, _, name = variant.partition("/")
    if family not in FAMILIES:
        known = " or ".join(f"{other}/NAME" for other in FAMILIES)
        raise ValueError(f"unknown variant {variant!r}: before a slash stands {known}")
    return FAMILIES[family], name


def classifier_name(variant: Variant | None) -> str:
    """Return what the tensors of the last layer of a variant's network are called, without building it.

    Raises:
        ValueError: if there is no such network.
    """
    if not isinstance(variant, str) or not is_other(variant):
        return "head"
    family, name = _find_family(variant)
    return family.classifier(name)


def build_network(
    variant: Variant,
    *,
    version: Version = 2,
    response: str = "auto",
    grn: Mapping[str, Any] | None = None,
    in_chans: int = 3,
    num_classes: int = 0,
    stem_stride: int = 4,
    drop_path: float = 0.0,
) -> Network:
    """Return the untrained network of a variant.

    Args:
        variant: of ConvNeXt, see `ConvNeXt`, or FAMILY/NAME of `FAMILIES`, such as timm/resnet50.
        version, response, grn, stem_stride: of ConvNeXt, and of families that take them.
        in_chans: channels of the images.
        num_classes: outputs of the classifier; 0 gives pooled features instead.
        drop_path: stochastic depth of the last block.

    Raises:
        ValueError: if there is no such network, or an argument is not for it.
    """
    own: dict[str, Any] = {
        "version": version,
        "response": response,
        "grn": dict(grn or {}),
        "stem_stride": stem_stride,
    }
    shared: dict[str, Any] = {"in_chans": in_chans, "num_classes": num_classes, "drop_path": drop_path}
    if not isinstance(variant, str) or not is_other(variant):
        return ConvNeXt(variant, **own, **shared)
    builder, name = _find_family(variant)
    for key in OWN.keys() - builder.keys:
        if own.pop(key) not in OWN[key]:
            value = OWN[key][-1]
            shown = f"model.{key}={value}" if isinstance(value, int | str) else f"no model.{key}"
            raise ValueError(f"{key} is for our ConvNeXt: with variant {variant} give {shown}")
    return builder.build(name, **own, **shared)
