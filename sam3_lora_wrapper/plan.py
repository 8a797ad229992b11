"""What a configuration would adapt, listed without building weights.

    python -m sam3_lora_wrapper.plan lora_base.yaml lora.rank=16
"""

import argparse

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from sam3_lora_wrapper.config import KINDS, LoraConfig
from sam3_lora_wrapper.targets import COMPONENTS, Target, find_targets, full_parameters


def table(model: nn.Module, targets: list[Target], full: list[str]) -> str:
    """What an adapter adapts: a line per component, with parameters and their share of the model.

    Args:
        model: the base, on any device, with or without adapters.
        targets: the adapted weights.
        full: names of the parameters trained in full.
    """
    base = {n: p.numel() for n, p in model.named_parameters() if ".adapters." not in n}
    total = sum(base.values())
    rows = []
    for component in COMPONENTS:
        own = [t for t in targets if t.component == component]
        if own:
            kinds = ", ".join(k for k in KINDS if any(k in t.slices for t in own))
            rows.append((component, sum(len(t.slices) for t in own), sum(t.parameters for t in own), kinds))
    if full:
        rows.append(("trained in full", len(full), sum(base[name] for name in full), ""))
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows), ""))
    lines = [f"{'component':<18} {'layers':>6}  {'parameters':>11} {'of model':>9}  kinds"]
    lines += [f"{c:<18} {n:>6}  {p:>11,} {100 * p / total:>8.3f}%  {k}".rstrip() for c, n, p, k in rows]
    return "\n".join(lines) + f"\nbase model: {total:,} parameters, frozen"


def plan(config: str, overrides: list[str]) -> str:
    """The layers that a configuration adapts, a line each, and the table of its components."""
    from sam3_lora_wrapper.base import require_generated
    from sam3_lora_wrapper.launch import compose_config

    require_generated()
    cfg = compose_config(config, ["paths.dataset_root=unused", *overrides])
    lora = LoraConfig.from_dict(OmegaConf.to_container(cfg.lora))
    with torch.device("meta"):
        model = instantiate(OmegaConf.to_container(cfg.model.base, resolve=True))
    if not cfg.loss.masks:
        model.segmentation_head = None
    targets = find_targets(model, lora)
    full = full_parameters(model, lora, targets)
    lines = [f"{t.module}.{k}  rank {t.rank[k]}, alpha {t.alpha[k]:g}" for t in targets for k in t.slices]
    lines += [f"{name}  in full" for name in full]
    return "\n".join([*lines, "", table(model, targets, full)])


def main() -> None:
    from sam3_lora_wrapper.launch import readable_errors

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a file in sam3_lora_configs, or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. lora.rank=16")
    args = parser.parse_args()
    with readable_errors():
        print(plan(args.config, args.overrides))


if __name__ == "__main__":
    main()
