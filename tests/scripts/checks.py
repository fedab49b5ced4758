"""What the tests that run ./train as a whole share."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import run_metrics  # how those that import it read a run's lines


def check(holds, what):
    """Ends the test with `what` unless it holds, under python -O too."""
    if not holds:
        raise AssertionError(what)
