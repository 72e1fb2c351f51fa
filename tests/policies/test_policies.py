"""Policies with a memory, and controls, against their rules, on a few steps.

That they keep the contract is tried with that of all others: they are in strategies.POLICIES.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from d2cache import WORLDS, D2Cache, SlidingWindow, State, decode, generate, nucleus
from model import KVCache

import board
import controls
from entropy_cache import EntropyCache
from oldest_first import OldestFirst
from strategies import ModelSpec
from vicinity import Vicinity
from window_diffusion import WindowDiffusion

SPEC = ModelSpec(2, 1, 2, 4, vocab_size=12, seed=3)


def chosen_in_each_step(policy, gen_length, block_length):
    """Positions that each step recomputes, after a prompt of three tokens, 0 to 2."""
    prompt = torch.tensor([[1, 2, 3]])
    arguments = {"gen_length": gen_length, "block_length": block_length, "policy": policy}
    steps = decode(SPEC.build(), prompt, **arguments)
    return [state.chosen[0].nonzero()[:, 0].tolist() for state in steps]


def state(decoded_at, recomputed_at=None, confidence=None, influence=None):
    """After step 5: a prompt of two, then a block decoded in these steps; 0 is masked."""
    decoded_at = torch.tensor([[0, 0, *decoded_at]])
    response = torch.arange(decoded_at.shape[1])[None] >= 2
    ones = torch.ones(decoded_at.shape)
    return State(
        tokens=decoded_at,
        known=(decoded_at > 0) | ~response,
        decoded_at=decoded_at,
        recomputed_at=torch.tensor([recomputed_at or [0] * decoded_at.shape[1]]),
        confidence=ones if confidence is None else torch.tensor([confidence]),
        influence=ones if influence is None else torch.tensor([influence]),
        density=ones,
        block=response,
        step=5,
    )


def chosen(policy, state):
    return policy.choose(state)[0].nonzero()[:, 0].tolist()


def test_vicinity_recomputes_the_block_and_its_margins_after_the_first_steps():
    """Blocks 3-6, 7-10, 11-14. Steps 1 and 2 are the warm-up, 5 and 9 the first of their blocks."""
    every = list(range(15))
    first, second, third = list(range(1, 9)), list(range(5, 13)), list(range(9, 15))
    expected = [every, every, first, first, every, *[second] * 3, every, *[third] * 3]
    assert chosen_in_each_step(Vicinity(margin=2, warmup=2), 12, 4) == expected


def test_window_diffusion_recomputes_the_window_and_what_was_decoded_since_the_refresh():
    """Blocks of one: step s decodes position s + 2. Steps 1 and 5 refresh; what they decode, 3 and
    7, is recomputed in the next step alone."""
    every = list(range(11))
    rows = [every, [3, 4, 5], [4, 5, 6], [4, 5, 6, 7], every, [7, 8, 9], [8, 9, 10], [8, 9, 10]]
    assert chosen_in_each_step(WindowDiffusion(n=4, active=2), 8, 1) == rows


def test_entropy_cache_recomputes_everything_only_after_an_unsure_step():
    """Positions 3 and 6 are decoded by step 5, with confidence .9 and .5: -log is .105 and .693."""
    confidence = [1.0, 1.0, 0.1, 0.9, 0.1, 0.1, 0.5, 0.1]
    state_5 = state([2, 5, 0, 4, 5, 0], confidence=confidence)
    assert chosen(EntropyCache(threshold=0.69, k=3), state_5) == list(range(8))
    assert chosen(EntropyCache(threshold=0.70, k=3), state_5) == [3, 4, 5, 6, 7]
    assert chosen(EntropyCache(threshold=0.70, k=4), state_5) == [2, 3, 4, 5, 6, 7]
    assert chosen(EntropyCache(threshold=0.70, k=1), state_5) == [3, 4, 6, 7]


def test_oldest_first_recomputes_as_many_as_the_nucleus_of_those_longest_ago():
    """Of the known 0 to 3, last recomputed in steps 4 2 1 5, the nucleus would be 3 and 0."""
    influence = [3.0, 0.5, 0.5, 4.0, 9.0, 9.0]
    state_5 = state([1, 4, 0, 0], recomputed_at=[4, 2, 1, 5, 5, 5], influence=influence)
    policy = OldestFirst(k=1, p=0.6)
    assert nucleus(state_5.influence, 0.6, state_5.known).tolist()[0][:4] == [
        True,
        False,
        False,
        True,
    ]
    assert chosen(policy, state_5) == [1, 2, 4]


# ---- Controls


def half():
    """A state half-way through a decode of two sequences."""
    prompt = torch.ones(2, 20, dtype=torch.long)
    return list(decode(SPEC.build(), prompt, 20, policy=D2Cache(4)))[9]


SETTINGS = {"k": 4, "p": 0.5}
OURS = D2Cache(**SETTINGS)


def test_controls_of_stage_1_take_as_many_and_leave_stage_2_alone():
    state = half()
    torch.manual_seed(0)
    random = controls.RandomStage1(**SETTINGS)
    window = controls.WindowStage1(**SETTINGS)
    first = random.about_to_be_decoded(state)
    assert not (first & ~state.masked).any() and first.sum(dim=1).tolist() == [4, 4]
    assert not torch.equal(first, random.about_to_be_decoded(state))
    width_4 = SlidingWindow(4).choose(state)
    assert torch.equal(window.about_to_be_decoded(state) | state.fresh, width_4)
    for control in (random, window):
        assert torch.equal(control.attended(state), OURS.attended(state))


def test_controls_of_stage_2_take_as_many_or_none_and_leave_stage_1_alone():
    state = half()
    torch.manual_seed(0)
    random = controls.RandomStage2(**SETTINGS)
    attended = random.attended(state)
    assert not (attended & ~state.known).any()
    assert torch.equal(attended.sum(dim=1), OURS.attended(state).sum(dim=1))
    assert not torch.equal(attended, random.attended(state))
    first = OURS.about_to_be_decoded(state)
    assert torch.equal(random.about_to_be_decoded(state), first)
    without = controls.WithoutStage2(**SETTINGS)
    assert torch.equal(without.choose(state), first | state.fresh)


def test_all_but_the_prompt_reads_the_prompt_once():
    """Decoded tokens are known too, and stay in."""
    prompt, response = [0, 1, 2], [3, 4, 5, 6]
    policy = controls.AllButThePrompt(**SETTINGS)
    assert chosen_in_each_step(policy, 4, None) == [prompt + response, *[response] * 3]


def test_the_last_layers_influence_is_what_its_recomputed_rows_attend_to():
    """Rows 4 and 6 of the last layer, of a canvas that nothing else has changed."""
    state = half()
    model = SPEC.build()
    cache = KVCache(model.config, *state.tokens.shape, "cpu", model.wte.weight.dtype)
    model.hidden_states(state.tokens, cache=cache)
    positions = torch.tensor([[4, 6, 4]] * 2)  # the third row is a repeat
    valid = torch.tensor([[True, True, False]] * 2)
    policy = controls.LastLayer(**SETTINGS)
    _, influence = policy.recompute(model, cache, state, positions, valid, 1)
    _, maps = model.hidden_states(state.tokens, return_attention=True)
    torch.testing.assert_close(influence, maps[-1][:, [4, 6]].sum(dim=1))


def test_the_last_layers_pass_predicts_what_any_other_does():
    """Of Dream too, whose row before makes the prediction."""
    model = replace(SPEC, dream=True).build()
    prompt = torch.tensor([[1, 2, 3]])
    whole = controls.LastLayer(k=12, p=1)
    assert torch.equal(generate(model, prompt, 8, policy=whole), generate(model, prompt, 8))


# ---- The board


def test_the_board_ranks_every_policy_and_ones_own(monkeypatch, capsys):
    """On one problem of one world, to be quick."""
    monkeypatch.setattr(board, "WORLDS", {"diary": WORLDS["diary"]})
    own = f"{Path(board.__file__).with_name('oldest_first.py')}:OldestFirst(k=5)"
    arguments = ["board.py", "--problems", "1", "--fresh", "3", "--policy", own]
    monkeypatch.setattr(sys, "argv", arguments)
    board.main()
    titles, *rows = capsys.readouterr().out.splitlines()
    assert titles.endswith("same x reused")
    ranks = [float(row.split()[-1].rstrip("%")) for row in rows]
    assert ranks == sorted(ranks, reverse=True)
    assert sum(row.startswith(own) for row in rows) == 2  # by prior and in blocks
    assert len(rows) == len(board.plan(48, {own: None})) - 2  # but the exact ones


def test_the_mean_of_the_worlds_counts_and_exact_decoding_has_no_rank():
    def row(policy, *cells):
        columns = ("policy", "order", "exact match", "same text", "reused", "same x reused")
        return dict(zip(columns, (policy, "prior", *cells)))

    exact = row("vanilla", 1.0, None, 0.0, None)
    tables = {
        "tiny": [exact, row("a", 1.0, 0.5, 0.8, 0.4), row("b", 0.5, 1.0, 0.5, 0.5)],
        "diary": [exact, row("a", 0.0, 1.0, 0.5, 0.5), row("b", 0.5, 0.25, 0.4, 0.1)],
    }
    first, second = board.side_by_side(tables)
    assert (first["policy"], first["same x reused"]) == ("a", 0.45)
    assert (second["policy"], second["same x reused"]) == ("b", 0.3)
    assert (first["tiny solved"], first["diary same"], first["diary reused"]) == (1.0, 1.0, 0.5)
