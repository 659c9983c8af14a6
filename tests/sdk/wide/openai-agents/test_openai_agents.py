"""PyPI openai-agents: over responses, which is its default, and over chat completions."""

import json
import unittest
from typing import Literal

import openai
from agents import (
    Agent,
    MaxTurnsExceeded,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from agents.items import ToolCallItem, ToolCallOutputItem
from shapes import CITIES, Person
from target import KEY, MODEL, URL

# Over responses an answer that was cut is an error, and this one the model ends by itself.
TEXT = "What is 1+1? Answer with one number."
RAIN = "Is it raining in Oslo?"
TURNS_MAX = 3
QUIET = RunConfig(tracing_disabled=True)


class Cases:
    """What holds over either of the two endpoints."""

    KIND = None

    def agent(self, key=KEY, name=MODEL, settings=None, **fields):
        settings = ModelSettings(**{"temperature": 0, "max_tokens": 96, **(settings or {})})
        client = openai.AsyncOpenAI(base_url=URL + "/v1", api_key=key, max_retries=0, timeout=60)
        self.addAsyncCleanup(client.close)
        model = self.KIND(model=name, openai_client=client)
        return Agent(name="keeper", model=model, model_settings=settings, **fields)

    async def run_agent(self, agent, text):
        return await Runner.run(agent, text, max_turns=TURNS_MAX, run_config=QUIET)

    async def test_a_stream_joins_to_the_plain_answer(self):
        agent = self.agent(settings={"include_usage": True})
        plain = await self.run_agent(agent, TEXT)
        self.assertTrue(plain.final_output.strip())
        usage = plain.context_wrapper.usage
        self.assertEqual(usage.requests, 1)
        self.assertIn(usage.output_tokens, range(1, 97))
        self.assertEqual(usage.total_tokens, usage.input_tokens + usage.output_tokens)
        streamed = Runner.run_streamed(agent, TEXT, run_config=QUIET)
        pieces = []
        async for event in streamed.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                pieces.append(event.data.delta)
        self.assertGreater(len(pieces), 3)
        self.assertEqual("".join(pieces), plain.final_output)
        self.assertEqual(streamed.final_output, plain.final_output)
        self.assertEqual(streamed.context_wrapper.usage.output_tokens, usage.output_tokens)

    async def test_a_tool_is_run_and_its_result_goes_back(self):
        asked = []

        @function_tool
        def weather(city: Literal[CITIES]) -> str:
            """Today's weather in a city."""
            asked.append(city)
            return "rain, 4 degrees"

        fields = {"tools": [weather], "settings": {"tool_choice": "weather", "parallel_tool_calls": False}}
        result = await self.run_agent(self.agent(tool_use_behavior="stop_on_first_tool", **fields), RAIN)
        self.assertEqual(result.final_output, "rain, 4 degrees")
        self.assert_ran(result.new_items, asked)
        asked.clear()
        # After its first call the agent is free, and a small model may call again for as long as it is let.
        try:
            result = await self.run_agent(self.agent(**fields), RAIN)
            self.assertTrue(result.final_output.strip())
            self.assert_ran(result.new_items, asked)
        except MaxTurnsExceeded as limit:
            self.assertEqual(len(limit.run_data.raw_responses), TURNS_MAX)
            self.assert_ran(limit.run_data.new_items, asked)

    def assert_ran(self, items, asked):
        calls = [item.raw_item for item in items if isinstance(item, ToolCallItem)]
        outputs = [item.raw_item for item in items if isinstance(item, ToolCallOutputItem)]
        self.assertTrue(calls)
        self.assertEqual([call.call_id for call in calls], [output["call_id"] for output in outputs])
        self.assertEqual([json.loads(call.arguments)["city"] for call in calls], asked)
        self.assertTrue(set(asked) <= set(CITIES))

    async def test_the_output_is_of_its_type(self):
        result = await self.run_agent(self.agent(output_type=Person), "Invent a person.")
        self.assertIsInstance(result.final_output, Person)

    async def test_faults_arrive_as_the_client_s_own_errors(self):
        for error, agent in (
            (openai.AuthenticationError, self.agent(key="sk_wrong")),
            (openai.NotFoundError, self.agent(name="no-such-model")),
            (openai.BadRequestError, self.agent(settings={"temperature": 9})),
        ):
            with self.assertRaises(error):
                await self.run_agent(agent, TEXT)


class ResponsesTest(Cases, unittest.IsolatedAsyncioTestCase):
    KIND = OpenAIResponsesModel

    async def test_the_next_turn_follows_the_last_response(self):
        agent = self.agent()
        first = await self.run_agent(agent, TEXT)
        self.assertTrue(first.last_response_id.startswith("resp_"))
        second = await Runner.run(agent, TEXT, previous_response_id=first.last_response_id, run_config=QUIET)
        used = first.context_wrapper.usage.total_tokens
        self.assertGreater(second.context_wrapper.usage.input_tokens, used)
        self.assertTrue(second.final_output.strip())

    async def test_the_items_of_one_run_are_the_input_of_the_next(self):
        agent = self.agent()
        first = await self.run_agent(agent, TEXT)
        again = [*first.to_input_list(), {"role": "user", "content": TEXT}]
        self.assertTrue((await self.run_agent(agent, again)).final_output.strip())


class ChatTest(Cases, unittest.IsolatedAsyncioTestCase):
    KIND = OpenAIChatCompletionsModel
