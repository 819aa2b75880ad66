"""The result of a closing: stored as JSON in its job's row, and read again though an earlier hpo stored it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import records

from hpo.closing.descriptions import VERDICTS
from hpo.queue.closing_result import ClosingEntry, ClosingResult, Election, Gain, ScoredVersion
from hpo.report import promotion

ROWS = json.loads((Path(__file__).parent.parent / "fixtures/d43d043/plain/queue.json").read_text())["job"]
STORED = {row["study"]: row["result"] for row in ROWS if row["kind"] == "closing" and row["result"]}


@pytest.mark.parametrize("study", STORED)
def test_a_stored_result_is_written_as_it_was_read(study):
    assert part_of(ClosingResult.from_json(STORED[study]).to_json(), STORED[study]) == STORED[study]


def part_of(written, stored):
    """The keys of `written` that were stored: an earlier hpo had fewer scores."""
    if isinstance(stored, dict):
        return {key: part_of(written[key], value) for key, value in stored.items()}
    if isinstance(stored, list):
        return [part_of(*pair) for pair in zip(written, stored, strict=True)]
    return written


def test_a_result_without_a_winner_has_no_champion():
    result = ClosingResult(winner=None, reason="no trial was finished", alarms=())
    assert result.to_json() == {
        "winner": None,
        "failed": [],
        "pruned": 0,
        "reason": "no trial was finished",
        "groups": [],
        "alarms": [],
    }
    assert ClosingResult.from_json(result.to_json()).election is None


def test_no_champion_among_versions_is_stored_as_such():
    election = Election(champion=None, champion_moved=False)
    result = replace(ClosingResult(winner=None, reason="", alarms=()), election=election)
    assert result.to_json()["champion"] is None
    assert ClosingResult.from_json(result.to_json()).election.to_json() == election.to_json()


def test_keys_that_an_earlier_hpo_did_not_store_are_absent():
    entry = {"number": 1, "config": None, "point": {}, "parameters": 9, "verdict": "good", "version": 2}
    entry |= {
        part: {"nmse": 0.1, "mse": 1.0, "r2": 0.9, "nrmse": 0.3, "per_target": {}} for part in ("validation", "test")
    }
    result = ClosingResult.from_json({"winner": entry, "reason": "", "champion": 2, "champion_moved": True})
    assert result.alarms is None and result.groups == ()
    assert (result.winner.weights, result.winner.point_nmse, result.winner.unstable) == (None, None, False)
    assert result.election.champion_point_nmse is None


def test_an_empty_result_is_read():
    assert ClosingResult.from_json({}).winner is None


# What is said of it

MEAN = "not distinguishable from the mean"


def closed(*, verdict: str, champion: int | None, study: str = "luck") -> ClosingResult:
    scores = records.result(0.57).validation
    sure = Gain(gain=0.0123456, low=-0.001, high=0.025, trials=10, drawn=78, unit="image", resamples=2000, seed=0)
    entry = ClosingEntry(
        number=3, config=None, point={}, parameters=9, verdict=verdict, validation=scores, test=scores, version=2
    )
    election = Election(champion=champion, champion_moved=False, champion_study=study, champion_nmse=0.5)
    none = replace(sure, low=None, high=None, trials=1, drawn=1, unit="image group")
    entry = replace(entry, gains={"mean": sure, "volume fraction": none})
    return ClosingResult(winner=entry, reason="why", alarms=(), model_name="tiny", election=election)


def test_gains_are_stored_and_read():
    result = closed(verdict=MEAN, champion=1)
    assert ClosingResult.from_json(json.loads(json.dumps(result.to_json()))).winner.gains == result.winner.gains


def test_a_winner_that_may_be_no_better_than_the_mean_is_not_promoted():
    lines = promotion.sentences("luck", closed(verdict=MEAN, champion=None), None)
    assert lines == [
        "Registered, but not promoted: config 3 as tiny version 2; why (validation NMSE).",
        "Gain over the mean of the training labels: validation NMSE 0.01235, 95 % interval -0.001 to 0.025 "
        "(bootstrap over 78 images, best of 10 trials).",
        "Gain over a cubic in the volume fraction: validation NMSE 0.01235, no finite 95 % interval "
        "(bootstrap over 1 image group, best of 1 trial).",
        "No version is @champion. `hpo promote --study luck --force` lets this one stand for election all the same.",
    ]
    other = promotion.sentences("luck", closed(verdict=MEAN, champion=1, study="earlier"), None)
    assert other[3].startswith("@champion stays version 1, of the study earlier. `hpo promote --study luck --force`")


def test_why_an_older_champion_has_no_scores_is_said_whatever_the_winner_is():
    older = ScoredVersion(run_id="r", study="old", model="tiny", version=1, data="v0", fault="it is damaged.")
    result = replace(closed(verdict=MEAN, champion=None), tested=(older,))
    nothing = replace(result, winner=replace(result.winner, verdict="below mean", version=None))
    good = replace(closed(verdict="good", champion=2), tested=(older,))
    for ended in (result, nothing, good):
        assert promotion.sentences("luck", ended, None)[-1].endswith("of this data set: it is damaged.")


def test_what_is_said_of_a_forced_winner_does_not_ask_for_force_again():
    is_champion = closed(verdict=MEAN, champion=2)
    assert promotion.sentences("luck", is_champion, None, is_forced=True)[3].startswith("@champion is this version")
    beaten = promotion.sentences("luck", closed(verdict=MEAN, champion=1), None, is_forced=True)
    assert beaten[3] == "@champion stays version 1, of the study luck: its validation NMSE 0.5 is lower."
    earlier = closed(verdict=MEAN, champion=None)  # as the closing stored it, before it was forced
    assert promotion.sentences("luck", earlier, object(), is_forced=True)[3] == (
        "`hpo promote --force` lets it stand for election all the same: `hpo promote --study luck` says which version "
        "is @champion now."
    )


@pytest.mark.parametrize(
    ("point", "champion", "why"),
    [
        (0.6, {}, "its validation NMSE 0.5 is lower."),
        (0.5, {}, "its validation NMSE 0.5 is the same, and it was there before."),
        (0.55, {"champion_point_nmse": 0.55}, "it is of the same point, and its own validation NMSE 0.5 is lower."),
        (0.4, {}, "with other seeds another point is better than this one, or this version is damaged or deleted."),
    ],
)
def test_why_another_version_stays_champion_is_no_comparison_that_does_not_hold(point, champion, why):
    ended = closed(verdict="good", champion=1, study="earlier")
    ended = replace(ended, winner=replace(ended.winner, point_nmse=point), election=replace(ended.election, **champion))
    assert promotion.sentences("luck", ended, None)[3] == f"@champion stays version 1, of the study earlier: {why}"


@pytest.mark.parametrize("verdict", [name for name in VERDICTS if not name.endswith("mean")])
def test_a_winner_that_beats_the_mean_is_promoted(verdict):
    lines = promotion.sentences("luck", closed(verdict=verdict, champion=2), None)
    assert lines[0].startswith("Promoted: config 3 as tiny version 2") and lines[3].startswith("@champion is this")
