"""`hpo up`, `down`, `backup`, `restore`, `doctor`: the services and what they store."""

import argparse
import json
import shlex
import socket
import sys
from typing import TYPE_CHECKING

from hpo import api, settings
from hpo.cli import terminal
from hpo.cli.options import JSON, command, flag, option, say
from hpo.text import counted

if TYPE_CHECKING:
    from hpo.api import Backup


@command(
    option(
        "--listen",
        "ADDRESS",
        "serve other machines at this address of this one, with access control; 127.0.0.1 serves none (default: as it "
        "was, at first 127.0.0.1)",
    ),
    flag("--show-credentials", "print the export lines for a notebook on a terminal, too; one holds a password"),
)
def up(options: argparse.Namespace) -> int:
    """Start the embedded Postgres and MLflow server, or say where they are."""
    services, started = api.up(listen=options.listen, say=say)
    print(f"{'Started' if started else 'Already running'}. MLflow: {services.tracking_uri}")
    if services.credentials:
        print(
            f"User and password are in {services.credentials}. A worker on another machine needs a copy of this file:"
        )
        file = shlex.quote(f"{socket.gethostname()}:{services.credentials}")
        terminal.exactly(f"scp {file} ~/hpo-credentials.toml\nexport HPO_CREDENTIALS=~/hpo-credentials.toml\n")
    elif settings.read().embedded:
        terminal.exports(services, asked=options.show_credentials)
    return 0


@command()
def down(options: argparse.Namespace) -> int:
    """Stop the embedded Postgres and MLflow server."""
    print("Stopped." if api.down() else f"The services of {settings.read().home} were not running.")
    return 0


@command(option("file", "FILE", "file to make, such as hpo.tar"))
def backup(options: argparse.Namespace) -> int:
    """Save the databases and all artifacts in one file, while workers go on."""
    contents = api.backup(options.file, say=say)
    for fault in contents.faults:
        print(f"Note: {fault}.", file=sys.stderr)
    size = options.file.stat().st_size / 1e6
    print(f"{options.file}: {_text(contents)}, {size:.1f} MB. `hpo restore` reads it.")
    return 0


@command(option("file", "FILE", "file that `hpo backup` made"))
def restore(options: argparse.Namespace) -> int:
    """Fill an empty HPO_HOME, or empty databases given by URL, from a backup."""
    contents, tracking_uri = api.restore(options.file, say=say)
    print(f"Restored {_text(contents)}. MLflow: {tracking_uri}")
    print("`hpo doctor` checks it; `hpo run` with a study's options, or `hpo worker --study NAME`, goes on.")
    return 0


def _text(contents: "Backup") -> str:
    studies = [
        f"{name} ({counted(done, 'trial', of=trials)} done)" for name, (done, trials) in contents.studies.items()
    ]
    return f"{', '.join(studies) or 'no study'} as of {contents.at}, {counted(contents.artifacts, 'artifact')}"


@command(
    option("--study", "NAME", "only this study (default: all)"),
    flag("--fix", "repair what can be repaired; safe on a running study"),
    JSON,
)
def doctor(options: argparse.Namespace) -> int:
    """Check services, versions, every study's invariants, orphans and caches."""
    checkup = api.doctor(options.study, fix=options.fix)
    for failure in checkup.failures:
        print(failure, file=sys.stderr)
    if options.json:
        findings = [{"kind": item.kind, "what": item.what, "todo": item.todo} for item in checkup.findings]
        print(json.dumps({"mended": checkup.repaired, "findings": findings}, indent=2))
        return 0 if checkup.is_healthy else 1
    for finding in checkup.findings:
        print(f"{finding.kind}: {finding.what}. To do: {finding.todo}.")
    if checkup.repaired:
        print(f"Repaired: {checkup.repaired}.")
    print(checkup.verdict_on_latency)
    if checkup.is_healthy:
        print("Healthy: services, versions, studies, aliases, files and caches are as they should be.")
    elif not options.fix and any(finding.remedy is not None for finding in checkup.findings):
        print("`hpo doctor --fix` repairs what it can.")
    return 0 if checkup.is_healthy else 1
