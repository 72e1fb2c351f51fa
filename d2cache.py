"""d2Cache: decode a masked diffusion language model, recomputing only the positions that matter.

A step of plain decoding recomputes all T positions of the canvas to commit one token. Here every
step asks a policy which positions to recompute; all other keys and values come from the cache.
d2Cache answers with (1) the masked positions about to be decoded, by certainty prior, (2) the known
positions that carry the attention, by attention rollout, and the position decoded just before.
Uncached decoding, prefix cache and dual cache are other answers, so one forward pass and one
decoding loop serve them all.

Paper: arXiv 2509.23094; equation numbers are its first version's. Shape letters as in model.py:
B sequences, T positions, P of them prompt, Q recomputed, R of these masked, L layers, V vocabulary.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from model import KVCache, Transformer, decode_response, encode_prompt, load_tokenizer, require

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F

EMBEDDED_MODEL = Path(__file__).parent / "tests" / "tiny"
EXAMPLE = (
    "Ben has 30 pens. On Monday Ben buys 5 pens at the shop. On Tuesday Ben loses 8 pens at the "
    "park. On Wednesday Ben wins 4 more pens at the school. How many pens does Ben have now?"
)
COLOURS = {  # of what a step does at a position, in SVG and in a terminal; if several, the last
    "known": ("#3d7ea6", "97;44"),
    "just decoded": ("#d1495b", "97;41"),
    "masked": ("#f2b134", "30;43"),
    "decoded in this step": ("#222222", "30;42"),
}


def certainty_density(known, sigma, dtype=torch.float32):
    """Share of known positions around each one, in a Gaussian window of sigma positions.  Eq. 3.

    D(i) = sum over known j of exp(-(i - j)^2 / (2 sigma^2)), divided by the mass of the window, its
    part beyond the canvas too. The paper's sees the whole canvas, the authors' code the response.
    (B, T) bool -> (B, T) in [0, 1]
    """
    require(sigma > 0, f"sigma is {sigma}, should be above 0")
    T = known.shape[1]
    distance = torch.arange(1 - T, T, device=known.device, dtype=dtype)
    window = torch.exp(-((distance / sigma) ** 2) / 2)
    around = window.unfold(0, T, 1).flip(0)  # (2T - 1) -> (T, T), row j around position j
    return (known.to(dtype) @ around / window.sum()).clamp(max=1)


def certainty_prior(confidence, known, sigma):
    """Confidence times certainty density: sure, and sure of its surroundings.  (B, T) -> (B, T)"""
    return confidence * certainty_density(known, sigma, confidence.dtype)


def attention_rollout(maps, positions, valid):
    """Influence of each position on the last layer's output: column sums of W_L ... W_1.  Eq. 6-9.

    W_l = rownormalise(A_l + I), where A_l holds the attention of the recomputed rows and every
    other row of W_l is one-hot. Only column sums are wanted, so no T x T product: v <- v W_l from
    the last layer down, v = 1. A recomputed row keeps half of its v; half goes where it attends.
    maps (L, B, Q, T), positions (B, Q); not valid (B, Q) are repeats.  -> (B, T), rows sum to T
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    influence = maps.new_ones(maps.shape[1], maps.shape[3])
    for attention in maps.unbind()[::-1]:  # (B, Q, T), the last layer first
        held = influence.gather(1, positions) * valid  # (B, T) -> (B, Q)
        kept = held / (1 + attention.sum(dim=2))  # rows of attention sum to 1, but for round-off
        passed = (kept[:, None] @ attention)[:, 0]  # (B, Q) -> (B, T)
        influence = influence.scatter_add(1, positions, kept - held) + passed
    return influence


def nucleus(score, p, among):
    """The smallest set of positions `among` whose share of their summed score exceeds p.

    p = 0 is the one highest score, p = 1 all of `among`. As in the paper: the position that crosses
    p is in (the authors' code leaves it out).  score (B, T) >= 0, among (B, T) bool -> (B, T) bool
    """
    score = score.masked_fill(~among, 0)
    order = score.masked_fill(~among, -1).argsort(dim=1, descending=True, stable=True)
    held = score.gather(1, order).cumsum(dim=1)
    held_before = F.pad(held[:, :-1], (1, 0))  # by the positions of higher rank together
    within = (held_before <= p * held[:, -1:]) & (held_before < held[:, -1:])
    within |= p == 1  # round-off may lift a partial sum to the total, and the tail would be lost
    within[:, 0] = True
    return torch.zeros_like(among).scatter(1, order, within) & among


def best(score, among, n):
    """The n positions `among` some of highest score, of equals the first; n int or (B, 1)."""
    order = score.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(order.shape[1], device=order.device) < n
    return torch.zeros_like(among).scatter(1, order, first.expand_as(order)) & among


@dataclass(frozen=True)
class State:
    """The canvas between two steps: all that a policy may look at. Tensors are (B, T)."""

    tokens: torch.Tensor  # [MASK] where masked, and wherever the prompt holds one
    known: torch.Tensor  # prompt or decoded, whatever the token is
    fresh: torch.Tensor  # decoded in the last step: key and value still say [MASK]
    confidence: torch.Tensor  # of masked positions, when they were last predicted. Eq. 1
    influence: torch.Tensor  # attention rollout of the last step, if the policy uses it
    block: slice  # the positions being decoded
    step: int  # that the batch has done, also those in which a sequence waited for others
    padding: torch.Tensor | None = None  # before short prompts: neither known nor masked

    @property
    def masked(self):
        """Positions still to be decoded.  (B, T) bool"""
        return ~self.known if self.padding is None else ~(self.known | self.padding)

    @property
    def in_block(self):
        """The positions of the current block.  (B, T) bool"""
        inside = torch.zeros_like(self.known)
        inside[:, self.block] = True
        return inside

    @property
    def block_starts(self):
        """Sequences with no token of the current block decoded yet.  (B, 1) bool"""
        return ~self.known[:, self.block].any(dim=1, keepdim=True)


class RecomputeAll:
    """Vanilla decoding: no cache at all."""

    uses_attention = False

    def choose(self, state):
        return torch.ones_like(state.known)


class PrefixCache:
    """Fast-dLLM: everything when a block starts, then the block and all that follows it."""

    uses_attention = False

    def choose(self, state):
        positions = torch.arange(state.known.shape[1], device=state.known.device)
        return state.block_starts | (positions >= state.block.start)


class DualCache:
    """Fast-dLLM: everything when a block starts, then the block alone."""

    uses_attention = False

    def choose(self, state):
        return state.block_starts | state.in_block


@dataclass(frozen=True)
class D2Cache:
    """The paper's policy: k masked positions, a nucleus p of the known ones, and the fresh ones."""

    k: int = 32
    p: float = 0.1
    sigma: float = 10.0
    uses_attention = True

    def __post_init__(self):
        valid = self.k >= 1 and 0 <= self.p <= 1 and self.sigma > 0
        require(valid, f"{self} should have k >= 1, 0 <= p <= 1 and sigma > 0")

    def choose(self, state):
        return self.about_to_be_decoded(state) | self.attended(state) | state.fresh

    def about_to_be_decoded(self, state):
        """Stage 1, Eq. 4: the k masked positions of highest prior, those of the block first."""
        prior = certainty_prior(state.confidence, state.known, self.sigma)
        inside = best(prior, state.masked & state.in_block, self.k)
        left = self.k - inside.sum(dim=1, keepdim=True)
        return inside | best(prior, state.masked & ~state.in_block, left)

    def attended(self, state):
        """Stage 2, Eq. 9: the nucleus of influence among prompt and decoded positions."""
        return nucleus(state.influence, self.p, among=state.known)


def blank_canvas(model, prompt, gen_length, prompt_mask=None):
    """The state before the first step, on the model's device; ValueError for a bad prompt."""
    config, weight, shape = model.config, model.wte.weight, tuple(prompt.shape)
    integer = not prompt.is_floating_point() and prompt.dtype != torch.bool
    fits = integer and len(shape) == 2 and shape[0] > 0
    require(fits, f"prompt is {shape} {prompt.dtype}, should be (B, P) integers")
    prompt, mask_id, V = prompt.to(weight.device).long(), config.mask_token_id, config.vocab_size
    wrong = prompt[((prompt < 0) | (prompt >= V)) & (prompt != mask_id)].tolist()
    require(not wrong, f"prompt holds ids {wrong[:5]}, should be 0 to {V - 1}")
    most = config.max_sequence_length - shape[1]
    said = f"gen_length is {gen_length} after a prompt of {shape[1]}, should be from 1 to {most}"
    require(1 <= gen_length <= most, said)
    real = (torch.ones_like(prompt) if prompt_mask is None else prompt_mask.to(prompt)).bool()
    padded_left = real.shape == prompt.shape and (real[:, 1:] >= real[:, :-1]).all()
    said = f"prompt_mask {tuple(real.shape)} should be {shape}, in each row zeros (padding), then"
    require(padded_left and real[:, -1:].all(), f"{said} at least one 1")

    tokens = F.pad(prompt, (0, gen_length), value=mask_id)
    known, padding = (F.pad(x, (0, gen_length), value=False) for x in (real, ~real))
    zeros = torch.zeros_like(tokens, dtype=torch.promote_types(weight.dtype, torch.float32))
    fresh, ones, nowhere = torch.zeros_like(known), torch.ones_like(zeros), slice(0, 0)
    return State(tokens, known, fresh, zeros, ones, nowhere, 0, padding if padding.any() else None)


def ask(policy, state, shifted):
    """The positions recomputed in this step, and the masked ones among them.  2 x (B, T)

    All in the first step, then as the policy says; but no padding, and nothing in a sequence whose
    block is done, which waits for others. `shifted` logits: the row before a masked position too.
    """
    chosen = torch.ones_like(state.known) if state.step == 0 else policy.choose(state)
    said = f"policy {type(policy).__name__} chose {tuple(chosen.shape)} {chosen.dtype}"
    matches = chosen.dtype == torch.bool and chosen.shape == state.known.shape
    require(matches, f"{said}, should be {tuple(state.known.shape)} torch.bool")
    unfinished = state.masked[:, state.block].any(dim=1, keepdim=True)
    chosen = chosen & unfinished & (state.known | state.masked)
    predicted = chosen & state.masked
    if shifted:
        chosen = chosen | F.pad(predicted[:, 1:], (0, 1))
    return chosen, predicted


def pack(chosen, predicted):
    """Chosen positions in rows of equal length, predicted ones first.  2 x (B, T) -> 2 x (B, Q), R

    A row of fewer than Q repeats its first position, and is not valid there: recomputing a position
    twice gives the same keys and values. A sequence that waits has none, so it repeats position 0,
    where `recompute` puts the cache back. No row has more than R predicted positions.
    """
    sizes = chosen.sum(dim=1).max(), predicted.sum(dim=1).max()
    Q, R = torch.stack(sizes).tolist()  # the one transfer to the host in a step
    order = (chosen.int() + predicted.int()).argsort(dim=1, descending=True, stable=True)[:, :Q]
    valid = chosen.gather(1, order)
    return torch.where(valid, order, order[:, :1]), valid, R


def recompute(model, cache, R, uses_attention, tokens, positions, valid, padding=None):
    """One forward pass over positions (B, Q): logits (B, R, V) of the first R, influence (B, T)."""
    waits = ~valid.any(dim=1)[:, None, None]
    saved = [(tensor, tensor[:, :, 0].clone()) for tensor in (cache.k, cache.v)]
    hidden, maps = model.trunk(tokens, positions, cache, uses_attention, padding)
    for tensor, column in saved:  # a sequence that waits keeps its cache
        tensor[:, :, 0] = column.where(waits, tensor[:, :, 0])
    predicting = hidden[:, :R]
    if model.config.shifted:  # position i is predicted by the row of i - 1, position 0 by its own
        before = (positions[:, :R, None] - 1).clamp(min=0)
        row = (positions[:, None] == before).int().argmax(dim=2, keepdim=True)  # which of the Q
        predicting = hidden.gather(1, row.expand_as(predicting))
    return model.head(predicting), attention_rollout(maps, positions, valid)


def predict(logits, config, temperature=0.0, generator=None):
    """Probability (Eq. 1) and id of each row's token.  (B, R, V) -> 2 x (B, R)

    The likeliest one, or one drawn from softmax(logits / temperature) by Gumbel noise, in float64
    as in LLaDA. [MASK] and ids without a token are never it, but keep their share of probability.
    """
    require(0 <= temperature < torch.inf, f"temperature is {temperature}, should be at least 0")
    drawn = f"generator is {generator} at temperature {temperature}"
    require(temperature == 0 or generator, f"{drawn}, should be a torch.Generator")
    ids = torch.arange(logits.shape[-1], device=logits.device)
    excluded, score = (ids == config.mask_token_id) | (ids >= config.vocab_size), logits
    if temperature > 0:
        noise = torch.empty_like(logits, dtype=torch.float64).uniform_(generator=generator)
        score = logits - temperature * torch.log(-torch.log(noise))
    token = score.masked_fill(excluded, -torch.inf).argmax(dim=-1, keepdim=True)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, dim=-1, dtype=wide).gather(-1, token)[..., 0], token[..., 0]


def unmask(state, predicted, confidence, sigma, tokens_per_step, threshold):
    """Which of the positions just predicted to commit: in the block, the best.  -> (B, T) bool"""
    require(tokens_per_step >= 1, f"tokens_per_step is {tokens_per_step}, should be at least 1")
    in_range = threshold is None or 0 <= threshold <= 1
    require(in_range, f"threshold is {threshold}, should be from 0 to 1, or None")
    score = confidence if sigma is None else certainty_prior(confidence, state.known, sigma)
    candidates = predicted & state.in_block
    commit = best(score, candidates, tokens_per_step)
    return commit if threshold is None else commit | candidates & (confidence > threshold)


def end_at_eos(state, eos, prompt_length):
    """The state, in which all after a response's first EOS is EOS, once none before is masked."""
    settled = state.masked.cumsum(dim=1) == 0
    settled[:, :prompt_length] = False
    ended = (settled & (state.tokens == eos)).cumsum(dim=1) > 0  # from the first one on
    tokens, fresh = state.tokens.masked_fill(ended, eos), state.fresh | ended & state.masked
    return replace(state, tokens=tokens, known=state.known | ended, fresh=fresh)


@torch.no_grad()
def generate(model, prompt, gen_length, block_length=None, tokens_per_step=1,
             policy=RecomputeAll(), sigma=None, on_step=None, graphs=None, prompt_mask=None,
             threshold=None, stop_at_eos=False, temperature=0.0, generator=None):  # fmt: skip
    """Decode gen_length tokens after each prompt.  (B, P) integers -> (B, P + gen_length)

    Blocks of block_length positions are decoded from left to right (None: one block). Each step
    recomputes what `policy` chooses; of the block's masked positions among these it commits the
    tokens_per_step best, by confidence, or by certainty prior if sigma is given; with a threshold,
    as in Fast-dLLM, also every one whose confidence exceeds it.
    Short prompts are padded on the left, where prompt_mask (B, P) is 0: a sequence decodes alone as
    in company. stop_at_eos makes all after a response's first EOS token EOS once all before it is
    decoded. A temperature above 0 draws tokens with `generator`, one for the batch. on_step(state,
    chosen) gets every new State and the positions (B, T) recomputed for it. graphs, bench.py's
    CudaGraphs of the model, replays the forward passes.
    Raises ValueError for arguments out of range and for a policy that leaves nothing to commit.
    """
    state = blank_canvas(model, prompt, gen_length, prompt_mask)
    block_length = gen_length if block_length is None else block_length
    divides = block_length >= 1 and gen_length % block_length == 0
    require(divides, f"block_length is {block_length}, should divide gen_length {gen_length}")
    (B, T), P, config = state.tokens.shape, prompt.shape[1], model.config
    weight, forward = model.wte.weight, graphs.recompute if graphs else recompute
    cache = graphs.cache(B, T) if graphs else KVCache(config, B, T, weight.device, weight.dtype)

    for start in range(P, T, block_length):
        state = replace(state, block=slice(start, start + block_length))
        for n in range(block_length):  # at most: every step commits a position
            maybe_done = threshold is not None or stop_at_eos or n * tokens_per_step >= block_length
            if maybe_done and not state.masked[:, state.block].any():  # costs another transfer
                break
            chosen, predicted = ask(policy, state, config.shifted)
            positions, valid, R = pack(chosen, predicted)
            if R == 0:  # the policy breaks its contract
                break
            inputs = state.tokens, positions, valid, state.padding
            logits, influence = forward(model, cache, R, policy.uses_attention, *inputs)
            confidence, token = predict(logits, config, temperature, generator)
            rank = (predicted.cumsum(dim=1) - 1).clamp(min=0)  # pack puts the predicted ones first
            confidence = confidence.gather(1, rank).where(predicted, state.confidence)
            commit = unmask(state, predicted, confidence, sigma, tokens_per_step, threshold)
            waits = ~chosen.any(dim=1, keepdim=True)  # for other sequences, and keeps its state
            state = replace(
                state,
                tokens=token.gather(1, rank).where(commit, state.tokens),
                known=state.known | commit,
                fresh=state.fresh.where(waits, commit),
                confidence=confidence,
                influence=state.influence.where(waits, influence),
                step=state.step + 1,
            )
            state = end_at_eos(state, config.eos_token_id, P) if stop_at_eos else state
            if on_step is not None:
                on_step(state, chosen)
        done = not state.masked[:, state.block].any()
        require(done, f"policy {type(policy).__name__} chose nothing to commit from {start} on")
    return state.tokens


def settings(gen_length):
    """Arguments of `generate` by policy name: the paper's, scaled down for short responses."""
    k, sigma = min(32, max(1, gen_length // 8)), min(10.0, 10 * gen_length / 256)
    most = 32 if gen_length >= 128 else 16
    block_length = max(n for n in range(1, most + 1) if gen_length % n == 0)
    return {
        "vanilla": dict(policy=RecomputeAll()),
        "prefix": dict(policy=PrefixCache(), block_length=block_length),
        "dual": dict(policy=DualCache(), block_length=block_length),
        "d2cache": dict(policy=D2Cache(k=k, p=0.1, sigma=sigma), sigma=sigma),
    }


def marks(steps):
    """{position: key of COLOURS}: what the last of these steps of one sequence did there."""
    # Before the first step is itself: what is fresh then is decoded in this step, which counts.
    (before, _), (state, chosen) = (steps[:1] + steps)[-2:]
    where = (chosen, chosen & before.fresh, chosen & state.masked, state.fresh)
    cells = zip(COLOURS, (positions[0].nonzero()[:, 0].tolist() for positions in where))
    return {position: mark for mark, positions in cells for position in positions}


def draw_map(steps, policy):
    """The decode of one sequence as SVG: steps down, positions across."""
    P, T, S = steps[0][0].block.start, steps[0][0].tokens.shape[1], len(steps)
    rows, em, paths, legend = [marks(steps[: y + 1]) for y in range(S)], T / 60, "", ""
    reasons = {"masked": " (certainty prior)", "known": " (attention rollout)"}
    for mark, (colour, _) in COLOURS.items():
        reason = reasons.get(mark, "") if isinstance(policy, D2Cache) else ""
        cells = (f"M{x} {y}h1v1h-1z" for y, row in enumerate(rows) for x in row if row[x] == mark)
        paths += f'<path fill="{colour}" d="{"".join(cells)}"/>'
        legend += f'<tspan fill="{colour}">■</tspan> {mark}{reason} \u2003'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" style="background: #fff" '
        f'font-size="{em}" viewBox="{-em} {-2 * em} {T + 2 * em} {S + 5 * em}">\n'
        f'<path fill="#eee" d="M0 0h{T}v{S}h-{T}z"/>\n{paths}\n'
        f'<text y="{-em / 2}">prompt</text><text x="{P}" y="{-em / 2}">response</text>\n'
        f'<text y="{S + 2 * em}">{legend}</text>\n</svg>\n'
    )


def draw_screen(steps, tokenizer):
    """The canvas of one sequence as text, in a terminal's colours."""
    state, screen, mark_at = steps[-1][0], "", marks(steps)
    for i, (id, known) in enumerate(zip(state.tokens[0].tolist(), state.known[0].tolist())):
        text = tokenizer.decode([id], skip_special_tokens=False) if known else " _"
        screen += f"\033[{COLOURS[mark_at[i]][1] if i in mark_at else 0}m{text}\033[0m"
    return screen.replace("\n", "\033[K\n")  # nothing is left of a longer line


def main():
    """Print the decoded answer to a prompt; a terminal with colours shows the canvas filling."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", default=EMBEDDED_MODEL, help="checkpoint folder or hub id")
    add("--prompt", default=EXAMPLE, help="the user's text")
    add("--policy", default="d2cache", choices=settings(1), help="which positions to recompute")
    add("--gen-length", default=64, type=int, help="tokens to decode (64)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--map", help="draw what was recomputed when, and why, into this SVG file")
    args, steps = parser.parse_args(), []
    watched = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def observe(state, chosen):
        steps.append((state, chosen))
        if watched:
            print(f"\033[H{draw_screen(steps, tokenizer)}\033[J", flush=True)
            if args.model == EMBEDDED_MODEL:  # which is faster than the eye
                time.sleep(0.05)

    try:
        require(args.gen_length >= 1, f"--gen-length is {args.gen_length}, should be at least 1")
        tokenizer = load_tokenizer(args.model)
        prompt = encode_prompt(tokenizer, args.prompt)
        model = Transformer.from_pretrained(args.model, args.device)
        arguments = settings(args.gen_length)[args.policy]
        tokens = generate(model, prompt, args.gen_length, on_step=observe, **arguments)
        print(decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.eos_token_id))
        if args.map:
            Path(args.map).write_text(draw_map(steps, arguments["policy"]), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    share = sum(chosen.float().mean().item() for _, chosen in steps) / len(steps)
    print(f"{len(steps)} forwards, {share:.1%} of positions recomputed", file=sys.stderr)


if __name__ == "__main__":
    main()
