"""Whose code runs in this process and its trainers: what the command line or the caller says, and nothing else."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from hpo.errors import SettingsError
from hpo.study import Study
from models import specs, user


@contextmanager
def trusting(given: Iterable[str], studies: Iterable[Study] = ()) -> Iterator[None]:
    """Let code run meanwhile: that with the digests given, and that in the files beside which studies were loaded.

    Raise SettingsError if a digest is none.
    """
    for digest in given:
        if not re.fullmatch(specs.DIGEST.pattern, digest):
            raise SettingsError(f"--trust-code {digest}: expected a SHA-256, 64 of the signs 0..9 and a..f.")
    with user.trusting({*given, *(digest for study in studies for digest in study.sources)}):
        yield
