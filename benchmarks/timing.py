"""Fair timing of several candidates in one process, and the bytes that autograd keeps for backward."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes, with the work that it leaves on the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(candidates: dict[str, Callable], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time candidates in rounds, each round in a new order: what slows the machine slows all of them.

    Args:
        candidates: functions without arguments, by name.
        repeats: number of rounds; each calls every candidate once.
        warmup: calls of each candidate that are not timed.

    Returns:
        The seconds of every call, by name.
    """
    order, shuffle = list(candidates), random.Random(0).shuffle
    times = {name: [] for name in order}
    for name in order * warmup:
        candidates[name]()
    gc.collect()
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            times[name].append(timed(candidates[name]))
    return times


def median_iqr(seconds: list[float]) -> str:
    """Median and interquartile range as `median (range)`, in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{middle * 1e3:.1f} ({(high - low) * 1e3:.1f})"


def verdict(value: float, limit: float) -> str:
    """`met` where a value is at most its limit, else `missed`."""
    return "met" if value <= limit else "missed"


def saved_bytes(forward: Callable[[], object], existing: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of `forward()`, every storage counted once.

    Args:
        forward: function without arguments whose output requires gradients.
        existing: tensors that are there without it and are left out: parameters, buffers, inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in existing}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    size = sum(storage.nbytes() for storage in kept.values())
    del output
    return size
