"""Scores of responses to GSM8K's questions, by their number, and to MBPP's tasks, by running them.

GSM8K has two scores. "Exact match" takes the number behind the first "####", else the one in the
last \\boxed{}, else the last number of the response; that last number is lm-evaluation-harness's
flexible-extract. "Strict" is the harness's strict-match, and OpenAI's own grader: only a number
behind "#### " counts. Both compare numbers, 29 is 29.00, where the harness compares texts. And here
a number that is part of something else (7/2, 3 + 4, 12:30, 10^3, 2 million) is no answer at all:
better is a right response called wrong than a wrong one right.
"""

import json
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from model import require
from run_code import passes, require_python


@dataclass(frozen=True)
class Problem:
    """A line of a data file, and what judges a response to it: a number, or tests to be passed."""

    where: str  # "FILE, line 7"
    question: str
    prompt: str  # the question as the model gets it, with the worked examples in front
    answer: str  # the solution, for a reader and as an example; "" if the file has none
    number: Decimal | None = None
    setup: str = ""
    tests: tuple = ()


# ---- Numbers -------------------------------------------------------------------------------------

SIGNS = {
    "{,}": ",", r"\$": "$", r"\%": "%", r"^\circ": "°", r"^{\circ}": "°",
    r"\times": " × ", r"\cdot": " × ", r"\div": " ÷ ", "multiplied by": "×", "divided by": "÷",
    "####": " #### ",
}  # fmt: skip
WORD = re.compile(r"\n|=|[^\s=<>|]+")
DIGIT = re.compile(r"[\d¼-¾⅐-⅞]")
NUMBER = re.compile(
    r"(?:[^\d\s]*:)?[*_`'\"“(\[{\\#~≈]*"  # Answer:**
    r"([-−–]?)(?:US)?[*$€£¥₹]*([-−–]?)"  # a minus before the currency or behind it
    r"((?!0[\d,])(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?)"
    r"(?!(?:[bkmnxy]|bn|[-/]\w)\b|\*+\w|\\pi|[+×÷^²³¹⁰-⁹¼-¾⅐-⅞√π])\D*",  # 7km, but not 7k
    re.IGNORECASE,
)
PART_BEFORE = re.compile(r"[-−–+*×/÷±^x]|\*\*|minus|negative|plus|times", re.IGNORECASE)
PART_BEHIND = re.compile(r"[+*×/÷±^xk]$|π|\\pi|hundred|thousand|[mbtr]+illion", re.IGNORECASE)
BOX = re.compile(r"(?<![-−–/^{])\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}(?![\w/^])")


def plain(text):
    """A text without LaTeX around its numbers; thousands that spaces part are 10000."""
    text = re.sub(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}", r" \1 ", text)  # \text{7 apples}
    text = re.sub(r"\\!|[\u200b\u2060\ufeff]", "", text)
    text = re.sub(r"\\[,;: ]|[~\u00a0\u2000-\u200a\u202f\u205f]", " ", text)
    text = re.sub(r"and (?:an?|one) (?:half|third|quarter)", "½", text)
    for written, sign in SIGNS.items():
        text = text.replace(written, sign)
    thousands = r"(?<![\w.,])\d{1,3}(?: \d{3})+(?!\d)"
    return re.sub(thousands, lambda found: found[0].replace(" ", ""), text)


def words_of(text):
    """The words of a plain text, "=" and line ends among them; and which of them hold digits.

    Line ends around it give every word two neighbours on each side.
    """
    words = ["\n", "\n", *WORD.findall(text), "\n", "\n"]
    return words, [i for i, word in enumerate(words) if DIGIT.search(word)]


def read_number(words, i):
    """The Decimal that words[i] is; None: it is no number, or part of something with others."""
    found = NUMBER.fullmatch(words[i])
    if found is None:
        return None

    before = words[i - 1]
    behind = words[i + 1]
    is_bullet = words[i - 2] == "\n" and before in "-–*+"
    if PART_BEFORE.fullmatch(before) and not is_bullet:  # 3 + 4
        return None
    if PART_BEHIND.match(behind) or DIGIT.search(behind):  # 2 million, 2 1/2
        return None
    if PART_BEFORE.fullmatch(behind) and DIGIT.search(words[i + 2]):  # 9 - 2
        return None

    sign, sign_behind_currency, digits = found.groups()
    number = Decimal(digits.replace(",", ""))
    if not sign and not sign_behind_currency:
        return number
    return None if DIGIT.search(before) else number.copy_negate()  # 9 -2


def only_number(text):
    """The Decimal that a plain text says, or comes to; None: none, or more than one."""
    words, places = words_of("=" + text.rpartition("=")[2])  # x = 7
    return read_number(words, places[0]) if len(places) == 1 else None


def final_number(text):
    """The Decimal that a response comes to, by the rule of "exact match" above; None without."""
    text = plain(text)
    words, places = words_of(text)
    for i in places:
        is_marked = words[i - 1] == "####" and "boxed" not in words[i]
        is_heading = words[i][-1] in ".):" and words[i + 1] != "\n"  # "#### 1. Add them"
        if is_marked and not is_heading:
            return read_number(words, i)

    boxes = [box for box in BOX.findall(text) if DIGIT.search(box)]
    if boxes:
        return only_number(boxes[-1])
    return read_number(words, places[-1]) if places else None


def reference_number(answer):
    """The Decimal that ends a solution behind "####", in a box, or alone; None: not one number."""
    answer = plain(answer)
    boxes = BOX.findall(answer)
    if "####" in answer:
        answer = answer.partition("####")[2]
    elif boxes:
        answer = boxes[-1]
    return only_number(answer)


# ---- Data files ----------------------------------------------------------------------------------


def read_problems(path, shots, n):
    """The n Problems of a JSON-lines file behind the first `shots`, which are worked examples.

    Raises ValueError that names the line and what is wrong with it.
    """
    try:
        content = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as UTF-8 ({error})") from error

    problems = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", content), 1):  # U+2028 ends no line
        if line.strip() and len(problems) < shots + n:
            problems.append(read_problem(line, f"{path}, line {number}"))
    said = f"{path}: holds {len(problems)} problems, should be more than the {shots} examples"
    require(len(problems) > shots, said)
    said = f'{path}: mixes "answer" and "test_list", should have one of them in every line'
    require(len({bool(problem.tests) for problem in problems}) == 1, said)

    examples = problems[:shots]
    for example in examples:
        require(example.answer, f'{example.where}: is a worked example, should have "code"')
    return [replace(p, prompt=with_examples(examples, p)) for p in problems[shots:]]


def read_problem(line, where):
    """One line as a Problem, its prompt without examples."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # "\\ud83d" is half a character
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    require(isinstance(record, dict), f"{where}: {json.dumps(record):.60} is no JSON object")

    if "test_list" in record:
        return read_task(record, where)
    question = text_of(record, "question", where)
    answer = text_of(record, "answer", where)
    number = reference_number(answer)
    said = (
        f"{where}: the answer ends in {json.dumps(answer[-50:])}, should end in #### and one number"
    )
    require(number is not None, said)
    return Problem(where, question, question, answer, number=number)


def read_task(record, where):
    """A line of MBPP, full ("text") or sanitised ("prompt"), in lm-evaluation-harness's words."""
    task = text_of(record, "text" if "text" in record else "prompt", where)
    tests = texts_of(record, "test_list", where)
    require(tests, f"{where}: test_list is empty, should hold a test")
    setup = texts_of(record, "test_imports", where)
    if record.get("test_setup_code"):  # of the full file, where most are empty
        setup.append(text_of(record, "test_setup_code", where))
    code = text_of(record, "code", where) if "code" in record else ""

    listed = "\n".join(tests)
    prompt = (
        f"You are an expert Python programmer, and here is your task: {task} "
        f"Your code should pass these tests:\n\n{listed}\n[BEGIN]\n"
    )
    return Problem(where, task, prompt, code, setup="\n".join(setup), tests=tuple(tests))


def text_of(record, key, where):
    """record[key] if that is a text with something in it, else ValueError."""
    value = record.get(key)
    said = f"{where}: {key} is {json.dumps(value):.60}, should be text"
    require(isinstance(value, str) and value.strip(), said)
    return value


def texts_of(record, key, where):
    """record[key] if that is a list of texts, [] if it is not there, else ValueError."""
    values = record.get(key, [])
    said = f"{where}: {key} is {json.dumps(values):.60}, should be a list of texts"
    require(isinstance(values, list), said)
    require(all(isinstance(value, str) for value in values), said)
    return values


def with_examples(examples, problem):
    """The prompt with worked examples in front, as lm-evaluation-harness has them.

    In a chat template all of it is the user's one turn. Without examples a question stands alone.
    """
    if not examples:
        return problem.prompt
    if problem.tests:
        turns = [f"{example.prompt}{example.answer}\n[DONE]\n\n" for example in examples]
        return "".join(turns) + problem.prompt
    turns = [f"Question: {example.question}\nAnswer: {example.answer}\n\n" for example in examples]
    return "".join(turns) + f"Question: {problem.question}\nAnswer:"


# ---- Responses -----------------------------------------------------------------------------------


def runs_code(problems):
    """Whether the problems ask for programs, so that to judge a response is to execute it."""
    return bool(problems[0].tests)


def code_of(text):
    """The program in a response: up to [DONE], and of that the first block in ``` fences.

    Where the first fence only ends the code, having opened none, it is what stands before.
    """
    text = text.partition("[DONE]")[0].replace("[BEGIN]", "")
    before = text.partition("```")[0]
    if re.search(r"^(?:(?:async )?def \w+\(|class \w+[(:]|\w+ = lambda)", before, re.MULTILINE):
        return before
    fenced = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return fenced[1] if fenced else before


def is_right(problem, text):
    """Whether a response is right, and whether it is so strictly.  2 x bool

    Raises ValueError if programs are to be run and Python cannot start for them.
    """
    if problem.tests:
        require_python()
        right = passes([problem.setup, code_of(text), *problem.tests])
        return right, right

    said = text.partition("Question:")[0]  # a base model may go on with a question of its own
    right = final_number(said) == problem.number
    behind_mark = re.search(r"#### (-?[0-9.,]+)", said)  # the harness's own expression
    strict = behind_mark is not None and only_number(behind_mark[1]) == problem.number
    return right, right and strict
