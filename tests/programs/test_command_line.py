"""The command line of d2cache.py, called in this process: flags, trace, screen, mistakes."""

import io
import re
import shutil
import sys
from ast import literal_eval
from functools import cache
from pathlib import Path

import d2cache
import pytest
import torch
from d2cache import (
    COLOURS,
    EMBEDDED_MODEL,
    EXAMPLE,
    TRACE_TITLES,
    D2Cache,
    RecomputeAll,
    State,
    decode,
    draw_screen,
    places,
    roles,
    settings,
)
from hypothesis import given
from hypothesis import strategies as st
from model import Transformer, decode_response, encode_prompt, load_tokenizer

import oracle
from checkpoints import write_qwen2

ROOT = Path(__file__).parents[2]
G = 24  # response tokens of a decode here
SIGMA = settings(G)["d2cache"]["sigma"]
EVERY_POLICY = pytest.mark.parametrize("policy", settings(G))


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
    """The embedded model, its tokenizer and the example as ids."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    return Transformer.from_pretrained(EMBEDDED_MODEL), tokenizer, encode_prompt(tokenizer, EXAMPLE)


@cache
def decoded(policy):
    """The state after each step of the example's decode."""
    model, _, prompt = embedded()
    return list(decode(model, prompt, G, **settings(G)[policy]))


def steps(policy):
    """Each step of the same decode after the first: the state before, and the state after."""
    return list(zip(decoded(policy), decoded(policy)[1:]))


def where(positions):
    """The set of positions of the one sequence where a (1, T) tensor is true."""
    return set(positions[0].nonzero()[:, 0].tolist())


def one(values, dtype=torch.bool):
    """A tensor (1, T): that of one sequence."""
    return torch.tensor([values], dtype=dtype)


# ---- What it prints ------------------------------------------------------------------------------


@EVERY_POLICY
def test_the_answer_is_that_of_decode_with_the_policys_settings(policy, command):
    model, tokenizer, prompt = embedded()
    states = decoded(policy)
    response = states[-1].tokens[0, prompt.shape[1] :]
    out, err = command("--gen-length", G, "--policy", policy)
    assert out == decode_response(tokenizer, response, model.config.end_ids) + "\n"
    share = sum(state.chosen.float().mean().item() for state in states) / G
    assert err == f"{G} forwards, {share:.1%} of positions recomputed\n"


def test_the_answer_is_the_response_up_to_any_of_the_models_ends(command, monkeypatch):
    asked = []
    monkeypatch.setattr(d2cache, "decode_response", lambda *args: asked.append(args) or "yes")
    assert command("--gen-length", G).out == "yes\n"
    ((_, response, ends),) = asked
    assert torch.equal(response, decoded("d2cache")[-1].tokens[0, -G:])
    assert ends == embedded()[0].config.end_ids


def test_a_checkpoint_in_dreams_layout_decodes(tmp_path, command):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "tests" / "golden" / "dream_tiny" / name, tmp_path)
    write_qwen2(tmp_path)
    out, err = command("--model", tmp_path, "--prompt", "the hello", "--gen-length", 8)
    assert "8 forwards" in err and out.count("\n") >= 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_a_terminal_cannot_show_are_replaced(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    monkeypatch.setattr(sys, "argv", ["d2cache.py", "--gen-length", "1"])
    monkeypatch.setattr(d2cache, "decode_response", lambda *arguments: "7 \u2192 \u4e03")
    d2cache.main()
    assert written.getvalue().decode(encoding) == "7 ? ?\n"


# ---- What its flags do ---------------------------------------------------------------------------


FLAGS = [
    ([], settings(G)["d2cache"] | {"threshold": None, "stop_at_eos": False}),
    (["--policy", "vanilla"], {"policy": RecomputeAll()}),
    (["--policy", "dual"], settings(G)["dual"]),
    (["--block-length", "8"], {"policy": settings(G)["d2cache"]["policy"], "block_length": 8}),
    (["--block-length", "8"], {"sigma": None}),
    (["--policy", "dual", "--block-length", "4"], {"block_length": 4}),
    (["--threshold", "0.9"], {"threshold": 0.9}),
    (["--stop-at-eos"], {"stop_at_eos": True}),
    (["--policy", f"{ROOT}/d2cache.py:D2Cache(k=3)", "--temperature", "0"], {"sigma": SIGMA}),
]


@pytest.mark.parametrize("arguments, expected", FLAGS)
def test_a_flag_is_an_argument_of_decode(arguments, expected, command, monkeypatch):
    asked = {}

    def spy(model, prompt, gen_length, **arguments):
        asked.update(arguments)
        return decode(model, prompt, gen_length, **arguments)

    monkeypatch.setattr(d2cache, "decode", spy)
    command("--gen-length", G, *arguments)
    assert {name: asked[name] for name in expected} == expected


def test_dtype_device_and_revision_are_the_models(command, monkeypatch):
    asked = []
    model, tokenizer, _ = embedded()
    monkeypatch.setattr(d2cache, "load_tokenizer", lambda *args: asked.append(args) or tokenizer)
    monkeypatch.setattr(Transformer, "from_pretrained", lambda *args: asked.append(args) or model)
    flags = ["--model", "a/b", "--revision", "v1", "--dtype", "bfloat16", "--device", "cpu"]
    command("--gen-length", 1, *flags)
    assert asked == [("a/b", "v1"), ("a/b", "cpu", "bfloat16", "v1")]


def test_any_temperature_above_0_draws(command):
    _, err = command("--gen-length", 2, "--temperature", 0.01)
    assert err.startswith("2 forwards")  # decode refuses one without a generator


def test_a_seed_is_a_draw(command):
    def answer(seed, temperature):
        return command("--gen-length", G, "--temperature", temperature, "--seed", seed).out

    greedy = answer(0, 0)
    assert answer(1, 0) == greedy
    assert answer(1, 9) == answer(1, 9) != greedy
    assert answer(2, 9) != answer(1, 9)


@given(st.integers(1, 400))
def test_settings_fit_every_length(gen_length):
    for name, arguments in settings(gen_length).items():
        block_length = arguments.get("block_length", gen_length)
        assert gen_length % block_length == 0, name
        assert block_length <= 32 or "block_length" not in arguments


def test_settings_of_256_tokens_are_the_papers():
    paper = settings(256)
    assert paper["d2cache"] == {"policy": D2Cache(k=32, p=0.1, sigma=10.0), "sigma": 10.0}
    assert paper["prefix"]["block_length"] == paper["dual"]["block_length"] == 32
    assert settings(1024)["d2cache"] == paper["d2cache"]


# ---- The trace -----------------------------------------------------------------------------------


@st.composite
def positions(draw):
    """(T,) bool."""
    return torch.tensor(draw(st.lists(st.booleans(), min_size=1, max_size=30)))


def places_read(words):
    """The positions that "9: 0-6 11 13" lists."""
    count, _, runs = words.partition(":")
    found = []
    for run in runs.split():
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert len(found) == int(count)
    return found


@given(positions())
def test_places_list_the_positions_and_their_number(positions):
    assert places_read(places(positions)) == positions.nonzero()[:, 0].tolist()


def test_places_are_runs():
    assert places(torch.tensor([True, True, True, False, True, False, True])) == "5: 0-2 4 6"
    assert places(torch.tensor([False])) == "0"


def trace_read(out):
    """The lines of a trace: commits [(position, token, confidence, prior)], {reason: set}."""
    titles, *lines, answer = out.splitlines()
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
    chooses = settings(G)[policy]["policy"].choose
    trace = trace_read(command("--gen-length", G, "--policy", policy, "--trace").out)
    P = embedded()[2].shape[1]
    expected = [{"candidates": set(range(P, P + G)), "fresh": set(), "attended": set(range(P))}]
    for before in decoded(policy)[:-1]:
        chosen, masked, fresh = where(chooses(before)), where(before.masked), where(before.fresh)
        known = chosen - masked
        reasons = {"candidates": chosen & masked, "fresh": known & fresh, "attended": known - fresh}
        expected.append(reasons)
    assert [reasons for _, reasons in trace] == expected


def test_the_reasons_are_the_stages_of_d2cache():
    policy = settings(G)["d2cache"]["policy"]
    for before, state in steps("d2cache"):
        role = roles(before, state)
        assert where(role["candidates"]) == where(policy.about_to_be_decoded(before))
        assert where(role["fresh"]) == where(before.fresh)
        assert where(role["attended"]) == where(policy.attended(before)) - where(before.fresh)


@EVERY_POLICY
def test_every_recomputed_position_has_one_reason(policy):
    for before, state in [(None, decoded(policy)[0]), *steps(policy)]:
        role = roles(before, state)
        reasons = [role[name].int() for name in ("attended", "fresh", "candidates")]
        assert torch.equal(sum(reasons), state.chosen.int())


def test_what_is_not_recomputed_has_no_reason():
    """Also a token decoded just before: a policy need not choose it."""
    tokens, nobody = one([1, 2, 3, 4], torch.long), one([0, 0, 0, 0])
    before = State(tokens, one([1, 1, 0, 0]), one([1, 1, 0, 0]), nobody, nobody, nobody, step=1)
    known, fresh, chosen = one([1, 1, 1, 0]), one([0, 0, 1, 0]), one([0, 1, 1, 0])
    state = State(tokens, known, fresh, nobody, nobody, nobody, step=2, chosen=chosen)
    reasons = {name: where(positions) for name, positions in roles(before, state).items()}
    assert reasons == {"attended": set(), "fresh": {1}, "candidates": {2}, "committed": {2}}


@EVERY_POLICY
def test_the_trace_lists_what_was_committed_and_how_sure(policy, command):
    """With the prior before the commit, by the oracle; it is the highest where it ranks."""
    tokenizer = embedded()[1]
    trace = trace_read(command("--gen-length", G, "--policy", policy, "--trace").out)
    known = [[True] * embedded()[2].shape[1] + [False] * G]
    for (commits, reasons), state in zip(trace, decoded(policy), strict=True):
        ((i, text, confidence, prior),) = commits
        density = oracle.density(known[0], SIGMA)
        assert where(state.known) - where(torch.tensor(known)) == {i}
        assert text == tokenizer.decode([state.tokens[0, i].item()], skip_special_tokens=False)
        assert confidence == pytest.approx(state.confidence[0, i].item(), abs=6e-4)
        assert prior == pytest.approx(state.confidence[0, i].item() * density[i], abs=6e-4)
        if policy in ("window", "d2cache"):
            rivals = [state.confidence[0, j].item() * density[j] for j in reasons["candidates"]]
            assert prior >= max(rivals) - 6e-4
        known = state.known.tolist()


def test_the_trace_lists_every_token_that_a_threshold_lets_pass(command):
    out = command("--gen-length", G, "--threshold", 0, "--trace").out
    ((commits, reasons),) = trace_read(out)
    assert {i for i, *_ in commits} == reasons["candidates"] and len(commits) == G


class Words:
    """A tokenizer whose words are w0, w1 ..., and the end 0."""

    def decode(self, ids, skip_special_tokens):
        return f"w{ids[0]}" if ids != [0] or skip_special_tokens else "<eos>"


def test_what_follows_the_end_is_counted_and_not_listed():
    """Nobody predicted it: its confidence is that of another token, or of an earlier step."""
    yes = one([1, 1, 1, 1])
    tokens, confidence = one([5, 0, 0, 0], torch.long), one([0, 0.5, 0.2, 0.3], torch.float64)
    fresh = one([0, 1, 1, 1])
    state = State(tokens, yes, fresh, confidence, confidence, ~yes, step=7, chosen=fresh)
    line = d2cache.trace(None, state, 1.0, Words(), end_ids=(0,))
    assert "1 '<eos>' 0.500" in line and "and 2 behind it" in line and "0.200" not in line
    assert "behind" not in d2cache.trace(None, state, 1.0, Words())


def test_an_answers_end_ends_the_trace_where_it_is_asked_for(command):
    lines = command("--stop-at-eos", "--trace").out.splitlines()
    assert ["behind it" in line for line in lines] == [False] * (len(lines) - 2) + [True, False]
    assert "behind it" not in command("--trace").out


def test_an_end_after_a_masked_position_is_no_end_yet():
    """In the order of confidence it may come first."""
    known = one([0, 1, 1])
    tokens, confidence = one([5, 0, 0], torch.long), one([0.1, 0.5, 0.25], torch.float64)
    state = State(tokens, known, known, confidence, confidence, known, step=7, chosen=known)
    line = d2cache.trace(None, state, 1.0, Words(), end_ids=(0,))
    assert "1 '<eos>' 0.500" in line and "2 '<eos>' 0.250" in line and "behind" not in line


# ---- The screen ----------------------------------------------------------------------------------


def cells(screen):
    """What a screen shows, piece by piece: (colour code, text)."""
    return re.findall(r"\033\[([\d;]+)m(.*?)\033\[0m", screen, re.DOTALL)


@EVERY_POLICY
def test_the_screen_colours_every_position_by_what_was_done_there(policy):
    """What was committed shows as committed, though it was a candidate, too."""
    tokenizer = embedded()[1]
    for before, state in steps(policy):
        screen = draw_screen(before, state, tokenizer, share=0.5)
        colours = [code for code, _ in cells(screen)[: state.tokens.shape[1]]]
        for i, code in enumerate(colours):
            if state.fresh[0, i]:
                expected = COLOURS["committed"]
            elif not state.chosen[0, i]:
                expected = "0"
            elif before.masked[0, i]:
                expected = COLOURS["candidates"]
            else:
                expected = COLOURS["fresh" if before.fresh[0, i] else "attended"]
            assert code == expected, i


def test_the_screen_ends_with_the_step_the_share_and_the_legend():
    state = decoded("d2cache")[2]
    lines = draw_screen(None, state, embedded()[1], share=0.123).split("\n")[-3:]
    assert lines[0] == "\033[K"
    assert lines[1] == "step 3, 12.3% of the positions recomputed so far\033[K"
    assert cells(lines[2]) == [(code, name) for name, code in COLOURS.items()]
    assert lines[2].endswith("plain: from the cache")


def test_the_screen_shows_special_tokens_masks_and_whole_lines():
    class TwoLines(Words):
        def decode(self, ids, skip_special_tokens):
            return super().decode(ids, skip_special_tokens) if ids == [0] else "a\nb"

    known, nobody = one([1, 1, 0]), one([0, 0, 0])
    tokens = one([0, 5, 5], torch.long)
    state = State(tokens, known, nobody, nobody, nobody, nobody, step=1, chosen=nobody)
    screen = draw_screen(None, state, TwoLines(), share=1)
    assert screen.startswith("\033[0m<eos>\033[0m\033[0ma\033[K\nb\033[0m\033[0m _\033[0m\033[K\n")


@pytest.fixture
def terminal(monkeypatch, command):
    """Runs d2cache.py in what says that it is a terminal; what it showed, and how long it slept."""

    def run(*arguments):
        pauses = []
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(d2cache.time, "sleep", pauses.append)
        return command(*arguments).out, pauses

    monkeypatch.delenv("NO_COLOR", raising=False)
    return run


def test_a_terminal_shows_every_step_as_long_as_the_delay(terminal):
    out, pauses = terminal("--gen-length", 5, "--delay", 0.25)
    assert out.count("\033[H") == 5 and pauses == [0.25] * 5


def test_the_share_on_the_screen_is_that_of_all_steps_so_far(terminal):
    out, _ = terminal("--gen-length", G)
    shares = [state.chosen.float().mean().item() for state in decoded("d2cache")]
    so_far = [f"{sum(shares[:n]) / n:.1%}" for n in range(1, G + 1)]
    assert re.findall(r"step \d+, ([\d.]+%)", out) == so_far


@pytest.mark.parametrize("value, coloured", [("1", False), ("", True)])
def test_no_color_asks_for_plain_text_unless_it_is_empty(value, coloured, terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", value)
    out, pauses = terminal("--gen-length", 2)
    assert ("\033" in out) == bool(pauses) == coloured


def test_the_trace_takes_the_screens_place(terminal):
    out, pauses = terminal("--gen-length", 2, "--trace")
    assert "\033" not in out and not pauses and out.startswith("step  committed")


# ---- Mistakes ------------------------------------------------------------------------------------

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
    (["--policy", "mine.py:Lazy"], "policy Lazy chose no masked position of an unfinished block"),
    (["--gen-length", "0"], "--gen-length is 0, should be at least 1"),
    (["--gen-length", "many"], "'many'"),
    (["--gen-length", "500"], "gen_length is 500 after a prompt of"),
    (["--block-length", "7"], "block_length is 7, should divide gen_length 64"),
    (["--threshold", "1.5"], "threshold is 1.5, should be from 0 to 1"),
    (["--temperature", "-1"], "temperature is -1.0"),
    (["--temperature", "nan"], "temperature is nan"),
    (["--seed", "-1"], "--seed is -1, should be from 0 to 2**63 - 1"),
    (["--seed", str(2**63)], "--seed is 9223372036854775808"),
    (["--delay", "-1"], "--delay is -1.0, should be from 0 to 60 seconds"),
    (["--delay", "nan"], "--delay is nan"),
    (["--delay", "inf"], "--delay is inf"),
    (["--dtype", "int8"], "dtype is int8"),
    (["--device", "abacus"], "abacus"),
    (["--revision", "v1"], "revision is 'v1'"),
    (["--model", str(ROOT)], str(ROOT)),
    (["--model", "/no/such/folder"], "/no/such/folder"),
    (["--prompt", "Bob has 3 zebras."], "'zebras'"),
    (["--prompt", ""], "prompt is '', should hold at least one token"),
    (["--prompt", "caf\udce9"], r"prompt holds '\udce9'"),
    (["--colour"], "--colour"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_a_mistake_costs_one_line_and_exit_code_2(
    arguments, message, monkeypatch, capsys, tmp_path
):
    (tmp_path / "mine.py").write_text(LAZY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["d2cache.py", *arguments])
    with pytest.raises(SystemExit) as end:
        d2cache.main()
    out, error = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert error.startswith("d2cache.py: error: ") and error.count("\n") == 1
    assert message in error


def test_a_broken_contract_names_the_step(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.py").write_text(LAZY)
    monkeypatch.setattr(sys, "argv", ["d2cache.py", "--policy", f"{tmp_path}/mine.py:Lazy"])
    with pytest.raises(SystemExit):
        d2cache.main()
    assert capsys.readouterr().err.endswith(" in step 3\n")


def test_a_bug_keeps_its_traceback_and_a_full_memory_does_not(monkeypatch, capsys):
    def main(said):
        def run(args):
            raise RuntimeError(said)

        monkeypatch.setattr(sys, "argv", ["d2cache.py"])
        monkeypatch.setattr(d2cache, "run", run)
        d2cache.main()

    with pytest.raises(RuntimeError, match="sizes differ"):
        main("sizes differ")
    with pytest.raises(SystemExit):
        main("CUDA out of memory.\nTried to allocate 2 GiB")
    assert capsys.readouterr().err.endswith("CUDA out of memory. Tried to allocate 2 GiB\n")
