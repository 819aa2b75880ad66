"""Training: what it reports, what it keeps, and that an interruption changes no bit of what follows."""

import copy
import dataclasses
import itertools

import cells
import numpy as np
import pytest
import torch

from data_pipeline.components import SYMMETRIES as COMPONENT_SYMMETRIES
from models.checkpoint import load_state, save_state
from models.metrics import mean_predictor, scores
from models.optimisation import schedule
from models.physics import NAMES, Physics
from models.regressor import predict
from models.specs import CnnSpec, PeriodicSpec, SpecError, TrainingSpec, TransferSpec, training_to_dict
from models.splits import relative_weights
from models.training import Diverged, Interrupted, Training

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 5
SPEC = CnnSpec(filters=4, kernel_size=3, dropout=0.2)
SHORT = TrainingSpec(epochs=6, batch_size=8, learning_rate=1e-3)


def split(n, *, seed):
    """Images (n, 1, 16, 16) and three smooth functions of them, of scales 10, 1 and 1e-3."""
    images = cells.blocks(n, 16, seed=seed)
    whole, left, top = images.mean((1, 2, 3)), images[..., :8].mean((1, 2, 3)), images[..., :8, :].mean((1, 2, 3))
    return images, np.column_stack([40 + 10 * whole**2, 3 + left, 0.5 + 1e-3 * top]).astype(np.float64)


TRAIN, VALIDATION = split(37, seed=SEED), split(13, seed=SEED + 1)  # neither divides into batches of eight


def training(spec=SPEC, short=SHORT, **options):
    return Training(spec, short, **({"seed": SEED, "train": TRAIN, "validation": VALIDATION} | options))


def numbers(epoch):
    """What an epoch says, but for the time it took."""
    return epoch.number, epoch.best, {name: v for name, v in epoch.metrics.items() if name != "seconds"}


def after(batches):
    """A `stop` that says true when that many batches have been trained."""
    asked = itertools.count()
    return lambda: next(asked) >= batches


def same(state, other):
    return (
        state.info == other.info
        and state.tensors.keys() == other.tensors.keys()
        and all(torch.equal(tensor, other.tensors[name]) for name, tensor in state.tensors.items())
    )


BATCHES = 5  # an epoch: ceil(37 / 8)


@pytest.mark.parametrize("images", ["two-phase", "grey"])  # trained on as distinct windows, and as they are
def test_a_resumed_training_repeats_every_bit_though_interrupted_in_mid_epoch(tmp_path, images):
    options = {}
    if images == "grey":
        noise = np.random.default_rng(SEED).random(TRAIN[0].shape, dtype=np.float32)
        options["train"] = (0.8 * TRAIN[0] + 0.2 * noise, TRAIN[1])
    check_resuming(tmp_path, **options)


def check_resuming(tmp_path, **options):
    whole = training(**options)
    expected = [numbers(epoch) for epoch in whole.epochs()]
    assert len(expected) == SHORT.epochs

    found, state = [], None
    for batches in (2 * BATCHES + 3, BATCHES + 1, None):  # in the third epoch, in the fourth, never
        torch.manual_seed(torch.seed())  # what the process drew before must not count
        part = training(**options, state=state)
        stop = None if batches is None else after(batches)
        try:
            for epoch in part.epochs(stop):
                found.append(numbers(epoch))
        except Interrupted:
            save_state(part.state(), tmp_path / "state.safetensors")
            state = load_state(tmp_path / "state.safetensors")
            assert state.info["epoch"] == len(found)
    assert found == expected, f"seed {SEED}"
    assert same(part.state(), whole.state()), f"seed {SEED}"


SYMMETRIES = {"flip_vertical": (0, 1, 2), "flip_horizontal": (0, 1, 2), "transpose": (0, 2, 1)}
PERIODIC = PeriodicSpec(width=4, depth=2, head=8)
EVERYTHING = TrainingSpec(
    epochs=SHORT.epochs,
    batch_size=8,
    learning_rate=1e-2,
    augmentation="symmetry",
    weight_decay=0.1,
    schedule="one-cycle",
    gradient_clipping=0.5,
    ema=0.9,
)


@pytest.mark.parametrize("spec", [PERIODIC, SPEC])
def test_so_does_one_with_augmentation_decay_schedule_clipping_and_averaged_weights(tmp_path, spec):
    check_resuming(tmp_path, spec=spec, short=EVERYTHING, symmetries=SYMMETRIES)


@pytest.mark.slow
def test_so_does_one_on_several_threads(tmp_path):
    torch.set_num_threads(3)
    try:
        check_resuming(tmp_path)
        check_resuming(tmp_path, spec=PERIODIC, short=EVERYTHING, symmetries=SYMMETRIES)
    finally:
        torch.set_num_threads(1)


def test_each_setting_changes_what_is_trained():
    def curve(**changes):
        short = TrainingSpec(**{**EVERYTHING.__dict__, **changes})
        return [numbers(epoch) for epoch in training(spec=PERIODIC, short=short, symmetries=SYMMETRIES).epochs()]

    off = {"augmentation": "none", "weight_decay": 0.0, "schedule": "constant", "gradient_clipping": 0.0, "ema": 0.0}
    curves = [curve(), *(curve(**{key: value}) for key, value in off.items()), curve(schedule="cosine")]
    assert len({str(each) for each in curves}) == len(curves)


def test_settings_at_their_defaults_are_not_named():
    assert training_to_dict(TrainingSpec()).keys() == {"epochs", "batch_size", "learning_rate", "target_scaling"}
    assert len(training_to_dict(EVERYTHING)) == 4 + 5


def test_the_state_in_mid_epoch_is_that_of_the_newest_completed_epoch():
    one = training()
    running = one.epochs()
    next(running)
    completed = one.state()
    with pytest.raises(Interrupted, match="epoch 2"):
        list(one.epochs(after(3)))
    assert same(one.state(), completed)
    whole = training()
    expected = [numbers(epoch) for epoch in whole.epochs()][1:]
    assert [numbers(epoch) for epoch in one.epochs()] == expected, f"seed {SEED}"


def test_a_state_shares_no_memory_with_the_training_it_was_taken_from():
    one = training()
    running = one.epochs()
    next(running)
    state = one.state()
    before = copy.deepcopy(state)
    next(running)
    assert same(state, before)
    assert not same(one.state(), before)


def test_stopping_before_the_first_batch_gives_the_initial_state_which_resumes_too():
    one = training()
    with pytest.raises(Interrupted):
        list(one.epochs(lambda: True))
    assert one.state().info["epoch"] == 0
    resumed = training(state=one.state())
    assert [numbers(e) for e in resumed.epochs()] == [numbers(e) for e in training().epochs()], f"seed {SEED}"


def test_equal_seeds_give_equal_trainings_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = [numbers(epoch) for epoch in training().epochs()]
    torch.manual_seed(2)
    assert [numbers(epoch) for epoch in training().epochs()] == first
    assert [numbers(epoch) for epoch in training(seed=SEED + 1).epochs()] != first


def test_the_callers_random_numbers_are_left_as_they_were():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = training()
    list(one.epochs())
    one.best_regressor()
    assert torch.equal(torch.rand(3), expected)


def test_the_reported_validation_scores_are_those_of_the_regressors_predictions():
    one = training()
    epochs = list(one.epochs())
    variance = TRAIN[1].var(axis=0)
    for regressor, epoch in (
        (one.last_regressor(), epochs[-1]),
        (one.best_regressor(), min(epochs, key=lambda epoch: epoch.metrics["val/nmse"])),
    ):
        found = scores(predict(regressor, VALIDATION[0]), VALIDATION[1], train_variance=variance)
        # float32 predictions of 0.5 + 1e-3 x: rounding of 3e-8 on a standard deviation of 3e-4
        assert found.nmse == pytest.approx(epoch.metrics["val/nmse"], rel=1e-3), f"seed {SEED}"
        assert found.mse == pytest.approx(epoch.metrics["val/mse"], rel=1e-4)


def test_the_best_epoch_is_the_one_of_the_lowest_validation_nmse():
    one = training(short=TrainingSpec(epochs=25, batch_size=8, learning_rate=2e-2))  # large enough to go up and down
    lowest, epochs = float("inf"), []
    for epoch in one.epochs():
        assert epoch.best == (epoch.metrics["val/nmse"] < lowest)
        lowest = min(lowest, epoch.metrics["val/nmse"])
        epochs.append(epoch)
    assert not epochs[-1].best, f"seed {SEED} does not exercise the rule"
    assert one.state().info["best_nmse"] == lowest
    assert one.state().info["best_epoch"] == max(epoch.number for epoch in epochs if epoch.best)
    best, last = epochs[one.best_epoch - 1].metrics, epochs[-1].metrics
    resumed = training(short=one.training, state=one.state())
    for each in (one, resumed):
        assert (each.best_nmse, each.best_mse) == (best["val/nmse"], best["val/mse"])
        assert (each.last_nmse, each.last_mse) == (last["val/nmse"], last["val/mse"])


def test_the_training_loss_is_weighed_by_the_length_of_the_batches():
    # A learning rate of 1e-30 changes no weight, so the running loss is the loss over the split, in whatever batches.
    still = TrainingSpec(epochs=1, batch_size=8, learning_rate=1e-30)
    one = training(spec=CnnSpec(filters=4, kernel_size=3, dropout=0.0), short=still)
    (epoch,) = one.epochs()
    found = scores(predict(one.last_regressor(), TRAIN[0]), TRAIN[1], train_variance=TRAIN[1].var(axis=0))
    assert epoch.metrics["train/nmse"] == pytest.approx(found.nmse, rel=1e-3)
    assert epoch.metrics["train/mse"] == pytest.approx(found.mse, rel=1e-5)
    assert epoch.metrics["learning_rate"] == 1e-30


def test_training_beats_the_mean_of_the_training_labels_by_far():
    one = training(short=TrainingSpec(epochs=60, batch_size=8, learning_rate=3e-3))
    list(one.epochs())
    variance = TRAIN[1].var(axis=0)
    mean = scores(mean_predictor(*TRAIN)(VALIDATION[0]), VALIDATION[1], train_variance=variance)
    found = scores(predict(one.best_regressor(), VALIDATION[0]), VALIDATION[1], train_variance=variance)
    assert found.nmse < 0.25 * mean.nmse, f"seed {SEED}"


def test_one_step_is_adam_with_the_epsilon_of_the_source():
    one = training(short=TrainingSpec(epochs=1, batch_size=64))  # one batch
    names = [name for name, _ in one.network.named_parameters()]
    before = one.state().tensors
    list(one.epochs())
    after_step = one.state().tensors
    for name in names:
        gradient = after_step[f"adam.{name}.exp_avg"].double() / 0.1
        expected = before[f"network.{name}"].double() - 1e-3 * gradient / (gradient.abs() + 1e-7)
        assert torch.allclose(after_step[f"network.{name}"].double(), expected, rtol=0, atol=2e-7), name


def test_decay_shrinks_the_weights_by_rate_times_decay_and_leaves_biases():
    """AdamW (Loshchilov & Hutter 2019): decoupled from the gradient, so the difference to Adam is the decay alone."""
    short = {"epochs": 1, "batch_size": 64, "learning_rate": 1e-2}  # one batch
    one = training(spec=PERIODIC, short=TrainingSpec(**short), symmetries=SYMMETRIES)
    other = training(spec=PERIODIC, short=TrainingSpec(**short, weight_decay=0.5), symmetries=SYMMETRIES)
    before = one.state().tensors
    for each in (one, other):
        list(each.epochs())
    plain, decayed = one.state().tensors, other.state().tensors
    for name, parameter in one.network.named_parameters():
        expected = plain[f"network.{name}"] - (1e-2 * 0.5 * before[f"network.{name}"] if parameter.ndim > 1 else 0)
        assert torch.allclose(decayed[f"network.{name}"], expected, rtol=0, atol=1e-6), name


def test_clipped_gradients_have_the_norm_asked_for():
    short = TrainingSpec(epochs=1, batch_size=64, gradient_clipping=1e-3)  # one batch, with gradients far above
    one = training(short=short)
    list(one.epochs())
    firsts = [tensor / 0.1 for name, tensor in one.state().tensors.items() if name.endswith(".exp_avg")]
    assert torch.cat([first.flatten() for first in firsts]).norm().item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("spec", [PERIODIC, SPEC])
def test_the_averaged_weights_follow_their_recurrence_and_are_what_is_handed_out(spec):
    short = TrainingSpec(epochs=14, batch_size=64, learning_rate=1e-2, ema=0.5)  # a batch an epoch; 14: past the ramp
    one = training(spec=spec, short=short, symmetries=SYMMETRIES)
    average = {name: t for name, t in one.state().tensors.items() if name.startswith("network.")}
    for step, _ in enumerate(one.epochs()):
        decay = min(0.5, (1 + step) / (10 + step))
        tensors = one.state().tensors
        for name, before in average.items():
            now = tensors[name]
            average[name] = decay * before + (1 - decay) * now if now.is_floating_point() else now
            found = tensors["ema." + name.removeprefix("network.")]
            assert torch.allclose(found, average[name], rtol=1e-5, atol=1e-6), (step, name)
    handed = one.last_regressor().network.state_dict()
    assert handed.keys() == {name.removeprefix("network.") for name in average}
    assert all(torch.equal(tensor, tensors[f"ema.{name}"]) for name, tensor in handed.items())


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_the_reported_scores_of_a_symmetric_model_are_those_of_the_model_handed_out(ema):
    short = TrainingSpec(epochs=6, batch_size=8, learning_rate=1e-2, augmentation="symmetry", ema=ema)
    one = training(spec=PERIODIC, short=short, symmetries=SYMMETRIES)
    epochs = list(one.epochs())
    for regressor, expected in ((one.best_regressor(), one.best_nmse), (one.last_regressor(), epochs[-1].metrics)):
        expected = expected if isinstance(expected, float) else expected["val/nmse"]
        predicted = predict(regressor, VALIDATION[0])
        found = scores(predicted, VALIDATION[1], train_variance=TRAIN[1].var(axis=0))
        assert found.nmse == pytest.approx(expected, rel=1e-4), f"seed {SEED}"  # what closing a study asks for
        turned = predict(regressor, np.swapaxes(VALIDATION[0], 2, 3))
        assert turned == pytest.approx(predicted[:, [0, 2, 1]], rel=1e-6)


PHASES = {"matrix": {"lame_lambda": 3.0, "lame_mu": 1.3}, "inclusion": {"lame_lambda": 22.5, "lame_mu": 28.7}}


def stiff(n, *, seed):
    """Cells of blocks and components between the bounds, laid there by the kind of place that is learnt."""
    images = cells.blocks(n, 16, seed=seed)
    share = images.mean((1, 2, 3)) + 0.1 * images[..., :8].mean((1, 2, 3))
    six = torch.from_numpy(np.column_stack([share, share, 0.2 * share, share, 2 * share, share]) - 0.5)
    made = Physics("bounded", PHASES, NAMES)(six, torch.from_numpy(images).double())
    return images, made.numpy()


@pytest.mark.parametrize("kind", ["hill", "bounded"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_with_physics_learns_and_has_the_scores_that_are_reported(kind, symmetric):
    short = TrainingSpec(epochs=8, batch_size=8, learning_rate=1e-2, augmentation="symmetry", ema=0.8)
    spec = PeriodicSpec(width=4, depth=2, stride=2, head=4, physics=kind, symmetric=symmetric)
    parts = {"train": stiff(37, seed=SEED), "validation": stiff(13, seed=SEED + 1)}
    known = {"symmetries": COMPONENT_SYMMETRIES, "phases": PHASES, "target_names": NAMES}
    one = training(spec=spec, short=short, **parts, **known)
    reported = [epoch.metrics["val/nmse"] for epoch in one.epochs()]
    predicted = predict(one.best_regressor(), parts["validation"][0])
    found = scores(predicted, parts["validation"][1], train_variance=parts["train"][1].var(axis=0))
    assert found.nmse == pytest.approx(min(reported), rel=1e-4) and min(reported) < 0.5, f"seed {SEED}"
    other = training(spec=spec, short=short, **parts, **known)
    with pytest.raises(Interrupted):
        list(other.epochs(after(3 * BATCHES + 2)))
    again = training(spec=spec, short=short, state=other.state(), **parts, **known)
    assert [epoch.metrics["val/nmse"] for epoch in again.epochs()] == reported[3:]


@pytest.mark.parametrize("kind", ["hill", "bounded"])
def test_a_model_with_physics_learns_where_components_are_missing(kind):
    short = TrainingSpec(epochs=8, batch_size=8, learning_rate=1e-2, augmentation="symmetry")
    spec = PeriodicSpec(width=4, depth=2, stride=2, head=4, physics=kind)
    images, whole = stiff(37, seed=SEED)
    targets = np.where(
        np.random.default_rng(SEED).random(whole.shape) < [0, 0, 0, 0, 0, 0, 0.3, 0.3, 0.3], np.nan, whole
    )
    known = {"symmetries": COMPONENT_SYMMETRIES, "phases": PHASES, "target_names": NAMES}
    parts = {"train": (images, targets), "validation": stiff(13, seed=SEED + 1)}
    one = training(spec=spec, short=short, **parts, **known)
    assert min(epoch.metrics["val/nmse"] for epoch in one.epochs()) < 0.5, f"seed {SEED}"
    never = whole.copy()
    never[::2, 8] = never[1::2, 7] = np.nan  # no image has all
    with pytest.raises(SpecError, match="expected two training images with all nine components"):
        training(spec=spec, short=short, train=(images, never), validation=parts["validation"], **known)


def test_schedules_have_their_closed_form():
    assert schedule("constant", 0.7) == 1
    assert [schedule("cosine", done) for done in (0, 1 / 3, 0.5, 1)] == pytest.approx([1, 0.75, 0.5, 0])
    steps = 200
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    other = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1.0, total_steps=steps + 1, pct_start=61 / 201)
    for step in range(steps):  # torch counts from its first to its last step
        assert schedule("one-cycle", step / steps) == pytest.approx(other.get_last_lr()[0], abs=1e-6), step
        optimiser.step()
        other.step()


def test_the_learning_rate_follows_the_schedule_and_the_last_one_is_reported():
    short = TrainingSpec(epochs=4, batch_size=8, learning_rate=0.1, schedule="cosine")
    found = [epoch.metrics["learning_rate"] for epoch in training(short=short).epochs()]
    last = [number * BATCHES - 1 for number in (1, 2, 3, 4)]
    assert found == pytest.approx([0.1 * schedule("cosine", step / (4 * BATCHES)) for step in last])


def test_augmentation_helps_where_targets_move_with_the_image():
    def best(augmentation):
        short = TrainingSpec(epochs=40, batch_size=8, learning_rate=3e-3, augmentation=augmentation)
        images = cells.blocks(50, 16, seed=SEED)
        rows, columns = images.std(2).mean((1, 2)), images.std(3).mean((1, 2))
        targets = np.column_stack([images.mean((1, 2, 3)), rows, columns])
        parts = {"train": (images[:25], targets[:25]), "validation": (images[25:], targets[25:])}
        one = training(spec=SPEC, short=short, symmetries=SYMMETRIES, **parts)
        list(one.epochs())
        return one.best_nmse

    assert best("symmetry") < 0.8 * best("none"), f"seed {SEED}"


@pytest.mark.parametrize(
    ("spec", "short", "message"),
    [
        (SPEC, EVERYTHING, "nothing is known of how the targets of this data set change when the image"),
        (PERIODIC, SHORT, 'set training.augmentation = "none" and, if the model has it, model.symmetric = false'),
        (
            TransferSpec(backbone="vgg16"),
            EVERYTHING,
            "augmentation: the features of a frozen backbone are computed once",
        ),
    ],
)
def test_what_needs_symmetries_is_refused_without_them(spec, short, message):
    with pytest.raises(SpecError, match=message):
        training(spec=spec, short=short)
    training(spec=PeriodicSpec(width=4, depth=2, symmetric=False))


def test_labels_scaled_by_a_constant_train_alike_when_standardised():
    tiny = (TRAIN[0], TRAIN[1] * 2.0**-27), (VALIDATION[0], VALIDATION[1] * 2.0**-27)  # exact in binary
    one, other = training(), training(train=tiny[0], validation=tiny[1])
    for epoch, scaled in zip(one.epochs(), other.epochs(), strict=True):
        assert scaled.metrics["val/nmse"] == epoch.metrics["val/nmse"], f"seed {SEED}"
        assert scaled.metrics["val/mse"] == epoch.metrics["val/mse"] * 2.0**-54


def test_unscaled_targets_of_tiny_scale_do_not_beat_the_mean_as_in_the_source_study():
    images, targets = TRAIN
    short = TrainingSpec(epochs=30, batch_size=8, learning_rate=1e-3, target_scaling="none")
    one = training(short=short, train=(images, targets * 1e-8), validation=(VALIDATION[0], VALIDATION[1] * 1e-8))
    epochs = list(one.epochs())
    assert min(epoch.metrics["val/nmse"] for epoch in epochs) > 0.9, f"seed {SEED}"
    assert one.scaling.mean.tolist() == [0, 0, 0]


def test_a_loss_that_is_not_finite_leaves_the_state_of_the_epoch_before():
    one = training(short=TrainingSpec(epochs=50, batch_size=8, learning_rate=1e15))
    done = []
    with pytest.raises(Diverged, match="smaller learning rate") as caught:
        for epoch in one.epochs():
            done.append(epoch.number)
    assert done == list(range(1, caught.value.epoch))
    assert one.state().info["epoch"] == caught.value.epoch - 1
    assert all(tensor.isfinite().all() for tensor in one.state().tensors.values())


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_state_of_an_earlier_version_gets_the_scores_that_it_lacks_to_the_bit(ema):
    short = TrainingSpec(epochs=6, batch_size=8, learning_rate=3e-2, ema=ema)
    whole, begun = training(short=short), training(short=short)
    for _, _ in zip(range(4), begun.epochs(), strict=False):
        pass
    state = begun.state()
    for name in ("best_mse", "last_nmse", "last_mse"):
        del state.info[name]
    resumed = training(short=short, state=state)
    assert resumed.state().info == begun.state().info
    assert [epoch.metrics["val/nmse"] for epoch in resumed.epochs()] == [
        epoch.metrics["val/nmse"] for epoch in whole.epochs()
    ][4:]
    assert resumed.state().info == whole.state().info


def test_a_state_of_another_specification_or_seed_is_refused():
    state = training().state()
    with pytest.raises(SpecError, match="the state's seed is 5, this training's is 6"):
        training(seed=6, state=state)
    with pytest.raises(SpecError, match="the state's model is"):
        training(spec=CnnSpec(filters=8, kernel_size=3, dropout=0.2), state=state)
    with pytest.raises(SpecError, match="the state's training is"):
        training(short=TrainingSpec(), state=state)
    wide = [(np.zeros((len(x), 1, 16, 20), np.float32), y) for x, y in (TRAIN, VALIDATION)]
    with pytest.raises(SpecError, match=r"do not fit this training: adam.dense.weight"):
        training(train=wide[0], validation=wide[1], state=state)


@pytest.mark.parametrize("content", [None, b"", b"no state"])
def test_a_state_file_that_is_missing_or_something_else_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(SpecError, match="x: not a readable training state"):
        load_state(tmp_path / "x")


def test_a_state_file_cut_short_is_named_and_saving_leaves_one_file(tmp_path):
    path = tmp_path / "x"
    save_state(training().state(), path)
    save_state(training().state(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SpecError, match="x: not a readable training state"):
        load_state(path)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((TRAIN[0][:5], TRAIN[1]), r"training split: expected images \(n, c, h, w\) and targets \(n, k\)"),
        ((TRAIN[0][..., :8], TRAIN[1]), "validation split: its shapes .* differ"),
        ((TRAIN[0], TRAIN[1] * np.inf), "training split: expected finite targets"),
        ((TRAIN[0], TRAIN[1] * np.nan), "training split: expected a target for every image"),
        ((TRAIN[0], TRAIN[1] + [0, np.nan, 0]), r"training split: targets \[1\] \(from 0\) have no label there"),
        ((TRAIN[0], TRAIN[1] * [1, 0, 1] + 12.3), r"targets \[1\] \(from 0\) do not vary in the training split"),
    ],
)
def test_arrays_that_cannot_be_trained_on_are_refused(train, message):
    with pytest.raises(SpecError, match=message):
        training(train=train)


def with_gaps(part, *, seed):
    """The split without a third of the labels of its last two targets."""
    gaps = np.random.default_rng(seed).random(part[1].shape) < [0, 1 / 3, 1 / 3]
    return part[0], np.where(gaps, np.nan, part[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_missing_target_has_no_part_in_the_loss_and_its_gradient(weighted):
    short = TrainingSpec(epochs=1, batch_size=64, learning_rate=1e-3, relative=2.0 if weighted else 0.0)
    gaps = with_gaps(TRAIN, seed=SEED)
    one = training(CnnSpec(filters=4, kernel_size=3, dropout=0.0), short, train=gaps)
    network, seen = copy.deepcopy(one.network), {}
    one._optimiser.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in one.network.named_parameters()})
    )
    next(one.epochs())
    outputs = network.train()(torch.from_numpy(gaps[0]))
    there = torch.from_numpy(~np.isnan(gaps[1]))
    scaled = torch.from_numpy(((gaps[1] - one.scaling.mean) / one.scaling.scale).astype(np.float32))
    square = (outputs[there] - scaled[there]) ** 2
    weights = one._train.weights[:, None].expand_as(there)[there] if weighted else 1
    (square * weights).mean().backward()
    for name, parameter in network.named_parameters():
        assert torch.allclose(seen[name], parameter.grad, rtol=1e-4, atol=1e-6), name
    assert square.mean() > 0


@pytest.mark.parametrize("spec", [SPEC, PeriodicSpec(width=4, depth=1)], ids=["cnn", "symmetric"])
def test_scores_of_a_training_with_missing_targets_are_those_of_the_labels_there(spec):
    gaps, checked = with_gaps(TRAIN, seed=SEED), with_gaps(VALIDATION, seed=SEED + 1)
    symmetries = {"flip_vertical": (0, 2, 1), "flip_horizontal": (0, 1, ~2), "transpose": (0, ~1, 2)}
    short = dataclasses.replace(SHORT, augmentation="symmetry" if isinstance(spec, PeriodicSpec) else "none")
    one = training(spec, short, train=gaps, validation=checked, symmetries=symmetries)
    last = list(one.epochs())[-1].metrics
    predicted = predict(one.last_regressor(), checked[0])
    columns = [values[~np.isnan(values)] for values in gaps[1].T]
    assert one.scaling.mean == pytest.approx([values.mean() for values in columns])
    assert one.scaling.variance == pytest.approx([values.var() for values in columns])
    nmse = [
        np.mean((predicted[there, place] - checked[1][there, place]) ** 2) / columns[place].var()
        for place, there in enumerate(~np.isnan(checked[1]).T)
    ]
    assert last["val/nmse"] == pytest.approx(np.mean(nmse), rel=1e-4)
    assert np.isfinite(last["train/nmse"]) and np.isfinite(predicted).all()


def test_relative_errors_weigh_soft_cells_more_and_equal_cells_alike():
    labels = np.array([[1.0, 2.0], [10.0, 20.0], [-0.1, 0.2]])
    found = relative_weights(labels, 5.0)
    expected = 1 + 5.0 / (labels**2).mean(axis=1)
    assert found == pytest.approx(expected / expected.mean())
    assert relative_weights(labels, 0.0) == pytest.approx([1, 1, 1])

    def error_of_the_softest(relative):
        short = TrainingSpec(epochs=60, batch_size=8, learning_rate=3e-3, relative=relative)
        targets = np.exp(6 * TRAIN[0].mean((1, 2, 3)))[:, None]  # a factor of 400
        one = training(short=short, train=(TRAIN[0], targets), validation=(TRAIN[0], targets))
        list(one.epochs())
        soft = targets[:, 0] < np.quantile(targets, 0.3)
        return np.abs(predict(one.last_regressor(), TRAIN[0][soft]) / targets[soft] - 1).mean()

    assert error_of_the_softest(10.0) < 0.7 * error_of_the_softest(0.0), f"seed {SEED}"
