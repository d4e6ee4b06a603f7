"""An export is uploaded to the Hugging Face Hub as it is, or not at all; never to the one on the network."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import small_encoder
from hub import READS, WRITES, Hub, serve
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from fcmae.errors import UserError
from fcmae.weights.hub import push

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine, which takes the place of the one on the network; the token may write."""
    with serve() as found:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "nobody-logged-in"))
        monkeypatch.setenv("HF_TOKEN", WRITES)
        yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(dict(small_encoder().float().state_dict()), folder / "model.safetensors")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A network\n")
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder: Path, repository: str = "org/net", *, private: bool = False) -> str:
    """The one line that an upload ends in, which leaves the folder alone."""
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        push(folder, repository, private=private)
    assert contents(folder) == before
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"--push {repository}: ")
    assert f"{folder} is kept" in line
    return line


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_arrives_whole_in_one_commit(hub: Hub, folder: Path, private: bool) -> None:
    assert push(folder, "org/net", private=private) == f"{hub.endpoint}/org/net"
    found = hub.repositories["org/net"]
    assert {**found.files, **found.large} == contents(folder) | {".gitattributes": found.files[".gitattributes"]}
    assert list(found.large) == ["model.safetensors"]
    assert (len(found.summaries), found.private) == (1, private)


def test_what_is_there_already_may_be_uploaded_again(hub: Hub, folder: Path) -> None:
    push(folder, "org/net")
    push(folder, "org/net")
    assert {**hub.repositories["org/net"].files, **hub.repositories["org/net"].large}.keys() > contents(
        folder
    ).keys()


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "notes.txt"])
def test_a_repository_with_other_files_is_left_alone(hub: Hub, folder: Path, name: str) -> None:
    push(folder, "org/net")
    found = hub.repositories["org/net"]
    (found.large if name == "model.safetensors" else found.files)[name] = b"another's"
    line = refused(folder)
    assert f"is there and holds another {name}, which is left alone" in line
    assert len(found.summaries) == 1


def test_an_upload_asked_to_be_private_never_goes_into_a_public_repository(hub: Hub, folder: Path) -> None:
    push(folder, "org/net")
    assert "is there and is public; make it private" in refused(folder, private=True)


def test_a_commit_of_somebody_else_meanwhile_is_not_written_over(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = hub.info

    def then_somebody(name: str) -> tuple[int, object]:
        answer = info(name)
        hub.repositories[name].commits.append("2" * 40)
        return answer

    monkeypatch.setattr(hub, "info", then_somebody)
    assert "412: A commit has happened since" in refused(folder)
    assert not hub.repositories["org/net"].summaries


@pytest.mark.parametrize(
    ("token", "repository", "said"),
    [
        ("", "org/net", "no token: hf auth login, or set HF_TOKEN"),
        ("hf_unknown", "org/net", "401: the hub does not know the token: hf auth login, or set HF_TOKEN"),
        (READS, "org/net", "403: the token may not write there: take one with the role write"),
        (WRITES, "strangers/net", "403: the token may not write there"),
    ],
)
def test_a_token_that_will_not_do_is_reported_with_what_will(
    token: str, repository: str, said: str, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    line = refused(folder, repository)
    assert said in line
    assert f"hf upload {repository} {folder} uploads it" in line
    assert not token or token not in line
    assert not hub.repositories


def test_a_hub_that_is_not_there_is_reported_by_its_address(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert refused(folder).startswith("--push org/net: http://127.0.0.1:9: ")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(folder)
    assert not hub.requests


def export_command(tmp_path: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `fcmae export` of small weights as a user would."""
    save_file(dict(small_encoder().float().state_dict()), tmp_path / "small.safetensors")
    command = [
        sys.executable,
        "-m",
        "fcmae",
        "export",
        "small.safetensors",
        "--to",
        "timm",
        "--output",
        "out",
        *more,
    ]
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), **environment}
    return subprocess.run(
        [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_exports_uploads_and_prints_the_address(hub: Hub, tmp_path: Path) -> None:
    done = export_command(
        tmp_path,
        "--push",
        "org/net",
        "--license",
        "cc-by-4.0",
        "--private",
        HF_ENDPOINT=hub.endpoint,
        HF_TOKEN=WRITES,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.endpoint}/org/net"
    found = hub.repositories["org/net"]
    assert found.private
    assert contents(tmp_path / "out").items() <= {**found.files, **found.large}.items()
    card: Any = ModelCard(found.files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "timm")
    assert 'timm.create_model("hf-hub:org/net", pretrained=True)' in card.text


def test_the_command_ends_with_code_2_and_one_line_and_keeps_the_export(hub: Hub, tmp_path: Path) -> None:
    theirs = "--push", "strangers/net", "--license", "mit"
    done = export_command(tmp_path, *theirs, HF_ENDPOINT=hub.endpoint, HF_TOKEN=WRITES)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --push strangers/net: 403: ")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
