"""How large a network is, and which images and batches it takes: in closed form, without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from models.backbones import BACKBONES
from models.specs import (
    HEAD_UNITS,
    INDEPENDENT,
    DescriptorsSpec,
    ModelSpec,
    PythonSpec,
    SpecError,
    StagesSpec,
    TrainingSpec,
    TransferSpec,
    family_name,
    layout,
    physical,
    wraps,
)

# pixels a side: one is left after the last pooling; of descriptors, a pixel with all its neighbours
SMALLEST = {"baseline": 10, "cnn": 4, "transfer": 32, "descriptors": 3}

PATTERNS = 10  # local binary patterns of eight neighbours, alike in every position


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a network is."""

    parameters: int
    trainable: int  # of the parameters
    multiply_adds: int  # of one image, forward, in an epoch; without those of a frozen backbone, which runs only once
    forward: int = 0  # multiply-adds of one image through convolutions and dense layers; 0: unknown, or there are none


def size(spec: ModelSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int = 0) -> Size:
    """Return the size of `models.networks.build` with the same arguments. Raise SpecError as it does."""
    check_image(spec, image_shape)
    if isinstance(spec, TransferSpec):
        return _transfer_size(spec, image_shape, n_targets, n_inputs)
    if isinstance(spec, StagesSpec):
        return _stages_size(spec, image_shape, INDEPENDENT if physical(spec) else n_targets, n_inputs)
    if isinstance(spec, DescriptorsSpec):
        return _descriptors_size(spec, image_shape, n_targets, n_inputs)
    if isinstance(spec, PythonSpec):  # its code would have to run, so a trainer says how many parameters there are
        return Size(parameters=0, trainable=0, multiply_adds=math.prod(image_shape))
    layers = layout(spec)
    channels, height, width = image_shape
    parameters, multiply_adds = 0, 0
    for filters in layers.filters:
        height, width = height - layers.lost, width - layers.lost
        weights = filters * channels * layers.kernel_size**2
        parameters, multiply_adds = parameters + weights + filters, multiply_adds + weights * height * width
        channels, height, width = filters, height // 2, width // 2
    head = _dense(channels * height * width + n_inputs, layers.units, n_targets)
    return _trained(parameters + head.parameters, multiply_adds + head.multiply_adds)


def _trained(parameters: int, multiply_adds: int) -> Size:
    """Return the size of a network all of whose parameters are trained."""
    return Size(parameters=parameters, trainable=parameters, multiply_adds=multiply_adds, forward=multiply_adds)


def _transfer_size(spec: TransferSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int) -> Size:
    backbone = BACKBONES[spec.backbone]
    head = (backbone.channels + n_inputs + 1) * HEAD_UNITS + (HEAD_UNITS + 1) * n_targets
    trained = sum(block.parameters for block in spec.trained)
    # Of a training step a third is forward; the frozen blocks before trained ones do nothing else.
    work = (backbone.multiply_adds + 2 * sum(block.multiply_adds for block in spec.trained)) // 3
    pixels = image_shape[1] * image_shape[2]
    work = work * pixels // 224**2
    dense = (backbone.channels + n_inputs) * HEAD_UNITS + HEAD_UNITS * n_targets
    return Size(
        parameters=backbone.parameters + head,
        trainable=trained + head,
        multiply_adds=work + head if spec.trained else head,
        forward=backbone.multiply_adds * pixels // 224**2 + dense,
    )


def _stages_size(spec: StagesSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int) -> Size:
    channels, height, width = image_shape
    beside = 1 if spec.normalisation == "none" else 2  # a bias, or the shift and scale of a normalisation
    parameters, multiply_adds = 0, 0
    height, width = math.ceil(height / spec.stride), math.ceil(width / spec.stride)
    for stage in range(spec.depth):
        filters = spec.width * 2**stage
        inputs = channels if stage else channels * spec.stride**2  # the first kernel is wider by the stride
        first, second = inputs * filters * spec.kernel_size**2, filters * filters * spec.kernel_size**2
        parameters += first + second + 2 * beside * filters
        multiply_adds += first * height * width
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        multiply_adds += second * height * width
        channels = filters
    inputs = channels + (image_shape[0] if spec.volume_fraction else 0) + n_inputs
    head = _dense(inputs, *[spec.head] if spec.head else [], n_targets)
    return _trained(parameters + head.parameters, multiply_adds + head.multiply_adds)


def reach(spec: DescriptorsSpec, image_shape: Sequence[int]) -> int:
    """Return the longest vector of the two-point statistics, and segment of the lineal path, in pixels."""
    return min(spec.reach, min(image_shape[-2:]) // 2)


def lengths(longest: int) -> tuple[int, ...]:
    """Return the lengths of the lineal path's segments in pixels: 2, 4, 8, … up to the longest."""
    return tuple(2**power for power in range(1, longest.bit_length()))


def plain_count(spec: DescriptorsSpec, image_shape: tuple[int, int, int]) -> int:
    """Return how many descriptors an image has, but for the two-point statistics."""
    paths = 4 * len(lengths(reach(spec, image_shape))) * spec.lineal_path
    return image_shape[0] * (3 + paths + 4 * spec.chords + 3 * spec.grey + PATTERNS * spec.patterns)


def _descriptors_size(spec: DescriptorsSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int) -> Size:
    """Return how many numbers a fit finds, and what descriptors and regressor cost: about one FFT, and a few dozen
    operations a pixel."""
    features = plain_count(spec, image_shape) + spec.components * spec.two_point + n_inputs
    if spec.regressor == "ridge":
        parameters = (features + 1) * n_targets
    elif spec.regressor == "trees":
        parameters = n_targets * (1 + spec.trees * (3 * 2**spec.tree_depth - 2))
    else:
        parameters = spec.images * (features + n_targets)
    pixels = math.prod(image_shape)
    return Size(parameters=parameters, trainable=0, multiply_adds=parameters + 100 * pixels)


def _dense(*units: int) -> Size:
    """Return the size of dense layers between layers of so many units, inputs first."""
    pairs = list(pairwise(units))
    parameters = sum((inputs + 1) * outputs for inputs, outputs in pairs)
    return _trained(parameters, sum(inputs * outputs for inputs, outputs in pairs))


def check_image(spec: ModelSpec, image_shape: Sequence[int]) -> None:
    """Raise SpecError if the model cannot be built for images of (channels, height, width)."""
    smallest = SMALLEST.get(family_name(spec), 0)
    if isinstance(spec, StagesSpec):
        # Two pixels a side after the last stage, and no fewer than the last convolution's padding repeats.
        repeated = {"circular": spec.kernel_size // 2, "reflect": spec.kernel_size // 2 + 1}.get(spec.padding, 0)
        smallest = ((max(2, repeated) - 1) * 2**spec.depth + 1) * spec.stride
        if wraps(spec) and any(side % spec.stride for side in image_shape[1:]):
            raise SpecError(
                f"{family_name(spec)}: stride = {spec.stride}: expected images whose sides are multiples of it, found "
                f"{image_shape[1]}x{image_shape[2]} pixels."
            )
    if min(image_shape[1:]) < smallest or min(image_shape) < 1:
        raise SpecError(
            f"{family_name(spec)}: expected images of at least {smallest}x{smallest} pixels, "
            f"found (channels, height, width) = {tuple(image_shape)}."
        )


def least_batch(spec: ModelSpec, image_shape: Sequence[int]) -> int:
    """Return the smallest number of images in a training batch.

    It is two if a trained batch-norm normalises a single pixel of each image: one number has no variance.
    """
    if not isinstance(spec, TransferSpec) or not spec.trained:
        return 1
    last_side = BACKBONES[spec.backbone].last_side
    return 2 if last_side is not None and {last_side(side) for side in image_shape[1:]} == {1} else 1


def check_batches(spec: ModelSpec, training: TrainingSpec, image_shape: Sequence[int]) -> None:
    """Raise SpecError if the batches are too small for the model. A smaller last batch joins the one before it."""
    if training.batch_size < (least := least_batch(spec, image_shape)):
        raise SpecError(
            f"training: batch_size = {training.batch_size}: with images of {image_shape[1]}x{image_shape[2]} pixels "
            f"the last batch-norm of this backbone normalises one pixel of each: expected at least {least} images in a "
            "batch, or larger images."
        )
