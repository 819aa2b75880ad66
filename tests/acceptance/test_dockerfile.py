"""The Dockerfile's steps, as far as they need no engine: what it copies builds a whole wheel; as root, all are run.

In place of the images stands this machine, seen through an overlay that takes what is written; in place of the
registry, what is installed here.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

STEPS = re.findall(r"^([A-Z]+) +(.*)$", (ROOT / "Dockerfile").read_text().replace("\\\n", " "), re.MULTILINE)

ALLOWED = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What the engine gets of the repository."""
    folder = tmp_path / "context"
    folder.mkdir()
    for name in ALLOWED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def test_two_stages_of_one_pinned_image_and_the_last_runs_as_nobody_special():
    images = [words.split()[0] for step, words in STEPS if step == "FROM"]
    assert len(images) == 2 and len(set(images)) == 1 and re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", images[0])
    last = STEPS[max(index for index, (step, _) in enumerate(STEPS) if step == "FROM") :]
    assert [words for step, words in last if step == "USER"] == ["10001:10001"]
    copied = [words.split()[:-1] for step, words in STEPS if step == "COPY" and not words.startswith("--from")]
    assert {source for sources in copied for source in sources} == ALLOWED
    assert [step for step, _ in last].index("USER") > [step for step, _ in last].index("RUN")


def test_what_it_copies_builds_a_wheel_that_is_whole(context, tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, context]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("hpo", "models", "data_pipeline"):
        for path in (ROOT / package).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            assert path.is_dir() or "__pycache__" in name or name in names, name


@pytest.mark.root
def test_its_steps_run_and_the_command_starts_as_the_user_of_the_image(context, tmp_path):
    script = "\n".join(_script(context, tmp_path / "stages"))
    done = subprocess.run(["unshare", "-m", "sh", "-exc", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "uid=10001(hpo) gid=10001(hpo) groups=10001(hpo)" in done.stdout
    assert "already satisfied: torch" in done.stdout and "usage: hpo" in done.stdout


def _script(context: Path, stages: Path) -> Iterator[str]:
    """Shell commands for all steps, in a mount namespace of their own."""
    python, packages = Path(sys.executable).resolve(), Path(sysconfig.get_path("purelib"))
    folder, user, root = "/", "0:0", stages  # of the stage
    yield f"mkdir {stages}; mount -t tmpfs tmpfs {stages}"
    # Of pip's packages ours is installed anew; those of the environment that runs this are there for it.
    yield f"export PIP_NO_DEPS=1 PIP_ROOT_USER_ACTION=ignore PYTHONPATH={packages} PYTHONDONTWRITEBYTECODE=1"
    for step, words in STEPS:
        if step == "FROM":  # a copy-on-write view of this machine; its Python is one that everybody may run
            root = stages / (words.partition(" AS ")[2] or "last")
            folder = "/"
            upper, work = (stages / f"{root.name}-{each}" for each in ("upper", "work"))
            yield f"mkdir {root} {upper} {work}"
            yield f"mount -t overlay overlay -o lowerdir=/,upperdir={upper},workdir={work} {root}"
            yield f"mount --rbind /dev {root}/dev; mount -t proc proc {root}/proc"
            yield f"[ -e {root}{python.parent}/python ] || ln -s {python} {root}{python.parent}/python"
            yield f"chmod a+x {' '.join(f'{root}{each}' for each in python.parents)}"
            yield f"export PATH={python.parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        elif step == "RUN":
            yield f"chroot {root} sh -exc {shlex.quote(f'cd {folder}; {words}')}"
        elif step in ("ENV", "ARG"):
            yield f"export {words}"
        elif step == "WORKDIR":
            folder = words
            yield f"mkdir -p {root}{folder}"
        elif step == "COPY" and words.startswith("--from="):
            origin, source, target = words.removeprefix("--from=").split()
            yield f"cp -a {stages / origin}{source} {root}{target}"
        elif step == "COPY":
            *sources, target = words.split()
            yield f"cp -r {' '.join(str(context / source) for source in sources)} {root}{folder}/{target}"
        elif step == "USER":
            user = words
        else:
            assert step == "CMD"
            command = f"cd {folder}; id; touch /artifacts/a $HPO_HOME/a; exec {shlex.join(json.loads(words))}"
            yield f"unset PYTHONPATH; chroot --userspec={user} --groups= {root} sh -exc {shlex.quote(command)}"
