"""The supervisor's decisions, driven with a fake clock, a queue in memory and trainers that are no processes."""

import socket
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import records

from hpo import settings
from hpo.cli.watch import by
from hpo.errors import NotFound, ServiceError
from hpo.files import sha256_of
from hpo.queue import AttemptOutcome, DatabaseLost, Job, Judged, LeaseLost, Orders, State, Stop
from hpo.recording import outcomes
from hpo.recording.reconcilers import Reconcilers
from hpo.recording.trained import Trained
from hpo.study.records import SplitScores
from hpo.worker import leases as leases_module
from hpo.worker import protocol
from hpo.worker.children import Suggester, Trainers
from hpo.worker.collaborators import Collaborators
from hpo.worker.crew import BACKLOG
from hpo.worker.data_file import FETCH_ATTEMPTS, DataFile
from hpo.worker.ending import OUT_OF_TIME, STOP_GRACE, STOP_LIMIT, Ending, Limits
from hpo.worker.studies import Served, Studies
from hpo.worker.supervisor import Supervisor
from hpo.worker.work_folder import WorkFolder, own_folder

FAILED, HANDED_BACK, PLACE_FAILED = AttemptOutcome.FAILED, AttemptOutcome.HANDED_BACK, AttemptOutcome.PLACE_FAILED
OUT_OF_MEMORY = AttemptOutcome.OUT_OF_MEMORY
LEASE, HANG = 30.0, 120.0  # seconds
JOB = Job(
    id=1, study="s", kind="trial", number=0, repeat=0, config=0, cost=1.0, spec=records.spec(point={"filters": 8}),
    state=State.RUNNING, attempt=1, fence=1, worker="w", run_id=None, checkpoint=None, result=None, reason=None,
    mirrored=True, alive=True, epochs=0, changed_at=0.0,
)  # fmt: skip
SCORES = records.result(0.5).validation
TRAINED = Trained(
    folder=Path("model"), predictions=Path("validation.csv"), epochs=2, best_epoch=2, best_val_nmse=0.5,
    best_val_mse=1.0, last_val_nmse=0.5, last_val_mse=1.0, validation=SCORES, last_validation=SCORES, files={},
    device=None,
)  # fmt: skip


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeQueue:
    """A queue in memory; `events` is everything that was written, in order."""

    def __init__(self, events: list) -> None:
        self.events, self.waiting, self.rows, self.lost, self.cancelled = events, deque(), {}, set(), []
        self.is_away, self.closing, self.stop, self.expired_jobs, self.paused = False, "waiting", None, [], None
        self.leave_order, self.created_at = None, 0.0

    def _answer(self, *event) -> None:
        if self.is_away:
            raise DatabaseLost("gone")
        self.events.append(event)

    def claim(self, study, *, worker, device, lease, stops, created_at, take_over):
        self._answer("claim")
        if not self.waiting or created_at != self.created_at:
            return None
        job = self.waiting.popleft()
        self.rows[job.id] = job
        return job

    def renew(self, jobs, *, lease):
        self._answer("renew", [job.id for job in jobs])
        return [job for job in jobs if job.id in self.lost]

    def add_epochs(self, job, epochs):
        if job.id in self.lost:
            raise LeaseLost(job.title)
        self._answer("epochs", job.id, [number for number, _, _ in epochs])

    def set_trained(self, job, trained):
        self._answer("trained", job.id)

    def give_back(self, job, outcome, *, reason, alone=True):
        self._answer("give back", job.id, reason, outcome, *([] if alone else ["beside others"]))

    def disown(self, worker, held):
        self._answer("disown", [job.id for job in held])

    def attend(self, *_, **__):
        return True

    def orders(self, worker, *, stops, held):
        stop, self.stop = self.stop, None
        cancelled, self.cancelled = self.cancelled, []
        stopped = {study: stop for study in stops} if stop is not None else {}
        return Orders(leave=self.leave_order, stopped=stopped, cancelled=cancelled)

    def job(self, job_id):
        return self.rows.get(job_id)

    def closing_state(self, study, *, created_at):
        self._answer("look")
        return self.closing if created_at == self.created_at else None

    def expired(self, study, *, lease):
        return self.expired_jobs

    def pause(self, study):
        return self.paused

    def leave(self, worker):
        self._answer("leave")


class NoReconciler:
    def reconcile(self, **_) -> int:
        return 0


class FakeTasks:
    """The recorder's tasks: each writes its name and returns its outcome."""

    def __init__(self, events: list, study: str = "s") -> None:
        self.events, self.data, self.store_error, self.study = events, None, None, study
        self.reconciler = NoReconciler()

    def reconcile(self, job):
        self.events.append(("reconcile", job.id))

    def hand_back(self, job, reason):
        return outcomes.HandedBack(job=job, reason=reason)

    def store_checkpoint(self, job, path, *, epoch, sha256):
        self.events.append(("checkpoint", job.id, epoch))

    def fetch(self, job, folder):
        return outcomes.Fetched(job=job, checkpoint=folder / "checkpoint", start=None)

    def show_pause(self, reason):
        self.events.append(("pause", reason))

    def fetch_data(self):
        self.events.append(("fetch data",))
        return self.data or outcomes.DataFetched(study=self.study, path=Path("again.npz"))

    def prove_store(self, refused=None):
        self.events.append(("prove store",))
        if self.store_error is not None:
            return outcomes.NoStore(study=self.study, error=self.store_error, refused=refused)
        return outcomes.StoreProved(study=self.study, refused=refused)

    def record(self, job, trained):
        self.events.append(("record", job.id))
        return outcomes.Ended(job=job, logged=True)

    def end(self, job, state, *, epoch, reason):
        self.events.append(("end", job.id, state, reason))
        return outcomes.Ended(job=job, logged=False)

    def bury(self, job, reason):
        raise NotImplementedError


class FakeRecorder:
    """Keeps tasks until a test lets them run."""

    def __init__(self, inbox: outcomes.Inbox) -> None:
        self.inbox, self.tasks, self.noted = inbox, deque(), []
        self.outage = SimpleNamespace(seconds=0.0, store_full=False)
        self.refusing, self.may_expire, self.alive, self.concern = False, True, True, None

    def refuses(self, study) -> bool:
        return self.refusing

    def put(self, job, task, give_up=None) -> None:
        self.tasks.append(task)

    def work(self) -> None:
        while self.tasks:
            outcome = self.tasks.popleft()()
            if outcome is not None:
                self.inbox.post(outcome)

    @property
    def idle(self) -> bool:
        return not self.tasks

    def watch(self, jobs) -> None: ...

    def note(self, error) -> None:
        self.noted.append(error)

    def is_alive(self) -> bool:
        return self.alive

    def finish(self, timeout, *, reconcile) -> bool:
        return True


class FakeProcess:
    """A child that says what a test lets it say, and keeps what it was sent."""

    def __init__(self, proof: protocol.Message | None = None) -> None:
        """`proof`: what it answers to Prove; None: nothing."""
        self.sent, self.coming, self.killed, self.closed, self.dies = [], [protocol.Ready()], None, False, False
        self.proof, self.lacked_memory = proof, False

    def fileno(self) -> int:
        raise AssertionError("no process")

    def send(self, message) -> None:
        self.sent.append(message)
        if isinstance(message, protocol.Prove) and self.proof is not None:
            self.coming.append(self.proof)

    def messages(self):
        messages, self.coming = self.coming, []
        self.closed = self.dies
        return messages

    def kill(self, reason=None) -> None:
        self.killed, self.dies = self.killed or reason or "killed", True

    def close(self, timeout=2.0) -> None: ...

    def obituary(self) -> str:
        return self.killed or "trainer ended with exit 1"


class NoReconcilers(Reconcilers):
    """Nothing to reconcile."""

    def add(self, reconciler) -> None: ...


class FakePruning:
    active = False

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}

    def look(self, jobs) -> None: ...

    def reason(self, job):
        return self.reasons.get(job.id)

    def finish(self, timeout) -> None: ...


class Bench:
    """A supervisor of `count` trainers with everything around it in memory."""

    QUEUE = FakeQueue

    def __init__(self, home: Path, *, count: int = 1, limits: Limits | None = None, gpus: tuple[str, ...] = ()) -> None:
        self.events: list[tuple] = []
        self.clock, self.queue, self.tasks = FakeClock(), self.QUEUE(self.events), FakeTasks(self.events)
        self.inbox, self.pruning, self.processes = outcomes.Inbox(), FakePruning(), []
        self.recorder = FakeRecorder(self.inbox)
        self.folder = WorkFolder(home, "1-abcdef")
        self.folder.path.mkdir(parents=True)
        self.suggester = FakeProcess()
        self.closing = None
        self.proof: protocol.Message | None = protocol.Proved(device="")  # of the next trainers
        self.broken: dict[str, protocol.Message | None] = {}  # what trainers on these GPUs answer instead
        self.data = DataFile(Path("data.npz"))
        parts = Collaborators(
            settings=replace(settings.read({"HPO_HOME": str(home)}), lease=LEASE, hang_timeout=HANG),
            queue=self.queue,
            recorder=self.recorder,
            inbox=self.inbox,
            studies=self.studies(),
            trainers=Trainers(self._start, count=count, gpus=gpus, clock=self.clock),
            start_suggester=lambda: Suggester(self.suggester, self.clock, database_url="postgresql://"),
            folder=self.folder,
            device="cpu",
            log_file=home / "worker.log",
            wait=self._wait,
            clock=self.clock,
        )
        self.supervisor = Supervisor("w", parts, Ending(self.clock), limits=limits or Limits())

    def studies(self) -> Studies:
        reconcilers = NoReconcilers(self.queue, lease=30.0)
        return Studies(self.queue, self.recorder, reconcilers, self.served, only=self.served("s"))

    def served(self, name: str) -> Served:
        return Served(
            row=records.study_row(name),
            tasks=self.tasks,
            pruning=self.pruning,
            start_closing=lambda job, folder, data: self.closing(job),
            data=self.data,
            proof=records.spec(),
        )

    def _start(self, gpu):
        self.processes.append(FakeProcess(self.broken.get(gpu, self.proof)))
        return self.processes[-1]

    def _wait(self, objects, timeout):
        self.clock.now += timeout
        return objects

    def step(self, *, record: bool = True) -> bool | None:
        if record:
            self.recorder.work()
        return self.supervisor.step()

    def steps(self, seconds: float, *, record: bool = True) -> bool | None:
        """Step until so much time is over or the work ends."""
        end, closed = self.clock.now + seconds, None
        while closed is None and self.clock.now < end:
            closed = self.step(record=record)
        return closed

    def says(self, *messages, trainer: int = 0) -> None:
        self.processes[trainer].coming += messages

    def requests(self, kind, trainer: int = 0) -> list:
        return [message for message in self.processes[trainer].sent if isinstance(message, kind)]

    def of(self, *names: str) -> list[tuple]:
        """The events of these names, in order."""
        return [event for event in self.events if event[0] in names]

    def training(self, **changes) -> Job:
        """Let the first trainer train a job."""
        job = replace(JOB, **changes)
        self.queue.waiting.append(job)
        self.steps(2)
        assert self.requests(protocol.Train)
        return job


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def epoch(number: int) -> protocol.EpochDone:
    return protocol.EpochDone(number=number, at=1000 * number, metrics={"val/nmse": 1 / number})


def test_a_trial_is_claimed_trained_recorded_and_reconciled(bench):
    job = bench.training()
    (request,) = bench.requests(protocol.Train)
    assert (request.spec, request.data, request.checkpoint) == (job.spec, Path("data.npz"), None)
    bench.says(epoch(1), epoch(2), TRAINED)
    bench.steps(1)
    bench.queue.closing = "done"
    assert bench.steps(5) is True
    names = [event[0] for event in bench.of("epochs", "record", "reconcile")]
    assert names == ["reconcile", "epochs", "record", "reconcile"]
    assert bench.supervisor.leases.jobs == [] and bench.supervisor.claims.claimed == 1


@pytest.mark.parametrize("count", [1, 2])
def test_no_trial_is_claimed_while_too_many_finished_ones_wait(tmp_path, count):
    bench = Bench(tmp_path, count=count)
    bench.recorder.work()  # the proof of the artifact store
    bench.queue.waiting += [replace(JOB, id=number, number=number) for number in range(1, 20)]
    for _ in range(10):
        bench.steps(2, record=False)
        for index, trainer in enumerate(bench.supervisor._crew.trainers):
            if trainer.trains:
                bench.says(epoch(1), epoch(2), TRAINED, trainer=index)
    held = len(bench.supervisor.leases.jobs)
    assert count + BACKLOG < held <= 2 * count + BACKLOG, "each trainer may end one more"
    bench.steps(LEASE, record=False)
    assert len(bench.supervisor.leases.jobs) == held
    bench.steps(2)
    assert len(bench.of("record")) == held
    assert len(bench.supervisor.leases.jobs) == count, "and the trainers have work again"


def test_a_finished_training_is_stored_before_it_is_recorded(bench):
    bench.training()
    bench.queue.is_away = True
    bench.says(epoch(1), TRAINED)
    bench.steps(2)
    assert bench.of("trained", "record") == []
    bench.queue.is_away = False
    bench.steps(2)
    assert bench.of("epochs", "trained", "record") == [("epochs", 1, [1]), ("trained", 1), ("record", 1)]


def test_what_a_dead_worker_of_this_home_has_trained_is_recorded_without_a_trainer(bench):
    left = bench.folder.path.parent / f"{socket.gethostname()}-2-fedcba"
    own_folder(left).close()
    (left / "job-1-1").mkdir()
    (left / "job-1-1" / "validation.csv").write_text("1")
    files = {"validation.csv": sha256_of(left / "job-1-1" / "validation.csv")}
    place = {"folder": left / "job-1-1" / "model", "predictions": left / "job-1-1" / "validation.csv"}
    trained = protocol.encode(replace(TRAINED, files=files, **place)).decode()
    bench.queue.waiting.append(replace(JOB, fence=2, trained=trained))
    bench.steps(3)
    assert bench.requests(protocol.Train) == []
    assert bench.of("trained", "record") == [("trained", 1), ("record", 1)]
    bench.queue.waiting.append(replace(JOB, fence=3, trained=trained))
    bench.steps(3)
    assert bench.requests(protocol.Train), "its folder is gone"


def test_leases_are_renewed_before_epochs_are_stored(bench):
    bench.training()
    bench.events.clear()
    bench.clock.now += LEASE
    bench.says(epoch(1))
    bench.step()
    assert [event[0] for event in bench.of("renew", "epochs")] == ["renew", "epochs"]


def test_leases_are_renewed_several_times_within_a_lease(bench):
    bench.training()
    bench.events.clear()
    bench.steps(LEASE)
    assert len(bench.of("renew")) >= 5 and bench.of("renew")[0] == ("renew", [1])


def test_a_checkpoint_is_stored_after_its_epochs_and_before_the_job_goes_back(bench):
    bench.training()
    written = protocol.CheckpointWritten(path=Path("c"), epoch=2, sha256="0")
    bench.says(epoch(1), epoch(2), written, protocol.Returned(epoch=2))
    bench.steps(1)
    assert bench.of("epochs", "checkpoint", "give back") == [
        ("epochs", 1, [1, 2]),
        ("checkpoint", 1, 2),
        ("give back", 1, "handed back", HANDED_BACK),
    ]


def test_however_many_epochs_wait_some_are_stored_at_a_time(bench, monkeypatch):
    monkeypatch.setattr(leases_module, "BATCH", 3)
    bench.training()
    bench.says(*map(epoch, range(1, 8)), TRAINED)
    bench.step()
    assert bench.of("epochs", "record") == [("epochs", 1, [1, 2, 3])]
    bench.steps(1)
    assert [event[2] for event in bench.of("epochs")] == [[1, 2, 3], [4, 5, 6], [7]]
    assert bench.events.index(("record", 1)) > bench.events.index(("epochs", 1, [7]))


def test_a_lost_lease_stops_the_trainer_and_nothing_more_is_written(bench, caplog):
    job = bench.training()
    bench.queue.lost = {job.id}
    bench.queue.rows[job.id] = replace(job, fence=2)
    bench.says(epoch(1))
    bench.steps(LEASE / 3)
    assert "trial 0 of s: lost its lease, stopping" in caplog.text
    assert bench.processes[0].killed and bench.supervisor.leases.jobs == []
    assert bench.of("give back") == []


def test_a_lost_lease_is_found_by_the_recorder_too(bench):
    job = bench.training()
    bench.queue.rows[job.id] = replace(job, fence=2)
    bench.inbox.post(outcomes.LostLease(job=job))
    bench.step()
    assert bench.processes[0].killed and bench.of("give back") == []


def test_an_end_by_our_own_hand_of_which_the_answer_was_lost_is_no_lost_lease(bench, caplog):
    job = bench.training()
    bench.queue.rows[job.id] = replace(job, state=State.DONE)
    bench.inbox.post(outcomes.LostLease(job=job))
    bench.step()
    assert "lost its lease" not in caplog.text and not bench.processes[0].killed
    assert bench.supervisor.leases.jobs == []


def test_a_cancelled_trial_stops_and_is_reconciled(bench, caplog):
    job = bench.training()
    bench.queue.rows[job.id] = replace(job, state=State.CANCELLED, reason="cancelled by anna")
    bench.queue.cancelled = [job]
    bench.events.clear()
    bench.steps(2)
    assert "cancelled by anna, stopping" in caplog.text and bench.processes[0].killed
    assert bench.of("reconcile", "give back") == [("reconcile", 1)]


def test_a_job_given_back_and_claimed_again_is_another_one(bench):
    old = bench.training()
    new = replace(old, fence=2)
    bench.supervisor.leases.hold(new)
    bench.supervisor.leases.drop(old)
    assert new in bench.supervisor.leases and old not in bench.supervisor.leases


def test_a_trainer_that_hangs_is_ended_and_its_trial_waits_again(bench):
    bench.training()
    bench.says(epoch(1))
    bench.steps(HANG - 1)
    assert not bench.processes[0].killed
    bench.says(protocol.Alive())
    bench.steps(HANG - 1)
    assert not bench.processes[0].killed, "it has said that it works"
    bench.steps(3)
    assert bench.of("give back") == [("give back", 1, f"no progress for {HANG:.0f} s", FAILED)]
    assert len(bench.processes) == 2, "another trainer has been started"


def test_no_trainer_hung_while_the_whole_worker_was_stopped(bench):
    bench.training()
    bench.clock.now += 10 * HANG
    bench.steps(2)
    assert not bench.processes[0].killed


def test_a_trial_that_the_pruner_ends_is_handed_back_and_recorded_as_pruned(bench):
    bench.training()
    bench.pruning.reasons[1] = "pruned by MedianPruner at epoch 1"
    bench.steps(1)
    assert len(bench.requests(protocol.Stop)) == 1, "asked once"
    bench.says(protocol.Returned(epoch=3))
    bench.steps(1)
    assert bench.of("end", "give back") == [("end", 1, "pruned", "pruned by MedianPruner at epoch 1")]


def test_a_trial_judged_before_its_worker_died_is_recorded_without_training(bench):
    bench.queue.waiting.append(replace(JOB, attempt=2, judged=Judged(ends="pruned by MedianPruner at epoch 1")))
    bench.steps(2)
    assert bench.of("end") == [("end", 1, "pruned", "pruned by MedianPruner at epoch 1")]
    assert not bench.requests(protocol.Train)


def test_a_trial_goes_on_from_its_checkpoint(bench):
    bench.training(checkpoint=records.checkpoint(3), attempt=2, reason="worker lost")
    assert bench.requests(protocol.Train)[0].checkpoint.name == "checkpoint"


def test_a_trial_that_diverged_is_recorded_so(bench):
    bench.training()
    bench.says(epoch(1), protocol.Diverged(epoch=2))
    bench.steps(1)
    assert bench.of("end") == [("end", 1, "diverged", "diverged at epoch 2")]


def test_a_failed_trial_waits_again_and_its_attempt_counts(bench):
    bench.training()
    bench.says(protocol.Failed(reason="ValueError: odd"))
    bench.steps(1)
    assert bench.of("give back") == [("give back", 1, "ValueError: odd", FAILED)]


def test_a_full_disk_costs_no_attempt_and_stops_claims_until_there_is_room(bench, monkeypatch):
    bench.training()
    lacks = [True]
    monkeypatch.setattr(bench.folder, "lacks_room", lambda: lacks[0])
    bench.says(protocol.DiskFull(reason="no room on the disk"))
    bench.steps(1)
    assert bench.of("give back") == [("give back", 1, "no room on the disk", HANDED_BACK)]
    bench.queue.waiting.append(replace(JOB, id=2))
    bench.steps(5)
    assert len(bench.requests(protocol.Train)) == 1
    lacks[0] = False
    bench.steps(2)
    assert len(bench.requests(protocol.Train)) == 2


def test_a_damaged_data_file_is_fetched_once_for_all_trainers_that_met_it(tmp_path):
    bench = Bench(tmp_path, count=4)
    for attempt in range(FETCH_ATTEMPTS):
        bench.queue.waiting.extend(replace(JOB, id=number, fence=attempt) for number in range(4))
        bench.steps(2)
        bench.step(record=False)
        for trainer in range(4):
            bench.says(protocol.DataDamaged(reason="odd."), trainer=trainer)
        bench.step(record=False)
        bench.steps(1)
        assert len(bench.of("fetch data")) == attempt + 1
    assert bench.data.path == Path("again.npz")
    assert len(bench.of("give back")) == 4 * FETCH_ATTEMPTS and {event[3] for event in bench.of("give back")} == {
        HANDED_BACK
    }
    bench.queue.waiting.append(JOB)
    bench.steps(2)
    bench.says(protocol.DataDamaged(reason="odd."), trainer=0)
    with pytest.raises(ServiceError, match=r"odd\. It was fetched 3 times: is HPO_HOME's disk sound\?"):
        bench.supervisor.run()
    assert len(bench.of("fetch data")) == FETCH_ATTEMPTS


def test_without_a_data_set_the_worker_gives_everything_back_and_ends(bench):
    bench.training()
    bench.tasks.data = outcomes.NoData(study="s", error=ServiceError("No data set."))
    bench.says(protocol.DataDamaged(reason="odd."))
    bench.step(record=False)
    bench.recorder.work()
    with pytest.raises(ServiceError, match="No data set"):
        bench.supervisor.run()
    assert bench.of("give back") == [("give back", 1, "odd.", HANDED_BACK)]


# Whose fault a failure is


def test_no_job_is_claimed_before_a_trainer_has_proved_its_place(bench):
    bench.queue.waiting.append(JOB)
    bench.proof = None
    bench.steps(5)
    (proof,) = bench.requests(protocol.Prove)
    assert (proof.spec, proof.data, proof.device) == (records.spec(), Path("data.npz"), "cpu")
    assert bench.of("claim") == []
    bench.says(protocol.Proved(device=""))
    bench.steps(2)
    assert bench.requests(protocol.Train)


@pytest.mark.parametrize("proof", [protocol.Failed(reason="no GPU"), protocol.OutOfMemory(reason="no GPU")])
def test_a_worker_whose_first_proof_fails_claims_nothing_and_says_why(bench, proof):
    bench.queue.waiting.append(JOB)
    bench.proof = proof
    with pytest.raises(
        ServiceError, match=r"cannot train here: expected to train .* on the device 'cpu', found: no GPU"
    ):
        bench.supervisor.run()
    assert bench.of("claim", "give back") == [] and len(bench.processes) == 1


def test_a_job_that_failed_is_held_until_a_fresh_trainer_shows_whose_fault_it_was(bench):
    job = bench.training()
    bench.proof = None
    bench.says(protocol.Failed(reason="odd"))
    bench.steps(1)
    assert len(bench.processes) == 2 and bench.processes[0].killed and bench.of("give back") == []
    bench.steps(LEASE)
    assert bench.of("renew")[-1] == ("renew", [job.id])
    bench.says(protocol.Proved(device=""), trainer=1)
    bench.steps(1)
    assert bench.of("give back") == [("give back", 1, "odd", FAILED)]


def test_a_trainer_that_is_being_killed_gets_no_other_job(bench):
    bench.training()
    bench.queue.waiting.append(replace(JOB, id=2))
    bench.processes[0].kill = lambda reason: setattr(bench.processes[0], "killed", reason)
    bench.says(protocol.Failed(reason="odd"))
    bench.steps(3)
    assert len(bench.requests(protocol.Train)) == 1 and bench.supervisor.claims.claimed == 1


def test_no_attempt_counts_where_the_proof_after_a_failure_fails(tmp_path):
    bench = Bench(tmp_path, count=2)
    bench.queue.waiting.extend([JOB, replace(JOB, id=2)])
    bench.steps(2)
    bench.proof = protocol.Failed(reason="the driver is gone")
    bench.processes[0].dies = True
    bench.step()
    assert bench.steps(2) is None and bench.requests(protocol.Stop, 1), "the other trial is handed back"
    bench.says(protocol.Returned(epoch=4), trainer=1)
    bench.steps(1)
    with pytest.raises(ServiceError, match="the driver is gone"):
        bench.supervisor.run()
    assert sorted(bench.of("give back")) == [
        ("give back", 1, "trainer ended with exit 1", PLACE_FAILED),
        ("give back", 2, "handed back", HANDED_BACK),
    ]


def test_trainers_that_never_start_after_a_failure_are_their_places_fault(bench, tmp_path):
    (tmp_path / "worker.log").write_text("Traceback\nImportError: torch\n")
    bench.training()
    bench.processes[0].dies = True
    while bench.supervisor.ending.error is None:
        for process in bench.processes[1:]:
            process.coming, process.dies = [], True
        bench.step()
    with pytest.raises(ServiceError, match="Trainers cannot be started"):
        bench.supervisor.run()
    assert bench.of("give back") == [("give back", 1, "trainer ended with exit 1", PLACE_FAILED)]


def test_a_trial_that_lacked_memory_beside_others_runs_alone_the_next_time(tmp_path):
    bench = Bench(tmp_path, count=2)
    bench.queue.waiting.extend([JOB, replace(JOB, id=2)])
    bench.steps(2)
    bench.says(protocol.OutOfMemory(reason="no memory"), trainer=1)
    bench.steps(2)
    assert bench.of("give back") == [("give back", 2, "no memory", OUT_OF_MEMORY, "beside others")]
    bench.queue.waiting.extend([replace(JOB, id=2, fence=2), replace(JOB, id=3)])
    bench.steps(3)
    assert not bench.requests(protocol.Train, 2), "it waits for the other trial"
    bench.says(TRAINED)
    bench.steps(3)
    assert len(bench.requests(protocol.Train, 2)) == 1 and len(bench.requests(protocol.Train)) == 1
    assert bench.queue.waiting, "nothing is claimed beside it"
    bench.says(protocol.OutOfMemory(reason="no memory"), trainer=2)
    bench.steps(3)
    assert bench.of("give back")[-1] == ("give back", 2, "no memory", OUT_OF_MEMORY)
    assert not bench.queue.waiting


def test_a_trainer_that_the_system_killed_lacked_memory(bench):
    bench.training()
    bench.processes[0].dies = bench.processes[0].lacked_memory = True
    bench.steps(1)
    assert bench.of("give back") == [("give back", 1, "trainer ended with exit 1", OUT_OF_MEMORY)]


def test_a_proof_that_lacks_memory_beside_a_trial_is_repeated_after_it(tmp_path):
    bench = Bench(tmp_path, count=2)
    bench.queue.waiting.append(JOB)
    bench.steps(2)
    bench.proof = protocol.OutOfMemory(reason="no memory")
    bench.processes[1].dies = True
    bench.steps(3)
    assert len(bench.requests(protocol.Prove, 2)) == 1 and bench.supervisor.ending.error is None
    bench.processes[2].proof = protocol.Proved(device="")
    bench.says(TRAINED)
    bench.steps(2)
    assert len(bench.requests(protocol.Prove, 2)) == 2


def test_a_proof_that_lacks_memory_beside_another_one_is_repeated_after_it(tmp_path):
    bench = Bench(tmp_path, count=2)
    bench.proof = None
    bench.steps(2)
    bench.says(protocol.OutOfMemory(reason="no memory"), trainer=1)
    bench.steps(2)
    assert len(bench.requests(protocol.Prove, 1)) == 1 and bench.supervisor.ending.error is None
    bench.says(protocol.Proved(device=""))
    bench.steps(2)
    assert len(bench.requests(protocol.Prove, 1)) == 2
    bench.says(protocol.OutOfMemory(reason="no memory"), trainer=1)
    with pytest.raises(ServiceError, match="no memory"):
        bench.supervisor.run()


def test_a_proof_that_meets_a_damaged_data_file_is_repeated_with_a_fetched_one(bench):
    bench.queue.waiting.append(JOB)
    bench.proof = protocol.DataDamaged(reason="odd.")
    bench.step(record=False)
    bench.step(record=False)
    bench.processes[0].proof = protocol.Proved(device="")
    bench.steps(3)
    assert [proof.data for proof in bench.requests(protocol.Prove)] == [Path("data.npz"), Path("again.npz")]
    assert bench.requests(protocol.Train)


def test_a_data_file_that_is_wrong_however_often_it_is_fetched_ends_the_worker(bench):
    bench.queue.waiting.append(JOB)
    bench.proof = protocol.DataDamaged(reason="odd.")
    with pytest.raises(ServiceError, match=r"^odd\. It was fetched 3 times: is HPO_HOME's disk sound\?$"):
        while bench.supervisor.ending.error is None:
            bench.step()
        bench.supervisor.run()
    assert len(bench.of("fetch data")) == FETCH_ATTEMPTS and bench.of("claim") == []


def test_no_job_is_claimed_before_the_artifact_store_is_proved(bench):
    bench.queue.waiting.append(JOB)
    bench.steps(5, record=False)
    assert bench.requests(protocol.Prove) and bench.of("claim") == [], "trainers start meanwhile"
    bench.steps(2)
    assert bench.requests(protocol.Train) and bench.of("prove store") == [("prove store",)]


def test_a_worker_that_cannot_use_the_artifact_store_claims_nothing_and_says_why(bench):
    bench.queue.waiting.append(JOB)
    bench.tasks.store_error = ServiceError("No module named 'boto3'")
    bench.recorder.work()
    with pytest.raises(ServiceError, match="boto3"):
        bench.supervisor.run()
    assert bench.of("claim", "give back") == []


@pytest.mark.parametrize("is_sound", [True, False])
def test_a_fetch_that_fails_counts_only_where_the_store_is_proved_afterwards(bench, is_sound):
    bench.recorder.work()
    bench.queue.waiting.append(replace(JOB, checkpoint=records.checkpoint(1)))
    bench.steps(2, record=False)
    bench.recorder.tasks.clear()
    bench.inbox.post(outcomes.Refused(job=JOB, reason="no region", attempt=FAILED))
    bench.queue.waiting.append(replace(JOB, id=2))
    bench.steps(LEASE, record=False)
    assert bench.of("renew")[-1] == ("renew", [1]) and bench.of("give back") == [], "nothing is claimed meanwhile"
    if not is_sound:
        bench.tasks.store_error = ServiceError("No region")
    bench.steps(2)
    assert bench.of("give back") == [("give back", 1, "no region", FAILED if is_sound else PLACE_FAILED)]
    assert bool(bench.requests(protocol.Train)) == is_sound == (bench.supervisor.ending.error is None)


def test_a_disk_that_is_full_at_the_start_ends_the_worker_and_later_a_proof_waits(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    monkeypatch.setattr(bench.folder, "lacks_room", lambda: True)
    with pytest.raises(ServiceError, match="no room on the disk: less than 64 MB in"):
        bench.supervisor.run()
    assert bench.of("claim") == []
    bench = Bench(tmp_path / "later")
    bench.training()
    lacks = [True]
    monkeypatch.setattr(bench.folder, "lacks_room", lambda: lacks[0])
    bench.processes[0].dies = True
    bench.steps(3)
    assert bench.of("give back") == [("give back", 1, "no room on the disk (trainer ended with exit 1)", HANDED_BACK)]
    lacks[0] = False
    bench.queue.waiting.append(replace(JOB, id=2))
    bench.steps(3)
    assert bench.requests(protocol.Train, 1)


def test_the_memory_of_a_gpu_is_shared_with_the_trainers_on_it_alone():
    trainers = Trainers(lambda gpu: FakeProcess(), count=4, gpus=["0", "1"], clock=FakeClock())
    trainers.start_missing()
    first, second, third, _ = trainers
    for trainer in (first, second, third):
        trainer.reserve(JOB, fetches=0)
    assert [first.place, second.place] == ["cuda:0", "cuda:1"]
    assert trainers.neighbours(first) == [third] and trainers.neighbours(second) == []


GPU_GONE = protocol.Failed(reason="the card has fallen off the bus")


def on_two_gpus(folder: Path, *, count: int = 2) -> Bench:
    """A supervisor whose trainers 0 and 2 are on GPU 0, trainers 1 and 3 on GPU 1."""
    bench = Bench(folder, count=count, gpus=("0", "1"))
    bench.queue.waiting.extend(replace(JOB, id=number + 1) for number in range(count))
    return bench


def test_a_gpu_that_fails_at_the_start_gets_no_trial_and_the_others_go_on(tmp_path, caplog):
    bench = on_two_gpus(tmp_path)
    bench.broken["1"] = GPU_GONE
    bench.steps(5)
    assert "GPU 1 trains no more, the other devices go on: the card has fallen off the bus" in caplog.text
    assert len(bench.processes) == 2 and bench.processes[1].killed and not bench.requests(protocol.Train, 1)
    for number in (1, 2):
        assert len(bench.requests(protocol.Train)) == number
        bench.says(TRAINED)
        bench.steps(2)
    bench.queue.closing = "done"
    assert bench.steps(5) is True and bench.supervisor.failed_gpus == {"1": GPU_GONE.reason}


def test_a_gpu_that_breaks_returns_its_trials_uncounted_or_hands_back(tmp_path):
    bench = on_two_gpus(tmp_path, count=4)
    bench.steps(2)
    bench.broken["1"] = GPU_GONE
    bench.processes[1].dies = True
    bench.steps(2)
    assert bench.of("give back") == [("give back", 2, "trainer ended with exit 1", PLACE_FAILED)]
    assert bench.requests(protocol.Stop, 3) and not bench.processes[3].killed, "it hands back first"
    assert not bench.requests(protocol.Stop, 0) and not bench.requests(protocol.Stop, 2)
    bench.says(protocol.Returned(epoch=3), trainer=3)
    bench.steps(2)
    assert bench.of("give back")[1:] == [("give back", 4, "handed back", HANDED_BACK)]
    bench.queue.waiting.extend([replace(JOB, id=number) for number in (5, 6, 7)])
    bench.says(TRAINED)
    bench.says(TRAINED, trainer=2)
    bench.steps(3)
    assert [len(bench.requests(protocol.Train, number)) for number in (0, 2)] == [2, 2]
    assert len(bench.queue.waiting) == 1 and len(bench.processes) == 5, "no other trainer is started in its place"


def test_a_trial_that_fails_while_its_gpu_is_given_up_does_not_count(tmp_path):
    bench = on_two_gpus(tmp_path, count=4)
    bench.steps(2)
    bench.broken["1"] = GPU_GONE
    bench.processes[1].dies = True
    bench.steps(2)
    bench.says(protocol.Failed(reason="no card"), trainer=3)
    bench.steps(2)
    assert bench.of("give back")[1:] == [("give back", 4, "no card", PLACE_FAILED)]
    assert bench.processes[3].killed and bench.supervisor.ending.reason is None


def test_a_trial_that_waits_for_a_gpu_that_fails_goes_back(tmp_path):
    bench = on_two_gpus(tmp_path, count=4)
    bench.queue.waiting[1] = replace(JOB, id=2, spec=None)
    bench.queue.waiting[3] = replace(JOB, id=4, spec=None)
    bench.steps(2)
    bench.broken["1"] = GPU_GONE
    bench.processes[1].dies = True
    bench.steps(2)
    assert bench.of("give back")[1:] == [("give back", 4, GPU_GONE.reason, HANDED_BACK)]
    bench.suggester.coming = [protocol.Filled(job=4, fence=1, spec=records.spec(), cost=2.0)]
    bench.steps(2)
    assert not bench.requests(protocol.Train, 3) and bench.supervisor.ending.error is None


def test_a_gpu_on_which_no_trainer_survives_its_proof_is_given_up_alone(tmp_path):
    (tmp_path / "worker.log").write_text("Traceback\nRuntimeError: driver\n")
    bench = on_two_gpus(tmp_path)
    bench.broken["1"] = None
    while not bench.supervisor.failed_gpus:
        for process in bench.processes:
            process.dies = process.dies or process.proof is None
        bench.step()
    assert bench.supervisor.failed_gpus == {"1": "its trainer ended with exit 1"} and len(bench.processes) == 4
    bench.steps(3)
    assert bench.requests(protocol.Train) and len(bench.processes) == 4


def test_a_worker_whose_last_gpu_fails_too_ends_with_the_reason(tmp_path, caplog):
    bench = on_two_gpus(tmp_path)
    bench.broken |= {"0": protocol.Failed(reason="no driver"), "1": GPU_GONE}
    with pytest.raises(ServiceError, match=r"cannot train here: .*the card has fallen off the bus\. It takes no trial"):
        bench.supervisor.run()
    assert "GPU 0 trains no more, the other devices go on: no driver" in caplog.text
    assert bench.of("claim") == []


# Claims


def test_every_free_trainer_gets_a_job_and_waits_for_none(tmp_path):
    bench = Bench(tmp_path, count=3)
    bench.queue.waiting.extend(replace(JOB, id=number) for number in range(2))
    bench.steps(2)
    assert [len(bench.requests(protocol.Train, trainer)) for trainer in range(3)] == [1, 1, 0]


def test_a_worker_leaves_after_its_trials(tmp_path):
    bench = Bench(tmp_path, limits=Limits(trials=1))
    bench.queue.waiting.extend([JOB, replace(JOB, id=2)])
    bench.steps(2)
    bench.says(TRAINED)
    assert bench.steps(5) is False
    assert bench.supervisor.claims.claimed == 1 and len(bench.queue.waiting) == 1


def test_a_worker_whose_time_is_over_hands_back(tmp_path):
    bench = Bench(tmp_path, limits=Limits(seconds=60))
    bench.training()
    assert bench.steps(57) is None and bench.supervisor.ending.reason is None
    bench.steps(2)
    assert bench.supervisor.ending.reason == OUT_OF_TIME and bench.requests(protocol.Stop)
    bench.says(protocol.Returned(epoch=0))
    assert bench.steps(2) is False
    assert bench.of("give back") == [("give back", 1, "handed back", HANDED_BACK)]


def test_an_idle_worker_leaves_but_not_while_it_cannot_ask(tmp_path):
    bench = Bench(tmp_path, limits=Limits(idle=10))
    bench.queue.is_away = True
    assert bench.steps(60) is None and bench.recorder.noted
    bench.queue.is_away = False
    assert bench.steps(8) is None
    assert bench.steps(5) is False


def test_a_worker_that_may_not_take_over_yet_is_not_idle(tmp_path):
    bench = Bench(tmp_path, limits=Limits(idle=5))
    bench.queue.attend = lambda *_, **__: False
    bench.queue.expired_jobs = [1]
    assert bench.steps(60) is None and bench.supervisor.claims.claimed == 0
    bench.queue.expired_jobs = []
    assert bench.steps(10) is False


def test_a_worker_leaves_a_paused_study_with_the_reason_but_not_while_it_trains(bench):
    bench.training()
    bench.queue.paused = "5 trials failed."
    bench.clock.now += 60
    assert bench.steps(5) is None and bench.of("pause") == []
    bench.says(TRAINED)
    with pytest.raises(ServiceError, match=r"The study s is paused: 5 trials failed\. Nobody claims .* `hpo run`"):
        bench.steps(5)
    bench.recorder.work()
    assert bench.of("pause") == [("pause", "5 trials failed.")]


def test_a_worker_that_is_to_stay_waits_for_the_end_of_a_pause_and_is_not_idle(tmp_path):
    bench = Bench(tmp_path, limits=Limits(idle=10, stays=True))
    bench.queue.paused = "5 trials failed"
    assert bench.steps(60) is None and bench.of("pause") == [("pause", "5 trials failed")]
    assert bench.supervisor.concern == "paused: 5 trials failed"
    bench.queue.paused = None
    bench.training()
    assert bench.supervisor.concern is None


@pytest.mark.parametrize("trouble", ["away", "store full", "refusing"])
def test_a_recorder_in_trouble_stops_claims(bench, trouble):
    outage = bench.recorder.outage
    outage.seconds = 1e6 if trouble == "away" else 0.0
    outage.store_full, bench.recorder.refusing = trouble == "store full", trouble == "refusing"
    bench.queue.waiting.append(JOB)
    bench.steps(5)
    assert bench.of("claim") == []
    outage.seconds, outage.store_full, bench.recorder.refusing = 0.0, False, False
    bench.steps(2)
    assert bench.requests(protocol.Train)


def test_after_a_lost_database_claims_that_were_never_heard_of_are_let_go(bench):
    bench.training()
    bench.queue.is_away = True
    bench.says(epoch(1))
    bench.steps(2)
    bench.queue.is_away = False
    bench.events.clear()
    bench.steps(2)
    assert bench.events[0] == ("disown", [1])
    assert ("epochs", 1, [1]) in bench.events, "kept meanwhile"


def test_a_study_that_was_deleted_meanwhile_is_named(bench):
    bench.queue.closing = None
    with pytest.raises(NotFound, match="The study s was deleted meanwhile"):
        bench.supervisor.run()


def test_no_trial_of_a_study_that_was_planned_again_under_its_name_is_taken(bench):
    bench.queue.created_at = 1.0  # while this worker was frozen
    bench.queue.waiting.append(JOB)
    with pytest.raises(NotFound, match="The study s was deleted meanwhile"):
        bench.supervisor.run()
    assert bench.queue.rows == {} and bench.queue.waiting


# Children


def test_three_trainers_that_never_become_ready_end_the_worker_with_their_log(bench, tmp_path):
    (tmp_path / "worker.log").write_text("Traceback\nImportError: torch\n")
    with pytest.raises(ServiceError, match=r"(?s)Trainers cannot be started: trainer ended with exit 1.*ImportError"):
        while bench.supervisor.ending.error is None:
            for process in bench.processes:
                process.coming, process.dies = [], True
            bench.step()
        bench.supervisor.run()
    assert len(bench.processes) == 3


def test_a_trainer_that_dies_costs_its_trial_an_attempt(bench, caplog):
    bench.training()
    bench.processes[0].dies = True
    bench.steps(1)
    assert "trial 0 of s failed in attempt 1: trainer ended with exit 1" in caplog.text
    assert bench.of("give back") == [("give back", 1, "trainer ended with exit 1", FAILED)]


def test_a_message_that_no_trainer_sends_is_an_error(bench):
    bench.training()
    bench.says(protocol.ClaimLost(job=1, fence=1))
    bench.steps(1)
    assert bench.of("give back") == [("give back", 1, "a trainer sent ClaimLost", FAILED)]


def test_a_slot_is_filled_by_the_suggester_and_trained(bench):
    bench.queue.waiting.append(replace(JOB, spec=None))
    bench.suggester.coming = [protocol.Ready()]
    bench.steps(2)
    assert [type(message) for message in bench.suggester.sent] == [protocol.Fill]
    bench.suggester.coming = [protocol.Filled(job=1, fence=1, spec=records.spec(point={"filters": 2}), cost=2.0)]
    bench.steps(1)
    assert bench.requests(protocol.Train)[0].spec.point == {"filters": 2}


@pytest.mark.parametrize(
    ("answer", "given_back"),
    [
        (protocol.ClaimLost(job=1, fence=1), []),
        (
            protocol.DatabaseAway(job=1, fence=1),
            [("give back", 1, "the sampler could not reach the database", HANDED_BACK)],
        ),
        (protocol.NotFilled(job=1, fence=1, reason="odd"), [("give back", 1, "odd", FAILED)]),
    ],
)
def test_a_slot_that_is_not_filled_frees_its_trainer(bench, answer, given_back):
    bench.queue.waiting.append(replace(JOB, spec=None))
    bench.suggester.coming = [protocol.Ready()]
    bench.steps(2)
    bench.suggester.coming = [answer]
    bench.steps(1)
    assert bench.of("give back") == given_back
    bench.training(id=2)


def test_a_suggester_that_dies_costs_no_attempt_and_three_end_the_worker(bench):
    for number in range(3):
        bench.queue.waiting.append(replace(JOB, spec=None, fence=number))
        bench.suggester = FakeProcess()
        bench.steps(2)
        bench.suggester.kill("no point")
        bench.step()
    with pytest.raises(ServiceError, match="No point can be chosen: no point"):
        bench.supervisor.run()
    assert bench.of("give back") == [("give back", 1, "no point", HANDED_BACK)] * 3


# The closing


class FakeClosing:
    def __init__(
        self, job: Job, events: list, *, wrong: bool = False, whole: bool = True, overtaken: bool = False
    ) -> None:
        self.job, self.events, self.wrong, self.left, self.whole = job, events, wrong, 2, whole
        self.overtaken = overtaken

    def fetch(self) -> bool:
        self.events.append(("fetch winners",))
        return self.whole

    def next_request(self):
        return (
            protocol.Score(folder=Path("m"), data=Path("d"), predictions=Path("p"), errors=Path("e"))
            if self.left
            else None
        )

    def put(self, scored) -> None:
        if self.wrong:
            raise ValueError("another model")
        self.left -= 1
        self.events.append(("scored", scored))

    def is_overtaken(self) -> bool:
        return self.overtaken

    def finish(self) -> None:
        self.events.append(("finish",))


SCORED = protocol.Scored(model=SplitScores(validation=SCORES, test=SCORES), predictors={})


def test_a_closing_fetches_the_winners_scores_each_and_is_finished(bench):
    bench.closing = lambda job: FakeClosing(job, bench.events)
    bench.queue.waiting.append(replace(JOB, kind="closing"))
    bench.steps(2)
    for count in (1, 2):
        assert len(bench.requests(protocol.Score)) == count
        bench.says(SCORED)
        bench.steps(1)
    scored = ("scored", SCORED)
    assert bench.of("fetch winners", "scored", "finish") == [("fetch winners",), scored, scored, ("finish",)]
    assert bench.supervisor.leases.jobs == [] and bench.supervisor.claims.claimed == 0


def test_a_closing_whose_model_scores_otherwise_waits_again_and_its_attempt_counts(bench):
    bench.closing = lambda job: FakeClosing(job, bench.events, wrong=True)
    bench.queue.waiting.append(replace(JOB, kind="closing"))
    bench.steps(2)
    bench.says(SCORED)
    bench.steps(1)
    assert bench.of("finish", "give back") == [("give back", 1, "another model", FAILED)]


def test_a_closing_that_waits_for_refits_frees_its_trainer(bench):
    bench.closing = lambda job: FakeClosing(job, bench.events, whole=False)
    bench.queue.waiting.append(replace(JOB, kind="closing"))
    bench.steps(3)
    reason = "the winners of the cross-validation are trained again first"
    assert bench.of("finish", "give back") == [("give back", 1, reason, HANDED_BACK)]
    bench.queue.waiting.append(JOB)
    bench.steps(2)
    assert len(bench.requests(protocol.Train)) == 1


def test_a_closing_that_another_one_overtook_is_handed_back_unfinished(bench):
    bench.closing = lambda job: FakeClosing(job, bench.events, overtaken=True)
    bench.queue.waiting.append(replace(JOB, kind="closing"))
    bench.steps(2)
    for _ in range(2):
        bench.says(SCORED)
        bench.steps(1)
    reason = "a network of an earlier data set became champion: it is scored, too"
    assert bench.of("finish", "give back") == [("give back", 1, reason, HANDED_BACK)]


def test_a_closing_whose_trainer_died_while_the_winners_were_fetched_asks_nobody(bench):
    bench.closing = lambda job: FakeClosing(job, bench.events)
    bench.queue.waiting.append(replace(JOB, kind="closing"))
    bench.recorder.work()
    bench.steps(2, record=False)
    bench.processes[0].dies = True
    bench.step(record=False)
    bench.steps(1)
    assert not bench.requests(protocol.Score) and bench.of("give back")


# The end


def test_a_stopped_worker_hands_its_trial_back_with_the_checkpoint(bench):
    bench.training()
    bench.supervisor.ending.stop("SIGTERM")
    bench.supervisor.ending.stop("SIGTERM")
    bench.step()
    assert len(bench.requests(protocol.Stop)) == 1
    written = protocol.CheckpointWritten(path=Path("c"), epoch=1, sha256="0")
    bench.says(epoch(1), written, protocol.Returned(epoch=1))
    assert bench.steps(2) is False
    assert bench.of("epochs", "checkpoint", "give back") == [
        ("epochs", 1, [1]),
        ("checkpoint", 1, 1),
        ("give back", 1, "handed back", HANDED_BACK),
    ]


def test_a_trainer_that_does_not_hand_back_in_time_is_killed_and_no_attempt_counts(bench, caplog):
    bench.training()
    bench.supervisor.ending.stop("SIGTERM")
    bench.steps(STOP_GRACE - 0.5)
    assert not bench.processes[0].killed
    assert bench.steps(3) is False
    assert bench.of("give back") == [("give back", 1, "stopped: SIGTERM", HANDED_BACK)]
    assert "handed back without its newest epochs: stopped" in caplog.text and "worker lost" not in caplog.text


def test_a_second_ctrl_c_ends_at_once(bench):
    bench.training()
    bench.supervisor.ending.stop("SIGINT")
    assert bench.step() is None
    bench.supervisor.ending.stop("SIGINT")
    assert bench.supervisor.run() is False
    assert bench.of("give back", "leave") == [("give back", 1, "stopped: SIGINT", HANDED_BACK), ("leave",)]


def test_a_recorder_that_gets_nowhere_delays_the_end_for_some_seconds_only(bench):
    bench.training()
    bench.says(TRAINED)
    bench.step(record=False)
    bench.supervisor.ending.stop("SIGINT")
    begin = bench.clock.now
    assert bench.steps(60, record=False) is False
    assert STOP_LIMIT - 2 < bench.clock.now - begin < STOP_LIMIT


def test_a_stopped_worker_whose_database_is_lost_ends_too(bench):
    bench.training()
    bench.queue.is_away = True
    bench.supervisor.ending.stop("SIGINT")
    begin = bench.clock.now
    assert bench.supervisor.run() is False
    assert bench.clock.now - begin < STOP_LIMIT + 1


def test_hpo_stop_ends_the_worker_and_names_who_asked(bench, caplog):
    bench.training()
    bench.queue.stop = Stop(by="ann@lab", at=0.0)
    bench.steps(2)
    assert bench.supervisor.ending.asked.by == "ann@lab" and bench.supervisor.ending.reason == "hpo stop"
    assert "ann@lab asked the workers of s to stop" in caplog.text and bench.requests(protocol.Stop)
    assert by(bench.supervisor.ending.asked).endswith(" (hpo stop)")


def test_a_budget_that_is_spent_ends_the_worker_and_is_named(bench):
    bench.training()
    bench.queue.stop = Stop(by="the budget --max-hours 1", at=0.0, is_budget=True)
    bench.steps(2)
    text = by(bench.supervisor.ending.asked)
    assert text.startswith(" by the budget --max-hours 1 at ") and "hpo stop" not in text
    assert "stopping (budget)" in bench.supervisor.concern


def test_when_no_result_can_be_recorded_trainers_hand_back_first(bench):
    job = bench.training()
    bench.inbox.post(outcomes.NothingRecorded(study="s", reason="trial 7 of s: odd"))
    bench.step()
    assert bench.requests(protocol.Stop)
    bench.says(protocol.Returned(epoch=1))
    bench.step()
    bench.recorder.work()
    with pytest.raises(ServiceError, match=r"No result can be recorded any more\. trial 7 of s: odd"):
        bench.supervisor.run()
    assert bench.of("give back") == [("give back", job.id, "handed back", HANDED_BACK)]


def test_a_refused_result_costs_an_attempt_unless_the_disk_is_full(bench):
    for number, full in enumerate((False, True), start=1):
        job = bench.training(id=number)
        bench.says(TRAINED)
        bench.step(record=False)
        bench.recorder.tasks.clear()
        bench.inbox.post(
            outcomes.Refused(job=job, reason="odd", attempt=HANDED_BACK if full else FAILED, disk_full=full)
        )
        bench.steps(1)
    assert bench.of("give back") == [("give back", 1, "odd", FAILED), ("give back", 2, "odd", HANDED_BACK)]


def test_a_worker_whose_recorder_has_ended_ends_too(bench):
    bench.recorder.alive = False
    with pytest.raises(ServiceError, match="The thread that records results has ended unexpectedly"):
        bench.supervisor.run()


def test_an_error_that_nobody_foresaw_gives_everything_back(bench, monkeypatch):
    bench.training()
    monkeypatch.setattr(bench.queue, "orders", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.supervisor.run()
    assert bench.of("give back", "leave") == [("give back", 1, "stopped: error", HANDED_BACK), ("leave",)]
