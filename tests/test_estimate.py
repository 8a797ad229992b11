"""`--dry-run`: what is measured, against sums by hand and the real data; and that it leaves nothing behind."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate

from sam3.train.trainer import unwrap_ddp_if_wrapped
from sam3_lora_wrapper import estimate
from sam3_lora_wrapper.checkpoint import save_adapter
from sam3_lora_wrapper.estimate import StepLog
from sam3_lora_wrapper.launch import compose_config, dry_run, readable_errors
from sam3_lora_wrapper.synthetic import SHIFTED, write_dataset

REPOSITORY = Path(__file__).resolve().parent.parent
ADAPTER, BASE = 295_936, 2_900_478  # parameters of lora_tiny.yaml


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), SHIFTED, train=6, valid=2)


@contextmanager
def built(config: str, data: Path, *overrides: str):
    """The trainer that --dry-run builds."""
    args = SimpleNamespace(dry_run=True, num_gpus=4, use_cluster=True, overrides=[
        f"paths.dataset_root={data}", "data.num_workers=0", "training.batch_size=2", *overrides])
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29521", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with dry_run(args):
        assert (args.num_gpus, args.use_cluster) == (1, False)
        cfg = compose_config(config, args.overrides)
        trainer = instantiate(cfg.trainer, _recursive_=False)
        trainer.logger, trainer.logging_conf.log_scalar_frequency = StepLog(), 1
        try:
            yield trainer
        finally:
            torch.distributed.destroy_process_group()


# Before the fixture below is first used: a process has one process group.
def test_full_fine_tuning(data) -> None:
    with built("tiny_full", data) as trainer:
        measured = estimate.measure_memory(trainer)
        trained = [p for p in trainer.model.parameters() if p.grad is not None]
        assert BASE / 2 < sum(p.numel() for p in trained) < BASE  # text_projection has no gradient
        assert measured.state == pytest.approx(3 * 4 * sum(p.numel() for p in trained), rel=0.01)
        report = estimate.checkpoint_report(trainer)
        (size,) = re.fullmatch(r"checkpoints checkpoint.pt ([\d.]+) MB", report).groups()
        assert float(size) == pytest.approx(3 * 4 * BASE / 1e6, rel=0.02)


@pytest.fixture(scope="module")
def trainer(data):
    with built("lora_tiny", data, "training.gradient_accumulation_steps=2") as made:
        yield made


@pytest.fixture(scope="module")
def memory(trainer) -> estimate.Memory:
    return estimate.measure_memory(trainer)


# ------------------------------------------------------------ memory


def test_weights_gradients_and_state_are_counted_byte_by_byte(trainer, memory) -> None:
    model = unwrap_ddp_if_wrapped(trainer.model)
    assert memory.weights == 4 * (BASE + ADAPTER) + sum(b.nbytes for b in model.buffers())
    factors = sum(1 for p in model.parameters() if p.requires_grad)
    # Gradient and two moments of AdamW, and its count of steps for each parameter.
    assert memory.state == 3 * 4 * ADAPTER + 4 * factors
    assert memory.reserved is None


def test_peak_rises_by_what_a_step_holds_more(trainer, memory) -> None:
    more = 2**30
    def take(module, args) -> None:
        torch.empty(more, dtype=torch.uint8)

    hook = trainer.loss["all"].register_forward_pre_hook(take)
    raised = estimate.measure_step(trainer, (0, 1))
    hook.remove()
    assert memory.weights + memory.state + more < raised.peak < memory.peak + 1.05 * more
    assert memory.weights + memory.state < memory.peak < memory.weights + memory.state + 2**28


@pytest.mark.parametrize("left_out", [0, 2])
def test_steps_are_repeated_until_there_is_optimizer_state(monkeypatch, left_out: int) -> None:
    """A GradScaler leaves out steps at first. The largest of all steps counts."""
    seen, peaks, state = [], iter([5, 9, 7, 1, 3]), {}

    def measure_step(trainer, images) -> estimate.Memory:
        seen.append(images)
        if len(seen) > left_out:
            state["moments"] = 1
        return estimate.Memory(next(peaks), None, 0, 0, 0, 0)

    monkeypatch.setattr(estimate, "measure_step", measure_step)
    monkeypatch.setattr(estimate, "image_loads", lambda dataset: [(1, 9), (2, 1)])
    trainer = SimpleNamespace(train_dataset=SimpleNamespace(dataset=None, batch_size=2), gradient_accumulation_steps=2,
                              optim=SimpleNamespace(optimizer=SimpleNamespace(state=state)))
    assert estimate.measure_memory(trainer).peak == 9
    assert seen == [(1,)] * (left_out + 1) + [(1,), (0,)]


def test_report_adds_up(memory) -> None:
    lines = estimate.memory_report(memory).splitlines()
    peak, *parts = (float(re.search(r"([\d.,]+) MiB", line)[1]) for line in lines)
    assert sum(parts) == pytest.approx(peak, abs=0.2)
    assert f"{memory.prompts} prompts and {memory.objects} objects" in lines[-1]


# ------------------------------------------------------------ the fullest batch


@pytest.mark.parametrize("limits", [(), ("data.max_negatives=1",), ("data.max_objects=1", "data.max_negatives=2")])
def test_loads_are_those_of_the_real_datapoints(data, limits: tuple) -> None:
    cfg = compose_config("lora_tiny", [f"paths.dataset_root={data}", "training.multiplier=2", *limits])
    dataset = instantiate(cfg.data.train.dataset)
    loads = estimate.image_loads(dataset)
    assert len(loads) == 6 and len(dataset) == 12
    assert len(set(loads)) > 1
    for i, load in enumerate(loads):
        queries = dataset[i].find_queries
        assert load == (len(queries), sum(len(q.object_ids_output) for q in queries))


@pytest.mark.parametrize("loads, found", [
    ([(3, 5), (4, 1), (4, 2), (2, 9)], [(2, 1), (3, 0)]),
    ([(3, 5), (3, 1), (3, 2), (3, 9)], [(3, 0)]),
])
def test_fullest_images(loads: list, found: list) -> None:
    assert estimate.fullest(loads, 2) == found


def test_every_forward_gets_the_fullest_images(trainer, monkeypatch) -> None:
    batches = []
    monkeypatch.setattr(trainer, "train_epoch", lambda steps: batches.extend(steps))
    measured = estimate.measure_step(trainer, (4, 1))
    dataset = trainer.train_dataset.dataset
    expected = [len(dataset[i].find_queries) for i in (4, 1)]
    assert measured.prompts == sum(expected)
    assert [len(chunk["all"].img_batch) for chunk in batches[0]] == [2, 2]
    for image in (0, 1):
        assert torch.equal(batches[0][0]["all"].img_batch[image], batches[0][1]["all"].img_batch[image])


# ------------------------------------------------------------ components, checkpoints, time


def test_components_add_up_and_say_how_they_are_stored(trainer) -> None:
    model = unwrap_ddp_if_wrapped(trainer.model)
    rows = {line.split()[0]: line.split() for line in estimate.component_table(model).splitlines()[1:]}
    assert list(rows) == [*estimate.PARTS, "all"]
    assert rows["all"][1:] == ["2,900,478", "11.1", "295,936", "295,936", "float32"]
    number = lambda cell: int(cell.replace(",", ""))  # noqa: E731
    for column in (1, 3, 4):
        assert sum(number(row[column]) for name, row in rows.items() if name != "all") == number(rows["all"][column])
    assert number(rows["detr_decoder"][1]) == sum(
        p.numel() for n, p in model.transformer.decoder.named_parameters() if ".adapters." not in n)
    text = model.backbone.language_backbone.encoder.token_embedding.weight
    before, text.data = text.data, text.data.bfloat16()
    (row,) = (line for line in estimate.component_table(model).splitlines() if line.startswith("text_encoder"))
    text.data = before
    assert row.endswith("bfloat16, float32")
    stored = 4 * number(rows["text_encoder"][1]) - 2 * text.numel()
    assert float(row.split()[2]) == pytest.approx(stored / 2**20, abs=0.06)


def test_checkpoint_is_as_large_as_the_adapter_file(trainer, tmp_path: Path) -> None:
    sizes = dict(re.findall(r"(\S+\.pt) ([\d.]+) MB", estimate.checkpoint_report(trainer)))
    save_adapter(unwrap_ddp_if_wrapped(trainer.model).lora, tmp_path / "adapter.pt", 1)
    assert float(sizes["checkpoint_last.pt"]) == pytest.approx((tmp_path / "adapter.pt").stat().st_size / 1e6, abs=0.01)
    assert float(sizes["checkpoint.pt"]) > 3 * 4 * ADAPTER / 1e6


@pytest.mark.parametrize("first, steps", [(0.1, 20), (5.0, 6), (70.0, 3)])
def test_time_is_the_median_step_and_the_mean_wait(monkeypatch, first: float, steps: int) -> None:
    monkeypatch.setattr(estimate, "SHOWN", float("inf"))
    log, seen = StepLog(), []
    waits = iter([5.0, *[0.0, 0.0, 0.3] * 7])
    times = iter([first, *[2.0, 1.0, 9.0] * 7])

    def train_epoch(batches) -> None:
        assert (batches.batch_size, batches.dataset) == (2, "images")
        for batch in batches:
            seen.append(batch)
            wait = next(waits)
            for name, value in (("Batch Time", next(times) + wait), ("Data Time", wait)):
                log.log(f"Step_Stats/train/{name}", value, 0)

    class Loader(list):
        batch_size, dataset = 2, "images"

    loader = Loader("abcd")
    trainer = SimpleNamespace(train_dataset=SimpleNamespace(get_loader=lambda epoch: loader), logger=log,
                              train_epoch=train_epoch, max_epochs=10)
    assert estimate.measure_time(trainer) == (pytest.approx(2.0), pytest.approx(0.3 * (steps // 3) / steps), steps)
    assert "".join(seen) == ("abcd" * 8)[:1 + steps]


def test_time_of_the_run(monkeypatch) -> None:
    monkeypatch.setattr(estimate, "measure_time", lambda trainer: (2.0, 0.5, 7))
    trainer = SimpleNamespace(train_dataset=SimpleNamespace(get_loader=lambda epoch: range(100)), max_epochs=20)
    report = estimate.time_report(trainer)
    assert "2.00 s per step and 0.50 s of waiting for data (7 steps measured)" in report
    assert "4 min 10 s per epoch of 100 steps, 1 h 23 min for 20 epochs" in report


# ------------------------------------------------------------ the command


def train(folder: Path, *arguments) -> subprocess.CompletedProcess:
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, REPOSITORY / "sam3/train/train.py", "-c", "lora_tiny.yaml", *map(str, arguments)],
        cwd=folder, env=os.environ | {"TMPDIR": str(folder / "tmp")}, capture_output=True, text=True)


def files(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_command_reports_and_leaves_the_run_alone(tmp_path: Path, data: Path) -> None:
    checkpoint = tmp_path / "outputs" / "lora_tiny" / "checkpoints" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"a run that cannot be read")  # nor resumed from
    before = files(tmp_path)
    done = train(tmp_path, f"paths.dataset_root={data}", "data.num_workers=1", "training.batch_size=2",
                 "data.valid_folder=[nowhere]", "tracker=wandb", "--num-gpus", "2", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = (r"\ncomponent .+\nall +2,900,478 .+\npeak memory .+\n +[\d.]+ MiB  weights\n.+\ncheckpoints .+"
             r"checkpoint_last.pt 1.26 MB\n.+\ntime .+ per epoch of 3 steps, .+ for 20 epochs")
    assert re.search(parts, done.stdout, re.S), done.stdout
    assert files(tmp_path) == before
    assert not list((tmp_path / "tmp").glob("sam3-*"))


def test_mistake_is_one_message_and_leaves_nothing(tmp_path: Path, data: Path) -> None:
    done = train(tmp_path, f"paths.dataset_root={data}", "model.weights=/nowhere.pt", "--dry-run")
    assert done.returncode == 1
    assert "/nowhere.pt" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    assert not list((tmp_path / "tmp").glob("sam3-*"))


def test_out_of_gpu_memory_says_how_much_and_what_to_do(monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    with pytest.raises(SystemExit), readable_errors():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ...")
        except RuntimeError as error:
            raise ValueError("in a hook") from error
    said = capsys.readouterr().err
    assert "Tried to allocate 20.00 MiB, with up to 1.50 GiB in use" in said
    assert "training.memory=low" in said and "loss=boxes" in said
