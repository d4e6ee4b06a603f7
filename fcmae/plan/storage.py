"""How many bytes an image takes on a disk: looked up where the images are, else assumed; opens no image."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from fcmae.config import PretrainDataSection

JPEG_BYTES, ARRAY_BYTES = 110e3, 300e3
"""Of an image, assumed: the mean of ImageNet-1K (138 GB, 1.28 M images); 256 x 384 pixels of `fcmae prepare`."""
LOOKED_AT = 1_000
"""Files, at most, whose mean size counts."""


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def image_bytes(data: PretrainDataSection) -> tuple[float, str]:
    """Return the mean bytes of an image, and where that comes from."""
    if data.name == "arrays":
        return ARRAY_BYTES, "assumed, as 256 x 384 pixels"
    if data.name == "folder":
        sizes = [file.stat().st_size for file in itertools.islice(_files(Path(data.root)), LOOKED_AT)]
        if sizes:
            return sum(sizes) / len(sizes), f"the mean of {len(sizes):,} files of {data.root}"
    return JPEG_BYTES, "assumed, as ImageNet's; --image-kb says it"
