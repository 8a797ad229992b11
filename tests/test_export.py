"""Exports: merged weights in the official loader, the adapter on transformers' Sam3Model."""

import copy
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
from small_models import config, copied, difference, randomise, run_forward
from torch import Tensor, nn
from transformers import Sam3Config, Sam3Model

from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model_builder import _load_checkpoint
from sam3_lora_wrapper import export
from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.base import build_base, official_tokenizer
from sam3_lora_wrapper.checkpoint import save_adapter
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.export import export_transformers
from sam3_lora_wrapper.formats.peft_format import from_pretrained
from sam3_lora_wrapper.wrapper import lora_model

# ------------------------------------------------------------ merged


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["dot_prod_scoring"], "bias": "all"}])
@torch.no_grad()
def test_official_loader_takes_the_merged_file_whole(
    tiny_config, tmp_path: Path, capsys, monkeypatch, options: dict
) -> None:
    model = lora_model(tiny_config, "random", 96, config(**options).to_dict())
    randomise(model.lora)
    save_adapter(model.lora, tmp_path / "checkpoint_last.pt")
    monkeypatch.setattr(sys, "argv", [
        "export", "merged", "--model_path", str(tmp_path / "checkpoint_last.pt"),
        "--output", str(tmp_path / "merged.pt"),
    ])
    export.main()
    official = build_base(tiny_config, "random")
    before = run_forward(official.eval())
    capsys.readouterr()
    _load_checkpoint(official, str(tmp_path / "merged.pt"))
    assert "missing" not in capsys.readouterr().out
    keys = torch.load(tmp_path / "merged.pt", weights_only=True).keys()
    assert {k.removeprefix("detector.") for k in keys} == official.state_dict().keys()
    adapted = run_forward(model.eval())
    assert difference(adapted, before) > 0.05
    for name, value in run_forward(official).items():
        torch.testing.assert_close(value, adapted[name], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ transformers

SIZE, PATCH, WIDTH, DIM, TEXT, CONTEXT = 112, 14, 48, 32, 24, 16


@pytest.fixture(scope="session")
def official_small(tiny_config) -> nn.Module:
    """A small official model with what Sam3Model has fixed: its pyramid, window attention, tiled positions."""
    base = copy.deepcopy(tiny_config)
    base["backbone"]["scalp"] = 1
    neck = base["backbone"]["visual"]
    neck |= {"d_model": DIM, "scale_factors": [4.0, 2.0, 1.0, 0.5]}
    neck["position_encoding"]["num_pos_feats"] = DIM
    neck["trunk"] |= {
        "img_size": SIZE, "pretrain_img_size": SIZE // 2, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 2,
        "mlp_ratio": 2.0, "global_att_blocks": [1], "window_size": 4, "tile_abs_pos": True,
        "pretrain_use_cls_token": True,
    }
    base["backbone"]["text"] |= {"d_model": DIM, "width": TEXT, "layers": 2, "context_length": CONTEXT}
    for part in ("encoder", "decoder"):
        base["transformer"][part] |= {"d_model": DIM, "num_layers": 2}
        base["transformer"][part]["layer"] |= {"d_model": DIM, "dim_feedforward": 2 * DIM}
    base["transformer"]["d_model"] = DIM
    base["transformer"]["decoder"] |= {"resolution": SIZE, "stride": PATCH}
    base["input_geometry_encoder"] |= {"d_model": DIM}
    base["input_geometry_encoder"]["pos_enc"]["num_pos_feats"] = DIM
    base["input_geometry_encoder"]["layer"] |= {"d_model": DIM, "dim_feedforward": 2 * DIM}
    base["segmentation_head"] |= {"hidden_dim": DIM, "upsampling_stages": 3}
    base["segmentation_head"]["pixel_decoder"] |= {"hidden_dim": DIM, "num_upsampling_stages": 3}
    scoring = base["dot_prod_scoring"]
    scoring |= {"d_model": DIM, "d_proj": DIM}
    scoring["prompt_mlp"] |= {"input_dim": DIM, "hidden_dim": 2 * DIM, "output_dim": DIM}
    scoring["prompt_mlp"]["out_norm"]["normalized_shape"] = DIM
    attentions = [base["segmentation_head"]["cross_attend_prompt"]]
    attentions.append(base["transformer"]["decoder"]["layer"]["cross_attention"])
    for layer in (base["transformer"]["encoder"]["layer"], base["input_geometry_encoder"]["layer"]):
        attentions += [layer["self_attention"], layer["cross_attention"]]
    for attention in attentions:
        attention["embed_dim"] = DIM
    model = build_base(base, "random").requires_grad_(False).eval()
    with torch.no_grad():  # biases and positions are not to be zero
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def transformers_model() -> nn.Module:
    """Sam3Model of the same dimensions."""
    eps = {"layer_norm_eps": 1e-5}  # as the official one has it; the default there is 1e-6
    heads, ffn = {"num_attention_heads": 4, "dropout": 0.0} | eps, {"intermediate_size": 2 * DIM}
    return Sam3Model(Sam3Config(
        vision_config={
            "model_type": "sam3_vision_model", "fpn_hidden_size": DIM,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "backbone_config": {
                "model_type": "sam3_vit_model", "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
                "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH, "window_size": 4,
                "global_attn_indexes": [1], "pretrain_image_size": SIZE // 2,
            } | eps,
        } | eps,
        text_config={
            "model_type": "clip_text_model", "vocab_size": 49408, "hidden_size": TEXT, "intermediate_size": 4 * TEXT,
            "projection_dim": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": CONTEXT, "hidden_act": "gelu",
        },
        geometry_encoder_config={"hidden_size": DIM, "num_layers": 1} | heads | ffn,
        detr_encoder_config={"hidden_size": DIM, "num_layers": 2} | heads | ffn,
        detr_decoder_config={"hidden_size": DIM, "num_layers": 2, "num_queries": 16} | heads | ffn,
        mask_decoder_config={"hidden_size": DIM, "num_upsampling_stages": 3, "num_attention_heads": 4} | eps,
    )).eval()


# Names of the official parameters in Sam3Model, by the published conversion; applied in order.
RENAMES = [
    (r"^backbone\.(vision|language)_backbone\.", ""),
    (r"^trunk\.patch_embed\.proj\.", "vision_encoder.backbone.embeddings.patch_embeddings.projection."),
    (r"^trunk\.pos_embed$", "vision_encoder.backbone.embeddings.position_embeddings"),
    (r"^trunk\.ln_pre\.", "vision_encoder.backbone.layer_norm."),
    (r"^trunk\.blocks\.(\d+)\.norm(\d)\.", r"vision_encoder.backbone.layers.\1.layer_norm\2."),
    (r"^trunk\.blocks\.(\d+)\.attn\.proj\.", r"vision_encoder.backbone.layers.\1.attention.o_proj."),
    (r"^trunk\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"vision_encoder.backbone.layers.\1.attention.in_proj_\2"),
    (r"^trunk\.blocks\.", "vision_encoder.backbone.layers."),
    (r"^convs\.(\d)\.dconv_2x2(_0)?\.", r"vision_encoder.neck.fpn_layers.\1.scale_layers.0."),
    (r"^convs\.(\d)\.dconv_2x2_1\.", r"vision_encoder.neck.fpn_layers.\1.scale_layers.2."),
    (r"^convs\.(\d)\.conv_1x1\.", r"vision_encoder.neck.fpn_layers.\1.proj1."),
    (r"^convs\.(\d)\.conv_3x3\.", r"vision_encoder.neck.fpn_layers.\1.proj2."),
    (r"^resizer\.", "text_projection."),
    (r"^encoder\.token_embedding\.", "text_encoder.text_model.embeddings.token_embedding."),
    (r"^encoder\.positional_embedding$", "text_encoder.text_model.embeddings.position_embedding.weight"),
    (r"^encoder\.ln_final\.", "text_encoder.text_model.final_layer_norm."),
    (r"^encoder\.text_projection$", "text_encoder.text_projection.weight"),
    (r"^encoder\.transformer\.resblocks\.", "text_encoder.text_model.encoder.layers."),
    (r"^(text_encoder.*)\.attn\.", r"\1.self_attn."),
    (r"^(text_encoder.*)\.ln_(\d)\.", r"\1.layer_norm\2."),
    (r"^(text_encoder.*)\.c_fc\.", r"\1.fc1."),
    (r"^(text_encoder.*)\.c_proj\.", r"\1.fc2."),
    (r"^geometry_encoder\.encode_norm\.", "geometry_encoder.output_layer_norm."),
    (r"^geometry_encoder\.img_pre_norm\.", "geometry_encoder.vision_layer_norm."),
    (r"^geometry_encoder\.norm\.", "geometry_encoder.prompt_layer_norm."),
    (r"^geometry_encoder\.encode\.", "geometry_encoder.layers."),
    (r"^transformer\.encoder\.layers\.", "detr_encoder.layers."),
    (r"^((?:geometry|detr)_encoder\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^((?:geometry|detr)_encoder\.layers\.\d+)\.cross_attn_image\.", r"\1.cross_attn."),
    (r"^transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"detr_decoder.layers.\1.vision_cross_attn."),
    (r"^transformer\.decoder\.layers\.(\d+)\.ca_text\.", r"detr_decoder.layers.\1.text_cross_attn."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm1\.", r"detr_decoder.layers.\1.vision_cross_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.catext_norm\.", r"detr_decoder.layers.\1.text_cross_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm2\.", r"detr_decoder.layers.\1.self_attn_layer_norm."),
    (r"^transformer\.decoder\.layers\.(\d+)\.norm3\.", r"detr_decoder.layers.\1.mlp_layer_norm."),
    (r"^transformer\.decoder\.norm\.", "detr_decoder.output_layer_norm."),
    (r"^transformer\.decoder\.presence_token_out_norm\.", "detr_decoder.presence_layer_norm."),
    (r"^transformer\.decoder\.", "detr_decoder."),
    (r"\.bbox_embed\.", ".box_head."),
    (r"\.boxRPB_embed_", ".box_rpb_embed_"),
    (r"\.presence_token_head\.", ".presence_head."),
    (r"\.linear(\d)\.", r".mlp.fc\1."),
    (r"^dot_prod_scoring\.prompt_mlp\.out_norm\.", "dot_product_scoring.text_mlp_out_norm."),
    (r"^dot_prod_scoring\.prompt_mlp\.", "dot_product_scoring.text_mlp."),
    (r"^dot_prod_scoring\.prompt_proj\.", "dot_product_scoring.text_proj."),
    (r"^dot_prod_scoring\.hs_proj\.", "dot_product_scoring.query_proj."),
    (r"^segmentation_head\.mask_predictor\.mask_embed\.", "mask_decoder.mask_embedder."),
    (r"^segmentation_head\.instance_seg_head\.", "mask_decoder.instance_projection."),
    (r"^segmentation_head\.semantic_seg_head\.", "mask_decoder.semantic_projection."),
    (r"^segmentation_head\.cross_attend_prompt\.", "mask_decoder.prompt_cross_attn."),
    (r"^segmentation_head\.cross_attn_norm\.", "mask_decoder.prompt_cross_attn_norm."),
    (r"^segmentation_head\.", "mask_decoder."),
    (r"^(?!text_encoder)(.*)\.out_proj\.", r"\1.o_proj."),
]


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors under the names of Sam3Model; q, k and v taken apart."""
    result = {}
    for key, value in state.items():
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        # Layers of MLPs are attributes there, counted from 1.
        key = re.sub(r"(head|embed_[xy]|text_mlp)\.layers\.(\d)\.", lambda m: f"{m[1]}.layer{int(m[2]) + 1}.", key)
        if key == "text_encoder.text_projection.weight":
            value = value.T
        if key.endswith("position_embeddings"):
            value = value[:, 1:]  # without the class token's
        if re.search(r"in_proj_(weight|bias)$", key):
            owner, leaf = key.split(".in_proj_")
            result |= {f"{owner}.{kind}_proj.{leaf}": part for kind, part in zip("qkv", value.chunk(3))}
        else:
            result[key] = value
    return result


@pytest.fixture(scope="session")
def twin(official_small) -> nn.Module:
    """Sam3Model with the weights of the small official model, every parameter of it."""
    model = transformers_model()
    own = dict(model.named_parameters())
    state = converted(official_small.state_dict())
    missing = own.keys() - state.keys()
    assert not missing, sorted(missing)[:10]
    model.load_state_dict({k: state[k] for k in own}, strict=False)
    return model


def picture() -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Two images of shapes on noise, a text for each, two boxes on each with labels."""
    generator = torch.Generator().manual_seed(0)
    images = 0.2 * torch.randn(2, 3, SIZE, SIZE, generator=generator)
    images[0, 0, 20:60, 30:80] += 1
    images[1, 2, 50:100, 10:50] -= 1
    boxes = torch.tensor([[0.49, 0.36, 0.45, 0.36], [0.7, 0.7, 0.2, 0.3], [0.27, 0.67, 0.36, 0.45], [0.5, 0.2, 0.3, 0.2]])
    return images, ["a red rectangle", "circle"], boxes.view(2, 2, 4), torch.tensor([[1, 0], [1, 1]])


@torch.no_grad()
def official_outputs(model: nn.Module) -> dict[str, Tensor]:
    images, texts, boxes, labels = picture()
    out = model.backbone.forward_image(images) | {"img_batch_all_stages": images}
    out |= model.backbone.forward_text(texts, device="cpu")
    prompt = Prompt(
        box_embeddings=boxes.transpose(0, 1), box_mask=torch.zeros(2, 2, dtype=torch.bool), box_labels=labels.T
    )
    out = model.forward_grounding(out, FindStage(*[torch.arange(2)] * 2, *[None] * 5), None, prompt)
    return {
        "boxes": out["pred_boxes_xyxy"], "masks": out["pred_masks"], "semantic": out["semantic_seg"],
        "scores": out["pred_logits"].squeeze(-1), "presence": out["presence_logit_dec"],
    }


@torch.no_grad()
def transformers_outputs(model: nn.Module) -> dict[str, Tensor]:
    images, texts, boxes, labels = picture()
    tokens = official_tokenizer()(texts, context_length=CONTEXT)
    out = model(
        pixel_values=images, input_ids=tokens, attention_mask=(tokens != 0).long(),
        input_boxes=boxes, input_boxes_labels=labels,
    )
    return {"boxes": out.pred_boxes, "masks": out.pred_masks, "semantic": out.semantic_seg,
            "scores": out.pred_logits, "presence": out.presence_logits}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    return difference(a, b)


def test_converted_base_equals_the_official_one(official_small, twin) -> None:
    assert largest_difference(official_outputs(official_small), transformers_outputs(twin)) < 1e-4


EVERYTHING = config().components
EXPORTED = {component: {"components": {component: kinds}} for component, kinds in EVERYTHING.items()} | {
    "everything": {},
    "rsLoRA": {"use_rslora": True, "alpha": 3},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init": "pissa"},
    "some kinds, patterns": {"components": {"vision_encoder": ["v", "fc2"], "detr_decoder": ["q", "out"]},
                             "rank_pattern": {"*.q": 3}, "alpha_pattern": {"*.v": 1.5}},
}


@pytest.mark.parametrize("options", EXPORTED.values(), ids=EXPORTED)
def test_exported_adapter_does_on_transformers_what_it_does_here(
    official_small, twin, tmp_path: Path, options: dict
) -> None:
    model = copied(official_small)
    Lora(model).add(config(**options))
    randomise(model.lora, size=0.1)
    export_transformers(model.lora, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path)
    ours = official_outputs(model)
    assert difference(ours, official_outputs(official_small)) > 0.01
    assert largest_difference(ours, transformers_outputs(theirs.base_model.model)) < 1e-4
    layers = [n for n, _ in theirs.named_modules() if n.endswith("lora_A.default")]
    assert len(layers) == sum(len(t.slices) for t in model.lora.named["default"].targets)


def test_exported_folder_is_not_taken_for_one_of_the_official_model(official_small, tmp_path: Path) -> None:
    model = copied(official_small)
    Lora(model).add(config())
    export_transformers(model.lora, tmp_path)
    assert "names of Sam3Model" in (tmp_path / "README.md").read_text()
    with pytest.raises(UserError, match="not an adapter of SAM3-LoRA"):
        from_pretrained(copied(official_small), tmp_path)


def test_full_parameters_have_no_place_in_the_export(official_small, tmp_path: Path) -> None:
    model = copied(official_small)
    Lora(model).add(config(modules_to_save=["dot_prod_scoring"]))
    with pytest.raises(UserError, match="dot_prod_scoring.* no place for"):
        export_transformers(model.lora, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
