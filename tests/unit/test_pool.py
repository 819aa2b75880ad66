"""A worker of the pool: which study a free trainer goes to, and what a study that it cannot train costs the others."""

from collections import Counter, deque
from dataclasses import replace

import pytest
import records
from test_supervisor import JOB, TRAINED, Bench, FakePruning, FakeQueue, FakeTasks, NoReconcilers, epoch

from hpo import api
from hpo.errors import ServiceError, SettingsError
from hpo.queue import OpenStudy, Orders, Stop
from hpo.recording import outcomes
from hpo.worker import protocol
from hpo.worker.crew import BACKLOG
from hpo.worker.data_file import DataFile
from hpo.worker.ending import STOP_GRACE, Limits
from hpo.worker.studies import Served, Studies


class SharedQueue(FakeQueue):
    """Several studies in memory."""

    def __init__(self, events: list) -> None:
        super().__init__(events)
        self.jobs: dict[str, deque] = {}
        self.running: Counter[str] = Counter()  # of other workers as well
        self.about: dict[str, dict] = {}  # what differs from an ordinary study
        self.stopped: dict[str, Stop] = {}

    def plan(self, name: str, count: int, **about) -> None:
        first = 100 * len(self.jobs)
        self.jobs[name] = deque(replace(JOB, id=first + number, study=name, number=number) for number in range(count))
        self.about[name] = about

    def open_studies(self, *, lease):
        rows = [
            OpenStudy(
                **{"name": name, "created_at": 0.0, "stops": 0, "priority": 0, "paused": None}
                | {"running": self.running[name], "has_work": bool(self.jobs[name])}
                | self.about[name]
            )
            for name in self.jobs
        ]
        return [row for row in rows if row.name not in self.stopped]

    def claim(self, study, *, worker, device, lease, stops, created_at, take_over):
        is_known = created_at == self.about[study].get("created_at", 0.0)
        if study in self.stopped or not self.jobs[study] or not is_known:
            return None
        self._answer("claim", study)
        job = self.jobs[study].popleft()
        self.running[study] += 1
        self.rows[job.id] = job
        return job

    def give_back(self, job, outcome, *, reason, alone=True):
        super().give_back(job, outcome, reason=reason, alone=alone)
        self.running[job.study] -= 1

    def orders(self, worker, *, stops, held):
        stopped = {study: stop for study, stop in self.stopped.items() if study in stops}
        return Orders(leave=self.leave_order, stopped=stopped, cancelled=[])


class PoolBench(Bench):
    """A worker of the pool with everything around it in memory."""

    QUEUE = SharedQueue

    def studies(self) -> Studies:
        self.missing: dict[str, Exception] = {}  # why a study cannot be prepared here
        self.files: dict[str, FakeTasks] = {}
        return Studies(self.queue, self.recorder, NoReconcilers(self.queue, lease=30.0), self.served, only=None)

    def served(self, name: str) -> Served:
        if name in self.missing:
            raise self.missing[name]
        self.events.append(("prepare", name))
        tasks = self.files[name] = FakeTasks(self.events, name)
        return Served(
            row=records.study_row(name, created_at=self.queue.about[name].get("created_at", 0.0)),
            tasks=tasks,
            pruning=FakePruning(),
            start_closing=lambda job, folder, data: self.closing(job),
            data=DataFile(name),
            proof=records.spec(point={"study": name}),
        )

    @property
    def claims(self) -> list[str]:
        return [event[1] for event in self.of("claim")]

    def trains(self, trainer: int = 0) -> str | None:
        """The study whose trial a trainer trains."""
        job = next(job for job in self.processes[trainer].sent[::-1] if isinstance(job, protocol.Train))
        return str(job.data)

    def finish(self, *trainers: int) -> None:
        """Let trainers end their trials, and the results be recorded."""
        for trainer in trainers:
            self.says(epoch(1), TRAINED, trainer=trainer)
        before = sum(self.queue.running.values())
        for study in self.queue.running:
            self.queue.running[study] = 0
        assert before >= len(trainers)
        self.steps(1)


@pytest.fixture
def pool(tmp_path):
    return PoolBench(tmp_path)


def parts_of(pool, **changes):
    """Change what the pool sees of a study."""
    for name, about in changes.items():
        pool.queue.about[name] = about


def test_a_worker_of_the_pool_serves_every_open_study_in_turn(pool):
    pool.queue.plan("first", 2)
    pool.queue.plan("second", 2)
    pool.steps(3)
    for _ in range(3):
        pool.finish(0)
        pool.steps(1)
    assert sorted(pool.claims[:2]) == sorted(pool.claims[2:]) == ["first", "second"]


def test_trials_of_the_highest_priority_come_first_and_it_may_change(pool):
    pool.queue.plan("low", 3)
    pool.queue.plan("high", 2, priority=5)
    pool.steps(3)
    pool.finish(0)
    assert pool.claims == ["high", "high"]
    parts_of(pool, low={"priority": 9}, high={"priority": 5})
    pool.finish(0)
    pool.steps(1)
    assert pool.claims == ["high", "high", "low"]


def test_a_trainer_waits_for_a_study_that_is_prepared_rather_than_begin_a_lower_one(pool):
    pool.queue.plan("low", 1)
    pool.steps(3)
    assert pool.claims == ["low"]
    pool.finish(0)
    pool.queue.plan("below", 1)
    pool.queue.plan("above", 1, priority=1)
    pool.steps(3, record=False)
    assert pool.claims == ["low"], "its data set is being fetched"
    pool.steps(3)
    assert pool.claims == ["low", "above"]


def test_the_study_with_the_fewest_running_trials_gets_the_next_trainer(tmp_path):
    pool = PoolBench(tmp_path, count=4)
    pool.queue.plan("many", 9)
    pool.queue.plan("few", 9)
    pool.queue.running["many"] = 2  # of other workers
    pool.steps(4)
    assert Counter(pool.claims) == {"few": 3, "many": 1}


def test_a_study_planned_later_is_taken_up_within_two_seconds(pool):
    assert pool.steps(60) is None and pool.claims == []
    pool.queue.plan("later", 1)
    begun = pool.clock.now
    while not pool.claims:
        pool.step()
    assert pool.clock.now - begun <= 2.0 and pool.trains() == "later"


def test_a_pool_with_nothing_open_says_so_once_and_stays(pool, caplog):
    assert pool.steps(120) is None
    assert [record.message for record in caplog.records if "No study is open" in record.message] != []
    assert caplog.text.count("No study is open") == 1


def test_a_worker_that_fetches_a_data_set_is_not_idle(tmp_path):
    pool = PoolBench(tmp_path, limits=Limits(idle=5.0))
    pool.queue.plan("large", 1)
    assert pool.steps(60, record=False) is None, "it fetches"
    pool.steps(3)
    pool.finish(0)
    assert pool.steps(60) is False and pool.claims == ["large"]


@pytest.mark.parametrize("error", [ServiceError("no weights here"), OSError("no data set here")])
def test_a_study_that_cannot_be_prepared_here_is_left_and_said_so_once(pool, caplog, error):
    pool.queue.plan("odd", 2, priority=1)
    pool.queue.plan("even", 2)
    pool.missing["odd"] = error
    pool.steps(60)
    assert pool.claims == ["even"] and caplog.text.count("odd is left to other workers") == 1
    del pool.missing["odd"]  # somebody has brought it
    pool.finish(0)
    pool.steps(100)
    pool.finish(0)
    pool.steps(3)
    assert pool.claims == ["even", "even", "odd"]


def test_a_study_whose_proof_fails_is_left_and_the_others_go_on(pool, caplog):
    pool.queue.plan("large", 1, priority=1)
    pool.queue.plan("small", 1)
    pool.proof = None
    pool.steps(2)
    pool.says(protocol.OutOfMemory(reason="1 TB asked for"))
    pool.steps(1)
    pool.says(protocol.Proved(device=""))
    pool.steps(2)
    assert pool.claims == ["small"] and "large is left to other workers" in caplog.text
    assert "1 TB asked for" in caplog.text and pool.of("give back") == []


def test_a_trainer_proves_each_study_once(pool):
    pool.queue.plan("first", 3)
    pool.queue.plan("second", 3)
    pool.steps(3)
    for _ in range(5):
        pool.finish(0)
        pool.steps(1)
    proofs = [request.spec.point["study"] for request in pool.requests(protocol.Prove)]
    assert len(pool.claims) == 6 and sorted(proofs) == ["first", "second"]


def test_a_stopped_study_is_handed_back_and_others_go_on(tmp_path):
    pool = PoolBench(tmp_path, count=2)
    pool.queue.plan("going", 4)
    pool.queue.plan("halted", 4)
    pool.steps(4)
    halted = next(index for index in (0, 1) if pool.trains(index) == "halted")
    pool.queue.stopped["halted"] = Stop(by="anna", at=0.0)
    pool.steps(2)
    assert pool.requests(protocol.Stop, trainer=halted) and not pool.requests(protocol.Stop, trainer=1 - halted)
    pool.says(protocol.Returned(epoch=1), trainer=halted)
    pool.steps(3)
    assert [event[2] for event in pool.of("give back")] == ["handed back"]
    assert pool.supervisor.ending.reason is None
    assert pool.claims.count("going") == 2 and pool.claims.count("halted") == 1
    del pool.queue.stopped["halted"]  # `hpo run` of it
    parts_of(pool, halted={"stops": 1, "priority": 1})
    pool.finish(1 - halted)
    pool.steps(4)
    assert pool.events.count(("prepare", "halted")) >= 2, "it is served as it is now"


def test_a_trainer_that_does_not_hand_a_stopped_study_back_is_killed(pool):
    pool.queue.plan("halted", 1)
    pool.steps(3)
    pool.queue.stopped["halted"] = Stop(by="anna", at=0.0)
    pool.steps(STOP_GRACE + 3)
    assert pool.processes[0].killed and [event[2] for event in pool.of("give back")] == ["hpo stop"]
    assert pool.supervisor.ending.reason is None


def test_a_study_that_was_planned_again_under_its_name_is_served_as_it_is_now(pool):
    pool.queue.plan("again", 2)
    pool.steps(3)
    pool.queue.about["again"] = {"created_at": 1.0}  # deleted and planned between two looks
    pool.finish(0)
    pool.steps(4)
    assert pool.claims == ["again", "again"] and pool.events.count(("prepare", "again")) == 2
    second = [event[0] for event in pool.events if event[1:2] == ("again",) and event[0] in ("claim", "prepare")]
    assert second == ["prepare", "claim", "prepare", "claim"], "not with the data set of the first one"


@pytest.mark.parametrize("work", [api.run, api.detach])
def test_a_priority_out_of_range_is_refused_before_anything_is_planned(work):
    with pytest.raises(SettingsError, match="--priority: expected -1000 to 1000, found 1001"):
        work("grid", priority=1001)


def test_hpo_stop_without_a_study_ends_the_worker(pool):
    pool.queue.plan("going", 1)
    pool.steps(3)
    pool.queue.leave_order = Stop(by="anna", at=0.0)
    pool.steps(2)
    assert pool.supervisor.ending.reason == "hpo stop" and pool.supervisor.ending.asked.by == "anna"


def test_a_paused_study_is_left_until_the_pause_ends(pool, caplog):
    pool.queue.plan("doubtful", 1, paused="four failed in a row")
    pool.queue.plan("sound", 1)
    pool.steps(5)
    assert pool.claims == ["sound"] and caplog.text.count("doubtful is paused") == 1
    parts_of(pool, doubtful={})
    pool.finish(0)
    pool.steps(3)
    assert pool.claims == ["sound", "doubtful"]


def test_results_that_one_study_cannot_record_stop_that_study_alone(tmp_path, caplog):
    pool = PoolBench(tmp_path, count=2)
    pool.queue.plan("refused", 4)
    pool.queue.plan("taken", 4)
    pool.steps(4)
    pool.inbox.post(outcomes.NothingRecorded(study="refused", reason="trial 0 of refused: gone"))
    pool.steps(2)
    assert "refused is left to other workers" in caplog.text and pool.supervisor.ending.reason is None
    refused = next(index for index in (0, 1) if pool.trains(index) == "refused")
    pool.says(protocol.Returned(epoch=1), trainer=refused)
    pool.steps(3)
    assert pool.claims.count("taken") == 2 and pool.claims.count("refused") == 1


def test_a_failure_is_looked_into_by_a_fresh_trainer_for_that_study(pool):
    pool.queue.plan("first", 1)
    pool.queue.plan("second", 0)
    pool.steps(3)
    pool.says(protocol.Failed(reason="odd"))
    pool.steps(2)
    assert [event[1:4] for event in pool.of("give back")] == [(0, "odd", outcomes.AttemptOutcome.FAILED)]
    assert [request.spec.point["study"] for request in pool.requests(protocol.Prove, trainer=1)] == ["first"]


def test_a_gpu_that_cannot_train_one_study_trains_the_others(tmp_path, caplog):
    pool = PoolBench(tmp_path, count=2, gpus=("0", "1"))
    pool.broken["0"] = None
    pool.queue.plan("large", 4, priority=1)
    pool.queue.plan("small", 4)
    pool.steps(2)
    pool.says(protocol.Failed(reason="no kernel"), trainer=0)
    pool.steps(1)
    pool.says(protocol.Proved(device="A"), trainer=0)
    pool.steps(2)
    assert (pool.trains(0), pool.trains(1)) == ("small", "large")
    assert "GPU 0 trains nothing of large" in caplog.text and not pool.supervisor.failed_gpus


def test_a_trainer_that_lacks_memory_beside_others_waits_for_their_end(tmp_path):
    pool = PoolBench(tmp_path, count=2)
    pool.queue.plan("small", 9)
    pool.steps(4)
    pool.queue.plan("large", 1, priority=1)
    pool.processes[0].proof = pool.processes[1].proof = protocol.OutOfMemory(reason="no memory")
    pool.finish(0)
    pool.steps(5)
    assert pool.claims == ["small", "small"], "rather than begin another trial of the lower priority"
    pool.processes[0].proof = pool.processes[1].proof = protocol.Proved(device="")
    pool.says(epoch(1), TRAINED, trainer=1)
    pool.steps(5)
    assert pool.claims[2] == "large"


def test_no_trial_of_any_study_is_claimed_while_too_many_finished_ones_wait(pool):
    pool.queue.plan("first", 9)
    pool.queue.plan("second", 9)
    pool.steps(3)
    for _ in range(8):
        if any(trainer.trains for trainer in pool.supervisor._crew.trainers):
            pool.says(epoch(1), TRAINED)
        pool.steps(3, record=False)
    assert {job.study for job in pool.supervisor.leases.jobs} == {"first", "second"}
    assert len(pool.supervisor.leases.jobs) == 1 + BACKLOG + 1
