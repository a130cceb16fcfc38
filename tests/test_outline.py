"""The outline parser against outlines as models write them, and the merge of outline and expansions."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.strategies.merge import Composition, PointText, merge, tidy
from decoding.strategies.outline import OutlineParser, Point, parse_outline, steered
from decoding.strategies.outline_title import split_needs, trim_title

# name → outline, its points: a bare title has the number that its place in the list gives it.
OUTLINES: dict[str, tuple[str, list[str | tuple[int, str]]]] = {
    "dots": ("1. Plan your week\n2. Set priorities\n3. Say no", ["Plan your week", "Set priorities", "Say no"]),
    "dots without a space": ("1.Plan\n2.Act\n3.Review", ["Plan", "Act", "Review"]),
    "space before the dot": ("1 . Plan\n2 . Act", ["Plan", "Act"]),
    "escaped dots": ("1\\. Plan\n2\\. Act", ["Plan", "Act"]),
    "brackets": ("1) Soil\n2) Water\n3) Light", ["Soil", "Water", "Light"]),
    "two brackets": ("(1) Soil\n(2) Water\n(3) Light", ["Soil", "Water", "Light"]),
    "square brackets": ("[1] Soil\n[2] Water", ["Soil", "Water"]),
    "colons": ("1: Soil\n2: Water\n3: Light", ["Soil", "Water", "Light"]),
    "dashes": ("1 - Soil\n2 – Water\n3- Light", ["Soil", "Water", "Light"]),
    "blank lines, windows line ends": ("1. Soil\r\n\r\n2. Water\r\n\r\n3. Light\r\n", ["Soil", "Water", "Light"]),
    "one space of indentation": (" 1. Soil\n 2. Water\n3. Light", ["Soil", "Water", "Light"]),
    "drifting indentation": ("1. Soil\n   2. Water\n   3. Light", ["Soil", "Water", "Light"]),
    "bold number": ("**1.** Soil\n**2.** Water", ["Soil", "Water"]),
    "bold number without a dot": ("**1** Soil\n**2** Water", ["Soil", "Water"]),
    "bold number and title": ("**1. Soil**\n**2. Water**", ["Soil", "Water"]),
    "bold title with explanation": (
        "1. **Soil quality**: Good soil holds water and feeds the roots.\n2. **Light** - Six hours of sun are enough.",
        ["Soil quality", "Light"],
    ),
    "bold title, colon inside": (
        "1. **Soil:** what roots live in.\n2. **Light:** what leaves live on.",
        ["Soil", "Light"],
    ),
    "italic and code": ("1. *Soil*\n2. __Water__\n3. Use `git rebase`", ["Soil", "Water", "Use git rebase"]),
    "numbered headings": ("## 1. Soil\nText about soil.\n\n## 2. Water\nMore text.", ["Soil", "Water"]),
    "numbered headings with lists below": ("### 1. Soil\n1. sand\n2. clay\n### 2. Water\n1. rain", ["Soil", "Water"]),
    "a heading above": ("# Outline\n\n1. Soil\n2. Water", ["Soil", "Water"]),
    "quoted": ("> 1. Soil\n> 2. Water", ["Soil", "Water"]),
    "in a code fence": ("```\n1. Soil\n2. Water\n```", ["Soil", "Water"]),
    "steps": ("Step 1: Dig\nStep 2: Plant\nStep 3: Water", ["Dig", "Plant", "Water"]),
    "bold points": ("**Point 1:** Soil\n**Point 2:** Water", ["Soil", "Water"]),
    "parts in roman numerals": ("Part I: Soil\nPart II: Water", ["Soil", "Water"]),
    "hash numbers": ("#1: Soil\n#2: Water", ["Soil", "Water"]),
    "roman numerals": (
        "I. Origins\nII. Rise\nIII. Height\nIV. Decline\nV. Fall",
        ["Origins", "Rise", "Height", "Decline", "Fall"],
    ),
    "small roman numerals": ("i) Origins\nii) Rise\niii) Fall", ["Origins", "Rise", "Fall"]),
    "an essay plan": (
        "Outline:\n\nI. Introduction\n   A. Hook\n   B. Thesis\nII. Body\n   A. Soil\n   B. Water\nIII. Conclusion\n",
        ["Introduction", "Body", "Conclusion"],
    ),
    "letters": ("A. Soil\n   1. sand\n   2. clay\nB. Water\nC. Light", ["Soil", "Water", "Light"]),
    "small letters": ("a) Soil\nb) Water", ["Soil", "Water"]),
    "keycaps": ("1️⃣ Soil\n2️⃣ Water", ["Soil", "Water"]),
    "circled numbers": ("① Soil\n② Water\n③ Light", ["Soil", "Water", "Light"]),
    "bullets": ("- Soil\n- Water\n- Light", ["Soil", "Water", "Light"]),
    "round bullets": ("• Soil\n• Water\n•Light", ["Soil", "Water", "Light"]),
    "stars with bold titles": ("* **Soil**: feeds roots\n* **Water**: carries food", ["Soil", "Water"]),
    "check boxes": ("- [ ] Soil\n- [x] Water", ["Soil", "Water"]),
    "bullets inside bullets": ("- Soil\n  - sand\n  - clay\n- Water\n    * rain", ["Soil", "Water"]),
    "numbers after bullets": ("- 1. Soil\n- 2. Water", ["Soil", "Water"]),
    "bullets inside points": ("1. Soil\n- sand\n- clay\n2. Water\n   - rain", ["Soil", "Water"]),
    "decimal sub-points": ("1. Soil\n1.1 Sand\n1.2. Clay\n2. Water\n2.1) Rain", ["Soil", "Water"]),
    "indented sub-points": ("1. Soil\n   1. Sand\n   2. Clay\n   3. Peat\n2. Water\n   1. Rain", ["Soil", "Water"]),
    "sub-points in brackets": ("1. Soil\n1) Sand\n2) Clay\n2. Water", ["Soil", "Water"]),
    "sub-points in letters": ("1. Soil\na. Sand\nb. Clay\n2. Water\n1.a) Rain", ["Soil", "Water"]),
    "the delimiter changes": ("1. Soil\n2) Water\n3: Light", ["Soil", "Water", "Light"]),
    "an empty point first": ("1.\n2. Water\n3. Light", [(2, "Water"), (3, "Light")]),
    "an empty point inside": ("1. Soil\n2. \n3. Light", [(1, "Soil"), (3, "Light")]),
    "a point of dots": ("1. Soil\n2. ...\n3. **", ["Soil"]),
    "the first number twice, on two lines": ("1.\n1. Soil\n2. Water", ["Soil", "Water"]),
    "the first number twice, on one line": ("1. 1. Soil\n2. 2. Water", ["Soil", "Water"]),
    "a number and a step": ("1. Step 1: Dig\n2. Step 2: Plant", ["Dig", "Plant"]),
    "a gap": ("1. Soil\n2. Water\n4. Light", [(1, "Soil"), (2, "Water"), (4, "Light")]),
    "one line": ("1. Soil 2. Water 3. Light", ["Soil", "Water", "Light"]),
    "one line with commas": ("1) soil, 2) water, and 3) light.", ["soil", "water", "light"]),
    "one line in bold": ("**1.** Soil **2.** Water **3.** Light", ["Soil", "Water", "Light"]),
    "one line, only the titles in bold": ("1. **Soil** 2. **Water** 3. **Light**", ["Soil", "Water", "Light"]),
    "one line after a preamble": ("The outline: 1. Soil 2. Water 3. Light", ["Soil", "Water", "Light"]),
    "one line that goes on below": ("1. Soil 2. Water 3. Light\n4. Air", ["Soil", "Water", "Light", "Air"]),
    "a number in the prose of a line": ("1. World War 2. Causes\n2. Effects", ["World War 2. Causes", "Effects"]),
    "a restart": ("1. Soil\n2. Water\n\nSkeleton:\n1. Sand\n2. Clay\n3. Peat", ["Soil", "Water"]),
    "a restart further down": ("1. Soil\n2. Water\n3. Light\n2. Rain\n4. Air", ["Soil", "Water", "Light"]),
    "repeated points": ("1. Soil\n2. Water\n3. soil.\n4. Light", [(1, "Soil"), (2, "Water"), (4, "Light")]),
    "a loop": ("1. Soil\n2. Water\n3. Water\n4. Water\n5. Water\n6. Air", ["Soil", "Water"]),
    "preamble and epilogue": (
        "Sure! Here is an outline:\n\n1. Soil\n2. Water\n\nLet me know if I should go on.",
        ["Soil", "Water"],
    ),
    "text under the points": ("1. Soil\nIt feeds the roots.\n2. Water\nIt carries food.", ["Soil", "Water"]),
    "long explanations": (
        "1. Better sleep: people who walk in the evening fall asleep sooner\n"
        "2. Stronger heart – the heart is a muscle and learns like one\n"
        "3. Walk with a friend. You will talk, and the time will pass faster.\n",
        ["Better sleep", "Stronger heart", "Walk with a friend"],
    ),
    "a short title with a colon": ("1. Diet: eat more plants\n2. Sport", ["Diet: eat more plants", "Sport"]),
    "a title without an end": (
        "1. Soil\n2. " + " ".join(f"word{i}" for i in range(40)),
        ["Soil", " ".join(f"word{i}" for i in range(15))],
    ),
    "links, quotes and tags": ('1. [Soil](https://a.b/c)\n2. "Water"\n3. <b>Light</b>', ["Soil", "Water", "Light"]),
    "no list": ("Plants need soil, water and light.\n\nThey also need air.", []),
    "a list that does not start at one": ("4. Soil\n5. Water", []),
    "amounts and times": ("10:30 Breakfast\n1.5 liters of water\n2-3 eggs", []),
    "nothing": ("", []),
    "one point": ("1. Soil", ["Soil"]),
    "full-width digits and stops": ("１．時間を決める\n２．優先順位をつける", ["時間を決める", "優先順位をつける"]),
    "Chinese commas": ("1、土壤\n2、水分\n3、阳光", ["土壤", "水分", "阳光"]),
    "Chinese on one line": ("1、土壤 2、水分 3、阳光", ["土壤", "水分", "阳光"]),
    "Chinese numerals": ("一、土壤\n二、水分\n三、阳光", ["土壤", "水分", "阳光"]),
    "Chinese numerals in brackets": ("（一）土壤\n（二）水分", ["土壤", "水分"]),
    "Chinese ordinals": ("第一，土壤\n第二，水分", ["土壤", "水分"]),
    "Chinese explanations": (
        "1. **土壤**：好的土壤能够保持水分并为根部提供养分\n2. 阳光：植物每天需要六个小时以上的阳光照射",
        ["土壤", "阳光"],
    ),
    "Japanese bullets": ("・土\n・水\n・光", ["土", "水", "光"]),
    "Korean": ("1. 토양\n2. 물", ["토양", "물"]),
    "more than ten points": (
        "\n".join(f"{i}. Point number {i}" for i in range(1, 31)),
        [f"Point number {i}" for i in range(1, 11)],
    ),
}


@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_as_models_write_them(name: str) -> None:
    text, expected = OUTLINES[name]
    points = [entry if isinstance(entry, tuple) else (i, entry) for i, entry in enumerate(expected, 1)]
    assert [(point.index, point.title) for point in parse_outline(text)] == points


NEEDS = {
    "in words": ("3. Compare both (needs 1, 2)", (1, 2)),
    "in square brackets": ("3. Compare both [1, 2]", (1, 2)),
    "with the word and": ("3. Compare both (depends on points 1 and 2)", (1, 2)),
    "a range": ("3. Compare both (requires 1-2)", (1, 2)),
    "an arrow": ("3. Compare both -> 2", (2,)),
    "without brackets": ("3. Compare both; needs 1 and 2.", (1, 2)),
    "before the explanation": ("3. Compare both (needs 1): a long explanation of what is to be compared", (1,)),
    "in bold": ("3. **Compare both** (needs: 2)", (2,)),
    "Chinese": ("3. Compare both（需要1、2）", (1, 2)),
    "none": ("3. Compare both (needs none)", ()),
    "an empty list": ("3. Compare both []", ()),
    "twice the same": ("3. Compare both [2, 2]", (2,)),
    "a later point": ("3. Compare both (needs 1, 4)", (1,)),
    "itself": ("3. Compare both (needs 3)", ()),
}


@pytest.mark.parametrize("name", NEEDS)
def test_points_name_the_points_they_need(name: str) -> None:
    line, needs = NEEDS[name]
    points = parse_outline(f"1. Trains\n2. Planes\n{line}\n4. Choose")
    assert points[2] == Point(3, "Compare both", needs)
    assert all(not point.needs for point in points[:2])


@pytest.mark.parametrize(
    ("text", "ahead"),
    [
        ("1. Soil\n", "1. Soil\n2."),
        ("1. Soil\n2. Light\n\n", "1. Soil\n2. Light\n3."),
        ("1) Soil\n2) Light \n", "1) Soil\n2) Light\n3)"),
        ("**9.** Soil\n", "**9.** Soil\n**10.**"),
        (
            "1. Syntax and semantics of the language: it has",
            "1. Syntax and semantics of the language\n2.",
        ),
        (
            "1. Break down larger projects into smaller s",
            "1. Break down larger projects\n2.",
        ),
        ("1. One two three four five six s", "1. One two three four five six\n2."),
        ("1. One two three four five six", None),
        ("1. 植物需要充足的阳光和水分才", "1. 植物需要充足的阳光和水分\n2."),
        ("1. Diet: eat more plants", None),
        ("1. Soil", None),
        ("1.", None),
        ("1.\n", None),
        ("", None),
        ("There is no list\n", None),
        ("- Soil\n", None),
        ("I. Soil\n", None),
    ],
)
def test_numbers_are_given_and_long_titles_ended(text: str, ahead: str | None) -> None:
    assert steered(text) == ahead


def test_numbers_are_counted_beyond_ten() -> None:
    for numbers in ("一 二 三 四 五 六 七 八 九 十 十一 十二 十三", "I II III IV V VI VII VIII IX X XI XII XIII"):
        text = "\n".join(f"{number}. point {number}" for number in numbers.split())
        assert [point.index for point in parse_outline(text, max_points=20)] == list(range(1, 14))


def test_words_in_brackets_stay_in_the_title() -> None:
    assert parse_outline("1. Rest (after 2 weeks)\n2. Use (needs care)")[0].title == "Rest (after 2 weeks)"
    assert split_needs("Use (needs care)") == ("Use (needs care)", [])


def test_reasons_say_what_was_dropped() -> None:
    parser = OutlineParser()
    parser.feed("1. Soil\n2. Soil\n3.\n4. Light (needs 2, 3, 7)\n5. Ai")
    parser.finish(truncated=True)
    assert parser.points == [Point(1, "Soil"), Point(4, "Light", (1,))]  # 2 is the same point as 1
    assert parser.dropped == [
        "Point 2 repeats point 1.",
        "Point 3 has no title.",
        "Point 4 cannot need 3, which is not an earlier point.",
        "Point 4 cannot need 7, which is not an earlier point.",
        "Point 5 was cut off before it was complete.",
    ]


def test_a_point_is_complete_when_the_next_line_starts() -> None:
    parser = OutlineParser()
    assert parser.feed("1. Soil") == []
    assert parser.feed(" quality\n") == [Point(1, "Soil quality")]
    assert parser.feed("2. Water\n3. Li") == [Point(2, "Water")]
    assert not parser.done
    assert parser.finish() == [Point(3, "Li")]
    assert parser.finish() == []


def test_done_when_nothing_more_can_come() -> None:
    for text, limit in (("1. Soil\n2. Water\n", 2), ("1. Soil\n1. Water\n", 10), ("1. Soil\n2. Soil\n3. Soil\n", 10)):
        parser = OutlineParser(max_points=limit)
        parser.feed(text)
        assert parser.done
        assert parser.feed("9. Light\n") + parser.finish() == []


def test_a_complete_last_line_survives_truncation() -> None:
    parser = OutlineParser()
    parser.feed("1. Soil\n2. Water\n")
    assert parser.finish(truncated=True) == []
    assert [point.title for point in parser.points] == ["Soil", "Water"]


_PIECES = [
    "1. Soil",
    "2. Water",
    "3. Light (needs 1)",
    "2) Air",
    "- clay",
    "   1. sand",
    "**4.** Wind",
    "1. a 2. b 3. c",
]
_PIECES += [
    "",
    "\n",
    "\n\n",
    " ",
    "５．土",
    "Step 1: Dig",
    "I. Rise",
    "text. ",
    "\r\n",
    "3. Soil",
    "\ufeff",
    "\t",
    "一、水",
]


@given(st.lists(st.sampled_from(_PIECES) | st.text(max_size=8), max_size=12), st.data())
def test_chunks_do_not_change_the_points(pieces: list[str], data: st.DataObject) -> None:
    text = "\n".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parser = OutlineParser()
    seen = [p for a, b in itertools.pairwise([0, *cuts, len(text)]) for p in parser.feed(text[a:b])] + parser.finish()
    assert seen == parser.points == parse_outline(text)


@given(st.lists(st.sampled_from(_PIECES) | st.text(max_size=8), max_size=12), st.integers(0, 5))
def test_whatever_the_text_the_points_are_sound(pieces: list[str], limit: int) -> None:
    points = parse_outline("\n".join(pieces), max_points=limit)
    indices = [point.index for point in points]
    assert len(points) <= limit
    assert indices == sorted(set(indices))
    assert len({point.title.casefold() for point in points}) == len(points)
    for point in points:
        assert any(character.isalnum() for character in point.title) and "\n" not in point.title
        assert set(point.needs) <= set(indices) and all(other < point.index for other in point.needs)


@given(
    st.lists(st.from_regex(r"[A-Z][a-z]{2,8}( [a-z]{3,8}){0,3}", fullmatch=True), min_size=3, max_size=8, unique=True)
)
def test_a_plain_list_comes_back_whole(titles: list[str]) -> None:
    for form in ("{}. {}", "{}) {}", "**{}.** {}", "{}、{}", "Step {}: {}"):
        text = "\n".join(form.format(i, title) for i, title in enumerate(titles, 1))
        assert [point.title for point in parse_outline(text)] == titles


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("**Diet** and exercise", "Diet and exercise"),
        ("Dr. Who and the theory of time travel in fiction", "Dr. Who and the theory of time travel in fiction"),
        ("Is it worth the price?", "Is it worth the price?"),
        ("- – :", ""),
    ],
)
def test_titles(text: str, title: str) -> None:
    assert trim_title(text) == title


POINT = Point(2, "Use large pots")

EXPANSIONS = {
    "plain": (" Roots need room.", "Roots need room."),
    "the heading again": ("2. Use large pots: Roots need room.", "Roots need room."),
    "the heading in bold": ("**Use large pots**: Roots need room.", "Roots need room."),
    "the heading on its own line": ("**2. Use Large Pots**\n\nRoots need room.", "Roots need room."),
    "a markdown heading": ("## 2. Use large pots\nRoots need room.", "Roots need room."),
    "the heading twice": ("Use large pots: **Use large pots:** Roots need room.", "Roots need room."),
    "the number alone": ("2. Roots need room.", "Roots need room."),
    "a sentence that begins like the heading": (
        "Use large pots so that roots grow.",
        "Use large pots so that roots grow.",
    ),
    "half a sentence at the end": ("Roots need room. Small pots dry", "Roots need room."),
    "nothing but half a sentence": ("Roots need", "Roots need"),
    "an abbreviation is no end": ("Roots need room, e.g. those of", "Roots need room, e.g. those of"),
    "half a line at the end": ("Roots need room.\n\nSmall pots", "Roots need room."),
    "the next point": ("Roots need room.\n3. Water daily: Mornings are best.", "Roots need room."),
    "the next point in bold": ("Roots need room.\n\n**3. Water daily**\nMornings.", "Roots need room."),
    "a list of its own": ("Try these:\n1. clay\n2. wood\n3. cloth", "Try these:\n1. clay\n2. wood\n3. cloth"),
    "bullets of its own": ("Try these:\n- clay\n- wood", "Try these:\n- clay\n- wood"),
    "code": ("Run this:\n```\nplant()\n```", "Run this:\n```\nplant()\n```"),
    "Chinese": ("根需要空间。小盆容易", "根需要空间。"),
    "only the heading": ("**Use large pots**", ""),
    "nothing": (" \n", ""),
}


@pytest.mark.parametrize("name", EXPANSIONS)
def test_an_expansion_keeps_its_own_text_only(name: str) -> None:
    text, expected = EXPANSIONS[name]
    assert tidy(POINT, text) == expected


def test_merge_numbers_the_points_once_and_without_gaps() -> None:
    points = [Point(1, "Pick a spot"), POINT, Point(4, "Why water?")]
    texts = [" Sun matters.", "2. Use large pots: Roots need room.", "Plants drink. A l"]
    assert merge(points, texts) == (
        "1. **Pick a spot**: Sun matters.\n\n2. **Use large pots**: Roots need room.\n\n3. **Why water?** Plants drink."
    )


def test_merge_keeps_a_point_whose_text_is_missing() -> None:
    assert merge([POINT], [""]) == "1. **Use large pots**"


def test_merge_wants_one_text_for_each_point() -> None:
    with pytest.raises(ValueError, match="shorter"):
        merge([POINT], [])


def test_an_end_that_the_model_chose_stays() -> None:
    assert tidy(POINT, "Roots need room. Among them: maples", truncated=False) == "Roots need room. Among them: maples"
    assert tidy(POINT, "Use large pot", truncated=False) == "Use large pot"


_WORDS = [
    *("Use large pots", "use", "large pots", "**", "2.", "2) ", "3.", "\n3. Water", "\n1. clay", "\n- wood"),
    *(
        ": ",
        ". ",
        " – ",
        "\n",
        "\n\n",
        " ",
        "Roots need room.",
        "Dr. Who",
        "3.5 cm",
        "e.g. ",
        "根需要空间。",
        "」",
        "…",
        "#",
    ),
]


@given(st.lists(st.sampled_from(_WORDS) | st.text(max_size=6), max_size=14), st.booleans(), st.data())
def test_pieces_of_a_point_add_up_and_nothing_is_taken_back(
    words: list[str], truncated: bool, data: st.DataObject
) -> None:
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    own, shown = PointText(POINT), ""
    for a, b in itertools.pairwise([0, *cuts, len(text)]):
        own.feed(text[a:b])
        assert own.text.startswith(shown)
        shown = own.text
    own.finish(truncated=truncated)
    assert own.text.startswith(shown) and own.text == tidy(POINT, text, truncated=truncated) == own.text.strip()


@given(st.permutations([0, 0, 0, 1, 1, 1, 2, 2, 2]))
def test_an_answer_is_the_same_in_whatever_order_its_points_arrive(order: list[int]) -> None:
    points = [Point(1, "Pick a spot"), POINT, Point(4, "Why water?")]
    texts = [" Sun matters. So does wind.", "Use large pots: Roots need room.", "Plants drink. A l"]
    answer, fed, shown = Composition(), [0, 0, 0], ""
    for point in points:
        answer.add(point)
    for place in order:
        third = -(-len(texts[place]) // 3)
        answer.feed(place, texts[place][fed[place] * third : (fed[place] + 1) * third])
        fed[place] += 1
        if fed[place] == 3:
            answer.finish(place)
        assert answer.text.startswith(shown)
        shown = answer.text
    assert shown == merge(points, texts)


def test_a_sentence_is_shown_once_it_is_complete() -> None:
    answer = Composition()
    answer.add(POINT)
    seen = []
    for piece in ("Use", " large", " pots: Roots", " need room.", " Small", " pots dry. ", "3"):
        answer.feed(0, piece)
        seen.append(answer.text.removeprefix("1. **Use large pots**"))
    assert seen == ["", "", "", "", ": Roots need room.", ": Roots need room. Small pots dry.", seen[-2]]
