"""Fixtures of all tests: a tiny official model of random weights, and an input for it."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.train.utils.train_utils import register_omegaconf_resolvers
from sam3_lora_wrapper.base import build_base
from sam3_lora_wrapper.launch import compose_config

EVERYTHING = {
    "vision_encoder": ["attention", "feed_forward"],
    "text_encoder": ["attention", "feed_forward"],
    "geometry_encoder": ["attention", "feed_forward"],
    "detr_encoder": ["attention", "feed_forward"],
    "detr_decoder": ["attention", "feed_forward"],
    "segmentation_head": ["attention"],
}


@pytest.fixture(scope="session", autouse=True)
def resolvers() -> None:
    """The resolvers that train.py registers, which can be done once in a process."""
    register_omegaconf_resolvers()


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    """Hydra configuration of the tiny official model."""
    return OmegaConf.to_container(compose_config("lora_tiny", ["paths.dataset_root=/data"]).model.base, resolve=True)


@pytest.fixture(scope="session")
def _tiny(tiny_config) -> nn.Module:
    # Frozen: where weights require gradients, PyTorch picks other kernels, which round differently.
    return build_base(tiny_config, "random").requires_grad_(False)


@pytest.fixture
def tiny(_tiny) -> nn.Module:
    """A tiny official model of its own for each test, frozen, in training mode."""
    return copy.deepcopy(_tiny)


@pytest.fixture(scope="session")
def forward() -> Callable[..., dict[str, Tensor]]:
    """A function that runs a model on two pictures, each with a text and two boxes as prompts."""
    return run_forward


def run_forward(model: nn.Module) -> dict[str, Tensor]:
    """All outputs of an official model for one fixed input, in its training or eval mode."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    images = torch.randn(2, 3, 96, 96, generator=generator).to(dtype)
    boxes = (0.3 + 0.3 * torch.rand(2, 2, 4, generator=generator)).to(dtype)
    backbone = model.backbone.forward_image(images)
    backbone |= {"img_batch_all_stages": images} | model.backbone.forward_text(["circle", "a red star"], device="cpu")
    find = FindStage(*[torch.arange(2)] * 2, *[None] * 5)
    target = SimpleNamespace(
        boxes=boxes[0], boxes_padded=boxes[0][:, None], num_boxes=torch.ones(2, dtype=torch.long),
        segments=None, semantic_segments=None, is_valid_segment=None, is_exhaustive=None,
        object_ids=None, object_ids_padded=None,
    )
    prompt = Prompt(
        box_embeddings=boxes, box_mask=torch.zeros(2, 2, dtype=torch.bool), box_labels=torch.tensor([[1, 1], [0, 1]])
    )
    out = model.forward_grounding(backbone, find, target, prompt)
    names = ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg", "presence_logit_dec")
    return {name: out[name] for name in names if name in out}
