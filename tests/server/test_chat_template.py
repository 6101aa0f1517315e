"""Templates get what transformers gives them, and cannot do more."""

import json
from pathlib import Path

import pytest

from gear_engine.protocol import RequestError
from gear_server.chat_template import ChatTemplate, load_chat_template

USER = [{"role": "user", "content": "hi"}]


def render(source: str, **more: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(USER, **more)  # type: ignore[arg-type]


def test_special_tokens_and_the_generation_prompt_are_there() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}>{% endif %}"
    assert render(source) == "<s>hi</s>>"
    assert render(source, add_generation_prompt=False) == "<s>hi</s>"


def test_blocks_leave_no_white_space_behind() -> None:
    assert render("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n") == "user\n"


def test_break_and_continue_work_in_loops() -> None:
    assert render("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
                  "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "02"  # fmt: skip


def test_tojson_escapes_no_html_and_no_letters() -> None:
    assert render("{{ {'a': '<é>&'} | tojson }}") == '{"a": "<é>&"}'


def test_the_generation_tag_is_only_its_content() -> None:
    assert render("a{% generation %}{{ messages[0].role }}{% endgeneration %}b") == "auserb"


def test_strftime_now_knows_the_year() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("20")


def test_an_undefined_tools_variable_is_none_as_in_transformers() -> None:
    assert render("{% if tools is none and documents is none %}none{% endif %}") == "none"


def test_kwargs_reach_the_template_but_not_its_own_variables() -> None:
    assert render("{{ enable_thinking }}", template_kwargs={"enable_thinking": False}) == "False"
    with pytest.raises(RequestError, match="may not set messages"):
        render("", template_kwargs={"messages": []})


def test_raise_exception_reaches_the_caller_in_the_templates_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content + 1 }}", "{{ messages[5].content }}", "{{ nothing.at.all }}"]
)
def test_a_template_that_stumbles_over_messages_is_the_callers_news(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        render(source)


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include 'x' %}"])
def test_templates_stay_in_their_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        render(source)


def test_chat_template_jinja_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    template = load_chat_template(tmp_path, {"chat_template": "config"}, {})
    assert template is not None
    assert template.render(USER) == "file"


@pytest.mark.parametrize(
    "config", [{"chat_template": "x"}, {"chat_template": [{"name": "tool_use", "template": "y"},
                                                          {"name": "default", "template": "x"}]}]
)  # fmt: skip
def test_the_config_may_hold_one_template_or_several_with_names(tmp_path: Path, config: dict[str, object]) -> None:
    template = load_chat_template(tmp_path, config, {})
    assert template is not None
    assert template.render(USER) == "x"


def test_a_template_may_be_in_chat_template_json(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "x"}))
    assert load_chat_template(tmp_path, {}, {}) is not None


def test_a_model_may_have_no_template(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}, {}) is None
