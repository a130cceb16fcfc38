"""Block diffusion and Mask-Predict on tiny random checkpoints, against the plain reference of `masked_reference`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)

import decoding
from decoding import BlockDiffusion, LocalBackend, MaskPredict, SamplingParams
from decoding.errors import CapabilityError, ContextOverflow, InvalidRequest, ModelError
from decoding.masked import Masking, masking_of
from decoding.options import Schedule
from decoding.strategies.block_diffusion import BlockDiffusionDecoder
from decoding.types import Generation
from tests.masked_reference import logits_of, refine
from tests.tiny import EOS, TURN, VOCABULARY, tiny_model, tiny_tokenizer

MASK = TURN
SPAN = 8
KINDS = {
    "block-causal": Masking(MASK, SPAN),
    "block-causal, shifted": Masking(MASK, SPAN, shift=True),
    "bidirectional": Masking(MASK, 0),
    "bidirectional, shifted": Masking(MASK, 0, shift=True),
}
PROMPTS = [[65 + (7 * i + j * j) % 50 for j in range(length)] for i, length in enumerate((3, 8, 13, 16, 21, 1))]


@cache
def backend(kind: str, step_tokens: int = 512, model: str = "llama") -> LocalBackend:
    return LocalBackend(
        tiny_model(model), tiny_tokenizer(), masking=KINDS[kind], slots=8, capacity=128, step_tokens=step_tokens
    )


def run(
    lm: LocalBackend, strategy: decoding.Strategy, prompts: Sequence[list[int]] = PROMPTS, **params: Any
) -> list[Generation]:
    lm.forget()
    given = SamplingParams(**{"max_new_tokens": 20, **params})
    generations: list[Generation] = decoding.generate(list(prompts), lm, strategy=strategy, params=given)
    assert [g.error for g in generations] == [None] * len(prompts)
    return generations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("policy", "plain"), [("fixed(count=3)", {"count": 3}), ("confidence(threshold=0.4)", {"threshold": 0.4})]
)
def test_a_ragged_batch_equals_the_uncached_unbatched_reference(kind: str, policy: str, plain: dict[str, Any]) -> None:
    lm, size = backend(kind), SPAN if KINDS[kind].span else 6
    together = run(lm, BlockDiffusion(policy, block_size=size))
    for prompt, generation in zip(PROMPTS, together, strict=True):
        tokens, passes = refine(tiny_model("llama"), KINDS[kind], prompt, 20, block_size=size, **plain)
        assert generation.tokens == tokens
        assert generation.finish_reason == "length"
        assert generation.metrics.forwards == passes
        if len(prompt) in (3, 16):
            (alone,) = run(lm, BlockDiffusion(policy, block_size=size), [prompt])
            assert alone.tokens == tokens


def test_blocks_smaller_than_the_checkpoints_equal_the_reference() -> None:
    for size in (4, 1):
        generations = run(backend("block-causal", model="qwen3"), BlockDiffusion("fixed(count=2)", block_size=size))
        for prompt, generation in zip(PROMPTS, generations, strict=True):
            expected, _ = refine(tiny_model("qwen3"), KINDS["block-causal"], prompt, 20, block_size=size, count=2)
            assert generation.tokens == expected


@pytest.mark.parametrize("step_tokens", [16, 40])
def test_prompts_read_in_chunks_of_whole_blocks_change_nothing(step_tokens: int) -> None:
    prompts = [[60 + (3 * j * j + i) % 64 for j in range(70 + i)] for i in range(3)]
    lm = backend("block-causal", step_tokens=step_tokens)
    for prompt, generation in zip(prompts, run(lm, BlockDiffusion("fixed(count=4)"), prompts), strict=True):
        expected, _ = refine(tiny_model("llama"), KINDS["block-causal"], prompt, 20, block_size=SPAN, count=4)
        assert generation.tokens == expected
        assert sum(step.prefill for step in generation.trace) > 1


def test_a_block_causal_prefix_is_reused_in_whole_blocks_and_only_by_its_own_kind() -> None:
    lm = LocalBackend(tiny_model("llama"), tiny_tokenizer(), masking=KINDS["block-causal"], capacity=128)
    prompt = [70 + j % 31 for j in range(29)]
    (first,) = run(lm, BlockDiffusion("fixed(count=4)"), [prompt])
    again = decoding.generate(
        [*prompt[:27], 99], lm, strategy=BlockDiffusion("fixed(count=4)"), params=SamplingParams(max_new_tokens=20)
    )
    assert again.metrics.reused_tokens == 24
    expected, _ = refine(tiny_model("llama"), KINDS["block-causal"], [*prompt[:27], 99], 20, block_size=SPAN, count=4)
    assert again.tokens == expected
    assert lm.engine.cache.acquire(prompt, span=1)[1] == 0
    assert first.metrics.reused_tokens == 0


def test_a_prefix_cache_is_exact_where_blocks_are_the_checkpoints_own_and_begin_with_the_answer() -> None:
    exact = run(backend("block-causal"), BlockDiffusion("fixed(count=2)"))
    cached = run(backend("block-causal"), BlockDiffusion("fixed(count=2)", cache="prefix"))
    same = [a.tokens == b.tokens for a, b in zip(exact, cached, strict=True)]
    assert [equal for prompt, equal in zip(PROMPTS, same, strict=True) if len(prompt) % SPAN == 0] == [True, True]
    assert not all(same)  # the end of another prompt shares a block with masks, and sees them


def test_approximate_caches_run_fewer_tokens_and_are_seen_to_differ() -> None:
    ran, tokens = {}, {}
    for cache_kind in ("exact", "prefix", "dual"):
        generations = run(backend("bidirectional"), BlockDiffusion("fixed(count=2)", block_size=5, cache=cache_kind))
        ran[cache_kind] = sum(step.tokens for g in generations for step in g.trace)
        tokens[cache_kind] = [token for g in generations for token in g.tokens]
    assert ran["dual"] < ran["prefix"] < ran["exact"]
    assert tokens["prefix"] != tokens["exact"] != tokens["dual"]  # a random model shows every approximation


def test_approximate_caches_are_exact_while_nothing_in_them_is_stale() -> None:
    """With one place per block every pass opens a block, and reads nothing of an earlier one."""
    exact = run(backend("bidirectional, shifted"), BlockDiffusion("fixed", block_size=1), max_new_tokens=8)
    dual = run(backend("bidirectional, shifted"), BlockDiffusion("fixed", block_size=1, cache="dual"), max_new_tokens=8)
    assert [g.tokens for g in dual] == [g.tokens for g in exact]


@pytest.mark.parametrize("kind", ["block-causal, shifted", "bidirectional"])
def test_sampling_belongs_to_the_request(kind: str) -> None:
    lm, strategy = backend(kind), BlockDiffusion("confidence(threshold=0.3)", block_size=4)
    params = [SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.95, seed=seed) for seed in range(6)]
    lm.forget()
    together = decoding.generate(PROMPTS, lm, strategy=strategy, params=params)
    for prompt, each, generation in zip(PROMPTS, params, together, strict=True):
        assert decoding.generate(prompt, lm, strategy=strategy, params=each).tokens == generation.tokens
    others = [each.but(seed=each.seed + 100) for each in params]
    assert [g.tokens for g in decoding.generate(PROMPTS, lm, strategy=strategy, params=others)] != [
        g.tokens for g in together
    ]


@pytest.mark.parametrize("early_stop", [True, False])
def test_an_answer_ends_at_its_end_of_sequence(early_stop: bool) -> None:
    lm, strategy = backend("block-causal"), BlockDiffusion("fixed", early_stop=early_stop)
    plain = run(lm, strategy)
    eos = plain[0].tokens[5]
    ending = LocalBackend(tiny_model("llama"), tiny_tokenizer(), masking=KINDS["block-causal"], eos=[eos], capacity=128)
    for prompt, generation in zip(PROMPTS, run(ending, strategy), strict=True):
        if eos in generation.tokens:
            assert generation.tokens.index(eos) == len(generation.tokens) - 1
            assert generation.finish_reason == "eos"
        if early_stop:
            tokens, passes = refine(tiny_model("llama"), KINDS["block-causal"], prompt, 20, block_size=SPAN, eos=[eos])
            assert (generation.tokens, generation.metrics.forwards) == (tokens, passes)
    assert any(eos in g.tokens for g in run(ending, strategy))
    banned = run(ending, strategy, min_new_tokens=20)
    assert all(eos not in g.tokens for g in banned)
    assert all(len(g.tokens) == 20 for g in run(ending, strategy, ignore_eos=True))


def test_an_end_that_has_to_come_last_never_stands_behind_a_mask() -> None:
    lm = LocalBackend(
        tiny_model("llama"), tiny_tokenizer(), masking=KINDS["block-causal"], eos=range(0, 250, 2), capacity=128
    )
    hasty = run(lm, BlockDiffusion("fixed(count=3)"))
    patient = run(lm, BlockDiffusion("fixed(count=3)", eos_last=True))
    assert [g.tokens for g in hasty] != [g.tokens for g in patient]


def test_revising_policies_end_and_are_counted() -> None:
    lm = backend("block-causal")
    for policy in ("remask(base=fixed(count=4), share=0.5)", "edit(base=fixed(count=4), threshold=0.2, extra=2)"):
        generations = run(lm, BlockDiffusion(policy))
        assert all(len(g.tokens) == 20 and MASK not in g.tokens for g in generations)
        assert sum(step.revised for g in generations for step in g.trace) > 0
        alone = [run(lm, BlockDiffusion(policy), [prompt])[0].tokens for prompt in PROMPTS[:2]]
        assert alone == [g.tokens for g in generations[:2]]


def test_log_probabilities_are_the_confidences_tokens_were_written_with() -> None:
    (generation,) = run(backend("block-causal"), BlockDiffusion("fixed(count=8)"), PROMPTS[3:4], logprobs=True)
    canvas = [*PROMPTS[3], *[MASK] * SPAN]
    logits = logits_of(tiny_model("llama"), canvas, SPAN)[-SPAN:].double()
    logits[:, MASK] = -torch.inf
    expected = logits.log_softmax(-1).max(-1).values
    assert generation.logprobs is not None
    assert generation.logprobs[:SPAN] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_canvas_grows_with_the_answer() -> None:
    short = run(backend("bidirectional"), BlockDiffusion("fixed(count=2)", block_size=4, canvas=6))
    assert all(len(g.tokens) == 20 for g in short)
    longest = max(step.tokens - len(prompt) for g, prompt in zip(short, PROMPTS, strict=True) for step in g.trace[:1])
    assert longest == 6


def test_a_full_context_ends_the_answer() -> None:
    (generation,) = run(backend("block-causal"), BlockDiffusion(), [[65] * 120], max_new_tokens=50)
    assert (generation.finish_reason, len(generation.tokens)) == ("context", 8)


def test_mask_predict_equals_its_paper_written_plainly() -> None:
    lm = LocalBackend(tiny_model("llama"), tiny_tokenizer(), masking=KINDS["bidirectional"], capacity=128)
    strategy = MaskPredict(lengths=3, iterations=3, length=7)
    for prompt, generation in zip(PROMPTS[:3], run(lm, strategy, PROMPTS[:3]), strict=True):

        def logits(canvas: list[int], prompt: list[int] = prompt) -> torch.Tensor:
            return logits_of(tiny_model("llama"), [*prompt, *canvas], 0)[len(prompt) :]

        best = plain_mask_predict(logits, (7, 6, 8), iterations=3)
        assert generation.tokens == best
        assert set(generation.parts) == {"length 6", "length 7", "length 8"}
        assert generation.metrics.new_tokens == len(best)


def plain_mask_predict(
    logits: Callable[[list[int]], torch.Tensor], lengths: Sequence[int], iterations: int
) -> list[int]:
    """The paper's loop, a length at a time. logits: [places, vocab] for a canvas."""
    best: tuple[float, list[int]] = (-float("inf"), [])
    for length in lengths:
        tokens = [MASK] * length
        trust = torch.zeros(length, dtype=torch.double)
        seen: list[list[int]] = []
        for iteration in range(1, iterations + 1):
            said = logits(tokens).double()
            said[:, MASK] = -torch.inf
            chance, choice = said.softmax(-1).max(-1)
            for i in range(length):
                if tokens[i] == MASK:
                    tokens[i], trust[i] = int(choice[i]), chance[i]
            seen.append(list(tokens))
            if iteration == iterations or tokens in seen[:-1][-1:]:
                break
            for i in trust.argsort(stable=True)[: max(1, int(length * (1 - iteration / iterations)))].tolist():
                tokens[i] = MASK
        best = max(best, (float(trust.log().mean()), tokens))
    return best[1]


def test_mask_predict_asks_the_checkpoint_for_lengths() -> None:
    lengths = tuple(range(200, 212))
    lm = LocalBackend(tiny_model("llama"), tiny_tokenizer(), masking=Masking(MASK, 0, lengths=lengths), capacity=128)
    (generation,) = run(lm, MaskPredict(lengths=2), PROMPTS[:1])
    logits = logits_of(tiny_model("llama"), [*PROMPTS[0], MASK], 0)[-1, list(lengths)]
    expected = [int(i) + 1 for i in logits.topk(2).indices]
    assert set(generation.parts) == {"length", *(f"length {n}" for n in expected)}
    assert len(generation.tokens) in expected


@pytest.mark.parametrize("lengths", [(), tuple(range(200, 212))])
def test_a_prompt_that_leaves_no_room_for_an_answer_fails_alone(lengths: tuple[int, ...], tmp_path: Path) -> None:
    masking, strategy = Masking(MASK, 0, lengths=lengths), MaskPredict(length=None if lengths else 5)
    lm = LocalBackend(tiny_model("llama"), tiny_tokenizer(), masking=masking, slots=8, capacity=64)
    for prompt in ([65] * 63, [65] * 64, [65] * 90):
        with pytest.raises(ContextOverflow, match=f"has {len(prompt)} tokens .* may hold 64.* larger capacity"):
            decoding.generate([[65] * 5, prompt], lm, strategy=strategy)
    assert len(run(lm, strategy, [[65] * 62])[0].tokens) == 1
    file = tmp_path / "questions.jsonl"
    turns = ["Hi", "la " * 30, "Ho"]
    file.write_text("".join(json.dumps({"question_id": i, "turns": [turn]}) + "\n" for i, turn in enumerate(turns)))
    params = SamplingParams(max_new_tokens=8)
    for streams in (1, 3):
        records = decoding.compare(
            file, lm, strategies=[strategy], params=params, schedule=Schedule(streams=streams, warm_up=0)
        )
        assert [record.finish_reason for record in records] == ["length", "error", "length"]
        assert [len(record.tokens) > 0 for record in records] == [True, False, True]
        (failed,) = (record.error for record in records if record.error is not None)
        assert "leaves no room for an answer" in failed


def bert() -> BertForMaskedLM:
    set_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=96, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def save(folder: Path, model: PreTrainedModel, **changes: Any) -> Path:
    """A checkpoint with a changed configuration, its tokenizer naming `<turn>` as the mask."""
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<turn>"})
    tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_a_masked_encoder_runs_on_the_engine(tmp_path: Path) -> None:
    model = bert()
    lm = decoding.load(str(save(tmp_path, model)))
    assert lm.masking == Masking(MASK, 0)
    for prompt, generation in zip(PROMPTS, run(lm, BlockDiffusion("fixed(count=2)", block_size=6)), strict=True):
        canvas, start = [*prompt, *[MASK] * 20], len(prompt)
        assert generation.tokens == _plain_encoder(model, canvas, start)
    with pytest.raises(CapabilityError, match="fills masks in"):
        decoding.generate("hello", lm)


@torch.inference_mode()
def _plain_encoder(model: PreTrainedModel, canvas: list[int], start: int) -> list[int]:
    for first in range(start, len(canvas), 6):
        last = min(first + 6, len(canvas))
        while MASK in canvas[first:last]:
            logits = model(torch.tensor([canvas])).logits[0, first:last].double()
            logits[:, MASK] = -torch.inf
            chance, choice = logits.softmax(-1).max(-1)
            opened = [i for i in range(last - first) if canvas[first + i] == MASK]
            for i in sorted(opened, key=lambda i: -chance[i].item())[:2]:
                canvas[first + i] = int(choice[i])
    return canvas[start:]


def bart() -> BartForConditionalGeneration:
    set_seed(4)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=96, init_std=0.3,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


@torch.inference_mode()
def answer_logits(model: PreTrainedModel, prompt: list[int], canvas: list[int]) -> torch.Tensor:
    """[places, vocab] from an encoder-decoder run as it is, but for a mask under which all places see each other."""
    given = [model.config.decoder_start_token_id, *canvas]
    return model(
        input_ids=torch.tensor([prompt]),
        decoder_input_ids=torch.tensor([given]),
        decoder_attention_mask=torch.zeros(1, 1, len(given), len(given)),
    ).logits[0, 1:]


def test_an_encoder_decoder_fills_in_what_its_encoder_read(tmp_path: Path) -> None:
    model, lengths = bart(), list(range(200, 212))
    section = {"attention": "bidirectional", "mask_token_id": MASK, "length_token_ids": lengths}
    lm = decoding.load(str(save(tmp_path, model, masked=section)), slots=8)
    assert lm.masking == Masking(MASK, 0, lengths=tuple(lengths), encoder=True)
    together = run(lm, MaskPredict(lengths=2, iterations=3), PROMPTS)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        scores = answer_logits(model, prompt, [MASK])[0, lengths]
        likeliest = [int(i) + 1 for i in scores.topk(2).indices]
        assert set(generation.parts) == {"length", *(f"length {n}" for n in likeliest)}

        def logits(canvas: list[int], prompt: list[int] = prompt) -> torch.Tensor:
            return answer_logits(model, [*prompt, lengths[len(canvas) - 1]], canvas)

        assert generation.tokens == plain_mask_predict(logits, likeliest, iterations=3)
    (alone,) = run(lm, MaskPredict(lengths=2, iterations=3), PROMPTS[4:5])
    assert alone.tokens == together[4].tokens
    swapped = run(lm, MaskPredict(length=6), [PROMPTS[2], PROMPTS[3]])
    assert swapped[0].tokens != swapped[1].tokens, "the answer does not depend on what the encoder read"
    whole = run(lm, BlockDiffusion("fixed", block_size=20), PROMPTS[:2], ignore_eos=True)
    assert [len(g.tokens) for g in whole] == [20, 20]


def test_what_an_encoder_decoder_cannot_do_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"attention": "bidirectional", "mask_token_id": MASK}
    lm = decoding.load(str(save(tmp_path, bart(), masked=section)), slots=2)
    part = decoding.generate(PROMPTS[0], lm, strategy="block-diffusion(block_size=4)")
    assert part.error is not None and "as one block" in part.error
    with pytest.raises(InvalidRequest, match="keeps nothing of its answer"):
        decoding.generate(PROMPTS[0], lm, strategy="block-diffusion(cache=dual)")
    blocks = {**section, "attention": "block-causal", "block_size": 4}
    with pytest.raises(ModelError, match="fills answers in at once"):
        decoding.load(str(save(tmp_path / "blocks", bart(), masked=blocks)))
    masking = Masking(MASK, 0, encoder=True)
    endless = bart()
    endless.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="no token that its decoder starts with"):
        LocalBackend(endless, tiny_tokenizer(), masking=masking, slots=2)
    backward = bart()
    forward = backward.forward
    monkeypatch.setattr(backward, "forward", lambda **given: forward(**{**given, "decoder_attention_mask": None}))
    with pytest.raises(ModelError, match="does not take a mask"):
        LocalBackend(backward, tiny_tokenizer(), masking=masking, slots=2)


def test_published_kinds_load_as_what_they_are_in_shape(tmp_path: Path) -> None:
    llama, qwen3 = tiny_model("llama"), tiny_model("qwen3")
    set_seed(1)
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64}
    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    qwen2 = Qwen2ForCausalLM(Qwen2Config(**shape, **heads)).eval()
    section = {"attention": "block-causal", "block_size": 8, "mask_token_id": MASK}
    cases: list[tuple[str, PreTrainedModel, dict[str, Any], Masking]] = [
        ("Dream", qwen2, {"mask_token_id": MASK}, Masking(MASK, 0, shift=True)),
        ("Fast_dLLM_Qwen", qwen2, {"bd_size": 16}, Masking(MASK, 16, shift=True)),
        ("sdar", qwen3, {"block_size": 4}, Masking(MASK, 4)),
        ("llama", llama, {"masked": section}, Masking(MASK, 8)),
    ]  # fmt: skip
    for kind, model, changes, masking in cases:
        lm = decoding.load(str(save(tmp_path / kind, model, model_type=kind, auto_map={"AutoModel": "x.y"}, **changes)))
        assert lm.masking == masking, kind
        ours = logits_of(lm.model, PROMPTS[4], masking.span)
        assert torch.equal(ours, logits_of(model, PROMPTS[4], masking.span)), kind
        (generation,) = run(lm, BlockDiffusion("fixed(count=2)"), PROMPTS[4:5])
        size = masking.span or 32
        assert (
            generation.tokens == refine(model, masking, PROMPTS[4], 20, block_size=size, count=2, eos=list(lm.eos))[0]
        )


def test_a_llada_checkpoint_is_a_llama_with_other_names(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = save(
        tmp_path, model, model_type="llada", architectures=["LLaDAModelLM"], d_model=32, n_layers=3, n_heads=4,
        n_kv_heads=2, mlp_hidden_size=64, max_sequence_length=512, embedding_size=VOCABULARY, weight_tying=False,
        mask_token_id=MASK, hidden_size=None, num_hidden_layers=None, num_attention_heads=None,
        num_key_value_heads=None, intermediate_size=None, max_position_embeddings=None, tie_word_embeddings=None,
    )  # fmt: skip
    from safetensors.torch import load_file, save_file

    names = {
        "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
        "self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
    }  # fmt: skip
    renamed = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        new = name.replace("model.layers.", "model.transformer.blocks.").replace("model.norm", "model.transformer.ln_f")
        new = new.replace("model.embed_tokens", "model.transformer.wte").replace("lm_head", "model.transformer.ff_out")
        for ours, theirs in names.items():
            new = new.replace(f".{ours}.", f".{theirs}.")
        renamed[new] = weight
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    lm = decoding.load(str(folder))
    assert lm.masking == Masking(MASK, 0)
    assert torch.equal(logits_of(lm.model, PROMPTS[4], 0), logits_of(model, PROMPTS[4], 0))
    gelu = json.loads((folder / "config.json").read_text()) | {"activation_type": "gelu"}
    (folder / "config.json").write_text(json.dumps(gelu))
    with pytest.raises(ModelError, match="activation_type='gelu'"):
        decoding.load(str(folder))


def test_bad_checkpoints_get_one_sentence(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_model("llama"), masked={"attention": "sideways"})
    file = folder / "config.json"
    plain = json.loads(file.read_text())
    for section, message in (
        ({"attention": "sideways"}, "needs an attention"),
        ({"attention": "bidirectional"}, "names no mask token"),
        ({"attention": "bidirectional", "mask_token_id": 10**6}, "no id below 259"),
        ({"attention": "block-causal", "mask_token_id": 3}, "needs a block_size of at least 2"),
        ({"attention": "bidirectional", "mask_token_id": True}, "no id below 259"),
        ({"attention": "bidirectional", "mask_token_id": 3, "shift": "no"}, "shift .* must be true or false"),
        ({"attention": "bidirectional", "mask_token_id": 3, "length_token_ids": 7}, "must be a list of token ids"),
        ({"attention": "bidirectional", "mask_token_id": 3, "length_token_ids": [4, 259]}, "259, .* no id below 259"),
        ({"attention": "bidirectional", "mask_token_id": 3, "length_token_ids": ["a"]}, "'a', .* no id below 259"),
        ({"attention": "bidirectional", "mask_token_id": 3, "length_token_ids": [4, 5, 4]}, "must differ"),
    ):
        file.write_text(json.dumps({**plain, "masked": section}))
        with pytest.raises(ModelError, match=message):
            decoding.load(str(folder))
    file.write_text(json.dumps({**plain, "model_type": "diffusion_gemma"}))
    with pytest.raises(ModelError, match="second tower"):
        decoding.load(str(folder))
    with pytest.raises(ModelError, match="a window on both sides"):
        decoding.load(str(save(tmp_path / "windows", bert(), local_attention=128)))
    unmasked = save(tmp_path / "unmasked", bert())
    tiny_tokenizer().save_pretrained(unmasked)
    with pytest.raises(ModelError, match="names no mask token"):
        decoding.load(str(unmasked))


def test_what_published_kinds_declare_is_checked_as_the_section_is(tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_model("qwen3"), model_type="sdar")
    file = folder / "config.json"
    plain = json.loads(file.read_text())
    for changes, message in (
        ({"mask_token_id": 10**6}, "no id below 259"),
        ({"mask_token_id": "<turn>"}, "no id below 259"),
        ({"block_size": 1}, "needs a block_size of at least 2 .* not 1"),
        ({"block_size": 0}, "needs a block_size of at least 2 .* not 0"),
        ({"block_size": None}, "needs a block_size of at least 2 .* not None"),
    ):
        file.write_text(json.dumps({**plain, **changes}))
        with pytest.raises(ModelError, match=message):
            decoding.load(str(folder))
    file.write_text(json.dumps({**plain, "mask_token_id": None}))
    assert decoding.load(str(folder), slots=1).masking == Masking(MASK, 4), "null says nothing; the tokenizer does"
    with pytest.raises(ModelError, match=r"needs a bd_size of at least 2 .* not '32'"):
        masking_of({"model_type": "Fast_dLLM_Qwen", "mask_token_id": 3, "bd_size": "32"}, tiny_tokenizer(), VOCABULARY)


def test_an_encoder_that_the_engine_cannot_run_gets_one_sentence(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    with pytest.raises(ModelError, match=r"distilbert models lack something that the engine needs .*layer_idx"):
        decoding.load(str(save(tmp_path, DistilBertForMaskedLM(config).eval())))


def test_what_does_not_fit_is_refused_before_anything_runs() -> None:
    causal = LocalBackend(tiny_model("llama"), tiny_tokenizer(), capacity=128)
    with pytest.raises(CapabilityError, match="masked checkpoint"):
        decoding.generate("hello", causal, strategy="block-diffusion")
    with pytest.raises(CapabilityError, match="bidirectional attention"):
        decoding.generate("hello", backend("block-causal"), strategy="mask-predict")
    with pytest.raises(CapabilityError, match="give mask-predict a length"):
        decoding.generate("hello", backend("bidirectional"), strategy="mask-predict")
    for options, kind, message in (
        (BlockDiffusion(block_size=3), "block-causal", "does not divide"),
        (BlockDiffusion(block_size=500), "bidirectional", "does not fit a sequence of 128"),
        (BlockDiffusion(canvas=9), "block-causal", "canvas is for bidirectional"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            BlockDiffusionDecoder(options, KINDS[kind], 128)
    penalised = decoding.generate(
        PROMPTS[0], backend("bidirectional"), strategy="block-diffusion", params=SamplingParams(repetition_penalty=1.2)
    )
    assert penalised.error is not None and "no repetition_penalty" in penalised.error


def test_text_forms_parse_back() -> None:
    from decoding.strategies import parse

    for text in (
        "block-diffusion",
        "block-diffusion(policy=fixed(count=2), block_size=16, cache=dual)",
        "block-diffusion(policy=remask(base=klass(confidence=0.8)))",
        "mask-predict(lengths=5, iterations=10)",
    ):
        strategy = parse(text)
        assert str(strategy) == text
        assert parse(str(strategy)) == strategy and hash(parse(text)) == hash(strategy)
    assert isinstance(parse("block-diffusion"), BlockDiffusion) and EOS != MASK
