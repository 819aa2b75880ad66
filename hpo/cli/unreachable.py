"""Errors of a service as one message each: what was found, where, the likely cause, and what to do."""

from urllib.parse import urlsplit

from hpo import settings, surroundings
from hpo.errors import UserError

FULL = ("too many clients", "too many connections", "remaining connection slots")  # how Postgres says it
CONNECTIONS = 5  # that one worker may hold at a time


def database(error: Exception) -> str:
    """Return the message for a database that cannot be reached, or takes nothing."""
    text = str(error).rstrip(".")
    if any(words in text for words in FULL):
        return (
            f"The database takes no more connections: {text}. Let fewer workers run (each holds up to {CONNECTIONS}), "
            "or raise max_connections of its server. Nothing was changed; the same command goes on."
        )
    if "read-only transaction" in text:
        return (
            f"The database is read-only at the moment: {text}. A failover, maintenance, or a full disk of its server? "
            "Nothing was changed; when it takes changes again, the same command goes on."
        )
    home = _embedded()
    if "No space left on device" in text:
        where = f"of {home} (HPO_HOME)" if home is not None else "of the database's server"
        return f"The disk {where} is full: {text}. Make room there. Nothing was changed; the same command goes on."
    if home is None:
        return f"The database cannot be reached: {text}. Is HPO_DATABASE_URL right, and is it up?{_set_for_postgres()}"
    return (
        f"The Postgres of {home} (HPO_HOME) does not answer as it should: {text}. Its log: {home}/logs/postgres.log. "
        "`hpo down` and then `hpo up` start it again; the same command goes on."
    )


def database_refuses(error: Exception) -> str:
    """Return the message for a statement that the database refuses, now and later."""
    text = str(error).splitlines()[0]
    if (home := _embedded()) is None:
        return f"The database refused: {text}. Does HPO_DATABASE_URL's user own the database?"
    return f"The Postgres of {home} (HPO_HOME) refused: {text}. `hpo doctor` looks at what is stored there."


def tracking(error: Exception) -> str:
    """Return the message for an MLflow server that cannot be reached, or in whose place another program answers."""
    text = str(error).rstrip(".")
    if hasattr(error, "answer"):  # tracking.Refused
        return (
            f"The MLflow server at {_address()} does not let us in: {text}. Nothing was changed by this.{_by_proxy()}"
        )
    if hasattr(error, "needed"):  # tracking.StoreRefuses
        return (
            f"The MLflow server at {_address()} answers, but stores no files: {text}. When it does, the same command "
            "goes on."
        )
    if (home := _embedded()) is None:
        return f"The MLflow server cannot be reached: {text}. Is MLFLOW_TRACKING_URI right, and is it up?{_by_proxy()}"
    return (
        f"The MLflow server of {home} (HPO_HOME) does not answer as it should: {text}. Its log: "
        f"{home}/logs/mlflow.log. `hpo down` and then `hpo up` start it again; the same command goes on."
    )


def tracking_refuses(error: Exception) -> str:
    """Return the message for a request that the MLflow server refuses, now and later."""
    text = " ".join(str(error).split())
    if (home := _embedded()) is None:
        return f"The MLflow server refused: {text}. Is MLFLOW_TRACKING_URI the server you mean?"
    return f"The MLflow server of {home} (HPO_HOME) refused: {text}. `hpo doctor` looks at what is stored there."


def _set_for_postgres() -> str:
    """Return a sentence about variables of libpq that count for a database elsewhere; empty if none is set."""
    names = surroundings.of_postgres()
    return f" Set here, and counting for it: {', '.join(names)}." if names else ""


def _by_proxy() -> str:
    """Return a sentence about the variable that sends requests for MLflow to a proxy; empty if none does."""
    uri = _address()
    names = surroundings.proxies(uri) if uri.startswith("http") else []
    if not names:
        return ""
    return (
        f" {names[0]} sends the requests to a proxy; if the server is not behind it: NO_PROXY={urlsplit(uri).hostname}"
    )


def _embedded() -> object:
    """Return HPO_HOME if its services are meant, else None."""
    try:
        chosen = settings.read()
    except UserError:
        return None
    return chosen.home if chosen.embedded else None


def _address() -> str:
    try:
        return settings.read().tracking_uri or f"the port of {_embedded()} (HPO_HOME)"
    except UserError:
        return "MLFLOW_TRACKING_URI"
