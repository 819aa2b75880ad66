"""The version stands in pyproject.toml; what runs, prints and is released follows it."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from places import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_hpo_prints_the_version_of_the_project():
    command = [Path(sys.executable).with_name("hpo"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hpo {VERSION}\n", "")


def test_no_other_file_repeats_the_version():
    named = re.compile(rf"(hpo\S*[:=@ -]|version\w* *[:=] *)[\"']?v?{re.escape(VERSION)}\b")
    files = [ROOT / name for name in ("Dockerfile", "Makefile", "README.md", "CONTRIBUTING.md")]
    files += [*(ROOT / "docs").glob("*.yaml"), *(ROOT / "docs").glob("*/*.md")]
    files += [path for package in ("hpo", "models", "data_pipeline") for path in (ROOT / package).rglob("*.py")]
    files = [path for path in files if "example" not in path.parts]  # a report keeps the version that wrote it
    assert [path for path in files if named.search(path.read_text(encoding="utf-8"))] == []


def test_the_tag_of_the_image_that_compose_builds_is_the_version_of_the_project():
    # Compose cannot read pyproject.toml, and without a tag it would go on with the image of an earlier checkout.
    assert re.findall(r"image: hpo(\S*)", (ROOT / "docker-compose.yml").read_text()) == [f":{VERSION}"]


def test_the_newest_release_in_the_changelog_is_the_version_of_the_project():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.*?)\](?: - (.*))?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == VERSION
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in headings[1:])
