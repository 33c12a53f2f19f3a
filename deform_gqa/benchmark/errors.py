"""What can go wrong in a benchmark, apart from defects."""


class OptionError(ValueError):
    """A wrong option: one line for the user, exit code 2."""


class GateError(Exception):
    """A backend computes something else than the reference: no report, exit code 1."""
