"""The words of the project: pages and code use the field's terms in plain sentences, variables are named by nouns."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(
        page for page in sorted((ROOT / "docs").rglob("*.md")) if "example" not in page.parts
    ),  # a report of an earlier hpo
]
PACKAGES = ("hpo", "models", "data_pipeline")

# What is not written (a regular expression, any case), and what is written instead.
WORDS = {
    r"dearest": "most expensive first",
    r"disown\w*": "lose the lease, or release",
    r"attend(s|ed|ing)?": "renew, or hold",
    r"for ever": "without end",
    r"trivial predictors?": "baseline predictors",
    r"whoever|whosoever|wheresoever": "a noun: the worker that …",
    r"mirror(s|ed|ing)?": "reconcile; a projection",
    r"tidy|tidies|tidied": "reconcile, or remove",
    r"(best|planned|grid|every|each) points?": "configuration",
    r"anew": "again",
    r"lest": "so that … not",
    r"mend(s|ed|ing)?": "repair",
    r"reckon(s|ed|ing)?": "compute",
    r"ours": "of hpo",
}
WORD = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): instead for pattern, instead in WORDS.items()}
WORD[re.compile(r"(?:^|[.:;]\s+)Who(?=\s)(?![^.?]*\?)")] = "a sentence with a subject: the worker that …"

NAMES = {"found", "each", "shown", "read", "known", "made", "it", "added"}  # no nouns: not for variables

# Names that users or stored rows know: a column of the table of jobs, a key of `hpo doctor --json`, a key of claims.
COLUMN, KEYS, FIELDS = "mirrored", {"mended"}, {("hpo/study/claims.py", "each")}

LONGEST_SENTENCE = 25  # words


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


def unwanted(text: str) -> Iterator[str]:
    """Yield a message for each word of `text` that is not written."""
    for pattern, instead in WORD.items():
        for match in pattern.finditer(text):
            yield f"{match[0].strip(' .;:')!r}: write {instead!r}"


def prose(page: Path) -> str:
    """Return a page without blocks of code, which quote programs."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_a_page_has_only_words_of_the_glossary(page):
    findings = list(unwanted(" ".join(prose(page).split())))
    assert not findings


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_a_page_has_short_sentences(page):
    for sentence in sentences(prose(page)):
        words = re.findall(r"[\w@²%'.,-]*\w", sentence)
        assert len(words) <= LONGEST_SENTENCE, f"{len(words)} words: {sentence}"


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of Markdown prose; those of tables and lists of names are no sentences and are left out."""
    text = re.sub(r"`[^`\n]*`", "code", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"^(?=\s*(?:[-#|]|\d+\. ))", "\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        if not paragraph.lstrip().startswith(("|", "#")):
            yield from re.split(r"(?<=[.!?:;])[)*]*\s+", " ".join(paragraph.split()))


def texts(package: str) -> Iterator[tuple[str, str]]:
    """Yield (where, text) of all strings and comments of a package, of its templates and its study files."""
    for path in sorted((ROOT / package).rglob("*")):
        if path.suffix in (".j2", ".toml"):
            yield label(path), path.read_text()
        if path.suffix == ".py":
            source = path.read_text()
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{label(path)}:{node.lineno}", node.value
            for token in tokenize.generate_tokens(io.StringIO(source).readline):
                if token.type == tokenize.COMMENT:
                    yield f"{label(path)}:{token.start[0]}", token.string.lstrip("# ")


def variables(package: str) -> Iterator[tuple[str, str]]:
    """Yield (where, name) of everything that a package binds: targets of assignments and loops, parameters, aliases."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name: str | None = None
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.alias):
                name = node.asname
            if name is not None:
                yield f"{label(path)}:{getattr(node, 'lineno', '?')}", name


@pytest.mark.parametrize("package", PACKAGES)
def test_the_code_has_only_words_of_the_glossary(package):
    findings = [
        f"{where}: {message}"
        for where, text in texts(package)
        if text not in KEYS
        for message in unwanted(" ".join(text.replace(COLUMN, "").split()))
    ]
    assert not findings


@pytest.mark.parametrize("package", PACKAGES)
def test_variables_are_named_by_nouns(package):
    findings = [f"{where}: {name}" for where, name in variables(package) if name.lstrip("_") in NAMES]
    assert [where for where in findings if (where.partition(":")[0], where.split()[-1]) not in FIELDS] == []
