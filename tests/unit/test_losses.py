"""Losses: what each of them minimises, seen at networks whose best answer is known."""

import dataclasses

import cells
import numpy as np
import pytest
import torch

from models.losses import terms
from models.specs import CnnSpec, SpecError, TrainingSpec, training_to_dict
from models.training import Training

OUTPUTS, TARGETS = torch.tensor([[0.5, 3.0], [-2.0, 1.0]]), torch.tensor([[0.0, 0.0], [torch.nan, 2.0]])


@pytest.mark.parametrize(("loss", "expected"), [("mae", [0.5, 3.0, 0.0, 1.0]), ("huber", [0.125, 2.5, 0.0, 0.5])])
def test_the_terms_of_a_loss_are_those_of_its_name_and_0_without_a_label(loss, expected):
    outputs = OUTPUTS.clone().requires_grad_()
    values = terms(TrainingSpec(loss=loss))(outputs, TARGETS)
    assert values.flatten().tolist() == expected
    values.sum().backward()
    assert outputs.grad[1, 0] == 0 and outputs.grad.isfinite().all()


def test_the_default_loss_stays_out_of_the_identity_of_a_study():
    assert "loss" not in training_to_dict(TrainingSpec())
    assert training_to_dict(TrainingSpec(loss="mae"))["loss"] == "mae"


def constant(labels, **settings):
    """What a network learns to answer for images that do not differ, and labels (n,) that do."""
    images = np.full((len(labels), 1, 8, 8), 0.5, np.float32)
    training = TrainingSpec(epochs=300, batch_size=len(labels), learning_rate=2e-2, target_scaling="none", **settings)
    spec = CnnSpec(filters=2, kernel_size=3, dropout=0.0)
    part = (images, np.array(labels, float)[:, None])
    run = Training(spec, training, train=part, validation=part, seed=1)
    for _ in run.epochs():
        pass
    with torch.inference_mode():
        return run.last_regressor()(torch.from_numpy(images[:1])).item()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_each_loss_leads_to_its_own_mean_of_labels_that_differ():
    labels = [1.0, 1.0, 1.0, 1.0, 11.0]
    assert constant(labels) == pytest.approx(3.0, abs=0.05)
    assert constant(labels, loss="mae") == pytest.approx(1.0, abs=0.2)
    # sum of (x - y)² / y²: x = sum(1 / y) / sum(1 / y²)
    assert constant(labels, loss="relative") == pytest.approx((4 + 1 / 11) / (4 + 1 / 121), abs=0.05)


def test_a_loss_of_relative_errors_alone_takes_no_weight_of_them_beside_it():
    images = cells.blocks(8, 8, seed=1)
    part = (images, np.arange(8.0)[:, None])
    spec, settings = CnnSpec(filters=2, kernel_size=3, dropout=0.0), TrainingSpec(loss="relative")
    Training(spec, settings, train=part, validation=part)
    with pytest.raises(SpecError, match="relative = 0"):
        Training(spec, dataclasses.replace(settings, relative=1.0), train=part, validation=part)
