"""Whatever lies in a folder of data, reading it ends in data or in DatasetError, soon and in little memory."""

import io
import os
import re
import shutil
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import watched
from PIL import Image

from data_pipeline.dataset import load
from data_pipeline.errors import DatasetError
from data_pipeline.npz import load_npz, save_npz

MEMORY = 2**30  # bytes; without anything hostile it takes 40 MB
SIZE = 8  # pixels a side
ROW = ",".join("1" * 10)

JUDGE = """
from pathlib import Path
from data_pipeline.dataset import load
from data_pipeline.errors import DatasetError
try:
    load(Path(sys.argv[1]))
    answer = "good"
except DatasetError as error:
    answer = str(error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid folder of one grey cell."""
    path = tmp_path / "plates"
    path.mkdir()
    (path / "0_cell.png").write_bytes(png())
    (path / "labels.csv").write_text(ROW + "\n")
    return path


def judgement(folder: Path) -> str:
    """'good' or the error's text; fails if judging takes long, much memory, or ends in another error."""
    found = watched.run(JUDGE, folder)
    assert found.peak < MEMORY, f"{found.peak / 2**20:.0f} MiB"
    return str(found.answer)


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png(
    width: int = SIZE, height: int = SIZE, *, bits: int = 8, before: bytes = b"", after: bytes = b"", data: bytes = b""
) -> bytes:
    """A grey PNG, with chunks before and after its pixels, which are black unless compressed `data` is given."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    pixels = data or zlib.compress(bytes(height * (1 + (width * bits + 7) // 8)), 9)
    parts = (chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_process_that_takes_too_much_memory_or_time_is_noticed():
    assert watched.run("answer = 1").peak < 100 * 2**20 < watched.run("answer = len(bytearray(10**8))").peak
    with pytest.raises(AssertionError, match="exit code"):
        watched.run("while True: pass", cpu=1)


# --- images ---


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("CMYK", (SIZE, SIZE)).save(content, format="JPEG")
    return content.getvalue()


def zeros(megabytes: int) -> bytes:
    """`zlib.compress(bytes(megabytes * 2**20))`, made in no time: one block, repeated."""
    maker = zlib.compressobj(9, wbits=-15)
    block = maker.compress(bytes(2**20)) + maker.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(wbits=-15).flush()
    checksum = (megabytes * 2**20 % 65521) << 16 | 1  # Adler's, of zeros
    return b"\x78\xda" + block * megabytes + end + checksum.to_bytes(4, "big")


def bomb(prefix: bytes) -> bytes:
    return prefix + zeros(2000)


def text(size: int) -> bytes:
    return chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(size), 9))


IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "169 megapixels": (lambda: png(13_000, 13_000, bits=1), "expected at most 2048 pixels a side, found 13000 x 13000"),
    "a CMYK JPEG": (jpeg, "is not a PNG file, whatever its name says"),
    "zTXt of 2 GB": (lambda: png(before=chunk(b"zTXt", bomb(b"k\0\0"))), "is truncated or damaged (Decompressed"),
    "zTXt behind": (lambda: png(after=chunk(b"zTXt", bomb(b"k\0\0"))), "is truncated or damaged (Decompressed"),
    "iTXt of 2 GB": (lambda: png(before=chunk(b"iTXt", bomb(b"k\0\1\0\0\0"))), "is truncated or damaged (Decompress"),
    "iCCP of 2 GB": (lambda: png(before=chunk(b"iCCP", bomb(b"k\0\0"))), "is truncated or damaged (Decompressed"),
    "a thousand texts": (lambda: png(before=text(2**20 - 1) * 1000), "is truncated or damaged (Too much memory"),
    "2,700,000 chunks": (lambda: png(after=chunk(b"prVt", b"") * 2_700_000), "is truncated or damaged (it has more"),
    "empty pixel chunks": (lambda: png(after=chunk(b"IDAT", b"") * 2_700_000), "is truncated or damaged (it has more"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_is_refused_soon_and_in_little_memory(folder, case):
    content, message = IMAGES[case]
    (folder / "0_cell.png").write_bytes(content())
    if case == "169 megapixels":
        assert (folder / "0_cell.png").stat().st_size < 25_000
    assert f"has 1 problem:\n  0_cell.png: {message}" in judgement(folder)


def test_pixels_beyond_those_of_the_header_are_not_decompressed(folder):
    (folder / "0_cell.png").write_bytes(png(data=zeros(2000)))
    assert judgement(folder) == "good"


def test_an_image_whose_name_no_table_could_hold_is_refused(folder):
    try:
        os.rename(folder / "0_cell.png", os.fsencode(folder) + b"/0_\xff.png")
    except OSError:
        pytest.skip("this file system has no such names")
    assert r"'0_\udcff.png': expected a file name in UTF-8." in judgement(folder)


# --- the table ---

TABLES: dict[str, tuple[Callable[[], str], str]] = {
    "a million lines": (
        lambda: "".join(f"{number},1,1,1,1,1,1,1,1,1\n" for number in range(1, 1_000_001)),
        "expected at most 100000 rows, found 1000000 lines",
    ),
    "20 million short lines": (lambda: "xy\n" * 20_000_000, "expected at most 100,000 rows, found 19,999,999"),
    "60 million empty lines": (lambda: "\n" * 60_000_000, "is empty"),
    "60 MB of commas": (lambda: "," * 60_000_000, "line 1: expected at most 65536 characters, found 60000000"),
    "60 MB of words": (lambda: "a," * 30_000_000, "line 1: expected at most 65536 characters, found 60000000"),
    "60 MB of digits": (lambda: "1" * 60_000_000, "line 1: expected at most 65536 characters, found 60000000"),
    "60 MB in its second line": (
        lambda: ROW + "\n" + "," * 60_000_000,
        "line 2: expected 10 numbers .* found a line of 60000000 characters",
    ),
    "a zero byte": (lambda: ROW + "\0\n", "expected text, found a zero byte at position 19"),
    "zero bytes only": (lambda: "\0" * 60_000_000, "expected text, found a zero byte at position 0"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_is_refused_soon_and_in_little_memory_that_is(folder, case):
    content, message = TABLES[case]
    (folder / "labels.csv").write_text(content())
    found = judgement(folder)
    assert re.search(rf"  labels\.csv:? {message}", found), found
    assert len(found) < 1000


def test_a_table_of_as_many_rows_as_make_makes_is_read(folder):
    (folder / "labels.csv").write_text("".join(f"{number},1,1,1,1,1,1,1,1,1\n" for number in range(1, 100_001)))
    assert "has 99999 problems:\n  row 1: expected one image 1_*.png, found none" in judgement(folder)


# --- dataset.toml ---

TOMLS = {
    "a key of 8,000 parts": ("name" + ".a" * 8000 + " = 1", "it is nested too deeply"),
    "a phase of 8,000 parts": (
        "[phases.inclusion]\n[phases.matrix]\npoisson_ratio=0\nyoung_modulus" + ".a" * 8000 + " = 1",
        "it is nested too deeply",
    ),
    "10,000 brackets": ("name = " + "[" * 10_000, "it is nested too deeply"),
    "more than 16 KiB": ("#" * 70_000 + "\nname = '/'", "it is larger than 16 KiB"),
}


@pytest.mark.parametrize("case", TOMLS)
def test_a_dataset_toml_is_refused_soon_and_in_little_memory_that_has(folder, case):
    content, message = TOMLS[case]
    (folder / "dataset.toml").write_text(content)
    assert f"  dataset.toml: expected a TOML file in UTF-8, but {message}" in judgement(folder)


@pytest.mark.parametrize(
    "made", ["made.a" + ".a" * 500 + " = 1", "made.day = 2020-01-01", "made.seed = nan", "made = 3"]
)
def test_what_make_never_wrote_does_not_reach_the_studys_json(folder, made):
    (folder / "dataset.toml").write_text(made)
    with pytest.raises(DatasetError, match=r"dataset\.toml: made: expected the table that `make` wrote"):
        load(folder)


def test_a_modulus_larger_than_any_float_is_refused(folder):
    (folder / "dataset.toml").write_text(
        f"[phases]\nmatrix={{young_modulus=1{'0' * 400},poisson_ratio=0}}\n"
        "inclusion={young_modulus=1,poisson_ratio=0}"
    )
    with pytest.raises(DatasetError, match="young_modulus: expected a finite number, found 1000"):
        load(folder)


# --- what is no file, and what is too many ---


@pytest.mark.parametrize("name", ["0_cell.png", "labels.csv", "dataset.toml"])
@pytest.mark.parametrize("kind", ["pipe", "link to an endless device", "link to itself"])
def test_what_cannot_be_read_to_its_end_is_not_opened(folder, name, kind):
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(name if kind == "link to itself" else "/dev/zero")
    expected = (
        "cannot be read (" if kind == "link to itself" else "expected a regular file, found a folder, pipe or device"
    )
    assert f"  {name}: {expected}" in judgement(folder)


@pytest.mark.root
@pytest.mark.parametrize("name", ["0_cell.png", "labels.csv", "dataset.toml"])
def test_a_device_itself_is_not_opened(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mknod(folder / name, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # the numbers of /dev/zero
    assert f"  {name}: expected a regular file, found a folder, pipe or device" in judgement(folder)


@pytest.mark.slow
def test_a_folder_of_100_000_entries_is_judged_soon_and_in_little_memory(folder):
    for number in range(1, 100_001):
        os.close(os.open(folder / f"{number}_cell.png", os.O_CREAT))
    try:
        assert "has 100000 problems:\n  1_cell.png: has no row in the table" in judgement(folder)
    finally:
        shutil.rmtree(folder)  # 100,000 files need not wait for pytest's cleaning


# --- one bit ---


def flips(content: bytes, *, step: int = 1) -> Iterator[bytes]:
    """The content with each of its bits, or every `step`th, turned over."""
    for number in range(0, 8 * len(content), step):
        position, bit = divmod(number, 8)
        yield content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def summed(content: bytes) -> bytes:
    """The PNG with the right checksum for each of its chunks, as far as they can be told."""
    position, parts = 8, [content[:8]]
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        parts.append(content[position : position + 4] + content[position + 4 : position + 8 + length])
        parts.append(zlib.crc32(content[position + 4 : position + 8 + length]).to_bytes(4, "big"))
        position += 12 + length
    return b"".join(parts)


def palette_png() -> bytes:
    """All that a small PNG can have: a palette, transparency, a text, a physical size."""
    content = io.BytesIO()
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) // 16, mode="P")
    image.putpalette([0, 0, 0, 80, 80, 80, 160, 160, 160, 255, 255, 255])
    image.save(content, format="PNG", transparency=bytes([0, 255, 255, 255]), dpi=(72, 72))
    whole = content.getvalue()
    return whole[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"words")) + whole[33:]


def ends_well(read: Callable[[], object]) -> bool:
    """Whether reading gave data; False if DatasetError; any other error is passed on."""
    try:
        read()
    except DatasetError:
        return False
    return True


@pytest.mark.parametrize("repaired", [False, True], ids=["as it is", "with checksums repaired"])
def test_a_flipped_bit_in_an_image_ends_in_data_or_in_an_error_of_ours(folder, repaired):
    path, outcomes = folder / "0_cell.png", []
    for content in flips(palette_png()):
        path.write_bytes(summed(content) if repaired else content)
        outcomes.append(ends_well(lambda: load(folder)))
    assert not all(outcomes) and any(outcomes) == repaired  # a checksum stands over every bit


@pytest.mark.parametrize("name", [pytest.param("labels.csv", marks=pytest.mark.slow), "dataset.toml"])
def test_a_flipped_bit_in_a_text_ends_in_data_or_in_an_error_of_ours(folder, name):
    original = {
        "labels.csv": b"1,1.5e-8,-2,3,4,+.5,6,7,8,9\r\n",
        "dataset.toml": b'name="a"\nunit="GPa"\n[phases]\nmatrix={young_modulus=1,poisson_ratio=0}\n'
        b"inclusion={young_modulus=7e4,poisson_ratio=0.2}\n[made]\nrecipe=1\n",
    }[name]
    outcomes = []
    for content in flips(original):
        (folder / name).write_bytes(content)
        outcomes.append(ends_well(lambda: load(folder)))
    assert len(set(outcomes)) == 2


def test_a_flipped_bit_in_an_npz_ends_in_the_same_data_or_in_an_error_of_ours(folder, tmp_path):
    path = tmp_path / "set.npz"
    dataset = load(folder)
    save_npz(dataset, path)

    def read() -> None:
        assert load_npz(path).digest == dataset.digest

    for content in flips(path.read_bytes(), step=5):
        path.write_bytes(content)
        ends_well(read)
