"""Errors that users can act on."""


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
