"""The `hpo` command: parse, call, print."""

from hpo.cli.main import program

__all__ = ["program"]
