"""HPO_HOME: whose it is, what is remembered of its services, and what happened to the folder meanwhile."""

import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hpo.errors import ServiceError
from hpo.files import PRIVATE, write_atomically
from hpo.ownership import other_user, require_ours

LOOPBACK = "127.0.0.1"
GUARDED = ("artifacts", "cache", "logs", "slurm", "work")  # folders of a home beside `services`
_NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of a file that hpo did not write
ROOT_STORE = Path("/var/lib/hpo")  # root's clusters: the user that Postgres runs as cannot enter a 0700 home


@dataclass(frozen=True, kw_only=True)
class Home:
    """What `services/state.json` remembers; the file has mode 0600 because of the passwords."""

    path: Path  # HPO_HOME, absolute, without symbolic links
    identity: str  # random; another one after the folder was moved or copied
    data: Path  # of Postgres; in HPO_HOME, for root in a folder of ROOT_STORE
    password: str = field(repr=False)
    postgres_port: int | None = None
    mlflow_port: int | None = None
    bucket: str | None = None  # s3:// URL where the MLflow server keeps artifacts; None: in the home
    listen: str | None = None  # address of this machine that others reach the services at; None: loopback only
    access: dict[str, str] = field(default_factory=dict, repr=False)  # passwords of a listening home, by their use

    @property
    def host(self) -> str:
        """Address that the MLflow server listens on, and Postgres besides loopback."""
        return self.listen or LOOPBACK

    @property
    def credentials(self) -> Path:
        """File that lets workers on other machines in."""
        return self.path / "credentials.toml"

    @property
    def services(self) -> Path:
        return self.path / "services"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"


def resolved(path: Path) -> Path:
    """HPO_HOME without symbolic links. ServiceError if it is a link of another user, who may lead it anywhere, or has a
    line end in its name, which Postgres refuses."""
    if path.is_symlink():
        with suppress(FileNotFoundError):  # what it leads to is made
            require_ours(path)
    whole = path.resolve()
    if {"\n", "\r"} & set(str(whole)):
        raise ServiceError(f"HPO_HOME: expected a path on one line, found {str(whole)!r}. Rename the folder.")
    return whole


def read(path: Path) -> Home | None:
    """The home at `path`, as it was last written; None if there is none. ServiceError if hpo may not use it."""
    file = path / "services" / "state.json"
    try:
        for part in (path, file.parent, file):
            require_ours(part)
        home = _home(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise ServiceError(other_user(path, path.stat().st_uid)) from None
    except _NOT_OURS:
        raise ServiceError(
            f"{file}: expected what hpo writes there, found something else. Restore the file, or move {file.parent} "
            "away to begin with empty databases."
        ) from None
    return home


def serving(path: Path) -> Home | None:
    """The home whose services run for `path`, if they run: all of it where it is now, if the folder was moved.

    None if there is none, or for a copy: the services belong to the original.
    """
    home = read(path)
    if home is None or home.path == path:
        return home
    if _identity(home.path) == home.identity:
        return None
    if home.data.is_relative_to(home.path):
        return replace(home, path=path, data=path / home.data.relative_to(home.path))
    return replace(home, path=path) if _owner(home.data) == home.path else None


def write(home: Home) -> None:
    """Remember `home`, whole or not at all."""
    file = home.services / "state.json"
    write_atomically(file, json.dumps(_plain(home), indent=2).encode(), mode=PRIVATE)


def settle(path: Path, report: Callable[[str], object], stop: Callable[[Home], object]) -> Home:
    """The home at `path`: made if there is none, given a new identity if the folder was moved or copied.

    `stop` ends the services of a home that no longer is where they believe it to be. A copy never shares a database
    with its original: it takes along the files that lie in it, and begins empty where (for root) they lie outside.
    """
    home = read(path)
    identity = secrets.token_hex(8)
    data = ROOT_STORE / identity / "postgres" if os.geteuid() == 0 else path / "services" / "postgres"
    if home is None:
        new = Home(path=path, identity=identity, data=data, password=secrets.token_hex(24))
        if data.exists():
            raise ServiceError(
                f"{data} holds a database, but {path / 'services' / 'state.json'}, which has its password, is missing. "
                f"Restore that file, or move {data.parent} away to begin with empty databases."
            )
        for old in left_behind(path):
            stop(old)
            report(f"An earlier {path} left its database in {old.data.parent}: remove that if nobody needs it.")
    elif home.path == path:
        return home
    else:
        moved = serving(path)
        new = replace(home, path=path, identity=identity, data=data)
        if moved is not None:
            stop(moved)
            new = replace(new, data=moved.data)
        elif home.data.is_relative_to(home.path):
            if (data / "postmaster.pid").exists():
                raise ServiceError(
                    f"{path} was copied from {home.path} while Postgres was writing there, so its database is torn. "
                    f"Stop the original (hpo down), copy again; or remove {new.services} to begin with empty databases."
                )
        else:
            report(f"{path} is a copy of {home.path}, whose database stays there: this one begins empty.")
    if not new.data.is_relative_to(path):
        _claim(new)
    write(new)
    return new


def _claim(home: Home) -> None:
    """Make root's folder for `home` and note in it whose it is."""
    folder = home.data.parent
    for part in (ROOT_STORE, folder):
        try:
            part.mkdir(mode=0o755)
            part.chmod(0o755)  # whatever the umask: the user that Postgres runs as has to pass
        except FileExistsError:
            pass
        except OSError as error:
            raise ServiceError(
                f"As root, Postgres keeps its data in {ROOT_STORE}, which cannot be written ({error.strerror}): "
                "make it writable or run hpo as a normal user."
            ) from None
    owner = folder / "owner.new"
    owner.write_text(json.dumps(_plain(home) | {"password": "", "access": {}}), encoding="utf-8")
    owner.replace(folder / "owner.json")


def _plain(home: Home) -> dict[str, Any]:
    state = asdict(home) | {name: _as_written(getattr(home, name)) for name in ("path", "data")}
    return {name: value for name, value in state.items() if name != "bucket" or value}  # an earlier hpo has none


def _home(state: dict[str, Any]) -> Home:
    """What `_plain` gave. Another hpo wrote the number of the user besides: the file's owner is what counts."""
    state = {name: value for name, value in state.items() if name != "uid"}
    return Home(**state | {name: _as_read(state[name]) for name in ("path", "data")})


def _as_written(path: Path) -> str:
    """Return a path as text that means the same file in every locale."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def _as_read(text: str) -> Path:
    """Return the path of `_as_written`, as this locale spells it."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))


def _identity(path: Path) -> str | None:
    """Identity of whatever home is at `path`, also one that hpo may not use."""
    try:
        return json.loads((path / "services" / "state.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, *_NOT_OURS):
        return None


def _owner(data: Path) -> Path | None:
    """Path of the home that root's data directory belongs to."""
    try:
        return _as_read(json.loads((data.parent / "owner.json").read_text(encoding="utf-8"))["path"])
    except FileNotFoundError:
        return None


def left_behind(path: Path) -> list[Home]:
    """Homes that once were at `path`, whose data outside it are still there (root only)."""
    if os.geteuid() != 0:
        return []
    states = []
    for file in ROOT_STORE.glob("*/owner.json"):
        with suppress(FileNotFoundError):  # another home was erased meanwhile
            states.append(json.loads(file.read_text(encoding="utf-8")))
    return [_home(state) for state in states if _as_read(state["path"]) == path]
