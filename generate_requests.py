#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = [
#     "jinja2>=3.1",
#     "protobuf>=4",
#     "sentencepiece>=0.2",
#     "tiktoken>=0.7",
#     "tqdm>=4.60",
#     "transformers>=4.51",
# ]
# ///
"""Write a JSONL corpus of prompts, each exactly as many tokens long as you asked for.

    generate_requests.py                                  100 natural-looking paragraphs, no tokenizer needed
    generate_requests.py --count 1000 --approx-input-tokens 512 --tokenizer-model ./my-model
    generate_requests.py --approx-input-tokens 2048 --prefix-overlap 0.75 --prefix-groups 4 --count-as chat \\
                         --tokenizer-model Qwen/Qwen3-8B --output-tokens 256

This one file is the whole program. Paragraphs need Python alone; lengths in tokens need `transformers` (a
directory, a tokenizer.json or a Hugging Face name) or `tiktoken` (an OpenAI model name), and chat counting needs
`jinja2`. `uv run generate_requests.py` brings them all.

What is promised, and checked on the final text of every prompt before it is written:
  * its length is the target; a prompt that stays outside --token-tolerance is an error, never a line;
  * all prompts of a prefix group agree on exactly floor(overlap x target) leading token ids: on that many
    and, as a group, on no more. With --input-tokens-stdev the prefix is measured by the mean target;
  * as a rule, any two prompts of a group differ in the first token after the prefix, as long as the
    vocabulary has as many first words as the group has prompts; then first words repeat, the next ones differ;
  * prompts of different groups differ from their first token on, and no two prompts are equal;
  * only words that the tokenizer's own ordinary tokens spell: no special tokens, no byte fallback.
With --count-as chat all this holds for the prompt as the server sees it, one user message in the tokenizer's
chat template with the generation prompt. The template's own head is then part of every prompt's prefix.

Fields of a line:
  text           the prompt
  input_tokens   its length, measured                              (with --approx-input-tokens)
  prefix_tokens  leading tokens shared by its whole group          (with --approx-input-tokens)
  prefix_group   number of its group, from 0
  max_tokens     tokens to be generated                            (with --output-tokens)
With --from-trace, a line has `text`, `input_tokens`, `max_tokens`, the trace's `timestamp` (ms), and as
`prefix_tokens` how many of its leading tokens earlier lines have. With --turns, a line is a session:
  turns          [{"content", "max_tokens"?, "delay_ms"?}, ...]: what the user says, in order
  turn_tokens    the length of each turn, measured                 (with --approx-input-tokens)
  prefix_tokens, prefix_group                                      (of the first turn)
Beside the corpus, FILE.meta.json records options, seed, tokenizer, lengths reached and the file's SHA-256.

Sections, each using only those above it:
  1. Constants          5. Plan               9. Traces
  2. Types              6. Report            10. The corpus file
  3. Words              7. Tokenizers        11. Command line
  4. Paragraphs         8. Making prompts

Exit codes: 0 written; 1 it could not be made (tokenizer, length, disk); 2 wrong usage, or the file is there
already; 130 interrupted. Only a finished corpus ever bears the final name.
"""

import argparse
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import struct
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional, Protocol

# === 1. Constants ===

__version__ = "0.2.0"

PROGRAM = "generate_requests.py"
TOKEN_VARIABLES = ("HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN")
HUB_CURE = (
    "give a local directory or tokenizer.json, fill the cache beforehand (HF_HOME) and unset HF_HUB_OFFLINE to do so, "
    "or pass --huggingface-token for a gated repository; OpenAI's names need tiktoken"
)

UNRECORDED_OPTIONS = ("output", "huggingface_token", "trace")
WITH_A_TRACE = (  # all else is what the trace tells
    *("from_trace", "block_tokens", "count", "output", "seed", "count_as"),
    *("tokenizer_model", "trust_remote_code", "huggingface_token"),
)
NEED_A_LENGTH = (
    "input_tokens_stdev",
    "min_input_tokens",
    "max_input_tokens",
    "token_tolerance",
    "count_as",
    "turn_tokens",
)
NEED_TURNS = ("turn_tokens", "delay_ms")
NAMED_OPTIONS = {  # in a file's name, shortened, where they are not the default
    "language": "",
    "count_as": "",
    "prefix_groups": "groups",
    "input_tokens_stdev": "stdev",
    "min_input_tokens": "min",
    "max_input_tokens": "max",
    "output_tokens": "output",
    "turns": "turns",
    "turn_tokens": "later",
    "delay_ms": "delay",
    "block_tokens": "block",
    "seed": "seed",
}

MAX_TARGET_TOKENS = 10_000_000
MAX_TRACE_NUMBER = {"timestamp": 10**15, "input_length": MAX_TARGET_TOKENS, "output_length": MAX_TARGET_TOKENS}
MIN_TOLERANCE_TOKENS = 5
TOLERANCE_SHARE = Decimal("0.05")
MAX_TARGET_DRAWS = 1000

MAX_WORD_CHARS = 14
MAX_WORD_TOKENS = 4
MIN_WORDS = 2048  # looked for in a vocabulary before the search stops
MAX_WORDS = 20_000
ENOUGH_SHARE = 4  # a quarter of the words wanted is enough to leave foreign alphabets out
FEW_WORDS = 256  # with fewer words of one token, words of several tokens are used too
MAX_LEAD_TOKENS = 2  # tokens that all words of an alphabet may begin with, such as a lone space
WAYS_ENOUGH = 10**18  # more sequences of words than anyone will ask for

CANDIDATES_PER_BATCH = 2048
BATCH_TOKENS = 131_072  # encoded at a time: bounds the memory, keeps every core busy
MAX_BATCH_PROMPTS = 512
THREADS_PAY_CHARS = 500  # shorter texts are encoded faster than handed to a thread
CACHED_PREFIX_TOKENS = 1_000_000
ATTEMPTS = 32
ATTEMPTS_PER_TAKE = 4  # corrections of the length before other words are tried

PROGRESS_DELAY_S = 1

# OpenAI's published way to count a chat: 3 tokens a message and 1 for its role, 3 that open the reply
OPENAI_CHAT_HEAD_TOKENS = 3  # message start, role, line end
OPENAI_CHAT_TAIL_TOKENS = 4  # message end, reply opening

MIN_SENTENCE_WORDS = 5  # shorter sentences only where a text must end

ENGLISH_PATTERNS = """
    LONE.
    They LONE.
    The NOUN LONE.
    The ADJECTIVE NOUN LONE.
    The NOUN VERB the NOUN.
    The ADJECTIVE NOUN VERB the NOUN.
    The ADJECTIVE NOUN VERB the ADJECTIVE NOUN.
    The NOUN VERB the NOUN PREPOSITION the NOUN.
    The ADJECTIVE NOUN VERB the NOUN PREPOSITION the NOUN.
    The ADJECTIVE NOUN VERB the ADJECTIVE NOUN PREPOSITION the NOUN.
    CONNECTIVE, the ADJECTIVE NOUN VERB the ADJECTIVE NOUN PREPOSITION the NOUN."""
ENGLISH = {
    "ADJECTIVE": """ancient bitter bright broad calm careful clever cold common curious dark deep distant dry
        early empty faint famous fresh gentle golden green heavy hidden honest hollow large late light little
        lonely long lost loud narrow new noble odd old open pale patient plain proud quick quiet rare rough
        round sharp silent silver simple slow small smooth soft steady strange strong tall thin tired warm
        wide wild young""",
    "NOUN": """archive baker bell boat bottle bridge builder captain castle child city cloud coast doctor door
        dream engine farmer field fire fisher forest garden gate glass guest harbour hill horse house island
        judge lamp letter library machine market meadow mill mirror mountain museum night painter paper path
        pilot poet pupil queen railway river road room sailor school shadow ship signal singer soldier spring
        stone storm story stranger summer table teacher tower town train traveller tree valley village voice
        wall watch water weaver wind window winter witness writer""",
    "VERB": """admired answered avoided believed carried changed chose copied covered crossed described
        discovered examined followed found guarded heard hid kept left lifted liked lost measured met moved
        noticed opened painted passed praised reached remembered repaired saved saw sold studied surprised
        touched trusted visited warned watched welcomed""",
    "LONE": "agreed arrived hesitated laughed listened remained returned slept smiled spoke waited",
    "PREPOSITION": "above across after around before behind below beside beyond near past towards under",
    "CONNECTIVE": "Afterwards Elsewhere Later Meanwhile Nearby Often Sometimes Soon Today Yesterday",
    "NAME": """Alder Barrow Calder Denham Easton Fenwick Garrick Holm Ingham Jarrow Kelso Larkin Marlow
        Norwood Oakley Penrose Quinn Rowan Selby Thorne Upton Vance Weston Yarrow""",
}
JAPANESE_PATTERNS = """
    LONE。
    PERSONは LONE。
    PERSONは THINGを VERB。
    ADJECTIVE PERSONは THINGを VERB。
    ADJECTIVE PERSONは ADJECTIVE THINGを VERB。
    TIME、 ADJECTIVE PERSONは ADJECTIVE THINGを VERB。
    ADJECTIVE PERSONは ADJECTIVE PLACEで ADJECTIVE THINGを VERB。
    TIME、 ADJECTIVE PERSONは ADJECTIVE PLACEで ADJECTIVE THINGを VERB。"""
JAPANESE = {
    "ADJECTIVE": """静かな 小さな 大きな 古い 新しい 若い 明るい 暗い 優しい 親切な 真面目な 不思議な 有名な 美しい
        懐かしい 珍しい 丈夫な 立派な 地味な 陽気な 正直な 無口な 遠い 近い 長い 短い 重い 軽い 白い 黒い 赤い 青い
        冷たい 温かい 丸い 素朴な 華やかな 穏やかな 貴重な 簡素な""",
    "PERSON": """先生 医者 画家 詩人 船長 職人 学生 農夫 漁師 旅人 商人 記者 司書 音楽家 料理人 大工 看護師 運転手
        店主 隣人 少年 少女 祖母 祖父 友人 兵士 裁判官 研究者 技師 庭師""",
    "THING": """手紙 地図 時計 写真 荷物 窓 扉 机 椅子 本 辞書 日記 絵 楽器 切符 新聞 鍵 鏡 傘 帽子 灯り 箱 皿
        花瓶 石 糸 布 橋 舟 馬 道具 機械 物語 歌 言葉 約束 計画 記録 証拠 合図""",
    "PLACE": """図書館 博物館 学校 病院 市場 港 駅 公園 庭 森 山 川岸 海辺 島 村 町 広場 教会 工場 食堂 劇場 城 塔
        牧場 畑 倉庫 橋の上 谷 丘 湖畔""",
    "VERB": """見つけた 直した 運んだ 描いた 調べた 選んだ 忘れた 思い出した 届けた 眺めた 写した 隠した 守った 売った
        買った 測った 磨いた 並べた 開けた 閉めた 残した 失くした 褒めた 受け取った 持ち上げた""",
    "LONE": "笑った 眠った 待った 黙った 頷いた 歌った 働いた 休んだ 帰った 着いた 迷った",
    "TIME": "翌朝 昨日 今日 やがて その後 ある日 夕方 時々 ある夜 春先に 冬の間 しばらくして",
    "NAME": """青木 石川 上田 江口 大野 加藤 木村 久保 小林 佐藤 清水 鈴木 関口 高橋 田中 中村 西田 野口 橋本 藤井
        松本 森田 山口 渡辺""",
}


# === 2. Types ===


class Refused(Exception):
    """What the user is told in one line, and the exit code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Word(NamedTuple):
    """A word and the token ids it is encoded to in its place in a text."""

    text: str
    ids: tuple[int, ...]


class Secret(str):
    """A text that shows itself in no output."""

    def __repr__(self) -> str:
        return "***"


class Options(argparse.Namespace):
    """The command line; what was not given stands here, so that `vars` tells what was."""

    count: int = 100
    output: Path = Path("outputs")
    language: str = "en"
    prefix_overlap: Decimal = Decimal("0.0")
    prefix_groups: int = 1
    approx_input_tokens: Optional[int] = None
    input_tokens_stdev: float = 0.0
    min_input_tokens: Optional[int] = None
    max_input_tokens: Optional[int] = None
    tokenizer_model: str = "gpt2"
    token_tolerance: Optional[int] = None
    count_as: str = "raw"
    output_tokens: Optional[tuple[float, float]] = None
    trust_remote_code: bool = False
    huggingface_token: Optional[Secret] = None
    seed: Optional[int] = None
    turns: int = 1
    turn_tokens: Optional[int] = None
    delay_ms: Optional[int] = None
    from_trace: Optional[Path] = None
    block_tokens: int = 512
    trace: "Sequence[TraceLine]" = ()  # the lines read from it

    @property
    def group_prompts(self) -> int:
        """Prompts in the largest group."""
        return -(-self.count // self.prefix_groups)

    def tolerated(self, target: int) -> int:
        if self.token_tolerance is not None:
            return self.token_tolerance
        return max(MIN_TOLERANCE_TOKENS, int(TOLERANCE_SHARE * target))


@dataclass(frozen=True)
class Kit:
    """All that is known of a tokenizer once its vocabulary has been tried out."""

    words: list[Word]  # as encoded after a space
    starters: list[Word]  # as encoded at the start of a text
    head: list[int]  # ids in front of every text: the chat template's, most often none
    tail_tokens: int  # how many ids the chat template sets behind every text


@dataclass(frozen=True)
class Joint:
    """Words that may follow a shared prefix: their first `lead` ids are the same and part of it."""

    lead: int
    words: list[Word]


@dataclass(frozen=True)
class Prompt:
    """A finished prompt, as it goes into a line."""

    text: str
    group: Optional[int] = None
    asked_tokens: Optional[int] = None
    input_tokens: Optional[int] = None
    prefix_tokens: Optional[int] = None
    later: tuple["Prompt", ...] = ()  # what the same user says in the turns after this one
    max_tokens: Optional[int] = None  # as the trace tells
    timestamp: Optional[float] = None  # ms


class Block(NamedTuple):
    """A part of a trace's prompt: the same text wherever its name is the same."""

    name: str
    place: int  # among the blocks that follow the same ones: their first words differ
    chain: int  # number of this block after the ones before it


class TraceLine(NamedTuple):
    """A request of a trace."""

    timestamp: float  # ms
    input_length: int
    output_length: int
    blocks: list[Block]


class Encoder(Protocol):
    """A tokenizer. No method adds special tokens of its own accord."""

    about: dict[str, Any]

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def chat(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as the only user message of a chat, encoded as a server encodes it."""
        ...

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]: ...

    def ids(self) -> list[int]: ...

    def pieces(self, ids: Sequence[int]) -> list[Optional[str]]:
        """The text of single tokens; None where a token must not occur in a prompt."""
        ...


Measure = Callable[[Sequence[str]], "list[list[int]]"]  # Encoder.encode or Encoder.chat


class Maker(Protocol):
    """Makes the prompts of the given numbers."""

    batch: int

    def make(self, numbers: Sequence[int]) -> list[Prompt]: ...


# === 3. Words (pure) ===


def stream(*names: object) -> random.Random:
    """A random stream of its own for each purpose: a line's text does not depend on how lines are batched."""
    return random.Random("/".join(map(str, names)))


def shuffled(items: Iterable[Any], rng: random.Random) -> list[Any]:
    return sorted(items, key=lambda _: rng.random())


def exact_floor(share: Decimal, tokens: int) -> int:
    """floor(share x tokens) of the share as it was typed: 0.29 of 100 is 29, which floats make 28."""
    return int(share * tokens)


def plain_word(piece: Optional[str]) -> Optional[str]:
    """The readable word in a token's text, if it is one: letters of any alphabet, with their marks."""
    word = (piece or "").strip()
    if not 0 < len(word) <= MAX_WORD_CHARS:
        return None
    if word.isascii():
        return word if word.isalpha() else None
    kinds = [unicodedata.category(char)[0] for char in word]
    readable = kinds[0] == "L" and set(kinds) <= {"L", "M"} and word.isprintable()
    return word if readable and unicodedata.is_normalized("NFC", word) else None


def roughness(word: Word) -> int:
    """0 for what reads like a word, more for short ones and for capitals."""
    caseless = word.text.lower() == word.text.upper()
    if word.text != word.text.lower():
        return 3
    return max(0, (2 if caseless else 4) - len(word.text))


def pseudo_words(syllables: Sequence[str], wanted: int) -> Iterator[str]:
    """Words put together from short ones, for vocabularies too small to hold enough of their own."""
    made = 0
    for shift in range(1, len(syllables)):
        for place, syllable in enumerate(syllables):
            yield syllable + syllables[(place + shift) % len(syllables)]
            made += 1
            if made >= wanted:
                return


def alphabet(text: str) -> str:
    """The name of the alphabet of a word's first letter; the Japanese ones count as one with the Chinese."""
    name = unicodedata.name(text[0], "").split(" ")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name


def main_alphabet(texts: Iterable[str]) -> str:
    return max(Counter(map(alphabet, texts)).items(), key=lambda item: item[1], default=("", 0))[0]


def best_words(words: Sequence[Word], wanted: int) -> list[Word]:
    """The most readable words of one token, the main alphabet's first; longer ones if they are few."""
    single = [w for w in words if len(w.ids) == 1]
    usual = main_alphabet(w.text for w in single if not roughness(w)) or main_alphabet(w.text for w in words)
    ranked = sorted(words, key=lambda w: (alphabet(w.text) != usual, roughness(w)))
    own = [w for w in ranked if alphabet(w.text) == usual and (len(w.ids) == 1 or len(single) < FEW_WORDS)]
    ranked = own if len(own) >= wanted // ENOUGH_SHARE else ranked
    if len(single) >= FEW_WORDS:
        return [w for w in ranked if len(w.ids) == 1][:wanted]
    costs = range(1, MAX_WORD_TOKENS + 1)
    by_cost = [[w for w in ranked if len(w.ids) == cost][:wanted] for cost in costs]
    return [w for same_cost in by_cost for w in same_cost]


def different(words: Iterable[Word], at: int) -> int:
    """How many different ids the words have at that place."""
    return len({word.ids[at] for word in words})


def different_first(words: Iterable[Word], at: int) -> list[Word]:
    """The same words, those with an id at that place not seen before coming before those that repeat one."""
    seen: Counter[int] = Counter()
    turns = []
    for word in words:
        turns.append((seen[word.ids[at]], word))
        seen[word.ids[at]] += 1
    return [word for _, word in sorted(turns, key=lambda turn: turn[0])]


def joints(words: Sequence[Word]) -> list[Joint]:
    """The ways to go on after a shared prefix, the one with most different words first.

    Where an alphabet is not written with spaces, every word may begin with the same token, a lone space. That
    token then belongs to the prefix, and the words differ from the next one on.
    """
    found: list[Joint] = []
    for lead in range(MAX_LEAD_TOKENS + 1):
        alike: dict[tuple[int, ...], list[Word]] = {}
        for word in words:
            if len(word.ids) > lead:
                alike.setdefault(word.ids[:lead], []).append(word)
        found.extend(Joint(lead, same) for same in alike.values())
    return sorted(found, key=lambda joint: (-different(joint.words, joint.lead), joint.lead))


class Supply:
    """Sequences of words that cost exactly so many tokens: how many there are, the n-th one, a random one."""

    def __init__(self, words: Sequence[Word]) -> None:
        self._words = list(words)
        self._texts = [word.text for word in words]
        self._by_cost: dict[int, list[Word]] = {}
        for word in words:
            self._by_cost.setdefault(len(word.ids), []).append(word)
        self._costs = sorted(self._by_cost)
        self._ways = [1]

    def ways(self, tokens: int) -> int:
        """How many sequences of words cost exactly `tokens`, counted up to WAYS_ENOUGH."""
        if tokens < 0 or not self._costs:
            return int(tokens == 0)
        while len(self._ways) <= tokens:
            if self._costs[0] == 1 and self._ways[-1] == WAYS_ENOUGH:
                return WAYS_ENOUGH
            size = len(self._ways)
            total = sum(len(self._by_cost[c]) * self._ways[size - c] for c in self._costs if c <= size)
            self._ways.append(min(total, WAYS_ENOUGH))
        return self._ways[tokens]

    def unique_part(self, tokens: int, rounds: int) -> Optional[int]:
        """The fewest of `tokens` in which `rounds` sequences differ while the rest can still be filled."""
        for part in range(tokens + 1):
            if self.ways(part) >= rounds and self.ways(tokens - part):
                return part
        return None

    def nth(self, number: int, tokens: int) -> list[str]:
        """Sequence `number` of those that cost `tokens`: other numbers give other sequences."""
        words = []
        while tokens:
            for cost in self._costs:
                rest = self.ways(tokens - cost)
                here = len(self._by_cost[cost]) * rest
                if number < here:
                    break
                number -= here
            words.append(self._by_cost[cost][number // rest].text)
            number, tokens = number % rest, tokens - cost
        return words

    def fill(self, tokens: int, rng: random.Random) -> list[str]:
        """Random words. With the same stream, more tokens only add words at the end."""
        if self._costs == [1]:
            texts, size = self._texts, len(self._texts)
            return [texts[drawn % size] for drawn in struct.unpack(f"<{tokens}I", rng.randbytes(4 * tokens))]
        chosen = []
        while tokens:
            word = self._words[int(rng.random() * len(self._words))]
            if not self.ways(tokens - len(word.ids)):
                fitting = [w for cost in self._costs if self.ways(tokens - cost) for w in self._by_cost[cost]]
                word = fitting[int(rng.random() * len(fitting))]
            chosen.append(word.text)
            tokens -= len(word.ids)
        return chosen


# === 4. Paragraphs (pure) ===


@dataclass(frozen=True)
class Language:
    """How sentences are put together: pattern n has n words, and words in capitals stand for any of their kind."""

    patterns: list[str]
    words: dict[str, list[str]]
    space: str  # between words
    prompt_words: int
    paragraph_words: int
    own: str  # how a prompt's own part opens
    shared: str  # how a shared prefix opens

    def sentence(self, words: int, rng: random.Random) -> str:
        """A sentence of exactly so many words, 1 to as many as there are patterns."""
        text = re.sub("[A-Z]{2,}", lambda kind: rng.choice(self.words[kind[0]]), self.patterns[words - 1])
        return text[0].upper() + text[1:].replace(" ", self.space)

    def prose(self, opening: str, number: int, words: int, rng: random.Random) -> str:
        """Whole sentences in paragraphs, together of exactly `words` words, the opening's included."""
        names = self.words["NAME"]
        start = opening.format(name=names[number % len(names)], number=number + 1).split()[:words]
        text, written, paragraph = self.space.join(start), len(start), 0
        while written < words:
            here = min(rng.randint(MIN_SENTENCE_WORDS, len(self.patterns)), words - written)
            turn = written - paragraph >= self.paragraph_words
            text += ("\n\n" if turn else self.space) + self.sentence(here, rng)
            paragraph = written if turn else paragraph
            written += here
        return text


def made_of(patterns: str, words: dict[str, str], **layout: Any) -> Language:
    lines = [line.strip() for line in patterns.strip().splitlines()]
    return Language(lines, {kind: names.split() for kind, names in words.items()}, **layout)


LANGUAGES = {
    "en": made_of(
        ENGLISH_PATTERNS,
        ENGLISH,
        space=" ",
        prompt_words=120,
        paragraph_words=60,
        own="{name}-{number} writes.",
        shared="{name}-{number} reports.",
    ),
    "ja": made_of(  # a word is a phrase here, a noun with its particle: written Japanese has no spaces
        JAPANESE_PATTERNS,
        JAPANESE,
        space="",
        prompt_words=60,
        paragraph_words=30,
        own="{name}{number}は 書いた。",
        shared="{name}{number}は 報告した。",
    ),
}


class Paragraphs:
    """Prompts without a tokenizer: the shared prefix is a fraction of their words."""

    batch = 256

    def __init__(self, options: Options) -> None:
        self._options = options
        self._language = LANGUAGES[options.language]
        self._prefix_words = exact_floor(options.prefix_overlap, self._language.prompt_words)

    def make(self, numbers: Sequence[int]) -> list[Prompt]:
        return [self._prompt(number) for number in numbers]

    def _prompt(self, number: int) -> Prompt:
        seed, group, language = self._options.seed, number % self._options.prefix_groups, self._language
        rng, own = stream(seed, "paragraphs", number), language.prompt_words - self._prefix_words
        parts = []
        if self._prefix_words:
            parts.append(language.prose(language.shared, group, self._prefix_words, stream(seed, "shared", group)))
        else:
            own = rng.randint(own * 2 // 3, own * 4 // 3)
        if own:
            parts.append(language.prose(language.own, number, own, rng))
        return Prompt(language.space.join(parts), group)


# === 5. Plan (pure) ===


class Composer:
    """Puts words together that should add up to the target; only the tokenizer can tell if they do."""

    def __init__(self, options: Options, kit: Kit) -> None:
        assert options.approx_input_tokens is not None
        self._options, self._kit, self._target = options, kit, options.approx_input_tokens
        rng = stream(options.seed, "words")
        self._supply = Supply(shuffled(kit.words, rng))
        self._starters = different_first(shuffled(kit.starters, rng), 0)
        self.prefix_tokens = max(len(kit.head), exact_floor(options.prefix_overlap, options.approx_input_tokens))
        self.has_prefix = self.prefix_tokens > len(kit.head)
        self.whole = options.prefix_overlap == 1
        self.lead = 0
        self._heads: list[list[Word]] = []  # of each group, or one list for all
        if self.has_prefix:
            self._plan_prefix()
        else:
            self._plan_starts()
        if not self.whole:
            self._plan_suffix()

    def _plan_prefix(self) -> None:
        """One starter per group, and the words that may follow the prefix."""
        ask = self._options
        room = self.prefix_tokens - len(self._kit.head) - (self._kit.tail_tokens if self.whole else 0)
        for joint in [Joint(0, [])] if self.whole else joints(self._kit.words):
            fitting = [w for w in self._starters if self._supply.ways(room - joint.lead - len(w.ids))]
            parted = self.whole or different(joint.words, joint.lead) >= min(2, ask.group_prompts)
            if parted and different(fitting, 0) >= ask.prefix_groups:
                self._starters, self.lead = different_first(fitting, 0), joint.lead
                self._heads = [shuffled(joint.words, stream(ask.seed, "heads"))]
                return
        raise Refused(
            f"this vocabulary makes no {ask.prefix_groups} distinct prefixes of exactly {self.prefix_tokens} tokens "
            "- use fewer --prefix-groups or another --prefix-overlap"
        )

    def _plan_starts(self) -> None:
        """Without a prefix, the groups share out the first ids among themselves."""
        groups = self._options.prefix_groups
        owner: dict[int, int] = {}
        heads: dict[int, list[Word]] = {}
        for word in self._starters:
            group = owner.setdefault(word.ids[0], len(owner) % groups)
            heads.setdefault(group, []).append(word)
        self._heads = [heads[group] for group in sorted(heads)]

    def _plan_suffix(self) -> None:
        """Which words may stand where prompts part, and the shortest target that leaves room for them."""
        ask = self._options
        self.min_target = ask.min_input_tokens or self._target
        if ask.input_tokens_stdev and ask.min_input_tokens is None:
            shorter = range(self.prefix_tokens + 1, self._target)
            self.min_target = next(filter(self._usable, shorter), self._target)
        spread = ask.tolerated(self.min_target)
        usable = self._usable(self.min_target) or self._usable(self.min_target, spread)
        if len(usable) < (1 if self.has_prefix else ask.prefix_groups):
            raise Refused(self._too_tight())
        self._heads = usable

    def _usable(self, length: int, spread: int = 0) -> list[list[Word]]:
        """Per group, the words that prompts of this length can part with; empty if they cannot all differ."""
        found = []
        for heads in self._heads:
            kept: list[Word] = []
            while heads != kept:
                rounds = -(-self._options.group_prompts // max(1, len(heads)))
                kept, heads = heads, [w for w in heads if self._fits(w, length, spread, rounds)]
            if different(heads, self.lead) < min(2, self._options.group_prompts):
                return []
            found.append(different_first(heads, self.lead))
        return found

    def _fits(self, head: Word, length: int, spread: int, rounds: int) -> bool:
        return any(
            self._supply.unique_part(self._rest(head, near), rounds) is not None
            for near in nearest_first(length, spread)
        )

    def _rest(self, head: Word, length: int) -> int:
        """Tokens left for the words after the prefix and the head."""
        return length - self.prefix_tokens + self.lead - len(head.ids) - self._kit.tail_tokens

    def _too_tight(self) -> str:
        room = self.min_target - self.prefix_tokens - self._kit.tail_tokens
        head = f"{self.min_target} tokens, {self.prefix_tokens} of them shared"
        if self._kit.tail_tokens:
            head += f" and {self._kit.tail_tokens} closing the chat template"
        return (
            f"{head}, leave {max(0, room)} to tell {self._options.group_prompts} prompts apart in each of "
            f"{self._options.prefix_groups} group(s), and this vocabulary has too few words for that - ask for more "
            "tokens, fewer prompts or less overlap"
        )

    def target(self, number: int) -> int:
        """The length asked for: fixed, or drawn from a normal distribution cut at the bounds."""
        ask = self._options
        if not ask.input_tokens_stdev:
            return self._target
        rng = stream(ask.seed, "target", number)
        high = ask.max_input_tokens or MAX_TARGET_TOKENS
        for _ in range(MAX_TARGET_DRAWS):
            drawn = round(rng.gauss(self._target, ask.input_tokens_stdev))
            if self.min_target <= drawn <= high:
                return drawn
        return self._target

    def prefix(self, group: int, extra: int, take: int) -> str:
        """The shared prefix; `extra` tokens more than should be needed, of another random stream per take."""
        starter = self._starters[group]
        room = self.prefix_tokens - len(self._kit.head) - self.lead - len(starter.ids) + extra
        if self.whole:
            room -= self._kit.tail_tokens
        while room > 0 and not self._supply.ways(room):
            room += 1
        words = self._supply.fill(max(0, room), stream(self._options.seed, "prefix", group, take))
        return " ".join([starter.text, *words])

    def head(self, number: int, take: int = 0) -> Word:
        """The word in which prompt `number` parts from the others of its group; another one for each take."""
        heads = self._heads[0 if self.has_prefix else number % self._options.prefix_groups]
        return heads[(number // self._options.prefix_groups + take) % len(heads)]

    def suffix(self, number: int, length: int, take: int) -> tuple[str, Word]:
        """Head, the words that make it unique, random words: `length` tokens with prefix and tail.

        Head and unique words stand for a number of their own, for every prompt and every take of it. Where so
        many do not fit in, all takes share one, and only the random words differ.
        """
        ask = self._options
        heads = len(self._heads[0 if self.has_prefix else number % ask.prefix_groups])
        rounds = -(-ask.group_prompts // heads)
        for near in nearest_first(length, ask.tolerated(length)):
            for takes, nth_take in ((ATTEMPTS, take), (1, 0)):
                head = self.head(number, nth_take)
                rest = self._rest(head, near)
                part = self._supply.unique_part(rest, rounds * takes)
                if part is None:
                    continue
                unique = self._supply.nth(number // ask.prefix_groups // heads + nth_take * rounds, part)
                filled = self._supply.fill(rest - part, stream(ask.seed, "fill", number, take))
                return " ".join([head.text, *unique, *filled]), head
        raise Refused(self._too_tight())


def nearest_first(value: int, spread: int) -> Iterator[int]:
    yield value
    for step in range(1, spread + 1):
        yield value + step
        yield value - step


# === 6. Report (pure) ===


@dataclass
class Lengths:
    """A distribution kept as a histogram, so that it does not grow with the corpus."""

    seen: "Counter[int]" = field(default_factory=Counter)

    def add(self, value: Optional[int]) -> None:
        if value is not None:
            self.seen[value] += 1

    def total(self) -> int:
        return sum(value * times for value, times in self.seen.items())

    def describe(self) -> Optional[dict[str, float]]:
        n = sum(self.seen.values())
        if not n:
            return None
        mean = self.total() / n
        variance = sum(times * (value - mean) ** 2 for value, times in self.seen.items()) / n
        return {"min": min(self.seen), "mean": mean, "max": max(self.seen), "stdev": math.sqrt(variance)}


@dataclass
class Tally:
    """What has been written so far."""

    prompts: int = 0
    texts: int = 0  # with the later turns
    exact: int = 0
    asked: Lengths = field(default_factory=Lengths)
    reached: Lengths = field(default_factory=Lengths)
    prefix: Lengths = field(default_factory=Lengths)
    later: Lengths = field(default_factory=Lengths)

    def add(self, prompt: Prompt) -> None:
        self.prompts += 1
        self.asked.add(prompt.asked_tokens)
        self.reached.add(prompt.input_tokens)
        self.prefix.add(prompt.prefix_tokens)
        for text in (prompt, *prompt.later):
            self.texts += 1
            self.exact += text.input_tokens is not None and text.input_tokens == text.asked_tokens
        for turn in prompt.later:
            self.later.add(turn.input_tokens)


def drawn_output_tokens(options: Options, *number: int) -> dict[str, int]:
    """`max_tokens` of a line, or of one of its later turns, if any was asked for."""
    if options.output_tokens is None:
        return {}
    mean, stdev = options.output_tokens
    drawn = stream(options.seed, "output", *number).gauss(mean, stdev) if stdev else mean
    return {"max_tokens": max(1, round(drawn))}


def line_of(options: Options, number: int, prompt: Prompt) -> str:
    fields: dict[str, Any] = {"text": prompt.text}
    if prompt.later:
        fields = {"turns": turns_of(options, number, prompt)}
    if prompt.input_tokens is not None and prompt.later:
        fields["turn_tokens"] = [turn.input_tokens for turn in (prompt, *prompt.later)]
    elif prompt.input_tokens is not None:
        fields["input_tokens"] = prompt.input_tokens
    if prompt.prefix_tokens is not None:
        fields["prefix_tokens"] = prompt.prefix_tokens
    if prompt.group is not None:
        fields["prefix_group"] = prompt.group
    if prompt.timestamp is not None:
        fields.update(timestamp=prompt.timestamp, max_tokens=prompt.max_tokens)
    elif not prompt.later:
        fields.update(drawn_output_tokens(options, number))
    return json.dumps(fields, ensure_ascii=False) + "\n"


def turns_of(options: Options, number: int, prompt: Prompt) -> list[dict[str, Any]]:
    """The turns of a session, with the pause before each but the first."""
    turns: list[dict[str, Any]] = [{"content": prompt.text, **drawn_output_tokens(options, number)}]
    for place, turn in enumerate(prompt.later, 1):
        turns.append({"content": turn.text, **drawn_output_tokens(options, number, place)})
        if options.delay_ms is not None:
            turns[-1]["delay_ms"] = options.delay_ms
    return turns


def file_safe(name: str) -> str:
    """What is left of a name in a file's name: letters, digits, and at most the last 80 bytes of them."""
    safe = re.sub(r"[^\w.-]+", "-", name).encode("utf-8", "replace")[-80:].decode("utf-8", "ignore")
    return safe.strip("-._")


def file_stem(options: Options) -> str:
    """Prompt count, target, overlap and tokenizer, then what else was given: other options make another file."""
    target = "natural" if options.approx_input_tokens is None else options.approx_input_tokens
    safe = file_safe(options.tokenizer_model) or "tokenizer"
    parts = [f"requests_{options.count}_tokens{target}_overlap{float(options.prefix_overlap)}_{safe}"]
    if options.from_trace:
        parts = [f"requests_{options.count}_trace_{file_safe(options.from_trace.stem)}_{safe}"]
    for name, short in NAMED_OPTIONS.items():
        value = vars(options).get(name)
        if value not in (None, getattr(Options, name)):
            numbers = value if isinstance(value, tuple) else (value,)
            parts.append(short + "-".join(f"{each:g}" if isinstance(each, float) else str(each) for each in numbers))
    return "_".join(parts)


def closing_table(options: Options, tally: Tally, path: Path) -> str:
    rows = [f"{tally.prompts} prompts in {path}"]
    prefix = tally.prefix.describe()
    if prefix:
        rows.append(f"{'tokens':<12}{'min':>9}{'mean':>12}{'max':>9}")
        for name, lengths in (("asked", tally.asked), ("reached", tally.reached), ("later turns", tally.later)):
            row = lengths.describe()
            if row:
                rows.append(f"{name:<12}{row['min']:>9}{row['mean']:>12.1f}{row['max']:>9}")
        rows.append(f"exact: {tally.exact} of {tally.texts} ({tally.exact / tally.texts:.1%})")
    if options.from_trace:
        share = tally.prefix.total() / tally.reached.total()
        rows.append(f"shared with earlier lines: {share:.1%} of all tokens, the most a prefix cache can spare")
    elif prefix:
        wanted = exact_floor(options.prefix_overlap, options.approx_input_tokens or 0)
        where = f" in each of {options.prefix_groups} groups" if options.prefix_groups > 1 else ""
        rows.append(f"shared prefix: asked {wanted} tokens, reached {prefix['min']}{where}")
    rows.append(f"seed: {options.seed}")
    return "\n".join(rows)


def manifest(options: Options, tally: Tally, about: Optional[dict[str, Any]]) -> dict[str, Any]:
    """What the file is and how to make it again; never the token."""
    target = options.approx_input_tokens
    asked = {name: getattr(options, name) for name in Options.__annotations__ if name not in UNRECORDED_OPTIONS}
    asked.update(prefix_overlap=float(options.prefix_overlap))
    asked.update(token_tolerance=options.tolerated(target) if target else None)
    asked.update(tokenizer_model=options.tokenizer_model if about else None)
    asked.update(from_trace=options.from_trace and str(options.from_trace))
    prefix = tally.prefix.describe()
    return {
        "generator": {"name": PROGRAM, "version": __version__, "python": platform.python_version()},
        "options": asked,
        "tokenizer": about,
        "prompts": tally.prompts,
        "asked_tokens": tally.asked.describe(),
        "input_tokens": tally.reached.describe(),
        "exact_prompts": tally.exact if about else None,
        "prefix_tokens": None if prefix is None else prefix if options.from_trace else prefix["min"],
        "later_turn_tokens": tally.later.describe(),
    }


# === 7. Tokenizers ===


def need(module: str) -> Any:
    """Import a package when it is first needed, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise Refused(f"{package} cannot be imported ({error}) - pip install {package}") from None


def note(message: str) -> None:
    print(f"{PROGRAM}: {message}", file=sys.stderr)


def reason(error: BaseException) -> str:
    """The first line of an error, or of the one it was caused by, in one piece."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).strip().split("\n")[0].split())
    return (text if len(text) <= 160 else text[:157] + "...") or type(error).__name__


class TransformersEncoder:
    """A tokenizer of `transformers`; its compiled backend, where it has one, encodes batches on all cores."""

    def __init__(self, tokenizer: Any, about: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        vocabulary = tokenizer.get_vocab()
        self._special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self._ids = sorted(set(vocabulary.values()) - self._special)
        self._in_parts: Optional[bool] = None  # whether the chat template wants a content in parts
        digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode("ascii")).hexdigest()
        self.about = {
            **about,
            "class": type(tokenizer).__name__,
            "fast": tokenizer.is_fast,
            "vocabulary": len(vocabulary),
            "vocabulary_sha256": digest,
            "transformers": need("transformers").__version__,
            "tokenizers": need("tokenizers").__version__,
        }

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is not None:
            return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return list(self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])

    def chat(self, texts: Sequence[str]) -> list[list[int]]:
        if self._in_parts is None:
            self._in_parts = self._wants_parts()
        return self.encode(self._render(texts, self._in_parts))

    def _wants_parts(self) -> bool:
        """Try the template out; servers, too, send a list of parts to a template that drops a plain string."""
        need("jinja2")
        if not self._tokenizer.chat_template:
            raise Refused("the tokenizer has no chat template - use --count-as raw, or the tokenizer of a chat model")
        probe = "probe"
        for in_parts in (False, True):
            if probe in self._render([probe], in_parts)[0]:
                return in_parts
        raise Refused("the chat template leaves the user's message out - use --count-as raw")

    def _render(self, texts: Sequence[str], in_parts: bool) -> list[str]:
        contents = [[{"type": "text", "text": text}] if in_parts else text for text in texts]
        chats = [[{"role": "user", "content": content}] for content in contents]
        try:
            return list(self._tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            raise Refused(f"the chat template fails: {reason(error)} - use --count-as raw") from None

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        lists = [list(ids) for ids in sequences]
        if self._backend is not None:
            return list(self._backend.decode_batch(lists, skip_special_tokens=False))
        return [self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in lists]

    def ids(self) -> list[int]:
        return self._ids

    def pieces(self, ids: Sequence[int]) -> list[Optional[str]]:
        names = self._tokenizer.convert_ids_to_tokens(list(ids))
        texts = self.decode([[each] for each in ids])
        return [text if self._ordinary(each, name, text) else None for each, name, text in zip(ids, names, texts)]

    def _ordinary(self, each: int, name: Any, text: str) -> bool:
        fallback = isinstance(name, str) and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name)
        return each not in self._special and not fallback and text.isprintable() and "\ufffd" not in text


class TiktokenEncoder:
    """OpenAI's encodings."""

    def __init__(self, encoding: Any, about: dict[str, Any]) -> None:
        self._encoding = encoding
        version = getattr(need("tiktoken"), "__version__", None)
        self.about = {**about, "vocabulary": encoding.n_vocab, "tiktoken": version}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if sum(map(len, texts)) < THREADS_PAY_CHARS * len(texts):
            return [self._encoding.encode_ordinary(text) for text in texts]
        return list(self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1))

    def chat(self, texts: Sequence[str]) -> list[list[int]]:
        """By OpenAI's published count: what is set around a message has no ids that could be known."""
        head, tail = [-1] * OPENAI_CHAT_HEAD_TOKENS, [-1] * OPENAI_CHAT_TAIL_TOKENS
        return [head + ids + tail for ids in self.encode(texts)]

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        return [self._encoding.decode(list(ids)) for ids in sequences]

    def ids(self) -> list[int]:
        special = {self._encoding.encode_single_token(name) for name in self._encoding.special_tokens_set}
        return [each for each in range(self._encoding.n_vocab) if each not in special]

    def pieces(self, ids: Sequence[int]) -> list[Optional[str]]:
        return [self._piece(each) for each in ids]

    def _piece(self, each: int) -> Optional[str]:
        try:
            text: str = self._encoding.decode_single_token_bytes(each).decode("utf-8")
        except (KeyError, UnicodeDecodeError):  # a hole in the numbering, or part of a character
            return None
        return text if text.isprintable() else None


def quiet_transformers() -> Any:
    """The package, without its remarks: what matters of them is in the errors it raises."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    return need("transformers")


def from_path(options: Options) -> Encoder:
    """A directory as `save_pretrained` leaves it or with a tokenizer.json alone, or such a file by itself."""
    path = Path(options.tokenizer_model).expanduser()
    about = {"kind": "path", "name": str(path)}
    directory = path.parent if path.name == "tokenizer.json" else path
    if directory.is_file():
        return TransformersEncoder(quiet_transformers().PreTrainedTokenizerFast(tokenizer_file=str(path)), about)
    configured = any((directory / name).exists() for name in ("tokenizer_config.json", "config.json"))
    loader = quiet_transformers().AutoTokenizer if configured else quiet_transformers().PreTrainedTokenizerFast
    found = loader.from_pretrained(str(directory), local_files_only=True, trust_remote_code=options.trust_remote_code)
    return TransformersEncoder(found, about)


def from_tiktoken(options: Options) -> Encoder:
    name = need("tiktoken.model").encoding_name_for_model(options.tokenizer_model)
    return TiktokenEncoder(need("tiktoken").get_encoding(name), {"kind": "tiktoken", "name": name})


def from_hub(options: Options) -> Encoder:
    """First what is cached on this machine: without a network, asking the Hub takes minutes."""
    load = functools.partial(
        quiet_transformers().AutoTokenizer.from_pretrained,
        options.tokenizer_model,
        token=options.huggingface_token or os.environ.get(TOKEN_VARIABLES[0]) or None,
        trust_remote_code=options.trust_remote_code,
    )
    about = {"kind": "huggingface", "name": options.tokenizer_model}
    offline = need("huggingface_hub.constants").HF_HUB_OFFLINE
    try:
        cached = load(local_files_only=True)
        if cached.chat_template or options.count_as == "raw" or offline:
            return TransformersEncoder(cached, about)
    except Exception:
        if offline:
            raise
    note(f"tokenizer: asking the Hugging Face Hub for {options.tokenizer_model}")
    return TransformersEncoder(load(), about)


def is_openai(name: str) -> bool:
    """Whether tiktoken knows the name; `gpt2` is a repository on the Hub, too, and means that one."""
    try:
        return name != "gpt2" and bool(importlib.import_module("tiktoken.model").encoding_name_for_model(name))
    except ImportError:
        if re.match(r"(gpt-|chatgpt-|o\d)", name):  # no name on the Hub is like that
            need("tiktoken")
        return False
    except KeyError:
        return False


def load_tokenizer(options: Options) -> Encoder:
    """An existing path, else a model of OpenAI's, else a name on the Hugging Face Hub."""
    if Path(options.tokenizer_model).expanduser().exists():
        load, kind, cure = (
            from_path,
            "the path",
            "it needs a tokenizer.json, or what AutoTokenizer.from_pretrained loads",
        )
    elif is_openai(options.tokenizer_model):
        load, kind, cure = from_tiktoken, "OpenAI's tokenizer", "connect, or fill tiktoken's cache (TIKTOKEN_CACHE_DIR)"
    else:
        load, kind, cure = from_hub, "no such path; the Hugging Face name", HUB_CURE
    try:
        return load(options)
    except (KeyboardInterrupt, SystemExit, Refused):
        raise
    except BaseException as error:  # the libraries raise what they like, panics of compiled code included
        why = reason(error)
        if "trust_remote_code" in str(error):
            why, cure = "it is loaded by code of its own repository", "read that code, then pass --trust-remote-code"
        for secret in filter(None, (options.huggingface_token, *map(os.environ.get, TOKEN_VARIABLES))):
            why = why.replace(secret, "***")
        raise Refused(f"{kind} {options.tokenizer_model!r} does not load: {why} - {cure}") from None


# === 8. Making prompts ===


class Anchor(NamedTuple):
    """A word with known ids, between two of which another word is measured."""

    text: str
    first_ids: list[int]
    later_ids: list[int]


class Vocabulary:
    """Finds the words of a tokenizer that can be strung together without changing their ids."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._usable: dict[int, bool] = {}

    def kit(self, measure: Measure, wanted: int) -> Kit:
        anchor, words = self._words(wanted)
        chosen = best_words(words, wanted)
        names = dict.fromkeys(text for word in chosen for text in (word.text, word.text.capitalize()))
        starters, head, tail_tokens = self._starters(measure, anchor, list(names))
        if not chosen or not starters:
            raise Refused("the vocabulary holds no plain words to build prompts from - use another tokenizer")
        return Kit(chosen, starters, head, tail_tokens)

    def _words(self, wanted: int) -> tuple[Anchor, list[Word]]:
        """Words in order of their ids, the frequent ones first, until enough are found."""
        found: dict[tuple[int, ...], Word] = {}
        names: dict[str, None] = {}
        anchor: Optional[Anchor] = None
        ids = self._encoder.ids()
        for start in range(0, len(ids), CANDIDATES_PER_BATCH):
            fresh = self._names(ids[start : start + CANDIDATES_PER_BATCH], names)
            anchor = anchor or self._anchor(fresh)
            if anchor:
                found.update((w.ids, w) for w in self._measured(anchor, fresh) if w.ids not in found)
            good = Counter(alphabet(w.text) for w in found.values() if len(w.ids) == 1 and not roughness(w))
            if max(good.values(), default=0) >= wanted:
                break
        if anchor is None:
            raise Refused("the vocabulary holds no plain words to build prompts from - use another tokenizer")
        if sum(len(ids) == 1 for ids in found) < FEW_WORDS:
            usual = main_alphabet(names)
            syllables = sorted(names, key=lambda name: (alphabet(name) != usual, len(name)))[:FEW_WORDS]
            extra = [name for name in pseudo_words(syllables, wanted) if name not in names]
            found.update((w.ids, w) for w in self._measured(anchor, extra) if w.ids not in found)
        return anchor, list(found.values())

    def _names(self, ids: Sequence[int], known: dict[str, None]) -> list[str]:
        """The plain words among these tokens that are not yet known."""
        fresh = []
        for piece in self._encoder.pieces(ids):
            name = plain_word(piece)
            if name is not None and name not in known:
                known[name] = None
                fresh.append(name)
        return fresh

    def _anchor(self, names: Sequence[str]) -> Optional[Anchor]:
        once, twice, thrice = (
            self._encoder.encode([" ".join([name] * times) for name in names]) for times in (1, 2, 3)
        )
        for name, one, two, three in zip(names, once, twice, thrice):
            later = two[len(one) :]
            if one and later and two == one + later and three == one + later + later and self._clean(later):
                return Anchor(name, one, later)
        return None

    def _measured(self, anchor: Anchor, names: Sequence[str]) -> list[Word]:
        """Those names that, between two anchors, leave both anchors as they are."""
        first, later = anchor.first_ids, anchor.later_ids
        measured = []
        for name, ids in zip(names, self._encoder.encode([f"{anchor.text} {n} {anchor.text}" for n in names])):
            inner = ids[len(first) : len(ids) - len(later)]
            if ids == first + inner + later and len(inner) <= MAX_WORD_TOKENS:
                measured.append(Word(name, tuple(inner)))
        return self._faithful(measured)

    def _starters(self, measure: Measure, anchor: Anchor, names: list[str]) -> tuple[list[Word], list[int], int]:
        """Words as a text may begin, and what a chat template sets before and behind every text."""
        measured = measure([f"{name} {anchor.text}" for name in names])
        head = common_start(measured)
        tail = len(common_start([ids[::-1] for ids in measured]))
        words = [Word(name, tuple(ids[len(head) : len(ids) - tail])) for name, ids in zip(names, measured)]
        short = sorted((w for w in self._faithful(words) if len(w.ids) <= MAX_WORD_TOKENS), key=roughness)
        return short, head, tail - len(anchor.later_ids)

    def _faithful(self, words: Sequence[Word]) -> list[Word]:
        """Words whose ids are all ordinary tokens and are decoded to the word again."""
        clean = [word for word in words if word.ids and self._clean(word.ids)]
        decoded = self._encoder.decode([word.ids for word in clean])
        return [word for word, text in zip(clean, decoded) if text.strip() == word.text]

    def _clean(self, ids: Sequence[int]) -> bool:
        unknown = [each for each in ids if each not in self._usable]
        for each, piece in zip(unknown, self._encoder.pieces(unknown)):
            self._usable[each] = piece is not None
        return all(self._usable[each] for each in ids)


def common_start(sequences: Sequence[list[int]]) -> list[int]:
    """The longest start that all sequences share: that of the least and the greatest."""
    least, greatest = min(sequences, default=[]), max(sequences, default=[])
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(least, greatest))
    return [pair[0] for pair in same]


class SharedPrefix(NamedTuple):
    text: str
    ids: list[int]


@dataclass
class Draft:
    """A prompt in the making."""

    number: int
    target: int
    length: int  # asked of the composer: the target, corrected by what earlier attempts were off
    take: int = 0
    parting_id: Optional[int] = None  # the one after the shared prefix
    best: Optional[Prompt] = None


class ExactPrompts:
    """Composes, measures the final text, and repairs until it is exact."""

    def __init__(self, options: Options, kit: Kit, measure: Measure) -> None:
        self._options, self._kit, self._measure = options, kit, measure
        self._composer = Composer(options, kit)
        self._partings: dict[int, set[Optional[int]]] = {}  # per group, the ids seen after its prefix
        assert options.approx_input_tokens is not None
        self.batch = max(1, min(MAX_BATCH_PROMPTS, BATCH_TOKENS // options.approx_input_tokens))
        kept = max(16, CACHED_PREFIX_TOKENS // (self._composer.prefix_tokens + 1))
        self._shared = functools.lru_cache(maxsize=kept)(self._new_shared)

    def make(self, numbers: Sequence[int]) -> list[Prompt]:
        drafts = []
        for number in numbers:
            target = self._composer.target(number)
            drafts.append(Draft(number, target, target))
        pending = drafts
        for attempt in range(1, ATTEMPTS):
            self._try(pending)
            pending = [draft for draft in pending if not finished(draft)]
            if not pending:
                break
            for draft in pending if attempt % ATTEMPTS_PER_TAKE == 0 else ():
                draft.take, draft.length = draft.take + 1, draft.target
        for draft in pending:
            self._settle(draft)
        for draft in drafts:
            seen = self._partings.setdefault(draft.number % self._options.prefix_groups, set())
            if len(seen) < 2:  # enough to know
                seen.add(draft.parting_id)
        if numbers[-1] == self._options.count - 1:
            self._check_partings()
        return [draft.best for draft in drafts if draft.best]

    def _check_partings(self) -> None:
        """Every group must part right after its prefix, be it in two of its prompts."""
        lone = self._options.count - self._options.prefix_groups  # groups up to here have a second prompt
        for group, partings in self._partings.items():
            if len(partings) < 2 and group < lone and not self._composer.whole:
                raise Refused(
                    f"all prompts of group {group} agree on more than {self._composer.prefix_tokens} tokens - "
                    "use another --seed or --prefix-overlap"
                )

    def _try(self, drafts: Sequence[Draft]) -> None:
        """Compose and measure once; what is off corrects the next attempt."""
        texts = [self._text(draft) for draft in drafts]
        for draft, text, ids in zip(drafts, texts, self._measure(texts)):
            off = len(ids) - draft.target
            if not self._starts_right(draft, ids):
                draft.take += 1
                continue
            if draft.best is None or abs(off) < abs((draft.best.input_tokens or 0) - draft.target):
                group = draft.number % self._options.prefix_groups
                draft.best = Prompt(text, group, draft.target, len(ids), self._composer.prefix_tokens)
            draft.length -= off

    def _settle(self, draft: Draft) -> None:
        off = None if draft.best is None else (draft.best.input_tokens or 0) - draft.target
        if off is None or abs(off) > self._options.tolerated(draft.target):
            why = "its shared prefix does not hold" if off is None else f"the nearest is {off:+d} tokens off"
            raise Refused(
                f"prompt {draft.number} of {draft.target} tokens cannot be made: {why} - "
                "ask for another length or overlap, or allow more --token-tolerance"
            )

    def _text(self, draft: Draft) -> str:
        composer, group = self._composer, draft.number % self._options.prefix_groups
        if composer.whole:
            return self._shared(group).text
        try:
            suffix, head = composer.suffix(draft.number, draft.length, draft.take)
        except Refused:
            if draft.length == draft.target:
                raise
            draft.length, draft.take = draft.target, draft.take + 1  # corrected beyond what can be
            suffix, head = composer.suffix(draft.number, draft.length, draft.take)
        draft.parting_id = head.ids[composer.lead]
        return f"{self._shared(group).text} {suffix}" if composer.has_prefix else suffix

    def _starts_right(self, draft: Draft, ids: list[int]) -> bool:
        """The group's prefix, and then at once the word that parts this prompt from the others."""
        composer = self._composer
        if composer.whole:
            return True
        shared = self._shared(draft.number % self._options.prefix_groups).ids if composer.has_prefix else self._kit.head
        place = composer.prefix_tokens
        return ids[:place] == shared and ids[place : place + 1] == [draft.parting_id]

    def _new_shared(self, group: int) -> SharedPrefix:
        """A prefix of exactly the right length, measured in front of a word that may follow it."""
        composer, extra, take = self._composer, 0, 0
        place = composer.prefix_tokens
        for attempt in range(1, ATTEMPTS + 1):
            follower = Word("", ()) if composer.whole else composer.head(group, take)
            text = composer.prefix(group, extra, take)
            ids = self._measure([f"{text} {follower.text}".rstrip()])[0]
            after = 0 if composer.whole else len(follower.ids) - composer.lead + self._kit.tail_tokens
            off = len(ids) - place - after
            if not off and (composer.whole or ids[place] == follower.ids[composer.lead]):
                return SharedPrefix(text, ids[:place])
            extra -= off
            if not off or attempt % ATTEMPTS_PER_TAKE == 0:
                extra, take = 0, take + 1
        raise Refused(
            f"a shared prefix of exactly {place} tokens cannot be made with this tokenizer - "
            "use another --prefix-overlap or --approx-input-tokens"
        )


def finished(draft: Draft) -> bool:
    return draft.best is not None and draft.best.input_tokens == draft.target


class Sessions:
    """Several turns a line: the first from one maker, the later ones, which share nothing, from another."""

    def __init__(self, options: Options, first: Maker, later: Maker) -> None:
        self._first, self._later, self._more = first, later, options.turns - 1
        self.batch = max(1, min(first.batch, later.batch // self._more))

    def make(self, numbers: Sequence[int]) -> list[Prompt]:
        later = iter(self._later.make(range(numbers[0] * self._more, (numbers[-1] + 1) * self._more)))
        first = self._first.make(numbers)
        return [replace(prompt, later=tuple(itertools.islice(later, self._more))) for prompt in first]


def later_turns(options: Options) -> Options:
    """What is asked of the texts of all later turns: no shared prefix, and the text alone counted."""
    given = dict(vars(options), count=options.count * (options.turns - 1), prefix_overlap=Decimal(0), prefix_groups=1)
    for name in ("count_as", "input_tokens_stdev", "min_input_tokens", "max_input_tokens"):
        given.pop(name, None)
    tokens = options.turn_tokens or options.approx_input_tokens
    assert options.seed is not None
    return Options(**{**given, "approx_input_tokens": tokens, "seed": -1 - options.seed})


def kit_of(encoder: Encoder, options: Options) -> tuple[Kit, Measure]:
    measure = encoder.chat if options.count_as == "chat" else encoder.encode
    wanted = min(MAX_WORDS, max(MIN_WORDS, 4 * options.group_prompts, 4 * options.prefix_groups))
    return Vocabulary(encoder).kit(measure, wanted), measure


def exact_maker(encoder: Encoder, options: Options) -> ExactPrompts:
    return ExactPrompts(options, *kit_of(encoder, options))


# === 9. Traces ===


def read_trace(path: Path, limit: Optional[int], block_tokens: int) -> list[TraceLine]:
    """The lines of a Mooncake trace: {"timestamp": ms, "input_length", "output_length", "hash_ids": [...]}."""
    chains = Chains(block_tokens)
    lines: list[TraceLine] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(itertools.islice(filter(str.strip, file), limit), 1):
                try:
                    lines.append(chains.line(json.loads(text), number))
                    if len(lines) > 1 and lines[-1].timestamp < lines[-2].timestamp:
                        raise ValueError("its timestamp is before that of the request above - sort the trace")
                except (ValueError, TypeError, KeyError) as error:
                    why = f"no {error}" if isinstance(error, KeyError) else str(error)
                    why = why if " - " in why else f"{why} - see docs/generate_requests.md for the fields"
                    raise Refused(f"{path}, request {number}: {why}", 2) from None
    except (OSError, UnicodeError) as error:
        raise Refused(f"cannot read the trace {path}: {reason(error)} - give a file of JSON lines", 2) from None
    if not lines:
        raise Refused(f"the trace {path} is empty - give a file of JSON lines", 2)
    return lines


def number_in(row: dict[str, Any], name: str, least: float, kinds: tuple[type, ...] = (int,)) -> Any:
    value = row[name]
    if type(value) not in kinds or not least <= value <= MAX_TRACE_NUMBER[name]:
        raise ValueError(f"{name} is {json.dumps(value)[:40]}, not a number from {least} to {MAX_TRACE_NUMBER[name]}")
    return value


class Chains:
    """Reads the lines of a trace in order, and numbers each block after the ones before it."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._chains: dict[tuple[int, str], int] = {}
        self._places: dict[str, int] = {}
        self._followers: Counter[int] = Counter()

    def line(self, row: Any, number: int) -> TraceLine:
        if not isinstance(row, dict):
            raise ValueError("it is no JSON object")
        timestamp, tokens = number_in(row, "timestamp", 0, (int, float)), number_in(row, "input_length", 1)
        blocks = self._blocks(self._names(row.get("hash_ids") or [], tokens, number))
        return TraceLine(timestamp, tokens, number_in(row, "output_length", 0), blocks)

    def _names(self, hash_ids: Any, tokens: int, number: int) -> list[str]:
        """A name for each block; what has no hash is shared with nobody."""
        blocks = -(-tokens // self._block_tokens)
        if not isinstance(hash_ids, list):
            raise ValueError("hash_ids is no list")
        if hash_ids and not blocks - 1 <= len(hash_ids) <= blocks:
            raise ValueError(
                f"{len(hash_ids)} hash_ids do not fit {tokens} tokens, which are {blocks} blocks of "
                f"{self._block_tokens} - give the trace's own --block-tokens"
            )
        own = range(len(hash_ids), blocks)
        return [json.dumps(each) for each in hash_ids] + [f"own {number} {place}" for place in own]

    def _blocks(self, names: list[str]) -> list[Block]:
        found, chain = [], 0
        for name in names:
            if name not in self._places:
                self._places[name] = self._followers[chain]
                self._followers[chain] += 1
            chain = self._chains.setdefault((chain, name), len(self._chains) + 1)
            found.append(Block(name, self._places[name], chain))
        return found


class TracePrompts:
    """Prompts put together from blocks: equal names are equal token ids, different ones differ at once."""

    def __init__(self, options: Options, kit: Kit, measure: Measure, lines: Sequence[TraceLine]) -> None:
        self._seed, self._block_tokens, self._kit = options.seed, options.block_tokens, kit
        self._measure, self._lines = measure, lines
        rng = stream(options.seed, "words")
        words = shuffled(kit.words, rng)
        self._supply, self._ids = Supply(words), {word.text: word.ids for word in words}
        after, start = joints(words)[0], joints(shuffled(kit.starters, rng))[0]
        self._heads = different_first(after.words, after.lead)
        self._starters = different_first(start.words, start.lead)
        self._seen: dict[int, int] = {}  # by chain: how many tokens of its last block earlier lines have
        self._complete: set[tuple[int, int]] = set()  # chain and length of earlier prompts
        self.batch = max(1, min(MAX_BATCH_PROMPTS, BATCH_TOKENS // max(line.input_length for line in lines)))

    def make(self, numbers: Sequence[int]) -> list[Prompt]:
        drafts = [self._draft(number) for number in numbers]
        for number, draft, ids in zip(numbers, drafts, self._measure([draft.text for draft, _ in drafts])):
            planned = draft[1]
            if ids[: len(planned)] != planned or len(ids) != self._lines[number].input_length:
                raise Refused(
                    f"request {number + 1} of the trace is not encoded block by block: this tokenizer joins words "
                    "across spaces - use another one"
                )
        return [draft for draft, _ in drafts]

    def _draft(self, number: int) -> tuple[Prompt, list[int]]:
        """A prompt, and the token ids it must have up to what the chat template sets behind it."""
        line, ids = self._lines[number], list(self._kit.head)
        texts: list[str] = []
        end, shared, alike = line.input_length - self._kit.tail_tokens, 0, number > 0
        if end <= len(ids):
            raise Refused(
                f"request {number + 1} of the trace has {line.input_length} tokens, of which the chat template takes "
                f"{len(ids) + self._kit.tail_tokens} - use --count-as raw"
            )
        for index, block in enumerate(line.blocks):
            tokens = min(end, (index + 1) * self._block_tokens) - len(ids)
            if tokens <= 0:
                continue
            words = self._words(block, tokens, not texts)
            if alike:
                shared = len(ids) + self._seen_of(block, words, not texts)
                alike = shared == len(ids) + tokens
            self._seen[block.chain] = max(tokens, self._seen.get(block.chain, 0))
            texts += [word.text for word in words]
            ids += ids_of(words)
        complete = (line.blocks[-1].chain, line.input_length)
        shared = line.input_length if complete in self._complete else shared
        self._complete.add(complete)
        prompt = Prompt(
            " ".join(texts),
            asked_tokens=line.input_length,
            input_tokens=line.input_length,
            prefix_tokens=shared,
            max_tokens=max(1, line.output_length),
            timestamp=line.timestamp,
        )
        return prompt, ids

    def _seen_of(self, block: Block, words: Sequence[Word], first: bool) -> int:
        """How many of the tokens of these words an earlier line has in this place."""
        seen = self._seen.get(block.chain, 0)
        return len(common_start([ids_of(words), ids_of(self._words(block, seen, first))])) if seen else 0

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one object a run
    def _words(self, block: Block, tokens: int, first: bool) -> list[Word]:
        """The words of a block; with fewer tokens, as a rule the same words up to there."""
        heads = self._starters if first else self._heads
        turned = itertools.chain(heads[block.place % len(heads) :], heads)
        head = next((word for word in turned if self._supply.ways(tokens - len(word.ids))), None)
        if head is None:
            raise Refused(f"no words of this vocabulary make {tokens} tokens - use another tokenizer")
        rest, rounds = tokens - len(head.ids), block.place // len(heads)
        part = self._supply.unique_part(rest, rounds + 1) or 0
        names = self._supply.nth(rounds, part) if part else []
        names += self._supply.fill(rest - part, stream(self._seed, "block", block.name))
        return [head, *(Word(name, self._ids[name]) for name in names)]


def ids_of(words: Iterable[Word]) -> list[int]:
    return [each for word in words for each in word.ids]


def trace_maker(encoder: Encoder, options: Options) -> TracePrompts:
    return TracePrompts(options, *kit_of(encoder, options), options.trace)


# === 10. The corpus file ===


class CorpusFile:
    """Written under a temporary name beside its final one; takes the final name only when all is on disk."""

    def __init__(self, directory: Path, stem: str) -> None:
        self.path = directory / f"{stem}.jsonl"
        self.meta_path = directory / f"{stem}.meta.json"
        self._temporary = directory / f".{stem}.{os.urandom(4).hex()}.part"
        self._made: list[Path] = []
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._file: Any = None

    def refuse_if_there(self) -> None:
        for path in (self.path, self.meta_path):
            if os.path.lexists(path):
                raise Refused(f"{path} exists and is never overwritten - move it, or use another --output", 2)

    def open(self) -> None:
        directory = self.path.parent
        missing = list(itertools.takewhile(lambda p: not p.exists(), [directory, *directory.parents]))
        try:
            for path in reversed(missing):
                path.mkdir(exist_ok=True)
                self._made.append(path)
            self._file = open(self._temporary, "xb")  # noqa: SIM115 - open for the whole run
        except OSError as error:
            self.discard()
            raise Refused(f"cannot write in {directory}: {error.strerror} - use another --output", 2) from None

    def write(self, lines: Iterable[str]) -> None:
        data = "".join(lines).encode("utf-8")
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def publish(self, about: dict[str, Any]) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        facts = {"file": self.path.name, "bytes": self._bytes, "sha256": self._hash.hexdigest(), **about}
        meta = self._temporary.with_suffix(".meta")
        try:
            text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
            meta.write_bytes(text.encode("utf-8", "backslashreplace"))  # a path may be no text
            self.refuse_if_there()
            move_without_overwriting(self._temporary, self.path)
            try:
                move_without_overwriting(meta, self.meta_path)
            except BaseException:
                self.path.unlink()
                raise
        finally:
            if meta.exists():
                meta.unlink()
        self._made = []

    def discard(self) -> None:
        """Leave nothing behind that was not there before."""
        if self._file is not None:
            with suppress(OSError):  # what cannot be flushed is thrown away anyway
                self._file.close()
        with suppress(OSError):  # never made, or already renamed
            self._temporary.unlink()
        for directory in reversed(self._made):
            with suppress(OSError):  # somebody else has put something there
                directory.rmdir()


def move_without_overwriting(source: Path, target: Path) -> None:
    """A hard link fails where the target exists, a rename replaces it; some disks have only renames."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise Refused(f"{target} has appeared meanwhile and is not overwritten - use another --output") from None
    except OSError:
        os.rename(source, target)
    else:
        os.unlink(source)


class NoBar:
    """Stands in for a progress bar where tqdm is not installed."""

    def update(self, prompts: int) -> None: ...

    def close(self) -> None: ...


def progress_bar(total: int) -> Any:
    """Shown on stderr once a second has passed."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return NoBar()
    seldom = 0.2 if sys.stderr.isatty() else 10
    look = {"unit": "prompt", "file": sys.stderr, "dynamic_ncols": True}
    return tqdm(total=total, delay=PROGRESS_DELAY_S, mininterval=seldom, **look)


def write_corpus(options: Options, maker: Maker, corpus: CorpusFile) -> Tally:
    tally, bar, started = Tally(), progress_bar(options.count), time.monotonic()
    try:
        while tally.prompts < options.count:
            numbers = range(tally.prompts, min(options.count, tally.prompts + maker.batch))
            lines = []
            for number, prompt in zip(numbers, maker.make(numbers)):
                tally.add(prompt)
                lines.append(line_of(options, number, prompt))
            corpus.write(lines)
            bar.update(len(lines))
    finally:
        if time.monotonic() - started > PROGRESS_DELAY_S:
            bar.delay = 0  # else a bar that was not due for its first line would leave none
        bar.close()
    return tally


# === 11. Command line ===


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(message if " - " in message else f"{message} - see --help", 2)


def whole(least: int, what: str) -> Callable[[str], int]:
    """An argument type: a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number - give {what}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small - give {what}")
        return value

    return parse


def fraction(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("NaN")
    if not 0 <= value <= 1 if value.is_finite() else True:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no fraction - give a number from 0 to 1")
    return value


def token_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_TARGET_TOKENS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} - give a number of tokens from 0 to {MAX_TARGET_TOKENS}")
    return value


def mean_and_deviation(text: str) -> tuple[float, float]:
    mean, comma, stdev = text.partition(",")
    value = token_number(mean), token_number(stdev) if comma else 0.0
    if value[0] < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is too small - give at least 1 token, or MEAN,STDEV")
    return value


SOME = whole(1, "at least 1")
ARGUMENTS: dict[str, list[tuple[str, str, Any, str]]] = {  # by group: name, metavar, type or choices, help
    "Corpus": [
        ("--count", "N", SOME, "prompts (default 100)"),
        ("--output", "DIR", Path, "directory, made if missing (default outputs)"),
        ("--language", "{en,ja}", tuple(LANGUAGES), "of paragraphs (default en)"),
        ("--prefix-overlap", "X", fraction, "share of a prompt that is its group's prefix, 0 to 1 (default 0.0)"),
        ("--prefix-groups", "N", SOME, "distinct shared prefixes, dealt out to the prompts in turn (default 1)"),
        ("--output-tokens", "N[,S]", mean_and_deviation, "max_tokens of each line: fixed, or mean,stdev"),
        ("--turns", "N", SOME, "user turns of each line, a session (default 1: a prompt)"),
        ("--delay-ms", "D", whole(0, "0 or more"), "pause before each later turn"),
        ("--from-trace", "FILE", Path, "make the prompts of a Mooncake trace: lengths, shared blocks, times"),
        ("--block-tokens", "N", SOME, "tokens of a block of the trace (default 512)"),
        ("--seed", "N", whole(0, "0 or more"), "same seed and options: same bytes (default: a fresh one)"),
    ],
    "Lengths in tokens": [
        ("--approx-input-tokens", "N", SOME, "length of every prompt; without it: paragraphs, no tokenizer"),
        ("--input-tokens-stdev", "S", token_number, "spread the lengths normally around that mean"),
        ("--min-input-tokens", "N", SOME, "shortest length of the spread"),
        ("--max-input-tokens", "N", SOME, "greatest length of the spread"),
        ("--turn-tokens", "M", SOME, "length of each later turn, its text alone (default: like the first)"),
        ("--token-tolerance", "N", whole(0, "0 or more"), "widest deviation (default: 5, or 5%% if more)"),
        ("--count-as", "{raw,chat}", ("raw", "chat"), "the text alone, or in the chat template (default raw)"),
    ],
    "Tokenizer": [
        ("--tokenizer-model", "NAME", str, "path, OpenAI model or Hugging Face name (default gpt2)"),
        ("--trust-remote-code", "", bool, "run the code that the tokenizer's repository brings along"),
        ("--huggingface-token", "TOKEN", Secret, f"for gated repositories; better: ${', $'.join(TOKEN_VARIABLES)}"),
    ],
}


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, arguments in ARGUMENTS.items():
        group = parser.add_argument_group(title)
        for name, metavar, kind, about in arguments:
            if kind is bool:
                group.add_argument(name, action="store_true", help=about)
            elif isinstance(kind, tuple):
                group.add_argument(name, metavar=metavar, choices=kind, help=about)
            else:
                group.add_argument(name, metavar=metavar, type=kind, help=about)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def parsed(argv: Optional[Sequence[str]]) -> Options:
    """Unknown arguments are refused by name alone: the value of a misspelt option might be a token."""
    options, unknown = build_parser().parse_known_args(argv, Options())
    if unknown:
        names = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        what = f"unknown option {', '.join(names)}" if names else f"{len(unknown)} argument(s) without an option"
        raise Refused(f"{what} - see --help", 2)
    refuse_strays(options)
    if options.from_trace is None:
        check_lengths(options)
        check_sharing(options)
    else:
        options.trace = read_trace(options.from_trace, vars(options).get("count"), options.block_tokens)
        options.count = len(options.trace)
    return options


def refuse_strays(options: Options) -> None:
    """Options that mean nothing beside the others."""
    given = vars(options)
    for wrong, names, why in (
        (options.from_trace, [name for name in given if name not in WITH_A_TRACE], "is what the trace tells - drop it"),
        (options.from_trace is None, ["block_tokens"], "is that of a trace - add --from-trace"),
        (options.turns == 1, NEED_TURNS, "is about later turns - add --turns"),
        (
            not (options.approx_input_tokens or options.from_trace),
            NEED_A_LENGTH,
            "needs a length - add --approx-input-tokens",
        ),
        (options.approx_input_tokens, ["language"], "is that of paragraphs, which have no length in tokens - drop one"),
    ):
        stray = next((name for name in names if name in given), None)
        if wrong and stray:
            raise Refused(f"--{stray.replace('_', '-')} {why}", 2)


def check_lengths(ask: Options) -> None:
    """Options of a token target that contradict each other."""
    target, least, most = ask.approx_input_tokens, ask.min_input_tokens, ask.max_input_tokens
    if target is None:
        return
    greatest = max(target, most or 0, ask.turn_tokens or 0)
    if greatest > MAX_TARGET_TOKENS:
        raise Refused(f"{greatest} tokens are too many - give at most {MAX_TARGET_TOKENS}", 2)
    if (least or most) and not ask.input_tokens_stdev:
        raise Refused("--min-input-tokens and --max-input-tokens bound a spread - add --input-tokens-stdev", 2)
    if least and most and least > most:
        raise Refused(f"--min-input-tokens {least} is above --max-input-tokens {most} - swap them", 2)
    if not (least or 1) <= target <= (most or target):
        raise Refused(f"--approx-input-tokens {target} is outside its own minimum and maximum - move them apart", 2)


def check_sharing(ask: Options) -> None:
    """Shared prefixes that cannot be."""
    if ask.prefix_groups > ask.count:
        raise Refused(f"{ask.prefix_groups} groups need as many prompts - raise --count or lower --prefix-groups", 2)
    if ask.prefix_overlap == 1 and ask.prefix_groups < ask.count:
        raise Refused(
            "--prefix-overlap 1 makes the prompts of a group identical, which measures only a cache - "
            "give less than 1, or as many --prefix-groups as --count",
            2,
        )
    if ask.prefix_overlap == 1 and ask.input_tokens_stdev:
        raise Refused("--prefix-overlap 1 leaves no room for a spread - drop --input-tokens-stdev", 2)


def maker_of(options: Options) -> tuple[Maker, Optional[dict[str, Any]]]:
    """Who makes the prompts, and what is worth knowing of the tokenizer."""
    about: Optional[dict[str, Any]] = None
    make: Callable[[Options], Maker] = Paragraphs
    if options.approx_input_tokens is not None or options.trace:
        encoder = load_tokenizer(options)
        about = encoder.about
        note(f"tokenizer: {about['name']} ({about['kind']}, {about['vocabulary']} tokens)")
        make = functools.partial(trace_maker if options.trace else exact_maker, encoder)
    maker = make(options)
    return maker if options.turns == 1 else Sessions(options, maker, make(later_turns(options))), about


def generate(options: Options) -> str:
    """The whole run; returns the closing table."""
    corpus = CorpusFile(options.output, file_stem(options))  # a seed that was not given is not in the name
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**32)
    corpus.refuse_if_there()
    corpus.open()
    try:
        maker, about = maker_of(options)
        tally = write_corpus(options, maker, corpus)
        corpus.publish(manifest(options, tally, about))
    except BaseException:
        corpus.discard()
        raise
    return closing_table(options, tally, corpus.path)


def show(table: str) -> None:
    """Print the result; the corpus is written by now, so that nobody listening is no failure."""
    try:
        print(table.encode("utf-8", "backslashreplace").decode("utf-8"), flush=True)
    except (OSError, UnicodeError) as error:
        note(f"the corpus is written, but its summary could not be: {reason(error)}")
        with suppress(OSError):  # what print has buffered would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_on_signals() -> None:
    """A termination or a lost terminal clears up like Ctrl-C; what nohup has set to be ignored stays ignored."""

    def interrupt(_signal: int, _frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP"):  # Windows knows no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def main(argv: Optional[Sequence[str]] = None) -> int:
    try:
        end_on_signals()
        show(generate(parsed(argv)))
        return 0
    except Refused as error:
        message, code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, code = "interrupted, nothing written - start it again", 130
    except OSError as error:
        message, code = f"{error.strerror or error} - free some space, or use another --output", 1
    except Exception as error:
        message, code = f"unexpected {type(error).__name__}: {reason(error)} - please report it", 1
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
