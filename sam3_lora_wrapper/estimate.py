"""What a run will take, measured in a few of its steps: `python sam3/train/train.py -c CONFIG --dry-run`.

`launch.dry_run` puts `DryRun` in the place of the official trainer. It is built as the trainer is, and goes through
the trainer's own loop.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sam3.train.trainer import Trainer, unwrap_ddp_if_wrapped
from sam3.train.transforms.filter_query_transforms import FilterFindQueriesWithTooManyOut
from sam3_lora_wrapper.dataset.loader import CocoDataset
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.live_memory import LiveMemory

PARTS = {  # whole modules, where targets.COMPONENTS names what is adapted in them
    "vision_encoder": "backbone.vision_backbone.",
    "text_encoder": "backbone.language_backbone.",
    "geometry_encoder": "geometry_encoder.",
    "detr_encoder": "transformer.encoder.",
    "detr_decoder": "transformer.decoder.",
    "segmentation_head": "segmentation_head.",
    "other": "",
}
MEASURED = (3, 20)  # ordinary steps: at least, at most
SECONDS = 30        # that they should take
SKIPPED = 20        # steps that a GradScaler may leave out until its scale fits
SHOWN = 5           # seconds; that a longer step is done is shown


class DryRun(Trainer):
    """The official trainer, whose run is a few measured steps and a report."""

    def run(self) -> None:
        """Print what the run would take, each part as soon as it is known.

        Raises:
            UserError: the configuration is one of upstream's, whose data cannot be asked for its fullest images.
        """
        if not isinstance(self.train_dataset.dataset, CocoDataset):
            raise UserError("--dry-run needs a CocoDataset to train on, as in sam3_lora_configs/data/coco.yaml")
        self.logger, self.logging_conf.log_scalar_frequency = StepLog(), 1
        print(f"\n{component_table(unwrap_ddp_if_wrapped(self.model))}\n", flush=True)
        print(f"\n{memory_report(measure_memory(self))}\n", flush=True)
        print(f"\n{checkpoint_report(self)}\n", flush=True)
        print(f"\n{time_report(self)}", flush=True)


class StepLog:
    """Stands in for the trainer's logger: keeps the statistics of each step by their names."""

    def __init__(self):
        self.values: dict[str, list[float]] = defaultdict(list)

    def log(self, name: str, value: float, step: int) -> None:
        """Take a scalar from the trainer."""
        if name.startswith("Step_Stats/train/"):
            self.values[name.rpartition("/")[2]].append(value)
        if name.endswith("/Batch Time") and value > SHOWN:
            show(f"step done in {value:.0f} s")


class Steps:
    """Stands in for the loader of an epoch: the next `count` of some batches."""

    def __init__(self, loader, batches: Iterable, count: int):
        self.batches, self.count = batches, count
        self.batch_size, self.dataset = loader.batch_size, loader.dataset

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator:
        return islice(self.batches, self.count)


def show(line: str) -> None:
    """Print what is going on, above a progress bar."""
    tqdm.write(f"dry run: {line}")


# ------------------------------------------------------------ components


def component_table(model: nn.Module) -> str:
    """The parameters of a model, a line per component: of the base as it is stored, of adapters, and trained."""
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        groups[next(part for part, prefix in PARTS.items() if name.startswith(prefix))].append((name, parameter))
    lines = [f"{'component':<18} {'parameters':>12} {'MiB':>9} {'adapter':>11} {'trained':>12}  stored as"]
    for part, members in (groups | {"all": list(model.named_parameters())}).items():
        base = [p for name, p in members if ".adapters." not in name]
        if members:
            dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in base}))
            parameters = count(base)
            lines.append(f"{part:<18} {parameters:>12,} {sum(p.nbytes for p in base) / 2**20:>9,.1f} "
                         f"{count(p for _, p in members) - parameters:>11,} "
                         f"{count(p for _, p in members if p.requires_grad):>12,}  {dtypes}")
    return "\n".join(lines)


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of values."""
    return sum(p.numel() for p in parameters)


# ------------------------------------------------------------ memory


@dataclass(frozen=True)
class Memory:
    """Memory of a step, in bytes.

    Args:
        peak: most that was taken at any time.
        reserved: what the allocator of the GPU held for it; None on the CPU.
        weights: parameters and buffers.
        state: gradients and the optimizer's state.
        prompts: of a forward.
        objects: of a forward.
    """

    peak: int
    reserved: int | None
    weights: int
    state: int
    prompts: int
    objects: int


def image_loads(dataset) -> list[tuple[int, int]]:
    """(prompts, objects) that each image of a CocoDataset brings, but for the foreign words, alike for all."""
    filters = [getattr(transform, "query_filter", None) for transform in dataset._transforms]
    limit = min((f.max_num_objects for f in filters if isinstance(f, FilterFindQueriesWithTooManyOut)), default=None)
    loads = []
    for row in dataset.coco.rows:
        annotations = json.loads(row)[1]
        absent = len(dataset.coco.texts) - len({a["category_id"] for a in annotations})
        negatives = dataset.coco.max_negatives
        objects = Counter(a["category_id"] for a in annotations if not a["iscrowd"])
        kept = [n for n in objects.values() if limit is None or n <= limit]
        loads.append((len(kept) + (absent if negatives is None else min(absent, negatives)), sum(kept)))
    return loads


def fullest(loads: list[tuple[int, int]], size: int) -> list[tuple[int, ...]]:
    """The `size` images with the most prompts, and those with the most objects, where they are others."""
    images = range(len(loads))
    return list(dict.fromkeys((
        tuple(nlargest(size, images, key=lambda i: loads[i])),
        tuple(nlargest(size, images, key=lambda i: loads[i][::-1])),
    )))


def measure_memory(trainer: Trainer) -> Memory:
    """Memory of the step that takes the most, the optimizer's state included.

    Which of the fullest batches that is, is measured. The images' sizes make no difference: all are padded.
    """
    data = trainer.train_dataset
    candidates = fullest(image_loads(data.dataset), data.batch_size // trainer.gradient_accumulation_steps)
    measured = []
    while not trainer.optim.optimizer.state and len(measured) < SKIPPED:
        measured.append(measure_step(trainer, candidates[0]))  # makes the optimizer's state
    measured += [measure_step(trainer, images) for images in candidates]
    return max(measured, key=lambda memory: memory.peak)


def measure_step(trainer: Trainer, images: tuple[int, ...]) -> Memory:
    """Memory of a step in which every forward gets the same images."""
    data, chunks = trainer.train_dataset, trainer.gradient_accumulation_steps
    on_gpu = trainer.device.type == "cuda"
    with nullcontext() if on_gpu else LiveMemory(held(trainer)) as live:
        points = [data.dataset[i] for i in images for _ in range(chunks)]
        prompts = sum(len(p.find_queries) for p in points) // chunks
        objects = sum(len(q.object_ids_output) for p in points for q in p.find_queries) // chunks
        show(f"a step with {prompts} prompts and {objects} objects in a forward")
        batch = data.collate_fn(points)
        del points
        if not on_gpu:
            live.reset_peak()
        trainer.train_epoch(Steps(data.get_loader(0), iter([batch]), 1))
    return Memory(
        peak=round(trainer.logger.values["Mem (GB)"][-1] * 1e9) if on_gpu else live.peak,
        reserved=torch.cuda.memory_reserved() if on_gpu else None,
        weights=size_of(weights(trainer), trainer),
        state=size_of(training_state(trainer), trainer),
        prompts=prompts,
        objects=objects,
    )


def weights(trainer: Trainer) -> Iterator[Tensor]:
    """Parameters and buffers."""
    return chain(trainer.model.parameters(), trainer.model.buffers())


def training_state(trainer: Trainer) -> Iterator[Tensor]:
    """Gradients, and the tensors of the optimizer's state."""
    for parameter in trainer.model.parameters():
        if parameter.grad is not None:
            yield parameter.grad
    for values in trainer.optim.optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor))


def held(trainer: Trainer) -> Iterator[Tensor]:
    """What is in memory between two steps."""
    return chain(weights(trainer), training_state(trainer))


def size_of(tensors: Iterable[Tensor], trainer: Trainer) -> int:
    """Bytes of the tensors that are on the trainer's device."""
    return sum(t.nbytes for t in tensors if t.device.type == trainer.device.type)


def memory_report(memory: Memory) -> str:
    """The peak and where it is."""
    how = "on the CPU, as the tensors alive at one time: the allocator of a GPU would hold about as much"
    if memory.reserved is not None:
        how = f"on {torch.cuda.get_device_name()}, whose allocator reserved {amount(memory.reserved)}"
    return "\n".join([
        f"peak memory {amount(memory.peak)}, measured {how}",
        f"  {amount(memory.weights):>12}  weights",
        f"  {amount(memory.state):>12}  gradients and optimizer state",
        f"  {amount(memory.peak - memory.weights - memory.state):>12}  the rest: activations of "
        f"{memory.prompts} prompts and {memory.objects} objects, the most in a forward",
    ])


def amount(size: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


# ------------------------------------------------------------ checkpoints and time


def checkpoint_report(trainer: Trainer) -> str:
    """Sizes of the files that an epoch leaves, written to the temporary folder."""
    trainer.save_checkpoint(1)
    files = sorted(Path(trainer.checkpoint_conf.save_dir).glob("*.pt"))
    return "checkpoints " + (", ".join(f"{f.name} {f.stat().st_size / 1e6:,.2f} MB" for f in files) or "none")


def time_report(trainer: Trainer) -> str:
    """Time of an epoch and of the run, from ordinary steps."""
    step, wait, steps = measure_time(trainer)
    per_epoch = len(trainer.train_dataset.get_loader(0))
    epoch = per_epoch * (step + wait)
    return (f"time {step:.2f} s per step and {wait:.2f} s of waiting for data ({steps} steps measured)\n"
            f"  {duration(epoch)} per epoch of {per_epoch} steps, {duration(epoch * trainer.max_epochs)} for "
            f"{trainer.max_epochs} epochs; validation comes on top, and several GPUs divide the steps")


def measure_time(trainer: Trainer) -> tuple[float, float, int]:
    """Seconds of a step and of waiting for its data, after a first step, and the number of steps measured.

    The step is the median. Of the waiting it is the mean: workers deliver in bursts.
    """
    loader, values = trainer.train_dataset.get_loader(0), trainer.logger.values
    batches = chain.from_iterable(repeat(loader))
    show("ordinary steps")
    trainer.train_epoch(Steps(loader, batches, 1))
    first = values["Batch Time"][-1] - values["Data Time"][-1]
    values.clear()
    least, most = MEASURED
    trainer.train_epoch(Steps(loader, batches, max(least, min(most, int(SECONDS / first)))))
    waits = values["Data Time"]
    return median(whole - wait for whole, wait in zip(values["Batch Time"], waits)), mean(waits), len(waits)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
