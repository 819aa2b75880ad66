"""`hpo run --study auto` and its rivals, side by side: `python bench/auto.py HOME [--seeds N …] [--lines NAME …]`.

Each line is a data set and a number of hours: the champion that `auto` leaves, on the test split, with two trainers.
Beside it, on the examples, stand the winners of the studies `grid` and `descriptors`, each as long as it takes, and
AutoGluon's tabular predictor on the descriptors of the images, with both cores and as much time as `auto` had. That one
gets an environment of its own, and training and validation images to split as it likes. Where it cannot be installed,
it is "not measured". HOME keeps everything: the script goes on where it was stopped, and further seeds are added to
those that are there. Each line has services of its own, which are down before the next one begins.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import venv
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from families import CPUS, data_of, environment_of, hpo, tested
from machine import machine, versions

from data_pipeline import dataset
from hpo import study
from hpo.planning.preparation import folder_of, prepare

QUARTER = 0.25  # hours
LINES = {  # by name: data set of bench/families.py, hours, and the R2 that is asked for
    "shipped-15": ("declared", QUARTER, 0.998),
    "shipped-60": ("declared", 1.0, 0.999),
    "plain-60": ("wrapping", 1.0, 0.997),
    **{f"{name}-15": (name, QUARTER, None) for name in ("electrode", "fibres", "stiffness")},
}
RIVALS = ("grid", "descriptors", "autogluon")  # of lines without such an R2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", metavar="HOME", type=Path, help="folder for services, studies and data; kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--lines", nargs="+", default=[*LINES], choices=[*LINES], metavar="NAME", help=", ".join(LINES))
    arguments = parser.parse_args()
    home = arguments.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; {versions()}; {CPUS} trainers", flush=True)
    for name in arguments.lines:
        rivals = [] if LINES[name][2] else [*RIVALS]
        for seed in arguments.seeds:
            for who in ("auto", *rivals):
                _measured(home, name, who, seed)
        _show(home, name, ["auto", *rivals])
    return 0


def _measured(home: Path, name: str, who: str, seed: int) -> dict[str, object]:
    """Return a measurement, from the file that keeps it or as it is made now; it has an `r2`, or a `reason`."""
    kept = home / f"{name}.{who}.{seed}.json"
    if not kept.exists():
        begin = time.monotonic()
        result = _autogluon(home, name, seed) if who == "autogluon" else _study(home, name, who, seed)
        result |= {"minutes": (time.monotonic() - begin) / 60}
        kept.write_text(json.dumps(result), encoding="utf-8")
    measured: dict[str, object] = json.loads(kept.read_text(encoding="utf-8"))
    return measured


def _show(home: Path, name: str, sides: list[str]) -> None:
    """Print what was measured of a line, all seeds, and whether it is what is asked for."""
    wanted, of_auto = LINES[name][2], _scores(home, name, "auto")
    for who in sides:
        files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(home.glob(f"{name}.{who}.*.json"))]
        scores = [one["r2"] for one in files if "r2" in one]
        if not scores:
            print(f"{name:14} {who:12} not measured: {files[0]['reason'] if files else 'no seed'}", flush=True)
            continue
        spread = f" ± {stdev(scores):.5f}" if len(scores) > 1 else ""
        minutes = fmean(one["minutes"] for one in files)
        text = f"{name:14} {who:12} R2 {fmean(scores):.5f}{spread}, {len(scores)} seed(s), {minutes:.1f} min"
        if who == "auto" and wanted:
            text += f"; asked for {wanted}: {'met' if fmean(scores) >= wanted else 'NOT met'}"
        elif who != "auto" and of_auto:
            text += f"; auto {fmean(of_auto) - fmean(scores):+.5f}"
        print(text, flush=True)


def _scores(home: Path, name: str, who: str) -> list[float]:
    files = [json.loads(path.read_text(encoding="utf-8")) for path in home.glob(f"{name}.{who}.*.json")]
    return [one["r2"] for one in files if "r2" in one]


def _study(home: Path, name: str, who: str, seed: int) -> dict[str, object]:
    """Run `auto` or a study in a home of its own; return the test scores of the champion, or of the study's winner."""
    chosen, hours, _ = LINES[name]
    data, environment = data_of(chosen, home), environment_of(home / f"{name}-{who}-{seed}")
    words = ["run", "--study", who, "--seed", str(seed), *([] if data == "default" else ["--data", data])]
    words += ["--max-hours", str(hours)] * (who == "auto")
    begin = time.monotonic()
    try:
        run = hpo(*words, environment=environment)
        seconds = time.monotonic() - begin
        if run.returncode:
            return {"reason": ((run.stderr.strip() or run.stdout.strip()).splitlines() or ["no message"])[-1]}
        if who == "auto":
            (planned,) = re.findall(r"^@champion is \S+ version \d+ of ([^\s,]+)", run.stdout, re.MULTILINE)
        else:
            planned = prepare(study.load(who, [f"data.path={data}", f"seed={seed}"])).name
        row = tested(planned, home / f"{name}-{who}-{seed}", environment)[0]
        return {"r2": row["R²"], "nmse": row["NMSE"], "study": planned, "seconds": seconds, "output": run.stdout}
    finally:
        hpo("down", environment=environment)


AUTOGLUON = """
import json, sys
import numpy, pandas
from autogluon.tabular import TabularPredictor
arrays, seconds, folder = numpy.load(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
learned, seen = (pandas.DataFrame(arrays[part]).add_prefix("x") for part in ("learned", "seen"))
targets = arrays["learned_targets"]
predicted = []
for target in range(targets.shape[1]):
    predictor = TabularPredictor("y", path=f"{folder}/{target}", problem_type="regression", verbosity=0)
    predictor.fit(learned.assign(y=targets[:, target]), time_limit=seconds / targets.shape[1], num_cpus=2)
    predicted.append(predictor.predict(seen).tolist())
print(json.dumps(predicted))
"""


def _autogluon(home: Path, name: str, seed: int) -> dict[str, object]:
    """Return the test score of AutoGluon on the descriptors, in an environment of its own."""
    python = home / "autogluon" / "bin" / "python"
    if not (home / "autogluon" / "installed").exists():
        venv.create(home / "autogluon", with_pip=True, clear=True)
        command = [python, "-m", "pip", "install", "--quiet", "autogluon.tabular[lightgbm,xgboost,catboost,fastai]"]
        installed = subprocess.run(command, capture_output=True, text=True, check=False)
        if installed.returncode:
            return {"reason": (installed.stderr.strip().splitlines() or ["pip failed"])[-1]}
        (home / "autogluon" / "installed").touch()
    chosen, hours, _ = LINES[name]
    folder = home / f"{name}-autogluon-{seed}"
    folder.mkdir(exist_ok=True)
    truth = _descriptors(data_of(chosen, home), folder / "descriptors.npz")
    command = [python, "-c", AUTOGLUON, folder / "descriptors.npz", str(3600 * hours), folder / "models"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        return {"reason": (run.stderr.strip().splitlines() or ["no message"])[-1]}
    predicted = np.array(json.loads(run.stdout.splitlines()[-1])).T
    r2 = 1 - ((predicted - truth) ** 2).sum(0) / ((truth - truth.mean(0)) ** 2).sum(0)
    return {"r2": float(r2.mean()), "per_target": r2.tolist()}


def _descriptors(data: str, file: Path) -> np.ndarray:
    """Write all descriptors of the images; return the targets of the test split, as they are trained."""
    from models.descriptor_net import DescriptorNet
    from models.specs import DescriptorsSpec
    from models.splits import tensor

    cells = dataset.load(folder_of(data))
    edges = "periodic" if cells.is_periodic else "open"
    spec = DescriptorsSpec(edges=edges, grey=True, patterns=True, components=40)
    learned = np.concatenate([cells.split.train, cells.split.validation])
    network = DescriptorNet(spec, cells.images.shape[1:], cells.targets.shape[1], 0)
    network.learn_levels(cells.images[learned])
    numbers = network.prepare(tensor(cells.images[learned]), None, lambda: None)
    network.standardise(numbers)
    seen = network.prepare(tensor(cells.images[cells.split.test]), None, lambda: None)
    np.savez(
        file,
        learned=network._features(numbers, None).numpy(),
        seen=network._features(seen, None).numpy(),
        learned_targets=cells.targets[learned],
    )
    return np.asarray(cells.targets[cells.split.test], np.float64)


if __name__ == "__main__":
    sys.exit(main())
