#!/usr/bin/python3
"""The fast PyTorch model (scripts/torch_model.py) is the reference (tests/ops/reference.py): same losses, same
gradients, in float64 on the CPU, on random packs. Exit code 77 without PyTorch."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/ops"), str(ROOT / "scripts")]
try:
    import numpy as np
    import torch
    import peer_pack
    import reference as R
    import torch_model as M
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

CASES = {
    "shared experts": R.Sizes(C=16, L=2, H=4, G=2, D=8, Z=12, V=40, P=12, bottleneck=6, E=(4, 3), F=(8, 12), S=(8, 16),
                              k=(2, 1), per_modality=True),
    "shared projections, tied": R.Sizes(C=24, L=2, H=2, G=1, D=12, Z=8, V=60, P=27, bottleneck=0, E=(3, 5), F=(8, 4),
                                        S=(0, 8), k=(1, 2), tied=True),
    "plain": R.Sizes(C=24, L=3, H=2, G=2, D=12, Z=8, V=60, P=27, bottleneck=0, E=(3, 5), F=(8, 4), S=(0, 0), k=(3, 2),
                     per_modality=True),
}  # fmt: skip


def mask_is_the_engines(a):
    """Dense mask that kernels/batch.h defines, which the fast model's must equal. bool [T, T]."""
    q, k = np.ogrid[: len(a["row"]), : len(a["row"])]
    full = (a["doc_start"][q] <= k) & (k < a["kv_end"][q]) & (q < a["q_end"][k])
    fast = (a["doc_start"][q] <= k) & (k < a["kv_end"][q])
    assert np.array_equal(full, fast), "a mask of two conditions is not that of three"
    return torch.from_numpy(fast)


def compare(name, s, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    a = peer_pack.pack_make(rng, 96, 3, s.V, s.V - 10, s.P, low=2, high=9)
    p = {n: torch.randn(shape, dtype=torch.float64).mul(0.5).requires_grad_() for n, shape in R.param_shapes(s).items()}
    clean = R.patches_clean(a)
    time = a["seg_time"][a["segment"][a["dims"][0] :]].astype(np.float64)[:, None]
    a |= {"clean": clean, "noised": time * clean + (1 - time) * rng.standard_normal(clean.shape)}

    pack = R.Pack(a, torch.float64)
    losses, _ = R.step(p, [pack], s)
    want = {n: t.grad for n, t in p.items()}
    for t in p.values():
        t.grad = None

    fast = M.Pack(a, s, torch.float64, "cpu")
    allowed = mask_is_the_engines(a)
    attend = M.attend_dense(fast, allowed, s)
    parts = {
        "bottom": lambda *x: M.bottom(*x, fast, s),
        "block": lambda *x: M.block(*x, fast, s, attend, M.grouped_loop),
        "top": lambda *x: M.top(*x, fast, s),
    }
    noised = torch.from_numpy(a["noised"]).view(fast.images, -1, s.P)
    got = M.forward(parts, M.params_from_reference(p, s), noised, fast, s)
    total = M.total_loss(got, s)
    total.backward()
    for key, value in zip(("ce", "flow"), got):
        assert abs(value.item() - losses[key]) < 1e-10 * abs(losses[key]), (name, key, value.item(), losses[key])
    assert abs(total.item() - losses["total"]) < 1e-10 * abs(losses["total"]), (name, total.item(), losses["total"])
    for n, t in p.items():
        error = ((t.grad - want[n]).norm() / want[n].norm().clamp(min=1e-12)).item()
        assert want[n].norm() > 0 and error < 1e-9, f"{name}: gradient of {n}: relative error {error:.1e}"


for name, s in CASES.items():
    for seed in range(5):
        compare(name, s, seed)
print("ok: losses and gradients of the fast PyTorch model are those of the reference")
