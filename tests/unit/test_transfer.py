"""Transfer networks: their layers, what is frozen, features computed once, and the promises every network keeps."""

import fcntl
import itertools
import os
from collections import Counter
from dataclasses import astuple

import cells
import numpy as np
import pytest
import torch
from shell import at_once
from torch import nn

from models import bundle, transfer
from models.backbones import BACKBONES
from models.checkpoint import load_state, save_state
from models.metrics import scores
from models.networks import build, parameter_count
from models.regressor import predict
from models.sizes import least_batch, size
from models.specs import SpecError, TrainingSpec, TransferSpec, from_dict, to_dict
from models.training import Interrupted, Training

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 7
SHORT = TrainingSpec(epochs=3, batch_size=8, learning_rate=1e-3)


def split(n, *, seed):
    """Images (n, 1, 32, 32) and two smooth functions of them."""
    images = cells.blocks(n, 32, seed=seed)
    return images, np.column_stack([40 + 10 * images.mean((1, 2, 3)) ** 2, images[..., :16].mean((1, 2, 3))])


TRAIN, VALIDATION = split(19, seed=SEED), split(7, seed=SEED + 1)


def spec(backbone="densenet121", trainable="head"):
    return TransferSpec(backbone=backbone, weights="none", trainable=trainable)


def training(which, short=SHORT, **options):
    return Training(which, short, **({"seed": SEED, "train": TRAIN, "validation": VALIDATION} | options))


def numbers(epoch):
    return epoch.number, epoch.best, {name: v for name, v in epoch.metrics.items() if name != "seconds"}


def images(n=3, channels=1):
    return torch.rand(n, channels, 32, 32, generator=torch.Generator().manual_seed(SEED))


@pytest.mark.parametrize("backbone", ["resnet50", "densenet121"])
def test_a_batch_of_one_image_of_one_final_pixel_joins_the_batch_before(backbone):
    first = [each[:17] for each in TRAIN]
    made = training(spec(backbone, "all"), TrainingSpec(epochs=1, batch_size=8), train=first)
    assert np.isfinite(next(made.epochs()).metrics["val/nmse"])
    with pytest.raises(SpecError, match=r"batch_size = 1: .* expected at least 2 images in a batch"):
        training(spec(backbone, "all"), TrainingSpec(epochs=1, batch_size=1), train=first)


@pytest.mark.parametrize("side", [32, 33, 60, 61, 64, 65])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_least_batch_is_that_of_what_the_last_batch_norm_sees(backbone, side):
    with torch.device("meta"):
        network = transfer.backbone(backbone)
        last = network(torch.empty(2, 3, side, side)).shape[2:]
    alone = tuple(last) == (1, 1) and any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert least_batch(spec(backbone, "all"), (1, side, side)) == (2 if alone else 1)
    assert least_batch(spec(backbone, "head"), (1, side, side)) == 1


HEADS = {"vgg16": 8_361, "resnet50": 32_937, "densenet121": 16_553}  # the protocol's, for nine targets
HEADS |= {"resnet18": 8_361, "efficientnet_b0": 20_649, "convnext_tiny": 12_457}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_block_has_the_parameters_and_the_work_of_torchvisions(backbone):
    work = Counter()
    with torch.device("meta"):
        network = transfer.backbone(backbone).eval()
        for name, child in network.named_children():
            for layer in child.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.register_forward_hook(
                        lambda layer, _, output, name=name: work.update(
                            {name: output.numel() * layer.weight[0].numel()}
                        )
                    )
        features = network(torch.empty(1, 3, 224, 224))
    firsts, counted = {block.first for block in BACKBONES[backbone].blocks}, []
    for name, child in network.named_children():
        if name in firsts:
            counted.append((name, 0, 0))
        first, parameters, multiply_adds = counted.pop()
        counted.append((first, parameters + parameter_count(child), multiply_adds + work[name]))
    assert counted == [astuple(block) for block in BACKBONES[backbone].blocks]
    assert features.shape[1] == BACKBONES[backbone].channels


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_head_has_the_parameter_count_of_the_protocol_and_of_the_closed_form(backbone):
    head = build(spec(backbone), (1, 64, 64), 9)
    assert parameter_count(head, trainable=True) == HEADS[backbone]
    found = size(spec(backbone), (1, 64, 64), 9)
    assert (found.parameters, found.trainable) == (parameter_count(head), HEADS[backbone])
    whole = size(spec(backbone, "all"), (1, 64, 64), 9)
    assert whole.parameters == whole.trainable == found.parameters
    head.backbone.requires_grad_(True)
    assert parameter_count(head, trainable=True) == whole.trainable


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_network_is_torchvisions_backbone_pooled_with_a_head(backbone):
    from torchvision import models
    from torchvision.models.feature_extraction import create_feature_extractor

    network = build(spec(backbone), (1, 32, 32), 2).eval()
    if backbone == "vgg16":  # its classifier would take 0.5 GB
        whole = models.VGG(models.vgg.make_layers(models.vgg.cfgs["D"]), num_classes=1, init_weights=False)
        whole.classifier = nn.Identity()
    else:
        whole = models.get_model(backbone)
    stored = {name.removeprefix("features."): tensor for name, tensor in network.backbone.state_dict().items()}
    names = {name.removeprefix("features."): name for name in whole.state_dict()}
    names |= {f"norm.{part}": f"classifier.0.{part}" for part in ("weight", "bias")}  # ConvNeXt's
    whole.load_state_dict({names[name]: tensor for name, tensor in stored.items()}, strict=False)
    # torchvision's own last activation before its pooling, found in its own forward
    nodes = {"resnet18": "layer4", "resnet50": "layer4", "densenet121": "relu", "convnext_tiny": "classifier.0"}
    node = nodes.get(backbone, "features")
    transform = models.get_model_weights(backbone).IMAGENET1K_V1.transforms()
    grey = images()
    three = (grey.expand(-1, 3, -1, -1) - torch.tensor(transform.mean).view(3, 1, 1)) / torch.tensor(
        transform.std
    ).view(3, 1, 1)
    with torch.no_grad():
        (seen,) = create_feature_extractor(whole.eval(), [node])(three).values()
        pooled = seen.mean((2, 3))
        assert torch.allclose(network.extract(grey), pooled, rtol=1e-5, atol=1e-6)
        assert torch.equal(network(grey), network.head(torch.relu(network.dense(network.extract(grey)))))
        assert torch.allclose(network(grey), network(grey.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-6)


def test_an_image_too_small_for_five_poolings_is_refused():
    with pytest.raises(SpecError, match="expected images of"):
        build(spec(), (1, 31, 40), 2)


@pytest.mark.parametrize("channels", [2, 5])
def test_phases_get_a_colour_each_and_the_features_computed_once_know_it(channels):
    network = build(spec("vgg16"), (channels, 32, 32), 2).eval()
    assert len(set(transfer.colours(channels))) == channels
    phases = torch.eye(channels)[torch.arange(3 * 32 * 32).view(3, 32, 32) // 64 % channels].permute(0, 3, 1, 2)
    coloured = torch.einsum("bchw,cr->brhw", phases, torch.tensor(transfer.colours(channels)))
    plain = build(spec("vgg16"), (3, 32, 32), 2).eval()
    plain.load_state_dict(network.state_dict())
    with torch.inference_mode():
        assert torch.allclose(network(phases), plain(coloured), rtol=1e-4, atol=1e-5)
        assert torch.allclose(
            network(network.prepare(phases, None, lambda: None)), network(phases), rtol=1e-4, atol=1e-5
        )
        assert not torch.allclose(network(phases), network(phases.roll(1, 1)), rtol=1e-3)
        exported = torch.export.export(network, (phases,)).module()
        assert torch.allclose(exported(phases), network(phases), rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_stays_in_inference_mode_and_keeps_every_number():
    one = training(spec())
    before = {name: tensor.clone() for name, tensor in one.network.backbone.state_dict().items()}
    list(one.epochs())
    one.network.train()
    assert not any(module.training for module in one.network.backbone.modules())
    for name, tensor in one.network.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any("backbone" in name for name in one.state().tensors), "a checkpoint holds what changes"


def test_fine_tuning_trains_all_parameters_and_moves_all_averages_of_batch_norms():
    one = training(spec(trainable="all"), TrainingSpec(epochs=1, batch_size=8))
    before = {name: tensor.clone() for name, tensor in one.network.state_dict().items()}
    list(one.epochs())
    for name, tensor in one.network.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in ("mean", "std")), name


@pytest.mark.parametrize(
    "backbone", ["resnet18", *[pytest.param(name, marks=pytest.mark.slow) for name in ("vgg16", "convnext_tiny")]]
)
def test_the_last_block_is_trained_and_those_before_it_keep_every_number(backbone):
    one = training(spec(backbone, "last:1"), TrainingSpec(epochs=1, batch_size=8))
    before = {name: tensor.clone() for name, tensor in one.network.state_dict().items()}
    list(one.epochs())
    names = [name for name, _ in one.network.backbone.named_children()]
    trained = tuple(f"backbone.{name}." for name in names[names.index(BACKBONES[backbone].blocks[-1].first) :])
    for name, tensor in one.network.state_dict().items():
        is_fixed = name in ("mean", "std") or (name.startswith("backbone.") and not name.startswith(trained))
        assert torch.equal(tensor, before[name]) == is_fixed, name
        assert not is_fixed or f"network.{name}" not in one.state().tensors, "a checkpoint holds what changes"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_size_of_a_partly_trained_network_lies_between_those_of_the_others(backbone):
    shape, whole = (1, 32, 32), size(spec(backbone, "all"), (1, 32, 32), 2)
    head, last = (size(spec(backbone, trainable), shape, 2) for trainable in ("head", "last:2"))
    assert last.trainable == parameter_count(build(spec(backbone, "last:2"), shape, 2), trainable=True)
    assert head.trainable < last.trainable < whole.trainable == last.parameters
    assert head.multiply_adds < whole.multiply_adds / 3 < last.multiply_adds < whole.multiply_adds


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("last:5", "resnet18 has 5 blocks: expected 'last:1' to 'last:4', or 'all'"),
        ("last:0", "one of 'head', 'all', or 'last:N', for the last N blocks"),
        ("al", "did you mean 'all'"),
    ],
)
def test_a_number_of_blocks_that_a_backbone_has_not_is_refused(trainable, message):
    with pytest.raises(SpecError, match=message):
        from_dict({"family": "transfer", "backbone": "resnet18", "trainable": trainable})


class Naive(Training):
    """The plain loop: the whole network on the images, every epoch."""

    def _prepare(self, images, *, raw=False):
        return torch.from_numpy(np.ascontiguousarray(images, np.float32))


@pytest.mark.parametrize("backbone", ["resnet50", "densenet121"])
def test_features_computed_once_give_the_losses_of_the_plain_loop(backbone):
    plain = Naive(spec(backbone), SHORT, train=TRAIN, validation=VALIDATION, seed=SEED)
    for ours, theirs in zip(training(spec(backbone)).epochs(), plain.epochs(), strict=True):
        for name in ("train/nmse", "val/nmse", "train/mse", "val/mse"):
            assert ours.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-4), f"seed {SEED}"


def test_features_are_kept_in_a_file_and_a_damaged_one_is_made_again(tmp_path, monkeypatch):
    passes = []
    from models.transfer import TransferNet

    extract = TransferNet.extract
    monkeypatch.setattr(
        TransferNet, "extract", lambda self, images: (passes.append(len(images)), extract(self, images))[1]
    )
    first = [numbers(epoch) for epoch in training(spec(), cache=tmp_path).epochs()]
    assert passes == [19, 7], "one pass over each split"
    assert [numbers(epoch) for epoch in training(spec(), cache=tmp_path).epochs()] == first
    assert passes == [19, 7], "none"
    for path in tmp_path.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert [numbers(epoch) for epoch in training(spec(), cache=tmp_path).epochs()] == first
    assert passes == [19, 7, 19, 7], "a damaged file is computed again"
    training(spec(), cache=tmp_path, seed=SEED + 1)
    assert passes[4:] == [19, 7], "another backbone has other features"
    assert not list(tmp_path.glob("*.tmp"))


def test_two_trainings_at_once_compute_the_features_once(tmp_path, monkeypatch):
    from models import features
    from models.transfer import TransferNet

    network, passes, extract = build(spec(), (1, 32, 32), 2), [], TransferNet.extract
    monkeypatch.setattr(TransferNet, "extract", lambda self, images: (passes.append(1), extract(self, images))[1])
    signs = []

    def compute():
        return features.compute(network, images(8), tmp_path, lambda: signs.append(1))

    found = at_once(*[compute] * 3)
    assert len(passes) == 1 and signs
    assert all(torch.equal(each, found[0]) for each in found)
    torch.set_num_threads(2)
    compute()
    torch.set_num_threads(1)
    compute()
    assert len(passes) == 2, "with other threads there may be other sums, but those of one thread are still there"


def test_who_waits_for_features_that_a_frozen_training_does_not_give_computes_them(tmp_path, monkeypatch):
    from models import features

    network, signs = build(spec(), (1, 32, 32), 2), []
    expected = features.compute(network, images(8), tmp_path, lambda: None)
    (kept,) = tmp_path.glob("*.safetensors")
    os.utime(kept, (0, 0))
    features.compute(network, images(8), tmp_path, lambda: None)
    assert kept.stat().st_mtime > 0, "they are in use: no stale cache"
    kept.unlink()
    monkeypatch.setattr(features, "PATIENCE", 1.0)
    with next(tmp_path.glob("*.lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = features.compute(network, images(8), tmp_path, lambda: signs.append(1))
    assert torch.equal(found, expected) and kept.exists()
    assert len(signs) >= 2, "one while it waited, one after its batch"


def test_a_sign_of_life_is_given_between_the_batches_of_all_that_takes_long():
    signs = []
    one = training(spec(), alive=lambda: signs.append(1))
    assert len(signs) == 2, "after the features of each split"
    next(iter(one.epochs()))
    assert len(signs) == 3, "after the evaluation"
    predict(one.last_regressor(), VALIDATION[0], batch_size=2, alive=lambda: signs.append(1))
    assert len(signs) == 3 + -(-len(VALIDATION[0]) // 2)


@pytest.mark.parametrize(
    ("backbone", "trainable"),
    [
        ("efficientnet_b0", "last:3"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("densenet121", "all"), ("resnet50", "head"))),
    ],
)
def test_a_resumed_transfer_training_repeats_every_bit_batch_norms_included(tmp_path, backbone, trainable):
    which, short = spec(backbone, trainable), TrainingSpec(epochs=2, batch_size=8, learning_rate=1e-3)
    torch.manual_seed(SEED + 1)
    initial = build(which, (1, 32, 32), 2).state_dict()  # pretrained, say: a frozen one is in no checkpoint
    whole = training(which, short, initial=initial)
    expected = [numbers(epoch) for epoch in whole.epochs()]
    found, state = [], None
    for batches in (4, None):  # of three an epoch: in the second
        part = training(which, short, initial=initial, state=state)
        asked = itertools.count()
        try:
            for epoch in part.epochs(None if batches is None else lambda n=batches, a=asked: next(a) >= n):
                found.append(numbers(epoch))
        except Interrupted:
            save_state(part.state(), tmp_path / "state")
            state = load_state(tmp_path / "state")
    assert found == expected, f"seed {SEED}"
    ours, theirs = part.state().tensors, whole.state().tensors
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("running_mean" in name for name in ours) == (trainable != "head")


@pytest.mark.parametrize(
    ("backbone", "trainable"),
    [
        ("resnet18", "all"),
        *[
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in itertools.product(
                ["resnet18", "densenet121", "efficientnet_b0", "convnext_tiny"], ["head", "all"]
            )
            if pair != ("resnet18", "all")
        ],
    ],
)
def test_the_regressor_is_the_whole_network_of_the_best_epoch_and_survives_files(tmp_path, backbone, trainable):
    which = spec(backbone, trainable)
    one = training(which, TrainingSpec(epochs=2, batch_size=8, learning_rate=1e-3))
    best = min(list(one.epochs()), key=lambda epoch: epoch.metrics["val/nmse"])
    regressor = one.best_regressor()
    found = scores(predict(regressor, VALIDATION[0]), VALIDATION[1], train_variance=TRAIN[1].var(axis=0))
    assert found.nmse == pytest.approx(best.metrics["val/nmse"], rel=1e-4), f"seed {SEED}"
    bundle.save(tmp_path, regressor, model=to_dict(which), image_shape=(1, 32, 32), target_names=("a", "b"), unit="GPa")
    loaded, _ = bundle.load(tmp_path)
    for name, tensor in regressor.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert np.array_equal(predict(loaded, VALIDATION[0]), predict(regressor, VALIDATION[0]))
    with torch.device("meta"):  # the file brings every number: none is left to how the network was built
        outline = build(which, (1, 32, 32), 2)
    outline.to_empty(device="cpu").load_state_dict(regressor.network.state_dict())
    images = torch.from_numpy(VALIDATION[0])
    with torch.no_grad():
        assert torch.equal(outline.eval()(images), regressor.network(images))
        if backbone != "densenet121":  # whose many layers take 20 s, and the tests of studies export it
            exported = torch.export.export(loaded, (images,)).module()
            assert torch.allclose(exported(images), loaded(images), rtol=1e-5)


def test_fine_tuning_begins_with_the_network_it_is_given():
    head = training(spec(), TrainingSpec(epochs=1, batch_size=8))
    list(head.epochs())
    initial = head.best_regressor().network.state_dict()
    one = training(spec(trainable="all"), initial=initial, seed=SEED + 1)
    for name, tensor in one.network.state_dict().items():
        assert torch.equal(tensor, initial[name]), name
    assert all(not tensor.any() for name, tensor in one.state().tensors.items() if name.startswith("adam."))
    with pytest.raises(SpecError, match=r"dense.weight .* to begin with does not fit"):
        training(spec("vgg16", "all"), initial=initial)


def test_training_stops_when_patience_is_over_and_stays_stopped():
    short = TrainingSpec(epochs=50, batch_size=8, learning_rate=1.0, patience=3)
    one = training(spec(), short)
    epochs = list(one.epochs())
    assert len(epochs) < 50 and epochs[-1].number - one.best_epoch == 3
    assert list(training(spec(), short, state=one.state()).epochs()) == []


@pytest.mark.slow
def test_bf16_training_is_evaluated_in_full_precision():
    half = TrainingSpec(epochs=1, batch_size=8, precision="bf16")
    one = training(spec(trainable="all"), half)
    epochs = list(one.epochs())
    found = scores(predict(one.last_regressor(), VALIDATION[0]), VALIDATION[1], train_variance=TRAIN[1].var(axis=0))
    assert found.nmse == pytest.approx(epochs[-1].metrics["val/nmse"], rel=1e-4)
    assert {tensor.dtype for tensor in one.state().tensors.values()} == {torch.float32, torch.int64}
