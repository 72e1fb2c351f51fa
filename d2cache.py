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
from functools import partial
from pathlib import Path

from model import DTYPES, KVCache, Transformer, decode_response, encode_prompt, load_tokenizer
from model import require

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F

# ---- The equations -------------------------------------------------------------------------------


def certainty_density(known, sigma, dtype=torch.float32):
    """Share of known positions around each one, in a Gaussian window of sigma positions.  Eq. 3.

    D(i) = sum over known j of exp(-(i - j)^2 / (2 sigma^2)), divided by that sum over all distances
    from -(T - 1) to T - 1: a constant, which brings it into [0, 1] and changes no ranking. As in
    the paper j is any position of the canvas (in the authors' code, of the response).
    (B, T) bool -> (B, T) in [0, 1]

    For known 1 1 0 0 and sigma 1 the window is 1 at distance 0, then .607, .135 and .011 on either
    side, 2.506 in all. The third position has (.607 + .135) / 2.506 = .30, all four .64 .64 .30 .06
    """
    T = known.shape[1]
    reach = math.ceil(min(T - 1, 40 * sigma))  # further away the Gaussian is 0, even in float64
    distance = torch.arange(-reach, reach + 1, device=known.device, dtype=dtype)
    window = torch.exp(-0.5 * (distance / sigma) ** 2)

    padded = F.pad(known.to(dtype), (reach, reach))
    around = padded.unfold(1, len(window), 1)  # (B, T + 2 reach) -> (B, T, 2 reach + 1)
    return (around @ window / window.sum()).clamp(max=1)  # round-off may go beyond


def certainty_prior(confidence, known, sigma):
    """Confidence times certainty density: sure, and sure of its surroundings.  (B, T) -> (B, T)"""
    return confidence * certainty_density(known, sigma, confidence.dtype)


def attention_rollout(maps, positions, valid):
    """Influence of each position on the last layer's output: column sums of W_L ... W_1.  Eq. 6-9.

    W_l = rownormalise(A_l + I). Row i of A_l is the attention of position i, if it was recomputed.
    It sums to 1, as row i of I does, so row i of W_l is the mean of the two. If it was not, row i
    of W_l is that of I. The paper multiplies these T x T matrices. Their column sums are all it
    needs, though: the row vector 1 W_L ... W_1. So start with v = 1 and multiply from the left,
    v <- v W_l, from the last layer to the first. There a recomputed position i keeps half of v_i
    and hands the other half to where it attends. Any other position keeps all of it.

    Three positions, the first and the last recomputed. Last layer's rows of A: (.5 .5 0) and
    (.25 .25 .5), first layer's: (.5 .25 .25) and (0 .5 .5). v is (1 1 1), then (.875 1.375 .75),
    then (.656 1.672 .672).

    maps (L, B, Q, T), or a list of L; positions (B, Q), repeats where not valid (B, Q) bool
    -> (B, T), rows sum to T
    """
    influence = torch.ones_like(maps[0][:, 0])  # v, (B, T)
    handed_on = 0.5 * valid  # (B, Q), the share that a recomputed position gives away
    for attention in reversed(maps):  # the recomputed rows of A_l, (B, Q, T)
        half = influence.gather(1, positions) * handed_on  # (B, T) -> (B, Q)
        received = (half[:, None] @ attention)[:, 0]  # (B, Q) -> (B, T)
        influence = influence.scatter_add(1, positions, -half) + received
    return influence


def nucleus(score, p, among):
    """The smallest set of positions `among` whose share of their summed score exceeds p.

    Scores .5 .3 .2 and p .6: the first two. p = 0 is the one highest score, p = 1 all of `among`.
    As in the paper: the position that crosses p is in (the authors' code leaves it out).
    score (B, T) >= 0, among (B, T) bool -> (B, T) bool
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
    """Of the positions `among`, the n of highest score; of equal ones the first.

    Scores .2 .9 .5 and n 2: the second and the third.
    score (B, T), finite; among (B, T) bool; n an integer, or one for each sequence, (B, 1)
    -> (B, T) bool
    """
    score = score.masked_fill(~among, -torch.inf)  # the others rank last
    order = score.argsort(dim=1, descending=True, stable=True)
    inside = torch.arange(score.shape[1], device=score.device) < n  # ranks, the highest is 0
    inside = inside.expand_as(among)
    return torch.zeros_like(among).scatter(1, order, inside) & among  # from ranks to positions


# ---- State and policies --------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """The canvas between two steps: all that a policy may look at. Tensors are (B, T).

    Steps count from 1; before the first, step is 0, nothing was decoded or recomputed yet, and
    `fresh`, `chosen` and `predicted` mean nothing.
    """

    # After the last step:
    tokens: torch.Tensor  # [MASK] where masked, and wherever the prompt holds one
    known: torch.Tensor  # prompt or decoded, whatever the token is
    decoded_at: torch.Tensor  # the step that decoded it; 0 where masked, and in the prompt
    recomputed_at: torch.Tensor  # the last step that recomputed it; 0: none
    confidence: torch.Tensor  # of the token predicted last; decoded positions keep theirs. Eq. 1
    influence: torch.Tensor | None  # attention rollout of the last step; None if unused
    step: int  # how many steps were done
    # For the next step:
    density: torch.Tensor  # certainty density around it. Eq. 3
    block: torch.Tensor  # in the first block that has a masked position; nothing if finished
    padding: torch.Tensor | None = None  # before short prompts: neither known nor masked

    @property
    def fresh(self):
        """Decoded in the last step: the cached key and value still say [MASK].  (B, T) bool"""
        return self.decoded_at == self.step

    @property
    def chosen(self):
        """Recomputed in the last step; for Dream, positions before predicted ones too.  (B, T)"""
        return self.recomputed_at == self.step

    @property
    def predicted(self):
        """Recomputed in the last step, and masked before it.  (B, T) bool"""
        return self.chosen & (self.masked | self.fresh)

    @property
    def masked(self):
        """Positions still to be decoded.  (B, T) bool"""
        if self.padding is None:
            return ~self.known
        return ~(self.known | self.padding)

    @property
    def block_starts(self):
        """Sequences with no token of their block decoded yet, and finished ones.  (B, 1) bool"""
        return ~(self.block & self.known).any(dim=1, keepdim=True)


class Policy:
    """What a policy has. This class is here to be read: nobody inherits from it.

    The first step recomputes everything without asking. A policy is asked before every other step,
    and once more when everything is decoded; that answer is ignored, as is what it chooses in
    padding or in a finished sequence. Its answer depends on the state alone.
    """

    uses_attention = False  # whether it reads state.influence, which takes time; else that is None

    def choose(self, state):
        """The positions to recompute, (B, T) bool, on the state's device.

        They must include, in every sequence that is not finished, at least one masked position of
        its block. The state is the policy's own copy.
        """

    # It may have a forward pass of its own, in the place of the function `recompute` below:
    #     def recompute(self, model, cache, state, positions, valid, R)
    # If that leaves layers of a position out, bench.py counts the work by its list `recomputed`:
    # for each step of the last decode the share of the layers, (B, T).


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

    Everything in a block's first two steps, and whenever `interval` more of its tokens are decoded:
    with interval 3 and a token a step, in the block's steps 1, 2, then 4, 7, 10 and so on.
    """

    interval: int = 8
    uses_attention = False

    def __post_init__(self):
        check_whole("interval", self.interval)

    def choose(self, state):
        decoded = (state.block & state.known).sum(dim=1, keepdim=True)
        decoded_before = decoded - (state.block & state.fresh).sum(dim=1, keepdim=True)
        first_two = decoded_before == 0
        due = decoded // self.interval > decoded_before // self.interval
        return first_two | due | state.masked | state.fresh


@dataclass(frozen=True)
class SlidingWindow:
    """The plainest control, ours: the block's first `width` masked positions and the fresh ones."""

    width: int = 4
    uses_attention = False

    def __post_init__(self):
        check_whole("width", self.width)

    def choose(self, state):
        to_decode = state.block & state.masked
        window = to_decode & (to_decode.cumsum(dim=1) <= self.width)
        return window | state.fresh


@dataclass(frozen=True)
class D2Cache:
    """The paper's policy: k masked positions, a nucleus p of the known ones, and the fresh ones.

    sigma: of the certainty density in stage 1, if it is to be another than that of the decode.
    """

    k: int = 32
    p: float = 0.1
    sigma: float | None = None
    uses_attention = True

    def __post_init__(self):
        check_whole("k", self.k)
        require(0 <= self.p <= 1, f"p is {self.p}, should be from 0 to 1")
        if self.sigma is not None:
            check_sigma(self.sigma)

    def choose(self, state):
        return self.about_to_be_decoded(state) | self.attended(state) | state.fresh

    def about_to_be_decoded(self, state):
        """Stage 1, Eq. 4: the k masked positions of highest certainty prior.

        Those of the block come first; if there are fewer than k, the best elsewhere fill up.
        """
        prior = state.confidence * state.density
        if self.sigma is not None:
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
    before each of them is recomputed too, as it makes the prediction: row 4 predicts position 5.
    """
    if state.step == 0:
        chosen = torch.ones_like(state.known)
    else:
        chosen = policy.choose(copy_of(state))
        check_choice(policy, chosen, state)

    unfinished = state.block.any(dim=1, keepdim=True)
    chosen = chosen & unfinished
    if state.padding is not None:
        chosen = chosen & ~state.padding
    predicted = chosen & state.masked
    if shifted:
        chosen = chosen | F.pad(predicted[:, 1:], (0, 1))
    return chosen, predicted


def pack(chosen, predicted, Q):
    """Chosen positions in Q rows for each sequence: predicted ones first, both in ascending order.

    Chosen {1, 4, 6} and predicted {4, 6}: rows 4 6 1, of which the first two get logits. With
    Q = 5 the first is repeated, 4 6 1 4 4, in rows that are not valid: to compute a position twice
    gives the same keys and values. A finished sequence repeats position 0.
    2 x (B, T) bool -> positions (B, Q), valid (B, Q) bool
    """
    priority = chosen.int() + predicted  # predicted 2, only recomputed 1
    order = priority.argsort(dim=1, descending=True, stable=True)[:, :Q]
    valid = chosen.gather(1, order)
    return order.where(valid, order[:, :1]), valid


def unpack(packed, predicted):
    """What stands in the first R rows of `pack`, back at its positions.  (B, R) -> (B, T)

    Predicted {4, 6} and packed (a b): a at 4, b at 6. At other positions the values mean nothing.
    """
    row = (predicted.cumsum(dim=1) - 1).clamp(min=0)  # the n-th predicted position is in row n
    return packed.gather(1, row)


def recompute(policy, model, cache, state, positions, valid, R):
    """One forward pass over positions (B, Q), of which the first R are predicted.

    -> logits (B, R, V'), and the influence (B, T), or None unless the policy uses attention
    """
    attention = policy.uses_attention
    hidden, maps = model.hidden_states(state.tokens, positions, cache, attention, state.padding)
    predicting = hidden[:, :R]
    if model.config.shifted:
        predicting = rows_before(hidden, positions, R, state.tokens.shape[1])
    influence = attention_rollout(maps, positions, valid) if attention else None
    return model.head(predicting), influence


def rows_before(hidden, positions, R, T):
    """Dream: the hidden states that predict the first R positions.  (B, Q, C) -> (B, R, C)

    They stand in the row of the position before, somewhere among the Q: spread on a canvas it is
    found by its position. Position 0 is predicted by its own row.
    """
    B, Q, C = hidden.shape
    sequences = torch.arange(B, device=hidden.device)[:, None]
    canvas = hidden.new_zeros(B, T, C)
    canvas[sequences, positions] = hidden
    return canvas[sequences, (positions[:, :R] - 1).clamp(min=0)]


def predict(logits, config, temperature=0.0, generator=None):
    """Probability (Eq. 1) and id of each row's token.  (B, R, V') -> 2 x (B, R)

    [MASK] and ids without a token are never predicted, but keep their share of probability. Above
    temperature 0 tokens are drawn; the probability is that of temperature 1 all the same.
    """
    score = logits
    if temperature > 0:
        score = with_noise(logits, temperature, generator)
    score = score.clone()
    score[..., config.mask_token_id] = -torch.inf
    score[..., config.vocab_size :] = -torch.inf
    token = score.argmax(dim=-1)

    wide = torch.promote_types(logits.dtype, torch.float32)
    probability = torch.softmax(logits, dim=-1, dtype=wide)
    return probability.gather(-1, token[..., None])[..., 0], token


def with_noise(logits, temperature, generator):
    """Scores whose arg-max is a draw from softmax(logits / temperature): Gumbel's, as LLaDA's."""
    dtype = torch.float64
    if logits.device.type == "mps":  # has no float64
        dtype = torch.float32
    noise = torch.empty_like(logits, dtype=dtype).uniform_(generator=generator)
    return logits - temperature * torch.log(-torch.log(noise))


def unmask(state, predicted, confidence, by_prior, tokens_per_step, threshold):
    """Which predicted positions of the block to commit.  -> (B, T) bool

    The tokens_per_step of highest certainty prior, or else of highest confidence; and all whose
    confidence reaches the threshold, if there is one.
    """
    score = confidence
    if by_prior:
        score = confidence * state.density
    candidates = predicted & state.block
    commit = highest(score, candidates, tokens_per_step)
    if threshold is not None:
        commit = commit | (candidates & (confidence >= threshold))
    return commit


def end_at_eos(state, config, prompt_length):
    """The state, with all that follows the end of a response made EOS, and known.

    The end is the first token of config.end_ids, EOS or end of turn, once none before it is masked.
    Response "a [MASK] EOS [MASK]" stays as it is; "a b EOS [MASK]" becomes "a b EOS EOS".
    """
    ends = torch.zeros_like(state.known)
    for id in config.end_ids:
        ends = ends | (state.tokens == id)
    ends = ends & (state.masked.cumsum(dim=1) == 0)  # everything up to here is decoded
    ends[:, :prompt_length] = False
    after_end = F.pad(ends.cumsum(dim=1)[:, :-1] > 0, (1, 0))
    newly_known = after_end & state.masked

    return replace(
        state,
        tokens=state.tokens.masked_fill(after_end, config.eos_token_id),
        known=state.known | after_end,
        decoded_at=state.decoded_at.masked_fill(newly_known, state.step),
    )


def copy_of(state):
    """The same state in tensors of its own: who writes into them changes nothing here."""
    tensors = {name: value for name, value in vars(state).items() if torch.is_tensor(value)}
    return replace(state, **{name: tensor.clone() for name, tensor in tensors.items()})


def check_choice(policy, chosen, state):
    """ValueError unless what a policy chose is a mask of the canvas, such as `known` is."""
    found = kind_of(chosen)
    wanted = kind_of(state.known)
    name = type(policy).__name__
    fault = f"step {state.step + 1}: policy {name} chose {found}, should be {wanted}"
    require(found == wanted, fault)


def kind_of(tensor):
    """A tensor's shape, dtype and device, for a message; of anything else, its type."""
    if not torch.is_tensor(tensor):
        return f"a {type(tensor).__name__}"
    return f"a tensor {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"


# ---- The loop ------------------------------------------------------------------------------------


def paper_sigma(gen_length):
    """The paper's 10 positions, for 256 tokens or more; in proportion fewer for a shorter one."""
    return min(10.0, 10 * gen_length / 256)


def order_of(sigma, gen_length, block_length):
    """Whether to commit by certainty prior, and the density's sigma.

    The density is there in any order: stage 1 of d2Cache chooses by it.
    """
    if sigma == "auto":
        return block_length is None, paper_sigma(gen_length)
    if sigma is None:
        return False, paper_sigma(gen_length)
    return True, sigma


def current_block(masked, block_length, prompt_length):
    """Each sequence's first block of the response with a masked position.  (B, T) -> (B, T) bool

    Prompt of 1, blocks of 2, masked 0 00 01 11: the block is 0 00 11 00.
    """
    blocks = masked[:, prompt_length:].unflatten(1, (-1, block_length))
    unfinished = blocks.any(dim=2)  # (B, blocks)
    first = unfinished & (unfinished.cumsum(dim=1) == 1)  # the count is 1 until the second
    return F.pad(first.repeat_interleave(block_length, dim=1), (prompt_length, 0))


def blank_canvas(model, prompt, prompt_mask, gen_length, uses_attention):
    """The state before the first step, on the model's device; block and density are still empty."""
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
        decoded_at=torch.zeros_like(known, dtype=torch.long),
        recomputed_at=torch.zeros_like(known, dtype=torch.long),
        confidence=zeros,
        influence=torch.ones_like(zeros) if uses_attention else None,
        density=zeros,
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
    sigma="auto",
    prompt_mask=None,
    threshold=None,
    stop_at_eos=False,
    temperature=0.0,
    generator=None,
    cache=None,
):
    """Decode gen_length tokens after each prompt, (B, P) integers: yields the State of every step.

        until everything is known:
            the policy chooses positions
            yield     the state of the step before: its logits are known to be finite now
            pack      the positions into rows
            recompute these rows, and write their keys and values into the cache
            predict   a token for each of them that is masked
            unmask    the best ones: they are committed

    block_length     positions of a block; blocks are decoded from left to right (None: one block)
    sigma            the order. A number: commit by certainty prior, with a density of this sigma.
                     None: by confidence. "auto": by certainty prior, with the paper's sigma scaled
                     to gen_length; but if there is a block_length, by confidence
    tokens_per_step  commit so many tokens of each sequence's block
    threshold        commit every predicted position of this confidence too, as Fast-dLLM does
    prompt_mask      (B, P), 0 where a short prompt is padded on the left; without sampling, each
                     sequence decodes as it does alone
    stop_at_eos      once all before a response's first end token is decoded, all after it is EOS
    temperature      above 0: draw tokens, with `generator`, a torch.Generator for the whole batch
    cache            a KVCache of these B and T to be used, and overwritten (None: a new one)

    Raises ValueError for arguments out of range, when the first state is asked for; for a policy
    that breaks its contract; and for logits that are not finite.
    """
    check_prompt(prompt, prompt_mask, gen_length, model.config)
    check_policy(policy)
    check_settings(gen_length, block_length, tokens_per_step, sigma, threshold)
    weight = model.wte.weight
    check_sampling(temperature, generator, weight.device)

    P = prompt.shape[1]
    by_prior, sigma = order_of(sigma, gen_length, block_length)
    if block_length is None:
        block_length = gen_length
    forward = getattr(policy, "recompute", partial(recompute, policy))
    state = blank_canvas(model, prompt, prompt_mask, gen_length, policy.uses_attention)
    if cache is None:
        cache = KVCache(model.config, *state.tokens.shape, weight.device, weight.dtype)
    else:
        cache.clear()
    while True:
        block = current_block(state.masked, block_length, P)
        density = certainty_density(state.known, sigma, state.confidence.dtype)
        state = replace(state, block=block, density=density)
        chosen, predicted = choose_positions(policy, state, model.config.shifted)
        Q, R = count_and_check(policy, state, chosen, predicted)
        if state.step > 0:
            yield state
        if Q == 0:  # every sequence is finished
            return

        positions, valid = pack(chosen, predicted, Q)
        logits, influence = forward(model, cache, state, positions, valid, R)
        probability, token = predict(logits, model.config, temperature, generator)
        confidence = unpack(probability, predicted).where(predicted, state.confidence)
        commit = unmask(state, predicted, confidence, by_prior, tokens_per_step, threshold)
        step = state.step + 1
        state = replace(
            state,
            tokens=unpack(token, predicted).where(commit, state.tokens),
            known=state.known | commit,
            decoded_at=state.decoded_at.masked_fill(commit, step),
            recomputed_at=state.recomputed_at.masked_fill(chosen, step),
            confidence=confidence,
            influence=influence,
            step=step,
        )
        if stop_at_eos:
            state = end_at_eos(state, model.config, P)


def generate(model, prompt, gen_length, **arguments):
    """Prompts and responses when `decode`, which explains the arguments, is done.

    prompt (B, P) integers -> (B, P + gen_length) token ids
    """
    for state in decode(model, prompt, gen_length, **arguments):
        pass
    return state.tokens


def count_and_check(policy, state, chosen, predicted):
    """Q and R: the most positions that any sequence recomputes, and predicts, in this step.

    The one transfer from device to host in a step, so two checks ride along, with ValueError:
    finite, whether the last step's logits were (else its confidence is NaN), and lawful, whether
    the policy keeps its contract.
    """
    finite = ~state.confidence.isnan().any()
    candidate = (predicted & state.block).any(dim=1)
    finished = ~state.block.any(dim=1)
    lawful = (candidate | finished).all()
    numbers = [chosen.sum(dim=1).max(), predicted.sum(dim=1).max(), finite, lawful]
    Q, R, finite, lawful = torch.stack(numbers).tolist()

    reason = "NaN or infinite weights, or numbers too large for their dtype"
    require(finite, f"the logits of step {state.step} are not finite: {reason}")
    name = f"policy {type(policy).__name__}"
    fault = f"{name} chose no masked position of an unfinished block in step {state.step + 1}"
    require(lawful, f"{fault}, should choose at least one of state.block & state.masked")
    return Q, R


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_prompt(prompt, prompt_mask, gen_length, config):
    """ValueError unless prompt and mask fit, and leave room for gen_length tokens."""
    is_tensor = torch.is_tensor(prompt)
    fits = is_tensor and prompt.dtype in INTEGERS and prompt.dim() == 2 and len(prompt) > 0
    require(fits, f"prompt is {kind_of(prompt)}, should be (B, P) integers")

    ids = prompt.long()
    has_token = (ids >= 0) & (ids < config.vocab_size)
    wrong = ids[~has_token & (ids != config.mask_token_id)].tolist()
    require(not wrong, f"prompt holds ids {wrong[:5]}, should be 0 to {config.vocab_size - 1}")

    P = prompt.shape[1]
    room = config.max_sequence_length - P
    check_whole("gen_length", gen_length)
    fault = f"gen_length is {gen_length} after a prompt of {P}, should be at most {room}"
    require(gen_length <= room, fault)

    if prompt_mask is not None:
        right = f"should be ({len(prompt)}, {P}), in each row zeros (padding), then at least one 1"
        fault = f"prompt_mask is {kind_of(prompt_mask)}, {right}"
        require(torch.is_tensor(prompt_mask) and prompt_mask.shape == prompt.shape, fault)
        real = prompt_mask.bool()
        padded_left = (real[:, 1:] >= real[:, :-1]).all()
        require(padded_left and real[:, -1:].all(), fault)


def check_whole(name, value):
    """ValueError unless the value is an int of at least 1."""
    right = type(value) is int and value >= 1
    require(right, f"{name} is {value!r}, should be a whole number, at least 1")


def check_sigma(sigma):
    """ValueError unless sigma is a number of positions; below 0.01 no neighbour would count."""
    number = isinstance(sigma, (int, float)) and sigma >= 0.01
    require(number, f"sigma is {sigma!r}, should be a number of positions, at least 0.01")


def check_policy(policy):
    """ValueError unless it has what `Policy` lists."""
    has_both = callable(getattr(policy, "choose", None)) and hasattr(policy, "uses_attention")
    right = "should be an object like DualCache(), with choose(state) and uses_attention"
    require(has_both and not isinstance(policy, type), f"policy is {policy!r}, {right}")


def check_settings(gen_length, block_length, tokens_per_step, sigma, threshold):
    """ValueError, with the value and what would be right, for settings of `decode` out of range."""
    check_whole("tokens_per_step", tokens_per_step)
    if block_length is not None:
        check_whole("block_length", block_length)
        fault = f"block_length is {block_length}, should divide gen_length {gen_length}"
        require(gen_length % block_length == 0, fault)
    if sigma not in ("auto", None):
        check_sigma(sigma)

    in_range = threshold is None or 0 <= threshold <= 1
    require(in_range, f"threshold is {threshold}, should be from 0 to 1, or None")


def check_sampling(temperature, generator, device):
    """ValueError unless temperature and generator can draw tokens on the device."""
    require(0 <= temperature < math.inf, f"temperature is {temperature}, should be at least 0")
    if temperature > 0:
        right = isinstance(generator, torch.Generator) and generator.device.type == device.type
        fault = f"generator is {generator} at temperature {temperature}, should be a"
        require(right, f"{fault} torch.Generator of device {device.type!r}")


# ---- The command line ----------------------------------------------------------------------------

# A world is a folder: a checkpoint, and problems.py with is_right(question, text),
# draw_problems(seed), the TEST_SEED of the held-out problems, a SAMPLE of the questions, and
# RESPONSE_LENGTH, as the model is trained for.
TESTS = Path(__file__).resolve().parent / "tests"
WORLDS = {name: TESTS / name for name in ("tiny", "diary", "journey")}
EMBEDDED_MODEL = WORLDS["tiny"]
EXAMPLE = (  # a question of its world, for README.md and bench.py
    "Ben has 30 pens. On Monday Ben buys 5 pens at the shop. On Tuesday Ben loses 8 pens at the "
    "park. On Wednesday Ben wins 4 more pens at the school. How many pens does Ben have now?"
)
COLOURS = {  # of `roles` in a terminal; later ones are painted over earlier ones
    "known": "97;44",
    "fresh": "97;41",
    "candidates": "30;43",
    "committed": "30;42",
}


def paper_block_length(gen_length):
    """The paper's 32 positions, 16 for a response of less than 128; or the next lower divisor."""
    longest = 32 if gen_length >= 128 else 16
    return max(n for n in range(1, longest + 1) if gen_length % n == 0)


def paper_settings(gen_length):
    """Arguments of `decode` for the policies that d2cache.py knows by name.

    The paper's k and blocks, scaled down for short responses: k is an eighth of the response.
    """
    block_length = paper_block_length(gen_length)
    k = min(32, max(1, gen_length // 8))
    return {
        "vanilla": dict(policy=RecomputeAll()),
        "prefix": dict(policy=PrefixCache(), block_length=block_length),
        "dual": dict(policy=DualCache(), block_length=block_length),
        "delayed": dict(policy=DelayedCache(), block_length=block_length),
        "window": dict(policy=SlidingWindow()),
        "d2cache": dict(policy=D2Cache(k=k, p=0.1)),
    }


def load_module(path):
    """The module of a Python file.

    Its folder stays first on sys.path: files beside it are found, and before installed packages.
    """
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def load_policy(text):
    """The policy of "FILE.py:Name" or "FILE.py:Name(k=8)"; ValueError says why there is none."""
    file, separator, call = text.partition(".py:")
    require(separator, f"policy is {text!r}, should be FILE.py:Name or FILE.py:Name(k=8)")
    try:
        module = load_module(Path(file + ".py").resolve())
        policy = eval(call, vars(module))  # to be trusted as much as the file itself
        if isinstance(policy, type):
            policy = policy()
        check_policy(policy)
    except (Exception, SystemExit) as error:
        raise ValueError(f"policy {text}: {type(error).__name__}: {error}") from error
    return policy


def roles(before, state):
    """Why each position was recomputed in a step, and what the step committed.  -> (B, T) bools

    before       the state that the step started from, None for the first
    candidates   recomputed, and masked before the step
    fresh        recomputed, and committed in the step before it
    known        recomputed, and known for longer than that
    committed    in this step
    """
    fresh = torch.zeros_like(state.chosen)
    if before is not None:
        fresh = state.chosen & before.fresh
    return {
        "known": state.chosen & ~state.predicted & ~fresh,
        "fresh": fresh,
        "candidates": state.predicted,
        "committed": state.fresh,
    }


def places(marked):
    """How many positions of one sequence, (T,) bool, and which: "9: 0-6 11 13"; or "0"."""
    runs = []
    for i in marked.nonzero()[:, 0].tolist():
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if not words:
        return "0"
    return " ".join([f"{marked.sum().item()}:", *words])


TRACE = "{:>4}  {:<30}  {:<14}  {:<8}  {}"
TRACE_TITLES = ("step", "committed, confidence, prior", "candidates", "fresh", "known")


def trace(before, state, sigma, tokenizer):
    """A step of one sequence as a line: what it committed, how sure, and what it recomputed."""
    known_before = state.known & ~state.fresh  # when the step decided
    prior = certainty_prior(state.confidence, known_before, sigma)[0].tolist()
    confidence = state.confidence[0].tolist()
    tokens = state.tokens[0].tolist()
    commits = []
    for i in state.fresh[0].nonzero()[:, 0].tolist():
        text = tokenizer.decode([tokens[i]], skip_special_tokens=False)
        commits.append(f"{i} {text!r} {confidence[i]:.3f} {prior[i]:.3f}")

    role = roles(before, state)
    reasons = [places(role[name][0]) for name in ("candidates", "fresh", "known")]
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
    return screen.replace("\n", "\033[K\n")  # erases what is left of a longer line


def run_program(parser, work):
    """work(arguments) as a program: what a user can mend is one line on stderr and exit code 2."""
    args = parser.parse_args()
    if hasattr(sys.stdout, "reconfigure"):  # not so in a notebook
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show every answer
    try:
        work(args)
        print(end="", flush=True)  # a broken pipe shows here, not at exit
    except BrokenPipeError:  # who reads, such as `head`, has seen enough
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python flushes once more at exit
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, MemoryError, torch.OutOfMemoryError) as error:
        parser.error(" ".join(str(error).split()) or "out of memory")


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group().add_argument
    source("--world", default="tiny", choices=WORLDS, help="an embedded model (tiny)")
    source("--model", help="checkpoint folder or hub id")
    add("--revision", help="of the hub's repository: branch, tag or commit")
    add("--dtype", choices=DTYPES, help="instead of the checkpoint's")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--prompt", help="the user's text (a question of the world)")
    add("--gen-length", type=int, help="tokens to decode (as many as the world wants)")
    policies = ", ".join(paper_settings(1))
    add("--policy", default="d2cache", help=f"{policies} or FILE.py:Name(k=8) (d2cache)")
    add("--block-length", type=int, help="decode in blocks of so many tokens, by confidence")
    add("--threshold", type=float, help="commit every token at least so confident, too")
    add("--stop-at-eos", action="store_true", help="stop where the answer ends")
    add("--trace", action="store_true", help="print what every step commits and recomputes")
    add("--delay", default=0.05, type=float, help="seconds between two steps on the screen (0.05)")
    return parser


def fill_in(args):
    """Give --model, --prompt and --gen-length, where they are left out, the values of the world."""
    folder = WORLDS[args.world]
    world = load_module(folder / "problems.py")
    if args.model is None:
        args.model = folder
    if args.prompt is None:
        args.prompt = world.SAMPLE
    if args.gen_length is None:
        args.gen_length = world.RESPONSE_LENGTH


def decode_arguments(args):
    """Arguments of `decode` for the policy, and the order, that the command line names."""
    check_whole("--gen-length", args.gen_length)
    ours = paper_settings(args.gen_length)
    if args.policy in ours:
        arguments = ours[args.policy]
    else:
        known = f"{', '.join(ours)} or FILE.py:Name(k=8)"
        require(".py:" in args.policy, f"policy is {args.policy!r}, should be {known}")
        arguments = {"policy": load_policy(args.policy)}
    if args.block_length is not None:
        arguments |= {"block_length": args.block_length}
    return arguments | {"threshold": args.threshold, "stop_at_eos": args.stop_at_eos}


def run(args):
    """Decode as the command line asks: the steps and the answer on stdout, the work on stderr."""
    require(0 <= args.delay < 60, f"--delay is {args.delay}, should be from 0 to 60 seconds")
    fill_in(args)
    arguments = decode_arguments(args)
    tokenizer = load_tokenizer(args.model, args.revision)
    prompt = encode_prompt(tokenizer, args.prompt)
    model = Transformer.from_pretrained(args.model, args.device, args.dtype, args.revision)
    watched = not args.trace and shows_colours(sys.stdout)

    before = None
    recomputed = 0.0
    if args.trace:
        print(TRACE.format(*TRACE_TITLES))
    for state in decode(model, prompt, args.gen_length, **arguments):
        recomputed += state.chosen.float().mean().item()
        if args.trace:
            print(trace(before, state, paper_sigma(args.gen_length), tokenizer))
        if watched:
            screen = draw_screen(before, state, tokenizer, recomputed / state.step)
            print(f"\033[H{screen}\033[J", flush=True)
            time.sleep(args.delay)
        before = state

    response = state.tokens[0, prompt.shape[1] :]
    print(decode_response(tokenizer, response, model.config.end_ids), flush=True)
    share = recomputed / state.step
    print(f"{state.step} forwards, {share:.1%} of positions recomputed", file=sys.stderr)


def shows_colours(stream):
    """Whether a stream is a terminal that understands escape codes, and its user wants them."""
    if stream is None or not stream.isatty():  # None: it was closed
        return False
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def main():
    """Print the decoded answer to a prompt; a terminal with colours shows the canvas filling."""
    run_program(make_parser(), run)


if __name__ == "__main__":
    main()
