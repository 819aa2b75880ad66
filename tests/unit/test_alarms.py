"""Networks that predict a constant are called so."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import records

from hpo.scores import alarms
from hpo.study.records import SplitScores

PREDICTORS = {"mean": SplitScores(validation=records.result(1.02).validation)}


def trials(*nmse: float, r2: float = 0.9) -> list:
    scores = replace(records.result(0).validation, r2=None, per_target={"r2": [r2, None]})  # one does not vary there
    return [SimpleNamespace(result=records.result(value, validation=scores)) for value in nmse]


def predictions(folder, spread: float):
    """A table of two targets whose predictions vary so much less than the labels; test rows do not count."""
    random = np.random.default_rng(3)
    truth = random.normal(50, 5, (200, 2))
    said = 50 + spread * (truth - 50)
    said[100:] = 0
    columns = {"image": "x", "split": ["validation"] * 100 + ["test"] * 100}
    for index, name in enumerate(("C11", "C22")):
        columns |= {f"{name} true": truth[:, index], f"{name} predicted": said[:, index]}
    path = folder / "predictions.csv"
    pandas.DataFrame(columns).to_csv(path, index=False)
    return path


def test_a_good_study_raises_none(tmp_path):
    assert alarms.alarms(trials(0.05, 0.06, 1.02, 1.03), PREDICTORS, predictions(tmp_path, 0.9)) == []
    assert alarms.alarms([], PREDICTORS, None) == []


def test_a_model_that_explains_next_to_nothing_is_said_to(tmp_path):
    (alarm,) = alarms.alarms(trials(0.93, r2=0.07), PREDICTORS, predictions(tmp_path, 0.5))
    assert "0.070" in alarm and "explains next to nothing" in alarm


@pytest.mark.parametrize(("spread", "count"), [(0.05, 1), (0.2, 0)])
def test_predictions_without_spread_are_said_to_have_none(tmp_path, spread, count):
    assert alarms.spread(predictions(tmp_path, spread)) == pytest.approx(spread)
    assert len(alarms.alarms(trials(0.5), PREDICTORS, predictions(tmp_path, spread))) == count


def test_a_target_that_does_not_vary_hides_no_constant_predictions(tmp_path):
    path = predictions(tmp_path, 0.05)
    table = pandas.read_csv(path)
    table["C22 true"] = 7.0
    table.to_csv(path, index=False)
    assert alarms.spread(path) == pytest.approx(0.05)


def test_three_unlike_models_at_the_mean_predictor_raise_the_alarm_of_the_scale():
    assert alarms.alarms(trials(0.5, 1.01, 1.03), PREDICTORS, None) == []
    (alarm,) = alarms.alarms(trials(0.5, 1.01, 1.02, 1.03), PREDICTORS, None)
    assert "3 unlike models" in alarm and "predict a constant: look at the scale of your targets" in alarm
