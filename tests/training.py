"""What the trainers of the embedded worlds share: a start, masks and losses, batches, the loop.

Each world's train.py says what it draws and what it hides. The rest is here: LLaDA's objective,
Muon and AdamW, a schedule that counts steps. Everything is seeded: one machine, one model.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

from bench import make_plan, measure_quality, table_text, world_task
from model import Config, Transformer

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F
from huggingface_hub.utils import tqdm
from safetensors import TensorSpec, serialize_file
from torch import nn

EOS, MASK = 0, 1  # in every world
BATCH = 16
MUON_LR = 0.02
ADAMW_LR = 3e-3
WEIGHT_DECAY = 0.05
HELD_OUT = 200  # problems
LEAST_T = 1 / 64  # share of tokens masked, one of the longest responses
LEAST_RATE = 0.02  # at the end of the training, as a share of the rates above

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


def shape(n_layers, n_tokens, n_heads=4):
    """The fields of model.Config for so many layers, a vocabulary of so many tokens, and heads."""
    return {
        "d_model": 128,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "mlp_hidden_size": 352,
        "vocab_size": n_tokens,
        "embedding_size": n_tokens,
        "max_sequence_length": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
        "include_qkv_bias": False,
        "weight_tying": False,
        "model_type": "llada",
    }


def new_model(shape):
    """A model whose weights copy from the first step on.

    Keys resemble queries, values pass through, the head resembles the embedding.
    """
    model = Transformer(Config(**shape))
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
    return model


def look_back(model, distances, strength=5.0, pairs=5):
    """Let heads of the first layer start out looking so many tokens back.

    All embeddings get a direction in common. From it every query gets the same q, and every key
    the k that RoPE, over that distance, turns into q; in the `pairs` channel pairs that turn most.
    """
    C = model.config.d_model
    D = model.config.head_dim
    common = torch.randn(C)
    common /= common.norm()
    angles = 1.0 / model.config.rope_theta ** (torch.arange(0, 2 * pairs, 2) / D)
    first = torch.arange(pairs)
    second = first + D // 2
    layer = model.blocks[0]
    with torch.no_grad():
        model.wte.weight += 0.6 * model.wte.weight.norm(dim=1, keepdim=True) * common
        size = 0.51 * math.sqrt(C)  # of the common part behind the norm
        for head, distance in enumerate(distances):
            q = torch.zeros(D)
            k = torch.zeros(D)
            q[first] = strength
            k[first] = strength * torch.cos(distance * angles)
            k[second] = strength * torch.sin(distance * angles)
            rows = slice(head * D, (head + 1) * D)
            layer.q_proj.weight[rows] = torch.outer(q, common) / size
            layer.k_proj.weight[rows] = torch.outer(k, common) / size
            passed_on = nn.init.orthogonal_(torch.empty(C, D))
            layer.attn_out.weight[:, rows] = 0.15 * passed_on


def command_line(text, seed, folder, without):
    """The arguments of a trainer, which says what its model can be trained `without`."""
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("--seed", type=int, default=seed, help=f"of the training ({seed})")
    parser.add_argument("--without", choices=[without], help="leave out what the world is built on")
    parser.add_argument("--out", type=Path, default=folder, help="folder for the checkpoint")
    return parser.parse_args()


class Problems:
    """Batches of problems with prompts of equal length; keeps the unfinished batches.

    draw(*arguments) gives the texts of one problem, (question, answer).
    """

    def __init__(self, draw, tokenizer):
        self.draw = draw
        self.tokenizer = tokenizer
        self.waiting = {}

    def batch(self, response_length, *arguments):
        """tokens (B, T) and the length of their prompts."""
        while True:
            question, answer = self.draw(*arguments)
            prompt = self.tokenizer.encode(question).ids
            response = self.tokenizer.encode(answer).ids
            if len(response) >= response_length:
                continue

            rows = self.waiting.setdefault((len(prompt), response_length, arguments), [])
            end = [EOS] * (response_length - len(response))
            rows.append(prompt + response + end)
            if len(rows) == BATCH:
                tokens = torch.tensor(rows)
                rows.clear()
                return tokens, len(prompt)


def random_masks(tokens, prompt_length):
    """LLaDA's masks: every token of the response with probability t.  -> masked, weight (B, T)

    t is stratified over the batch: B equal steps from a random start, so its mean hardly varies.
    The weight is 1 / t, which makes `diffusion_loss` its bound.
    """
    B, T = tokens.shape
    t = (torch.rand(1) + torch.arange(B) / B) % 1.0
    t = t.clamp_min(LEAST_T)[:, None]
    response = torch.arange(T) >= prompt_length
    masked = response & (torch.rand(B, T) < t)
    return masked, masked / t


def suffix_masks(rng, tokens, prompt_length, graded):
    """Masks as left-to-right decoding meets them: all from some token on.  -> masked, weight (B, T)

    Random masks hardly ever look like that. The `graded` first ones have a weight. The first mask
    is drawn from the whole response, the same for answers of all lengths: drawn from within the
    answer, a response without a token known would mostly belong to a short answer, and the model
    would give no others.
    """
    masked = torch.zeros(tokens.shape, dtype=torch.bool)
    weight = torch.zeros(tokens.shape)
    B, T = tokens.shape
    for row in range(B):
        first = prompt_length + rng.randrange(T - prompt_length - graded)
        masked[row, first:] = True
        weight[row, first : first + graded] = 1.0
    return masked, weight


def graded_loss(model, hidden, tokens, weight):
    """Sum of weight x cross-entropy of what the hidden states (B, T, C) say of tokens (B, T)."""
    graded = weight > 0
    loss = F.cross_entropy(model.head(hidden[graded]), tokens[graded], reduction="none")
    return (loss * weight[graded]).sum()


def weighted_loss(model, tokens, masked, weight):
    """The same for what the model makes of the tokens once the `masked` ones are hidden."""
    hidden, _ = model.hidden_states(torch.where(masked, MASK, tokens))
    return graded_loss(model, hidden, tokens, weight)


def diffusion_loss(model, tokens, prompt_length):
    """LLaDA, Eq. 3: cross-entropy / t, averaged over sequences and response length."""
    B, T = tokens.shape
    masked, weight = random_masks(tokens, prompt_length)
    return weighted_loss(model, tokens, masked, weight) / (B * (T - prompt_length))


def drill_loss(model, tokens, masked, weight):
    """Mean cross-entropy by weight (B, T); hidden are `masked`."""
    return weighted_loss(model, tokens, masked, weight) / weight.sum()


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


def rate(step, steps, peak, warm_up_steps, decay_from):
    """Learning rate of a step as a share of the full one: warm-up to the peak, plateau, decay.

    decay_from: the share of the steps after which it falls linearly, to LEAST_RATE.
    """
    warm_up = min(1.0, (step + 1) / warm_up_steps)
    left = min(1.0, (1 - step / steps) / (1 - decay_from))  # of the decay
    return warm_up * (LEAST_RATE + (peak - LEAST_RATE) * left)


def train(model, steps, loss_of_step, peak=1.0, warm_up_steps=60, decay_from=0.35):
    """Take `steps` steps with fresh optimisers; loss_of_step(step) gives losses by name.

    What is minimised is their sum. The other arguments are those of `rate`.
    """
    optimisers = make_optimisers(model)
    full_rates = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    averages = {}
    cpu_start = time.process_time()
    for step in tqdm(range(steps), unit="step"):
        share = rate(step, steps, peak, warm_up_steps, decay_from)
        for optimiser, full in zip(optimisers, full_rates):
            optimiser.param_groups[0]["lr"] = full * share

        losses = loss_of_step(step)
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        for name, loss in losses.items():
            averages[name] = 0.97 * averages.get(name, loss.item()) + 0.03 * loss.item()
        if step % 100 == 99:
            shown = "  ".join(f"{name} {value:.3f}" for name, value in sorted(averages.items()))
            minutes = (time.process_time() - cpu_start) / 60
            print(f"step {step + 1:5d}  {minutes:5.1f} CPU minutes  {shown}", flush=True)


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


def save(folder, shape, model, tokenizer):
    """Write the checkpoint in LLaDA's format: config.json, model.safetensors, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(shape | ARCHITECTURE, indent=2, sort_keys=True)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    tensors = {"model.transformer." + name: p for name, p in model.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))


def print_solved(world, model, tokenizer):
    """What the model solves of the held-out problems of its world, as bench.py's rows by prior."""
    task = replace(world_task(world.name, HELD_OUT), model=model, tokenizer=tokenizer)
    plan = make_plan(task.gen_length, own={})
    by_prior = [row for row in plan if row.order == "prior"]
    rows = measure_quality(task, by_prior, BATCH)
    print(table_text(rows))
