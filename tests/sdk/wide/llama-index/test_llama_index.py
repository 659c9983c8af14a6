"""PyPI llama-index: its OpenAI-like model, and its OpenAI responses model."""

import unittest
from typing import Literal

import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from pydantic import BaseModel, ConfigDict
from shapes import CITIES, Person
from target import HELLO, KEY, MODEL, URL

TEXT = HELLO[0]["content"]
MESSAGES = [ChatMessage(role="user", content=TEXT)]
PLACE = {"api_base": URL + "/v1", "max_retries": 0, "timeout": 60, "temperature": 0, "context_window": 2048}


class Asked(BaseModel):
    # The schema that llama-index makes of a function allows further arguments, and the function does not.
    model_config = ConfigDict(extra="forbid")
    city: Literal[CITIES]


def weather(city: str) -> str:
    """Today's weather in a city."""
    return f"rain in {city}"


class Cases:
    """What holds over either of the two endpoints."""

    def test_a_stream_joins_to_the_plain_answer(self):
        plain = self.model().chat(MESSAGES)
        self.assertTrue(plain.message.content.strip())
        pieces = [piece.delta or "" for piece in self.model().stream_chat(MESSAGES)]
        self.assertGreater(len(pieces), 3)
        self.assertEqual("".join(pieces), plain.message.content)

    def test_a_required_call_is_answered_and_its_result_read(self):
        model = self.model(max_tokens=96)
        tool = FunctionTool.from_defaults(weather, fn_schema=Asked)
        asked = {"user_msg": "Is it raining in Oslo?", "tool_required": True, "allow_parallel_tool_calls": False}
        answer = model.chat_with_tools([tool], **asked)
        (call,) = model.get_tool_calls_from_response(answer)
        self.assertEqual(call.tool_name, "weather")
        self.assertIn(call.tool_kwargs["city"], CITIES)
        *_, last = model.stream_chat_with_tools([tool], **asked)
        (streamed,) = model.get_tool_calls_from_response(last)
        self.assertEqual(streamed.tool_kwargs, call.tool_kwargs)
        said = model.predict_and_call([tool], **asked)
        self.assertIn(said.response, [f"rain in {city}" for city in CITIES])

    def test_structured_output_is_of_its_type(self):
        model = self.model(max_tokens=96)
        self.assertIsInstance(model.structured_predict(Person, PromptTemplate("Invent a person.")), Person)
        answer = model.as_structured_llm(Person).complete("Invent a person.")
        self.assertIsInstance(answer.raw, Person)

    def test_faults_arrive_as_the_client_s_own_errors(self):
        with self.assertRaises(openai.AuthenticationError):
            self.model(api_key="sk_wrong").chat(MESSAGES)
        with self.assertRaises(openai.NotFoundError):
            self.model(model="no-such-model").chat(MESSAGES)
        with self.assertRaises(openai.BadRequestError):
            list(self.model(additional_kwargs={"top_p": 9}).stream_chat(MESSAGES))


class ChatTest(Cases, unittest.TestCase):
    def model(self, **fields):
        fields = {"model": MODEL, "api_key": KEY, "max_tokens": 24, **PLACE, **fields}
        able = {"is_function_calling_model": True, "should_use_structured_outputs": True}
        return OpenAILike(is_chat_model=True, **able, **fields)

    def test_the_answer_carries_its_id_and_usage(self):
        told = self.model(max_tokens=3, additional_kwargs={"extra_body": {"ignore_eos": True}}).chat(MESSAGES)
        self.assertTrue(told.raw.id.startswith("chatcmpl-"))
        self.assertEqual(told.raw.choices[0].finish_reason, "length")
        self.assertEqual(told.additional_kwargs["completion_tokens"], 3)
        self.assertEqual(told.additional_kwargs["total_tokens"], told.additional_kwargs["prompt_tokens"] + 3)

    def test_older_completions_work_too(self):
        model = OpenAILike(model=MODEL, api_key=KEY, max_tokens=8, is_chat_model=False, **PLACE)
        plain = model.complete("Once upon a time")
        self.assertTrue(plain.text.strip())
        self.assertEqual("".join(piece.delta or "" for piece in model.stream_complete("Once upon a time")), plain.text)


class ResponsesTest(Cases, unittest.TestCase):
    def model(self, **fields):
        fields = {"model": MODEL, "api_key": KEY, "max_output_tokens": fields.pop("max_tokens", 24), **PLACE, **fields}
        return OpenAILikeResponses(is_function_calling_model=True, should_use_structured_outputs=True, **fields)

    def test_the_answer_carries_its_id_and_usage(self):
        told = self.model().chat(MESSAGES)
        self.assertTrue(told.raw.id.startswith("resp_"))
        self.assertIn(told.raw.usage.output_tokens, range(1, 25))


class AsyncTest(unittest.IsolatedAsyncioTestCase):
    async def test_the_async_methods_work_too(self):
        model = OpenAILike(model=MODEL, api_key=KEY, max_tokens=24, is_chat_model=True, **PLACE)
        plain = await model.achat(MESSAGES)
        pieces = [piece.delta or "" async for piece in await model.astream_chat(MESSAGES)]
        self.assertEqual("".join(pieces), plain.message.content)
