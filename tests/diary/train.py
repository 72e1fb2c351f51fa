"""Train the model of the diaries: `python tests/diary/train.py` (about 6 minutes on one CPU core).

LLaDA's objective on the diaries of problems.py. Half of the steps mask at random; the other half
mask all from some token on, as left-to-right decoding meets it. One thing makes the model read a
name where the question has it, and not look the nickname up in the answer by itself: a second loss,
on the question. Every later mention of a person is to be predicted as the answer calls that person.
`--without question` leaves it out, to see what it is for.
"""

import random
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from diary.problems import (  # noqa: E402
    NAMES,
    RESPONSE_LENGTH,
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
    suffix_masks,
    train,
)

import torch  # noqa: E402  (after training, which keeps its import quiet)

STEPS = 2000
SUFFIX_RATE = 0.5  # of the steps
SUFFIX_GRADED = 8  # tokens, about one sentence
QUESTION_WEIGHT = 0.5

SHAPE = shape(n_layers=3, n_tokens=len(vocabulary()))


def draw_masks(rng, tokens, prompt_length):
    """masked and weight (B, T), of random masks or a suffix; the weights sum to 1 in the mean."""
    if rng.random() < SUFFIX_RATE:
        masked, weight = suffix_masks(rng, tokens, prompt_length, SUFFIX_GRADED)
        return masked, weight / weight.sum()
    masked, weight = random_masks(tokens, prompt_length)
    return masked, weight / (len(tokens) * (tokens.shape[1] - prompt_length))


def meant_names(tokenizer, tokens, prompt_length):
    """What the names of the questions mean once the answer is written: ids and where, 2 x (B, T).

    Where: the mentions of a person but the first.
    """
    names = {tokenizer.token_to_id(" " + name) for name in NAMES}
    now = tokenizer.token_to_id(" now")
    meant = tokens.clone()
    later = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, ids in enumerate(tokens.tolist()):
        nickname = {}
        for i in range(prompt_length, len(ids)):
            if ids[i] == now:
                nickname[ids[i - 1]] = ids[i + 1]
        met = set()
        for i in range(prompt_length):
            later[row, i] = ids[i] in met
            meant[row, i] = nickname.get(ids[i], ids[i])
            if ids[i] in names:
                met.add(ids[i])
    return meant, later


def step_losses(model, rng, problems, question_weight):
    """The losses of one step: of the answer's masked tokens, and of the question's names."""
    tokens, prompt_length = problems.batch(RESPONSE_LENGTH)
    masked, weight = draw_masks(rng, tokens, prompt_length)
    hidden, _ = model.hidden_states(torch.where(masked, MASK, tokens))
    meant, later = meant_names(problems.tokenizer, tokens, prompt_length)
    question = graded_loss(model, hidden, meant, later / later.sum())
    return {
        "answer": graded_loss(model, hidden, tokens, weight),
        "question": question_weight * question,
    }


def main():
    arguments = command_line(__doc__, TRAIN_SEED, HERE, without="question")
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    tokenizer = make_tokenizer()
    problems = Problems(partial(problem, rng), tokenizer)
    model = new_model(SHAPE)
    look_back(model, distances=(1, 2, 3))
    weight = 0.0 if arguments.without else QUESTION_WEIGHT
    train(model, STEPS, lambda step: step_losses(model, rng, problems, weight))
    save(arguments.out, SHAPE, model, tokenizer)
    print_solved(HERE, model, tokenizer)


if __name__ == "__main__":
    main()
