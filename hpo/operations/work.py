"""Plan, train and close studies.

What plans and trains is imported where there is something to plan or to train: it needs MLflow, which takes a second.
"""

import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from hpo import settings
from hpo.errors import ServiceError, Unreachable, Untrusted
from hpo.launch.fleets import Handed, Request, collect_interrupts
from hpo.operations.budgets import Budget, Spending, Wishes, wishes
from hpo.operations.cluster import Cluster
from hpo.operations.compute import Compute
from hpo.operations.connection import Connection, connect
from hpo.operations.details import links_of
from hpo.operations.preparing import as_parts, ready, write_down
from hpo.operations.trust import trusting
from hpo.planning.preparation import Plan
from hpo.queue import ENDED, DatabaseLost, Job, Queue, State, Stop, StudyRow
from hpo.report import winners
from hpo.services.serving import Services
from hpo.study import Study
from hpo.text import counted
from hpo.worker.devices import CPU, Place
from hpo.worker.ending import NO_LIMITS, OUT_OF_TIME, Limits

POLL = 2.0  # seconds between two looks for the plan of a study

log = logging.getLogger("hpo.api")


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A study whose work begins."""

    row: StudyRow
    queue: Queue
    links: Mapping[str, str]  # name and URL of MLflow's pages about it
    later: Sequence[Plan] = ()  # what follows it in the same run


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the work on a study ended."""

    row: StudyRow
    closed: bool  # all its trials have ended, and its best model is registered
    stopped: bool = False  # by a signal or `hpo stop`; else it is closed, or the worker left at a limit
    stop: Stop | None = None  # the request, if it was `hpo stop`
    jobs: Sequence[Job] = field(default=(), repr=False)  # of a closed study
    links: Mapping[str, str] = field(default_factory=dict)  # name and URL of MLflow's pages about it
    image: Path | None = None  # one of the data set
    failed_gpus: Mapping[str, str] = field(default_factory=dict)  # why each one trained no more, though others did

    @property
    def closing(self) -> Job | None:
        """The closing of a closed study."""
        return next((job for job in self.jobs if job.kind == "closing"), None)

    @property
    def succeeded(self) -> bool:
        """Whether the study is closed with a finished trial."""
        done = any(job.state == State.DONE for job in self.jobs if job.kind == "trial")
        return done and (self.closing is None or self.closing.state != State.DEAD)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What `run` came to."""

    outcomes: list[Outcome]  # one for each study, in their order
    comparisons: list[tuple[list[winners.Closed], str]]  # of several studies, and MLflow's page of it
    services: Services
    are_services_started: bool  # by this call; they keep running


class Watch:
    """What `run` and `worker` tell their caller while they work; this one logs steps and is silent otherwise."""

    def say(self, line: str) -> None:
        """A step that takes time."""
        log.info(line)

    def begin(self, begun: Begun) -> None:
        """Work on a study begins."""

    def tick(self, trouble: str | None) -> None:
        """Work goes on; called several times a second. `trouble` says what is wrong, if anything."""

    def end(self, outcome: Outcome) -> None:
        """Work on a study has ended."""


def run(
    study: str | Sequence[Study | Plan],
    *,
    compute: Compute | None = None,
    cluster: Cluster | None = None,
    retry: bool = False,
    priority: int | None = None,
    trust_code: Sequence[str] = (),
    trials: int | None = None,
    budget: Budget | None = None,
    watch: Watch | None = None,
) -> Run:
    """Plan studies, train them to their end and promote their best models; continue what was interrupted.

    `study`: a name, the path of a study file, or what `load` returned. `cluster`: let workers on an engine train.
    `retry`: train dead trials again. `priority`: the pool claims trials of the highest one first. `trust_code`: SHA-256
    of code of others that may run, beside that in the files of these studies. `trials`: raise the number of a search's
    configurations; what is trained stays, and a closed study closes again. `budget`: close with the best so far when it
    is spent. Starts the embedded services if none run. After Ctrl-C or `hpo stop` the last outcome is `stopped`. Raise
    UserError for what is wrong with studies, data, options or services.
    """
    parts = as_parts(study)
    studies = [part.study if isinstance(part, Plan) else part for part in parts]
    asked = wishes(studies, retry=retry, priority=priority, trials=trials, budget=budget, is_here=cluster is None)
    with trusting(trust_code, [part for part in parts if isinstance(part, Study)]):
        return _run_all(parts, compute or Compute(), cluster, asked, watch or Watch())


def _run_all(
    parts: Sequence[Study | Plan], compute: Compute, cluster: Cluster | None, asked: Wishes, watch: Watch
) -> Run:
    """Plan and train studies in their order."""
    chosen = settings.read()
    studies = [part.study if isinstance(part, Plan) else part for part in parts]
    requests = [cluster.request(compute, chosen, part.threads) if cluster else None for part in studies]
    if requests[0]:
        requests[0].engine.check()
    outcomes: list[Outcome] = []
    with ready(parts, chosen, watch.say) as (prepared, connection, started):
        for request in requests:
            plan = prepared.pop(0)
            row = write_down(plan, connection, asked, say=watch.say)
            image = plan.folder / plan.dataset.names[0]
            del plan  # its images may take a gigabyte, and the trainers have theirs
            links = links_of(connection.services.tracking_uri, row)
            begun = Begun(row=row, queue=connection.queue, links=links, later=tuple(prepared))
            outcome = _run(begun, connection, compute, request, asked.spending, watch)
            outcomes.append(replace(outcome, image=image if image.exists() else None) if outcome.closed else outcome)
            watch.end(outcomes[-1])
            if outcomes[-1].stopped:
                break
            if prepared and asked.spending.is_out_of_time:
                later = ", ".join(plan.name for plan in prepared)
                watch.say(f"--max-hours is over. Not begun: {later}. The same command goes on with it.")
                break
        closings = [(outcome.row, outcome.closing.closing) for outcome in outcomes if outcome.closing is not None]
        closed = [(row, result) for row, result in closings if result is not None]
        are_compared = len(parts) > 1 and all(outcome.succeeded for outcome in outcomes)
        groups = winners.comparable(closed) if are_compared else []
        comparisons = [(alike, winners.log_winners(connection.tracker, alike)) for alike in groups]
    services = connection.services
    return Run(outcomes=outcomes, comparisons=comparisons, services=services, are_services_started=started)


def _run(
    begun: Begun,
    connection: Connection,
    compute: Compute,
    request: Request | None,
    spending: Spending,
    watch: Watch,
) -> Outcome:
    """Work on a planned study or let workers on an engine do so."""
    row, queue = begun.row, begun.queue
    place = _place(queue, row, compute, watch) if request is None else CPU
    watch.begin(begun)
    if request is None:
        outcome = _work(connection, row, compute, place, NO_LIMITS, None, watch, spending)
        if outcome.stop is not None and outcome.stop.is_budget:  # of this run, or of another one
            watch.say(f"{row.name} closes with the best so far: {outcome.stop.by} is spent.")
            outcome = _work(connection, row, compute, place, NO_LIMITS, None, watch)
    else:
        outcome = _on_cluster(request, connection, row, watch)
    if not outcome.closed:  # the database may be away: it is not asked again
        return replace(outcome, stopped=True)
    return replace(outcome, jobs=queue.jobs(row.name), links=begun.links)


def _place(queue: Queue, row: StudyRow, compute: Compute, watch: Watch) -> Place:
    """Return where a study is trained, and say it with the reason. Nothing of a closed study is trained."""
    if queue.closing_state(row.name) in ENDED:
        return CPU
    if compute.place.reason:
        watch.say(f"Training {compute.place.reason}.")
    return compute.place


def _work(
    connection: Connection,
    row: StudyRow,
    compute: Compute,
    place: Place,
    limits: Limits,
    stops: int | None,
    watch: Watch,
    spending: Spending | None = None,
) -> Outcome:
    """Be a worker of a planned study until it is closed, the worker is stopped, or it reaches a limit."""
    queue, chosen, services = connection.queue, connection.settings, connection.services
    if queue.closing_state(row.name) in ENDED and not queue.unmirrored(row.name, older_than=0):
        return Outcome(row=row, closed=True)
    from hpo.worker.supervisor import Supervisor
    from hpo.worker.worker import Worker

    count = compute.count(chosen, row.specification.threads, place)
    worker = Worker(
        chosen,
        services.database_url,
        services.tracking_uri,
        row.name,
        trainers=count,
        place=place,
        stops=stops,
    )

    def tick(supervisor: Supervisor) -> None:
        watch.tick(supervisor.concern)
        if spending is not None:
            spending.look(queue, row.name)

    closed = worker.run(limits=limits, on_tick=tick)
    stopped = not closed and worker.ending.reason not in (None, OUT_OF_TIME)
    return Outcome(
        row=row, closed=closed, stopped=stopped, stop=worker.ending.asked, failed_gpus=dict(worker.failed_gpus)
    )


def _on_cluster(request: Request, connection: Connection, row: StudyRow, watch: Watch) -> Outcome:
    """Let workers that an engine places work on a planned study until it is closed or stopped."""
    queue = connection.queue
    if queue.closing_state(row.name) in ENDED:
        return Outcome(row=row, closed=True)
    with collect_interrupts() as interrupts:
        handed = Handed(request, queue, row)
        handed.hand_in(watch.say, interrupts=interrupts)
        end = handed.follow(interrupts=interrupts, tick=watch.tick)
        return Outcome(row=row, closed=end.closed, stop=end.stop)


def worker(
    study: str,
    *,
    compute: Compute | None = None,
    max_trials: int | None = None,
    max_hours: float | None = None,
    idle_exit: float | None = None,
    stay: bool = False,
    stops: int | None = None,
    trust_code: Sequence[str] = (),
    watch: Watch | None = None,
) -> Outcome:
    """Train trials of a planned study, beside other workers, until it is closed, stopped, or a limit is reached.

    Limits: number of trials, hours, and seconds without a job to claim. `stay`: wait while the study is paused.
    `stops`: leave once the study has been stopped more often. `trust_code`: SHA-256 of code of others that may run.
    Waits while the study is being planned, and longer each time after workers have failed here. Raise NotFound if there
    is no such study, Untrusted if it runs code that may not run here, ServiceError if the services do not run, this
    machine cannot train, the study is paused or closing it failed.
    """
    limits = limits_of(max_trials=max_trials, max_hours=max_hours, idle_exit=idle_exit)
    limits = replace(limits, stays=stay)
    settings.at_least("--stops", stops, 0)
    compute, watch, begin = compute or Compute(), watch or Watch(), time.monotonic()
    with trusting(trust_code), connect() as connection:
        row = _wait_until_planned(connection.queue, study, limits, watch)
        if not row.facts.planned:
            return Outcome(row=row, closed=False)
        stops = row.stops if stops is None else stops  # so that `hpo stop` reaches a worker that waits, too
        most = math.inf if limits.seconds is None else limits.seconds - (time.monotonic() - begin)
        with _slower_after_failures(connection.queue, row, compute.device, watch, most, stops) as note_success:
            if limits.seconds is not None:
                limits = replace(limits, seconds=max(0.0, limits.seconds - (time.monotonic() - begin)))
            place = _place(connection.queue, row, compute, watch)
            watch.begin(Begun(row=row, queue=connection.queue, links={}))
            outcome = _work(connection, row, compute, place, limits, stops, watch)
            if outcome.closed and connection.queue.closing_state(study) == State.DEAD:
                raise ServiceError(
                    f"Closing {study} failed; `hpo run` tries it again, `hpo promote` says why it failed."
                )
            if not outcome.stopped:  # else it may have been stopped before it could fail
                with suppress(DatabaseLost):
                    note_success()
        if outcome.closed:
            outcome = replace(outcome, jobs=connection.queue.jobs(study))
        watch.end(outcome)
        return outcome


@contextmanager
def _slower_after_failures(
    queue: Queue, row: StudyRow, device: str, watch: Watch, most: float, stops: int
) -> Iterator[Callable[[], None]]:
    """Wait if workers have failed at this place lately, longer each time, and note if this one fails, too.

    It waits `most` seconds, and not after the study was stopped more than `stops` times. Give the function that forgets
    all failures. A program that restarts a worker without end does no harm then.
    """
    study, place = row.name, {"host": socket.gethostname(), "device": device}
    failures = queue.failures(study, **place)
    if failures is not None and failures.seconds_left > 0:
        watch.say(
            f"Workers failed here {counted(failures.count, 'time')} in a row, at last: {failures.reason} "
            f"Waiting {failures.seconds_left:.0f} s before the next try; Ctrl-C ends it."
        )
        end = time.monotonic() + min(failures.seconds_left, most)
        while (left := end - time.monotonic()) > 0 and queue.study(study).stops <= stops:
            time.sleep(min(POLL, left))
    try:
        yield partial(queue.note_success, study, **place)
    except (Unreachable, Untrusted):
        raise  # that is no fault of this place
    except Exception as error:  # of any kind: a fault of hpo comes again, too
        with suppress(DatabaseLost):
            queue.note_failure(study, reason=str(error) or type(error).__name__, **place)
        raise


def limits_of(*, max_trials: int | None, max_hours: float | None, idle_exit: float | None) -> Limits:
    """Return when a worker leaves. Raise SettingsError if a limit makes no sense."""
    settings.at_least("--max-trials", max_trials, 1)
    settings.at_least("--max-hours", max_hours, 0)
    settings.at_least("--idle-exit", idle_exit, 0)
    return Limits(trials=max_trials, seconds=None if max_hours is None else 3600 * max_hours, idle=idle_exit)


def _wait_until_planned(queue: Queue, study: str, limits: Limits, watch: Watch) -> StudyRow:
    """Return the study when it is planned, or as it is when a limit is reached."""
    patience = min((limit for limit in (limits.idle, limits.seconds) if limit is not None), default=math.inf)
    begin, is_told = time.monotonic(), False
    while not (row := queue.study(study)).facts.planned and time.monotonic() - begin < patience:
        if not is_told:
            watch.say(f"Waiting until {row.name} is planned; `hpo run --study {row.name}` goes on with that.")
        is_told = True
        time.sleep(min(POLL, patience))
    return row
