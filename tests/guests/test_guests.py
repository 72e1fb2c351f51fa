"""The guests against the official code that they follow, uncached decoding, and cosines by hand."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from d2cache import RecomputeAll, decode, generate, load_policy
from guests.dllm_cache import DLLMCache
from guests.elastic_cache import ElasticCache
from hypothesis import given
from hypothesis import strategies as st
from model import Transformer
from safetensors.torch import load_file

import oracle
from strategies import ModelSpec, decodes, left_padded, model_specs

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden"
ELASTIC = load_file(GOLDEN / "relatives" / "elastic.safetensors")
ELASTIC_RUNS = json.loads((GOLDEN / "relatives" / "elastic.json").read_text())
DLLM = load_file(GOLDEN / "relatives" / "dllm.safetensors")
DLLM_RUNS = json.loads((GOLDEN / "relatives" / "dllm.json").read_text())
SPEC = ModelSpec(2, 2, 2, 2, 12, seed=1)

# One of theirs asks for all masked positions, which a sliding window does not.
ELASTIC_CASES = [case for case, run in ELASTIC_RUNS.items() if run["block_caching"]]
ELASTIC_POLICIES = st.builds(
    ElasticCache,
    width=st.integers(1, 5),
    gamma=st.sampled_from([0.9, 0.99, 2.0, -1.0]),
    watch=st.integers(1, 3),
    over=st.sampled_from(["heads", "keys"]),
)
DLLM_POLICIES = st.builds(
    DLLMCache,
    prompt_interval=st.integers(1, 4),
    response_interval=st.integers(1, 4),
    ratio=st.sampled_from([0.25, 0.0, 0.5, 1.0]),
)
EVERY_GUEST = pytest.mark.parametrize("policies", [ELASTIC_POLICIES, DLLM_POLICIES])


class Everything(ElasticCache):
    """Elastic-Cache with a choice that leaves nothing to a drift."""

    def choose(self, state):
        super().choose(state)
        return torch.ones_like(state.known)


@cache
def tiny():
    """In float64, where round-off decides nothing."""
    return Transformer.from_pretrained(GOLDEN / "llada_tiny", dtype=torch.float64)


def watch(model, policy, arguments, names):
    """The state after each step, and what the attributes `names` of the policy were: (S, ...)."""
    states = []
    seen = {name: [] for name in names}
    for state in decode(model, policy=policy, **arguments):
        states.append(state)
        for name in names:
            seen[name].append(getattr(policy, name))
    return states, {name: torch.stack(values) for name, values in seen.items()}


# ---- Elastic-Cache -------------------------------------------------------------------------------


@cache
def elastic(case):
    """A decode of the official code, done here: states, what the policy saw, and the policy."""
    run = ELASTIC_RUNS[case]
    policy = ElasticCache(run["window_length"], run["gamma"], run["track_num"])
    arguments = {"prompt": ELASTIC[f"prompt.{run['prompt']}"], "gen_length": run["gen_length"]}
    arguments |= {"sigma": None}
    states, seen = watch(tiny(), policy, arguments, ("rows", "watched", "similarity"))
    return states, seen, policy


@pytest.mark.parametrize("case", ELASTIC_CASES)
def test_every_layer_recomputes_what_the_official_elastic_cache_does(case):
    _, seen, _ = elastic(case)
    assert torch.equal(seen["rows"][:, :, 0], ELASTIC[f"{case}.rows"])


@pytest.mark.parametrize("case", ELASTIC_CASES)
def test_every_step_asks_for_what_the_official_elastic_cache_does(case):
    states, _, _ = elastic(case)
    assert torch.equal(torch.cat([state.chosen for state in states]), ELASTIC[f"{case}.query"])


@pytest.mark.parametrize("case", ELASTIC_CASES)
def test_every_step_commits_where_the_official_elastic_cache_does(case):
    states, _, _ = elastic(case)
    assert torch.equal(torch.cat([state.fresh for state in states]), ELASTIC[f"{case}.commit"])


@pytest.mark.parametrize("case", ELASTIC_CASES)
def test_every_step_leaves_the_tokens_of_the_official_elastic_cache(case):
    states, _, _ = elastic(case)
    tokens = torch.cat([state.tokens for state in states])
    assert torch.equal(tokens, ELASTIC[f"{case}.tokens_after"])


@pytest.mark.parametrize("case", ELASTIC_CASES)
def test_what_was_looked_at_most_is_watched_as_by_the_official_elastic_cache(case):
    _, seen, _ = elastic(case)
    assert torch.equal(seen["watched"][:, 0], ELASTIC[f"{case}.next_track"].any(dim=1))


@pytest.mark.parametrize("case", ELASTIC_CASES)
def test_similarity_and_where_it_is_tested_are_the_official_elastic_caches(case):
    _, seen, _ = elastic(case)
    theirs = ELASTIC[f"{case}.sims"]
    ours = seen["similarity"][:, :, 0].double()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("case", ELASTIC_CASES)
def test_a_refresh_starts_in_the_layer_behind_the_drift_as_officially(case):
    _, seen, policy = elastic(case)
    L = tiny().config.n_layers
    starts = [-1]  # the first pass, which recomputes everything
    for similarity in seen["similarity"][1:, :, 0].tolist():
        drifted = [layer + 1 for layer in range(L) if similarity[layer] < policy.gamma]
        starts.append(min(drifted, default=L))
    assert starts == ELASTIC[f"{case}.start_reset"].tolist()


@pytest.mark.parametrize("case", ELASTIC_CASES)
def test_the_share_recomputed_is_that_of_the_official_rows(case):
    _, _, policy = elastic(case)
    share = torch.stack(policy.recomputed).mean().item()
    assert share == pytest.approx(ELASTIC_RUNS[case]["rows_share"], abs=1e-6)


@given(spec=model_specs((torch.float64, torch.float32)), policy=ELASTIC_POLICIES, data=st.data())
def test_everything_chosen_in_every_layer_is_vanilla_bit_for_bit(spec, policy, data):
    """Whatever the drift: its refresh finds nothing left to do."""
    model = spec.build()
    drawn = data.draw(decodes(model.config, most_sequences=1))
    everything = Everything(drawn.gen_length, policy.gamma, policy.watch, policy.over)
    ours = decode(model, policy=everything, **drawn.arguments())
    for state, vanilla in zip(ours, decode(model, **drawn.arguments()), strict=True):
        assert torch.equal(state.tokens, vanilla.tokens)
        assert torch.equal(state.confidence, vanilla.confidence)


def test_no_gamma_makes_elastic_cache_exact_as_layer_0_is_never_refreshed():
    run = ELASTIC_RUNS["w8.always"]
    arguments = {"prompt": ELASTIC[f"prompt.{run['prompt']}"], "gen_length": run["gen_length"]}
    states, seen = watch(tiny(), ElasticCache(32, gamma=2.0), arguments, ["rows"])
    exact, _ = watch(tiny(), RecomputeAll(), arguments, [])
    rows = seen["rows"][1:, :, 0]  # of all passes but the first: (S - 1, L, T)
    assert rows[:, 1:].all() and not rows[:, 0].all(dim=1).any()
    predicted = states[1].chosen & states[1].masked
    differ = (states[1].confidence - exact[1].confidence)[predicted].abs()
    assert differ.max() > 1e-6  # a thousand million times what round-off does


def attention_in_layer_0(model, tokens, i):
    """Attention of position i to all, by head: lists (H, T). There it follows from tokens alone."""
    config = model.config
    weights = model.state_dict()
    D = config.head_dim

    def vectors(name, position):
        x = weights["wte.weight"][tokens[position]]
        h = oracle.rms_norm(x, weights["blocks.0.attn_norm.weight"], config.rms_norm_eps)
        projected = (weights[f"blocks.0.{name}.weight"] @ h).split(D)
        return [oracle.rope(vector, position, config.rope_theta) for vector in projected]

    keys = [vectors("k_proj", j) for j in range(len(tokens))]
    share = config.n_heads // config.n_kv_heads
    rows = []
    for head, q in enumerate(vectors("q_proj", i)):
        scores = [math.exp(float(q @ key[head // share]) / math.sqrt(D)) for key in keys]
        rows.append([score / sum(scores) for score in scores])
    return rows


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("over", ["heads", "keys"])
def test_similarity_is_the_mean_cosine_over_heads_or_over_keys(over):
    """Of every watched row, on the canvas of the step before and on this one's."""
    model = SPEC.build()
    prompt = [3, 1, 4, 1, 5]
    arguments = {"prompt": torch.tensor([prompt]), "gen_length": 6}
    policy = ElasticCache(width=3, watch=2, over=over)
    states, seen = watch(model, policy, arguments, ["watched", "similarity"])
    canvases = [prompt + [model.config.mask_token_id] * 6]
    canvases += [state.tokens[0].tolist() for state in states]

    for step in range(1, len(states)):
        cosines = []
        for i in seen["watched"][step - 1, 0].nonzero()[:, 0].tolist():
            before = attention_in_layer_0(model, canvases[step - 1], i)
            after = attention_in_layer_0(model, canvases[step], i)
            if over == "heads":
                before = list(zip(*before))  # (H, T) -> (T, H)
                after = list(zip(*after))
            cosines += [cosine(a, b) for a, b in zip(before, after)]
        expected = sum(cosines) / len(cosines)
        assert seen["similarity"][step, 0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_padding_is_neither_watched_nor_recomputed():
    """Also where a layer should watch more positions than are known, and in a refresh."""
    prompt, mask = left_padded([[3], [3, 1, 4, 1, 5]])
    policy = ElasticCache(watch=3, gamma=2.0)
    arguments = {"prompt": prompt, "gen_length": 4, "prompt_mask": mask}
    _, seen = watch(SPEC.build(), policy, arguments, ["watched", "rows"])
    assert not seen["watched"][:, 0, :4].any()
    assert not seen["rows"][:, :, 0, :4].any()
    assert seen["rows"][1:, 1:, 0, 4:].all()


def test_similarity_is_that_without_padding():
    alone = {"prompt": torch.tensor([[3, 1, 4]]), "gen_length": 4}
    prompt, mask = left_padded([[3, 1, 4], [5, 9, 2, 6, 5]])
    together = {"prompt": prompt, "gen_length": 4, "prompt_mask": mask}
    for over in ("heads", "keys"):
        policy = ElasticCache(width=2, over=over)
        _, one = watch(SPEC.build(), policy, alone, ["similarity"])
        _, two = watch(SPEC.build(), policy, together, ["similarity"])
        ours = two["similarity"][:, :, 0]
        torch.testing.assert_close(ours, one["similarity"][:, :, 0], equal_nan=True)


def test_where_more_is_committed_than_the_window_holds_the_rest_are_predictions_too():
    """In the first step they once were token 0."""
    model = SPEC.build()
    prompt = torch.tensor([[3, 1, 4]])
    window = generate(model, prompt, 4, policy=ElasticCache(width=4), tokens_per_step=4)
    beyond = generate(model, prompt, 4, policy=ElasticCache(width=1), tokens_per_step=4)
    assert torch.equal(beyond, window)


def test_a_similarity_of_exactly_gamma_is_no_drift():
    model = replace(SPEC, dtype=torch.float32).build()
    arguments = {"prompt": torch.tensor([[3, 1, 4]]), "gen_length": 4}
    _, seen = watch(model, ElasticCache(2, gamma=-1.0), arguments, ["similarity"])
    exactly = seen["similarity"][1, 0, 0].item()
    for gamma, drifts in ((exactly, False), (exactly + 1e-6, True)):
        _, seen = watch(model, ElasticCache(2, gamma), arguments, ["rows"])
        assert bool(seen["rows"][1, 1, 0].all()) == drifts


# ---- dLLM-Cache ----------------------------------------------------------------------------------


@cache
def dllm(case):
    """A decode of the official code, done here: states, and the rows of every pass, (S, L, T)."""
    run = DLLM_RUNS[case]
    prompt = DLLM[f"prompt.{run['prompt']}"]
    policy = DLLMCache(
        run["prompt_interval_steps"], run["gen_interval_steps"], run["transfer_ratio"]
    )
    arguments = {name: run[name] for name in ("gen_length", "block_length")}
    arguments |= {"prompt": prompt, "sigma": None}
    states, seen = watch(tiny(), policy, arguments, ["rows"])
    return states, seen["rows"][:, :, 0]


@pytest.mark.parametrize("case", DLLM_RUNS)
def test_dllm_cache_decodes_the_tokens_of_the_official_one(case):
    states, _ = dllm(case)
    assert torch.equal(states[-1].tokens, DLLM[f"{case}.out"])


@pytest.mark.parametrize("case", DLLM_RUNS)
def test_every_layer_recomputes_what_the_official_dllm_cache_does(case):
    """But for the prompt in layer 0, which theirs recomputes every time, to no effect."""
    _, ours = dllm(case)
    theirs = DLLM[f"{case}.rows"].clone()
    P = DLLM[f"prompt.{DLLM_RUNS[case]['prompt']}"].shape[1]
    theirs[:, 0, :P] = theirs[:, 1, :P]
    assert torch.equal(ours, theirs)


@given(spec=model_specs(), data=st.data())
def test_dllm_cache_with_both_intervals_1_is_vanilla(spec, data):
    """Not bit for bit: it keeps the rows in another order, and so does round-off."""
    model = spec.build()
    drawn = data.draw(decodes(model.config, most_sequences=1))
    ours = decode(model, policy=DLLMCache(1, 1), **drawn.arguments())
    for state, vanilla in zip(ours, decode(model, **drawn.arguments()), strict=True):
        assert torch.equal(state.tokens, vanilla.tokens)
        torch.testing.assert_close(state.confidence, vanilla.confidence, rtol=1e-8, atol=1e-8)


def test_with_ratio_0_no_value_of_the_response_changes_between_two_refreshes():
    """Not even where the prompt is refreshed in between; layer 0, which reads the tokens, apart."""
    policy = DLLMCache(prompt_interval=1, response_interval=3, ratio=0.0)
    before = None
    for state in decode(SPEC.build(), torch.tensor([[3, 1, 4]]), 8, policy=policy):
        values = policy.cache.v[1:, :, 3:].clone()
        if (state.step - 1) % 3 > 0:
            assert torch.equal(values, before)
        before = values


def test_the_share_recomputed_is_the_mean_over_layers():
    policy = DLLMCache()
    arguments = {"prompt": torch.tensor([[3, 1, 4]]), "gen_length": 8}
    _, seen = watch(SPEC.build(), policy, arguments, ["rows"])
    assert torch.equal(torch.stack(policy.recomputed), seen["rows"].float().mean(dim=1))


# ---- Both ----------------------------------------------------------------------------------------


@EVERY_GUEST
@given(spec=model_specs(), data=st.data(), stop_at_eos=st.booleans())
def test_a_sequence_decodes_with_a_guest_alone_as_in_company(policies, spec, data, stop_at_eos):
    """Its tokens, and what was recomputed for them; once it is finished, nothing is any more."""
    model, policy = spec.build(), data.draw(policies)
    drawn = data.draw(decodes(model.config))
    together = list(decode(model, policy=policy, stop_at_eos=stop_at_eos, **drawn.arguments()))
    work = policy.recomputed
    for b, prompt in enumerate(drawn.prompts):
        arguments = drawn.settings() | {"prompt": torch.tensor([prompt])}
        alone = list(decode(model, policy=policy, stop_at_eos=stop_at_eos, **arguments))
        own = slice(-alone[0].tokens.shape[1], None)
        for ours, theirs in zip(together, alone):
            assert torch.equal(ours.tokens[b, own], theirs.tokens[0])
        for ours, theirs in zip(work, policy.recomputed):
            assert torch.equal(ours[b, own], theirs[0])
        assert not any(ours[b].any() for ours in work[len(alone) :])


@pytest.mark.parametrize("guest", [ElasticCache, DLLMCache])
def test_a_finished_sequence_recomputes_nothing(guest):
    policy = guest()
    prompt = torch.tensor([[3, 1, 4], [5, 9, 2], [6, 5, 3], [8, 9, 7]])
    states = list(decode(SPEC.build(), prompt, 8, threshold=0.4, policy=policy))
    finished = torch.stack([~state.chosen.any(dim=1) for state in states])  # (S, B)
    assert finished.any()
    assert torch.equal(torch.stack(policy.recomputed).sum(dim=2) == 0, finished)


@pytest.mark.parametrize("guest", [ElasticCache, DLLMCache])
def test_a_guest_that_is_in_two_decodes_at_once_is_refused(guest):
    model, policy = SPEC.build(), guest()
    arguments = {"prompt": torch.tensor([[3, 1, 4]]), "gen_length": 4, "policy": policy}
    first = decode(model, **arguments)
    next(first)
    next(decode(model, **arguments))
    with pytest.raises(ValueError, match="is in two decodes"):
        next(first)


@pytest.mark.parametrize("text, tokens_of", [
    ("elastic_cache.py:ElasticCache(width=3)", ElasticCache(width=3)),
    ("dllm_cache.py:DLLMCache", DLLMCache()),
])  # fmt: skip
def test_a_guest_is_loaded_like_any_policy(text, tokens_of):
    model, arguments = SPEC.build(), {"prompt": torch.tensor([[3, 1, 4]]), "gen_length": 8}
    loaded = load_policy(f"{HERE}/{text}")
    ours = generate(model, policy=loaded, **arguments)
    assert torch.equal(ours, generate(model, policy=tokens_of, **arguments))


@pytest.mark.parametrize("make", [
    lambda: ElasticCache(width=0), lambda: ElasticCache(watch=0), lambda: ElasticCache(over="rows"),
    lambda: DLLMCache(prompt_interval=0), lambda: DLLMCache(response_interval=0),
    lambda: DLLMCache(ratio=1.5), lambda: DLLMCache(ratio=-0.1),
])  # fmt: skip
def test_settings_of_a_guest_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="should"):
        make()
