"""Fixtures of all tests: a tiny official model of random weights, and an input for it."""

from collections.abc import Callable

import pytest
from omegaconf import OmegaConf
from small_models import copied, run_forward
from torch import Tensor, nn

from sam3.train.utils.train_utils import register_omegaconf_resolvers
from sam3_lora_wrapper.base import build_base
from sam3_lora_wrapper.launch import compose_config


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
    return copied(_tiny)


@pytest.fixture(scope="session")
def forward() -> Callable[..., dict[str, Tensor]]:
    """A function that runs a model on two pictures, each with a text and two boxes as prompts."""
    return run_forward
