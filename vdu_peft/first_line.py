"""What an error of another library has to say, in the one line that a message has room for."""


def first_line(error: BaseException) -> str:
    """The error's first line, or its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
