"""Configuration: every shipped file is complete and true, and mistakes are reported in one line."""

import os
from pathlib import Path

import pytest
import yaml

from fcmae import VARIANTS
from fcmae.config import (
    LAUNCHES,
    FinetuneConfig,
    FinetuneRecipe,
    ImageConfig,
    PretrainConfig,
    PretrainRecipe,
    Recipe,
    RunConfig,
    SegmentationConfig,
    command_of,
    load_config,
    parse_config,
    shipped_configs,
    to_yaml,
)
from fcmae.errors import UserError
from fcmae.plain_yaml import write_value
from fcmae.training.schedule import Plan

ROOT = Path(__file__).parent.parent
V2_VARIANTS = [name for name in VARIANTS if name not in ("small", "xlarge")]  # which are of V1 alone
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != LAUNCHES)
SHIPPED_KINDS = [
    ({"finetune": FinetuneRecipe, "pretrain": PretrainRecipe}[task], path)
    for name, path in shipped_configs().items()
    if (task := command_of(name)) != "ablate"
]
RUNS = [path for _, path in SHIPPED_KINDS]
AUTOS = ("auto", "auto")
MINIMAL = "output: runs/x\nmodel: {variant: atto}\ndata: {root: images}\n"


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def dotted_dict(values: dict[str, object], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, value in values.items():
        keys |= dotted_dict(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return keys


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(PretrainConfig, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("kind", "path"), SHIPPED_KINDS, ids=[str(path.relative_to(ROOT)) for path in RUNS])
def test_every_shipped_config_parses_and_leaves_out_no_key(kind: type[RunConfig], path: Path) -> None:
    config = load_config(kind, path)
    assert dotted_dict(yaml.safe_load(path.read_text())) == dotted_dict(config.model_dump())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_begins_with_command_hardware_time_and_result(path: Path) -> None:
    header = [line for line in path.read_text().split("\n\n", 1)[0].splitlines() if line.startswith("#")]
    text = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert header
    assert f"{'--config' if path in RUNS else 'fcmae ablate'} {path.relative_to(ROOT)}" in text
    for word in ("hardware", "time", "result"):
        assert f"\n# {word} " in text


@pytest.mark.parametrize(("kind", "path"), SHIPPED_KINDS, ids=[str(path.relative_to(ROOT)) for path in RUNS])
def test_every_recipes_learning_rate_peaks_where_others_do(kind: type[RunConfig], path: Path) -> None:
    config = load_config(kind, path)
    peak = Plan.of(config, 1_000_000, 8 if "8 GPUs, as written" in path.read_text() else 1).peak_lr
    frozen = getattr(config.train, "freeze_encoder", False)
    least = 1e-4 if path.stem.startswith("upernet") else 5e-4
    assert least - 1e-9 <= peak <= (2e-2 if frozen else 4e-3)


def test_there_is_an_imagenet_recipe_for_each_variant() -> None:
    for name in V2_VARIANTS:
        config = load_config(PretrainRecipe, ROOT / "configs" / "pretrain" / f"{name}.yaml")
        assert config.model.variant == name
        assert config.data.size == (224, 224)
        assert (config.optim.images_per_update, config.data.batch_size, config.optim.accumulate) == (4096, *AUTOS)
        assert (config.optim.base_lr, config.optim.weight_decay, config.optim.betas) == (1.5e-4, 0.05, (0.9, 0.95))
        assert config.model.norm_pix_loss
        assert config.optim.clip_grad is None


def test_shipped_configs_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "atto").mkdir()  # a folder is no configuration
    assert set(shipped_configs().values()) == set(SHIPPED)
    for kind, task in ((PretrainRecipe, "pretrain"), (FinetuneRecipe, "finetune")):
        for name in ("atto", f"{task}/atto"):
            assert load_config(kind, name) == load_config(kind, ROOT / "configs" / task / "atto.yaml")
    assert load_config(PretrainConfig, "quickstart") == load_config(
        PretrainConfig, ROOT / "configs/quickstart.yaml"
    )


def test_a_file_comes_before_a_shipped_config_of_its_name(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    minimal.rename("tiny")
    assert load_config(PretrainConfig, "tiny").output == "runs/x"


@pytest.mark.parametrize(
    ("kind", "name", "parts"),
    [
        (PretrainConfig, "ato", ["did you mean pretrain/atto?"]),
        (PretrainConfig, "configs/pretrain/tny.yaml", ["did you mean pretrain/tiny"]),
        (FinetuneConfig, "linear_probe", ["did you mean finetune/linear-probe?"]),
        (PretrainConfig, "finetune/atto", ["not for fcmae pretrain, but for fcmae finetune"]),
        (FinetuneConfig, "quickstart", ["not for fcmae finetune"]),
        (PretrainConfig, "ablations/cifar10-grn", ["not for fcmae pretrain, but for fcmae ablate"]),
        (PretrainConfig, "zzz", ["no file, nor a shipped configuration; 'fcmae configs' lists them"]),
    ],
)
def test_an_unknown_name_is_reported_with_those_like_it(kind: type[RunConfig], name: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(kind, name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"--config {name}: ")
    assert all(part in message for part in parts), message


FINETUNING = {
    # variant: base_lr, weight decay, layer decay and type, warm-up, epochs, smoothing, mixup, cutmix, drop path
    "atto": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0, 0, 0.1),
    "femto": (2e-4, 0.05, 0.9, "single", 0, 600, 0.2, 0.3, 0.3, 0),
    "pico": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.3, 0.3, 0),
    "nano": (2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.5, 0.5, 0.1),
    "tiny": (8e-4, 0.05, 0.9, "single", 40, 300, 0.1, 0.8, 1, 0.2),
    "base": (6.25e-4, 0.05, 0.6, "group", 20, 100, 0.1, 0.8, 1, 0.1),
    "large": (6.25e-4, 0.05, 0.6, "group", 20, 100, 0.1, 0.8, 1, 0.2),
    "huge": (1.25e-4, 0.05, 0.75, "single", 10, 50, 0.1, 0.8, 1, 0.3),
}
"""Paper, tables 9 to 11; the learning rates of the three largest are the official code's."""


@pytest.mark.parametrize("name", V2_VARIANTS)
def test_there_is_a_finetuning_recipe_of_the_paper_for_each_variant(name: str) -> None:
    recipe = load_config(FinetuneRecipe, ROOT / "configs" / "finetune" / f"{name}.yaml")
    config = recipe.resolve({}, "a test")
    assert isinstance(config, ImageConfig)
    assert (config.data.size, config.model.in_chans, config.model.stem_stride) == ((224, 224), 3, 4)
    data, optim, train = config.data, config.optim, config.train
    assert (
        optim.base_lr,
        optim.weight_decay,
        optim.layer_decay,
        optim.layer_decay_type,
        optim.warmup_epochs,
        train.epochs,
        train.label_smoothing,
        data.mixup,
        data.cutmix,
        config.model.drop_path,
    ) == FINETUNING[name]
    assert config.model.variant == name
    assert config.init_from == load_config(PretrainRecipe, ROOT / "configs" / "pretrain" / f"{name}.yaml").output
    assert (optim.images_per_update, recipe.data.batch_size, recipe.optim.accumulate) == (1024, *AUTOS)
    assert (optim.betas, optim.min_lr, optim.clip_grad) == ((0.9, 0.999), 1e-6, None)
    assert (train.ema_decay, config.model.head_init_scale) == (0.9999, 0.001)
    assert (data.auto_augment, data.erase_prob, data.crop_pct) == ("rand-m9-mstd0.5-inc1", 0.25, 0.875)
    assert config.evaluates_ema


@pytest.mark.parametrize(("name", "drop_path"), [("tiny", 0.1), ("small", 0.4), ("base", 0.5), ("large", 0.5)])
def test_there_is_a_recipe_of_the_v1_paper_for_each_of_its_sizes(name: str, drop_path: float) -> None:
    """V1 paper, table 5."""
    recipe = load_config(FinetuneRecipe, ROOT / "configs" / "finetune" / f"v1-{name}.yaml")
    config = recipe.resolve({}, "a test")
    assert isinstance(config, ImageConfig)
    data, optim, train = config.data, config.optim, config.train
    assert (config.model.variant, config.model.version, config.init_from) == (name, 1, None)
    assert (config.model.drop_path, config.model.head_init_scale) == (drop_path, 1)
    assert (optim.base_lr * 4096 / 256, optim.min_lr, optim.weight_decay, optim.betas) == (
        4e-3,
        1e-6,
        0.05,
        (0.9, 0.999),
    )
    assert (optim.images_per_update, recipe.data.batch_size, recipe.optim.accumulate) == (4096, *AUTOS)
    assert (optim.layer_decay, optim.clip_grad, optim.warmup_epochs, train.epochs) == (1, None, 20, 300)
    assert (data.auto_augment, data.erase_prob, data.mixup, data.cutmix) == ("rand-m9-mstd0.5-inc1", 0.25, 0.8, 1)
    assert (train.label_smoothing, train.ema_decay, data.size, data.crop_pct) == (0.1, 0.9999, (224, 224), 0.875)


def test_the_v2_papers_baseline_differs_from_its_recipe_in_version_and_epochs() -> None:
    ours, v2 = (
        load_config(PretrainRecipe, ROOT / "configs" / "pretrain" / f"{name}.yaml") for name in ("v1-base", "base")
    )
    changed = {"output": ours.output, "model": ours.model, "train": ours.train}
    assert (ours.model.version, ours.train.epochs) == (1, 800)
    assert v2.model_copy(update=changed) == ours
    assert ours.model.model_copy(update={"version": 2}) == v2.model


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["model.in_chans=4", "data.mean=[0,0,0,0]", "data.std=[1,1,1,1]"],
            ["data.auto_augment=null", "in_chans is 4"],
        ),
        (["data.batch_size=5", "data.mixup=0.8"], ["data.batch_size=5 is odd"]),
        (["eval.ema=true"], ["train.ema_decay"]),
        (["data.label_fraction=0"], ["data.label_fraction", "greater than 0"]),
        (["optim.layer_decay_type=double"], ["optim.layer_decay_type", "'single' or 'group'"]),
        (["data.mix_up=1"], ["did you mean 'data.mixup'?"]),
        (["model.mask_ratio=0.5"], ["model.mask_ratio", "unknown key"]),
    ],
)
def test_wrong_values_of_finetuning_are_reported_in_one_line(
    minimal: Path, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(FinetuneRecipe, minimal, overrides)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.mixup=0.8"], ["argument data.mixup: is for whole images; leave it out"]),
        (["data.labels=x.csv"], ["data.labels: is for whole images"]),
        (["data.crop_pct=1"], ["data.crop_pct: is for whole images"]),
        (["train.label_smoothing=0"], ["train.label_smoothing: is for whole images"]),
        (["data.strid=1"], ["data.strid: unknown key: did you mean 'data.stride'?"]),
        (["data.image_size=64", "data.stride=65"], ["stride=65 leaves gaps between windows of 64"]),
        (["data.scale=[2,0.5]"], ["data", "scale must be two factors"]),
        (["data.ignore_index=65536"], ["data.ignore_index", "less than or equal to 65535"]),
        (["data.val_mask_root=x"], ["set mask_root, or val_root, too"]),
        (["data.name=arrays", "data.mask_root=x"], ["arrays have masks.npy beside them"]),
        (["model.head=unet"], ["model.head", "'fpn' or 'upernet'"]),
        (
            ["model.in_chans=3", "visualize.bands=[0,1,3]"],
            ["visualize.bands=[0, 1, 3]: the images have 3 channels"],
        ),
        (["task=detection"], ["task", "'segmentation', got 'detection'"]),
    ],
)
def test_wrong_values_of_segmentation_are_reported_in_one_line(
    minimal: Path, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(FinetuneRecipe, minimal, ["task=segmentation", *overrides])
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("override", ["data.stride=8", "data.mask_root=x", "model.head=fpn", "train.dice=1"])
def test_keys_of_segmentation_are_refused_for_tasks_of_whole_images(minimal: Path, override: str) -> None:
    for task in ("classification", "multilabel", "regression"):
        with pytest.raises(UserError, match=f"{override.partition('.')[0]}.*: is for task=segmentation"):
            load_config(FinetuneRecipe, minimal, [f"task={task}", override])


def test_the_task_decides_the_kind_of_a_configuration_and_of_its_recipe(minimal: Path) -> None:
    for task, kind in (("segmentation", SegmentationConfig), ("regression", ImageConfig)):
        given = [f"task={task}", "train.label_smoothing=0"] if kind is ImageConfig else [f"task={task}"]
        config = load_config(FinetuneRecipe, minimal, given).resolve({}, "a test")
        assert type(config) is kind
        assert parse_config(FinetuneConfig, config.model_dump(mode="json"), "a test") == config


@pytest.mark.parametrize("kind", [PretrainRecipe, FinetuneRecipe])
def test_what_is_auto_of_batches_needs_the_images_of_an_update(minimal: Path, kind: type[RunConfig]) -> None:
    for key in ("data.batch_size", "optim.accumulate"):
        with pytest.raises(UserError, match=f"{key}=auto: follows from optim.images_per_update, which is null"):
            load_config(kind, minimal, [f"{key}=auto"])
        config, usual = (load_config(kind, minimal, a) for a in ([f"{key}=auto", "optim.images_per_update=96"], []))
        assert isinstance(config, Recipe)
        assert isinstance(usual, Recipe)
        assert config.automatic == usual.automatic, "which init_from knows nothing of"
        resolved = config.resolve({}, "a test")
        assert (resolved.data.batch_size, resolved.optim.accumulate) == (64, 1), "until they are chosen"
        assert Plan.of(config, 960, 4).total_steps == config.train.epochs * 10


def test_auto_stands_for_what_is_known_else_for_the_default_and_values_given_win(minimal: Path) -> None:
    given = ["model.variant=auto", "model.stem_stride=auto", "data.std=[0.5]", "model.in_chans=1"]
    recipe = load_config(FinetuneRecipe, minimal, [*given, "data.mean=auto"])
    known = {"model.variant": "pico", "model.in_chans": 2, "data.mean": (0.3,), "data.std": (9.0,)}
    config = recipe.resolve(known, "a test")
    assert type(config) is ImageConfig
    assert (config.model.variant, config.model.in_chans, config.model.stem_stride) == ("pico", 1, 4)
    assert (config.data.mean, config.data.std, config.data.size) == ((0.3,), (0.5,), (224, 224))
    network = [f"model.{key}" for key in ("variant", "version", "response", "grn", "stem_stride")]
    known = ["data.nodata", "data.window", "data.image_size", "data.mean", "data.clip"]
    assert recipe.automatic == [*network, *known]
    assert load_config(FinetuneRecipe, minimal, given).model_dump() == recipe.model_dump()


def test_statistics_of_pretraining_may_be_auto_and_auto_of_the_network_stays(minimal: Path) -> None:
    recipe = load_config(PretrainRecipe, minimal, ["data.mean=auto", "data.std=auto", "data.clip=auto"])
    assert recipe.automatic == ["data.mean", "data.std", "data.clip"]
    known = {"data.mean": (0.1, 0.2, 0.3), "data.std": (1.0, 2.0, 3.0), "data.clip": ((0.0,) * 3, (1.0,) * 3)}
    config = recipe.resolve(known, "a test")
    assert type(config) is PretrainConfig
    assert (config.data.mean, config.data.std, config.data.clip) == tuple(known.values())
    assert (config.model.response, config.model.layout) == ("auto", "auto")
    plain = load_config(PretrainRecipe, minimal)
    assert plain.automatic == []
    assert plain.resolve({}, "a test") == load_config(PretrainConfig, minimal)
    with pytest.raises(UserError, match=r"argument data\.mean: .*got 'auto'"):
        load_config(PretrainConfig, minimal, ["data.mean=auto"])
    with pytest.raises(UserError, match=r"^STATS: data\.mean has 2 values, but model\.in_chans is 3"):
        recipe.resolve({"data.mean": (0.1, 0.2)}, "STATS")


def test_auto_without_anything_to_start_from_is_reported(minimal: Path) -> None:
    with pytest.raises(UserError, match=r"model\.variant=auto: .* init_from, which is null; set model\.variant"):
        load_config(FinetuneRecipe, minimal, ["model.variant=auto"]).resolve({}, "a test")
    with pytest.raises(UserError, match=r"^somewhere: data\.mean has 3 values, but model\.in_chans is 1"):
        load_config(FinetuneRecipe, minimal, ["model.in_chans=1"]).resolve({}, "somewhere")
    for override in ("model.in_chans=some", "data.mean=automatic", "model.stem_stride=3"):
        with pytest.raises(UserError, match=f"^argument {override.partition('=')[0]}: "):
            load_config(FinetuneRecipe, minimal, [override])


def test_the_ema_counts_where_there_is_one_unless_the_config_says_otherwise(minimal: Path) -> None:
    assert not load_config(FinetuneConfig, minimal).evaluates_ema
    assert load_config(FinetuneConfig, minimal, ["train.ema_decay=0.9"]).evaluates_ema
    assert not load_config(FinetuneConfig, minimal, ["train.ema_decay=0.9", "eval.ema=false"]).evaluates_ema


def test_yaml_numbers_in_scientific_notation_are_numbers(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "optim: {base_lr: 1e-4, min_lr: 1.5E-6, betas: [9e-1, .95e0]}\n")
    config = load_config(PretrainConfig, minimal, ["optim.weight_decay=5e-2", "train.max_steps=1e3"])
    assert config.optim.base_lr == 1e-4
    assert config.optim.min_lr == 1.5e-6
    assert config.optim.betas == (0.9, 0.95)
    assert config.optim.weight_decay == 0.05
    assert config.train.max_steps == 1000


def test_the_word_no_stays_a_word(minimal: Path) -> None:
    assert load_config(PretrainConfig, minimal, ["train.precision=no"]).train.precision == "no"


def test_overrides_win_over_the_file_and_the_last_over_the_first(minimal: Path) -> None:
    config = load_config(PretrainConfig, minimal, ["data.image_size=[96, 160]", "output=a", "output=b=c"])
    assert config.data.size == (96, 160)
    assert config.output == "b=c"


def test_a_printed_config_reads_back_equal(minimal: Path, tmp_path: Path) -> None:
    overrides = ["model.variant=[[1,2,3,4],[8,16,24,32]]", "optim.base_lr=1e-5", "train.precision=no"]
    config = load_config(PretrainConfig, minimal, overrides)
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(PretrainConfig, tmp_path / "printed.yaml") == config


def test_configs_are_frozen(minimal: Path) -> None:
    config = load_config(PretrainConfig, minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.output = "elsewhere"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("optim.base_rl=1", "optim.base_lr"),
        ("optm.base_lr=1", "optim"),
        ("base_lr=1", "optim.base_lr"),
        ("model.mask_ration=0.5", "model.mask_ratio"),
        ("resme=auto", "resume"),
        ("data.img_size=32", "data.image_size"),
        ("optim.lr=1", "optim.base_lr"),
        ("lr=1", "optim.base_lr"),
        ("optim.learning_rate=1", "optim.base_lr"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(minimal: Path, override: str, suggestion: str) -> None:
    message = error_of(minimal, override)
    assert "unknown key" in message
    assert f"did you mean '{suggestion}'?" in message


def test_every_key_is_refused_with_itself_as_suggestion_when_a_letter_is_doubled(minimal: Path) -> None:
    for key in dotted_dict(load_config(PretrainConfig, minimal).model_dump()):
        assert f"did you mean '{key}'?" in error_of(minimal, f"{key}{key[-1]}=1")


def test_unknown_keys_in_the_file_name_the_file(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "optim: {base_rl: 1}\n")
    assert error_of(minimal).startswith(f"{minimal}: optim.base_rl: unknown key: did you mean 'optim.base_lr'?")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.mask_ratio=1.0", ["model.mask_ratio", "less than 1", "got 1.0"]),
        ("model.mask_ratio=0", ["model.mask_ratio", "greater than 0"]),
        ("model.stem_stride=3", ["model.stem_stride", "1, 2 or 4"]),
        ("data.image_size=[1,2,3]", ["data.image_size", "[1, 2, 3]"]),
        ("data.batch_size=0", ["data.batch_size", "greater than or equal to 1"]),
        ("data.crop_scale=[0.5,0.2]", ["crop_scale"]),
        ("data.std=[1,1,0]", ["data.std", "greater than"]),
        ("data.clip=[1,0]", ["data", "clip must be [least, most], least below most"]),
        ("data.clip=[0,[1,1,0]]", ["clip must be [least, most], least below most"]),
        ("data.clip=[0,[1,1]]", ["clip must be", "or, as mean, 3: one per channel"]),
        ("model.in_chans=5", ["data.mean has 3 values", "model.in_chans is 5"]),
        ("model.layout=dense", ["model.layout", "'auto', 'masked', 'packed' or 'minkowski'"]),
        ("train.epochs=.nan", ["train.epochs"]),
        ("train.epochs=.inf", ["train.epochs"]),
        ("model.variant=[[1,2],[3,4]]", ["model.variant"]),
        ("data=3", ["data"]),
        ("data.root.x=3", ["'root' is a value, not a section"]),
        ("optim.base_lr=[1", ["not valid YAML"]),
        ("nonsense", ["expected key=value"]),
    ],
)
def test_wrong_values_are_reported_in_one_line_with_the_key(minimal: Path, override: str, parts: list[str]) -> None:
    message = error_of(minimal, override)
    for part in parts:
        assert part in message


BOMB = "[" + ",".join(f"&a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12)) + "]"
"""Aliases of aliases, 9^12 values in all."""


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.seed=!!int abc", ["tag", "line 1, column 1"]),
        ("train.seed=" + "9" * 5000, ["train.seed", "999...999"]),
        ("train.seed=18446744073709551616", ["train.seed", "less than 18446744073709551616"]),
        ("train.seed=1e300", ["train.seed"]),
        ("data.mean=" + "[" * 2000, ["more than 20 sections or lists in each other"]),
        (".".join(["a"] * 2000) + "=1", ["unknown key"]),
        (f"model.variant={BOMB}", ["more than 10000 values, those of aliases counted at each"]),
        ("data.mean=[" + "1," * 60_000, ["longer than a configuration is"]),
        ("model=&a {<<: *a}", ["a value that holds itself"]),
        ("model={1: 2}", ["a key that is no word"]),
        ("model={<<: {1: 2}}", ["a key that is no word"]),
        ('output="\\UFFFFFFFF"', ["not valid YAML"]),
        ("optim.warmup_epochs=1e308", ["optim.warmup_epochs", "less than or equal to 1000000000"]),
        ("train.epochs=1e300", ["train.epochs"]),
        ("data.batch_size=1000000000", ["data.batch_size", "1000000"]),
        ("data.image_size=1000000", ["data.image_size", "65536"]),
        ("model.decoder_dim=100000000", ["model.decoder_dim", "65536"]),
        ("model.variant=[[1000000000,1,1,1],[8,8,8,8]]", ["model.variant", "300"]),
        ("model.in_chans=1000000000", ["model.in_chans", "4096"]),
        ('data.root="a\\0b"', ["data.root", r"has the control character '\x00'"]),
        ('output="a\\nb"', ["output", r"has the control character '\n'"]),
        ('output="\\ud800"', ["output"]),
        ("output=" + "a" * 256, ["output", "longer than the 255 bytes"]),
        ("output=", ["has no value; output=null for none"]),
        ("init_from=", ["has no value; init_from=null for none"]),
        ("init_from=#x", ["has no value"]),
        ('init_from=""', ["init_from", "at least 1 character"]),
    ],
)
def test_what_is_beyond_all_bounds_is_reported_in_one_short_line(
    minimal: Path, override: str, parts: list[str]
) -> None:
    message = error_of(minimal, override)
    assert len(message) < 600
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("data.crop_pct=1e-9", "data.crop_pct: input should be greater than or equal to 0.1"),
        ("data.crop_padding=32", "crop_padding=32 must be less than image_size=32"),
        ("data.val_root=", "data.val_root=null for none"),
    ],
)
def test_what_is_beyond_all_bounds_of_finetuning_is_reported(minimal: Path, override: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        load_config(FinetuneRecipe, minimal, ["data.image_size=[32,64]", override])


def test_dates_times_and_words_of_older_yaml_are_text(minimal: Path) -> None:
    for text in ("2024-02-30", "2024-02-20", "1:30", "yes", "0x10", "="):
        assert load_config(PretrainConfig, minimal, [f"output={text}"]).output == text


def test_text_that_looks_like_a_number_or_null_survives_printing(minimal: Path, tmp_path: Path) -> None:
    for text in ("1e5", "null", "017", "1_0", "true", "a: b", "😀", "é" * 60 + " " + "x" * 60, "2024-02-20"):
        config = load_config(PretrainConfig, minimal, [f"output={write_value(text)}"])
        assert config.output == text
        (tmp_path / "printed.yaml").write_text(to_yaml(config))
        assert load_config(PretrainConfig, tmp_path / "printed.yaml") == config


def test_aliases_and_merge_keys_serve_within_bounds(minimal: Path) -> None:
    minimal.write_text(
        "output: x\nmodel: {variant: atto}\ndata: &d {root: a, mean: &m [0.5, 0.5, 0.5], std: *m}\n"
        "eval: {<<: {val_split: test}, val_root: b}\n"
    )
    config = load_config(PretrainConfig, minimal)
    assert config.data.std == (0.5, 0.5, 0.5)
    assert (config.eval.val_split, config.eval.val_root) == ("test", "b")


def test_what_is_no_file_of_text_is_neither_waited_for_nor_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)  # takes no space
    for place, reason in (
        ("/dev/zero", "device"),
        (tmp_path / "pipe", "pipe"),
        (tmp_path / "large", "longer than"),
    ):
        assert reason in error_of(Path(place))
    for name in (tmp_path, Path("a" * 5000), Path("a\0b"), Path("a\nb")):
        assert "no file, nor a shipped configuration" in error_of(name)


def test_wrong_files_are_reported_in_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert str(missing) in error_of(missing)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: }")
    assert "not valid YAML" in error_of(broken)
    broken.write_text("- a\n- b\n")
    assert "expected sections" in error_of(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in error_of(broken)
    broken.write_text("output: a\noutput: b\n")
    assert "'output' given twice" in error_of(broken)
    broken.write_text("output: a\n")
    assert "missing" in error_of(broken)


@pytest.mark.parametrize(
    ("given", "loggers"),
    [("wandb", ("wandb",)), ("[]", ()), ("[tensorboard, mlflow]", ("tensorboard", "mlflow"))],
)
def test_log_with_takes_one_logger_or_several_or_none_and_is_written_by_its_name(
    minimal: Path, tmp_path: Path, given: str, loggers: tuple[str, ...]
) -> None:
    config = load_config(PretrainConfig, minimal, [f"log.with={given}"])
    assert config.log.loggers == loggers
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert "  with: [" in (tmp_path / "written.yaml").read_text()
    assert load_config(PretrainConfig, tmp_path / "written.yaml") == config
