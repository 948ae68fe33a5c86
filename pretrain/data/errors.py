"""The errors of data that a user can fix."""

from __future__ import annotations

from pretrain import UserError


class DataError(UserError):
    """Data that cannot be used. The message says what is wrong, where, and what to do."""


class DataMissing(DataError):
    """No token file has that name."""


class TaskError(DataError):
    """A file of tasks that cannot be used."""


class StoreError(UserError):
    """A store that does not answer. Nothing is wrong with the data: the same command may work later."""

    status = 75  # start it again
