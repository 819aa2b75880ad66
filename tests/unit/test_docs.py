"""The documentation says what the program does (commands, options, study keys), and each page is of one kind."""

import argparse
import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from places import ROOT
from test_layers import ORDER

from hpo import study
from hpo.cli import main
from hpo.study import parsing
from models import specs
from models.backbones import BACKBONES

KINDS = {
    "tutorial": "# Tutorial: ",
    "how-to": "# How to ",
    "reference": "# Reference: ",
    "explanation": "# Explanation: ",
}
DOCS = [page for kind in KINDS for page in sorted((ROOT / "docs" / kind).glob("*.md"))]
INDEX = ROOT / "docs" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", INDEX, *DOCS]


def label(page: Path) -> str:
    """Name of a page in the report of a test run, such as `docs/reference/commands.md`."""
    return str(page.relative_to(ROOT))


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command by its words, such as `data make`."""

    def below(parser: argparse.ArgumentParser, words: str) -> dict[str, argparse.ArgumentParser]:
        parsers = {}
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, sub in action.choices.items():
                    parsers |= {f"{words} {name}".strip(): sub} | below(sub, f"{words} {name}".strip())
        return parsers

    return {words: parser for words, parser in below(main.parser(), "").items() if words != "data"}


def test_every_command_and_option_is_documented():
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    for words, parser in commands().items():
        assert f"`hpo {words}" in text
        for action in parser._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f"`{option}" in text, f"hpo {words} {option}"


def test_every_study_key_is_documented():
    text = (ROOT / "docs" / "reference" / "study-file.md").read_text()
    keys = [f"{table}.{key}" if table else key for table, names in study.KEYS.items() for key in names]
    keys += [f"training.{key}" for key in specs.training_keys()]
    keys += [f"model.{key}" for family in specs.FAMILIES for key in ("family", *specs.model_keys(family))]
    keys += parsing.SEQUENCE_KEYS
    for key in keys:
        if key not in ("bounds", "data", "model", "sampler", "pruner", "space", "training"):
            assert f"`{key}`" in text, key
    for name in (*specs.FAMILIES, *study.PRUNERS, *BACKBONES):
        assert f'`"{name}"`' in text


@pytest.mark.parametrize("page", ["reference/study-file.md", "how-to/write-a-study.md"])
def test_the_first_example_of_a_study_is_valid(page, tmp_path):
    text = (ROOT / "docs" / page).read_text()
    (tmp_path / "example.toml").write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL).group(1))
    assert study.load(str(tmp_path / "example.toml")).trials == 30


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_command_line_in_the_documentation_parses(page):
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^(?:\$ )?(hpo [a-z].*)$", block, re.MULTILINE):
            main.parser().parse_args(shlex.split(line.partition("  #")[0])[1:])


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_link_within_the_documentation_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        if not target.startswith("http"):
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the fragments by which the headings of a page can be linked."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_prose_has_lines_that_can_be_read_and_searched(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in text.splitlines():
        assert line.startswith("|") or len(line) <= 135, line
        assert line.count("`") % 2 == 0, f"code that is broken over two lines: {line}"


@pytest.mark.parametrize("page", DOCS, ids=label)
def test_each_page_says_in_its_first_line_of_which_kind_it_is(page):
    assert page.read_text().startswith(KINDS[page.parent.name])


def test_every_page_is_of_a_kind_and_in_the_index():
    others = [INDEX, *(ROOT / "docs" / "example").glob("*.md")]  # the example is a report that `hpo report` wrote
    assert sorted([*DOCS, *others]) == sorted((ROOT / "docs").rglob("*.md"))
    for page in DOCS:
        assert f"]({page.relative_to(INDEX.parent)})" in INDEX.read_text(), label(page)


@pytest.mark.parametrize("page", [page for page in DOCS if page.parent.name != "reference"], ids=label)
def test_a_page_that_is_read_from_top_to_bottom_has_at_most_1500_words(page):
    assert len(page.read_text().split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_files_and_modules_that_a_page_names_exist(page):
    text = page.read_text()
    for path in re.findall(r"(?<![\w./])(?:hpo|models|data_pipeline|tests|bench)/[\w/]*(?:\.\w+|/)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python3? -m (hpo[\w.]*)", text):
        assert importlib.util.find_spec(module), module


def test_the_packages_are_documented_in_the_order_of_their_imports():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    packages = re.findall(r"^\| `([\w/]+)/` \|", page, re.MULTILINE)
    assert packages == [name.replace(".", "/") for name in ORDER if (ROOT / name.replace(".", "/")).is_dir()]


def test_the_names_that_the_map_gives_stand_in_their_files():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    link, names = r"\[([\w/]+\.py)\]", r"`[A-Za-z_]\w*`(?:, `[A-Za-z_]\w*`)*"
    pairs = [(path, text) for text, path in re.findall(rf"({names}) in {link}", page)]
    pairs += re.findall(rf"{link}\([\w/.]+\): ({names})", page)
    assert len(pairs) > 20
    for path, text in pairs:
        defined = (ROOT / path).read_text()
        for name in re.findall(r"\w+", text):
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name}\b", defined, re.MULTILINE), f"{name} in {path}"


def test_the_messages_that_the_list_of_faults_quotes_are_messages_of_the_program():
    lines = (ROOT / "docs/reference/faults.md").read_text().splitlines()
    seen = [re.split(r"(?<!\\)\|", line)[2] for line in lines if line.startswith("|")]  # the column "what you see"
    program = " ".join(strings())
    values = r"trial \d+ of \w+|\w+@\w+|[\d.]*\d|grid|Median\w+|SIGKILL|\(.*\)"
    joints = r"[…,:]|trainer|suggester|MLflow|was"  # the program puts these messages together of pieces
    for message in re.findall(r"`([^`]+)`", " ".join(seen)):
        for piece in re.split(f"{values}|{joints}", message):
            assert piece.strip() in program, f"{message!r}: the program does not say {piece.strip()!r}"


def test_the_tables_that_the_documentation_shows_have_the_headers_of_the_program():
    program = " ".join(strings())
    for header in re.findall(r"^┃(.*)┃$", (ROOT / "docs" / "tutorial" / "first-study.md").read_text(), re.MULTILINE):
        for cell in header.split("┃"):
            assert re.sub("GPa²?", "", cell).strip() in program, cell


def strings() -> list[str]:
    """Return the texts in the code of `hpo`, those of f-strings in pieces."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "hpo").rglob("*.py")]
    constants = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [" ".join(node.value.split()) for node in constants if isinstance(node.value, str)]
