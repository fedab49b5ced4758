"""Every op of kernels/kernels.h in PyTorch, float64, written from the contract; gradients by autograd.

Each function op_NAME(case, call) returns what the op should have written as {output: expected}: a tensor, Written where
the op writes only some elements, None where the function has judged the output itself (by asserting)."""
import copy
import math

import numpy as np
import reference as R
import torch
import torch.nn.functional as F

from recorded_call import IMAGE, METRICS, TEXT, Written, added, plus_metrics, vjp


def op_copy(c, r):
    return {"dst": r.i["src"]}


def op_cast(c, r):
    return {"dst": r.i["src"]}


def op_zero(c, r):
    return {"dst": torch.zeros_like(r.out["dst"])}


def op_add(c, r):
    return added(r, dst=r.i["src"])


def op_noise(c, r):
    z = torch.from_numpy(R.patches_noised(c.b, c.seed, int(r.arg["stream"])))
    return {"z": c.put(torch.zeros(c.n_text, c.P, dtype=torch.float64), z)}


def linear_parts(c, r):
    """[(rows of x, rows of y, in, out)] of the weights an extent has, and whether x and y are two-sided."""
    extent = int(r.arg["extent"])
    size = [(int(r.arg[f"in_dim[{m}]"]), int(r.arg[f"out_dim[{m}]"])) for m in (TEXT, IMAGE)]
    if extent == 1:  # EXT_SPLIT
        return [(c.span[m], *size[m]) for m in (TEXT, IMAGE)], True
    return [({0: slice(0, c.n), 2: c.span[IMAGE], 3: slice(1, c.n_segments)}[extent], *size[0])], False


def linear_operand(c, parts, split, flat, side):
    """The rows of x (side 1) or y (side 2) that each weight has to do with."""
    if not split:
        part = parts[0]
        return [flat.view(-1, part[side])[part[0]]]
    return [c.view(flat, m, (1, 1), [part[side] for part in parts]) for m in (TEXT, IMAGE)]


def linear_result(c, parts, split, values, side, like, add=None):
    """The whole buffer from those rows, zeros (or add) elsewhere."""
    if split:
        flat = c.two_sided((1, 1), [part[side] for part in parts], values)
        flat.want[flat.mask] += 0 if add is None else add[flat.mask]
        # Views of equal width are one [T, width] tensor, whose filler rows are zeros.
        return flat.want if parts[0][side] == parts[1][side] else flat
    whole = torch.zeros_like(like).view(-1, parts[0][side])
    whole[parts[0][0]] = values[0]
    if add is not None:
        whole[: c.n] += add.view(whole.shape)[: c.n]
    return whole


def op_linear_fwd(c, r):
    parts, split = linear_parts(c, r)
    x = linear_operand(c, parts, split, r.i["x"], 1)
    y = []
    for m, (_, n_in, n_out) in enumerate(parts):
        w = r.i.get(f"w_{m}", torch.zeros(0)).view(n_out, n_in)
        y.append(x[m] @ w.T + r.i.get("bias", torch.zeros(n_out)) if n_in else torch.zeros(len(x[m]), n_out))
    return {"y": linear_result(c, parts, split, y, 2, r.out["y"])}


def op_linear_dgrad(c, r):
    parts, split = linear_parts(c, r)
    dy = linear_operand(c, parts, split, r.i["dy"], 2)
    dx = []
    for m, (_, n_in, n_out) in enumerate(parts):
        w = r.i.get(f"w_{m}", torch.zeros(0, dtype=torch.float64)).view(n_out, n_in)
        dx += vjp(lambda x: x @ w.T, [torch.zeros(len(dy[m]), n_in, dtype=torch.float64)], [dy[m]])
    return {"dx": linear_result(c, parts, split, dx, 1, r.out["dx"], r.i.get("add"))}


def op_linear_wgrad(c, r):
    parts, split = linear_parts(c, r)
    x, dy = (linear_operand(c, parts, split, r.i[name], side) for name, side in (("x", 1), ("dy", 2)))
    grads = {}
    for m, (_, n_in, n_out) in enumerate(parts):
        zeros = [torch.zeros(n_out, n_in, dtype=torch.float64), torch.zeros(n_out, dtype=torch.float64)]
        grads[f"dw_{m}"], dbias = vjp(lambda w, bias: x[m] @ w.T + bias, zeros, [dy[m]])
        if not split:
            grads["dbias"] = dbias
    return added(r, **grads)


def token(c):
    return torch.from_numpy(c.b["token"][: c.n_text].astype(np.int64))


def caption_mean(c, E):
    """Mean embedding of each segment's caption [SEG, C]; 0 where there is none."""
    mean = [E.new_zeros(c.C)] * c.SEG
    for g in range(1, c.n_segments):
        begin, end = c.b["cap_start"][g], c.b["cap_end"][g]
        if end > begin:
            mean[g] = E[token(c)[begin:end]].mean(0)
    return torch.stack(mean)


def op_embed_fwd(c, r):
    E = r.i["E"].view(c.V, c.C)
    return {"x": c.put(E[token(c)], c.rows(r.i["image_rows"], IMAGE))}


def op_embed_bwd(c, r):
    zeros = torch.zeros(c.V, c.C, dtype=torch.float64)
    f = lambda E: (E[token(c)], caption_mean(c, E))
    # A caption's mean passes its gradient to every token of it: the dmean of a segment without caption goes nowhere.
    return added(r, dE=vjp(f, [zeros], [c.rows(r.i["dx"], TEXT), r.i["dmean"].view(c.SEG, c.C)])[0])


def op_pool_fwd(c, r):
    return {"pooled": R.rms_norm(caption_mean(c, r.i["E"].view(c.V, c.C)))}


def op_pool_bwd(c, r):
    mean = caption_mean(c, r.i["E"].view(c.V, c.C))
    captioned = (mean != 0).any(1, keepdim=True)
    return {"dmean": vjp(R.rms_norm, [mean], [r.i["dpooled"].view(c.SEG, c.C)])[0] * captioned}


def used_segments(c, x):
    """[SEG, width] with row 0 and unused rows set to 0."""
    keep = torch.zeros(c.SEG, 1, dtype=torch.float64)
    keep[1 : c.n_segments] = 1
    return x.view(c.SEG, -1) * keep


def op_time_features(c, r):
    angle = torch.from_numpy(1000.0 * c.b["seg_time"].astype(np.float64)[:, None] * 10000.0 ** (-np.arange(128) / 128))
    return {"features": used_segments(c, torch.cat([angle.cos(), angle.sin()], 1))}


def op_silu_fwd(c, r):
    return {"y": used_segments(c, F.silu(r.i["x"]))}


def op_silu_bwd(c, r):
    return {"dx": used_segments(c, vjp(F.silu, [r.i["x"]], [r.i["dy"]])[0])}


def segment_kind(c):
    return torch.from_numpy(c.b["seg_kind"][1 : c.n_segments].astype(np.int64))


def op_cond_fwd(c, r):
    x = used_segments(c, r.i["time"] + r.i["pool"])
    x[1 : c.n_segments] += r.i["e_kind"].view(2, c.Z)[segment_kind(c)]
    return {"c": x, "a": F.silu(x)}


def op_cond_bwd(c, r):
    dc = used_segments(c, vjp(F.silu, [r.i["c"]], [r.i["da"]])[0])
    by_kind = vjp(lambda e: e[segment_kind(c)], [torch.zeros(2, c.Z, dtype=torch.float64)], [dc[1 : c.n_segments]])
    return {"dc": dc} | added(r, de_kind=by_kind[0])


def op_mod_fwd(c, r):
    S, mod = r.i["S"].view(2, c.M), torch.zeros(c.SEG, c.M, dtype=torch.float64)
    mod[0] = S[TEXT]
    mod[1 : c.n_segments] = S[IMAGE] + r.i["a"].view(c.SEG, c.Z)[1 : c.n_segments] @ r.i["U"].view(c.M, c.Z).T
    return {"mod": mod}


def op_mod_bwd(c, r):
    dmod = r.i["dmod"].view(c.SEG, c.M)
    return added(r, dS=torch.stack([dmod[0], dmod[1 : c.n_segments].sum(0)]))


def adaln_site(c, r, x, branch, mod):
    """xnew and h of the used rows [n, C] (and mean and rstd), from operands of the same rows and mod [SEG, M]."""
    column = lambda name: mod[:, int(r.arg[name]) : int(r.arg[name]) + c.C][c.segment[: c.n]]
    xnew = x if branch is None else x + column("gate") * branch
    mean, var = xnew.mean(1, keepdim=True), xnew.var(1, unbiased=False, keepdim=True)
    rstd = (var + 1e-6).rsqrt()
    h = (1 + column("scale")) * (xnew - mean) * rstd + column("shift")
    if r.arg["silu_image"]:
        h = torch.cat([h[: c.n_text], F.silu(h[c.n_text :])])
    return xnew, h, mean, rstd


def op_adaln_fwd(c, r):
    branch = c.rows(r.i["branch"]) if "branch" in r.i else None
    xnew, h, mean, rstd = adaln_site(c, r, c.rows(r.i["x"]), branch, r.i["mod"].view(c.SEG, c.M))
    out = {"h": c.put(h), "mean": c.put(mean), "rstd": c.put(rstd)}
    return out | ({"xnew": c.put(xnew)} if branch is not None else {})


def op_adaln_bwd(c, r):
    x, mod = c.rows(r.i["x"]), r.i["mod"].view(c.SEG, c.M)
    branch = c.rows(r.i["branch"]) if "branch" in r.i else None
    dh = c.rows(r.i["dh"])
    dxnew = c.rows(r.i["dxnew"]) if "dxnew" in r.i else torch.zeros_like(x)
    if r.arg["x_is_new"]:  # the forward pass ran on x = xnew - gate branch
        gate = mod[:, int(r.arg["gate"]) : int(r.arg["gate"]) + c.C][c.segment[: c.n]]
        x = x - gate * branch
    inputs = [x, mod] + ([] if branch is None else [branch])
    f = lambda x, mod, branch=None: adaln_site(c, r, x, branch, mod)[:2]
    dx, dmod, *dbranch = vjp(f, inputs, [dxnew, dh])
    written = torch.zeros(c.SEG, c.M, dtype=torch.bool)
    for name in ("shift", "scale") + (() if branch is None else ("gate",)):
        written[: c.n_segments, int(r.arg[name]) : int(r.arg[name]) + c.C] = True
    out = {"dx": c.put(dx), "dmod": Written(dmod, written)}
    return out | ({} if branch is None else {"dbranch": c.put(dbranch[0])})


def qk_turned(c, qkv, wq, wk):
    """q [n, H, D], k, v [n, G, D] of the used tokens in sequence order, from qkv in row order."""
    q, k, v = qkv.view(c.n, c.H + 2 * c.G, c.D).split([c.H, c.G, c.G], 1)
    m = c.modality[: c.n]
    q, k = R.rms_norm(q) * wq.view(2, 1, c.D)[m], R.rms_norm(k) * wk.view(2, 1, c.D)[m]
    q, k, v = (x[c.row[: c.n]] for x in (q, k, v))
    j = np.arange(c.D // 2)
    theta = (10000.0 ** (-2 * j / c.D)).astype(np.float32)
    angle = torch.from_numpy(c.b["position"][: c.n, j % 2].astype(np.float32) * theta).double()[:, None]

    def turn(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)

    return turn(q), turn(k), v


def op_qknorm_rope_fwd(c, r):
    q, k, v = qk_turned(c, c.rows(r.i["qkv"]), r.i["wq"], r.i["wk"])
    return {"q": c.put(q.flatten(1)), "k": c.put(k.flatten(1)), "v": c.put(v.flatten(1))}


def op_qknorm_rope_bwd(c, r):
    grads = [c.rows(r.i[name]).unflatten(1, (-1, c.D)) for name in ("dq", "dk", "dv")]
    inputs = [c.rows(r.i["qkv"]), r.i["wq"], r.i["wk"]]
    dqkv, dwq, dwk = vjp(lambda *x: qk_turned(c, *x), inputs, grads)
    return {"dqkv": c.put(dqkv)} | added(r, dwq=dwq, dwk=dwk)


def attend(c, q, k, v):
    """o [n, H D] in row order and lse [H, n] in sequence order, from [n, heads D] in sequence order."""
    q, k, v = (x.flatten(1).unflatten(1, (-1, c.D)).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(c.H // c.G, 0) for x in (k, v))
    at = np.arange(c.n)
    start, end, q_end = (c.b[name][: c.n] for name in ("doc_start", "kv_end", "q_end"))
    allowed = (start[:, None] <= at) & (at < end[:, None]) & (at[:, None] < q_end)
    score = (q @ k.transpose(1, 2) / math.sqrt(c.D)).masked_fill(~torch.from_numpy(allowed), -math.inf)
    o = (score.softmax(2) @ v).transpose(0, 1).flatten(1)
    return o[c.seq[: c.n]], score.logsumexp(2)


def op_attention_fwd(c, r):
    o, lse = attend(c, *(c.rows(r.i[name]) for name in ("q", "k", "v")))
    filler = torch.full((c.H, c.T - c.n), math.inf, dtype=torch.float64)
    return {"o": c.put(o), "lse": torch.cat([lse, filler], 1)}


def op_attention_bwd(c, r):
    inputs = [c.rows(r.i[name]) for name in ("q", "k", "v")]
    grads = vjp(lambda *x: attend(c, *x)[0], inputs, [c.rows(r.i["dout"])])
    return {name: c.put(g) for name, g in zip(("dq", "dk", "dv"), grads)}


def op_attention_rope_bwd(c, r):
    def attended(*x):
        turned = qk_turned(c, *x)
        return attend(c, *turned)[0]

    inputs = [c.rows(r.i["qkv"]), r.i["wq"], r.i["wk"]]
    dqkv, dwq, dwk = vjp(attended, inputs, [c.rows(r.i["dout"])])
    return {"dqkv": c.put(dqkv), "work": None} | added(r, dwq=dwq, dwk=dwk)


def op_router_fwd(c, r):
    """Logits are compared; what was chosen must follow from the op's own logits, exactly."""
    logits, chosen = [], []
    weights = torch.zeros(c.T, c.Kmax, dtype=torch.float64)
    begin, count, slot, source = c.route(r.out["route"].clone())
    want_slot = torch.full_like(slot, -1)
    count_want, begin_want = [], []
    for m in (TEXT, IMAGE):
        logits.append(c.rows(r.i["h"], m) @ r.i[f"wr_{m}"].view(c.E[m], c.C).T)
        own = c.view(r.out["logits"], m, (1, 1), c.E)
        ids = torch.tensor([sorted(range(c.E[m]), key=lambda e: (-row[e], e))[: c.K[m]] for row in own.tolist()])
        if int(r.arg["even"]):
            ids = torch.arange(len(own) * c.K[m]) % c.E[m]
        ids = ids.long().view(len(own), c.K[m])
        full = own.softmax(1).gather(1, ids)
        weights[c.span[m], : c.K[m]] = full if c.K[m] == 1 else own.gather(1, ids).softmax(1)
        at = c.span[m].start * c.K[m]
        for e in range(c.E[m]):
            rows, j = torch.nonzero(ids == e, as_tuple=True)
            begin_want.append(at)
            count_want.append(len(rows))
            rows = rows + c.span[m].start
            want_slot[rows, j] = torch.arange(at, at + len(rows))
            source[m][at : at + len(rows)] = rows * c.Kmax + j
            at += len(rows)
        assert at == c.span[m].stop * c.K[m]
        chosen.append(ids)
    route = torch.cat([torch.tensor(begin_want), torch.tensor(count_want), want_slot.flatten(), *source])
    return {"logits": c.two_sided((1, 1), c.E, logits), "weights": weights, "route": route}


def router_losses(c, r, logits, m):
    """Balance and z loss of one modality, scaled as they enter the total."""
    if len(logits) == 0:
        return logits.sum(), logits.sum()
    count = c.route(r.i["route"])[1][c.E[0] * m :][: c.E[m]]
    fraction = count.double() / (len(logits) * c.K[m])
    balance = c.E[m] * (fraction * logits.softmax(1).mean(0)).sum()
    z = logits.logsumexp(1).square().mean()
    return float(r.arg["balance"]) * c.router_scale * balance, float(r.arg["z"]) * c.router_scale * z


def op_router_loss(c, r):
    parts = [router_losses(c, r, c.view(r.i["logits"], m, (1, 1), c.E), m) for m in (TEXT, IMAGE)]
    balance, z = (sum(float(part[i]) for part in parts) for i in (0, 1))
    return {"metrics": plus_metrics(c, r, balance=balance, z=z, load=c.route(r.i["route"])[1])}


def op_router_bwd(c, r):
    dweights, dh, dwr = r.i["dweights"].view(c.T, c.Kmax), [], {}
    for m in (TEXT, IMAGE):
        rows, j, expert = c.assignments(r.i["route"], m)
        ids = torch.zeros(c.T, c.K[m], dtype=torch.int64)
        ids[rows, j] = expert
        ids = ids[c.span[m]]

        def f(logits):
            w = logits.softmax(1).gather(1, ids) if c.K[m] == 1 else logits.gather(1, ids).softmax(1)
            return (w, *router_losses(c, r, logits, m))

        logits = c.view(r.i["logits"], m, (1, 1), c.E)
        dlogits = vjp(f, [logits], [dweights[c.span[m], : c.K[m]], 1.0, 1.0])[0]
        dh.append(dlogits @ r.i[f"wr_{m}"].view(c.E[m], c.C))
        dwr[f"dwr_{m}"] = dlogits.T @ c.rows(r.i["h"], m)
    dh = c.put(*dh)
    if "add" in r.i:
        dh[: c.n] += c.rows(r.i["add"])
    return {"dh": dh} | added(r, **dwr)


def swiglu(pre):
    """silu(gate) up of rows whose elements alternate gate, up."""
    return F.silu(pre[:, 0::2]) * pre[:, 1::2]


def by_expert(x, weight, expert):
    """Each row of x times the matrix of its expert [E, out, in], transposed."""
    out = x.new_zeros(len(x), weight.shape[1])
    for e in range(len(weight)):
        out = out.index_copy(0, torch.nonzero(expert == e)[:, 0], x[expert == e] @ weight[e].T)
    return out


def expert_weight(c, r, m, name):
    shape = (c.E[m], 2 * c.F[m], c.C) if name == "w1" else (c.E[m], c.C, c.F[m])
    return r.i[f"{name}_{m}"].view(shape)


def two_f(c):
    return tuple(2 * f for f in c.F)


def op_expert_up_fwd(c, r):
    pre = []
    for m in (TEXT, IMAGE):
        rows, _, expert = c.assignments(r.i["route"], m)
        pre.append(by_expert(r.i["h"].view(c.T, c.C)[rows], expert_weight(c, r, m, "w1"), expert))
    return {"pre": c.two_sided(c.K, two_f(c), pre), "a": c.two_sided(c.K, c.F, [swiglu(x) for x in pre])}


def op_expert_down_fwd(c, r):
    y = []
    for m in (TEXT, IMAGE):
        expert = c.assignments(r.i["route"], m)[2]
        y.append(by_expert(c.view(r.i["a"], m, c.K, c.F), expert_weight(c, r, m, "w2"), expert))
    return {"y": c.two_sided(c.K, (c.C, c.C), y)}


def op_expert_combine(c, r):
    out = torch.zeros(c.T, c.C, dtype=torch.float64)
    weights = r.i.get("weights", torch.ones(c.T * c.Kmax, dtype=torch.float64)).view(c.T, c.Kmax)
    for m in (TEXT, IMAGE):
        rows, j, _ = c.assignments(r.i["route"], m)
        out.index_add_(0, rows, weights[rows, j][:, None] * c.view(r.i["y"], m, c.K, (c.C, c.C)))
    if "add" in r.i:
        out[: c.n] += c.rows(r.i["add"])
    return {"out": out}


def op_combine_adaln_fwd(c, r):
    b2 = op_expert_combine(c, r)["out"]
    xnew, h, mean, rstd = adaln_site(c, r, c.rows(r.i["x"]), b2[: c.n], r.i["mod"].view(c.SEG, c.M))
    out = {"xnew": c.put(xnew), "h": c.put(h), "mean": c.put(mean), "rstd": c.put(rstd)}
    return out | ({"b2": b2} if "b2" in r.out else {})


def op_combine_adaln_bwd(c, r):
    sum = copy.copy(r)
    sum.i = {"y": r.i["dslot"], "route": r.i["route"], "add": r.i["add"]}
    site = copy.copy(r)
    site.i = r.i | {"dh": op_expert_combine(c, sum)["out"]}
    return op_adaln_bwd(c, site)


def op_expert_down_bwd(c, r):
    dout, weights = r.i["dout"].view(c.T, c.C), r.i["weights"].view(c.T, c.Kmax)
    dpre, sa, dweights = [], [], torch.zeros(c.T, c.Kmax, dtype=torch.float64)
    for m in (TEXT, IMAGE):
        rows, j, expert = c.assignments(r.i["route"], m)
        w2, pre = expert_weight(c, r, m, "w2"), c.view(r.i["pre"], m, c.K, two_f(c))
        f = lambda pre, w: w[:, None] * by_expert(swiglu(pre), w2, expert)
        one_dpre, dw = vjp(f, [pre, weights[rows, j]], [dout[rows]])
        dpre.append(one_dpre)
        sa.append(weights[rows, j][:, None] * swiglu(pre))
        dweights[rows, j] = dw
    return {"dpre": c.two_sided(c.K, two_f(c), dpre), "sa": c.two_sided(c.K, c.F, sa), "dweights": dweights}


def op_expert_down_wgrad(c, r):
    grads = {}
    for m in (TEXT, IMAGE):
        rows, _, expert = c.assignments(r.i["route"], m)
        f = lambda w2: by_expert(c.view(r.i["sa"], m, c.K, c.F), w2, expert)
        zeros = torch.zeros(c.E[m], c.C, c.F[m], dtype=torch.float64)
        grads[f"dw2_{m}"] = vjp(f, [zeros], [r.i["dout"].view(c.T, c.C)[rows]])[0]
    return added(r, **grads)


def op_expert_up_dgrad(c, r):
    dslot = []
    for m in (TEXT, IMAGE):
        rows, _, expert = c.assignments(r.i["route"], m)
        zeros = torch.zeros(len(rows), c.C, dtype=torch.float64)
        f = lambda x: by_expert(x, expert_weight(c, r, m, "w1"), expert)
        dslot += vjp(f, [zeros], [c.view(r.i["dpre"], m, c.K, two_f(c))])
    return {"dslot": c.two_sided(c.K, (c.C, c.C), dslot)}


def op_expert_up_wgrad(c, r):
    grads = {}
    for m in (TEXT, IMAGE):
        rows, _, expert = c.assignments(r.i["route"], m)
        f = lambda w1: by_expert(r.i["h"].view(c.T, c.C)[rows], w1, expert)
        zeros = torch.zeros(c.E[m], 2 * c.F[m], c.C, dtype=torch.float64)
        grads[f"dw1_{m}"] = vjp(f, [zeros], [c.view(r.i["dpre"], m, c.K, two_f(c))])[0]
    return added(r, **grads)


def shared_parts(c, flat, times):
    return [c.view(flat, m, (1, 1), [times * s for s in c.S]) for m in (TEXT, IMAGE)]


def shared_weight(r, name, m, rows, columns):
    return r.i.get(f"{name}_{m}", torch.zeros(0, dtype=torch.float64)).view(rows, columns)


def op_shared_up_fwd(c, r):
    pre = [c.rows(r.i["h"], m) @ shared_weight(r, "w1", m, 2 * c.S[m], c.C).T for m in (TEXT, IMAGE)]
    two_s = [2 * s for s in c.S]
    return {"pre": c.two_sided((1, 1), two_s, pre), "a": c.two_sided((1, 1), c.S, [swiglu(x) for x in pre])}


def op_shared_down_bwd(c, r):
    pre, dpre = shared_parts(c, r.i["pre"], 2), []
    for m in (TEXT, IMAGE):
        w2 = shared_weight(r, "w2", m, c.C, c.S[m])
        dpre += vjp(lambda pre: swiglu(pre) @ w2.T, [pre[m]], [c.rows(r.i["dout"], m)])
    return {
        "dpre": c.two_sided((1, 1), [2 * s for s in c.S], dpre),
        "a": c.two_sided((1, 1), c.S, [swiglu(x) for x in pre]),
    }


def targets(c):
    """Rows with a target, the targets, their kinds."""
    target = c.b["target"][: c.n_text].astype(np.int64)
    rows = np.flatnonzero(target >= 0)
    return torch.from_numpy(rows), torch.from_numpy(target[rows]), c.b["target_kind"][rows]


def op_head_ce(c, r):
    rows, target, kind = targets(c)
    h, wout = r.i["h"].view(c.T, c.C), r.i["wout"].view(c.V, c.C)
    f = lambda h, w: F.cross_entropy(h[rows] @ w.T, target, reduction="none")
    nll = f(h, wout)
    whole = torch.zeros(c.T, dtype=torch.float64)
    whole[rows] = nll
    sums = {}
    for k in (0, 1):
        of_kind = torch.from_numpy(kind == k)
        sums |= {f"nll{k}": nll[of_kind].sum(), f"targets{k}": of_kind.sum()}
    out = {"nll": whole, "metrics": plus_metrics(c, r, **sums), "work": None}
    if "dh" in r.out:
        dh, dwout = vjp(f, [h, wout], [torch.full_like(nll, c.ce_scale)])
        out |= {"dh": dh} | added(r, dwout=dwout)
    return out


def op_head_logits(c, r):
    rows = targets(c)[0]
    logits = torch.zeros(c.T, c.V, dtype=torch.float64)
    logits[: len(rows)] = r.i["h"].view(c.T, c.C)[rows] @ r.i["wout"].view(c.V, c.C).T
    written = torch.zeros(c.T, c.V, dtype=torch.bool)
    written[: len(rows)] = True
    return {"logits": Written(logits, written, or_zero=True)}


def op_flow_loss(c, r):
    clean = torch.from_numpy(R.patches_clean(c.b))
    segment = c.segment[c.n_text : c.n]
    noised = torch.from_numpy(c.b["seg_kind"].astype(np.int64))[segment] == R.NOISED
    time = torch.from_numpy(c.b["seg_time"].astype(np.float64))[segment]
    weight = noised / (1 - time).clamp(min=float(r.arg["t_floor"])).square()
    f = lambda x: (weight[:, None] * (x - clean).square()).sum()
    xhat = c.rows(r.i["xhat"], IMAGE)
    error = torch.zeros(c.SEG, dtype=torch.float64)
    for g in segment[noised].unique():
        error[g] = (xhat - clean)[segment == g].square().mean()
    out = {"seg_error": error}
    out["metrics"] = plus_metrics(c, r, flow=f(xhat), flow_elems=noised.sum() * c.P)
    if "dxhat" in r.out:
        dx = vjp(f, [xhat], [c.flow_scale])[0]
        out["dxhat"] = c.put(torch.zeros(c.n_text, c.P, dtype=torch.float64), dx)
    return out


SCALARS = ("lr", "beta1", "beta2", "eps", "weight_decay", "clip", "bias1", "bias2", "ema_decay", "norm_limit",
           "step")


def scalars(r):
    return dict(zip(SCALARS, r.i["scalars"].tolist()))


def status(raw):
    """(norm, scale, skip, bad) of an UpdateStatus."""
    raw = raw.numpy().astype(np.uint8).tobytes()
    return (*np.frombuffer(raw[:16], np.float64), *np.frombuffer(raw[16:24], np.int32))


def spans(r):
    """[(slice, decays)] of the parameters."""
    arguments = [value for name, value in r.arg.items() if name.startswith("span")]
    return [(slice(int(at), int(at + count)), bool(decay)) for at, count, decay in arguments]


WORDS, WORD_BITS, WORD_LOW = 27, 24, -300


def exact_values(words):
    """What exact sums stand for, one a row; the last word counts what is not finite."""
    return [
        math.inf if row[-1] else sum(math.ldexp(x, WORD_LOW + WORD_BITS * i) for i, x in enumerate(row[:-1]))
        for row in words.reshape(-1, WORDS).tolist()
    ]


def op_grad_squares(c, r):
    for (at, _), got in zip(spans(r), exact_values(r.out["squares"])):
        want = float(r.i["grads"][at].square().sum())
        assert got == want or abs(got - want) < 1e-6 * want, f"sum of squares {got}, expected {want}"
    return {"squares": None}


def op_grad_decide(c, r):
    sums = exact_values(r.i["squares"])
    norm, scale, skip, bad = status(r.out["status"])
    broken = [i for i, v in enumerate(sums) if not math.isfinite(v)]
    lost = not all(math.isfinite(v) for v in r.i["metrics"][: len(METRICS)])
    want_bad = len(sums) if lost else broken[0] if broken else -1
    limit = scalars(r)["norm_limit"]
    beyond = limit > 0 and math.sqrt(sum(sums)) > limit
    assert (skip != 0, bad) == (want_bad >= 0 or beyond, want_bad), f"skip {skip}, bad {bad}, expected bad {want_bad}"
    if not broken:
        want, clip = math.sqrt(sum(sums)), scalars(r)["clip"]
        assert abs(norm / want - 1) < 1e-6, f"norm {norm}, expected {want}"
        assert lost or abs(scale / (min(1, clip / want) if clip else 1) - 1) < 1e-6, f"scale {scale}"
    return {"status": None}


def op_grad_hash(c, r):
    grads = r.i["grads"].numpy().astype(np.float32)  # what dump_ops computes in, so the bits are the same
    got = np.frombuffer(r.out["hash"].numpy().astype(np.uint8).tobytes(), np.uint64)
    with np.errstate(over="ignore"):
        for p, (at, _) in enumerate(spans(r)):
            bits = np.ascontiguousarray(grads[at]).view(np.uint32).astype(np.uint64)
            z = bits + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, len(bits) + 1, dtype=np.uint64)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            want = (z ^ (z >> np.uint64(31))).sum(dtype=np.uint64)
            assert got[p] == want, f"hash of parameter {p}: {got[p]:016x}, expected {want:016x}"
    return {"hash": None}


def op_adamw(c, r):
    s, (_, scale, skip, _) = scalars(r), status(r.i["status"])
    want = {name: r.before[name].clone() for name in ("weights", "m", "v", "ema") if name in r.before}
    for at, decays in [] if skip else spans(r):
        g, w = scale * r.i["grads"][at], want["weights"][at]
        m = s["beta1"] * want["m"][at] + (1 - s["beta1"]) * g
        v = s["beta2"] * want["v"][at] + (1 - s["beta2"]) * g.square()
        step = m / s["bias1"] / ((v / s["bias2"]).sqrt() + s["eps"]) + s["weight_decay"] * decays * w
        want["weights"][at], want["m"][at], want["v"][at] = w - s["lr"] * step, m, v
        if "ema" in want:
            want["ema"][at] += (1 - s["ema_decay"]) * (want["weights"][at] - want["ema"][at])
    return want
