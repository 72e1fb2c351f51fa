"""Logits, units and decodes, against those of the official LLaDA, Fast-dLLM and d2Cache code."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2cache import (
    D2Cache,
    DelayedCache,
    DualCache,
    PrefixCache,
    RecomputeAll,
    attention_rollout,
    certainty_density,
    decode,
    generate,
    nucleus,
    rows_before,
)
from model import Transformer

GOLDEN = Path(__file__).parent
POLICIES = {  # by the Fast-dLLM function that follows it
    "generate": RecomputeAll(),
    "generate_with_prefix_cache": PrefixCache(),
    "generate_with_dual_cache": DualCache(),
}


def tensors(name, prefix=""):
    loaded = load_file(GOLDEN / f"{name}.safetensors")
    return {prefix + name: tensor for name, tensor in loaded.items()}


def runs(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


LOGITS = tensors("llada_tiny_logits") | tensors("dream_logits", "dream_")
UNITS, UNIT_RUNS = tensors("units"), runs("units")
VANILLA, VANILLA_RUNS = tensors("vanilla_mlgsai"), runs("vanilla_mlgsai")
FAST, FAST_RUNS = tensors("fastdllm"), runs("fastdllm")
DKV, DKV_RUNS = tensors("relatives/dkv"), runs("relatives/dkv")
PROMPTS, D2CACHE_RUNS = tensors("d2cache/prompts"), runs("d2cache/cases")

LOGIT_CASES = ("b1_t5", "b1_t16", "b2_t33", "pad_b3_t12", "dream_b1_t5", "dream_b1_t16")
# Fast-dLLM's caches fail with an error of their own when a block takes a single step.
FAST_CASES = [case for case, run in FAST_RUNS.items() if "error" not in run]


def units(kind, wanted=lambda run: True):
    return [case for case, run in UNIT_RUNS.items() if case.startswith(kind) and wanted(run)]


@cache
def tiny(dtype=torch.float64, folder="llada_tiny"):
    """Decoding is tested in float64, where round-off decides nothing."""
    return Transformer.from_pretrained(GOLDEN / folder, dtype=dtype)


def logits_of(case, dtype):
    """Logits and maps of a case's model, and which of its positions are no padding."""
    tokens = LOGITS[f"{case}.tokens"]
    real = LOGITS.get(f"{case}.attention_mask", torch.ones_like(tokens)) == 1
    model = tiny(dtype, "dream_tiny" if case.startswith("dream") else "llada_tiny")
    padding = None if real.all() else ~real
    return *model(tokens, return_attention=True, padding=padding), real


# ---- Model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOGIT_CASES)
def test_float32_logits_are_the_official_ones(case):
    logits, _, real = logits_of(case, torch.float32)
    # The official float32 and float64 differ by as much.
    torch.testing.assert_close(logits[real], LOGITS[f"{case}.logits"][real], rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", LOGIT_CASES)
def test_float64_logits_are_the_official_ones(case):
    logits, _, real = logits_of(case, torch.float64)
    # The official float64 model computes RMSNorm, RoPE and softmax in float32: hence not 1e-12.
    torch.testing.assert_close(logits[real], LOGITS[f"{case}.logits_f64"][real], rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", LOGIT_CASES)
def test_the_attention_map_is_the_official_attention_averaged_over_heads(case, dtype):
    _, maps, real = logits_of(case, dtype)
    expected = LOGITS[f"{case}.attn_mean"]
    torch.testing.assert_close(maps.float()[:, real], expected[:, real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["dream_b1_t5", "dream_b1_t16"])
def test_the_row_before_predicts_a_position_of_dream(case):
    """Their logits shifted by one say what a step that recomputes everything predicts."""
    model, tokens = tiny(folder="dream_tiny"), LOGITS[f"{case}.tokens"]
    P = tokens.shape[1]
    positions = torch.arange(P)[None]
    before = rows_before(model.hidden_states(tokens)[0], positions, P, P)
    logits = model.head(before)
    expected = LOGITS[f"{case}.shifted_logits"].double()
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_the_sharded_checkpoint_is_the_single_one():
    single = tiny(dtype=None).state_dict()
    sharded = tiny(dtype=None, folder="llada_tiny_sharded").state_dict()
    torch.testing.assert_close(sharded, single, rtol=0, atol=0)  # compares names and dtypes as well


# ---- Units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", units("density"))
def test_certainty_density_is_the_authors_on_their_extended_mask(case):
    """Theirs takes L positions before the mask for known, and L after it for what its last one is.

    Their window holds 6 L distances, from -3 L to 3 L - 1; ours lacks the first of them.
    """
    mask, L, sigma = UNITS[f"{case}.mask"], UNIT_RUNS[case]["L"], UNIT_RUNS[case]["sigma"]
    extended = torch.cat([torch.ones_like(mask), mask, mask[:, -1:].expand_as(mask)], dim=1)
    window = torch.exp(-(torch.arange(-3.0 * L, 3 * L) ** 2) / (2 * sigma**2))
    density = certainty_density(extended, sigma)[:, L : 2 * L] * window[1:].sum() / window.sum()
    torch.testing.assert_close(density, UNITS[f"{case}.out"], rtol=0, atol=1e-6)


def nucleus_case(case):
    """Scores, the positions that take part, p, and the authors' choice."""
    chosen = UNITS[f"{case}.out"]
    among = UNITS.get(f"{case}.mask", torch.ones_like(chosen))
    return UNITS[f"{case}.scores"], among, UNIT_RUNS[case]["top_p"], chosen


@pytest.mark.parametrize("case", units("nucleus", lambda run: run["top_p"] < 1))
def test_the_authors_nucleus_is_ours_without_its_last_element(case):
    score, among, p, theirs = nucleus_case(case)
    ours = nucleus(score, p, among)
    for row, ours_row, theirs_row in zip(score.tolist(), ours, theirs):
        ranked = sorted(ours_row.nonzero()[:, 0].tolist(), key=lambda i: -row[i])
        kept = max(len(ranked) - 1, UNIT_RUNS[case]["min_k"])
        assert sorted(ranked[:kept]) == theirs_row.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("case", units("nucleus", lambda run: run["top_p"] == 1))
def test_a_nucleus_of_p_1_is_everything_also_where_the_authors_lose_the_tail(case):
    score, among, p, theirs = nucleus_case(case)
    ours = nucleus(score, p, among)
    assert torch.equal(ours, among) and not (theirs & ~ours).any()


@pytest.mark.parametrize("case", units("rollout"))
def test_attention_rollout_is_the_column_sums_of_the_authors_product(case):
    maps, column_sums = UNITS[f"{case}.attn"].mean(dim=2), UNITS[f"{case}.colsum"]
    rows = UNITS.get(f"{case}.q_mask", torch.ones_like(column_sums, dtype=torch.bool))
    positions = rows.nonzero()[:, 1].view(len(rows), -1)
    influence = attention_rollout(maps, positions, torch.ones_like(positions, dtype=torch.bool))
    torch.testing.assert_close(influence, column_sums, rtol=0, atol=2e-6)


# ---- Decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VANILLA_RUNS)
def test_recomputing_everything_is_lladas_own_sampler(case):
    run = VANILLA_RUNS[case]
    prompt, mask = (VANILLA.get(f"{kind}.{run['prompt']}") for kind in ("prompt", "prompt_mask"))
    rate = run["gen_length"] // run["steps"]
    arguments = {"block_length": run["block_length"], "tokens_per_step": rate, "prompt_mask": mask}
    tokens = generate(tiny(), prompt, run["gen_length"], **arguments)
    assert torch.equal(tokens, VANILLA[f"{case}.out"])


@pytest.mark.parametrize("block_length, sigma", [(None, 10.0), (8, None)])
def test_dream_with_full_refresh_is_vanilla_bit_for_bit(block_length, sigma):
    model, prompt = tiny(torch.float32, "dream_tiny"), LOGITS["dream_b1_t16.tokens"][:, :6]

    def states(policy):
        return decode(model, prompt, 32, block_length, policy=policy, sigma=sigma)

    for ours, theirs in zip(states(D2Cache(k=38, p=1)), states(RecomputeAll()), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.confidence, theirs.confidence)


@cache
def fast_dllm(case):
    """Fast-dLLM's run, decoded here: all tokens, and the forward that committed each new one."""
    args, prompt = FAST_RUNS[case]["args"], FAST["prompt.f2"]
    length, commits = args["gen_length"], []
    for state in decode(
        tiny(),
        prompt,
        length,
        args["block_length"],
        length // args["steps"],
        POLICIES[case.split(".")[2]],
        threshold=args["threshold"],
    ):
        commits.append(state.fresh[0, -length:])
    return state.tokens, torch.stack(commits).int().argmax(dim=0)


@pytest.mark.parametrize("case", FAST_CASES)
def test_every_policy_decodes_the_tokens_of_its_fast_dllm_function(case):
    tokens, _ = fast_dllm(case)
    assert torch.equal(tokens, FAST[f"{case}.out"])


@pytest.mark.parametrize("case", FAST_CASES)
def test_every_token_is_committed_by_the_same_forward_as_in_fast_dllm(case):
    _, calls = fast_dllm(case)
    assert torch.equal(calls.int(), FAST[f"{case}.call_of_token"])


@pytest.mark.parametrize("case", DKV_RUNS)
def test_delayed_cache_recomputes_and_decodes_what_the_official_dkv_cache_does(case):
    run = DKV_RUNS[case]
    policy, prompt = DelayedCache(run["cache_reloading_step"]), DKV[f"prompt.{run['prompt']}"]
    states = list(decode(tiny(), prompt, run["gen_length"], run["block_length"], policy=policy))
    rows = torch.cat([state.chosen for state in states])
    assert torch.equal(rows, DKV[f"{case}.rows"])
    assert torch.equal(states[-1].tokens, DKV[f"{case}.out"])


class Replay:
    """Recomputes what the authors' code did; our own selection follows the paper instead.

    Asked about the finished canvas, too, it says what does not matter.
    """

    uses_attention = True

    def __init__(self, q_mask):
        self.q_mask = q_mask

    def choose(self, state):
        return self.q_mask[min(state.step, len(self.q_mask) - 1)]


@cache
def replay(case):
    """The authors' record, and the same decode here: the state after each step."""
    record, run = tensors(f"d2cache/{case}"), D2CACHE_RUNS[case]
    args = run["generation"]
    states = decode(
        tiny(),
        PROMPTS[f"prompt.{run['prompt']}"],
        args["gen_length"],
        args["block_length"],
        policy=Replay(record["q_mask"]),
        sigma=args.get("sigma"),  # their density is not ours (see above), but ranks these alike
        threshold=args.get("threshold"),
    )
    return record, list(states)


def response(states, name, G):
    """One field of every state, on the response of G tokens alone.  -> (S, B, G)"""
    return torch.stack([getattr(state, name) for state in states])[:, :, -G:]


@pytest.mark.parametrize("case", D2CACHE_RUNS)
def test_every_step_leaves_the_tokens_of_the_authors_d2cache(case):
    record, states = replay(case)
    expected = record["tokens_after"]
    assert torch.equal(response(states, "tokens", expected.shape[2]).int(), expected)


@pytest.mark.parametrize("case", D2CACHE_RUNS)
def test_every_step_commits_where_the_authors_d2cache_does(case):
    record, states = replay(case)
    expected = record["commit"]
    assert torch.equal(response(states, "fresh", expected.shape[2]), expected)


@pytest.mark.parametrize("case", D2CACHE_RUNS)
def test_the_response_is_that_of_the_authors_d2cache(case):
    record, states = replay(case)
    assert torch.equal(states[-1].tokens[:, -record["out"].shape[1] :], record["out"])


@pytest.mark.parametrize("case", D2CACHE_RUNS)
def test_confidence_of_recomputed_masks_is_the_authors_d2caches(case):
    record, states = replay(case)
    G = record["conf"].shape[2]
    masked = record["tokens_before"] == tiny().config.mask_token_id
    rows = masked & record["q_mask"][:, :, -G:]
    confidence = response(states, "confidence", G).float()
    torch.testing.assert_close(confidence[rows], record["conf"][rows], rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", D2CACHE_RUNS)
def test_influence_after_every_step_is_the_authors_rollout(case):
    record, states = replay(case)
    influence = torch.stack([state.influence for state in states]).float()
    torch.testing.assert_close(influence, record["rollout"], rtol=0, atol=1e-5)
