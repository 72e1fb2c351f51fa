"""The journeys, their judge, trainer and model against what journey/README.md says of them."""

import json
import random
from pathlib import Path

import torch
from d2cache import D2Cache, SlidingWindow, generate
from hypothesis import given
from hypothesis import strategies as st
from model import Transformer, decode_response, encode_prompt, load_tokenizer

import training
from controls import WindowStage1
from journey import train
from journey.problems import (
    LINES,
    RESPONSE_LENGTH,
    SPECIAL_TOKENS,
    STOPS,
    TEST_SEED,
    draw_problems,
    is_right,
    make_tokenizer,
    problem,
)

WORLD = Path(__file__).parent
PROBLEMS = draw_problems(TEST_SEED)

QUESTION = "Monday on the red line, Tuesday on the blue line. Now at Park."
ANSWER = "Monday on the red line: Castle to Harbour. Tuesday on the blue line: Harbour to Park."


def test_the_way_follows_the_lines_to_where_the_last_ride_ended():
    """By hand: on blue Park is behind Harbour, on red Harbour behind Castle."""
    assert is_right(QUESTION, ANSWER)
    assert not is_right(QUESTION, ANSWER.replace("Castle", "Tower"))
    assert not is_right(QUESTION, ANSWER + ".") and not is_right(QUESTION, "")


def test_every_line_is_a_ring_through_all_stops():
    for ring in LINES.values():
        assert sorted(ring) == sorted(STOPS)


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


def test_a_stop_is_in_reach_beside_a_known_one_or_as_the_last():
    """Stops 0 to 3, hidden some of them; and which of these are out of reach."""
    tokenizer = make_tokenizer()
    prompt_length = len(tokenizer.encode(QUESTION))
    ids = tokenizer.encode(QUESTION).ids + tokenizer.encode(ANSWER).ids
    stops = train.stops_of(tokenizer, ids, prompt_length)
    assert tokenizer.decode([ids[i] for i in stops]) == " Castle Harbour Harbour Park"
    for hidden, expected in [([0], []), ([0, 1], [0]), ([1, 2], []), ([0, 1, 2, 3], [0, 1, 2])]:
        masked = torch.zeros(1, len(ids), dtype=torch.bool)
        masked[0, [stops[n] for n in hidden]] = True
        alone = train.out_of_reach(masked, [stops])[0]
        assert alone.nonzero()[:, 0].tolist() == [stops[n] for n in expected]


def solved(policy):
    """How many of the first 24 problems a policy solves in the order of the prior."""
    model = Transformer.from_pretrained(WORLD)
    tokenizer = load_tokenizer(WORLD)
    prompt = torch.cat([encode_prompt(tokenizer, question) for question, _ in PROBLEMS[:24]])
    tokens = generate(model, prompt, RESPONSE_LENGTH, policy=policy)
    right = 0
    for (question, _), response in zip(PROBLEMS, tokens[:, -RESPONSE_LENGTH:]):
        right += is_right(question, decode_response(tokenizer, response, model.config.end_ids))
    return right


def test_d2cache_leaves_the_stops_for_later_and_a_window_guesses():
    """With the same stage 2, and without."""
    k = RESPONSE_LENGTH // 8
    assert solved(D2Cache(k)) >= 21
    assert solved(WindowStage1(k)) <= 8 and solved(SlidingWindow(k)) <= 8
