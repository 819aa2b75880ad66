"""A hostile or damaged file of any format ends in data or in DatasetError, soon and in little memory."""

import io
import struct
import tomllib
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import folders
import h5py
import numpy as np
import pandas as pd
import pytest
import watched
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from data_pipeline import columns, understanding
from data_pipeline.dataset import load
from data_pipeline.dataset_keys import KEYS, Layout, parse
from data_pipeline.errors import DatasetError
from data_pipeline.formats import arrays, matlab, numpy_files, tables
from data_pipeline.formats.limits import FormatProblem
from data_pipeline.sources import Notes

MEMORY = 2**30  # bytes
JUDGE = """
from pathlib import Path
from data_pipeline import columns, understanding
from data_pipeline.dataset import load
from data_pipeline.errors import DatasetError
try:
    load(Path(sys.argv[1]))
    answer = "good"
except DatasetError as error:
    answer = str(error)
"""


def judgement(folder: Path) -> str:
    """'good' or the error's text; fails if judging takes long, much memory, or ends in another error."""
    watch = watched.run(JUDGE, folder)
    assert watch.peak < MEMORY, f"{watch.peak / 2**20:.0f} MiB"
    return str(watch.answer)


# --- each format is read ---

STACK = np.random.default_rng(0).integers(0, 200, (12, 10, 9)).astype(np.uint8)


def _h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("a/images", data=STACK, compression="gzip")


def _mat73(path: Path) -> None:
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("images", data=STACK.transpose(2, 1, 0))


ARRAYS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "npy": ("x.npy", lambda path: np.save(path, STACK)),
    "npz": ("x.npz:images", lambda path: np.savez_compressed(path, images=STACK, k=np.ones(12))),
    "HDF5": ("x.h5:/a/images", _h5),
    "MATLAB 5": ("x.mat:images", lambda path: savemat(path, {"images": STACK}, do_compression=True)),
    "MATLAB 7.3": ("x.mat:images", _mat73),
    "text": ("x.txt", lambda path: np.savetxt(path, STACK.reshape(12, -1))),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_comes_out_as_it_was_written_in(tmp_path, kind):
    reference, write = ARRAYS[kind]
    write(tmp_path / arrays.parted(reference)[0])
    assert arrays.read(tmp_path, reference).reshape(STACK.shape).tolist() == STACK.tolist()


@pytest.mark.parametrize("kind", ["npz", "HDF5", "MATLAB 5"])
def test_an_array_that_is_not_there_is_named_with_those_that_are(tmp_path, kind):
    reference, write = ARRAYS[kind]
    file, key = arrays.parted(reference)
    write(tmp_path / file)
    with pytest.raises(FormatProblem, match=f"has no array {file}:nothing. There are: {file}:{key}"):
        arrays.read(tmp_path, f"{file}:nothing")


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif", "npy"])
def test_a_grey_picture_comes_out_as_it_was_written_in(tmp_path, suffix):
    for row, image in enumerate(STACK):
        path = tmp_path / f"{row}.{suffix}"
        np.save(path, image) if suffix == "npy" else Image.fromarray(image).save(path)
    pd.DataFrame({"no": range(12), "E": np.arange(12.0) ** 2}).to_parquet(tmp_path / "t.parquet")
    data = load(tmp_path)
    low, high = data.description.layout.range
    assert np.array_equal(np.rint(data.images[:, 0] * (high - low) + low), STACK)
    assert data.targets[:, 0].tolist() == [row**2 for row in range(12)]


# --- what would take much memory, run code or leave the folder ---


def _pickled(path: Path) -> None:
    np.save(path, np.array([{}] * 12, dtype=object), allow_pickle=True)


def _lying_npy(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (12, 10**6, 10**6)})
    path.write_bytes(header.getvalue() + bytes(100))


def _external(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink("/etc/passwd.h5", "/images")


def _raw_outside(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (12, 8, 8), "u1", external=[("/etc/passwd", 0, 768)])


def _virtual(path: Path) -> None:
    layout = h5py.VirtualLayout((12, 8, 8), "u1")
    layout[:] = h5py.VirtualSource("/etc/other.h5", "images", (12, 8, 8))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("images", layout)


def _terabyte_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (10**4, 10**4, 10**4), "f8", chunks=(1, 100, 100))


def _huge_chunk(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (4, 8, 2**25), "u1", chunks=(4, 8, 2**24), compression="gzip")


def _nested(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("/".join("a" * 100))


def _terabyte_mat(path: Path) -> None:
    """A MATLAB file of some 200 bytes whose header claims 10^6 x 10^6 numbers."""
    savemat(path, {"images": np.zeros((3, 4))})
    content = path.read_bytes()
    place = content.index(struct.pack("<IIii", 5, 8, 3, 4))
    path.write_bytes(content[:place] + struct.pack("<IIii", 5, 8, 10**6, 10**6) + content[place + 16 :])


BOMBS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a pickle": ("x.npy", _pickled, "expected images"),
    "an npy that is shorter than it says": ("x.npy", _lying_npy, "it has fewer numbers than its header says"),
    "a link to another HDF5 file": ("x.h5", _external, "/images is a link. hpo follows none."),
    "HDF5 that reads other files": ("x.h5", _raw_outside, "/images is stored outside the file"),
    "virtual HDF5": ("x.h5", _virtual, "/images is stored outside the file"),
    "a terabyte of HDF5": ("x.h5", _terabyte_h5, "expected arrays of at most 2 GiB"),
    "a chunk of 512 MB": ("x.h5", _huge_chunk, "/images has chunks of the shape (4, 8, 16777216)"),
    "groups within groups": ("x.h5", _nested, "6 groups deep"),
    "a terabyte of MATLAB": ("x.mat", _terabyte_mat, "expected arrays of at most 2 GiB"),
    "no HDF5": ("x.h5", lambda path: path.write_bytes(b"hello"), "x.h5: is truncated or damaged"),
    "no MATLAB": ("x.mat", lambda path: path.write_bytes(bytes(1000)), "x.mat: "),
    "no npz": ("x.npz", lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), "x.npz: is damaged or cut off"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_an_array_is_refused_soon_and_in_little_memory_that_is(tmp_path, case):
    name, write, message = BOMBS[case]
    write(tmp_path / name)
    (tmp_path / "t.csv").write_text("E\n" + "".join(f"{row**2}\n" for row in range(12)))
    assert message in judgement(tmp_path)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((64, 1024, 1024), np.uint8))
    savemat(tmp_path / "x.mat", {"images": STACK}, do_compression=True)
    packed = zlib.compress(bytes(64 * 2**20))
    with (tmp_path / "x.mat").open("ab") as file:
        file.write(struct.pack("<II", 15, len(packed)) + packed)
    tracemalloc.start()
    for module, file in ((numpy_files, "x.npz"), (matlab, "x.mat")):
        monkeypatch.setattr(module, "LARGEST_BYTES", 2**24)
        with pytest.raises(FormatProblem, match=r"expected at most 16 MiB|expected at most 0 GiB when unpacked"):
            module.read(tmp_path / file, "images")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def _wide_xlsx(path: Path) -> None:
    """A sheet with one cell in the last column of Excel."""
    pd.DataFrame({"file": ["a"], "E": [1.5]}).to_excel(path, index=False)
    content = {}
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    sheet = "xl/worksheets/sheet1.xml"
    content[sheet] = content[sheet].replace(b'r="B2"', b'r="XFD2"')
    with zipfile.ZipFile(path, "w") as archive:
        for name, member in content.items():
            archive.writestr(name, member)


def _bomb_xlsx(path: Path) -> None:
    pd.DataFrame({"file": ["a"], "E": [1.5]}).to_excel(path, index=False)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/bomb.bin", bytes(300 * 2**20))


def _many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(11_000):
            archive.writestr(str(number), b"")


TABLES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a cell in column 16,384": ("t.xlsx", _wide_xlsx, "expected at most 1000 columns, found more"),
    "xlsx that unpacks to 300 MB": ("t.xlsx", _bomb_xlsx, "expected at most 256 MiB when unpacked"),
    "xlsx of 11,000 members": ("t.xlsx", _many_members, "expected at most 10,000 members, found 11,000 or more"),
    "no xlsx": ("t.xlsx", lambda path: path.write_bytes(b"hello"), "is damaged or cut off"),
    "no Parquet": ("t.parquet", lambda path: path.write_bytes(b"PAR1" * 9), "cannot be read as a table"),
    "1,001 columns": ("t.csv", lambda path: path.write_text(",".join(["1.5"] * 1001)), "expected at most 1000 columns"),
    "a ragged line": (
        "t.csv",
        lambda path: path.write_text("a,b\n1,2\n1,2,3,4\n"),
        "line 3: expected 2 fields as in the header, found more",
    ),
    "columns of one name": ("t.csv", lambda path: path.write_text("a,a\n1,2\n"), "several columns called a"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_is_refused_that_is(tmp_path, case):
    name, write, message = TABLES[case]
    write(tmp_path / name)
    with pytest.raises(FormatProblem) as error:
        tables.read_table(tmp_path, name)
    assert message in str(error.value)


PICTURES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another format than its name": ("2.tif", lambda path: Image.new("L", (8, 8)).save(path, "PNG"), "no TIFF file"),
    "CMYK": (
        "2.jpg",
        lambda path: Image.new("CMYK", (8, 8)).save(path),
        "expected a grey or RGB image, found mode CMYK",
    ),
    "too large": ("2.bmp", lambda path: Image.new("1", (4000, 8)).save(path), "expected at most 2048 pixels a side"),
    "cut off": ("2.tif", lambda path: path.write_bytes(b"II*\0\x08\0\0\0"), "is truncated, damaged"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_a_picture_is_refused_that_is(tmp_path, case):
    name, write, message = PICTURES[case]
    folders.pictures(tmp_path, [f"{row}.png" for row in (0, 1, 3, 4)], folders.cells(4) * 255)
    write(tmp_path / name)
    (tmp_path / "t.csv").write_text("no,E\n" + "".join(f"{row},{row**2}\n" for row in range(5)))
    with pytest.raises(DatasetError) as error:
        load(tmp_path)
    assert f"{name}: " in str(error.value) and message in str(error.value)


def test_a_film_is_refused(tmp_path):
    frames = [Image.fromarray(image) for image in STACK]
    frames[0].save(tmp_path / "0.gif", save_all=True, append_images=frames[1:])
    frames[1].save(tmp_path / "1.gif")
    (tmp_path / "t.csv").write_text("no,E\n0,1.5\n1,2.5\n")
    with pytest.raises(DatasetError, match=r"0\.gif: expected one still image, found several frames"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["npz", "HDF5", "MATLAB 5"])
def test_a_flipped_byte_in_an_array_ends_in_data_or_in_an_error_of_the_format(tmp_path, kind):
    reference, write = ARRAYS[kind]
    path = tmp_path / arrays.parted(reference)[0]
    write(path)
    content = path.read_bytes()
    outcomes = set()
    for place in range(0, len(content), max(1, len(content) // 150)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            arrays.read(tmp_path, reference)
            outcomes.add(True)
        except FormatProblem:
            outcomes.add(False)
    assert False in outcomes


def test_a_missing_library_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    with pytest.raises(
        FormatProblem, match=r"needs openpyxl, which is not installed\. Run: pip install 'hpo\[formats\]'"
    ):
        tables.read_table(tmp_path, "t.xlsx")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.text(alphabet="0123456789+-.eE,;|\n\r\t naif_x\"'#[]%\u0663", max_size=150))
def test_whatever_a_table_holds_reading_ends_in_columns_or_a_format_problem(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    (folder / "fuzzed.csv").write_bytes(text.encode())
    with suppress(FormatProblem):
        table = tables.read_table(folder, "fuzzed.csv")
        meaning = columns.understand(table, Layout(), "", Notes())
        assert meaning is None or meaning.targets.shape == (len(table.cells), len(meaning.names))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(list(KEYS)),
        st.recursive(
            st.text(alphabet="abk.*/[]:-E1", max_size=6) | st.integers(-3, 300) | st.floats() | st.booleans(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["k", "column", "E"]), inner),
            max_leaves=4,
        ),
        max_size=3,
    )
)
def test_whatever_a_description_holds_a_folder_is_understood_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "described"
    if not folder.exists():
        folder.mkdir()
        folders.permeability(folder)
    problems: list[str] = []
    layout = parse(content, "dataset.toml", problems)
    assert parse(tomllib.loads("\n".join(layout.to_toml())), "dataset.toml", []) == layout
    notes = Notes()
    reading = understanding.read(folder, layout, notes)
    assert (reading is None) == bool(notes.questions or notes.errors)
