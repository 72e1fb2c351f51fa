"""`generate` with every policy against vanilla decoding and against the oracle's decoder."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from d2cache import (
    D2Cache,
    DelayedCache,
    DualCache,
    PrefixCache,
    RecomputeAll,
    SlidingWindow,
    State,
    certainty_density,
    check_choice,
    copy_of,
    decode,
    generate,
    paper_sigma,
)
from hypothesis import given
from hypothesis import strategies as st
from model import KVCache

import oracle
from strategies import POLICIES, ModelSpec, decodes, left_padded, model_specs, token_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)
SPEC = ModelSpec(
    n_layers=2, n_kv_heads=2, queries_per_kv_head=2, half_head_dim=4, vocab_size=12, seed=3
)


def prompts(rows):
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), -1)


def states_of(model, drawn, policy, **arguments):
    """The state after each step of a decode."""
    arguments = drawn.arguments() | {"policy": policy} | arguments
    return list(decode(model, **arguments))


@given(model_specs(DTYPES), st.data(), st.sampled_from([None, 0.5]), st.sampled_from([0.0, 0.7]))
def test_d2cache_with_full_refresh_is_vanilla_bit_for_bit(spec, data, sigma, temperature):
    """The headline: k >= T and p = 1 change no bit of any token or confidence, at any step."""
    model = spec.build()
    drawn = data.draw(decodes(model.config))
    T = drawn.prompt_length + drawn.gen_length

    def states(policy):
        generator = torch.Generator().manual_seed(5)
        return states_of(model, drawn, policy, temperature=temperature, generator=generator)

    refreshed, vanilla = states(D2Cache(k=T, p=1, sigma=sigma)), states(RecomputeAll())
    for ours, theirs in zip(refreshed, vanilla, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.confidence, theirs.confidence)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_every_policy_decodes_like_the_oracle_with_the_same_policy(name, spec, data):
    """The oracle knows no padding: a padded prompt decodes as it does alone."""
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config, most_sequences=2))
    states = states_of(model, drawn, policy)
    for b, prompt in enumerate(drawn.prompts):
        expected, history = oracle.decode(model, State, prompt, policy=policy, **drawn.settings())
        assert states[-1].tokens[b, -len(expected) :].tolist() == expected
        if len(drawn.prompts) == 1:
            for state, (confidence, influence) in zip(states, history, strict=True):
                assert_close(state.confidence[b].tolist(), confidence)
                if policy.uses_attention:
                    assert_close(state.influence[b].tolist(), influence)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data(), stop_at_eos=st.booleans())
def test_a_sequence_decodes_the_same_alone_as_in_company(name, spec, data, stop_at_eos):
    """Every step of it, and once it is finished nothing changes any more."""
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config, most_sequences=4))
    together = states_of(model, drawn, policy, stop_at_eos=stop_at_eos)
    for b, prompt in enumerate(drawn.prompts):
        just_one = replace(drawn, prompts=[prompt])
        alone = states_of(model, just_one, policy, stop_at_eos=stop_at_eos)
        own = slice(-alone[0].tokens.shape[1], None)
        for ours, theirs in zip(together, alone):
            assert torch.equal(ours.chosen[b, own], theirs.chosen[0])
            assert torch.equal(ours.tokens[b, own], theirs.tokens[0])
            assert_close(ours.confidence[b, own], theirs.confidence[0])
            if policy.uses_attention:
                assert_close(ours.influence[b, own], theirs.influence[0])
        for finished in together[len(alone) :]:
            assert not (finished.chosen | finished.fresh | finished.masked)[b].any()
            for field in ["tokens", "known", "confidence"]:
                before = getattr(together[len(alone) - 1], field)[b]
                assert torch.equal(getattr(finished, field)[b], before)


@pytest.mark.parametrize("seed", range(10))
def test_in_single_precision_too_company_changes_no_token(seed):
    """In bfloat16 it may: round-off then decides between tokens that are almost as likely."""
    model = replace(SPEC, seed=seed, dtype=torch.float32).build()
    arguments = {"policy": D2Cache(k=4, p=0.2), "sigma": 4.0}
    rows = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11]]
    prompt, mask = left_padded(rows)
    together = generate(model, prompt, 16, prompt_mask=mask, **arguments)
    for b, row in enumerate(rows):
        alone = generate(model, prompts([row]), 16, **arguments)
        assert torch.equal(alone[0], together[b, -alone.shape[1] :])


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_padding_is_never_chosen_nor_counted_nor_changed(name, spec, data):
    """Its tokens are arbitrary: others leave every number of every step as it was."""
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config))
    states = states_of(model, drawn, policy)
    P, arguments = drawn.prompt_length, drawn.arguments()
    padding = arguments["prompt_mask"] == 0
    other = arguments["prompt"].where(~padding, 1)
    tokens = states[-1].tokens[:, :P]
    assert torch.equal(tokens[padding], arguments["prompt"][padding])
    other_states = states_of(model, drawn, policy, prompt=other)
    for state, other_state in zip(states, other_states, strict=True):
        assert not (state.chosen | state.known | state.masked)[:, :P][padding].any()
        assert torch.equal(state.confidence, other_state.confidence)
        assert state.confidence.isfinite().all()
        if policy.uses_attention:
            assert torch.equal(state.influence, other_state.influence)
            assert state.influence.isfinite().all()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3)])
def test_without_padding_attention_gets_no_mask(mask):
    """The fastest kernels take none."""
    states = decode(SPEC.build(), prompts([[1, 2, 3]] * 2), 2, prompt_mask=mask)
    assert all(state.padding is None for state in states)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_stopping_at_eos_changes_only_what_follows_it(name, spec, data):
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config))
    eos, P = model.config.eos_token_id, drawn.prompt_length
    states = states_of(model, drawn, policy)
    tokens = states[-1].tokens
    stopped = states_of(model, drawn, policy, stop_at_eos=True)
    masked = torch.arange(tokens.shape[1]).expand_as(tokens) >= P
    for state in stopped:  # what was masked and is known now is fresh
        assert torch.equal(masked & ~state.masked, state.fresh)
        masked = state.masked
    for state in stopped:  # nothing is masked behind an EOS that nothing masked precedes
        for row, masked in zip(state.tokens.tolist(), state.masked.tolist()):
            assert True not in masked or eos not in row[P : masked.index(True)]
    expected = [
        row[: row.index(eos, P)] + [eos] * (len(row) - row.index(eos, P)) if eos in row[P:] else row
        for row in tokens.tolist()
    ]
    assert stopped[-1].tokens.tolist() == expected
    assert len(stopped) <= len(states)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_a_step_commits_only_recomputed_masked_positions_of_the_block(name, spec, data):
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config))
    P, G = drawn.prompt_length, drawn.gen_length
    length = drawn.block_length or G
    masked = torch.arange(P + G).expand(len(drawn.prompts), -1) >= P
    for number, state in enumerate(states_of(model, drawn, policy), 1):
        commit = masked & ~state.masked
        assert not (state.masked & ~masked).any()
        assert not (commit & ~state.chosen).any()
        for b, row in enumerate(commit.tolist()):
            left = masked[b].nonzero()[:, 0].tolist()
            blocks = {(i - P) // length for i, committed in enumerate(row) if committed}
            assert blocks == ({(left[0] - P) // length} if left else set())
        threshold = drawn.threshold if drawn.threshold is not None else 2
        below = commit & (state.confidence < threshold)
        assert below.sum(dim=1).max() <= drawn.tokens_per_step
        assert state.step == number
        masked = state.masked
    assert not masked.any()


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_prompts_are_left_alone_and_mask_is_never_predicted(name, spec, data):
    """Also where a prompt holds [MASK]: known by place, not by token id."""
    model, policy = spec.build(), data.draw(POLICIES[name])
    mask, head = model.config.mask_token_id, (model.ff_out or model.wte).weight
    model.ln_f.weight.mul_(3)
    head[mask] = 2 * head[(mask + 1) % model.config.vocab_size]
    drawn = data.draw(decodes(model.config))
    tokens, arguments = generate(model, policy=policy, **drawn.arguments()), drawn.arguments()
    P = drawn.prompt_length
    assert torch.equal(tokens[:, :P], arguments["prompt"])
    assert not (tokens[:, P:] == mask).any()


def test_tokens_are_drawn_with_the_generator_at_the_temperature():
    def sample(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        settings = {"temperature": temperature, "generator": generator}
        return generate(SPEC.build(), prompts([[1, 2, 3]]), 16, **settings).tolist()

    greedy = sample(0, 0.0)
    assert sample(0, 1e-6) == greedy != sample(0, 3.0) == sample(0, 3.0) != sample(1, 3.0)


@pytest.mark.parametrize(
    "policy", [RecomputeAll(), PrefixCache(), DualCache(), DelayedCache(), SlidingWindow()]
)
def test_the_rollout_is_left_out_where_no_policy_uses_it(policy, monkeypatch):
    monkeypatch.setattr("d2cache.attention_rollout", None)
    for state in decode(SPEC.build(), prompts([[1, 2, 3]]), 8, 4, policy=policy):
        assert state.influence is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_step_whose_logits_are_not_finite_is_refused(value):
    """They once decoded to token 0, in silence."""
    model = SPEC.build()
    steps = decode(model, prompts([[1, 2, 3], [4, 5, 6]]), 8, policy=D2Cache(k=3))
    assert next(steps).step == 1 and next(steps).step == 2
    model.ff_out.weight[7] = value
    with pytest.raises(ValueError, match="the logits of step 3 are not finite"):
        next(steps)
    with pytest.raises(ValueError, match="the logits of step 1 are not finite"):
        next(decode(model, prompts([[1, 2, 3]]), 8))


def test_numbers_too_large_for_half_precision_are_refused():
    model = SPEC.build()
    model.ff_out.weight.mul_(1e5)
    generate(model, prompts([[1, 2, 3]]), 4)
    with pytest.raises(ValueError, match="not finite: .* too large for their dtype"):
        generate(model.half(), prompts([[1, 2, 3]]), 4)


def test_a_response_ends_at_any_of_the_end_tokens_and_eos_follows():
    model = SPEC.build()
    prompt = prompts([[1, 2, 3]])
    response = generate(model, prompt, 16)[0, 3:].tolist()
    end = next(id for id in response if response.index(id) >= 2)
    eos = next(id for id in range(12) if id not in response)
    model.config = replace(model.config, eos_token_id=eos, other_end_ids=(end,))
    stopped = generate(model, prompt, 16, stop_at_eos=True)[0, 3:].tolist()
    place = response.index(end)
    assert stopped == response[: place + 1] + [eos] * (15 - place)


@st.composite
def states(draw):
    """Any canvas with an unfinished block in every sequence, reachable or not."""
    P, block_length, blocks = (
        draw(st.integers(0, 5)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
    )
    B, T = draw(st.integers(1, 3)), P + block_length * blocks
    start = P + block_length * draw(st.integers(0, blocks - 1))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    known = torch.rand(B, T, generator=random) < 0.5
    known[:, :P] = True
    known[:, start + draw(st.integers(0, block_length - 1))] = False
    decoded_at = torch.randint(1, 4, (B, T), generator=random) * known
    decoded_at[:, :P] = 0
    confidence, influence = torch.rand(2, B, T, generator=random, dtype=torch.float64)
    position = torch.arange(T).expand(B, T)
    return State(
        tokens=torch.zeros(B, T, dtype=torch.long),
        known=known,
        decoded_at=decoded_at,
        recomputed_at=torch.randint(1, 4, (B, T), generator=random),
        confidence=confidence,
        influence=influence,
        density=certainty_density(known, draw(st.sampled_from([0.5, 4.0])), torch.float64),
        block=(position >= start) & (position < start + block_length),
        step=3,
    )


@EVERY_POLICY
@given(state=states(), data=st.data())
def test_policies_keep_their_contract_on_any_state(name, state, data):
    """Asked again and again about the same state, it answers the same."""
    policy = data.draw(POLICIES[name])
    if not policy.uses_attention:  # who reads it all the same is told
        state = replace(state, influence=None)
    chosen = policy.choose(copy_of(state))
    check_choice(policy, chosen, state)
    advances = (chosen & ~state.known & state.block).any(dim=1).all()
    assert advances, f"{policy} chose no masked position of an unfinished block"
    for _ in range(20):
        again = policy.choose(copy_of(state))
        assert torch.equal(chosen, again), f"{policy} {CHANGES_ITS_MIND}"


CHANGES_ITS_MIND = (
    "answers otherwise when it is asked again about the same state: its answer should depend on "
    "the state alone, where state.step counts the steps"
)


class Writes(DualCache):
    """Writes into every tensor of the state that it is shown."""

    def choose(self, state):
        chosen = super().choose(state)
        for name, value in vars(state).items():
            if torch.is_tensor(value):
                value.fill_(1)
        return chosen


@given(spec=model_specs(), data=st.data())
def test_a_policy_that_writes_into_its_state_changes_nothing_else(spec, data):
    """It once decoded blocks out of order."""
    model = spec.build()
    drawn = data.draw(decodes(model.config))
    for ours, theirs in zip(
        states_of(model, drawn, Writes()), states_of(model, drawn, DualCache()), strict=True
    ):
        for name, value in vars(theirs).items():
            if torch.is_tensor(value):
                assert torch.equal(getattr(ours, name), value)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_when_a_position_was_decoded_and_recomputed_is_told(name, spec, data):
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config))
    masked = None
    for state in states_of(model, drawn, policy):
        if masked is None:
            masked = torch.zeros_like(state.known)
            masked[:, drawn.prompt_length :] = True
            decoded_at = recomputed_at = torch.zeros_like(state.decoded_at)
        decoded_at = decoded_at.where(state.masked | ~masked, state.step)
        recomputed_at = recomputed_at.where(~state.chosen, state.step)
        assert torch.equal(state.decoded_at, decoded_at)
        assert torch.equal(state.recomputed_at, recomputed_at)
        assert torch.equal(state.fresh, masked & ~state.masked)
        masked = state.masked


@given(
    states(),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    st.sampled_from([None, 0.5, 4.0]),
)
def test_d2cache_chooses_candidates_nucleus_and_fresh_positions(state, k, p, sigma):
    """With a sigma of its own it has a density of its own, else the one of the state."""
    chosen = D2Cache(k, p, sigma).choose(state)
    for b, known in enumerate(state.known.tolist()):
        density = state.density[b].tolist() if sigma is None else oracle.density(known, sigma)
        prior = [c * d for c, d in zip(state.confidence[b].tolist(), density)]
        outside = lambda i: not state.block[b, i]  # noqa: E731
        masked = [i for i in range(len(known)) if not known[i]]
        candidates = sorted(masked, key=lambda i: (outside(i), -prior[i], i))[:k]
        attended = oracle.nucleus(state.influence[b].tolist(), p, known)
        fresh = [i for i in range(len(known)) if state.fresh[b, i]]
        assert {i for i in range(len(known)) if chosen[b, i]} == {*candidates, *attended, *fresh}


@given(states(), st.integers(1, 6))
def test_sliding_window_chooses_the_first_masked_positions_of_the_block(state, width):
    chosen = SlidingWindow(width).choose(state)
    for b, row in enumerate(chosen.tolist()):
        to_decode = [i for i in range(len(row)) if state.block[b, i] and not state.known[b, i]]
        fresh = [i for i in range(len(row)) if state.fresh[b, i]]
        assert {i for i, c in enumerate(row) if c} == {*to_decode[:width], *fresh}


def test_a_window_of_two_recomputes_two_masked_positions_and_the_fresh_one():
    steps = decode(SPEC.build(), prompts([[1, 2, 3]]), 8, policy=SlidingWindow(2))
    assert [state.chosen.sum().item() for state in steps] == [11] + [3] * 6 + [2]


@pytest.mark.parametrize(
    "tokens_per_step, full", [(1, {1, 2, 4, 7, 9, 10, 12, 15}), (2, {1, 2, 3, 4, 5, 6, 7, 8})]
)
def test_delayed_cache_refreshes_in_two_steps_of_a_block_and_after_every_interval(
    tokens_per_step, full
):
    settings = {"tokens_per_step": tokens_per_step, "policy": DelayedCache(3)}
    steps = decode(SPEC.build(), prompts([[1, 2, 3]]), 16, 8, **settings)
    assert {state.step for state in steps if state.chosen.all()} == full


@pytest.mark.parametrize(
    "policy",
    [RecomputeAll(), PrefixCache(), DualCache(), DelayedCache(), SlidingWindow(), D2Cache()],
)
def test_policies_print_as_they_are_made_and_cannot_be_changed(policy):
    assert eval(repr(policy)) == policy
    for name in ("uses_attention", *vars(policy)):
        with pytest.raises(FrozenInstanceError):
            setattr(policy, name, 1)


def test_policies_are_the_papers_unless_told_otherwise():
    assert D2Cache() == D2Cache(k=32, p=0.1) and paper_sigma(256) == 10
    assert DelayedCache() == DelayedCache(interval=8)
    assert SlidingWindow() == SlidingWindow(width=4)


def test_a_state_cannot_be_changed():
    state = next(decode(SPEC.build(), prompts([[1, 2, 3]]), 4))
    with pytest.raises(FrozenInstanceError):
        state.step = 7


class Lazy:
    """A policy that breaks its contract."""

    uses_attention = False

    def __init__(self, choose):
        self.choose = choose


class Asked(DualCache):
    """Takes down every state it is asked about."""

    def __init__(self):
        self.states = []

    def choose(self, state):
        self.states.append(state)
        return super().choose(state)


@pytest.mark.parametrize(
    "settings", [{}, {"tokens_per_step": 2}, {"threshold": 0.5}, {"stop_at_eos": True}]
)
@given(spec=model_specs(), data=st.data())
def test_a_policy_is_asked_once_about_every_state_that_is_seen(settings, spec, data):
    model, policy = spec.build(), Asked()
    prompt = torch.tensor(data.draw(token_rows(model.config, 2, 3)))
    seen = list(decode(model, prompt, 12, 4, policy=policy, **settings))
    assert [state.step for state in policy.states] == [state.step for state in seen]
    for asked, state in zip(policy.states, seen):
        assert torch.equal(asked.tokens, state.tokens)
        assert torch.equal(asked.block.any(dim=1), state.masked.any(dim=1))


@pytest.mark.parametrize("policy", [RecomputeAll(), DualCache(), D2Cache(k=5)])
@pytest.mark.parametrize(
    "arguments, order",
    [
        ({}, {"sigma": 0.625}),
        ({"block_length": 8}, {"block_length": 8, "sigma": None}),
        ({"sigma": None}, {"block_length": 16, "sigma": "auto"}),
        ({"block_length": 8, "sigma": 0.625}, {"block_length": 8, "sigma": 0.625}),
    ],
)
def test_the_order_is_by_prior_without_blocks_and_by_confidence_in_blocks(policy, arguments, order):
    """Leaving sigma out once meant by confidence, and cost half of the score in silence."""
    prompt = prompts([[1, 2, 3]])
    left_out = [
        state.fresh for state in decode(SPEC.build(), prompt, 16, policy=policy, **arguments)
    ]
    said = [state.fresh for state in decode(SPEC.build(), prompt, 16, policy=policy, **order)]
    assert torch.equal(torch.stack(left_out), torch.stack(said))


def test_a_cache_that_is_used_again_holds_nothing_of_an_earlier_decode():
    """Not even NaN in padding, which attention would multiply by 0."""
    model = SPEC.build()
    prompt, mask = left_padded([[1, 2, 3, 4], [5, 6]])
    arguments = {"prompt_mask": mask, "policy": D2Cache(k=3)}
    expected = generate(model, prompt, 8, **arguments)
    cache = KVCache(model.config, 2, 12, "cpu", torch.float64)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    assert torch.equal(generate(model, prompt, 8, cache=cache, **arguments), expected)
    assert cache.k.abs().sum() > 0
    with pytest.raises(ValueError, match="cache is for"):
        generate(model, prompt, 4, cache=cache, **arguments)


def test_generate_works_under_autocast():
    """The cache keeps its dtype, whatever the layers compute in."""
    model = replace(SPEC, dtype=torch.float32).build()
    plain = generate(model, prompts([[1, 2, 3]]), 8, policy=D2Cache(k=3))
    with torch.autocast("cpu", torch.bfloat16):
        cast = generate(model, prompts([[1, 2, 3]]), 8, policy=D2Cache(k=3))
    assert cast.shape == plain.shape and not (cast == SPEC.config().mask_token_id).any()


@pytest.mark.parametrize(
    "settings", [{}, {"tokens_per_step": 2}, {"threshold": 0.5}, {"stop_at_eos": True}]
)
@pytest.mark.parametrize("policy", [RecomputeAll(), DualCache(), D2Cache(k=3)])
def test_a_step_transfers_to_the_host_once(policy, settings, monkeypatch):
    """Every other way from a tensor to Python is shut; one more transfer tells of the end."""
    model, transfers = replace(SPEC, dream=True).build(), []
    tolist = torch.Tensor.tolist
    steps = decode(model, prompts([[1, 2, 3], [4, 5, 6]]), 12, 4, policy=policy, **settings)
    states = [next(steps)]  # the prompt is checked before
    with monkeypatch.context() as shut:
        for name in ("item", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero"):
            shut.setattr(torch.Tensor, name, None, raising=False)
        shut.setattr(torch.Tensor, "tolist", lambda x: transfers.append(x) or tolist(x))
        states += steps
    assert len(transfers) == len(states) - 1
    assert not states[-1].masked.any()


BREACHES = {
    "nothing": lambda state: torch.zeros_like(state.known),
    "known positions only": lambda state: state.known,
    "nothing for one sequence": lambda state: (
        torch.ones_like(state.known) & torch.tensor([[True], [False]])
    ),
    "masked positions of another block": lambda state: (
        torch.arange(7) >= 5 | torch.zeros_like(state.known)
    ),
    "positions instead of booleans": lambda state: torch.tensor([[3], [3]]),
    "a list": lambda state: [3, 4],
    "one sequence only": lambda state: torch.ones_like(state.known)[:1],
    "on another device": lambda state: torch.ones_like(state.known, device="meta"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_policy_that_breaks_its_contract_is_named(breach):
    with pytest.raises(ValueError, match="policy Lazy chose"):
        generate(
            SPEC.build(), prompts([[1, 2, 3]] * 2), 4, block_length=2, policy=Lazy(BREACHES[breach])
        )


BAD_ARGUMENTS = [
    (dict(gen_length=0), "gen_length is 0"),
    (dict(gen_length=-4), "gen_length is -4"),
    (dict(tokens_per_step=0), "tokens_per_step is 0"),
    (dict(block_length=3), "block_length is 3, should divide gen_length 4"),
    (dict(block_length=0), "block_length is 0"),
    (dict(block_length=8), "block_length is 8"),
    (dict(sigma=0), "sigma is 0"),
    (dict(sigma=-1.0), "sigma is -1.0"),
    (dict(sigma=float("nan")), "sigma is nan"),
    (dict(threshold=-0.1), "threshold is -0.1, should be from 0 to 1"),
    (dict(threshold=1.5), "threshold is 1.5"),
    (dict(threshold=float("nan")), "threshold is nan"),
    (dict(temperature=-1.0), "temperature is -1.0"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(temperature=float("inf")), "temperature is inf"),
    (
        dict(temperature=0.5),
        "generator is None at temperature 0.5, should be a torch.Generator of device 'cpu'",
    ),
    (dict(prompt_mask=torch.ones(1, 3)), r"prompt_mask is a tensor \(1, 3\).* should be \(1, 2\)"),
    (dict(prompt_mask=torch.ones(2)), r"prompt_mask is a tensor \(2,\)"),
    (
        dict(prompt_mask=torch.tensor([[1, 0]])),
        r"should be \(1, 2\), in each row zeros \(padding\), then",
    ),
    (dict(prompt_mask=torch.tensor([[0, 0]])), "then at least one 1"),
    (dict(prompt=torch.tensor([[1, 2, 3, 4]]), prompt_mask=torch.tensor([[0, 1, 0, 1]])), "zeros"),
    (dict(policy=DualCache), "should be an object like DualCache()"),
    (dict(policy="dual"), "policy is 'dual'"),
    (dict(gen_length=4.0), "gen_length is 4.0, should be a whole number"),
    (dict(gen_length=True), "gen_length is True"),
    (dict(gen_length=torch.tensor(4)), r"gen_length is tensor\(4\)"),
    (dict(tokens_per_step=True), "tokens_per_step is True"),
    (dict(block_length=2.0), "block_length is 2.0"),
    (dict(sigma="paper"), "sigma is 'paper', should be a number"),
    (dict(sigma=1e-50), "sigma is 1e-50, should be .* at least 0.01"),
    (dict(tokens_per_step=1.5), "tokens_per_step is 1.5"),
    (dict(prompt=torch.tensor([1, 2])), r"prompt is a tensor \(2,\)"),
    (dict(prompt=torch.tensor([[1.0, 2.0]])), "torch.float32"),
    (dict(prompt=torch.tensor([[True]])), "torch.bool"),
    (dict(prompt=torch.zeros(0, 3, dtype=torch.long)), r"\(0, 3\)"),
    (dict(prompt=torch.tensor([[1, 12]])), r"ids \[12\], should be 0 to 11"),
    (dict(prompt=torch.tensor([[-1, 2]])), r"ids \[-1\]"),
    (
        dict(prompt=torch.ones(1, 61, dtype=torch.long)),
        "gen_length is 4 after a prompt of 61, should be at most 3",
    ),
]


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS)
def test_bad_arguments_are_named_with_their_value(arguments, message):
    good = dict(prompt=torch.tensor([[1, 2]]), gen_length=4)
    model = SPEC.build()
    model.hidden_states = None  # nothing is computed before all is checked
    with pytest.raises(ValueError, match=message):
        generate(model, **(good | arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(k=0), "k is 0"),
        (dict(k=2.5), "k is 2.5, should be a whole number"),
        (dict(p=-0.1), "p is -0.1, should be from 0 to 1"),
        (dict(p=1.5), "p is 1.5"),
        (dict(p=float("nan")), "p is nan"),
        (dict(sigma=0.0), "sigma is 0.0, should be .* at least 0.01"),
        (dict(sigma=1e-50), "sigma is 1e-50"),
        (dict(sigma=float("nan")), "sigma is nan"),
    ],
)
def test_bad_settings_of_d2cache_are_named_with_their_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        D2Cache(**arguments)


@pytest.mark.parametrize("policy, name", [(SlidingWindow, "width"), (DelayedCache, "interval")])
def test_a_window_and_an_interval_hold_at_least_one_position(policy, name):
    with pytest.raises(ValueError, match=f"{name} is 0, should be a whole number"):
        policy(0)


def test_an_empty_prompt_decodes():
    tokens = generate(SPEC.build(), torch.zeros(1, 0, dtype=torch.long), 4, policy=D2Cache(k=2))
    assert tokens.shape == (1, 4) and not (tokens == SPEC.config().mask_token_id).any()


def test_a_prompt_may_hold_a_mask_whose_id_is_beyond_the_vocabulary():
    model = SPEC.build()
    model.config = replace(model.config, mask_token_id=11, vocab_size=9)
    tokens = generate(model, prompts([[1, 11, 2]]), 4)
    assert tokens[0, :3].tolist() == [1, 11, 2] and tokens[0, 3:].max() < 9


def test_any_integer_type_of_prompt_decodes_the_same():
    model, prompt = SPEC.build(), torch.tensor([[1, 2, 3]])
    expected = generate(model, prompt, 4)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(generate(model, prompt.to(dtype), 4), expected)


@given(model_specs(), st.data())
def test_inputs_are_not_written_to(spec, data):
    model = spec.build()
    prompt = torch.tensor(data.draw(token_rows(model.config, 2, 4)))
    before = prompt.clone()
    generate(model, prompt, 4, policy=D2Cache(k=2))
    assert torch.equal(prompt, before)
