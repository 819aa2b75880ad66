"""`python -m hpo.services.run_mlflow WORD…` is `mlflow` with these words: a server, in less than half the time."""

import sys

from hpo.services import foreign

if __name__ == "__main__":
    foreign.run_server(sys.argv[1:])
