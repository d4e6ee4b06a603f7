"""What docs/reliability.md promises is held by tests that exist."""

import ast
import re
from pathlib import Path

from conftest import ROOT

PAGE = ROOT / "docs" / "reliability.md"


def names_of_tests(path: Path) -> set[str]:
    """The names of a file's tests."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def promises() -> list[tuple[str, list[tuple[str, str]]]]:
    """Each row of the page: the promise, and the tests that it names, by file and name."""
    rows = [re.fullmatch(r"\| (.+?) \| (.+) \|", line) for line in PAGE.read_text(encoding="utf-8").splitlines()]
    found = [(row[1], re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[2])) for row in rows if row]
    return [(promise, tests) for promise, tests in found if promise != "promise"]


def test_every_promise_names_tests_and_each_of_them_exists() -> None:
    assert len(promises()) > 20
    for promise, tests in promises():
        assert tests, promise
        for file, name in tests:
            assert (ROOT / file).is_file(), (promise, file)
            assert name in names_of_tests(ROOT / file), (promise, name)


def test_a_test_of_the_faults_belongs_to_a_promise() -> None:
    named = {name for _, tests in promises() for _, name in tests}
    faults = names_of_tests(ROOT / "tests" / "faults" / "test_faults.py")
    assert faults - named == {"test_the_file_layer_changes_nothing_and_misses_nothing"}
