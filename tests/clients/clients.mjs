// Asks a server as users of these packages do, and prints what each client made of the answers as one line of JSON.
//
//   node clients.mjs openai|ai-sdk plain|stream|tools|structured|vision|error http://127.0.0.1:8188/v1 [picture.png]

import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";

const [client, task, baseURL, picture] = process.argv.slice(2);
const model = "tiny";
const question = "25加16等于几？";
const messages = [{ role: "user", content: question }];
const weather = { name: "get_weather", description: "the weather of a city" };
const base64 = picture ? readFileSync(picture).toString("base64") : "";

const openai = new OpenAI({ baseURL, apiKey: "EMPTY", maxRetries: 0 });
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const openaiTools = [{ type: "function", function: { ...weather, parameters } }];

// What a stream of OpenAI's client adds up to.
async function streamed(request) {
  const stream = openai.chat.completions.stream({ model, messages, stream_options: { include_usage: true }, ...request });
  let text = "";
  stream.on("content", (piece) => (text += piece));
  const completion = await stream.finalChatCompletion();
  return { ...summary(completion), pieces: text };
}

function summary(completion) {
  const { message, finish_reason } = completion.choices[0];
  const calls = (message.tool_calls ?? []).map((call) => ({
    id: call.id,
    name: call.function.name,
    arguments: JSON.parse(call.function.arguments),
  }));
  return { text: message.content, finish: finish_reason, calls, tokens: completion.usage.completion_tokens };
}

// Small enough that a model which has learnt nothing reaches its end.
const sum = { type: "object", additionalProperties: false, required: ["sum", "unit"],
  properties: { sum: { type: "integer", minimum: 0, maximum: 99 }, unit: { type: "string", enum: ["cm", "kg"] } } };

const openaiTasks = {
  plain: async () => summary(await openai.chat.completions.create({ model, messages, max_tokens: 8 })),
  stream: () => streamed({ max_tokens: 8 }),
  tools: async () => ({
    whole: summary(await openai.chat.completions.create({ model, messages, tools: openaiTools })),
    stream: await streamed({ tools: openaiTools }),
  }),
  structured: async () => {
    const response_format = { type: "json_schema", json_schema: { name: "sum", strict: true, schema: sum } };
    const whole = await openai.chat.completions.create({ model, messages, response_format, max_tokens: 64 });
    const stream = await streamed({ response_format, max_tokens: 64 });
    return { whole: JSON.parse(summary(whole).text), stream: JSON.parse(stream.text) };
  },
  vision: async () => {
    const image = { type: "image_url", image_url: { url: `data:image/png;base64,${base64}` } };
    const asked = [{ role: "user", content: [image, { type: "text", text: question }] }];
    return summary(await openai.chat.completions.create({ model, messages: asked, max_tokens: 8 }));
  },
  error: async () => {
    try {
      await openai.chat.completions.create({ model, messages, temprature: 1 });
      return { status: 200 };
    } catch (error) {
      return { status: error.status, message: error.message, param: error.param };
    }
  },
};

const provider = createOpenAICompatible({ name: "erniekit", baseURL, apiKey: "EMPTY", includeUsage: true });
const aiTools = { get_weather: tool({ description: weather.description, inputSchema: z.object({ city: z.string() }) }) };
const asked = { model: provider(model), maxRetries: 0 };

function aiSummary({ text, finishReason, toolCalls, usage }) {
  const calls = toolCalls.map((call) => ({ id: call.toolCallId, name: call.toolName, arguments: call.input }));
  return { text, finish: finishReason, calls, tokens: usage.outputTokens };
}

async function aiStreamed(request) {
  let failure;
  const result = streamText({ ...asked, prompt: question, onError: ({ error }) => (failure = error), ...request });
  let pieces = "";
  for await (const piece of result.textStream) pieces += piece;
  if (failure) throw failure;
  const [text, finishReason, toolCalls, usage] = await Promise.all([
    result.text,
    result.finishReason,
    result.toolCalls,
    result.usage,
  ]);
  return { ...aiSummary({ text, finishReason, toolCalls, usage }), pieces };
}

const aiTasks = {
  plain: async () => aiSummary(await generateText({ ...asked, prompt: question, maxOutputTokens: 8 })),
  stream: () => aiStreamed({ maxOutputTokens: 8 }),
  tools: async () => ({
    whole: aiSummary(await generateText({ ...asked, prompt: question, tools: aiTools })),
    stream: await aiStreamed({ tools: aiTools }),
  }),
  structured: async () => {
    const schema = z.object({ sum: z.int().min(0).max(99), unit: z.enum(["cm", "kg"]) });
    const structured = createOpenAICompatible({ name: "erniekit", baseURL, supportsStructuredOutputs: true });
    const found = await generateObject({ ...asked, model: structured(model), prompt: question, schema, maxOutputTokens: 64 });
    return { whole: found.object };
  },
  vision: async () => {
    const content = [
      { type: "file", data: base64, mediaType: "image/png" },
      { type: "text", text: question },
    ];
    return aiSummary(await generateText({ ...asked, messages: [{ role: "user", content }], maxOutputTokens: 8 }));
  },
  error: async () => {
    try {
      await generateText({ ...asked, model: provider("other"), prompt: question });
      return { status: 200 };
    } catch (error) {
      return { status: error.statusCode, message: error.message };
    }
  },
};

const found = await (client === "openai" ? openaiTasks : aiTasks)[task]();
console.log(JSON.stringify(found));
