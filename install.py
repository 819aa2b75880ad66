"""Install hpo from its checkout, with a CPU build of PyTorch where there is no NVIDIA GPU.

`make` runs this file as a script with the environment's Python, before anything is installed: it needs only Python's
library. The default build of PyTorch contains CUDA, several GB; TORCH in the environment decides by hand.
"""

import argparse
import ast
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PUBLIC = "https://download.pytorch.org/whl/cpu"  # PyTorch's own index
PATIENCE = 5.0  # seconds that it has for an answer
CONFIGURED_PATIENCE = 30.0  # seconds; everything else comes from these indexes, too
OLDEST, NEWEST = (2, 8), (3, 0)  # torch>=2.8,<3, as pyproject.toml says
BEHIND = 15  # torchvision 0.29 is for torch 2.14
BY_HAND = "TORCH=cpu, TORCH=default or TORCH=PATH of wheels decides by hand."

Pair = tuple[str, str]  # versions of torch and of torchvision: only builds of one kind fit together
UV_NAMES = {  # what uv calls pip's settings
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
}


class InstallError(Exception):
    """What TORCH asks for is not there."""


@dataclass(frozen=True)
class Choice:
    """A build of PyTorch."""

    line: str  # what it is, and why
    pair: Pair | None = None  # None: the default build
    source: tuple[str, ...] = ()  # options of pip beside the configured indexes

    @property
    def words(self) -> list[str]:
        """The options and requirements that pip and uv understand."""
        pins = [] if self.pair is None else [f"torch=={self.pair[0]}", f"torchvision=={self.pair[1]}"]
        return [*self.source, *pins]


def main() -> int:
    """Choose a build, say so, and install it with hpo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", default="", metavar="NAME", help="install hpo[NAME]")
    extra, wish = parser.parse_args().extra, os.environ.get("TORCH", "")
    target = f".[{extra}]" if extra else "."
    present = _installed()
    if present and not wish:
        return _install(["-e", target])
    try:
        choice = choose(wish, why_default=why_cuda, find=find_cpu_build)
    except InstallError as error:
        print(f"TORCH={wish}: {error}", file=sys.stderr)
        return 1
    print(f"PyTorch: {choice.line}. {BY_HAND}", flush=True)
    if choice.pair is None and present.endswith("+cpu"):  # pip would keep it
        subprocess.run([*PIP, "uninstall", "--quiet", "--yes", "torch", "torchvision"], check=True)
    code = _install([*choice.words, "-e", target])
    if code and choice.pair is not None and not wish:
        print("PyTorch: the CPU build could not be installed (above): the default build is tried.", flush=True)
        return _install(["-e", target])
    return code


def choose(wish: str, *, why_default: Callable[[], str], find: Callable[[str | None], Pair | None]) -> Choice:
    """Return the build for TORCH=`wish` ("": nothing is wished). Raise InstallError.

    `why_default`: return why the default build fits this machine, or "". `find`: return the newest CPU build of the
    configured indexes, together with another one if its URL is given.
    """
    if wish not in ("", "cpu", "default"):
        return _at_hand(Path(wish).expanduser())
    if wish == "default":
        return Choice("the default build, as TORCH=default says")
    if not wish and (reason := why_default()):
        return Choice(f"the default build: {reason}")
    why = "as TORCH=cpu says" if wish else "as there is no NVIDIA GPU here"
    if pair := find(None):
        return Choice(f"the CPU build {pair[0]} of pip's indexes, {why}", pair)
    if pair := find(PUBLIC):
        return Choice(f"the CPU build {pair[0]} of {PUBLIC}, {why}", pair, ("--extra-index-url", PUBLIC))
    missing = (
        f"pip's indexes have no CPU builds of torch and torchvision for this Python, and {PUBLIC} gave none within "
        f"{PATIENCE:.0f} s"
    )
    if wish:
        raise InstallError(f"expected a CPU build, found none: {missing}. Try TORCH=PATH, a folder with both wheels.")
    return Choice(f"the default build with CUDA, several GB, though there is no NVIDIA GPU here: {missing}")


def why_cuda(devices: Path = Path("/dev"), system: str = platform.system()) -> str:
    """Return why the default build fits this machine, or "" if the CPU build does."""
    if system != "Linux":
        return f"on {system} it contains no CUDA"
    if any(devices.glob("nvidia[0-9]*")) or shutil.which("nvidia-smi"):
        return "there is an NVIDIA GPU here"
    return "SLURM's nodes have GPUs" if "gpu" in _slurm_resources() else ""


def _slurm_resources() -> str:
    """Return the generic resources of SLURM's nodes; "" without a SLURM that answers."""
    try:
        words = ["sinfo", "--noheader", "--format=%G"]
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def find_cpu_build(index: str | None) -> Pair | None:
    """Return the newest CPU build that pip sees, also in a further index if one is given; None if none in time."""
    with ThreadPoolExecutor(2) as pool:
        torch, vision = pool.map(lambda package: _versions(package, index), ("torch", "torchvision"))
    for release in sorted((_release(version) for version in torch), reverse=True):
        partner = [other for other in map(_release, vision) if other[:2] == (0, release[1] + BEHIND)]
        if OLDEST <= release[:2] < NEWEST and partner:
            return f"{_text(release)}+cpu", f"{_text(max(partner))}+cpu"
    return None


def _versions(package: str, index: str | None) -> list[str]:
    """Return the CPU builds of a package, without `+cpu`."""
    command = [*PIP, "index", "versions", package, "--retries", "0", "--disable-pip-version-check"]
    patience = PATIENCE if index else CONFIGURED_PATIENCE
    try:
        answer = subprocess.run(
            command + (["--extra-index-url", index, "--timeout", f"{PATIENCE:.0f}"] if index else []),
            capture_output=True,
            text=True,
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        return []
    return re.findall(r"\b(\d+\.\d+\.\d+)\+cpu\b", answer.stdout)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _text(release: Sequence[int]) -> str:
    return ".".join(map(str, release))


def _at_hand(path: Path) -> Choice:
    """Return the build whose wheels lie in a folder; a wheel stands for its folder."""
    folder = path.parent if path.suffix == ".whl" else path
    builds: dict[str, str] = {}
    for package in ("torch", "torchvision"):
        wheels = (
            [path] if path.suffix == ".whl" and path.name.startswith(f"{package}-") else folder.glob(f"{package}-*.whl")
        )
        versions = sorted(wheel.name.split("-")[1] for wheel in wheels if wheel.is_file())
        if versions:
            builds[package] = versions[-1]
    if len(builds) < 2:
        there = " and ".join(f"{package} {version}" for package, version in builds.items()) or "neither"
        raise InstallError(
            f"expected cpu, default, or a folder with wheels of torch and torchvision of one kind, found {there} in "
            f"{folder}."
        )
    pair = builds["torch"], builds["torchvision"]
    return Choice(f"{pair[0]} of {folder}, as TORCH says", pair, ("--find-links", str(folder)))


# --- pip and uv ---

PIP = (sys.executable, "-m", "pip")


def _installed() -> str:
    """Return the version of PyTorch in this environment; "" if there is none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _install(words: Sequence[str]) -> int:
    """Install with uv if there is one, else (or if it fails) with pip; return the exit code.

    On a terminal they show what they load: it takes minutes.
    """
    quiet = () if sys.stdout.isatty() else ("--quiet",)
    if uv := shutil.which("uv"):
        command = [uv, "pip", "install", *quiet, "--python", sys.executable, "--index-strategy", "unsafe-best-match"]
        if subprocess.run([*command, *words], env=uv_environment(os.environ, _pip_settings())).returncode == 0:
            return 0
        print("uv could not install hpo (above): pip is tried.", flush=True)
    return subprocess.run([*PIP, "install", *quiet, *words]).returncode


def _pip_settings() -> str:
    return subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout


def uv_environment(environment: Mapping[str, str], settings: str) -> dict[str, str]:
    """Return the environment with pip's settings, as `pip config list` prints them, under uv's names.

    What is set for uv already stays.
    """
    values: dict[str, list[str]] = {}
    for name, text in re.findall(r"^[^.]*\.([\w-]+)=('.*'|\".*\")$", settings, re.MULTILINE):
        values.setdefault(name, []).extend(str(ast.literal_eval(text)).split())
    translated = {
        variable: ("," if name == "find-links" else " ").join(dict.fromkeys(values[name]))
        for name, variable in UV_NAMES.items()
        if name in values
    }
    return {**translated, **environment}


if __name__ == "__main__":
    sys.exit(main())
