"""Code of the user's before anything is planned: does it keep to what is expected, on a few images of the data set?"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from data_pipeline.dataset import Dataset
from hpo.study.records import TrialSpec
from hpo.text import first_line, point_text
from hpo.worker import inputs, protocol
from hpo.worker.channel import Send
from hpo.worker.packaging import package
from hpo.worker.probing import begin
from models import bundle, losses, user
from models.checkpoint import State, load_state, save_state
from models.regressor import Regressor, predict
from models.specs import SpecError
from models.training import Diverged, Training

IMAGES, BATCH = 8, 4


def check(request: protocol.Check, send: Send, stop: Event) -> protocol.Checked | protocol.Failed:
    """Build, train and evaluate each network for an epoch; resume, store and load the first one.

    The answer Failed has the user's file and line where the fault lies there.
    """
    dataset, _ = inputs.load_data(request.data)
    device = inputs.device(request.device)
    try:
        for spec in request.specs:
            trial = _Trial(spec, dataset, device)
            trial.check_numbers()
            send(protocol.Alive())
        return protocol.Checked(digest=_Trial(request.specs[0], dataset, device).learned(request.folder))
    except Exception as error:
        reason = user.fault(error)
        if reason is None:
            reason = (
                first_line(error) if isinstance(error, SpecError) else f"{type(error).__name__}: {first_line(error)}"
            )
        at = f" (at {point_text(spec.point)})" if spec.point else ""
        return protocol.Failed(reason=f"{reason}{at}")


@dataclass(frozen=True)
class _Trial:
    spec: TrialSpec
    dataset: Dataset
    device: str

    def _begin(self, state: State | None = None) -> Training:
        training: dict[str, Any] = {"epochs": 2, "batch_size": min(BATCH, self.spec.training["batch_size"])}
        settings = {**self.spec.training, **training, "patience": 0}
        parts = self.dataset.split
        count = min(IMAGES, len(parts.train))
        return begin(self.spec, settings, self.dataset, parts, self.device, images=count, initial=None, state=state)

    def check_numbers(self) -> None:
        """Raise SpecError unless outputs, loss and gradients are finite numbers, and every parameter has a gradient."""
        run = self._begin()
        network = run.network.train()
        images, targets, beside = run._train.take(run._train.shuffle(BATCH, 2)[0])
        outputs = network(images, beside)
        if outputs.dtype != torch.float32 or not outputs.isfinite().all():
            kind = "other numbers" if outputs.dtype == torch.float32 else str(outputs.dtype).removeprefix("torch.")
            raise SpecError(f"the network's outputs: expected finite numbers of float32, found {kind}.")
        terms = losses.terms(run.training) or (lambda first, second: (first - second) ** 2)
        loss = terms(outputs, targets).mean()
        if not loss.isfinite():
            raise SpecError(f"the loss of the first batch: expected a finite number, found {loss.item()}.")
        loss.backward()
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
                what = "none" if parameter.grad is None else "numbers that are not finite"
                raise SpecError(f"the gradient of {name}: expected finite numbers, found {what}.")

    def learned(self, folder: Path) -> str:
        """Return the SHA-256 of what the network learns in two epochs and predicts then.

        Raise SpecError unless a training that goes on from a checkpoint learns the same to the bit, and the stored
        model predicts the same.
        """
        folder.mkdir(parents=True, exist_ok=True)
        whole, part = self._begin(), self._begin()
        try:
            list(whole.epochs())
            next(part.epochs())
        except Diverged as error:
            raise SpecError(str(error)) from None
        save_state(part.state(), folder / "state.safetensors")
        resumed = self._begin(load_state(folder / "state.safetensors"))
        list(resumed.epochs())
        expected, resumed_to = (run.state().tensors for run in (whole, resumed))
        if different := [name for name in expected if not torch.equal(expected[name], resumed_to[name])]:
            raise SpecError(
                f"training that goes on from a checkpoint: expected the same numbers as without an interruption, found "
                f"others in {different[0]}: keep all state in parameters and buffers, and draw random numbers by torch."
            )
        predicted = self._predictions(whole.best_regressor(), folder / "model")
        content = [*(tensor.numpy().tobytes() for tensor in expected.values()), predicted.tobytes()]
        return hashlib.sha256(b"".join(content)).hexdigest()

    def _predictions(self, regressor: Regressor, folder: Path) -> np.ndarray:
        """Return what a model predicts, which is stored and loaded."""
        data = self.dataset
        images, _, *beside = data.part(data.split.train[:BATCH])
        package(
            folder,
            regressor,
            spec=self.spec.model,
            image_shape=tuple(data.images.shape[1:]),
            target_names=data.target_names,
            unit=data.unit,
            example_images=images[:2],
            example_inputs=beside[0][:2] if beside else None,
        )
        expected, predicted = (predict(one, images, *beside) for one in (regressor, bundle.load(folder)[0]))
        if not np.array_equal(expected, predicted):
            raise SpecError(
                "a network with the stored parameters and buffers: expected the same predictions, found others: keep "
                "all state there."
            )
        return expected
