"""The transformer against the oracle, and cached forward passes against uncached ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from model import KVCache

import model as model_file
import oracle
from strategies import ModelSpec, model_specs, token_rows

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def new_cache(model, tokens):
    return KVCache(model.config, *tokens.shape, "cpu", model.wte.weight.dtype)


def all_positions(tokens):
    return torch.arange(tokens.shape[1]).expand_as(tokens)


@st.composite
def canvases(draw, dtypes=(torch.float64,)):
    """A model's spec and the tokens of 1 to 3 sequences of 1 to 9 positions."""
    spec = draw(model_specs(dtypes))
    rows = draw(token_rows(spec.config(), draw(st.integers(1, 3)), draw(st.integers(1, 9))))
    return spec, rows


@st.composite
def position_rows(draw, tokens):
    """(B, Q) positions of `tokens`, in any order, repeats allowed."""
    (B, T), Q = tokens.shape, draw(st.integers(1, tokens.shape[1] + 2))
    row = st.lists(st.integers(0, T - 1), min_size=Q, max_size=Q)
    return torch.tensor(draw(st.lists(row, min_size=B, max_size=B)))


@given(canvases())
def test_logits_and_attention_are_the_oracles(canvas):
    spec, rows = canvas
    model, T = spec.build(), len(rows[0])
    logits, maps = model(torch.tensor(rows), return_attention=True)
    for b, row in enumerate(rows):
        expected, attention = oracle.forward(model.state_dict(), model.config, row, range(T), {})
        close(logits[b], torch.stack([expected[i] for i in range(T)]))
        for layer in range(spec.n_layers):
            close(maps[layer, b], torch.stack([attention[layer][i] for i in range(T)]))


def test_random_models_read_their_context():
    """Otherwise a cache could be wrong everywhere and no arg-max would show it."""
    changed = 0
    for seed in range(40):
        model = ModelSpec(2, 2, 2, 4, 12, seed).build()
        tokens = torch.randint(0, 12, (1, 8), generator=torch.Generator().manual_seed(seed))
        other = tokens.clone()
        other[0, 0] = (tokens[0, 0] + 1) % 12
        before, after = (model(x)[0, 1:].argmax(dim=-1) for x in (tokens, other))
        changed += (before != after).any().item()
    assert changed >= 20


@given(canvases(DTYPES), st.data())
def test_recomputing_everything_is_the_uncached_model(canvas, data):
    """Bit for bit, whatever was recomputed, of whatever tokens, before."""
    spec, rows = canvas
    model, tokens = spec.build(), torch.tensor(rows)
    cache = new_cache(model, tokens)
    for _ in range(data.draw(st.integers(0, 3), label="partial recomputations before")):
        before = torch.tensor(data.draw(token_rows(model.config, *tokens.shape)))
        model(before, data.draw(position_rows(tokens)), cache)
    assert torch.equal(model(tokens, all_positions(tokens), cache), model(tokens))


@given(canvases(), st.data())
def test_while_tokens_stand_still_any_subset_has_the_full_logits(canvas, data):
    spec, rows = canvas
    model, tokens = spec.build(), torch.tensor(rows)
    cache = new_cache(model, tokens)
    logits, maps = model(tokens, all_positions(tokens), cache, return_attention=True)
    for _ in range(2):
        positions = data.draw(position_rows(tokens))
        partial, partial_maps = model(tokens, positions, cache, return_attention=True)
        for b, row in enumerate(positions.tolist()):
            close(partial[b], logits[b, row])
            close(partial_maps[:, b], maps[:, b, row])


@given(canvases(), st.data())
def test_keys_and_values_elsewhere_stay_bit_identical(canvas, data):
    spec, rows = canvas
    model, tokens = spec.build(), torch.tensor(rows)
    cache = new_cache(model, tokens)
    model(tokens, all_positions(tokens), cache)
    k, v = cache.k.clone(), cache.v.clone()
    positions = data.draw(position_rows(tokens))
    model(torch.tensor(data.draw(token_rows(model.config, *tokens.shape))), positions, cache)
    for b, row in enumerate(positions.tolist()):
        elsewhere = [i for i in range(tokens.shape[1]) if i not in row]
        assert torch.equal(cache.k[:, b, elsewhere], k[:, b, elsewhere])
        assert torch.equal(cache.v[:, b, elsewhere], v[:, b, elsewhere])


class CacheMachine(RuleBasedStateMachine):
    """Two sequences under any history of edits and recomputations, beside the oracle's dict."""

    @initialize(spec=model_specs(), data=st.data())
    def start(self, spec, data):
        self.model = spec.build()
        self.rows = data.draw(token_rows(self.model.config, 2, 5))
        self.cache = new_cache(self.model, torch.tensor(self.rows))
        self.memories = [{}, {}]
        self.refresh()

    @rule(sequence=st.integers(0, 1), position=st.integers(0, 4), data=st.data())
    def edit(self, sequence, position, data):
        self.rows[sequence][position] = data.draw(st.integers(0, self.model.config.vocab_size - 1))

    @rule(data=st.data())
    def recompute(self, data):
        self.run(data.draw(position_rows(torch.tensor(self.rows))))

    @rule()
    def refresh(self):
        self.run(all_positions(torch.tensor(self.rows)))

    def run(self, positions):
        logits = self.model(torch.tensor(self.rows), positions, self.cache)
        weights, config = self.model.state_dict(), self.model.config
        for b, row in enumerate(positions.tolist()):
            expected, _ = oracle.forward(
                weights, config, self.rows[b], sorted(set(row)), self.memories[b]
            )
            close(logits[b], torch.stack([expected[i] for i in row]))

    @invariant()
    def cache_is_the_memory(self):
        for b, memory in enumerate(self.memories):
            for (layer, position), (keys, values) in memory.items():
                close(self.cache.k[layer, b, position], torch.stack(list(keys)))
                close(self.cache.v[layer, b, position], torch.stack(list(values)))


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(stateful_step_count=6)


@given(canvases(DTYPES), st.integers(1, 4))
def test_slicing_the_attention_map_changes_no_value(canvas, map_rows):
    spec, rows = canvas
    model, tokens = spec.build(), torch.tensor(rows)
    _, whole = model(tokens, return_attention=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "MAP_ROWS", map_rows)
        _, sliced = model(tokens, return_attention=True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[spec.dtype]
    torch.testing.assert_close(sliced, whole, rtol=0, atol=tolerance)


@given(canvases(DTYPES))
def test_asking_for_attention_changes_no_logit(canvas):
    spec, rows = canvas
    model, tokens = spec.build(), torch.tensor(rows)
    assert torch.equal(model(tokens, return_attention=True)[0], model(tokens))


def test_attention_is_only_computed_when_asked_for(monkeypatch):
    monkeypatch.setattr(model_file, "attention_map", None)
    model = ModelSpec(1, 1, 1, 2, 6, seed=0).build()
    tokens = torch.tensor([[1, 2]])
    hidden, maps = model.hidden_states(tokens)
    assert maps == []
    assert torch.equal(model.head(hidden), model(tokens))


def test_positions_without_a_cache_are_refused():
    model = ModelSpec(1, 1, 1, 2, 6, seed=0).build()
    with pytest.raises(ValueError, match="cache is None"):
        model(torch.tensor([[1, 2]]), torch.tensor([[0]]))


def test_a_cache_of_another_shape_is_refused():
    model = ModelSpec(1, 1, 1, 2, 6, seed=0).build()
    cache = KVCache(model.config, 1, 3, "cpu", torch.float64)
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        model(torch.tensor([[1, 2]]), cache=cache)
