#!/usr/bin/python3
"""Checks tests/ops/reference.py against itself: a model written token by token, finite differences, independence of
packing, nothing leaking backwards; and parity_model.py on dumps made here, sound and damaged."""
import contextlib
import io
import json
import math
import os
import sys
import tempfile
import traceback

try:
    import numpy as np
    import torch
    import parity_model
    import reference as R
except ImportError as error:
    print(f"skipped: {error} (Debian: apt install python3-torch, and run with /usr/bin/python3)")
    sys.exit(77)

SEED = 1234


# ---- random documents and their packing ---------------------------------------------------------------------------
# A document is a list of segments: ("text", ids) or ("image", kind, (h, w), t, pixels u8 [h w, P]).


def random_image(rng, s, kind):
    h, w = rng.integers(1, 5, 2)
    t = rng.choice([rng.uniform(0.05, 0.9), 0.98]) if kind == R.NOISED else 1.0
    return ("image", kind, (int(h), int(w)), float(np.float32(t)), rng.integers(0, 256, (h * w, s.P), dtype=np.uint8))


def random_document(rng, s, kind):
    bos, eos, boi, eoi = s.V - 4, s.V - 3, s.V - 2, s.V - 1
    words = lambda low=1: list(rng.integers(0, s.V - 4, rng.integers(low, 8)))
    image = lambda which: random_image(rng, s, which)
    text = lambda *ids: ("text", [int(i) for part in ids for i in (part if isinstance(part, list) else [part])])
    if kind == "text":
        return [text(bos, words(), eos)]
    if kind == "one token":
        return [text(bos)]
    if kind == "image only":
        return [image(R.NOISED)]
    if kind == "caption to image":
        return [text(bos, words(), boi), image(R.NOISED)]
    if kind == "unconditional":
        return [text(bos, boi), image(R.NOISED)]
    if kind == "image to caption":
        return [text(bos, boi), image(R.CLEAN), text(eoi, words(), eos)]
    first, second = text(bos, words(), boi), text(eoi, words(), boi)
    return [first, image(R.NOISED), text(boi), image(R.CLEAN), second, image(R.NOISED), text(eoi, words(), eos)]


KINDS = ("text", "one token", "image only", "caption to image", "unconditional", "image to caption", "several images")


def pack_documents(documents, s, filler=0):
    """The arrays of kernels/batch.h for documents [(draw, document)], as a dump has them."""
    boi, eoi = s.V - 2, s.V - 1
    slots, segments = [], [dict(kind=0, start=0, len=0, ordinal=0, doc=0, time=0.0, cap=(0, 0))]
    patches = []
    for draw, document in documents:
        begin, position, n_text, ordinal, seen = len(slots), 0, 0, 0, False
        caption = []  # slots of the text since the last image or special token
        for segment in document:
            if segment[0] == "text":
                for token in segment[1]:
                    slots.append(dict(m=R.TEXT, token=token, pos=(position,) * 2, segment=0, seen=seen))
                    slots[-1].update(kv_end=len(slots), q_start=len(slots) - 1)
                    caption = [] if token in (s.V - 4, eoi) else caption + [len(slots) - 1] if token != boi else caption
                    position += 1
                continue
            _, kind, (h, w), t, pixels = segment
            start, end, g, noised = len(slots), len(slots) + h * w, len(segments), kind == R.NOISED
            for i in range(h * w):
                place = (position + i // w, position + i % w)
                slots.append(dict(m=R.IMAGE, token=-1, pos=place, segment=g, kv_end=end, q_start=start, noised=noised))
            segments.append(dict(kind=kind, slot=start, len=h * w, ordinal=ordinal if noised else 0, doc=draw, time=t))
            segments[-1]["cap"] = caption if noised else []
            ordinal += noised
            patches.append(pixels)
            position, caption, seen = position + max(h, w), [], seen or not noised
        for q in range(begin, len(slots)):
            slot, after = slots[q], slots[q + 1] if q + 1 < len(slots) else None
            text_next = slot["m"] == R.TEXT and after is not None and after["m"] == R.TEXT
            slot["target"] = after["token"] if text_next and after["token"] != eoi and slot["token"] != boi else -1
            slot["doc_start"] = begin
            slot["q_end"] = slot["kv_end"] if slot.get("noised") else len(slots)

    n, T = len(slots), len(slots) + filler
    seq = [q for m in (R.TEXT, R.IMAGE) for q in range(n) if slots[q]["m"] == m] + list(range(n, T))
    row = np.argsort(seq)
    empty = dict(token=-1, target=-1, segment=0, pos=(0, 0))
    by_row = lambda key: np.array([slots[q].get(key, 0) if q < n else empty.get(key, 0) for q in seq], np.int32)
    by_seq = lambda key: np.array([slots[q][key] if q < n else q for q in range(T)], np.int32)
    column = lambda key, dtype=np.int32: np.array([g[key] for g in segments], dtype)
    a = dict(
        row=row.astype(np.int32), seq=np.array(seq, np.int32), token=by_row("token"), target=by_row("target"),
        segment=by_row("segment"), target_kind=by_row("seen"),
        position=np.array([slots[q]["pos"] if q < n else (0, 0) for q in range(T)], np.int32).reshape(T, 2),
        doc_start=by_seq("doc_start"), kv_end=by_seq("kv_end"), q_start=by_seq("q_start"), q_end=by_seq("q_end"),
        pool_segment=np.zeros(T, np.int32), seg_kind=column("kind"), seg_len=column("len"),
        seg_ordinal=column("ordinal"), seg_doc=column("doc", np.int64), seg_time=column("time", np.float32),
    )  # fmt: skip
    a["seg_start"] = np.array([0] + [row[g["slot"]] for g in segments[1:]], np.int32)
    a["cap_start"] = np.array([row[g["cap"][0]] if g["cap"] else 0 for g in segments], np.int32)
    a["cap_end"] = np.array([row[g["cap"][-1]] + 1 if g["cap"] else 0 for g in segments], np.int32)
    for g in range(1, len(segments)):
        a["pool_segment"][a["cap_start"][g] : a["cap_end"][g]] = g
    n_text = sum(slot["m"] == R.TEXT for slot in slots)
    a["seg_len"][0] = n_text
    ids = len(np.unique(a["token"][:n_text]))
    a["dims"] = np.array([n_text, n - n_text, len(segments), (a["target"] >= 0).sum(), ids], np.int32)
    a["patch"] = np.concatenate(patches) if patches else np.zeros((0, s.P), np.uint8)
    a["clean"] = R.patches_clean(a).astype(np.float32)
    a["noised"] = R.patches_noised(a, SEED).astype(np.float32)
    return a


def random_sizes(rng, **fixed):
    E = tuple(int(e) for e in rng.integers(1, 6, 2))
    G, odd = int(rng.integers(1, 3)), lambda low, high: int(rng.integers(low, high))
    sizes = dict(
        C=odd(5, 20), L=odd(1, 4), H=G * odd(1, 4), G=G, D=2 * odd(1, 5), Z=odd(3, 9), V=odd(12, 30),
        P=3 * odd(1, 3) ** 2, bottleneck=int(rng.choice([0, 5])), E=E, F=(odd(1, 9), odd(1, 9)),
        S=tuple(int(v) for v in rng.choice([0, 3], 2)), k=tuple(odd(1, min(e, 4) + 1) for e in E),
        per_modality=bool(rng.integers(2)), tied=bool(rng.integers(2)), ce_weight=0.7,
    )  # fmt: skip
    return R.Sizes(**(sizes | fixed))


def random_params(rng, s, dtype=torch.float64):
    """Every parameter random, those that start at zero included, and scaled so that signals stay of order one."""
    p = {}
    for name, shape in R.param_shapes(s).items():
        std = 0.5 if len(shape) == 1 or name in ("mod.base", "cond.kind") else shape[-1] ** -0.5
        mean = 1.0 if name.endswith("_norm") else 0.0
        p[name] = torch.tensor(mean + std * rng.standard_normal(shape), dtype=dtype, requires_grad=True)
    return p


def random_documents(rng, s, count, kinds=KINDS):
    return [(int(rng.integers(1 << 40)), random_document(rng, s, kinds[i % len(kinds)])) for i in range(count)]


# ---- the model once more, token by token --------------------------------------------------------------------------


def naive_document(p, draw, document, s):
    """One document by the book, with a Python loop over tokens. Returns nll [targets], predicted patches [noised
    tokens, P] and for each layer and modality a list of router logits, in document order."""
    rms = lambda x: x / (x.square().mean() + 1e-6).sqrt()
    silu = lambda x: x / (1 + torch.exp(-x))
    bos, boi, eoi = s.V - 4, s.V - 2, s.V - 1
    tokens, position, ordinal, caption = [], 0, 0, []
    C, M = s.C, 6 * s.C * s.L + 2 * s.C
    for segment in document:
        if segment[0] == "text":
            for token in segment[1]:
                x = p["embed.weight"][token]
                tokens.append(dict(m=0, token=token, x=x, pos=(position, position), image=None, mod=p["mod.base"][0]))
                position += 1
                if token in (bos, eoi):
                    caption = []
                elif token != boi:
                    caption.append(x)
            continue
        _, kind, (h, w), t, pixels = segment
        clean = pixels.astype(np.float64) / 127.5 - 1
        z = clean
        if kind == R.NOISED:
            eps = R.philox_normals(SEED, draw, 3 | ordinal << 8, h * w * s.P).reshape(-1, s.P)
            z = t * clean + (1 - t) * eps
            ordinal += 1
        angle = torch.tensor([1000 * t * 10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        features = torch.cat([angle.cos(), angle.sin()])
        c = p["cond.time2.weight"] @ silu(p["cond.time1.weight"] @ features + p["cond.time1.bias"])
        c = c + p["cond.time2.bias"] + p["cond.kind"][kind]
        if kind == R.NOISED and caption:
            c = c + p["cond.pool.weight"] @ rms(sum(caption) / len(caption))
        mod = p["mod.base"][1] + p["mod.weight"] @ silu(c)
        for i in range(h * w):
            zi = torch.tensor(z[i].astype(np.float32), dtype=torch.float64)
            if s.bottleneck:
                zi = p["patch.down.weight"] @ zi
            place = (position + i // w, position + i % w)
            x = p["patch.in.weight"] @ zi + p["patch.in.bias"]
            tokens.append(dict(m=1, x=x, pos=place, image=id(segment), noised=kind == R.NOISED, mod=mod))
        position, caption = position + max(h, w), []

    def norm(x, shift, scale):
        centred = x - x.mean()
        return (1 + scale) * centred / (centred.square().mean() + 1e-6).sqrt() + shift

    def sees(q, k):
        if tokens[q]["image"] is not None and tokens[q]["image"] == tokens[k]["image"]:
            return True
        return k <= q and not tokens[k].get("noised")

    def turned(x, pos):
        out = [None] * s.D
        for j in range(s.D // 2):
            angle = float(np.float32(pos[j % 2]) * np.float32(10000 ** (-2 * j / s.D)))
            a, b = x[2 * j], x[2 * j + 1]
            out[2 * j] = a * math.cos(angle) - b * math.sin(angle)
            out[2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
        return torch.stack(out)

    def mlp(h, w1, w2):
        u = w1 @ h
        return w2 @ (silu(u[0::2]) * u[1::2])

    router = [[[], []] for _ in range(s.L)]
    for layer in range(s.L):
        at = f"layers.{layer}."
        for token in tokens:
            m, part = token["m"], R.MODALITY[token["m"]] + "." if s.per_modality else ""
            mod = token["mod"][6 * C * layer : 6 * C * (layer + 1)].view(6, C)
            qkv = p[f"{at}attn.qkv.{part}weight"] @ norm(token["x"], mod[0], mod[1])
            heads = qkv.view(-1, s.D)
            token["q"] = [turned(rms(heads[i]) * p[at + "attn.q_norm"][m], token["pos"]) for i in range(s.H)]
            token["k"] = [turned(rms(heads[s.H + i]) * p[at + "attn.k_norm"][m], token["pos"]) for i in range(s.G)]
            token["v"] = [heads[s.H + s.G + i] for i in range(s.G)]
        for q, token in enumerate(tokens):
            m, part = token["m"], R.MODALITY[token["m"]] + "." if s.per_modality else ""
            mod = token["mod"][6 * C * layer : 6 * C * (layer + 1)].view(6, C)
            keys = [k for k in range(len(tokens)) if sees(q, k)]
            o = []
            for head in range(s.H):
                g = head // (s.H // s.G)
                score = torch.stack([token["q"][head] @ tokens[k]["k"][g] / math.sqrt(s.D) for k in keys])
                weight = torch.exp(score - score.max())
                o.append(sum(w * tokens[k]["v"][g] for w, k in zip(weight / weight.sum(), keys)))
            x = token["x"] + mod[2] * (p[f"{at}attn.out.{part}weight"] @ torch.cat(o))
            h, name = norm(x, mod[3], mod[4]), f"{at}{R.MODALITY[m]}."
            logits = p[name + "router.weight"] @ h
            router[layer][m].append(logits)
            full = torch.exp(logits) / torch.exp(logits).sum()
            chosen = sorted(range(s.E[m]), key=lambda e: (-logits[e].item(), e))[: s.k[m]]
            norm_over = 1.0 if s.k[m] == 1 else sum(full[e] for e in chosen)
            y = sum(full[e] / norm_over * mlp(h, p[name + "experts.w1"][e], p[name + "experts.w2"][e]) for e in chosen)
            if s.S[m]:
                y = y + mlp(h, p[name + "shared.w1"], p[name + "shared.w2"])
            token["next"] = x + mod[5] * y
        for token in tokens:
            token["x"] = token["next"]

    nll, predicted = [], []
    for q, token in enumerate(tokens):
        shift, scale = token["mod"][M - 2 * C : M - C], token["mod"][M - C :]
        h = norm(token["x"], shift, scale)
        if token["m"] == 1 and token["noised"]:
            predicted.append(p["image_head.weight"] @ silu(h) + p["image_head.bias"])
        after = tokens[q + 1] if q + 1 < len(tokens) else None
        if token["m"] == 0 and token["token"] != boi and after and after["m"] == 0 and after["token"] != eoi:
            logits = (p["embed.weight"] if s.tied else p["head.weight"]) @ h
            nll.append(torch.log(torch.exp(logits).sum()) - logits[after["token"]])
    return nll, predicted, router


def same(got, want, tolerance=1e-9):
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    assert got.shape == want.shape, f"{tuple(got.shape)} against {tuple(want.shape)}"
    error = float((got - want).detach().norm() / want.detach().norm().clamp(min=1e-30)) if want.numel() else 0.0
    assert error < tolerance, f"relative error {error:.2e}"


# ---- tests --------------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    # From the kat_vectors file of Random123: counter, key, result.
    pi = (0x85A308D3 << 32 | 0x243F6A88, 0x13198A2E, 0x03707344, 0x299F31D0 << 32 | 0xA4093822)
    ones = (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**64 - 1)
    for (draw, stream, block, seed), want in (
        ((0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ones, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        got = R.philox4x32(seed, draw, stream, [block])[0]
        assert " ".join(f"{v:08x}" for v in got) == want
    normals = R.philox_normals(7, 11, R.STREAM_NOISE, 40001)
    assert len(normals) == 40001 and abs(normals.mean()) < 0.02 and abs(normals.std() - 1) < 0.02
    same(R.philox_normals(7, 11, R.STREAM_NOISE, 5), normals[:5])


def test_matches_model_written_token_by_token():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        s = random_sizes(rng, **({"k": (1, 1)} if seed == 0 else {"E": (5, 4), "k": (4, 3)} if seed == 1 else {}))
        p = random_params(rng, s)
        documents = random_documents(rng, s, 7)
        pack = R.Pack(pack_documents(documents, s, filler=int(rng.integers(5))), torch.float64)
        out = R.forward(p, pack, s)
        nll, predicted, router = [], [], [[[], []] for _ in range(s.L)]
        for draw, document in documents:
            one_nll, one_predicted, one_router = naive_document(p, draw, document, s)
            nll, predicted = nll + one_nll, predicted + one_predicted
            for layer in range(s.L):
                for m in range(2):
                    router[layer][m] += one_router[layer][m]
        same(out.nll, torch.stack(nll))
        same(out.x, torch.stack(predicted))
        balance = z = 0
        for layer in range(s.L):
            for m in range(2):
                logits = torch.stack(router[layer][m])
                mean = (logits.exp() / logits.exp().sum(1, keepdim=True)).mean(0)
                ids = logits.argsort(1, descending=True)[:, : s.k[m]]
                fraction = torch.stack([(ids == e).double().mean() for e in range(s.E[m])])
                balance = balance + s.E[m] * (fraction * mean).sum() / s.L
                z = z + logits.exp().sum(1).log().square().mean() / s.L
        same(out.balance, balance)
        same(out.z, z)
        # gradients of a random combination of everything
        a, b = torch.randn_like(out.nll), torch.randn_like(out.x)
        names = list(p)
        want = torch.autograd.grad(
            (a * torch.stack(nll)).sum() + (b * torch.stack(predicted)).sum() + 0.3 * balance + 0.2 * z,
            [p[name] for name in names],
            allow_unused=True,
        )
        loss = (a * out.nll).sum() + (b * out.x).sum() + 0.3 * out.balance + 0.2 * out.z
        got = torch.autograd.grad(loss, [p[name] for name in names], allow_unused=True)
        for name, g, w in zip(names, got, want):
            zero = torch.zeros_like(p[name])
            g, w = zero if g is None else g, zero if w is None else w
            # Where the true gradient is zero (a lone expert's router, weight 1 whatever it says) only rounding is left.
            assert (g - w).norm() < 1e-8 * max(w.norm(), 1e-4), f"seed {seed}: gradient of {name}"


def test_finite_differences():
    rng = np.random.default_rng(5)
    s = random_sizes(rng, E=(3, 2), k=(2, 1), bottleneck=5, S=(3, 0), tied=False)
    p = random_params(rng, s)
    packs = [R.Pack(pack_documents(random_documents(rng, s, 7), s), torch.float64) for _ in range(2)]
    losses, outputs = R.step(p, packs, s)
    assert min(out.margin for out in outputs) > 1e-4, "this seed has a choice of expert too close for differences"
    parts = s.ce_weight * losses["ce"] + losses["flow"] + losses["balance"] + losses["z"]
    assert abs(losses["total"] - parts) < 1e-12
    weight = [[sum(int((k.target_kind == kind).sum()) for k in packs)] for kind in (0, 1)]
    mean = (weight[0][0] * losses["ce_text"] + weight[1][0] * losses["ce_caption"]) / losses["targets"]
    assert abs(losses["ce"] - mean) < 1e-12
    for name, value in p.items():
        direction, h, sides = torch.randn_like(value), 1e-5, []
        for sign in (1, -1):
            moved = {other: v.detach().clone() for other, v in p.items()}
            moved[name] += sign * h * direction
            for v in moved.values():
                v.requires_grad_()
            sides.append(R.step(moved, packs, s)[0]["total"])
        want, got = (sides[0] - sides[1]) / (2 * h), float((direction * value.grad).sum())
        scale = max(abs(want), float(direction.norm() * value.grad.norm()) / math.sqrt(value.numel()))
        assert abs(got - want) < 2e-5 * scale + 1e-10, f"{name}: {got} against {want}"


def test_packing_changes_nothing():
    for seed in range(4):
        rng = np.random.default_rng(100 + seed)
        s = random_sizes(rng)
        p = random_params(rng, s)
        documents = random_documents(rng, s, 9)
        together = R.forward(p, R.Pack(pack_documents(documents, s, filler=3), torch.float64), s)
        alone = [R.forward(p, R.Pack(pack_documents([one], s), torch.float64), s) for one in documents]
        same(together.nll, torch.cat([out.nll for out in alone]))
        same(together.x, torch.cat([out.x for out in alone]))


def test_nothing_leaks_backwards():
    """Changing any token after an image changes no bit of its rows (all experts chosen, so that the groups of rows
    multiplied together stay the same)."""
    for seed in range(4):
        rng = np.random.default_rng(200 + seed)
        s = random_sizes(rng, E=(3, 2), k=(3, 2))
        p = random_params(rng, s)
        kind = "several images" if seed % 2 else "image to caption"
        document = random_document(rng, s, kind)
        images = [i for i, segment in enumerate(document) if segment[0] == "image"]
        last = images[0] if seed < 2 else images[-1]
        other = list(document)
        for i in range(last + 1, len(document)):
            if document[i][0] == "text":
                other[i] = ("text", [(token + 1) % (s.V - 4) if token < s.V - 4 else token for token in document[i][1]])
        a, b = (R.Pack(pack_documents([(9, d)], s), torch.float64) for d in (document, other))
        assert not torch.equal(a.token, b.token)
        last_row = int(a.n_text + a.image_kind.numel() and torch.nonzero(a.segment == images.index(last) + 1)[-1])
        rows = [R.modulation(p, pack, s)[1 : images.index(last) + 2] for pack in (a, b)]
        assert torch.equal(*rows)
        kept = int((a.noised_row <= last_row).sum())
        x, y = R.forward(p, a, s), R.forward(p, b, s)
        assert torch.equal(x.x[:kept], y.x[:kept])
        assert not torch.equal(x.nll, y.nll)
        if kind == "several images":
            assert kept > 0


def test_noised_images_are_hidden_from_later_tokens():
    rng = np.random.default_rng(300)
    s = random_sizes(rng, E=(2, 2), k=(2, 2))
    p = random_params(rng, s)
    document = random_document(rng, s, "several images")
    hidden = list(document)
    _, kind, size, t, pixels = document[1]
    hidden[1] = ("image", kind, size, t, 255 - pixels)
    seen = list(document)
    _, kind, size, t, pixels = document[3]
    seen[3] = ("image", kind, size, t, 255 - pixels)
    a, b, c = (R.forward(p, R.Pack(pack_documents([(9, d)], s), torch.float64), s) for d in (document, hidden, seen))
    assert torch.equal(a.nll, b.nll) and not torch.equal(a.nll, c.nll)
    first = document[1][2][0] * document[1][2][1]
    assert not torch.equal(a.x[:first], b.x[:first]) and torch.equal(a.x[first:], b.x[first:])
    assert torch.equal(a.x[:first], c.x[:first]) and not torch.equal(a.x[first:], c.x[first:])


def test_one_modality_or_no_target():
    for kinds in (("text",), ("image only",), ("one token",), ("unconditional",)):
        rng = np.random.default_rng(400)
        s = random_sizes(rng)
        p = random_params(rng, s)
        losses, _ = R.step(p, [R.Pack(pack_documents(random_documents(rng, s, 3, kinds), s), torch.float64)], s)
        assert all(math.isfinite(v) for v in losses.values())
        assert (losses["ce"] == 0) == (kinds[0] in ("image only", "one token"))
        assert (losses["flow"] == 0) == (kinds[0] in ("text", "one token"))


def make_dump(folder, rng, s, kinds=KINDS, count=14, micro_batches=2):
    """A dump as the engine would write it, from the reference in float32."""
    p = random_params(rng, s, torch.float32)
    arrays = [pack_documents(random_documents(rng, s, count, kinds), s, filler=2) for _ in range(micro_batches)]
    losses, _ = R.step(p, [R.Pack(a, torch.float32) for a in arrays], s)
    grads = {name: (torch.zeros_like(v) if v.grad is None else v.grad).numpy() for name, v in p.items()}
    losses["grad_norm"] = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values())))
    R.safetensors_write(f"{folder}/params.safetensors", {name: v.detach().numpy() for name, v in p.items()})
    for i, a in enumerate(arrays):
        R.safetensors_write(f"{folder}/micro_{i}.safetensors", a)
    part = lambda m: {"experts": s.E[m], "expert_dim": s.F[m], "shared_dim": s.S[m], "top_k": s.k[m]}
    model = {
        "dim": s.C, "layers": s.L, "heads": s.H, "kv_heads": s.G, "head_dim": s.D, "cond_dim": s.Z,
        "patch": math.isqrt(s.P // 3), "patch_bottleneck": s.bottleneck, "vocab": s.V,
        "attn_per_modality": s.per_modality, "tie_embeddings": s.tied, "text": part(0), "image": part(1),
    }  # fmt: skip
    router, flow = {"balance": s.balance, "z": s.z}, {"t_floor": s.t_floor}
    config = {"run": {"seed": SEED}, "model": model, "train": {"ce_weight": s.ce_weight}, "flow": flow}
    config["router"] = router
    json.dump(config, open(f"{folder}/config.json", "w"))
    return grads, losses


def verdict(folder, grads, losses):
    R.safetensors_write(f"{folder}/grads.safetensors", grads)
    json.dump(losses, open(f"{folder}/losses.json", "w"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = parity_model.main([folder, "--limit", "5e-5"])  # PyTorch's fp32 is 1.1e-5 off on some CPUs
    return code, out.getvalue()


def test_parity_model_judges_dumps():
    for seed in range(2):
        rng = np.random.default_rng(500 + seed)
        s = random_sizes(rng, E=(4, 3), k=(2, 1), tied=seed == 1, bottleneck=5 * (seed == 0), S=(3, 0), P=12)
        with tempfile.TemporaryDirectory() as folder:
            grads, losses = make_dump(folder, rng, s)
            code, text = verdict(folder, grads, losses)
            assert code == 0, text
            for name in rng.permutation(list(grads))[:4]:
                at = np.unravel_index(np.abs(grads[name]).argmax(), grads[name].shape)
                wrong = grads[name].copy()
                wrong[at] *= 1.1 + math.sqrt(wrong.size) * 1e-4
                code, text = verdict(folder, grads | {name: wrong}, losses)
                assert code == 1 and name in text, f"{name} off by a tenth in one place passed:\n{text}"
            for key in losses:
                code, text = verdict(folder, grads, losses | {key: losses[key] * 1.01 + 1e-3})
                assert code == 1 and key in text, f"a wrong {key} passed"
            name = "mod.weight"
            code, _ = verdict(folder, {n: g for n, g in grads.items() if n != name}, losses)
            assert code == 1, "a missing gradient passed"

            micro = R.safetensors_read(f"{folder}/micro_0.safetensors")
            noised = micro["noised"].copy()
            noised[-1, -1] += 1e-4
            R.safetensors_write(f"{folder}/micro_0.safetensors", micro | {"noised": noised})
            code, text = verdict(folder, grads, losses)
            assert code == 1 and "noised" in text, "wrong noise passed"


def test_parity_model_wants_every_gradient_reached():
    # Text alone explains the zero gradients of everything about images; a switched-off gate explains nothing.
    rng = np.random.default_rng(600)
    s = random_sizes(rng, E=(3, 3), k=(2, 2), S=(0, 0), bottleneck=0)
    with tempfile.TemporaryDirectory() as folder:
        grads, losses = make_dump(folder, rng, s, kinds=("text",))
        code, text = verdict(folder, grads, losses)
        assert code == 0, text
        grads, losses = make_dump(folder, rng, s)
        params = {n: v.copy() for n, v in R.safetensors_read(f"{folder}/params.safetensors").items()}
        params["mod.weight"][:] = 0
        params["mod.base"][:] = 0
        R.safetensors_write(f"{folder}/params.safetensors", params)
        p = {n: torch.from_numpy(v).requires_grad_() for n, v in params.items()}
        packs = [R.Pack(R.safetensors_read(f"{folder}/micro_{i}.safetensors"), torch.float32) for i in range(2)]
        losses = R.step(p, packs, s)[0] | {"grad_norm": 0.0}
        grads = {n: (torch.zeros_like(v) if v.grad is None else v.grad).numpy() for n, v in p.items()}
        losses["grad_norm"] = float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values())))
        code, text = verdict(folder, grads, losses)
        assert code == 1 and "zero" in text and "experts.w1" in text, text


def main():
    torch.set_num_threads(1)  # these tensors are tiny
    torch.manual_seed(1)
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    failed = 0
    for name, test in tests:
        print(f"[ RUN      ] {name}", flush=True)
        try:
            test()
            print(f"[       OK ] {name}")
        except Exception:
            traceback.print_exc(file=sys.stdout)
            print(f"[  FAILED  ] {name}")
            failed += 1
    print(f"[  PASSED  ] {len(tests) - failed} test(s).")
    if failed:
        print(f"[  FAILED  ] {failed} test(s)")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
