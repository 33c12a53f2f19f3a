"""What can go wrong in a benchmark, apart from defects."""


class OptionError(ValueError):
    """A wrong option: one line for the user, exit code 2."""


class GateError(Exception):
    """A backend computes something else than the reference: no report, exit code 1."""


def one_line(error: Exception) -> str:
    """Class and first line of an error, for a table."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f'{type(error).__name__}: {text}'[:200]
