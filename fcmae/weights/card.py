"""The card of a folder with a network, README.md, which the Hugging Face Hub shows; knows no format."""

from pathlib import Path

from fcmae.encoder.convnext import ConvNeXt, variant_name
from fcmae.files import write_text
from fcmae.weights.base import Preprocessing

CARD = "README.md"


def write_card(
    encoder: ConvNeXt,
    use: Preprocessing,
    folder: Path,
    *,
    code: str,
    stride: int | None = None,
    warning: str = "",
) -> None:
    """Write what the folder says of its network to people, as Markdown.

    Args:
        use: preprocessing, complete.
        code: Python that loads the network from the folder.
        stride: in pixels of the images that `use` describes; None for the network's own.
        warning: a paragraph that comes first.
    """
    name = variant_name(encoder.depths, encoder.dims)
    size = name.capitalize() if name else f"{encoder.depths}, {encoder.dims}"
    what = f"{encoder.num_classes} classes" if encoder.num_classes else "features, without classifier"
    height, width = use.image_size
    text = f"""# ConvNeXt V{encoder.version} {size}: {what}
{warning}
| | |
|---|---|
| images | {encoder.in_chans} channels, {height} x {width} pixels |
| mean, std | {list(use.mean)}, {list(use.std)}, of pixels in [0, 1] |
| resizing | {use.interpolation}, the centre {use.crop_pct:g} of the side cropped out |
| total stride | {stride or encoder.patch_size} |

```python
{code}
```

Trained with fcmae (arXiv 2301.00808).
"""
    write_text(folder / CARD, text)
