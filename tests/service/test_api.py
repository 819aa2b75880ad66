"""The Python API does what the commands do, and neither prints nor ends the process."""

import subprocess
import sys

import cells
import pytest

from hpo import api
from hpo.errors import NotFound, SettingsError


class Steps(api.Watch):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.ticks = 0
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def begin(self, begun: api.Begun) -> None:
        self.begun.append(begun.row.name)

    def tick(self, trouble: str | None) -> None:
        self.ticks += 1

    def end(self, outcome: api.Outcome) -> None:
        self.ended.append(outcome.row.name)


def test_every_name_of_the_api_exists_and_is_imported_when_it_is_used():
    assert all(getattr(api, name) for name in api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'rnu'"):
        api.rnu  # noqa: B018
    heavy = ("torch", "mlflow", "optuna", "sqlalchemy", "numpy", "rich")
    code = f"import sys; from hpo.cli import main; main.parser(); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.service
def test_a_notebook_runs_a_study_reads_its_trials_and_predicts_with_its_champion(shell, tmp_path, monkeypatch, capfd):
    for name in ("HPO_HOME", "HPO_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, str(shell.environment[name]))
    data = cells.make(tmp_path / "tiny", seed=11)  # its own: all studies on one data set compete for one champion
    steps, studies = Steps(), api.load(str(cells.study(tmp_path, "noted", data=data, epochs=2)))

    (plan,) = api.dry_run(studies)
    assert len(plan.configurations) == 4 and plan.seconds > 0 and not shell.queue.installed()
    done = api.run(studies, compute=api.Compute(trainers=1), watch=steps)
    assert done.outcomes[0].succeeded and not done.are_services_started
    assert steps.begun == steps.ended == ["noted"] and steps.ticks > 0

    frame = api.results("noted")
    assert len(frame) == 4 and frame["best_val_nmse"].is_monotonic_increasing
    assert {"number", "point.filters", "point.learning_rate", "run_id"} <= set(frame.columns)
    assert [(study.name, study.state, study.done) for study in api.studies()] == [("noted", "closed", 4)]
    assert {trial.run_id for trial in api.trials("noted")} == set(frame["run_id"])
    state = api.status()
    assert state is not None and (state.closed, state.open) == (1, [])

    assert api.promote("noted", force=True).result.election.champion_study == "noted"  # after two epochs
    model = api.download(tmp_path / "champion")
    predicted = api.predict(model.folder, [data / "3_cell.png", data / "4_cell.png"])
    assert predicted.shape == (2, 10) and predicted.attrs["unit"] == "GPa"
    assert api.promote("noted").result.winner.version == int(model.version.number)
    assert api.compare("noted", "noted/0").things[0].values["best_val_nmse"] == frame["best_val_nmse"].min()
    assert api.worker("noted").closed, "a worker of a closed study has nothing to do"
    assert api.doctor("noted").is_healthy
    with pytest.raises(NotFound, match="No study 'note' has been planned here"):
        api.trials("note")
    api.delete("noted")
    assert api.studies() == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
@pytest.mark.service
def test_where_no_gpu_passes_its_test_auto_trains_the_same_bits_on_the_cpu(shell, tmp_path, monkeypatch):
    for name in ("HPO_HOME", "HPO_DATABASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, str(shell.environment[name]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "77")  # which is no GPU anywhere
    chosen = cells.study(tmp_path, "automatic", data=cells.make(tmp_path / "tiny", seed=12), epochs=2)
    results = []
    for device in ("auto", "cpu"):
        steps = Steps()
        done = api.run(str(chosen), compute=api.Compute(trainers=1, device=device), watch=steps)
        jobs = [job for job in done.outcomes[0].jobs if job.kind == "trial"]
        assert {job.result.device for job in jobs} == {None}, "the CPU"
        scores = {job.number: (job.result.best_val_nmse, job.result.last_val_mse) for job in jobs}
        results.append((done.outcomes[0].row.identity, scores))
        said = [line for line in steps.said if line.startswith("Training on the CPU: GPU 77 failed its test: ")]
        assert len(said) == (device == "auto"), steps.said
        api.delete("automatic")
    assert results[0] == results[1]


def test_numbers_that_make_no_sense_are_refused_where_they_are_given():
    with pytest.raises(SettingsError, match="--trainers: expected at least 1, found 0"):
        api.Compute(trainers=0)
    with pytest.raises(SettingsError, match="--workers: expected at least 1, found -1"):
        api.Cluster(engine="slurm", workers=-1)
