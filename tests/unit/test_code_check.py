"""What is checked of a user's code before anything is planned, and what a trainer runs of what it is asked for."""

import re
import shutil
import threading

import own_network
import pytest
import records
from places import ROOT

from data_pipeline import dataset, npz
from hpo.errors import ModelError
from hpo.operations.predict import predict
from hpo.worker import code_check, protocol, train_trial, trainer, user_code
from models import specs, user

TUTORIAL = ROOT / "docs" / "tutorial" / "own-network.md"
WIDTH = {"width": 2}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def file(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "data.npz"
    npz.save_npz(dataset.load(data), path)
    return path


def trial(files, *, options=WIDTH, **training):
    """The specification of a trial of a package's network."""
    model = specs.to_dict(own_network.spec(files, **options))
    settings = specs.training_to_dict(specs.training_from_dict({"epochs": 2, "batch_size": 8, **training}))
    return records.spec(model=model, training=settings, point=dict(options), parameters=0)


def checked(files, data, folder, **training):
    spec = trial(files, **training)
    with user.trusting([spec.model["code"]]):
        request = protocol.Check(specs=(spec,), data=data, folder=folder, device="cpu")
        return code_check.check(request, lambda message: None, threading.Event())


def changed(old, new):
    """The package with another line in its network."""
    assert old in own_network.FILES["models/net.py"]
    return own_network.FILES | {"models/net.py": own_network.FILES["models/net.py"].replace(old, new)}


def test_a_good_network_passes_and_learns_the_same_each_time(file, tmp_path):
    first, second = (checked(own_network.FILES, file, tmp_path / name) for name in "ab")
    assert isinstance(first, protocol.Checked) and first == second


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_100", "regnety_002"])
def test_the_networks_of_timm_that_the_tutorial_names_pass(file, tmp_path, name):
    (code,) = re.findall(r"```python\n(import timm.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert f'"{name}"' in TUTORIAL.read_text()
    answer = checked({"models/net.py": code}, file, tmp_path, options={"name": name})
    assert isinstance(answer, protocol.Checked), answer


LAST = "return self.last(hidden)"
FAULTS = {
    "shape": (LAST, "return self.last(hidden)[:, :1]", r"line 2[0-9]: build: expected a network with outputs"),
    "type": (LAST, "return self.last(hidden).double()", r"outputs: expected finite numbers of float32, found float64"),
    "infinite": (LAST, "return self.last(hidden) / 0", r"outputs: expected finite numbers of float32, found other"),
    "no gradient": (
        LAST,
        "return self.last(hidden.detach())",
        r"the gradient of .*first.0.weight: .* found none",
    ),
    "state": (
        LAST,
        "self.calls = getattr(self, 'calls', 0) + self.training; return self.last(hidden) * self.calls",
        r"goes on from a checkpoint: expected the same numbers",
    ),
    "export": (
        LAST,
        "return self.last(hidden) if hidden.sum() > 0 else self.last(2 * hidden)",
        "net.py, line 2[0-9]: ",
    ),
    "error": (LAST, "return self.last(hidden, 1)", r"^models/net.py, line 21: TypeError: .* [(]at width=2[)]$"),
    "loss": ("** 3", "** 3).mean(", r"training.loss = 'models.net:cubes': expected a term for each target"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_network_that_breaks_the_contract_is_refused_in_words(file, tmp_path, name):
    old, new, message = FAULTS[name]
    if name == "loss":
        files = changed("return (outputs - targets).abs() ** 3", "return ((outputs - targets).abs() ** 3).mean()")
        code = own_network.spec(files).code
        answer = checked(files, file, tmp_path, loss="models.net:cubes", loss_code=code)
    else:
        answer = checked(changed(old, new), file, tmp_path)
    assert isinstance(answer, protocol.Failed)
    assert re.search(message, answer.reason), answer.reason


def test_random_numbers_from_elsewhere_differ_from_one_check_to_the_next(file, tmp_path):
    files = changed("self.first = ", "import random; self.factor = random.random(); self.first = ")
    files = files | {"models/net.py": files["models/net.py"].replace(LAST, "return self.last(hidden) * self.factor")}
    answers = [checked(files, file, tmp_path / name) for name in "ab"]
    assert not any(isinstance(answer, protocol.Checked) for answer in answers) or answers[0] != answers[1]


def request_of(spec, data, folder):
    return protocol.Train(
        spec=spec, data=data, checkpoint=None, start=None, folder=folder, cache=folder, device="cpu",
        checkpoint_interval=60.0,
    )  # fmt: skip


def test_a_trainer_runs_no_code_but_that_of_its_command_line(file, tmp_path):
    mark = f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n"
    evil, good = trial(own_network.FILES | {"models/net.py": mark}), trial(own_network.FILES)
    with user.trusting([good.model["code"]]):
        for spec in (evil, trial(own_network.FILES, loss="models.net:cubes", loss_code=evil.model["code"])):
            with pytest.raises(user.NotTrusted) as caught:
                train_trial.train(request_of(spec, file, tmp_path), lambda message: None, threading.Event())
            assert evil.model["code"] in trainer.failure(caught.value).reason
        ended = train_trial.train(request_of(good, file, tmp_path / "good"), lambda message: None, threading.Event())
    assert ended.parameters == 51 and "source/SHA256SUMS" in {path.partition("/")[2] for path in ended.files}
    image = tmp_path / "image.png"
    image.touch()
    with pytest.raises(
        ModelError, match=f"source: this is code of the network's author.* --trust-code {good.model['code']}"
    ):
        predict(ended.folder, [image])
    other, spec_file = {"models/net.py": mark.encode()}, ended.folder / "spec.json"
    shutil.rmtree(ended.folder / "source")
    user.write(other, ended.folder / "source")
    with pytest.raises(ModelError, match="expected the SHA-256"):
        predict(ended.folder, [image], trust_code=[good.model["code"]])
    spec_file.write_text(spec_file.read_text().replace(good.model["code"], user.digest_of(other)))
    with pytest.raises(ModelError, match="not trusted here"):
        predict(ended.folder, [image], trust_code=[good.model["code"]])
    assert not (tmp_path / "mark").exists()


class Store:
    """An artifact store that counts what is asked of it."""

    def __init__(self, files):
        self.files, self.asked = files, []

    def download_artifact(self, run_id, path, folder):
        self.asked.append(path)
        target = folder / path.rpartition("/")[2]
        target.write_bytes(self.files[path])
        return target


def test_files_of_a_study_are_fetched_once_and_never_believed_by_their_name(tmp_path):
    source = {path: text.encode() for path, text in own_network.FILES.items()}
    digest = user.digest_of(source)
    store = Store(
        {f"code/{digest}/{path}": content for path, content in {**source, user.SUMS: user.sums(source)}.items()}
    )
    folder = user_code.fetch(tmp_path, store, "run", digest)
    assert user.read(folder, digest) == source and len(store.asked) == len(source) + 1
    assert user_code.fetch(tmp_path, store, "run", digest) == folder and len(store.asked) == len(source) + 1
    (folder / "models" / "net.py").write_text("changed here")
    assert user.read(user_code.fetch(tmp_path, store, "run", digest), digest) == source
    assert store.asked[-1] == f"code/{digest}/models/net.py"
    store.files[f"code/{digest}/models/net.py"] = b"changed there"
    (folder / "models" / "net.py").unlink()
    with pytest.raises(ModelError, match=r"models/net.py of the run run: expected SHA-256"):
        user_code.fetch(tmp_path, store, "run", digest)
    assert not (folder / "models" / "net.py").exists()
