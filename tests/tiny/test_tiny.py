"""The embedded model and its word problems against what problems.py and the README say of them."""

import json
import random
import re
from functools import partial

import pytest
import torch
from d2cache import EMBEDDED_MODEL, D2Cache, decode, paper_settings
from hypothesis import given
from hypothesis import strategies as st
from model import Transformer, decode_response, encode_prompt, load_tokenizer

import training
from tiny import train
from tiny.problems import (
    EVENTS,
    RESPONSE_LENGTH,
    SPECIAL_TOKENS,
    TEST_GROUP,
    TEST_SEED,
    draw_problems,
    is_whole,
    make_tokenizer,
    problem,
    vocabulary,
)

PROBLEMS = draw_problems(TEST_SEED)
FIRST = PROBLEMS[:TEST_GROUP]
ORDERS = {
    "confidence": {"sigma": None},
    "blocks": {"block_length": paper_settings(RESPONSE_LENGTH)["dual"]["block_length"]},
    "prior": {},
}


@pytest.fixture(scope="module")
def embedded():
    return Transformer.from_pretrained(EMBEDDED_MODEL), load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def vanilla(embedded):
    """The states of uncached decodes of the first problems, by order."""
    return {name: watch(embedded, FIRST, order) for name, order in ORDERS.items()}


def watch(embedded, problems, arguments):
    """Every state of a decode of problems whose questions have equally many tokens."""
    model, tokenizer = embedded
    prompt = torch.cat([encode_prompt(tokenizer, question) for question, _ in problems])
    return list(decode(model, prompt, RESPONSE_LENGTH, **arguments))


def answers(embedded, states):
    """The texts at the end of a decode."""
    model, tokenizer = embedded
    responses = states[-1].tokens[:, -RESPONSE_LENGTH:]
    return [decode_response(tokenizer, ids, model.config.end_ids).strip() for ids in responses]


def solved(embedded, problems, states):
    """How many of the problems come to the right number."""
    right = 0
    for text, (_, answer) in zip(answers(embedded, states), problems, strict=True):
        right += number(text) == number(answer)
    return right


def number(answer):
    """What stands behind the last "####", None without it."""
    _, mark, after = answer.rpartition("#### ")
    return after if mark else None


def equations(answer):
    """(day, count, sign, amount, result) of every equation."""
    return re.findall(r"(\w+): (\d+) ([+-]) (\d+) = (\d+)", answer)


@given(st.integers(0, 2**32), st.sampled_from([(1, 2), (2, 3), EVENTS]))
def test_answers_follow_from_their_questions(seed, events):
    question, answer = problem(random.Random(seed), events, direct_share=0)
    count = int(re.search(r"has (\d+)", question).group(1))
    found = re.findall(r"On (\w+) \w+ (\w+) (?:away )?(\d+)", question)
    assert events[0] <= len(found) <= events[1]
    for (day, verb, amount), equation in zip(found, equations(answer), strict=True):
        sign = "+" if verb in ("buys", "finds", "gets", "wins") else "-"
        result = count + int(amount) if sign == "+" else count - int(amount)
        assert equation == (day, str(count), sign, amount, str(result))
        assert 10 <= result <= 99
        count = result
    assert number(answer) == str(count)


def test_the_length_of_an_answer_does_not_follow_from_its_question():
    """Equations have 10 to 12 tokens, drawn one by one; a quarter of the answers has none."""
    tokenizer = make_tokenizer()
    lengths = {}
    direct = 0
    for seed in range(4000):
        question, answer = problem(random.Random(seed))
        if not equations(answer):
            direct += 1
            continue
        of_equations = len(tokenizer.encode(answer)) - 10  # "Zoe starts with 66 eggs. ... #### 78"
        lengths.setdefault(question.count(" On "), set()).add(of_equations)
    assert lengths == {3: set(range(30, 37)), 4: set(range(40, 49))}
    assert 0.22 < direct / 4000 < 0.28


@given(st.integers(0, 2**32), st.data())
def test_whole_is_every_answer_drawn_and_none_with_a_token_changed(seed, data):
    question, answer = problem(random.Random(seed))
    assert is_whole(question, answer)
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(answer).ids
    place = data.draw(st.integers(0, len(ids) - 1))
    other = data.draw(st.integers(len(SPECIAL_TOKENS), len(vocabulary()) - 1))
    changed = tokenizer.decode([*ids[:place], other, *ids[place + 1 :]]).strip()
    assert is_whole(question, changed) == (other == ids[place])


@given(st.integers(0, 2**32))
def test_tokenizer_reads_every_problem_and_gives_it_back(seed):
    tokenizer = make_tokenizer()
    for text in problem(random.Random(seed)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert min(ids) >= len(SPECIAL_TOKENS) and tokenizer.decode(ids) == " " + text
        assert len(ids) < RESPONSE_LENGTH


def test_checkpoint_fits_the_problems(embedded):
    model, tokenizer = embedded
    assert tokenizer.to_str() == make_tokenizer().to_str()
    assert model.config.vocab_size == len(vocabulary()) == tokenizer.get_vocab_size()
    assert vocabulary()[model.config.mask_token_id] == "[MASK]"
    assert vocabulary()[model.config.eos_token_id] == "<eos>"
    assert (EMBEDDED_MODEL / "model.safetensors").stat().st_size <= 4_000_000


def test_the_checkpoint_has_the_shape_that_train_py_trains():
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text(encoding="utf-8"))
    assert config == train.SHAPE | training.ARCHITECTURE


@given(st.integers(0, 2**32))
def test_a_drill_hides_a_result_together_with_its_copy(seed):
    """Else it could be read off. What is hidden is digits only, and of the answer only."""
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    problems = training.Problems(partial(problem, rng), tokenizer)
    batch, prompt_length = problems.batch(RESPONSE_LENGTH, EVENTS, train.NO_DIRECT)
    masked, weight = train.chain_drill(rng, tokenizer, batch, prompt_length)
    assert torch.equal(masked, weight > 0) and not masked[:, :prompt_length].any()
    for ids, hidden in zip(batch.tolist(), masked.tolist()):
        pieces = [tokenizer.decode([id], skip_special_tokens=False) for id in ids]
        shown = "".join("?" if hide else piece for piece, hide in zip(pieces, hidden))
        results = re.findall(r"=(\?\?| \d\d)", shown)
        copies = re.findall(r"(?::|####)(\?\?| \d\d)", shown)[1:]
        assert results == copies and shown.count("?") == 1 + 4 * results.count("??")


@given(st.integers(0, 2**32))
def test_a_suffix_drill_hides_all_from_some_token_on(seed):
    tokens = torch.zeros(3, 30 + RESPONSE_LENGTH, dtype=torch.long)
    masked, weight = training.suffix_masks(random.Random(seed), tokens, 30, graded=10)
    for hidden, graded in zip(masked.tolist(), weight.tolist()):
        first = hidden.index(True)
        assert 30 <= first and all(hidden[first:])
        assert [i for i, value in enumerate(graded) if value] == list(range(first, first + 10))


def test_the_order_of_decoding_decides_what_vanilla_solves(embedded, vanilla):
    """Confidence alone ends answers too early; blocks and the certainty prior do not."""
    right = {name: solved(embedded, FIRST, states) for name, states in vanilla.items()}
    assert right["confidence"] <= 5 and right["blocks"] >= 7 and right["prior"] >= 7


def test_confidence_commits_end_of_text_early_and_the_prior_late(embedded, vanilla):
    eos_token_id = embedded[0].config.eos_token_id
    ends = {}
    for name, states in vanilla.items():
        state = states[RESPONSE_LENGTH // 4 - 1]
        is_end = state.known & (state.tokens == eos_token_id)
        ends[name] = is_end.sum(dim=1).float().mean().item()
    assert ends["confidence"] > 4 and ends["blocks"] == ends["prior"] == 0


def test_d2cache_writes_whole_answers_with_a_seventh_of_the_work(embedded):
    """A sliding window comes to the right number almost as often, but stumbles on the way."""
    whole = {"d2cache": 0, "window": 0}
    for start in range(0, 32, TEST_GROUP):
        group = PROBLEMS[start : start + TEST_GROUP]
        for name in whole:
            states = watch(embedded, group, paper_settings(RESPONSE_LENGTH)[name])
            share = torch.stack([state.chosen for state in states]).float().mean().item()
            assert share < 0.15
            for (question, _), text in zip(group, answers(embedded, states), strict=True):
                whole[name] += is_whole(question, text)
    assert whole["d2cache"] >= 29 and whole["window"] <= 28


def test_full_refresh_is_vanilla_on_the_trained_model_too(embedded, vanilla):
    everything = watch(embedded, FIRST[:2], {"policy": D2Cache(k=512, p=1)})
    assert torch.equal(everything[-1].tokens, vanilla["prior"][-1].tokens[:2])
