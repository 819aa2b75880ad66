"""One exported program for networks that differ in their weights alone."""

import zipfile

import numpy as np
import pytest
import torch

from hpo.tracking.foreign import PT2
from hpo.worker import traced_programs
from hpo.worker.packaging import package
from models import networks, specs
from models.regressor import Regressor

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE, NAMES = (1, 16, 16), ("a", "b")
CNN = {"family": "cnn", "filters": 4, "kernel_size": 3, "dropout": 0.2}
PERIODIC = {"family": "periodic", "width": 4, "depth": 2, "stride": 2, "head": 8}
SYMMETRIES = {"flip_vertical": [0, 1], "flip_horizontal": [0, 1], "transpose": [1, 0]}
EXAMPLE = np.random.default_rng(0).random((2, *SHAPE), np.float32)


@pytest.fixture
def exports(monkeypatch):
    """The networks that torch has traced, with none kept from before."""
    traced, export = [], torch.export.export
    monkeypatch.setattr(traced_programs, "_programs", type(traced_programs._programs)())
    monkeypatch.setattr(torch.export, "export", lambda *a, **b: traced.append(a[0]) or export(*a, **b))
    return traced


def regressor(seed: int, model=CNN, **settings) -> Regressor:
    torch.manual_seed(seed)
    network = networks.build(specs.from_dict(model), SHAPE, len(NAMES)).to(memory_format=torch.channels_last)
    return Regressor(network, torch.rand(2), torch.rand(2), **{"levels": (0.0, 1.0), "contrast": 0.5} | settings)


def program(folder, regressor, example=EXAMPLE) -> dict[str, bytes]:
    """Package a network; return the content of its exported program."""
    facts = {"spec": CNN, "image_shape": SHAPE, "target_names": NAMES, "unit": "GPa"}
    package(folder, regressor, **facts, example_images=example)
    with zipfile.ZipFile(folder / PT2) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    "model, settings",
    [
        (CNN, {}),
        pytest.param(PERIODIC, {"symmetries": SYMMETRIES, "image_shape": SHAPE}, marks=pytest.mark.slow),
    ],
)
def test_a_program_with_replaced_weights_is_the_one_that_torch_exports(exports, tmp_path, model, settings):
    first, second = regressor(1, model, **settings), regressor(2, model, **settings)
    program(tmp_path / "first", first)
    replaced = program(tmp_path / "replaced", second)
    assert len(exports) == 1
    traced_programs._programs.clear()
    exported = program(tmp_path / "exported", second)
    assert len(exports) == 2 and replaced == exported
    predicted = torch.export.load(tmp_path / "replaced" / PT2).module()(torch.from_numpy(EXAMPLE))
    assert torch.allclose(predicted, second.eval()(torch.from_numpy(EXAMPLE)), rtol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"model": CNN | {"filters": 5}}, id="filters"),
        pytest.param({"levels": (0.0, 0.1)}, id="grey values"),
        pytest.param({"contrast": 0.25}, id="contrast"),
        pytest.param({"example": EXAMPLE + 1e-3}, id="example"),
    ],
)
def test_a_network_of_another_structure_is_exported_anew(exports, tmp_path, other):
    example = other.pop("example", EXAMPLE)
    program(tmp_path / "first", regressor(1))
    program(tmp_path / "second", regressor(1, **other), example)
    assert len(exports) == 2


def test_few_and_small_programs_are_kept(exports, tmp_path, monkeypatch):
    for filters in range(1, traced_programs.MOST + 2):
        program(tmp_path / str(filters), regressor(1, CNN | {"filters": filters}))
    assert len(traced_programs._programs) == traced_programs.MOST
    monkeypatch.setattr(traced_programs, "LARGEST", 1)
    program(tmp_path / "large", regressor(1, CNN | {"filters": traced_programs.MOST + 1}))
    assert len(traced_programs._programs) == traced_programs.MOST - 1
