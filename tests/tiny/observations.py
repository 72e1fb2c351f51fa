"""What d2Cache rests on, seen in the embedded model: `python tests/tiny/observations.py`.

The paper observes that (1) the keys of a masked position drift, then move fast shortly before it is
decoded, then rest, so few masks need recomputing at a time (stage 1); (2) attention gathers on few
prompt and decoded positions (stage 2); (3) confidence alone commits the end of the text too early
(certainty prior). It measures LLaDA-8B, of 32 layers; this prints what 4 layers do under uncached
decoding, the same or not.

Paper: arXiv 2509.23094, section 3. Shape letters as in model.py, and S canvases of a decode: the
blank one, then the one after every step.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import PROBLEMS, QUALITY_LENGTH, decode, read_problems  # noqa: E402
from d2cache import EMBEDDED_MODEL, attention_rollout, best, blank_canvas, settings  # noqa: E402
from model import KVCache, Transformer, encode_prompt, load_tokenizer  # noqa: E402

import torch  # noqa: E402  (after model, which keeps its import quiet)

CHOSEN, EIGHTH = range(0, 48, 3), QUALITY_LENGTH // 8  # problems of 3 to 5 events
QUARTERS = [2 * EIGHTH * n for n in (1, 2, 3)]  # of the steps
ORDERS = {"certainty prior": settings(QUALITY_LENGTH)["d2cache"]["sigma"], "confidence": None}
SPANS = {  # when a position is decoded: steps left, least and most
    "63-33 before": (33, 63), "32-17 before": (17, 32), "16-9 before": (9, 16),
    "8-5 before": (5, 8), "4-3 before": (3, 4), "2 before": (2, 2), "1 before": (1, 1),
    "becomes a token": (0, 0), "1 after": (-1, -1), "2-4 after": (-4, -2), "5-8 after": (-8, -5),
    "9-16 after": (-16, -9), "17-63 after": (-63, -17),
}  # fmt: skip
KINDS = ("prompt", "decoded", "masked", "top tenth", "  masked of it")
BAR, MARK = 24, 0.0025  # the longest bar, and the change that one mark of it stands for


def decoded_at(known):
    """The first canvas that shows each position's token, 0 for a prompt.  (B, S, T) -> (B, T)"""
    return (~known).sum(dim=1)


def steps_left(decoded, S):
    """Steps until each position is decoded, as each step ends.  (B, T) -> (B, S - 1, T)

    0 is the step that makes it a token, and what follows is negative.
    """
    return decoded[:, None] - torch.arange(1, S)[:, None]


def relative_change(keys):
    """||k(s+1) - k(s)|| / ||k(s)||, mean over layers.  (L, S, T, G, D) -> (S - 1, T)

    In the first layer a key follows from token and place alone: it moves in one step only.
    """
    keys = keys.flatten(3)
    return ((keys[:, 1:] - keys[:, :-1]).norm(dim=3) / keys[:, :-1].norm(dim=3)).mean(dim=0)


def mean_within(values, left, least, most):
    """Mean of the values for which `left`, of the same shape, is from least to most."""
    return values[(least <= left) & (left <= most)].mean().item()


def in_order(response, decoded):
    """A response's tokens in the order of their decoding.  2 x (B, T) -> (B, T)"""
    return response.gather(1, decoded.argsort(dim=1, stable=True))


def first(hits):
    """The number, counted from 1, of each row's first hit; T + 1 without any.  (B, T) -> (B,)"""
    return 1 + (hits.cumsum(dim=1) == 0).sum(dim=1)


def canvases(model, prompt, sigma):
    """Tokens and known positions of all canvases of an uncached decode.  (B, P) -> 2 x (B, S, T)"""
    _, steps = decode(model, prompt, QUALITY_LENGTH, {"sigma": sigma})
    states = [blank_canvas(model, prompt, QUALITY_LENGTH, None)] + [state for state, _ in steps]
    return [torch.stack([getattr(s, name) for s in states], dim=1) for name in ("tokens", "known")]


def key_changes(model, tokens):
    """How far every position's keys move in each step of a decode.  (B, S, T) -> (B, S - 1, T)"""
    changes = []
    for sequence in tokens:  # its S canvases are a batch
        cache = KVCache(model.config, *sequence.shape, tokens.device, model.wte.weight.dtype)
        model.trunk(sequence, cache=cache)
        changes.append(relative_change(cache.k))
    return torch.stack(changes)


def influence_shares(model, tokens, known, P):
    """Each of the KINDS' share of the positions, and of the attention rollout over all rows.

    tokens, known (B, T) -> (B, 5, 2)
    """
    _, maps = model.trunk(tokens, return_attention=True)
    T, ones = tokens.shape[1], torch.ones_like(known)
    positions = torch.arange(T).expand_as(tokens)
    influence = attention_rollout(maps, positions, ones)
    top = best(influence, ones, round(T / 10))
    kinds = torch.stack([positions < P, known & (positions >= P), ~known, top, top & ~known])
    shares = torch.stack([ones, influence]) / T  # each row sums to 1
    return (kinds[:, None] * shares).sum(dim=3).permute(2, 0, 1)  # (5, 2, B, T) -> (B, 5, 2)


def measure(model, prompts, sigma):
    """All that the tables need of N problems decoded in one order.

    Changes of keys and steps left, 2 x (N, S - 1, T - P); mean influence shares at the QUARTERS,
    (3, 5, 2); whether each token committed was EOS, (N, T - P).
    """
    changes, left, shares, eos = [], [], [], []
    for P, group in itertools.groupby(prompts, key=lambda prompt: prompt.shape[1]):
        tokens, known = canvases(model, torch.cat(list(group)), sigma)
        decoded, response = decoded_at(known)[:, P:], tokens[:, -1, P:]
        changes.append(key_changes(model, tokens)[..., P:])
        left.append(steps_left(decoded, tokens.shape[1]))
        parts = [influence_shares(model, tokens[:, s], known[:, s], P) for s in QUARTERS]
        shares.append(torch.stack(parts, dim=1))
        eos.append(in_order(response, decoded) == model.config.eos_token_id)
    return torch.cat(changes), torch.cat(left), torch.cat(shares).mean(dim=0), torch.cat(eos)


def print_changes(orders):
    how = f"layer mean, {len(CHOSEN)} problems; # is {MARK:.2%}, {BAR} at most"
    print(f"1. KEYS: ||k(s+1) - k(s)|| / ||k(s)|| in responses, {how}")
    print("decoded".ljust(18) + "".join(f"by {name}".ljust(BAR + 11) for name in orders).rstrip())
    for label, span in SPANS.items():
        values = [mean_within(changes, left, *span) for changes, left, *_ in orders.values()]
        bars = [f"{v:6.1%}  " + (BAR * "#")[: round(v / MARK)].ljust(BAR + 3) for v in values]
        print(label.ljust(16) + "".join(bars).rstrip())
    for name, (changes, left, *_) in orders.items():
        spans = (1, 8), (9, 63), (-63, -1)
        near, far, after = (mean_within(changes, left, *span) for span in spans)
        times = f"{near / far:.1f} x that 63-9 before, {near / after:.1f} x that after"
        print(f"by {name}, the change 8-1 before is {times}")


def print_shares(shares):
    how = f"(rollout), {len(CHOSEN)} problems, by certainty prior"
    print(f"\n2. ATTENTION: share of positions and influence {how}")
    heads = [f"{step}: positions  influence" for step in QUARTERS]
    print("after step".ljust(14) + "".join(head.rjust(28) for head in heads))
    for kind, row in zip(KINDS, shares.unbind(dim=1)):
        print(kind.ljust(14) + "".join(f"{n:17.1%}{held:11.1%}" for n, held in row.tolist()))
    positions, held = shares.mean(dim=0)[KINDS.index("masked")]
    print(f"a masked position has {held / positions:.1f} x the mean influence")


def print_ends(orders):
    how = f"the first one's step, {len(CHOSEN)} problems, no blocks"
    print(f"\n3. END OF TEXT: share of EOS among tokens committed, {how}")
    spans = [f"{n + 1}-{n + EIGHTH}" for n in range(0, QUALITY_LENGTH, EIGHTH)]
    print("steps".ljust(18) + "".join(head.rjust(8) for head in [*spans, "all", "first"]))
    for name, (*_, eos) in orders.items():
        shares = [*eos.float().unflatten(1, (8, EIGHTH)).mean(dim=(0, 2)), eos.float().mean()]
        cells = "".join(f"{value:8.1%}" for value in shares)
        print(f"by {name}".ljust(18) + f"{cells}{first(eos).float().mean():8.1f}")


def main():
    torch.set_num_threads(1)  # the matrices are small
    model, tokenizer = Transformer.from_pretrained(EMBEDDED_MODEL), load_tokenizer(EMBEDDED_MODEL)
    problems = read_problems(PROBLEMS, CHOSEN.stop)
    prompts = [encode_prompt(tokenizer, problems[n][0]) for n in CHOSEN]
    orders = {name: measure(model, prompts, sigma) for name, sigma in ORDERS.items()}
    print_changes(orders)
    print_shares(orders["certainty prior"][2])
    print_ends(orders)


if __name__ == "__main__":
    main()
