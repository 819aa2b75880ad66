"""What a dry run makes of what it measured."""

import cells
import pytest
import torch

from hpo import settings, study
from hpo.cli.plan import show
from hpo.errors import ServiceError
from hpo.operations import dry_run
from hpo.planning.preparation import prepare
from hpo.report import tables
from hpo.worker import protocol


def estimate(plan, folder, *, trainers=1, device="cpu") -> dry_run.Estimate:
    chosen = settings.read({"HPO_HOME": str(folder / "home")})
    return dry_run.estimate(plan, chosen, trainers=trainers, device=device, say=lambda line: None)


@pytest.mark.parametrize(("trainers", "expected"), [(1, "40 min"), (2, "20 min"), (3, "13 min"), (16, "10 min")])
def test_a_trial_has_one_trainer_however_many_there_are(monkeypatch, capsys, data, tmp_path, trainers, expected):
    chosen = study.load(str(cells.study(tmp_path, "four", data=data, epochs=10)))
    plan = prepare(chosen, trial_run=True)
    measured = protocol.Probed(index=0, parameters=1, seconds=60.0, once=0.0, memory=1.0, device="")
    monkeypatch.setattr(dry_run, "_probe", lambda plan, specs, device, say: dict.fromkeys(range(len(specs)), measured))
    show([estimate(plan, tmp_path, trainers=trainers)], tables.console())
    output = " ".join(capsys.readouterr().out.split())
    assert f"About {expected} with {trainers} trainer" in output, output
    assert not (tmp_path / "home").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_measures_on_the_device_asked_for_and_says_that_there_is_none(data, tmp_path):
    plan = prepare(study.load(str(cells.study(tmp_path, "measured", data=data, epochs=10))), trial_run=True)
    with pytest.raises(ServiceError, match=r"The probe failed on the device 'cuda': .+ `--device auto` takes the CPU"):
        estimate(plan, tmp_path, device="cuda")
