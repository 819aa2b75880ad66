"""What MLflow's page of a registered version says of the data that its network was trained on."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import records
from test_answers import winner

from hpo.closing import descriptions
from hpo.queue.closing_result import ClosingEntry, ClosingResult, Election
from hpo.report import promotion
from hpo.study.records import SplitScores
from hpo.tracking import foreign

SENTENCE = "C11: 2 of 40 labels are -999, as if they were missing: 7_cell.png (row 7), 9_cell.png (row 9). [sentinels]"


def entry_of(verdict):
    scores = records.result(0.5).validation
    return ClosingEntry(
        number=0, config=0, point={}, parameters=1, verdict=verdict, validation=scores, test=scores, version=1
    )


def description(*findings, verdict="good"):
    entry = entry_of(verdict)
    split = SplitScores(validation=entry.validation, test=entry.test)
    job = SimpleNamespace(number=0, spec=records.spec(), run_name="s/0")
    study = records.study_row("s", facts=records.facts(findings=findings))
    predictors = dict.fromkeys(("mean", "volume fraction", "descriptors"), split)
    return descriptions.of_version(study, job, entry, predictors, alarms=())


def test_doubts_about_the_data_stand_in_the_description_of_a_version():
    text = description(SENTENCE)
    assert f"**Doubt about the data:** {SENTENCE}\n\n" in text
    assert text.index("Doubt") < text.index("| this model |")
    assert "Doubt" not in description()
    heads = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert heads[1:] == [
        "| this model", "| descriptors, ridge", "| volume fraction, cubic", "| mean of the training labels"
    ]  # fmt: skip


def test_many_doubts_leave_room_for_the_scores():
    text = description(*(SENTENCE.replace("C11", f"C{number}") for number in range(90)))
    assert text.count("**Doubt about the data:**") == 5 and "**85 more doubts about the data.**" in text
    assert "| this model |" in text[: foreign.LONGEST_DESCRIPTION]


@pytest.mark.parametrize("verdict", [verdict for verdict in descriptions.VERDICTS if verdict != "below mean"])
def test_each_verdict_is_said_on_terminal_model_and_report(verdict):
    words, entry = descriptions.VERDICTS[verdict], entry_of(verdict)
    elected = Election(champion=1, champion_moved=True, champion_study="s", champion_nmse=0.5)
    if is_doubtful := verdict == "not distinguishable from the mean":
        elected = Election(champion=None, champion_moved=False)
    ended = ClosingResult(winner=entry, groups=(entry,), reason=words, model_name="m", election=elected)
    first, *others = promotion.sentences("s", ended, None)
    done = "Registered, but not promoted" if is_doubtful else "Promoted"
    assert first == f"{done}: config 0 as m version 1; {words} (validation NMSE)."
    assert any(line.startswith("@champion is this version") for line in others) is not is_doubtful
    assert any("lets this one stand for election all the same" in line for line in others) is is_doubtful
    assert f"; {words}." in description(verdict=verdict)
    assert (
        descriptions.tags_of_version(SimpleNamespace(study="s", number=0, spec=records.spec()), entry)["hpo.verdict"]
        == verdict
    )
    title = replace(winner("grid", 0.5), entry=entry).title
    assert title == ("grid" if verdict == "good" else f"grid ({verdict})")
    assert (verdict in promotion.NOTES) is (verdict != "good"), "what `hpo download` says of it"
