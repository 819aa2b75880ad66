"""A trained regressor as a folder: an MLflow model (pt2 flavour), weights.safetensors + spec.json, and a README.

Runs in the trainer; torch and mlflow are imported where they are used, so that importing this module costs nothing.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.regressor import Regressor

REQUIREMENTS = ("torch", "numpy")  # what plain MLflow needs besides itself; in the versions at hand

README = """\
# {title}

Predicts {targets} in {unit} from images of shape {shape} (channels, height, width), {pixels}.
Images on another scale, such as 0..255, are refused with an error.

With PyTorch alone (`torch.export.load` can run code: only for files you trust; SHA256SUMS tells whether they changed):

```python
import torch
model = torch.export.load("{pt2}").module()
images = torch.rand(3, {sizes})  # yours: torch.float32, 0..1
predictions = model(images)
print(predictions)  # {unit}; columns: {targets}
```

With MLflow alone:

```python
import mlflow.pyfunc, numpy
model = mlflow.pyfunc.load_model(".")
images = numpy.random.rand(3, {sizes}).astype(numpy.float32)  # yours: numpy.float32, 0..1
predictions = model.predict(images)
print(predictions)  # {unit}; columns: {targets}
```

`hpo predict` reads only weights.safetensors and spec.json, which hold no code.
"""


def package(
    folder: Path,
    regressor: Regressor,
    *,
    spec: Mapping[str, Any],
    image_shape: Sequence[int],
    target_names: Sequence[str],
    unit: str,
    example_images: np.ndarray,
    pixels: str = "grey values 0..1 (pixel / 255)",
    title: str = "Stiffness from microstructure images",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the model's folder, which must not exist or be empty. The regressor itself stays as it is.

    `spec` is the model specification's dict form and `extra` what spec.json tells besides (digests, scores).
    `pixels` says how the pixels of a file become numbers in 0..1.
    `example_images` (at least 2, channels, height, width), 0..1: with a single one the batch size would be frozen.
    """
    import torch

    from hpo.tracking.foreign import PT2
    from models import bundle

    example = np.ascontiguousarray(example_images, dtype=np.float32)
    shape = tuple(int(size) for size in image_shape)
    if len(example) < 2 or example.shape[1:] != shape:
        raise ValueError(f"example_images: expected (2 or more, {', '.join(map(str, shape))}), found {example.shape}")
    network = copy.deepcopy(regressor).cpu().eval().requires_grad_(False)
    network = network.to(memory_format=torch.contiguous_format)  # else the file keeps the training's strides
    _save_for_mlflow(folder, network, example[:2], unit=unit, target_names=target_names)
    bundle.save(
        folder,
        network,
        model=dict(spec),
        image_shape=shape,
        target_names=target_names,
        unit=unit,
        pixels=pixels,
        extra=json.loads(json.dumps(dict(extra or {}))),
    )
    sizes = ", ".join(map(str, shape))
    readme = README.format(
        title=title,
        targets=", ".join(target_names),
        unit=unit,
        shape=f"({sizes})",
        sizes=sizes,
        pixels=pixels,
        pt2=PT2,
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _save_for_mlflow(
    folder: Path, network: Regressor, example: np.ndarray, *, unit: str, target_names: Sequence[str]
) -> None:
    """Write the network in MLflow's pt2 flavour, with its signature."""
    with _quiet():
        from mlflow.models import ModelSignature
        from mlflow.pytorch import save_model
        from mlflow.types import Schema, TensorSpec

        def schema(*shape: int) -> Schema:
            return Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))])

        save_model(
            network,
            str(folder),
            serialization_format="pt2",
            input_example=example,
            signature=ModelSignature(inputs=schema(*example.shape[1:]), outputs=schema(len(target_names))),
            # Without the "+cpu" of a local build, which the package index does not know. Inferring them takes 13 s.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
            metadata={"unit": unit, "target_names": list(target_names)},
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's and the exporter's remarks about themselves off the terminal; their errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "mlflow")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
