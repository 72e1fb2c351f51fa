"""Scores of responses, data files and programs that are written by hand, beside the right ones."""

import fcntl
import json
import os
import re
import sys
import time
from decimal import Decimal

import pytest
import run_code
from scores import Problem, final_number, is_right, read_problems, runs_code

# ---- Numbers -------------------------------------------------------------------------------------

# What a response comes to, and such responses, with four spaces between them.
NUMBERS = """
    7          Done: 7.    = 7.    7.00    3 + 4 = 7    <<3+4=7>>7    (7)    "7"    7...
    7          **7**    _7_    `7`    \\(7\\)    $$7$$    = 7 \\]    ~7    Answer:7
    7          7km    7 apples    7 km/h    $7/hour    7%    7\\%    7th    7-day    US$7
    7          \\n- 7 eggs    * 7    \\n7\\n    so 7 - yes    1 and 7    3, 4, 7    \uff17
    -7         -7    = -7    \u22127    \u20137    -$7    $-7    (-7)    -**7**    $-7$
    0.5        0.5    .5    about .50    $.5
    1234.5     1,234.5    $1,234.50    1{,}234.5    1,\\!234.5    1\\,234.5    1\\ 234.5
    1234567    1\u202f234\u202f567    1\u00a0234\u2009567    1 234 567    1~234~567
    7          The answer is 3 + 4 = 7.    Answer: 16 - 9 = 7
    567        in 2021 567 eggs    1, 567
    18         Answer: 16 - 3 - 4 = 9 eggs. 9 * 2 = $18    The answer is not 7 but 18
    None       none    ####    7/2    7 / 2    2 1/2    2\u00bd    2 and a half    7 or \u00bd
    None       1,23    0,500    1.000,50    1,2345    3,4,5    3.5.1    007    1'000
    None       10^3    10^{3}    10**3    10 ** 3    10\u00b3    1e3    1.5e-3    2 * 10^3
    None       10k    10 k    $1.5M    2bn    2 million    2 hundred.    2\\pi    2 \\pi
    None       3-5    3 - 5    (3)-5    9 -2    x-5    x - 5    = - 7    5-7    \\boxed{- 7}
    None       3 + 4    3*4    3 x 4    3 \\times 4    3 divided by 4    minus 7    = 4 + x
    None       x5    x_5    B12    COVID-19    12:30    6'2    \\sqrt{49}    \u221a49    7x    7/x
    18         \\boxed{18}, not 7    \\boxed{ \\$18 }    \\boxed{x = 18}    \\boxed{18\\%}
    18         \\boxed{18 \\text{ eggs}} of 7    \\boxed{\\text{18}}    \\boxed{18^\\circ}
    18         \\boxed{7} so \\boxed{18}    \\boxed{x} = 18    #### $\\boxed{18}$ of 7
    1000       \\boxed{1,\\!000} of 7    \\boxed{1\\,000}    \\boxed{1{,}000}
    None       \\boxed{7/2}    \\boxed{\\frac{3}{4}}    \\boxed{3, 4}    \\boxed{3}/4
    None       \\boxed{7 \\text{ or } 8}    \\boxed{\\frac{\\sqrt{2}}{2}}    -\\boxed{7}
    None       \\boxed{3 + 4}    \\boxed{7
    18         #### 18    ####18 of 7    #### **18**, not 7    so 7 #### 18 #### 19    #### $18
    18         #### 18 of $7    \\boxed{7} #### 18    #### 18\\n\\nIs 7 + 8 = 15?
    18         #### 1. Add them: 18    #### Step 1: so 18    #### 7: Add\\nso 18
    None       #### 7/2 of 7    #### 2 1/2    #### 1e3 or 7    #### 16 - 3 = 7    #### 2 million
"""
LINES = [re.split(" {3,}", line.strip()) for line in NUMBERS.strip().split("\n")]
CASES = [(said, number) for number, *line in LINES for said in line]


@pytest.mark.parametrize("said, number", CASES)
def test_a_response_comes_to_its_marked_or_last_number_and_to_no_part_of_another(said, number):
    said = said.replace("\\n", "\n")
    assert final_number(said) == (None if number == "None" else Decimal(number))


@pytest.mark.parametrize(
    "said, right, strict",
    [
        ("so #### 29.00", True, True),
        ("#### 29.", True, True),
        ("#### 29 of $7", True, True),
        ("so #### 29\n#### 5", True, True),
        ("so it is 29", True, False),
        ("####29", True, False),
        ("#### $29", True, False),
        ("it is 29\n\nQuestion: of 7? #### 7", True, False),  # goes on with one of its own
        ("so #### 28", False, False),
        ("#### 29/2", False, False),
        ("nobody knows", False, False),
    ],
)
def test_strict_are_the_right_answers_that_the_graders_of_gsm8k_find(said, right, strict):
    problem = Problem("data, line 1", "?", "?", "#### 29", number=Decimal(29))
    assert is_right(problem, said) == (right, strict)


# ---- Data files ----------------------------------------------------------------------------------


def write(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pair(question="How many?", answer="#### 5"):
    return json.dumps({"question": question, "answer": answer}, ensure_ascii=False)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_system_and_blank_lines_separate_problems(tmp_path, line_end):
    lines = ["", pair("a"), "  ", pair("b"), pair("c"), ""]
    path = write(tmp_path, line_end.join(lines))
    problems = read_problems(path, 1, 10)
    assert [problem.question for problem in problems] == ["b", "c"]
    assert [problem.where for problem in problems] == [f"{path}, line 4", f"{path}, line 5"]
    assert not runs_code(problems)


def test_a_byte_order_mark_is_no_text_and_a_line_separator_no_line_end(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + pair("one\u2028two\u0085three").encode())
    assert read_problems(path, 0, 1)[0].prompt == "one\u2028two\u0085three"


def test_only_the_lines_that_are_wanted_are_read(tmp_path):
    assert len(read_problems(write(tmp_path, pair() + "\nnonsense"), 0, 1)) == 1


@pytest.mark.parametrize("answer", ["5", "x = 5", "#### 5.", "3 + 2 #### $5", "3, so \\boxed{5}"])
def test_a_reference_answer_is_one_number_behind_its_mark(tmp_path, answer):
    problem = read_problems(write(tmp_path, pair(answer=answer)), 0, 1)[0]
    assert problem.answer == answer and is_right(problem, "5") == (True, False)


NO_ANSWERS = """two; #### two; ####; #### 1/2; 12:30; #### 2 1/2; #### 1e3; \\boxed{\\frac{3}{4}}
#### 3, 4; #### 3 or 4; 3 #### 4 #### 5; #### 10^3; #### 5-7; #### 7k; #### 1,23; #### 2 million
#### 3 + 4; #### - 7; #### x5; #### \u00bd; #### 72 eggs in 2 days; He has 3, she 4; \\boxed{x}"""


@pytest.mark.parametrize("answer", NO_ANSWERS.replace("\n", "; ").split("; "))
def test_a_reference_answer_that_is_not_one_number_is_refused(tmp_path, answer):
    with pytest.raises(ValueError, match="data.jsonl, line 2: the answer ends in"):
        read_problems(write(tmp_path, pair() + "\n" + pair(answer=answer)), 0, 2)


MBPP = {"text": "Add.", "code": "def add", "test_list": ["assert add(1, 2) == 3", "assert add"]}


@pytest.mark.parametrize(
    "line, said",
    [
        ("nonsense", "line 2: no JSON"),
        ("[" * 100000, "line 2: no JSON"),
        ("[1, 2]", "line 2: [1, 2] is no JSON object"),
        ('{"question": "a"}', "line 2: answer is null, should be text"),
        (pair(7), "line 2: question is 7, should be text"),
        (pair(" "), 'line 2: question is " ", should be text'),
        ('{"question": "\\ud83d", "answer": "#### 5"}', "line 2: no JSON"),  # half a character
        (json.dumps(MBPP | {"test_list": []}), "line 2: test_list is empty"),
        (json.dumps(MBPP | {"test_list": "assert add"}), 'test_list is "assert add", should be a'),
        (json.dumps(MBPP | {"test_list": [1]}), "test_list is [1], should be a list of texts"),
        (json.dumps(MBPP | {"test_imports": "import re"}), 'test_imports is "import re"'),
        (json.dumps(MBPP | {"test_setup_code": 5}), "test_setup_code is 5, should be text"),
        (json.dumps(MBPP | {"code": None}), "line 2: code is null, should be text"),
        (json.dumps(MBPP), 'mixes "answer" and "test_list"'),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong_in_it(tmp_path, line, said):
    with pytest.raises(ValueError) as error:
        read_problems(write(tmp_path, pair() + "\n" + line), 0, 2)
    assert said in str(error.value) and "data.jsonl" in str(error.value)


@pytest.mark.parametrize("content, said", [(b"\xff\xfe", "UTF-8"), (b"\n \n", "holds 0 problems")])
def test_a_file_without_text_or_without_problems_is_refused(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read_problems(write(tmp_path, content), 0, 1)
    with pytest.raises(ValueError, match="holds 1 problems, should be more than the 1 examples"):
        read_problems(write(tmp_path, pair()), 1, 1)
    with pytest.raises(ValueError, match="nothing.jsonl"):
        read_problems(tmp_path / "nothing.jsonl", 0, 1)


def test_examples_of_gsm8k_are_turns_before_an_open_one(tmp_path):
    path = write(tmp_path, "\n".join([pair("1 + 1?", "#### 2"), pair("1 + 2?", "#### 3"), pair()]))
    assert read_problems(path, 0, 1)[0].prompt == "1 + 1?"
    assert [problem.prompt for problem in read_problems(path, 2, 9)] == [
        "Question: 1 + 1?\nAnswer: #### 2\n\nQuestion: 1 + 2?\nAnswer: #### 3\n\n"
        "Question: How many?\nAnswer:"
    ]


def test_the_lines_of_mbpp_full_and_sanitised_are_tasks_behind_solved_ones(tmp_path):
    full = MBPP | {"test_setup_code": "one = 1"}
    sanitised = {"prompt": "Add.", "test_list": ["assert add(one) == 2"]}
    sanitised["test_imports"] = ["from math import pi as one", "one = 1"]
    path = write(tmp_path, json.dumps(full) + "\n" + json.dumps(sanitised))

    problem = read_problems(path, 1, 1)[0]
    assert runs_code([problem]) and problem.question == "Add."
    asked = "You are an expert Python programmer, and here is your task: Add. "
    asked += "Your code should pass these tests:\n\n"
    assert problem.prompt == (
        f"{asked}assert add(1, 2) == 3\nassert add\n[BEGIN]\ndef add\n[DONE]\n\n"
        f"{asked}assert add(one) == 2\n[BEGIN]\n"
    )
    assert is_right(problem, "def add(a):\n    return a + one") == (True, True)
    assert read_problems(path, 0, 1)[0].setup == "one = 1"

    path = write(tmp_path, json.dumps(sanitised) + "\n" + json.dumps(full))
    with pytest.raises(ValueError, match='line 1: is a worked example, should have "code"'):
        read_problems(path, 1, 1)


# ---- Programs ------------------------------------------------------------------------------------

TESTS = ("assert add(1, 2) == 3", "assert add(-1, 1) == 0")
RIGHT = "def add(a, b):\n    return a + b\n"
WRONG = RIGHT.replace("+", "-")
TASK = Problem("data, line 1", "Add.", "Add.", "", setup="import math", tests=TESTS)


@pytest.mark.parametrize(
    "said",
    [
        f"{RIGHT}[DONE]\n{WRONG}",
        f"[BEGIN]\n{RIGHT}",
        f"import math\nfrom the start:\n```python\n{RIGHT}```\nor\n```\n{WRONG}```",
        f"Solution\n```\n{RIGHT}",
        f"{RIGHT}```",  # a fence that it never opened
        f"{RIGHT}```\nThis adds. Or:\n```python\n{WRONG}```",
        f"from __future__ import annotations\n{RIGHT}",  # behind the imports of the task
    ],
)
def test_the_program_stands_before_done_and_in_its_fence(said):
    assert is_right(TASK, said) == (True, True)
    assert is_right(TASK, said.replace("+", "-")) == (False, False)


RECORD = "class A:\n    n: 'int' = 1\n    m: 'ClassVar[int]' = 2\n"


@pytest.mark.parametrize(
    "program",
    [
        "open('left.txt', 'w').write('here')\n",  # into a folder that is deleted
        "import os\nassert os.listdir() == [] and not os.environ.get('HOME')\n",
        "import sys\nprint('x' * 10**8)\nsys.stderr.write('x' * 10**8)\n",
        "if __name__ == '__main__':\n    raise SystemExit\n",
        "import sys\nassert sys.stdin.read() == ''\n",
        "from dataclasses import dataclass\nfrom typing import ClassVar\n@dataclass\n" + RECORD,
        "import typing\nclass A:\n    n: 'A'\nassert typing.get_type_hints(A) == {'n': A}\n",
        "import pickle\nclass A: 0\nassert type(pickle.loads(pickle.dumps(A()))) is A\n",
        "import multiprocessing as m\nwith m.get_context('fork').Pool(1) as pool:\n"
        "    assert pool.starmap(add, [(1, 2)]) == [3]\n",
    ],
)
def test_a_right_program_passes(program):
    assert run_code.passes([RIGHT + program, *TESTS])


@pytest.mark.parametrize(
    "program",
    [
        RIGHT + '"""',  # which would swallow the tests
        "def add(a, b",
        "def add(a, b):\n    return 3\n",
        "import os\nfor n in range(20):\n    try: os.write(n, b'passed')\n    except OSError: 0",
        "print('passed', 'True', 'ok')\n",
        "import sys\nsys.exit(0)\n",
        "import os\nos.write = lambda *_: 0\nos._exit(0)\n",
        "raise SystemExit\n",
        "data = bytearray(10**10)\n" + RIGHT,
        "open('large', 'wb').write(bytes(10**8))\n" + RIGHT,
    ],
)
def test_any_other_program_fails(program):
    assert not run_code.passes([program, *TESTS])


def test_a_program_ends_after_its_time_and_with_all_that_it_started(tmp_path):
    assert not run_code.passes([RIGHT + "while True: pass", *TESTS], seconds=1)

    lock = tmp_path / "lock"  # held as long as the child lives
    forks = f"import fcntl, os, time\nfile = open({str(lock)!r}, 'w')\nfcntl.flock(file, 2)\n"
    forks += "if os.fork() == 0:\n    time.sleep(20)\n"
    start = time.monotonic()
    assert run_code.passes([RIGHT + forks, *TESTS])
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - start < 10


def test_where_python_cannot_start_no_program_is_called_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no program can pass: .* ends with OverflowError"):
        run_code.require_python(megabytes=2**50)  # more than a limit can be

    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho libpython is missing >&2\nexit 127\n")
    os.chmod(broken, 0o755)
    for executable, said in [(broken, "libpython is missing"), (tmp_path / "none", "No such file")]:
        monkeypatch.setattr(sys, "executable", str(executable))
        run_code.require_python.cache_clear()
        with pytest.raises(ValueError, match=said):
            is_right(TASK, RIGHT)
