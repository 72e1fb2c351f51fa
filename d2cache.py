"""d2Cache: decode a masked diffusion language model, recomputing only the positions that matter.

A step of plain decoding recomputes all T positions of the canvas to commit one token. Here every
step asks a policy one question, which positions to recompute; all other keys and values come from
the cache. d2Cache answers with (1) the masked positions about to be decoded, by certainty prior,
(2) the known positions that carry the attention, by attention rollout, and the position decoded
just before. Uncached decoding, prefix cache and dual cache are other answers to the same question,
so one forward pass and one decoding loop serve them all.

Paper: arXiv 2509.23094, "d2Cache: Accelerating Diffusion-Based LLMs via Dual Adaptive Caching";
equation numbers are its first version's. Shape letters as in model.py: B sequences, T positions,
P of them prompt, Q recomputed, L layers, V vocabulary; and R <= Q recomputed and still masked.
"""

from model import KVCache, Transformer, chat_prompt, load_tokenizer  # first: it quiets torch's import

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

EMBEDDED_MODEL = Path(__file__).parent / "tests" / "tiny"
EXAMPLE = (
    "Anna has 21 stickers. On Wednesday Anna finds 5 stickers at the market. On Thursday Anna sells "
    "11 stickers at the market. On Friday Anna gets 8 more stickers at the school. "
    "How many stickers does Anna have now?"
)


# ---- The stages, one equation each ---------------------------------------------------------------


def certainty_density(known, sigma, dtype=torch.float32):
    """Share of known positions around each one, in a Gaussian window of sigma positions.  Eq. 3.

    D(i) = sum over known j of exp(-(i - j)^2 / (2 sigma^2)), divided by the window's whole mass.
    Over the whole canvas, as in the paper; the authors' code takes the prompt for all known.
    (B, T) bool -> (B, T) in [0, 1]
    """
    T = known.shape[1]
    distance = torch.arange(1 - T, T, device=known.device, dtype=dtype)
    window = torch.exp(-(distance**2) / (2 * sigma**2))
    density = F.conv1d(known[:, None].to(dtype), window[None, None], padding=T - 1)[:, 0]
    return (density / window.sum()).clamp(max=1)


def certainty_prior(confidence, known, sigma):
    """Confidence times certainty density: sure, and sure of its surroundings.  (B, T) -> (B, T)"""
    return confidence * certainty_density(known, sigma, confidence.dtype)


def attention_rollout(maps, positions, valid):
    """Influence of each position on the last layer's output: column sums of W_L ... W_1.  Eq. 6-9.

    W_l = rownormalise(A_l + I), where A_l holds the attention of the recomputed rows and every
    other row of W_l is one-hot. Only column sums are wanted, so a row vector goes down the layers
    instead of T x T products: a recomputed row keeps its share and passes the rest along its row.
    maps (L, B, Q, T), positions (B, Q); entries that are not valid (B, Q) are repeats, and do not
    count.  -> (B, T), every row sums to T
    """
    wide = torch.promote_types(maps.dtype, torch.float32)
    influence = torch.ones(maps.shape[1], maps.shape[3], device=maps.device, dtype=wide)
    for attention in maps.to(wide).flip(0):
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
    # Round-off may lift a partial sum to the total: without p == 1 the tail could be lost.
    within = (held_before <= p * held[:, -1:]) & (held_before < held[:, -1:]) | (p == 1)
    within[:, 0] = True
    return torch.zeros_like(among).scatter(1, order, within) & among


def best(score, among, n):
    """The n positions of highest score `among` (B, T), or all if there are fewer; the first of equals.

    n is a number or one for each sequence, (B, 1).  -> (B, T) bool
    """
    order = score.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < n) & among


# ---- Policies: which positions are recomputed in this step -----------------------------------------


@dataclass(frozen=True)
class State:
    """The canvas between two steps: all that a policy may look at. Tensors are (B, T)."""

    tokens: torch.Tensor  # [MASK] where not known, and wherever the prompt holds one
    known: torch.Tensor  # prompt or decoded, whatever the token is
    fresh: torch.Tensor  # decoded in the last step: key and value still say [MASK]
    confidence: torch.Tensor  # of masked positions, when they were last recomputed. Eq. 1
    influence: torch.Tensor  # attention rollout of the last step, if the policy uses it
    block: slice  # the positions being decoded
    step: int  # steps done


class RecomputeAll:
    """Vanilla decoding: no cache at all."""

    uses_attention = False

    def choose(self, state):
        return torch.ones_like(state.known)


class PrefixCache:
    """Fast-dLLM: everything when a block starts, then the block and all that follows it."""

    uses_attention = False

    def choose(self, state):
        starts = ~state.known[:, state.block].any(dim=1, keepdim=True)
        from_block_on = torch.zeros_like(state.known)
        from_block_on[:, state.block.start :] = True
        return starts | from_block_on


class DualCache:
    """Fast-dLLM: everything when a block starts, then the block alone."""

    uses_attention = False

    def choose(self, state):
        starts = ~state.known[:, state.block].any(dim=1, keepdim=True)
        return starts | in_block(state)


@dataclass(frozen=True)
class D2Cache:
    """The paper's policy: k masked positions, a nucleus p of the known ones, and the fresh ones.

    Raises ValueError unless k >= 1, 0 <= p <= 1 and sigma > 0 (positions).
    """

    k: int = 32
    p: float = 0.1
    sigma: float = 10.0
    uses_attention = True

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k is {self.k}, should be at least 1")
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is {self.p}, should be between 0 and 1")
        if not self.sigma > 0:
            raise ValueError(f"sigma is {self.sigma}, should be above 0")

    def choose(self, state):
        return self.about_to_be_decoded(state) | self.attended(state) | state.fresh

    def about_to_be_decoded(self, state):
        """Stage 1, Eq. 4: the k masked positions of highest certainty prior, the block's own first."""
        prior = certainty_prior(state.confidence, state.known, self.sigma)
        inside = best(prior, ~state.known & in_block(state), self.k)
        left = self.k - inside.sum(dim=1, keepdim=True)
        return inside | best(prior, ~state.known & ~in_block(state), left)

    def attended(self, state):
        """Stage 2, Eq. 9: the nucleus of the rollout's influence among prompt and decoded positions."""
        return nucleus(state.influence, self.p, among=state.known)


def in_block(state):
    """The positions of the current block.  (B, T) bool"""
    inside = torch.zeros_like(state.known)
    inside[:, state.block] = True
    return inside


# ---- The decoding loop -----------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model,
    prompt,
    gen_length,
    block_length=None,
    tokens_per_step=1,
    policy=RecomputeAll(),
    sigma=None,
    on_step=None,
):
    """Decode gen_length tokens after each prompt.  (B, P) integers -> (B, P + gen_length)

    Blocks of block_length positions are decoded from left to right (None: one block). Each step
    recomputes what `policy` chooses and commits the tokens_per_step best of the block's masked
    positions among them: by confidence, or by certainty prior if sigma is given. [MASK] is never
    predicted, and a sequence decodes to the same tokens alone as in company. on_step(state, chosen)
    is called after every step with the new State and the positions (B, T) that were recomputed.
    Raises ValueError for arguments out of range and for a policy that leaves nothing to commit.
    """
    prompt = check_arguments(model, prompt, gen_length, block_length, tokens_per_step, sigma)
    (B, P), T = prompt.shape, prompt.shape[1] + gen_length
    block_length = block_length or gen_length
    state = blank_canvas(model, prompt, gen_length)
    weight = model.wte.weight
    cache = KVCache(model.config, B, T, weight.device, weight.dtype)

    for start in range(P, T, block_length):
        state = replace(state, block=slice(start, start + block_length))
        left = [block_length] * B  # masked positions of the block
        while any(left):
            chosen = choose(policy, state)
            counts = count(chosen, state, left, policy)
            state = decode_step(model, cache, state, chosen, counts, policy, tokens_per_step, sigma)
            left = [n - min(candidates, tokens_per_step) for n, candidates in zip(left, counts[2])]
            if on_step is not None:
                on_step(state, chosen)
    return state.tokens


def blank_canvas(model, prompt, gen_length):
    """The state before the first step: the prompt, then gen_length masks."""
    tokens = F.pad(prompt, (0, gen_length), value=model.config.mask_token_id)
    known = (torch.arange(tokens.shape[1], device=tokens.device) < prompt.shape[1]).expand_as(tokens)
    wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
    zeros = torch.zeros(tokens.shape, device=tokens.device, dtype=wide)
    return State(tokens, known, torch.zeros_like(known), zeros, zeros + 1, slice(0, 0), step=0)


def choose(policy, state):
    """The positions recomputed in this step: all in the first one, then as the policy says.  (B, T)

    A sequence whose block is done before the others' waits: it recomputes only its fresh positions.
    They will be recomputed in its next step in any case, so waiting leaves no trace.
    """
    if state.step == 0:
        return torch.ones_like(state.known)
    chosen = policy.choose(state)
    if chosen.dtype != torch.bool or chosen.shape != state.known.shape:
        raise ValueError(
            f"policy {type(policy).__name__} chose {tuple(chosen.shape)} {chosen.dtype}, "
            f"should be {tuple(state.known.shape)} torch.bool"
        )
    return torch.where(waiting(state), state.fresh, chosen)


def waiting(state):
    """Sequences whose current block is decoded.  (B, 1) bool"""
    return state.known[:, state.block].all(dim=1, keepdim=True)


def count(chosen, state, left, policy):
    """For each sequence, how many positions are chosen, chosen and masked, and candidates: 3 lists.

    Candidates are the chosen masked positions of the block: only they may be committed. The step's
    one transfer to the host. ValueError if a sequence has none though its block is unfinished.
    """
    masked = chosen & ~state.known
    counts = torch.stack([chosen.sum(1), masked.sum(1), masked[:, state.block].sum(1)]).tolist()
    for sequence, (candidates, unfinished) in enumerate(zip(counts[2], left)):
        if unfinished and not candidates:
            raise ValueError(
                f"policy {type(policy).__name__} chose no masked position of the unfinished block "
                f"{state.block.start}:{state.block.stop} for sequence {sequence} in step {state.step}"
            )
    return counts


def decode_step(model, cache, state, chosen, counts, policy, tokens_per_step, sigma):
    """Recompute the chosen positions and commit the best candidates among them: the next State."""
    masked = chosen & ~state.known
    positions, valid = pack(chosen, masked, Q=max(counts[0]))
    rows = positions[:, : max(counts[1])]  # (B, R): pack puts the masked ones first

    hidden, maps = model.trunk(state.tokens, positions, cache, policy.uses_attention)
    confidence, predicted = predict(model.head(hidden[:, : rows.shape[1]]), model.config.mask_token_id)

    confidence = torch.where(masked, state.confidence.scatter(1, rows, confidence), state.confidence)
    influence = state.influence
    if policy.uses_attention:
        rollout = attention_rollout(maps, positions, valid)
        influence = torch.where(waiting(state), influence, rollout)

    score = confidence if sigma is None else certainty_prior(confidence, state.known, sigma)
    commit = best(score, masked & in_block(state), tokens_per_step)
    return replace(
        state,
        tokens=torch.where(commit, state.tokens.scatter(1, rows, predicted), state.tokens),
        known=state.known | commit,
        fresh=torch.where(waiting(state), state.fresh, commit),
        confidence=confidence,
        influence=influence,
        step=state.step + 1,
    )


def pack(chosen, masked, Q):
    """Chosen positions as rows of equal length, the masked ones first.  (B, T) -> (B, Q), (B, Q) valid

    A row with fewer than Q repeats its first position, which is not valid again: recomputing a
    position twice gives the same keys and values, so company changes no sequence.
    """
    order = (chosen.int() + masked.int()).argsort(dim=1, descending=True, stable=True)[:, :Q]
    valid = chosen.gather(1, order)
    return torch.where(valid, order, order[:, :1]), valid


def predict(logits, mask_token_id):
    """The likeliest token that is not [MASK], and its probability.  (B, R, V) -> (B, R), (B, R).  Eq. 1"""
    wide = torch.promote_types(logits.dtype, torch.float32)
    excluded = torch.tensor([mask_token_id], device=logits.device)
    token = logits.index_fill(-1, excluded, -torch.inf).argmax(dim=-1)
    probability = torch.softmax(logits, dim=-1, dtype=wide)
    return probability.gather(-1, token[..., None])[..., 0], token


def check_arguments(model, prompt, gen_length, block_length, tokens_per_step, sigma):
    """ValueError for what `generate` cannot decode; the prompt as long integers on the model's device."""
    if gen_length < 1:
        raise ValueError(f"gen_length is {gen_length}, should be at least 1")
    if block_length is not None and (block_length < 1 or gen_length % block_length):
        raise ValueError(f"block_length is {block_length}, should divide gen_length {gen_length}")
    if tokens_per_step < 1:
        raise ValueError(f"tokens_per_step is {tokens_per_step}, should be at least 1")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma is {sigma}, should be above 0, or None")
    integer = not (prompt.dtype.is_floating_point or prompt.dtype.is_complex or prompt.dtype == torch.bool)
    if not integer or prompt.dim() != 2 or len(prompt) == 0:
        raise ValueError(f"prompt is {tuple(prompt.shape)} {prompt.dtype}, should be (B, P) integers")
    config = model.config
    if prompt.numel() and not 0 <= prompt.min() <= prompt.max() < config.vocab_size:
        low, high = prompt.min().item(), prompt.max().item()
        raise ValueError(f"prompt holds ids {low} to {high}, should be 0 to {config.vocab_size - 1}")
    if prompt.shape[1] + gen_length > config.max_sequence_length:
        raise ValueError(
            f"prompt and gen_length take {prompt.shape[1]} + {gen_length} positions, "
            f"should be at most max_sequence_length {config.max_sequence_length}"
        )
    return prompt.to(model.wte.weight.device, torch.long)


# ---- Command line ----------------------------------------------------------------------------------


def settings(gen_length):
    """Arguments of `generate` for each policy by name, with settings that suit the response's length.

    The paper's k = 32 and sigma = 10 belong to 256 tokens and scale with the response: a window much
    wider than k would spread stage 1 too thin. Fast-dLLM's caches work in blocks.
    """
    k, sigma = max(1, gen_length // 8), 10 * gen_length / 256
    block_length = math.gcd(gen_length, 32 if gen_length >= 128 else 16)
    return {
        "vanilla": dict(policy=RecomputeAll()),
        "prefix": dict(policy=PrefixCache(), block_length=block_length),
        "dual": dict(policy=DualCache(), block_length=block_length),
        "d2cache": dict(policy=D2Cache(k=k, p=0.1, sigma=sigma), sigma=sigma),
    }


def encode_prompt(tokenizer, text):
    """A user's text as the model expects it, in the chat template if it has one.  -> (1, P) ids

    Raises ValueError for words that the tokenizer does not know.
    """
    if tokenizer.token_to_id("<|start_header_id|>") is not None:
        text = chat_prompt([{"role": "user", "content": text}])
    encoding = tokenizer.encode(text, add_special_tokens=False)
    pieces = zip(encoding.tokens, encoding.offsets)
    unknown = [text[start:stop].strip() for token, (start, stop) in pieces if token == "<unk>"]
    if unknown:
        raise ValueError(f"prompt: this model has no token for {', '.join(map(repr, unknown))}")
    return torch.tensor([encoding.ids])


def decode_response(tokenizer, ids, eos_token_id):
    """The text of a response, a list of ids, up to its first end-of-sequence token."""
    if eos_token_id in ids:
        ids = ids[: ids.index(eos_token_id)]
    return tokenizer.decode(ids).strip()


def main():
    parser = argparse.ArgumentParser(
        description="Decode the answer to a prompt.",
        usage=argparse.SUPPRESS,  # so that a mistake costs one line, not five
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="checkpoint folder or hub repository")
    parser.add_argument("--prompt", default=EXAMPLE, help="the user's text")
    parser.add_argument("--policy", default="d2cache", choices=settings(1), help="what to recompute")
    parser.add_argument("--gen-length", default=64, type=int, help="tokens to decode")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of torch")
    args = parser.parse_args()

    recomputed = []
    try:
        if args.gen_length < 1:
            raise ValueError(f"--gen-length is {args.gen_length}, should be at least 1")
        tokenizer = load_tokenizer(args.model)
        prompt = encode_prompt(tokenizer, args.prompt)
        model = Transformer.from_pretrained(args.model, args.device)
        tokens = generate(
            model,
            prompt,
            args.gen_length,
            on_step=lambda state, chosen: recomputed.append(chosen.float().mean().item()),
            **settings(args.gen_length)[args.policy],
        )
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    response = tokens[0, prompt.shape[1] :].tolist()
    print(decode_response(tokenizer, response, model.config.eos_token_id))
    share = sum(recomputed) / len(recomputed)
    print(f"{len(recomputed)} forwards, {share:.1%} of positions recomputed", file=sys.stderr)


if __name__ == "__main__":
    main()
