"""What hpo.search.foreign takes for granted of the inside of Optuna, held to the version that is installed."""

import inspect
import math
from dataclasses import replace

import optuna
import pytest
import records
import sqlalchemy

from hpo.search import sampling
from hpo.study import Interval, restore
from hpo.study.records import LearnedTrial

VERSION = "5.0"


def test_the_version_of_optuna_is_the_one_that_was_looked_into():
    assert optuna.__version__.startswith(VERSION), "look into the points below again, then raise VERSION"


def test_a_grid_sampler_knows_its_points_by_number_in_an_order_of_its_own():
    space = {"b": [1, 2], "a": [3, 4]}
    sampler = optuna.samplers.GridSampler(space, seed=0)
    assert sampler._param_names == ["a", "b"]
    assert sorted(sampler._all_grids) == [(3, 1), (3, 2), (4, 1), (4, 2)]
    assert {key: list(values) for key, values in sampler._search_space.items()} == space
    source = inspect.getsource(optuna.samplers.GridSampler)
    assert '"grid_id"' in source and '"search_space"' in source


@pytest.fixture
def columns(tmp_path):
    """The columns of Optuna's tables, made by itself."""
    url = f"sqlite:///{tmp_path}/optuna.db"
    optuna.storages.RDBStorage(url).engine.dispose()
    engine = sqlalchemy.create_engine(url)
    tables = sqlalchemy.inspect(engine)
    yield {name: {column["name"] for column in tables.get_columns(name)} for name in tables.get_table_names()}
    engine.dispose()


def test_the_tables_have_the_columns_that_we_write(columns):
    assert {"trial_id", "state", "datetime_start", "datetime_complete"} <= columns["trials"]
    assert {"trial_id", "value"} <= columns["trial_values"]
    assert {"trial_id", "number", "study_id"} <= columns["trials"] and "study_id" in columns["studies"]
    assert {"trial_id", "param_name", "param_value", "distribution_json"} <= columns["trial_params"]
    for kind in ("user", "system"):
        assert {"trial_id", "key", "value_json"} <= columns[f"trial_{kind}_attributes"]
    written = {"trial_id", "step", "intermediate_value", "intermediate_value_type"}
    assert written <= columns["trial_intermediate_values"]


def test_the_states_and_types_are_called_as_we_write_them():
    from optuna.storages._rdb import models

    assert {"WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL"} == {state.name for state in optuna.trial.TrialState}
    assert {"FINITE", "NAN"} <= {kind.name for kind in models.TrialIntermediateValueModel.TrialIntermediateValueType}


@pytest.mark.parametrize("kind", ["tpe", "gp"])
def test_a_sampler_that_learns_begins_near_the_best_of_other_studies(tmp_path, kind):
    rate = Interval(low=1e-5, high=1e-1, log=True)
    sampler = {"name": kind, "trials": 8}
    chosen = replace(restore("s", records.canonical(sampler=sampler)), space={"learning_rate": rate})
    rates = [10 ** (-5 + 4 * place / 19) for place in range(20)]
    learned = [
        LearnedTrial(study="other", trial=place, point={"learning_rate": rate}, nmse=abs(math.log10(rate) + 2.5))
        for place, rate in enumerate(rates)
    ]
    store = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    study_id = optuna.create_study(study_name="s", storage=store)._study_id
    for _ in range(8):
        store.create_new_trial(study_id)
    blind, taught = (
        [
            abs(math.log10(sampling.suggest(store, "s", chosen, number, trials)["learning_rate"]) + 2.5)
            for number in range(8)
        ]
        for trials in ((), learned)
    )
    assert max(taught) < 1.0 < max(blind)
    assert [trial.params for trial in store.get_all_trials(study_id)] == [{}] * 8, "nothing is written"
    store.remove_session()
    store.engine.dispose()


def test_a_draft_writes_nothing_and_a_draw_goes_through_two_calls():
    assert issubclass(optuna.storages._CachedStorage, optuna.storages.BaseStorage)
    assert {"set_trial_param", "set_trial_system_attr"} <= set(dir(optuna.storages._CachedStorage))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    assert isinstance(study._study_id, int)
    assert list(inspect.signature(optuna.Trial._suggest).parameters) == ["self", "name", "distribution"]
