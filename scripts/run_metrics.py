"""A run's metrics.jsonl by kinds of line; docs/metrics.md says what they hold."""
import json


def lines(run):
    """All lines so far. What follows the last newline is still being written."""
    path = run / "metrics.jsonl"
    return list(map(json.loads, path.read_text().split("\n")[:-1])) if path.exists() else []


def steps(run):
    return [line for line in lines(run) if "eval" not in line and "load" not in line]


def evaluations(run):
    return [line for line in lines(run) if "eval" in line]
