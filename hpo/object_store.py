"""S3 and stores that speak its protocol: what their errors mean, read off the words of boto3, MLflow's client for them.

boto3 is an extra of hpo, which MLflow imports where it needs it. MLflow wraps its errors, and its server sends them on
as text: the words are what remains. tests/unit/test_object_store.py has them from the installed boto3.
"""

import re
import sys
from collections.abc import Iterator

PACKAGES = ("boto3", "botocore")
_ANSWER = re.compile(
    r"An error occurred \(([\w.]+)\) when calling the \w+ operation(?: \(reached max retries: \d+\))?: ?([^\n\"]*)"
)
_NO_ANSWER = re.compile(
    r"(?:Could not connect to the endpoint URL|Connect timeout on endpoint URL|Read timeout on endpoint URL|"
    r"Connection was closed before we received a valid response from endpoint URL)\W+[^\s\"\\]*|"
    r"Unable to locate credentials|Partial credentials found in [^\n\"]*|Failed to list artifacts in s3://[^\n\"]*"
)
TOLD = "artifact store: "  # in front of the cause, in messages of hpo and in answers of its MLflow server
_ABSENT = ("404", "NoSuchKey")
_DENIED = (  # of this caller or bucket, and not only for a while
    *("AccessDenied", "AllAccessDisabled", "AccountProblem", "AuthorizationHeaderMalformed", "InvalidAccessKeyId"),
    *("InvalidBucketName", "NoSuchBucket", "PermanentRedirect", "SignatureDoesNotMatch"),
)


def cause(error: BaseException) -> str | None:
    """Return why a store refused or did not answer, such as "SlowDown (Please reduce your request rate.)".

    None if the error is not about a store, or says only that a file is not there.
    """
    return cause_in("\n".join(map(str, _chain(error))))


def errors() -> tuple[type[Exception], ...]:
    """Return the classes of boto3's errors; none as long as nobody has imported it."""
    if "boto3" not in sys.modules:
        return ()
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, Boto3Error, ClientError


def read_keys_again() -> None:
    """Have MLflow's client of S3 read its keys again: those in a file may have been renewed, and it keeps the old ones.

    Both are inside of the packages: the session that boto3 shares, and MLflow's cache of clients.
    """
    if "boto3" in sys.modules:
        import boto3
        from mlflow.store.artifact import s3_artifact_repo

        boto3.DEFAULT_SESSION = None
        s3_artifact_repo._cached_get_s3_client.cache_clear()


def is_asked_here(error: BaseException) -> bool:
    """Whether this process has asked the store: otherwise the MLflow server has."""
    return any(isinstance(reason, errors()) for reason in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def cause_in(text: str) -> str | None:
    """Return what `cause` does of a text that quotes such an error."""
    if match := re.search(rf"{TOLD}([^\n\"]+)", text):
        return match[1]
    if match := _ANSWER.search(text):
        code, message = match[1], match[2].strip()
        return None if code in _ABSENT else f"{code} ({message})" if message else code
    match = _NO_ANSWER.search(text)
    return match[0].strip() if match else None


def is_absence(text: str) -> bool:
    """Whether a store said that there is no such file, and nothing else went wrong."""
    codes = {match[1] for match in _ANSWER.finditer(text)}
    return bool(codes) and codes <= {*_ABSENT}


def is_lasting(cause: str) -> bool:
    """Whether the same request would be refused again: the keys are wrong, or there is no such bucket."""
    return cause.partition(" ")[0] in _DENIED or "credentials" in cause
