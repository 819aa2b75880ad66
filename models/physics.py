"""Mechanics of an extruded cell of two isotropic phases, as the last layer of a network.

Phases are m (grey value 0, "matrix") and f (grey value 1, "inclusion"), <.> a mean over the cell, k = lambda + mu the
plane-strain bulk modulus. Six of the nine components are independent, and there are bounds:

- Hill's relations (models/hill.py). With them the tensor is P^T A P plus a constant, A = [[C11, C12], [C12, C22]]:
  bounds of A bound the tensor, too.
- Voigt and Reuss in the plane: <A> - A and A - <A^-1>^-1 are positive semi-definite. In the axes (C11 + C22) / 2 + C12
  and (C11 + C22) / 2 - C12 both bounds are diagonal: 2 <k> and 2 <mu> above, 2 <1/k>^-1 and 2 <1/mu>^-1 below. The
  lower one is above the Reuss bound of the whole tensor, for the strain 33 is the same everywhere. C44, C55 and C66
  lie between <1/mu>^-1 and <mu>. Between both bounds of a constant c lies f (1 - f) dc^2 / ((1 - f) c_f + f c_m).

Predicting the place between the bounds is the idea of the Voigt-Reuss net (S. Keshav et al., arXiv 2504.00712).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import hill
from models.hill import Pair
from models.specs import SpecError

NAMES = ("C11", "C22", "C33", "C12", "C23", "C13", "C44", "C55", "C66")
SMALLEST_RANGE = 1e-9  # between two bounds, relative to the larger constant: below it there is no place between them
EDGE = 1e-3  # of the range between the bounds: labels closer to a bound, or beyond it, are set to this distance

Phases = Mapping[str, Mapping[str, float]]  # "matrix" and "inclusion", each with "lame_lambda" and "lame_mu"


class Physics(nn.Module):
    """Maps six numbers (b, 6) and images (b, 1, h, w) to the nine components (b, 9) in the phases' unit.

    "hill": the six are C11, C22, C12, C44, C55, C66, and the others follow. "bounded": they are any real numbers, and
    the components always lie between the bounds. The volume fraction is the mean grey value. Raise SpecError if the
    relations do not apply to these phases or targets.
    """

    def __init__(self, kind: str, phases: Phases | None, target_names: Sequence[str], channels: int = 1) -> None:
        super().__init__()
        if sorted(target_names) != sorted(NAMES) or channels != 1 or not phases:
            raise SpecError(
                f"model.physics = {kind!r}: expected the nine components {', '.join(NAMES)}, images of one channel and "
                f"the two phases' constants ([phases] in dataset.toml), found {', '.join(target_names)}, {channels} "
                f'and {"phases" if phases else "none"}: set model.physics = "none".'
            )
        self.kind, self.phases, self.target_names = kind, phases, tuple(target_names)
        self._order = [NAMES.index(name) for name in target_names]
        matrix, inclusion = phases["matrix"], phases["inclusion"]
        self._lambdas = matrix["lame_lambda"], inclusion["lame_lambda"]
        self._mus = matrix["lame_mu"], inclusion["lame_mu"]
        self._ks = self._lambdas[0] + self._mus[0], self._lambdas[1] + self._mus[1]
        if not hill.apart(self._ks):
            raise SpecError(
                f"model.physics = {kind!r}: Hill's relations need phases whose lambda + mu differ by more than "
                f'{hill.SMALLEST:.1%}, found {self._ks[0]:g} and {self._ks[1]:g}: set model.physics = "none".'
            )

    def forward(self, six: Tensor, images: Tensor) -> Tensor:
        fraction = images.mean((1, 2, 3))
        if self.kind == "hill":
            c11, c22, c12, c44, c55, c66 = six.unbind(1)
            parts: tuple[Tensor, Tensor, Tensor] = hill.parts(c11, c22, c12, fraction, self._ks)
        else:
            (c11, c22, c12, c44, c55, c66), parts = self._between(six, fraction)
        c13, c23, c33 = hill.out_of_plane(*parts, fraction, self._lambdas, self._mus)
        nine = (c11, c22, c33, c12, c23, c13, c44, c55, c66)
        return torch.stack([nine[place] for place in self._order], dim=1)

    def _between(self, six: Tensor, f: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
        """Return C11, C22, C12, C44, C55, C66 at the places between the bounds that six real numbers stand for.

        Then the numbers from which models.hill computes the other components, exact even if the phases' k are close.
        """
        bulk, deviator, mixed, *shears = six.unbind(1)
        middle, half = (bulk + deviator) / 2, (bulk - deviator) / 2
        radius = (half**2 + mixed**2 + 1e-6).sqrt()  # never 0, because the root has no derivative there
        high, low = torch.sigmoid(middle + radius), torch.sigmoid(middle - radius)
        # The logistic function of the symmetric matrix [[bulk, mixed], [mixed, deviator]]: eigenvalues in 0..1.
        centre, slope = (high + low) / 2, (high - low) / (2 * radius)
        place, other, between = centre + slope * half, centre - slope * half, slope * mixed
        lower_k, range_k = _bounds(self._ks, f)
        lower_mu, range_mu = _bounds(self._mus, f)
        mean = lower_k + range_k * place  # half of the axis (C11 + C22) / 2 + C12; below: of the other
        difference = lower_mu + range_mu * other
        cross = 2 * (range_k * range_mu).sqrt() * between
        components = (mean + difference + cross, mean + difference - cross, mean - difference)
        # (mean - k_m) / dk, cross / (2 dk) and (f - (mean - k_m) / dk) / dk without the division.
        k, dk = self._ks[0], self._ks[1] - self._ks[0]
        swapped = (1 - f) * self._ks[1] + f * k
        share, r = f * (k + (1 - f) * dk * place) / swapped, f * (1 - f) / swapped * (1 - place)
        turned = math.copysign(1, dk) * (f * (1 - f) / swapped * range_mu).sqrt() * between
        sheared = [lower_mu + range_mu * torch.sigmoid(shear) for shear in shears]
        return (*components, *sheared), (share + turned, share - turned, r)

    def six(self, targets: np.ndarray, fractions: np.ndarray) -> np.ndarray:
        """Return the six numbers (n, 6) that give the components `targets` (n, 9) at the volume fractions (n,).

        Places beyond the bounds, or closer to one than EDGE, are moved to that distance.
        """
        named = dict(zip(self.target_names, np.asarray(targets, np.float64).T, strict=True))
        six = np.stack([named[name] for name in ("C11", "C22", "C12", "C44", "C55", "C66")], axis=1)
        if self.kind == "hill":
            return six
        lower_k, range_k = _bounds(self._ks, fractions)
        lower_mu, range_mu = _bounds(self._mus, fractions)
        difference, dk = self._lambdas[1] - self._lambdas[0], self._ks[1] - self._ks[0]
        if abs(dk) >= abs(difference):  # use the components that determine it in more digits
            span = range_k
            along = (named["C11"] + named["C22"]) / 4 + named["C12"] / 2 - lower_k
            across = (named["C11"] - named["C22"]) / 4
        else:
            span = range_k * (difference / dk) ** 2
            along = named["C33"] - hill.out_of_plane(0, 0, span / difference**2, fractions, self._lambdas, self._mus)[2]
            across = math.copysign(0.5, difference * dk) * (named["C13"] - named["C23"])
        places = np.empty((len(six), 2, 2))
        places[:, 0, 0] = _place(along, span, max(self._ks))
        places[:, 1, 1] = _place(
            (named["C11"] + named["C22"]) / 4 - named["C12"] / 2 - lower_mu, range_mu, max(self._mus)
        )
        places[:, 0, 1] = places[:, 1, 0] = _place(across, np.sqrt(span * range_mu), max(self._mus), none=0)
        values, vectors = np.linalg.eigh(places)
        sheared = [_place(values - lower_mu, range_mu, max(self._mus)) for values in six[:, 3:].T]
        mixed = np.einsum("nij,nj,nkj->nik", vectors, _logit(values), vectors)
        return np.column_stack([mixed[:, 0, 0], mixed[:, 1, 1], mixed[:, 0, 1], *map(_logit, sheared)])


def _bounds(constants: Pair, f: Any) -> tuple[Any, Any]:
    """Return Reuss' mean of two constants, and the range from there to Voigt's."""
    swapped = (1 - f) * constants[1] + f * constants[0]  # the mean of the cell with its phases exchanged
    return constants[0] * constants[1] / swapped, f * (1 - f) * (constants[1] - constants[0]) ** 2 / swapped


def _place(beyond: np.ndarray, span: np.ndarray, size: float, none: float = 0.5) -> np.ndarray:
    """Return the place between the bounds, 0..1; `none` if they coincide, as in homogeneous cells."""
    place: np.ndarray = np.divide(beyond, span, out=np.full_like(beyond, none), where=span > SMALLEST_RANGE * size)
    return place


def _logit(places: np.ndarray) -> np.ndarray:
    places = np.clip(places, EDGE, 1 - EDGE)
    logits: np.ndarray = np.log(places / (1 - places))
    return logits
