"""Endless word problems in GSM8K's manner, and the word-level tokenizer that reads them.

    Anna has 21 stickers. On Wednesday Anna finds 5 stickers at the market. On Thursday Anna sells
    9 stickers at the market. How many stickers does Anna have now?
    Anna starts with 21 stickers. Wednesday: 21 + 5 = 26. On Thursday: 26 - 9 = 17 stickers. #### 17

The length of an answer does not follow from its question: each equation is drawn in one of three
styles of 10 to 12 tokens, and a quarter of the answers are direct, "#### 17" without a calculation.
This is what makes the order of decoding matter. At a late position, end-of-text collects the
probability of all answers that are over by then, while a word there belongs to one style of many.
So confidence alone commits end-of-text from the end inwards, until the calculation has no room
left. The paper reports the same of LLaDA, and made the certainty prior against it.

Every count stays between 10 and 99 on its way, every digit is a token, and the weekday ties an
equation of the answer to its sentence in the question.
"""

import random
import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NAMES = "Tom Anna Ben Lucy Sam Mia Leo Nora Max Ella Jack Zoe".split()
ITEMS = "apples coins books cards stamps marbles shells pens eggs cakes balls stickers".split()
GAINS = "buys finds gets wins".split()
LOSSES = "loses sells uses gives".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "shop park market school station".split()
GLUE = "On at the has more away How many does have now starts with".split()

# The ways to write an equation, in 10, 11 and 12 tokens.
STYLES = [
    " {day}: {count} {sign} {amount} = {result}.",
    " {day}: {count} {sign} {amount} = {result} {item}.",
    " On {day}: {count} {sign} {amount} = {result} {item}.",
]
EVENTS = (3, 4)  # the least and the most in a problem: the longest answer has 58 tokens
DIRECT_SHARE = 0.25  # of the answers have no calculation

EOS, MASK, UNKNOWN = 0, 1, 2
SPECIAL_TOKENS = ["<eos>", "[MASK]", "<unk>"]
RESPONSE_LENGTH = 64
TRAIN_SEED = 1
TEST_SEED = 2
TEST_PROBLEMS = 200
TEST_GROUP = 8

# What observations.py and picture.py show: confidence alone cuts its answer short, and all the
# policies of the pictures answer it in the same words.
SAMPLE = (
    "Zoe has 66 eggs. On Friday Zoe finds 9 more eggs at the school. On Saturday Zoe sells 3 eggs "
    "at the school. On Sunday Zoe buys 6 eggs at the park. How many eggs does Zoe have now?"
)


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


def problem(rng, events=EVENTS, direct_share=DIRECT_SHARE):
    """One (question, answer) pair of text, drawn with the random.Random `rng`."""
    name = rng.choice(NAMES)
    item = rng.choice(ITEMS)
    count = rng.randint(10, 70)
    n_events = rng.randint(*events)
    first_day = rng.randint(0, len(DAYS) - n_events)

    question = f"{name} has {count} {item}."
    calculation = f"{name} starts with {count} {item}."
    for day in DAYS[first_day : first_day + n_events]:
        sign, amount, result = equation(rng, count)
        action = f"{verb_phrase(rng, sign, amount)} {item} at the {rng.choice(PLACES)}"
        question += f" On {day} {name} {action}."
        calculation += rng.choice(STYLES).format(
            day=day, count=count, sign=sign, amount=amount, result=result, item=item
        )
        count = result
    question += f" How many {item} does {name} have now?"

    if rng.random() < direct_share:
        return question, f"#### {count}"
    return question, f"{calculation} #### {count}"


def equation(rng, count):
    """(sign, amount, result) with a result of two digits."""
    while True:
        sign = rng.choice("+-")
        amount = rng.randint(2, 9)
        result = count + amount if sign == "+" else count - amount
        if 10 <= result <= 99:
            return sign, amount, result


def verb_phrase(rng, sign, amount):
    """What was done with how many: "finds 5", "buys 5 more", "gives away 5"."""
    if sign == "+":
        verb = rng.choice(GAINS)
        more = " more" if rng.random() < 0.5 else ""
        return f"{verb} {amount}{more}"

    verb = rng.choice(LOSSES)
    away = " away" if verb == "gives" else ""
    return f"{verb}{away} {amount}"


def is_whole(question, text):
    """Whether `problem` could give this text as the answer: every equation right and well written.

    Stricter than the number behind "####", which may be right after words that went wrong.
    """
    name, start, item = re.match(r"(\w+) has (\d+) (\w+)\.", question).groups()
    count = int(start)
    pattern = re.escape(f"{name} starts with {count} {item}.")
    for day, verb, amount in re.findall(r"On (\w+) \w+ (\w+) (?:away )?(\d+)", question):
        sign = "+" if verb in GAINS else "-"
        result = count + int(amount) if verb in GAINS else count - int(amount)
        written = [
            style.format(day=day, count=count, sign=sign, amount=amount, result=result, item=item)
            for style in STYLES
        ]
        pattern += f"({'|'.join(re.escape(text) for text in written)})"
        count = result

    number = f"#### {count}"
    return text == number or re.fullmatch(f"{pattern} {number}", text) is not None


def is_right(question, text):
    """Whether the number behind "####" is the one that follows from the question: bench.py's score.

    As GSM8K is scored: `is_whole` asks for right words before it, too.
    """
    count = int(re.match(r"\w+ has (\d+)", question)[1])
    for verb, amount in re.findall(r"On \w+ \w+ (\w+) (?:away )?(\d+)", question):
        count += int(amount) if verb in GAINS else -int(amount)
    return re.findall(r"#### (\d+)", text)[:1] == [str(count)]


def grouped_problems(rng, n, group):
    """n problems in groups whose questions have equally many tokens, so that each is one batch."""
    tokenizer = make_tokenizer()
    waiting = {}  # by length of the question
    grouped = []
    while len(grouped) < n:
        question, answer = problem(rng)
        same_length = waiting.setdefault(len(tokenizer.encode(question)), [])
        same_length.append((question, answer))
        if len(same_length) == group:
            grouped += same_length
            same_length.clear()
    return grouped[:n]


def draw_problems(seed):
    """The held-out problems of a seed: (question, answer)."""
    return grouped_problems(random.Random(seed), TEST_PROBLEMS, TEST_GROUP)
