#!/usr/bin/python3
"""Which lines of the host code a coverage build has run.

    tests/scripts/coverage.py BUILD [--at-least PERCENT]

Reads the counts that the programs of BUILD (make COVERAGE=1) left beside their objects, with gcov. A line is covered
when any of its copies ran: in float, in double, inlined or not. Prints a table by file, then for each file with lines
that never ran the functions they are in. Exit code 1 when less than PERCENT of all lines ran. Headers count as files;
libraries, tests and CUDA do not.
"""
import argparse, collections, glob, json, os, subprocess, sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
HOST = ("base/", "data/", "model/", "trainer/", "kernels/", "train.c")


class File:
    def __init__(self):
        self.runs = collections.Counter()  # line -> times it ran
        self.function = {}  # line -> name of the function it is in


def objects(build):
    for path in sorted(glob.glob(f"{build}/**/*.gcno", recursive=True)):
        if "tests" not in os.path.relpath(path, build).split(os.sep):
            yield path


def reports(paths, chunk=40):
    """gcov's reports, one for each object; an object without counts reports that no line ran."""
    for i in range(0, len(paths), chunk):
        command = [os.environ.get("GCOV", "gcov"), "--json-format", "--stdout", *paths[i : i + chunk]]
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        yield from (json.loads(line) for line in output.splitlines() if line)


def collect(build):
    files = collections.defaultdict(File)
    for report in reports([os.path.abspath(path) for path in objects(build)]):
        for source in report["files"]:
            name = os.path.relpath(os.path.join(report["current_working_directory"], source["file"]), ROOT)
            if not name.startswith(HOST) or name.startswith("kernels/cuda/"):
                continue
            for line in source["lines"]:
                files[name].runs[line["line_number"]] += line["count"]
                if line.get("function_name"):
                    files[name].function[line["line_number"]] = line["function_name"]
    return files


def missed(file):
    """[(function, [line, ..])] of the lines that never ran, in order."""
    by_function = {}
    for line in sorted(file.runs):
        if not file.runs[line]:
            by_function.setdefault(file.function.get(line, "?"), []).append(line)
    return list(by_function.items())


def ranges(lines, runs):
    """Line numbers as text; lines between which no other line has code are one range."""
    spans = []
    code = sorted(runs)
    after = dict(zip(code, code[1:]))
    for line in lines:
        if spans and after.get(spans[-1][1]) == line:
            spans[-1][1] = line
        else:
            spans.append([line, line])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build")
    parser.add_argument("--at-least", type=float, default=0, metavar="PERCENT")
    options = parser.parse_args()
    files = collect(options.build)
    if not files:
        sys.exit(f"error: no coverage data under {options.build}; make coverage builds and runs it")

    print("lines that never ran:")
    for name, file in sorted(files.items()):
        for function, lines in missed(file):
            print(f"  {name}: {function}: {ranges(lines, file.runs)}")
    covered = total = 0
    print(f"\n{'covered':>8} {'lines':>6} {'ran':>6}  file")
    for name, file in sorted(files.items()):
        ran, lines = sum(1 for n in file.runs.values() if n), len(file.runs)
        covered, total = covered + ran, total + lines
        print(f"{100 * ran / lines:7.1f}% {lines:6} {ran:6}  {name}")
    percent = 100 * covered / total
    print(f"{percent:7.1f}% {total:6} {covered:6}  all host code (at least {options.at_least:g}%)")
    return percent < options.at_least


if __name__ == "__main__":
    sys.exit(main())
