#!/usr/bin/python3
"""Plants the one-line bugs of tests/scripts/mutants.txt one at a time and runs the tests that have to notice.

    tests/scripts/mutants.py BUILD [SELECT...]      make mutants [SELECT="..."]
    tests/scripts/mutants.py --texts                only whether every mutant's text stands once

SELECT: numbers (7, 3-12), names, parts of names or files. The bugs are planted in a copy of the tree, BUILD/mutants,
which a second call updates; this checkout stays as it is. The unchanged copy has to pass every test named first. A
mutant has to be found exactly once, to compile, and to be killed: a test fails, crashes, or takes ten times as long.
Prints a table; the last line says how many lived. Exit code 1 when one did, or could not be judged."""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PYTHON", "/usr/bin/python3")
TREE = "Makefile README.md train.c base configs data docs kernels model scripts tests trainer".split()
SCRIPTS = {  # others are tests/scripts/NAME.sh build
    "run_folder": [PYTHON, "tests/scripts/run_folder.py", "build/train"],
    "uses": [PYTHON, "tests/scripts/uses.py", "build"],
    "ranks_faults": [PYTHON, "tests/scripts/ranks_faults.py", "--build", "build"],
    "ablate": [PYTHON, "tests/scripts/test_ablate.py", "build/train"],
    "equal_tokens": [PYTHON, "tests/scripts/test_equal_tokens.py", "build/train"],
    "memory_claims": [PYTHON, "tests/scripts/test_memory_claims.py"],
    "compare_torch": [PYTHON, "tests/scripts/test_compare_torch.py", "build/train"],
    "house": [PYTHON, "tests/scripts/house.py"],
}


class Mutant:
    def __init__(self, number, name, file, tests):
        self.number, self.name, self.file, self.tests = number, name, file, tests
        self.before, self.after = [], []


def read_table(path):
    table = []
    for at, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith(("- ", "+ ")):
            (table[-1].before if line[0] == "-" else table[-1].after).append(line[2:])
        elif line.strip() and line[0] != "#":
            words = line.split()
            if len(words) < 3 or words[0] in (m.name for m in table):
                sys.exit(f"{path}:{at}: expected a new NAME, FILE TEST...")
            table.append(Mutant(len(table) + 1, words[0], words[1], words[2:]))
    return table


def chosen(table, select):
    def fits(m):
        for word in select:
            numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
            if numbers and int(numbers[1]) <= m.number <= int(numbers[2] or numbers[1]):
                return True
            if not numbers and (word in m.name or word in m.file):
                return True
        return not select

    return [m for m in table if fits(m)]


def program_of(test):
    """What has to be built for a test, beside build/train."""
    program, _, what = test.partition(":")
    if program == "parity":
        return f"build/tests/dump_{what}"
    if program in ("keys", "script"):
        return "build/train"
    return f"build/f64/tests/{program[4:]}" if program.startswith("f64/") else f"build/tests/{program}"


class Copy:
    """The tree that is changed, and its build."""

    def __init__(self, root):
        self.root = root
        wanted = set()
        for top in TREE:
            at = ROOT / top
            files = [at] if at.is_file() else [f for f in at.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
            for f in files:
                to = root / f.relative_to(ROOT)
                wanted.add(to)
                if to.exists() and to.read_bytes() == f.read_bytes():
                    continue
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(f, to)
        for top in TREE:
            for f in (root / top).rglob("*"):
                if f.is_file() and f not in wanted and "__pycache__" not in f.parts:
                    f.unlink()
        cache = root / ".cache"
        if (ROOT / ".cache").exists() and not cache.exists():
            cache.symlink_to(ROOT / ".cache")

    def build(self, tests):
        """What the tests run; None, or what the compiler said."""
        targets = {program_of(test) for test in tests}
        if any(t.startswith("parity:") for t in tests):
            targets.add("build/train")
        if "script:ranks" in tests:
            targets.add("build/tests/test_ranks")
        if "script:ranks_faults" in tests:
            targets.add("build/tests/slow_disk.so")
        command = ["make", "-s", f"-j{len(os.sched_getaffinity(0))}", "CUDA=0", "BUILD=build", *sorted(targets)]
        if cc := os.environ.get("MUTANTS_CC"):
            command.append(f"CC={cc}")
        environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, env=environment)
        return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]

    def run(self, test, limit):
        """(why it failed or None, seconds)"""
        program, _, pattern = test.partition(":")
        environment = dict(os.environ)
        if program == "keys":
            command = [PYTHON, "tests/scripts/test_keys.py", "build", pattern]
        elif program == "parity":
            command = ["tests/ops/parity.sh", pattern, "build"]
        elif program == "script":
            command = SCRIPTS.get(pattern, [f"tests/scripts/{pattern}.sh", "build"])
        else:
            command = [program_of(test)]
            if pattern:
                environment["TESSERA_TEST"] = pattern
        began = time.time()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=self.root, env=environment, start_new_session=True, **pipes)
        try:
            out = process.communicate(timeout=limit)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return "no end", time.time() - began
        seconds = time.time() - began
        if "Running 0 test" in out or "there is no row" in out:
            sys.exit(f"{test}: there is no such test")
        if process.returncode == 0:
            return None, seconds
        said = re.search(r"^ERROR: .*|FAILED, .*|AssertionError.*|^error: .*", out, re.M)
        failed = re.search(r"\[  FAILED  \] (\w+)", out)
        return (failed[1] if failed else said[0] if said else f"exit code {process.returncode}")[:60], seconds


def times(mutant, root):
    """How often a mutant's text stands in its file."""
    file = root / mutant.file
    return file.read_text().count("\n".join(mutant.before)) if file.exists() else 0


def check_texts():
    table = read_table(ROOT / "tests/scripts/mutants.txt")
    unclear = [f"{m.name}: its text stands in {m.file} {times(m, ROOT)} times" for m in table if times(m, ROOT) != 1]
    print("\n".join(unclear) or f"the texts of {len(table)} mutants stand where they should")
    return 1 if unclear else 0


def judge(copy, mutant, usual):
    """(verdict, by what, seconds)"""
    path = copy.root / mutant.file
    whole = path.read_text()
    before, after = "\n".join(mutant.before), "\n".join(mutant.after)
    began = time.time()
    if whole.count(before) != 1 or before == after:
        return "UNCLEAR", f"its text stands in {mutant.file} {whole.count(before)} times", 0
    try:
        path.write_text(whole.replace(before, after))
        problem = copy.build(mutant.tests)
        if problem:
            return "UNCLEAR", f"does not compile: {problem}", time.time() - began
        for test in mutant.tests:
            why, _ = copy.run(test, 30 + 10 * usual[test])
            if why:
                return "killed", f"{test}: {why}", time.time() - began
        return "LIVED", " ".join(mutant.tests), time.time() - began
    finally:
        path.write_text(whole)


def main():
    if sys.argv[1:] == ["--texts"]:
        return check_texts()
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    build = pathlib.Path(sys.argv[1]).resolve()
    mutants = chosen(read_table(ROOT / "tests/scripts/mutants.txt"), sys.argv[2:])
    if not mutants:
        sys.exit("no mutant of tests/scripts/mutants.txt is meant by " + " ".join(sys.argv[2:]))
    began = time.time()
    copy = Copy(build / "mutants")
    tests = sorted({test for m in mutants for test in m.tests})
    if problem := copy.build(tests):
        sys.exit(f"the tree does not build:\n{problem}")
    usual, broken = {}, {}
    for test in tests:
        why, usual[test] = copy.run(test, 600)
        if why:
            broken[test] = why
            print(f"{test} fails as the tree is: {why}", flush=True)
    print(f"{len(tests) - len(broken)} of {len(tests)} tests pass as the tree is, {time.time() - began:.0f} s", flush=True)
    verdicts = []
    for m in mutants:
        if broken.keys() & set(m.tests):
            verdict, by, seconds = "UNCLEAR", "a test of its fails without it", 0
        else:
            verdict, by, seconds = judge(copy, m, usual)
        verdicts.append(verdict)
        print(f"{m.number:3} {m.name:22} {m.file:26} {verdict:8} {seconds:4.0f} s  {by}", flush=True)
    bad = [m.name for m, v in zip(mutants, verdicts) if v != "killed"]
    alive = f"; not: {' '.join(bad)}" if bad else ""
    print(f"{len(mutants) - len(bad)} of {len(mutants)} mutants killed, {time.time() - began:.0f} s{alive}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
