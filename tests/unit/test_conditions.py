"""Parameters that are chosen only where others have certain values."""

import optuna
import pytest
import records

from hpo import study
from hpo.errors import StudyError
from hpo.search import sampling
from hpo.study import pruned
from hpo.study.space import highest
from hpo.study.specification import combinations

FILE = """
[model]
family = "conv"
[sampler]
name = "{sampler}"
trials = 12
[space]
head = [0, 64, 128]
{condition}
width = {{low = 4, high = 8, when = {{activation = "gelu"}}}}
{more}
"""
GOOD = 'activation = {values = ["relu", "gelu"], when = {head = [64, 128]}}'


def load(folder, condition=GOOD, sampler="random", more=""):
    path = folder / "mine.toml"
    path.write_text(FILE.format(condition=condition, sampler=sampler, more=more))
    return study.load(str(path))


def test_every_way_in_which_conditions_hold_is_looked_at_before_anything_is_planned(tmp_path):
    chosen = load(tmp_path)
    assert {"head": 64, "activation": "gelu", "width": 8} in chosen.corners()
    assert {"head": 64, "activation": "gelu", "width": 5} in study.space.second_values(chosen.space)
    assert highest(chosen.space, all_of="stride") == [
        {"head": 0},
        *(
            point
            for head in (64, 128)
            for point in ({"head": head, "activation": "relu"}, {"head": head, "activation": "gelu", "width": 8})
        ),
    ]
    for point in (*chosen.corners(), *chosen.largest(), *combinations(chosen, "batch_size")):
        assert point == pruned(chosen.space, {"head": 0, "activation": "relu", "width": 4} | point)
        chosen.specifications(point)


def test_conditions_are_part_of_the_identity_and_are_restored(tmp_path):
    chosen = load(tmp_path)
    canonical = chosen.canonical(data_digest="d", split_digest="s")
    assert dict(canonical["space"])["activation"] == {"values": ["relu", "gelu"], "when": {"head": [64, 128]}}
    assert dict(canonical["space"])["head"] == [0, 64, 128], "without a condition it is what it was"
    assert study.restore("mine", canonical).space == chosen.space


@pytest.mark.parametrize(
    ("condition", "sampler", "more", "message"),
    [
        ('activation = {values = ["relu"], when = {heads = 64}}', "tpe", "", "found 'heads'. Did you mean 'head'?"),
        (
            'activation = {values = ["relu"], when = {depth = 2}}',
            "tpe",
            "depth = [2, 3]",
            "stands before activation in",
        ),
        ('activation = {values = ["relu"], when = {head = 65}}', "tpe", "", "expected one of 0, 64, 128, found 65."),
        (
            'activation = {values = ["relu"], when = {head = []}}',
            "tpe",
            "",
            "expected one of 0, 64, 128, found 'nothing'",
        ),
        ('activation = {values = ["relu"], when = 64}', "tpe", "", "space.activation.when: expected a table, found 64"),
        ('activation = {values = ["relu"], when = {}}', "tpe", "", "expected a condition"),
        ('activation = {value = ["relu"], when = {head = 64}}', "tpe", "", "unknown key 'space.activation.value'"),
        ('activation = {values = ["gelu", "rely"], when = {head = 64}}', "tpe", "", "did you mean 'relu'"),
        (
            GOOD,
            "tpe",
            "[[start]]\nhead = 0\nactivation = 'relu'\n",
            "start[0].activation: expected nothing, for its cond",
        ),
        (GOOD, "tpe", "[[start]]\nhead = 64\n", "start[0].activation: expected one of 'relu', 'gelu', found nothing"),
    ],
)
def test_a_condition_that_cannot_be_met_is_one_message(tmp_path, condition, sampler, more, message):
    with pytest.raises(StudyError) as caught:
        load(tmp_path, condition, sampler, more)
    assert message in str(caught.value)


def test_a_grid_has_no_conditions(tmp_path):
    path = tmp_path / "mine.toml"
    text = FILE.format(condition=GOOD, sampler="grid", more="").replace("trials = 12\n", "")
    path.write_text(text.replace("{low = 4, high = 8, ", "{values = [4, 8], "))
    with pytest.raises(StudyError, match="A grid trains all combinations"):
        study.load(str(path))


@pytest.mark.parametrize("kind", ["random", "qmc", "tpe", "gp"])
def test_a_sampler_chooses_a_parameter_only_where_its_condition_holds(tmp_path, kind):
    chosen = load(tmp_path, sampler=kind, more="[[start]]\nhead = 64\nactivation = 'relu'\n")
    store = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    study_id = optuna.create_study(study_name="mine", storage=store)._study_id
    space, keys = sampling.distributions(chosen), set()
    for number in range(16):
        trial_id = store.create_new_trial(study_id)
        point = sampling.suggest(store, "mine", chosen, number)
        assert point == sampling.suggest(store, "mine", chosen, number)
        assert point == pruned(chosen.space, {"activation": None, "width": None} | point)
        chosen.specifications(point)
        for key, value in point.items():
            store.set_trial_param(trial_id, key, space[key].to_internal_repr(value), space[key])
        store.set_trial_state_values(trial_id, optuna.trial.TrialState.COMPLETE, values=[1 / (1 + len(point))])
        keys.add(tuple(point))
    assert keys == {("head",), ("head", "activation"), ("head", "activation", "width")}
    store.remove_session()
    store.engine.dispose()


def test_an_earlier_trial_has_the_point_that_conditions_leave(tmp_path):
    from hpo.planning import earlier

    chosen = load(tmp_path, sampler="tpe")
    for head, activation, width, point in (
        (0, "silu", 99, {"head": 0}),
        (64, "relu", 99, {"head": 64, "activation": "relu"}),
        (64, "gelu", 5, {"head": 64, "activation": "gelu", "width": 5}),
        (64, "gelu", 99, None),
        (64, "silu", 5, None),
        (3, "gelu", 5, None),
    ):
        model = {"family": "conv", "head": head, "activation": activation, "width": width}
        job = type("Trial", (), {"spec": records.spec(model=model)})
        assert earlier._in_space(chosen, job) == point
