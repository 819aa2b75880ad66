"""The command line: `hpo COMMAND`. Each command parses, calls one function of `hpo.api`, and prints what that returns.

`hpo --help` takes a tenth of a second: modules of this package import nothing heavy when they are imported. `hpo.api`
imports a function when it is used; what only draws tables (rich, and `hpo.report`) is imported in the command.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from hpo import machine
from hpo.cli import completion, data, models, options, results, services, studies, terminal, unreachable
from hpo.cli.usage import Parser
from hpo.errors import DatabaseUnreachable, SettingsError, TrackingUnreachable, UserError
from hpo.settings import home_folder
from hpo.text import visible

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def program() -> None:
    """The `hpo` of the shell: `main`, and then the end, though a thread may still be waiting for a server."""
    terminal.take_over()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # which the first process of a container never gets
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    os.environ["PYTHONSAFEPATH"] = "1"  # for what a library starts: nothing imports from where the user stands
    if any("error".startswith(option.partition(":")[0] or "default") for option in sys.warnoptions):
        warnings.simplefilter("default")  # for MLflow and others warn when they are imported
        os.environ["PYTHONWARNINGS"] = "default"  # of trainers, too
    code = main()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0 if it is done, 1 after an error that the user can correct, 2 for wrong usage."""
    options = parser().parse_args(arguments)
    if options.version:
        print(f"hpo {metadata.version('hpo')}")
        return 0
    if options.print_completion:
        print(completion.script(parser(), options.print_completion))
        return 0
    if options.command is None:
        parser().print_help()
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Messages()])
    logging.getLogger("hpo").setLevel(logging.INFO)
    try:
        _require_folders()
        code = options.function(options)
        sys.stdout.flush()
        return int(code or 0)
    except KeyboardInterrupt:
        if machine.may_start(1):
            print("Interrupted.", file=sys.stderr)
            return 130
        print(f"hpo: {machine.LIMITED}{machine.limits()}", file=sys.stderr)  # numpy's OpenBLAS raised the signal
        return 1
    except Exception as error:
        if text := message(error):
            print(f"hpo: {text}", file=sys.stderr)
            return 1
        raise


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; its result has the command's function as `function`."""
    top = Parser(
        prog="hpo",
        description="Search hyperparameters of networks that predict a microstructure's stiffness tensor; every trial "
        "is tracked in MLflow, the best model is promoted and can be downloaded.",
        epilog="Without HPO_DATABASE_URL and MLFLOW_TRACKING_URI hpo runs its own Postgres and MLflow server under "
        "HPO_HOME (default: ./mlruns). All settings: docs/reference/settings.md.",
    )
    top.add_argument("--version", action="store_true", help="print the version of hpo and leave")
    top.add_argument(
        "--print-completion", choices=completion.SHELLS, help="print a script that completes hpo's commands on Tab"
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for module in (studies, results, models, services):
        options.add(commands, module)
    text = "Make a labelled data set, or check a folder."
    parser = commands.add_parser("data", help=text, description=text)
    options.add(parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True), data)
    return top


def _require_folders() -> None:
    """Have a current folder and a home folder: HPO_HOME for a user without one. Raise SettingsError."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise SettingsError("The current folder was removed, perhaps made again: change into one (cd).") from None
    try:
        Path.home()
    except RuntimeError:  # HOME is unset, and /etc/passwd does not name the user, as in some containers
        os.environ["HOME"] = str(home_folder(os.environ))


class Messages(logging.Handler):
    """Log lines on standard error as it is at that moment: the live display puts them above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # a full disk under a log file ends no work
            print(visible(self.format(record)), file=sys.stderr)  # the display would take colours out of it


def message(error: Exception) -> str | None:
    """Return the message of an error that the user can correct; None for a fault of hpo."""
    if machine.is_limit(error):
        text = _message(error) or machine.LIMITED
        return f"{text.strip().rstrip('.')}.{machine.limits()}"
    return _message(error)


def _message(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, DatabaseUnreachable):
        return unreachable.database(error)
    if isinstance(error, TrackingUnreachable):
        return unreachable.tracking(error)
    # Classes of packages that know nothing of hpo, by their names: none is imported for it.
    kinds = {f"{kind.__module__.partition('.')[0]} {kind.__name__}" for kind in type(error).__mro__}
    if "models SpecError" in kinds:
        return str(error)
    if kinds & {"mlflow MlflowException", "requests RequestException"}:
        return unreachable.tracking_refuses(error)
    if "sqlalchemy SQLAlchemyError" in kinds:
        return unreachable.database_refuses(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'A file of hpo'}: {error.strerror}. Nothing is lost; the same command goes on."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return None
