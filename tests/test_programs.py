"""d2cache.py and bench.py as a user runs them: subprocesses, on the embedded model."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import bench
import d2cache
import pytest
import torch
from d2cache import COLOURS, EXAMPLE, D2Cache, State, draw_map, draw_screen, generate, settings
from model import Transformer, encode_prompt, load_tokenizer

from test_checkpoints import write_qwen2

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "tiny"
QUESTION = (
    "Tom has 30 pens. On Monday Tom buys 5 pens at the shop. How many pens does Tom have now?"
)


def run(program, *arguments):
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT.parent)


@pytest.mark.parametrize("policy", ["vanilla", "prefix", "dual", "d2cache"])
def test_d2cache_py_prints_the_decoded_text_and_nothing_else(policy):
    result = run("d2cache.py", "--policy", policy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Ben starts with 30 pens.") and "####" in result.stdout
    assert result.stdout.count("\n") == 1
    assert "64 forwards" in result.stderr


def test_d2cache_py_decodes_a_checkpoint_in_dreams_layout(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "tests" / "golden" / "dream_tiny" / name, tmp_path)
    write_qwen2(tmp_path)
    result = run("d2cache.py", "--model", tmp_path, "--prompt", "the hello", "--gen-length", 8)
    assert result.returncode == 0, result.stderr
    assert "8 forwards" in result.stderr and result.stdout.count("\n") >= 1


def in_terminal(*arguments, **environment):
    """All that d2cache.py writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "d2cache.py"), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | environment
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
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
    written = in_terminal("--gen-length", 16, "--prompt", QUESTION)
    frames = written.split("\033[H")[1:]
    assert len(frames) == 16
    canvases = [re.sub(r"\033\[[^mJK]*[mJK]", "", frame) for frame in frames]
    assert [canvas.count(" _") for canvas in canvases] == list(range(15, -1, -1))
    assert all(canvas.startswith(" " + QUESTION) for canvas in canvases)
    # Nothing is left of the frame before: neither in a line nor below the last.
    assert all(re.match(r"([^\n]*\033\[K\r\n)*[^\n]*\033\[J\r\n", frame) for frame in frames)
    known, fresh, masked, decoded = (code for _, code in COLOURS.values())
    assert f"\033[{known}m Tom" in frames[0] and f"\033[{known}m Tom" not in frames[1]
    assert all(f"\033[{fresh}m" in frame for frame in frames[1:])
    assert all(f"\033[{decoded}m" in frame for frame in frames)
    assert [f"\033[{masked}m _" in frame for frame in frames] == [True] * 15 + [False]
    assert canvases[-1].strip().splitlines()[-2].startswith("Tom starts with")


def test_no_color_asks_for_plain_text():
    written = in_terminal("--gen-length", 8, "--prompt", QUESTION, NO_COLOR="1")
    assert "\033" not in written and written.startswith("Tom starts")


def test_an_empty_no_color_asks_for_nothing():
    assert "\033" in in_terminal("--gen-length", 2, "--prompt", QUESTION, NO_COLOR="")


def test_the_screen_shows_special_tokens_masks_and_whole_lines():
    class TwoLines:
        def decode(self, ids, skip_special_tokens):
            return "<eos>" if not skip_special_tokens and ids == [0] else "a\nb"

    known, nobody = torch.tensor([[True, True, False]]), torch.zeros(1, 3, dtype=torch.bool)
    state = State(torch.tensor([[0, 5, 5]]), known, nobody, nobody, nobody, slice(0, 3), step=1)
    screen = draw_screen([(state, nobody)], TwoLines())
    assert screen == "\033[0m<eos>\033[0m\033[0ma\033[K\nb\033[0m\033[0m _\033[0m"


def test_a_token_just_decoded_is_marked_only_where_it_is_recomputed():
    known, nobody = torch.tensor([[True, True, True]]), torch.zeros(1, 3, dtype=torch.bool)
    fresh, chosen = torch.tensor([[False, True, True]]), torch.tensor([[True, True, False]])
    tokens, block = torch.tensor([[1, 2, 3]]), slice(1, 3)
    first = State(tokens, known, fresh, nobody, nobody, block, step=1)
    second = State(tokens, known, nobody, nobody, nobody, block, step=2)
    marked = d2cache.marks([(first, chosen), (second, chosen)])
    assert marked == {0: "known", 1: "just decoded"}


@pytest.mark.parametrize(
    "policy, reasons", [(D2Cache(), True), (settings(8)["dual"]["policy"], False)]
)
def test_the_labels_of_the_map_stand_where_they_belong(policy, reasons):
    """Only d2Cache recomputes for the reasons of d2Cache."""
    model, tokenizer = Transformer.from_pretrained(TINY), load_tokenizer(TINY)
    prompt, steps, svg = encode_prompt(tokenizer, QUESTION), [], "{http://www.w3.org/2000/svg}"
    observe = lambda state, chosen: steps.append((state, chosen))  # noqa: E731
    generate(model, prompt, 8, 4, policy=policy, on_step=observe)
    drawing = xml.fromstring(draw_map(steps, policy))
    left, top, width, height = map(float, drawing.get("viewBox").split())
    over, beside, legend = drawing.iter(svg + "text")
    assert (over.text, beside.text) == ("prompt", "response")
    assert float(beside.get("x")) == prompt.shape[1]
    assert top < float(over.get("y")) < 0 and 8 < float(legend.get("y")) < top + height
    assert left <= 0 and prompt.shape[1] + 8 <= left + width
    entries = {entry.tail.strip(): entry.get("fill") for entry in legend.iter(svg + "tspan")}
    assert {name.partition(" (")[0]: colour for name, colour in entries.items()} == {
        mark: colour for mark, (colour, _) in COLOURS.items()
    }
    assert (
        "masked (certainty prior)" in entries and "known (attention rollout)" in entries
    ) == reasons
    assert any("(" in name for name in entries) == reasons


@pytest.mark.parametrize("policy", ["vanilla", "dual", "d2cache"])
def test_the_map_shows_why_each_position_was_recomputed_and_what_was_decoded(policy):
    model, tokenizer = Transformer.from_pretrained(TINY), load_tokenizer(TINY)
    prompt, steps = encode_prompt(tokenizer, EXAMPLE), []
    observe = lambda state, chosen: steps.append((state, chosen))  # noqa: E731
    generate(model, prompt, 32, on_step=observe, **settings(32)[policy])
    P, expected, fresh = prompt.shape[1], {mark: [] for mark in COLOURS}, set()
    for y, (state, chosen) in enumerate(steps):
        decoded = {x for x in range(P, P + 32) if state.fresh[0, x]}
        masked = {x for x in range(P, P + 32) if not state.known[0, x]}
        for x in chosen[0].nonzero()[:, 0].tolist():
            why = 3 if x in decoded else 2 if x in masked else 1 if x in fresh else 0
            expected[list(COLOURS)[why]].append((x, y))
        fresh = decoded
    drawing, svg = (
        xml.fromstring(draw_map(steps, settings(32)[policy]["policy"])),
        "{http://www.w3.org/2000/svg}",
    )
    drawn = {path.get("fill"): path.get("d") for path in drawing.iter(svg + "path")}
    for mark, (colour, _) in COLOURS.items():
        cells = re.findall(r"M(\d+) (\d+)h1v1h-1z", drawn[colour])
        assert sorted((int(x), int(y)) for x, y in cells) == sorted(expected[mark])
    said = " ".join("".join(text.itertext()) for text in drawing.iter(svg + "text"))
    assert all(name in said for name in ("prompt", "response", *COLOURS))


def test_the_map_of_the_prompt_given_is_written_where_the_command_line_says(tmp_path):
    result = run(
        "d2cache.py", "--gen-length", 32, "--prompt", QUESTION, "--map", tmp_path / "x.svg"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Tom starts with 30 pens.") and "\033" not in result.stdout
    assert xml.parse(tmp_path / "x.svg").getroot().tag.endswith("svg")


def test_the_python_of_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.endswith("#### 31\n"), result.stderr


MISTAKES = [
    ("d2cache.py", ["--policy", "nothing"], "'nothing'"),
    ("d2cache.py", ["--gen-length", "0"], "--gen-length is 0"),
    ("d2cache.py", ["--gen-length", "many"], "'many'"),
    ("d2cache.py", ["--gen-length", "500"], "gen_length is 500 after a prompt of"),
    ("d2cache.py", ["--model", str(ROOT)], "tokenizer.json"),
    ("d2cache.py", ["--model", "/no/such/folder"], "/no/such/folder"),
    ("d2cache.py", ["--prompt", "Bob has 3 zebras."], "'Bob', 'zebras'"),
    ("d2cache.py", ["--prompt", ""], "prompt is '', should hold at least one token"),
    ("d2cache.py", ["--device", "abacus"], "abacus"),
    ("d2cache.py", ["--colour"], "--colour"),
    ("d2cache.py", ["--map", "/no/such/folder/x.svg"], "/no/such/folder/x.svg"),
    ("d2cache.py", ["--map", str(ROOT)], "Is a directory"),
    ("bench.py", ["--problems", "0"], "--problems is 0"),
    ("bench.py", ["--data", "/no/such/file"], "/no/such/file"),
    ("bench.py", ["--data", str(TINY / "config.json")], "config.json, line 1"),
    ("bench.py", ["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
    ("bench.py", ["--model", str(ROOT)], str(ROOT)),
]


@pytest.mark.parametrize("program, arguments, message", MISTAKES)
def test_a_mistake_costs_one_line_and_exit_code_2(program, arguments, message, monkeypatch, capsys):
    """Called here, which saves the imports; two of them as a process follow."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as end:
        (d2cache if program == "d2cache.py" else bench).main()
    out, error = capsys.readouterr()
    # A map that cannot be written does not cost the answer.
    assert out.startswith("Ben starts with 30 pens.") if "--map" in arguments else out == ""
    assert end.value.code == 2
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize("program, arguments, message", [MISTAKES[1], MISTAKES[-1]])
def test_a_mistake_ends_the_process_with_exit_code_2(program, arguments, message):
    result = run(program, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and message in result.stderr


def table(lines, title):
    """The rows under `title`, {first cell: other cells}; cells stand two or more spaces apart."""
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    rows = {}
    for line in lines[start + 3 :]:
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if len(cells) < 3:
            break
        rows[cells[0]] = cells[1:]
    return rows


def test_bench_py_prints_both_tables_and_writes_the_same_numbers(tmp_path):
    file = tmp_path / "numbers.json"
    sizes = ["--problems", 2, "--prompt-length", 24, "--gen-length", 8, "--batch", 1]
    data = tmp_path / "data.jsonl"
    data.write_text(2 * (json.dumps({"question": QUESTION, "answer": "#### 35"}) + "\n"))
    result = run("bench.py", "--data", data, *sizes, "--json", file)
    assert result.returncode == 0, result.stderr
    lines, numbers = result.stdout.splitlines(), json.loads(file.read_text())
    assert lines[0] == f"A problem   {QUESTION}"
    for title, report in (("QUALITY", numbers["quality"]), ("SPEED", numbers["speed"][0])):
        rows = report["rows"]
        printed = table(lines, title)
        assert list(printed) == [row["policy"].strip() for row in rows]
        for row in rows:
            for cell, (column, value) in zip(printed[row.pop("policy").strip()], row.items()):
                if value is None:
                    assert cell == "-", column
                else:
                    assert ("%" in cell) == (column in ("exact match", "same text", "recomputed"))
                    shown = float(cell.strip("%")) / (100 if "%" in cell else 1)
                    assert shown == pytest.approx(value, rel=0.01, abs=0.01), column
    for vanilla in numbers["quality"]["rows"][:3]:
        assert (
            vanilla["recomputed"] == 1
            and vanilla["forwards"] == 64
            and vanilla["same text"] is None
        )


def test_bench_py_decodes_and_times_a_checkpoint():
    result = run("bench.py", "--model", TINY, "--gen-length", 32, "--prompt", QUESTION)
    assert result.returncode == 0, result.stderr
    assert "d2Cache     Tom starts with 30 pens." in result.stdout
    assert "QUALITY" not in result.stdout
    assert set(table(result.stdout.splitlines(), "SPEED")) == {
        "vanilla",
        "prefix",
        "dual",
        "d2cache",
    }
