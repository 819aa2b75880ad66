"""Python code in a process of its own: its answer, and the memory it took at most."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

PATIENCE = 120  # seconds; only what hangs takes longer
BYTES = 1 if sys.platform == "darwin" else 1024  # in which getrusage counts

_FRAME = """\
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({cpu}, {cpu}))
{code}
print(json.dumps([answer, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@dataclass(frozen=True)
class Watched:
    """What a process said and needed."""

    answer: Any  # JSON-able: the variable of this name in the code
    peak: int  # bytes of memory, resident


def run(code: str, *arguments: object, cpu: int = 20) -> Watched:
    """Run code that sets `answer`; `arguments` are sys.argv[1:]. It is killed after `cpu` seconds of computing.

    A shell stands between: a process inherits the peak of the one that it was forked from.
    """
    program = [sys.executable, "-c", _FRAME.format(code=code, cpu=cpu), *map(str, arguments)]
    found = subprocess.run(
        ["sh", "-c", '"$@"; exit $?', "sh", *program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert found.returncode == 0, f"exit code {found.returncode}: {found.stderr[-3000:]}"
    answer, peak = json.loads(found.stdout.splitlines()[-1])
    return Watched(answer, peak * BYTES)
