"""The official base model: building it, and loading its weights without losing a key."""

import hashlib
import logging
import pickle
from pathlib import Path

import torch
from hydra.utils import get_object, instantiate
from torch import nn

from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.tensors import require_tensors

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = REPOSITORY / "sam3" / "assets" / "bpe_simple_vocab_16e6.txt.gz"
SHIPPED = {"sam3_tiny": Path(__file__).parent / "assets" / "sam3_tiny.pt"}

# Packages whose classes and functions a base may be built of. A recorded configuration comes
# from a file that may come from anyone: it must not be able to name os.system.
TRUSTED = ("sam3.model", "sam3.sam", "sam3.train.matcher", "sam3_lora_wrapper.base", "torch.nn")

# Parts of the release that the image model does not have: the video tracker and its neck.
VIDEO_ONLY = ("tracker.", "backbone.vision_backbone.sam2_convs.")


def require_generated() -> None:
    """Raise UserError unless ./sam3 has been generated."""
    if not VOCABULARY.is_file():
        raise UserError("sam3/ is not generated. Run: python patches/apply.py")


def official_tokenizer():
    """The official BPE tokenizer with the vocabulary of sam3/assets."""
    from sam3.model.tokenizer_ve import SimpleTokenizer

    require_generated()
    return SimpleTokenizer(bpe_path=str(VOCABULARY))


def official_image_model() -> nn.Module:
    """The official SAM3 image model on the CPU, in training mode, without weights."""
    from sam3.model_builder import build_sam3_image_model

    require_generated()
    return build_sam3_image_model(
        bpe_path=str(VOCABULARY), device="cpu", eval_mode=False, load_from_HF=False
    )


def _check_targets(config) -> None:
    """Raise UserError where a configuration builds anything but parts of a model."""
    if isinstance(config, dict):
        if "_target_" in config:
            target = config["_target_"]
            module = getattr(get_object(target), "__module__", None) or ""
            if not any(module == t or module.startswith(t + ".") for t in TRUSTED):
                raise UserError(f"{target} is not a part of SAM3: refusing to build a base from it")
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            _check_targets(value)


def build_base(base: dict, weights: str) -> nn.Module:
    """Build the base model and load its weights.

    Args:
        base: Hydra configuration of the official model (`_target_` and arguments).
        weights: `hub` (facebook/sam3), a name in SHIPPED, the path of a checkpoint, or `random`.

    Returns:
        The official model on the CPU, float32, in training mode.

    Raises:
        UserError: the weights cannot be had, or do not fit the model key by key.
    """
    require_generated()
    _check_targets(base)
    # Seeded, so that a base of random weights can be rebuilt for the adapter trained on it.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = instantiate(base)
        if weights == "random":
            initialise_text_tensors(model)
    if weights != "random":
        load_weights(model, find_weights(weights))
    return model.train()


def set_resolution(model: nn.Module, side: int) -> None:
    """Let a model take square images of another side: its rotary embeddings are interpolated to their grid.

    Args:
        model: an official image model, its weights loaded (upstream stores the embeddings of its own side with them).
        side: of the images, in pixels.

    Raises:
        UserError: the side is not whole patches.
    """
    trunk = model.backbone.vision_backbone.trunk
    patch = trunk.patch_embed.proj.kernel_size[0]
    if side % patch or side <= 0:
        raise UserError(f"model.resolution={side}: must be a multiple of {patch}")
    grid = (side // patch, side // patch)
    for block in trunk.blocks:
        if block.window_size == 0 and block.attn.input_size != grid:
            block.attn.input_size = grid
            block.attn._setup_rope_freqs()


def initialise_text_tensors(model: nn.Module) -> None:
    """Fill the two text tensors that upstream leaves uninitialised (text_encoder_ve.py)."""
    encoder = model.backbone.language_backbone.encoder
    for tensor in (encoder.positional_embedding, encoder.text_projection):
        nn.init.normal_(tensor, std=0.01)
    nn.init.normal_(encoder.token_embedding.weight, std=0.02)


def find_weights(weights: str) -> Path:
    """Path of the checkpoint that `weights` names, downloaded where it must be."""
    if weights == "hub":
        return _download()
    path = SHIPPED.get(weights, Path(weights).expanduser())
    if not path.is_file():
        raise UserError(
            f"model.weights={weights}: no such file. Give `hub`, `random`, "
            f"{', '.join(SHIPPED)} or the path of a checkpoint such as sam3.pt"
        )
    return path


def _download() -> Path:
    """Fetch sam3.pt of the gated repository facebook/sam3 by the official function."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    from sam3.model_builder import download_ckpt_from_hf

    local = "or download sam3.pt elsewhere and run with model.weights=/path/to/sam3.pt"
    try:
        return Path(download_ckpt_from_hf())
    except GatedRepoError as error:
        raise UserError(
            "facebook/sam3 is gated and this account has no access (or is not logged in). Ask for "
            "access at https://huggingface.co/facebook/sam3, then run `hf auth login`, " + local
        ) from error
    except (LocalEntryNotFoundError, ConnectionError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HfHubHTTPError) and status in (401, 403):
            raise UserError("not logged in to the Hugging Face hub. Run `hf auth login`, " + local) from error
        raise UserError(f"facebook/sam3 cannot be downloaded ({error}). Check the connection, {local}") from error


def read_checkpoint(path: Path) -> dict:
    """Read a file written by torch.save, refusing anything but tensors and plain values."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: cut short, or not a PyTorch checkpoint") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def image_weights(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """Rename a checkpoint's tensors to the image model's names.

    Knows the release (`detector.` and `tracker.`), the trainer's layout (no prefix) and that of
    DistributedDataParallel (`module.`).

    Returns:
        The tensors under the model's names, and how many belong to the video model and were left out.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith("detector.") for key in state):
        state = {k.removeprefix("detector."): v for k, v in state.items()}
    kept = {k: v for k, v in state.items() if not k.startswith(VIDEO_ONLY)}
    return kept, len(state) - len(kept)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint of any layout into the model; every key must find its place.

    Raises:
        UserError: keys are missing, unexpected or of another shape; the message lists them and
            the model is as it was.
    """
    content = read_checkpoint(path)
    state, left_out = image_weights(content.get("model", content))
    require_tensors(state, {k: v.shape for k, v in model.state_dict().items()}, f"{path} does not fit the model")
    model.load_state_dict(state)
    note = f", {left_out} of the video model left out" if left_out else ""
    logging.info(f"{path}: {len(state)} tensors loaded{note}")


def identity(model: nn.Module) -> dict:
    """What tells a base from others: its number of parameters and its fingerprint."""
    return {"parameters": sum(p.numel() for p in model.parameters()), "fingerprint": fingerprint(model)}


def fingerprint(model: nn.Module) -> str:
    """Identity of a model's weights: names, shapes and 64 values of every parameter.

    Any training changes it; storing the same weights in another layout does not. Reads about a
    hundred thousand numbers, so it takes well under a second for the 840M model.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        step = max(1, values.numel() // 64)
        sample = values[::step][:64].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
