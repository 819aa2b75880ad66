"""The error of data that cannot be used."""


class DatasetError(ValueError):
    """The data cannot be used as it is; the message says what was expected, what was found, where, and what to do."""
