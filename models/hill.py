"""Hill's relations of the stiffness of an extruded cell of two isotropic phases, for arrays and tensors alike.

Phases are m (grey value 0, "matrix") and f (grey value 1, "inclusion"), <.> a mean over the cell, k = lambda + mu the
plane-strain bulk modulus, d. the difference of f and m. A strain 11 of the cell is a dilation of 1; the inclusions take
the part a of it (the mean over the cell of their own dilation), the matrix the rest. So C11 + C12 = 2 (k_m + dk a) and
C13 = lambda_m + dlambda a; of a strain 22 the inclusions take b, and C12 + C22 = 2 (k_m + dk b), C23 = lambda_m +
dlambda b. A strain 33 leaves C33 = <lambda + 2 mu> - dlambda^2 r with r = (f - (a + b) / 2) / dk (R. Hill, J. Mech.
Phys. Solids 12, 1964).

Where the phases' k nearly agree, dividing by dk loses digits: compute a, b and r in another way if there is one.
"""

from typing import Any

Pair = tuple[float, float]  # a constant of the matrix and of the inclusion, any unit
LARGEST = 1e15  # of a phase's constants: that of diamond in pascal is 1e12, and the square must fit single precision
SMALLEST = 1e-3  # of the larger k: phases that differ less make the relations worthless for labels of a few digits


def parts(c11: Any, c22: Any, c12: Any, f: Any, ks: Pair) -> tuple[Any, Any, Any]:
    """Return a, b (no unit) and r (1 / the components' unit) of a cell with these components; `f`: volume fraction."""
    k, dk = ks[0], ks[1] - ks[0]
    a, b = ((normal + c12 - 2 * k) / (2 * dk) for normal in (c11, c22))
    return a, b, (f - (a + b) / 2) / dk


def out_of_plane(a: Any, b: Any, r: Any, f: Any, lambdas: Pair, mus: Pair) -> tuple[Any, Any, Any]:
    """Return C13, C23 and C33 in the constants' unit."""
    difference = lambdas[1] - lambdas[0]
    mean = lambdas[0] + f * difference + 2 * (mus[0] + f * (mus[1] - mus[0]))
    return lambdas[0] + difference * a, lambdas[0] + difference * b, mean - difference**2 * r


def apart(ks: Pair) -> bool:
    """Return whether the phases' k differ enough for the relations."""
    return abs(ks[1] - ks[0]) >= SMALLEST * max(ks)
