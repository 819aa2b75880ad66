"""docker-compose.yml runs what the embedded services run."""

from pathlib import Path

import yaml

from hpo import mlflow_server, postgres

ROOT = Path(__file__).parents[1]
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_postgres_in_a_container_has_the_options_and_version_of_the_embedded_one():
    assert SERVICES["postgres"]["command"] == ["postgres", *postgres.options()]
    assert SERVICES["postgres"]["image"] == f"postgres:{postgres.MAJOR_VERSION}"
    assert SERVICES["postgres"]["environment"]["POSTGRES_USER"] == postgres.ROLE


def test_mlflow_in_a_container_has_the_command_and_environment_of_the_embedded_one():
    service = SERVICES["mlflow"]
    hosts = "mlflow:5000,localhost:5000,127.0.0.1:5000"
    expected = mlflow_server.arguments(host="0.0.0.0", port=5000, artifacts="/artifacts", allowed_hosts=hosts)
    assert service["command"] == ["python", *expected]
    assert mlflow_server.ENVIRONMENT.items() <= service["environment"].items()
    assert set(service["environment"]) - set(mlflow_server.ENVIRONMENT) == {"MLFLOW_BACKEND_STORE_URI"}


def test_only_the_mlflow_pages_are_published_and_only_on_loopback():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"mlflow": ["127.0.0.1:5000:5000"]}


def test_everything_that_the_image_copies_is_there_and_nothing_of_the_product_is_missing():
    copies = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    sources = {source for line in copies for source in line}
    assert all((ROOT / source).exists() for source in sources)
    assert {"hpo", "models", "data_pipeline", "pyproject.toml"} <= sources
