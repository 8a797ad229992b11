"""What the patches change in the official package, a behaviour each."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sam3.train.data.coco_json_loaders import COCO_FROM_JSON
from sam3.train.data.sam3_image_dataset import Datapoint, Image, Object
from sam3.train.data.torch_dataset import TorchDataset
from sam3.train.loss.loss_fns import Masks, SemanticSegCriterion
from sam3.train.optim.optimizer import construct_optimizer
from sam3.train.trainer import Trainer
from sam3.train.transforms.filter_query_transforms import FilterEmptyTargets
from sam3.train.utils.train_utils import get_amp_type
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.launch import compose_config
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Composed configuration of the tiny run on eight generated images, accumulating two forwards."""
    data = write_dataset(tmp_path_factory.mktemp("data"), SHIFTED, train=8, valid=2)
    return compose_config("lora_tiny", [
        f"paths.dataset_root={data}", f"paths.experiment_log_dir={data}/run", "data.num_workers=0",
        "training.batch_size=2", "training.gradient_accumulation_steps=2", "trainer.mode=train_only",
    ])


@pytest.fixture(scope="module")
def trainer(cfg):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29517", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    yield instantiate(cfg.trainer, _recursive_=False)
    torch.distributed.destroy_process_group()


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_accumulated_gradient_is_the_mean_of_the_chunks(trainer) -> None:
    trainer.model.train()
    # Points of the mask loss are drawn at random: the loss over all pixels is compared instead.
    for loss in trainer.loss["all"].loss_fns_find:
        if isinstance(loss, Masks):
            loss.num_sample_points = None
    chunks = next(iter(trainer.train_dataset.get_loader(0)))
    assert len(chunks) == 2
    meters = lambda: {"Losses/train_all_loss": instantiate(  # noqa: E731
        {"_target_": "sam3.train.utils.train_utils.AverageMeter", "name": "loss", "device": "cpu"})}
    trainer._run_step(copy.deepcopy(chunks), "train", meters(), {})
    accumulated = gradients(trainer)
    trainer.gradient_accumulation_steps = 1
    alone = []
    for chunk in chunks:
        trainer._run_step(copy.deepcopy(chunk), "train", meters(), {})
        alone.append(gradients(trainer))
    trainer.gradient_accumulation_steps = 2
    for name, gradient in accumulated.items():
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-4, atol=1e-5)
    assert sum(g.abs().sum() for g in accumulated.values()) > 1


def test_optimizer_holds_adapters_alone_in_groups_of_their_own(trainer) -> None:
    groups = trainer.optim.optimizer.param_groups
    trained = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} == trained
    assert len(groups) == 2 and all(g["weight_decay"] == 0 for g in groups)


def test_lora_plus_and_full_rates_reach_their_parameters(cfg) -> None:
    lora = OmegaConf.to_container(cfg.lora) | {"modules_to_save": ["dot_prod_scoring"]}
    changed = OmegaConf.merge(cfg, {"lora": lora, "training": {"lora_plus_ratio": 16, "lr_full": 5e-5}})
    model = instantiate(changed.trainer.model, _convert_="all")
    optim = changed.trainer.optim
    optimizer = construct_optimizer(model, optim.optimizer, optim.options)
    optimizer.step_schedulers(where=changed.training.warmup, step=1)  # the top of the schedule
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            adapter = changed.training.lr
            rate = adapter if ".lora_A." in name else 16 * adapter if ".lora_B." in name else 5e-5
            assert group["lr"] == pytest.approx(rate, rel=1e-6), name
            assert group["weight_decay"] == (0 if ".lora_" in name else 0.01), name


@pytest.mark.parametrize("steps", [3, 100, 30_000])
def test_schedule_has_one_shape_for_any_length(steps: int) -> None:
    from sam3_lora_wrapper.schedule import warmup_cosine

    schedule = warmup_cosine(1.0, 0.05)
    rates = [schedule(step / steps) for step in range(steps)]
    assert all(0 < r <= 1 for r in rates)
    assert rates[0] == pytest.approx(0.1)
    if steps > 3:
        assert max(rates) == pytest.approx(1, abs=0.01)
        assert sum(rates) / steps == pytest.approx(0.05 * 0.55 + 0.95 * 0.505, rel=0.02)


def test_amp_dtype_auto_is_bfloat16_where_the_device_has_it() -> None:
    assert get_amp_type("auto") is torch.bfloat16 or torch.cuda.is_available()
    assert (get_amp_type("float16"), get_amp_type(None)) == (torch.float16, None)


def test_small_object_of_a_large_image_is_kept(tmp_path: Path) -> None:
    """8 x 8 pixels of 4000 x 3000: a fraction of 5e-6, below 1e-6 once resized to 1008 px."""
    coco = {"images": [{"id": 1, "file_name": "a.jpg", "width": 4000, "height": 3000}],
            "categories": [{"id": 1, "name": "crack"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 8, 8], "iscrowd": 0}]}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    _, annotations = COCO_FROM_JSON(str(tmp_path / "a.json")).loadQueriesAndAnnotationsFromDatapoint(0)
    assert annotations[0]["area"] == pytest.approx(64, rel=1e-4)
    scaled = annotations[0]["area"] * (1008 / 4000) * (1008 / 3000)
    shown = Image(data=None, objects=[Object(bbox=None, area=scaled), Object(bbox=None, area=0.0)], size=(1008, 1008))
    empty = FilterEmptyTargets()
    empty.identify_queries_to_filter(Datapoint(find_queries=[], images=[shown]))
    assert empty.obj_ids_to_filter == {(0, 1)}


def test_prompts_are_not_evaluated(tmp_path: Path) -> None:
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(coco))
    witness = tmp_path / "witness"
    with pytest.raises(TypeError):
        COCO_FROM_JSON(str(tmp_path / "a.json"), prompts=f"open({str(witness)!r}, 'w')")
    assert not witness.exists()
    assert COCO_FROM_JSON(str(tmp_path / "a.json"), prompts=[{"id": 1, "name": "b"}]).prompts == {1: "b"}


def test_mask_losses_of_a_batch_without_objects() -> None:
    logits = torch.randn(2, 5, 24, 24, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    targets = {"masks": torch.zeros(0, 96, 96, dtype=torch.bool), "is_valid_mask": torch.zeros(0, dtype=torch.bool),
               "num_boxes": torch.zeros(2, dtype=torch.long)}
    masks = Masks({"loss_mask": 1.0, "loss_dice": 1.0}, num_sample_points=64, oversample_ratio=3,
                  importance_sample_ratio=0.75)
    loss = masks(outputs={"pred_masks": logits}, targets=targets, indices=(none, none, None), num_boxes=1)
    loss["core_loss"].backward()  # in the graph, or DistributedDataParallel would wait for it forever
    assert loss["core_loss"].item() == 0 and not logits.grad.any()
    semantic = SemanticSegCriterion({"loss_semantic_seg": 1.0}, focal=True, presence_head=True, presence_loss=False)
    outputs = {"semantic_seg": torch.randn(2, 1, 24, 24, requires_grad=True), "presence_logit": None}
    assert semantic(outputs, targets | {"masks": torch.zeros(0)})["core_loss"].item() == 0


def loader_of(images: int, **arguments) -> TorchDataset:
    return TorchDataset(list(range(images)), shuffle=True, pin_memory=False, enable_distributed_sampler=False,
                        collate_fn=list, **arguments)


def test_workers_live_between_epochs() -> None:
    dataset = loader_of(4, batch_size=2, num_workers=1, drop_last=True)
    first = dataset.get_loader(0)
    assert first.persistent_workers and dataset.get_loader(1) is first


def test_empty_loader_is_an_error_that_says_why() -> None:
    with pytest.raises(UserError, match=r"3 images do not fill one batch of 4"):
        loader_of(3, batch_size=4, num_workers=0, drop_last=True).get_loader(0)


def test_interrupted_save_leaves_the_old_checkpoint(trainer, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint.pt")
    trainer._save_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle|Can't"):
        trainer._save_checkpoint({"epoch": lambda: 2}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
