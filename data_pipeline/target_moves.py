"""How the targets change when the image is flipped or transposed, as dataset.toml states it: signed permutations."""

from collections.abc import Mapping, Sequence

MOVES = ("flip_horizontal", "flip_vertical", "transpose")  # each undoes itself

Order = tuple[int, ...]  # new_targets[i] = targets[order[i]]; -targets[~order[i]] where order[i] < 0


class SymmetryProblem(ValueError):
    """What is stated of the symmetries contradicts itself or names no target; the message says where."""


def orders(
    stated: Mapping[str, Mapping[str, str]], names: Sequence[str], inputs: Sequence[str] = ()
) -> dict[str, Order]:
    """Return the signed permutation of the targets for each move. A target that is not stated stays as it is.

    `transpose = {Kxx = "Kyy"}` means that Kxx of the transposed image is Kyy of the image, and, because a move undoes
    itself, that Kyy is Kxx. The inputs beside the image must not change. Raise SymmetryProblem.
    """
    for move, changes in stated.items():
        if changed := {*changes, *(text.removeprefix("-").strip() for text in changes.values())} & set(inputs):
            raise SymmetryProblem(
                f"symmetry: {move}: {min(changed)} is an input. Inputs do not change when the image moves: leave out "
                f"{move}, or the input."
            )
    moves = {move: _order(move, changes, names) for move, changes in stated.items()}
    if set(moves) == set(MOVES):
        horizontal, vertical, transposed = (moves[move] for move in MOVES)
        if compose(compose(transposed, horizontal), transposed) != vertical:
            raise SymmetryProblem(
                "symmetry: flip_vertical contradicts the others: it is a transposition, a horizontal flip, and a "
                "transposition again."
            )
    return moves


def compose(first: Order, second: Order) -> Order:
    """Return the order of doing `first`, then `second`."""
    return tuple(first[place] if place >= 0 else ~first[~place] for place in second)


def is_order(order: Sequence[int], count: int) -> bool:
    """Return whether these are whole numbers that permute so many targets, up to their signs."""
    return all(type(place) is int for place in order) and sorted(max(place, ~place) for place in order) == list(
        range(count)
    )


def check_scales(moves: Mapping[str, Order], scaled: Sequence[str], names: Sequence[str]) -> None:
    """Raise SymmetryProblem if a target with a transform changes its sign, or places with one on another scale."""
    kinds = [new.removesuffix(old) for new, old in zip(scaled, names, strict=True)]
    for move, order in moves.items():
        for index, place in enumerate(order):
            if kinds[index] != kinds[max(place, ~place)] or (place < 0 and kinds[index]):
                raise SymmetryProblem(f"symmetry: {move}: {names[index]} changes, but it has a transform.")


def _order(move: str, changes: Mapping[str, str], names: Sequence[str]) -> Order:
    signed: dict[str, tuple[bool, str]] = {}
    for target, text in changes.items():
        other = text.removeprefix("-").strip()
        if unknown := {target, other} - set(names):
            raise SymmetryProblem(
                f"symmetry: {move}: no target is called {unknown.pop()}. There are: {', '.join(names)}."
            )
        for one, two in ((target, other), (other, target)):
            if signed.setdefault(one, (text.startswith("-"), two)) != (text.startswith("-"), two):
                raise SymmetryProblem(f"symmetry: {move}: {one} cannot become {text} and also something else.")
    places = {name: names.index(name) for name in names}
    changed = [signed.get(name, (False, name)) for name in names]
    return tuple(~places[other] if negative else places[other] for negative, other in changed)
