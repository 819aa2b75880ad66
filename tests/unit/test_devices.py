"""Where a worker trains: GPUs that show that they can, or the CPU with the reason."""

import os

import pytest
import torch

from hpo.worker import devices, protocol
from hpo.worker.devices import Place


class Answers:
    """A process that has sent its messages, through a pipe that is ready to be read."""

    def __init__(self, *messages: protocol.Message, ends: bool = False) -> None:
        self._messages, self.closed, self.is_ended = list(messages), ends, False
        self._pipe, self._writer = os.pipe()
        if messages or ends:
            os.write(self._writer, b"\n")

    def fileno(self) -> int:
        return self._pipe

    def messages(self):
        return self._messages

    def kill(self, reason=None) -> None:
        self.is_ended = True

    def close(self, timeout=2.0) -> None:
        os.close(self._pipe)
        os.close(self._writer)

    def obituary(self) -> str:
        return "gpu_test killed by SIGSEGV (exit 139)"


@pytest.fixture
def choose(monkeypatch):
    """Return the place that answers of GPUs 0, 1, … lead to."""

    def choose(*processes, wish="auto"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(str(number) for number in range(len(processes))))
        place = devices.choose(wish, start=lambda log, gpu: processes[int(gpu)])
        assert all(process.is_ended for process in processes) or wish != "auto"
        return place

    return choose


READY = protocol.Ready()
FAILED = protocol.Failed(reason="CUDA error: out of memory")


def test_auto_takes_the_gpus_that_pass_their_test(choose):
    assert choose(Answers(READY), Answers(READY)) == Place(
        device="cuda", gpus=("0", "1"), reason="on GPUs 0, 1, which passed a test"
    )
    assert choose(Answers(FAILED), Answers(READY)) == Place(
        device="cuda",
        gpus=("1",),
        reason="on GPU 1, which passed a test (GPU 0 failed its test: CUDA error: out of memory)",
    )


def test_auto_takes_the_cpu_when_no_gpu_passes_and_says_why(choose, monkeypatch):
    monkeypatch.setattr(devices, "PATIENCE", 0.2)
    assert choose(Answers(FAILED), Answers(ends=True), Answers()) == Place(
        device="cpu",
        reason="on the CPU: GPU 0 failed its test: CUDA error: out of memory; GPU 1 failed its test: its gpu_test "
        "killed by SIGSEGV (exit 139); GPU 2 failed its test: no answer within 0 s",
    )


def test_without_a_visible_gpu_auto_is_the_cpu_and_starts_no_test(choose):
    assert choose() == Place(device="cpu", reason="on the CPU: there is no NVIDIA GPU here, or none is visible")


def test_a_device_that_is_asked_for_is_taken_without_a_test(choose):
    silent = Answers(), Answers()
    assert choose(*silent, wish="cpu") == devices.CPU
    assert choose(*silent, wish="cuda") == Place(device="cuda", gpus=("0", "1"))
    for process in silent:
        process.close()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_cannot_use_fails_its_test_in_a_real_process(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    place = devices.choose("auto")
    assert (place.device, place.gpus) == ("cpu", ())
    assert place.reason.startswith("on the CPU: GPU 0 failed its test: "), place
    assert "PyTorch cannot use it" in place.reason or "build without CUDA" in place.reason
