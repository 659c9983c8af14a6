"""PyPI pydantic-ai: agents over chat completions and over responses."""

import unittest
from typing import Literal

from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from shapes import CITIES, Person
from target import HELLO, KEY, MODEL, URL

TEXT = HELLO[0]["content"]


class CallFirst(AbstractCapability):
    """A call, then text: left to itself a small model does either, for ever."""

    def get_model_settings(self):
        return lambda context: {"tool_choice": ["weather"] if context.run_step <= 1 else "none"}


class Cases:
    """What holds over either of the two endpoints."""

    KIND = None

    def agent(self, key=KEY, name=MODEL, **fields):
        settings = {"temperature": 0, "max_tokens": 96, "timeout": 60, **fields.pop("settings", {})}
        model = self.KIND(name, provider=OpenAIProvider(base_url=URL + "/v1", api_key=key))
        return Agent(model, model_settings=settings, retries=0, **fields)

    async def test_a_stream_joins_to_the_plain_answer(self):
        agent = self.agent(settings={"max_tokens": 24})
        plain = await agent.run(TEXT)
        self.assertTrue(plain.output.strip())
        self.assertGreater(plain.usage.input_tokens, 0)
        self.assertIn(plain.usage.output_tokens, range(1, 25))
        async with agent.run_stream(TEXT) as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
        self.assertGreater(len(pieces), 3)
        self.assertEqual("".join(pieces), plain.output)
        self.assertEqual(stream.usage.output_tokens, plain.usage.output_tokens)

    async def test_a_tool_is_called_and_its_result_goes_back(self):
        asked = []

        def weather(city: Literal[CITIES]) -> str:
            """Today's weather in a city."""
            asked.append(city)
            return "rain, 4 degrees"

        agent = self.agent(tools=[weather], capabilities=[CallFirst()])
        # The list of one tool goes out as "required", which would allow many calls.
        result = await agent.run("Is it raining in Oslo?", model_settings={"parallel_tool_calls": False})
        parts = [part for message in result.all_messages() for part in message.parts]
        (call,) = [part for part in parts if isinstance(part, ToolCallPart)]
        (returned,) = [part for part in parts if isinstance(part, ToolReturnPart)]
        self.assertEqual(returned.tool_call_id, call.tool_call_id)
        self.assertIn(asked, ([city] for city in CITIES))
        self.assertTrue(result.output.strip())
        self.assertEqual((result.usage.requests, result.usage.tool_calls), (2, 1))

    async def test_the_output_is_of_its_type(self):
        for output in (NativeOutput(Person), ToolOutput(Person)):
            with self.subTest(output=type(output).__name__):
                agent = self.agent(output_type=output, settings={"parallel_tool_calls": False})
                result = await agent.run("Invent a person.")
                self.assertIsInstance(result.output, Person)
                async with agent.run_stream("Invent a person.") as stream:
                    self.assertEqual(await stream.get_output(), result.output)

    async def test_faults_arrive_as_the_client_s_own_errors(self):
        for status, agent in (
            (401, self.agent(key="sk_wrong")),
            (404, self.agent(name="no-such-model")),
            (400, self.agent(settings={"temperature": 9})),
        ):
            with self.assertRaises(ModelHTTPError) as caught:
                await agent.run(TEXT)
            self.assertEqual(caught.exception.status_code, status)


class ChatTest(Cases, unittest.IsolatedAsyncioTestCase):
    KIND = OpenAIChatModel

    async def test_the_answer_carries_its_id_and_finish(self):
        result = await self.agent(settings={"max_tokens": 3, "extra_body": {"ignore_eos": True}}).run(TEXT)
        response = result.all_messages()[-1]
        self.assertTrue(response.provider_response_id.startswith("chatcmpl-"))
        self.assertEqual(response.model_name, MODEL)
        self.assertEqual(response.finish_reason, "length")
        self.assertEqual(result.usage.output_tokens, 3)


class ResponsesTest(Cases, unittest.IsolatedAsyncioTestCase):
    KIND = OpenAIResponsesModel

    async def test_a_conversation_goes_on(self):
        agent = self.agent(settings={"max_tokens": 16})
        first = await agent.run(TEXT)
        self.assertTrue(first.all_messages()[-1].provider_response_id.startswith("resp_"))
        second = await agent.run("And goodbye.", message_history=first.all_messages())
        self.assertGreater(second.usage.input_tokens, first.usage.input_tokens)
        self.assertTrue(second.output.strip())
