"""Bytes of the tensors that are alive: what a GPU's allocator would hold, measured on any device."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Context that follows every tensor storage which operators make, until it is freed.

    Scratch memory inside an operator is not seen; on a GPU that is cuBLAS's and cuDNN's workspace.

    Args:
        tensors: tensors that are alive already and count from the start, e.g. parameters.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at any time since the start or `reset_peak`.
    """

    def __init__(self, tensors=()):
        super().__init__()
        self.live = self.peak = 0
        self._known = {}
        for tensor in tensors:
            self._add(tensor)

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known and storage.device.type != "meta":
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            self._known[key] = weakref.ref(storage, lambda _: self._remove(key, size))

    def _remove(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]
