"""Errors a user can put right: one class per thing; the message says expected, found, where, and what to do."""


class UserError(Exception):
    """Base of every error that `hpo` prints as one message, with exit code 1 and no traceback."""


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


class ModelError(UserError):
    """A downloaded model's files are missing, changed or cannot be used on the given image."""
