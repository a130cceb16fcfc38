"""What every test shares: the default model, prompts, two threads, and no network."""

from __future__ import annotations

import ipaddress
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports the hub's client, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from decoding.models import DEFAULT_MODEL, LoadedModel, load_model

pytest_plugins = ("tests.fault_server", "tests.made_runs")
"""Modules whose fixtures several files of tests share."""

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def smollm() -> LoadedModel:
    """The default model in float32 on the CPU; shared, so leave it as it is."""
    return load_model(DEFAULT_MODEL, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """24 prompts from one word to a page: questions, code, figures, other scripts, repetition, odd spacing."""
    return list(_PROMPTS)


@pytest.fixture
def kill_in_save(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with n, and the nth checkpoint of a training run is cut off in the middle by a KeyboardInterrupt."""
    from accelerate import Accelerator

    whole, saved = Accelerator.save_state, itertools.count(1)

    def kill_in(n: int) -> None:
        def save(self: Accelerator, folder: str) -> None:
            whole(self, folder)
            if next(saved) == n:
                for file in Path(folder).iterdir():
                    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                raise KeyboardInterrupt

        monkeypatch.setattr(Accelerator, "save_state", save)

    return kill_in


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A test that reaches for another machine fails, and says where it wanted to go."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_here(address[0]):
            raise RuntimeError(f"a test tried to connect to {address[0]}; tests run without a network.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        patch.setattr(socket.socket, "connect_ex", guarded)
        yield


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


_PROMPTS = (
    "Hi",
    "Why?",
    "What is the capital of France?",
    "Name three fruits.",
    "Write a haiku about autumn rain.",
    "Translate into German: The library opens at nine.",
    "What is 17 * 23? Show the steps.",
    "List the planets of the solar system in order, one on each line.",
    "Explain why the sky is blue to a child of six.",
    "Continue: 1, 1, 2, 3, 5, 8, 13,",
    "Write a Python function that reverses a string.",
    "¿Cuál es la diferencia entre «ser» y «estar»?",
    "日本の首都はどこですか。",
    "Fix this sentence: him and me was going too the store yesterday , and buyed   milk",
    "Give two arguments for and two against working from home, each in one sentence.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "Make this faster.",
    "Repeat after me, ten times: the quick brown fox jumps over the lazy dog.",
    "A train leaves at 08:15 and travels 210 km at 84 km/h. A second one leaves the same station at 08:45 and "
    "travels at 120 km/h. When and where does the second overtake the first?",
    "Turn this into JSON with the keys name, year and price:\n\nThe Glass Harbour, 2004, 12.50\n"
    "Letters from a Lighthouse, 1998, 9.99\nSmall Machines, 2017, 18.00\nThe Orchard Clock, 2011, 14.25",
    "You are the keeper of a lighthouse on a rocky island. A ship's captain writes to ask whether the harbor is safe "
    "in a northerly gale. Answer in a letter of two paragraphs, courteous but plain.",
    "Summarize the following in one sentence.\n\nThe town had two bakeries, and for forty years people argued about "
    "which was better. When the older one burned down, its owner was offered an oven and a corner of the shop by her "
    "rival. They now bake side by side, and people argue about which of the two works the mornings.",
    "Answer from the text alone.\n\nText: The Halden valley railway opened in 1887 with eleven stations. Two were "
    "closed in 1931, when the quarry shut, and four more in 1959. One of the first two was reopened for walkers in "
    "1994; trains call there on Sundays from May to September. The line's steepest part, between Orrin Bridge and "
    "Sallow Top, rises 1 in 38.\n\nQuestion: How many stations does the line have on a Sunday in June?",
    "Here is a log.\n\n"
    + "".join(f"12:{m:02} pump {m % 3 + 1} pressure {4 + m % 5}.{m % 10} bar ok\n" for m in range(24))
    + "12:24 pump 2 pressure 0.3 bar FAULT\n\nWhich pump failed, when, and what was its pressure a minute before?",
    "Below are the minutes of a meeting. List who promised what, by when.\n\n"
    + "Ana opened the meeting at ten. The roof over the east hall leaks again; Bert will ask two firms for an offer "
    "by Friday. Chen reported that the autumn program is printed except for the cover, which she brings to the "
    "printer on Tuesday. Dora asked whether the piano could be tuned before the first concert. Ana promised to call "
    "the tuner the same day. Emil has found a second-hand projector for 180 euros; the board agreed to spend up to "
    "200, and he collects it next Saturday. There was a long talk about the price of tickets, which stay as they are "
    "until January, when Chen presents what the other halls in the county charge. Bert reminded everyone that the "
    "keys of the old stage door are missing. Whoever finds them gives them to Dora, who has the locks changed at the "
    "end of the month if they have not turned up by then. The meeting closed at twenty to twelve.",
)  # fmt: skip
