"""Imports point one way (docs: layers at the bottom, scripts on top), read from the source without running it."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEVELS = (
    # lowest first; a module imports from lower levels, and from its own level where that makes no cycle
    ("errors", "patches", "masking", "config", "metrics", "scores"),
    ("encoder",),
    ("decoder",),
    ("loss", "model"),
    ("checkpoint", "convert", "data", "optim", "evaluate", "export", "diagnose", "visualize"),
    ("inference",),
    ("engine",),
    ("pretrain", "finetune", "cli", "install_minkowski", "__init__", "__main__"),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}

MODELS = {"encoder", "decoder", "loss", "model"}

ONLY_IN = {
    # package: the only parts that may import it; ours are named without "fcmae."
    "accelerate": {"engine", "pretrain", "finetune", "cli"},
    "argparse": {
        "pretrain",
        "finetune",
        "cli",
        "install_minkowski",
        "checkpoint",
    },  # whose old files hold Namespaces
    "timm": {"data", "engine", "export", "pretrain", "finetune"},  # augmentation; moving average; check; mixup
    "transformers": {"export"},
    "onnxruntime": {"export"},
    "tensorboard": {"engine", "pretrain", "finetune"},
    "pickle": set(),
    "MinkowskiEngine": {"encoder.minkowski"},
    "numba": {"ops.patch_depthwise_numba"},
}


def sources() -> dict[str, Path]:
    """Module name -> file, for the package and the scripts beside it."""
    package = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted((ROOT / "fcmae").rglob("*.py"))
    }
    scripts = {name: ROOT / f"{name}.py" for name in ("pretrain", "finetune")}
    named = {name.removesuffix(".__init__"): path for name, path in package.items()}
    return named | {name: path for name, path in scripts.items() if path.exists()}


@cache
def imports(module: str) -> frozenset[str]:
    """Full names of what a module imports anywhere, also inside functions; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(sources()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write the whole name"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def our_imports(module: str) -> set[str]:
    """The modules of fcmae that a module imports, names in them left out; the version is anybody's."""
    wanted = imports(module) - {"fcmae.__version__"}
    names = {name if name in sources() else name.rpartition(".")[0] for name in wanted}
    return {name for name in names if name == "fcmae" or name.startswith("fcmae.")}


def part(module: str) -> str:
    """fcmae.encoder.packed -> encoder; fcmae -> __init__; pretrain -> pretrain."""
    parts = module.removeprefix("fcmae").removeprefix(".").split(".")
    return parts[0] or "__init__"


MODULES = sorted(sources())


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_place(module: str) -> None:
    assert part(module) in LEVEL_OF, f"give {part(module)} a place in LEVELS (and in the design)"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    for target in our_imports(module):
        assert target in sources(), f"{module} imports {target}, which does not exist"
        assert LEVEL_OF[part(target)] <= LEVEL_OF[part(module)], f"{module} imports {target} from above"


def test_there_are_no_cycles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in our_imports(module):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_no_part_depends_on_itself_through_another() -> None:
    edges = {(part(m), part(t)) for m in MODULES for t in our_imports(m) if part(m) != part(t)}
    reaches = set(edges)
    while more := {(a, d) for a, b in reaches for c, d in edges if b == c} - reaches:
        reaches |= more
    assert not [a for a, b in reaches if a == b]


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    allowed = ONLY_IN[package]
    for module in MODULES:
        if any(name.split(".")[0] == package for name in imports(module)):
            assert {part(module), module.removeprefix("fcmae.")} & allowed, f"{module} imports {package}"


def test_the_data_know_no_models() -> None:
    for module in MODULES:
        if part(module) == "data":
            assert not {part(target) for target in our_imports(module)} & MODELS, module


def test_the_engine_does_not_know_which_model_it_trains() -> None:
    for module in MODULES:
        if part(module) == "engine":
            assert not {part(target) for target in our_imports(module)} & MODELS, module


def test_the_network_knows_nothing_of_sampling_files_or_training() -> None:
    for module in MODULES:
        if part(module) in {"encoder", "decoder"}:
            targets = imports(module)
            assert not {name for name in targets if "sample_visible_ids" in name}, module
            files = {"safetensors", "pathlib", "os", "json"} - (
                {"os"} if module == "fcmae.encoder.minkowski" else set()
            )
            assert not {name.split(".")[0] for name in targets} & files, module  # one undoes what its engine sets
        if part(module) in MODELS:
            assert not {name for name in imports(module) if name.startswith("torch.optim")}, module


def test_only_declared_packages_are_imported() -> None:
    known = {"torch", "torchvision", "accelerate", "einops", "numpy", "PIL", "pydantic", "yaml", "safetensors"}
    known |= {
        "numba",
        "tensorboard",
        "timm",
        "torchmetrics",
        "tqdm",
        "typing_extensions",
        "fcmae",
        "MinkowskiEngine",
    }
    optional = {"transformers", "onnx", "onnxruntime", "triton"}
    for module in MODULES:
        roots = {name.split(".")[0] for name in imports(module)}
        assert not roots - known - optional - sys.stdlib_module_names, module
