"""What an error of the MLflow server means for the caller: try again later, or the request was wrong."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import requests
from mlflow.exceptions import MlflowException

from hpo import machine, object_store
from hpo.errors import ServiceError, TrackingUnreachable
from hpo.text import cut
from hpo.tracking import foreign

ABSENT, EXISTS = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"  # MLflow's codes
_OF_CLIENT = (requests.RequestException, MlflowException, json.JSONDecodeError)
QUOTED = 120  # characters quoted of an answer that is not MLflow's
# MLflow's codes for answers about whether we may ask at all, not about what was asked for.
_NOT_ADMITTED = ("PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED", "UNAUTHENTICATED", "ENDPOINT_NOT_FOUND")


class TrackingUnavailable(TrackingUnreachable):
    """The MLflow server cannot be reached, is too slow, or in trouble itself: try again later."""


class Refused(TrackingUnavailable):
    """A gateway or login page answers in the MLflow server's place, or MLflow does not let us in.

    That says nothing of what we asked for, and may pass.
    """

    def __init__(self, status: int, body: str) -> None:
        text = " ".join(re.sub(r"<[^>]*>", " ", body).split())
        self.answer = f"answers {status}" if status != 200 else "answers with a web page"
        super().__init__(f"it {self.answer} ({cut(text, QUOTED)}): {_cause(status, text)}")


class StoreRefuses(TrackingUnavailable):
    """The MLflow server answers, but its artifact store serves no file: it is full, read-only or out of reach."""

    def __init__(self, message: str, *, needed: int = 0, cause: str | None = None) -> None:
        super().__init__(message)
        self.needed = needed  # bytes that were to be stored
        self.cause = cause  # in the words of an object store


@contextmanager
def server() -> Iterator[None]:
    """Raise TrackingUnavailable for an answer that says nothing of what was asked for, and other errors unchanged.

    Those are MLflow's own answers about the request: there is no such run, say, or a value is wrong. Raise ServiceError
    where files lie in an object store that this process itself speaks to, and has no package or keys for.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in object_store.PACKAGES:
            raise
        raise ServiceError(
            "The artifacts of this MLflow server lie in S3, which needs boto3, an extra of hpo: pip install 'hpo[s3]'"
        ) from None
    except RuntimeError as error:  # MLflow's client starts threads
        if not machine.is_limit(error):
            raise
        raise TrackingUnavailable(f"{machine.LIMITED}{machine.limits()}") from error
    except Exception as error:
        is_of_client = isinstance(error, (*_OF_CLIENT, *object_store.errors()))
        if not is_of_client or (unavailable := meaning(error)) is None:
            raise
        raise unavailable from error


@contextmanager
def passing(code: str) -> Iterator[None]:
    """Leave the block without an error where MLflow answers with this code."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != code:
            raise


def meaning(error: Exception) -> TrackingUnavailable | ServiceError | None:
    """Return the error to raise if the service is in trouble, or not for us; None if the request was wrong."""
    if cause := object_store.cause(error):
        object_store.read_keys_again()
        if object_store.is_lasting(cause) and object_store.is_asked_here(error):
            return ServiceError(
                f"The artifact store does not let this machine in: {cause}. Expected the bucket to exist, and keys for "
                "it in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in the file ~/.aws/credentials."
            )
        return StoreRefuses(f"{object_store.TOLD}{cause}", cause=cause)
    if isinstance(error, object_store.errors()):
        return None
    answer = foreign.answer(error)
    if answer is None:
        return TrackingUnavailable(str(error))
    passing = answer.status >= 500 or answer.status == 429
    if answer.code in _NOT_ADMITTED or (answer.code is None and not passing):
        return Refused(answer.status, answer.text)
    if passing or (answer.code == "BAD_REQUEST" and _is_of_database(answer.text)):
        return TrackingUnavailable(
            foreign.in_short(answer.text) if answer.code else str(Refused(answer.status, answer.text))
        )
    return None


def _is_of_database(text: str) -> bool:
    """Whether MLflow tells of trouble with its database, which it calls a bad request as well: it is read-only, say."""
    kind = foreign.database_error(text)
    return kind is not None and not issubclass(kind, (psycopg.DataError, psycopg.IntegrityError))


def _cause(status: int, text: str) -> str:
    if "Invalid Host header" in text:
        return "it does not know the name it is called by in MLFLOW_TRACKING_URI; its --allowed-hosts must have it"
    causes = {
        200: "a login or a maintenance page in front of it, perhaps",
        401: "are user and password right (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, or HPO_CREDENTIALS)?",
        403: "this user may not do that, or a gateway in front of it keeps us out",
        404: "no MLflow server is there; is MLFLOW_TRACKING_URI right, with the path, if it has one?",
        413: "a proxy in front of it takes no requests of this size (nginx: client_max_body_size)",
    }
    return causes.get(status, "something in front of it answers in its place")
