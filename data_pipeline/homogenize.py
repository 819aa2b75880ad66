"""The effective stiffness of a periodic cell, from its image and two phases.

Bilinear elements with one quadrature point, which is Willot's rotated scheme (F. Willot, Fourier-based schemes for
computing the mechanical response of composites with accurate local fields, Comptes Rendus Mecanique 343, 2015). The
cell is extruded out of plane: in-plane loads (11, 22, 33, 12; 33 enters through lambda) and antiplane loads (23, 13)
decouple.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import scipy  # whose modules are imported at their first use

from data_pipeline.phase import Phase


def homogenize(image: np.ndarray, *, matrix: Phase, inclusion: Phase, subdivisions: int = 2) -> np.ndarray:
    """Return the effective stiffness (6, 6) of a periodic cell, in the unit of the phases.

    `image` (h, w) is boolean, or uint8 with 0 for the matrix and one other value, 1 or 255, for the inclusion. Each
    pixel is cut into `subdivisions` x `subdivisions` elements (2 for labels; 1 against 2 estimates their error). Axis 1
    runs along the columns, axis 2 along the rows, downwards. Raise ValueError if the image is of another kind.
    """
    fine = _elements(image, subdivisions)
    gradient_1, gradient_2, in_plane_free, antiplane_free = _gradients(*fine.shape)
    inside = fine.ravel()
    lam = np.where(inside, inclusion.lame_lambda, matrix.lame_lambda)
    mu = np.where(inside, inclusion.lame_mu, matrix.lame_mu)
    effective: np.ndarray = np.where(inside[:, None, None], inclusion.stiffness, matrix.stiffness).mean(axis=0)

    # A macroscopic strain loads the nodes with the divergence of its stress without fluctuation.
    strain_1, strain_2 = gradient_1.T, gradient_2.T
    stiffness_11 = _weighted(strain_1, lam + 2 * mu, gradient_1) + _weighted(strain_2, mu, gradient_2)
    stiffness_22 = _weighted(strain_2, lam + 2 * mu, gradient_2) + _weighted(strain_1, mu, gradient_1)
    stiffness_12 = _weighted(strain_1, lam, gradient_2) + _weighted(strain_2, mu, gradient_1)
    loads = np.array(
        [
            [strain_1 @ (lam + 2 * mu), strain_1 @ lam, strain_1 @ lam, strain_2 @ mu],
            [strain_2 @ lam, strain_2 @ (lam + 2 * mu), strain_2 @ lam, strain_1 @ mu],
        ]
    )  # (displacement component, load, node)
    in_plane = scipy.sparse.block_array([[stiffness_11, stiffness_12], [stiffness_12.T, stiffness_22]], format="csr")
    # The energy of the fluctuation is subtracted from the mean stiffness.
    softening = _softening(in_plane, np.concatenate(list(loads), axis=1).T, in_plane_free)
    effective[np.ix_((0, 1, 2, 5), (0, 1, 2, 5))] -= softening / len(inside)

    antiplane = _weighted(strain_1, mu, gradient_1) + _weighted(strain_2, mu, gradient_2)
    softening = _softening(antiplane, np.stack([strain_2 @ mu, strain_1 @ mu], axis=1), antiplane_free)
    effective[3:5, 3:5] -= softening / len(inside)
    return effective


def voigt(volume_fraction: float | np.ndarray, *, matrix: Phase, inclusion: Phase) -> np.ndarray:
    """Return the upper bound (6, 6), the mean stiffness, at the inclusion's volume fraction; (n, 6, 6) for (n, 1, 1).

    Bound - effective stiffness is positive semi-definite.
    """
    return (1 - volume_fraction) * matrix.stiffness + volume_fraction * inclusion.stiffness


def reuss(volume_fraction: float | np.ndarray, *, matrix: Phase, inclusion: Phase) -> np.ndarray:
    """Return the lower bound (6, 6), the inverse of the mean compliance, of a volume fraction; (n, 6, 6) for (n, 1, 1).

    Effective stiffness - bound is positive semi-definite.
    """
    compliance = (1 - volume_fraction) * np.linalg.inv(matrix.stiffness)
    return np.linalg.inv(compliance + volume_fraction * np.linalg.inv(inclusion.stiffness))


def _elements(image: np.ndarray, subdivisions: int) -> np.ndarray:
    """Return which elements (h * subdivisions, w * subdivisions) are inclusion."""
    image = np.asarray(image)
    if image.ndim != 2 or not image.size or image.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"Expected a non-empty image (h, w) of bool or uint8, found {image.shape} of {image.dtype}.")
    if image.dtype == np.uint8:
        values = set(np.unique(image).tolist())
        if not (values <= {0, 1} or values <= {0, 255}):
            raise ValueError(
                f"Expected pixels 0 and 255 (or 0 and 1), found {sorted(values)[:5]}. Threshold the image first."
            )
    if subdivisions < 1:
        raise ValueError(f"subdivisions: expected 1 or more, found {subdivisions}.")
    return np.kron(image.astype(bool), np.ones((subdivisions, subdivisions), dtype=bool))


@lru_cache(maxsize=4)
def _gradients(rows: int, columns: int) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Return d/dx1 and d/dx2 for unit square elements in a periodic grid, sparse (elements, nodes).

    Then the free unknowns, those that are not pinned: in plane (both components), and antiplane. Elements and nodes are
    numbered along the rows.
    """
    import skfem  # which takes longer than all else here, and who asks for bounds alone needs none of it

    mesh = skfem.MeshQuad.init_tensor(np.arange(columns + 1.0), np.arange(rows + 1.0))
    centre = (np.array([[0.5], [0.5]]), np.array([1.0]))
    linear = skfem.Basis(mesh, skfem.ElementQuad1(), quadrature=centre)
    constant = skfem.Basis(mesh, skfem.ElementQuad0(), quadrature=centre)

    # Periodic: nodes of the right and lower edge are those of the left and upper edge.
    x, y = np.rint(linear.doflocs).astype(int)
    fold = _selection(y % rows * columns + x % columns, rows * columns)
    x, y = np.floor(constant.doflocs).astype(int)
    sort = _selection(y * columns + x, rows * columns).T

    def derivative(axis: int) -> Any:
        form = skfem.BilinearForm(lambda u, v, w: u.grad[axis] * v)
        return (sort @ form.assemble(linear, constant) @ fold).tocsr()

    nodes = rows * columns
    # Pin node 0 against translation. If both sides are even, one quadrature point does not resist the hourglass mode
    # (+1 and -1 like a chess board), so pin a neighbour as well.
    pinned = [0, 1] if rows % 2 == columns % 2 == 0 else [0]
    free = np.setdiff1d(np.arange(nodes), pinned)
    return derivative(0), derivative(1), np.concatenate([free, nodes + free]), free


def _selection(target: np.ndarray, size: int) -> Any:
    """Return a sparse matrix (len(target), size) with a one in column target[i] of row i."""
    return scipy.sparse.csr_matrix((np.ones(len(target)), (np.arange(len(target)), target)), shape=(len(target), size))


def _weighted(left: Any, weight: np.ndarray, right: Any) -> Any:
    return left @ (scipy.sparse.diags_array(weight) @ right)


def _softening(stiffness: Any, loads: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return loads^T stiffness^-1 loads (m, m) over the free unknowns; loads is (unknowns, m)."""
    loads = loads[free]
    # Symmetric positive definite: no pivoting, and an ordering for symmetric matrices.
    factor = scipy.sparse.linalg.splu(
        stiffness[free][:, free].tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    softening = loads.T @ factor.solve(loads)
    symmetric: np.ndarray = (softening + softening.T) / 2
    return symmetric
