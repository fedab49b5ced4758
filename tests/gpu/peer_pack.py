"""Random packs for the comparison with PyTorch: documents of a caption and one image, either way round.

A pack has exactly T tokens, `images` images of side x side patches, half of them drawn from their caption and half
captioned, and the same number of text tokens every time: only lengths, order and ids are random. So every shape of the
PyTorch model is static, which favours it: no padding, no recompilation, one CUDA graph. Needs numpy alone.
"""
import numpy as np

NOISED, CLEAN = 0, 1


def caption_lengths(rng, count, total, low, high):
    """`count` lengths in [low, high] that sum to `total`: uniform ones, moved by one until they do."""
    assert count * low <= total <= count * high, f"{count} captions cannot have {total} tokens"
    lengths = rng.integers(low, high + 1, count)
    while (short := total - lengths.sum()) != 0:
        room = np.flatnonzero(lengths < high) if short > 0 else np.flatnonzero(lengths > low)
        lengths[rng.permutation(room)[: abs(short)]] += np.sign(short)
    return lengths


def pack_make(rng, T, side, vocab, words, P, low=32, high=96):
    """Arrays of one pack by name, as kernels/batch.h has them (row and sequence order, segments from 1), int32 but for
    seg_time. vocab: V; ids of captions are below `words`. patch: u8 [n_image, P]."""
    S, bos, eos, boi, eoi = side * side, vocab - 4, vocab - 3, vocab - 2, vocab - 1
    images = 2 * round(T / (S + (low + high) / 2 + 3) / 2)
    captions = caption_lengths(rng, images, T - images * (S + 3), low, high)
    kinds = rng.permutation(images) % 2
    is_image, token, target, position, doc_start, kv_end, q_end, segment = ([] for _ in range(8))
    seg_kind, seg_time, cap_start, cap_end = [0], [1.0], [0], [0]
    texts = 0  # text rows so far

    def text(ids, next_ids, at):
        nonlocal texts
        first = len(is_image)
        is_image.extend([0] * len(ids))
        token.extend(ids)
        target.extend(next_ids)
        position.extend((at + i, at + i) for i in range(len(ids)))
        kv_end.extend(range(first + 1, first + len(ids) + 1))
        segment.extend([0] * len(ids))
        texts += len(ids)
        return at + len(ids)

    def image(kind, at):
        first = len(is_image)
        is_image.extend([1] * S)
        position.extend((at + i // side, at + i % side) for i in range(S))
        kv_end.extend([first + S] * S)
        segment.extend([len(seg_kind)] * S)
        seg_kind.append(kind)
        seg_time.append(1 / (1 + np.exp(0.8 - 0.8 * rng.standard_normal())) if kind == NOISED else 1.0)
        return at + side

    for n, kind in zip(captions.tolist(), kinds):
        begin, ids = len(is_image), rng.integers(0, words, n).tolist()
        if kind == NOISED:
            cap_start.append(texts + 1)
            cap_end.append(texts + 1 + n)
            image(NOISED, text([bos, *ids, boi], [*ids, boi, -1], 0))
        else:
            cap_start.append(0)
            cap_end.append(0)
            at = image(CLEAN, text([bos, boi], [boi, -1], 0))
            text([eoi, *ids, eos], [*ids, eos, -1], at)
        # A noised image ends its document, so nothing after it is kept from seeing it: q_end is the document's end.
        doc_start.extend([begin] * (len(is_image) - begin))
        q_end.extend([len(is_image)] * (len(is_image) - begin))

    is_image = np.array(is_image)
    seq = np.argsort(is_image, kind="stable")  # row -> sequence
    row = np.empty_like(seq)
    row[seq] = np.arange(T)
    n_image = images * S
    a = dict(dims=[T - n_image, n_image, images + 1], row=row, seq=seq, token=token, target=target, position=position,
             doc_start=doc_start, kv_end=kv_end, q_end=q_end, segment=np.array(segment)[seq], seg_kind=seg_kind,
             cap_start=cap_start, cap_end=cap_end)  # fmt: skip
    a = {name: np.array(values, np.int32) for name, values in a.items()}
    a["target_kind"] = np.zeros_like(a["target"])
    a["seg_time"] = np.array(seg_time, np.float32)
    a["patch"] = rng.integers(0, 256, (n_image, P), np.uint8)
    return a
