"""Images per second of the official processor: the plain base, with an adapter beside its weights, and merged.

    .venv/bin/python benchmarks/inference.py            # the tiny model
    .venv/bin/python benchmarks/inference.py --full     # the 840M model too, random weights: minutes per image on a CPU

An image is encoded once and then asked for each prompt, as the predictor does it. The adapter is random and not
zero. What merging changes in the outputs is set beside what bfloat16 autocast changes in those of the plain base.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from machine import write_results  # noqa: E402
from timing import DEVICE, interleaved, verdict  # noqa: E402

from sam3.model.sam3_image_processor import Sam3Processor  # noqa: E402
from sam3_lora_wrapper.adapters import Lora  # noqa: E402
from sam3_lora_wrapper.base import build_base  # noqa: E402
from sam3_lora_wrapper.config import LoraConfig  # noqa: E402
from sam3_lora_wrapper.launch import compose_config  # noqa: E402
from sam3_lora_wrapper.synthetic import SHIFTED, draw_scene  # noqa: E402

PROMPTS = ["circle", "triangle", "star", "ring", "cross", "square", "cat", "dog", "red car", "tree"]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
NOISE = 0.02  # least noise of a ratio of times; more where the ratios of the rounds scatter
REPEATS = {"tiny": 11, "840M": 3}


NOTE = (
    "In bfloat16 the sum W + B A is rounded once, not merged it is never formed: outputs differ by about what bfloat16 "
    "changes of the plain base, which is more than 1e-3. Whoever needs them equal infers in float32."
)


def processors(config: str, weights: str) -> dict[str, Sam3Processor]:
    """The official processor on the plain base, and on the base with an adapter beside and in its weights."""
    cfg = compose_config(config, ["paths.dataset_root=unused"])
    plain = build_base(OmegaConf.to_container(cfg.model.base, resolve=True), weights).to(DEVICE).eval()
    tokenizer = plain.backbone.language_backbone.tokenizer
    shared = {id(constant): constant for constant in (tokenizer, *plain.parameters())}
    unmerged = copy.deepcopy(plain, shared)
    lora = Lora(unmerged)
    lora.add(LoraConfig.from_dict(OmegaConf.to_container(cfg.lora)))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in lora.tensors().values():
            parameter.add_(0.003 * torch.randn_like(parameter))
    merged = copy.deepcopy(unmerged, {id(tokenizer): tokenizer}).lora.merge_and_unload()
    models = {"plain base": plain, "adapter, not merged": unmerged.eval(), "adapter, merged": merged.eval()}
    # Threshold 0: every query is an answer, so outputs can be compared one by one.
    return {name: Sam3Processor(model, cfg.model.resolution, DEVICE, 0.0) for name, model in models.items()}


def predict(processor: Sam3Processor, image: Image.Image, prompts: list[str], dtype: torch.dtype) -> list[Tensor]:
    """For each prompt the scores and the boxes relative to the image, (queries, 5)."""
    found = []
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        state = processor.set_image(image)
        for prompt in prompts:
            state = processor.set_text_prompt(prompt, state)
            found.append(torch.cat([state["scores"][:, None].float(), state["boxes"].float() / image.width], 1))
    return found


def differences(known: dict[str, Sam3Processor], image: Image.Image) -> dict[str, str]:
    """Largest differences of scores and boxes that merging makes, with verdicts, and that bfloat16 makes by itself."""
    plain, beside, merged = ([predict(p, image, PROMPTS[:2], dtype) for dtype in LIMITS] for p in known.values())

    def largest(a: list[Tensor], b: list[Tensor]) -> float:
        return max((x - y).abs().max().item() for x, y in zip(a, b))

    columns = {}
    for i, (dtype, limit) in enumerate(LIMITS.items()):
        change, name = largest(beside[i], merged[i]), str(dtype).removeprefix("torch.")
        columns[f"change by merging, {name}, target <= {limit:g}"] = f"{change:.1e}: {verdict(change, limit)}"
    return columns | {"plain base, bfloat16 against float32": f"{largest(*plain):.1e}"}


def measure(name: str, config: str, weights: str) -> list[dict]:
    """The rows of one model."""
    known = processors(config, weights)
    side = next(iter(known.values())).resolution
    image, _ = draw_scene(np.random.default_rng(0), SHIFTED, side)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    changes = differences(known, image)
    rows = []
    for count in (1, len(PROMPTS)):
        candidates = {kind: lambda p=p: predict(p, image, PROMPTS[:count], dtype) for kind, p in known.items()}
        times = interleaved(candidates, REPEATS[name])
        for kind, seconds in times.items():
            ratios = [a / b for a, b in zip(seconds, times["plain base"])]
            low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
            noise, merged = max(NOISE, (high - low) / len(ratios) ** 0.5), kind == "adapter, merged"
            rows.append({
                "model": f"{name}, {side} px", "prompts": count, "adapter": kind,
                "images per second": f"{1 / statistics.median(seconds):.3g}",
                "time / plain, median (IQR)": f"{ratio:.2f} ({high - low:.2f})",
                "target 1.00 within noise": verdict(ratio, 1 + noise) if merged else "-",
                **{what: value if merged else "-" for what, value in changes.items()},
            })
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="measure the 840M model with random weights too")
    title = f"Inference with an adapter, {'bf16 autocast' if DEVICE == 'cuda' else 'fp32'}"
    full = parser.parse_args().full
    write_results("inference", title, measure("tiny", "lora_tiny", "sam3_tiny"), NOTE)
    if full:
        write_results("inference_full", title, measure("840M", "lora_base", "random"), NOTE)


if __name__ == "__main__":
    main()
