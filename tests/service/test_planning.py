"""Planning on real services: written down once, by however many, and sampled as the seed says."""

import math
import shutil
from contextlib import closing
from dataclasses import replace

import cells
import optuna
import pytest
import records
from shell import at_once, fresh_database

from hpo import settings, study
from hpo.errors import StudyError
from hpo.operations import invariants
from hpo.planning import plans, preparation
from hpo.planning.preparation import prepare
from hpo.queue import NewJob, Queue
from hpo.recording import reconciler
from hpo.search import sampling
from hpo.study.records import SourceTrial
from hpo.tracking.client import Tracker

pytestmark = pytest.mark.service


def test_planners_at_once_write_every_point_down_once(database_url, tracking_uri, data, tmp_path):
    name = f"planned-{tmp_path.name[-8:].replace('_', '-')}"
    ready = prepare(study.load(str(cells.study(tmp_path, name, data=data, epochs=1))))
    read = settings.read({"HPO_HOME": str(tmp_path / "home")})
    first = Queue(database_url)
    first.install()

    def plan() -> None:
        with closing(Queue(database_url)) as queue:
            plans.plan(ready, queue, Tracker(tracking_uri), read, database_url)

    at_once(*[plan] * 4)
    assert [job.number for job in first.jobs(name)] == [-1, 0, 1, 2, 3]
    store = sampling.storage(database_url)
    trials = store.get_all_trials(store.get_study_id_from_name(name))
    assert sorted(map(str, (trial.params for trial in trials))) == sorted(map(str, ready.study.grid()))
    facts = first.study(name).facts
    tracker = Tracker(tracking_uri)
    kinds = {kind: len(tracker.runs(facts.experiment_id, kind=kind)) for kind in ("study", "predictor", "trial")}
    assert kinds == {"study": 1, "predictor": 2, "trial": 0}
    store.remove_session()
    store.engine.dispose()
    first.close()


def test_the_best_configurations_are_those_of_finished_trials_also_after_a_crash(
    database_url, tracking_uri, data, tmp_path, monkeypatch
):
    name = f"searched-{tmp_path.name[-8:].replace('_', '-')}"
    cells.study(tmp_path, name, data=data, epochs=1)
    read = settings.read({"HPO_HOME": str(tmp_path / "home")})

    def plan(file, queue):
        ready = prepare(study.load(str(tmp_path / f"{file}.toml")))
        return plans.plan(ready, queue, Tracker(tracking_uri), read, database_url)

    for file, wanted in ((again := f"{name}-again", 3), (other := f"{name}-other", 4)):
        (tmp_path / f"{file}.toml").write_text(f'best_of = "{name}.toml"\npoints = {wanted}\nrepeats = 2\n')
    with closing(Queue(database_url)) as queue:
        queue.install()
        with pytest.raises(
            StudyError, match=f"{again} trains the best configurations of {name}, and it has not been run. Run"
        ):
            plan(again, queue)
        plan(name, queue)
        scores = {0: 0.3, 1: 0.1, 2: 0.2, 3: None}
        for left in (4, 3, 2, 1):
            with pytest.raises(StudyError, match=f"and {left} of 4 trials (are|is) still to be trained. Run"):
                plan(again, queue)
            job = queue.claim(name, worker="w", lease=60)
            queue.set_run(job.id, f"run {job.number}")
            score = scores[job.number]
            queue.end(job, "diverged" if score is None else "done", result=records.result(score or 0.0))
        points = {job.number: job.spec.point for job in queue.jobs(name) if job.kind == "trial"}
        expected = tuple(SourceTrial(study=name, trial=n, run_id=f"run {n}", point=points[n]) for n in (1, 2, 0))

        monkeypatch.setattr(plans.sampling, "storage", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plan(again, queue)
        monkeypatch.undo()
        with queue.engine.begin() as connection:
            better = (
                "UPDATE hpo.job SET result = result::jsonb || '{{\"best_val_nmse\": 0.01}}' "
                "WHERE study = '{}' AND number = 0"
            )
            connection.exec_driver_sql(better.format(name))
        row = plan(again, queue)
        assert row.facts.best_of == expected and row.facts.planned
        assert [best.trial for best in plan(other, queue).facts.best_of] == [0, 1, 2]
        store = sampling.storage(database_url)
        shown = reconciler.Reconciler(queue, Tracker(tracking_uri), store, queue.study(other))
        assert not [each for each in invariants.check(shown) if "planned points" in each.what], "as many as there are"
        trials = store.get_all_trials(store.get_study_id_from_name(again))
        assert [trial.params for trial in trials] == [best.point for best in expected]
        store.remove_session()
        store.engine.dispose()
        jobs = [(job.number, job.repeat) for job in queue.jobs(again) if job.kind == "trial"]
        assert sorted(jobs) == [(number, repeat) for number in range(3) for repeat in range(2)]
        plain = row.specification
        spec, _ = study.trial_spec(plain, row.identity, row.facts, points[2], config=None, repeat=1)
        assert spec.seed == 2 and spec.best_of == SourceTrial(study=name, trial=2, run_id="run 2")
        assert spec.params().items() >= {"best_of.study": name, "best_of.trial": 2, "best_of.run_id": "run 2"}.items()
        wider = cells.study(
            tmp_path, f"{name}-wiser", data=data, epochs=1, rates="{low = 3e-4, high = 1e-2, log = true}"
        )
        wider.write_text(f'learn_from = ["{name}"]\n{wider.read_text()}[sampler]\nname = "tpe"\ntrials = 3\n')
        learned = plan(wider.stem, queue).facts.learned
        assert [(one.study, one.trial, one.point) for one in learned] == [
            (name, number, points[number]) for number in (0, 2) if points[number]["learning_rate"] == 1e-3
        ], "the others lie outside its space"
        for missing, message in (
            ("serched", "expected a study that is planned, found 'serched'"),
            (wider.stem, "has no"),
        ):
            with pytest.raises(StudyError, match=f"learn_from: .*{message}"):
                ready = prepare(study.load(str(wider), [f'learn_from=["{missing}"]']))
                plans.plan(ready, queue, Tracker(tracking_uri), read, database_url)
        (tmp_path / f"{name}-none.toml").write_text(f'best_of = "{name}.toml"\npoints = 1\n')
        with queue.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE hpo.job SET state = 'diverged' WHERE study = '{name}' AND number >= 0")
        with pytest.raises(StudyError, match=f"{name}-none trains the best configurations of {name}, which has none"):
            plan(f"{name}-none", queue)


@pytest.mark.parametrize("kind", ["gp", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("tpe", "qmc"))])
def test_the_start_is_planned_first_and_the_sampler_chooses_the_others(services, data, tmp_path, kind):
    file = cells.study(tmp_path, f"started-{kind}", data=data, epochs=1)
    first = {"filters": 4, "learning_rate": 1e-3}
    rest = "multivariate = true\n" if kind == "tpe" else ""
    rest = f'[sampler]\nname = "{kind}"\ntrials = 14\n{rest}[[start]]\nfilters = 4\nlearning_rate = 1e-3\n'
    file.write_text(file.read_text() + rest)
    chosen = study.load(str(file))
    with fresh_database(services) as url:
        store = sampling.storage(url)
        fill = filling(url, store, chosen, file.stem)
        for _ in range(2):  # planning again adds nothing
            numbers = sampling.plan(store, file.stem, chosen)
            assert numbers == [(number, None) for number in range(14)]
            trials = store.get_all_trials(store.get_study_id_from_name(file.stem))
            assert [trial.params for trial in trials] == [first, *[{}] * 13]
        study_id = store.get_study_id_from_name(file.stem)
        for number in (3, 0, *range(4, 14)):  # beyond the first ten, which TPE draws at random
            proposed = sampling.suggest(store, file.stem, chosen, number)
            point = fill(number)
            assert point == proposed, "the same history gives the same"
            trial_id = store.get_trial_id_from_study_id_trial_number(study_id, number)
            assert store.get_trial(trial_id).params == point
            assert number or point == first
            store.set_trial_state_values(trial_id, sampling.TrialState.COMPLETE, values=[float(point["filters"])])
        store.remove_session()
        store.engine.dispose()


@pytest.mark.parametrize("kind", ["grid", "tpe"])
def test_planned_trials_have_the_rows_of_optunas_own_calls(services, data, tmp_path, monkeypatch, caplog, kind):
    file = cells.study(tmp_path, f"rows-{kind}", data=data, epochs=1)
    if kind == "tpe":
        rest = '[sampler]\nname = "tpe"\ntrials = 5\n[[start]]\nfilters = 4\nlearning_rate = 1e-3\n'
        file.write_text(file.read_text() + rest)
    chosen = study.load(str(file))
    tables = {
        "trials": "number, state, datetime_start, datetime_complete",
        "trial_params": "number, param_name, param_value, distribution_json",
        "trial_user_attributes": "number, key, value_json",
        "trial_system_attributes": "number, key, value_json",
    }
    with fresh_database(services) as url:
        store = sampling.storage(url)
        monkeypatch.setattr(sampling, "BATCH", 2)  # several transactions

        def dies(*rows, first):
            if first:
                raise KeyboardInterrupt
            insert(*rows, first=first)

        insert = sampling.foreign.create_waiting
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(sampling.foreign, "create_waiting", dies)
            sampling.plan(store, "ours", chosen)
        caplog.clear()
        with caplog.at_level("INFO", logger="hpo"):
            numbers = sampling.plan(store, "ours", chosen)
        assert [number for number, _ in numbers] == list(range(len(numbers)))
        done = [line for line in caplog.messages if "configurations are planned" in line]
        assert done[-1] == f"ours: {len(numbers)} of {len(numbers)} configurations are planned, 0 s left"
        assert not done[0].startswith("ours: 2 "), "the first two were there"
        more = chosen
        if kind == "tpe":  # as `hpo run --trials` raises their number
            more = replace(chosen, trials=chosen.trials + 2)
            for _ in range(2):
                with store.engine.begin() as connection:
                    sampling.foreign.append_waiting(connection, "ours", more.trials)

        def one_by_one(store, study_id, trials, *, first):
            for trial in trials:
                store.create_new_trial(study_id, trial)

        monkeypatch.setattr(sampling.foreign, "create_waiting", one_by_one)
        sampling.plan(store, "theirs", more)
        with store.engine.connect() as connection:
            for table, columns in tables.items():
                join = "" if table == "trials" else "JOIN trials USING (trial_id)"
                ours, theirs = (
                    connection.exec_driver_sql(
                        f"SELECT {columns} FROM {table} {join} JOIN studies USING (study_id) "
                        f"WHERE study_name = '{name}' ORDER BY {columns}"
                    ).all()
                    for name in ("ours", "theirs")
                )
                assert ours == theirs and (ours or kind == "tpe"), table
        store.remove_session()
        store.engine.dispose()


def test_values_and_constraints_have_the_rows_of_optunas_own_calls(services, data, tmp_path):
    file = cells.study(tmp_path, "ours", data=data, epochs=1, rates="{low = 1e-4, high = 1e-2, log = true}")
    rest = '[sampler]\nname = "random"\ntrials = 1\n[bounds]\nparameters = 1_000_000\n'
    file.write_text('objectives = ["nmse", "parameters"]\n' + file.read_text() + rest)
    chosen, point = study.load(str(file)), {"filters": 4, "learning_rate": 1e-3}
    tables = {
        "study_directions": "direction, objective",
        "trial_values": "number, objective, value, value_type",
        "trial_params": "number, param_name, param_value, distribution_json",
        "trial_system_attributes": "number, key, value_json",
        "trial_intermediate_values": "number, step",
    }
    with fresh_database(services) as url, closing(Queue(url)) as queue:
        store = sampling.storage(url)
        sampling.plan(store, "ours", chosen)
        queue.install()
        queue.put_study(records.study_row("ours"))
        queue.put_jobs("ours", [NewJob(kind="trial", number=0)])
        job = queue.claim("ours", worker="w", lease=600)
        spec, cost = study.trial_spec(chosen, "i", records.facts(), point, config=None)
        queue.fill(job, spec, cost)
        for _ in range(2):
            sampling.tell(store, chosen, queue.job(job.id), point)
        queue.end(job, "done", result=records.result(0.25))
        for _ in range(2):
            sampling.update_trial(store, chosen, queue.job(job.id), [queue.job(job.id)])
        assert sampling.outcomes(store, "ours")[0][1] == [0.25, spec.parameters]

        theirs = optuna.create_study(study_name="theirs", storage=store, directions=["minimize", "minimize"])
        theirs.enqueue_trial(point)
        trial = theirs.ask(sampling.distributions(chosen))
        trial.set_constraint("parameters", math.log(spec.parameters / 1_000_000))
        theirs.tell(trial, [0.25, spec.parameters])
        with store.engine.connect() as connection:
            for table, columns in tables.items():
                join = "" if table == "study_directions" else "JOIN trials USING (trial_id)"
                ours, own = (
                    connection.exec_driver_sql(
                        f"SELECT {columns} FROM {table} {join} JOIN studies USING (study_id) "
                        f"WHERE study_name = '{name}' ORDER BY {columns}"
                    ).all()
                    for name in ("ours", "theirs")
                )
                own = [row for row in own if "fixed_params" not in row]  # of the call that gave it the point
                assert ours == own and (ours or table == "trial_intermediate_values"), table
        (best,) = optuna.load_study(study_name="ours", storage=store).best_trials
        assert best.values == [0.25, spec.parameters] and best.params == point
        store.remove_session()
        store.engine.dispose()


def filling(url: str, store, chosen: study.Study, name: str):
    """A function that chooses the point of a trial, as for a running job, and shows it in Optuna."""
    queue = Queue(url)
    queue.install()
    queue.put_study(records.study_row(name))
    queue.put_jobs(name, [NewJob(kind="trial", number=n) for n in range(14)])
    jobs = [queue.claim(name, worker="w", lease=600) for _ in range(14)]
    queue.close()

    def fill(number: int) -> dict:
        point = sampling.suggest(store, name, chosen, number)
        sampling.tell(store, chosen, jobs[number], point)
        trial = store.get_all_trials(store.get_study_id_from_name(name))[number]
        assert (trial.state.name, trial.params) == ("RUNNING", point)
        return point

    return fill


def test_targets_that_move_in_unknown_ways_are_refused_where_it_must_be_known(data, tmp_path, monkeypatch):
    load = preparation.data_sets.the_dataset
    monkeypatch.setattr(preparation.data_sets, "the_dataset", lambda *words: replace(load(*words), symmetries={}))
    file = str(cells.study(tmp_path, "unknown", data=data, epochs=1))
    prepare(study.load(file))
    with pytest.raises(StudyError, match=r"tiny: nothing is known of how the targets move .* model.symmetric = false"):
        prepare(study.load(file, ["training.augmentation=symmetry"]))


def test_physics_needs_phases_that_fit_the_labels_and_they_belong_to_the_study(data, tmp_path):
    folder = tmp_path / "known"
    shutil.copytree(data, folder)
    file = cells.study(tmp_path, "physical", data=folder, epochs=1)
    text = (
        file.read_text()
        .replace("cnn", "periodic")
        .replace("dropout = 0.2", 'depth = 2\nstride = 2\nphysics = "bounded"')
    )
    file.write_text(text.replace("filters", "width"))
    facts = (folder / "dataset.toml").read_text().partition("[phases")[0]
    for matrix, inclusion, message in (
        (None, None, "model.physics needs two known phases: .* found no phases"),
        (
            7.0,
            140.0,
            r"60 of 60 lie outside the bounds of Voigt and Reuss by more than 1% of .* \(the worst, \d+_cell\.png",
        ),
        (3.5, 71.0, r"0 of 60 lie .* Hill's relations are missed by 0\.\d+ GPa \(at most 0\.0\d+\). Are young_modulus"),
        (3.5, 5.905, r"phases whose lambda \+ mu = E .* differ by more than 0.1%: .* Found 4.32099 and 4.32157 GPa"),
        (3.5, 70.0, None),
    ):
        known = "" if matrix is None else cells.PHASES.format(matrix=matrix, inclusion=inclusion)
        (folder / "dataset.toml").write_text(facts + known)
        if message is not None:
            with pytest.raises(StudyError, match=message):
                prepare(study.load(str(file)))
            continue
        ready = prepare(study.load(str(file)))
        assert ready.canonical["phases"]["inclusion"]["lame_mu"] == pytest.approx(70 / 2.44)
        specs = [spec for spec, _ in ready.specs()]
        assert all(spec.phases == ready.canonical["phases"] for spec in specs) and len(specs) == 4
    assert "phases" not in prepare(study.load(str(file), ["model.physics=none"])).canonical
    table = next(folder.glob("*.csv"))
    rows = [line.split(",") for line in table.read_text().split()]
    for digits, message in ((3, None), (1, r"[1-9]\d? of 60 lie outside")):
        rounded = [",".join([row[0], *(f"{float(number):.{digits}g}" for number in row[1:])]) for row in rows]
        table.write_text("\n".join(rounded) + "\n")
        if message is None:
            prepare(study.load(str(file)))
            continue
        with pytest.raises(StudyError, match=message):
            prepare(study.load(str(file)))


@pytest.mark.parametrize(
    ("depth", "rest"),
    [("[2, 4]", ""), ("{low = 2, high = 4}", '[sampler]\nname = "random"\ntrials = 3\n')],  # four stages: 17 pixels
    ids=["grid", "random"],
)
def test_a_space_with_a_network_that_does_not_fit_the_images_is_refused(data, tmp_path, depth, rest):
    file = cells.study(tmp_path, "deep", data=data, epochs=1)
    text = file.read_text().replace('"cnn"', '"periodic"').replace("dropout = 0.2", "stride = 1")
    file.write_text(text.replace("filters = [2, 4]", f"depth = {depth}") + rest)
    with pytest.raises(
        StudyError, match=r"tiny: .* do not fit deep at depth=4 lr1e-3: periodic: .* at least 17x17 pixels"
    ):
        prepare(study.load(str(file)))
    prepare(study.load(str(file), ["space.depth=[2, 3]"]))


@pytest.mark.parametrize(
    "kind", ["tpe", "qmc", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("random", "gp"))]
)
def test_the_seed_decides_the_points_whoever_fills_them(services, data, tmp_path, kind):
    """TPE and GP draw their first ten at random, too."""

    def points(order: list[int], seed: int) -> list[dict]:
        rates = "{low = 1e-4, high = 1e-2, log = true}"
        file = cells.study(tmp_path, "sampled", data=data, epochs=1, rates=rates)
        file.write_text(file.read_text() + f'[sampler]\nname = "{kind}"\ntrials = 4\n')
        chosen = study.load(str(file), [f"seed={seed}"])
        with fresh_database(services) as url:
            store = sampling.storage(url)
            sampling.plan(store, "sampled", chosen)
            fill = filling(url, store, chosen, "sampled")
            found = {number: fill(number) for number in order}
            assert found[2] == fill(2), "a trial that has its point keeps it"
            study_id = store.get_study_id_from_name("sampled")
            trial_id = store.get_trial_id_from_study_id_trial_number(study_id, 2)
            for ended, value in (("FAIL", None), ("COMPLETE", [0.5])):  # it was dead; another repeat of it is done
                store.set_trial_state_values(trial_id, sampling.TrialState[ended], values=value)
                outcomes = {t.number: (t.state, t.values or []) for t in store.get_all_trials(study_id)}
                assert sampling.outcomes(store, "sampled") == outcomes
                assert found[2] == fill(2), "and is not shown as waiting yet"
            store.remove_session()
            store.engine.dispose()
        return [found[number] for number in range(4)]

    first = points([0, 1, 2, 3], seed=5)
    assert points([2, 3, 1, 0], seed=5) == first
    assert points([0, 1, 2, 3], seed=6) != first
    assert len({point["learning_rate"] for point in first}) == 4, "no two workers draw the same"


FINE = """
[data]
path = "{data}"
image_size = 32
[model]
family = "transfer"
weights = "none"
{fixed}
[sampler]
name = "random"
trials = 2
[space]
{space}
"""


def test_a_batch_that_no_batch_norm_can_be_trained_on_is_refused_at_planning(data, tmp_path):
    def plan_for(space, fixed=""):
        (tmp_path / "fine.toml").write_text(FINE.format(data=data, space=space, fixed=fixed))
        return prepare(study.load(str(tmp_path / "fine.toml")))

    wide = 'backbone = ["vgg16", "resnet50"]\ntrainable = ["head", "all"]\n'
    with pytest.raises(
        StudyError, match=r"fine at resnet50 .*batch_size = 1: .* expected at least 2 images in a batch"
    ):
        plan_for(wide + "batch_size = {low = 1, high = 32}")
    assert plan_for(wide + "batch_size = {low = 2, high = 32}").study.trials == 2
    assert plan_for("batch_size = [32, 1]", 'backbone = "resnet50"\ntrainable = "head"').study.trials == 2


def test_phases_beyond_what_a_model_file_may_hold_are_refused_at_planning(tmp_path):
    data = cells.make(tmp_path / "stiff", count=30)
    (data / "dataset.toml").write_text(cells.PHASES.format(matrix=3.5e15, inclusion=7e16))
    text = '[data]\npath = "stiff"\n[model]\nfamily = "periodic"\nphysics = "hill"\nwidth = 1\n[space]\ndepth = [1]\n'
    (tmp_path / "stiff.toml").write_text(text)
    with pytest.raises(StudyError, match=r"Lame constants are at most 1e\+15, found .*larger unit"):
        prepare(study.load(str(tmp_path / "stiff.toml")))
