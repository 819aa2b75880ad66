"""`hpo run --study auto`: the best model that a budget can buy, for whatever data.

Usual descriptors come first, so that a champion stands after seconds; then a search of them; then networks by
successive halving; at the end the best ones, longest and with other seeds. Each step is a shipped study with settings
that follow from what was measured before. Its row says which step it is and what was spent on it, so that a later call
goes on.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from hpo import settings
from hpo.errors import StudyError
from hpo.operations.budgets import HOUR, Budget, Spending, Wishes
from hpo.operations.compute import Compute
from hpo.operations.connection import Connection
from hpo.operations.dry_run import Measured, estimate
from hpo.operations.preparing import load, ready, write_down
from hpo.operations.work import Begun, Outcome, Watch, run
from hpo.planning import networks, rounds
from hpo.planning.preparation import Plan, model_name, prepare, stored
from hpo.planning.rounds import Round, Speed
from hpo.queue import DatabaseLost, Job, Queue, State, Stop
from hpo.report import auto as pages
from hpo.report.auto import Step
from hpo.scores import ranking
from hpo.services.serving import Services
from hpo.study import Study
from hpo.study.records import AutoStep, Point
from hpo.text import toml_text
from models import specs, weights

CLASSICAL, HEADS, NETWORKS = "descriptors", "tl-head", "conv-search"  # the studies that it sizes
HOURS = 1.0  # of a search without --max-hours
USUAL = 3  # descriptors that a search begins with: one with each regressor
MOST_DESCRIPTORS = 45  # that are searched
SHARE = 0.1  # of the hours, for the search of descriptors
OVERHEAD = 15.0  # seconds of a step that train nothing, before one was measured
CLOSING = 10.0  # seconds in which a study closes, before one was measured
PAGE = 2.0  # seconds in which the page is written
SLACK = 1.5  # times its share that a step may take if it is not the last
INTERVAL = 2.0  # seconds between two notes of what was spent
OTHER_SEEDS = 100  # by which the seeds of each step are higher than those of the step before


@dataclass(frozen=True, kw_only=True)
class Auto:
    """What a search within a budget came to."""

    steps: list[Step]  # in their order; none if it was stopped
    hours: float  # of the budget
    is_finished: bool  # nothing is left to do in these hours; else it was stopped
    study: str  # of the champion; of the step that was stopped
    stop: Stop | None  # the request, if it was `hpo stop`
    page: Path | None  # HTML; None if it was stopped
    services: Services
    are_services_started: bool  # by this call; they keep running
    failed_gpus: Mapping[str, str]  # why each one trained no more, though others did


def auto(
    *,
    data: str | None = None,
    seed: int = 0,
    max_hours: float | None = None,
    compute: Compute | None = None,
    watch: Watch | None = None,
) -> Auto:
    """Search the best model for a data set within `max_hours`, of all calls on these data with this seed together.

    Goes on where an earlier call stopped, or with more hours. Starts the embedded services if none run. Raise UserError
    for what is wrong with data, options or services.
    """
    settings.at_least("--max-hours", max_hours, 0)
    begin, hours, watch = time.monotonic(), HOURS if max_hours is None else max_hours, watch or Watch()
    usual = load(CLASSICAL, data=data, seed=seed, overrides=[f"sampler.trials={USUAL}"])
    parts = [part for part in usual if isinstance(part, Study)]
    with ready(parts, settings.read(), watch.say) as (plans, connection, started):
        search = _Search(plans[0], connection, compute or Compute(), HOUR * hours, watch, begin)
        outcome = search.run()
        steps = search.steps() if outcome is None else []  # the database may be away: it is not asked again
        page = pages.write(connection.settings.home, connection.tracker, steps, hours) if steps else None
    return Auto(
        steps=steps,
        hours=hours,
        is_finished=outcome is None,
        study=pages.champion_study(steps) if outcome is None else outcome.row.name,
        stop=outcome.stop if outcome else None,
        page=page,
        services=connection.services,
        are_services_started=started,
        failed_gpus=search.failed_gpus,
    )


class _Search:
    """The steps on one data set with one seed; the rows of their studies are its memory."""

    def __init__(
        self, first: Plan, connection: Connection, compute: Compute, seconds: float, watch: Watch, begin: float
    ) -> None:
        self.first, self.connection, self.queue = first, connection, connection.queue
        self.compute, self.watch, self.seconds = compute, watch, seconds
        self.seed, self.model_name = first.study.seed, model_name(first.dataset, first.split)
        self.trainers = compute.count(connection.settings, 1, compute.place)
        self.clock = _Clock(begin)
        self.failed_gpus: dict[str, str] = {}

    def steps(self) -> list[Step]:
        """Return what was planned so far, in order."""
        rows = [
            row
            for row in self.queue.studies()
            if row.facts.auto is not None and not row.deleting and row.facts.model_name == self.model_name
        ]
        steps = [Step(row=row, jobs=self.queue.jobs(row.name, brief=True)) for row in rows]
        return sorted((step for step in steps if step.auto.seed == self.seed), key=lambda step: step.auto.number)

    def run(self) -> Outcome | None:
        """Work until nothing is left to do; return the outcome of the step that was stopped, None if none was."""
        while (step := self._next()) is not None:
            steps = self.steps()
            left = self.seconds - self._spent(steps) - self.clock.seconds
            limit = left - max((one.closing_seconds for one in steps if one.is_closed), default=CLOSING) - PAGE
            if not step.is_last and step.auto.number > 1 and not step.is_fruitless:
                limit = min(limit, SLACK * step.auto.share - step.seconds)
            self.watch.say(pages.headline(step, max(0.0, left)))
            meter = _Meter(self.watch, self.queue, step, self.clock)
            ended = run(
                [stored(step.row, self.first.dataset)],
                compute=self.compute,
                budget=Budget(max_hours=max(0.0, limit) / HOUR),
                watch=meter,
            ).outcomes[-1]
            meter.note()
            self.failed_gpus |= ended.failed_gpus
            if not ended.closed:
                return ended
            self.watch.say(pages.result_line(Step(row=self.queue.study(step.row.name), jobs=list(ended.jobs))))
        return None

    def _next(self) -> Step | None:
        """Return the step to work on, planned; None if nothing is left to do."""
        with self.queue.lock(f"auto.{self.model_name}.{self.seed}"):
            steps = self.steps()
            left = self.seconds - self._spent(steps) - self.clock.seconds
            if steps and (not steps[-1].is_closed or (steps[-1].is_fruitless and left > 2 * OVERHEAD)):
                return steps[-1]
            if (chosen := self._choose(steps)) is None:
                return None
            study, step = chosen
            plan = self.first if step.number == 1 else prepare(study, earlier=[self.first])
            asked = Wishes(retry=False, priority=None, trials=None, spending=Spending(Budget()))
            row = write_down(plan, self.connection, asked, say=self.watch.say)
            self.queue.amend_facts(row.name, {"auto": step.to_json()})
            return Step(row=self.queue.study(row.name), jobs=self.queue.jobs(row.name))

    def _choose(self, steps: Sequence[Step]) -> tuple[Study, AutoStep] | None:
        """Return the next study and what it is; None if what is left of the hours buys nothing more."""
        if not steps:
            share = SHARE * self.seconds
            return self.first.study, AutoStep(number=1, seed=self.seed, role="usual descriptors", share=share)
        last, left = steps[-1], self.seconds - self._spent(steps) - self.clock.seconds
        overhead = max(step.overhead(self.trainers) for step in steps[-2:])
        if len(steps) == 1 and (chosen := self._descriptors(last, overhead)) is not None:
            return chosen
        if last.row.specification.model["family"] == "descriptors" and (heads := self._heads(steps, overhead)):
            return heads
        if 0 < last.auto.round < last.auto.rounds:
            return self._halved(steps, left, overhead)
        return self._searched(steps, left, overhead)

    def _spent(self, steps: Sequence[Step]) -> float:
        return sum(step.seconds for step in steps)

    def _descriptors(self, usual: Step, overhead: float) -> tuple[Study, AutoStep] | None:
        """Return a search of descriptors, None if there is no time for it."""
        share, done = SHARE * self.seconds, [job.result.seconds for job in usual.jobs if job.result is not None]
        if not done or share < 2 * overhead:
            return None
        most = rounds.Speed(trainers=self.trainers, epoch_seconds=max(1.0, fmean(done)), batches=1, overhead=overhead)
        trials = min(MOST_DESCRIPTORS, most.trainings(share, 1))
        changes = {"sampler.trials": trials, "start": [], "learn_from": [usual.row.name]}
        step = AutoStep(number=2, seed=self.seed, role="searched descriptors", share=share)
        return self._study(CLASSICAL, changes), step

    def _heads(self, steps: Sequence[Step], overhead: float) -> tuple[Study, AutoStep] | None:
        """Return heads on the backbones whose pretrained weights are here, as many as there is time for; or None."""
        here, share = [name for name, file in weights.FILES.items() if not weights.absent(file)], SHARE * self.seconds
        if not here or share < 2 * overhead:
            return None
        try:
            timed = sorted(self._probed(self._study(HEADS, {"space.backbone": here})), key=lambda one: one.seconds)
        except StudyError:
            return None  # its images are too small
        ends = accumulate(one.seconds for one in timed)
        room = (share - overhead) * self.trainers
        fast = [one.spec.model["backbone"] for one, end in zip(timed, ends, strict=True) if end <= room]
        if not fast:
            return None
        step = AutoStep(number=len(steps) + 1, seed=self.seed, role="heads of pretrained backbones", share=share)
        return self._study(HEADS, {"space.backbone": fast}), step

    def _searched(self, steps: Sequence[Step], left: float, overhead: float) -> tuple[Study, AutoStep] | None:
        """Return the first round of a halving, None if the last one could not be longer than any before."""
        earlier = [step for step in steps if step.auto.round]
        if left <= 2 * overhead:
            return None
        if not earlier:
            chosen, epoch_seconds = self._networks(left, overhead)
        else:
            chosen, epoch_seconds = earlier[-1].auto.settings or {}, earlier[-1].epoch_seconds
        if not chosen:
            return None  # no network fits the images
        speed = self._speed(epoch_seconds, overhead)
        planned = rounds.rounds(left - self.clock.seconds, speed)
        if earlier and planned[-1].epochs <= max(step.epochs for step in earlier):
            return None
        changes = chosen | {"sampler.trials": planned[0].trainings, "training.epochs": planned[0].epochs}
        if earlier:
            best = _best([job for step in earlier for job in step.jobs])
            changes |= {"start": best[: self.trainers]} if best else {}
        study = self._study(NETWORKS, changes, len(steps))
        return study, self._step(steps, planned[0], 1, len(planned), chosen, epoch_seconds)

    def _halved(self, steps: Sequence[Step], left: float, overhead: float) -> tuple[Study, AutoStep] | None:
        """Return the next round of a halving: the best configurations of the round before, longer."""
        before = steps[-1]
        ranked = ranking.ranked(before.jobs)
        missing, chosen = before.auto.rounds - before.auto.round, before.auto.settings or {}
        if left <= overhead or not ranked:
            return None
        seconds = fmean(job.result.seconds / job.result.epochs for job in ranked[: self.trainers] if job.result)
        planned = rounds.next_round(left, missing, self._speed(seconds, overhead))
        repeats = planned.repeats if missing == 1 else 1
        points = _best(before.jobs)[: planned.trainings // repeats]
        changes = chosen | {"start": points, "sampler.trials": len(points), "training.epochs": planned.epochs}
        changes |= {"repeats": repeats}
        study = self._study(NETWORKS, changes, len(steps))
        return study, self._step(steps, planned, before.auto.round + 1, before.auto.rounds, chosen, seconds)

    def _step(
        self,
        steps: Sequence[Step],
        planned: Round,
        number: int,
        count: int,
        chosen: dict[str, Any],
        epoch_seconds: float,
    ) -> AutoStep:
        role = "searched networks" if number == 1 else "the best, longest" if number == count else "the best, longer"
        return AutoStep(
            number=len(steps) + 1,
            seed=self.seed,
            role=role,
            share=planned.seconds,
            round=number,
            rounds=count,
            settings=chosen,
            epoch_seconds=epoch_seconds,
        )

    def _study(self, name: str, changes: Mapping[str, Any], step: int = 0) -> Study:
        """Return a shipped study with changes, on these data."""
        overrides = [f"{key}={toml_text(value)}" for key, value in changes.items()]
        seed = (self.seed + OTHER_SEEDS * step) % 2**32
        (study,) = load(name, data=self.first.study.data_path, seed=seed, overrides=overrides)
        assert isinstance(study, Study)  # a shipped one
        return study

    def _speed(self, epoch_seconds: float, overhead: float) -> Speed:
        batches = max(1, round(len(self.first.split.train) / specs.TrainingSpec().batch_size))
        return Speed(trainers=self.trainers, epoch_seconds=epoch_seconds, batches=batches, overhead=overhead)

    def _networks(self, left: float, overhead: float) -> tuple[dict[str, Any], float]:
        """Return the settings of networks that fit the data and the time, and the seconds of an epoch as measured.

        Coarser and narrower networks are taken where others leave no time for two rounds. No settings: none fits.
        """
        (start,) = self._study(NETWORKS, {}).start
        options = networks.fitting(self.first.dataset, self.first.folder, start)
        for option in options:
            seconds = next(self._probed(self._study(NETWORKS, option))).epoch_seconds  # where the search starts
            speed = self._speed(seconds, overhead)
            if option is options[-1] or len(rounds.rounds(left - self.clock.seconds, speed)) > 1:
                return option, seconds
        return {}, 0.0

    def _probed(self, study: Study) -> Iterator[Measured]:
        """Yield the configurations of a study with their seconds, as measured here; of a search the first one first."""
        plan, chosen, place = prepare(study, earlier=[self.first]), self.connection.settings, self.compute.place
        yield from estimate(plan, chosen, trainers=self.trainers, place=place, say=lambda _: None).configurations


def _best(jobs: Sequence[Job]) -> list[Point]:
    """Return the configurations of finished trials, the best first, each once."""
    points: list[Point] = []
    for job in sorted((job for job in jobs if job.kind == "trial" and job.state == State.DONE), key=ranking.nmse):
        if job.spec is not None and job.spec.point not in points:
            points.append(job.spec.point)
    return points


class _Clock:
    """Time that is not yet counted to a step."""

    def __init__(self, begin: float) -> None:
        self._mark = begin

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._mark

    def take(self) -> float:
        """Return these seconds, and begin again."""
        seconds = self.seconds
        self._mark += seconds
        return seconds


class _Meter(Watch):
    """Tells a caller's watch of a step, and notes every few seconds what is spent on it."""

    def __init__(self, watch: Watch, queue: Queue, step: Step, clock: _Clock) -> None:
        self._watch, self._queue, self._name, self._clock = watch, queue, step.row.name, clock
        self._spent, self._next = step.seconds, 0.0

    def say(self, line: str) -> None:
        self._watch.say(line)

    def begin(self, begun: Begun) -> None:
        self._watch.begin(begun)

    def tick(self, trouble: str | None) -> None:
        self._watch.tick(trouble)
        if time.monotonic() >= self._next:
            with suppress(DatabaseLost):  # the worker says so
                self.note()
            self._next = time.monotonic() + INTERVAL

    def end(self, outcome: Outcome) -> None:
        self._watch.end(outcome)

    def note(self) -> None:
        self._spent += self._clock.take()
        self._queue.amend_facts(self._name, {"auto_seconds": self._spent})
