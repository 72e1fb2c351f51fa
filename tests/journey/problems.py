"""Endless ways to be retraced from their end, and the word-level tokenizer that reads them.

    Monday on the red line, Tuesday on the blue line, ... Thursday on the green line. Now at Park.
    Monday on the red line: Castle to Tower. Tuesday on the blue line: Tower to Harbour. ...
    Thursday on the green line: Castle to Park.

Somebody has ridden one stop a day, each time on one of three ring lines, and knows where the last
ride ended. The answer tells the way in the order of travel. But every stop before the last can be
known only from the stop behind it, and from the map, which the model has to know by heart. The
words between the stops copy the question. So decoding that goes by what is sure writes the words
first, and then the stops from the last to the first; from left to right one has to guess.

One answer is right.
"""

import random
import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

LINES = {  # the stops in the order of travel, round and round
    "red": "Airport Castle Harbour Library Market Museum Park Tower".split(),
    "blue": "Airport Market Castle Tower Harbour Park Library Museum".split(),
    "green": "Airport Library Tower Museum Castle Park Market Harbour".split(),
}
STOPS = LINES["red"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
RIDES = 4

EOS, MASK, UNKNOWN = 0, 1, 2
SPECIAL_TOKENS = ["<eos>", "[MASK]", "<unk>"]
RESPONSE_LENGTH = 48  # an answer has 40 tokens
TRAIN_SEED = 1
TEST_SEED = 2
TEST_PROBLEMS = 200

SAMPLE = (
    "Monday on the red line, Tuesday on the blue line, Wednesday on the red line, Thursday on the "
    "green line. Now at Park."
)


def vocabulary():
    """Every token's text; a word carries the space before it."""
    words = [*LINES, *STOPS, *DAYS, "on", "the", "line", "to", "Now", "at"]
    return SPECIAL_TOKENS + [" " + word for word in words] + [".", ",", ":"]


def make_tokenizer():
    """A tokenizer over `vocabulary` that adds no special tokens and decodes losslessly."""
    ids = {text: id for id, text in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Prepend(" ")])
    piece = Regex(r" ?[A-Za-z]+| ?\S")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(piece, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def problem(rng):
    """One (question, answer) pair of text, drawn with the random.Random `rng`."""
    first_day = rng.randint(0, len(DAYS) - RIDES)
    days = DAYS[first_day : first_day + RIDES]
    rides = ", ".join(f"{day} on the {rng.choice(list(LINES))} line" for day in days)
    question = f"{rides}. Now at {rng.choice(STOPS)}."
    return question, way(question)


def way(question):
    """The answer, worked out from the end."""
    stop = re.search(r"Now at (\w+)", question)[1]
    sentences = []
    for day, line in reversed(re.findall(r"(\w+) on the (\w+) line", question)):
        ring = LINES[line]
        before = ring[ring.index(stop) - 1]
        sentences.append(f"{day} on the {line} line: {before} to {stop}.")
        stop = before
    return " ".join(reversed(sentences))


def is_right(question, text):
    """Whether the text is the answer."""
    return text == way(question)


def draw_problems(seed):
    """The held-out problems of a seed: (question, answer)."""
    rng = random.Random(seed)
    return [problem(rng) for _ in range(TEST_PROBLEMS)]
