"""The error of data that cannot be used."""


class UserError(Exception):
    """Base of every error that `hpo` prints as one message, with exit code 1 and no traceback."""


class DatasetError(UserError, ValueError):
    """The data cannot be used as it is; the message says what was expected, what was found, where, and what to do."""
