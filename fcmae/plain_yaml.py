"""YAML of sections, lists and plain values, read within bounds, and written; knows no keys, files or arguments."""

import json
import re
from typing import Any, ClassVar

import yaml

from fcmae.errors import shown

MOST_CHARACTERS, MOST_DEEP, MOST_VALUES = 100_000, 20, 10_000
"""Of a text, of sections and lists in each other, and of values when each alias is written out."""

SCALARS = (
    # tag, what is one (YAML 1.2 with the underscores of 1.1), what it may begin with; all else is text
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]{0,99})", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
)
"""Words such as `no`, dates, and numbers of over 100 digits are text."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without tags, with names alone as keys, which refuses a key given twice and what is too much."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.sizes: dict[int, int] = {}
        """Values in a node, those of its aliases counted at each, by the node's id."""

    def refuse(self, problem: str, mark: yaml.Mark) -> yaml.YAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if tag := getattr(event, "tag", None):
            raise self.refuse(f"tag {shown(tag)}: values have none here; text is quoted", event.start_mark)
        if self.depth == MOST_DEEP:
            raise self.refuse(f"more than {MOST_DEEP} sections or lists in each other", event.start_mark)
        self.depth += 1
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            pairs = {yaml.MappingNode: node.value, yaml.SequenceNode: [node.value]}.get(type(node), [])
            self.sizes[id(node)] = 1 + sum(self.sizes[id(child)] for pair in pairs for child in pair)
        elif id(node) not in self.sizes:
            raise self.refuse("a value that holds itself", event.start_mark)
        if self.sizes[id(node)] > MOST_VALUES:
            raise self.refuse(f"more than {MOST_VALUES} values, those of aliases counted at each", event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith((":str", ":merge")):
                raise self.refuse("a key that is no word, such as a number: quote it", key.start_mark)
            if key.value in keys:
                raise self.refuse(f"key {shown(key.value)} given twice", key.start_mark)
            keys.add(key.value)
        values = super().construct_mapping(node, deep)
        if not all(isinstance(key, str) for key in values):  # of what is merged
            raise self.refuse("a key that is no word, such as a number: quote it", node.start_mark)
        return values


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader`, or any other reader, would take for something else."""


for _kind, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str | bytes) -> Any:
    """Return the value of a YAML text: None, bool, int, float, str, or lists and dicts of them, with str as keys.

    Takes time and memory in proportion to the text.

    Raises:
        ValueError: in one line, if it is none, or has a tag, a key that is no text or given twice, or over
            `MOST_CHARACTERS`, `MOST_DEEP` or `MOST_VALUES`.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"longer than a configuration is, {MOST_CHARACTERS:,} characters")
    try:
        return yaml.load(text if isinstance(text, str) else text.decode(), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError("not a text file, of UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = " ".join(str(error.problem or error.context).split())
        raise ValueError(f"not valid YAML: {what[:200]}{place}") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"has the character {shown(chr(error.character))}, which is none of a text") from error
    except (ValueError, OverflowError) as error:  # PyYAML's own, as of "\\UFFFFFFFF" and %YAML 1.999...
        raise ValueError("not valid YAML: a character or version of a number that there is not") from error


def write_yaml(values: Any) -> str:
    """Return plain values as YAML that `read_yaml` reads back to equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def write_value(value: Any) -> str:
    """Return a plain value as YAML in one line, text as it is where that is read back."""
    if isinstance(value, str):
        try:
            if read_yaml(value) == value:
                return value
        except ValueError:
            pass
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
