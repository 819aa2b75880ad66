"""Claims of anybody's study file: read, kept out of the identity, decided by the report."""

import json
import re
import tomllib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from places import ROOT
from test_answers import evidence, full_grid, winner

from hpo import study
from hpo.errors import StudyError
from hpo.report import claims as rules
from hpo.report.answers import ROLES
from hpo.study import claims

STUDY = """
[model]
family = "cnn"
kernel_size = 3
dropout = 0.2
[space]
filters = [8, 16]
"""
EFFECT = '[[claims]]\ntext = "Sixteen filters are better"\nkind = "parameter effect"\nparameter = "filters"\n'
PAIR = (
    '[[claims]]\ntext = "Mine beats the baseline"\nkind = "model comparison"\nmodels = "mine"\nagainst = "baseline"\n'
)


def load(folder, text: str, name: str = "mine") -> study.Study:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return study.load(str(path))


def test_claims_are_read_and_move_no_identity(tmp_path):
    plain, asking = load(tmp_path, STUDY), load(tmp_path, STUDY + EFFECT)
    assert asking.claims == (
        claims.Claim(text="Sixteen filters are better", kind="parameter effect", parameter="filters"),
    )
    digests = {"data_digest": "d", "split_digest": "s"}
    assert asking.canonical(**digests) == plain.canonical(**digests) and not asking.overridden
    assert all(claims.Claim.from_dict(claim.to_dict()) == claim for claim in asking.claims)


def test_the_claims_of_a_sequence_are_those_of_its_studies_too(tmp_path):
    load(tmp_path, STUDY + EFFECT)
    (tmp_path / "all.toml").write_text(f'sequence = ["baseline", "./mine.toml"]\n{PAIR}')
    first, second = study.load_all(str(tmp_path / "all.toml"))
    assert [claim.text for claim in first.claims] == ["Mine beats the baseline"]
    assert [claim.text for claim in second.claims] == ["Mine beats the baseline", "Sixteen filters are better"]


def test_claims_of_the_source_study_survive_the_database():
    shipped = claims.shipped()
    assert (
        len(shipped) == 13
        and tuple(claims.Claim.from_dict(json.loads(json.dumps(claim.to_dict()))) for claim in shipped) == shipped
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('claims = "x"\n', "claims: expected tables [[claims]], found 'x'."),
        (EFFECT.replace("effect", "efect"), "number 1: kind: expected one of parameter effect, "),
        (EFFECT.replace("effect", "efect"), "found 'parameter efect'. Did you mean 'parameter effect'?"),
        (
            EFFECT.replace("\nparameter =", "\nparametr ="),
            "unknown key 'parametr'. Did you mean 'parameter'? Valid keys",
        ),
        (
            EFFECT.replace('parameter = "filters"', ""),
            "expected the key 'parameter' of a parameter effect, found none.",
        ),
        (EFFECT.replace('"filters"', "8"), "number 1: parameter: expected text in quotes, found 8."),
        (EFFECT + "better = 16\n", "expected two values, better and worse, or neither"),
        (EFFECT + "better = 8\nworse = 8\n", "expected two values, better and worse, or neither"),
        (
            EFFECT + PAIR.replace('"mine"', "[1]"),
            "number 2: models: expected a role or study, or a list of them, found [1].",
        ),
        ('[[claims]]\ntext = "t"\nkind = "convergence"\nmodels = "grid"\n', "expected either epochs (a range) or each"),
        (
            '[[claims]]\ntext = "t"\nkind = "convergence"\nmodels = "grid"\nepochs = [20, 10]\n',
            "epochs: expected two whole numbers, from and to, such as [10, 20], found [20, 10].",
        ),
    ],
)
def test_a_wrong_claim_is_said_with_what_was_expected_and_where(tmp_path, text, message):
    with pytest.raises(StudyError, match=re.escape(message)):
        load(tmp_path, text + STUDY if text.startswith("claims") else STUDY + text)


def test_the_documented_claims_are_valid():
    page = (ROOT / "docs/reference/study-file.md").read_text()
    examples = [text for text in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[[claims]]" in text]
    kinds = [claim.kind for text in examples for claim in claims.parse("page", tomllib.loads(text)["claims"])]
    assert kinds == ["parameter effect", "model comparison"] and all(f'`"{kind}"`' in page for kind in claims.KINDS)
    keys = {term.removesuffix("*") for terms in claims.KINDS.values() for term in terms}
    assert all(f"`{key}`" in page for key in keys) and all(f'`"{role}"`' in page for role in ROLES)


def test_claims_are_not_overridden(tmp_path):
    load(tmp_path, STUDY + EFFECT)
    with pytest.raises(StudyError, match="claims in the study file only"):
        study.load(str(tmp_path / "mine.toml"), ["claims=[]"])


def asking(given, *claims_: claims.Claim):
    """The evidence, as if the study files had these claims."""
    facts = SimpleNamespace(claims=claims_, data=SimpleNamespace(phases=None))
    closed = [replace(one, row=SimpleNamespace(name=one.row.name, facts=facts)) for one in given.closed]
    return replace(given, closed=closed)


def test_the_report_decides_the_claims_of_the_study_file_and_no_others():
    mine = replace(winner("grid", 0.3), study="mine")
    given = evidence(mine, winner("baseline", 0.9), mine=full_grid(lambda point: 1 / point["filters"]))
    pair = claims.Claim(
        text="Mine wins", kind="model comparison", models=("mine",), against=("baseline",), yes="it does"
    )
    effect = claims.Claim(text="Eight is best", kind="parameter effect", parameter="filters", better=8, worse=32)
    answers = rules.answers(asking(given, pair, effect))
    assert [(answer.question, answer.answer) for answer in answers] == [
        ("Mine wins", "it does"),
        ("Eight is best", "refuted"),
    ]
    assert rules.answers(asking(given)) == [], "of studies without claims nothing is asked"
