#!/usr/bin/python3
"""Holds the tree to its floors: tests/scripts/house.py [ROOT]

A room includes only from itself and from floors below it; no files include each other in a circle, where a file is its
.c (or .cu) and its .h, and NAME_internal.h belongs to NAME. Only kernels/ names a backend. Files that prose and
comments name are there, and scripts can be called by their names. Exit code 1 with a line for everything that is not
so.
"""
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

# From the ground up. A room on a line may include from the lines above it and from the others of its own line's left.
FLOORS = [
    "base",
    "model/config",
    "kernels",
    "kernels/cpu/reference",
    "kernels/cpu",
    "kernels/cuda",
    "data",
    "model/program",
    "model/files",
    "model",
    "trainer/output",
    "trainer",
    "",  # train.c
]
# Rooms that must not know each other although one is above the other.
APART = [("kernels/cuda", "kernels/cpu"), ("data", "kernels/cpu"), ("data", "kernels/cuda"), ("model/program", "data"),
         ("model/files", "kernels"), ("model/files", "data"), ("model/files", "model/program"), ("model", "data")]
ROOMS_OF_A_BACKEND = ("kernels/cpu/reference", "kernels/cpu", "kernels/cuda")
# Folders of the project whose files prose may name, and names of files that are others'.
NAMED = "base|configs|data|docs|kernels|model|scripts|tests|trainer"
PATH = re.compile(rf"(?<![\w./$%{{}}\"-])(?:{NAMED})/[\w./-]*\.(?:c|h|cu|py|sh|inc|md|json|png|svg)\b")
NAME = re.compile(r"(?<![\w./$%{}<-])\w[\w-]*\.(?:c|h|cu)\b")
OTHERS = {"cmocka.h", "encoder.py"}
# Headers of device code that the kernels of several files are made from: they include their family's interface, which
# its own .cu file implements with them.
DEVICE_CODE = ("kernels/cuda/adaln_rows", "kernels/cuda/gemm_tiles")


def unit(path):
    return re.sub(r"(_internal)?\.(c|h|cu)$", "", path)


def room(path):
    return path.rpartition("/")[0]


def read_tree(root):
    """{file: [included files of the project]}"""
    files = [path for folder in filter(None, FLOORS) for path in sorted((root / folder).glob("*.*"))]
    files = [path for path in files + [root / "train.c"] if path.suffix in (".c", ".h", ".cu")]
    return {
        str(path.relative_to(root)): re.findall(r'^#\s*include "([^"]+)"', path.read_text(), re.M) for path in files
    }


def check_floors(tree):
    for file, includes in tree.items():
        for included in includes:
            here, there = room(file), room(included)
            if there not in FLOORS:
                yield f"{file} includes {included}, which is in no room"
            elif FLOORS.index(there) > FLOORS.index(here) or (here, there) in APART:
                yield f"{file} includes {included}: {there or 'train.c'} is not below {here}"
            elif there in ROOMS_OF_A_BACKEND and here != there:
                yield f"{file} includes {included}: only {there} itself may"


def check_names(root, tree):
    for file in tree:
        if not file.startswith("kernels/"):
            code = re.sub(r"//[^\n]*", "", (root / file).read_text())
            for name in re.findall(r"\bbackend_(?:cpu|cuda)\b|\bTESSERA_CUDA\b", code):
                yield f"{file} names {name}: kernels/backends.h chooses"


def prose(path):
    """The lines of a file that people read: all of them, of C the comments."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        yield number, line if path.suffix not in (".c", ".h", ".cu") else line.partition("//")[2]


def check_paths(root):
    """Prose names no file that was renamed, moved or deleted."""
    files = [path for folder in NAMED.split("|") for path in (root / folder).rglob("*.*")]
    files += [root / "train.c", root / "README.md", root / "Makefile"]
    names = {path.name for path in files} | OTHERS
    for path in files:
        if path.suffix not in (".md", ".c", ".h", ".cu", ".py", ".sh", ".inc") and path.name != "Makefile":
            continue
        for number, line in prose(path):
            gone = [name for name in PATH.findall(line) if not (root / name).exists()]
            gone += [name for name in NAME.findall(line) if name not in names and path.suffix != ".py"]
            for name in gone:
                if "NAME" not in name:
                    yield f"{path.relative_to(root)}:{number} names {name}, which is not there"


def check_scripts(root):
    """What begins with #! can be called as README and the scripts' own texts call it."""
    for path in (path for folder in ("scripts", "tests") for path in (root / folder).rglob("*.*")):
        if path.suffix in (".py", ".sh") and path.read_bytes()[:2] == b"#!" and not os.access(path, os.X_OK):
            yield f"{path.relative_to(root)} begins with #! and is not executable: chmod +x"


def check_circles(tree):
    """Tarjan's strongly connected components of files."""
    needs = defaultdict(set)
    for file, includes in tree.items():
        if unit(file) in DEVICE_CODE:
            continue
        needs[unit(file)] |= {unit(included) for included in includes} - {unit(file)}
    index, low, stack, circles = {}, {}, [], []

    def visit(v):
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in sorted(needs[v]):
            if w not in index:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], index[w])
        if low[v] == index[v]:
            circle = [stack.pop()]
            while circle[-1] != v:
                circle.append(stack.pop())
            if len(circle) > 1:
                circles.append("a circle of files: " + ", ".join(sorted(circle)))

    sys.setrecursionlimit(10000)
    for v in sorted(needs):
        if v not in index:
            visit(v)
    return circles


def main(argv):
    root = Path(argv[0]) if argv else Path(__file__).resolve().parents[2]
    tree = read_tree(root)
    faults = [*check_floors(tree), *check_names(root, tree), *check_paths(root), *check_scripts(root)]
    faults += check_circles(tree)
    print("\n".join(faults) or f"{len(tree)} files in {len(FLOORS) - 1} rooms: no include goes up, none in a circle")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
