"""data/tokenizer.py: every byte is a token, for models from scratch. tiktoken, built here, no
download.

Stop and pad are two tokens. Where one id serves as both, a mask made by comparing ids takes the
stop token for padding, and the model never learns to stop.
"""
import tiktoken

STOP, PAD = 256, 257
TOKENIZER = tiktoken.Encoding(
    "tenbit-bytes", pat_str=r"(?s:.+)", mergeable_ranks={bytes([i]): i for i in range(256)},
    special_tokens={"<|stop|>": STOP, "<|pad|>": PAD})


def encode(text):
    """Text -> list of token ids. Text that spells a special token is text like any other."""
    return TOKENIZER.encode(text, disallowed_special=())


def decode(tokens):
    """Token ids -> text, without the stop token at the end; bytes that are not UTF-8 become
    U+FFFD."""
    tokens = list(tokens)
    return TOKENIZER.decode(tokens[:-1] if tokens and tokens[-1] == STOP else tokens)


class Bytes:
    """The tokenizer of models from scratch. hf.tokenizer.HFTokenizer has the same methods."""
    n_vocab, stop, pad, form = TOKENIZER.n_vocab, (STOP,), PAD, "bytes"
    encode, decode = staticmethod(encode), staticmethod(decode)

    @staticmethod
    def prompt(text, system=""):
        """How a problem is put to the model: here as it is."""
        return encode(text)
