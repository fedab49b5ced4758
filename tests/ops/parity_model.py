#!/usr/bin/python3
"""Rebuilds dumped training steps in float64 and compares their losses and every gradient.

    ./train configs/demo.json --dump DIR && /usr/bin/python3 tests/ops/parity_model.py DIR
    dump_model DIR && /usr/bin/python3 tests/ops/parity_model.py DIR/model_*

The dump must have every parameter randomised: at initialisation almost every gradient is zero. A gradient passes when
the norm of its difference is at most `limit` of the larger norm. A gradient that is zero although the batch reaches the
parameter fails. Exit code 0: all equal, 1: not, 77: no PyTorch."""
import argparse
import glob
import json
import sys

try:
    import numpy as np
    import torch
    import reference as R
except ImportError as error:
    print(f"skipped: {error} (Debian: apt install python3-torch, and run with /usr/bin/python3)")
    sys.exit(77)

NOISE_LIMIT = 1e-6  # of patches, relative where they are larger than 1
TIME_LIMIT = 1e-6
LOSS_LIMIT = 1e-6  # relative
ROUTER = 5  # times the limit: a router's gradient is a difference of nearly equal terms


def check_patches(k, a, seed, problems):
    """The dump's clean and noised patches against pixels, times and Philox alone."""
    for name, want in (("clean", R.patches_clean(a)), ("noised", R.patches_noised(a, seed))):
        if a[name].shape != want.shape:
            problems.append(f"micro_{k}: {name} has shape {a[name].shape}, expected {want.shape}")
        elif want.size:
            error = (np.abs(a[name] - want) / np.maximum(1, np.abs(want))).max()
            print(f"micro_{k}: {name:6} patches, largest error {error:.1e}")
            if not error <= NOISE_LIMIT:
                problems.append(f"micro_{k}: {name} differs by {error:.1e} (limit {NOISE_LIMIT:.0e})")


def check_times(k, a, config, problems):
    """The dump's flow times against Philox and the config alone."""
    want = R.flow_times(a, config["run"]["seed"], config["flow"])
    error = np.abs(a["seg_time"][1 : len(want) + 1] - want).max(initial=0)
    print(f"micro_{k}: flow times, largest error {error:.1e}")
    if not error <= TIME_LIMIT:
        problems.append(f"micro_{k}: flow times differ by {error:.1e} (limit {TIME_LIMIT:.0e})")


def rows_with_influence(pack, last_layer):
    """Rows of the pack whose block output in this layer reaches a loss other than the router's: those with a loss of
    their own and, below the last layer, those that such a row attends to. [n] bool, row order."""
    loss = torch.zeros(pack.n, dtype=torch.bool)
    loss[pack.target_row] = True
    loss[pack.noised_row] = True
    if last_layer:
        return loss
    reach = loss.clone()
    for rows, bias in pack.groups:  # the repeated rows past a document's end are its first, which sees what that sees
        asks = loss[rows][:, :, None] & (bias[:, 0] == 0)  # [docs, query, key]
        reach[rows[asks.any(1)]] = True
    return reach


def expected_reach(packs, outputs, s):
    """{(name, index or None): True} for every part of a parameter whose gradient can not be zero, given the batch: an
    expert that a row with influence chose, a modality's row of a norm or of the modulation, and so on."""
    reach = {}
    influence = [[rows_with_influence(k, layer == s.L - 1) for layer in range(s.L)] for k in packs]
    present = [any(count(k) > 0 for k in packs) for count in (lambda k: k.n_text, lambda k: k.n_image)]
    image = lambda kind: any(bool((k.image_kind == kind).any()) for k in packs)
    moved = any(bool(flags[0][k.n_text :].any()) for k, flags in zip(packs, influence))  # images that matter
    targets = any(len(k.target) > 0 for k in packs)
    captions = any(bool((k.caption[:, 1] > k.caption[:, 0]).any()) for k in packs)
    for name in R.param_shapes(s):
        part = name.split(".")
        if name == "embed.weight":
            reach[name, None] = present[R.TEXT]
        elif name == "head.weight":
            reach[name, None] = targets
        elif part[0] in ("patch", "mod") and name != "mod.base" or part[:2] in (["cond", "time1"], ["cond", "time2"]):
            reach[name, None] = moved
        elif part[0] == "image_head":
            reach[name, None] = image(R.NOISED)
        elif name == "cond.pool.weight":
            reach[name, None] = captions
        elif name == "cond.kind":
            reach[name, R.NOISED] = image(R.NOISED)
            reach[name, R.CLEAN] = image(R.CLEAN) and (targets or s.balance + s.z > 0) and moved
        elif name == "mod.base":
            reach |= {(name, m): present[m] for m in (R.TEXT, R.IMAGE)}
        elif part[2] == "attn":
            # A query or key matters only where some row with influence chooses between keys.
            layer, several = int(part[1]), [False, False]
            for k, flags in zip(packs, influence):
                for rows, bias in k.groups:
                    choice = ((bias[:, 0] == 0).sum(2) > 1) & flags[layer][rows]  # [docs, query]
                    for m in (R.TEXT, R.IMAGE):
                        several[m] |= bool((choice & ((rows >= k.n_text) == bool(m))).any())
            if part[3].endswith("_norm"):
                reach |= {(name, m): several[m] for m in (R.TEXT, R.IMAGE)}
            elif s.per_modality:
                reach[name, None] = several[R.MODALITY.index(part[4])]
            else:
                reach[name, None] = any(several)
        else:
            layer, m = int(part[1]), R.MODALITY.index(part[2])
            span = lambda k: slice(0, k.n_text) if m == R.TEXT else slice(k.n_text, k.n)
            if part[3] == "experts":
                for e in range(s.E[m]):
                    reach[name, e] = any(
                        out.routes[layer][m] is not None
                        and bool(((out.routes[layer][m] == e).any(1) & flags[layer][span(k)]).any())
                        for k, out, flags in zip(packs, outputs, influence)
                    )
            elif part[3] == "shared":
                reach[name, None] = any(bool(flags[layer][span(k)].any()) for k, flags in zip(packs, influence))
            else:  # a router of one expert has nothing to choose, but its z loss pulls
                reach[name, None] = present[m] and (s.z > 0 or s.E[m] > 1)
    return reach


def compare_losses(got, want, limit, problems):
    print(f"\n{'loss':14} {'dump':>14} {'reference':>14} {'error':>9}")
    for name, value in want.items():
        if name not in got:
            problems.append(f"losses.json has no {name}")
            continue
        if got[name] is None and value == 0 and name in ("ce_caption", "ce_text", "ce", "flow"):
            print(f"{name:14} {'not measured':>14} {'nothing':>14}")
            continue
        if not isinstance(got[name], (int, float)):
            problems.append(f"{name} is {json.dumps(got[name])}, expected {value:.8g}")
            continue
        error = abs(got[name] - value) / max(abs(value), 1e-6)
        print(f"{name:14} {got[name]:14.8g} {value:14.8g} {error:9.1e}")
        if not error <= limit:
            problems.append(f"{name} is {got[name]:.8g}, expected {value:.8g}")


def compare_gradients(got, want, reach, limit, show, problems):
    table = []
    for name, g in want.items():
        if name not in got or got[name].shape != g.shape:
            problems.append(f"gradient of {name} is missing or not of shape {g.shape}")
            continue
        scale = max(np.linalg.norm(g), np.linalg.norm(got[name].astype(np.float64)))
        error = np.linalg.norm(got[name] - g) / scale if scale else 0.0
        table.append((error if np.isfinite(error) else np.inf, name, scale))
        allowed = limit * (ROUTER if name.endswith("router.weight") else 1)
        if not error <= allowed:
            problems.append(f"gradient of {name} differs by {error:.1e} (limit {allowed:.0e})")
    problems += [f"gradient of {name}, which the model does not have" for name in got if name not in want]
    for (name, part), expected in reach.items():
        at = ... if part is None else part
        where = name if part is None else f"{name}[{part}]"
        for who, grads in (("dump", got), ("reference", want)):
            if expected and name in grads and grads[name].shape == want[name].shape and not grads[name][at].any():
                problems.append(f"gradient of {where} is zero in the {who} although the batch reaches it")
    print(f"\n{'worst gradients':40} {'norm':>10} {'error':>9}")
    for error, name, scale in sorted(table, reverse=True)[:show]:
        print(f"{name:40} {scale:10.3e} {error:9.1e}")
    print(f"{len(table)} gradients compared")


def compare_dump(folder, limit, show, times=False):
    """Everything in one dump; returns what is wrong with it. `times`: those of its images too, which it may have made
    up."""
    problems = []
    config = json.load(open(f"{folder}/config.json"))
    losses = json.load(open(f"{folder}/losses.json"))
    s = R.sizes_from_config(config)
    params = R.safetensors_read(f"{folder}/params.safetensors")
    shapes = R.param_shapes(s)
    if {name: v.shape for name, v in params.items()} != shapes:
        got = {name: params[name].shape if name in params else "absent" for name in sorted(set(shapes) | set(params))}
        want = {name: shapes.get(name, "absent") for name in got}
        return [f"parameter {name} is {got[name]}, expected {want[name]}" for name in got if got[name] != want[name]]
    p = {name: torch.from_numpy(v.astype(np.float64)).requires_grad_() for name, v in params.items()}

    packs = []
    for k in range(len(glob.glob(f"{glob.escape(folder)}/micro_*.safetensors"))):
        a = R.safetensors_read(f"{folder}/micro_{k}.safetensors")
        check_patches(k, a, config["run"]["seed"], problems)
        if times:
            check_times(k, a, config, problems)
        packs.append(R.Pack(a, torch.float64))
    want, outputs = R.step(p, packs, s)
    grads = {name: (torch.zeros_like(v) if v.grad is None else v.grad).numpy() for name, v in p.items()}
    want["grad_norm"] = float(np.sqrt(sum(np.square(g).sum() for g in grads.values())))

    compare_losses(losses, want, LOSS_LIMIT, problems)
    got = R.safetensors_read(f"{folder}/grads.safetensors")
    compare_gradients(got, grads, expected_reach(packs, outputs, s), limit, show, problems)
    print(f"closest choice of an expert: {min(out.margin for out in outputs):.1e} (in logits)")
    return problems


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compares dumped steps with PyTorch in float64.")
    parser.add_argument("dump", nargs="+", help="folder written by ./train CONFIG --dump")
    parser.add_argument("--limit", type=float, default=2e-6, help="relative norm a gradient may be off by")
    parser.add_argument("--show", type=int, default=12, help="gradients in the table")
    parser.add_argument("--times", action="store_true", help="the flow times are those of training")
    options = parser.parse_args(argv)
    failed = 0
    for folder in options.dump:
        print(f"==== {folder}")
        try:
            problems = compare_dump(folder, options.limit, options.show, options.times)
        except (OSError, KeyError, json.JSONDecodeError) as error:
            problems = [f"not a complete dump: {type(error).__name__} {error}"]
        for problem in problems:
            print(f"FAILED: {problem}")
        failed += bool(problems)
    print(f"parity of models: {len(options.dump) - failed} equal, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
