"""Studies: planned, stopped, deleted."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from statistics import fmean
from typing import Any

from sqlalchemy import Connection, text

from hpo.errors import NotFound, StudyConflict
from hpo.queue.closing_result import BudgetEnd
from hpo.queue.database import Database, as_json
from hpo.queue.records import Job, NewJob, State, StudyCounts, StudyRow
from hpo.queue.rows import EXPIRED, LEFT, hold, lock_study, reopen_closing
from hpo.study import alias, conflict
from hpo.study.records import StudyFacts, TrialSpec

log = logging.getLogger("hpo")

_COUNTS = """
    SELECT study, kind, state, count(*) AS jobs,
        coalesce(bool_or(state = 'running' AND lease_until >= clock_timestamp()), false) AS is_alive,
        bool_or(state <> 'waiting' OR EXISTS (SELECT FROM hpo.epoch WHERE epoch.job = job.id)) AS has_begun
    FROM hpo.job GROUP BY study, kind, state
"""
# The scores of each study's first configuration, by the rule of hpo.scores.ranking.points.
_BEST = """
    SELECT DISTINCT ON (study) study, array_agg(score) FILTER (WHERE score IS NOT NULL) AS scores,
        bool_or(folds IS NOT NULL) AS has_folds
    FROM (
        SELECT study, number, state, CASE WHEN state = 'done' THEN (result->>'best_val_nmse')::float8 END AS score,
            (spec->'fold'->>'count')::int AS folds
        FROM hpo.job WHERE kind = 'trial' AND spec->'refit' IS NULL
    ) AS trial
    GROUP BY study, number HAVING count(score) > 0
    ORDER BY study, bool_or(state = 'diverged') OR coalesce(count(score) < max(folds), false), avg(score), number
"""


# So that the first claims use the indexes. The last statement of a transaction: two of them exclude each other.
ANALYZE = "ANALYZE hpo.job"


class Studies(Database):
    """The study table, and the planned jobs of a study."""

    def plan_lock(self, name: str) -> AbstractContextManager[object]:
        """Return the lock for planning or deleting a study, also held while one that begins with it is planned.

        Studies that would have the same alias have the same lock.
        """
        return self.lock(f"plan.{alias(name)}")

    def put_study(self, row: StudyRow) -> None:
        """Insert a study, or refresh its facts. Raises StudyConflict if the name stands for another specification."""
        with self._transaction() as connection:
            stored = connection.scalar(
                text("""
                    INSERT INTO hpo.study (name, identity, spec, facts) VALUES (:name, :identity, :spec, :facts)
                    ON CONFLICT (name) DO UPDATE SET facts = hpo.study.facts || excluded.facts
                        WHERE hpo.study.identity = excluded.identity
                    RETURNING identity
                """),
                {
                    "name": row.name,
                    "identity": row.identity,
                    "spec": as_json(row.canonical),
                    "facts": as_json(row.facts.to_json()),
                },
            )
        if stored is None:
            raise conflict(row.name, self.study(row.name).canonical, row.canonical)

    def amend_facts(self, name: str, facts: Mapping[str, Any]) -> None:
        """Add to a study's facts, or change some."""
        with self._transaction() as connection:
            connection.execute(
                text("UPDATE hpo.study SET facts = facts || cast(:facts AS jsonb) WHERE name = :name"),
                {"name": name, "facts": as_json(facts)},
            )

    def study(self, name: str) -> StudyRow:
        """Raises NotFound, naming the studies there are."""
        rows = {row.name: row for row in self.studies()}
        if name not in rows:
            names = ", ".join(rows) or "none yet"
            raise NotFound(f"No study '{name}' has been planned here. There are: {names}. `hpo run` plans one.")
        return rows[name]

    def studies(self) -> list[StudyRow]:
        """Oldest first."""
        with self._transaction() as connection:
            rows = connection.execute(
                text("""
                    SELECT name, identity, spec AS canonical, facts, stops, deleting, paused, priority, stopped, trials,
                        budget,
                        extract(epoch FROM created_at)::float8 AS created_at
                    FROM hpo.study ORDER BY study.created_at
                """)
            )
            return [
                StudyRow(
                    **row
                    | {
                        "facts": StudyFacts.from_json(row["facts"]),
                        "budget": None if row["budget"] is None else BudgetEnd.from_json(row["budget"]),
                    }
                )
                for row in map(dict, rows.mappings())
            ]

    def counts(self) -> dict[str, StudyCounts]:
        """Return the counted trials of each study that has a job."""
        with self._transaction() as connection:
            rows = connection.execute(text(_COUNTS)).all()
            best = {row.study: (fmean if row.has_folds else min)(row.scores) for row in connection.execute(text(_BEST))}
        counts: dict[str, StudyCounts] = {}
        for row in rows:
            earlier = counts.get(row.study) or StudyCounts(best_val_nmse=best.get(row.study))
            if row.kind == "closing":
                own = replace(earlier, closing=State(row.state))
            else:
                states = {**earlier.states, State(row.state): row.jobs}
                own = replace(earlier, states=states, has_begun=earlier.has_begun or row.has_begun)
            counts[row.study] = replace(own, is_alive=earlier.is_alive or row.is_alive)
        return counts

    def put_jobs(self, study: str, jobs: Iterable[NewJob], *, closing: Job | None = None) -> None:
        """Insert the jobs that are not there yet. Raise LeaseLost if another worker holds the `closing` that plans
        them."""
        with self._transaction() as connection:
            if closing is not None:
                hold(connection, closing)
            _insert(connection, study, jobs)
            connection.execute(text(ANALYZE))

    def extend(
        self,
        study: str,
        trials: int,
        jobs: Iterable[NewJob],
        *,
        also: Callable[[Connection], object] = lambda connection: None,
    ) -> None:
        """Raise the number of a study's configurations to `trials`, with their jobs, and let it close again.

        `also` plans them in Optuna's tables, in the same transaction: a kill leaves all or nothing.
        """
        with self._transaction() as connection:
            also(connection)
            lock_study(connection, study)
            _insert(connection, study, jobs)
            connection.execute(
                text("UPDATE hpo.study SET trials = :trials WHERE name = :study"), {"study": study, "trials": trials}
            )
            reopen_closing(connection, study)
            connection.execute(text(ANALYZE))

    def end_by_budget(self, study: str, end: BudgetEnd) -> bool:
        """Let no more trials be claimed, and the study close with what it has; its workers hand theirs back and leave.

        Return False, and change nothing, if it has ended so before, or if no trial is still to be trained. Raise
        DatabaseLost while a claim is under way for long: it may be frozen, and the caller has leases to renew.
        """
        with self._transaction() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '1s'"))
            lock_study(connection, study, "FOR UPDATE")  # no claim of before comes to light when the closing has begun
            ended = connection.execute(
                text(f"""
                    UPDATE hpo.study SET budget = :end, stops = stops + 1, stopped_at = clock_timestamp(),
                        stopped_by = :by
                    WHERE name = :study AND budget IS NULL
                        AND EXISTS (SELECT FROM hpo.job WHERE {LEFT} AND spec->'refit' IS NULL)
                """),
                {"study": study, "end": as_json(end.to_json()), "by": end.asks},
            )
            return ended.rowcount == 1

    def lift_budget(self, study: str) -> None:
        """Let the trials be claimed that waited when a budget ended the study, and the study close again."""
        with self._transaction() as connection:
            lock_study(connection, study)
            connection.execute(text("UPDATE hpo.study SET budget = NULL WHERE name = :study"), {"study": study})
            reopen_closing(connection, study)

    def best_complete(self, study: str) -> tuple[int, float] | None:
        """Return the configuration with the lowest mean validation NMSE among those whose repeats, or folds, are all
        done: number and NMSE."""
        with self._transaction() as connection:
            row = connection.execute(
                text("""
                    SELECT number, avg((result->>'best_val_nmse')::float8) AS nmse FROM hpo.job
                    WHERE study = :study AND kind = 'trial' AND spec->'refit' IS NULL
                    GROUP BY number HAVING bool_and(state = 'done') ORDER BY nmse, number LIMIT 1
                """),
                {"study": study},
            ).one_or_none()
            return None if row is None else (row.number, row.nmse)

    def pause(self, study: str) -> str | None:
        """Return why the study is paused; None if it is not."""
        with self._transaction() as connection:
            reason: str | None = connection.scalar(
                text("SELECT paused FROM hpo.study WHERE name = :study"), {"study": study}
            )
            return reason

    def resume(self, study: str) -> bool:
        """End the pause of a study; return whether it was paused. Earlier failures do not pause it again."""
        with self._transaction() as connection:
            resumed = connection.execute(
                text("""
                    UPDATE hpo.study SET paused = NULL, resumed_at = clock_timestamp()
                    WHERE name = :study AND paused IS NOT NULL
                """),
                {"study": study},
            )
            return resumed.rowcount == 1

    def offer(self, study: str, *, priority: int | None = None) -> None:
        """Let the pool work on a study, stopped or not; with `priority` by that one from now on."""
        with self._transaction() as connection:
            connection.execute(
                text("""
                    UPDATE hpo.study SET stopped = false, priority = coalesce(:priority, priority) WHERE name = :study
                """),
                {"study": study, "priority": priority},
            )

    def cheapest(self, study: str) -> TrialSpec | None:
        """Return the specification of the study's cheapest trial; None if no configuration is chosen yet."""
        with self._transaction() as connection:
            spec = connection.scalar(
                text(
                    "SELECT spec FROM hpo.job WHERE study = :study AND spec IS NOT NULL ORDER BY cost, number LIMIT 1"
                ),
                {"study": study},
            )
            return None if spec is None else TrialSpec.from_json(spec)

    def begin_deletion(self, name: str, *, lease: float, by: str) -> bool:
        """Let nobody claim a trial of the study from now on, and its workers leave, for it is being deleted; false, and
        nothing is changed, while a worker holds one (leases in seconds)."""
        with self._transaction() as connection:
            lock_study(connection, name, "FOR UPDATE")  # waits for claims under way
            held = connection.scalar(
                text(f"""
                    SELECT EXISTS (SELECT FROM hpo.job WHERE study = :name AND state = 'running' AND NOT ({EXPIRED}))
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
        """Forget a study and everything of it."""
        with self._transaction() as connection:
            lock_study(connection, name, "FOR UPDATE")
            jobs = text("SELECT FROM hpo.job WHERE study = :name ORDER BY id FOR UPDATE")
            connection.execute(jobs, {"name": name})  # the deletion locks them in any order
            connection.execute(text("DELETE FROM hpo.study WHERE name = :name"), {"name": name})

    def stop(self, study: str, *, by: str) -> int:
        """Ask all workers of a study that are here to leave, the pool to work on others; return how often that was
        asked by now."""
        with self._transaction() as connection:
            return int(
                connection.scalar(
                    text("""
                        UPDATE hpo.study SET stops = stops + 1, stopped_at = clock_timestamp(), stopped_by = :by,
                            stopped = true
                        WHERE name = :study RETURNING stops
                    """),
                    {"study": study, "by": by},
                )
                or 0
            )


def _insert(connection: Connection, study: str, jobs: Iterable[NewJob]) -> None:
    """Insert the jobs that are not there yet."""
    rows = [{**vars(job), "spec": job.spec and job.spec.to_json()} for job in jobs]
    connection.execute(
        text("""
            INSERT INTO hpo.job (study, kind, number, repeat, config, cost, spec)
            SELECT :study, planned.* FROM json_to_recordset(:rows)
                AS planned (kind text, number int, repeat int, config int, cost float8, spec json)
            ON CONFLICT (study, number, repeat) DO NOTHING
        """),
        {"study": study, "rows": as_json(rows)},
    )


def require_whole(row: StudyRow) -> None:
    """Raise StudyConflict if a deletion of the study was cut short, or is under way."""
    if row.deleting:
        raise StudyConflict(f"The study {row.name} is half deleted: `hpo delete --study {row.name}` deletes the rest.")
