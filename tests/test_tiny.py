"""The embedded model and its word problems against what the README says of them."""

import random
import re

import pytest
import bench
from bench import final_number, read_problems
from d2cache import EMBEDDED_MODEL, D2Cache, settings
from hypothesis import given
from hypothesis import strategies as st
from huggingface_hub.utils import tqdm
from model import Transformer, load_tokenizer

from tiny.problems import (
    RESPONSE_LENGTH,
    SPECIAL_TOKENS,
    TEST_GROUP,
    TEST_PROBLEMS,
    TEST_SEED,
    TRAIN_SEED,
    grouped_problems,
    make_tokenizer,
    problem,
    vocabulary,
)

PROBLEMS = read_problems(EMBEDDED_MODEL / "problems.jsonl", TEST_PROBLEMS)


@pytest.fixture(scope="module")
def embedded():
    return Transformer.from_pretrained(EMBEDDED_MODEL), load_tokenizer(EMBEDDED_MODEL)


def solve(embedded, problems, arguments):
    """The responses' texts, and the share of positions recomputed for them."""
    questions, nobody = [question for question, _ in problems], tqdm(disable=True)
    texts, _, share = bench.solve(*embedded, questions, RESPONSE_LENGTH, arguments, nobody)
    return texts, share


def solved(texts, problems):
    """The share of the texts that end in the right number."""
    right = [
        final_number(text) == final_number(answer) for text, (_, answer) in zip(texts, problems)
    ]
    return sum(right) / len(texts)


def test_held_out_problems_are_those_of_the_test_seed():
    assert PROBLEMS == grouped_problems(random.Random(TEST_SEED), TEST_PROBLEMS, TEST_GROUP)
    assert TEST_SEED != TRAIN_SEED
    assert len(set(PROBLEMS)) == TEST_PROBLEMS


@given(st.integers(0, 2**32), st.sampled_from([(1, 2), (2, 3), (3, 5)]))
def test_answers_follow_from_their_questions(seed, events):
    question, answer = problem(random.Random(seed), *events)
    count = int(re.search(r"has (\d+)", question).group(1))
    for verb, amount in re.findall(r"On \w+ \w+ (\w+) (?:away )?(\d+)", question):
        count += int(amount) if verb in ("buys", "finds", "gets", "wins") else -int(amount)
    assert answer.endswith(f"#### {count}") and 10 <= count <= 99


@given(st.integers(0, 2**32))
def test_tokenizer_reads_every_problem_and_gives_it_back(seed):
    tokenizer = make_tokenizer()
    for text in problem(random.Random(seed)):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert min(ids) >= len(SPECIAL_TOKENS) and tokenizer.decode(ids) == " " + text


def test_checkpoint_fits_the_problems(embedded):
    model, tokenizer = embedded
    assert tokenizer.to_str() == make_tokenizer().to_str()
    assert model.config.vocab_size == len(vocabulary()) == tokenizer.get_vocab_size()
    assert vocabulary()[model.config.mask_token_id] == "[MASK]"
    assert vocabulary()[model.config.eos_token_id] == "<eos>"
    assert (EMBEDDED_MODEL / "model.safetensors").stat().st_size <= 4_000_000


def test_vanilla_decoding_solves_nine_of_ten_problems(embedded):
    texts, _ = solve(embedded, PROBLEMS[:48], {})
    assert solved(texts, PROBLEMS) >= 0.9


def test_d2cache_solves_as_many_with_a_fifth_of_the_work(embedded):
    texts, share = solve(embedded, PROBLEMS[:40], settings(RESPONSE_LENGTH)["d2cache"])
    assert solved(texts, PROBLEMS) >= 0.85 and share < 0.2


def test_full_refresh_is_vanilla_on_the_trained_model_too(embedded):
    everything = {"policy": D2Cache(k=512, p=1)}
    assert solve(embedded, PROBLEMS[:8], everything) == solve(embedded, PROBLEMS[:8], {})


def test_forwards_and_shares_are_those_of_each_sequence_alone(embedded):
    """A batch goes on until its last sequence is decoded; the others wait."""
    arguments, nobody = settings(64)["d2cache"] | {"threshold": 0.9}, tqdm(disable=True)

    def work(questions):
        return bench.solve(*embedded, questions, RESPONSE_LENGTH, arguments, nobody)[1:]

    questions = [question for question, _ in PROBLEMS[:4]]
    alone = [work([question]) for question in questions]
    assert len({forwards for forwards, _ in alone}) > 1
    assert work(questions) == pytest.approx([sum(values) / 4 for values in zip(*alone)])


def test_a_quality_row_is_named_after_its_threshold():
    for name, arguments in bench.quality_rows(64):
        _, mark, threshold = name.partition("threshold ")
        assert arguments.get("threshold") == (float(threshold) if mark else None)


def test_agreement_is_with_exact_decoding_in_the_same_order(monkeypatch):
    """A stand-in for `solve` whose text says how it would have decoded."""

    def solve(model, tokenizer, questions, gen_length, arguments, progress):
        order = [arguments.get(name) for name in ("block_length", "sigma", "threshold")]
        return [str(order)] * len(questions), 1, 1.0

    monkeypatch.setattr(bench, "solve", solve)
    rows, _ = bench.measure_quality(None, None, [("How many?", "#### 1")], 64)
    for row in rows:
        assert row["same text"] == (None if row["policy"].startswith("vanilla") else 1)


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4 = 7 #### 7", "7"),
        ("#### 1,234 apples", "1234"),
        ("It is -2.5.", "-2.5"),
        ("####", None),
        ("", None),
    ],
)
def test_final_number_is_behind_the_mark_or_else_last(text, number):
    assert final_number(text) == number
