"""The closing of a study while this worker does it: the recorder fetches the winners, a trainer scores them."""

import logging
from functools import partial

from hpo import crash
from hpo.closing.steps import Closing
from hpo.queue import AttemptOutcome, Job
from hpo.recording.outcomes import Ended, HandedBack, Winners
from hpo.worker import protocol
from hpo.worker.children import Trainer
from hpo.worker.collaborators import Collaborators
from hpo.worker.leases import Leases

log = logging.getLogger("hpo")


class Closings:
    """Begins a closing on a free trainer and takes it to its end. Owned by the supervisor's thread."""

    def __init__(self, parts: Collaborators, leases: Leases) -> None:
        self._leases, self._recorder, self._trainers = leases, parts.recorder, parts.trainers
        self._studies, self._folder = parts.studies, parts.folder
        self._closings: dict[int, Closing] = {}  # by job

    def begin(self, trainer: Trainer, job: Job) -> None:
        log.info("closing of %s begins", job.study)
        crash.at("closing claimed")
        served = self._studies[job.study]
        trainer.reserve(job, fetches=served.data.fetches)
        closing = self._closings[job.id] = served.start_closing(job, self._folder.of(job), served.data.path)
        self._recorder.put(job, partial(_fetch, closing))

    def on_winners(self, outcome: Winners) -> None:
        trainer = self._trainers.of(outcome.job)
        if trainer is not None and outcome.job in self._leases:  # else its trainer died, and it has been given back
            self._score_next(trainer, outcome.job)

    def on_scored(self, trainer: Trainer, job: Job, message: protocol.Scored | protocol.NotScored) -> None:
        try:
            self._closings[job.id].put(message)
        except ValueError as error:
            trainer.release()
            self._leases.return_soon(job, str(error), AttemptOutcome.FAILED)
            return
        self._score_next(trainer, job)

    def _score_next(self, trainer: Trainer, job: Job) -> None:
        """Ask the trainer for the next winner's scores, or finish the closing."""
        request = self._closings[job.id].next_request()
        if request is not None:
            trainer.send(request)
            return
        trainer.release()
        self._recorder.put(job, partial(_finish, self._closings.pop(job.id)))


def _fetch(closing: Closing) -> Winners | HandedBack:
    if closing.fetch():
        return Winners(job=closing.job)
    return HandedBack(job=closing.job, reason="the winners of the cross-validation are trained again first")


def _finish(closing: Closing) -> Ended | HandedBack:
    if closing.is_overtaken():
        return HandedBack(job=closing.job, reason="a network of an earlier data set became champion: it is scored, too")
    closing.finish()
    log.info("study %s closed", closing.job.study)
    return Ended(job=closing.job, logged=False)
