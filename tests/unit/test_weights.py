"""Pretrained weights: found where torchvision keeps them, checked, and never replaced by random ones."""

import hashlib
import pickle
import shutil
import subprocess
import sys

import official
import pytest
import torch
from places import ROOT

from models import transfer, weights
from models.backbones import BACKBONES
from models.specs import SpecError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def test_names_and_folder_are_torchvisions(monkeypatch, tmp_path):
    from torchvision import models

    for backbone, name in weights.FILES.items():
        chosen = models.get_model_weights(backbone).IMAGENET1K_V1
        assert chosen.url == weights.SOURCE + name
        transform = chosen.transforms()
        assert (tuple(transform.mean), tuple(transform.std)) == (transfer.IMAGENET_MEAN, transfer.IMAGENET_STD)
    for variables in ({"TORCH_HOME": "/x"}, {"XDG_CACHE_HOME": "/y"}, {}):
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(weights.folder()) == f"{torch.hub.get_dir()}/checkpoints"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_file_brought_by_hand_is_checked_and_its_numbers_arrive_in_the_backbone(tmp_path, monkeypatch, backbone):
    brought = official.make(tmp_path / "usb", backbone, monkeypatch)
    with pytest.raises(SpecError, match="are not on this machine"):
        weights.find(weights.FILES[backbone])
    weights.adopt(brought)
    path, digest = weights.find(weights.FILES[backbone])
    assert path == weights.folder() / brought.name and digest == hashlib.sha256(brought.read_bytes()).hexdigest()
    torch.manual_seed(1)
    expected = transfer.backbone(backbone).state_dict()
    loaded = weights.load(path, backbone)
    assert all(torch.equal(loaded[f"backbone.{name}"], expected[name]) for name in expected if "num_b" not in name)


def test_a_missing_file_is_named_with_where_from_and_where_to():
    with pytest.raises(SpecError) as caught:
        weights.find(weights.FILES["vgg16"])
    for part in ("vgg16-397923af.pth", weights.SOURCE, str(weights.folder()), "hpo weights", 'weights = "none"'):
        assert part in str(caught.value)


def test_a_file_that_cannot_be_fetched_says_what_to_do_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "SOURCE", "http://127.0.0.1:9/")
    with pytest.raises(SpecError, match=r"127.0.0.1:9/resnet50-0676ba61.pth could not be fetched .*hpo weights FILE"):
        weights.fetch("resnet50")
    assert list(weights.folder().iterdir()) == []


def test_a_file_is_fetched_with_its_hash_checked(monkeypatch, tmp_path):
    served = official.make(tmp_path / "served", "densenet121", monkeypatch)
    monkeypatch.setattr(weights, "SOURCE", served.parent.as_uri() + "/")
    assert weights.fetch("densenet121").read_bytes() == served.read_bytes()
    weights.find(served.name)[0].unlink()
    served.write_bytes(served.read_bytes()[:-1])
    with pytest.raises(SpecError, match="could not be fetched"):
        weights.fetch("densenet121")
    assert list(weights.folder().iterdir()) == []


def test_a_changed_file_is_refused_at_every_use(tmp_path, monkeypatch):
    brought = official.make(tmp_path / "usb", "densenet121", monkeypatch)
    there = weights.adopt(brought)
    there.write_bytes(there.read_bytes() + b"x")
    with pytest.raises(SpecError, match="expected a SHA-256 that begins with"):
        weights.find(brought.name)


def test_tensors_that_do_not_fit_are_named(tmp_path, monkeypatch):
    brought = official.make(
        tmp_path, "densenet121", monkeypatch, change=lambda tensors: tensors.pop("features.conv0.weight")
    )
    with pytest.raises(SpecError, match=r"densenet121's conv0.weight: expected \(64, 3, 7, 7\), found none"):
        weights.adopt(brought)
    assert not weights.folder().exists()


class Canary:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_a_pickle_with_code_in_it_is_refused_and_never_run(tmp_path, monkeypatch):
    (tmp_path / "bad").write_bytes(pickle.dumps(Canary(), protocol=2))
    name = f"vgg16-{hashlib.sha256((tmp_path / 'bad').read_bytes()).hexdigest()[:8]}.pth"
    shutil.move(tmp_path / "bad", tmp_path / name)
    monkeypatch.setitem(weights.FILES, "vgg16", name)
    with pytest.raises(SpecError, match="not a readable file of weights"):
        weights.adopt(tmp_path / name)


def test_a_file_of_another_name_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"expected a file named vgg16-397923af.pth"):
        weights.adopt(tmp_path / "vgg19.pth")


def test_pretrained_weights_are_listed_without_mlflow():
    code = "import sys\nfrom hpo import api\nlist(api.weights(fetch=False))\nsys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
