"""`hpo --print-completion`: the script offers the words of the parser, in a real bash, without starting anything."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BASH = shutil.which("bash")
HPO = Path(sys.executable).with_name("hpo")
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
function=$(complete -p hpo); function=${function% hpo}; function=${function##* }
$function 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


def printed(shell: str) -> str:
    command = [HPO, "--print-completion", shell]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "hpo.bash"
    path.write_text(printed("bash"))
    return path


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hpo st", {"status", "stop", "studies"}),
        ("hpo --v", {"--version"}),
        ("hpo run --dev", {"--device"}),
        ("hpo run --device ", {"cpu", "auto", "cuda"}),
        ("hpo run --study grid", {"grid", "grid-fast"}),
        ("hpo run --study min", {"mine.toml"}),
        ("hpo worker --study tl-", {"tl-finetune", "tl-head"}),
        ("hpo data ", {"make", "check"}),
        ("hpo data check ", {"cells"}),
        ("hpo predict champion im", {"image.png"}),
    ],
)
def test_bash_offers_commands_options_studies_and_files(script: Path, tmp_path: Path, line: str, expected: set[str]):
    (tmp_path / "cells").mkdir()
    for name in ("mine.toml", "image.png"):
        (tmp_path / name).touch()
    command = [BASH, "--noprofile", "--norc", "-c", COMPLETE, "bash", script, *line.split(" ")]
    nothing_to_start = {"PATH": "/nonexistent"}
    done = subprocess.run(command, cwd=tmp_path, env=nothing_to_start, check=True, capture_output=True, text=True)
    assert (set(done.stdout.split()), done.stderr) == (expected, "")


def test_zsh_gets_a_script_of_its_own():
    assert printed("zsh").startswith("#compdef hpo\n")


def test_a_shell_without_a_script_is_refused_with_those_that_have_one():
    done = subprocess.run([HPO, "--print-completion", "csh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bash" in done.stderr and "zsh" in done.stderr


def test_printing_the_script_imports_nothing_heavy():
    code = (
        "import sys; from hpo.cli.main import main; main(['--print-completion', 'bash']);"
        "sys.exit(bool({'torch', 'mlflow', 'optuna', 'sqlalchemy', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
