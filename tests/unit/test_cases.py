"""Folders as people have them, each from the check to a prediction, with no more than a question answered."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import folders
import numpy as np
import pytest
import trained

from data_pipeline.dataset import load
from hpo.cli.main import main
from hpo.operations.predict import predict

CASES: dict[str, Callable[[Path], object]] = folders.CASES | {
    form: partial(folders.export, form=form) for form in folders.EXPORTS
}
ANSWERS = {"missing": 'missing = "mask"\n'}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_a_case_goes_from_check_to_predict(case, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    CASES[case](folder)
    if case in ANSWERS:
        assert main(["data", "check", str(folder)]) == 1 and ANSWERS[case].strip() in capsys.readouterr().err
        (folder / "dataset.toml").write_text(ANSWERS[case])
    assert main(["data", "check", str(folder)]) == 0
    data = load(folder)
    trained.network(data, tmp_path, epochs=2)
    shown = data.names[:2]
    frame = predict(tmp_path / "trial" / "model", [folder / name for name in shown])
    assert list(frame["image"]) == [str(folder / name) for name in shown]
    assert frame.shape == (2, 1 + data.targets.shape[1]) and np.isfinite(frame.iloc[:, 1:].to_numpy(float)).all()
