"""The texts that categories are prompted with, and those that an image is known not to show."""

import random
from collections.abc import Iterable, Mapping

from sam3_lora_wrapper.errors import UserError


def texts_of(name: str, prompts: Mapping) -> list[str]:
    """The prompt of a category and its synonyms; its name where `data.prompts` has none.

    Raises:
        UserError: the entry is no text or list of texts.
    """
    given = prompts.get(name, name)
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise UserError(f"data.prompts: {name!r}: {given!r} is not a text or a list of texts")
    return [t.strip() for t in texts]


def check_prompts(names: Iterable[str], prompts: Mapping) -> None:
    """Look at `data.prompts`.

    Args:
        names: of all categories of the dataset.
        prompts: a text, or a list of a text and its synonyms, by the name of a category.

    Raises:
        UserError: a category is unknown, or two categories share a text, so that an image would
            both show it and not.
    """
    names, owners = list(names), {}
    unknown = [name for name in prompts if name not in names]
    if unknown:
        known = ", ".join(sorted(names)[:50])
        raise UserError(f"data.prompts: no category {unknown[0]!r}. There are: {known}")
    for name in names:
        for text in texts_of(name, prompts):
            other = owners.setdefault(text.casefold(), name)
            if other != name:
                raise UserError(
                    f"data.prompts: {text!r} is a text of both {other!r} and {name!r}. "
                    "Give each its own, or make them one category"
                )


def foreign_to(words: Iterable[str], texts: Iterable[str]) -> list[str]:
    """The words that no text contains and that contain no text, so that they are safely absent."""
    folded = [t.casefold() for t in texts]
    return [w for w in words if not any(w.casefold() in t or t in w.casefold() for t in folded)]


def draw(choices: list, count: int | None) -> list:
    """Up to `count` of the choices, all of them for None, by the seeded generator of `random`."""
    return list(choices) if count is None else random.sample(choices, min(count, len(choices)))
