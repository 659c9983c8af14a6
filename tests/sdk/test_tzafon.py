"""PyPI tzafon, as its users call it. It adds /v1 itself, so its base URL is the plain one."""

import json
import unittest

import tzafon
from target import HELLO, KEY, MODEL, MODELS, SHORT, URL


def client(key=KEY):
    return tzafon.Lightcone(base_url=URL, api_key=key, max_retries=0, timeout=60)


class TzafonTest(unittest.TestCase):
    def test_a_completion_has_text_and_usage(self):
        with client() as lightcone:
            answer = lightcone.chat.create_completion(model=MODEL, **SHORT)
        self.assertEqual(answer["object"], "chat.completion")
        self.assertTrue(answer["choices"][0]["message"]["content"].strip())
        usage = answer["usage"]
        self.assertEqual(usage["total_tokens"], usage["prompt_tokens"] + usage["completion_tokens"])
        self.assertLessEqual(usage["completion_tokens"], 12)

    def test_the_model_may_be_left_out(self):
        with client() as lightcone:
            self.assertEqual(lightcone.chat.create_completion(**SHORT)["model"], MODEL)

    def test_a_stream_comes_as_one_string_and_says_what_the_plain_answer_says(self):
        with client() as lightcone:
            plain = lightcone.chat.create_completion(model=MODEL, **SHORT)
            stream = lightcone.chat.create_completion(
                model=MODEL, stream=True, stream_options={"include_usage": True}, **SHORT
            )
        self.assertIsInstance(stream, str)
        events = [line[len("data: ") :] for line in stream.splitlines() if line.startswith("data: ")]
        self.assertEqual(events.pop(), "[DONE]")
        chunks = [json.loads(event) for event in events]
        text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        self.assertEqual(text, plain["choices"][0]["message"]["content"])
        self.assertEqual(chunks[-1]["usage"], plain["usage"])
        self.assertEqual(len({chunk["id"] for chunk in chunks}), 1)

    def test_the_model_list_names_every_configured_model(self):
        with client() as lightcone:
            listed = lightcone.models.list()
        self.assertEqual(listed["object"], "list")
        self.assertEqual({model["id"] for model in listed["data"]}, set(MODELS))

    def test_faults_arrive_as_the_client_library_s_own_error_classes(self):
        with client(key="sk_wrong") as lightcone, self.assertRaises(tzafon.AuthenticationError):
            lightcone.chat.create_completion(**SHORT)
        with client() as lightcone:
            with self.assertRaises(tzafon.NotFoundError):
                lightcone.chat.create_completion(model="no-such-model", messages=HELLO)
            with self.assertRaises(tzafon.BadRequestError):
                lightcone.chat.create_completion(model=MODEL, messages=[])


class AsyncTzafonTest(unittest.IsolatedAsyncioTestCase):
    async def test_the_async_client_works_too(self):
        async with tzafon.AsyncLightcone(base_url=URL, api_key=KEY, max_retries=0, timeout=60) as lightcone:
            answer = await lightcone.chat.create_completion(model=MODEL, **SHORT)
            self.assertTrue(answer["choices"][0]["message"]["content"].strip())
