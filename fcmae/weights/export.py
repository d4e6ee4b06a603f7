"""A network in the formats of others, checked against ours before it gets its name; and the folder a run leaves."""

import warnings
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from fcmae.encoder.base import Network
from fcmae.encoder.convnext import ConvNeXt, resolve_response
from fcmae.encoder.responses import OWN_PARTS
from fcmae.errors import UserError, blame
from fcmae.files import atomic_folder, free_bytes, make_folder, require_new_folder
from fcmae.heads.segmentation import Segmenter
from fcmae.weights.base import Format, Loading, Preprocessing, Weights, build_encoder
from fcmae.weights.card import PRIVATE, Publication, Trained, write_card
from fcmae.weights.networks import OTHER_FORMATS, PLAIN, SEGMENTER_FORMATS, folder_format
from fcmae.weights.read import FORMATS
from fcmae.weights.timm import TIMM, write_timm_folder

WARNING = """
**fcmae alone computes this network**, a {}: timm, transformers and the official code have no such.
`fcmae export THIS_FOLDER --to onnx` or `--to torch-export` makes a program of it that others run.
"""


class Exported(NamedTuple):
    """What was written and checked."""

    files: tuple[Path, ...]
    difference: float
    """Largest on random images, relative to the largest output."""
    how: str
    """To load it."""


def describe_response(encoder: ConvNeXt) -> str:
    """Name the version and, where it is not the version's own, what stands at GRN's place, in words of a config."""
    parts = [f"grn.{part}={value}" for part, value in encoder.grn.items() if value != OWN_PARTS[part]]
    own = encoder.response == resolve_response(encoder.version, "auto")
    what = [*([] if own else [f"response={encoder.response}"]), *parts]
    return " ".join([f"ConvNeXt V{encoder.version}", *(["with", ", ".join(what)] if what else [])])


def _loading(form: Format, network: Network, use: Preprocessing) -> Loading:
    """Return what a card says of a folder of this format, with a warning where only we compute the network."""
    loading = form.loading(network, use)
    if form is not PLAIN or isinstance(network, Segmenter):
        return loading
    if isinstance(network, ConvNeXt):
        others, what = TIMM.holds(network), describe_response(network)
    else:
        others, what = "timm" in OTHER_FORMATS[network.family], f"network called {network.variant}"
    return loading if others else loading._replace(warning=WARNING.format(what))


def write_folder(
    network: Network, preprocessing: Preprocessing, folder: Path, *, trained: Trained | None = None
) -> None:
    """Write what a run leaves: a folder that timm loads, or, of a network that timm lacks, a plain one.

    We read both back exactly; the card in the folder says who else does.

    Args:
        network: of any kind.
        preprocessing: what is known of its images.
        folder: there, or yet to be made.
        trained: for the card, where that is known.

    Raises:
        ValueError: if preprocessing does not fit the network.
    """
    use = preprocessing.completed(network)
    make_folder(folder)
    if isinstance(network, ConvNeXt) and TIMM.holds(network):
        form = TIMM
        write_timm_folder(network, use, folder)  # which has more networks than what is exported
    else:
        form = PLAIN if isinstance(network, ConvNeXt | Segmenter) else folder_format(str(network.variant))
        form.write(network, use, folder)
    write_card(network, use, folder, _loading(form, network, use), trained=trained)


def export(
    weights: Weights,
    to: str,
    output: Path,
    *,
    with_preprocessing: bool = False,
    trained: Trained | None = None,
    publication: Publication = PRIVATE,
) -> Exported:
    """Write the network of `weights` as a folder of format `to`, after checking that it computes the same.

    Args:
        weights: of any origin.
        to: a name of `FORMATS`.
        output: a folder that does not exist yet, or is empty.
        with_preprocessing: let what is written take images as they are, and give probabilities.
        trained: the run that the weights are of, for the card.
        publication: likewise.

    Raises:
        UserError: if the format cannot hold this network, a package is missing, `output` is in use, or what was
            written computes something else; then nothing is left.
    """
    require_new_folder(output, f"--output {output}")
    encoder = build_encoder(weights).eval()
    segments = isinstance(encoder, Segmenter)
    formats = SEGMENTER_FORMATS if segments else {"convnext": FORMATS, **OTHER_FORMATS}[encoder.family]
    if to not in formats:
        lacks = "has no place for a head" if segments else f"holds our ConvNeXt alone, not {encoder.variant}"
        raise UserError(f"--to {to}: {lacks}; take {', '.join(formats)}")
    form = formats[to]
    if with_preprocessing and form.prepend_preprocessing is None:
        able = ", ".join(name for name, other in FORMATS.items() if other.prepend_preprocessing)
        raise UserError(f"--with-preprocessing: not for --to {to}, only for {able}")
    if isinstance(encoder, ConvNeXt) and not form.holds(encoder):
        able = ", ".join(name for name, other in FORMATS.items() if other.holds(encoder))
        raise UserError(f"--to {to}: cannot hold a {describe_response(encoder)}; choose from {able}")
    with blame(str(weights.path)):
        preprocessing = weights.preprocessing.completed(encoder)
    if with_preprocessing and form.check_preprocessing:
        with blame(f"--to {to}"):
            form.check_preprocessing(encoder, preprocessing)
    needed = 2**20 + sum(value.nbytes for value in encoder.state_dict().values())
    if free_bytes(output) < needed:
        raise UserError(f"--output {output}: takes {needed / 1e6:.0f} MB, more than is free; free some space")
    try:
        with atomic_folder(output) as folder:
            with blame(f"--to {to}"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporters' own internals
                form.write(encoder, preprocessing, folder)
                difference = form.verify(encoder, folder)
            if not difference <= form.tolerance:
                raise UserError(
                    f"--to {to}: what was written differs from the network by {difference:.1e}, more than "
                    f"{form.tolerance:.0e}, so it was deleted; are the weights finite?"
                )
            loading = _loading(form, encoder, preprocessing)
            if with_preprocessing and form.prepend_preprocessing and form.loading_prepared:
                with blame(f"--to {to}"):
                    form.prepend_preprocessing(encoder, preprocessing, folder)
                loading = form.loading_prepared(encoder, preprocessing)
            write_card(encoder, preprocessing, folder, loading, trained=trained, publication=publication)
    except ImportError as error:
        packages = "transformers onnx onnxruntime onnxscript"  # the extra `export`, which no package index knows
        raise UserError(f"--to {to}: {error.name or error} is missing: pip install {packages}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--output {output}: not written ({error}); free some space, or name another folder"
        ) from error
    return Exported(tuple(sorted(output.iterdir())), difference, form.how(encoder, output))
