"""Every configuration composes, resolves, and names things that exist."""

from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.launch import CONFIGS, compose_config

PRESETS = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
DATA = "paths.dataset_root=/data"


def targets(node):
    """All `_target_` values below a node."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node["_target_"]
        node = [node[k] for k in node]
    if isinstance(node, (list, ListConfig)):
        for value in node:
            yield from targets(value)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_resolves_and_its_targets_exist(preset: str) -> None:
    cfg = compose_config(f"{preset}.yaml", [DATA])
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    OmegaConf.resolve(cfg.copy())  # as Hydra does before it builds
    names = set(targets(cfg.trainer))
    assert len(names) > 20
    for name in names:
        assert callable(get_object(name))


def test_presets_extend_the_base_by_what_differs() -> None:
    base = OmegaConf.to_container(compose_config("lora_base", [DATA]))
    for preset, changed in {"lora_minimal": {"lora", "config_name"}, "lora_full": {"lora", "config_name"}}.items():
        other = OmegaConf.to_container(compose_config(preset, [DATA]))
        assert {key for key in base if base[key] != other[key]} == changed
        assert set(other) == set(base)


def test_defaults_that_users_rely_on() -> None:
    cfg = compose_config("lora_base.yaml", [DATA])
    assert cfg.paths.experiment_log_dir == "outputs/lora_base"
    assert (cfg.training.max_epochs, cfg.training.batch_size) == (20, 1)
    assert (cfg.training.gradient_accumulation_steps, cfg.training.multiplier) == (4, 1)
    assert cfg.trainer.data.val.collate_fn.dict_key == "detection" == next(iter(cfg.trainer.meters.val))
    assert cfg.loss.masks is True and cfg.trainer.data.train.collate_fn.with_seg_masks is True


def test_accumulation_sets_batch_chunks_and_trainer_together() -> None:
    cfg = compose_config("lora_base", [DATA, "training.batch_size=2", "training.gradient_accumulation_steps=3"])
    assert cfg.trainer.data.train.batch_size == 6
    assert cfg.trainer.data.train.collate_fn.num_chunks == 3
    assert cfg.trainer.gradient_accumulation_steps == 3


def test_boxes_switch_turns_every_mask_off() -> None:
    cfg = compose_config("lora_base", [DATA, "loss=boxes"])
    dumper = cfg.trainer.meters.val.detection.coco
    assert not cfg.trainer.model.masks and not cfg.trainer.data.train.dataset.load_segmentation
    assert dumper.iou_type == dumper.postprocessor.iou_type == "bbox"
    assert [fn._target_.rsplit(".", 1)[1] for fn in cfg.trainer.loss.all.loss_fns_find] == ["Boxes", "IABCEMdetr"]


def test_a_configuration_outside_the_repository_can_extend_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [lora_base, _self_]\nlora: {rank: 3}\n")
    cfg = compose_config(str(tmp_path / "mine.yaml"), [DATA])
    assert cfg.lora.rank == 3 and cfg.config_name == "mine"


def test_misspelt_override_is_refused() -> None:
    with pytest.raises(Exception, match="rnak"):
        compose_config("lora_base", [DATA, "lora.rnak=4"])


def test_unknown_configuration_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="lora_bse.yaml: .*There are: .*lora_base.yaml"):
        compose_config("lora_bse.yaml")


def test_missing_dataset_root_is_named() -> None:
    with pytest.raises(UserError, match="paths.dataset_root"):
        compose_config("lora_base", [])


def test_sizes_follow_the_resolution_and_full_fine_tuning_is_a_choice() -> None:
    cfg = compose_config("lora_base", [DATA, "model.resolution=672", "method=full"])
    assert list(cfg.training.sizes) == [320, 384, 448, 512, 576, 640, 672]
    assert cfg.trainer.model._target_.endswith("trainable_base") and cfg.trainer.model.lora is None
    assert cfg.loss.criterion._target_.endswith("Sam3LossWrapper") and cfg.memory.prompts_per_pass is None


@pytest.mark.parametrize("overrides, said", [
    (["loss=masks"], "loss=masks_semantic or loss=boxes"),
    (["memory.prompts_per_pass=2"], "memory.prompts_per_pass=2: full fine-tuning has no passes"),
])
def test_full_fine_tuning_refuses_what_it_cannot_train(overrides: list, said: str) -> None:
    cfg = compose_config("tiny_full", [DATA, *overrides])
    with pytest.raises(InstantiationException, match=said):
        instantiate(cfg.trainer.model, _convert_="all")
