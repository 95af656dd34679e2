"""`mogul chat` keeps a conversation, obeys its commands and survives Ctrl-C."""

import io
import sys

import pytest

from mogul.cli import chat
from mogul.cli.generation import Interrupted, Speaker
from mogul.cli.main import main
from mogul.core.errors import ArtifactError, ConfigError


class EchoSpeaker:
    """Answers with the number of messages it was shown; raises what the line asks for."""

    def __init__(self):
        self.shown = []

    def template_inputs(self, messages):
        return list(messages)

    def speak(self, messages):
        self.shown.append(messages)
        if messages[-1]["content"] == "interrupt":
            raise Interrupted("half an ans")
        if messages[-1]["content"] == "too long":
            raise ConfigError("too many tokens", fix="/reset")
        return f"{len(messages)} messages"


def talk(monkeypatch, *lines: str, start=()) -> EchoSpeaker:
    speaker = EchoSpeaker()
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    chat.converse(speaker, list(start))
    return speaker


def test_the_model_sees_the_whole_conversation(monkeypatch):
    system = {"role": "system", "content": "be short"}
    speaker = talk(monkeypatch, "one", "", "two", start=[system])
    assert speaker.shown[1] == [
        system,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "2 messages"},
        {"role": "user", "content": "two"},
    ]


def test_reset_forgets_all_but_the_system_prompt(monkeypatch):
    system = {"role": "system", "content": "be short"}
    speaker = talk(monkeypatch, "one", "/reset", "two", start=[system])
    assert speaker.shown[1] == [system, {"role": "user", "content": "two"}]


def test_quit_leaves_before_the_end_of_input(monkeypatch):
    assert len(talk(monkeypatch, "one", "/quit", "two").shown) == 1


def test_commands_are_explained_and_typos_are_told(monkeypatch, capsys):
    assert talk(monkeypatch, "/help", "/rset").shown == []
    err = capsys.readouterr().err
    assert all(name in err for name in chat.COMMANDS)
    assert "unknown command '/rset': did you mean '/reset'?" in err


def test_a_stopped_answer_stays_in_the_conversation(monkeypatch, capsys):
    speaker = talk(monkeypatch, "interrupt", "go on")
    assert speaker.shown[1][1] == {"role": "assistant", "content": "half an ans"}
    assert "(answer stopped)" in capsys.readouterr().err


def test_too_long_a_question_is_told_and_forgotten(monkeypatch, capsys):
    speaker = talk(monkeypatch, "too long", "short")
    assert speaker.shown[1] == [{"role": "user", "content": "short"}]
    assert "too many tokens\nfix: /reset" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_does_not_leave(monkeypatch, capsys):
    lines = iter([KeyboardInterrupt(), "one", EOFError()])

    def ask(_prompt):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", ask)
    speaker = EchoSpeaker()
    chat.converse(speaker, [])
    assert len(speaker.shown) == 1
    assert "/quit or Ctrl-D leaves" in capsys.readouterr().err


def test_a_real_conversation(monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is a token?\n/reset\nwhat is a token?\n"))
    args = ("--system", "be short", "--max-new-tokens", "6", "--temperature", "0")
    assert main(["chat", str(checkpoint), *args]) == 0
    shown = capsys.readouterr()
    first, second = shown.out.rstrip("\n").split("\n")[:2]
    assert first == second, "greedy answers to the same question differ after /reset"
    assert shown.err.count("tokens/s") == 2


def test_a_base_model_is_refused_before_the_first_word(capsys, base_checkpoint):
    assert main(["chat", str(base_checkpoint), "--max-new-tokens", "4"]) == 1
    shown = capsys.readouterr()
    assert "no chat template: this is a base model\nfix: use `mogul generate" in shown.err
    assert shown.out == ""


def test_a_template_that_refuses_is_told():
    from jinja2 import TemplateError

    class Strict:
        def apply_chat_template(self, _messages, **_):
            raise TemplateError("no system role")

    with pytest.raises(ArtifactError, match="this conversation: no system role") as caught:
        Speaker(None, Strict(), None).template_inputs([])
    assert "leave out --system" in caught.value.__notes__[0]
