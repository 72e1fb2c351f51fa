"""bench.py's scores against answers, data files and programs written by hand."""

import json
from decimal import Decimal

import bench
import pytest
from bench import Program, code_of, final_number, is_right, read_problems, strict_number
from run_code import passes


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4 = 7 #### 7", "7"),
        ("#### 1,234 apples", "1234"),
        ("#### 7\n\nQuestion: and 3 + 5? #### 8", "7"),  # the first answer, not the model's own
        ("####", None),
        ("", None),
        ("none", None),
        ("It is -2.5.", "-2.5"),
        ("It is \u22122.5", "-2.5"),
        ("29.00", "29"),
        ("3-5", "5"),
        ("(3)-5", "5"),
        ("x-5", "5"),
        ("3 - 5", "5"),
        ("= -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("It costs $1,234,567.89.", "1234567.89"),
        ("1,23", "23"),
        ("1,2345", "2345"),
        ("12345", "12345"),
        ("3,4,5", "5"),
        ("€18", "18"),
        ("50%", "50"),
        ("Done by 18.", "18"),
        ("about .5", "0.5"),
        ("so...5", "5"),
        ("version 1.2.3", "3"),
        (r"\boxed{18}, not 7", "18"),
        (r"\boxed{1{,}234} of 7", "1234"),
        (r"\boxed{ \$18 } of 7", "18"),
        (r"\boxed{x} = 7", "7"),
        ("The answer is 18, not 7", "18"),
        ("the answer is: **18** and not 7", "18"),
        ("Answer: 18 of 7", "18"),
        ("The answer is not 18 but 7", "7"),
        ("#### Step 1: 3 + 4 = 7", "7"),  # a heading
        (r"The answer is 3, or \boxed{18}, no 7", "18"),
        (r"\boxed{18} #### 19, no 7", "19"),
    ],
)
def test_the_final_number_stands_behind_a_mark_or_last(text, number):
    expected = None if number is None else Decimal(number)
    assert final_number(text) == expected


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 18", 18),
        ("so 3 #### 1,234.\n#### 5", 1234),
        ("#### -3", -3),
        ("####18", None),
        ("#### $18", None),
        ("The answer is 18", None),
        ("#### ,", None),
    ],
)
def test_the_strict_number_is_what_the_graders_of_gsm8k_take(text, number):
    assert strict_number(text) == number


def test_an_answer_is_right_by_its_number_and_strictly_by_its_mark():
    assert is_right("so #### 29.00", "#### 29") == (True, True)
    assert is_right("so it is 29", "#### 29") == (True, False)
    assert is_right("so #### 28", "#### 29") == (False, False)
    assert is_right("nobody knows", "#### 29") == (False, False)
    assert is_right("it is 29\n\nQuestion: of 7? #### 7", "#### 29") == (True, False)
    assert is_right("#### 29 of $7", "#### 29") == (True, True)


def test_the_standard_error_is_that_of_a_share():
    assert bench.standard_error(0.2, 16) == pytest.approx(0.1)
    assert bench.standard_error(1.0, 16) == 0


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
    assert read_problems(path, 2) == [("a", "#### 5"), ("b", "#### 5")]
    assert len(read_problems(path, 10)) == 3


def test_a_byte_order_mark_is_no_text_and_a_line_separator_no_line_end(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + pair("one\u2028two\u0085three").encode())
    assert read_problems(path, 1) == [("one\u2028two\u0085three", "#### 5")]


def test_only_the_lines_that_are_wanted_are_read(tmp_path):
    assert len(read_problems(write(tmp_path, pair() + "\nnonsense"), 1)) == 1


MBPP = {"text": "Add.", "code": "def add", "test_list": ["assert add(1, 2) == 3", "assert add"]}


@pytest.mark.parametrize(
    "line, said",
    [
        ("nonsense", "line 2: no JSON"),
        ("[" * 100000, "line 2: no JSON"),
        ("[1, 2]", "line 2: [1, 2] is no JSON object"),
        ('{"question": "a"}', 'line 2: has no "answer"'),
        ('{"answer": "#### 5"}', 'line 2: has no "question"'),
        (pair(7), "line 2: question is 7, should be text"),
        (pair(" "), 'line 2: question is " ", should be text'),
        (pair(answer=5), "line 2: answer is 5, should be text"),
        (pair(answer=None), "line 2: answer is null, should be text"),
        (pair(answer="five"), 'line 2: the answer is "five", should end in #### and a number'),
        (pair(answer="five" * 99), '"' + ("five" * 15)[:59] + "...,"),
        ('{"question": "\\ud83d", "answer": "#### 5"}', "line 2: question holds half a character"),
        (json.dumps(MBPP), 'mixes "answer" and "test_list"'),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong_in_it(tmp_path, line, said):
    with pytest.raises(ValueError) as error:
        read_problems(write(tmp_path, pair() + "\n" + line), 2)
    assert said in str(error.value) and "data.jsonl" in str(error.value)


@pytest.mark.parametrize("content, said", [(b"\xff\xfe", "UTF-8"), (b"\n \n", "no problems")])
def test_a_file_without_text_or_without_problems_is_refused(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read_problems(write(tmp_path, content), 1)
    with pytest.raises(ValueError, match="nothing.jsonl"):
        read_problems(tmp_path / "nothing.jsonl", 1)


QUESTION = (
    "You are an expert Python programmer, and here is your task: Add. "
    "Your code should pass these tests:\n\nassert add(1, 2) == 3\nassert add\n[BEGIN]\n"
)


def test_the_lines_of_mbpp_full_and_sanitised_are_programs(tmp_path):
    full = MBPP | {"test_setup_code": "x = 1"}
    sanitised = {"prompt": "Add.", "test_list": MBPP["test_list"]}
    sanitised["test_imports"] = ["import math", "import re"]
    path = write(tmp_path, json.dumps(full) + "\n" + json.dumps(sanitised))
    assert read_problems(path, 2) == [
        (QUESTION, Program("x = 1", tuple(MBPP["test_list"]), "def add")),
        (QUESTION, Program("import math\nimport re", tuple(MBPP["test_list"]), None)),
    ]


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"test_list": []}, "test_list is empty, should hold a test"),
        ({"test_list": "assert add"}, 'test_list is "assert add", should be a list of texts'),
        ({"test_list": [1]}, "test_list is 1, should be text"),
        ({"test_list": ["\ud83d"]}, "test_list holds half a character"),
        ({"test_imports": "import math"}, 'test_imports is "import math", should be a list'),
        ({"test_setup_code": 5}, "test_setup_code is 5, should be text"),
        ({"text": 5}, "text is 5, should be text"),
        ({"code": None}, "code is null, should be text"),
    ],
)
def test_a_task_is_refused_with_what_is_wrong_in_it(tmp_path, changed, said):
    with pytest.raises(ValueError) as error:
        read_problems(write(tmp_path, json.dumps(MBPP | changed)), 1)
    assert "line 1: " + said in str(error.value)


def test_examples_of_gsm8k_are_turns_before_an_open_one():
    examples = [("1 + 1?", "#### 2"), ("1 + 2?", "#### 3")]
    assert bench.with_examples([], "2 + 2?") == "2 + 2?"
    assert bench.with_examples(examples, "2 + 2?") == (
        "Question: 1 + 1?\nAnswer: #### 2\n\nQuestion: 1 + 2?\nAnswer: #### 3\n\n"
        "Question: 2 + 2?\nAnswer:"
    )


def test_examples_of_mbpp_are_tasks_and_solutions():
    examples = [("Add.[BEGIN]\n", Program("", ("t",), "def add")), ("B\n", Program("", (), "b"))]
    assert bench.with_examples(examples, "C\n") == (
        "Add.[BEGIN]\ndef add\n[DONE]\n\nB\nb\n[DONE]\n\nC\n"
    )
    assert bench.with_examples([], "C\n") == "C\n"


@pytest.mark.parametrize(
    "text, code",
    [
        ("a = 1\n[DONE]\nb = 2", "a = 1\n"),
        ("[BEGIN]\na = 1", "\na = 1"),
        ("Here:\n```python\na = 1\n```\nor\n```\na = 2\n```", "a = 1\n"),
        ("```\na = 1", "a = 1"),
    ],
)
def test_the_program_is_what_stands_before_done_or_in_the_first_fence(text, code):
    assert code_of(text) == code


TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    "program",
    [
        RIGHT,
        RIGHT + "open('left.txt', 'w').write('here')\n",  # into a folder that is deleted
        RIGHT + "import os\nassert os.listdir() == [] and not os.environ.get('HOME')\n",
        RIGHT + "print('x' * 10**6)\n",
        RIGHT + "if __name__ == '__main__':\n    raise SystemExit\n",
        RIGHT + "import sys\nassert sys.stdin.read() == ''\n",
    ],
)
def test_a_right_program_passes(program):
    assert passes(program, TESTS)


@pytest.mark.parametrize(
    "program",
    [
        RIGHT.replace("+", "-"),
        RIGHT + '"""',  # which would swallow the tests
        "def add(a, b",
        "def add(a, b):\n    return 3\n",
        "import os\nfor n in range(20):\n    try: os.write(n, b'passed')\n    except OSError: 0",
        "print('passed', 'True', 'ok')\n",
        "import sys\nsys.exit(0)\n",
        "import os\nos._exit(0)\n",
        "import os\nos.write = lambda *_: 0\nos._exit(0)\n",
        "raise SystemExit\n",
        "data = bytearray(10**10)\n" + RIGHT,
        "open('large', 'wb').write(bytes(10**8))\n" + RIGHT,
    ],
)
def test_any_other_program_fails(program):
    assert not passes(program, TESTS)


def test_an_endless_program_ends_with_all_that_it_started():
    assert not passes(RIGHT + "while True: pass", TESTS, seconds=1)
    forks = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\n"
    assert passes(RIGHT + forks, TESTS)


def test_no_tests_leave_the_program_to_fail():
    assert passes("a = 1", []) and not passes("a = 1 / 0", [])


def test_a_response_is_right_if_its_program_passes_after_the_setup():
    answer = Program("one = 1", ("assert add(one) == 2",), None)
    assert is_right("```python\ndef add(a):\n    return a + one\n```", answer) == (True, True)
    assert is_right("def add(a):\n    return a", answer) == (False, False)
