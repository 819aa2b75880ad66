"""Folders of images and labels as people have them: one function a form, seeded, with a few small images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

N, SIZE = 24, 16
COURSE = ("C11", "C22", "C33", "C12", "C23", "C13", "C44", "C55", "C66")

STUDY = """
[model]
family = "cnn"
kernel_size = 3
dropout = 0.0
[space]
filters = [2, 4]
[training]
epochs = {epochs}
batch_size = 8
"""  # of any folder here
CONV = """
[model]
family = "conv"
depth = 2
dropout = 0.1
stride = 1
[space]
width = [2, 4]
[training]
epochs = {epochs}
batch_size = 8
rotation = 10.0
"""


def cells(n: int = N, size: int = SIZE, *, seed: int = 0, phases: int = 2) -> np.ndarray:
    """Return labels 0..phases-1 of random cells (n, size, size) uint8; the share of phase 0 differs."""
    draw = np.random.default_rng(seed)
    shares = draw.uniform(0.2, 0.8, (n, 1, 1))
    noise = draw.uniform(size=(n, size // 4, size // 4)).repeat(4, axis=1).repeat(4, axis=2)
    return np.where(noise < shares, 0, 1 + (noise * 997 % (phases - 1)).astype(int)).astype(np.uint8)


def stiffness(labels: np.ndarray) -> np.ndarray:
    """Return one number (n,) for each cell, in GPa: about a mixture rule."""
    return np.round(3.5 + 60 * (labels > 0).mean(axis=(1, 2)), 4)


def pictures(folder: Path, names: list[str], pixels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(folder / name)


def npy_and_names(folder: Path) -> None:
    """Case 1: filename,E_eff in Pa, one .npy of 65 x 65 an image."""
    images = cells(size=68)[:, :65, :65].astype(np.float64)
    for row, image in enumerate(images):
        (folder / "images").mkdir(exist_ok=True)
        np.save(folder / "images" / f"cell{row}.npy", image)
    rows = [f"cell{row}.npy,{value * 1e9:.6e}" for row, value in enumerate(stiffness(images))]
    (folder / "labels.csv").write_text("\n".join(["filename,E_eff [Pa]", *reversed(rows)]) + "\n")


def ids(folder: Path) -> None:
    """Case 2: PNG 256 x 256 TRAIN_000000.png, and ID,hardness."""
    labels = cells(size=256, n=20)
    pictures(folder / "images", [f"TRAIN_{row:06d}.png" for row in range(20)], labels * 255)
    rows = [f"TRAIN_{row:06d},{value}" for row, value in enumerate(stiffness(labels))]
    (folder / "train.csv").write_text("\n".join(["ID,hardness", *rows]))


PALETTE = np.array([[20, 20, 20], [200, 40, 40], [40, 200, 40], [40, 40, 200], [220, 220, 40]], np.uint8)


def phases(folder: Path) -> None:
    """Case 3: RGB, five phases as colours, a unit in the header."""
    labels = cells(phases=5)
    pictures(folder / "micrographs", [f"m{row}.png" for row in range(N)], PALETTE[labels])
    rows = [f"m{row};{str(value).replace('.', ',')}" for row, value in enumerate(stiffness(labels))]
    (folder / "results.csv").write_text("\n".join(["image;YS [MPa]", *rows]))


def hdf5(folder: Path) -> None:
    """Case 4: HDF5 with groups train, val and test, and labels (n, 3, 3)."""
    import h5py

    labels = cells(n=30)
    tensors = stiffness(labels)[:, None, None] * np.array([[1, 0.3, 0], [0.3, 1.1, 0], [0, 0, 0.4]])
    tensors += np.random.default_rng(1).normal(0, 0.1, (30, 1, 1))
    with h5py.File(folder / "data.h5", "w") as file:
        for name, part in (("train", slice(0, 20)), ("val", slice(20, 25)), ("test", slice(25, 30))):
            file.create_dataset(f"{name}/images", data=labels[part], compression="gzip", chunks=(5, SIZE, SIZE))
            file.create_dataset(f"{name}/C", data=tensors[part])


def text(folder: Path) -> None:
    """Case 5: whitespace text n x 784, and a text table of 13 columns whose first is constant."""
    labels = cells(size=28)
    np.savetxt(folder / "images.txt", labels.reshape(N, -1), fmt="%d")
    noise = np.random.default_rng(2).normal(0, 1, (N, 12))
    np.savetxt(folder / "psi.txt", np.column_stack([np.ones(N), stiffness(labels)[:, None] + noise]), fmt="%.5f")


def tiff_and_excel(folder: Path) -> None:
    """Case 6: 16-bit TIFF, and xlsx with a column of categories."""
    labels = cells()
    pictures(folder / "scans", [f"scan_{row}.tif" for row in range(N)], labels.astype(np.uint16) * 40_000 + 1_000)
    pd.DataFrame(
        {
            "scan": [f"scan_{row}.tif" for row in range(N)],
            "furnace": [f"F{row % 3}" for row in range(N)],
            "porosity [%]": stiffness(labels),
        }
    ).to_excel(folder / "results.xlsx", index=False)


def numbered(folder: Path, name: str = "{:04d}_a.png") -> None:
    """Case 7: images numbered from 1, and a column that holds their numbers."""
    labels = cells()
    pictures(folder, [name.format(row + 1) for row in range(N)], labels * 255)
    rows = [f"{row},{value}" for row, value in enumerate(stiffness(labels))]
    (folder / "table.csv").write_text("\n".join(["Image no.,E", *rows]))


EXPORTS: dict[str, tuple[str, str, str]] = {  # encoding, separator, how a number is written
    "semicolons and decimal commas": ("utf-8", ";", "{:.3f}"),
    "UTF-16": ("utf-16", "\t", "{:.3f}"),
    "cp1252": ("cp1252", ",", "{:.3f}"),
    "quoted numbers": ("utf-8", ",", '"{:.3f}"'),
    "US thousands": ("utf-8", ",", '"{:,.2f}"'),
    "empty rows": ("utf-8", ",", "{:.3f}"),
}


def export(folder: Path, form: str) -> np.ndarray:
    """Case 8: an export of Excel; return the numbers."""
    encoding, separator, number = EXPORTS[form]
    labels = cells()
    values = np.round(1000 * stiffness(labels), 2)
    pictures(folder, [f"p{row}.png" for row in range(N)], labels * 255)
    texts = [number.format(value) for value in values]
    texts = [text.replace(".", ",") for text in texts] if form.startswith("semicolons") else texts
    lines = [f"p{row}{separator}{text}{separator}Zugversuch für Öl" for row, text in enumerate(texts)]
    lines += [separator * 2] * 4 if form == "empty rows" else []
    header = separator.join(["file", "Härte [MPa]", "note"])
    (folder / "export.csv").write_bytes("\r\n".join([header, *lines]).encode(encoding))
    return values


def course_with_header(folder: Path) -> np.ndarray:
    """Case 9: the course's nine columns under a header, in another order; return them in the file's order."""
    labels = cells()
    pictures(folder, [f"{row}_cell.png" for row in range(N)], labels * 255)
    values = stiffness(labels)[:, None] * np.linspace(0.2, 1, 9)
    rows = [",".join([str(row + 1), *map(repr, line)]) for row, line in enumerate(values.tolist())]
    (folder / "labels.csv").write_text("\n".join([",".join(["index", *reversed(COURSE)]), *rows]))
    return values


def simulations(folder: Path) -> None:
    """Case 10: six simulations of many images each."""
    labels = cells(n=36)
    pictures(folder / "steps", [f"sim{row // 6}_step{row % 6}.png" for row in range(36)], labels * 255)
    rows = [f"sim{row // 6}_step{row % 6}.png,{row // 6},{value}" for row, value in enumerate(stiffness(labels))]
    (folder / "steps.csv").write_text("\n".join(["file,simulation,E", *rows]))


def permeability(folder: Path) -> None:
    """Case 11: permeability over five decades."""
    labels = cells()
    pictures(folder, [f"rock_{row}.bmp" for row in range(N)], labels * 255)
    values = 10.0 ** (-17 + 5 * (labels == 0).mean(axis=(1, 2)))
    rows = [f"rock_{row},{value:.5e}" for row, value in enumerate(values)]
    (folder / "k.tsv").write_text("\n".join(["rock\tk [m²]", *(row.replace(",", "\t") for row in rows)]))


def logarithms(folder: Path) -> None:
    """Case 11: the same, trained as its logarithm."""
    permeability(folder)
    (folder / "dataset.toml").write_text('transform = {k = "log10"}\n')


def missing(folder: Path) -> None:
    """Case 12: two of 40 targets are missing in a third of the rows."""
    labels = cells()
    pictures(folder, [f"a{row}.png" for row in range(N)], labels * 255)
    table = pd.DataFrame({"file": [f"a{row}.png" for row in range(N)]})
    noise = np.random.default_rng(3).normal(0, 1, (N, 40))
    table[[f"t{index}" for index in range(40)]] = stiffness(labels)[:, None] + noise
    table.loc[::3, ["t7", "t31"]] = np.nan
    table.to_csv(folder / "targets.csv", index=False)


def train_and_test(folder: Path) -> None:
    """Case 13: a train and a test file given apart."""
    labels = cells(n=30)
    for name, part in (("train", slice(0, 24)), ("test", slice(24, 30))):
        np.savez_compressed(folder / f"{name}.npz", images=labels[part], E=stiffness(labels[part]))


CASES: dict[str, Callable[[Path], object]] = {
    "npy and names": npy_and_names,
    "ids": ids,
    "phases": phases,
    "hdf5": hdf5,
    "text": text,
    "tiff and excel": tiff_and_excel,
    "numbered": numbered,
    "course with header": course_with_header,
    "simulations": simulations,
    "permeability": permeability,
    "logarithms": logarithms,
    "missing": missing,
    "train and test": train_and_test,
}
