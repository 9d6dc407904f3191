"""The one error a user is meant to read."""


class RequestError(ValueError):
    """A request that cannot be served: the value, what was expected, what to do; one line.

    The commands print it without a traceback and exit with code 2.
    """


def require(condition: bool, message: str) -> None:
    """Raises `RequestError(message)` unless `condition` holds."""
    if not condition:
        raise RequestError(message)
