"""The credentials file (`HPO_CREDENTIALS`): where the services are and who we are there, for a worker anywhere.

Nothing of a value ever stands in a message of this module: the database's URL holds a password.
"""

import json
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path

from hpo.errors import SettingsError
from hpo.files import PRIVATE, write_atomically

VARIABLES = {  # what each key stands for
    "database_url": "HPO_DATABASE_URL",
    "tracking_uri": "MLFLOW_TRACKING_URI",
    "tracking_username": "MLFLOW_TRACKING_USERNAME",
    "tracking_password": "MLFLOW_TRACKING_PASSWORD",
}


def read(path: Path) -> dict[str, str]:
    """The file's values by key: both URLs, and user with password or neither. SettingsError if it is not as it must be.

    Others may not be able to read it, unless it lies on a read-only mount: so containers get their secrets, with
    modes that the host decides.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            mounted_read_only = os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY
            text = file.read().decode()
        if stat.S_IMODE(mode) & 0o077 and not mounted_read_only:
            raise SettingsError(
                f"HPO_CREDENTIALS: others may read {path} (mode {stat.S_IMODE(mode):04o}); expected 0600. If nobody "
                f"has: chmod 600 {path}"
            )
        values = tomllib.loads(text)
    except OSError as error:
        raise SettingsError(f"HPO_CREDENTIALS: {path} cannot be read: {error.strerror}.") from None
    except ValueError:  # the parser's message may quote the line
        raise SettingsError(f'HPO_CREDENTIALS: {path} is no TOML file of lines `key = "value"`.') from None
    for key, value in values.items():
        if key not in VARIABLES or not isinstance(value, str) or not value:
            raise SettingsError(
                f"HPO_CREDENTIALS: {path}: {key}: expected only {', '.join(VARIABLES)}, each with a text as its value."
            )
    for first, second in (("database_url", "tracking_uri"), ("tracking_username", "tracking_password")):
        if (first in values) != (second in values):
            missing = second if first in values else first
            raise SettingsError(f"HPO_CREDENTIALS: {path}: {missing} is missing; {first} and {second} belong together.")
    if "database_url" not in values:
        raise SettingsError(f"HPO_CREDENTIALS: {path}: expected at least database_url and tracking_uri.")
    return values


def write(path: Path, values: Mapping[str, str]) -> None:
    """Write the file for its owner only, whole or not at all."""
    write_atomically(path, content(values).encode(), mode=PRIVATE)


def content(values: Mapping[str, str]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def server_variables(*, database: str, key: str) -> str:
    """Content of the file for `mlflow --env-file`: the SQLAlchemy URL, and the key that its forms are signed with."""
    return f"MLFLOW_BACKEND_STORE_URI={database}\nMLFLOW_FLASK_SERVER_SECRET_KEY={key}\n"


def server_users(*, database: str, admin: str, password: str) -> str:
    """Content of the file that MLFLOW_AUTH_CONFIG_PATH names: the SQLAlchemy URL of its users, and who may add some.

    Those may look at everything, and change only what is theirs.
    """
    return (
        f"[mlflow]\ndatabase_uri = {database}\ndefault_permission = READ\n"
        f"admin_username = {admin}\nadmin_password = {password}\n"
        "auth_cache_ttl_seconds = 60\n"  # a password's hash takes a tenth of a second, and a worker asks often
    )
