"""Quality and speed of every policy, as two tables: `python bench.py`.

Quality: the embedded model solves word problems it has not seen. Score, agreement with exact
decoding in the same order, and how many positions were recomputed for it; with two controls that
cost the same and replace one stage of d2Cache by chance. Speed: random weights at a size that suits
the device, beside the floor: the time that reading the weights or the arithmetic takes at the rates
measured here. With --model, a real checkpoint instead of both.
"""

import argparse
import itertools
import json
import re
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from d2cache import EMBEDDED_MODEL, EXAMPLE, CudaGraphs, D2Cache, attention_rollout, best
from d2cache import certainty_prior, generate, new_cache, pack, predict, settings
from model import Config, Transformer, decode_response, encode_prompt, load_tokenizer

import torch  # after model, which keeps its import quiet
from huggingface_hub.utils import tqdm

RUNS, LONG_RUN = 3, 5.0  # time so many decodes, but only one if it takes longer (seconds)
QUALITY_LENGTH = 64  # the response for which the embedded model is trained
PROBLEMS = EMBEDDED_MODEL / "problems.jsonl"
FORMAT = {  # of each column; what is not measured prints as "-"
    "policy": "{}",
    "exact match": "{:.1%}",
    "same text": "{:.1%}",
    "forwards": "{:.0f}",
    "recomputed": "{:.1%}",
    "ms per step": "{:.1f}",
    "tokens/s": "{:.1f}",
    "speed-up": "{:.2f}x",
    "floor ms": "{:.1f}",
    "x floor": "{:.1f}",
    "peak GiB": "{:.1f}",
    "runs": "{}",
}

LLADA_8B_SHAPE = Config(
    d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288,
    vocab_size=126464, embedding_size=126464, max_sequence_length=4096, rope_theta=500000.0,
    rms_norm_eps=1e-5, mask_token_id=126336, eos_token_id=126081,
)  # fmt: skip
CPU_SHAPE = replace(  # an eighth as wide and a quarter as deep
    LLADA_8B_SHAPE, d_model=512, n_layers=8, n_heads=4, n_kv_heads=4, mlp_hidden_size=1536,
    vocab_size=15808, embedding_size=15808, mask_token_id=15792, eos_token_id=15760,
)  # fmt: skip
LLADA_8B_BYTES = 20e9  # 16 GB of weights, and the cache and the first step's maps beside them


class RandomStage1(D2Cache):
    """Control: as many masked positions as d2Cache takes, but any."""

    def about_to_be_decoded(self, state):
        return best(torch.rand_like(state.confidence), ~state.known, self.k)


class RandomStage2(D2Cache):
    """Control: as many known positions as d2Cache takes, but any."""

    def attended(self, state):
        n = super().attended(state).sum(dim=1, keepdim=True)
        return best(torch.rand_like(state.confidence), state.known, n)


def quality_rows(gen_length):
    """(name, arguments of `generate`); every exact decoding comes before those that imitate it."""
    ours = settings(gen_length)
    d2cache, blocks = ours["d2cache"], {"block_length": ours["dual"]["block_length"]}
    k, p, sigma = d2cache["policy"].k, d2cache["policy"].p, d2cache["sigma"]
    return [
        ("vanilla, by confidence", {}),
        ("vanilla, in blocks", blocks),
        ("vanilla, by certainty prior", {"sigma": sigma}),
        ("prefix cache, in blocks", ours["prefix"]),
        ("dual cache, in blocks", ours["dual"]),
        ("d2Cache", d2cache),
        ("  with stage 1 at random", {"policy": RandomStage1(k, p, sigma), "sigma": sigma}),
        ("  with stage 2 at random", {"policy": RandomStage2(k, p, sigma), "sigma": sigma}),
    ]


def read_problems(path, n):
    """The first n (question, answer) pairs of a JSON-lines file; ValueError names a bad line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[:n]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error
    problems = []
    for number, line in enumerate(lines, 1):
        try:
            problem = json.loads(line)
            question, answer = problem["question"], problem["answer"]
        except (ValueError, KeyError, TypeError) as error:
            shape = '{"question": ..., "answer": ...}'
            raise ValueError(f"{path}, line {number}: should be {shape}") from error
        if final_number(answer) is None:
            raise ValueError(f"{path}, line {number}: the answer {answer!r} ends in no number")
        problems.append((question, answer))
    if not problems:
        raise ValueError(f"{path}: holds no problems")
    return problems


def final_number(text):
    """The number after "####", GSM8K's mark of the answer, else the last one; None without any."""
    before, mark, after = text.partition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", after if mark else before)
    return numbers[0 if mark else -1].replace(",", "") if numbers else None


def decode(model, prompt, gen_length, arguments):
    """Tokens on the host, and the (state, chosen) of every step."""
    steps = []
    observe = lambda state, chosen: steps.append((state, chosen))  # noqa: E731
    return generate(model, prompt, gen_length, on_step=observe, **arguments).cpu(), steps


def solve(model, tokenizer, questions, gen_length, arguments, progress):
    """Texts of the responses, forwards of a decode, and the share of positions recomputed.

    Neighbours with prompts of equal length decode as one batch.
    """
    texts, forwards, shares = [], 0, []
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    for length, same_length in itertools.groupby(prompts, key=lambda prompt: prompt.shape[1]):
        tokens, steps = decode(model, torch.cat(list(same_length)), gen_length, arguments)
        for response in tokens[:, length:]:
            texts.append(decode_response(tokenizer, response, model.config.eos_token_id))
        forwards += len(steps) * len(tokens)
        recomputed = torch.stack([chosen for _, chosen in steps])
        shares += recomputed.float().mean(dim=(0, 2)).tolist()
        progress.update(len(tokens))
    return texts, forwards / len(questions), statistics.mean(shares)


def measure_quality(model, tokenizer, problems, gen_length):
    """Rows of the quality table, dicts by column; and d2Cache's answer to the first problem."""
    questions, answers = zip(*problems)
    numbers = [final_number(answer) for answer in answers]
    rows, exact, sample, plan = [], {}, None, quality_rows(gen_length)
    with tqdm(total=len(plan) * len(problems), desc="quality", unit="decode") as progress:
        for name, arguments in plan:
            torch.manual_seed(0)  # of the controls
            texts, *work = solve(model, tokenizer, questions, gen_length, arguments, progress)
            order = arguments.get("block_length"), arguments.get("sigma")
            reference = exact.setdefault(order, texts)  # vanilla comes first in every order
            right = [final_number(text) == number for text, number in zip(texts, numbers)]
            same = [text == other for text, other in zip(texts, reference)]
            sample = texts[0] if name == "d2Cache" else sample
            values = name, statistics.mean(right), statistics.mean(same), *work
            columns = "policy", "exact match", "same text", "forwards", "recomputed"
            rows.append(dict(zip(columns, values)))
    return rows, sample


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
    """Seconds that function() takes from an idle device to an idle device, and its result."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def least_seconds(function, repeats=10):
    """The shortest time that a function took, after a warm-up."""
    function()
    return min(timed(function)[0] for _ in range(repeats))


def machine_rates(device, dtype):
    """Bytes/s of a copy, read and written, and FLOP/s of a matrix product, as measured now."""
    n = 8192 if device.startswith("cuda") else 2048
    source = torch.randn(4 * n, n, device=device, dtype=dtype)
    target, square = torch.empty_like(source), source[:n]
    copy = least_seconds(lambda: target.copy_(source))
    product = least_seconds(lambda: square @ square)
    return 2 * source.nbytes / copy, 2 * n**3 / product


def floor_seconds(model, steps, rates):
    """The least a step can take: reading every weight once or the arithmetic, whichever is more."""
    config, (bandwidth, flops), T = model.config, rates, steps[0][1].shape[1]
    Q = statistics.mean(chosen.sum().item() for _, chosen in steps)
    R = statistics.mean((chosen & (~s.known | s.fresh)).sum().item() for s, chosen in steps)
    in_blocks = sum(weight.numel() for weight in model.blocks.parameters())
    in_head = model.ff_out.weight.numel()
    in_attention = 2 * config.n_layers * config.d_model * T  # query x key, weight x value
    read = (in_blocks + in_head) * model.wte.weight.element_size()
    return max(read / bandwidth, 2 * ((in_blocks + in_attention) * Q + in_head * R) / flops)


def measure_speed(model, prompt, gen_length, rates):
    """Rows of the speed table, dicts by column; and the steps of d2Cache's decode.

    Vanilla's steps are all alike: where they are slow, it commits four tokens in each, so that a
    quarter of them is timed. Its tokens/s are those of one token per step.
    """
    rows, gpu = [], prompt.is_cuda
    one_step = partial(decode, model, prompt, gen_length, {"tokens_per_step": gen_length})
    slow = gen_length * least_seconds(one_step, repeats=1) > 2 * LONG_RUN
    for name, arguments in tqdm(settings(gen_length).items(), desc="speed", unit="policy"):
        if name == "vanilla" and slow:
            arguments |= {"tokens_per_step": 4}
        if gpu:
            arguments |= {"graphs": CudaGraphs(model)}
            torch.cuda.reset_peak_memory_stats()
            decode(model, prompt, gen_length, arguments)  # captures the graphs
        run = partial(decode, model, prompt, gen_length, arguments)
        times, results = zip(timed(run))
        while len(times) < RUNS and times[0] < LONG_RUN:
            times += timed(run)[:1]
        steps = results[0][1]
        step, floor = statistics.median(times) / len(steps), floor_seconds(model, steps, rates)
        recomputed = torch.stack([chosen for _, chosen in steps])
        rate = len(prompt) / step
        rows.append(
            {
                "policy": name,
                "forwards": len(steps),
                "recomputed": recomputed.float().mean().item(),
                "ms per step": 1000 * step,
                "tokens/s": rate,
                "speed-up": rate / (rows[0]["tokens/s"] if rows else rate),
                "floor ms": 1000 * floor,
                "x floor": step / floor,
                "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
                "runs": len(times),
            }
        )
    return rows, steps


def measure_parts(model, gen_length, steps):
    """Milliseconds that the parts of a d2Cache step take, half-way through, each timed alone.

    On a GPU as the replay of a graph. What the step takes beyond their sum are the gaps between
    launches, the commit, and on average its part of the first step, which recomputes everything.
    """
    policy, (state, _) = settings(gen_length)["d2cache"]["policy"], steps[len(steps) // 2]
    chosen = policy.choose(state)
    masked = chosen & ~state.known
    positions, valid = pack(chosen, masked, int(chosen.sum(dim=1).max()))
    R, cache = int(masked.sum(dim=1).max()), new_cache(model, *chosen.shape)
    hidden, maps = model.trunk(state.tokens, positions, cache, return_attention=True)

    def select():
        attention_rollout(maps, positions, valid)
        certainty_prior(state.confidence, state.known, policy.sigma)  # once more, for the commit
        pack(policy.choose(state), masked, positions.shape[1])

    parts = {
        "forward": lambda: model.trunk(state.tokens, positions, cache),
        "with maps": lambda: model.trunk(state.tokens, positions, cache, return_attention=True),
        "head": lambda: predict(model.head(hidden[:, :R]), model.config.mask_token_id),
        "selection": select,
    }
    times = {}
    for name, part in parts.items():
        part()
        function = CudaGraphs(model).capture(part)[0].replay if maps.is_cuda else part
        times[name] = 1000 * least_seconds(function, repeats=5)
    maps_time = max(0.0, times.pop("with maps") - times["forward"])
    return times | {"attention maps": maps_time}


def print_table(rows):
    """Aligned columns: the first one left, the numbers right."""
    table = [list(rows[0])]
    for row in rows:
        cells = ("-" if value is None else FORMAT[key].format(value) for key, value in row.items())
        table.append(list(cells))
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    for first, *rest in table:
        print("  ".join([first.ljust(widths[0])] + [c.rjust(w) for c, w in zip(rest, widths[1:])]))


def describe(model):
    """Size, precision and device, for a table's header."""
    weight, millions = model.wte.weight, sum(p.numel() for p in model.parameters()) / 1e6
    cpu = f"CPU, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else cpu
    return f"{millions:,.1f} M parameters, {weight.dtype}, {device}, torch {torch.__version__}"


def report_quality(name, model, tokenizer, problems, gen_length):
    """Print a sample and the quality table; the rows."""
    rows, sample = measure_quality(model, tokenizer, problems, gen_length)
    block_length = settings(gen_length)["dual"]["block_length"]
    print(f"A problem   {problems[0][0]}\nd2Cache     {sample}\nThe answer  {problems[0][1]}\n")
    print(f"QUALITY  {name}: {describe(model)}")
    print(
        f"{len(problems)} problems, response {gen_length}, blocks of {block_length}, 1 token per "
        "step, 1 run; same text: as exact decoding in the same order"
    )
    print_table(rows)
    return rows


def report_speed(name, model, prompt, gen_length, rates):
    """Print the speed table of one prompt, and where a step of d2Cache goes; the rows."""
    rows, steps = measure_speed(model, prompt, gen_length, rates)
    parts = measure_parts(model, gen_length, steps)
    parts["the rest"] = rows[-1]["ms per step"] - sum(parts.values())
    block_length = settings(gen_length)["dual"]["block_length"]
    print(f"\nSPEED  {name}: {describe(model)}")
    print(
        f"prompt {prompt.shape[1]}, response {gen_length}, prefix and dual cache in blocks of "
        f"{block_length}, batch {len(prompt)}, 1 token per step, median of the runs"
    )
    print_table(rows)
    print("a step of d2cache:", ", ".join(f"{part} {ms:.2f} ms" for part, ms in parts.items()))
    return [{"prompt": prompt.shape[1]} | row for row in rows]


def speed_model(device, prompt_length, gen_length, batch):
    """(name, model, prompts, gen_length) for the speed tables without a checkpoint.

    On a CPU four sequences at once: one alone leaves small matrices, and waits for the memory.
    """
    gpu = device.startswith("cuda")
    fits = gpu and torch.cuda.mem_get_info(device)[0] > LLADA_8B_BYTES
    config, dtype = (LLADA_8B_SHAPE, torch.bfloat16) if fits else (CPU_SHAPE, torch.float32)
    name = f"random weights, {config.n_layers} layers of {config.d_model}"
    if gpu and not fits:
        name += f" (LLaDA-8B's shape wants {LLADA_8B_BYTES / 1e9:.0f} GB of free GPU memory)"
    lengths = [prompt_length] if prompt_length else [128, 896, 3840] if fits else [384]
    random = torch.Generator().manual_seed(0)
    shapes = [(batch or (1 if fits else 4), length) for length in lengths]
    prompts = [torch.randint(config.eos_token_id, shape, generator=random) for shape in shapes]
    prompts = [prompt.to(device) for prompt in prompts]
    model = random_model(config, device, dtype)
    return name, model, prompts, gen_length or (256 if fits else 64)


def checkpoint(args):
    """(name, model, prompts, gen_length) for the speed table of --model; prints its answer."""
    tokenizer = load_tokenizer(args.model)
    model = Transformer.from_pretrained(args.model, args.device)
    prompt, gen_length = encode_prompt(tokenizer, args.prompt), args.gen_length or 256
    tokens, _ = decode(model, prompt, gen_length, settings(gen_length)["d2cache"])
    answer = decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.eos_token_id)
    print(f"A prompt    {args.prompt}\nd2Cache     {answer}\n")
    return args.model, model, [prompt.to(args.device).repeat(args.batch or 1, 1)], gen_length


def run(args):
    """Everything the command line asks for, printed; the same numbers as a dict."""
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such folder")
    for flag in ("problems", "prompt_length", "gen_length", "batch"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}, should be at least 1")
    report = {}
    if args.data or not args.model:
        source = args.model or EMBEDDED_MODEL
        problems = read_problems(args.data or PROBLEMS, args.problems)
        tokenizer, model = load_tokenizer(source), Transformer.from_pretrained(source, args.device)
        gen_length = args.gen_length or 256 if args.model else QUALITY_LENGTH
        name = args.model or "the embedded model"
        report["quality"] = report_quality(name, model, tokenizer, problems, gen_length)
        del model  # two copies of 16 GB would not fit everywhere
    speed = checkpoint(args) if args.model else None
    speed = speed or speed_model(args.device, args.prompt_length, args.gen_length, args.batch)
    name, model, prompts, gen_length = speed
    rates = machine_rates(args.device, model.wte.weight.dtype)
    report["copy bytes/s"], report["matrix FLOP/s"] = rates
    report["speed"] = []
    for prompt in prompts:
        report["speed"] += report_speed(name, model, prompt, gen_length, rates)
    bandwidth, flops = rates[0] / 1e9, rates[1] / 1e12
    print(f"floor: at {bandwidth:,.0f} GB/s (copy) and {flops:,.2f} TFLOP/s (matrix product)")
    return report


def main():
    """Quality and speed of every policy, as tables; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=main.__doc__, usage=argparse.SUPPRESS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--model", help="checkpoint folder or hub id instead of the embedded model")
    add("--prompt", default=EXAMPLE, help="with --model: the text to answer and to time")
    add("--data", help='JSON lines {"question", "answer"} to score; answers end in "#### n"')
    add("--problems", type=int, default=32, help="how many of them")
    add("--prompt-length", type=int, help="of the speed table's random prompt")
    add("--gen-length", type=int, help="tokens to decode, in the speed table and with --model")
    add("--batch", type=int, help="sequences decoded at once in the speed table")
    add("--device", default=device, help="where torch computes")
    add("--json", help="write the same numbers to this file")
    args = parser.parse_args()
    try:
        report = run(args)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
