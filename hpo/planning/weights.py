"""Files of pretrained weights that a study begins with: torchvision's, and those of the user's."""

from pathlib import Path

from hpo.errors import StudyError
from hpo.files import sha256_of
from hpo.study import Study
from hpo.study.records import WeightsFile
from hpo.study.specification import combinations
from models import specs
from models import weights as pretrained


def weights_files(chosen: Study, *, trial_run: bool) -> dict[str, WeightsFile]:
    """Return name and SHA-256 of each file, by what `Study.pretrained` gives.

    Raise SpecError or StudyError if a file is missing, or does not fit. For a trial run files of torchvision's that are
    not there yet do without a digest.
    """
    own = (chosen.starts_from or chosen).weights_files
    files = {}
    for key in chosen.pretrained():
        if key in pretrained.FILES:
            name = pretrained.FILES[key]
            sha256 = "" if trial_run and pretrained.absent(name) else pretrained.find(name)[1]
        else:
            name, sha256 = key, _checked(chosen.starts_from or chosen, Path(own[key]))
        files[key] = WeightsFile(name=name, sha256=sha256)
    return files


def _checked(chosen: Study, path: Path) -> str:
    """Return the SHA-256 of a file of weights. Raise StudyError unless it fits each backbone that would begin with it.

    Reading it imports torch, which takes seconds.
    """
    if not path.is_file():
        raise StudyError(f"model.weights: expected a file of weights at {path}, found none.")
    models = [specs.to_dict(chosen.specifications(point)[0]) for point in combinations(chosen, "backbone", "weights")]
    for backbone in dict.fromkeys(model["backbone"] for model in models if model["weights"] == path.name):
        try:
            pretrained.load(path, backbone)
        except specs.SpecError as error:
            raise StudyError(f"model.weights: {error}") from None
    return sha256_of(path)
