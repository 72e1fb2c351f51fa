"""bench.py: its arithmetic against values worked out by hand, and every flag of it run for real."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from strategies import ModelSpec

import bench
from bench import CPU_SHAPE, LLADA_8B_SHAPE, Outcome, Row, Timing
from d2cache import (
    EMBEDDED_MODEL,
    EXAMPLE,
    WORLDS,
    D2Cache,
    DualCache,
    RecomputeAll,
    decode,
    generate,
    load_module,
    paper_settings,
)
from model import Transformer, decode_response, encode_prompt, load_tokenizer

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec(2, 2, 1, 2, vocab_size=12, seed=0)
PROMPT = torch.ones(1, 3, dtype=torch.long)
# Three problems in a batch, and random weights over 12 positions.
SMALL = ("--device", "cpu", "--problems", 3, "--prompt-length", 8, "--gen-length", 4, "--batch", 3)
# As a checkpoint, so that a decode has four steps.
CHECKPOINT = ("--device", "cpu", "--model", EMBEDDED_MODEL, "--gen-length", 4)
OWN_POLICY = """
from d2cache import D2Cache


class Mine(D2Cache):
    def about_to_be_decoded(self, state):
        return state.masked & (state.masked.cumsum(dim=1) <= self.k)
"""


def run(file, *arguments):
    """What bench.py prints with these arguments, and the numbers that it writes."""
    printed = io.StringIO()  # as in a notebook: it cannot be reconfigured
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["bench.py", *map(str, arguments), "--json", str(file)])
        bench.main()
    return printed.getvalue(), json.loads(file.read_text())


ORDERS = ("confidence", "blocks", "prior")


@pytest.fixture
def command(tmp_path):
    return partial(run, tmp_path / "numbers.json")


@pytest.fixture(scope="module")
def embedded_run(tmp_path_factory):
    """What it prints and writes of the embedded models, random weights, and a policy of ours."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "mine.py").write_text(OWN_POLICY)
    own = ("--policy", f"{folder / 'mine.py'}:Mine(k=3)")
    return run(folder / "numbers.json", *own, *SMALL)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The same of one embedded world alone, its problems fresh, in another precision."""
    flags = ("--world", "tiny", "--fresh", 3, "--dtype", "float64")
    return run(tmp_path_factory.mktemp("tiny") / "numbers.json", *flags, *SMALL)


@pytest.fixture
def data(tmp_path):
    """The example twice, with the answers 30 and 31."""
    problems = [{"question": EXAMPLE, "answer": f"#### {n}"} for n in (30, 31)]
    return data_file(tmp_path / "data.jsonl", *problems)


@pytest.fixture
def refused(command, capsys):
    """Runs bench.py with arguments that it refuses: the one line that it says."""

    def refuse(*arguments):
        with pytest.raises(SystemExit) as end:
            command(*arguments)
        captured = capsys.readouterr()
        assert end.value.code == 2 and captured.err.count("\n") == 1
        return captured.err

    return refuse


def answer(text, gen_length, **arguments):
    """What the embedded model answers to a text."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    model = Transformer.from_pretrained(EMBEDDED_MODEL, dtype="float64")
    prompt = encode_prompt(tokenizer, text)
    tokens = generate(model, prompt, gen_length, **arguments)
    return decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.end_ids)


def data_file(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- Quality: by hand


def test_wilsons_interval_is_the_textbooks():
    """10 of 100: (0.0552, 0.1744). One that is symmetric has no width at 100 %."""
    assert bench.wilson_interval(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert bench.wilson_interval(200, 200) == (pytest.approx(0.98115, abs=1e-5), 1.0)
    assert bench.wilson_interval(0, 200) == (0.0, pytest.approx(0.01885, abs=1e-5))


def test_rows_are_compared_problem_by_problem():
    """Right: 1 1 0 1 against 1 0 1 0; same text in the first and the last."""
    row = Row("mine", "prior", {}, True)
    own = Outcome(
        list("abcd"), [True, True, False, True], [True] * 4, [16, 16, 32, 64], [0.2, 0.4] * 2
    )
    exact = Outcome(list("axyd"), [True, False, True, False], [True] * 4, [64] * 4, [1.0] * 4)
    compared = bench.quality_row(row, own, exact, "pass@1", gen_length=64)
    assert list(compared.values())[:3] == ["mine", "prior", 0.75]
    assert (compared["only it"], compared["only exact"], compared["same text"]) == (2, 1, 0.5)
    assert compared["tokens per forward"] == 2.0
    assert compared["reused"] == pytest.approx(0.7) and compared["strict"] == 1
    alone = bench.quality_row(row, exact, None, "pass@1", gen_length=64)
    assert (alone["only it"], alone["only exact"], alone["same text"]) == (None, None, None)


def masks(*rows):
    """masks("0110", ...) as a bool tensor, a row for each text."""
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def test_work_is_counted_per_sequence_in_its_own_steps_and_without_padding():
    padding = masks("0000", "1000")
    steps = [masks("1111", "0111"), masks("0011", "0001"), masks("1000", "0000")]
    states = [SimpleNamespace(chosen=chosen, padding=padding) for chosen in steps]
    forwards, shares = bench.work_done(RecomputeAll(), states)
    assert forwards.tolist() == [3, 2]
    assert shares.tolist() == pytest.approx([7 / 12, 4 / 6])


def test_a_policy_with_a_forward_pass_of_its_own_says_what_that_recomputed():
    guest = SimpleNamespace(
        recomputed=[torch.tensor([[1.0, 1.0, 1.0, 0.5]]), torch.tensor([[0.5, 0.0, 0.0, 0.0]])],
        choose=lambda state: masks("0011"),
    )
    states = [
        SimpleNamespace(chosen=masks("1111"), predicted=masks("0111"), padding=None),
        SimpleNamespace(chosen=masks("0111"), predicted=masks("0011"), padding=None),
    ]
    assert bench.work_done(guest, states)[1].tolist() == [4 / 8]
    assert bench.row_counts(guest, states) == [(3.5, 3), (0.5, 2)]


# ---- Quality: decoded


def test_fresh_problems_are_those_of_their_seed_and_can_be_judged():
    def answers(**seed):
        task = bench.world_task("tiny", 3, **seed)
        assert all(all(task.is_right(problem, problem.answer)) for problem in task.problems)
        return [problem.answer for problem in task.problems]

    assert answers(fresh=7) == answers(fresh=7) != answers(fresh=8)
    assert answers(fresh=2) == answers()  # the seed of the held-out ones


def test_fresh_problems_of_a_world_are_solved_and_not_timed(tiny_run):
    _, numbers = tiny_run
    assert list(numbers) == ["run", "quality"]
    (table,) = numbers["quality"]
    assert (table["model"], table["dtype"]) == ("tiny", "torch.float64")
    assert table["fresh, of seed"] == 3


def test_the_quality_table_is_what_decoding_each_problem_alone_gives(tiny_run):
    """In a batch of three: padding and company change nothing."""
    table = tiny_run[1]["quality"][0]
    problems = bench.world_task("tiny", 3, fresh=3).problems
    by_prior = paper_settings(64)["d2cache"]
    ours = [answer(problem.question, 64, **by_prior) for problem in problems]
    exact = [answer(problem.question, 64) for problem in problems]
    rows = {(row["policy"], row["order"]): row for row in table["rows"]}
    row = rows["d2Cache", "prior"]
    assert row["exact match"] == 1 and row["only exact"] == row["only it"] == 0
    assert row["same text"] == sum(map(str.__eq__, ours, exact)) / 3
    assert 0.85 < row["reused"] < 0.88 and rows["vanilla", "prior"]["reused"] == 0
    assert rows["vanilla", "prior, from 0.9"]["tokens per forward"] > 1.5
    assert all(rows[policy, order] for policy in ("window", "d2Cache") for order in ORDERS)


def test_a_table_of_each_world_comes_before_the_speed(embedded_run):
    text, numbers = embedded_run
    assert re.findall(r"^(\w+)  model ([a-z]+)", text, re.MULTILINE) == [
        *(("QUALITY", world) for world in WORLDS),
        ("SPEED", "random"),
    ]
    assert [table["model"] for table in numbers["quality"]] == list(WORLDS)
    assert all(table["problems"] == 3 for table in numbers["quality"])


def test_printed_and_written_numbers_are_the_same(embedded_run):
    text, numbers = embedded_run
    for kind in ("quality", "speed"):
        table = numbers[kind][0]
        text = text[text.index(f"{kind.upper()}  ") :]
        lines = text[text.index("policy   ") :].splitlines()
        assert re.split("  +", lines[0].strip()) == list(table["rows"][0])
        for line, row in zip(lines[1:], table["rows"]):
            cells = re.split("  +", line.strip())
            assert cells[0] == row["policy"].strip() and len(cells) == len(row)
            for cell, value in zip(cells, row.values()):
                if isinstance(value, float):
                    shown = float(cell.strip("%").replace(",", "")) / (100 if "%" in cell else 1)
                    assert shown == pytest.approx(value, abs=0.006)
                elif isinstance(value, int):
                    assert int(cell) == value
                elif isinstance(value, list):
                    assert cell == f"{value[0]:.1%} to {value[1]:.1%}"


def test_a_policy_of_ones_own_stands_beside_what_it_is_compared_with_and_no_more(embedded_run):
    compared = ["vanilla", "window", "d2Cache", "Mine(k=3)"]
    for table in embedded_run[1]["quality"]:
        rows = [(row["policy"], row["order"]) for row in table["rows"]]
        assert rows == [(name, order) for name in compared for order in ORDERS]
        assert table["Mine(k=3)"] == "Mine(k=3, p=0.1, sigma=None)"
    (speed,) = embedded_run[1]["speed"]
    timed = [(row["policy"], row["order"]) for row in speed["rows"]]
    assert timed[:3] == [(name, "prior") for name in compared[:3]]
    assert timed[3:] == [("Mine(k=3)", order) for order in ORDERS]


def test_a_policy_that_breaks_its_contract_is_refused_before_any_table(refused, tmp_path):
    class_ = "class Mine:\n    uses_attention = False\n    choose = lambda self, state: state.known"
    (tmp_path / "mine.py").write_text(class_)
    line = refused(*CHECKPOINT, "--policy", f"{tmp_path / 'mine.py'}:Mine")
    assert "policy Mine chose no masked position" in line and "step 2" in line


def test_chance_starts_anew_in_every_row(command, data):
    """Controls draw positions: two runs are alike."""
    first, again = (command(*CHECKPOINT, "--data", data)[1]["quality"][0]["rows"] for _ in range(2))
    assert first == again


@pytest.mark.parametrize(
    "world, digest",
    [("tiny", "3c992b3356c61d82"), ("diary", "c9783bab7a844a66"), ("journey", "0373151c83aced25")],
)
def test_held_out_problems_are_those_that_the_tables_tell_of(world, digest):
    """A version of Python that draws others, or a change in problems.py, makes the tables lie."""
    module = load_module(WORLDS[world] / "problems.py")
    problems = module.draw_problems(module.TEST_SEED)
    assert hashlib.sha256(repr(problems).encode()).hexdigest().startswith(digest)
    assert len(problems) == 200 and module.TEST_SEED != module.TRAIN_SEED


# ---- Quality: data


def test_data_is_scored_by_the_grader_whatever_tests_is(command, data, tmp_path, monkeypatch):
    """A package named "tests", installed by something else, once stood in its way.

    Cut after five tokens the answer is "Ben starts with 30": the last number, and no "####".
    """
    (tmp_path / "tests").mkdir()
    for file in ("tests/__init__.py", "run_code.py", "problems.py"):
        (tmp_path / file).write_text("raise ImportError('another package')")
        monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, numbers = command(*CHECKPOINT, "--gen-length", 5, "--data", "data.jsonl")
    (table,) = numbers["quality"]
    rows = {(row["policy"], row["order"]): row for row in table["rows"]}
    assert rows["d2Cache", "prior"]["exact match"] == 0.5
    assert rows["d2Cache", "prior"]["strict"] == 0 and table["problems"] == 2


def test_worked_examples_stand_before_the_question(refused, data):
    """The embedded model has no word for "Question:", which shows that they do."""
    line = refused(*CHECKPOINT, "--data", data, "--shots", 1)
    assert f"{data}, line 2" in line and "no token for ['Question'" in line


def test_programs_are_run_where_that_is_asked_for(command, refused, data, tmp_path):
    """The embedded model writes no Python, so nothing passes."""
    task = {"text": "Zoe", "test_list": ["Zoe"]}
    programs = data_file(tmp_path / "programs.jsonl", task)
    assert "--run-code does it" in refused(*CHECKPOINT, "--data", programs)
    assert "asks for no programs" in refused(*CHECKPOINT, "--data", data, "--run-code")
    assert "no token for" in refused(*CHECKPOINT, "--data", programs, "--run-code")


def test_a_question_that_is_no_prompt_is_named_before_the_first_decode(refused, data):
    for question, fault in (("Zoe " * 600, "600 tokens, should have at most 508"), ("You", "You")):
        data_file(
            data,
            {"question": EXAMPLE, "answer": "#### 31"},
            {"question": question, "answer": "#### 1"},
        )
        line = refused(*CHECKPOINT, "--data", data)
        assert fault in line and f"{data}, line 2: " in line


# ---- Speed


def test_the_large_shape_is_llada_8b():
    with torch.device("meta"):
        model = Transformer(LLADA_8B_SHAPE)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184


def test_random_weights_give_attention_that_is_neither_uniform_nor_one_hot():
    model = bench.random_model(CPU_SHAPE, "cpu", torch.float32)
    prompt = bench.random_prompt(CPU_SHAPE, 64, 1, "cpu")
    _, maps = model(prompt, return_attention=True)
    for attention in maps:  # of a layer, (1, 64, 64), mean over heads
        largest = attention.amax(dim=2).mean()
        assert 3 / 64 < largest < 0.5


def test_the_floor_is_the_slower_of_reading_and_arithmetic():
    model = SPEC.build()  # C 8, two layers, MLP 12, V 12, float64
    in_layers = 2 * (4 * 8 * 8 + 3 * 8 * 12 + 2 * 8)
    in_head, in_attention = 12 * 8, 2 * 2 * 8 * 5
    reading = (in_layers + in_head) * 8 / 1000
    work = 2 * ((in_layers + in_attention) * 3 + in_head * 2)
    assert bench.floor_seconds(model, 5, [(3, 2)], (1000, 1e9)) == pytest.approx(reading)
    assert bench.floor_seconds(model, 5, [(3, 2)], (1e9, 100)) == pytest.approx(work / 100)
    both = bench.floor_seconds(model, 5, [(3, 2), (0, 0)], (1000, 10))
    assert both == pytest.approx((work / 10 + reading) / 2)


def test_the_ridge_is_where_reading_and_arithmetic_take_as_long():
    """An H100 by its data sheet, 3.35 TB/s and 989 TFLOP/s in bfloat16: 295 rows."""
    assert bench.ridge_rows(2, (3.35e12, 989e12)) == pytest.approx(295.2, abs=0.1)


@pytest.mark.parametrize("policy", [RecomputeAll(), DualCache(), D2Cache(k=3)])
def test_the_floor_counts_the_rows_that_pass_layers_and_head(policy):
    model = ModelSpec(2, 2, 1, 2, vocab_size=12, seed=0).build()
    passed = []

    class Spy:
        uses_attention = policy.uses_attention
        choose = staticmethod(policy.choose)

        def recompute(self, model, cache, state, positions, valid, R):
            passed.append((valid.sum().item(), R))
            return bench.recompute(policy, model, cache, state, positions, valid, R)

    states = list(decode(model, PROMPT, 12, 4, policy=Spy()))
    assert bench.row_counts(policy, states) == passed


def test_rows_of_the_speed_table_are_worked_out_by_hand():
    timings = [
        Timing(Row("vanilla", "prior", {}, True), False, [0.75, 0.5, 2.25], 1.0, 0.5, None),
        Timing(Row("cache", "blocks", {}, True), True, [0.2], 0.25, 0.05, 3 * 2**29),
    ]
    first, second = bench.speed_rows(timings, batch=6)
    expected = ["vanilla", "prior", 0.0, 750.0, 8.0, 1.0, 500.0, 1.5, 1.5, None, 3]
    assert list(first.values()) == expected
    expected = ["cache, replayed", "blocks", 0.75, 200, 30, 3.75, 50, 4, 15, 1.5, 1]
    assert list(second.values())[:2] == expected[:2]
    assert list(second.values())[2:] == pytest.approx(expected[2:])


def test_vanilla_is_timed_by_its_first_steps_and_the_others_by_whole_decodes():
    """A step that takes so long is worked for: a policy that waits 5 ms in every choice."""

    class Slow(D2Cache):
        def choose(self, state):
            time.sleep(0.005)
            return super().choose(state)

    model = SPEC.build()
    rates = (1e9, 1e9)
    row = Row("slow", "prior", {"policy": Slow(k=1, p=0.0)}, True)
    timing = bench.time_row(model, PROMPT, 12, row, False, rates)
    assert len(timing.runs) == 3
    assert all(0.005 <= seconds < 0.1 for seconds in timing.runs) and timing.peak is None
    states = list(decode(model, PROMPT, 12, **row.arguments))
    assert timing.share == pytest.approx(bench.work_done(Slow(), states)[1].item())
    vanilla = bench.time_row(
        model, PROMPT, 12, Row("vanilla", "prior", {"policy": RecomputeAll()}, True), False, rates
    )
    assert vanilla.share == 1


# ---- The command line


def test_a_checkpoint_is_timed_as_the_flags_say(command):
    """Its own prompt in the batch, no random one; in another precision than the file's."""
    flags = ["--gen-length", 8, "--batch", 3, "--dtype", "float64"]
    _, numbers = command(*CHECKPOINT, *flags, "--prompt", "Zoe has 66 eggs.")
    (speed,) = numbers["speed"]
    assert (speed["prompt"], speed["response"], speed["batch"]) == (6, 8, 3)
    assert speed["block length"] == 8 and speed["dtype"] == "torch.float64"
    assert "quality" not in numbers


def test_the_record_tells_how_the_numbers_came_about(embedded_run):
    _, numbers = embedded_run
    run = numbers["run"]
    assert run["torch"] == torch.__version__ and run["arguments"]["problems"] == 3
    assert run["device"].startswith("CPU")
    why_not = "git" in run["commit"]  # in a copy without history
    assert why_not or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run["commit"])
    assert numbers["speed"][0]["dtype"] == "torch.float32"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--problems", 0], "--problems is 0, should be at least 1"),
        (["--prompt-length", 0], "--prompt-length is 0, should be at least 1"),
        (["--batch", -1], "--batch is -1, should be at least 1"),
        (["--gen-length", 1], "--gen-length is 1, should be at least 2"),
        (["--shots", -1], "--shots is -1, should be at least 0"),
        (["--revision", "main"], "--revision needs --model"),
        (["--prompt", "Hello"], "--prompt needs --model"),
        (["--model", "x", "--prompt-length", 5], "--prompt-length is of a random prompt"),
        (["--shots", 1], "--shots needs --data"),
        (["--run-code"], "--run-code needs --data"),
        (["--model", EMBEDDED_MODEL, "--revision", "main"], "revision"),
        (["--model", ROOT], str(ROOT)),
        (["--data", "nowhere.jsonl"], "--data needs --model"),
        ([*CHECKPOINT, "--data", ROOT / "nowhere.jsonl"], "nowhere.jsonl"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--policy", "nowhere.py:Mine"], "nowhere.py"),
    ],
)
def test_a_mistake_costs_one_line_and_exit_code_2(arguments, said, refused):
    assert said in refused("--device", "cpu", *arguments)


def test_a_file_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, capsys):
    """And one that can keeps what it holds until there is something to write."""
    kept = tmp_path / "kept.json"
    kept.write_text("kept")
    for path, complaint in ((kept, "nowhere.jsonl"), (tmp_path / "no" / "x.json", "no/x.json")):
        flags = [*CHECKPOINT, "--json", path, "--data", "nowhere.jsonl"]
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, flags)])
        with pytest.raises(SystemExit):
            bench.main()
        assert complaint in capsys.readouterr().err
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("free, large", [(bench.LLADA_8B_BYTES, False), (80e9, True)])
def test_llada_8bs_shape_is_timed_where_it_fits(free, large, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    args = bench.make_parser().parse_args(["--device", "cuda"])
    workload, name = bench.race_of(args)
    assert (workload.config is LLADA_8B_SHAPE) == large == ("23 GB" not in name)


# ---- The process


def process(*arguments, **streams):
    line = [sys.executable, str(ROOT / "bench.py"), *map(str, arguments)]
    return subprocess.Popen(line, text=True, stderr=subprocess.PIPE, cwd=ROOT.parent, **streams)


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    """As `| head -1` does; and without a terminal no progress bar is drawn."""
    read, write = os.pipe()
    os.close(read)
    running = process(*CHECKPOINT, stdout=write)
    os.close(write)
    assert running.communicate(timeout=200)[1] == "" and running.returncode == 0


def test_an_interrupt_is_one_line_and_exit_code_130(data):
    """Once its first table is there, in the middle of the next."""
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored in a background
    flags = (*CHECKPOINT, "--data", data)
    running = process(*flags, stdout=subprocess.PIPE, preexec_fn=heeds)
    assert running.stdout.readline().startswith("QUALITY ")
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=100)
    assert (running.returncode, error.strip()) == (130, "interrupted")


def test_it_runs_where_stdout_is_closed(tmp_path):
    file = tmp_path / "numbers.json"
    line = [sys.executable, ROOT / "bench.py", *CHECKPOINT, "--json", file]
    closed = " ".join(f"'{word}'" for word in line) + " >&-"
    result = subprocess.run(closed, shell=True, capture_output=True, text=True, timeout=200)
    assert (result.returncode, result.stderr) == (0, "") and file.exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory")])
def test_a_full_memory_is_never_an_empty_message(error, monkeypatch, refused):
    def full(*arguments):
        raise error

    monkeypatch.setattr(bench, "machine_rates", full)
    assert "out of memory" in refused(*CHECKPOINT)
