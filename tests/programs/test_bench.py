"""bench.py's arithmetic, tables and checks against values worked out by hand."""

import itertools
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import bench
import pytest
import torch
from bench import CPU_RACE, CPU_SHAPE, LLADA_8B_RACE, LLADA_8B_SHAPE, Program, Timing
from d2cache import D2Cache, DelayedCache, DualCache, PrefixCache, RecomputeAll, SlidingWindow
from d2cache import State, decode, generate, settings
from huggingface_hub.utils import tqdm
from model import KVCache, Transformer

from strategies import ModelSpec

SPEC = ModelSpec(2, 2, 1, 2, vocab_size=12, seed=0)


def bits(*rows):
    """bits("0110", ...) as a bool tensor, a row for each text."""
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def state(known, fresh, chosen, padding=None):
    """A State in which only these matter."""
    zeros = torch.zeros(known.shape)
    return State(known.long(), known, fresh, zeros, zeros, ~known, 1, padding, chosen)


# ---- Settings


def test_the_shapes_are_llada_8b_and_an_eighth_of_it():
    C, hidden = LLADA_8B_SHAPE.d_model, LLADA_8B_SHAPE.mlp_hidden_size
    in_block = 4 * C * C + 3 * C * hidden + 2 * C
    in_all = LLADA_8B_SHAPE.n_layers * in_block + 2 * LLADA_8B_SHAPE.embedding_size * C + C
    assert in_all == 8_015_581_184
    for name in ("d_model", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size"):
        assert getattr(CPU_SHAPE, name) * 8 == getattr(LLADA_8B_SHAPE, name)
    assert CPU_SHAPE.n_layers * 4 == LLADA_8B_SHAPE.n_layers
    assert CPU_SHAPE.embedding_size == CPU_SHAPE.vocab_size
    ids = LLADA_8B_SHAPE.mask_token_id, LLADA_8B_SHAPE.eos_token_id
    assert ids == (126336, 126081)
    assert (CPU_SHAPE.mask_token_id, CPU_SHAPE.eos_token_id) == (126336 // 8, 126081 // 8)
    assert LLADA_8B_SHAPE.n_heads == 32 and LLADA_8B_SHAPE.max_sequence_length == 4096
    assert (LLADA_8B_SHAPE.rope_theta, LLADA_8B_SHAPE.rms_norm_eps) == (500000.0, 1e-5)


def test_the_races_are_what_the_readme_says():
    assert LLADA_8B_RACE == bench.Race(
        LLADA_8B_SHAPE, torch.bfloat16, (128, 896, 3840), (), gen_length=256, batch=1
    )
    assert CPU_RACE == bench.Race(
        CPU_SHAPE, torch.float32, (384,), (128, 384, 1024), gen_length=64, batch=4
    )
    assert (bench.RUNS, bench.LONG_RUN, bench.FEW) == (3, 5.0, 4)
    assert bench.CURVE_STEPS == {"vanilla": 3, "d2cache": 12}
    assert bench.QUALITY_LENGTH == 64 and bench.LLADA_8B_BYTES == 22e9
    assert {name: str(dtype) for name, dtype in bench.DTYPES.items()} == {
        name: f"torch.{name}" for name in ("float32", "bfloat16", "float16", "float64")
    }


# ---- Quality


def test_the_quality_table_has_every_policy_in_its_order_then_the_controls():
    cache, prior = D2Cache(k=8, p=0.1, sigma=2.5), {"sigma": 2.5}
    blocks = {"block_length": 16}
    stage_1, stage_2 = bench.RandomStage1(8, 0.1, 2.5), bench.RandomStage2(8, 0.1, 2.5)
    without = bench.WithoutStage2(8, 0.1, 2.5)
    expected = [
        ("vanilla, by confidence", {}),
        ("vanilla, in blocks", blocks),
        ("vanilla, by prior", prior),
        ("prefix cache, in blocks", {"policy": PrefixCache()} | blocks),
        ("dual cache, in blocks", {"policy": DualCache()} | blocks),
        ("delayed cache, in blocks", {"policy": DelayedCache()} | blocks),
        ("sliding window, by prior", {"policy": SlidingWindow()} | prior),
        ("sliding window, in blocks", {"policy": SlidingWindow()} | blocks),
        ("d2Cache, by prior", {"policy": cache} | prior),
        ("d2Cache, in blocks", {"policy": cache} | blocks),
        ("  stage 1 at random, by prior", {"policy": stage_1} | prior),
        ("  stage 2 at random, by prior", {"policy": stage_2} | prior),
        ("  stage 2 at random, in blocks", {"policy": stage_2} | blocks),
        ("  without stage 2, by prior", {"policy": without} | prior),
        ("  without stage 2, in blocks", {"policy": without} | blocks),
        ("vanilla, threshold 0.9", prior | {"threshold": 0.9}),
        ("d2Cache, threshold 0.9", {"policy": cache, "threshold": 0.9} | prior),
        ("vanilla, threshold 0.6", prior | {"threshold": 0.6}),
        ("d2Cache, threshold 0.6", {"policy": cache, "threshold": 0.6} | prior),
    ]
    assert bench.quality_rows(64) == expected
    eights = [
        (name, arguments | {"block_length": 8} if "block_length" in arguments else arguments)
        for name, arguments in expected
    ]
    assert bench.quality_rows(64, 8) == eights


def test_the_controls_cost_what_d2cache_costs_and_choose_by_chance_or_not_at_all():
    model = SPEC.build()
    *_, half = itertools.islice(decode(model, torch.ones(2, 20, dtype=torch.long), 20), 10)
    ours = D2Cache(k=4, p=0.5)
    torch.manual_seed(0)
    for control in (bench.RandomStage1(4, 0.5), bench.RandomStage2(4, 0.5)):
        chosen = [control.choose(half) for _ in range(2)]
        assert not torch.equal(*chosen)
        for part in ("masked", "known"):
            counts = [(policy & getattr(half, part)).sum(1).tolist() for policy in chosen]
            expected = (ours.choose(half) & getattr(half, part)).sum(1)
            fresh = (half.fresh & getattr(half, part)).sum(1)
            for count in counts:
                assert all(abs(torch.tensor(count) - expected) <= fresh)
    stage_1 = bench.RandomStage1(4, 0.5)
    assert torch.equal(stage_1.attended(half), ours.attended(half))
    stage_2 = bench.RandomStage2(4, 0.5)
    assert torch.equal(stage_2.about_to_be_decoded(half), ours.about_to_be_decoded(half))
    assert not (stage_2.attended(half) & ~half.known).any()
    without = bench.WithoutStage2(4, 0.5)
    assert torch.equal(without.choose(half), ours.about_to_be_decoded(half) | half.fresh)
    assert not without.uses_attention and ours.uses_attention


def test_prompts_are_padded_on_the_left():
    tokens, mask = bench.left_padded([torch.tensor([5]), torch.tensor([6, 7, 8])])
    assert tokens.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_work_is_counted_per_sequence_in_its_own_steps_and_without_padding():
    known, nothing = bits("1100", "1100"), bits("0000", "0000")
    padding = bits("0000", "1000")
    chosen = [bits("1111", "0111"), bits("0011", "0001"), bits("1000", "0000")]
    states = [state(known, nothing, step, padding) for step in chosen]
    forwards, shares = bench.work_done(states)
    assert forwards.tolist() == [3, 2]
    assert shares.tolist() == pytest.approx([7 / 12, 4 / 6])
    _, shares = bench.work_done([state(known, nothing, step) for step in chosen])
    assert shares.tolist() == pytest.approx([7 / 12, 4 / 8])


def test_a_policy_with_a_forward_pass_of_its_own_says_what_that_recomputed():
    class Guest:
        recomputed = [torch.tensor([[1.0, 1.0, 1.0, 0.5]]), torch.tensor([[0.5, 0.0, 0.0, 0.0]])]

    states = [state(bits("1100"), bits("0000"), bits(step)) for step in ("1111", "0011")]
    _, shares = bench.work_done(states, Guest())
    assert shares.tolist() == [4 / 8]


def test_solving_in_batches_is_solving_one_by_one(monkeypatch):
    model = SPEC.build()
    ids = lambda tokenizer, text: torch.tensor([[int(c) for c in text]])  # noqa: E731
    monkeypatch.setattr(bench, "encode_prompt", ids)
    ends = lambda tokenizer, response, eos: f"{response.tolist()} {eos}"  # noqa: E731
    monkeypatch.setattr(bench, "decode_response", ends)
    questions = ["123", "4", "5678", "92"]
    arguments = {"policy": D2Cache(k=2, p=0.5), "threshold": 0.5, "sigma": 1.0}
    progress = tqdm(total=4, disable=True)
    seen = []
    monkeypatch.setattr(progress, "update", seen.append)
    solved = bench.solve(model, None, questions, 6, arguments, progress, batch=3)
    assert seen == [3, 1]

    texts, forwards, shares = [], [], []
    for question in questions:
        prompt = torch.tensor([[int(c) for c in question]])
        states = list(decode(model, prompt, 6, **arguments))
        texts.append(f"{states[-1].tokens[0, len(question):].tolist()} {model.config.end_ids}")
        forwards.append(len(states))
        T = len(question) + 6
        shares.append(sum(s.chosen.sum().item() / T for s in states) / len(states))
    assert solved[0] == texts
    assert solved[1] == pytest.approx(sum(forwards) / 4)
    assert solved[2] == pytest.approx(sum(shares) / 4)


def test_a_quality_row_is_worked_out_by_hand():
    marks = [(True, True), (True, False), (False, False), (False, False)]
    row = bench.quality_row("mine", "exact match", marks, list("abcd"), list("abcx"), 64, 16.0, 0.3)
    assert row == {
        "policy": "mine",
        "exact match": 0.5,
        "standard error": 0.25,
        "strict": 0.25,
        "same text": 0.75,
        "tokens per forward": 4.0,
        "reused": pytest.approx(0.7),
    }
    exact = bench.quality_row("x", "pass@1", marks, list("abcd"), None, 64, 16, 1)
    assert exact["same text"] is None and exact["pass@1"] == 0.5


def quality(monkeypatch, problems, answer, plan):
    """measure_quality of a `solve` that answers as `answer` says."""
    calls = []

    def solve(model, tokenizer, questions, gen_length, arguments, progress, batch):
        calls.append((model, tokenizer, questions, gen_length, arguments, batch))
        return [answer(arguments)] * len(questions), 2, 0.25

    monkeypatch.setattr(bench, "solve", solve)

    def bar(**about):
        total = len(plan) * len(problems)
        assert about == {"total": total, "desc": "quality", "unit": "decode"}
        return tqdm(disable=True)

    monkeypatch.setattr(bench, "tqdm", bar)
    drawn = lambda: {"temperature": 0.5}  # noqa: E731
    return *bench.measure_quality("model", "tokenizer", problems, 64, plan, drawn, 7), calls


def test_agreement_is_with_exact_decoding_in_the_same_order(monkeypatch):
    """The text says how it was decoded, and by whom where the threshold is 0.6."""

    def answer(arguments):
        order = [arguments.get(name) for name in ("block_length", "sigma", "threshold")]
        return f"{order} {arguments.get('policy') if order[2] == 0.6 else ''}"

    plan = bench.quality_rows(64)
    rows, samples, calls = quality(monkeypatch, [("How many?", "#### 1")] * 2, answer, plan)
    assert [row["policy"] for row in rows] == list(samples) == [name for name, _ in plan]
    for row in rows:
        same = 0 if row["policy"] == "d2Cache, threshold 0.6" else 1
        assert row["same text"] == (None if row["policy"].startswith("vanilla") else same)
    assert samples["d2Cache, by prior"] == "[None, 2.5, None] "
    for (name, arguments), call in zip(plan, calls, strict=True):
        drawn = arguments | {"temperature": 0.5}
        assert call == ("model", "tokenizer", ("How many?",) * 2, 64, drawn, 7)
    assert rows[0]["tokens per forward"] == 32 and rows[0]["reused"] == 0.75


def test_the_strict_score_is_shown_where_it_differs(monkeypatch):
    plan = [("vanilla", {}), ("other", {})]
    problems = [("?", "#### 1"), ("?", "#### 2")]
    rows, _, _ = quality(monkeypatch, problems, lambda _: "#### 1", plan)
    assert [row["exact match"] for row in rows] == [0.5, 0.5] and "strict" not in rows[0]
    rows, _, _ = quality(monkeypatch, problems, lambda _: "it is 1", plan)
    assert [(row["exact match"], row["strict"]) for row in rows] == [(0.5, 0), (0.5, 0)]


def test_programs_are_scored_by_whether_they_pass(monkeypatch):
    monkeypatch.setattr(bench, "runs", lambda program, tests: program == f"x\n{tests[0]}")
    problems = [("?", Program("x", ("1",), None)), ("?", Program("x", ("2",), None))]
    rows, _, _ = quality(monkeypatch, problems, lambda _: "1", [("vanilla", {})])
    assert rows[0]["pass@1"] == 0.5 and "strict" not in rows[0] and "exact match" not in rows[0]


# ---- Speed


def test_random_weights_are_scaled_by_their_width():
    config = replace(CPU_SHAPE, d_model=256, n_layers=1, mlp_hidden_size=1024)
    model = bench.random_model(config, "cpu", torch.bfloat16)
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16 and not weight.requires_grad
        std = weight.float().std().item() if weight.dim() > 1 else weight.float().mean().item()
        expected = 1 / weight.shape[-1] ** 0.5
        if "q_proj" in name or "k_proj" in name:
            expected *= 1.5
        if name == "wte.weight" or weight.dim() == 1:
            expected = 1
        assert std == pytest.approx(expected, rel=0.05), name
    random = torch.Generator().manual_seed(0)
    first = torch.empty_like(model.wte.weight).normal_(generator=random)
    assert torch.equal(model.wte.weight, first)


class Clock:
    """Stands in for time.perf_counter: shows the next of the given times."""

    def __init__(self, monkeypatch, *times):
        self.times = list(times)
        monkeypatch.setattr(bench.time, "perf_counter", lambda: self.times.pop(0))


def test_time_is_taken_from_idle_to_idle(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("idle"))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: events.append("clock") or len(events))
    assert bench.timed(lambda: events.append("work") or "done") == (3, "done")  # 5 - 2
    assert events == ["idle", "clock", "work", "idle", "clock"]


def test_the_least_time_is_taken_after_a_warm_up(monkeypatch):
    Clock(monkeypatch, 0, 5, 10, 12, 20, 23)
    calls = []
    assert bench.least_seconds(lambda: calls.append(1), repeats=3) == 2
    assert len(calls) == 4


def test_rates_are_bytes_read_and_written_and_two_operations_a_product(monkeypatch):
    seen = []

    def least_seconds(function, repeats):
        seen.append((function(), repeats))
        return (0.5, 4.0)[len(seen) - 1]

    monkeypatch.setattr(bench, "least_seconds", least_seconds)
    bandwidth, flops = bench.machine_rates("cpu", torch.float32)
    assert bandwidth == 2 * (4 * 2048 * 2048 * 4) / 0.5
    assert flops == 2 * 2048**3 / 4.0
    (copied, _), (product, _) = seen
    assert copied.shape == (8192, 2048) and product.shape == (2048, 2048)
    assert [repeats for _, repeats in seen] == [10, 10]


def test_a_gpu_is_measured_by_larger_matrices(monkeypatch):
    shapes = []
    randn = lambda *shape, device, dtype: shapes.append(shape) or torch.ones(2, 1)  # noqa: E731
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(bench, "least_seconds", lambda function, repeats: 1.0)
    assert bench.machine_rates("cuda:0", None) == (16, 2 * 8192**3)
    assert shapes == [(4 * 8192, 8192)]


def test_rows_are_counted_as_recomputed_and_as_predicted():
    first = state(bits("1110", "1100"), bits("0010", "0000"), bits("1111", "0010"))
    second = state(bits("1111", "1110"), bits("0001", "0010"), bits("0001", "1001"))
    assert bench.row_counts([first, second]) == [(5, 3), (3, 2)]


def test_the_floor_is_the_slower_of_reading_and_arithmetic():
    config = ModelSpec(2, 2, 1, 2, vocab_size=12, seed=0).config()
    model = Transformer(config).double()
    in_blocks = 2 * (4 * 8 * 8 + 3 * 8 * 12 + 2 * 8)
    in_head, in_attention = 12 * 8, 2 * 2 * 8 * 5
    reading = (in_blocks + in_head) * 8 / 1000
    work = 2 * ((in_blocks + in_attention) * 3 + in_head * 2)
    assert bench.floor_seconds(model, 5, [(3, 2)], (1000, 1e9)) == pytest.approx(reading)
    assert bench.floor_seconds(model, 5, [(3, 2)], (1e9, 100)) == pytest.approx(work / 100)
    both = bench.floor_seconds(model, 5, [(3, 2), (0, 0)], (1000, 10))
    assert both == pytest.approx((work / 10 + reading) / 2)


def test_the_caches_bytes_by_formula_are_those_allocated():
    config = ModelSpec(3, 2, 2, 5, vocab_size=12, seed=0).config()
    assert bench.cache_bytes(config, 4, 7, 2) == 2 * 3 * 4 * 7 * 2 * 10 * 2
    cache = KVCache(config, 4, 7, "cpu", torch.bfloat16)
    assert bench.allocated_bytes(cache) == bench.cache_bytes(config, 4, 7, 2)
    apart = SimpleNamespace(k=torch.zeros(3), v=torch.zeros(5))
    assert bench.allocated_bytes(apart) == 32


def test_rows_of_the_speed_table_are_worked_out_by_hand():
    timings = [
        Timing("vanilla", [3.0, 2.0, 9.0], steps=4, share=1.0, floor=0.5),
        Timing("cache", [2.0], steps=10, share=0.25, floor=0.05, peak=3 * 2**29),
    ]
    first, second = bench.speed_rows(timings, batch=6)
    assert first == {
        "policy": "vanilla",
        "reused": 0.0,
        "ms per step": 750.0,
        "tokens/s": 8.0,
        "speed-up": 1.0,
        "floor ms": 500.0,
        "x floor": 1.5,
        "peak GiB": None,
        "runs": 3,
    }
    assert second == {
        "policy": "cache",
        "reused": 0.75,
        "ms per step": pytest.approx(200.0),
        "tokens/s": pytest.approx(30.0),
        "speed-up": pytest.approx(3.75),
        "floor ms": pytest.approx(50.0),
        "x floor": pytest.approx(4.0),
        "peak GiB": 1.5,
        "runs": 1,
    }


def test_the_speed_table_has_every_policy_of_the_settings_vanilla_first():
    plan = bench.speed_plan(64)
    assert plan == list(settings(64).items()) and plan[0] == ("vanilla", {"policy": RecomputeAll()})
    changed = dict(bench.speed_plan(64, 8))
    assert changed["dual"] == {"policy": DualCache(), "block_length": 8}
    assert changed["d2cache"] == settings(64)["d2cache"]


def on_a_gpu(monkeypatch):
    """A model and a prompt that say they are on a GPU; and what is asked of it."""
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    weight = SimpleNamespace(is_cuda=True, device="cuda:0")
    return SimpleNamespace(wte=SimpleNamespace(weight=weight)), asked


def test_on_a_gpu_every_row_is_launched_then_replayed(monkeypatch):
    model, _ = on_a_gpu(monkeypatch)
    guest = SimpleNamespace(recompute=None)
    plan = [("a", {"sigma": 1, "policy": 2}), ("b", {"policy": 3}), ("guest", {"policy": guest})]
    rows = list(bench.launched(model, plan))
    assert [name for name, _ in rows] == ["a", "a, replayed", "b", "b, replayed", "guest"]
    assert rows[0] == plan[0]
    forward = rows[1][1].pop("forward")
    assert rows[1][1] == plan[0][1]
    assert forward.__func__ is bench.CudaGraphs.recompute and forward.__self__.model is model
    assert list(bench.launched(SPEC.build(), plan)) == plan


@pytest.mark.parametrize(
    "times, expected",
    [([1, 1, 1], [1, 1, 1]), ([5], [5]), ([3, 2], [3, 2]), ([4, 0.5, 1], [4, 0.5, 1])],
)
def test_a_decode_is_timed_again_until_it_took_long(monkeypatch, times, expected):
    clock = list(times)
    monkeypatch.setattr(bench, "timed", lambda function: (clock.pop(0), function()))
    model, prompt = SPEC.build(), torch.ones(1, 3, dtype=torch.long)
    seconds, states = bench.time_decodes(model, prompt, 4, {"tokens_per_step": 2})
    assert seconds == expected and clock == [] and len(states) == 2
    assert torch.equal(states[-1].tokens, generate(model, prompt, 4, tokens_per_step=2))


def test_on_a_gpu_a_first_decode_is_not_timed(monkeypatch):
    _, asked = on_a_gpu(monkeypatch)
    last = SimpleNamespace(tokens=torch.zeros(1))
    monkeypatch.setattr(bench, "decode", lambda *_: asked.append("decode") or [last])
    monkeypatch.setattr(bench, "timed", lambda function: asked.append("timed") or (9, function()))
    bench.time_decodes(None, SimpleNamespace(is_cuda=True), 4, {})
    assert asked == ["decode", "reset", "timed", "decode"]


@pytest.mark.parametrize("one_step, tokens", [(1.0, 2), (0.6, 1)])
def test_of_a_slow_vanilla_a_few_steps_are_timed(monkeypatch, one_step, tokens):
    """At 8 tokens a decode takes 8.0 or 4.8 seconds."""
    warm, asked = [], []
    timing = lambda function, repeats: warm.append(repeats) or function() and one_step  # noqa: E731
    monkeypatch.setattr(bench, "least_seconds", timing)
    real = bench.time_decodes

    def time_decodes(model, prompt, gen_length, arguments):
        asked.append((gen_length, arguments))
        return [7.0], real(model, prompt, gen_length, arguments)[1]

    monkeypatch.setattr(bench, "time_decodes", time_decodes)
    model, prompt = SPEC.build(), torch.ones(2, 3, dtype=torch.long)
    plan = [("vanilla", {"policy": RecomputeAll()}), ("d2cache", {"policy": D2Cache(k=1, p=0.0)})]
    timings, states = bench.measure_speed(model, prompt, 8, plan, (1e9, 1e6))
    assert warm == [1] and [gen_length for gen_length, _ in asked] == [8, 8]
    assert asked[0][1].get("tokens_per_step", 1) == tokens and "tokens_per_step" not in asked[1][1]

    vanilla, ours = timings
    expected = list(decode(model, prompt, 8, **plan[1][1]))
    assert [s.tokens.tolist() for s in states] == [s.tokens.tolist() for s in expected]
    floor = bench.floor_seconds(model, 11, bench.row_counts(expected), (1e9, 1e6))
    share = bench.work_done(expected)[1].mean().item()
    assert ours == Timing("d2cache", [7.0], steps=8, share=share, floor=floor, peak=None)
    assert (vanilla.policy, vanilla.steps, vanilla.share) == ("vanilla", 8 // tokens, 1.0)


def test_on_a_gpu_the_peak_is_measured(monkeypatch):
    on_a_gpu(monkeypatch)
    model = SPEC.build()
    prompt = SimpleNamespace(is_cuda=True)
    states = list(decode(model, torch.ones(1, 3, dtype=torch.long), 2))
    monkeypatch.setattr(bench, "least_seconds", lambda *_, repeats: 0.0)
    monkeypatch.setattr(bench, "time_decodes", lambda *_: ([1.0], states))
    bars = []
    bar = lambda rows, *about, **more: bars.append((about, more)) or rows  # noqa: E731
    monkeypatch.setattr(bench, "tqdm", bar)
    plan = [("a", {"policy": 1}), ("b", {"policy": 2})]
    timings, _ = bench.measure_speed(model, prompt, 2, plan, (1, 1))
    assert [timing.peak for timing in timings] == [2**30] * 2
    assert bars == [(("speed", 4), {"unit": "policy"})]


def test_the_mean_step_counts_the_first_once_and_the_others_for_the_rest():
    assert bench.mean_step([10.0, 1.0, 1.0, 4.0], 5) == pytest.approx((10 + 4 * 2) / 5)
    assert bench.mean_step([10.0], 5) == 10


def test_a_row_of_the_curve_is_worked_out_by_hand():
    seconds = {"vanilla": [4.0, 4.0], "d2cache": [4.0, 1.0]}
    assert bench.curve_row(128, seconds, 3) == {
        "prompt": 128,
        "vanilla ms": 4000.0,
        "d2Cache ms": 2000.0,
        "speed-up": 2.0,
    }


def test_the_curve_times_the_first_steps_after_every_prompt(monkeypatch):
    steps = []

    def timed(function):
        state = function()
        steps.append((tuple(state.known.shape), state.step))
        return 0.25 if state.step == 1 else 0.125, state

    monkeypatch.setattr(bench, "timed", timed)
    bars = []
    monkeypatch.setattr(bench, "tqdm", lambda rows, **about: bars.append(about) or rows)
    prompts = [torch.ones(1, n, dtype=torch.long) for n in (3, 5)]
    rows = bench.measure_curve(SPEC.build(), prompts, 4)
    assert bars == [{"desc": "curve", "unit": "prompt"}]
    three_then_four = [1, 2, 3, 1, 2, 3, 4]
    assert steps == [((1, T), step) for T in (7, 9) for step in three_then_four]
    assert [row["prompt"] for row in rows] == [3, 5]
    assert rows[0]["vanilla ms"] == 1000 * (0.25 + 3 * 0.125) / 4 and rows[0]["speed-up"] == 1


def test_the_parts_of_a_step_are_timed_each_alone(monkeypatch):
    """Maps cost what a forward with them takes beyond one without, or nothing by round-off."""
    model, prompt = SPEC.build(), torch.ones(1, 6, dtype=torch.long)
    states = list(decode(model, prompt, 15, **settings(15)["d2cache"]))
    results, seconds = [], []

    def least_seconds(function, repeats):
        results.append((function(), repeats))
        return seconds.pop(0)

    packed = []
    pack = bench.pack
    monkeypatch.setattr(bench, "pack", lambda *about: packed.append(about[2]) or pack(*about))
    monkeypatch.setattr(bench, "least_seconds", least_seconds)
    seconds += [0.5, 0.75, 0.0625, 0.125]
    parts = bench.measure_parts(model, 15, states)
    expected = {"forward": 500, "attention maps": 250, "head": 62.5, "selection": 125}
    assert parts == expected
    (plain, _), (with_maps, _), (head, _), (selection, _) = results
    assert plain[1] is None and with_maps[1] is not None and selection is None
    assert {repeats for _, repeats in results} == {5}
    half = states[7]  # of 15
    policy = settings(15)["d2cache"]["policy"]
    chosen = policy.choose(half)
    assert plain[0].shape[1] == chosen.sum() and head[0].shape[1] == (chosen & half.masked).sum()
    assert packed == [chosen.sum()] * 2
    seconds += [0.5, 0.25, 1, 1]
    assert bench.measure_parts(model, 15, states)["attention maps"] == 0


# ---- Tables


@pytest.mark.parametrize(
    "column, value, text",
    [
        ("exact match", 0.98765, "98.8%"), ("pass@1", 0.5, "50.0%"), ("strict", 0.5, "50.0%"),
        ("standard error", 0.015, "1.5%"), ("same text", 1, "100.0%"), ("reused", 0.125, "12.5%"),
        ("same text", None, "-"), ("tokens per forward", 15.0588, "15.06"),
        ("ms per step", 1.005, "1.00"), ("tokens/s", 12.345, "12.35"), ("speed-up", 2, "2.00"),
        ("floor ms", 3, "3.00"), ("x floor", 1.234, "1.23"), ("peak GiB", None, "-"),
        ("peak GiB", 1.5, "1.50"), ("vanilla ms", 1.5, "1.50"), ("d2Cache ms", 1.5, "1.50"),
        ("runs", 3, "3"), ("prompt", 128, "128"), ("policy", "dual", "dual"),
    ],
)  # fmt: skip
def test_a_cell_is_printed_as_its_column_wants(column, value, text):
    assert bench.cell(column, value) == text


def test_columns_are_as_wide_as_their_widest_cell(capsys):
    rows = [{"policy": "a", "runs": 3, "x": None}, {"policy": "the longest", "runs": 12345, "x": 1}]
    lines = [
        "policy        runs  x",
        "a                3  -",
        "the longest  12345  1",
    ]
    assert bench.table_lines(rows) == lines
    bench.print_table(rows)
    assert capsys.readouterr().out == "\n".join(lines) + "\n"


def test_a_model_is_described_by_size_precision_and_device(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with torch.device("meta"):
        model = Transformer(CPU_SHAPE)
    said = f"43.5 M parameters, torch.float32, CPU, 7 threads, torch {torch.__version__}"
    assert bench.describe(model) == said
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    weight = SimpleNamespace(is_cuda=True, device=1, dtype="bf16")
    parameters = lambda: [torch.zeros(1000, 1000)] * 1234  # noqa: E731
    model = SimpleNamespace(wte=SimpleNamespace(weight=weight), parameters=parameters)
    assert bench.describe(model) == f"1,234.0 M parameters, bf16, GPU 1, torch {torch.__version__}"


# ---- The command line


def arguments(*line):
    return bench.make_parser().parse_args([str(word) for word in line])


def test_the_defaults_of_the_command_line():
    args = vars(arguments("--device", "cpu"))
    numbers = {"problems": 32, "shots": 0, "temperature": 0.0, "seed": 0, "run_code": False}
    assert {key: value for key, value in args.items() if value is not None} == numbers | {
        "device": "cpu"
    }


def test_the_help_sorts_the_flags_by_what_they_are_for():
    words = " ".join(bench.make_parser().format_help().split())
    groups = ["model: --model", "quality: --data", "speed: --prompt", "both: --gen-length"]
    places = [words.index(group) for group in groups]
    assert places == sorted(places)
    assert "--revision" in words[places[0] : places[1]] and "--seed" in words[: places[2]]
    assert "--json" in words[places[3] :]


MISTAKES = [
    (["--problems", 0], "--problems is 0, should be at least 1"),
    (["--prompt-length", 0], "--prompt-length is 0, should be at least 1"),
    (["--block-length", 0], "--block-length is 0, should be at least 1"),
    (["--batch", -1], "--batch is -1, should be at least 1"),
    (["--gen-length", 1], "--gen-length is 1, should be at least 2"),
    (["--shots", -1], "--shots is -1, should be at least 0"),
    (["--temperature", -0.1], "--temperature is -0.1, should be at least 0"),
    (["--temperature", "inf"], "--temperature is inf, should be at least 0"),
    (["--temperature", "nan"], "--temperature is nan, should be at least 0"),
    (["--seed", -1], "--seed is -1, should be from 0 to 2^63 - 1"),
    (["--seed", 2**63], f"--seed is {2**63}, should be from 0 to 2^63 - 1"),
    (["--revision", "main"], "--revision needs --model"),
    (["--prompt", "Hello"], "--prompt needs --model"),
    (["--model", "x", "--prompt-length", 5], "--prompt-length is of a random prompt"),
    (["--shots", 1], "--shots needs --data"),
    (["--run-code"], "--run-code needs --data"),
    (["--block-length", 3], "--block-length is 3, should divide the response's 64"),
    (["--block-length", 32, "--gen-length", 80], "should divide the response's 80"),
    (["--model", "x", "--block-length", 3], "should divide the response's 256"),
    (["--model", "x", "--block-length", 8, "--gen-length", 20], "divide the response's 20"),
]
FINE = [
    [],
    ["--problems", 1, "--prompt-length", 1, "--block-length", 1, "--batch", 1, "--gen-length", 2],
    ["--seed", 2**63 - 1, "--temperature", 0.5, "--block-length", 64],
    ["--model", "x", "--revision", "y", "--prompt", "Hello", "--block-length", 128],
    ["--model", "x", "--gen-length", 20, "--block-length", 10],
    ["--data", "x", "--shots", 1, "--run-code"],
]


@pytest.mark.parametrize("line, said", MISTAKES)
def test_arguments_that_cannot_be_meant_are_refused(line, said):
    with pytest.raises(ValueError) as error:
        bench.check(arguments(*line))
    assert said in str(error.value)


@pytest.mark.parametrize("line", FINE)
def test_other_arguments_are_fine(line):
    bench.check(arguments(*line))


def test_code_is_run_on_linux_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="--run-code needs Linux, whose"):
        bench.check(arguments("--data", "x", "--run-code"))
    bench.check(arguments())


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("kept")
    bench.check(arguments("--json", kept))
    assert kept.read_text() == "kept"
    bench.check(arguments("--json", tmp_path / "new.json"))
    assert not (tmp_path / "new.json").exists()
    for path in (tmp_path, tmp_path / "no" / "x.json"):
        with pytest.raises(OSError):
            bench.check(arguments("--json", path))


def test_examples_come_before_the_problems_that_are_scored(tmp_path):
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": f"q{n}", "answer": f"#### {n}"}) for n in range(6)]
    data.write_text("\n".join(lines))
    read = lambda *line: bench.read_data(arguments("--data", data, *line))  # noqa: E731
    assert read("--problems", 2) == [("q0", "q0", "#### 0"), ("q1", "q1", "#### 1")]
    example = "Question: q0\nAnswer: #### 0\n\nQuestion: {}\nAnswer:"
    expected = [(f"q{n}", example.format(f"q{n}"), f"#### {n}") for n in (1, 2)]
    assert read("--problems", 2, "--shots", 1) == expected
    assert [question for question, _, _ in read("--shots", 5)] == ["q5"]
    with pytest.raises(ValueError, match="--shots is 6, but .* holds no more than these"):
        read("--shots", 6)
    with pytest.raises(ValueError, match="asks for no programs"):
        read("--run-code")
    assert len(bench.read_data(arguments())) == 32


def test_programs_are_scored_where_running_them_is_asked_for(tmp_path):
    data = tmp_path / "data.jsonl"
    task = {"text": "Add.", "test_list": ["assert True"]}
    data.write_text(json.dumps(task) + "\n" + json.dumps(task | {"code": "pass"}))
    read = lambda *line: bench.read_data(arguments("--data", data, *line))  # noqa: E731
    with pytest.raises(ValueError, match="--run-code does it"):
        read()
    assert [answer.code for _, _, answer in read("--run-code")] == [None, "pass"]
    with pytest.raises(ValueError, match='example 1 of --shots has no "code"'):
        read("--run-code", "--shots", 1)
    data.write_text(json.dumps(task | {"code": "pass"}) + "\n" + json.dumps(task))
    ((_, prompt, _),) = read("--run-code", "--shots", 1)
    assert "pass\n[DONE]\n\nYou are" in prompt


def test_chance_starts_anew_with_the_seed():
    args = arguments("--seed", 5, "--device", "cpu")
    assert bench.sampling(args) == {}
    first = torch.rand(1)
    bench.sampling(args)
    assert torch.equal(torch.rand(1), first)
    drawn = bench.sampling(arguments("--seed", 5, "--temperature", 0.7, "--device", "cpu"))
    assert drawn["temperature"] == 0.7 and drawn["generator"].initial_seed() == 5
    assert torch.equal(first, torch.rand(1, generator=torch.Generator().manual_seed(5)))


def test_a_policy_of_ones_own_has_a_row_in_each_order():
    args = arguments("--policy", "folder/mine.py:Mine(k=2)")
    assert bench.own_rows(args, None, 64) == []
    assert bench.own_rows(args, "policy", 64) == [
        ("Mine(k=2), by prior", {"sigma": 2.5, "policy": "policy"}),
        ("Mine(k=2), in blocks", {"block_length": 16, "policy": "policy"}),
    ]
    args = arguments("--policy", "mine.py:Mine", "--block-length", 4)
    assert bench.own_rows(args, "policy", 64)[1][1]["block_length"] == 4


class Breaks:
    """Recomputes everything in step 2; in step 3 it fails, or chooses nothing."""

    uses_attention = False

    def __init__(self, error=None):
        self.error = error

    def choose(self, state):
        if state.step == 1:
            return torch.ones_like(state.known)
        if self.error:
            raise self.error
        return torch.zeros_like(state.known)


def test_a_policy_that_breaks_is_named_with_the_step():
    model, prompt = SPEC.build(), torch.ones(1, 3, dtype=torch.long)

    def tried(policy):
        bench.try_out(model, prompt, 4, [("Mine", {"policy": policy})])

    tried(RecomputeAll())
    with pytest.raises(ValueError, match="policy Mine fails in step 3: KeyError: 'x'"):
        tried(Breaks(KeyError("x")))
    with pytest.raises(ValueError, match="policy Breaks .* step 3"):
        tried(Breaks())


def test_the_race_is_run_at_the_size_of_the_device(monkeypatch):
    assert bench.race_of("cpu") == (CPU_RACE, "random weights, 8 layers of 512")
    for free, race in ((22e9, CPU_RACE), (22e9 + 1, LLADA_8B_RACE)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
        chosen, name = bench.race_of("cuda")
        assert chosen is race
        assert ("LLaDA-8B's shape wants 22 GB of free GPU memory" in name) == (race is CPU_RACE)
    assert name == "random weights, 32 layers of 4096"


def test_random_prompts_hold_ids_of_words():
    first, second = bench.random_prompts(CPU_SHAPE, [3, 2000], 4, "cpu")
    assert first.shape == (4, 3) and second.shape == (4, 2000)
    assert 0 <= second.min() < 20 and 15700 < second.max() < CPU_SHAPE.eos_token_id
    assert torch.equal(bench.random_prompts(CPU_SHAPE, [3], 4, "cpu")[0], first)
    expected = torch.randint(15760, (4, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, expected)


SMALL = replace(
    CPU_SHAPE, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, mlp_hidden_size=8, vocab_size=20,
    embedding_size=20, mask_token_id=19, eos_token_id=18, max_sequence_length=100,
)  # fmt: skip
ROW = {"policy": "d2cache", "ms per step": 100.0}


def stub_measuring(monkeypatch):
    """Nothing is timed; what is asked for is kept."""
    asked = []
    race = bench.Race(SMALL, torch.float32, (5, 7), (3, 4), gen_length=8, batch=2)
    monkeypatch.setattr(bench, "race_of", lambda device: (race, "small"))
    monkeypatch.setattr(bench, "describe", lambda model: "described")
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (3e9, 5e12))

    def measure_speed(model, prompt, gen_length, plan, rates):
        asked.append((tuple(prompt.shape), gen_length, plan, rates, model.wte.weight.dtype))
        return "timings", "states"

    monkeypatch.setattr(bench, "measure_speed", measure_speed)
    rows = lambda timings, batch: [ROW, ROW | {"policy": batch}]  # noqa: E731
    monkeypatch.setattr(bench, "speed_rows", rows)
    monkeypatch.setattr(bench, "measure_parts", lambda *_: {"forward": 30.0, "head": 10.5})
    return asked


def test_the_race_is_reported_as_printed(monkeypatch, capsys):
    asked = stub_measuring(monkeypatch)
    curve = [{"prompt": 3, "vanilla ms": 2.0, "d2Cache ms": 1.0, "speed-up": 2.0}]
    lengths = []

    def measure_curve(model, prompts, gen_length):
        lengths.append([tuple(prompt.shape) for prompt in prompts] + [gen_length])
        return curve

    monkeypatch.setattr(bench, "measure_curve", measure_curve)
    result = bench.report_race(arguments("--device", "cpu"), None)
    plan = bench.speed_plan(8)
    assert asked == [((2, P), 8, plan, (3e9, 5e12), torch.float32) for P in (5, 7)]
    assert lengths == [[(2, 3), (2, 4), 8]]
    bytes_of = lambda P: 2 * 1 * 2 * (P + 8) * 1 * 8 * 4  # noqa: E731
    assert result == {
        "speed": [
            {
                "model": "small: described",
                "prompt": P,
                "response": 8,
                "batch": 2,
                "block length": 8,
                "rows": [ROW, {**ROW, "policy": 2}],
                "d2cache step ms": {"forward": 30.0, "head": 10.5, "the rest": 59.5},
                "cache bytes": {"formula": bytes_of(P), "allocated": bytes_of(P)},
            }
            for P in (5, 7)
        ],
        "curve": curve,
        "copy bytes/s": 3e9,
        "matrix FLOP/s": 5e12,
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == [
        "",
        "SPEED  small: described",
        "prompt 5, response 8, batch 2, caches in blocks of 8, 1 token per step, median of the "
        "runs; of a slow vanilla a few steps",
        "policy   ms per step",
        "d2cache       100.00",
        "2             100.00",
        "a step of d2cache: forward 30.00 ms, head 10.50 ms, the rest 59.50 ms",
    ]
    held = f"{bytes_of(5):,}"
    assert lines[7] == f"cache: 2 L B T G D numbers are {held} bytes, allocated {held}"
    assert lines[16:] == [
        "",
        "CURVE  the same model, response 8, batch 2",
        "ms per step of a decode, from its first steps: 3 of vanilla and 12 of d2cache",
        "prompt  vanilla ms  d2Cache ms  speed-up",
        "3             2.00        1.00      2.00",
        "floor: 3 GB/s (copy), 5.00 TFLOP/s (matrix product)",
    ]


def test_the_race_runs_as_the_command_line_says(monkeypatch, capsys):
    asked = stub_measuring(monkeypatch)
    line = ["--gen-length", 6, "--batch", 3, "--dtype", "float64", "--prompt-length", 4]
    line += ["--block-length", 2, "--policy", "x.py:Mine", "--device", "cpu"]
    args = arguments(*line)
    result = bench.report_race(args, "mine")
    plan = bench.speed_plan(6, 2) + bench.own_rows(args, "mine", 6)
    assert asked == [((3, 4), 6, plan, (3e9, 5e12), torch.float64)]
    assert "curve" not in result and result["speed"][0]["block length"] == 2
    assert "blocks of 2" in capsys.readouterr().out


def test_the_parts_are_those_of_a_replayed_step_where_there_is_one(monkeypatch):
    stub_measuring(monkeypatch)
    rows = [ROW | {"ms per step": 70.0}, ROW | {"policy": "d2cache, replayed"}]
    monkeypatch.setattr(bench, "speed_rows", lambda timings, batch: rows)
    model = bench.random_model(SMALL, "cpu", torch.float32)
    prompt = torch.ones(1, 3, dtype=torch.long)
    result = bench.report_speed(arguments(), "title", model, prompt, 8, (1, 1), None)
    assert result["d2cache step ms"]["the rest"] == 100 - 40.5


@pytest.mark.parametrize("line, batch", [([], 32), (["--model", "x"], 1), (["--batch", 5], 5)])
def test_quality_is_reported_as_printed(monkeypatch, capsys, line, batch):
    asked = []
    rows = [{"policy": "vanilla", "exact match": 0.5}]

    def measure_quality(model, tokenizer, problems, gen_length, plan, draw, batch):
        asked.append((model, tokenizer, problems, gen_length, plan, draw(), batch))
        return rows, {"d2Cache, by prior": "it is 7"}

    monkeypatch.setattr(bench, "measure_quality", measure_quality)
    args = arguments("--policy", "x.py:Mine", "--seed", 3, "--data", "d", "--shots", 2, *line)
    data = [("3 + 4?", "Question: 3 + 4?", "#### 7"), ("4 + 4?", "Question: 4 + 4?", "#### 8")]
    result = bench.report_quality(args, "title", "model", "tokenizer", data, 64, "mine")
    problems = [("Question: 3 + 4?", "#### 7"), ("Question: 4 + 4?", "#### 8")]
    plan = bench.quality_rows(64) + bench.own_rows(args, "mine", 64)
    assert asked == [("model", "tokenizer", problems, 64, plan, {}, batch)]
    assert result == {
        "model": "title",
        "problems": 2,
        "examples": 2,
        "response": 64,
        "block length": 16,
        "temperature": 0.0,
        "seed": 3,
        "rows": rows,
    }
    assert capsys.readouterr().out.splitlines() == [
        "A problem   3 + 4?",
        "d2Cache     it is 7",
        "The answer  #### 7",
        "",
        "QUALITY  title",
        "2 problems, 2 examples, response 64, blocks of 16, 1 token per step or all from the "
        "threshold on, temperature 0, 1 run; same text: as exact decoding in the same order",
        "policy   exact match",
        "vanilla        50.0%",
    ]
    data = [("Add.", "Add.", Program("", (), "def add"))]
    bench.report_quality(arguments("--block-length", 4, *line), "t", 0, 0, data, 64, None)
    assert "The answer  def add\n" in capsys.readouterr().out
    assert asked[1][4] == bench.quality_rows(64, 4)


def stub_reports(monkeypatch, said):
    """What `report` asks for, with a small model under every name."""
    model = bench.random_model(SMALL, "cpu", torch.float32)
    loaded = lambda *about: said.append(("load", *about)) or model  # noqa: E731
    monkeypatch.setattr(Transformer, "from_pretrained", loaded)
    monkeypatch.setattr(bench, "load_tokenizer", lambda *about: said.append(about) or "tokenizer")
    encode = lambda tokenizer, text: torch.tensor([[len(text) % 18, 2, 3]])  # noqa: E731
    monkeypatch.setattr(bench, "encode_prompt", encode)
    monkeypatch.setattr(bench, "describe", lambda model: "described")
    monkeypatch.setattr(bench, "machine_rates", lambda device, dtype: (3e9, 5e12))
    monkeypatch.setattr(bench, "decode_response", lambda tokenizer, r, ends: f"{len(r)} {ends}")
    monkeypatch.setattr(bench, "load_policy", lambda text: "policy " + text)
    monkeypatch.setattr(bench, "try_out", lambda *about: said.append(about[1:]))
    speed = lambda *about: said.append(("speed", *about[1:])) or "speed"  # noqa: E731
    monkeypatch.setattr(bench, "report_speed", speed)
    quality = lambda *about: said.append(("quality", *about[1:])) or "quality"  # noqa: E731
    monkeypatch.setattr(bench, "report_quality", quality)
    monkeypatch.setattr(bench, "report_race", lambda args, policy: {"race": policy})
    return model


def test_without_a_model_the_embedded_one_answers_and_random_weights_race(monkeypatch):
    said = []
    model = stub_reports(monkeypatch, said)
    args = arguments("--problems", 1, "--policy", "x.py:Mine", "--device", "cpu", "--gen-length", 8)
    assert bench.report(args) == {"quality": "quality", "race": "policy x.py:Mine"}
    tokenizer, load, tried, table = said
    assert tokenizer == (bench.EMBEDDED_MODEL, None)
    assert load == ("load", bench.EMBEDDED_MODEL, "cpu", None, None)
    assert tried[1:] == (64, bench.own_rows(args, "policy x.py:Mine", 64))
    title = "the embedded model: described"
    data = bench.read_data(args)
    assert table == ("quality", title, model, "tokenizer", data, 64, "policy x.py:Mine")


@pytest.mark.parametrize("length, flags", [(256, []), (8, ["--gen-length", 8, "--batch", 3])])
def test_a_checkpoint_is_loaded_once_and_answers_and_races(monkeypatch, capsys, length, flags):
    said = []
    model = stub_reports(monkeypatch, said)
    monkeypatch.setattr(model, "config", replace(SMALL, max_sequence_length=300))
    line = ["--model", "x", "--revision", "r", "--dtype", "float32", "--prompt", "Hello"]
    result = bench.report(arguments(*line, *flags, "--device", "cpu"))
    rates = {"copy bytes/s": 3e9, "matrix FLOP/s": 5e12}
    assert result == {"speed": ["speed"]} | rates
    tokenizer, load, tried, speed = said
    assert tokenizer == ("x", "r") and load == ("load", "x", "cpu", torch.float32, "r")
    assert tried[0].tolist() == [[5, 2, 3]] and tried[1:] == (length, [])
    assert speed[1] == "x: described" and speed[2] is model
    assert speed[3].tolist() == [[5, 2, 3]] * (3 if flags else 1)
    assert speed[4:] == (length, (3e9, 5e12), None)
    floor = "floor: 3 GB/s (copy), 5.00 TFLOP/s (matrix product)\n"
    answer = f"A prompt    Hello\nd2Cache     {length} (18,)\n\n"
    assert capsys.readouterr().out == answer + floor


def test_a_checkpoint_is_scored_where_there_is_data(monkeypatch, tmp_path, capsys):
    said = []
    model = stub_reports(monkeypatch, said)
    (tmp_path / "data").write_text('{"question": "a", "answer": "#### 1"}')
    args = arguments("--model", "x", "--data", tmp_path / "data", "--gen-length", 8)
    args.device = "cpu"
    assert bench.report(args)["quality"] == "quality"
    data = [("a", "a", "#### 1")]
    assert said[3] == ("quality", "x: described", model, "tokenizer", data, 8, None)
    assert capsys.readouterr().out.startswith(f"A prompt    {bench.EXAMPLE}\n")


def test_on_a_gpu_the_device_of_the_model_is_the_current_one(monkeypatch):
    said = []
    stub_reports(monkeypatch, said)
    weight = SimpleNamespace(is_cuda=True, device="cuda:1")
    model = SimpleNamespace(wte=SimpleNamespace(weight=weight))
    monkeypatch.setattr(Transformer, "from_pretrained", lambda *_: model)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    bench.report(arguments("--problems", 1))
    assert current == ["cuda:1"]


def run_main(monkeypatch, report, *line):
    monkeypatch.setattr(bench, "report", report)
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, line)])
    bench.main()


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("wrong\n  value"), "bench.py: error: wrong value\n"),
        (OSError("no disk"), "bench.py: error: no disk\n"),
        (MemoryError(), "bench.py: error: out of memory\n"),
        (RuntimeError("CUDA out of memory. Tried"), "bench.py: error: CUDA out of memory. Tried\n"),
    ],
)
def test_what_cannot_be_helped_is_one_line_and_exit_code_2(monkeypatch, capsys, error, said):
    def report(args):
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, report)
    assert end.value.code == 2
    assert capsys.readouterr().err == said


def test_a_bug_stays_a_bug(monkeypatch):
    def report(args):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        run_main(monkeypatch, report)


def test_the_numbers_are_written_to_the_file(monkeypatch, tmp_path):
    file = tmp_path / "x.json"
    run_main(monkeypatch, lambda args: {"a": [1.5]}, "--json", file)
    assert file.read_text() == '{\n  "a": [\n    1.5\n  ]\n}\n'
    run_main(monkeypatch, lambda args: {})


def test_what_the_terminal_cannot_show_is_written_as_its_code(monkeypatch):
    asked = []
    stdout = SimpleNamespace(reconfigure=lambda **to: asked.append(to))
    monkeypatch.setattr(bench.sys, "stdout", stdout)
    run_main(monkeypatch, lambda args: {})
    assert asked == [{"errors": "backslashreplace"}]
