"""The errors that knep raises for its users: one line each, naming what is wrong, where, and what to write instead."""


class InputError(ValueError):
    """What the user wrote cannot work; the commands print it as one line and exit with code 2."""


class NoEffectError(InputError):
    """A trick was asked for and changed nothing, with the reason why."""
