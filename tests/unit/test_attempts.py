"""The rules by which attempts count against a trial, on any history of attempts."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hpo.queue import Attempt, AttemptOutcome, is_exhausted
from hpo.queue.attempts import COUNTED_LIMIT, LIMIT, counted, without_progress

FAULTS = [outcome for outcome in AttemptOutcome if outcome.failed and outcome is not AttemptOutcome.NOT_RECORDED]
ATTEMPTS = st.builds(
    Attempt,
    job=st.just(1),
    fence=st.just(0),
    host=st.sampled_from(["lab", "node-7"]),
    device=st.sampled_from(["cpu", "cuda:0"]),
    began=st.just(0.0),
    checkpoint=st.none() | st.integers(1, 9),
    outcome=st.none() | st.sampled_from(AttemptOutcome),
    alone=st.booleans(),
    forgiven=st.booleans(),
)


def histories(attempts: st.SearchStrategy[Attempt] = ATTEMPTS) -> st.SearchStrategy[list[Attempt]]:
    """Attempts of one job, in the order of their fences."""
    listed = st.lists(attempts, max_size=12)
    return listed.map(lambda history: [replace(attempt, fence=n) for n, attempt in enumerate(history, start=1)])


def attempts(*outcomes: AttemptOutcome, **values) -> list[Attempt]:
    given_values = {"job": 1, "host": "lab", "device": "cpu", "began": 0.0} | values
    return [Attempt(fence=fence, outcome=outcome, **given_values) for fence, outcome in enumerate(outcomes, start=1)]


@given(histories(), st.randoms())
def test_only_the_fences_say_in_which_order_attempts_came(history, random):
    shuffled = random.sample(history, len(history))
    assert counted(shuffled) == counted(history) and is_exhausted(shuffled) == is_exhausted(history)


@given(histories())
def test_only_failures_without_progress_count_and_none_is_forgiven_twice(history):
    failures = without_progress(history)
    assert set(counted(history)) <= set(failures) <= set(history)
    assert all(attempt.outcome.failed and not attempt.forgiven for attempt in failures)
    forgiven = [replace(attempt, forgiven=True) for attempt in history]
    assert not without_progress(forgiven) and not is_exhausted(forgiven)


@given(histories(), ATTEMPTS)
def test_no_attempt_makes_an_exhausted_job_one_that_may_be_tried_again(history, attempt):
    later = [*history, replace(attempt, fence=len(history) + 1)]
    assert is_exhausted(later) >= is_exhausted(history)


@given(histories(ATTEMPTS.filter(lambda attempt: attempt.outcome is None or not attempt.outcome.failed)))
def test_handing_back_never_exhausts_a_job(history):
    assert not is_exhausted(history)


@given(st.lists(st.sampled_from(FAULTS), min_size=1, max_size=20), st.booleans())
def test_failures_that_each_commit_a_newer_checkpoint_never_exhaust_a_job(outcomes, alone):
    history = [replace(attempt, checkpoint=attempt.fence, alone=alone) for attempt in attempts(*outcomes)]
    assert not is_exhausted(history)
    standing = [replace(attempt, checkpoint=1) for attempt in history]
    assert len(without_progress(standing)) == len(history) - 1, "an older checkpoint is no progress"


@given(st.lists(st.sampled_from(FAULTS), min_size=LIMIT, max_size=LIMIT), st.booleans())
def test_six_failures_of_any_kind_without_progress_exhaust_a_job(outcomes, alone):
    assert is_exhausted(attempts(*outcomes, alone=alone))


@given(st.integers(0, LIMIT - 1))
def test_place_faults_alone_exhaust_a_job_after_six_only(count):
    history = attempts(*[AttemptOutcome.PLACE_FAILED] * count)
    assert not counted(history) and not is_exhausted(history)


@given(st.lists(st.sampled_from(["lab", "node-1", "node-2", "node-3"]), max_size=LIMIT - 1))
def test_an_expired_lease_counts_once_for_each_place(hosts):
    history = [
        replace(attempt, host=host)
        for attempt, host in zip(attempts(*[AttemptOutcome.LOST] * len(hosts)), hosts, strict=True)
    ]
    assert len(counted(history)) == len(set(hosts))
    assert is_exhausted(history) == (len(set(hosts)) >= COUNTED_LIMIT)


@given(st.lists(st.booleans(), max_size=LIMIT - 1))
def test_out_of_memory_counts_where_the_trial_ran_alone(alone):
    history = [
        replace(attempt, alone=was_alone)
        for attempt, was_alone in zip(attempts(*[AttemptOutcome.OUT_OF_MEMORY] * len(alone)), alone, strict=True)
    ]
    assert len(counted(history)) == sum(alone)


def test_three_failures_of_its_own_exhaust_a_job_and_two_do_not():
    assert is_exhausted(attempts(*[AttemptOutcome.FAILED] * COUNTED_LIMIT))
    assert not is_exhausted(attempts(*[AttemptOutcome.FAILED] * (COUNTED_LIMIT - 1)))


def test_a_result_that_cannot_be_recorded_exhausts_a_job_at_once():
    assert is_exhausted(attempts(AttemptOutcome.NOT_RECORDED, checkpoint=7))
