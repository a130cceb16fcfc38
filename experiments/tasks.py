"""Small tasks whose answers are exact, for judging decoding methods by correctness instead of by taste.

Each example is a prompt that begins with the task's name, and its one right answer. Examples are drawn from a seeded
generator; which side of the train/test split a prompt is on is a property of its text, so no test prompt was ever
trained on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<mask>", "<sep>", "<unk>")
PAD, BOS, EOS, MASK, SEP, UNK = range(len(SPECIAL))
LONGEST_ANSWER = 16
LENGTH = len(SPECIAL)
"""Token `LENGTH + n - 1` says that the answer has n tokens; n up to `LONGEST_ANSWER`."""


@dataclass(frozen=True)
class Example:
    """prompt: the task's name and its input. answer: the right output, compared as text."""

    task: str
    prompt: str
    answer: str


def add(draw: random.Random) -> tuple[str, str]:
    """Sum of two numbers of up to two digits."""
    a, b = draw.randrange(100), draw.randrange(100)
    return f"{a} + {b}", str(a + b)


def sort(draw: random.Random) -> tuple[str, str]:
    """Four to twelve digits in ascending order."""
    numbers = [draw.randrange(10) for _ in range(draw.randint(4, 12))]
    return " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))


_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


def date(draw: random.Random) -> tuple[str, str]:
    """A date in one of four notations, as ISO 8601 writes it."""
    year, month, day = draw.randint(1900, 2099), draw.randint(1, 12), draw.randint(1, 28)
    name = _MONTHS[month - 1]
    written = draw.choice(
        (f"{day} {name} {year}", f"{name} {day}, {year}", f"{day}.{month}.{year}", f"{month}/{day}/{year}")
    )
    return written, f"{year}-{month:02}-{day:02}"


_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
_ONES, _TENS = _NUMBERS.split()[:20], _NUMBERS.split()[20:]


def spelled(number: int) -> str:
    """English words for a number below a million."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f" {_ONES[number % 10]}" if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = f" {spelled(number % unit)}" if number % unit else ""
    return f"{spelled(number // unit)} {name}{rest}"


def _number(draw: random.Random) -> int:
    return draw.randrange(10 ** draw.randint(3, 6))


def spell(draw: random.Random) -> tuple[str, str]:
    """A number below a million in words."""
    number = _number(draw)
    return str(number), spelled(number)


def digits(draw: random.Random) -> tuple[str, str]:
    """The number that words stand for."""
    number = _number(draw)
    return spelled(number), str(number)


# English noun → French noun, feminine?
_NOUNS = {
    "cat": ("chat", False), "dog": ("chien", False), "house": ("maison", True), "table": ("table", True),
    "book": ("livre", False), "car": ("voiture", True), "garden": ("jardin", False), "flower": ("fleur", True),
    "boy": ("garçon", False), "girl": ("fille", True), "king": ("roi", False), "queen": ("reine", True),
    "bread": ("pain", False), "chair": ("chaise", True), "train": ("train", False), "road": ("route", True),
}  # fmt: skip
# English adjective → masculine, feminine, before the noun?
_ADJECTIVES = {
    "big": ("grand", "grande", True), "small": ("petit", "petite", True), "good": ("bon", "bonne", True),
    "beautiful": ("beau", "belle", True), "black": ("noir", "noire", False), "white": ("blanc", "blanche", False),
    "green": ("vert", "verte", False), "red": ("rouge", "rouge", False), "heavy": ("lourd", "lourde", False),
}  # fmt: skip
_VERBS = {
    "sees": "voit", "loves": "aime", "takes": "prend", "buys": "achète", "finds": "trouve", "follows": "suit",
}  # fmt: skip
_PLACES = {"with": "avec", "behind": "derrière", "under": "sous", "before": "devant"}


def translate(draw: random.Random) -> tuple[str, str]:
    """A sentence of a small grammar in French, with its genders, agreement and word order."""

    def phrase() -> tuple[str, str]:
        noun, (french, feminine) = draw.choice(list(_NOUNS.items()))
        article, articles = draw.choice((("the", ("le", "la")), ("a", ("un", "une"))))
        le = articles[feminine]
        if draw.random() < 0.4:
            return f"{article} {noun}", f"{le} {french}"
        adjective, forms = draw.choice(list(_ADJECTIVES.items()))
        agreeing = forms[1] if feminine else forms[0]
        words = (agreeing, french) if forms[2] else (french, agreeing)
        return f"{article} {adjective} {noun}", f"{le} {' '.join(words)}"

    verb, french_verb = draw.choice(list(_VERBS.items()))
    parts = [phrase(), (verb, french_verb), phrase()]
    if draw.random() < 0.5:
        parts += [draw.choice(list(_PLACES.items())), phrase()]
    return " ".join(english for english, _ in parts), " ".join(french for _, french in parts)


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "add": add,
    "sort": sort,
    "date": date,
    "spell": spell,
    "digits": digits,
    "translate": translate,
}


def examples(seed: int, *, test: bool) -> Iterator[Example]:
    """Endless examples, the tasks taking turns; test prompts and training prompts never meet."""
    draw = random.Random(seed)
    turns = list(TASKS) if test else [*TASKS, "sort", "translate"]  # what is learnt slowly comes more often
    while True:
        for name in turns:
            while True:
                given, answer = TASKS[name](draw)
                prompt = f"{name} {given}"
                if (zlib.crc32(prompt.encode()) % 10 == 0) == test:
                    break
            yield Example(name, prompt, answer)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per word and per digit, the space before it included; prompts end in `<sep>`."""
    words = {*TASKS, *_MONTHS, *_ONES, *_TENS, "hundred", "thousand", "the", "a", "le", "la", "un", "une"}
    words |= {*_NOUNS, *_ADJECTIVES, *_VERBS, *_PLACES, *_VERBS.values(), *_PLACES.values()}
    words |= {french for french, _ in _NOUNS.values()} | {form for forms in _ADJECTIVES.values() for form in forms[:2]}
    lengths = [f"<length {n + 1}>" for n in range(LONGEST_ANSWER)]
    pieces = [*map(str, range(10)), *"-/.,+", *sorted(words)]
    vocabulary = [*SPECIAL, *lengths, *pieces, *(f" {piece}" for piece in pieces)]
    model = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\p{L}]"), behavior="isolated")
    model.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        sep_token="<sep>",
        unk_token="<unk>",
        additional_special_tokens=lengths,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}<sep>{% endfor %}"
    return fast


def encode(fast: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, `<bos>` and `<sep>` included, and of the answer, without an end."""
    prompt = fast(example.prompt, add_special_tokens=False)["input_ids"]
    answer = fast(f" {example.answer}", add_special_tokens=False)["input_ids"]
    return [BOS, *prompt, SEP], answer


def correct(example: Example, text: str) -> bool:
    """Whether an answer is the right one, spaces at its ends aside."""
    return text.strip() == example.answer
