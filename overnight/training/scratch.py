"""A model that has read nothing yet, with a tokenizer made of the texts it will read."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.training.models import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 17
PAD, UNKNOWN, BEGIN, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
TEXT_END = "<|endoftext|>"
LEAST_SIGNS = 1000
"""Different signs that WordPiece may always learn; Chinese has more."""
COVERED = 0.9995
"""Share of all signs that WordPiece must know, as SentencePiece advises for Chinese and Japanese."""


def make_base(
    folder: Path,
    texts: Iterable[str],
    *,
    architecture: str,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    length: int,
) -> Path:
    """A folder with a model of random weights and its tokenizer, as `from_pretrained` reads it; made once.

    Args:
        texts: what the tokenizer is trained on, gone through twice: WordPiece for `bert`, byte-level BPE for `gpt2`.
        vocabulary: tokens at most.
        length: the longest input.
    """
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer = _word_piece(texts, vocabulary) if architecture == "bert" else _byte_pairs(texts, vocabulary)
    size = len(tokenizer)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: Any
        if architecture == "bert":
            model = BertForMaskedLM(
                BertConfig(
                    vocab_size=size,
                    hidden_size=width,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    intermediate_size=4 * width,
                    max_position_embeddings=length,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
        else:
            end = tokenizer.eos_token_id
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=size,
                    n_embd=width,
                    n_layer=layers,
                    n_head=heads,
                    n_positions=length,
                    bos_token_id=end,
                    eos_token_id=end,
                    pad_token_id=end,
                )
            )
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    return folder


def _word_piece(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    trained = BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    # each sign is a token, and another one within words: with more of them there would be more tokens than asked for
    signs = min(max(LEAST_SIGNS, _frequent_signs(texts)), (vocabulary - 5) // 2)
    trained.train_from_iterator(texts, vocab_size=vocabulary, limit_alphabet=signs, show_progress=False)
    return BertTokenizer(
        tokenizer_object=trained._tokenizer,
        do_lower_case=False,
        unk_token=UNKNOWN,
        pad_token=PAD,
        cls_token=BEGIN,
        sep_token=END,
        mask_token=MASK,
    )


def _frequent_signs(texts: Iterable[str]) -> int:
    """How many different signs make up `COVERED` of the texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    enough = COVERED * counts.total()
    return sum(before < enough for before in accumulate((n for _, n in counts.most_common()), initial=0))


def _byte_pairs(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[TEXT_END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token=TEXT_END, eos_token=TEXT_END, pad_token=TEXT_END
    )
