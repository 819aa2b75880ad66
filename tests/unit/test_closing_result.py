"""The result of a closing: stored as JSON in its job's row, and read again though an earlier hpo stored it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.queue.closing_result import ClosingResult, Election

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
