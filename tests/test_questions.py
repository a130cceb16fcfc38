"""Readers of question files, their errors, and what the shipped suites promise."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from decoding.errors import InvalidRequest, UnknownName
from decoding.quality import rouge_l, score
from decoding.questions import Question, load_questions, suites

VICUNA = {
    *("generic", "knowledge", "roleplay", "common-sense", "fermi", "counterfactual", "coding", "math", "writing"),
}
CATEGORIES = VICUNA | {"summarization", "qa", "translation", "reasoning-math"}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="module")
def default() -> list[Question]:
    return load_questions("default")


@pytest.fixture(scope="module")
def router() -> list[Question]:
    return load_questions("router")


def test_fastchat_questions_keep_order_turns_and_extra_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "question.jsonl",
        lines(
            {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
            {
                "question_id": 82,
                "category": "math",
                "turns": ["1+1?", "+1?"],
                "reference": ["2", "3"],
                "check": "numeric",
            },
            {"question_id": "x", "category": "generic", "turns": ["Why?"], "list": True, "check": None},
        ),
    )
    assert load_questions(path) == [
        Question("81", "writing", ("Write.", "Rewrite.")),
        Question("82", "math", ("1+1?", "+1?"), ("2", "3"), "numeric"),
        Question("x", "generic", ("Why?",), list_type=True),
    ]
    assert load_questions(str(path)) == load_questions(path)


def test_spec_bench_categories_with_references_get_the_check_they_need(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "question.jsonl",
        lines(
            {"question_id": 1, "category": "translation", "turns": ["Translate: Haus"], "reference": ["house"]},
            {"question_id": 2, "category": "summarization", "turns": ["Summarize: …"], "reference": ["Short."]},
            {"question_id": 3, "category": "math_reasoning", "turns": ["2 · 3?"], "reference": ["so\n#### 6"]},
            {"question_id": 4, "category": "rag", "turns": ["… Who?"], "reference": [["Ada", "Lovelace"]]},
            {"question_id": 5, "category": "qa", "turns": ["Who?"]},
            {"question_id": 6, "category": "coding", "turns": ["Write code."], "reference": ["pass"]},
        ),
    )
    questions = load_questions(path)
    assert [q.check for q in questions] == ["chrf", "rouge-l", "numeric", "contains", None, None]
    assert questions[3].reference == ("Ada", "Lovelace")
    assert score(questions[2], "It is 6.") == 1.0


def test_arena_hard_of_both_versions(tmp_path: Path) -> None:
    old = {"question_id": "f0c4", "category": "arena-hard-v0.1", "cluster": "Games", "turns": [{"content": "Play."}]}
    new = {"uid": "0b1d", "category": "hard_prompt", "subcategory": "coding", "language": "English", "prompt": "Code."}
    assert load_questions(write(tmp_path, "a.jsonl", lines(old, new))) == [
        Question("f0c4", "arena-hard-v0.1", ("Play.",)),
        Question("0b1d", "hard_prompt", ("Code.",)),
    ]


def test_wizardlm(tmp_path: Path) -> None:
    path = write(tmp_path, "w.jsonl", lines({"idx": 7, "Skill": "Math", "Difficulty": 3, "Instruction": "Find it."}))
    assert load_questions(path) == [Question("7", "Math", ("Find it.",))]


def test_alpaca_eval(tmp_path: Path) -> None:
    records = [
        {"instruction": "Name it.", "dataset": "helpful_base", "output": "Ann", "generator": "some-model"},
        {"instruction": "Shorten this.", "input": "A long text.", "dataset": "koala"},
        {"instruction": "Say hello.", "input": ""},
    ]
    path = write(tmp_path, "alpaca_eval.json", json.dumps(records, indent=2))
    assert load_questions(path) == [
        Question("1", "helpful_base", ("Name it.",)),
        Question("2", "koala", ("Shorten this.\n\nA long text.",)),
        Question("3", "uncategorized", ("Say hello.",)),
    ]


def test_a_json_file_may_hold_json_lines(tmp_path: Path) -> None:
    assert len(load_questions(write(tmp_path, "q.json", lines({"prompt": "A?"}, {"prompt": "B?"})))) == 2


def test_plain_text_has_one_question_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "q.txt", "\ufeffWhy?\r\n\r\n  [1, 2] is what type? \r\n{x} too?\u2028Still the same line.")
    assert load_questions(path) == [
        Question("1", "uncategorized", ("Why?",)),
        Question("3", "uncategorized", ("[1, 2] is what type?",)),
        Question("4", "uncategorized", ("{x} too?\u2028Still the same line.",)),
    ]


def test_router_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", 'label;request\r\n1;How, and why?\r\n\r\n0;"Say ""hi""; then\nleave."\r\n')
    assert load_questions(path) == [
        Question("1", "uncategorized", ("How, and why?",), list_type=True),
        Question("2", "uncategorized", ('Say "hi"; then\nleave.',), list_type=False),
    ]


def test_requests_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "data.csv", 'request\nWhy?\n"First, what; then how?"\n')
    assert [q.turns for q in load_questions(path)] == [("Why?",), ("First, what; then how?",)]
    assert all(q.list_type is None for q in load_questions(path))


def test_limit_and_categories(tmp_path: Path) -> None:
    records = [{"question_id": i, "category": "ab"[i % 2], "turns": ["?"]} for i in range(6)]
    path = write(tmp_path, "q.jsonl", lines(*records))
    assert [q.id for q in load_questions(path, limit=2)] == ["0", "1"]
    assert [q.id for q in load_questions(path, limit=2, categories=["b"])] == ["1", "3"]
    assert [q.id for q in load_questions(path, categories="a")] == ["0", "2", "4"]
    assert len(load_questions(path, limit=100, categories=["a", "b"])) == 6
    with pytest.raises(InvalidRequest, match="limit must be at least 1, not 0"):
        load_questions(path, limit=0)
    with pytest.raises(UnknownName, match=r"unknown category 'aa'.*'a'"):
        load_questions(path, categories=["aa"])


def test_references_belong_to_turns_or_are_alternatives() -> None:
    assert Question("1", "c", ("?",), ("a", "", "b")).references() == ("a", "b")
    two = Question("1", "c", ("?", "?"), ("", "b"))
    assert two.references(0) == ()
    assert two.references(1) == ("b",)


GOOD = json.dumps({"question_id": 1, "turns": ["?"]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"turns": ["?"]', r"line 2: invalid JSON: .*column"),
        ("[" * 100_000, r"line 2: invalid JSON: it is nested too deeply"),
        ('["?"]', r"line 2: expected a JSON object with a question, found a list"),
        ("7", r"line 2: expected a JSON object with a question, found a number"),
        ('{"question_id": 2}', r"line 2: there is no question; expected 'turns', 'prompt' or 'instruction'"),
        ('{"turns": []}', r"line 2: 'turns' is empty"),
        ('{"turns": "?"}', r"line 2: 'turns' must be a list of texts, not a string"),
        ('{"turns": null}', r"line 2: 'turns' must be a list of texts, not null"),
        ('{"turns": ["?", 3]}', r"line 2: a turn must be a text, not a number"),
        ('{"turns": [" "]}', r"line 2: a turn is empty"),
        ('{"turns": [{"role": "user"}]}', r"line 2: a turn must be a text, not null"),
        ('{"turns": ["\\ud83d"]}', r"line 2: a turn contains half of a surrogate pair"),
        ('{"prompt": ["?"]}', r"line 2: 'prompt' must be a text, not a list"),
        ('{"instruction": "?", "input": 5}', r"line 2: 'input' must be a text, not a number"),
        ('{"turns": ["?"], "category": 3}', r"line 2: 'category' must be a non-empty string, not a number"),
        (
            '{"turns": ["?"], "question_id": true}',
            r"line 2: the question id must be an integer or .*, not true or false",
        ),
        ('{"turns": ["?"], "question_id": 1}', r"line 2: the question id '1' was already used in line 1"),
        ('{"turns": ["?"], "reference": 5}', r"line 2: 'reference' must be a list of texts, but holds a number"),
        ('{"turns": ["?"], "reference": [{}]}', r"line 2: 'reference' must be a list of texts, but holds an object"),
        ('{"turns": ["?", "?"], "reference": ["", "", ""]}', r"line 2: 'reference' has 3 entries, .* only 2 turns"),
        (
            '{"turns": ["?"], "reference": ["x"], "check": "magic"}',
            r"line 2: 'check' must be one of numeric, .*'magic'",
        ),
        ('{"turns": ["?"], "reference": ["x"], "check": ["exact"]}', r"line 2: 'check' must be one of numeric"),
        ('{"turns": ["?"], "check": "exact"}', r"line 2: the check 'exact' needs a 'reference'"),
        ('{"turns": ["?"], "check": "numeric", "reference": "six"}', r"line 2: .*needs a number .*none in 'six'"),
        ('{"turns": ["?"], "list": "yes"}', r"line 2: 'list' must be true, false or null, not a string"),
    ],
)
def test_a_malformed_record_is_named_with_file_and_line(tmp_path: Path, record: str, message: str) -> None:
    path = write(tmp_path, "bad.jsonl", f"{GOOD}\n{record}\n")
    with pytest.raises(InvalidRequest, match=f"bad.jsonl, {message}"):
        load_questions(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"instruction": "A?"},\n\n{"instruction": ""}]', "line 4: 'instruction' is empty"),
        ('[\n{"instruction": "A?"},\n[]]', "line 3: expected a JSON object with a question, found a list"),
        ('[\n{"instruction": "A?"}\n{"instruction": "B?"}]', "line 3: invalid JSON"),
        ('[{"instruction": "A?"}', "line 1: invalid JSON"),
        ('[{"instruction": "A?"}]\nmore', "line 2: invalid JSON"),
    ],
)
def test_a_malformed_json_list_is_named_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"bad.json, {message}"):
        load_questions(write(tmp_path, "bad.json", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1;How?\n", "line 1: the first line must name a column 'request'"),
        ('label;request\n1;"a\nb"\n2;How?\n', "line 4: label must be 0 or 1, not '2'"),
        ("label;request\n;How?\n", "line 2: label must be 0 or 1, not ''"),
        ("label;request\n1;How?;really\n", "line 2: expected 2 fields as in the first line, found 3"),
        ("label;request\n1;\n", "line 2: request is empty"),
        ('label;request\n1;"How?" and why\n', "line 2: invalid CSV"),
    ],
)
def test_a_malformed_table_is_named_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"bad.csv, {message}"):
        load_questions(write(tmp_path, "bad.csv", text))


def test_bytes_that_are_not_text_are_named_with_their_line(tmp_path: Path) -> None:
    path = write(tmp_path, "bad.txt", "Why?\n¿Por qué?\n".encode() + "Où ?\n".encode("latin-1"))
    with pytest.raises(InvalidRequest, match=r"bad.txt, line 3: byte 0xf9 is not valid UTF-8"):
        load_questions(path)


@pytest.mark.parametrize(("name", "text"), [("e.jsonl", ""), ("e.txt", " \n\n"), ("e.json", "\ufeff"), ("e.csv", "\n")])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: the file is empty"):
        load_questions(write(tmp_path, name, text))


@pytest.mark.parametrize(("name", "text"), [("e.json", "[ ]"), ("e.csv", "label;request\n")])
def test_a_file_without_questions_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{name}: there are no questions in the file"):
        load_questions(write(tmp_path, name, text))


def test_a_missing_file_a_folder_and_an_unknown_suite_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nowhere.jsonl' does not exist; shipped suites: default, long, router"):
        load_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(InvalidRequest, match="is a folder; give one question file in it"):
        load_questions(tmp_path)
    with pytest.raises(UnknownName, match=r"unknown question suite 'defualt'; did you mean 'default'\?"):
        load_questions("defualt")


def test_the_shipped_suites_have_names() -> None:
    assert set(suites()) == {"default", "long", "router"}


def test_default_suite_covers_every_category_with_at_least_twelve_questions(default: list[Question]) -> None:
    counts = Counter(q.category for q in default)
    assert set(counts) == CATEGORIES
    assert min(counts.values()) >= 12


def test_default_suite_is_in_fastchat_format_with_no_keys_but_ours() -> None:
    for line in suites()["default"].read_text("utf-8").splitlines():
        record = json.loads(line)
        assert {"question_id", "category", "turns", "list"} <= set(record)
        assert set(record) <= {"question_id", "category", "turns", "list", "check", "reference"}
        assert re.fullmatch(rf"{record['category']}-\d\d", record["question_id"])
        assert all(turn == turn.strip() for turn in record["turns"])


def test_default_suite_repeats_no_question(default: list[Question]) -> None:
    assert max(Counter(q.turns[0] for q in default).values()) == 1


def test_default_suite_begins_with_a_mixed_demo(default: list[Question]) -> None:
    demo = default[:8]
    assert sum(bool(q.list_type) for q in demo) >= 2
    assert {"summarization", "qa", "coding"} <= {q.category for q in demo}
    assert {"math", "reasoning-math"} & {q.category for q in demo}
    assert {q.category for q in default[:40]} == CATEGORIES


def test_default_suite_has_list_questions_and_others_and_some_second_turns(default: list[Question]) -> None:
    assert 0.2 <= sum(bool(q.list_type) for q in default) / len(default) <= 0.5
    assert 0.08 <= sum(len(q.turns) > 1 for q in default) / len(default) <= 0.15
    assert all(not q.list_type for q in default if q.check)


@pytest.mark.parametrize(
    ("category", "checks"),
    [
        ("math", {"numeric"}),
        ("reasoning-math", {"numeric"}),
        ("translation", {"chrf"}),
        ("summarization", {"rouge-l"}),
        ("qa", {"contains", "numeric"}),
    ],
)
def test_checkable_categories_have_references_for_every_turn(
    default: list[Question], category: str, checks: set[str]
) -> None:
    for question in default:
        if question.category == category:
            assert question.check in checks, question.id
            assert all(question.references(turn) for turn in range(len(question.turns))), question.id


def test_every_reference_earns_the_full_score(default: list[Question]) -> None:
    for question in default:
        for turn in range(len(question.turns)):
            for reference in question.references(turn):
                assert score(question, reference, turn=turn) == pytest.approx(1.0), question.id


def test_numeric_references_are_bare_numbers(default: list[Question]) -> None:
    for question in default:
        if question.check == "numeric":
            assert all(re.fullmatch(r"\d+(\.\d+|/\d+)?", r) for r in question.reference), question.id


def test_passages_hold_the_answers_and_are_long_enough(default: list[Question]) -> None:
    lengths: dict[str, list[int]] = {"qa": [], "summarization": []}
    for question in default:
        if question.category in lengths:
            lengths[question.category].append(len(question.turns[0].split()))
        if question.category == "qa":
            assert any(score(question, question.turns[0]) or r in question.turns[0] for r in question.references())
    for words in lengths.values():
        assert min(words) >= 120
        assert sum(w > 700 for w in words) >= 2


def test_summaries_are_much_shorter_than_their_passages(default: list[Question]) -> None:
    for question in default:
        if question.category == "summarization":
            assert 0 < len(question.reference[0].split()) < 0.4 * len(question.turns[0].split()), question.id


def test_long_questions_are_long_and_their_answer_is_in_one_document_anywhere() -> None:
    questions = load_questions("long")
    assert len(questions) >= 12
    places: Counter[int] = Counter()
    for question in questions:
        (turn,) = question.turns
        assert 6000 <= len(turn) <= 8000, question.id
        documents = re.split(r"\n\n(?=\[\d\] )|\n\n(?=Answer in)", turn)[1:-1]
        assert len(documents) == 6, question.id
        holding = [i for i, text in enumerate(documents) if any(r.lower() in text.lower() for r in question.reference)]
        assert holding, question.id
        places.update(holding[:1])
        assert all(score(question, f"It is {reference}.") == 1.0 for reference in question.reference), question.id
    assert len(places) >= 4


def test_router_labels_are_many_balanced_and_mixed(router: list[Question]) -> None:
    assert len(router) >= 300
    assert 0.4 <= sum(bool(q.list_type) for q in router) / len(router) <= 0.6
    assert 0.3 <= sum(bool(q.list_type) for q in router[:100]) / 100 <= 0.7
    assert len({q.turns[0].casefold() for q in router}) == len(router)


def test_router_labels_do_not_give_away_the_default_suite(router: list[Question], default: list[Question]) -> None:
    asked = [q.turns[0] for q in default if len(q.turns[0]) < 300]
    closest = max((rouge_l(r.turns[0], question), r.turns[0], question) for r in router for question in asked)
    assert closest[0] <= 0.85, closest
