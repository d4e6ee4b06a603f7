"""The card of a folder with a network, README.md, which the Hugging Face Hub shows; knows no format and no run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fcmae.encoder.base import Network
from fcmae.files import write_text
from fcmae.weights.base import SEGMENTATION, Limit, Loading, Preprocessing, full_range

CARD = "README.md"

TASKS = {
    # task: what the hub calls it, what the network is, what its outputs are
    "classification": ("image-classification", "classifier", "classes"),
    "multilabel": ("image-classification", "classifier", "classes"),
    "regression": (None, "regressor", "targets"),
    SEGMENTATION: ("image-segmentation", "segmenter", "classes of each pixel"),
}
FEATURES = "image-feature-extraction"

METRICS = {
    # key of a figure in the records of a run: what the hub calls it, what people call it, how it is written
    "top1": ("accuracy", "top-1", ".2%"),
    "top5": ("accuracy", "top-5", ".2%"),
    "knn_top1": ("accuracy", "k-NN top-1", ".2%"),
    "map": ("mean_average_precision", "mAP", ".2%"),
    "f1": ("f1", "F1", ".2%"),
    "miou": ("mean_iou", "mIoU", ".2%"),
    "pixel_accuracy": ("accuracy", "pixel accuracy", ".2%"),
    "r2": ("r_squared", "R2", ".4f"),
    "mae": ("mae", "MAE", ".4g"),
    "rmse": ("rmse", "RMSE", ".4g"),
}

V2 = """@inproceedings{woo2023convnextv2,
  title = {ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders},
  author = {Woo, Sanghyun and Debnath, Shoubhik and Hu, Ronghang and Chen, Xinlei and Liu, Zhuang and Kweon, In So \
and Xie, Saining},
  booktitle = {CVPR},
  year = {2023},
  eprint = {2301.00808},
  archivePrefix = {arXiv}
}"""
V1 = """@inproceedings{liu2022convnet,
  title = {A ConvNet for the 2020s},
  author = {Liu, Zhuang and Mao, Hanzi and Wu, Chao-Yuan and Feichtenhofer, Christoph and Darrell, Trevor and \
Xie, Saining},
  booktitle = {CVPR},
  year = {2022},
  eprint = {2201.03545},
  archivePrefix = {arXiv}
}"""


class Trained(NamedTuple):
    """What a card says of a run; names without the folders they are in."""

    pretrained: bool
    """By FCMAE, without labels; otherwise fine-tuned."""
    dataset: str
    """What its images are called."""
    hub_dataset: str | None
    """What the hub calls them, if they are from there."""
    num_images: int | None
    """Of them; None where the run has not noted it."""
    images: str
    """What is counted: "images", or "tiles" of them."""
    split: str | None
    """Of the images that `scores` are of."""
    started_from: str | None
    """What weights it started from are called; None for none."""
    step: int
    seen_images: int
    ema: bool
    """Whether the weights are an EMA of the trained ones."""
    scores: Mapping[str, float]
    """Of these weights, by keys of `METRICS`."""
    recipe: str
    """YAML of what the configuration says of network, augmentation, optimizer and length."""
    versions: str


class Publication(NamedTuple):
    """What only those who share weights can say of them."""

    license: str | None = None
    """As the hub calls it."""
    repository: str | None = None
    """ORGANISATION/NAME of the hub that the folder will be in; None where it stays a folder."""


PRIVATE = Publication()
"""Of what is not shared."""


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
    return f"""import torch


def column(values):
    return torch.tensor(values).view(-1, 1, 1)


# pixels: float32 (b, {len(use.mean)}, {sides})
images = ({pixels} - column({list(use.mean)})) / column({list(use.std)}){known}"""


def spell_photo(use: Preprocessing) -> str:
    """Return Python that opens a photograph in the channels that the network wants."""
    return f"""from PIL import Image

photo = Image.open("photo.jpg").convert("{"RGB" if len(use.mean) == 3 else "L"}")
"""


def spell_preparing(use: Preprocessing, loading: Loading) -> str:
    """Return Python that makes `images`: of a photograph, or of pixels where libraries do not prepare such."""
    prepare = loading.prepare
    if not is_picture(use):
        sides = "height, width" if use.task == SEGMENTATION else ", ".join(map(str, use.image_size))
        return loading.pixels or spell_images(use, sides)
    if prepare is None and use.task == SEGMENTATION:
        return f"""import torch
{spell_photo(use)}from torchvision.transforms.v2.functional import normalize, pil_to_tensor

images = normalize(pil_to_tensor(photo)[None] / 255, {list(use.mean)}, {list(use.std)})"""
    if prepare is None:
        size = (len(use.mean), *use.image_size)
        prepare = f"""from timm.data import create_transform

mean, std = {list(use.mean)}, {list(use.std)}
how = {{"interpolation": "{use.interpolation}", "crop_pct": {use.crop_pct:g}, "mean": mean, "std": std}}
images = create_transform({size}, **how)(photo)[None]"""
    return f"{spell_photo(use)}{prepare}"


def spell_use(use: Preprocessing, loading: Loading, repository: str | None) -> str:
    """Return Python that loads the network, from the hub where it will be there, and runs it."""
    if repository is None:
        folder = f'"{loading.address.format("PATH/OF/THIS/FOLDER")}"'
    elif loading.hub is not None:
        folder = f'"{loading.hub.format(repository)}"'
    else:
        folder = f'huggingface_hub.snapshot_download("{repository}")'
    download = "import huggingface_hub\n" if folder.startswith("huggingface_hub") else ""
    code = f"{loading.code.format(folder=folder)}\n\n{spell_preparing(use, loading)}\n{loading.run}"
    lines = f"{download}{code}".splitlines()
    imports = {line for line in lines if line.startswith(("import ", "from "))}
    first = "\n".join(sorted(imports, key=lambda line: (line.startswith("from "), line)))
    rest = "\n".join(line for line in lines if line not in imports)
    rest = re.sub(r"\n{3,}", "\n\n", rest).strip()
    return f"{first}\n\n{rest}"


def name_network(encoder: Network) -> str:
    """Return what people call the network, such as "ConvNeXt V2 Tiny"."""
    name = encoder.variant if isinstance(encoder.variant, str) else ", ".join(map(str, encoder.variant))
    version = encoder.arguments.get("version")
    return name if version is None else f"ConvNeXt V{version} {name.capitalize()}"


def describe_network(encoder: Network, use: Preprocessing, loading: Loading) -> dict[str, str]:
    """Return what is known of the network and its images, by what it is called."""
    size = f"{use.image_size[0]} x {use.image_size[1]} pixels"
    resizing = f"{use.interpolation}, the centre {use.crop_pct:g} of the side cropped out"
    if use.task == SEGMENTATION:
        resizing = f"bicubic, the shorter side to {use.short_side} pixels" if use.short_side is not None else "none"
        seen = f", seen in windows {use.stride[0]} x {use.stride[1]} apart" if use.stride is not None else ""
        size = f"of any size{seen}, trained on {size}"
    depths, so = encoder.layer_depths, "so" if use.dtype == "float32" else "in [0, 1]"
    blocks = {"blocks": ", ".join(map(str, depths))} if depths is not None else {}
    return {
        "parameters": f"{sum(parameter.numel() for parameter in encoder.parameters()):,}",
        **blocks,
        "channels": ", ".join(map(str, encoder.dims)),
        "images": f"{encoder.in_chans} channels, {size}",
        "pixels": spell_pixels(use),
        "mean, std": f"{list(use.mean)}, {list(use.std)}, of pixels {so}",
        "resizing": resizing,
        "total stride": f"{encoder.patch_size * loading.enlargement}",
    }


def describe_training(trained: Trained) -> str:
    """Return the Markdown that says what a run did."""
    images = f" of {trained.num_images:,} {trained.images}" if trained.num_images else ""
    epochs = f", {trained.seen_images / trained.num_images:.4g} epochs" if trained.num_images else ""
    lines = [
        f"Data: `{trained.dataset}`{images}{'' if trained.pretrained else ' with labels'}.",
        f"Length: {trained.step:,} updates, {trained.seen_images:,} {trained.images} seen{epochs}.",
        f"Started from: {f'`{trained.started_from}`' if trained.started_from else 'random weights'}.",
        *(["Weights: their exponential moving average (EMA)."] if trained.ema else []),
        f"Versions: {trained.versions}.",
    ]
    listed = "\n".join(f"- {line}" for line in lines)
    return f"## Training\n\n{listed}\n\n```yaml\n{trained.recipe}```\n"


def table(rows: Mapping[str, str]) -> str:
    """Draw two columns in Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def write_card(
    encoder: Network,
    use: Preprocessing,
    folder: Path,
    loading: Loading,
    *,
    trained: Trained | None = None,
    publication: Publication = PRIVATE,
) -> None:
    """Write what the folder says of its network to people, as the hub's Markdown with metadata.

    Args:
        use: preprocessing, complete.
        loading: of the folder's format.
        trained: the run that it comes from, where that is known.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData  # here: few who import this write a card

    height, width = use.image_size
    use = use._replace(image_size=(height * loading.enlargement, width * loading.enlargement))
    task, kind, outputs = TASKS[use.task_name] if encoder.num_classes else (FEATURES, "encoder", "")
    name = name_network(encoder)
    version = encoder.arguments.get("version")
    scores = {METRICS[key]: value for key, value in trained.scores.items() if key in METRICS} if trained else {}
    tags = ["fcmae", *([] if version is None else ["convnext" if version == 1 else "convnextv2"])]
    metadata: dict[str, Any] = {
        "license": publication.license,
        "library_name": loading.library,
        "pipeline_tag": task,
        "tags": tags,
        "metrics": list(dict.fromkeys(metric for metric, _, _ in scores)) or None,
    }
    how = "written by fcmae"
    if trained is not None:
        how = "pretrained without labels by fcmae" if trained.pretrained else "fine-tuned by fcmae"
        tags += ["masked-autoencoder", "self-supervised-learning"] if trained.pretrained else []
        metadata["datasets"] = [trained.hub_dataset] if trained.hub_dataset else None
    if trained is not None and scores:
        metadata["model_name"] = (publication.repository or name).rpartition("/")[2]
        metadata["eval_results"] = [
            EvalResult(
                task_type=task or kind,
                dataset_type=trained.hub_dataset or "imagefolder",
                dataset_name=trained.dataset,
                dataset_split=trained.split,
                metric_type=metric,
                metric_name=called,
                metric_value=value,
            )
            for (metric, called, _), value in scores.items()
        ]
    title = f"{name}: {f'{encoder.num_classes} {outputs}' if outputs else 'features, without classifier'}"
    cited = V2 if version != 1 else f"{V2}\n{V1}"
    parts = [
        f"# {title}\n{loading.warning}",
        f"A {name} {kind}, {how}, which implements [FCMAE](https://arxiv.org/abs/2301.00808).\n",
        table(describe_network(encoder, use, loading)),
        f"\n## How to use it\n\n```python\n{spell_use(use, loading, publication.repository)}\n```\n",
        *([describe_training(trained)] if trained is not None else []),
    ]
    if trained is not None and scores:
        figures = {called: f"{value:{form}}" for (_, called, form), value in scores.items()}
        split = f"`{trained.split}` of the data" if trained.split else "images held out"
        parts.append(f"## Evaluation\n\nOn {split}:\n\n{table(figures)}\n")
    parts.append(f"## Citation\n\n```bibtex\n{cited}\n```\n")
    text = "\n".join(parts)
    card = ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{text}")  # which reads it, to check it
    write_text(folder / CARD, str(card))
