r"""Finds the answer in a model's output, however it is marked; the default extractor for numbers.

A text passes through four steps:

    after_reasoning       text in `<think>` is not an answer; a text that never leaves it has none
    before_next_problem   text after a new problem, or after the end of the turn, is ignored
    marks                 `Final Answer: 18`, `#### 18`, `\boxed{18}`, `<answer>18</answer>`, `Answer: 18`, `the answer is 18`
    the block of a mark   its quantity (`quantities.read_content`), or the one that the block corrects it to

If there are several marks, the strongest kind counts: one that says `final`; then a line, tag or box made for the answer;
then a sentence that mentions it. Among marks of a kind the first counts, unless the text between two of them corrects the
first. A text without any mark is read only if it is, or concludes with, one quantity. A text with two possible readings has
none.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from eval_jobs.exact_numbers import NOTHING, UNCLEAR, Quantity, Unread
from eval_jobs.plain_text import normalize
from eval_jobs.quantities import begins_like_heading, conclusion, read_content

MARKS_UP_TO = 16
"""Maximum marks of a kind that are examined. The first counts, so a text that repeats them endlessly stays cheap."""

PLACES_UP_TO = 1_000
"""Maximum candidates examined for each form of mark."""

BLOCK_UP_TO = 2_000
"""Characters of a block that are searched for corrections."""

_FINAL, _MADE_FOR_IT, _MENTIONED = 0, 1, 2

_REASONING_ENDS = re.compile(
    r"</(?:think|thinking|thought|thoughts|reasoning|reason|scratchpad|reflection)>|\[/THINK\]|◁/think▷"
    r"|<\|(?:end_of_thought|end_of_reasoning|/think)\|>|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
_REASONING_BEGINS = re.compile(
    r"<(?:think|thinking|thought|thoughts|reasoning|reason|scratchpad|reflection)>|\[THINK\]|◁think▷"
    r"|<\|(?:begin_of_thought|begin_of_reasoning|think)\|>|<\|channel\|>analysis<\|message\|>",
    re.IGNORECASE,
)
_TURN_BEGINS = re.compile(
    r"\s*(?:<s>|<\|?(?:im_start|start_header_id|start|begin_of_text|assistant|start_of_role)\|?>|<start_of_turn>|assistant\b:?"
    r"|model\b(?=\n)|<\|?(?:end_header_id|message)\|?>)+\s*",
    re.IGNORECASE,
)
_TURN_ENDS = re.compile(
    r"</s>|<\|[a-z_]+\|>|<(?:end|start)_of_turn>|<eos>|\[/?INST\]|<<SYS>>|<｜[^｜\n]{1,40}｜>|<\|[^|\n]{1,40}\|>",
    re.IGNORECASE,
)
_NEXT_PROBLEM = re.compile(
    r"^[ \t>#*_\-=\[(]{0,24}"
    r"(?:(?:(?:new|next|another|second|third|follow-?up|similar|related|bonus|extra|practice"
    r"|here(?:'s| is) (?:another|a new|the next))"
    r"[^\S\n]+){0,3}(?:question|problem|exercise|example|puzzle|task|instruction|instructions|input|prompt|query|user|human|student|q)"
    r"(?:[^\S\n]*(?:no\.?|number|\#)?[^\S\n]*\d{1,4})?[*_\]\s)]*(?::|\.(?=\s)|$|(?<=\d)\)|(?=\n))"
    r"|(?:let's|let us|now)[^\S\n]+(?:try|do|solve|consider|look at|move on to)[^\S\n]+"
    r"(?:another|a new|a different|the next|one more)\b"
    r"|you are an?[^\S\n]+(?:ai|helpful|assistant)"
    r"|(?:frage|pregunta|problema|pytanie|вопрос|задача|问题|問題|题目|문제|السؤال|سؤال|प्रश्न)[^\S\n]*\d{0,3}[*_]*[^\S\n]*:)",
    re.IGNORECASE | re.MULTILINE,
)
_PROBLEM_IN_LINE = re.compile(
    r"(?<=[\w.!?)*>$}%\]])[^\S\n]+(?:#+[^\S\n]*|\*\*)?(?:Question|Problem|Exercise|Human|User|Q)[^\S\n]?\d{0,3}:"
)
_QUESTION_PARAGRAPH = re.compile(
    r"\n[^\S\n]*\n(?![^\n]*\b(?:wait|actually|sorry|check|mistake)\b)"
    r"(?=[^\n]{0,600}\b(?:how (?:many|much|long|far|old|tall|often)"
    r"|what (?:is|are|was|will|would|fraction|percent))\b[^\n?]{0,300}\?)",
    re.IGNORECASE,
)
_MARKED = re.compile(r"####+[^\S\n]*[*$]*\d|boxed|<answer|\banswers?\b[^\w\n]*(?:is\b|:|=)|答案", re.IGNORECASE)
_ANSWERED = re.compile(
    r"=|####|\\boxed|\banswers?\b|\b(?:so|therefore|thus|hence)\b|<answer|答|\bans\b|\bantwort|\brespuesta|\br[ée]ponse",
    re.IGNORECASE,
)

_WORD = re.compile(
    r"\b(?:answers?|ans|antwort|respuesta|réponse|reponse|resposta|risposta|antwoord|odpowiedź|cevap|ответ|відповідь)\b"
    r"|(?:最终答案|答案|答え|回答|答|정답|답|الجواب|الإجابة|उत्तर)",
    re.IGNORECASE,
)
_SIGN = re.compile(
    r"(?P<about>[^\S\n]*(?:\([^()\n]{0,60}\)|\[[^\]\n]{0,60}\]|(?:to|for|in|as|of|here|that|we|you|i)\b[^\n:=.?!0-9]{0,60}?)?)"
    r"(?P<close>[*_`\"'~)\]|}]*)[^\S\n]*[|]?[^\S\n]*"
    r"(?:(?P<colon>:+|=+>?|->|→|⇒|—|–|-(?=\s))"
    r"|(?P<is>(?:is|was|are|equals|(?:would|should|will|must)[^\S\n]+be|comes[^\S\n]+(?:out[^\S\n]+)?to|ist|es|est|è|é|是|为|為|は)"
    r"(?![a-z])(?:[^\S\n]+(?:therefore|thus|then|also|simply|just|indeed|now))?[^\S\n]*:?))",
    re.IGNORECASE,
)
_LABEL_PREFIX = re.compile(
    r"[\s*_#>`\"'.\-=|(\[{,]*(?:(?:so|thus|hence|therefore|and|the|my|your|our|correct|short|numerical|numeric|exact|complete|full"
    r"|in conclusion|conclusion|solution|step \d+)[\s,:*_]*)*[*_`\"'(\[]*",
    re.IGNORECASE,
)
_FINAL_BEFORE = re.compile(r"\bfinal(?:[\s*_-]+(?:numerical|numeric|correct))?[\s*_-]*$|最终$|最終$", re.IGNORECASE)
_NOT_THE_ANSWER = re.compile(
    r"(?:\b(?:not|no|wrong|incorrect|partial|intermediate|previous|earlier|sub|example|sample|possible|another|any|an|his|her|their|"
    r"first|initial|multiple|check|verify|checking|unique|student's|old|model|this)|n't)[\s*_\-]*(?:the[\s*_]*)?$",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[^\S\n]*[*_`:#.\]|]*[^\S\n]*(?=\n|$)")
_NUMBERED = re.compile(r"[^\S\n]*\(?\d{1,3}\)?[^\S\n]*[*_]*[^\S\n]*[:)]|[^\S\n]+(?:to|for)[^\n:]{0,40}\d[^\n:]{0,40}:")
_BULLET = re.compile(r"^\s*[-*+•][^\S\n]+(?=\S)")
_HASHES = re.compile(r"####+[^\S\n]*")
_BOX = re.compile(r"(?:\\|\x08|(?<![A-Za-z]))(?:boxed|fbox)[^\S\n]*(?:\{|(?=[-+]?\d))|\x08oxed\{")
_TAG = re.compile(r"<(?:final_?|final )?answer>", re.IGNORECASE)
_TAG_END = re.compile(r"</(?:final_?|final )?answer>", re.IGNORECASE)

_SENTENCE_END = re.compile(r"[.!?。)\]}*$\"'`]\s*$")
_SUMS_UP = re.compile(r"\b(?:in total|altogether|in all|overall)\b", re.IGNORECASE)
_UNFINISHED = re.compile(r",\s+(?!so\b|or\b|and\b)[^\W\d][^,]*$", re.IGNORECASE)

_CORRECTS = re.compile(
    r"(?:^|[\n.?!,;:(—–…-])[^\S\n]*[*_]*(?:(?:oh|but|hmm+|um|ah|no)[,.]?[^\S\n]+)*"
    r"(?P<cue>wait\b(?=\s*[,.!:;—–-]|\s*$|\s*\n|\s+(?:no|actually|that|i|it|the answer|let)\b)"
    r"|actually\b|correction\b|corrected\b|sorry\b|apologies\b|my (?:mistake|bad)\b|oops\b|hold on\b|hmm+\b|scratch that\b"
    r"|rather\b(?! than)|i mean(?:t)?\b|edit:|no\b(?=[\s]*(?:[,.!;:—–-]|$|\d|\$|it\b|that\b|the\b|wait\b))"
    r"|(?:this|that|which|it)(?:'s| is| was) (?:wrong|incorrect|not right|not correct|a mistake)"
    r"|i (?:made|see) (?:a|an|my) (?:mistake|error)|let me (?:fix|correct (?:that|it|this|my)|start over|try again)"
    r"|there(?:'s| is| was) (?:a|an) (?:mistake|error)|mistake\b|incorrect\b)",
    re.IGNORECASE,
)
_RECHECKS = re.compile(r"\b(?:let me (?:re|double)|re-?check|recalculat|re-?comput|double[- ]check)", re.IGNORECASE)
_CONFIRMS = re.compile(r"\b(?:yes|correct|right|good|matches|confirmed|checks out|consistent|fine)\b", re.IGNORECASE)
_TAKES_BACK = re.compile(r"\b(?:no|wrong|incorrect|mistake|error|not right|scratch that|oops)\b", re.IGNORECASE)


@dataclass(frozen=True)
class _Mark:
    """A mark: a place where an answer is given."""

    kind: int
    """Rank of the kind; 0 is the strongest."""
    start: int
    """Start of the content."""
    stop: int | None = None
    """End of the content, for a box or a tag; None if it extends to the end of the line."""
    tentative: bool = False
    """True if a content without a quantity means that this is not a mark."""


def read_answer(text: str) -> str | None:
    """Read a text's answer as a canonical number or quantity; None if it has none or more than one."""
    text = before_next_problem(after_reasoning(normalize(text)))
    marks = sorted(_marks(text), key=lambda mark: mark.start)
    for kind in (_FINAL, _MADE_FOR_IT, _MENTIONED):
        found = _first_that_stands(text, [mark for mark in marks if mark.kind == kind][:MARKS_UP_TO], marks)
        if found is not NOTHING:
            return found.text if isinstance(found, Quantity) else None
    if not marks or all(mark.tentative for mark in marks):
        found = _implied(text)
    else:
        found = _implied_after(text, max(marks, key=lambda mark: mark.start))
    return found.text if isinstance(found, Quantity) else None


def after_reasoning(text: str) -> str:
    """Return the text after the model's reasoning; empty if the reasoning does not end."""
    ends = list(_REASONING_ENDS.finditer(text))
    if ends:
        text = text[ends[-1].end() :]
    opening = _REASONING_BEGINS.search(text)
    return text[: opening.start()] if opening else text


def before_next_problem(text: str) -> str:
    """Return the text before the end of the turn and before a problem that the model poses itself.

    A problem repeated before anything is answered is not a new one.
    """
    opening = _TURN_BEGINS.match(text)
    text = text[opening.end() :] if opening else text
    for ended in _TURN_ENDS.finditer(text):
        if text[: ended.start()].strip():
            text = text[: ended.start()]
            break
    checked, answered = 0, False
    for posed in _NEXT_PROBLEM.finditer(text):
        answered = answered or _is_answered(text, checked, posed.start())
        if answered:
            text = text[: posed.start()]
            break
        checked = posed.end()
    if (marked := _MARKED.search(text)) is not None:
        for pattern in (_PROBLEM_IN_LINE, _QUESTION_PARAGRAPH):
            if (unannounced := pattern.search(text, marked.end())) is not None:
                text = text[: unannounced.start()]
    return text


def _is_answered(text: str, start: int, stop: int) -> bool:
    if _ANSWERED.search(text, start, stop):
        return True
    before = text[start:stop].rstrip()
    return isinstance(read_content(before[before.rfind("\n") + 1 :], lead_only=True), Quantity)


def _marks(text: str) -> Iterator[_Mark]:
    """Yield the marks of a text."""
    for match in islice(_TAG.finditer(text), PLACES_UP_TO):
        end = _TAG_END.search(text, match.end(), match.end() + 2_000)
        yield _Mark(_MADE_FOR_IT, match.end(), end.start() if end else None)
    closing = _closing_braces(text) if _BOX.search(text) else {}
    for match in islice(_BOX.finditer(text), PLACES_UP_TO):
        if not match[0].endswith("{"):
            yield _Mark(_MADE_FOR_IT, match.end(), _end_of_line(text, match.end()))
        else:  # a box that is never closed was cut
            yield _Mark(_MADE_FOR_IT, match.end(), closing.get(match.end() - 1, match.end()))
    for match in islice(_HASHES.finditer(text), PLACES_UP_TO):
        if not begins_like_heading(text[match.end() : match.end() + 40]):
            yield _Mark(_MADE_FOR_IT, match.end(), tentative=True)
    for match in islice(_WORD.finditer(text), PLACES_UP_TO):
        mark = _labeled_mark(text, match)
        if mark is not None:
            yield mark


def _labeled_mark(text: str, word: re.Match[str]) -> _Mark | None:
    """Return the mark made by the word `answer`, if any."""
    begin = max(text.rfind("\n", 0, word.start()) + 1, word.start() - 80)
    before = text[begin : word.start()]
    if _NOT_THE_ANSWER.search(before) or text[word.start() - 1 : word.start()] in ("/", "<"):
        return None
    whole_line = begin == 0 or text[begin - 1] == "\n"
    final = bool(_FINAL_BEFORE.search(before)) or word[0] == "最终答案"
    prefix = _FINAL_BEFORE.sub("", before)
    at_line_start = whole_line and bool(_LABEL_PREFIX.fullmatch(prefix))
    if _NUMBERED.match(text, word.end()):
        return None
    sign = _SIGN.match(text, word.end())
    if sign and sign["colon"]:
        return _Mark(_FINAL if final else _MADE_FOR_IT if at_line_start else _MENTIONED, sign.end())
    if sign:
        return _Mark(_FINAL if final else _MENTIONED, sign.end(), tentative=True)
    heading = _HEADING.match(text, word.end())
    if heading and at_line_start:
        return _Mark(_FINAL if final else _MADE_FOR_IT, heading.end())
    line = text[word.end() : min(_end_of_line(text, word.end()), word.end() + 60)]
    if (
        at_line_start
        and re.match(r"[^\S\n]*[*_`]*[^\S\n]*[$\d]", line)
        and not re.match(r"[^\S\n]*\d+[^\S\n]*[:).]", line)
    ):
        return _Mark(_FINAL if final else _MADE_FOR_IT, word.end(), tentative=True)
    return None


def _first_that_stands(text: str, of_kind: list[_Mark], marks: list[_Mark]) -> Quantity | Unread:
    """Read the first mark of a kind that has content, or the mark of any kind that the text corrects it to."""
    starts = [mark.start for mark in marks]

    def read(mark: _Mark) -> Quantity | Unread:
        place = bisect_right(starts, mark.start)
        return _read_mark(text, mark, starts[place] if place < len(starts) else len(text))

    found: Quantity | Unread = NOTHING
    first = next((mark for mark in of_kind if (found := read(mark)) is not NOTHING), None)
    if first is None:
        return NOTHING
    place = bisect_right(starts, first.start)
    at = first
    for mark in marks[place : place + MARKS_UP_TO]:
        between = text[max(at.start, mark.start - BLOCK_UP_TO) : mark.start]
        corrects = _CORRECTS.search(between) or _RECHECKS.search(between)
        narrows = found is UNCLEAR and "\n" in between and "\n\n" not in between
        if (corrects or narrows) and isinstance(here := read(mark), Quantity):
            found, at = here, mark
    return found


def _read_mark(text: str, mark: _Mark, stop: int) -> Quantity | Unread:
    if mark.stop is not None:
        return read_content(text[mark.start : mark.stop])
    end = _end_of_line(text, mark.start)
    line = text[mark.start : end]
    if not _has_content(line):
        start = _next_line(text, end)
        if start is None or start >= stop or _starts_with_mark(text, start):
            return NOTHING
        end = _end_of_line(text, start)
        line = _BULLET.sub("", text[start:end])
    box = _BOX.search(line)
    if box and box[0].endswith("{"):
        closed = _closing_braces(line).get(box.end() - 1)
        if closed is not None:
            return read_content(line[box.end() : closed])
    paragraph_end = text.find("\n\n", end, stop)
    rest = text[end : paragraph_end if paragraph_end >= 0 else stop]
    block = line + rest
    if not mark.tentative or isinstance(read_content(line, lead_only=True), Quantity):
        corrected = _corrected(block[:BLOCK_UP_TO])
        if corrected is not NOTHING:
            return corrected
    after_hashes = mark.tentative and bool(_HASHES.search(text, max(0, mark.start - 12), mark.start))
    found = NOTHING if begins_like_heading(line) else read_content(line, lead_only=True)
    if found is NOTHING and not after_hashes:
        return conclusion(block) if rest.strip() else read_content(line)
    return found


def _corrected(block: str) -> Quantity | Unread:
    """Read the correction within a block; `UNCLEAR` if it retracts the answer without giving another."""
    cues = list(_CORRECTS.finditer(block))
    for cue in reversed(cues):
        before, after = block[: cue.start("cue")], block[cue.end("cue") :].lstrip(" ,.:;!—–-\n")
        if not re.search(r"\d", before) or (
            _CONFIRMS.search(after) and not _TAKES_BACK.search(cue["cue"] + " " + after)
        ):
            continue
        if re.search(r"\d", after):
            found = read_content(after.split("\n\n")[0])
            return UNCLEAR if found is NOTHING else found
        if _TAKES_BACK.search(cue["cue"]) or _TAKES_BACK.search(after[:60]):
            return UNCLEAR
    return NOTHING


def _implied(text: str) -> Quantity | Unread:
    """Read a text without marks, if it is a quantity or its last words conclude with one."""
    text = text.strip()
    if not text:
        return NOTHING
    lines = [line for line in text.split("\n") if _has_content(line)]
    if not lines:
        return NOTHING
    last = lines[-1].rstrip()
    if begins_like_heading(last):
        last = re.sub(r"^[\s*_]*\d+\s*[.):]", "", last)
    last = _BULLET.sub("", last)
    ended = bool(_SENTENCE_END.search(last))
    if not ended and _UNFINISHED.search(last[-400:]):
        return NOTHING
    found = conclusion(last)
    if found is NOTHING:
        found = read_content(last, lead_only=True)
    if found is NOTHING:
        found = conclusion(last, alone=ended and (len(lines) == 1 or bool(_SUMS_UP.search(last))))
    return found


def _implied_after(text: str, mark: _Mark) -> Quantity | Unread:
    """Read a text whose only label precedes its reasoning, as in `Answer: Let's think. …`."""
    rest = text[_end_of_line(text, mark.start) :]
    return _implied(rest) if _has_content(rest) else NOTHING


def _has_content(line: str) -> bool:
    """True if a line has a letter or digit outside a placeholder such as `[number]`."""
    line = re.sub(r"[\[<({][^\d\[\]<>(){}\n]{1,40}[\]>)}]", " ", line[:400])
    line = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}|^\s*```\w*\s*$|\\[()\[\]]", " ", line)
    return bool(re.search(r"[^\W_]", line))


def _starts_with_mark(text: str, start: int) -> bool:
    head = text[start : min(_end_of_line(text, start), start + 200)]
    return bool(
        _HASHES.search(head) or _TAG.search(head) or ((found := _WORD.search(head)) and _SIGN.match(head, found.end()))
    )


def _next_line(text: str, at: int) -> int | None:
    """Return the start of the next line with content, within a few lines."""
    for _ in range(6):
        at = text.find("\n", at) + 1
        if at == 0:
            return None
        if _has_content(text[at : _end_of_line(text, at)]):
            return at
    return None


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _closing_braces(text: str) -> dict[int, int]:
    """Map the position of each closed brace to the position where it is closed."""
    opened: list[int] = []
    closed: dict[int, int] = {}
    for match in re.finditer(r"[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif opened:
            closed[opened.pop()] = match.start()
    return closed
