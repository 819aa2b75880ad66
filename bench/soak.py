"""Random faults and commands for as long as you like, every invariant checked after every study.

    python bench/soak.py --minutes 60 [--seed N]

tests/support/chaos.py has the faults and commands; docs/explanation/how-it-is-tested.md reports a run of an hour.
Exit code 1 if an invariant was violated: then the logs of all workers and commands stay in a folder that the program
names.
"""

import argparse
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import chaos


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long (default 10)")
    parser.add_argument(
        "--seed", type=int, default=None, help="of studies, faults and commands (default: a random one, printed)"
    )
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {seed}", flush=True)
    counts = chaos.run(folder, seconds=60 * arguments.minutes, seed=seed, report=lambda line: print(line, flush=True))
    for violation in counts.violations:
        print(f"VIOLATION: {violation}")
    if counts.violations:
        print(f"logs: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
