#!/usr/bin/python3
"""What a run folder holds after going on and going back, and what a run shows on a terminal.

    tests/scripts/run_folder.py TRAIN

Exit code 1 on the first thing that is not as it should be.
"""
import fcntl, json, math, os, pty, re, shutil, struct, subprocess, sys, tarfile, tempfile, termios, time
from pathlib import Path

from checks import check, run_metrics

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--tokens", "256", "--steps", "6"] + [
    part
    for key, value in {
        "checkpoint.every": 2,
        "checkpoint.keep_last": 9,
        "eval.every": 3,
        "eval.documents": 3,
        "eval.samples": 0,
    }.items()
    for part in ("--set", f"{key}={value}")
]


class Runs:
    def __init__(self, train, folder):
        self.train, self.folder = str(Path(train).resolve()), folder

    def command(self, run, *flags):
        return [self.train, "configs/demo.json", "--run-dir", str(self.folder / run), *FLAGS, *map(str, flags)]

    def make(self, run, *flags):
        done = subprocess.run(self.command(run, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        check(done.returncode == 0, f"{flags}: exit code {done.returncode}\n{done.stderr}")
        return done.stderr

    def refuse(self, run, text, *flags):
        done = subprocess.run(self.command(run, *flags), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        check(done.returncode == 2, f"{flags}: exit code {done.returncode}, not 2\n{done.stderr}")
        check(text in done.stderr and "hint:" in done.stderr, f"{flags}: no '{text}', no hint:\n{done.stderr}")

    def rows(self, run):
        return run_metrics.lines(self.folder / run)

    def checkpoints(self, run, prefix="ckpt-"):
        return sorted(int(path.name[len(prefix) :]) for path in (self.folder / run).glob(prefix + "[0-9]*"))


def test_missed_evaluation(runs):
    """Killed between the last save and its evaluation: --resume makes up for it, once."""
    runs.make("whole")
    evaluated = [row["step"] for row in runs.rows("whole") if "eval" in row]
    check(evaluated == [3, 6], f"evaluations at {evaluated}, not 3 and 6")
    metrics = runs.folder / "whole/metrics.jsonl"
    figures = [row for row in runs.rows("whole") if "eval" in row][-1]["eval"]
    lines = [line for line in metrics.read_text().splitlines(True) if '"step":6,"eval"' not in line]
    metrics.write_text("".join(lines))
    check("already at step 6" not in runs.make("whole", "--resume"), "the last evaluation is not made up for")
    rows = [row for row in runs.rows("whole") if "eval" in row]
    check([row["step"] for row in rows] == evaluated, f"evaluations at {[row['step'] for row in rows]}")
    check(rows[-1]["eval"]["flow"] == figures["flow"], f"{rows[-1]} is not {figures}")
    check("already at step 6" in runs.make("whole", "--resume"), "there was something to do")


def test_going_back(runs):
    """Later checkpoints are set aside, later lines of metrics.jsonl are gone, and the second time gives the same."""
    steps = [row for row in runs.rows("whole") if "loss" in row]
    said = runs.make("whole", "--from", runs.folder / "whole/ckpt-2", "--stop-at", 4)
    check(said.count("set aside as") == 2, f"two checkpoints are given up:\n{said}")
    check(runs.checkpoints("whole") == [2, 4], f"checkpoints {runs.checkpoints('whole')}, not 2 and 4")
    aside = runs.checkpoints("whole", "set-aside-ckpt-")
    check(aside == [4, 6], f"set aside: {aside}, not 4 and 6")
    again = [row for row in runs.rows("whole") if "loss" in row]
    check([row["step"] for row in again] == [0, 1, 2, 3], f"steps {[row['step'] for row in again]}")
    check([row["loss"] for row in again] == [row["loss"] for row in steps[:4]], "other losses the second time")


def test_going_back_again(runs):
    """What is given up a second time has a name of its own; where there is none to be had, the run is refused."""
    runs.make("again", "--stop-at", 4)
    back = ("--from", runs.folder / "again/ckpt-2", "--stop-at", 4)
    for time_, name in enumerate(("set-aside-ckpt-4", "set-aside-ckpt-4-2", "set-aside-ckpt-4-3")):
        said = runs.make("again", *back)
        check(f"set aside as {runs.folder}/again/{name}\n" in said, f"time {time_ + 1}: no {name}:\n{said}")
        check((runs.folder / "again" / name / "state.json").exists(), f"time {time_ + 1}: {name} is not whole")
        check(runs.checkpoints("again") == [2, 4], f"time {time_ + 1}: {runs.checkpoints('again')}")
        steps = [row["step"] for row in runs.rows("again") if "loss" in row]
        check(steps == [0, 1, 2, 3], f"time {time_ + 1}: steps {steps}")


def test_going_back_to_what_was_given_up(runs):
    """Going on from a checkpoint that was set aside gives up the one that took its name."""
    said = runs.make("again", "--from", runs.folder / "again/set-aside-ckpt-4", "--stop-at", 5)
    check(f"again/ckpt-4 belongs to what is given up now: set aside as {runs.folder}/again/set-aside-ckpt-4-4" in said,
          f"the other checkpoint of step 4 stays for --resume to take:\n{said}")
    check(runs.checkpoints("again") == [2, 5], f"checkpoints {runs.checkpoints('again')}, not 2 and 5")


def test_refused_for_its_data(runs):
    """A run that is refused when all else is ready leaves settings and checkpoints as they were."""
    def files():
        found = (path for path in (runs.folder / "again").rglob("*") if path.is_file() and path.name != "lock")
        return {path: path.read_bytes() for path in found}

    before = files()
    for flags in (("--resume",), ("--from", runs.folder / "again/ckpt-2")):
        runs.refuse("again", "the data is not what it was", *flags, "--set", "data.held_out=0.3")
        after = files()
        changed = [str(path) for path in {*before, *after} if before.get(path) != after.get(path)]
        check(not changed, f"{flags}: a refused run changed {changed}")


def test_fresh_start(runs):
    """A folder with a run's checkpoints is refused to whoever would begin anew in it, and left as it is; names that are
    no checkpoint's are none to anybody."""
    before = {path: path.read_bytes() for path in (runs.folder / "again").rglob("*") if path.is_file()}
    for flags in ((), ("--init", runs.folder / "again/ckpt-2"), ("--init", runs.folder / "whole/ckpt-2")):
        runs.refuse("again", "already holds checkpoints", *flags)
    newest = f"{runs.folder}/again/ckpt-{runs.checkpoints('again')[-1]}"
    for flag in ("--init", "--from"):  # a run's folder is no checkpoint: the newest one in it is named
        runs.refuse("anew", f"hint: its newest is {newest}\n", flag, runs.folder / "again")
    before.pop(runs.folder / "again/lock")
    for path, data in before.items():
        check(path.read_bytes() == data, f"a refused run changed {path}")
    (runs.folder / "named").mkdir()
    for name in ("ckpt-007", "ckpt-x", "ckpt-7-old"):
        shutil.copytree(runs.folder / "again/ckpt-2", runs.folder / "named" / name)
    runs.make("named", "--stop-at", 1)
    check("loaded" in runs.make("named", "--resume", "--stop-at", 2), "ckpt-1 was not resumed")
    check((runs.folder / "named/ckpt-2/state.json").exists(), "the run did not go on from step 1")


def test_seconds(runs):
    """A step's seconds are its own: an evaluation before it, many times as long here, does not count."""
    run = subprocess.Popen(
        runs.command("timed", "--stop-at", 4, "--set", "eval.documents=24"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    said = {}  # when each line came, by its first two words
    for line in run.stderr:
        said.setdefault(" ".join(line.split()[:2]), time.monotonic())
    check(run.wait() == 0, f"exit code {run.returncode}")
    evaluation = said["eval of"] - said["step 3"]
    seconds = [row["seconds"] for row in runs.rows("timed") if "loss" in row]
    check(len(seconds) == 4, f"{len(seconds)} steps")
    check(seconds[3] < evaluation / 2, f"step 4 took {seconds[3]:.3f} s after an evaluation of {evaluation:.3f} s")


def test_long_metrics(runs):
    """Only the end of metrics.jsonl is read: 512 GiB before it (a hole, which takes no room) make no difference."""
    metrics = runs.folder / "whole/metrics.jsonl"
    lines, hole = metrics.read_bytes(), 512 << 30
    with open(metrics, "r+b") as f:
        f.truncate(hole)
        f.seek(hole)
        f.write(b"\n" + lines)
    runs.make("whole", "--from", runs.folder / "whole/ckpt-2", "--stop-at", 3)
    with open(metrics, "rb") as f:
        f.seek(hole)
        rows = [json.loads(line) for line in f.read().splitlines()[1:]]
    check([row["step"] for row in rows if "loss" in row] == [0, 1, 2], f"steps {[row['step'] for row in rows]}")


def test_overview(runs):
    """A run begins with what it is, and says after some steps how long it will take."""
    said = runs.make("overview", "--steps", 3000, "--stop-at", 11, "--set", "train.warmup_steps=3000")
    lines = said.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("model: "))  # what the sources say comes before
    model, data, device, steps = lines[begin : begin + 4]
    header = (runs.folder / "overview/ckpt-11/model.safetensors").read_bytes()
    tensors = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    tensors.pop("__metadata__", None)
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    check(model.startswith(f"model: {parameters / 1e6:.2f}M parameters, of which "), f"{parameters}: {model}")
    with tarfile.open(ROOT / ".cache/shapes/shapes.tar") as tar:
        samples = len(tar.getnames()) // 2
    found = re.fullmatch(r"data: (\d+) samples with (\d+) images, about (\d+)k tokens; held out: (\d+) samples", data)
    check(found, f"no line about the data: {data}")
    trained, images, tokens, held_out = map(int, found.groups())
    check(trained + held_out == samples and images == trained, f"{samples} samples: {data}")
    drawn = int(re.search(r"fill .*, (\d+) documents", said)[1])  # the loader is some documents ahead of the 11 steps
    have, about = 11 * 256 / drawn, 1000 * tokens / trained
    check(0.75 * about < have < 1.1 * about, f"{have:.1f} tokens a document in the run, of {about:.1f}: {data}")
    memory = r"memory: 0\.0\d+ GB of the [\d.]+ GB .*, policy keep"
    check(re.fullmatch(rf"device: cpu, \d+ threads, OpenBLAS's \w+ kernels; {memory}", device), device)
    check(steps.startswith("steps 1 to 11 of 3000: 1 x 256 = 256 token slots each, "), steps)
    check("warning: train.warmup_steps = 3000 is not over within the 3000 steps" in said, f"no word of it:\n{said}")
    found = re.search(r"(\d+):(\d\d) to go at (\d+) ms a step", said)
    check(found, f"no time to go:\n{said}")
    minutes, seconds, each = map(int, found.groups())
    check(abs(60 * minutes + seconds - 2.990 * each) < 0.51 * 2.990 + 1, f"2,990 steps: {found[0]}")
    check("training cuts them" not in said, f"no caption is longer than the demo allows:\n{said}")
    said = runs.make("cut", "--stop-at", 1, "--set", "data.max_caption=4")
    found = re.search(r"warning: (\d+) of (\d+) captions looked at are longer than data.max_caption = 4 tokens", said)
    check(found and 128 <= int(found[1]) == int(found[2]), f"every caption is cut, and nobody says so:\n{said}")


def test_changes(runs):
    """--resume names what is not as it was, sources too; nothing when nothing changed."""
    run = runs.folder / "changed"
    said = runs.make("changed", "--stop-at", 2, "--set", "train.weight_decay=0.1")
    said = runs.make("changed", "--stop-at", 3, "--set", "train.weight_decay=0.1", "--resume")
    check("trained so far" not in said, f"nothing changed:\n{said}")
    copy = runs.folder / "copy.tar"
    shutil.copy(ROOT / ".cache/shapes/shapes.tar", copy)
    sources = json.dumps([{"type": "webdataset", "path": str(copy), "weight": 2}])
    others = ["--set", "train.lr=0.002", "--set", f"data.sources={sources}", "--set", "data.tokenizer=bytes"]
    said = runs.make("changed", "--stop-at", 4, "--resume", *others)
    kept = f"data.tokenizer = bytes changes nothing: the run keeps the tokenizer it began with, {run}/tokenizer.bpe"
    check(f"warning: {kept}\n" in said, f"no '{kept}' in\n{said}")
    changes = (f"data.sources[0] webdataset .cache/shapes/shapes.tar (weight 1) -> webdataset {copy} (weight 2), "
               "train.lr 0.003 -> 0.002, train.weight_decay 0.1 -> 0")
    check(f"warning: not as {run} was trained so far: {changes}\n" in said, f"no '{changes}' in\n{said}")


def test_text_alone(runs):
    """A step line leaves out what does not exist, and its log line has a dash there."""
    texts = runs.folder / "texts.txt"
    texts.write_text("\n\n".join(f"the number {i} and the number {i * i}" for i in range(200)))
    sources = json.dumps([{"type": "text", "path": str(texts)}])
    keys = {"data.sources": sources, "data.tokenizer": "bytes", "data.held_out_by": "key", "data.held_out": 0,
            "eval.documents": 0}
    sets = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    said = runs.make("texts", "--stop-at", 2, *sets)
    tokens = sum(len(text) + 2 for text in texts.read_text().split("\n\n"))
    line = f"data: 200 samples with 0 images, about {tokens / 1e3:.3g}k tokens; held out: 0"
    check(line in said, f"no '{line}' in\n{said}")
    for row in runs.rows("texts"):
        if "loss" not in row:
            continue
        check("flow" not in row and "ce_caption" not in row, f"a step of texts alone: {row}")
        check(row["ce"] == row["ce_text"], f"{row}")
        check(abs(row["loss"] - row["ce"] - row["balance"] - row["z"]) < 1e-5, f"{row}")
    line = r"step +2  loss [\d.]+  flow -  ce_caption -  ce_text [\d.]+  balance"
    check(re.search(line, said), f"no line of the second step:\n{said}")


def test_padding(runs):
    """Padding is no token: `tokens` and `fill` count what the documents hold."""
    texts = runs.folder / "lengths.txt"
    texts.write_text("\n\n".join("word " * (1 + i % 7) for i in range(100)))
    sources = json.dumps([{"type": "text", "path": str(texts)}])
    keys = {"data.sources": sources, "data.tokenizer": "bytes", "data.held_out_by": "key", "data.held_out": 0,
            "eval.documents": 0, "kernels.packing": "padded"}
    sets = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    runs.make("padded", "--stop-at", 1, *sets)
    runs.make("padded", "--dump", runs.folder / "padded-step", *sets)
    data = (runs.folder / "padded-step/micro_0.safetensors").read_bytes()
    base = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:base])["token"]["data_offsets"]
    rows = struct.unpack(f"<{(end - begin) // 4}i", data[base + begin : base + end])
    held = sum(token != 511 for token in rows)  # documents are padded with eoi, V - 1, which texts have none of
    check(held < len(rows) < 256 + 1, f"{held} of {len(rows)} rows are no padding")
    step = runs.rows("padded")[0]
    check((step["tokens"], step["fill"]) == (held, held / 256), f"{held} of {len(rows)} rows are no padding: {step}")


def on_terminal(runs, columns, run, *flags):
    """What a run shows on a terminal of that width."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        command = runs.command(run, *flags)
        os.execv(command[0], command)
    shown = b""
    try:
        while chunk := os.read(fd, 4096):
            shown += chunk
    except OSError:
        pass  # the other end is closed
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = shown.decode()
    check(status == 0, f"exit code {status}\n{text}")
    return text


def test_narrow_terminal(runs):
    """The bar takes what room there is, and never a second line."""
    for columns, last in ((40, "[" + "#" * 22 + "] 6/6  0:00 left"), (20, "6/6  0:00 left"), (8, "6/6  0:")):
        shown = on_terminal(runs, columns, f"narrow-{columns}")
        bars = re.findall(r"\r\x1b\[K([^\r\n]*left|[\d/]+ [^\r\n]*)(?=\r)", shown)
        check(bars and max(map(len, bars)) < columns, f"{columns} columns: {bars}")
        check(bars[-1] == last, f"{columns} columns: the last bar is {bars[-1]!r}, not {last!r}")


def test_terminal(runs):
    """A progress bar that every line erases, and the table of --profile."""
    text = on_terminal(runs, 80, "terminal", "--profile")
    check(re.search(r"\r\x1b\[K\[#{30}\] 6/6  0:00 left", text), f"no full bar:\n{text}")
    glued = re.findall(r"\d:\d\d left(?!\r)[^\r]+", text)
    check(not glued, f"lines that do not erase the bar: {glued}")
    shares = [float(share) for share in re.findall(r" +[\d.]+ +([\d.]+)% +[\d.]+ +[\d.]+\r", text)]
    check(len(shares) > 10 and abs(sum(shares) - 100) < 0.1 * len(shares), f"the profile's shares: {shares}")
    check(shares == sorted(shares, reverse=True), f"not by share: {shares}")


def main():
    folder = Path(tempfile.mkdtemp())
    try:
        if not (ROOT / ".cache/shapes/shapes.tar").exists():
            subprocess.run(["scripts/make_shapes.py", ".cache/shapes/shapes.tar"], cwd=ROOT, check=True)
        runs = Runs(sys.argv[1], folder)
        for test in (test_missed_evaluation, test_going_back, test_going_back_again,
                     test_going_back_to_what_was_given_up, test_refused_for_its_data, test_fresh_start,
                     test_long_metrics, test_text_alone, test_padding, test_overview, test_changes, test_seconds,
                     test_terminal, test_narrow_terminal):
            test(runs)
    except AssertionError as error:
        print(f"{test.__name__}: FAILED: {error}")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("going on, going back and the terminal: as they should be")
    return 0


if __name__ == "__main__":
    sys.exit(main())
