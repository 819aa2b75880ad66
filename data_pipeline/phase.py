"""An isotropic elastic phase and its constants."""

import sys
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Phase:
    """An isotropic elastic material. Raise ValueError if no stable material has these constants."""

    young_modulus: float  # in any unit, which is then that of the stiffness
    poisson_ratio: float

    def __post_init__(self) -> None:
        for name, value in (("young_modulus", self.young_modulus), ("poisson_ratio", self.poisson_ratio)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not abs(value) <= sys.float_info.max:  # false for NaN, and for whole numbers beyond floats
                raise ValueError(f"{name}: expected a finite number, found {value!r:.60}.")
        if self.young_modulus <= 0:
            raise ValueError(f"young_modulus: expected a positive number, found {self.young_modulus}.")
        if not -1 < self.poisson_ratio < 0.5:
            raise ValueError(f"poisson_ratio: expected more than -1 and less than 0.5, found {self.poisson_ratio}.")

    @classmethod
    def of_lame(cls, lame_lambda: float, lame_mu: float) -> "Phase":
        """Return the material of these Lame constants. Raise ValueError as above."""
        return cls(
            lame_mu * (3 * lame_lambda + 2 * lame_mu) / (lame_lambda + lame_mu),
            lame_lambda / (2 * (lame_lambda + lame_mu)),
        )

    @property
    def lame_lambda(self) -> float:
        """First Lame constant, in the unit of the Young's modulus."""
        return self.young_modulus * self.poisson_ratio / ((1 + self.poisson_ratio) * (1 - 2 * self.poisson_ratio))

    @property
    def lame_mu(self) -> float:
        """Shear modulus, in the unit of the Young's modulus."""
        return self.young_modulus / (2 * (1 + self.poisson_ratio))

    @property
    def stiffness(self) -> np.ndarray:
        """Stiffness (6, 6), Voigt order 11, 22, 33, 23, 13, 12 with engineering shear."""
        tensor = np.diag([2 * self.lame_mu] * 3 + [self.lame_mu] * 3)
        tensor[:3, :3] += self.lame_lambda
        return tensor
