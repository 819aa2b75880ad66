"""Code of the user's: source files under one digest, which run only in a process that trusts this digest.

The digest is the SHA-256 of the text SHA256SUMS, which has the SHA-256 of each file. Trust comes from a command line or
from the caller of the API, never from a database, a file or a message. Imports no torch.
"""

import builtins
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import decode_source
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from models.specs import SpecError

Source = Mapping[str, bytes]  # files by relative path

SUMS = "SHA256SUMS"
PRIVATE = "hpo_user_"  # before the digest: the package in which the modules are loaded; users' may be called `models`
MOST_FILES, LARGEST = 200, 2**18  # bytes of a file

_MODULE = re.compile(r"([^\W\d]\w*/)*[^\W\d]\w*\.py")  # path of a module that Python can import

_sources: dict[str, Source] = {}  # by digest, which is that of these bytes
_trusted: dict[str, int] = {}  # how often each digest is trusted now
_folders: list[Path] = []  # with sources in folders that are called as their digests


class NotTrusted(SpecError):
    """Code would have to run that this process does not trust."""

    def __init__(self, digest: str, where: object = "The source in the study's artifacts") -> None:
        super().__init__(
            f"{where}: this is code of the network's author, and not trusted here. Read it. If you trust it, add "
            f"--trust-code {digest}"
        )


@contextmanager
def trusting(digests: Iterable[str]) -> Iterator[None]:
    """Let code with these digests run in this process meanwhile."""
    chosen = list(digests)
    for digest in chosen:
        _trusted[digest] = _trusted.get(digest, 0) + 1
    try:
        yield
    finally:
        for digest in chosen:
            _trusted[digest] -= 1


def is_trusted(digest: str) -> bool:
    """Return whether code with this digest may run in this process."""
    return _trusted.get(digest, 0) > 0


def trusted() -> list[str]:
    """Return the digests of the code that may run in this process."""
    return sorted(filter(is_trusted, _trusted))


def look_in(folder: Path) -> None:
    """Take sources from this folder as well, where each lies in a folder that is called as its digest."""
    _folders.append(folder)


# --- sources ---


def sums(source: Source) -> bytes:
    """Return the text SHA256SUMS, which `sha256sum --check` reads; its own SHA-256 is the digest of the source."""
    return "".join(f"{hashlib.sha256(source[path]).hexdigest()}  {path}\n" for path in sorted(source)).encode()


def digest_of(source: Source) -> str:
    """Return the SHA-256 of all files with their names."""
    return hashlib.sha256(sums(source)).hexdigest()


def gather(folder: Path, reference: str) -> Source:
    """Return the source of the package or module in the folder that `package.module:function` names.

    That is every .py file of the whole package. Raise SpecError if there is none.
    """
    top = reference.partition(":")[0].partition(".")[0]
    paths = [folder / f"{top}.py"]
    # As Python chooses: a folder of data may lie beside a module of the same name.
    if (folder / top / "__init__.py").is_file() or ((folder / top).is_dir() and not paths[0].is_file()):
        paths = sorted(path for path in (folder / top).rglob("*.py") if path.is_file())
        paths = [path for path in paths if _MODULE.fullmatch(path.relative_to(folder).as_posix())]
    elif not paths[0].is_file():
        raise SpecError(f"{reference!r}: expected a module {top}.py or a package {top}/ in {folder}, found none.")
    large = [path for path in paths if path.stat().st_size > LARGEST]
    if not paths or large or len(paths) > MOST_FILES:
        what = f"{large[0]} of {large[0].stat().st_size} bytes" if large else f"{len(paths)} .py files"
        raise SpecError(
            f"{reference!r}: expected 1 to {MOST_FILES} files of at most {LARGEST} bytes in {folder / top}, "
            f"found {what}."
        )
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write(source: Source, folder: Path) -> None:
    """Write the source with its SHA256SUMS into a new folder."""
    for path, content in {**source, SUMS: sums(source)}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def read(folder: Path, digest: str) -> Source:
    """Return the source in a folder. Raise SpecError unless it has this digest."""
    try:
        text = _content(folder / SUMS)
        if hashlib.sha256(text).hexdigest() != digest:
            raise SpecError(
                f"{folder / SUMS}: expected the SHA-256 {digest}, found {hashlib.sha256(text).hexdigest()}: it was "
                "changed or damaged."
            )
        files = listed(text)
        source = {path: _content(folder / path) for path in files}
    except (OSError, ValueError) as error:
        raise SpecError(f"{folder}: expected the source of a model, found none that can be read ({error}).") from None
    if wrong := [path for path in files if hashlib.sha256(source[path]).hexdigest() != files[path]]:
        raise SpecError(f"{folder}: {', '.join(wrong[:5])} is not the file that {SUMS} lists: it was changed.")
    if digest_of(source) != digest:
        raise SpecError(f"{folder / SUMS}: expected each file once, in order, as hpo writes them: it was changed.")
    return source


def listed(text: bytes) -> dict[str, str]:
    """Return the SHA-256 of each file, by its path, of the text SHA256SUMS. Raise ValueError if it is no such."""
    files = {path: sha256 for sha256, _, path in (line.partition("  ") for line in text.decode().splitlines())}
    odd = [path for path in files if not _MODULE.fullmatch(path)]
    if odd or len(files) > MOST_FILES:
        raise ValueError(f"{SUMS} lists {f'the odd path {odd[0]!r:.80}' if odd else f'{len(files)} files'}")
    return files


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would block, a device never end
        raise ValueError(f"{path.name} is a folder, pipe or device")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path.name} has more than {LARGEST} bytes")
    return content


def keep(source: Source) -> str:
    """Let this process find the source by its digest; return that. Nothing of it runs."""
    digest = digest_of(source)
    _sources.setdefault(digest, dict(source))
    return digest


def source_of(digest: str) -> Source:
    """Return the source with this digest, from what was kept or a folder. Raise SpecError if there is none."""
    if digest not in _sources:
        folder = next((folder for folder in _folders if (folder / digest / SUMS).is_file()), None)
        if folder is None:
            raise SpecError(f"the source with the SHA-256 {digest} is not here.")
        keep(read(folder / digest, digest))
    return _sources[digest]


# --- running it ---


def function(digest: str, reference: str) -> Callable[..., Any]:
    """Return the function `package.module:function` of the source. The module runs, once in a process.

    Raise NotTrusted, or SpecError if the source does not define it. An error in the module is that of its author.
    """
    if not is_trusted(digest):
        raise NotTrusted(digest)
    source_of(digest)
    module_name, _, name = reference.partition(":")
    try:
        module = importlib.import_module(f"{PRIVATE}{digest}.{module_name}")
    except ModuleNotFoundError as error:
        if error.name != f"{PRIVATE}{digest}.{module_name}":
            raise
        raise SpecError(f"{reference!r}: the source has no module {module_name}.") from None
    value = vars(module).get(name)
    if not isinstance(value, FunctionType) or value.__module__ != module.__name__:
        raise SpecError(f"{reference!r}: expected a function {name} that {module_name} defines, found none.")
    return value


class _Modules(MetaPathFinder, Loader):
    """Finds and runs the modules of sources that are trusted, under private names."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith(PRIVATE):
            return None
        file, is_package = self._file(fullname)
        return None if file is None else ModuleSpec(fullname, self, origin=file, is_package=is_package)

    def _file(self, fullname: str) -> tuple[str | None, bool]:
        """Return the file of a module, empty for a package without one; None if there is no such module."""
        package, _, inner = fullname.partition(".")
        source, path = _sources.get(package.removeprefix(PRIVATE), {}), inner.replace(".", "/")
        if f"{path}/__init__.py" in source:
            return f"{path}/__init__.py", True
        if path and f"{path}.py" in source:
            return f"{path}.py", False
        is_package = any(file.startswith(f"{path}/" if path else "") for file in source)
        return ("", True) if is_package else (None, False)

    def get_source(self, fullname: str) -> str:  # for tracebacks
        file, _ = self._file(fullname)
        return decode_source(_sources[_digest(fullname)][file]) if file else ""

    def exec_module(self, module: ModuleType) -> None:
        digest = _digest(module.__name__)
        if not is_trusted(digest):  # the only place where source becomes code
            raise NotTrusted(digest)
        source = _sources[digest]
        file, _ = self._file(module.__name__)
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import_of(digest, source)}
        if file:
            module.__file__ = file
            exec(compile(source[file], file, "exec", dont_inherit=True), vars(module))


def _digest(fullname: str) -> str:
    return fullname.partition(".")[0].removeprefix(PRIVATE)


def _import_of(digest: str, source: Source) -> Callable[..., Any]:
    """Return the `import` of the source's own modules, for which the names of these come before all others."""
    own = {path.partition("/")[0].removesuffix(".py") for path in source}

    def import_own(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        top = name.partition(".")[0]
        if level or top not in own:
            return builtins.__import__(name, globals, locals, fromlist, level)
        whole = f"{PRIVATE}{digest}.{name}"
        if fromlist:
            return builtins.__import__(whole, globals, locals, fromlist, 0)
        importlib.import_module(whole)
        return sys.modules[f"{PRIVATE}{digest}.{top}"]

    return import_own


sys.meta_path.append(_Modules())


# --- its errors ---


def fault(error: BaseException) -> str | None:
    """Return file, line and error of what went wrong in the user's code, in words; None if it did not pass there."""
    place = None
    step = error.__traceback__
    while step is not None:
        name = step.tb_frame.f_globals.get("__name__", "")
        if isinstance(name, str) and name.startswith(PRIVATE):
            place = f"{step.tb_frame.f_code.co_filename}, line {step.tb_lineno}"
            digest = _digest(name)
        step = step.tb_next
    if isinstance(error, SyntaxError) and any(error.filename in source for source in _sources.values()):
        place, digest = f"{error.filename}, line {error.lineno}", ""
    if place is None:
        return None
    first = next(iter(str(error).splitlines()), "").replace(f"{PRIVATE}{digest}.", "")
    return f"{place}: {type(error).__name__}: {first}"


def place_of(value: FunctionType) -> str:
    """Return file and line where a function of the user's begins."""
    return f"{value.__code__.co_filename}, line {value.__code__.co_firstlineno}"
