// Where citations and checked sentences stand in the text of an answer. Pure functions; nothing is drawn here.

const MARKS = /^(?:\s*\[\d+\])+/;

/** Return the pieces of a text: {text} and {cited: number}, in their order. */
export function pieces(text) {
  return text.split(/(\[\d+\])/).filter(Boolean).map((part) => {
    const mark = /^\[(\d+)\]$/.exec(part);
    return mark ? { cited: Number(mark[1]) } : { text: part };
  });
}

/** Return the end of a sentence that begins at `from`, marks and white space aside, or null if it does not stand there. */
export function endOf(raw, sentence, from) {
  let at = from;
  for (const letter of sentence.replace(/\s+/g, "")) {
    const between = /^(?:\s|\[\d+\])+/.exec(raw.slice(at));
    if (between && !raw.startsWith(letter, at)) at += between[0].length;
    if (!raw.startsWith(letter, at)) return null;
    at += letter.length;
  }
  return at + (MARKS.exec(raw.slice(at))?.[0].length ?? 0);
}

/** Return the parts of a text: {text, supported} for each sentence that was checked so far, then the rest. */
export function parts(raw, sentences) {
  const found = [];
  let from = 0;
  for (const { text, supported } of sentences) {
    const end = endOf(raw, text, from);
    if (end === null) break;
    found.push({ text: raw.slice(from, end), supported });
    from = end;
  }
  return from < raw.length ? [...found, { text: raw.slice(from), supported: null }] : found;
}
