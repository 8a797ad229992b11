"""Folders on the Hugging Face hub: fetched and uploaded, with errors for people."""

import re
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from sam3_lora_wrapper.errors import UserError

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def find_folder(source: str | Path, files: list[str]) -> Path:
    """The folder that a path or the name of a repository means; its files are downloaded if need be."""
    if Path(source).is_dir():
        return Path(source)
    if not REPOSITORY.fullmatch(str(source)):
        raise UserError(f"{source}: no such folder, and not the name of a repository on the hub (owner/name)")
    with hub_errors(f"{source}: no such folder, and not to be had from the hub"):
        return Path(snapshot_download(str(source), allow_patterns=files))


def upload(folder: str | Path, repository: str, private: bool | None = None) -> str:
    """Upload a folder as a repository, made where there is none; returns its address.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository!r} is not the name of a repository on the hub: owner/name")
    hub = HfApi()
    with hub_errors(f"{repository}: the upload failed"):
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload adapter")
    return str(address)


@contextmanager
def hub_errors(what: str):
    """Turn the hub's refusals and failures of the connection into one message."""
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{what} ({reason}). Check name and connection, and run `hf auth login`") from error
