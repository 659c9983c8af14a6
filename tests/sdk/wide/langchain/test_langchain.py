"""PyPI langchain-openai: ChatOpenAI over chat completions and over responses."""

import unittest

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.output_parsers import PydanticToolsParser
from langchain_openai import ChatOpenAI
from shapes import CITIES, WEATHER, Person
from target import HELLO, KEY, MODEL, URL

TEXT = HELLO[0]["content"]
RAIN = HumanMessage("Is it raining in Oslo?")


def chat(**fields):
    asked = {"model": MODEL, "api_key": KEY, "base_url": URL + "/v1", "max_tokens": 24, "temperature": 0, **fields}
    return ChatOpenAI(max_retries=0, timeout=60, **asked)


class Cases:
    """What holds over either of the two endpoints."""

    FIELDS = {}

    def chat(self, **fields):
        return chat(**{**self.FIELDS, **fields})

    def assert_used(self, message):
        usage = message.usage_metadata
        self.assertGreater(usage["input_tokens"], 0)
        self.assertIn(usage["output_tokens"], range(1, 25))
        self.assertEqual(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])

    def test_a_stream_joins_to_the_plain_answer(self):
        plain = self.chat().invoke(TEXT)
        self.assertTrue(plain.text.strip())
        self.assert_used(plain)
        chunks = list(self.chat(stream_usage=True).stream(TEXT))
        self.assertGreater(len(chunks), 3)
        whole = sum(chunks[1:], chunks[0])
        self.assertEqual(whole.text, plain.text)
        for counted in ("input_tokens", "output_tokens", "total_tokens"):
            self.assertEqual(whole.usage_metadata[counted], plain.usage_metadata[counted])

    def test_a_required_call_is_answered_and_its_result_read(self):
        model = self.chat(max_tokens=96)
        for choice in ("required", "weather"):
            asked = model.bind_tools([WEATHER], tool_choice=choice, parallel_tool_calls=False)
            called = asked.invoke([RAIN])
            (call,) = called.tool_calls
            self.assertEqual(call["name"], "weather")
            self.assertIn(call["args"]["city"], CITIES)
            self.assertIn(call["args"]["days"], range(1, 8))
            self.assertTrue(call["id"])
            chunks = list(asked.stream([RAIN]))
            (streamed,) = sum(chunks[1:], chunks[0]).tool_calls
            self.assertEqual(streamed["args"], call["args"])
        result = ToolMessage("rain, 4 degrees", tool_call_id=call["id"])
        after = self.chat().bind_tools([WEATHER], tool_choice="none").invoke([RAIN, called, result])
        self.assertTrue(after.text.strip())
        self.assertFalse(after.tool_calls)

    def test_structured_output_is_of_its_type(self):
        for method in ("json_schema", "function_calling"):
            with self.subTest(method=method):
                form = self.chat(max_tokens=96).with_structured_output(Person, method=method, include_raw=True)
                answer = form.invoke("Invent a person.")
                self.assertIsNone(answer["parsing_error"])
                self.assertIsInstance(answer["parsed"], Person)

    def test_faults_arrive_as_the_client_s_own_errors(self):
        with self.assertRaises(openai.AuthenticationError):
            self.chat(api_key="sk_wrong").invoke(TEXT)
        with self.assertRaises(openai.NotFoundError) as caught:
            self.chat(model="no-such-model").invoke(TEXT)
        self.assertEqual(caught.exception.code, "model_not_found")
        with self.assertRaises(openai.BadRequestError):
            list(self.chat(temperature=9).stream(TEXT))


class ChatTest(Cases, unittest.TestCase):
    def test_the_answer_carries_its_id_and_finish(self):
        answer = self.chat(max_tokens=3, extra_body={"ignore_eos": True}).invoke(TEXT)
        self.assertTrue(answer.response_metadata["id"].startswith("chatcmpl-"))
        self.assertEqual(answer.response_metadata["model_name"], MODEL)
        self.assertEqual(answer.response_metadata["finish_reason"], "length")
        self.assertEqual(answer.usage_metadata["output_tokens"], 3)

    def test_a_chain_ends_in_the_parsed_type(self):
        model = self.chat(max_tokens=96).bind_tools([Person], tool_choice="Person", strict=True)
        (person,) = (model | PydanticToolsParser(tools=[Person])).invoke("Invent a person.")
        self.assertIsInstance(person, Person)

    def test_logprobs_are_told(self):
        answer = self.chat().bind(logprobs=True, top_logprobs=2).invoke(TEXT)
        told = answer.response_metadata["logprobs"]["content"]
        self.assertEqual("".join(token["token"] for token in told), answer.text)


class ResponsesTest(Cases, unittest.TestCase):
    FIELDS = {"use_responses_api": True}

    def test_the_next_turn_follows_the_last_response(self):
        first = self.chat().invoke(TEXT)
        self.assertTrue(first.response_metadata["id"].startswith("resp_"))
        turns = [HumanMessage(TEXT), first, HumanMessage("And goodbye.")]
        second = self.chat(use_previous_response_id=True).invoke(turns)
        self.assertTrue(second.text.strip())
        self.assertGreater(second.usage_metadata["input_tokens"], first.usage_metadata["input_tokens"])


class AsyncTest(unittest.IsolatedAsyncioTestCase):
    async def test_a_batch_says_what_one_says(self):
        one = await chat().ainvoke(TEXT)
        for answer in await chat().abatch([TEXT] * 8):
            self.assertEqual(answer.text, one.text)
