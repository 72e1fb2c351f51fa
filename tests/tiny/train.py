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

import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from tiny.problems import (  # noqa: E402
    DAYS,
    EVENTS,
    RESPONSE_LENGTH,
    TRAIN_SEED,
    equation,
    make_tokenizer,
    problem,
    vocabulary,
)
from training import (  # noqa: E402
    BATCH,
    Problems,
    diffusion_loss,
    drill_loss,
    new_model,
    print_solved,
    save,
    shape,
    suffix_masks,
    train,
)

import torch  # noqa: E402  (after training, which keeps its import quiet)

STEPS = 7600
POLISH_STEPS = 400
POLISH_PEAK = 0.25  # of the learning rates
POLISH_SEED = 5

DRILL_LENGTH = 110
BLIND_WEIGHT = 0.3  # of a result whose operand is hidden too: it takes two steps at once
NO_DIRECT = 0.0  # share of direct answers in a drill: they have no equation
SUFFIX_GRADED = 10  # tokens, about one equation


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

SHAPE = shape(n_layers=4, n_tokens=len(vocabulary()))


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


def step_losses(model, problems, rng, progress):
    """What one step trains: {its name: its loss}. Mostly diffusion, now and then a drill."""
    stage = next(stage for stage in CURRICULUM if progress < stage.until)
    if rng.random() >= stage.drill_rate:
        batch = problems.batch(stage.response_length, stage.events)
        return {"diffusion": diffusion_loss(model, *batch)}

    drill = rng.choices(("equations", "answer", "problem"), stage.drills)[0]
    if drill == "equations":
        return {drill: drill_loss(model, *equations_drill(rng, problems.tokenizer))}

    tokens, prompt_length = problems.batch(stage.response_length, stage.events, NO_DIRECT)
    masked, weight = chain_drill(rng, problems.tokenizer, tokens, prompt_length)
    if drill == "answer":
        end = 4 + max(final_mark(problems.tokenizer, ids) for ids in tokens.tolist())
        answer = slice(prompt_length, end)
        tokens, masked, weight = tokens[:, answer], masked[:, answer], weight[:, answer]
    return {drill: drill_loss(model, tokens, masked, weight)}


def polish_losses(model, problems, rng):
    """The same for a step of the polish."""
    share = rng.random()
    if share < 0.5:
        batch = problems.batch(RESPONSE_LENGTH, EVENTS)
        return {"diffusion": diffusion_loss(model, *batch)}

    if share < 0.75:
        tokens, prompt_length = problems.batch(RESPONSE_LENGTH, EVENTS)
        masked, weight = suffix_masks(rng, tokens, prompt_length, SUFFIX_GRADED)
        return {"suffix": drill_loss(model, tokens, masked, weight)}

    tokens, prompt_length = problems.batch(RESPONSE_LENGTH, EVENTS, NO_DIRECT)
    masked, weight = chain_drill(rng, problems.tokenizer, tokens, prompt_length)
    return {"problem": drill_loss(model, tokens, masked, weight)}


def polish(model, tokenizer):
    """Left-to-right states among the random ones, from seeds of its own."""
    torch.manual_seed(POLISH_SEED)
    rng = random.Random(POLISH_SEED)
    problems = Problems(partial(problem, rng), tokenizer)
    train(
        model,
        POLISH_STEPS,
        lambda step: polish_losses(model, problems, rng),
        peak=POLISH_PEAK,
        warm_up_steps=30,
        decay_from=0.0,
    )


def main():
    torch.set_num_threads(1)
    torch.manual_seed(TRAIN_SEED)
    rng = random.Random(TRAIN_SEED)
    tokenizer = make_tokenizer()
    problems = Problems(partial(problem, rng), tokenizer)
    model = new_model(SHAPE)
    train(model, STEPS, lambda step: step_losses(model, problems, rng, step / STEPS))
    polish(model, tokenizer)
    save(HERE, SHAPE, model, tokenizer)
    print_solved(HERE, model, tokenizer)


if __name__ == "__main__":
    main()
