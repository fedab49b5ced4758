"""Tessera's model as PyTorch trains it fastest: what scripts/compare_torch.py compares whole steps with, and
tests/gpu/bench_gpu.py layers.

It is the model of tests/ops/reference.py, formula for formula (tests/gpu/test_peer.py compares the two), written for
speed: torch.compile on the block that all layers share, on the input and on the heads; FlexAttention over the packed
sequence with its block mask; torch._grouped_mm for experts, rows sorted on the device; no host synchronisation, no
padding, so that a whole step can be captured as one CUDA graph. Text and image rows are kept as two tensors, so that
each modality's projections are plain products and an image's modulation is a broadcast; gradients of permutations are
written as gathers.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/ops"))
import reference as R
from reference import EPS, IMAGE, MODALITY, NOISED, TEXT

# ---- moving rows: every gradient is a gather ------------------------------------------------------------------------


class ToSequence(torch.autograd.Function):
    """Rows of text [n_text, W] and image [n_image, W] -> [T, W] in sequence order."""

    @staticmethod
    def forward(ctx, text, image, row, seq):
        ctx.save_for_backward(seq)
        ctx.n_text = text.shape[0]
        return torch.cat([text, image]).index_select(0, row)

    @staticmethod
    def backward(ctx, grad):
        (seq,) = ctx.saved_tensors
        return grad.index_select(0, seq[: ctx.n_text]), grad.index_select(0, seq[ctx.n_text :]), None, None


class ToRows(torch.autograd.Function):
    """The way back: [T, W] in sequence order -> text [n_text, W], image [n_image, W]."""

    @staticmethod
    def forward(ctx, x, row, seq, n_text):
        ctx.save_for_backward(row)
        return x.index_select(0, seq[:n_text]), x.index_select(0, seq[n_text:])

    @staticmethod
    def backward(ctx, text, image):
        (row,) = ctx.saved_tensors
        return torch.cat([text, image]).index_select(0, row), None, None, None


class Dispatch(torch.autograd.Function):
    """h [R, C] -> the rows of its assignments sorted by expert [R k, C]. slot [R, k]: where assignment (r, j) goes;
    source [R k]: the reverse, r k + j."""

    @staticmethod
    def forward(ctx, h, slot, source):
        ctx.save_for_backward(slot)
        return h.index_select(0, source // slot.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (slot,) = ctx.saved_tensors
        return grad.index_select(0, slot.flatten()).view(*slot.shape, -1).sum(1), None, None


class Collect(torch.autograd.Function):
    """out[r] = sum_j weight[r, j] y[slot[r, j]]: y [R k, C], weight [R, k] -> [R, C]."""

    @staticmethod
    def forward(ctx, y, weight, slot, source):
        ctx.save_for_backward(y, weight, slot, source)
        return (y.index_select(0, slot.flatten()).view(*slot.shape, -1) * weight[:, :, None]).sum(1).to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        y, weight, slot, source = ctx.saved_tensors
        dy = grad.index_select(0, source // slot.shape[1]) * weight.flatten().index_select(0, source)[:, None]
        picked = y.index_select(0, slot.flatten()).view(*slot.shape, -1)
        dweight = (picked.to(weight.dtype) * grad[:, None].to(weight.dtype)).sum(2)
        return dy.to(y.dtype), dweight, None, None


class Grouped(torch.autograd.Function):
    """Rows x [R, K], sorted by group and ending at ends [E] (int32), each group through its w [E, N, K] -> [R, N]."""

    @staticmethod
    def forward(ctx, x, w, ends):
        ctx.save_for_backward(x, w, ends)
        return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, grad):
        x, w, ends = ctx.saved_tensors
        grad = grad.contiguous()
        return torch._grouped_mm(grad, w, offs=ends), torch._grouped_mm(grad.t(), x, offs=ends), None


def grouped_mm(x, w, ends):
    return Grouped.apply(x, w, ends)


def grouped_loop(x, w, ends):
    """grouped_mm where there is no torch._grouped_mm: on the CPU."""
    begins = [0, *ends.tolist()[:-1]]
    return torch.cat([x[b:e] @ m.T for b, e, m in zip(begins, ends.tolist(), w)])


# ---- a pack on the device -------------------------------------------------------------------------------------------


class Pack:
    """A pack's arrays (kernels/batch.h, as long as its used slots) as tensors; floats in `dtype`. Images: I of S
    patches each. Noised images end their documents, so that two conditions make the mask."""

    def __init__(self, a, s, dtype, device):
        self.n_text, self.n_image, segments = (int(v) for v in a["dims"][:3])
        self.images = segments - 1
        put = lambda values, kind: torch.as_tensor(np.ascontiguousarray(values)).to(device, kind)
        long = torch.int64
        noised = a["seg_kind"][1:] == NOISED  # [I]
        time = a["seg_time"][1:].astype(np.float64)
        S = self.n_image // self.images
        angle = 1000 * time[:, None] * np.power(10000.0, -np.arange(128) / 128)
        text_row = np.arange(self.n_text)
        member = (text_row >= a["cap_start"][1:, None]) & (text_row < a["cap_end"][1:, None])  # [I, n_text]
        j = np.arange(s.D // 2)
        turn = a["position"][:, j % 2].astype(np.float32) * np.power(10000.0, -2 * j / s.D).astype(np.float32)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        self.tensors = dict(
            row=put(a["row"], long), seq=put(a["seq"], long), token=put(a["token"][: self.n_text], long),
            target=put(a["target"][: self.n_text], long),  # [n_text], -1: none
            doc_start=put(a["doc_start"], torch.int32), kv_end=put(a["kv_end"], torch.int32),  # [T] sequence order
            in_image=put(a["seq"].argsort()[:, None] >= self.n_text, torch.bool),  # [T, 1] sequence order
            cos=put(np.cos(turn.astype(np.float64)), real), sin=put(np.sin(turn.astype(np.float64)), real),  # [T, D/2]
            kind=put(a["seg_kind"][1:], long),  # [I]
            time_features=put(np.concatenate([np.cos(angle), np.sin(angle)], 1), dtype),  # [I, 256]
            pool=put(member / np.maximum(member.sum(1), 1)[:, None], dtype),  # [I, n_text]
            has_caption=put(member.any(1)[:, None], torch.bool),  # [I, 1]
            time=put(time.reshape(-1, 1, 1), real),  # [I, 1, 1]
            flow_weight=put((noised / np.maximum(1 - time, s.t_floor) ** 2 / max(noised.sum() * S * s.P, 1))
                            .reshape(-1, 1, 1), real),  # [I, 1, 1]; 0: clean
            patch=put(a["patch"].reshape(self.images, S, s.P), torch.uint8),
        )  # fmt: skip
        self.targets = int((a["target"][: self.n_text] >= 0).sum())
        self.__dict__.update(self.tensors)


# ---- the model ------------------------------------------------------------------------------------------------------


def params_from_reference(p, s):
    """The peer's parameters from reference.py's {name: tensor}: {"ends": {..}, "layers": [{..}]}."""
    M = 6 * s.C
    ends = {name: p[name] for name in p if not name.startswith(("layers.", "mod."))}
    ends |= {"mod.base": p["mod.base"][:, M * s.L :], "mod.weight": p["mod.weight"][M * s.L :]}
    layers = []
    for layer in range(s.L):
        at = f"layers.{layer}."
        own = {name[len(at) :]: p[name] for name in p if name.startswith(at)}
        for name in own:
            if name.endswith("w1"):
                own[name] = R.gates_first(own[name])  # gates first
        own["mod.base"] = p["mod.base"][:, M * layer : M * (layer + 1)]
        own["mod.weight"] = p["mod.weight"][M * layer : M * (layer + 1)]
        layers.append(own)
    return {"ends": ends, "layers": layers}


def real(x):
    """In the type that statistics and losses are formed in."""
    return x if x.dtype == torch.float64 else x.float()


def residual_norm(x, branch, gate, shift, scale):
    """x + gate branch, and its modulated LayerNorm."""
    x = x + gate * branch
    return x, (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift


def modulations(p, a, parts):
    """The columns of a site's (or layer's) modulation: text [C] each, image [I, 1, C] each."""
    image = p["mod.base"][IMAGE] + a @ p["mod.weight"].t()
    return p["mod.base"][TEXT].chunk(parts), image[:, None].chunk(parts, dim=2)


def projections(p, name):
    """Each modality's matrix, or the one that both share."""
    return [p[f"{name}.{m}.weight" if f"{name}.{m}.weight" in p else f"{name}.weight"].t() for m in MODALITY]


def attention(p, text, image, pack, s, attend):
    """text [n_text, C], image [I, S, C] -> the same, of attention over the whole pack."""
    (qkv_text, qkv_image), (out_text, out_image) = projections(p, "attn.qkv"), projections(p, "attn.out")
    qkv = ToSequence.apply(text @ qkv_text, image.flatten(0, 1) @ qkv_image, pack.row, pack.seq)
    q, k, v = qkv.view(-1, s.H + 2 * s.G, s.D).split([s.H, s.G, s.G], dim=1)  # [T, heads, D]
    turned = []
    for x, name in ((q, "attn.q_norm"), (k, "attn.k_norm")):
        weight = torch.where(pack.in_image, p[name][IMAGE], p[name][TEXT])[:, None]  # [T, 1, D]
        y = real(x)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * weight
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)  # [T, heads, D/2]
        cos, sin = pack.cos[:, None], pack.sin[:, None]
        turned.append(torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype))
    o = attend(*(x.transpose(0, 1)[None] for x in (*turned, v)))  # [1, H, T, D]
    text, o_image = ToRows.apply(o[0].transpose(0, 1).flatten(1), pack.row, pack.seq, pack.n_text)
    return text @ out_text, (o_image @ out_image).view(image.shape)


def swiglu(pre):
    """[R, 2F], gates first -> [R, F]."""
    gate, up = pre.chunk(2, dim=1)
    return F.silu(gate) * up


def moe(p, at, h, k, grouped):
    """h [R, C] -> out [R, C], and the router's balance and z terms. Experts are found by k rounds of argmax and slots
    by a running count, which the compiler makes few kernels of; a sort would take more."""
    logits = real(h @ p[at + "router.weight"].t())  # [R, E]
    E = logits.shape[1]
    left, chosen = logits.detach(), []
    for _ in range(k):
        chosen.append(torch.arange(E, device=h.device) == left.argmax(1)[:, None])  # [R, E]; ties: the lower index
        left = left.masked_fill(chosen[-1], -math.inf)
    probability = logits.softmax(1)
    picked = torch.stack([(logits if k > 1 else probability).mul(c).sum(1) for c in chosen], 1)  # [R, k]
    weight = picked.softmax(1) if k > 1 else picked

    member = torch.stack(chosen).sum(0)  # [R, E]
    rank = member.t().contiguous().cumsum(1)  # [E, R]
    count = rank[:, -1]
    ends = count.cumsum(0)  # [E]
    place = (rank + (ends - count - 1)[:, None]).t()  # [R, E]
    slot = torch.stack([(place * c).sum(1) for c in chosen], 1)  # [R, k]
    numbers = torch.arange(slot.numel(), device=h.device)
    source = torch.empty_like(numbers).scatter(0, slot.flatten(), numbers)  # [R k]

    rows, ends = Dispatch.apply(h, slot, source), ends.int()
    y = grouped(swiglu(grouped(rows, p[at + "experts.w1"], ends)), p[at + "experts.w2"], ends)
    out = Collect.apply(y, weight, slot, source)
    if at + "shared.w1" in p:
        out = out + swiglu(h @ p[at + "shared.w1"].t()) @ p[at + "shared.w2"].t()
    balance = E * (count.to(logits.dtype) / slot.numel() * probability.mean(0)).sum()
    return out, balance, logits.logsumexp(1).square().mean()


def block(p, x, branch, gate, a, pack, s, attend, grouped):
    """One layer. x, branch, gate: pairs (text [n_text, C], image [I, S, C]; gates [C], [I, 1, C]) whose x + gate branch
    is the layer's input: residual and norm meet in one kernel that way. a [I, Z]. Returns the same triple for the next
    layer, and the router's terms."""
    text, image = modulations(p, a, 6)
    pairs = [residual_norm(x[m], branch[m], gate[m], c[0], c[1]) for m, c in enumerate((text, image))]
    b = attention(p, pairs[0][1], pairs[1][1], pack, s, attend)
    pairs = [residual_norm(pairs[m][0], b[m], c[2], c[3], c[4]) for m, c in enumerate((text, image))]
    out, balance, z = [], 0.0, 0.0
    for m, name in enumerate(MODALITY):
        y, e, zz = moe(p, name + ".", pairs[m][1].flatten(0, -2), s.k[m], grouped)
        out.append(y.view(pairs[m][1].shape))
        balance, z = balance + e, z + zz
    # Copies: layer 0's gates are no views either, and one compiled block serves all layers.
    gates = (text[5].clone(), image[5].clone(memory_format=torch.contiguous_format))
    return (pairs[0][0], pairs[1][0]), tuple(out), gates, balance, z


def bottom(p, noised, pack, s):
    """The first layer's x, branch (nothing) and gate, and a [I, Z]. noised [I, S, P]."""
    hidden = F.silu(pack.time_features @ p["cond.time1.weight"].t() + p["cond.time1.bias"])
    c = hidden @ p["cond.time2.weight"].t() + p["cond.time2.bias"] + p["cond.kind"][pack.kind]
    text = F.embedding(pack.token, p["embed.weight"])  # [n_text, C]
    mean = real(pack.pool @ text)  # [I, C]
    pooled = mean * torch.rsqrt(mean.square().mean(-1, keepdim=True) + EPS)
    pooled = torch.where(pack.has_caption, pooled, torch.zeros_like(pooled)).to(text.dtype)
    a = F.silu(c + pooled @ p["cond.pool.weight"].t())
    z = noised @ p["patch.down.weight"].t() if s.bottleneck else noised
    image = z @ p["patch.in.weight"].t() + p["patch.in.bias"]
    x = (text, image)
    return x, (text * 0, image * 0), (text[0] * 0, image[:, :1] * 0), a


def top(p, x, branch, gate, a, pack, s):
    """Cross-entropy (mean over targets) and flow loss."""
    text, image = modulations(p, a, 2)
    _, h_text = residual_norm(x[0], branch[0], gate[0], *text)
    _, h_image = residual_norm(x[1], branch[1], gate[1], *image)
    logits = real(h_text @ p["embed.weight" if s.tied else "head.weight"].t())  # [n_text, V]
    ce = F.cross_entropy(logits, pack.target, ignore_index=-1, reduction="sum") / pack.targets
    predicted = F.silu(h_image) @ p["image_head.weight"].t() + p["image_head.bias"]  # [I, S, P]
    clean = pack.patch.to(pack.time.dtype) / 127.5 - 1
    return ce, (pack.flow_weight * (real(predicted) - clean).square()).sum()


def noise(pack):
    """z = t x + (1 - t) eps; clean images have t = 1. [I, S, P]"""
    x = pack.patch.to(pack.time.dtype) / 127.5 - 1
    return pack.time * x + (1 - pack.time) * torch.randn_like(x)


def forward(parts, params, noised, pack, s):
    """The losses ce, flow, balance, z (router terms before their coefficients: means over layers)."""
    x, branch, gate, a = parts["bottom"](params["ends"], noised)
    balance = z = 0.0
    for p in params["layers"]:
        x, branch, gate, b, zz = parts["block"](p, x, branch, gate, a)
        balance, z = balance + b / s.L, z + zz / s.L
    ce, flow = parts["top"](params["ends"], x, branch, gate, a)
    return ce, flow, balance, z


def total_loss(losses, s):
    ce, flow, balance, z = losses
    return s.ce_weight * ce + flow + s.balance * balance + s.z * z


# ---- attention ------------------------------------------------------------------------------------------------------


def attend_dense(pack, allowed, s):
    """Any device, any torch: on the CPU. allowed [T, T] bool."""

    def attend(q, k, v):
        k, v = (x.repeat_interleave(s.H // s.G, 1) for x in (k, v))
        scores = (q @ k.transpose(2, 3)) / math.sqrt(s.D)
        return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v

    return attend


def block_mask(doc_start, kv_end):
    """FlexAttention's mask of a pack in which noised images end their documents: key k is allowed to query q iff
    doc_start[q] <= k < kv_end[q]."""
    from torch.nn.attention.flex_attention import create_block_mask

    T = len(doc_start)
    allowed = lambda batch, head, q, k: (doc_start[q] <= k) & (k < kv_end[q])
    return create_block_mask(allowed, None, None, T, T, device=doc_start.device)


def attend_flex(mask, s, backend=None):
    """backend: FlexAttention's own, "FLASH" where flash_attn.cute is installed; None: its kernels in Triton."""
    from torch.nn.attention.flex_attention import flex_attention

    options = {"BACKEND": backend} if backend else None
    return lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=s.H != s.G, kernel_options=options)
