"""Endless diaries to be copied out with nicknames, and the word-level tokenizer that reads them.

    Monday: Robert meets Katherine. Tuesday: William meets Robert. ...
    Monday: Robert now Bob meets Katherine. Tuesday: William now Will meets Bob. ...

The answer copies the question. Where a person is first met it may give a nickname, one of two, and
mostly does: nothing foretells which. From then on the person is called that. So a name of the
question means another one as soon as the answer has said so: the keys and values of the prompt go
out of date, and a cache that keeps them says the old name.

Many answers are right, so `is_right` judges.
"""

import random
import re
from itertools import combinations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NICKNAMES = {
    "Robert": ["Bob", "Rob"],
    "William": ["Bill", "Will"],
    "Thomas": ["Tom", "Tommy"],
    "Katherine": ["Kate", "Kitty"],
    "Margaret": ["Meg", "Peggy"],
    "Elizabeth": ["Beth", "Liz"],
}
NAMES = [*NICKNAMES, *sum(NICKNAMES.values(), [])]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PEOPLE = 4  # in a diary; everybody meets everybody
NICKNAMED = 0.7  # of the people

EOS, MASK, UNKNOWN = 0, 1, 2
SPECIAL_TOKENS = ["<eos>", "[MASK]", "<unk>"]
RESPONSE_LENGTH = 48  # the longest answer has 44 tokens
TRAIN_SEED = 1
TEST_SEED = 2
TEST_PROBLEMS = 200

SAMPLE = (
    "Monday: Robert meets Thomas. Tuesday: Margaret meets William. Wednesday: William meets "
    "Thomas. Thursday: Robert meets William. Friday: Thomas meets Margaret. Saturday: Margaret "
    "meets Robert."
)


def vocabulary():
    """Every token's text; a word carries the space before it."""
    words = [*NAMES, *DAYS, "meets", "now"]
    return SPECIAL_TOKENS + [" " + word for word in words] + [".", ":"]


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
    people = rng.sample(list(NICKNAMES), PEOPLE)
    meetings = [rng.sample(pair, 2) for pair in combinations(people, 2)]
    rng.shuffle(meetings)
    first_day = rng.randint(0, len(DAYS) - len(meetings))

    question = []
    answer = []
    called = {}  # by now
    for day, meeting in zip(DAYS[first_day:], meetings):
        written = []
        for person in meeting:
            if person in called:
                written.append(called[person])
            elif rng.random() < NICKNAMED:
                called[person] = rng.choice(NICKNAMES[person])
                written.append(f"{person} now {called[person]}")
            else:
                called[person] = person
                written.append(person)
        question.append(f"{day}: {meeting[0]} meets {meeting[1]}.")
        answer.append(f"{day}: {written[0]} meets {written[1]}.")
    return " ".join(question), " ".join(answer)


def is_right(question, text):
    """Whether `problem` could give this text as the answer: copied, well named, and kept to."""
    asked = re.findall(r"(\w+): (\w+) meets (\w+)\.", question)
    told = re.findall(r"[^.]*\.|[^.]+$", text)
    if len(told) != len(asked):
        return False

    called = {}
    for (day, one, two), sentence in zip(asked, told):
        person = r"(\w+)(?: now (\w+))?"
        found = re.fullmatch(rf"{day}: {person} meets {person}\.", sentence.removeprefix(" "))
        if not found:
            return False
        for name, written, nickname in ((one, found[1], found[2]), (two, found[3], found[4])):
            if written != called.get(name, name):
                return False
            if nickname and (name in called or nickname not in NICKNAMES[name]):
                return False
            called.setdefault(name, nickname or name)
    return True


def draw_problems(seed):
    """The held-out problems of a seed: (question, answer)."""
    rng = random.Random(seed)
    return [problem(rng) for _ in range(TEST_PROBLEMS)]
