"""The queue: every planned point trained at least once, recorded exactly once.

A table of jobs with fenced leases, in a schema of ours beside Optuna's tables in one Postgres database. The job
row is the truth; Optuna's trial and MLflow's run are projections of it (`hpo.recording`). Every statement that changes
anything stands in this package. Times are the server's: no clock of a worker counts.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from hpo.errors import NotFound, ServiceError, StudyConflict
from hpo.study import conflict
from hpo.text import point_text, utf8

log = logging.getLogger("hpo")

SCHEMA_VERSION = 4
FIRST_VERSION = 3  # of the tables that _SCHEMA makes; what came later stands in _MIGRATIONS alone
ATTEMPTS = 3  # a job that lost three workers is dead
REASON = 500  # characters kept of why a job was given back or ended
FREEZE_LIMIT = 30.0  # seconds a transaction may stay open, and its rows locked, by somebody who does nothing
FILLING = 5.0  # seconds who froze while it stores a point may keep the others from it
GAP = 2 / 3  # of a lease: after a shorter silence of the database no lease has run out, each being renewed at a sixth
ENDED = ("done", "diverged", "pruned", "dead", "cancelled")  # states no worker leads out of
SILENT = 3600.0  # seconds after which a worker that died is not shown any more

_WORKER = """
CREATE TABLE IF NOT EXISTS hpo.worker (  -- who is here, for people: leases alone decide who may write
    name text PRIMARY KEY,
    study text NOT NULL REFERENCES hpo.study ON DELETE CASCADE,
    trainers int NOT NULL,
    device text NOT NULL,
    stops int NOT NULL,                 -- of the study when it joined
    lease float8 NOT NULL,              -- seconds it may be silent
    joined_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL
);
"""

_SCHEMA = (
    """
CREATE SCHEMA IF NOT EXISTS hpo;
CREATE TABLE IF NOT EXISTS hpo.schema (version int NOT NULL, id uuid NOT NULL DEFAULT gen_random_uuid());
CREATE TABLE IF NOT EXISTS hpo.study (
    name text PRIMARY KEY,
    identity text NOT NULL,             -- SHA-256 of the canonical spec
    spec json NOT NULL,                 -- the canonical spec; json, not jsonb: the order of parameters matters
    facts jsonb NOT NULL,               -- what planning found out: ids in Optuna and MLflow, data, predictors
    stops int NOT NULL DEFAULT 0,       -- how often its workers were asked to leave: who joined before does
    stopped_at timestamptz,
    stopped_by text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE IF NOT EXISTS hpo.job (
    id bigserial PRIMARY KEY,
    study text NOT NULL REFERENCES hpo.study ON DELETE CASCADE,
    kind text NOT NULL CHECK (kind IN ('trial', 'closing')),
    number int NOT NULL,                -- of the Optuna trial; -1 for the closing
    repeat int NOT NULL DEFAULT 0,
    config int,                         -- position in the study's Cartesian product, for grids
    cost float8 NOT NULL DEFAULT 0,     -- multiply-adds of one image, forward: the dearest trial is claimed first
    spec json,                          -- the frozen trial; null until a sampler has filled the slot
    state text NOT NULL DEFAULT 'waiting'
        CHECK (state IN ('waiting', 'running', 'done', 'diverged', 'pruned', 'dead', 'cancelled')),
    attempt int NOT NULL DEFAULT 0,
    fence bigint NOT NULL DEFAULT 0,    -- raised at every claim: who holds an older one has lost the job
    lease_until timestamptz,
    worker text,
    run_id text,                        -- MLflow's
    checkpoint jsonb,                   -- {uri, sha256, epoch}
    result json,                        -- of an ended job
    reason text,                        -- why it was handed back, diverged, died or was cancelled
    mirrored boolean NOT NULL DEFAULT true,  -- whether Optuna and MLflow show this row's state
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (study, number, repeat)
);
CREATE INDEX IF NOT EXISTS job_by_state ON hpo.job (study, state);
CREATE TABLE IF NOT EXISTS hpo.epoch (
    job bigint NOT NULL REFERENCES hpo.job ON DELETE CASCADE,
    number int NOT NULL,
    at timestamptz NOT NULL,
    metrics jsonb NOT NULL,
    forwarded boolean NOT NULL DEFAULT false,  -- whether MLflow has it
    PRIMARY KEY (job, number)
);
CREATE INDEX IF NOT EXISTS epoch_outbox ON hpo.epoch (job) WHERE NOT forwarded;
"""
    + _WORKER
)

_JUDGED = """
-- What the pruner has made of a trial so far (hpo.search.pruning.Judged): {epoch, value, rungs, ends}.
ALTER TABLE hpo.job ADD COLUMN IF NOT EXISTS judged jsonb;
DO $$ BEGIN  -- it stood in Optuna's tables alone
    IF to_regclass('public.trial_intermediate_values') IS NOT NULL THEN
        UPDATE hpo.job SET judged = seen.judged FROM (
            SELECT study_name, number, json_build_object(
                'epoch', (SELECT max(step) FROM public.trial_intermediate_values v WHERE v.trial_id = t.trial_id),
                'value', (SELECT min(intermediate_value) FROM public.trial_intermediate_values v
                          WHERE v.trial_id = t.trial_id),
                'rungs', coalesce((SELECT json_agg(value_json::float8 ORDER BY substring(key FROM 16)::int)
                                   FROM public.trial_system_attributes a
                                   WHERE a.trial_id = t.trial_id AND key LIKE 'completed_rung_%'), '[]')
            )::jsonb AS judged
            FROM public.trials t JOIN public.studies USING (study_id)
            WHERE EXISTS (SELECT FROM public.trial_intermediate_values v WHERE v.trial_id = t.trial_id)
        ) AS seen
        WHERE job.study = study_name AND kind = 'trial' AND job.number = seen.number AND job.judged IS NULL;
    END IF;
END $$;
"""

# What leads from a version to the next one; new tables go the same way from FIRST_VERSION on.
_MIGRATIONS = {
    1: """
    ALTER TABLE hpo.job DROP CONSTRAINT job_state_check;
    ALTER TABLE hpo.job ADD CONSTRAINT job_state_check
        CHECK (state IN ('waiting', 'running', 'done', 'diverged', 'pruned', 'dead'));
    """,
    2: """
    ALTER TABLE hpo.job DROP CONSTRAINT job_state_check;
    ALTER TABLE hpo.job ADD CONSTRAINT job_state_check
        CHECK (state IN ('waiting', 'running', 'done', 'diverged', 'pruned', 'dead', 'cancelled'));
    ALTER TABLE hpo.study ADD COLUMN stops int NOT NULL DEFAULT 0, ADD COLUMN stopped_at timestamptz,
        ADD COLUMN stopped_by text;
    -- A role called hpo finds this schema first, so Optuna made its tables here, where a role of another name, as on
    -- the server that a backup is restored on, does not look.
    DO $$ DECLARE each record; BEGIN
        FOR each IN
            SELECT relname AS name, 'TABLE' AS kind FROM pg_class
            WHERE relnamespace = 'hpo'::regnamespace AND relkind = 'r'
              AND relname NOT IN ('schema', 'study', 'job', 'epoch')
            UNION ALL SELECT typname, 'TYPE' FROM pg_type WHERE typnamespace = 'hpo'::regnamespace AND typtype = 'e'
        LOOP
            EXECUTE format('ALTER %s hpo.%I SET SCHEMA public', each.kind, each.name);
        END LOOP;
    END $$;
    """
    + _WORKER,
    3: """
    ALTER TABLE hpo.study ADD COLUMN IF NOT EXISTS deleting boolean NOT NULL DEFAULT false;
    -- MLflow's runs of a curve that was cut back: nothing can be taken out of them
    ALTER TABLE hpo.job ADD COLUMN IF NOT EXISTS discarded text[] NOT NULL DEFAULT '{}';
    -- since when a worker has said without a gap that it is here: so long the database has taken what was written
    ALTER TABLE hpo.worker ADD COLUMN IF NOT EXISTS since timestamptz NOT NULL DEFAULT clock_timestamp();
    """
    + _JUDGED,
}


# After a backup's rows, whatever version's they are: running jobs wait, no attempt counted, and nobody works, for all
# workers stayed with the original. Those of them that come upon this database hold fences still to be given out here.
GIVE_ALL_BACK = """
UPDATE hpo.job SET fence = fence + 1000000 WHERE state IN ('waiting', 'running');
UPDATE hpo.job SET state = 'waiting', attempt = attempt - 1, reason = 'its worker stayed with the original',
    lease_until = NULL, mirrored = false, changed_at = clock_timestamp()
WHERE state = 'running';
DO $$ BEGIN
    IF to_regclass('hpo.worker') IS NOT NULL THEN DELETE FROM hpo.worker; END IF;
END $$;
"""


class LeaseLost(Exception):
    """Somebody else holds this job now (or it ended): stop, and write nothing."""


class DatabaseLost(Exception):
    """The database cannot be reached, or takes nothing, at the moment: the caller tries again."""


# Classes of SQLSTATE that tell of the server's state and not of what was asked for: connection, transaction (a server
# that is read-only for now), rollback, resources, operator, system.
_PASSING = ("08", "25", "40", "53", "57", "58")


def lost(error: DBAPIError) -> DatabaseLost | None:
    """What an error means that passes by itself; None for one of ours, or of our role's rights."""
    state = getattr(error.orig, "sqlstate", None) or ""
    if error.connection_invalidated or isinstance(error, sqlalchemy.exc.OperationalError) or state[:2] in _PASSING:
        return DatabaseLost(" ".join(str(error.orig).split()))
    return None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the job table."""

    id: int
    study: str
    kind: str
    number: int
    repeat: int
    config: int | None
    cost: float
    spec: dict[str, Any] | None
    state: str
    attempt: int
    fence: int
    worker: str | None
    run_id: str | None
    checkpoint: dict[str, Any] | None
    result: dict[str, Any] | None
    reason: str | None
    mirrored: bool
    alive: bool  # running, and its lease has not run out
    epochs: int  # completed and stored
    discarded: Sequence[str] = ()  # MLflow's runs of this job that show epochs it has not, or not so
    changed_at: float  # seconds since 1970, server clock
    judged: dict[str, Any] | None = None  # what the pruner has made of it so far: hpo.search.pruning.Judged

    @property
    def title(self) -> str:
        """What messages call it: `trial 7 of grid`."""
        again = f", repeat {self.repeat}" if self.repeat else ""
        return f"closing of {self.study}" if self.kind == "closing" else f"trial {self.number} of {self.study}{again}"

    @property
    def key(self) -> str:
        """What marks everything of this job in MLflow."""
        return f"{self.study}/{self.number}/{self.repeat}"

    @property
    def run_name(self) -> str:
        """The name of its MLflow run, such as `grid/22 f32 k5 d0.2 lr1e-3`."""
        assert self.spec is not None
        number = self.number if self.config is None else self.config
        again = f" repeat {self.repeat}" if self.repeat else ""
        return f"{self.study}/{number} {point_text(self.spec['point'])}".strip() + again

    @property
    def verdict(self) -> str | None:
        """Why the pruner has ended it, though that may not be recorded yet."""
        return (self.judged or {}).get("ends")


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One row of the study table."""

    name: str
    identity: str
    spec: dict[str, Any]
    facts: dict[str, Any]
    created_at: float  # seconds since 1970, server clock
    stops: int = 0  # how often its workers were asked to leave
    deleting: bool = False  # a deletion has begun


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A request that all workers of a study leave."""

    by: str
    at: float  # seconds since 1970, server clock


@dataclass(frozen=True, kw_only=True)
class Present:
    """One row of the worker table."""

    name: str  # host:process
    trainers: int
    device: str
    stops: int  # of the study when it joined
    alive: bool  # it was seen within its lease
    here: float  # seconds since it joined
    silent: float  # seconds since it was seen


# A lease that ran out. After the server's own start every lease gets its full length once more: while the server was
# away nobody could renew, and a restart must not cost each running trial an attempt.
_EXPIRED = """
    state = 'running'
    AND greatest(lease_until, pg_postmaster_start_time() + make_interval(secs => :lease)) < clock_timestamp()
"""

# Whether a job may be tried no more. One that the pruner has ended needs no attempt: its next claim records it.
_EXHAUSTED = "attempt >= :attempts AND judged->>'ends' IS NULL"

_TRIAL = "study = :study AND kind = 'trial' AND number = :number AND repeat = coalesce(:repeat, repeat)"

_LEFT = "study = :study AND kind = 'trial' AND state IN ('waiting', 'running')"  # trials that are still to be trained

_POINT = "SELECT spec->'point' FROM hpo.job WHERE study = :study AND number = :number AND spec IS NOT NULL LIMIT 1"

_JOB = """
    id, study, kind, number, repeat, config, cost, spec, state, attempt, fence, worker, run_id, checkpoint, result,
    reason, mirrored, discarded, judged, state = 'running' AND lease_until >= clock_timestamp() AS alive,
    coalesce((SELECT max(e.number) FROM hpo.epoch e WHERE e.job = job.id), 0) AS epochs,
    extract(epoch FROM changed_at)::float8 AS changed_at
"""


class Queue:
    """All access to the job table. Every method is one short transaction and raises DatabaseLost when it could not
    be made; then nothing is known about a commit under way, and repeating the call is always safe."""

    def __init__(self, url: str) -> None:
        self.engine = engine(url)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self.engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            if (found := lost(error)) is None:
                raise
            raise found from error

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()

    def install(self) -> None:
        """Make the tables if they are not there. Raises ServiceError if they are another version's."""
        with self._transaction() as connection:
            # Two first workers would both find no tables: the second waits here, and then finds them.
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('hpo.schema'))"))
            made = False
            if connection.scalar(text("SELECT to_regclass('hpo.schema')")) is None:
                connection.execute(text(_SCHEMA))
                connection.execute(text("INSERT INTO hpo.schema (version) VALUES (:n)"), {"n": FIRST_VERSION})
                made = True
            version = connection.scalar(text("SELECT version FROM hpo.schema"))
            if version in _MIGRATIONS and not made:
                log.warning("Bringing the queue's tables from schema version %d to %d.", version, SCHEMA_VERSION)
                # In the order in which a claim of an earlier hpo takes them: neither waits for the other in a circle.
                connection.execute(text("LOCK TABLE hpo.job, hpo.study"))
            while version in _MIGRATIONS:
                connection.execute(text(_MIGRATIONS[version]))
                version += 1
                connection.execute(text("UPDATE hpo.schema SET version = :n"), {"n": version})
            if version != SCHEMA_VERSION:
                raise ServiceError(
                    f"The database holds schema version {version} of hpo, this program needs {SCHEMA_VERSION}. "
                    "Nothing was changed. Use the hpo version that made it, or an empty database."
                )

    def installed(self) -> bool:
        """Whether the tables are there; makes nothing."""
        with self._transaction() as connection:
            return connection.scalar(text("SELECT to_regclass('hpo.job')")) is not None

    def server_version(self) -> int:
        """Major version of the Postgres server."""
        with self._transaction() as connection:
            return int(connection.scalar(text("SHOW server_version_num")) or 0) // 10_000

    def database_id(self) -> str:
        """A random name of this database: what tells its experiments on a shared MLflow server from those of others."""
        with self._transaction() as connection:
            return str(connection.scalar(text("SELECT id FROM hpo.schema")))

    # Planning

    @contextmanager
    def lock(
        self, what: str, *, patience: float = 0, waits: Callable[[], object] = lambda: None
    ) -> Iterator[Callable[[], None]]:
        """Hold a named lock across processes; it falls when the process dies, or `patience` seconds after it froze.

        What it gives is to be called between steps: it raises DatabaseLost if the lock has fallen, and starts the
        patience anew. `waits` is called if somebody else holds the lock.
        """
        with self._transaction() as connection:
            _patience(connection, patience)
            named = {"what": f"hpo.{what}"}
            if not connection.scalar(text("SELECT pg_try_advisory_xact_lock(hashtext(:what))"), named):
                waits()
                connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:what))"), named)

            def hold() -> None:
                connection.execute(text("SELECT 1"))

            yield hold

    def put_study(self, row: StudyRow) -> None:
        """Insert a study, or refresh its facts. Raises StudyConflict if the name stands for another specification."""
        with self._transaction() as connection:
            found = connection.scalar(
                text("""
                    INSERT INTO hpo.study (name, identity, spec, facts) VALUES (:name, :identity, :spec, :facts)
                    ON CONFLICT (name) DO UPDATE SET facts = hpo.study.facts || excluded.facts
                        WHERE hpo.study.identity = excluded.identity
                    RETURNING identity
                """),
                {
                    "name": row.name,
                    "identity": row.identity,
                    "spec": _json(row.spec),
                    "facts": _json(row.facts),
                },
            )
        if found is None:
            raise conflict(row.name, self.study(row.name).spec, row.spec)

    def amend_facts(self, name: str, facts: Mapping[str, Any]) -> None:
        """Add to a study's facts, or change some."""
        with self._transaction() as connection:
            connection.execute(
                text("UPDATE hpo.study SET facts = facts || cast(:facts AS jsonb) WHERE name = :name"),
                {"name": name, "facts": _json(facts)},
            )

    def study(self, name: str) -> StudyRow:
        """Raises NotFound, naming the studies there are."""
        rows = {row.name: row for row in self.studies()}
        if name not in rows:
            known = ", ".join(rows) or "none yet"
            raise NotFound(f"No study '{name}' has been planned here. There are: {known}. `hpo run` plans one.")
        return rows[name]

    def studies(self) -> list[StudyRow]:
        """Oldest first."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT name, identity, spec, facts, extract(epoch FROM created_at)::float8 AS created_at, stops,
                        deleting
                    FROM hpo.study ORDER BY study.created_at
                """)
            )
            return [StudyRow(**row) for row in rows.mappings()]

    def put_jobs(self, study: str, jobs: Iterable[Mapping[str, Any]]) -> None:
        """Insert jobs {kind, number, repeat (default 0), config, cost, spec} that are not there yet."""
        rows = [
            {"study": study, "repeat": 0, **job, "spec": _json(job["spec"]) if job["spec"] else None} for job in jobs
        ]
        with self._transaction() as connection:
            connection.execute(
                text("""
                    INSERT INTO hpo.job (study, kind, number, repeat, config, cost, spec)
                    VALUES (:study, :kind, :number, :repeat, :config, :cost, :spec)
                    ON CONFLICT (study, number, repeat) DO NOTHING
                """),
                rows,
            )

    def begin_deletion(self, name: str, *, lease: float, by: str) -> bool:
        """Let nobody claim a trial of the study from now on, and its workers leave, for it is being deleted; false, and
        nothing is changed, while a worker holds one (leases in seconds)."""
        with self._transaction() as connection:
            _lock_study(connection, name, "FOR UPDATE")  # waits for claims under way
            held = connection.scalar(
                text(f"""
                    SELECT EXISTS (SELECT FROM hpo.job WHERE study = :name AND state = 'running' AND NOT ({_EXPIRED}))
                """),
                {"name": name, "lease": lease},
            )
            if not held:
                connection.execute(
                    text("""
                        UPDATE hpo.study SET deleting = true, stops = stops + 1, stopped_at = clock_timestamp(),
                            stopped_by = :by
                        WHERE name = :name
                    """),
                    {"name": name, "by": by},
                )
            return not held

    def delete_study(self, name: str) -> None:
        with self._transaction() as connection:
            connection.execute(text("DELETE FROM hpo.study WHERE name = :name"), {"name": name})

    # The life of a job

    def claim(
        self, study: str, *, worker: str, lease: float, stops: int | None = None, take_over: bool = True
    ) -> Job | None:
        """Take the dearest waiting job, or with `take_over` one whose lease (seconds) ran out. None if there is nothing
        to take, or if the study was stopped more often than the `stops` times the worker knows of, or is being deleted.
        """
        with self._transaction() as connection:
            closes = _all_ended(connection, study)
            # Claims of trials do not wait for each other, but for a deletion.
            if _lock_study(connection, study, "FOR NO KEY UPDATE" if closes else "FOR KEY SHARE"):
                return None
            row = connection.execute(
                text(f"""
                    UPDATE hpo.job SET state = 'running', attempt = attempt + 1, fence = fence + 1, worker = :worker,
                        reason = CASE WHEN state = 'running' THEN 'worker lost' ELSE reason END,
                        lease_until = clock_timestamp() + make_interval(secs => :lease),
                        mirrored = false, changed_at = clock_timestamp()
                    WHERE id = (
                        SELECT id FROM hpo.job candidate
                        WHERE study = :study AND NOT ({_EXHAUSTED})
                          AND (state = 'waiting' OR :take_over AND ({_EXPIRED}))
                          -- who is asked to leave takes nothing more
                          AND (cast(:stops AS int) IS NULL
                               OR :stops = (SELECT stops FROM hpo.study WHERE name = :study))
                          -- a study closes when every trial has ended: seen before the lock, and still so under it
                          AND (kind = 'trial' OR :closes AND NOT EXISTS (SELECT FROM hpo.job WHERE {_LEFT}))
                        -- what was begun goes on first; then the dearest, so that the last ones are short
                        ORDER BY checkpoint IS NULL, cost DESC, number
                        LIMIT 1
                        FOR UPDATE SKIP LOCKED  -- a row another worker is claiming right now is not waited for
                    )
                    RETURNING {_JOB}
                """),
                {
                    "study": study,
                    "worker": worker,
                    "lease": lease,
                    "attempts": ATTEMPTS,
                    "stops": stops,
                    "closes": closes,
                    "take_over": take_over,
                },
            )
            return next((Job(**found) for found in row.mappings()), None)

    def renew(self, jobs: Sequence[Job], *, lease: float) -> list[Job]:
        """Renew the leases of all these jobs in one statement; return those that are no longer ours."""
        if not jobs:
            return []
        with self._transaction() as connection:
            kept = {
                (row.id, row.fence)
                for row in connection.execute(
                    text("""
                        UPDATE hpo.job SET lease_until = clock_timestamp() + make_interval(secs => :lease)
                        WHERE id IN (
                            SELECT job.id FROM hpo.job
                            JOIN unnest(cast(:ids AS bigint[]), cast(:fences AS bigint[])) AS mine (id, fence)
                                ON job.id = mine.id AND job.fence = mine.fence AND state = 'running'
                            ORDER BY job.id FOR UPDATE OF job  -- always in this order: nobody waits in a circle
                        )
                        RETURNING id, fence
                    """),
                    {"ids": [job.id for job in jobs], "fences": [job.fence for job in jobs], "lease": lease},
                )
            }
        return [job for job in jobs if (job.id, job.fence) not in kept]

    def point(self, job: Job) -> dict[str, Any] | None:
        """The point of the job's slot, if it or another repeat of it has been filled."""
        with self._transaction() as connection:
            return connection.scalar(text(_POINT), {"study": job.study, "number": job.number})

    def fill(self, job: Job, spec: Mapping[str, Any], cost: float) -> dict[str, Any]:
        """Store what the sampler chose for this slot, unless another repeat of it has another point; return the point
        that stands. Raises LeaseLost."""
        # Of two repeats that are filled at once the second waits, its row unlocked, and finds the first.
        with self._transaction() as connection:
            _patience(connection, FILLING)
            named = {"what": f"hpo.fill.{job.study}.{job.number}"}
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:what))"), named)
            _hold(connection, job)
            found = connection.scalar(text(_POINT), {"study": job.study, "number": job.number})
            if found is None or found == spec["point"]:
                connection.execute(
                    text(
                        "UPDATE hpo.job SET spec = :spec, cost = :cost, changed_at = clock_timestamp() WHERE id = :id"
                    ),
                    {"id": job.id, "spec": _json(spec), "cost": cost},
                )
        return dict(spec["point"]) if found is None else found

    def set_run(self, job_id: int, run_id: str) -> str | None:
        """Note the MLflow run of a job, unless that was discarded; the first one stays. Returns which one that is; None
        if there is none, or the job is gone."""
        with self._transaction() as connection:
            return connection.scalar(
                text("""
                    UPDATE hpo.job SET run_id = coalesce(run_id,
                        CASE WHEN cast(:run AS text) <> ALL (discarded) THEN cast(:run AS text) END)
                    WHERE id = :id RETURNING run_id
                """),
                {"id": job_id, "run": run_id},
            )

    def checkpoint(self, job: Job, checkpoint: Mapping[str, Any]) -> None:
        """Commit an uploaded checkpoint {uri, sha256, epoch}. Raises LeaseLost."""
        self._change(job, "checkpoint = :checkpoint", checkpoint=_json(checkpoint))

    def add_epochs(self, job: Job, epochs: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Append (number, milliseconds since 1970, metrics). Raises LeaseLost.

        An epoch that is there already stays: a resumed trial computes its last epochs again, to the bit. If it comes
        out otherwise, as on another kind of CPU, the curve is cut back to the epoch before it, for the rest is of
        another network.
        """
        with self._transaction() as connection:
            _hold(connection, job)
            stored = connection.execute(
                text("""
                    SELECT number, metrics FROM hpo.epoch WHERE job = :job AND number = ANY(:numbers) ORDER BY number
                """),
                {"job": job.id, "numbers": [number for number, _, _ in epochs]},
            ).all()
            again = {number: _scores(json.loads(_json(metrics))) for number, _, metrics in epochs if stored}
            differs = (number for number, metrics in stored if _scores(metrics) != again[number])
            if (first := next(differs, None)) is not None:
                _cut(connection, job, first - 1)
            connection.execute(
                text("""
                    INSERT INTO hpo.epoch (job, number, at, metrics)
                    SELECT :job, number, to_timestamp(at / 1000.0), cast(metrics AS jsonb)
                    FROM unnest(cast(:numbers AS int[]), cast(:at AS bigint[]), cast(:metrics AS text[]))
                        AS arrived (number, at, metrics)
                    ON CONFLICT (job, number) DO NOTHING
                """),
                {
                    "job": job.id,
                    "numbers": [number for number, _, _ in epochs],
                    "at": [at for _, at, _ in epochs],
                    "metrics": [_json(metrics) for _, _, metrics in epochs],
                },
            )

    def cut(self, job: Job, epoch: int) -> None:
        """Forget what is stored beyond the last epoch of a job, if anything is. Raises LeaseLost."""
        with self._transaction() as connection:
            _hold(connection, job)
            found = "SELECT EXISTS (SELECT FROM hpo.epoch WHERE job = :job AND number > :epoch)"
            if connection.scalar(text(found), {"job": job.id, "epoch": epoch}):
                _cut(connection, job, epoch)

    def judge(self, job: Job, judged: Mapping[str, Any]) -> None:
        """Store what the pruner has made of the job, hpo.search.pruning.Judged. Raises LeaseLost."""
        with self._transaction() as connection:
            changed = connection.execute(
                text("UPDATE hpo.job SET judged = :judged WHERE id = :id AND fence = :fence AND state = 'running'"),
                {"id": job.id, "fence": job.fence, "judged": _json(judged)},
            )
            if changed.rowcount == 0:
                raise LeaseLost(f"trial {job.number} of {job.study}")

    def end(self, job: Job, state: str, *, result: Mapping[str, Any], reason: str | None = None) -> None:
        """Record the one result of a job ('done', 'diverged' or 'pruned'). Raises LeaseLost: of a closing also while a
        trial of its study is still to be trained."""
        with self._transaction() as connection:
            if job.kind == "closing":
                _lock_study(connection, job.study)
                if not _all_ended(connection, job.study):
                    raise LeaseLost(f"closing of {job.study}")
            _change(
                connection,
                job,
                "state = :state, result = :result, reason = :reason, lease_until = NULL, mirrored = false",
                state=state,
                result=_json(result),
                reason=reason and utf8(reason)[:REASON],
            )

    def give_back(self, job: Job, *, reason: str, counts: bool) -> None:
        """Return a job to the queue; the attempt counts when the trainer failed. Raises LeaseLost."""
        self._change(
            job,
            """
            attempt = attempt - :free,
            state = CASE WHEN attempt - :free >= :attempts AND judged->>'ends' IS NULL THEN 'dead' ELSE 'waiting' END,
            reason = :reason, lease_until = NULL, mirrored = false
            """,
            free=0 if counts else 1,
            attempts=ATTEMPTS,
            reason=utf8(reason)[:REASON],
        )

    def note(self, job: Job, reason: str) -> None:
        """Say in the row of a job that is still ours what it waits for. Raises LeaseLost."""
        self._change(job, "reason = :reason", reason=utf8(reason)[:REASON])

    def bury(self, job: Job, *, reason: str) -> None:
        """End a job of ours as dead at once, whatever its attempts: another one would come to nothing, too. Raises
        LeaseLost."""
        self._change(
            job,
            "attempt = :attempts, state = 'dead', reason = :reason, lease_until = NULL, mirrored = false",
            attempts=ATTEMPTS,
            reason=utf8(reason)[:REASON],
        )

    def revive(self, study: str, *, trials: bool) -> list[int]:
        """Let a dead closing run again, and with `trials` dead trials too; return the revived trials' numbers."""
        with self._transaction() as connection:
            _lock_study(connection, study)
            revived = connection.execute(
                text("""
                    UPDATE hpo.job SET state = 'waiting', attempt = 0, mirrored = false, changed_at = clock_timestamp()
                    WHERE study = :study AND state = 'dead' AND (:trials OR kind = 'closing')
                    RETURNING kind, number
                """),
                {"study": study, "trials": trials},
            ).all()
            if trials:
                _close_again(connection, study)
        return [number for kind, number in revived if kind == "trial"]

    def cancel(self, study: str, number: int, repeat: int | None, *, by: str) -> list[Job]:
        """End a trial for good that has not ended, all its repeats or one; whoever trains it has lost it. Returns the
        jobs that this ended."""
        with self._transaction() as connection:
            _lock_study(connection, study)
            cancelled = connection.execute(
                text(f"""
                    UPDATE hpo.job SET state = 'cancelled', reason = :reason, lease_until = NULL, mirrored = false,
                        changed_at = clock_timestamp()
                    WHERE id IN (
                        SELECT id FROM hpo.job WHERE {_TRIAL} AND state IN ('waiting', 'running')
                        ORDER BY id FOR UPDATE
                    )
                    RETURNING {_JOB}
                """),
                {"study": study, "number": number, "repeat": repeat, "reason": utf8(f"cancelled by {by}")[:REASON]},
            )
            return [Job(**row) for row in cancelled.mappings()]

    def undo_cancel(self, study: str, number: int, repeat: int | None) -> list[Job]:
        """Let a cancelled trial wait again, and its study close again. Returns the jobs."""
        with self._transaction() as connection:
            _lock_study(connection, study)
            revived = connection.execute(
                text(f"""
                    UPDATE hpo.job SET state = 'waiting', attempt = 0, reason = NULL, mirrored = false,
                        changed_at = clock_timestamp()
                    WHERE {_TRIAL} AND state = 'cancelled' RETURNING {_JOB}
                """),
                {"study": study, "number": number, "repeat": repeat},
            )
            found = [Job(**row) for row in revived.mappings()]
            _close_again(connection, study)
        return found

    def close_again(self, study: str) -> None:
        """Let the study close once more if a trial of it is still to be trained."""
        with self._transaction() as connection:
            _lock_study(connection, study)
            _close_again(connection, study)

    def expired(self, study: str, *, lease: float) -> list[int]:
        """Ids of running jobs whose lease (seconds) ran out."""
        with self._transaction() as connection:
            return list(
                connection.scalars(
                    text(f"SELECT id FROM hpo.job WHERE study = :study AND {_EXPIRED}"),
                    {"study": study, "lease": lease},
                )
            )

    def expire(self, study: str, *, lease: float, sparing: str = "") -> list[int]:
        """Let jobs wait again whose lease (seconds) ran out; those of a third lost worker are dead. Returns their ids.

        A claim takes such a job directly: this is for what is shown of it while nobody claims. Jobs of the worker
        `sparing` are left alone: it is awake, and renews them if nobody has taken them.
        """
        with self._transaction() as connection:
            expired = connection.scalars(
                text(f"""
                    UPDATE hpo.job SET state = CASE WHEN {_EXHAUSTED} THEN 'dead' ELSE 'waiting' END,
                        lease_until = NULL, mirrored = false, changed_at = clock_timestamp(),
                        reason = CASE WHEN {_EXHAUSTED}
                            THEN 'worker lost, attempt ' || attempt || ' of ' || :attempts ELSE 'worker lost' END
                    WHERE id IN (
                        SELECT id FROM hpo.job WHERE study = :study AND {_EXPIRED} AND worker <> :sparing
                        FOR UPDATE SKIP LOCKED  -- a frozen worker may hold its row locked: the others do not wait
                    )
                    RETURNING id
                """),
                {"study": study, "attempts": ATTEMPTS, "lease": lease, "sparing": sparing},
            )
            return list(expired)

    def disown(self, worker: str, held: Sequence[Job]) -> int:
        """Let jobs wait again that this worker claimed without learning of it: the answer to a commit was lost.

        No attempt is counted. `held`: those the worker knows of. Returns how many there were.
        """
        with self._transaction() as connection:
            return connection.execute(
                text("""
                    UPDATE hpo.job SET state = 'waiting', attempt = attempt - 1, lease_until = NULL, mirrored = false,
                        changed_at = clock_timestamp()
                    WHERE id IN (
                        SELECT id FROM hpo.job WHERE worker = :worker AND state = 'running' AND NOT id = ANY(:held)
                        ORDER BY id FOR UPDATE
                    )
                """),
                {"worker": worker, "held": [job.id for job in held]},
            ).rowcount

    # Workers: who is here, and what people ask of them

    def attend(self, worker: str, study: str, *, trainers: int, device: str, stops: int, lease: float) -> bool:
        """Note that a worker lives; it says so again several times within its lease (seconds).

        Returns whether it or another one has done so for a whole lease by now: then a lease that ran out was not
        renewed though it could have been. After an outage that Postgres itself knows nothing of (read-only, a failover)
        this is false for a lease.
        """
        with self._transaction() as connection:
            connection.execute(
                text("""
                    INSERT INTO hpo.worker (name, study, trainers, device, stops, lease, seen_at)
                    SELECT :name, name, :trainers, :device, :stops, :lease, clock_timestamp()
                    FROM hpo.study WHERE name = :study  -- it may have been deleted
                    FOR KEY SHARE
                    ON CONFLICT (name) DO UPDATE SET seen_at = excluded.seen_at,
                        since = CASE WHEN worker.seen_at < excluded.seen_at - make_interval(secs => :gap)
                            THEN excluded.seen_at ELSE worker.since END
                """),
                {
                    "name": worker,
                    "study": study,
                    "trainers": trainers,
                    "device": device,
                    "stops": stops,
                    "lease": lease,
                    "gap": GAP * lease,
                },
            )
            return bool(
                connection.scalar(
                    text("""
                        SELECT EXISTS (
                            SELECT FROM hpo.worker, clock_timestamp() AS now
                            WHERE seen_at > now - make_interval(secs => :gap)
                              AND since <= now - make_interval(secs => :lease)
                        )
                    """),
                    {"gap": GAP * lease, "lease": lease},
                )
            )

    def leave(self, worker: str) -> None:
        """Forget a worker that ends, and those that ended long ago without a word."""
        with self._transaction() as connection:
            connection.execute(
                text("""
                    DELETE FROM hpo.worker
                    WHERE name = :name OR seen_at < clock_timestamp() - make_interval(secs => :silent)
                """),
                {"name": worker, "silent": SILENT},
            )

    def workers(self, study: str) -> list[Present]:
        """The workers of a study, those that fell silent lately as well; who joined first comes first."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT name, trainers, device, stops, seen_at + make_interval(secs => lease) >= now AS alive,
                        extract(epoch FROM now - joined_at)::float8 AS here,
                        greatest(extract(epoch FROM now - seen_at), 0)::float8 AS silent
                    FROM hpo.worker, clock_timestamp() AS now
                    WHERE study = :study AND seen_at > now - make_interval(secs => :silent) ORDER BY joined_at, name
                """),
                {"study": study, "silent": SILENT},
            )
            return [Present(**row) for row in rows.mappings()]

    def stop(self, study: str, *, by: str) -> int:
        """Ask all workers of a study that are here to leave; return how often that was asked by now."""
        with self._transaction() as connection:
            return int(
                connection.scalar(
                    text("""
                        UPDATE hpo.study SET stops = stops + 1, stopped_at = clock_timestamp(), stopped_by = :by
                        WHERE name = :study RETURNING stops
                    """),
                    {"study": study, "by": by},
                )
                or 0
            )

    def orders(self, study: str, *, stops: int, held: Sequence[Job]) -> tuple[Stop | None, list[Job]]:
        """What people ask of a worker that joined after so many `stops`: to leave, and to drop which of its jobs."""
        with self._transaction() as connection:
            asked = connection.execute(
                text("""
                    SELECT stopped_by, extract(epoch FROM stopped_at)::float8 FROM hpo.study
                    WHERE name = :study AND stops > :stops
                """),
                {"study": study, "stops": stops},
            ).one_or_none()
            cancelled = set(
                connection.scalars(
                    text("SELECT id FROM hpo.job WHERE id = ANY(:ids) AND state = 'cancelled'"),
                    {"ids": [job.id for job in held]},
                )
            )
        stop = Stop(by=asked[0], at=asked[1]) if asked is not None else None
        return stop, [job for job in held if job.id in cancelled]

    def _change(self, job: Job, changes: str, **values: Any) -> None:
        with self._transaction() as connection:
            _change(connection, job, changes, **values)

    # Reading, and the outbox

    def jobs(self, study: str) -> list[Job]:
        """All jobs of a study by number; the closing comes first, as number -1."""
        with self._transaction() as connection:
            rows = connection.execute(
                text(f"SELECT {_JOB} FROM hpo.job WHERE study = :study ORDER BY number, repeat"), {"study": study}
            )
            return [Job(**row) for row in rows.mappings()]

    def job(self, job_id: int) -> Job | None:
        with self._transaction() as connection:
            rows = connection.execute(text(f"SELECT {_JOB} FROM hpo.job WHERE id = :id"), {"id": job_id})
            return next((Job(**row) for row in rows.mappings()), None)

    def by_run(self, run_id: str) -> Job | None:
        """The job with this MLflow run."""
        with self._transaction() as connection:
            rows = connection.execute(text(f"SELECT {_JOB} FROM hpo.job WHERE run_id = :run"), {"run": run_id})
            return next((Job(**row) for row in rows.mappings()), None)

    def require(self, job: Job) -> Job:
        """The job's row as it is now. Raises LeaseLost unless it is still ours."""
        current = self.job(job.id)
        if current is None or current.fence != job.fence or current.state != "running":
            raise LeaseLost(f"{job.kind} {job.number} of {job.study}")
        return current

    def closing_state(self, study: str) -> str | None:
        """State of the study's closing; None if there is no such study, or it is not planned to its end."""
        with self._transaction() as connection:
            return connection.scalar(
                text("SELECT state FROM hpo.job WHERE study = :study AND kind = 'closing'"), {"study": study}
            )

    def unmirrored(self, study: str, *, older_than: float, also: Sequence[int] = ()) -> list[Job]:
        """Jobs that Optuna and MLflow do not show as they are, though they changed so long ago or are in `also`."""
        with self._transaction() as connection:
            rows = connection.execute(
                text(f"""
                    SELECT {_JOB} FROM hpo.job WHERE study = :study AND kind = 'trial' AND (
                        NOT mirrored OR state <> 'running' AND EXISTS (
                            SELECT FROM hpo.epoch e WHERE e.job = job.id AND NOT forwarded))
                        AND (changed_at < clock_timestamp() - make_interval(secs => :age) OR id = ANY(:also))
                    ORDER BY number
                """),
                {"study": study, "age": older_than, "also": list(also)},
            )
            return [Job(**row) for row in rows.mappings()]

    @contextmanager
    def frozen(self, job: Job) -> Iterator[bool]:
        """Hold the row still while its state is shown elsewhere; false if it has changed since `job` was read."""
        with self._transaction() as connection:
            found = connection.scalar(
                text("""
                    SELECT 1 FROM hpo.job WHERE id = :id AND fence = :fence AND state = :state
                    FOR SHARE  -- nobody may claim, renew or end it until we have shown its state
                """),
                {"id": job.id, "fence": job.fence, "state": job.state},
            )
            yield found is not None

    def set_mirrored(self, job: Job, run_id: str | None = None) -> None:
        """Note that Optuna and MLflow, in this run, show the state `job` has; if its row has another state or run by
        now, that they do not."""
        with self._transaction() as connection:
            connection.execute(
                text("""
                    UPDATE hpo.job SET mirrored = fence = :fence AND state = :state
                        AND (cast(:run AS text) IS NULL OR coalesce(run_id = :run, false))
                    WHERE id = :id
                """),
                {"id": job.id, "fence": job.fence, "state": job.state, "run": run_id},
            )

    def outbox(self, job_id: int, *, limit: int = 150) -> list[tuple[int, int, dict[str, float]]]:
        """Epochs MLflow does not have yet: (number, milliseconds since 1970, metrics)."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT number, round(extract(epoch FROM at) * 1000)::bigint, metrics
                    FROM hpo.epoch WHERE job = :job AND NOT forwarded ORDER BY number LIMIT :limit
                """),
                {"job": job_id, "limit": limit},
            )
            return [(number, at, metrics) for number, at, metrics in rows]

    def show_again(self, job: Job) -> None:
        """Let the job's state and its whole curve be shown once more, for something damaged them over there."""
        with self._transaction() as connection:
            connection.execute(text("UPDATE hpo.epoch SET forwarded = false WHERE job = :id"), {"id": job.id})
            connection.execute(text("UPDATE hpo.job SET mirrored = false WHERE id = :id"), {"id": job.id})

    def waiting_epochs(self, study: str) -> int:
        """How many epochs of the study MLflow does not have yet."""
        with self._transaction() as connection:
            return int(
                connection.scalar(
                    text("""
                        SELECT count(*) FROM hpo.epoch e JOIN hpo.job j ON j.id = e.job
                        WHERE j.study = :study AND NOT e.forwarded
                    """),
                    {"study": study},
                )
                or 0
            )

    def set_forwarded(self, job_id: int, run_id: str, numbers: Sequence[int]) -> bool:
        """Note that MLflow has these epochs in this run; false, and nothing is noted, if that is not the job's run."""
        with self._transaction() as connection:
            held = "SELECT 1 FROM hpo.job WHERE id = :job AND run_id = :run FOR SHARE"  # it is not discarded meanwhile
            if connection.scalar(text(held), {"job": job_id, "run": run_id}) is None:
                return False
            connection.execute(
                text("UPDATE hpo.epoch SET forwarded = true WHERE job = :job AND number = ANY(:numbers)"),
                {"job": job_id, "numbers": list(numbers)},
            )
            return True

    def unjudged(self, job: Job, *, limit: int) -> tuple[dict[str, Any] | None, list[tuple[int, float]]]:
        """What the pruner has made of our job so far, and the next epochs after that: (number, validation NMSE, NaN
        where it is not finite), `limit` at most. Raises LeaseLost."""
        with self._transaction() as connection:
            _hold(connection, job)
            judged = connection.scalar(text("SELECT judged FROM hpo.job WHERE id = :id"), {"id": job.id})
            rows = connection.execute(
                text("""
                    SELECT number, coalesce((metrics->>'val/nmse')::float8, 'NaN') FROM hpo.epoch
                    WHERE job = :job AND number > :judged ORDER BY number LIMIT :limit
                """),
                {"job": job.id, "judged": (judged or {}).get("epoch", 0), "limit": limit},
            )
            return judged, [(number, value) for number, value in rows]

    def at_rung(self, job: Job, rung: int) -> list[tuple[int, float]]:
        """The other trials of the job's study that have come to a rung: (number, validation NMSE there)."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT number, (judged->'rungs'->>cast(:rung AS int))::float8 FROM hpo.job
                    WHERE study = :study AND id <> :id AND jsonb_array_length(judged->'rungs') > :rung
                """),
                {"study": job.study, "id": job.id, "rung": rung},
            )
            return [(number, value) for number, value in rows]

    def finished(self, study: str, *, known: Sequence[int]) -> list[tuple[int, list[int], list[float]]]:
        """The trials that are done, but for the jobs in `known`: (job id, epochs, validation NMSE of each)."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT e.job, array_agg(e.number),
                        array_agg(coalesce((e.metrics->>'val/nmse')::float8, 'NaN'))
                    FROM hpo.epoch e JOIN hpo.job j ON j.id = e.job
                    WHERE j.study = :study AND j.kind = 'trial' AND j.state = 'done' AND NOT j.id = ANY(:known)
                    GROUP BY e.job
                """),
                {"study": study, "known": list(known)},
            )
            return [(job, numbers, values) for job, numbers, values in rows]

    def curve(self, job_id: int) -> list[tuple[int, dict[str, float]]]:
        """The stored epochs of a job: (number, metrics)."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("SELECT number, metrics FROM hpo.epoch WHERE job = :job ORDER BY number"), {"job": job_id}
            )
            return [(number, metrics) for number, metrics in rows]

    def curves(self, study: str, scores: Sequence[str]) -> dict[int, dict[str, dict[int, float]]]:
        """By job id and score: {epoch: value} of all trials of a study; a value that is not finite is left out."""
        found: dict[int, dict[str, dict[int, float]]] = {}
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT e.job, key, e.number, value::float8
                    FROM hpo.epoch e JOIN hpo.job j ON j.id = e.job, jsonb_each_text(e.metrics)
                    WHERE j.study = :study AND key = ANY(:scores) AND value IS NOT NULL ORDER BY e.job, e.number
                """),
                {"study": study, "scores": list(scores)},
            )
            for job, score, number, value in rows:
                found.setdefault(job, {name: {} for name in scores})[score][number] = value
        return found

    def epoch_seconds(self, study: str) -> dict[int, tuple[float, float]]:
        """By job id: the mean seconds an epoch took, and the best validation NMSE so far."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT e.job, avg((e.metrics->>'seconds')::float8), min((e.metrics->>'val/nmse')::float8)
                    FROM hpo.epoch e JOIN hpo.job j ON j.id = e.job WHERE j.study = :study GROUP BY e.job
                """),
                {"study": study},
            )
            return {job: (seconds, best) for job, seconds, best in rows}


CONNECT = {
    # The path is for Optuna's tables; ours are named with their schema. Whoever froze (or lost the network) between a
    # write and its commit must not keep the row: nobody could take the trial over.
    "options": "-c timezone=UTC -c search_path=public "
    # What a server or a role has as its default must not change what a lock means: what is read after it is new.
    r"-c default_transaction_isolation=read\ committed "
    f"-c idle_in_transaction_session_timeout={round(1000 * FREEZE_LIMIT)}",  # milliseconds
    "connect_timeout": 5,  # seconds
    "application_name": "hpo",
    # A network that swallows packets must not hold the thread that renews leases.
    "keepalives_idle": 5,  # seconds
    "keepalives_interval": 2,  # seconds
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,  # milliseconds
}


def require_whole(row: StudyRow) -> None:
    """Raise StudyConflict if a deletion of the study was cut short, or is under way."""
    if row.deleting:
        raise StudyConflict(f"The study {row.name} is half deleted: `hpo delete --study {row.name}` deletes the rest.")


def postgres_url(url: str) -> sqlalchemy.URL:
    """The URL with psycopg 3 as its driver. Raises ServiceError if it is no URL of a Postgres."""
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except SQLAlchemyError:
        raise ServiceError("HPO_DATABASE_URL: expected a URL like postgresql://user:password@host:5432/hpo.") from None
    if parsed.get_backend_name() != "postgresql":
        raise ServiceError(
            f"HPO_DATABASE_URL: expected a postgresql:// URL, found {parsed.get_backend_name()}://. "
            "The queue needs Postgres: its row locks are what makes a trial be recorded once."
        )
    return parsed.set(drivername="postgresql+psycopg")


def engine(url: str) -> Engine:
    """An engine for Postgres whose sessions speak UTC."""
    return sqlalchemy.create_engine(postgres_url(url), pool_pre_ping=True, connect_args=CONNECT)


def _json(value: Any) -> str:
    """JSON as Postgres takes it."""
    return json.dumps(finite(value), allow_nan=False)


def finite(value: Any) -> Any:
    """The value as every JSON takes it: a number that is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _patience(connection: Connection, seconds: float) -> None:
    """Let the server end this transaction if its client does nothing for so long (0: never); it may be frozen."""
    connection.execute(
        text("SELECT set_config('idle_in_transaction_session_timeout', :ms, true)"), {"ms": str(round(1000 * seconds))}
    )


def _change(connection: Connection, job: Job, changes: str, **values: Any) -> None:
    changed = connection.execute(
        text(f"""
            UPDATE hpo.job SET {changes}, changed_at = clock_timestamp()
            WHERE id = :id AND fence = :fence AND state = 'running'
        """),
        {"id": job.id, "fence": job.fence, **values},
    )
    if changed.rowcount == 0:
        raise LeaseLost(f"trial {job.number} of {job.study}")


def _cut(connection: Connection, job: Job, epoch: int) -> None:
    """Forget all epochs of a job after this one. MLflow forgets nothing: the run is given up, for one that will be made
    anew; and the job's checkpoint if it is of a later epoch. The caller holds the job's row."""
    log.warning(
        "trial %d of %s comes out otherwise here: its curve is cut back to epoch %d", job.number, job.study, epoch
    )
    found = {"job": job.id, "epoch": epoch}
    connection.execute(  # before the epochs, as whoever notes what MLflow has: nobody waits in a circle
        text("""
            UPDATE hpo.job SET run_id = NULL, discarded = discarded || array_remove(ARRAY[run_id], NULL),
                checkpoint = CASE WHEN cast(checkpoint->>'epoch' AS int) > :epoch THEN NULL ELSE checkpoint END,
                -- the pruner sees what comes now from the start, unless it has ended the trial
                judged = CASE WHEN cast(judged->>'epoch' AS int) > :epoch AND judged->>'ends' IS NULL
                    THEN NULL ELSE judged END,
                mirrored = false
            WHERE id = :job
        """),
        found,
    )
    connection.execute(text("DELETE FROM hpo.epoch WHERE job = :job AND number > :epoch"), found)
    connection.execute(text("UPDATE hpo.epoch SET forwarded = false WHERE job = :job"), found)


def _scores(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the trial alone."""
    return {name: value for name, value in metrics.items() if name != "seconds"}


def _lock_study(connection: Connection, study: str, how: str = "FOR NO KEY UPDATE") -> bool:
    """Held to its end by every transaction that makes a closed study of an open one, or the reverse: what one reads of
    the trials and the closing, no other changes meanwhile. Whether the study is being deleted."""
    return bool(connection.scalar(text(f"SELECT deleting FROM hpo.study WHERE name = :study {how}"), {"study": study}))


def _all_ended(connection: Connection, study: str) -> bool:
    return not connection.scalar(text(f"SELECT EXISTS (SELECT FROM hpo.job WHERE {_LEFT})"), {"study": study})


def _close_again(connection: Connection, study: str) -> None:
    """Let a study close again, and its closing have all its attempts, if trials of it have come back. The caller holds
    the study's lock."""
    connection.execute(  # what it answers for stays so (hpo.scores.standings)
        text("""
            UPDATE hpo.study SET facts = facts || '{"closed": true}' WHERE name = :study
              AND EXISTS (SELECT FROM hpo.job WHERE study = :study AND kind = 'closing' AND state = 'done')
        """),
        {"study": study},
    )
    connection.execute(
        text(f"""
            UPDATE hpo.job SET state = 'waiting', attempt = 0, result = NULL, lease_until = NULL,
                fence = fence + 1  -- whoever is closing the study right now has lost it
            WHERE study = :study AND kind = 'closing' AND state <> 'waiting'
              AND EXISTS (SELECT FROM hpo.job WHERE {_LEFT})
        """),
        {"study": study},
    )


def _hold(connection: Connection, job: Job) -> None:
    """Lock our row so that nobody takes the job over while we write. Raises LeaseLost."""
    found = connection.scalar(
        text("SELECT 1 FROM hpo.job WHERE id = :id AND fence = :fence AND state = 'running' FOR SHARE"),
        {"id": job.id, "fence": job.fence},
    )
    if found is None:
        raise LeaseLost(f"trial {job.number} of {job.study}")
