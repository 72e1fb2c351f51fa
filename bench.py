"""Quality and speed of every policy, as two tables: `python bench.py`.

Quality: the embedded model solves word problems it has not seen. Score, agreement with exact
decoding in the same order, and how many positions were recomputed for it; with two controls that
cost the same and replace one stage of d2Cache by chance. Speed: random weights at a size that suits
the device. With --model, a real checkpoint instead of both.
"""

import argparse
import itertools
import json
import re
import statistics
import time
from pathlib import Path

from d2cache import EMBEDDED_MODEL, EXAMPLE, D2Cache, attention_rollout, best, certainty_prior
from d2cache import generate, settings
from model import Config, Transformer, decode_response, encode_prompt, load_tokenizer

import torch  # after model, which keeps its import quiet
from huggingface_hub.utils import tqdm

RUNS, LONG_RUN = 3, 5.0  # the median of so many decodes; of one if it takes longer (seconds)
PROBLEMS = EMBEDDED_MODEL / "problems.jsonl"

CPU_SHAPE = Config(
    d_model=512,
    n_layers=8,
    n_heads=8,
    n_kv_heads=8,
    mlp_hidden_size=1536,
    vocab_size=32000,
    embedding_size=32000,
    max_sequence_length=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    mask_token_id=31999,
    eos_token_id=31998,
)
LLADA_8B_SHAPE = Config(
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    mlp_hidden_size=12288,
    vocab_size=126464,
    embedding_size=126464,
    max_sequence_length=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    mask_token_id=126336,
    eos_token_id=126081,
)
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


def solve(model, tokenizer, questions, gen_length, arguments, progress):
    """Texts of the responses, forwards of a decode, and the share of positions recomputed.

    Neighbours with prompts of equal length decode as one batch.
    """
    texts, forwards, shares = [], 0, []
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    for _, batch in itertools.groupby(prompts, key=lambda prompt: prompt.shape[1]):
        batch, chosen = torch.cat(list(batch)), []
        tokens = generate(
            model, batch, gen_length, on_step=lambda _, now: chosen.append(now), **arguments
        )
        responses = tokens[:, batch.shape[1] :]
        texts += [decode_response(tokenizer, row, model.config.eos_token_id) for row in responses]
        forwards += len(chosen) * len(batch)
        shares += torch.stack(chosen).float().mean(dim=(0, 2)).tolist()
        progress.update(len(batch))
    return texts, forwards / len(questions), statistics.mean(shares)


def measure_quality(model, tokenizer, problems, gen_length):
    """Rows of the quality table, dicts by column; and d2Cache's answer to the first problem."""
    questions, answers = zip(*problems)
    numbers = [final_number(answer) for answer in answers]
    rows, exact, sample = [], {}, None
    plan = quality_rows(gen_length)
    with tqdm(total=len(plan) * len(problems), desc="quality", unit="decode") as progress:
        for name, arguments in plan:
            torch.manual_seed(0)
            texts, forwards, share = solve(
                model, tokenizer, questions, gen_length, arguments, progress
            )
            order = arguments.get("block_length"), arguments.get("sigma")
            reference = exact.setdefault(order, texts)  # vanilla comes first in every order
            right = [final_number(text) == number for text, number in zip(texts, numbers)]
            same = [text == other for text, other in zip(texts, reference)]
            sample = texts[0] if name == "d2Cache" else sample
            rows.append(
                {
                    "policy": name,
                    "exact match": f"{statistics.mean(right):.1%}",
                    "same text": "exact" if reference is texts else f"{statistics.mean(same):.1%}",
                    "forwards": f"{forwards:.0f}",
                    "recomputed": f"{share:.1%}",
                }
            )
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


def run_once(model, prompt, gen_length, arguments):
    """Seconds of one decode, prompt on the device to tokens on the host; and what each step chose."""
    chosen, on_gpu = [], prompt.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    generate(
        model, prompt, gen_length, on_step=lambda _, now: chosen.append(now), **arguments
    ).cpu()
    return time.perf_counter() - start, chosen


def measure_speed(model, prompt, gen_length):
    """The speed table: a list of rows, each a dict by column; and d2Cache's seconds per step."""
    rows, vanilla_rate, step_seconds = [], None, {}
    plan = settings(gen_length)
    for name, arguments in tqdm(plan.items(), desc="speed", unit="policy"):
        run_once(model, prompt, gen_length, arguments | {"tokens_per_step": gen_length // 2})
        runs = [run_once(model, prompt, gen_length, arguments)]
        while len(runs) < RUNS and runs[0][0] < LONG_RUN:
            runs.append(run_once(model, prompt, gen_length, arguments))
        seconds, chosen = statistics.median(run[0] for run in runs), runs[0][1]
        rate = gen_length / seconds
        vanilla_rate = vanilla_rate or rate
        step_seconds[name] = seconds / len(chosen)
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if prompt.is_cuda else "-"
        rows.append(
            {
                "policy": name,
                "forwards": str(len(chosen)),
                "recomputed": f"{torch.stack(chosen).float().mean().item():.1%}",
                "ms per step": f"{1000 * step_seconds[name]:.1f}",
                "tokens/s": f"{rate:.1f}",
                "speed-up": f"{rate / vanilla_rate:.2f}x",
                "peak memory": peak,
                "runs": str(len(runs)),
            }
        )
    return rows, step_seconds["d2cache"]


def measure_selection(model, prompt, gen_length):
    """Seconds that one d2Cache step, half-way through, spends on density, rollout and nucleus."""
    arguments, steps = settings(gen_length)["d2cache"], []
    generate(model, prompt, gen_length, on_step=lambda *step: steps.append(step), **arguments)
    state, chosen = steps[len(steps) // 2]
    B, T = chosen.shape
    positions = chosen.nonzero()[:, 1].expand(B, -1)
    shape = (len(model.blocks), *positions.shape, T)
    maps = torch.rand(shape, device=prompt.device, dtype=state.influence.dtype) / T

    def select():
        attention_rollout(maps, positions, torch.ones_like(positions, dtype=torch.bool))
        certainty_prior(state.confidence, state.known, arguments["sigma"])  # of the commit
        arguments["policy"].choose(state)

    times = []
    for _ in range(20):
        start = time.perf_counter()
        select()
        if prompt.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def print_table(rows):
    """Aligned columns: the first one left, the numbers right."""
    table = [list(rows[0])] + [list(row.values()) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table)]
    for first, *rest in table:
        print("  ".join([first.ljust(widths[0])] + [c.rjust(w) for c, w in zip(rest, widths[1:])]))


def describe(model, device):
    """Size, precision and device, for a table's header."""
    parameters = sum(weight.numel() for weight in model.parameters()) / 1e6
    name = (
        torch.cuda.get_device_name()
        if device.startswith("cuda")
        else f"{torch.get_num_threads()} threads"
    )
    dtype = str(model.wte.weight.dtype).removeprefix("torch.")
    return f"{parameters:,.1f} M parameters, {dtype}; {device} ({name}), torch {torch.__version__}"


def report_quality(path, model, tokenizer, problems, gen_length, device):
    """Print a sample and the quality table; the rows."""
    rows, sample = measure_quality(model, tokenizer, problems, gen_length)
    block_length = settings(gen_length)["dual"]["block_length"]
    print(f"A problem   {problems[0][0]}\nd2Cache     {sample}\nThe answer  {problems[0][1]}\n")
    print(f"QUALITY  {path}: {describe(model, device)}")
    print(
        f"{len(problems)} problems, response {gen_length}, blocks of {block_length}, 1 token per step, "
        "1 run; same text: as exact decoding in the same order"
    )
    print_table(rows)
    return rows


def report_speed(path, model, prompt, gen_length, device):
    """Print the speed table and what selection costs; the rows."""
    rows, step_seconds = measure_speed(model, prompt, gen_length)
    selection = measure_selection(model, prompt, gen_length)
    block_length = settings(gen_length)["dual"]["block_length"]
    print(f"\nSPEED  {path}: {describe(model, device)}")
    print(
        f"prompt {prompt.shape[1]}, response {gen_length}, prefix and dual cache in blocks of "
        f"{block_length}, 1 sequence, 1 token per step, median of the runs after a warm-up"
    )
    print_table(rows)
    print(
        f"Of a d2Cache step, {1000 * selection:.2f} ms ({selection / step_seconds:.1%}) are selection: "
        "density, rollout and nucleus."
    )
    return rows


def speed_model(device, prompt_length, gen_length):
    """(name, model, prompt, gen_length) for the speed table without a checkpoint."""
    gpu = device.startswith("cuda")
    fits = gpu and torch.cuda.mem_get_info(device)[0] > LLADA_8B_BYTES
    config, dtype = (LLADA_8B_SHAPE, torch.bfloat16) if fits else (CPU_SHAPE, torch.float32)
    name = f"random weights, {config.n_layers} layers of {config.d_model}"
    if gpu and not fits:
        name += (
            f" (LLaDA-8B's shape needs {LLADA_8B_BYTES / 1e9:.0f} GB of GPU memory, there is less)"
        )
    prompt_length, gen_length = (
        prompt_length or (896 if fits else 384),
        gen_length or (256 if fits else 64),
    )
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, config.eos_token_id, (1, prompt_length), generator=random)
    return name, random_model(config, device, dtype), prompt.to(device), gen_length


def run(args):
    """Everything the command line asks for, printed; the same as a dict."""
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such folder")
    for flag in ("problems", "prompt_length", "gen_length"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(
                f"--{flag.replace('_', '-')} is {getattr(args, flag)}, should be at least 1"
            )
    report, path = {}, args.model or EMBEDDED_MODEL.relative_to(Path(__file__).parent)
    source = args.model or EMBEDDED_MODEL
    tokenizer, model = load_tokenizer(source), Transformer.from_pretrained(source, args.device)
    if args.data or not args.model:
        problems = read_problems(args.data or PROBLEMS, args.problems)
        quality = (tokenizer, problems, args.gen_length or 64, args.device)
        report["quality"] = report_quality(path, model, *quality)
    if args.model:
        prompt = encode_prompt(tokenizer, args.prompt).to(args.device)
        gen_length = args.gen_length or 256
        tokens = generate(model, prompt, gen_length, **settings(gen_length)["d2cache"])
        response = tokens[0, prompt.shape[1] :]
        print(f"A prompt    {args.prompt}")
        print(f"d2Cache     {decode_response(tokenizer, response, model.config.eos_token_id)}")
        speed = (path, model, prompt, gen_length)
    else:
        speed = speed_model(args.device, args.prompt_length, args.gen_length)
    report["speed"] = report_speed(*speed, args.device)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--model", help="checkpoint folder or hub repository instead of the embedded model"
    )
    parser.add_argument(
        "--prompt", default=EXAMPLE, help="with --model: the text to decode and to time"
    )
    parser.add_argument(
        "--data", help='JSON lines {"question", "answer"} to score; answers end in #### n'
    )
    parser.add_argument("--problems", type=int, default=40, help="how many of them")
    parser.add_argument("--prompt-length", type=int, help="of the speed table's random prompt")
    parser.add_argument("--gen-length", type=int, help="tokens to decode")
    parser.add_argument("--device", default=device, help="of torch")
    parser.add_argument("--json", help="write the same numbers to this file")
    args = parser.parse_args()
    try:
        report = run(args)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
