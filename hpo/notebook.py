"""What `import hpo` gives in a notebook or a program: the work of the commands, with frames to look at.

    import hpo

    study = hpo.run("grid", data=hpo.dataset("cells", images, targets, unit="GPa"))
    study.trials()  # a frame
    hpo.load("@champion").predict(images)

Each function calls that of `hpo.api`, as the command of its name does.
"""

import io
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hpo import __all__ as __all__
from hpo import api
from hpo.errors import ModelError, NotFound, UserError
from hpo.operations.arrays import write_data
from hpo.queue import Job, State

if TYPE_CHECKING:
    import pandas

    from hpo.report.progress import Progress

warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, which Optuna imports: hpo has its own
dataset, down, evaluate, up = write_data, api.down, api.evaluate, api.up
WIDTH = 100  # characters of what a cell shows
REFRESH = 1.0  # seconds between two looks at the progress


class Study:
    """A planned study. In a notebook it shows its result; `print` does the same."""

    def __init__(self, name: str) -> None:
        """Look up a planned study. Raise NotFound if there is none of this name."""
        self.name = api.show(name).row.name

    @property
    def state(self) -> str:
        """planned, running, interrupted, stopped, paused, closed or half deleted."""
        states = [summary.state for summary in api.studies() if summary.name == self.name]
        if not states:
            raise NotFound(f"The study {self.name} is not there any more: it was deleted.")
        return states[0]

    def trials(self) -> "pandas.DataFrame":
        """Return a row for each trial, the best configuration first: parameters, state and validation scores.

        Columns are number, repeat, state, the parameters by their names, `best_val_nmse`, `best_val_r2`, `best_epoch`,
        `epochs`, `seconds`, `reason` and `run_id`. Scores are NaN of a trial that has not been trained to its end. A
        parameter of one of these names is `point.NAME`.
        """
        import pandas

        from hpo.report import results

        row, jobs = api.jobs(self.name, brief=True)
        space = list(row.specification.space)
        return pandas.DataFrame([_trial(job, space) for job in results.in_order(row, jobs, "score")])

    @property
    def best(self) -> "pandas.DataFrame":
        """The best trial beside the baseline predictors, as `compare` gives them: settings, and scores by target.

        The scores of the test split are among them if the study is closed. Raise NotFound if no trial is done.
        """
        return compare(self.name)

    def model(self, *, trust_code: Sequence[str] = ()) -> "Model":
        """Return the network of the best trial. Raise NotFound if none is trained."""
        return load(self.name, trust_code=trust_code)

    def report(self, folder: str | Path) -> Path:
        """Write the report of this closed study; return its HTML page."""
        return api.report(Path(folder), studies=[self.name]).page

    def __repr__(self) -> str:
        from hpo.cli import watch

        details = api.show(self.name)
        console = _console()
        watch.print_head(console, details)
        if any(job.kind == "closing" and job.closing for job in details.jobs):
            watch.print_result(console, details)
        else:
            console.print(f"Not closed: `hpo.run({self.name!r})` goes on.")
        return _text(console)


def _trial(job: Job, space: Sequence[str]) -> dict[str, Any]:
    result = job.result if job.state == State.DONE else None
    point = job.spec.point if job.spec else {}
    scores = {
        "best_val_nmse": result.best_val_nmse if result else np.nan,
        "best_val_r2": result.validation.r2 if result else np.nan,
        "best_epoch": result.best_epoch if result else None,
    }
    facts = {
        "epochs": job.epochs,
        "seconds": result.seconds if result else np.nan,
        "reason": job.reason,
        "run_id": job.run_id,
    }
    first = {"number": job.number, "repeat": job.repeat, "state": job.state.label}
    taken = first | scores | facts
    parameters = {f"point.{name}" if name in taken else name: point.get(name) for name in space}
    return first | parameters | scores | facts


class Model:
    """A trained network: a downloaded folder, checked against the hashes in the database."""

    def __init__(self, folder: Path, *, name: str, trust_code: Sequence[str] = (), kept: Any = None) -> None:
        self.folder, self.name = folder, name
        self._trust_code, self._kept = tuple(trust_code), kept  # a temporary folder lives as long as the model

    def predict(self, images: Any, inputs: Any = None) -> "pandas.DataFrame":
        """Return a row for each image and a column for each target; units are in `attrs["units"]`.

        `images`: an array (h, w), (n, h, w) or (n, h, w, c) with pixels as in training, PIL images, or paths. `inputs`:
        a frame, or numbers by name, with a row for each image in their order. Raise ModelError as `hpo predict`.
        """
        if isinstance(images, Image.Image):
            images = [images]
        elif isinstance(images, Iterable) and not isinstance(images, (str, np.ndarray)):
            images = list(images)
        if (paths := _paths(images)) is not None:
            if inputs is not None and not isinstance(inputs, (str, Path)):
                raise UserError("inputs: expected the path of a table, as images are given by paths. Or give arrays.")
            table = None if inputs is None else Path(inputs)
            return api.predict(self.folder, paths, table, trust_code=self._trust_code)
        with tempfile.TemporaryDirectory() as folder:
            try:
                paths, table = _write(Path(folder), images, inputs, self.folder)
                frame = api.predict(self.folder, paths, table, trust_code=self._trust_code)
            except ModelError as error:  # its files are temporary
                raise ModelError(str(error).replace(f"{folder}/", "")) from None
        frame["image"] = range(len(frame))
        return frame

    def evaluate(self, folder: str | Path, *, page: str | Path | None = None) -> Any:
        """Return the scores on the labelled images of a folder, beside the baseline predictors; as `hpo evaluate`."""
        return api.evaluate(self.folder, Path(folder), page=Path(page) if page else None, trust_code=self._trust_code)

    def __repr__(self) -> str:
        return f"{self.name} in {self.folder}"


def studies() -> "pandas.DataFrame":
    """Return a row for each planned study, oldest first: state, numbers of trials, best validation NMSE, data."""
    import pandas

    return pandas.DataFrame([asdict(summary) for summary in api.studies()])


def load(model: str | Path = "@champion", *, trust_code: Sequence[str] = ()) -> Model:
    """Return a trained network: of a folder that `hpo download` wrote, or of a name as `hpo compare` takes it.

    `trust_code`: SHA-256 of code of the model's author that may run. Raise NotFound, or ModelError if a file is not as
    recorded.
    """
    if Path(model).is_dir():
        return Model(Path(model), name=str(model), trust_code=trust_code)
    from hpo.operations.evaluate import opened_model

    kept = tempfile.TemporaryDirectory(prefix="hpo-model-")
    folder = Path(kept.name, "model")
    with opened_model(str(model)) as (files, words):
        shutil.copytree(files, folder)
    return Model(folder, name=words, trust_code=trust_code, kept=kept)


def compare(*names: str | Study) -> "pandas.DataFrame":
    """Return studies, trials, runs and versions side by side: a column for each, and one for each baseline predictor.

    Rows are what determines and scores them, as `hpo compare --json`. Raise NotFound.
    """
    return _frame(api.compare(*(name.name if isinstance(name, Study) else name for name in names)))


def run(
    study: str | Path | Study = "grid",
    *,
    data: str | Path | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
    trainers: int | None = None,
    **options: Any,
) -> Study:
    """Plan a study, train it to its end and promote its best network; return the last study of a sequence.

    `study`: a shipped one, the path of a study file, or one that is planned. `settings`: values by key, such as
    `{"training.batch_size": 16}`. `options`: those of `hpo.api.run`. The progress is shown below the cell, or printed.
    Interrupting the kernel keeps what is done: the same call goes on. Services start by themselves. Raise UserError.
    """
    short = {"data.path": data, "training.epochs": epochs, "seed": seed}
    if twice := [key for key in settings or {} if short.get(key) is not None]:
        raise UserError(f"settings: {twice[0]} is given by an argument as well: leave one out.")
    overrides = [f"{key}={_toml(value)}" for key, value in (settings or {}).items()]
    name = study.name if isinstance(study, Study) else str(study)
    loaded = api.load(name, data=str(data) if data else None, epochs=epochs, seed=seed, overrides=overrides)
    compute = api.Compute(device=device, trainers=trainers)
    if _is_notebook():
        done = api.run(loaded, compute=compute, watch=_Cell(), **options)
        return Study(done.outcomes[-1].row.name)
    from hpo.cli.watch import Terminal
    from hpo.report import tables

    with Terminal(tables.console(), is_run=True) as watch:
        done = api.run(loaded, compute=compute, watch=watch, **options)
    return Study(done.outcomes[-1].row.name)


def _toml(value: Any) -> str:
    """Return a value as a study file has it; numbers of NumPy as well."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (list, tuple, np.ndarray)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value.item() if isinstance(value, np.generic) else value, ensure_ascii=False, default=str)


class _Cell(api.Watch):
    """Shows the progress of a study below a cell of a notebook, in one place."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._shown: Any = None  # what IPython updates
        self._next = 0.0

    def say(self, line: str) -> None:
        print(line)

    def begin(self, begun: api.Begun) -> None:
        from IPython.display import Markdown, display

        from hpo.report.progress import Progress

        links = " · ".join(f"[{name}]({link})" for name, link in begun.links.items())
        display(Markdown(f"**{begun.row.name}** {links}"))
        self._progress, self._next = Progress(begun.queue, begun.row), 0.0
        self._shown = display({"text/plain": "…"}, raw=True, display_id=True)

    def tick(self, trouble: str | None) -> None:
        from hpo.queue import DatabaseLost
        from hpo.report.display import View

        now = time.monotonic()
        if self._progress is None or now < self._next:
            return
        self._next = now + REFRESH
        try:
            self._progress.refresh()
        except DatabaseLost:
            trouble = trouble or "database lost, retrying"
        console = _console()
        console.print(View(progress=self._progress, trouble=trouble))
        self._shown.update({"text/plain": _text(console)}, raw=True)

    def end(self, outcome: api.Outcome) -> None:
        text = "Closed." if outcome.closed else "Stopped: what is done is kept. The same call goes on."
        self._shown.update({"text/plain": text}, raw=True)


def _is_notebook() -> bool:
    """Return whether a kernel of Jupyter runs this, and not a terminal."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _console() -> Any:
    from hpo.report import tables

    return tables.plain_console(io.StringIO(), width=WIDTH, is_screen=True)


def _text(console: Any) -> str:
    return str(console.file.getvalue())


def _frame(compared: Any) -> "pandas.DataFrame":
    import pandas

    columns = {thing.name: thing.values for thing in (*compared.things, *compared.predictors)}
    frame = pandas.DataFrame(columns)
    frame.attrs["unit"] = compared.unit
    return frame


def _paths(images: Any) -> list[Path] | None:
    """Return one path or several as a list; None if these are no paths."""
    if isinstance(images, (str, Path)):
        return [Path(images)]
    if isinstance(images, list) and images and all(isinstance(image, (str, Path)) for image in images):
        return [Path(image) for image in images]
    return None


def _write(folder: Path, images: Any, inputs: Any, model: Path) -> tuple[list[Path], Path | None]:
    """Write images and inputs as files that `hpo predict` reads as those of the model's training."""
    from hpo.operations import arrays

    stack = arrays.stack([images] if getattr(images, "ndim", 0) == 2 else images)
    spec = json.loads((model / "spec.json").read_text(encoding="utf-8"))
    layout = data.get("layout") if isinstance(data := spec.get("data"), dict) else None
    if isinstance(layout, dict):
        paths = [folder / arrays.IMAGES]
        stack = arrays.as_trained(stack, layout, tuple(spec["image_shape"][1:]))
        np.save(paths[0], stack, allow_pickle=False)
        names = [str(paths[0])] if len(stack) == 1 else [f"{paths[0]}[{index}]" for index in range(len(stack))]
    else:
        paths = arrays.write_pictures(folder, stack)
        names = list(map(str, paths))
    if inputs is None:
        return paths, None
    rows = arrays.frame(inputs, "inputs")
    if len(rows) != len(names):
        raise UserError(f"inputs: expected a row for each of the {len(names)} images, found {len(rows)} rows.")
    table = folder / arrays.TABLE
    table.write_bytes(arrays.as_csv(rows.drop(columns=arrays.NAMES, errors="ignore"), names))
    return paths, table
