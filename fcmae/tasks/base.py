"""What a task is to fine-tuning, and what tasks share; knows no one of them, and no schedule, processes or files.

A task is the labelled images, the network with its head, the loss, the scores and what is said of the model. To add
one, write a `Task`, and name it in `fcmae.tasks.known` and as a `task` of the configuration.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.aggregation import CatMetric
from tqdm import tqdm

from fcmae.config import FinetuneConfig, ImageConfig
from fcmae.data import (
    AugmentedView,
    BadImage,
    Cover,
    EvaluationDataset,
    LabelledDataset,
    PixelNormalizer,
    Reading,
    Source,
    load_batches,
    one_pass,
    open_source,
    overlap,
)
from fcmae.data.pixels import kind_name
from fcmae.data.segments import SegmentationDataset, SegmentationEvaluation
from fcmae.encoder.base import Network
from fcmae.encoder.networks import build_network
from fcmae.errors import UserError, blame
from fcmae.load import adapt_channels, known_of, load_weights, require_network
from fcmae.training.checkpoint import State
from fcmae.weights.base import Weights, load_network

Settings = TypeVar("Settings", bound=FinetuneConfig)
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(normalised images, labels) -> images and targets, as mixup makes them; draws on the CPU."""
Loss = Callable[[Callable[[Tensor], Any], Tensor, Tensor], Tensor]
"""(network, normalised images, what `Mix` gave for their labels) -> scalar; of these alone: it may be recorded."""
Training = LabelledDataset | SegmentationDataset
Evaluation = EvaluationDataset | SegmentationEvaluation
Pictures = Callable[[Network, PixelNormalizer], np.ndarray]
"""(network in evaluation mode, from pixels to what it sees) -> what it makes of fixed images, uint8 (h, w, 3)."""


class Figure(NamedTuple):
    """How a figure of an evaluation is called and written."""

    title: str
    """For people, such as "top-1"."""
    key: str
    """In files, such as "top1"."""
    form: str = ".2%"

    def show(self, value: float) -> str:
        return "-" if math.isnan(value) else f"{value:{self.form}}"


class Scores(ABC):
    """What an evaluation found, over the images of all processes."""

    overall: ClassVar[tuple[Figure, ...]]
    """Of all outputs together; `best` goes by the first, of which more is better."""
    by_output: ClassVar[tuple[Figure, ...]]
    """Of each output."""
    output, outputs = "class", "classes"
    """What the network has outputs for."""
    picture: ClassVar[tuple[str, str]]
    """What is drawn, for people, and the name of its file."""

    @property
    @abstractmethod
    def num_images(self) -> int: ...

    @property
    @abstractmethod
    def figures(self) -> dict[str, float]:
        """By the keys of `overall`; finite where the outputs are."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, np.ndarray]:
        """By the keys of `by_output`, a value for each output; NaN where there is none."""

    @abstractmethod
    def draw(self, names: Sequence[str]) -> np.ndarray:
        """Draw the scores of outputs with these names: uint8 (h, w, 3)."""

    def __str__(self) -> str:
        return " ".join(f"{figure.title} {figure.show(self.figures[figure.key])}" for figure in self.overall)

    def report(self, names: Sequence[str]) -> str:
        """Describe scores: the figures of all images, then a line for each output."""
        lines = [f"{'images':17}{self.num_images:,}"]
        lines += [f"{figure.title:17}{figure.show(self.figures[figure.key])}" for figure in self.overall]
        width = max(map(len, (self.output, *names)))
        table = [[self.output, *names]]
        for figure in self.by_output:
            cells = [figure.title, *map(figure.show, self.columns[figure.key].tolist())]
            table.append([f"{cell:>{max(7, *map(len, cells))}}" for cell in cells])
        return "\n".join(
            [*lines, "", *("  ".join([f"{name:{width}}", *row]) for name, *row in zip(*table, strict=True))]
        )

    def tabulate(self, names: Sequence[str]) -> dict[str, Any]:
        """Return scores as JSON takes them: the figures of all images, then a column per figure of outputs."""
        columns = {
            figure.key: [None if math.isnan(value) else value for value in self.columns[figure.key].tolist()]
            for figure in self.by_output
        }
        return {"images": self.num_images} | self.figures | {self.outputs: {"names": list(names)} | columns}


class Metric(Protocol):
    """Gathers scores, batch by batch."""

    def update(self, outputs: Tensor, labels: Tensor, /) -> None:
        """Count outputs with labels, of which `NOT_COUNTED` or NaN do not count."""
        ...

    def compute(self) -> Scores:
        """Return the scores over all processes.

        Raises:
            ValueError: if nothing counts.
        """
        ...


class Gathered:
    """Outputs and labels of all images of all processes, (n, outputs) each, for scores that need them all."""

    def __init__(self, device: torch.device) -> None:
        self.outputs, self.labels = (CatMetric(nan_strategy="disable").to(device) for _ in range(2))

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.outputs.update(outputs.float())
        self.labels.update(labels.float())

    def counted(self, is_counted: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return outputs and labels, float32 on the CPU, of the rows whose labels all count.

        Raises:
            ValueError: if none does.
        """
        outputs, labels = (gathered.compute().cpu() for gathered in (self.outputs, self.labels))
        rows = is_counted(labels).all(1)
        if not rows.any():
            raise ValueError("none of the images could be read")
        return outputs[rows], labels[rows]


@dataclass(frozen=True)
class Task(ABC, Generic[Settings]):
    """What is trained: labelled images, network, loss and scores."""

    config: Settings
    names: tuple[str, ...] | None
    """Of the network's outputs, such as classes; None only for finished weights that do not name theirs."""

    scores: ClassVar[type[Scores]]
    head: ClassVar[str] = "classifier of {} classes"
    """What the network's last layer is called, with its number of outputs."""
    predict_options: ClassVar[str] = ""
    """What `fcmae predict` is given besides `{run}` and images."""

    # Labelled images

    @classmethod
    @abstractmethod
    def open(cls, config: Settings, state: State | None = None) -> tuple[Self, Training]:
        """Open the training images, augmented by (seed, epoch, index), and the task that they are for.

        Args:
            state: of the run that goes on, which a task may take statistics from; None for a new one.

        Raises:
            UserError: if they have no labels, or not those of this task.
        """

    @abstractmethod
    def validation_set(self, in_chans: int, training: Training | None = None) -> Evaluation:
        """Open the images to evaluate on, labelled by `names`, or by their own where these are None.

        Raises:
            UserError: if there are none, they are those of `training`, or their labels are others.
        """

    # The network and its loss

    def build(self) -> Network:
        """Return an untrained network with an output for each of `names`.

        Raises:
            UserError: if there is no such network.
        """
        return build_classifier(self.config, self.num_outputs)

    @property
    def num_outputs(self) -> int:
        assert self.names is not None
        return len(self.names)

    def start_from(self, model: Any, source: str) -> str:
        """Load an encoder's weights and, where it was trained for the same, its head; returns what was done.

        Args:
            model: from `build`.
            source: the value of init_from.

        Raises:
            UserError: if the weights are another network's.
        """
        weights = load_weights(source)
        keep = self.has_head_of(weights) and weights.num_classes == model.num_classes
        done = start_network(model, weights, source, head=self.as_trained if keep else None)
        return describe_start(weights, self.head.format(model.num_classes), keep, done)

    def has_head_of(self, weights: Weights) -> bool:
        """Whether weights were trained for this task and its names, as far as they say."""
        known = weights.preprocessing
        return known.task_name == self.config.task and known.class_names in (None, self.names)

    def as_trained(self, tensors: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
        """Return the tensors of finished weights as `loss` trains them."""
        return tensors

    def mix(self) -> Mix:
        """Return what mixes the images of a batch; without mixup, what leaves them as they are."""
        return unmixed

    @abstractmethod
    def loss(self) -> Loss:
        """Return what is minimised."""

    def blank_step(self, loss: Loss, model: Any, number: int, device: torch.device) -> Tensor:
        """Return the loss of so many images without content, by which memory is estimated."""
        images = torch.zeros(number, self.config.model.in_chans, *self.config.data.size, device=device)
        return loss(model, images, self.blank_targets(number, device))

    def blank_targets(self, number: int, device: torch.device) -> Tensor:
        """Return targets for `loss`; here shares or numbers, (number, outputs)."""
        return torch.zeros(number, self.num_outputs, device=device)

    # Scores

    @abstractmethod
    def metric(self, num_outputs: int, device: torch.device) -> Any:
        """Return what gathers the scores of a network, a `Metric`."""

    def count(self, metric: Any, network: Callable[[Tensor], Tensor], images: Tensor, batch: Any) -> None:
        """Let a metric count a batch of the validation set, whose images are given normalised."""
        metric.update(network(images), batch.labels)

    def draw_mistakes(self, scores: Scores, dataset: Evaluation) -> np.ndarray | None:
        """Draw the images of a set that were answered worst: uint8 (h, w, 3); None where that is not known."""
        return None

    def pictures(self, dataset: Training | Evaluation) -> Pictures | None:
        """Return what draws a network's answers for some images of a set, if there is something to see."""
        return None

    # The model

    @property
    def facts(self) -> dict[str, Any]:
        """What checkpoints say of the model, arguments of `fcmae.training.checkpoint.State`."""
        assert self.names is not None
        return {"class_names": list(self.names)}


def unmixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as they are."""
    return images, labels


# Images


def open_training(config: ImageConfig) -> Source:
    """Open the training images.

    Raises:
        UserError: if there are none, or they are not for `data.auto_augment`.
    """
    data = config.data
    source = open_source(data.name, data.root, data.split, config.model.in_chans, reading=Reading.of(data))
    if data.auto_augment is not None and source.dtype != torch.uint8:
        raise UserError(
            f"data.auto_augment={data.auto_augment}: is for pixels of 8 bits, and data.root={data.root} has "
            f"{kind_name(source.dtype)}; set data.auto_augment=null"
        )
    return source


def augment(config: ImageConfig, source: Source, labels: np.ndarray | None = None) -> LabelledDataset:
    """Return samples of the training images, augmented by (seed, epoch, index).

    Args:
        labels: of the images, a row for each; None for the source's.

    Raises:
        UserError: if timm does not know `data.auto_augment`.
    """
    data = config.data
    with blame("data.auto_augment"):
        view = AugmentedView(
            data.size,
            crop_scale=data.crop_scale,
            crop_padding=data.crop_padding,
            hflip=data.hflip,
            auto_augment=data.auto_augment,
            erase_prob=data.erase_prob,
            mean=data.mean,
            std=data.std,
        )
    return LabelledDataset(source, view=view, seed=config.train.seed, labels=labels)


class ValidationPlace(NamedTuple):
    """Where the images to evaluate on are, arguments of `open_source`; and how messages name it."""

    root: str
    split: str
    whole_root: bool
    key: str
    remedy: str = "name data.val_split or data.val_root, or data.val_split=null for none"

    @classmethod
    def of(cls, config: FinetuneConfig) -> Self:
        """Read it off the configuration.

        Raises:
            UserError: if there is none.
        """
        data = config.data
        if data.val_split is None:
            raise UserError("data.val_split=null: there is nothing to evaluate; name a split")
        if data.val_root is None:
            return cls(data.root, data.val_split, False, "data.root")
        return cls(data.val_root, data.val_split, True, "data.val_root")

    def __str__(self) -> str:
        return f"{self.key}={self.root}, data.val_split={self.split}"

    def require_apart(self, training: Training | None, source: Source, config: FinetuneConfig) -> None:
        """Check that images to evaluate on are not those of training.

        Raises:
            UserError: if they are.
        """
        if training is not None and self.split != config.data.split and overlap(training.images, source):
            raise UserError(f"{self}: training's own images would be evaluated; {self.remedy}")


def open_validation(config: FinetuneConfig, in_chans: int, training: Training | None) -> tuple[Source, str]:
    """Open the images to evaluate on; returns them, and how messages name them.

    Raises:
        UserError: if there are none, or they are those of `training`.
    """
    place = ValidationPlace.of(config)
    source = open_source(
        config.data.name,
        place.root,
        place.split,
        in_chans,
        whole_root=place.whole_root,
        reading=Reading.of(config.data),
        key=place.key,
        remedy=place.remedy,
    )
    place.require_apart(training, source, config)
    return source, str(place)


def evaluation_set(
    config: ImageConfig, source: Source, labels: np.ndarray, names: Sequence[str], in_chans: int
) -> EvaluationDataset:
    """Return samples of images to evaluate on, with their labels."""
    size = config.data.size
    view = Cover(size, config.data.crop_pct)
    return EvaluationDataset(source, labels, class_names=names, view=view, shape=(in_chans, *size))


# Networks


def build_classifier(config: Any, num_classes: int) -> Network:
    """Return an untrained dense network whose classifier has small weights.

    Raises:
        UserError: if there is no such network.
    """
    with blame("model"):
        model = build_network(**config.model.network, num_classes=num_classes)
    assert isinstance(model.classifier_layer, nn.Linear)
    with torch.no_grad():
        model.classifier_layer.weight.mul_(config.model.head_init_scale)
    return model


def start_network(
    network: Network,
    weights: Weights,
    source: str,
    *,
    head: Callable[[dict[str, Tensor], str], dict[str, Tensor]] | None,
) -> list[str]:
    """Load weights into a network, whose classifier begins anew unless `head` says how its own is trained.

    What stands at GRN's place may be another (V2 paper, table 2f): it begins anew then. The first layer is adapted
    to another number of channels.

    Args:
        head: (tensors, what the last layer is called) -> the tensors as they are trained; None for a new one.

    Returns:
        What was changed, for people.

    Raises:
        UserError: if the weights are another network's.
    """
    response = known_of(weights, ["model.response"]).get("model.response")
    own_response = network.arguments.get("response")
    changed = response != own_response
    require_network(network, weights, source, may_differ=("in_chans", *(("response", "grn") if changed else ())))
    tensors, adapted = adapt_channels(weights, network)

    def is_new(name: str) -> bool:
        return (head is None and name.startswith(f"{network.classifier}.")) or (changed and ".grn." in name)

    state = network.state_dict()
    own = {n: x for n, x in state.items() if n.startswith(network.head_names) or is_new(n)}
    taken = {
        n: x for n, x in tensors.items() if not is_new(n) and (n in state or not n.startswith(network.head_names))
    }
    load_network(network, own | (head(taken, network.classifier) if head else taken), weights.path)
    return [*([adapted] if adapted else []), *([f"{own_response} in place of {response}"] if changed else [])]


def describe_start(weights: Weights, head: str, keep: bool, done: Sequence[str]) -> str:
    """Say which weights a network starts from, whether with their head, and what else was done."""
    return ", ".join([f"{weights.path} ({weights.description})", f"{'its' if keep else 'a new'} {head}", *done])


# Scores


@torch.inference_mode()
def score_images(
    task: Task[Any],
    model: Network,
    normalize: PixelNormalizer,
    dataset: Evaluation,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Scores:
    """Score a network on all images of a set, spread over the processes, each counted once.

    Args:
        model: in evaluation mode.
        normalize: from pixels to what the network sees, on `device`.
        rank: of this process, which computes its share.
        world_size: number of processes.

    Raises:
        ValueError: if none of them could be read.
    """
    keys = one_pass(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size)
    batches = load_batches(dataset, keys, num_workers=num_workers, pin_memory=device.type == "cuda")
    hidden = rank != 0 or not sys.stderr.isatty()
    metric = task.metric(model.num_classes, device)
    bad: list[BadImage] = []
    for batch in tqdm(batches, "evaluating", len(keys), leave=False, dynamic_ncols=True, disable=hidden):
        bad += batch.bad
        batch = batch.to(device)
        # not a compiled network, which is compiled for training's shapes
        task.count(metric, model.forward, normalize(batch.images), batch)
    if bad:
        tqdm.write(f"not counted: {len(bad)} images that do not decode, the first {bad[0].name}: {bad[0].reason}")
    return metric.compute()
