"""What is read off the errors of boto3, as the installed one words them; keys that were renewed are read again."""

from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.stub import Stubber
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository

from hpo import object_store
from hpo.errors import ServiceError
from hpo.tracking.errors import StoreRefuses, server

ONCE = Config(retries={"total_max_attempts": 1}, connect_timeout=1)


def client(url: str = "http://127.0.0.1:1", *, key: str | None = "KEY"):
    secret = None if key is None else "secret"
    return boto3.Session().client(
        "s3",
        endpoint_url=url,
        config=ONCE,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
    )


@pytest.fixture(autouse=True)
def _no_keys_of_the_machine(monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def refused(code: str, message: str = "No.", status: int = 400) -> ClientError:
    """The error of boto3 for this answer of a store."""
    s3 = client()
    with Stubber(s3) as stub, pytest.raises(ClientError) as error:
        stub.add_client_error("put_object", code, message, http_status_code=status)
        s3.put_object(Bucket="b", Key="k", Body=b"")
    return error.value


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("SlowDown", "Please reduce your request rate."),
        ("ExpiredToken", "The provided token has expired."),
        ("QuotaExceeded", ""),
        ("403", "Forbidden"),
    ],
)
def test_a_store_that_refuses_for_a_while_is_waited_for_with_its_own_words(code, message):
    with pytest.raises(StoreRefuses) as error, server():
        raise refused(code, message)
    assert error.value.cause == (f"{code} ({message})" if message else code)


@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "NoSuchBucket", "SignatureDoesNotMatch"])
def test_a_store_that_does_not_let_this_machine_in_is_said_with_what_to_do(code):
    with pytest.raises(ServiceError, match=rf"not let this machine in: {code} \(No\.\).*AWS_ACCESS_KEY_ID"), server():
        raise refused(code)


def test_an_upload_a_listing_and_what_mlflow_passes_on_have_the_same_cause(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    s3 = client()
    with Stubber(s3) as stub, pytest.raises(boto3.exceptions.S3UploadFailedError) as upload:
        stub.add_client_error("put_object", "SlowDown", "Less.", http_status_code=503)
        s3.upload_file(str(tmp_path / "file"), "b", "file")
    repository = S3ArtifactRepository("s3://b/folder")
    repository._get_s3_client = lambda: s3
    with Stubber(s3) as stub, pytest.raises(MlflowException) as listing:
        stub.add_client_error("list_objects_v2", "SlowDown", "Less.", http_status_code=503)
        repository.list_artifacts()
    passed_on = MlflowException(f"{object_store.TOLD}SlowDown (Less.)")
    for error in (upload.value, listing.value, passed_on):
        assert object_store.cause(error) == "SlowDown (Less.)"
    assert object_store.is_asked_here(listing.value) and not object_store.is_asked_here(passed_on)


def test_a_store_that_does_not_answer_and_keys_that_are_missing_have_a_cause():
    for error, words in (
        (pytest.raises(Exception), 'Could not connect to the endpoint URL: "http://127.0.0.1:1/b"'),
        (pytest.raises(Exception), "Unable to locate credentials"),
    ):
        with error as caught:
            client(key=None if "credentials" in words else "KEY").list_objects_v2(Bucket="b")
        assert words.startswith(object_store.cause(caught.value)[:40]), caught.value
        assert object_store.is_lasting(object_store.cause(caught.value)) == ("credentials" in words)


@pytest.mark.parametrize("code", ["404", "NoSuchKey"])
def test_a_file_that_is_not_there_is_no_trouble_of_the_store(code):
    error = refused(code)
    assert object_store.cause(error) is None and object_store.is_absence(str(error))
    with pytest.raises(ClientError), server():
        raise error


def test_without_boto3_the_message_names_the_extra():
    with pytest.raises(ServiceError, match=r"pip install 'hpo\[s3\]'"), server():
        raise ModuleNotFoundError("No module named 'boto3'", name="boto3")
    with pytest.raises(ModuleNotFoundError), server():
        raise ModuleNotFoundError("No module named 'other'", name="other")


def test_keys_that_were_renewed_in_their_file_are_read_again(tmp_path):
    def signs_with() -> str:
        return S3ArtifactRepository("s3://b")._get_s3_client()._request_signer._credentials.access_key

    file = tmp_path / "keys"
    object_store.read_keys_again()
    for key in ("OLD", "NEW"):
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")
        if key == "NEW":
            assert signs_with() == "OLD", "boto3 keeps them"
            object_store.read_keys_again()
        assert signs_with() == key
    object_store.read_keys_again()
