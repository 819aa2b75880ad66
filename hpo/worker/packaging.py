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

LOADER = "hpo_named_inputs"  # module in the folder `code`, for models with inputs: pyfunc's own passes images only
LOADER_TEXT = """\
# Lets mlflow.pyfunc call the exported program data/model.pt2 with named arrays: images, and one for each input.
import json
import pathlib

import mlflow.pytorch
import numpy
import torch


def _load_pyfunc(path):
    return Model(pathlib.Path(path).parent)


class Model:
    def __init__(self, folder):
        self.model = mlflow.pytorch.load_model(str(folder))
        self.names = list(json.loads((folder / "spec.json").read_text(encoding="utf-8"))["inputs"])

    def predict(self, data, params=None):
        columns = [numpy.asarray(data[name], numpy.float32).reshape(-1) for name in self.names]
        images = torch.from_numpy(numpy.asarray(data["images"], numpy.float32))
        with torch.no_grad():
            return self.model(images, torch.from_numpy(numpy.column_stack(columns))).numpy()
"""

README = """\
# Properties from microstructure images

Predicts {targets} in {unit} from images of shape {shape} (channels, height, width), {pixels}{inputs}.
Images on another scale, such as 0..255, are refused with an error.
{in_unit}
With PyTorch alone (`torch.export.load` can run code: only for files you trust; SHA256SUMS tells whether they changed):

```python
import torch
model = torch.export.load("{pt2}").module()
images = torch.rand(3, {sizes})  # yours: torch.float32, 0..1
{torch_inputs}predictions = model({torch_arguments})
print(predictions)  # {unit}; columns: {targets}
```

With MLflow alone:

```python
import mlflow.pyfunc, numpy
model = mlflow.pyfunc.load_model(".")
images = numpy.random.rand(3, {sizes}).astype(numpy.float32)  # yours: numpy.float32, 0..1
{mlflow_inputs}predictions = model.predict({mlflow_arguments})
print(predictions)  # {unit}; columns: {targets}
```

`hpo predict` reads only weights.safetensors and spec.json, which hold no code{code}.
"""

CODE = """, and the code of the network's author
in the folder source/, which it runs. Read that. If you trust it, add `--trust-code {digest}`"""


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
    in_unit: str = "",
    extra: Mapping[str, Any] | None = None,
    example_inputs: np.ndarray | None = None,
) -> None:
    """Write the model's folder, which must not exist or be empty. The regressor itself stays as it is.

    `spec` is the model specification's dict form and `extra` what spec.json tells besides (digests, scores).
    `pixels` says how the pixels of a file become numbers in 0..1, `in_unit` how good the targets with a transform are
    without it.
    `example_images` (at least 2, channels, height, width), 0..1: with a single one the batch size would be frozen.
    `example_inputs` (as many, m) are those beside them, if the regressor takes any.
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
    inputs = None if example_inputs is None else np.ascontiguousarray(example_inputs[:2], dtype=np.float32)
    _save_for_mlflow(folder, network, example[:2], inputs, unit=unit, target_names=target_names)
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
        targets=", ".join(target_names),
        unit=unit,
        shape=f"({sizes})",
        sizes=sizes,
        pixels=pixels,
        in_unit=f"\n`hpo predict` undoes the transform. Then, on the validation split: {in_unit}.\n" if in_unit else "",
        pt2=PT2,
        code=CODE.format(digest=spec["code"]) if "code" in spec else "",
        **_readme_inputs(network),
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _readme_inputs(network: Regressor) -> dict[str, str]:
    """Return what the README says of the numbers beside the images; its examples take the middle of their ranges."""
    if not network.input_names:
        none = {"inputs": "", "torch_inputs": "", "mlflow_inputs": ""}
        return none | {"torch_arguments": "images", "mlflow_arguments": "images"}
    ranges = dict(zip(network.input_names, network.ranges or (), strict=True))
    middle = [f"{(low + high) / 2:g}" for low, high in ranges.values()]
    columns = ", ".join(f"{name} ({low:g} to {high:g} in training)" for name, (low, high) in ranges.items())
    arrays = "".join(
        f"    {json.dumps(name, ensure_ascii=False)}: numpy.full(3, {number}, numpy.float32),\n"
        for name, number in zip(ranges, middle, strict=True)
    )
    return {
        "inputs": f",\nand from a number for each of {columns}. Numbers far outside are refused",
        "torch_inputs": f"inputs = torch.tensor([[{', '.join(middle)}]] * 3)  # columns: {', '.join(ranges)}\n",
        "torch_arguments": "images, inputs",
        "mlflow_inputs": f"inputs = {{  # an array (images,) each\n{arrays}}}\n",
        "mlflow_arguments": '{"images": images} | inputs',
    }


def _save_for_mlflow(
    folder: Path,
    network: Regressor,
    example: np.ndarray,
    inputs: np.ndarray | None,
    *,
    unit: str,
    target_names: Sequence[str],
) -> None:
    """Write the network in MLflow's pt2 flavour, with its signature.

    That of a network with inputs names an array for the images and one for each input.
    """
    from hpo.worker.traced_programs import export_once

    with _quiet(), export_once():
        from mlflow import pyfunc
        from mlflow.models import Model, ModelSignature
        from mlflow.pytorch import save_model
        from mlflow.types import ColSpec, Schema, TensorSpec

        def tensor(*shape: int, name: str | None = None) -> TensorSpec:
            return TensorSpec(np.dtype(np.float32), (-1, *shape), name)

        images = tensor(*example.shape[1:], name=None if inputs is None else "images")
        both: list[ColSpec | TensorSpec] = (
            [images] if inputs is None else [images, tensor(len(network.input_names), name="inputs")]
        )
        outputs = Schema([tensor(len(target_names))])
        model = Model()
        save_model(
            network,
            str(folder),
            serialization_format="pt2",
            mlflow_model=model,
            input_example=example if inputs is None else [example, inputs],
            signature=ModelSignature(inputs=Schema(both), outputs=outputs),
            # Without the "+cpu" of a local build, which the package index does not know. Inferring them takes 13 s.
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
            metadata={"unit": unit, "target_names": list(target_names)},
        )
        if inputs is None:
            return
        (folder / "code").mkdir()
        (folder / "code" / f"{LOADER}.py").write_text(LOADER_TEXT, encoding="utf-8")
        environments = {"conda_env": "conda.yaml", "python_env": "python_env.yaml"}
        pyfunc.add_to_model(model, loader_module=LOADER, data="data", code="code", **environments)
        named = [tensor(name=name) for name in network.input_names]
        model.signature = ModelSignature(inputs=Schema([images, *named]), outputs=outputs)
        model.save(str(folder / "MLmodel"))


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
