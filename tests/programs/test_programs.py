"""d2cache.py, bench.py and the README's code as a user runs them: processes, embedded model."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from d2cache import COLOURS, EMBEDDED_MODEL, EXAMPLE, generate, settings
from model import Transformer, decode_response, encode_prompt, load_tokenizer

ROOT = Path(__file__).parents[2]


def run(program, *arguments, **options):
    """The finished process, started outside the repository."""
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    options = {"capture_output": True, "cwd": ROOT.parent} | options
    return subprocess.run(command, text=True, timeout=300, **options)


def answer(gen_length, **arguments):
    """What `generate` answers to the example."""
    tokenizer, model = load_tokenizer(EMBEDDED_MODEL), Transformer.from_pretrained(EMBEDDED_MODEL)
    prompt = encode_prompt(tokenizer, EXAMPLE)
    tokens = generate(model, prompt, gen_length, **arguments)
    return decode_response(tokenizer, tokens[0, prompt.shape[1] :], model.config.end_ids)


def test_d2cache_py_prints_the_decoded_text_and_nothing_else():
    result = run("d2cache.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout == answer(64, **settings(64)["d2cache"]) + "\n"
    assert re.fullmatch(r"64 forwards, [\d.]+% of positions recomputed\n", result.stderr)


OWN_POLICY = """
from dataclasses import dataclass

from d2cache import D2Cache, highest


@dataclass(frozen=True)
class Mine(D2Cache):
    def choose(self, state):
        candidates = highest(state.confidence, state.masked & state.block, self.k)
        return candidates | self.attended(state) | state.fresh
"""


def test_a_policy_of_ones_own_imports_d2cache_and_decodes(tmp_path):
    """Its module d2cache is another than the program, which runs under the name __main__."""
    (tmp_path / "mine.py").write_text(OWN_POLICY)
    flags = ["--gen-length", 12, "--policy", "mine.py:Mine(k=3)", "--trace"]
    result = run("d2cache.py", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 14 and "  3: " in result.stdout


def in_terminal(*arguments):
    """All that d2cache.py writes to a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "d2cache.py"), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
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
    written = in_terminal("--gen-length", 16, "--delay", 0)
    frames = written.split("\033[H")[1:]
    assert len(frames) == 16
    canvases = [re.sub(r"\033\[[^mJK]*[mJK]", "", frame) for frame in frames]
    assert [canvas.count(" _") for canvas in canvases] == list(range(15, -1, -1))
    assert all(canvas.startswith(" " + EXAMPLE) for canvas in canvases)
    # Nothing is left of the frame before: neither in a line nor below the last.
    assert all(re.match(r"([^\n]*\033\[K\r\n)*[^\n]*\033\[J\r\n", frame) for frame in frames)
    assert all(f"\033[{COLOURS['committed']}m" in frame for frame in frames)
    last = canvases[-1].strip().splitlines()
    assert last[-2:-1] == [answer(16, **settings(16)["d2cache"])] and "16 forwards" in last[-1]


def test_a_reader_that_has_seen_enough_ends_it_quietly():
    """As `| head -1` does: it once ended with a traceback."""
    read, write = os.pipe()
    os.close(read)
    streams = {"capture_output": False, "stdout": write, "stderr": subprocess.PIPE}
    result = run("d2cache.py", "--trace", **streams)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        ("d2cache.py", ["--prompt", "caf\udce9"], r"prompt holds '\udce9'"),
        ("bench.py", ["--model", str(ROOT)], str(ROOT)),
    ],
)
def test_a_mistake_ends_the_process_with_one_line_and_exit_code_2(program, arguments, message):
    result = run(program, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and message in result.stderr


def table(lines, title):
    """The rows under `title`, {first cell: other cells}; cells stand two or more spaces apart."""
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    rows = {}
    for line in lines[start + 3 :]:
        cells = re.split("  +", line.strip())
        if len(cells) < 3:
            break
        rows[cells[0]] = cells[1:]
    return rows


def test_bench_py_prints_both_tables_of_a_checkpoint_and_writes_the_same_numbers(tmp_path):
    (tmp_path / "mine.py").write_text(OWN_POLICY)
    data, file = tmp_path / "data.jsonl", tmp_path / "numbers.json"
    data.write_text(json.dumps({"question": EXAMPLE, "answer": "#### 31"}) + "\n")
    flags = ["--model", EMBEDDED_MODEL, "--gen-length", 4, "--data", data, "--json", file]
    result = run("bench.py", *flags, "--policy", "mine.py:Mine(k=3)", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    numbers = json.loads(file.read_text())
    assert lines[0] == f"A problem   {EXAMPLE}"
    assert f"d2Cache     {answer(4, **settings(4)['d2cache'])}" in lines
    for title, report in (("QUALITY", numbers["quality"]), ("SPEED", numbers["speed"][0])):
        printed = table(lines, title)
        assert list(printed) == [row["policy"].strip() for row in report["rows"]]
        assert sum(name.startswith("Mine") for name in printed) == 2  # by prior and in blocks
        for row in report["rows"]:
            values = list(row.values())[1:]
            assert_same(printed[row["policy"].strip()], values)


def assert_same(cells, values):
    """Printed cells are the numbers, rounded; a missing one is a dash."""
    assert len(cells) == len(values)
    for cell, value in zip(cells, values):
        if value is None:
            assert cell == "-"
        else:
            shown = float(cell.strip("%")) / (100 if "%" in cell else 1)
            assert shown == pytest.approx(value, rel=0.01, abs=0.01)


def test_the_python_of_the_readme_runs():
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
