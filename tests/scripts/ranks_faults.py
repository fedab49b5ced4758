#!/usr/bin/env python3
"""Faults of several processes: whatever happens to one of them ends all within 30 s and is said once, the last
checkpoint is whole, and the run goes on to the same bits as one that nothing happened to, at any number of processes.

    tests/scripts/ranks_faults.py [--kills N] [--build build] [--seed N]

kill -9 of a random rank at N random moments, half of them in the middle of a save on a slow disk; a rank that crashes;
a full disk on one rank, with training going on beside it or not; a rank that never starts; hosts that do not share the
run's folder; another build or another config on one rank; a signal to one that evaluates; images that cannot be
decoded, on whichever rank they are. And checkpoints of 1 to 4 processes that go on at other numbers. Standard library
alone; exit code 1 on the first thing that is not as it should be, 77 where there is no mpirun. The last line says what
was counted."""
import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import same_state
from checks import check, run_metrics
from trainer_process import ROOT, Trainer, checkpoints, prepare, run_tests, temporary

RANKS, STEPS = 3, 24
SECONDS = 30  # in which the end of one must be the end of all
NOISE = re.compile(r"^-{20,}$", re.M)  # around what Open MPI says


def job(run, ranks, *flags, within=(), **keys):
    """A run of several processes that together take three packs a step."""
    mpirun = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks))
    if "train__batch" not in keys:
        keys.setdefault("train__micro_batches", 3 // ranks)
    return Trainer(run, *flags, within=(*mpirun, *within) if ranks > 1 else within, **keys)


def same(run, step, reference):
    same_state.compare(run / f"ckpt-{step}", reference / f"ckpt-{step}")


def verify(run, reference, before):
    """The newest checkpoint is whole and no older than `before`. Its step."""
    steps = checkpoints(run)
    newest = steps[-1] if steps else 0
    check(newest >= before, f"{run}: newest checkpoint {newest}, there was {before} already")
    for step in steps:
        if step == newest or (run / f"ckpt-{step}/state.json").exists():
            same(run, step, reference)
    return newest


def end_by(trainer, cause, code=None, quiet=True):
    """The job ends in time, says the cause once, and nothing else of its end where that is up to the engine."""
    found = trainer.wait(SECONDS)
    log = trainer.log()
    check(found != 0 and code in (None, found), f"{trainer.command}\nexit code {found}, not {code}:\n{log[-2000:]}")
    said = re.findall(cause, log, re.M)
    check(len(said) == 1, f"{trainer.command}\nsays '{cause}' {len(said)} times:\n{log[-3000:]}")
    if quiet:
        check(len(re.findall(r"^error: ", log, re.M)) == 1 and not NOISE.search(log),
              f"{trainer.command}\nsays more than the cause:\n{log[-3000:]}")
    return log


def processes(trainer):
    """Those that mpirun started."""
    found = subprocess.run(["pgrep", "-P", str(trainer.process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def all_ran(trainer):
    """Waits for the end of a job: whether all went on to their own. Open MPI 4.1's mpirun may stay for good, alone, when
    a process is killed while MPI starts: what counts is that no process of the job is left."""
    until = time.monotonic() + SECONDS
    while trainer.process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    states = ["ps", "--ppid", str(trainer.process.pid), "-o", "stat="]
    if trainer.process.poll() is None and not re.search(
            r"^[^Z]", subprocess.run(states, capture_output=True, text=True, check=False).stdout, re.M):
        trainer.kill()
    return trainer.wait(0.1) == 0


def wrapper(work, name, rank, command):
    """A program that starts another one, after `command` on one rank."""
    path = work / f"{name}.sh"
    path.write_text(f'#!/bin/sh\n[ "$OMPI_COMM_WORLD_RANK" != {rank} ] || {command}\nexec "$@"\n')
    path.chmod(0o755)
    return (str(path),)


def test_any_number(work):
    """Steps that are skipped change nothing but the place in the data: any row of numbers of processes has the same
    parameters, moments and EMA after them, and the same place."""
    spikes = {"train__batch": 12 * 256, "train__spike_patience": 1000}
    first, run, alone = work / "numbers-first", work / "numbers", work / "numbers-alone"
    job(first, 1, "--stop-at", 20, train__spike=1e6, **spikes).end(0)
    for to in (run, alone):
        shutil.copytree(first, to)
    row = (2, 3, 4, 1, 4, 2)
    for step, ranks in enumerate(row, 21):
        job(run, ranks, "--resume", "--stop-at", step, train__spike=1e-6, **spikes).end(0, "SKIPPED")
        same(run, step, first_as(run, first, step))
        files = len(list((run / f"ckpt-{step}").glob("optimizer-*")))
        check(files == ranks, f"{run}/ckpt-{step}: {files} files of the optimizer, by {ranks} processes")
    job(alone, 1, "--resume", "--stop-at", 20 + len(row), train__spike=1e-6, **spikes).end(0)
    places = [json.loads((to / f"ckpt-{20 + len(row)}/state.json").read_text())["state"]["loader"]
              for to in (run, alone)]
    check(places[0] == places[1], f"{places[0]}\nwith several processes, alone\n{places[1]}")
    return f"checkpoints of {', '.join(map(str, row))} processes in turn hold the same"


def first_as(run, first, step):
    """The first run, with its checkpoint under the step to be compared."""
    to = run.parent / "numbers-renamed"
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(first / "ckpt-20", to / f"ckpt-{step}")
    return to


def test_kills(work, reference, rng, kills, whole):
    run, newest, done, saving, ended = work / "killed", 0, 0, 0, 0
    while done < kills:
        in_save = done % 2 == 0
        trainer = job(run, RANKS, "--resume", "--stop-at", STEPS, disk={"SLOW_DISK_MB_S": "4"} if in_save else None,
                      checkpoint__every=rng.choice((1, 2, 3)), checkpoint__copy=rng.choice(("always", "never")))
        until = time.monotonic() + (0 if in_save else rng.random() * whole)
        while trainer.process.poll() is None:
            if time.monotonic() >= until and (not in_save or temporary(run)) and processes(trainer):
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.03)
        victims = processes(trainer)
        if victims and trainer.process.poll() is None:
            subprocess.run(["kill", "-9", str(rng.choice(victims))], check=False)
            if not all_ran(trainer):  # of one that mpirun has just started it does not say the signal
                check(trainer.log().count("exited on signal 9") <= 1, trainer.log())
                done += 1
                saving += bool(temporary(run))
                newest = verify(run, reference, newest)
                continue
        trainer.end(0)
        same(run, STEPS, reference)
        shutil.rmtree(run)
        newest = 0
        ended += 1
        check(ended < 10 + 2 * kills, f"{ended} runs ended before a kill")
    job(run, RANKS, "--resume", "--stop-at", STEPS).end(0)
    same(run, STEPS, reference)
    rows = [[row for row in run_metrics.lines(r) if "loss" in row and row["step"] < STEPS] for r in (run, reference)]
    check(len(rows[0]) == len(rows[1]) == STEPS, f"{run}/metrics.jsonl: {len(rows[0])} steps")
    for row, expected in zip(*rows):
        check(row["step"] == expected["step"] and abs(row["loss"] - expected["loss"]) < 1e-6 * expected["loss"],
              f"{run}/metrics.jsonl: {row}, not {expected}")
    check(not temporary(run), f"{run}: a save that was killed left {temporary(run)} for good")
    check(saving >= kills // 3, f"only {saving} of {kills} kills hit a save")
    return f"{kills} kills of a rank survived, {saving} of them in a save"


def test_crash(work, reference):
    run = work / "crashed"
    trainer = job(run, RANKS, "--stop-at", 3 * STEPS)
    trainer.wait_log("step +5 ")
    subprocess.run(["kill", "-SEGV", str(processes(trainer)[1])], check=True)
    end_by(trainer, "exited on signal 11", quiet=False)
    verify(run, reference, 3)
    return "a crash of one ends all"


def test_stop_in_evaluation(work):
    """A signal to one process while all evaluate: all stop, and what was not saved is."""
    run = work / "stopped"
    trainer = job(run, RANKS, "--stop-at", STEPS, eval__every=5, eval__documents=64, eval__samples=4,
                  checkpoint__every=0, data__held_out=0.5)
    trainer.wait_log("step +5 ")
    subprocess.run(["kill", "-USR1", str(processes(trainer)[1])], check=True)
    trainer.end(0, "stopped by a signal after step 5;")
    check(checkpoints(run) == [5] and '"eval"' not in (run / "metrics.jsonl").read_text(), f"{run}: {checkpoints(run)}")
    return "a signal to one of them ends the evaluation of all"


def test_full_disk(work, reference):
    run = work / "full"
    for copy in ("always", "never"):
        shutil.rmtree(run, ignore_errors=True)
        room = sum(f.stat().st_size for f in (reference / "ckpt-1").glob("optimizer-*")) * 4 // 3
        full = wrapper(work, "full-disk", 1, f"export SLOW_DISK_ROOM={room} LD_PRELOAD={Trainer.slow_disk}")
        trainer = job(run, RANKS, "--stop-at", STEPS, within=full, checkpoint__every=3, checkpoint__copy=copy)
        end_by(trainer, r"^error: rank 1: checkpoint of step \d+ not saved: .*No space left on device", 1)
        verify(run, reference, 3)
        check(not temporary(run), f"{run}: {temporary(run)}")
    job(run, RANKS, "--resume", "--stop-at", STEPS).end(0)
    same(run, STEPS, reference)

    # It goes on without checkpoints, until the last.
    shutil.rmtree(run)
    room = room // 4 * 3 // 2
    full = wrapper(work, "full-disk", 1, f"export SLOW_DISK_ROOM={room} LD_PRELOAD={Trainer.slow_disk}")
    log = job(run, RANKS, "--stop-at", 9, within=full, checkpoint__every=3, checkpoint__copy="never",
              checkpoint__on_error="continue").end(
        1, "going on, as checkpoint.on_error says", "error: rank 1: checkpoint of step 9 not saved")
    for step in (6, 9):
        check(log.count(f"checkpoint of step {step} not saved") == 1, f"step {step} is told more than once:\n{log}")
    return "a full disk of one rank is said once, the old checkpoint whole"


def test_bad_images(work, samples):
    """Named once, counted once and saved, whichever process met them and whenever: as one process does."""
    folder, broken = work / "pictures", 8
    folder.mkdir()
    (folder / "captions.tsv").write_text("".join(f"{i}.png\t{caption}\n" for i, (caption, _) in enumerate(samples)))
    for i, (_, png) in enumerate(samples):  # a whole header, half a picture
        (folder / f"{i}.png").write_bytes(png[: len(png) // 2] if i < broken else png)
    keys = {"data__sources": [{"type": "folder", "path": str(folder)}], "data__held_out": 0, "checkpoint__every": 1}
    said = {}
    for ranks in (1, RANKS):
        run = work / f"pictures-{ranks}"
        said[ranks] = job(run, ranks, "--stop-at", 5, data__max_bad=broken, **keys).end(0)
        said[ranks] += job(run, ranks, "--resume", "--stop-at", 6, data__max_bad=broken, **keys).end(0)
        said[ranks] = said[ranks].partition("(step 5)")
    states = [json.loads((work / f"pictures-{ranks}/ckpt-6/state.json").read_text())["state"]["loader"]
              for ranks in (1, RANKS)]
    check(states[0] == states[1] and len(states[0]["bad"]) == broken,
          f"{states[0]}\nof one process, of {RANKS}\n{states[1]}")
    for part in (0, 2):  # a resumed run names what it meets again
        names = [re.findall(r"^warning: (?:rank \d: )?(\S*/\d+\.png) cannot be decoded and is passed over: ",
                            said[ranks][part], re.M) for ranks in (1, RANKS)]
        check(sorted(names[0]) == sorted(names[1]) and len(set(names[1])) == len(names[1]), names)
    check("warning: rank 1: " in said[RANKS][0], said[RANKS][0])
    ended = job(work / "pictures-many", RANKS, "--stop-at", 6, data__max_bad=broken - 1, **keys)
    end_by(ended, f"^error: {broken} images cannot be decoded, more than data.max_bad = {broken - 1}")
    return f"{broken} undecodable images are counted and named as by one process"


def start_late(work):
    """A rank that never starts, in the background of the other tests."""
    return job(work / "late", RANKS, within=wrapper(work, "never", 1, "exec sleep 100")), time.monotonic()


def start_apart(work):
    """Two hosts without a common file system, in the background as well."""
    for rank in range(2):
        shutil.copytree(ROOT / "configs", work / f"host{rank}/configs")
    path = work / "apart.sh"
    path.write_text(f'#!/bin/sh\ncd "{work}/host$OMPI_COMM_WORLD_RANK" && exec "$@"\n')
    path.chmod(0o755)
    return job("run-apart", 2, within=(str(path),))


def test_apart(work, apart):
    end_by(apart, "^error: rank 1: this process does not see run-apart as rank 0 does", 2)
    check(not (work / "host0/run-apart/config.json").exists(), "a run that is refused has begun")
    return "hosts must share the run's folder"


def test_late(work, late):
    trainer, began = late
    left = SECONDS - (time.monotonic() - began)
    found = trainer.wait(max(left, 0.1))
    log = trainer.log()
    said = "error: not all of the 3 processes that mpirun started have come within"
    check(found == 2 and log.count(said) == 1, f"exit code {found}:\n{log}")
    check(not (work / "late").exists(), "a job that never started left a folder")
    return "a rank that never starts is not waited for"


def test_mismatch(work):
    other = work / "train"
    shutil.copy(Trainer.binary, other)
    with open(other, "ab") as f:
        f.write(b"another build")
    run, first = work / "other", ("mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "1", str(Trainer.binary))
    rest = ["configs/demo.json", "--run-dir", str(run)]
    for binary, flags, cause in (
            (other, [], "^error: 1 of 2 processes, of rank 1, has another build of this program than rank 0"),
            (Trainer.binary, ["--seed", "2"], "^error: 1 of 2 processes, of rank 1, has other settings than rank 0")):
        trainer = Trainer(run, tiny=False, within=(*first, *rest, ":", "-np", "1"))
        trainer.kill()
        command = [*first, *rest, ":", "-np", "1", str(binary), *rest, *flags]
        with open(trainer.log_path, "wb") as log:
            trainer.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        end_by(trainer, cause, 2)
        check(not run.exists(), "a run that is refused left a folder")
    return "another build or config is refused"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--build", default="build")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments; printed")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 30)
    rng = random.Random(seed)
    print(f"seed {seed}")
    probes = Path(options.build) / "probes.mk"
    if not shutil.which("mpirun") or not re.search(r"^HAVE_MPI := .", probes.read_text(), re.M):
        print("there is no mpirun (scripts/deps.sh installs Open MPI), or this build found no MPI to build with")
        return 77
    with tempfile.TemporaryDirectory(prefix="tessera-ranks-") as folder:
        work = Path(folder)
        samples = prepare(work, Path(options.build) / "train", train__steps=10 * STEPS, data__threads=1)
        late, apart = start_late(work), start_apart(work)
        reference = work / "reference"
        job(reference, 1, "--stop-at", 3 * STEPS, checkpoint__keep_last=1000).end(0)
        began = time.monotonic()
        job(work / "timed", RANKS, "--stop-at", STEPS).end(0)
        whole = time.monotonic() - began
        tests = [(test_any_number,), (test_kills, reference, rng, options.kills, whole), (test_crash, reference),
                 (test_stop_in_evaluation,), (test_full_disk, reference), (test_mismatch,),
                 (test_bad_images, samples[:40]), (test_apart, apart), (test_late, late)]
        return run_tests(work, tests, spared=(late[0], apart))


if __name__ == "__main__":
    sys.exit(main())
