"""The queue: every planned trial is trained at least once and recorded exactly once.

A table of jobs with fenced leases, in a schema of its own beside Optuna's tables in one Postgres database. The row of
a job is the truth; Optuna's trial and MLflow's run are projections of it (`hpo.recording`). Every statement that
changes anything stands in this package. Times are the server's: no clock of a worker counts.
"""

from hpo.queue.attempts import Attempt, AttemptOutcome, is_exhausted
from hpo.queue.closing_result import BudgetEnd
from hpo.queue.database import (
    FREEZE_LIMIT,
    DatabaseLost,
    LeaseLost,
    engine,
    engine_arguments,
    finite,
    lost,
    postgres_url,
)
from hpo.queue.delays import Delays
from hpo.queue.epochs import Epochs
from hpo.queue.leases import Leases
from hpo.queue.outbox import Outbox
from hpo.queue.outcomes import Outcomes
from hpo.queue.records import (
    ENDED,
    Checkpoint,
    Job,
    Judged,
    NewJob,
    OpenStudy,
    Orders,
    Pace,
    PlaceFailures,
    Present,
    State,
    Stop,
    StudyCounts,
    StudyRow,
    TrialResult,
)
from hpo.queue.schema import GIVE_ALL_BACK, SCHEMA_VERSION
from hpo.queue.studies import Studies, require_whole
from hpo.queue.validation import Validation
from hpo.queue.workers import Workers

__all__ = [
    "ENDED",
    "FREEZE_LIMIT",
    "GIVE_ALL_BACK",
    "SCHEMA_VERSION",
    "Attempt",
    "AttemptOutcome",
    "BudgetEnd",
    "Checkpoint",
    "DatabaseLost",
    "Job",
    "Judged",
    "LeaseLost",
    "NewJob",
    "OpenStudy",
    "Orders",
    "Pace",
    "PlaceFailures",
    "Present",
    "Queue",
    "State",
    "Stop",
    "StudyCounts",
    "StudyRow",
    "TrialResult",
    "engine",
    "engine_arguments",
    "finite",
    "is_exhausted",
    "lost",
    "postgres_url",
    "require_whole",
]


class Queue(Studies, Leases, Outcomes, Validation, Workers, Delays, Epochs, Outbox):
    """All access to the tables of the queue.

    Every method is one short transaction. It raises DatabaseLost if that could not be made; then nothing is known of a
    commit under way, and repeating the call is always safe.
    """
