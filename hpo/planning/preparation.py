"""A study together with its data and its identity: what is found out before anything is written."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import dataset as data_sets
from data_pipeline import folds as cross_validation
from data_pipeline.checks import lacks
from data_pipeline.dataset import Dataset
from data_pipeline.findings import Finding
from data_pipeline.parts import SplitProblem
from data_pipeline.shares import training_share
from data_pipeline.split import Split
from hpo import study
from hpo.errors import StudyError
from hpo.planning.baselines import predictors
from hpo.planning.bounds import bounded, example, within_bounds
from hpo.planning.content import findings
from hpo.planning.physics import check_physics, constants
from hpo.planning.starts import Start, check_starts
from hpo.planning.weights import weights_files
from hpo.queue import Queue, StudyRow
from hpo.study import MOST_TRIALS, Study
from hpo.study.records import DataFacts, DataVersion, StudyFacts, TrialSpec, WeightsFile
from hpo.study.sizing import beyond
from hpo.study.specification import combinations
from hpo.text import point_text
from hpo.tracking import foreign, links
from models import metrics, sizes, specs

START = "start"  # a point that a search begins with
FEWEST = 4  # images that a share of the training images has


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study together with its data and its identity; nothing of it is written anywhere yet."""

    study: Study
    name: str
    folder: Path
    dataset: Dataset
    split: Split
    folds: tuple[Split, ...] = ()  # of a cross-validation
    canonical: dict[str, Any]
    identity: str
    weights: dict[str, WeightsFile]  # that its trials begin with, by what Study.pretrained gives
    starts: Mapping[str, Start] = field(default_factory=dict)  # the models that trials begin with, by name
    rows: tuple[str, ...] = ()  # where the labels of each image stand in the folder
    findings: tuple[Finding, ...] = ()  # about the data's content; errors are for the caller to raise

    @property
    def earlier_canonical(self) -> dict[str, Any] | None:
        """The canonical specification of the study that this one starts from, or whose configurations it takes."""
        source = self.canonical.get("best_of") or self.canonical.get("starts_from")
        return None if source is None else dict(source["spec"])

    @property
    def earlier(self) -> str | None:
        """The full name of that study; None without one."""
        first, canonical = self.study.follows, self.earlier_canonical
        return None if first is None or canonical is None else study.full_name(first, study.digest(canonical))

    @cached_property
    def facts(self) -> StudyFacts:
        """What the database and every worker need to know of the data."""
        data = self.dataset
        return StudyFacts(
            description=self.study.description,
            claims=self.study.claims or None,
            file=self.study.file or None,
            command=self.study.command or None,
            data=_data_facts(data, self.split, self.study.data_path),
            model_name=model_name(data, self.split),
            predictors=predictors(data, self.folds or (self.split,)),
            folds=cross_validation.digest(self.folds) if self.folds else None,
            findings=tuple(finding.text for finding in self.findings) or None,
            # only where a trainer reads the files: not when it starts from another study's networks
            starts={name: start.model for name, start in self.starts.items()} or None,
            weights=None if self.study.starts_from is not None or not self.weights else self.weights,
        )

    def specs(self, facts: StudyFacts | None = None) -> list[tuple[TrialSpec, float]]:
        """Return specification and cost of each trial of a grid, repeat after repeat (or fold); [] if a sampler
        chooses later.

        Without `facts` the networks to start from are left open.
        """
        if self.study.sampler != "grid":
            return []
        points, facts = self.study.grid(), facts or self.facts
        return [
            study.trial_spec(self.study, self.identity, facts, points[config], config=config, repeat=repeat)
            for repeat in range(self.study.trainings)
            for config in self.configs or range(len(points))
        ]

    @property
    def configs(self) -> list[int] | None:
        """The config numbers of a grid that are within the study's bounds; None if it has none."""
        is_bounded = self.study.bounds and self.study.sampler == "grid"
        return within_bounds(self.study, self.facts.data) if is_bounded else None

    def examples(self) -> list[tuple[str, TrialSpec]]:
        """Where a sampler chooses the points: those it starts from, and the ends of the space, with what they are."""
        return [(what, spec) for what, (spec, _) in self._examples()]

    def costs(self) -> list[float]:
        """Return the cost of each trial; of a search, for all of them, the mean of its examples."""
        if self.study.sampler == "grid":
            return [cost for _, cost in self.specs()]
        mean = statistics.fmean(cost for _, (_, cost) in self._examples())
        return [mean] * (self.study.trials * self.study.trainings)

    def _examples(self) -> list[tuple[str, tuple[TrialSpec, float]]]:
        points = [(START, point) for point in (self.study.best_of or self.study).start]
        points += [("smallest", self.study.corners()[0]), *(("largest", point) for point in self.study.largest())]
        if self.study.bounds:
            within = [named for named in points if not beyond(self.study, named[1], self.facts.data)]
            points = within or [("within bounds", example(self.study, self.facts.data))]
        return [
            (what, study.trial_spec(self.study, self.identity, self.facts, point, config=None))
            for what, point in points
        ]


def _data_facts(data: Dataset, parts: Split, path: str) -> DataFacts:
    return DataFacts(
        name=data.name,
        digest=data.digest,
        split=parts.digest,
        unit=data.unit,
        target_names=data.target_names,
        inputs=data.input_names or None,
        earlier=_versions(data) or None,
        image_shape=data.images.shape[1:],
        phases=constants(data),
        sizes=(len(parts.train), len(parts.validation), len(parts.test)),
        source=json.dumps({"uri": path}),
        profile=json.dumps({"num_rows": len(data.images), "num_elements": int(data.images.size)}),
    )


def _versions(data: Dataset) -> tuple[DataVersion, ...]:
    """Return the data sets that this one extends, the oldest first."""
    return tuple(DataVersion(name=one.name, digest=one.digest, split=one.split) for one in data.earlier)


def prepare(
    chosen: Study,
    *,
    trial_run: bool = False,
    earlier: Sequence[Plan] = (),
    starts: Mapping[str, Start] | None = None,
) -> Plan:
    """Load the data and find the identity. Raises DatasetError, StudyError, SpecError (no pretrained weights).

    For a trial run files of weights that are not there yet do without a digest. `earlier` plans may be on the same
    data, which are held once. `starts` are the models that trials begin with, by name.
    """
    folder = folder_of(chosen.data_path)
    same = [plan for plan in earlier if (plan.folder, plan.study.image_size) == (folder, chosen.image_size)]
    understood = None if same else data_sets.understand(folder, image_size=chosen.image_size)
    data = data_sets.the_dataset(understood) if understood else same[0].dataset
    if lacking := lacks(data):
        raise StudyError(f"{folder}: {lacking}.")
    chosen = chosen.suited(is_periodic=data.is_periodic, has_symmetries=bool(data.symmetries))
    parts, folds = data.split, _folds(chosen, folder, data)
    _check_data(chosen, folder, data)
    chosen = bounded(chosen, _data_facts(data, parts, chosen.data_path), folder)
    starts = {name: (starts or {})[name] for name in chosen.starting_models}
    check_starts(chosen, data, starts)
    weights = weights_files(chosen, trial_run=trial_run)
    canonical = chosen.canonical(
        data_digest=data.digest,
        split_digest=parts.digest,
        weights={key: file.sha256 for key, file in weights.items()},
        phases=constants(data) if chosen.needs_phases() else None,
        folds_digest=cross_validation.digest(folds) if folds else None,
        starts={name: start.model.sha256 for name, start in starts.items()},
    )
    identity = study.digest(canonical)
    name = study.full_name(chosen, identity)
    if len(name) > links.LONGEST_STUDY_NAME:
        raise StudyError(
            f"The study's name is too long: expected at most {links.LONGEST_STUDY_NAME} characters, with what "
            f"hpo puts behind the file's name, found {len(name)}: '{name}'. Nothing was made. "
            "Give the file a shorter name."
        )
    return Plan(
        study=chosen,
        name=name,
        folder=folder,
        dataset=data,
        split=parts,
        folds=folds,
        canonical=canonical,
        identity=identity,
        weights=weights,
        starts=starts,
        rows=understood.rows if understood else same[0].rows,
        findings=findings(understood) if understood else same[0].findings,
    )


def _check_data(chosen: Study, folder: Path, data: Dataset) -> None:
    """Raise StudyError if the study cannot be trained on the data set."""
    if chosen.needs_symmetries() and not data.symmetries:
        raise StudyError(
            f"{folder}: nothing is known of how the targets move when an image is flipped or transposed, which "
            'training.augmentation and model.symmetric need: set training.augmentation = "none" and, for a periodic '
            "network, model.symmetric = false. Or state them: symmetry in dataset.toml."
        )
    if chosen.needs_periodic_images() and not data.is_periodic:
        raise StudyError(
            f"{folder}: these networks, or their augmentation, let images wrap around. If these images do, add "
            'periodic = true to dataset.toml. Else set model.family = "conv", with model.padding = "data", and '
            'training.augmentation = "data".'
        )
    if chosen.needs_phases():
        check_physics(data, folder)
    _check_sizes(chosen, folder, data)
    _check_shares(chosen, folder, data)


def stored(row: StudyRow, dataset: Dataset) -> Plan:
    """Return the plan of a study that is planned already, from what the database keeps of it and its data set."""
    facts, uri = row.facts, row.facts.data.uri
    chosen = replace(
        row.specification,
        description=facts.description,
        claims=facts.claims or (),
        data_path=uri,
        file=facts.file or "",
        command=facts.command or "",
    )
    return Plan(
        study=chosen,
        name=row.name,
        folder=folder_of(uri),
        dataset=dataset,
        split=dataset.split,
        folds=_folds(chosen, folder_of(uri), dataset),
        canonical=row.canonical,
        identity=row.identity,
        weights=facts.weights or {},
        starts={name: Start(model=model, folder=None) for name, model in (facts.starts or {}).items()},
    )


def planned_row(ready: Plan, queue: Queue) -> StudyRow | None:
    """Return the row of a study that is planned to its end as it is asked for; None if there is anything to write."""
    rows = queue.studies()
    row = next((row for row in rows if row.name == ready.name), None)
    if row is None or not row.facts.planned or any(other.deleting for other in rows):
        return None
    is_same = row.identity == ready.identity and (row.facts.claims or ()) == ready.study.claims
    return row if is_same else None


def check_trials(trials: int, chosen: Study, name: str) -> None:
    """Raise StudyError unless the number of a study's configurations can be raised to `trials`."""
    if chosen.sampler in ("grid", study.BEST):
        what = "the best ones of another study" if chosen.best_of is not None else "all points of a grid"
        raise StudyError(
            f"--trials {trials}: the configurations of {name} are {what}: expected a search, whose sampler chooses "
            "more. Nothing was changed. Give a file with more values another name: it is another study."
        )
    if not chosen.trials <= trials <= MOST_TRIALS:
        raise StudyError(
            f"--trials {trials}: expected a number from {chosen.trials}, the present one of {name}, to {MOST_TRIALS}. "
            "Nothing was changed. `hpo cancel` ends single trials."
        )


def _folds(chosen: Study, folder: Path, data: Dataset) -> tuple[Split, ...]:
    """Return the folds of the study's cross-validation, none without one. Raise StudyError if they do not exist, or one
    cannot be trained on."""
    if chosen.folds is None:
        return ()
    try:
        folds = cross_validation.folds(data, chosen.folds)
    except SplitProblem as problem:
        raise StudyError(f"{folder}: {problem}") from None
    for number, parts in enumerate(folds):
        if lacking := lacks(cross_validation.with_split(data, parts)):
            raise StudyError(f"{folder}: data.folds: fold {number} of {chosen.folds}: {lacking}. Or take fewer folds.")
    return folds


def folder_of(data_path: str) -> Path:
    """Return the folder of a data set."""
    return data_sets.DEFAULT if data_path == study.DEFAULT_DATA else Path(data_path)


def _check_sizes(chosen: Study, folder: Path, data: Dataset) -> None:
    """Raise StudyError if the study can reach a network or a batch that does not fit the images."""
    shape = data.images.shape[1:]
    for point in combinations(chosen, "backbone", "trainable", "batch_size"):
        try:
            sizes.check_batches(*chosen.specifications(point), shape)
        except specs.SpecError as error:
            raise StudyError(f"{folder}: {chosen.name} at {point_text(point) or 'its one point'}: {error}") from None
    for point in chosen.largest():
        try:
            sizes.size(chosen.specifications(point)[0], shape, len(data.target_names), len(data.input_names))
        except specs.SpecError as error:
            raise StudyError(
                f"{folder}: its images do not fit {chosen.name} at {point_text(point) or 'its one point'}: "
                f"{error} Plan other networks, or other images (data.image_size)."
            ) from None


def _check_shares(chosen: Study, folder: Path, data: Dataset) -> None:
    """Raise StudyError if the smallest share of the training images that the study asks for cannot be trained on."""
    share = min(training.share for _, training in map(chosen.specifications, chosen.corners()))
    for seed in range(chosen.seed, chosen.seed + chosen.repeats if share < 1 else chosen.seed):
        part = training_share(data, data.split.train, share, seed=seed % 2**32)
        constant = np.flatnonzero(~metrics.varies(data.targets[part]))
        if len(part) < FEWEST or len(constant):
            lacking = f"{data.target_names[constant[0]]} does not vary there" if len(constant) else "they are too few"
            raise StudyError(
                f"{folder}: {chosen.name} trains on {share:g} of {len(data.split.train)} training images, which are "
                f"{len(part)} with the seed {seed}: {lacking}. Expected {FEWEST} images or more, and targets that "
                "vary: set larger shares (space.share, training.share), or bring more images."
            )


def model_name(data: Dataset, parts: Split) -> str:
    """The registered model all studies on this data, split and these targets compete for: `<data set>-<8 hex>`."""
    text = json.dumps([data.digest, parts.digest, data.target_names])
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in data.name).strip("-") or "data"
    digits = f"-{study.digest({'model': text})[:8]}"
    # Part of a database's id may follow (hpo.scores.champion.claim_model).
    return slug[: foreign.LONGEST_MODEL_NAME - len(digits) - 9] + digits
