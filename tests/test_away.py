"""What somebody who gives a command reads when a service is away: the cause, where, and what to do."""

import pytest
from proxy import proxy

from hpo import away
from hpo.queue import DatabaseLost
from hpo.tracking import TrackingUnavailable

FULL = "connection failed: FATAL:  sorry, too many clients already"
READ_ONLY = "cannot execute UPDATE in a read-only transaction"


@pytest.mark.parametrize("embedded", [False, True])
def test_the_message_names_what_is_set_here_and_nothing_else(monkeypatch, embedded):
    if not embedded:
        monkeypatch.setenv("HPO_DATABASE_URL", "postgresql://hpo:secret@db:5432/hpo")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    lost, gone = DatabaseLost("connection refused"), TrackingUnavailable("connection refused")
    for message, variable, log in [
        (away.database(lost), "HPO_DATABASE_URL", "postgres.log"),
        (away.tracking(gone), "MLFLOW_TRACKING_URI", "mlflow.log"),
        (away.database_refuses(lost), "HPO_DATABASE_URL", None),
        (away.tracking_refuses(gone), "MLFLOW_TRACKING_URI", None),
    ]:
        assert "connection refused" in message and "secret" not in message
        assert (variable in message) is not embedded
        assert log is None or (log in message) is embedded


def test_a_full_and_a_read_only_database_are_told_with_their_cure():
    assert "raise max_connections" in away.database(DatabaseLost(FULL))
    assert "read-only at the moment" in away.database(DatabaseLost(READ_ONLY))


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("mode", "words"),
    [("401", "are user and password right"), ("host", "--allowed-hosts"), ("413", "client_max_body_size")],
)
def test_a_command_that_meets_a_gateway_says_so_in_one_line_and_makes_nothing(shell, data, tracking_uri, mode, words):
    with proxy(tracking_uri) as between, between.answering(mode):
        shell.environment["MLFLOW_TRACKING_URI"] = between.url
        output = shell.hpo("run", "--study", "baseline", "--data", data, code=1)
    (line,) = [line for line in output.splitlines() if line.startswith("hpo: ")]
    assert line == output.splitlines()[-1] and words in line and between.url in line
    assert shell.queue.studies() == []
