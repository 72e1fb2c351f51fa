"""Train the model of the journeys: `python tests/journey/train.py` (about 10 minutes on a core).

LLaDA's objective on the journeys of problems.py: nearly half of the steps mask at random. The
others mask the words of an answer alone, or its stops alone, or as decoding by what is sure meets
it: words are known up to some token, and no stop; or all words are known, and the stops from some
one on. At first there are words and stops alone, which among the others are learned late.

One thing makes decoding wait for the stop behind: a hidden stop that has no known stop beside it
is graded by any stop, drawn at random, so that the model learns to be unsure of it. `--without
waiting` grades it by the right one: then the model learns to go back several rides in one pass.
"""

import random
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from journey.problems import (  # noqa: E402
    RESPONSE_LENGTH,
    STOPS,
    TRAIN_SEED,
    make_tokenizer,
    problem,
    vocabulary,
)
from training import (  # noqa: E402
    MASK,
    Problems,
    command_line,
    graded_loss,
    look_back,
    new_model,
    print_solved,
    random_masks,
    save,
    shape,
    train,
)

import torch  # noqa: E402  (after training, which keeps its import quiet)

STEPS = 5000
KINDS = ("random", "words", "stops", "order")  # of masks
RATES = {  # how often each of them, by the step until which it holds
    1000: (0.0, 0.5, 0.5, 0.0),
    STEPS: (0.45, 0.15, 0.1, 0.3),
}
GRADED = 6  # words after the last known one, in masks as decoding meets them
OUT_OF_REACH_WEIGHT = 0.1  # of stops there that cannot be known yet

SHAPE = shape(n_layers=3, n_tokens=len(vocabulary()))


def stops_of(tokenizer, ids, prompt_length):
    """Where the stops of an answer stand: on both sides of each "to"."""
    to = tokenizer.token_to_id(" to")
    found = []
    for i in range(prompt_length, len(ids)):
        if ids[i] == to:
            found += [i - 1, i + 1]
    return found


def word_masks(tokens, prompt_length, stops):
    """All stops hidden, and half of the words, which are graded.  -> masked, weight (B, T)"""
    is_stop = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, found in enumerate(stops):
        is_stop[row, found] = True
    response = torch.arange(tokens.shape[1]) >= prompt_length
    words = response & ~is_stop & (torch.rand(tokens.shape) < 0.5)
    return is_stop | words, words.float()


def stop_masks(tokens, stops):
    """All words known, half of the stops; graded are those in reach.  -> masked, weight (B, T)"""
    masked = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, found in enumerate(stops):
        masked[row, found] = torch.rand(len(found)) < 0.5
    graded = masked & ~out_of_reach(masked, stops)
    return masked, graded.float()


def order_masks(rng, tokens, prompt_length, stops):
    """Masks as decoding by what is sure meets them.  -> masked, weight (B, T)"""
    masked = torch.zeros(tokens.shape, dtype=torch.bool)
    weight = torch.zeros(tokens.shape)
    T = tokens.shape[1]
    for row, found in enumerate(stops):
        hidden = found
        if rng.random() < 0.5:
            frontier = rng.randrange(prompt_length, T - GRADED)
            masked[row, frontier:] = True
            weight[row, frontier : frontier + GRADED] = 1.0
            weight[row, found[:-1]] = OUT_OF_REACH_WEIGHT
            weight[row, found[-1]] = 1.0
        else:
            hidden = found[: rng.randint(1, len(found))]
            weight[row, hidden] = OUT_OF_REACH_WEIGHT
            weight[row, hidden[-1]] = 1.0
        masked[row, hidden] = True
    return masked, weight


def draw_masks(rng, tokens, prompt_length, stops, step):
    """A kind of masks; masked and weight (B, T); the weights sum to 1 in the mean."""
    rates = next(rates for until, rates in RATES.items() if step < until)
    kind = rng.choices(KINDS, rates)[0]
    if kind == "random":
        masked, weight = random_masks(tokens, prompt_length)
        return kind, masked, weight / (len(tokens) * (tokens.shape[1] - prompt_length))
    if kind == "words":
        masked, weight = word_masks(tokens, prompt_length, stops)
    elif kind == "stops":
        masked, weight = stop_masks(tokens, stops)
    else:
        masked, weight = order_masks(rng, tokens, prompt_length, stops)
    return kind, masked, weight / weight.sum()


def out_of_reach(masked, stops):
    """Hidden stops that have no known one beside them; the last is told by the question.  (B, T)"""
    alone = torch.zeros_like(masked)
    for row, found in enumerate(stops):
        hidden = masked[row].tolist()
        for before, stop, behind in zip([None, *found], found, found[1:]):
            known_before = before is not None and not hidden[before]
            alone[row, stop] = hidden[stop] and hidden[behind] and not known_before
    return alone


def step_losses(model, rng, problems, step, waiting):
    """The loss of one step, by the name of its masks."""
    tokens, prompt_length = problems.batch(RESPONSE_LENGTH)
    stops = [stops_of(problems.tokenizer, ids, prompt_length) for ids in tokens.tolist()]
    kind, masked, weight = draw_masks(rng, tokens, prompt_length, stops, step)
    targets = tokens
    if waiting:
        ids = torch.tensor([problems.tokenizer.token_to_id(" " + stop) for stop in STOPS])
        any_stop = ids[torch.randint(len(ids), tokens.shape)]
        targets = any_stop.where(out_of_reach(masked, stops), tokens)
    hidden, _ = model.hidden_states(torch.where(masked, MASK, tokens))
    return {kind: graded_loss(model, hidden, targets, weight)}


def main():
    arguments = command_line(__doc__, TRAIN_SEED, HERE, without="waiting")
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    tokenizer = make_tokenizer()
    problems = Problems(partial(problem, rng), tokenizer)
    model = new_model(SHAPE)
    look_back(model, distances=(1, 3, -2, -8))
    waiting = arguments.without is None
    train(model, STEPS, lambda step: step_losses(model, rng, problems, step, waiting))
    save(arguments.out, SHAPE, model, tokenizer)
    print_solved(HERE, model, tokenizer)


if __name__ == "__main__":
    main()
