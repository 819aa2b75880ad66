"""Cross-validation: each image outside the test split validates in exactly one fold, groups and copies together."""

import threading
from dataclasses import replace

import cells
import folders
import numpy as np
import pandas
import pytest
import records
import torch

from data_pipeline import npz
from data_pipeline.dataset import DEFAULT, load
from data_pipeline.folds import digest, folds, whole
from data_pipeline.parts import SplitProblem
from hpo import study
from hpo.errors import StudyError
from hpo.planning.preparation import prepare
from hpo.queue import Job, Pace, Present, State
from hpo.report.forecast import RECORD, Forecast
from hpo.report.progress import Progress
from hpo.scores import gains, ranking
from hpo.scores.standings import Rival, Standing, standings
from hpo.search import sampling
from hpo.study.records import Fold, Refit
from hpo.worker import inputs, protocol, scoring, train_trial
from models import metrics, specs
from models.training import Training


@pytest.fixture(scope="module")
def default():
    return load(DEFAULT)


@pytest.mark.parametrize("count", [2, 5, 442])
def test_each_image_outside_the_test_split_validates_in_exactly_one_fold(default, count):
    parts, outside = folds(default, count), np.r_[default.split.train, default.split.validation]
    assert sorted(np.concatenate([part.validation for part in parts])) == sorted(outside)
    for part in parts:
        assert sorted(np.r_[part.train, part.validation]) == sorted(outside)
    sizes = [len(part.validation) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and len(parts) == count


def test_the_test_images_are_in_no_fold(default):
    for part in folds(default, 5):
        assert np.array_equal(part.test, default.split.test)
        assert not set(part.test) & set(np.r_[part.train, part.validation])
    assert np.array_equal(whole(default.split).test, default.split.test)
    assert len(whole(default.split).train) == 364 + 78 and not len(whole(default.split).validation)


def test_the_folds_are_the_same_again_and_others_for_another_number(default):
    assert digest(folds(default, 5)) == digest(folds(replace(default), 5)) != digest(folds(default, 4))


def test_no_group_is_in_two_folds_also_from_the_file_that_trainers_read(tmp_path):
    folders.simulations(tmp_path / "data")
    data = load(tmp_path / "data")
    npz.save_npz(data, tmp_path / "data.npz")
    again = npz.load_npz(tmp_path / "data.npz")
    parts, groups = folds(data, 5), np.array(data.groups)
    sides = [set(groups[part.validation]) for part in parts]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 5 == len(set(groups) - set(groups[data.split.test]))
    assert digest(folds(again, 5)) == digest(parts)
    with pytest.raises(SplitProblem, match="at most 5, the number of groups of images outside the test split, found 6"):
        folds(data, 6)


def test_equal_images_are_in_one_fold(default):
    outside = np.r_[default.split.train, default.split.validation]
    pairs = outside[:80].reshape(2, 40)
    images = default.images.copy()
    images[pairs[1]] = images[pairs[0]]
    for part in folds(replace(default, images=images), 5):
        assert np.array_equal(np.isin(pairs[0], part.validation), np.isin(pairs[1], part.validation))


def test_more_folds_than_images_are_refused_with_both_numbers(default):
    with pytest.raises(SplitProblem, match="at most 442, the number of images outside the test split, found 443"):
        folds(default, 443)


def test_the_mean_over_folds_is_none_where_a_fold_has_no_score():
    labels = [np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([[1.0, 2.0], [2.0, 4.0]])]
    variance = np.array([2.0, 4.0])
    each = [metrics.scores(values + 1, values, train_variance=variance) for values in labels]
    mean = metrics.mean_of(each)
    assert mean.nmse == pytest.approx((1 / 2 + 1 / 4) / 2) and mean.mse == 1
    assert mean.per_target["r2"] == [pytest.approx((0 + 1 - 1 / 0.25) / 2), None], "a target that varies in one fold"
    assert metrics.mean_of(each[:1]).to_dict() == each[0].to_dict()


# The study file

STUDY = """
[model]
family = "cnn"
kernel_size = 3
dropout = 0.0
[space]
filters = [1, 2]
[training]
epochs = 6
batch_size = 8
[data]
"""


def load_study(tmp_path, text="", *overrides):
    (tmp_path / "cv.toml").write_text(STUDY + text)
    return study.load(str(tmp_path / "cv.toml"), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.folds=1"], "data.folds: expected a whole number from 2 to 100, found 1."),
        (["data.folds=101"], "data.folds: expected a whole number from 2 to 100, found 101."),
        (["data.folds=0"], "data.folds: expected a whole number from 2 to 100, found 0."),
        (["data.folds=2.5"], "data.folds: expected a whole number, found 2.5."),
        (["data.folds=true"], "data.folds: expected a whole number, found True."),
        (["data.folds=five"], "data.folds: expected a whole number, found 'five'."),
        (["data.fold=5"], "unknown key 'data.fold'. Did you mean 'folds'?"),
        (["data.folds=5", "repeats=2"], "data.folds and repeats do not go together"),
        (["data.folds=5", "training.start_from=@champion"], "data.folds and training.start_from do not go together"),
        (["data.folds=5", "pruner.name=median"], "data.folds and a pruner do not go together"),
    ],
)
def test_each_wrong_number_of_folds_gets_one_message(tmp_path, overrides, message):
    with pytest.raises(StudyError) as caught:
        load_study(tmp_path, "", *overrides)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_second_phase_has_no_folds_nor_has_its_first():
    for overrides in (["data.folds=5"], ["tl-head:data.folds=5"], ["tl-finetune:data.folds=5"]):
        with pytest.raises(StudyError, match="starts from the networks of another one has no folds, nor has the other"):
            study.load("tl-finetune", overrides)


def test_folds_are_part_of_the_identity_and_their_absence_leaves_it(tmp_path):
    plain, folded = load_study(tmp_path), load_study(tmp_path, "folds = 5")
    digests = {"data_digest": "d", "split_digest": "s"}
    canonical = folded.canonical(**digests, folds_digest="f")
    assert canonical == plain.canonical(**digests) | {"folds": {"count": 5, "digest": "f"}}
    assert "folds" not in plain.canonical(**digests) and (plain.trainings, folded.trainings) == (1, 5)
    assert study.restore("cv", canonical).canonical(**digests, folds_digest="f") == canonical
    assert load_study(tmp_path, "", "data.folds=5").folds == 5


def test_best_configurations_are_trained_again_in_the_same_folds(tmp_path):
    load_study(tmp_path)
    (tmp_path / "again.toml").write_text('best_of = "./cv.toml"\npoints = 1\n')
    again = study.load(str(tmp_path / "again.toml"), ["data.folds=4"])
    assert (again.folds, again.best_of.folds, again.trainings, again.seed) == (4, 4, 4, 1)
    with pytest.raises(StudyError, match=r"data\.folds and repeats do not go together"):
        study.load(str(tmp_path / "again.toml"), ["data.folds=4", "again:repeats=3"])


def test_a_plan_has_a_trial_for_each_fold_and_their_mean_of_each_predictor(tmp_path):
    plan = prepare(load_study(tmp_path, "folds = 3"))
    specs = [spec for spec, _ in plan.specs()]
    assert [(spec.config, spec.fold.number) for spec in specs] == [(c, f) for f in range(3) for c in range(2)]
    assert {(spec.seed, spec.fold.count, spec.fold.digest) for spec in specs} == {(0, 3, digest(plan.folds))}
    assert specs[3].params() | {"fold": 1, "folds": 3, "seed": 0} == specs[3].params()
    each = []
    for part in plan.folds:
        learned, validation = (plan.dataset.targets[side] for side in (part.train, part.validation))
        predicted = np.tile(learned.mean(axis=0), (len(validation), 1))
        each.append(metrics.scores(predicted, validation, train_variance=learned.var(axis=0)).nmse)
    assert plan.facts.predictors["mean"].validation.nmse == pytest.approx(sum(each) / 3) and len(set(each)) == 3


def test_folds_that_the_data_do_not_admit_are_refused(tmp_path):
    folders.simulations(tmp_path / "data")
    with pytest.raises(StudyError, match=r"data\.folds: expected at most 5, the number of groups .* found 6"):
        prepare(load_study(tmp_path, 'path = "data"\nfolds = 6'))
    folders.missing(tmp_path / "few")
    (tmp_path / "few" / "dataset.toml").write_text('missing = "mask"')
    with pytest.raises(StudyError, match=r"few: data\.folds: fold \d+ of 20: .* has no label in the validation split"):
        prepare(load_study(tmp_path, 'path = "few"\nfolds = 20'))


# What is decided on their scores


def job(number, fold, value, *, epoch=1, state="done", refit=None):
    if refit is None:
        spec = records.spec(point={"filters": number}, fold=Fold(number=fold, count=3, digest="f"))
    else:
        spec = records.spec(point={"filters": number}, refit=refit)
    return Job(
        study="cv", kind="trial", number=number, repeat=fold, state=State(state), spec=spec, mirrored=True, alive=False,
        **dict.fromkeys(("config", "worker", "checkpoint", "reason")),
        **dict.fromkeys(("id", "cost", "attempt", "fence", "epochs", "changed_at"), 0),
        run_id=f"{number}/{fold}", result=records.result(value, best_epoch=epoch) if state == "done" else None,
    )  # fmt: skip


LUCKY = [job(0, fold, value) for fold, value in enumerate((0.1, 0.5, 0.6))]
STEADY = [job(1, fold, value, epoch=epoch) for fold, (value, epoch) in enumerate(((0.3, 9), (0.35, 2), (0.25, 4)))]
PARTIAL = [job(2, 0, 0.01), job(2, 1, 0.01), job(2, 2, 0.0, state="dead")]


def test_the_mean_over_folds_decides_not_the_best_fold():
    points = ranking.points([*LUCKY, *STEADY])
    assert [(best.number, score) for best, score in points] == [(1, pytest.approx(0.3)), (0, pytest.approx(0.4))]
    assert ranking.spread(STEADY) == (pytest.approx(0.3), pytest.approx(0.05))
    assert sampling.together(LUCKY) == (State.DONE, pytest.approx(0.4))


def test_a_configuration_that_lacks_a_fold_does_not_win_and_has_no_value():
    jobs = [*PARTIAL, *STEADY]
    assert [best.number for best in ranking.ranked(jobs)] == [1, 2]
    assert [best.number for best in ranking.winners(jobs, ["filters"])] == [1]
    assert ranking.winners(PARTIAL, []) == []
    assert sampling.together(PARTIAL) == (State.DEAD, None)
    assert ranking.incomplete(PARTIAL) == "2 of 3 folds, 1 dead"


def test_the_refit_has_the_median_best_epoch_and_stands_for_the_mean_over_folds():
    refit = ranking.refit_of(STEADY)
    assert (refit.epochs, refit.folds, refit.nmse, refit.deviation) == (4, 3, pytest.approx(0.3), pytest.approx(0.05))
    assert refit.validation.nmse == pytest.approx(0.3)
    assert ranking.network([*LUCKY, *STEADY], STEADY[2]) is None, "not trained yet"
    done = job(1, 3, refit.nmse, refit=refit)
    jobs = [*LUCKY, *STEADY, done]
    assert ranking.network(jobs, STEADY[2]) == done and done.title == "trial 1 of cv, refit"
    assert ranking.spread(ranking.repeats(jobs)[1])[0] == refit.nmse, "it is none of the folds"
    rival = Rival(row=records.study_row("cv"), jobs=jobs)
    assert standings([rival])["1/3"] == Standing(point=refit.nmse, own=refit.nmse)
    assert ranking.best_network(jobs) == done and ranking.best_network(STEADY) is None
    failed = [*LUCKY, *STEADY, job(1, 3, 0.0, state="diverged", refit=refit)]
    assert [best.number for best in ranking.winners(failed, [])] == [0], "the next one is trained again"


class Stored:
    """The queue, as far as errors are read from it."""

    def __init__(self, arrays):
        self.arrays = arrays

    def validation(self, jobs):
        return {job: self.arrays.get(job, {}) for job in jobs}


def test_the_gain_of_a_refit_is_that_of_its_folds_on_their_own_images():
    draw = np.random.default_rng(5)
    one, other = [[replace(fold, id=10 * fold.number + fold.repeat + 1) for fold in own] for own in (STEADY, LUCKY)]
    errors = {fold.id: {"network": draw.chisquare(1, (8 + fold.repeat, 2))} for fold in (*one, *other)}
    mean = draw.chisquare(1, (8 + 9 + 10, 2)) + 1
    baselines = {"mean": mean, "volume fraction": mean, "variance of the training labels": np.ones(2)}
    refit = replace(job(1, 3, 0.3, refit=ranking.refit_of(STEADY)), id=99)
    closing = replace(refit, kind="closing", id=50, number=-1, spec=None, result=None)
    jobs = [closing, *one[::-1], *other, refit, *PARTIAL]
    gained = gains.of_trial(Stored({50: baselines} | errors), jobs, refit)["mean"]
    whole = [np.concatenate([errors[fold.id]["network"] for fold in own]) for own in (one, other)]
    assert gained == gains.gain(mean, whole, variance=np.ones(2), groups=None)
    assert gained.gain == pytest.approx((mean - whole[0]).mean(axis=0).mean(), rel=1e-4) and gained.trials == 2
    del errors[one[0].id]
    assert gains.of_trial(Stored({50: baselines} | errors), jobs, refit) is None, "a fold is missing"


# In the trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fold and the refit, each trained in the trainer's functions, with the data set's file."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    data = load(cells.make(folder / "data", count=60))
    npz.save_npz(data, folder / "set.npz")
    fold = Fold(number=1, count=3, digest=digest(folds(data, 3)))
    scores = records.result(0.5, target_names=data.target_names).validation
    refit = Refit(epochs=4, folds=3, nmse=0.5, mse=1.0, deviation=0.1, validation=scores)
    epochs: dict[str, list] = {"fold": [], "refit": []}
    results = {}
    for name, part in (("fold", fold), ("refit", refit)):
        spec = records.spec(
            model={"family": "cnn", "filters": 2, "kernel_size": 3, "dropout": 0.0},
            training={"epochs": 6, "batch_size": 8, "schedule": "cosine"},
            **{name: part},
        )
        request = protocol.Train(
            spec=spec, data=folder / "set.npz", checkpoint=None, start=None, folder=folder / name,
            cache=folder / "cache", device="cpu", checkpoint_interval=60.0,
        )  # fmt: skip
        results[name] = train_trial.train(request, epochs[name].append, threading.Event())
    return (
        data,
        results,
        {name: [m for m in said if isinstance(m, protocol.EpochDone)] for name, said in epochs.items()},
    )


def test_a_fold_is_validated_on_its_own_images(trained):
    data, results, _ = trained
    table = pandas.read_csv(results["fold"].predictions)
    part = folds(data, 3)[1]
    assert table["image"].tolist() == [data.names[index] for index in part.validation]
    truth, predicted = (table[[f"{name} {kind}" for name in data.target_names]] for kind in ("true", "predicted"))
    variance = data.targets[part.train].var(axis=0)
    nmse = metrics.scores(predicted.to_numpy(), truth.to_numpy(), train_variance=variance).nmse
    assert results["fold"].best_val_nmse == pytest.approx(nmse, rel=1e-4)


def test_a_refit_learns_all_images_but_those_for_the_test_to_the_folds_median_epoch(trained):
    data, results, epochs = trained
    refit = results["refit"]
    assert (refit.epochs, refit.best_epoch, len(epochs["refit"])) == (4, 4, 4)
    assert all("val/nmse" not in epoch.metrics for epoch in epochs["refit"]), "nothing is left to validate"
    rates = [[epoch.metrics["learning_rate"] for epoch in said] for said in epochs.values()]
    assert len(rates[0]) == 6 and rates[1] == sorted(rates[1], reverse=True) and rates[1][-1] > 1e-4, "as in the folds"
    assert (refit.best_val_nmse, refit.validation.nmse) == (0.5, 0.5), "those of the folds"
    table = pandas.read_csv(refit.predictions)
    assert sorted(table["image"]) == sorted(data.names[index] for index in whole(data.split).train)


def test_a_refit_is_checked_by_its_scores_on_the_images_that_it_learned(trained, tmp_path):
    data, results, _ = trained
    refit = results["refit"]
    request = protocol.Score(
        folder=refit.folder,
        data=refit.folder.parents[1] / "set.npz",
        predictions=tmp_path / "p.csv",
        errors=tmp_path / "errors.npz",
        folds=3,
    )
    scored = scoring.score(request, lambda message: None, threading.Event())
    assert refit.training is not None
    assert scored.model.validation.nmse == pytest.approx(refit.training.nmse, rel=1e-5)
    recorded = records.result(refit.best_val_nmse, validation=refit.validation, training=refit.training)
    again = replace(job(1, 3, 0.5, refit=ranking.refit_of(STEADY)), result=recorded)
    ranking.check_same(scored.model, again)
    with pytest.raises(ValueError, match="its downloaded model has a training NMSE of"):
        ranking.check_same(scored.model, replace(again, result=replace(recorded, training=refit.validation)))
    with np.load(tmp_path / "errors.npz") as stored:
        assert set(stored) == {"mean", "volume fraction", "variance of the training labels"}, "no errors of the network"
        first = folds(data, 3)[0]
        truth = data.targets[first.validation]
        mean = (data.targets[first.train].mean(axis=0) - truth) ** 2
        assert stored["mean"].shape == (51, 9) and stored["mean"][: len(truth)] == pytest.approx(mean)
    table = pandas.read_csv(tmp_path / "p.csv")
    assert table["split"].value_counts().to_dict() == {
        "training": len(whole(data.split).train),
        "test": len(data.split.test),
    }


def test_folds_that_are_not_those_planned_are_not_trained(trained):
    folder = trained[1]["fold"].folder.parents[1]
    with pytest.raises(specs.SpecError, match="expected the 3 folds that were planned"):
        inputs.trial_data(folder / "set.npz", records.spec(fold=Fold(number=0, count=3, digest="other")))


def test_a_training_without_validation_has_the_weights_of_one_with_it(tmp_path):
    data = load(cells.make(tmp_path / "data", count=40))
    network, short = (
        specs.CnnSpec(filters=2, kernel_size=3, dropout=0.2),
        specs.TrainingSpec(epochs=4, schedule="cosine"),
    )
    train = data.part(data.split.train)
    with_it = Training(network, short, train=train, validation=data.part(data.split.validation), seed=3)
    list(with_it.epochs())
    without = Training(network, short, train=train, validation=None, seed=3, last_epoch=2)
    assert [epoch.best for epoch in without.epochs()] == [True, True]
    resumed = Training(network, short, train=train, validation=None, seed=3, state=without.state())
    list(resumed.epochs())
    expected, found = (run.last_regressor().state_dict() for run in (with_it, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.best_epoch == 4, "the newest, whatever its loss"


# What is shown meanwhile


def test_the_best_so_far_is_the_mean_of_a_configuration_whose_folds_have_all_begun():
    canonical = {"folds": {"count": 3, "digest": "f"}, "seed": 0, "report_by": [], "data": {"image_size": None}}
    canonical |= {"model": {}, "training": {}, "space": [], "sampler": {"name": "grid", "trials": 2}}
    progress = Progress(queue=None, study=records.study_row("cv", canonical=canonical))
    begun = [*STEADY, *LUCKY[:2]]
    progress.jobs = [replace(one, id=index) for index, one in enumerate([*STEADY, *LUCKY])]
    progress.paces = {
        index: Pace(seconds=1.0, best=ranking.nmse(one), first=0.0, last=1.0) for index, one in enumerate(begun)
    }
    assert progress.best == (pytest.approx(0.3), progress.jobs[0]), "the fold of 0.1 is no configuration's score"
    progress.paces = {}
    assert progress.best is None


# The time left


def test_the_refit_is_part_of_the_time_left_until_it_is_planned():
    jobs = [replace(one, id=index, epochs=3, cost=1.0) for index, one in enumerate(STEADY)]
    forecast = Forecast(
        jobs=jobs,
        closing=None,
        workers=[Present(name="w", trainers=1, device="cpu", stops=0, alive=True, here=100.0, silent=0.0)],
        paces={one.id: Pace(seconds=10.0, best=0.3, first=20.0, last=60.0) for one in jobs},
        now=70.0,
        epochs=lambda one: one.spec.epochs,
        report_by=(),
        pruner={},
        folds=3,
    )
    assert forecast.seconds_left == pytest.approx(forecast.closing_seconds + 3 * 10.0 * 3 / 2 + RECORD)
    assert replace(forecast, folds=None).seconds_left == forecast.closing_seconds
    planned = [*jobs, replace(job(1, 3, 0.0, state="waiting", refit=ranking.refit_of(STEADY)), id=9, cost=1.0)]
    assert replace(forecast, jobs=planned).seconds_left == pytest.approx(forecast.closing_seconds + 40, abs=15)
