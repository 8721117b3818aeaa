// The `openai` package for Node against a server that test_node.py tells of in the environment.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const { BASE_URL: baseURL, MODEL: model, KEY: apiKey } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { model, messages, temperature: 0, max_tokens: 12 };
const Person = z.object({
  name: z.string().max(20),
  age: z.number().int().min(0).max(150),
  mood: z.enum(["calm", "loud", "odd"]),
});
const weather = {
  type: "function",
  function: {
    name: "weather",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Paris", "Rome"] } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

test("models", async () => {
  const ids = [];
  for await (const found of client.models.list()) ids.push(found.id);
  assert.deepEqual(ids, [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
});

test("completions, whole and streamed", async () => {
  const asked = { model, prompt: "One two", max_tokens: 8, temperature: 0 };
  const whole = await client.completions.create({ ...asked, logprobs: 1, n: 1 });
  assert.equal(whole.choices[0].logprobs.tokens.length, 8);
  let text = "";
  for await (const part of await client.completions.create({ ...asked, stream: true })) {
    text += part.choices[0]?.text ?? "";
  }
  assert.equal(text, whole.choices[0].text);
});

test("chat, whole and streamed", async () => {
  const whole = await client.chat.completions.create(options);
  assert.match(whole.choices[0].message.content, /Paris/);
  let text = "";
  let usage = null;
  const stream = await client.chat.completions.create({
    ...options,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the helper for streams", async () => {
  const stream = client.chat.completions.stream(options);
  const deltas = [];
  stream.on("content", (delta) => deltas.push(delta));
  assert.equal(await stream.finalContent(), deltas.join(""));
});

test("parse", async () => {
  const answer = await client.chat.completions.parse({
    model,
    messages: [{ role: "user", content: "Invent a person." }],
    max_tokens: 300,
    response_format: zodResponseFormat(Person, "person"),
  });
  Person.parse(answer.choices[0].message.parsed);
});

test("tools, whole and streamed", async () => {
  const asked = { ...options, max_tokens: 100, tools: [weather], tool_choice: "required" };
  asked.parallel_tool_calls = false;
  const whole = await client.chat.completions.create(asked);
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(call.function.name, "weather");
  const stream = client.chat.completions.stream(asked);
  const [streamed] = (await stream.finalMessage()).tool_calls;
  assert.deepEqual(JSON.parse(streamed.function.arguments), JSON.parse(call.function.arguments));
});

test("responses, whole, streamed and parsed", async () => {
  const asked = { model, input: messages[0].content, temperature: 0, max_output_tokens: 64 };
  const whole = await client.responses.create(asked);
  let text = "";
  for await (const event of await client.responses.create({ ...asked, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole.output_text);
  const final = await client.responses.stream(asked).finalResponse();
  assert.equal(final.output_text, text);
  const parsed = await client.responses.parse({
    model,
    input: "Invent a person.",
    max_output_tokens: 300,
    text: { format: zodTextFormat(Person, "person") },
  });
  Person.parse(parsed.output_parsed);
});

test("responses with tools", async () => {
  const tools = [{ type: "function", ...weather.function, strict: true }];
  const options = { model, tools, temperature: 0, max_output_tokens: 100 };
  const forced = { ...options, input: messages, tool_choice: "required" };
  forced.parallel_tool_calls = false;
  const whole = await client.responses.create(forced);
  const [call] = whole.output;
  assert.equal(call.name, "weather");
  const [streamed] = (await client.responses.stream(forced).finalResponse()).output;
  assert.deepEqual(JSON.parse(streamed.arguments), JSON.parse(call.arguments));
  const result = { type: "function_call_output", call_id: call.call_id, output: "Sunny." };
  const said = await client.responses.create({ ...options, input: [...messages, call, result] });
  assert.ok(said.output.length > 0);
});

test("errors", async () => {
  const bad = client.chat.completions.create({ ...options, temperature: -1 });
  await assert.rejects(bad, (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    return error.param === "temperature";
  });
  const missing = client.chat.completions.create({ ...options, model: "none" });
  await assert.rejects(missing, OpenAI.NotFoundError);
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

test("an aborted stream ends", async () => {
  const stream = await client.chat.completions.create({
    ...options,
    max_tokens: 3000,
    ignore_eos: true,
    stream: true,
  });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
});
