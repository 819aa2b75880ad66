"""`python -m hpo.services.migrate FILE`: create or upgrade MLflow's two databases, and its users in them.

Runs before a server with access control starts: the one-shot service of docker-compose.yml, and a step of the listening
embedded server. A schema of the installed version is left alone; any other is touched only while nobody else is
connected. FILE holds hpo.credentials.server_variables, and the file that MLFLOW_AUTH_CONFIG_PATH names its
server_users. The password of the workers' user comes from the file that HPO_CREDENTIALS names, else by standard input.
"""

import os
import sys
from typing import TYPE_CHECKING

from dotenv import load_dotenv

if TYPE_CHECKING:
    from sqlalchemy import Engine


def main() -> None:
    load_dotenv(sys.argv[1], override=True)
    from mlflow.server.auth.config import read_auth_config
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore
    from mlflow.store.db import utils

    from hpo import settings
    from hpo.services.mlflow_server import USER

    password = settings.read().tracking_password if os.environ.get("HPO_CREDENTIALS") else sys.stdin.read()
    engine = utils.create_sqlalchemy_engine_with_retry(os.environ["MLFLOW_BACKEND_STORE_URI"])
    if utils._is_empty_database(engine):
        utils._initialize_tables(engine)
    elif (found := utils._get_schema_version(engine)) != (expected := utils._get_latest_schema_revision()):
        if others := _others(engine):
            sys.exit(
                f"MLflow's database has schema {found}, this version brings {expected}, and {others} connections of a "
                "server use it: that one would go on in tables it does not know. Nothing was changed. Stop it (docker "
                "compose stop mlflow worker) and try again."
            )
        utils._upgrade_db(engine)
    configuration = read_auth_config()
    users = SqlAlchemyStore()
    users.init_db(configuration.database_uri)  # migrates it
    for name, secret, admin in (
        (configuration.admin_username, configuration.admin_password, True),
        (USER, password, False),
    ):
        assert name and secret, "hpo.credentials.server_users and the credentials name both"
        if not users.has_user(name):
            users.create_user(name, secret, is_admin=admin)
        elif not users.authenticate_user(name, secret):
            users.update_user(name, password=secret)
    for kind in ("experiment", "registered_model"):  # not "workspace": who manages that may also add users
        users.grant_user_permission(USER, kind, "*", "MANAGE")


def _others(engine: "Engine") -> int:
    """How many connections besides this one the database's role has."""
    from sqlalchemy import text

    query = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
    """
    with engine.connect() as connection:
        return int(connection.scalar(text(query)) or 0)


if __name__ == "__main__":
    main()
