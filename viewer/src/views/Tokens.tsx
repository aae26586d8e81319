/**
 * A rollout's tokens, colored by a value, with a strip of that value along all of them. A click on a token opens its inspector.
 *
 * A rollout may have 200,000 tokens: they come in windows, and only the chunks near what is in view are elements.
 */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Overview, type SampleInfo, type StoredTurn, type Tokens, type Values, get, url } from "../api";
import { useAsked } from "../ask";
import { type Scale, palette, rgba, scaleFor } from "../colors";
import { Strip } from "../charts/Strip";
import { count, short } from "../format";
import { useKeys } from "../keys";
import { type Chunk, chunks } from "../parts/chunks";
import { tokenText, visible } from "../parts/text";
import { Problem, Toggle } from "../parts/ui";
import { change } from "../route";
import { useDark } from "../theme";
import { Inspector } from "./Inspector";

const WINDOW = 20_000;

interface Props {
  detail: Overview;
  sample: SampleInfo;
  rollout: StoredTurn;
  query: URLSearchParams;
}

/** What tokens can be colored by, with the names of a menu. */
export function colorings(rollout: StoredTurn): [of: string, name: string][] {
  const nameOf = (of: string) => of.replace(/^norm:/, "norm of ").replace(/^probe:/, "probe ").replace(/^cosine:([^:]*):/, "cosine at $1 to ").replace(/^logprob$/, "log-probability");
  return rollout.values.map((of) => [of, nameOf(of)]);
}

/** All tokens of a rollout, as they come in. */
function useTokens(place: (string | number)[], turn: number): { tokens: Tokens | null; error: string | null } {
  const [state, setState] = useState<{ tokens: Tokens | null; error: string | null }>({ tokens: null, error: null });
  const key = JSON.stringify([place, turn]);
  useEffect(() => {
    const stop = new AbortController();
    const load = async () => {
      let all: Tokens | null = null;
      for (let start = 0; all === null || start < all.total; start += WINDOW) {
        const part: Tokens = await get<Tokens>(url([...place, "tokens"], { turn, start, stop: start + WINDOW }), stop.signal);
        all = all ? join(all, part) : part;
        if (stop.signal.aborted) return;
        setState({ tokens: all, error: null });
        if (!part.texts.length) return;
      }
    };
    setState({ tokens: null, error: null });
    load().catch((error: Error) => stop.signal.aborted || setState((before) => ({ ...before, error: error.message })));
    return () => stop.abort();
  }, [key]);
  return state;
}

function join(all: Tokens, part: Tokens): Tokens {
  return { ...all, ids: all.ids.concat(part.ids), texts: all.texts.concat(part.texts), special: merge(all.special, part.special), steps: merge(all.steps, part.steps) };
}

function merge(some: number[], more: number[]): number[] {
  return [...new Set([...some, ...more])].sort((a, b) => a - b);
}

export function TokensView({ detail, sample, rollout, query }: Props) {
  const place = ["sources", detail.source.id, "samples", sample.sample_id];
  const { tokens, error } = useTokens(place, rollout.turn);
  const choices = useMemo(() => colorings(rollout), [rollout]);
  const wanted = query.get("color");
  const probes = choices.filter(([of]) => of.startsWith("probe:"));
  // Of several probes the one of a middle layer, where most is read.
  const color = wanted ?? probes[Math.floor(probes.length / 2)]?.[0] ?? choices[0]?.[0] ?? "none";
  const values = useAsked<Values>(color === "none" ? null : url([...place, "values"], { turn: rollout.turn, of: color }));
  const [middle, setMiddle] = useState<"zero" | "median">("zero");
  const [whitespace, setWhitespace] = useState(true);
  const [ids, setIds] = useState(false);
  const diverging = !/^(norm|logprob)/.test(color);
  const scale = useMemo(() => scaleFor(values.data?.values ?? [], color === "logprob" ? "surprise" : diverging ? "signed" : "size", middle), [values.data, color, middle]);
  const selected = query.has("token") ? Number(query.get("token")) : null;
  const total = tokens?.total ?? 0;
  const nPrompt = tokens?.n_prompt ?? 0;
  const pick = (position: number) => change({ token: String(position), show: "tokens" });
  const move = (by: number) => total && pick(Math.max(0, Math.min(total - 1, (selected ?? (by > 0 ? nPrompt - 1 : nPrompt)) + by)));
  useKeys({ "]": () => move(1), "[": () => move(-1), ...(selected !== null ? { Escape: () => change({ token: null, show: "tokens" }) } : {}) });

  return (
    <>
      <section class="tokens" aria-label="Tokens">
        <div class="tokenbar">
          <div class="controls">
            <label class="select">Color
              <select value={color} onChange={(event) => change({ color: event.currentTarget.value, show: "tokens" })}>
                {choices.map(([of, name]) => <option value={of}>{name}</option>)}
                {!choices.some(([of]) => of === color) && color !== "none" && <option value={color}>{color}</option>}
                <option value="none">nothing</option>
              </select>
            </label>
            {diverging && color !== "none" && (
              <label class="select">Middle
                <select value={middle} onChange={(event) => setMiddle(event.currentTarget.value as "zero" | "median")}>
                  <option value="zero">zero</option>
                  <option value="median">median</option>
                </select>
              </label>
            )}
            <Toggle on={whitespace} label="White space" onChange={setWhitespace} />
            <Toggle on={ids} label="Ids" onChange={setIds} />
            {scale && <Legend scale={scale} unit={values.data?.unit ?? null} />}
            <span class="soft end">{tokens ? `${count(nPrompt)} read, ${count(total - nPrompt)} written` : ""}</span>
          </div>
          {tokens && color !== "none" && !values.error && (
            <Strip
              label={choices.find(([of]) => of === color)?.[1] ?? color}
              total={total}
              values={values.data?.values ?? []}
              scale={scale}
              steps={tokens.steps}
              nPrompt={tokens.n_prompt}
              selected={selected}
              textAt={(position) => tokens.texts[position] ?? "…"}
              onPick={pick}
            />
          )}
          {values.error && <p class="soft">{values.error.message}</p>}
        </div>
        {error ? (
          <Problem text={error} />
        ) : !tokens ? (
          <p class="soft wait" role="status">Loading…</p>
        ) : (
          <Flow tokens={tokens} values={color === "none" ? null : (values.data?.values ?? null)} scale={scale} whitespace={whitespace} ids={ids} selected={selected} onPick={pick} sample={sample} />
        )}
      </section>
      {selected !== null && tokens && selected < total && (
        <Inspector detail={detail} place={place} turn={rollout.turn} position={selected} tokens={tokens} map={query.get("map") ?? "norm"} value={values.data?.values[selected] ?? null} of={color} />
      )}
    </>
  );
}

function Legend({ scale, unit }: { scale: Scale; unit: string | null }) {
  const colors = palette(useDark());
  const steps = 9;
  return (
    <span class="scale" role="img" aria-label={`Colors from ${short(scale.low)} to ${short(scale.high)}${unit ? ` (${unit})` : ""}`}>
      <span aria-hidden="true">{short(scale.low)}</span>
      <span class="ramp" aria-hidden="true">
        {Array.from({ length: steps }, (_, step) => (
          <i style={{ background: rgba(scale.low + ((scale.high - scale.low) * step) / (steps - 1), scale, colors) }} />
        ))}
      </span>
      <span aria-hidden="true">{short(scale.high)}{unit ? ` ${unit.replaceAll("_", " ")}` : ""}</span>
    </span>
  );
}

interface FlowProps {
  tokens: Tokens;
  values: (number | null)[] | null;
  scale: Scale | null;
  whitespace: boolean;
  ids: boolean;
  selected: number | null;
  onPick: (position: number) => void;
  sample: SampleInfo;
}

const LINE_PX = 24;
const CHARACTERS = 90;

/** The tokens as running text, in chunks. */
function Flow(props: FlowProps) {
  const { tokens, selected, onPick, sample } = props;
  const element = useRef<HTMLDivElement>(null);
  const cut = useRef<{ texts: string[]; parts: Chunk[] }>({ texts: [], parts: [] });
  // Chunks that are there stay as they are while more tokens come in, but for the last.
  const parts = useMemo(() => {
    const kept = tokens.texts.length > cut.current.texts.length && cut.current.texts[0] === tokens.texts[0] ? cut.current.parts.slice(0, -1) : [];
    cut.current = { texts: tokens.texts, parts: [...kept, ...chunks(tokens.texts, kept.at(-1)?.to ?? 0)] };
    return cut.current.parts;
  }, [tokens.texts]);
  const [near, setNear] = useState<ReadonlySet<number>>(new Set([0, 1]));
  const heights = useRef(new Map<number, number>());

  useEffect(() => {
    const root = element.current;
    if (!root) return;
    const observer = new IntersectionObserver(
      (entries) =>
        setNear((before) => {
          const next = new Set(before);
          for (const entry of entries) {
            const index = Number((entry.target as HTMLElement).dataset["chunk"]);
            if (entry.isIntersecting) next.add(index);
            else {
              heights.current.set(index, entry.boundingClientRect.height);
              next.delete(index);
            }
          }
          return next;
        }),
      { rootMargin: "1200px 0px" },
    );
    for (const part of root.children) observer.observe(part);
    return () => observer.disconnect();
  }, [parts]);

  // A token that is chosen by the keys, the strip or the URL comes into view.
  useEffect(() => {
    if (selected === null) return;
    const index = parts.findIndex(({ from, to }) => selected >= from && selected < to);
    if (index < 0) return;
    setNear((before) => (before.has(index) ? before : new Set([...before, index])));
    requestAnimationFrame(() => {
      const token = element.current?.querySelector(`[data-at="${selected}"]`);
      const box = token?.getBoundingClientRect();
      const bar = document.querySelector(".tokenbar")?.getBoundingClientRect().bottom ?? 0;
      if (token && box && (box.top < bar || box.bottom > innerHeight - 24)) token.scrollIntoView({ block: "center" });
    });
  }, [selected, parts]);

  const roles = useMemo(() => new Map(tokens.segments.map((segment) => [segment.start, segment.role])), [tokens.segments]);
  const read = useMemo(() => readTokens(tokens, sample), [tokens, sample]);
  const special = useMemo(() => new Set(tokens.special), [tokens.special]);
  const ends = useMemo(() => new Set(tokens.steps), [tokens.steps]);
  const pick = (event: Event) => {
    const at = (event.target as HTMLElement).closest<HTMLElement>("[data-at]")?.dataset["at"];
    if (at !== undefined) onPick(Number(at));
  };
  return (
    <div ref={element} class={`flow ${props.ids ? "ids" : ""}`} onClick={pick}>
      {parts.map((part, index) => {
        const drawn = near.has(index);
        const characters = drawn ? 0 : tokens.texts.slice(part.from, part.to).reduce((sum, text) => sum + text.length, 0);
        const height = heights.current.get(index) ?? Math.ceil(characters / CHARACTERS) * LINE_PX;
        return (
          <div key={part.from} data-chunk={index} class="chunk" style={drawn ? { minHeight: "" } : { minHeight: `${height}px` }}>
            {drawn && <Span part={part} {...props} roles={roles} special={special} ends={ends} read={read} />}
          </div>
        );
      })}
    </div>
  );
}

interface SpanProps extends FlowProps {
  part: Chunk;
  roles: Map<number, string>;
  special: Set<number>;
  ends: Set<number>;
  read: Map<number, string[]>;
}

function Span({ part, tokens, values, scale, whitespace, ids, selected, roles, special, ends, read }: SpanProps) {
  const colors = palette(useDark());
  const shown = selected !== null && selected >= part.from && selected < part.to ? selected : null;
  return useMemo(() => {
    const spans = [];
    for (let position = part.from; position < part.to; position++) {
      const [text, value] = [tokens.texts[position] ?? "", values?.[position] ?? null];
      const role = roles.get(position);
      if (role !== undefined) spans.push(<span class="segment" aria-label={`${role}:`}>{role}</span>);
      const by = read.get(position);
      const kind = `t ${special.has(position) ? "special" : ""} ${position >= tokens.n_prompt ? "" : "prompt"} ${ends.has(position) ? "ends" : ""} ${by ? "read" : ""} ${position === shown ? "chosen" : ""}`;
      const about = `${JSON.stringify(text)}  ·  ${position}  ·  id ${tokens.ids[position] ?? "?"}${value === null ? "" : `  ·  ${short(value)}`}${by ? `  ·  read by ${by.join(", ")}` : ""}`;
      spans.push(
        <span class={kind} data-at={position} title={about} style={value !== null && scale ? { backgroundColor: rgba(value, scale, colors) } : {}}>
          {text === "" ? <span class="unseen">∅</span> : special.has(position) ? visible(text) : tokenText(text, whitespace)}
          {ids && <sub>{tokens.ids[position]}</sub>}
        </span>,
      );
    }
    return <>{spans}</>;
  }, [part, tokens, values, scale, whitespace, ids, shown, colors, roles, special, ends, read]);
}

/** Which tokens of the response an extractor read, found by laying the response over what was generated. */
function readTokens(tokens: Tokens, sample: SampleInfo): Map<number, string[]> {
  const found = new Map<number, string[]>();
  const readings = sample.extracted.filter(({ start, stop }) => start !== null && stop !== null);
  if (!readings.length || !sample.response) return found;
  const offsets: number[] = [];
  let text = "";
  for (let position = tokens.n_prompt; position < tokens.texts.length; position++) {
    offsets.push(text.length);
    text += tokens.texts[position] ?? "";
  }
  const begins = text.indexOf(sample.response);
  if (begins < 0) return found;
  // Offsets count code points; strings here count units of UTF-16.
  const units = (points: number) => begins + [...(sample.response ?? "")].slice(0, points).join("").length;
  for (const { extractor, start, stop } of readings) {
    const [from, to] = [units(start ?? 0), units(stop ?? 0)];
    offsets.forEach((offset, index) => {
      const end = offsets[index + 1] ?? text.length;
      if (offset < to && end > from) found.set(tokens.n_prompt + index, [...(found.get(tokens.n_prompt + index) ?? []), extractor]);
    });
  }
  return found;
}
