"""The grid's 24 configurations in the plain Keras loop of the protocol, beside ours, on this machine.

    python bench/keras_loop.py [--data FOLDER] [--epochs 4] [--environment DIR]

Keras (tensorflow-cpu) needs an environment of its own, as its dependencies are not ours: it is made in DIR
(default: `hpo-bench-keras` in the temporary folder) at the first call, like this, and used again by later ones:

    python -m venv DIR && DIR/bin/pip install tensorflow-cpu

Keras runs as its users run it: one process with all cores, one configuration after the other. Ours runs as `hpo run`
does: one single-threaded process per core, each with the next configuration. Same data, same split, same
configurations, a few epochs of each; the first epoch of each is left out, and the median of the rest times 24 x 300
stands for the grid. Neither includes tracking.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
from machine import cores, machine  # beside this file; needs no installed package, for Keras runs it, too

GRID = list(itertools.product((8, 16, 32), (3, 5), (0.0, 0.2), (1e-3, 1e-4)))  # filters, kernel, dropout, learning rate
EPOCHS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of images and a CSV (default: the shipped set)")
    parser.add_argument("--epochs", type=int, default=4, help="of each configuration, the first left out (default 4)")
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "hpo-bench-keras")
    parser.add_argument(
        "--keras", type=Path, metavar="NPZ", help=argparse.SUPPRESS
    )  # the other half, run by Keras' Python
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs: expected at least 2, as the first one is left out.")
    if arguments.keras:
        keras_loop(arguments.keras, arguments.epochs)
    else:
        compare(arguments.data, arguments.epochs, arguments.environment)


def compare(data: Path | None, epochs: int, environment: Path) -> None:
    """Run both halves on the same arrays, one after the other, and print the table."""
    from data_pipeline.dataset import DEFAULT, load
    from data_pipeline.split import split

    python = environment / "bin" / "python"
    if not python.exists():
        print(f"making {environment} with tensorflow-cpu (once) ...", flush=True)
        venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "tensorflow-cpu"], check=True)
    dataset = load(data or DEFAULT)
    parts = split(len(dataset.images))
    mean, scale = dataset.targets[parts.train].mean(axis=0), dataset.targets[parts.train].std(axis=0)
    arrays = {}
    for name, indices in (("train", parts.train), ("validation", parts.validation)):
        arrays[f"{name}_images"] = dataset.images[indices]
        arrays[f"{name}_targets"] = (dataset.targets[indices] - mean) / scale
    with tempfile.TemporaryDirectory() as folder:
        npz = Path(folder) / "data.npz"
        np.savez(npz, **arrays)
        processes = cores()
        ours, our_versions = our_loop(npz, epochs, processes)
        command = [python, __file__, "--keras", npz, "--epochs", str(epochs)]
        quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=quiet, text=True).stdout
    keras, keras_versions = json.loads(answer.splitlines()[-1])
    report(ours, keras, processes, f"{our_versions}; {keras_versions}")


def report(ours: list[float], keras: list[float], processes: int, versions: str) -> None:
    """Print seconds per epoch of each configuration, and the extrapolated grid."""
    print(f"{machine()}; {versions}; seconds per epoch, median")
    print(f"Keras: one process on all cores; ours: {processes} single-threaded processes at once, time / {processes}")
    print(f"{'config':>7}{'filters':>9}{'kernel':>8}{'dropout':>9}{'rate':>9}{'Keras':>9}{'ours':>9}{'ratio':>8}")
    for number, (point, theirs, our) in enumerate(zip(GRID, keras, ours, strict=True)):
        filters, kernel_size, dropout, rate = point
        print(
            f"{number:>7}{filters:>9}{kernel_size:>8}{dropout:>9}{rate:>9}"
            f"{theirs:>9.3f}{our / processes:>9.3f}{our / processes / theirs:>8.2f}"
        )
    theirs, our = EPOCHS * sum(keras), EPOCHS * sum(ours) / processes
    print(f"the grid, {len(GRID)} x {EPOCHS} epochs: Keras {theirs / 60:.1f} min, ours {our / 60:.1f} min")
    print(f"ratio {our / theirs:.2f}")


def our_loop(npz: Path, epochs: int, processes: int) -> tuple[list[float], str]:
    """Seconds per epoch of each configuration while as many others train at the same time as there are processes."""
    import torch

    work = [(npz, epochs, *point) for point in GRID]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.starmap(our_configuration, work, chunksize=1), f"torch {torch.__version__}"


def our_configuration(npz: Path, epochs: int, filters: int, kernel_size: int, dropout: float, rate: float) -> float:
    import torch

    from models.specs import CnnSpec, TrainingSpec
    from models.training import Training

    torch.set_num_threads(1)
    data = np.load(npz)
    training = Training(
        CnnSpec(filters=filters, kernel_size=kernel_size, dropout=dropout),
        TrainingSpec(epochs=epochs, learning_rate=rate),
        train=(data["train_images"], data["train_targets"]),
        validation=(data["validation_images"], data["validation_targets"]),
    )
    return statistics.median([epoch.metrics["seconds"] for epoch in training.epochs()][1:])


def keras_loop(npz: Path, epochs: int) -> None:
    """The source study's loop, one configuration after the other; prints seconds per epoch as JSON."""
    import keras  # type: ignore[import-not-found]
    import tensorflow  # type: ignore[import-not-found]
    from keras import layers

    class Clock(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.seconds: list[float] = []

        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: object = None) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    data = np.load(npz)
    images = {name: np.moveaxis(data[f"{name}_images"], 1, -1) for name in ("train", "validation")}
    targets = {name: data[f"{name}_targets"].astype(np.float32) for name in ("train", "validation")}
    found = []
    for filters, kernel_size, dropout, rate in GRID:
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input(images["train"].shape[1:]),
                layers.Conv2D(filters, kernel_size, activation="relu", padding="same"),
                layers.MaxPooling2D(2),
                layers.Conv2D(2 * filters, kernel_size, activation="relu", padding="same"),
                layers.MaxPooling2D(2),
                layers.Flatten(),
                layers.Dropout(dropout),
                layers.Dense(64, activation="relu"),
                layers.Dense(targets["train"].shape[1]),
            ]
        )
        model.compile(optimizer=keras.optimizers.Adam(rate), loss="mse")
        clock = Clock()
        model.fit(
            images["train"],
            targets["train"],
            validation_data=(images["validation"], targets["validation"]),
            epochs=epochs,
            batch_size=32,
            verbose=0,
            callbacks=[clock],
        )
        found.append(statistics.median(clock.seconds[1:]))
        print(f"Keras: {len(found)} of {len(GRID)} configurations timed", file=sys.stderr, flush=True)
        keras.backend.clear_session()
    print(json.dumps([found, f"Keras {keras.__version__}, tensorflow-cpu {tensorflow.__version__}"]))


if __name__ == "__main__":
    main()
