"""One embedded Postgres and MLflow server for the whole session, by the product's own code; a database per test."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cells
import pytest
import torch
from shell import Shell, fresh_database

from hpo import settings as hpo_settings
from hpo.services import serving
from hpo.services.serving import Services

# Files with tests, or tests that stay together, of one minute to four on two idle cores.
LONGEST = ("test_chaos", "test_listening", "test_outages", "test_protocol", "test_run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: else one process has the last of them while the others have nothing left."""
    items.sort(key=lambda item: ("acceptance" not in item.keywords, item.path.stem not in LONGEST))


def pytest_configure() -> None:
    """Ctrl-C and the end of the terminal are signals like any other here: a job in the background may begin with them
    ignored, and so would all that the tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file together that has a fixture for all of them; any other test goes to whichever process
    is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if 'scope="module"' in (config.rootpath / file).read_text() else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """The session's Postgres and MLflow server, in a temporary HPO_HOME."""
    settings = hpo_settings.read({"HPO_HOME": str(tmp_path_factory.mktemp("services") / "home")})
    try:
        yield serving.up(settings)[0]
    finally:
        serving.erase(settings)


@pytest.fixture
def tracking_uri(services: Services) -> str:
    """URL of the session's MLflow server: make an experiment of your own in it."""
    return services.tracking_uri


@pytest.fixture
def database_url(services: Services) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of this test, dropped after it with whoever is still connected."""
    with fresh_database(services) as url:
        yield url


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_the_caller() -> None:
    """A shell that works on real studies has these: no test may reach them, nor its child processes."""
    for name in [name for name in os.environ if name.startswith(("HPO_", "MLFLOW_"))]:
        del os.environ[name]
    os.environ["HPO_HOME"] = str(Path("/nonexistent/set-HPO_HOME-in-the-test"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small labelled data set in the course's form."""
    return cells.make(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Training promises equal bits for one number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shell(tmp_path: Path, database_url: str, tracking_uri: str) -> Iterator[Shell]:
    """Runs `hpo` on an empty database of this test; ends what is left of it."""
    made = Shell(tmp_path / "home", database_url, tracking_uri)
    yield made
    made.close()
