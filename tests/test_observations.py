"""What observations.py measures against loops over positions, and what it prints on the model."""

import re
import subprocess
import sys

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
    known = torch.tensor([[[step[i] <= s for i in SIX] for s in SIX]])
    decoded = observations.decoded_at(known)
    left = observations.steps_left(decoded, S=6)
    assert left.tolist() == [[[step[i] - s for i in SIX] for s in SIX[1:]]]
    ordered = observations.in_order(torch.tensor([tokens]), decoded)
    assert ordered.tolist() == [[tokens[step.index(s)] for s in SIX]]
    assert observations.first(ordered == 2).item() == 1 + [*ordered[0], 2].index(2)


def test_mean_within_takes_both_ends_of_the_span():
    values, left = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[3, 2], [1, 0]])
    assert observations.mean_within(values, left, 1, 2) == 3


def test_key_changes_are_those_of_canvases_recomputed_one_by_one(embedded):
    changes = observations.key_changes(embedded, TOKENS)
    for b, s in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        before, after = (KVCache(embedded.config, 1, 20, "cpu", torch.float64) for _ in range(2))
        embedded(TOKENS[b, s : s + 1], cache=before)
        embedded(TOKENS[b, s + 1 : s + 2], cache=after)
        for i in range(20):
            pairs = zip(before.k[:, 0, i], after.k[:, 0, i])  # by layer
            expected = sum(((new - old).norm() / old.norm()).item() for old, new in pairs) / 4
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
        for pair, kind in zip(row, kinds):
            assert pair == pytest.approx([len(kind) / 20, sum(influence[i] for i in kind) / 20])


def test_program_prints_the_observations_that_hold_for_the_embedded_model():
    program = [sys.executable, observations.__file__]
    result = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = dict(re.findall(r"^(\S.*?)  +(\d.*)$", result.stdout, re.MULTILINE))
    rows = {name: [float(n) for n in re.findall(r"\d+\.\d", row)] for name, row in rows.items()}
    for order in (0, 1):
        fast = max(rows[f"{span} before"][order] for span in ("4-3", "2", "1"))
        slow = ("63-33 before", "32-17 before", "2-4 after", "5-8 after", "9-16 after")
        assert rows["becomes a token"][order] > 10 * fast
        assert all(fast > 2 * rows[span][order] for span in slow)
    positions, influence = rows["top tenth"][::2], rows["top tenth"][1::2]
    assert all(held > 2 * share for held, share in zip(influence, positions))
    prior, confidence = rows["by certainty prior"], rows["by confidence"]
    assert confidence[0] > prior[0] == 0 and confidence[-1] < 16 < prior[-1]
    assert confidence[-2] == prior[-2]  # EOS in another order, but as many
