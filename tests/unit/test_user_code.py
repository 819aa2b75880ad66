"""Code of a user's: loaded under its digest if that is trusted, stored with the model, part of the study's identity."""

import hashlib
import os
import re
import subprocess
import sys
import traceback
from types import SimpleNamespace

import numpy as np
import own_network
import pytest
import torch

from hpo import settings, study
from hpo.errors import StudyError
from hpo.operations.cluster import Cluster
from hpo.operations.compute import Compute
from hpo.scores import champion
from models import bundle, user
from models.checkpoint import load_state, save_state
from models.networks import build
from models.regressor import predict
from models.specs import SpecError, TrainingSpec, from_dict, to_dict
from models.training import Training

pytestmark = pytest.mark.usefixtures("one_thread")


def module(text, build="net:build", **options):
    """The specification of a network in a single module of this text."""
    return own_network.spec({"net.py": text}, build, **options)


def test_code_runs_only_where_its_digest_is_trusted(tmp_path):
    spec = module(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef build(*_): pass")
    with pytest.raises(user.NotTrusted, match=spec.code), user.trusting(["0" * 64]):
        build(spec, (1, 8, 8), 2)
    assert not (tmp_path / "ran").exists()
    with (
        pytest.raises(SpecError, match=r"net.py, line 2: build: expected a torch.nn.Module"),
        user.trusting([spec.code]),
    ):
        build(spec, (1, 8, 8), 2)
    assert (tmp_path / "ran").exists() and not user.is_trusted(spec.code)


def test_a_package_called_models_imports_its_own_modules_in_every_form():
    spec = own_network.spec(width=4)
    with user.trusting([spec.code]):
        network = build(spec, (3, 16, 16), 2, 1).eval()
        assert network(torch.rand(5, 3, 16, 16), torch.rand(5, 1)).shape == (5, 2)
    assert bundle.__name__ == "models.bundle" and "models.blocks" not in sys.modules


def test_changed_files_and_odd_paths_are_refused_before_anything_runs(tmp_path):
    source = {path: text.encode() for path, text in own_network.FILES.items()}
    user.write(source, tmp_path / "code")
    digest = user.digest_of(source)
    assert user.read(tmp_path / "code", digest) == source
    check = subprocess.run(["sha256sum", "--check", user.SUMS], cwd=tmp_path / "code", capture_output=True, check=False)
    assert check.returncode == 0
    (tmp_path / "code" / "models" / "blocks.py").write_text("print('changed')")
    with pytest.raises(SpecError, match=r"models/blocks.py is not the file that SHA256SUMS lists"):
        user.read(tmp_path / "code", digest)
    with pytest.raises(SpecError, match="expected the SHA-256 0000"):
        user.read(tmp_path / "code", "0" * 64)
    for path in ("../net.py", "/net.py", "a//net.py", "net.txt", "a/../net.py"):
        with pytest.raises(ValueError, match="odd path"):
            user.listed(f"{digest}  {path}\n".encode())


@pytest.mark.parametrize("change", [lambda text: text * 2, lambda text: text.replace(b"\n", b"\r\n")])
def test_a_list_of_files_in_another_form_is_refused(tmp_path, monkeypatch, change):
    source = {"net.py": b"def build(*_): pass"}
    text = change(user.sums(source))
    digest = hashlib.sha256(text).hexdigest()
    user.write(source, tmp_path / digest)
    (tmp_path / digest / user.SUMS).write_bytes(text)
    monkeypatch.setattr(user, "_folders", [tmp_path])
    with pytest.raises(SpecError, match="each file once, in order"):
        user.source_of(digest)


def test_a_pipe_in_a_downloaded_folder_blocks_nothing(tmp_path):
    os.mkfifo(tmp_path / user.SUMS)
    with pytest.raises(SpecError, match="SHA256SUMS is a folder, pipe or device"):
        user.read(tmp_path, "0" * 64)


def test_a_module_comes_before_a_folder_of_data_of_the_same_name(tmp_path):
    (tmp_path / "net.py").write_text("def build(*_): pass")
    (tmp_path / "net").mkdir()
    assert list(user.gather(tmp_path, "net:build")) == ["net.py"]
    (tmp_path / "net" / "__init__.py").write_text("")
    assert list(user.gather(tmp_path, "net:build")) == ["net/__init__.py"]


def test_an_error_in_a_file_of_another_encoding_has_a_traceback():
    digest = user.keep(
        {"net.py": "# coding: latin-1\ndef build(*_):  # é\n    raise ValueError('no')".encode("latin-1")}
    )
    with user.trusting([digest]), pytest.raises(ValueError, match="no") as caught:
        user.function(digest, "net:build")()
    assert "def build" not in (text := "".join(traceback.format_exception(caught.value))) and "raise ValueError" in text


def test_workers_on_a_cluster_are_told_which_code_is_trusted():
    chosen, array = settings.read({}), Cluster(engine="slurm")
    with user.trusting(["a" * 64]):
        assert array.request(Compute(device="cpu"), chosen, 1).words[-2:] == ("--trust-code", "a" * 64)
    assert "--trust-code" not in array.request(Compute(device="cpu"), chosen, 1).words


def part(count, *, seed):
    images = np.random.default_rng(seed).random((count, 1, 8, 8), np.float32)
    return images, np.stack([images.mean((1, 2, 3)), images[:, 0, :4].std((1, 2))], axis=1).astype(float)


def test_a_network_of_a_users_is_resumed_and_stored_to_the_bit_with_its_own_loss(tmp_path):
    spec = own_network.spec(width=4)
    settings = TrainingSpec(epochs=4, batch_size=8, loss="models.net:cubes", loss_code=spec.code)
    with user.trusting([spec.code]):
        whole, first = (
            Training(spec, settings, train=part(24, seed=1), validation=part(9, seed=2), seed=3) for _ in range(2)
        )
        list(whole.epochs())
        epochs = first.epochs()
        next(epochs), next(epochs)
        save_state(first.state(), tmp_path / "state")
        resumed = Training(
            *(spec, settings),
            train=part(24, seed=1),
            validation=part(9, seed=2),
            seed=3,
            state=load_state(tmp_path / "state"),
        )
        list(resumed.epochs())
        expected, found = whole.state().tensors, resumed.state().tensors
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        names = {"target_names": ("a", "b"), "unit": "1"}
        bundle.save(tmp_path / "model", whole.best_regressor(), model=to_dict(spec), image_shape=(1, 8, 8), **names)
        loaded, description = bundle.load(tmp_path / "model")
    assert description.model == spec == from_dict(to_dict(spec))
    images = part(9, seed=2)[0]
    assert np.array_equal(predict(loaded, images), predict(whole.best_regressor(), images))
    assert (tmp_path / "model" / "source" / "models" / "net.py").read_text() == own_network.FILES["models/net.py"]
    with pytest.raises(user.NotTrusted):
        bundle.load(tmp_path / "model")


def test_another_file_of_the_package_is_another_study_and_options_are_searched(tmp_path):
    file = own_network.write(tmp_path, name="twice")
    first = study.load(str(file))
    assert [point["width"] for point in first.grid()] == [2, 4]
    assert first.specifications({"width": 2})[0].options == {"width": 2}
    (digest,) = first.code
    assert user.digest_of(first.sources[digest]) == digest == first.model["code"]
    (tmp_path / "models" / "blocks.py").write_text(own_network.FILES["models/blocks.py"] + "\n# more\n")
    assert study.load(str(file)).code != [digest]
    assert (
        study.load(str(file), ["training.loss=models.net:cubes"]).training["loss_code"] == study.load(str(file)).code[0]
    )
    for override, message in (
        ("model.build=nothing.there:build", "expected a module nothing.py or a package nothing/"),
        ("model.code=abc", "remove the key"),
        ("training.loss=mea", "did you mean"),
        ("model.build=models", "'MODULE:FUNCTION'"),
        (f"model.build={tmp_path}/models/net:build", "'MODULE:FUNCTION'"),
        ("model.build=../net:build", "'MODULE:FUNCTION'"),
    ):
        with pytest.raises(StudyError, match=message):
            study.load(str(file), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(*_):\n    return None + 1", r"^net.py, line 2: TypeError: unsupported"),
        ("\nimport torch x", r"^net.py, line 2: SyntaxError"),
        ("import nothing_of_that_name", r"^net.py, line 1: ModuleNotFoundError: No module named 'nothing_of"),
    ],
)
def test_an_error_in_code_of_a_users_is_told_with_its_own_line(text, message):
    spec = module(text)
    with pytest.raises((TypeError, SyntaxError, ModuleNotFoundError)) as caught, user.trusting([spec.code]):
        build(spec, (1, 8, 8), 2)
    assert re.search(message, user.fault(caught.value))


LINEAR = """
from torch import nn
def build(options, image_shape, n_targets, n_scalars):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, {width}))
"""


def test_outputs_of_a_wrong_shape_and_options_that_nothing_reads_are_refused():
    wide, strange = module(LINEAR.format(width=5)), module(LINEAR.format(width=2), learning_rat=0.1)
    with user.trusting([wide.code, strange.code]):
        with pytest.raises(SpecError, match=r"net.py, line 3: build: expected a network with outputs \(batch, 2\)"):
            build(wide, (1, 8, 8), 2)(torch.rand(3, 1, 8, 8))
        with pytest.raises(SpecError, match=r"'learning_rat' is not used.*did you mean 'learning_rate'"):
            build(strange, (1, 8, 8), 2)
        with pytest.raises(SpecError, match="expected a function nn that net defines"):
            user.function(wide.code, "net:nn")


FAILS_LATER = """
import torch
from torch import nn
class Net(nn.Linear):
    def forward(self, images):
        if not self.training and images.unique().numel() == 2:
            raise RuntimeError("black and white")
        return super().forward(images.flatten(1))
def build(options, image_shape, n_targets, n_scalars):
    return Net(64, n_targets)
"""


def test_a_model_whose_own_code_fails_is_unsound_and_ends_no_election(tmp_path, monkeypatch):
    spec, settings = module(FAILS_LATER), TrainingSpec(epochs=1, batch_size=8)
    names = {"target_names": ("a", "b"), "unit": "1"}

    def download(*_, folder, **__):
        bundle.save(folder, run.best_regressor(), model=to_dict(spec), image_shape=(1, 8, 8), **names)

    monkeypatch.setattr(champion.registry, "download_model", download)
    queue = SimpleNamespace(by_run=lambda _: SimpleNamespace(result=SimpleNamespace(files={})))
    version = SimpleNamespace(run_id="", model_id="")
    with user.trusting([spec.code]):
        run = Training(spec, settings, train=part(24, seed=1), validation=part(9, seed=2), seed=3)
        list(run.epochs())
        fault = champion.unsound(queue, None, "model", version)
    assert fault == "its own code fails: net.py, line 7: RuntimeError: black and white"
    assert champion.unsound(queue, None, "model", version).startswith(champion.NOT_CHECKED)
