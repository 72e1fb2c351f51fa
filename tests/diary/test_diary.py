"""The diaries, their judge and their model against what diary/README.md says of them."""

import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from d2cache import D2Cache, generate
from hypothesis import given
from hypothesis import strategies as st
from model import Transformer, decode_response, encode_prompt, load_tokenizer

import training
from controls import WithoutStage2
from diary import picture, train
from diary.problems import (
    RESPONSE_LENGTH,
    SPECIAL_TOKENS,
    TEST_SEED,
    draw_problems,
    is_right,
    make_tokenizer,
    problem,
)

WORLD = Path(__file__).parent
PROBLEMS = draw_problems(TEST_SEED)

QUESTION = "Friday: Robert meets Margaret. Saturday: Thomas meets Robert."
RIGHT = {
    "as asked": QUESTION,
    "one nickname": "Friday: Robert now Bob meets Margaret. Saturday: Thomas meets Bob.",
    "three": "Friday: Robert now Rob meets Margaret now Meg. Saturday: Thomas now Tom meets Rob.",
}
WRONG = {
    "the old name": "Friday: Robert now Bob meets Margaret. Saturday: Thomas meets Robert.",
    "another nickname": "Friday: Robert now Bob meets Margaret. Saturday: Thomas meets Rob.",
    "somebody else's": "Friday: Robert now Bill meets Margaret. Saturday: Thomas meets Bill.",
    "from nowhere": "Friday: Robert meets Margaret. Saturday: Thomas meets Bob.",
    "too late": "Friday: Robert meets Margaret. Saturday: Thomas meets Robert now Bob.",
    "twice": "Friday: Robert now Bob meets Margaret. Saturday: Thomas meets Bob now Rob.",
    "no nickname": "Friday: Robert now Robert meets Margaret. Saturday: Thomas meets Robert.",
    "swapped": "Friday: Margaret meets Robert. Saturday: Thomas meets Robert.",
    "another day": "Friday: Robert meets Margaret. Sunday: Thomas meets Robert.",
    "a sentence short": "Friday: Robert meets Margaret.",
    "a word too many": QUESTION + " Sunday",
    "a stop too many": QUESTION + ".",
    "nothing": "",
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT)
def test_an_answer_that_keeps_to_its_names_is_right(text):
    assert is_right(QUESTION, text)


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_an_answer_that_does_not_is_wrong(text):
    assert not is_right(QUESTION, text)


@given(st.integers(0, 2**32))
def test_every_problem_is_right_and_read_by_the_tokenizer(seed):
    question, answer = problem(random.Random(seed))
    assert is_right(question, answer)
    tokenizer = make_tokenizer()
    for text in (question, answer):
        ids = tokenizer.encode(text).ids
        assert min(ids) >= len(SPECIAL_TOKENS) and tokenizer.decode(ids) == " " + text
    assert len(tokenizer.encode(answer)) < RESPONSE_LENGTH


def test_the_checkpoint_has_the_shape_and_the_tokenizer_that_train_py_trains():
    config = json.loads((WORLD / "config.json").read_text(encoding="utf-8"))
    assert config == train.SHAPE | training.ARCHITECTURE
    assert load_tokenizer(WORLD).to_str() == make_tokenizer().to_str()


def test_the_names_of_a_question_mean_what_its_answer_calls_them_after_the_first_mention():
    tokenizer = make_tokenizer()
    prompt = tokenizer.encode(QUESTION).ids
    tokens = torch.tensor([prompt + tokenizer.encode(RIGHT["one nickname"]).ids])
    meant, later = train.meant_names(tokenizer, tokens, len(prompt))
    assert tokenizer.decode(meant[later].tolist()) == " Bob"


def solved(policy, sigma):
    """How many of the first 24 problems a policy solves in the order of the prior."""
    model = Transformer.from_pretrained(WORLD)
    tokenizer = load_tokenizer(WORLD)
    prompt = torch.cat([encode_prompt(tokenizer, question) for question, _ in PROBLEMS[:24]])
    tokens = generate(model, prompt, RESPONSE_LENGTH, policy=policy, sigma=sigma)
    right = 0
    for (question, _), response in zip(PROBLEMS, tokens[:, -RESPONSE_LENGTH:]):
        right += is_right(question, decode_response(tokenizer, response, model.config.end_ids))
    return right


def test_d2cache_uses_the_nicknames_and_without_its_second_stage_does_not():
    k = RESPONSE_LENGTH // 8
    sigma = 10 * RESPONSE_LENGTH / 256
    assert solved(D2Cache(k, 0.1, sigma), sigma) >= 22
    assert solved(WithoutStage2(k, 0.1, sigma), sigma) <= 6


# ---- The picture


@pytest.fixture(scope="module")
def runs():
    return picture.runs()


def test_d2cache_reads_a_name_again_where_it_is_needed_and_a_window_does_not(runs):
    """In the step that says it, or the one before; the window's wrong names are crossed out."""
    ours, window = runs
    for step, question, _, right in picture.names_read(ours):
        lit = ours.steps[step]["known"] + ours.steps[step - 1]["known"]
        assert right and question in lit
    read = picture.names_read(window)
    assert any(not right for *_, right in read)
    assert not any(
        position < window.prompt_length for step in window.steps[1:] for position in step["known"]
    )


def test_rings_and_crosses_stand_where_names_are_read_and_wrong(runs):
    for run in runs:
        drawn = picture.marks(run, top=100)
        read = picture.names_read(run)
        assert drawn.count("ring") == len(read) > 3
        assert drawn.count("cross") == [right for *_, right in read].count(False)
        step, question, *_ = read[0]
        width = picture.column_width(run)
        x = picture.LEFT + width * (question + 0.5)
        assert f'cx="{x:g}" cy="{100 + picture.ROW * (step + 0.5):g}"' in drawn


def test_the_picture_at_hand_shows_the_model_at_hand(runs):
    """Words and marks, not every cell: round-off may choose others on another machine."""
    at_hand = ElementTree.parse(WORLD / "map.svg").getroot()
    drawn = ElementTree.fromstring(picture.draw(runs))
    shown = [[element.get("class"), element.text] for element in at_hand.iter() if is_mark(element)]
    assert shown == [
        [element.get("class"), element.text] for element in drawn.iter() if is_mark(element)
    ]


def is_mark(element):
    """A word, a ring or a cross; texts with numbers are shares."""
    word = element.tag.endswith("text") and not re.search(r"\d", element.text or "")
    return word or element.get("class") in ("ring", "cross")
