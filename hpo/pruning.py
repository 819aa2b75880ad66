"""Pruning: Optuna's pruners, fed from the epochs the database holds.

A pruner sees a trial's validation NMSE epoch by epoch, in order, whoever trained them; what it has seen is kept in
Optuna's tables, where every worker's pruner and Optuna's own tools find it.
"""

import optuna

from hpo.queue import Job, Queue
from hpo.sampling import database
from hpo.study import Study


class Pruning:
    """Decides for the trials of one study. Every method may raise DatabaseLost: call it again later."""

    def __init__(self, queue: Queue, store: optuna.storages.RDBStorage, name: str, study: Study) -> None:
        self.queue, self.store, self.name = queue, store, name
        self.pruner = pruner(study)
        self._study: optuna.Study | None = None
        self._reasons: dict[tuple[int, int], str] = {}  # by job and fence

    def ends(self, job: Job) -> bool:
        """Show the pruner what the job has trained meanwhile; whether the trial is to end."""
        if self.pruner is None or (job.id, job.fence) in self._reasons:
            return self.pruner is not None
        with database():
            if self._study is None:
                self._study = optuna.load_study(study_name=self.name, storage=self.store)
            trial_id = self.store.get_trial_id_from_study_id_trial_number(self._study._study_id, job.number)
            last = self.store.get_trial(trial_id).last_step or 0
            for epoch, metrics in self.queue.curve(job.id):
                if epoch <= last:
                    continue
                self.store.set_trial_intermediate_value(trial_id, epoch, metrics["val/nmse"])
                if self.pruner.prune(self._study, self.store.get_trial(trial_id)):
                    self._reasons[job.id, job.fence] = f"pruned by {type(self.pruner).__name__} at epoch {epoch}"
                    return True
        return False

    def reason(self, job: Job) -> str | None:
        """Why this claim of the job ends; None if it does not."""
        return self._reasons.get((job.id, job.fence))


def pruner(study: Study) -> optuna.pruners.BasePruner | None:
    """Optuna's pruner of the study's settings, counted in epochs; None if it has none."""
    settings = study.pruner
    if settings["name"] == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=settings["startup_trials"], n_warmup_steps=settings["warmup_epochs"] + 1
        )
    if settings["name"] == "successive-halving":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=settings["min_epochs"], reduction_factor=settings["reduction_factor"]
        )
    if settings["name"] == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=settings["min_epochs"],
            max_resource=int(study.most("epochs")),
            reduction_factor=settings["reduction_factor"],
        )
    return None
