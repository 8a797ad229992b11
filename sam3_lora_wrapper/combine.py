"""The configuration of a weighted sum of adapters."""

from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.errors import UserError


def combined_config(configs: list[LoraConfig], ranks: dict[str, int]) -> LoraConfig:
    """Configuration of the adapter whose factors are those of several, side by side.

    Args:
        configs: of the adapters that are summed.
        ranks: for each layer that one of them adapts (`<module>.<kind>`), the sum of their ranks.

    Raises:
        UserError: the sum of these adapters is not a low-rank adapter.
    """
    if any(c.use_dora for c in configs):
        raise UserError("adapters with use_dora cannot be summed: their updates do not add up")
    if any(c.modules_to_save or c.bias != "none" for c in configs):
        raise UserError("adapters with modules_to_save or biases cannot be summed: these have no factors")
    components, layers = {}, {}
    for component in dict.fromkeys(name for c in configs for name in c.components):
        components[component] = [kind for c in configs for kind in c.components.get(component, ())]
        blocks = [c.layers.get(component) for c in configs if c.components.get(component)]
        layers[component] = blocks[0] if blocks and all(b == blocks[0] for b in blocks) else None
    # A layer that none of them adapts, but that these components and blocks name, has B = 0.
    return LoraConfig(
        rank=1, alpha=1, components=components, layers=layers, rank_pattern=ranks, alpha_pattern=ranks
    )
