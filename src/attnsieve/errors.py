"""Errors that users can act on."""


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do."""


class NotFiniteError(UserError):
    """Numbers are NaN or infinite: `found` says which, `remedy` what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found, remedy)
        self.found = found

    def __str__(self) -> str:
        return "; ".join(self.args)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
