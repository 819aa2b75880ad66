"""Recorded runs (tests/fixtures/runs), played with a clock of their own through the product's display."""

import json
from pathlib import Path
from typing import Any

import records

from hpo.queue import Job, Pace, Present, State, StudyRow
from hpo.report.progress import Progress
from hpo.study.records import SplitScores
from models.metrics import Scores

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
BASELINES = {"mean": (0.80291, 42.106, -0.0676, 0.8949), "volume fraction": (0.03562, 1.45, 0.9520, 0.1765)}


class Recorded:
    """One run; `now` is the clock that its tables are read at, in seconds since the worker joined."""

    def __init__(self, name: str) -> None:
        self.facts: dict[str, Any] = json.loads((RUNS / f"{name}.json").read_text())
        self.ended = float(self.facts["ended"])
        self.now = 0.0

    def at(self, now: float) -> Progress:
        """Return the progress as it was shown at that time."""
        self.now = now
        progress = Progress(self, self.row)  # type: ignore[arg-type]
        progress.refresh()
        return progress

    @property
    def row(self) -> StudyRow:
        trial = self._trials[0]
        canonical = records.canonical(
            space=[[name, []] for name in trial["point"]],
            training={"epochs": trial["planned"]},
            report_by=self.facts["report_by"],
            pruner={"name": "none"} | self.facts["pruner"],
        )
        predictors = {name: SplitScores(validation=_scores(*scores)) for name, scores in BASELINES.items()}
        return records.study_row(self.facts["study"], canonical=canonical, facts=records.facts(predictors=predictors))

    @property
    def _trials(self) -> list[dict[str, Any]]:
        return [job for job in self.facts["jobs"] if job["kind"] == "trial"]

    # What Progress asks the queue

    def jobs(self, study: str, *, after: float | None = None, brief: bool = False) -> list[Job]:
        return [self._job(id, job) for id, job in enumerate(self.facts["jobs"])]

    def paces(self, study: str, *, after: float | None = None) -> tuple[float, dict[int, Pace]]:
        paces = {}
        for id, job in enumerate(self.facts["jobs"]):
            times = [time for time in job["epochs"] if time <= self.now]
            if times:
                seconds = sum(job["seconds"][: len(times)]) / len(times)
                paces[id] = Pace(seconds, 0.0512, times[0], times[-1])
        return self.now, paces

    def pause(self, study: str) -> None:
        return None

    def places(self, study: str) -> dict[int, str]:
        return {}

    def workers(self, study: str) -> list[Present]:
        return [
            Present(
                name=worker["name"],
                trainers=worker["trainers"],
                device="cpu",
                stops=0,
                alive=True,
                here=self.now - worker["joined"],
                silent=0.1,
            )
            for worker in self.facts["workers"]
            if worker["joined"] <= self.now and (worker["left"] is None or self.now < worker["left"])
        ]

    def _job(self, id: int, job: dict[str, Any]) -> Job:
        past = [state for state in job["states"] if state[0] <= self.now] or job["states"][:1]
        changed_at, state = past[-1]
        spec = None
        if job["point"] is not None and job["filled"] <= self.now:
            training = {"epochs": job["planned"]}
            spec = records.spec(point=job["point"], training=training, parameters=job["parameters"])
        return Job(
            id=id,
            study=self.facts["study"],
            kind=job["kind"],
            number=job["number"],
            repeat=job["repeat"],
            config=job["config"],
            cost=job["cost"] if spec else 0.0,
            spec=spec,
            state=State(state),
            attempt=1,
            fence=1,
            worker=self.facts["workers"][0]["name"] if state == "running" else None,
            run_id=None,
            checkpoint=None,
            result=_result(job["result"]) if state == "done" and job["kind"] == "trial" else None,
            reason=job["reason"] if State(state).ended else None,
            mirrored=True,
            alive=state == "running",
            epochs=sum(time <= self.now for time in job["epochs"]),
            changed_at=changed_at,
        )


def _result(stored: dict[str, float]) -> Any:
    scores = _scores(stored["nmse"], stored["mse"], stored["r2"], stored["nrmse"])
    own = {"best_val_mse": stored["mse"], "best_epoch": stored["best_epoch"], "seconds": stored["seconds"]}
    return records.result(stored["nmse"], validation=scores, **own)


def _scores(nmse: float, mse: float, r2: float, nrmse: float) -> Scores:
    return Scores(nmse=nmse, mse=mse, r2=r2, nrmse=nrmse, mae=1.0, mape=0.1, per_target={})
