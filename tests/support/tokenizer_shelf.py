"""Small tokenizers of every family, trained on the spot: nothing is downloaded."""

import itertools
import json
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LATIN = [
    "ka",
    "lo",
    "mi",
    "ren",
    "sto",
    "tra",
    "vel",
    "un",
    "dor",
    "pe",
    "sha",
    "win",
    "ter",
    "al",
    "gor",
    "ing",
]
CYRILLIC = ["ка", "ло", "ми", "рен", "сто", "тра", "вел", "ун", "дор", "пе", "ша", "вин", "тер", "ал", "ость"]
JAPANESE = "東京大阪山川田中日本水火木金土空海風花鳥月雨雪春夏秋冬朝夜人心手足目耳口かなのはをがにで"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>"]


def spaced_text(syllables, lines=1500):
    """Lines of words of two or three syllables, some far more frequent than others."""
    rng = random.Random(1)
    words = ["".join(parts) for parts in itertools.product(syllables, repeat=2)]
    words += ["".join(rng.choices(syllables, k=3)) for _ in range(1500)]
    weights = [1 / (place + 3) for place in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=30)) + "." for _ in range(lines)]


def unspaced_text():
    rng = random.Random(2)
    words = ["".join(rng.choices(JAPANESE, k=2)) for _ in range(600)]
    return ["".join(rng.choices(words, k=30)) + "。" for _ in range(800)]


def byte_level(text, size, digits_apart=False):
    tokenizer = Tokenizer(models.BPE())
    splitter: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits_apart:
        splitter = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splitter])
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    # what an instruction-tuned checkpoint brings along: a BOS of its own, truncation and padding
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    return tokenizer


def metaspace_bpe(text, size):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size + 256, special_tokens=specials, show_progress=False)
    learner.train_from_iterator(text, trainer)
    made = json.loads(learner.to_str())
    plain = json.loads(tokenizer.to_str())
    plain["model"].update(vocab=made["model"]["vocab"], merges=made["model"]["merges"])
    plain["added_tokens"] = [token for token in made["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(plain))


def metaspace_across_words(text, size):
    """Merges run over spaces, so that two words side by side may be fewer tokens than each on its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Metaspace()
    pairs = [" ".join(words) for line in text for words in zip(*[iter(line.split()[:-1])] * 3)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(pairs, trainer)
    return tokenizer


def metaspace_unigram(text, size):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def wordpiece(text, size):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


BUILDERS = {
    "byte-level": lambda: byte_level(spaced_text(LATIN), 2000),
    "byte-level-digits-apart": lambda: byte_level(spaced_text(LATIN), 1200, digits_apart=True),
    "byte-level-small": lambda: byte_level(spaced_text(LATIN), 512),
    "byte-level-bilingual": lambda: byte_level(spaced_text(LATIN) + spaced_text(CYRILLIC, 700), 4000),
    "byte-level-cyrillic": lambda: byte_level(spaced_text(CYRILLIC), 1500),
    "byte-level-japanese": lambda: byte_level(unspaced_text(), 1200),
    "bytes-only": lambda: byte_level(["a b c"], 261),
    "metaspace-bpe": lambda: metaspace_bpe(spaced_text(LATIN), 1500),
    "metaspace-across-words": lambda: metaspace_across_words(spaced_text(LATIN, 300), 3000),
    "metaspace-unigram": lambda: metaspace_unigram(spaced_text(LATIN), 1200),
    "metaspace-japanese": lambda: metaspace_unigram(unspaced_text(), 700),
    "wordpiece": lambda: wordpiece(spaced_text(LATIN), 1500),
}


class TokenizerShelf:
    """Directories with a tokenizer.json each, trained when first asked for."""

    def __init__(self, root):
        self._root = root

    def path(self, name):
        directory = self._root / name
        if not directory.exists():
            directory.mkdir()
            BUILDERS[name]().save(str(directory / "tokenizer.json"))
        return directory

    def chat(self, name):
        """The same tokenizer with a chat template beside it."""
        directory = self._root / f"{name}-chat"
        if not directory.exists():
            directory.mkdir()
            (directory / "tokenizer.json").write_bytes((self.path(name) / "tokenizer.json").read_bytes())
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": CHAT_TEMPLATE,
                "bos_token": "<s>",
                "eos_token": {"__type": "AddedToken", "content": "</s>"},
            }
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return directory

    def load(self, directory):
        """The bare library's view: no special tokens, nothing cut off, nothing padded."""
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
