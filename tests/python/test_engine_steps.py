"""An engine's request token by token."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

import mustafar
from mustafar.engine import Step
from support.paths import DEMO


@pytest.fixture(scope="module")
def engine() -> Iterator[mustafar.Engine]:
    with mustafar.Model(DEMO, threads=1) as model, mustafar.Engine(model) as made:
        yield made


def steps_of(request: mustafar.Request) -> list[Step]:
    async def all_steps() -> list[Step]:
        return [step async for step in request.steps()]

    return asyncio.run(all_steps())


def test_steps_are_the_result(engine: mustafar.Engine) -> None:
    request = engine.submit("Grüße 日本", max_new_tokens=40, temperature=1.5, seed=2, logprobs=1)
    steps = steps_of(request)
    result = request.result()
    assert "".join(step.text for step in steps) == result.text
    made = [step for step in steps if step.token_id is not None]
    assert [step.token_id for step in made] == result.token_ids
    assert [step.logprob for step in made] == result.logprobs
    assert [step.text for step in steps_of(request)] == [step.text for step in steps]


def test_text_before_a_stop_text_comes_with_its_tokens(engine: mustafar.Engine) -> None:
    prompt = engine.model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does textwrap.dedent do?"}]
    )
    request = engine.submit(prompt, max_new_tokens=40, temperature=0, stop="leading white")
    steps = steps_of(request)
    result = request.result()
    assert result.finish_reason == "stop"
    assert "".join(step.text for step in steps) == result.text
    ids = [step.token_id for step in steps if step.token_id is not None]
    assert ids[: len(result.token_ids)] == result.token_ids
    assert all(step.logprob is None for step in steps)


def test_a_request_that_fails_raises_after_its_steps(engine: mustafar.Engine) -> None:
    def fail(ids: object, logits: object) -> None:
        raise KeyError("mine")

    request = engine.submit("a", max_new_tokens=3, logits_processor=fail)
    with pytest.raises(KeyError, match="mine"):
        steps_of(request)
