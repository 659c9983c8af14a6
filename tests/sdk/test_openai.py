"""PyPI openai, with the base URL with and without /v1."""

import asyncio
import time
import unittest

import openai
from target import ADMIN_KEY, BASE_URLS, HELLO, KEY, MODEL, MODELS, SHORT, URL


def client(base_url=URL, key=KEY):
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=60)


class OpenAiTest(unittest.TestCase):
    def each_client(self):
        for base_url in BASE_URLS:
            with self.subTest(base_url=base_url), client(base_url) as openai_client:
                yield openai_client

    def test_a_completion_is_parsed_into_the_library_s_types(self):
        for openai_client in self.each_client():
            answer = openai_client.chat.completions.create(model=MODEL, **SHORT)
            self.assertTrue(answer.id.startswith("chatcmpl-"))
            self.assertEqual(answer.model, MODEL)
            self.assertTrue(answer.choices[0].message.content.strip())
            self.assertIn(answer.choices[0].finish_reason, ("stop", "length"))
            self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
            self.assertTrue(answer._request_id)

    def test_a_stream_joins_to_the_plain_answer_and_ends_with_usage(self):
        for openai_client in self.each_client():
            plain = openai_client.chat.completions.create(model=MODEL, **SHORT)
            chunks = list(
                openai_client.chat.completions.create(
                    model=MODEL, stream=True, stream_options={"include_usage": True}, **SHORT
                )
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            self.assertEqual(text, plain.choices[0].message.content)
            self.assertEqual(chunks[0].choices[0].delta.role, "assistant")
            self.assertEqual(chunks[-1].choices, [])
            self.assertEqual(chunks[-1].usage, plain.usage)
            self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))
            finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
            self.assertEqual(finishes[-1], plain.choices[0].finish_reason)
            self.assertTrue(all(finish is None for finish in finishes[:-1]))

    def test_a_stream_without_usage_has_none(self):
        with client() as openai_client:
            chunks = list(openai_client.chat.completions.create(model=MODEL, stream=True, **SHORT))
            self.assertTrue(all(chunk.usage is None for chunk in chunks))
            self.assertTrue(all(chunk.choices for chunk in chunks))

    def test_a_seed_repeats_its_text(self):
        with client() as openai_client:
            texts = {
                openai_client.chat.completions.create(
                    model=MODEL, messages=HELLO, temperature=1, seed=7, max_tokens=12
                ).choices[0].message.content
                for _ in range(2)
            }
            self.assertEqual(len(texts), 1)

    def test_max_tokens_of_the_older_clients_is_obeyed(self):
        with client() as openai_client:
            answer = openai_client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=3, extra_body={"ignore_eos": True}
            )
            self.assertEqual(answer.usage.completion_tokens, 3)
            self.assertEqual(answer.choices[0].finish_reason, "length")

    def test_a_stop_string_never_shows(self):
        with client() as openai_client:
            plain = openai_client.chat.completions.create(model=MODEL, **SHORT).choices[0].message.content
            stop = plain[2:6]
            stopped = openai_client.chat.completions.create(model=MODEL, stop=[stop], **SHORT).choices[0]
            self.assertEqual(stopped.message.content, plain[: plain.index(stop)])
            self.assertEqual(stopped.finish_reason, "stop")

    def test_content_may_come_as_text_parts(self):
        parts = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
        with client() as openai_client:
            plain = openai_client.chat.completions.create(model=MODEL, **SHORT)
            same = openai_client.chat.completions.create(model=MODEL, **{**SHORT, "messages": parts})
            self.assertEqual(same.choices[0].message.content, plain.choices[0].message.content)

    def test_models_are_listed_and_found_by_name(self):
        for openai_client in self.each_client():
            self.assertEqual({model.id for model in openai_client.models.list()}, set(MODELS))
            self.assertEqual(openai_client.models.retrieve(MODEL).id, MODEL)
            with self.assertRaises(openai.NotFoundError):
                openai_client.models.retrieve("no-such-model")

    def test_faults_arrive_as_the_client_library_s_own_error_classes(self):
        for base_url in BASE_URLS:
            with client(base_url, key="sk_wrong") as openai_client:
                with self.assertRaises(openai.AuthenticationError) as caught:
                    openai_client.chat.completions.create(model=MODEL, **SHORT)
                self.assertEqual(caught.exception.code, "invalid_api_key")
            with client(base_url) as openai_client:
                with self.assertRaises(openai.NotFoundError) as caught:
                    openai_client.chat.completions.create(model="no-such-model", messages=HELLO)
                self.assertEqual(caught.exception.code, "model_not_found")
                with self.assertRaises(openai.BadRequestError) as caught:
                    openai_client.chat.completions.create(model=MODEL, messages=[])
                self.assertEqual(caught.exception.param, "messages")
                with self.assertRaises(openai.BadRequestError) as caught:
                    openai_client.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
                self.assertEqual(caught.exception.param, "temperature")


@unittest.skipUnless(hasattr(openai.OpenAI, "admin"), "this major has no administration")
class AdministrationTest(unittest.TestCase):
    def test_usage_and_costs_are_parsed_into_the_library_s_types(self):
        for base_url in BASE_URLS:
            with self.subTest(base_url=base_url), client(base_url) as asker:
                asker.chat.completions.create(model=MODEL, **SHORT)
                operator = openai.OpenAI(base_url=base_url, admin_api_key=ADMIN_KEY, max_retries=0, timeout=60)
                with operator:
                    # A day more, should the night fall meanwhile.
                    asked = {"start_time": int(time.time()) - 86400, "group_by": ["project_id", "model"]}
                    usage = operator.admin.organization.usage.completions(models=[MODEL], **asked)
                    costs = operator.admin.organization.usage.costs(
                        start_time=asked["start_time"], group_by=["project_id", "line_item"]
                    )
                used = [result for bucket in usage.data for result in bucket.results]
                self.assertTrue(used)
                for result in used:
                    self.assertEqual(result.object, "organization.usage.completions.result")
                    self.assertEqual((result.project_id, result.model), ("ten_development", MODEL))
                    self.assertGreater(result.num_model_requests, 0)
                paid = [result for bucket in costs.data for result in bucket.results if result.line_item == MODEL]
                self.assertGreater(sum(result.amount.value for result in paid), 0)
                self.assertEqual({result.amount.currency for result in paid}, {"usd"})
                self.assertFalse(usage.has_more or costs.has_more)


class AsyncOpenAiTest(unittest.IsolatedAsyncioTestCase):
    async def test_thirty_two_streams_run_interleaved_and_say_the_same(self):
        order = []

        async def one(number, openai_client):
            text, stream = "", await openai_client.chat.completions.create(model=MODEL, stream=True, **SHORT)
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
                    order.append(number)
            return text

        async with openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=120) as openai_client:
            texts = await asyncio.gather(*(one(number, openai_client) for number in range(32)))
        self.assertEqual(len(set(texts)), 1)
        self.assertTrue(texts[0].strip())
        changes = sum(before != after for before, after in zip(order, order[1:]))
        self.assertGreater(changes, 32, "the streams came one after the other")
