"""What a study is: a validated specification, its canonical form and its trials."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

from hpo.study import sizing
from hpo.study.claims import Claim
from hpo.study.code import Sources
from hpo.study.identity import digest
from hpo.study.names import file_name, origin, weights_key, with_digits
from hpo.study.objectives import NMSE, Bounds
from hpo.study.records import Fold, Refit, SourceTrial, StudyFacts, TrialSpec
from hpo.study.space import Choices, Interval, as_json, branches, corners, from_json, highest
from models import specs, together

NUMERICS_VERSION = 1  # raised when a change of hpo moves the numbers of an unchanged study


SAMPLERS = ("grid", "random", "tpe", "gp", "qmc")
LEARNING = ("tpe", "gp")  # samplers that look at the trials so far
MOST_TRIALS = 100_000  # of one study


BEST = "best"  # in the place of a sampler: the best configurations of an earlier study


DEFAULT_DATA = "default"

Spec = TypeVar("Spec")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A validated study. `name` is the file's; `overridden` says that something in it was replaced."""

    name: str
    overridden: bool
    description: str
    seed: int
    report_by: tuple[str, ...]  # parameters; the best trial of each of their values is scored on the test split
    data_path: str  # a folder, or "default"
    image_size: int | None  # pixels, or None: as the images are
    model: dict[str, Any]
    sampler: str
    trials: int  # how many points are planned
    multivariate: bool  # whether TPE looks at the parameters together
    start: tuple[dict[str, Any], ...]  # the first of the points, where the file gives them
    space: dict[str, Choices | Interval]
    training: dict[str, Any]
    pruner: dict[str, Any]  # its name, and all its settings
    repeats: int  # how often a configuration is trained, each time with another seed
    starts_from: "Study | None"  # whose best networks the trials begin with
    objectives: tuple[str, ...] = (NMSE,)  # that its sampler minimises; the first one decides
    bounds: Bounds = field(default_factory=dict)  # of the sizes of its networks
    folds: int | None = None  # of the cross-validation; None: the data's split validates
    learn_from: tuple[str, ...] = ()  # names of planned studies, whose finished trials its sampler knows
    best_of: "Study | None" = None  # whose best configurations are trained again
    weights_files: Mapping[str, str] = field(default_factory=dict, compare=False)  # paths of the user's, by name
    sources: Sources = field(default_factory=dict, repr=False, compare=False)  # code of the user's, where it is at hand
    claims: tuple[Claim, ...] = field(default=(), compare=False)  # that the report decides; no part of the identity
    file: str = field(default="", compare=False)  # the shipped name, or the path
    command: str = field(default="", compare=False)  # for a shell, that loads it
    _parsed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # by the values' text

    def canonical(
        self,
        *,
        data_digest: str,
        split_digest: str,
        weights: Mapping[str, str] = MappingProxyType({}),
        phases: Mapping[str, Mapping[str, float]] | None = None,
        folds_digest: str | None = None,
        starts: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Everything that determines a result, as plain data: the identity of the study.

        `weights` has the SHA-256 of the pretrained weights by what `pretrained` gives, `starts` that of each model to
        start from, `phases` the constants of the data's, `folds_digest` is that of the cross-validation's folds. What
        is not used is not named: a study that does without a setting keeps the identity it had before there was one.
        """
        used: dict[str, Any] = {}
        if self.starts_from is not None:
            first = self.starts_from.canonical(
                data_digest=data_digest, split_digest=split_digest, weights=weights, starts=starts
            )
            used["starts_from"] = {"study": with_digits(self.starts_from, digest(first)), "spec": first}
        elif self.pretrained():
            used["weights"] = {key: weights[key] for key in self.pretrained()}
        if self.best_of is not None:
            first = self.best_of.canonical(
                data_digest=data_digest,
                split_digest=split_digest,
                weights=weights,
                phases=phases,
                folds_digest=folds_digest,
                starts=starts,
            )
            used["best_of"] = {"study": with_digits(self.best_of, digest(first)), "spec": first}
        if self.starting_models:
            used["start_from"] = {name: starts[name] for name in self.starting_models}
        if self.needs_phases():
            used["phases"] = phases
        if self.is_pruned:
            used["pruner"] = self.pruner
        if self.repeats > 1:
            used["repeats"] = self.repeats
        if self.folds is not None:
            used["folds"] = {"count": self.folds, "digest": folds_digest}
        if self.bounds:
            used["bounds"] = dict(self.bounds)
        lists = {"start": self.start, "learn_from": self.learn_from, "objectives": self.objectives}
        used |= {key: list(values) for key, values in lists.items() if values and values != (NMSE,)}
        return used | {
            "data": {"digest": data_digest, "image_size": self.image_size},
            "split": split_digest,
            "seed": self.seed,
            "model": self.model,
            "sampler": {"name": self.sampler, "trials": self.trials}
            | ({"multivariate": True} if self.multivariate else {}),
            "space": [[name, as_json(parameter)] for name, parameter in self.space.items()],
            "training": self.training,
            "report_by": list(self.report_by),
            "numerics": NUMERICS_VERSION,
        }

    @property
    def follows(self) -> "Study | None":
        """The study that has to be finished before this one."""
        return self.starts_from or self.best_of

    @property
    def is_pruned(self) -> bool:
        """Whether a pruner may end its trials early."""
        return bool(self.pruner["name"] != "none")

    @property
    def trainings(self) -> int:
        """How often each configuration is trained: its repeats or folds."""
        return self.folds or self.repeats

    @property
    def part(self) -> str:
        """What one of these trainings is called."""
        return "fold" if self.folds else "repeat"

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the training images on which each best configuration of an earlier study is trained."""
        share = self.space.get("share") if self.best_of is not None else None
        return share.values if isinstance(share, Choices) else (1.0,)

    @property
    def scope(self) -> str:
        """What it plans, in words; `{}` stands for the name of the study whose best configurations it trains."""
        if self.best_of is None:
            return sizing.extent(self)
        count, parts = self.trials // len(self.shares), len(self.shares)
        best = "the best configuration of {}" if count == 1 else f"the {count} best configurations of {{}}"
        return best + (f" on {parts} shares of the training images" if parts > 1 else "")

    @property
    def columns(self) -> list[str]:
        """The params of a trial by which MLflow's list shows its configuration."""
        return [
            *self.space,
            *(["config"] if self.sampler == "grid" else []),
            *(["fold"] if self.folds else []),
            *sizing.measures(self),
        ]

    @property
    def threads(self) -> int:
        """How many cores each of its trainers uses: the most that one of its trials asks for."""
        return int(self.most("threads"))

    def most(self, key: str) -> float:
        """The largest value that a number among the training's settings takes."""
        return max(float(getattr(training, key)) for _, training in map(self.specifications, self.corners()))

    def pretrained(self) -> list[str]:
        """What this study, or the one it starts from, begins with: backbones, for torchvision's weights, and the names
        of files of the user's."""
        if self.starts_from is not None:
            return self.starts_from.pretrained()
        if all(training.start_from for _, training in map(self.specifications, self.corners())):
            return []
        weights = self.values_of("weights")
        files = [str(name) for name in weights if name not in specs.WEIGHTS]
        return [*(map(str, self.values_of("backbone")) if "imagenet" in weights else ()), *files]

    @property
    def code(self) -> list[str]:
        """The digests of the user's code that its trials run, each once."""
        return sorted({str(self.model.get("code", "")), str(self.training.get("loss_code", ""))} - {""})

    @property
    def starting_models(self) -> list[str]:
        """The names of the trained models whose weights its trials begin with, each once."""
        return sorted({training.start_from for _, training in map(self.specifications, self.corners())} - {""})

    @property
    def at_random(self) -> str:
        """That there are backbones that are not pretrained, in words; empty if there are none."""
        if self.all_at_random:
            return "Not pretrained: the backbones' weights are at random"
        return "Not all backbones are pretrained" if "none" in self.values_of("weights") else ""

    @property
    def all_at_random(self) -> bool:
        """Whether none of its backbones is pretrained."""
        return set(self.values_of("weights")) == {"none"}

    def values_of(self, key: str) -> tuple[Any, ...]:
        """The values a key of [model] takes."""
        parameter = self.space.get(key)
        if isinstance(parameter, Choices):
            return parameter.values
        return (self.model[key],) if key in self.model else ()

    def grid(self) -> list[dict[str, Any]]:
        """The grid's points in the order of their config numbers: first key slowest, last key fastest."""
        axes = [parameter.values for parameter in self.space.values() if isinstance(parameter, Choices)]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*axes)]

    def corners(self) -> list[dict[str, Any]]:
        """The points of a grid, else those at the ends of the space."""
        return self.grid() if self.sampler == "grid" else corners(self.space)

    def largest(self) -> list[dict[str, Any]]:
        """The points of a grid, else those of the highest numbers with each stride, of which an image's sides must be
        multiples: if these networks fit an image, all others do."""
        return self.grid() if self.sampler == "grid" else highest(self.space, all_of="stride")

    def specifications(self, point: Mapping[str, Any]) -> tuple[specs.ModelSpec, specs.TrainingSpec]:
        """The specifications of model and training at one point. Raise SpecError if they do not exist."""
        in_training = specs.training_keys()
        model = self.model | {key: value for key, value in point.items() if key not in in_training}
        training = self.training | {key: value for key, value in point.items() if key in in_training}
        chosen = self._once(specs.from_dict, model), self._once(specs.training_from_dict, training)
        together.check_together(*chosen)
        return chosen

    def _once(self, parse: Callable[[dict[str, Any]], Spec], values: dict[str, Any]) -> Spec:
        """Return what `parse` makes of the values. The points of a large grid share most models and trainings."""
        key = repr(values)  # tells 1 from 1.0 and True
        if key not in self._parsed:
            self._parsed[key] = parse(values)
        parsed: Spec = self._parsed[key]
        return parsed

    def trial(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's and the training's settings at one point, complete and validated."""
        model, training = self.specifications(point)
        return specs.to_dict(model), specs.training_to_dict(training)

    def needs_phases(self) -> bool:
        """Whether it can be run only where the constants of two phases are known."""
        return any(specs.physical(model) for model, _ in map(self.specifications, self.corners()))

    def needs_periodic_images(self) -> bool:
        """Whether it can be run only on images that wrap around."""
        return any(together.needs_periodic_images(*chosen) for chosen in map(self.specifications, self.corners()))

    def suited(self, *, is_periodic: bool, has_symmetries: bool) -> "Study":
        """Return the study for images that wrap around or not, and whose targets are known to move with them or not,
        where its file leaves something to the data."""
        says = {"is_periodic": is_periodic, "has_symmetries": has_symmetries}
        first, best = (study and study.suited(**says) for study in (self.starts_from, self.best_of))
        model, training = dict(self.model), dict(self.training)
        for key, (wrapped, otherwise) in specs.BY_DATA_KEYS.items():
            if model.get(key) == specs.BY_DATA:
                model[key] = wrapped if is_periodic else otherwise
        if training.get("augmentation") == specs.BY_DATA:
            training["augmentation"] = "symmetry" if has_symmetries else "shift" if is_periodic else "none"
        return replace(self, model=model, training=training, starts_from=first, best_of=best)

    def needs_symmetries(self) -> bool:
        """Whether it can be run only where it is known how the targets move with the image."""
        return any(together.needs_symmetries(*chosen) for chosen in map(self.specifications, self.corners()))


def combinations(study: Study, *keys: str) -> list[dict[str, Any]]:
    """The points of a grid, else those at the lowest ends of the space with each combination of names, and of the
    lowest numbers, that these parameters can have."""
    if study.sampler == "grid":
        return study.grid()
    ends = {key: p.values if isinstance(p, Choices) else (p.low,) for key, p in study.space.items()}
    axes = [values if key in keys else values[:1] for key, values in ends.items()]
    points = [dict(zip(ends, values, strict=True)) for values in itertools.product(*axes)]
    return [branch for point in points for branch in branches(study.space, point)]


def trial_spec(
    plan: Study,
    identity: str,
    facts: StudyFacts,
    point: dict[str, Any],
    *,
    config: int | None,
    repeat: int = 0,
    refit: Refit | None = None,
) -> tuple[TrialSpec, float]:
    """The frozen description of one trial, and its cost (multiply-adds of one image, forward).

    Repeats count the seed up; folds, and the refit after them, have one seed.
    """
    fold = None
    if plan.folds is not None and refit is None:
        fold = Fold(number=repeat, count=plan.folds, digest=facts.folds or "")
    network, _ = plan.specifications(point)
    model, training = plan.trial(point)
    best = next((source for source in facts.best_of or () if source.point == point), None)
    starts = plan.starts_from is not None
    start = (facts.starts or {}).get(training.get("start_from", ""))
    weights = "" if starts or start is not None else weights_key(model)
    size = sizing.size(network, facts.data)
    spec = TrialSpec(
        point=point,
        config=config,
        model=model,
        training=training,
        seed=plan.seed if plan.folds else (plan.seed + repeat) % 2**32,
        parameters=size.parameters,
        trainable_parameters=size.trainable,
        multiply_adds=size.forward if "multiply_adds" in sizing.measures(plan) else None,
        bounds=dict(plan.bounds) if plan.bounds and not size.parameters else None,
        starts_from=(facts.starts_from or {}).get(origin(model)) if starts else None,
        start=start,
        weights=(facts.weights or {})[weights] if weights else None,
        phases=facts.data.phases if specs.physical(network) else None,
        best_of=best and SourceTrial(study=best.study, trial=best.trial, run_id=best.run_id),
        fold=fold,
        refit=refit,
        data=facts.data.digest,
        split=facts.data.split,
        identity=identity,
        numerics=NUMERICS_VERSION,
    )
    return spec, size.multiply_adds


def restore(name: str, canonical: Mapping[str, Any]) -> Study:
    """The study that a canonical spec, as the database keeps it, stands for."""
    space = {key: from_json(value) for key, value in canonical["space"]}
    return Study(
        name=file_name(name),
        overridden="+" in name,
        description="",
        seed=canonical["seed"],
        report_by=tuple(canonical["report_by"]),
        data_path="",
        image_size=canonical["data"]["image_size"],
        model=canonical["model"],
        sampler=canonical["sampler"]["name"],
        trials=canonical["sampler"]["trials"],
        multivariate=canonical["sampler"].get("multivariate", False),
        start=tuple(canonical.get("start", ())),
        learn_from=tuple(canonical.get("learn_from", ())),
        space=space,
        training=canonical["training"],
        pruner=canonical.get("pruner", {"name": "none"}),
        repeats=canonical.get("repeats", 1),
        objectives=tuple(canonical.get("objectives", (NMSE,))),
        bounds=canonical.get("bounds", {}),
        folds=canonical["folds"]["count"] if "folds" in canonical else None,
        starts_from=_first(canonical, "starts_from"),
        best_of=_first(canonical, "best_of"),
    )


def _first(canonical: Mapping[str, Any], key: str) -> Study | None:
    """The study that this one follows."""
    earlier = canonical.get(key)
    return restore(earlier["study"], earlier["spec"]) if earlier else None
