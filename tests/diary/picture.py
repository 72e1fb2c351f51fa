"""Where the names of a diary are read again: `python tests/diary/picture.py` draws map.svg.

Two maps as tests/tiny/picture.py draws them, of d2Cache and of a window as wide as its stage 1. A
ring stands where the question mentions somebody who has a nickname by then, in the step in which
the answer says who that is; a cross where the answer says it wrongly.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from d2cache import WORLDS, D2Cache, SlidingWindow, decode  # noqa: E402
from diary.problems import NAMES, RESPONSE_LENGTH, SAMPLE  # noqa: E402
from model import Transformer, encode_prompt, load_tokenizer  # noqa: E402
from tiny.picture import (  # noqa: E402
    COLOURS,
    LEFT,
    ROW,
    WORDS_HEIGHT,
    card,
    column_width,
    legend,
    panel,
    watch,
    words_axis,
    write,
)

K = RESPONSE_LENGTH // 8
POLICIES = {
    ("d²Cache", "masked positions by certainty prior, known ones by attention rollout"): D2Cache(K),
    ("sliding window", f"the next {K} masked positions: d²Cache without stage 2"): SlidingWindow(K),
}
RED = COLOURS["fresh"]


def runs():
    """The decodes of the sample, a Run for each policy."""
    model = Transformer.from_pretrained(WORLDS["diary"])
    tokenizer = load_tokenizer(WORLDS["diary"])
    prompt = encode_prompt(tokenizer, SAMPLE)
    found = []
    for names, policy in POLICIES.items():
        states = decode(model, prompt, RESPONSE_LENGTH, policy=policy)
        order = "decoded by certainty prior"
        found.append(watch(states, tokenizer, prompt.shape[1], *names, order))
    return found


def names_read(run):
    """Later mentions of people with nicknames: [(step, position in question, in answer, right)].

    The answer names people in the order of the question; what follows a "now" is a nickname.
    """
    words = [word.strip() for word in run.words]
    names = [i for i, word in enumerate(words) if word in NAMES and words[i - 1] != "now"]
    asked = [i for i in names if i < run.prompt_length]
    told = names[len(asked) :]
    step_of = {i: n for n, step in enumerate(run.steps) for i in step["committed"]}

    called = {}
    read = []
    for question, answer in zip(asked, told):
        person = words[question]
        if person not in called:
            nicknamed = words[answer + 1] == "now"
            called[person] = words[answer + 2] if nicknamed else person
        elif called[person] != person:
            right = words[answer] == called[person]
            read.append((step_of[answer], question, answer, right))
    return read


def ring(x, y):
    return f'<circle class="ring" cx="{x:g}" cy="{y:g}" r="5" fill="none" stroke="black"/>\n'


def cross(x, y):
    strokes = f"M{x - 5:g} {y - 5:g}l10 10m0 -10l-10 10"
    return f'<path class="cross" stroke="{RED}" stroke-width="3" d="{strokes}"/>\n'


def marks(run, top):
    """Rings and crosses over the panel of a run that begins at `top`."""
    width = column_width(run)
    body = ""
    for step, question, answer, right in names_read(run):
        y = top + ROW * (step + 0.5)
        body += ring(LEFT + width * (question + 0.5), y)
        if not right:
            body += cross(LEFT + width * (answer + 0.5), y)
    return body


def draw(runs):
    """The maps below one another, with their marks, and what these say."""
    body = ""
    y = 8
    for run in runs:
        y += 2 * WORDS_HEIGHT
        body += words_axis(run, y) + panel(run, y + 30) + marks(run, y + 30)
        y += 30 + ROW * len(run.steps) + 26
    body += legend(y + 18)
    body += ring(LEFT + 6, y + 70) + write(
        LEFT + 20, y + 74, "a name read again, nicknamed by now", 12
    )
    body += cross(LEFT + 256, y + 70) + write(LEFT + 270, y + 74, "a wrong name", 12)
    return card(y + 92, body, "Names of a diary, read again and not")


def main():
    (HERE / "map.svg").write_text(draw(runs()), encoding="utf-8")


if __name__ == "__main__":
    main()
