"""Errors that end in one message for the user, never in a traceback."""


class UserError(Exception):
    """Something the user can put right: the message says what is wrong, where, and what to do."""
