"""What a call to an OpenAI-compatible server says: our prompts and parameters as fields of the protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from decoding.backends.base import messages_of
from decoding.errors import InvalidRequest
from decoding.types import Message, Prompt, SamplingParams

Endpoint = Literal["chat", "completions"]

_EXTENSIONS = {
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "ignore_eos": "ignore_eos",
}
"""Our sampling parameters that OpenAI's protocol does not have → what vLLM and its kin call them."""

CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
"""What vLLM and SGLang want to be told before they go on with an assistant message."""


@dataclass(frozen=True)
class RequestForm:
    """How requests to one model on one server are written.

    model: as the server names it. length_field: what the server calls `max_new_tokens`. extensions: whether it
    takes the parameters that OpenAI's protocol does not have.
    """

    model: str
    endpoint: Endpoint
    length_field: str
    extensions: bool

    def arguments(self, prompt: Prompt, params: SamplingParams, prefill: str = "") -> dict[str, Any]:
        """The arguments of the client's `create`. Raises InvalidRequest for what the protocol cannot say."""
        if params.logprobs:
            raise InvalidRequest("logprobs belong to token ids, which a server does not send; use a local model.")
        defaults = SamplingParams()
        extra: dict[str, object] = {
            theirs: getattr(params, ours)
            for ours, theirs in _EXTENSIONS.items()
            if getattr(params, ours) != getattr(defaults, ours)
        }
        if extra and not self.extensions:
            ours = ", ".join(name for name, theirs in _EXTENSIONS.items() if theirs in extra)
            raise InvalidRequest(
                f"OpenAI's protocol has no field for {ours}; leave it at its default, or set extra_body=True "
                "(--extra-body) if the server takes it, as vLLM does."
            )
        request: dict[str, Any] = {
            "model": self.model,
            "temperature": params.temperature,
            "seed": params.seed,
            self.length_field: params.max_new_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if params.top_p != defaults.top_p:
            request["top_p"] = params.top_p
        if params.stop:
            request["stop"] = list(params.stop)
        if params.logit_bias:
            request["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
        if self.endpoint == "completions":
            request["prompt"] = _plain(prompt, prefill)
        else:
            request["messages"] = _messages(prompt)
            if prefill:
                request["messages"].append({"role": "assistant", "content": prefill})
                extra |= CONTINUE
        if extra:
            request["extra_body"] = extra
        return request


def prompt_text(request: Mapping[str, Any]) -> str:
    """What the model reads of a request, as one text: equal beginnings are what a server's prefix cache can share."""
    if "prompt" in request:
        prompt = request["prompt"]
        return prompt if isinstance(prompt, str) else "".join(map(chr, prompt))  # one character for each token id
    return "\0".join(f"{message['role']}\0{message['content']}" for message in request["messages"])


def _messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, Sequence) and any(isinstance(item, int) for item in prompt):
        raise InvalidRequest("the chat endpoint takes text or messages; token ids need endpoint='completions'.")
    return messages_of(prompt)


def _plain(prompt: Prompt, prefill: str) -> str | list[int]:
    if not isinstance(prompt, str) and prompt and all(isinstance(item, int) for item in prompt):
        if prefill:
            raise InvalidRequest("the beginning of an answer cannot be joined to token ids; give the prompt as text.")
        return [item for item in prompt if isinstance(item, int)]
    return "\n\n".join(message["content"] for message in messages_of(prompt)) + prefill
