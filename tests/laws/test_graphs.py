"""Decoding by replays of rounded-up sizes against decoding launch by launch; the head's work."""

import pytest
import torch
from bench import CudaGraphs
from d2cache import D2Cache, DualCache, PrefixCache, RecomputeAll, decode, generate
from hypothesis import given
from hypothesis import strategies as st
from model import KVCache

from strategies import POLICIES, ModelSpec, decodes, model_specs

SPEC = dict(n_layers=3, n_kv_heads=2, queries_per_kv_head=2, half_head_dim=16, vocab_size=40)
PROMPT = torch.ones(1, 4, dtype=torch.long)


class Replay:
    """Stands in for a CUDA graph: does again what was captured, into the same tensors."""

    def __init__(self, run, outputs):
        self.run, self.outputs = run, outputs

    def replay(self):
        for tensor, value in zip(self.outputs, self.run()):
            if tensor is not None:  # a policy without attention has no influence
                tensor.copy_(value)


class Replays(CudaGraphs):
    """CudaGraphs for a machine without CUDA: sizes, buffers and caches are the real ones."""

    def graph_of(self, run):
        outputs = tuple(tensor if tensor is None else torch.zeros_like(tensor) for tensor in run())
        return Replay(run, outputs), outputs


def cache_for(model, B, T):
    weight = model.wte.weight
    return KVCache(model.config, B, T, weight.device, weight.dtype)


@pytest.mark.parametrize("name", POLICIES)
@given(
    spec=model_specs(),
    bucket=st.integers(1, 7),
    temperature=st.sampled_from([0.0, 0.8]),
    data=st.data(),
)
def test_replays_decode_what_separate_launches_decode(name, spec, bucket, temperature, data):
    """Thrice with the same object: the second decode finds the first one's cache and graphs."""
    model = spec.build()
    graphs = Replays(data.draw(POLICIES[name]), bucket)
    seeded = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    cache = None
    for again in range(3):
        if again != 1:
            arguments = data.draw(decodes(model.config)).arguments()
            B, P = arguments["prompt"].shape
            cache = cache_for(model, B, P + arguments["gen_length"])
        arguments |= {"temperature": temperature, "generator": seeded()}
        expected = generate(model, policy=graphs.policy, **arguments)
        arguments["generator"] = seeded()
        assert torch.equal(generate(model, policy=graphs, cache=cache, **arguments), expected)
        assert graphs.cache is cache


def test_states_of_a_replayed_decode_keep_their_influence():
    """A replay leaves its results where the one before it left its own."""
    model = ModelSpec(**SPEC, seed=0).build()
    policy = D2Cache(k=3, p=0.2)
    replayed = list(decode(model, PROMPT, 12, policy=Replays(policy, bucket=16)))
    for ours, theirs in zip(replayed, decode(model, PROMPT, 12, policy=policy), strict=True):
        torch.testing.assert_close(ours.influence, theirs.influence)


def test_graphs_of_padded_and_of_whole_prompts_are_kept_apart():
    model = ModelSpec(2, 2, 2, 4, vocab_size=12, seed=0).build()
    graphs, prompt = Replays(RecomputeAll()), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    cache = cache_for(model, 2, 12)
    decoded = []
    for mask in (None, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])) * 2:
        expected = generate(model, prompt, 8, prompt_mask=mask)
        again = generate(model, prompt, 8, prompt_mask=mask, policy=graphs, cache=cache)
        assert torch.equal(again, expected)
        decoded.append(expected)
    assert not torch.equal(decoded[0], decoded[1])


def test_buckets_bound_the_number_of_graphs():
    model = ModelSpec(**SPEC, seed=0).build()
    graphs = Replays(D2Cache(k=20, p=0.5), bucket=16)
    generate(model, torch.ones(1, 20, dtype=torch.long), 44, policy=graphs)
    assert {Q for Q, R, inputs in graphs.graphs} <= {16, 32, 48, 64}
    assert {R for Q, R, inputs in graphs.graphs} <= {16, 32}
    assert len(graphs.graphs) <= 7


def test_sizes_are_rounded_up_to_the_bucket_and_no_further_than_the_canvas():
    graphs = Replays(RecomputeAll(), bucket=16)
    positions = torch.arange(3, 20).expand(2, 17)
    valid = torch.ones(2, 17, dtype=torch.bool)
    more, more_valid, rows = graphs.round_up(positions, valid, R=5, T=100)
    assert more.shape == (2, 32) and rows == 16
    assert torch.equal(more[:, :17], positions) and (more[:, 17:] == 3).all()
    assert more_valid[:, :17].all() and not more_valid[:, 17:].any()
    more, _, rows = graphs.round_up(positions, valid, R=17, T=20)
    assert more.shape == (2, 20) and rows == 20
    more, _, rows = graphs.round_up(positions[:, :16], valid[:, :16], R=16, T=100)
    assert more.shape == (2, 16) and rows == 16


def test_another_cache_or_model_drops_the_graphs():
    """A graph reads the addresses that it was captured with: another cache would not be seen."""
    model = ModelSpec(**SPEC, seed=0).build()
    other = ModelSpec(**SPEC, seed=1).build()
    graphs, cache = Replays(RecomputeAll()), cache_for(model, 1, 12)
    for owner, held in ((model, cache), (model, cache_for(model, 1, 12)), (other, cache)):
        generate(model, PROMPT, 8, policy=graphs, cache=cache)
        before = set(map(id, graphs.graphs.values()))
        expected = generate(owner, PROMPT, 8)
        assert torch.equal(generate(owner, PROMPT, 8, policy=graphs, cache=held), expected)
        kept = before == set(map(id, graphs.graphs.values()))
        assert kept == (owner is model and held is cache)


def test_a_refused_decode_leaves_nothing_behind_in_the_cache():
    """NaN in the slots of padding once stayed, and 0 x NaN spoilt every later padded decode."""
    model = ModelSpec(**SPEC, seed=0).build()
    graphs, cache = Replays(D2Cache(k=2)), cache_for(model, 2, 12)
    prompt = torch.ones(2, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    weight = model.ln_f.weight.clone()
    model.blocks[0].v_proj.weight.mul_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        generate(model, prompt, 8, policy=graphs, cache=cache)
    model.blocks[0].v_proj.weight.copy_(ModelSpec(**SPEC, seed=0).build().blocks[0].v_proj.weight)
    expected = generate(model, prompt, 8, policy=D2Cache(k=2), prompt_mask=mask)
    again = generate(model, prompt, 8, policy=graphs, prompt_mask=mask, cache=cache)
    assert torch.equal(again, expected) and torch.equal(model.ln_f.weight, weight)


def test_only_the_maps_of_a_whole_canvas_are_computed_without_a_graph():
    model = ModelSpec(**SPEC, seed=0).build()
    graphs = Replays(D2Cache(k=1, p=0.0), bucket=4)
    generate(model, PROMPT, 2, policy=graphs)
    assert [Q for Q, R, inputs in graphs.graphs] == [4]  # of the second step alone
    graphs = Replays(RecomputeAll(), bucket=4)
    generate(model, PROMPT, 2, policy=graphs)
    assert [Q for Q, R, inputs in graphs.graphs] == [6]


@pytest.mark.parametrize("policy", [RecomputeAll(), PrefixCache(), DualCache(), D2Cache(k=5)])
def test_only_masked_positions_pass_the_head(policy, monkeypatch):
    model = ModelSpec(**SPEC, seed=0).build()
    head = model.head
    rows = []
    monkeypatch.setattr(model, "head", lambda hidden: rows.append(hidden.shape[1]) or head(hidden))
    prompt = torch.ones(1, 9, dtype=torch.long)
    predicted = []
    for state in decode(model, prompt, 16, 8, policy=policy):
        predicted.append(state.predicted.sum().item())
    assert rows == predicted
