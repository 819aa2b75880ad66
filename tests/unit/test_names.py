"""Names of tests and of their studies. Tests share one MLflow server, in which an experiment is called as its study."""

import ast
from collections import defaultdict

from places import ROOT

LONGEST_NAME = 79  # characters


def studies(function: ast.FunctionDef) -> set[str]:
    """Return the names of the studies that a test makes on a data set, as far as they stand there as such."""
    calls = [
        call
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and "data" in {word.arg for word in call.keywords}
    ]
    return {
        word.value
        for call in calls
        for word in call.args
        if isinstance(word, ast.Constant) and isinstance(word.value, str)
    }


def test_no_two_tests_make_a_study_of_the_same_name():
    tests = defaultdict(list)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef):
                for name in studies(function):
                    tests[name].append(f"{path.name}: {function.name}")
    assert "thawed" in tests
    assert {name: where for name, where in tests.items() if len(where) > 1} == {}


def test_the_name_of_a_test_is_a_sentence_of_less_than_80_characters():
    names = [
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 500
    assert [name for name in names if len(name) > LONGEST_NAME] == []


def test_no_two_files_of_tests_have_the_same_name():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names), "pytest imports them by name"
