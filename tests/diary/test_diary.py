"""The diaries, their judge and their model against what diary/README.md says of them."""

import json
import random
from pathlib import Path

import pytest
import torch
from bench import WithoutStage2
from d2cache import D2Cache, generate
from hypothesis import given
from hypothesis import strategies as st
from model import Transformer, decode_response, encode_prompt, load_tokenizer

import training
from diary import train
from diary.problems import (
    RESPONSE_LENGTH,
    SPECIAL_TOKENS,
    TEST_SEED,
    TRAIN_SEED,
    draw_problems,
    is_right,
    make_tokenizer,
    problem,
)

WORLD = Path(__file__).parent
LINES = (WORLD / "problems.jsonl").read_text(encoding="utf-8").splitlines()
PROBLEMS = [(json.loads(line)["question"], json.loads(line)["answer"]) for line in LINES]

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


def test_held_out_problems_are_those_of_the_test_seed():
    assert PROBLEMS == draw_problems(TEST_SEED) and TEST_SEED != TRAIN_SEED


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
