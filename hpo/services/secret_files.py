"""`python3 -m hpo.services.secret_files`: make what docker-compose.yml needs: ./secrets/, ./.env, ./backups/ (empty).

Needs Python (3.11) alone: it runs on a server that has Docker and nothing else. What is there is never overwritten.
"""

import argparse
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path

from hpo import credentials
from hpo.files import PRIVATE, new_file

OWNERS = {"queue": ("hpo", "hpo_queue"), "mlflow": ("mlflow", "mlflow"), "users": ("mlflow_users", "mlflow_users")}
NAMES = ("mlflow:5000", "localhost:5000", "127.0.0.1:5000")  # what the MLflow server is called in the compose network


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m hpo.services.secret_files", description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(), help="of docker-compose.yml (default: this one)"
    )
    parser.add_argument("--name", help="host name that browsers use, where the profile tls is on")
    options = parser.parse_args()
    for file in (options.folder / "docs" / "compose").glob("*"):  # no secrets; a strict umask kept them from containers
        with suppress(OSError):
            file.chmod(0o644)
    written = [options.folder / "secrets", options.folder / ".env"]
    if there := [path for path in written if path.exists()]:
        print(f"{' and '.join(map(str, there))} exist already: nothing was changed. Remove them for new passwords; the "
              "database keeps the old ones until it is made again (docs/how-to/docker.md says how to change them).",
              file=sys.stderr)  # fmt: skip
        return 1
    folder = written[0]
    folder.mkdir(mode=0o700, parents=True)
    for name, text in contents().items():
        (folder / name).write_text(text, encoding="utf-8")
        # A container, which runs as another user, sees the mode of here: the folder keeps this machine's others away.
        (folder / name).chmod(0o644)
    (options.folder / "backups").mkdir(mode=0o700, exist_ok=True)
    names = [*NAMES, *([options.name, f"{options.name}:443"] if options.name else [])]
    origins = [f"https://{options.name}"] if options.name else ["http://localhost:5000"]
    user = f"{os.geteuid()}:{os.getegid()}"
    with new_file(written[1], mode=PRIVATE) as file:
        file.write(f"HPO_HOSTS={','.join(names)}\nHPO_ORIGINS={','.join(origins)}\nHPO_USER={user}\n".encode())
    print(f"Made {folder}/ (passwords; keep it out of backups that others read) and {written[1]} (settings).")
    return 0


def contents() -> dict[str, str]:
    """Text of each file in secrets/ by its name, with new passwords."""
    passwords = {name: secrets.token_hex(24) for name in ("superuser", *OWNERS, "admin", "worker", "key")}
    urls = {
        use: f"postgresql://{role}:{passwords[use]}@postgres:5432/{database}"
        for use, (database, role) in OWNERS.items()
    }
    worker = {
        "database_url": urls["queue"],
        "tracking_uri": "http://mlflow:5000",
        "tracking_username": "hpo",
        "tracking_password": passwords["worker"],
    }
    return {
        "superuser-password": passwords["superuser"],
        **{f"{use}-password": passwords[use] for use in OWNERS},
        "mlflow.env": credentials.server_variables(database=urls["mlflow"], key=passwords["key"]),
        "mlflow-users.ini": credentials.server_users(
            database=urls["users"], admin="admin", password=passwords["admin"]
        ),
        "credentials.toml": credentials.content(worker),
        "dashboard.toml": f'[optuna_dashboard]\nstorage = "{urls["queue"]}"\nhost = "0.0.0.0"\nport = 8080\n',
    }


if __name__ == "__main__":
    sys.exit(main())
