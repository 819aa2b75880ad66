"""Fleets on an engine in memory: handed in once, followed, grown, taken back; and what is asked of an engine."""

from types import SimpleNamespace

import pytest
from engines import REACHED, VERSION, Machines, Memory, check_engine

from hpo import settings
from hpo.cli import main, studies
from hpo.errors import ServiceError, SettingsError
from hpo.launch import fleets, probing
from hpo.launch.engine import Fate, Placed, Size, key_values
from hpo.launch.fleets import End, Handed, Request
from hpo.launch.probing import WORDS
from hpo.operations import pool
from hpo.operations.cluster import Cluster
from hpo.queue import State, Stop

STOP = Stop(by="ben", at=0.0)


class Queue:
    """What a fleet asks of the queue."""

    def __init__(self) -> None:
        self.jobs, self.closing, self.stopped = 4, State.WAITING, False
        self.locked: list[str] = []
        self.while_waiting = lambda: None

    def database_id(self) -> str:
        return "0123456789"

    def open_jobs(self, study: str | None) -> int:
        return self.jobs

    def pool_stops(self) -> int:
        return 7

    def pool_stop(self, stops: int) -> Stop | None:
        return STOP if self.stopped and stops == 7 else None

    def closing_state(self, study: str) -> State:
        return self.closing

    def orders(self, worker, *, stops, held):
        return SimpleNamespace(stopped=dict.fromkeys(stops, STOP) if self.stopped else {})

    def lock(self, name: str, *, waits=None):
        self.locked.append(name)
        return self

    def __enter__(self) -> None:
        act, self.while_waiting = self.while_waiting, lambda: None
        act()  # what another command does before this one has the lock

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(fleets, "POLL", 0.0)
    monkeypatch.setattr(fleets, "TICK", 0.0)


def handed(queue: Queue, machines: Machines, workers: int | str = 2, *, study: str | None = "grid") -> Handed:
    request = Request(engine=Memory(machines=machines), size=Size.parse(workers), words=("--device", "cpu"))
    row = SimpleNamespace(name=study, stops=3)
    return Handed(request, queue, None if study is None else row)


def test_the_engine_in_memory_keeps_to_the_protocol():
    machines = Machines(["n1", "n2"])
    check_engine(lambda: Memory(machines=machines), stays=["worker"], patience=5.0)


def test_the_same_command_hands_in_no_second_fleet():
    queue, machines, said = Queue(), Machines(["n1"]), list[str]()
    handed(queue, machines).hand_in(said.append)
    handed(queue, machines).hand_in(said.append)
    assert machines.log == ["hand in 1", "take back", "hand in 2"], "one on trial before the others"
    assert queue.locked == ["launch.hpo-grid-01234567-3"] * 2
    assert said[0] == "Handed 2 workers to Memory, as hpo-grid-01234567-3; logs: nowhere"
    assert said[2] == "Memory has 2 workers already, as hpo-grid-01234567-3; logs: nowhere"
    command = ["worker", "--study", "grid", "--stops", "3", "--device", "cpu", "--idle-exit", "120"]
    assert [list(worker.words) for worker in machines.workers] == [command] * 2


def test_a_fleet_is_followed_until_its_study_is_closed_and_the_rest_taken_back():
    queue, machines = Queue(), Machines(["n1"])
    fleet, lines = handed(queue, machines), list[str]()
    fleet.hand_in(lambda line: None)

    def tick(line: str) -> None:
        lines.append(line)
        queue.closing = State.DONE if len(lines) == 2 else queue.closing

    assert fleet.follow(interrupts=[], tick=tick) == End(closed=True)
    assert lines == ["Memory: 1 running (n1), 1 waiting (Resources)"] * 2
    assert machines.log[2:] == ["hand in 2", "take back waiting"] and len(machines.workers) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            REACHED.replace(VERSION, "9.9.9"),
            rf"Memory: n1 has hpo 9\.9\.9, and this is hpo {VERSION}\. Install the same version there",
        ),
        (
            f"{REACHED.splitlines()[0]}\nhpo: The database cannot be reached: timeout.\nsomething else",
            r"Memory: A worker on trial on n1 cannot work: The database cannot be reached: timeout\.",
        ),
        ("bash: python: command not found", "A worker on trial cannot work: bash: python: command not found"),
        (REACHED.replace("01234567", "89abcdef"), r"another database \(89abcdef\) than this command \(01234567\)"),
    ],
)
def test_machines_that_could_not_work_are_refused_and_nothing_is_left_there(answer, message, monkeypatch):
    monkeypatch.setattr(probing, "SETTLED", 0.0)
    machines = Machines(["n1"])
    machines.answers[WORDS] = answer
    with pytest.raises(ServiceError, match=rf"{message}.*Nothing was handed in\."):
        handed(Queue(), machines).hand_in(lambda line: None)
    assert machines.log == ["hand in 1", "take back"] and not machines.workers and not machines.written


def test_a_full_cluster_is_not_tried_and_one_without_such_a_machine_is_refused(monkeypatch):
    monkeypatch.setattr(probing, "PLACE_LIMIT", 0.0)
    machines, said = Machines([]), list[str]()
    handed(Queue(), machines).hand_in(said.append)
    assert said[0].startswith("No machine is free in Memory (Resources), so none was tried.")
    assert machines.log == ["hand in 1", "take back", "hand in 2"] and len(machines.workers) == 2
    machines = Machines([], is_hopeless=True)
    with pytest.raises(ServiceError, match="Memory has no machine for such a worker, now or later: Resources"):
        handed(Queue(), machines).hand_in(said.append)
    assert not machines.workers


def test_a_probe_without_an_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(probing, "LIMIT", 0.0)
    machines = Machines(["n1"])
    del machines.answers[WORDS]  # it runs, and writes nothing
    with pytest.raises(ServiceError, match=r"gave no answer within 0 s: it wrote nothing\. Nothing was handed in"):
        handed(Queue(), machines).hand_in(lambda line: None)
    assert machines.workers[0].is_leaving


def test_ctrl_c_takes_all_workers_back_and_waits_until_they_have_left():
    queue, machines, interrupts = Queue(), Machines(["n1"]), list[int]()
    fleet, lines = handed(queue, machines), list[str]()
    fleet.hand_in(lambda line: None)

    def tick(line: str) -> None:
        lines.append(line)
        interrupts[:] = [2]

    assert fleet.follow(interrupts=interrupts, tick=tick) == End()
    assert machines.log[2:] == ["hand in 2", "take back"] and not machines.workers
    assert handed(queue, machines).follow(interrupts=[2, 2], tick=tick) == End(), "a second one waits for nothing"


def test_ctrl_c_while_a_worker_is_on_trial_ends_that_and_hands_nothing_in():
    queue, machines, interrupts, said = Queue(), Machines([]), [2, 2], list[str]()
    fleet = handed(queue, machines)
    fleet.hand_in(said.append, interrupts=interrupts)
    assert fleet.follow(interrupts=interrupts, tick=said.append) == End()
    assert machines.log[:2] == ["hand in 1", "take back"] and not machines.workers and "hand in 2" not in machines.log
    assert said == ["Nothing was handed in to Memory."]


def test_two_interrupts_at_once_take_the_workers_back_all_the_same():
    queue, machines = Queue(), Machines(["n1", "n2"])
    fleet = handed(queue, machines)
    fleet.hand_in(lambda line: None)
    assert fleet.follow(interrupts=[2, 2], tick=lambda line: None) == End()
    assert machines.log[-1] == "take back" and all(worker.is_leaving for worker in machines.workers)


def test_after_hpo_stop_no_worker_that_waits_is_left_and_the_others_leave():
    queue, machines = Queue(), Machines(["n1"])
    fleet = handed(queue, machines)
    fleet.hand_in(lambda line: None)
    queue.stopped = True

    def tick(line: str) -> None:
        if machines.log[-1] == "take back waiting" and machines.workers:
            machines.end()

    assert fleet.follow(interrupts=[], tick=tick) == End(stop=STOP)
    assert set(machines.log[3:]) == {"take back waiting"}


def test_no_worker_left_of_an_open_study_is_an_error():
    queue, machines = Queue(), Machines(["n1", "n2"])
    fleet = handed(queue, machines)
    fleet.hand_in(lambda line: None)
    machines.workers.clear()
    with pytest.raises(ServiceError, match=r"No worker of grid is left in Memory's queue, .* Why they ended: nowhere"):
        fleet.follow(interrupts=[], tick=lambda line: None)


def test_an_engine_that_does_not_answer_is_said_and_asked_again():
    queue, machines = Queue(), Machines(["n1", "n2"])
    fleet, lines = handed(queue, machines), list[str]()
    fleet.hand_in(lambda line: None)
    machines.is_away = True

    def tick(line: str) -> None:
        lines.append(line)
        machines.is_away = len(lines) < 2
        queue.closing = State.DONE if len(lines) == 3 else queue.closing

    assert fleet.follow(interrupts=[], tick=tick) == End(closed=True)
    assert lines == ["Memory does not answer."] * 2 + ["Memory: 2 running (n1, n2)"]


def test_a_fleet_of_1_to_3_grows_with_the_jobs_and_never_below_one():
    queue, machines = Queue(), Machines(["n1", "n2", "n3", "n4"])
    queue.jobs = 1
    fleet, counts = handed(queue, machines, "1..3"), list[int]()
    fleet.hand_in(lambda line: None)
    assert "--idle-exit" not in machines.workers[0].words, "one stays"

    def tick(line: str) -> None:
        counts.append(len(machines.workers))
        if len(counts) == 2:
            queue.jobs = 9
        if len(counts) == 4:
            machines.end(-1)
        if len(counts) == 6:
            queue.jobs = 0
            machines.workers.clear()
            queue.closing = State.DONE

    assert fleet.follow(interrupts=[], tick=tick) == End(closed=True)
    assert counts == [1, 1, 3, 3, 3, 3]
    assert all("--idle-exit" in worker.words for worker in machines.workers[1:])


def test_two_commands_that_show_a_fleet_hand_in_what_is_missing_once():
    queue, machines = Queue(), Machines(["n1", "n2", "n3", "n4"])
    queue.jobs = 1
    fleet, other = (handed(queue, machines, "1..3") for _ in range(2))
    fleet.hand_in(lambda line: None)
    other.hand_in(lambda line: None)
    queue.jobs, queue.while_waiting = 9, other._grow
    fleet._grow()
    assert len(machines.workers) == 3 and machines.log[2:] == ["hand in 1", "hand in 2"]


def test_workers_that_end_again_and_again_are_not_handed_in_without_end():
    queue, machines = Queue(), Machines(["n1", "n2"])
    fleet = handed(queue, machines, "0..2")
    fleet.hand_in(lambda line: None)
    with pytest.raises(ServiceError, match="No worker of grid is left"):
        fleet.follow(interrupts=[], tick=lambda line: machines.workers.clear())
    assert machines.log.count("hand in 2") == 1 + fleets.TRIES
    queue.jobs = 3  # something was trained
    fleet._grow()
    assert len(machines.workers) == 2


def test_limits_of_workers_are_handed_on_as_they_were_given(monkeypatch):
    requests = []

    class Taken(Exception):
        pass

    def check(self) -> None:
        requests.append(self)
        raise Taken

    monkeypatch.setattr(Memory, "check", check)
    monkeypatch.setattr("hpo.launch.engines.ENGINES", {"memory": Memory})
    real = Cluster.request
    monkeypatch.setattr(Cluster, "request", lambda self, *a, **k: requests.append(k["words"]) or real(self, *a, **k))
    with pytest.raises(Taken):
        pool.hand_in(Cluster(engine="memory"), max_trials=1_234_567, max_hours=0.5)
    assert requests[0] == ["--max-trials", "1234567", "--max-hours", "0.5"]


def test_workers_of_the_pool_are_a_fleet_that_ends_when_nothing_is_left_to_train():
    queue, machines = Queue(), Machines(["n1"])
    fleet = handed(queue, machines, study=None)
    fleet.hand_in(lambda line: None)
    assert {worker.fleet for worker in machines.workers} == {"hpo.pool-01234567-7"}
    assert machines.workers[0].words == ["worker", "--stops", "7", "--device", "cpu", "--idle-exit", "120"]
    machines.workers.clear()
    with pytest.raises(ServiceError, match="No worker of the pool is left in Memory's queue, and a study is open"):
        fleet.follow(interrupts=[], tick=lambda line: None)
    queue.jobs = 0
    assert fleet.follow(interrupts=[], tick=lambda line: None) == End()
    queue.stopped = True
    assert fleet.follow(interrupts=[], tick=lambda line: None) == End(stop=STOP)


def test_a_number_of_workers_is_one_number_or_two():
    assert Size.parse("4") == Size.parse(4) == Size(least=4, most=4)
    assert Size.parse("0..4") == Size(least=0, most=4, grows=True)
    assert [Size.parse("1..4").wanted(jobs, 2) for jobs in (0, 2, 3, 99)] == [1, 1, 2, 4]
    assert Size.parse("4").wanted(1, 1) == 4
    for wrong, message in (("many", "expected a number such as 8"), ("4..2", "MIN below MAX"), ("0", "at least 1")):
        with pytest.raises(SettingsError, match=message):
            Size.parse(wrong)


def test_options_of_an_engine_are_key_value():
    assert key_values("ray", ["cpus=2", "--node_type=a=b", "spot"]) == {"cpus": "2", "node-type": "a=b", "spot": True}
    with pytest.raises(SettingsError, match=r"--ray: expected KEY=VALUE such as cpus=4, found '=2'"):
        key_values("ray", ["=2"])


def test_a_fleet_is_told_in_one_line():
    workers = [
        Placed(id="7_0", fate=Fate.RUNNING, host="n1"),
        Placed(id="7_1", fate=Fate.RUNNING, host="n2"),
        Placed(id="7_2", fate=Fate.WAITING, reason="Priority"),
    ]
    assert fleets.summary("SLURM", workers) == "SLURM: 2 running (n1, n2), 1 waiting (Priority)"
    assert fleets.summary("SLURM", []) == "SLURM: no workers"


def test_an_unknown_engine_is_refused_with_the_near_miss():
    with pytest.raises(SettingsError, match=r"--on: expected one of .*slurm.*, found 'slrum'. Did you mean 'slurm'\?"):
        Cluster(engine="slrum")


def test_options_of_an_engine_are_refused_without_it():
    for words, message in (
        (["--workers", "2"], "--workers: expected --on slurm"),
        (["--slurm", "partition=gpu"], "--slurm: expected --on slurm beside it"),
    ):
        for command, function in (("run", studies.cluster), ("worker", studies.worker)):
            options = main.parser().parse_args([command, "--study", "grid", *words])
            with pytest.raises(SettingsError, match=message):
                function(options)


def test_a_worker_has_as_many_trainers_as_it_has_cores_or_one_on_each_gpu():
    def words(*options: str, threads: int = 1) -> list[str]:
        parsed = main.parser().parse_args(["run", "--study", "grid", "--on", "slurm", *options])
        cluster = studies.cluster(parsed)
        assert cluster is not None
        return list(cluster.request(studies.compute(parsed), settings.read({}), threads).words)

    assert words() == ["--device", "cpu", "--trainers", "1"]
    assert words("--slurm", "cpus_per_task=4") == ["--device", "cpu", "--trainers", "4"]
    assert words("--slurm", "cpus=4", "--trainers", "2") == ["--device", "cpu", "--trainers", "2"]
    assert words("--slurm", "cpus_per_task=4", threads=2) == ["--device", "cpu", "--trainers", "2"]
    assert words(threads=2) == ["--device", "cpu", "--trainers", "1"]
    assert words("--trainers", "4", threads=2) == ["--device", "cpu", "--trainers", "4"]
    with pytest.raises(SettingsError, match=r"cpus: expected at least 5 for 1 x training\.threads = 5, found 4"):
        words("--slurm", "cpus_per_task=4", threads=5)
    for option in ("gres=gpu:1", "gpus_per_task=2", "partition=GPU"):
        assert words("--slurm", option) == ["--device", "auto"]
    assert words("--device", "cuda") == ["--device", "cuda"]
    assert words("--device", "cuda", "--trainers-per-gpu", "2") == ["--device", "cuda", "--trainers-per-gpu", "2"]
