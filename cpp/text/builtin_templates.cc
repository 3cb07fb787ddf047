// The chat templates that --chat-template can name, for models that come without one.
#include "text/chat_template_impl.h"

namespace mustafar {

const std::vector<std::pair<std::string, std::string>>& builtin_chat_templates() {
  static const std::vector<std::pair<std::string, std::string>> kTemplates = {
      {"chatml", R"jinja(
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %})jinja"},
      {"llama-2", R"jinja(
{%- set system = namespace(text='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set system.text = '<<SYS>>\n' ~ message.content ~ '\n<</SYS>>\n\n' %}
    {%- elif message.role == 'user' %}
        {{- bos_token ~ '[INST] ' ~ system.text ~ message.content ~ ' [/INST]' }}
        {%- set system.text = '' %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ message.content ~ ' ' ~ eos_token }}
    {%- else %}
        {{- raise_exception('the llama-2 template knows the roles system, user and assistant, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %})jinja"},
      {"llama-3", R"jinja(
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' ~ message.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %})jinja"},
      {"mistral", R"jinja(
{{- bos_token }}
{%- set system = namespace(text='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set system.text = message.content ~ '\n\n' %}
    {%- elif message.role == 'user' %}
        {{- '[INST] ' ~ system.text ~ message.content ~ '[/INST]' }}
        {%- set system.text = '' %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ message.content ~ eos_token }}
    {%- else %}
        {{- raise_exception('the mistral template knows the roles system, user and assistant, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %})jinja"},
      {"zephyr", R"jinja(
{%- for message in messages %}
    {{- '<|' ~ message.role ~ '|>\n' ~ message.content ~ eos_token ~ '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %})jinja"},
      {"phi-3", R"jinja(
{%- for message in messages %}
    {{- '<|' ~ message.role ~ '|>\n' ~ message.content ~ '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %})jinja"},
      {"vicuna", R"jinja(
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content ~ '\n\n' }}
    {%- elif message.role == 'user' %}
        {{- 'USER: ' ~ message.content ~ '\n' }}
    {%- else %}
        {{- 'ASSISTANT: ' ~ message.content ~ eos_token ~ '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %})jinja"},
      {"plain", R"jinja(
{{- bos_token }}
{%- for message in messages %}
    {{- message.content }}
    {%- if not loop.last %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %})jinja"},
  };
  return kTemplates;
}

}  // namespace mustafar
