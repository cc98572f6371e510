"""Texts on which two implementations of one vocabulary tend to differ.

A tokenizer and its Hugging Face form are compared on them before a dataset is made and before an export is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Scripts, digits, runs of blanks, line ends, emoji and control characters.
PROBE = "The cat's 3.14  sat,\n\n\ton the mat.  \r\nÀé ß 中文 日本 Привет مرحبا 🙂\u200b e\u0301 _x_ <tag/> 1000000 "

HARD_TEXTS = (
    PROBE, "", " ", "   ", "\n", "\t", "\r\n", "\r\n\r\n", "a", " a", "a ", "  a  ", "\na\n", "\u200b",
    "\u00a0", "\u2581", "\u3000", "a \n b", "one\r\ntwo\rthree\n\nfour",
    "tabs\t\tand  two   three    four     five      six blanks",
    "    def f(x):\n        return x  # code\n\n\n", "\u2581x \u2581 y\u2581\u2581", " \u2581", "x \u2581",
    "x\u00a0y\u2003z\u2028w\u0085v\ufeff", "x\u0000y\u0001z\u001b[0m\u007f",
    "Å ångström ﬁne ﬂow ① ½ ™ ㌔ ﷺ ＡＢＣ １２３　～〜~ …", "İstanbul ıI ß ẞ Σίσυφος ΣΑΣ ǅ ŉ",
    "e\u0301 A\u030a Vie\u0323\u0302t \u1112\u1161\u11ab\u1100\u1173\u11af か\u3099 ｶﾞ ｅ\u0301",
    "한국어 日本語 中文字符 ไทย हिन्दी क्षत्रिय தமிழ் עִבְרִית العَرَبِيَّة ქართული",
    "👨‍👩‍👧‍👦 🇩🇪🇫🇷 1️⃣ 👍🏽 ❤️ \u200d\u200c\u200b", "𝕳𝖊𝖑𝖑𝖔 𐍈 🂡 \U0010fffd \ue000",
    "<0x41> a<0x0A>b <0xFF><0x00> <0X41> <0x4> 0x41 x41>",
    "don't won't I'm you're \"quoted\" 'single' (brackets) [x] {y} <z> &amp; &lt;s&gt;",
    "3.14159 1,000,000 2026-01-01 12:34:56 1e-5 0x1F",
    "https://example.org/a?b=c&d=e#f user@example.org C++ C# .NET a_b_c snake__case CamelCase",
    "!!! ... ??? ---- ==== #### **** ____ ~~~~", "aaaaaaa ooooooooooo 0000000 1111111111111", "-" * 79,
    "=" * 40 + "\n" + "=" * 17, " " * 33 + "x", "\n" * 9 + "x" + "\n" * 6, "\t" * 5 + "x",
)  # fmt: skip


def probes(own: Iterable[str] = (), pieces: Sequence[str] = ()) -> list[str]:
    """Hard texts, texts around each of the vocabulary's `own` symbols, and its `pieces` as texts of their own."""
    around = [f"{s}a{s}b {s} {s}{s}\n{s}  {s} c{s}" for s in own]
    around += [f"x{s}y" for s in own]
    return [*HARD_TEXTS, *around, *pieces]


def first_difference(texts: Sequence[str], wanted: Sequence[list[int]], found: Sequence[list[int]]) -> str | None:
    """The shortest text that is encoded differently, for an error message; None where there is none."""
    differing = [n for n in range(len(texts)) if wanted[n] != found[n]]
    if not differing:
        return None
    n = min(differing, key=lambda n: len(texts[n]))
    return f"{_short(ascii(texts[n]))} is {_short(str(found[n]))}, not {_short(str(wanted[n]))}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
