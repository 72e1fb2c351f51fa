"""d2Cache: decode a masked diffusion language model, recomputing only the positions that matter.

A step of plain decoding recomputes all T positions of the canvas to commit one token. Here every
step asks a policy which positions to recompute; all other keys and values come from the cache.
d2Cache answers with (1) the masked positions about to be decoded, by certainty prior, (2) the known
positions that carry the attention, by attention rollout, (3) the positions decoded just before.
Uncached decoding, prefix cache and dual cache are other answers, so one forward pass and one
decoding loop serve them all.

Paper: arXiv 2509.23094; equation numbers are its first version's. Shape letters as in model.py:
B sequences, T positions, P of them prompt, Q recomputed, R of these predicted, L layers.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from model import KVCache, Transformer, decode_response, encode_prompt, load_tokenizer, require

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F

# ---- The equations -------------------------------------------------------------------------------


def certainty_density(known, sigma, dtype=torch.float32):
    """Share of known positions around each one, in a Gaussian window of sigma positions.  Eq. 3.

    D(i) = sum over known j of exp(-(i - j)^2 / (2 sigma^2)), divided by the window's mass over all
    distances that a canvas of T has, -(T - 1) to T - 1: a constant, so it changes no ranking. As in
    the paper j is any position of the canvas (in the authors' code, of the response).
    (B, T) bool -> (B, T) in [0, 1]
    """
    T = known.shape[1]
    reach = math.ceil(min(T - 1, 40 * sigma))  # further away the Gaussian is 0, even in float64
    distance = torch.arange(-reach, reach + 1, device=known.device, dtype=dtype)
    window = torch.exp(-((distance / sigma) ** 2) / 2)

    padded = F.pad(known.to(dtype), (reach, reach))
    around = padded.unfold(1, len(window), 1)  # (B, T + 2 reach) -> (B, T, 2 reach + 1)
    return (around @ window / window.sum()).clamp(max=1)  # round-off may go beyond


def certainty_prior(confidence, known, sigma):
    """Confidence times certainty density: sure, and sure of its surroundings.  (B, T) -> (B, T)"""
    return confidence * certainty_density(known, sigma, confidence.dtype)


def attention_rollout(maps, positions, valid):
    """Influence of each position on the last layer's output: column sums of W_L ... W_1.  Eq. 6-9.

    W_l = rownormalise(A_l + I). Row i of A_l is the attention of position i, if it was recomputed;
    if not, row i of W_l is that of the identity. The paper multiplies these T x T matrices. Their
    column sums are all it needs, though: the row vector 1 W_L ... W_1. So start with v = 1 and
    multiply from the left, v <- v W_l, from the last layer to the first. There position i hands v_i
    on along row i of W_l: one half stays, by I, the other half goes where it attends, by A_l. A
    position that was not recomputed keeps all of it.
    maps (L, B, Q, T); positions (B, Q), repeats where not valid.  -> (B, T), rows sum to T
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    influence = maps.new_ones(maps.shape[1], maps.shape[3])  # v
    for attention in reversed(maps.unbind()):  # the recomputed rows of A_l, (B, Q, T)
        held = influence.gather(1, positions) * valid  # (B, T) -> (B, Q)
        half = held / (1 + attention.sum(dim=2))  # a row of A_l sums to 1, but for round-off
        received = (half[:, None] @ attention)[:, 0]  # (B, Q) -> (B, T)
        influence = influence.scatter_add(1, positions, half - held)  # the other half leaves
        influence = influence + received
    return influence


def nucleus(score, p, among):
    """The smallest set of positions `among` whose share of their summed score exceeds p.

    p = 0 is the one highest score, p = 1 all of `among`. As in the paper: the position that crosses
    p is in (the authors' code leaves it out).  score (B, T) >= 0, among (B, T) bool -> (B, T) bool
    """
    if p == 1:  # not left to sums: round-off would lose the tail
        return among

    score = score.masked_fill(~among, -1)  # the others rank last
    ranked, order = score.sort(dim=1, descending=True, stable=True)
    mass = ranked.clamp(min=0).cumsum(dim=1)  # of each rank and those above it
    mass_above = F.pad(mass[:, :-1], (1, 0))
    inside = (mass_above <= p * mass[:, -1:]) & (ranked > 0)
    inside[:, 0] = True  # one, even if all scores are zero
    return torch.zeros_like(among).scatter(1, order, inside) & among  # from ranks to positions


def highest(score, among, n):
    """Of the positions `among`, the n of highest score; of equal ones the first.  n int or (B, 1)

    score (B, T), finite; among (B, T) bool -> (B, T) bool
    """
    score = score.masked_fill(~among, -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)  # rank -> position
    rank = order.argsort(dim=1)  # the inverse: position -> rank, 0 for the highest
    return among & (rank < n)


# ---- State and policies --------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """The canvas between two steps: all that a policy may look at. Tensors are (B, T).

    `fresh`, `chosen` and `influence` are about the last step, the one that made this state; `block`
    is about the next one.
    """

    tokens: torch.Tensor  # [MASK] where masked, and wherever the prompt holds one
    known: torch.Tensor  # prompt or decoded, whatever the token is
    fresh: torch.Tensor  # decoded in the last step: the cached key and value still say [MASK]
    confidence: torch.Tensor  # of the token predicted last; decoded positions keep theirs. Eq. 1
    influence: torch.Tensor  # attention rollout of the last step, if the policy uses it
    block: torch.Tensor  # being decoded: the first with a masked position; nothing if finished
    step: int  # steps done
    padding: torch.Tensor | None = None  # before short prompts: neither known nor masked
    chosen: torch.Tensor | None = None  # recomputed in the last step; None before the first

    @property
    def masked(self):
        """Positions still to be decoded.  (B, T) bool"""
        if self.padding is None:
            return ~self.known
        return ~(self.known | self.padding)

    @property
    def block_starts(self):
        """Sequences with no token of their block decoded yet; finished ones too.  (B, 1) bool"""
        return ~(self.block & self.known).any(dim=1, keepdim=True)


# A policy has two things: `choose`, from a State to the positions to recompute, (B, T) bool, and
# `uses_attention`, whether it looks at state.influence. In every sequence that is not finished it
# must choose a masked position of the block. The first step recomputes everything without asking.
# What is chosen in padding, or in a finished sequence, is ignored. It may have a `recompute` of its
# own, which takes the place of the function below.


@dataclass(frozen=True)
class RecomputeAll:
    """Vanilla decoding: no cache at all."""

    uses_attention = False

    def choose(self, state):
        return torch.ones_like(state.known)


@dataclass(frozen=True)
class PrefixCache:
    """Fast-dLLM: everything when a block starts, then the block and all that follows it."""

    uses_attention = False

    def choose(self, state):
        from_block_on = state.block.cumsum(dim=1) > 0
        return state.block_starts | from_block_on


@dataclass(frozen=True)
class DualCache:
    """Fast-dLLM: everything when a block starts, then the block alone."""

    uses_attention = False

    def choose(self, state):
        return state.block_starts | state.block


@dataclass(frozen=True)
class DelayedCache:
    """dKV-Cache-Decode, arXiv 2505.15781: every masked position, and the fresh ones.

    Everything in a block's first two steps, and whenever `interval` more of its tokens are decoded.
    """

    interval: int = 8
    uses_attention = False

    def __post_init__(self):
        require(self.interval >= 1, f"{self} should have interval >= 1")

    def choose(self, state):
        decoded = (state.block & state.known).sum(dim=1, keepdim=True)
        decoded_before = decoded - (state.block & state.fresh).sum(dim=1, keepdim=True)
        first_two = decoded_before == 0
        due = decoded // self.interval > decoded_before // self.interval
        return first_two | due | state.masked | state.fresh


@dataclass(frozen=True)
class SlidingWindow:
    """The plainest control, ours: the block's first `width` masked positions, and the fresh ones."""

    width: int = 4
    uses_attention = False

    def __post_init__(self):
        require(self.width >= 1, f"{self} should have width >= 1")

    def choose(self, state):
        to_decode = state.block & state.masked
        window = to_decode & (to_decode.cumsum(dim=1) <= self.width)
        return window | state.fresh


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
        inside = highest(prior, state.masked & state.block, self.k)
        remaining = self.k - inside.sum(dim=1, keepdim=True)
        return inside | highest(prior, state.masked & ~state.block, remaining)

    def attended(self, state):
        """Stage 2, Eq. 9: the nucleus of influence among prompt and decoded positions."""
        return nucleus(state.influence, self.p, among=state.known)


# ---- One step ------------------------------------------------------------------------------------


def choose_positions(policy, state, shifted):
    """The positions recomputed in this step, and those of them predicted.  2 x (B, T) bool

    Predicted are the masked ones that the policy chose. With `shifted` logits, Dream's, the row
    before each of them is recomputed too: it makes the prediction.
    """
    if state.step == 0:
        chosen = torch.ones_like(state.known)
    else:
        chosen = policy.choose(state)
    check_choice(policy, chosen, state)

    unfinished = state.block.any(dim=1, keepdim=True)
    chosen = chosen & unfinished & (state.known | state.masked)
    predicted = chosen & state.masked
    if shifted:
        chosen = chosen | F.pad(predicted[:, 1:], (0, 1))
    return chosen, predicted


def check_choice(policy, chosen, state):
    """ValueError unless what a policy chose is a mask of the canvas."""
    shape = tuple(state.known.shape)
    said = f"step {state.step + 1}: policy {type(policy).__name__} chose a {type(chosen).__name__}"
    require(torch.is_tensor(chosen), f"{said}, should be a {shape} tensor of booleans")
    said = f"{said} {tuple(chosen.shape)} {chosen.dtype}, should be {shape} torch.bool"
    require(chosen.dtype == torch.bool and chosen.shape == shape, said)


def count_and_check(policy, state, chosen, predicted):
    """Q and R: the most positions that any sequence recomputes, and predicts, in this step.

    The one transfer from device to host in a step. So it also tells whether the logits that made
    `state` were finite, and whether the policy keeps its contract. ValueError if not.
    """
    candidate = (predicted & state.block).any(dim=1)
    finished = ~state.block.any(dim=1)
    numbers = [
        chosen.sum(dim=1).max(),
        predicted.sum(dim=1).max(),
        ~state.confidence.isnan().any(),  # NaN marks logits that were not finite: see `predict`
        (candidate | finished).all(),
    ]
    Q, R, finite, lawful = torch.stack(numbers).tolist()

    said = "NaN or infinite weights, or numbers too large for their dtype"
    require(finite, f"the logits of step {state.step} are not finite: {said}")
    said = f"policy {type(policy).__name__} chose no masked position of an unfinished block"
    require(lawful, f"{said} in step {state.step + 1}")
    return Q, R


def pack(chosen, predicted, Q):
    """Chosen positions in Q rows for each sequence, the predicted ones first: R rows get logits.

    A sequence with fewer than Q repeats its first position in the rows that are left, which are not
    valid: to compute a position twice gives the same keys and values. A finished sequence repeats
    position 0.  2 x (B, T) bool -> positions (B, Q), valid (B, Q) bool
    """
    priority = chosen.int() + predicted.int()  # predicted 2, only recomputed 1
    order = priority.argsort(dim=1, descending=True, stable=True)[:, :Q]
    valid = chosen.gather(1, order)
    return order.where(valid, order[:, :1]), valid


def unpack(packed, predicted):
    """What `pack` put into the first R rows, back at the predicted positions.  (B, R) -> (B, T)

    At other positions the values mean nothing.
    """
    row = (predicted.cumsum(dim=1) - 1).clamp(min=0)
    return packed.gather(1, row)


def rows_before(hidden, positions, valid, R, T):
    """Dream: the hidden states that predict the first R positions.  (B, Q, C) -> (B, R, C)

    They stand in the row of position - 1; position 0 is predicted by its own.
    """
    B, Q, C = hidden.shape
    row = torch.arange(Q, device=hidden.device).expand(B, Q)
    row = row.where(valid, 0)  # a repeat is a copy of row 0
    row_of = torch.zeros(B, T, dtype=row.dtype, device=row.device)  # position -> row
    row_of = row_of.scatter(1, positions, row)

    before = (positions[:, :R] - 1).clamp(min=0)
    wanted = row_of.gather(1, before)  # (B, R)
    return hidden.gather(1, wanted[:, :, None].expand(B, R, C))


def recompute(model, cache, R, uses_attention, tokens, positions, valid, padding):
    """One forward pass over positions (B, Q), of which the first R are predicted.

    -> logits (B, R, V), and the influence (B, T), or None unless the policy uses attention
    """
    hidden, maps = model.hidden_states(tokens, positions, cache, uses_attention, padding)
    if model.config.shifted:
        logits = model.head(rows_before(hidden, positions, valid, R, tokens.shape[1]))
    else:
        logits = model.head(hidden[:, :R])

    influence = attention_rollout(maps, positions, valid) if uses_attention else None
    return logits, influence


def predict(logits, config, temperature=0.0, generator=None):
    """Probability (Eq. 1) and id of each row's token.  (B, R, V) -> 2 x (B, R)

    The likeliest token, or one drawn from softmax(logits / temperature). [MASK] and ids without a
    token are never predicted, but keep their share of probability. The probability is that of
    temperature 1; NaN if the logits of the row are not all finite.
    """
    score = logits
    if temperature > 0:  # Gumbel: the arg-max of logits - temperature log(-log u) is such a draw
        exact = torch.float64  # as LLaDA does
        if logits.device.type == "mps":
            exact = torch.float32  # has no float64
        noise = torch.empty_like(logits, dtype=exact).uniform_(generator=generator)
        score = logits - temperature * torch.log(-torch.log(noise))

    ids = torch.arange(logits.shape[-1], device=logits.device)
    excluded = (ids == config.mask_token_id) | (ids >= config.vocab_size)
    token = score.masked_fill(excluded, -torch.inf).argmax(dim=-1)

    wide = torch.promote_types(logits.dtype, torch.float32)
    probability = torch.softmax(logits, dim=-1, dtype=wide)
    confidence = probability.gather(-1, token[..., None])[..., 0]
    return confidence.where(logits.isfinite().all(dim=-1), torch.nan), token


def unmask(state, predicted, confidence, sigma, tokens_per_step, threshold):
    """Which predicted positions of the block to commit.  -> (B, T) bool

    The tokens_per_step of highest confidence, or of highest certainty prior if there is a sigma;
    and all whose confidence reaches the threshold, if there is one.
    """
    score = confidence
    if sigma is not None:
        score = certainty_prior(confidence, state.known, sigma)
    candidates = predicted & state.block
    commit = highest(score, candidates, tokens_per_step)
    if threshold is not None:
        commit = commit | (candidates & (confidence >= threshold))
    return commit


def end_at_eos(state, config, prompt_length):
    """The state, with all that follows the end of a response made EOS, and known.

    The end is the first token of config.end_ids, EOS or end of turn, once none before it is masked.
    """
    ends = torch.zeros_like(state.known)
    for id in config.end_ids:
        ends = ends | (state.tokens == id)
    ends = ends & (state.masked.cumsum(dim=1) == 0)  # everything up to here is decoded
    ends[:, :prompt_length] = False
    after_end = F.pad(ends.cumsum(dim=1)[:, :-1] > 0, (1, 0))

    return replace(
        state,
        tokens=state.tokens.masked_fill(after_end, config.eos_token_id),
        known=state.known | after_end,
        fresh=state.fresh | (after_end & state.masked),
    )


# ---- The loop ------------------------------------------------------------------------------------


def current_block(masked, block_length, prompt_length):
    """Each sequence's first block of the response with a masked position.  (B, T) -> (B, T) bool"""
    blocks = masked[:, prompt_length:].unflatten(1, (-1, block_length))
    unfinished = blocks.any(dim=2)  # (B, blocks)
    first = unfinished & (unfinished.cumsum(dim=1) == 1)  # the count is 1 until the second
    return F.pad(first.repeat_interleave(block_length, dim=1), (prompt_length, 0))


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_prompt(prompt, prompt_mask, gen_length, config):
    """ValueError unless prompt and mask fit, and leave room for gen_length tokens."""
    require(torch.is_tensor(prompt), f"prompt is {type(prompt)}, should be (B, P) integers")
    shape = tuple(prompt.shape)
    fits = prompt.dtype in INTEGERS and len(shape) == 2 and shape[0] > 0
    require(fits, f"prompt is {shape} {prompt.dtype}, should be (B, P) integers")

    ids = prompt.long()
    valid = (ids >= 0) & (ids < config.vocab_size) | (ids == config.mask_token_id)
    wrong = ids[~valid].tolist()
    require(not wrong, f"prompt holds ids {wrong[:5]}, should be 0 to {config.vocab_size - 1}")

    T = config.max_sequence_length
    room = T - shape[1]
    require(room >= 1, f"prompt has {shape[1]} tokens, should leave room for more: T is up to {T}")
    said = f"gen_length is {gen_length} after a prompt of {shape[1]}, should be from 1 to {room}"
    require(isinstance(gen_length, int) and 1 <= gen_length <= room, said)

    if prompt_mask is not None:
        require(torch.is_tensor(prompt_mask), f"prompt_mask is {type(prompt_mask)}, no tensor")
        real = prompt_mask.bool()
        padded_left = real.shape == prompt.shape and (real[:, 1:] >= real[:, :-1]).all()
        said = f"prompt_mask {tuple(real.shape)} should be {shape}, in each row zeros (padding),"
        require(padded_left and real[:, -1:].all(), f"{said} then at least one 1")


def check_settings(gen_length, block_length, tokens_per_step, policy, sigma, threshold):
    """ValueError, with the value and what would be right, for settings of `decode` out of range."""
    whole = isinstance(block_length, int) and block_length >= 1
    said = f"block_length is {block_length}, should divide gen_length {gen_length}"
    require(whole and gen_length % block_length == 0, said)

    whole = isinstance(tokens_per_step, int) and tokens_per_step >= 1
    require(whole, f"tokens_per_step is {tokens_per_step}, should be at least 1")

    chooses = hasattr(policy, "choose") and hasattr(policy, "uses_attention")
    said = f"policy is {policy!r}, should be an object like DualCache(), with choose and"
    require(chooses and not isinstance(policy, type), f"{said} uses_attention")

    require(sigma is None or sigma > 0, f"sigma is {sigma}, should be above 0")
    in_range = threshold is None or 0 <= threshold <= 1
    require(in_range, f"threshold is {threshold}, should be from 0 to 1, or None")


def check_sampling(temperature, generator, device):
    """ValueError unless temperature and generator can draw tokens on the device."""
    require(0 <= temperature < math.inf, f"temperature is {temperature}, should be at least 0")
    if temperature > 0:
        said = f"generator is {generator} at temperature {temperature}, should be a torch.Generator"
        fits = isinstance(generator, torch.Generator) and generator.device.type == device.type
        require(fits, f"{said} of device {device.type!r}")


def blank_canvas(model, prompt, prompt_mask, gen_length):
    """The state before the first step, on the model's device; its block is still empty."""
    weight = model.wte.weight
    prompt = prompt.to(weight.device).long()
    not_padding = torch.ones_like(prompt, dtype=torch.bool)
    if prompt_mask is not None:
        not_padding = prompt_mask.to(weight.device).bool()

    known = F.pad(not_padding, (0, gen_length), value=False)
    padding = F.pad(~not_padding, (0, gen_length), value=False)
    wide = torch.promote_types(weight.dtype, torch.float32)
    zeros = torch.zeros(known.shape, device=weight.device, dtype=wide)
    return State(
        tokens=F.pad(prompt, (0, gen_length), value=model.config.mask_token_id),
        known=known,
        fresh=torch.zeros_like(known),
        confidence=zeros,
        influence=torch.ones_like(zeros),
        block=torch.zeros_like(known),
        step=0,
        padding=padding if padding.any() else None,  # without, attention runs faster
    )


@torch.no_grad()
def decode(
    model,
    prompt,
    gen_length,
    block_length=None,
    tokens_per_step=1,
    policy=RecomputeAll(),
    sigma=None,
    prompt_mask=None,
    threshold=None,
    stop_at_eos=False,
    temperature=0.0,
    generator=None,
    forward=recompute,
):
    """Decode gen_length tokens after each prompt, (B, P) integers: yields the State of every step.

    A step recomputes the positions that `policy` chooses, and predicts the masked ones of these. Of
    the predicted positions in each sequence's block it commits the tokens_per_step best ones.

    block_length     positions of a block; blocks are decoded from left to right (None: one block)
    sigma            best is by certainty prior with this sigma (None: by confidence)
    threshold        commit every predicted position of this confidence too, as Fast-dLLM does
    prompt_mask      (B, P), 0 where a short prompt is padded on the left; without sampling, each
                     sequence decodes as it does alone
    stop_at_eos      once all before a response's first end token is decoded, all after it is EOS
    temperature      above 0: draw tokens, with `generator`, a torch.Generator for the whole batch
    forward          in place of `recompute`: bench.py replays CUDA graphs there

    Raises ValueError for arguments out of range, when the first state is asked for; for a policy
    that breaks its contract; and for logits that are not finite.
    """
    if block_length is None:
        block_length = gen_length
    check_prompt(prompt, prompt_mask, gen_length, model.config)
    check_settings(gen_length, block_length, tokens_per_step, policy, sigma, threshold)
    weight = model.wte.weight
    check_sampling(temperature, generator, weight.device)

    P = prompt.shape[1]
    forward = getattr(policy, "recompute", forward)  # a policy's own goes first
    state = blank_canvas(model, prompt, prompt_mask, gen_length)
    cache = KVCache(model.config, *state.tokens.shape, weight.device, weight.dtype)
    while True:
        state = replace(state, block=current_block(state.masked, block_length, P))
        chosen, predicted = choose_positions(policy, state, model.config.shifted)
        Q, R = count_and_check(policy, state, chosen, predicted)
        if state.step > 0:
            yield state  # no sooner: only now it is known that its logits were finite
        if Q == 0:  # every sequence is finished
            return

        positions, valid = pack(chosen, predicted, Q)
        logits, influence = forward(
            model, cache, R, policy.uses_attention, state.tokens, positions, valid, state.padding
        )
        if influence is None:
            influence = state.influence

        confidence, token = predict(logits, model.config, temperature, generator)
        confidence = unpack(confidence, predicted).where(predicted, state.confidence)
        commit = unmask(state, predicted, confidence, sigma, tokens_per_step, threshold)
        state = replace(
            state,
            tokens=unpack(token, predicted).where(commit, state.tokens),
            known=state.known | commit,
            fresh=commit,
            confidence=confidence,
            influence=influence.where(chosen.any(dim=1, keepdim=True), state.influence),
            step=state.step + 1,
            chosen=chosen,
        )
        if stop_at_eos:
            state = end_at_eos(state, model.config, P)


def generate(
    model,
    prompt,
    gen_length,
    block_length=None,
    tokens_per_step=1,
    policy=RecomputeAll(),
    sigma=None,
    prompt_mask=None,
    threshold=None,
    stop_at_eos=False,
    temperature=0.0,
    generator=None,
):
    """Prompts and responses when `decode`, which explains the arguments, is done.

    prompt (B, P) integers -> (B, P + gen_length) token ids
    """
    for state in decode(
        model,
        prompt,
        gen_length,
        block_length,
        tokens_per_step,
        policy,
        sigma,
        prompt_mask,
        threshold,
        stop_at_eos,
        temperature,
        generator,
    ):
        pass
    return state.tokens


# ---- The command line ----------------------------------------------------------------------------

EMBEDDED_MODEL = Path(__file__).parent / "tests" / "tiny"
EXAMPLE = (
    "Ben has 30 pens. On Monday Ben buys 5 pens at the shop. On Tuesday Ben loses 8 pens at the "
    "park. On Wednesday Ben wins 4 more pens at the school. How many pens does Ben have now?"
)
COLOURS = {  # of `roles` in a terminal; where a position has several, the last one shows
    "attended": "97;44",
    "fresh": "97;41",
    "candidates": "30;43",
    "committed": "30;42",
}


def settings(gen_length):
    """Arguments of `generate` by policy name: the paper's, scaled down for short responses."""
    k = min(32, max(1, gen_length // 8))
    sigma = min(10.0, 10 * gen_length / 256)
    longest = 32 if gen_length >= 128 else 16
    block_length = max(n for n in range(1, longest + 1) if gen_length % n == 0)
    return {
        "vanilla": dict(policy=RecomputeAll()),
        "prefix": dict(policy=PrefixCache(), block_length=block_length),
        "dual": dict(policy=DualCache(), block_length=block_length),
        "delayed": dict(policy=DelayedCache(), block_length=block_length),
        "window": dict(policy=SlidingWindow(), sigma=sigma),
        "d2cache": dict(policy=D2Cache(k=k, p=0.1, sigma=sigma), sigma=sigma),
    }


def load_policy(text):
    """The policy of "FILE.py:Name" or "FILE.py:Name(k=8)"; ValueError says why there is none."""
    file, separator, call = text.partition(".py:")
    require(separator, f"policy is {text!r}, should be FILE.py:Name or FILE.py:Name(k=8)")
    spec = importlib.util.spec_from_file_location("policy_of_" + Path(file).stem, file + ".py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
        policy = eval(call, vars(module))  # to be trusted as much as the file itself
        if isinstance(policy, type):
            policy = policy()
    except (Exception, SystemExit) as error:
        raise ValueError(f"policy {text}: {type(error).__name__}: {error}") from error
    contract = callable(getattr(policy, "choose", None)) and hasattr(policy, "uses_attention")
    require(contract, f"policy {text}: {policy!r} should have choose(state) and uses_attention")
    return policy


def roles(before, state):
    """The reason for each recomputed position, and what was decoded.  -> {name: (B, T) bool}

    `before` is the state that the step started from, None for the first. "candidates" are all
    recomputed positions that were masked, "attended" those known for longer than a step: in a full
    refresh the whole prompt, and for Dream the rows that were recomputed to predict the next one.
    """
    committed = state.fresh
    candidates = state.chosen & (state.masked | committed)
    fresh = torch.zeros_like(candidates)
    if before is not None:
        fresh = state.chosen & before.fresh
    return {
        "attended": state.chosen & ~candidates & ~fresh,
        "fresh": fresh,
        "candidates": candidates,
        "committed": committed,
    }


def places(positions):
    """How many positions of one sequence, (T,) bool, and which: "9: 0-6 11 13"; or "0"."""
    runs = []
    for i in positions.nonzero()[:, 0].tolist():
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if not words:
        return "0"
    return " ".join([f"{positions.sum().item()}:", *words])


TRACE = "{:>4}  {:<30}  {:<14}  {:<8}  {}"
TRACE_TITLES = ("step", "committed, confidence, prior", "candidates", "fresh", "attended")


def trace(before, state, sigma, tokenizer, end_ids=()):
    """A step of one sequence as a line: what it committed, how sure, and what it recomputed.

    With end_ids, if decoding stops there, what was made EOS behind the end is only counted.
    """
    role = {name: positions[0] for name, positions in roles(before, state).items()}
    prior = certainty_prior(state.confidence, state.known & ~state.fresh, sigma)[0]
    commits = []
    for i in role["committed"].nonzero()[:, 0].tolist():
        id = state.tokens[0, i].item()
        text = tokenizer.decode([id], skip_special_tokens=False)
        commits.append(f"{i} {text!r} {state.confidence[0, i]:.3f} {prior[i]:.3f}")
        if id in end_ids and not state.masked[0, :i].any():
            commits.append(f"and {state.fresh[0, i + 1 :].sum()} behind it")
            break
    reasons = [places(role[name]) for name in ("candidates", "fresh", "attended")]
    return TRACE.format(state.step, ", ".join(commits), *reasons)


def draw_screen(before, state, tokenizer, share):
    """The canvas of one sequence as text in a terminal's colours; share is recomputed so far."""
    colour = {}
    for name, positions in roles(before, state).items():
        for i in positions[0].nonzero()[:, 0].tolist():
            colour[i] = COLOURS[name]

    screen = ""
    for i, (id, known) in enumerate(zip(state.tokens[0].tolist(), state.known[0].tolist())):
        text = tokenizer.decode([id], skip_special_tokens=False) if known else " _"
        screen += f"\033[{colour.get(i, 0)}m{text}\033[0m"

    # Below the canvas: of one taller than the terminal the end stays in sight.
    screen += f"\n\nstep {state.step}, {share:.1%} of the positions recomputed so far\n"
    for name, code in COLOURS.items():
        screen += f"\033[{code}m{name}\033[0m "
    screen += "plain: from the cache"
    return screen.replace("\n", "\033[K\n")  # nothing is left of a longer line


def main():
    """Print the decoded answer to a prompt; a terminal with colours shows the canvas filling."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", default=EMBEDDED_MODEL, help="checkpoint folder or hub id")
    add("--revision", help="of the hub's repository: branch, tag or commit")
    add("--dtype", help="float32, bfloat16 ... instead of the checkpoint's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--prompt", default=EXAMPLE, help="the user's text")
    add("--gen-length", default=64, type=int, help="tokens to decode (64)")
    add("--policy", default="d2cache", help=f"{', '.join(settings(1))} or FILE.py:Name(k=8)")
    add("--block-length", type=int, help="decode in blocks of so many tokens, by confidence")
    add("--threshold", type=float, help="commit every token at least so confident, too")
    add("--temperature", default=0.0, type=float, help="draw tokens (0: take the likeliest)")
    add("--seed", default=0, type=int, help="of these draws")
    add("--stop-at-eos", action="store_true", help="stop where the answer ends")
    add("--trace", action="store_true", help="print what every step commits and recomputes")
    add("--delay", default=0.05, type=float, help="seconds between two steps on the screen (0.05)")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every answer
    try:
        answer, summary = run(args)
        print(answer, flush=True)
    except BrokenPipeError:  # who reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        parser.error(" ".join(str(error).split()))
    print(summary, file=sys.stderr)


def out_of_memory(error):
    """Whether an error of torch's says so; others are bugs, and keep their traceback."""
    said = ("out of memory", "not enough memory", "can't allocate memory")
    return any(words in str(error) for words in said)


def run(args):
    """The answer, and a line about the work, as the command line asks."""
    require(args.gen_length >= 1, f"--gen-length is {args.gen_length}, should be at least 1")
    require(0 <= args.delay < 60, f"--delay is {args.delay}, should be from 0 to 60 seconds")
    require(0 <= args.seed < 2**63, f"--seed is {args.seed}, should be from 0 to 2**63 - 1")
    arguments = decode_arguments(args)
    tokenizer = load_tokenizer(args.model, args.revision)
    prompt = encode_prompt(tokenizer, args.prompt)
    model = Transformer.from_pretrained(args.model, args.device, args.dtype, args.revision)
    if args.temperature > 0:
        arguments["generator"] = torch.Generator(args.device).manual_seed(args.seed)
    watched = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not args.trace
    sigma = settings(args.gen_length)["d2cache"]["sigma"]
    end_ids = model.config.end_ids if args.stop_at_eos else ()

    before = None
    recomputed = 0.0
    if args.trace:
        print(TRACE.format(*TRACE_TITLES))
    for state in decode(model, prompt, args.gen_length, **arguments):
        recomputed += state.chosen.float().mean().item()
        if args.trace:
            print(trace(before, state, sigma, tokenizer, end_ids))
        if watched:
            screen = draw_screen(before, state, tokenizer, recomputed / state.step)
            print(f"\033[H{screen}\033[J", flush=True)
            time.sleep(args.delay)
        before = state

    answer = decode_response(tokenizer, state.tokens[0, prompt.shape[1] :], model.config.end_ids)
    share = recomputed / state.step
    return answer, f"{state.step} forwards, {share:.1%} of positions recomputed"


def decode_arguments(args):
    """Arguments of `decode` for the policy, the order and the sampling that the command line names.

    A policy from a file commits by certainty prior, as d2Cache does. With --block-length every
    policy commits by confidence.
    """
    ours = settings(args.gen_length)
    if args.policy in ours:
        arguments = ours[args.policy]
    else:
        said = f"policy is {args.policy!r}, should be {', '.join(ours)} or FILE.py:Name(k=8)"
        require(".py:" in args.policy, said)
        arguments = {"policy": load_policy(args.policy), "sigma": ours["d2cache"]["sigma"]}
    if args.block_length is not None:
        arguments |= {"block_length": args.block_length, "sigma": None}
    arguments |= {"threshold": args.threshold, "temperature": args.temperature}
    return arguments | {"stop_at_eos": args.stop_at_eos}


if __name__ == "__main__":
    main()
