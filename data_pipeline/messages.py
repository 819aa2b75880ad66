"""Names in messages: those that were found, and those that were meant."""

from collections.abc import Iterable
from difflib import get_close_matches

RESIZE = (
    "To have all resized, say to how many pixels: data.image_size of the study (`--set data.image_size=N`), or "
    "`--image-size N` of a check."
)


def printable(name: str) -> str:
    """Return the name for a message: on one line, without characters that a terminal obeys or hides."""
    return name if name.isprintable() else repr(name)


def near_miss(word: str, valid: Iterable[str]) -> str:
    """Return " Did you mean '…'?" with the valid word that is nearest; empty if none is near."""
    near = get_close_matches(word, list(valid), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
