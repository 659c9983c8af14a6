"""PyPI litellm's own library: completion and responses, with the model as openai/NAME."""

import asyncio
import json
import unittest

import litellm
from shapes import CITIES, WEATHER, Person
from target import HELLO, KEY, MODEL, URL

litellm.suppress_debug_info = True

NAME = "openai/" + MODEL
PLACE = {"api_base": URL + "/v1", "api_key": KEY, "timeout": 60, "num_retries": 0, "max_retries": 0}
ASK = {"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 24, **PLACE}
RAIN = [{"role": "user", "content": "Is it raining in Oslo?"}]
PERSON = [{"role": "user", "content": "Invent a person."}]


class LiteLlmTest(unittest.TestCase):
    def test_a_stream_joins_to_the_plain_answer(self):
        plain = litellm.completion(**ASK)
        self.assertTrue(plain.id.startswith("chatcmpl-"))
        self.assertTrue(plain.choices[0].message.content.strip())
        self.assertIn(plain.choices[0].finish_reason, ("stop", "length"))
        self.assertIn(plain.usage.completion_tokens, range(1, 25))
        self.assertEqual(plain.usage.total_tokens, plain.usage.prompt_tokens + plain.usage.completion_tokens)
        chunks = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **ASK))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.assertEqual(text, plain.choices[0].message.content)
        usage = chunks[-1].usage
        self.assertEqual(usage.prompt_tokens, plain.usage.prompt_tokens)
        self.assertEqual(usage.completion_tokens, plain.usage.completion_tokens)
        whole = litellm.stream_chunk_builder(chunks)
        self.assertEqual(whole.choices[0].message.content, text)
        self.assertEqual(whole.choices[0].finish_reason, plain.choices[0].finish_reason)

    def test_a_call_is_answered_and_its_result_read(self):
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            asked = {**ASK, "messages": RAIN, "max_tokens": 96, "tools": [WEATHER], "tool_choice": choice}
            answer = litellm.completion(parallel_tool_calls=False, **asked).choices[0]
            self.assertEqual(answer.finish_reason, "tool_calls")
            (call,) = answer.message.tool_calls
            self.assertEqual(call.function.name, "weather")
            self.assertIn(json.loads(call.function.arguments)["city"], CITIES)
            chunks = list(litellm.completion(parallel_tool_calls=False, stream=True, **asked))
            (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
            self.assertEqual(streamed.function.arguments, call.function.arguments)
        told = [*RAIN, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        after = litellm.completion(**{**ASK, "messages": told, "tools": [WEATHER], "tool_choice": "none"})
        self.assertTrue(after.choices[0].message.content.strip())

    def test_structured_output_is_of_its_type(self):
        answer = litellm.completion(**{**ASK, "messages": PERSON, "max_tokens": 96}, response_format=Person)
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        Person.model_validate_json(answer.choices[0].message.content)

    def test_older_completions_work_too(self):
        answer = litellm.text_completion(
            model="text-completion-openai/" + MODEL, prompt="Once upon a time", temperature=0, max_tokens=8, **PLACE
        )
        self.assertTrue(answer.choices[0].text.strip())
        self.assertIn(answer.usage.completion_tokens, range(1, 9))

    def test_faults_arrive_as_the_client_s_own_errors(self):
        for error, fields in (
            (litellm.AuthenticationError, {"api_key": "sk_wrong"}),
            (litellm.NotFoundError, {"model": "openai/no-such-model"}),
            (litellm.BadRequestError, {"temperature": 9}),
            (litellm.ContextWindowExceededError, {"messages": [{"role": "user", "content": "lamp " * 20000}]}),
        ):
            with self.subTest(error=error.__name__), self.assertRaises(error):
                litellm.completion(**{**ASK, **fields})


class ResponsesTest(unittest.TestCase):
    ASK = {"model": NAME, "input": HELLO[0]["content"], "temperature": 0, "max_output_tokens": 24, **PLACE}

    def test_a_stream_joins_to_the_plain_response(self):
        plain = litellm.responses(**self.ASK)
        text = plain.output[0].content[0].text
        self.assertTrue(text.strip())
        self.assertIn(plain.usage.output_tokens, range(1, 25))
        events = list(litellm.responses(stream=True, **self.ASK))
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        self.assertEqual("".join(pieces), text)
        self.assertIn(events[-1].type, ("response.completed", "response.incomplete"))

    def test_a_required_call_has_arguments_of_its_schema(self):
        tool = {"type": "function", **WEATHER["function"]}
        asked = {**self.ASK, "input": RAIN[0]["content"], "max_output_tokens": 96}
        answer = litellm.responses(tools=[tool], tool_choice="required", parallel_tool_calls=False, **asked)
        (call,) = [item for item in answer.output if item.type == "function_call"]
        self.assertIn(json.loads(call.arguments)["city"], CITIES)


class AsyncLiteLlmTest(unittest.IsolatedAsyncioTestCase):
    async def test_eight_at_once_say_the_same(self):
        answers = await asyncio.gather(*(litellm.acompletion(**ASK) for _ in range(8)))
        self.assertEqual(len({answer.choices[0].message.content for answer in answers}), 1)
