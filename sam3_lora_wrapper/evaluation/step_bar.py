"""The progress bar over an epoch of the official trainer."""

import logging
from collections.abc import Iterable
from contextlib import nullcontext

import psutil
from torch.optim import Optimizer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sam3.train.utils.distributed import get_rank
from sam3_lora_wrapper.dataset import progress  # noqa: F401  its lock, before the first bar


def under_bar(loader, meters, optimizer: Optimizer | None = None) -> Iterable:
    """Go through a loader's batches under a bar, on a terminal and in the first process alone.

    Args:
        loader: of the official dataset.
        meters: the trainer's ProgressMeter, which its loop keeps up to date.
        optimizer: whose learning rate is shown.
    """
    images = min(len(loader) * loader.batch_size, len(loader.dataset))
    what = meters.prefix.split(" Epoch")[0].lower()
    with tqdm(total=images, desc=what, unit="image", disable=None if get_rank() == 0 else True) as bar:
        # Lines of the log go above the bar instead of through it.
        with nullcontext() if bar.disable else logging_redirect_tqdm([logging.root]):
            for batch in loader:
                yield batch
                bar.set_postfix(shown(meters, optimizer), refresh=False)
                bar.update(min(loader.batch_size, images - bar.n))


def shown(meters, optimizer: Optimizer | None) -> dict[str, str]:
    """What stands behind the bar: mean losses, learning rate, memory."""
    values = {m.name.rsplit("_", 1)[-1]: f"{m.avg:.4g}" for m in meters.meters
              if m.name.startswith("Losses/") and m.count}
    if optimizer is not None:
        values["lr"] = f"{max(group['lr'] for group in optimizer.param_groups):.2e}"
    # The trainer measures the memory of the GPU where there is one.
    on_gpu = next(m.val for m in meters.meters if m.name == "Mem (GB)")
    values["memory"] = f"{on_gpu or psutil.Process().memory_info().rss / 1e9:.1f} GB"
    return values
