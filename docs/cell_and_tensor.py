"""Draw one shipped cell beside its stiffness tensor, as README shows them: python docs/cell_and_tensor.py"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline import components

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data_pipeline" / "default"
ROW = 4  # of the label table, counted from 0: an anisotropic cell
PICTURE = ROOT / "docs" / "images" / "cell-and-tensor.png"


def main() -> None:
    (image,) = FOLDER.glob(f"{ROW}_*.png")
    labels = np.loadtxt(FOLDER / "1-520_Cij_pbc.csv", delimiter=",")[ROW, 1:]  # GPa
    tensor = components.tensor(labels)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.7), width_ratios=(1, 1.25), layout="constrained")
    left.imshow(np.asarray(Image.open(image)), cmap="gray", interpolation="nearest")
    left.set_title("periodic cell, 64 x 64 pixels", fontsize=11)
    left.set_xlabel("black: matrix, white: inclusion", fontsize=9)
    left.set(xticks=[], yticks=[])

    right.imshow(np.ma.masked_equal(tensor, 0.0), cmap="viridis", alpha=0.55)
    for row, column in np.ndindex(tensor.shape):
        text = f"{tensor[row, column]:.1f}" if tensor[row, column] else "·"
        right.text(column, row, text, ha="center", va="center", fontsize=10)
    right.set_title("effective stiffness tensor in GPa (Voigt notation)", fontsize=11)
    right.set_xlabel("nine components are predicted; · are not", fontsize=9)
    axes = ["11", "22", "33", "23", "13", "12"]
    right.set_xticks(range(6), axes)
    right.set_yticks(range(6), axes)
    right.tick_params(length=0, labelsize=9)

    figure.text(0.452, 0.52, "→", fontsize=30, ha="center", va="center")
    figure.get_layout_engine().set(wspace=0.18)
    figure.savefig(PICTURE, dpi=110)
    Image.open(PICTURE).convert("RGB").quantize(64).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
