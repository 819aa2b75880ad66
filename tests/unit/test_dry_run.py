"""What a dry run makes of what it measured."""

import cells
import pytest
import torch

from hpo import api, settings, study
from hpo.cli.plan import show
from hpo.errors import ServiceError
from hpo.operations import dry_run
from hpo.planning.preparation import prepare
from hpo.report import tables
from hpo.worker import devices, protocol
from hpo.worker.devices import CPU, Place


def estimate(plan, folder, *, trainers=1, place=CPU) -> dry_run.Estimate:
    chosen = settings.read({"HPO_HOME": str(folder / "home")})
    return dry_run.estimate(plan, chosen, trainers=trainers, place=place, say=lambda line: None)


@pytest.mark.parametrize(("trainers", "expected"), [(1, "40 min"), (2, "20 min"), (3, "13 min"), (16, "10 min")])
def test_a_trial_has_one_trainer_however_many_there_are(monkeypatch, capsys, data, tmp_path, trainers, expected):
    chosen = study.load(str(cells.study(tmp_path, "four", data=data, epochs=10)))
    plan = prepare(chosen, trial_run=True)
    measured = protocol.Probed(index=0, parameters=1, seconds=60.0, once=0.0, memory=1.0, device="")
    monkeypatch.setattr(dry_run, "_probe", lambda plan, specs, place, say: dict.fromkeys(range(len(specs)), measured))
    show([estimate(plan, tmp_path, trainers=trainers)], tables.console())
    output = " ".join(capsys.readouterr().out.split())
    assert f"About {expected} with {trainers} trainer" in output, output
    assert not (tmp_path / "home").exists()


def test_doubts_about_the_data_are_printed_once_for_all_studies(monkeypatch, capsys, tmp_path):
    few = cells.make(tmp_path / "few", count=20)
    plans = [prepare(study.load(str(cells.study(tmp_path, name, data=few, epochs=1))), trial_run=True) for name in "ab"]
    measured = protocol.Probed(index=0, parameters=1, seconds=1.0, once=0.0, memory=1.0, device="")
    monkeypatch.setattr(dry_run, "_probe", lambda plan, specs, place, say: dict.fromkeys(range(len(specs)), measured))
    show([estimate(plan, tmp_path) for plan in plans], tables.console())
    output = " ".join(capsys.readouterr().out.split())
    note = "Note: the validation split has 3 images: scores of so few tell little. [small-split]"
    assert output.count(note) == 1 and output.count("[small-split]") == 2, "validation and test"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_measures_on_the_device_asked_for_and_says_that_there_is_none(data, tmp_path):
    plan = prepare(study.load(str(cells.study(tmp_path, "measured", data=data, epochs=10))), trial_run=True)
    with pytest.raises(ServiceError, match=r"The probe failed on the device 'cuda': .+ `--device auto` takes the CPU"):
        estimate(plan, tmp_path, place=Place(device="cuda"))


def test_a_dry_run_says_the_times_of_the_gpu_that_was_chosen_and_of_the_cpu(monkeypatch, capsys, data, tmp_path):
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    gpu = Place(device="cuda", gpus=("0",), reason="on GPU 0, which passed a test")
    monkeypatch.setattr(devices, "choose", lambda wish: gpu if wish == "auto" else Place(device=wish))

    def probe(plan, specs, place, say):
        seconds, name = {"cuda": (6.0, "NVIDIA H200"), "cpu": (60.0, "")}[place.device]
        one = protocol.Probed(index=0, parameters=1, seconds=seconds, once=0.0, memory=1.0, device=name)
        return dict.fromkeys(range(len(specs)), one)

    monkeypatch.setattr(dry_run, "_probe", probe)
    chosen = study.load(str(cells.study(tmp_path, "both", data=data, epochs=10)))

    def output(**compute):
        show(api.dry_run([chosen], compute=api.Compute(**compute)), tables.console())
        return " ".join(capsys.readouterr().out.split())

    both = output(trainers=1)
    assert "About 4 min with 1 trainer, from a few batches of each network in one of them, on NVIDIA H200;" in both
    assert "On the CPU (`--device cpu`) about 40 min with 1 trainer. " in both
    assert "`hpo run` trains on GPU 0, which passed a test." in both
    alone = output(trainers=1, device="cpu")
    assert "About 40 min" in alone and "--device cpu" not in alone and "`hpo run` trains" not in alone
