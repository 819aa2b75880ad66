"""Families of networks side by side: `python bench/families.py HOME [--seeds N …] [--sets NAME …] [--studies NAME …]`.

Each line is a study that `hpo run` plans, trains, selects by validation and closes, on two trainers; its scores are
those of `hpo report`: of the test split, beside the baseline predictors. HOME keeps services, studies and data, so that
the script goes on where it was stopped, and further seeds are added to those that are there. A study that cannot be
run, such as heads of backbones whose weights are not there, is "not measured", with hpo's reason.

Sets: `declared` is the shipped data set. `wrapping` has the same images, labels and split, but says only that the
images wrap around: no phases, no symmetry; `bare` does not even say that. The others are those of examples/.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from machine import machine, versions

from data_pipeline import dataset
from data_pipeline.split import split
from hpo import study
from hpo.planning.preparation import prepare

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STATED = """\
name = "{name}"
images = "*.png"
table = "labels.csv"
match = {{column = "image"}}
targets = {targets}
levels = "grey"
split = "part"
periodic = {periodic}
"""
CPUS = "2"  # trainers
SETS = ("bare", "wrapping", "declared", "electrode", "fibres", "stiffness")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", metavar="HOME", type=Path, help="folder for services, studies and data; kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS, metavar="NAME", help=", ".join(SETS))
    parser.add_argument("--studies", nargs="+", default=["descriptors", "tl-head", "conv"], metavar="NAME")
    arguments = parser.parse_args()
    home = arguments.home.resolve()
    environment = environment_of(home)
    print(f"{machine()}; {versions()}; {CPUS} trainers")
    print(f"{'set':10} {'study':12} {'seed':>4} {'R2':>8} {'95 % of R2':>18} {'NMSE':>9} {'minutes':>8}", flush=True)
    try:
        for name in arguments.sets:
            for seed in arguments.seeds:
                for chosen in arguments.studies:
                    _line(name, data_of(name, home), chosen, seed, home, environment)
    finally:
        hpo("down", environment=environment)
    return 0


def _line(name: str, data: str, chosen: str, seed: int, home: Path, environment: dict[str, str]) -> None:
    """Run a study, unless it is closed already, and print its winner and the baseline predictors."""
    begin = time.monotonic()
    settings = [f"data.path={data}", f"seed={seed}"]
    run = hpo("run", "--study", chosen, *(f"--set={each}" for each in settings), environment=environment)
    minutes = (time.monotonic() - begin) / 60
    label = f"{name:10} {chosen:12} {seed:4}"
    if run.returncode:
        reason = (run.stderr.strip() or run.stdout.strip()).splitlines() or ["no message"]
        print(f"{label} not measured: {reason[0]}", flush=True)
        return
    for row in tested(prepare(study.load(chosen, settings)).name, home, environment):
        who = label if row["weights"] is not None else f"  {row['model']}"
        last = f"{minutes:8.1f}" if row["weights"] is not None else ""
        print(f"{who:28} {row['R²']:8.5f} {_interval(row):>18} {row['NMSE']:9.5f} {last}", flush=True)


def _interval(row: dict[str, object]) -> str:
    low, high = row["R² 95 % low"], row["R² 95 % high"]
    return f"[{low:.4f}, {high:.4f}]" if isinstance(low, float) and isinstance(high, float) else ""


def environment_of(home: Path) -> dict[str, str]:
    """Return the environment of commands whose services, studies and data lie in `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HPO_", "MLFLOW_"))}
    return kept | {"HPO_HOME": str(home / "home"), "HPO_TRAINERS": CPUS}


def data_of(name: str, home: Path) -> str:
    """Return what a study gives as its data for one of SETS; the stated ones are written below `home`."""
    if name == "declared":
        return "default"
    return str(stated(home / name) if name in ("bare", "wrapping") else EXAMPLES / name)


def tested(planned: str, home: Path, environment: dict[str, str]) -> list[dict[str, object]]:
    """Return the scores of a closed study's winner and of the baseline predictors on the test split, as reported."""
    report = home / "report"
    shutil.rmtree(report, ignore_errors=True)
    hpo("report", "--study", planned, "-o", str(report), environment=environment).check_returncode()
    rows: list[dict[str, object]] = json.loads((report / "tables" / "models-test.json").read_text(encoding="utf-8"))
    return sorted(rows, key=lambda row: row["weights"] is None)


def hpo(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpo", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def stated(folder: Path) -> Path:
    """Write the shipped images, their labels and their split as a folder that says little else, and return it."""
    if (folder / "dataset.toml").exists():
        return folder
    data = dataset.load(dataset.DEFAULT)
    folder.mkdir(parents=True, exist_ok=True)
    part = {}
    for name in ("train", "validation", "test"):
        part |= dict.fromkeys(getattr(split(len(data.images)), name).tolist(), "training" if name == "train" else name)
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"{target} [{data.unit}]" for target in data.target_names), "part"])
        for number, (name, labels) in enumerate(zip(data.names, data.targets.tolist(), strict=True)):
            shutil.copyfile(dataset.DEFAULT / name, folder / name)
            writer.writerow([name, *labels, part[number]])
    text = STATED.format(
        name=folder.name, targets=json.dumps(list(data.target_names)), periodic=str(folder.name == "wrapping").lower()
    )
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(main())
