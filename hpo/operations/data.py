"""Make and check labelled data sets."""

from pathlib import Path

from data_pipeline import dataset
from data_pipeline.checks import lacks
from data_pipeline.dataset import Understanding
from data_pipeline.description import FILE
from data_pipeline.errors import DatasetError
from data_pipeline.files import write_atomically
from data_pipeline.phase import Phase
from data_pipeline.synthesize import make as make_data
from hpo.planning.content import findings
from hpo.report import document

__all__ = ["Phase", "Understanding", "check_data", "describe_data", "make_data"]


def check_data(folder: Path, *, image_size: int | None = None, page: Path | None = None) -> Understanding:
    """Return what hpo understands of a folder, with everything that is doubtful, to be asked, or wrong.

    The data set is None if it cannot be read. Errors beside a data set say why no study is trained on it. `page` is an
    HTML file to write, on a data set that can be read. Raise ReportError if it would replace another file.
    """
    if page is not None:
        document.check_page(page)
    understood = dataset.understand(Path(folder), image_size=image_size)
    if (data := understood.dataset) is not None:
        if lack := lacks(data):
            understood.notes.errors.append(f"No study can be trained on it: {lack}.")
        understood.notes.findings[:] = findings(understood)
    for finding in understood.notes.findings:
        kinds = {"error": understood.notes.errors, "doubt": understood.notes.doubts}
        kinds.get(finding.kind, understood.notes.remarks).append(finding.text)
    if page is not None and data is not None:
        from hpo.report import data_page  # matplotlib

        document.write_page(data_page.document(data, understood.rows, understood.notes.findings), page)
    return understood


def describe_data(understood: Understanding) -> Path:
    """Write what was understood as the folder's dataset.toml, with comments; return the file.

    Raise DatasetError if the data are not understood, or such a file is there.
    """
    data, path = dataset.the_dataset(understood), understood.folder / FILE
    if path.exists():
        raise DatasetError(f"{path} is there already. Rename it if another is to be written.")
    write_atomically(path, data.description.to_toml().encode())
    return path
