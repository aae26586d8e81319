/**
 * Text from models. It is always set as text, never as markup; each piece is isolated from the direction of what is around it;
 * and characters that would turn, hide or forge text are shown by their code.
 */
import type { ComponentChildren } from "preact";

// Controls but for tab and line feed, marks and embeddings of direction, zero-width characters, tags, private use stays as it is.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

export function code(character: string): string {
  return `U+${(character.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** Pieces of a text: what can be seen, and codes of what cannot. */
export function visible(text: string): ComponentChildren {
  const parts: ComponentChildren[] = [];
  let done = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > done) parts.push(text.slice(done, match.index));
    parts.push(<span class="unseen" title="a character that cannot be seen">{code(match[0])}</span>);
    done = match.index + match[0].length;
  }
  if (!parts.length) return text;
  parts.push(text.slice(done));
  return parts;
}

/** A token as text of one line: line ends, and white space if it is wanted, as signs. */
export function tokenText(text: string, whitespace: boolean): ComponentChildren {
  let shown = text.replaceAll("\r", "␍");
  if (whitespace) shown = shown.replaceAll(" ", "·").replaceAll("\t", "⇥");
  if (whitespace) shown = shown.replaceAll("\n", "↵\n");
  return visible(shown);
}

/** A text in one line. */
export function oneLine(text: string, most = 300): ComponentChildren {
  const cut = text.length > most ? `${text.slice(0, most)}…` : text;
  return visible(cut.replace(/\s+/g, " "));
}

/** Positions of code points, as the server counts them, in a string of UTF-16. */
export function codeUnits(text: string, positions: number[]): number[] {
  const sorted = [...new Set(positions)].sort((a, b) => a - b);
  const found = new Map<number, number>();
  let [points, units, next] = [0, 0, 0];
  for (const character of text) {
    while (next < sorted.length && (sorted[next] ?? 0) <= points) found.set(sorted[next++] ?? 0, units);
    if (next >= sorted.length) break;
    points += 1;
    units += character.length;
  }
  return positions.map((position) => found.get(position) ?? text.length);
}
