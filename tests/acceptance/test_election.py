"""Which version is the champion: elected from the database's rows, whatever tags, names and other databases say."""

import dataclasses
import math
import subprocess
import time

import cells
import pytest
import records
from mlflow import MlflowClient
from shell import Shell, fresh_database

from hpo import settings, study
from hpo.errors import StudyConflict
from hpo.planning import plans as planning
from hpo.planning.preparation import prepare
from hpo.queue import Job, Queue, State
from hpo.scores import ranking
from hpo.scores.standings import Rival, Standing, standings
from hpo.study.records import SourceTrial
from hpo.tracking.client import Tracker


def rival(name, trials, *, best_of=None, closed=True):
    """A study with trials {(number, repeat): validation NMSE, or a state}; `best_of`: by number the other's run."""
    row = records.study_row(name, name, facts=records.facts(model_name="m", registered=True))
    closing = job(name, -1, 0, "done" if closed else "waiting", kind="closing")
    made = [job(name, *key, value, best_of=(best_of or {}).get(key[0])) for key, value in trials.items()]
    return Rival(row=row, jobs=[closing, *made])


def job(name, number, repeat, value, *, kind="trial", best_of=None):
    state = State(value if isinstance(value, str) else "done")
    known = {"study": name, "kind": kind, "number": number, "repeat": repeat, "state": state}
    source = SourceTrial(study="?", trial=0, run_id=best_of) if best_of else None
    return Job(
        **known,
        **dict.fromkeys(("config", "worker", "checkpoint", "reason")),
        **dict.fromkeys(("id", "cost", "attempt", "fence", "epochs", "changed_at"), 0),
        spec=records.spec(best_of=source),
        run_id=f"{name}/{number}/{repeat}",
        result=None if isinstance(value, str) else records.result(value),
        mirrored=True,
        alive=False,
    )


def first(*rivals):
    found = standings(rivals)
    return min(found, key=found.__getitem__)


SEARCH = rival("search", {(7, 0): 0.001, (4, 0): 0.0015})
GRID = rival("grid", {(22, 0): 0.005})


def test_a_network_stands_for_its_point_and_a_lucky_seed_does_not_win():
    assert first(SEARCH, GRID) == "search/7/0"
    repeated = rival("repeated", {(0, 0): 0.0005, (0, 1): 0.0115})
    assert first(GRID, repeated) == "grid/22/0", "its best seed is lower, its mean is not"
    assert standings([repeated])["repeated/0/0"] == Standing(point=pytest.approx(0.006), own=0.0005)


def test_best_points_trained_again_stand_by_the_scores_found_then():
    again = rival("again", {(0, 0): 0.002, (0, 1): 0.004}, best_of={0: "search/4/0"})
    found = standings([SEARCH, GRID, again])
    assert found["search/7/0"] == Standing(point=math.inf, own=0.001), "it was not among the best points"
    assert found["search/4/0"] == Standing(point=0.003, own=0.0015)
    assert first(SEARCH, GRID, again) == "search/4/0", "of the point's networks the one with the lowest score"
    other = rival("other", {(1, 0): 0.0025}, best_of={1: "search/7/0"})
    assert first(SEARCH, again, other) == "search/7/0", "of two studies each answers for its points"


def test_a_study_answers_for_another_only_once_it_is_closed():
    open_still = rival("again", {(0, 0): 0.002}, best_of={0: "search/4/0"}, closed=False)
    assert first(SEARCH, open_still) == "search/7/0"
    assert standings([SEARCH, open_still], closing="again")["search/7/0"].point == math.inf


def test_a_study_that_closes_again_goes_on_answering_meanwhile():
    again = rival("again", {(0, 0): 0.002, (0, 1): "waiting"}, best_of={0: "search/4/0"}, closed=False)
    again = dataclasses.replace(again, row=dataclasses.replace(again.row, facts=records.facts(closed=True)))
    assert first(SEARCH, again) == "search/4/0"


def test_a_configuration_whose_repeats_all_diverged_ranks_below_one_with_some():
    one = rival("again", {(0, 0): 0.002, (0, 1): "diverged"}, best_of={0: "search/4/0"})
    both = rival("again", {(0, 0): "diverged", (0, 1): "diverged"}, best_of={0: "search/4/0"})
    assert standings([SEARCH, one])["search/4/0"].point == standings([SEARCH, both])["search/4/0"].point == math.inf


def test_a_study_planned_again_under_the_same_name_is_another_one():
    again = rival("again", {(0, 0): 0.32}, best_of={0: "a-run-of-the-deleted-one"})
    assert first(rival("base", {(6, 0): 0.01}), again) == "base/6/0"


def test_a_point_of_which_a_repeat_diverged_comes_behind_all_others():
    jobs = rival("s", {(0, 0): 0.1, (0, 1): "diverged", (1, 0): 0.5, (1, 1): 0.7, (2, 0): 0.6, (2, 1): "dead"}).jobs
    assert [each.number for each in ranking.ranked(jobs)] == [1, 2, 0], "means of 0.6, number first, then the unstable"
    words = {number: ranking.incomplete([each for each in jobs if each.number == number]) for number in (0, 1, 2)}
    assert words == {0: "1 of 2 repeats, 1 diverged", 1: "", 2: "1 of 2 repeats, 1 dead"}
    assert standings([rival("s", {(0, 0): 0.1, (0, 1): "diverged"})])["s/0/0"].point == math.inf


# On real services


def small(folder, name, *, data, filters="[4]", epochs=12, lines=""):
    file = folder / f"{name}.toml"
    file.write_text(
        f'{lines}\n[data]\npath = "{data}"\n[model]\nfamily = "cnn"\nkernel_size = 3\ndropout = 0\n'
        f"[space]\nfilters = {filters}\n[training]\nepochs = {epochs}\nbatch_size = 16\n"
    )
    return file


def versions(shell, study_name):
    """Of the study's registered model: (its name, by number (run, aliases, tags))."""
    client, name = MlflowClient(shell.tracking_uri), shell.queue.study(study_name).facts.model_name
    aliases = client.get_registered_model(name).aliases
    found = {
        int(version.version): (
            version.run_id,
            {alias for alias, number in aliases.items() if number == version.version},
            version.tags,
        )
        for version in client.search_model_versions(f"name = '{name}'")
    }
    return name, found


@pytest.mark.acceptance
@pytest.mark.slow
def test_a_repeat_that_comes_back_moves_the_champion_and_every_tag(shell, tmp_path):
    data = cells.make(tmp_path / "own", seed=31, count=120)
    file = small(tmp_path, "luck", data=data, filters="[2, 4]", epochs=40, lines="repeats = 2")
    shell.hpo("run", "--study", file)
    before = {(each.number, each.repeat): each for each in shell.trials("luck")}
    best = ranking.ranked(list(before.values()))[0]
    _, found = versions(shell, "luck")
    assert [(run, "champion" in aliases) for run, aliases, _ in found.values()] == [(best.run_id, True)]

    # A repeat of the winner that had been cancelled comes back with a bad score: as if it had been trained just now.
    other = next(each for key, each in before.items() if key[0] == best.number and each.run_id != best.run_id)
    with shell.queue.engine.begin() as connection:
        worse = "jsonb_set(result::jsonb, '{best_val_nmse}', '9.5')"
        connection.exec_driver_sql(f"UPDATE hpo.job SET result = {worse} WHERE id = {other.id}")
        connection.exec_driver_sql("UPDATE hpo.job SET state = 'waiting', result = NULL WHERE number = -1")
    shell.hpo("run", "--study", file)
    ranked = ranking.ranked(shell.trials("luck"))
    assert ranked[0].number != best.number
    name, found = versions(shell, "luck")
    by_run = {run: (number, aliases, tags) for number, (run, aliases, tags) in found.items()}
    assert by_run[ranked[0].run_id][1] == {"champion", "luck"}
    stale = by_run[best.run_id]
    assert stale[1] == set() and float(stale[2]["hpo.point_val_nmse"]) == pytest.approx(
        (9.5 + best.result.best_val_nmse) / 2
    ), "tags say what the rows say by now"
    client = MlflowClient(shell.tracking_uri)
    client.set_registered_model_alias(name, "champion", str(stale[0]))
    client.set_model_version_tag(name, str(stale[0]), "hpo.best_val_nmse", "0.0")
    said = shell.hpo("doctor", code=1)
    assert f"@champion is {name} version {stale[0]}, but {name} version {by_run[ranked[0].run_id][0]} is better" in said
    assert f"expected the tag hpo.best_val_nmse {best.result.best_val_nmse}, found 0.0" in said
    shell.hpo("doctor", "--fix", code=1)  # the made-up score is no score of its curve
    assert versions(shell, "luck")[1][by_run[ranked[0].run_id][0]][1] == {"champion", "luck"}


@pytest.mark.long
@pytest.mark.acceptance
def test_two_databases_on_one_server_have_models_and_champions_of_their_own(shell, services, tmp_path):
    data = cells.make(tmp_path / "own", seed=32)
    good = small(tmp_path, "lab", data=data, epochs=60)
    shell.hpo("run", "--study", good)
    name, first_versions = versions(shell, "lab")
    client = MlflowClient(shell.tracking_uri)
    experiment = client.get_experiment_by_name("lab")
    client.rename_experiment(experiment.experiment_id, "lab of the first database")  # as hpo advises
    with fresh_database(services) as url:
        other = Shell(tmp_path / "other", url, shell.tracking_uri)
        try:
            said = other.hpo("run", "--study", small(data, "lab", data=data, filters="[5]", epochs=30))
            assert "@champion is this version" in said, "it has lost to nobody of its database"
            own_name, own = versions(other, "lab")
            assert own_name == f"{name}-{other.queue.database_id()[:8]}"
            assert [(run, aliases) for run, aliases, _ in own.values()] == [
                (other.trials("lab")[0].run_id, {"champion", "lab"})
            ]
            assert "each as recorded in the database" in other.hpo("download", tmp_path / "theirs")
            assert versions(shell, "lab") == (name, first_versions), "nothing of the first database was touched"
            other.hpo("delete", "--study", "lab", "--yes")
            assert versions(shell, "lab") == (name, first_versions)
            assert client.search_model_versions(f"name = '{own_name}'") == []
        finally:
            other.close()
    assert "Healthy" in shell.hpo("doctor", "--study", "lab")


@pytest.mark.long
@pytest.mark.acceptance
def test_a_study_that_another_begins_with_is_not_deleted(shell, tmp_path):
    data = cells.make(tmp_path / "own", seed=34)
    shell.hpo("run", "--study", small(tmp_path, "base", data=data, filters="[2, 4]", epochs=3))
    again = tmp_path / "again.toml"
    again.write_text('best_of = "base.toml"\npoints = 1\nrepeats = 2\n')
    shell.hpo("run", "--study", again)
    said = shell.hpo("delete", "--study", "base", "--yes", code=1)
    assert "base is not deleted: again begins with its networks or points. Delete that first." in said
    shell.hpo("delete", "--study", "again", "--yes")
    assert "Deleted the study base." in shell.hpo("delete", "--study", "base", "--yes")


@pytest.mark.long
@pytest.mark.acceptance
def test_a_deletion_looks_again_after_its_question_and_goes_on_when_cut_short(shell, tmp_path):
    data = cells.make(tmp_path / "own", seed=35)
    file = small(tmp_path, "asked", data=data, epochs=4000)
    process = shell.start("run", "--study", file)
    shell.training("asked", 5)
    process.terminate()
    process.wait()
    asking = shell.start("delete", "--study", "asked", stdin=subprocess.PIPE)
    time.sleep(3)  # its question
    process = shell.start("run", "--study", file)
    shell.until(lambda: any(each.alive for each in shell.trials("asked")), "a worker")
    output, _ = asking.communicate("asked\n", timeout=120)
    assert asking.returncode == 1 and "Workers are training asked right now" in output
    process.terminate()
    process.wait()
    for step in ("deletion begun", "versions deleted", "experiment deleted"):
        shell.environment["HPO_CRASH_AT"] = f"{step}:{tmp_path / step.replace(' ', '-')}"
        cut = shell.start("delete", "--study", "asked", "--yes")
        cut.communicate(timeout=120)
        assert cut.returncode != 0, f"it did not die at '{step}'"
        assert '"half deleted"' in shell.hpo("studies", "--json")
        refused = "The study asked is half deleted: `hpo delete --study asked` deletes the rest"
        assert refused in shell.hpo("run", "--study", file, code=1)
        assert refused in shell.hpo("worker", "--study", "asked", code=1)
    del shell.environment["HPO_CRASH_AT"]
    assert "Deleted the study asked." in shell.hpo("delete", "--study", "asked", "--yes")
    assert shell.queue.studies() == []


@pytest.mark.service
def test_a_study_that_begins_with_one_of_its_own_alias_is_refused(database_url, tracking_uri, tmp_path):
    data = cells.make(tmp_path / "own", seed=37)
    small(tmp_path, "one.of", data=data)
    (tmp_path / "one-of.toml").write_text('best_of = "one.of.toml"\npoints = 1\n')
    queue, read = Queue(database_url), settings.read({"HPO_HOME": str(tmp_path / "home")})
    queue.install()
    with pytest.raises(StudyConflict, match=r"one-of begins with a study of the same name or alias, one\.of"):
        ready = prepare(study.load(str(tmp_path / "one-of.toml")))
        planning.plan(ready, queue, Tracker(tracking_uri), read, database_url)
    queue.close()


@pytest.mark.service
def test_studies_whose_aliases_would_be_the_same_are_not_planned_side_by_side(database_url, tracking_uri, tmp_path):
    data = cells.make(tmp_path / "own", seed=36)
    queue, tracker = Queue(database_url), Tracker(tracking_uri)
    queue.install()
    read = settings.read({"HPO_HOME": str(tmp_path / "home")})
    plans = [prepare(study.load(str(small(tmp_path, name, data=data)))) for name in ("alike.here", "alike-here")]
    planning.plan(plans[0], queue, tracker, read, database_url)
    with pytest.raises(
        StudyConflict, match=r"alike-here cannot be planned beside alike\.here.*both are called alike-here"
    ):
        planning.plan(plans[1], queue, tracker, read, database_url)
    assert MlflowClient(tracking_uri).get_experiment_by_name("alike-here") is None, "nothing was made"
    queue.close()
