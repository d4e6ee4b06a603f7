"""The card of a folder with a network, README.md, which the Hugging Face Hub shows; knows no format."""

from pathlib import Path

from fcmae.encoder.base import Network
from fcmae.encoder.convnext import ConvNeXt
from fcmae.files import write_text
from fcmae.weights.base import Preprocessing

CARD = "README.md"


def write_card(
    encoder: Network,
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
| mean, std | {list(use.mean)}, {list(use.std)}, of pixels in [0, 1] |
| resizing | {use.interpolation}, the centre {use.crop_pct:g} of the side cropped out |
| total stride | {stride or encoder.patch_size} |

```python
{code}
```

Trained with fcmae (arXiv 2301.00808).
"""
    write_text(folder / CARD, text)
