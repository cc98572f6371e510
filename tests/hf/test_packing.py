"""Documents packed into one row: each gives what it gives alone, by every keyword that tells them apart."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import model, tokens
from transformers import DataCollatorWithFlattening

from hola_megatron.hf.configuration_hola import HolaConfig
from hola_megatron.hf.modeling_hola import HolaForCausalLM

LENGTHS = (20, 1, 25, 7, 1)  # over two blocks, between, and single tokens
CUTS = [0, 20, 21, 46, 53, 54]
CLOSE = {"rtol": 0, "atol": 1e-5}  # of logits of size 10, in float64 but for the few float32 steps of a mixer
POSITIONS = [n for length in LENGTHS for n in range(length)]
NUMBERS = [n for n, length in enumerate(LENGTHS) for _ in range(length)]
SAID = {
    "position_ids": {"position_ids": torch.tensor([POSITIONS])},
    "positions from 2": {"position_ids": torch.tensor([POSITIONS]) + 2},
    "seq_idx": {"seq_idx": torch.tensor([NUMBERS], dtype=torch.int32)},
    "seq_idx of one axis": {"seq_idx": torch.tensor(NUMBERS) * 3},
    "flash attention": {"cu_seq_lens_q": torch.tensor(CUTS, dtype=torch.int32), "max_length_q": 25, "max_length_k": 25,
                        "cu_seq_lens_k": torch.tensor(CUTS, dtype=torch.int32)},
    "cu_seqlens": {"cu_seqlens": torch.tensor(CUTS)},
    "cu_seqlens with an empty document": {"cu_seqlens": torch.tensor([0, 20, 20, *CUTS[2:]])},
    "all": {"position_ids": torch.tensor([POSITIONS]), "cu_seqlens": torch.tensor([CUTS]),
            "seq_idx": torch.tensor([NUMBERS]), "max_length_q": torch.tensor(25)},
}


@pytest.fixture(params=["H", "G", "A", "W", "HGA", "ham"])
def lm(request: pytest.FixtureRequest) -> HolaForCausalLM:
    return model(request.param)


@torch.no_grad()
def alone(lm: HolaForCausalLM, x: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    return torch.cat([lm(x[:, a:b], use_cache=False).logits for a, b in pairwise(cuts) if b > a], 1)


@pytest.mark.parametrize("said", SAID)
@torch.no_grad()
def test_documents_of_a_row_do_not_see_each_other(said, lm):
    x = tokens(1, 54)
    output = lm(x, **SAID[said])
    torch.testing.assert_close(output.logits, alone(lm, x, CUTS), **CLOSE)
    assert output.past_key_values is None  # one memory could only be of one of them
    assert (output.logits - lm(x, use_cache=False).logits).abs().max() > 0.1  # so there is something to leak


@torch.no_grad()
def test_rows_with_padding_and_unequal_documents(lm):
    """Each row has its own documents; padding before, between and after them counts for nothing."""
    cuts = ([0, 9, 30], [0, 30], [0, 1, 2, 17, 30])
    x = tokens(3, 30)
    positions = torch.tensor([[n for a, b in pairwise(row) for n in range(b - a)] for row in cuts])
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[0, :10], mask[1, 30:], mask[2, ::4] = 0, 0, 0
    padded, padded_positions = torch.zeros(3, 40, dtype=torch.int64), torch.full((3, 40), 7)
    padded[mask.bool()], padded_positions[mask.bool()] = x.flatten(), positions.flatten()
    logits = lm(padded, attention_mask=mask, position_ids=padded_positions).logits
    for n, row in enumerate(cuts):
        torch.testing.assert_close(logits[n, mask[n].bool()], alone(lm, x[n: n + 1], row)[0], **CLOSE)
    assert logits.isfinite().all()


def test_the_collator_of_transformers_gives_the_documents_loss_and_gradients(lm):
    lm = lm.train()
    documents = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in (20, 25, 7)]
    counts = [len(d["input_ids"]) - 1 for d in documents]
    found = []
    for how in ({}, {"return_flash_attn_kwargs": True, "return_seq_idx": True},
                {"return_position_ids": False, "return_flash_attn_kwargs": True},
                {"return_position_ids": False, "return_seq_idx": True}):
        lm.zero_grad()
        batch = DataCollatorWithFlattening(**how)(documents)
        loss = lm(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in lm.parameters())])
    lm.zero_grad()
    each = [lm(x, labels=x).loss for x in (torch.tensor([d["input_ids"]]) for d in documents)]
    loss = sum(n * one for n, one in zip(counts, each, strict=True)) / sum(counts)
    loss.backward()
    expected = [loss.detach(), *(p.grad for p in lm.parameters())]
    for one in found:
        for x, y in zip(one, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_no_document_s_first_token_is_predicted(lm):
    x = tokens(1, 54)
    counts = [b - a - 1 for a, b in pairwise(CUTS)]
    each = [lm(x[:, a:b], labels=x[:, a:b]).loss if b > a + 1 else torch.tensor(0.0) for a, b in pairwise(CUTS)]
    expected = sum(n * loss for n, loss in zip(counts, each, strict=True)) / sum(counts)
    for said in ("cu_seqlens", "position_ids"):
        torch.testing.assert_close(lm(x, labels=x, **SAID[said]).loss, expected, rtol=1e-5, atol=0)
    summed = lm(x, labels=x, num_items_in_batch=torch.tensor(10), **SAID["all"]).loss
    torch.testing.assert_close(summed, expected * sum(counts) / 10, rtol=1e-5, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_predicts_no_first_token(side, lm):
    """A padded batch has the loss of its documents, whose first tokens follow nothing."""
    documents = [tokens(1, n, seed=n)[0] for n in (20, 25, 7)]
    x, labels = torch.zeros(3, 25, dtype=torch.int64), torch.full((3, 25), -100)
    for row, document in enumerate(documents):
        place = slice(25 - len(document), None) if side == "left" else slice(0, len(document))
        x[row, place] = labels[row, place] = document
    found = lm(x, attention_mask=(labels >= 0).long(), labels=labels).loss
    each = [(len(d) - 1) * lm(d[None], labels=d[None]).loss for d in documents]
    torch.testing.assert_close(found, sum(each) / sum(len(d) - 1 for d in documents), rtol=1e-5, atol=0)


@torch.no_grad()
def test_positions_that_only_count_change_nothing(lm):
    x = tokens(2, 20)
    whole = lm(x, use_cache=False).logits
    for positions in (torch.arange(20)[None], torch.arange(20), torch.arange(5, 25).expand(2, 20)):
        output = lm(x, position_ids=positions)
        assert torch.equal(output.logits, whole) and output.past_key_values is not None
    mask = torch.ones_like(x)
    mask[0, :5] = mask[1, ::3] = 0
    counted = mask.cumsum(1) - 1
    for positions in (torch.arange(20)[None], counted, counted.masked_fill(mask == 0, 1)):  # of columns, or of tokens
        assert torch.equal(lm(x, attention_mask=mask, position_ids=positions).logits, lm(x, attention_mask=mask).logits)
    cache = lm(x[:, :12]).past_key_values
    found = lm(x[:, 12:], position_ids=torch.arange(12, 20)[None], past_key_values=cache).logits
    torch.testing.assert_close(found, whole[:, 12:], **CLOSE)


REFUSED = {
    "documents by the mask": ({"attention_mask": [[1, 1, 1, 2, 2, 2]]}, "has values other than 1 .* and 0"),
    "a mask to be added": ({"attention_mask": [[0.0, 0, 0, 0, -1e9, -1e9]]}, "has values other than 1 .* and 0"),
    "a jump": ({"position_ids": [[0, 1, 2, 5, 6, 7]]}, "position_ids go from 2 to 5 at token 3"),
    "counting down": ({"position_ids": [[5, 4, 3, 2, 1, 0]]}, "position_ids go from 5 to 4 at token 1"),
    "another start": ({"position_ids": [[0, 1, 2, 1, 2, 3]]}, "position_ids go from 2 to 1 at token 3"),
    "positions and cuts": ({"position_ids": [[0, 1, 2, 0, 1, 2]], "cu_seqlens": [0, 2, 6]},
                           "position_ids and cu_seqlens contradict each other.*row 0, column 2"),
    "queries and keys": ({"cu_seq_lens_q": [0, 2, 6], "cu_seq_lens_k": [0, 3, 6]},
                         "cu_seq_lens_q and cu_seq_lens_k contradict each other"),
    "numbers and cuts": ({"seq_idx": [[0] * 6], "cu_seqlens": [0, 3, 6]}, "seq_idx and cu_seqlens contradict"),
    "not to the end": ({"cu_seqlens": [0, 2, 5]}, r"cu_seqlens \[0, 2, 5\] must rise from 0 to the 6 columns"),
    "beyond the end": ({"cu_seqlens": [0, 2, 9]}, "must rise from 0 to the 6 columns"),
    "not from zero": ({"cu_seqlens": [1, 2, 6]}, "must rise from 0"),
    "falling": ({"cu_seqlens": [0, 4, 2, 6]}, "must rise from 0"),
    "fractions": ({"cu_seqlens": [0.0, 6.0]}, "cu_seqlens is torch.float32; it must be an integer"),
    "documents in two places": ({"seq_idx": [[0, 0, 1, 1, 0, 0]]}, "seq_idx decreases within a row"),
    "another length": ({"position_ids": [[0, 1, 2]]}, r"position_ids \(1, 3\) must be \[B, T\] = \(1, 6\)"),
    "longer than said": ({"cu_seqlens": [0, 4, 6], "max_length_q": 3}, "max_length_q is 3, and a document has 4"),
    "a memory of several": ({"cu_seqlens": [0, 4, 6], "use_cache": True}, "leaves no single state to continue from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused(case):
    given, why = REFUSED[case]
    given = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in given.items()}
    with pytest.raises(ValueError, match=why) as caught:
        model("H")(tokens(1, 6), **given)
    assert "\n" not in str(caught.value)


def test_documents_do_not_start_inside_a_call_that_goes_on():
    lm, x = model("HA"), tokens(1, 20)

    def go_on(**given):
        cache = lm(x[:, :12]).past_key_values
        return lm(x[:, 12:], past_key_values=cache, **given)

    with pytest.raises(ValueError, match="cu_seqlens starts a document inside a call that continues a cache of 12"):
        go_on(cu_seqlens=torch.tensor([0, 3, 8]))
    for wrong in (0, 5, 13):
        with pytest.raises(ValueError, match=f"position_ids start at {wrong} in a call that continues a cache"):
            go_on(position_ids=torch.arange(wrong, wrong + 8)[None])
    with pytest.raises(ValueError, match=r"cu_seqlens needs one packed row, and this call has 2 rows"):
        lm(tokens(2, 8), cu_seqlens=torch.tensor([0, 3, 8]))


@pytest.mark.parametrize("keyword", ["token_type_ids", "head_mask", "encoder_hidden_states", "past_key_value",
                                     "segment_ids", "cu_seqlens_q", "output_router_logits", "attention_mask_2d"])
def test_a_keyword_that_would_be_ignored_is_refused(keyword):
    lm, x = model("G"), tokens(1, 6)
    for body in (lm, lm.model):
        with pytest.raises(TypeError, match=f"{keyword}: unknown keyword of a HOLA model"):
            body(x, **{keyword: torch.zeros(1, 6)})
        assert body(x, **{keyword: None}) is not None
    with pytest.raises(TypeError, match="output_attentions: a HOLA model has no attention matrices"):
        lm(x, output_attentions=True)
    assert lm(x, output_attentions=False).logits is not None


def test_the_memory_has_two_names_and_one_value():
    lm, x = model("HGA"), tokens(1, 20)
    whole = lm(x, use_cache=False).logits
    for name in ("past_key_values", "cache"):
        given = {name: lm(x[:, :12]).past_key_values}
        torch.testing.assert_close(lm(x[:, 12:], **given).logits, whole[:, 12:], **CLOSE)
        assert lm.model(x[:, :1], **{name: None}).past_key_values is not None
    one, two = (lm(x[:, :12]).past_key_values for _ in range(2))
    with pytest.raises(ValueError, match="past_key_values and cache are two memories; give one"):
        lm(x[:, 12:], past_key_values=one, cache=two)
    assert lm(x[:, 12:], past_key_values=one, cache=one).logits is not None
    with pytest.raises(ValueError, match="cache_position .* the cache holds 12 columns and this call has 8"):
        lm(x[:, 12:], past_key_values=two, cache_position=torch.arange(8))


def test_a_trainer_keeps_the_columns_that_part_documents(tmp_path):
    """It drops what the model's signature does not name, and passes num_items_in_batch where keywords are taken."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    lm = HolaForCausalLM(HolaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_heads=2, key_dim=8, value_dim=16, cache_block=8, cache_slots=3,
                                    initializer_range=0.3))
    documents = [{"input_ids": tokens(1, n, seed=n)[0].tolist(), "labels": tokens(1, n, seed=n)[0].tolist()}
                 for n in (20, 25, 7)]
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True,
                                  per_device_train_batch_size=3, max_steps=2, save_strategy="no", disable_tqdm=True)
    trainer = Trainer(lm, arguments, train_dataset=documents, eval_dataset=documents,
                      data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=True))
    with torch.no_grad():
        each = [lm.eval()(x, labels=x).loss for x in (torch.tensor([d["input_ids"]]) for d in documents)]
    expected = sum((len(d["input_ids"]) - 1) * float(x) for d, x in zip(documents, each, strict=True)) / 49
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.train().global_step == 2
