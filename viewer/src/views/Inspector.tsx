/** One token: layers × hook points, by norm, by probes, by the cosine to a direction, or by what the logit lens reads. */
import { useMemo } from "preact/hooks";
import { type Overview, type Grid, type Tokens, url } from "../api";
import { useAsked } from "../ask";
import { Heat } from "../charts/Heat";
import { type Scale, scaleFor } from "../colors";
import { count, short } from "../format";
import { tokenText } from "../parts/text";
import { Problem } from "../parts/ui";
import { change } from "../route";

interface Props {
  detail: Overview;
  place: string[];
  turn: number;
  position: number;
  tokens: Tokens;
  /** What the map shows. */
  map: string;
  value: number | null;
  /** What the tokens are colored by, which `value` is of. */
  of: string;
}

/** Of the token that the lens reads. */
const PROBABILITY: Scale = { kind: "sequential", low: 0, middle: 0, high: 1 };

export function Inspector({ detail, place, turn, position, tokens, map, value, of }: Props) {
  const asked = useAsked<Grid>(url([...place, "token", position], { turn, of: map }));
  const choices: [string, string][] = [
    ["norm", "norm"],
    ["probe", "probe scores"],
    ...(detail.directions ?? []).map((name): [string, string] => [`cosine:${name}`, `cosine to ${name}`]),
    ["lens", "logit lens"],
  ];
  const data = asked.data;
  // The last layer is on top, as the stream runs upward in drawings of transformers.
  const turned = useMemo(() => {
    if (!data || data.missing) return null;
    const order = data.layers.map((_, index) => index).reverse();
    return {
      rows: order.map((index) => (data.layers[index] == null ? "model" : String(data.layers[index]))),
      values: order.map((index) => data.values[index] ?? []),
      texts: data.texts ? order.map((index) => data.texts?.[index] ?? []) : null,
    };
  }, [data]);
  const scale = useMemo<Scale | null>(
    () => (map === "lens" ? PROBABILITY : scaleFor((turned?.values ?? []).flat(), map === "norm" ? "size" : "signed", "zero")),
    [turned, map],
  );
  return (
    <aside class="inspector card" aria-label="Token">
      <header>
        <h2>
          <span class="t big" dir="auto">{tokenText((tokens.texts[position] ?? "").replaceAll("\n", "↵"), true)}</span>
          <span class="soft"> token {count(position)} of {count(tokens.total)}, id {tokens.ids[position] ?? "?"}</span>
        </h2>
        <button type="button" class="icon" aria-label="Close" title="Close (Esc)" onClick={() => change({ token: null, show: "tokens" })}>×</button>
      </header>
      <p class="soft">
        {position < tokens.n_prompt ? "read" : "written"}
        {value !== null && <> · {of.replace(/^\w+:/, "")} <b>{short(value)}</b></>}
      </p>
      <label class="select">Layers by
        <select value={map} onChange={(event) => change({ map: event.currentTarget.value === "norm" ? null : event.currentTarget.value })}>
          {choices.map(([name, text]) => <option value={name}>{text}</option>)}
          {!choices.some(([name]) => name === map) && <option value={map}>{map}</option>}
        </select>
      </label>
      {asked.error ? (
        <Problem text={asked.error.message} />
      ) : data?.missing ? (
        <p class="soft">{data.missing}</p>
      ) : turned && data ? (
        <Heat rows={turned.rows} columns={data.hook_points} rowName="layer" values={turned.values} texts={turned.texts} scale={scale} size={turned.rows.length > 40 ? 14 : 22} />
      ) : (
        <p class="soft wait" role="status">Loading…</p>
      )}
    </aside>
  );
}
