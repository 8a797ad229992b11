"""Weights & Biases beside TensorBoard."""

from sam3.train.utils.distributed import is_main_process
from sam3_lora_wrapper.errors import UserError


def start_wandb(**settings) -> None:
    """Start a W&B run in the first process; it copies what goes to TensorBoard from here on.

    Args:
        settings: arguments of `wandb.init`.

    Raises:
        UserError: W&B is not installed, or refuses to start.
    """
    if not is_main_process():
        return
    try:
        import wandb
    except ImportError:
        raise UserError("tracker=wandb: Weights & Biases is not installed. Run: pip install wandb") from None
    try:
        wandb.init(sync_tensorboard=True, **settings)
    except wandb.errors.Error as error:
        raise UserError(
            f"tracker=wandb: {error}. Run `wandb login`, set WANDB_MODE=offline, or use tracker=tensorboard"
        ) from error
