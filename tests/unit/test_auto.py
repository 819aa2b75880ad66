"""A search within a budget: networks that fit the data, steps that follow from those before, what is said of them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import records

from data_pipeline import dataset
from hpo import study
from hpo.errors import StudyError
from hpo.operations import auto
from hpo.planning import networks
from hpo.queue import BudgetEnd, Job, State
from hpo.queue.closing_result import ClosingResult, Election
from hpo.report import auto as pages
from hpo.report.auto import Step
from hpo.study.records import AutoStep
from models import weights

START = study.load(auto.NETWORKS).start[0]
SETTINGS = {"model.stride": 2, "start": [START]}


def job(number: int, state: State, *, kind: str = "trial", nmse: float = 0.5, at: float = 0.0, **changes) -> Job:
    spec = records.spec(point=START | {"width": number})
    result = records.result(nmse, seconds=10.0, epochs=20) if state == State.DONE and kind == "trial" else None
    values = {
        "id": number,
        "study": "s",
        "kind": kind,
        "number": number,
        "repeat": 0,
        "config": None,
        "cost": 0.0,
        "spec": spec if kind == "trial" else None,
        "state": state,
        "attempt": 1,
        "fence": 1,
        "worker": None,
        "run_id": f"run {number}",
        "checkpoint": None,
        "result": result,
        "reason": None,
        "mirrored": True,
        "alive": False,
        "epochs": 20,
        "changed_at": at,
    }
    return Job(**values | changes)


def step(number: int, nmse: list[float], *, epochs: int = 20, seconds: float = 60.0, family: str = "conv", **changes):
    """A closed step with trials of these scores, each of 10 s; it closed 4 s after the last one was finished."""
    told = AutoStep(**{"number": number, "seed": 0, "role": "searched networks", "share": 60.0} | changes)
    data = replace(records.DATA, profile='{"num_rows": 24}')
    facts = records.facts(auto=told, auto_seconds=seconds, data=data)
    canonical = records.canonical(training={"epochs": epochs}, model={"family": family})
    jobs = [job(place, State.DONE, nmse=score, at=100.0) for place, score in enumerate(nmse)]
    elected = Election(champion=1, champion_moved=True, champion_study=f"s{number}", champion_nmse=min(nmse, default=1))
    closed = replace(job(-1, State.DONE, kind="closing", at=104.0), closing=ClosingResult(election=elected))
    return Step(row=records.study_row(f"s{number}", facts=facts, canonical=canonical), jobs=[*jobs, closed])


def images(shape, *, periodic: bool, symmetries=()):
    return SimpleNamespace(
        images=np.zeros((1, *shape)), is_periodic=periodic, symmetries=symmetries, phases=None, description=None
    )


@pytest.fixture
def no_physics(monkeypatch):
    def refuse(data, folder):
        raise StudyError("no phases")

    monkeypatch.setattr(networks, "check_physics", refuse)


def test_the_shipped_cells_get_the_bounds_of_mechanics_and_their_symmetries():
    data = dataset.load(dataset.DEFAULT)
    first, *coarser, narrow = networks.fitting(data, dataset.DEFAULT, START)
    assert first == {
        "model.symmetric": True,
        "model.physics": "bounded",
        "model.stride": 2,
        "space.depth": [2, 3, 4],
        "start": [START],
    }
    assert [one["model.stride"] for one in coarser] == [4], "a stride of 8 would leave 8 pixels"
    assert narrow["space.width"] == networks.NARROW and narrow["start"][0]["width"] in networks.NARROW


@pytest.mark.parametrize(
    ("shape", "periodic", "strides", "depths"),
    [
        ((1, 16, 16), True, [1], [2, 3]),  # 2^3 + 1 pixels are left behind the first convolution, or more
        ((3, 224, 300), False, [2, 4, 8], [2, 3, 4]),
        ((1, 33, 33), True, [1], [2, 3, 4]),  # no stride divides the sides
        ((1, 5, 64), True, [1], [2]),
        ((1, 4, 4), True, [], []),
    ],
)
def test_networks_fit_the_images(no_physics, tmp_path, shape, periodic, strides, depths):
    options = networks.fitting(images(shape, periodic=periodic), tmp_path, START)
    assert [one["model.stride"] for one in options[:-1]] == strides
    assert not options or options[0]["space.depth"] == depths
    assert all(one["start"][0]["depth"] in one["space.depth"] for one in options)
    assert all("model.physics" not in one and not one["model.symmetric"] for one in options)


class Search(auto._Search):
    """A search without services: an hour with two trainers on 384 training images, which are 12 batches."""

    def __init__(self, seconds: float = 3600.0) -> None:
        self.first = SimpleNamespace(
            study=SimpleNamespace(data_path="default"), split=SimpleNamespace(train=np.arange(384)), name="first"
        )
        self.seconds, self.seed, self.trainers, self.clock = seconds, 0, 2, auto._Clock(auto.time.monotonic())
        self.studied: list[tuple[str, dict, int]] = []

    def _study(self, name, changes, step=0):
        self.studied.append((name, dict(changes), step))
        return SimpleNamespace(name=name)

    def _networks(self, left, overhead):
        return SETTINGS, 0.5


def test_usual_descriptors_come_first_then_a_search_of_them_that_knows_them(monkeypatch):
    monkeypatch.setattr(weights, "absent", lambda name: True)
    search = Search()
    assert search._choose([])[1].role == "usual descriptors"
    usual = step(1, [0.1, 0.2, 0.3], family="descriptors", seconds=25.0)
    _, told = search._choose([usual])
    (name, changes, _) = search.studied[-1]
    assert (name, changes["learn_from"], told.number, told.round) == ("descriptors", ["s1"], 2, 0)
    # a tenth of the hour, less the 10 s in which nothing was trained; 10 s a trial, two at once; 5 % are kept
    assert changes["sampler.trials"] == min(auto.MOST_DESCRIPTORS, 2 * int(0.95 * (360 - 10) / 10)) == 45
    assert Search(90.0)._choose([usual])[1].role == "searched networks", "9 s are too short for a search"


def test_a_round_trains_a_third_of_the_configurations_of_the_round_before_longer(monkeypatch):
    monkeypatch.setattr(weights, "absent", lambda name: True)
    search, before = Search(), step(2, [0.1, 0.2], family="descriptors", seconds=30.0)
    _, told = search._choose([before, before])
    (name, changes, place) = search.studied[-1]
    assert (name, told.round, told.rounds, place) == ("conv-search", 1, 4, 2)
    assert changes["model.stride"] == 2 and changes["training.epochs"] >= 50 and changes["sampler.trials"] % 2 == 0
    scores = [0.05, 0.02, 0.04, 0.03, 0.01, 0.06]
    ended = step(3, scores, round=3, rounds=4, settings=SETTINGS, seconds=50.0)
    search.seconds = 30 + 30 + 50 + 400.5
    _, told = search._choose([before, before, ended])
    (_, changes, _) = search.studied[-1]
    assert (told.role, changes["repeats"], told.share) == ("the best, longest", 2, pytest.approx(400.5, abs=0.4))
    assert [point["width"] for point in changes["start"]] == [4], "the best one, with two seeds"
    # 10 s for 20 epochs: half a second each. 50 s for six trainings of 10 s, two at once: 20 s are no training
    assert changes["training.epochs"] == int(0.95 * (400.4 - 20) / 0.5)


def test_a_search_ends_when_no_training_could_be_longer_and_goes_on_with_more_hours():
    before = step(1, [0.1, 0.2], family="descriptors", seconds=30.0)
    last = step(2, [0.01, 0.02], round=2, rounds=2, settings=SETTINGS, epochs=900, seconds=3300.0)
    long = [replace(one, result=one.result and replace(one.result, seconds=3280.0, epochs=900)) for one in last.jobs]
    steps = [before, Step(row=last.row, jobs=long)]
    assert Search(3600.0)._choose(steps) is None
    search = Search(5 * 3600.0)
    _, told = search._choose(steps)
    (_, changes, _) = search.studied[-1]
    assert (told.number, told.round) == (3, 1) and changes["start"][0]["width"] == 0, "from the best one of before"


def test_heads_are_trained_on_backbones_that_are_fast_and_have_weights_here(monkeypatch):
    monkeypatch.setattr(weights, "absent", lambda name: name.startswith("vgg"))
    search, before = Search(1000.0), step(1, [0.1], family="descriptors", seconds=15.0)
    seconds = {"resnet50": 30.0, "densenet121": 40.0, "resnet18": 20.0, "efficientnet_b0": 500.0}

    def probed(study):
        here = search.studied[-1][1]["space.backbone"]
        assert "vgg16" not in here
        return [
            SimpleNamespace(spec=SimpleNamespace(model={"backbone": name}), seconds=seconds.get(name, 600.0))
            for name in here
        ]

    search._probed = probed
    _, told = search._heads([before], 10.0)
    assert told.role == "heads of pretrained backbones"
    assert search.studied[-1] == ("tl-head", {"space.backbone": ["resnet18", "resnet50", "densenet121"]}, 0)
    monkeypatch.setattr(weights, "absent", lambda name: True)
    assert search._heads([before], 10.0) is None


def test_a_step_knows_what_it_spent_on_other_things_than_training_and_on_closing():
    one = step(1, [0.3, 0.2, 0.1], seconds=60.0)
    assert (one.overhead(1), one.overhead(2), one.overhead(30)) == (30.0, 45.0, 50.0)
    assert one.closing_seconds == 4.0 and one.epoch_seconds == 0.5 and one.nmse == 0.1
    assert not one.is_fruitless and not one.is_last
    end = BudgetEnd(budget="--max-hours 1", reached="1 h")
    assert Step(row=replace(one.row, budget=end), jobs=one.jobs[-1:]).is_fruitless


def test_twice_the_time_is_told_from_the_rounds():
    rounds = [
        step(2, [0.08, 0.1], epochs=50, round=1, rounds=2),
        step(3, [0.02], epochs=200, round=2, rounds=2),
    ]
    lines = pages.forecast(rounds)  # from 50 to 200 epochs a quarter of the error: the error is as 1 / epochs
    assert lines[0] == "From 50 to 200 epochs, the lowest validation NMSE went from 0.08 to 0.02."
    assert lines[1].startswith("If that goes on, trainings twice as long end at 0.01,")
    worse = [rounds[0], step(3, [0.09], epochs=200, round=2, rounds=2)]
    assert "Longer trainings bring nothing here" in pages.forecast(worse)[1]
    assert "fewer than two rounds" in pages.forecast(rounds[:1])[0]


def test_the_page_says_how_the_champion_was_found_and_what_each_step_brought():
    told = [step(1, [0.1], role="usual descriptors", family="descriptors"), step(2, [0.04], round=1, rounds=1)]
    table = pages.steps_table(told)
    assert [row.values["error"] for row in table.rows] == ["first", "60% less"]
    assert [row.values["trainings"] for row in table.rows] == ["1 of 1", "1 of 1"]
    text = pages.document.html(pages.contents(told, 1.0))
    assert "How it was found" in text and "@champion is model version 1 of s2, step 2 (searched networks)" in text
    assert pages.result_line(told[0]).endswith("@champion is of this step.")
    assert "the rest is too short" in pages.sentences(told, 1.0)[0].lower()
    assert "too short" not in pages.sentences(told, 0.01)[0]
