"""Folders of weights to the Hugging Face Hub: one commit, over nothing that others put there; knows no format."""

import hashlib
import shlex
from pathlib import Path

from fcmae import __version__
from fcmae.errors import UserError, brief, named
from fcmae.files import sha256

GIVEN = ".gitattributes"
"""What the hub puts into a new repository."""

REMEDIES = {
    401: "the hub does not know the token: hf auth login, or set HF_TOKEN to one that may write",
    403: "the token may not write there: take one with the role write, of a member of the organisation",
    429: "the hub asks to wait some minutes",
}
"""By the status of an answer."""


def require_repository(name: str) -> None:
    """Check that a repository of the hub can have this name.

    Raises:
        UserError: if not.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {named(name)}: {brief(error)}") from error
    if name.count("/") != 1:
        raise UserError(f"--push {named(name)}: give ORGANISATION/NAME, or YOUR_NAME/NAME")


def _same(file: Path, digest: str | None) -> bool:
    """Whether the hub's hash of a file, git's or that of large files, is this file's."""
    if digest is None or not file.is_file():
        return False
    if len(digest) == 64:
        return digest == sha256(file)
    content = file.read_bytes()
    return digest == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload the files of a folder as one commit into a repository, made where it is missing; returns its address.

    Nothing is replaced: what is there already must be what is uploaded. The token is that of `hf auth login`, or
    HF_TOKEN.

    Args:
        folder: with files alone.
        repository: ORGANISATION/NAME.
        private: make it private, and refuse one that is public.

    Raises:
        UserError: if it is not there afterwards; the message names the command that uploads the folder.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

    subject = f"--push {repository}"
    command = ["hf", "upload", repository, str(folder), *(["--private"] if private else [])]
    again = f"{folder} is kept, and {shlex.join(command)} uploads it"
    if get_token() is None:
        raise UserError(f"{subject}: no token: hf auth login, or set HF_TOKEN; {again}")
    api = HfApi()
    files = {path.name: path for path in sorted(folder.iterdir())}
    try:
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        found = api.model_info(repository, files_metadata=True)
        hashes = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in found.siblings or []}
        others = [name for name, digest in hashes.items() if name != GIVEN and not _same(folder / name, digest)]
        if others:
            raise UserError(
                f"{subject}: is there and holds another {named(others[0])}, which is left alone; {folder} is kept: "
                "push to another repository, with another --output"
            )
        if private and not found.private:
            raise UserError(f"{subject}: is there and is public; make it private on the hub; {again}")
        api.create_commit(
            repository,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=f"Upload by fcmae {__version__}",
            parent_commit=found.sha,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        what = REMEDIES.get(status, error.server_message or brief(error))
        raise UserError(f"{subject}: {status}: {what}; {again}") from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{subject}: {constants.ENDPOINT}: {brief(error)}; {again}") from error
    return address
