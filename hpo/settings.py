"""Settings by environment variable, read once at the edge and passed on as one frozen value."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from data_pipeline.messages import near_miss
from hpo import credentials
from hpo.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where things are and how long to wait. Every field is one row of the table in docs/reference/settings.md."""

    home: Path  # state, logs and caches of the embedded services
    credentials: Path | None  # file that gives the four values below
    database_url: str | None = field(repr=False)  # SQLAlchemy URL of the database for Optuna and the queue
    tracking_uri: str | None  # URL of the MLflow server
    tracking_username: str | None  # of us at that server
    tracking_password: str | None = field(repr=False)
    trainers: int  # training processes of one worker; 0 means as many as its cores allow
    lease: float  # seconds that a claim holds without renewal; renewed six times as often
    checkpoint_interval: float  # seconds between checkpoints of a running trial
    outage_limit: float  # seconds without MLflow or database after which no new trial is claimed
    hang_timeout: float  # seconds without progress after which a trainer is ended
    mlflow_database_url: str | None = field(repr=False)  # of the MLflow server at tracking_uri: for backups alone
    artifacts: str | None  # s3:// URL where the embedded MLflow server keeps files; None: as before, or in the home

    @property
    def embedded(self) -> bool:
        """Whether `hpo` starts its own Postgres and MLflow server."""
        return self.database_url is None


HIGHEST_PRIORITY = 1000  # of a study, either way

VARIABLES = {
    "home": ("HPO_HOME", "mlruns"),
    "credentials": ("HPO_CREDENTIALS", None),
    **{key: (variable, None) for key, variable in credentials.VARIABLES.items()},
    "trainers": ("HPO_TRAINERS", "0"),
    "lease": ("HPO_LEASE", "30"),
    "checkpoint_interval": ("HPO_CHECKPOINT_INTERVAL", "60"),
    "outage_limit": ("HPO_OUTAGE_LIMIT", "600"),
    "hang_timeout": ("HPO_HANG_TIMEOUT", "300"),
    "mlflow_database_url": ("MLFLOW_BACKEND_STORE_URI", None),
    "artifacts": ("HPO_ARTIFACTS", None),
}
assert set(VARIABLES) == {field.name for field in fields(Settings)}


def read(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the environment. Raises SettingsError naming the variable, what it held and what it may hold."""
    raw = {name: environment.get(variable) or default for name, (variable, default) in VARIABLES.items()}
    path = _path("HPO_CREDENTIALS", raw["credentials"]) if raw["credentials"] else None
    if path is not None:
        for key, value in credentials.read(path).items():
            if raw[key] not in (None, value):  # or the file's password would go to another server
                raise SettingsError(
                    f"{VARIABLES[key][0]} is set to something else than {key} in {path} (HPO_CREDENTIALS): unset one "
                    "of the two."
                )
            raw[key] = value
    if (raw["database_url"] is None) != (raw["tracking_uri"] is None):
        given, missing = ("HPO_DATABASE_URL", "MLFLOW_TRACKING_URI")
        if raw["database_url"] is None:
            given, missing = missing, given
        raise SettingsError(
            f"{given} is set but {missing} is not: either set both (external services) or neither (hpo starts its own)."
        )
    uri = raw["tracking_uri"]
    if uri is not None and not uri.startswith(("http://", "https://")):
        raise SettingsError(f"MLFLOW_TRACKING_URI: expected the http(s):// URL of an MLflow server, found {uri!r}.")
    if uri is not None and "@" in urlsplit(uri).netloc:  # it is printed in links
        raise SettingsError(
            "MLFLOW_TRACKING_URI: expected no user or password in it; they go into MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or into the file that HPO_CREDENTIALS names."
        )
    if raw["database_url"] is not None and not _is_postgres(raw["database_url"]):
        raise SettingsError(
            "HPO_DATABASE_URL: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE (in the password, letters and "
            "digits as they are, everything else as %XX)."  # what was found holds the password
        )
    for key in ("database_url", "mlflow_database_url"):
        if url := raw[key]:
            where = VARIABLES[key][0] if environment.get(VARIABLES[key][0]) else f"{key} in {path}"
            raw[key] = _database_url(where, url)
    return Settings(
        home=home_folder(environment),
        credentials=path,
        database_url=raw["database_url"],
        tracking_uri=raw["tracking_uri"],
        tracking_username=raw["tracking_username"],
        tracking_password=raw["tracking_password"],
        trainers=int(_number("HPO_TRAINERS", raw["trainers"], minimum=0, whole=True)),
        lease=_number("HPO_LEASE", raw["lease"], minimum=1),
        checkpoint_interval=_number("HPO_CHECKPOINT_INTERVAL", raw["checkpoint_interval"], minimum=0),
        outage_limit=_number("HPO_OUTAGE_LIMIT", raw["outage_limit"], minimum=0),
        hang_timeout=_number("HPO_HANG_TIMEOUT", raw["hang_timeout"], minimum=1),
        mlflow_database_url=raw["mlflow_database_url"],
        artifacts=_bucket("HPO_ARTIFACTS", raw["artifacts"]),
    )


def home_folder(environment: Mapping[str, str]) -> Path:
    """Return HPO_HOME. Raise SettingsError."""
    variable, default = VARIABLES["home"]
    return _path(variable, environment.get(variable) or str(default))


def _path(variable: str, text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise SettingsError(
            f"{variable}: expected a path, found {text!r}, and the home folder of that user is unknown. Write the path "
            "without ~, or set HOME."
        ) from None


def _is_postgres(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme.partition("+")[0] == "postgresql" and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _database_url(where: str, url: str) -> str:
    """Return the URL without an empty port. Raise SettingsError if what stands behind its '?' is not for libpq."""
    address, mark, query = url.partition("?")
    options = set(parse_qs(query, keep_blank_values=True))
    if "password" in options:
        raise SettingsError(f"{where}: expected the password behind the user, not behind the '?'.")
    if options and url.startswith("postgresql"):
        from psycopg.pq import Conninfo  # 50 ms, and only here

        valid = [option.keyword.decode() for option in Conninfo.get_defaults()]
        if unknown := sorted(options - {*valid}):
            raise SettingsError(
                f"{where}: behind the '?', expected connection parameters of Postgres' libpq, found {unknown[0]!r}."
                f"{near_miss(unknown[0], valid)}"
            )
    return re.sub(r"^(\w[\w+]*://[^/]+):(?=/|$)", r"\1", address) + mark + query


def _bucket(variable: str, url: str | None) -> str | None:
    """Return the s3:// URL of a folder of a bucket, without a / at its end. Raise SettingsError."""
    if url is not None and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[^\s?#%@]+)*/?", url):
        quoted = f", found {url!r}" if "@" not in url else ""  # what stands before it may be a key
        raise SettingsError(
            f"{variable}: expected s3://BUCKET or s3://BUCKET/FOLDER, without keys{quoted}. (A folder of this machine "
            "is HPO_HOME's.)"
        )
    return None if url is None else url.rstrip("/")


def _number(variable: str, text: str | None, *, minimum: float, whole: bool = False) -> float:
    try:
        value = float(int(text or "")) if whole else float(text or "")
    except ValueError:
        value = float("nan")
    if not minimum <= value < float("inf"):
        kind = "a whole number" if whole else "a number of seconds"
        raise SettingsError(f"{variable}: expected {kind} of at least {minimum:g}, found {text!r}.")
    return value


def at_least(option: str, value: float | None, minimum: int) -> None:
    """Raise SettingsError naming the option if the value is too small, or no number."""
    if value is not None and not minimum <= value < float("inf"):
        raise SettingsError(f"{option}: expected at least {minimum}, found {value:g}.")


def require_priority(value: int | None) -> None:
    """Raise SettingsError if no study may have this priority."""
    if value is not None and abs(value) > HIGHEST_PRIORITY:
        raise SettingsError(f"--priority: expected -{HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}, found {value}.")
