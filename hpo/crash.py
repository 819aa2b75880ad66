"""Steps of a trial's life at which a test lets the process die, as if the power had failed there.

Nothing happens unless HPO_CRASH_AT is set: `STEP:FILE` kills the process (SIGKILL) the first time one reaches STEP,
having made FILE, so that it happens once and a test sees that it happened.
"""

import os
import signal

STEPS = (
    # of the supervisor, for a trial
    "claimed",
    "run made",  # its run exists in MLflow, the queue does not know it yet
    "epochs stored",
    "verdict stored",  # the pruner's: the trainer goes on, and neither Optuna nor MLflow shows it
    "checkpoint uploaded",  # the queue does not know it yet
    "trained",  # the model is packaged, nobody knows it yet
    "training stored",  # the queue has the hashes of its files, nothing of it is in MLflow
    "model registered unfinished",  # in MLflow, its files not all there
    "model logged",
    "recorded",  # the result is; neither Optuna nor MLflow shows it
    "run ended",  # MLflow shows it, Optuna does not
    # of the supervisor, for the closing
    "closing claimed",
    "refits planned",  # of a cross-validation; the closing still holds its lease
    "winner scored",
    "version registered",
    "alias set",
    "champion elected",
    "study shown",  # all of the closing is done, but its result is not recorded
    "closing recorded",
    # of the trainer
    "batch",  # in the middle of an epoch after a checkpoint
    "packaging",
    "scoring",
)
DELETION = ("deletion begun", "versions deleted", "experiment deleted")  # steps of `hpo delete`


def at(step: str) -> None:
    """Die here if that is what HPO_CRASH_AT asks for."""
    wanted, _, file = os.environ.get("HPO_CRASH_AT", "").partition(":")
    if wanted != step:
        return
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
