#!/usr/bin/python3
"""From config to engine: every key of the config, set to a value that is not its default, has the effect it promises.

    tests/scripts/test_keys.py BUILD [KEY...]

A row of the table below is a function that runs the program and asserts what can be seen of its key: in a dumped step,
in a checkpoint's tensors, in metrics.jsonl, in the memory table, in files, threads and mappings. A key without a row
fails, as does a row that never sets its key to something else than the default. Exit code 0, 1, or 77: no numpy."""
import json
import math
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
try:
    import numpy as np
    import fixed_weights
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)
from key_runs import *

# ---- the table ----

table = {}


def key(*names):
    def add(row):
        for name in names:
            assert name not in table, name
            table[name] = row
        return row

    return add


@key("run.name", "run.dir")
def _():
    r = run({"run.dir": "somewhere", "run.name": "nobody"})
    assert (r.where / "somewhere/nobody/metrics.jsonl").exists()


@key("run.folder")
def _():
    where = tempfile.mkdtemp(dir=WORK)
    run({"run.folder": f"{where}/exactly/here"}, where=where)
    assert pathlib.Path(where, "exactly/here/metrics.jsonl").exists()


@key("run.seed")
def _():
    a, b, again = (run({"run.seed": s, "train.lr": 0}, where=tempfile.mkdtemp(dir=WORK)) for s in (1, 2, 2))
    weights = [r.tensors("model", 1)["embed.weight"] for r in (a, b, again)]
    assert (weights[0] != weights[1]).mean() > 0.99 and (weights[1] == weights[2]).all()
    assert a.rows[0]["flow"] != b.rows[0]["flow"] and b.rows[0]["flow"] == again.rows[0]["flow"]


@key("run.device")
def _():  # a build without a GPU says so; one with it keeps its weights in two bytes and a remainder of two
    r = run({"run.device": "cuda", "model.head_dim": 32, "model.patch": 8}, "--plan", rc=None)
    assert "cuda" in r.log.lower() if r.rc else "remainders of the weights" in r.out, r.log


@key("run.threads")
def _():
    threads = [while_running({"run.threads": n}, tasks) for n in (1, 3)]
    assert threads[1] - threads[0] == 2, threads


@key("data.threads")
def _():
    threads = [while_running({"data.threads": n}, tasks) for n in (1, 4)]
    assert threads[1] - threads[0] == 3, threads


@key("model.dim")
def _():
    assert shape({"model.dim": 24}, "embed.weight") == (300, 24)


@key("model.layers")
def _():
    layers = {n.split(".")[1] for n in dump({"model.layers": 3}).params if n.startswith("layers.")}
    assert layers == {"0", "1", "2"}


@key("model.heads", "model.kv_heads")
def _():
    sets = {"model.heads": 6, "model.kv_heads": 3}
    assert shape(sets, "layers.0.attn.qkv.weight") == ((6 + 2 * 3) * 8, 16)
    assert shape(sets, "layers.0.attn.out.weight") == (16, 6 * 8)


@key("model.head_dim")
def _():
    assert shape({"model.head_dim": 6}, "layers.1.attn.q_norm") == (2, 6)


@key("model.cond_dim")
def _():
    assert shape({"model.cond_dim": 12}, "cond.time2.weight") == (12, 12)


@key("model.patch")
def _():
    d = dump({"model.patch": 2})
    assert d.params["image_head.weight"].shape == (12, 16) and all(len(i[3]) == 64 for i in d.images())


@key("model.patch_bottleneck")
def _():
    sets = {"model.patch_bottleneck": 5}
    assert shape(sets, "patch.down.weight") == (5, 48) and shape(sets, "patch.in.weight") == (16, 5)


@key("model.vocab")
def _():
    sets = {"model.vocab": 280}
    assert shape(sets, "embed.weight") == shape(sets, "head.weight") == (280, 16)


@key("model.attn_per_modality")
def _():
    params = dump({"model.attn_per_modality": True}).params
    assert {"layers.0.attn.qkv.text.weight", "layers.0.attn.out.image.weight"} < set(params)


@key("model.tie_embeddings")
def _():
    tied, free = dump({"model.tie_embeddings": True}), dump()
    assert "head.weight" in free.params and "head.weight" not in tied.params
    unused = 0  # "!": a byte of no caption: as an input it has no gradient, as a target every id has one
    assert tied.grads["embed.weight"][unused].any() and not free.grads["embed.weight"][unused].any()


def experts_row(modality):
    @key(f"model.{modality}.experts", f"model.{modality}.expert_dim", f"model.{modality}.shared_dim")
    def _():
        sets = {f"model.{modality}.{k}": v for k, v in (("experts", 5), ("expert_dim", 7), ("shared_dim", 6))}
        other = "image" if modality == "text" else "text"
        assert shape(sets, f"layers.1.{modality}.router.weight") == (5, 16)
        assert shape(sets, f"layers.1.{modality}.experts.w2") == (5, 16, 7)
        assert shape(sets, f"layers.1.{modality}.shared.w2") == (16, 6)
        assert shape(sets, f"layers.1.{other}.experts.w2") == (3, 16, 8)
        assert f"layers.1.{other}.shared.w2" not in dump(sets).params

    @key(f"model.{modality}.top_k")
    def _():  # whoever asks all experts loads them evenly
        loads = [run({f"model.{modality}.top_k": k, "train.steps": 2}).loads[-1] for k in (3, 1)]
        other = "image" if modality == "text" else "text"
        assert loads[0][f"{modality}_experts"]["max_over_mean"] == 1 < loads[1][f"{modality}_experts"]["max_over_mean"]
        assert loads[0][f"{other}_experts"]["max_over_mean"] > 1


experts_row("text")
experts_row("image")


@key("data.micro_batch_tokens")
def _():
    assert "slots 160" in plan({"data.micro_batch_tokens": 160})
    rows = [run({"data.micro_batch_tokens": n}).rows[0] for n in (160, 256)]
    assert all(abs(r["tokens"] / r["fill"] - n) < 1e-6 for r, n in zip(rows, (160, 256)))


@key("data.image_size")
def _():
    assert {len(i[3]) for i in dump({"data.image_size": 8}).images()} == {4}
    assert {len(i[3]) for i in dump().images()} == {16}


@key("data.image_mode", "data.max_image_tokens")
def _():
    sizes = lambda sets: {len(i[3]) for i in dump({**WIDE, "train.micro_batches": 6, **sets}).images()}
    assert sizes({}) == {16}
    assert sizes({"data.image_mode": "aspect", "data.max_image_tokens": 32}) == {16, 32}
    assert max(sizes({"data.image_mode": "aspect", "data.max_image_tokens": 20})) in range(17, 21)


@key("data.max_pixels")
def _():
    seen = lambda sets: {int(i[3].max()) for i in dump({**WIDE, "train.micro_batches": 12, **sets}).images()}
    assert max(seen({})) >= 215  # the wide ones are the last, and the lightest
    assert max(seen({"data.max_pixels": PIXELS * PIXELS})) < 215


@key("data.flip")
def _():
    mirrored = lambda d: [i[3][0, 0] > 150 for i in d.images()]
    sets = {"train.micro_batches": 6}
    assert not any(mirrored(dump(sets)))
    share = np.mean(mirrored(dump({**sets, "data.flip": True})))
    assert 0.2 < share < 0.8, share


@key("data.tokenizer")
def _():
    bytes_only, learned = run(), run({"data.tokenizer": "train"})
    sizes = [(r.folder / "tokenizer.bpe").stat().st_size for r in (bytes_only, learned)]
    assert sizes[1] > sizes[0]
    at = lambda d: np.mean([len(t) for t in d.texts()])
    assert at(dump({"data.tokenizer": "train"})) < 0.8 * at(dump())


@key("data.cfg_drop")
def _():
    sets = {"data.caption_to_image": 1, "train.micro_batches": 6}
    captions = [[i[2] == 0 for i in dump({**sets, "data.cfg_drop": p}).images()] for p in (0, 0.5, 1)]
    assert not any(captions[0]) and 0.2 < np.mean(captions[1]) < 0.8 and all(captions[2])


@key("data.caption_to_image")
def _():
    kinds = [{i[0] for i in dump({"data.caption_to_image": p, "train.micro_batches": 4}).images()} for p in (0, 0.5, 1)]
    assert kinds == [{1}, {0, 1}, {0}] or kinds == [{0}, {0, 1}, {1}], kinds
    times = [i[1] for i in dump({"data.caption_to_image": 1, "train.micro_batches": 4}).images()]
    assert max(times) < 1  # drawn ones are noised


@key("data.held_out", "data.held_out_by")
def _():
    sets = {"data.held_out": 0.5, "data.held_out_by": "family", "eval.documents": 100, "train.micro_batches": 24}
    held_out = run(sets).evals[1]["documents"]
    assert run(sets).evals[1]["of"] == "held_out" and 0 < held_out < IMAGES
    names = {t.strip("|")[:1] for t in dump(sets).texts()} - {""}
    trained = sum(n for f, n in enumerate(FAMILIES) if "ABCDE"[f] in names)
    assert trained + held_out == IMAGES, (trained, held_out, names)  # whole families, none on both sides
    assert run({"eval.documents": 100}).evals[1]["of"] == "training"


@key("data.max_text")
def _():
    text = [dump({"data.max_caption": 20, **s}).packs[0]["dims"][0] for s in ({}, {"data.max_text": 40})]
    assert text[0] > 40 >= text[1] > 15, text


@key("data.max_images")
def _():
    assert len(dump().images()) > 2 == len(dump({"data.max_images": 2}).images())
    assert "modulation rows 3," in plan({"data.max_images": 2})


@key("data.max_document")
def _():
    longest = lambda sets: max(len(t) for t in dump({**LONG, **sets}).texts())
    assert longest({}) > 100 and 20 <= longest({"data.max_document": 40}) <= 40


@key("data.max_caption")
def _():
    captions = lambda sets: {len(t.strip("|")) for t in dump(sets).texts() if t.strip("|")}
    assert max(captions({})) > 20 and captions({"data.max_caption": 7}) == {7}


@key("data.cache_mb")
def _():  # pictures that are gone from the disk are still in memory, or are missed
    missed = {}
    for mb in (256, 0):
        tried.setdefault("data.cache_mb", []).append(mb)
        folder = shutil.copytree(WORK / "pictures", WORK / f"cached-{mb}")
        sets = {"data.sources": source("folder", folder.name), "data.cache_mb": mb, "data.max_bad": 0}
        process = start({**sets, "train.steps": 1500})
        metrics = process.where / "run/metrics.jsonl"
        until = time.time() + 60  # 31 pictures, 8 or so a step
        while time.time() < until and not (metrics.exists() and len(metrics.read_text().splitlines()) > 60):
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before its pictures were taken away"
        for i in range(IMAGES):
            (folder / f"{i}.png").unlink()
        missed[mb] = not re.search(r"\b0 undecodable", Run(process, None).log)
    assert missed == {256: False, 0: True}, missed


@key("data.max_bad")
def _():
    sets = {**BROKEN, "train.steps": 20}
    assert len(run(sets).rows) == 20
    r = run({**sets, "data.max_bad": 2}, rc=1)
    assert len(r.rows) < 20 and "data.max_bad" in r.log


@key("data.sources")
def _():  # one instead of the other; both, by weight
    assert not dump(LONG).images()
    shares = []
    for weight in (1, 9):
        both = [*source("folder", "pictures"), {**source("folder", "strangers")[0], "weight": weight}]
        texts = dump({"train.micro_batches": 16, "data.sources": both}).texts()
        shares.append(np.mean(["stranger" in t for t in texts if len(t) > 9]))
    assert 0.35 < shares[0] < 0.65 and 0.8 < shares[1] < 0.98, shares


@key("train.steps")
def _():
    assert len(run({"train.steps": 3}).rows) == 3


@key("train.micro_batches")
def _():
    one, three = run(), run({"train.micro_batches": 3})
    assert three.rows[0]["tokens"] > 2.5 * one.rows[0]["tokens"]
    assert len(dump({"train.micro_batches": 3}).packs) == 3


@key("train.batch")
def _():
    assert "micro-batches 3" in plan({"train.batch": 600})
    assert len(dump({"train.batch": 600}).packs) == 3


def initial():
    return run({"train.lr": 0}).tensors("model", 1)


@key("train.lr")
def _():
    r = run({"train.lr": 0.02})
    assert r.rows[0]["lr"] == 0.02
    # Adam's first step moves every weight that has a gradient by lr.
    moved = r.tensors("model", 1)["head.weight"] - initial()["head.weight"]
    close(np.median(np.abs(moved[moved != 0])), 0.02, 1e-2)


@key("train.warmup_steps")
def _():
    lr = [row["lr"] for row in run({"train.steps": 6, "train.warmup_steps": 4}).rows]
    assert np.allclose(lr, [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01]), lr


@key("train.decay_fraction")
def _():
    lr = [row["lr"] for row in run({"train.steps": 6, "train.decay_fraction": 0.5}).rows]
    assert np.allclose(lr, [0.01] * 4 + [0.01 * 2 / 3, 0.01 / 3]), lr


@key("train.clip")
def _():  # the first moment after one step is (1 - beta1) times the clipped gradient
    for clip in (0, 0.5):
        r = run({"train.clip": clip})
        size = r.rows[0]["grad_norm"]
        assert size > 1
        close(norm(r.moments(1)[0]), 0.1 * (clip or size))


@key("train.beta1")
def _():
    r = run({"train.clip": 0, "train.beta1": 0.6})
    close(norm(r.moments(1)[0]), 0.4 * r.rows[0]["grad_norm"])


@key("train.beta2")
def _():
    sums = [run({"train.beta2": b}).moments(1)[1].sum() for b in (0.95, 0.8)]
    close(sums[1], 4 * sums[0])


@key("train.weight_decay")
def _():
    plain, decayed, first = run().tensors("model", 1), run({"train.weight_decay": 0.5}).tensors("model", 1), initial()
    kept = ("embed.weight", "head.weight", "image_head.weight", "mod.base", "cond.kind")
    shrunk = 0
    for name, w in first.items():
        none = name in kept or re.search(r"_norm$|bias$|router", name)
        want = 0 if none else -0.01 * 0.5 * w
        assert np.abs(decayed[name] - plain[name] - want).max() <= 1e-6, name
        shrunk += not none and bool(w.any())
    assert shrunk > 10


@key("train.moments")
def _():  # learns as with fp32, and a run that is resumed has the bits of one that is not
    sets = {"train.steps": 30, "checkpoint.every": 15}
    wide, half = run(sets), run({**sets, "train.moments": "bf16"})
    last = [sum(row["loss"] for row in r.rows[-5:]) for r in (wide, half)]
    assert last[0] != last[1] and abs(last[1] / last[0] - 1) < 0.01, last
    moments = half.tensors("optimizer-0x1", 30)
    is_bf16 = lambda m: ((m.astype(np.float32).view(np.uint32) & 0xffff) == 0).all()
    assert all(map(is_bf16, moments.values())) and not all(map(is_bf16, wide.tensors("optimizer-0x1", 30).values()))
    where = tempfile.mkdtemp(dir=WORK)
    run({**sets, "train.moments": "bf16"}, "--stop-at", "15", where=where)
    again = run({**sets, "train.moments": "bf16"}, "--resume", where=where).tensors("optimizer-0x1", 30)
    assert all((again[n] == moments[n]).all() for n in moments)


@key("train.ema")
def _():
    assert not (run({"train.ema": 0}).folder / "ckpt-1/ema.safetensors").exists()
    r = run({"train.ema": 0.05})  # below the 1/10 that the first step has at most
    model, ema, first = r.tensors("model", 1), r.tensors("ema", 1), initial()
    assert all(np.allclose(ema[n], 0.05 * first[n] + 0.95 * model[n], atol=1e-6) for n in first)
    # What is evaluated is the average: with one that never moves, the figures are those of the initial weights.
    still = {"train.ema_every": 100, "eval.documents": 20, "train.steps": 3, "train.lr": 0.05}
    flow = [run({**still, **s}).evals[3]["flow"] for s in ({}, {"train.ema": 0}, {"train.lr": 0})]
    assert flow[0] == flow[2] != flow[1], flow


@key("train.ema_every")
def _():
    r = run({"train.ema_every": 2, "train.steps": 2, "checkpoint.every": 1})
    first = initial()
    assert all((r.tensors("ema", 1)[n] == first[n]).all() for n in first)
    assert any((r.tensors("ema", 2)[n] != first[n]).any() for n in first)


@key("train.ce_weight")
def _():
    for w in (1, 5):
        row = run({"train.ce_weight": w}).rows[0]
        close(row["loss"], row["flow"] + w * row["ce"] + row["balance"] + row["z"], 1e-6)
    heads = [norm(dump({"train.ce_weight": w}).grads["head.weight"]) for w in (1, 5)]
    close(heads[1], 5 * heads[0])


@key("train.max_skipped")
def _():
    spoilt = cache.get("spoilt")
    if not spoilt:
        spoilt = cache["spoilt"] = run(where=tempfile.mkdtemp(dir=WORK)).folder / "ckpt-1"
        fixed_weights.replace(spoilt, spoil=True)
    r = run({"train.max_skipped": 3, "train.steps": 20}, "--init", str(spoilt), rc=1)
    assert len(r.rows) == 3 and all("skipped" in row for row in r.rows) and "train.max_skipped" in r.log


@key("train.spike", "train.spike_patience", "train.spike_rewinds")
def _():  # after the 16 steps that set the median all are beyond a hundredth of it: 2, back once, 2 more
    sets = {"train.steps": 40, "checkpoint.every": 10, "train.spike_patience": 2, "train.spike_rewinds": 1}
    assert len(run({**sets, "train.spike": 0}).rows) == 40
    r = run({**sets, "train.spike": 0.01}, rc=1)
    assert r.log.count("SKIPPED: spike") == 4 and r.log.count("1 of 1") == 1, r.log


@key("train.verify_every")
def _():  # every second step's micro-batch is computed twice
    calls = []
    for n in (0, 2, 1):
        where = tempfile.mkdtemp(dir=WORK)
        counting = {"LD_PRELOAD": str(BUILD / "tests/flip_gemm.so"), "FLIP_GEMM_COUNT": f"{where}/calls"}
        run({"train.verify_every": n, "train.steps": 4}, where=where, env={**os.environ, **counting})
        calls.append(int(pathlib.Path(where, "calls").read_text()))
    more = [b - a for a, b in zip(calls, calls[1:])]
    # How many products a step has differs a little from pack to pack.
    assert min(more) > 0.4 * calls[0] and max(more) < 0.6 * calls[0], calls


@key("flow.t_mean", "flow.t_std")
def _():
    for mean in (-2, 1):
        drawings = [i for i in dump({"flow.t_mean": mean, "flow.t_std": 0, "data.caption_to_image": 1}).images()]
        assert drawings and all(abs(i[1] - 1 / (1 + math.exp(-mean))) < 1e-6 for i in drawings)
    sets, spread = {"data.caption_to_image": 1, "train.micro_batches": 12}, []
    for std in (0.8, 2):
        times = [i[1] for i in dump({**sets, "flow.t_std": std}).images()]
        spread.append(np.std([math.log(t / (1 - t)) for t in times]))
    assert spread[1] > 1.5 * spread[0], spread


@key("flow.t_uniform")
def _():  # the other times are all one
    sets = {"flow.t_mean": -3, "flow.t_std": 0, "data.caption_to_image": 1, "train.micro_batches": 12}
    times = [np.array([i[1] for i in dump({**sets, "flow.t_uniform": u}).images()]) for u in (0, 0.5, 1)]
    moved = [np.abs(t - 1 / (1 + math.exp(3))) > 1e-6 for t in times]
    assert not moved[0].any() and 0.3 < moved[1].mean() < 0.7 and moved[2].all()
    assert abs(times[2].mean() - 0.5) < 0.1 and times[2].max() > 0.9 and times[2].min() < 0.1


@key("flow.t_floor")
def _():  # every time is 1/2: dividing by a half or by 1
    sets = {"flow.t_mean": 0, "flow.t_std": 0}
    flow = [dump({**sets, "flow.t_floor": f}).losses["flow"] for f in (0.05, 1)]
    close(flow[0], 4 * flow[1], 1e-5)
    grads = [dump({**sets, "flow.t_floor": f}).grads["image_head.weight"] for f in (0.05, 1)]
    close(norm(grads[0]), 4 * norm(grads[1]), 1e-4)


@key("router.balance", "router.z")
def _():
    for name in ("balance", "z"):
        values = [dump({f"router.{name}": v}) for v in (0, 0.02, 0.04)]
        losses = [d.losses[name] for d in values]
        assert losses[0] == 0 < losses[1]
        close(losses[2], 2 * losses[1], 1e-5)
        grads = [d.grads["layers.0.image.router.weight"] for d in values]
        pull = [g - grads[0] for g in grads[1:]]
        close(norm(pull[1]), 2 * norm(pull[0]), 1e-2)


@key("router.even")
def _():  # the loads of a step over their fair shares, the worst: a row more at most
    load = {even: run({"router.even": even}).rows[0]["expert_load_max"] for even in (False, True)}
    assert load[True] < load[False] and load[True] < 1.2, load


@key("eval.every")
def _():
    assert sorted(run({"eval.every": 2, "train.steps": 5, "eval.documents": 3}).evals) == [2, 4, 5]


@key("eval.documents")
def _():
    assert run({"eval.documents": 5}).evals[1]["documents"] == 5


@key("eval.samples")
def _():
    high = {}
    for n in (2, 12):
        r = run({"eval.samples": n, "eval.sampler_steps": 1, "eval.documents": 20})
        (sheet,) = (r.folder / "samples").glob("step-*.png")
        head = sheet.read_bytes()[16:24]
        high[n] = int.from_bytes(head[:4], "big") * int.from_bytes(head[4:], "big")
    assert high[12] > 2 * high[2], high


@key("eval.sampler", "eval.sampler_steps", "eval.guidance", "eval.guidance_from", "eval.t_end")
def _():
    base = {"eval.sampler": "heun", "eval.sampler_steps": 5, "eval.guidance": 3, "eval.guidance_from": 0.1}
    changes = {"eval.sampler": "euler", "eval.sampler_steps": 9, "eval.guidance": 1, "eval.guidance_from": 0.5}
    changes["eval.t_end"] = 0.6
    first = drawing(base)
    assert drawing(base) == first
    others = [drawing({**base, key: value}) for key, value in changes.items()]
    assert len({first, *others}) == 6
    assert drawing({**base, "eval.guidance": 1, "eval.guidance_from": 0.5}) == others[2]  # 1: none, wherever it begins


@key("eval.temperature", "eval.top_p")
def _():
    said = lambda t, p: {description({"eval.temperature": t, "eval.top_p": p}, seed) for seed in (1, 2, 3)}
    likeliest = said(0, 0.95)
    assert len(likeliest) == 1 and said(1.5, 1e-6) == likeliest
    assert len(said(1.5, 1)) == 3


def checkpoints(sets):
    folder = run({"train.steps": 7, **sets}).folder
    return sorted(int(p.name[5:]) for p in folder.glob("ckpt-*"))


@key("checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every")
def _():
    assert checkpoints({"checkpoint.every": 2, "checkpoint.keep_last": 100}) == [2, 4, 6, 7]
    assert checkpoints({"checkpoint.every": 1, "checkpoint.keep_last": 3}) == [5, 6, 7]
    assert checkpoints({"checkpoint.every": 1, "checkpoint.keep_last": 1, "checkpoint.keep_every": 3}) == [3, 6, 7]


@key("checkpoint.on_error")
def _():  # no file may grow beyond 20 kB: the logs do not, a checkpoint would
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    sets = {"checkpoint.every": 2, "train.steps": 6}
    rows = [
        len(run({**sets, "checkpoint.on_error": s}, rc=1, preexec_fn=small, where=tempfile.mkdtemp(dir=WORK)).rows)
        for s in ("stop", "continue")
    ]
    assert rows[0] < 6 == rows[1], rows


@key("checkpoint.copy")
def _():  # on a slow disk training waits for the writing, or for the copy alone, whose memory is planned
    slow = {**os.environ, "LD_PRELOAD": str(BUILD / "tests/slow_disk.so"), "SLOW_DISK_MB_S": "0.5"}
    for copy, waits in (("never", True), ("always", False), ("auto", False)):
        sets = {"checkpoint.copy": copy, "checkpoint.every": 1, "train.steps": 2}
        log = run(sets, env=slow, where=tempfile.mkdtemp(dir=WORK)).log
        stood, written = re.search(r"step 1: training stood still ([\d.]+) ms, .* after ([\d.]+) s", log).groups()
        assert (float(stood) / 1e3 > float(written) / 2) == waits, log
        assert ("copy for checkpoints" in plan(sets)) != waits
    assert "copy for checkpoints" not in plan({"checkpoint.every": 0})  # nothing is trained after the only save


MEMORY = {"data.micro_batch_tokens": 4096, "data.max_images": 100}  # activations are most of it


@key("memory.policy")
def _():
    kept = planned(MEMORY, "qkv")
    for policy, column in (("recompute", 1), ("offload", 2)):
        sets = {**MEMORY, "memory.policy": policy}
        assert f"policy {policy}" in plan(sets)
        got = planned(sets, "qkv")
        assert got[column] > 0 and got[0] < kept[0] and kept[column] == 0, (policy, got)
    same = [run({"memory.policy": p, "train.steps": 2}).rows[1]["loss"] for p in ("keep", "recompute", "offload")]
    assert len(set(same)) == 1


@key("memory.budget_gb")
def _():  # auto keeps everything where it fits, else chooses, else says what is missing
    total = lambda sets: int(re.search(r"^  total +(\d+)", plan(sets), re.M)[1])
    keep, least = (total({**MEMORY, "memory.policy": p}) for p in ("keep", "recompute"))
    assert least < keep
    budget = lambda b: {**MEMORY, "memory.budget_gb": b / 1e9}
    assert "policy keep" in plan(budget(keep + 1000))
    between = budget((keep + least) / 2)
    assert "policy auto" in plan(between) and least < total(between) <= (keep + least) / 2
    assert "policy auto" in plan(budget(least + 1000))
    r = run(budget(least / 2), rc=None)
    assert r.rc != 0 and "are needed" in r.log and "memory.budget_gb" in r.log, r.log


@key("memory.host_gb")
def _():  # the CPU has no memory beside its own that anything could be offloaded to
    total = lambda sets: re.search(r"^  total +(\d+)", plan(sets), re.M)[1]
    assert total(MEMORY) == total({**MEMORY, "memory.host_gb": 1e-6})


@key("memory.state")
def _():  # the CPU has no memory of its own that anything could leave, which a run says
    plain, moved = (run({"train.steps": 2, "memory.state": s}) for s in ("auto", "gradients"))
    assert "memory.state changes nothing on the cpu" in moved.log and "memory.state" not in plain.log
    assert plain.rows[1]["loss"] == moved.rows[1]["loss"]


@key("memory.per_tensor")
def _():
    sets = {**MEMORY, "memory.per_tensor": {"qkv": "offload", "h1": "recompute"}}
    assert planned(sets, "qkv")[2] > 0 and planned(sets, "h1")[1] > 0 and planned(sets, "expert_pre")[0] > 0
    assert planned(MEMORY, "qkv")[2] == 0


@key("memory.share_gradients")
def _():  # in a step of one micro-batch: less memory, if not by all that gradients take, and the same steps
    rows = lambda s: {name: int(n) for name, n in re.findall(r"^  (\S.*?) +(\d+) bytes", plan({**MEMORY, **s}), re.M)}
    shared, apart = rows({}), rows({"memory.share_gradients": False})
    assert 0 < apart["gradients"] == shared["gradients"] and shared["total"] < apart["total"] - 0.4 * apart["gradients"]
    assert "of the arena, not in the total again" in plan(MEMORY)
    many = {"train.micro_batches": 2}
    assert rows(many)["total"] == rows({**many, "memory.share_gradients": False})["total"]
    same = [run({"memory.share_gradients": v, "train.steps": 3, "train.ema_every": 1, "eval.every": 1}).rows
            for v in (True, False)]
    assert [row["loss"] for row in same[0]] == [row["loss"] for row in same[1]]
    # A dump's norm is of the gradients alone: what lies between those of odd sizes is left of activations.
    odd = {"model.dim": 24, "model.head_dim": 10, "model.cond_dim": 12}
    one, other = (dump({**odd, "memory.share_gradients": v}) for v in (True, False))
    assert one.losses == other.losses
    close(one.losses["grad_norm"], np.sqrt(sum(np.sum(g**2) for g in one.grads.values())))


@key("memory.arena")
def _():  # without an arena no tensor's memory is another's as well
    sets = {**MEMORY, "model.dim": 64, "data.micro_batch_tokens": 8192}
    arena = int(re.search(r"activations \(arena\) +(\d+)", plan(sets))[1])
    one, apart = (while_running({**sets, "memory.arena": v}, memory_of("VmRSS")) for v in (True, False))
    assert arena > 40e6 and one > arena and apart > one + 0.3 * arena, (arena, one, apart)
    same = [run({"memory.arena": v, "train.steps": 2}).rows[1]["loss"] for v in (True, False)]
    assert same[0] == same[1]


@key("kernels.packing")
def _():
    sets = {**WIDE, "data.image_mode": "aspect", "data.max_image_tokens": 32}
    fill = [run({**sets, "kernels.packing": p}).rows[0]["fill"] for p in ("varlen", "padded")]
    assert fill[1] < fill[0] - 0.02, fill


@key("kernels.adaln", "kernels.moe_gemm", "kernels.tiles.text", "kernels.tiles.image", "kernels.streams",
     "kernels.graph", "kernels.pdl", "parallel.collectives")
def _():  # the GPU's; the CPU says that they are
    plain = run()
    for name, value in (("kernels.adaln", "unfused"), ("kernels.moe_gemm", "loop"), ("kernels.tiles.text", "128"),
                        ("kernels.tiles.image", "256"), ("kernels.streams", "single"), ("kernels.graph", False),
                        ("kernels.pdl", False), ("parallel.collectives", "host")):
        r = run({name: value})
        said = name.removesuffix(".text").removesuffix(".image")
        assert re.search(rf"{re.escape(said)}.* changes? nothing on the cpu", r.log), (name, r.log)
        assert r.rows[0]["loss"] == plain.rows[0]["loss"] and "nothing on the cpu" not in plain.log


@key("kernels.update", "kernels.update_share")
def _():  # the same bits, and the metrics of each step
    ways = ("sequential", "overlapped")
    end, head = (run({"train.steps": 5, "kernels.update": way, "kernels.update_share": 7, "train.ema_every": 2}) for way in ways)
    assert [r["loss"] for r in end.rows] == [r["loss"] for r in head.rows]
    for file in ("model", "ema"):
        one, two = end.tensors(file, 5), head.tensors(file, 5)
        assert all((one[n] == two[n]).all() for n in one)


@key("parallel.zero")
def _():  # one process has all of the state; what several have is tests/scripts/ranks.sh's
    losses = {run({"train.steps": 2, "parallel.zero": z}).rows[1]["loss"] for z in (0, 1, 2)}
    assert len(losses) == 1, losses


# ---- beside the keys ----


def check_init():
    """--init: the weights are the checkpoint's (the averaged ones), everything else begins."""
    source = run({"train.steps": 5})
    r = run({"train.lr": 0, "run.seed": 7, "train.steps": 3}, "--init", str(source.folder / "ckpt-5"), "--stop-at", "1")
    used, given = r.tensors("model", 1), (source.tensors("ema", 5), source.tensors("model", 5))
    same = [all((used[n] == g[n]).all() for n in used) for g in given]
    assert same in ([True, False], [False, True]), same
    assert [row["step"] for row in r.rows] == [0]
    # Moments began at zero: after one step they are this step's gradient alone.
    m, v = r.moments(1)
    scale = min(1, 1 / r.rows[0]["grad_norm"])
    close(norm(m), 0.1 * scale * r.rows[0]["grad_norm"])
    close(v.sum(), 0.05 * (scale * r.rows[0]["grad_norm"]) ** 2)
    # From a run without an average, the average begins at the weights.
    bare = run({"train.ema": 0, "train.steps": 2}).folder / "ckpt-2"
    begun = run({"train.lr": 0, "train.steps": 3}, "--init", str(bare), "--stop-at", "1")
    model, ema = begun.tensors("model", 1), begun.tensors("ema", 1)
    assert all((model[n] == ema[n]).all() for n in model)
    state = json.loads((r.folder / "ckpt-1/state.json").read_text())["state"]
    assert state["applied"] == 1 and state["step"] == 1 and state["seed"] == "7"


def check_readme():
    """The arena sizes that README.md states are those of the plan."""
    root = pathlib.Path(__file__).resolve().parents[2]
    text = re.sub(r"\s+", " ", (root / "README.md").read_text())
    said = re.search(
        r"arena of the demo's step at T 1024 is ([0-9.]+) MB with everything kept, "
        r"([0-9.]+) MB with `--memory recompute`, ([0-9.]+) MB with `--memory offload`",
        text,
    )
    assert said, "README.md does not say the demo's arena sizes any more"
    for policy, megabytes in zip(("keep", "recompute", "offload"), said.groups()):
        flags = [TRAIN, "configs/demo.json", "--plan", "--tokens", "1024", "--memory", policy, "--device", "cpu"]
        out = subprocess.run(flags, capture_output=True, text=True, check=True, cwd=root).stdout
        arena = int(re.search(r"activations \(arena\) +(\d+)", out)[1]) / 1e6
        assert f"{arena:.1f}" == megabytes, (policy, arena, megabytes)


def defaults():
    """{key: its default as it is printed}."""
    (WORK / "empty.json").write_text("{}")
    command = [TRAIN, WORK / "empty.json", "--print-config"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[0]: json.loads(line.split(None, 2)[2]) for line in out.splitlines()}


def main():
    wanted = sys.argv[2:]
    os.environ["OMP_NUM_THREADS"] = "1"
    known, failed, began = defaults(), [], time.time()
    make_data()
    rows = {}  # a row may be of several keys
    for name, row in table.items():
        rows.setdefault(row, []).append(name)
    beside = {check_init: ["--init"], check_readme: ["README"]}
    for word in wanted:
        if not any(word in names for names in [*rows.values(), *beside.values()]):
            sys.exit(f"there is no row {word}")
    for row, names in {**rows, **beside}.items():
        if wanted and not set(wanted) & set(names):
            continue
        at = time.time()
        try:
            row()
            for name in names:
                if name in table and all(value == known.get(name) for value in tried.get(name, [])):
                    raise AssertionError(f"{name} is never set to anything but its default, {known.get(name)}")
            print(f"{' '.join(names)}: passed ({time.time() - at:.1f} s)")
        except Exception as error:  # pylint: disable=broad-except
            line = error.__traceback__.tb_next.tb_lineno if error.__traceback__.tb_next else "?"
            failed.append(" ".join(names))
            print(f"{' '.join(names)}: FAILED, line {line}: {type(error).__name__} {error}")
        sys.stdout.flush()
    if not wanted:
        for name in known:
            if name not in table:
                failed.append(name)
                print(f"{name}: FAILED: no row here: say what can be seen of it")
        for name in table:
            if name not in known:
                failed.append(name)
                print(f"{name}: FAILED: there is no such key")
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all have their effect"
    print(f"{len(known)} keys, {time.time() - began:.0f} s: {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        code = main()
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    sys.exit(code)
