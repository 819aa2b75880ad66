"""Stiffness tensors that no material, or not the stated phases, can have: which rows, and which order is right."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from data_pipeline.components import COMPONENTS, tensor
from data_pipeline.findings import Finding, listed
from data_pipeline.phase import Phase
from hpo.text import counted
from models import hill

BOUND_SLACK = 0.01  # of the cell's largest component: what labels that were rounded to three digits may miss of bounds
HILL_ROW = 0.02  # of the cell's largest component, that a tensor may miss of Hill's relations
FIXED = 0.8  # of the impossible tensors, that must become possible when two components change places
INDEPENDENT = 5  # components at least; of a true set six
EXACT = 1e-3  # of the variance, that the relations between components leave unexplained where the order is right

Phases = Mapping[str, Phase] | None
QUESTION = (
    "Are young_modulus and poisson_ratio those of the labels, in their unit, and is the matrix the phase of the black "
    "pixels?"
)


def of_stiffness(
    targets: np.ndarray, names: Sequence[str], fractions: np.ndarray, phases: Phases, where: Sequence[str]
) -> Iterator[Finding]:
    """Yield what is wrong with tensors (n, 9) in the label's unit, NaN where missing; nothing for other targets.

    `fractions` (n,) of the inclusion; without `phases` only the sign and the order are checked.
    """
    whole = np.flatnonzero(~np.isnan(targets).any(axis=1))
    if set(names) != set(COMPONENTS) or not len(whole):
        return
    targets = targets[whole][:, [list(names).index(name) for name in COMPONENTS]]
    wrong = _wrong(targets, fractions[whole], phases)
    bad = np.flatnonzero(np.any(list(wrong.values()), axis=0))
    swaps, fixed = _swaps(targets, fractions[whole], phases, bad)
    if swaps:
        pairs = " or ".join(f"{one} and {other}" for one, other in swaps)
        rows = whole[fixed]
        yield Finding(
            name="component-order",
            sentence=f"{counted(len(rows), 'tensor', 'become', of=len(where))} possible when {pairs} change places: "
            f"{listed(where, rows)}. Is the order of the columns {', '.join(COMPONENTS)}?",
            images=tuple(rows.tolist()),
        )
    for name, is_wrong in wrong.items():
        is_wrong[fixed] = False
        if rows := whole[is_wrong].tolist():
            verb, what, hint = _TEXTS[name]
            tensors = counted(len(rows), "tensor", verb, of=len(where))
            sentence = f"{tensors} {what}: {listed(where, rows)}. {hint}"
            yield Finding(name=name, sentence=sentence.rstrip(), images=tuple(rows))


_TEXTS = {
    "not-positive-definite": ("have", "an eigenvalue of at most zero", ""),
    "outside-bounds": ("lie", f"outside the bounds of Voigt and Reuss by more than {BOUND_SLACK:.0%}", QUESTION),
    "hill": ("miss", f"Hill's relations by more than {HILL_ROW:.0%} of their largest component", QUESTION),
}


def beyond_bounds(targets: np.ndarray, names: Sequence[str], fractions: np.ndarray, phases: Phases) -> np.ndarray:
    """Return how far each tensor lies outside the bounds, (n,), as a share of its largest component; within: <= 0."""
    from hpo.scores import analysis

    assert phases is not None
    return np.maximum(*analysis.beyond_bounds(targets, names, fractions, phases).values())


def _wrong(targets: np.ndarray, fractions: np.ndarray, phases: Phases) -> dict[str, np.ndarray]:
    """Return which tensors are wrong, (n,), by the finding's name; each under the first that applies."""
    from hpo.scores import analysis

    wrong = {"not-positive-definite": np.linalg.eigvalsh(tensor(targets, COMPONENTS))[:, 0] <= 0}
    if phases is not None:
        wrong["outside-bounds"] = beyond_bounds(targets, COMPONENTS, fractions, phases) > BOUND_SLACK
        residuals = np.abs(analysis.hill_residuals(targets, COMPONENTS, fractions, phases)).max(axis=1)
        wrong["hill"] = residuals > HILL_ROW * amplification(phases) * np.abs(targets).max(axis=1)  # false for NaN
        wrong["outside-bounds"] &= ~wrong["not-positive-definite"]
        wrong["hill"] &= ~wrong["not-positive-definite"] & ~wrong["outside-bounds"]
    return wrong


def amplification(phases: Mapping[str, Phase]) -> float:
    """Return how many times as large a label's error comes out of Hill's relations."""
    matrix, inclusion = (phases[name] for name in ("matrix", "inclusion"))
    ks = [phase.lame_lambda + phase.lame_mu for phase in (matrix, inclusion)]
    if not hill.apart((ks[0], ks[1])):
        return 1.0
    return max(1.0, abs((inclusion.lame_lambda - matrix.lame_lambda) / (ks[1] - ks[0])))


def _swaps(
    targets: np.ndarray, fractions: np.ndarray, phases: Phases, bad: np.ndarray
) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return the exchanges of two components that make the most tensors possible, and these tensors; [] if few."""
    pairs = list(combinations(range(len(COMPONENTS)), 2))
    if phases is None:
        centred = (targets - targets.mean(axis=0)) / np.maximum(targets.std(axis=0), 1e-300)
        misfit = _misfit(targets, fractions)
        misfits = [_misfit(_swapped(targets, pair), fractions) for pair in pairs]
        best = min(misfits)
        # Among columns that are multiples of few, some combination always fits.
        is_better = best < EXACT and misfit > 20 * EXACT and np.linalg.matrix_rank(centred, rtol=EXACT) >= INDEPENDENT
        chosen = [pair for pair, value in zip(pairs, misfits, strict=True) if value <= 2 * best] if is_better else []
        return _named(chosen), np.arange(len(targets)) if chosen else bad[:0]
    looked = bad[:: max(1, len(bad) // 200)]  # enough to see which exchange it is
    if len(looked) < 3:
        return [], bad[:0]
    right = [~_any(_wrong(_swapped(targets[looked], pair), fractions[looked], phases)) for pair in pairs]
    most = max(int(possible.sum()) for possible in right)
    if most < FIXED * len(looked):
        return [], bad[:0]
    chosen = [pair for pair, possible in zip(pairs, right, strict=True) if possible.sum() == most]
    fixed = bad[~_any(_wrong(_swapped(targets[bad], chosen[0]), fractions[bad], phases))]
    return _named(chosen), fixed


def _any(wrong: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.any(list(wrong.values()), axis=0)


def _named(pairs: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    return [(COMPONENTS[one], COMPONENTS[other]) for one, other in pairs]


def _swapped(targets: np.ndarray, pair: tuple[int, int]) -> np.ndarray:
    order = list(range(targets.shape[1]))
    order[pair[0]], order[pair[1]] = pair[1], pair[0]
    return targets[:, order]


def _misfit(targets: np.ndarray, fractions: np.ndarray) -> float:
    """Return what the linear relations between components, of any two phases, leave unexplained of the variance."""
    c11, c22, c33, c12, c23, c13 = targets[:, :6].T
    one = np.ones(2 * len(targets))
    plane = _unexplained(np.r_[c13, c23], np.c_[one, np.r_[c11 + c12, c22 + c12]])
    return max(plane, _unexplained(c33, np.c_[one[: len(targets)], fractions, c13 + c23]))


def _unexplained(values: np.ndarray, design: np.ndarray) -> float:
    misses = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float(misses.var() / values.var()) if values.var() > 0 else 1.0
