"""What is wrong or doubtful in the content of a data set is found by name, and clean sets raise nothing."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cells
import numpy as np
import pytest
from PIL import Image
from places import ROOT

from data_pipeline import dataset as data_sets
from data_pipeline.components import COMPONENTS, vector
from data_pipeline.dataset import DEFAULT, Understanding
from data_pipeline.findings import COMPARISONS, DOUBTS, ERRORS
from data_pipeline.homogenize import homogenize
from data_pipeline.morphology import draw
from data_pipeline.phase import Phase
from data_pipeline.sources import Notes
from hpo import settings, study
from hpo.cli.main import main
from hpo.errors import StudyError
from hpo.operations import dry_run
from hpo.planning import plans
from hpo.planning.content import findings
from hpo.planning.preparation import prepare
from hpo.worker.devices import CPU

SEED = 3
EXAMPLES = {name: ROOT / "examples" / name for name in ("stiffness", "electrode", "fibres")}
SPLIT = {"small-split"}  # of a set of few images; true of every small set


@pytest.fixture(scope="module")
def sets():
    """The shipped set and the examples."""
    return {"shipped": data_sets.load(DEFAULT)} | {name: data_sets.load(folder) for name, folder in EXAMPLES.items()}


def look(data) -> list:
    """All findings about a data set, as a folder of it would have them."""
    rows = tuple(f"row {index}" for index in range(len(data.names)))
    return list(findings(Understanding(folder=DEFAULT, dataset=data, rows=rows, notes=Notes())))


def names(data) -> set[str]:
    return {finding.name for finding in look(data)}


@pytest.mark.parametrize("name", ["shipped", *EXAMPLES])
def test_the_shipped_set_and_the_examples_raise_neither_error_nor_doubt(sets, name):
    assert look(sets[name]) == []


@pytest.mark.parametrize("size", [8, 32])
def test_labels_compared_with_resized_images_are_doubted_and_stop_nothing(size):
    found = {finding.name: finding.kind for finding in findings(data_sets.understand(DEFAULT, image_size=size))}
    assert found["resized"] == found["outside-bounds"] == "doubt" and "error" not in found.values()


@pytest.mark.parametrize("kind", ["pictures", "arrays", "one array"])
def test_resized_images_of_every_kind_are_named(tmp_path, kind):
    images = np.random.default_rng(SEED).integers(0, 255, (6, 12, 12), dtype=np.uint8)
    if kind == "one array":
        np.save(tmp_path / "cells.npy", images)
    for number, image in enumerate(images):
        if kind == "pictures":
            Image.fromarray(image).save(tmp_path / f"{number}.png")
        elif kind == "arrays":
            np.save(tmp_path / f"{number}.npy", image)
    (tmp_path / "labels.csv").write_text("modulus\n" + "".join(f"{number}.5\n" for number in range(6)))
    stated = 'table = "labels.csv"\ntargets = ["modulus"]\nperiodic = false\nmatch = "row"\nlevels = "grey"\n'
    (tmp_path / "dataset.toml").write_text(stated)
    understood = data_sets.understand(tmp_path, image_size=4)
    assert understood.notes.errors == understood.notes.questions == []
    (finding,) = [finding for finding in understood.notes.findings if finding.name == "resized"]
    assert finding.images == (0, 1, 2, 3, 4, 5) and "6 of 6 images were resized to 4 x 4 pixels" in finding.sentence
    assert not data_sets.understand(tmp_path, image_size=12).notes.findings


# --- corruptions: each is named by its finding ---


def labels(change):
    """A corruption of the labels (n, k) of some rows."""

    def corrupt(data, random):
        targets = data.targets.copy()
        rows = np.sort(random.choice(len(targets), max(4, len(targets) // 20), replace=False))
        change(targets, rows)
        return replace(data, targets=targets)

    return corrupt


def pixels(change):
    """A corruption of the images (n, c, h, w) of some rows."""

    def corrupt(data, random):
        images = data.images.copy()
        rows = np.sort(random.choice(len(images), max(4, len(images) // 20), replace=False))
        return replace(data, images=change(images, rows, random))

    return corrupt


def put(value, column=0):
    def change(targets, rows):
        targets[rows, column] = value

    return labels(change)


def times(factor, columns=slice(None)):
    def change(targets, rows):
        targets[np.ix_(rows, np.arange(targets.shape[1])[columns])] *= factor

    return labels(change)


def one(factor, column=0):
    def change(targets, rows):
        targets[rows[0], column] *= factor

    return labels(change)


def swapped(first, second, *, share=1.0):
    def corrupt(data, random):
        targets = data.targets.copy()
        rows = random.random(len(targets)) < share
        pair = [COMPONENTS.index(first), COMPONENTS.index(second)]
        targets[np.ix_(rows, pair)] = targets[np.ix_(rows, pair[::-1])]
        return replace(data, targets=targets)

    return corrupt


def rolled(shift):
    def corrupt(data, random):
        return replace(data, targets=np.roll(data.targets, shift, axis=0))

    return corrupt


def exchanged(data, random):
    """The labels of some rows are those of others."""
    targets = data.targets.copy()
    rows = random.choice(len(targets), 60, replace=False)
    targets[rows] = targets[np.roll(rows, 1)]
    return replace(data, targets=targets)


def all_equal(images, rows, random):
    return np.repeat(images[:1], len(images), axis=0)


def copied(images, rows, random):
    images[rows] = images[(rows + 1) % len(images)]
    return images


def faint(images, rows, random):
    images[rows] /= 255
    return images


def all_faint(images, rows, random):
    return images / np.float32(255)


def blurred(images, rows, random):
    images[rows] = (images[rows] + np.roll(images[rows], 1, axis=3)) / 2
    return images


def extra_channel(images, rows, random):
    return np.concatenate([images, np.ones_like(images[:, :1])], axis=1)


def near(data, random):
    """Test images that are training images but for a few pixels."""
    images, test = data.images.copy(), data.split.test[:3]
    images[test] = images[data.split.train[:3]]
    images[test, 0, :2, :2] = 1 - images[test, 0, :2, :2]
    return replace(data, images=images)


def constant(data, random):
    targets = data.targets.copy()
    targets[data.split.validation, 0] = targets[data.split.validation[0], 0]
    return replace(data, targets=targets)


def other_material(data, random):
    phases = {"matrix": Phase(3.5, 0.35), "inclusion": Phase(7.0, 0.22)}
    return replace(data, description=replace(data.description, phases=phases))


def softer(data, random):
    phases = {"matrix": Phase(3.5, 0.35), "inclusion": Phase(70.0, 0.33)}
    return replace(data, description=replace(data.description, phases=phases))


CORRUPTIONS = [
    ("shipped", "not-positive-definite", times(-1.0)),
    ("shipped", "flipped-signs", times(-1.0, [0])),
    ("shipped", "sentinels", put(-999.0)),
    ("shipped", "sentinels", put(0.0, 2)),
    ("shipped", "two-scales", times(1e9)),
    ("shipped", "outside-bounds", times(10.0)),
    ("shipped", "outside-bounds", other_material),
    ("shipped", "hill", softer),
    ("shipped", "outside-bounds", exchanged),
    ("shipped", "component-order", swapped("C11", "C33")),
    ("shipped", "component-order", swapped("C12", "C23")),
    ("shipped", "component-order", swapped("C13", "C66")),
    ("shipped", "component-order", swapped("C33", "C12", share=0.3)),
    ("shipped", "outliers", one(1e6)),
    ("shipped", "shifted-rows", rolled(1)),
    ("shipped", "equal-images-other-labels", pixels(copied)),
    ("shipped", "near-duplicates", near),
    ("shipped", "other-levels", pixels(faint)),
    ("shipped", "levels-0-1", pixels(all_faint)),
    ("stiffness", "images-all-equal", pixels(all_equal)),
    ("stiffness", "equal-images-other-labels", pixels(copied)),
    ("stiffness", "other-levels", pixels(blurred)),
    ("stiffness", "constant-channel", pixels(extra_channel)),
    ("stiffness", "constant-labels", constant),
    ("stiffness", "two-scales", times(1e9)),
    ("stiffness", "shifted-rows", rolled(-1)),
    ("fibres", "flipped-signs", times(-1.0)),
    ("fibres", "shifted-rows", rolled(1)),
    ("fibres", "near-duplicates", near),
    ("fibres", "sentinels", put(-9999.0, 1)),
    ("fibres", "outliers", one(1e3, 2)),
    ("electrode", "images-all-equal", pixels(all_equal)),
    ("electrode", "constant-channel", pixels(extra_channel)),
    ("electrode", "outliers", one(1e3)),
]


def test_34_corruptions_are_named_by_the_right_finding(sets):
    print("seed", SEED)
    assert len(CORRUPTIONS) == 34
    missed = []
    for number, (name, finding, corrupt) in enumerate(CORRUPTIONS):
        corrupted = names(corrupt(sets[name], np.random.default_rng(SEED + number)))
        if finding not in corrupted:
            missed.append(f"{number} {name}: expected {finding}, found {corrupted}")
    assert len(missed) <= 2, "\n".join(missed)
    print(missed)


# --- clean sets raise nothing ---

PHASES = [
    (Phase(3.5, 0.35), Phase(70.0, 0.22)),
    (Phase(70e9, 0.33), Phase(3.5e9, 0.35)),
    (Phase(1.0, 0.2), Phase(10.0, 0.2)),
    (Phase(210.0, 0.3), Phase(2.0, 0.45)),
]


@pytest.fixture(scope="module")
def fields():
    """Structures of all morphologies, 24 for each of two sizes (pixels)."""
    return {size: np.stack([draw(SEED, index, size=size).image for index in range(24)]) for size in (48, 64)}


def clean(sets, fields, number):
    """A clean data set of another size, material, morphology or noise."""
    random = np.random.default_rng(SEED + number)
    if number < 8:  # other materials and sizes, labelled by the solver
        matrix, inclusion = PHASES[number % 4]
        structures = fields[(48, 64)[number // 4]][:, ::2, ::2]
        tensors = [homogenize(image, matrix=matrix, inclusion=inclusion, subdivisions=1) for image in structures]
        description = replace(sets["shipped"].description, phases={"matrix": matrix, "inclusion": inclusion})
        images = structures[:, None].astype(np.float32)
        return replace(
            sets["shipped"],
            images=images,
            targets=np.stack([vector(each) for each in tensors]),
            names=tuple(f"{index}.png" for index in range(len(images))),
            description=description,
        )
    data = sets[("shipped", "stiffness", "electrode", "fibres")[number % 4]]
    rows = np.sort(random.choice(len(data.images), min(len(data.images), 80) - number % 7, replace=False))
    targets, images = data.targets[rows], data.images[rows]
    targets = targets * (1 + random.choice([0, 1e-3, 3e-3]) * random.normal(size=targets.shape))  # noise
    targets = targets * (1.0 if "phases" in vars(data.description) and data.phases else random.choice([1.0, 1e-9, 1e6]))
    if number % 3 == 0:
        images = images.repeat(2, axis=2).repeat(2, axis=3)
    if number % 5 == 0 and not data.phases:  # a camera's noise
        images = np.clip(images + 0.05 * random.normal(size=images.shape), 0, 1).astype(np.float32)
    kept = tuple(data.names[row] for row in rows)
    return replace(data, images=images, targets=targets, names=kept, given_split=None)


def test_40_clean_variations_raise_nothing(sets, fields):
    print("seed", SEED)
    raised = {number: look(clean(sets, fields, number)) for number in range(40)}
    told = {number: [each.text for each in of if each.name not in SPLIT] for number, of in raised.items()}
    assert not any(told.values()), {number: texts for number, texts in told.items() if texts}


# --- what is said, and how a finding passes ---


def test_the_wrong_rows_are_named_and_no_innocent_one(sets):
    data = sets["shipped"]
    targets = data.targets.copy()
    targets[[5, 400]] *= 3
    (finding,) = [finding for finding in look(replace(data, targets=targets)) if finding.name == "outside-bounds"]
    assert finding.images == (5, 400)
    assert f"2 of 520 tensors lie outside the bounds of Voigt and Reuss by more than 1%: {data.names[5]} (row 5), " in (
        finding.sentence
    )


def test_the_swap_that_makes_tensors_possible_is_named(sets):
    for seed, without in enumerate((False, True)):
        data = swapped("C13", "C23")(sets["shipped"], np.random.default_rng(seed))
        if without:
            data = replace(data, description=replace(data.description, phases=None))
        (finding,) = [finding for finding in look(data) if finding.name == "component-order"]
        assert "C23 and C13 change places" in finding.sentence
        assert len(finding.images) > 200 and len(finding.images) == int(finding.sentence.split()[0])


def written(folder, change=lambda rows: None, text="") -> Path:
    """A folder in the course's form whose table `change` has changed, (rows, index and components)."""
    cells.make(folder, count=40)
    table = next(folder.glob("*.csv"))
    rows = np.loadtxt(table, delimiter=",")
    change(rows)
    table.write_text("\n".join(",".join([str(int(row[0])), *map(repr, row[1:].tolist())]) for row in rows))
    (folder / "dataset.toml").write_text(f'{text}\nname = "tiny"\nunit = "GPa"\n')
    return folder


def negative(rows):
    rows[[7, 30], 1] *= -1


def test_accept_lets_a_finding_pass_and_the_digest_stays(tmp_path, capsys):
    folder = written(tmp_path / "wrong", negative)
    assert main(["data", "check", str(folder)]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("2 of 40 tensors have an eigenvalue of at most zero: 7_cell.png (row 7), 30_cell.png (row") == 1
    assert output.count("[not-positive-definite]") == 1 and f"{folder}: read, with errors below. 40 images" in output
    digest = data_sets.load(folder).digest
    accept = 'accept = ["not-positive-definite", "flipped-signs"]\n'
    (folder / "dataset.toml").write_text(accept + (folder / "dataset.toml").read_text())
    assert main(["data", "check", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    kinds = {finding["name"]: finding["kind"] for finding in facts["findings"]}
    assert kinds == {"not-positive-definite": "accepted", "flipped-signs": "accepted"}
    assert facts["digest"] == digest and not facts["errors"] and not facts["doubts"]
    (folder / "dataset.toml").write_text('accept = ["not-positive-define"]')
    assert main(["data", "check", str(folder), "--json"]) == 1
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert "accept: expected a list of " in error and error.endswith(" Did you mean 'not-positive-definite'?")


def test_a_new_study_on_wrong_data_is_refused_by_a_dry_run_with_what_to_do(tmp_path):
    file = cells.study(tmp_path, "on-wrong-data", data=written(tmp_path / "wrong", negative), epochs=1)
    plan = prepare(study.load(str(file)), trial_run=True)
    chosen = settings.read({"HPO_HOME": str(tmp_path / "home")})
    with pytest.raises(StudyError, match=r'\(row 7\).*\nCorrect them.*: accept = \["not-positive-definite"\]$'):
        dry_run.estimate(plan, chosen, trainers=1, place=CPU, say=print)
    assert "2 of 40 tensors" in (plan.facts.findings or ())[0]


def test_the_findings_of_a_study_stop_it_only_until_it_is_planned(tmp_path):
    file = cells.study(tmp_path, "planned-once", data=written(tmp_path / "wrong", negative), epochs=1)
    plan = prepare(study.load(str(file)), trial_run=True)

    def queue(*rows):
        return SimpleNamespace(studies=lambda: rows)

    planned, half = (SimpleNamespace(name=plan.name, facts=SimpleNamespace(planned=state)) for state in (True, None))
    plans.require_contents([plan], queue(planned))
    for rows in ((), (half,)):
        with pytest.raises(StudyError, match="2 of 40 tensors"):
            plans.require_contents([plan], queue(*rows))


@pytest.mark.parametrize("form", ["course", "other"])
def test_structure_that_is_in_the_transparency_alone_is_named(tmp_path, capsys, form):
    folder = written(tmp_path / "alpha")
    for index in range(40):
        path = folder / f"{index}_cell.png"
        alpha = Image.open(path)
        grey = Image.new("L", alpha.size, 255 if index else 0)
        Image.merge("LA", (grey, alpha)).save(path)
    if form == "other":
        (folder / "dataset.toml").write_text('images = "*.png"\n')
    assert main(["data", "check", str(folder), "--json"]) == 1
    errors = json.loads(capsys.readouterr().out)["errors"]
    assert sum("40 of 40 images are of one colour, and only the transparency" in error for error in errors) == 1


def test_copies_stay_on_one_side_of_the_split_except_in_the_courses_form(tmp_path):
    folder = written(tmp_path / "copies", lambda rows: rows.__setitem__((slice(20, 40), slice(1, 10)), rows[:20, 1:]))
    for index in range(20):
        shutil.copy(folder / f"{index}_cell.png", folder / f"{index + 20}_cell.png")
    data = data_sets.load(folder)
    assert data.given_split is None and "copies-across-split" in names(data)
    (folder / "dataset.toml").write_text(f'images = "*.png"\ntargets = {json.dumps(COMPONENTS)}\n')
    table = next(folder.glob("*.csv"))
    table.write_text("\n".join([",".join(["cell", *COMPONENTS]), *table.read_text().split()]))
    data = data_sets.load(folder)
    assert data.given_split is not None and not names(data) & {"copies-across-split", "equal-images-other-labels"}
    for part in (data.split.train, data.split.validation, data.split.test):
        assert {(index + 20) % 40 for index in part.tolist()} == set(part.tolist())


# --- names of findings ---


def test_the_documentation_has_each_finding_of_the_code_and_no_other():
    page = (ROOT / "docs" / "reference" / "data.md").read_text()
    section = re.search(r"^## What the check finds in the content$(.*?)^## ", page, re.MULTILINE | re.DOTALL)[1]
    tables = re.split(r"^\| (error|doubt) \| what was found \| why it matters \|$", section, flags=re.MULTILINE)
    assert tables[1::2] == ["error", "doubt"]
    for text, meanings in zip(tables[2::2], (ERRORS, DOUBTS), strict=True):
        rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([^|]+) \| [^|]{10,} \|$", text, re.MULTILINE)
        assert dict(rows) == meanings and len(rows) == len(meanings)
    (sentence,) = re.findall(
        r"the findings that compare labels with images are doubts.*?\. These are (.*?)\.", section, re.DOTALL
    )
    assert set(re.findall(r"`([a-z0-9-]+)`", sentence)) == COMPARISONS
    everywhere = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    accepted = {
        name for names in re.findall(r"accept = \[(.*?)\]", everywhere) for name in re.findall(r'"(.*?)"', names)
    }
    assert accepted and accepted <= (ERRORS | DOUBTS).keys()


def test_every_finding_of_the_code_has_a_meaning_and_the_other_way():
    files = [*(ROOT / "data_pipeline").rglob("*.py"), *(ROOT / "hpo" / "planning").glob("*.py")]
    code = "".join(path.read_text() for path in files)
    made = set(re.findall(r'Finding\(\s*name="(.*?)"', code))
    assert made and made <= (ERRORS | DOUBTS).keys()
    own = (ROOT / "data_pipeline" / "findings.py").read_text()
    elsewhere = code.replace(own, own.partition("@dataclass")[2])  # without the lists of meanings
    assert [name for name in ERRORS | DOUBTS if f'"{name}"' not in elsewhere] == []
