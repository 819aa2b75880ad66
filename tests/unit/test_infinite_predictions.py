"""What the report says of a model that predicts no finite number for a test cell: no score, and no verdict either."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_answers import DATA, PARTS, TRUTH, answer, evidence, winner

from hpo.errors import StudyConflict
from hpo.queue.closing_result import ClosingResult
from hpo.report import error_section, sections, tables
from hpo.scores import evidence as stored
from hpo.study.records import SplitScores
from hpo.worker import scoring
from models import metrics

CELL = 3  # of the test split, for which the broken model predicts infinity


def broken(role: str, **options):
    """A good model, but for one infinite number; its test scores are those that a closing stores."""
    good = winner(role, 0.2, **options)
    predicted = good.predicted.copy()
    predicted[CELL, 0] = np.inf
    test = metrics.scores(predicted, TRUTH, train_variance=DATA.targets[PARTS.train].var(axis=0))
    entry = SimpleNamespace(**vars(good.entry) | {"test": test})
    return replace(good, predicted=predicted, entry=entry)


def test_claims_on_a_model_with_infinite_predictions_are_not_measured():
    given = evidence(winner("baseline", 0.5), broken("grid"))
    tuned = answer(given, "Did tuning improve")
    assert tuned.answer == "not measured" and "Test NMSE - (grid) against" in tuned.because
    assert tuned.because.endswith("difference [-, -].")
    best = answer(given, "Which model is best")
    assert best.answer == "grid", "the validation split selects"
    assert "On the test split: R² - [-, -], NMSE -; it is not comparable with" in best.because
    assert best.because.endswith("Not comparable with grid there: baseline.")
    heads = [broken("head", backbone="vgg16"), winner("head", 0.3, backbone="resnet50")]
    backbone = answer(evidence(*heads), "Which backbone was best")
    assert backbone.answer == "not measured" and "distinguishable" not in backbone.because


def test_the_summary_hides_no_target_without_a_finite_score():
    given = evidence(broken("grid"))
    text, *_ = sections._summary(replace(given, closed=[summarised(given)]))
    assert "It explains an unknown part of the variance of the labels (R² -, 95 % interval - to -," in text
    assert "mean over 2 targets; least C11: -)" in text and "The selected model is not comparable with" in text
    described = replace(given.winners[0], described=TRUTH + 1.0)
    given = replace(given, winners=[described], closed=[summarised(given)])
    assert sections._need(given)[0].endswith(": not measured.")


def summarised(given):
    """The study of the evidence with what a summary takes of it."""
    test = {name: given.tested.scores(predicted) for name, predicted in given.predictors.items()}
    test[metrics.DESCRIPTORS] = given.tested.scores(TRUTH + 1.0)
    ended = ClosingResult(predictors={name: SplitScores(validation=own, test=own) for name, own in test.items()})
    facts = SimpleNamespace(data=SimpleNamespace(sizes=(140, 30, 30), phases=None), claims=())
    row = SimpleNamespace(name="protocol", facts=facts, specification=SimpleNamespace(folds=None))
    return replace(given.closed[0], row=row, ended=ended)


def test_tables_and_pictures_show_an_infinite_prediction_as_a_dash():
    given = evidence(broken("grid"))
    section = error_section.errors(given.tested)
    assert [picture.name for picture in section.pictures] == ["parity", "errors", "worst"]
    parity, _, worst = (picture.svg for picture in section.pictures)
    assert "C11   R² -" in parity and re.search(r"C22   R² 0\.\d{3}", parity) and "NRMSE -" in worst
    (table,) = [table for table in section.tables if table.name == "worst"]
    assert table.rows[0].values["image"] == DATA.names[PARTS.test[CELL]]
    assert tables.text(table).count("–") and "inf" not in tables.text(table)
    plain = json.loads(json.dumps(tables.plain([dict(row.values) for row in table.rows]), allow_nan=False))
    assert plain[0]["NRMSE"] is None and plain[1]["C11"] is None and plain[1]["C22"] is not None
    by_target = {one.name: one.rows[0].values for one in error_section.by_target(given.tested, scored(given))}
    assert by_target["targets-r2"]["R² C11"] is by_target["targets-r2"]["R² mean"] is None
    assert by_target["targets-nrmse"]["C22"] < 1


def scored(given):
    return {one.title: one.entry.test for one in given.winners}


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_a_closing_wrote_of_such_a_model_is_read_again(number, tmp_path):
    predicted = TRUTH + 0.1
    predicted[CELL, 0] = number
    table = scoring.prediction_table(DATA, PARTS.test, predicted)
    table.insert(1, "split", "test")
    scoring.write_table(table, file := tmp_path / "trial-1.csv")
    row = SimpleNamespace(name="grid", facts=SimpleNamespace(study_run_id="r"))
    tracker = SimpleNamespace(download_artifact=lambda *where: file)
    variance = DATA.targets[PARTS.train].var(axis=0)
    entry = SimpleNamespace(number=1, test=metrics.scores(predicted, TRUTH, train_variance=variance))
    again, described = stored.predictions(tracker, row, entry, DATA, PARTS)
    assert described is None and np.allclose(again, predicted, rtol=1e-12, equal_nan=True)
    table.loc[table.index[CELL], "C22 predicted"] = np.nan  # a target that has a score
    scoring.write_table(table, file)
    with pytest.raises(StudyConflict, match="found predictions that are no numbers"):
        stored.predictions(tracker, row, entry, DATA, PARTS)
