"""Several objectives and bounds on the size of a network: in the study file, at the samplers, on the front."""

import itertools
import math
import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import optuna
import own_network
import pytest
import records
import torch

from data_pipeline import dataset, npz
from hpo import study
from hpo.errors import StudyError
from hpo.planning.bounds import bounded, within_bounds
from hpo.queue import Job, State
from hpo.report import pareto as report
from hpo.report import results, tables
from hpo.scores import pareto
from hpo.search import foreign, sampling
from hpo.study import sizing
from hpo.study.objectives import NOT_TRAINED
from hpo.study.records import LearnedTrial
from hpo.study.sizing import beyond
from hpo.worker import protocol, train_trial
from models import specs, user
from models.networks import build, multiply_adds
from models.sizes import size

pytestmark = pytest.mark.usefixtures("one_thread")

FILE = """
{top}
[model]
family = "cnn"
dropout = 0.0
[sampler]
name = "{sampler}"
trials = 20
[space]
filters = {{low = 1, high = 32}}
kernel_size = [1, 3, 5]
learning_rate = {{low = 1e-4, high = 1e-2, log = true}}
{more}
"""
TWO = 'objectives = ["nmse", "parameters"]'
BOUND = "[bounds]\nparameters = 10_000"


def load(folder, top=TWO, sampler="tpe", more=BOUND, **changes):
    path = folder / "mine.toml"
    text = FILE.format(top=top, sampler=sampler, more=more)
    if sampler == "grid":
        text = text.replace("trials = 20\n", "").replace("{low = 1, high = 32}", "[1, 2, 4]")
        text = text.replace("{low = 1e-4, high = 1e-2, log = true}", "[1e-3]")
    path.write_text(text)
    return replace(study.load(str(path)), **changes)


def parameters(chosen, point):
    return sizing.size(chosen.specifications(point)[0], records.DATA).parameters


def canonical(chosen):
    return chosen.canonical(data_digest="d", split_digest="s")


# The study file


def test_objectives_and_bounds_are_part_of_the_identity_only_where_they_are_used(tmp_path):
    plain = load(tmp_path, top="", more="")
    written = load(tmp_path, top='objectives = ["nmse"]', more="[bounds]")
    assert canonical(plain) == canonical(written) and not {"objectives", "bounds"} & canonical(plain).keys()
    several, bound = load(tmp_path, more=""), load(tmp_path, top="")
    assert len({study.digest(canonical(one)) for one in (plain, several, bound)}) == 3
    for chosen in (plain, several, bound):
        again = study.restore("mine", canonical(chosen))
        assert canonical(again) == canonical(chosen) and again.objectives == chosen.objectives
    assert sizing.measures(several) == sizing.measures(bound) == ("parameters",) and not sizing.measures(plain)


@pytest.mark.parametrize(
    ("top", "more", "message"),
    [
        ('objectives = ["nmse", "parameter"]', "", "found 'parameter'. Did you mean 'parameters'?"),
        ('objectives = ["nmse", ["parameters"]]', "", "expected some of nmse, parameters, multiply_adds, found ["),
        ('objectives = ["parameters", "nmse"]', "", 'expected each once and "nmse" first, by which @champion'),
        ('objectives = ["nmse", "nmse"]', "", "found ['nmse', 'nmse']"),
        ("objectives = []", "", "found []"),
        ('objectives = "nmse"', "", "objectives: expected a list, found 'nmse'"),
        ("", "[bounds]\nnmse = 1", "unknown key 'bounds.nmse'"),
        ("", "[bounds]\nparameters = 0", "bounds.parameters: expected a whole number from 1 to"),
        ("", "[bounds]\nparameters = 1e5", "bounds.parameters: expected a whole number, found 100000.0"),
        ("bounds = 5", "", "bounds: expected a table, found 5"),
        (TWO, '[pruner]\nname = "median"', "several objectives and a pruner do not go together"),
    ],
)
def test_wrong_objectives_and_bounds_are_named(tmp_path, top, more, message):
    with pytest.raises(StudyError) as caught:
        load(tmp_path, top=top, more=more)
    assert message in str(caught.value)


def test_descriptors_have_no_multiply_adds_and_a_pruner_goes_with_bounds(tmp_path):
    load(tmp_path, top="", more=f'{BOUND}\n[pruner]\nname = "median"')
    with pytest.raises(StudyError, match=r'found model.family = "descriptors".* Take "parameters"'):
        study.load("descriptors", ["bounds.multiply_adds=1000"])
    assert study.load("descriptors", ["bounds.parameters=1000"]).bounds == {"parameters": 1000}


# Sizes

SPECS = [
    specs.BaselineSpec(),
    specs.CnnSpec(filters=4, kernel_size=5, dropout=0.2),
    specs.PeriodicSpec(width=4, depth=2, stride=2, symmetric=True),
    specs.ConvSpec(width=3, depth=2, stride=1, kernel_size=5, padding="reflect", head=0, physics="hill"),
]


@pytest.mark.parametrize("spec", SPECS, ids=specs.family_name)
@pytest.mark.parametrize("inputs", [0, 2])
def test_the_multiply_adds_in_closed_form_are_those_that_torch_counts(spec, inputs):
    shape = (2, 21, 24) if isinstance(spec, specs.ConvSpec) else (1, 32, 32)
    network = build(spec, shape, 3, inputs)
    assert size(spec, shape, 3, inputs).forward == multiply_adds(network, shape, inputs)


@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("efficientnet_b0", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trainable", ["head", "all"])
def test_the_multiply_adds_of_a_backbone_count_whether_or_not_it_is_trained(backbone, trainable):
    spec = specs.TransferSpec(backbone=backbone, weights="none", trainable=trainable)
    network = build(spec, (1, 64, 64), 9)
    assert size(spec, (1, 64, 64), 9).forward == pytest.approx(multiply_adds(network, (1, 64, 64)), rel=0.02)


def test_counting_changes_neither_the_network_nor_the_next_random_numbers():
    network = build(specs.PeriodicSpec(width=3, depth=1), (1, 8, 8), 2).train()
    before, state = {name: tensor.clone() for name, tensor in network.state_dict().items()}, torch.get_rng_state()
    assert multiply_adds(network, (1, 8, 8)) > 0 and network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_network_of_a_users_beyond_a_bound_is_made_and_not_trained(tmp_path, data):
    npz.save_npz(dataset.load(data), tmp_path / "data.npz")
    spec = own_network.spec(width=4)
    sent = []

    def train(bounds):
        request = protocol.Train(
            spec=records.spec(
                model=specs.to_dict(spec),
                training={"epochs": 1, "batch_size": 16},
                parameters=0,
                multiply_adds=0,
                bounds=bounds,
            ),
            data=tmp_path / "data.npz",
            checkpoint=None,
            start=None,
            folder=tmp_path / "trial",
            cache=tmp_path / "cache",
            device="cpu",
            checkpoint_interval=60.0,
        )
        return train_trial.train(request, sent.append, threading.Event())

    with user.trusting([spec.code]):
        answer = train({"parameters": 92, "multiply_adds": 10**6})
        assert answer == protocol.TooLarge(reason="93 parameters, at most 92 (bounds.parameters)")
        assert [type(message) for message in sent] == [protocol.Started]
        trained = train({"parameters": 93})
    # 8x8 pixels of a 3x3 convolution from 1 to 4 channels, and 4 to 9 dense
    assert (trained.parameters, trained.multiply_adds) == (93, 64 * 9 * 4 + 4 * 9)


# Planning


def test_a_grid_leaves_out_what_is_beyond_a_bound_and_keeps_its_config_numbers(tmp_path, monkeypatch):
    grid = load(tmp_path, sampler="grid", more="[bounds]\nparameters = 1_500")
    sizes = [parameters(grid, point) for point in grid.grid()]
    within = [config for config, count in enumerate(sizes) if count <= 1500]
    assert within_bounds(grid, records.DATA) == within and 0 < len(within) < len(sizes) == 9
    planned = bounded(grid, records.DATA, tmp_path)
    assert (planned.trials, sizing.left_out(planned)) == (len(within), len(sizes) - len(within))
    assert (
        f"{len(within)} trials ({sizing.left_out(planned)} more configurations are beyond the bounds)"
        == sizing.extent(planned)
    )
    again = study.restore("mine", canonical(planned))
    assert (again.trials, sizing.left_out(again)) == (planned.trials, sizing.left_out(planned))
    store = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    monkeypatch.setattr(sampling.foreign, "create_waiting", lambda store, study_id, trials, *, first: [
        store.create_new_trial(study_id, trial) for trial in trials
    ])  # fmt: skip
    numbers = sampling.plan(store, "mine", planned, within)
    assert numbers == list(enumerate(within))
    trials = store.get_all_trials(store.get_study_id_from_name("mine"))
    assert [trial.params for trial in trials] == [grid.grid()[config] for config in within]
    assert len(optuna.load_study(study_name="mine", storage=store).directions) == 2
    store.remove_session()
    store.engine.dispose()


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_a_space_without_a_network_within_the_bounds_is_refused(tmp_path, sampler):
    chosen = load(tmp_path, sampler=sampler, more="[bounds]\nparameters = 10")
    with pytest.raises(StudyError, match=r"found none: at f1 k1 lr\S+ the network has \d+ parameters, at most 10 "):
        bounded(chosen, records.DATA, tmp_path)


def test_a_point_to_start_from_beyond_a_bound_is_refused(tmp_path):
    start = f"{BOUND}\n[[start]]\nfilters = 32\nkernel_size = 5\nlearning_rate = 1e-3\n"
    with pytest.raises(StudyError, match=r"start\[0\]: the network has [\d,]+ parameters, at most 10,000"):
        bounded(load(tmp_path, more=start), records.DATA, tmp_path)


# Samplers


def search(tmp_path, chosen, count, learned=()):
    """Propose so many points one after the other, each after those before have ended."""
    store = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/{len([*tmp_path.glob('*.db')])}.db")
    directions = ["minimize"] * len(chosen.objectives)
    study_id = optuna.create_study(study_name="mine", storage=store, directions=directions)._study_id
    space, points = sampling.distributions(chosen), []
    accepts = (lambda point: not beyond(chosen, point, records.DATA)) if chosen.bounds else None
    for number in range(count):
        trial_id = store.create_new_trial(study_id)
        point = sampling.suggest(store, "mine", chosen, number, learned, accepts)
        assert point == sampling.suggest(store, "mine", chosen, number, learned, accepts), "the same history"
        points.append(point)
        spec, _ = study.trial_spec(chosen, "i", records.facts(), point, config=None)
        job = SimpleNamespace(sizes=lambda names, spec=spec: {name: getattr(spec, name) for name in names})
        for key, value in point.items():
            store.set_trial_param(trial_id, key, space[key].to_internal_repr(value), space[key])
        sampling._constrain(store, trial_id, chosen, job)
        values = [abs(math.log10(point["learning_rate"]) + 2.5) + 1 / point["filters"], spec.parameters]
        store.set_trial_state_values(
            trial_id, optuna.trial.TrialState.COMPLETE, values=values[: len(chosen.objectives)]
        )
    trials = store.get_all_trials(study_id)
    store.remove_session()
    store.engine.dispose()
    return points, trials


@pytest.mark.parametrize("kind", ["random", "qmc", "tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_every_sampler_keeps_the_bounds_and_learns_from_several_objectives(tmp_path, kind):
    chosen = load(tmp_path, sampler=kind)
    points, trials = search(tmp_path, chosen, 12)
    assert all(parameters(chosen, point) <= 10_000 for point in points)
    assert len({tuple(point.values()) for point in points}) == 12
    for point, trial in zip(points, trials, strict=True):
        count = parameters(chosen, point)
        assert trial.constraints == {"parameters": pytest.approx(math.log(count / 10_000))} and trial.values[1] == count
    other, _ = search(tmp_path, replace(chosen, seed=1), 2)
    assert other != points[:2]


def test_the_points_of_qmc_within_the_bounds_are_those_of_its_sequence(tmp_path):
    chosen = load(tmp_path, sampler="qmc")
    points, _ = search(tmp_path, chosen, 6)
    whole, _ = search(tmp_path, replace(chosen, bounds={}, trials=20), 20)
    assert points == [point for point in whole if not beyond(chosen, point, records.DATA)][:6]


def test_what_is_drawn_again_at_random_are_the_points_of_optunas_own_sampler(tmp_path):
    chosen = load(tmp_path, sampler="random", top="", more="")
    space = sampling.distributions(chosen)
    sampler = optuna.samplers.RandomSampler(seed=7)
    own = optuna.create_study(sampler=sampler)
    drawn = []
    for _ in range(3):
        trial = own.ask(space)
        drawn.append({key: trial.params[key] for key in space})
    seen = []
    foreign.draw_at_random(space, chosen.space, seed=7, accepts=lambda point: bool(seen.append(point)) or len(seen) > 2)
    assert seen == drawn
    with pytest.raises(StudyError, match=r"within \[bounds\], found none among 10,000"):
        foreign.draw_at_random(space, chosen.space, seed=7, accepts=lambda point: False)


@pytest.mark.parametrize("kind", ["tpe", pytest.param("gp", marks=pytest.mark.long)])
def test_a_sampler_learns_from_networks_of_other_studies_beyond_the_bounds_too(tmp_path, kind):
    chosen = load(tmp_path, sampler=kind)
    draw, learned = random.Random(0), []
    for number in range(12):
        point = {
            "filters": draw.randint(1, 32),
            "kernel_size": draw.choice([1, 3, 5]),
            "learning_rate": 10 ** -draw.uniform(2, 4),
        }
        count = parameters(chosen, point)
        learned.append(
            LearnedTrial(study="o", trial=number, point=point, nmse=draw.random(), sizes={"parameters": count})
        )
    assert max(one.sizes["parameters"] for one in learned) > 10_000
    points, _ = search(tmp_path, chosen, 1, learned)
    assert all(parameters(chosen, point) <= 10_000 for point in points)
    seen = foreign.learned_trials(
        learned, sampling.distributions(chosen), objectives=chosen.objectives, bounds=chosen.bounds
    )
    assert [trial.values for trial in seen] == [[one.nmse, one.sizes["parameters"]] for one in learned]


def test_optunas_own_call_gives_a_trial_the_constraints_that_we_write():
    trial = optuna.create_study().ask()
    trial.set_constraint("parameters", math.log(2))
    assert trial.storage.get_trial_system_attrs(trial._trial_id) == foreign.constraints(
        {"parameters": 50, "multiply_adds": 9}, {"parameters": 100, "multiply_adds": 0}
    )


# The front


@pytest.mark.parametrize("count", [2, 3])
def test_the_front_is_what_comparing_all_with_all_gives_and_optuna_finds(count):
    draw = random.Random(count)
    values = [tuple(float(draw.randint(0, 9)) for _ in range(count)) for _ in range(80)]

    def dominates(one, other):
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    expected = [not any(dominates(other, own) for other in values) for own in values]
    assert pareto.front(values) == expected and 0 < sum(expected) < 80
    theirs = optuna.create_study(directions=["minimize"] * count)
    theirs.add_trials([optuna.create_trial(values=own) for own in values])
    assert {trial.number for trial in theirs.best_trials} == set(np.flatnonzero(expected))
    assert pareto.front([]) == []


def job(number, nmse, parameters, *, state="done", repeat=0, reason=None):
    return Job(
        study="two", kind="trial", number=number, repeat=repeat, state=State(state), mirrored=True, alive=False,
        spec=records.spec(point={"filters": number}, parameters=parameters),
        **dict.fromkeys(("config", "worker", "checkpoint")), reason=reason,
        **dict.fromkeys(("id", "cost", "attempt", "fence", "epochs", "changed_at"), 0),
        run_id=f"{number}/{repeat}", result=records.result(nmse) if state == "done" else None,
    )  # fmt: skip


JOBS = [
    job(0, 0.5, 10),
    job(1, 0.4, 20),
    job(2, 0.45, 30),  # dominated
    job(3, 0.1, 400),
    job(4, 0.05, 5, repeat=0),
    job(4, 0.05, 5, repeat=1, state="diverged"),  # best of all, and not reliable
    job(5, 0.0, 0, state="pruned", reason=f"{NOT_TRAINED}: 2,000 parameters, at most 1,000 (bounds.parameters)"),
]
ROW = records.study_row(
    "two", canonical=records.canonical(objectives=["nmse", "parameters"], sampler={"name": "random", "trials": 6})
)


def test_tables_tags_and_files_say_which_configurations_are_on_the_front():
    table = report.table(ROW, JOBS)
    assert [row.values["trial"] for row in table.rows] == [3, 1, 0]
    assert table.title == "two: Pareto front of NMSE and parameters, 3 of 4 configurations, validation split"
    assert report.lines(ROW, JOBS) == [
        "3 of 4 configurations are on the Pareto front of NMSE and parameters; the first one decides on aliases."
    ]
    marks = {number: tags[report.TAG] for number, tags in report.tags(ROW, JOBS).items()}
    assert marks == {0: "front", 1: "front", 2: "dominated", 3: "front", 4: "dominated"}
    files = report.files(ROW, JOBS)
    assert set(files) == {"pareto.csv", "pareto.json", "pareto.svg"} and files["pareto.csv"].count("\n") == 4
    assert files["pareto.svg"].startswith("<svg") and "parameters" in files["pareto.svg"]
    assert next(one["values"] for one in report.records(ROW, JOBS)) == {"nmse": 0.1, "parameters": 400}
    listed = tables.text(results.trials_table(ROW, JOBS))
    assert listed.count("front") == 3 and "400" in listed and NOT_TRAINED in listed
    (line,) = results._pruned(SimpleNamespace(pruned=1), JOBS)
    assert line == "1 trial was not trained: their networks are beyond the bounds (`hpo trials`)."
    by_number = {row["number"]: row for row in results.rows(ROW, JOBS)}
    assert (by_number[2]["pareto"], by_number[3]["pareto"]) == (False, True)


def test_a_study_with_one_objective_has_no_front():
    plain = records.study_row("one")
    assert report.table(plain, JOBS) is None and report.picture(plain, JOBS) is None
    assert not report.tags(plain, JOBS) and not report.files(plain, JOBS) and not report.lines(plain, JOBS)
    assert not report.values(plain, JOBS) and not report.records(plain, JOBS)
    assert "pareto" not in results.rows(plain, JOBS)[0]


def test_the_values_of_a_configuration_are_its_score_and_the_sizes_of_its_network():
    chosen = ROW.specification
    assert sampling.objective_values(chosen, [JOBS[3]]) == (State.DONE, [0.1, 400])
    assert sampling.objective_values(chosen, [JOBS[5]]) == (State.DIVERGED, [])
    assert sampling.objective_values(records.study_row("one").specification, [JOBS[3]]) == (State.DONE, [0.1])
    pairs = itertools.pairwise(place.values["nmse"] for place in pareto.of_study(ROW, JOBS))
    assert all(first <= second for first, second in pairs)
