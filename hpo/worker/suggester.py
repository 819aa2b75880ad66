"""The suggester: a long-lived process in which the sampler of a study chooses points, for TPE takes longer with every
trial there is.

Requests and events are a trainer's, as JSON lines. The point goes into the job's row first, under the fence of its
claim, then into Optuna's tables. It ends when its input closes, so it never outlives its supervisor.
"""

from functools import lru_cache

import optuna

from hpo import study
from hpo.queue import DatabaseLost, Job, LeaseLost, Queue
from hpo.search import sampling
from hpo.worker.trainer import connect


def main() -> None:
    emit, requests, _ = connect()
    emit("ready")
    while True:
        request = requests.get()
        name, job = request["study"], request["job"]
        found = {"job": job, "fence": request["fence"]}
        try:
            filled = fill(*_services(request["database_url"]), name, job, request["fence"])
            assert filled.spec is not None
            emit("filled", **found, spec=filled.spec.to_json(), cost=filled.cost)
        except LeaseLost:
            emit("lost", **found)
        except DatabaseLost:
            emit("away", **found)
        except Exception as error:  # such as parameters that do not go together
            emit("failed", **found, reason=str(error) or type(error).__name__)


def fill(queue: Queue, store: optuna.storages.RDBStorage, name: str, job_id: int, fence: int) -> Job:
    """Let the sampler choose the point of a claimed slot; all repeats of a slot get the same. Raises LeaseLost."""
    job = queue.job(job_id)
    if job is None or job.fence != fence or job.state != "running":
        raise LeaseLost(name)
    row = queue.study(name)
    planned = study.restore(name, row.spec)
    point = queue.point(job) or sampling.suggest(store, name, planned, job.number)
    while True:
        spec, cost = study.trial_spec(planned, row.identity, row.facts, point, config=None, repeat=job.repeat)
        first = queue.fill(job, spec, cost)
        if first == point:
            break
        point = first  # another repeat's was chosen meanwhile
    filled = queue.require(job)
    sampling.tell(store, planned, filled, point)
    return filled


@lru_cache(maxsize=1)
def _services(database_url: str) -> tuple[Queue, optuna.storages.RDBStorage]:
    return Queue(database_url), sampling.storage(database_url)


if __name__ == "__main__":
    main()
