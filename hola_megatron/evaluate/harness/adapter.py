"""Our models as lm-evaluation-harness asks them (its model "hola").

    import hola_megatron.evaluate.harness.adapter
    lm_eval.simple_evaluate(model="hola", model_args={"pretrained": "runs/hola_tiny"}, tasks=["arc_easy"])

Texts are encoded as in training: bos in front where the tokenizer has one, at the start of a context, never of a
continuation. That is what the harness's own model `hf` does with an export, add_bos_token=False in rolling tasks
(docs/evaluate.md). A context is cut on the left to `max_length`, as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hola_megatron.errors import RecipeError, shown
from hola_megatron.evaluate.load import exported, load
from hola_megatron.evaluate.reader import ModelReader, Reader, Row

DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
DEFAULT_ANSWER = 256  # tokens, where a task does not say


class HarnessModel(TemplateLM):
    """A Reader with its tokenizer, as the harness's LM.

    Args:
        reader: computes likelihoods and continuations.
        tokenizer: a transformers tokenizer.
        max_length: tokens of a context with its continuation, and of a rolling window.
    """

    def __init__(self, reader: Reader, tokenizer: Any, max_length: int):
        super().__init__()
        self.reader, self.tokenizer, self.max_length = reader, tokenizer, max_length
        bos = tokenizer.bos_token_id
        self._start = [] if bos is None else [bos]
        self._prefix = tokenizer.eos_token_id if bos is None else bos

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", ""))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with bos in front unless add_special_tokens is False or the text begins with it."""
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        if add_special_tokens is False or ids[:1] == self._start:
            return ids
        return self._start + ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # the reader shows its own progress

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        return [tuple(score) for score in self.reader.scores(rows, "likelihoods")]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not 0 < len(continuation) <= self.max_length or not context:
            raise RecipeError(f"--window: a continuation has {len(continuation)} tokens after {len(context)}, the "
                              f"model reads 1 to {self.max_length} after at least one; give a larger window, or leave "
                              "the task out")
        return Row((context + continuation)[-(self.max_length + 1):], len(continuation))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        rows, owners = [], []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1):
                rows.append(self._row(*make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, score in zip(owners, self.reader.scores(rows, "rolling windows"), strict=True):
            totals[number] += score.log_likelihood
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=repr)), []).append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            settings = normalize_gen_kwargs(dict(requests[numbers[0]].args[1]), DEFAULT_ANSWER)
            texts = self._answers([requests[n].args[0] for n in numbers], dict(settings))
            found |= zip(numbers, texts, strict=True)
        return [found[n] for n in range(len(requests))]

    def _answers(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        if settings.get("do_sample") or settings.get("temperature"):
            raise RecipeError(f"--tasks: a task asks for sampled answers ({shown(settings)}), and only greedy decoding "
                              "is there; leave the task out, or run lm_eval --model hf on the exported folder")
        until = handle_stop_sequences(list(settings.get("until") or []), eos=self.tokenizer.decode(self.eot_token_id))
        most = settings["max_gen_toks"]
        if most >= self.max_length:
            raise RecipeError(f"--window: {self.max_length} tokens leave no context before an answer of {most}; give a "
                              "larger window, or leave the task out")
        prompts = [self.tok_encode(text)[-(self.max_length - most):] for text in contexts]

        def ended(_: int, ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            return any(stop in text for stop in until if stop)

        said = self.reader.answers(prompts, most, ended, "answers")
        return [postprocess_generated_text(self.tokenizer.decode(ids, skip_special_tokens=True), until, None)
                for ids in said]


@register_model("hola")
class HolaModel(HarnessModel):
    """The harness's `--model hola`: a checkpoint, a run folder or an exported folder.

    Args:
        pretrained: the path.
        tokenizer: for a checkpoint: where its tokenizer is now.
        dtype: float32 or bfloat16; None: as stored.
        device: None: a GPU where there is one.
        batch_size: rows at a time.
        max_length: tokens; None: the length that the model was trained at.
    """

    def __init__(self, pretrained: str, *, tokenizer: str | None = None, dtype: str | None = None,
                 device: str | None = None, batch_size: int | str = 8, max_length: int | None = None, **_: Any):
        import torch

        if dtype is not None and dtype not in DTYPES:
            raise RecipeError(f"dtype: {shown(dtype)} is none of {', '.join(DTYPES)}; give one, or leave it out")
        with exported(Path(pretrained), tokenizer) as folder:
            model, found = load(folder, dtype=getattr(torch, DTYPES[dtype]) if dtype else None, device=device)
        window = max_length or model.config.max_position_embeddings
        super().__init__(ModelReader(model, found, batch=int(batch_size), window=window, progress=True), found, window)
