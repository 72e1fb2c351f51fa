"""d2Cache: decode a masked diffusion language model, recomputing only the positions that matter.

A step of plain decoding recomputes all T positions of the canvas to commit one token. Here every
step asks a policy one question, which positions to recompute; all other keys and values come from
the cache. d2Cache answers with (1) the masked positions about to be decoded, by certainty prior,
(2) the known positions that carry the attention, by attention rollout, and the position decoded
just before. Uncached decoding, prefix cache and dual cache are other answers to the same question,
so one forward pass and one decoding loop serve them all.

Paper: arXiv 2509.23094; equation numbers are its first version's. Shape letters as in model.py:
B sequences, T positions, P of them prompt, Q recomputed, R of these masked, L layers, V vocabulary.
"""

import argparse
import math
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
    "Anna has 21 stickers. On Wednesday Anna finds 5 stickers at the market. On Thursday Anna "
    "sells 9 stickers at the market. On Friday Anna gets 8 more stickers at the school. "
    "How many stickers does Anna have now?"
)
COLOURS = {  # of what a step does at a position: in a picture, in a terminal
    "masked": ("#f2b134", "30;43"),
    "just decoded": ("#d1495b", "97;41"),
    "known": ("#3d7ea6", "97;44"),
    "decoded in this step": ("#222222", "30;42"),
}


def certainty_density(known, sigma, dtype=torch.float32):
    """Share of known positions around each one, in a Gaussian window of sigma positions.  Eq. 3.

    D(i) = sum over known j of exp(-(i - j)^2 / (2 sigma^2)), divided by the mass of the window.
    Over the whole canvas, as in the paper; the authors' code sees the response alone.
    (B, T) bool -> (B, T) in [0, 1]
    """
    T = known.shape[1]
    distance = torch.arange(1 - T, T, device=known.device, dtype=dtype)
    window = torch.exp(-((distance / sigma) ** 2) / 2)
    # Row r is the window around position T - 1 - r, hence the flip.
    shifted = window.unfold(0, T, 1)  # (2T - 1) -> (T, T)
    return (known.flip(1).to(dtype) @ shifted / window.sum()).clamp(max=1)


def certainty_prior(confidence, known, sigma):
    """Confidence times certainty density: sure, and sure of its surroundings.  (B, T) -> (B, T)"""
    return confidence * certainty_density(known, sigma, confidence.dtype)


def attention_rollout(maps, positions, valid):
    """Influence of each position on the last layer's output: column sums of W_L ... W_1.  Eq. 6-9.

    W_l = rownormalise(A_l + I), where A_l holds the attention of the recomputed rows and every
    other row of W_l is one-hot. Only column sums are wanted, so a row vector goes down the layers
    instead of T x T products: a recomputed row keeps half of what it has, its attention takes half.
    maps (L, B, Q, T), positions (B, Q); entries that are not valid (B, Q) are repeats, and do not
    count.  -> (B, T), every row sums to T
    """
    wide = torch.promote_types(maps.dtype, torch.float32)
    influence = torch.ones(maps.shape[1], maps.shape[3], device=maps.device, dtype=wide)
    for attention in maps.unbind()[::-1]:  # (B, Q, T), the last layer first
        attention = attention.to(wide)
        moving = influence.gather(1, positions) * valid  # (B, T) -> (B, Q)
        kept = moving / (1 + attention.sum(dim=2))
        passed = (kept[:, None] @ attention)[:, 0]  # (B, Q) -> (B, T)
        influence = influence.scatter_add(1, positions, kept - moving) + passed
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
    """The n positions of highest score among some, or all of those; of equals the first.

    score (B, T), among (B, T) bool, n a number or one for each sequence, (B, 1).  -> (B, T) bool
    """
    order = score.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < n) & among


@dataclass(frozen=True)
class State:
    """The canvas between two steps: all that a policy may look at. Tensors are (B, T)."""

    tokens: torch.Tensor  # [MASK] where masked, and wherever the prompt holds one
    known: torch.Tensor  # prompt or decoded, whatever the token is
    fresh: torch.Tensor  # decoded in the last step: key and value still say [MASK]
    confidence: torch.Tensor  # of masked positions, when they were last predicted. Eq. 1
    influence: torch.Tensor  # attention rollout of the last step, if the policy uses it
    block: slice  # the positions being decoded
    step: int  # steps done by the batch: goes on while a sequence waits for others
    padding: torch.Tensor | None = None  # before short prompts: neither known nor masked

    @property
    def masked(self):
        """Positions still to be decoded.  (B, T) bool"""
        return ~self.known if self.padding is None else ~(self.known | self.padding)


def in_block(state):
    """The positions of the current block.  (B, T) bool"""
    inside = torch.zeros_like(state.known)
    inside[:, state.block] = True
    return inside


def block_starts(state):
    """Sequences of whose current block nothing is decoded yet.  (B, 1) bool"""
    return ~state.known[:, state.block].any(dim=1, keepdim=True)


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
        return block_starts(state) | (positions >= state.block.start)


class DualCache:
    """Fast-dLLM: everything when a block starts, then the block alone."""

    uses_attention = False

    def choose(self, state):
        return block_starts(state) | in_block(state)


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
        inside = best(prior, state.masked & in_block(state), self.k)
        left = self.k - inside.sum(dim=1, keepdim=True)
        return inside | best(prior, state.masked & ~in_block(state), left)

    def attended(self, state):
        """Stage 2, Eq. 9: the nucleus of influence among prompt and decoded positions."""
        return nucleus(state.influence, self.p, among=state.known)


def prompt_and_padding(model, prompt, gen_length, prompt_mask):
    """The prompt as int64 and the padding, (B, T) bool or None, both on the model's device.

    ValueError for a canvas that `generate` cannot decode.
    """
    shape, kind = tuple(prompt.shape), prompt.dtype
    integer = not (kind == torch.bool or kind.is_floating_point or kind.is_complex)
    fits = integer and len(shape) == 2 and shape[0] > 0
    require(fits, f"prompt is {shape} {kind}, should be (B, P) integers")
    prompt = prompt.to(model.wte.weight.device, torch.long)
    P, most, V = shape[1], model.config.max_sequence_length, model.config.vocab_size
    fits = (0 <= prompt) & (prompt < V) | (prompt == model.config.mask_token_id)
    wrong = prompt[~fits].unique().tolist()
    require(not wrong, f"prompt holds ids {wrong[:5]}, should be 0 to {V - 1}")
    lengths = f"gen_length is {gen_length} after a prompt of {P}"
    require(P + gen_length <= most, f"{lengths}, should be at most max_sequence_length {most}")
    if prompt_mask is None:
        return prompt, None
    given = tuple(prompt_mask.shape)
    require(given == shape, f"prompt_mask is {given}, should be {shape}, as the prompt")
    real = prompt_mask.to(prompt.device).bool()
    wrong = (real[:, :-1] & ~real[:, 1:]).any(dim=1) | ~real[:, -1:].all(dim=1)
    wrong = wrong.nonzero()[:, 0].tolist()
    require(not wrong, f"prompt_mask rows {wrong} should be zeros (padding), then at least one 1")
    return prompt, None if real.all() else F.pad(~real, (0, gen_length), value=False)


def check_settings(model, gen_length, block_length, tokens_per_step, sigma, threshold,
                   temperature, generator):  # fmt: skip
    """ValueError for settings of `generate` that are out of range."""
    counts = dict(gen_length=gen_length, block_length=block_length, tokens_per_step=tokens_per_step)
    for name, n in counts.items():
        require(isinstance(n, int) and n >= 1, f"{name} is {n}, should be an integer, at least 1")
    divides = gen_length % block_length == 0
    require(divides, f"block_length is {block_length}, should divide gen_length {gen_length}")
    require(sigma is None or sigma > 0, f"sigma is {sigma}, should be above 0, or None")
    share = threshold is None or 0 <= threshold <= 1
    require(share, f"threshold is {threshold}, should be from 0 to 1, or None")
    require(0 <= temperature < math.inf, f"temperature is {temperature}, should be at least 0")
    device, own = model.wte.weight.device.type, generator and generator.device.type
    said = f"generator is on {own} at temperature {temperature}, should be a torch.Generator on"
    require(temperature == 0 or own == device, f"{said} {device}")


def blank_canvas(model, prompt, gen_length, padding):
    """The state before the first step: the prompt, then gen_length masks."""
    tokens = F.pad(prompt, (0, gen_length), value=model.config.mask_token_id)
    known = F.pad(torch.ones_like(prompt, dtype=torch.bool), (0, gen_length), value=False)
    known = known if padding is None else known & ~padding
    wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
    zeros = torch.zeros_like(tokens, dtype=wide)
    fresh, nowhere = torch.zeros_like(known), slice(0, 0)
    return State(tokens, known, fresh, zeros, torch.ones_like(zeros), nowhere, 0, padding)


def choose(policy, state, waits, shifted):
    """The positions recomputed in this step, and those of them to be predicted.  2 x (B, T)

    All in the first step, then as the policy says; but no padding, and nothing in a sequence that
    `waits` (B, 1), its block done before others'. If logits are `shifted`, a masked position is
    predicted by the row before it, which is recomputed too.
    """
    chosen = torch.ones_like(state.known) if state.step == 0 else policy.choose(state)
    said = f"policy {type(policy).__name__} chose {tuple(chosen.shape)} {chosen.dtype}"
    matches = chosen.dtype == torch.bool and chosen.shape == state.known.shape
    require(matches, f"{said}, should be {tuple(state.known.shape)} torch.bool")
    chosen = chosen & ~waits & (state.known | state.masked)
    masked = chosen & state.masked
    return chosen | F.pad(masked[:, 1:], (0, 1)) if shifted else chosen, masked


def count(chosen, masked, state, left, policy):
    """Q, R, and each sequence's number of candidates: the one transfer to the host in a step.

    Candidates are the chosen masked positions of the block: only they may be committed. ValueError
    if a sequence has none though masked positions of its block are `left`.
    """
    name = type(policy).__name__
    sums = chosen.sum(dim=1), masked.sum(dim=1), masked[:, state.block].sum(dim=1)
    Q, R, candidates = torch.stack(sums).tolist()  # each a list by sequence
    idle = [b for b, n in enumerate(left) if n and not candidates[b]]
    place = f"block {state.block.start}:{state.block.stop} in step {state.step}, sequences {idle}"
    require(not idle, f"policy {name} chose no masked position of the unfinished {place}")
    return max(Q), max(R), candidates


def pack(chosen, masked, Q):
    """Chosen positions in rows of equal length, the masked ones first.  (B, T) -> 2 x (B, Q)

    A row of fewer than Q repeats its first position, and is not valid there: recomputing a position
    twice gives the same keys and values, so company changes no sequence. One that waits has no
    chosen position: its row repeats position 0, and `recompute` undoes what that writes.
    """
    order = (chosen.int() + masked.int()).argsort(dim=1, descending=True, stable=True)[:, :Q]
    valid = chosen.gather(1, order)
    return torch.where(valid, order, order[:, :1]), valid


def rows_before(hidden, positions, T):
    """For each position the row of the one before it, where that is recomputed too.

    hidden (B, Q, C), positions (B, Q) -> (B, Q, C). Position 0 has its own row.
    """
    rows = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    row_of = positions.new_zeros(len(positions), T).scatter(1, positions, rows)  # (B, Q) -> (B, T)
    before = row_of.gather(1, (positions - 1).clamp(min=0))
    return hidden.gather(1, before[..., None].expand_as(hidden))


def recompute(model, cache, R, uses_attention, tokens, positions, valid, padding=None):
    """One forward pass over positions (B, Q): all that a step wants to know of the model.

    Only what predicts the first R positions, the masked ones, passes the head. -> their logits
    (B, R, V), and the influence of every position, (B, T): without maps the same for all.
    """
    waits = ~valid.any(dim=1)[:, None, None]
    stored = [(tensor, tensor[:, :, 0].clone()) for tensor in (cache.k, cache.v)]
    hidden, maps = model.trunk(tokens, positions, cache, uses_attention, padding)
    for tensor, before in stored:  # a sequence that waits keeps its cache
        tensor[:, :, 0] = before.where(waits, tensor[:, :, 0])
    if model.config.shifted:
        hidden = rows_before(hidden, positions, tokens.shape[1])
    return model.head(hidden[:, :R]), attention_rollout(maps, positions, valid)


def predict(logits, config, temperature=0.0, generator=None):
    """Probability (Eq. 1) and id of each row's token.  (B, R, V) -> 2 x (B, R)

    The likeliest one, or one drawn from softmax(logits / temperature) by Gumbel noise, in float64
    as in LLaDA. [MASK] and ids without a token are never it, but keep their share of probability.
    """
    ids = torch.arange(logits.shape[-1], device=logits.device)
    excluded, score = (ids == config.mask_token_id) | (ids >= config.vocab_size), logits
    if temperature > 0:
        noise = torch.empty_like(logits, dtype=torch.float64).uniform_(generator=generator)
        score = logits - temperature * torch.log(-torch.log(noise))
    token = score.masked_fill(excluded, -torch.inf).argmax(dim=-1, keepdim=True)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, dim=-1, dtype=wide).gather(-1, token)[..., 0], token[..., 0]


def unmask(state, masked, confidence, sigma, tokens_per_step, threshold):
    """The positions committed in this step, of those in the block that are recomputed and `masked`.

    The tokens_per_step best by confidence, or by certainty prior if sigma is given; and, as in
    Fast-dLLM, all whose confidence exceeds the threshold, if there is one.  -> (B, T) bool
    """
    score = confidence if sigma is None else certainty_prior(confidence, state.known, sigma)
    candidates = masked & in_block(state)
    commit = best(score, candidates, tokens_per_step)
    return commit if threshold is None else commit | candidates & (confidence > threshold)


def end_at_eos(state, eos, prompt_length):
    """The state, with EOS after a response's first EOS, once nothing before that is masked."""
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
    recomputes what `policy` chooses and commits the tokens_per_step best of the block's masked
    positions among them: by confidence, or by certainty prior if sigma is given. With a threshold
    it also commits all others of them whose confidence exceeds it. [MASK] is never predicted, and
    at temperature 0 a sequence decodes alone as in company, but for round-off.
    Short prompts are padded on the left, where prompt_mask (B, P) is 0. stop_at_eos makes all that
    follows a sequence's first EOS token EOS once everything before it is decoded. A temperature
    above 0 draws tokens with `generator`, on the model's device, one for the whole batch.
    on_step(state, chosen) is called after every step with the new State and the positions (B, T)
    that were recomputed. graphs, a CudaGraphs of the model (bench.py), makes every step but the
    first a replay.
    Raises ValueError for arguments out of range and for a policy that leaves nothing to commit.
    """
    block_length = gen_length if block_length is None else block_length
    check_settings(model, gen_length, block_length, tokens_per_step, sigma, threshold, temperature,
                   generator)  # fmt: skip
    require(not graphs or graphs.model is model, "graphs should be CudaGraphs(model) of this model")
    prompt, padding = prompt_and_padding(model, prompt, gen_length, prompt_mask)
    (B, P), T = prompt.shape, prompt.shape[1] + gen_length
    config, weight = model.config, model.wte.weight
    state = blank_canvas(model, prompt, gen_length, padding)
    cache = graphs.cache(B, T) if graphs else KVCache(config, B, T, weight.device, weight.dtype)

    for start in range(P, T, block_length):
        state = replace(state, block=slice(start, start + block_length))
        left = state.masked[:, state.block].sum(dim=1).tolist()  # to be committed, by sequence
        while any(left):
            waits = ~state.masked[:, state.block].any(dim=1, keepdim=True)  # for other sequences
            chosen, masked = choose(policy, state, waits, config.shifted)
            Q, R, candidates = count(chosen, masked, state, left, policy)
            positions, valid = pack(chosen, masked, Q)
            # A graph of the first step would keep its T x T maps.
            run = graphs.recompute if graphs and state.step > 0 else recompute
            logits, influence = run(
                model, cache, R, policy.uses_attention, state.tokens, positions, valid, padding
            )
            confidence, token = predict(logits, config, temperature, generator)
            row = (masked.cumsum(dim=1) - 1).clamp(min=0)  # pack puts the masked ones first
            confidence = confidence.gather(1, row).where(masked, state.confidence)
            commit = unmask(state, masked, confidence, sigma, tokens_per_step, threshold)

            state = replace(
                state,
                tokens=token.gather(1, row).where(commit, state.tokens),
                known=state.known | commit,
                fresh=state.fresh.where(waits, commit),
                confidence=confidence,
                influence=state.influence.where(waits, influence),
                step=state.step + 1,
            )
            state = end_at_eos(state, config.eos_token_id, P) if stop_at_eos else state
            if threshold is None and not stop_at_eos:  # known without another transfer
                left = [n - min(m, tokens_per_step) for n, m in zip(left, candidates)]
            else:
                left = state.masked[:, state.block].sum(dim=1).tolist()
            if on_step is not None:
                on_step(state, chosen)
    return state.tokens


def settings(gen_length):
    """Arguments of `generate` by policy name: the paper's k and sigma, and Fast-dLLM's blocks.

    Below 256 tokens k and sigma shrink in proportion: a window much wider than k would spread stage
    1 too thin. Blocks have 32 tokens, below 128 tokens 16, or the next smaller divisor.
    """
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
    """Positions by COLOURS in the last of a sequence's steps: why recomputed, and which decoded."""
    state, chosen = steps[-1]
    masked, known = state.masked | state.fresh, state.known & ~state.fresh  # before it
    fresh = steps[-2][0].fresh if len(steps) > 1 else torch.zeros_like(known)
    where = (chosen & masked, chosen & known & fresh, chosen & known & ~fresh, state.fresh)
    return {mark: cells[0].nonzero()[:, 0].tolist() for mark, cells in zip(COLOURS, where)}


def draw_map(steps, policy):
    """The decode of one sequence as SVG: steps down, positions across."""
    P, T, S = steps[0][0].block.start, steps[0][0].tokens.shape[1], len(steps)
    cells, em = dict.fromkeys(COLOURS, ""), T / 60
    for y in range(S):
        for mark, positions in marks(steps[: y + 1]).items():
            cells[mark] += "".join(f"M{x} {y}h1v1h-1z" for x in positions)
    ours = {"masked": " (certainty prior)", "known": " (attention rollout)"}
    reasons = ours if isinstance(policy, D2Cache) else {}
    paths = [f'<path fill="{COLOURS[mark][0]}" d="{cells[mark]}"/>' for mark in cells]
    legend = [
        f'<tspan fill="{COLOURS[mark][0]}">■</tspan> {mark}{reasons.get(mark, "")} \u2003'
        for mark in COLOURS
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" style="background: #fff" '
        f'font-size="{em}" viewBox="{-em} {-2 * em} {T + 2 * em} {S + 5 * em}">\n'
        f'<path fill="#eee" d="M0 0h{T}v{S}h-{T}z"/>\n{"".join(paths)}\n'
        f'<text y="{-em / 2}">prompt</text><text x="{P}" y="{-em / 2}">response</text>\n'
        f'<text y="{S + 2 * em}">{"".join(legend)}</text>\n</svg>\n'
    )


def draw_screen(steps, tokenizer):
    """The canvas of one sequence as text, in a terminal's colours."""
    state, colours = steps[-1][0], {}
    for mark, positions in marks(steps).items():
        colours |= dict.fromkeys(positions, COLOURS[mark][1])
    texts = [tokenizer.decode([id], skip_special_tokens=False) for id in state.tokens[0].tolist()]
    texts = [text if known else " _" for text, known in zip(texts, state.known[0].tolist())]
    coloured = (f"\033[{colours.get(i, 0)}m{text}\033[0m" for i, text in enumerate(texts))
    return "".join(coloured).replace("\n", "\033[K\n")  # nothing is left of a longer line


def main():
    """Print the decoded answer to a prompt; a terminal with colours shows the canvas filling.

    A mistake ends in one line and exit code 2.
    """
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
            time.sleep(0.05 * (args.model == EMBEDDED_MODEL))  # which is faster than the eye

    try:
        require(args.gen_length >= 1, f"--gen-length is {args.gen_length}, should be at least 1")
        folder = Path(args.map or "here").resolve().parent
        require(folder.is_dir(), f"--map {args.map}: there is no folder {folder}")
        tokenizer = load_tokenizer(args.model)
        prompt = encode_prompt(tokenizer, args.prompt)
        model = Transformer.from_pretrained(args.model, args.device)
        arguments = settings(args.gen_length)[args.policy]
        tokens = generate(model, prompt, args.gen_length, on_step=observe, **arguments)
        if args.map:
            Path(args.map).write_text(draw_map(steps, arguments["policy"]), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    print(decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.eos_token_id))
    share = sum(chosen.float().mean().item() for _, chosen in steps) / len(steps)
    print(f"{len(steps)} forwards, {share:.1%} of positions recomputed", file=sys.stderr)


if __name__ == "__main__":
    main()
