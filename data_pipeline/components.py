"""The stiffness components of the label table: their order, their place in the tensor, their symmetries.

Voigt order 11, 22, 33, 23, 13, 12 with engineering shear. Axis 1 runs along the image's columns (to the right), axis 2
along its rows (downwards), axis 3 out of the plane.
"""

import numpy as np

COMPONENTS = ("C11", "C22", "C33", "C12", "C23", "C13", "C44", "C55", "C66")  # the order of the CSV's columns

# The entries of a plane cell's tensor that are not among the nine; they vanish when the cell is orthotropic.
COUPLINGS = ("C16", "C26", "C36", "C45")

_SWAPPED = (1, 0, 2, 3, 5, 4, 7, 6, 8)  # axes 1 and 2 exchanged: C11/C22, C23/C13, C44/C55
_SAME = tuple(range(9))

# How the nine components are permuted when the image is transformed: new_targets = targets[..., SYMMETRIES[name]].
# (The couplings change sign under flips; the nine do not.)
SYMMETRIES: dict[str, tuple[int, ...]] = {
    "flip_horizontal": _SAME,
    "flip_vertical": _SAME,
    "transpose": _SWAPPED,
    "quarter_turn": _SWAPPED,
}


def place(name: str) -> tuple[int, int]:
    """Return the row and the column of a component such as "C45" in the 6x6 tensor, counted from 0."""
    return int(name[1]) - 1, int(name[2]) - 1


def vector(tensor: np.ndarray, names: tuple[str, ...] = COMPONENTS) -> np.ndarray:
    """Return the named entries (..., k) of stiffness tensors (..., 6, 6)."""
    rows, columns = zip(*map(place, names), strict=True)
    return np.asarray(tensor)[..., rows, columns]


def tensor(vector: np.ndarray, names: tuple[str, ...] = COMPONENTS) -> np.ndarray:
    """Return symmetric stiffness tensors (..., 6, 6) from their named entries (..., k); all other entries are zero."""
    vector = np.asarray(vector, dtype=np.float64)
    rows, columns = zip(*map(place, names), strict=True)
    result = np.zeros((*vector.shape[:-1], 6, 6))
    result[..., rows, columns] = vector
    result[..., columns, rows] = vector
    return result
