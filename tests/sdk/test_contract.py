"""The wider contract, through PyPI openai: tools, forms of answers, logprobs, choices, stored answers."""

import json
import unittest
import uuid

import openai
from shapes import WEATHER, Person
from target import HELLO, KEY, MODEL, SHORT, URL


def client():
    return openai.OpenAI(base_url=URL + "/v1", api_key=KEY, max_retries=0, timeout=120)


class ToolTest(unittest.TestCase):
    ASK = {"messages": [{"role": "user", "content": "Is it raining in Oslo?"}], "temperature": 0, "max_tokens": 96}

    def test_a_required_call_has_arguments_of_its_schema_streamed_or_not(self):
        with client() as c:
            for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
                fields = {"model": MODEL, "tools": [WEATHER], "tool_choice": choice}
                # A named function is called exactly once, whatever else is allowed.
                if choice == "required":
                    fields["parallel_tool_calls"] = False
                plain = c.chat.completions.create(**fields, **self.ASK).choices[0]
                self.assertEqual(plain.finish_reason, "tool_calls")
                self.assertIsNone(plain.message.content)
                (call,) = plain.message.tool_calls
                self.assertEqual(call.function.name, "weather")
                arguments = json.loads(call.function.arguments)
                self.assertIn(arguments["city"], ("Bern", "Oslo"))
                self.assertIn(arguments["days"], range(1, 8))
                chunks = list(c.chat.completions.create(stream=True, **fields, **self.ASK))
                deltas = [d for chunk in chunks for d in chunk.choices[0].delta.tool_calls or []]
                self.assertEqual([d.function.name for d in deltas if d.function.name], ["weather"])
                self.assertEqual(sum(d.id is not None for d in deltas), 1)
                joined = "".join(d.function.arguments or "" for d in deltas)
                self.assertEqual(joined, call.function.arguments)
                self.assertEqual(chunks[-1].choices[0].finish_reason, "tool_calls")

    def test_results_are_fed_back_over_many_turns(self):
        messages = list(self.ASK["messages"])
        with client() as c:
            for turn in range(3):
                answer = c.chat.completions.create(
                    model=MODEL, messages=messages, tools=[WEATHER], tool_choice="required",
                    parallel_tool_calls=False, temperature=0, max_tokens=96,
                ).choices[0].message  # fmt: skip
                messages.append(answer.model_dump(exclude_none=True))
                for call in answer.tool_calls:
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": f"rain, turn {turn}"})
            # Only "none" promises text: left free, the model may well call once more.
            last = c.chat.completions.create(
                model=MODEL, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=16
            )
            self.assertIsNone(last.choices[0].message.tool_calls)
            self.assertTrue(last.choices[0].message.content.strip())
            with self.assertRaises(openai.BadRequestError):
                c.chat.completions.create(model=MODEL, messages=messages[:-1] + HELLO, max_tokens=4)

    def test_the_older_functions_are_answered_in_their_own_words(self):
        with client() as c:
            fields = {"functions": [WEATHER["function"]], "function_call": {"name": "weather"}}
            answer = c.chat.completions.create(model=MODEL, **fields, **self.ASK).choices[0]
        self.assertEqual(answer.finish_reason, "function_call")
        self.assertEqual(answer.message.function_call.name, "weather")
        self.assertIn("city", json.loads(answer.message.function_call.arguments))

    def test_auto_and_none_leave_the_model_free(self):
        with client() as c:
            for choice in ("auto", "none"):
                answer = c.chat.completions.create(model=MODEL, tools=[WEATHER], tool_choice=choice, **self.ASK)
                message = answer.choices[0].message
                self.assertTrue(message.content or message.tool_calls)

    def test_the_stream_helper_joins_calls(self):
        with client() as c, c.chat.completions.stream(
            model=MODEL, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **self.ASK
        ) as stream:
            final = stream.get_final_completion()
        call = final.choices[0].message.tool_calls[0]
        self.assertIn(call.function.parsed_arguments["city"], ("Bern", "Oslo"))


class FormTest(unittest.TestCase):
    ASK = {"messages": [{"role": "user", "content": "Invent a person."}], "temperature": 0, "max_tokens": 96}

    def test_parse_gives_the_type(self):
        with client() as c:
            answer = c.chat.completions.parse(model=MODEL, response_format=Person, **self.ASK)
        self.assertIsInstance(answer.choices[0].message.parsed, Person)

    def test_json_mode_is_json(self):
        with client() as c:
            answer = c.chat.completions.create(
                model=MODEL, response_format={"type": "json_object"}, **{**self.ASK, "max_tokens": 200}
            ).choices[0]
        if answer.finish_reason == "stop":
            self.assertIsInstance(json.loads(answer.message.content), dict)
        self.assertTrue(answer.message.content.startswith("{"))

    def test_what_cannot_be_enforced_is_refused_by_its_name(self):
        with client() as c, self.assertRaises(openai.BadRequestError) as caught:
            schema = {"type": "object", "properties": {"a": {"not": {}}}}
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            c.chat.completions.create(model=MODEL, response_format=form, **self.ASK)
        self.assertEqual(caught.exception.code, "invalid_schema")
        self.assertEqual(caught.exception.param, "response_format.json_schema.schema")
        self.assertIn("not", str(caught.exception))


class DetailTest(unittest.TestCase):
    def test_logprobs_join_to_the_text_streamed_or_not(self):
        with client() as c:
            fields = {"model": MODEL, "logprobs": True, "top_logprobs": 3, **SHORT}
            plain = c.chat.completions.create(**fields).choices[0]
            told = plain.logprobs.content
            self.assertEqual(b"".join(bytes(t.bytes) for t in told).decode(), plain.message.content)
            for token in told:
                self.assertEqual(len(token.top_logprobs), 3)
                # Greedy: the likeliest is the one that came.
                self.assertEqual(token.token, token.top_logprobs[0].token)
                self.assertLessEqual(token.logprob, 0)
            streamed = [
                token
                for chunk in c.chat.completions.create(stream=True, **fields)
                for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
            ]
            self.assertEqual(streamed, told)

    def test_choices_are_many_and_billed_together(self):
        with client() as c:
            fields = {"model": MODEL, "messages": HELLO, "n": 3, "temperature": 1, "seed": 5, "max_tokens": 8}
            plain = c.chat.completions.create(extra_body={"ignore_eos": True}, **fields)
            self.assertEqual([choice.index for choice in plain.choices], [0, 1, 2])
            self.assertGreater(len({choice.message.content for choice in plain.choices}), 1)
            self.assertEqual(plain.usage.completion_tokens, 24)
            texts = ["", "", ""]
            for chunk in c.chat.completions.create(stream=True, extra_body={"ignore_eos": True}, **fields):
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            self.assertEqual(texts, [choice.message.content for choice in plain.choices])


class KeptTest(unittest.TestCase):
    def test_a_stored_completion_is_found_and_deleted(self):
        with client() as c:
            answer = c.chat.completions.create(model=MODEL, store=True, metadata={"for": "test"}, **SHORT)
            found = c.chat.completions.retrieve(answer.id)
            self.assertEqual(found.choices[0].message.content, answer.choices[0].message.content)
            self.assertEqual(found.metadata, {"for": "test"})
            self.assertIn(answer.id, [listed.id for listed in c.chat.completions.list()])
            self.assertTrue(c.chat.completions.delete(answer.id).deleted)
            with self.assertRaises(openai.NotFoundError):
                c.chat.completions.retrieve(answer.id)

    def test_an_idempotency_key_gives_the_same_generation(self):
        fields = {"model": MODEL, "messages": HELLO, "temperature": 1, "max_tokens": 12}
        with client() as c:
            for stream in (False, True):
                headers = {"Idempotency-Key": str(uuid.uuid4())}
                ask = lambda **more: c.chat.completions.create(  # noqa: E731
                    extra_headers=headers, stream=stream, **{**fields, **more}
                )
                told = [[x.model_dump() for x in ask()] if stream else ask().model_dump() for _ in range(3)]
                self.assertEqual(told[0], told[1])
                self.assertEqual(told[0], told[2])
                with self.assertRaises(openai.UnprocessableEntityError):
                    ask(max_tokens=13)


class ResponsesTest(unittest.TestCase):
    ASK = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}

    def test_a_response_has_text_and_is_followed_by_another(self):
        with client() as c:
            first = c.responses.create(input="Say hello to the lighthouse keeper.", **self.ASK)
            self.assertTrue(first.output_text.strip())
            self.assertIn(first.status, ("completed", "incomplete"))
            self.assertEqual(c.responses.retrieve(first.id).output_text, first.output_text)
            second = c.responses.create(input="And goodbye.", previous_response_id=first.id, **self.ASK)
            self.assertGreater(second.usage.input_tokens, first.usage.input_tokens + first.usage.output_tokens)
            # Instructions hold for their own request only, what the conversation says of the system for all of it.
            told = [{"role": "system", "content": "You keep a light. " * 8}, {"role": "user", "content": "Hello."}]
            third = c.responses.create(input=told, instructions="Be brief. " * 20, **self.ASK)
            fourth = c.responses.create(input="And?", previous_response_id=third.id, **self.ASK)
            self.assertGreater(fourth.usage.input_tokens, 40)
            self.assertLess(fourth.usage.input_tokens, third.usage.input_tokens + third.usage.output_tokens)
            c.responses.delete(first.id)
            with self.assertRaises(openai.NotFoundError):
                c.responses.retrieve(first.id)
            with self.assertRaises(openai.BadRequestError):
                c.responses.create(input="x", previous_response_id=first.id, **self.ASK)

    def test_a_stream_of_events_joins_to_the_plain_response(self):
        with client() as c:
            plain = c.responses.create(input="Say hello.", **self.ASK)
            events = list(c.responses.create(input="Say hello.", stream=True, **self.ASK))
        self.assertEqual(events[0].type, "response.created")
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        self.assertEqual(text, plain.output_text)
        self.assertIn(events[-1].type, ("response.completed", "response.incomplete"))
        self.assertEqual(events[-1].response.output_text, plain.output_text)
        self.assertEqual(events[-1].response.usage.output_tokens, plain.usage.output_tokens)

    def test_tools_and_forms(self):
        tool = {"type": "function", **WEATHER["function"]}
        with client() as c:
            fields = {**self.ASK, "max_output_tokens": 96, "tools": [tool], "tool_choice": "required"}
            answer = c.responses.create(input="Rain in Oslo?", parallel_tool_calls=False, **fields)
            (call,) = [item for item in answer.output if item.type == "function_call"]
            self.assertIn(json.loads(call.arguments)["city"], ("Bern", "Oslo"))
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
            after = c.responses.create(input=[result], previous_response_id=answer.id, **self.ASK)
            self.assertTrue(after.output_text.strip())
            fields = {**self.ASK, "max_output_tokens": 96}
            parsed = c.responses.parse(input="Invent a person.", text_format=Person, **fields)
            self.assertIsInstance(parsed.output_parsed, Person)


class OlderTest(unittest.TestCase):
    def test_a_completion_continues_its_prompt(self):
        with client() as c:
            fields = {"model": MODEL, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 8, "logprobs": 2}
            plain = c.completions.create(**fields)
            self.assertEqual(plain.object, "text_completion")
            self.assertEqual("".join(plain.choices[0].logprobs.tokens), plain.choices[0].text)
            chunks = list(c.completions.create(stream=True, **fields))
            self.assertEqual("".join(chunk.choices[0].text for chunk in chunks), plain.choices[0].text)
            echoed = c.completions.create(model=MODEL, prompt="Once", echo=True, max_tokens=2, temperature=0)
            self.assertTrue(echoed.choices[0].text.startswith("Once"))
