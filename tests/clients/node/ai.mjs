// npm's ai (the AI SDK) with its provider for any compatible server (chat completions) and its default one (Responses).
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";
import { z } from "zod";

const asked = JSON.parse(process.argv[2]);
const Answer = z.object({ number: z.number().int().min(0).max(99), sure: z.boolean() });
const bodies = [];
const sending = async (url, options) => {
  const body = { ...JSON.parse(options.body), ...asked.keep };
  const reply = await fetch(url, { ...options, body: JSON.stringify(body) });
  if (!reply.headers.get("content-type").startsWith("text/event-stream")) bodies.push(await reply.clone().json());
  return reply;
};
const shared = { baseURL: asked.base_url, apiKey: "none", fetch: sending };
const models = [
  createOpenAICompatible({ ...shared, name: "roentgen", supportsStructuredOutputs: true })(asked.model),
  createOpenAI(shared)(asked.model),
];
const weather = tool({ description: "Look up the weather of a city.", inputSchema: jsonSchema(asked.parameters) });
const found = { texts: [], calls: [], answers: [], histories: [], kept: [] };

for (const model of models) {
  const ask = { model, temperature: 0, maxOutputTokens: 60, maxRetries: 0, prompt: asked.question };
  found.texts.push((await generateText(ask)).text);
  let streamed = "";
  for await (const piece of streamText(ask).textStream) streamed += piece;
  found.texts.push(streamed);
  const called = await generateText({ ...ask, tools: { weather }, toolChoice: "required" });
  found.calls.push(JSON.stringify(called.toolCalls[0].input));
  const typed = { ...ask, prompt: asked.sum, output: Output.object({ schema: Answer }) };
  found.answers.push((await generateText(typed)).output);
  // With a tool on offer in the same turn, as agents ask.
  found.answers.push((await generateText({ ...typed, tools: { weather }, toolChoice: "none" })).output);
  // Two steps: the call that must be made, what it gave, and the words after it.
  let step = 0;
  const done = await generateText({
    ...ask,
    tools: { weather: { ...weather, execute: async ({ city }) => `snow in ${city}` } },
    providerOptions: { openai: { store: false, parallelToolCalls: false } },
    prepareStep: () => ({ toolChoice: step++ ? "none" : { type: "tool", toolName: "weather" } }),
    stopWhen: ({ steps }) => steps.length === 2,
  });
  found.histories.push([done.steps[0].toolResults[0].output, done.text]);
}
found.kept = bodies.map((body) => Object.keys(body.activations.tensors));
console.log(JSON.stringify(found));
