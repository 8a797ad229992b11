"""Adapters for other programs.

    python -m sam3_lora_wrapper.export merged --model_path ADAPTER --output sam3_merged.pt
    python -m sam3_lora_wrapper.export transformers --model_path ADAPTER --output FOLDER

`merged` writes the base with the adapter in its weights, in the layout of the official release,
for the official loader. `transformers` writes the adapter alone, renamed for Sam3Model of
Hugging Face transformers, where q, k and v are layers of their own; PEFT loads it there.
"""

import argparse
from pathlib import Path

import torch

from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.checkpoint import FORMAT, describe, load_model, write_atomically
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.formats.model_card import transformers_card
from sam3_lora_wrapper.formats.peft_format import base_name, peft_config, write_folder
from sam3_lora_wrapper.formats.peft_layout import lay_out, pack, split_layers
from sam3_lora_wrapper.launch import readable_errors
from sam3_lora_wrapper.targets import COMPONENTS, Target

# Where Sam3Model keeps the blocks of each component, and what it calls the attention modules.
BLOCKS = {
    "vision_encoder": "vision_encoder.backbone.layers",
    "text_encoder": "text_encoder.text_model.encoder.layers",
    "geometry_encoder": "geometry_encoder.layers",
    "detr_encoder": "detr_encoder.layers",
    "detr_decoder": "detr_decoder.layers",
    "segmentation_head": "mask_decoder",
}
ATTENTION = {
    "vision_encoder": {"attn": "attention"},
    "text_encoder": {"attn": "self_attn"},
    "geometry_encoder": {"self_attn": "self_attn", "cross_attn_image": "cross_attn"},
    "detr_encoder": {"self_attn": "self_attn", "cross_attn_image": "cross_attn"},
    "detr_decoder": {
        "self_attn": "self_attn", "ca_text": "text_cross_attn", "cross_attn": "vision_cross_attn",
    },
    "segmentation_head": {"cross_attend_prompt": "prompt_cross_attn"},
}


def transformers_name(target: Target, kind: str) -> str:
    """Name in Sam3Model of the layer that is one kind of an adapted weight."""
    parts = target.module.removeprefix(f"{COMPONENTS[target.component]}.").split(".")
    block = parts[:1] if parts[0].isdigit() else []
    if kind in ("fc1", "fc2"):
        inner = ["mlp", kind]
    else:
        output = "out_proj" if target.component == "text_encoder" else "o_proj"
        attention = ATTENTION[target.component][parts[len(block)]]
        inner = [attention, output if kind == "out" else f"{kind}_proj"]
    return ".".join([BLOCKS[target.component], *block, *inner])


def export_merged(lora: Lora, output: str | Path) -> None:
    """Write the adapted model as a checkpoint in the layout of the official release.

    Args:
        lora: the adapters of a model, which are merged into it and taken out.
        output: file to write.
    """
    state = lora.merge_and_unload().state_dict()
    content = {f"detector.{key}": value.cpu() for key, value in state.items()}
    write_atomically(output, lambda file: torch.save(content, file))


def export_transformers(lora: Lora, output: str | Path) -> None:
    """Write the active adapter as a folder that PEFT loads onto transformers' Sam3Model.

    Args:
        lora: the adapters of a model.
        output: folder to write.

    Raises:
        UserError: the adapter trains parameters in full.
    """
    name = lora.only_active()
    named = lora.named[name]
    if named.full:
        raise UserError(
            f"the adapter trains parameters in full ({next(iter(named.full))}, ...): this export has no "
            "place for. Train without lora.modules_to_save and lora.bias, or export `merged`"
        )
    names = {(t.module, kind): transformers_name(t, kind) for t in named.targets for kind in t.slices}
    layout = lay_out(split_layers(named.targets, names, named.config), {}, named.config)
    tensors = pack(layout, lora.state_dict(name), {})
    config = peft_config(layout, named.config, base_name(lora.record))
    description = describe(lora, name) | {"format": f"{FORMAT} for transformers"}
    card = transformers_card(description, lora.table(name))
    write_folder(Path(output), tensors, config, description, card)


EXPORTS = {"merged": export_merged, "transformers": export_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=EXPORTS)
    parser.add_argument("--model_path", required=True, help="checkpoint_last.pt, or an adapter folder")
    parser.add_argument("--output", required=True, help="file (merged) or folder (transformers) to write")
    parser.add_argument("--base", help="the base's weights, if not where they were in training")
    args = parser.parse_args()
    with readable_errors():
        EXPORTS[args.kind](load_model(args.model_path, args.base).lora, args.output)
        print(f"{args.kind}: {args.output}")


if __name__ == "__main__":
    main()
