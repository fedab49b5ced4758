#!/usr/bin/python3
"""No function or table that other files see without need: tests/scripts/unused.py BUILD

Reads the symbols of a build's objects. What no other file of the engine uses is static, unless tests use it too; what
tests alone use stands in tests/. Names that begin with a dot are the compiler's. Exit code 1 with a line for everything
that is not so.
"""
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from house import FLOORS

ROOT = Path(__file__).resolve().parents[2]
# Called by tests alone, and at home where they are.
FOR_TESTS = {
    "engine_allocate": "both halves of what a run does around its first weights",
    "program_seconds": "what the seconds of a plan are held against",
    "program_replay_random": "a replay, by the functions that replays are made of",
}


def symbols(objects):
    """(object, kind, name) as nm has them."""
    if not objects:
        return
    said = subprocess.run(["nm", "-A", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    for line in said.splitlines():
        file, _, symbol = line.rpartition(".o:")
        yield file, symbol.split()[-2], symbol.split()[-1]


def words(text):
    return re.findall(r"\w+", re.sub(r"//[^\n]*", "", text))


def main(build):
    sources = [s for room in FLOORS for s in sorted((ROOT / room).glob("*.c")) if s.name != "stb.c"]
    objects = {build / s.relative_to(ROOT).with_suffix(".o"): s for s in sources}
    absent = [str(o) for o in objects if not o.exists()]
    if absent:
        sys.exit(f"error: there is no {absent[0]}; 'make tests' builds it")
    defined, used = {}, defaultdict(set)
    for file, kind, name in symbols(objects):
        if kind in "TDBRC":
            defined[name] = objects[Path(file + ".o")]
        elif kind == "U":
            used[name].add(file)
    used_by_tests = {name for _, kind, name in symbols(sorted((build / "tests").glob("*/*.o"))) if kind == "U"}
    for path in sorted((ROOT / "tests/gpu").glob("*.[ch]")):
        used_by_tests |= set(words(path.read_text()))
    device = {word for path in (ROOT / "kernels/cuda").iterdir() for word in words(path.read_text())}
    faults = []
    for name, source in sorted(defined.items(), key=lambda pair: (pair[1], pair[0])):
        if name.startswith(".") or used[name] or name in device or name in FOR_TESTS or name == "main":
            continue
        used_at_home = words(source.read_text()).count(name) > 1
        if used_at_home and name in used_by_tests:
            continue
        where = source.relative_to(ROOT)
        if used_at_home:
            faults.append(f"{where}: only this file uses {name}: static")
        else:
            faults.append(f"{where}: {'only tests use' if name in used_by_tests else 'nobody uses'} {name}")
    print("\n".join(faults) or f"{len(defined)} symbols of {len(sources)} files: all are used where they are seen")
    return 1 if faults else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve()))
