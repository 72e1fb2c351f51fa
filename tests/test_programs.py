"""d2cache.py and bench.py as a user runs them: subprocesses, on the embedded model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "tiny"
QUESTION = (
    "Ben has 30 pens. On Monday Ben buys 5 pens at the shop. How many pens does Ben have now?"
)


def run(program, *arguments):
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT.parent)


@pytest.mark.parametrize("policy", ["vanilla", "prefix", "dual", "d2cache"])
def test_d2cache_py_prints_the_decoded_text_and_nothing_else(policy):
    result = run("d2cache.py", "--policy", policy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Anna starts with 21 stickers.") and "####" in result.stdout
    assert result.stdout.count("\n") == 1
    assert "64 forwards" in result.stderr


def test_d2cache_py_decodes_the_prompt_it_is_given():
    result = run("d2cache.py", "--prompt", QUESTION, "--gen-length", 32)
    assert result.stdout.startswith("Ben starts with 30 pens.")


MISTAKES = [
    ("d2cache.py", ["--policy", "nothing"], "'nothing'"),
    ("d2cache.py", ["--gen-length", "0"], "--gen-length is 0"),
    ("d2cache.py", ["--gen-length", "many"], "'many'"),
    ("d2cache.py", ["--gen-length", "500"], "max_sequence_length 512"),
    ("d2cache.py", ["--model", str(ROOT)], "tokenizer.json"),
    ("d2cache.py", ["--model", "/no/such/folder"], "/no/such/folder"),
    ("d2cache.py", ["--prompt", "Bob has 3 zebras."], "'Bob', 'zebras'"),
    ("d2cache.py", ["--device", "abacus"], "abacus"),
    ("d2cache.py", ["--colour"], "--colour"),
    ("bench.py", ["--problems", "0"], "--problems is 0"),
    ("bench.py", ["--data", "/no/such/file"], "/no/such/file"),
    ("bench.py", ["--data", str(TINY / "config.json")], "config.json, line 1"),
    ("bench.py", ["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
    ("bench.py", ["--model", str(ROOT)], str(ROOT)),
]


@pytest.mark.parametrize("program, arguments, message", MISTAKES)
def test_a_mistake_costs_one_line_and_exit_code_2(program, arguments, message):
    result = run(program, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
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
            vanilla["recomputed"] == 1 and vanilla["forwards"] == 64 and vanilla["same text"] == 1
        )


def test_bench_py_decodes_and_times_a_checkpoint():
    result = run("bench.py", "--model", TINY, "--gen-length", 32, "--prompt", QUESTION)
    assert result.returncode == 0, result.stderr
    assert "d2Cache     Ben starts with 30 pens." in result.stdout
    assert "QUALITY" not in result.stdout
    assert set(table(result.stdout.splitlines(), "SPEED")) == {
        "vanilla",
        "prefix",
        "dual",
        "d2cache",
    }
