"""Train the embedded model: `python tests/tiny/train.py` (about half an hour on one CPU core).

LLaDA's objective on the word problems of problems.py: draw t ~ U(0, 1), mask every token of the
response with probability t, and minimise cross-entropy on the masked tokens / t. Four things make
a model of 0.8 M parameters learn this in minutes, not hours:
  - an initialisation that copies: keys resemble queries, values pass through, the head resembles
    the embedding. Word problems are mostly copying.
  - a curriculum: 1-2 events in a problem, then 2-3, then 3-5.
  - drills: now and then the masks are not random but hide what takes arithmetic, the results of
    equations together with every copy from which they could be read off.
  - a polish at the end, where some masks hide all that follows a token. Random masks never do, so
    without it the model fails in left-to-right order: it had learned to read the sign of an
    equation off its result.
The schedule counts steps and everything is seeded: one machine, one model.
"""

import json
import math
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors import TensorSpec, serialize_file
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from model import IMPLEMENTED, Config, Transformer  # noqa: E402
from problems import (  # noqa: E402
    DAYS,
    EOS,
    MASK,
    RESPONSE_LENGTH,
    TRAIN_SEED,
    equation,
    make_tokenizer,
    problem,
    vocabulary,
)

STEPS, BATCH = 7600, 16
MUON_LR, ADAMW_LR, WEIGHT_DECAY = 0.02, 3e-3, 0.05
WARM_UP_STEPS, DECAY_FROM = 60, 0.35  # the rate falls linearly over the last 65 % of the steps
POLISH_STEPS, POLISH_PEAK, POLISH_SEED = 400, 0.25, 5  # the peak as a share of the rates above
LEAST_T = 1 / RESPONSE_LENGTH
DRILL_LENGTH = 110

# Rows: up to this share of the training; events least and most; response length; how often a drill;
# which drill then: loose equations, a problem's answer alone, a whole problem.
CURRICULUM = [
    (0.08, (1, 2), 32, 0.00, (1.00, 0.00, 0.00)),
    (0.14, (1, 2), 32, 0.35, (1.00, 0.00, 0.00)),
    (0.27, (2, 3), 48, 0.45, (0.60, 0.40, 0.00)),
    (0.55, (3, 5), RESPONSE_LENGTH, 0.50, (0.35, 0.25, 0.40)),
    (1.00, (3, 5), RESPONSE_LENGTH, 0.50, (0.15, 0.10, 0.75)),
]

CONFIG = Config(
    d_model=128,
    n_layers=4,
    n_heads=4,
    n_kv_heads=4,
    mlp_hidden_size=352,
    vocab_size=len(vocabulary()),
    embedding_size=len(vocabulary()),
    max_sequence_length=512,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    mask_token_id=MASK,
    eos_token_id=EOS,
)


def initialise(model):
    """Weights that copy from the first step on."""
    depth = math.sqrt(2 * len(model.blocks))
    nn.init.normal_(model.wte.weight, std=0.1)
    with torch.no_grad():
        model.wte.weight[MASK] *= 0.1
        model.ff_out.weight.copy_(0.3 * model.wte.weight)
        for block in model.blocks:
            for linear in (block.q_proj, block.k_proj, block.v_proj):
                nn.init.orthogonal_(linear.weight)
            for linear in (block.ff_proj, block.up_proj, block.ff_out):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            block.k_proj.weight.lerp_(block.q_proj.weight, 0.5)
            block.attn_out.weight.copy_(0.15 * block.v_proj.weight.T)
            block.ff_out.weight /= depth


def pad_with_eos(ids, length):
    return ids + [EOS] * (length - len(ids))


class Problems:
    """Batches of problems with prompts of equal length; keeps the unfinished batches."""

    def __init__(self, rng, tokenizer):
        self.rng, self.tokenizer, self.waiting = rng, tokenizer, {}

    def batch(self, events, response_length):
        """tokens (B, T) and the length of their prompts."""
        while True:
            prompt, response = (
                self.tokenizer.encode(text).ids for text in problem(self.rng, *events)
            )
            if len(response) >= response_length:
                continue
            rows = self.waiting.setdefault((len(prompt), response_length), [])
            rows.append(prompt + pad_with_eos(response, response_length))
            if len(rows) == BATCH:
                tokens = torch.tensor(rows)
                rows.clear()
                return tokens, len(prompt)


def weighted_loss(model, tokens, masked, weight):
    """Sum of weight x cross-entropy over the tokens (B, T) of any weight; hidden are `masked`."""
    hidden, _ = model.trunk(torch.where(masked, MASK, tokens))
    graded = weight > 0
    loss = F.cross_entropy(model.head(hidden[graded]), tokens[graded], reduction="none")
    return (loss * weight[graded]).sum()


def diffusion_loss(model, tokens, prompt_length):
    """LLaDA, Eq. 3: cross-entropy / t, averaged over sequences and response length.

    t is stratified over the batch: B equal steps from a random start, so its mean hardly varies.
    """
    B, T = tokens.shape
    t = (torch.rand(1) + torch.arange(B) / B) % 1.0
    t = t.clamp_min(LEAST_T)[:, None]
    response = torch.arange(T) >= prompt_length
    masked = response & (torch.rand(B, T) < t)
    return weighted_loss(model, tokens, masked, masked / t) / (B * (T - prompt_length))


def drill_loss(model, tokens, weight, masked=None):
    """Mean cross-entropy by weight (B, T); hidden is `masked`, by default all that has a weight."""
    masked = weight > 0 if masked is None else masked
    return weighted_loss(model, tokens, masked, weight) / weight.sum()


def equations_drill(rng, tokenizer):
    """Unrelated equations in a row with some of the results hidden: tokens and weights, (B, T)."""
    rows, results = [], []
    for _ in range(BATCH):
        ids, hide = [], []
        while len(ids) < DRILL_LENGTH:
            count = rng.randint(10, 99)
            sign, amount, result = equation(rng, count)
            text = f"{rng.choice(DAYS)}: {count} {sign} {amount} = {result}."
            ids += tokenizer.encode(text).ids
            hide += [False] * (len(ids) - len(hide) - 3) + [True, True, False]  # two digits, "."
        rows.append(ids[:DRILL_LENGTH])
        results.append(hide[:DRILL_LENGTH])
    share = 0.3 + 0.7 * torch.rand(BATCH, 1)
    hidden = torch.tensor(results) & (torch.rand(BATCH, DRILL_LENGTH) < share)
    return torch.tensor(rows), hidden.float()


def chain_drill(rng, tokenizer, tokens, prompt_length, answer_only):
    """Real problems with results hidden in every place they stand: tokens and weights, (B, T).

    A result stands behind its "=" and again at the head of the next equation (or behind "####").
    Half of the time all results from some equation on are hidden: the state of left-to-right
    decoding. Where the operand is hidden too, the weight is small: it takes two steps at once.
    """
    equals, colon, final = (tokenizer.token_to_id(sign) for sign in (" =", ":", " ####"))
    weight, end = torch.zeros(tokens.shape), 0
    for row, ids in enumerate(tokens.tolist()):
        results = [i for i, id in enumerate(ids) if id == equals and i >= prompt_length]
        heads = [i for i, id in enumerate(ids) if id == colon and i >= prompt_length]
        copies = heads[1:] + [ids.index(final)]
        end = max(end, copies[-1] + 4)
        if rng.random() < 0.5:
            first = rng.randrange(len(results))
            hide = [i >= first for i in range(len(results))]
        else:
            share = rng.uniform(0.2, 0.8)
            hide = [rng.random() < share for _ in results]
        for i, (result, copy) in enumerate(zip(results, copies)):
            if hide[i]:
                blind = i > 0 and hide[i - 1]
                for place in (result, copy):
                    weight[row, place + 1 : place + 3] = 0.3 if blind else 1.0
    if not weight.any():
        weight[:, -1] = 1.0
    if answer_only:
        tokens, weight = tokens[:, prompt_length:end], weight[:, prompt_length:end]
    return tokens, weight


def suffix_drill(rng, tokens, prompt_length):
    """Real problems as left-to-right decoding meets them: all hidden from some token on.

    Random masks hardly ever look like that. The weight is on the ten tokens that come next, about
    one equation.
    """
    weight, masked = torch.zeros(tokens.shape), torch.zeros(tokens.shape, dtype=torch.bool)
    for row, ids in enumerate(tokens.tolist()):
        answer_length = len([id for id in ids[prompt_length:] if id != EOS])
        first = prompt_length + rng.randrange(answer_length)
        masked[row, first:] = True
        weight[row, first : first + 10] = 1.0
    return tokens, weight, masked


def step_loss(model, problems, rng, progress):
    """What one step trains, and its loss: mostly diffusion, now and then a drill."""
    stage = next(stage for stage in CURRICULUM if progress < stage[0])
    _, events, response_length, drill_rate, kinds = stage
    if rng.random() >= drill_rate:
        return "diffusion", diffusion_loss(model, *problems.batch(events, response_length))
    kind = rng.choices(("equations", "answer", "problem"), kinds)[0]
    if kind == "equations":
        tokens, weight = equations_drill(rng, problems.tokenizer)
    else:
        batch = problems.batch(events, response_length)
        tokens, weight = chain_drill(rng, problems.tokenizer, *batch, kind == "answer")
    return kind, drill_loss(model, tokens, weight)


def polish_loss(model, problems, rng):
    """What one step of the polish trains, and its loss."""
    share, batch = rng.random(), problems.batch((3, 5), RESPONSE_LENGTH)
    if share < 0.5:
        return "diffusion", diffusion_loss(model, *batch)
    if share < 0.75:
        return "suffix", drill_loss(model, *suffix_drill(rng, *batch))
    tokens, weight = chain_drill(rng, problems.tokenizer, *batch, answer_only=False)
    return "problem", drill_loss(model, tokens, weight)


def make_optimisers(model):
    """Muon for the matrices of the blocks, AdamW for the embedding, the head and the norms."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [
        p for name, p in model.named_parameters() if p.dim() == 1 or not name.startswith("blocks")
    ]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, momentum=0.95)
    adamw = torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adamw]


def rate(step):
    """Learning rate of a step as a share of the full one: warm-up, plateau, linear decay to 2 %."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    left = min(1.0, (1 - step / STEPS) / (1 - DECAY_FROM))
    return warm_up * (0.02 + 0.98 * left if left < 1 else 1.0)


def polish_rate(step):
    """The same for the polish: warm-up to its peak, then linear decay to 2 %."""
    left = 1 - step / POLISH_STEPS
    return min(1.0, 2 * (step + 1) / WARM_UP_STEPS) * (0.02 + (POLISH_PEAK - 0.02) * left)


def train(model, steps, rate, loss_of_step):
    """Take `steps` steps with fresh optimisers; loss_of_step(step) gives (kind, loss)."""
    optimisers, averages, cpu_start = make_optimisers(model), {}, time.process_time()
    full_rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    for step in tqdm(range(steps), unit="step"):
        for optimiser, full in zip(optimisers, full_rates):
            optimiser.param_groups[0]["lr"] = full * rate(step)
        kind, loss = loss_of_step(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        averages[kind] = 0.97 * averages.get(kind, loss.item()) + 0.03 * loss.item()
        if step % 100 == 99:
            losses = "  ".join(f"{kind} {value:.3f}" for kind, value in sorted(averages.items()))
            minutes = (time.process_time() - cpu_start) / 60
            print(f"step {step + 1:5d}  {minutes:5.1f} CPU minutes  {losses}", flush=True)


def save_tensors(tensors, path):
    """Write contiguous CPU tensors as safetensors; the library's `save_file` needs NumPy."""
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tensor.shape,
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in tensors.items()
    }
    serialize_file(specs, path, metadata={"format": "pt"})


def save(model, tokenizer):
    """Write the checkpoint in LLaDA's format: config.json, model.safetensors, tokenizer.json."""
    config = asdict(CONFIG) | IMPLEMENTED
    config |= {"model_type": "llada", "architectures": ["LLaDAModelLM"], "pad_token_id": EOS}
    config = {key: value for key, value in sorted(config.items()) if value is not None}
    (HERE / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {"model.transformer." + name: p for name, p in model.state_dict().items()}
    save_tensors(tensors, HERE / "model.safetensors")
    tokenizer.save(str(HERE / "tokenizer.json"))


def polish(model, tokenizer):
    """Left-to-right states among the random ones, from seeds of its own."""
    torch.manual_seed(POLISH_SEED)
    rng = random.Random(POLISH_SEED)
    problems = Problems(rng, tokenizer)
    train(model, POLISH_STEPS, polish_rate, lambda step: polish_loss(model, problems, rng))


def main():
    torch.set_num_threads(1)
    torch.manual_seed(TRAIN_SEED)
    rng, tokenizer = random.Random(TRAIN_SEED), make_tokenizer()
    problems, model = Problems(rng, tokenizer), Transformer(CONFIG)
    initialise(model)
    train(model, STEPS, rate, lambda step: step_loss(model, problems, rng, step / STEPS))
    polish(model, tokenizer)
    save(model, tokenizer)


if __name__ == "__main__":
    main()
