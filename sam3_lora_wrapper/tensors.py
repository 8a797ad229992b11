"""Comparing the tensors of a file with those that are expected."""

from collections.abc import Mapping

import torch

from sam3_lora_wrapper.errors import UserError


def require_tensors(found: Mapping, shapes: Mapping[str, tuple], what: str) -> None:
    """Raise UserError unless `found` holds exactly the expected tensors, all of them finite.

    Args:
        found: tensors by name, as a file has them.
        shapes: the shape of every expected tensor by name.
        what: start of the message, e.g. "base.pt does not fit the model".
    """
    problems = [f"missing: {key}" for key in shapes if key not in found]
    problems += [f"unexpected: {key}" for key in found if key not in shapes]
    for key, shape in shapes.items():
        if key not in found:
            continue
        if not isinstance(found[key], torch.Tensor):
            problems.append(f"{key} is no tensor")
        elif found[key].shape != tuple(shape):
            problems.append(f"shape of {key}: {tuple(found[key].shape)} in the file, {tuple(shape)} expected")
        elif not torch.isfinite(found[key]).all():
            problems.append(f"NaN or infinity in {key}")
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(f"{what} ({len(problems)} tensors):\n  {shown}{more}")
