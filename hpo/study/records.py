"""What planning finds out of a study, and the frozen description of each of its trials."""

import json
from dataclasses import dataclass
from typing import Any

from hpo.records import Record
from hpo.study.claims import Claim
from hpo.text import counted, for_markdown
from models.metrics import Scores as Scores

MOST_DOUBTS = 5  # about the data that are told of one by one
OLD, NEW = "old test images", "new test images"  # parts of the test split of a data set that extends another one
Point = dict[str, Any]  # the values of a configuration, by parameter, in the order of the study file
# Arrays of the validation split by name: a trial's own squared errors (n, k), label's unit squared; NaN: no label.
NETWORK = "network"
# Beside a closing, the squared errors of each baseline predictor by its name, and
VARIANCE = "variance of the training labels"  # (k,), label's unit squared
GROUPS = "groups"  # (n,): images of one number belong together
Phases = dict[str, dict[str, float]]  # Lamé constants in the label's unit, of the matrix and of the inclusion


@dataclass(frozen=True, kw_only=True)
class WeightsFile(Record):
    """A file of pretrained weights."""

    name: str  # in the cache of torch.hub, or of a file of the user's
    sha256: str

    @property
    def folder(self) -> str:
        """Where a file of the user's lies among the artifacts of the study's run."""
        return f"weights/{self.sha256[:16]}"


@dataclass(frozen=True, kw_only=True)
class Network(Record):
    """A finished trial of an earlier study, whose network a trial starts from."""

    study: str
    trial: int
    run_id: str
    model_id: str
    files: dict[str, str]  # SHA-256 by relative path


@dataclass(frozen=True, kw_only=True)
class StartingModel(Record):
    """A trained model whose weights trials begin with. Its files lie at the study's run."""

    name: str  # as the study asks for it: an alias, a version, a folder
    source: str  # the trial that made it, or the folder, in words
    files: dict[str, str]  # SHA-256 by name

    @property
    def folder(self) -> str:
        """Where its files lie among the artifacts of the study's run."""
        return f"start/{self.sha256[:16]}"

    @property
    def sha256(self) -> str:
        """SHA-256 of its weights."""
        return self.files["weights.safetensors"]


@dataclass(frozen=True, kw_only=True)
class SourceTrial(Record):
    """A trial of an earlier study, whose configuration a trial has."""

    study: str
    trial: int
    run_id: str
    point: Point | None = None


@dataclass(frozen=True, kw_only=True)
class LearnedTrial(Record):
    """A configuration of an earlier study, as the sampler of another one knows it."""

    study: str
    trial: int
    point: Point  # in the space of the study that learns
    nmse: float  # validation, mean over the repeats
    sizes: dict[str, float] | None = None  # of its network, where the study that learns asks for them


@dataclass(frozen=True, kw_only=True)
class Fold(Record):
    """The fold of a cross-validation whose images validate a trial."""

    number: int  # from 0
    count: int
    digest: str  # of all folds


@dataclass(frozen=True, kw_only=True)
class Refit(Record):
    """What the folds of a configuration tell of its network that is trained again on all of their images."""

    epochs: int  # the median of the folds' best epochs
    folds: int
    nmse: float  # validation, mean over the folds
    mse: float  # likewise, unit²
    deviation: float  # of the folds' NMSE
    validation: Scores  # means over the folds
    common: dict[str, float] | None = None  # means over the folds, see hpo.queue.records.TrialResult


@dataclass(frozen=True, kw_only=True)
class TrialSpec(Record):
    """Everything that determines the result of one trial."""

    point: Point
    config: int | None  # position in the study's Cartesian product, for grids
    model: dict[str, Any]
    training: dict[str, Any]
    seed: int
    parameters: int  # 0: known when it is trained, as code of the user's makes the network
    trainable_parameters: int | None = None
    multiply_adds: int | None = None  # of one image, forward, if its study asks for them; 0: as `parameters`
    bounds: dict[str, int] | None = None  # of sizes that are known only when the network is made
    starts_from: Network | None = None
    start: StartingModel | None = None
    weights: WeightsFile | None = None
    phases: Phases | None = None
    best_of: SourceTrial | None = None
    fold: Fold | None = None  # of a cross-validation
    refit: Refit | None = None  # of the network that is trained again after a cross-validation
    data: str  # digest of the data set
    split: str  # digest of the split
    identity: str  # of the study
    numerics: int

    @property
    def own_weights(self) -> WeightsFile | None:
        """The file of the user's that it begins with; it lies at the study's run."""
        return self.weights if self.weights is not None and self.weights.name == self.model["weights"] else None

    @property
    def begins_with_files(self) -> bool:
        """Whether a worker has to fetch what its network begins with."""
        return any((self.starts_from, self.start, self.own_weights))

    @property
    def epochs(self) -> int:
        """For which it is to be trained; patience may end it before."""
        return int(self.training["epochs"]) if self.refit is None else self.refit.epochs

    def params(self) -> dict[str, Any]:
        """Return what determines the result, flat, as MLflow params. The point comes first, by its own names."""
        flat = dict(self.point)
        flat |= {"config": self.config} if self.config is not None else {}
        flat |= {f"model.{name}": value for name, value in self.model.items()}
        flat |= {f"training.{name}": value for name, value in self.training.items()}
        # The file or trial that it begins with, and the trial of the same configuration.
        origins = {
            "weights": self.weights,
            "starts_from": self.starts_from,
            "best_of": self.best_of,
            "start": self.start,
        }
        for name, origin in origins.items():
            if origin is not None:
                flat |= {f"{name}.{key}": value for key, value in origin.to_json().items() if key != "files"}
        if self.starts_from is not None:
            flat["starts_from.sha256"] = self.starts_from.files["weights.safetensors"]
        flat |= {} if self.fold is None else {"fold": self.fold.number, "folds": self.fold.count}
        flat |= {} if self.refit is None else {"folds": self.refit.folds, "refit.epochs": self.refit.epochs}
        flat |= {"start.sha256": self.start.sha256} if self.start is not None else {}
        flat |= {"seed": self.seed} | ({"parameters": self.parameters} if self.parameters else {})
        flat |= {} if self.trainable_parameters is None else {"trainable_parameters": self.trainable_parameters}
        flat |= {"multiply_adds": self.multiply_adds} if self.multiply_adds else {}
        return flat | {"data": self.data, "split": self.split, "identity": self.identity, "numerics": self.numerics}


@dataclass(frozen=True, kw_only=True)
class DataVersion(Record):
    """A data set with its split; it may grow into another one."""

    name: str
    digest: str  # of pixels and labels
    split: str  # digest of the split

    @property
    def key(self) -> str:
        """What scores on its images are stored under."""
        return version_key(self.digest, self.split)


def version_key(digest: str, split: str) -> str:
    """Return what tells a data set with its split from others."""
    return f"{digest[:16]}.{split[:16]}"


@dataclass(frozen=True, kw_only=True)
class DataFacts(DataVersion):
    """The data set of a study."""

    unit: str  # of the targets
    target_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # channels, height, width
    sizes: tuple[int, ...]  # images for training, validation, test
    source: str  # JSON, as MLflow's data sets have it
    profile: str  # JSON, as MLflow's data sets have it
    phases: Phases | None = None
    sha256: str | None = None  # of the file at the study's run
    inputs: tuple[str, ...] | None = None  # names of the numbers beside the images
    earlier: tuple[DataVersion, ...] | None = None  # the data sets that it extends, the oldest first

    @property
    def uri(self) -> str:
        """Folder that the data set was read from, or `default`."""
        return str(json.loads(self.source)["uri"])

    @property
    def images(self) -> int:
        """How many there are, of all splits."""
        return int(json.loads(self.profile)["num_rows"])

    @property
    def beside(self) -> str:
        """The inputs, as words behind the targets and their unit; empty if there are none."""
        return f"; inputs beside the image: {', '.join(self.inputs)}" if self.inputs else ""


@dataclass(frozen=True, kw_only=True)
class SplitScores(Record):
    """Scores on the validation split, and on the test split where that was opened."""

    validation: Scores
    test: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class AutoStep(Record):
    """What a study is to `hpo run --study auto`, which planned it."""

    number: int  # from 1
    seed: int  # of the whole search
    role: str  # in words
    share: float  # seconds that it is to take
    round: int = 0  # of successive halving, from 1; 0: it searches no networks
    rounds: int = 0  # of this halving
    settings: dict[str, Any] | None = None  # by key of the study file: what the data and this machine decided
    epoch_seconds: float | None = None  # of the networks, as a probe measured them


@dataclass(frozen=True, kw_only=True)
class StudyFacts(Record):
    """What planning found out: ids in MLflow, data, scores of the baseline predictors, networks to start from."""

    data: DataFacts
    model_name: str  # of the registered model that its best networks compete for
    predictors: dict[str, SplitScores]  # of the baseline predictors, by name
    description: str = ""
    claims: tuple[Claim, ...] | None = None  # of its file; the report decides them
    findings: tuple[str, ...] | None = None  # what was doubtful about the data, or accepted, when it was planned
    page: str | None = None  # on images and labels: its path at the study's run
    weights: dict[str, WeightsFile] | None = None  # by weights_key, where a trainer reads them
    starts_from: dict[str, Network] | None = None  # by origin
    starts: dict[str, StartingModel] | None = None  # by name
    best_of: tuple[SourceTrial, ...] | None = None
    learned: tuple[LearnedTrial, ...] | None = None
    experiment_id: str = ""
    study_run_id: str = ""
    predictor_run_ids: dict[str, str] | None = None
    models: tuple[str, ...] | None = None  # registered models that it has versions of
    registered: bool | None = None
    closed: bool | None = None  # it has been closed once
    openings: int | None = None  # closings that opened the test split and were followed by more trials
    folds: str | None = None  # digest of the folds of its cross-validation
    forced: tuple[str, ...] | None = None  # runs whose networks may be champion, whatever they gain over the mean
    planned: bool | None = None  # to the end
    file: str | None = None  # the study file: a shipped name, or a path where it was planned
    command: str | None = None  # that planned it
    auto: AutoStep | None = None
    auto_seconds: float | None = None  # that `hpo run --study auto` has spent on it

    @property
    def doubts(self) -> list[str]:
        """What was doubtful about the data, as paragraphs of Markdown: the first five, and how many more."""
        findings = self.findings or ()
        told = [f"**Doubt about the data:** {for_markdown(doubt)}" for doubt in findings[:MOST_DOUBTS]]
        more = len(findings) - len(told)
        return [*told, f"**{counted(more, 'more doubt')} about the data.**"] if more else told
