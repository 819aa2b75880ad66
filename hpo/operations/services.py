"""The services that the settings name: start them and stop them."""

import logging
from collections.abc import Callable

from hpo import settings
from hpo.services import serving
from hpo.services.serving import Services, export_lines

__all__ = ["Services", "down", "export_lines", "up"]

log = logging.getLogger("hpo.api")


def up(*, listen: str | None = None, say: Callable[[str], object] = log.info) -> tuple[Services, bool]:
    """Start the embedded services unless they run; return where they are, and whether something was started.

    `listen` is the IPv4 address of this machine to serve other machines at; None leaves it as it is. `say` gets a line
    for each step that takes time. Raise ServiceError if a service cannot be started.
    """
    return serving.up(settings.read(), listen=listen, report=say)


def down() -> bool:
    """Stop the embedded services; return whether any ran."""
    return serving.down(settings.read())
