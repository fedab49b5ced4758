#!/usr/bin/env python3
"""Faults, with real processes of ./train on a tiny model: whatever happens, a complete checkpoint remains and the run
goes on to the same bits as one that nothing happened to.

    tests/scripts/faults.py [--kills N] [--leaks] [--train build/train] [--seed N]

kill -9 at N random moments, half of them in the middle of a save, on a disk that is so slow that training goes on
meanwhile; damaged, missing, foreign checkpoints; a full disk and a file-size limit; a run that diverges; SIGINT,
SIGTERM and SIGHUP, once and twice, in an evaluation, under nohup, and a log that nobody reads any more; two runs on one
folder; images that cannot be decoded, counted over resumes; the time to start and to wait for data. --leaks: also 2,000
steps with flat memory and no descriptor lost. Standard library alone; exit code 1 on the first thing that is not as it
should be. The last line says what was counted.
"""
import argparse
import filecmp
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checks import check, run_metrics
from trainer_process import ROOT, SHAPES, Trainer, checkpoints, prepare, run_tests, temporary

STEPS = 24  # of a run that goes to its end; the schedule is longer, so that no evaluation takes time
FILES = ("model.safetensors", "ema.safetensors", "optimizer-0x1.safetensors")


# ---- checkpoints ----


def difference(folder, reference):
    """Why a checkpoint is not whole or not the same as the reference's; None when it is."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        return f"{folder}/state.json: {error}"
    if folder.name != f"ckpt-{state['step']}":
        return f"{folder} says it is of step {state['step']}"
    different = [f for f in FILES if not ((folder / f).exists() and filecmp.cmp(folder / f, reference / f, False))]
    return f"{folder}: not as in {reference}: {', '.join(different)}" if different else None


def same(run, step, reference):
    why = difference(run / f"ckpt-{step}", reference / f"ckpt-{step}")
    check(why is None, why)


def verify(run, reference, before):
    """After a fault: the newest checkpoint is whole and no older than `before`. Its step, 0 without any."""
    steps = checkpoints(run)
    newest = steps[-1] if steps else 0
    check(newest >= before, f"{run}: newest checkpoint {newest}, there was {before} already")
    for step in steps:
        # Pruning takes state.json first, so an older one may be half gone, but never look whole.
        if step == newest or (run / f"ckpt-{step}/state.json").exists():
            same(run, step, reference)
    return newest


def losses(run):
    return [(row["step"], row["loss"]) for row in run_metrics.lines(run) if "loss" in row]


def copy_run(reference, to, *steps):
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for name in ("config.json", "tokenizer.bpe", "metrics.jsonl"):
        shutil.copy(reference / name, to)
    for step in steps:
        shutil.copytree(reference / f"ckpt-{step}", to / f"ckpt-{step}")
    return to


# ---- the faults ----


def in_save(trainer):
    return bool(temporary(trainer.run))


def in_background(trainer):
    """Whether a checkpoint is being written whose step is not the last that was done."""
    saving = [int(name.rsplit("-", 1)[1]) for name in temporary(trainer.run)]
    steps = [int(step) for step in re.findall(r"^step +(\d+) ", trainer.log(), re.M)]
    return bool(saving and steps) and steps[-1] > min(saving)


def kill_somewhere(trainer, rng, where, whole):
    """kill -9 at a random moment, of those at which `where` holds. Whether the process lived until then."""
    if not where:
        time.sleep(rng.random() * whole)
        lived = trainer.process.poll() is None
        trainer.kill()
        return lived
    skip = rng.randrange(4)
    while trainer.process.poll() is None:
        if not where(trainer):
            continue
        time.sleep(rng.random() * 0.03)
        if not trainer.pause():
            break
        if where(trainer) and skip == 0:
            trainer.kill()
            return True
        skip = max(0, skip - 1)
        trainer.go_on()
    return False


def test_kills(work, reference, rng, kills, whole):
    run, newest, done, saving, background, ended = work / "killed", 0, 0, 0, 0, 0
    while done < kills:
        where = (in_background, None, in_save, None)[done % 4]
        every = rng.choice((6, 9)) if where == in_background else rng.choice((1, 2))
        # On a slow disk a save takes some 10 steps: training goes on, or waits for it before the next one.
        trainer = Trainer(run, "--resume", "--stop-at", STEPS, disk={"SLOW_DISK_MB_S": "8"} if where else None,
                          checkpoint__every=every, data__threads=rng.choice((1, 2, 3)),
                          checkpoint__copy=rng.choice(("auto", "always" if where == in_background else "never")),
                          checkpoint__keep_last=rng.choice((1, 2)))
        if kill_somewhere(trainer, rng, where, whole):
            done += 1
            saving += in_save(trainer)
            background += in_background(trainer)
            newest = verify(run, reference, newest)
            continue
        trainer.end(0)
        same(run, STEPS, reference)
        shutil.rmtree(run)
        newest = 0
        ended += 1
        check(ended < 10 + 2 * kills, f"{ended} runs ended before a kill: is no save seen as .tmp-ckpt-?")
    Trainer(run, "--resume", "--stop-at", STEPS).end(0)
    same(run, STEPS, reference)
    check(losses(run) == losses(reference), f"{run}/metrics.jsonl: steps or losses differ from {reference}")
    check(not temporary(run), f"{run}: a save that was killed left {temporary(run)} for good")
    check(saving >= kills // 3, f"only {saving} of {kills} kills hit a save")
    check(background >= kills // 4, f"only {background} of {kills} kills hit a save beside which training went on")
    return (f"{kills} kills survived, {saving} of them in a save, {background} while training went on beside it "
            f"({ended + 1} runs ended with the same bits)")


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def test_damage(work, reference, other, rng):
    """Every damage to the newest of two checkpoints is named, and the run goes on from the one before."""
    cases = [(f"{how.__name__} {name}", name, lambda f, how=how: how(f, rng))
             for name in sorted(os.listdir(reference / "ckpt-6"))
             for how in (flip, cut, lambda f, _: f.write_bytes(b""), lambda f, _: f.unlink())]
    cases.append(("state.json of another config", "safetensors",
                  lambda f: shutil.copy(other / "ckpt-1/state.json", f.parent / "state.json")))
    for what, name, damage in cases:
        run = copy_run(reference, work / "damaged", 5, 6)
        damage(run / "ckpt-6" / name)
        log = Trainer(run, "--resume", "--stop-at", 7).end(0, "loaded", "ckpt-5 (step 5)")
        named = [line for line in log.splitlines() if "left out" in line and f"{run}/ckpt-6" in line and name in line]
        check(len(named) == 1, f"{what}: not named in\n{log}")
        same(run, 7, reference)

    # A newer folder that is no checkpoint at all.
    for make in (Path.mkdir, Path.touch):
        run = copy_run(reference, work / "damaged", 6)
        make(run / "ckpt-999")
        Trainer(run, "--resume", "--stop-at", 7).end(0, f"{run}/ckpt-999 is left out", "ckpt-6 (step 6)")
        same(run, 7, reference)

    # Nothing to fall back to, or a checkpoint of another model: refused, and nothing touched.
    def refused(text, *flags, **keys):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
        Trainer(run, *flags, "--stop-at", 7, **keys).end(2, text, "hint:")
        after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
        after.pop(run / "lock", None)
        before.pop(run / "lock", None)
        check(before == after, f"a refused run ({text}) changed {set(before.items()) ^ set(after.items())}")

    run = copy_run(reference, work / "damaged", 5, 6)
    refused("already holds checkpoints")
    flip(run / "ckpt-5/model.safetensors", rng)
    refused(f"{run}/ckpt-5/model.safetensors", "--from", run / "ckpt-5")
    cut(run / "ckpt-6/ema.safetensors", rng)
    refused("none of the 2 checkpoints", "--resume")
    run = copy_run(reference, work / "damaged", 6)
    refused(f"{run}/ckpt-6/model.safetensors: tensor embed.weight is", "--resume", model__vocab=320)
    refused(f"{run}/ckpt-6/model.safetensors has", "--resume", model__layers=1)
    shutil.copytree(other / "ckpt-1", run / "ckpt-999")
    refused(f"{run}/ckpt-999/model.safetensors: tensor", "--resume")
    return f"{len(cases) + 8} damaged or foreign checkpoints named"


def test_size_limit(work, reference):
    """Files may not grow as large as a checkpoint's: the run stops, or goes on as checkpoint.on_error says."""
    limit = min((reference / f"ckpt-1/{name}").stat().st_size for name in FILES) // 2
    run = copy_run(reference, work / "limited", 5)
    Trainer(run, "--resume", "--stop-at", STEPS, limit=limit).end(
        1, "error: checkpoint of step 6 not saved: cannot write", "File too large", "hint:", "--resume")
    check(checkpoints(run) == [5] and not temporary(run), f"{run}: {os.listdir(run)}")
    same(run, 5, reference)

    # The limit is lifted after two failures.
    trainer = Trainer(run, "--resume", "--stop-at", STEPS, limit=limit, checkpoint__on_error="continue")
    trainer.wait_log("warning: checkpoint of step 7 not saved")
    trainer.pause()
    same(run, 5, reference)
    resource.prlimit(trainer.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    trainer.go_on()
    trainer.end(0, "going on, as checkpoint.on_error says")
    same(run, STEPS, reference)

    # It is not: the last one is an error all the same.
    run = copy_run(reference, work / "limited", 5)
    Trainer(run, "--resume", "--stop-at", 8, limit=limit, checkpoint__on_error="continue").end(
        1, "warning: checkpoint of step 7", "error: checkpoint of step 8 not saved")
    same(run, 5, reference)
    return "file-size limit: stops or goes on as configured"


def full_disk(disk, work, room):
    """How to run a command on a file system of its own, at `disk`, copied to work/full at its end; None where mounting
    one is not permitted."""
    script = (f"mount -t tmpfs -o size={room}k none {disk} || exit 77; cp -r {work}/start/. {disk} || exit 78; "
              f'"$@"; rc=$?; cp -r {disk} {work}/full; exit $rc')
    try:
        tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", disk], capture_output=True)
    except FileNotFoundError:
        return None
    return ("unshare", "-rm", "sh", "-c", script, "sh") if tried.returncode == 0 else None


def test_full_disk(work, reference):
    """A file system with room for one checkpoint and a half; where none can be mounted, one that says it is full."""
    disk, copy = work / "disk", work / "full"
    disk.mkdir()
    size = sum(path.stat().st_size for path in (reference / "ckpt-5").iterdir())
    room = (size * 3 // 2 + sum((reference / f).stat().st_size for f in ("config.json", "tokenizer.bpe")) + 65536) >> 10
    copy_run(reference, work / "start", 5)
    within = full_disk(disk, work, room)
    if within:
        trainer = Trainer(disk, "--resume", "--stop-at", STEPS, within=within, checkpoint__keep_last=1)
    else:
        copy_run(reference, copy, 5)
        trainer = Trainer(copy, "--resume", "--stop-at", STEPS, disk={"SLOW_DISK_ROOM": str(size // 2)},
                          checkpoint__keep_last=1)
    trainer.end(1, "error: checkpoint of step 6 not saved", "No space left on device", "hint:", "--resume")
    check(checkpoints(copy) == [5] and not temporary(copy), f"{copy}: {os.listdir(copy)}")
    same(copy, 5, reference)
    Trainer(copy, "--resume", "--stop-at", STEPS).end(0)
    same(copy, STEPS, reference)
    how = "a small one" if within else "pretended, mounting is not permitted"
    return f"full disk ({how}): stops, the old checkpoint whole"


def test_slow_disk(work, reference):
    """Whatever ends a run waits for the checkpoint that is being written."""
    slow = {"SLOW_DISK_MB_S": "8"}
    run = work / "slow"
    trainer = Trainer(run, "--stop-at", STEPS, disk=slow, checkpoint__every=5)
    trainer.wait_log("step +6 ")
    trainer.signal(signal.SIGTERM)
    log = trainer.end(-signal.SIGTERM, "checkpoint of step 5:", "stopped by a signal after step")
    step = int(re.search(r"stopped by a signal after step (\d+)", log)[1])
    check(checkpoints(run) == [5, step], f"{run}: {checkpoints(run)} after step {step}")
    for saved in (5, step):
        same(run, saved, reference)

    # The end too, and a save that nothing follows fails the run.
    Trainer(run, "--resume", "--stop-at", STEPS, disk=slow, checkpoint__every=STEPS - 1).end(0)
    for saved in (STEPS - 1, STEPS):
        same(run, saved, reference)
    run = copy_run(reference, work / "slow", 5)
    size = sum((reference / f"ckpt-5/{name}").stat().st_size for name in FILES)
    log = Trainer(run, "--resume", "--stop-at", 8, disk={**slow, "SLOW_DISK_ROOM": str(size * 5 // 2)}).end(
        1, "error: checkpoint of step 8 not saved", "hint:")
    check("checkpoint of step 7: training stood still" in log, log)
    check(checkpoints(run) == [6, 7], f"{run}: {checkpoints(run)}")
    same(run, 7, reference)

    # An error while training goes on ends it then, not at the next save.
    run = copy_run(reference, work / "slow", 5)
    log = Trainer(run, "--resume", "--stop-at", STEPS, disk={"SLOW_DISK_ROOM": "100000"}, checkpoint__every=6).end(
        1, "error: checkpoint of step 6 not saved")
    last = int(re.findall(r"^step +(\d+) ", log, re.M)[-1])
    check(last < 12, f"the error of step 6 is told after step {last}:\n{log}")
    check(checkpoints(run) == [5], f"{run}: {checkpoints(run)}")
    return "a slow disk: SIGTERM and the end wait for it, an error is told at once"


def test_signals(work, reference, rng):
    for number in (signal.SIGTERM, signal.SIGINT):
        run = work / f"signal-{number}"
        for attempt in range(5):  # on a busy machine the run may be at its end before this process sees its line
            shutil.rmtree(run, ignore_errors=True)
            # Only the signal makes it save.
            trainer = Trainer(run, "--stop-at", STEPS, checkpoint__every=0)
            trainer.wait_log(f"step +{rng.randrange(2, STEPS // 2)} ")
            trainer.signal(number)
            began = time.monotonic()
            log = trainer.end(-number, "stopped by a signal after step")
            took = time.monotonic() - began
            step = int(re.search(r"stopped by a signal after step (\d+)", log)[1])
            if step < STEPS:
                break
        check(step < STEPS and checkpoints(run) == [step], f"{run}: {checkpoints(run)} after step {step}")
        same(run, step, reference)
        check(took < 5, f"{took:.1f} s from the signal to the end")

        trainer = Trainer(run, "--resume", "--stop-at", 10 * STEPS, checkpoint__every=0)
        trainer.wait_log(f"step +{step + 2} ")
        trainer.signal(signal.SIGTERM, signal.SIGINT)
        code = trainer.wait(10)
        check(code in (-signal.SIGTERM, -signal.SIGINT), f"two signals at once: exit code {code}, expected -15 or -2")
        verify(run, reference, step)
        Trainer(run, "--resume", "--stop-at", STEPS).end(0)
        same(run, STEPS, reference)
    # A machine that shuts down ends the terminal's session, then asks every process to end. The save lasts longer.
    run = work / "shut-down"
    trainer = Trainer(run, "--stop-at", 10 * STEPS, disk={"SLOW_DISK_MB_S": "40"}, checkpoint__every=0)
    trainer.wait_log("step +2 ")
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        trainer.signal(number)
        time.sleep(0.05)
    log = trainer.end(-signal.SIGHUP, "stopped by a signal after step")
    check(checkpoints(run) == [int(re.search(r"stopped by a signal after step (\d+)", log)[1])], f"{run}: {log}")
    return "SIGINT and SIGTERM save and end the process, a second one at once"


def test_stop_in_evaluation(work, reference):
    """An evaluation that would take hours is left at once, saved first, and the last one is owed still."""
    run, slow = work / "evaluated", {"eval__sampler_steps": 1000, "eval__samples": 64, "eval__documents": 64,
                                     "checkpoint__every": 0, "data__threads": 1}
    def stop(*flags, **keys):
        trainer = Trainer(run, *flags, **slow, **keys)
        trainer.wait_log("image experts: ")  # the figures are said, drawing begins
        time.sleep(0.1)
        began = time.monotonic()
        trainer.signal(signal.SIGTERM)
        trainer.end(-signal.SIGTERM, "stopped by a signal after step")
        took = time.monotonic() - began
        check(took < 5, f"{took:.1f} s from a signal in the evaluation to the end")
        check(not run_metrics.evaluations(run), f"{run}: an evaluation that was left is in metrics.jsonl")

    stop("--stop-at", STEPS, eval__every=3)
    check(checkpoints(run) == [3], f"{run}: {checkpoints(run)} after a signal in the evaluation at step 3")
    same(run, 3, reference)
    shutil.rmtree(run)
    stop(train__steps=2)
    check(checkpoints(run) == [2], f"{run}: {checkpoints(run)} after a signal in the last evaluation")
    Trainer(run, "--resume", **{**slow, "train__steps": 2, "eval__sampler_steps": 1}).end(0, "drawings: ")
    check([row["step"] for row in run_metrics.evaluations(run)] == [2], f"{run}: the evaluation is not made up for")

    # SIGINT as a shell leaves it to a job in the background: ignored.
    trainer = Trainer(run, "--from", run / "ckpt-2", "--stop-at", STEPS, ignored=(signal.SIGINT,), checkpoint__every=0)
    trainer.wait_log("step +3 ")
    trainer.signal(signal.SIGINT)
    trainer.end(0)
    return "a signal ends an evaluation too, and an ignored SIGINT nothing"


def test_hangup(work, reference):
    """The terminal is closed: SIGHUP, from the kernel and from the shell, and then nobody reads what is said."""
    for attempt in range(10):  # on a busy machine a run may be over before its signal is sent
        run = work / f"hangup-{attempt}"
        trainer = Trainer(run, "--stop-at", STEPS, checkpoint__every=0)
        trainer.wait_log("step +2 ")
        trainer.signal(signal.SIGHUP)
        trainer.process.send_signal(signal.SIGHUP)
        code = trainer.wait(60)
        log = trainer.log()
        stopped = re.search(r"stopped by a signal after step (\d+)", log)
        check(code == (-signal.SIGHUP if stopped else 0), f"{run}: exit code {code}\n{log[-2000:]}")
        if stopped:
            break
        check(checkpoints(run)[-1] == STEPS, f"{run}: ended by SIGHUP, but not saved:\n{log[-2000:]}")
    check(stopped, f"{run}: ten runs ended before SIGHUP reached them")
    step = int(stopped[1])
    same(run, step, reference)

    # Its log a pipe whose reader went too: the next line brings SIGPIPE, at least one step later.
    trainer = Trainer(run, "--resume", "--stop-at", STEPS, checkpoint__every=0,
                      within=("sh", "-c", '"$@" 2>&1 | head -n 2; sleep 0.1', "sh"))
    trainer.end(0, "loaded")
    until = time.monotonic() + 20
    while checkpoints(run)[-1] == step and time.monotonic() < until:
        time.sleep(0.01)
    check(step < checkpoints(run)[-1] < STEPS, f"{run}: {checkpoints(run)} after a lost reader at step {step + 1}")
    same(run, checkpoints(run)[-1], reference)

    # nohup: the run goes on.
    trainer = Trainer(run, "--resume", "--stop-at", STEPS, checkpoint__every=0, within=("nohup",))
    trainer.wait_log("step +")
    trainer.signal(signal.SIGHUP)
    trainer.end(0)
    same(run, STEPS, reference)
    return "SIGHUP saves, a second one changes nothing, nohup trains on; a lost reader of the log saves too"


def test_divergence(work, reference):
    """Weights that grow a hundredfold a step until nothing is finite: given up, what was saved before stays usable."""
    run = copy_run(reference, work / "diverged", 5)
    log = Trainer(run, "--resume", "--stop-at", 10 * STEPS, train__lr=10, train__weight_decay=10, train__warmup_steps=0,
                  train__max_skipped=3, checkpoint__keep_last=1000).end(
        1, "SKIPPED: not finite", "error: ", "3 steps in a row", "hint:")
    rows = run_metrics.steps(run)
    check([("skipped" in row) for row in rows[-4:]] == [False, True, True, True], f"{run}: {rows[-4:]}\n{log[-2000:]}")
    bad = rows[-3]["step"]  # counted from 0, so equal to the steps done before it
    check(checkpoints(run) == list(range(5, bad + 1)), f"{run}: {checkpoints(run)}, skipped from step {bad + 1} on")
    same(run, 5, reference)
    for step in checkpoints(run):  # all of them whole: --from takes no other
        Trainer(run, "--from", run / f"ckpt-{step}", "--dump", work / "dumped").end(0, f"ckpt-{step}")
    Trainer(run, "--from", run / "ckpt-5", "--stop-at", 7).end(0)
    same(run, 7, reference)
    return f"a run that diverges is given up after 3 skipped steps, {bad - 4} checkpoints whole"


def test_bad_images(work, samples):
    """Images that cannot be decoded count once in a run, over resumes too, and the state says the same as in one go."""
    folder, run, broken = work / "pictures", work / "bad-images", 8
    folder.mkdir()
    samples = samples[:40]
    (folder / "captions.tsv").write_text("".join(f"{i}.png\t{caption}\n" for i, (caption, _) in enumerate(samples)))
    for i, (_, png) in enumerate(samples):  # a whole header, half a picture
        (folder / f"{i}.png").write_bytes(png[: len(png) // 2] if i < broken else png)
    keys = {"data__sources": [{"type": "folder", "path": str(folder)}], "data__held_out": 0, "data__threads": 1,
            "checkpoint__every": 1}

    def counted(step):
        return len(json.loads((run / f"ckpt-{step}/state.json").read_text())["state"]["loader"]["bad"])

    Trainer(run, "--stop-at", 6, data__max_bad=broken, **keys).end(0, "cannot be decoded")
    check(counted(6) == broken, f"{run}: {counted(6)} bad images after 6 steps, not {broken}")
    for step in (7, 8):  # met again by each process
        Trainer(run, "--resume", "--stop-at", step, data__max_bad=broken, **keys).end(0)
        check(counted(step) == broken, f"{run}: {counted(step)} bad images after step {step}, not {broken}")
    straight = work / "bad-images-straight"
    Trainer(straight, "--stop-at", 8, data__max_bad=broken, **keys).end(0)
    same(run, 8, straight)
    check((run / "ckpt-8/state.json").read_bytes() == (straight / "ckpt-8/state.json").read_bytes(),
          f"{run}/ckpt-8/state.json is not that of a run in one go")
    return "bad images count once, over resumes too"


def test_lock(work, reference):
    run = work / "locked"
    first = Trainer(run, "--stop-at", STEPS)
    first.wait_log("step +1 ")
    first.pause()
    before = checkpoints(run)
    second = Trainer(run, "--resume", "--stop-at", STEPS)
    second.end(2, f"another run uses {run} (process {first.process.pid})", "hint:")
    check(checkpoints(run) == before, f"{run}: {checkpoints(run)}, before the refused run {before}")
    first.kill()
    Trainer(run, "--resume", "--stop-at", STEPS).end(0)  # the lock went with the process
    same(run, STEPS, reference)
    return "a second run on one folder is refused"


# ---- time and memory ----


def start_seconds(work):
    """From the command to the first step's beginning, for the demo as it is, its data indexed before."""
    best = 1e9
    for _ in range(3):
        run = work / "start-up"
        shutil.rmtree(run, ignore_errors=True)
        began = time.monotonic()
        trainer = Trainer(run, "--stop-at", 1, tiny=False)
        found = trainer.wait_log(r"step +1 .* (\d+) ms \(data")
        best = min(best, time.monotonic() - began - int(found[1]) / 1e3)
        trainer.end(0)
    return best


def test_start(work):
    seconds = start_seconds(work)
    check(seconds < 1, f"the demo takes {seconds:.2f} s to start")
    return f"the demo starts in {seconds:.2f} s"


def test_data_wait(work, samples):
    """Four sources of all kinds: a step must not wait for them."""
    folder = work / "folder"
    folder.mkdir()
    lines = []
    for i, (caption, png) in enumerate(samples):
        (folder / f"{i}.png").write_bytes(png)
        lines.append(f"{i}.png\t{caption}\n")
    (folder / "captions.tsv").write_text("".join(lines))
    (work / "texts.txt").write_text("\n\n".join(caption for caption, _ in samples))
    small = str(work / "small.tar")
    sources = [{"type": "webdataset", "path": str(SHAPES)}, {"type": "webdataset", "path": small, "weight": 0.5},
               {"type": "folder", "path": str(folder)}, {"type": "text", "path": str(work / "texts.txt")}]
    run = work / "sources"
    Trainer(run, "--stop-at", 40, "--tokens", 256, tiny=False, data__sources=sources, data__held_out_by="key",
            run__threads=1).end(0)
    rows = run_metrics.steps(run)[1:]
    wait, whole = statistics.median(r["data_wait"] for r in rows), statistics.median(r["seconds"] for r in rows)
    check(wait < 0.01 * whole, f"a step of {whole * 1e3:.1f} ms waits {wait * 1e3:.2f} ms for four sources")
    return f"4 sources: a step of {whole * 1e3:.0f} ms waits {wait * 1e3:.3f} ms for data"


def resident_kb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def test_leaks(work):
    """2,000 steps with checkpoints and evaluations on the way, watched from outside."""
    trainer = Trainer(work / "long", "--stop-at", 2000, train__steps=2001, checkpoint__every=50, eval__every=100,
                      eval__documents=16, eval__samples=2, eval__sampler_steps=2)
    seen = []
    for step in range(400, 2000, 200):
        trainer.wait_log(f"step +{step} ", timeout=120)
        pid = trainer.process.pid
        seen.append((step, resident_kb(pid), len(os.listdir(f"/proc/{pid}/fd"))))
    trainer.end(0, timeout=120)
    first, later = seen[0], seen[1:]
    growth = max(kb for _, kb, _ in later) - first[1]
    check(growth < 1024, f"resident memory grew by {growth} kB: {seen}")
    # At any moment a checkpoint's three files and a sheet may be open; most of the time none are.
    fds = [fd for _, _, fd in seen]
    check(max(fds) <= min(fds) + 4 and min(fds[len(fds) // 2 :]) == min(fds), f"open descriptors: {seen}")
    return (f"2,000 steps: {first[1] / 1024:.1f} MB resident, {growth:+d} kB since step {first[0]}, "
            f"{later[-1][2]} descriptors")


# ---- put together ----


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--leaks", action="store_true")
    parser.add_argument("--train", default=str(ROOT / "build/train"), help="tests/slow_disk.so is looked for beside it")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments; printed")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.randrange(1 << 30)
    rng = random.Random(seed)
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="tessera-faults-") as folder:
        work = Path(folder)
        samples = prepare(work, options.train, train__micro_batches=2, train__steps=10 * STEPS)
        reference, other = work / "reference", work / "other"
        began = time.monotonic()
        Trainer(reference, "--stop-at", STEPS, checkpoint__keep_last=1000, data__threads=1).end(0)
        whole = time.monotonic() - began
        Trainer(other, "--stop-at", 1, model__dim=48, model__head_dim=8).end(0)
        tests = [
            (test_kills, reference, rng, options.kills, whole), (test_damage, reference, other, rng),
            (test_size_limit, reference), (test_full_disk, reference), (test_slow_disk, reference),
            (test_divergence, reference), (test_signals, reference, rng), (test_stop_in_evaluation, reference),
            (test_hangup, reference), (test_lock, reference),
            (test_bad_images, samples), (test_start,), (test_data_wait, samples),
        ]
        if options.leaks:
            tests.append((test_leaks,))
        return run_tests(work, tests)


if __name__ == "__main__":
    sys.exit(main())
