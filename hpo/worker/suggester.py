"""The suggester: a long-lived process in which the sampler of a study chooses points, for TPE and GP take longer with
every trial there is.

The point goes into the job's row first, under the fence of its claim, then into Optuna's tables.
"""

from functools import lru_cache

import optuna

from hpo import study
from hpo.queue import DatabaseLost, Job, LeaseLost, Queue, State
from hpo.search import sampling
from hpo.study.sizing import beyond
from hpo.worker import protocol
from hpo.worker.channel import Channel, serve


def answer_requests(channel: Channel) -> None:
    """Choose configurations as the supervisor asks."""
    channel.send(protocol.Ready())
    while True:
        request = channel.requests.get()
        if not isinstance(request, protocol.Fill):
            raise protocol.ProtocolError(f"expected Fill, found {type(request).__name__}")
        channel.send(answer(request))


def answer(request: protocol.Fill) -> protocol.Answer:
    """Choose the point of a claimed job; every error is an answer."""
    job, fence = request.job, request.fence
    try:
        filled = fill(*_services(request.database_url), request.study, job, fence)
        assert filled.spec is not None
        return protocol.Filled(job=job, fence=fence, spec=filled.spec, cost=filled.cost)
    except LeaseLost:
        return protocol.ClaimLost(job=job, fence=fence)
    except DatabaseLost:
        return protocol.DatabaseAway(job=job, fence=fence)
    except Exception as error:  # such as parameters that do not go together
        return protocol.NotFilled(job=job, fence=fence, reason=str(error) or type(error).__name__)


def fill(queue: Queue, store: optuna.storages.RDBStorage, name: str, job_id: int, fence: int) -> Job:
    """Let the sampler choose the point of a claimed slot; all repeats of a slot get the same. Raises LeaseLost."""
    job = queue.job(job_id)
    if job is None or job.fence != fence or job.state != State.RUNNING:
        raise LeaseLost(name)
    row = queue.study(name)
    planned = row.specification
    accepts = (lambda point: not beyond(planned, point, row.facts.data)) if planned.bounds else None
    point = queue.point(job) or sampling.suggest(
        store, name, planned, job.number, row.facts.learned or (), accepts=accepts
    )
    while True:
        spec, cost = study.trial_spec(planned, row.identity, row.facts, point, config=None, repeat=job.repeat)
        first = queue.fill(job, spec, cost)
        if first == point:
            break
        point = first  # that of another repeat was chosen meanwhile
    filled = queue.require(job)
    sampling.tell(store, planned, filled, point)
    return filled


@lru_cache(maxsize=1)
def _services(database_url: str) -> tuple[Queue, optuna.storages.RDBStorage]:
    return Queue(database_url), sampling.storage(database_url)


if __name__ == "__main__":
    serve(answer_requests)
