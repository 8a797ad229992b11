"""The ViT's output for an image, kept on disk: where nothing of the vision encoder is trained, it never changes."""

import hashlib
import logging
import os
import re
import shutil
import uuid
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sam3.model.vitdet import ViT
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.text_cache import require_frozen

OWN_NAME = re.compile(r"[0-9a-f]{64}\.(safetensors|[0-9a-f]{32}\.tmp)")


class FeatureFiles:
    """Tensors on disk, those unused for longest removed beyond a limit; processes may share the folder.

    Only files in its subfolders that are named as this class names them are read, counted or removed.

    Args:
        folder: is made where it is absent.
        limit: bytes of all files. Processes that share the folder see one another's files at the latest after
            LOOK_EVERY files of their own.

    Attributes:
        hits, misses, damaged: tensors found, not found, and found but not as they were written, since `report`.
        size: bytes on disk, as far as this process knows.
    """

    LOOK_EVERY = 64

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit, self.written = folder, limit, 0
        self.hits = self.misses = self.damaged = 0
        self.trim()

    def get(self, name: str) -> Tensor | None:
        """The tensor `<subfolder>/<64 hexadecimal digits>` on the CPU, or None where it must be computed."""
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor("features")
                whole = file.metadata() == {"crc32": checksum(tensor)}
        except FileNotFoundError:
            self.misses += 1
            return None
        except SafetensorError:
            whole = False
        if not whole:
            self.damaged += 1
            return None
        with suppress(FileNotFoundError):  # another process may have removed it since
            os.utime(path)
        self.hits += 1
        return tensor

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the CPU; another process sees the whole file or none.

        Raises:
            UserError: the folder cannot be written to.
        """
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        content = save({"features": tensor}, {"crc32": checksum(tensor)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(
                f"memory.feature_cache={self.folder}: {error.strerror} while writing. "
                "Make room, give another folder, or set it to null"
            ) from error
        self.size += len(content)
        self.written += 1
        if self.size > self.limit or self.written % self.LOOK_EVERY == 0:
            self.trim()

    def trim(self) -> None:
        """Look at the folder; where it is beyond the limit, remove what was unused for longest down to 90% of it."""
        files = []
        for path in self.folder.glob("*/*"):
            if OWN_NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        self.size = sum(size for _, size, _ in files)
        if self.size > self.limit:
            for _, size, path in sorted(files):
                if self.size <= 0.9 * self.limit:
                    break
                path.unlink(missing_ok=True)
                self.size -= size

    def report(self) -> None:
        """Log what was found since the last report."""
        if self.hits or self.misses or self.damaged:
            damaged = f", {self.damaged} damaged files" if self.damaged else ""
            logging.info(
                f"feature cache: {self.hits} hits, {self.misses} misses{damaged}; "
                f"{self.size / 2**30:.2f} of {self.limit / 2**30:g} GiB"
            )
        self.hits = self.misses = self.damaged = 0


class CachedTrunk(ViT):
    """A frozen ViT that computes what the files do not hold, each image alone.

    The key of an image is exact: the SHA-256 of its pixels as the ViT gets them, in a folder named by the base and the
    dtypes. Random sizes and augmentations make other pixels, and so only lower the share of hits. Features are
    kept in the dtype of autocast, which the neck casts them to first; they do not depend on training or evaluation.
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features (n, width, h, w) of images (n, 3, H, W), in a list of one.

        Raises:
            UserError: a parameter of the ViT has become trainable.
        """
        require_frozen(self, "vision_encoder")
        weights, device = self.patch_embed.proj.weight.dtype, x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights
        kind = f"{self.fingerprint[:16]}_{dtype}_weights_{weights}".replace("torch.", "")
        found = []
        for image, pixels in zip(x.detach().split(1), x.detach().cpu()):
            name = f"{kind}/{pixel_key(pixels)}"
            features = self.files.get(name)
            if features is None:
                features = self.compute(image).to(dtype)
                self.files.put(name, features.cpu())
            found.append(features.to(x.device))
        return [torch.stack(found).permute(0, 3, 1, 2)]

    def compute(self, image: Tensor) -> Tensor:
        """Features (h, w, width) of one image (1, 3, H, W), in the memory order that the ViT gives them."""
        (features,) = super().forward(image)
        return features[0].permute(1, 2, 0)

    def train(self, mode: bool = True) -> nn.Module:
        """Change the mode, which ends an epoch: what it found is logged."""
        self.files.report()
        return super().train(mode)


def as_bytes(tensor: Tensor):
    """The bytes of a tensor of the CPU, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def pixel_key(pixels: Tensor) -> str:
    """SHA-256 of an image: its dtype, shape and values."""
    digest = hashlib.sha256(f"{pixels.dtype}{tuple(pixels.shape)}".encode())
    digest.update(as_bytes(pixels))
    return digest.hexdigest()


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor: its dtype, shape and values."""
    return f"{zlib.crc32(as_bytes(tensor), zlib.crc32(f'{tensor.dtype}{tuple(tensor.shape)}'.encode())):08x}"


def cache_features(model: nn.Module, folder: str | Path, limit_gib: float, fingerprint: str) -> None:
    """Keep the output of a model's ViT on disk; its weights must not change afterwards.

    Args:
        model: an official model whose vision encoder is frozen and has no dropout or drop-path (see adapters.Lora).
        folder: of the files, 10.6 MB for an image of 1008 px under bfloat16; runs and processes may share it.
        limit_gib: largest size of the folder, in GiB.
        fingerprint: of the base (see base.fingerprint).

    Raises:
        UserError: something of the vision encoder is trained, or the folder or the limit cannot be used.
    """
    trunk, folder = model.backbone.vision_backbone.trunk, Path(folder).expanduser()
    require_frozen(trunk, "vision_encoder")
    if isinstance(limit_gib, bool) or not isinstance(limit_gib, (int, float)) or not 0 < limit_gib < float("inf"):
        raise UserError(f"memory.feature_cache_gib={limit_gib!r}: must be a number above 0")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"memory.feature_cache={folder}: {error.strerror}. Give another folder") from error
    files = FeatureFiles(folder, int(limit_gib * 2**30))
    if files.size + free < files.limit:
        raise UserError(
            f"memory.feature_cache_gib={limit_gib:g}: the disk of {folder} has room for "
            f"{(files.size + free) / 2**30:.1f} GiB. Lower it, or give another memory.feature_cache"
        )
    trunk.__class__, trunk.files, trunk.fingerprint = CachedTrunk, files, fingerprint
    logging.info(f"feature cache: {files.size / 2**30:.2f} of {limit_gib:g} GiB used in {folder}")
