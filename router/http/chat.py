r"""From a conversation to the text that kernels continue, and back.

    System:                      for every message, in order: who speaks (System, User or Assistant, and the
    Answer in one line.          name in brackets if there is one), its text, an empty line

    User:                        and at the end "Assistant:" and a line end, after which the kernel writes

    What is an E8 lattice?
                                 the reply ends where a new "User:" or "System:" would begin
    Assistant:

Kernels are trained on text, not on dialogue; this is the plainest text a dialogue has. Law: the conversation with
the reply in it begins with the prompt that was sent for the reply and goes on with the reply, so what was read once is
a prefix of what is read next. Messages may hold whatever text they like, lines that look like a speaker included.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.http.requests import Message

SPEAKERS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
STOPS = ("\n\nUser:", "\n\nSystem:")  # what ends a reply

# The same for clients that render it themselves.
JINJA = (
    "{%- set speakers = {'system': 'System', 'developer': 'System', 'user': 'User', 'assistant': 'Assistant'} -%}"
    "{%- for m in messages -%}"
    "{{- speakers[m['role']] + (' (' + m['name'] + ')' if m['name'] else '') + ':\\n' -}}"
    "{%- if m['content'] is string -%}{{- m['content'] -}}"
    "{%- else -%}{%- for part in m['content'] or [] -%}{{- part['text'] -}}{%- endfor -%}{%- endif -%}"
    "{{- '\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"
)


def render(messages: Sequence[Message], reply: bool = True, go_on: bool = False) -> str:
    """The text of a conversation: with `go_on` it ends inside the last message, else with `reply` where one begins."""
    text = "".join(f"{_speaker(m)}:\n{m.text}\n\n" for m in messages)
    return text[:-2] if go_on else text + "Assistant:\n" if reply else text


def _speaker(message: Message) -> str:
    return SPEAKERS[message.role] + (f" ({message.name})" if message.name else "")
