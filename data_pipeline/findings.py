"""What a look at the content of a data set finds: errors, which stop a new study, and doubts, which are told."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.messages import counted

MOST_NAMED = 5  # images or pairs in a sentence

ERRORS = {
    "images-all-equal": "all images are equal",
    "structure-in-alpha": "the pixels of an image are all alike, only its transparency varies, and hpo ignores that",
    "equal-images-other-labels": "equal images, with equal inputs, have labels that differ by over 1 % of their spread",
    "not-positive-definite": "a stiffness tensor with an eigenvalue of at most zero: no material has it",
    "outside-bounds": "a stiffness tensor above Voigt's or below Reuss' bound of the stated phases",
    "hill": "C13, C23 and C33 are not those that C11, C22, C12 and the stated phases give by Hill's relations",
    "component-order": "many tensors become possible when two components change places",
}
DOUBTS = {
    "resized": "images were resized: their labels are those of the images as they were",
    "copies-across-split": "equal images on two sides of a split that hpo does not choose",
    "near-duplicates": "an image of one side of the split is nearly equal to one of another side",
    "levels-0-1": "all pixels are 0 or 1 of 255",
    "other-levels": "few images have other levels than all others: 0 and 1 among 0 and 255, or grey among two levels",
    "constant-channel": "a channel has the same value everywhere",
    "outliers": "a label is further from the median than 20 times the usual distance (robust z)",
    "sentinels": "a number that stands for a missing label, such as -999, or 0 among large labels",
    "two-scales": "the labels of a column form two clusters, at least a factor of 100 apart",
    "flipped-signs": "few labels of a column have the other sign, with a gap around zero",
    "shifted-rows": "labels have nothing to do with their images, but with those of the row before or after",
    "small-split": "fewer than five images in the validation or test split",
    "few-labels": "fewer than five labels of a target in the validation or test split",
    "constant-labels": "the labels of a target do not vary in the validation or test split: no R²",
    "zero-labels": "a label of zero in the validation or test split: no MAPE",
}


# What compares labels with images says nothing certain of images that were resized.
COMPARISONS = {"outside-bounds", "hill", "component-order", "equal-images-other-labels"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong or doubtful, in a sentence with files, rows and their count."""

    name: str  # in ERRORS or DOUBTS
    sentence: str
    images: tuple[int, ...] = ()  # that it concerns; () if all of them, or none in particular
    others: tuple[int, ...] = ()  # for each of these the one that it equals, if that is what was found
    target: str = ""  # if it concerns one alone
    is_accepted: bool = False  # by dataset.toml
    is_uncertain: bool = False  # it compares labels with images that were resized

    @property
    def kind(self) -> str:
        """Whether it is an "error", which stops a new study, a "doubt", or "accepted" by dataset.toml."""
        if self.is_accepted:
            return "accepted"
        return "error" if self.name in ERRORS and not self.is_uncertain else "doubt"

    @property
    def text(self) -> str:
        """The sentence, and the name with which dataset.toml accepts it."""
        return f"{self.sentence} [{self.name}{', accepted' if self.is_accepted else ''}]"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        concerns = {"target": self.target or None, "images": list(self.images), "others": list(self.others)}
        return {"name": self.name, "kind": self.kind, "sentence": self.sentence, **concerns}


def listed(where: Sequence[str], images: Iterable[int]) -> str:
    """Return the first of these images, each with its row, and how many more there are."""
    names = [where[index] for index in images]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def resizing(where: Sequence[str], images: Sequence[int], size: tuple[int, int]) -> Finding:
    """Return the finding that these images were resized to `size` (height, width) in pixels."""
    sentence = (
        f"{counted(len(images), 'image', 'were', of=len(where))} resized to {size[0]} x {size[1]} pixels (nearest "
        f"pixel), and the labels are those of the images as they were: {listed(where, images)}."
    )
    return Finding(name="resized", sentence=sentence, images=tuple(images))


def in_alpha(where: Sequence[str], images: Sequence[int]) -> Finding:
    """Return the finding that these images have their structure in their transparency."""
    sentence = (
        f"{counted(len(images), 'image', 'are', of=len(where))} of one colour, and only the transparency, which hpo "
        f"ignores, varies: {listed(where, images)}. Write the structure as grey values."
    )
    return Finding(name="structure-in-alpha", sentence=sentence, images=tuple(images))
