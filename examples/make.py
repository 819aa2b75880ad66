"""Make the three example data sets again: `python examples/make.py`. The same seeds give the same files.

The numbers are computed, not measured: effective properties of periodic cells of 32 x 32 pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import splu

from data_pipeline.homogenize import homogenize
from data_pipeline.phase import Phase

HERE = Path(__file__).parent
SIZE = 32  # pixels a side
COLOURS = np.array([[45, 45, 60], [210, 140, 60], [235, 235, 225]], np.uint8)  # pore, binder, grain
CONDUCTIVITY = np.array([1e-4, 1e-2, 1.0])  # S/m, of these


def field(draw: np.random.Generator, *, stretch: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """Return a smooth periodic random field (SIZE, SIZE), longer along a direction (radians from the columns' axis)."""
    noise = np.fft.fft2(draw.normal(size=(SIZE, SIZE)))
    ky, kx = np.meshgrid(*2 * [np.fft.fftfreq(SIZE)], indexing="ij")
    along, across = kx * np.cos(angle) + ky * np.sin(angle), ky * np.cos(angle) - kx * np.sin(angle)
    return np.fft.ifft2(noise * np.exp(-60 * ((along * stretch) ** 2 + across**2))).real


def conductivity(cell: np.ndarray) -> np.ndarray:
    """Return the effective conductivity (2, 2) of a periodic cell of conductivities (h, w), by finite volumes.

    Axis 1 runs along the columns, to the right, axis 2 along the rows, downwards. Between two pixels the conductivity
    is their harmonic mean.
    """
    numbers = np.arange(cell.size).reshape(cell.shape)
    edges = []  # of both directions: from, to, conductivity
    for axis in (1, 0):
        other, beside = np.roll(numbers, -1, axis), np.roll(cell, -1, axis)
        edges.append((numbers.ravel(), other.ravel(), (2 * cell * beside / (cell + beside)).ravel()))
    starts, ends, weights = (np.concatenate(part) for part in zip(*edges, strict=True))
    rows, columns = np.concatenate([starts, ends, starts, ends]), np.concatenate([starts, ends, ends, starts])
    matrix = coo_matrix((np.concatenate([weights, weights, -weights, -weights]), (rows, columns))).tocsc()
    solve = splu(matrix[1:, 1:]).solve  # the potential of pixel 0 is 0
    potentials, loads = np.zeros((2, cell.size)), np.zeros((2, cell.size))
    for place, (start, end, weight) in enumerate(edges):
        np.add.at(loads[place], start, weight)
        np.add.at(loads[place], end, -weight)
        potentials[place, 1:] = solve(loads[place, 1:])
    effective = -potentials @ loads.T
    for place, (_, _, weight) in enumerate(edges):
        effective[place, place] += weight.sum()
    return effective / cell.size


def stiffness(folder: Path) -> None:
    """One number with a unit in the header; the images are paired by their file names."""
    draw = np.random.default_rng(1)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = ["filename,E11 [GPa]"]
    for index in range(80):
        values = field(draw)
        image = values > np.quantile(values, draw.uniform(0.2, 0.8))
        Image.fromarray(image.astype(np.uint8) * 255).save(folder / "images" / f"cell_{index:03d}.png")
        tensor = homogenize(image, matrix=Phase(3.5, 0.35), inclusion=Phase(70.0, 0.22), subdivisions=1)
        lines.append(f"cell_{index:03d}.png,{1 / np.linalg.inv(tensor)[0, 0]:.4f}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def electrode(folder: Path) -> None:
    """Three phases as colours, several sections of each of twelve electrodes, a conductivity over decades."""
    draw = np.random.default_rng(2)
    (folder / "sections").mkdir(parents=True, exist_ok=True)
    lines = ["section;electrode;sigma [S/m]"]
    for electrode_number in range(12):
        shares = np.cumsum(draw.dirichlet([3, 3, 3]))
        for section in range(7):
            values = field(draw)
            phases = np.searchsorted(np.quantile(values, shares[:2]), values)
            name = f"e{electrode_number:02d}_s{section}"
            Image.fromarray(COLOURS[phases]).save(folder / "sections" / f"{name}.png")
            sigma = np.trace(conductivity(CONDUCTIVITY[phases])) / 2
            lines.append(f"{name};{electrode_number};{sigma:.4e}".replace(".", ","))
    (folder / "sections.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def fibres(folder: Path) -> None:
    """Arrays: images (n, 32, 32), and a conductivity (n, 2, 2) whose off-diagonal entry changes its sign in a flip."""
    draw = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    images, tensors = [], []
    for _ in range(80):
        values = field(draw, stretch=3.0, angle=draw.uniform(0, np.pi))
        images.append(values > np.quantile(values, draw.uniform(0.3, 0.7)))
        tensors.append(conductivity(np.where(images[-1], 20.0, 1.0)))
    np.savez_compressed(folder / "cells.npz", images=np.array(images, np.uint8), K=np.round(tensors, 6))


def picture(file: Path) -> None:
    """Draw the first eight images of each example, a row each."""
    rows = []
    for folder in ("stiffness", "electrode"):
        paths = sorted((HERE / folder).glob("*/*.png"))[:8]
        rows.append([np.array(Image.open(path).convert("RGB")) for path in paths])
    fibre = np.load(HERE / "fibres" / "cells.npz")["images"][:8] * np.uint8(255)
    rows.append([np.repeat(image[..., np.newaxis], 3, axis=2) for image in fibre])
    framed = [[np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=255) for image in row] for row in rows]
    whole = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in framed]))
    whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST).save(file, optimize=True)


if __name__ == "__main__":
    for make in (stiffness, electrode, fibres):
        make(HERE / make.__name__)
    picture(HERE.parent / "docs" / "tutorial" / "examples.png")
