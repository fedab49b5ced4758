"""What a call of an op was given and wrote, as dump_ops recorded it, and what all of the ops' twins need.

Every output is compared with an expected tensor, or with Written where the op writes only some elements."""
import numpy as np
import torch

TEXT, IMAGE = 0, 1
METRICS = ("nll0", "nll1", "targets0", "targets1", "flow", "flow_elems", "balance", "z")  # then load [L, E0 + E1]


class Case:
    """Sizes and pack of a case, under the contract's names. Row ranges: text [0, n_text), image [n_text, n)."""

    def __init__(self, tensors):
        numbers = {name: v for name, v in tensors.items() if name.startswith("dims/")}
        for name, v in numbers.items():
            setattr(self, name.split("/")[1], int(v[0]))
        for name in "EFKS":
            setattr(self, name, tuple(int(tensors[f"dims/{name}[{m}]"][0]) for m in (TEXT, IMAGE)))
        self.Kmax = max(self.K)
        self.SEG = self.segments
        self.b = {name.split("/")[1]: v for name, v in tensors.items() if name.startswith("batch/")}
        self.b["position"] = self.b["position"].reshape(self.T, 2)
        self.b["patch"] = self.b["patch"].reshape(-1, self.P)
        self.n_text, self.n_image, self.n_segments, self.n_target, _ = (int(v) for v in self.b["dims"])
        self.n = self.n_text + self.n_image
        self.span = (slice(0, self.n_text), slice(self.n_text, self.n))
        self.row = torch.from_numpy(self.b["row"].astype(np.int64))
        self.seq = torch.from_numpy(self.b["seq"].astype(np.int64))
        self.segment = torch.from_numpy(self.b["segment"].astype(np.int64))
        self.modality = (torch.arange(self.T) >= self.n_text).long()  # of used rows
        for scale in ("ce_scale", "flow_scale", "router_scale"):
            setattr(self, scale, float(self.b[scale][0]))
        self.seed = int(self.b["seed_lo"][0]) | int(self.b["seed_hi"][0]) << 32

    def rows(self, x, m=None):
        """[rows, width] of the used tokens, or of one modality's."""
        return x.view(self.T, -1)[slice(0, self.n) if m is None else self.span[m]]

    def put(self, *parts):
        """Text rows, image rows -> [T, width] with zeros behind."""
        used = torch.cat(parts)
        return torch.cat([used, used.new_zeros(self.T - len(used), used.shape[1])])

    def view(self, flat, m, repeat, width):
        """A modality's part of a two-sided buffer, [used rows repeat, width], sharing its memory."""
        size = self.T * repeat[m] * width[m]
        whole = flat[:size] if m == TEXT else flat[len(flat) - size :]
        used = self.span[m]
        return whole.view(self.T * repeat[m], width[m])[used.start * repeat[m] : used.stop * repeat[m]]

    def two_sided(self, repeat, width, parts):
        """A buffer from its two parts, and the mask of what they fill. What lies between holds zeros or is left alone
        in a buffer of one row a token, and is left alone in one of assignments."""
        flat = torch.zeros(self.T * max(r * w for r, w in zip(repeat, width)), dtype=torch.float64)
        written = torch.zeros(len(flat), dtype=torch.bool)
        for m in (TEXT, IMAGE):
            self.view(flat, m, repeat, width)[:] = parts[m]
            self.view(written, m, repeat, width)[:] = True
        return Written(flat, written, or_zero=tuple(repeat) == (1, 1))

    def route(self, flat):
        """A Route: (begin, count [E0 + E1], slot [T, Kmax], source of each modality [T K])."""
        groups, sizes = sum(self.E), [self.T * self.Kmax, self.T * self.K[0], self.T * self.K[1]]
        begin, count, slot, *source = flat.long().split([groups, groups, *sizes])
        return begin, count, slot.view(self.T, self.Kmax), source

    def assignments(self, flat, m):
        """Per used slot of a modality: its row, its place j among the row's choices, its expert; in slot order."""
        begin, count, _, source = self.route(flat)
        used = slice(self.span[m].start * self.K[m], self.span[m].stop * self.K[m])
        source = source[m][used]
        first = self.E[0] * m
        expert = torch.repeat_interleave(torch.arange(self.E[m]), count[first : first + self.E[m]])
        return torch.div(source, self.Kmax, rounding_mode="floor"), source % self.Kmax, expert


class Written:
    """An expected output of which the op writes only some elements; the others it leaves alone, or_zero."""

    def __init__(self, want, mask, or_zero=False):
        self.want, self.mask, self.or_zero = want, mask, or_zero


class Call:
    """One call: i inputs, out outputs, before accumulating outputs as they were, arg numbers. Floats as float64."""

    def __init__(self, parts):
        self.i, self.out, self.before, self.arg = ({} for _ in range(4))
        for (kind, name), v in parts.items():
            if kind == "arg":
                self.arg[name] = v[0] if v.size == 1 else v
                continue
            v = torch.from_numpy(v.astype(np.float64) if v.dtype.kind == "f" else v.astype(np.int64))
            {"in": self.i, "out": self.out, "before": self.before}[kind][name] = v


def vjp(f, inputs, grads):
    """Gradients of sum <f(inputs)[i], grads[i]> for every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((y * g).sum() for y, g in zip(out, grads))
    got = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, got)]


def added(r, **outputs):
    """Accumulating outputs: with what was there before where the call said so."""
    accumulate = r.arg["accumulate"] != 0
    return {name: v.flatten() + r.before[name] if accumulate else v for name, v in outputs.items() if name in r.out}


def plus_metrics(c, r, **sums):
    load = sums.pop("load", None)
    total = r.before["metrics"].clone()
    for name, v in sums.items():
        total[METRICS.index(name)] += float(v)
    if load is not None:
        at = len(METRICS) + int(r.arg["layer"]) * sum(c.E)
        total[at : at + sum(c.E)] += load
    return total
