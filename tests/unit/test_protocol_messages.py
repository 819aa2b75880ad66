"""The messages between a supervisor and its children: one line of JSON each, and nothing else is taken."""

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import records

from hpo.study.records import SplitScores
from hpo.worker import crew, processes, protocol
from hpo.worker.protocol import ProtocolError, decode, encode

VALUES = {
    "int": 7,
    "float": 0.1,
    "str": "ä",
    "Path": Path("/tmp/a\udcff"),
    "pathlib.Path | None": None,
    "str | None": None,
    "int | None": 7,
    "dict[str, models.metrics.Scores] | None": {"old": records.result(0.5).validation},
    "bool": True,
    "dict[str, float] | None": {"d.s": 0.1 + 0.2},
    "models.metrics.Scores | None": records.result(0.5).validation,
    "TrialSpec": records.spec(point={"filters": 8}),
    "tuple[hpo.study.records.TrialSpec, ...]": (records.spec(), records.spec(seed=1)),
    "Scores": records.result(0.5).validation,
    "SplitScores": SplitScores(validation=records.result(0.5).validation),
    "dict[str, hpo.study.records.SplitScores]": {"mean": SplitScores(validation=records.result(0.7).validation)},
}


def example(kind: type) -> protocol.Message:
    return kind(
        **{
            field.name: VALUES.get(str(field.type) if get_args(field.type) else field.type.__name__, {})
            for field in fields(kind)
        }
    )


@pytest.mark.parametrize("kind", protocol.KINDS.values(), ids=list(protocol.KINDS))
def test_a_message_arrives_as_it_was_sent(kind):
    message = example(kind)
    line = encode(message)
    assert decode(line) == message and line.count(b"\n") == 1
    assert not [value for value in vars(decode(line)).values() if isinstance(value, str) and value.startswith("/tmp")]


def test_scores_arrive_to_the_bit_and_what_is_no_number_too():
    metrics = {"val/nmse": 0.1 + 0.2, "train/nmse": math.nan, "mse": math.inf}
    arrived = decode(encode(protocol.EpochDone(number=1, at=2, metrics=metrics))).metrics
    assert repr(arrived) == repr(metrics)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"Traceback (most recent call last)", "expected one of the messages Train, Score"),
        (b"[]", "expected one of the messages"),
        (b'{"message": "Dance"}', 'found b\'{"message": "Dance"}\''),
        (b'{"number": 1}', "expected one of the messages"),
        (b'{"message": "Returned"}', r"Returned: expected the fields \['epoch'\], found \[\]"),
        (b'{"message": "Returned", "epoch": 1, "odd": 2}', r"found \['epoch', 'odd'\]"),
    ],
)
def test_everything_else_is_an_error(line, reason):
    with pytest.raises(ProtocolError, match=reason):
        decode(line)


def test_every_message_of_a_trainer_is_answered_and_the_last_ones_free_it():
    frees = {message.__name__ for message in crew.LAST}
    assert frees == {"Trained", "Returned", "Diverged", "TooLarge", "Failed", "OutOfMemory", "DiskFull", "DataDamaged"}


def piped(content: bytes) -> processes.Process:
    """A process of which only the pipe is there."""
    process = object.__new__(processes.Process)
    process._messages, writer = os.pipe()
    os.set_blocking(process._messages, False)
    os.write(writer, content)
    process._partial, process.closed, process.killed = b"", False, None
    process.kill = lambda reason: setattr(process, "killed", reason)
    process._writer = writer
    return process


def test_a_message_that_arrives_in_pieces_is_taken_when_it_is_whole():
    line = encode(protocol.Returned(epoch=3))
    process = piped(line[:5])
    assert process.messages() == []
    os.write(process._writer, line[5:])
    assert process.messages() == [protocol.Returned(epoch=3)] and not process.closed
    os.close(process._writer)
    assert process.messages() == [] and process.closed
    os.close(process._messages)


def test_a_process_that_speaks_otherwise_is_killed_and_what_it_said_before_counts():
    process = piped(encode(protocol.Ready()) + b'{"message": "Dance"}\n')
    assert process.messages() == [protocol.Ready()]
    assert process.killed.startswith("expected one of the messages")
    os.close(process._messages)
    os.close(process._writer)


def test_a_trainer_that_writes_faster_than_we_read_is_read_in_pieces():
    process = object.__new__(processes.Process)
    process._messages, process._partial, process.closed = os.open("/dev/zero", os.O_RDONLY), b"", False
    assert process.messages() == [] and len(process._partial) == processes.READ and not process.closed
    os.close(process._messages)
