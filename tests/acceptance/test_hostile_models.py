"""A model's folder, a checkpoint or a registry that means harm: nothing in it is run, and nothing leaves its place."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import watched
from mlflow.exceptions import MlflowException

from hpo.errors import ModelError
from hpo.tracking import registry
from hpo.tracking.client import Tracker

MEMORY = 2**30  # bytes; torch alone takes half of it

# --- a server that speaks MLflow's protocol, as far as a download goes, and answers what it likes ---


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> content) as the one model; `listing` (folder -> entries) replaces the true answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.listing: Callable[[str], list[dict[str, Any]] | None] = lambda folder: None
        self.location = "mlflow-artifacts:/model"
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"

    def entries(self, folder: str) -> list[dict[str, Any]]:
        if (answer := self.listing(folder)) is not None:
            return answer
        below = [path.removeprefix(f"{folder}/") for path in self.files if not folder or path.startswith(f"{folder}/")]
        return [{"path": name, "is_dir": name not in below} for name in sorted({path.split("/")[0] for path in below})]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        root = "/api/2.0/mlflow-artifacts/artifacts"
        if asked.path.startswith("/api/2.0/mlflow/logged-models/"):
            info = {"model_id": "m-1", "experiment_id": "0", "name": "m", "artifact_uri": self.server.location}
            self.answer(json.dumps({"model": {"info": info, "data": {}}}).encode())
        elif asked.path == root:
            folder = parse_qs(asked.query)["path"][0].removeprefix("model").lstrip("/")
            self.answer(json.dumps({"files": self.server.entries(folder)}).encode())
        else:
            self.answer(self.server.files.get(unquote(asked.path).removeprefix(f"{root}/model/"), b"harm"))

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def started() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(started: Server) -> Server:
    started.files = {"MLmodel": b"text", "data/model.pt2": b"weights"}
    started.listing, started.location = lambda folder: None, "mlflow-artifacts:/model"
    return started


def sums(files: dict[str, bytes]) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


def download(server: Server, folder: Path, expected: dict[str, str]) -> Path:
    return registry.download_model(Tracker(server.uri), model_id="m-1", folder=folder, expected_sha256=expected)


# --- nothing is run ---

VICTIM = r"""
import contextlib, io, pickle, threading, zipfile
from pathlib import Path

seen, quiet = [], True
def hook(event, arguments):
    if quiet:
        return
    text = repr(arguments[:1]) if event == "marshal.loads" else ""
    planted = event == "exec" and "planted" in arguments[0].co_consts or "planted" in text
    if event in ("planted", "pickle.find_class", "os.system", "subprocess.Popen") or planted:
        seen.append(event)
sys.addaudithook(hook)

import numpy as np
import torch
from PIL import Image

from data_pipeline.components import COMPONENTS
from data_pipeline.dataset import Dataset
from data_pipeline.description import Description
from data_pipeline.npz import load_npz, save_npz
from hpo.cli.main import main
from hpo.files import sha256_of_files
from hpo.tracking.foreign import PT2
from hpo.worker.packaging import package
from hpo.tracking import registry
from hpo.tracking.client import Tracker
from hpo.worker import protocol, scoring
from models import bundle
from models.regressor import Regressor
from models.networks import build
from models.specs import CnnSpec, TrainingSpec, to_dict
from models.checkpoint import load_state, save_state
from models.training import Training

work, uri = Path(sys.argv[1]), sys.argv[2]
random, spec, shape = np.random.default_rng(0), CnnSpec(filters=2, kernel_size=3, dropout=0.2), (1, 16, 16)
images, targets = random.random((20, *shape)).astype(np.float32), random.random((20, 9))
good = work / "good"
network = Regressor(build(spec, shape, 9), torch.zeros(9), torch.ones(9))
package(good, network, spec=to_dict(spec), image_shape=shape, target_names=COMPONENTS, unit="GPa",
        example_images=images[:2])
names = tuple(f"{row}_x.png" for row in range(20))
save_npz(Dataset(images=images, targets=targets, target_names=COMPONENTS, names=names,
                 description=Description(name="x", unit="GPa"), symmetries={}), work / "set.npz")
save_state(Training(spec, TrainingSpec(epochs=1), train=(images, targets), validation=(images, targets)).state(),
           work / "state.safetensors")
Image.new("L", (16, 16)).save(work / "0_x.png")

# What is planted: it tells the hook when it is run.
class Canary:
    def __reduce__(self):
        return eval, ("__import__('sys').audit('planted')",)

def torch_zip():
    content = io.BytesIO()
    torch.save(Canary(), content)
    return content.getvalue()

def pt2():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as new, zipfile.ZipFile(good / PT2) as old:
        for name in old.namelist():
            new.writestr(name, torch_zip() if "sample_inputs" in name else old.read(name))
    return content.getvalue()

def code_zip():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as new:
        new.writestr("__main__.py", CODE)
    return content.getvalue()

CODE = "import sys; sys.audit('planted')"
plants = {"pickle": pickle.dumps(Canary()), "torch zip": torch_zip(), "pt2": pt2(), "code zip": code_zip()}

def predict(folder, image=work / "0_x.png"):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["predict", str(folder), str(image)])
    return f"{code} {said.getvalue()}"

def score(folder, data=work / "set.npz"):
    request = protocol.Score(folder=folder, data=data, predictions=work / "predictions.csv", errors=work / "errors.npz")
    return sorted(vars(scoring.score(request, lambda message: None, threading.Event())))

def fetch(folder, expected):
    return str(registry.download_model(Tracker(uri), model_id="m-1", folder=folder, expected_sha256=expected))

def outcome(action, *arguments):
    global quiet
    seen.clear()
    quiet = False
    try:
        said = str(action(*arguments))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        quiet = True
    return [said, list(seen)]

def copy(name, changes):
    folder = work / name
    for path in sorted(path for path in good.rglob("*") if path.is_file()):
        changes = {path.relative_to(good).as_posix(): path.read_bytes()} | changes
    for path, content in changes.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder

answer = {}
predict(good), score(good), load_state(work / "state.safetensors")  # all that is imported late is imported now
served = json.loads(Path(sys.argv[3]).read_text())
outcome(fetch, work / "warm", served)
for kind, content in plants.items():
    case = kind.replace(" ", "-")
    extras = dict.fromkeys((PT2, "data/pickle_module_info.txt", "model.pkl", "python_model.pkl", "a/b.npy"), content)
    extras |= dict.fromkeys(("conda.yaml", "code/__init__.py", "torch.py", "sitecustomize.py"), CODE.encode())
    beside = copy(f"beside-{case}", extras)
    weights = copy(f"weights-{case}", {bundle.WEIGHTS: content})
    told = copy(f"spec-{case}", {bundle.SPEC: content})
    (work / f"file-{case}.png").write_bytes(content)
    file = work / f"file-{case}.png"
    answer |= {
        f"{kind} beside the weights, predict": outcome(predict, beside),
        f"{kind} beside the weights, load": outcome(lambda: bundle.load(beside)[1].unit),
        f"{kind} beside the weights, score": outcome(score, beside),
        f"{kind} as the weights, predict": outcome(predict, weights),
        f"{kind} as the weights, load": outcome(bundle.load, weights),
        f"{kind} as the weights, score": outcome(score, weights),
        f"{kind} as spec.json, predict": outcome(predict, told),
        f"{kind} as the image, predict": outcome(predict, good, file),
        f"{kind} as the checkpoint, load_state": outcome(load_state, file),
        f"{kind} as the data set, score": outcome(score, good, file),
    }
import os, struct, zlib

def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

def png(before=b"", pixels=16 * 17):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0))
    parts = header, before, chunk(b"IDAT", zlib.compress(bytes(pixels)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")

for case, content in {
    "whole": png(),
    "no PNG": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n",
    "too few pixels": png(pixels=17),
    "a text of 64 MB": png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26)))),
    "100 MB": png(chunk(b"prVt", bytes(10**8))),
}.items():
    (work / "odd.png").write_bytes(content)
    answer[f"image: {case}"] = outcome(predict, good, work / "odd.png")
os.mkfifo(work / "pipe.png")
(work / "device.png").symlink_to("/dev/zero")
answer["image: a pipe"] = outcome(predict, good, work / "pipe.png")
answer["image: a device"] = outcome(predict, good, work / "device.png")
answer["everything from a registry"] = outcome(fetch, work / "fetched", served)
answer["controls"] = {
    "pickle": outcome(pickle.loads, plants["pickle"])[1],
    "torch zip": outcome(lambda: torch.load(io.BytesIO(plants["torch zip"]), weights_only=False))[1],
    "pt2": outcome(lambda: torch.export.load(io.BytesIO(plants["pt2"])))[1],
    "code zip": outcome(lambda: __import__("runpy").run_path(str(work / "file-code-zip.png")))[1],
}
"""

PLANTS = ("pickle", "torch zip", "pt2", "code zip")
PLACES = {  # -> what is said
    "beside the weights, predict": r"^0 image,C11 \[GPa\]",
    "beside the weights, load": "^GPa$",
    "beside the weights, score": "'model', 'predictors'",
    "as the weights, predict": r"^1 hpo: .*weights\.safetensors: not a readable safetensors file",
    "as the weights, load": r"^SpecError: .*weights\.safetensors: not a readable safetensors file",
    "as the weights, score": r"^SpecError: .*weights\.safetensors: not a readable safetensors file",
    "as spec.json, predict": r"^1 hpo: .*spec\.json: not readable as JSON",
    "as the image, predict": r"^1 hpo: .*\.png: cannot be read as an image",
    "as the checkpoint, load_state": "^SpecError: .*not a readable training state",
    "as the data set, score": "^DatasetError: .*expected a data set written by save_npz",
}


IMAGES = {
    "whole": r"^0 image,C11 \[GPa\]",
    "no PNG": r"^1 hpo: .*odd\.png: cannot be read as an image \(cannot identify",
    "too few pixels": r"^1 hpo: .*odd\.png: is truncated or damaged \(it has fewer pixels than its header says\)",
    "a text of 64 MB": r"^1 hpo: .*odd\.png: cannot be read as an image \(Decompressed data too large",
    "100 MB": r"^1 hpo: .*odd\.png: expected at most 32 MiB, found 95 MiB",
    "a pipe": r"^1 hpo: .*pipe\.png: expected a PNG file, found a folder, pipe or device",
    "a device": r"^1 hpo: .*device\.png: expected a PNG file, found a folder, pipe or device",
}


@pytest.fixture(scope="module")
def outcomes(started: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each place said and which events the process saw; one process for all, as torch takes seconds to start."""
    import pickle

    work = tmp_path_factory.mktemp("victim")
    started.files = {"model.pkl": pickle.dumps(Planted()), "data/model.pt2": pickle.dumps(Planted()), "MLmodel": b"{}"}
    started.listing, started.location = lambda folder: None, "mlflow-artifacts:/model"
    (work / "sums.json").write_text(json.dumps(sums(started.files)))
    answer = watched.run(VICTIM, work, started.uri, work / "sums.json", cpu=100).answer
    assert isinstance(answer, dict)
    return answer


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("__import__('sys').audit('planted')",)


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_would_run_if_it_were_loaded(outcomes, plant):
    events = outcomes["controls"][plant]
    assert "planted" in events
    assert plant == "code zip" or "pickle.find_class" in events


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("plant", PLANTS)
def test_nothing_is_unpickled_and_no_code_is_run_with(outcomes, plant, place):
    said, events = outcomes[f"{plant} {place}"]
    with pytest.raises(ValueError, match=PLACES[place]):
        raise ValueError(said)
    assert events == []


@pytest.mark.parametrize("case", IMAGES)
def test_an_odd_image_is_not_predicted_but_explained(outcomes, case):
    said, events = outcomes[f"image: {case}"]
    with pytest.raises(ValueError, match=IMAGES[case]):
        raise ValueError(said)
    assert events == []


def test_a_download_unpickles_nothing_though_every_file_is_a_pickle(outcomes):
    said, events = outcomes["everything from a registry"]
    assert said.endswith("fetched")
    assert events == []


# --- specifications and weights that ask for much ---

DEMANDS = r"""
import struct
from pathlib import Path
import torch
from models import bundle
from models.regressor import Regressor
from models.networks import build
from models.specs import CnnSpec, SpecError, to_dict

work, answer = Path(sys.argv[1]), {}
model, names = to_dict(CnnSpec(filters=2, kernel_size=3, dropout=0.2)), ["C11", "C22"]
network = Regressor(build(CnnSpec(filters=2, kernel_size=3, dropout=0.2), (1, 8, 8), 2), torch.zeros(2), torch.ones(2))
bundle.save(work, network, model=model, image_shape=(1, 8, 8), target_names=names, unit="GPa")
spec, weights = json.loads((work / bundle.SPEC).read_text()), (work / bundle.WEIGHTS).read_bytes()

def judge(case):
    try:
        bundle.load(work)
        answer[case] = "good"
    except SpecError as error:
        answer[case] = str(error)
    except Exception as error:
        answer[case] = f"{type(error).__name__}, not SpecError: {error}"[:1000]

judge("unchanged")
def nested(depth):
    return '{"format": 1, "target_names": ["C"], "unit": "GPa", "image_shape": [1, 8, 8], "model": {"family": "cnn", ' \
        '"kernel_size": 3, "dropout": 0, "filters": ' + "[" * depth + "]" * depth + "}}"

texts = {
    "sides": json.dumps(spec | {"image_shape": [1, 10**9, 10**9]}),
    "sides of 65536": json.dumps(spec | {"image_shape": [1, 65536, 65536]}),
    "channels": json.dumps(spec | {"image_shape": [65536, 65536, 65536]}),
    "a side of 4,000 digits": json.dumps(spec | {"image_shape": [1, 8, 10**4000]}),
    "filters": json.dumps(spec | {"model": model | {"filters": 1e9}}),
    "whole filters": json.dumps(spec | {"model": model | {"filters": 10**9}}),
    "1,024 filters": json.dumps(spec | {"model": model | {"filters": 1024, "kernel_size": 31}}),
    "targets": json.dumps(spec | {"target_names": [str(number) for number in range(100_000)]}),
    "a target twice": json.dumps(spec | {"target_names": ["C11", "C11"]}),
    "half a character": json.dumps(spec | {"target_names": ["C11", "\ud800"]}),
    "no unit": json.dumps({key: value for key, value in spec.items() if key != "unit"}),
    "brackets": "[" * 500_000,
    "another encoding": json.dumps(spec).encode("utf-16").decode("latin-1"),
}
for case, text in texts.items():
    (work / bundle.SPEC).write_text(text)
    judge(case)
for depth in range(900, 1000):  # at some of these JSON can still be read, but its value no longer be shown
    (work / bundle.SPEC).write_text(nested(depth))
    judge(f"depth {depth}")
with (work / bundle.SPEC).open("wb") as file:
    file.truncate(2**30)
judge("1 GiB of spec")
(work / bundle.SPEC).write_text(json.dumps(spec))

def header(length, content, size=None):
    (work / bundle.WEIGHTS).write_bytes(struct.pack("<Q", length) + content)
    with (work / bundle.WEIGHTS).open("rb+") as file:
        file.truncate(size)

def tensor(shape, end):
    content = json.dumps({"target_mean": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(content), content

empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
many = ("{" + ",".join(f'"{number}":{empty}' for number in range(1_300_000)) + "}").encode()
for case, arguments in {
    "header beyond the file": (2**62, b"{}"),
    "header of 1 GiB": (2**30, b"{}", 2**31),
    "header with a million tensors": (len(many), many),
    "tensor beyond the file": tensor([2**28], 2**30),
    "tensor larger than memory": tensor([2**62, 2**62], 4),
    "tensor of 2 GiB": (*tensor([2**29], 2**31), 8 + len(tensor([2**29], 2**31)[1]) + 2**31),
    "brackets in the header": (2**20, b"[" * 2**20),
}.items():
    header(*arguments) if len(arguments) == 3 else header(*arguments, 8 + len(arguments[1]))
    judge(case)
(work / bundle.WEIGHTS).write_bytes(weights)
judge("unchanged again")
"""

ANSWERS = {
    "unchanged": "^good$",
    "sides": r'"image_shape": expected three whole numbers from 1 to 65536, found \[1, 1000000000',
    "sides of 65536": r"weights\.safetensors: its 1 tensors do not fit spec\.json",
    "channels": r"weights\.safetensors: its 2 tensors do not fit spec\.json",
    "a side of 4,000 digits": '"image_shape": expected three whole numbers from 1 to 65536',
    "filters": r"filters = 1000000000\.0; expected a whole number, at least 1 and at most 1024",
    "whole filters": "filters = 1000000000; expected a whole number, at least 1 and at most 1024",
    "1,024 filters": r"weights\.safetensors: its 5 tensors do not fit spec\.json",
    "targets": r"weights\.safetensors: its 4 tensors do not fit spec\.json",
    "a target twice": r"\"target_names\": expected a list of names, each once, found \['C11', 'C11'\]",
    "half a character": '"target_names": expected a list of names',
    "no unit": '"unit": expected a text such as "GPa", found None',
    "brackets": r"spec\.json: nested too deeply",
    "another encoding": r"spec\.json: not readable as JSON",
    "1 GiB of spec": r"spec\.json: not readable as JSON \(it has more than 1048576 bytes\)",
    "header beyond the file": "expected a header of at most 1048576 bytes, found 4611686018427387904",
    "header of 1 GiB": "expected a header of at most 1048576 bytes, found 1073741824",
    "header with a million tensors": "expected a header of at most 1048576 bytes, found [0-9]{8}",
    "tensor beyond the file": "not a readable safetensors file",
    "tensor larger than memory": "not a readable safetensors file",
    "tensor of 2 GiB": "its [0-9]+ tensors do not fit spec",
    "brackets in the header": "not a readable safetensors file",
    "unchanged again": "^good$",
}


@pytest.fixture(scope="module")
def demands(tmp_path_factory: pytest.TempPathFactory) -> watched.Watched:
    return watched.run(DEMANDS, tmp_path_factory.mktemp("demanding"), cpu=60)


@pytest.mark.parametrize("case", ANSWERS)
def test_a_model_that_asks_for_much_gets_one_clear_error(demands, case):
    with pytest.raises(ValueError, match=ANSWERS[case]):
        raise ValueError(demands.answer[case])
    assert len(demands.answer[case]) < 600


def test_a_specification_of_any_depth_gets_one_clear_error(demands):
    found = {demands.answer[f"depth {depth}"].partition(": ")[2][:20] for depth in range(900, 1000)}
    assert found == {"model (cnn): filters", "nested too deeply fo"}


def test_no_model_that_asks_for_much_gets_it(demands):
    assert demands.peak < MEMORY, f"{demands.peak / 2**20:.0f} MiB"


# --- nothing leaves the target folder ---


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ODD = (
    "../x",
    "../../x",
    "/tmp/hpo-x",
    "data/../../x",
    "..\\x",
    "C:\\x",
    "C:x",
    "x\0y",
    "%2e%2e/x",
    "file:///tmp/x",
    "",
)


@pytest.mark.parametrize("path", ODD)
def test_a_listing_with_an_odd_path_leaves_nothing_anywhere(server, tmp_path, path):
    expected = sums(server.files)
    truth = server.entries("")
    server.listing = lambda folder: [*truth, {"path": path, "is_dir": False}] if folder == "" else None
    with pytest.raises((ModelError, MlflowException)):
        download(server, tmp_path / "a" / "model", expected)
    assert tree(tmp_path) == {}
    server.listing = lambda folder: [*truth, {"path": path, "is_dir": True}] if folder == "" else None
    with suppress(ModelError, MlflowException):  # an empty folder is no file: the model may well arrive
        download(server, tmp_path / "a" / "model", expected)
    assert tree(tmp_path).keys() <= {f"a/model/{path}" for path in [*expected, registry.SUMS]}


@pytest.mark.parametrize("path", ["x\0y", "x\ny", "C:x", "C:/x", "x/.", "a\\..\\x"])
def test_an_odd_path_recorded_with_a_model_is_refused_before_anything_is_asked(server, tmp_path, path):
    server.files[path] = b"harm"
    with pytest.raises(ModelError, match="has the odd path"):
        download(server, tmp_path / "model", sums(server.files))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("path", ["../../x", "/tmp/hpo-x", "x"])
def test_a_file_that_turns_into_a_folder_when_it_is_fetched_is_fetched_as_a_file(server, tmp_path, path):
    server.listing = lambda folder: [{"path": path, "is_dir": False}] if folder == "MLmodel" else None
    expected = sums(server.files)
    download(server, tmp_path / "a" / "model", expected)
    assert tree(tmp_path).keys() == {f"a/model/{path}" for path in [*expected, registry.SUMS]}


def test_a_listing_that_never_ends_is_given_up(server, tmp_path):
    server.listing = lambda folder: [{"path": "deeper", "is_dir": True}]
    with pytest.raises(ModelError, match="more than 200 files"):
        download(server, tmp_path / "model", sums(server.files))


def test_a_link_in_the_artifact_store_does_not_arrive_as_a_link(server, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "text").write_bytes(b"text")
    (store / "MLmodel").symlink_to("text")
    server.location = store.as_uri()
    folder = download(server, tmp_path / "model", sums({"MLmodel": b"text", "text": b"text"}))
    assert not (folder / "MLmodel").is_symlink()
    (store / "text").write_bytes(b"changed")
    assert (folder / "MLmodel").read_bytes() == b"text"


def test_a_link_out_of_the_artifact_store_does_not_arrive(server, tmp_path):
    secret, store = tmp_path / "secret", tmp_path / "store"
    secret.write_bytes(b"text")
    store.mkdir()
    (store / "MLmodel").symlink_to(secret)
    server.location = store.as_uri()
    with pytest.raises((ModelError, MlflowException)):
        download(server, tmp_path / "model", sums({"MLmodel": b"text"}))
    assert not (tmp_path / "model").exists()


def test_the_servers_own_files_arrive(server, tmp_path):
    folder = download(server, tmp_path / "model", sums(server.files))
    assert {path: content for path, content in tree(folder).items() if path != registry.SUMS} == server.files
