"""The source study's questions, decided on evidence whose truth is known."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import records

from data_pipeline.dataset import Dataset
from data_pipeline.description import Description
from data_pipeline.split import split
from hpo.queue.closing_result import ClosingResult
from hpo.report import claims, sections
from hpo.report.answers import Answer
from hpo.report.error_section import against
from hpo.scores.evidence import Closed, Evidence, Winner
from hpo.study.claims import shipped
from hpo.study.records import SplitScores
from models import metrics

SEED, CELLS = 17, 200
RANDOM = np.random.default_rng(SEED)
IMAGES = (RANDOM.random((CELLS, 1, 4, 4)) < RANDOM.uniform(0.1, 0.9, (CELLS, 1, 1, 1))).astype(np.float32)
FRACTION = IMAGES.mean(axis=(1, 2, 3))
TARGETS = np.column_stack([3 + 5 * FRACTION**2, 10 * FRACTION]) + RANDOM.normal(0, 0.5, (CELLS, 2))
DATA = Dataset(
    images=IMAGES,
    targets=TARGETS,
    target_names=("C11", "C22"),
    names=tuple(f"{index}_x.png" for index in range(CELLS)),
    description=Description(name="made", unit="GPa"),
    symmetries={},
)
PARTS = split(CELLS)
TRUTH = TARGETS[PARTS.test]
JOBS = itertools.count(1)
MODELS = {
    "baseline": {"family": "baseline"},
    "grid": {"family": "cnn"},
    "head": {"family": "transfer", "trainable": "head"},
    "fine-tuned": {"family": "transfer", "trainable": "all"},
}


LENGTH = 200  # epochs of a curve


def trial(
    point: dict,
    nmse: float,
    *,
    parameters: int = 1000,
    converged: int = 5,
    model: dict | None = None,
    length: int = LENGTH,
    state: str = "done",
):
    """Its curve is flat from `converged` on, and lowest there."""
    result = records.result(nmse, best_epoch=min(30, length)) if state == "done" else None
    training = {"epochs": length}
    spec = records.spec(point=point, parameters=parameters, model=model or {"family": "cnn"}, training=training)
    number = next(JOBS)
    job = SimpleNamespace(id=number, number=number, kind="trial", state=state, spec=spec, result=result, is_refit=False)
    curve = {epoch: nmse * (1 if epoch >= converged else 2) for epoch in range(1, length + 1)}
    return job, {"val/nmse": curve, "train/nmse": {epoch: value / 2 for epoch, value in curve.items()}}


def winner(
    role: str,
    error: float,
    *,
    backbone: str = "",
    weights: str = "ImageNet",
    converged: int = 5,
    selected: float | None = None,
    length: int = LENGTH,
) -> Winner:
    """One whose predictions are off by so many GPa; the errors of two winners have nothing in common.

    `selected`: its validation NMSE, if the validation split thinks differently of it than the test split.
    """
    model = MODELS[role] | ({"backbone": backbone} if backbone else {})
    job, curves = trial({}, error**2, converged=converged, model=model, length=length)
    predicted = TRUTH + np.random.default_rng([SEED, job.id]).normal(0, error, TRUTH.shape)
    nmse = float(((predicted - TRUTH) ** 2 / TARGETS[PARTS.train].var(axis=0)).mean())
    entry = SimpleNamespace(
        point={"backbone": backbone} if backbone else {},
        weights=weights if backbone else "",
        parameters=1000,
        test=SimpleNamespace(nmse=nmse, r2=1 - nmse),
        verdict="good",
    )
    points = 1 if role == "baseline" else 24
    return Winner(
        study=role,
        job=job,  # type: ignore[arg-type]
        entry=entry,  # type: ignore[arg-type]
        nmse=error**2 if selected is None else selected,
        points=points,
        curves=curves,
        predicted=predicted,
        tags={},
    )


def evidence(*winners: Winner, **trials: list) -> Evidence:
    """Of these winners; `trials` are those of a whole study by its name."""
    asking = SimpleNamespace(claims=shipped(), data=SimpleNamespace(phases=None))
    closed = [
        Closed(
            row=SimpleNamespace(name=name, facts=asking),  # type: ignore[arg-type]
            jobs=[job for job, _ in found],
            ended=ClosingResult(winner=None, reason=""),
            curves={job.id: curves for job, curves in found},
        )
        for name, found in (trials or {"protocol": []}).items()
    ]
    ordered = sorted(winners, key=lambda each: each.nmse)
    return Evidence(closed=closed, winners=ordered, dataset=DATA, split=PARTS)


def answer(given: Evidence, question: str) -> Answer:
    (found,) = [each for each in claims.answers(given) if each.question.startswith(question)]
    return found


@pytest.mark.parametrize(
    ("baseline", "tuned", "expected"),
    [(1.0, 0.5, "yes"), (0.5, 1.0, "no, it did harm"), (0.7, 0.7, "not distinguishable")],
)
def test_tuning_counts_when_the_interval_of_the_difference_leaves_out_zero(baseline, tuned, expected):
    given = evidence(winner("baseline", baseline), winner("grid", tuned))
    assert answer(given, "Did tuning improve").answer == expected, f"seed {SEED}"


def test_what_was_not_run_is_not_measured_and_said_what_it_takes():
    given = evidence(winner("grid", 0.5))
    found = answer(given, "Did tuning improve")
    assert (found.answer, found.because) == ("not measured", "It takes a study of baseline.")
    assert {each.answer for each in claims.answers(given)} == {"not measured", "grid"}
    single = evidence(winner("baseline", 0.9), dataclasses.replace(winner("grid", 0.5), points=1))
    assert answer(single, "Did tuning improve").answer == "not measured", "one point is no tuning"
    assert {each.answer for each in claims.answers(evidence())} == {"not measured"}


def test_the_best_backbone_the_fastest_and_what_fine_tuning_did():
    given = evidence(
        winner("head", 1.0, backbone="vgg16", converged=20),
        winner("head", 0.8, backbone="resnet50", converged=9),
        winner("fine-tuned", 0.3, backbone="vgg16"),
        winner("fine-tuned", 1.6, backbone="resnet50"),
        winner("grid", 0.6),
        winner("baseline", 1.2),
    )
    assert answer(given, "Which backbone converged").answer == "resnet50"
    assert answer(given, "Which backbone was best").answer == "vgg16"
    assert answer(given, "Did fine-tuning help or harm vgg16").answer == "it helped"
    assert answer(given, "Did fine-tuning help or harm resnet50").answer == "it did harm"
    assert answer(given, "What helped more").answer == "transfer"
    assert answer(given, "Which model is best").answer == "fine-tuned vgg16"


def test_backbones_that_are_not_pretrained_answer_nothing_about_transfer():
    bare = [
        winner(role, error, backbone=name, weights="not pretrained")
        for role, name, error in (("head", "vgg16", 1.0), ("head", "resnet50", 0.5), ("fine-tuned", "vgg16", 0.3))
    ]
    given = evidence(winner("grid", 0.6), *bare)
    for question in ("Which backbone converged", "Which backbone was best", "Did fine-tuning", "What helped more"):
        found = answer(given, question)
        assert found.answer == "not measured" and "not pretrained: this is no transfer learning" in found.because
    assert answer(given, "Heads converge").answer == "not measured"
    assert answer(given, "Which model is best").answer == "fine-tuned vgg16, not pretrained", "the best it is, though"


POINTS = [
    {"filters": f, "kernel_size": k, "dropout": d, "learning_rate": lr}
    for f, k, d, lr in itertools.product((8, 16, 32), (3, 5), (0.0, 0.2), (1e-3, 1e-4))
]


def full_grid(score, state=lambda point: "done", **options) -> list:
    return [
        trial(point, score(point), parameters=point["filters"] * 100, state=state(point), **options) for point in POINTS
    ]


def test_claims_on_parameters_are_confirmed_refuted_or_left_open():
    random = np.random.default_rng(SEED)
    score = lambda p: (  # noqa: E731
        p["filters"] ** -0.5
        * {3: 1, 5: 1.5}[p["kernel_size"]]
        * 10 ** (-p["learning_rate"] * 100)
        * random.uniform(0.9, 1.1)
    )
    given = evidence(winner("grid", 0.5), grid=full_grid(score))
    assert answer(given, "More filters").answer == "confirmed"
    assert answer(given, "Larger kernels").answer == "refuted"
    assert answer(given, "Dropout 0.2").answer == "not distinguishable"
    assert answer(given, "The learning rate 1e-3").answer == "confirmed"
    because = answer(given, "More filters").because
    assert "filters 16 over 8" in because and "filters 32 over 16" in because and "filters 32 over 8" in because
    assert "over 8 pairs" in because
    assert answer(given, "Does more capacity").answer == "yes"


def test_capacity_that_does_harm_is_said_to():
    given = evidence(winner("grid", 0.5), grid=full_grid(lambda p: p["filters"] * (1 + p["dropout"])))
    assert answer(given, "Does more capacity").answer == "no, it does harm"


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [((20, 20), "refuted"), ((180, 190), "refuted"), ((110, 140), "confirmed"), ((90, 140), "in part")],
)
def test_a_claim_on_convergence_is_judged_by_the_middle_half_of_the_networks(epochs, expected):
    half = [full_grid(lambda p: 0.1 + p["dropout"], converged=epoch)[:12] for epoch in epochs]
    found = answer(evidence(winner("grid", 0.1), grid=[*half[0], *half[1]]), "Custom CNNs converge")
    assert found.answer == expected and f"all {min(epochs)} to {max(epochs)}, of 24 networks" in found.because


def test_networks_that_learned_no_more_than_the_mean_converged_never():
    flat, good = winner("head", 3.0, backbone="resnet50", converged=1), winner("head", 0.2, backbone="vgg16")
    given = evidence(flat, good)
    assert given.mean_nmse == pytest.approx(1, abs=0.5) and given.converged(flat.curves["val/nmse"]) is None
    found = answer(given, "Which backbone converged")
    assert found.answer == "not measured" and "resnet50 learned no more than the mean" in found.because
    trials = [*full_grid(lambda p: 9.0, converged=1), *full_grid(lambda p: 0.1, converged=120)]
    found = answer(evidence(winner("grid", 0.1), grid=trials), "Custom CNNs converge")
    assert found.answer == "confirmed" and "24 learned no more than the mean and are left out" in found.because


def test_a_choice_that_the_test_split_contradicts_is_said_so():
    first = winner("head", 1.5, backbone="vgg16", selected=0.01)
    other = winner("head", 0.2, backbone="resnet50", selected=0.02)
    given = evidence(first, other)
    found = answer(given, "Which model is best")
    assert found.answer == "head vgg16", "the choice stays"
    assert "The splits disagree: better on these" in found.because and "head resnet50" in found.because
    found = answer(given, "Which backbone was best")
    assert found.answer == "not distinguishable" and "The splits disagree" in found.because


def test_claims_are_about_their_own_values_and_any_study_may_decide_them():
    points = [{"learning_rate": lr, "dropout": d} for lr in (1e-2, 1e-3) for d in (0.1, 0.5)]
    others = [trial(point, 0.1 + point["learning_rate"]) for point in points]
    given = evidence(winner("grid", 0.1), others=others)
    assert answer(given, "The learning rate 1e-3").answer == "not measured"
    assert answer(given, "Dropout 0.2").answer == "not measured"
    random = np.random.default_rng(SEED)
    grid = full_grid(lambda p: 1 / p["filters"] * random.uniform(0.9, 1.1))
    single = [trial({"filters": 64}, 1e-3)]
    given = evidence(winner("grid", 0.1), single=single, grid=grid)
    assert answer(given, "More filters").answer == "confirmed", "a better study of one point hides no grid"


def test_of_repeats_the_mean_counts():
    def repeated(filters: int, *scores: float) -> list:
        found = [trial({"filters": filters}, score, parameters=filters) for score in scores]
        for index, (job, _) in enumerate(found):
            job.number = 1000 + filters
            job.repeat = index
        return found

    jobs = [*repeated(8, 0.30, 0.31), *repeated(16, 0.10, 0.90)]
    closed = evidence(grid=jobs).closed[0]
    assert [(job.spec.point["filters"], score) for job, score in closed.points] == [
        (8, pytest.approx(0.305)),
        (16, pytest.approx(0.5)),
    ]


@pytest.mark.parametrize(
    ("length", "converged", "expected", "lowest"),
    [
        (6, 6, "not measured", 24),  # lowest in its last epoch
        (60, 12, "not measured", 24),  # flat, but nobody knows what would come at 100
        (150, 149, "not measured", 24),
        (200, 40, "refuted", 0),
        (140, 120, "confirmed", 0),
    ],
)
def test_a_claim_on_convergence_needs_networks_trained_to_it(length, converged, expected, lowest):
    given = evidence(winner("grid", 0.1), grid=full_grid(lambda p: 0.1, converged=converged, length=length))
    found = answer(given, "Custom CNNs converge")
    assert found.answer == expected
    assert (f"Of {lowest} of them that is a lower limit" in found.because) == bool(lowest)


@pytest.mark.parametrize(("pruned", "expected"), [(3, "confirmed"), (12, "not measured")])
def test_networks_not_trained_to_their_end_may_have_converged_at_any_epoch(pruned, expected):
    lost = POINTS[:pruned]
    grid = full_grid(lambda p: 0.1, converged=120, state=lambda p: "pruned" if p in lost else "done")
    found = answer(evidence(winner("grid", 0.1), grid=grid), "Custom CNNs converge")
    assert found.answer == expected and f"{pruned} more have no score ({pruned} pruned)" in found.because


def test_what_was_measured_to_the_end_of_its_range_only_counts_there():
    curves = [full_grid(lambda p: 0.1, converged=at)[:12] for at in (60, 199)]  # the latter lowest at the end
    found = answer(evidence(winner("grid", 0.1), grid=[*curves[0], *curves[1]]), "Custom CNNs converge")
    assert found.answer == "in part", "whenever those converge: a quarter does before the range, and one beyond it"


def test_pairs_that_diverged_or_were_pruned_leave_a_claim_open_with_their_number():
    random = np.random.default_rng(SEED)
    score = lambda p: 0.1 * (0.96 if p["learning_rate"] == 1e-3 else 1) * random.uniform(0.995, 1.005)  # noqa: E731
    claim = "The learning rate 1e-3"
    assert answer(evidence(winner("grid", 0.1), grid=full_grid(score)), claim).answer == "confirmed"
    for state in ("diverged", "pruned", "dead"):
        lost = [point for point in POINTS if point["learning_rate"] == 1e-3][:6]
        grid = full_grid(score, lambda p: state if p in lost else "done")  # noqa: B023
        found = answer(evidence(winner("grid", 0.1), grid=grid), claim)
        assert found.answer == "not measured" and f"6 of 12 pairs lack a score (6 {state})" in found.because
    every = full_grid(score, lambda p: "diverged" if p["learning_rate"] == 1e-3 else "done")
    found = answer(evidence(winner("grid", 0.1), grid=every), claim)
    assert found.answer == "not measured" and "12 of 12 pairs lack a score (12 diverged)" in found.because


def test_a_claim_stands_where_the_lost_pairs_could_not_turn_it():
    score = lambda p: {8: 2.5, 16: 1.0, 32: 0.5}[p["filters"]] * (1 + p["dropout"])  # noqa: E731
    lost = [point for point in POINTS if point["filters"] == 8][:1]
    for state in ("diverged", "cancelled"):
        grid = full_grid(score, lambda p: state if p in lost else "done")  # noqa: B023
        found = answer(evidence(winner("grid", 0.1), grid=grid), "More filters")
        assert found.answer == "confirmed"
        assert f"1 of 8 pairs lack a score (1 {state})" in found.because
        assert answer(evidence(winner("grid", 0.1), grid=grid), "Does more capacity").answer == "yes"
    pruned = full_grid(score, lambda p: "pruned" if p in lost else "done")
    assert answer(evidence(winner("grid", 0.1), grid=pruned), "Does more capacity").answer == "not measured"


def test_survivors_of_a_pruner_never_decide_and_lost_pairs_never_refute_what_holds():
    """The truth: 32 filters make the NMSE 0.8 times that of 8, with noise of 20 %. Half of the networks are lost: the
    worse half, as a pruner does it, or at random."""
    random = np.random.default_rng(SEED)
    said: dict[str, set[str]] = {"pruned": set(), "dead": set()}
    for _ in range(40):
        scores = [0.1 * {8: 1, 16: 0.9, 32: 0.8}[p["filters"]] * np.exp(random.normal(0, 0.2)) for p in POINTS]
        for state, order in (("pruned", np.argsort(scores)), ("dead", random.permutation(len(POINTS)))):
            kept = set(order[: len(POINTS) // 2])
            grid = [
                trial(point, value, parameters=100 * point["filters"], state="done" if index in kept else state)
                for index, (point, value) in enumerate(zip(POINTS, scores, strict=True))
            ]
            said[state].add(answer(evidence(winner("grid", 0.1), grid=grid), "More filters").answer)
    assert said == {"pruned": {"not measured"}, "dead": {"not measured"}}, f"seed {SEED}"


def test_networks_of_unequal_epochs_are_not_compared_in_silence():
    short = {"length": 60}
    given = evidence(
        winner("baseline", 1.2),
        winner("grid", 0.6, **short),
        winner("head", 1.0, backbone="vgg16", converged=20),
        winner("head", 0.8, backbone="resnet50", converged=9, **short),
        winner("fine-tuned", 0.3, backbone="vgg16", **short),
    )
    found = answer(given, "Did tuning improve")
    assert found.answer == "yes" and "60 for grid; 200 for baseline" in found.because
    for question in ("Did fine-tuning help", "Which model is best"):
        assert "unequal epochs" in answer(given, question).because, question
    assert "unequal epochs" not in answer(given, "What helped more").because, "both had 60"
    found = answer(given, "Which backbone converged")
    assert found.answer == "not measured" and "60 for head resnet50" in found.because


def test_a_backbone_still_improving_is_not_called_fastest_but_may_be_called_slower():
    still, flat = winner("head", 0.8, backbone="vgg16", converged=199), winner("head", 0.7, backbone="resnet50")
    found = answer(evidence(still, flat), "Which backbone converged")
    assert found.answer == "resnet50" and "vgg16 at least 199" in found.because
    short = winner("head", 0.7, backbone="resnet50", converged=5, length=5)
    found = answer(evidence(short, winner("head", 0.8, backbone="vgg16", converged=5, length=5)), "Which backbone conv")
    assert found.answer == "not measured"


def test_splits_do_not_disagree_by_chance_when_many_models_are_compared():
    """All models are equally good on cells not seen. At 95 % each, one of twenty would be called better than the first
    in some 40 % of the draws; together in some 5 %."""
    likeness, disagree = winner("grid", 0.5), 0
    for seed in range(20):
        random = np.random.default_rng([SEED, seed])
        first, *others = (
            dataclasses.replace(likeness, nmse=1.0, predicted=TRUTH + random.normal(0, 0.5, TRUTH.shape))
            for _ in range(21)
        )
        found = answer(evidence(first, *others), "Which model is best").because
        assert "for all 20 comparisons together" in found or "The splits disagree" not in found
        disagree += "The splits disagree" in found
    assert disagree <= 4, f"seed {SEED}: {disagree} of 20"


def test_heads_that_converge_as_claimed_confirm_it():
    heads = [winner("head", 0.5, backbone=name) for name in ("vgg16", "resnet50")]
    trials = [trial({"backbone": name}, 0.5, converged=15) for name in ("vgg16", "resnet50", "densenet121")]
    assert answer(evidence(*heads, head=trials), "Heads converge").answer == "confirmed"


def test_a_model_is_called_better_than_the_volume_fraction_only_beyond_the_interval():
    better, worse = winner("grid", 0.1), winner("grid", 3.0)
    given = evidence(better, worse)
    assert against(given.tested, better.predicted).startswith("better than")
    assert against(given.tested, worse.predicted).startswith("worse than")


@pytest.mark.parametrize(("error", "word"), [(0.1, "better than"), (1.0, "not distinguishable"), (3.0, "worse than")])
def test_a_network_is_needed_only_if_it_is_better_than_descriptors(error, word):
    predicted = TRUTH + np.random.default_rng([SEED, 8]).normal(0, error, TRUTH.shape)
    alone = dataclasses.replace(winner("grid", error), predicted=predicted)
    assert not sections._need(evidence(alone)), "an earlier closing did not fit them"
    described = TRUTH + np.random.default_rng([SEED, 7]).normal(0, 1.0, TRUTH.shape)
    given = evidence(dataclasses.replace(alone, described=described))
    assert not sections._need(given), "nor did one whose predictions were made again"
    test = metrics.scores(described, TRUTH, train_variance=given.train_variance)
    ended = ClosingResult(predictors={metrics.DESCRIPTORS: SplitScores(validation=test, test=test)})
    given = dataclasses.replace(given, closed=[dataclasses.replace(given.closed[0], ended=ended)])
    (sentence,) = sections._need(given)
    assert f"the selected model is {word}" in sentence
    assert sentence.endswith(": yes." if word.startswith("better") else ": no.")


@pytest.mark.parametrize(
    ("r2", "words"),
    [(None, "an unknown part"), (-0.1, "nothing"), (0.894, "89.4 %"), (0.99956, "99.96 %"), (0.999996, "99.9996 %")],
)
def test_what_a_model_leaves_unexplained_is_not_rounded_away(r2, words):
    assert sections.percent(r2) == words
