"""Writing a mended copy of a dataset, with a report of every change."""

import json
import shutil
from pathlib import Path

from sam3_lora_wrapper.dataset.folders import new_folder
from sam3_lora_wrapper.dataset.image_files import write_upright
from sam3_lora_wrapper.dataset.progress import progress
from sam3_lora_wrapper.errors import UserError


def write_mended(checked: list, folder: Path) -> None:
    """Write the mended views of checked splits, with their images, as a new dataset.

    Args:
        checked: splits as dataset_check.check_dataset returns them, with all findings kept.
        folder: is made; it appears when it is complete.

    Raises:
        UserError: the folder is there, or an error cannot be mended without knowing more.
    """
    for c in checked:
        if c.report.unmendable:
            kinds = [f"{name}: {k.examples[0]}" for name, k in c.report.kinds.items() if k.unmendable]
            raise UserError(f"{c.split.ann_file}: what only you can put right:\n  " + "\n  ".join(kinds))
    changes = []
    with new_folder(folder) as partial:
        for c in checked:
            _write_split(c, partial / c.split.name)
            lines = [line for level in ("error", "filled in") for line in c.report.lines(level)]
            changes += [f"{c.split.name}: {line}" for line in lines]
        text = "\n".join(changes or ["nothing was changed"]) + "\n"
        (partial / "changes.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_split(checked, folder: Path) -> None:
    folder.mkdir(parents=True)
    states = checked.images.by_file.items()
    for name, state in progress(states, f"{checked.split.name}: copy"):
        source, target = checked.split.img_folder / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = write_upright if state.upright else shutil.copyfile
        copy(source, target)
    (folder / "_annotations.coco.json").write_text(json.dumps(checked.coco))
