"""Folders as people have them are understood as a colleague would, or end in a question or an error with its remedy."""

import dataclasses
import itertools
import json
import shutil
import tomllib
from pathlib import Path

import folders
import numpy as np
import pandas as pd
import pytest
import watched
from PIL import Image

from data_pipeline.components import COMPONENTS, SYMMETRIES
from data_pipeline.dataset import Understanding, load, understand
from data_pipeline.dataset_keys import UNSTATED
from data_pipeline.errors import DatasetError
from data_pipeline.npz import load_npz, save_npz
from data_pipeline.split import split
from data_pipeline.target_moves import SymmetryProblem, orders
from data_pipeline.target_transforms import undo
from hpo.cli.main import main
from hpo.operations.data import check_data
from models import metrics


def good(folder: Path) -> Understanding:
    understood = understand(folder)
    assert (understood.notes.questions, understood.notes.errors) == ([], [])
    return understood


def write(folder: Path, text: str) -> None:
    (folder / "dataset.toml").write_text(text)


# --- the forms in which people have their data ---

SHAPES = {  # case: images, targets
    "npy and names": ((24, 1, 65, 65), ("E_eff",)),
    "ids": ((20, 1, 256, 256), ("hardness",)),
    "phases": ((24, 5, 16, 16), ("YS",)),
    "hdf5": ((30, 1, 16, 16), ("C11", "C12", "C13", "C22", "C23", "C33")),
    "text": ((24, 1, 28, 28), tuple(f"column {number}" for number in range(2, 14))),
    "tiff and excel": ((24, 1, 16, 16), ("porosity",)),
    "numbered": ((24, 1, 16, 16), ("E",)),
    "course with header": ((24, 1, 16, 16), COMPONENTS),
    "simulations": ((36, 1, 16, 16), ("E",)),
    "permeability": ((24, 1, 16, 16), ("k",)),
    "train and test": ((30, 1, 16, 16), ("E",)),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_folder_is_understood_without_a_word_about_it(case, tmp_path, capsys, monkeypatch):
    folders.CASES[case](tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", ".", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    shape, targets = SHAPES[case]
    assert (facts["images"], facts["channels"], *facts["size"]) == shape
    assert tuple(facts["targets"]) == targets and len(facts["pairs"]) == facts["images"]
    assert main(["data", "check", ".", "--write"]) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
    assert good(tmp_path).to_dict()["digest"] == facts["digest"]  # under the description that was written


def test_file_names_pair_images_with_rows_in_any_order(tmp_path):
    folders.npy_and_names(tmp_path)
    understood = good(tmp_path)
    data = understood.dataset
    expected = folders.stiffness(data.images[:, 0]) * 1e9
    assert np.allclose(data.targets[:, 0], expected, rtol=1e-6) and data.unit == "Pa"
    assert understood.rows[0] == "labels.csv line 25"  # the table is in the reverse order


def test_colours_of_phases_become_a_channel_each(tmp_path):
    folders.phases(tmp_path)
    data = good(tmp_path).dataset
    assert (data.images.sum(axis=1) == 1).all() and set(np.unique(data.images)) == {0, 1}
    assert sorted(data.description.layout.colours) == sorted(map(tuple, folders.PALETTE.tolist()))
    assert data.unit == "MPa"


def test_groups_of_a_file_give_the_split(tmp_path):
    folders.hdf5(tmp_path)
    data = good(tmp_path).dataset
    sides = [{data.names[index].partition("[")[0] for index in part} for part in (data.split.train, data.split.test)]
    assert [len(part) for part in (data.split.train, data.split.validation, data.split.test)] == [20, 5, 5]
    assert sides == [{"data.h5:/train/images"}, {"data.h5:/test/images"}] and data.split.digest != split(30).digest


def test_a_missing_validation_part_is_drawn_from_the_training_part(tmp_path):
    folders.train_and_test(tmp_path)
    data = good(tmp_path).dataset
    assert [len(part) for part in (data.split.train, data.split.validation, data.split.test)] == [20, 4, 6]
    assert {data.names[index].partition(":")[0] for index in data.split.test} == {"test.npz"}


def test_no_group_is_on_two_sides_of_the_split(tmp_path):
    folders.simulations(tmp_path)
    data = good(tmp_path).dataset
    groups = np.array(data.groups)
    sides = [set(groups[part]) for part in (data.split.train, data.split.validation, data.split.test)]
    assert list(map(len, sides)) == [4, 1, 1] and len(set.union(*sides)) == 6


def test_a_data_set_that_grows_keeps_its_test_images(tmp_path):
    (old := tmp_path / "old").mkdir()
    (new := tmp_path / "new").mkdir()
    folders.permeability(old)
    folders.permeability(new)
    labels = folders.cells(16, seed=5)
    folders.pictures(new, [f"a{row}.bmp" for row in range(16)], labels * 255)
    lines = (new / "k.tsv").read_text().splitlines()
    (new / "k.tsv").write_text("\n".join([lines[0], *(f"a{row}\t{row + 1}e-15" for row in range(16)), *lines[1:]]))
    write(new, 'extends = "../old"')
    understood = good(new)
    assert "extends old: its split stays, 16 images are new" in understood.notes.remarks
    before, after = load(old), understood.dataset
    for part in ("train", "validation", "test"):
        names = {before.names[index] for index in getattr(before.split, part)}
        assert names < {after.names[index] for index in getattr(after.split, part)}
    (new / "rock_3.bmp").write_bytes((new / "rock_4.bmp").read_bytes())
    assert wrong(new) == [
        f"extends: expected all {len(before.names)} images of {new / '../old'}, pixel by pixel, found none for "
        "rock_3.bmp. Copy them here, with their labels."
    ]
    write(old, 'extends = "../new"')
    assert wrong(new) == [f"extends: {new} extends itself, through {old}: expected an earlier data set."]
    write(old, 'extends = "."')
    assert wrong(old) == [f"extends: {old} extends itself: expected an earlier data set."]
    write(new, 'extends = "../older"')
    (message,) = wrong(new)
    assert message.startswith(f"extends: The data set in {new / '../older'} has 1 problem:")


def test_a_data_set_that_grows_twice_keeps_the_split_of_both(tmp_path):
    sets = []
    for number, count in enumerate((24, 40, 60)):
        (folder := tmp_path / str(number)).mkdir()
        cells = folders.cells(60, seed=5)[:count]
        folders.pictures(folder, [f"a{row}.bmp" for row in range(count)], cells * 255)
        (folder / "k.tsv").write_text("name\tk\n" + "".join(f"a{row}\t{row + 1}e-15\n" for row in range(count)))
        write(folder, f'extends = "../{number - 1}"' if number else "")
        sets.append(good(folder).dataset)
    for earlier, later in itertools.pairwise(sets):
        for part in ("train", "validation", "test"):
            names = {earlier.names[index] for index in getattr(earlier.split, part)}
            assert names < {later.names[index] for index in getattr(later.split, part)}


def grown(folder, name, count, *, extends="", labels=None, target="k"):
    """A data set of the first `count` of 60 images."""
    (folder := folder / name).mkdir()
    folders.pictures(folder, [f"a{row}.bmp" for row in range(count)], folders.cells(60, seed=5)[:count] * 255)
    values = {row: row + 1 for row in range(count)} | (labels or {})
    (folder / "k.tsv").write_text(f"name\t{target}\n" + "".join(f"a{row}\t{values[row]}e-15\n" for row in values))
    write(folder, f'extends = "../{extends}"' if extends else "")
    return good(folder)


def test_a_data_set_that_grew_twice_names_the_images_of_both(tmp_path):
    first, second, third = (
        grown(tmp_path, str(number), count, extends=str(number - 1) if number else "").dataset
        for number, count in enumerate((24, 40, 60))
    )
    save_npz(third, tmp_path / "prepared.npz")
    for data in (third, load_npz(tmp_path / "prepared.npz")):
        assert [(one.digest, one.split) for one in data.earlier] == [
            (before.digest, before.split.digest) for before in (first, second)
        ]
        for one, before in zip(data.earlier, (first, second), strict=True):
            assert [data.names[index] for index in one.images] == list(before.names)
            for part in ("train", "validation", "test"):
                own = {before.names[index] for index in getattr(before.split, part)}
                assert {data.names[index] for index in one.within(getattr(data.split, part))} == own
    assert third.digest == dataclasses.replace(third, earlier=()).digest and not first.earlier


def test_models_are_not_compared_once_labels_or_targets_have_changed(tmp_path):
    first = grown(tmp_path, "0", 24).dataset
    trained, tested = int(first.split.train[0]), int(first.split.test[0])
    assert grown(tmp_path, "1", 40, extends="0", labels={tested: 100}).dataset.earlier
    corrected = grown(tmp_path, "2", 40, extends="0", labels={trained: 100})
    other = grown(tmp_path, "3", 40, extends="0", target="c")
    for understood, reason in (
        (corrected, "1 image outside the test split has other labels there"),
        (other, "it has other targets"),
    ):
        assert understood.dataset.earlier == ()
        said = f"models of 0 are not compared with those of this data set: {reason}"
        assert said in understood.notes.remarks


def test_the_split_travels_with_the_data(tmp_path):
    folders.simulations(tmp_path)
    data = load(tmp_path)
    save_npz(data, tmp_path / "set.npz")
    assert load_npz(tmp_path / "set.npz").split.digest == data.split.digest != split(36).digest


def test_sixteen_bits_survive_the_way_through_the_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (24, 8, 8)).astype(np.uint16)
    folders.pictures(tmp_path, [f"{row}.tif" for row in range(24)], pixels)
    (tmp_path / "t.csv").write_text("no,E\n" + "".join(f"{row},{row**2}\n" for row in range(24)))
    data = good(tmp_path).dataset
    low, high = data.description.layout.range
    assert np.allclose(data.images[:, 0] * (high - low) + low, pixels, atol=0.01)
    save_npz(data, tmp_path / "set.npz")
    assert np.array_equal(load_npz(tmp_path / "set.npz").images, data.images)
    assert load_npz(tmp_path / "set.npz").digest == data.digest


@pytest.mark.parametrize("name", ["{:04d}_a.png", "{}.png", "cell_{}.png", "{}_x.tif"])
def test_a_column_of_numbers_pairs_with_the_numbers_in_names(tmp_path, name):
    folders.numbered(tmp_path, name)
    understood = good(tmp_path)
    assert "number in the image's name = Image no. +1" in understood.notes.remarks
    assert [row.split()[-1] for row in understood.rows[:3]] == ["2", "3", "4"]
    assert understood.dataset.names[:2] == (name.format(1), name.format(2))


@pytest.mark.parametrize("form", folders.EXPORTS)
def test_an_export_of_excel_is_read(tmp_path, form):
    values = folders.export(tmp_path, form)
    data = good(tmp_path).dataset
    assert np.array_equal(data.targets[:, 0], values)
    assert (data.target_names, data.unit) == (("Härte",), "MPa")


def test_the_courses_columns_under_a_header_are_the_courses_data(tmp_path):
    values = folders.course_with_header(tmp_path)
    data = good(tmp_path).dataset
    assert np.array_equal(data.targets, values[:, ::-1]) and data.symmetries == SYMMETRIES
    rows = [",".join([str(row + 1), *map(repr, line[::-1])]) for row, line in enumerate(values.tolist())]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    assert load(tmp_path).digest == data.digest


def test_units_may_differ_from_target_to_target(tmp_path):
    folders.permeability(tmp_path)
    digest = load(tmp_path).digest
    write(tmp_path, 'units = {k = "mD"}')
    assert (load(tmp_path).unit, load(tmp_path).digest == digest) == ("mD", False)
    table = (tmp_path / "k.tsv").read_text().splitlines()
    lines = [f"{line}\t{len(line) + row}" for row, line in enumerate(table[1:])]
    (tmp_path / "k.tsv").write_text("\n".join([f"{table[0]}\tE [GPa]", *lines]))
    assert load(tmp_path).unit == "their own units"
    assert load(tmp_path).description.layout.units == {"k": "mD", "E": "GPa"}


def test_the_description_that_is_written_says_what_was_understood(tmp_path, capsys):
    folders.phases(tmp_path)
    main(["data", "check", str(tmp_path), "--write"])
    content = tomllib.loads((tmp_path / "dataset.toml").read_text())
    assert content["match"] == {"column": "image"} and content["units"] == {"YS": "MPa"}
    assert content["levels"] == "phases" and content["images"] == ["micrographs/*.png"]
    assert main(["data", "check", str(tmp_path), "--write"]) == 1
    assert "dataset.toml is there already" in capsys.readouterr().err


def test_symmetries_are_completed_and_contradictions_refused():
    names = ("Kxx", "Kyy", "Kxy")
    flips = {"Kxy": "-Kxy"}
    stated = {"flip_horizontal": flips, "flip_vertical": flips, "transpose": {"Kxx": "Kyy"}}
    assert orders(stated, names) == {"flip_horizontal": (0, 1, ~2), "flip_vertical": (0, 1, ~2), "transpose": (1, 0, 2)}
    with pytest.raises(SymmetryProblem, match="transpose: Kyy cannot become -Kxx and also something else"):
        orders({"transpose": {"Kxx": "Kyy", "Kyy": "-Kxx"}}, names)
    with pytest.raises(SymmetryProblem, match="flip_vertical contradicts the others"):
        orders(stated | {"flip_vertical": {}}, names)


def test_stated_symmetries_travel_with_the_data_and_change_its_digest(tmp_path):
    folders.permeability(tmp_path)
    plain = load(tmp_path)
    write(tmp_path, 'periodic = true\nsymmetry = {flip_vertical = {k = "-k"}, transpose = {}}')
    data = load(tmp_path)
    save_npz(data, tmp_path / "set.npz")
    again = load_npz(tmp_path / "set.npz")
    assert again.symmetries == data.symmetries == {"flip_vertical": (~0,), "transpose": (0,)}
    assert (plain.is_periodic, again.is_periodic) == (False, True) and not plain.symmetries
    assert again.digest == data.digest != plain.digest


def test_a_target_over_decades_is_trained_as_its_logarithm(tmp_path):
    folders.permeability(tmp_path)
    plain = load(tmp_path)
    write(tmp_path, 'transform = {k = "log10"}')
    data = load(tmp_path)
    assert np.allclose(data.targets, np.log10(plain.targets)) and data.digest != plain.digest
    assert (data.target_names, data.unit, data.units) == (("log10 k",), "log10 m²", {"log10 k": "log10 m²"})
    assert main(["data", "check", str(tmp_path)]) == 0
    back, names = undo(data.targets, data.target_names, data.description.layout.transform)
    assert np.allclose(back, plain.targets, rtol=1e-12) and names == ("k",)


def test_a_transformed_target_is_scored_in_its_unit_as_well(tmp_path):
    folders.permeability(tmp_path)
    write(tmp_path, 'transform = {k = "log10"}\nunits = {k = "m²"}')
    data = good(tmp_path).dataset
    learned, truth = data.targets[data.split.train], data.targets[data.split.test]
    predicted = truth + 0.1
    found = metrics.scores_of_part(predicted, truth, learned=learned, in_unit=data.in_unit)
    plain = metrics.scores(10**predicted, 10**truth, train_variance=(10**learned).var(axis=0))
    assert found.in_unit == {
        "k [m²]": {
            "rmse": pytest.approx(plain.mse**0.5, rel=1e-9),
            "nrmse": pytest.approx(plain.nrmse, rel=1e-9),
            "r2": pytest.approx(plain.r2, rel=1e-9),
        }
    }
    assert metrics.Scores.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    wild = metrics.scores_of_part(truth + 1e4, truth, learned=learned, in_unit=data.in_unit)
    assert set(wild.in_unit["k [m²]"].values()) == {None} and wild.nmse is not None
    write(tmp_path, "")
    assert good(tmp_path).dataset.in_unit(learned) == {}


def test_names_have_no_characters_that_mlflow_refuses(tmp_path):
    folders.pictures(tmp_path, [f"{row}.png" for row in range(24)], folders.cells() * 255)
    rows = [f"{row},{row**2},{row**3}" for row in range(24)]
    (tmp_path / "t.csv").write_text("\n".join(["no,YS (MPa),a/b*", *rows]))
    assert good(tmp_path).dataset.target_names == ("YS MPa", "a b")
    write(tmp_path, 'targets = ["a/b*"]')
    assert good(tmp_path).dataset.target_names == ("a b",)
    (tmp_path / "t.csv").write_text("\n".join([f"no,a/b*,{'k' * 300} [m\x1b]", *rows]))
    write(tmp_path, "")
    assert good(tmp_path).dataset.units == {"a b": "label unit", "k" * 100: "m"}
    (tmp_path / "t.csv").write_text("\n".join(["no,a b,a/b", *rows]))
    assert "targets: expected different names" in wrong(tmp_path, 'targets = ["a b", "a/b"]')[0]


@pytest.mark.slow
def test_twenty_thousand_images_are_understood_within_a_gigabyte_and_a_half(tmp_path):
    labels = folders.cells(200, 64) * 255
    folders.pictures(tmp_path / "images", [f"c{row}.png" for row in range(200)], labels)
    for row in range(200, 20_000):
        (tmp_path / "images" / f"c{row}.png").hardlink_to(tmp_path / "images" / f"c{row % 200}.png")
    rows = "".join(f"c{row}.png,{row % 200}.5\n" for row in range(20_000))
    (tmp_path / "table.csv").write_text(f"file,E\n{rows}")
    code = "from data_pipeline.dataset import load\nanswer = load(sys.argv[1]).images.shape[0]"
    watch = watched.run(code, tmp_path, cpu=120)
    assert watch.answer == 20_000 and watch.peak < 1.5e9


# --- what is not clear is asked ---


def question(folder: Path, text: str = "") -> str:
    write(folder, text)
    notes = understand(folder).notes
    assert len(notes.questions) == 1 and not notes.errors, notes
    return notes.questions[0]


def test_the_facts_in_json_have_all_keys_and_what_is_understood_beside_a_question(tmp_path, capsys):
    folders.missing(tmp_path)

    def facts(code):
        assert main(["data", "check", str(tmp_path), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    asked = facts(1)
    assert len(asked["questions"]) == 1 and asked["digest"] is None
    assert (asked["images"], len(asked["targets"]), len(asked["pairs"])) == (24, 40, 24)
    write(tmp_path, 'missing = "mask"')
    answered = facts(0)
    assert asked.keys() == answered.keys() and asked["pairs"] == answered["pairs"]
    write(tmp_path, 'levels = "phases"\nmissing = "mask"\ncolours = [0, 7]')
    assert facts(1).keys() == asked.keys() and facts(1)["size"] == [16, 16] and facts(1)["errors"]
    (tmp_path / "targets.csv").unlink()
    assert facts(1).keys() == asked.keys()


def test_labels_in_an_array_have_the_limit_of_rows_of_a_table(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros((100_001, 8, 8), bool))
    np.save(tmp_path / "labels.npy", np.arange(100_001.0) ** 2)
    errors = understand(tmp_path).notes.errors
    assert errors == ["labels.npy: expected at most 100,000 rows, found 100,001. Use a part of the data."]


def test_missing_targets_are_named_and_left_out_on_request(tmp_path):
    folders.missing(tmp_path)
    asked = question(tmp_path)
    assert asked.startswith("Targets are missing in 8 rows: targets.csv line 2,")
    assert asked.endswith('Add to dataset.toml: missing = "mask"  or  missing = "drop"')
    write(tmp_path, 'missing = "drop"')
    assert good(tmp_path).dataset.targets.shape == (16, 40)


def test_masked_targets_are_counted_enter_the_digest_and_travel_with_the_data(tmp_path, capsys):
    folders.missing(tmp_path)
    table = tmp_path / "targets.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1].split(",")[0] + "," * 40  # an image without any target
    table.write_text("\n".join(lines))
    write(tmp_path, 'missing = "mask"\ntransform = {t7 = "log10"}')
    understood = good(tmp_path)
    assert "1 rows without any target are left out" in understood.notes.remarks
    data = understood.dataset
    assert data.targets.shape == (23, 40) and {name: n for name, n in data.missing.items() if n} == {
        "log10 t7": 7,
        "t31": 7,
    }
    assert main(["data", "check", str(tmp_path)]) == 0
    assert "missing  log10 t7 7, t31 7 of 23 labels; they count in no loss and no score" in capsys.readouterr().out
    save_npz(data, tmp_path / "x.npz")
    again = load_npz(tmp_path / "x.npz")
    assert again.digest == data.digest and np.array_equal(again.targets, data.targets, equal_nan=True)
    filled = dataclasses.replace(data, targets=np.nan_to_num(data.targets))
    assert filled.digest != data.digest
    undescribed = dataclasses.replace(data, description=dataclasses.replace(data.description, layout=UNSTATED))
    save_npz(undescribed, tmp_path / "y.npz")
    with pytest.raises(DatasetError, match="not finite"):
        load_npz(tmp_path / "y.npz")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (range(24), "targets: t7 has no number in any row. Leave it out of targets."),
        (split(24).train, "t7 has no label in the training split: leave it out of targets, or give another split"),
        (split(24).test, "t7 has no label in the test split: leave it out of targets, or give another split"),
    ],
)
def test_a_target_without_any_label_in_a_split_is_refused(tmp_path, rows, message):
    folders.missing(tmp_path)
    table = pd.read_csv(tmp_path / "targets.csv")
    table.loc[list(rows), "t7"] = np.nan
    table.to_csv(tmp_path / "targets.csv", index=False)
    targets = ", ".join(f'"t{index}"' for index in range(40))
    write(tmp_path, f'missing = "mask"\ntargets = [{targets}]')
    assert any(message in error for error in check_data(tmp_path).notes.errors)


def test_images_are_never_paired_by_their_order_unless_asked_for(tmp_path):
    folders.pictures(tmp_path, [f"{letter}.png" for letter in "dbca"], folders.cells(4) * 255)
    (tmp_path / "t.csv").write_text("E\n1.5\n2.5\n3.5\n9.5\n")
    assert 'match = "row"' in question(tmp_path)
    write(tmp_path, 'match = "row"')
    assert good(tmp_path).dataset.names == ("a.png", "b.png", "c.png", "d.png")


def test_columns_that_disagree_about_the_pairing_are_asked_about(tmp_path):
    folders.pictures(tmp_path, [f"{row}.png" for row in range(4)], folders.cells(4) * 255)
    (tmp_path / "t.csv").write_text("a,b,E\n0,3,1.5\n1,2,2.5\n2,1,3.5\n3,0,9.5\n")
    asked = question(tmp_path)
    assert 'match = {column = "a"}' in asked and 'match = {column = "b"}' in asked
    write(tmp_path, 'match = {column = "b"}')
    assert good(tmp_path).dataset.targets[:, 0].tolist() == [9.5, 3.5, 2.5, 1.5]


def test_two_folders_of_images_or_two_tables_are_asked_about(tmp_path):
    for name in ("raw", "masks"):
        folders.pictures(tmp_path / name, [f"{row}.png" for row in range(4)], folders.cells(4) * 255)
    (tmp_path / "t.csv").write_text("file,E\n" + "".join(f"{row},{row**2}\n" for row in range(4)))
    asked = question(tmp_path)
    assert 'images = "masks/*.png"  or  images = "raw/*.png"  or  images = ["masks/*.png", "raw/*.png"]' in asked
    shutil.copy(tmp_path / "t.csv", tmp_path / "u.csv")
    assert 'table = "t.csv"  or  table = "u.csv"' in question(tmp_path, 'images = "raw/*.png"')
    write(tmp_path, 'images = "raw/*.png"\ntable = "u.csv"')
    assert good(tmp_path).dataset.names[0] == "raw/0.png"


def test_commas_that_may_mean_two_things_are_asked_about(tmp_path):
    folders.pictures(tmp_path, [f"p{row}.png" for row in range(4)], folders.cells(4) * 255)
    (tmp_path / "t.csv").write_text("file;E\n" + "".join(f"p{row};1,{row}25\n" for row in range(4)))
    assert 'decimal = ","  or  decimal = "."' in question(tmp_path)
    for mark, first in ((",", 1.025), (".", 1025.0)):
        write(tmp_path, f"decimal = '{mark}'")
        assert good(tmp_path).dataset.targets[0, 0] == first


def test_an_array_whose_axes_are_all_alike_is_asked_about(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).uniform(size=(12, 12, 12)))
    (tmp_path / "t.csv").write_text("E\n" + "".join(f"{row**2}\n" for row in range(12)))
    assert 'axes = "nhw"  or  axes = "hwn"' in question(tmp_path)
    write(tmp_path, 'axes = "hwn"')
    assert np.isclose(good(tmp_path).dataset.images[3, 0, 1, 2], np.load(tmp_path / "x.npy")[1, 2, 3])


# --- what is wrong is said, with where and what to do ---


def wrong(folder: Path, text: str = "") -> list[str]:
    if text:
        write(folder, text)
    understood = understand(folder)
    assert understood.dataset is None and not understood.notes.questions
    return understood.notes.errors


def test_what_does_not_pair_is_counted_and_named(tmp_path):
    folders.permeability(tmp_path)
    (tmp_path / "rock_3.bmp").unlink()
    Image.fromarray(folders.cells(1)[0]).save(tmp_path / "rock_77.bmp")
    Image.fromarray(folders.cells(1)[0]).save(tmp_path / "rock_5.png")
    lines = (tmp_path / "k.tsv").read_text().splitlines()
    (tmp_path / "k.tsv").write_text("\n".join([*lines, lines[8]]))
    text = "\n".join(wrong(tmp_path))
    assert "1 image without a row: rock_77.bmp. Add the row" in text
    assert "row without an image: k.tsv line 5" in text or "rows without an image: k.tsv line 5" in text
    assert "names that several images or rows have: rock_7, rock_5" in text


def test_forty_images_without_a_row_are_one_message(tmp_path):
    folders.numbered(tmp_path)
    for row in range(40):
        Image.fromarray(folders.cells(1)[0]).save(tmp_path / f"{row + 100}_b.png")
    assert wrong(tmp_path) == [
        "40 images without a row: 100_b.png, 101_b.png, 102_b.png, 103_b.png, 104_b.png, and 35 more. "
        "Add the rows, or remove the images."
    ]


def test_a_text_about_the_data_is_no_table(tmp_path):
    folders.pictures(tmp_path, [f"p{row}.png" for row in range(4)], folders.cells(4) * 255)
    (tmp_path / "t.csv").write_text("file,E\n" + "".join(f"p{row},{row**2}\n" for row in range(4)))
    for name in ("README.txt", "Read_me first.txt", "LICENCE.txt", "docs/license.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Cells of 2024.\nPlease cite us.\n")
    assert good(tmp_path).dataset.description.layout.table == ("t.csv",)


def test_numbers_with_their_unit_are_named_and_no_header_is_lost(tmp_path):
    folders.pictures(tmp_path, [f"p{row}.png" for row in range(4)], folders.cells(4) * 255)
    (tmp_path / "t.csv").write_text("file,E\n" + "".join(f"p{row},{row**2} GPa\n" for row in range(4)))
    (message,) = wrong(tmp_path)
    assert message.endswith(
        "found 0: no numbers are in E with '0 GPa'. A unit belongs into the header, as in 'E [GPa]'."
    )


def test_a_word_among_the_numbers_is_named_with_its_line(tmp_path):
    folders.permeability(tmp_path)
    table = (tmp_path / "k.tsv").read_text().splitlines()
    table[6] = "rock_5\tbroken"
    (tmp_path / "k.tsv").write_text("\n".join(table))
    assert wrong(tmp_path) == ["k.tsv line 7: k [m²]: expected a number, found 'broken'. Correct it."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('images = "../*.png"', "images: expected a file or pattern in this folder"),
        ('images = "none/*.png"', "images: expected files such as none/*.png, found none."),
        ('table = "none.csv"', "table: expected the file none.csv, found none."),
        ('match = {column = "nmae"}', "match: no column is called nmae. There are: rock, k [m²]."),
        ('match = {column = "k"}', "match: no column is called k."),
        ('match = "sorted"', 'match: expected {column = "…"}, {number = "…"} or "row", found \'sorted\'.'),
        ('targets = ["E"]', "no column is called E. There are: rock, k [m²]."),
        ('units = {E = "Pa"}', "units: no target is called E. There are: k."),
        ('levels = "gray"', 'levels: expected "grey", "rgb" or "phases", found \'gray\'.'),
        ("range = [5, 1]", "range: expected [lowest, highest], found [5, 1]."),
        ("range = [0, 100]", "images: expected pixels from 0 to 100, found 0 to 255."),
        ('levels = "phases"\ncolours = [0, 128]', "images: expected one of the 2 phases' colours (0, 128), found 255"),
        ('split = "rock"', "k.tsv line 2: rock: expected training, validation or test, found 'rock_0'."),
        ('transform = {E = "log"}', "transform: no target is called E. There are: k."),
        ('transform = {k = "ln"}', "transform: expected targets with one of log10, log, sqrt, found"),
        ('transform = {k = "log"}\nsymmetry = {transpose = {k = "-k"}}', "symmetry: transpose: k changes, but it has"),
        (
            "symmetry = {turn = {}}",
            "symmetry: expected tables of targets for flip_horizontal, flip_vertical, transpose",
        ),
        ('symmetry = {transpose = {E = "k"}}', "symmetry: transpose: no target is called E. There are: k."),
        ('group = "batch"', "no column is called batch. There are: rock, k [m²]."),
    ],
)
def test_a_key_that_does_not_fit_the_folder_says_so(tmp_path, text, message):
    folders.permeability(tmp_path)
    assert message in wrong(tmp_path, text)[0]


def test_a_folder_of_something_else_says_what_was_expected(tmp_path):
    (tmp_path / "notes.docx").write_text("hello")
    assert (
        "expected images (png, jpg, jpeg, tif, tiff, bmp, gif, npy, npz, h5, hdf5, mat, txt) and a table, found .docx"
        in wrong(tmp_path)[0]
    )


def test_images_of_two_sizes_are_counted_and_resized_on_request(tmp_path):
    folders.permeability(tmp_path)
    Image.fromarray(folders.cells(1, 32)[0] * 255).save(tmp_path / "rock_0.bmp")
    assert "32 x 32 (1, such as rock_0.bmp), 16 x 16 (23, such as rock_1.bmp)" in wrong(tmp_path)[0]
    assert load(tmp_path, image_size=8).images.shape == (24, 1, 8, 8)


@pytest.mark.parametrize("levels", [1, 255])
def test_pictures_of_one_bit_among_others_of_eight_are_on_their_scale(tmp_path, levels):
    folders.numbered(tmp_path)
    expected = load(tmp_path)
    for number, path in enumerate(sorted(tmp_path.glob("*.png"))):
        with Image.open(path) as image:
            new = image.convert("1") if number % 3 == 0 else Image.fromarray(np.asarray(image) // (255 // levels))
        new.save(path)
    assert np.array_equal(load(tmp_path).images, expected.images)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
def test_a_black_and_white_picture_of_any_mode_gives_the_same_images(tmp_path, mode):
    folders.numbered(tmp_path)
    expected = load(tmp_path)
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            image.convert(mode).save(path)
    assert np.array_equal(load(tmp_path).images, expected.images)
