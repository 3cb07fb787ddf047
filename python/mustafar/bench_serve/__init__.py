"""Load for a server that speaks as OpenAI's does, and what its clients see of it.

``mustafar bench-serve`` in the shell: docs/serving.md says what is measured and how. Needs the
extra ``mustafar[server]``, whose h11 speaks HTTP here too.
"""
