"""A bucket on a real server of the S3 protocol, with a proxy in front of it that can refuse as such stores do."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError
from proxy import Proxy, proxy
from shell import PATIENCE

from hpo.services import daemon

NAME = "hpo-test"
KEYS = "[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
SECRET = "of-the-bucket-and-nobody-else"


@dataclass(frozen=True)
class Bucket:
    """An empty bucket."""

    between: Proxy  # what its clients speak to
    keys: Path  # file with the keys of its clients
    _client: Any

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client."""
        return {
            "AWS_SHARED_CREDENTIALS_FILE": str(self.keys),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_S3_ENDPOINT_URL": self.between.url,
        }

    def write_keys(self, key: str) -> None:
        self.keys.write_text(KEYS.format(key=key, secret=SECRET))

    def files(self, folder: str = "") -> list[str]:
        """Return the names of all objects below a folder."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=NAME, Prefix=folder)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


@contextmanager
def bucket(folder: Path) -> Iterator[Bucket]:
    """A bucket until the end of the block; `folder` is for its log and keys."""
    port = daemon.choose_port(None)
    with (folder / "s3.log").open("wb") as log:
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(words, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="tests", aws_secret_access_key="tests"
    )
    try:
        _create(client, server)
        with proxy(url) as between:
            made = Bucket(between, folder / "keys", client)
            made.write_keys("FIRST")
            yield made
    finally:
        server.kill()
        server.wait()


def _create(client: Any, server: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        with suppress(BotoCoreError):
            client.create_bucket(Bucket=NAME)
            return
    raise AssertionError(f"the S3 server does not answer (exit code {server.poll()})")
