"""A small labelled data set for tests: real cells of 16x16 pixels, labelled by the product's own solver."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from data_pipeline.components import vector
from data_pipeline.homogenize import homogenize
from data_pipeline.phase import Phase

STUDY = """
description = "Four points for a test."
[data]
path = "{data}"
[model]
family = "cnn"
kernel_size = 3
dropout = 0.2
[space]
filters = [2, 4]
learning_rate = {rates}
[training]
epochs = {epochs}
batch_size = 16
"""

PHASES = """
[phases.matrix]
young_modulus = {matrix}
poisson_ratio = 0.35
[phases.inclusion]
young_modulus = {inclusion}
poisson_ratio = 0.22
"""


def make(folder: Path, *, count: int = 60, size: int = 16, seed: int = 0, extends: str = "") -> Path:
    """Write `count` smoothed random cells in the course's form, labels in GPa. A smaller set has the first ones."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    phases = {"matrix": Phase(3.5, 0.35), "inclusion": Phase(70.0, 0.22)}
    rows = []
    for index in range(count):
        field = gaussian_filter(random.normal(size=(size, size)), 2, mode="wrap")
        image = field > np.quantile(field, random.uniform(0.2, 0.8))
        Image.fromarray(image.astype(np.uint8) * 255).save(folder / f"{index}_cell.png")
        numbers = vector(homogenize(image, **phases, subdivisions=1))
        rows.append(",".join([str(index + 1), *(repr(float(number)) for number in numbers)]))
    (folder / f"1-{count}_Cij_pbc.csv").write_text("\n".join(rows) + "\n")
    (folder / "dataset.toml").write_text(
        'name = "tiny"\nunit = "GPa"\n' + (f'extends = "{extends}"\n' if extends else "")
    )
    return folder


def blocks(n: int, size: int, *, seed: int) -> np.ndarray:
    """Two-phase images (n, 1, size, size) of blocks of 4x4 pixels, each of another volume fraction."""
    random = np.random.default_rng(seed)
    coarse = (random.random((n, 1, size // 4, size // 4)) < random.random((n, 1, 1, 1))).astype(np.float32)
    return coarse.repeat(4, axis=2).repeat(4, axis=3)


def study(folder: Path, name: str, *, data: Path, epochs: int, rates: str = "[1e-3, 1e-4]") -> Path:
    """Write the study file NAME.toml on `data`: two points for each of the learning rates."""
    path = folder / f"{name}.toml"
    path.write_text(STUDY.format(data=data, epochs=epochs, rates=rates))
    return path
