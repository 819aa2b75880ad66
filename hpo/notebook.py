"""What `import hpo` gives in a notebook or a program: the work of the commands, with frames to look at.

    import hpo

    study = hpo.run("grid", data=hpo.dataset("cells", images, targets, unit="GPa"))
    study.trials()  # a frame
    hpo.load("@champion").predict(images)

Each function calls that of `hpo.api`, as the command of its name does.
"""

import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo import __all__ as __all__
from hpo import api
from hpo.errors import NotFound, UserError
from hpo.study.names import AUTO
from hpo.text import toml_text

if TYPE_CHECKING:
    import pandas

warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, which Optuna imports: hpo has its own
dataset, down, evaluate, up = api.write_data, api.down, api.evaluate, api.up


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
        parameter of one of these names is `point.NAME`. Sizes that objectives or bounds name follow, and with several
        objectives `pareto`: whether the configuration is on the front.
        """
        return api.trial_frame(self.name)

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
        text = watch.as_text(lambda console: watch.print_head(console, details))
        if any(job.kind == "closing" and job.closing for job in details.jobs):
            return text + watch.as_text(lambda console: watch.print_result(console, details))
        return f"{text}Not closed: `hpo.run({self.name!r})` goes on.\n"


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
        return api.predict_arrays(self.folder, images, inputs, trust_code=self._trust_code)

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
    kept = tempfile.TemporaryDirectory(prefix="hpo-model-")
    folder = Path(kept.name, "model")
    return Model(folder, name=api.copy_model(str(model), folder), trust_code=trust_code, kept=kept)


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
    from hpo.cli import watch

    short = {"data.path": data, "training.epochs": epochs, "seed": seed}
    if twice := [key for key in settings or {} if short.get(key) is not None]:
        raise UserError(f"settings: {twice[0]} is given by an argument as well: leave one out.")
    overrides = [f"{key}={toml_text(value)}" for key, value in (settings or {}).items()]
    name = study.name if isinstance(study, Study) else str(study)
    compute = api.Compute(device=device, trainers=trainers)
    if name == AUTO:
        given = {"epochs": epochs, "settings": settings} | options
        return _auto(str(data) if data else None, seed or 0, compute, given)
    loaded = api.load(name, data=str(data) if data else None, epochs=epochs, seed=seed, overrides=overrides)
    with nullcontext(watch.Cell()) if _is_notebook() else watch.Terminal(is_run=True) as display:
        done = api.run(loaded, compute=compute, watch=display, **options)
    return Study(done.outcomes[-1].row.name)


def _auto(data: str | None, seed: int, compute: api.Compute, options: Mapping[str, Any]) -> Study:
    """Search within a budget, print what it came to, and return the champion's study, or that which was stopped."""
    from hpo.cli import auto, watch

    budget = options.get("budget") or api.Budget()
    if other := [name for name, value in options.items() if value is not None and name != "budget"]:
        raise UserError(f"{other[0]}: expected nothing beside study={AUTO!r}, which chooses studies and sizes itself.")
    if budget.until is not None:
        raise UserError(f"budget: expected max_hours alone beside study={AUTO!r}, found until={budget.until!r}.")
    with nullcontext(watch.Cell()) if _is_notebook() else watch.Terminal(is_run=False) as display:
        done = api.auto(data=data, seed=seed, max_hours=budget.max_hours, compute=compute, watch=display)
    if done.is_finished:
        print(watch.as_text(lambda console: auto.show(console, done)))
    return Study(done.study)


def _is_notebook() -> bool:
    """Return whether a kernel of Jupyter runs this, and not a terminal."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _frame(compared: Any) -> "pandas.DataFrame":
    import pandas

    columns = {thing.name: thing.values for thing in (*compared.things, *compared.predictors)}
    frame = pandas.DataFrame(columns)
    frame.attrs["unit"] = compared.unit
    return frame
