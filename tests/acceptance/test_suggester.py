"""The process in which a sampler chooses points: it holds up no lease, and all repeats of a slot get the same point."""

import time

import cells
import psutil
import pytest
from shell import PATIENCE, check_recorded_once, clock

from hpo import settings, study
from hpo.planning import plans
from hpo.planning.preparation import prepare
from hpo.queue import LeaseLost, Queue
from hpo.search import sampling
from hpo.tracking.client import Tracker
from hpo.worker import suggester

RATES = "{low = 1e-4, high = 1e-2, log = true}"


@pytest.mark.long
@pytest.mark.acceptance
@pytest.mark.parametrize("kind", ["tpe", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("gp", "qmc"))])
def test_a_sampler_that_takes_long_costs_no_lease_and_one_that_is_killed_no_attempt(shell, data, tmp_path, kind):
    file = cells.study(tmp_path, name := f"slow-{kind}", data=data, epochs=2, rates=RATES)
    file.write_text(file.read_text() + f'[sampler]\nname = "{kind}"\ntrials = 2\n')
    shell.environment["HPO_LEASE"] = "2"
    run = shell.start("run", "--study", file, "--trainers", 1)

    def choosing() -> psutil.Process | None:
        children = psutil.Process(run.pid).children()
        return next((each for each in children if "hpo.worker.suggester" in " ".join(each.cmdline())), None)

    slow = shell.until(choosing, "a suggester")
    slow.suspend()
    job = shell.until(lambda: next((each for each in shell.trials(name) if each.alive), None), "a claim")
    end = clock(run) + 6  # seconds: three leases
    while clock(run) < end:
        assert shell.queue.expired(name, lease=2) == []
        time.sleep(0.1)
    assert shell.queue.job(job.id).spec is None, "it still waits for its point"
    slow.kill()
    output, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, output
    assert "suggester killed by SIGKILL" in output
    check_recorded_once(shell, name, points=2, epochs=2)
    assert [each.attempt for each in shell.trials(name)] == [1, 1]


@pytest.mark.long
@pytest.mark.acceptance
def test_the_suggester_ends_with_its_worker(shell, data, tmp_path):
    file = cells.study(tmp_path, "left", data=data, epochs=30_000, rates=RATES)
    file.write_text(file.read_text() + '[sampler]\nname = "random"\ntrials = 2\n')
    run = shell.start("run", "--study", file, "--trainers", 1)
    shell.training("left", epochs=1)
    children = psutil.Process(run.pid).children()
    assert any("hpo.worker.suggester" in " ".join(each.cmdline()) for each in children)
    run.kill()
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []


@pytest.mark.service
def test_a_chooser_that_froze_gives_its_repeat_the_point_another_one_has(
    database_url, tracking_uri, data, tmp_path, monkeypatch
):
    file = cells.study(tmp_path, "repeated", data=data, epochs=2, rates=RATES)
    text = file.read_text().replace("[data]", "repeats = 2\n[data]")
    file.write_text(text + '[sampler]\nname = "tpe"\ntrials = 1\n')
    queue, home = Queue(database_url), settings.read({"HPO_HOME": str(tmp_path / "home")})
    queue.install()
    plans.plan(prepare(study.load(str(file))), queue, Tracker(tracking_uri), home, database_url)
    store = sampling.storage(database_url)
    first, second = (queue.claim("repeated", worker="w", lease=60) for _ in range(2))
    choose = sampling.suggest

    def frozen(*_, **__):
        """Another worker chooses meanwhile, with other trials to look at."""
        monkeypatch.setattr(sampling, "suggest", choose)
        suggester.fill(queue, store, "repeated", second.id, second.fence)
        return {"filters": 4, "learning_rate": 0.00987}

    monkeypatch.setattr(sampling, "suggest", frozen)
    filled = suggester.fill(queue, store, "repeated", first.id, first.fence)
    other = queue.job(second.id)
    assert filled.spec.point == other.spec.point and filled.spec.point["learning_rate"] != 0.00987
    assert filled.spec.seed != other.spec.seed and filled.cost == other.cost
    (trial,) = store.get_all_trials(store.get_study_id_from_name("repeated"))
    assert (trial.state.name, trial.params) == ("RUNNING", filled.spec.point)

    queue.cancel("repeated", 0, None, by="anna")
    store.set_trial_state_values(trial._trial_id, sampling.TrialState.FAIL)
    sampling.tell(store, study.load(str(file)), filled, filled.spec.point)
    assert store.get_trial(trial._trial_id).state.name == "FAIL", "what was cancelled meanwhile stays so"
    with pytest.raises(LeaseLost):
        suggester.fill(queue, store, "repeated", first.id, first.fence)
    with pytest.raises(LeaseLost):
        queue.fill(filled, filled.spec, filled.cost)
    store.remove_session()
    store.engine.dispose()
    queue.close()
