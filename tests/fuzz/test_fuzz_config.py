"""Any configuration, override or word is taken, or refused in one line; what is taken can be planned and built."""

import copy
import datetime
import math
import resource
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import fuzzed, run_main
from hypothesis import event, given
from hypothesis import strategies as st

from fcmae import arguments
from fcmae.ablation import Grid, stages_of
from fcmae.arguments import read_given
from fcmae.config import (
    EvaluateConfig,
    FinetuneConfig,
    FinetuneRecipe,
    PretrainConfig,
    PretrainRecipe,
    Recipe,
    RunConfig,
    Section,
    command_of,
    load_config,
    override_config,
    shipped_configs,
    to_yaml,
)
from fcmae.encoder.networks import is_other
from fcmae.errors import UserError, blame
from fcmae.model import FCMAE
from fcmae.patches import grid_shape
from fcmae.plain_yaml import read_yaml, write_value
from fcmae.recipe import Images, Machine, assignments, choose
from fcmae.tasks.base import build_classifier
from fcmae.training.memory import require_batch, require_memory
from fcmae.training.schedule import Plan

KINDS: dict[str, type[Section]] = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "ablate": Grid}
SHIPPED = {name: path.read_text() for name, path in shipped_configs().items()}
CPU = torch.device("cpu")
IMAGES, MACHINE = Images(13, 64, 3, (0.5,) * 3, (0.2,) * 3), Machine("a CPU", False, 2**33, False, 2)

# fmt: off
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 32, 224, 4096, 65_536, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, 10**99,
    0.5, 0.999, 1.0, 1.5, -0.0, 1e-9, 1e-320, 1e9, 1e300, 1e308, -1e308, float("inf"), float("nan"),
    "", " ", "no", "auto", "null", "1e5", "017", "1_0", "1:30", "2024-02-30", "<<", "=", "a: b", "#", "atto",
    "huge", "\0", "a\nb", "\x85", "\u2028", "\x7f", "\ud800", "😀", "ünï", "../..", "/", "a" * 300, "a/" * 3000,
    [], {}, [[]], [1], [0.5, 0.5], [32, 64], [224], [1, 1, 1], [0.5] * 3, [1] * 300, [[[[]]]], {"": 1}, {"a": {}},
    [[1, 1, 1, 1], [8, 8, 8, 8]], [[10**9] * 4, [8] * 4], [[1] * 4, [10**8] * 4], [[3] * 4, [-8] * 4], {1: 2},
    "rand-m9-mstd0.5-inc1", "timm/resnet50", "roadmap/gelu", "timm/", {"residual": False}, b"x", {1, 2}, (1, 2),
    datetime.date(2024, 2, 20), 2 + 1j,
]
"""Of all types and sizes, to stand where others are expected."""

RAW = [
    "!!int abc", "!!float x", "!!binary x", "!!timestamp x", "!!bool x", "!!python/name:os.system", "!x y", "! 1",
    "&a [*a]", "&a {<<: *a}", "*b", "{<<: {1: 2}}", "{<<: 1}", "{? [1] : 2}", "{? {a: 1}}", "{a: 1, a: 2}",
    "%YAML 9.9", "%YAML 1." + "9" * 5000, "--- 1\n--- 2", "...", "|", ">", "'", '"', "@", "`", "\t", "-", "?", ":",
    '"\\UFFFFFFFF"', '"\\U00110000"', '"\\ud800"', '"\\0"', '"\\x', "\x00", "\ufeff", "\udcff", "#", "~", "a #b",
    "9" * 5000, "-" + "9" * 99, "0x" + "f" * 5000, "1" + ":1" * 2000, "1" + ":1" * 2000 + ".5", "1e" + "9" * 50,
    "[" * 50, "[" * 3000, "{a: " * 50, "[" * 20 + "]" * 20, "- " * 50, "? " * 50, "a" * 5000, "[" + "1," * 9999,
    "[" + ",".join(f"&a{i} [{','.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12)) + "]",
]
"""Text that is no value in YAML, or none within bounds."""
# fmt: on


@cache
def keys_of(kind: type[Section]) -> list[str]:
    """Dotted keys of a kind of configuration, sections included."""

    def walk(section: type[Section], prefix: str) -> Iterator[str]:
        for attribute, field in section.model_fields.items():
            name = field.alias or attribute
            yield prefix + name
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from walk(field.annotation, f"{prefix}{name}.")

    return list(walk(kind, ""))


values = st.one_of(
    st.sampled_from(VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(-2, 99) | st.floats(), max_size=4),
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (dict or list, key or index) in nested values."""
    pairs = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else [])
    return [(tree, key) for key, _ in pairs] + [place for _, inside in pairs for place in places(inside)]


@st.composite
def mutated_values(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name of a shipped configuration, and its text with some values, keys and sections changed."""
    name = draw(st.sampled_from(sorted(SHIPPED)))
    tree = copy.deepcopy(yaml.safe_load(SHIPPED[name]))
    for _ in range(draw(st.integers(1, 3))):
        parent, key = draw(st.sampled_from(places(tree)))
        match draw(st.sampled_from(["change", "scale", "scale", "delete", "wrap", "rename", "copy"])):
            case "change":
                parent[key] = copy.deepcopy(draw(values))
            case "scale" if isinstance(parent[key], int | float):
                scaled = parent[key] * draw(st.sampled_from([1e-6, 0.1, 0.5, 2, 8, 1000, 1e6]))
                parent[key] = type(parent[key])(scaled)
            case "delete":
                del parent[key]
            case "wrap":
                parent[key] = {key: parent[key]} if draw(st.booleans()) else [parent[key]]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=5) | st.just(f"{key}{key}") | st.integers())] = parent.pop(key)
            case _:
                other, at = draw(st.sampled_from(places(tree)))
                parent[key] = copy.deepcopy(other[at])
        if not places(tree):
            break
    text = yaml.dump(tree, Dumper=yaml.Dumper, allow_unicode=draw(st.booleans()))
    return name, text.encode(errors="surrogatepass")


@st.composite
def mutated_text(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name of a shipped configuration, and its text with some lines and characters changed."""
    name = draw(st.sampled_from(sorted(SHIPPED)))
    text = "\n".join(line for line in SHIPPED[name].splitlines() if not line.startswith("#"))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.integers(0, 30))
        text = text[:start] + draw(st.sampled_from(RAW) | st.text(max_size=5)) + text[end:]
    return name, text.encode(errors="surrogatepass")


def refusal(error: UserError) -> None:
    """Hold that what a user sees is one line that can be read."""
    event("refused")
    line = str(error)
    assert len(line) < 1500
    assert len(line.splitlines()) == 1
    assert line.encode(errors="replace").strip()


def follow(config: RunConfig) -> None:
    """What a run does with its configuration before it takes memory."""
    assert type(config).model_validate(read_yaml(to_yaml(config))) == config
    if isinstance(config, Recipe):
        config = config.resolve({}, "a test")
    for samples, processes in ((1, 1), (1_281_167, 8)):
        plan = Plan.of(config, samples, processes)
        for step in (0, 1, plan.warmup_steps, plan.total_steps // 2, plan.total_steps):
            assert 0 <= plan.lr(step) < math.inf
        assert plan.steps_in(config.checkpoint.keep_every_epochs or 1) >= 1
        assert all(len(line) < 1000 for line in plan.concerns(config))
    require_batch(config.data, config.model.in_chans, CPU)
    variant = config.model.variant
    if is_other(variant) or (not isinstance(variant, str) and sum(variant[0]) > 50):
        return  # networks that take long to outline
    if isinstance(config, FinetuneConfig):
        with torch.device("meta"):
            model = build_classifier(config, config.model.num_classes or 1000)
    else:
        assert isinstance(config, PretrainConfig)
        if config.model.decoder_depth > 50:
            return
        settings: dict[str, Any] = {**config.model.model_dump(), "layout": "auto"}  # whose package may be missing
        with blame("model"), torch.device("meta"):
            model = FCMAE(**settings)
        with blame("data.image_size"):
            model.mask_sampler(grid_shape(config.data.size, model.patch_size))
    require_memory(config, model, CPU)


def try_file(kind: type[Section], path: Path, content: bytes, overrides: list[str]) -> bool:
    """Load a configuration and follow it; returns whether it was taken."""
    path.write_bytes(content)
    try:
        config = load_config(kind, path, overrides)
        if isinstance(config, Grid):
            stages_of(config, "grid", next(iter(config.arms)), config.seeds[0])
        else:
            assert isinstance(config, RunConfig)
            follow(config)
    except UserError as error:
        refusal(error)
        return False
    return True


@pytest.fixture(autouse=True)
def memory_is_bounded() -> Iterator[None]:
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 1e9


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@fuzzed(60, 3000)
@given(named_text=mutated_values())
def test_shipped_files_with_other_values_are_taken_or_refused_in_a_line(
    file: Path, named_text: tuple[str, bytes]
) -> None:
    name, content = named_text
    try_file(KINDS[command_of(name)], file, content, [])


@fuzzed(60, 2000)
@given(named_text=mutated_text())
def test_shipped_files_with_other_characters_are_taken_or_refused_in_a_line(
    file: Path, named_text: tuple[str, bytes]
) -> None:
    name, content = named_text
    try_file(KINDS[command_of(name)], file, content, [])


@fuzzed(100, 1500)
@given(content=st.binary(max_size=200) | st.text("[]{}:,-?&*!|>'\"%@`#~ \n\tab<=1.e", max_size=60).map(str.encode))
def test_any_bytes_are_taken_or_refused_in_a_line(file: Path, content: bytes) -> None:
    for kind in KINDS.values():
        try_file(kind, file, content, ["output=x"])


@st.composite
def arguments_of(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command, and KEY=VALUE for it."""
    command = draw(st.sampled_from([*KINDS, "evaluate", "recipe"]))
    known = keys_of({**KINDS, "evaluate": EvaluateConfig, "recipe": PretrainRecipe}[command])
    key = st.sampled_from(known) | st.text(max_size=8) | st.sampled_from(["a." * 3000, "model.", ".", "x" * 5000])
    text = st.one_of(values.map(_as_text), st.sampled_from(RAW), st.text(max_size=12))
    words = st.one_of(
        st.builds("{}={}".format, key, text), st.builds("{}={}".format, key, text), st.text(max_size=9)
    )
    return command, draw(st.lists(words, min_size=1, max_size=4))


def _as_text(value: Any) -> str:
    return write_value(value) if isinstance(value, str | int | float | list | None) else str(value)


@fuzzed(150, 3000)
@given(case=arguments_of())
def test_any_overrides_are_taken_or_refused_in_a_line(case: tuple[str, list[str]]) -> None:
    command, words = case
    try:
        if command == "evaluate":
            config = override_config(EvaluateConfig, {"data": {"root": "x"}}, words, "a test")
            require_batch(config.data, 3, CPU)
        elif command == "recipe":
            overrides = ["data.root=photos", *words]
            choices = choose(IMAGES, MACHINE, read_given(overrides))
            values = assignments([("output", "x"), *((key, value) for key, value, _ in choices)])
            follow(override_config(PretrainRecipe, values, overrides, "a test"))
        elif command == "ablate":
            grid = load_config(Grid, "cifar10-versions", words)
            stages_of(grid, "grid", next(iter(grid.arms)), grid.seeds[0])
        else:
            config = load_config(KINDS[command], "atto", words)
            assert isinstance(config, RunConfig)
            follow(config)
    except UserError as error:
        refusal(error)


@fuzzed(40, 500)
@given(
    command=st.sampled_from(["pretrain", "finetune"]),
    words=st.lists(st.text(max_size=9) | st.sampled_from(RAW), max_size=3),
)
def test_any_words_end_a_command_with_0_or_2(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main = {"pretrain": arguments.pretrain, "finetune": arguments.finetune}[command]
    given = [word.replace("\0", "") for word in words]  # which no argument of a process can have
    code = run_main(main, "--print-config", "--config", "atto", "output=x", "data.root=y", *given)
    out, err = capsys.readouterr()
    assert code in (0, 2)
    assert "Traceback" not in err
    assert len(err) < 3000
    if code == 2:
        assert err.startswith("usage: ") or len(err.splitlines()) == 1
    elif not {"-h", "--help"} & set(given):
        assert yaml.safe_load(out)
