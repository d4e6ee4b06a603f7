"""The reference as Markdown: configuration keys from the models, options from the parsers; knows nothing of mkdocs.

`python docs/site/reference.py` writes the JSON schemas in docs/schema, which editors complete and check files by.
"""

import argparse
import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import BaseModel

import fcmae
from fcmae import ablation, config
from fcmae.__main__ import COMMANDS
from fcmae.commands.configs import PURPOSES, purpose
from fcmae.config import command_of, shipped_configs

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "docs" / "schema"


class Kind(NamedTuple):
    """A page of keys."""

    model: type[BaseModel]
    title: str
    what: str


KINDS = {
    "pretrain": Kind(config.PretrainRecipe, "Keys of pretraining", "`fcmae pretrain`"),
    "finetune": Kind(
        config.ImageRecipe,
        "Keys of fine-tuning",
        "`fcmae finetune` with `task=classification`, `multilabel` or `regression`",
    ),
    "segmentation": Kind(
        config.SegmentationRecipe, "Keys of segmentation", "`fcmae finetune` with `task=segmentation`"
    ),
    "evaluate": Kind(config.EvaluateConfig, "Keys of evaluation", "`fcmae evaluate`, as `key=value`"),
    "ablate": Kind(ablation.Grid, "Keys of ablations", "`fcmae ablate`; an arm's are of each of `arms`"),
}
"""By page."""


# Keys


class Key(NamedTuple):
    """A key of a configuration."""

    name: str
    """Dotted."""
    schema: Mapping[str, Any]
    """Of its value, as JSON schema."""
    default: str
    """As in YAML, or that it is required."""
    text: str
    """Its docstring."""


@cache
def docstrings(module: ModuleType) -> dict[tuple[str, str], str]:
    """Return what stands below the fields of a module's classes, by class and field."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for field, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    found[node.name, ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def describe(model: type[BaseModel], field: str) -> str:
    """Return the docstring of a model's field, its own or that of the class it inherits it from."""
    for kind in model.__mro__:
        module = inspect.getmodule(kind)
        if module in (config, ablation) and (text := docstrings(module).get((kind.__name__, field))):
            return " ".join(text.split())
    return ""


def sections_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the dotted name and class of a model and of all models in it."""
    yield prefix, model
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from sections_of(kind, f"{prefix}.{name}".lstrip("."))


def about(model: type[BaseModel]) -> str:
    """Return what a section is for: the docstring that is not of how it differs from another class."""
    docs = (inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0] for kind in model.__mro__)
    return next(doc for doc in docs if doc and not doc.startswith(("As ", "What users")))


def as_yaml(value: Any) -> str:
    """Write a value as it stands in a configuration."""
    return value if isinstance(value, str) else json.dumps(value)


def keys_of(model: type[BaseModel], prefix: str) -> list[Key]:
    """Return the keys of one section, those that are sections themselves left out."""
    properties = model.model_json_schema()["properties"]
    keys = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if "$ref" not in (value := properties[key]):
            default = "required" if field.is_required() else f"`{as_yaml(value.get('default', {}))}`"
            keys.append(Key(f"{prefix}.{key}".lstrip("."), value, default, describe(model, name)))
    return keys


def between(schema: Mapping[str, Any]) -> str:
    """Say in words what numbers are allowed."""
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if least is not None and most is not None and most < 1e6:
        return f"from {least:,} to {most:,}"
    words = [
        *([f"at least {least:,}"] if least is not None else []),
        *([f"above {above:,}"] if above is not None else []),
        *([f"at most {most:,}"] if most is not None and most < 1e6 else []),
        *([f"below {below:,}"] if below is not None and below < 1e6 else []),
    ]
    return " and ".join(words)


def type_of(schema: Mapping[str, Any]) -> str:
    """Say in words what a value may be."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_of(branch) for branch in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return ", ".join(
            f"`{json.dumps(value).strip(chr(34))}`" for value in schema.get("enum", [schema.get("const")])
        )
    match schema.get("type"):
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "text"
        case "array" if "prefixItems" in schema:
            items = [type_of(item) for item in schema["prefixItems"]]
            return f"{len(items)} of: {items[0]}" if len({*items}) == 1 else f"[{', '.join(items)}]"
        case "array":
            return f"list of: {type_of(schema['items'])}"
        case "integer" | "number" as kind:
            return " ".join(filter(None, ("whole number" if kind == "integer" else "number", between(schema))))
    return "`key: value`"


def configuration_page(name: str) -> str:
    """Return the page of a kind of configuration: a section a heading, a key a term."""
    kind = KINDS[name]
    lines = [f"# {kind.title}", "", f"Of {kind.what}. [How keys are set](configuration.md)."]
    for prefix, model in sections_of(kind.model):
        lines += ["", f"## `{prefix}`", "", about(model)] if prefix else []
        for key in keys_of(model, prefix):
            term = f"`{key.name}`{{ #{key.name} }} {type_of(key.schema)}"
            term += f" · {key.default}" if key.default == "required" else f" · default {key.default}"
            lines += ["", term, f":   {key.text}"]
    return "\n".join(lines) + "\n"


# Schemas


def described(schema: dict[str, Any], models: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Put docstrings in, and take out what requires keys, which may be given on the command line."""
    for name, part in schema["$defs"].items():
        part.pop("required", None)
        names = {field.alias or own: own for own, field in models[name].model_fields.items()}
        for key, value in part.get("properties", {}).items():
            if text := describe(models[name], names[key]):
                value["description"] = text
    return schema


def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON schema of a command's configurations."""
    named = {"pretrain": ["pretrain"], "finetune": ["segmentation", "finetune"], "ablate": ["ablate"]}[command]
    tops = [KINDS[name].model for name in named]
    defs: dict[str, Any] = {}
    for top in tops:
        schema = top.model_json_schema()
        defs |= schema.pop("$defs") | {top.__name__: schema}
    models = {model.__name__: model for top in tops for _, model in sections_of(top)}
    refs = [{"$ref": f"#/$defs/{top.__name__}"} for top in tops]
    whole: dict[str, Any] = {"title": f"fcmae {command}"}
    if len(refs) == 2:
        segments = {"properties": {"task": {"const": "segmentation"}}, "required": ["task"]}
        whole |= {"if": segments, "then": refs[0], "else": refs[1]}
    else:
        whole |= refs[0]
    return described(whole | {"$defs": dict(sorted(defs.items()))}, models)


def schema_text(command: str) -> str:
    """Return the schema's file."""
    return json.dumps(schema_of(command), indent=1) + "\n"


# Commands


def options_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield each argument of a command as a term and what it is."""
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        if action.dest == "help":
            continue
        value = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper())
        names = " ".join(f"`{name}`" for name in action.option_strings)
        term = " ".join(filter(None, (names, f"`{value}`" if value else "")))
        place = f"{parser.prog}-{(action.option_strings or [action.dest])[-1].strip('-')}".replace(" ", "-")
        first, _, rest = term.partition("` ") if "` " in term else (term.removesuffix("`"), "", "")
        yield f"{first}`{{ #{place} }} {rest}".rstrip()
        yield f":   {formatter._expand_help(action) if action.help else ''}"
        yield ""


def commands_page() -> str:
    """Return the page of all commands."""
    lines = [
        "# Commands",
        "",
        "`fcmae COMMAND --help` says the same. Keys are on [pages of their own](configuration.md).",
    ]
    for name, what in COMMANDS.items():
        parser = import_module(f"fcmae.commands.{name}").make_parser()
        parser.prog = f"fcmae {name}"
        usage = textwrap.dedent(" " * len("usage: ") + parser.format_usage().strip().removeprefix("usage: "))
        lines += ["", f"## fcmae {name}", "", parser.description or what, "", "```text", usage, "```", ""]
        lines += [*options_of(parser), "```text", (parser.epilog or "").strip(), "```"]
    return "\n".join(lines) + "\n"


# Recipes and names


def recipes_page() -> str:
    """Return the page of the configurations that come with the package."""
    lines = [
        "# Recipes",
        "",
        "Configurations that come with fcmae: complete files, each with its command, hardware, time and result. "
        "`fcmae configs` lists them, `fcmae configs NAME mine.yaml` copies one out.",
    ]
    for command, how in PURPOSES.items():
        lines += ["", f"## {command}", "", f"`{how}`", "", "| NAME | for |", "|---|---|"]
        for name, path in shipped_configs().items():
            if command_of(name) == command:
                lines.append(f"| [{name}](../configs/{name}.yaml) | {purpose(path)} |")
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Return the page of the public names, which mkdocstrings fills from their docstrings."""
    lines = [
        "# Python",
        "",
        "The public names of the package: `from fcmae import FCMAE`. Everything else may change without notice.",
    ]
    for name in fcmae.__all__:
        lines += ["", f"::: fcmae.{fcmae.HOMES[name]}.{name}"]
    return "\n".join(lines) + "\n"


PAGES = {
    **{f"keys-{name}.md": lambda name=name: configuration_page(name) for name in KINDS},
    "commands.md": commands_page,
    "recipes.md": recipes_page,
    "api.md": api_page,
}
"""What makes each generated page."""


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for command in ("pretrain", "finetune", "ablate"):
        (SCHEMAS / f"{command}.json").write_text(schema_text(command))
