"""The functions of the method against the oracle's double loops, and the laws that they obey.

The same laws grade a student's functions: see tests/course/grading.py. Hence every comparison
prints what was computed and what is expected.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from d2cache import (
    D2Cache,
    attention_rollout,
    certainty_density,
    certainty_prior,
    highest,
    nucleus,
    pack,
    predict,
    rows_before,
    unmask,
    unpack,
)
from hypothesis import example, given
from hypothesis import strategies as st
from test_decoding import states

import oracle
from strategies import ModelSpec

SIGMAS = st.floats(0.01, 100)
SHARES = st.floats(0, 1)


def agree(computed, expected, tolerance=0.0):
    """AssertionError with both unless they are equal; or close, if there is a tolerance."""
    computed = computed.double()
    expected = torch.as_tensor(expected, dtype=torch.float64)
    same_shape = computed.shape == expected.shape
    if not same_shape or not torch.allclose(computed, expected, rtol=tolerance, atol=tolerance):
        raise AssertionError(f"computed {shown(computed)}\nexpected {shown(expected)}")


def shown(tensor):
    """Its numbers, short."""
    return str(tensor.tolist()).replace(".0,", ",").replace(".0]", "]")


def as_mask(sets, T):
    """Sets of positions as rows of booleans.  -> (B, T)"""
    return [[i in inside for i in range(T)] for inside in sets]


def best(n, scores, among):
    """Of the positions `among`, a row of booleans, the n of highest score; of equal ones the first."""
    positions = [i for i, inside in enumerate(among) if inside]
    return sorted(positions, key=lambda i: (-scores[i], i))[:n]


@st.composite
def bool_rows(draw, batch_size=None, length=None):
    B = batch_size or draw(st.integers(1, 3))
    T = length or draw(st.integers(1, 40))
    row = st.lists(st.booleans(), min_size=T, max_size=T)
    return draw(st.lists(row, min_size=B, max_size=B))


@st.composite
def scores_and_candidates(draw):
    """Scores with many ties and zeros, and which positions are `among`."""
    among = draw(bool_rows(length=draw(st.integers(1, 12) | st.just(100))))
    value = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(0, 4, width=32)
    row = st.lists(value, min_size=len(among[0]), max_size=len(among[0]))
    return draw(st.lists(row, min_size=len(among), max_size=len(among))), among


# ---- Density and prior ---------------------------------------------------------------------------


@given(bool_rows(), SIGMAS)
def test_density_is_the_double_sum(known, sigma):
    density = certainty_density(torch.tensor(known), sigma, torch.float64)
    agree(density, [oracle.density(row, sigma) for row in known], 1e-9)


@given(bool_rows(), SIGMAS)
def test_density_is_a_share(known, sigma):
    density = certainty_density(torch.tensor(known), sigma)
    agree(density, density.clamp(0, 1))


@given(bool_rows(), SIGMAS, st.data())
def test_density_grows_with_every_known_position(known, sigma, data):
    position = data.draw(st.integers(0, len(known[0]) - 1))
    known = torch.tensor(known)
    more = known.clone()
    more[:, position] = True
    before, after = certainty_density(known, sigma), certainty_density(more, sigma)
    agree(after, after.maximum(before))
    agree((after > before)[:, position], ~known[:, position])


def test_density_is_highest_beside_what_is_known():
    density = certainty_density(torch.tensor([[True] * 4 + [False] * 8]), sigma=3.0)[:, 4:]
    agree(density, density.sort(dim=1, descending=True).values)
    agree(density.diff() < 0, torch.ones(1, 7))


@given(bool_rows(), SIGMAS)
def test_prior_is_confidence_times_density(known, sigma):
    random = torch.Generator().manual_seed(0)
    confidence = torch.rand(len(known), len(known[0]), generator=random, dtype=torch.float64)
    density = torch.tensor([oracle.density(row, sigma) for row in known], dtype=torch.float64)
    agree(certainty_prior(confidence, torch.tensor(known), sigma), confidence * density, 1e-9)


# ---- Rollout -------------------------------------------------------------------------------------


@st.composite
def rollouts(draw):
    """maps (L, B, Q, T) of random attention, positions (B, Q), and which of these are valid."""
    L, B, T = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    Q = draw(st.integers(1, T))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    maps = torch.softmax(3 * torch.randn(L, B, Q, T, generator=random, dtype=torch.float64), dim=-1)
    positions = torch.stack([torch.randperm(T, generator=random)[:Q] for _ in range(B)])
    n_valid = torch.tensor(draw(st.lists(st.integers(1, Q), min_size=B, max_size=B)))
    valid = torch.arange(Q) < n_valid[:, None]
    return maps, torch.where(valid, positions, positions[:, :1]), valid


@given(rollouts())
def test_rollout_is_the_product_of_T_by_T_matrices(drawn):
    maps, positions, valid = drawn
    expected = []
    for b in range(maps.shape[1]):
        rows = [(q, positions[b, q].item()) for q in range(maps.shape[2]) if valid[b, q]]
        layers = [{position: layer[b, q] for q, position in rows} for layer in maps]
        expected.append(oracle.rollout(layers, maps.shape[3]))
    agree(attention_rollout(maps, positions, valid), torch.stack(expected), 1e-9)


def test_rollout_hands_on_half_of_a_recomputed_row_in_every_layer():
    """The README's example: T = 3, positions 0 and 2 recomputed, first by the last layer."""
    first = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]])
    last = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]])
    positions, valid = torch.tensor([[0, 2]]), torch.tensor([[True, True]])
    agree(attention_rollout(last[None], positions, valid), [[0.875, 1.375, 0.75]])
    by_both = attention_rollout([first, last], positions, valid)
    agree(by_both, [[0.65625, 1.671875, 0.671875]])


@given(rollouts(), st.sampled_from([torch.float64, torch.float32]))
def test_rollout_neither_makes_nor_loses_influence(drawn, dtype):
    maps, positions, valid = drawn
    influence = attention_rollout(maps.to(dtype), positions, valid)
    agree(influence.sum(dim=1), torch.full((maps.shape[1],), float(maps.shape[3])), 1e-5)
    assert influence.dtype == dtype


# ---- Nucleus and highest -------------------------------------------------------------------------


@given(scores_and_candidates(), SHARES | st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@example(([[0.0, 0.0, 0.0]], [[False, True, True]]), 0.5)  # nothing to share: the first
def test_nucleus_is_the_smallest_set_whose_share_exceeds_p(drawn, p):
    scores, among = drawn
    chosen = nucleus(torch.tensor(scores, dtype=torch.float64), p, torch.tensor(among))
    expected = [oracle.nucleus(row, p, mask) for row, mask in zip(scores, among)]
    agree(chosen, as_mask(expected, len(among[0])))


@given(scores_and_candidates())
def test_nucleus_of_zero_is_one_and_of_one_is_all(drawn):
    scores, among = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    agree(nucleus(scores, 0, among).sum(dim=1), among.any(dim=1))
    agree(nucleus(scores, 1, among), among)


@given(scores_and_candidates(), SHARES, SHARES)
def test_nucleus_grows_with_p(drawn, p, other):
    scores, among = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    smaller, larger = nucleus(scores, min(p, other), among), nucleus(scores, max(p, other), among)
    agree(larger, larger | smaller)


@given(scores_and_candidates(), st.data())
def test_highest_is_the_head_of_the_sorted_candidates(drawn, data):
    """Of as many in all sequences, or of a number for each."""
    scores, among = drawn
    B, n = len(scores), st.integers(0, 14)
    each = data.draw(n.map(lambda n: [n] * B) | st.lists(n, min_size=B, max_size=B))
    numbers = each[0] if len(set(each)) == 1 else torch.tensor(each)[:, None]
    chosen = highest(torch.tensor(scores), torch.tensor(among), numbers)
    agree(chosen, as_mask(map(best, each, scores, among), len(among[0])))


# ---- Rows ----------------------------------------------------------------------------------------


@given(bool_rows(), st.data())
def test_pack_lists_the_chosen_the_predicted_first_and_repeats_only_to_fill(chosen, data):
    chosen = torch.tensor(chosen)
    chosen[:, data.draw(st.integers(0, chosen.shape[1] - 1))] = True
    predicted = chosen & torch.tensor(data.draw(bool_rows(*chosen.shape)))
    Q = int(chosen.sum(dim=1).max())
    positions, valid = pack(chosen, predicted, Q)
    rows, are_valid = [], []
    for b in range(len(chosen)):
        first = predicted[b].nonzero()[:, 0].tolist()
        listed = first + (chosen & ~predicted)[b].nonzero()[:, 0].tolist()
        rows.append(listed + listed[:1] * (Q - len(listed)))
        are_valid.append([True] * len(listed) + [False] * (Q - len(listed)))
    agree(positions, rows)
    agree(valid, are_valid)


@given(bool_rows(), st.data())
def test_unpack_puts_back_what_pack_put_first(chosen, data):
    chosen = torch.tensor(chosen)
    predicted = chosen & torch.tensor(data.draw(bool_rows(*chosen.shape)))
    predicted[:, data.draw(st.integers(0, chosen.shape[1] - 1))] = True
    chosen = chosen | predicted
    R = int(predicted.sum(dim=1).max())
    positions, _ = pack(chosen, predicted, int(chosen.sum(dim=1).max()))
    place = torch.arange(chosen.shape[1]).expand_as(chosen)
    agree(unpack(positions[:, :R], predicted)[predicted], place[predicted])


# ---- What to commit, and what to recompute -------------------------------------------------------


QUARTERS = st.sampled_from([None, 0.0, 0.25, 0.5])


@given(states(), st.integers(0, 2**16), st.booleans(), st.integers(1, 3), QUARTERS)
def test_unmask_commits_the_best_of_the_block_and_what_reaches_the_threshold(
    state, seed, by_prior, n, threshold
):
    """As in Fast-dLLM a confidence equal to the threshold reaches it. It once had to exceed it."""
    T = state.known.shape[1]
    random = torch.Generator().manual_seed(seed)
    predicted = state.masked & (torch.rand(state.known.shape, generator=random) < 0.8)
    confidence = torch.randint(0, 4, state.known.shape, generator=random).double() / 4
    commit = unmask(state, predicted, confidence, by_prior, n, threshold)

    score = confidence * state.density if by_prior else confidence
    candidates = predicted & state.block
    expected = as_mask(map(partial(best, n), score.tolist(), candidates.tolist()), T)
    if threshold is not None:
        expected = torch.tensor(expected) | (candidates & (confidence >= threshold))
    agree(commit, expected)


@given(states(), st.integers(1, 20), st.sampled_from([None, 0.5, 4.0]))
def test_stage_1_is_the_highest_prior_that_of_the_block_first(state, k, sigma):
    """With a sigma of its own it has a density of its own, else the one of the state."""
    density = state.density
    if sigma is not None:
        rows = [oracle.density(row, sigma) for row in state.known.tolist()]
        density = torch.tensor(rows, dtype=torch.float64)
    score = state.confidence * density + 2 * state.block  # a prior is at most 1
    expected = map(partial(best, k), score.tolist(), state.masked.tolist())
    computed = D2Cache(k, 0.1, sigma).about_to_be_decoded(state)
    agree(computed, as_mask(expected, state.known.shape[1]))


@given(states(), st.sampled_from([0.0, 0.1, 0.6, 1.0]))
def test_stage_2_is_the_nucleus_of_influence_among_the_known(state, p):
    rows = zip(state.influence.tolist(), state.known.tolist())
    expected = [oracle.nucleus(influence, p, known) for influence, known in rows]
    agree(D2Cache(k=1, p=p).attended(state), as_mask(expected, state.known.shape[1]))


# ---- Predictions ---------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 3), st.integers(2, 12))
def test_the_row_before_is_that_of_the_position_before(data, B, T):
    """Rows hold their own position as hidden state."""
    predicted = torch.tensor(data.draw(bool_rows(B, T)))
    chosen = predicted.clone()
    chosen[:, :-1] |= predicted[:, 1:]
    chosen[:, 0] = True
    Q, R = int(chosen.sum(dim=1).max()), int(predicted.sum(dim=1).max())
    positions, _ = pack(chosen, predicted, Q)
    before = rows_before(positions[:, :, None].double(), positions, R, T)[:, :, 0].long()
    for b in range(B):
        expected = [max(i - 1, 0) for i in range(T) if predicted[b, i]]
        assert before[b, : len(expected)].tolist() == expected


CONFIG = replace(ModelSpec(1, 1, 1, 2, vocab_size=6, seed=0).config(), vocab_size=5)  # [MASK] is 3


@pytest.mark.parametrize("excluded", [CONFIG.mask_token_id, CONFIG.vocab_size])
@pytest.mark.parametrize("lead", [0.0, 5.0, 1e4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_and_ids_without_a_token_are_never_predicted(excluded, lead, temperature):
    logits = torch.tensor([[[0.0, 0.0, 90.0, 0.0, 0.0, 0.0]]])
    logits[..., excluded] = 90 + lead
    confidence, token = predict(logits, CONFIG, temperature, torch.Generator())
    assert token.item() == 2
    assert confidence.item() == torch.softmax(logits, dim=-1)[0, 0, 2].item()


def test_no_temperature_is_too_high_to_exclude_mask():
    _, token = predict(torch.zeros(1, 500, 6), CONFIG, 1e308, torch.Generator())
    assert not torch.isin(token, torch.tensor([CONFIG.mask_token_id, CONFIG.vocab_size])).any()


@given(st.integers(0, 2**16), st.sampled_from([0.2, 1.0, 3.0]))
def test_a_sampled_token_is_lladas(seed, temperature):
    """Theirs is the arg-max of exp(logits) / (-log u)^temperature, in float64."""
    logits = 3 * torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed))
    confidence, token = predict(logits, CONFIG, temperature, torch.Generator().manual_seed(seed))
    noise = torch.empty(2, 3, 6, dtype=torch.float64)
    noise.uniform_(generator=torch.Generator().manual_seed(seed))
    score = logits.double().exp() / (-torch.log(noise)) ** temperature
    expected = score[..., [0, 1, 2, 4]].argmax(dim=-1)
    assert torch.equal(token, expected + (expected == 3))
    assert torch.equal(
        confidence, torch.softmax(logits, dim=-1).gather(-1, token[..., None])[..., 0]
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_from_the_softmax_at_their_temperature(temperature):
    n, logits = 20_000, torch.tensor([1.0, 0.0, 2.0, -100.0, -1.0, -100.0])
    _, token = predict(
        logits.expand(1, n, 6), CONFIG, temperature, torch.Generator().manual_seed(1)
    )
    shares = torch.softmax(logits / temperature, dim=0)
    drawn = token[0].bincount(minlength=6) / n
    assert ((drawn - shares).abs() < 4 * (shares * (1 - shares) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_of_logits_that_are_not_finite_has_no_confidence(value):
    logits = torch.zeros(1, 2, 6)
    logits[0, 1, 4] = value
    confidence, _ = predict(logits, CONFIG)
    assert confidence.isnan().tolist() == [[False, True]]
