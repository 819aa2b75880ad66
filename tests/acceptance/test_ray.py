"""`--on ray`: what is asked of Ray, and the protocol and a study on a real cluster of one node."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import cells
import pytest
from mlflow import MlflowClient
from network import network_of, served_lab
from places import ROOT
from ray_cluster import RayCluster, ray_cluster
from shell import PATIENCE, Shell, mirrored

from hpo import settings
from hpo.errors import ServiceError, SettingsError
from hpo.launch import ray as engine
from hpo.launch.ray import Ray
from hpo.operations import invariants

CONTRACT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "support")!r}]
from itertools import cycle
from engines import check_engine
from hpo import settings
from hpo.launch.ray import Ray
terminals = cycle([Ray.parse([], settings.read()) for _ in range(2)])
check_engine(lambda: next(terminals), stays=["worker"], patience={PATIENCE})
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RayCluster, Shell]]:
    """A lab in namespaces, and a cluster that knows its services by the environment of its nodes."""
    with network_of() as network, served_lab(network, tmp_path, monkeypatch, lease="8") as lab:
        nodes = {key: value for key, value in os.environ.items() if not key.startswith(("HPO_", "MLFLOW_"))}
        nodes |= {"HPO_CREDENTIALS": lab.environment["HPO_CREDENTIALS"], "HPO_CHECKPOINT_INTERVAL": "1"}
        nodes |= {"HPO_HOME": str(tmp_path / "nodes"), "HPO_LEASE": "8"}
        with ray_cluster(network, nodes) as made:
            lab.environment["RAY_ADDRESS"] = made.address
            yield made, lab


def check_ended(lab: Shell, study: str) -> None:
    """No invariant is broken, and each curve has no gap and no doubled step."""
    with mirrored(lab, study) as shown:
        assert invariants.check(shown) == []
    client = MlflowClient(lab.tracking_uri)
    for job in lab.trials(study):
        steps = [point.step for point in client.get_metric_history(job.run_id, "val/nmse")]
        assert steps == list(range(1, job.epochs + 1)), "a gap or a doubled step"


@pytest.mark.acceptance
@pytest.mark.long
@pytest.mark.root
def test_ray_keeps_to_the_protocol_of_engines(cluster):
    ray, lab = cluster
    ray.start_head("--num-cpus=2")
    done = subprocess.run(
        [*ray.on("server"), sys.executable, "-c", CONTRACT], env=lab.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ray.actors() == []


@pytest.mark.acceptance
@pytest.mark.long
@pytest.mark.root
def test_what_cannot_work_is_refused_and_ray_shows_no_password(cluster, data, tmp_path):
    ray, lab = cluster
    ray.start_head("--num-cpus=2", dashboard=True)
    before = ray.on("server")
    study = cells.study(tmp_path, "shown", data=data, epochs=3)

    def refused(*words: object) -> str:
        process = lab.start("run", "--study", study, "--on", "ray", *words, before=before)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1 and "Traceback" not in output, output
        assert ray.actors() == [], "nothing is left on the cluster"
        print(output.splitlines()[-1])
        return output

    assert "Ray has no machine for such a worker, now or later: no node has 7 CPU" in refused("--ray", "cpus=7")
    missing = refused("--ray", f"credentials={tmp_path}/missing.toml")
    assert "A worker on trial on server cannot work: " in missing and "missing.toml cannot be read" in missing, missing
    away = tmp_path / "away.toml"
    here = Path(lab.environment["HPO_CREDENTIALS"]).read_text()
    away.write_text(here.replace(ray.network.ip("server"), f"{ray.network.address}.200"))
    away.chmod(0o600)
    output = refused("--ray", f"credentials={away}")
    assert "cannot work: The database cannot be reached: " in output and "Nothing was handed in." in output
    other = tmp_path / "old" / "hpo-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: hpo\nVersion: 9.9.9\n")
    (tmp_path / "old.json").write_text(json.dumps({"env_vars": {"PYTHONPATH": str(tmp_path / "old")}}))
    output = refused("--ray", f"runtime-env={tmp_path}/old.json")
    assert "Ray: server has hpo 9.9.9, and this is hpo" in output and "Install the same version there." in output

    output, _ = lab.start("run", "--study", study, "--on", "ray", "--workers", 2, before=before).communicate()
    print(output)
    assert "Handed 2 workers to Ray, as hpo-shown-" in output and "Ray: 2 running (server)" in output
    ray.until(lambda: ray.actors() == [], "the workers leave when the study is closed")
    check_ended(lab, "shown")
    check_hidden(ray, lab, "hpo-shown-")


def check_hidden(ray: RayCluster, lab: Shell, name: str) -> None:
    """No password is in Ray's pages, its store or its files, though these tell of the actors called `name`."""
    pages = {}
    for path in (
        "api/jobs/",
        "api/v0/actors?detail=true",
        "api/v0/workers?detail=true",
        "api/v0/tasks?detail=true",
        "api/v0/runtime_envs?detail=true",
        "logical/actors",
        "nodes?view=summary",
        "api/v0/jobs?detail=true",
    ):
        url = f"http://{ray.network.ip('server')}:8265/{path}"
        pages[path] = ray.ask(f"import urllib.request; print(urllib.request.urlopen({url!r}).read().decode())")
    store = "from ray.experimental.internal_kv import _internal_kv_get as get, _internal_kv_list as keys\n"
    store += "for space in (None, 'hpo', 'fun', 'session', 'job'):\n"
    store += "  for key in keys('', namespace=space): print(space, key, get(key, namespace=space))"
    pages["store"] = ray.ask(store)
    assert name in pages["store"] and name in pages["api/v0/actors?detail=true"]
    secrets = urlsplit(lab.database_url).password, os.environ["MLFLOW_TRACKING_PASSWORD"]
    for path, text in pages.items():
        assert not text.startswith("failed"), (path, text)
        assert not any(str(secret) in text for secret in secrets), path
    files = [path for path in ray.folder.rglob("*") if path.is_file()]
    assert any(b"hpo" in path.read_bytes() for path in files)
    for path in files:
        assert not any(str(secret).encode() in path.read_bytes() for secret in secrets), path


def test_options_of_ray_are_those_of_an_actor(tmp_path):
    def parse(*words: str, **variables: str) -> Ray:
        return Ray.parse(words, settings.read({"HPO_HOME": str(tmp_path), **variables}))

    given = parse("cpus=2", "gpus=0.5", "memory=2G", "resources=spot:1,fast:0.5", "labels=market:spot")
    assert given.options == {
        "num_cpus": 2,
        "num_gpus": 0.5,
        "memory": 2 * 2**30,
        "resources": {"spot": 1.0, "fast": 0.5},
        "label_selector": {"market": "spot"},
    }
    assert given.resources.has_gpus and given.sized(4).options["num_cpus"] == 2
    assert parse().sized(4).resources.cpus == 4
    assert parse().variables == {"HPO_HOME": str(tmp_path)}, "the embedded services' home"
    services = {"HPO_DATABASE_URL": "postgresql://a:b@db/hpo", "MLFLOW_TRACKING_URI": "http://mlflow"}
    assert parse(**services).variables == {}, "as the nodes' own environment says"
    assert parse("credentials=/x", "home=/y", **services).variables == {"HPO_CREDENTIALS": "/x", "HPO_HOME": "/y"}
    (tmp_path / "env.json").write_text('{"pip": ["hpo"]}')
    assert parse(f"runtime-env={tmp_path}/env.json").options == {"runtime_env": {"pip": ["hpo"]}}
    (tmp_path / "secret.json").write_text('{"env_vars": {"HPO_DATABASE_URL": "postgresql://"}}')
    for word, message in (
        ("cpu=2", "found 'cpu'. Did you mean 'cpus'"),
        ("name=x", "name is set by hpo itself"),
        ("cpus=some", "expected a whole number"),
        ("gpus=0", "expected a number above 0"),
        ("memory=much", "expected such as 8G"),
        ("resources=spot", "expected NAME:VALUE"),
        ("address", "expected address=VALUE"),
        ("address=ray://head:10001", "expected HOST:PORT of the cluster's head, found 'ray://head:10001'"),
        (f"runtime-env={tmp_path}/none.json", "cannot be read"),
        (f"runtime-env={tmp_path}/secret.json", "expected no HPO_DATABASE_URL in env_vars"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse(word)


def test_a_cluster_that_is_not_there_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "START_LIMIT", 0.0)
    with pytest.raises(ServiceError, match=r"Ray \(127\.0\.0\.1:1\) does not answer: "):
        Ray.parse(["address=127.0.0.1:1"], settings.read({"HPO_HOME": str(tmp_path)})).check()
