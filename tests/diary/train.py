"""Train the model of the diaries: `python tests/diary/train.py` (about 9 minutes on one CPU core).

LLaDA's objective on the diaries of problems.py. Half of the steps mask at random; the other half
mask all from some token on, as left-to-right decoding meets it. Two things make the model read a
name in the question, where it is renamed, and not resolve it from the answer by itself:
  - a loss on the question: every later mention of a person is to be predicted as the name that
    the answer gives, if it is known.
  - a detour: in most steps the masked positions may not attend to names in the answer, but for
    near ones. In decoding everything attends to all.
`--without detour` and `--without question` leave one of them out, to see what it is for.
"""

import argparse
import random
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from model import rope, rotate  # noqa: E402

import torch  # noqa: E402  (after model, which keeps its import quiet)
import torch.nn.functional as F  # noqa: E402

from diary.problems import (  # noqa: E402
    RESPONSE_LENGTH,
    NAMES,
    TRAIN_SEED,
    make_tokenizer,
    problem,
    vocabulary,
)
from training import (  # noqa: E402
    MASK,
    Problems,
    graded_loss,
    look_back,
    new_model,
    random_masks,
    save,
    shape,
    suffix_masks,
    train,
)

STEPS = 2000
SUFFIX_RATE = 0.5  # of the steps
SUFFIX_GRADED = 8  # tokens, about one sentence
QUESTION_WEIGHT = 0.5
DETOUR_RATE = 0.6  # of the steps
NEAR = 3  # tokens

SHAPE = shape(n_layers=3, n_tokens=len(vocabulary()))


def draw_masks(rng, tokens, prompt_length):
    """masked and weight (B, T), of random masks or a suffix; the weights sum to 1 in the mean."""
    if rng.random() < SUFFIX_RATE:
        masked, weight = suffix_masks(rng, tokens, prompt_length, SUFFIX_GRADED)
        return masked, weight / weight.sum()
    masked, weight = random_masks(tokens, prompt_length)
    return masked, weight / (len(tokens) * (tokens.shape[1] - prompt_length))


def meant_names(tokens, prompt_length, names, now):
    """What the names of the questions mean once the answer is written: ids and where, 2 x (B, T).

    Where: the mentions of a person but the first.
    """
    meant = tokens.clone()
    later = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, ids in enumerate(tokens.tolist()):
        new_name = {}
        for i in range(prompt_length, len(ids)):
            if ids[i] == now:
                new_name[ids[i - 1]] = ids[i + 1]
        met = set()
        for i in range(prompt_length):
            later[row, i] = ids[i] in met
            meant[row, i] = new_name.get(ids[i], ids[i])
            if ids[i] in names:
                met.add(ids[i])
    return meant, later


def detour(tokens, prompt_length, masked, names):
    """Which keys each position may attend to: masked ones no far names of the answer.  (B, T, T)"""
    place = torch.arange(tokens.shape[1])
    far = (place[:, None] - place).abs() > NEAR
    name = torch.isin(tokens, torch.tensor(names)) & (place >= prompt_length)
    return ~(masked[:, :, None] & name[:, None] & far)


def hidden_states(model, tokens, visible):
    """`model.hidden_states` of all positions, (B, T, C), which attend to what is visible alone."""
    x = model.wte(tokens)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    cos, sin = rope(positions, model.config, x.dtype)
    heads = (-1, model.config.head_dim)
    for layer in model.blocks:
        h = layer.attn_norm(x)
        q = rotate(layer.q_proj(h).unflatten(-1, heads), cos, sin).transpose(1, 2)
        k = rotate(layer.k_proj(h).unflatten(-1, heads), cos, sin).transpose(1, 2)
        v = layer.v_proj(h).unflatten(-1, heads).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, visible[:, None])
        x = x + layer.attn_out(attended.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.ff_norm(x))
    return x


def step_losses(model, rng, batch, tokenizer, without):
    """The losses of one step: of the answer's masked tokens, and of the question's names."""
    tokens, prompt_length = batch
    names = [tokenizer.token_to_id(" " + name) for name in NAMES]
    masked, weight = draw_masks(rng, tokens, prompt_length)
    hidden_tokens = torch.where(masked, MASK, tokens)
    visible = torch.ones(*tokens.shape, tokens.shape[1], dtype=torch.bool)
    if rng.random() < DETOUR_RATE and without != "detour":
        visible = detour(hidden_tokens, prompt_length, masked, names)
    hidden = hidden_states(model, hidden_tokens, visible)
    losses = {"answer": graded_loss(model, hidden, tokens, weight)}
    if without != "question":
        now = tokenizer.token_to_id(" now")
        meant, later = meant_names(tokens, prompt_length, names, now)
        weight = QUESTION_WEIGHT * later / later.sum()
        losses["question"] = graded_loss(model, hidden, meant, weight)
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=TRAIN_SEED)
    parser.add_argument("--without", choices=["detour", "question"])
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the checkpoint")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    tokenizer = make_tokenizer()
    problems = Problems(partial(problem, rng), tokenizer)
    model = new_model(SHAPE)
    look_back(model, distances=(1, 2, 3))

    def losses(step):
        batch = problems.batch(RESPONSE_LENGTH)
        return step_losses(model, rng, batch, tokenizer, arguments.without)

    train(model, STEPS, losses)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(arguments.out, SHAPE, model, tokenizer)


if __name__ == "__main__":
    main()
