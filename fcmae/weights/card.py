"""The card of a folder with a network, README.md, which the Hugging Face Hub shows; knows no format."""

from pathlib import Path

from fcmae.encoder.base import Network
from fcmae.files import write_text
from fcmae.weights.base import SEGMENTATION, Limit, Preprocessing, full_range

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


def is_picture(use: Preprocessing) -> bool:
    """Whether pixels are 8 bits in gray or RGB, which libraries read and prepare."""
    return use.dtype in (None, "uint8") and use.clip is None and len(use.mean) in (1, 3)


def spell_images(use: Preprocessing, sides: str) -> str:
    """Return Python that makes `images` for a network of pixels with such sides."""
    full = full_range(use)
    pixels = "pixels" if full == 1 else f"pixels / {full:.0f}"
    if use.clip is not None:
        least, most = map(_spell, use.clip)
        pixels = f"({pixels}).clamp(column({least}), column({most}))"
    known = "\nimages = images.nan_to_num(0)" if use.nodata is not None else ""
    return f"""
import torch


def column(values):
    return torch.tensor(values).view(-1, 1, 1)


# pixels: float32 (b, {len(use.mean)}, {sides})
images = ({pixels} - column({list(use.mean)})) / column({list(use.std)}){known}"""


def spell_preparing(use: Preprocessing) -> str:
    """Return Python that runs `model` on pixels; empty for those that libraries prepare."""
    return (
        "" if is_picture(use) else f"{spell_images(use, ', '.join(map(str, use.image_size)))}\nout = model(images)"
    )


def spell_segmenting(use: Preprocessing) -> str:
    """Return Python that loads a segmenter and runs it on images of any size."""
    images = spell_images(use, "height, width")
    if is_picture(use):
        images = f"""
import torch
from PIL import Image
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

photo = Image.open("photo.jpg").convert("{"RGB" if len(use.mean) == 3 else "L"}")
images = normalize(pil_to_tensor(photo)[None] / 255, {list(use.mean)}, {list(use.std)})"""
    imports, logits = "import fcmae", "model(images)"
    given = [f"Windows({use.image_size}, {use.stride})"] if use.stride is not None else []
    given += [f"short_side={use.short_side}"] if use.short_side is not None else []
    if given:
        imports += "\nfrom fcmae.heads.windows import Windows, pixel_logits"
        strips = ", ".join(["model", "images", *given])
        logits = f"torch.cat([strip.logits for strip in pixel_logits({strips})], 2)"
    return f"""{imports}

model = fcmae.load_encoder("PATH/OF/THIS/FOLDER").eval()
{images}
with torch.inference_mode():
    classes = {logits}.argmax(1)  # (b, height, width)"""


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
        code: Python that loads the network from the folder, and runs a segmenter.
        transform: Python that prepares images of 8 bits for it; others are prepared by the card's own.
        stride: in pixels of the images that `use` describes; None for the network's own.
        warning: a paragraph that comes first.
    """
    name = encoder.variant if isinstance(encoder.variant, str) else ", ".join(map(str, encoder.variant))
    if "version" in encoder.arguments:
        name = f"ConvNeXt V{encoder.arguments['version']} {name.capitalize()}"
    outputs = {"regression": "targets", SEGMENTATION: "classes of each pixel"}.get(use.task_name, "classes")
    what = f"{encoder.num_classes} {outputs}" if encoder.num_classes else "features, without classifier"
    size = f"{use.image_size[0]} x {use.image_size[1]} pixels"
    resizing = f"{use.interpolation}, the centre {use.crop_pct:g} of the side cropped out"
    if use.task == SEGMENTATION:
        resizing = f"bicubic, the shorter side to {use.short_side} pixels" if use.short_side is not None else "none"
        seen = f", seen in windows {use.stride[0]} x {use.stride[1]} apart" if use.stride is not None else ""
        size = f"of any size{seen}, trained on {size}"
    text = f"""# {name}: {what}
{warning}
| | |
|---|---|
| images | {encoder.in_chans} channels, {size} |
| pixels | {spell_pixels(use)} |
| mean, std | {list(use.mean)}, {list(use.std)}, of pixels {"so" if use.dtype == "float32" else "in [0, 1]"} |
| resizing | {resizing} |
| total stride | {stride or encoder.patch_size} |

```python
{code}
{(use.task != SEGMENTATION and spell_preparing(use)) or transform}
```

Trained with fcmae (arXiv 2301.00808).
"""
    write_text(folder / CARD, text)
