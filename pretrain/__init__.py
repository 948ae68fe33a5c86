"""Pretraining of decoder language models, from raw text to a checkpoint that transformers loads."""


class UserError(Exception):
    """Something that the user can fix: settings, data, files. Programs print the message without a traceback."""

    status = 2
    """Exit status of a program that ends with this error; docs/running.md lists them."""
