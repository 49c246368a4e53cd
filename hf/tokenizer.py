"""hf/tokenizer.py: the tokenizer of a Hugging Face model folder, read by the library `tokenizers`.

    tok = load_tokenizer("Qwen2.5-Math-1.5B")
    tok.prompt("What is 187+737?")   # token ids, in the form that this model was taught
    tok.decode(answer)               # text

The library turns text into ids and back. This file adds three things. Chat templates are programs
and are not run: `FORMS` has the families' forms. A user's text stays text, whatever special tokens
it spells. And a tokenizer that would silently make a wrong prompt or a wrong text is refused with
the reason: its vocabulary must spell every byte, a text must come back as it was, and a form made
of pieces must have the ids of the whole rendered text.
"""
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

from hf import package, read_json, reading
from precision import InputError, nearest

# How a problem is put to the model: the system prompt, if there is one, and the user's message up
# to where the assistant begins.
FORMS = {
    "chatml": ("<|im_start|>system\n{}<|im_end|>\n",
               "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"),
    "llama3": ("<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
               "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "r1": ("{}", "<｜User｜>{}<｜Assistant｜><think>\n"),
    "plain": ("", "{}"),
}
# bos, where no post-processor says so
BEGIN = {"llama3": "<|begin_of_text|>", "r1": "<｜begin▁of▁sentence｜>"}
# the token that shows a family; R1-Distill-Llama has Llama's as well
SIGNS = {"r1": "<｜User｜>", "llama3": "<|start_header_id|>", "chatml": "<|im_start|>"}
FRAME = re.compile(r"(<\|\w+\|>|<｜\w+｜>|<think>)")                 # the special tokens of a form


class HFTokenizer:
    """Text <-> token ids. `load_tokenizer` makes one.

    n_vocab  largest id + 1
    stop     tuple of the ids that end an answer
    pad      an id that is none of `stop`. Masks in this program are made from lengths, so any such
             id will do
    bos      tuple of the ids that stand before a text, or ()
    form     how `prompt` puts a problem to the model: a key of FORMS
    """

    def __init__(self, path, most=math.inf):
        """path: a tokenizer.json. most: ids that its model knows. Raises InputError if a prompt or
        a text would come out wrong."""
        self.path, library = path, package("tokenizers")
        with reading(path):
            # truncation and padding are for batches: a prompt is used whole
            spec = read_json(path) | dict(truncation=None, padding=None)
            text_only = _text_only(spec, library)
            self._whole = library.Tokenizer.from_str(json.dumps(spec))
            self._text_only = library.Tokenizer.from_str(json.dumps(text_only))
            self._vocab = self._whole.get_vocab()                                   # token -> id
            self._added = {t["content"]: t["id"] for t in spec["added_tokens"]}
            self._tokens = {i: t for t, i in self._vocab.items()}
            if len(self._tokens) < len(self._vocab):
                raise InputError("two tokens have the same id")
            # A byte-level decoder takes each letter of a token for a byte. Added tokens are spelled
            # as the text has them, so they are put in its alphabet first.
            in_bytes = library.normalizers.ByteLevel().normalize_str
            spell = str if spec["model"].get("byte_fallback") else in_bytes
            for text, i in self._added.items():
                if (given := self._vocab.get(text)) != i:
                    raise InputError(f"the added token {text!r} has id {i}, not {given} as in the "
                                     "library")
                if text not in text_only["model"]["vocab"]:
                    self._tokens[i] = spell(text)
            # An added token that the model does not know is as if it were not there.
            self._tokens = {i: t for i, t in self._tokens.items() if i < most}
            self._added = {t: i for t, i in self._added.items() if i < most}
            if (largest := max(text_only["model"]["vocab"].values())) >= most:
                raise InputError(f"it has a token {largest}, its model knows {most} of them")
            self._decoder = self._whole.decoder or library.decoders.ByteLevel()
            a = self._whole.encode("a")
            self.bos = tuple(a.ids[:a.special_tokens_mask.index(0)])
            if not self._tokens.keys() >= set(self.bos):
                raise InputError(f"its post-processor puts the ids {self.bos} before a text, not "
                                 "all of them tokens")
            self.n_vocab, self.stop, self.pad = max(self._tokens) + 1, (), 0
            text = "x + 1 = ø€👍"
            if (back := self.decode(self.encode_ordinary(text))).strip() != text:
                raise InputError(f"{text!r} comes back as {back!r}: its parts do not fit together")
            self.speak("plain")

    def speak(self, form):
        """Choose the form of `prompt`, a key of FORMS. Raises InputError if the vocabulary lacks
        one of its tokens, or if the library reads the rendered form in another way."""
        for token in FRAME.findall("".join(FORMS[form]) + BEGIN.get(form, "")):
            if token not in self._added:
                raise InputError(f"the form {form} needs the token {token}, which the vocabulary "
                                 "does not have")
        if form in BEGIN and not self.bos:
            self.bos = (self._added[BEGIN[form]],)
        self.form = form
        self._frames = [[self._added[p] if FRAME.match(p) else p for p in FRAME.split(frame) if p]
                        for frame in FORMS[form]]
        # A token that takes in the spaces around it, or a sign that only the first piece of a text
        # gets, would make another prompt of the rendered text.
        for said in ("x", " x ") if form != "plain" else ():
            rendered = self.encode("".join(FORMS[form]).replace("{}", said))
            if self.prompt(said, said) != [*self.bos, *rendered]:
                raise InputError(f"the form {form} is not supported with this tokenizer: the "
                                 "pieces of a prompt have other ids than the whole")

    def encode(self, text):
        """Text -> list of ids. A special or other added token that the text spells becomes this
        token."""
        return self._ids(self._whole, text)

    def encode_ordinary(self, text):
        """Text -> list of ids. Text that spells a special or other added token is text like any
        other."""
        return self._ids(self._text_only, text)

    def _ids(self, tokenizer, text):
        # lone surrogates are not characters: they become U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        with reading(self.path):
            return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens):
        """Token ids (an iterable of ints) -> text, without a stop token at the end. Bytes that are
        not UTF-8, and ids that are not tokens, become U+FFFD; other special tokens are spelled
        out."""
        tokens = [int(t) for t in tokens]
        if tokens and tokens[-1] in self.stop:
            tokens.pop()
        with reading(self.path):
            return self._decoder.decode([self._tokens.get(t, "\ufffd") for t in tokens])

    def prompt(self, text, system=""):
        """A user's message -> list of ids: bos and the family's chat form around `text`, up to
        where the assistant begins; form "plain": bos and `text` alone, where a system prompt raises
        InputError.

        A special token that `text` or `system` spells does not become one: a text cannot close the
        user's turn from within. Other texts get the ids of what the family's chat template renders,
        with two reservations. The system prompt is the caller's: templates put in one of their own
        where none is given (Qwen2.5-Instruct "You are Qwen, created by Alibaba Cloud. You are a
        helpful assistant.", Qwen2.5-Math "Please reason step by step, and put your final answer
        within \\boxed{}.", Llama 3.1 and later a header with dates, Qwen3 none). And nothing is
        stripped; Llama's templates strip spaces at both ends."""
        if system and self.form == "plain":
            raise InputError("the form plain has no place for a system prompt: put it in front of "
                             "the text")
        out, (before, turn) = list(self.bos), self._frames
        for part, said in [(p, system) for p in before if system] + [(p, text) for p in turn]:
            token = isinstance(part, int)
            out += [part] if token else self.encode_ordinary(part.replace("{}", said))
        return out


def load_tokenizer(folder, form="auto"):
    """The tokenizer of a model's folder (a path) -> HFTokenizer.

    form: a key of FORMS, or "auto": the one whose tokens the vocabulary has, "plain" where the
    folder has no chat template. Raises InputError, one line, for a file that is missing or
    malformed, a tokenizer whose prompts or answers would be wrong, a folder that does not say which
    token ends an answer, and a form that this vocabulary cannot spell."""
    folder, configs = Path(folder), {}
    with _quiet():
        keys = dict(generation_config="eos_token_id", config="eos_token_id",
                    tokenizer_config="eos_token")
        for name in keys:
            with reading(folder / f"{name}.json") as path:
                configs[name] = read_json(path) if os.path.lexists(path) else {}
        size = configs["config"].get("vocab_size")
        tok = HFTokenizer(folder / "tokenizer.json", size if type(size) is int else math.inf)
        # what generation stops at is known best by generation_config.json (Llama 3 and Qwen
        # instruct models: several tokens)
        for name, key in keys.items():
            with reading(folder / f"{name}.json"):
                tok.stop = tok.stop or _stop(configs[name].get(key), tok)
        with reading(folder):
            if not tok.stop:
                raise InputError("no file says which token ends an answer (eos_token_id in "
                                 "generation_config.json, for one)")
            about = configs["tokenizer_config"]
            others, pad = tok._tokens.keys() - set(tok.stop), about.get("pad_token")
            pad = tok._vocab.get(pad["content"] if isinstance(pad, dict) else pad)
            tok.pad = pad if pad in others else min(others)
            files = [folder / "chat_template.jinja", folder / "chat_template.json"]
            template = about.get("chat_template") or any(file.exists() for file in files)
            tok.speak(_form(form, tok, template))
    return tok


def _text_only(spec, library):
    """A tokenizer.json without its added tokens: all text is ordinary. Special tokens also leave
    the vocabulary and the merges, where a word or a merge could make one. Raises InputError if the
    rest cannot spell every text in one way."""
    model, alphabet = spec["model"], library.pre_tokenizers.ByteLevel.alphabet()
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"a {model['type']} tokenizer, only BPE is supported")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise InputError(f"BPE with {option}, which is not supported")
    special = {t["content"] for t in spec["added_tokens"]
               if t["special"] or FRAME.fullmatch(t["content"])}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    merges = [[a, b] for a, b in pairs if not special & {a, b, a + b}]
    if model.get("byte_fallback"):
        alphabet = [f"<0x{b:02X}>" for b in range(256)]
    if lacking := set(alphabet) - vocab.keys():
        raise InputError(f"{len(lacking)} of the 256 bytes are not in the vocabulary: only BPE "
                         "that can spell every text is supported")
    model = model | dict(vocab=vocab, merges=merges)
    return spec | dict(model=model, added_tokens=[], post_processor=None)


def _stop(eos, tok):
    """What a configuration says ends an answer (an id, a list of ids, a token's text, {"content":
    text} or None) -> tuple of ids."""
    eos = eos["content"] if isinstance(eos, dict) else eos
    listed = eos if isinstance(eos, list) else [] if eos is None else [tok._vocab.get(eos, eos)]
    for i in listed:
        if type(i) is not int or i not in tok._tokens:
            raise InputError(f"an answer ends with the token {i!r}, which is not in the vocabulary")
    return tuple(listed)


def _form(form, tok, template):
    """`form`, or what "auto" comes to. template: whether the folder has a chat template."""
    if form in FORMS:
        return form
    if form != "auto":
        known = f"{', '.join(FORMS)} or auto"
        raise InputError(f"unknown form {form!r}{nearest(form, FORMS)} ({known})")
    if not template:
        return "plain"
    for family, sign in SIGNS.items():
        if sign in tok._added:
            return family
    raise InputError("its chat template is of no family known here; the form plain takes the text "
                     "alone")


@contextmanager
def _quiet():
    """A panic of the library writes to file descriptor 2 by itself. While it loads, such lines are
    dropped: the InputError says what is wrong."""
    before = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
