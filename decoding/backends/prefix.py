"""Beginnings that calls to a server share: of a prompt, which it may cache, and of an answer, which it may continue."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from urllib.parse import urlsplit

from decoding.backends.reply import Reply
from decoding.backends.request import RequestForm
from decoding.types import Message, SamplingParams

_LOG = logging.getLogger(__name__)

_known: dict[tuple[str, str], bool] = {}
"""(base URL, model) → whether the server continues messages, for every one that this process has asked."""

_QUESTION: list[Message] = [
    {"role": "user", "content": "Repeat exactly this list: Monday, Tuesday, Wednesday, Thursday, Friday"}
]
_BEGUN, _REST = "Monday, Tuesday, Wednes", "day"
"""An answer that breaks off inside a word: whoever continues it writes the rest of that word, whoever answers anew
does not."""


class PrefixWarming:
    """Of the calls on one event loop that begin alike, lets the first go ahead until its answer begins.

    A server stores a prompt's keys and values while it reads it. Calls that arrive together all read the part that
    they share; calls that arrive after the first has been read take it from the cache.
    """

    def __init__(self, least: int) -> None:
        """least: characters that two prompts must share from the beginning."""
        self._least = least
        self._ahead: list[tuple[str, asyncio.Event]] = []

    async def wait(self, prompt: str, begun: asyncio.Event) -> None:
        """Wait until a call ahead with the same beginning has begun to answer, or failed; the first waits for nobody.

        begun: set when this call's own answer begins. Those who have waited are not waited for, so that all of them
        leave together.
        """
        self._ahead = [(text, event) for text, event in self._ahead if not event.is_set()]
        beginning = prompt[: self._least]
        if len(beginning) < self._least:
            return
        for text, event in self._ahead:
            if text == beginning:
                await event.wait()
                return
        self._ahead.append((beginning, begun))


def continues_messages(form: RequestForm, base_url: str, key: str, timeout: float) -> tuple[bool | None, Reply | None]:
    """Whether the server goes on with an assistant message that ends the request, by asking it to, once.

    A server that does not know the fields for it refuses them, or ignores them and answers anew. Returns None if
    it gave no answer at all, so that it is asked again, and what the call used, if there was one.
    """
    if (base_url, form.model) in _known:
        return _known[base_url, form.model], None
    import openai

    request = form.arguments(_QUESTION, SamplingParams(max_new_tokens=4), _BEGUN)
    del request["stream"], request["stream_options"]
    plain = urlsplit(base_url).scheme == "http"
    reply = Reply()
    try:
        with openai.OpenAI(
            base_url=base_url,
            api_key=key or "none",
            timeout=timeout,
            max_retries=1,
            http_client=openai.DefaultHttpxClient(verify=False, follow_redirects=False) if plain else None,
        ) as client:
            completion: Any = client.chat.completions.create(**request)
        reply.begin()
        reply.report(getattr(completion, "usage", None))
        text = str(completion.choices[0].message.content or "")
        continues = text.startswith(_REST)
    except openai.APIStatusError as error:
        if error.status_code not in (400, 422):  # a busy server, a wrong key: says nothing about messages
            return None, None
        continues = False
    except Exception as error:  # whatever it is, the first real call meets it too and reports it
        _LOG.info("could not find out whether the server continues messages: %s", type(error).__name__)
        return None, None
    _known[base_url, form.model] = continues
    return continues, reply if reply.attempts else None
