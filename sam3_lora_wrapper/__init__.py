"""LoRA adapters for the official SAM 3, trained by the official trainer.

The public names are imported when they are asked for: the patched official package imports
parts of this one, and must not import all of it.
"""

import re
import warnings
from importlib import import_module

# Said at every import of the official package, of no use to who runs it.
for _noise in ("`torch.jit.script` is deprecated", "CUDA is not available or torch_xla is imported"):
    warnings.filterwarnings("ignore", message=re.escape(_noise))

_PUBLIC = {
    "Lora": "adapters",
    "LoraConfig": "config",
    "Detection": "predictor",
    "Predictor": "predictor",
    "draw": "predictor",
    "open_image": "dataset.image_files",
    "from_pretrained": "formats.peft_format",
    "load_model": "checkpoint",
    "push_to_hub": "formats.peft_format",
    "save_pretrained": "formats.peft_format",
    "save_adapter": "checkpoint",
    "lora_model": "wrapper",
    "UserError": "errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
