#!/usr/bin/python3
"""A run on machines of every make: bound, limited, crowded, and with an OpenBLAS that computes wrong.

    tests/scripts/machine.py BUILD

Exit code 1 on the first thing that is not as it should be.
"""
import json, os, platform, re, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

from checks import check

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--tokens", "256", "--set", "data.threads=1", "--set", "checkpoint.every=1"]
HERE = len(os.sched_getaffinity(0))
SECONDS = 120  # more is a hang


class Machine:
    def __init__(self, build, folder):
        build = Path(build).resolve()
        self.train, self.wrong_blas, self.folder = build / "train", build / "tests/wrong_blas.so", folder
        self.runs = 0

    def command(self, *flags, run=None):
        self.runs += 1
        run = self.folder / (run or f"run-{self.runs}")
        return [self.train, "configs/demo.json", "--device", "cpu", "--run-dir", run, *FLAGS, *flags]

    def ends(self, *flags, before=(), run=None, limits=(), **environment):
        """Exit code and what it says, of a run of one step; `before`: what the command line begins with."""

        def limit():
            for what, most in limits:
                resource.setrlimit(what, (most, most))

        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "OPENBLAS_", "OMPI_"))}
        done = subprocess.run(
            [*before, *self.command("--stop-at", "1", *flags, run=run)],
            cwd=ROOT,
            env=inherited | environment,
            preexec_fn=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        return done.returncode, done.stdout

    def threads(self, *flags, **how):
        code, said = self.ends(*flags, **how)
        found = re.search(r"^device: cpu, (\d+) threads", said, re.M)
        check(code == 0 and found, f"{flags} {how}: exit code {code}\n{said}")
        return int(found[1])

    # ---- processors ----

    def test_affinity(self):
        first = str(min(os.sched_getaffinity(0)))
        check(self.threads() == HERE, "a thread for each processor")
        check(self.threads(before=["taskset", "-c", first]) == 1, "bound to one processor")
        check(self.threads("--set", "run.threads=3", before=["taskset", "-c", first]) == 3, "run.threads insists")

    def test_mpirun(self):
        """Processes that mpirun started: this test is mpirun, a shell between may be a wrapper."""
        of_two = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        first = str(min(os.sched_getaffinity(0)))
        check(self.threads(**of_two) == max(1, HERE // 2), "two that are not bound share the processors")
        if HERE >= 2:
            half = ",".join(map(str, sorted(os.sched_getaffinity(0))[: HERE // 2]))
            shell = ["taskset", "-c", half, "sh", "-c", '"$@"; exit $?', "wrapper"]
            check(self.threads(before=shell, **of_two) == HERE // 2, "bound to a half, which is not halved again")
        check(self.threads(before=["taskset", "-c", first], **of_two) == 1, "bound to one")

    def test_too_many_threads(self):
        check(self.threads(OMP_NUM_THREADS="64") == 64, "as many as OMP_NUM_THREADS says")

    def test_nice(self):
        check(self.threads(before=["nice", "-n", "19"]) == HERE, "at the lowest priority")

    def test_process_name(self):
        shutil.copy(self.train, self.folder / "my-train")
        command = self.command("--steps", "100000")
        with open(self.folder / "log", "w") as log:
            for began in command[0], self.folder / "my-train":
                command[0] = began
                run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
                try:
                    until = time.time() + SECONDS
                    while "device" not in (self.folder / "log").read_text():
                        check(run.poll() is None and time.time() < until, (self.folder / "log").read_text())
                        time.sleep(0.05)
                    name = Path(f"/proc/{run.pid}/comm").read_text().strip()
                    check(name == began.name, f"the process is called {name}, not {began.name}")
                finally:
                    run.kill()
                    run.wait()
                os.truncate(self.folder / "log", 0)
                shutil.rmtree(command[5])

    # ---- limits ----

    def test_address_space(self):
        """Whatever the limit, the run ends: well, or by saying what it lacks."""
        codes = []
        for mb in 60, 100, 150, 200, 250, 300, 350, 400, 500, 700, 1500:
            code, said = self.ends("--set", "run.threads=2", limits=[(resource.RLIMIT_AS, mb << 20)])
            check(code in (0, 1, 2, 127), f"{mb} MB: exit code {code}\n{said}")
            check(code == 0 or "error" in said, f"{mb} MB: no word of why: {said}")
            if code == 2:
                check("ulimit -v" in said or "lower data.micro_batch_tokens" in said, f"{mb} MB: {said}")
            codes.append((code, "OpenBLAS and 2 compute threads need" in said))
        check(codes[-1][0] == 0, f"the largest is enough: {codes}")
        check((2, True) in codes, f"some leave too little for OpenBLAS: {codes}")

    def test_descriptors(self):
        code, said = self.ends(limits=[(resource.RLIMIT_NOFILE, 32)])
        check(code == 0, f"exit code {code}\n{said}")

    # ---- OpenBLAS ----

    def test_wrong_blas(self):
        for fault in "tail", "width", "depth", "transposed", "beta", "gap", "nan", "bf16":
            run = f"wrong-{fault}"
            code, said = self.ends(run=run, LD_PRELOAD=str(self.wrong_blas), WRONG_BLAS=fault)
            check(code == 2 and "OpenBLAS computes wrong" in said, f"{fault}: exit code {code}\n{said}")
            check("OPENBLAS_CORETYPE" in said, f"no hint: {said}")
            check(not (self.folder / run).exists(), f"{fault}: a folder was made")
        code, said = self.ends(LD_PRELOAD=str(self.wrong_blas))
        check(code == 0, f"without a fault: exit code {code}\n{said}")

    def test_other_kernels(self):
        """A run that goes on with other kernels says so; with the same it does not."""
        if platform.machine() not in ("x86_64", "AMD64"):
            return
        said_so = "not to the same bits"
        code, said = self.ends(run="kernels", OPENBLAS_CORETYPE="Nehalem")
        check(code == 0 and "Nehalem kernels" in said, f"exit code {code}\n{said}")
        state = json.loads((self.folder / "kernels/ckpt-1/state.json").read_text())
        check(state["state"]["kernels"] == "Nehalem", state)
        code, said = self.ends("--resume", "--stop-at", "2", run="kernels", OPENBLAS_CORETYPE="Nehalem")
        check(code == 0 and said_so not in said, f"the same: exit code {code}\n{said}")
        code, said = self.ends("--resume", "--stop-at", "3", run="kernels", OPENBLAS_CORETYPE="Sandybridge")
        check(code == 0 and len(re.findall(f"Nehalem.*Sandybridge.*{said_so}", said)) == 1, said)


def main():
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(sys.argv[1], Path(folder))
        tests = [name for name in dir(machine) if name.startswith("test_")]
        for name in tests:
            began = time.time()
            getattr(machine, name)()
            print(f"{name} {time.time() - began:.1f}s", flush=True)
    print(f"{len(tests)} tests of a run's machine")


main()
