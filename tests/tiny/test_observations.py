"""What observations.py measures against loops over positions, and what it prints on the model."""

import re

import pytest
import torch
from d2cache import EMBEDDED_MODEL
from hypothesis import given
from hypothesis import strategies as st
from model import KVCache, Transformer

import oracle
from tiny import observations

TOKENS = torch.randint(3, 80, (2, 4, 20), generator=torch.Generator().manual_seed(0))
SIX = range(6)


@pytest.fixture(scope="module")
def embedded():
    return Transformer.from_pretrained(EMBEDDED_MODEL, dtype=torch.float64)


@given(st.permutations(SIX), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_steps_left_and_order_follow_from_the_step_that_decodes(step, tokens):
    """No prompt, six positions, and step[i] the number of steps done before i is decoded."""
    known = torch.tensor([[[step[i] < s for i in SIX] for s in range(7)]])
    canvases = observations.Canvases(torch.tensor([[tokens] * 7]), known, prompt_length=0)
    assert canvases.steps_left.tolist() == [[[step[i] - s for i in SIX] for s in SIX]]
    assert canvases.in_order.tolist() == [[tokens[step.index(s)] for s in SIX]]


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_first_counts_from_one_and_goes_beyond_the_end_without_a_hit(hits):
    assert observations.first(torch.tensor([hits])).item() == 1 + [*hits, True].index(True)


def test_mean_within_takes_both_ends_of_the_span():
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    left = torch.tensor([[3, 2], [1, 0]])
    assert observations.mean_within(values, left, 1, 2) == 3


def test_key_changes_are_those_of_canvases_recomputed_one_by_one(embedded):
    changes = observations.key_changes(embedded, TOKENS)
    for b, s in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        before = KVCache(embedded.config, 1, 20, "cpu", torch.float64)
        after = KVCache(embedded.config, 1, 20, "cpu", torch.float64)
        embedded(TOKENS[b, s : s + 1], cache=before)
        embedded(TOKENS[b, s + 1 : s + 2], cache=after)
        for i in range(20):
            layers = zip(before.k[:, 0, i], after.k[:, 0, i])
            expected = sum(((new - old).norm() / old.norm()).item() for old, new in layers) / 4
            assert changes[b, s, i].item() == pytest.approx(expected)


def test_influence_shares_are_those_of_the_rollout_as_matrix_products(embedded):
    known = (torch.arange(20) < 5) | (torch.arange(20) % 3 == 0)
    shares = observations.influence_shares(embedded, TOKENS[0], known.expand(4, 20), P=5)
    for row, tokens in zip(shares.tolist(), TOKENS[0]):
        _, maps = embedded(tokens[None], return_attention=True)
        influence = oracle.rollout([dict(enumerate(layer[0])) for layer in maps], 20).tolist()
        top = sorted(range(20), key=lambda i: -influence[i])[:2]
        masked = [i for i in range(20) if not known[i]]
        kinds = range(5), range(6, 20, 3), masked, top, set(top) & set(masked)
        for pair, kind in zip(row, kinds, strict=True):
            assert pair == pytest.approx([len(kind) / 20, sum(influence[i] for i in kind) / 20])


def test_a_sketch_tells_words_from_end_of_text_and_from_masks():
    tokens = torch.tensor([7, 0, 1, 0, 9])
    known = torch.tensor([True, True, False, False, True])
    assert observations.sketch(tokens, known, end_ids=(0, 5)) == "#|..#"


@pytest.fixture(scope="module")
def printed():
    """What the program prints, of two problems instead of sixteen."""
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *parts: lines.append(" ".join(map(str, parts))))
        observations.report(range(2))
    return lines


def numbers(lines, name):
    """The numbers of the line that begins with a name."""
    (line,) = [line for line in lines if line.startswith(name + " ")]
    return [float(number) for number in re.findall(r"\d+\.\d", line.removeprefix(name))]


def test_keys_move_fast_before_their_position_is_decoded_and_rest_afterwards(printed):
    fast = max(numbers(printed, f"{span} before")[0] for span in ("4-3", "2", "1"))
    slow = ("63-33 before", "32-17 before", "5-8 after", "9-16 after", "17-63 after")
    assert numbers(printed, "becomes a token")[0] > 5 * fast
    assert all(fast > 2 * numbers(printed, span)[0] for span in slow)


def test_end_of_text_comes_first_by_confidence_and_last_by_prior(printed):
    prior = numbers(printed, "certainty prior")
    confidence = numbers(printed, "confidence")
    assert confidence[0] > 50 and confidence[-1] == 1
    assert prior[0] == 0 and prior[-1] > 40


def test_step_by_step_the_end_grows_inwards_until_the_calculation_has_no_room(printed):
    steps = [re.fullmatch(r" *(\d+) +(\d+)  (\S+) +(\d\.\d\d)  ([#|.]{64})", s) for s in printed]
    steps = [step.groups() for step in steps if step]
    assert [int(step) for step, *_ in steps] == list(range(1, 65))
    before = "." * 64
    for _, position, token, _, canvas in steps:
        changed = [i for i in range(64) if canvas[i] != before[i]]
        assert changed == [int(position)]
        assert canvas[changed[0]] == ("|" if token == "<eos>" else "#")
        before = canvas

    assert all(token == "<eos>" for _, _, token, *_ in steps[:8])
    *_, by_confidence, by_prior = [len(re.findall(r"[+-] \d+ = \d+", line)) for line in printed]
    assert by_confidence < by_prior == 3
