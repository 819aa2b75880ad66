"""Settings by environment variable."""

from pathlib import Path

import pytest
from places import ROOT

from hpo import settings
from hpo.errors import SettingsError


def test_without_variables_everything_is_embedded_under_mlruns():
    read = settings.read({})
    assert read.embedded and read.home == Path("mlruns").absolute() and read.lease == 30


@pytest.mark.parametrize("variable", ["HPO_DATABASE_URL", "MLFLOW_TRACKING_URI"])
def test_one_url_alone_is_refused_with_the_name_of_the_other(variable):
    with pytest.raises(SettingsError, match=rf"{variable} is set but"):
        settings.read({variable: "x"})


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HPO_TRAINERS", "two"), ("HPO_TRAINERS", "1.5"), ("HPO_LEASE", "0"), ("HPO_LEASE", "nan"), ("HPO_LEASE", "inf")],
)
def test_a_wrong_number_is_named_with_its_variable(variable, value):
    with pytest.raises(SettingsError, match=f"{variable}: expected .*, found '{value}'"):
        settings.read({variable: value})


def test_a_folder_is_no_tracking_server():
    with pytest.raises(SettingsError, match=r"expected the http\(s\):// URL of an MLflow server, found './mlruns'"):
        settings.read({"HPO_DATABASE_URL": "postgresql://x/y", "MLFLOW_TRACKING_URI": "./mlruns"})


@pytest.mark.parametrize("variable", ["HPO_DATABASE_URL", "MLFLOW_BACKEND_STORE_URI"])
def test_a_password_where_command_lines_would_show_it_is_refused_and_not_repeated(variable):
    urls = {"HPO_DATABASE_URL": "postgresql://x/y", "MLFLOW_TRACKING_URI": "http://x"}
    with pytest.raises(SettingsError, match=f"{variable}: expected the password behind the user") as caught:
        settings.read(urls | {variable: "postgresql://host/data?user=u&password=SECRET"})
    assert "SECRET" not in str(caught.value)
    for odd in ("pa[ss", "pa[ss]word"):  # which Python's urlsplit takes for an address of IPv6
        url = f"postgresql://m:{odd}@host/data"
        if variable == "HPO_DATABASE_URL":
            with pytest.raises(SettingsError, match="expected postgresql://USER") as caught:
                settings.read(urls | {variable: url})
            assert odd not in str(caught.value)
        else:
            assert settings.read(urls | {variable: url}).mlflow_database_url == url


@pytest.mark.parametrize("end", ["", "?sslmode=disable", "/hpo", "/hpo?sslmode=disable"])
def test_an_empty_port_of_the_database_is_the_usual_one(end):
    urls = {"HPO_DATABASE_URL": f"postgresql://hpo:secret@db:{end}", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    assert settings.read(urls).database_url == f"postgresql://hpo:secret@db{end}"


def test_what_is_no_parameter_of_a_database_is_refused_with_the_near_miss():
    urls = {"HPO_DATABASE_URL": "postgresql://hpo:secret@db/hpo?sslmod=disable", "MLFLOW_TRACKING_URI": "http://mlflow"}
    with pytest.raises(SettingsError, match=r"HPO_DATABASE_URL: behind .*'sslmod'\. Did you mean 'sslmode'\?$"):
        settings.read(urls)


def test_every_setting_is_in_the_documentation():
    text = (ROOT / "docs" / "reference" / "settings.md").read_text()
    for variable, _ in settings.VARIABLES.values():
        assert f"`{variable}`" in text
