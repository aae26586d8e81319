/**
 * A filter over samples, as it stands in the page's hash and as the server takes it.
 *
 * In the hash a column is a parameter: `verdict=wrong&verdict=no_answer` is either of the two, `completion_tokens=>=100` a bound,
 * `answer=~12` a part of a text, `error=!=` what is not missing. A value that itself begins with such a sign follows a `=`.
 */
import type { Cell, Clause, Column, Op, Row } from "./api";

/** Parameters of the hash that are no columns. */
export const RESERVED = new Set(["q", "sort", "cols", "turn", "token", "color", "show", "map", "at"]);

const SIGNS: [string, Op][] = [
  ["!=", "!="],
  ["<=", "<="],
  [">=", ">="],
  ["<", "<"],
  [">", ">"],
  ["~", "contains"],
  ["=", "="],
];

/** Take a value apart: its operator, and the rest as text. */
export function parse(text: string): [Op, string] {
  for (const [sign, op] of SIGNS) if (text.startsWith(sign)) return [op, text.slice(sign.length)];
  return ["=", text];
}

/** Spell an operator and a value as they stand in the hash. */
export function spell(op: Op, value: string): string {
  if (op === "=" && value !== "" && parse(value)[0] === "=" && !value.startsWith("=")) return value;
  const sign = SIGNS.find(([, name]) => name === op)?.[0] ?? "=";
  return sign + value;
}

function typed(text: string, type: Column["type"] | undefined): Cell {
  if (text === "") return null;
  if (type === "number") return Number.isFinite(Number(text)) ? Number(text) : text;
  if (type === "bool") return text === "true";
  return text;
}

/** The clauses of a hash's parameters, in the order of the columns in it. */
export function clauses(query: URLSearchParams, columns: Column[]): Clause[] {
  const found: Clause[] = [];
  for (const name of new Set(query.keys())) {
    if (RESERVED.has(name)) continue;
    const type = columns.find((column) => column.name === name)?.type;
    const parsed = query.getAll(name).map(parse);
    const equal = parsed.filter(([op]) => op === "=").map(([, text]) => typed(text, type));
    if (equal.length === 1) found.push([name, "=", equal[0] ?? null]);
    else if (equal.length) found.push([name, "in", equal]);
    for (const [op, text] of parsed) if (op !== "=") found.push([name, op, typed(text, type)]);
  }
  return found;
}

/** The parameters of `samples` that a hash stands for. */
export function parameters(query: URLSearchParams, columns: Column[]): Record<string, string | null> {
  const where = clauses(query, columns);
  return { q: query.get("q"), sort: query.get("sort"), where: where.length ? JSON.stringify(where) : null };
}

/** The part of a hash's parameters that says which samples, and in which order. */
export function onlyFilter(query: URLSearchParams): URLSearchParams {
  const kept = new URLSearchParams();
  for (const [name, value] of query) if (!RESERVED.has(name) || name === "q" || name === "sort") kept.append(name, value);
  return kept;
}

/** Whether a row is meant, for pages in a file; the server does the same in SQL. */
export function matches(row: Row, where: Clause[], q: string | null): boolean {
  if (q) {
    const wanted = q.toLowerCase();
    if (!Object.values(row).some((cell) => typeof cell === "string" && cell.toLowerCase().includes(wanted))) return false;
  }
  return where.every(([name, op, value]) => {
    const cell = row[name] ?? null;
    if (op === "in") return Array.isArray(value) && value.includes(cell);
    if (op === "=") return cell === value;
    if (op === "!=") return cell !== value;
    if (cell === null || value === null || Array.isArray(value)) return false;
    if (op === "contains") return String(cell).toLowerCase().includes(String(value).toLowerCase());
    if (op === "<") return cell < value;
    if (op === "<=") return cell <= value;
    if (op === ">") return cell > value;
    return cell >= value;
  });
}

/** Compare two rows by `column` or `-column`; what is missing comes last either way. */
export function byColumn(sort: string): (a: Row, b: Row) => number {
  const descending = sort.startsWith("-");
  const name = descending ? sort.slice(1) : sort;
  return (a, b) => {
    const [left, right] = [a[name] ?? null, b[name] ?? null];
    if (left === null || right === null) return Number(left === null) - Number(right === null);
    const order = typeof left === "string" && typeof right === "string" ? left.localeCompare(right) : Number(left) - Number(right);
    return descending ? -order : order;
  };
}
