"""Decoding by replays of rounded-up sizes against decoding launch by launch; the head's work."""

import pytest
import torch
from bench import CudaGraphs
from d2cache import D2Cache, DualCache, PrefixCache, RecomputeAll, decode, generate
from hypothesis import given
from hypothesis import strategies as st

from strategies import POLICIES, ModelSpec, decodes, model_specs

SPEC = dict(n_layers=3, n_kv_heads=2, queries_per_kv_head=2, half_head_dim=16, vocab_size=40)


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

    def capture(self, run):
        outputs = tuple(tensor if tensor is None else torch.zeros_like(tensor) for tensor in run())
        return Replay(run, outputs), outputs


def replayed(graphs, **arguments):
    """The tokens that `generate` would give, by replays."""
    *_, state = decode(graphs.model, forward=graphs.recompute, **arguments)
    return state.tokens


@pytest.mark.parametrize("name", POLICIES)
@given(
    spec=model_specs(),
    bucket=st.integers(1, 7),
    temperature=st.sampled_from([0.0, 0.8]),
    data=st.data(),
)
def test_replays_decode_what_separate_launches_decode(name, spec, bucket, temperature, data):
    """Twice with the same object: the second decode finds the first one's cache and graphs."""
    model, policy = spec.build(), data.draw(POLICIES[name])
    graphs = Replays(model, bucket)
    seeded = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    for _ in range(2):
        drawn = data.draw(decodes(model.config))
        arguments = drawn.arguments() | {"policy": policy, "temperature": temperature}
        expected = generate(model, generator=seeded(), **arguments)
        assert torch.equal(replayed(graphs, generator=seeded(), **arguments), expected)


def test_graphs_of_padded_and_of_whole_prompts_are_kept_apart():
    model = ModelSpec(2, 2, 2, 4, vocab_size=12, seed=0).build()
    graphs, prompt = Replays(model), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    shorter = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    decoded = []
    for mask in (None, shorter, None, shorter):
        arguments = {"prompt": prompt, "gen_length": 8, "prompt_mask": mask}
        expected = generate(model, **arguments)
        assert torch.equal(replayed(graphs, **arguments), expected)
        decoded.append(expected)
    assert not torch.equal(decoded[0], decoded[1])


def test_buckets_bound_the_number_of_graphs():
    model = ModelSpec(**SPEC, seed=0).build()
    graphs = Replays(model, bucket=16)
    prompt = torch.ones(1, 20, dtype=torch.long)
    replayed(graphs, prompt=prompt, gen_length=44, policy=D2Cache(k=20, p=0.5))
    kinds = list(graphs.graphs)  # (B, T, Q, R, ...)
    assert {kind[2] for kind in kinds} <= {16, 32, 48, 64}
    assert {kind[3] for kind in kinds} <= {16, 32}
    assert len(kinds) <= 7


def test_sizes_are_rounded_up_to_the_bucket_and_no_further_than_the_canvas():
    graphs = Replays(None, bucket=16)
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


def test_the_first_cache_of_a_shape_stays_and_each_shape_has_its_own():
    model = ModelSpec(**SPEC, seed=0).build()
    graphs = Replays(model)
    for length in (8, 8, 12):
        replayed(graphs, prompt=torch.ones(1, 4, dtype=torch.long), gen_length=length)
    assert set(graphs.caches) == {(1, 12), (1, 16)}
    assert graphs.caches[1, 12].k.shape[2] == 12 and graphs.caches[1, 12].k.any()


def test_only_the_maps_of_a_whole_canvas_are_computed_without_a_graph():
    model = ModelSpec(**SPEC, seed=0).build()
    prompt = torch.ones(1, 4, dtype=torch.long)
    graphs = Replays(model, bucket=4)
    replayed(graphs, prompt=prompt, gen_length=2, policy=D2Cache(k=1, p=0.0))
    assert [kind[2] for kind in graphs.graphs] == [4]  # Q of the second step alone
    graphs = Replays(model, bucket=4)
    replayed(graphs, prompt=prompt, gen_length=2, policy=RecomputeAll())
    assert [kind[2] for kind in graphs.graphs] == [6]


def test_graphs_serve_the_model_that_they_were_made_for():
    graphs = Replays(ModelSpec(**SPEC, seed=0).build())
    other = ModelSpec(**SPEC, seed=1).build()
    prompt = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="model is another"):
        next(decode(other, prompt, 2, forward=graphs.recompute))


@pytest.mark.parametrize("policy", [RecomputeAll(), PrefixCache(), DualCache(), D2Cache(k=5)])
def test_only_masked_positions_pass_the_head(policy, monkeypatch):
    model = ModelSpec(**SPEC, seed=0).build()
    head = model.head
    rows = []
    monkeypatch.setattr(model, "head", lambda hidden: rows.append(hidden.shape[1]) or head(hidden))
    prompt = torch.ones(1, 9, dtype=torch.long)
    predicted = []
    for state in decode(model, prompt, 16, 8, policy=policy):
        predicted.append((state.chosen & (state.masked | state.fresh)).sum().item())
    assert rows == predicted
