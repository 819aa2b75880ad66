"""A folder of the course's form becomes a Dataset; whatever does not fit gets its own message."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.components import COMPONENTS
from data_pipeline.dataset import DEFAULT, DatasetError, check, load, understand
from data_pipeline.files import write_atomically
from data_pipeline.npz import load_npz, save_npz
from data_pipeline.table import read_table

N, SIZE = 5, 8
PIXELS = np.random.RandomState(0).randint(0, 2, (N, SIZE, SIZE)).astype(np.uint8) * 255
LABELS = np.random.RandomState(1).uniform(1e-8, 1e-6, (N, 9))  # tiny, as the course's
TABLE = f"1-{N}_Cij_pbc.csv"


def rows(labels: np.ndarray = LABELS, first: int = 1) -> list[str]:
    return [",".join([str(i), *map(repr, row)]) for i, row in enumerate(labels.tolist(), start=first)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid folder of five cells of 8 x 8 pixels."""
    path = tmp_path / "plates"
    path.mkdir()
    for row, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(path / f"{row}_cell.png")
    (path / TABLE).write_text("\n".join(rows()) + "\n")
    return path


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


# --- what fits ---


def test_images_and_labels_come_out_in_the_tables_order(folder):
    dataset = load(folder)
    assert np.array_equal(dataset.images[:, 0], PIXELS.astype(np.float32) / 255)
    assert dataset.images.shape == (N, 1, SIZE, SIZE) and dataset.images.dtype == np.float32
    assert np.array_equal(dataset.targets, LABELS)
    assert dataset.target_names == COMPONENTS and dataset.unit == "label unit"
    assert dataset.names == tuple(f"{row}_cell.png" for row in range(N))
    assert dataset.description.to_dict() == {"name": "plates"}
    assert check(folder) == []


def test_row_ten_belongs_to_image_ten_though_names_sort_otherwise(tmp_path):
    for row in range(12):
        Image.fromarray(np.full((2, 2), 20 * row, dtype=np.uint8)).save(tmp_path / f"{row}_x.png")
    (tmp_path / "labels.csv").write_text("\n".join(rows(np.ones((12, 9)))))
    assert np.allclose(load(tmp_path).images[:, 0, 0, 0], np.arange(12) * 20 / 255)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + "\n".join(rows()),
        "\r\n".join(rows()) + "\r\n\r\n",
        "\n".join(rows(first=0)),
        "\n".join(row.replace(",", " , ") for row in rows()),
        "\n".join(row.replace("1,", "1.0,", 1) if row.startswith("1,") else row for row in rows()),
    ],
    ids=["byte-order mark", "Windows line ends", "indices from 0", "blanks", "index as 1.0"],
)
def test_harmless_variants_of_the_table_are_read_alike(folder, text):
    (folder / TABLE).write_bytes(text.encode())
    assert np.array_equal(load(folder).targets, LABELS)


@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA", "LA"])
def test_any_8_bit_mode_is_converted_to_grey_with_a_notice(folder, mode, caplog):
    expected = load(folder).digest
    assert not caplog.records
    Image.fromarray(PIXELS[2]).convert(mode).save(folder / "2_cell.png")
    with caplog.at_level(logging.WARNING, "data_pipeline"):
        assert load(folder).digest == expected
    assert f"1 image converted from mode {mode} to grey, such as 2_cell.png" in caplog.text


def test_a_palette_image_with_transparency_is_converted_without_a_warning(folder):
    palette = Image.fromarray(PIXELS[2]).convert("P")
    palette.save(folder / "2_cell.png", transparency=bytes([255] * 128 + [0] * 128))
    assert np.array_equal(load(folder).images[2, 0] * 255, PIXELS[2])


def test_images_are_resized_only_when_asked_and_with_a_finding(folder):
    Image.fromarray(PIXELS[3]).resize((2 * SIZE, 2 * SIZE), Image.Resampling.NEAREST).save(folder / "3_cell.png")
    assert "3_cell.png: expected 8 x 8 pixels" in only(check(folder))
    assert np.array_equal(load(folder, image_size=SIZE).images[:, 0] * 255, PIXELS)
    (finding,) = (each for each in understand(folder, image_size=SIZE).notes.findings if each.name == "resized")
    assert "resized to 8 x 8 pixels" in finding.sentence and finding.images == (3,)
    assert load(folder, image_size=4).images.shape == (N, 1, 4, 4)


def test_cells_that_are_not_square_have_no_quarter_turn(tmp_path):
    for row in range(3):
        Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(tmp_path / f"{row}_x.png")
    (tmp_path / "labels.csv").write_text("\n".join(rows(LABELS[:3])))
    dataset = load(tmp_path)
    assert dataset.images.shape == (3, 1, 4, 6)
    assert set(dataset.symmetries) == {"flip_horizontal", "flip_vertical"}


def test_dataset_toml_gives_name_unit_and_phases(folder):
    (folder / "dataset.toml").write_text(
        'name = "plates 2"\nunit = "MPa"\n'
        "[phases.matrix]\nyoung_modulus = 3500\npoisson_ratio = 0.35\n"
        "[phases.inclusion]\nyoung_modulus = 7e4\npoisson_ratio = 0.22\n"
    )
    dataset = load(folder)
    assert dataset.unit == "MPa"
    assert dataset.description.to_dict() == {
        "name": "plates 2",
        "phases": {
            "matrix": {"young_modulus": 3500.0, "poisson_ratio": 0.35},
            "inclusion": {"young_modulus": 70000.0, "poisson_ratio": 0.22},
        },
    }


def test_a_link_to_an_image_elsewhere_is_read(folder, tmp_path):
    (folder / "0_cell.png").rename(tmp_path / "elsewhere.png")
    (folder / "0_cell.png").symlink_to(tmp_path / "elsewhere.png")
    assert check(folder) == []


def test_the_default_set_has_520_cells_of_64_pixels_and_no_problem():
    dataset = load(DEFAULT)
    assert dataset.images.shape == (520, 1, 64, 64)
    assert set(np.unique(dataset.images)) == {0.0, 1.0}
    assert dataset.unit == "GPa" and dataset.name == "default"
    assert dataset.targets.min() > 0


# --- the digest and the NPZ ---


def test_the_digest_is_of_pixels_and_labels_and_not_of_files(folder):
    digest = load(folder).digest
    (folder / "0_cell.png").rename(folder / "0_renamed.png")
    Image.fromarray(PIXELS[1]).save(folder / "1_cell.png", compress_level=0)
    (folder / TABLE).write_text("\n".join(row.replace("e-07", "E-7") for row in rows()))
    assert load(folder).digest == digest


@pytest.mark.parametrize("change", ["pixel", "label", "unit", "order"])
def test_the_digest_changes_with(folder, change):
    digest = load(folder).digest
    pixels, labels = PIXELS.copy(), LABELS.copy()
    if change == "pixel":
        pixels[4, 0, 0] ^= 255
    elif change == "label":
        labels[4, 8] = np.nextafter(labels[4, 8], 1)
    elif change == "unit":
        (folder / "dataset.toml").write_text('unit = "GPa"')
    else:
        pixels, labels = pixels[::-1], labels[::-1]
    for row in range(N):
        Image.fromarray(pixels[row]).save(folder / f"{row}_cell.png")
    (folder / TABLE).write_text("\n".join(rows(labels)))
    assert load(folder).digest != digest


def test_an_npz_gives_back_the_same_data_set(folder, tmp_path):
    pixels = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE) * 4 + 3  # all greys survive, not only two
    Image.fromarray(pixels).save(folder / "0_cell.png")
    dataset = load(folder)
    save_npz(dataset, tmp_path / "set.npz")
    again = load_npz(tmp_path / "set.npz")
    assert again.digest == dataset.digest
    for field in ("images", "targets"):
        assert np.array_equal(getattr(again, field), getattr(dataset, field))
        assert getattr(again, field).dtype == getattr(dataset, field).dtype
    for field in ("target_names", "unit", "names", "description", "symmetries"):
        assert getattr(again, field) == getattr(dataset, field)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_all_256_greys_survive_the_way_through_floating_point(tmp_path):
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "0_x.png")
    (tmp_path / "labels.csv").write_text(rows()[0])
    assert np.array_equal(load(tmp_path).pixels().ravel(), np.arange(256))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x80\x04\x95 pickle", None])
def test_a_file_that_is_not_our_npz_is_refused(tmp_path, content):
    path = tmp_path / "set.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"set\.npz"):
        load_npz(path)


def test_an_npz_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "set.npz", pixels=np.array([{}], dtype=object), targets=np.zeros(1), facts=np.array("{}"))
    with pytest.raises(DatasetError, match="written by save_npz"):
        load_npz(tmp_path / "set.npz")


def npz(path, **changes):
    """An NPZ as save_npz writes it, some of its members replaced."""
    facts = {"target_names": ["a"], "unit": "GPa", "names": ["0_x.png"], "metadata": {"name": "x"}, "symmetries": {}}
    facts |= changes.pop("facts", {})
    arrays = {"pixels": np.zeros((1, 1, 4, 4), np.uint8), "targets": np.zeros((1, 1))} | changes
    np.savez_compressed(path, **arrays, facts=np.array(json.dumps(facts)))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixels": np.zeros((1, 1, 4, 4))}, "pixels.npy of the type <f8"),
        ({"targets": np.zeros((1, 1), np.float32)}, "targets.npy of the type <f4"),
        ({"pixels": np.zeros((2, 1, 4, 4), np.uint8)}, r"1 images .* found \(2, 1, 4, 4\)"),
        ({"targets": np.zeros((1, 2))}, r"\(1, 1\) targets"),
        ({"targets": np.full((1, 1), np.nan)}, "not finite"),
        ({"more": np.zeros(1)}, "the members"),
        ({"facts": {"names": "0"}}, "no lists of texts"),
        ({"facts": {"unit": 1}}, "a unit that is no text"),
        ({"facts": {"metadata": {}}}, "metadata without a name"),
        ({"facts": {"symmetries": {"transpose": [1]}}}, "does not permute"),
    ],
)
def test_an_npz_of_other_content_is_refused(tmp_path, changes, words):
    load_npz(npz(tmp_path / "good.npz"))
    with pytest.raises(DatasetError, match=words):
        load_npz(npz(tmp_path / "set.npz", **changes))


def lying(path, shape):
    """An NPZ whose pixels' header states another shape than its bytes have."""
    npz(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, header.getvalue() + bytes(16) if name == "pixels.npy" else content)
    return path


def test_an_npz_that_would_take_gigabytes_is_refused_before_it_takes_them(tmp_path, monkeypatch):
    big = npz(tmp_path / "big.npz", pixels=np.broadcast_to(np.uint8(0), (3, 1, 4096, 4096)))  # of 50 kB
    lies = lying(tmp_path / "lying.npz", (1, 1, 2**20, 2**20))
    tracemalloc.start()
    monkeypatch.setattr("data_pipeline.npz.LARGEST_TOTAL", 2**25)
    with pytest.raises(DatasetError, match="at most 33,554,432 are read"):
        load_npz(big)
    with pytest.raises(DatasetError, match="of 144 bytes for the shape"):
        load_npz(lies)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


# --- what is wrong with a table ---


def row_with(column: int, text: str, row: int = 2) -> list[str]:
    lines = rows()
    fields = lines[row].split(",")
    fields[column] = text
    return [*lines[:row], ",".join(fields), *lines[row + 1 :]]


TABLES = {
    "semicolons": ([*rows()[:2], rows()[2].replace(",", ";"), *rows()[3:]], "line 3: .*found semicolons. Export"),
    "semicolons and decimal commas": (
        [*rows()[:2], rows()[2].replace(",", ";").replace(".", ","), *rows()[3:]],
        "line 3: .*found semicolons and decimal commas",
    ),
    "decimal commas": ([*rows()[:2], "3" + ",0,5" * 9, *rows()[3:]], "line 3: .*found 19: decimal commas"),
    "tabs": ([*rows()[:2], rows()[2].replace(",", "\t"), *rows()[3:]], "line 3: .*found tabs"),
    "nan": (row_with(4, "nan"), r"line 3: column 5 \(C12\): expected a finite number, found 'nan'"),
    "infinity": (row_with(9, "-Infinity"[:4]), r"line 3: column 10 \(C66\): expected a finite number, found '-Inf'"),
    "beyond single precision": (row_with(1, "-4e38"), r"line 3: column 2 \(C11\): .*at most 1e\+30.*'-4e38'"),
    "overflow": (row_with(1, "1e999"), r"line 3: column 2 \(C11\): .*'1e999', which overflows"),
    "empty field": (row_with(6, ""), r"line 3: column 7 \(C13\): expected a number, found nothing"),
    "a word": (row_with(2, "many"), r"line 3: column 3 \(C22\): expected a plain decimal number .* found 'many'"),
    "hexadecimal": (row_with(2, "0x1F"), "line 3: .*found '0x1F'"),
    "underscores": (row_with(2, "1_000"), "line 3: .*found '1_000'"),
    "other digits": (row_with(2, "\u0663"), "line 3: .*plain decimal number"),
    "quotes": (row_with(2, '"1.0"'), "line 3: .*plain decimal number"),
    "nine columns": ([*rows()[:2], rows()[2].rpartition(",")[0], *rows()[3:]], "line 3: .*found 9"),
    "eleven columns": ([*rows()[:2], rows()[2] + ",0", *rows()[3:]], "line 3: .*found 11"),
    "a duplicate index": (row_with(0, "2"), r"line 3: column 1 \(index\): 2 occurs twice, first in line 2"),
    "a fractional index": (row_with(0, "2.5"), "line 3: .*whole number from 0 or 1 on, found 2.5"),
    "a negative index": (row_with(0, "-3"), "line 3: .*whole number from 0 or 1 on, found -3"),
    "a first index of 7": (rows(first=7), "line 1: .*expected 1 .or 0. in the first row, found 7"),
    "an empty line": ([*rows()[:2], "", *rows()[2:]], "line 3: .*found an empty line"),
}


@pytest.mark.parametrize("case", TABLES)
def test_the_table_is_refused_with_file_line_and_reason_for(folder, case):
    lines, message = TABLES[case]
    (folder / TABLE).write_text("\n".join(lines), encoding="utf-8")
    problems = check(folder)
    assert len(problems) <= 2, problems  # one slip does not make a cascade
    assert re.match(re.escape(TABLE) + " " + message, problems[0]), problems[0]
    with pytest.raises(DatasetError, match=re.escape(TABLE)):
        load(folder)


def test_a_skipped_index_is_told_once(folder):
    lines = [row for row in rows(np.ones((N + 1, 9))) if not row.startswith("3,")]
    (folder / TABLE).write_text("\n".join(lines))
    assert only(check(folder)).startswith(f"{TABLE} line 3: column 1 (index): expected 3 after 2, found 4.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"1,\xe9", "expected UTF-8 text, found the byte 0xe9 at position 2"),
    ],
)
def test_a_table_that_is_no_utf_8_text_or_empty_is_refused(folder, content, message):
    (folder / TABLE).write_bytes(content)
    assert only(check(folder)).startswith(f"{TABLE}: {message}")


def test_a_table_of_many_gigabytes_is_not_read(folder):
    os.truncate(folder / TABLE, 5 * 2**30)  # sparse: takes no space
    assert only(check(folder)).startswith(f"{TABLE}: expected at most 64 MiB, found 5120 MiB")


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="0123456789+-.eE,;\n\r\t naif_x\u0663\x00", max_size=200))
def test_whatever_the_table_holds_reading_ends_in_rows_or_problems(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.csv"
    path.write_bytes(text.encode())
    labels, problems = read_table(path)
    assert problems or (len(labels) and np.isfinite(labels).all())


# --- what is wrong with a folder ---


def test_a_folder_without_a_table_says_so(folder):
    (folder / TABLE).unlink()
    assert "expected one label table (such as 1-520_Cij_pbc.csv), found none" in only(check(folder))


def test_two_tables_of_the_courses_name_are_ambiguous(folder):
    (folder / "a_Cij_pbc.csv").write_text("")
    assert f"found 2: {TABLE}, a_Cij_pbc.csv. Keep one." in only(check(folder))


def test_the_table_of_the_courses_name_wins_and_side_files_do_not_count(folder):
    for name in ("other.csv", "cells.csv", "._hidden_Cij_pbc.csv"):
        (folder / name).write_text("not,a,table")
    assert check(folder) == []
    (folder / TABLE).rename(folder / "labels.csv")
    assert "found 2: labels.csv, other.csv" in only(check(folder))
    (folder / "other.csv").unlink()
    assert check(folder) == []


def test_a_folder_that_is_not_there_or_is_a_file_says_so(folder, tmp_path):
    assert "No such file" in only(check(tmp_path / "none"))
    assert "Not a directory" in only(check(folder / TABLE))
    with pytest.raises(DatasetError, match="1 problem:"):
        load(tmp_path / "none")


def png(width: int, height: int, *, bits: int = 8, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 0, 0, 0, 0])
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def cut(content: bytes, length: int) -> bytes:
    return content[:length]


WHOLE = png(SIZE, SIZE, data=bytes(range(9)) * SIZE)
IMAGES = {
    "truncated in its pixels": (cut(WHOLE, len(WHOLE) - 20), "is truncated or damaged"),
    "truncated in its header": (cut(WHOLE, 20), "is truncated within its header"),
    "empty": (b"", "is empty"),
    "too few pixels": (png(SIZE, SIZE, data=bytes(9)), "is truncated or damaged"),
    "a JPEG": (b"\xff\xd8\xff\xe0" + bytes(100), "is not a PNG file"),
    "text": (b"hello", "is not a PNG file"),
    "16 bit": (png(SIZE, SIZE, bits=16, data=bytes(17 * SIZE)), "expected at most 8 bits a sample, found 16"),
    "of another size": (
        png(SIZE, 9, data=bytes(81)),
        "expected 8 x 8 pixels (height x width) as in 0_cell.png, found 9 x 8",
    ),
    "oversized": (png(60_000, 60_000), "expected at most 2048 pixels a side, found 60000 x 60000"),
    "of no size": (png(0, 8), "has a damaged PNG header"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_is_refused_that_is(folder, case):
    content, message = IMAGES[case]
    (folder / "2_cell.png").write_bytes(content)
    assert only(check(folder)).startswith(f"2_cell.png: {message}")


def test_an_animated_image_is_refused(folder):
    frames = [Image.fromarray(pixels) for pixels in PIXELS]
    frames[0].save(folder / "2_cell.png", save_all=True, append_images=frames[1:])
    assert only(check(folder)).startswith("2_cell.png: expected one still image")


def test_an_image_of_another_format_is_refused_whatever_its_name(folder):
    Image.fromarray(PIXELS[0]).convert("CMYK").save(folder / "2_cell.png", format="TIFF")
    assert only(check(folder)).startswith("2_cell.png: is not a PNG file")


def test_a_decompression_bomb_is_not_decoded(folder):
    (folder / "2_cell.png").write_bytes(png(2**31 - 1, 2**31 - 1, data=bytes(10**7)))
    tracemalloc.start()
    try:
        assert "was not decoded" in only(check(folder, image_size=8))
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_more_pixels_than_fit_into_memory_are_refused_before_they_are_decoded(tmp_path):
    for row in range(130):
        (tmp_path / f"{row}_x.png").write_bytes(png(2048, 2048))  # without any pixels
    (tmp_path / "labels.csv").write_text("\n".join(rows(np.ones((130, 9)))))
    assert "130 images of 2048 x 2048 pixels are too many to hold at once" in only(check(tmp_path))


def test_missing_ambiguous_and_surplus_images_are_told_by_their_row(folder):
    (folder / "1_cell.png").rename(folder / "01_cell.png")  # does not begin with 1_
    (folder / "3_again.png").write_bytes((folder / "3_cell.png").read_bytes())
    (folder / f"{N}_cell.png").write_bytes(WHOLE)
    assert check(folder) == [
        "row 1: expected one image 1_*.png, found none. Add it, or remove the row.",
        "row 3: expected one image 3_*.png, found 2: 3_again.png, 3_cell.png. Keep one.",
        f"{N}_cell.png: has no row in the table, which has {N} (0 to {N - 1}).",
    ]


def test_pipes_folders_and_broken_links_called_png_do_not_hang(folder):
    for row, special in enumerate((os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path))):
        (folder / f"{row}_cell.png").unlink()
        special(folder / f"{row}_cell.png")
    code = f"from data_pipeline.dataset import check; print(*check({str(folder)!r}), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.splitlines() == [
        "0_cell.png: expected a regular file, found a folder, pipe or device.",
        "1_cell.png: expected a regular file, found a folder, pipe or device.",
        "2_cell.png: cannot be read (No such file or directory).",
    ]


def test_a_pipe_called_like_the_table_does_not_hang(folder):
    (folder / TABLE).unlink()
    os.mkfifo(folder / TABLE)
    code = f"from data_pipeline.dataset import check; print(*check({str(folder)!r}), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == f"{TABLE}: expected a regular file, found a folder, pipe or device.\n"


def test_all_problems_come_at_once_and_an_error_spells_out_twenty_and_the_count(tmp_path):
    lines = [row.replace("e-07", "e-07x") for row in rows(np.full((30, 9), 2e-7))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "dataset.toml").write_text('nmae = "x"')
    problems = check(tmp_path)
    assert len(problems) == 1 + 30 + 30  # the key, 30 rows, 30 missing images
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    shown = str(error.value).splitlines()
    assert shown[0] == f"The data set in {tmp_path} has 61 problems:"
    assert [line.strip() for line in shown[1:21]] == problems[:20]
    assert shown[21].strip() == "... and 41 more." and len(shown) == 22


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('nmae = "x"', "no key is called nmae. There are: name, unit, images,"),
        ("unit = 3", "unit: expected a text of 1 to 60 characters, found 3."),
        ('name = ""', "name: expected a text of 1 to 60 characters, found ''."),
        ('name = "a/b"', "name: expected letters, digits, spaces and . _ + -, found 'a/b'."),
        ("name = ", "expected a TOML file in UTF-8, but it cannot be read"),
        pytest.param("x = " + "[" * 30_000, "expected a TOML file in UTF-8, but", id="nested"),
        ("phases = 3", "phases: expected the tables matrix and inclusion, found 3"),
        ("[phases.matrix]\n[phases.fibre]", "phases: expected the tables matrix and inclusion, found matrix, fibre"),
        ("[phases.matrix]\nyoung_modulus=1\n[phases.inclusion]\n", "phases.matrix: poisson_ratio missing."),
        (
            "[phases]\nmatrix={young_modulus=1,poisson_ratio=0.5}\ninclusion={young_modulus=1,poisson_ratio=0}",
            "phases.matrix: poisson_ratio: expected more than -1 and less than 0.5, found 0.5.",
        ),
        (
            "[phases]\nmatrix={young_modulus=1,poisson_ratio=0,E=1}\ninclusion={young_modulus=1,poisson_ratio=0}",
            "no key is called phases.matrix.E. There are: young_modulus, poisson_ratio.",
        ),
    ],
)
def test_dataset_toml_is_checked_key_by_key(folder, text, message):
    (folder / "dataset.toml").write_text(text)
    problems = check(folder)
    assert problems[0].startswith(f"dataset.toml: {message}")


@pytest.mark.parametrize("image_size", [0, -1, 100_000])
def test_an_image_size_out_of_range_is_refused(folder, image_size):
    assert only(check(folder, image_size=image_size)).startswith("image_size: expected 1 to 2048 pixels")


def test_a_file_is_written_through_no_link_that_others_left(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / ".table.csv.00000000.tmp").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "table.csv", b"ours")
    assert (tmp_path / "theirs").read_text() == "theirs" and (tmp_path / ".table.csv.00000000.tmp").is_symlink()
