"""PyPI instructor: objects out of tool calls, JSON schemas and responses."""

import json
import unittest

import instructor
import openai
from instructor.core.exceptions import InstructorRetryException
from shapes import Person
from target import HELLO, KEY, MODEL, URL

PERSON = [{"role": "user", "content": "Invent a person."}]
ASK = {"model": MODEL, "messages": PERSON, "temperature": 0, "max_tokens": 96, "max_retries": 0}
TOOLS, SCHEMA, RESPONSES = instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS


def client(mode=TOOLS, key=KEY, kind=openai.OpenAI):
    return instructor.from_openai(kind(base_url=URL + "/v1", api_key=key, max_retries=0, timeout=60), mode=mode)


class InstructorTest(unittest.TestCase):
    def test_an_object_is_what_the_answer_says(self):
        for mode in (TOOLS, SCHEMA):
            with self.subTest(mode=mode):
                person, answer = client(mode).create_with_completion(response_model=Person, **ASK)
                self.assertIsInstance(person, Person)
                self.assertTrue(answer.id.startswith("chatcmpl-"))
                self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
                self.assertIn(answer.usage.completion_tokens, range(1, 97))
                message = answer.choices[0].message
                said = message.tool_calls[0].function.arguments if mode == TOOLS else message.content
                self.assertEqual(json.loads(said), person.model_dump())

    def test_an_object_comes_out_of_a_response(self):
        fields = {key: value for key, value in ASK.items() if key != "max_tokens"}
        person, answer = client(RESPONSES).create_with_completion(
            response_model=Person, max_output_tokens=96, **fields
        )
        self.assertIsInstance(person, Person)
        self.assertTrue(answer.id.startswith("resp_"))
        self.assertGreater(answer.usage.output_tokens, 0)

    def test_a_partial_object_grows_into_a_whole_one(self):
        for mode in (TOOLS, SCHEMA):
            with self.subTest(mode=mode):
                parts = [part.model_dump() for part in client(mode).create_partial(response_model=Person, **ASK)]
                self.assertGreater(len(parts), 1)
                self.assertIn(None, parts[0].values())
                Person.model_validate(parts[-1])

    def test_plain_text_passes_through(self):
        answer = client().create(response_model=None, **{**ASK, "messages": HELLO, "max_tokens": 12})
        self.assertTrue(answer.choices[0].message.content.strip())

    def test_faults_arrive_with_their_cause(self):
        for fields, kind, cause in (
            ({}, client(key="sk_wrong"), openai.AuthenticationError),
            ({"model": "no-such-model"}, client(), openai.NotFoundError),
            ({"temperature": 9}, client(), openai.BadRequestError),
        ):
            with self.subTest(cause=cause), self.assertRaises((InstructorRetryException, cause)) as caught:
                kind.create(response_model=Person, **{**ASK, **fields})
            self.assertTrue(isinstance(caught.exception, cause) or cause.__name__ in repr(caught.exception.__cause__))


class AsyncInstructorTest(unittest.IsolatedAsyncioTestCase):
    async def test_the_async_client_works_too(self):
        self.assertIsInstance(await client(kind=openai.AsyncOpenAI).create(response_model=Person, **ASK), Person)
