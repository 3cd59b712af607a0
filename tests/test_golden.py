"""The values of the original 2023 implementation, recorded in golden/, against ours (tests/golden/README.md says how).

Every case of every index found is proved: tests/golden is a selection that travels with the repository, and a full
folder is used as well where it exists (../shared/golden beside the repository, or the path in CHATGLM_GOLDEN).
`realtok_*` cases need the published vocabulary: ../shared/tokenizers/chatglm-6b/ice_text.model or CHATGLM_TOKENIZER.

Recorded hidden states and caches have the sequence first; ours have the batch first: the tests convert.
"""

import copy
import dataclasses
import functools
import inspect
import json
import os
import pathlib

import pytest
import torch
import transformers
from safetensors.torch import load_file

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm.chat import build_prompt, process_response
from chatglm.generation import InvalidScoreLogitsProcessor
from chatglm.modeling_chatglm import apply_rotary, inverse_frequencies, rotary_embedding
from chatglm.quantization import dequantize_weight, linear, quantize_weight, set_activations, unpack_weight
from ptuning.data import Collator, Example, encode_example

ROOT = pathlib.Path(__file__).resolve().parent.parent
SELECTION = ROOT / "tests" / "golden"
FULL = pathlib.Path(os.environ.get("CHATGLM_GOLDEN", ROOT.parent / "shared" / "golden"))
PUBLISHED_VOCABULARY = pathlib.Path(
    os.environ.get("CHATGLM_TOKENIZER", ROOT.parent / "shared" / "tokenizers" / "chatglm-6b" / "ice_text.model")
)
PROVED = set()  # filled by @golden: (folder, id) of the cases that have a test here


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One recorded case: `entry` is its object in the index of `folder`."""

    folder: pathlib.Path
    entry: dict

    @property
    def id(self):
        return self.entry["id"]

    @property
    def meta(self):
        return self.entry.get("meta", {})

    @property
    def tolerance(self):
        return self.entry.get("tolerance", {})

    def tensors(self):
        return load_file(self.folder / self.entry["tensors"])

    def text(self):
        return json.loads((self.folder / self.entry["text"]).read_text(encoding="utf-8"))

    def model(self, attention="sdpa", dtype=torch.float32):
        names = (self.entry["weights"], self.meta.get("extra_weights"))
        return build_model(self.folder, tuple(filter(None, names)), attention, dtype)

    def assert_logits(self, got, want):
        bounds = {"atol": self.tolerance["logits_atol"], "rtol": self.tolerance.get("logits_rtol", 0)}
        torch.testing.assert_close(got, want, **bounds)

    def assert_loss(self, got, want):
        torch.testing.assert_close(got, want, atol=self.tolerance["loss_atol"], rtol=0)


@functools.lru_cache
def read_index(folder):
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


def required_cases():
    """All cases but the informational ones, of the selection and of the full set if there is one."""
    use_full = "CHATGLM_GOLDEN" in os.environ or (FULL / "index.json").exists()
    folders = [SELECTION, FULL] if use_full else [SELECTION]
    cases = [Case(folder, entry) for folder in folders for entry in read_index(folder)["cases"]]
    return [case for case in cases if not case.meta.get("informational")]


def golden(kind, where=lambda case: True):
    """A parametrisation over the required cases of a kind for which `where` holds."""
    cases = [case for case in required_cases() if case.entry["kind"] == kind and where(case)]
    PROVED.update((case.folder, case.id) for case in cases)
    names = [case.id if case.folder == SELECTION else f"full-{case.id}" for case in cases]
    return pytest.mark.parametrize("case", cases, ids=names)


both_attentions = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@functools.lru_cache
def build_model(folder, names, attention, dtype):
    """The recorded model in eval mode; later names (a prefix encoder) go over the first."""
    entries = [read_index(folder)["weights"][name] for name in names]
    config = ChatGLMConfig(**entries[-1]["config"])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    assert isinstance(model, ChatGLMForConditionalGeneration)
    state = {key: value for entry in entries for key, value in load_file(folder / entry["file"]).items()}
    missing, unexpected = model.float().load_state_dict(state, strict=False)
    assert not missing and all(key.endswith("rotary_emb.inv_freq") for key in unexpected)
    return model.to(dtype).eval()


@functools.lru_cache
def mini_tokenizer(folder):
    options = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    del options["tokenizer_class"]
    return ChatGLMTokenizer(str(folder / "tokenizer" / "mini_ice_text.model"), **options)


@functools.lru_cache
def published_tokenizer():
    if not PUBLISHED_VOCABULARY.exists():
        pytest.skip(f"needs the published vocabulary: no file {PUBLISHED_VOCABULARY} (CHATGLM_TOKENIZER names another)")
    return ChatGLMTokenizer(str(PUBLISHED_VOCABULARY))


def tokenizer_of(case):
    return published_tokenizer() if case.id.startswith("realtok") else mini_tokenizer(case.folder)


def assert_cache(case, cache, recorded, prefix="past"):
    """Keys and values of every layer; recorded as [seq_len, batch, num_heads, head_dim]."""
    for index, layer in enumerate(cache.layers):
        for name, tensor in (("key", layer.keys), ("value", layer.values)):
            want = recorded[f"{prefix}.{index}.{name}"].permute(1, 2, 0, 3)  # [batch, num_heads, seq_len, head_dim]
            case.assert_logits(tensor[:, :, : want.shape[2]], want)


def test_every_case_is_proved():
    assert {(case.folder, case.id) for case in required_cases()} == PROVED


def test_the_selection_is_small_and_has_every_kind():
    kinds = {case.entry["kind"] for case in required_cases()}
    assert kinds == {entry["kind"] for entry in read_index(SELECTION)["cases"]}
    assert sum(path.stat().st_size for path in SELECTION.rglob("*") if path.is_file()) <= 4e6


# forward


@golden("forward", lambda case: "dtype" not in case.meta)
@both_attentions
@torch.no_grad()
def test_forward(case, attention):
    recorded = case.tensors()
    model = case.model(attention)
    labels = recorded.get("labels")
    assert torch.equal(model.get_position_ids(recorded["input_ids"]), recorded["position_ids"])
    own = model(recorded["input_ids"], labels=labels)  # the model makes positions and mask
    given = model(
        recorded["input_ids"],
        position_ids=recorded["position_ids"],
        attention_mask=recorded["attention_mask"],
        labels=labels,
    )
    for output in (own, given):
        case.assert_logits(output.logits, recorded["logits"])
        if labels is not None:
            case.assert_loss(output.loss, recorded["loss"])


@golden("forward", lambda case: "hidden_states.0" in case.entry["keys"])
@torch.no_grad()
def test_forward_inside(case):
    """Hidden states, attention probabilities and cache of every layer."""
    recorded = case.tensors()
    output = case.model("eager")(
        recorded["input_ids"], use_cache=True, output_hidden_states=True, output_attentions=True
    )
    assert len(output.hidden_states) == sum(key.startswith("hidden_states.") for key in recorded)
    assert len(output.attentions) == sum(key.startswith("attentions.") for key in recorded)
    for index, hidden_states in enumerate(output.hidden_states):
        case.assert_logits(hidden_states, recorded[f"hidden_states.{index}"].transpose(0, 1))
    for index, probabilities in enumerate(output.attentions):
        case.assert_logits(probabilities, recorded[f"attentions.{index}"].view_as(probabilities))
    assert_cache(case, output.past_key_values, recorded)


@golden("forward", lambda case: "dtype" in case.meta)
@both_attentions
@torch.no_grad()
def test_forward_in_half_precision(case, attention):
    recorded = case.tensors()
    dtype = recorded["logits"].dtype
    logits = case.model(attention, dtype)(recorded["input_ids"]).logits
    assert logits.dtype == dtype
    case.assert_logits(logits, recorded["logits"])
    # Two computations, each with the recorded rounding noise of its dtype: their difference is sqrt(2) times as large.
    difference = (logits.float() - recorded["logits"].float()).abs().mean()
    assert difference <= 2**0.5 * case.meta["mean_abs_diff_to_fp32"]
    exact = case.model(attention)(recorded["input_ids"]).logits
    torch.testing.assert_close(exact, recorded["logits_fp32"], atol=1e-4, rtol=1e-4)


@golden("padded_forward")
@both_attentions
@torch.no_grad()
def test_padded_forward(case, attention):
    """Tokens of a left-padded batch, with the tokenizer's masks and positions and with a plain 0/1 mask."""
    recorded = case.tensors()
    model, valid = case.model(attention), recorded["valid"]
    inputs = {name: recorded[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs).logits
    case.assert_logits(logits[valid], recorded["logits"][valid])
    assert logits.isfinite().all()  # rows of pads see nothing
    if "masktext" not in case.id:  # there the tokenizer's positions follow [MASK], the model's own follow gMASK
        logits = model(recorded["input_ids"], attention_mask=valid.long()).logits
        case.assert_logits(logits[valid], recorded["logits"][valid])


@golden("incremental")
@both_attentions
@torch.no_grad()
def test_incremental(case, attention):
    recorded = case.tensors()
    model, prompt, answer = case.model(attention), recorded["prompt"], recorded["answer"]
    row = torch.cat([prompt, answer], dim=1)
    assert torch.equal(model.get_position_ids(row)[:, :, prompt.shape[1] :], recorded["step_position_ids"])
    case.assert_logits(model(row).logits, recorded["full_logits"])
    output = model(prompt, use_cache=True)
    case.assert_logits(output.logits, recorded["prefill_logits"])
    steps = [output.logits[:, -1]]
    for step in range(answer.shape[1]):
        output = model(
            answer[:, step : step + 1],
            position_ids=recorded["step_position_ids"][:, :, step : step + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        steps.append(output.logits[:, -1])
    case.assert_logits(torch.stack(steps, dim=1), recorded["step_logits"])
    assert_cache(case, output.past_key_values, recorded)


# generation


def generate(model, input_ids, **kwargs):
    return model.generate(input_ids, do_sample=False, eos_token_id=None, **kwargs)


@golden("generate")
@both_attentions
def test_generate(case, attention):
    recorded = case.tensors()
    model, count = case.model(attention), case.meta["max_new_tokens"]
    inputs = {name: recorded[name] for name in ("attention_mask", "position_ids") if name in recorded}
    sequences = generate(model, recorded["input_ids"], max_new_tokens=count, **inputs)
    assert sequences.tolist() == recorded["sequences"].tolist()
    logits = recorded.get("prefill_logits", recorded.get("logits"))
    if logits is not None:
        with torch.no_grad():
            got = model(recorded["input_ids"], **inputs).logits
        tokens = recorded["input_ids"] != model.config.pad_token_id
        case.assert_logits(got[tokens], logits[tokens])


@golden("generate", lambda case: "stream_last_yield_len" in case.meta)
def test_stream_generate(case):
    recorded = case.tensors()
    input_ids, sequences = recorded["input_ids"], recorded["sequences"].tolist()[0]
    stream = case.model().stream_generate(
        input_ids, do_sample=False, eos_token_id=None, max_length=input_ids.shape[1] + case.meta["max_new_tokens"]
    )
    yielded = [ids.tolist()[0] for ids in stream]
    assert len(yielded) == case.meta["stream_yield_count_max_length"]
    assert len(yielded[-1]) == case.meta["stream_last_yield_len"]
    assert yielded == [sequences[: input_ids.shape[1] + 1 + index] for index in range(len(yielded))]


@golden("generate", lambda case: "single_rows" in case.meta)
def test_generate_padded_rows_alone(case):
    """Each row of the left-padded batch alone, and the batch with a plain 0/1 mask, give the same tokens."""
    recorded = case.tensors()
    model, count = case.model(), case.meta["max_new_tokens"]
    tokens = recorded["input_ids"] != model.config.pad_token_id
    for row, mask, want in zip(recorded["input_ids"], tokens, case.meta["single_rows"], strict=True):
        prompt = row[mask].unsqueeze(0)
        assert generate(model, prompt, max_new_tokens=count)[0, prompt.shape[1] :].tolist() == want
    batch = generate(model, recorded["input_ids"], max_new_tokens=count, attention_mask=tokens.long())
    assert batch.tolist() == recorded["sequences"].tolist()


@golden("stopping")
@pytest.mark.filterwarnings("ignore::UserWarning")  # a prompt at max_length warns
def test_stopping(case):
    recorded = case.text()
    model, prompt = case.model(), torch.tensor([recorded["prompt"]])
    free = generate(model, prompt, max_new_tokens=len(recorded["greedy_free"]))
    assert free[0, prompt.shape[1] :].tolist() == recorded["greedy_free"]

    def run(**kwargs):
        sequences = model.generate(prompt, do_sample=False, **kwargs)
        stream = model.stream_generate(prompt, do_sample=False, **kwargs)
        return sequences[0].tolist(), [ids[0].tolist() for ids in stream]

    assert recorded["eos_first_index"] == recorded["greedy_free"].index(recorded["eos_used"])
    sequence, yielded = run(eos_token_id=recorded["eos_used"], max_length=prompt.shape[1] + 24)
    assert sequence == recorded["generate_with_eos"]
    assert yielded == recorded["stream_with_eos"]
    for name in ("max_length_below_prompt", "max_length_plus5"):
        sequence, yielded = run(eos_token_id=None, max_length=recorded[name]["max_length"])
        assert sequence == recorded[name]["generate"]
        assert yielded == recorded[name]["stream"]


def catch_filters(model, input_ids, logits_processor, **kwargs):
    """A decoding method that decodes nothing: what generate would have applied to the scores."""
    return logits_processor


@golden("warper")
def test_warper(case):
    """The filters that generate (and so stream_generate) sets up behind chat's guard, their order and what they do."""
    recorded = case.tensors()
    options = {name: case.meta[name] for name in ("temperature", "top_k", "top_p")}
    options["logits_processor"] = transformers.LogitsProcessorList([InvalidScoreLogitsProcessor()])
    if options["top_k"] == 50:
        del options["top_k"]  # the default, active unless the caller says otherwise
    model = build_model(case.folder, ("m64",), "sdpa", torch.float32)
    prompt = torch.tensor([[7, model.config.gmask_token_id, model.config.bos_token_id]])
    filters = model.generate(prompt, custom_generate=catch_filters, max_new_tokens=1, do_sample=True, **options)
    names = [type(processor).__name__ for processor in filters]
    assert names == ["InvalidScoreLogitsProcessor", *case.meta["order"]]
    scores = filters(recorded["input_ids"], recorded["scores"].clone())
    assert case.meta["filter_value"] == "-inf" and torch.equal(scores.isinf(), recorded["out"].isinf())
    torch.testing.assert_close(scores, recorded["out"], atol=case.tolerance["atol"], rtol=0)
    torch.testing.assert_close(scores.softmax(dim=-1), recorded["probs"], atol=case.tolerance["atol"], rtol=0)


@golden("logits_processor")
def test_logits_processor(case):
    recorded = case.tensors()
    scores = recorded["scores"].clone()
    got = InvalidScoreLogitsProcessor()(torch.zeros(len(scores), 1, dtype=torch.long), scores)
    assert got is scores and torch.equal(got, recorded["out"])


# rotary tables


@golden("rotary", lambda case: "positions" in case.entry["keys"])
@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rotary_table(case, name, dtype):
    recorded = case.tensors()
    frequencies = recorded[f"inv_freq.{name}"]
    rotary_dim = 2 * frequencies.shape[0]
    assert torch.equal(inverse_frequencies(rotary_dim, dtype, torch.device("cpu")), frequencies)
    cos, sin = rotary_embedding(recorded["positions"], rotary_dim, dtype)
    for got, want in ((cos, recorded[f"cos.{name}"]), (sin, recorded[f"sin.{name}"])):
        torch.testing.assert_close(got, want, atol=case.tolerance[f"{name}_atol"], rtol=0)
        if dtype != torch.float32:
            # Bit for bit on the processors we know; a cosine of another one, off in the last place of float32, changes
            # the rounding of one value in thousands at most. Angles that were not rounded change most of them.
            assert (got == want).float().mean() >= 0.999


@golden("rotary", lambda case: "q_rot" in case.entry["keys"])
def test_rotary_2d(case):
    recorded = case.tensors()
    for name in ("q", "k"):
        states = recorded[name].permute(1, 2, 0, 3)  # [batch, num_heads, seq_len, head_dim]
        positions = recorded["position_ids"].transpose(1, 2).unsqueeze(1)  # [batch, 1, seq_len, streams]
        tables = rotary_embedding(positions, states.shape[-1] // 2, states.dtype)
        want = recorded[f"{name}_rot"].permute(1, 2, 0, 3)
        torch.testing.assert_close(apply_rotary(states, *tables), want, atol=case.tolerance["atol"], rtol=0)


# P-Tuning


@golden("ptuning")
@both_attentions
def test_ptuning(case, attention):
    """Logits, loss, prefix cache and gradients of the prefix encoder; nothing else is trained."""
    recorded = case.tensors()
    model = case.model(attention)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trained) == set(case.meta["requires_grad_before_tying"]) - {"lm_head.weight"}
    model.zero_grad()
    output = model(recorded["input_ids"], labels=recorded["labels"], use_cache=True)
    case.assert_logits(output.logits, recorded["logits"])
    case.assert_loss(output.loss, recorded["loss"])
    assert_cache(case, output.past_key_values, recorded, prefix="prefix_past")
    output.loss.backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(
            parameter.grad,
            recorded[f"grad.{name}"],
            atol=case.tolerance["grad_atol"],
            rtol=case.tolerance["grad_rtol"],
        )


def training_features(tokenizer, prompt, answer, max_source, max_target):
    """input_ids and labels of one example, padded on the right to max_source + max_target."""
    encoded = encode_example(tokenizer, Example(prompt, answer), max_source, max_target)
    collate = Collator(tokenizer, length=max_source + max_target)
    batch = collate([{"input_ids": encoded.input_ids, "labels": encoded.labels}])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


@golden("training_features")
@pytest.mark.parametrize("vocabulary", ["mini", "real"])
def test_training_features(case, vocabulary):
    tokenizer = mini_tokenizer(case.folder) if vocabulary == "mini" else published_tokenizer()
    recorded = case.text()[vocabulary]
    lengths = recorded["max_source_length"], recorded["max_target_length"]
    for row in recorded["rows"]:
        features = training_features(tokenizer, row["prompt"], row["answer"], *lengths)
        assert features == (row["input_ids"], row["labels"])


# checkpoint layout


@golden("checkpoint_layout", lambda case: case.id == "ptuning_checkpoint")
def test_prefix_checkpoint_layout(case):
    base = read_index(case.folder)["weights"]["m64"]["config"]
    for projection, recorded in case.text().items():
        config = ChatGLMConfig(
            **base | {"pre_seq_len": recorded["config_pre_seq_len"], "prefix_projection": projection == "True"}
        )
        model = ChatGLMForConditionalGeneration(config)
        assert (model.lm_head.weight is model.transformer.word_embeddings.weight) == recorded["tied"]
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        got = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in trained.items()}
        assert got == recorded["keys"]


@golden("checkpoint_layout", lambda case: case.id == "state_dict_layout")
def test_state_dict_layout(case):
    for name, recorded in case.text().items():
        model = build_model(case.folder, (name,), "sdpa", torch.float32)
        want = {key: shape for key, shape in recorded.items() if not key.endswith("rotary_emb.inv_freq")}
        assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == want


# chat


@golden("prompt")
def test_prompt(case):
    for row in case.text():
        assert build_prompt(row["query"], row["history"]) == row["prompt"] == row["prompt_stream"]


@golden("process_response")
def test_process_response(case):
    rows = case.text()
    assert [process_response(row["in"]) for row in rows] == [row["out"] for row in rows]


@golden("defaults")
def test_signatures(case):
    for method, parameters in case.text()["signatures"].items():
        signature = inspect.signature(getattr(ChatGLMForConditionalGeneration, method)).parameters
        assert list(signature)[1 : len(parameters) + 1] == list(parameters)  # the same order, after self
        for name, default in parameters.items():
            # The record has null for "no default" and for None alike.
            assert signature[name].default == default or signature[name].default is inspect.Parameter.empty


@golden("defaults")
def test_default_options_of_generate(case, monkeypatch):
    """What chat and stream_chat hand to generate when the caller says nothing; num_beams 1 and top_k 50 go unsaid."""
    recorded = case.text()
    model, tokenizer = build_model(case.folder, ("chat32",), "sdpa", torch.float32), mini_tokenizer(case.folder)
    calls = []
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: calls.append(kwargs) or iter(()))
    model.chat(tokenizer, "你好")
    list(model.stream_chat(tokenizer, "你好"))
    for call, name in zip(calls, ("chat_passes", "stream_chat_passes"), strict=True):
        call["logits_processor"] = [type(processor).__name__ for processor in call["logits_processor"]]
        want = recorded[name]
        assert {option: call.get(option) for option in want if option != "num_beams"} == {
            option: value for option, value in want.items() if option != "num_beams"
        }
        assert call.get("num_beams", 1) == want.get("num_beams", 1) and "top_k" not in call


@golden("chat")
@both_attentions
def test_chat(case, attention):
    model, tokenizer = case.model(attention), mini_tokenizer(case.folder)
    for row in case.text():
        history = None if row["history"] is None else [tuple(pair) for pair in row["history"]]
        options = {"history": history, "max_length": row["max_length"], "do_sample": False}
        assert build_prompt(row["query"], history) == row["prompt"]
        assert tokenizer(row["prompt"])["input_ids"] == row["input_ids"]
        before = list(history or [])
        response, new_history = model.chat(tokenizer, row["query"], **options)
        assert response == row["response"]
        assert new_history == [tuple(pair) for pair in row["history_out"]]
        stream = list(model.stream_chat(tokenizer, row["query"], **options))
        assert [text for text, _ in stream] == row["stream_responses"]
        assert stream[-1][1] == [tuple(pair) for pair in row["stream_last_history"]]
        assert (history or []) == before  # the caller's list is left alone
        prompt = torch.tensor([row["input_ids"]])
        sequences = model.generate(prompt, do_sample=False, max_length=row["max_length"])
        assert sequences[0, prompt.shape[1] :].tolist() == row["generated"]


# tokenizer


def encode_pieces(tokenizer, text, **kwargs):
    """Ids of the SentencePiece layer alone: control strings in the text are ordinary text here."""
    return tokenizer.convert_tokens_to_ids(tokenizer.encode_pieces(text, **kwargs))


@golden("tokenizer", lambda case: case.id.endswith("tok_strings"))
def test_tokenizer_strings(case):
    tokenizer = tokenizer_of(case)
    for row in case.text()["cases"]:
        ids, plain = row["ids"], row["ids_no_special"]
        got = {
            "text": row["text"],
            "ids": tokenizer(row["text"])["input_ids"],
            "ids_no_special": tokenizer.encode(row["text"], add_special_tokens=False),
            "tokens": tokenizer.tokenize(row["text"]),
            "sp_ids": encode_pieces(tokenizer, row["text"]),
            "sp_ids_no_dummy": encode_pieces(tokenizer, row["text"], add_dummy_prefix=False),
            "sp_decode": tokenizer.decode(row["sp_ids"], clean_up_tokenization_spaces=False),
            "decode_ids": tokenizer.decode(ids, clean_up_tokenization_spaces=True),
            "decode_no_special": tokenizer.decode(plain, clean_up_tokenization_spaces=True),
            "decode_skip_special": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True),
            "decode_no_cleanup": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            "round_trip": tokenizer.decode(plain, clean_up_tokenization_spaces=True) == row["text"],
        }
        assert got == {name: row[name] for name in got}


@golden("tokenizer", lambda case: case.id.endswith("tok_blank_runs"))
def test_tokenizer_blank_runs(case):
    tokenizer = tokenizer_of(case)
    for row in case.text()["cases"]:
        blanks = " " * row["blanks"]

        def encode(text):
            return tokenizer.encode(text, add_special_tokens=False)

        between, survives = row["between"]
        assert encode(f"a{blanks}b") == between
        assert (tokenizer.decode(between) == f"a{blanks}b") == survives
        assert tokenizer.tokenize(f"a{blanks}b") == row["tokens"]
        assert encode(f"{blanks}b") == row["leading"]
        assert encode(blanks) == row["alone"]
        assert tokenizer.decode(row["leading"]) == row["decode_leading"]


@golden("tokenizer", lambda case: case.id.endswith("tok_misc"))
def test_tokenizer_special_tokens(case):
    tokenizer, recorded = tokenizer_of(case), case.text()
    pieces = {piece: tokenizer.convert_tokens_to_ids(piece) for piece in recorded["special_ids"]}
    assert pieces == recorded["special_ids"]
    want = dict(recorded["properties"])
    assert len(tokenizer) == want.pop("len")
    for name in ("all_special_tokens", "all_special_ids"):
        assert set(getattr(tokenizer, name)) == set(want.pop(name))
    assert {name: getattr(tokenizer, name) for name in want} == want
    for ids, decoded in recorded["decode"].items():
        assert tokenizer.decode(json.loads(ids)) == decoded["decode"]
        if decoded["skip_special"] is not None:
            assert tokenizer.decode(json.loads(ids), skip_special_tokens=True) == decoded["skip_special"]


@golden("tokenizer", lambda case: case.id.endswith("tok_misc"))
def test_tokenizer_builds_inputs(case):
    tokenizer, recorded = tokenizer_of(case), case.text()["build"]
    first, second = "你好", "world"
    long_text, long_pair = "今天天气很好，我们一起去公园玩", "去公园散步，再去吃饭"
    a, b = (tokenizer.encode(text, add_special_tokens=False) for text in (first, second))
    got = {
        "a": a,
        "b": b,
        "single": tokenizer.build_inputs_with_special_tokens(a),
        "pair": tokenizer.build_inputs_with_special_tokens(a, b),
        "call_pair": tokenizer(first, second)["input_ids"],
        "call_single_keys": list(tokenizer(first)),
        "call_list_keys": list(tokenizer([first, second])),
        "empty_call": tokenizer("")["input_ids"],
        "truncated8": tokenizer(long_text, truncation=True, max_length=8)["input_ids"],
        "truncated_pair10": tokenizer(long_text, long_pair, truncation=True, max_length=10)["input_ids"],
    }
    assert got == recorded


@golden("tokenizer", lambda case: case.id.endswith("tok_misc"))
def test_tokenizer_pads(case):
    tokenizer, recorded = tokenizer_of(case), case.text()
    texts, pairs = recorded["batch"]["texts"], recorded["batch_pairs"]["pairs"]
    for got, want in (
        (tokenizer(texts, padding=True, return_tensors="pt"), recorded["batch"]),
        (tokenizer(texts, pairs, padding=True, return_tensors="pt"), recorded["batch_pairs"]),
    ):
        assert got["attention_mask"].dtype == torch.bool
        for name in ("input_ids", "position_ids", "attention_mask"):
            assert got[name].long().tolist() == want[name]


@golden("tokenizer", lambda case: case.id.endswith("tok_misc"))
def test_tokenizer_saves(case, tmp_path):
    tokenizer, recorded = tokenizer_of(case), case.text()
    tokenizer.save_pretrained(tmp_path)
    source = PUBLISHED_VOCABULARY if case.id.startswith("realtok") else case.folder / "tokenizer/mini_ice_text.model"
    assert recorded["save"]["vocab_file_identical"]
    assert (tmp_path / "ice_text.model").read_bytes() == source.read_bytes()
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    # The library of today has no special_tokens_map_file and leaves out a padding_side that the class gives.
    assert set(recorded["save"]["tokenizer_config_keys"]) - set(saved) == {"special_tokens_map_file", "padding_side"}
    special_tokens = recorded["save"]["special_tokens_map"]
    assert {name: saved[name] for name in special_tokens} == special_tokens
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ChatGLMTokenizer and loaded.padding_side == "left"
    for text in recorded["batch"]["texts"]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def pad_like_the_original(case, rows, **kwargs):
    """Left-pad rows of ids; the special ids of the recorded network are renamed to the tokenizer's and back."""
    tokenizer = mini_tokenizer(case.folder)
    config = read_index(case.folder)["weights"][case.entry["weights"]]["config"]
    names = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
    there = {config[name]: getattr(tokenizer, name) for name in names}
    back = {new: old for old, new in there.items()}
    batch = tokenizer.pad(
        {"input_ids": [[there.get(token, token) for token in row] for row in rows]}, return_tensors="pt", **kwargs
    )
    batch["input_ids"].apply_(lambda token: back.get(token, token))
    return batch


@golden("padding")
def test_padding(case):
    recorded = case.tensors()
    pad = read_index(case.folder)["weights"][case.entry["weights"]]["config"]["pad_token_id"]
    rows = [row[row != pad].tolist() for row in recorded["input_ids"]]
    kwargs = {
        "pad_multiple8": {"padding": True, "pad_to_multiple_of": 8},
        "pad_maxlen10": {"padding": "max_length", "max_length": 10},
    }[case.id.rsplit("_", 1)[0]]
    batch = pad_like_the_original(case, rows, **kwargs)
    assert {name: batch[name].tolist() for name in recorded} == {name: recorded[name].tolist() for name in recorded}


@golden("padded_forward")
def test_padding_of_padded_forward(case):
    recorded = case.tensors()
    batch = pad_like_the_original(case, case.meta["unpadded"], padding=True)
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert batch[name].tolist() == recorded[name].tolist()


# quantisation


@golden("quant_linear", lambda case: "weight_in" in case.entry["keys"])
def test_quantized_matrix(case):
    recorded, bits = case.tensors(), case.meta["bits"]
    packed, scale = quantize_weight(recorded["weight_in"], bits)
    assert torch.equal(packed, recorded["weight"])
    assert scale.dtype == recorded["weight_scale"].dtype and torch.equal(scale, recorded["weight_scale"])
    assert torch.equal(unpack_weight(packed, bits), recorded["weight_int"])
    dequantized = dequantize_weight(packed, scale, bits, recorded["weight_in"].dtype)
    assert torch.equal(dequantized, recorded["dequantised"])
    y = linear(recorded["x"], packed, scale, recorded["bias"], bits)
    torch.testing.assert_close(y, recorded["y"], atol=case.tolerance["y_atol"], rtol=0)


@golden("quant_linear", lambda case: "weight_in" not in case.entry["keys"])
def test_every_stored_byte_unpacks(case):
    recorded = case.tensors()
    got = dequantize_weight(recorded["weight"], recorded["weight_scale"], case.meta["bits"], torch.float32)
    assert torch.equal(got, recorded["dequantised"])


@golden("quant_model")
@torch.no_grad()
def test_quantized_model(case):
    """A network quantised here: stored bytes and scales exact, logits of the plain torch path."""
    recorded = case.tensors()
    half = case.meta.get("dtype") == "fp16"
    model = copy.deepcopy(case.model("eager", torch.float16 if half else torch.float32))
    assert model.quantize(case.meta["bits"], case.meta.get("quantization_embeddings", False)) is model
    set_activations(model, "float32")
    state = model.state_dict()
    exact = {key.partition(".")[2]: want for key, want in recorded.items() if key.startswith(("q.", "scale32."))}
    if "checkpoint" in case.meta:  # its scales are float16, its bytes are these
        stored = load_file(case.folder / read_index(case.folder)["weights"][case.meta["checkpoint"]]["file"])
        exact |= {key: want for key, want in stored.items() if want.dtype == torch.int8}
    assert len(exact) > 10
    for key, want in exact.items():
        assert state[key].dtype == want.dtype and torch.equal(state[key], want), key
    logits = model(recorded["input_ids"]).logits
    case.assert_logits(logits, recorded["logits" if half else "logits_quantised_here"])


@golden("quant_model", lambda case: "checkpoint" in case.meta)
@torch.no_grad()
def test_quantized_checkpoint(case):
    """A stored quantised network, in float32: logits and greedy decoding."""
    recorded = case.tensors()
    model = build_model(case.folder, (case.meta["checkpoint"],), "sdpa", torch.float32)
    set_activations(model, "float32")
    case.assert_logits(model(recorded["input_ids"]).logits, recorded["logits_from_checkpoint"])
    prompt = recorded["input_ids"][:, : case.meta["prompt_len"]]
    ids = model.generate(prompt, max_new_tokens=case.meta["max_new_tokens"], do_sample=False, eos_token_id=None)
    assert torch.equal(ids, recorded["sequences_from_checkpoint"])
