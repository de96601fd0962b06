"""The dummy pipelines of diffusers' own tests, from the checkout that the variable DIFFUSERS names.

What those tests load from the Hub is small and random, too: here stand-ins are built in its place, so nothing is
downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from oracle import Subject
from pipelines import WordTokenizer
from transformers import (
    BatchEncoding,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

_REQUEST = {"num_inference_steps": 6, "strength": 1.0}
_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1103}
_BERT = {"intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": 1124}
_TOKENIZERS = (
    "AutoTokenizer",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "ByT5Tokenizer", "CLIPTokenizer", "GemmaTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast", "RobertaTokenizer",
    "T5Tokenizer", "T5TokenizerFast",
)  # fmt: skip


class Tokenizer(WordTokenizer):
    """A tokenizer of any class: a token for each character, of the few that the smallest vocabulary has."""

    model_max_length, vocab_size = 77, 8
    eos_token_id, pad_token_id, bos_token_id, unk_token_id = 2, 0, 1, 2
    eos_token, pad_token, bos_token, padding_side = "end", "pad", "begin", "right"

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(
        self, text: str | list[str], padding: str | bool = True, max_length: int | None = None, **_: Any
    ) -> BatchEncoding:
        texts = [text] if isinstance(text, str) else text
        limit = max_length or self.model_max_length
        rows = [[*(3 + ord(letter) % 5 for letter in text[: limit - 1]), self.eos_token_id] for text in texts]
        width = limit if padding == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **more: Any) -> Any:
        text = messages if isinstance(messages, str) else str(messages)
        return self(text, **more) if tokenize else text

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return [3 for _ in tokens] if isinstance(tokens, list) else 3

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def subjects(folder: str) -> dict[str, Subject]:
    """A subject for each pipeline class that the tests in a checkout have dummies for, by the name of its class."""
    found: dict[str, Subject] = {}
    with _tests_of(folder):
        for name in _modules(folder):
            for test in _classes(name):
                pipeline = test.pipeline_class
                found.setdefault(pipeline.__name__, _subject(folder, pipeline, test))
    return dict(sorted(found.items()))


def _subject(folder: str, pipeline: type, test: type) -> Subject:
    def make() -> Any:
        with _tests_of(folder), _offline():
            torch.manual_seed(0)
            pipe = pipeline(**test().get_dummy_components())
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        return pipe

    def request() -> dict[str, Any]:
        with _tests_of(folder):
            method = test().get_dummy_inputs
            given = method("cpu") if "device" in inspect.signature(method).parameters else method()
        names = inspect.signature(pipeline.__call__).parameters
        return {**given, **{name: value for name, value in _REQUEST.items() if name in names}}

    return Subject(pipeline.__name__, make, request)


def _modules(folder: str) -> list[str]:
    root = os.path.join(folder, "tests", "pipelines")
    return [name for _, name, package in pkgutil.walk_packages([root], "tests.pipelines.") if not package]


def _classes(module: str) -> Iterator[Any]:
    with contextlib.suppress(ImportError), _offline():
        for value in vars(importlib.import_module(module)).values():
            here = isinstance(value, type) and value.__module__ == module
            if here and isinstance(getattr(value, "pipeline_class", None), type):
                yield value


@contextlib.contextmanager
def _tests_of(folder: str) -> Iterator[None]:
    """Let `tests` be the package of the checkout: this project's own folder has the same name."""
    own = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tests"}
    theirs = _THEIRS.setdefault(folder, {})
    for name in own:
        del sys.modules[name]
    sys.modules.update(theirs)
    sys.path.insert(0, folder)
    try:
        with mock.patch.object(pytest, "mark", pytest.MarkGenerator(_ispytest=True)):  # their marks are not ours
            yield
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            theirs[name] = sys.modules.pop(name)
        sys.modules.update(own)


_THEIRS: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Build what `from_pretrained` would load."""

    def stand_in(make: Callable[[], Any]) -> Any:
        return staticmethod(lambda *_, **__: make())

    def model(kind: type, config: Any) -> Callable[[], Any]:
        def make() -> Any:
            torch.manual_seed(0)
            return kind(config)

        return make

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True))
        made: dict[str, Callable[[], Any]] = dict.fromkeys(_TOKENIZERS, Tokenizer)
        made |= {"AutoConfig": lambda: T5Config(**_SIZES), "T5EncoderModel": model(T5EncoderModel, T5Config(**_SIZES))}
        made["UMT5EncoderModel"] = model(UMT5EncoderModel, UMT5Config(**_SIZES))
        made["BertModel"] = model(BertModel, BertConfig(hidden_size=32, num_attention_heads=4, **_BERT))
        made["LlamaForCausalLM"] = model(LlamaForCausalLM, LlamaConfig(hidden_size=16, num_attention_heads=4, **_BERT))
        for name, make in made.items():
            kind = getattr(transformers, name)
            stack.enter_context(mock.patch.object(kind, "from_pretrained", stand_in(make)))
        yield
