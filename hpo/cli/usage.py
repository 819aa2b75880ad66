"""Wrong usage of a command: one message, which says what was expected, and what was meant perhaps."""

import argparse
import re
from typing import Any, NoReturn

from hpo.text import near_miss

_CHOICE = re.compile(r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.*)\)", re.DOTALL)  # argparse's


class Parser(argparse.ArgumentParser):
    """A parser that ends wrong usage with exit code 2 and one message."""

    def error(self, message: str) -> NoReturn:
        if wrong := _CHOICE.fullmatch(message):
            name, word, choices = wrong.groups()
            valid = re.findall(r"[\w.-]+", choices)
            message = f"{name}: expected one of {', '.join(valid)}, found '{word}'.{near_miss(word, valid)}"
        end = "" if message.endswith(("?", ".")) else "."
        self.exit(2, f"hpo: {message}{end} `{self.prog} --help` shows what there is.\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what this command does not know, where its own options are at hand."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = near_miss(unknown[0].partition("=")[0], re.findall(r"--[\w-]+", self.format_usage()))
            self.error(f"unexpected: {' '.join(unknown)}.{near}")
        return options, unknown
