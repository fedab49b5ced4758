"""What the tests that run ./train as a whole share."""


def check(holds, what):
    """Ends the test with `what` unless it holds, under python -O too."""
    if not holds:
        raise AssertionError(what)
