// npm openai, with the base URL with and without /v1.

import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const url = process.env.SDK_TEST_URL;
const apiKey = process.env.SDK_TEST_KEY;
const model = "tzafon.sm-1";
const messages = [{ role: "user", content: "Say hello to the lighthouse keeper." }];
const short = { model, messages, temperature: 0, max_completion_tokens: 12 };
const client = (baseURL, key = apiKey) => new OpenAI({ baseURL, apiKey: key, maxRetries: 0, timeout: 60_000 });

for (const baseURL of [url, `${url}/v1`]) {
  const where = baseURL.endsWith("/v1") ? "with /v1" : "without /v1";

  test(`a completion has text and usage ${where}`, async () => {
    const answer = await client(baseURL).chat.completions.create(short);
    assert.equal(answer.object, "chat.completion");
    assert.equal(answer.model, model);
    assert.ok(answer.choices[0].message.content.trim());
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
    assert.ok(answer._request_id);
  });

  test(`a stream joins to the plain answer and ends with usage ${where}`, async () => {
    const plain = await client(baseURL).chat.completions.create(short);
    const stream = await client(baseURL).chat.completions.create({
      ...short,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, plain.choices[0].message.content);
    assert.deepEqual(usage, plain.usage);
  });

  test(`models are listed and found by name ${where}`, async () => {
    const ids = [];
    for await (const listed of client(baseURL).models.list()) ids.push(listed.id);
    assert.deepEqual(ids.sort(), ["tzafon.northstar-cua-fast", "tzafon.sm-1"]);
    assert.equal((await client(baseURL).models.retrieve(model)).id, model);
    await assert.rejects(client(baseURL).models.retrieve("no-such-model"), OpenAI.NotFoundError);
  });

  test(`faults arrive as the library's own error classes ${where}`, async () => {
    const ask = (fields, key) => client(baseURL, key).chat.completions.create({ ...short, ...fields });
    await assert.rejects(ask({}, "sk_wrong"), OpenAI.AuthenticationError);
    await assert.rejects(ask({ model: "no-such-model" }), OpenAI.NotFoundError);
    await assert.rejects(ask({ messages: [] }), OpenAI.BadRequestError);
    await assert.rejects(ask({ temperature: 9 }), (error) => error.status === 400 && error.param === "temperature");
  });
}

const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "Today's weather in a city",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Bern", "Oslo"] } },
      required: ["city"],
      additionalProperties: false,
    },
    strict: true,
  },
};
const person = {
  type: "object",
  properties: { name: { type: "string", maxLength: 12 }, age: { type: "integer", minimum: 0, maximum: 130 } },
  required: ["name", "age"],
  additionalProperties: false,
};

test("a required call is run and its result read by the tool helper", async () => {
  const asked = [];
  const run = async ({ city }) => {
    asked.push(city);
    return `rain in ${city}`;
  };
  const runner = client(url).chat.completions.runTools(
    {
      ...short,
      max_completion_tokens: 96,
      messages: [{ role: "user", content: "Is it raining in Oslo?" }],
      tools: [{ ...weather, function: { ...weather.function, function: run, parse: JSON.parse } }],
      tool_choice: { type: "function", function: { name: "weather" } },
      parallel_tool_calls: false,
    },
    { maxChatCompletions: 1 },
  );
  await runner.done();
  const [, called, result] = runner.messages;
  assert.equal(called.tool_calls.length, 1);
  assert.deepEqual(asked, [JSON.parse(called.tool_calls[0].function.arguments).city]);
  assert.ok(["Bern", "Oslo"].includes(asked[0]));
  assert.equal(result.tool_call_id, called.tool_calls[0].id);
  const after = await client(url).chat.completions.create({
    ...short,
    messages: runner.messages,
    tools: [weather],
    tool_choice: "none",
  });
  assert.ok(after.choices[0].message.content.trim());
});

test("parse gives an object of the schema", async () => {
  const answer = await client(url).chat.completions.parse({
    ...short,
    max_completion_tokens: 96,
    messages: [{ role: "user", content: "Invent a person." }],
    response_format: { type: "json_schema", json_schema: { name: "person", schema: person, strict: true } },
  });
  assert.equal(answer.choices[0].finish_reason, "stop");
  const invented = JSON.parse(answer.choices[0].message.content);
  assert.deepEqual(Object.keys(invented).sort(), ["age", "name"]);
  assert.ok(Number.isInteger(invented.age) && invented.age >= 0 && invented.age <= 130);
});

test("a response streams to what the plain one says", async () => {
  const asked = { model, input: messages[0].content, temperature: 0, max_output_tokens: 12 };
  const plain = await client(url).responses.create(asked);
  assert.match(plain.id, /^resp_/);
  assert.ok(plain.output_text.trim());
  let text = "";
  let last;
  for await (last of await client(url).responses.create({ ...asked, stream: true })) {
    if (last.type === "response.output_text.delta") text += last.delta;
  }
  assert.equal(text, plain.output_text);
  assert.ok(["response.completed", "response.incomplete"].includes(last.type));
  assert.deepEqual(last.response.usage, plain.usage);
});

test("the stream helper collects the whole answer", async () => {
  // Its final parsing refuses answers that were cut, so this one is allowed to end by itself or be cut.
  const runner = client(url).chat.completions.stream({ ...short, messages });
  let text = "";
  runner.on("content", (delta) => (text += delta));
  await runner.done().catch((error) => assert.match(error.constructor.name, /LengthFinishReasonError/));
  assert.ok(text.trim());
});

test("a client that goes away in mid-stream leaves the server well", async () => {
  const stream = await client(url).chat.completions.create({
    model,
    messages,
    stream: true,
    max_tokens: 256,
    ignore_eos: true,
  });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta?.content) break;
  }
  stream.controller.abort();
  const answer = await client(url).chat.completions.create(short);
  assert.ok(answer.choices[0].message.content.trim());
});
