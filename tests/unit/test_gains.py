"""What a network gains over a baseline predictor, and the interval that decides whether it may be champion."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import records

from hpo.queue import State
from hpo.queue.closing_result import Gain
from hpo.report import promotion
from hpo.scores import gains
from hpo.scores.verdict import verdict

IMAGES, TARGETS = 78, 3
ONE = np.ones(TARGETS)
REPEATS = 200


def gain(baseline, networks, *, variance=ONE, groups=None) -> Gain:
    return gains.gain(baseline, networks, variance=variance, groups=groups)


def of_noise(random: np.random.Generator, *, trials: int, images: int = IMAGES) -> tuple[np.ndarray, list[np.ndarray]]:
    """Squared errors of the mean predictor and, the best first, of networks that add noise to it: none is better."""
    missed = random.standard_normal((images, TARGETS))
    errors = [(missed + 0.03 * random.standard_normal(missed.shape)) ** 2 for _ in range(trials)]
    return missed**2, sorted(errors, key=np.mean)


def test_the_gain_is_the_difference_of_the_nmse_and_certain_if_every_image_gains():
    random = np.random.default_rng(0)
    baseline, variance = random.chisquare(1, (IMAGES, TARGETS)), np.array([1.0, 4.0, 0.25])
    result = gain(baseline, [0.2 * baseline, 0.4 * baseline], variance=variance)
    nmse = (baseline.mean(axis=0) / variance).mean()
    assert result.gain == pytest.approx(0.8 * nmse, rel=1e-5)
    assert 0 < result.low < result.gain and result.is_certain
    assert (result.trials, result.drawn, result.unit, result.seed) == (2, IMAGES, "image", gains.SEED)


def test_the_same_errors_give_the_same_bits():
    baseline, networks = of_noise(np.random.default_rng(1), trials=10)
    assert gain(baseline, networks) == gain(baseline.copy(), [errors.copy() for errors in networks])


def test_a_network_that_is_the_mean_or_no_better_is_not_certain():
    baseline, networks = of_noise(np.random.default_rng(2), trials=1)
    assert gain(baseline, [baseline]).gain == 0.0 and not gain(baseline, [baseline]).is_certain
    assert not gain(baseline, [1.1 * baseline, *networks]).is_certain


def test_networks_of_noise_become_champion_in_at_most_a_twentieth_of_the_cases():
    """Without selecting the best of ten again in each resample, a third of them would."""
    certain = {"best of ten": 0, "winner alone": 0}
    for seed in range(REPEATS):
        baseline, networks = of_noise(np.random.default_rng(seed), trials=24)
        certain["best of ten"] += gain(baseline, networks[: gains.TRIALS]).is_certain
        certain["winner alone"] += gain(baseline, networks[:1]).is_certain
    assert certain["best of ten"] <= 0.05 * REPEATS
    assert certain["winner alone"] > 0.25 * REPEATS


@pytest.mark.slow
def test_networks_of_noise_pass_more_often_if_each_is_the_best_of_ten_epochs():
    """What docs/reference/report.md says of the epoch, which is not selected again."""
    certain = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        missed = random.standard_normal((IMAGES, TARGETS))
        trials = [
            [(missed + 0.03 * random.standard_normal(missed.shape)) ** 2 for epoch in range(10)] for trial in range(24)
        ]
        networks = sorted((min(epochs, key=np.mean) for epochs in trials), key=np.mean)
        certain += gain(missed**2, networks[: gains.TRIALS]).is_certain
    assert 15 <= certain <= 40


@pytest.mark.parametrize("images", [6, 9, 20])
def test_few_images_make_a_champion_of_a_good_network_and_not_of_noise(images):
    random = np.random.default_rng(100 + images)
    cases = [of_noise(random, trials=4, images=images) for _ in range(REPEATS)]
    assert sum(gain(baseline, networks).is_certain for baseline, networks in cases) <= 0.05 * REPEATS
    good = [(baseline, [0.05 * networks[0], 0.1 * networks[0]]) for baseline, networks in cases]
    assert sum(gain(*case).is_certain for case in good) >= 0.75 * REPEATS


def test_constants_beside_the_mean_of_training_are_no_champions():
    """All-black images: each network predicts one constant, and the best happens to lie on the right side."""
    certain = 0
    for seed in range(REPEATS):
        random = np.random.default_rng(seed)
        missed = random.standard_normal((IMAGES, 1)) + random.standard_normal() / np.sqrt(364)
        constants = 0.02 * random.standard_normal(8)
        networks = sorted(((missed - constant) ** 2 for constant in constants), key=np.mean)
        certain += gain(missed**2, networks, variance=np.ones(1)).is_certain
    assert certain <= 0.05 * REPEATS


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_gain_that_one_image_makes_is_not_certain(share):
    """An outlier of 1e6 among the labels: whatever the network says of that image decides the whole score."""
    random = np.random.default_rng(4)
    baseline = random.chisquare(1, (IMAGES, TARGETS))
    network = 0.2 * baseline
    baseline[7, 0], network[7, 0] = 1e12, share * 1e12
    result = gain(baseline, [network, 1.01 * network])
    assert not result.is_certain and result.gain == pytest.approx((1 - share) * 1e12 / IMAGES / TARGETS, rel=1e-3)


def test_a_wild_tenth_network_does_not_cast_doubt_on_a_good_first_one():
    random = np.random.default_rng(5)
    baseline = random.chisquare(1, (IMAGES, TARGETS))
    wild = 50 * random.chisquare(1, (IMAGES, TARGETS)) ** 3
    assert gain(baseline, [0.2 * baseline, 0.3 * baseline, wild]).is_certain


def test_missing_labels_count_in_no_image_and_targets_that_do_not_vary_in_no_score():
    random = np.random.default_rng(6)
    baseline = random.chisquare(1, (IMAGES, TARGETS))
    network = baseline * random.uniform(0, 0.5, baseline.shape)
    whole = gain(baseline, [network])
    beside = np.column_stack([baseline, baseline[:, 0], np.full(IMAGES, np.nan)])
    same = np.column_stack([network, 9 * network[:, 0], np.full(IMAGES, np.nan)])
    assert gain(beside, [same], variance=np.array([1, 1, 1, 0, 1.0])) == whole
    baseline[random.random(baseline.shape) < 0.4] = np.nan
    result = gain(baseline, [network])
    assert result.gain == pytest.approx(np.nanmean(baseline - network, axis=0).mean(), rel=1e-5)
    assert result.is_certain and result.high - result.low > whole.high - whole.low


def test_images_that_belong_together_are_resampled_together():
    """Copies of an image say nothing new: as groups they give the interval of the images themselves."""
    random = np.random.default_rng(7)
    baseline = random.chisquare(1, (20, TARGETS))
    network = baseline * random.uniform(0.2, 1.4, baseline.shape)
    groups = np.repeat(np.arange(20), 6)
    once = gain(baseline, [network])
    six = gain(baseline.repeat(6, axis=0), [network.repeat(6, axis=0)], groups=groups)
    assert (six.low, six.high) == pytest.approx((once.low, once.high), rel=1e-5)
    assert (six.drawn, six.unit) == (20, "image group")
    assert gain(baseline.repeat(6, axis=0), [network.repeat(6, axis=0)]).low > once.low, "more images than there are"


def test_images_of_two_groups_are_resampled_one_by_one_and_that_is_said():
    random = np.random.default_rng(7)
    baseline = random.chisquare(1, (14, TARGETS))
    few = gain(baseline, [0.1 * baseline], groups=np.repeat([3, 8], 7))
    assert few == replace(gain(baseline, [0.1 * baseline]), groups=2) and few.is_certain
    assert gain(baseline, [0.1 * baseline], groups=np.arange(14)).groups is None
    (sentence,) = promotion.gains(SimpleNamespace(gains={"mean": few}))
    assert "(bootstrap over 14 images one by one, for 2 groups are too few, best of 1 trial)" in sentence
    assert not gain(baseline[:1], [0 * baseline[:1]], groups=np.zeros(1)).is_certain


def test_a_single_image_or_an_infinite_error_gives_no_interval():
    baseline, networks = of_noise(np.random.default_rng(8), trials=2)
    assert gain(baseline[:1], [0 * baseline[:1]]).low is None
    networks[1][3, 0] = np.inf
    assert not gain(baseline, networks).is_certain


def test_many_images_take_no_more_memory_than_a_block():
    random = np.random.default_rng(9)
    baseline = random.chisquare(1, (3000, 1))
    blocks = list(gains._resamples(3000))
    assert sum(len(block) for block in blocks) == gains.RESAMPLES and max(block.size for block in blocks) <= gains.BLOCK
    assert all(block.sum(axis=1) == pytest.approx(1) for block in blocks)
    assert gain(baseline, [0.5 * baseline], variance=np.ones(1)).is_certain


# Which trials are compared


def trial(number: int, nmse: float, repeat: int = 0):
    result = records.result(nmse)
    known = {"kind": "trial", "state": State.DONE, "spec": None, "is_refit": False}
    return SimpleNamespace(**known, id=100 * number + repeat, number=number, repeat=repeat, result=result)


def test_the_ten_best_trials_are_the_winner_its_repeats_and_those_behind_it():
    jobs = [trial(number, 0.1 + number / 100) for number in range(30)] + [trial(3, 0.01, repeat=1)]
    winner = jobs[-1]  # its point's mean is the lowest
    assert [one.id for one in (winner, *gains.contenders(jobs, winner))][:4] == [301, 300, 0, 100]
    assert len(list(gains.contenders(jobs, jobs[25]))) == 4, "those that it has beaten"


class Stored:
    """The queue, as far as errors are read from it."""

    def __init__(self, arrays):
        self.arrays = arrays

    def validation(self, jobs):
        return {job: self.arrays.get(job, {}) for job in jobs}


def test_of_trials_without_stored_errors_the_winner_is_judged_alone():
    baseline, networks = of_noise(np.random.default_rng(10), trials=3)
    closing = {"kind": "closing", "state": State.DONE, "spec": None, "is_refit": False}
    jobs = [SimpleNamespace(**closing, id=1, number=-1, result=None)]
    jobs += [trial(number, float(errors.mean())) for number, errors in enumerate(networks, start=1)]
    beside = {"mean": baseline, "volume fraction": baseline, "variance of the training labels": ONE}
    winner = jobs[1]
    assert gains.of_trial(Stored({winner.id: {"network": networks[0]}}), jobs, winner) is None, (
        "an earlier hpo closed it"
    )
    assert gains.beats_mean(Stored({}), jobs, winner), "earlier champions stay eligible"
    alone = gains.of_trial(Stored({1: beside, winner.id: {"network": networks[0]}}), jobs, winner)
    assert alone["mean"] == gain(baseline, networks[:1]) and alone["mean"].trials == 1
    assert alone.keys() == {"mean", "volume fraction"}, "it has fitted no ridge"
    more = gains.of_trial(
        Stored({1: beside | {"descriptors": 2 * baseline}, winner.id: {"network": networks[0]}}), jobs, winner
    )
    assert more["descriptors"] == gain(2 * baseline, networks[:1])
    stored = {job.id: {"network": errors} for job, errors in zip(jobs[1:], networks, strict=True)}
    assert gains.of_trial(Stored({1: beside} | stored), jobs, winner)["mean"] == gain(baseline, networks)


def test_the_verdict_names_the_first_baseline_predictor_that_is_not_certainly_worse():
    def predictors(nmse):
        return {
            name: SimpleNamespace(validation=records.result(nmse).validation)
            for name in ("mean", "volume fraction", "descriptors")
        }

    def known(**low):
        names = {"mean": "mean", "cubic": "volume fraction", "ridge": "descriptors"}
        more = {"gain": 0.1, "high": 1.0, "trials": 1, "drawn": 9, "unit": "image", "resamples": 2, "seed": 0}
        return {names[name]: Gain(low=value, **more) for name, value in low.items()}

    validation = records.result(0.5).validation
    assert verdict(validation, predictors(0.4), known(mean=1, cubic=1)) == "below mean"
    assert verdict(validation, predictors(0.6), known(mean=-1, cubic=1)) == "not distinguishable from the mean"
    assert (
        verdict(validation, predictors(0.6), known(mean=1, cubic=0)) == "not distinguishable from the volume fraction"
    )
    assert verdict(validation, predictors(0.6), known(mean=None, cubic=1)) == "not distinguishable from the mean"
    assert (
        verdict(validation, predictors(0.6), known(mean=1, cubic=1)) == verdict(validation, predictors(0.6)) == "good"
    )
    ridge = predictors(0.6) | {"descriptors": predictors(0.4)["descriptors"]}
    assert verdict(validation, ridge, known(mean=1, cubic=1)) == "good", "of folds no gain over it is known"
    assert verdict(validation, ridge, known(mean=1, cubic=1, ridge=1)) == "below descriptors"
    assert verdict(validation, predictors(0.6), known(mean=1, cubic=1, ridge=1)) == "good"
    last = verdict(validation, predictors(0.6), known(mean=1, cubic=1, ridge=0))
    assert last == "not distinguishable from the descriptors"
