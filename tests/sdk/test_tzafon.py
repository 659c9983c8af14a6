"""PyPI tzafon, as its users call it. It adds /v1 itself, so its base URL is the plain one."""

import json
import unittest

import tzafon
from shapes import CITIES, WEATHER, Person
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


class ToolTest(unittest.TestCase):
    def test_a_required_call_is_answered_and_its_result_read(self):
        messages = [{"role": "user", "content": "Is it raining in Oslo?"}]
        fields = {"model": MODEL, "tools": [WEATHER], "temperature": 0, "max_tokens": 96}
        with client() as lightcone:
            for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
                answer = lightcone.chat.create_completion(
                    messages=messages, tool_choice=choice, parallel_tool_calls=False, **fields
                )
                (choice,) = answer["choices"]
                self.assertEqual(choice["finish_reason"], "tool_calls")
                (call,) = choice["message"]["tool_calls"]
                self.assertIn(json.loads(call["function"]["arguments"])["city"], CITIES)
            result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
            told = [*messages, choice["message"], result]
            after = lightcone.chat.create_completion(messages=told, tool_choice="none", **fields)
        self.assertTrue(after["choices"][0]["message"]["content"].strip())


class FormTest(unittest.TestCase):
    def asked(self, **structured_outputs):
        messages = [{"role": "user", "content": "Invent a person."}]
        with client() as lightcone:
            (choice,) = lightcone.chat.create_completion(
                model=MODEL, messages=messages, temperature=0, max_tokens=96, structured_outputs=structured_outputs
            )["choices"]
        self.assertEqual(choice["finish_reason"], "stop")
        return choice["message"]["content"]

    def test_structured_outputs_of_the_other_family(self):
        self.assertIn(self.asked(choice=["yes", "no"]), ("yes", "no"))
        self.assertRegex(self.asked(regex="[A-F]{3}-[0-9]{2}"), "^[A-F]{3}-[0-9]{2}$")
        Person.model_validate_json(self.asked(json=Person.model_json_schema()))
        self.assertRegex(self.asked(grammar='start: "a" ("b" | "c")~1..4 "!"'), "^a[bc]{1,4}!$")


class DetailTest(unittest.TestCase):
    def test_the_other_family_s_parameters_do_what_they_say(self):
        with client() as c:
            ask = lambda **fields: c.chat.create_completion(model=MODEL, **{**SHORT, **fields})  # noqa: E731
            plain = ask(return_token_ids=True, prompt_logprobs=1)
            choice = plain["choices"][0]
            self.assertEqual(len(choice["token_ids"]), plain["usage"]["completion_tokens"])
            self.assertEqual(len(plain["prompt_token_ids"]), plain["usage"]["prompt_tokens"])
            self.assertEqual(len(plain["prompt_logprobs"]), plain["usage"]["prompt_tokens"])
            self.assertIsNone(plain["prompt_logprobs"][0])
            first = choice["token_ids"][0]
            other = ask(logit_bias={str(first): -100}, return_token_ids=True)["choices"][0]["token_ids"]
            self.assertNotIn(first, other)
            only = ask(allowed_token_ids=[first], return_token_ids=True)["choices"][0]["token_ids"]
            self.assertEqual(set(only), {first})
            stopped = ask(stop_token_ids=[choice["token_ids"][2]])["choices"][0]
            self.assertEqual((stopped["finish_reason"], stopped["stop_reason"]), ("stop", choice["token_ids"][2]))
            word = choice["message"]["content"].split()[0]
            self.assertNotIn(word, ask(bad_words=[word])["choices"][0]["message"]["content"])
            self.assertEqual(ask(min_tokens=12)["usage"]["completion_tokens"], 12)
            self.assertTrue(ask(request_id="my-own.1")["id"].endswith("my-own.1"))
            begun = [*HELLO, {"role": "assistant", "content": "Dear keeper,"}]
            echoed = ask(messages=begun, continue_final_message=True, add_generation_prompt=False, echo=True)
            self.assertTrue(echoed["choices"][0]["message"]["content"].startswith("Dear keeper,"))
            short = ask(truncate_prompt_tokens=5)
            self.assertEqual(short["usage"]["prompt_tokens"], 5)
            named = ask(logprobs=True, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["content"]
            self.assertEqual(named[0]["token"], f"token_id:{first}")


class AsyncTzafonTest(unittest.IsolatedAsyncioTestCase):
    async def test_the_async_client_works_too(self):
        async with tzafon.AsyncLightcone(base_url=URL, api_key=KEY, max_retries=0, timeout=60) as lightcone:
            answer = await lightcone.chat.create_completion(model=MODEL, **SHORT)
            self.assertTrue(answer["choices"][0]["message"]["content"].strip())
