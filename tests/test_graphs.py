"""Decoding by replays of rounded-up sizes against decoding launch by launch; the head's work."""

import pytest
import torch
from bench import CudaGraphs
from d2cache import D2Cache, DualCache, PrefixCache, RecomputeAll, generate
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
            tensor.copy_(value)


class Replays(CudaGraphs):
    """CudaGraphs for a machine without CUDA: sizes, buffers and caches are the real ones."""

    def capture(self, run):
        outputs = tuple(torch.zeros_like(tensor) for tensor in run())
        return Replay(run, outputs), outputs


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
        tokens = generate(model, generator=seeded(), graphs=graphs, **arguments)
        assert torch.equal(tokens, expected)


def test_graphs_of_padded_and_of_whole_prompts_are_kept_apart():
    model = ModelSpec(2, 2, 2, 4, vocab_size=12, seed=0).build()
    graphs, prompt = Replays(model), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    shorter = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    decoded = []
    for mask in (None, shorter, None, shorter):
        expected = generate(model, prompt, 8, prompt_mask=mask)
        assert torch.equal(generate(model, prompt, 8, prompt_mask=mask, graphs=graphs), expected)
        decoded.append(expected)
    assert not torch.equal(decoded[0], decoded[1])


def test_buckets_bound_the_number_of_graphs():
    model = ModelSpec(**SPEC, seed=0).build()
    graphs = Replays(model, bucket=16)
    prompt = torch.ones(1, 20, dtype=torch.long)
    generate(model, prompt, 44, policy=D2Cache(k=20, p=0.5), graphs=graphs)
    kinds = list(graphs.graphs)  # (B, T, Q, R, ...)
    assert {kind[2] for kind in kinds} <= {16, 32, 48, 64}
    assert {kind[3] for kind in kinds} <= {16, 32}
    assert len(kinds) <= 7


@pytest.mark.parametrize("policy", [RecomputeAll(), PrefixCache(), DualCache(), D2Cache(k=5)])
def test_only_masked_positions_pass_the_head(policy, monkeypatch):
    model, rows, chosen_masked = ModelSpec(**SPEC, seed=0).build(), [], []
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: rows.append(hidden.shape[1]) or head(hidden))

    def observe(state, chosen):
        before = state.known & ~state.fresh
        chosen_masked.append((chosen & ~before).sum().item())

    generate(model, torch.ones(1, 9, dtype=torch.long), 16, 8, policy=policy, on_step=observe)
    assert rows == chosen_masked
