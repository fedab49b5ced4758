"""Processes of ./train on a tiny model, as the tests of faults start, stop and watch them."""
import io
import json
import os
import re
import resource
import signal
import subprocess
import tarfile
import time
from pathlib import Path

from checks import check

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / ".cache/shapes/shapes.tar"
TINY = {
    "model.dim": 32, "model.layers": 2, "model.heads": 2, "model.kv_heads": 1, "model.head_dim": 16,
    "model.cond_dim": 32, "model.vocab": 300, "model.text.expert_dim": 32, "model.image.expert_dim": 32,
    "eval.every": 0, "checkpoint.every": 1, "run.threads": 1,
}


class Trainer:
    """One process of ./train and its log."""

    all = []

    def __init__(self, run, *flags, tiny=True, within=(), limit=None, ignored=(), disk=None, **keys):
        sets = dict(self.tiny) if tiny else {}
        sets.update((name.replace("__", "."), value) for name, value in keys.items())
        command = [*within, str(self.binary), "configs/demo.json", "--run-dir", str(run), *map(str, flags)]
        for name, value in sets.items():
            command += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        self.run = Path(run)
        self.log_path = self.work / f"{self.run.name}.log"
        self.command = " ".join(command)

        def before():
            # As in a terminal: these tests may run under nohup or in the background, where both are ignored.
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        environment = {**os.environ, **disk, "LD_PRELOAD": str(self.slow_disk)} if disk else None
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=before,
                                            env=environment)
        self.all.append(self)

    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_log(self, pattern, timeout=30):
        """Waits for a line; the match. An AssertionError when the process ends without it."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            over = self.process.poll() is not None
            found = re.search(pattern, self.log())
            if found:
                return found
            check(not over, f"{self.command}\nended without '{pattern}':\n{self.log()[-2000:]}")
            time.sleep(0.001)
        self.kill()
        raise AssertionError(f"{self.command}\nno '{pattern}' within {timeout} s:\n{self.log()[-2000:]}")

    def pause(self):
        """Stops all of its threads. Whether it still lives."""
        self.process.send_signal(signal.SIGSTOP)  # to a process that has ended: nothing, and it is no child any more
        if self.process.returncode is not None:
            return False
        state = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return state.si_code == os.CLD_STOPPED

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def signal(self, *numbers):
        """Sends signals while the process stands still, so that it finds all of them at once."""
        self.pause()
        for number in numbers:
            self.process.send_signal(number)
        self.go_on()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def wait(self, timeout):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.command}\nstill runs after {timeout} s:\n{self.log()[-2000:]}") from None

    def end(self, code, *texts, timeout=60):
        """Waits for the end: the exit code and what the log must contain."""
        found, log = self.wait(timeout), self.log()
        for text in texts:
            check(text in log, f"{self.command}\ndoes not say '{text}':\n{log[-2000:]}")
        check(found == code, f"{self.command}\nexit code {found}, expected {code}:\n{log[-2000:]}")
        return log


def checkpoints(run):
    """Steps of all checkpoint folders, oldest first."""
    names = os.listdir(run) if run.exists() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"ckpt-\d+", name))


def temporary(run):
    return [name for name in (os.listdir(run) if run.exists() else []) if name.startswith(".tmp-ckpt-")]


def first_samples(n):
    """(caption, PNG) of the first samples of the drawn shapes."""
    samples, caption = [], {}
    with tarfile.open(SHAPES) as tar:
        for member in tar:
            key, kind = member.name.rsplit(".", 1)
            caption.setdefault(key, {})[kind] = tar.extractfile(member).read()
            if len(caption[key]) == 2:
                samples.append((json.loads(caption[key]["json"])["caption"], caption[key]["png"]))
                if len(samples) == n:
                    break
    return samples


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for i, (caption, png) in enumerate(samples):
            for kind, data in (("png", png), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def prepare(work, binary, **keys):
    """Makes 300 samples in `work`/small.tar, on which a Trainer trains a tiny model with these keys (`__`: a dot), and
    returns them: (caption, PNG)."""
    if not SHAPES.exists():
        subprocess.run([ROOT / "scripts/make_shapes.py", SHAPES], check=True)
    samples = first_samples(300)
    write_tar(work / "small.tar", samples)
    Trainer.work, Trainer.binary = work, Path(binary).resolve()
    Trainer.slow_disk = Trainer.binary.parent / "tests/slow_disk.so"
    if not Trainer.slow_disk.exists():
        raise SystemExit(f"{Trainer.slow_disk} is missing: 'make tests' builds it")
    Trainer.tiny = {
        **TINY, "data.micro_batch_tokens": 256, "data.held_out_by": "key",
        "data.sources": [{"type": "webdataset", "path": str(work / "small.tar")}],
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    return samples


def run_tests(work, tests, spared=()):
    """Runs (test, argument, ..) in the folder `work` one by one, prints what each says of itself, and kills what it
    leaves behind; those `spared` go on until the last one. The exit code: 1 after the first that fails."""
    said = []
    for test, *arguments in tests:
        began = time.monotonic()
        try:
            said.append(test(work, *arguments))
        except AssertionError as error:
            print(f"{test.__name__}: FAILED: {error}")
            spared = ()  # nothing follows that needs them
            return 1
        finally:
            for trainer in Trainer.all:
                if trainer not in spared or test is tests[-1][0]:
                    trainer.kill()
        print(f"{test.__name__}: {said[-1]} ({time.monotonic() - began:.1f} s)", flush=True)
    print("; ".join(said))
    return 0
