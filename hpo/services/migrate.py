"""`python -m hpo.services.migrate FILE`: create or upgrade MLflow's two databases, and its users in them.

Runs before a server with access control starts: the one-shot service of docker-compose.yml, and a step of the listening
embedded server. A schema of the installed version is left alone; any other is touched only while nobody else is
connected. FILE holds hpo.credentials.server_variables, and the file that MLFLOW_AUTH_CONFIG_PATH names its
server_users. The password of the workers' user comes from the file that HPO_CREDENTIALS names, else by standard input.
"""

import os
import sys

from dotenv import load_dotenv

from hpo import settings
from hpo.services import foreign
from hpo.services.mlflow_server import USER


def main() -> None:
    load_dotenv(sys.argv[1], override=True)
    password = settings.read().tracking_password if os.environ.get("HPO_CREDENTIALS") else sys.stdin.read()
    assert password, "the credentials name it"
    if refusal := foreign.migrate(os.environ["MLFLOW_BACKEND_STORE_URI"]):
        sys.exit(refusal)
    foreign.add_users(USER, password)


if __name__ == "__main__":
    main()
