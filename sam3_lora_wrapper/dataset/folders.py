"""Folders that are written whole or not at all."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

from sam3_lora_wrapper.errors import UserError


@contextmanager
def new_folder(folder: Path):
    """A folder to write into, which appears under its name when the `with` block has ended well.

    Raises:
        UserError: there is something of that name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already. Give a new folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as partial:
        made = Path(partial) / folder.name
        made.mkdir()
        yield made
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
