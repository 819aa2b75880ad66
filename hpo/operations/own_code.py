"""Code of the user's: does it keep to what is expected, before a study is planned?"""

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.npz import save_npz
from hpo.errors import StudyError
from hpo.planning.preparation import Plan
from hpo.study import Study
from hpo.worker import protocol
from hpo.worker.processes import Process
from models import user

MOST = 32  # networks of a grid that are tried
PATIENCE = 120.0  # seconds for each network


@contextmanager
def at_hand(study: Study) -> Iterator[Sequence[str]]:
    """Give what a trainer needs to run the code of a study: a folder, and the digests that it may run."""
    with tempfile.TemporaryDirectory(prefix="hpo-code-") as folder:
        for digest, source in study.sources.items():
            user.write(source, Path(folder, digest))
        yield [folder, *study.sources]


def check(plan: Plan, say: Callable[[str], object]) -> None:
    """Raise StudyError, with the user's file and line, unless the study's own code keeps to what is expected.

    Two processes try it on a few images, and learn the same.
    """
    study = plan.study
    if not study.code:
        return
    say(f"Trying the code of {plan.name} on a few images …")
    specs_ = [spec for spec, _ in plan.specs()] or [spec for _, spec in plan.examples()]
    chosen = tuple(specs_[:: -(-len(specs_) // MOST)])
    with at_hand(study) as code, tempfile.TemporaryDirectory(prefix="hpo-check-") as name:
        data = Path(name, "data.npz")
        save_npz(plan.dataset, data)
        with Path(name, "log").open("wb") as log:
            children = [Process("trainer", log, code=code) for _ in range(2)]
            try:
                for number, child in enumerate(children):
                    folder = Path(name, str(number))
                    child.send(
                        protocol.Check(specs=chosen[:1] if number else chosen, data=data, folder=folder, device="cpu")
                    )
                answers = [_answer(child) for child in children]
            finally:
                for child in children:
                    child.kill()
                    child.close()
    for answer in answers:
        if isinstance(answer, str):
            raise StudyError(_message(study, answer))
    if len({answer.digest for answer in answers if not isinstance(answer, str)}) > 1:
        raise StudyError(
            _message(
                study,
                "expected the same numbers in every process, found others: draw random numbers by torch, and let "
                "nothing depend on time, environment or the order of sets.",
            )
        )


def _answer(child: Process) -> protocol.Checked | str:
    """Return the answer of a trainer, or why there is none."""
    last = time.monotonic()
    while time.monotonic() - last < PATIENCE:
        for message in child.messages():
            last = time.monotonic()
            if isinstance(message, protocol.Checked):
                return message
            if not isinstance(message, protocol.Ready | protocol.Alive):
                return str(getattr(message, "reason", type(message).__name__))
        if child.closed:
            return f"its {child.obituary()}"
        time.sleep(0.05)
    return f"expected a network that is made and trained on eight images within {PATIENCE:.0f} s, found no end"


def _message(study: Study, reason: str) -> str:
    functions = [value for value in (study.model.get("build"), study.training.get("loss")) if ":" in str(value or "")]
    folder = Path(study.file).parent if "/" in study.file else Path.cwd()
    if re.match(r"\S+\.py, line \d+", reason):
        reason = f"{folder}/{reason}"
    return f"{study.file}: {', '.join(map(str, functions)) or 'its code'}: {reason.rstrip('.')}. Nothing was planned."
