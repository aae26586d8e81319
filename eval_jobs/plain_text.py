r"""Converts the characters and markup of numbers in model output to plain arithmetic.

`normalize` is applied to a whole output: digits of any script, full-width signs, non-breaking spaces, minus-like signs.
`clean` is applied to the content of an answer: `$\frac{1}{2}$`, `**1{,}800**` and `\$5` become ` 1/2`, `1,800` and `5`.
Both take linear time (`clean` for bounded text).
"""

import html
import re
import unicodedata

CURRENCY = "$€£¥₹₩₽₺₫฿₱₪₦₴₡₨₭₮₲₵₸₼₾₿"

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_POWER = re.compile(r"(?<=[0-9)])[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_OTHER_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]")
_VULGAR = re.compile(r"[¼½¾⅐-⅞↉]")
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\u20e3\ufe00-\ufe0f\ufeff]"
)
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−﹣－‐‑⁃➖", "-"), "⁄": "/", "∕": "/", "÷": "/",
        "×": "*", "⋅": "*", "·": "*", "∙": "*", "✕": "*", "✖": "*",
        "’": "'", "‘": "'", "ʼ": "'", "′": "'", "´": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "٫": ".", "٬": ",",
        "،": ",", "、": ",", "。": ". ", "≃": "≈", "≅": "≈", "≒": "≈", "≊": "≈",
        "⇒": "→", "⟹": "→", "➔": "→", "➜": "→", "⟶": "→", "∗": "*",
        "∼": "~", "【": "[", "】": "]", "「": '"', "」": '"', "‒": "–", "―": "—",
    }
)  # fmt: skip

_STRUCK = re.compile(r"~~[^~\n]*~~|\\(?:cancel|xcancel|bcancel|sout)\s*\{[^{}]*\}")
_WRAPPER = re.compile(
    r"\\(?:text[a-z]*|math[a-z]+|operatorname|mbox|hbox|fbox|boxed|underline|emph|bf|bm|boldsymbol|ensuremath|color"
    r"|textcolor\s*\{[^{}]*\}|large|Large|tag)\*?\s*\{([^{}]*)\}"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_OVER = re.compile(r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}")
_DEPTH = 8
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\boxed\s*(?=\d)", " "),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\([$%#&_{}])", r"\1"),
        (r"\\[,;: ~]|\\(?:thinspace|quad|qquad|enspace|medspace)(?![A-Za-z])", " "),
        (r"\\\\|\\[()\[\]]|\\newline(?![A-Za-z])", " "),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:approx|simeq|sim|cong)(?![A-Za-z])", "≈"),
        (r"\\(?:to|rightarrow|Rightarrow|implies|longrightarrow|therefore)(?![A-Za-z])", "→"),
        (r"\\pm(?![A-Za-z])", "±"),
        (r"\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])|°", " degrees "),
        (r"\\(?:pounds|euro|texteuro|textdollar|yen|rupee|textrm|displaystyle|left|right|big|Big|bigl|bigr|Bigl|Bigr|mathrm"
         r"|bf|rm|large|Large|centering|textbf|limits)(?![A-Za-z])", ""),
        (r"\\(?:begin|end)\s*\{[^{}]*\}", " "),
        (r"\\(?:leq?|geq?|neq?|ne|lt|gt)(?![A-Za-z])", "<"),
        (r"\\(?:l?dots|cdots)(?![A-Za-z])", "..."),
        (r"\\percent(?![A-Za-z])", "%"),
    )
)  # fmt: skip
_MONEY_SUFFIX = re.compile(rf"([{CURRENCY}]\s?\d[\d,.]*)\s?(mn|bn|[kKmMbB])(?![A-Za-z])")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d{2})(?=\s?€)|(?<=€)(\s?\d+),(\d{2})(?![\d,.])")
_SIGN_AND_CURRENCY = re.compile(rf"([-+–])\s*[{CURRENCY}]\s*(?=[\d.])")
_SQUARE_UNIT = re.compile(
    r"(?<![A-Za-z])((?:sq\s+)?(?:[cmk]?m|ft|in|yd|mi|inch(?:es)?|feet|meters?|metres?|miles?|yards?|units?))\s?\^\s?\(?\s?[23]\s?\)?(?!\d)"
)
_ROUNDED = re.compile(
    r",?\s*(?:\bwhich\s+)?(?:\bis\s+)?(?<![A-Za-z])round(?:ed|s|ing)?\s+(?:(?:up|down|off)\s+)?(?:to|is|gives)\s+(?:about\s+)?"
    r"(?=[$\d])(?!\d+\s+(?:decimal|digit|place|significant))",
    re.IGNORECASE,
)
_AND_A_HALF = re.compile(r"(?<![\d./,])(\d{1,9})\s+([A-Za-z]{1,20})\s+and\s+a\s+(half|quarter)\b")
_OPERAND = re.compile(r"\s{0,3}(?:[(\d]|[.-]\d)")
_MULTIPLES = {"k": "thousand", "m": "million", "mn": "million", "b": "billion", "bn": "billion"}


def normalize(text: str) -> str:
    """Convert a text's digits, signs and spaces to ASCII without loss."""
    if text.isascii():
        return html.unescape(text) if "&" in text else text
    text = re.sub(r"−\s+(?=[\d$])", "-", text)
    text = _POWER.sub(lambda match: f"^({match[0].translate(_SUPERSCRIPTS)})", _INVISIBLE.sub("", text))
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]), _OTHER_SUPERSCRIPT.sub("", text))
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = _FOREIGN_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)
    return html.unescape(text) if "&" in text else text


def clean(text: str) -> str:
    """Remove LaTeX, Markdown, currency signs, quotation marks and remarks in parentheses from the content of an answer."""
    text = _STRUCK.sub(" ", text)
    text = re.sub(r"[-=]+>", "→", text.replace("∴", " therefore "))
    text = re.sub(r"(?<=\d)[,.]-+(?!\d)", "", text)  # `18,-`
    text = re.sub(r"-{2,}", "–", text)
    text = _ROUNDED.sub(" ≈ ", text)
    text = _AND_A_HALF.sub(lambda match: f"{match[1]} {'1/2' if match[3] == 'half' else '1/4'} {match[2]}", text)
    text = re.sub(r"¢\s?(\d+(?:\.\d+)?)", r"\1 cents", text)
    text = re.sub(
        r"\b(?:in conclusion|in summary|to conclude|as a result|in the end)\b,?", "therefore", text, flags=re.IGNORECASE
    )
    text = _money(text)
    text = re.sub(rf"\\?[{re.escape(CURRENCY)}]", lambda match: "$", text)
    for pattern, replacement in _LATEX[:5]:
        text = pattern.sub(replacement, text)
    for _ in range(_DEPTH):
        before = text
        text = _WRAPPER.sub(r" \1 ", text)
        text = _FRACTION.sub(_fraction, text)
        text = _OVER.sub(r" (\1)/(\2) ", text)
        if text == before:
            break
    for pattern, replacement in _LATEX[5:]:
        text = pattern.sub(replacement, text)
    text = _SIGN_AND_CURRENCY.sub(r"\1", text).replace("$", " ")
    text = re.sub(r"</?[A-Za-z][^<>\n]{0,60}>", " ", text)
    text = re.sub(r"<([^<>\n]{1,60})>", r" \1 ", text)
    text = _without_stars(text).replace("~", " ").replace("`", " ").replace('"', " ").replace("|", " ")
    text = re.sub(r"(?<![0-9])_+|_+(?![0-9])", " ", text)
    text = re.sub(r"#+(?=\s*\S)", " ", text)
    text = text.translate(str.maketrans("{}[]", "()()"))
    text = _SQUARE_UNIT.sub(r"\1", text)
    text = re.sub(r"(?<=\d)\s+%", "%", text)
    text = re.sub(r"(?<![\w'])'|'(?![\w'])", " ", text)
    text = re.sub(r"^\s*(?:\(?[A-Ha-h][).:]|\([A-Ha-h]\)|•\s)\s*(?=[\d$+])", " ", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    return _without_remarks(text).strip()


def _money(text: str) -> str:
    """Convert `$2M` to two million, and `€18,50` to a decimal point."""
    text = _MONEY_SUFFIX.sub(lambda match: f"{match[1]} {_MULTIPLES[match[2].lower()]}", text)
    return _DECIMAL_COMMA.sub(lambda match: ".".join(part for part in match.groups() if part is not None), text)


def _fraction(match: re.Match[str]) -> str:
    over, under = (match[1] if match[1] is not None else match[2]), (match[3] if match[3] is not None else match[4])
    gap = " " if match.string[max(0, match.start() - 1) : match.start()].isalnum() else ""
    if over.strip().isdigit() and under.strip().isdigit():
        return f"{gap}{over.strip()}/{under.strip()} "
    return f"{gap}(({over})/({under})) "


def _without_stars(text: str) -> str:
    """Remove Markdown's asterisks but keep multiplication; `2**3` is a power."""

    def replaced(match: re.Match[str]) -> str:
        before = text[max(0, match.start() - 4) : match.start()].rstrip()[-1:]
        if not (before and before in "0123456789)%" and _OPERAND.match(text, match.end())):
            return " "
        return "^" if match[0] == "**" and text[match.start() - 1 : match.start()].strip() else "*"

    return re.sub(r"\*+", replaced, text)


def _without_remarks(text: str) -> str:
    """Remove remarks in parentheses beside a quantity; calculations, and a text that is entirely in parentheses, are kept."""
    text = text.strip()
    while (inner := _enclosed(text)) is not None:
        text = inner.strip()
    parts: list[str] = []
    depth, start, at = 0, 0, 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if match[0] == "(" and depth == 1:
            start = match.start()
        elif match[0] == ")" and depth == 0:
            before, group, after = (
                text[at:start],
                text[start : match.end()],
                text[match.end() : match.end() + 3].lstrip()[:1],
            )
            left = (parts[-1] if parts and not before.strip() else before).rstrip()[-1:]
            parts.append(before)
            touches = match.start() and before[-1:].isdigit() and not re.search(r"[^\W\d]", group)
            calculated = touches or (left and left in "+-*/^=≈(") or (after and after in "*/^+")
            alternative = re.match(r"\(\s*or\b", group)
            first = not "".join(parts).strip() and re.search(r"\d", group)
            parts.append(group if calculated or first else f" {group[1:-1]} " if alternative else " ")
            at = match.end()
        elif depth < 0:
            depth = 0
    rest = text[at:]
    return "".join(parts) + (rest.replace("(", " ").replace(")", " ") if depth or ")" in rest else rest)


def _enclosed(text: str) -> str | None:
    """Return the content of a pair of parentheses around the whole text, if there is one."""
    if not (text.startswith("(") and text.rstrip(".!").endswith(")")):
        return None
    text = text.rstrip(".!")
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and place < len(text) - 1:
            return None
    return text[1:-1]
