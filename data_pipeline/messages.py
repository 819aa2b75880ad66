"""Names in messages: those that were found, and those that were meant."""

from collections.abc import Iterable
from difflib import get_close_matches

RESIZE = (
    "To have all resized, say to how many pixels: data.image_size of the study (`--set data.image_size=N`), or "
    "`--image-size N` of a check."
)


SINGULAR = {"are": "is", "were": "was", "have": "has", "miss": "misses"}


def printable(name: str) -> str:
    """Return the name for a message: on one line, without characters that a terminal obeys or hides."""
    return name if name.isprintable() else repr(name)


def near_miss(word: str, valid: Iterable[str]) -> str:
    """Return " Did you mean '…'?" with the valid word that is nearest; empty if none is near."""
    near = get_close_matches(word, list(valid), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def counted(count: int, noun: str, verb: str = "", *, of: int | None = None) -> str:
    """Return how many there are, such as "1 image" and "2 images"; with a verb, "are", also "1 image is", and with the
    number that they are `of`, "1 of 4 images is"."""
    number, total = (f"{count}", count) if of is None else (f"{count} of {of}", of)
    words = [number, noun + "s" * (total != 1)]
    if verb:
        words.append(verb if count != 1 else SINGULAR.get(verb, f"{verb}s"))
    return " ".join(words)
