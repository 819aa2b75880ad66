"""Pretrained weights of the user's: files of torchvision's layout, named in a study, checked, part of its identity."""

import shutil

import cells
import official
import pytest
import torch

from hpo import study
from hpo.errors import StudyError
from hpo.operations import details
from hpo.planning.preparation import prepare
from hpo.queue import StudyRow
from hpo.worker import inputs
from models import weights
from models.specs import SpecError

NAME = "resnet18_pretrained_microscopynet_v1.0.pth.tar"
TEXT = """
[data]
path = "{data}"
[model]
family = "transfer"
backbone = "resnet18"
weights = "weights/{name}"
[training]
epochs = 1
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return cells.make(tmp_path_factory.mktemp("data") / "wide", count=30, size=32)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return official.microscopy(tmp_path_factory.mktemp("files") / NAME)


def planned(folder, images, file):
    """The plan of a study in the folder that begins with a copy of the file."""
    (folder / "weights").mkdir(parents=True)
    shutil.copy(file, folder / "weights" / file.name)
    (folder / "micro.toml").write_text(TEXT.format(data=images, name=file.name))
    return prepare(study.load(str(folder / "micro.toml")))


@pytest.mark.parametrize(
    ("name", "backbone"), [(NAME, "resnet18"), ("micro.safetensors", "resnet18"), ("micro.pth", "efficientnet_b0")]
)
def test_the_numbers_of_a_state_dict_arrive_in_the_backbone_without_its_head(tmp_path, name, backbone):
    path = official.microscopy(tmp_path / name, backbone)
    loaded, stored = weights.load(path, backbone), weights._stored(path)
    own = {key: tensor for key, tensor in stored.items() if not key.startswith(("fc.", "classifier."))}
    assert len(loaded) == len(own) < len(stored)
    for key, tensor in own.items():
        assert torch.equal(loaded[f"backbone.{key.removeprefix('features.')}"], tensor), key


def test_a_checkpoint_of_a_training_on_several_gpus_is_a_state_dict_too(tmp_path, file):
    stored = torch.load(file, weights_only=True)
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in stored.items()}}
    torch.save(wrapped, tmp_path / "checkpoint.pth.tar")
    expected, loaded = weights.load(file, "resnet18"), weights.load(tmp_path / "checkpoint.pth.tar", "resnet18")
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_missing_unexpected_and_reshaped_tensors_are_listed_and_refused(tmp_path):
    def change(tensors):
        tensors["stem.weight"] = tensors.pop("conv1.weight")
        tensors["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
        del tensors["fc.bias"]

    path = official.microscopy(tmp_path / "other.pth", change=change)
    with pytest.raises(SpecError) as caught:
        weights.load(path, "resnet18")
    for part in (
        "conv1.weight: expected (64, 3, 7, 7), found none",
        "layer1.0.conv1.weight: expected (64, 64, 3, 3), found (64, 64, 1, 1)",
        "stem.weight: expected none, found (64, 3, 7, 7)",
        "those of its top (fc.…) may be missing",
    ):
        assert part in str(caught.value)
    assert "fc.bias" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    path = official.microscopy(tmp_path / "x.pth", change=lambda tensors: tensors["bn1.bias"].fill_(float("nan")))
    with pytest.raises(SpecError, match=r"expected finite numbers, found others in bn1\.bias"):
        weights.load(path, "resnet18")


def test_the_identity_follows_the_content_of_the_file_and_not_its_folder(tmp_path, images, file):
    plan, moved = planned(tmp_path / "a", images, file), planned(tmp_path / "b", images, file)
    (spec, _), *_ = plan.specs()
    assert plan.identity == moved.identity and plan.canonical["model"]["weights"] == NAME
    assert plan.canonical["weights"] == {NAME: spec.weights.sha256} == {NAME: plan.facts.weights[NAME].sha256}
    assert spec.own_weights == plan.facts.weights[NAME] and spec.params()["weights.sha256"] == spec.weights.sha256
    assert study.provenance(spec.model) == f"pretrained: {NAME}" and plan.name == "micro"
    restored = study.restore("micro", plan.canonical)
    again = restored.canonical(
        data_digest=plan.dataset.digest, split_digest=plan.split.digest, weights=plan.canonical["weights"]
    )
    assert study.digest(again) == plan.identity
    (tmp_path / "a" / "weights" / NAME).unlink()
    assert details._changed(StudyRow(name=plan.name, identity="", canonical=plan.canonical, facts=plan.facts)) == {}
    other = planned(tmp_path / "c", images, official.microscopy(tmp_path / NAME, seed=2))
    assert other.identity != plan.identity
    tensors = inputs.initial_tensors(spec, tmp_path / "b" / "weights")
    assert torch.equal(tensors["backbone.conv1.weight"], torch.load(file, weights_only=True)["conv1.weight"])


def test_a_file_that_is_missing_or_of_another_backbone_is_refused_before_planning(tmp_path, images, file):
    planned(tmp_path / "a", images, file)
    with pytest.raises(StudyError, match=r"expected a file of weights at .*nowhere\.pth, found none"):
        prepare(study.load(str(tmp_path / "a" / "micro.toml"), [f"model.weights={tmp_path / 'nowhere.pth'}"]))
    with pytest.raises(StudyError, match=r"model.weights: .*resnet50's .*; and \d+ more"):
        prepare(study.load(str(tmp_path / "a" / "micro.toml"), ["model.backbone=resnet50"]), trial_run=True)


def test_a_search_compares_weights_and_refuses_two_files_of_one_name(tmp_path, images, file):
    planned(tmp_path / "a", images, file)
    text = (tmp_path / "a" / "micro.toml").read_text().replace(f'weights = "weights/{NAME}"\n', "")
    wide = tmp_path / "a" / "compared.toml"
    wide.write_text(text + f'[space]\nweights = ["weights/{NAME}", "none"]\n')
    plan = prepare(study.load(str(wide)))
    assert [spec.weights and spec.weights.name for spec, _ in plan.specs()] == [NAME, None]
    assert [spec.point["weights"] for spec, _ in plan.specs()] == [NAME, "none"]
    wide.write_text(text + f'[space]\nweights = ["weights/{NAME}", "other/{NAME}"]\n')
    with pytest.raises(StudyError, match="expected files of different names"):
        study.load(str(wide))


def test_a_study_that_starts_from_another_one_has_its_weights(tmp_path, images, file):
    plan = planned(tmp_path / "a", images, file)
    text = (tmp_path / "a" / "micro.toml").read_text()
    fine = tmp_path / "a" / "fine.toml"
    fine.write_text('starts_from = "./micro.toml"\n' + text)
    follow = study.load(str(fine))
    assert follow.pretrained() == plan.study.pretrained() == [NAME]
    fine.write_text('starts_from = "./micro.toml"\n' + text.replace("weights/", "elsewhere/"))
    with pytest.raises(StudyError, match="expected files of different names"):
        study.load(str(fine))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("imagnet", "did you mean 'imagenet'"),
        ("my net.pth", "whose name has letters, digits"),
        ("weights.h5", "or the path of a file .pth, .pth.tar, .pt or .safetensors"),
    ],
)
def test_other_words_for_weights_are_refused_with_what_was_meant(tmp_path, value, message):
    (tmp_path / "micro.toml").write_text(TEXT.format(data="default", name=NAME))
    with pytest.raises(StudyError, match=message):
        study.load(str(tmp_path / "micro.toml"), [f"model.weights={value}"])
