"""What the closing of a study decided, as its job stores it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from hpo.records import Record
from hpo.study.records import Point, Scores, SplitScores


def null() -> Any:
    """Return None, as the default of a field that stands in the JSON as null; an earlier version did not store it."""
    return None


@dataclass(frozen=True, kw_only=True)
class FailedTrial(Record):
    """A trial of the study that ended without a network."""

    number: int
    state: str
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Gain(Record):
    """What a network gains over a baseline predictor on the validation split (hpo.scores.gains)."""

    gain: float  # validation NMSE of the baseline predictor, less that of the network
    low: float | None = field(default_factory=null)  # ends of the 95 % interval; None: none that is finite
    high: float | None = field(default_factory=null)
    trials: int  # of which the best was selected again in each resample
    drawn: int  # images that were resampled, or groups of them
    unit: str  # "image" or "image group"
    groups: int | None = field(default_factory=null)  # of images that were resampled one by one: too few to resample
    resamples: int
    seed: int

    @property
    def is_certain(self) -> bool:
        """Whether the network is distinguishable from the baseline predictor, and better."""
        return self.low is not None and self.low > 0


@dataclass(frozen=True, kw_only=True)
class ClosingEntry(Record):
    """The best trial of a group, whose network was scored on the test split."""

    number: int
    config: int | None
    point: Point
    parameters: int
    weights: str | None = field(default_factory=null)  # where the backbone's came from; None without one
    verdict: str  # "good", "below" or "not distinguishable from the" mean or volume fraction
    validation: Scores
    test: Scores
    version: int | None  # of the registered model; None if it was not registered
    point_nmse: float | None = field(
        default_factory=null
    )  # validation NMSE, the mean over the repeats of the configuration
    point_deviation: float | None = field(default_factory=null)  # its standard deviation; None of a single repeat
    incomplete: str = ""  # which repeats the mean lacks, in words
    unstable: bool = False  # a repeat diverged
    gains: dict[str, Gain] | None = None  # by baseline predictor; None if an earlier hpo closed the study


@dataclass(frozen=True, kw_only=True)
class Compared(Record):
    """The best version of another data set of the line, beside the champion on the validation images of both."""

    study: str
    model: str
    version: int
    data: str  # its data set
    on: str | None = None  # data set whose validation images both have; None if one of them has no score there
    nmse: float | None = None  # of its network on these
    champion_nmse: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScoredVersion(Record):
    """A network on the test images of a data set that has grown: no election looks at them."""

    run_id: str
    study: str
    model: str | None = None  # registered model, of a version that was trained on an earlier data set
    version: int | None = None
    data: str  # it was trained on
    tests: dict[str, Scores] | None = None  # on the OLD images, which the earlier data set has, and the NEW ones
    fault: str | None = None  # why it could not be scored


@dataclass(frozen=True, kw_only=True)
class Election(Record):
    """The champion after the closing, among all studies on the problem."""

    champion: int | None  # number of its version; None if there is none
    champion_model: str | None = None  # registered model
    champion_moved: bool  # by this closing
    champion_study: str | None = None
    champion_nmse: float | None = None  # validation NMSE of its network
    champion_point_nmse: float | None = None  # mean over the repeats of its configuration
    champion_data: str | None = None  # the data set that it was trained on, if it is another version of the study's
    compared: tuple[Compared, ...] | None = None  # one for each other data set of the line that has a version


@dataclass(frozen=True, kw_only=True)
class BudgetEnd(Record):
    """That a budget of `hpo run` ended a study while trials waited."""

    budget: str  # the option, such as `--max-hours 1`
    reached: str  # what was reached then, in words
    left: int | None = None  # trials that were not trained to their end, when the study closed

    @property
    def asks(self) -> str:
        """What asks the workers to leave, in words."""
        return f"the budget {self.budget}"


@dataclass(frozen=True, kw_only=True)
class ClosingResult(Record):
    """The result of a closing."""

    winner: ClosingEntry | None = field(default_factory=null)  # the first of the groups; None if no trial was finished
    failed: tuple[FailedTrial, ...] = ()
    pruned: int = 0  # trials
    reason: str = ""  # why the winner was promoted, or was not
    groups: tuple[ClosingEntry, ...] = ()  # the best first
    alarms: tuple[str, ...] | None = None  # None of a study that was closed before there were any
    model_name: str | None = None  # registered model
    predictors: dict[str, SplitScores] | None = None  # scores of the baseline predictors, by name
    tested: tuple[ScoredVersion, ...] | None = None  # the champion of an earlier data set, then the winners
    openings: int | None = None  # how often the study has opened the test split, this time included; None: once
    budget: BudgetEnd | None = None  # that ended the study
    election: Election | None = None  # its fields stand among the others in the JSON

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        election: dict[str, Any] = values.pop("election", {})
        return values | election

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        election = Election.from_json(values) if "champion" in values else None
        return replace(super().from_json(values), election=election)
