"""How long `hpo report` takes for a study of 1,000 trials of 300 epochs: `python bench/report_of_a_thousand.py`.

A small study is really run and closed on services of its own; then copies of its trials, curves and all, fill the
database up. What is timed is the whole command, as a user starts it.
"""

import argparse
import subprocess
import sys
import time

from machine import machine, temporary_home
from sqlalchemy import text

from hpo.queue import Queue

STUDY = """
[model]
family = "cnn"
kernel_size = 3
[sampler]
name = "random"
trials = 10
[space]
filters = [2, 3, 4]
dropout = {low = 0.0, high = 0.5}
learning_rate = {low = 1e-4, high = 1e-2, log = true}
[training]
epochs = 3
"""
TRIALS = """
    INSERT INTO hpo.job (study, kind, number, spec, cost, state, run_id, result)
    SELECT study, kind, number + 10 * copy, spec, cost, state, run_id || '-' || copy,
        jsonb_set(result::jsonb, '{best_val_nmse}',
            to_jsonb((result->>'best_val_nmse')::float8 * (1 + copy / 1e3)))::json
    FROM hpo.job, generate_series(1, :copies) AS copy WHERE kind = 'trial'
"""
EPOCHS = """
    INSERT INTO hpo.epoch (job, number, at, metrics, forwarded)
    SELECT job.id, step, clock_timestamp(), (SELECT metrics FROM hpo.epoch LIMIT 1), true
    FROM hpo.job, generate_series(1, 300) AS step WHERE kind = 'trial' ON CONFLICT DO NOTHING
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="rounded down to tens (default: 1000)")
    count = parser.parse_args().trials // 10
    print(machine(), flush=True)
    with temporary_home() as home:
        hpo, folder, environment = [sys.executable, "-P", "-m", "hpo"], home.folder, home.environment
        (folder / "many.toml").write_text(STUDY)
        run = [*hpo, "run", "--study", folder / "many.toml"]
        subprocess.run(run, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        queue = Queue(home.services.database_url)
        with queue.engine.begin() as connection:
            connection.execute(text(TRIALS), {"copies": count - 1})
            connection.execute(text(EPOCHS))
        queue.close()
        begin = time.monotonic()
        report = [*hpo, "report", "-o", folder / "report"]
        subprocess.run(report, env=environment, check=True, stdout=subprocess.DEVNULL)
        print(f"A report of {10 * count} trials of 300 epochs: {time.monotonic() - begin:.1f} s.")


if __name__ == "__main__":
    main()
