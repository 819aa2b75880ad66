"""What people do in a chaos run: commands of `hpo`, begun in the middle of faults, and looked at when they have ended.

Each chooses by the run's generator, and returns False if there is nothing to do it to.
"""

import time
from typing import TYPE_CHECKING

from hpo.queue import ENDED

if TYPE_CHECKING:
    from chaos import Chaos, Study

KEPT = 2  # closed studies that are not deleted
LOOK = 0.05  # seconds between two looks at the leases of a study that is to be deleted


def cancel(chaos: "Chaos") -> bool:
    study = _any(chaos, [study for study in _planned(chaos) if not study.ended() and not _busy(chaos, study, "cancel")])
    left = [job for job in study.trials() if job.state not in ENDED] if study else []
    if study is None or not left:
        return False
    job = chaos.random.choice(left)
    one = study.kind == "repeats" and chaos.random.random() < 0.5  # the point's other repeat goes on
    number = study.cancelling(job.number, sure=False)

    def then(code: int, said: str) -> None:
        study.cancelling(number, sure=code == 0 and not one)

    trial = f"{number}/{job.repeat}" if one else str(number)
    chaos.command(study.lab, "cancel", "--study", study.name, "--trial", trial, then=then)
    return True


def undo_a_cancellation(chaos: "Chaos") -> bool:
    study = _any(chaos, [study for study in _planned(chaos) if not _busy(chaos, study, "cancel")])
    gone = [job for job in study.trials() if job.state == "cancelled"] if study else []
    if study is None or not gone:
        return False
    number = study.cancelling(chaos.random.choice(gone).number, sure=False)
    chaos.command(study.lab, "cancel", "--study", study.name, "--trial", str(number), "--undo")
    return True


def stop(chaos: "Chaos") -> bool:
    study = _any(chaos, [study for study in _planned(chaos) if not study.ended() and not _busy(chaos, study, "stop")])
    if study is None:
        return False
    wait = [] if chaos.random.random() < 0.5 else ["--no-wait"]
    chaos.command(study.lab, "stop", "--study", study.name, *wait)
    return True


def retry(chaos: "Chaos") -> bool:
    """One more worker, which trains dead trials again."""
    study = _any(chaos, _planned(chaos))
    if study is None or len(study.workers) > chaos.crew:
        return False
    chaos.start(study, "--retry")
    return True


def delete_a_finished_study(chaos: "Chaos") -> bool:
    needed = [study.base for study in chaos.studies if not study.planned()]  # planning would be refused without it
    closed = [study for lab in chaos.labs for study in lab.closed]
    free = [study for study in closed if study not in needed and not _busy(chaos, study, "delete")]
    if len(closed) <= KEPT or not free:
        return False
    _delete(chaos, chaos.random.choice(free))
    return True


def _delete(chaos: "Chaos", study: "Study") -> None:
    """Begin to delete a closed study; if services were away meanwhile it is begun again."""

    def then(code: int, said: str) -> None:
        if code == 0 or f"No study '{study.name}'" in said:  # that one began again after all was done
            study.deleted = True
            study.lab.closed.remove(study)
            chaos.check_deleted(study)
            chaos.free.append(study.name)
        elif not any(each.name in said for each in _again(chaos, study)):  # they need it, and it says so
            _delete(chaos, study)

    chaos.command(study.lab, "delete", "--study", study.name, "--yes", then=then)


def _again(chaos: "Chaos", study: "Study") -> "list[Study]":
    """Studies of best points, in the same database."""
    others = [*study.lab.closed, *(each for each in chaos.studies if each.lab is study.lab)]
    return [each for each in others if each.kind == "again" and each is not study]


def delete_a_running_study(chaos: "Chaos") -> bool:
    """It is refused as long as somebody holds a lease of it."""
    study = _any(chaos, [study for study in _planned(chaos) if _held(study) and not _busy(chaos, study, "delete")])
    if study is None:
        return False
    command, held = chaos.command(study.lab, "delete", "--study", study.name, "--yes"), True
    while command.process.poll() is None:
        if study.name in [row.name for row in study.lab.queue.studies()]:
            held = _held(study)
        time.sleep(LOOK)
    if command.process.returncode == 0:
        if held:
            chaos.violation("was deleted, though a worker held a trial of it", study)
        chaos.give_up(study)
    return True


def _planned(chaos: "Chaos") -> "list[Study]":
    """Studies of this round that are planned to their end."""
    return [study for study in chaos.studies if not study.deleted and study.planned()]


def _any(chaos: "Chaos", studies: "list[Study]") -> "Study | None":
    return chaos.random.choice(studies) if studies else None


def _busy(chaos: "Chaos", study: "Study", word: str) -> bool:
    """Whether such a command on the study is under way."""
    return any(command.words[0] == word and study.name in command.words for command in chaos.commands)


def _held(study: "Study") -> bool:
    return any(job.alive for job in study.lab.queue.jobs(study.name))


COMMANDS = (cancel, undo_a_cancellation, stop, retry, delete_a_finished_study, delete_a_running_study)
