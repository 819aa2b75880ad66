"""Sixty seconds of random faults and commands; `bench/soak.py --minutes N` is the same for longer."""

import secrets

import chaos
import pytest


@pytest.mark.long
@pytest.mark.acceptance
def test_a_minute_of_random_faults_and_commands_violates_no_invariant(tmp_path):
    seed = secrets.randbelow(2**32)
    print(f"seed {seed}: the same faults in the same order, though never at the same moments")
    counts = chaos.run(tmp_path, seconds=60, seed=seed, points=4)
    print(counts)
    assert counts.violations == []
    assert counts.states["done"] and counts.faults.total() >= chaos.FEWEST
