"""How often a model fires on prompts that are absent: the adapted one against its bare base."""

import torch
from torch import Tensor

from sam3.train.utils.distributed import all_gather
from sam3_lora_wrapper.evaluation.metrics import FIRES


def fires(find_stages) -> Tensor:
    """Whether each prompt finds anything, bool of shape (prompts,)."""
    output = next(iter(find_stages))
    best = output["pred_logits"].sigmoid().amax((1, 2))
    return best * output["presence_logit_dec"].sigmoid().flatten() >= FIRES


class AbsentPrompts:
    """Meter of the official trainer: the share of absent prompts on which the model fires.

    The base is counted in the first validation alone, for neither it nor the prompts change.
    """

    def __init__(self):
        self.base: Tensor | None = None
        self.reset()

    @staticmethod
    def is_better(value: float, best: float) -> bool:
        """Whether a share is better than the best so far."""
        return value < best

    def reset(self) -> None:
        """Forget the counts of the adapted model."""
        # Rows: absent categories, foreign words. Columns: prompts, fired, asked of the base, fired by it.
        self.counts = torch.zeros(2, 4, dtype=torch.float64)

    def update(self, find_stages, find_metadatas, model, batch, **_unused) -> None:
        """Count the absent prompts of a batch."""
        absent = batch.find_targets[0].num_boxes == 0
        foreign = find_metadatas[0].original_category_id < 0  # see data.CocoPrompts
        columns = [torch.ones_like(absent), fires(find_stages)]
        lora = getattr(getattr(model, "module", model), "lora", None)
        if lora is not None and self.base is None:
            with lora.disable_adapter() as base:
                columns += [torch.ones_like(absent), fires(base(batch))]
        for row, group in enumerate((absent & ~foreign, absent & foreign)):
            for column, counted in enumerate(columns):
                self.counts[row, column] += (counted & group).sum().cpu()

    def compute_synced(self) -> dict[str, float]:
        """The shares over all processes: `fires_on_absent`, `fires_on_foreign`, and `_base` of each."""
        total = sum(all_gather(self.counts, force_cpu=True))
        if self.base is None and total[:, 2].any():
            self.base = total[:, 3] / total[:, 2]
        shares = total[:, 1] / total[:, 0]
        results = {}
        for row, group in enumerate(("absent", "foreign")):
            if total[row, 0]:
                results[f"fires_on_{group}"] = shares[row].item()
                if self.base is not None:
                    results[f"fires_on_{group}_base"] = self.base[row].item()
        return results

    def compute(self) -> dict[str, float]:
        """Nothing while a validation goes on."""
        return {}
