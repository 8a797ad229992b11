"""Adapter folders for other programs: PEFT, transformers, the hub."""
