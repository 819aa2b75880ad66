"""What a study promoted and why, in sentences."""

from hpo.queue import Job, State
from hpo.queue.closing_result import BudgetEnd, ClosingEntry, ClosingResult, Election
from hpo.report import versions
from hpo.report.words import number
from hpo.text import counted, score_text
from models.metrics import DESCRIPTORS

GAINED = {
    "mean": "the mean of the training labels",
    "volume fraction": "a cubic in the volume fraction",
    DESCRIPTORS: "ridge on descriptors of the image",
}
NOTES = {  # of a verdict, on a registered version
    "not distinguishable from the mean": "on the validation split the mean of the training labels predicts as well, "
    "as far as can be told",
    "below volume fraction": "a cubic polynomial in the volume fraction predicts better than this model",
    "not distinguishable from the volume fraction": "on the validation split a cubic polynomial in the volume fraction "
    "predicts as well, as far as can be told",
    "below descriptors": "ridge on descriptors of the image predicts better than this model",
    "not distinguishable from the descriptors": "on the validation split ridge on descriptors of the image predicts as "
    "well, as far as can be told",
}


def sentences(study: str, ended: ClosingResult | None, close: Job | None, *, is_forced: bool = False) -> list[str]:
    """Return sentences on what was promoted and why.

    `close`: the study's closing, if the election is the one that it led to. `is_forced`: the best version may be
    champion, whatever it gains over the mean predictor.
    """
    if ended is None:
        state = "not closed yet" if close is None or close.state != State.DEAD else f"closing failed: {close.reason}"
        return [f"Nothing promoted: {state}."]
    winner, election = ended.winner, ended.election
    if winner is None:
        return [f"Nothing promoted: {ended.reason}."]
    if winner.version is None:
        why = f"Nothing promoted: config {number(winner)} is the best, but {ended.reason}."
        return [why, *versions.sentences(ended)]
    what = f"config {number(winner)} as {ended.model_name} version {winner.version}"
    is_doubtful = winner.verdict == "not distinguishable from the mean" and not is_champion(ended)
    done = "Registered, but not promoted" if is_doubtful else "Promoted"
    lines = [f"{done}: {what}; {ended.reason} (validation NMSE).", *gains(winner)]
    if is_doubtful and not is_forced:
        stays = "No version is @champion" if election is None or election.champion is None else _stays(ended, election)
        lines += [f"{stays}. `hpo promote --study {study} --force` lets this one stand for election all the same."]
        lines += versions.sentences(ended)
    elif is_doubtful and close is not None:
        now = f"`hpo promote --study {study}` says which version is @champion now"
        lines.append(f"`hpo promote --force` lets it stand for election all the same: {now}.")
    elif election is None or election.champion is None:
        lines.append("No version stands for election as @champion: were they deleted in MLflow, or are they damaged?")
    else:
        lines += [_champion(winner, ended, election), *versions.sentences(ended)]
    if winner.weights == "not pretrained":
        lines.append("Note: its backbone is not pretrained; the version is tagged so.")
    if winner.verdict in ("below volume fraction", "below descriptors"):
        lines.append(f"Note: {NOTES[winner.verdict]}; the version is tagged so.")
    return lines


def _stays(ended: ClosingResult, election: Election) -> str:
    """Return the beginning of a sentence: the champion is of another study."""
    where = f"{election.champion_model} " if election.champion_model not in (None, ended.model_name) else ""
    return f"@champion stays {where}version {election.champion}, of the study {election.champion_study}"


def _champion(winner: ClosingEntry, ended: ClosingResult, election: Election) -> str:
    """Return a sentence on which version is @champion, and by which score."""
    own = election.champion_nmse
    mean = own if election.champion_point_nmse is None else election.champion_point_nmse
    if is_champion(ended):
        repeats = "" if mean == own else ", the mean of its point's repeats"
        return (
            f"@champion is this version: the lowest validation NMSE ({mean:.4g}{repeats}) of all studies on this data."
        )
    stays = f"{_stays(ended, election)}:"
    if election.champion_data is not None:
        return f"{stays} it was trained on {election.champion_data}."
    if mean == winner.point_nmse == own:
        return f"{stays} its validation NMSE {own:.4g} is the same, and it was there before."
    if mean == winner.point_nmse:
        return f"{stays} it is of the same point, and its own validation NMSE {own:.4g} is lower."
    if mean is not None and winner.point_nmse is not None and mean > winner.point_nmse:
        return f"{stays} with other seeds another point is better than this one, or this version is damaged or deleted."
    return f"{stays} its validation NMSE {mean:.4g} is lower."


def is_champion(ended: ClosingResult) -> bool:
    """Return whether the version that a study registered is the champion."""
    winner, election = ended.winner, ended.election
    if winner is None or election is None or election.champion is None:
        return False
    return election.champion == winner.version and election.champion_model in (None, ended.model_name)


def budget(study: str, end: BudgetEnd) -> str:
    """Return which budget ended a study, at what, and how it goes on."""
    return (
        f"Ended by {end.budget} at {end.reached}; {counted(end.left or 0, 'trial', 'wait')}. `hpo run --study {study}` "
        "trains them, and the study closes again."
    )


def gains(entry: ClosingEntry) -> list[str]:
    """Return what a winner gains over each baseline predictor on the validation split, and how certain that is."""
    sentences = []
    for name, gain in (entry.gains or {}).items():
        ends = f"95 % interval {score_text(gain.low)} to {score_text(gain.high)}"
        interval = ends if gain.low is not None else "no finite 95 % interval"
        few = "" if gain.groups is None else f" one by one, for {counted(gain.groups, 'group', 'are')} too few"
        sentences.append(
            f"Gain over {GAINED[name]}: validation NMSE {score_text(gain.gain)}, {interval} (bootstrap over "
            f"{counted(gain.drawn, gain.unit)}{few}, best of {counted(gain.trials, 'trial')})."
        )
    return sentences
