"""What d2Cache rests on, looked for in the embedded model: `python tests/tiny/observations.py`.

The paper observes three things in LLaDA-8B, a model of 32 layers:
  1. the keys of a masked position move slowly, then fast shortly before it is decoded, then rest,
     so few masks need recomputing at a time (stage 1);
  2. attention gathers on few prompt and decoded positions (stage 2);
  3. confidence alone commits the end of the text too early (certainty prior).
This measures the same in 4 layers under uncached decoding, and prints what it finds, the same or
not. Then it prints one decode by confidence, step by step, to show how the third comes about.

Paper: arXiv 2509.23094, section 3. Shape letters as in model.py, and S canvases of a decode: the
blank one, then the one after every step.
"""

import itertools
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from d2cache import (  # noqa: E402
    EMBEDDED_MODEL,
    attention_rollout,
    decode,
    generate,
    highest,
    paper_settings,
)
from model import (  # noqa: E402
    KVCache,
    Transformer,
    decode_response,
    encode_prompt,
    load_tokenizer,
)

from tiny.problems import SAMPLE, TEST_SEED, draw_problems  # noqa: E402

import torch  # noqa: E402  (after model, which keeps its import quiet)
import torch.nn.functional as F  # noqa: E402

GEN_LENGTH = 64
EIGHTH = GEN_LENGTH // 8
CHOSEN = range(0, 48, 3)  # of the held-out problems
QUARTERS = [16, 32, 48]  # of the steps, after which influence is measured

PRIOR = {}  # the default
BLOCKS = {"block_length": paper_settings(GEN_LENGTH)["dual"]["block_length"]}
CONFIDENCE = {"sigma": None}  # alone: no prior, no blocks
ORDERS = {"certainty prior": PRIOR, "blocks": BLOCKS, "confidence": CONFIDENCE}

SPANS = {  # of steps left until a position is decoded, least and most
    "63-33 before": (33, 63),
    "32-17 before": (17, 32),
    "16-9 before": (9, 16),
    "8-5 before": (5, 8),
    "4-3 before": (3, 4),
    "2 before": (2, 2),
    "1 before": (1, 1),
    "becomes a token": (0, 0),
    "1 after": (-1, -1),
    "2-4 after": (-4, -2),
    "5-8 after": (-8, -5),
    "9-16 after": (-16, -9),
    "17-63 after": (-63, -17),
}
KINDS = ("prompt", "decoded", "masked", "top tenth", "masked in the top tenth")
BAR = 40  # characters of the longest bar
COLUMNS = (34, 30, 34)  # widths of the table: claim, paper, here


@dataclass(frozen=True)
class Canvases:
    """The canvases of B sequences with prompts of P tokens, decoded without a cache."""

    tokens: torch.Tensor  # (B, S, T)
    known: torch.Tensor  # (B, S, T)
    prompt_length: int

    @property
    def decoded_at(self):
        """The first canvas that shows each position's token, 0 for a prompt.  (B, T)"""
        return (~self.known).sum(dim=1)

    @property
    def steps_left(self):
        """Steps until each position is decoded, as each step ends.  (B, S - 1, T)

        0 is the step that makes it a token, and what follows is negative.
        """
        S = self.known.shape[1]
        return self.decoded_at[:, None] - torch.arange(1, S)[:, None]

    @property
    def in_order(self):
        """The response's tokens in the order of their decoding.  (B, T - P)"""
        response = self.tokens[:, -1, self.prompt_length :]
        order = self.decoded_at[:, self.prompt_length :].argsort(dim=1, stable=True)
        return response.gather(1, order)


def canvases(model, prompt, order):
    """An uncached decode of prompts (B, P) in an order of decoding."""
    blank = F.pad(prompt, (0, GEN_LENGTH), value=model.config.mask_token_id)
    in_prompt = torch.arange(blank.shape[1]) < prompt.shape[1]
    tokens = [blank]
    known = [in_prompt.expand_as(blank)]
    for state in decode(model, prompt, GEN_LENGTH, **order):
        tokens.append(state.tokens)
        known.append(state.known)
    return Canvases(torch.stack(tokens, dim=1), torch.stack(known, dim=1), prompt.shape[1])


def relative_change(keys):
    """||k(s+1) - k(s)|| / ||k(s)||, mean over layers.  (L, S, T, G, D) -> (S - 1, T)

    In the first layer a key follows from token and place alone: it moves in one step only.
    """
    keys = keys.flatten(3)
    moved = (keys[:, 1:] - keys[:, :-1]).norm(dim=3)
    return (moved / keys[:, :-1].norm(dim=3)).mean(dim=0)


def key_changes(model, tokens):
    """How far every position's keys move in each step of a decode.  (B, S, T) -> (B, S - 1, T)"""
    changes = []
    for sequence in tokens:  # its S canvases are a batch
        cache = KVCache(model.config, *sequence.shape, tokens.device, model.wte.weight.dtype)
        model.hidden_states(sequence, cache=cache)
        changes.append(relative_change(cache.k))
    return torch.stack(changes)


def influence_shares(model, tokens, known, P):
    """Each of the KINDS' share of the positions, and of the attention rollout over all rows.

    tokens, known (B, T) -> (B, 5, 2)
    """
    T = tokens.shape[1]
    positions = torch.arange(T).expand_as(tokens)
    everywhere = torch.ones_like(known)
    _, maps = model.hidden_states(tokens, return_attention=True)
    influence = attention_rollout(maps, positions, everywhere)

    top = highest(influence, everywhere, round(T / 10))
    kinds = torch.stack([positions < P, known & (positions >= P), ~known, top, top & ~known])
    shares = torch.stack([everywhere, influence]) / T  # each row sums to 1
    return (kinds[:, None] * shares).sum(dim=3).permute(2, 0, 1)  # (5, 2, B, T) -> (B, 5, 2)


def mean_within(values, left, least, most):
    """Mean of the values for which `left`, of the same shape, is from least to most."""
    return values[(least <= left) & (left <= most)].mean().item()


def first(hits):
    """The number, counted from 1, of each row's first hit; T + 1 without any.  (B, T) -> (B,)"""
    return 1 + (hits.cumsum(dim=1) == 0).sum(dim=1)


@dataclass(frozen=True)
class Measured:
    """What was seen of N problems decoded in one order."""

    changes: torch.Tensor  # of the response's keys in every step, (N, S - 1, T - P)
    left: torch.Tensor  # steps until decoded, (N, S - 1, T - P)
    shares: torch.Tensor  # of positions and influence, (N, quarters, kinds, 2)
    eos: torch.Tensor  # whether the n-th token committed was end-of-text, (N, T - P)
    solved: float  # share of the problems


def measure(model, tokenizer, problems, order):
    """Decode (question, answer) pairs in an order and measure everything."""
    prompts = [encode_prompt(tokenizer, question) for question, _ in problems]
    changes = []
    left = []
    shares = []
    eos = []
    texts = []
    for P, group in itertools.groupby(prompts, key=lambda prompt: prompt.shape[1]):
        seen = canvases(model, torch.cat(list(group)), order)
        changes.append(key_changes(model, seen.tokens)[..., P:])
        left.append(seen.steps_left[..., P:])
        shares.append(shares_at_quarters(model, seen))
        eos.append(seen.in_order == model.config.eos_token_id)
        for response in seen.tokens[:, -1, P:]:
            texts.append(decode_response(tokenizer, response, model.config.end_ids))

    numbers = [answer.split("####")[1] for _, answer in problems]
    right = [text.endswith("####" + number) for text, number in zip(texts, numbers)]
    return Measured(
        changes=torch.cat(changes),
        left=torch.cat(left),
        shares=torch.cat(shares),
        eos=torch.cat(eos),
        solved=sum(right) / len(right),
    )


def shares_at_quarters(model, canvases):
    """`influence_shares` after each of the QUARTERS.  -> (B, quarters, kinds, 2)"""
    parts = []
    for step in QUARTERS:
        tokens = canvases.tokens[:, step]
        known = canvases.known[:, step]
        parts.append(influence_shares(model, tokens, known, canvases.prompt_length))
    return torch.stack(parts, dim=1)


def claims(measured):
    """Rows of the table: what the paper claims, what it saw, and what is seen here."""
    prior = measured["certainty prior"]
    far = mean_within(prior.changes, prior.left, 9, 63)
    near = mean_within(prior.changes, prior.left, 1, 8)
    after = mean_within(prior.changes, prior.left, -63, -1)
    _, _, masked, top, masked_in_top = prior.shares.mean(dim=(0, 1)).tolist()
    early = {name: seen.eos[:, :EIGHTH].float().mean().item() for name, seen in measured.items()}
    solved = {name: f"{seen.solved:.0%}" for name, seen in measured.items()}
    return [
        (
            "Keys move fast shortly before their position is decoded, and rest afterwards.",
            "Three phases: slow, fast, at rest.",
            f"In the 8 steps before {near / far:.1f} times as much as earlier, and "
            f"{near / after:.1f} times as much as afterwards.",
        ),
        (
            "Attention gathers on few positions.",
            "Yes.",
            f"A tenth of the positions holds {top[1]:.0%} of the influence.",
        ),
        (
            "These are prompt and decoded ones.",
            "Yes.",
            f"{masked_in_top[0] / top[0]:.0%} of that tenth are masked. A masked position has "
            f"{masked[1] / masked[0]:.1f} times the mean influence.",
        ),
        (
            "Confidence alone commits the end of the text too early.",
            "Mean score of four tasks: confidence 32.7, blocks 43.9, certainty prior 44.1.",
            f"Solved: confidence {solved['confidence']}, blocks {solved['blocks']}, certainty "
            f"prior {solved['certainty prior']}. End-of-text among the first {EIGHTH} tokens "
            f"committed: {early['confidence']:.0%}, {early['blocks']:.0%} and "
            f"{early['certainty prior']:.0%}.",
        ),
    ]


def print_table(rows):
    """Rows of texts, each wrapped within the width of its column."""
    for row in rows:
        cells = [textwrap.wrap(text, width) for text, width in zip(row, COLUMNS)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            columns = [text.ljust(width) for text, width in zip(line, COLUMNS)]
            print("  ".join(columns).rstrip())
        print()


def print_changes(measured):
    """How much keys move, by the steps left until their position is decoded."""
    print("KEYS: ||k(s+1) - k(s)|| / ||k(s)||, mean over layers, by certainty prior")
    means = {name: mean_within(measured.changes, measured.left, *s) for name, s in SPANS.items()}
    longest = max(mean for name, mean in means.items() if name != "becomes a token")
    for name, mean in means.items():
        bar = "#" * min(BAR, round(BAR * mean / longest))
        cut = " ..." if mean > longest else ""
        print(f"{name:16}{mean:7.1%}  {bar}{cut}".rstrip())


def print_shares(measured):
    """Who holds the influence, by certainty prior."""
    print("\nATTENTION: share of positions and of influence (rollout), by certainty prior")
    print(" " * 22 + "".join(f"after step {step}".rjust(24) for step in QUARTERS))
    print(" " * 22 + "".join("positions  influence".rjust(24) for _ in QUARTERS))
    for kind, row in zip(KINDS, measured.shares.mean(dim=0).unbind(dim=1)):
        cells = "".join(f"{positions:13.1%}{influence:11.1%}" for positions, influence in row)
        print(f"{kind:22}{cells}")


def print_ends(measured):
    """When end-of-text is committed, in every order."""
    print("\nEND OF TEXT: its share of the tokens committed, and the step of the first one")
    spans = [f"{n + 1}-{n + EIGHTH}" for n in range(0, GEN_LENGTH, EIGHTH)]
    print("steps".ljust(16) + "".join(head.rjust(8) for head in [*spans, "all", "first"]))
    for name, seen in measured.items():
        eos = seen.eos.float()
        shares = [*eos.unflatten(1, (8, EIGHTH)).mean(dim=(0, 2)), eos.mean()]
        cells = "".join(f"{share:8.1%}" for share in shares)
        print(f"{name:16}{cells}{first(seen.eos).float().mean():8.1f}")


def print_steps(model, tokenizer, question):
    """One decode by confidence, a line for each step: how its calculation is cut short."""
    prompt = encode_prompt(tokenizer, question)
    P = prompt.shape[1]
    print("\nSTEP BY STEP, by confidence: what each step commits, and the response after it")
    print(textwrap.fill(question, 96))
    print("step  position  token     confidence  # a word, | end-of-text, . masked")
    for state in decode(model, prompt, GEN_LENGTH, **CONFIDENCE):
        position = state.fresh[0].int().argmax().item()
        token = tokenizer.decode([state.tokens[0, position].item()], skip_special_tokens=False)
        confidence = state.confidence[0, position].item()
        canvas = sketch(state.tokens[0, P:], state.known[0, P:], model.config.end_ids)
        print(f"{state.step:4}{position - P:10}  {token.strip():10}{confidence:10.2f}  {canvas}")
    print("by confidence:", decode_response(tokenizer, state.tokens[0, P:], model.config.end_ids))
    tokens = generate(model, prompt, GEN_LENGTH, **PRIOR)
    print("by certainty prior:", decode_response(tokenizer, tokens[0, P:], model.config.end_ids))


def sketch(tokens, known, end_ids):
    """A response as a line of signs.  2 x (T - P,) -> str"""
    signs = ""
    for id, is_known in zip(tokens.tolist(), known.tolist()):
        if not is_known:
            signs += "."
        elif id in end_ids:
            signs += "|"
        else:
            signs += "#"
    return signs


def read_problems(numbers):
    """(question, answer) of held-out problems."""
    problems = draw_problems(TEST_SEED)
    return [problems[number] for number in numbers]


def report(numbers):
    """Print the table, what it rests on, and one decode step by step."""
    model = Transformer.from_pretrained(EMBEDDED_MODEL)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    problems = read_problems(numbers)
    measured = {name: measure(model, tokenizer, problems, order) for name, order in ORDERS.items()}
    print(f"{len(problems)} problems, {len(model.blocks)} layers\n")
    print_table([("CLAIM", "PAPER, LLaDA-8B", "HERE"), *claims(measured)])
    print_changes(measured["certainty prior"])
    print_shares(measured["certainty prior"])
    print_ends(measured)
    print_steps(model, tokenizer, SAMPLE)


def main():
    torch.set_num_threads(1)  # the matrices are small
    report(CHOSEN)


if __name__ == "__main__":
    main()
