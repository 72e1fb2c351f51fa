"""d2cache.py as its user runs it: every flag for real, on the embedded model, against `decode`."""

import io
import os
import pty
import re
import signal
import subprocess
import sys
from ast import literal_eval
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import d2cache
from d2cache import (
    COLOURS,
    EMBEDDED_MODEL,
    EXAMPLE,
    TRACE_TITLES,
    WORLDS,
    D2Cache,
    decode,
    draw_screen,
    generate,
    load_module,
    paper_block_length,
    paper_settings,
    paper_sigma,
    places,
    roles,
)
from model import DTYPES, Transformer, decode_response, encode_prompt, load_tokenizer

from tiny.problems import SAMPLE

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "d2cache.py")]
G = 24  # response tokens of a decode here
EVERY_POLICY = pytest.mark.parametrize("policy", paper_settings(G))


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs d2cache.py with arguments; what it printed to stdout and to stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["d2cache.py", *map(str, arguments)])
        d2cache.main()
        return capsys.readouterr()

    return run


@cache
def embedded():
    """The embedded model, its tokenizer and its sample as ids."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    return Transformer.from_pretrained(EMBEDDED_MODEL), tokenizer, encode_prompt(tokenizer, SAMPLE)


@cache
def decoded(policy):
    """The state after each step of the sample's decode."""
    model, _, prompt = embedded()
    return list(decode(model, prompt, G, **paper_settings(G)[policy]))


def answer(gen_length, **arguments):
    """What `generate` answers to the sample."""
    model, tokenizer, prompt = embedded()
    tokens = generate(model, prompt, gen_length, **arguments)
    return decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.end_ids)


def where(positions):
    """The set of positions of the one sequence where a (1, T) tensor is true."""
    return set(positions[0].nonzero()[:, 0].tolist())


# ---- Flags ---------------------------------------------------------------------------------------


@EVERY_POLICY
def test_the_answer_is_that_of_the_policy_with_the_papers_settings(policy, command):
    out, err = command("--gen-length", G, "--policy", policy)
    assert out == answer(G, **paper_settings(G)[policy]) + "\n"
    share = sum(state.chosen.float().mean().item() for state in decoded(policy)) / G
    assert err == f"{G} forwards, {share:.1%} of positions recomputed\n"


@pytest.mark.parametrize("name", DTYPES)
def test_every_name_of_a_dtype_is_one_that_the_model_computes_in(name, command):
    """The flag once failed for every name, and a test with a mock said that it worked."""
    tokenizer, prompt = embedded()[1:]
    model = Transformer.from_pretrained(EMBEDDED_MODEL, dtype=DTYPES[name])
    tokens = generate(model, prompt, 8, **paper_settings(8)["d2cache"])
    expected = decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.end_ids)
    assert command("--gen-length", 8, "--dtype", name).out == expected + "\n"


def test_blocks_threshold_prompt_and_model_are_those_of_decode(command):
    k = paper_settings(G)["d2cache"]["policy"]
    out = command("--gen-length", G, "--block-length", 8).out
    assert out == answer(G, policy=k, block_length=8) + "\n"
    assert "1 forwards" in command("--gen-length", G, "--threshold", 0).err
    question = "Anna has 21 pens. On Monday Anna finds 5 pens at the shop. How many pens"
    flags = ("--gen-length", 8, "--device", "cpu", "--model", EMBEDDED_MODEL, "--delay", 0)
    assert "Anna" in command("--prompt", f"{question} does Anna have now?", *flags).out


@pytest.mark.parametrize("name, folder", WORLDS.items())
def test_a_world_comes_with_its_length_and_a_question_that_its_model_answers(name, folder, command):
    problems = load_module(folder / "problems.py")
    out, err = command("--world", name)
    assert problems.is_right(problems.SAMPLE, out.strip())
    assert err.startswith(f"{problems.RESPONSE_LENGTH} forwards")


def test_a_policy_of_ones_own_decodes(tmp_path):
    """Its module d2cache is another than the program, which runs under the name __main__."""
    (tmp_path / "mine.py").write_text("from d2cache import D2Cache\n\n\nclass Mine(D2Cache): ...\n")
    flags = ["--gen-length", "12", "--policy", "mine.py:Mine(k=3)"]
    result = subprocess.run([*PROGRAM, *flags], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == answer(12, policy=D2Cache(k=3)) + "\n", result.stderr


@pytest.mark.parametrize("gen_length", range(1, 300, 7))
def test_the_papers_settings_fit_every_length(gen_length):
    for name, arguments in paper_settings(gen_length).items():
        block_length = arguments.get("block_length", gen_length)
        assert gen_length % block_length == 0, name
        assert block_length <= 32 or "block_length" not in arguments
        assert name != "d2cache" or arguments["policy"].k <= max(1, gen_length // 8)


@pytest.mark.parametrize("gen_length, blocks", [(256, 32), (128, 32), (64, 16), (36, 12), (127, 1)])
def test_blocks_are_the_papers_or_the_next_lower_divisor(gen_length, blocks):
    assert paper_block_length(gen_length) == blocks


def test_the_python_of_the_readme_runs_and_answers_as_the_program_does(command):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    program = command("--model", EMBEDDED_MODEL, "--prompt", EXAMPLE)
    assert result.stdout == program.out, result.stderr


def test_the_policy_of_the_readme_decodes(command, tmp_path):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "recent.py").write_text(code)
    policy = f"{tmp_path / 'recent.py'}:Recent(n={{}})"
    forgetful, whole = (command("--policy", policy.format(n)) for n in (1, 99))
    assert whole.out == command("--policy", "vanilla").out != ""
    assert "100.0% of positions" in whole.err and "100.0% of positions" not in forgetful.err


# ---- The trace -----------------------------------------------------------------------------------


def places_read(words):
    """The positions that "9: 0-6 11 13" lists."""
    count, _, runs = words.partition(":")
    found = []
    for run in runs.split():
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert len(found) == int(count)
    return found


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_places_list_the_positions_and_their_number(positions):
    expected = [i for i, there in enumerate(positions) if there]
    assert places_read(places(torch.tensor(positions))) == expected


def trace_read(out):
    """The lines of a trace: commits [(position, token, confidence, prior)], {reason: set}."""
    titles, *lines, _ = out.splitlines()
    assert re.split("  +", titles) == list(TRACE_TITLES)
    steps = []
    for number, line in enumerate(lines, 1):
        step, commits, *reasons = re.split("  +", line.strip())
        assert int(step) == number
        read = re.findall(r"(\d+) ('.*?'|\".*?\") ([\d.]+) ([\d.]+)(?:, |$)", commits)
        commits = [(int(i), literal_eval(text), float(c), float(p)) for i, text, c, p in read]
        steps.append((commits, dict(zip(TRACE_TITLES[2:], map(set, map(places_read, reasons))))))
    return steps


@EVERY_POLICY
def test_the_trace_lists_the_policys_own_choice_by_reason(policy, command):
    """Recomputed here from the state that the step started from, not from what it left."""
    chooses = paper_settings(G)[policy]["policy"].choose
    trace = trace_read(command("--gen-length", G, "--policy", policy, "--trace").out)
    P = embedded()[2].shape[1]
    expected = [{"candidates": set(range(P, P + G)), "fresh": set(), "known": set(range(P))}]
    for before in decoded(policy)[:-1]:
        chosen, masked, fresh = where(chooses(before)), where(before.masked), where(before.fresh)
        known = chosen - masked
        reasons = {"candidates": chosen & masked, "fresh": known & fresh, "known": known - fresh}
        expected.append(reasons)
    assert [reasons for _, reasons in trace] == expected


@EVERY_POLICY
def test_the_trace_lists_what_was_committed_and_how_sure(policy, command):
    """With the prior before the commit, by the oracle; it is the highest where it ranks."""
    tokenizer = embedded()[1]
    trace = trace_read(command("--gen-length", G, "--policy", policy, "--trace").out)
    known = [[True] * embedded()[2].shape[1] + [False] * G]
    for (commits, reasons), state in zip(trace, decoded(policy), strict=True):
        ((i, text, confidence, prior),) = commits
        density = oracle.density(known[0], paper_sigma(G))
        assert where(state.known) - where(torch.tensor(known)) == {i}
        assert text == tokenizer.decode([state.tokens[0, i].item()], skip_special_tokens=False)
        assert confidence == pytest.approx(state.confidence[0, i].item(), abs=6e-4)
        assert prior == pytest.approx(state.confidence[0, i].item() * density[i], abs=6e-4)
        if policy in ("vanilla", "window", "d2cache"):
            rivals = [state.confidence[0, j].item() * density[j] for j in reasons["candidates"]]
            assert prior >= max(rivals) - 6e-4
        known = state.known.tolist()


def test_an_answers_end_ends_the_decode_where_it_is_asked_for(command):
    whole, ended = command(), command("--stop-at-eos")
    assert whole.out == ended.out and whole.err.startswith("64 forwards")
    assert int(ended.err.split()[0]) < 64


# ---- The terminal --------------------------------------------------------------------------------


@EVERY_POLICY
def test_the_screen_colours_every_position_by_what_was_done_there(policy):
    """What was committed shows as committed, though it was a candidate, too."""
    for before, state in zip(decoded(policy), decoded(policy)[1:]):
        screen = draw_screen(before, state, embedded()[1], share=0.5)
        cells = re.findall(r"\033\[([\d;]+)m.*?\033\[0m", screen, re.DOTALL)
        role = roles(before, state)
        reasons = sum(role[name].int() for name in ("known", "fresh", "candidates"))
        assert torch.equal(reasons, state.chosen.int())
        for i in range(state.tokens.shape[1]):
            shown = [COLOURS[name] for name, positions in role.items() if positions[0, i]]
            assert cells[i] == (["0"] + shown)[-1]
        assert len(cells) == state.tokens.shape[1] + len(COLOURS)


def in_terminal(*arguments, **environment):
    """All that d2cache.py writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "", **environment}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = subprocess.Popen([*PROGRAM, *map(str, arguments)], env=environment, **streams)
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 65536):
            written += block
    except OSError:  # how Linux says that nobody writes any more
        pass
    assert process.wait() == 0, written
    return written.decode()


def test_a_terminal_shows_the_canvas_filling_and_then_the_answer():
    written = in_terminal("--gen-length", 16, "--delay", 0)
    frames = written.split("\033[H")[1:]
    assert len(frames) == 16
    canvases = [re.sub(r"\033\[[^mJK]*[mJK]", "", frame) for frame in frames]
    assert [canvas.count(" _") for canvas in canvases] == list(range(15, -1, -1))
    assert all(canvas.startswith(" " + SAMPLE) for canvas in canvases)
    # Nothing is left of the frame before: neither in a line nor below the last.
    assert all(re.match(r"([^\n]*\033\[K\r\n)*[^\n]*\033\[J\r\n", frame) for frame in frames)
    assert all(f"\033[{COLOURS['committed']}m" in frame for frame in frames)
    last = canvases[-1].strip().splitlines()
    assert last[-2:-1] == [answer(16, **paper_settings(16)["d2cache"])]
    assert "16 forwards" in last[-1]


@pytest.mark.parametrize("wish", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_who_wants_no_escape_codes_gets_none(wish):
    assert "\033" not in in_terminal("--gen-length", 2, **wish)


# ---- How it ends ---------------------------------------------------------------------------------


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    """As `| head -1` does: it once ended with a traceback."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*PROGRAM, "--trace"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_it_runs_where_stdout_is_closed():
    closed = f"{sys.executable} {ROOT / 'd2cache.py'} --gen-length 2 >&-"
    result = subprocess.run(closed, shell=True, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0 and result.stderr.startswith("2 forwards")


def test_it_runs_where_stdout_is_no_file(monkeypatch):
    """As in a notebook, whose stdout has no `reconfigure`."""
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    monkeypatch.setattr(sys, "argv", ["d2cache.py", "--gen-length", "8"])
    d2cache.main()
    assert written.getvalue() == answer(8, **paper_settings(8)["d2cache"]) + "\n"


def test_characters_that_a_terminal_cannot_show_are_replaced():
    """Of a prompt, say: the screen shows all of the canvas, the trace the tokens."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = "import d2cache; d2cache.run_program(d2cache.make_parser(), lambda args: print('7 →'))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, "7 ?\n"), result.stderr


def test_an_interrupt_is_one_line_and_exit_code_130():
    process = subprocess.Popen(
        [*PROGRAM, "--gen-length", "256", "--policy", "vanilla", "--trace"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a background
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


LAZY = """
class Lazy:
    uses_attention = False

    def choose(self, state):
        return state.known if state.step == 2 else state.masked
"""

MISTAKES = [
    (["--policy", "nothing"], "policy is 'nothing', should be vanilla, prefix, dual, delayed, win"),
    (["--policy", "no.py:Mine"], "policy no.py:Mine: FileNotFoundError"),
    (["--policy", "mine.py:Mine"], "policy mine.py:Mine: NameError: name 'Mine' is not defined"),
    (
        ["--policy", "mine.py:Lazy"],
        "Lazy chose no masked position of an unfinished block in step 3",
    ),
    (["--gen-length", "0"], "--gen-length is 0, should be a whole number"),
    (["--gen-length", "many"], "'many'"),
    (["--gen-length", "500"], "gen_length is 500 after a prompt of"),
    (["--block-length", "7"], "block_length is 7, should divide gen_length 64"),
    (["--threshold", "1.5"], "threshold is 1.5, should be from 0 to 1"),
    (["--delay", "nan"], "--delay is nan, should be from 0 to 60 seconds"),
    (["--dtype", "int8"], "'int8'"),
    (["--device", "abacus"], "abacus"),
    (["--revision", "v1"], "revision is 'v1'"),
    (["--model", str(ROOT)], str(ROOT)),
    (["--prompt", "Bob has 3 zebras."], "'zebras'"),
    (["--prompt", ""], "prompt is '', should hold at least one token"),
    (["--prompt", "caf\udce9"], r"prompt 'caf\udce9' cannot be encoded"),
    (["--colour"], "--colour"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_a_mistake_costs_one_line_and_exit_code_2(arguments, message, command, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(LAZY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            command(*arguments)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert error.startswith("d2cache.py: error: ") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"), "CUDA out of memory. Tried"),
        (RuntimeError("sizes differ"), None),
    ],
)
def test_a_full_memory_is_one_line_and_a_bug_keeps_its_traceback(error, line, monkeypatch, capsys):
    def work(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["d2cache.py"])
    with pytest.raises(RuntimeError if line is None else SystemExit):
        d2cache.run_program(d2cache.make_parser(), work)
    assert (line or "") in capsys.readouterr().err
