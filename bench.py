"""Quality and speed of every policy, as tables: `python bench.py`.

Quality: the embedded model solves word problems it has not seen, under every policy in the order
that it was made for, then under controls that replace or leave out a part of d2Cache. Speed: random
weights at a size that suits the device, beside the floor: the time that reading the weights or the
arithmetic takes at the rates measured here. With --model, the speed of a real checkpoint, and with
--data too, its score.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path

from d2cache import EMBEDDED_MODEL, EXAMPLE, D2Cache, attention_rollout, certainty_prior
from d2cache import choose_positions, count_and_check, decode, generate, highest, load_policy
from d2cache import out_of_memory, pack, predict, recompute, settings
from model import Config, KVCache, Transformer, decode_response, encode_prompt
from model import load_tokenizer, require

import torch  # after model, which keeps its import quiet
import torch.nn.functional as F
from huggingface_hub.utils import tqdm

# ---- Settings ------------------------------------------------------------------------------------

PROBLEMS = EMBEDDED_MODEL / "problems.jsonl"
QUALITY_LENGTH = 64  # the response for which the embedded model is trained
THRESHOLDS = (0.9, 0.6)

RUNS = 3  # time so many decodes,
LONG_RUN = 5.0  # but no further one after so many seconds
FEW = 4  # steps of vanilla that are timed where they are slow, as they are all alike
CURVE_STEPS = {"vanilla": 3, "d2cache": 12}  # of a decode that are timed for the curve

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "float64": torch.float64,
}  # fmt: skip

FORMATS = {  # how the tables print a column
    "exact match": "{:.1%}", "pass@1": "{:.1%}", "standard error": "{:.1%}", "strict": "{:.1%}",
    "same text": "{:.1%}", "tokens per forward": "{:.2f}", "reused": "{:.1%}",
    "ms per step": "{:.2f}", "tokens/s": "{:.2f}", "speed-up": "{:.2f}", "floor ms": "{:.2f}",
    "x floor": "{:.2f}", "peak GiB": "{:.2f}", "vanilla ms": "{:.2f}", "d2Cache ms": "{:.2f}",
}  # fmt: skip

LLADA_8B_SHAPE = Config(
    d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288,
    vocab_size=126464, embedding_size=126464, max_sequence_length=4096, rope_theta=500000.0,
    rms_norm_eps=1e-5, mask_token_id=126336, eos_token_id=126081,
)  # fmt: skip
CPU_SHAPE = replace(  # an eighth as wide and a quarter as deep
    LLADA_8B_SHAPE, d_model=512, n_layers=8, n_heads=4, n_kv_heads=4, mlp_hidden_size=1536,
    vocab_size=15808, embedding_size=15808, mask_token_id=15792, eos_token_id=15760,
)  # fmt: skip
LLADA_8B_BYTES = 22e9  # weights 16 GB, cache 2.1, the first step's maps 2.1, and what is fleeting


@dataclass(frozen=True)
class Race:
    """What is timed without a checkpoint."""

    config: Config
    dtype: torch.dtype
    prompts: tuple  # lengths, a table for each
    curve: tuple  # lengths
    gen_length: int
    batch: int


LLADA_8B_RACE = Race(
    LLADA_8B_SHAPE, torch.bfloat16, prompts=(128, 896, 3840), curve=(), gen_length=256, batch=1
)
# On a CPU four sequences at once: one alone leaves small matrices, and waits for the memory.
CPU_RACE = Race(
    CPU_SHAPE, torch.float32, prompts=(384,), curve=(128, 384, 1024), gen_length=64, batch=4
)

# ---- Scores --------------------------------------------------------------------------------------

# Two scores, where they differ. Strict is lm-evaluation-harness's strict-match and OpenAI's own
# grader: the first "#### n" counts, and nothing else. Flexible takes the first n behind "####", in
# "\boxed{n}" or "answer is n", in this order, and without any of them the last number, which is
# what the harness's flexible-extract always takes. Both compare numbers: 29 is 29.00.
MARKS = (r"####", r"\\boxed\s*\{", r"\banswer(?: is:?|:)")
# A sign; a currency; digits in thousands or not. The minus of "3-5" is no sign.
NUMBER = (
    r"((?<![\w)\]}%.\-])[-\u2212])?"
    r"(?:\\?[$€£¥])?"
    r"(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
)


def final_number(text):
    """The Decimal that an answer comes to, by the flexible rule above; None without any number."""
    text = text.replace("{,}", ",")  # LaTeX's thousands
    for mark in MARKS:
        found = re.search(mark + r"[\s*]*" + NUMBER, text, re.IGNORECASE)
        if found:
            return as_number(*found.groups())
    numbers = re.findall(NUMBER, text)
    return as_number(*numbers[-1]) if numbers else None


def strict_number(text):
    """The Decimal behind the first "#### ", by the strict rule above; None without it."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return final_number(found[1]) if found else None


def as_number(sign, digits):
    """("-" or nothing, "1,234.5") -> Decimal"""
    number = Decimal(digits.replace(",", ""))
    return -number if sign else number


@dataclass(frozen=True)
class Program:
    """The answer to an MBPP task: what a program must pass, and the solution that the file has."""

    setup: str
    tests: tuple
    code: str | None


def read_problems(path, n):
    """The first n problems of a JSON-lines file: (question, answer), of MBPP (question, Program).

    Raises ValueError that names the line and what is wrong with it.
    """
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as UTF-8 ({error})") from error

    problems = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", content), 1):  # U+2028 ends no line
        if line.strip() and len(problems) < n:
            problems.append(read_problem(line, f"{path}, line {number}"))
    require(problems, f"{path}: holds no problems")

    programs = [isinstance(answer, Program) for _, answer in problems]
    said = f'{path}: mixes "answer" and "test_list", should have one of them in every line'
    require(all(programs) or not any(programs), said)
    return problems


def read_problem(line, where):
    """One line as (question, answer)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    require(isinstance(record, dict), f"{where}: {shown(record)} is no JSON object")

    if "test_list" in record:
        return read_program(record, where)
    question = text_of(record, "question", where)
    answer = text_of(record, "answer", where)
    said = f"{where}: the answer is {shown(answer)}, should end in #### and a number"
    require(final_number(answer) is not None, said)
    return question, answer


def read_program(record, where):
    """A line of MBPP, full ("text") or sanitised ("prompt"), as (question, Program).

    The question is lm-evaluation-harness's: the task, then the tests.
    """
    key = "text" if "text" in record else "prompt"
    task = text_of(record, key, where)
    tests = texts_of(record, "test_list", where)
    require(tests, f"{where}: test_list is empty, should hold a test")
    setup = texts_of(record, "test_imports", where)
    if record.get("test_setup_code"):  # of the full file, where most are empty
        setup.append(text_of(record, "test_setup_code", where))
    code = text_of(record, "code", where) if "code" in record else None

    listed = "\n".join(tests)
    question = (
        f"You are an expert Python programmer, and here is your task: {task} "
        f"Your code should pass these tests:\n\n{listed}\n[BEGIN]\n"
    )
    return question, Program("\n".join(setup), tuple(tests), code)


def text_of(record, key, where):
    """record[key] if that is a text with something in it, else ValueError."""
    require(key in record, f'{where}: has no "{key}"')
    return as_text(record[key], key, where)


def texts_of(record, key, where):
    """record[key] if that is a list of texts, [] if it is not there, else ValueError."""
    values = record.get(key, [])
    said = f"{where}: {key} is {shown(values)}, should be a list of texts"
    require(isinstance(values, list), said)
    return [as_text(value, key, where) for value in values]


def as_text(value, key, where):
    """The value, if it is a text with something in it, else ValueError."""
    said = f"{where}: {key} is {shown(value)}, should be text"
    require(isinstance(value, str) and value.strip(), said)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key} holds half a character ({error.reason})") from error
    return value


def shown(value):
    """A value of a JSON file, cut to what fits into a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def with_examples(examples, question):
    r"""The prompt: worked examples, if any, before the question, as lm-evaluation-harness has them.

    GSM8K: "Question: ...\nAnswer: ..." turns with an empty line between them, the last one open
    ("Answer:"); without examples the question alone. MBPP: tasks that end in "[BEGIN]\n", solutions
    in "\n[DONE]", an empty line between them. In a chat template all of it is the user's one turn.
    """
    turns = []
    for asked, answer in examples:
        if isinstance(answer, Program):
            turns.append(f"{asked}{answer.code}\n[DONE]\n\n")
        else:
            turns.append(f"Question: {asked}\nAnswer: {answer}\n\n")
    if turns and not isinstance(examples[0][1], Program):
        question = f"Question: {question}\nAnswer:"
    return "".join(turns) + question


def code_of(text):
    """The program in an answer: up to [DONE], and of that the first ``` block if there is one."""
    text = text.partition("[DONE]")[0].replace("[BEGIN]", "")
    fenced = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return fenced[1] if fenced else text


def is_right(text, answer):
    """Whether a response is right, and whether it is so strictly.  2 x bool"""
    if isinstance(answer, Program):
        right = runs(answer.setup + "\n" + code_of(text), answer.tests)
        return right, right
    said = text.partition("Question:")[0]  # a base model may go on with a question of its own
    number = final_number(answer)
    return final_number(said) == number, strict_number(said) == number


def runs(program, tests):
    """Whether a program passes its tests. It executes what a model wrote: for --run-code alone."""
    folder = str(EMBEDDED_MODEL.parent / "scoring")
    if folder not in sys.path:
        sys.path.append(folder)
    from run_code import passes

    return passes(program, tests)


def standard_error(share, n):
    """Of the share of n problems that were solved: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / n)


# ---- Quality -------------------------------------------------------------------------------------


class RandomStage1(D2Cache):
    """Control: as many masked positions as d2Cache takes, but any."""

    def about_to_be_decoded(self, state):
        return highest(torch.rand_like(state.confidence), state.masked, self.k)


class RandomStage2(D2Cache):
    """Control: as many known positions as d2Cache takes, but any."""

    def attended(self, state):
        n = super().attended(state).sum(dim=1, keepdim=True)
        return highest(torch.rand_like(state.confidence), state.known, n)


class WithoutStage2(D2Cache):
    """Control: of the known positions only those just decoded."""

    uses_attention = False

    def attended(self, state):
        return torch.zeros_like(state.known)


def both_orders(name, policy, gen_length, block_length):
    """(name, arguments of `decode`): in the order of the prior, and of confidence in blocks."""
    prior = {"sigma": settings(gen_length)["d2cache"]["sigma"]}
    blocks = {"block_length": block_length}
    return [
        (f"{name}, by prior", prior | {"policy": policy}),
        (f"{name}, in blocks", blocks | {"policy": policy}),
    ]


def quality_rows(gen_length, block_length=None):
    """(name, arguments of `decode`); vanilla, which is exact, comes first in every order."""
    ours = settings(gen_length)
    if block_length is None:
        block_length = ours["dual"]["block_length"]
    blocks = {"block_length": block_length}
    prior = {"sigma": ours["d2cache"]["sigma"]}
    d2cache = ours["d2cache"]["policy"]
    parts = vars(d2cache)  # k, p, sigma

    def orders(name, policy):
        return both_orders(name, policy, gen_length, block_length)

    rows = [
        ("vanilla, by confidence", {}),
        ("vanilla, in blocks", blocks),
        ("vanilla, by prior", prior),
        ("prefix cache, in blocks", ours["prefix"] | blocks),
        ("dual cache, in blocks", ours["dual"] | blocks),
        ("delayed cache, in blocks", ours["delayed"] | blocks),
    ]
    rows += orders("sliding window", ours["window"]["policy"])
    rows += orders("d2Cache", d2cache)
    rows += [("  stage 1 at random, by prior", prior | {"policy": RandomStage1(**parts)})]
    rows += orders("  stage 2 at random", RandomStage2(**parts))
    rows += orders("  without stage 2", WithoutStage2(**parts))
    for threshold in THRESHOLDS:
        parallel = prior | {"threshold": threshold}
        rows.append((f"vanilla, threshold {threshold}", parallel))
        rows.append((f"d2Cache, threshold {threshold}", parallel | {"policy": d2cache}))
    return rows


def left_padded(prompts):
    """Prompts (P,) of different length as one tensor, and its mask.  -> 2 x (B, longest P)"""
    longest = max(len(prompt) for prompt in prompts)
    padded = [F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    real = [F.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts]
    return torch.stack(padded), torch.stack(real)


def work_done(states, policy=None):
    """Forwards of each sequence, and its mean share of positions recomputed in them.  2 x (B,)

    A policy with a forward pass of its own may say what that recomputed, as shares of the layers.
    """
    chosen = torch.stack([state.chosen for state in states])  # (S, B, T)
    forwards = chosen.any(dim=2).sum(dim=0)  # a finished sequence chooses nothing
    recomputed = chosen
    if hasattr(policy, "recomputed"):
        recomputed = torch.stack(policy.recomputed)
    positions = torch.full_like(forwards, chosen.shape[2])
    if states[0].padding is not None:
        positions = positions - states[0].padding.sum(dim=1)
    return forwards, recomputed.sum(dim=(0, 2)) / (forwards * positions)


def solve(model, tokenizer, questions, gen_length, arguments, progress, batch):
    """Texts of the responses, mean forwards of a decode, mean share of positions recomputed."""
    prompts = [encode_prompt(tokenizer, question)[0] for question in questions]
    texts = []
    forwards = []
    shares = []
    for start in range(0, len(prompts), batch):
        prompt, mask = left_padded(prompts[start : start + batch])
        states = list(decode(model, prompt, gen_length, prompt_mask=mask, **arguments))
        for response in states[-1].tokens[:, prompt.shape[1] :]:
            texts.append(decode_response(tokenizer, response, model.config.end_ids))
        own_forwards, own_shares = work_done(states, arguments.get("policy"))
        forwards += own_forwards.tolist()
        shares += own_shares.tolist()
        progress.update(len(prompt))
    return texts, statistics.mean(forwards), statistics.mean(shares)


def quality_row(name, score, marks, texts, reference, gen_length, forwards, share):
    """A row of the quality table.

    marks: (right, strictly right) of each text; reference: the texts of exact decoding in the same
    order, None if these are they; forwards, share: means over the texts.
    """
    right = statistics.mean(flexible for flexible, _ in marks)
    same = None
    if reference is not None:
        same = statistics.mean(text == other for text, other in zip(texts, reference))
    return {
        "policy": name,
        score: right,
        "standard error": standard_error(right, len(marks)),
        "strict": statistics.mean(strict for _, strict in marks),
        "same text": same,
        "tokens per forward": gen_length / forwards,
        "reused": 1 - share,
    }


def measure_quality(model, tokenizer, problems, gen_length, plan, sampled, batch):
    """Rows of the quality table; and what each row of the plan answers to the first problem.

    problems: (prompt, answer); plan: (name, arguments of `decode`) as of quality_rows; sampled():
    the arguments that draw tokens, anew for every row.
    """
    prompts, answers = zip(*problems)
    score = "pass@1" if isinstance(answers[0], Program) else "exact match"
    rows = []
    samples = {}
    exact = {}  # texts by order
    with tqdm(total=len(plan) * len(problems), desc="quality", unit="decode") as progress:
        for name, arguments in plan:
            drawn = arguments | sampled()
            texts, forwards, share = solve(
                model, tokenizer, prompts, gen_length, drawn, progress, batch
            )
            samples[name] = texts[0]
            order = tuple(arguments.get(key) for key in ("block_length", "sigma", "threshold"))
            reference = exact.get(order)
            exact.setdefault(order, texts)
            marks = [is_right(text, answer) for text, answer in zip(texts, answers)]
            rows.append(
                quality_row(name, score, marks, texts, reference, gen_length, forwards, share)
            )
    if all(row["strict"] == row[score] for row in rows):
        for row in rows:
            del row["strict"]
    return rows, samples


# ---- Speed ---------------------------------------------------------------------------------------


def random_model(config, device, dtype):
    """A model of random weights under which attention is neither uniform nor one-hot."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    random = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1)
        elif name == "wte.weight":
            weight.normal_(generator=random)
        else:
            gain = 1.5 if "q_proj" in name or "k_proj" in name else 1.0
            weight.normal_(std=gain / weight.shape[1] ** 0.5, generator=random)
    return model


def timed(function):
    """Seconds that function() takes, from an idle device to an idle one, and its result."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def least_seconds(function, repeats):
    """The shortest time that a function took, after a warm-up."""
    function()
    return min(timed(function)[0] for _ in range(repeats))


def machine_rates(device, dtype):
    """Bytes/s of a copy, read and written, and FLOP/s of a matrix product, as measured now."""
    n = 8192 if device.startswith("cuda") else 2048
    source = torch.randn(4 * n, n, device=device, dtype=dtype)
    target = torch.empty_like(source)
    square = source[:n]
    copy = least_seconds(lambda: target.copy_(source), repeats=10)
    product = least_seconds(lambda: square @ square, repeats=10)
    return 2 * source.nbytes / copy, 2 * n**3 / product


def row_counts(states):
    """(Q, R) of every step: the rows it recomputed, in all sequences, and those it predicted."""
    counts = []
    for state in states:
        predicted = state.chosen & (state.masked | state.fresh)  # masked before this step's commit
        counts.append((state.chosen.sum().item(), predicted.sum().item()))
    return counts


def floor_seconds(model, T, counts, rates):
    """Mean over steps of the least each can take: to read all weights, or for the arithmetic."""
    config = model.config
    bandwidth, flops = rates
    in_blocks = sum(weight.numel() for weight in model.blocks.parameters())
    in_head = model.wte.weight.numel()
    in_attention = 2 * config.n_layers * config.d_model * T  # query x key, weight x value
    reading = (in_blocks + in_head) * model.wte.weight.element_size() / bandwidth
    seconds = []
    for Q, R in counts:
        work = 2 * ((in_blocks + in_attention) * Q + in_head * R)
        seconds.append(max(reading, work / flops))
    return statistics.mean(seconds)


def cache_bytes(config, B, T, element_size):
    """What keys and values of all positions take: 2 L B T G D numbers."""
    return 2 * config.n_layers * B * T * config.n_kv_heads * config.head_dim * element_size


def allocated_bytes(cache):
    """What a cache holds of the device's memory."""
    storages = [tensor.untyped_storage() for tensor in (cache.k, cache.v)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Timing:
    """What was measured of a policy's decodes."""

    policy: str
    seconds: list  # of each decode
    steps: int  # in a decode, as timed
    share: float  # of positions recomputed
    floor: float  # seconds a step
    peak: int | None = None  # bytes of GPU memory


def speed_rows(timings, batch):
    """Rows of the speed table, at one token per step and sequence; the first one sets the pace."""
    rows = []
    for timing in timings:
        step = statistics.median(timing.seconds) / timing.steps
        rate = batch / step
        first = rows[0]["tokens/s"] if rows else rate
        peak = None if timing.peak is None else timing.peak / 2**30
        rows.append(
            {
                "policy": timing.policy,
                "reused": 1 - timing.share,
                "ms per step": 1000 * step,
                "tokens/s": rate,
                "speed-up": rate / first,
                "floor ms": 1000 * timing.floor,
                "x floor": step / timing.floor,
                "peak GiB": peak,
                "runs": len(timing.seconds),
            }
        )
    return rows


def speed_plan(gen_length, block_length=None):
    """(name, arguments of `decode`), vanilla first."""
    plan = []
    for name, arguments in settings(gen_length).items():
        if block_length is not None and "block_length" in arguments:
            arguments = arguments | {"block_length": block_length}
        plan.append((name, arguments))
    return plan


def launched(model, plan):
    """The plan; on a GPU every row twice, its steps launched one by one, then replayed.

    But not if the policy brings a forward pass of its own, which `decode` prefers to any other.
    """
    for name, arguments in plan:
        yield name, arguments
        if model.wte.weight.is_cuda and not hasattr(arguments["policy"], "recompute"):
            yield f"{name}, replayed", arguments | {"forward": CudaGraphs(model).recompute}


def time_decodes(model, prompt, gen_length, arguments):
    """Seconds of each timed decode, prompt on the device to tokens on the host; its states."""

    def run():
        states = list(decode(model, prompt, gen_length, **arguments))
        states[-1].tokens.cpu()
        return states

    if prompt.is_cuda:  # kernels are chosen and graphs are captured when first used
        run()
        torch.cuda.reset_peak_memory_stats()
    seconds, states = timed(run)
    times = [seconds]
    while len(times) < RUNS and sum(times) < LONG_RUN:
        times.append(timed(run)[0])
    return times, states


def measure_speed(model, prompt, gen_length, plan, rates):
    """A Timing of each row of the plan, and the states of d2Cache's decode.

    Vanilla's steps are all alike: where they are slow, it commits so many tokens in each that FEW
    steps are timed. Its row is that of one token per step.
    """
    timings = []
    ours = None
    one_step = least_seconds(lambda: next(decode(model, prompt, gen_length)), repeats=1)
    slow = gen_length * one_step > LONG_RUN
    rows = 2 * len(plan) if prompt.is_cuda else len(plan)
    for name, arguments in tqdm(launched(model, plan), "speed", rows, unit="policy"):
        if slow and name.startswith("vanilla"):
            arguments = arguments | {"tokens_per_step": math.ceil(gen_length / FEW)}
        times, states = time_decodes(model, prompt, gen_length, arguments)
        peak = torch.cuda.max_memory_allocated() if prompt.is_cuda else None
        _, shares = work_done(states, arguments.get("policy"))
        timings.append(
            Timing(
                policy=name,
                seconds=times,
                steps=len(states),
                share=shares.mean().item(),
                floor=floor_seconds(model, states[0].known.shape[1], row_counts(states), rates),
                peak=peak,
            )
        )
        if name == "d2cache":
            ours = states
    return timings, ours


def mean_step(seconds, steps):
    """Seconds per step of a decode of so many, of which the first ones took `seconds`."""
    first, *later = seconds
    return (first + (steps - 1) * statistics.mean(later or [first])) / steps


def curve_row(prompt_length, seconds, gen_length):
    """A row of the curve; seconds: of the first steps of "vanilla" and of "d2cache"."""
    vanilla = mean_step(seconds["vanilla"], gen_length)
    ours = mean_step(seconds["d2cache"], gen_length)
    return {
        "prompt": prompt_length,
        "vanilla ms": 1000 * vanilla,
        "d2Cache ms": 1000 * ours,
        "speed-up": vanilla / ours,
    }


def measure_curve(model, prompts, gen_length):
    """Rows of the curve: a step of vanilla and of d2Cache after longer and longer prompts."""
    rows = []
    for prompt in tqdm(prompts, desc="curve", unit="prompt"):
        seconds = {}
        for name, most in CURVE_STEPS.items():
            steps = decode(model, prompt, gen_length, **settings(gen_length)[name])
            first_steps = range(min(most, gen_length))
            seconds[name] = [timed(partial(next, steps))[0] for _ in first_steps]
        rows.append(curve_row(prompt.shape[1], seconds, gen_length))
    return rows


def measure_parts(model, gen_length, states):
    """Milliseconds that the parts of a d2Cache step take, half-way through, each timed alone.

    On a GPU the model's parts as replays. What a step takes beyond their sum are the commit, gaps
    between launches, and its part of the first step, which recomputes everything.
    """
    policy = settings(gen_length)["d2cache"]["policy"]
    state = states[(len(states) - 1) // 2]
    shifted = model.config.shifted
    chosen, predicted = choose_positions(policy, state, shifted)
    Q, R = count_and_check(policy, state, chosen, predicted)
    positions, valid = pack(chosen, predicted, Q)
    graphs = CudaGraphs(model)
    if chosen.is_cuda:
        positions, valid, R = graphs.round_up(positions, valid, R, chosen.shape[1])
    weight = model.wte.weight
    cache = KVCache(model.config, *chosen.shape, weight.device, weight.dtype)
    hidden, maps = model.hidden_states(state.tokens, positions, cache, return_attention=True)

    def forward(return_attention):
        return model.hidden_states(state.tokens, positions, cache, return_attention)

    def select():
        attention_rollout(maps, positions, valid)
        certainty_prior(state.confidence, state.known, policy.sigma)  # once more, for the commit
        chosen, predicted = choose_positions(policy, state, shifted)
        Q, _ = count_and_check(policy, state, chosen, predicted)
        pack(chosen, predicted, Q)

    def milliseconds(function):
        replayed = chosen.is_cuda and function is not select  # which is launched kernel by kernel
        if replayed:
            function = graphs.capture(function)[0].replay
        return 1000 * least_seconds(function, repeats=5)

    forward_time = milliseconds(partial(forward, False))
    maps_time = milliseconds(partial(forward, True)) - forward_time
    return {
        "forward": forward_time,
        "attention maps": max(0.0, maps_time),
        "head": milliseconds(lambda: predict(model.head(hidden[:, :R]), model.config)),
        "selection": milliseconds(select),
    }


# ---- CUDA graphs ---------------------------------------------------------------------------------


class CudaGraphs:
    """Replays d2cache.recompute as CUDA graphs, one launch for the model's thousand.

    It plugs in as decode(model, ..., forward=CudaGraphs(model).recompute). A graph fixes sizes and
    addresses. So Q and R are rounded up to multiples of `bucket` (more repeats change results by
    round-off at most); each pair of sizes gets a graph when it first occurs; and of each shape
    (B, T) the first cache stays, and takes the place of the one that a later decode brings. What an
    earlier decode left in there is never read: the first step of a decode recomputes everything.
    One decode at a time.
    """

    def __init__(self, model, bucket=32):
        self.model = model
        self.bucket = bucket
        self.caches = {}
        self.graphs = {}
        self.pool = None

    def recompute(self, model, cache, R, uses_attention, tokens, positions, valid, padding):
        """What d2cache.recompute gives, for the same arguments."""
        require(model is self.model, "model is another than the one that CudaGraphs was made for")
        B, T = tokens.shape
        cache = self.caches.setdefault((B, T), cache)
        if uses_attention and positions.shape[1] == T:  # a graph would keep its T x T maps
            return recompute(model, cache, R, uses_attention, tokens, positions, valid, padding)

        positions, valid, rows = self.round_up(positions, valid, R, T)
        inputs = [tokens, positions, valid]
        if padding is not None:
            inputs.append(padding)
        kind = (B, T, positions.shape[1], rows, uses_attention, len(inputs))
        if kind not in self.graphs:
            self.graphs[kind] = self.graph_of(model, cache, rows, uses_attention, inputs)
        own, graph, (logits, influence) = self.graphs[kind]

        for tensor, value in zip(own, inputs):
            tensor.copy_(value)
        graph.replay()
        return logits[:, :R], influence

    def round_up(self, positions, valid, R, T):
        """What `pack` gives and R, for the sizes of a graph."""
        Q = positions.shape[1]
        more = min(T, math.ceil(Q / self.bucket) * self.bucket) - Q
        rows = min(T, math.ceil(R / self.bucket) * self.bucket)
        repeats = positions[:, :1].expand(-1, more)
        return torch.cat([positions, repeats], dim=1), F.pad(valid, (0, more)), rows

    def graph_of(self, model, cache, rows, uses_attention, inputs):
        """The tensors that a graph reads, the graph, and the tensors that it leaves results in."""
        own = [tensor.clone() for tensor in inputs]
        tokens, positions, valid, *padding = own
        padding = padding[0] if padding else None
        arguments = (model, cache, rows, uses_attention, tokens, positions, valid, padding)
        return own, *self.capture(lambda: recompute(*arguments))

    def capture(self, run):
        """A graph of what run() launches, and the tensors that a replay leaves its results in."""
        graph = torch.cuda.CUDAGraph()
        # Sharing memory is safe: the results of one graph are used up before the next is replayed.
        with torch.cuda.device(self.model.wte.weight.device):
            run()  # what kernels do when they are first used cannot be captured
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = run()
        self.pool = graph.pool()
        return graph, outputs


# ---- Tables --------------------------------------------------------------------------------------


def cell(column, value):
    """A value as the tables print it; "-" where it was not measured."""
    if value is None:
        return "-"
    return FORMATS.get(column, "{}").format(value)


def table_lines(rows):
    """Rows, dicts by column, as aligned lines: the first column left, the others right."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([cell(column, value) for column, value in row.items()])
    widths = [max(len(text) for text in column) for column in zip(*cells)]

    lines = []
    for first, *others in cells:
        aligned = [first.ljust(widths[0])]
        aligned += [text.rjust(width) for text, width in zip(others, widths[1:])]
        lines.append("  ".join(aligned).rstrip())
    return lines


def print_table(rows):
    """Rows, dicts by column, on stdout."""
    print("\n".join(table_lines(rows)))


def describe(model):
    """Size, precision and device, for a table's header."""
    weight = model.wte.weight
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    device = f"CPU, {torch.get_num_threads()} threads"
    if weight.is_cuda:
        device = torch.cuda.get_device_name(weight.device)
    return f"{millions:,.1f} M parameters, {weight.dtype}, {device}, torch {torch.__version__}"


# ---- The command line ----------------------------------------------------------------------------


def make_parser():
    """The command line."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="checkpoint folder or hub id instead of the embedded model")
    add("--revision", help="of the hub's repository: branch, tag or commit")
    add("--dtype", choices=DTYPES, help="instead of the checkpoint's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")

    add = parser.add_argument_group("quality").add_argument
    add("--data", help="JSON lines to score, as GSM8K or MBPP has them")
    add("--problems", type=int, default=32, help="how many of them (32)")
    add("--shots", type=int, default=0, help="so many pairs before them are worked examples (0)")
    add("--run-code", action="store_true", help="MBPP: EXECUTE HERE what the model wrote")
    add("--temperature", type=float, default=0.0, help="draw tokens (0: take the likeliest)")
    add("--seed", type=int, default=0, help="of these draws and of the controls (0)")

    add = parser.add_argument_group("speed").add_argument
    add("--prompt", help="with --model: the text to answer and to time")
    add("--prompt-length", type=int, help="without: of the random prompt")

    add = parser.add_argument_group("both").add_argument
    add("--gen-length", type=int, help="tokens to decode; the embedded model always answers in 64")
    add("--block-length", type=int, help="of the rows in blocks")
    add("--batch", type=int, help="sequences decoded at once")
    add("--policy", help="FILE.py:Name or FILE.py:Name(k=8), to be compared with the others")
    add("--json", help="write the same numbers to this file")
    return parser


def check(args):
    """ValueError, in a line, for arguments that cannot be meant; before any work."""
    for flag in ("problems", "prompt_length", "block_length", "batch"):
        value = getattr(args, flag)
        name = flag.replace("_", "-")
        require(value is None or value >= 1, f"--{name} is {value}, should be at least 1")
    require(args.shots >= 0, f"--shots is {args.shots}, should be at least 0")
    said = f"--temperature is {args.temperature}, should be at least 0"
    require(0 <= args.temperature < math.inf, said)
    require(0 <= args.seed < 2**63, f"--seed is {args.seed}, should be from 0 to 2^63 - 1")

    require(args.model or args.revision is None, "--revision needs --model")
    require(args.model or args.prompt is None, "--prompt needs --model")
    said = "--prompt-length is of a random prompt, --model takes --prompt"
    require(not args.model or args.prompt_length is None, said)
    require(args.data or not args.shots, "--shots needs --data")
    require(args.data or not args.run_code, "--run-code needs --data")
    said = "--run-code needs Linux, whose limit on memory it is tried with"
    require(not args.run_code or sys.platform == "linux", said)
    least = args.gen_length is None or args.gen_length >= 2
    require(least, f"--gen-length is {args.gen_length}, should be at least 2")
    lengths = [args.gen_length or 256] if args.model else [QUALITY_LENGTH, args.gen_length or 64]
    for length in lengths:
        divides = args.block_length is None or length % args.block_length == 0
        said = f"--block-length is {args.block_length}, should divide the response's {length}"
        require(divides, said)
    if args.json:
        is_new = not Path(args.json).exists()
        open(args.json, "a").close()  # an OSError says why it cannot be written
        if is_new:
            os.remove(args.json)


def read_data(args):
    """(question, prompt, answer) of every problem to score."""
    path = args.data or PROBLEMS
    problems = read_problems(path, args.shots + args.problems)
    examples = problems[: args.shots]
    scored = problems[args.shots :]
    require(scored, f"--shots is {args.shots}, but {path} holds no more than these")

    programs = isinstance(scored[0][1], Program)
    said = f"{path} asks for programs: to score them is to execute what the model writes here"
    require(args.run_code or not programs, f"{said}; --run-code does it")
    require(programs or not args.run_code, f"--run-code: {path} asks for no programs")
    for number, (_, answer) in enumerate(examples, 1):
        said = f'{path}: example {number} of --shots has no "code"'
        require(not programs or answer.code is not None, said)
    return [(question, with_examples(examples, question), answer) for question, answer in scored]


def sampling(args):
    """Arguments of `decode` that draw tokens, if any are drawn; chance starts anew."""
    torch.manual_seed(args.seed)  # of the controls
    if args.temperature == 0:
        return {}
    generator = torch.Generator(args.device).manual_seed(args.seed)
    return {"temperature": args.temperature, "generator": generator}


def own_rows(args, policy, gen_length):
    """(name, arguments of `decode`) of the policy of --policy, if any, in both orders."""
    if policy is None:
        return []
    name = args.policy.partition(".py:")[2]
    return both_orders(name, policy, gen_length, block_length_of(args, gen_length))


def block_length_of(args, gen_length):
    """That of the rows in blocks."""
    return args.block_length or settings(gen_length)["dual"]["block_length"]


def try_out(model, prompt, gen_length, rows):
    """ValueError, with the step, for a policy that breaks its contract or fails; before work."""
    for name, arguments in rows:
        asked = 2  # the first step asks nobody
        try:
            for state in decode(model, prompt, gen_length, **arguments):
                asked = state.step + 2  # a state is there once the policy has chosen what is next
        except ValueError:
            raise  # names policy and step
        except Exception as error:
            said = f"policy {name} fails in step {asked}: {type(error).__name__}: {error}"
            raise ValueError(said) from error


def report_quality(args, title, model, tokenizer, data, gen_length, policy):
    """Print a sample and the quality table; the same as a dict."""
    plan = quality_rows(gen_length, args.block_length) + own_rows(args, policy, gen_length)
    problems = [(prompt, answer) for _, prompt, answer in data]
    batch = args.batch
    if batch is None:
        batch = 1 if args.model else 32  # of a large model, memory may hold one
    draw = partial(sampling, args)
    rows, samples = measure_quality(model, tokenizer, problems, gen_length, plan, draw, batch)

    question, _, answer = data[0]
    if isinstance(answer, Program):
        answer = answer.code
    block_length = block_length_of(args, gen_length)
    print(f"A problem   {question}\nd2Cache     {samples['d2Cache, by prior']}")
    print(f"The answer  {answer}\n")
    print(f"QUALITY  {title}")
    print(
        f"{len(data)} problems, {args.shots} examples, response {gen_length}, blocks of "
        f"{block_length}, 1 token per step or all from the threshold on, temperature "
        f"{args.temperature:g}, 1 run; same text: as exact decoding in the same order"
    )
    print_table(rows)
    return {
        "model": title,
        "problems": len(data),
        "examples": args.shots,
        "response": gen_length,
        "block length": block_length,
        "temperature": args.temperature,
        "seed": args.seed,
        "rows": rows,
    }


def report_speed(args, title, model, prompt, gen_length, rates, policy):
    """Print the speed table of one prompt, and where a step of d2Cache goes; the same as a dict.

    The parts of a step are timed as replays where there are any.
    """
    B, P = prompt.shape
    plan = speed_plan(gen_length, args.block_length) + own_rows(args, policy, gen_length)
    timings, states = measure_speed(model, prompt, gen_length, plan, rates)
    rows = speed_rows(timings, B)
    parts = measure_parts(model, gen_length, states)
    steps = {row["policy"]: row["ms per step"] for row in rows}
    step = steps.get("d2cache, replayed", steps["d2cache"])
    parts["the rest"] = step - sum(parts.values())

    weight = model.wte.weight
    formula = cache_bytes(model.config, B, P + gen_length, weight.element_size())
    cache = KVCache(model.config, B, P + gen_length, weight.device, weight.dtype)
    held = allocated_bytes(cache)
    block_length = block_length_of(args, gen_length)
    print(f"\nSPEED  {title}")
    print(
        f"prompt {P}, response {gen_length}, batch {B}, caches in blocks of {block_length}, 1 token"
        " per step, median of the runs; of a slow vanilla a few steps"
    )
    print_table(rows)
    print("a step of d2cache:", ", ".join(f"{part} {ms:.2f} ms" for part, ms in parts.items()))
    print(f"cache: 2 L B T G D numbers are {formula:,} bytes, allocated {held:,}")
    return {
        "model": title,
        "prompt": P,
        "response": gen_length,
        "batch": B,
        "block length": block_length,
        "rows": rows,
        "d2cache step ms": parts,
        "cache bytes": {"formula": formula, "allocated": held},
    }


def report_curve(model, prompts, gen_length):
    """Print the curve over prompt lengths; its rows."""
    rows = measure_curve(model, prompts, gen_length)
    counts = " and ".join(f"{n} of {name}" for name, n in CURVE_STEPS.items())
    print(f"\nCURVE  the same model, response {gen_length}, batch {len(prompts[0])}")
    print(f"ms per step of a decode, from its first steps: {counts}")
    print_table(rows)
    return rows


def report_answer(model, tokenizer, text, gen_length):
    """Print what d2Cache answers to a text."""
    prompt = encode_prompt(tokenizer, text)
    tokens = generate(model, prompt, gen_length, **settings(gen_length)["d2cache"])
    answer = decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.end_ids)
    print(f"A prompt    {text}\nd2Cache     {answer}\n")


def race_of(device):
    """What to time without a checkpoint, and what to say of it."""
    gpu = device.startswith("cuda")
    race = CPU_RACE
    if gpu and torch.cuda.mem_get_info(device)[0] > LLADA_8B_BYTES:
        race = LLADA_8B_RACE
    name = f"random weights, {race.config.n_layers} layers of {race.config.d_model}"
    if gpu and race is CPU_RACE:
        name += f" (LLaDA-8B's shape wants {LLADA_8B_BYTES / 1e9:.0f} GB of free GPU memory)"
    return race, name


def random_prompts(config, lengths, batch, device):
    """A prompt (batch, length) of random ids for each of the lengths."""
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, length) for length in lengths]
    prompts = [torch.randint(config.eos_token_id, shape, generator=random) for shape in shapes]
    return [prompt.to(device) for prompt in prompts]


def report_race(args, policy):
    """The speed tables of random weights, and the curve; the same as a dict."""
    race, name = race_of(args.device)
    if args.gen_length:
        race = replace(race, gen_length=args.gen_length)
    if args.batch:
        race = replace(race, batch=args.batch)
    if args.dtype:
        race = replace(race, dtype=DTYPES[args.dtype])
    if args.prompt_length:
        race = replace(race, prompts=(args.prompt_length,), curve=())

    model = random_model(race.config, args.device, race.dtype)
    title = f"{name}: {describe(model)}"
    rates = machine_rates(args.device, race.dtype)
    speed = []
    for prompt in random_prompts(race.config, race.prompts, race.batch, args.device):
        speed.append(report_speed(args, title, model, prompt, race.gen_length, rates, policy))
    result = {"speed": speed}
    if race.curve:
        prompts = random_prompts(race.config, race.curve, race.batch, args.device)
        result["curve"] = report_curve(model, prompts, race.gen_length)
    return result | report_rates(rates)


def report_rates(rates):
    """Print what the floor is reckoned with; the same as a dict."""
    bandwidth, flops = rates
    copy = f"{bandwidth / 1e9:,.0f} GB/s (copy)"
    print(f"floor: {copy}, {flops / 1e12:,.2f} TFLOP/s (matrix product)")
    return {"copy bytes/s": bandwidth, "matrix FLOP/s": flops}


def report(args):
    """Everything the command line asks for, printed; the same as a dict."""
    check(args)
    policy = load_policy(args.policy) if args.policy else None
    source = args.model or EMBEDDED_MODEL
    data = read_data(args) if args.data or not args.model else []
    tokenizer = load_tokenizer(source, args.revision)
    text = args.prompt or EXAMPLE
    prompt = encode_prompt(tokenizer, text)  # which may be refused, before the weights are read
    dtype = DTYPES[args.dtype] if args.dtype else None
    model = Transformer.from_pretrained(source, args.device, dtype, args.revision)
    if model.wte.weight.is_cuda:
        torch.cuda.set_device(model.wte.weight.device)  # the one to wait for and to measure
    title = f"{args.model or 'the embedded model'}: {describe(model)}"
    gen_length = QUALITY_LENGTH
    if args.model:
        gen_length = args.gen_length or 256
    try_out(model, prompt, gen_length, own_rows(args, policy, gen_length))

    result = {}
    if data:
        table = report_quality(args, title, model, tokenizer, data, gen_length, policy)
        result["quality"] = table
    if not args.model:
        return result | report_race(args, policy)

    report_answer(model, tokenizer, text, gen_length)
    prompt = prompt.repeat(args.batch or 1, 1).to(args.device)
    rates = machine_rates(args.device, model.wte.weight.dtype)
    speed = report_speed(args, title, model, prompt, gen_length, rates, policy)
    return result | {"speed": [speed]} | report_rates(rates)


def main():
    """Quality and speed of every policy, as tables; progress goes to stderr."""
    parser = make_parser()
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show every answer
    try:
        result = report(args)
        if args.json:
            text = json.dumps(result, indent=2) + "\n"
            Path(args.json).write_text(text, encoding="utf-8")
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        parser.error(" ".join(str(error).split()) or "out of memory")


if __name__ == "__main__":
    main()
