/** A conversation as text, with what each extractor read marked in the response. */
import type { ComponentChildren } from "preact";
import { useMemo } from "preact/hooks";
import type { Extracted, Message, SampleInfo } from "../api";
import { codeUnits, visible } from "../parts/text";

export function Conversation({ sample, marked }: { sample: SampleInfo; marked: string | null }) {
  const last = sample.messages.reduce((found, message, index) => (message.role === "assistant" && contentOf(message) === sample.response ? index : found), -1);
  return (
    <section class="conversation" aria-label="Conversation">
      {sample.messages.map((message, index) => (
        <article class={`message ${message.role}`}>
          <h2 class="role">{message.role}{message.name ? ` · ${message.name}` : ""}</h2>
          {[message.reasoning_content, message.reasoning].filter(Boolean).slice(0, 1).map((text) => (
            <details class="reasoning" open={(text ?? "").length < 4_000}>
              <summary>Reasoning</summary>
              <Text>{visible(text ?? "")}</Text>
            </details>
          ))}
          {contentOf(message) !== "" && <Text>{index === last ? <Marked text={contentOf(message)} readings={sample.extracted} marked={marked} /> : visible(contentOf(message))}</Text>}
          {(message.tool_calls ?? []).map((call) => (
            <pre class="call" dir="auto"><span class="soft">calls</span> {visible(call.function?.name ?? "?")}({visible(call.function?.arguments ?? "")})</pre>
          ))}
        </article>
      ))}
      {!sample.messages.length && sample.response && <article class="message assistant"><Text>{visible(sample.response)}</Text></article>}
    </section>
  );
}

function Text({ children }: { children: ComponentChildren }) {
  return <pre class="text" dir="auto">{children}</pre>;
}

function contentOf(message: Message): string {
  if (typeof message.content === "string") return message.content;
  if (!Array.isArray(message.content)) return message.content == null ? "" : JSON.stringify(message.content);
  return message.content.map((part: unknown) => (typeof part === "object" && part !== null && "text" in part ? String(part.text) : JSON.stringify(part))).join("\n");
}

function Marked({ text, readings, marked }: { text: string; readings: Extracted[]; marked: string | null }) {
  const pieces = useMemo(() => cut(text, readings), [text, readings]);
  return (
    <>
      {pieces.map(({ part, by }) =>
        by.length ? (
          <mark class={marked !== null && by.includes(marked) ? "on" : ""} title={`read by ${by.join(", ")}`}>
            {visible(part)}
            <span class="hidden"> (read by {by.join(", ")})</span>
          </mark>
        ) : (
          visible(part)
        ),
      )}
    </>
  );
}

/** A text cut where a reading begins or ends; each piece with the extractors that read it. */
export function cut(text: string, readings: Extracted[]): { part: string; by: string[] }[] {
  const found = readings.filter((one): one is Extracted & { start: number; stop: number } => one.start !== null && one.stop !== null && one.stop > one.start);
  const edges = codeUnits(text, found.flatMap(({ start, stop }) => [start, stop]));
  const spans = found.map(({ extractor }, index) => ({ extractor, start: edges[2 * index] ?? 0, stop: edges[2 * index + 1] ?? 0 }));
  const places = [...new Set([0, text.length, ...edges])].sort((a, b) => a - b);
  return places.slice(0, -1).map((from, index) => {
    const to = places[index + 1] ?? text.length;
    return { part: text.slice(from, to), by: spans.filter(({ start, stop }) => start <= from && stop >= to).map(({ extractor }) => extractor) };
  });
}
