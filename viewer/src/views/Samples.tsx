/** All samples of a run or session as a table that scrolls over millions; what is shown is in the hash. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Column, Op, Overview } from "../api";
import { onlyFilter, parameters, parse, RESERVED, spell } from "../filter";
import { cell, count, words } from "../format";
import { useKeys } from "../keys";
import { useRows } from "../parts/rows";
import { oneLine } from "../parts/text";
import { Empty, Problem, Verdict } from "../parts/ui";
import { useVirtual } from "../parts/virtual";
import { change, go, hash } from "../route";

const ROW = 30;
const HEAD = 32;

/** Columns that are shown unless the hash says which. */
const USUAL = ["sample_id", "epoch", "variant", "verdict", "gold", "answer", "question", "completion_tokens", "finish_reason", "seconds"];

const WIDTHS: Record<string, string> = {
  sample_id: "minmax(9.5rem,1.1fr)",
  problem: "minmax(9rem,1fr)",
  question: "minmax(12rem,3fr)",
  verdict: "7.2rem",
  gold: "minmax(5rem,.8fr)",
  answer: "minmax(5rem,.8fr)",
  error: "minmax(12rem,2fr)",
};

const NAMES: Record<string, string> = {
  sample_id: "sample",
  completion_tokens: "tokens",
  prompt_tokens: "prompt tokens",
  finish_reason: "finish",
};

export function nameOf(column: string): string {
  return NAMES[column] ?? words(column.replace(/^labels\./, "").replace(/^score\./, "score: "));
}

export function usual(detail: Overview): string[] {
  const there = new Map(detail.columns.map((column) => [column.name, column]));
  const shown = USUAL.filter((name) => there.has(name));
  const labels = detail.source.kind === "session" ? [...there.keys()].filter((name) => name.startsWith("labels.")).slice(0, 6) : [];
  const scores = [...there.keys()].filter((name) => name.startsWith("score.")).slice(0, 2);
  const { epochs } = (detail.config?.["problems"] ?? {}) as { epochs?: number };
  const varies: Record<string, boolean> = { variant: (there.get("variant")?.values?.length ?? 0) > 1, epoch: (epochs ?? 1) > 1 };
  return [...shown.filter((name) => varies[name] !== false), ...labels, ...scores];
}

export function SamplesView({ kind, detail, query, again = 0 }: { kind: string; detail: Overview; query: URLSearchParams; again?: number }) {
  const { source, columns } = detail;
  const rows = useRows(source.id, parameters(query, columns), again);
  const shown = useMemo(() => {
    const wanted = query.get("cols")?.split(",").filter((name) => columns.some((column) => column.name === name));
    return wanted?.length ? wanted : usual(detail);
  }, [query.get("cols"), detail]);
  const virtual = useVirtual(rows.matched ?? 0, ROW, HEAD);
  const at = Number(query.get("at") ?? -1);
  const sort = query.get("sort") ?? "";

  useEffect(() => rows.show(virtual.from, virtual.to), [virtual.from, virtual.to, rows.matched]);
  const target = (id: string) => hash([kind, source.id, "sample", id], onlyFilter(query));
  const move = (by: number) => {
    const next = Math.max(0, Math.min((rows.matched ?? 1) - 1, at + by));
    virtual.scrollTo(next);
    change({ at: String(next) });
  };
  useKeys({
    j: () => move(1),
    k: () => move(-1),
    Enter: () => {
      const id = rows.row(at)?.["sample_id"];
      if (typeof id === "string") go(target(id));
    },
  });
  // Another filter or order begins at its top.
  const question = JSON.stringify(parameters(query, columns));
  const asked = useRef(question);
  useEffect(() => {
    if (asked.current === question) return;
    asked.current = question;
    virtual.toTop();
  }, [question]);
  // A reader who comes back finds the row where it was.
  const settled = useRef(false);
  useEffect(() => {
    if (settled.current || !rows.matched) return;
    settled.current = true;
    if (at >= 0) virtual.scrollTo(at);
  }, [rows.matched]);

  // A click anywhere in a row opens it, unless it ends a selection of text.
  const open = (event: MouseEvent, number: number, id: unknown) => {
    if ((event.target as HTMLElement).closest("a") || !getSelection()?.isCollapsed || typeof id !== "string") return;
    change({ at: String(number) });
    go(target(id));
  };
  const types = new Map(columns.map((column) => [column.name, column.type]));
  const numeric = (name: string) => types.get(name) === "number";
  const template = shown.map((name) => WIDTHS[name] ?? (name.startsWith("score.") ? "minmax(8rem,.6fr)" : numeric(name) ? "6.2rem" : "minmax(6rem,1fr)")).join(" ");
  const narrowest = shown.reduce((sum, name) => sum + (name === "question" || name === "error" ? 192 : numeric(name) ? 99 : 130), 0);

  return (
    <div class="samples">
      <h1 class="hidden">Samples of {source.name}</h1>
      <Filters columns={columns} query={query} shown={shown} matched={rows.matched} total={rows.total} loading={rows.loading} />
      {rows.error && <Problem text={rows.error} />}
      <div
        class="grid"
        ref={virtual.element}
        role="table"
        tabIndex={0}
        aria-label="Samples"
        aria-rowcount={(rows.matched ?? 0) + 1}
        aria-colcount={shown.length}
        aria-busy={rows.loading}
      >
        <div class="sheet" style={{ height: `${virtual.height + HEAD}px`, minWidth: `${narrowest}px` }}>
          <div class="gridhead" role="row" aria-rowindex={1} style={{ gridTemplateColumns: template, height: `${HEAD}px` }}>
            {shown.map((name) => {
              const order = sort === name ? "ascending" : sort === `-${name}` ? "descending" : "none";
              return (
                <span role="columnheader" title={name} aria-sort={order} class={numeric(name) ? "n" : ""}>
                  <button type="button" onClick={() => change({ sort: order === "none" ? name : order === "ascending" ? `-${name}` : null, at: null })}>
                    {nameOf(name)}
                    <span aria-hidden="true">{order === "ascending" ? " ↑" : order === "descending" ? " ↓" : ""}</span>
                  </button>
                </span>
              );
            })}
          </div>
          <div class="window" role="rowgroup" style={{ transform: `translateY(${virtual.offset}px)` }}>
            {Array.from({ length: Math.max(0, virtual.to - virtual.from) }, (_, index) => {
              const number = virtual.from + index;
              const row = rows.row(number);
              const id = row?.["sample_id"];
              return (
                <div key={number} role="row" aria-rowindex={number + 2} class={`row ${number === at ? "at" : ""}`} onClick={(event) => open(event, number, id)} style={{ gridTemplateColumns: template, height: `${ROW}px` }}>
                  {shown.map((name) => {
                    const value = row?.[name];
                    const text = value === undefined && !row ? "" : cell(value);
                    return (
                      <span role="cell" class={numeric(name) ? "n" : ""} title={typeof value === "string" ? value.slice(0, 1000) : undefined}>
                        {name === "sample_id" && typeof id === "string" ? (
                          <a href={target(id)} onClick={() => change({ at: String(number) })}>{oneLine(id)}</a>
                        ) : name === "verdict" && row ? (
                          <Verdict verdict={typeof value === "string" ? value : null} />
                        ) : (
                          <bdi>{oneLine(text)}</bdi>
                        )}
                      </span>
                    );
                  })}
                </div>
              );
            })}
          </div>
        </div>
      </div>
      {rows.matched === 0 && !rows.loading && <Empty>No sample matches. <button type="button" onClick={() => go(hash([kind, source.id, "samples"]))}>Take the filter away</button></Empty>}
    </div>
  );
}

interface FiltersProps {
  columns: Column[];
  query: URLSearchParams;
  shown: string[];
  matched: number | null;
  total: number | null;
  loading: boolean;
}

const TYPING_MS = 200;

function Filters({ columns, query, shown, matched, total, loading }: FiltersProps) {
  const verdicts = inOrder(columns.find((column) => column.name === "verdict")?.values ?? []);
  const chosen = query.getAll("verdict");
  const [text, setText] = useState(query.get("q") ?? "");
  const timer = useRef<ReturnType<typeof setTimeout>>(undefined);
  useEffect(() => setText(query.get("q") ?? ""), [query.get("q")]);
  const search = (value: string) => {
    setText(value);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => change({ q: value || null, at: null }), TYPING_MS);
  };
  const others = [...query].filter(([name, value]) => !RESERVED.has(name) && !(name === "verdict" && verdicts.includes(value)));
  const drop = (name: string, value: string) => change({ [name]: query.getAll(name).filter((other) => other !== value), at: null });
  return (
    <div class="controls" role="search">
      <input type="search" placeholder="Search texts" aria-label="Search texts" value={text} onInput={(event) => search(event.currentTarget.value)} />
      {verdicts.length > 0 && (
        <div class="choice" role="group" aria-label="Verdict">
          {verdicts.map((verdict) => (
            <button
              type="button"
              aria-pressed={chosen.includes(verdict)}
              onClick={() => change({ verdict: chosen.includes(verdict) ? chosen.filter((other) => other !== verdict) : [...chosen, verdict], at: null })}
            >
              {words(verdict)}
            </button>
          ))}
        </div>
      )}
      {others.map(([name, value]) => {
        const [op, rest] = parse(value);
        return (
          <span class="chip">
            {nameOf(name)} {rest === "" ? (op === "!=" ? "is there" : "is missing") : `${op === "=" ? "" : `${op} `}${rest}`}
            <button type="button" aria-label={`Remove the filter on ${nameOf(name)}`} onClick={() => drop(name, value)}>×</button>
          </span>
        );
      })}
      <AddFilter columns={columns} query={query} />
      <Columns columns={columns} shown={shown} />
      <span class="soft end" role="status">
        {matched === null ? (loading ? "Loading…" : "") : matched === total ? `${count(total)} samples` : `${count(matched)} of ${count(total)} samples`}
      </span>
    </div>
  );
}

/** Verdicts from good to bad, others after them. */
export function inOrder(verdicts: string[]): string[] {
  const order = ["correct", "wrong", "no_answer", "failed"];
  return [...verdicts].sort((a, b) => (order.indexOf(a) + 1 || 9) - (order.indexOf(b) + 1 || 9));
}

const OPS: Record<Column["type"], Op[]> = {
  number: [">=", "<=", "=", "!=", ">", "<"],
  text: ["contains", "=", "!="],
  category: ["=", "!="],
  bool: ["=", "!="],
};

function AddFilter({ columns, query }: { columns: Column[]; query: URLSearchParams }) {
  const [open, setOpen] = useState(false);
  const [name, setName] = useState(columns.find((column) => column.type === "number")?.name ?? columns[0]?.name ?? "");
  const column = columns.find((one) => one.name === name);
  const ops = OPS[column?.type ?? "text"];
  const [op, setOp] = useState<Op>(ops[0] ?? "=");
  const [value, setValue] = useState("");
  const chosen = ops.includes(op) ? op : (ops[0] ?? "=");
  const options = column?.type === "bool" ? ["true", "false"] : (column?.values ?? null);
  const submit = (event: Event) => {
    event.preventDefault();
    change({ [name]: [...query.getAll(name), spell(chosen, value || (options?.[0] ?? ""))], at: null });
    setOpen(false);
    setValue("");
  };
  return (
    <details class="menu" open={open} onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>+ Filter</summary>
      <form onSubmit={submit}>
        <label>Column
          <select value={name} onChange={(event) => setName(event.currentTarget.value)}>
            {columns.map((one) => <option value={one.name}>{nameOf(one.name)}</option>)}
          </select>
        </label>
        <label>Is
          <select value={chosen} onChange={(event) => setOp(event.currentTarget.value as Op)}>
            {ops.map((one) => <option value={one}>{one === "=" ? "equal to" : one === "!=" ? "not" : one}</option>)}
          </select>
        </label>
        <label>Value
          {options ? (
            <select value={value || options[0]} onChange={(event) => setValue(event.currentTarget.value)}>
              {options.map((one) => <option value={one}>{words(one)}</option>)}
            </select>
          ) : (
            <input value={value} inputMode={column?.type === "number" ? "decimal" : "text"} placeholder="empty: missing" onInput={(event) => setValue(event.currentTarget.value)} />
          )}
        </label>
        <button type="submit" class="primary">Add</button>
      </form>
    </details>
  );
}

function Columns({ columns, shown }: { columns: Column[]; shown: string[] }) {
  const toggle = (name: string, on: boolean) => change({ cols: (on ? [...shown, name] : shown.filter((other) => other !== name)).join(",") || null });
  return (
    <details class="menu">
      <summary>Columns</summary>
      <div class="checks">
        {columns.map(({ name }) => (
          <label>
            <input type="checkbox" checked={shown.includes(name)} onChange={(event) => toggle(name, event.currentTarget.checked)} />
            {nameOf(name)}
          </label>
        ))}
      </div>
    </details>
  );
}
