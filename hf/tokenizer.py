"""hf/tokenizer.py: the tokenizer of a Hugging Face model folder, read from its files and run by tiktoken.

    tok = load_tokenizer("Qwen2.5-Math-1.5B")
    tok.prompt("What is 187+737?")       # token ids, in the form that this model was taught to be asked in
    tok.decode(answer)                   # text

With one token other than the model's own, the model reads a problem unlike those it learned to read, and nobody is told. So a
folder is read exactly, id for id what its own library (`tokenizers`) makes of a text, or it is refused by reason. Two programs
that both say "byte-level BPE" differ in three places:

    added tokens  `<|im_end|>` and the like are cut out of the text before all else, the longest first, and the text between
                  them is normalised piece by piece: an accent behind a token does not land on it. tiktoken knows none of it,
                  so it is done here
    splitting     what the pattern does not match is kept by the library and dropped by tiktoken: `_pattern` adds an
                  alternative that matches just that
    merging       the library merges the pairs that a list names, in the list's order; tiktoken merges any two neighbours whose
                  concatenation is a token, lowest rank first: `_ranks` numbers the tokens by the list, whatever their ids,
                  and shows for each of them that the two cannot differ

What remains is a matter of years. Both regular-expression engines agree on every code point's being a letter, a digit or a
space (tiktoken 0.14, tokenizers 0.23), but the library's NFC stands at Unicode 9 and Python's at 14 or later: combining marks of
the years between (Syriac U+07FD, Diacritics Extended U+1ABF, Dives Akuru U+11930 and a hundred more) are put in canonical order
here, and composed, while the library leaves them as they are. Left out: chat templates as programs; `FORMS` has the families'.
"""
import json
import re
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import tiktoken

from precision import InputError, nearest

# How a problem is put to the model: the system prompt, if there is one, and the user's message up to where the assistant begins.
FORMS = {
    "chatml": ("<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "r1": ("{}", "<｜User｜>{}<｜Assistant｜><think>\n"),
    "plain": ("", "{}"),
}
BEGIN = {"llama3": "<|begin_of_text|>", "r1": "<｜begin▁of▁sentence｜>"}                  # bos, where no post-processor says so
SIGNS = {"r1": "<｜User｜>", "llama3": "<|start_header_id|>", "chatml": "<|im_start|>"}   # R1-Distill-Llama has Llama's as well
FRAME = re.compile(r"(<\|\w+\|>|<｜\w+｜>|<think>)")                                      # the special tokens of a form

# GPT-2's alphabet: a printable byte is written as itself, each other byte as a character from U+0100 on. This is the way back,
# for str.translate; the characters of Latin-1 that are not in the alphabet go where encoding them as Latin-1 fails.
HIDDEN = [*range(33), *range(127, 161), 173]
TO_BYTE = {b: 0xFFFF for b in HIDDEN} | {256 + i: b for i, b in enumerate(HIDDEN)}
BYTES = [bytes([b]) for b in range(256)]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The syntax that means the same in Ruby's dialect, which the library reads, and in Rust's: no dot, no anchors, no sets of sets,
# one look-ahead, and "any case" only for English contractions, where no letter is the same as two others ("ss", sharp s).
SAME = re.compile(r"""
    (?: \(\?i:'s\|'t\|'re\|'ve\|'m\|'ll\|'d\) | \(\?!\\S\) | \(\?: | [)|] | [?*+] | \{\d+(,\d*)?\}(?![?*+])
      | \\[rnstS] | \\[pP]\{[LMNPSZ][a-z]?\} | \[\^?( \\[rnstS] | \\[pP]\{[LMNPSZ][a-z]?\} | [^][\\^&~-] )+\]
      | [^][\\^$.(){}?*+|&~#-] )+""", re.VERBOSE)
LONGEST = 900_000                # spaces in a row: with a million, tiktoken's engine runs out of stack and panics


class HFTokenizer:
    """Text <-> token ids. `load_tokenizer` makes one.

    n_vocab  largest id + 1
    stop     tuple of the ids that end an answer
    pad      an id that is none of `stop`. Masks in this program are made from lengths, so any such id will do
    bos      tuple of the ids that stand before a text, or ()
    form     how `prompt` puts a problem to the model: a key of FORMS
    """

    def __init__(self, spec):
        """spec: what a tokenizer.json holds. Raises InputError, with the reason, for what cannot be reproduced exactly."""
        model, added = spec["model"], {t["content"]: t for t in spec["added_tokens"]}
        if model.get("type", "BPE") != "BPE":
            raise InputError(f"a {model['type']} tokenizer, only byte-level BPE is supported")
        for option in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise InputError(f"BPE with {option}, only byte-level BPE is supported")
        self._nfc, self.bos = _is_nfc(spec.get("normalizer")), _before_text(spec.get("post_processor"))
        pattern = _pattern(spec.get("pre_tokenizer"))
        self._ids = _numbered(model["vocab"], spec["added_tokens"])                       # as the file spells it -> id
        words = _spelled(model["vocab"], added)                                           # as the file spells it -> bytes
        ranks = _ranks(words, model["merges"], model.get("ignore_merges", False), added)  # bytes -> rank
        id_of = {word: self._ids[key] for key, word in words.items()}
        self._of_rank = [id_of[word] for word in ranks]                                   # rank -> id
        self.encoding = tiktoken.Encoding("hf", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        # some added tokens are looked for in the text as it comes, others in the normalised text
        self._added = {t: self._ids[t] for t in added}
        self._raw = {t: i for t, i in self._added.items() if not added[t]["normalized"]}
        self._late = {self._normalize(t): i for t, i in self._added.items() if added[t]["normalized"]}
        self._cut_raw, self._cut_late = _cutter(self._raw), _cutter(self._late)
        if len(self._raw) + len(self._late) < len(spec["added_tokens"]):
            raise InputError("two added tokens are spelled alike")
        self._bytes = {i: word for word, i in id_of.items()} | {i: t.encode() for t, i in self._added.items()}
        self._bytes |= zip(self._of_rank, ranks)                                          # id -> bytes
        for i in {self._ids[t] for t in added if added[t]["special"]} & set(self._of_rank):
            raise InputError(f"the special token {self._bytes[i]!r} is also one that ordinary text is made of")
        if not self._bytes.keys() >= set(self.bos):
            raise InputError(f"the post-processor puts the tokens {self.bos} before a text, not all of them in the vocabulary")
        self.n_vocab, self.stop, self.pad = max(self._bytes) + 1, (), 0
        self.speak("plain")

    def speak(self, form):
        """Choose the form of `prompt`, a key of FORMS. Raises InputError if the vocabulary lacks one of its tokens."""
        for token in FRAME.findall("".join(FORMS[form]) + BEGIN.get(form, "")):
            if token not in self._added:
                raise InputError(f"the form {form} needs the token {token}, which the vocabulary does not have")
        if form in BEGIN and not self.bos:
            self.bos = (self._added[BEGIN[form]],)
        self.form = form
        self._frames = [[self._added[p] if FRAME.match(p) else p for p in FRAME.split(frame) if p] for frame in FORMS[form]]

    def encode(self, text):
        """Text -> list of ids, those of the library's `encode(text, add_special_tokens=False)`: a special or other added
        token that the text spells becomes this token."""
        out = []
        for i, part in enumerate(self._cut_raw(text)):                                    # every second one is a token
            if i % 2:
                out.append(self._raw[part])
                continue
            for j, piece in enumerate(self._cut_late(self._normalize(part))):
                out += [self._late[piece]] if j % 2 else self._merge(piece)
        return out

    def encode_ordinary(self, text):
        """Text -> list of ids. Text that spells a special or other added token is text like any other."""
        return self._merge(self._normalize(text))

    def decode(self, tokens):
        """Token ids (an iterable of ints) -> text, without a stop token at the end. Bytes that are no UTF-8, and ids that are
        no token, become U+FFFD; other special tokens are spelled out."""
        tokens = [int(t) for t in tokens]
        if tokens and tokens[-1] in self.stop:
            tokens.pop()
        return b"".join(self._bytes.get(t, b"\xef\xbf\xbd") for t in tokens).decode("utf-8", "replace")

    def prompt(self, text, system=""):
        """A user's message -> list of ids: bos and the family's chat form around `text`, up to where the assistant begins;
        form "plain": bos and `text` alone, where a system prompt raises InputError.

        A special token that `text` or `system` spells does not become one: nobody closes the user's turn from within. Other
        texts get the ids of what the family's chat template renders, with two reservations. The system prompt is the caller's:
        templates put in one of their own where none is given (Qwen2.5-Instruct "You are Qwen, created by Alibaba Cloud. You are
        a helpful assistant.", Qwen2.5-Math "Please reason step by step, and put your final answer within \\boxed{}.", Llama 3.1
        and later a header with dates, Qwen3 none). And nothing is stripped; Llama's templates strip spaces at both ends."""
        if system and self.form == "plain":
            raise InputError("the form plain has no place for a system prompt: put it in front of the text")
        out, (before, turn) = list(self.bos), self._frames
        for part, said in [(p, system) for p in before if system] + [(p, text) for p in turn]:
            out += [part] if isinstance(part, int) else self.encode_ordinary(part.replace("{}", said))
        return out

    def _normalize(self, text):
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def _merge(self, text):
        """Normalised text without added tokens -> list of ids."""
        if len(text) >= LONGEST and re.search(rf"\s{{{LONGEST}}}", text):
            raise InputError(f"a text with {LONGEST} spaces in a row")
        return [self._of_rank[rank] for rank in self.encoding.encode_ordinary(text)]


def load_tokenizer(folder, form="auto"):
    """The tokenizer of a model's folder (a path) -> HFTokenizer.

    form: a key of FORMS, or "auto": the one whose tokens the vocabulary has, "plain" where the folder has no chat template.
    Raises InputError, one line, for a file that is missing or malformed, a tokenizer that cannot be reproduced exactly, a
    folder that does not say which token ends an answer, and a form that this vocabulary cannot spell."""
    folder, config = Path(folder), {}
    with _reading(folder / "tokenizer.json") as path:
        tok = HFTokenizer(json.loads(path.read_text("utf-8")))
    # what generation stops at is known best by generation_config.json (Llama 3 and Qwen instruct models: several tokens)
    for name, key in (("generation_config", "eos_token_id"), ("config", "eos_token_id"), ("tokenizer_config", "eos_token")):
        with _reading(folder / f"{name}.json") as path:
            config = json.loads(path.read_text("utf-8")) if path.exists() else {}
            tok.stop = tok.stop or _stop(config.get(key), tok)
    with _reading(folder):
        if not tok.stop:
            raise InputError("no file says which token ends an answer (eos_token_id in generation_config.json, for one)")
        others, pad = tok._bytes.keys() - set(tok.stop), config.get("pad_token")          # `config`: the last file
        pad = tok._ids.get(pad["content"] if isinstance(pad, dict) else pad)
        tok.pad = pad if pad in others else min(others)
        files = [folder / "chat_template.jinja", folder / "chat_template.json"]
        tok.speak(_form(form, tok, config.get("chat_template") or any(file.exists() for file in files)))
    return tok


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the files. Each function raises InputError with the reason why a part cannot be reproduced exactly.


@contextmanager
def _reading(path):
    """Whatever is wrong with a file becomes an InputError of one line that begins with its path."""
    try:
        yield path
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, re.error) as e:
        raise InputError(f"{path}: malformed ({type(e).__name__}: {' '.join(str(e).split())})") from None


def _cutter(texts):
    """A function that cuts a string at these texts, leftmost first and the longest of several: what is between, what was found,
    what is between, ..."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest))})").split if texts else lambda text: [text]


def _is_nfc(normalizer):
    """Whether the text is brought to NFC."""
    steps = _steps(normalizer, "normalizers")
    for step in steps:
        if step["type"] != "NFC":
            raise InputError(f"the normalizer {step['type']}, only NFC or none is supported")
    return bool(steps)


def _before_text(processor):
    """What the post-processor puts before a single text, a tuple of ids."""
    bos = []
    for step in _steps(processor, "processors"):
        if step["type"] not in ("ByteLevel", "TemplateProcessing"):
            raise InputError(f"the post-processor {step['type']}, only ByteLevel and TemplateProcessing are supported")
        names = [item["SpecialToken"]["id"] if "SpecialToken" in item else None for item in step.get("single", ())]
        for name in names[:names.index(None) if None in names else 0]:                    # None is where the text stands
            bos += step["special_tokens"][name]["ids"]
    return tuple(bos)


def _steps(part, key):
    """A part of the file, which is null, one step or a Sequence -> list of steps."""
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def _pattern(pre_tokenizer):
    """The regular expression whose matches are the words, for tiktoken. What it does not match is one word for the library,
    and nothing for tiktoken: the last alternative goes from there to the next match or the end."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    kinds = " + ".join(step["type"] for step in steps) or "none"
    if kinds not in ("ByteLevel", "Split + ByteLevel"):
        raise InputError(f"the pre-tokenizer is {kinds}, only ByteLevel and Split + ByteLevel are supported")
    if steps[-1].get("add_prefix_space", True):
        raise InputError("the pre-tokenizer ByteLevel has add_prefix_space, which is not supported")
    if steps[-1].get("use_regex", True) != (len(steps) == 1):
        raise InputError(f"the pre-tokenizer is {kinds} with use_regex {len(steps) > 1}, which is not supported")
    if len(steps) == 1:
        pattern = GPT2
    elif steps[0]["behavior"] != "Isolated" or steps[0]["invert"] or "Regex" not in steps[0]["pattern"]:
        raise InputError("the pre-tokenizer's Split is not a Regex, Isolated and not inverted; no other is supported")
    else:
        pattern = steps[0]["pattern"]["Regex"]
    # A match of nothing would cost the character that follows it. With the one look-ahead there is, a pattern that can
    # match nothing anywhere does so in an empty text, where Python's own engine can see it.
    if not SAME.fullmatch(pattern) or re.match(re.sub(r"\\[pP]\{\w+\}", "x", pattern), ""):
        raise InputError(f"the pre-tokenizer's pattern {pattern!r} has syntax that is not known to mean the same to tiktoken")
    return rf"{pattern}|(?s:.+?)(?=(?:{pattern})|\z)"


def _numbered(vocab, added):
    """{token as the file spells it: id}, added tokens included."""
    ids, last = dict(vocab), -1
    for token in added:
        text = token["content"]
        for flag in ("lstrip", "rstrip", "single_word"):
            if token[flag]:
                raise InputError(f"the added token {text!r} has {flag}, which is not supported")
        # the library numbers added tokens itself, whatever the file says
        last = max(last, given := ids.get(text, max(len(vocab), last + 1)))
        if token["id"] != given or not text:
            raise InputError(f"the added token {text!r} has the id {token['id']}, the library would give it {given}")
        ids[text] = given
    if any(type(i) is not int or i < 0 for i in ids.values()) or len(set(ids.values())) < len(ids):
        raise InputError("two tokens have the same id, or one has none")
    return ids


def _spelled(vocab, added):
    """{token as the file spells it: bytes}, for those that are spelled in GPT-2's alphabet."""
    words = {}
    for key in vocab:
        try:
            words[key] = key.translate(TO_BYTE).encode("latin-1")
        except UnicodeEncodeError:
            if key not in added:
                raise InputError(f"the token {key!r} is not spelled in bytes, only byte-level BPE is supported") from None
    lacking = set(BYTES) - set(words.values())
    if lacking:
        raise InputError(f"{len(lacking)} of the 256 bytes are not in the vocabulary, only byte-level BPE is supported")
    return words


def _ranks(words, merges, whole, added):
    """{bytes: rank} with which tiktoken makes the same tokens as the library does with the list of merges.

    Why the two cannot differ. Left alone, a word's bytes are merged one pair at a time, and at most once there are two parts
    left: its halves. Within a text, until a merge crosses one of the word's two ends, the same happens between them in the
    same order, for the lowest rank of all is the lowest inside. So a token's halves are the only neighbours, in any text, that
    can ever make it. If the list names the halves of every token, and in the order of the ranks, then at each step both
    programs see the same candidates in the same order and take the leftmost of the first. Other pairs that the list names, and
    Llama 3 lists all there are, never meet.

    Whole words. tiktoken takes a word that is a token at once, and so does the library with ignore_merges (`whole`). For a
    token that has halves it is all one: its bytes alone come to the halves, and the halves to the token. A token whose bytes
    get stuck before is never made by merging: with `whole` it stays, for tiktoken too finds it as a word only; without, it
    goes. The same holds for vocabulary that no merge makes, as far as tiktoken would not make it either."""
    try:
        pairs = [(words[a], words[b]) for a, b in (m.split(" ") if isinstance(m, str) else m for m in merges)]
    except KeyError as e:
        raise InputError(f"a merge of {e}, which is not in the vocabulary") from None
    place = {pair: i for i, pair in enumerate(pairs)}                                     # of two alike the last counts
    order = dict.fromkeys(BYTES + [a + b for a, b in pairs])
    for word in order.keys() - set(words.values()):
        raise InputError(f"a merge makes {word!r}, which is not in the vocabulary")
    if whole:
        order |= dict.fromkeys(word for key, word in words.items() if key not in added)
    ranks, last, stuck = {word: rank for rank, word in enumerate(order)}, 0, set()
    for word in list(order)[256:]:
        halves = _halves(word, ranks)
        if halves is None:
            stuck.add(word)
        elif place.get(halves, -1) < last:
            raise InputError(f"the merges do not make {word!r} out of {halves[0]!r} + {halves[1]!r} when tiktoken would")
        else:
            last = place[halves]
    return ranks if whole else {word: rank for rank, word in enumerate(w for w in order if w not in stuck)}


def _halves(word, ranks):
    """The two parts to which merging brings `word` (2 or more bytes) before it makes the last merge, or None if it gets stuck."""
    never = len(ranks)
    parts = [BYTES[b] for b in word]
    found = [ranks.get(a + b, never) for a, b in zip(parts, parts[1:])]                   # rank of each pair of neighbours
    while len(parts) > 2:
        i = found.index(rank := min(found))
        if rank == never:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del found[i]
        for j in (i - 1, i):
            if 0 <= j < len(found):
                found[j] = ranks.get(parts[j] + parts[j + 1], never)
    return tuple(parts)


def _stop(eos, tok):
    """What a configuration says ends an answer (an id, a list of ids, a token's text, {"content": text} or None) -> tuple of
    ids."""
    eos = eos["content"] if isinstance(eos, dict) else eos
    stop = tuple(eos if isinstance(eos, list) else () if eos is None else (tok._ids.get(eos, eos),))
    for i in stop:
        if type(i) is not int or i not in tok._bytes:
            raise InputError(f"an answer ends with the token {i!r}, which is not in the vocabulary")
    return stop


def _form(form, tok, template):
    """`form`, or what "auto" comes to. template: whether the folder has a chat template."""
    if form in FORMS:
        return form
    if form != "auto":
        raise InputError(f"unknown form {form!r}{nearest(form, FORMS)} ({', '.join(FORMS)} or auto)")
    if not template:
        return "plain"
    for family, sign in SIGNS.items():
        if sign in tok._added:
            return family
    raise InputError("its chat template is of no family known here; the form plain takes the text alone")
