"""Augmentations of the official package, each under a name of the configuration."""

from sam3_lora_wrapper.errors import UserError

FROM_MASKS = ("affine", "crop")


class Augment:
    """Apply augmentations in the order of the configuration.

    Args:
        masks: whether masks are trained.
        steps: transforms of sam3.train.transforms by name; None where one is switched off.

    Raises:
        UserError: an augmentation takes boxes from masks, which are not trained.
    """

    def __init__(self, masks: bool = True, **steps):
        self.steps = {name: step for name, step in steps.items() if step is not None}
        blocked = [name for name in FROM_MASKS if name in self.steps and not masks]
        if blocked:
            off = " ".join(f"augment.{name}=null" for name in blocked)
            raise UserError(f"augment: {', '.join(blocked)} needs masks. Use loss=masks, or add {off}")

    def __call__(self, datapoint, **context):
        for step in self.steps.values():
            datapoint = step(datapoint, **context)
        return datapoint
