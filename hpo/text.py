"""Text that people chose (names, reasons, paths) where a program would read more into it than text."""


def visible(text: str) -> str:
    """The text with all that a terminal would obey, or not show, spelled as Python spells it: `\\x1b`, `\\u202e`, and
    `\\udce9` for a byte of a file's name that is no UTF-8. Line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )


def one_line(text: str) -> str:
    """`visible` of a name within a message: it ends no line there."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")
