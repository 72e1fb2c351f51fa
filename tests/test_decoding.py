"""`generate` with every policy against vanilla decoding and against the oracle's decoder."""

from dataclasses import replace

import pytest
import torch
from d2cache import D2Cache, DualCache, RecomputeAll, State, best, generate, unmask
from hypothesis import given
from hypothesis import strategies as st

import oracle
from strategies import POLICIES, ModelSpec, decodes, model_specs, token_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EVERY_POLICY = pytest.mark.parametrize("name", POLICIES)
SPEC = ModelSpec(
    n_layers=2, n_kv_heads=2, queries_per_kv_head=2, half_head_dim=4, vocab_size=12, seed=3
)


def prompts(rows):
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), -1)


def recorded(model, drawn, policy, **arguments):
    """The tokens of a decode, and the (state, chosen) of each of its steps."""
    steps = []
    observe = lambda state, chosen: steps.append((state, chosen))  # noqa: E731
    arguments = drawn.arguments() | {"policy": policy, "on_step": observe} | arguments
    return generate(model, **arguments), steps


@given(model_specs(DTYPES), st.data(), st.sampled_from([0.5, 10.0]), st.sampled_from([0.0, 0.7]))
def test_d2cache_with_full_refresh_is_vanilla_bit_for_bit(spec, data, sigma, temperature):
    """The headline: k >= T and p = 1 change no bit of any token or confidence, at any step."""
    model = spec.build()
    drawn = data.draw(decodes(model.config, waiting=True))
    T = drawn.prompt_length + drawn.gen_length

    def decode(policy):
        generator = torch.Generator().manual_seed(5)
        return recorded(model, drawn, policy, temperature=temperature, generator=generator)

    vanilla, vanilla_steps = decode(RecomputeAll())
    refreshed, refreshed_steps = decode(D2Cache(k=T, p=1, sigma=sigma))
    assert torch.equal(refreshed, vanilla)
    assert len(refreshed_steps) == len(vanilla_steps)
    for (ours, _), (theirs, _) in zip(refreshed_steps, vanilla_steps):
        assert torch.equal(ours.confidence, theirs.confidence)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_every_policy_decodes_like_the_oracle_with_the_same_policy(name, spec, data):
    """The oracle knows no padding: a padded prompt decodes as it does alone."""
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config, most_sequences=2))
    tokens, steps = recorded(model, drawn, policy)
    for b, prompt in enumerate(drawn.prompts):
        expected, history = oracle.decode(model, State, prompt, policy=policy, **drawn.settings())
        assert tokens[b, -len(expected) :].tolist() == expected
        if len(drawn.prompts) == 1:
            assert len(steps) == len(history)
            for (state, _), (confidence, influence) in zip(steps, history):
                torch.testing.assert_close(
                    state.confidence[b].tolist(), confidence, rtol=1e-8, atol=1e-8
                )
                torch.testing.assert_close(
                    state.influence[b].tolist(), influence, rtol=1e-8, atol=1e-8
                )


def assert_decodes_alone_as_in_company(model, drawn, policy):
    """Tokens, and in every step without waiting the choice, the confidence and the influence."""
    together, steps = recorded(model, drawn, policy)
    for b, prompt in enumerate(drawn.prompts):
        alone, own_steps = recorded(model, replace(drawn, prompts=[prompt]), policy)
        own = slice(-alone.shape[1], None)
        assert torch.equal(alone[0], together[b, own])
        awake = [(state, chosen) for state, chosen in steps if chosen[b].any()]
        for (state, chosen), (own_state, own_chosen) in zip(awake, own_steps, strict=True):
            assert torch.equal(chosen[b, own], own_chosen[0])
            for name in ("confidence", "influence"):
                ours, theirs = getattr(state, name)[b, own], getattr(own_state, name)[0]
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_a_sequence_decodes_the_same_alone_as_in_company(name, spec, data):
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config, most_sequences=4))
    assert_decodes_alone_as_in_company(model, drawn, policy)


@pytest.mark.parametrize(
    "name", ["RecomputeAll", "PrefixCache", "DualCache", "D2Cache", "AnySubset"]
)
@given(spec=model_specs(), data=st.data())
def test_waiting_for_company_leaves_no_trace(name, spec, data):
    """Under a threshold a sequence may be done with its block before the others.

    That is for policies that look at positions alone: state.step goes on while a sequence waits.
    """
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config, most_sequences=4, waiting=True))
    assert_decodes_alone_as_in_company(model, drawn, policy)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_padding_is_never_chosen_nor_counted_nor_changed(name, spec, data):
    """Its tokens are arbitrary: others leave every number of every step as it was."""
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config))
    tokens, steps = recorded(model, drawn, policy)
    arguments = drawn.arguments()
    padding = arguments["prompt_mask"] == 0
    other = arguments["prompt"].where(~padding, 1)
    assert torch.equal(tokens[:, : drawn.prompt_length][padding], arguments["prompt"][padding])
    _, other_steps = recorded(model, drawn, policy, prompt=other)
    for (state, chosen), (other_state, _) in zip(steps, other_steps, strict=True):
        assert not (chosen | state.known | state.masked)[:, : drawn.prompt_length][padding].any()
        assert torch.equal(state.influence, other_state.influence)
        assert torch.equal(state.confidence, other_state.confidence)
        assert state.influence.isfinite().all() and state.confidence.isfinite().all()


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3)])
def test_without_padding_attention_gets_no_mask(mask):
    """The fastest kernels take none."""
    states = []
    observe = lambda state, chosen: states.append(state)  # noqa: E731
    generate(SPEC.build(), prompts([[1, 2, 3]] * 2), 2, prompt_mask=mask, on_step=observe)
    assert all(state.padding is None for state in states)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_stopping_at_eos_changes_only_what_follows_it(name, spec, data):
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config))
    eos, P = model.config.eos_token_id, drawn.prompt_length
    tokens, steps = recorded(model, drawn, policy)
    stopped, fewer_steps = recorded(model, drawn, policy, stop_at_eos=True)
    masked = torch.arange(tokens.shape[1]).expand_as(tokens) >= P
    for state, chosen in fewer_steps:  # what was masked and is known now is fresh
        assert torch.equal(
            (masked & ~state.masked)[chosen.any(dim=1)], state.fresh[chosen.any(dim=1)]
        )
        masked = state.masked
    for state, _ in fewer_steps:  # nothing is masked behind an EOS that nothing masked precedes
        for row, masked in zip(state.tokens.tolist(), state.masked.tolist()):
            assert True not in masked or eos not in row[P : masked.index(True)]
    expected = [
        row[: row.index(eos, P)] + [eos] * (len(row) - row.index(eos, P)) if eos in row[P:] else row
        for row in tokens.tolist()
    ]
    assert stopped.tolist() == expected
    assert len(fewer_steps) <= len(steps)


@EVERY_POLICY
@given(spec=model_specs(), data=st.data())
def test_a_step_commits_only_recomputed_masked_positions_of_the_block(name, spec, data):
    model, policy = spec.build(), data.draw(POLICIES[name])
    drawn = data.draw(decodes(model.config))
    tokens, steps = recorded(model, drawn, policy)
    masked = torch.arange(tokens.shape[1]).expand_as(tokens) >= drawn.prompt_length
    for number, (state, chosen) in enumerate(steps, 1):
        commit = masked & ~state.masked
        assert not (state.masked & ~masked).any()
        assert not (commit & ~chosen).any()
        assert not commit[:, : state.block.start].any() and not commit[:, state.block.stop :].any()
        beyond = commit & ~(
            state.confidence > (drawn.threshold if drawn.threshold is not None else 1)
        )
        assert beyond.sum(dim=1).max() <= drawn.tokens_per_step
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


def test_a_confidence_equal_to_the_threshold_does_not_exceed_it():
    confidence = torch.tensor([[0.0, 0.75, 0.5, 0.25, 0.9]])
    known, nobody = confidence == 0, torch.zeros(1, 5, dtype=torch.bool)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    state = State(tokens, known, nobody, confidence, confidence, slice(1, 4), step=1)
    for threshold, n in ((0.5, 1), (0.4, 2), (0.25, 2), (0.75, 1)):
        commit = unmask(state, ~known, confidence, None, 1, threshold)
        assert commit.tolist() == [[0 < i <= n for i in range(5)]]


def test_tokens_are_drawn_with_the_generator_at_the_temperature():
    def sample(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        settings = {"temperature": temperature, "generator": generator}
        return generate(SPEC.build(), prompts([[1, 2, 3]]), 16, **settings).tolist()

    greedy = sample(0, 0.0)
    assert sample(0, 1e-6) == greedy != sample(0, 3.0) == sample(0, 3.0) != sample(1, 3.0)


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
    fresh = known & (torch.rand(B, T, generator=random) < 0.2)
    fresh[:, :P] = False
    confidence, influence = torch.rand(2, B, T, generator=random, dtype=torch.float64)
    tokens = torch.zeros(B, T, dtype=torch.long)
    return State(
        tokens, known, fresh, confidence, influence, slice(start, start + block_length), step=3
    )


@EVERY_POLICY
@given(state=states(), data=st.data())
def test_policies_keep_their_contract_on_any_state(name, state, data):
    policy = data.draw(POLICIES[name])
    before = [tensor.clone() for tensor in vars(state).values() if torch.is_tensor(tensor)]
    chosen = policy.choose(state)
    assert chosen.dtype == torch.bool and chosen.shape == state.known.shape
    assert (chosen & ~state.known)[:, state.block].any(dim=1).all()
    after = [tensor for tensor in vars(state).values() if torch.is_tensor(tensor)]
    assert all(torch.equal(x, y) for x, y in zip(before, after))


@given(
    states(), st.integers(1, 20), st.sampled_from([0.0, 0.1, 0.6, 1.0]), st.sampled_from([0.5, 4.0])
)
def test_d2cache_chooses_candidates_nucleus_and_fresh_positions(state, k, p, sigma):
    chosen = D2Cache(k, p, sigma).choose(state)
    for b, known in enumerate(state.known.tolist()):
        prior = [c * d for c, d in zip(state.confidence[b].tolist(), oracle.density(known, sigma))]
        outside = lambda i: not state.block.start <= i < state.block.stop  # noqa: E731
        masked = [i for i in range(len(known)) if not known[i]]
        candidates = sorted(masked, key=lambda i: (outside(i), -prior[i], i))[:k]
        attended = oracle.nucleus(state.influence[b].tolist(), p, known)
        fresh = [i for i in range(len(known)) if state.fresh[b, i]]
        assert {i for i in range(len(known)) if chosen[b, i]} == {*candidates, *attended, *fresh}


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
def test_a_policy_is_asked_once_a_step_and_never_about_a_finished_block(settings, spec, data):
    """Under a threshold it once was, after the last step: where a replayed record had ended."""
    model, policy, steps = spec.build(), Asked(), []
    prompt = torch.tensor(data.draw(token_rows(model.config, 2, 3)))
    observe = lambda state, chosen: steps.append(state)  # noqa: E731
    generate(model, prompt, 12, 4, policy=policy, on_step=observe, **settings)
    assert [state.step for state in policy.states] == list(range(1, len(steps)))
    assert all(state.masked[:, state.block].any() for state in policy.states)


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
    "one sequence only": lambda state: torch.ones_like(state.known)[:1],
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
    (dict(temperature=0.5), "generator is None at temperature 0.5, should be a torch.Generator"),
    (dict(prompt_mask=torch.ones(1, 3)), r"prompt_mask \(1, 3\) should be \(1, 2\)"),
    (dict(prompt_mask=torch.ones(2)), r"prompt_mask \(2,\)"),
    (
        dict(prompt_mask=torch.tensor([[1, 0]])),
        r"should be \(1, 2\), in each row zeros \(padding\), then",
    ),
    (dict(prompt_mask=torch.tensor([[0, 0]])), "then at least one 1"),
    (dict(prompt=torch.tensor([1, 2])), r"prompt is \(2,\)"),
    (dict(prompt=torch.tensor([[1.0, 2.0]])), "torch.float32"),
    (dict(prompt=torch.tensor([[True]])), "torch.bool"),
    (dict(prompt=torch.zeros(0, 3, dtype=torch.long)), r"\(0, 3\)"),
    (dict(prompt=torch.tensor([[1, 12]])), r"ids \[12\], should be 0 to 11"),
    (dict(prompt=torch.tensor([[-1, 2]])), r"ids \[-1\]"),
    (
        dict(prompt=torch.ones(1, 61, dtype=torch.long)),
        "gen_length is 4 after a prompt of 61, should be from 1 to 3",
    ),
]


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS)
def test_bad_arguments_are_named_with_their_value(arguments, message):
    good = dict(prompt=torch.tensor([[1, 2]]), gen_length=4)
    with pytest.raises(ValueError, match=message):
        generate(SPEC.build(), **(good | arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(k=0), r"k=0,.*k >= 1"),
        (dict(p=-0.1), r"p=-0.1,.*0 <= p <= 1"),
        (dict(p=1.5), "p=1.5,"),
        (dict(p=float("nan")), "p=nan,"),
        (dict(sigma=0.0), r"sigma=0.0.*sigma > 0"),
        (dict(sigma=float("nan")), "sigma=nan"),
    ],
)
def test_bad_settings_of_d2cache_are_named_with_their_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        D2Cache(**arguments)


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


class Uneven(D2Cache):
    """D2Cache, but where the prompt starts with an odd token only one position may be committed."""

    def choose(self, state):
        odd = state.tokens[:, :1] % 2 == 1
        one = best(state.confidence, ~state.known & state.in_block, 1)
        return torch.where(odd & ~state.known, one, super().choose(state))


@pytest.mark.parametrize("seed", range(12))
def test_a_sequence_that_waits_for_others_decodes_as_it_does_alone(seed):
    """Sequences with even prompts finish each block first; waiting must leave no trace in them."""
    model, policy = replace(SPEC, seed=seed).build(), Uneven(k=3, p=0.3, sigma=2.0)
    rows = [[0, 3, 5], [1, 4, 2], [2, 2, 7], [3, 0, 1]]

    def last_state(rows):
        states, observe = [], lambda state, chosen: states.append(state)
        arguments = {"tokens_per_step": 2, "policy": policy, "on_step": observe}
        generate(model, prompts(rows), 16, 8, **arguments)
        return states[-1]

    together = last_state(rows)
    for b, row in enumerate(rows):
        alone = last_state([row])
        assert torch.equal(alone.tokens[0], together.tokens[b])
        torch.testing.assert_close(alone.confidence[0], together.confidence[b])
