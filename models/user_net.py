"""A network that a function of the user's makes, as the rest of hpo trains and stores networks."""

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from models import user
from models.scalars import Scalars
from models.specs import PythonSpec, SpecError, training_keys


class Options(Mapping[str, Any]):
    """The options of a function of the user's; it notes which of them were looked at."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self.used = dict(values), set[str]()

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class UserNet(nn.Module):
    """Maps (batch, channels, height, width) images in 0..1, and (batch, n_inputs) scalars, to (batch, n_targets).

    The user's network gets the images, and if there are scalars, these as a second argument, standardised by the
    training split.
    """

    def __init__(self, spec: PythonSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int = 0) -> None:
        super().__init__()
        build = user.function(spec.code, spec.build)
        assert isinstance(build, FunctionType)
        options = Options(spec.options)
        network = build(options, image_shape, n_targets, n_inputs)
        where = f"{user.place_of(build)}: {build.__name__}"
        if not isinstance(network, nn.Module):
            raise SpecError(f"{where}: expected a torch.nn.Module, found {type(network).__name__}.")
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise SpecError(f"{where}: expected a network with parameters to train, found none.")
        if unused := [key for key in options if key not in options.used]:
            near = get_close_matches(unused[0], [*training_keys(), *options.used], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise SpecError(f"{where}: the option {unused[0]!r} is not used{hint}: expected options that it looks at.")
        self.network, self.n_targets, self._where = network, n_targets, where
        self.scalars = Scalars(n_inputs) if n_inputs else None

    def prepare(self, images: Tensor, cache: Path | None, alive: Callable[[], object]) -> Tensor:
        """Return the images as they are."""
        return images

    def forward(self, images: Tensor, inputs: Tensor | None = None) -> Tensor:
        if self.scalars is None or inputs is None:
            outputs = self.network(images)
        else:
            outputs = self.network(images, (inputs - self.scalars.mean) / self.scalars.scale)
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] != self.n_targets:
            what = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise SpecError(f"{self._where}: expected a network with outputs (batch, {self.n_targets}), found {what}.")
        return outputs
