/** Tokens in chunks that are laid out one below another, so that only those in view need elements. */

export interface Chunk {
  from: number;
  to: number;
}

const USUAL = 400;
const LONGEST = 700;

/** Cut tokens into chunks of some hundred, where a line ends if one does; a chunk begins on a line of its own. */
export function chunks(texts: string[], from = 0): Chunk[] {
  const found: Chunk[] = [];
  let start = from;
  let lineEnd = -1;
  for (let position = from; position < texts.length; position++) {
    if (texts[position]?.includes("\n")) lineEnd = position + 1;
    const size = position + 1 - start;
    if (size < USUAL) continue;
    const wanted = lineEnd > start && (lineEnd === position + 1 || size >= LONGEST) ? lineEnd : size >= LONGEST ? position + 1 : null;
    if (wanted === null) continue;
    found.push({ from: start, to: wanted });
    start = wanted;
  }
  if (start < texts.length) found.push({ from: start, to: texts.length });
  return found;
}
