"""The pool: workers that serve every open study, and studies that are planned for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hpo import settings
from hpo.errors import StudyError
from hpo.launch.fleets import Handed, collect_interrupts
from hpo.operations.budgets import wishes
from hpo.operations.cluster import Cluster
from hpo.operations.compute import Compute
from hpo.operations.connection import connect
from hpo.operations.preparing import as_parts, ready, write_down
from hpo.operations.trust import trusting
from hpo.operations.work import Watch, limits_of
from hpo.planning.preparation import Plan
from hpo.queue import ENDED, Stop, StudyRow
from hpo.services.serving import Services
from hpo.study import Study
from hpo.worker.ending import OUT_OF_TIME
from hpo.worker.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Left:
    """Why a worker of the pool has ended."""

    stopped: bool  # by a signal or `hpo stop`; else it came to a limit
    stop: Stop | None = None  # the request, if it was `hpo stop`
    failed_gpus: Mapping[str, str] = field(default_factory=dict)  # why each one trained no more, though others did


@dataclass(frozen=True, kw_only=True)
class Detached:
    """Studies that were planned for the pool."""

    rows: Sequence[StudyRow]
    closed: Sequence[str]  # of them
    later: Sequence[str]  # studies that begin with one of these, and can be planned once that is closed
    workers: int  # of the pool that are here
    trainers: int  # of these workers
    services: Services
    are_services_started: bool  # by this call; they keep running


def serve(
    *,
    compute: Compute | None = None,
    max_trials: int | None = None,
    max_hours: float | None = None,
    idle_exit: float | None = None,
    stops: int | None = None,
    trust_code: Sequence[str] = (),
    watch: Watch | None = None,
) -> Left:
    """Be a worker of the pool: train trials of every open study, until stopped or a limit is reached.

    Limits and `trust_code`: as of `worker`. `stops`: leave once the pool has been stopped more often. Raise
    ServiceError if the services do not run or no trainer can be started here.
    """
    limits = limits_of(max_trials=max_trials, max_hours=max_hours, idle_exit=idle_exit)
    settings.at_least("--stops", stops, 0)
    compute, watch = compute or Compute(), watch or Watch()
    with trusting(trust_code), connect() as connection:
        chosen, services = connection.settings, connection.services
        place = compute.place
        if place.reason:
            watch.say(f"Training {place.reason}.")
        count = compute.count(chosen, 1, place)
        urls = services.database_url, services.tracking_uri
        worker = Worker(chosen, *urls, None, trainers=count, place=place, stops=stops)
        worker.run(limits=limits, on_tick=lambda supervisor: watch.tick(supervisor.concern))
    return Left(
        stopped=worker.ending.reason not in (None, OUT_OF_TIME),
        stop=worker.ending.asked,
        failed_gpus=dict(worker.failed_gpus),
    )


def hand_in(
    cluster: Cluster,
    *,
    compute: Compute | None = None,
    max_trials: int | None = None,
    max_hours: float | None = None,
    idle_exit: float | None = None,
    trust_code: Sequence[str] = (),
    watch: Watch | None = None,
) -> Left:
    """Let an engine place workers of the pool, and follow them until they have left; Ctrl-C takes them back.

    Limits and `trust_code`: of each worker, as of `serve`. Raise SettingsError, or ServiceError if nothing can be
    handed in, or no worker is left.
    """
    limits_of(max_trials=max_trials, max_hours=max_hours, idle_exit=idle_exit)
    limits = {"--max-trials": max_trials, "--max-hours": max_hours, "--idle-exit": idle_exit}
    words = [word for name, value in limits.items() if value is not None for word in (name, str(value))]
    watch = watch or Watch()
    with trusting(trust_code):
        request = cluster.request(compute or Compute(), settings.read(), threads=1, words=words)
        request.engine.check()
        with connect(mlflow=False) as connection, collect_interrupts() as interrupts:
            handed = Handed(request, connection.queue, None)
            handed.hand_in(watch.say, interrupts=interrupts)
            end = handed.follow(interrupts=interrupts, tick=watch.tick)
    return Left(stopped=bool(interrupts) or end.stop is not None, stop=end.stop)


def detach(
    study: str | Sequence[Study | Plan],
    *,
    retry: bool = False,
    trials: int | None = None,
    priority: int | None = None,
    trust_code: Sequence[str] = (),
    watch: Watch | None = None,
) -> Detached:
    """Plan studies and leave the work to the pool; take up what was stopped or paused. Arguments: as of `run`.

    Starts the embedded services if none run; they keep running. Raise UserError for what is wrong with studies, data
    or services.
    """
    watch, rows, later = watch or Watch(), list[StudyRow](), list[str]()
    parts = as_parts(study)
    studies = [part.study if isinstance(part, Plan) else part for part in parts]
    asked = wishes(studies, retry=retry, priority=priority, trials=trials)
    with (
        trusting(trust_code, [part for part in parts if isinstance(part, Study)]),
        ready(parts, settings.read(), watch.say) as (prepared, connection, started),
    ):
        queue = connection.queue
        for plan in prepared:
            try:
                rows.append(write_down(plan, connection, asked, say=watch.say))
            except StudyError:
                begins_later = plan.study.follows is not None or {*plan.study.learn_from} & {row.name for row in rows}
                if not rows or not begins_later:
                    raise
                later.append(plan.name)
        closed = [row.name for row in rows if queue.closing_state(row.name) in ENDED]
        workers = [worker for worker in queue.workers() if worker.in_pool and worker.alive]
    return Detached(
        rows=rows,
        closed=closed,
        later=later,
        workers=len(workers),
        trainers=sum(worker.trainers for worker in workers),
        services=connection.services,
        are_services_started=started,
    )
