"""The Dockerfile's steps, as far as they need no engine: what it copies is there, builds a wheel, installs, starts."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = re.findall(r"^([A-Z]+) +(.*)$", (ROOT / "Dockerfile").read_text().replace("\\\n", " "), re.MULTILINE)


def test_two_stages_of_one_pinned_image_and_the_last_runs_as_nobody_special():
    images = [words.split()[0] for step, words in STEPS if step == "FROM"]
    assert len(images) == 2 and len(set(images)) == 1 and re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", images[0])
    last = STEPS[max(index for index, (step, _) in enumerate(STEPS) if step == "FROM") :]
    assert [words for step, words in last if step == "USER"] == ["10001:10001"]
    assert "--uid 10001" in next(words for step, words in last if step == "RUN")
    assert [step for step, _ in last].index("USER") > [step for step, _ in last].index("RUN")


def test_what_it_copies_builds_a_wheel_that_is_whole_and_starts_in_a_fresh_environment(tmp_path):
    context = tmp_path / "context"
    context.mkdir()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for step, words in STEPS:
        if step == "COPY" and not words.startswith("--from"):
            *sources, _ = words.split()
            assert set(sources) <= allowed, "left out of the build's context"
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, context / source, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, context)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    build = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, context]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("hpo", "models", "data_pipeline"):
        for path in (ROOT / package).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            assert path.is_dir() or "__pycache__" in name or name in names, name
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    shown = subprocess.run([tmp_path / "venv" / "bin" / "hpo", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0 and "worker" in shown.stdout
