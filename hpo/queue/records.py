"""The rows of the queue as frozen records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, NamedTuple, Self

from sqlalchemy import RowMapping

from hpo.queue.closing_result import BudgetEnd, ClosingResult
from hpo.records import Record
from hpo.study import SIZES, Study, restore
from hpo.study.records import Scores, StudyFacts, TrialSpec
from hpo.text import point_text


class State(StrEnum):
    """Where a job is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    DIVERGED = "diverged"  # its numbers were no longer finite
    PRUNED = "pruned"
    DEAD = "dead"  # too many of its attempts have failed
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """No worker leads out of it."""
        return self not in (State.WAITING, State.RUNNING)

    @property
    def failed(self) -> bool:
        """It ended without a network, though nobody asked for that."""
        return self in (State.DEAD, State.DIVERGED)

    @property
    def label(self) -> str:
        """The word for people."""
        return str(self)


ENDED = tuple(state for state in State if state.ended)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Record):
    """A checkpoint of a trial, as an artifact of its run."""

    path: str  # within the run's artifacts
    sha256: str
    epoch: int
    run_id: str


@dataclass(frozen=True, kw_only=True)
class TrialResult(Record):
    """The one result of a trial that was trained to its end. Scores are of the validation split.

    Those of a refit, which has no validation split, are means over the folds of its configuration.
    """

    best_val_nmse: float
    best_val_mse: float  # unit²
    best_epoch: int  # whose network is the model
    last_val_nmse: float
    last_val_mse: float  # unit²
    validation: Scores  # of the best epoch's network
    last_validation: Scores  # of the last epoch's network
    epochs: int  # trained; fewer than planned if patience ran out
    seconds: float  # of all epochs
    target_names: tuple[str, ...]
    model_id: str  # MLflow's
    files: dict[str, str]  # SHA-256 of the model's files by relative path
    device: str | None = None  # if not the CPU
    training: Scores | None = None  # of a refit: on the images that it was trained on
    images: int | None = None  # it was trained on, if not all of the training split
    # NMSE on the validation images of each data set that its data set extends, by DataVersion.key.
    common: dict[str, float] | None = None
    parameters: int | None = None  # of its network, if the plan did not know it
    multiply_adds: int | None = None  # likewise, if its study asks for them


@dataclass(frozen=True, kw_only=True)
class Judged(Record):
    """What the pruner has made of a trial so far."""

    epoch: int = 0  # the last one it has seen
    value: float | None = None  # the validation NMSE it decided by: the lowest so far, or that of the last rung
    rungs: Sequence[float] = ()  # validation NMSE at each rung the trial has come to
    ends: str | None = None  # why the trial is to end, as decided at `epoch`


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be planned."""

    kind: str  # "trial" or "closing"
    number: int  # of the Optuna trial; -1 for the closing
    repeat: int = 0
    config: int | None = None  # position in the study's Cartesian product, for grids
    cost: float = 0.0  # multiply-adds of one image, forward
    spec: TrialSpec | None = None  # None until a sampler has chosen the configuration


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the job table."""

    id: int
    study: str
    kind: str
    number: int
    repeat: int
    config: int | None
    cost: float
    spec: TrialSpec | None
    state: State
    attempt: int  # attempts so far, without those handed back
    fence: int
    worker: str | None
    run_id: str | None
    checkpoint: Checkpoint | None
    result: TrialResult | None  # of a trial that is done
    closing: ClosingResult | None = None  # what the closing of a study decided
    reason: str | None
    mirrored: bool
    alive: bool  # running, and its lease has not expired
    epochs: int  # completed and stored
    discarded: Sequence[str] = ()  # MLflow's runs of this job that show epochs it does not have, or other ones
    changed_at: float  # seconds since 1970, server clock
    judged: Judged | None = None
    trained: str | None = None  # what the trainer of a finished training said of it, while that is not recorded

    @classmethod
    def from_row(cls, row: RowMapping) -> Self:
        """Return the record of a row; JSON becomes records here and nowhere else."""
        result, values = row["result"], dict(row)
        is_trained = row["kind"] == "trial" and result is not None and "model_id" in result
        spec = None if row["spec"] is None else TrialSpec.from_json(row["spec"])
        if spec is not None and is_trained:
            spec = replace(spec, **{name: result[name] for name in SIZES if name in result})
        return cls(
            **values
            | {
                "state": State(row["state"]),
                "spec": spec,
                "checkpoint": None if row["checkpoint"] is None else Checkpoint.from_json(row["checkpoint"]),
                "judged": None if row["judged"] is None else Judged.from_json(row["judged"]),
                "result": TrialResult.from_json(result) if is_trained else None,
                "closing": ClosingResult.from_json(result) if row["kind"] == "closing" and result is not None else None,
            }
        )

    @property
    def is_refit(self) -> bool:
        """Whether it trains the network of a configuration again after its cross-validation."""
        return self.spec is not None and self.spec.refit is not None

    @property
    def part(self) -> str:
        """Which training of its configuration it is, in words; empty of the first or only one."""
        if self.is_refit:
            return "refit"
        if self.spec is not None and self.spec.fold is not None:
            return f"fold {self.repeat}"
        return f"repeat {self.repeat}" if self.repeat else ""

    @property
    def title(self) -> str:
        """What messages call it: `trial 7 of grid`."""
        again = f", {self.part}" if self.part else ""
        return f"closing of {self.study}" if self.kind == "closing" else f"trial {self.number} of {self.study}{again}"

    @property
    def key(self) -> str:
        """What marks everything of this job in MLflow."""
        return f"{self.study}/{self.number}/{self.repeat}"

    @property
    def run_name(self) -> str:
        """The name of its MLflow run, such as `grid/22 f32 k5 d0.2 lr1e-3`."""
        assert self.spec is not None
        number = self.number if self.config is None else self.config
        return " ".join(filter(None, (f"{self.study}/{number}", point_text(self.spec.point), self.part)))

    def sizes(self, names: Sequence[str]) -> dict[str, float]:
        """Return how large its network is, by the names of the sizes; 0 where that is not known yet."""
        return {name: getattr(self.spec, name, None) or 0 for name in names}

    @property
    def verdict(self) -> str | None:
        """Why the pruner has ended it, though that may not be recorded yet."""
        return None if self.judged is None else self.judged.ends


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One row of the study table."""

    name: str
    identity: str
    canonical: dict[str, Any]  # the specification's canonical form, which the identity stands for
    facts: StudyFacts
    created_at: float = 0.0  # seconds since 1970, server clock
    stops: int = 0  # how often its workers were asked to leave
    deleting: bool = False  # a deletion has begun
    paused: str | None = None  # why nobody claims a trial of it
    priority: int = 0  # the pool claims trials of the highest one first
    stopped: bool = False  # by `hpo stop`, and not taken up again by `hpo run`: the pool leaves it alone
    trials: int | None = None  # configurations since `hpo run --trials` raised their number; None: as specified
    budget: BudgetEnd | None = None  # that has ended it while trials waited

    @cached_property
    def specification(self) -> Study:
        """The specification that was planned, with the present number of trials."""
        planned = restore(self.name, self.canonical)
        return planned if self.trials is None else replace(planned, trials=self.trials)

    def still_to_train(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the trials that its closing waits for."""
        trials = [job for job in jobs if job.kind == "trial" and not job.state.ended]
        return [job for job in trials if self.budget is None or job.state == State.RUNNING or job.is_refit]


@dataclass(frozen=True, kw_only=True)
class StudyCounts:
    """The trials of a study, counted."""

    states: Mapping[State, int] = field(default_factory=dict)  # trials, by their state
    has_begun: bool = False  # a trial has an epoch, or waits no more
    is_alive: bool = False  # a job is running, and its lease has not expired
    closing: State | None = None  # None if the study is not planned to its end
    best_val_nmse: float | None = None  # of the first of `hpo.scores.ranking.ranked`


@dataclass(frozen=True, kw_only=True)
class OpenStudy:
    """A study that the pool is to serve, as it is now."""

    name: str
    created_at: float  # seconds since 1970, server clock
    stops: int
    priority: int
    running: int  # jobs that workers hold, of whatever kind
    has_work: bool  # a job waits, or its lease has expired
    paused: str | None  # why nobody claims a trial of it; None also if its closing alone is left


class Pace(NamedTuple):
    """How fast a trial is trained, by its stored epochs."""

    seconds: float  # of an epoch, their mean
    best: float | None  # validation NMSE; None of a refit
    first: float  # when its first epoch was over, seconds since 1970, the trainer's clock
    last: float  # when its last one was


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A request that all workers of a study leave."""

    by: str
    at: float  # seconds since 1970, server clock
    is_budget: bool = False  # that of a `hpo run` is spent: else it was `hpo stop`, or a deletion

    @property
    def how(self) -> str:
        """What asked for it, in words."""
        return "budget" if self.is_budget else "hpo stop"


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What people ask of a worker."""

    leave: Stop | None  # asked of all workers of the pool
    stopped: Mapping[str, Stop]  # studies that it is to work on no more
    cancelled: Sequence[Job]  # trials that it is to drop


@dataclass(frozen=True, kw_only=True)
class PlaceFailures:
    """That workers could not work at a place lately."""

    count: int  # in a row
    reason: str  # of the last one
    seconds_left: float  # until the next one should try


@dataclass(frozen=True, kw_only=True)
class Present:
    """One row of the worker table."""

    name: str  # host:process
    trainers: int
    device: str
    stops: int  # of the study when it joined
    alive: bool  # it was seen within its lease
    here: float  # seconds since it joined
    silent: float  # seconds since it was seen
    in_pool: bool = False  # it serves every open study
    elsewhere: Mapping[str, int] = field(default_factory=dict)  # how many trials of which other studies it holds

    @property
    def trainers_left(self) -> int:
        """How many of its trainers are not busy with other studies."""
        return max(0, self.trainers - sum(self.elsewhere.values()))
