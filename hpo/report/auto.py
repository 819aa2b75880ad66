"""A search within a budget, for people: its steps, what each of them brought, the champion, and what more time would
bring."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.queue import ENDED, Job, State, StudyRow
from hpo.queue.closing_result import ClosingResult, Election
from hpo.report import document, results, winners
from hpo.report.document import Document, Section
from hpo.report.tables import Column, Row, Table
from hpo.scores import ranking
from hpo.study.records import AutoStep
from hpo.text import counted, duration, point_text, score_text

if TYPE_CHECKING:
    from hpo.tracking.client import Tracker

HOUR = 3600.0  # seconds
FOLDER = "auto"  # of the pages, in HPO_HOME


@dataclass(frozen=True, kw_only=True)
class Step:
    """A study that a search within a budget has planned."""

    row: StudyRow
    jobs: Sequence[Job]

    @property
    def auto(self) -> AutoStep:
        """What the study is to the search."""
        assert self.row.facts.auto is not None
        return self.row.facts.auto

    @property
    def seconds(self) -> float:
        """That were spent on it."""
        return self.row.facts.auto_seconds or 0.0

    @property
    def is_last(self) -> bool:
        """Whether it is the last one of its halving."""
        return self.auto.round == self.auto.rounds > 0

    @property
    def closing(self) -> Job | None:
        return next((job for job in self.jobs if job.kind == "closing"), None)

    @property
    def is_closed(self) -> bool:
        return self.closing is not None and self.closing.state in ENDED

    @property
    def is_fruitless(self) -> bool:
        """Whether a budget ended it before any trial was finished."""
        return self.row.budget is not None and not self.done

    @property
    def result(self) -> ClosingResult | None:
        """What its closing decided; None if it is not closed."""
        return self.closing.closing if self.closing is not None else None

    @property
    def done(self) -> list[Job]:
        """Its finished trials."""
        return [job for job in self.jobs if job.kind == "trial" and job.state == State.DONE and job.result is not None]

    @property
    def nmse(self) -> float | None:
        """The validation NMSE of its best configuration, the mean over the repeats; None if no trial is done."""
        best = ranking.points(self.jobs)
        return best[0][1] if best else None

    @property
    def epochs(self) -> int:
        """Of each of its trainings."""
        return int(self.row.specification.training["epochs"])

    @property
    def epoch_seconds(self) -> float:
        """Of its trainings as they came, or as a probe measured them."""
        measured = [job.result.seconds / job.result.epochs for job in self.done if job.result is not None]
        return sum(measured) / len(measured) if measured else self.auto.epoch_seconds or 0.0

    def overhead(self, trainers: int) -> float:
        """Return the seconds of this closed step in which nothing was trained, with so many trainers."""
        trained = [job.result.seconds for job in self.done if job.result is not None]
        return max(0.0, self.seconds - max([sum(trained) / trainers, *trained], default=0.0))

    @property
    def closing_seconds(self) -> float:
        """How long a closed step took to close."""
        ends = [job.changed_at for job in self.done]
        return max(0.0, self.closing.changed_at - max(ends)) if self.closing is not None and ends else 0.0


def headline(step: Step, left: float) -> str:
    """Return what begins: the step, its study, its size, and the seconds left of the budget."""
    planned = step.row.specification
    size = counted(planned.trials, "configuration")
    size += f" of {counted(step.epochs, 'epoch')}" if step.auto.round else ""
    size += f", each with {planned.repeats} seeds" if planned.repeats > 1 else ""
    return (
        f"Step {step.auto.number}, {step.auto.role}: {size} ({step.row.name}), about {duration(step.auto.share)}; "
        f"{duration(left)} left."
    )


def result_line(step: Step) -> str:
    """Return what a closed step brought."""
    champion = _election(step)
    if step.nmse is None:
        return f"Step {step.auto.number} finished no trial: `hpo show {step.row.name}` says why."
    what = f"Step {step.auto.number}: validation NMSE {score_text(step.nmse)}"
    if champion is None or champion.champion is None:
        return f"{what}. No version is @champion yet."
    moved = (
        "is of this step" if champion.champion_study == step.row.name else f"stays that of {champion.champion_study}"
    )
    return f"{what}. @champion {moved}."


def _election(step: Step) -> Election | None:
    return step.result.election if step.result is not None else None


def steps_table(steps: Sequence[Step]) -> Table:
    """Return a row for each step: what it trained, how long it took, and its best validation score."""
    rows, best = [], math.inf
    for step in steps:
        planned, nmse = step.row.specification, step.nmse
        ranked = ranking.ranked(step.jobs)
        result = ranked[0].result if ranked else None
        gain = "" if nmse is None or not nmse < best else "first" if best == math.inf else f"{1 - nmse / best:.0%} less"
        best = min(best, math.inf if nmse is None else nmse)
        rows.append(
            Row(
                values={
                    "step": f"{step.auto.number} {step.auto.role}",
                    "study": step.row.name,
                    "trainings": f"{len(step.done)} of {planned.trials * planned.trainings}",
                    "epochs": str(step.epochs) if step.auto.round else "",
                    "time": duration(step.seconds),
                    "NMSE": nmse,
                    "R²": result.validation.r2 if result else None,
                    "error": gain or "no less",
                }
            )
        )
    columns = [Column(name=name, left=name in ("step", "study")) for name in rows[0].values] if rows else []
    return Table(title="Steps, scores on the validation split", columns=columns, rows=rows, name="steps")


def end_tables(steps: Sequence[Step]) -> list[Table]:
    """Return the steps, and the best of each closed one beside the baseline predictors, with test scores."""
    closed = [(step.row, result) for step in steps if (result := step.result) is not None and result.groups]
    return [steps_table(steps), *([winners.winners_table(closed)] if closed else [])]


def champion_study(steps: Sequence[Step]) -> str:
    """Return the name of the study whose version is @champion; of the last step if there is none."""
    election = _last_election(steps)
    return (election.champion_study if election is not None else None) or steps[-1].row.name


def _last_election(steps: Sequence[Step]) -> Election | None:
    return next((election for step in reversed(steps) if (election := _election(step)) is not None), None)


def champion_line(steps: Sequence[Step]) -> str:
    """Return which version is @champion, of which step."""
    election = _last_election(steps)
    if election is None or election.champion is None:
        return "No version is @champion yet."
    step = next((step for step in steps if step.row.name == election.champion_study), None)
    where = f", step {step.auto.number} ({step.auto.role})" if step is not None else ", which is none of these steps"
    name = election.champion_model or steps[-1].row.facts.model_name
    nmse = election.champion_point_nmse if election.champion_nmse is None else election.champion_nmse
    return (
        f"@champion is {name} version {election.champion} of {election.champion_study}{where}: validation NMSE "
        f"{score_text(nmse)}."
    )


def forecast(steps: Sequence[Step]) -> list[str]:
    """Return sentences on what twice the time would bring, from the rounds of the last halving."""
    first = max((place for place, step in enumerate(steps) if step.auto.round == 1), default=len(steps))
    halving = [(step.epochs, step.nmse, step) for step in steps[first:] if step.nmse]
    if len(halving) < 2:
        return ["What more time would bring is not known: fewer than two rounds of networks are finished."]
    (early, before, _), (late, after, last) = halving[0], halving[-1]
    slope = math.log(before / after) / math.log(late / early) if late > early else 0.0
    told = f"From {early} to {late} epochs, the lowest validation NMSE went from {before:.3g} to {after:.3g}."
    spread = _spread(last)
    if slope <= 0:
        return [told, "Longer trainings bring nothing here: more images, or other networks, would."]
    twice = after * 2**-slope
    lines = [told, f"If that goes on, trainings twice as long end at {twice:.3g}, a little more or less."]
    if spread is not None and after - twice < spread:
        lines.append(f"That gain is smaller than what two seeds differ by ({spread:.2g}): expect little.")
    return lines


def _spread(step: Step) -> float | None:
    """Return the standard deviation of the best configuration's repeats; None of a single one."""
    best = ranking.points(step.jobs)[0][0]
    return ranking.spread(ranking.repeats(step.jobs)[best.number])[1]


def sentences(steps: Sequence[Step], hours: float) -> list[str]:
    """Return what a finished search came to."""
    spent = sum(step.seconds for step in steps)
    rest = " The rest is too short for longer trainings." if spent < HOUR * hours else ""
    told = f"Finished: {duration(spent)} of {duration(HOUR * hours)} are spent.{rest}"
    return [told, champion_line(steps), *forecast(steps)]


def contents(steps: Sequence[Step], hours: float) -> Document:
    """Return the page on a search."""
    data, spent = steps[0].row.facts.data, sum(step.seconds for step in steps)
    how = [
        "Usual descriptors come first, then a search of them, then networks. Each round of networks trains a third of "
        "the configurations of the round before, three times as long. The sizes follow from measured times.",
        "Each step is a study of its own. The validation split selects; the test split was opened once for each step, "
        "for its winner alone.",
    ]
    best = ranking.ranked([job for step in steps[-1:] for job in step.jobs])
    if best and best[0].spec is not None:
        how.append(f"The best configuration of the last step: {point_text(best[0].spec.point)}.")
    commands = [f"{step.auto.number}. {step.row.facts.command or step.row.name}" for step in steps]
    return Document(
        title=f"The best model for {data.name} in {duration(HOUR * hours)}",
        summary=[
            f"{counted(len(steps), 'step')} took {duration(spent)} of {duration(HOUR * hours)}, on "
            f"{counted(data.images, 'image')}.",
            champion_line(steps),
            *forecast(steps),
        ],
        alarms=[alarm for step in steps if step.result is not None for alarm in step.result.alarms or ()],
        answers=[],
        sections=[
            Section(title="How it was found", text=how, tables=end_tables(steps)),
            Section(title="What more time would bring", text=forecast(steps)),
            Section(title="The commands of the steps", text=["Each one repeats a step without `auto`.", *commands]),
        ],
    )


def write(home: Path, tracker: "Tracker", steps: Sequence[Step], hours: float) -> Path:
    """Write the page on a search into HPO_HOME, and attach it to the run of its last study; return the page."""
    facts, seed = steps[0].row.facts, steps[0].auto.seed
    name = facts.model_name + (f"-seed-{seed}" if seed else "")
    (home / FOLDER).mkdir(parents=True, exist_ok=True)
    page, text = home / FOLDER / f"{name}.html", contents(steps, hours)
    document.write_page(text, page)
    results.attach(tracker, [steps[-1].row.facts.study_run_id], {f"{FOLDER}.html": document.html(text)})
    return page
