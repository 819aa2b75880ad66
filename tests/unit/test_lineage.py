"""Models of one data set through its versions: what their scores are of, and which of them is the champion."""

import dataclasses
import json
import threading

import cells
import numpy as np
import pandas
import pytest
import records

from data_pipeline import dataset, npz
from hpo import study
from hpo.planning.preparation import prepare
from hpo.queue import Job, State
from hpo.queue.closing_result import ClosingResult, Compared, Election, ScoredVersion
from hpo.report import tables, versions
from hpo.scores import lineage, ranking
from hpo.scores.lineage import Line
from hpo.scores.standings import Rival
from hpo.study.records import NEW, OLD, DataVersion, Fold, version_key
from hpo.worker import protocol, scoring, train_trial
from models import metrics
from models.specs import SpecError

MODEL = {"family": "cnn", "filters": 2, "kernel_size": 3, "dropout": 0.0}


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """The folders of three data sets: each extends the one before it."""
    parent = tmp_path_factory.mktemp("line")
    return [
        cells.make(parent / f"v{number}", count=count, extends=f"../v{number - 1}" if number else "")
        for number, count in enumerate((40, 60, 80))
    ]


def train(folder, path, **spec):
    request = protocol.Train(
        spec=records.spec(model=MODEL, training={"epochs": 2, "batch_size": 8}, **spec), data=path, checkpoint=None,
        start=None, folder=folder, cache=folder / "cache", device="cpu", checkpoint_interval=60.0,
    )  # fmt: skip
    return train_trial.train(request, lambda message: None, threading.Event())


@pytest.mark.usefixtures("one_thread")
def test_a_trial_is_scored_on_the_validation_images_of_each_earlier_data_set(line, tmp_path):
    first, second, third = map(dataset.load, line)
    npz.save_npz(third, path := tmp_path / "data.npz")
    trained = train(tmp_path / "whole", path)
    table = pandas.read_csv(trained.predictions, index_col="image")
    for number, earlier in enumerate((first, second)):
        own = table.loc[[earlier.names[index] for index in earlier.split.validation]]
        truth, predicted = (own[[f"{name} {kind}" for name in first.target_names]] for kind in ("true", "predicted"))
        variance = earlier.targets[earlier.split.train].var(axis=0)
        nmse = metrics.scores(predicted.to_numpy(), truth.to_numpy(), train_variance=variance).nmse
        key = prepare(study.load("baseline", [f"data.path={line[2]}"])).facts.data.earlier[number].key
        assert trained.common[key] == pytest.approx(nmse, rel=1e-6) and nmse != trained.best_val_nmse
    assert len(trained.common) == 2
    npz.save_npz(first, path := tmp_path / "first.npz")
    assert train(tmp_path / "alone", path).common is None


@pytest.mark.usefixtures("one_thread")
def test_folds_are_scored_on_all_earlier_images_and_a_refit_has_their_mean(line, tmp_path):
    from data_pipeline.folds import digest, folds

    data = dataset.load(line[1])
    npz.save_npz(data, path := tmp_path / "data.npz")
    fold = Fold(number=0, count=3, digest=digest(folds(data, 3)))
    (nmse,) = train(tmp_path / "fold", path, fold=fold).common.values()
    part = folds(data, 3)[0]
    (earlier,) = data.earlier
    assert 0 < len(earlier.within(part.validation)) < len(part.validation) and np.isfinite(nmse)
    job = type("Job", (), {"result": records.result(0.5, common={"k": nmse, "other": 1.0})})
    refit = ranking.refit_of([job, type("Job", (), {"result": records.result(0.7, common={"k": 3 * nmse})})])
    assert refit.common == {"k": pytest.approx(2 * nmse)}
    assert ranking.refit_of([type("Job", (), {"result": records.result(0.7)})]).common is None


def test_an_extended_data_set_is_planned_as_before_and_names_those_before_it(line):
    plans = [prepare(study.load("baseline", [f"data.path={folder}"])) for folder in line]
    facts = [plan.facts.data for plan in plans]
    assert [version.key for version in facts[2].earlier] == [one.key for one in facts[:2]]
    assert facts[0].earlier is None and "earlier" not in facts[0].to_json()
    assert not any("earlier" in str(plan.canonical) for plan in plans), "the identity is of digests alone"


@pytest.mark.usefixtures("one_thread")
def test_an_older_model_is_scored_on_old_and_new_test_images_or_says_why_not(line, tmp_path):
    first, third = dataset.load(line[0]), dataset.load(line[2])
    npz.save_npz(third, path := tmp_path / "data.npz")
    npz.save_npz(first, old := tmp_path / "first.npz")
    model = train(tmp_path / "old", old).folder
    request = protocol.Score(
        folder=model,
        data=path,
        predictions=tmp_path / "p.csv",
        errors=tmp_path / "p.npz",
        earlier=version_key(first.digest, first.split.digest),
        is_older=True,
    )
    scored = scoring.answer(request, lambda message: None, threading.Event())
    table = pandas.read_csv(request.predictions, index_col="image").query("split == 'test'")
    names = {first.names[index] for index in first.split.test}
    variance = third.targets[third.split.train].var(axis=0)
    for part, chosen in ((OLD, table.index.isin(names)), (NEW, ~table.index.isin(names))):
        truth, predicted = (table[chosen][[f"{name} {kind}" for name in first.target_names]].to_numpy()
                            for kind in ("true", "predicted"))  # fmt: skip
        nmse = metrics.scores(predicted, truth, train_variance=variance).nmse
        assert scored.tests[part].nmse == pytest.approx(nmse, rel=1e-6) and 0 < chosen.sum() < len(chosen)
    (model / "weights.safetensors").write_bytes(b"of another family")
    refused = scoring.answer(request, lambda message: None, threading.Event())
    assert isinstance(refused, protocol.NotScored) and "weights.safetensors" in refused.reason
    with pytest.raises(SpecError):
        scoring.answer(dataclasses.replace(request, is_older=False), lambda message: None, threading.Event())


# What is said of them

ENDED = ClosingResult(
    tested=(
        ScoredVersion(
            run_id="old/0", study="old", model="m", version=1, data="v0 (00000000)", fault="its file is damaged."
        ),
        ScoredVersion(run_id="new/0", study="new", data="v1 (11111111)", tests={OLD: records.result(0.25).validation}),
    ),
    election=Election(
        champion=2,
        champion_moved=True,
        compared=(
            Compared(
                study="old", model="m", version=1, data="v0 (00000000)", on="v0 (00000000)", nmse=0.3, champion_nmse=0.2
            ),
            Compared(study="unknown", model="n", version=4, data="v2 (22222222)"),
        ),
    ),
)


def test_the_scores_of_both_are_said_and_why_one_is_missing():
    stored = ClosingResult.from_json(json.loads(json.dumps(ENDED.to_json())))
    for ended in (ENDED, stored):
        first, second, third = versions.sentences(ended)
        assert "@champion has the NMSE 0.2" in first and "(version 1, study old) 0.3" in first
        assert "not compared with the best version trained on v2 (22222222) (version 4, study unknown)" in second
        (table,) = versions.of_test(ended)
        assert "0.25" in tables.text(table)
        assert third.startswith("old, version 1, the best on earlier data") and third.endswith("its file is damaged.")
    assert "tested" not in ClosingResult().to_json() and versions.of_test(ClosingResult()) == [] == versions.sentences(
        ClosingResult()
    )


# Which network is the champion

VERSIONS = [DataVersion(name=f"v{number}", digest=str(number) * 64, split="s" * 64) for number in range(4)]
KEYS = [version.key for version in VERSIONS]


def row(name, data, *, earlier=None, **changes):
    """A study on a version of the data; `earlier`: those that it extends, by default all before it."""
    before = tuple(VERSIONS[number] for number in (range(data) if earlier is None else earlier)) or None
    version = VERSIONS[data]
    values = {"name": version.name, "digest": version.digest, "split": version.split, "earlier": before} | changes
    return records.study_row(name, facts=records.facts(data=dataclasses.replace(records.DATA, **values)))


def rival(name, data, *trials, **changes):
    """A study with trials of one repeat: the NMSE on its own validation images, then on those of each earlier set."""
    jobs = [
        Job(
            study=name, kind="trial", number=number, repeat=0, state=State.DONE, spec=records.spec(), mirrored=True,
            alive=False, run_id=f"{name}/{number}", **dict.fromkeys(("config", "worker", "checkpoint", "reason")),
            **dict.fromkeys(("id", "cost", "attempt", "fence", "epochs", "changed_at"), 0),
            result=records.result(own, common={KEYS[at]: nmse for at, nmse in enumerate(earlier)} or None),
        )
        for number, (own, *earlier) in enumerate(trials)
    ]  # fmt: skip
    return Rival(row=row(name, data, **changes), jobs=jobs)


def best(*rivals, without=()):
    """The runs, the best first; those `without` may not be champion."""
    line = Line(rivals)
    return line.order(sorted(line.standings, key=line.standings.__getitem__), lambda run: run not in without)


ORIGINAL = rival("old", 0, (0.3,), (0.5,))


def test_networks_of_two_data_sets_are_compared_on_the_validation_images_of_both():
    better, worse = (rival("new", 1, (0.9, 0.2)), rival("new", 1, (0.1, 0.4)))
    assert best(ORIGINAL, better) == ["new/0", "old/0", "old/1"], "though its score on all of its own images is higher"
    assert best(ORIGINAL, worse) == ["old/0", "new/0", "old/1"], "though its score on all of its own images is lower"
    assert best(ORIGINAL, rival("new", 1, (0.1, 0.3)))[0] == "old/0", "equal ones: the older one stays"
    assert best(rival("older", 0, (0.31,)), better)[0] == "new/0" == best(better)[0]


def test_an_old_version_is_elected_again_once_a_better_one_of_its_data_is_trained():
    new = rival("new", 1, (0.9, 0.2))
    assert best(ORIGINAL, new)[0] == "new/0"
    assert best(ORIGINAL, new, rival("again", 0, (0.15,)))[:2] == ["again/0", "new/0"]


def test_networks_of_one_data_set_keep_their_order_among_those_of_others():
    new = rival("new", 1, (0.2, 0.6), (0.4, 0.1))
    assert best(ORIGINAL, new) == ["old/0", "old/1", "new/0", "new/1"], "its best one on its own images stands for it"
    assert best(new) == ["new/0", "new/1"]


def test_a_network_that_may_not_be_champion_keeps_no_other_of_its_data_from_it():
    new = rival("new", 1, (0.2, 0.6), (0.4, 0.1))
    runs = best(ORIGINAL, new, without=["new/0"])
    assert [run for run in runs if run != "new/0"] == ["new/1", "old/0", "old/1"]
    assert best(ORIGINAL, new, without=["old/0"])[:2] == ["old/0", "old/1"], "the other old one beats new/0 itself"


def test_an_older_network_that_may_not_be_champion_hides_no_other_from_a_newer_one():
    second, third = rival("second", 1, (0.4, 0.35)), rival("third", 2, (0.5, 0.2, 0.45))
    assert best(ORIGINAL, second, third)[0] == "third/0", "each beats one of the others"
    without = ["old/0", "old/1"]
    runs = best(ORIGINAL, second, third, without=without)
    assert [run for run in runs if run not in without] == ["second/0", "third/0"] == best(second, third)


def test_networks_that_may_not_be_champion_change_no_champion():
    """Of random lines: two data sets extend the first, and a fourth extends one of them."""
    random = np.random.default_rng(0)
    earlier, changed = {0: (), 1: (0,), 2: (0, 1), 3: (0,)}, 0
    for _ in range(300):
        rivals = []
        for number, data in enumerate(random.integers(4, size=5)):
            trials = random.random((2, 1 + len(earlier[data])))
            rivals.append(rival(f"s{number}", data, *map(tuple, trials), earlier=earlier[data]))
        line = Line(rivals)
        runs = sorted(line.standings, key=line.standings.__getitem__)
        chosen = {run for run in runs if random.random() < 0.7}
        order = [run for run in line.order(runs, chosen.__contains__) if run in chosen]
        assert order[:1] == line.order([run for run in runs if run in chosen], chosen.__contains__)[:1]
        changed += order[:1] != line.order(runs, lambda run: True)[:1]
    assert changed > 50


def test_each_of_three_data_sets_is_compared_on_the_largest_set_of_common_images():
    second, third = rival("second", 1, (0.4, 0.2)), rival("third", 2, (0.5, 0.25, 0.3))
    line = Line([ORIGINAL, second, third])
    assert line.compared("third/0", "second/0")[0] == KEYS[1]
    assert line.compared("third/0", "old/0")[0] == KEYS[0] == line.compared("second/0", "old/0")[0]
    assert best(ORIGINAL, second, third) == ["third/0", "second/0", "old/0", "old/1"]
    assert best(ORIGINAL, third)[0] == "third/0", "the study in between may be deleted"
    sibling = rival("sibling", 3, (0.1, 0.28), earlier=[0])
    assert Line([second, sibling]).compared("sibling/0", "second/0")[0] == KEYS[0], "both extend the first"


def test_a_network_without_a_score_on_common_images_displaces_no_older_champion():
    unknown = rival("planned-earlier", 1, (0.01,), earlier=[])
    assert best(ORIGINAL, unknown) == ["planned-earlier/0", "old/0", "old/1"], "of two lines: nothing joins them"
    losing, winning = rival("new", 1, (0.9, 0.4)), rival("new", 1, (0.9, 0.2))
    assert best(ORIGINAL, unknown, losing)[0] == "old/0"
    assert best(ORIGINAL, unknown, winning)[:2] == ["planned-earlier/0", "new/0"], "it is better on the same data"
    diverged = rival("new", 1, (0.01,))
    assert best(ORIGINAL, diverged)[:2] == ["old/0", "old/1"]


def test_studies_are_of_one_line_if_their_data_extend_each_other():
    rows = [row("a", 0), row("b", 1, earlier=[]), row("c", 2, earlier=[0]), row("other", 3, earlier=[])]
    names = {one.name: [other.name for other in lineage.of_line(one, rows)] for one in rows}
    assert names == {"a": ["a", "c"], "b": ["b"], "c": ["a", "c"], "other": ["other"]}
    rows.append(row("joins", 1, earlier=[0]))
    assert [one.name for one in lineage.of_line(rows[1], rows)] == ["a", "b", "c", "joins"]
    rows.append(row("targets", 1, earlier=[0], target_names=("k",)))
    assert [one.name for one in lineage.of_line(rows[5], rows)] == ["targets"]
    assert [lineage.newest(one, rows[:4]).name for one in rows[:3]] == ["c", "c", "c"]


def test_studies_of_one_line_take_one_lock_whichever_of_them_are_planned():
    old, middle, new, sibling = (row("old", 0), row("mid", 1), row("new", 2), row("sibling", 3, earlier=[0]))
    roots = {
        lineage.root(one, others) for one in (old, middle, new, sibling) for others in ([one], [old, one], [one, new])
    }
    assert {root.key for root in roots} == {KEYS[0]}
