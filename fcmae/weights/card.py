"""The card of a folder with a network, README.md, which the Hugging Face Hub shows; knows no format."""

from pathlib import Path

from fcmae.encoder.base import Network
from fcmae.encoder.convnext import ConvNeXt
from fcmae.files import write_text
from fcmae.weights.base import Limit, Preprocessing, full_range

CARD = "README.md"


def _spell(limit: Limit) -> str:
    return str(list(limit) if isinstance(limit, tuple) else limit)


def spell_pixels(use: Preprocessing) -> str:
    """Say what pixels are before `mean` and `std`, such as "uint16 / 65535, clipped to 0.0 and 0.3"."""
    full = full_range(use)
    parts = [f"{use.dtype or 'uint8'}{'' if full == 1 else f' / {full:.0f}'}"]
    if use.window:
        parts.append("of DICOM with its own window applied")
    if use.nodata is not None:
        parts.append(f"NaN{'' if use.nodata == 'nan' else f' (in files also {use.nodata:g})'} where not known")
    if use.clip is not None:
        parts.append(f"clipped to {' and '.join(map(_spell, use.clip))}")
    return ", ".join(parts)


def spell_preparing(use: Preprocessing) -> str:
    """Return Python that runs `model` on pixels; empty for 8 bits in gray or RGB, which libraries prepare."""
    if use.dtype in (None, "uint8") and use.clip is None and len(use.mean) in (1, 3):
        return ""
    full = full_range(use)
    pixels = "pixels" if full == 1 else f"pixels / {full:.0f}"
    if use.clip is not None:
        least, most = map(_spell, use.clip)
        pixels = f"({pixels}).clamp(column({least}), column({most}))"
    return f"""
import torch


def column(values):
    return torch.tensor(values).view(-1, 1, 1)


# pixels: float32 (b, {len(use.mean)}, {", ".join(map(str, use.image_size))})
images = ({pixels} - column({list(use.mean)})) / column({list(use.std)})
out = model(images{".nan_to_num(0)" if use.nodata is not None else ""})"""


def write_card(
    encoder: Network,
    use: Preprocessing,
    folder: Path,
    *,
    code: str,
    transform: str = "",
    stride: int | None = None,
    warning: str = "",
) -> None:
    """Write what the folder says of its network to people, as Markdown.

    Args:
        use: preprocessing, complete.
        code: Python that loads the network from the folder.
        transform: Python that prepares images of 8 bits for it; others are prepared by the card's own.
        stride: in pixels of the images that `use` describes; None for the network's own.
        warning: a paragraph that comes first.
    """
    name = encoder.variant if isinstance(encoder.variant, str) else ", ".join(map(str, encoder.variant))
    if isinstance(encoder, ConvNeXt):
        name = f"ConvNeXt V{encoder.version} {name.capitalize()}"
    outputs = "targets" if use.task == "regression" else "classes"
    what = f"{encoder.num_classes} {outputs}" if encoder.num_classes else "features, without classifier"
    height, width = use.image_size
    text = f"""# {name}: {what}
{warning}
| | |
|---|---|
| images | {encoder.in_chans} channels, {height} x {width} pixels |
| pixels | {spell_pixels(use)} |
| mean, std | {list(use.mean)}, {list(use.std)}, of pixels {"so" if use.dtype == "float32" else "in [0, 1]"} |
| resizing | {use.interpolation}, the centre {use.crop_pct:g} of the side cropped out |
| total stride | {stride or encoder.patch_size} |

```python
{code}
{spell_preparing(use) or transform}
```

Trained with fcmae (arXiv 2301.00808).
"""
    write_text(folder / CARD, text)
