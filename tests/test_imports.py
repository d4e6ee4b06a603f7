"""Imports point one way, indirect ones too: read from the source, functions included, without running it."""

import ast
import itertools
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEVELS = (
    # A room imports from rooms on earlier lines and from itself; rooms on one line do not know each other.
    {"errors"},
    {"files", "plain_yaml", "seeding", "signals", "metrics", "patches", "masking", "hog"},
    {"tensors", "config"},
    {"ops"},
    {"encoder"},
    {"decoder", "heads"},
    {"loss"},
    {"model"},
    {"data", "weights", "training"},
    {"load"},
    {"visualize"},
    {"segment_pictures"},
    {"tasks", "evaluation"},
    {"story", "find_lr", "report"},
    {"recipe", "ablation", "doctor", "plan"},
    {"arguments"},
    {"pretrain", "finetune"},
    {"commands"},
    {"__main__", "__init__"},  # __init__ has the public names, for others: modules import from where a name lives
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

MODELS = {"fcmae.ops", "fcmae.encoder", "fcmae.decoder", "fcmae.loss", "fcmae.model"}
DISK = {"fcmae.files", "fcmae.tensors", "safetensors", "json", "pathlib"}
TRAINING = {"fcmae.masking.sample_visible_ids", "fcmae.masking.MaskSampler", "torch.optim", "accelerate", "timm"}

NEVER_REACHES = {
    # room: what no chain of our modules leads to from there, besides the rooms that are not below it
    "ops": DISK | TRAINING | {"fcmae.masking"},
    "encoder": DISK | TRAINING,
    "decoder": DISK | TRAINING,
    "heads": DISK | TRAINING,
    "model": {"fcmae.config", "torch.optim", "accelerate", "timm"},
    "data": MODELS - {"fcmae.ops"} | {"accelerate"},
    "weights": {"fcmae.loss", "fcmae.model", "accelerate"},
    "training": MODELS | {"torchvision", "PIL"},
    "load": {"accelerate"},
    "tasks": {"accelerate"},
    "evaluation": {"accelerate"},
    "visualize": {"accelerate"},
}

ONLY_IN = {
    # package: the only modules that import it, by pattern
    "accelerate": {"training.launch", "training.trackers", "training.trainer", "pretrain", "finetune"},
    "argparse": {
        "encoder.install_minkowski",
        "weights.*",
        "arguments",
        "finetune",
        "commands*",
        "__main__",
    },
    "timm": {
        "encoder.timm_networks",
        "decoder.transformer",
        "data.*",
        "weights.*",
        "training.*",
        "tasks.*",
        "evaluation.subjects",
        "finetune",
    },
    "matplotlib": {
        "evaluation.diagnose_pictures",
        "evaluation.stats_picture",
        "report.plots",
        "tasks.pictures",
        "ablation",
        "find_lr",
        "plan.picture",
        "visualize",
    },
    "transformers": {"weights.*"},
    "huggingface_hub": {"weights.card", "weights.hub"},
    "onnxruntime": {"weights.*"},
    "torch.utils.tensorboard": {"training.log"},
    "MinkowskiEngine": {"encoder.minkowski"},
    "MinkowskiEngineBackend": {"encoder.minkowski"},
    "numba": {"ops.*_numba"},
    "triton": {"ops.*_triton"},
    "filelock": {"data.cache", "data.kept"},
    "psutil": {"training.lock", "training.memory", "training.stop"},
    "pickle": set(),
}

WHEN_BUILT = {
    # package: modules for one network of many, which import it inside functions, or are imported so themselves;
    # that they lead to it does not count
    "timm": {"fcmae.decoder.transformer", "fcmae.encoder.timm_networks"},
}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "fcmae").rglob("*.py")
}
INSTALLER = "fcmae.encoder.install_minkowski"  # a command, which lives where its engine is used


def room(module: str) -> str:
    """fcmae.encoder.packed -> encoder; fcmae -> __init__."""
    return [*module.split("."), "__init__"][1]


def within(name: str, place: str) -> bool:
    """Whether a full name is this module's or package's, or of something in it."""
    return f"{name}.".startswith(f"{place}.")


@cache
def imports(module: str) -> frozenset[str]:
    """Full names of what a module imports anywhere; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(origin), names=names, level=0):
                found |= {f"{origin}.{alias.name}" for alias in names}
            case ast.ImportFrom():
                pytest.fail(f"{module} imports relatively: write the whole name")
            case ast.Call(
                func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found.add(name)
    return frozenset(found - {"fcmae.__version__"})  # which is anybody's


def our_imports(module: str) -> set[str]:
    """The modules of fcmae that a module imports by name."""
    names = {name for name in imports(module) if within(name, "fcmae")}
    return {name if name in SOURCES else name.rpartition(".")[0] for name in names}


def reaches(module: str) -> dict[str, str]:
    """Full name of all that a module imports through any chain of ours -> the last of the chain.

    A module runs the `__init__` of its packages first, but for that of fcmae, whose names load when asked for.
    """
    found, waiting, seen = {}, [module], set()
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            found |= dict.fromkeys(imports(here), here)
            package = here.rpartition(".")[0]
            waiting += [*our_imports(here), *({package} - {"", "fcmae"})]
    return found


def assert_none(broken: Iterable[str]) -> None:
    lines = sorted(broken)
    assert not lines, "\n".join(lines)


def test_modules_import_from_lower_rooms_and_their_own() -> None:
    placed = {name: LEVEL_OF[room(name)] for name in SOURCES}  # a room without a place wants one, in the design too
    edges = {(module, target) for module in SOURCES for target in our_imports(module)}
    assert_none(
        f"{module} imports {target}, which does not exist" for module, target in edges if target not in placed
    )
    assert_none(
        f"{module} imports {target}, which is not below it"
        for module, target in edges
        if room(module) != room(target) and placed[module] <= placed[target]
    )


def test_there_are_no_cycles() -> None:
    TopologicalSorter({module: our_imports(module) for module in SOURCES}).prepare()  # its error shows the cycle


@pytest.mark.parametrize("place", NEVER_REACHES)
def test_a_room_never_reaches_what_it_does_not_know(place: str) -> None:
    assert_none(
        f"{module} reaches {name} through {through}"
        for module in SOURCES.keys() - {INSTALLER}
        if room(module) == place
        for name, through in reaches(module).items()
        if any(within(name, other) for other in NEVER_REACHES[place])
        if through not in WHEN_BUILT.get(name.partition(".")[0], ())
    )


def imports_at_top(module: str, name: str) -> bool:
    """Whether a module imports a package or module, or from it, when it is itself imported."""
    nodes = [n for n in ast.parse(SOURCES[module].read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    origins = [[n.module or ""] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names] for n in nodes]
    return any(within(origin, name) for found in origins for origin in found)


@pytest.mark.parametrize("package", WHEN_BUILT)
def test_what_one_network_of_many_needs_is_imported_when_it_is_built(package: str) -> None:
    assert_none(
        f"{module} imports {package} at its top, and {other} imports {module} at its own"
        for module in WHEN_BUILT[package]
        if imports_at_top(module, package)
        for other in SOURCES
        if imports_at_top(other, module)
    )


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    users = {
        module.removeprefix("fcmae.") for module in SOURCES for name in imports(module) if within(name, package)
    }
    assert_none(user for user in users if not any(fnmatch(user, pattern) for pattern in ONLY_IN[package]))


def test_only_declared_packages_are_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][name] for name in ("export", "deep", "dicom", "nifti", "datasets"))
    requirements = [*project["dependencies"], *itertools.chain(*extras)]
    declared = {requirement.partition(">=")[0] for requirement in requirements}
    declared |= {"fcmae", "PIL", "yaml", "markupsafe", "triton", "MinkowskiEngine", "MinkowskiEngineBackend"}
    used = {name.split(".")[0] for module in SOURCES for name in imports(module)}
    assert not used - declared - sys.stdlib_module_names


ON_A_GPU = (
    *(ROOT / "fcmae" / f"{name}.py" for name in ("pretrain", "finetune")),
    *(ROOT / "fcmae" / "ops").glob("*_triton.py"),
    *(ROOT / "tests" / f"{name}.py" for name in ("conftest", "test_gpu", "test_graph", "test_ops", "test_step")),
    *(ROOT / "benchmarks" / f"{name}.py" for name in ("train_step", "profile_step")),
)
"""What runs where a GPU is lent, and nothing can be installed but a few wheels that are brought along."""

FOUND_THERE = {
    # an image for PyTorch has these
    *("torch", "filelock", "torchvision", "triton", "numpy", "PIL", "yaml", "tqdm", "psutil", "pytest"),
    # and, where networks are trained, these
    *("accelerate", "einops", "hypothesis", "numba", "safetensors", "timm", "torchmetrics"),
    "pydantic",  # brought along, with what it needs
}


def test_what_runs_on_a_lent_gpu_imports_no_package_that_is_not_there() -> None:
    """When it is imported, that is; what a function imports is wanted by those who call it."""
    folders = [ROOT, ROOT / "tests", ROOT / "benchmarks"]
    waiting, seen, packages = [*ON_A_GPU], set[Path](), dict[str, str]()
    while waiting:
        file = waiting.pop()
        seen.add(file)
        nodes = ast.parse(file.read_text()).body
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        for name in names:
            parts = name.split(".")
            places = [folder.joinpath(*parts[:n]) for folder in folders for n in range(1, len(parts) + 1)]
            ours = [path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")]
            if ours := [path for path in ours if path.exists()]:
                waiting += {*ours} - seen
            else:
                packages[parts[0]] = file.name
    assert len(seen) > 50
    used = packages.keys() - sys.stdlib_module_names
    assert_none(f"{packages[name]} imports {name}: import it where it is used" for name in used - FOUND_THERE)
    assert_none(f"{name} is imported no more" for name in FOUND_THERE - used)


@pytest.mark.parametrize(
    "program",
    [
        "import fcmae",
        "sys.argv = ['fcmae', '--help']; runpy.run_module('fcmae', run_name='__main__')",
        "sys.argv = ['fcmae.pretrain', *PRINT]; runpy.run_module('fcmae.pretrain', run_name='__main__')",
        "sys.argv = ['fcmae.finetune', *PRINT]; runpy.run_module('fcmae.finetune', run_name='__main__')",
        "sys.argv = ['pretrain.py', *PRINT]; runpy.run_path('pretrain.py', run_name='__main__')",
        "sys.argv = ['finetune.py', *PRINT]; runpy.run_path('finetune.py', run_name='__main__')",
        "sys.argv = ['pretrain.py', 'nowhere']; runpy.run_path('pretrain.py', run_name='__main__')",
    ],
    ids=["import", "help", "-m fcmae.pretrain", "-m fcmae.finetune", "pretrain.py", "finetune.py", "error"],
)
def test_torch_and_timm_load_only_when_something_is_computed(program: str) -> None:
    start = "import runpy, sys\nPRINT = ['--config', 'atto', '--print-config']"
    end = "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    program = f"{start}\ntry:\n  {program}\nexcept SystemExit: pass\n{end}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
