// npm's openai: chat completions and the Responses API, streamed, with tools, typed answers and activations.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const asked = JSON.parse(process.argv[2]);
const client = new OpenAI({ baseURL: asked.base_url, apiKey: "none", maxRetries: 0 });
const Answer = z.object({ number: z.number().int().min(0).max(99), sure: z.boolean() });
const { model, keep } = asked;
const user = (content) => [{ role: "user", content }];
const weather = { name: "weather", parameters: asked.parameters };

const ask = { model, temperature: 0, max_tokens: 60, ...keep };
const whole = await client.chat.completions.create({ ...ask, messages: user(asked.question) });
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...ask, messages: user(asked.question), stream: true })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
}
const tools = [{ type: "function", function: weather }];
const called = await client.chat.completions.create({
  ...ask, messages: user(asked.question), tools, tool_choice: "required", parallel_tool_calls: false,
});
const parsed = await client.chat.completions.parse({
  ...ask, messages: user(asked.sum), response_format: zodResponseFormat(Answer, "answer"),
});

const other = { model, temperature: 0, max_output_tokens: 60, ...keep };
const response = await client.responses.create({ ...other, input: asked.question });
const stream = client.responses.stream({ ...other, input: asked.question });
let deltas = "";
for await (const event of stream) if (event.type === "response.output_text.delta") deltas += event.delta;
const made = await client.responses.create({
  ...other, input: asked.question, tools: [{ type: "function", ...weather, strict: true }], tool_choice: "required",
  parallel_tool_calls: false,
});
const typed = await client.responses.parse({
  ...other, input: asked.sum, text: { format: zodTextFormat(Answer, "answer") },
});

console.log(JSON.stringify({
  texts: [whole.choices[0].message.content, streamed, response.output_text, deltas, (await stream.finalResponse()).output_text],
  calls: [called.choices[0].message.tool_calls[0].function.arguments, made.output[0].arguments],
  answers: [parsed.choices[0].message.parsed, typed.output_parsed],
  kept: [whole.activations, response.activations].map((kept) => Object.keys(kept.tensors)),
}));
