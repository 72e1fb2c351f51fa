"""The stage functions of d2cache.py against the oracle's double loops, and the laws they obey."""

from dataclasses import replace

import pytest
import torch
from d2cache import (
    attention_rollout,
    certainty_density,
    certainty_prior,
    highest,
    nucleus,
    pack,
    predict,
    rows_before,
    unpack,
)
from hypothesis import example, given
from hypothesis import strategies as st

import oracle
from strategies import ModelSpec

SIGMAS = st.floats(0.01, 100)
SHARES = st.floats(0, 1)


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


@given(bool_rows(), SIGMAS)
def test_density_is_the_double_sum(known, sigma):
    density = certainty_density(torch.tensor(known), sigma, torch.float64)
    expected = [oracle.density(row, sigma) for row in known]
    torch.testing.assert_close(
        density, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


@given(bool_rows(), SIGMAS)
def test_density_is_a_share(known, sigma):
    density = certainty_density(torch.tensor(known), sigma)
    assert density.min() >= 0 and density.max() <= 1


@given(bool_rows(), SIGMAS, st.data())
def test_density_grows_with_every_known_position(known, sigma, data):
    position = data.draw(st.integers(0, len(known[0]) - 1))
    known = torch.tensor(known)
    more = known.clone()
    more[:, position] = True
    assert (certainty_density(more, sigma) >= certainty_density(known, sigma)).all()


def test_density_is_highest_beside_what_is_known():
    density = certainty_density(torch.tensor([[True] * 4 + [False] * 8]), sigma=3.0)[0]
    assert (density[4:].diff() < 0).all()


@given(bool_rows(), SIGMAS)
def test_prior_is_confidence_times_density(known, sigma):
    known = torch.tensor(known)
    confidence = torch.rand(
        known.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    expected = confidence * certainty_density(known, sigma, torch.float64)
    assert torch.equal(certainty_prior(confidence, known, sigma), expected)


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
    influence = attention_rollout(maps, positions, valid)
    for b in range(maps.shape[1]):
        slots = [(q, positions[b, q].item()) for q in range(maps.shape[2]) if valid[b, q]]
        layers = [{position: layer[b, q] for q, position in slots} for layer in maps]
        expected = oracle.rollout(layers, maps.shape[3])
        torch.testing.assert_close(influence[b], expected, rtol=1e-9, atol=1e-9)


def test_a_recomputed_row_hands_on_half_of_its_influence_in_every_layer():
    """The README's example: T = 3, positions 0 and 2 recomputed, first by the last layer."""
    first = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]])
    last = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]])
    positions, valid = torch.tensor([[0, 2]]), torch.tensor([[True, True]])
    by_last = attention_rollout(last[None], positions, valid)
    assert by_last.tolist() == [[0.875, 1.375, 0.75]]
    by_both = attention_rollout(torch.stack([first, last]), positions, valid)
    assert by_both.tolist() == [[0.65625, 1.671875, 0.671875]]


@given(rollouts(), st.sampled_from([torch.float64, torch.float32]))
def test_rollout_neither_makes_nor_loses_influence(drawn, dtype):
    maps, positions, valid = drawn
    influence = attention_rollout(maps.to(dtype), positions, valid)
    T = torch.full((maps.shape[1],), float(maps.shape[3]), dtype=influence.dtype)
    torch.testing.assert_close(influence.sum(dim=1), T, rtol=1e-5, atol=1e-5)
    assert influence.dtype == dtype


@given(scores_and_candidates(), SHARES | st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@example(([[0.0, 0.0, 0.0]], [[False, True, True]]), 0.5)  # nothing to share: the first
def test_nucleus_is_the_smallest_set_whose_share_exceeds_p(drawn, p):
    scores, among = drawn
    chosen = nucleus(torch.tensor(scores, dtype=torch.float64), p, torch.tensor(among))
    for row, row_scores, row_among in zip(chosen.tolist(), scores, among):
        assert {i for i, inside in enumerate(row) if inside} == oracle.nucleus(
            row_scores, p, row_among
        )


@given(scores_and_candidates())
def test_nucleus_of_zero_is_one_and_of_one_is_all(drawn):
    scores, among = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    assert torch.equal(nucleus(scores, 0, among).sum(dim=1), among.any(dim=1).long())
    assert torch.equal(nucleus(scores, 1, among), among)


@given(scores_and_candidates(), SHARES, SHARES)
def test_nucleus_grows_with_p(drawn, p, other):
    scores, among = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    smaller, larger = nucleus(scores, min(p, other), among), nucleus(scores, max(p, other), among)
    assert not (smaller & ~larger).any()


@given(scores_and_candidates(), st.data())
def test_highest_is_the_head_of_the_sorted_candidates(drawn, data):
    scores, among = drawn
    each = data.draw(st.lists(st.integers(0, 14), min_size=len(scores), max_size=len(scores)))
    chosen = highest(torch.tensor(scores), torch.tensor(among), torch.tensor(each)[:, None])
    for row, row_scores, row_among, n in zip(chosen.tolist(), scores, among, each):
        ranked = sorted(
            (i for i, a in enumerate(row_among) if a), key=lambda i: (-row_scores[i], i)
        )
        assert [i for i, inside in enumerate(row) if inside] == sorted(ranked[:n])


@given(bool_rows(), st.data())
def test_pack_lists_the_chosen_the_masked_first_and_repeats_only_to_fill(chosen, data):
    chosen = torch.tensor(chosen)
    chosen[:, data.draw(st.integers(0, chosen.shape[1] - 1))] = True
    masked = chosen & torch.tensor(data.draw(bool_rows(*chosen.shape)))
    Q = int(chosen.sum(dim=1).max())
    positions, valid = pack(chosen, masked, Q)
    for b in range(len(chosen)):
        first = [i for i in range(chosen.shape[1]) if masked[b, i]]
        then = [i for i in range(chosen.shape[1]) if chosen[b, i] and not masked[b, i]]
        listed, n = first + then, len(first + then)
        assert positions[b].tolist() == listed + listed[:1] * (Q - n)
        assert valid[b].tolist() == [True] * n + [False] * (Q - n)


@given(bool_rows(), st.data())
def test_unpack_puts_back_what_pack_put_first(chosen, data):
    chosen = torch.tensor(chosen)
    predicted = chosen & torch.tensor(data.draw(bool_rows(*chosen.shape)))
    predicted[:, data.draw(st.integers(0, chosen.shape[1] - 1))] = True
    chosen = chosen | predicted
    R = int(predicted.sum(dim=1).max())
    positions, _ = pack(chosen, predicted, int(chosen.sum(dim=1).max()))
    place = torch.arange(chosen.shape[1]).expand_as(chosen)
    assert torch.equal(unpack(positions[:, :R], predicted)[predicted], place[predicted])


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
