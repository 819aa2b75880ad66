"""Errors a user can put right: one class per thing; the message says expected, found, where, and what to do."""

import errno

from data_pipeline.errors import UserError as UserError


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full or read-only disk of this machine is behind the error; safetensors and MLflow tell it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return True
        if any(words in str(error) for words in ("(os error 28)", "(os error 30)", "[Errno 28]", "[Errno 30]")):
            return True
        error = error.__cause__ or error.__context__
    return False


class Unreachable(Exception):
    """A service cannot be reached, or takes nothing, at the moment: the caller tries again later."""


class DatabaseUnreachable(Unreachable):
    """The database cannot be reached, or takes nothing, at the moment."""


class TrackingUnreachable(Unreachable):
    """The MLflow server cannot be reached, or takes nothing, at the moment."""


class SettingsError(UserError):
    """An environment variable or option does not make sense."""


class ServiceError(UserError):
    """A service (Postgres, MLflow) could not be started, stopped or reached."""


class StudyError(UserError):
    """A study file, its overrides or its prerequisites are wrong."""


class StudyConflict(UserError):
    """The same study name already stands for another specification."""


class NotFound(UserError):
    """What was asked for by name does not exist."""


class BackupError(UserError):
    """A backup cannot be made, is not whole, or cannot be restored here."""


class ReportError(UserError):
    """A report cannot be written where it was asked for."""


class Untrusted(UserError):
    """Code of a user would have to run here, and nobody has said that it is trusted."""


class ModelError(UserError):
    """A downloaded model's files are missing, changed or cannot be used on the given image."""
