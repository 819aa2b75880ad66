"""What more data would bring: nested parts of the training images, and the power law of the errors."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import records

from data_pipeline.shares import share_of
from hpo import study
from hpo.errors import StudyError
from hpo.planning import earlier
from hpo.planning.preparation import prepare
from hpo.queue import Job, State
from hpo.report import learning
from hpo.scores import learning_curve, power_law
from hpo.scores.standings import Rival
from hpo.study.records import SourceTrial, SplitScores

SHARES = (0.01, 0.125, 0.25, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("case", range(40))
def test_a_smaller_share_is_part_of_every_larger_one(case):
    draw = np.random.default_rng(case)
    n = int(draw.integers(4, 300))
    train = draw.permutation(n)[: max(2, int(0.7 * n))]
    groups = tuple(map(str, draw.integers(0, draw.integers(1, n), n))) if case % 2 else None
    parts = [share_of(train, groups, share, seed=case) for share in SHARES]
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller) <= set(larger)
    assert np.array_equal(parts[-1], train), "all, in their order: the training is that without a share"
    labels = train if groups is None else np.array(groups)[train]
    largest = np.unique(labels, return_counts=True)[1].max()
    for share, part in zip(SHARES, parts, strict=True):
        assert round(share * len(train)) <= len(part) < max(1, round(share * len(train))) + largest
        if groups is not None:
            kept, left = ({groups[index] for index in side} for side in (part, set(train) - set(part)))
            assert not kept & left, "groups are whole"


def test_another_seed_draws_another_share():
    train = np.arange(100)
    first, again, other = (share_of(train, None, 0.25, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and len(first) == len(other) == 25 and set(first) != set(other)


def trained(seed, *, exponent, floor=0.0, deviation=0.05, repeats=3):
    """Errors 2 / images^exponent + floor of trainings on shares of 364 images, with log-normal noise."""
    shares = np.repeat([0.125, 0.25, 0.5, 1.0], repeats)
    images = np.round(364 * shares)
    noise = np.exp(deviation * np.random.default_rng(seed).standard_normal(len(images)))
    return images, (2 * images**-exponent + floor) * noise, shares


def test_errors_on_a_power_law_give_the_law_back():
    images, errors, shares = trained(0, exponent=0.35, deviation=0.0)
    law = power_law.fit(images, errors, shares)
    assert law.exponent == pytest.approx(0.35, rel=1e-6) and law.twice == pytest.approx(2 * 728**-0.35, rel=1e-6)
    assert law.now == pytest.approx(2 * 364**-0.35, rel=1e-6) and not law.is_flat and not law.is_poor
    assert law.twice / law.now == pytest.approx(2**-0.35)


@pytest.mark.parametrize(
    ("exponent", "floor"),
    [
        (0.35, 0.0),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0.0, 0.0), (1.0, 0.0), (0.8, 0.1), (0.5, 0.02))),
    ],
)
def test_the_interval_holds_what_twice_the_images_bring(exponent, floor):
    laws = [power_law.fit(*trained(seed, exponent=exponent, floor=floor)) for seed in range(200)]
    truth = 2 * 728**-exponent + floor
    covered = sum(law.twice_interval[0] <= truth <= law.twice_interval[1] for law in laws)
    assert covered >= 0.9 * len(laws), "95 %, less what 200 repeats may miss it by"
    if not floor:
        covered = sum(law.exponent_interval[0] <= exponent <= law.exponent_interval[1] for law in laws)
        assert 0.9 * len(laws) <= covered < len(laws)


def test_a_flat_curve_and_one_that_is_no_power_law_are_told():
    flat = power_law.fit(*trained(1, exponent=0.0))
    assert flat.is_flat and not flat.is_poor
    images, _, shares = trained(0, exponent=0.0)
    bent = np.where(shares < 1, 0.5, 0.1) * np.exp(0.01 * np.random.default_rng(0).standard_normal(len(images)))
    assert power_law.fit(images, bent, shares).is_poor


def test_a_law_takes_three_shares_and_errors_above_zero():
    images, errors, shares = trained(0, exponent=0.5)
    few = shares > 0.3
    assert power_law.fit(images[few], errors[few], shares[few]) is None
    assert power_law.fit(images, 0 * errors, shares) is None


def finished(number, repeat, **values):
    """A trial that was trained to its end."""
    known = dict.fromkeys(("id", "cost", "attempt", "fence", "epochs", "changed_at"), 0)
    known |= dict.fromkeys(("config", "worker", "checkpoint", "reason"))
    known |= {"study": "drawn", "kind": "trial", "state": State.DONE, "mirrored": True, "alive": False}
    return Job(**known, number=number, repeat=repeat, run_id=f"{number}/{repeat}", **values)


def curve_of(errors, images, shares):
    """The curve of a study whose trainings on these shares have the errors (n,) as the RMSE of C11."""
    jobs = []
    for number, (error, count, share) in enumerate(zip(errors, images, shares, strict=True)):
        result = records.result(error**2, images=int(count) if share < 1 else None)
        scores = replace(result.validation, nrmse=error / 10, per_target={"mse": [error**2]})
        spec = records.spec(point={"filters": 8, "share": float(share)})
        jobs.append(finished(number // 3, number % 3, spec=spec, result=replace(result, validation=scores)))
    predictor = SplitScores(validation=replace(records.result(1.0).validation, per_target={"mse": [4.0]}))
    predictors = {"mean": predictor, "volume fraction": predictor}
    data = replace(records.DATA, sizes=(364, 78, 78))
    row = records.study_row("drawn", facts=records.facts(data=data, predictors=predictors))
    return learning_curve.of_study(row, jobs)


def test_the_table_has_each_target_in_its_unit_beside_the_baseline_predictors():
    images, errors, shares = trained(3, exponent=0.35)
    curve = curve_of(errors, images, shares)
    assert (curve.sizes, curve.point) == ((46, 91, 182, 364), {"filters": 8})
    overall, first = (row.values for row in learning.table(curve).rows)
    assert (overall["target"], first["target"]) == ("all, mean NRMSE", "C11 [GPa]")
    assert first["364 images"] == pytest.approx(errors[-3:].mean()) and first["volume fraction, cubic"] == 2.0
    law = curve.errors[1].law
    assert first["728 images, forecast"] == law.twice and first["728 images, forecast 95 % low"] < law.twice
    (line,) = learning.lines(curve)
    assert line.startswith("Twice the training images (728) would bring the mean NRMSE from 0.02")
    assert learning.metrics(curve)["learning_curve_slope"] == pytest.approx(law.exponent)
    assert learning.picture(curve).svg.startswith("<svg")


def test_a_curve_without_a_forecast_says_so():
    images, errors, shares = trained(1, exponent=0.0)
    assert (
        "does not fall measurably from 46 to 364 training images" in learning.lines(curve_of(errors, images, shares))[0]
    )
    bent = curve_of(np.where(shares < 1, 0.5, 0.1) * (1 + 0.001 * np.arange(12)), images, shares)
    assert learning.lines(bent)[0].startswith("No forecast: a power law does not describe")
    assert learning.metrics(bent)["forecast_val_nrmse"] is None
    few = shares > 0.3
    assert (
        "expected trainings on 3 or more shares" in learning.lines(curve_of(errors[few], images[few], shares[few]))[0]
    )
    assert curve_of(errors[:3], images[:3], shares[:3]) is None, "one share is no curve"


def test_the_configuration_of_a_learning_curve_is_planned_on_each_share():
    curve, grid = study.load("learning-curve"), study.load("grid")
    assert (curve.best_of, curve.trials, curve.shares) == (grid, 4, (0.125, 0.25, 0.5, 1.0))
    assert curve.scope.format("grid") == "the best configuration of grid on 4 shares of the training images"
    sources = [SourceTrial(study="grid", trial=22, run_id="r", point=point) for point in grid.grid()[22:23]]
    planned = [source.point for source in earlier.with_shares(curve, sources)]
    assert planned == [grid.grid()[22] | {"share": share} for share in curve.shares]
    whole = curve.canonical(data_digest="d", split_digest="s")
    assert study.restore("learning-curve", whole).canonical(data_digest="d", split_digest="s") == whole
    other = study.load("learning-curve", ["best_of=baseline", "space.share=[0.5, 1.0]", "training.epochs=7"])
    assert other.best_of.name == "baseline" and other.trials == 2 and other.best_of.training["epochs"] == 7
    for override, message in (
        ("learning-curve:space.filters=[8]", "unknown key 'space.filters'. Valid keys here: share"),
        ("space.share={low = 0.1, high = 1.0}", "expected a list of shares of the training images"),
        ("space.share=[0.5, 2.0]", "share = 2.0; expected a number, above 0 and at most 1"),
    ):
        with pytest.raises(StudyError, match=re.escape(message)):
            study.load("learning-curve", [override])


def test_a_learning_curve_does_not_decide_which_configuration_is_best():
    spec = records.spec(point={"share": 1.0}, best_of=SourceTrial(study="grid", trial=0, run_id="r"))
    rival = Rival(row=records.study_row("of-shares"), jobs=[finished(0, 0, spec=spec, result=records.result(0.1))])
    assert rival.answers() == {}


def test_shares_that_are_too_small_are_refused_before_anything_is_planned(data):
    words = [f"data.path={data}", "training.epochs=1", "best_of=baseline"]
    with pytest.raises(StudyError, match=r"trains on 0\.02 of 42 training images, which are 1 with the seed 1"):
        prepare(study.load("learning-curve", [*words, "space.share=[0.02, 1.0]"]))
    assert prepare(study.load("learning-curve", words)).study.trials == 4
