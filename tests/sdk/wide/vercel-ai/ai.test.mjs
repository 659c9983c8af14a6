// npm ai, Vercel's SDK: @ai-sdk/openai over responses (its default) and over chat, and @ai-sdk/openai-compatible.

import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const url = process.env.SDK_TEST_URL;
const key = process.env.SDK_TEST_KEY;
const name = "tzafon.sm-1";
const text = { prompt: "Say hello to the lighthouse keeper.", temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const rain = { prompt: "Is it raining in Oslo?", temperature: 0, maxOutputTokens: 96, maxRetries: 0 };

const openai = (apiKey) => createOpenAI({ baseURL: `${url}/v1`, apiKey });
const compatible = (apiKey) =>
  createOpenAICompatible({
    name: "lightcone",
    baseURL: `${url}/v1`,
    apiKey,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const kinds = {
  "openai, responses": { model: (id = name, apiKey = key) => openai(apiKey)(id), id: /^resp_/ },
  "openai, chat": { model: (id = name, apiKey = key) => openai(apiKey).chat(id), id: /^chatcmpl-/ },
  "openai-compatible": { model: (id = name, apiKey = key) => compatible(apiKey)(id), id: /^chatcmpl-/ },
};

// Left to call as often as it likes, a small model calls until it is cut.
const once = { openai: { parallelToolCalls: false }, lightcone: { parallel_tool_calls: false } };
const person = z.strictObject({ name: z.string().max(12), age: z.number().int().min(0).max(130) });
const weather = (asked) =>
  tool({
    description: "Today's weather in a city",
    inputSchema: z.strictObject({ city: z.enum(["Bern", "Oslo"]) }),
    execute: async ({ city }) => {
      asked.push(city);
      return `rain in ${city}`;
    },
  });

for (const [kind, { model, id }] of Object.entries(kinds)) {
  test(`a stream joins to the plain answer: ${kind}`, async () => {
    const plain = await generateText({ model: model(), ...text });
    assert.ok(plain.text.trim());
    assert.match(plain.response.id, id);
    assert.equal(plain.response.modelId, name);
    assert.ok(["stop", "length"].includes(plain.finishReason));
    assert.ok(plain.usage.inputTokens > 0);
    assert.ok(plain.usage.outputTokens >= 1 && plain.usage.outputTokens <= 24);
    const stream = streamText({ model: model(), ...text });
    const pieces = await Array.fromAsync(stream.textStream);
    assert.ok(pieces.length > 3);
    assert.equal(pieces.join(""), plain.text);
    assert.equal(await stream.finishReason, plain.finishReason);
    const usage = await stream.usage;
    assert.equal(usage.inputTokens, plain.usage.inputTokens);
    assert.equal(usage.outputTokens, plain.usage.outputTokens);
  });

  test(`a required call is run, streamed or not: ${kind}`, async () => {
    const asked = [];
    const tools = { weather: weather(asked) };
    // A named tool is called once by itself.
    for (const how of [
      { toolChoice: "required", providerOptions: once },
      { toolChoice: { type: "tool", toolName: "weather" } },
    ]) {
      asked.length = 0;
      const plain = await generateText({ model: model(), tools, ...how, ...rain });
      assert.equal(plain.finishReason, "tool-calls");
      const [call, ...more] = plain.toolCalls;
      assert.deepEqual(more, []);
      assert.equal(call.toolName, "weather");
      assert.ok(call.toolCallId && !call.invalid);
      assert.deepEqual(asked, [call.input.city]);
      assert.equal(plain.toolResults[0].output, `rain in ${call.input.city}`);
      const stream = streamText({ model: model(), tools, ...how, ...rain });
      await stream.consumeStream();
      const streamed = await stream.toolCalls;
      assert.deepEqual(
        streamed.map((call) => call.input),
        [call.input],
      );
    }
  });

  test(`results go back and text comes out: ${kind}`, async () => {
    const asked = [];
    const named = { type: "tool", toolName: "weather" };
    const answer = await generateText({
      model: model(),
      tools: { weather: weather(asked) },
      stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? named : "none" }),
      ...rain,
    });
    assert.equal(answer.steps.length, 2);
    assert.equal(asked.length, 1);
    assert.ok(answer.text.trim());
    const total = answer.steps.reduce((sum, step) => sum + step.usage.outputTokens, 0);
    assert.equal(answer.totalUsage.outputTokens, total);
  });

  test(`structured output is of its type, streamed or not: ${kind}`, async () => {
    const asked = { model: model(), output: Output.object({ schema: person }), ...rain, prompt: "Invent a person." };
    const plain = await generateText(asked);
    assert.equal(plain.finishReason, "stop");
    assert.deepEqual(person.parse(plain.output), plain.output);
    const stream = streamText(asked);
    const parts = await Array.fromAsync(stream.partialOutputStream);
    assert.deepEqual(parts.at(-1), plain.output);
  });

  test(`faults arrive as the SDK's own errors: ${kind}`, async () => {
    const fails = (status, fields) =>
      assert.rejects(generateText({ model: model(), ...text, ...fields }), (error) => {
        assert.ok(APICallError.isInstance(error), String(error));
        assert.equal(error.statusCode, status);
        assert.ok(error.message);
        return true;
      });
    await fails(401, { model: model(name, "sk_wrong") });
    await fails(404, { model: model("no-such-model") });
    await fails(400, { temperature: 9 });
  });
}
