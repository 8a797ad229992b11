"""Text features, computed once: where nothing of the text encoder is trained, those of a prompt never change."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from sam3.model.text_encoder_ve import VETextEncoder
from sam3_lora_wrapper.errors import UserError


class CachedTextEncoder(VETextEncoder):
    """A frozen text encoder that encodes every text once, and waits on the CPU in between.

    Each text is encoded alone, as at inference: its features do not depend on the texts beside it, and many texts take
    no more memory than one. They are kept for each device that asked for them and each dtype of autocast; training and
    evaluation share them, for the encoder computes the same in both.
    """

    parked = torch.device("cpu")

    def forward(self, text, input_boxes: list | None = None, device: torch.device | str | None = None):
        """Mask (n, tokens), features (tokens, n, d_model) and token embeddings (tokens, n, width) of n texts.

        Raises:
            UserError: a parameter of the encoder has become trainable.
        """
        if input_boxes or not isinstance(text[0], str):
            return super().forward(text, input_boxes, device)
        require_frozen(self, "text_encoder")
        device = torch.device(device or "cpu")
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        features = self.features.setdefault((device, autocast), {})
        missing = [t for t in dict.fromkeys((*self.known, *text)) if t not in features]
        if missing:
            self.move(device)
            for missed in missing:
                features[missed] = super().forward([missed], device=device)
            self.move(self.parked)
        masks, memories, embeds = zip(*(features[t] for t in text))
        return torch.cat(masks), torch.cat(memories, 1), torch.cat(embeds, 1)

    def move(self, device: torch.device) -> None:
        """Move all but the little that DistributedDataParallel broadcasts from its own device: the causal mask."""
        self.encoder.token_embedding.to(device)
        self.encoder.transformer.to(device)


def require_frozen(encoder: nn.Module, component: str) -> None:
    """Raise UserError where a parameter of an encoder is trained: what it computes cannot be kept."""
    trained = next((name for name, p in encoder.named_parameters() if p.requires_grad), None)
    if trained is not None:
        raise UserError(
            f"the output of the {component.replace('_', ' ')} can be kept only where nothing of it is trained, but "
            f"{trained} is: see lora.components.{component}, lora.modules_to_save and lora.bias"
        )


def cache_text(encoder: VETextEncoder, known: Sequence[str] = ()) -> None:
    """Make a text encoder compute the features of a text once; its weights must not change afterwards.

    Args:
        encoder: a frozen text encoder of an official model, changed in place. The names of its parameters stay.
        known: texts that will be asked for. They are encoded at the first call, so that the encoder travels once.

    Raises:
        UserError: a parameter of the encoder is trained.
    """
    require_frozen(encoder, "text_encoder")
    encoder.__class__ = CachedTextEncoder
    encoder.known, encoder.features = tuple(known), {}
    parameters = sum(p.numel() for p in encoder.parameters())
    logging.info(f"text features are computed once; the text encoder ({parameters:,} parameters) waits on the CPU")
