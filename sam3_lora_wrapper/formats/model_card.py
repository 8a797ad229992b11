"""Model cards of adapter folders."""

import json

CARD = """---
library_name: peft
tags: [sam3, lora, image-segmentation]
{base_model}---

# LoRA adapter for SAM 3

```
{table}
```

Base: {base}, its weights with the fingerprint `{fingerprint}`.

{use}

## Training

```json
{training}
```
"""
OURS = """## Use

```python
from sam3_lora_wrapper import from_pretrained

model = from_pretrained(base_model, "this-folder")  # the official image model; other weights are refused
```

"""
PEFT = """PEFT loads it onto the official model too, and does not notice other weights:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this-folder")
```

What PEFT has no place for is expressed in its terms: q, k, v or out that is not adapted has
factors of zero, and where their scalings differ, these are folded into B. PEFT up to 0.21 adds the
update of the `out_proj` of attention modules twice (huggingface/peft#3774), so that B is stored at
half its size. The dropout of this adapter acts on the inputs of A for all tokens alike; PEFT's
differs, and spares attention modules."""
NO_PEFT = "PEFT cannot load this adapter: it has DoRA in attention modules, which PEFT refuses."
TRANSFORMERS = """## Use

```python
from peft import PeftModel
from transformers import Sam3Model

model = PeftModel.from_pretrained(Sam3Model.from_pretrained("facebook/sam3"), "this-folder")
```

This folder has the names of Sam3Model; it does not fit the official model. PEFT does not notice
when the base has other weights."""


def model_card(description: dict, table: str, peft_loads: bool) -> str:
    """Card of an adapter for the official model.

    Args:
        description: what the adapter's file says of it.
        table: what it adapts.
        peft_loads: whether PEFT can load it.
    """
    return _card(description, table, OURS + (PEFT if peft_loads else NO_PEFT))


def transformers_card(description: dict, table: str) -> str:
    """Card of an adapter for Sam3Model; the same arguments as of model_card."""
    return _card(description, table, TRANSFORMERS)


def _card(description: dict, table: str, use: str) -> str:
    base = description["base"]
    hub = base.get("weights") == "hub"
    keys = ("epoch", "metrics", "lora", "training", "packages")
    return CARD.format(
        base_model="base_model: facebook/sam3\n" if hub else "",
        base="facebook/sam3" if hub else base.get("weights", "an official SAM 3 image model"),
        fingerprint=base["fingerprint"],
        table=table,
        use=use,
        training=json.dumps({key: description[key] for key in keys if description.get(key)}, indent=2),
    )
