"""Chat prompts as Jinja2 templates, one folder per method, and their loader.

A template says who speaks with two tags of its own, next to everything Jinja2 has:

    {% message "user" %}
    {{ question }}
    {% endmessage %}
    {% prefill %}1.{% endprefill %}

`message` takes a role ("system", "user", "assistant", or an expression); `prefill` is the start of the answer
and comes last, if at all. White space around a text does not count, and no text may stand outside the tags.

The templates of a folder of your own go before the shipped ones of the same name, so one file is enough to change one
prompt; to change a part of it only, start with `{% extends "shipped/skeleton/outline.j2" %}`. Templates run in a
sandbox: they see the values they are given, and no Python objects behind them.
"""

from prompts.loader import ChatPrompt, names, render

__all__ = ["ChatPrompt", "names", "render"]
