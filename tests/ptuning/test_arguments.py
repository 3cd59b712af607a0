"""Flags: those of the original stay valid, and wrong ones are refused in one sentence."""

import importlib.util

import pytest

from ptuning.arguments import TuningArguments, parse_arguments

ORIGINAL = """--do_train --train_file {file} --validation_file {file} --test_file {file} --prompt_column content
    --response_column summary --history_column history --overwrite_cache --model_name_or_path THUDM/chatglm-6b
    --output_dir out --overwrite_output_dir --max_source_length 64 --max_target_length 64
    --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16
    --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000 --learning_rate 2e-2
    --pre_seq_len 128 --quantization_bit 4 --prefix_projection --val_max_target_length 64 --pad_to_max_length
    --ignore_pad_token_for_loss False --max_train_samples 5 --max_eval_samples 5 --max_predict_samples 5 --num_beams 2
    --source_prefix x --preprocessing_num_workers 2 --config_name a --tokenizer_name b --cache_dir c
    --use_fast_tokenizer False --model_revision main --use_auth_token --resize_position_embeddings true --lang zh
    --dataset_name d --dataset_config_name e --forced_bos_token f --local_rank 0"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('{"prompt": "a", "response": "b"}')
    return path


def parse(file, flags):
    return parse_arguments(["--do_train", "--train_file", str(file), "--output_dir", "out", *flags.split()])


def test_every_flag_of_the_original_is_valid_and_those_without_meaning_are_named(file):
    _, model_args, data_args, training_args, ignored = parse_arguments(ORIGINAL.format(file=file).split())
    assert (model_args.pre_seq_len, model_args.prefix_projection, model_args.quantization_bit) == (128, True, 4)
    assert (data_args.history_column, data_args.val_max_target_length, data_args.num_beams) == ("history", 64, 2)
    assert (training_args.learning_rate, training_args.overwrite_output_dir) == (0.02, True)
    assert training_args.predict_with_generate and training_args.gradient_accumulation_steps == 16
    assert ignored == [
        *("--config_name", "--tokenizer_name", "--use_fast_tokenizer", "--cache_dir", "--use_auth_token"),
        *("--resize_position_embeddings", "--lang", "--forced_bos_token", "--dataset_name", "--dataset_config_name"),
        *("--overwrite_cache", "--ignore_pad_token_for_loss"),
    ]


@pytest.mark.parametrize(("flags", "method"), [("--pre_seq_len 4", "prefix"), ("--lora_rank 4", "LoRA"), ("", "full")])
def test_flags_choose_the_method(file, flags, method):
    _, model_args, *_ = parse(file, flags)
    assert model_args.method == method
    assert model_args.lora_alpha == (8 if method == "LoRA" else 0)


def test_names_of_older_transformers_are_understood(file):
    *_, training_args, _ = parse(
        file, f"--evaluation_strategy epoch --no_cuda --validation_file {file} --warmup_ratio 0.1"
    )
    assert (training_args.eval_strategy, training_args.use_cpu, training_args.do_eval) == ("epoch", True, True)
    assert training_args.warmup_steps == 0.1


@pytest.mark.parametrize("value", ["", " true", " false"])
def test_gradient_checkpointing_is_a_switch_that_can_be_left_out(file, value):
    *_, training_args, _ = parse(file, f"--gradient_checkpointing{value}")
    assert training_args.asked_for_checkpointing is (value != " false")
    assert bool(training_args.gradient_checkpointing) is (value != " false")
    assert parse(file, "")[3].asked_for_checkpointing is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--pre_seq_len 4 --lora_rank 2", "--pre_seq_len is P-Tuning v2 and --lora_rank is LoRA: give one of them"),
        ("--pre_seq_len 0", "--pre_seq_len must be at least 1, got 0"),
        ("--prefix_projection", "--prefix_projection belongs to P-Tuning v2: add --pre_seq_len"),
        ("--lora_rank 4 --lora_dropout 1", "--lora_dropout must be from 0 to below 1, got 1.0"),
        ("--learning_rate 0", "--learning_rate must be above 0, got 0.0"),
        ("--learning_rate nan", "--learning_rate must be above 0, got nan"),
        ("--max_steps 0", "--max_steps must be at least 1, got 0"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1, got 0"),
        ("--max_source_length 1", "--max_source_length must be at least 2 tokens, got 1"),
        ("--replay_ratio 1", "--replay_ratio must be between 0 and 1, got 1.0"),
        ("--quantization_bit 3", "argument --quantization_bit/--quantization-bit: invalid choice: 3"),
        ("--pre_seq_lenn 4", "there is no flag --pre_seq_lenn: did you mean --pre_seq_len?"),
        ("--logging_nan_inf_filter", "leave --logging_nan_inf_filter out"),
        ("--do_eval", "--validation_file is missing: give the file with the examples"),
        ("--general_file nowhere.json", "--general_file: there is no file nowhere.json"),
        ("stray", "stray belongs to no flag"),
        ("--seed -1", "--seed must be from 0 to 4294967295, got -1"),
        ("--metric_for_best_model bleu-4", "--metric_for_best_model must be loss, got bleu-4"),
        (
            "--overwrite_output_dir --resume_from_checkpoint out/checkpoint-2",
            "starts anew and --resume_from_checkpoint",
        ),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(file, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        parse(file, flags)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1]
    assert len(lines) <= 2  # at most a short usage line before it


def test_nothing_to_do_is_said(capsys):
    with pytest.raises(SystemExit):
        parse_arguments([])
    assert "nothing to do: give --do_train, --do_eval, --do_predict or --preview_data" in capsys.readouterr().err


def test_the_preview_needs_the_file_to_train_on(file, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--preview_data", "--do_predict", "--test_file", str(file), "--output_dir", "out"])
    assert "--train_file is missing: give the file to preview" in capsys.readouterr().err


def test_a_folder_for_the_result_is_needed(file, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--do_train", "--train_file", str(file)])
    assert "--output_dir is missing: give the folder for the result" in capsys.readouterr().err


def test_several_visible_gpus_in_one_process_are_refused(file, monkeypatch, capsys):
    monkeypatch.setattr(TuningArguments, "n_gpu", 2)
    with pytest.raises(SystemExit):
        parse(file, "")
    assert "torchrun --nproc_per_node=2 ptuning/main.py" in capsys.readouterr().err


def test_deepspeed_names_its_package_where_it_is_missing(file, capsys):
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed")
    with pytest.raises(SystemExit):
        parse(file, "--deepspeed x.json")
    assert "--deepspeed needs the package deepspeed" in capsys.readouterr().err
