"""What training keeps in memory: dtypes, checkpointing, prompts in passes; nothing of it may change the training."""

import random
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from small_models import copied
from torch import Tensor, nn

from sam3.eval.postprocessors import PostProcessImage
from sam3.model.sam3_image import Sam3Image
from sam3.train.loss.loss_fns import CORE_LOSS_KEY, Masks
from sam3.train.utils.distributed import get_world_size
from sam3_lora_wrapper.adapters import Lora
from sam3_lora_wrapper.config import LoraConfig
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.evaluation.postprocess import ChunkedPostProcess
from sam3_lora_wrapper.launch import compose_config
from sam3_lora_wrapper.live_memory import LiveMemory
from sam3_lora_wrapper.mask_loss import ChunkedMasks
from sam3_lora_wrapper.memory import MemoryConfig, cast_frozen, fuse_attention, save_memory
from sam3_lora_wrapper.passes import PassModel
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset

OFFICIAL = "loss.criterion._target_=sam3.train.loss.sam3_loss.Sam3LossWrapper"
# Masks in full: the points of the sampled loss are drawn anew for each pass.
LOSSES = {
    "boxes": ["loss=boxes", "lora.components.segmentation_head=[]"],
    "masks": ["loss=masks", "loss.sample_points=null"],
    "masks_semantic": ["loss=masks_semantic", "loss.sample_points=null"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), SHIFTED, train=4, valid=1)


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    """The losses average the number of objects over processes: here one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'init'}", rank=0, world_size=1)
    assert get_world_size() == 1
    yield
    torch.distributed.destroy_process_group()


class Step:
    """Forward, loss and backward as the trainer does them, of the tiny preset."""

    def __init__(self, data: Path, *overrides: str):
        self.cfg = compose_config("lora_tiny", [f"paths.dataset_root={data}", "data.max_negatives=9", *overrides])
        self.loss = instantiate(self.cfg.trainer.loss.all, _convert_="all")
        dataset = instantiate(self.cfg.data.train.dataset)
        random.seed(0)
        self.batch = instantiate(self.cfg.data.train.collate_fn)([dataset[i] for i in range(4)])["all"]

    def model(self, official: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model = instantiate(self.cfg.trainer.model, _convert_="all")
        if official:
            model.__class__ = Sam3Image
        with torch.no_grad():
            for name, parameter in model.lora.tensors().items():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def run(self, model: nn.Module, scale: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and gradients (of the loss times `scale`)."""
        model.zero_grad()
        torch.manual_seed(0)
        targets = [model.back_convert(t) for t in self.batch.find_targets]
        losses = self.loss(model(self.batch), targets)
        (losses[CORE_LOSS_KEY] * scale).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {k: torch.as_tensor(v).detach() for k, v in losses.items()}, gradients


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of b, all tensors together."""
    assert a.keys() == b.keys()
    return (sum((a[k] - b[k]).square().sum() for k in b).sqrt() / sum(t.square().sum() for t in b.values()).sqrt()).item()


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_in_passes_are_those_of_all_prompts_at_once(data, loss: str) -> None:
    whole = Step(data, *LOSSES[loss], OFFICIAL, "memory.prompts_per_pass=null")
    expected, gradients = whole.run(whole.model(official=True))
    assert len(whole.batch.find_inputs) == 1 and len(whole.batch.find_inputs[0].img_ids) > 12
    for prompts in (1, 3):
        step = Step(data, *LOSSES[loss], f"memory.prompts_per_pass={prompts}")
        assert [len(s.img_ids) for s in step.batch.find_inputs][:-1] == [4 * prompts] * (len(step.batch.find_inputs) - 1)
        losses, ours = step.run(step.model())
        assert relative(ours, gradients) < 2e-5
        for key in expected:
            if "_f1" not in key and "miou" not in key and "acc" not in key:  # metrics, which are no sums
                torch.testing.assert_close(losses[key], expected[key], rtol=2e-5, atol=1e-5)


def test_gradients_follow_the_scale_of_the_step_before(data) -> None:
    step = Step(data, "memory.prompts_per_pass=2", "loss=boxes", "lora.components.segmentation_head=[]")
    model = step.model()
    _, plain = step.run(model)
    assert float(step.loss.gradient_scale) == 1
    for scale in (1024.0, 1024.0, 0.25):
        _, scaled = step.run(model, scale)
        assert float(step.loss.gradient_scale) == scale
        assert relative({k: g / scale for k, g in scaled.items()}, plain) < 1e-6


def test_memory_does_not_grow_with_prompts(data) -> None:
    peaks = {}
    for prompts in (1, None):
        for foreign in (0, 12):
            step = Step(data, f"memory.prompts_per_pass={prompts or 'null'}", f"data.max_foreign={foreign}")
            model = step.model()
            with LiveMemory([*model.parameters(), *model.buffers()]) as memory:
                step.run(model)
            peaks[prompts, foreign] = memory.peak
    assert peaks[1, 12] < 1.05 * peaks[1, 0]
    assert peaks[None, 12] > 2 * peaks[None, 0]  # as the official forward


def test_evaluation_runs_the_official_forward(data) -> None:
    step = Step(data, "memory.prompts_per_pass=null")
    model = step.model().eval()
    assert type(model) is PassModel
    with torch.no_grad():
        ours = model(step.batch)[-1]
        model.__class__ = Sam3Image
        assert torch.equal(ours["pred_boxes"], model(step.batch)[-1]["pred_boxes"])


@pytest.mark.parametrize("points", [None, 4096])
def test_masks_in_chunks_have_the_loss_and_gradient_of_all(points: int | None) -> None:
    torch.manual_seed(0)
    predicted = torch.randn(2, 9, 12, 12, requires_grad=True)
    sampling = {"num_sample_points": points, "oversample_ratio": 1, "importance_sample_ratio": 0.0} if points else {}
    options = {"weight_dict": {"loss_mask": 2.0, "loss_dice": 1.0}} | sampling
    image, query = torch.tensor([0] * 4 + [1] * 5), torch.tensor([1, 3, 4, 8, 0, 2, 5, 6, 7])
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    # One value per mask: then it matters little which points are drawn.
    masks = (torch.rand(9, 1, 1) > 0.5).expand(9, 24, 24) if points else torch.rand(9, 24, 24) > 0.5
    if points:
        predicted = torch.randn(2, 9, 1, 1).expand(2, 9, 12, 12).contiguous().requires_grad_()
    targets = {"masks": masks, "is_valid_mask": valid}
    results = []
    for loss in (Masks(**options), ChunkedMasks(masks_per_chunk=2, **options)):
        for order in (None, torch.arange(9).flip(0)):
            losses = loss({"pred_masks": predicted}, targets, (image, query, order), torch.tensor(9.0))
            results.append((losses, torch.autograd.grad(losses[CORE_LOSS_KEY], predicted)[0]))
    for (expected, wanted), (losses, gradient) in zip(results[:2], results[2:]):
        assert losses.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(losses[key], expected[key], rtol=0.01 if points else 1e-5, atol=0)
        if points is None:
            torch.testing.assert_close(gradient, wanted, atol=1e-7, rtol=1e-4)
        assert gradient.abs().sum() > 0


def test_masks_of_many_objects_are_not_copied_at_once() -> None:
    peaks = {}
    for objects in (16, 128):
        predicted = torch.randn(1, objects, 16, 16, requires_grad=True)
        targets = {"masks": torch.rand(objects, 256, 256) > 0.5, "is_valid_mask": torch.ones(objects, dtype=torch.bool)}
        index = torch.arange(objects)
        loss = ChunkedMasks(16, weight_dict={"loss_mask": 1.0, "loss_dice": 1.0}, num_sample_points=32,
                            oversample_ratio=3, importance_sample_ratio=0.75)
        with LiveMemory() as memory:
            losses = loss({"pred_masks": predicted}, targets, (torch.zeros_like(index), index, index), torch.tensor(1.0))
            losses[CORE_LOSS_KEY].backward()
        peaks[objects] = memory.peak
    assert peaks[128] < 1.3 * peaks[16]


def test_frozen_weights_in_bfloat16_change_no_bit_under_autocast(data) -> None:
    results = []
    for dtype in ("float32", "bfloat16"):
        step = Step(data, f"memory.frozen_dtype={dtype}", "trainer.optim.amp.enabled=true", "loss=boxes",
                    "lora.components.segmentation_head=[]")
        model = step.model()
        with torch.autocast("cpu", torch.bfloat16):
            results.append((*step.run(model), model))
    (losses, gradients, whole), (ours, our_gradients, half) = results
    assert all(torch.equal(ours[k], losses[k]) for k in losses)
    assert all(torch.equal(our_gradients[k], gradients[k]) and gradients[k].dtype == torch.float32 for k in gradients)
    cast = {n: p for n, p in half.named_parameters() if p.dtype == torch.bfloat16}
    linear = sum(p.numel() for n, p in whole.backbone.named_parameters()
                 if p.ndim > 1 and ".adapters." not in n and "embed" not in n and n.endswith(("weight", "in_proj_weight")))
    patches = whole.backbone.vision_backbone.trunk.patch_embed.proj.weight.numel()
    assert sum(p.numel() for p in cast.values()) == linear + patches
    assert all(n.startswith("backbone.") and p.ndim > 1 and not p.requires_grad for n, p in cast.items())


def test_update_smaller_than_the_rounding_of_a_weight_is_not_lost(tiny) -> None:
    Lora(tiny).add(LoraConfig(rank=2, alpha=2, components={"text_encoder": ["out"]}))
    fuse_attention(tiny)
    cast_frozen(tiny.backbone, torch.bfloat16)
    attention = tiny.backbone.language_backbone.encoder.transformer.resblocks[0].attn
    layer, x = attention.out_proj, torch.ones(1, 1, attention.embed_dim)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.base_weight.copy_(0.125 * (-1) ** torch.arange(layer.in_features))
        layer.bias.zero_()
        attention._parameters["in_proj_weight"].zero_()
        attention.in_proj_bias.fill_(1)  # v
        layer.adapters["default"].lora_A["out"].fill_(0.1)
        layer.adapters["default"].lora_B["out"].fill_(1e-3)
        assert layer.base_weight.dtype == torch.bfloat16
        assert torch.equal(layer.adapted_weight(), layer.base_weight)  # 0.125 + 2e-4 rounds to 0.125
        out = attention(x, x, x, need_weights=False)[0].float()
        torch.testing.assert_close(out, torch.full_like(out, 2e-4 * layer.in_features), rtol=0.01, atol=0)


def test_frozen_parts_before_the_first_adapter_keep_nothing_for_backward(data) -> None:
    step = Step(data, "lora.components.vision_encoder=[]", "lora.components.text_encoder=[]")
    model, saved = step.model(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        passes = model(step.batch)
        assert not saved and not passes.outputs
        step.loss(passes, [model.back_convert(t) for t in step.batch.find_targets])
    assert saved


def test_checkpointing_of_vision_and_text_is_chosen_and_changes_no_gradient(data) -> None:
    peaks, gradients = [], []
    for share, text in ((1, "true"), (0.5, "true"), (0, "false")):
        step = Step(data, f"memory.checkpoint_vision={share}", f"memory.checkpoint_text={text}",
                    "memory.prompts_per_pass=1", *LOSSES["boxes"])
        model = step.model()
        with LiveMemory() as memory:
            gradients.append(step.run(model)[1])
        peaks.append(memory.peak)
    assert relative(gradients[0], gradients[2]) < 1e-6 and relative(gradients[1], gradients[2]) < 1e-6
    assert peaks[0] < 0.8 * peaks[1] and peaks[1] < 0.9 * peaks[2]


def test_compiled_vision_blocks_give_the_same_gradients(data, monkeypatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, **k | {"backend": "aot_eager"}))
    torch.compiler.reset()
    results = []
    for chosen in ("false", "true"):
        step = Step(data, f"memory.compile_vision={chosen}", "memory.checkpoint_vision=0.5", *LOSSES["boxes"])
        results.append(step.run(step.model())[1])
    assert relative(results[1], results[0]) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("values, said", [
    ({"frozen_dtype": "int8"}, "memory.frozen_dtype='int8'"),
    ({"prompts_per_pass": 0}, "memory.prompts_per_pass=0"),
    ({"prompts_per_validation": None}, "memory.prompts_per_validation=None"),
    ({"checkpoint_text": 1}, "memory.checkpoint_text=1"),
    ({"checkpoint_vision": 2}, "memory.checkpoint_vision=2"),
    ({"promts": 1}, "memory.promts: no such key"),
])
def test_mistakes_are_named(values: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        MemoryConfig.from_dict(values)


def test_short_weights_need_autocast_and_room(tiny) -> None:
    Lora(tiny).add(LoraConfig(rank=2, alpha=2, components={"detr_decoder": ["attention"]}))
    with pytest.raises(UserError, match="amp.enabled"):
        save_memory(copied(tiny), MemoryConfig(frozen_dtype="bfloat16"), "cpu", None)
    with torch.no_grad():
        tiny.backbone.vision_backbone.trunk.blocks[0].mlp.fc1.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="blocks.0.mlp.fc1.weight is too large"):
        save_memory(tiny, MemoryConfig(frozen_dtype="float16"), "cpu", torch.float16)


def test_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="training.memory=lo: must be one of low, balanced, fast"):
        compose_config("lora_base", ["paths.dataset_root=/data", "training.memory=lo"])


@pytest.mark.parametrize("threshold", [-1.0, 0.4])
def test_validation_enlarges_masks_in_chunks_to_what_it_did_at_once(threshold: float) -> None:
    torch.manual_seed(0)
    outputs = {"pred_logits": torch.randn(2, 40, 1), "pred_boxes": torch.rand(2, 40, 4),
               "pred_masks": torch.randn(2, 40, 12, 12), "presence_logit_dec": torch.randn(2, 1) + 3}
    sizes, options = torch.tensor([[200, 300], [90, 64]]), {
        "max_dets_per_img": -1, "iou_type": "segm", "convert_mask_to_rle": True, "use_original_sizes_mask": True,
        "always_interpolate_masks_on_gpu": False, "detection_threshold": threshold}
    peaks, results = [], []
    for process in (PostProcessImage(**options), ChunkedPostProcess(masks_per_chunk=8, **options)):
        with LiveMemory() as memory:
            results.append(process(outputs, sizes, sizes))
        peaks.append(memory.peak)
    for expected, ours in zip(*results):
        assert ours["masks_rle"] == expected["masks_rle"] and len(ours["masks_rle"]) == len(ours["scores"]) > 5
    assert peaks[1] < 0.5 * peaks[0]
