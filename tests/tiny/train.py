"""Train the embedded model: `python tests/tiny/train.py` (about 20 minutes on one CPU core).

LLaDA's objective on the word problems of problems.py: draw t ~ U(0, 1), mask every token of the
response with probability t, and minimise cross-entropy on the masked tokens / t. Four things make
a model of 0.8 M parameters learn this in minutes, not hours:
  - an initialisation that copies: keys resemble queries, values pass through, the head resembles
    the embedding. Word problems are mostly copying.
  - a curriculum: 1-2 events in a problem, then 2-3, then 3-4.
  - drills: now and then the masks are not random but hide what takes arithmetic, the results of
    equations together with every copy from which they could be read off. A direct answer has no
    equation, so drills take none.
  - a polish at the end, where some masks hide all that follows a token. Random masks never do, so
    without it the model fails in left-to-right order: it had learned to read the sign of an
    equation off its result.
Nobody teaches the model to end its answers early. It learns how often which position is behind the
end, and that is enough to mislead an order that goes by confidence alone.
The schedule counts steps and everything is seeded: one machine, one model.
"""

import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors import TensorSpec, serialize_file
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from model import Config, Transformer  # noqa: E402
from problems import (  # noqa: E402
    DAYS,
    DIRECT_SHARE,
    EOS,
    EVENTS,
    MASK,
    RESPONSE_LENGTH,
    TRAIN_SEED,
    equation,
    make_tokenizer,
    problem,
    vocabulary,
)

STEPS = 7600
BATCH = 16
MUON_LR = 0.02
ADAMW_LR = 3e-3
WEIGHT_DECAY = 0.05
WARM_UP_STEPS = 60
DECAY_FROM = 0.35  # the rate falls linearly over the last 65 % of the steps

POLISH_STEPS = 400
POLISH_PEAK = 0.25  # as a share of the rates above
POLISH_WARM_UP_STEPS = 30
POLISH_SEED = 5

LEAST_T = 1 / RESPONSE_LENGTH
DRILL_LENGTH = 110
BLIND_WEIGHT = 0.3  # of a result whose operand is hidden too: it takes two steps at once
SUFFIX_GRADED = 10  # tokens behind a suffix drill's first mask, about one equation


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum."""

    until: float  # share of the training
    events: tuple  # in a problem, the least and the most
    response_length: int
    drill_rate: float  # how often a drill
    drills: tuple  # how often which: loose equations, an answer alone, a whole problem


CURRICULUM = [
    Stage(0.08, (1, 2), 32, 0.00, (1.00, 0.00, 0.00)),
    Stage(0.14, (1, 2), 32, 0.35, (1.00, 0.00, 0.00)),
    Stage(0.27, (2, 3), 48, 0.45, (0.60, 0.40, 0.00)),
    Stage(0.55, EVENTS, RESPONSE_LENGTH, 0.50, (0.35, 0.25, 0.40)),
    Stage(1.00, EVENTS, RESPONSE_LENGTH, 0.50, (0.15, 0.10, 0.75)),
]

SHAPE = {
    "d_model": 128,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 4,
    "mlp_hidden_size": 352,
    "vocab_size": len(vocabulary()),
    "embedding_size": len(vocabulary()),
    "max_sequence_length": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "include_qkv_bias": False,
    "weight_tying": False,
    "model_type": "llada",
}
# What else LLaDA's config.json says of the architecture. It is the only one model.py has.
ARCHITECTURE = {
    "architectures": ["LLaDAModelLM"],
    "block_type": "llama",
    "block_group_size": 1,
    "activation_type": "silu",
    "include_bias": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "pad_token_id": EOS,
}


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


class Problems:
    """Batches of problems with prompts of equal length; keeps the unfinished batches."""

    def __init__(self, rng, tokenizer):
        self.rng = rng
        self.tokenizer = tokenizer
        self.waiting = {}

    def batch(self, events, response_length, direct_share=DIRECT_SHARE):
        """tokens (B, T) and the length of their prompts."""
        while True:
            question, answer = problem(self.rng, events, direct_share)
            prompt = self.tokenizer.encode(question).ids
            response = self.tokenizer.encode(answer).ids
            if len(response) >= response_length:
                continue

            rows = self.waiting.setdefault((len(prompt), response_length, direct_share), [])
            end = [EOS] * (response_length - len(response))
            rows.append(prompt + response + end)
            if len(rows) == BATCH:
                tokens = torch.tensor(rows)
                rows.clear()
                return tokens, len(prompt)


def weighted_loss(model, tokens, masked, weight):
    """Sum of weight x cross-entropy over the tokens (B, T) of any weight; hidden are `masked`."""
    hidden, _ = model.hidden_states(torch.where(masked, MASK, tokens))
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


def drill_loss(model, tokens, masked, weight):
    """Mean cross-entropy by weight (B, T); hidden are `masked`."""
    return weighted_loss(model, tokens, masked, weight) / weight.sum()


def equations_drill(rng, tokenizer):
    """Unrelated equations in a row with some of the results hidden: tokens, masked, weight."""
    rows = []
    results = []
    for _ in range(BATCH):
        ids = []
        in_result = []
        while len(ids) < DRILL_LENGTH:
            count = rng.randint(10, 99)
            sign, amount, result = equation(rng, count)
            text = f"{rng.choice(DAYS)}: {count} {sign} {amount} = {result}."
            new = tokenizer.encode(text).ids
            ids += new
            in_result += [False] * (len(new) - 3) + [True, True, False]  # two digits, "."
        rows.append(ids[:DRILL_LENGTH])
        results.append(in_result[:DRILL_LENGTH])

    share = 0.3 + 0.7 * torch.rand(BATCH, 1)
    masked = torch.tensor(results) & (torch.rand(BATCH, DRILL_LENGTH) < share)
    return torch.tensor(rows), masked, masked.float()


def chain_drill(rng, tokenizer, tokens, prompt_length):
    """Real problems with results hidden in every place they stand: masked and weight, (B, T)."""
    weight = torch.zeros(tokens.shape)
    for row, ids in enumerate(tokens.tolist()):
        operand_hidden = False
        for result, copy, hidden in results_to_hide(rng, tokenizer, ids, prompt_length):
            if hidden:
                result_weight = BLIND_WEIGHT if operand_hidden else 1.0
                weight[row, result : result + 2] = result_weight
                weight[row, copy : copy + 2] = result_weight
            operand_hidden = hidden
    return weight > 0, weight


def results_to_hide(rng, tokenizer, ids, prompt_length):
    """For each equation: where its result stands, where that is copied to, and whether to hide it.

    The copy is the first operand of the next equation, or the final answer. Half of the time all
    results from some equation on are hidden: the state of left-to-right decoding.
    """
    response = range(prompt_length, len(ids))
    equals = [i for i in response if ids[i] == tokenizer.token_to_id(" =")]
    colons = [i for i in response if ids[i] == tokenizer.token_to_id(":")]
    marks = colons[1:] + [final_mark(tokenizer, ids)]

    if rng.random() < 0.5:
        first = rng.randrange(len(equals))
        hidden = [i >= first for i in range(len(equals))]
    else:
        share = rng.uniform(0.2, 0.8)
        hidden = [rng.random() < share for _ in equals]

    results = [i + 1 for i in equals]
    copies = [i + 1 for i in marks]
    return zip(results, copies, hidden)


def final_mark(tokenizer, ids):
    """Where "####" stands."""
    return ids.index(tokenizer.token_to_id(" ####"))


def suffix_drill(rng, tokens, prompt_length):
    """Real problems as left-to-right decoding meets them, all hidden from some token on.

    Random masks hardly ever look like that. Returns masked and weight, (B, T). The first mask is
    drawn from the whole response, the same for answers of all lengths: drawn from within the
    answer, a response without a token known would mostly belong to a direct answer, and the model
    would give no others.
    """
    masked = torch.zeros(tokens.shape, dtype=torch.bool)
    weight = torch.zeros(tokens.shape)
    B, T = tokens.shape
    for row in range(B):
        first = prompt_length + rng.randrange(T - prompt_length - SUFFIX_GRADED)
        masked[row, first:] = True
        weight[row, first : first + SUFFIX_GRADED] = 1.0
    return masked, weight


def step_loss(model, problems, rng, progress):
    """What one step trains, and its loss: mostly diffusion, now and then a drill."""
    stage = next(stage for stage in CURRICULUM if progress < stage.until)
    if rng.random() >= stage.drill_rate:
        batch = problems.batch(stage.events, stage.response_length)
        return "diffusion", diffusion_loss(model, *batch)

    drill = rng.choices(("equations", "answer", "problem"), stage.drills)[0]
    if drill == "equations":
        return drill, drill_loss(model, *equations_drill(rng, problems.tokenizer))

    tokens, prompt_length = problems.batch(stage.events, stage.response_length, direct_share=0.0)
    masked, weight = chain_drill(rng, problems.tokenizer, tokens, prompt_length)
    if drill == "answer":
        end = 4 + max(final_mark(problems.tokenizer, ids) for ids in tokens.tolist())
        answer = slice(prompt_length, end)
        tokens, masked, weight = tokens[:, answer], masked[:, answer], weight[:, answer]
    return drill, drill_loss(model, tokens, masked, weight)


def polish_loss(model, problems, rng):
    """What one step of the polish trains, and its loss."""
    share = rng.random()
    if share < 0.5:
        batch = problems.batch(EVENTS, RESPONSE_LENGTH)
        return "diffusion", diffusion_loss(model, *batch)

    if share < 0.75:
        tokens, prompt_length = problems.batch(EVENTS, RESPONSE_LENGTH)
        masked, weight = suffix_drill(rng, tokens, prompt_length)
        return "suffix", drill_loss(model, tokens, masked, weight)

    tokens, prompt_length = problems.batch(EVENTS, RESPONSE_LENGTH, direct_share=0.0)
    masked, weight = chain_drill(rng, problems.tokenizer, tokens, prompt_length)
    return "problem", drill_loss(model, tokens, masked, weight)


def make_optimisers(model):
    """Muon for the matrices of the blocks, AdamW for the embedding, the head and the norms."""
    matrices = []
    rest = []
    for name, parameter in model.named_parameters():
        if name.startswith("blocks") and parameter.dim() == 2:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, momentum=0.95)
    adamw = torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [muon, adamw]


def rate(step):
    """Learning rate of a step as a share of the full one: warm-up, plateau, linear decay to 2 %."""
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    left = (1 - step / STEPS) / (1 - DECAY_FROM)  # of the decay; above 1 before it
    if left >= 1:
        return warm_up
    return 0.02 + 0.98 * left


def polish_rate(step):
    """The same for the polish: warm-up to its peak, then linear decay to 2 %."""
    warm_up = min(1.0, (step + 1) / POLISH_WARM_UP_STEPS)
    left = 1 - step / POLISH_STEPS
    return warm_up * (0.02 + (POLISH_PEAK - 0.02) * left)


def train(model, steps, rate, loss_of_step):
    """Take `steps` steps with fresh optimisers; loss_of_step(step) gives (kind, loss)."""
    optimisers = make_optimisers(model)
    full_rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    averages = {}
    cpu_start = time.process_time()
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


def polish(model, tokenizer):
    """Left-to-right states among the random ones, from seeds of its own."""
    torch.manual_seed(POLISH_SEED)
    rng = random.Random(POLISH_SEED)
    problems = Problems(rng, tokenizer)
    train(model, POLISH_STEPS, polish_rate, lambda step: polish_loss(model, problems, rng))


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
    config = json.dumps(SHAPE | ARCHITECTURE, indent=2, sort_keys=True)
    (HERE / "config.json").write_text(config + "\n", encoding="utf-8")
    tensors = {"model.transformer." + name: p for name, p in model.state_dict().items()}
    save_tensors(tensors, HERE / "model.safetensors")
    tokenizer.save(str(HERE / "tokenizer.json"))


def main():
    torch.set_num_threads(1)
    torch.manual_seed(TRAIN_SEED)
    rng = random.Random(TRAIN_SEED)
    tokenizer = make_tokenizer()
    problems = Problems(rng, tokenizer)
    model = Transformer(Config(**SHAPE))
    initialise(model)
    train(model, STEPS, rate, lambda step: step_loss(model, problems, rng, step / STEPS))
    polish(model, tokenizer)
    save(model, tokenizer)


if __name__ == "__main__":
    main()
