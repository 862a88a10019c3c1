"""The Modelfile with which Ollama imports a GGUF file: `ollama create NAME -f Modelfile`.

Ollama renders chats with a Go template, the model was trained with a Jinja template. The Go template is read off what the
Jinja template makes of a chat with marks in place of the texts, so it says the same for a system turn, a question and a
reply, with or without the system turn. Tests hold the two together; Ollama itself is not run in them.
"""

from __future__ import annotations

from typing import Any

from pipelines.errors import ExportFailed
from pipelines.tune.turns import end_of_turn

MODELFILE = "Modelfile"
SYSTEM, QUESTION, REPLY = "\u2045system\u2046", "\u2045question\u2046", "\u2045reply\u2046"


def modelfile(gguf: str, tokenizer: Any, context_tokens: int) -> str:
    """Return the text of a Modelfile.

    Args:
        gguf: name of the GGUF file beside it.
        tokenizer: with the chat template.
        context_tokens: longest prompt and reply together.

    Raises:
        ExportFailed: the template does not put the turns one after the other.
    """
    end = str(tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)))
    return (f'FROM ./{gguf}\nTEMPLATE """{go_template(tokenizer)}"""\nPARAMETER stop "{end}"\n'
            f"PARAMETER num_ctx {context_tokens}\nPARAMETER temperature 0\n")  # fmt: skip


def go_template(tokenizer: Any) -> str:
    """Return the chat template in Go's language, over .System, .Prompt and .Response; `ExportFailed` as for `modelfile`."""
    from jinja2 import TemplateError

    alone_head, alone_middle = _around_question(tokenizer, _render(tokenizer, [("user", QUESTION)]))
    try:
        told = _render(tokenizer, [("system", SYSTEM), ("user", QUESTION)])
    except TemplateError:  # the template knows no system turn, and says so
        told = ""
    answered = _render(tokenizer, [("user", QUESTION), ("assistant", REPLY)], reply_follows=False)
    end = answered.partition(REPLY)[2]
    begin = str(tokenizer.bos_token or "")
    if begin and alone_head.startswith(begin):  # llama.cpp puts it there itself if the file says so
        alone_head, told = _without(alone_head, begin, tokenizer), _without(told, begin, tokenizer)
    if SYSTEM not in told:
        return f"{alone_head}{{{{ .Prompt }}}}{alone_middle}{{{{ .Response }}}}{end}"
    head, _, rest = told.partition(SYSTEM)
    between, middle = _around_question(tokenizer, rest)
    if middle != alone_middle:
        raise ExportFailed("the chat template asks differently once there is a system turn", "one form of question",
                           "llmlab export --quantisation none keeps the merged model")  # fmt: skip
    system = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{between}{{{{ else }}}}{alone_head}{{{{ end }}}}"
    return f"{system}{{{{ .Prompt }}}}{middle}{{{{ .Response }}}}{end}"


def _without(text: str, begin: str, tokenizer: Any) -> str:
    """Drop the begin-of-text token that the tokenizer of the engine adds by itself."""
    adds = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(begin) if adds else text


def _around_question(tokenizer: Any, text: str) -> tuple[str, str]:
    head, found, tail = text.partition(QUESTION)
    if not found:
        raise ExportFailed(f"the chat template of {tokenizer.name_or_path} does not show the user's text", "a chat template")
    return head, tail


def _render(tokenizer: Any, turns: list[tuple[str, str]], *, reply_follows: bool = True) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply_follows))
