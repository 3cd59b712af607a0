"""What the READMEs of ptuning/ promise holds: commands, forms of data, flags, memory."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser

import utils
from ptuning import arguments, convert, training, web_demo
from ptuning.data import read_examples

ROOT = Path(__file__).resolve().parents[2]
CHINESE, ENGLISH = ((ROOT / "ptuning" / name).read_text(encoding="utf-8") for name in ("README.md", "README_en.md"))
GROUPS = arguments.ModelArguments, arguments.DataArguments, arguments.TuningArguments


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def calls(script):
    """The flags of every call of a script, as lists of words."""
    commands = [shlex.split(line) for line in "".join(code_blocks(CHINESE, "bash")).splitlines()]
    return [words[words.index(script) + 1 :] for words in commands if script in words]


def test_commands_have_flags_that_their_scripts_understand(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(calls("ptuning/main.py")) >= 8
    for flags in calls("ptuning/main.py"):
        arguments.parse_arguments(flags)  # exits if it does not, or if a file of the project is not there
    for script, parser in (
        ("ptuning/convert.py", convert.build_parser()),
        ("ptuning/web_demo.py", web_demo.build_parser()),
    ):
        assert calls(script)
        for flags in calls(script):
            parser.parse_args(flags)


def test_data_in_the_readme_are_read_as_what_they_are_said_to_be(tmp_path):
    forms = []
    for i, example in enumerate(code_blocks(CHINESE, "json")):
        path = tmp_path / f"{i}.json"
        path.write_text(example, encoding="utf-8")
        examples, form = read_examples(path)
        assert len(examples) == 1
        forms.append(re.match(r"[\w-]+", form)[0] + " with history" * ("with history" in form))
    assert forms == ["prompt", "prompt with history", "ADGEN", "Alpaca", "ShareGPT", "messages"]


@pytest.mark.parametrize("text", [CHINESE, ENGLISH], ids=["README.md", "README_en.md"])
def test_tables_list_the_flags_of_main(text):
    listed = re.findall(r"^\| `--(\w+)` \|", text, flags=re.MULTILINE)
    flags = {name for action in HfArgumentParser(GROUPS)._actions for name in action.option_strings}
    assert {f"--{name}" for name in listed} <= flags and len(listed) == len(set(listed))
    own = {field.name for group in GROUPS[:2] for field in fields(group)}
    assert {name for name in own if f"`--{name}" not in text} == set()


def memory(method, bits, dtype):
    """Gigabytes of one example of 64 + 64 tokens with ChatGLM-6B, as the table has them."""
    config = utils.published_checkpoint().config
    config.set_quantization(bits, 0)
    model = utils._empty_model(config, dtype)
    if method.startswith("P-Tuning"):
        model.add_prefix_encoder(128)
    elif method == "LoRA":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["query_key_value"]))
    needs = training.forecast(model, 1, 128, checkpointing=True)
    sizes = needs.weights, needs.learning, needs.activations, needs.logits, needs.total
    return " | ".join(f"{size / 1e9:.1f}" for size in sizes)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_memory_table_is_what_the_program_computes():
    forms = "INT4|INT8|bfloat16|float32"
    rows = re.findall(rf"^\| ([\w-]+)[^|]*, ({forms}) \| (.*\d) \|$", ENGLISH, flags=re.MULTILINE)
    assert [(method, form) for method, form, _ in rows] == [
        *((method, form) for method in ("P-Tuning", "LoRA") for form in ("INT4", "INT8", "bfloat16")),
        ("full", "float32"),
    ]
    for method, form, numbers in rows:
        bits = int(form.removeprefix("INT")) if form.startswith("INT") else 0
        assert numbers == memory(method, bits, "bfloat16" if bits else form), (method, form)
    assert [row[2] for row in rows] == re.findall(rf"^\| [^|]*，(?:{forms}) \| (.*\d) \|$", CHINESE, flags=re.MULTILINE)
