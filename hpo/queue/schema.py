"""The tables of the queue, and what leads from an earlier version of them to this one."""

SCHEMA_VERSION = 11
FIRST_VERSION = 3  # of the tables that SCHEMA makes; what came later stands in MIGRATIONS alone

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

SCHEMA = (
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
    cost float8 NOT NULL DEFAULT 0,     -- multiply-adds of one image, forward; the most expensive is claimed first
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

_ATTEMPT = """
CREATE TABLE IF NOT EXISTS hpo.attempt (  -- one row for each claim; hpo.queue.attempts counts them
    job bigint NOT NULL REFERENCES hpo.job ON DELETE CASCADE,
    fence bigint NOT NULL,              -- of the claim
    host text NOT NULL,
    device text NOT NULL,               -- with the host the place: 'cpu', or the card
    began timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended timestamptz,                  -- null while it runs
    epochs int NOT NULL DEFAULT 0,      -- the last epoch finished in it
    epoch_at timestamptz,               -- when an epoch of it was stored last
    checkpoint int,                     -- epoch of the newest checkpoint committed in it
    outcome text CHECK (outcome IN ('recorded', 'handed back', 'cancelled', 'failed', 'place failed', 'out of memory',
        'lost', 'not recorded')),
    alone boolean NOT NULL DEFAULT true,      -- the trial had its card or host for itself
    forgiven boolean NOT NULL DEFAULT false,  -- before `hpo run --retry`
    reason text,
    PRIMARY KEY (job, fence)
);
DO $$ BEGIN  -- the job's row had their number alone: what counted counts
    IF EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'hpo.job'::regclass AND attname = 'attempt'
               AND NOT attisdropped) THEN
        INSERT INTO hpo.attempt (job, fence, host, device, began, ended, outcome, reason)
        SELECT id, fence - attempt + nth, coalesce(split_part(worker, ':', 1), ''), '', changed_at,
            CASE WHEN nth = attempt AND state = 'running' THEN NULL ELSE changed_at END,
            CASE WHEN nth < attempt OR state IN ('waiting', 'dead') THEN 'failed' WHEN state = 'running' THEN NULL
                WHEN state = 'cancelled' THEN 'cancelled' ELSE 'recorded' END,
            CASE WHEN nth = attempt THEN reason ELSE 'before attempts were stored' END
        FROM hpo.job, generate_series(1, attempt) AS nth;
        ALTER TABLE hpo.job DROP COLUMN attempt;
    END IF;
END $$;
ALTER TABLE hpo.study ADD COLUMN IF NOT EXISTS paused text,  -- why nobody claims a trial of it; null: not paused
    ADD COLUMN IF NOT EXISTS resumed_at timestamptz;         -- failures before that do not pause it again
CREATE TABLE IF NOT EXISTS hpo.place (  -- where workers failed, since the last one that could work there
    study text NOT NULL REFERENCES hpo.study ON DELETE CASCADE,
    host text NOT NULL,
    device text NOT NULL,
    failures int NOT NULL,              -- in a row
    failed_at timestamptz NOT NULL,
    reason text NOT NULL,
    PRIMARY KEY (study, host, device)
);
"""

_CLAIMS = """
-- Claims read a few rows of each index, however many trials a study has.
ALTER TABLE hpo.job ADD COLUMN IF NOT EXISTS failures int NOT NULL DEFAULT 0;  -- of its attempts, not forgiven
UPDATE hpo.job SET failures = counted.failures FROM (
    SELECT job, count(*) AS failures FROM hpo.attempt
    WHERE NOT forgiven AND outcome IN ('failed', 'out of memory') GROUP BY job
) AS counted WHERE job.id = counted.job;
CREATE INDEX IF NOT EXISTS job_claim ON hpo.job (study, (checkpoint IS NULL), failures, cost DESC, number)
    WHERE state = 'waiting';
ALTER TABLE hpo.attempt ADD COLUMN IF NOT EXISTS study text;  -- the job's
UPDATE hpo.attempt SET study = job.study FROM hpo.job WHERE job.id = attempt.job;
ALTER TABLE hpo.attempt ALTER COLUMN study SET NOT NULL;
CREATE INDEX IF NOT EXISTS attempt_ended ON hpo.attempt (study, ended);
CREATE INDEX IF NOT EXISTS attempt_failed ON hpo.attempt (study, ended)
    WHERE outcome IN ('failed', 'out of memory', 'lost', 'not recorded');
"""

# What leads from a version to the next one; new tables go the same way from FIRST_VERSION on.
MIGRATIONS = {
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
    4: _ATTEMPT,
    5: _CLAIMS,
    # what the trainer of a finished training said of it, until it is recorded
    6: "ALTER TABLE hpo.job ADD COLUMN IF NOT EXISTS trained text",
    # arrays of the validation split, which are too long for the row that listings read (hpo.queue.validation)
    7: """
    CREATE TABLE IF NOT EXISTS hpo.validation (
        job bigint NOT NULL REFERENCES hpo.job ON DELETE CASCADE,
        name text NOT NULL,
        shape int[] NOT NULL,
        numbers bytea NOT NULL,             -- float64, little endian, row by row
        PRIMARY KEY (job, name)
    );
    ALTER TABLE hpo.validation ALTER numbers SET STORAGE EXTERNAL;  -- such numbers cannot be compressed
    """,
    # Workers of the pool have no study of their own. A study that was stopped is theirs after the next `hpo run` of it.
    8: """
    ALTER TABLE hpo.study ADD COLUMN IF NOT EXISTS priority int NOT NULL DEFAULT 0,  -- the highest one comes first
        ADD COLUMN IF NOT EXISTS stopped boolean NOT NULL DEFAULT false;  -- by `hpo stop`: the pool leaves it alone
    UPDATE hpo.study SET stopped = true WHERE stops > 0;
    ALTER TABLE hpo.worker ALTER COLUMN study DROP NOT NULL,
        ADD COLUMN IF NOT EXISTS stopped_at timestamptz, ADD COLUMN IF NOT EXISTS stopped_by text;
    """,
    # `trials` of `hpo run --trials`: how many configurations are planned since then; null: as many as specified.
    # `budget`: which budget ended the study while trials waited, and at what; null: none
    9: "ALTER TABLE hpo.study ADD COLUMN IF NOT EXISTS trials int, ADD COLUMN IF NOT EXISTS budget jsonb",
    # How often the pool was asked to leave: workers that were handed in to a cluster before do, whenever they start.
    10: """
    ALTER TABLE hpo.schema ADD COLUMN IF NOT EXISTS pool_stops int NOT NULL DEFAULT 0,
        ADD COLUMN IF NOT EXISTS pool_stopped_at timestamptz, ADD COLUMN IF NOT EXISTS pool_stopped_by text;
    """,
}

# After a backup's rows, whatever version's they are: running jobs wait, no attempt counted, and nobody works, for all
# workers stayed with the original. Those of them that come upon this database hold fences still to be given out here.
GIVE_ALL_BACK = """
UPDATE hpo.job SET fence = fence + 1000000 WHERE state IN ('waiting', 'running');
DO $$ BEGIN
    IF to_regclass('hpo.attempt') IS NULL THEN
        UPDATE hpo.job SET attempt = attempt - 1 WHERE state = 'running';
    ELSE
        UPDATE hpo.attempt SET ended = clock_timestamp(), outcome = 'handed back',
            reason = 'its worker stayed with the original'
        WHERE ended IS NULL;
    END IF;
END $$;
UPDATE hpo.job SET state = 'waiting', reason = 'its worker stayed with the original',
    lease_until = NULL, mirrored = false, changed_at = clock_timestamp()
WHERE state = 'running';
DO $$ BEGIN
    IF to_regclass('hpo.worker') IS NOT NULL THEN DELETE FROM hpo.worker; END IF;
END $$;
"""
