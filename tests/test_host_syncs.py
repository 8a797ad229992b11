"""What makes the CPU wait for the GPU in a training step: counted on the CPU, where the same operators run."""

import copy
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sam3.train.loss.loss_fns import IABCEMdetr
from sam3.train.trainer import CORE_LOSS_KEY, Trainer
from sam3.train.utils.train_utils import AverageMeter
from sam3_lora_wrapper.launch import compose_config
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset

FORWARDS = 2
TOTAL = "Losses/train_all_loss"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    """The trainer of the tiny run, accumulating two forwards."""
    data = write_dataset(tmp_path_factory.mktemp("data"), SHIFTED, train=4, valid=2)
    cfg = compose_config("lora_tiny", [
        f"paths.dataset_root={data}", f"paths.experiment_log_dir={data}/run", "data.num_workers=0",
        "training.batch_size=2", f"training.gradient_accumulation_steps={FORWARDS}", "trainer.mode=train_only",
    ])
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29519", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    made = instantiate(cfg.trainer, _recursive_=False)
    made.model.train()
    yield made
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def batch(trainer) -> list:
    return next(iter(trainer.train_dataset.get_loader(0)))


def run_step(trainer: Trainer, batch: list) -> tuple[AverageMeter, dict[str, AverageMeter]]:
    """Meters of the total and of the terms after the forwards and backwards of a step."""
    total, terms = AverageMeter("total", trainer.device), {}
    trainer._run_step(copy.deepcopy(batch), "train", {TOTAL: total}, terms)
    return total, terms


def caller() -> str:
    """File of the package that runs the present operator."""
    frame = sys._getframe(2)
    while not any(f"/{package}/" in frame.f_code.co_filename for package in ("sam3", "sam3_lora_wrapper")):
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name


class Reads(TorchDispatchMode):
    """Counts the values that are read one by one (`.item()`, `bool()`, comparisons), by the file that reads."""

    def __init__(self):
        super().__init__()
        self.by_file = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.by_file[caller()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", [1, 10])  # in the tenth, all terms are logged
def test_a_forward_reads_the_device_once(trainer, batch, monkeypatch, step: int) -> None:
    lists, tolist = Counter(), Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: (lists.update([caller()]), tolist(self))[1])
    monkeypatch.setitem(trainer.steps, "train", step)
    monkeypatch.setattr(trainer.logger, "tb_logger", None)
    with Reads() as reads:
        run_step(trainer, batch)
    assert set(reads.by_file) == {"matcher.py"}
    assert lists["trainer.py"] == FORWARDS
    # The decoder reads the feature size, which is on the CPU: see the test below.
    assert set(lists) == {"trainer.py", "matcher.py", "decoder.py"}


def test_meters_hold_plain_numbers_of_every_term(trainer, batch) -> None:
    seen = []
    hook = trainer.loss["all"].register_forward_hook(
        lambda module, args, losses: seen.append({k: v.item() for k, v in losses.items()}))
    total, terms = run_step(trainer, batch)
    hook.remove()
    assert len(seen) == FORWARDS and len(terms) == len(seen[0]) > 30
    assert total.val == seen[-1][CORE_LOSS_KEY] and type(total.avg) is float
    for key, value in seen[0].items():
        meter = terms[f"Losses/train_all_{key}"]
        assert meter.val == seen[1][key] and type(meter.avg) is float
        assert meter.avg == pytest.approx((value + seen[1][key]) / 2, abs=1e-9)


def test_loss_that_is_not_finite_stops_the_training(trainer, batch) -> None:
    hook = trainer.loss["all"].register_forward_hook(
        lambda module, args, losses: losses | {CORE_LOSS_KEY: losses[CORE_LOSS_KEY] * float("nan")})
    with pytest.raises(FloatingPointError, match="Loss is nan"):
        run_step(trainer, batch)
    hook.remove()


@pytest.mark.parametrize("logits, matched, f1", [
    ([[2.0, -1.0, 3.0, -2.0], [-1.0, -1.0, -1.0, 1.0]], [(0, 0), (0, 1), (1, 3)], 2 / 3),  # 2 found, 1 missed, 1 false
    ([[-2.0, -1.0, -3.0, -2.0], [-1.0, -1.0, -1.0, -1.0]], [(0, 0)], 0.0),
    ([[-2.0, -1.0, -3.0, -2.0], [-1.0, -1.0, -1.0, -1.0]], [], 0.0),
])
def test_f1_of_the_queries(logits: list, matched: list, f1: float) -> None:
    boxes = torch.tensor([0.1, 0.1, 0.4, 0.4])
    loss = IABCEMdetr(pos_weight=10.0, weight_dict={"loss_ce": 1.0}, weak_loss=False, use_presence=False)
    indices = torch.tensor(matched, dtype=torch.long).reshape(-1, 2).T
    terms = loss.get_loss(
        {"pred_logits": torch.tensor(logits)[..., None], "pred_boxes_xyxy": boxes.expand(2, 4, 4)},
        {"boxes_xyxy": boxes.expand(len(matched), 4)}, (*indices, None), num_boxes=1,
    )
    assert terms["ce_f1"].item() == pytest.approx(f1, abs=1e-6)


def test_feature_size_stays_on_the_cpu_and_is_found_in_the_cache(tiny) -> None:
    features = torch.empty(1, 64, 6, 8, device="meta")
    prepared = tiny.transformer.encoder._prepare_multilevel_features([features], [None], [features])
    sizes = next(t for t in prepared if t is not None and t.shape == (1, 2))
    assert sizes.device.type == "cpu" and sizes.tolist() == [[6, 8]]
    decoder = tiny.transformer.decoder
    for _ in range(2):
        bias = decoder._get_rpb_matrix(torch.rand(5, 1, 4), sizes[0])  # 5 queries, 1 image
    assert bias.shape == (1, 4, 5, 48)
    assert list(decoder.coord_cache) == [(6, 8)]
