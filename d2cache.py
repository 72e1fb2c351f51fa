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
import sys
from dataclasses import dataclass, replace
from functools import partial
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


def certainty_density(known, sigma, dtype=torch.float32):
    """Share of known positions around each one, in a Gaussian window of sigma positions.  Eq. 3.

    D(i) = sum over known j of exp(-(i - j)^2 / (2 sigma^2)), divided by the mass of the window.
    Over the whole canvas, as in the paper; the authors' code sees the response alone.
    (B, T) bool -> (B, T) in [0, 1]
    """
    T = known.shape[1]
    distance = torch.arange(1 - T, T, device=known.device, dtype=dtype)
    window = torch.exp(-(distance**2) / (2 * sigma**2))
    shifted = window.unfold(0, T, 1)  # (2T - 1) -> (T, T): row r is window[r : r + T]
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
    # Round-off may lift a partial sum to the total: without p == 1 the tail could be lost.
    within = (held_before <= p * held[:, -1:]) & (held_before < held[:, -1:]) | (p == 1)
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

    tokens: torch.Tensor  # [MASK] where not known, and wherever the prompt holds one
    known: torch.Tensor  # prompt or decoded, whatever the token is
    fresh: torch.Tensor  # decoded in the last step: key and value still say [MASK]
    confidence: torch.Tensor  # of masked positions, when they were last recomputed. Eq. 1
    influence: torch.Tensor  # attention rollout of the last step, if the policy uses it
    block: slice  # the positions being decoded
    step: int  # steps done


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
        inside = best(prior, ~state.known & in_block(state), self.k)
        left = self.k - inside.sum(dim=1, keepdim=True)
        return inside | best(prior, ~state.known & ~in_block(state), left)

    def attended(self, state):
        """Stage 2, Eq. 9: the nucleus of influence among prompt and decoded positions."""
        return nucleus(state.influence, self.p, among=state.known)


def check_arguments(model, prompt, gen_length, block_length, tokens_per_step, sigma):
    """ValueError for what `generate` cannot decode; the prompt as int64 on the model's device."""
    integer = prompt.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    shape = f"prompt is {tuple(prompt.shape)} {prompt.dtype}"
    require(integer and prompt.dim() == 2 and len(prompt), f"{shape}, should be (B, P) integers")
    P, most, V = prompt.shape[1], model.config.max_sequence_length, model.config.vocab_size
    prompt = prompt.to(model.wte.weight.device, torch.long)
    wrong = prompt[(prompt < 0) | (prompt >= V)].unique().tolist()
    require(not wrong, f"prompt holds ids {wrong[:5]}, should be 0 to {V - 1}")
    require(gen_length >= 1, f"gen_length is {gen_length}, should be at least 1")
    lengths = f"gen_length is {gen_length} after a prompt of {P}"
    require(P + gen_length <= most, f"{lengths}, should be at most max_sequence_length {most}")
    divides = block_length is None or block_length >= 1 and gen_length % block_length == 0
    require(divides, f"block_length is {block_length}, should divide gen_length {gen_length}")
    require(tokens_per_step >= 1, f"tokens_per_step is {tokens_per_step}, should be at least 1")
    require(sigma is None or sigma > 0, f"sigma is {sigma}, should be above 0, or None")
    return prompt


def blank_canvas(model, prompt, gen_length):
    """The state before the first step: the prompt, then gen_length masks."""
    tokens = F.pad(prompt, (0, gen_length), value=model.config.mask_token_id)
    known = F.pad(torch.ones_like(prompt, dtype=torch.bool), (0, gen_length), value=False)
    wide = torch.promote_types(model.wte.weight.dtype, torch.float32)
    zeros = torch.zeros(tokens.shape, device=tokens.device, dtype=wide)
    ones, fresh = torch.ones_like(zeros), torch.zeros_like(known)
    return State(tokens, known, fresh, zeros, ones, slice(0, 0), step=0)


def choose(policy, state, waits):
    """The positions recomputed in this step: all in the first, then as the policy says.  (B, T)

    A sequence that `waits` (B, 1), its block done before others', recomputes only fresh positions.
    Every policy here recomputes them in the sequence's next step anyway: waiting leaves no trace.
    """
    if state.step == 0:
        return torch.ones_like(state.known)
    chosen, shape = policy.choose(state), tuple(state.known.shape)
    said = f"policy {type(policy).__name__} chose {tuple(chosen.shape)} {chosen.dtype}"
    matches = chosen.dtype == torch.bool and chosen.shape == shape
    require(matches, f"{said}, should be {shape} torch.bool")
    return state.fresh.where(waits, chosen)


def count(chosen, masked, state, left, policy):
    """Q, R, and each sequence's number of candidates: the step's one transfer to the host.

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
    twice gives the same keys and values, so company changes no sequence.
    """
    order = (chosen.int() + masked.int()).argsort(dim=1, descending=True, stable=True)[:, :Q]
    valid = chosen.gather(1, order)
    return torch.where(valid, order, order[:, :1]), valid


def predict(logits, mask_token_id):
    """Probability and id of the likeliest token but [MASK].  Eq. 1.  (B, R, V) -> 2 x (B, R)"""
    wide = torch.promote_types(logits.dtype, torch.float32)
    excluded = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
    token = logits.masked_fill(excluded, -torch.inf).argmax(dim=-1)
    probability = torch.softmax(logits, dim=-1, dtype=wide)
    return probability.gather(-1, token[..., None])[..., 0], token


def recompute(model, cache, tokens, positions, valid, R, uses_attention):
    """One forward pass over positions (B, Q): all that a step wants to know of the model.

    Only the first R positions, the masked ones, pass the head. -> their confidence and token,
    (B, R) each, and the influence of every position, (B, T): all alike if it is not used.
    """
    hidden, maps = model.trunk(tokens, positions, cache, uses_attention)
    confidence, token = predict(model.head(hidden[:, :R]), model.config.mask_token_id)
    if not uses_attention:
        return confidence, token, torch.ones_like(tokens, dtype=confidence.dtype)
    return confidence, token, attention_rollout(maps, positions, valid)


def new_cache(model, B, T):
    """An empty cache in the model's precision, on its device."""
    weight = model.wte.weight
    return KVCache(model.config, B, T, weight.device, weight.dtype)


class CudaGraphs:
    """Replays `recompute` as CUDA graphs: one launch for the model's thousand.

    A graph fixes sizes and addresses. So Q and R are rounded up to multiples of `bucket` (`pack`
    fills up with repeats, which change results by round-off at most), each pair gets a graph when
    it first occurs, and all decodes of one shape share a cache, which stays as long as this object.
    """

    def __init__(self, model, bucket=32):
        self.model, self.bucket = model, bucket
        self.caches, self.graphs, self.pool = {}, {}, None

    def round_up(self, n, most):
        return min(most, math.ceil(n / self.bucket) * self.bucket)

    def cache(self, B, T):
        if (B, T) not in self.caches:
            self.caches[B, T] = new_cache(self.model, B, T)
        return self.caches[B, T]

    def recompute(self, model, cache, tokens, positions, valid, R, uses_attention):
        inputs, sizes = (tokens, positions, valid), (*tokens.shape, positions.shape[1], R)
        if (sizes, uses_attention) not in self.graphs:
            own = [tensor.clone() for tensor in inputs]
            run = partial(recompute, model, cache, *own, R, uses_attention)
            self.graphs[sizes, uses_attention] = own, *self.capture(run)
        own, graph, outputs = self.graphs[sizes, uses_attention]
        for tensor, value in zip(own, inputs):
            tensor.copy_(value)
        graph.replay()
        return outputs

    def capture(self, run):
        """A graph of what run() launches, and the tensors that a replay leaves its results in."""
        graph, device = torch.cuda.CUDAGraph(), self.model.wte.weight.device
        # Sharing memory is safe: the results of one graph are used up before the next is replayed.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=self.pool):
            outputs = run()
        self.pool = graph.pool()
        return graph, outputs


@torch.no_grad()
def generate(model, prompt, gen_length, block_length=None, tokens_per_step=1,
             policy=RecomputeAll(), sigma=None, on_step=None, graphs=None):  # fmt: skip
    """Decode gen_length tokens after each prompt.  (B, P) integers -> (B, P + gen_length)

    Blocks of block_length positions are decoded from left to right (None: one block). Each step
    recomputes what `policy` chooses and commits the tokens_per_step best of the block's masked
    positions among them: by confidence, or by certainty prior if sigma is given. [MASK] is never
    predicted, and a sequence decodes alone as in company, but for round-off. on_step(state, chosen)
    is called after every step with the new State and the positions (B, T) that were recomputed.
    graphs, a CudaGraphs of the model, makes every step but the first a replay.
    Raises ValueError for arguments out of range and for a policy that leaves nothing to commit.
    """
    prompt = check_arguments(model, prompt, gen_length, block_length, tokens_per_step, sigma)
    require(not graphs or graphs.model is model, "graphs should be CudaGraphs(model) of this model")
    (B, P), T = prompt.shape, prompt.shape[1] + gen_length
    block_length = block_length or gen_length
    state = blank_canvas(model, prompt, gen_length)
    cache = graphs.cache(B, T) if graphs else new_cache(model, B, T)

    for start in range(P, T, block_length):
        state = replace(state, block=slice(start, start + block_length))
        left = [block_length] * B  # masked positions of the block, by sequence
        while any(left):
            waits = state.known[:, state.block].all(dim=1, keepdim=True)  # for other sequences
            chosen = choose(policy, state, waits)
            masked = chosen & ~state.known
            Q, R, candidates = count(chosen, masked, state, left, policy)
            Q, R = (graphs.round_up(Q, T), graphs.round_up(R, T)) if graphs else (Q, R)
            positions, valid = pack(chosen, masked, Q)
            rows = positions[:, :R]  # pack puts the masked ones first

            replay = graphs and state.step > 0  # a graph of the first would keep its T x T maps
            confidence, token, influence = (graphs.recompute if replay else recompute)(
                model, cache, state.tokens, positions, valid, R, policy.uses_attention
            )
            scattered = state.confidence.scatter(1, rows, confidence)
            confidence = scattered.where(masked, state.confidence)
            score = confidence if sigma is None else certainty_prior(confidence, state.known, sigma)
            commit = best(score, masked & in_block(state), tokens_per_step)

            state = replace(
                state,
                tokens=state.tokens.scatter(1, rows, token).where(commit, state.tokens),
                known=state.known | commit,
                fresh=state.fresh.where(waits, commit),
                confidence=confidence,
                influence=state.influence.where(waits, influence),
                step=state.step + 1,
            )
            left = [n - min(m, tokens_per_step) for n, m in zip(left, candidates)]
            if on_step is not None:
                on_step(state, chosen)
    return state.tokens


def settings(gen_length):
    """Arguments of `generate` by policy name: the paper's k and sigma, and Fast-dLLM's blocks.

    Below 256 tokens k and sigma shrink in proportion: a window much wider than k would spread stage
    1 too thin.
    """
    k, sigma = min(32, max(1, gen_length // 8)), min(10.0, 10 * gen_length / 256)
    block_length = math.gcd(gen_length, 32 if gen_length >= 128 else 16)
    return {
        "vanilla": dict(policy=RecomputeAll()),
        "prefix": dict(policy=PrefixCache(), block_length=block_length),
        "dual": dict(policy=DualCache(), block_length=block_length),
        "d2cache": dict(policy=D2Cache(k=k, p=0.1, sigma=sigma), sigma=sigma),
    }


def main():
    """Print the decoded answer to a prompt; a mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", default=EMBEDDED_MODEL, help="checkpoint folder or hub id")
    add("--prompt", default=EXAMPLE, help="the user's text")
    add("--policy", default="d2cache", choices=settings(1), help="which positions to recompute")
    add("--gen-length", default=64, type=int, help="tokens to decode")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    args = parser.parse_args()

    shares = []
    try:
        require(args.gen_length >= 1, f"--gen-length is {args.gen_length}, should be at least 1")
        tokenizer = load_tokenizer(args.model)
        prompt = encode_prompt(tokenizer, args.prompt)
        model = Transformer.from_pretrained(args.model, args.device)
        arguments = settings(args.gen_length)[args.policy]
        arguments["on_step"] = lambda state, chosen: shares.append(chosen.float().mean().item())
        tokens = generate(model, prompt, args.gen_length, **arguments)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    print(decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.eos_token_id))
    share = f"{sum(shares) / len(shares):.1%}"
    print(f"{len(shares)} forwards, {share} of positions recomputed", file=sys.stderr)


if __name__ == "__main__":
    main()
