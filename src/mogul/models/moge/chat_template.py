"""The chat template of Pangu Pro MoE, for tokenizers that come without it.

Segments are `[unused9]role：text[unused10]` with a full-width colon; the system segment stands
first even when it is empty; an assistant's history keeps the answer without its thinking, which
ends at `[unused17]`. The prompt starts with the beginning-of-sequence token, so tokenise it
without adding special tokens (as `apply_chat_template` does).
"""

PANGU_CHAT_TEMPLATE = """\
{%- set words = {'user': '用户', 'assistant': '助手', 'system': '系统'} -%}
{{- bos_token -}}
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- '[unused9]系统：[unused10]' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in words -%}
{{- raise_exception('unknown role ' ~ message['role'] ~ '; use system, user or assistant') -}}
{%- endif -%}
{%- set text = message['content'] or '' -%}
{%- if message['role'] == 'assistant' -%}
{%- set text = text.split('[unused17]')[-1] -%}
{%- endif -%}
{{- '[unused9]' ~ words[message['role']] ~ '：' ~ text ~ '[unused10]' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[unused9]助手：' -}}
{%- endif -%}
"""
