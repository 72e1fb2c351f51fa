"""Endless word problems in GSM8K's manner, and the word-level tokenizer that reads them.

    Anna has 21 stickers. On Wednesday Anna finds 5 stickers at the market. On Thursday Anna sells
    9 stickers at the market. How many stickers does Anna have now?
    Anna starts with 21 stickers. Wednesday: 21 + 5 = 26. Thursday: 26 - 9 = 17. #### 17

Every count stays between 10 and 99 on its way, every digit is a token, and the weekday ties an
equation of the answer to its sentence in the question. `python tests/tiny/problems.py` writes
problems.jsonl, the held-out problems that bench.py solves.
"""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NAMES = "Tom Anna Ben Lucy Sam Mia Leo Nora Max Ella Jack Zoe".split()
ITEMS = "apples coins books cards stamps marbles shells pens eggs cakes balls stickers".split()
GAINS = "buys finds gets wins".split()
LOSSES = "loses sells uses gives".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "shop park market school station".split()
GLUE = "On at the has more away How many does have now starts with".split()

EOS, MASK, UNKNOWN = 0, 1, 2
SPECIAL_TOKENS = ["<eos>", "[MASK]", "<unk>"]
RESPONSE_LENGTH = 64
TRAIN_SEED, TEST_SEED = 1, 2
TEST_PROBLEMS, TEST_GROUP = 200, 8


def vocabulary():
    """Every token's text; a word, sign or first digit carries the space before it."""
    words = NAMES + ITEMS + GAINS + LOSSES + DAYS + PLACES + GLUE
    digits = [str(digit) for digit in range(10)]
    spaced = [" " + piece for piece in words + digits + ["+", "-", "=", "####"]]
    return SPECIAL_TOKENS + spaced + digits + [".", ":", "?"]


def make_tokenizer():
    """A tokenizer over `vocabulary` that adds no special tokens and decodes losslessly."""
    ids = {text: id for id, text in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Prepend(" ")])
    piece = Regex(r" ?[A-Za-z]+| ?\d| ?####| ?\S")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(piece, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def problem(rng, least_events=3, most_events=5):
    """One (question, answer) pair of text, drawn with the random.Random `rng`."""
    name, item, count = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(10, 70)
    events = rng.randint(least_events, most_events)
    first_day = rng.randint(0, len(DAYS) - events)
    question, answer = f"{name} has {count} {item}.", f"{name} starts with {count} {item}."
    for day in DAYS[first_day : first_day + events]:
        sign, amount, result = equation(rng, count)
        verb = rng.choice(GAINS if sign == "+" else LOSSES)
        verb += " away" if verb == "gives" else ""
        more = " more" if sign == "+" and rng.random() < 0.5 else ""
        place = rng.choice(PLACES)
        question += f" On {day} {name} {verb} {amount}{more} {item} at the {place}."
        answer += f" {day}: {count} {sign} {amount} = {result}."
        count = result
    return f"{question} How many {item} does {name} have now?", f"{answer} #### {count}"


def equation(rng, count):
    """(sign, amount, result) with a result of two digits."""
    while True:
        sign, amount = rng.choice("+-"), rng.randint(2, 9)
        result = count + amount if sign == "+" else count - amount
        if 10 <= result <= 99:
            return sign, amount, result


def grouped_problems(rng, n, group):
    """n problems in groups whose questions have equally many tokens, so that each is one batch."""
    tokenizer, waiting, chosen = make_tokenizer(), {}, []
    while len(chosen) < n:
        question, answer = problem(rng)
        if len(tokenizer.encode(answer)) >= RESPONSE_LENGTH:
            continue
        same_length = waiting.setdefault(len(tokenizer.encode(question)), [])
        same_length.append((question, answer))
        if len(same_length) == group:
            chosen += same_length
            same_length.clear()
    return chosen[:n]


def main():
    problems = grouped_problems(random.Random(TEST_SEED), TEST_PROBLEMS, TEST_GROUP)
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in problems]
    (Path(__file__).parent / "problems.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
