"""The backbones of transfer networks: one record each, of numbers that a test compares with torchvision. No torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of a backbone, from one of its modules up to the next block's."""

    first: str  # name of the module in models.transfer.backbone
    parameters: int
    multiply_adds: (
        int  # of 224x224 pixels; in proportion to the pixels for other sizes, but for rounding at the borders
    )


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A network of torchvision without its top."""

    file: str  # of IMAGENET1K_V1; the eight hexadecimal digits begin its SHA-256
    channels: int  # of its features
    top: tuple[str, ...]  # how the names of the tensors of torchvision's top begin
    blocks: tuple[Block, ...]
    last_side: Callable[[int], int] | None  # of what the last batch-norm sees, of an image's side; None: it has none

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks)

    @property
    def multiply_adds(self) -> int:
        """Of an image of 224x224 pixels."""
        return sum(block.multiply_adds for block in self.blocks)


def _blocks(*rows: tuple[str, int, int]) -> tuple[Block, ...]:
    return tuple(Block(first=name, parameters=count, multiply_adds=work) for name, count, work in rows)


def _rounded_up(side: int) -> int:
    return math.ceil(side / 32)


BACKBONES = {
    "vgg16": Backbone(
        file="vgg16-397923af.pth",
        channels=512,
        top=("classifier.",),
        blocks=_blocks(  # convolutions up to a pooling
            ("0", 38_720, 1_936_392_192),
            ("5", 221_440, 2_774_532_096),
            ("10", 1_475_328, 4_624_220_160),
            ("17", 5_899_776, 4_624_220_160),
            ("24", 7_079_424, 1_387_266_048),
        ),
        last_side=None,
    ),
    "resnet50": Backbone(
        file="resnet50-0676ba61.pth",
        channels=2048,
        top=("fc.",),
        blocks=_blocks(
            ("conv1", 9_536, 118_013_952),
            ("layer1", 215_808, 667_942_912),
            ("layer2", 1_219_584, 1_027_604_480),
            ("layer3", 7_098_368, 1_464_336_384),
            ("layer4", 14_964_736, 809_238_528),
        ),
        last_side=_rounded_up,
    ),
    "densenet121": Backbone(
        file="densenet121-a639ec97.pth",
        channels=1024,
        top=("classifier.",),
        blocks=_blocks(  # a dense block with the transition before it
            ("conv0", 9_536, 118_013_952),
            ("denseblock1", 335_040, 1_040_449_536),
            ("transition1", 952_960, 815_661_056),
            ("transition2", 2_969_856, 651_886_592),
            ("transition3", 2_686_464, 207_126_528),
        ),
        last_side=lambda side: math.ceil(side / 4) // 8,
    ),
    "resnet18": Backbone(
        file="resnet18-f37072fd.pth",
        channels=512,
        top=("fc.",),
        blocks=_blocks(
            ("conv1", 9_536, 118_013_952),
            ("layer1", 147_968, 462_422_016),
            ("layer2", 525_568, 411_041_792),
            ("layer3", 2_099_712, 411_041_792),
            ("layer4", 8_393_728, 411_041_792),
        ),
        last_side=_rounded_up,
    ),
    "efficientnet_b0": Backbone(
        file="efficientnet_b0_rwightman-7f5810bc.pth",
        channels=1280,
        top=("classifier.",),
        blocks=_blocks(
            ("0", 928, 10_838_016),
            ("1", 1_448, 10_035_712),
            ("2", 16_714, 54_945_216),
            ("3", 46_640, 37_939_584),
            ("4", 242_930, 43_555_200),
            ("5", 543_148, 86_102_400),
            ("6", 2_026_348, 91_528_224),
            ("7", 717_232, 29_520_000),
            ("8", 412_160, 20_070_400),
        ),
        last_side=_rounded_up,
    ),
    "convnext_tiny": Backbone(
        file="convnext_tiny-983f1562.pth",
        channels=768,
        top=("classifier.2.",),  # the normalisation before it belongs to the features
        blocks=_blocks(  # a stage with the reduction of the sides before it
            ("0", 242_784, 752_338_944),
            ("2", 992_256, 773_563_392),
            ("4", 11_112_960, 2_171_893_248),
            ("6", 15_472_128, 756_967_680),
        ),
        last_side=None,  # its normalisations are over the channels
    ),
}
