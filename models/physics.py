"""What mechanics knows of the stiffness of an extruded cell of two isotropic phases: the last layer of a network.

Phases are m (grey value 0, "matrix") and f (grey value 1, "inclusion"), <.> a mean over the cell, k = lambda + mu the
plane-strain bulk modulus. Six of the nine components are independent, and there are bounds:

- Hill's relations (R. Hill, J. Mech. Phys. Solids 12, 1964). With e = -(lambda_f - lambda_m) / (2 (k_f - k_m)) and
  s = 2 k_m e + lambda_m: C13 = s - e (C11 + C12), C23 = s - e (C12 + C22), C33 = <lambda + 2 mu> + 2 e <lambda>
  - e (C13 + C23). So the tensor is P^T A P plus a constant, A = [[C11, C12], [C12, C22]]: bounds of A bound it, too.
- Voigt and Reuss in the plane: <A> - A and A - <A^-1>^-1 are positive semi-definite. In the axes (C11 + C22) / 2 + C12
  and (C11 + C22) / 2 - C12 both bounds are diagonal: 2 <k> and 2 <mu> above, 2 <1/k>^-1 and 2 <1/mu>^-1 below. The
  lower one is above the Reuss bound of the whole tensor, for the strain 33 is the same everywhere. C44, C55 and C66
  lie between <1/mu>^-1 and <mu>.

Predicting the place between the bounds is the idea of the Voigt-Reuss net (S. Keshav et al., arXiv 2504.00712).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from models.specs import SpecError

NAMES = ("C11", "C22", "C33", "C12", "C23", "C13", "C44", "C55", "C66")
EDGE = 1e-3  # of the way between the bounds: how near to one a label may come before it counts as being that near

Phases = Mapping[str, Mapping[str, float]]  # "matrix" and "inclusion", each with "lame_lambda" and "lame_mu"


class Physics(nn.Module):
    """Maps six numbers (b, 6) and images (b, 1, h, w) to the nine components (b, 9) in the phases' unit.

    "hill": the six are C11, C22, C12, C44, C55, C66, the others follow. "bounded": they are any real numbers, and the
    components lie between the bounds whatever they are. The volume fraction is the mean grey value. Raises SpecError
    if phases or targets are not those that this is true of.
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
        if abs(self._ks[1] - self._ks[0]) < 1e-6 * max(self._ks):
            raise SpecError(
                f"model.physics = {kind!r}: Hill's relations need phases whose lambda + mu differ, found "
                f'{self._ks[0]:g} of both: set model.physics = "none".'
            )
        self._e = -(self._lambdas[1] - self._lambdas[0]) / (2 * (self._ks[1] - self._ks[0]))
        self._s = 2 * self._ks[0] * self._e + self._lambdas[0]

    def forward(self, six: Tensor, images: Tensor) -> Tensor:
        fraction = images.mean((1, 2, 3))
        if self.kind == "hill":
            c11, c22, c12, c44, c55, c66 = six.unbind(1)
        else:
            c11, c22, c12, c44, c55, c66 = self._between(six, fraction)
        return self._nine(c11, c22, c12, c44, c55, c66, fraction)

    def _nine(self, c11: Tensor, c22: Tensor, c12: Tensor, c44: Tensor, c55: Tensor, c66: Tensor, f: Tensor) -> Tensor:
        c13 = self._s - self._e * (c11 + c12)
        c23 = self._s - self._e * (c12 + c22)
        mean_lambda, mean_mu = _mean(self._lambdas, f), _mean(self._mus, f)
        c33 = mean_lambda + 2 * mean_mu + 2 * self._e * mean_lambda - self._e * (c13 + c23)
        nine = (c11, c22, c33, c12, c23, c13, c44, c55, c66)
        return torch.stack([nine[place] for place in self._order], dim=1)

    def _between(self, six: Tensor, f: Tensor) -> tuple[Tensor, ...]:
        """C11, C22, C12, C44, C55, C66 at the places between the bounds that six real numbers stand for."""
        bulk, deviator, mixed, *shears = six.unbind(1)
        middle, half = (bulk + deviator) / 2, (bulk - deviator) / 2
        radius = (half**2 + mixed**2 + 1e-6).sqrt()  # never 0, where it has no derivative
        high, low = torch.sigmoid(middle + radius), torch.sigmoid(middle - radius)
        # The logistic function of the symmetric matrix [[bulk, mixed], [mixed, deviator]]: eigenvalues in 0..1.
        centre, slope = (high + low) / 2, (high - low) / (2 * radius)
        lower_k, way_k = self._bounds(self._ks, f)
        lower_mu, way_mu = self._bounds(self._mus, f)
        mean = lower_k + way_k * (centre + slope * half)  # half of the axis (C11 + C22) / 2 + C12, and so the others
        difference = lower_mu + way_mu * (centre - slope * half)
        cross = (way_k * way_mu).sqrt() * slope * mixed * 2
        sheared = [lower_mu + way_mu * torch.sigmoid(each) for each in shears]
        return mean + difference + cross, mean + difference - cross, mean - difference, *sheared

    @staticmethod
    def _bounds(constants: tuple[float, float], f: Tensor) -> tuple[Tensor, Tensor]:
        """Reuss' mean of two constants, and the way from there to Voigt's, which is never below 0."""
        lower = 1 / _mean((1 / constants[0], 1 / constants[1]), f)
        return lower, (_mean(constants, f) - lower).clamp(min=0)

    def six(self, targets: np.ndarray, fractions: np.ndarray) -> np.ndarray:
        """The six numbers (n, 6) for which the components are `targets` (n, 9), given the volume fractions (n,).

        Places beyond the bounds, or nearer to one than EDGE, count as being that near.
        """
        named = dict(zip(self.target_names, np.asarray(targets, np.float64).T, strict=True))
        six = np.stack([named[name] for name in ("C11", "C22", "C12", "C44", "C55", "C66")], axis=1)
        if self.kind == "hill":
            return six
        f = torch.from_numpy(fractions)
        (lower_k, way_k), (lower_mu, way_mu) = (
            tuple(each.numpy() for each in self._bounds(constants, f)) for constants in (self._ks, self._mus)
        )
        mean, cross = (named["C11"] + named["C22"]) / 2, (named["C11"] - named["C22"]) / 2
        places = np.empty((len(six), 2, 2))
        places[:, 0, 0] = _place((mean + named["C12"]) / 2 - lower_k, way_k)
        places[:, 1, 1] = _place((mean - named["C12"]) / 2 - lower_mu, way_mu)
        places[:, 0, 1] = places[:, 1, 0] = _place(cross / 2, np.sqrt(way_k * way_mu)) - (way_k * way_mu == 0) / 2
        values, vectors = np.linalg.eigh(places)
        sheared = [_place(values - lower_mu, way_mu) for values in six[:, 3:].T]
        mixed = np.einsum("nij,nj,nkj->nik", vectors, _logit(values), vectors)
        return np.column_stack([mixed[:, 0, 0], mixed[:, 1, 1], mixed[:, 0, 1], *map(_logit, sheared)])


def _place(beyond: np.ndarray, way: np.ndarray) -> np.ndarray:
    """How much of the way between the bounds; in the middle where there is none, of homogeneous cells."""
    return np.divide(beyond, way, out=np.full_like(beyond, 0.5), where=way > 0)


def _logit(places: np.ndarray) -> np.ndarray:
    places = np.clip(places, EDGE, 1 - EDGE)
    return np.log(places / (1 - places))


def _mean(constants: tuple[float, float], f: Tensor) -> Tensor:
    """The mean over the cell of a constant of the phases."""
    return constants[0] + f * (constants[1] - constants[0])
