"""Models with physics: what their data must be like."""

from pathlib import Path

import numpy as np

from data_pipeline.dataset import Dataset
from hpo.errors import StudyError
from hpo.planning.stiffness import BOUND_SLACK, QUESTION, amplification, beyond_bounds
from models import hill

HILL_SLACK = 0.01  # of the smallest standard deviation of a component: what labels of three digits may miss


def constants(data: Dataset) -> dict[str, dict[str, float]] | None:
    """What models with physics need to know of the phases; None where there are no two known ones."""
    if data.phases is None:
        return None
    return {name: {"lame_lambda": phase.lame_lambda, "lame_mu": phase.lame_mu} for name, phase in data.phases.items()}


def check_physics(data: Dataset, folder: Path) -> None:
    """Raise StudyError unless two phases are known, and can have made the labels."""
    from hpo.scores import analysis

    other = "other pixels" if data.description.phases else "no phases"
    leave = 'Or set model.physics = "none".'
    if data.phases is None:
        raise StudyError(
            f"{folder}: model.physics needs two known phases: expected [phases.matrix] and [phases.inclusion] in "
            f"dataset.toml, and pixels of 0 and 255 alone, found {other}. {leave}"
        )
    lambdas, mus = ([getattr(phase, name) for phase in data.phases.values()] for name in ("lame_lambda", "lame_mu"))
    if (largest := max(map(abs, (*lambdas, *mus)))) > hill.LARGEST:
        raise StudyError(
            f"{folder}: model.physics computes in single precision: expected phases whose Lame constants are at most "
            f"{hill.LARGEST:.0e}, found {largest:.3g} {data.unit}. Give labels and phases in a larger unit, or a "
            f"poisson_ratio further from 0.5. {leave}"
        )
    ks = lambdas[0] + mus[0], lambdas[1] + mus[1]
    if not hill.apart(ks):
        raise StudyError(
            f"{folder}: model.physics needs phases whose lambda + mu = E / (2 (1 + nu) (1 - 2 nu)) differ by more than "
            f"{hill.SMALLEST:.1%}: between others Hill's relations say nothing. Found {ks[0]:.6g} and {ks[1]:.6g} "
            f"{data.unit}. {leave}"
        )
    whole = np.flatnonzero(~np.isnan(data.targets).any(axis=1))
    if not len(whole):
        raise StudyError(f"{folder}: model.physics needs images with all nine components, found none. {leave}")
    targets, fractions = data.targets[whole], data.images.mean(axis=(1, 2, 3), dtype=np.float64)[whole]
    given = (targets, data.target_names, fractions, data.phases)
    beyond, residuals = beyond_bounds(*given), analysis.hill_residuals(*given)
    outside, residual = int((beyond > BOUND_SLACK).sum()), float(np.sqrt((residuals**2).mean()))
    worst = int(beyond.argmax() if outside else np.abs(residuals).max(axis=1).argmax())
    allowed = HILL_SLACK * targets.std(axis=0).min() * amplification(data.phases)
    if outside or residual > allowed:
        raise StudyError(
            f"{folder}: model.physics needs labels that the phases of dataset.toml can have made: {outside} of "
            f"{len(beyond)} lie outside the bounds of Voigt and Reuss by more than {BOUND_SLACK:.0%} of their largest "
            f"component (the worst, {data.names[whole[worst]]}, by {max(beyond[worst], 0):.2%}), and Hill's relations "
            f"are missed by {residual:.3g} {data.unit} (at most {allowed:.3g}). {QUESTION} {leave}"
        )
