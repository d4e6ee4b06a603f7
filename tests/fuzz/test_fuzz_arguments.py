"""Any words on the command line end in one line or the usage, with exit code 2, and write nothing."""

import contextlib
import io
import os
from pathlib import Path

import pytest
from conftest import fuzzed, run_main
from hypothesis import given
from hypothesis import strategies as st

from fcmae.__main__ import COMMANDS, run

LINES = (
    # words before and after one that nobody meant, such that nothing would begin to be computed
    *((command,) for command in COMMANDS if command not in ("configs", "prepare")),
    ("predict", "nowhere", "{}"),
    ("reconstruct", "nowhere", "x.png", "--output", "{}"),
    ("export", "nowhere", "--to", "timm", "--output", "{}"),
    ("export", "{}", "--to", "onnx", "--output", "out"),
    ("diagnose", "nowhere", "--data", "{}"),
    ("diagnose", "{}", "--data", "."),
    ("evaluate", "nowhere", "data.root={}"),
    ("pretrain", "--config", "tiny", "data.root=nowhere", "output={}"),
    ("pretrain", "--config", "{}", "data.root=nowhere"),
    ("finetune", "--evaluate", "{}"),
    ("finetune", "--evaluate", "nowhere", "--config", "tiny", "output={}"),
    ("ablate", "{}", "--table"),
    ("ablate", "cifar10-versions", "--plot", "{}"),
    ("configs", "{}"),
    ("prepare", "{}", "out"),
)

bytes_of_a_path = st.binary(min_size=1, max_size=40).filter(lambda raw: b"\0" not in raw)
words = st.one_of(
    bytes_of_a_path.map(os.fsdecode),  # such as a system may hand over
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300),
    st.sampled_from(
        ["a" * 5000, "../" * 2000, "\x1b[2J", "a\nb", "\udcff", "$x_}$", "~", "-", "--", "=", "{}", "%s"]
    ),
)


@given(line=st.sampled_from(LINES), word=words)
@fuzzed(40, 3000)
def test_words_nobody_meant(line: tuple[str, ...], word: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "empty"
    folder.mkdir(exist_ok=True)
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        if os.path.lexists(word):
            return
        given_words = [part.replace("{}", word) for part in line]
        code = run_main(run, *given_words, *([] if given_words != list(line) else [word]))
    last = said.getvalue().removesuffix("\n").rpartition("\n")[2]
    if {"-h", "--help"} & set(given_words):
        return
    assert code == 2, (said.getvalue(), printed.getvalue())
    assert "error: " in last or said.getvalue().startswith("usage: "), said.getvalue()
    assert "Traceback" not in said.getvalue()
    assert len(last) < 10_000
    if last.startswith("error: "):
        assert last.isprintable()
    assert not list(Path(folder).iterdir())
