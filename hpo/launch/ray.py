"""Workers as detached actors of Ray: it places them, and starts them again elsewhere when a node dies or is drained.

Ray's client runs in a process of its own (`ray_driver`), for Ray ends the process whose cluster has lost its head.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

from hpo import credentials
from hpo.errors import ServiceError, SettingsError
from hpo.launch.engine import Fate, Fleet, Placed, Resources, key_values, whole
from hpo.launch.reach import require_reachable
from hpo.settings import Settings
from hpo.text import near_miss

OPTIONS = ("address", "cpus", "gpus", "memory", "resources", "labels", "credentials", "home", "runtime-env")
OURS = ("name", "namespace", "lifetime", "max-restarts", "max-task-retries", "max-concurrency", "get-if-exists")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
START_LIMIT = 30.0  # seconds until Ray's client is connected
ANSWER_LIMIT = 30.0  # seconds until it has answered


@dataclass(frozen=True, kw_only=True)
class Ray:
    """A cluster of Ray, with what each actor gets."""

    title: ClassVar[str] = "Ray"
    options: Mapping[str, Any]  # of an actor, as Ray names them
    address: str
    variables: Mapping[str, str]  # of a worker's environment
    settings: Settings
    driver: "Driver" = field(repr=False, compare=False)

    @classmethod
    def parse(cls, words: Sequence[str], settings: Settings) -> Self:
        """Return the engine with its options. Raise SettingsError."""
        given = {key: _text(key, value) for key, value in key_values("ray", words).items()}
        for key in given:
            if key in OURS:
                raise SettingsError(f"--ray: {key} is set by hpo itself.")
            if key not in OPTIONS:
                raise SettingsError(
                    f"--ray: expected one of {', '.join(OPTIONS)}, found {key!r}.{near_miss(key, OPTIONS)}"
                )
        options: dict[str, Any] = {}
        if "cpus" in given:
            options["num_cpus"] = whole("ray", "cpus", given["cpus"])
        if "gpus" in given:
            options["num_gpus"] = _number("gpus", given["gpus"])
        if "memory" in given:
            options["memory"] = _bytes(given["memory"])
        if "resources" in given:
            options["resources"] = {
                name: _number(f"resources {name}", amount) for name, amount in _pairs("resources", given["resources"])
            }
        if "labels" in given:
            options["label_selector"] = dict(_pairs("labels", given["labels"]))
        if "runtime-env" in given:
            options["runtime_env"] = _runtime_env(Path(given["runtime-env"]))
        address = given.get("address") or os.environ.get("RAY_ADDRESS") or "auto"
        if "://" in address:
            raise SettingsError(
                f"--ray: address (or RAY_ADDRESS): expected HOST:PORT of the cluster's head, found {address!r}. Run "
                "this on a machine of the cluster."
            )
        variables = {"HPO_CREDENTIALS": given["credentials"]} if "credentials" in given else {}
        if "home" in given or settings.embedded:
            variables["HPO_HOME"] = given.get("home", str(settings.home))
        return cls(options=options, address=address, variables=variables, settings=settings, driver=Driver(address))

    @property
    def resources(self) -> Resources:
        """What each actor gets, as far as the options say."""
        return Resources(cpus=self.options.get("num_cpus"), has_gpus=bool(self.options.get("num_gpus")))

    def sized(self, cpus: int) -> Self:
        """The same with so many cores for each actor, where the options say nothing of them."""
        return replace(self, options={"num_cpus": cpus, **self.options})

    def check(self) -> None:
        """Raise ServiceError if there is no cluster, or its nodes could not reach the services."""
        if find_spec("ray") is None:
            raise ServiceError("--on ray needs Ray, an extra of hpo: pip install 'hpo[ray]'")
        hosts = self.driver.ask("hosts")
        require_reachable("ray", self.settings, lambda: hosts)

    def hand_in(self, fleet: Fleet, commands: Sequence[Sequence[str]]) -> None:
        """Create an actor for each command."""
        self.driver.ask(
            "hand_in",
            fleet=fleet.name,
            commands=[list(words) for words in commands],
            options={"num_cpus": 1, **self.options},
            variables=dict(self.variables),
            needs_credentials=not self.settings.embedded,
        )

    def placed(self, fleet: Fleet) -> list[Placed]:
        """Return what became of the actors, those that have ended as well."""
        names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
        needed = {names[key]: value for key, value in {"num_cpus": 1, **self.options}.items() if key in names}
        needed |= self.options.get("resources", {})
        rows = self.driver.ask("placed", fleet=fleet.name, needed=needed)
        return [Placed(**row | {"fate": Fate(row["fate"])}) for row in rows]

    def take_back(self, fleet: Fleet, *, waiting_only: bool = False) -> None:
        """Remove the actors that wait; let the workers of the others hand back and leave."""
        self.driver.ask("take_back", fleet=fleet.name, waiting_only=waiting_only)

    def output(self, fleet: Fleet) -> str:
        """The end of what the workers wrote."""
        return str(self.driver.ask("output", fleet=fleet.name))

    def forget(self, fleet: Fleet) -> None:
        """Remove the records of the actors."""
        self.driver.ask("forget", fleet=fleet.name)

    def logs(self, fleet: Fleet) -> str:
        """Where Ray keeps them."""
        return f"`ray logs actor --id …` of the actors {fleet.name}/… (`ray list actors`)"


class Driver:
    """Ray's client in a process of its own, started when it is first asked, and again after it has ended."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._process: subprocess.Popen[str] | None = None

    def ask(self, action: str, **arguments: Any) -> Any:
        """Return the answer. Raise ServiceError if Ray does not answer, or refuses."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"action": action, "arguments": arguments}) + "\n")
            process.stdin.flush()
        except OSError:
            raise self._lost("its client has ended.") from None
        return self._read(process, ANSWER_LIMIT).get("answer")

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-m", "hpo.launch.ray_driver", self.address]
        quiet = {"RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONWARNINGS": "ignore"}
        hidden = {*credentials.VARIABLES.values(), "HPO_CREDENTIALS", "MLFLOW_BACKEND_STORE_URI"}
        environment = {key: value for key, value in os.environ.items() if key not in hidden} | quiet
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._read(self._process, START_LIMIT)
        return self._process

    def _read(self, process: "subprocess.Popen[str]", limit: float) -> dict[str, Any]:
        """Return the next line of the client. Raise ServiceError if it tells of an error, or takes `limit` seconds."""
        assert process.stdout is not None
        timer, end = threading.Timer(limit, process.kill), time.monotonic() + limit
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            is_late = time.monotonic() >= end
            raise self._lost(f"nothing within {limit:.0f} s." if is_late else "its client has ended.")
        answer: dict[str, Any] = json.loads(line)
        if answer["error"]:
            raise self._lost(answer["error"])
        return answer

    def _lost(self, reason: str) -> ServiceError:
        if self._process is not None and self._process.poll() is not None:
            with suppress(OSError):
                self._process.communicate()
            self._process = None
        return ServiceError(f"Ray ({self.address}) does not answer: {reason}")

    def __del__(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def _text(key: str, value: str | bool) -> str:
    """Return the value of an option. Raise SettingsError if it has none."""
    if value is True or not value:
        raise SettingsError(f"--ray: {key}: expected {key}=VALUE.")
    return str(value)


def _number(key: str, text: str) -> float:
    """Return an amount, such as 0.5. Raise SettingsError."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) <= 0:
        raise SettingsError(f"--ray: {key}: expected a number above 0, such as 0.5, found {text!r}.")
    return float(text)


def _bytes(text: str) -> int:
    """Return the bytes of `8G`. Raise SettingsError."""
    size = re.fullmatch(r"(\d+)([KMGT]?)i?B?", text)
    if size is None:
        raise SettingsError(f"--ray: memory: expected such as 8G, found {text!r}.")
    return int(size[1]) * UNITS[size[2]]


def _pairs(key: str, text: str) -> list[tuple[str, str]]:
    """Return the pairs of `spot:1,fast:0.5`. Raise SettingsError."""
    pairs = [tuple(part.split(":", 1)) for part in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise SettingsError(f"--ray: {key}: expected NAME:VALUE, or several with commas, found {text!r}.")
    return [(name, value) for name, value in pairs]


def _runtime_env(path: Path) -> dict[str, Any]:
    """Return the runtime environment in a JSON file. Raise SettingsError; one with credentials would be seen by all."""
    try:
        environment = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"--ray: runtime-env: {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise SettingsError(f"--ray: runtime-env: {path} is no JSON: {error}.") from None
    if not isinstance(environment, dict):
        raise SettingsError(f"--ray: runtime-env: {path}: expected an object, as Ray's runtime_env is.")
    if secret := {*credentials.VARIABLES.values()} & {*(environment.get("env_vars") or {})}:
        raise SettingsError(
            f"--ray: runtime-env: {path}: expected no {min(secret)} in env_vars: Ray shows them to everybody. Name a "
            "file on the nodes with --ray credentials=PATH."
        )
    return environment
